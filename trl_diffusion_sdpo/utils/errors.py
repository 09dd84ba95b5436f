"""Errors whose messages are written for users. The command line prints only the message, without a traceback."""


class UserError(ValueError):
    """Something you can fix: a setting, a file or the data. The message says how.

    With several processes, those that did not find the problem themselves may raise a `RuntimeError` instead.

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
