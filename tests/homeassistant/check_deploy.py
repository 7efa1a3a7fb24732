# mypy: ignore-errors
"""The package and the blueprint of `deploy/`, loaded and run by Home Assistant. A warning of its fails the test."""

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from homeassistant.components import persistent_notification
from homeassistant.core import callback
from homeassistant.setup import async_setup_component
from homeassistant.util import dt as dt_util
from homeassistant.util.yaml import load_yaml
from pytest_homeassistant_custom_component.common import async_fire_time_changed

DEPLOY = Path(__file__).parents[2] / "deploy" / "home-assistant"
DATA = Path(__file__).parents[1] / "data"
BLUEPRINT = "cesar-mqtt/cesar_transcribe.yaml"
NEW_FILE = [{"trigger": "event", "event_type": "folder_watcher", "event_data": {"event_type": "closed"}}]
HEARD = "call the plumber"


def notifications(house):
    """What is shown, by title."""
    shown = persistent_notification._async_get_or_create_notifications(house.hass).values()
    return {notification["title"]: notification["message"] for notification in shown}


def shown(house, title, text):
    return lambda: text.lower() in notifications(house).get(title, "").lower()


async def served(house, serve):
    """Start a consumer; before its first connection no broker holds anything for it."""
    serve()
    await house.until_state("binary_sensor.cesar_connection", "on")


@pytest.fixture(autouse=True)
async def _shows_notifications(house):
    assert await async_setup_component(house.hass, "persistent_notification", {})


async def loaded(house, *automations):
    """Load the package, beside other automations."""
    config = load_yaml(str(DEPLOY / "package.yaml"))
    config["automation"] = [*config["automation"], *automations]
    await configured(house, config)


def write(path, config):
    Path(path).write_text(json.dumps(config))


async def configured(house, config):
    """Load a configuration, also for a reload. JSON is YAML."""
    write(house.hass.config.path("configuration.yaml"), config)
    for domain in config:
        assert await async_setup_component(house.hass, domain, config), domain
    await house.hass.async_block_till_done()
    await house.until_subscribed()


@pytest.fixture
async def packaged(house, serve):
    """Home Assistant with the package, and a consumer."""
    await served(house, serve)
    await loaded(house)
    return house


def created(house):
    """The ids of the notifications that are shown from now on."""
    seen = []

    @callback
    def note(event):
        if (event.data["domain"], event.data["service"]) == ("persistent_notification", "create"):
            seen.append(event.data["service_data"].get("notification_id"))

    house.hass.bus.async_listen("call_service", note)
    return seen


def submit(bus, job_id, path="speech.wav", **fields):
    bus.publish("cesar/jobs", json.dumps({"job_id": job_id, "audio_path": path, **fields}))


@pytest.fixture
def blueprinted(house, tmp_path):
    """Set an automation up from the blueprint."""

    async def set_up(*, with_package=False, **inputs):
        target = tmp_path / "blueprints" / "automation" / BLUEPRINT
        target.parent.mkdir(parents=True)
        shutil.copy(DEPLOY / "blueprints" / "cesar_transcribe.yaml", target)
        used = {"path": BLUEPRINT, "input": {"trigger_input": NEW_FILE, **inputs}}
        automation = {"id": "notes", "alias": "notes", "use_blueprint": used}
        if with_package:
            await loaded(house, automation)
        else:
            await configured(house, {"automation": [automation]})
        assert house.state("automation.notes") == "on"

    async def load_again():
        await house.hass.services.async_call("automation", "reload", blocking=True)
        assert house.state("automation.notes") == "on"
        await house.until_subscribed()

    set_up.reload = load_again
    return set_up


async def test_the_packages_script_ends_in_a_notification_with_the_transcript(packaged):
    await packaged.hass.services.async_call("script", "cesar_transcribe_file", {"path": "speech.wav", "room": "Porch"})
    await packaged.until(shown(packaged, "Transcript: Porch", HEARD), "the notification")
    await packaged.until_state("sensor.transcripts_waiting", "0")


async def test_the_packages_automation_tells_what_went_wrong(packaged):
    await packaged.hass.services.async_call("script", "cesar_transcribe_file", {"path": "not-there.wav"})
    await packaged.until(
        lambda: any("Not transcribed: " in message for message in notifications(packaged).values()), "the notification"
    )


async def test_the_blueprint_turns_a_new_file_into_a_notification(house, serve, blueprinted):
    await served(house, serve)
    await blueprinted(title_input="Voice note")
    house.hass.bus.async_fire("folder_watcher", {"event_type": "closed", "path": str(DATA / "speech.wav")})
    await house.until(shown(house, "Voice note", HEARD), "the notification")


async def test_the_blueprint_tells_of_a_file_that_is_not_there_and_runs_what_it_was_given(house, serve, blueprinted):
    await served(house, serve)
    action = {"event": "told", "event_data": {"said": "{{ text }}", "of": "{{ title }}"}}
    told = []
    house.hass.bus.async_listen("told", callback(lambda event: told.append(event.data)))
    await blueprinted(title_input="Doorbell", actions_input=[action], language_input="en")
    house.hass.bus.async_fire("folder_watcher", {"event_type": "closed", "path": str(DATA / "not-there.wav")})
    await house.until(lambda: bool(told), "the action")
    assert told[0]["of"] == "Doorbell"
    assert told[0]["said"].startswith("Not transcribed: ")


async def test_the_blueprint_gives_up_after_the_time_it_was_given(house, blueprinted):
    await blueprinted(title_input="Nobody there", timeout_input={"seconds": 1})
    house.hass.bus.async_fire("folder_watcher", {"event_type": "closed", "path": "x.wav"})
    await house.until(shown(house, "Nobody there", "No transcript came in time"), "the notification")


async def test_the_package_shows_a_job_once_of_which_two_messages_tell_at_once(house, serve, bus):
    await served(house, serve)
    await loaded(house)
    await house.hass.async_add_executor_job(lambda: submit(bus, "first", metadata={"room": "Porch"}))
    await house.until(shown(house, "Transcript: Porch", HEARD), "the notification")
    seen = created(house)

    def publish_another():
        for topic in ("cesar/events", "cesar/consumer/cesar/last"):
            told = bus.wait(topic, lambda payload: b"call the plumber" in payload)
            bus.publish(topic, told.replace(b"first", b"second"), wait=False)

    await house.hass.async_add_executor_job(publish_another)
    await house.hass.async_add_executor_job(submit, bus, "third")
    await house.until(lambda: "cesar_third" in seen, "the notification")
    assert seen == ["cesar_second", "cesar_third"]
    assert list(notifications(house)) == ["Transcript: Porch", "Transcript: speech.wav"]


@pytest.mark.broker_restarts
async def test_the_package_notifies_once_for_each_job_over_restarts(house, serve, bus, broker):
    consumer = serve()
    await house.until_state("binary_sensor.cesar_connection", "on")
    await loaded(house)
    seen = created(house)

    async def shown_once(job_id, path="speech.wav"):
        """A job is shown; by then whatever came before it has been shown, too."""
        await house.hass.async_add_executor_job(submit, bus, job_id, path)
        await house.until(lambda: f"cesar_{job_id}" in seen, f"the notification of {job_id}")

    await shown_once("first")
    await shown_once("failed", "missing.wav")
    await house.connect_again()
    await house.until_subscribed()
    await shown_once("after-home-assistant")
    await house.hass.services.async_call("automation", "reload", blocking=True)
    await house.until_subscribed()
    await house.restart(broker)
    await house.until_state("binary_sensor.cesar_connection", "on")
    await shown_once("after-the-broker")
    await house.hass.async_add_executor_job(consumer.stop)
    consumer.start()
    await house.until_state("binary_sensor.cesar_connection", "on")
    await shown_once("after-the-consumer")
    assert seen == [f"cesar_{name}" for name in SHOWN]


SHOWN = ("first", "failed", "after-home-assistant", "after-the-broker", "after-the-consumer")


async def test_the_package_shows_the_job_that_ended_while_home_assistant_was_away(house, serve, bus):
    serve()
    await house.until_state("binary_sensor.cesar_connection", "on")
    await loaded(house)
    seen = created(house)
    await house.until_born()
    assert await house.hass.config_entries.async_unload(house.entry.entry_id)
    await house.hass.async_add_executor_job(submit, bus, "away")
    await house.hass.async_add_executor_job(bus.wait, "cesar/consumer/cesar/last", lambda last: b'"away"' in last)
    house.births += 1
    assert await house.hass.config_entries.async_setup(house.entry.entry_id)
    await house.hass.services.async_call("automation", "reload", blocking=True)
    await house.until(lambda: "cesar_away" in seen, "the notification")
    await house.hass.async_add_executor_job(submit, bus, "later")
    await house.until(lambda: "cesar_later" in seen, "the notification")
    assert seen == ["cesar_away", "cesar_later"]


async def test_the_notice_that_the_consumer_is_offline_goes_when_it_is_back(house, serve):
    consumer = serve()
    await house.until_state("binary_sensor.cesar_connection", "on")
    await loaded(house)
    await house.hass.async_add_executor_job(consumer.stop)
    await house.until_state("binary_sensor.cesar_connection", "off")
    async_fire_time_changed(house.hass, dt_util.utcnow() + timedelta(minutes=5, seconds=1))
    await house.until(lambda: "Transcription" in notifications(house), "the notice")
    consumer.start()
    await house.until(lambda: "Transcription" not in notifications(house), "no notice")


async def test_package_and_blueprint_show_one_notification_for_a_job_of_the_blueprint(house, serve, blueprinted, bus):
    await served(house, serve)
    await blueprinted(with_package=True)
    seen = created(house)
    house.hass.bus.async_fire("folder_watcher", {"event_type": "closed", "path": str(DATA / "speech.wav")})
    await house.until(shown(house, "Voice note", HEARD), "the notification")
    await house.hass.async_add_executor_job(submit, bus, "another")
    await house.until(lambda: "cesar_another" in seen, "the notification of another job")
    assert seen == [None, "cesar_another"]


@pytest.mark.broker_restarts
async def test_the_blueprint_s_actions_run_once_for_each_job_over_restarts(house, serve, blueprinted, bus, broker):
    consumer = serve()
    await house.until_state("binary_sensor.cesar_connection", "on")
    told = []
    house.hass.bus.async_listen("told", callback(lambda event: told.append(event.data["of"])))
    action = {"event": "told", "event_data": {"of": "{{ title }}: {{ status.audio_source.split('/') | last }}"}}
    await blueprinted(actions_input=[action])

    async def restart_home_assistant():
        await house.connect_again()
        await blueprinted.reload()

    async def restart_broker():
        await house.restart(broker)

    async def restart_consumer():
        await house.hass.async_add_executor_job(consumer.stop)
        consumer.start()

    for number, restart in enumerate((restart_home_assistant, restart_broker, restart_consumer), start=1):
        await house.call("switch", "turn_on", "switch.cesar_pause")
        await house.until_state("switch.cesar_pause", "on")
        path = str(DATA / "speech.wav") if number % 2 else "missing.wav"
        house.hass.bus.async_fire("folder_watcher", {"event_type": "closed", "path": path})
        await house.until_state("sensor.cesar_queue_length", "1")
        await restart()
        await house.until_state("binary_sensor.cesar_connection", "on")
        await house.until_state("switch.cesar_pause", "on")
        await house.call("switch", "turn_off", "switch.cesar_pause")
        await house.until(lambda wanted=number: len(told) >= wanted, "the actions")
    house.hass.bus.async_fire("folder_watcher", {"event_type": "closed", "path": "last.wav"})
    await house.until(lambda: len(told) >= 4, "the actions of one more")
    names = ("speech.wav", "missing.wav", "speech.wav", "last.wav")
    assert told == [f"Voice note: {name}" for name in names]
