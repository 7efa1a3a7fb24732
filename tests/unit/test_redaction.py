"""No secret of a message is published or logged, however it is written: found by what looks like one."""

import json
import logging
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cesar_mqtt.logs import JsonFormatter, TextFormatter
from cesar_mqtt.protocol.truncate import excerpt
from cesar_mqtt.redaction import redact_name, redact_sentence, redact_value

MARK = "hunter2"
ENCODINGS: dict[str, Callable[[Any], str]] = {
    "json": json.dumps,
    "slashes": lambda document: json.dumps(document).replace("/", "\\/"),
    "unicode": lambda document: _as_escapes(json.dumps(document), "/:@?="),
    "letters": lambda document: _as_escapes(json.dumps(document), "/:@?=hunter2"),
    "nested": lambda document: json.dumps({"payload": json.dumps(document).replace("/", "\\/")}),
    "twice": lambda document: json.dumps([json.dumps(json.dumps(document).replace("/", "\\/"))]),
    "malformed": lambda document: json.dumps(document)[:-1] + ",}",
    "python": str,
    "repeated": lambda document: json.dumps(document)[:-1] + ', "audio_url": "x", "password": 1}',
}


def _as_escapes(text: str, chars: str) -> str:
    """Write some characters as JSON may."""
    return "".join(f"\\u{ord(char):04x}" if char in chars else char for char in text)


secrets = st.tuples(st.text(max_size=8), st.text(max_size=8)).map(lambda around: f"{around[0]}{MARK}{around[1]}")
words = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)
schemes = st.sampled_from(["http", "https", "rtsp", "ftp", "HTTP", "mqtt"])
urls = st.one_of(
    st.builds("{}://{}:{}@{}/a.wav".format, schemes, words, secrets, words),
    st.builds("{}://{}@{}/a.wav?x=1#y".format, schemes, secrets, words),
    st.builds("{}://{}/a.wav?token={}".format, schemes, words, words.map(lambda word: f"{word}{MARK}")),
    st.builds("see {}://{}/a.wav?{}".format, schemes, words, words.map(lambda word: f"{word}{MARK}")),
    st.builds(lambda *parts: quote("{}://{}:{}@{}/a.wav".format(*parts), safe=""), schemes, words, secrets, words),
    st.builds("clip.wav?sig={}".format, words.map(lambda word: f"{word}{MARK}")),
    st.builds("user:{}@host".format, words.map(lambda word: f"{word}{MARK}")),
    st.builds("{} {}{}".format, st.sampled_from(["Bearer", "bearer", "Basic"]), words, st.just(MARK)),
    st.builds("password={}{}".format, words, st.just(MARK)),
    st.just("eyJhbGciOi.hunter2.c2ln"),
)
documents = st.one_of(
    st.dictionaries(st.sampled_from(["audio_url", "audio_path", "url", "x"]), urls, min_size=1),
    st.dictionaries(
        st.sampled_from(["password", "mqtt_passwd", "Authorization", "x-api-key", "access_token", "clientSecret"]),
        st.one_of(secrets, st.lists(secrets, min_size=1), st.dictionaries(words, secrets, min_size=1)),
        min_size=1,
    ).map(lambda document: document | {"x": 1}),
    st.builds(lambda url: {"x": [{"y": url}], url: 0}, urls),
)


@given(documents, st.sampled_from(sorted(ENCODINGS)), st.integers(0, 400))
@example({"audio_url": "http://user:hunter2@host"}, "slashes", 400)
@example({"audio_url": "http://host/x?token=hunter2"}, "json", 400)
def test_no_excerpt_shows_a_secret(document: dict[str, Any], encoding: str, cut_at: int) -> None:
    payload = ENCODINGS[encoding](document)
    for sent in (payload, payload[: len(payload) - cut_at % (len(payload) + 1)]):
        assert MARK not in excerpt(sent.encode(errors="replace"))


@given(urls)
def test_no_excerpt_of_a_line_shows_a_secret(line: str) -> None:
    assert MARK not in excerpt(line.encode(errors="replace"))


def test_a_secret_that_goes_on_behind_what_is_read_is_not_shown() -> None:
    for begin in ('{"audio_url": "http://user:', "http://user:"):
        assert MARK not in excerpt(f"{begin}{MARK * 10_000}@host".encode())


@pytest.mark.parametrize(
    ("payload", "shown"),
    [
        ('{"job_id": "porch-17", "audio_pth": "porch.wav"}', '{"job_id": "porch-17", "audio_pth": "porch.wav"}'),
        ('{"a": {}, "b": [1, null, {"c": 0.5}], "d": []}', '{"a": {}, "b": [1, null, {"c": 0.5}], "d": []}'),
        (
            '{"audio_url":"http://u:p@cam/a.wav?t=1","by":"me@home"}',
            '{"audio_url": "http://***@cam/a.wav?***", "by": "me@home"}',
        ),
        ('{"password": {"is": 7}, "task": "x"}', '{"password": "***", "task": "x"}'),
        ("no such/file.wav", "no such/file.wav"),
        ("Is it there? Yes", "Is it there? Yes"),
        ("http://host/a.wav", "http://host/a.wav"),
    ],
)
def test_what_is_no_secret_is_shown(payload: str, shown: str) -> None:
    assert excerpt(payload.encode()) == shown


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        ("Connected to mqtt://user:p/w@host:1883 (5)", "Connected to mqtt://***@host:1883 (5)"),
        ("GET 'https://host/a.wav?token=hunter2' failed", "GET 'https://host/a.wav?***' failed"),
        (
            "There is no field 'x' (did you mean y?). See me@home.",
            "There is no field 'x' (did you mean y?). See me@home.",
        ),
        ("Authorization: Bearer hunter2", "Authorization: Bearer ***"),
        ("Nothing at mqtt://host:1883 answered", "Nothing at mqtt://host:1883 answered"),
    ],
)
def test_a_sentence_keeps_everything_but_secrets(sentence: str, shown: str) -> None:
    assert redact_sentence(sentence) == shown
    record = logging.LogRecord("x", logging.INFO, "x", 1, "%s", (sentence,), None)
    assert json.loads(JsonFormatter().format(record))["message"] == shown
    assert TextFormatter().format(record).endswith(shown)


def test_a_traceback_in_the_log_holds_no_secret() -> None:
    exc = ValueError("no connection to http://user:hunter2@host/a.wav?token=hunter2")
    record = logging.LogRecord("x", logging.ERROR, "x", 1, "failed", (), (ValueError, exc, None))
    for formatter in (JsonFormatter(), TextFormatter()):
        logged = formatter.format(record)
        assert "http://***@host/a.wav?***" in logged
        assert MARK not in logged


@pytest.mark.parametrize("name", ["a b.wav", "what?.wav", "me@home.wav", "10:30 call.wav", "token=x.wav"])
def test_names_of_files_stay_as_they_are(name: str) -> None:
    assert redact_name(name) == name


@pytest.mark.parametrize("name", ["rtsp://user:hunter2@cam/stream", "user:hunter2@cam", "https://cam/x?key=hunter2"])
def test_a_url_in_place_of_a_name_is_redacted(name: str) -> None:
    assert MARK not in redact_name(name)


@given(st.text())
def test_redacting_twice_changes_nothing_more(text: str) -> None:
    assert redact_value(redact_value(text)) == redact_value(text)
    assert redact_sentence(redact_sentence(text)) == redact_sentence(text)
