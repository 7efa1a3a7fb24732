"""Kill, stop and cut off consumers that share a queue, and their servers, while jobs come in. Then count what is wrong.

Short runs are part of `make test`; `make soak-cluster` makes long ones (`python -m tests.cluster.chaos --help`).
"""

import argparse
import asyncio
import json
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import nats
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.errors import NotFoundError
from paho.mqtt.client import Client, ConnectFlags, MQTTMessage, MQTTMessageInfo
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from tests.acceptance.harness import Consumer
from tests.cluster.servers import USERS, NatsServer, cluster, nats_url, single, start_all
from tests.cluster.simulated import VARIABLE
from tests.proxy import Proxy
from tests.recordings import tone, write_wav

T = TypeVar("T")

PATIENCE_S = 120.0
ACK_WAIT_S = 2.0
LOOK_S = 10.0
"""How often the servers are asked whether jobs have ended whose end a subscriber has not seen."""
CACHED_S = 120.0
"""How long a NATS server shows a retained message from its cache."""
FINAL = frozenset({"completed", "error", "cancelled"})
NAMES = ("attic", "cellar", "garage", "porch", "shed", "study", "tower", "yard")


@dataclass(frozen=True)
class Plan:
    """What happens during a run.

    Attributes:
        servers: 1 or 3.
        job_s: how long the transcriber of a consumer sleeps for each job.
        kills: how often a consumer is killed, and started again.
        stops: how often a consumer is stopped (SIGSTOP) for longer than `ACK_WAIT_S`, and continues as a zombie.
        drains: how often a consumer is asked to stop, and started again.
        server_kills: how often a server is killed and started again, each in turn.
        cuts: how many connections of each consumer end within a packet; 0: there is no proxy.
    """

    mode: Literal["strict", "parallel"] = "strict"
    consumers: int = 3
    servers: int = 1
    jobs: int = 200
    job_s: float = 0.2
    kills: int = 0
    stops: int = 0
    drains: int = 0
    server_kills: int = 0
    cuts: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """What went wrong, in words; empty is right."""

    lost: tuple[str, ...]
    """Jobs with a PUBACK that have no transcript in the end."""
    doubled: tuple[str, ...]
    """Jobs with two different final statuses."""
    out_of_order: tuple[str, ...]
    """strict: jobs that began before an earlier one had ended."""
    overwritten: tuple[str, ...]
    """Jobs whose status was replaced by an older one."""
    wrong_text: tuple[str, ...]
    """Jobs with the transcript of another one."""
    stale: tuple[str, ...]
    """Servers that show a new subscriber something else than what is retained, for longer than they cache it."""
    exits: tuple[str, ...]
    """Consumers that ended by themselves, with their codes."""
    repeated: tuple[str, ...]
    """Jobs that ran again after their final status. No fault where servers are killed: one may show a status to a
    subscriber, and die before it has stored it."""
    missed: tuple[str, ...]
    """Jobs whose end a subscriber with a session has not seen: no fault of the consumers."""
    shown_s: float
    """After so long a new subscriber was shown what is retained, at the slowest server."""
    attempts: int
    took_s: float

    @property
    def wrong(self) -> int:
        return sum(len(getattr(self, name)) for name in FAULTS)


FAULTS = tuple(
    field.name for field in fields(Report) if field.name not in {"repeated", "missed", "shown_s", "attempts", "took_s"}
)


class Watcher:
    """Sees every status of every job, in the order of the broker, through every loss of its connection.

    It subscribes once: NATS sends what is retained at each SUBSCRIBE, ahead of what was missed, which is older.
    """

    def __init__(self, port: int, client_id: str = "watcher") -> None:
        """Without a client id it sees what is retained."""
        self.statuses: list[dict[str, Any]] = []
        self.times: list[float] = []
        """When each was seen, by the monotonic clock."""
        self.changed = threading.Condition()
        self._seen: dict[str, set[bytes]] = {}
        self._subscribed = threading.Event()
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=client_id, clean_session=not client_id)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        if not self._subscribed.wait(PATIENCE_S):
            raise RuntimeError("the watcher could not subscribe")

    def _on_connect(
        self, client: Client, _data: object, flags: ConnectFlags, reason: ReasonCode, _properties: object
    ) -> None:
        if not reason.is_failure and not (flags.session_present and self._subscribed.is_set()):
            client.subscribe("cesar/status/#", qos=1)

    def _on_subscribe(
        self, client: Client, _data: object, _mid: int, granted: Sequence[ReasonCode], _properties: object
    ) -> None:
        if not granted[0].is_failure:
            self._subscribed.set()
        else:  # the servers elect a leader
            threading.Event().wait(0.5)
            client.subscribe("cesar/status/#", qos=1)

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        seen = self._seen.setdefault(message.topic, set())
        if not message.payload or bytes(message.payload) in seen:
            return  # it was published, or delivered, again: after a loss of connections behind newer ones
        seen.add(bytes(message.payload))
        with self.changed:
            self.statuses.append(json.loads(message.payload))
            self.times.append(time.monotonic())
            self.changed.notify_all()

    def latest(self) -> dict[str, dict[str, Any]]:
        with self.changed:
            return {status["job_id"]: status for status in self.statuses}

    def wait_for_latest(self, expected: Mapping[str, Any], timeout_s: float) -> bool:
        """Wait until these are the latest statuses; False: not in time."""
        with self.changed:
            return self.changed.wait_for(
                lambda: {status["job_id"]: status for status in self.statuses} == expected, timeout_s
            )

    def wait_for(self, job_id: str, *states: str, attempt: int = 1) -> tuple[dict[str, Any], float]:
        """The first status of a job in one of the states, and when it was seen."""

        def found() -> int | None:
            for number, status in enumerate(self.statuses):
                if status["job_id"] == job_id and status["status"] in states and status["attempt"] >= attempt:
                    return number
            return None

        with self.changed:
            if not self.changed.wait_for(lambda: found() is not None, PATIENCE_S):
                raise RuntimeError(f"{job_id} was not {states}; there was {self.statuses[-20:]}")
            number = found()
        return self.statuses[number or 0], self.times[number or 0]

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Producer:
    """Publishes one job after the other at QoS 1, each when the one before has its PUBACK.

    Attributes:
        published: the ids of the jobs with a PUBACK, in order.
    """

    def __init__(self, port: int, client_id: str = "producer") -> None:
        self.published: list[str] = []
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=client_id, clean_session=False)
        self._client.reconnect_delay_set(1, 1)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    def publish(self, job_id: str, **more: Any) -> None:
        """Return at its PUBACK."""
        request = {"job_id": job_id, "audio_path": "noise.wav", "initial_prompt": job_id, **more}
        sent = self._client.publish("cesar/jobs", json.dumps(request), qos=1)
        deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
        while not _is_published(sent):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{job_id} got no PUBACK")
            pause.wait(0.002)
        self.published.append(job_id)

    def command(self, name: str) -> None:
        """Return at the PUBACK of a command for everybody."""
        self._client.publish(f"cesar/request/{name}", "", qos=1).wait_for_publish(PATIENCE_S)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def _is_published(sent: MQTTMessageInfo) -> bool:
    sent.rc = MQTTErrorCode.MQTT_ERR_SUCCESS  # "not connected" if it was queued between two connections: no failure
    return sent.is_published()


def settings_of(
    name: str, mode: str, servers: Sequence[NatsServer], *, job_s: float | None, url: str | None = None
) -> dict[str, str]:
    """The environment of a consumer; `job_s` None: it has the real transcriber."""
    own = {
        "CESAR_CONSUMER__NAME": name,
        "CESAR_QUEUE__ENGINE": "jetstream",
        "CESAR_QUEUE__MODE": mode,
        "CESAR_QUEUE__JETSTREAM__URL": url or nats_url(servers),
        "CESAR_QUEUE__JETSTREAM__REPLICAS": str(len(servers)),
        "CESAR_QUEUE__JETSTREAM__ACK_WAIT": str(ACK_WAIT_S),
        "CESAR_WORKER__MAX_ATTEMPTS": "1000",
        "CESAR_RETENTION__MAX_FINISHED": "200000",
        "CESAR_HOMEASSISTANT__ENABLED": "false",
    }
    return own if job_s is None else own | {VARIABLE: str(job_s)}


class Group:
    """Consumers of one queue, each a process with a data directory of its own."""

    def __init__(
        self,
        folder: Path,
        servers: Sequence[NatsServer],
        *,
        mode: str = "strict",
        consumers: int = 3,
        job_s: float | None = 0.2,
        engine: str = "jetstream",
        cuts: int = 0,
        dice: random.Random | None = None,
    ) -> None:
        self.members: list[Consumer] = []
        self.codes: list[str] = []
        self._proxies: list[Proxy] = []
        self._engine = engine
        self._lock = threading.Lock()
        self._away: set[int] = set()
        audio = folder / "audio"
        audio.mkdir(exist_ok=True)
        write_wav(audio / "noise.wav", tone(0.5, 16_000), 16_000)
        for number, name in enumerate(NAMES[:consumers]):
            server = servers[number % len(servers)]
            urls = [server.url, None]
            if cuts and dice is not None:
                doors = [Proxy(port, dice, cuts=cuts) for port in (server.port, server.nats_port)]
                self._proxies += doors
                urls = [doors[0].url, doors[1].url.replace("mqtt://", f"nats://cesar:{USERS['cesar']}@")]
            environ = settings_of(name, mode, servers, job_s=job_s, url=urls[1]) | {"CESAR_QUEUE__ENGINE": engine}
            own = folder / name
            own.mkdir()
            flags = ("--broker", urls[0] or "", "--audio-dir", str(audio))
            self.members.append(Consumer(own, *flags, environ=environ, ready=None))

    def wait_ready(self) -> None:
        for member in self.members:
            member.wait_for_log("Connected to " if self._engine == "mqtt" else " is open (")

    def supervise(self) -> None:
        """Start those again that have ended by themselves, as systemd does."""
        with self._lock:
            for number, member in enumerate(self.members):
                code = member.process.poll()
                if code is not None and number not in self._away:
                    self.codes.append(f"{NAMES[number]} {code}: {member.logged()[-500:]}")
                    member.start(ready=None)

    def kill(self, number: int) -> None:
        with self._lock:
            self._away.add(number)
            self.members[number].kill()

    def drain(self, number: int) -> None:
        with self._lock:
            self._away.add(number)
        code = self.members[number].stop()
        if code != 0:
            self.codes.append(f"{NAMES[number]} {code}: {self.members[number].logged()[-500:]}")

    def start(self, number: int) -> None:
        with self._lock:
            self.members[number].start(ready=None)
            self._away.discard(number)

    def close(self) -> None:
        for member in self.members:
            if member.process.poll() is None:
                member.signal(signal.SIGCONT)
                member.kill()
        for proxy in self._proxies:
            proxy.close()


def start_servers(folder: Path, count: int, stack: ExitStack) -> Sequence[NatsServer]:
    servers = [single(folder / "server")] if count == 1 else cluster(folder)
    for server in servers:
        stack.callback(server.kill)
    start_all(servers)
    return servers


def run(folder: Path, plan: Plan) -> Report:
    """One run; everything that it starts has ended when it returns."""
    dice = random.Random(plan.seed)  # noqa: S311 - chance, no secret
    started = time.monotonic()
    with ExitStack() as stack:
        servers = start_servers(folder, plan.servers, stack)
        watcher = stack.enter_context(closing(Watcher(servers[0].port)))
        _patiently(_keep_statuses, servers)
        group = stack.enter_context(
            closing(
                Group(
                    folder,
                    servers,
                    mode=plan.mode,
                    consumers=plan.consumers,
                    job_s=plan.job_s,
                    cuts=plan.cuts,
                    dice=dice,
                )
            )
        )
        group.wait_ready()
        producer = stack.enter_context(closing(Producer(servers[-1].port)))
        threads = [
            threading.Thread(target=_publish_all, args=(producer, plan), daemon=True),
            threading.Thread(target=_disturb, args=(group, servers, dice, plan), daemon=True),
        ]
        for thread in threads:
            thread.start()
        pause = threading.Event()
        while any(thread.is_alive() for thread in threads):
            group.supervise()
            pause.wait(0.1)
        deadline = time.monotonic() + PATIENCE_S + plan.jobs * plan.job_s  # what is not final by then is lost
        look_at = time.monotonic() + LOOK_S
        while not _all_final(watcher.latest(), producer.published) and time.monotonic() < deadline:
            group.supervise()
            pause.wait(0.1)
            if plan.server_kills and time.monotonic() > look_at:  # a subscriber may miss a status when its server dies
                if _all_final(_patiently(_retained, servers, producer.published), producer.published):
                    break
                look_at = time.monotonic() + LOOK_S
        pause.wait(2 * ACK_WAIT_S)  # for what a zombie may still publish
        retained = _patiently(_retained, servers, producer.published)
        shown_s = [_wait_until_shown(server, retained) for server in servers]
        for number in range(plan.consumers):
            group.drain(number)
        kept, latest = _patiently(_kept_statuses, servers), watcher.latest()
        return _judge(
            kept,
            retained,
            producer.published,
            plan,
            missed=[job_id for job_id in producer.published if latest.get(job_id) != retained.get(job_id)],
            shown_s=shown_s,
            codes=group.codes,
            took_s=time.monotonic() - started,
        )


def _patiently(ask: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
    """Ask the servers until they have a leader that answers."""
    deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while True:
        try:
            return asyncio.run(ask(*arguments))
        except (NatsError, OSError, TimeoutError):
            if time.monotonic() > deadline:
                raise
            pause.wait(0.5)


STATUSES = "$MQTT.msgs.cesar.status.*"


async def _keep_statuses(servers: Sequence[NatsServer]) -> None:
    """Have the servers keep every status in the order in which they store them, as for a client that is away."""
    client = await nats.connect(nats_url(servers).split(","))
    config = ConsumerConfig(durable_name="judge", ack_policy=AckPolicy.EXPLICIT, filter_subject=STATUSES)
    await client.jetstream().add_consumer("$MQTT_msgs", config)
    await client.close()


async def _kept_statuses(servers: Sequence[NatsServer]) -> list[dict[str, Any]]:
    """Every status of every job, without those that repeat the newest one of the job."""
    client = await nats.connect(nats_url(servers).split(","))
    statuses: list[dict[str, Any]] = []
    newest: dict[str, bytes] = {}
    seq = 1
    with suppress(NotFoundError):
        while True:
            message = await client.jetstream().get_msg("$MQTT_msgs", seq=seq, subject=STATUSES, next=True)
            subject, data, seq = message.subject or "", message.data, (message.seq or seq) + 1
            if data and newest.get(subject) != data:
                newest[subject] = data
                statuses.append(json.loads(data))
    await client.close()
    return statuses


async def _retained(servers: Sequence[NatsServer], job_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The statuses that the servers retain, from their own stream."""
    client = await nats.connect(nats_url(servers).split(","), connect_timeout=5)
    statuses = {}
    for job_id in job_ids:
        with suppress(NotFoundError):
            message = await client.jetstream().get_last_msg("$MQTT_rmsgs", f"$MQTT.rmsgs.cesar.status.{job_id}")
            statuses[job_id] = json.loads(message.data or b"null")
    await client.close()
    return statuses


def _wait_until_shown(server: NatsServer, retained: Mapping[str, Any]) -> float:
    """How long until a new subscriber is shown what is retained: a server may show what it has cached for 2 minutes."""
    started = time.monotonic()
    while time.monotonic() < started + CACHED_S + PATIENCE_S:
        with closing(Watcher(server.port, "")) as late:
            if late.wait_for_latest(retained, 5.0):
                return time.monotonic() - started
    return math.inf


def _publish_all(producer: Producer, plan: Plan) -> None:
    for number in range(plan.jobs):
        producer.publish(f"job-{number:05}")


def _all_final(latest: Mapping[str, Mapping[str, Any]], job_ids: Sequence[str]) -> bool:
    return all(latest.get(job_id, {}).get("status") in FINAL for job_id in job_ids)


def _disturb(group: Group, servers: Sequence[NatsServer], dice: random.Random, plan: Plan) -> None:
    actions = ["kill"] * plan.kills + ["stop"] * plan.stops + ["drain"] * plan.drains + ["server"] * plan.server_kills
    dice.shuffle(actions)
    pause, turn = threading.Event(), 0
    for action in actions:
        pause.wait(dice.uniform(0.5, 2.5))
        number = dice.randrange(plan.consumers)
        if action == "kill":
            group.kill(number)
            pause.wait(dice.uniform(0.0, 1.5 * ACK_WAIT_S))
            group.start(number)
        elif action == "drain":
            group.drain(number)
            group.start(number)
        elif action == "stop":
            process = group.members[number].process
            process.send_signal(signal.SIGSTOP)
            pause.wait(dice.uniform(0.5, 2.5) * ACK_WAIT_S)
            process.send_signal(signal.SIGCONT)
        else:
            server, turn = servers[turn % len(servers)], turn + 1
            server.kill()
            pause.wait(dice.uniform(0.0, 3.0))
            server.start()


def _judge(
    statuses: Sequence[Mapping[str, Any]],
    retained: Mapping[str, Mapping[str, Any]],
    published: Sequence[str],
    plan: Plan,
    *,
    missed: Sequence[str] = (),
    shown_s: Sequence[float] = (),
    codes: Sequence[str] = (),
    took_s: float = 0.0,
) -> Report:
    order = {job_id: number for number, job_id in enumerate(published)}
    final: dict[str, Mapping[str, Any]] = {}
    newest: dict[str, tuple[int, int]] = {}
    doubled: list[str] = []
    out_of_order: list[str] = []
    overwritten: list[str] = []
    repeated: list[str] = []
    again: set[str] = set()
    first_open = 0
    for status in statuses:
        job_id, state = str(status["job_id"]), str(status["status"])
        rank = (int(status["attempt"]), {"queued": 0, "processing": 1}.get(state, 2))
        # A job that was given back, or whose consumer has died, is queued again before its next attempt.
        # The death of a server may cost the running job its end.
        if (
            job_id in final
            and len(again | {job_id}) <= plan.server_kills
            and status["attempt"] > final[job_id]["attempt"]
        ):
            again.add(job_id)
            repeated.append(f"{final[job_id]} then {status}")
            del final[job_id]
        if job_id in final and final[job_id] != status:
            (doubled if state in FINAL else overwritten).append(f"{final[job_id]} then {status}")
        elif rank[0] < newest.get(job_id, rank)[0]:
            overwritten.append(f"{job_id}: attempt {newest[job_id][0]} then {status}")
        newest[job_id] = max(rank, newest.get(job_id, rank))
        if state in FINAL:
            final.setdefault(job_id, status)
        while first_open < len(published) and published[first_open] in final:
            first_open += 1
        if plan.mode == "strict" and state == "processing" and order.get(job_id, 0) > first_open:
            out_of_order.append(f"{job_id} is running, and {published[first_open]} has not ended")
    done = {job_id for job_id, status in retained.items() if status["status"] == "completed"}
    return Report(
        lost=tuple(f"{job_id}: {retained.get(job_id)}" for job_id in published if job_id not in done),
        doubled=tuple(doubled),
        out_of_order=tuple(dict.fromkeys(out_of_order)),
        overwritten=tuple(overwritten)
        + tuple(
            f"{job_id}: retained {retained.get(job_id)}" for job_id in final if retained.get(job_id) != final[job_id]
        ),
        wrong_text=tuple(job_id for job_id in done if retained[job_id]["result_text"] != job_id),
        stale=tuple(f"server {number}" for number, after_s in enumerate(shown_s) if after_s == math.inf),
        missed=tuple(missed),
        shown_s=max(shown_s, default=0.0),
        exits=tuple(codes),
        repeated=tuple(repeated),
        attempts=sum(attempt for attempt, _ in newest.values()),
        took_s=took_s,
    )


@dataclass(frozen=True)
class Takeover:
    """A job whose consumer was killed, and who has it then.

    Attributes:
        after_s: seconds from the death to the status of the next attempt.
    """

    killed: str
    consumer: str
    attempt: int
    after_s: float


def take_over(folder: Path, stack: ExitStack, *, job_s: float) -> Takeover:
    """Kill the consumer that runs a job."""
    servers = start_servers(folder, 1, stack)
    watcher = stack.enter_context(closing(Watcher(servers[0].port)))
    group = stack.enter_context(closing(Group(folder, servers, consumers=2, job_s=job_s)))
    group.wait_ready()
    producer = stack.enter_context(closing(Producer(servers[0].port)))
    producer.publish("taken-over")
    running, _ = watcher.wait_for("taken-over", "processing")
    killed = time.monotonic()
    group.kill(NAMES.index(running["consumer"]))
    again, seen = watcher.wait_for("taken-over", "processing", attempt=running["attempt"] + 1)
    watcher.wait_for("taken-over", "completed", attempt=again["attempt"])
    return Takeover(running["consumer"], again["consumer"], again["attempt"], seen - killed)


def kill_servers_after_puback(folder: Path, stack: ExitStack, *, rounds: int, burst: int = 10) -> list[str]:
    """Kill the server at a PUBACK, again and again; the jobs with a PUBACK that do not complete."""
    (server,) = start_servers(folder, 1, stack)
    watcher = stack.enter_context(closing(Watcher(server.port)))
    group = stack.enter_context(closing(Group(folder, [server], consumers=1, mode="parallel", job_s=0.0)))
    group.wait_ready()
    acknowledged: list[str] = []
    for number in range(rounds):
        acknowledged += _kill_at_puback(server, [f"round-{number}-{job}" for job in range(burst)], number % burst)
        server.start()
    deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
    left = acknowledged
    while left and time.monotonic() < deadline:
        pause.wait(0.2)
        latest = watcher.latest()
        left = [job_id for job_id in left if latest.get(job_id, {}).get("status") != "completed"]
    return left


def _kill_at_puback(server: NatsServer, job_ids: Sequence[str], after: int) -> list[str]:
    """Publish all at once, and kill the server when more than `after` have their PUBACK; those that have it."""
    acknowledged: list[str] = []
    names: dict[int, str] = {}
    known, dead = threading.Event(), threading.Event()

    def on_publish(_client: Client, _data: object, mid: int, *_: object) -> None:
        known.wait(PATIENCE_S)
        if not dead.is_set():
            acknowledged.append(names[mid])
            if len(acknowledged) > after:
                os.kill(server.pid, signal.SIGKILL)
                dead.set()

    client = Client(CallbackAPIVersion.VERSION2, reconnect_on_failure=False)
    client.on_publish = on_publish
    connected = threading.Event()
    client.on_connect = lambda *_: connected.set()
    client.connect("127.0.0.1", server.port)
    client.loop_start()
    connected.wait(PATIENCE_S)
    for job_id in job_ids:
        request = {"job_id": job_id, "audio_path": "noise.wav", "initial_prompt": job_id}
        names[client.publish("cesar/jobs", json.dumps(request), qos=1).mid] = job_id
    known.set()
    dead.wait(PATIENCE_S)
    client.loop_stop()
    server.kill()
    return acknowledged


ROWS: Mapping[str, Plan] = {
    "strict": Plan(mode="strict", kills=12, stops=12, drains=4),
    "parallel": Plan(mode="parallel", kills=12, stops=12, drains=4),
    "servers": Plan(mode="strict", servers=3, server_kills=9),
    "cuts": Plan(mode="parallel", kills=2, stops=2, cuts=6),
    "everything": Plan(mode="strict", servers=3, server_kills=6, kills=6, stops=6, drains=2, cuts=3),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make soak-cluster ARGS=...", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("rows", metavar="ROW", nargs="*", help=f"of {', '.join(ROWS)}; all of them when left out")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)))
    parser.add_argument("--jobs", type=int, default=200)
    given = parser.parse_args()
    if unknown := [row for row in given.rows if row not in ROWS]:
        parser.error(f"there is no row {unknown[0]!r}: name any of {', '.join(ROWS)}")
    wrong = 0
    for row in given.rows or ROWS:
        share = given.jobs / 200
        plan = ROWS[row]
        scaled = {name: round(getattr(plan, name) * share) for name in ("kills", "stops", "drains", "server_kills")}
        plan = Plan(**{**plan.__dict__, **scaled, "jobs": given.jobs, "seed": given.seed})
        with tempfile.TemporaryDirectory(prefix="cesar-mqtt-cluster-") as folder:
            report = run(Path(folder), plan)
        wrong += report.wrong
        counts = ", ".join(f"{name.replace('_', ' ')} {len(getattr(report, name))}" for name in FAULTS)
        print(
            f"{row}: {plan.jobs} jobs, seed {plan.seed}: {counts}; {report.attempts} attempts, "
            f"{len(report.repeated)} ran again after their end, {len(report.missed)} missed by a subscriber, "
            f"all shown after {report.shown_s:.0f} s, "
            f"{report.took_s:.0f} s"
        )
        for name in FAULTS:
            for line in getattr(report, name)[:10]:
                print(f"  {name}: {line}")
        sys.stdout.flush()
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
