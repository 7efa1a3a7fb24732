"""Jobs whose text is on disk while their speakers are told apart."""

from dataclasses import replace
from pathlib import Path

import pytest

from cesar_mqtt.jobs import IllegalTransitionError, Job, JobState, Result
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.transcript import Window
from tests import factories

WINDOWS = (
    factories.window(0, factories.segment(1, words=factories.words(2))),
    factories.window(1, factories.segment(2, words=None)),
)
LABELLED = tuple(
    replace(window, segments=tuple(replace(each, speaker="Speaker 1") for each in window.segments))
    for window in WINDOWS
)


def add(ledger: Ledger, **fields: object) -> int:
    ledger.append([factories.new_job("a", "0001", kind="spool", options={"diarize": True}, **fields)])
    job = ledger.claim()
    assert job is not None
    return job.seq


def result(windows: tuple[Window, ...] = WINDOWS, **fields: object) -> Result:
    return factories.result("Hello. Hello.", windows=windows, warnings=("audio_quiet",), **fields)


def job(ledger: Ledger) -> Job:
    found = ledger.get("a")
    assert found is not None
    return found


def test_speakers_replace_the_windows_without_them(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.json") as ledger:
        seq = add(ledger)
        ledger.add_window(seq, WINDOWS[0], identity="1")
        transcribed = ledger.record_text(seq, result(), identity="1")
        assert (transcribed.state, transcribed.result_text) == (JobState.PROCESSING, "Hello. Hello.")
        assert ledger.windows(seq) == WINDOWS
        ledger.complete(seq, result(LABELLED, speakers=1))
    with Ledger(tmp_path / "ledger.json") as ledger:
        assert ledger.windows(seq) == LABELLED
        done = job(ledger)
        assert (done.state, done.speakers, done.diarization_error) == (JobState.COMPLETED, 1, None)
        assert done.warnings == ("audio_quiet",)
        with pytest.raises(IllegalTransitionError, match="is completed"):
            ledger.retry("a")


def test_the_text_outlives_a_crash_and_is_labelled_by_a_retry(tmp_path: Path) -> None:
    crashed = Ledger(tmp_path / "ledger.json")
    seq = add(crashed)
    crashed.record_text(seq, result(), identity="1")
    crashed._release_files()
    for attempt in (1, 2):
        ledger = Ledger(tmp_path / "ledger.json")
        done = job(ledger)
        assert (done.state, done.result_text, done.attempt) == (JobState.COMPLETED, "Hello. Hello.", attempt)
        assert done.diarization_error is not None
        assert done.diarization_error.startswith("The process died while it told the speakers apart")
        assert done.may_need_audio
        assert ledger.needed_spool_files() == {"0001"}
        assert ledger.windows(seq) == WINDOWS
        queued = ledger.retry("a")
        assert queued is not None
        assert (queued.state, queued.result_text, queued.diarization_error) == (JobState.QUEUED, "Hello. Hello.", None)
        again = ledger.claim()
        assert again is not None
        assert (again.result_text, again.no_speech, again.warnings) == ("Hello. Hello.", False, ("audio_quiet",))
        ledger._release_files()
    with Ledger(tmp_path / "ledger.json") as ledger:
        assert job(ledger).state is JobState.COMPLETED
        ledger.retry("a")
        ledger.claim()
        ledger.complete(seq, result(LABELLED, speakers=1))
        assert (job(ledger).speakers, job(ledger).diarization_error) == (1, None)
        assert ledger.needed_spool_files() == set()


def test_a_failure_completes_the_job_with_its_reason(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.json") as ledger:
        seq = add(ledger)
        ledger.record_text(seq, result())
        ledger.complete_without_speakers(seq, "A model is missing.")
        done = job(ledger)
        assert (done.state, done.speakers, done.diarization_error) == (JobState.COMPLETED, None, "A model is missing.")
        assert ledger.windows(seq) == WINDOWS
        with pytest.raises(IllegalTransitionError):
            ledger.complete_without_speakers(seq, "Again.")


@pytest.mark.parametrize("claimed", [False, True])
def test_to_cancel_a_retry_leaves_the_job_completed(tmp_path: Path, claimed: bool) -> None:  # noqa: FBT001
    with Ledger(tmp_path / "ledger.json") as ledger:
        seq = add(ledger)
        ledger.record_text(seq, result())
        ledger.complete_without_speakers(seq, "A model is missing.")
        ledger.retry("a")
        if claimed:
            ledger.claim()
            ledger.cancel("a")
            assert ledger.is_cancelling(seq)
            ledger.finish_cancelling(seq)
        else:
            ledger.cancel("a")
        done = job(ledger)
        assert (done.state, done.result_text) == (JobState.COMPLETED, "Hello. Hello.")
        assert done.diarization_error is not None
        assert "was cancelled" in done.diarization_error
        ledger.retry("a")
        assert [each.state for each in ledger.cancel_queued(10)] == [JobState.COMPLETED]
        assert ledger.cancel_queued(10) == []


def test_to_cancel_the_first_diarization_cancels_the_job_and_a_retry_goes_on_with_it(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.json") as ledger:
        seq = add(ledger)
        ledger.record_text(seq, result())
        ledger.cancel("a")
        ledger.finish_cancelling(seq)
        assert (job(ledger).state, job(ledger).result_text) == (JobState.CANCELLED, "Hello. Hello.")
        ledger.retry("a")
        claimed = ledger.claim()
        assert claimed is not None
        assert claimed.result_text == "Hello. Hello."
        assert ledger.windows(seq) == WINDOWS


def test_a_forced_stop_requeues_the_diarization_alone(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.json") as ledger:
        seq = add(ledger)
        ledger.record_text(seq, result())
        assert ledger.requeue(seq).state is JobState.QUEUED
    with Ledger(tmp_path / "ledger.json") as ledger:
        claimed = ledger.claim()
        assert claimed is not None
        assert claimed.result_text == "Hello. Hello."


def test_windows_know_of_which_audio_they_are(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.json") as ledger:
        seq = add(ledger)
        ledger.record_text(seq, result(), identity="1")
        assert ledger.is_of_audio(seq, "1")
        assert not ledger.is_of_audio(seq, "2")


def test_only_a_running_job_has_its_text_recorded(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.json") as ledger:
        seq = add(ledger)
        ledger.requeue(seq)
        with pytest.raises(IllegalTransitionError):
            ledger.record_text(seq, result())
