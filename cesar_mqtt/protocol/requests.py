"""A submission: the fields of a job request and the rules that they obey. Any thread may call it.

The message of a `ValueError` continues a sentence that begins with the field's name.
"""

import json
import re
from itertools import pairwise
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from cesar_mqtt.protocol.formats import FORMATS, Format
from cesar_mqtt.protocol.languages import language_code
from cesar_mqtt.protocol.payloads import Payload
from cesar_mqtt.protocol.topics import JOB_ID_PATTERN
from cesar_mqtt.transcript import cut_hotwords, cut_prompt

METADATA_BYTES = 4096
URL_CHARACTERS = 4096
TEMPERATURES = 10
CLIPS = 1000
_PATH_CHARACTERS = 4096
_PROMPT_CHARACTERS = 65_536
_MODEL_CHARACTERS = 200

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


class JobRequest(Payload):
    """What a producer publishes on `cesar/jobs`; a field's description is what a refusal says that it must be."""

    job_id: Annotated[str, Field(pattern=JOB_ID_PATTERN)] | None = Field(
        default=None, description="text of 1 to 64 of A-Z, a-z, 0-9, _ and -"
    )
    audio_path: Annotated[str, Field(min_length=1, max_length=_PATH_CHARACTERS)] | None = Field(
        default=None, description=f"text of 1 to {_PATH_CHARACTERS} characters"
    )
    audio_url: Url | None = Field(
        default=None, description=f"an http or https URL of at most {URL_CHARACTERS} characters"
    )
    audio_base64: Annotated[str, Field(min_length=1)] | None = Field(default=None, description="a file in base64")
    model_size: Annotated[str, Field(min_length=1, max_length=_MODEL_CHARACTERS)] | None = Field(
        default=None, description="the name of a model"
    )
    language: Language | None = Field(default=None, description="text such as 'de', or be left out")
    task: Literal["transcribe", "translate"] = Field(default="transcribe", description="'transcribe' or 'translate'")
    initial_prompt: Annotated[str, Field(max_length=_PROMPT_CHARACTERS)] | None = Field(
        default=None, description=f"text of at most {_PROMPT_CHARACTERS} characters"
    )
    hotwords: Annotated[str, Field(max_length=_PROMPT_CHARACTERS)] | None = Field(
        default=None, description=f"text of at most {_PROMPT_CHARACTERS} characters"
    )
    beam_size: BeamSize = Field(default=5, description="a whole number from 1 to 10")
    temperature: Temperature | Temperatures | None = Field(
        default=None, description=f"a number from 0 to 1, or a list of 1 to {TEMPERATURES} such numbers"
    )
    vad_filter: bool = Field(default=True, description="true or false")
    word_timestamps: bool = Field(default=False, description="true or false")
    clip_timestamps: Clips | None = Field(
        default=None, description=f"a list of 1 to {CLIPS} ranges, each as [start, end] in seconds"
    )
    batch_size: BatchSize = Field(default=1, description="a whole number from 1 to 32")
    formats: Formats = Field(
        default_factory=list, description=f'a list such as ["txt"], of any of {", ".join(FORMATS)}'
    )
    stream: bool = Field(default=False, description="true or false")
    expires_in: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="a number of seconds above 0"
    )
    metadata: Metadata = Field(default_factory=dict, description="a JSON object")

    @model_validator(mode="after")
    def _one_audio(self) -> Self:
        given = [name for name in AUDIO_FIELDS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"Exactly one of {', '.join(AUDIO_FIELDS)} is needed, found {found}")
        return self

    def options(self) -> dict[str, Any]:
        """Return the transcription options that differ from their defaults; of very long prompts, what can count."""
        options = self.model_dump(include=_OPTIONS, exclude_defaults=True)
        return options | {name: kept(options[name]) for name, kept in _PROMPTS.items() if name in options}


AUDIO_FIELDS = ("audio_path", "audio_url", "audio_base64")
_OPTIONS = {
    "language",
    "task",
    "initial_prompt",
    "hotwords",
    "beam_size",
    "temperature",
    "vad_filter",
    "word_timestamps",
    "clip_timestamps",
    "batch_size",
}
_PROMPTS = {"initial_prompt": cut_prompt, "hotwords": cut_hotwords}
