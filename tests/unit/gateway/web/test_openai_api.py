"""OpenAI's API on the real application, with a bus of which only the answers are there."""

import json
from pathlib import Path
from typing import Any

import openai.types.audio
import pytest
from faster_whisper.transcribe import get_compression_ratio

from cesar_mqtt.gateway.submission import Submission
from tests.unit.gateway.web.site import Site, status

SEGMENTS = [
    {
        "id": 1, "start": 0.0, "end": 1.5, "text": "Hello there.", "avg_logprob": -0.2, "no_speech_prob": 0.01,
        "words": [
            {"word": " Hello", "start": 0.0, "end": 0.7, "probability": 0.9},
            {"word": " there.", "start": 0.7, "end": 1.5, "probability": 0.8},
        ],
    }
]  # fmt: skip


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A consumer that completes every job at once."""
    site = Site(tmp_path)
    site.online()
    document = {"text": "Hello there.", "language": "de", "duration": 1.5, "segments": SEGMENTS}
    files = {
        "json": json.dumps(document),
        "srt": "1\n00:00:00,000 --> 00:00:01,500\nHello there.\n\n",
        "vtt": "WEBVTT\n\n",
    }
    site.bus.answers["result"] = lambda fields: {
        "text": files[fields["format"]], "length": len(files[fields["format"]]), "more": False,
    }  # fmt: skip

    def complete(item: Submission) -> None:
        site.bus.accept(item)
        if item.options.get("stream"):
            site.take(f"cesar/segments/{item.job_id}", SEGMENTS[0])
        site.take(f"cesar/status/{item.job_id}", status(item.job_id, "completed", audio_duration=1.5))

    site.bus.on_submit = complete
    return site


def ask(site: Site, path: str = "transcriptions", **fields: Any) -> Any:
    return site.browser.post(
        f"/v1/audio/{path}", files={"file": ("a.wav", b"RIFF")}, data={"model": "whisper-1", **fields}
    )


def error_of(response: Any, http_status: int) -> dict[str, Any]:
    assert response.status_code == http_status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_each_format_of_a_response(site: Site) -> None:
    assert ask(site).json()["text"] == "Hello there."
    assert ask(site, response_format="text").text == "Hello there.\n"
    assert ask(site, response_format="srt").text.startswith("1\n00:00:00,000 -->")
    assert ask(site, response_format="vtt").text.startswith("WEBVTT")
    verbose = ask(site, response_format="verbose_json").json()
    assert (verbose["language"], verbose["duration"], verbose["task"]) == ("german", 1.5, "transcribe")
    assert [segment["id"] for segment in verbose["segments"]] == [0]
    assert verbose["segments"][0]["compression_ratio"] == get_compression_ratio("Hello there.")
    assert "words" not in verbose
    words = ask(site, response_format="verbose_json", **{"timestamp_granularities[]": "word"}).json()
    assert [word["word"] for word in words["words"]] == ["Hello", "there."]
    assert "segments" not in words


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {"formats": ["json"], "task": "transcribe"}),
        ({"model": "gpt-4o-transcribe"}, {}),
        ({"model": "base"}, {"model_size": "base"}),
        ({"model": "Systran/faster-whisper-small"}, {"model_size": "small"}),
        ({"model": "openai/whisper-large-v3"}, {"model_size": "large-v3"}),
        ({"language": "de", "temperature": "0.4"}, {"language": "de", "temperature": 0.4}),
        ({"prompt": "Names: Ada."}, {"initial_prompt": "Names: Ada."}),
        ({"temperature": "0"}, {}),
        ({"response_format": "srt"}, {"formats": ["srt"]}),
        (
            {"timestamp_granularities[]": ["word", "segment"], "response_format": "verbose_json"},
            {"word_timestamps": True},
        ),
        ({"timestamp_granularities": "word", "response_format": "verbose_json"}, {"word_timestamps": True}),
        ({"stream": "true"}, {"stream": True}),
        ({"keywords[]": ["Ada", "Grace"]}, {"hotwords": "Ada, Grace"}),
        ({"priority": "5", "vad_filter": "false"}, {"priority": 5, "vad_filter": False}),
        (
            {"diarize": "true", "min_speakers": "2", "max_speakers": "3"},
            {"diarize": True, "min_speakers": 2, "max_speakers": 3},
        ),
        ({"diarize": "channels"}, {"diarize": "channels"}),
        ({"include[]": "logprobs", "chunking_strategy": "auto", "user": "x"}, {}),
        ({"metadata": '{"keep": true}'}, {"metadata": {"keep": True}}),
        ({"metadata[keep]": "true", "metadata[room]": "hall"}, {"metadata": {"keep": "true", "room": "hall"}}),
    ],
)  # fmt: skip
def test_the_fields_of_a_request_become_those_of_a_job(
    site: Site, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    response = ask(site, **fields)
    assert response.status_code == 200, response.text
    (item,) = site.bus.submitted
    assert {"formats": ["json"], "task": "transcribe", **options} == item.options


def test_verbose_json_has_the_speakers_of_segments_and_words_if_there_are_any(site: Site) -> None:
    asked: dict[str, Any] = {"response_format": "verbose_json", "timestamp_granularities[]": ["word", "segment"]}
    plain = ask(site, **asked).json()
    assert not any("speaker" in each for each in plain["segments"] + plain["words"])
    segment: dict[str, Any] = {**SEGMENTS[0], "speaker": "Ada"}
    segment["words"] = [{**word, "speaker": "Ada"} for word in segment["words"]]
    text = json.dumps({"text": "Hello there.", "segments": [segment]})
    site.bus.answers["result"] = lambda _fields: {"text": text, "length": len(text), "more": False}
    labelled = ask(site, diarize="true", **asked).json()
    assert [each["speaker"] for each in labelled["segments"] + labelled["words"]] == ["Ada"] * 3
    assert openai.types.audio.TranscriptionVerbose.model_validate(labelled).segments


def test_a_translation_is_a_job_with_that_task(site: Site) -> None:
    assert ask(site, "translations", response_format="verbose_json").json()["task"] == "translate"
    assert site.bus.submitted[0].options["task"] == "translate"


def test_a_stream_has_the_segments_and_then_the_whole_text(site: Site) -> None:
    lines = [
        line.removeprefix("data: ") for line in ask(site, stream="true").text.splitlines() if line.startswith("data: ")
    ]
    assert lines.pop() == "[DONE]"
    *deltas, done = map(json.loads, lines)
    assert "".join(delta["delta"] for delta in deltas) == "Hello there."
    assert done == {"type": "transcript.text.done", "text": "Hello there."}


@pytest.mark.parametrize(
    ("code", "http_status", "kind"),
    [
        ("audio_unreadable", 400, "invalid_request_error"),
        ("audio_too_large", 413, "invalid_request_error"),
        ("model_unavailable", 503, "server_error"),
        ("crashed", 500, "server_error"),
        ("timeout", 504, "server_error"),
    ],
)
@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_job_that_fails_is_an_error_in_openais_shape(
    site: Site, code: str, http_status: int, kind: str, stream: str
) -> None:
    def fail(item: Submission) -> None:
        site.take(f"cesar/status/{item.job_id}", status(item.job_id, "error", error_code=code, error_message="Why."))

    site.bus.on_submit = fail
    response = ask(site, stream=stream)
    if stream == "true":
        error = json.loads(response.text.removeprefix("data: ").splitlines()[0])["error"]
    else:
        error = error_of(response, http_status)
    assert error == {"message": "Why.", "type": kind, "param": None, "code": code}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "docx"}, "response_format"),
        ({"timestamp_granularities[]": "letter"}, "timestamp_granularities"),
        ({"language": "klingon"}, None),
        ({"temperature": "2"}, None),
    ],
)
def test_a_wrong_field_is_an_error_of_the_client(site: Site, fields: dict[str, str], param: str | None) -> None:
    assert error_of(ask(site, **fields), 400)["param"] == param
    assert site.bus.submitted == []


def test_a_job_that_another_client_cancels_or_deletes_ends_the_request(site: Site) -> None:
    for end in (status("x", "cancelled"), b""):

        def accept_and_end(item: Submission, end: Any = end) -> None:
            site.bus.accept(item)
            site.take(f"cesar/status/{item.job_id}", end)

        site.bus.on_submit = accept_and_end
        assert error_of(ask(site), 400)["code"] in {"cancelled", "deleted"}


def test_other_errors_have_openais_shape_too(site: Site) -> None:
    assert error_of(site.browser.post("/v1/audio/transcriptions", data={"model": "x"}), 415)
    assert error_of(site.browser.get("/v1/chat/completions"), 404)
    assert error_of(site.browser.get("/v1/models/unknown"), 404)["code"] == "model_not_found"
    site.take("cesar/consumer/cesar/state", {"state": "offline"})
    assert error_of(ask(site), 503)["code"] == "consumer_offline"


def test_models_are_those_of_the_consumers(site: Site) -> None:
    listed = site.browser.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["whisper-1", "base", "tiny.en"]
    assert site.browser.get("/v1/models/base").json() == listed["data"][1]
