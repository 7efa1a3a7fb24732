"""The consumer's own topics: what is due, and what the broker may retain of them."""

from cesar_mqtt.consumer.own_topics import OwnTopics


def test_what_the_broker_may_retain_is_what_it_acknowledged_last_and_what_was_sent_since() -> None:
    own = OwnTopics()
    assert own.retained("queue") == ()
    for number in range(4):
        own.retain("queue", b"%d" % number)
        assert [(payload, version) for _, payload, version in own.due()] == [(b"%d" % number, number)]
    assert own.retained("queue") == (b"0", b"1", b"2", b"3")
    own.acknowledge("queue", 1)
    assert own.retained("queue") == (b"1", b"2", b"3"), "however slow it is, this does not grow"
    own.acknowledge("queue", 3)
    assert own.retained("queue") == (b"3",)
    assert own.settled


def test_what_is_said_again_is_retained_once_it_is_acknowledged() -> None:
    own = OwnTopics()
    own.retain("queue", b"x")
    list(own.due())
    own.acknowledge("queue", 0)
    own.say_again()
    assert [payload for _, payload, _ in own.due()] == [b"x"]
    own.acknowledge("queue", 0)
    assert set(own.retained("queue")) == {b"x"}
    own.forget_retained()
    assert own.retained("queue") == ()
