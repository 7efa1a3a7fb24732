# mypy: ignore-errors
"""Every YAML that a page shows for Home Assistant, loaded into it and triggered there."""

import json
import shutil
import threading
import wave
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from homeassistant.components.folder_watcher.const import DOMAIN as FOLDER_WATCHER
from homeassistant.config import async_hass_config_yaml
from homeassistant.config_entries import ConfigEntryState
from homeassistant.core import Context, callback
from homeassistant.core_config import async_process_ha_core_config
from homeassistant.helpers import config_validation as cv
from homeassistant.helpers.script import Script
from homeassistant.helpers.template import Template
from homeassistant.setup import async_setup_component
from homeassistant.util.yaml import parse_yaml
from pytest_homeassistant_custom_component.common import MockConfigEntry
from tests.homeassistant.pages import ROOT, SHOWN, shown

DATA = ROOT / "tests" / "data"
HEARD = "call the plumber"

TRIGGERED = {
    "deploy/home-assistant-addon/cesar_mqtt/DOCS.md: Submit a recording",
    "docs/homeassistant.md: A dashboard card",
    "docs/homeassistant.md: Blueprint or package",
    "docs/homeassistant.md: Doorbell",
    "docs/homeassistant.md: Frigate",
    "docs/homeassistant.md: Notify a phone",
    "docs/homeassistant.md: Start",
    "docs/homeassistant.md: Submit a job with all options",
}
"""Each has a test below."""


def test_every_yaml_of_every_page_has_a_test():
    assert {where for where, _ in SHOWN} == TRIGGERED


@pytest.fixture
async def served(house, serve, frigate, tmp_path):
    """A consumer whose audio directories have a recording called porch.wav; what the scripts submit is short."""
    for name in ("porch.wav", "doorbell.wav"):
        shutil.copy(DATA / "speech.wav", tmp_path / name)
    serve(CESAR_AUDIO__ALLOWED_HOSTS=json.dumps([frigate.host]))
    await house.until_state("binary_sensor.cesar_connection", "on")
    await house.until_state("sensor.cesar_activity", "idle")
    return house


def calls(house, domain, service):
    """Offer an action, and collect what it is called with."""
    collected = []
    house.hass.services.async_register(domain, service, callback(lambda call: collected.append(dict(call.data))))
    return collected


async def act(house, text):
    """Run the actions as the developer tools do."""
    sequence = cv.SCRIPT_SCHEMA([parse_yaml(text)])
    await Script(house.hass, sequence, "shown", "script").async_run(context=Context())


async def automate(house, *texts):
    configs = [parse_yaml(text) for text in texts]
    assert await async_setup_component(house.hass, "automation", {"automation": configs})
    await house.hass.async_block_till_done()
    states = house.hass.states.async_all("automation")
    assert [state.state for state in states] == ["on"] * len(configs)
    await house.until_subscribed()


def fires(house):
    """The automations that are triggered from now on."""
    seen = []
    house.hass.bus.async_listen("automation_triggered", callback(lambda event: seen.append(event.data["name"])))
    return seen


def ended(house):
    """Type and job of the last event, which automations are triggered by as well."""
    attributes = house.attributes("event.cesar_job")
    return attributes.get("event_type"), attributes.get("job_id")


async def submit(house, bus, job_id, path="porch.wav", **fields):
    request = json.dumps({"job_id": job_id, "audio_path": path, **fields})
    await house.hass.async_add_executor_job(bus.publish, "cesar/jobs", request)


@pytest.mark.parametrize(
    ("heading", "page"),
    [
        ("Start", "docs/homeassistant.md"),
        ("Submit a job with all options", "docs/homeassistant.md"),
        ("Submit a recording", "deploy/home-assistant-addon/cesar_mqtt/DOCS.md"),
    ],
)
async def test_an_action_that_submits_ends_in_a_transcript(served, heading, page):
    await act(served, shown(heading, page=page))
    await served.until(lambda: HEARD in served.state("sensor.cesar_last_transcript"), "the transcript")


@pytest.mark.broker_restarts
async def test_the_phone_gets_each_transcript_once_over_restarts(served, bus, broker, tmp_path):
    sent = calls(served, "notify", "mobile_app_telephone")
    await automate(served, shown("Notify a phone"))
    fired = fires(served)

    config = json.dumps({"automation": [parse_yaml(shown("Notify a phone"))]})  # for the reload
    (tmp_path / "configuration.yaml").write_text(config)

    async def received(number):
        await submit(served, bus, f"job-{number}")
        await served.until(lambda: len(sent) >= number, f"message {number}")

    await received(1)
    await served.connect_again()
    await served.hass.services.async_call("automation", "reload", blocking=True)
    await served.until_subscribed()
    await served.until_state("binary_sensor.cesar_connection", "on")
    await received(2)
    await served.restart(broker)
    await served.until_state("binary_sensor.cesar_connection", "on")
    await submit(served, bus, "failed", "missing.wav")  # neither this notifies nor silence
    with wave.open(str(tmp_path / "silent.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(3 * 32_000))
    await submit(served, bus, "silent", "silent.wav")
    await served.until_state("sensor.cesar_last_transcript", "no speech")
    await received(3)
    assert fired == ["Send transcripts to a phone"] * 3
    assert all(HEARD in message["message"].lower() for message in sent)
    assert len(sent) == 3


async def test_every_entity_of_the_card_is_there_and_its_text_is_the_transcript(served, bus):
    card = parse_yaml(shown("A dashboard card"))
    entities, markdown = card["cards"]
    assert (card["type"], entities["type"], markdown["type"]) == ("vertical-stack", "entities", "markdown")
    for entity in entities["entities"]:
        await served.until(lambda wanted=entity: served.state(wanted) is not None, entity)
    template = Template(markdown["content"], served.hass)
    assert "No transcript yet" in template.async_render(parse_result=False)
    await submit(served, bus, "one")
    await served.until(lambda: HEARD in served.state("sensor.cesar_last_transcript"), "the transcript")
    text = template.async_render(parse_result=False)
    assert text.startswith("**porch.wav**")
    assert HEARD in text.lower()


async def test_the_doorbell_s_recording_is_transcribed(served, tmp_path, bus):
    recorded = calls(served, "camera", "record")

    @callback
    def record(call):
        """What the camera integration does, with a recording from elsewhere."""
        recorded.append(dict(call.data))
        shutil.copy(DATA / "speech.wav", tmp_path / Path(call.data["filename"]).name)

    served.hass.services.async_register("camera", "record", record)
    await automate(served, shown("Doorbell"))
    fired = fires(served)
    for state in ("off", "on", "off"):
        served.hass.states.async_set("binary_sensor.doorbell", state)
    await served.until(lambda: HEARD in served.state("sensor.cesar_last_transcript"), "the transcript")
    await served.until(lambda: served.attributes("event.cesar_job").get("event_type") == "completed", "the event")
    assert fired == ["Transcribe the doorbell"]
    (record_data,) = recorded
    assert (record_data["entity_id"], record_data["duration"]) == (["camera.doorbell"], 15)
    assert record_data["filename"].startswith("/media/voice-notes/doorbell-")
    assert served.attributes("event.cesar_job")["metadata"] == {"room": "door"}


class Frigate:
    """The part of Frigate's HTTP API that the recipe uses."""

    def __init__(self):
        self.described = []
        frigate = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self):
                clip = (DATA / "speech.wav").read_bytes()
                self.send_response(200 if self.path == "/api/events/1718987129.308396-fqk5ka/clip.mp4" else 404)
                self.send_header("Content-Length", str(len(clip)))
                self.end_headers()
                self.wfile.write(clip)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                frigate.described.append((self.path, json.loads(body)))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                """Keep quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        self._thread = threading.Thread(target=self.server.serve_forever)
        self._thread.start()

    def close(self):
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@pytest.fixture
def frigate(socket_enabled):
    started = Frigate()
    yield started
    started.close()


async def test_what_frigate_hears_comes_back_to_it_as_text(served, bus, frigate):
    text = shown("Frigate").replace("frigate.home.arpa:5000", frigate.host)
    config = parse_yaml(text)
    for domain in config:
        assert await async_setup_component(served.hass, domain, config), domain
    await served.hass.async_block_till_done()
    await served.until_subscribed()
    fired = fires(served)
    heard = {"id": "1718987129.308396-fqk5ka", "camera": "porch", "label": "speech", "has_clip": True}
    for kind, after in (("new", heard), ("end", {**heard, "label": "person"}), ("end", heard), ("end", heard)):
        message = json.dumps({"type": kind, "before": after, "after": after})
        await served.hass.async_add_executor_job(bus.publish, "frigate/events", message)
    await served.until(lambda: bool(frigate.described), "the text in Frigate")
    ((path, body),) = frigate.described
    assert path == f"/api/events/{heard['id']}/description"
    assert HEARD in body["description"].lower()
    await submit(served, bus, "another")
    await served.until(lambda: ended(served) == ("completed", "another"), "the event of the last job")
    assert fired.count("Give the text back to Frigate") == 1
    assert fired.count("Transcribe the speech that Frigate hears") == 2


async def test_a_new_file_in_a_folder_that_may_be_watched_runs_the_blueprint(served, tmp_path):
    """With Home Assistant's own Folder watcher, which refuses a folder outside of the list."""
    folder = tmp_path / "voice-notes"
    folder.mkdir()
    allowed = parse_yaml(shown("Blueprint or package").replace("/share/voice-notes", str(folder)))
    await async_process_ha_core_config(served.hass, allowed["homeassistant"])
    assert served.hass.config.is_allowed_path(str(folder / "note.wav"))
    assert not served.hass.config.is_allowed_path(str(tmp_path / "elsewhere" / "note.wav"))
    target = tmp_path / "blueprints" / "automation" / "cesar-mqtt" / "cesar_transcribe.yaml"
    target.parent.mkdir(parents=True)
    shutil.copy(ROOT / "deploy" / "home-assistant" / "blueprints" / "cesar_transcribe.yaml", target)
    trigger = {"trigger": "event", "event_type": "folder_watcher", "event_data": {"event_type": "closed"}}
    actions = [{"event": "told", "event_data": {"said": "{{ text }}"}}]
    inputs = {"trigger_input": [trigger], "actions_input": actions}
    told = []
    served.hass.bus.async_listen("told", callback(lambda event: told.append(event.data["said"])))
    used = {"path": "cesar-mqtt/cesar_transcribe.yaml", "input": inputs}
    await automate(served, json.dumps({"id": "notes", "alias": "notes", "use_blueprint": used}))
    entry = MockConfigEntry(
        domain=FOLDER_WATCHER, title="notes", options={"folder": str(folder), "patterns": ["*.wav"]}
    )
    entry.add_to_hass(served.hass)
    assert await served.hass.config_entries.async_setup(entry.entry_id)
    assert entry.state is ConfigEntryState.LOADED
    shutil.copy(DATA / "speech.wav", folder / "note.wav")
    await served.until(lambda: bool(told), "the transcript")
    assert HEARD in told[0].lower()
    await served.hass.config_entries.async_unload(entry.entry_id)


async def test_the_package_is_included_as_the_page_says(served, tmp_path):
    (tmp_path / "packages").mkdir()
    package = ROOT / "deploy" / "home-assistant" / "package.yaml"
    shutil.copy(package, tmp_path / "packages" / "cesar_mqtt.yaml")
    (tmp_path / "configuration.yaml").write_text(shown("Blueprint or package", 1))
    config = await async_hass_config_yaml(served.hass)
    assert set(parse_yaml(package.read_text())) <= set(config)
    assert "cesar_transcribe_file" in config["script"]
