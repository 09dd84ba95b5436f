"""Errors with messages for users. The command line prints only the message, no traceback."""


class UserError(ValueError):
    """Something you can fix: a setting, a file or the data. The message says how.

    In other processes than the one that found it, it may be a `RuntimeError`.

    Example:

    ```python
    try:
        args = DiffusionSDPOConfig("out", beta=-1.0)
    except UserError as error:
        print(error)
    ```
    """


class NotFiniteError(UserError, FloatingPointError):
    """A loss, an error of the reference or a weight is NaN or infinite."""
