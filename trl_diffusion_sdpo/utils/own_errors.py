"""Test whether an error was raised by this package, whose error messages are written for users."""

from __future__ import annotations

from dis import opmap

_PACKAGE = __package__.partition(".")[0]


def is_own(error: Exception) -> bool:
    """Return whether this package raised an error.

    The result is true if this package defines the error's class, or if a `raise` statement of this package raised the
    error. The result is false if code that this package called, such as a library, raised the error.
    """
    if type(error).__module__.partition(".")[0] == _PACKAGE:
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None or frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] != _PACKAGE:
        return False
    return frame.tb_frame.f_code.co_code[frame.tb_lasti] == opmap["RAISE_VARARGS"]
