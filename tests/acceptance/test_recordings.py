"""Long recordings, results, cancel, retry and URLs: the command as a process, mosquitto, the real model."""

import json
import threading
import wave
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import srt  # type: ignore[import-untyped]
import webvtt

from tests.acceptance.harness import DATA, LONG, SPOKEN, Bus, Consumer, repeated_long, wait_until, words
from tests.conftest import Mosquitto

pytestmark = [pytest.mark.model, pytest.mark.mosquitto]

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]

SHORT_WINDOWS = {"CESAR_TRANSCRIBER__WINDOW": "30"}
TIMES = 3
TOLD = words(LONG.with_suffix(".txt").read_text())


@pytest.fixture(scope="module")
def minutes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of some two minutes: long.ogg, over and over."""
    return repeated_long(tmp_path_factory.mktemp("audio") / "minutes.wav", times=TIMES)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording that no test waits for to its end."""
    return repeated_long(tmp_path_factory.mktemp("audio") / "endless.wav", times=2 * TIMES)


def errors_in(text: str, expected: list[str]) -> float:
    """The word error rate: what it takes to make one list of words of the other, over the length of the second."""
    heard = words(text)
    row = list(range(len(expected) + 1))
    for n, word in enumerate(heard, start=1):
        last, row[0] = row[0], n
        for m, wanted in enumerate(expected, start=1):
            last, row[m] = row[m], min(row[m] + 1, row[m - 1] + 1, last + (word != wanted))
    return row[-1] / len(expected)


# -- long recordings -----------------------------------------------------------------------------------------------


def test_a_killed_consumer_goes_on_with_a_long_recording_where_it_was(
    mosquitto: Mosquitto, serve: Serve, join: Join, minutes: Path
) -> None:
    consumer = serve("--broker", mosquitto.url, "--audio-dir", str(minutes.parent), environ=SHORT_WINDOWS)
    bus = join(mosquitto.port)
    topic = "cesar/status/talk"
    bus.publish("cesar/jobs", {"job_id": "talk", "audio_path": "minutes.wav", "formats": ["json"]})
    bus.wait(topic, lambda status: (status["processed_duration"] or 0.0) > 60.0)
    consumer.kill()
    before = max(status["processed_duration"] or 0.0 for status in bus.seen(topic))
    consumer.start()

    resumed = bus.wait(topic, lambda status: status["attempt"] == 2 and status["processed_duration"] is not None)
    end = bus.status("talk")

    assert end["status"] == "completed"
    assert resumed["processed_duration"] >= before - 31.0, "no more than one window is done twice"
    progress = [status["progress"] for status in bus.seen(topic) if status["attempt"] == 2]
    assert progress == sorted(progress)
    assert errors_in(end["result_text"], TOLD * TIMES) < 0.02
    result = json.loads(next(m.payload for m in bus.messages if m.topic == "cesar/result/talk/json"))
    assert [segment["id"] for segment in result["segments"]] == list(range(1, len(result["segments"]) + 1))
    starts = [segment["start"] for segment in result["segments"]]
    assert starts == sorted(starts)
    assert errors_in(" ".join(segment["text"] for segment in result["segments"]), TOLD * TIMES) < 0.02
    assert end["audio_duration"] == pytest.approx(TIMES * 47.6, abs=1.5)


def test_progress_never_goes_back_and_ends_at_one(
    mosquitto: Mosquitto, serve: Serve, join: Join, minutes: Path
) -> None:
    serve("--broker", mosquitto.url, "--audio-dir", str(minutes.parent))
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", {"job_id": "talk", "audio_path": "minutes.wav"})
    bus.status("talk", "completed")

    told = [status for status in bus.seen("cesar/status/talk") if status["status"] != "queued"]
    progress = [status["progress"] for status in told]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    assert all(share < 1.0 for share in progress[:-1])
    assert len(set(progress)) > 3
    assert any(status["eta"] for status in told)
    measured = [status for status in told if status["eta"] is not None]
    assert all(status["speed"] > 0 and status["eta"] >= 0 for status in measured)
    heard = words(told[-1]["result_text"])
    assert (heard[:6], heard[-6:]) == (TOLD[:6], TOLD[-6:])


# -- cancel and retry ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["talk", "current"])
def test_a_job_in_work_is_cancelled_and_the_next_one_is_done(
    mosquitto: Mosquitto, serve: Serve, join: Join, endless: Path, named: str
) -> None:
    serve("--broker", mosquitto.url, "--audio-dir", str(endless.parent))
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", {"job_id": "talk", "audio_path": "endless.wav"})
    bus.publish("cesar/jobs", {"job_id": "next", "audio_path": "speech.wav"})
    bus.wait("cesar/status/talk", lambda status: (status["progress"] or 0.0) > 0.0)

    bus.publish("cesar/request/cancel", named)

    answer = bus.wait("cesar/response/cancel")
    assert (answer["status"], answer["data"]["job_id"]) == ("ok", "talk")
    end = bus.status("talk")
    assert (end["status"], end["error_code"], end["result_text"]) == ("cancelled", None, None)
    assert words(bus.status("next")["result_text"]) == SPOKEN
    assert bus.wait("cesar/consumer/cesar/queue", lambda queue: queue["cancelled_total"] == 1)


def test_a_cancelled_job_is_done_after_a_retry_with_the_options_that_it_came_with(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    bus.publish("cesar/request/pause", {})
    bus.publish(
        "cesar/jobs", {"job_id": "again", "audio_path": "speech.wav", "language": "English", "formats": ["srt"]}
    )
    bus.publish("cesar/request/cancel", {"job_id": "again", "transaction": 7})
    assert bus.status("again")["status"] == "cancelled"
    assert bus.wait("cesar/response/cancel")["transaction"] == 7

    bus.publish("cesar/request/retry", "again")
    bus.publish("cesar/request/resume", {})

    end = bus.status("again", "completed")
    assert (words(end["result_text"]), end["language"], end["formats"]) == (SPOKEN, "en", ["srt"])


def test_a_job_over_its_time_ends_as_a_timeout_and_the_next_one_is_done(
    mosquitto: Mosquitto, serve: Serve, join: Join, endless: Path
) -> None:
    limit = {"CESAR_WORKER__JOB_TIMEOUT": "10"}  # a busy machine does `next` in that time, too
    serve("--broker", mosquitto.url, "--audio-dir", str(endless.parent), environ=limit)
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", {"job_id": "talk", "audio_path": "endless.wav", "beam_size": 10})
    bus.publish("cesar/jobs", {"job_id": "next", "audio_path": "speech.wav"})

    end = bus.status("talk")
    assert (end["status"], end["error_code"], end["retryable"]) == ("error", "timeout", True)
    assert "worker.job_timeout" in end["error_message"]
    assert bus.status("next")["status"] == "completed"


# -- results -------------------------------------------------------------------------------------------------------


def test_results_are_retained_in_each_format_and_segments_are_told_as_they_are_heard(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    formats = ["txt", "srt", "vtt", "tsv", "json"]
    request = {"job_id": "note", "audio_path": "long.ogg", "formats": formats, "stream": True, "word_timestamps": True}
    bus.publish("cesar/jobs", request)
    assert bus.status("note")["formats"] == formats

    late = join(mosquitto.port)
    late.settle()
    results = {m.topic.rpartition("/")[2]: m.payload.decode() for m in late.messages if "/result/note/" in m.topic}
    assert set(results) == set(formats)
    assert errors_in(results["txt"], TOLD) < 0.02
    assert results["srt"].startswith("1\n00:00:0")
    assert results["vtt"].startswith("WEBVTT\n")
    assert results["tsv"].startswith("start\tend\ttext\n")
    segments = json.loads(results["json"])["segments"]
    heard = [word["word"].strip() for segment in segments for word in segment["words"]]
    assert errors_in(" ".join(heard), TOLD) < 0.02
    streamed = bus.seen("cesar/segments/note")
    assert [segment["text"] for segment in streamed] == [segment["text"] for segment in segments]
    assert not [m for m in late.messages if m.topic == "cesar/segments/note"], "segments are not retained"
    topics = [m.topic for m in bus.messages]
    done = max(n for n, topic in enumerate(topics) if topic == "cesar/status/note")
    assert max(n for n, topic in enumerate(topics) if "/result/note/" in topic) < done

    bus.publish("cesar/request/delete", "note")
    cleared = {"cesar/status/note", *(f"cesar/result/note/{name}" for name in formats)}
    wait_until(lambda: {m.topic for m in bus.messages if not m.payload} >= cleared)
    bus.settle()
    assert {m.topic for m in bus.messages if not m.payload} == cleared


# -- URLs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def web() -> Iterator[int]:
    """A web server that has the recordings."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(DATA))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_a_recording_is_fetched_from_an_allowed_host_and_from_no_other(
    mosquitto: Mosquitto, serve: Serve, join: Join, web: int
) -> None:
    consumer = serve("--broker", mosquitto.url, environ={"CESAR_AUDIO__ALLOWED_HOSTS": f'["127.0.0.1:{web}"]'})
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", {"job_id": "fetched", "audio_url": f" HTTP://127.0.0.1:{web}/speech.wav?token=secret"})
    bus.publish("cesar/jobs", f"Http://localhost:{web}/speech.wav")
    bus.publish("cesar/jobs", {"job_id": "missing", "audio_url": f"http://127.0.0.1:{web}/nothing.wav"})

    fetched = bus.status("fetched")
    assert words(fetched["result_text"]) == SPOKEN
    assert fetched["audio_source"].lower() == f"http://127.0.0.1:{web}/speech.wav"
    assert bus.status("missing")["error_code"] in {"audio_not_found", "download_failed"}
    refused = next(s for s in bus.every_status() if s["job_id"] not in {"fetched", "missing"} and s["error_code"])
    assert refused["error_code"] == "audio_not_allowed"
    assert "audio.allowed_hosts" in refused["error_message"]
    assert "secret" not in consumer.logged()
    assert list((consumer.data_dir / "spool").iterdir()) == []


def test_subtitles_of_speech_without_a_stop_can_be_read(mosquitto: Mosquitto, serve: Serve, join: Join) -> None:
    serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    request = {"job_id": "story", "audio_path": "run_on.opus", "formats": ["srt", "vtt", "json"], "stream": True}
    bus.publish("cesar/jobs", request)
    text = bus.status("story")["result_text"]
    narrow = {"job_id": "narrow", "audio_path": "speech.wav", "formats": ["srt"], "max_line_width": 20}
    bus.publish("cesar/jobs", {**narrow, "max_line_count": 1})
    bus.status("narrow")
    results = {m.topic.removeprefix("cesar/result/"): m.payload.decode() for m in bus.messages if "/result/" in m.topic}

    cues = list(srt.parse(results["story/srt"]))
    assert [caption.text for caption in webvtt.from_string(results["story/vtt"]).captions] == [c.content for c in cues]
    assert words(" ".join(cue.content for cue in cues)) == words(text)
    for cue in cues:
        shown_s = (cue.end - cue.start).total_seconds()
        assert 0.5 <= shown_s <= 7
        assert len(cue.content) / shown_s < 30, "characters a second"
        assert all(0 < len(line) <= 42 for line in cue.content.split("\n"))
        assert cue.content.count("\n") <= 1
    assert all(before.end <= after.start for before, after in pairwise(cues))
    assert cues[-1].end.total_seconds() < 36
    for segment in (*json.loads(results["story/json"])["segments"], *bus.seen("cesar/segments/story")):
        assert "words" not in segment, "they were not asked for"
    for cue in srt.parse(results["narrow/srt"]):
        assert len(cue.content) <= 20
        assert "\n" not in cue.content


# -- silence -------------------------------------------------------------------------------------------------------


def test_nobody_speaks_in_a_minute_of_silence_and_noise(
    mosquitto: Mosquitto, serve: Serve, join: Join, tmp_path: Path
) -> None:
    noise = (np.random.default_rng(1).normal(scale=300, size=60 * 16_000)).astype(np.int16)
    noise[: 20 * 16_000] = 0
    with wave.open(str(tmp_path / "quiet.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(noise.tobytes())
    serve("--broker", mosquitto.url, "--audio-dir", str(tmp_path))
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", {"job_id": "quiet", "audio_path": "quiet.wav", "formats": ["srt", "json"]})
    end = bus.status("quiet")
    assert (end["status"], end["no_speech"], end["result_text"], end["detected_language"]) == (
        "completed",
        True,
        "",
        None,
    )
    assert {m.topic for m in bus.messages if "/result/" in m.topic} == {
        "cesar/result/quiet/srt",
        "cesar/result/quiet/json",
    }
