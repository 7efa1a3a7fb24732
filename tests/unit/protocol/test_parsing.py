import base64
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import quote_from_bytes

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from cesar_mqtt.jobs import AudioSource, NewJob
from cesar_mqtt.json_codec import canonical
from cesar_mqtt.ledger.documents import job_document, job_from
from cesar_mqtt.protocol.commands import COMMANDS, MAX_RESULT_BYTES, Command, JobCommand
from cesar_mqtt.protocol.fields import FORMATS
from cesar_mqtt.protocol.parsing import (
    SHORT_FORM_BYTES,
    UPLOAD,
    Accepted,
    Parsed,
    Refusal,
    UserProperties,
    fingerprint,
    parse_audio,
    parse_command,
    source_of,
)
from cesar_mqtt.protocol.parsing import parse_submission as parse
from cesar_mqtt.protocol.payloads import Rejection, status_of
from cesar_mqtt.protocol.requests import AUDIO_FIELDS, JobRequest
from cesar_mqtt.protocol.schema import payload_schemas
from cesar_mqtt.protocol.truncate import excerpt, truncate_status
from tests import factories

LONG = "x" * 17 + "..." + "x" * 18
PROMPTS = {"initial_prompt", "hotwords"}
JARGON = (
    "Input should",
    "input should",
    "function-after",
    "type=",
    "Value error",
    "validation error",
    "codec",
    "Traceback",
)
SENTENCE_CHARACTERS = 400
TOO_DEEP = 250  # levels of JSON; the parser fails at some 200
WAV = b"RIFF\x24\x00\x00\x00WAVEfmt "


def as_json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def accepted(parsed: Parsed) -> Accepted:
    assert isinstance(parsed, Accepted), parsed
    return parsed


def rejected(parsed: Parsed) -> Refusal:
    assert isinstance(parsed, Refusal), parsed
    return parsed


def bare(parsed: Parsed) -> Refusal:
    """A refusal without what is recorded beside it."""
    return replace(rejected(parsed), metadata={}, audio=None)


def check(parsed: Parsed, payload: bytes = b"", properties: UserProperties = ()) -> None:
    """For any input: an accepted request can be written and read back, a refusal can be published."""
    if isinstance(parsed, Accepted):
        check_accepted(parsed)
    else:
        check_refusal(parsed, payload, properties)


def check_accepted(parsed: Accepted) -> None:
    request = parsed.request
    if parsed.audio is None or request.audio_base64 is not None:
        assert parse(request.encode()) == parsed
    assert (parsed.audio is None) == (request.audio_path is not None or request.audio_url is not None)
    for value in (request.metadata, request.options()):
        on_disk = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        assert json.loads(canonical(value)) == json.loads(on_disk) == value
    path, url = request.audio_path, request.audio_url
    source = AudioSource("url", url) if url is not None else None
    job = factories.job(
        request.job_id or "made",
        audio=source if path is None else AudioSource("path", path),
        options=request.options(),
        metadata=request.metadata,
    )
    assert json.loads(truncate_status(status_of(job, "cesar")))["metadata"] == request.metadata


def check_refusal(refusal: Refusal, payload: bytes, properties: UserProperties) -> None:
    detail, theirs = refusal.detail, payload.decode(errors="replace") + str(properties)
    assert detail.endswith(".")
    assert not detail.endswith("..")
    assert len(detail) <= SENTENCE_CHARACTERS
    assert not [jargon for jargon in JARGON if jargon in detail and jargon not in theirs]
    assert not refusal.recordable or refusal.job_id
    assert refusal.recordable or (refusal.metadata, refusal.audio) == ({}, None)
    recorded = NewJob("a", "x", refusal.audio, "base", metadata=refusal.metadata, failure=detail)
    job = job_from(1, job_document(recorded, 0.0, 1), None, None)
    assert json.loads(truncate_status(status_of(job, "cesar")))["metadata"] == refusal.metadata
    rejection = Rejection(
        reason=refusal.reason,
        detail=detail,
        topic="cesar/jobs",
        job_id=refusal.job_id,
        payload_excerpt=excerpt(payload),
        received_at="2026-01-23T21:45:00.120Z",
    )
    assert json.loads(rejection.encode())["detail"] == detail


# -- what is accepted ----------------------------------------------------------------------------------------------


def test_more_values_than_any_request_has_are_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """500,000 unknown fields in one message held up the intake for seconds."""
    monkeypatch.setattr("cesar_mqtt.protocol.parsing.from_json", lambda *_, **__: pytest.fail("it was parsed"))
    fields = b",".join(b'"f%d":1' % number for number in range(150_002))
    parsed = parse(b"{" + fields + b"}")
    assert parsed == Refusal("invalid_request", "The payload has more than 150,000 values: leave out most of them.")


@pytest.mark.parametrize("parse_any", [parse, partial(parse_audio, "a")])
def test_more_user_properties_than_anybody_sends_are_rejected(parse_any: Callable[..., Any]) -> None:
    properties = tuple((f"name-{number}", "x") for number in range(1001))
    assert isinstance(parse_any(b'{"audio_path": "a.wav"}', properties[:10]), Accepted)
    assert parse_any(b'{"audio_path": "a.wav"}', properties) == Refusal(
        "invalid_request", "The message has 1,001 user properties: at most 1,000 are read."
    )


def test_prompts_of_the_largest_size_may_be_all_commas() -> None:
    document = {"audio_path": "a.wav", "initial_prompt": "," * 65_536, "hotwords": "," * 65_536}
    assert isinstance(parse(json.dumps(document).encode()), Accepted)


def test_a_path_alone_is_a_request_with_the_contracts_defaults() -> None:
    assert accepted(parse(b'{"audio_path": "porch.wav"}')) == Accepted(
        JobRequest(
            job_id=None,
            audio_path="porch.wav",
            audio_url=None,
            audio_base64=None,
            model_size=None,
            language=None,
            task="transcribe",
            initial_prompt=None,
            hotwords=None,
            beam_size="auto",
            temperature=None,
            vad_filter=True,
            word_timestamps=False,
            clip_timestamps=None,
            batch_size=1,
            audio_track=None,
            formats=[],
            stream=False,
            priority=0,
            metadata={},
        ),
        None,
    )


def test_every_field_is_taken_over() -> None:
    fields = {
        "job_id": "porch-17",
        "audio_path": "in/porch.wav",
        "model_size": "tiny.en",
        "language": "de",
        "task": "translate",
        "initial_prompt": "Wächter",
        "hotwords": "Wächter, Türmer",
        "beam_size": 1,
        "temperature": [0.0, 0.5],
        "vad_filter": False,
        "multilingual": True,
        "word_timestamps": True,
        "clip_timestamps": [[0.0, 2.5], [2.5, 4.0]],
        "batch_size": 8,
        "audio_track": 1,
        "diarize": True,
        "min_speakers": 2,
        "max_speakers": 4,
        "formats": ["srt", "json"],
        "max_line_width": 60,
        "max_line_count": 3,
        "stream": True,
        "priority": 3,
        "expires_in": 60.5,
        "metadata": {"room": "porch", "n": [1, 2.5, None, True]},
    }
    request = accepted(parse(as_json(**fields))).request
    assert request.model_dump(exclude={"audio_url", "audio_base64"}) == fields
    not_options = {"job_id", "audio_path", "model_size", "formats", "stream", "priority", "expires_in", "metadata"}
    assert request.options() == {name: value for name, value in fields.items() if name not in not_options}


@pytest.mark.parametrize(("least", "most"), [(1, 1), (2, 20), (None, 3), (3, None)])
def test_speakers_may_be_limited_from_both_sides(least: int | None, most: int | None) -> None:
    request = accepted(parse(as_json(audio_path="a", diarize=True, min_speakers=least, max_speakers=most))).request
    assert (request.min_speakers, request.max_speakers) == (least, most)


def test_there_cannot_be_more_speakers_at_least_than_at_most() -> None:
    refusal = parse(as_json(audio_path="a", diarize=True, min_speakers=3, max_speakers=2))
    assert isinstance(refusal, Refusal)
    assert "min_speakers, 3, must not be more than max_speakers, 2" in refusal.detail


def test_audio_in_base64_may_have_line_ends_and_blanks_in_it() -> None:
    audio = bytes(range(256))
    lines = base64.encodebytes(audio).decode()
    for text in (lines, lines.replace("\n", "\r\n"), " \t" + lines + "\v\f ", " ".join(lines)):
        assert accepted(parse(as_json(audio_base64=text))).audio == audio


def test_audio_in_base64_comes_out_as_its_bytes() -> None:
    audio = bytes(range(256))
    assert accepted(parse(as_json(audio_base64=base64.b64encode(audio).decode()))).audio == audio


@pytest.mark.parametrize(
    "head",
    [
        "data:audio/wav;base64,",
        "DATA:audio/wav;BASE64,",
        "data:;base64,",
        "data:audio/webm;codecs=opus;base64,",
        'data:audio/webm; codecs="opus, vorbis" ; base64 ,',
        "data:application/octet-stream;charset=utf-8;base64,",
        " \ndata:audio/ogg;base64,\n",
    ],
)
@pytest.mark.parametrize("audio", [bytes(range(256)), b"ab", b"a"])
def test_audio_may_be_a_data_uri_in_base64(head: str, audio: bytes) -> None:
    encoded = base64.b64encode(audio).decode()
    escaped = encoded.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D")
    for data in (encoded, encoded.rstrip("="), escaped, "%0A".join(encoded), base64.encodebytes(audio).decode() + " "):
        assert accepted(parse(as_json(audio_base64=head + data))).audio == audio


@pytest.mark.parametrize("head", ["data:audio/wav,", "data:,", "Data:audio/wav;name=base64,", 'data:a;b=";base64",'])
def test_audio_may_be_a_data_uri_with_percent_escapes(head: str) -> None:
    audio = bytes(range(256)) * 700  # more than the block in which escapes are decoded
    escaped = "".join(f"%{byte:02x}" for byte in audio)
    assert accepted(parse(as_json(audio_base64=head + escaped))).audio == audio
    assert accepted(parse(as_json(audio_base64=head + quote_from_bytes(audio)))).audio == audio
    assert accepted(parse(as_json(audio_base64=head + "RIFF, 100%, #1"))).audio == b"RIFF, 100%, #1"


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("data:audio/wav;base64", "without a comma"),
        ("data:" + "x" * 1000, "without a comma"),
        ("data:audio/wav;base64,not base64!", "whose data is not base64"),
        ("data:audio/wav;base64,YWJj=YWJj", "whose data is not base64"),
        ("data:audio/wav;base64,Y", "whose data is not base64"),
        ("data:audio/wav;base64,_-__", "whose data is not base64"),
        ("data:audio/wav;base64,", "holds no audio"),
        ("data:audio/wav,", "holds no audio"),
    ],
)
def test_a_data_uri_without_audio_is_rejected_for_what_is_wrong_with_it(uri: str, problem: str) -> None:
    parsed = parse(as_json(job_id="a", audio_base64=uri))
    assert rejected(parsed).recordable
    assert rejected(parsed).detail.startswith("audio_base64 ")
    assert problem in rejected(parsed).detail
    check(parsed)


def test_a_data_uri_is_the_same_request_as_its_bytes() -> None:
    encoded = base64.b64encode(WAV).decode()
    same = [parse(as_json(audio_base64=text)) for text in (encoded, f"data:audio/wav;base64,{encoded}")]
    assert len({fingerprint(accepted(parsed)) for parsed in (*same, parse_audio("a", WAV))}) == 1


FILE_URLS = [
    ("file:///media/porch.wav", "/media/porch.wav"),
    ("FILE:///media/porch.wav", "/media/porch.wav"),
    ("file:/media/porch.wav", "/media/porch.wav"),
    ("file://localhost/media/porch.wav", "/media/porch.wav"),
    ("File://LocalHost/media/porch.wav", "/media/porch.wav"),
    ("file:///media/front%20door/na%C3%AFve.wav", "/media/front door/naïve.wav"),
    ("file:///media/%5Bx%5D%23%3F.wav", "/media/[x]#?.wav"),
    ("file:///media/No #1?.wav", "/media/No #1?.wav"),
    ("file:///media/100%.wav", "/media/100%.wav"),
    ("file:///media/blank%20", "/media/blank "),
    (" file:///media/porch.wav ", "/media/porch.wav"),
    ("file:///", "/"),
]


@pytest.mark.parametrize(("url", "path"), FILE_URLS)
def test_a_path_may_be_a_file_url_in_json_in_a_property_and_as_the_one_line(url: str, path: str) -> None:
    in_json = accepted(parse(as_json(audio_path=url)))
    assert in_json.request.audio_path == path
    assert source_of(in_json.request) == AudioSource("path", path)
    assert accepted(parse(url.encode() + b"\n")).request.audio_path == path
    assert accepted(parse(b"{}", (("audio_path", url),))).request.audio_path == path
    assert fingerprint(in_json) == fingerprint(accepted(parse(as_json(audio_path=path))))


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("file://nas/media/porch.wav", "names a file of the host 'nas'"),
        ("file://porch.wav", "names a file of the host 'porch.wav'"),
        ("file://localhost", "without an absolute path"),
        ("file:porch.wav", "without an absolute path"),
        ("file:", "without an absolute path"),
        ("file:///media/%ff.wav", "not UTF-8"),
        ("  ", "is blank"),
    ],
)
def test_a_file_url_that_names_no_file_here_is_rejected(url: str, problem: str) -> None:
    parsed = parse(as_json(job_id="a", audio_path=url))
    assert rejected(parsed).recordable
    assert rejected(parsed).detail.startswith("audio_path ")
    assert problem in rejected(parsed).detail


@pytest.mark.parametrize("text", ["files/porch.wav", "file", "profile:/a.wav", "./file:/a.wav", " porch .wav "])
def test_another_path_stays_as_it_is(text: str) -> None:
    assert accepted(parse(as_json(audio_path=text))).request.audio_path == text
    assert accepted(parse(text.encode())).request.audio_path == text


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("model_size", " base\n", "base"),
        ("language", "\tde ", "de"),
        ("language", " ", None),
        ("task", "translate ", "translate"),
        ("audio_url", " https://nas.local/x.wav\r\n", "https://nas.local/x.wav"),
        ("formats", [" srt", "txt\n"], ["txt", "srt"]),
        ("initial_prompt", " Ann ", " Ann "),
    ],
)
def test_blanks_around_a_name_do_not_count(field: str, value: object, kept: object) -> None:
    source = {} if field == "audio_url" else {"audio_path": "a"}
    parsed = accepted(parse(as_json(**source, **{field: value})))
    assert getattr(parsed.request, field) == kept
    if isinstance(value, str):
        assert getattr(accepted(parse(as_json(**source), ((field, value),))).request, field) == kept


@pytest.mark.parametrize(
    "line", [b"HTTP://nas.local/x.wav", b" https://nas.local/x.wav ", b"\tHttps://nas.local/x.wav"]
)
def test_a_url_may_stand_on_the_one_line_in_any_case_and_with_blanks_around_it(line: bytes) -> None:
    request = accepted(parse(line)).request
    assert (request.audio_url, request.audio_path) == (line.decode().strip(), None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("audio_path", "x" * 4096),
        ("audio_path", "ü"),
        ("job_id", "x" * 64),
        ("model_size", "x" * 200),
        ("task", "transcribe"),
        ("initial_prompt", ""),
        ("initial_prompt", "x" * 65_536),
        ("max_line_width", 10),
        ("max_line_width", 1000),
        ("max_line_count", 1),
        ("max_line_count", 10),
        ("beam_size", 1),
        ("beam_size", 10),
        ("hotwords", ""),
        ("hotwords", "x" * 65_536),
        ("temperature", 0.0),
        ("temperature", 1.0),
        ("temperature", [0.0]),
        ("temperature", [0.1] * 10),
        ("word_timestamps", True),
        ("clip_timestamps", [[0.0, 0.001]]),
        ("clip_timestamps", [[n * 1.0, n + 1.0] for n in range(1000)]),
        ("batch_size", 1),
        ("batch_size", 32),
        ("audio_track", 0),
        ("audio_track", 99),
        ("audio_track", "mix"),
        ("formats", []),
        ("formats", ["txt", "srt", "vtt", "tsv", "json", "md"]),
        ("stream", True),
        ("priority", 0),
        ("priority", 9),
        ("vad_filter", True),
        ("metadata", {}),
        ("metadata", {"k": "x" * 4088}),  # 4,096 bytes with braces, quotes and colon
        ("metadata", {"k": "ä" * 2044}),
    ],
)
def test_a_field_at_its_limit_is_accepted(field: str, value: object) -> None:
    assert getattr(accepted(parse(as_json(**{"audio_path": "a", field: value}))).request, field) == value


@pytest.mark.parametrize("name", [name for name in JobRequest.model_fields if name != "audio_path"])
def test_null_is_the_same_as_to_leave_a_field_out(name: str) -> None:
    absent = parse(b'{"audio_path": "a"}')
    assert parse(as_json(**{"audio_path": "a", name: None})) == absent
    request = accepted(parse(as_json(**{"audio_path": "a", name: None}))).request
    assert request.model_fields_set == {"audio_path"}
    if name not in {"job_id", "audio_url", "audio_base64", "model_size", "language", "task"} | PROMPTS:
        assert parse(b"a", ((name, "null"),)) == absent


def test_a_user_property_sets_what_the_payload_has_as_null() -> None:
    properties = (("language", "de"), ("stream", "true"), ("room", "porch"))
    request = accepted(parse(as_json(audio_path="a", language=None, stream=None, metadata=None), properties)).request
    assert (request.language, request.stream, request.metadata) == ("de", True, {"room": "porch"})


@pytest.mark.parametrize("text", ["", "  ", "auto", "AUTO", " Auto "])
def test_a_language_may_be_left_to_be_detected_explicitly(text: str) -> None:
    for parsed in (
        parse(as_json(audio_path="a", language=text)),
        parse(b"a", (("language", text),)),
    ):
        assert accepted(parsed).request.language is None
        assert accepted(parsed).request.options() == {"beam_size": "auto"}


@pytest.mark.parametrize("name", ["beam_size", "batch_size", "max_line_count"])
def test_a_whole_number_may_be_written_with_a_point(name: str) -> None:
    for parsed in (
        parse(b'{"audio_path": "a", "%s": 8.0}' % name.encode()),
        parse(b"a", ((name, "8.0"),)),
    ):
        value = getattr(accepted(parsed).request, name)
        assert (value, type(value)) == (8, int)


def test_of_a_very_long_prompt_what_can_count_is_kept_with_a_mark_where_it_was_cut() -> None:
    words = " ".join(f"w{number}" for number in range(9_000))
    request = accepted(parse(as_json(audio_path="a", initial_prompt=words, hotwords=words))).request
    options = request.options()
    assert (options["initial_prompt"], options["hotwords"]) == ("…" + words[-10_000:], words[:10_000] + "…")
    assert (request.initial_prompt, request.hotwords) == (words, words), "the fingerprint covers all of it"


@pytest.mark.parametrize(
    ("text", "kept"), [("x" * 10_000, "x" * 10_000), ("x" + " " * 20_000, "x"), (" " * 20_000 + "x|", "x")]
)
def test_a_prompt_of_which_all_can_count_is_not_marked_as_cut(text: str, kept: str) -> None:
    options = accepted(parse(as_json(audio_path="a", initial_prompt=text, hotwords=text))).request.options()
    assert (options["initial_prompt"], options["hotwords"]) == (kept, kept)


@pytest.mark.parametrize(("text", "code"), [("German", "de"), ("de-AT", "de"), ("EN_us", "en"), ("haw", "haw")])
def test_a_language_may_be_a_name_or_a_bcp_47_tag(text: str, code: str) -> None:
    assert accepted(parse(as_json(audio_path="a", language=text))).request.language == code


@pytest.mark.parametrize("blanks", [b" ", b"\n\t\r\n  ", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"])
def test_blanks_and_a_byte_order_mark_before_the_json_do_not_matter(blanks: bytes) -> None:
    assert accepted(parse(blanks + b'{"audio_path": "a"} \n')).request.audio_path == "a"


def test_of_a_key_that_stands_twice_the_last_one_counts() -> None:
    assert accepted(parse(b'{"audio_path": "a", "audio_path": "b"}')).request.audio_path == "b"
    assert accepted(parse(b'{"job_id": 5, "audio_path": "a", "job_id": "b"}')).request.job_id == "b"


@pytest.mark.parametrize(
    "url",
    [
        "http://nas.local",
        "https://nas.local/in/porch.wav",
        "HTTPS://NAS.local:444/porch.wav?key=a&b=c#t=3",
        "http://[::1]:8080/x",
        "http://192.0.2.7/two words.wav",
        "http://me:secret@nas.local/x",
        "http://mühle.example/höfe.wav",
        "http://a/" + "x" * 4087,
    ],
)
def test_a_url_is_accepted_whatever_its_host(url: str) -> None:
    request = accepted(parse(as_json(audio_url=url))).request
    assert (request.audio_url, request.audio_path) == (url, None)


def test_a_whole_number_is_a_temperature_or_a_time_like_any_other() -> None:
    whole = accepted(parse(b'{"audio_path": "a", "temperature": 0, "clip_timestamps": [[0, 30]]}')).request
    assert whole.encode() == accepted(parse(whole.encode())).request.encode()
    assert whole.options() == {"beam_size": "auto", "temperature": 0.0, "clip_timestamps": [[0.0, 30.0]]}


def test_formats_are_taken_once_each_and_in_the_contracts_order() -> None:
    request = accepted(parse(as_json(audio_path="a", formats=["json", "srt", "json", "txt"]))).request
    assert request.formats == ["txt", "srt", "json"]


def test_only_options_that_differ_from_their_defaults_are_kept_and_the_beam_size() -> None:
    defaults = {
        "beam_size": "auto",
        "multilingual": False,
        "diarize": False,
        "max_line_width": 42,
        "max_line_count": 2,
        "vad_filter": True,
        "task": "transcribe",
        "batch_size": 1,
        "word_timestamps": False,
    }
    others = {"formats": ["srt"], "stream": True, "hotwords": None, "job_id": "x"}
    payload = as_json(audio_path="a", language="de", **defaults, **others)
    assert accepted(parse(payload)).request.options() == {"language": "de", "beam_size": "auto"}


@pytest.mark.parametrize("beam_size", ["auto", 1, 10])
def test_the_beam_size_may_be_auto(beam_size: int | str) -> None:
    for parsed in (parse(as_json(audio_path="a", beam_size=beam_size)), parse(b"a", (("beam_size", str(beam_size)),))):
        assert accepted(parsed).request.options() == {"beam_size": beam_size}


def test_the_former_default_of_the_beam_size_is_the_same_request_as_none() -> None:
    requests: list[dict[str, object]] = [{}, {"beam_size": 5}, {"beam_size": "auto"}]
    same = {fingerprint(accepted(parse(as_json(audio_path="a", **named)))) for named in requests}
    assert len(same) == 1
    assert fingerprint(accepted(parse(as_json(audio_path="a", beam_size=4)))) not in same


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("audio_path", "", "audio_path must be text of 1 to 4096 characters, not ''."),
        ("audio_path", 7, "audio_path must be text of 1 to 4096 characters, not 7."),
        ("audio_path", ["a"], "audio_path must be text of 1 to 4096 characters, not a list."),
        ("model_size", "", "model_size must be the name of a model, not ''."),
        ("model_size", {}, "model_size must be the name of a model, not an object."),
        ("language", 7, "language must be text such as 'de', or be left out, not 7."),
        (
            "language",
            "klingon",
            "language 'klingon' is not a language that Whisper knows: use a code such as 'de', or leave it out.",
        ),
        (
            "language",
            "x" * 5_000,
            f"language '{LONG}' is not a language that Whisper knows: use a code such as 'de', or leave it out.",
        ),
        ("task", "summarise", "task must be 'transcribe' or 'translate', not 'summarise'."),
        ("initial_prompt", "x" * 65_537, "initial_prompt must be text of at most 65536 characters."),
        ("max_line_width", 9, "max_line_width must be a whole number from 10 to 1000, not 9."),
        ("max_line_width", 1001, "max_line_width must be a whole number from 10 to 1000, not 1001."),
        ("max_line_count", 0, "max_line_count must be a whole number from 1 to 10, not 0."),
        ("max_line_count", 11, "max_line_count must be a whole number from 1 to 10, not 11."),
        ("beam_size", 0, "beam_size must be a whole number from 1 to 10, or 'auto', not 0."),
        ("beam_size", 11, "beam_size must be a whole number from 1 to 10, or 'auto', not 11."),
        ("beam_size", 5.5, "beam_size must be a whole number from 1 to 10, or 'auto', not 5.5."),
        ("beam_size", 11.0, "beam_size must be a whole number from 1 to 10, or 'auto', not 11."),
        ("beam_size", "5", "beam_size must be a whole number from 1 to 10, or 'auto', not '5'."),
        ("beam_size", True, "beam_size must be a whole number from 1 to 10, or 'auto', not true."),
        ("diarize", "yes", "diarize must be true, false or 'channels', not 'yes'."),
        ("diarize", 1, "diarize must be true, false or 'channels', not 1."),
        ("min_speakers", 0, "min_speakers must be a whole number from 1 to 20, not 0."),
        ("max_speakers", 21, "max_speakers must be a whole number from 1 to 20, not 21."),
        ("audio_track", -1, "audio_track must be a whole number from 0 to 99, or 'mix', not -1."),
        ("audio_track", 100, "audio_track must be a whole number from 0 to 99, or 'mix', not 100."),
        ("audio_track", 0.5, "audio_track must be a whole number from 0 to 99, or 'mix', not 0.5."),
        ("audio_track", "all", "audio_track must be a whole number from 0 to 99, or 'mix', not 'all'."),
        ("audio_track", True, "audio_track must be a whole number from 0 to 99, or 'mix', not true."),
        ("hotwords", "x" * 65_537, "hotwords must be text of at most 65536 characters."),
        ("temperature", -0.1, "temperature must be a number from 0 to 1, or a list of 1 to 10 such numbers, not -0.1."),
        ("temperature", 1.1, "temperature must be a number from 0 to 1, or a list of 1 to 10 such numbers, not 1.1."),
        ("temperature", True, "temperature must be a number from 0 to 1, or a list of 1 to 10 such numbers, not true."),
        ("temperature", "0", "temperature must be a number from 0 to 1, or a list of 1 to 10 such numbers, not '0'."),
        ("temperature", [0, 2], "temperature must be a number from 0 to 1, or a list of 1 to 10 such numbers, not 2."),
        ("temperature", [], "temperature must be a number from 0 to 1, or a list of 1 to 10 such numbers."),
        ("temperature", [0.5] * 11, "temperature must be a number from 0 to 1, or a list of 1 to 10 such numbers."),
        ("word_timestamps", "yes", "word_timestamps must be true or false, not 'yes'."),
        (
            "clip_timestamps",
            "0,30",
            "clip_timestamps must be a list of 1 to 1000 ranges, each as [start, end] in seconds, not '0,30'.",
        ),
        (
            "clip_timestamps",
            [0, 30],
            "clip_timestamps must be a list of 1 to 1000 ranges, each as [start, end] in seconds, not 0.",
        ),
        ("clip_timestamps", [], "clip_timestamps must be a list of 1 to 1000 ranges, each as [start, end] in seconds."),
        (
            "clip_timestamps",
            [[0]],
            "clip_timestamps must be a list of 1 to 1000 ranges, each as [start, end] in seconds.",
        ),
        (
            "clip_timestamps",
            [[0, 1, 2]],
            "clip_timestamps must be a list of 1 to 1000 ranges, each as [start, end] in seconds.",
        ),
        (
            "clip_timestamps",
            [[-1, 2]],
            "clip_timestamps must be a list of 1 to 1000 ranges, each as [start, end] in seconds, not -1.",
        ),
        (
            "clip_timestamps",
            [["0", 2]],
            "clip_timestamps must be a list of 1 to 1000 ranges, each as [start, end] in seconds, not '0'.",
        ),
        (
            "clip_timestamps",
            [[n, n + 1] for n in range(1001)],
            "clip_timestamps must be a list of 1 to 1000 ranges, each as [start, end] in seconds.",
        ),
        ("clip_timestamps", [[5, 5]], "clip_timestamps holds a range that does not end after its start."),
        ("clip_timestamps", [[5, 4]], "clip_timestamps holds a range that does not end after its start."),
        (
            "clip_timestamps",
            [[0, 30], [29, 40]],
            "clip_timestamps holds a range that begins before the previous one has ended.",
        ),
        ("batch_size", 0, "batch_size must be a whole number from 1 to 32, not 0."),
        ("batch_size", 33, "batch_size must be a whole number from 1 to 32, not 33."),
        (
            "formats",
            "srt",
            "formats must be a list such as [\"txt\"], of any of txt, srt, vtt, tsv, json, md, not 'srt'.",
        ),
        (
            "formats",
            ["srt", "doc"],
            "formats must be a list such as [\"txt\"], of any of txt, srt, vtt, tsv, json, md, not 'doc'.",
        ),
        (
            "formats",
            ["SRT"],
            "formats must be a list such as [\"txt\"], of any of txt, srt, vtt, tsv, json, md, not 'SRT'.",
        ),
        ("stream", "on", "stream must be true or false, not 'on'."),
        ("priority", -1, "priority must be a whole number from 0 to 9, not -1."),
        ("priority", 10, "priority must be a whole number from 0 to 9, not 10."),
        ("priority", True, "priority must be a whole number from 0 to 9, not true."),
        ("priority", "high", "priority must be a whole number from 0 to 9, not 'high'."),
        ("vad_filter", 1, "vad_filter must be true or false, not 1."),
        ("vad_filter", "yes", "vad_filter must be true or false, not 'yes'."),
        ("metadata", [], "metadata must be a JSON object, not a list."),
        ("metadata", "x", "metadata must be a JSON object, not 'x'."),
        (
            "metadata",
            {"k": "x" * 4089},
            "metadata has 4097 bytes of JSON, user properties included: at most 4096 are echoed.",
        ),
    ],
)
def test_a_field_over_its_limit_is_rejected_with_what_it_has_to_be(field: str, value: object, sentence: str) -> None:
    parsed = parse(as_json(**{"job_id": "porch-17", "audio_path": "a", field: value}))
    assert bare(parsed) == Refusal("invalid_request", sentence, "porch-17", recordable=True)
    check(parsed)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nas.local/porch.wav",
        "ftp://nas.local/porch.wav",
        "file:///etc/passwd",
        "http:/nas.local/x",
        "http://",
        "http:///x",
        "http://:80/x",
        "http://@/x",
        "http://nas.local:99999/x",
        "http://nas.local:0/x",
        "http://nas.local:port/x",
        "http://[::1/x",
        "http://nas local/x",
        "http://nas.local\\@other.example/x",
        "http://nas.local/\r\nHost: other.example",
        "http://nas.local/\x00",
        "http://nas.local\t/x",
        "http://nas.local\x01/x",
        "http://nas.local/\x7f\x9f",
        "http://nas.local\uff0fother.example/x",
    ],
)
def test_what_is_no_url_with_a_host_is_rejected_without_being_shown(url: str) -> None:
    parsed = parse(as_json(job_id="a", audio_url=url))
    detail = "audio_url is not a URL that begins with http:// or https:// and names a host."
    assert bare(parsed) == Refusal("invalid_request", detail, "a", recordable=True)


def test_a_url_that_is_too_long_is_rejected_without_being_shown() -> None:
    detail = "audio_url must be an http or https URL of at most 4096 characters."
    assert rejected(parse(as_json(audio_url="http://a/" + "x" * 4088))).detail == detail
    assert rejected(parse(as_json(audio_url=["secret"]))).detail == detail


@pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"9" * 400])
@pytest.mark.parametrize("field", [b'"temperature": %s', b'"temperature": [%s]', b'"clip_timestamps": [[0, %s]]'])
def test_a_number_that_is_not_finite_is_no_temperature_and_no_time(field: bytes, number: bytes) -> None:
    payload = b'{"audio_path": "a", %s}' % (field % number)
    check(rejected(parse(payload)), payload)


@pytest.mark.parametrize("name", [name for name in JobRequest.model_fields if name != "job_id"])
def test_no_fields_rejection_quotes_the_validator(name: str) -> None:
    parsed = parse(as_json(**{name: [{"a": 1}]}))
    assert rejected(parsed).detail.startswith(f"{name} must be ")
    check(parsed)


@pytest.mark.parametrize(
    "job_id", ["", "x" * 65, "a b", "a/b", "#", "a\n", "\0", "é", 17, 1.5, True, ["a"], {"a": "b"}, "y" * 100_000]
)
def test_an_unusable_id_is_rejected_for_itself_and_nothing_is_recorded(job_id: object) -> None:
    parsed = parse(as_json(audio_path="a", beam_size=99, job_id=job_id))
    assert rejected(parsed).reason == "invalid_job_id"
    assert rejected(parsed).job_id is None
    assert not rejected(parsed).recordable
    assert "1 to 64 of A-Z, a-z, 0-9, _ and -" in rejected(parsed).detail
    check(parsed)


def test_an_id_that_is_no_text_is_not_shown_as_if_it_were() -> None:
    assert rejected(parse(as_json(audio_path="a", job_id=17))).detail.startswith("17 is no job id: use text")


def test_the_name_of_the_running_job_is_no_id() -> None:
    for parsed in (
        parse(as_json(audio_path="a", job_id="current")),
        parse(b"a", (("job_id", "current"),)),
        parse_audio("current", WAV),
    ):
        detail = "'current' is no job id: in commands it stands for the running job. Use another one."
        assert parsed == Refusal("invalid_job_id", detail)
    accepted(parse_audio("currently", WAV))


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("langauge", "language"), ("audiopath", "audio_path"), ("beam-size", "beam_size"), ("vadfilter", "vad_filter")],
)
def test_an_unknown_field_is_named_with_the_one_that_was_meant(typo: str, meant: str) -> None:
    parsed = parse(as_json(**{"job_id": "a", "audio_path": "a", typo: "x"}))
    assert bare(parsed) == Refusal(
        "invalid_request", f"There is no field {typo!r} (did you mean {meant}?).", "a", recordable=True
    )


OTHER_NAMES = {
    "audio_path": ["path", "file", "filename", "fileName", "file_path", "Audio"],
    "audio_url": ["url", "URI", "audioUrl"],
    "audio_base64": ["base64", "data", "audioData"],
    "job_id": ["id", "jobId", "job"],
    "model_size": ["model", "model_name", "modelSize"],
    "language": ["lang", "Language", "source-language"],
    "initial_prompt": ["prompt", "initialPrompt"],
    "formats": ["format", "output_format", "response_format"],
    "word_timestamps": ["words", "wordTimestamps", "word_timestamp"],
    "expires_in": ["ttl", "timeout", "expires"],
    "metadata": ["meta", "tags"],
    "vad_filter": ["vad"],
    "hotwords": ["keywords", "hot_words"],
}


@pytest.mark.parametrize(("meant", "other"), [(meant, other) for meant in OTHER_NAMES for other in OTHER_NAMES[meant]])
def test_a_field_under_the_name_that_other_programs_give_it_is_named_with_ours(meant: str, other: str) -> None:
    assert rejected(parse(as_json(**{other: "x"}))).detail == f"There is no field {other!r} (did you mean {meant}?)."


def test_a_command_is_answered_with_its_own_fields_only() -> None:
    for other, answer in (
        ("id", "There is no field 'id' (did you mean job_id?)"),
        ("path", "There is no field 'path'."),
    ):
        assert answer in parse_command("get", as_json(**{other: "x"})).mistakes


def test_an_unknown_field_that_resembles_none_is_named_without_a_guess() -> None:
    assert rejected(parse(as_json(audio_path="a", colour="red"))).detail == "There is no field 'colour'."


def test_a_misspelt_audio_field_is_named_once() -> None:
    assert rejected(parse(as_json(audiopath="a"))).detail == "There is no field 'audiopath' (did you mean audio_path?)."


def test_every_mistake_is_named_at_once_as_long_as_they_are_few() -> None:
    parsed = parse(as_json(audio_path="a", beam_size=0, task="sing", colour="red"))
    detail = rejected(parsed).detail
    assert "'colour'" in detail
    assert "task" in detail
    assert "beam_size" in detail
    check(parsed)


def test_a_message_of_many_mistakes_is_answered_in_a_short_sentence() -> None:
    payload = as_json(**{f"{number} {'x' * 500}": 1 for number in range(20_000)}, beam_size=0)
    parsed = parse(payload)
    assert "Mistakes beside these: 19998." in rejected(parsed).detail
    check(parsed, payload)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, "none"),
        ({"audio_path": None}, "none"),
        ({"audio_path": "a", "audio_base64": "YQ=="}, "audio_path and audio_base64"),
        ({"audio_path": "a", "audio_url": "http://a/b"}, "audio_path and audio_url"),
    ],
)
def test_exactly_one_audio_field_is_needed(fields: dict[str, Any], found: str) -> None:
    parsed = parse(as_json(job_id="a", **fields))
    detail = f"Exactly one of audio_path, audio_url, audio_base64 is needed, found {found}."
    assert bare(parsed) == Refusal("invalid_request", detail, "a", recordable=True)


@pytest.mark.parametrize(
    "text",
    ["YQ", "Y", "YQ==YQ==", "YQ==\nYQ==", "_-__", "ä", "YQ\u00a0==", "YQ\0==", "="],
)
def test_what_is_not_strict_base64_is_rejected_and_recorded(text: str) -> None:
    parsed = parse(as_json(job_id="a", audio_base64=text))
    assert rejected(parsed).reason == "invalid_request"
    assert rejected(parsed).detail.startswith("audio_base64 is not base64")
    assert rejected(parsed).recordable
    check(parsed)


def test_audio_of_no_bytes_is_rejected() -> None:
    assert rejected(parse(as_json(job_id="a", audio_base64=""))).detail == (
        "audio_base64 must be a file in base64 or as a data: URI."
    )


@pytest.mark.parametrize("payload", [b"[]", b'"a.wav"', b'[{"audio_path": "a"}]', b' "x"'])
def test_json_that_is_no_object_is_an_invalid_request(payload: bytes) -> None:
    for properties in ((), (("job_id", "a"),)):
        parsed = parse(payload, properties)
        assert rejected(parsed).reason == "invalid_request"
        assert rejected(parsed).detail.startswith("The payload must be a JSON object")
        check(parsed, payload)


@pytest.mark.parametrize(
    "payload",
    [
        b"{",
        b'{"audio_path": "a"',
        b'{"audio_path": "a"} x',
        b"{'audio_path': 'a'}",
        b'{"audio_path": "a",}',
        b'{"audio_path": "\xff"}',
        b'{"audio_path": "\xed\xa0\x80"}',
        b'{"audio_path": "\\ud800"}',
        b'{"audio_path": "a", "metadata": {"\\udfff": 1}}',
        b'{"audio_path": "a", "metadata": {"a": NaN}}',
        b'{"audio_path": "a", "metadata": {"a": Infinity}}',
        b'{"audio_path": "a", "metadata": {"a": -Infinity}}',
        b'{"audio_path": "a", "beam_size": NaN}',
        b'{"audio_path": "a", "beam_size": 01}',
        b'{"audio_path": "a\nb"}',
        b'"a',
    ],
)
def test_what_is_not_json_is_malformed_with_or_without_user_properties(payload: bytes) -> None:
    for properties in ((), (("room", "porch"),)):
        parsed = parse(payload, properties)
        assert rejected(parsed).reason == "malformed_json"
        assert not rejected(parsed).recordable
        check(parsed, payload)


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_a_number_that_becomes_infinite_is_rejected(number: str) -> None:
    parsed = parse(b'{"audio_path": "a", "metadata": {"a": %s}}' % number.encode())
    assert rejected(parsed).detail == "metadata holds a number that is too large, or text that is not Unicode."
    check(parsed)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"audio_path": "a", "metadata": {"a": ' + b"["])
@pytest.mark.parametrize("depth", [TOO_DEEP, 100_000])
def test_json_nested_too_deep_is_malformed(opening: bytes, depth: int) -> None:
    parsed = parse(opening * depth)
    assert rejected(parsed).reason == "malformed_json"
    check(parsed, opening * depth)


def test_json_nested_as_deep_as_the_parser_takes_it_passes_through_to_the_status() -> None:
    payloads = [b'{"audio_path": "a", "metadata": {"a": %s}}' % (b"[" * n + b"]" * n) for n in range(1, TOO_DEEP)]
    for payload in payloads:
        check(parse(payload), payload)
    assert isinstance(parse(payloads[100]), Accepted)
    assert isinstance(parse(payloads[-1]), Refusal)


@pytest.mark.parametrize(
    "payload",
    [
        b'{"audio_path": "' + b"x" * 10_000_000 + b'"}',
        b'{"' + b"x" * 10_000_000 + b'": 1}',
        b'{"job_id": "' + b"x" * 10_000_000 + b'"}',
        b'{"job_id": [' + b"1," * 5_000_000 + b"1]}",
        b'{"audio_path": "a", "metadata": [' + b"{}," * 1_000_000 + b"1]}",
        b'{"audio_path": "a", "metadata": {"a": "' + b"x" * 10_000_000 + b'"}}',
        b'{"audio_path": "a", "model_size": "' + b"\\n" * 5_000_000 + b'"}',
        b'{"audio_url": "http://' + b"x" * 10_000_000 + b'"}',
        b'{"audio_path": "a", "clip_timestamps": [' + b"[]," * 3_000_000 + b"1]}",
        b'{"audio_path": "a", "clip_timestamps": [[' + b"{}," * 3_000_000 + b"1]]}",
        b'{"audio_path": "a", "temperature": [' + b'"",' * 3_000_000 + b"1]}",
        b'{"audio_path": "a", "formats": [' + b'"",' * 3_000_000 + b"1]}",
        b'{"audio_base64": "' + b"\xc3\xa4" * 5_000_000 + b'"}',
        b"x" * 10_000_000,
        b"\n" * 10_000_000,
    ],
    ids=[
        "path",
        "name",
        "id",
        "list as id",
        "list as metadata",
        "metadata",
        "model",
        "url",
        "clips",
        "clip",
        "temperatures",
        "formats",
        "base64",
        "line",
        "empty lines",
    ],
)
def test_ten_megabytes_are_rejected_without_being_echoed(payload: bytes) -> None:
    parsed = parse(payload)
    check(rejected(parsed), payload)


def test_a_prompt_or_audio_is_never_quoted_in_a_rejection() -> None:
    assert "secret" not in rejected(parse(as_json(audio_path="a", initial_prompt=["secret"]))).detail
    assert "secret" not in rejected(parse(as_json(audio_path="a", initial_prompt="secret" * 11_000))).detail
    assert "secret" not in rejected(parse(as_json(audio_base64="secret!"))).detail


# -- what is kept of a refused request -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "audio"),
    [
        ({"audio_path": "in/a.wav"}, AudioSource("path", "in/a.wav")),
        ({"audio_path": "in/a.wav", "audio_url": None}, AudioSource("path", "in/a.wav")),
        ({"audio_url": "http://me:secret@nas/a.wav?key=1"}, AudioSource("url", "http://me:secret@nas/a.wav?key=1")),
        ({"audio_base64": "YQ=="}, UPLOAD),
        ({"audio_base64": "no base64"}, UPLOAD),
        ({}, None),
        ({"audio_path": "a", "audio_url": "http://nas/a"}, None),
        ({"audio_path": 7}, None),
        ({"audio_path": "x" * 5_000}, None),
        ({"audio_url": "http://me:secret@nas:port/a"}, None),
    ],
)
def test_a_rejection_that_is_recorded_names_where_the_audio_would_have_been(
    fields: dict[str, Any], audio: AudioSource | None
) -> None:
    parsed = parse(as_json(job_id="a", beam_size=99, metadata={"room": "porch"}, **fields))
    assert (rejected(parsed).audio, rejected(parsed).metadata) == (audio, {"room": "porch"})
    check(parsed)


@pytest.mark.parametrize(
    ("metadata", "kept"),
    [({"a": [1]}, {"a": [1]}), ({"a": "x" * 4089}, {}), (["a"], {}), ("a", {}), (None, {}), ({}, {})],
)
def test_metadata_is_kept_if_it_is_right_in_itself(metadata: object, kept: dict[str, Any]) -> None:
    for wrong in ({"langauge": "de"}, {"audio_url": "http://nas/a"}, {"audio_base64": "?"}):
        parsed = parse(as_json(**{"job_id": "a", "audio_path": "a", "metadata": metadata, "beam_size": 99, **wrong}))
        assert rejected(parsed).metadata == kept
        check(parsed)


def test_what_is_kept_of_a_rejected_upload_comes_from_its_user_properties() -> None:
    for wrong in (("task", "sing"), ("audio_path", "a"), ("job_id", "b"), ("beam_size", "99")):
        parsed = parse_audio("a", WAV, (("room", "porch"), wrong))
        assert (rejected(parsed).audio, rejected(parsed).metadata) == (UPLOAD, {"room": "porch"})


def test_nothing_is_kept_of_a_rejection_that_is_not_recorded() -> None:
    assert rejected(parse(as_json(audio_path="a", beam_size=99, metadata={"room": "porch"}))).metadata == {}


# -- the short form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "path"),
    [
        (b"porch.wav", "porch.wav"),
        (b"porch.wav\n", "porch.wav"),
        (b"porch.wav\r\n", "porch.wav"),
        (b"  two words.wav ", "  two words.wav "),
        (b"\xef\xbb\xbfporch.wav", "porch.wav"),
        ("Wächter/日本.wav".encode(), "Wächter/日本.wav"),
        (b"null", "null"),
        (b"7", "7"),
        (b"https.wav", "https.wav"),
        (b"x" * SHORT_FORM_BYTES, "x" * SHORT_FORM_BYTES),
        (b"x" * SHORT_FORM_BYTES + b"\r\n", "x" * SHORT_FORM_BYTES),
        ("ä".encode() * (SHORT_FORM_BYTES // 2), "ä" * (SHORT_FORM_BYTES // 2)),
    ],
)
def test_one_line_of_text_is_a_path(payload: bytes, path: str) -> None:
    parsed = accepted(parse(payload))
    assert parsed == Accepted(JobRequest(audio_path=path), None)


@pytest.mark.parametrize(
    "payload",
    [
        b"x" * (SHORT_FORM_BYTES + 1),
        b"x" * (SHORT_FORM_BYTES + 1) + b"\n",
        "ä".encode() * (SHORT_FORM_BYTES // 2) + b"x",
        b"a\nb",
        b"a\rb",
        b"a\n\n",
        b"a.wav" + b"\n" * 5_000 + b"rest",
        b"x" * SHORT_FORM_BYTES + b"\r\nrest",  # without the rest it would be a path
        b"a\0b",
        b"\xff\xfea\0",
        b"caf\xe9.wav",
        b"\xed\xa0\x80",
        WAV,
        b"\xff\xfb\x90\x64" * 100,
    ],
)
def test_what_is_not_one_line_of_text_is_malformed(payload: bytes) -> None:
    parsed = parse(payload)
    assert rejected(parsed).reason == "malformed_json"
    assert "publish its bytes on the audio topic" in rejected(parsed).detail
    check(parsed, payload)


@pytest.mark.parametrize("payload", [b"\n", b"\r\n", b" \t ", b"\n\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"])
def test_a_line_without_anything_is_called_empty(payload: bytes) -> None:
    parsed = parse(payload)
    assert rejected(parsed).reason == "malformed_json"
    assert rejected(parsed).detail.startswith("The payload is an empty line: ")
    check(parsed, payload)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.wav",
        "https://example.org/two words.wav?a=b",
        "HTTPS://example.org/a.wav",
        "Http://example.org/a.wav",
    ],
)
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_line_that_begins_like_a_url_is_one(url: str, end: bytes) -> None:
    assert accepted(parse(url.encode() + end)) == Accepted(JobRequest(audio_url=url), None)


@pytest.mark.parametrize("line", [b"https://", b"http:///x", b"http://a:b/"])
def test_a_line_that_begins_like_a_url_and_is_none_is_rejected(line: bytes) -> None:
    parsed = parse(line, (("job_id", "a"),))
    assert rejected(parsed).detail.startswith("audio_url is not a URL")
    assert rejected(parsed).recordable


# -- user properties -----------------------------------------------------------------------------------------------


def test_user_properties_set_the_fields_that_the_payload_does_not() -> None:
    properties = (("job_id", "a"), ("language", "German"), ("beam_size", "3"), ("vad_filter", "false"))
    request = accepted(parse(as_json(audio_path="a", beam_size=7), properties)).request
    assert (request.job_id, request.language, request.beam_size, request.vad_filter) == ("a", "de", 7, False)


def test_user_properties_go_with_the_short_form_too() -> None:
    request = accepted(parse(b"porch.wav", (("job_id", "a"), ("room", "porch")))).request
    assert (request.audio_path, request.job_id, request.metadata) == ("porch.wav", "a", {"room": "porch"})


def test_other_user_properties_become_metadata_and_the_payloads_own_wins() -> None:
    properties = (("room", "porch"), ("lamp", "on"), ("metadata", '{"room": "hall", "floor": 1}'))
    assert accepted(parse(b"a", properties)).request.metadata == {"room": "hall", "lamp": "on", "floor": 1}
    payload = as_json(audio_path="a", metadata={"room": "attic"})
    assert accepted(parse(payload, properties)).request.metadata == {"room": "attic", "lamp": "on"}


@pytest.mark.parametrize("name", list(JobRequest.model_fields))
def test_every_field_can_be_set_by_a_user_property(name: str) -> None:
    examples: dict[str, Any] = {
        "job_id": "17",  # looks like a number, and is text
        "audio_path": "true",
        "audio_url": "http://7",
        "audio_base64": "YQ==",
        "model_size": "1",
        "language": "de",
        "task": "translate",
        "initial_prompt": "[]",
        "hotwords": "7",
        "beam_size": 3,
        "temperature": [0.2, 1.0],
        "vad_filter": False,
        "multilingual": True,
        "word_timestamps": True,
        "clip_timestamps": [[0.0, 30.0]],
        "batch_size": 4,
        "audio_track": 2,
        "diarize": "channels",
        "min_speakers": 2,
        "max_speakers": 20,
        "formats": ["srt", "vtt"],
        "max_line_width": 50,
        "max_line_count": 1,
        "stream": True,
        "priority": 9,
        "expires_in": 3.5,
        "metadata": {"a": 1},
    }
    value = examples[name]
    payload = b"{}" if name in AUDIO_FIELDS else as_json(audio_path="a")
    text = value if isinstance(value, str) else json.dumps(value)
    assert getattr(accepted(parse(payload, ((name, text),))).request, name) == value


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "tRuE"])
def test_true_and_false_in_a_user_property_may_be_written_in_any_case(text: str) -> None:
    other = text.lower().replace("true", "False")
    request = accepted(parse_audio("a", WAV, (("stream", text), ("vad_filter", other)))).request
    assert (request.stream, request.vad_filter) == (True, False)
    assert isinstance(parse(as_json(audio_path="a", stream=text)), Refusal), "JSON has booleans of its own"


@pytest.mark.parametrize(
    ("text", "formats"),
    [
        ("srt", ["srt"]),
        ("srt,vtt", ["srt", "vtt"]),
        (" json , srt ", ["srt", "json"]),
        ("txt,txt", ["txt"]),
        ('["vtt"]', ["vtt"]),
        ("[]", []),
    ],
)
def test_formats_in_a_user_property_may_be_names_with_commas_between_them(text: str, formats: list[str]) -> None:
    for parsed in (parse(b"a", (("formats", text),)), parse_audio("a", WAV, (("formats", text),))):
        assert accepted(parsed).request.formats == formats


@pytest.mark.parametrize("text", ["", ",", "srt;vtt", "srt,doc", '"srt"', "7", "True"])
def test_what_is_no_list_of_formats_in_a_user_property_is_rejected(text: str) -> None:
    parsed = parse_audio("a", WAV, (("formats", text),))
    assert rejected(parsed).detail.startswith('formats must be a list such as ["txt"], of any of ')
    check(parsed)


def test_user_properties_over_four_kib_are_rejected() -> None:
    properties = (("job_id", "a"), *((f"k{number}", "x" * 100) for number in range(50)))
    for parsed in (parse(b"a.wav", properties), parse_audio("a", WAV, properties)):
        assert rejected(parsed).reason == "invalid_request"
        assert rejected(parsed).detail.startswith("metadata has ")
        assert rejected(parsed).recordable
        check(parsed)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("beam_size", "five"),
        ("beam_size", "5.1"),
        ("beam_size", "True"),
        ("beam_size", "1" * 5_000),
        ("beam_size", "NaN"),
        ("vad_filter", "Truely"),
        ("stream", "yes"),
        ("temperature", "0,0.2"),
        ("clip_timestamps", "0,30"),
        ("clip_timestamps", "[" * 100_000),
        ("metadata", "[1]"),
        ("metadata", "["),
        ("metadata", "[" * 100_000),
        ("metadata", '{"a":' * 100_000),
        ("metadata", '{"a": NaN}'),
        ("metadata", '{"a": 1e999}'),
        ("metadata", r'{"a": "\ud800"}'),
        ("audio_track", "mixed"),
        ("task", ""),
    ],
)
def test_a_user_property_that_does_not_fit_its_field_is_rejected(name: str, text: str) -> None:
    for parsed in (parse(b"a.wav", ((name, text), ("job_id", "a"))), parse_audio("a", WAV, ((name, text),))):
        assert rejected(parsed).reason == "invalid_request"
        assert rejected(parsed).detail.startswith(name)
        assert rejected(parsed).recordable
        check(parsed)


# -- audio as the payload ------------------------------------------------------------------------------------------


def test_the_payload_of_an_audio_topic_is_the_file_whatever_is_in_it() -> None:
    for payload in (WAV, b'{"audio_path": "a"}', b"\xff" * 10, b"porch.wav"):
        assert parse_audio("note-1", payload) == Accepted(JobRequest.model_construct(job_id="note-1"), payload)


def test_user_properties_set_the_fields_of_an_audio_message() -> None:
    properties = (("language", "de-AT"), ("beam_size", "1"), ("room", "porch"))
    request = accepted(parse_audio("a", WAV, properties)).request
    assert (request.language, request.beam_size, request.metadata) == ("de", 1, {"room": "porch"})
    assert (request.audio_path, request.audio_base64) == (None, None)


@pytest.mark.parametrize("job_id", ["", "a/b", "x" * 65, "a b", "\ufffd", "y" * 60_000])
def test_an_audio_topic_without_a_usable_id_is_rejected(job_id: str) -> None:
    parsed = parse_audio(job_id, WAV)
    assert rejected(parsed).reason == "invalid_job_id"
    assert not rejected(parsed).recordable
    assert rejected(parse_audio(job_id, WAV, (("audio_path", "a"),))) == parsed
    check(parsed)


@pytest.mark.parametrize("name", ["audio_path", "audio_url", "audio_base64"])
def test_an_audio_message_names_no_other_audio(name: str) -> None:
    parsed = parse_audio("a", WAV, ((name, "YQ=="),))
    assert bare(parsed) == Refusal(
        "invalid_request", f"The payload is the audio: leave out {name}.", "a", recordable=True
    )


def test_a_second_id_beside_the_topics_is_rejected_unless_it_is_the_same() -> None:
    accepted(parse_audio("a", WAV, (("job_id", "a"),)))
    parsed = parse_audio("a", WAV, (("job_id", "b"), ("room", "porch")))
    detail = "The user property job_id differs from the topic: leave it out."
    metadata = {"room": "porch"}
    assert parsed == Refusal("invalid_request", detail, "a", recordable=True, metadata=metadata, audio=UPLOAD)
    check(parsed)


# -- commands ------------------------------------------------------------------------------------------------------


WRONG_COMMANDS: list[tuple[str, Any, str]] = [
    ("get", {}, "job_id must be the id of a job, 1 to 64 of A-Z, a-z, 0-9, _ and -, or 'current'; it is missing."),
    ("get", b"", "job_id must be the id of a job, 1 to 64 of A-Z, a-z, 0-9, _ and -, or 'current'; it is missing."),
    ("get", {"job_id": "a b"}, "must be the id of a job, 1 to 64 of A-Z, a-z, 0-9, _ and -, or 'current', not 'a b'."),
    ("get", {"job_id": 7}, "or 'current', not 7."),
    ("get", {"job_id": None}, "or 'current', not null."),
    ("get", b"../etc/passwd", "or 'current', not '../etc/passwd'."),
    ("get", b"a\nb", "The payload is neither a JSON object nor one line of text with a job's id."),
    ("get", b"\xff\xfe", "The payload is neither a JSON object nor one line of text with a job's id."),
    ("get", b"a" * 5000, "The payload is neither a JSON object nor one line of text with a job's id."),
    ("get", b"x" * 70_000, "The request has 70000 bytes: at most 65536 are read."),
    ("get", b"[1]", "The payload must be a JSON object, or one line of text with a job's id."),
    ("get", b'"a"', "The payload must be a JSON object, or one line of text with a job's id."),
    ("get", b"{", "The payload is not JSON: EOF while parsing an object at line 1 column 1."),
    ("get", b'{"job_id": NaN}', "The payload is not JSON: expected value at line 1 column 12."),
    ("get", {"job_id": "a", "jobid": 1}, "There is no field 'jobid' (did you mean job_id?)."),
    ("cancel", {"job_id": "a", "reason": "x"}, "There is no field 'reason'."),
    ("pause", b"on", "`pause` is not about one job: leave job_id out."),
    ("list", {"job_id": "a"}, "`list` is not about one job: leave job_id out."),
    ("pause", {"on": True}, "There is no field 'on'."),
    ("list", {"limit": 0}, "limit must be a whole number from 1 to 1000, not 0."),
    ("list", {"limit": 1001}, "limit must be a whole number from 1 to 1000, not 1001."),
    ("list", {"limit": "5"}, "limit must be a whole number from 1 to 1000, not '5'."),
    ("list", {"limit": True}, "limit must be a whole number from 1 to 1000, not true."),
    ("list", {"status": "done"}, "'error', 'cancelled' or null, not 'done'."),
    ("list", {"after": "a/b"}, "or null, not 'a/b'."),
    ("result", {"job_id": "a", "format": "doc"}, "format must be one of txt, srt, vtt, tsv, json, md, not 'doc'."),
    ("result", {"job_id": "a", "offset": -1}, "or the offset + length of the previous response, not -1."),
    ("result", {"job_id": "a", "offset": 2**60}, "not 1152921504606846976."),
    ("result", {"job_id": "a", "length": 3}, f"length must be a whole number from 4 to {MAX_RESULT_BYTES}, not 3."),
    ("result", {"job_id": "a", "length": MAX_RESULT_BYTES + 1}, f"from 4 to {MAX_RESULT_BYTES}, not 65537."),
    ("get", {"job_id": "a", "transaction": "ü" * 2048}, "transaction has more than 4096 bytes as JSON."),
    ("get", {"job_id": "a", "transaction": {"x": [0] * 2048}}, "transaction has more than 4096 bytes as JSON."),
    ("get", b'{"job_id": "a", "transaction": [1e999]}', "transaction holds a number that is too large."),
    ("list", {"a": 1, "b": 2, "c": 3, "d": 4}, "There is no field 'c'. Mistakes beside these: 1."),
    ("pause", {"consumer": "a/b"}, "the name of a consumer, 1 to 64 of A-Z, a-z, 0-9, _ and -, or null, not 'a/b'."),
]


def command_payload(request: Any) -> bytes:
    return request if isinstance(request, bytes) else json.dumps(request).encode()


@pytest.mark.parametrize(("command", "request_", "sentence"), WRONG_COMMANDS)
def test_an_invalid_command_is_answered_with_what_its_fields_must_be(
    command: str, request_: Any, sentence: str
) -> None:
    parsed = parse_command(command, command_payload(request_))
    assert parsed.command is None
    assert parsed.mistakes.endswith(sentence)
    assert not [jargon for jargon in JARGON if jargon in parsed.mistakes]


@pytest.mark.parametrize("payload", [b"a", b" a\n", b"a\r\n", b'{"job_id": "a"}', b'\xef\xbb\xbf{"job_id":"a"}'])
def test_a_line_is_short_for_the_job(payload: bytes) -> None:
    assert parse_command("cancel", payload).command == JobCommand(job_id="a")


@pytest.mark.parametrize("payload", [b"", b" \n", b"{}", b"\xef\xbb\xbf"])
def test_an_empty_payload_is_an_empty_object(payload: bytes) -> None:
    assert parse_command("pause", payload).command == Command()


@pytest.mark.parametrize("command", COMMANDS)
def test_null_is_the_same_as_to_leave_a_field_of_a_command_out(command: str) -> None:
    fields = COMMANDS[command].request.model_fields
    needed = {"job_id": "a"} if "job_id" in fields else {}
    parsed = parse_command(command, as_json(**{**dict.fromkeys(fields), **needed}))
    assert parsed.command is not None
    assert parsed == parse_command(command, as_json(**needed))


@pytest.mark.parametrize(
    ("schema", "command", "request_"),
    [
        ("ListCommand", "list", {"limit": None, "status": None, "after": None, "consumer": None}),
        ("ListCommand", "list", {"limit": 0}),
        ("ListCommand", "list", {"limit": 5, "transaction": [{"a": 1}, None]}),
        ("ResultCommand", "result", {"job_id": "a", "format": None, "offset": None, "length": None}),
        ("ResultCommand", "result", {"job_id": "a", "length": 3}),
        ("JobCommand", "get", {"job_id": None}),
    ],
)
def test_a_command_is_valid_if_its_schema_allows_it(schema: str, command: str, request_: dict[str, Any]) -> None:
    allowed = Draft202012Validator(payload_schemas()[schema]).is_valid(request_)
    assert allowed == (parse_command(command, command_payload(request_)).command is not None)


@pytest.mark.parametrize("command", [*COMMANDS, "dance"])
def test_transaction_and_consumer_are_read_of_an_invalid_command_too(command: str) -> None:
    parsed = parse_command(command, as_json(consumer="attic", transaction=[1, None], nonsense=1))
    assert (parsed.command, parsed.consumer, parsed.transaction) == (None, "attic", [1, None])
    long = parse_command(command, as_json(consumer="a/b", transaction="x" * 5000))
    assert (long.command, long.consumer, long.transaction) == (None, None, None)
    assert "xxx" not in long.mistakes


# -- anything at all -----------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
numbers = st.integers(-1, 3) | st.floats(-0.1, 1.1) | st.floats()
near_misses = st.fixed_dictionaries(
    {},
    optional={
        "job_id": st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True) | json_values,
        "audio_path": st.text(max_size=20) | json_values,
        "audio_base64": st.binary(max_size=20).map(lambda audio: base64.b64encode(audio).decode()) | json_values,
        "model_size": st.sampled_from(["base", "tiny.en"]) | json_values,
        "language": st.sampled_from(["de", "en-US", "Latin", "zz"]) | json_values,
        "task": st.sampled_from(["transcribe", "translate"]) | json_values,
        "initial_prompt": st.text(max_size=20) | json_values,
        "audio_url": st.text(max_size=20).map(lambda rest: f"http://{rest}") | json_values,
        "hotwords": st.text(max_size=20) | json_values,
        "beam_size": st.integers(-1, 12) | json_values,
        "diarize": st.booleans() | st.just("channels") | json_values,
        "min_speakers": st.integers(0, 21) | json_values,
        "max_speakers": st.integers(0, 21) | json_values,
        "audio_track": st.integers(-1, 101) | st.just("mix") | json_values,
        "temperature": numbers | st.lists(numbers, max_size=11) | json_values,
        "vad_filter": st.booleans() | json_values,
        "word_timestamps": st.booleans() | json_values,
        "clip_timestamps": st.lists(st.lists(numbers, max_size=3), max_size=3) | json_values,
        "batch_size": st.integers(-1, 33) | json_values,
        "formats": st.lists(st.sampled_from([*FORMATS, "doc"]), max_size=6) | json_values,
        "stream": st.booleans() | json_values,
        "priority": st.integers(-1, 10) | json_values,
        "metadata": st.dictionaries(st.text(max_size=10), json_values, max_size=3) | json_values,
        "langauge": json_values,
    },
)
properties_of_any_kind = st.lists(
    st.tuples(st.sampled_from([*JobRequest.model_fields, "room"]) | st.text(max_size=10), st.text(max_size=40)),
    max_size=4,
).map(tuple)


@settings(deadline=None)
@given(st.binary(max_size=200), properties_of_any_kind)
@example(b"[" * 100_000, ())
@example(b"{}", (("metadata", "[" * 100_000),))
@example(b"", ())
def test_arbitrary_bytes_are_a_request_or_a_refusal(payload: bytes, properties: UserProperties) -> None:
    check(parse(payload, properties), payload, properties)
    check(parse_audio("a", payload, properties), payload, properties)


@settings(deadline=None)
@given(json_values, properties_of_any_kind)
def test_arbitrary_json_is_a_request_or_a_refusal(document: object, properties: UserProperties) -> None:
    payload = json.dumps(document).encode()
    check(parse(payload, properties), payload, properties)


@settings(deadline=None, max_examples=300)
@given(near_misses, properties_of_any_kind)
def test_what_is_nearly_a_request_is_a_request_or_a_refusal(
    document: dict[str, Any], properties: UserProperties
) -> None:
    for ensure_ascii in (True, False):
        payload = json.dumps(document, ensure_ascii=ensure_ascii).encode(errors="surrogatepass")
        check(parse(payload, properties), payload, properties)


@settings(deadline=None)
@given(st.text(max_size=80))
def test_an_arbitrary_audio_topic_is_a_request_or_a_refusal(job_id: str) -> None:
    check(parse_audio(job_id, WAV), WAV)


odd_text = st.text(st.characters(categories=["Cs", "Cc", "Lo"]), max_size=60)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*JobRequest.model_fields, "room"]) | odd_text, odd_text, max_size=4))
@example({"beam_size": "\ud800"})
@example({"metadata": "\ud800"})
@example({"room": "\ud800"})
def test_user_properties_with_lone_surrogates_are_a_request_or_a_refusal(properties: dict[str, str]) -> None:
    check(parse(b"{}", tuple(properties.items())))
    check(parse_audio("a", WAV, tuple(properties.items())))
