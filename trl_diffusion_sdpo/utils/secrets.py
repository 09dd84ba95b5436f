"""Removes secrets from settings and messages on their way to files, trackers, logs and the model card."""

from __future__ import annotations

import os
import re
from typing import Any

# A setting is secret if its name, in lower case and without separators, has one of these ends or parts.
_SECRET_ENDS = ("passwd", "passphrase", "passphrases", "auth", "authorization", "cookie", "cookies")
_SECRET_PARTS = (
    "secret",
    "password",
    "apikey",
    "accesskey",
    "accountkey",
    "privatekey",
    "credential",
    "connectionstring",
    "signature",
)
# Access tokens, not tokens of text: neither counts, such as `max_tokens`, nor words, such as `bos_token`.
_COUNTS = "max min num new total per next last"
_WORDS = "bos eos pad unk sep cls mask special image video placeholder initializer"
_TOKEN = re.compile("".join(f"(?<!{word})" for word in f"{_COUNTS} {_WORDS}".split()) + "tokens?$")
_SIGNS_URLS = ("sig", "key", "keyid", "keypairid")  # secret only as parameters in a URL's query
_PUBLIC = ("", "none", "null", "true", "false", "...")  # values that show no secret
# Tokens and keys known by their own form, wherever they are.
_BY_FORM = (
    (re.compile(r"(?<![A-Za-z0-9])hf_(?:[A-Za-z0-9]{16,}|oauth_[\w.-]{16,})"), "hf_..."),
    (re.compile(r"(?<![A-Za-z0-9])(?:gh[pousr]_|github_pat_|glpat-|api_org_|sk-(?:[a-z]+-)?)\w{16,}[\w-]*"), "..."),
    (re.compile(r"\beyJ[\w-]{8,500}\.[\w-]{8,}(?:\.[\w-]*)?"), "..."),  # JSON web tokens
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*-----|\Z)", re.DOTALL), "..."),
    (re.compile(r"\b((?i:bearer|basic) )(?=\S*[A-Z0-9=])[\w.~+/=-]{8,}"), r"\1..."),
    # User and password in a URL. A password may itself have `@`, or `/` if what stands before it is no port.
    (re.compile(r"//[^\s/?#]*@"), "//...@"),
    (re.compile(r"//[^\s/?#@:\[]{1,500}:(?!\d*(?:[/?#\s]|\Z))[^\s@'\"]{1,500}@"), "//...@"),
)
# A name and what separates it from its value, as in `name=value`, `"name": "value"`, `name: value`, `--name value`.
_NAME = re.compile(r"(?<![\w.-])(?P<name>[\w.-]*\w)(?P<end>\\*[\"']?[ \t]*(?:=>|=|:)[ \t]*|(?<=\w)[ \t]+)")
_VALUE = re.compile(
    r"(?i:(?:bearer|basic|token)[ \t]+)?"
    r"(?:(?P<quote>\\*[\"'])(?P<quoted>.*?)(?:(?<!\\)(?P=quote)|\Z)|(?P<many>[\[({][^\])}]*[\])}]?)|(?P<bare>[^\s&#;,'\")}\]]+))",
    re.DOTALL,
)


def masked(value: Any, name: str = "") -> Any:
    """Return a copy of nested settings without secrets.

    A secret setting's value is replaced by its name, a secret within a text by dots.

    Args:
        value: Settings to copy. Dictionaries, lists, tuples, sets, strings and paths are searched, other types returned
            unchanged.
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
    ends = plain.endswith(_SECRET_ENDS) or _TOKEN.search(plain) is not None
    return ends or any(word in plain for word in _SECRET_PARTS)


def without_secrets(text: str) -> str:
    """Return a text with dots in place of tokens, passwords and the signatures of URLs."""
    for pattern, replacement in _BY_FORM:
        text = pattern.sub(replacement, text)
    kept: list[str] = []
    end = 0
    for found in _NAME.finditer(text):
        before = text[max(0, found.start() - 1) : found.start()]
        if found.start() < end or not _is_secret(found["name"], before, found["end"]):
            continue
        value = _VALUE.match(text, found.end())
        kind = None if value is None else value.lastgroup
        if value is not None and kind is not None and value[kind].lower() not in _PUBLIC:
            kept += [text[end : value.start(kind)], "..."]
            end = value.end(kind)
    return "".join([*kept, text[end:]])


def _is_secret(name: str, before: str, separator: str) -> bool:
    """Return whether a value after `name` is secret. Only an option, such as `--token`, may end with a blank."""
    if separator.isspace() and not name.startswith("--"):
        return False
    plain = re.sub(r"[\W_]", "", name.lower())
    return names_secret(name) or (before in ("?", "&", ";") and separator == "=" and plain in _SIGNS_URLS)
