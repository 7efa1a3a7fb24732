"""A submission: the fields of a job request, each with its rule, its meaning and the sentence that names a valid value.

Pure; any thread may call it. The message of a `ValueError` continues a sentence that begins with the field's name.
"""

import dataclasses
import json
import re
from itertools import pairwise
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from cesar_mqtt.protocol.commands import CURRENT
from cesar_mqtt.protocol.fields import FORMATS, MUST, Format, Payload
from cesar_mqtt.protocol.languages import DETECT, language_code
from cesar_mqtt.protocol.topics import JOB_ID_PATTERN
from cesar_mqtt.redaction import redact_value
from cesar_mqtt.transcript import TranscriptionOptions, cut_hotwords, cut_prompt

AUDIO_FIELDS = ("audio_path", "audio_url", "audio_base64")

_METADATA_BYTES = 4096
_PATH_CHARACTERS = 4096
_URL_CHARACTERS = 4096
_MODEL_CHARACTERS = 200
_PROMPT_CHARACTERS = 65_536
_TEMPERATURES = 10
_CLIPS = 1000
_BEAMS = 10
_BATCH = 32
_TRACKS = 100
_LINE_WIDTH = (10, 1000)
_LINE_COUNT = 10
_SPEAKERS = 20
MAX_PRIORITY = 9

# A blank in a path is escaped when the URL is fetched. Before the path it would, like a backslash, make each reader of
# the URL find another host in it.
_URL = re.compile(
    r"https?://[^/?#\s\\\x00-\x1f\x7f-\x9f]+([/?#][^\x00-\x1f\x7f-\x9f]*)?",
    re.IGNORECASE,
)
_FILE_URL = re.compile(r"file:(//(?P<host>[^/]*))?(?P<path>.*)", re.IGNORECASE | re.DOTALL)


def _known_language(text: str) -> str | None:
    if text.strip().lower() in DETECT:
        return None
    code = language_code(text)
    if code is None:
        raise ValueError("is not a language that Whisper knows: use a code such as 'de', or leave it out")
    return code


def _valid_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        names_host = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a bracket that is not closed
        names_host = False
    if not (names_host and _URL.fullmatch(text)):
        raise ValueError("is not a URL that begins with http:// or https:// and names a host")
    return text


def _plain_path(text: str) -> str:
    """Return the path of a `file:` URL (RFC 8089), or the text as it is.

    A `?` or `#` belongs to the name: a real URL escapes it, and what programs put together from a path does not.
    """
    stripped = text.strip()
    if not stripped:
        raise ValueError("is blank: name a file")
    url = _FILE_URL.fullmatch(stripped)
    if url is None:
        return text
    host = url["host"]
    if host and host.lower() != "localhost":
        raise ValueError(f"names a file of the host {redact_value(host)!r}: write 'file:///' before an absolute path")
    try:
        path = unquote(url["path"], errors="strict")
    except UnicodeDecodeError as exc:
        raise ValueError("has escapes that are not UTF-8") from exc
    if not path.startswith("/"):
        raise ValueError("is a file URL without an absolute path: write 'file:///' before it")
    return path


def _coerce_integral(value: Any) -> Any:
    """Accept 5.0 for 5: some programs have no other numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _ordered_clips(clips: list[list[float]]) -> list[list[float]]:
    if any(start >= end for start, end in clips):
        raise ValueError("holds a range that does not end after its start")
    if any(start < end for (_, end), (start, _) in pairwise(clips)):
        raise ValueError("holds a range that begins before the previous one has ended")
    return clips


def _ordered_formats(formats: list[Format]) -> list[Format]:
    """Return each format once, in the contract's order: the same formats in another order are the same request."""
    return [name for name in FORMATS if name in formats]


def _small_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    try:
        size = len(json.dumps(metadata, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode())
    except ValueError as exc:
        raise ValueError("holds a number that is too large, or text that is not Unicode") from exc
    if size > _METADATA_BYTES:
        raise ValueError(f"has {size} bytes of JSON, user properties included: at most {_METADATA_BYTES} are echoed")
    return metadata


_Track = Annotated[int, Field(ge=0, lt=_TRACKS), BeforeValidator(_coerce_integral)]
_Beams = Annotated[int, Field(ge=1, le=_BEAMS)]
_BeamSize = Annotated[_Beams | Literal["auto"], BeforeValidator(_coerce_integral)]
_Speakers = Annotated[int, Field(ge=1, le=_SPEAKERS), BeforeValidator(_coerce_integral)]
_Temperature = Annotated[float, Field(ge=0, le=1)]
_Temperatures = Annotated[list[_Temperature], Field(min_length=1, max_length=_TEMPERATURES)]
_Clip = Annotated[list[Annotated[float, Field(ge=0, allow_inf_nan=False)]], Field(min_length=2, max_length=2)]
# `fail_fast`: a message may hold a million mistakes, and pydantic would report each.
_Clips = Annotated[list[_Clip], Field(min_length=1, max_length=_CLIPS, fail_fast=True), AfterValidator(_ordered_clips)]
_Formats = Annotated[list[Format], Field(fail_fast=True), AfterValidator(_ordered_formats)]
_NewId = Annotated[str, Field(pattern=JOB_ID_PATTERN, json_schema_extra={"not": {"const": CURRENT}})]


class JobRequest(Payload):
    """A recording to be transcribed. Exactly one of `audio_path`, `audio_url` and `audio_base64` is needed.

    A null field is the same as a missing one. An unknown field is rejected by name.
    """

    job_id: _NewId | None = Field(
        default=None,
        description="The id of the job, other than `current`. The same id with the same request again is the same job. "
        "Left out: the consumer makes one.",
        json_schema_extra={MUST: "text of 1 to 64 of A-Z, a-z, 0-9, _ and -"},
    )
    audio_path: Annotated[str, Field(min_length=1, max_length=_PATH_CHARACTERS), AfterValidator(_plain_path)] | None = (
        Field(
            default=None,
            description="A file on the consumer's machine, inside one of `audio.directories`, as a path or a `file://` "
            "URL. A relative path is looked up there.",
            json_schema_extra={MUST: f"text of 1 to {_PATH_CHARACTERS} characters"},
        )
    )
    audio_url: Annotated[str, Field(max_length=_URL_CHARACTERS), AfterValidator(_valid_url)] | None = Field(
        default=None,
        repr=False,
        description="The URL from which the consumer downloads the recording. Its host must be in "
        "`audio.allowed_hosts`.",
        json_schema_extra={MUST: f"an http or https URL of at most {_URL_CHARACTERS} characters"},
    )
    audio_base64: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        repr=False,
        description="The recording itself, in base64 or as a `data:` URI; line ends in it are ignored.",
        json_schema_extra={MUST: "a file in base64 or as a data: URI"},
    )
    model_size: Annotated[str, Field(min_length=1, max_length=_MODEL_CHARACTERS)] | None = Field(
        default=None,
        description="The model, one of `models.allowed`. Left out: the default model, `models.default`.",
        json_schema_extra={MUST: "the name of a model"},
    )
    language: Annotated[str, AfterValidator(_known_language)] | None = Field(
        default=None,
        description="The spoken language, as Whisper's code, a name or a BCP-47 tag. Empty or `auto`: it is detected. "
        "Left out: the default language; without one it is detected.",
        json_schema_extra={MUST: "text such as 'de', or be left out"},
    )
    task: Literal["transcribe", "translate"] = Field(
        default="transcribe",
        description="Whether to write the transcript, or its translation into English.",
        json_schema_extra={MUST: "'transcribe' or 'translate'"},
    )
    initial_prompt: Annotated[str, Field(max_length=_PROMPT_CHARACTERS)] | None = Field(
        default=None,
        repr=False,
        description="Text that the model treats as what came before. Limited in tokens: its end is used.",
        json_schema_extra={MUST: f"text of at most {_PROMPT_CHARACTERS} characters"},
    )
    hotwords: Annotated[str, Field(max_length=_PROMPT_CHARACTERS)] | None = Field(
        default=None,
        repr=False,
        description="Words that are likely to occur. Limited in tokens: the first are used.",
        json_schema_extra={MUST: f"text of at most {_PROMPT_CHARACTERS} characters"},
    )
    beam_size: _BeamSize = Field(
        default="auto",
        description="How many hypotheses are followed at once: more are slower and a little better. `auto`: one, and "
        "five for what the model is unsure of.",
        json_schema_extra={MUST: f"a whole number from 1 to {_BEAMS}, or 'auto'"},
    )
    temperature: _Temperature | _Temperatures | None = Field(
        default=None,
        description="How freely the model samples. The values of a list are tried in order. Left out: Whisper's own "
        "list.",
        json_schema_extra={MUST: f"a number from 0 to 1, or a list of 1 to {_TEMPERATURES} such numbers"},
    )
    vad_filter: bool = Field(
        default=True,
        description="Whether silence is removed before the model runs.",
        json_schema_extra={MUST: "true or false"},
    )
    multilingual: bool = Field(
        default=False,
        description="Whether the language may change within the recording: it is detected for each passage.",
        json_schema_extra={MUST: "true or false"},
    )
    word_timestamps: bool = Field(
        default=False,
        description="Whether segments hold the times of their words.",
        json_schema_extra={MUST: "true or false"},
    )
    clip_timestamps: _Clips | None = Field(
        default=None,
        description="Only these ranges are transcribed, in order and without overlaps.",
        json_schema_extra={MUST: f"a list of 1 to {_CLIPS} ranges, each as [start, end] in seconds"},
    )
    batch_size: Annotated[int, Field(ge=1, le=_BATCH), BeforeValidator(_coerce_integral)] = Field(
        default=1,
        description="How many pieces of up to 30 s the model processes at once, where that is faster.",
        json_schema_extra={MUST: f"a whole number from 1 to {_BATCH}"},
    )
    formats: _Formats = Field(
        default_factory=list,
        description="The formats in which the result is published beside the status.",
        json_schema_extra={MUST: f'a list such as ["txt"], of any of {", ".join(FORMATS)}'},
    )
    max_line_width: Annotated[int, Field(ge=_LINE_WIDTH[0], le=_LINE_WIDTH[1]), BeforeValidator(_coerce_integral)] = (
        Field(
            default=42,
            description="The longest line of subtitles (`srt`, `vtt`), in columns: a Chinese character takes two.",
            json_schema_extra={MUST: f"a whole number from {_LINE_WIDTH[0]} to {_LINE_WIDTH[1]}"},
        )
    )
    max_line_count: Annotated[int, Field(ge=1, le=_LINE_COUNT), BeforeValidator(_coerce_integral)] = Field(
        default=2,
        description="How many lines a cue of subtitles has at most.",
        json_schema_extra={MUST: f"a whole number from 1 to {_LINE_COUNT}"},
    )
    stream: bool = Field(
        default=False,
        description="Whether segments are published as soon as they are known.",
        json_schema_extra={MUST: "true or false"},
    )
    priority: Annotated[int, Field(ge=0, le=MAX_PRIORITY), BeforeValidator(_coerce_integral)] = Field(
        default=0,
        description="Jobs of a higher priority go first, equal ones in the order of acceptance. A running job of a "
        "lower priority waits from the end of its window on, and then continues there. At most `queue.max_priority`.",
        json_schema_extra={MUST: f"a whole number from 0 to {MAX_PRIORITY}"},
    )
    expires_in: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Seconds after which the job is no longer worth starting. Left out: never. An MQTT 5 Message "
        "Expiry means the same.",
        json_schema_extra={MUST: "a number of seconds above 0"},
    )
    audio_track: _Track | Literal["mix"] | None = Field(
        default=None,
        description="Which audio track of the recording, from 0; `mix`: all of them together. Left out: the one that "
        "is flagged as default, else the first, that can be decoded and is not silent.",
        json_schema_extra={MUST: f"a whole number from 0 to {_TRACKS - 1}, or 'mix'"},
    )
    diarize: bool | Literal["channels"] = Field(
        default=False,
        description="Whether the speakers are distinguished and named in the results; `channels`: one speaker for each "
        "channel of the recording.",
        json_schema_extra={MUST: "true, false or 'channels'"},
    )
    min_speakers: _Speakers | None = Field(
        default=None,
        description="At least so many speakers are distinguished, as far as there are voices for them.",
        json_schema_extra={MUST: f"a whole number from 1 to {_SPEAKERS}"},
    )
    max_speakers: _Speakers | None = Field(
        default=None,
        description="At most so many speakers are distinguished; not less than `min_speakers`.",
        json_schema_extra={MUST: f"a whole number from 1 to {_SPEAKERS}"},
    )
    metadata: Annotated[dict[str, Any], AfterValidator(_small_metadata)] = Field(
        default_factory=dict,
        description="An object of at most 4 KiB as JSON, repeated in every status. MQTT 5 user properties that name no "
        "field are added to it.",
        json_schema_extra={MUST: "a JSON object"},
    )

    @model_validator(mode="after")
    def _check_audio(self) -> Self:
        given = [name for name in AUDIO_FIELDS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"Exactly one of {', '.join(AUDIO_FIELDS)} is needed, found {found}")
        return self

    @model_validator(mode="after")
    def _check_speakers(self) -> Self:
        least, most = self.min_speakers, self.max_speakers
        if least is not None and most is not None and least > most:
            raise ValueError(f"min_speakers, {least}, must not be more than max_speakers, {most}")
        return self

    def unsupported_by(self, model: str) -> str | None:
        """Return which of the options the model cannot do, as far as its name shows; None: it can do all."""
        translates = self.task == "translate"
        if model.endswith(_ENGLISH_ONLY) and (translates or self.language not in {None, "en"}):
            field, lack = ("task", "cannot translate") if translates else ("language", f"knows no {self.language!r}")
            return f"{field}: the model {model!r} is English-only and {lack}. Choose one that does not end in '.en'."
        if translates and (model in _TURBO or model.startswith(_DISTILLED)):
            return f"task: the model {model!r} cannot translate. Choose another one, such as 'large-v3'."
        return None

    @property
    def leaves_language_open(self) -> bool:
        """Whether the request neither names a language nor wants it detected: the default language may be used."""
        return "language" not in self.model_fields_set and not self.multilingual

    def options(self) -> dict[str, Any]:
        """Return the transcription options that differ from their defaults, very long prompts cut to what can count.

        The beam size is always there: jobs of version 1 have none where it was 5, the default then.
        """
        options = self.model_dump(include=_OPTIONS, exclude_defaults=True) | {"beam_size": self.beam_size}
        return options | {name: kept(options[name]) for name, kept in _PROMPTS.items() if name in options}


_OPTIONS = {field.name for field in dataclasses.fields(TranscriptionOptions)} - {"model_size"}
_ENGLISH_ONLY = ".en"
_DISTILLED = "distil-"
_TURBO = frozenset({"turbo", "large-v3-turbo"})
"""These and the distilled models were trained without translation: with `translate` they transcribe all the same."""
_PROMPTS = {"initial_prompt": cut_prompt, "hotwords": cut_hotwords}
