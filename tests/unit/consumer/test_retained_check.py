"""When the retained queue message shows that the broker has lost messages."""

import json

import pytest

from cesar_mqtt.consumer.retained_check import Loss, RetainedCheck, UnprovenJobs

STANDING = (1, 2, 0, 0, 0)


def queue(*, completed: int = 2) -> bytes:
    return json.dumps({"queued": 1, "completed_total": completed, "error_total": 0, "cancelled_total": 0}).encode()


def test_the_last_message_of_the_process_before_is_no_loss() -> None:
    check = RetainedCheck(STANDING)
    assert not check.on_connected((), session_present=True)
    assert check.compare(queue(), (b"ours",)) is None


@pytest.mark.parametrize("payload", [queue(completed=1), b"{}", b"no JSON"])
def test_any_other_message_is_an_older_state(payload: bytes) -> None:
    check = RetainedCheck(STANDING)
    check.on_connected((), session_present=True)
    assert check.compare(payload, ()) is Loss.NEWEST


def test_at_a_later_connection_it_has_to_be_a_message_of_this_process() -> None:
    check = RetainedCheck(STANDING)
    check.on_connected((), session_present=True)
    check.compare(queue(), ())
    for shown, loss in ((b"first", None), (b"second", None), (queue(), Loss.NEWEST)):
        assert not check.on_connected((b"first",), session_present=True)
        assert check.compare(shown, (b"second",)) is loss


def test_no_retained_message_is_a_loss_at_first() -> None:
    check = RetainedCheck(STANDING)
    check.on_connected((), session_present=True)
    assert check.compare(None, (b"ours",)) is Loss.ALL
    assert check.compare(None, (b"ours",)) is None, "our own messages are delivered to us, too"
    check.on_connected((b"ours",), session_present=True)
    assert check.compare(None, (b"ours",)) is None, "this broker may never send it"


def test_in_a_new_session_there_is_nothing_to_compare() -> None:
    check = RetainedCheck(STANDING)
    assert not check.on_connected((), session_present=False)
    assert check.compare(None, (b"ours",)) is None


def test_a_broker_that_has_sent_it_before_and_does_not_now_has_lost_it() -> None:
    check = RetainedCheck(STANDING)
    check.on_connected((), session_present=True)
    check.compare(queue(), ())
    check.on_connected((b"ours",), session_present=True)
    assert check.compare(None, (b"ours",)) is Loss.ALL


def test_a_message_published_before_the_comparison_hides_the_older_one() -> None:
    check = RetainedCheck(STANDING)
    check.on_connected((), session_present=True)
    assert check.on_connected((b"published",), session_present=True)
    assert not check.on_connected((b"more",), session_present=True), "only once if the broker may never send it"
    check.compare(b"more", ())
    check.on_connected((b"more",), session_present=True)
    assert not check.on_connected((b"more",), session_present=True), "nothing was published meanwhile"
    assert check.on_connected((b"last",), session_present=True)


def test_what_is_acknowledged_behind_the_newest_queue_message_is_unproven() -> None:
    """A broker was killed between two queue messages, right after it had saved: two statuses stayed what they were."""
    jobs = UnprovenJobs()

    def doubtful() -> tuple[int, ...]:
        jobs.on_connected()
        return jobs.take_doubtful()

    jobs.add(1)
    jobs.on_queue_published(4)
    jobs.add(2)
    assert doubtful() == (1, 2)
    assert jobs.take_doubtful() == ()
    jobs.on_queue_published(5)
    jobs.add(3)
    jobs.on_queue_acknowledged(4)
    assert doubtful() == (2, 3)
    jobs.add(2)
    jobs.on_queue_acknowledged(5)
    assert doubtful() == (2, 3)
    jobs.on_queue_published(6)
    jobs.on_queue_acknowledged(6)
    assert not doubtful()
