"""OpenAI's API on the real application, with a bus of which only the answers are there."""

import asyncio
import inspect
import json
import warnings
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import openai.types.audio
import pytest
from faster_whisper.transcribe import get_compression_ratio

from cesar_mqtt.gateway.submission import Submission
from cesar_mqtt.gateway.web import openai_api
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
        ({"chunking_strategy": "auto"}, {}),
        ({"languages[]": "de"}, {"language": "de"}),
        ({"response_format": "diarized_json"}, {"diarize": True}),
        ({"response_format": "diarized_json", "diarize": "channels"}, {"diarize": "channels"}),
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
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities"),
        ({"stream": "perhaps"}, "stream"),
        ({"stream": "true", "response_format": "srt"}, "stream"),
        ({"chunking_strategy[type]": "server_vad", "chunking_strategy[threshold]": "0.7"}, "chunking_strategy"),
        ({"chunking_strategy": '{"type": "server_vad"}'}, "chunking_strategy"),
        ({"metadata": "[]"}, "metadata"),
        ({"beam_sise": "3"}, "beam_sise"),
        ({"language[de]": "3"}, "language[de]"),
        ({"job_id": "mine"}, "job_id"),
    ],
)
def test_a_wrong_field_is_an_error_of_the_client(site: Site, fields: dict[str, str], param: str | None) -> None:
    assert error_of(ask(site, **fields), 400)["param"] == param
    assert site.bus.submitted == []


# -- the options of the official client --------------------------------------------------------------------------------

AUDIO = ("a.wav", b"RIFF")
TRANSCRIPTIONS: Mapping[str, tuple[Any, Mapping[str, Any] | str]] = {
    "file": (AUDIO, {}),
    "model": ("base", {"model_size": "base"}),
    "chunking_strategy": ({"type": "server_vad"}, {}),
    "include": (["logprobs"], "include"),
    "keywords": (["Ada", "Grace"], {"hotwords": "Ada, Grace"}),
    "known_speaker_names": (["Ada"], "known_speaker_names"),
    "known_speaker_references": (["data:audio/wav;base64,UklGRg=="], "known_speaker_references"),
    "language": ("de", {"language": "de"}),
    "languages": (["de", "en"], "languages"),
    "prompt": ("Names: Ada.", {"initial_prompt": "Names: Ada."}),
    "response_format": ("vtt", {"formats": ["vtt"]}),
    "stream": (True, {"stream": True}),
    "temperature": (0.4, {"temperature": 0.4}),
    "timestamp_granularities": (["word"], "timestamp_granularities"),
    "extra_headers": ({"Idempotency-Key": "a"}, {}),
    "extra_query": ({"priority": 4}, {"priority": 4}),
    "extra_body": ({"beam_size": 3}, {"beam_size": 3}),
    "timeout": (30.0, {}),
}
"""Each option: a value, and the fields of the job that come of it, or the parameter that the error names."""
TRANSLATIONS = {
    **{name: TRANSCRIPTIONS[name] for name in ("file", "model", "prompt", "temperature")},
    **{name: TRANSCRIPTIONS[name] for name in ("extra_headers", "extra_query", "extra_body", "timeout")},
    "response_format": ("diarized_json", "response_format"),
}


def client_of(site: Site) -> openai.AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(transport=httpx2.ASGITransport(app=site.app.asgi))
    return openai.AsyncOpenAI(base_url="http://127.0.0.1:8188/v1", api_key="none", http_client=http, max_retries=0)


@pytest.mark.parametrize(("resource", "options"), [("transcriptions", TRANSCRIPTIONS), ("translations", TRANSLATIONS)])
def test_each_option_of_the_official_client_is_used_or_refused(
    site: Site, resource: str, options: Mapping[str, tuple[Any, Mapping[str, Any] | str]]
) -> None:
    client = client_of(site)
    create = getattr(client.audio, resource).create
    assert set(options) == set(inspect.signature(inspect.unwrap(create)).parameters) - {"self"}

    async def ask_for(name: str) -> str | None:
        try:
            await create(**{"file": AUDIO, "model": "whisper-1", name: options[name][0]})
        except openai.BadRequestError as error:
            return error.param
        return None

    async def walk() -> None:
        for name, (_, outcome) in options.items():
            before = len(site.bus.submitted)
            refused = await ask_for(name)
            jobs = [item.options for item in site.bus.submitted[before:]]
            if isinstance(outcome, str):
                assert (refused, jobs) == (outcome, [])
            else:
                assert (refused, len(jobs)) == (None, 1)
                assert {**jobs[0], **outcome} == jobs[0]
        await client.close()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the client, for every model that we name
        asyncio.run(walk())


def test_diarized_json_has_a_speaker_for_each_segment(site: Site) -> None:
    segments = [{**SEGMENTS[0], "id": number + 1, "speaker": f"Speaker {number + 1}"} for number in range(2)]
    text = json.dumps({"text": "Hello there.", "duration": 1.5, "segments": segments})
    site.bus.answers["result"] = lambda _fields: {"text": text, "length": len(text), "more": False}
    asked = openai.types.audio.TranscriptionDiarized.model_validate(ask(site, response_format="diarized_json").json())
    assert [(each.id, each.speaker) for each in asked.segments] == [("seg_0", "Speaker 1"), ("seg_1", "Speaker 2")]
    stream = ask(site, response_format="diarized_json", stream="true").text
    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
    assert [event["speaker"] for event in events if event["type"] == "transcript.text.segment"] == [
        "Speaker 1",
        "Speaker 2",
    ]

    def fail(item: Submission) -> None:
        ended = status(item.job_id, "completed", diarization_error="A model is missing.")
        site.take(f"cesar/status/{item.job_id}", ended)

    site.bus.on_submit = fail
    error = error_of(ask(site, response_format="diarized_json"), 503)
    assert (error["code"], "A model is missing." in error["message"]) == ("diarization_failed", True)


# -- requests that are sent again --------------------------------------------------------------------------------------


def retry(site: Site, content: bytes = b"RIFF", headers: Mapping[str, str] | None = None) -> Any:
    return site.browser.post("/v1/audio/transcriptions", files={"file": ("a.wav", content)}, headers=headers)


def test_a_request_that_is_sent_again_waits_for_the_same_job(site: Site) -> None:
    retried = {"x-stainless-retry-count": "1"}
    for content, headers, job in (
        (b"one", {"x-stainless-retry-count": "0"}, 0),
        (b"one", retried, 0),
        (b"two", retried, 2),
        (b"one", {}, 3),
        (b"one", {"Idempotency-Key": "a"}, 4),
        (b"one", {"Idempotency-Key": "a"}, 4),
        (b"one", {"Idempotency-Key": "b"}, 6),
    ):
        assert retry(site, content, headers).json()["text"] == "Hello there."
        assert site.bus.submitted[-1] == site.bus.submitted[job]
    jobs = [item.job_id for item in site.bus.submitted]
    assert len(set(jobs)) == 5


FORM = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--x--\r\n'
HEAD = {"Content-Type": "multipart/form-data; boundary=x"}


def test_a_running_job_goes_on_when_the_request_is_sent_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_api, "_RETRY_S", 0.0)

    async def disconnect_and_send_again() -> None:
        submitted, cancelled = asyncio.Queue[str](), asyncio.Queue[str]()
        starts, arrives = asyncio.Event(), asyncio.Event()

        def run(item: Submission) -> None:
            site.take(f"cesar/status/{item.job_id}", status(item.job_id, "processing"))
            submitted.put_nowait(item.job_id)

        def cancel(fields: Mapping[str, Any]) -> dict[str, Any]:
            cancelled.put_nowait(fields["job_id"])
            return {}

        async def waits() -> str:
            """Return the job of the last request, once it waits for its end."""
            job_id = await submitted.get()
            for _ in range(100):
                await asyncio.sleep(0)
            return job_id

        async def slowly() -> AsyncIterator[bytes]:
            yield FORM[:20]
            starts.set()
            await arrives.wait()
            yield FORM[20:]

        site.bus.on_submit = run
        site.bus.answers["cancel"] = cancel
        url = "http://127.0.0.1:8188/v1/audio/transcriptions"
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=site.app.asgi)) as http:
            first = asyncio.create_task(http.post(url, content=FORM, headers=HEAD))
            running = await waits()
            again = asyncio.create_task(
                http.post(url, content=slowly(), headers={**HEAD, "x-stainless-retry-count": "1"})
            )
            await starts.wait()
            first.cancel()
            await asyncio.wait([first])
            arrives.set()
            assert await submitted.get() == running
            other = asyncio.create_task(http.post(url, content=FORM.replace(b"RIFF", b"RIFX"), headers=HEAD))
            gone = await waits()
            other.cancel()
            assert await cancelled.get() == gone
            site.take(f"cesar/status/{running}", status(running, "completed"))
            assert (await again).json()["text"] == "Hello there."
            assert cancelled.empty()

    asyncio.run(asyncio.wait_for(disconnect_and_send_again(), 60))


def test_a_job_that_failed_is_not_waited_for_again(site: Site) -> None:
    complete = site.bus.on_submit

    def fail(item: Submission) -> None:
        site.take(f"cesar/status/{item.job_id}", status(item.job_id, "cancelled"))

    site.bus.on_submit = fail
    failed = retry(site)
    assert (failed.status_code, failed.headers["x-should-retry"]) == (400, "false")
    site.bus.on_submit = complete
    assert retry(site, headers={"x-stainless-retry-count": "1"}).status_code == 200
    assert site.bus.submitted[0].job_id != site.bus.submitted[1].job_id


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
