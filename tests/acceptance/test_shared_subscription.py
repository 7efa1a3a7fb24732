"""Consumers that share one input, each its own process, on a real mosquitto: who gets what, and who answers."""

import io
import signal
import uuid
import wave
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from cesar_mqtt.errors import ExitCode
from cesar_mqtt.mqtt.embedded import EmbeddedBroker
from tests.acceptance.harness import LONG, Bus, Consumer
from tests.conftest import Mosquitto, need, run

pytestmark = [pytest.mark.mosquitto, pytest.mark.model]

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]

GROUP = {"CESAR_CONSUMER__GROUP": "house"}
BOTH = {"attic", "cellar"}
JOBS = 40


def silence() -> bytes:
    """A recording with nothing in it, which takes no time to transcribe."""
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setparams((1, 2, 16_000, 0, "NONE", ""))
        wav.writeframes(bytes(3200))
    return file.getvalue()


SILENCE = silence()


def members(serve: Serve, broker: Mosquitto) -> tuple[Consumer, Consumer]:
    attic, cellar = (serve("--broker", broker.url, "--name", name, name=name, environ=GROUP) for name in sorted(BOTH))
    return attic, cellar


def submit(bus: Bus, *names: str) -> None:
    for name in names:
        bus.publish(f"cesar/audio/{name}", SILENCE)


def owners(bus: Bus, names: list[str], *states: str) -> dict[str, str]:
    return {name: bus.status(name, *states)["consumer"] for name in names}


def ask(bus: Bus, command: str, request: Mapping[str, Any], *, of: set[str] = BOTH) -> list[dict[str, Any]]:
    """Every answer to a request, as far as the members `of` the group give one."""
    asked, then = uuid.uuid4().hex, uuid.uuid4().hex
    bus.publish(f"cesar/request/{command}", {**request, "transaction": asked})
    bus.publish("cesar/request/health", {"transaction": then})  # each answers in order: behind this nothing more comes
    for name in of:
        bus.wait("cesar/response/health", lambda told: (told["transaction"], told["data"]["consumer"]) == (then, name))  # noqa: B023 - it is called at once
    return [told for told in bus.seen(f"cesar/response/{command}") if told["transaction"] == asked]


def sources(answers: list[dict[str, Any]]) -> list[str]:
    assert all(told["status"] == "ok" for told in answers), answers
    return sorted(told["data"]["consumer"] for told in answers)


def test_members_share_the_jobs_and_the_owner_answers(serve: Serve, join: Join, mosquitto: Mosquitto) -> None:
    attic, cellar = members(serve, mosquitto)
    bus = join(mosquitto.port)
    names = [f"job-{number}" for number in range(JOBS)]
    submit(bus, *names)
    owner = owners(bus, names)
    shares = Counter(owner.values())
    assert shares.keys() == BOTH
    assert min(shares.values()) >= JOBS // 4, "in turns, more or less"
    for name in names:
        assert {status["consumer"] for status in bus.seen(f"cesar/status/{name}")} == {owner[name]}
        assert bus.states(name)[-1] == "completed"
        assert bus.states(name).count("processing") <= 1, "it was done once"

    for command in ("health", "models", "list", "pause", "resume"):
        assert sources(ask(bus, command, {})) == sorted(BOTH)
    assert sources(ask(bus, "pause", {"consumer": "attic"})) == ["attic"]
    assert sources(ask(bus, "resume", {"consumer": "attic"})) == ["attic"]
    assert ask(bus, "get", {"job_id": "nobodys"}) == []
    assert sources(ask(bus, "get", {"job_id": "job-0"})) == [owner["job-0"]]

    # Both are at work on something long. Its owner ends the one, and the other goes on.
    for name in ("long-1", "long-2"):
        bus.publish("cesar/jobs", {"job_id": name, "audio_path": LONG.name})
    busy = owners(bus, ["long-1", "long-2"], "processing")
    assert set(busy.values()) == BOTH
    refused = ask(bus, "cancel", {"job_id": "current"})
    assert sorted((told["status"], told["data"]["consumer"]) for told in refused) == [
        ("error", "attic"),
        ("error", "cellar"),
    ]
    assert [told["data"] for told in ask(bus, "dance", {"consumer": "attic"})] == [{"consumer": "attic"}]
    assert len(bus.seen("cesar/rejected")) == 1, "the consumer that it is for reports it, and no other"
    assert sources(ask(bus, "cancel", {"job_id": "long-1"})) == [busy["long-1"]]
    assert bus.status("long-1")["status"] == "cancelled"
    assert bus.states("long-2")[-1] == "processing"
    assert sources(ask(bus, "cancel", {"job_id": "current", "consumer": busy["long-2"]})) == [busy["long-2"]]
    assert bus.status("long-2")["status"] == "cancelled"
    for consumer in (attic, cellar):
        assert consumer.stop() == ExitCode.OK


def test_what_a_killed_member_has_and_what_is_its_turn_is_done_when_it_comes_back(
    serve: Serve, join: Join, mosquitto: Mosquitto
) -> None:
    attic, cellar = members(serve, mosquitto)
    bus = join(mosquitto.port)
    ask(bus, "pause", {})
    accepted = [f"accepted-{number}" for number in range(6)]
    submit(bus, *accepted)
    owner = owners(bus, accepted, "queued")
    assert Counter(owner.values()) == {"attic": 3, "cellar": 3}
    attic.signal(signal.SIGSTOP)  # what the broker sends it from now on is not acknowledged
    unread = [f"unread-{number}" for number in range(4)]
    submit(bus, *unread)
    attic.kill()
    bus.wait("cesar/consumer/attic/state", lambda told: told["state"] == "offline")
    later = [f"later-{number}" for number in range(4)]
    submit(bus, *later)
    ask(bus, "resume", {}, of={"cellar"})

    # The other one does its own, and gets no more than its turn.
    for name in accepted:
        assert bus.status(name, "queued" if owner[name] == "attic" else "completed")["consumer"] == owner[name]
    attic.start()
    bus.publish("cesar/request/resume", {"consumer": "attic"})
    everybody = owners(bus, [*accepted, *unread, *later], "completed")
    assert Counter(everybody[name] for name in unread) == {"attic": 2, "cellar": 2}
    assert Counter(everybody[name] for name in later) == {"attic": 2, "cellar": 2}
    assert {name: everybody[name] for name in accepted} == owner
    for name in everybody:
        assert bus.states(name).count("completed") == 1
        assert {status["consumer"] for status in bus.seen(f"cesar/status/{name}")} == {everybody[name]}
    assert cellar.stop() == ExitCode.OK


def test_when_the_session_of_a_member_is_ended_the_others_get_its_turn_and_what_waited_for_it_is_lost(
    serve: Serve, join: Join, mosquitto: Mosquitto
) -> None:
    attic, cellar = members(serve, mosquitto)
    bus = join(mosquitto.port)
    assert attic.stop() == ExitCode.OK
    submit(bus, "waits-1", "waits-2")
    host, port = "127.0.0.1", str(mosquitto.port)
    ended = run(need("mosquitto_sub"), "-h", host, "-p", port, "-V", "5", "-i", "attic", "-t", "none", "-E")
    assert ended.returncode == 0, ended.stderr
    names = [f"after-{number}" for number in range(4)]
    submit(bus, *names)
    assert owners(bus, names, "completed") == dict.fromkeys(names, "cellar")
    waited = [name for name in ("waits-1", "waits-2") if bus.seen(f"cesar/status/{name}")]
    assert len(waited) == 1, "the other one was attic's turn"
    attic.start()
    submit(bus, "last-1", "last-2")
    assert set(owners(bus, ["last-1", "last-2"], "completed").values()) == BOTH
    assert [name for name in ("waits-1", "waits-2") if bus.seen(f"cesar/status/{name}")] == waited
    assert cellar.stop() == ExitCode.OK


def test_joining_and_leaving_a_group_leaves_no_old_subscription_behind(
    serve: Serve, join: Join, mosquitto: Mosquitto
) -> None:
    bus = join(mosquitto.port)
    flags = ("--broker", mosquitto.url, "--name", "attic")
    alone = serve(*flags, name="attic")
    assert alone.stop() == ExitCode.OK
    attic, cellar = members(serve, mosquitto)
    names = [f"shared-{number}" for number in range(8)]
    submit(bus, *names)
    assert Counter(owners(bus, names).values()) == {"attic": 4, "cellar": 4}
    ask(bus, "list", {})
    for name in names:
        assert len({status["consumer"] for status in bus.seen(f"cesar/status/{name}")}) == 1
    assert attic.stop() == ExitCode.OK
    alone = serve(*flags, name="attic")
    names = [f"both-{number}" for number in range(4)]
    submit(bus, *names)
    for name in names:
        for consumer in BOTH:
            bus.wait(f"cesar/status/{name}", lambda status: status["consumer"] == consumer)  # noqa: B023 - called at once
    assert [consumer.stop() for consumer in (alone, cellar)] == [ExitCode.OK] * 2


def test_a_broker_without_mqtt_5_is_refused_with_a_sentence_that_names_the_group(
    serve: Serve, embedded_broker: EmbeddedBroker
) -> None:
    consumer = serve("--broker", embedded_broker.url, environ=GROUP, ready=None)
    assert consumer.wait() == ExitCode.CONFIG
    assert "does not support MQTT 5" in consumer.logged()
    assert "consumer.group needs shared subscriptions" in consumer.logged()
