"""What the fields of a request may hold, where a type alone does not say it; pure, any thread may call it.

A `ValueError` goes on after the field's name, as a refusal puts it.
"""

import json
import re
from itertools import pairwise
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from cesar_mqtt.protocol.formats import FORMATS, Format
from cesar_mqtt.protocol.languages import language_code

METADATA_BYTES = 4096
URL_CHARACTERS = 4096
TEMPERATURES = 10
CLIPS = 1000

# A blank in a path is escaped on the way. In front of it, like a backslash, it would let each reader of the URL find
# another host in it.
_URL = re.compile(
    r"https?://[^/?#\s\\\x00-\x1f\x7f-\x9f]+([/?#][^\x00-\x1f\x7f-\x9f]*)?",
    re.IGNORECASE,
)


_DETECTED = frozenset({"", "auto"})
"""What other programs say instead of leaving the language out."""


def _known_language(text: str) -> str | None:
    if text.strip().lower() in _DETECTED:
        return None
    code = language_code(text)
    if code is None:
        raise ValueError("is no language that Whisper knows: use a code such as 'de', or leave it out")
    return code


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        names_host = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a bracket that is not closed
        names_host = False
    if not (names_host and _URL.fullmatch(text)):
        raise ValueError("is no URL that begins with http:// or https:// and names a host")
    return text


def _whole(value: Any) -> Any:
    """Take 5.0 for 5: some programs have no other numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _in_order(clips: list[list[float]]) -> list[list[float]]:
    if any(start >= end for start, end in clips):
        raise ValueError("holds a range that does not end after its start")
    if any(start < end for (_, end), (start, _) in pairwise(clips)):
        raise ValueError("holds a range that begins before the one in front of it has ended")
    return clips


def _each_once(formats: list[Format]) -> list[Format]:
    """Return them in the contract's order: whoever asks for the same in another order asks for the same."""
    return [name for name in FORMATS if name in formats]


def _small(metadata: dict[str, Any]) -> dict[str, Any]:
    try:
        size = len(json.dumps(metadata, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode())
    except ValueError as exc:
        raise ValueError("holds a number that is too large, or text that is not Unicode") from exc
    if size > METADATA_BYTES:
        raise ValueError(f"has {size} bytes of JSON, user properties included: at most {METADATA_BYTES} are echoed")
    return metadata


Language = Annotated[str, AfterValidator(_known_language)]
BeamSize = Annotated[int, Field(ge=1, le=10), BeforeValidator(_whole)]
BatchSize = Annotated[int, Field(ge=1, le=32), BeforeValidator(_whole)]
Url = Annotated[str, Field(max_length=URL_CHARACTERS), AfterValidator(_url)]
Temperature = Annotated[float, Field(ge=0, le=1)]
Temperatures = Annotated[list[Temperature], Field(min_length=1, max_length=TEMPERATURES)]
Clip = Annotated[list[Annotated[float, Field(ge=0, allow_inf_nan=False)]], Field(min_length=2, max_length=2)]
# `fail_fast`: a message may bring a million mistakes, and each would be reported.
Clips = Annotated[list[Clip], Field(min_length=1, max_length=CLIPS, fail_fast=True), AfterValidator(_in_order)]
Formats = Annotated[list[Format], Field(fail_fast=True), AfterValidator(_each_once)]
Metadata = Annotated[dict[str, Any], AfterValidator(_small)]
