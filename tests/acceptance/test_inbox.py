"""The watch folder and the transcript files, as processes at a real broker."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.acceptance.harness import SPEECH, SPOKEN, Bus, Consumer, FrontDoor, command, words
from tests.acceptance.inbox_trial import run
from tests.conftest import Mosquitto, StartMosquitto

pytestmark = pytest.mark.mosquitto

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]
QUICK = {"CESAR_INBOX__SETTLE": "0.3", "CESAR_INBOX__RESCAN": "2"}


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., FrontDoor]]:
    started: list[FrontDoor] = []

    def start(*arguments: str, name: str = "inbox-process") -> FrontDoor:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        started.append(
            FrontDoor(folder, "inbox", *arguments, "--data-dir", str(folder / "data"), ready="Watching ", environ=QUICK)
        )
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.kill()


@pytest.mark.model
def test_each_recording_has_one_transcript_although_files_are_disturbed_and_the_consumer_is_killed(
    tmp_path: Path, start_mosquitto: StartMosquitto
) -> None:
    report = run(tmp_path, start_mosquitto(persistence=True), recordings=14, disturbed=7, kills=1, seed=20260123)
    assert (report.missing, report.doubled, report.transcripts) == ((), (), 14)


@pytest.mark.model
def test_inbox_sends_a_recording_writes_what_was_asked_for_and_moves_it(
    tmp_path: Path, mosquitto: Mosquitto, serve: Serve, watch: Callable[..., FrontDoor], join: Join
) -> None:
    serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    new, texts, done = tmp_path / "new", tmp_path / "texts", tmp_path / "done"
    (new / "sub").mkdir(parents=True)
    inbox = watch(
        *(str(new), "--broker", mosquitto.url, "--output-dir", str(texts), "--move-to", str(done)),
        *("--format", "txt", "--format", "srt", "--language", "en", "--priority", "3"),
    )
    (new / "sub" / "a talk.wav").write_bytes(SPEECH.read_bytes())

    inbox.wait_for_log("Wrote ")
    assert words((texts / "sub" / "a talk.txt").read_text()) == SPOKEN
    assert "-->" in (texts / "sub" / "a talk.srt").read_text()
    assert (done / "sub" / "a talk.wav").read_bytes() == SPEECH.read_bytes()
    assert not (new / "sub" / "a talk.wav").exists()
    ended = bus.wait("cesar/events", lambda event: event["event_type"] == "completed")
    status = bus.status(ended["job_id"])
    assert status["job_id"].startswith("a-talk-")
    assert status["metadata"] == {"file": "sub/a talk.wav", "source": "inbox"}
    assert (status["priority"], status["language"], status["audio_source"]) == (3, "en", "upload")

    # The same file once more, under another name and behind a restart, is a recording of its own.
    assert inbox.stop() == 0
    inbox.start()
    (new / "again.wav").write_bytes(SPEECH.read_bytes())
    inbox.wait_for_log("again.txt")
    assert (done / "again.wav").exists()


@pytest.mark.model
def test_two_inboxes_with_other_options_have_a_job_each_for_one_recording(
    tmp_path: Path, mosquitto: Mosquitto, serve: Serve, watch: Callable[..., FrontDoor], join: Join
) -> None:
    serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    new = tmp_path / "new"
    new.mkdir()
    inboxes = [
        watch(
            *(str(new), "--broker", mosquitto.url, "--output-dir", str(tmp_path / output_format)),
            *("--format", output_format),
            name=f"inbox-{output_format}",
        )
        for output_format in ("txt", "srt")
    ]
    (new / "talk.wav").write_bytes(SPEECH.read_bytes())
    for inbox in inboxes:
        inbox.wait_for_log("Wrote ")
    assert words((tmp_path / "txt" / "talk.txt").read_text()) == SPOKEN
    assert "-->" in (tmp_path / "srt" / "talk.srt").read_text()
    assert len({status["job_id"] for status in bus.every_status()}) == 2


def test_what_cannot_be_transcribed_has_a_file_that_says_why_and_a_retry_replaces_it(
    tmp_path: Path, mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    new = tmp_path / "new"
    new.mkdir()
    consumer = serve("--broker", mosquitto.url, "--inbox", str(new), environ=QUICK)
    bus = join(mosquitto.port)
    (new / "broken.wav").write_bytes(b"no audio at all")

    consumer.wait_for_log("broken.wav: audio_unreadable")
    said = (new / "broken.error.txt").read_text()
    job_id = bus.wait("cesar/events", lambda event: event["event_type"] == "error")["job_id"]
    assert said.startswith("broken.wav was not transcribed (audio_unreadable).\n")
    assert f"cesar-mqtt retry {job_id}" in said

    consumer.stop()
    consumer.start()
    (new / "broken.wav").write_bytes(SPEECH.read_bytes())  # repaired
    consumer.wait_for_log("Wrote ")
    assert words((new / "broken.txt").read_text()) == SPOKEN
    assert not (new / "broken.error.txt").exists()


@pytest.mark.model
def test_serve_writes_each_finished_transcript_once_also_behind_a_restart(
    tmp_path: Path, mosquitto: Mosquitto, serve: Serve
) -> None:
    texts, new = tmp_path / "texts", tmp_path / "new"
    new.mkdir()
    before = serve("--broker", mosquitto.url)
    flags = ("--broker", mosquitto.url)
    assert command("submit", "--job-id", "before", str(SPEECH), *flags).returncode == 0
    assert before.stop() == 0

    consumer = serve(*flags, "--output-dir", str(texts), "--inbox", str(new), environ=QUICK)
    assert command("submit", str(SPEECH), *flags, "--format", "srt").returncode == 0
    assert command("submit", "--by-path", "speech.wav", *flags).returncode == 0
    (new / "put.wav").write_bytes(SPEECH.read_bytes())
    consumer.wait_for_log("put.txt")
    consumer.wait_for_log("speech.srt")

    def names() -> list[str]:
        return sorted(path.name for path in texts.iterdir())

    first = names()
    assert words((texts / "speech.txt").read_text()) == SPOKEN
    assert not any("before" in name for name in first)
    assert consumer.stop() == 0
    consumer.start()
    (tmp_path / "last.wav").write_bytes(SPEECH.read_bytes())
    assert command("submit", "--job-id", "last", str(tmp_path / "last.wav"), *flags).returncode == 0
    consumer.wait_for_log("last.txt")
    assert names() == sorted([*first, "last.txt"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inbox", "absent"), "inbox.directories names "),
        (("inbox",), "Missing argument"),
        (("inbox", ".", "--format", "doc"), "'doc' is none of txt"),
    ],
)
def test_a_wrong_use_is_a_sentence(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    ended = command(*arguments, "--data-dir", str(tmp_path / "data"), cwd=tmp_path)
    assert ended.returncode in (2, 78)
    assert said in ended.stderr
