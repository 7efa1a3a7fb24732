"""The page of a real consumer on mosquitto: its HTTP API, its events, OpenAI's client, its uploads."""

import asyncio
import json
import random
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.acceptance.harness import LONG, PATIENCE_S, SPEECH, SPOKEN, Bus, Consumer, command, wait_until, words
from tests.acceptance.web_page import Page, alone
from tests.conftest import Mosquitto, StartMosquitto, find_free_port
from tests.proxy import Proxy

pytestmark = [pytest.mark.mosquitto, pytest.mark.model]

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]


@pytest.fixture
def page(mosquitto: Mosquitto, serve: Serve) -> Iterator[Page]:
    """The page inside of a consumer."""
    page = Page(find_free_port())
    serve("--broker", mosquitto.url, "--web", f"127.0.0.1:{page.port}")
    page.wait_ready()
    with closing(page):
        yield page


class Events:
    """Reads the events of a page in a thread."""

    def __init__(self, page: Page, last_id: str | None = None) -> None:
        self.last_id = last_id
        self.received: list[tuple[str, dict[str, Any]]] = []
        self._changed = threading.Condition()
        self._page = page
        self._client = httpx2.Client(timeout=httpx2.Timeout(PATIENCE_S))
        self._response: httpx2.Response | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        headers = {} if self.last_id is None else {"Last-Event-ID": self.last_id}
        try:
            with self._client.stream("GET", f"{self._page.url}/api/events", headers=headers) as response:
                kind = ""
                for line in response.iter_lines():
                    name, _, value = line.partition(": ")
                    if name == "event":
                        kind = value
                    elif name == "id":
                        self.last_id = value
                    elif name == "data":
                        with self._changed:
                            self.received.append((kind, json.loads(value)))
                            self._changed.notify_all()
        except httpx2.HTTPError:
            pass  # the server was killed, or the test closes the connection

    def wait(self, kind: str, when: Callable[[dict[str, Any]], bool] = lambda _data: True) -> dict[str, Any]:
        def found() -> list[dict[str, Any]]:
            return [data for each, data in self.received if each == kind and when(data)]

        with self._changed:
            assert self._changed.wait_for(found, PATIENCE_S), self.received
            return found()[0]

    def close(self) -> None:
        self._client.close()
        self._thread.join(PATIENCE_S)


def is_completed(job_id: str, job: Mapping[str, Any]) -> bool:
    return (job["job_id"], job["status"]) == (job_id, "completed")


def test_an_upload_is_transcribed_downloaded_and_its_audio_deleted(
    page: Page, mosquitto: Mosquitto, join: Join, tmp_path: Path
) -> None:
    bus = join(mosquitto.port)
    with closing(Events(page)) as events:
        events.wait("snapshot")
        job_id = page.submit(formats="json", word_timestamps="true")["job_id"]
        done = events.wait("job", partial(is_completed, job_id))
    assert words(done["excerpt"]) == SPOKEN
    assert done["file"] == "speech.wav"
    assert str(tmp_path) not in json.dumps(done)

    (found,) = page.http.get("/api/jobs", params={"q": "plumber lamp"}).json()["jobs"]
    assert found["job_id"] == job_id
    files = {
        name: page.http.get(f"/api/jobs/{job_id}/result.{name}").text for name in ("txt", "srt", "vtt", "tsv", "json")
    }
    assert words(files["txt"]) == SPOKEN
    assert "00:00:00,000 -->" in files["srt"]
    assert files["vtt"].startswith("WEBVTT")
    assert json.loads(files["json"])["segments"][0]["words"][0]["word"].strip() == "Please"

    info = bus.wait("cesar/consumer/cesar/info")
    assert info["web"] == f"{page.url}/"
    (announced,) = bus_discovery(mosquitto, join)
    assert announced["device"]["configuration_url"] == f"{page.url}/"

    assert page.http.delete(f"/api/jobs/{job_id}").json()["status"] == "deleted"
    wait_until(lambda: page.http.get(f"/api/jobs/{job_id}").status_code == 404)
    assert "cesar_web_connected 1" in page.http.get("/metrics").text


def bus_discovery(mosquitto: Mosquitto, join: Join) -> list[dict[str, Any]]:
    bus = join(mosquitto.port, topic_filter="homeassistant/device/+/config")
    return [bus.wait("homeassistant/device/cesar-mqtt_cesar/config")]


def test_the_same_upload_with_the_same_id_is_the_same_job_and_another_one_is_a_conflict(page: Page) -> None:
    page.http.post("/api/consumers/cesar/pause")
    first = page.submit(job_id="note-1", formats="srt")
    again = page.submit(job_id="note-1", formats="srt")
    assert (again["job_id"], again["created_at"]) == ("note-1", first["created_at"])
    with SPEECH.open("rb") as file:
        other = page.http.post("/api/jobs", files={"file": ("speech.wav", file)}, data={"job_id": "note-1"})
    assert (other.status_code, other.json()["code"]) == (409, "job_id_conflict")
    (rejection,) = page.http.get("/api/rejected").json()["rejected"]
    assert (rejection["job_id"], rejection["reason"]) == ("note-1", "job_id_conflict")
    assert page.http.post("/api/jobs/note-1/cancel").json()["status"] == "cancelled"
    assert page.http.post("/api/jobs/note-1/retry").json()["status"] == "queued"


def test_a_killed_consumer_finishes_its_uploads_and_clients_go_on_behind_their_last_event(
    mosquitto: Mosquitto, serve: Serve
) -> None:
    page = Page(find_free_port())
    consumer = serve("--broker", mosquitto.url, "--web", f"127.0.0.1:{page.port}")
    page.wait_ready()
    with closing(page), closing(Events(page)) as events:
        events.wait("snapshot")
        page.http.post("/api/consumers/cesar/pause")
        job_ids = [page.submit(job_id=f"note-{number}")["job_id"] for number in range(3)]
        events.wait("job", lambda job: job["job_id"] == job_ids[-1])
        consumer.kill()
        consumer.start()
        page.wait_ready()
        wait_until(lambda: page.http.get("/api/jobs").json()["total"] == 3)
        with closing(Events(page, events.last_id)) as later:
            snapshot = later.wait("snapshot")  # another process: its events have other ids
            assert {job["job_id"] for job in snapshot["jobs"]} == set(job_ids)
            page.http.post("/api/consumers/cesar/resume")
            for job_id in job_ids:
                done = later.wait("job", partial(is_completed, job_id))
                assert words(done["excerpt"]) == SPOKEN
            last = later.last_id
        page.http.delete(f"/api/jobs/{job_ids[0]}")
        with closing(Events(page, last)) as resumed:
            resumed.wait("job_deleted", lambda data: data["job_id"] == job_ids[0])
            assert all(kind != "snapshot" for kind, _ in resumed.received)
        wait_until(lambda: not list((consumer.data_dir / "uploads").iterdir()))


def test_a_stop_waits_neither_for_browsers_nor_for_openais_clients_and_loses_no_job(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    page = Page(find_free_port())
    consumer = serve("--broker", mosquitto.url, "--web", f"127.0.0.1:{page.port}")
    page.wait_ready()
    failed: list[Exception] = []

    def transcribe() -> None:
        try:
            with SPEECH.open("rb") as file:
                page.openai.audio.transcriptions.create(model="whisper-1", file=file)
        except openai.OpenAIError as exc:
            failed.append(exc)

    with closing(page), closing(Events(page)) as events:
        events.wait("snapshot")
        page.http.post("/api/consumers/cesar/pause")
        waiting = threading.Thread(target=transcribe)
        waiting.start()
        job = events.wait("job", lambda job: job["status"] == "queued")
        assert consumer.stop() == 0
        waiting.join(PATIENCE_S)
        assert len(failed) == 1
    consumer.start()
    command("resume", "--broker", mosquitto.url)
    bus = join(mosquitto.port)
    assert words(bus.status(job["job_id"], "completed")["result_text"]) == SPOKEN


# -- the page in a process of its own ----------------------------------------------------------------------------------


def test_alone_it_sends_uploads_as_messages(mosquitto: Mosquitto, serve: Serve, tmp_path: Path) -> None:
    serve("--broker", mosquitto.url)
    with alone(mosquitto, tmp_path) as page:
        job_id = page.submit(formats="json", language="en")["job_id"]
        wait_until(lambda: page.http.get(f"/api/jobs/{job_id}").json()["status"] == "completed")
        status = page.http.get(f"/api/jobs/{job_id}").json()
    assert words(status["result_text"]) == SPOKEN
    assert (status["audio_source"], status["metadata"]) == ("upload", {"file": "speech.wav"})


def test_alone_it_names_the_brokers_limit(start_mosquitto: StartMosquitto, serve: Serve, tmp_path: Path) -> None:
    broker = start_mosquitto("max_packet_size 400000")
    serve("--broker", broker.url)
    with alone(broker, tmp_path) as page, LONG.open("rb") as file:
        response = page.http.post("/api/jobs", files={"file": file})
    assert response.status_code == 413
    assert "100,000 bytes" in response.json()["detail"]
    assert "serve --web" in response.json()["detail"]


def test_wrong_settings_stop_the_start_with_a_sentence(tmp_path: Path, mosquitto: Mosquitto) -> None:
    for address, problem in (("0.0.0.0:0", "password"), ("nonsense:port", "HOST:PORT")):
        ended = command("web", address, "--broker", mosquitto.url, cwd=tmp_path)
        assert ended.returncode == 78
        assert problem in ended.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = command("web", f"127.0.0.1:{taken.getsockname()[1]}", "--broker", mosquitto.url, cwd=tmp_path)
    assert ended.returncode == 78
    assert "cannot be opened" in ended.stderr


# -- OpenAI's client ---------------------------------------------------------------------------------------------------


def test_openais_client_works_unchanged(page: Page) -> None:
    def transcribe(**options: Any) -> Any:
        with SPEECH.open("rb") as file:
            return page.openai.audio.transcriptions.create(**{"model": "whisper-1", "file": file, **options})

    assert words(transcribe().text) == SPOKEN
    assert words(transcribe(response_format="text")) == SPOKEN
    assert "00:00:00,000 -->" in transcribe(response_format="srt")
    assert transcribe(response_format="vtt").startswith("WEBVTT")
    verbose = transcribe(response_format="verbose_json", timestamp_granularities=["word", "segment"], prompt="Lamps.")
    assert (verbose.language, verbose.segments[0].start, verbose.words[0].word) == ("english", 0.0, "Please")
    assert 3.5 < verbose.duration < 4.5
    events = list(transcribe(stream=True))
    assert events[0].type == "transcript.text.delta"
    assert events[-1].type == "transcript.text.done"
    assert words("".join(event.delta for event in events[:-1])) == words(events[-1].text) == SPOKEN
    assert words(transcribe(model="Systran/faster-whisper-tiny.en", language="en", temperature=0).text) == SPOKEN
    assert "tiny.en" in [model.id for model in page.openai.models.list()]

    with pytest.raises(openai.BadRequestError) as unreadable:
        transcribe(file=("x.wav", b"no audio"))
    assert unreadable.value.code == "audio_unreadable"
    with (
        pytest.raises(openai.BadRequestError, match="English-only"),
        pytest.warns(DeprecationWarning, match="deprecated"),
        SPEECH.open("rb") as file,
    ):
        page.openai.audio.translations.create(model="whisper-1", file=file)


def test_openais_clients_take_a_recording_in_every_form(page: Page) -> None:
    content = SPEECH.read_bytes()
    unnamed, named = BytesIO(content), BytesIO(content)
    named.name = "named.wav"
    create = page.openai.audio.transcriptions.create
    for file in (SPEECH, content, unnamed, named, ("tuple.wav", content), ("typed.wav", BytesIO(content), "audio/wav")):
        assert words(create(model="whisper-1", file=file).text) == SPOKEN
    listed = page.http.get("/api/jobs").json()["jobs"]
    assert {"speech.wav", "upload", "named.wav", "tuple.wav", "typed.wav"} == {job["file"] for job in listed}

    streaming = page.openai.audio.transcriptions.with_streaming_response
    with streaming.create(model="whisper-1", file=SPEECH, response_format="text") as response:
        assert words("".join(response.iter_text())) == SPOKEN

    async def use_the_asynchronous_client() -> None:
        async with openai.AsyncOpenAI(base_url=f"{page.url}/v1", api_key="none", timeout=PATIENCE_S) as client:
            assert words((await client.audio.transcriptions.create(model="whisper-1", file=SPEECH)).text) == SPOKEN
            stream = await client.audio.transcriptions.create(model="whisper-1", file=SPEECH, stream=True)
            last = [event async for event in stream][-1]
            assert last.type == "transcript.text.done"
            assert words(last.text) == SPOKEN
            streaming = client.audio.transcriptions.with_streaming_response
            async with streaming.create(model="whisper-1", file=SPEECH, response_format="srt") as response:
                assert "00:00:00,000 -->" in "".join([text async for text in response.iter_text()])

    asyncio.run(use_the_asynchronous_client())


def test_a_retry_of_openais_client_waits_for_the_same_job(page: Page) -> None:
    requests = []

    def limit_the_first(request: httpx2.Request) -> None:
        requests.append(request)
        if len(requests) == 1:
            request.extensions["timeout"] = {**request.extensions["timeout"], "read": 0.5}
        else:
            page.http.post("/api/consumers/cesar/resume")

    page.http.post("/api/consumers/cesar/pause")
    with openai.OpenAI(
        base_url=f"{page.url}/v1",
        api_key="none",
        timeout=PATIENCE_S,
        http_client=openai.DefaultHttpxClient(event_hooks={"request": [limit_the_first]}),
    ) as client:
        kept = {"metadata": {"keep": True}}
        answer = client.audio.transcriptions.create(model="whisper-1", file=SPEECH, extra_body=kept)
    assert words(answer.text) == SPOKEN
    assert len(requests) == 2
    (job,) = page.http.get("/api/jobs").json()["jobs"]
    assert (job["status"], job["attempt"]) == ("completed", 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_client_that_disconnects_cancels_its_job_unless_it_is_kept(page: Page, *, stream: bool, keep: bool) -> None:
    page.http.post("/api/consumers/cesar/pause")
    line = Proxy(page.port, random.Random(), cuts=0)  # noqa: S311 - nothing of it is left to chance
    client = page.openai.with_options(base_url=f"{line.url.replace('mqtt', 'http')}/v1")

    def transcribe() -> None:
        with SPEECH.open("rb") as file, pytest.raises((openai.APIConnectionError, httpx2.TransportError)):  # noqa: PT012
            answer = client.audio.transcriptions.create(
                model="whisper-1", file=file, stream=stream, extra_body={"metadata": {"keep": True}} if keep else {}
            )
            list(answer)

    with ThreadPoolExecutor() as threads:
        transcribed = threads.submit(transcribe)
        wait_until(lambda: bool(page.http.get("/api/jobs").json()["jobs"]))
        line.close()
        transcribed.result(PATIENCE_S)
    page.http.post("/api/consumers/cesar/resume")
    (job,) = page.http.get("/api/jobs").json()["jobs"]
    state = "completed" if keep else "cancelled"
    wait_until(lambda: page.http.get(f"/api/jobs/{job['job_id']}").json()["status"] == state)


# -- a password --------------------------------------------------------------------------------------------------------


def test_a_password_is_asked_of_browsers_and_programs(mosquitto: Mosquitto, serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("sesame\n")
    file.chmod(0o600)
    page = Page(find_free_port())
    serve("--broker", mosquitto.url, "--web", f"0.0.0.0:{page.port}", environ={"CESAR_WEB__PASSWORD_FILE": str(file)})
    page.wait_ready()
    with closing(page):
        assert page.http.get("/api/jobs").status_code == 401
        with pytest.raises(openai.AuthenticationError):
            page.openai.models.list()
        assert page.openai.with_options(api_key="sesame").models.list().data
        assert page.http.post("/login", json={"password": "sesame"}).status_code == 204
        assert page.http.get("/api/jobs").status_code == 200
        info = page.http.get("/api/consumers").text
        assert "sesame" not in info
