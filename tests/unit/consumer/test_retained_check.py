"""What the broker shows of our own queue: when that is a sign of a loss."""

import json

import pytest

from cesar_mqtt.consumer.retained_check import Loss, RetainedCheck

STANDING = (1, 2, 0, 0, 0)


def queue(*, completed: int = 2) -> bytes:
    return json.dumps({"queued": 1, "completed_total": completed, "error_total": 0, "cancelled_total": 0}).encode()


def test_what_the_process_before_has_said_last_is_no_loss() -> None:
    witness = RetainedCheck(STANDING)
    assert not witness.connected((), session_present=True)
    assert witness.look(queue(), (b"ours",)) is None


@pytest.mark.parametrize("payload", [queue(completed=1), b"{}", b"no JSON"])
def test_anything_else_is_older(payload: bytes) -> None:
    witness = RetainedCheck(STANDING)
    witness.connected((), session_present=True)
    assert witness.look(payload, ()) is Loss.NEWEST


def test_at_a_later_connection_it_has_to_be_what_this_process_has_said() -> None:
    witness = RetainedCheck(STANDING)
    witness.connected((), session_present=True)
    witness.look(queue(), ())
    for shown, loss in ((b"first", None), (b"second", None), (queue(), Loss.NEWEST)):
        assert not witness.connected((b"first",), session_present=True)
        assert witness.look(shown, (b"second",)) is loss


def test_nothing_retained_is_a_loss_where_nobody_knows_of_it_yet() -> None:
    witness = RetainedCheck(STANDING)
    witness.connected((), session_present=True)
    assert witness.look(None, (b"ours",)) is Loss.ALL
    assert witness.look(None, (b"ours",)) is None, "our own messages come back all the time"
    witness.connected((b"ours",), session_present=True)
    assert witness.look(None, (b"ours",)) is None, "this broker may never show anything"


def test_in_a_new_session_everything_is_said_again_anyway() -> None:
    witness = RetainedCheck(STANDING)
    assert not witness.connected((), session_present=False)
    assert witness.look(None, (b"ours",)) is None


def test_a_broker_that_has_shown_it_before_and_does_not_now_has_lost_it() -> None:
    witness = RetainedCheck(STANDING)
    witness.connected((), session_present=True)
    witness.look(queue(), ())
    witness.connected((b"ours",), session_present=True)
    assert witness.look(None, (b"ours",)) is Loss.ALL


def test_what_was_said_before_the_look_hides_what_was_there() -> None:
    witness = RetainedCheck(STANDING)
    witness.connected((), session_present=True)
    assert witness.connected((b"said",), session_present=True)
    assert not witness.connected((b"more",), session_present=True), "of a broker that may never show it, only once"
    witness.look(b"more", ())
    witness.connected((b"more",), session_present=True)
    assert not witness.connected((b"more",), session_present=True), "nothing was said meanwhile"
    assert witness.connected((b"last",), session_present=True)
