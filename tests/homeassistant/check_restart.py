# mypy: ignore-errors
"""Restarts of Home Assistant as its own process, of the broker and of the consumer: each job is shown once."""

import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from homeassistant.config_entries import STORAGE_KEY, STORAGE_VERSION, STORAGE_VERSION_MINOR
from homeassistant.helpers.json import json_dumps
from homeassistant.util.yaml import load_yaml, parse_yaml
from tests.homeassistant.conftest import PATIENCE_S, free_port, mqtt_entry
from tests.homeassistant.pages import ROOT, shown

DEPLOY = ROOT / "deploy" / "home-assistant"
HEARD = "call the plumber"
PHONE = "Send transcripts to a phone"
PACKAGE = "Show each finished transcript"
BLUEPRINT = "cesar-mqtt/cesar_transcribe.yaml"


class OwnHouse:
    """Home Assistant as its own process over one configuration folder, and what it has told."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.log = folder / "stderr.log"
        self.told: list[list[str]] = []
        self._changed = threading.Condition()
        self._read_to = 0

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("own_process.py"), self._folder],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            with self._changed:
                self.told.append(json.loads(line))
                self._changed.notify_all()

    def stop(self) -> None:
        self._process.terminate()
        assert self._process.wait(PATIENCE_S) == 0, self.log.read_text()
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        self._process.stdout.close()

    def wait(self, *what: str, number: int = 1) -> None:
        """Wait until something has been told that often; the last part may be the beginning of what is told."""

        def found() -> int:
            return sum(told[:-1] == [*what[:-1]] and told[-1].startswith(what[-1]) for told in self.told)

        with self._changed:
            assert self._changed.wait_for(lambda: found() >= number, PATIENCE_S), (
                what,
                self.told,
                self.log.read_text(),
            )

    def of(self, kind: str) -> list[str]:
        with self._changed:
            return [told[-1] for told in self.told if told[0] == kind]

    def complaints(self) -> list[str]:
        """What it has logged as a warning or worse since it was asked last."""
        text = self.log.read_text()
        found = re.findall(r" (?:WARNING|ERROR|CRITICAL) \(.+?\) \[(homeassistant\..+?)\] (.*)", text[self._read_to :])
        self._read_to = len(text)
        return [f"{name}: {said}" for name, said in found if not said.startswith("Skipping pip installation")]


@pytest.fixture
def own_house(tmp_path: Path, port: int) -> OwnHouse:
    """The package, the page's automation for a phone and an automation from the blueprint in one house."""
    folder = tmp_path / "home-assistant"
    blueprint = folder / "blueprints" / "automation" / BLUEPRINT
    blueprint.parent.mkdir(parents=True)
    shutil.copy(DEPLOY / "blueprints" / "cesar_transcribe.yaml", blueprint)
    inputs = {
        "trigger_input": [{"trigger": "mqtt", "topic": "house/recorded"}],
        "audio_input": "{{ trigger.payload }}",
        "actions_input": [{"event": "told", "event_data": {"of": "{{ text }}"}}],
    }
    config = load_yaml(str(DEPLOY / "package.yaml"))
    config["automation"] += [
        parse_yaml(shown("Notify a phone")) | {"id": "phone"},
        {"id": "notes", "alias": "notes", "use_blueprint": {"path": BLUEPRINT, "input": inputs}},
    ]
    config["http"] = {"server_host": "127.0.0.1", "server_port": free_port()}
    (folder / "configuration.yaml").write_text(json.dumps(config))  # JSON is YAML
    stored = {
        "version": STORAGE_VERSION,
        "minor_version": STORAGE_VERSION_MINOR,
        "key": STORAGE_KEY,
        "data": {"entries": [mqtt_entry(port).as_dict()]},
    }
    (folder / ".storage").mkdir()
    (folder / ".storage" / STORAGE_KEY).write_text(json_dumps(stored))
    house = OwnHouse(folder)
    house.start()
    yield house
    house.close()


def submit(bus, job_id):
    bus.publish("cesar/jobs", json.dumps({"job_id": job_id, "audio_path": "speech.wav"}))


def test_every_automation_runs_once_for_each_job_over_restarts(own_house, serve, bus, broker):
    births = 0

    def until_born():
        nonlocal births
        births += 1
        bus.wait("homeassistant/status", lambda said: said == b"online", number=births)

    def restart_home_assistant():
        own_house.stop()
        own_house.start()
        until_born()

    def restart_broker():
        assert own_house.complaints() == []
        broker.restart()
        until_born()
        assert all("mqtt" in complaint for complaint in own_house.complaints()), "it lost its connection"

    def restart_consumer():
        consumer.stop()
        consumer.start()

    consumer = serve()
    until_born()
    submit(bus, "first")
    own_house.wait("notification", "cesar_first")
    for number, restart in enumerate((restart_home_assistant, restart_broker, restart_consumer), start=1):
        bus.publish("cesar/request/pause", b"")
        bus.wait("cesar/response/pause", number=number)
        bus.publish("house/recorded", "speech.wav")
        bus.wait("cesar/events", lambda event: b'"blueprint-' in event and b'"queued"' in event, number=number)
        restart()
        bus.publish("cesar/request/resume", b"")
        own_house.wait("blueprint", "", number=number)
        submit(bus, f"after-{number}")
        own_house.wait("notification", f"cesar_after-{number}")
    own_house.stop()
    submit(bus, "away")
    bus.wait("cesar/consumer/cesar/last", lambda last: b'"away"' in last)
    own_house.start()
    until_born()
    own_house.wait("notification", "cesar_away")
    submit(bus, "last")
    own_house.wait("notification", "cesar_last")
    own_house.wait("phone", "", number=8)
    own_house.stop()

    jobs = ("first", "after-1", "after-2", "after-3", "away", "last")
    assert own_house.of("notification") == [f"cesar_{job}" for job in jobs]
    assert [HEARD in text.lower() for text in own_house.of("blueprint")] == [True] * 3
    assert [HEARD in text.lower() for text in own_house.of("phone")] == [True] * 8, (
        "all but the one that ended meanwhile"
    )
    triggered = own_house.of("triggered")
    assert {name: triggered.count(name) for name in (PHONE, PACKAGE, "notes")} == {PHONE: 8, PACKAGE: 6, "notes": 6}
    assert own_house.complaints() == []
