"""Removes secrets from settings and messages before these are written to files, trackers, logs and the model card."""

from __future__ import annotations

import os
import re
from typing import Any

# A setting is secret if its name, in lower case and without separators, has one of these ends or parts.
_SECRET_ENDS = ("token", "passwd", "passphrase", "passphrases", "auth", "authorization", "cookie", "cookies")
_SECRET_PARTS = (
    *("secret", "password", "apikey", "accesskey", "accountkey", "privatekey", "credential", "connectionstring"),
)
_TOKENS = re.compile(
    r"(?<!max)(?<!min)(?<!num)(?<!new)(?<!special)tokens$"
)  # matches access tokens, not counts of text tokens such as `max_tokens`
# Parameters of a URL's query whose values are secret, such as a signature.
_SIGNED = r"[\w.-]*(?:token|secret|password|signature|credential|api[_-]?key|access[_-]?key|key[_-]?id)[\w.-]*|sig|key"
# Names of secrets in `name=value`. Only the end of a name is compared, because `token_length=77` is no secret.
_GIVEN = r"[\w.-]*(?:token|secret|password|passwd|signature|credential|(?:api|access|account|private)[_-]?key)"
_IN_TEXT = (
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "hf_..."),
    (re.compile(r"\b(?:gh[pousr]_|github_pat_|sk-|api_org_)\w{16,}"), "..."),
    (re.compile(r"(?i)\b(bearer|basic) [\w.~+/=-]{8,}"), r"\1 ..."),
    (re.compile(r"(\b[a-zA-Z][\w+.-]*://)[^\s/?#@]+@"), r"\1...@"),  # user and password in a URL
    (re.compile(rf"(?i)([?&;](?:{_SIGNED})=)[^\s&#;'\"]+"), r"\1..."),
    (re.compile(rf"(?i)((?<![\w.-]){_GIVEN}=)[^\s&#;,'\"]+"), r"\1..."),
)


def masked(value: Any, name: str = "") -> Any:
    """Return a copy of nested settings without secrets.

    The value of a secret setting is replaced by the setting's name. A secret within a text is replaced by dots.

    Args:
        value: Settings to copy. Dictionaries, lists, tuples, sets, strings and paths are searched. Values of other
            types are returned unchanged.
        name (`str`): Name of the setting. The value of `hub_token` becomes `<HUB_TOKEN>`.
    """
    if names_secret(name) and not (value is None or isinstance(value, bool)):
        return f"<{name.upper()}>"
    if isinstance(value, dict):
        return {key: masked(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, (list, set, frozenset)) or type(value) is tuple:
        return type(value)(masked(entry, name) for entry in value)
    if isinstance(value, os.PathLike):
        return without_secrets(os.fspath(value))
    return without_secrets(value) if isinstance(value, str) else value


def names_secret(name: str) -> bool:
    """Return whether the setting `name` holds a secret: true for `hub_token`, false for `token_length`."""
    plain = re.sub(r"[\W_]", "", name.lower())
    ends = plain.endswith(_SECRET_ENDS) or _TOKENS.search(plain) is not None
    return ends or any(word in plain for word in _SECRET_PARTS)


def without_secrets(text: str) -> str:
    """Return a text in which dots replace tokens, passwords and the signatures of URLs."""
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    return text
