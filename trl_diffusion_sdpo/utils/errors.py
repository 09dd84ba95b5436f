"""Errors whose messages are written for users. The command line prints only the message, without a traceback."""


class UserError(ValueError):
    """Error that you can mend: a setting, a file or the data must change, and the message says how.

    All errors that this package raises for users are of this class. Errors of libraries are not.

    Example:

    ```python
    try:
        args = DiffusionSDPOConfig("out", beta=-1.0)
    except UserError as error:
        print(error)
    ```
    """


class NotFiniteError(UserError, FloatingPointError):
    """Error for a loss, an error of the reference or a weight that is NaN or infinite."""
