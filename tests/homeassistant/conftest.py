# mypy: ignore-errors
"""A house: a real mosquitto, real consumers, and a real Home Assistant core whose MQTT integration talks to them.

It runs in Home Assistant's own environment (see the Makefile), in which cesar-mqtt is not installed: the consumer is
the command of the other one, named by CESAR_MQTT. Not type-checked, for elsewhere Home Assistant is not installed.
"""

import asyncio
import getpass
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import wave
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from tests import template

if importlib.util.find_spec("homeassistant") is None:
    collect_ignore_glob = ["*.py"]
else:
    from homeassistant.components import mqtt
    from homeassistant.const import MATCH_ALL
    from homeassistant.core import callback
    from homeassistant.helpers import device_registry, entity_registry
    from paho.mqtt.client import Client
    from paho.mqtt.enums import CallbackAPIVersion
    from pytest_homeassistant_custom_component.common import MockConfigEntry

DATA = Path(__file__).parents[1] / "data"
PATIENCE_S = 120.0
LOOK_AGAIN_S = 1.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def program(name: str) -> str:
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if path is None:
        pytest.fail(f"{name} is not installed")
    return path


def wait_for_listener(port: int, process: "subprocess.Popen[str]") -> None:
    """Connect until it works: what a broker logs before it listens differs between its versions."""
    pause = threading.Event()
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S):
            return
        assert process.poll() is None, "mosquitto did not start"
        assert time.monotonic() < deadline, "mosquitto does not listen"
        pause.wait(0.01)


def python() -> str:
    """Return the interpreter of the environment in which cesar-mqtt is installed."""
    return str(Path(os.environ["CESAR_MQTT"]).parent / "python")


class Bus:
    """Another client, which sees everything and can clear what is retained."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.messages: list[tuple[str, bytes]] = []
        self._changed = threading.Condition()
        self._subscribed = threading.Event()
        self._client = Client(CallbackAPIVersion.VERSION2)
        self._client.on_connect = lambda client, *_: client.subscribe([("#", 1)])
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._on_message
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._subscribed.wait(PATIENCE_S)

    def _on_message(self, _client, _userdata, message) -> None:
        with self._changed:
            self.messages.append((message.topic, message.payload))
            self._changed.notify_all()

    def publish(self, topic: str, payload: bytes | str, *, retain: bool = False, wait: bool = True) -> None:
        sent = self._client.publish(topic, payload, qos=1, retain=retain)
        if wait:
            sent.wait_for_publish(PATIENCE_S)

    def seen(self, topic: str) -> list[bytes]:
        with self._changed:
            return [payload for of, payload in self.messages if of == topic]

    def wait(self, topic: str, when: Callable[[bytes], bool] = bool, *, number: int = 1) -> bytes:
        """Wait for the message with this number on a topic that satisfies `when`."""

        def found() -> list[bytes]:
            return [payload for of, payload in self.messages if of == topic and when(payload)]

        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= number, PATIENCE_S), f"nothing came on {topic}"
            return found()[number - 1]

    def retained_topics(self) -> list[str]:
        """What the broker retains, of any topic, as a client sees it that has just come."""
        newcomer = Bus(self._port)
        newcomer.publish("the/end", b"")  # comes after what is retained
        newcomer.wait("the/end", lambda payload: payload == b"")
        newcomer.close()
        return sorted({topic for topic, _ in newcomer.messages} - {"the/end"})

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Consumer:
    """`cesar-mqtt serve` as its own process."""

    def __init__(self, folder: Path, port: int, **settings: str) -> None:
        self.log = folder / "consumer.log"
        self._folder = folder
        self._environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("CESAR_")},
            "CESAR_BROKER__URL": f"mqtt://127.0.0.1:{port}",
            "CESAR_DATA_DIR": "data",
            "CESAR_MODELS__DEFAULT": "tiny.en",
            **settings,
        }

    def start(self, **settings: str) -> None:
        self._environ |= settings
        folders = ("--audio-dir", str(DATA), "--audio-dir", str(self._folder.parent))
        with self.log.open("ab") as log:
            self._process = template.start(
                ["serve", *folders], cwd=self._folder, env=self._environ, stdout=log, stderr=log, python=python()
            )

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            assert self._process.wait(PATIENCE_S) == 0, self.log.read_text()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)

    def command(self, *arguments: str) -> str:
        """Run another command with the same settings; its standard output."""
        done = subprocess.run(
            [os.environ["CESAR_MQTT"], *arguments],
            cwd=self._folder,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


class House:
    """Home Assistant, connected to the broker."""

    def __init__(self, hass, entry, bus: Bus) -> None:
        self.hass = hass
        self.entry = entry
        self.births = 1
        self._bus = bus

    def state(self, entity_id: str) -> str | None:
        state = self.hass.states.get(entity_id)
        return None if state is None else state.state

    def attributes(self, entity_id: str) -> dict:
        return dict(self.hass.states.get(entity_id).attributes)

    def entities(self) -> dict[str, str]:
        """Every entity of a consumer: its unique id, by its entity id."""
        entries = entity_registry.async_get(self.hass).entities.values()
        return {entry.entity_id: entry.unique_id for entry in entries if entry.platform == "mqtt"}

    def devices(self) -> list:
        return device_registry.async_entries_for_config_entry(device_registry.async_get(self.hass), self.entry.entry_id)

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until something is so, if only for a moment: looked at with every event of the house, and each second.

        Notifications make no event; a listener that is not a callback runs in a thread, perhaps after the last event.
        """
        came = asyncio.Event()
        problem = None

        @callback
        def look(_event=None) -> None:
            nonlocal problem
            try:
                if condition():
                    came.set()
            except (AttributeError, KeyError, TypeError, ValueError) as exc:  # an entity is not there, or unknown
                problem = exc

        stop = self.hass.bus.async_listen(MATCH_ALL, look)
        try:
            async with asyncio.timeout(PATIENCE_S):
                look()
                while not came.is_set():
                    with suppress(TimeoutError):
                        await asyncio.wait_for(came.wait(), LOOK_AGAIN_S)
                    look()
        except TimeoutError:
            states = {state.entity_id: state.state for state in self.hass.states.async_all()}
            pytest.fail(f"{what} did not come to be ({problem!r}); there is {states}")
        finally:
            stop()

    async def until_state(self, entity_id: str, state: str) -> None:
        await self.until(lambda: self.state(entity_id) == state, f"{entity_id} = {state}")

    async def until_number(self, entity_id: str, at_least: float) -> None:
        await self.until(lambda: float(self.state(entity_id)) >= at_least, f"{entity_id} >= {at_least}")

    async def until_born(self) -> None:
        """Wait until it has said that it has started, as often as it did."""
        await self.hass.async_add_executor_job(self._wait_born)

    def _wait_born(self) -> None:
        self._bus.wait("homeassistant/status", lambda said: said == b"online", number=self.births)

    async def connect_again(self) -> None:
        """Let the MQTT integration start anew; all that it has comes from the broker then."""
        await self.until_born()
        self.births += 1
        assert await self.hass.config_entries.async_reload(self.entry.entry_id)

    async def until_subscribed(self) -> None:
        """Wait until the broker has been asked for all topics of the automations: that is put off for a moment."""
        client = self.hass.data["mqtt"].client
        await self.until(lambda: not client._pending_subscriptions, "the subscriptions")

    async def restart(self, broker: "Broker") -> None:
        """Restart the broker; Home Assistant says again that it is there."""
        await self.until_born()
        self.births += 1
        await self.hass.async_add_executor_job(broker.restart)
        await self.until_born()

    async def call(self, domain: str, service: str, entity_id: str, **data: str) -> None:
        await self.hass.services.async_call(domain, service, {"entity_id": entity_id, **data}, blocking=True)


class Broker:
    """A mosquitto, which keeps what it retains when it is restarted."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._config = folder / "mosquitto.conf"
        self._config.write_text(
            f"user {getpass.getuser()}\nlistener {self.port} 127.0.0.1\nallow_anonymous true\n"
            f"persistence true\npersistence_location {folder}/\n"
        )
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [program("mosquitto"), "-v", "-c", str(self._config)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self._drain = threading.Thread(target=self._process.stderr.read, daemon=True)
        self._drain.start()
        wait_for_listener(self.port, self._process)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_S)
        self._drain.join(PATIENCE_S)
        self._process.stderr.close()

    def restart(self) -> None:
        self.stop()
        self.start()


@pytest.fixture
def broker(tmp_path: Path, socket_enabled: None) -> Broker:
    started = Broker(tmp_path)
    yield started
    started.stop()


@pytest.fixture
def port(broker: Broker) -> int:
    return broker.port


@pytest.fixture
def bus(port: int) -> Bus:
    client = Bus(port)
    yield client
    client.close()


@pytest.fixture
def serve(port: int, tmp_path: Path) -> Callable[..., Consumer]:
    """Start consumers; none of them outlives its test."""
    consumers: list[Consumer] = []

    def start(name: str = "cesar", **settings: str) -> Consumer:
        folder = tmp_path / name
        folder.mkdir()
        consumers.append(Consumer(folder, port, CESAR_CONSUMER__NAME=name, **settings))
        consumers[-1].start()
        return consumers[-1]

    yield start
    for consumer in consumers:
        consumer.kill()


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten what Home Assistant waits so that many devices may be discovered, and between two attempts to connect."""
    monkeypatch.setattr(mqtt.client, "DISCOVERY_COOLDOWN", 0.5)
    monkeypatch.setattr(mqtt.client, "RECONNECT_INTERVAL_SECONDS", 1)


def mqtt_entry(port: int) -> "MockConfigEntry":
    """Return the configuration of the MQTT integration."""
    return MockConfigEntry(
        domain=mqtt.DOMAIN,
        title="mosquitto",
        data={"broker": "127.0.0.1", "port": port},
        version=mqtt.const.CONFIG_ENTRY_VERSION,
        minor_version=mqtt.const.CONFIG_ENTRY_MINOR_VERSION,
    )


@pytest.fixture
async def house(hass, port: int, bus: Bus, tmp_path: Path) -> House:
    """Home Assistant, started, with its MQTT integration connected."""
    (tmp_path / "configuration.yaml").touch()
    hass.config.config_dir = str(tmp_path)
    entry = mqtt_entry(port)
    entry.add_to_hass(hass)
    assert await hass.config_entries.async_setup(entry.entry_id)
    home = House(hass, entry, bus)
    yield home
    await home.until_born()  # stopped before, it complains that it could not say so


@pytest.fixture(autouse=True)
def _nothing_to_complain_about(caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest) -> None:
    """Home Assistant logs a warning for whatever it does not like in what it is told."""
    yield
    expected = {"homeassistant.helpers.frame"}  # its own MQTT integration sets platforms up while it is being set up
    if request.node.get_closest_marker("broker_restarts"):
        expected.add("homeassistant.components.mqtt.client")  # the connection was lost
    complaints = [
        f"{record.name}: {record.getMessage()}"
        for when in ("setup", "call")
        for record in caplog.get_records(when)
        if record.levelname in {"WARNING", "ERROR", "CRITICAL"}
        and record.name.startswith("homeassistant")
        and record.name not in expected
    ]
    assert complaints == []


@pytest.fixture(scope="session")
def _long_samples(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    target = tmp_path_factory.mktemp("long") / "samples"
    subprocess.run([python(), "-c", _DECODE, DATA / "long.ogg", target], check=True, timeout=PATIENCE_S)
    return target.read_bytes()


@pytest.fixture
def repeated(tmp_path: Path, _long_samples: bytes) -> Callable[[int], str]:
    """Make a recording of the one in the repository, several times; three have more than 300 words."""

    def make(times: int) -> str:
        target = tmp_path / "many-words.wav"
        with wave.open(str(target), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(_long_samples * times)
        return target.name

    return make


_DECODE = """
import sys
from pathlib import Path
from faster_whisper.audio import decode_audio
Path(sys.argv[2]).write_bytes((decode_audio(sys.argv[1]) * 32767).astype("int16").tobytes())
"""
