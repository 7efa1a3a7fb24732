"""Takes credentials out of text before it is published or logged. Pure functions, for any thread.

What a producer sends may hold a password anywhere: in a URL, in a field with a name that is not ours, in JSON inside of
JSON. So these functions go by what looks like a secret, and rather take out too much.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import to_json

_HIDDEN = "***"
_SCHEME = re.compile(r"(?::|%3A)(?:/|%2F){2}", re.IGNORECASE)
_AT = re.compile(r"@|%40")
_ESCAPED = re.compile(r"(?<!\\)\\+(?:(/)|u00([2-7][0-9a-f]))", re.IGNORECASE)
"""A character of ASCII as JSON may write it, also in JSON inside of JSON."""
_KEPT_ESCAPED = frozenset('"\\\x7f')
_SENSITIVE = (
    r"pass(?:word|wd|phrase|code)|pwd|secret|token|credential|authori[sz]ation|cookie|signature"
    r"|(?:api|access|private)[-_ ]?key"
)
_USER_INFO = re.compile(r"(?<![^\s\"'(,<=])[^\s\"'(,<=@:]*+:(?!//)[^\s\"'@]*+@")
"""User and password without a scheme."""
_NAMES_A_SECRET = re.compile(_SENSITIVE, re.IGNORECASE)
# Without possessive quantifiers and fixed beginnings these would take quadratic time: a producer chooses the text.
_TOKENS = (
    (re.compile(r"\b(bearer|basic|digest|negotiate)(?:\s|%20|\+)+[^\s\"',;]+", re.IGNORECASE), rf"\1 {_HIDDEN}"),
    (re.compile(r"(?<![\w-])eyJ[\w-]{5,}\.[\w.-]*"), _HIDDEN),  # a JSON Web Token
)
_WORD = re.compile(r"[^\s\"]+")
_QUERY = re.compile(r"[?#][^\s\"')]+")
_IN_A_VALUE = (
    (_USER_INFO, f"{_HIDDEN}@"),
    (re.compile(r"(?:\?|%3F)(?=\S).*", re.IGNORECASE | re.DOTALL), f"?{_HIDDEN}"),
    (
        re.compile(
            rf"((?:{_SENSITIVE})[\w-]{{0,40}}\\*[\"']?\s*(?:[:=]|%3D)\s*)\S.*",
            re.IGNORECASE | re.DOTALL,
        ),
        rf"\1{_HIDDEN}",
    ),
    *_TOKENS,
)


def redact_sentence(text: str) -> str:
    """Return a sentence of ours without user info and queries of the URLs in it, and without tokens."""
    if _SCHEME.search(text):
        text = _WORD.sub(_without_url_secrets, text)
    return _replaced(text, _TOKENS)


def redact_value(text: str, *, is_cut: bool = False) -> str:
    """Return what a producer sent without anything that looks like user info, a query, a token or a password.

    What comes behind such a place may be missing: where a secret ends is not known.

    Args:
        text: a value, or a message that is no valid JSON.
        is_cut: whether the message goes on behind `text`, perhaps in the middle of a user info.
    """
    text = _ESCAPED.sub(_unescaped, text)
    scheme = _SCHEME.search(text)
    if scheme is not None:
        text = text[: scheme.end()] + _without_user_info(text[scheme.end() :], is_cut=is_cut)
    return _replaced(text, _IN_A_VALUE)


def redact_name(name: str) -> str:
    """Return a file's name as it is, unless it is a URL or has a user info in it."""
    if ":" not in name and "%" not in name:  # most names, and the expressions cost more than the rest of a status
        return name
    return redact_value(name) if _SCHEME.search(name) or _USER_INFO.search(name) else name


def _without_user_info(text: str, *, is_cut: bool) -> str:
    """Return what follows a scheme without the user info, the fragment, and all URLs before the last user info."""
    end = max((found.start() for found in _AT.finditer(text)), default=None)
    scheme = _SCHEME.search(text, end or 0) if is_cut else None
    if scheme is not None:
        text = f"{text[: scheme.end()]}{_HIDDEN}"
    elif end is None and is_cut:
        return _HIDDEN
    return ("" if end is None else _HIDDEN) + text[end:].partition("#")[0]


def redact_document(document: Any) -> Iterator[str]:
    """Yield a JSON value as JSON, its texts redacted, in pieces: a large one need not be read to the end."""
    if isinstance(document, Mapping):
        separator = "{"
        for name, value in document.items():
            yield f"{separator}{_text(name)}: "
            if _NAMES_A_SECRET.search(name):
                yield f'"{_HIDDEN}"'
            else:
                yield from redact_document(value)
            separator = ", "
        yield "{}" if separator == "{" else "}"
    elif isinstance(document, list):
        separator = "["
        for value in document:
            yield separator
            yield from redact_document(value)
            separator = ", "
        yield "[]" if separator == "[" else "]"
    elif isinstance(document, str):
        yield _text(document)
    else:
        yield to_json(document).decode()


def _text(text: str) -> str:
    return to_json(redact_value(text)).decode()


def _without_url_secrets(word: re.Match[str]) -> str:
    scheme = _SCHEME.search(word[0])
    if scheme is None:
        return word[0]
    _, at, rest = word[0][scheme.end() :].rpartition("@")
    return word[0][: scheme.end()] + (f"{_HIDDEN}@" if at else "") + _QUERY.sub(f"?{_HIDDEN}", rest)


def _unescaped(found: re.Match[str]) -> str:
    char = "/" if found[1] else chr(int(found[2], 16))
    return found[0] if char in _KEPT_ESCAPED else char


def _replaced(text: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
