"""Uploads in the consumer's own folder."""

from pathlib import Path

import pytest

from cesar_mqtt.gateway.web.forms import UploadedFile
from cesar_mqtt.gateway.web.upload_store import UploadStore

NOW = 1_769_204_700.0
DAY_S = 24 * 3600.0


@pytest.fixture
def needed() -> dict[str, bool]:
    """Whether each job needs its audio; a job that is not here does not exist."""
    return {}


@pytest.fixture
def clock() -> list[float]:
    return [NOW]


@pytest.fixture
def store(tmp_path: Path, needed: dict[str, bool], clock: list[float]) -> UploadStore:
    return UploadStore(tmp_path / "uploads", is_needed=needed.get, clock=lambda: clock[0])


def received(store: UploadStore, content: bytes = b"audio", digest: str = "ab" * 32) -> UploadedFile:
    path = store.folder / "x.part"
    path.write_bytes(content)
    return UploadedFile(path, "note.wav", len(content), digest)


def age(store: UploadStore, clock: list[float]) -> None:
    """Let the files be more than a day old."""
    clock[0] = max(path.stat().st_mtime for path in store.folder.iterdir()) + DAY_S + 1


def test_the_same_upload_for_the_same_job_has_the_same_path_and_others_have_another(store: UploadStore) -> None:
    paths = [
        store.keep(received(store, digest=digest), job_id)
        for digest, job_id in (("a" * 64, "one"), ("a" * 64, "one"), ("b" * 64, "one"), ("a" * 64, "two"))
    ]
    assert paths[0] == paths[1]
    assert len(set(paths)) == 3
    assert "/" not in paths[0]
    assert (store.folder / paths[0]).read_bytes() == b"audio"
    assert store.folder.stat().st_mode & 0o077 == 0


def test_an_upload_is_deleted_when_its_job_needs_it_no_more(store: UploadStore, needed: dict[str, bool]) -> None:
    paths = {job_id: store.keep(received(store), job_id) for job_id in ("running", "done")}
    needed.update(running=True, done=False)
    assert store.sweep() == 1
    assert [path.name for path in store.folder.iterdir()] == [paths["running"]]


def test_a_symbolic_link_in_the_folder_is_never_followed(
    store: UploadStore, needed: dict[str, bool], tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    name = store.keep(received(store), "a")
    (store.folder / name).unlink()
    (store.folder / name).symlink_to(outside)
    (store.folder / "upload-link.b").symlink_to(outside)
    (store.folder / "upload-dangling.b").symlink_to(tmp_path / "absent")
    assert store.keep(received(store), "a") == name
    assert not (store.folder / name).is_symlink()
    needed.update(a=True, b=False)
    again = UploadStore(store.folder, is_needed=needed.get)
    assert again.sweep() == 2
    assert [path.name for path in store.folder.iterdir()] == [name]
    assert outside.read_bytes() == b"secret"


def test_an_upload_whose_request_has_not_arrived_yet_is_kept_for_a_day(store: UploadStore, clock: list[float]) -> None:
    store.keep(received(store), "waiting")
    clock[0] = (store.folder / next(store.folder.iterdir())).stat().st_mtime
    assert store.sweep() == 0
    age(store, clock)
    assert store.sweep() == 1


@pytest.mark.parametrize("seen", ["submitted", "swept"])
def test_an_upload_whose_job_was_deleted_is_deleted(store: UploadStore, needed: dict[str, bool], seen: str) -> None:
    store.keep(received(store), "a")
    if seen == "submitted":
        store.set_accepted("a")
    else:
        needed["a"] = True
        assert store.sweep() == 0
        del needed["a"]
    assert store.sweep() == 1


def test_what_a_crash_left_half_is_deleted_later_and_files_of_others_never(
    store: UploadStore, needed: dict[str, bool], clock: list[float]
) -> None:
    received(store)
    (store.folder / "README").write_text("mine")
    needed["README"] = False
    assert store.sweep() == 0 or (store.folder / "x.part").exists() is False
    age(store, clock)
    store.sweep()
    assert [path.name for path in store.folder.iterdir()] == ["README"]
    received(store)
    assert UploadStore(store.folder, is_needed=needed.get).used_bytes == 0
    assert [path.name for path in store.folder.iterdir()] == ["README"]
