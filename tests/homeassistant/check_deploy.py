# mypy: ignore-errors
"""The package and the blueprint of `deploy/`, loaded and run by Home Assistant. A warning of its fails the test."""

import shutil
from pathlib import Path

import pytest
from homeassistant.components import persistent_notification
from homeassistant.core import callback
from homeassistant.setup import async_setup_component
from homeassistant.util.yaml import load_yaml

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


@pytest.fixture
async def packaged(house, serve):
    """Home Assistant with the package, and a consumer."""
    await served(house, serve)
    config = load_yaml(str(DEPLOY / "package.yaml"))
    for domain in config:
        assert await async_setup_component(house.hass, domain, config), domain
    await house.hass.async_block_till_done()
    return house


@pytest.fixture
def blueprinted(house, tmp_path):
    """Set an automation up from the blueprint."""

    async def set_up(**inputs):
        target = tmp_path / "blueprints" / "automation" / BLUEPRINT
        target.parent.mkdir(parents=True)
        shutil.copy(DEPLOY / "blueprints" / "cesar_transcribe.yaml", target)
        used = {"path": BLUEPRINT, "input": {"trigger_input": NEW_FILE, **inputs}}
        config = {"automation": {"id": "notes", "alias": "notes", "use_blueprint": used}}
        assert await async_setup_component(house.hass, "automation", config)
        await house.hass.async_block_till_done()
        assert house.state("automation.notes") == "on"

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
