import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faster_whisper import utils as faster_whisper_utils
from huggingface_hub import constants

from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError
from cesar_mqtt.threads import never_stop
from cesar_mqtt.whisper import hub
from tests.conftest import PATIENCE_S
from tests.unit.whisper.fake_hub import COMMIT, MODEL, SMALL, FakeHub, point_to, running_hub

REPOSITORY = "models--Systran--faster-whisper-base"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def fake_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 3.0)  # the longest that an abandoned thread reads
    with running_hub() as fake:
        point_to(fake.endpoint, cache, monkeypatch)
        yield fake


def download(*, should_stop: Callable[[], bool] = never_stop, stall_s: float = 20.0) -> Path:
    return hub.download("base", should_stop=should_stop, on_progress=lambda *_: None, stall_s=stall_s)


def refusal(*, stall_s: float = 20.0) -> str:
    with pytest.raises(JobFailedError) as caught:
        download(stall_s=stall_s)
    assert caught.value.code is ErrorCode.MODEL_UNAVAILABLE
    assert "'base'" in caught.value.message
    return caught.value.message


def unfinished(cache: Path) -> list[Path]:
    return list(cache.glob(f"{REPOSITORY}/blobs/*.incomplete"))


def join_abandoned() -> None:
    """Wait for the threads of abandoned downloads; until then they may send requests of their own."""
    for thread in threading.enumerate():
        if thread.name == "hub-download":
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


def test_the_repositories_are_those_of_faster_whisper() -> None:
    assert faster_whisper_utils._MODELS == hub.REPOSITORIES
    assert hub.REVISIONS.keys() == set(hub.REPOSITORIES.values())
    assert len({*hub.REVISIONS.values()}) == len(hub.REVISIONS)


def test_a_model_is_downloaded_into_the_cache_and_then_found_there(
    fake_hub: FakeHub, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert hub.cached("base") is None
    reported: list[tuple[int, int]] = []
    with caplog.at_level(logging.INFO, "cesar_mqtt"):
        path = hub.download("base", should_stop=never_stop, on_progress=lambda *progress: reported.append(progress))

    assert path == cache / REPOSITORY / "snapshots" / COMMIT
    assert {file.name: file.read_bytes() for file in path.iterdir()} == SMALL | {"model.bin": MODEL}
    total = len(MODEL) + sum(map(len, SMALL.values()))
    assert reported[-1] == (total, total)
    assert "Fetching model base from the hub" in caplog.text
    assert not unfinished(cache)

    fake_hub.requests.clear()
    assert hub.cached("base") == path
    assert fake_hub.requests == []


def test_a_broken_connection_is_resumed_where_it_was(fake_hub: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    fake_hub.cuts = [1 << 20, 1 << 19]
    path = download()
    assert (path / "model.bin").read_bytes() == MODEL
    assert fake_hub.bodies("model.bin") == ["", f"bytes={1 << 20}-", f"bytes={(1 << 20) + (1 << 19)}-"]
    own_lines = [record for record in caplog.records if record.name.startswith("huggingface_hub")]
    assert own_lines == [], "the client's warnings quote URLs, which may be signed"


def test_what_an_interrupted_download_had_completed_is_not_fetched_again(fake_hub: FakeHub, cache: Path) -> None:
    fake_hub.stall_after = 1 << 20
    with pytest.raises(Cancelled):  # model.bin is the last file, so the others are complete when it stalls
        download(should_stop=fake_hub.stalled.is_set)
    assert hub.cached("base") is None
    assert not unfinished(cache), "half a model would lie there for good"
    join_abandoned()

    fake_hub.requests.clear()
    fake_hub.stall_after = None
    assert (download() / "model.bin").read_bytes() == MODEL
    assert [len(fake_hub.bodies(name)) for name in ("model.bin", *SMALL)] == [1, 0, 0, 0]


def test_a_download_that_stalls_is_given_up(
    fake_hub: FakeHub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 8.0)  # it is not resumed in the meantime
    fake_hub.stall_after = 1 << 20
    assert "nothing more came" in refusal(stall_s=1.0)
    assert fake_hub.left.wait(PATIENCE_S)
    assert "nothing more came" in caplog.text


def test_a_cancelled_download_is_abandoned_and_its_thread_ends(fake_hub: FakeHub, cache: Path) -> None:
    fake_hub.stall_after = 1 << 20
    with pytest.raises(Cancelled):
        download(should_stop=fake_hub.stalled.is_set)
    assert not unfinished(cache)
    join_abandoned()
    assert fake_hub.left.is_set()
    assert not unfinished(cache)
    assert hub.cached("base") is None


def test_a_slow_line_is_no_stall(fake_hub: FakeHub) -> None:
    """The hub's client kept ten megabytes back before it wrote them, and so seemed to have had nothing."""
    fake_hub.stall_after = 1 << 20
    reported: list[int] = []
    with pytest.raises(Cancelled):
        hub.download(
            "base",
            should_stop=lambda: bool(reported) and reported[-1] >= 1 << 20,
            on_progress=lambda done_bytes, _: reported.append(done_bytes),
        )


def test_an_abandoned_download_does_not_hold_up_the_end_of_the_process(fake_hub: FakeHub, cache: Path) -> None:
    fake_hub.stall_after = 1 << 20
    script = (
        "import sys; from cesar_mqtt.whisper import hub\n"
        "hub.download('base', should_stop=lambda: False, on_progress=lambda *_: None, stall_s=1.5)"
    )
    environ = {**os.environ, "HF_HUB_DOWNLOAD_TIMEOUT": "600"}  # longer than a test may take
    process = subprocess.Popen([sys.executable, "-c", script], env=environ, stderr=subprocess.PIPE, text=True)
    assert fake_hub.stalled.wait(PATIENCE_S)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert "nothing more came" in stderr
    assert not unfinished(cache)


def test_what_a_killed_download_has_left_is_removed_by_the_next(fake_hub: FakeHub, cache: Path) -> None:
    blobs = cache / REPOSITORY / "blobs"
    blobs.mkdir(parents=True)
    old, young = blobs / "model.bin.11111111.incomplete", blobs / "model.bin.22222222.incomplete"
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 3600,) * 2)
    download()
    assert unfinished(cache) == [young], "another process may be writing it"
    assert fake_hub.requests


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_told_apart_from_an_unreachable_hub(status: int, fake_hub: FakeHub) -> None:
    fake_hub.status = status
    message = refusal()
    assert "refuses" in message
    assert "HF_TOKEN" in message


def test_a_server_error_of_the_hub_is_reported_as_a_failure(fake_hub: FakeHub) -> None:
    fake_hub.status = 500
    assert "could not be fetched" in refusal()


def test_a_hub_that_refuses_connections_is_given_up_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{unused.getsockname()[1]}", cache, monkeypatch)
        assert "does not answer" in refusal()


def test_a_hub_that_never_answers_is_given_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(f"http://127.0.0.1:{silent.getsockname()[1]}", cache, monkeypatch)
        assert "hub" in refusal(stall_s=1.5)


def test_a_model_that_the_disk_has_no_room_for_is_not_begun(fake_hub: FakeHub, cache: Path) -> None:
    fake_hub.sizes["model.bin"] = 1 << 60
    assert "room" in refusal()
    assert fake_hub.bodies("model.bin") == []
    assert hub.cached("base") is None
    assert not unfinished(cache)


def test_the_hubs_own_offline_mode_is_heeded(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal()
    assert fake_hub.requests == []


def test_two_fetches_at_once_both_have_the_model(fake_hub: FakeHub) -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(download())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 2
    assert paths[0] == paths[1]
    assert (paths[0] / "model.bin").read_bytes() == MODEL
    assert len(fake_hub.bodies("model.bin")) <= 2
