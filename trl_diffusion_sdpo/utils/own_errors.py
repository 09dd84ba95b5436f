"""Which errors this package raised itself: their messages are for users."""

from __future__ import annotations

from dis import opmap

_PACKAGE = __package__.partition(".")[0]


def is_own(error: Exception) -> bool:
    """Whether an error is of one of this package's classes, or a `raise` of this package was where it began. A call of
    this package that fails within a library, or within Python itself, is neither."""
    if type(error).__module__.partition(".")[0] == _PACKAGE:
        return True
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or place.tb_frame.f_globals.get("__name__", "").partition(".")[0] != _PACKAGE:
        return False
    return place.tb_frame.f_code.co_code[place.tb_lasti] == opmap["RAISE_VARARGS"]
