"""Words for true and false on a command line, in YAML and in scripts."""

from collections.abc import Collection

SWITCH_WORDS = {
    **dict.fromkeys(("true", "yes", "on", "t", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "f", "n", "0"), False),
}


def choice_of_switch(value: bool, choices: Collection[str]) -> str | None:
    """Return the one of `choices` that means the same as a boolean, such as `"none"` or `"no"` for false, or `None` if
    there is none."""
    words = [word for word, meant in SWITCH_WORDS.items() if meant is value]
    return next((word for word in (words if value else ["none", *words]) if word in choices), None)
