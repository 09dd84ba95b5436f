"""Test whether this package raised an error. Messages of such errors are written for users."""

from __future__ import annotations

from dis import opmap

_PACKAGE = __package__.partition(".")[0]


def is_own(error: Exception) -> bool:
    """Return whether this package raised an error.

    The answer is yes if the error's class is defined in this package, or if a `raise` statement of this package raised
    it. An error that a library or Python raised in a call from this package does not count.
    """
    if type(error).__module__.partition(".")[0] == _PACKAGE:
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None or frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] != _PACKAGE:
        return False
    return frame.tb_frame.f_code.co_code[frame.tb_lasti] == opmap["RAISE_VARARGS"]
