# mypy: ignore-errors
"""What a user sees in Home Assistant. Each test also fails when Home Assistant logs a warning."""

import json
import time
from functools import partial

import pytest
from homeassistant.core import callback
from homeassistant.util import dt as dt_util

ENTITIES = {
    "binary_sensor.cesar_connection": "on",
    "sensor.cesar_activity": "idle",
    "sensor.cesar_queue_length": "0",
    "sensor.cesar_completed": "0",
    "sensor.cesar_errors": "0",
    "sensor.cesar_cancelled": "0",
    "sensor.cesar_rejected": "0",
    "sensor.cesar_last_transcript": "unknown",
    "sensor.cesar_last_error": "unknown",
    "sensor.cesar_last_rejection": "unknown",
    "sensor.cesar_progress": "unknown",
    "sensor.cesar_ready_at": "unknown",
    "sensor.cesar_current_recording": "unknown",
    "sensor.cesar_oldest_waiting": "0",
    "sensor.cesar_computes_on": "cpu int8",
    "sensor.cesar_length_of_the_last_recording": "unknown",
    "event.cesar_job": "unknown",
    "notify.cesar_transcribe": "unknown",
    "switch.cesar_pause": "off",
    "button.cesar_cancel_current_job": "unavailable",
    "button.cesar_cancel_all_jobs": "unavailable",
    "button.cesar_retry_last_failure": "unavailable",
    "select.cesar_default_language": "auto",
    "select.cesar_default_model": "tiny.en",
}
MEASURED = {"sensor.cesar_free_space", "sensor.cesar_memory", "sensor.cesar_started"}
"""Their states differ from run to run."""
HEARD = "call the plumber"
MOST_RECORDED_BYTES = 16_384  # of attributes
DEVICE = "homeassistant/device/cesar-mqtt_cesar/config"


def shows(house, states):
    return lambda: {entity: house.state(entity) for entity in states} == states


def events(house):
    """The events of jobs that come from now on: type and id of the job."""
    seen = []

    @callback
    def note(event):
        state = event.data["new_state"]
        if event.data["entity_id"] == "event.cesar_job" and state is not None and "job_id" in state.attributes:
            seen.append((state.attributes["event_type"], state.attributes["job_id"]))

    house.hass.bus.async_listen("state_changed", note)
    return seen


async def seen_by(house, bus, topic, when=bool, **how):
    """Wait for a message without keeping Home Assistant from its work."""
    return await house.hass.async_add_executor_job(partial(bus.wait, topic, when, **how))


@pytest.mark.parametrize("mode", ["device", "component"])
async def test_every_entity_appears_with_its_state(house, serve, mode):
    serve(CESAR_HOMEASSISTANT__DISCOVERY=mode)
    await house.until(shows(house, ENTITIES), "every entity")
    await house.until(lambda: set(house.entities()) == set(ENTITIES) | MEASURED, "each entity, and no other")
    for entity in ("sensor.cesar_free_space", "sensor.cesar_memory"):
        await house.until_number(entity, 0.001)
    await house.until(lambda: dt_util.parse_datetime(house.state("sensor.cesar_started")) is not None, "the start")
    (device,) = house.devices()
    assert (device.name, device.manufacturer, device.model) == ("cesar", "cesar-mqtt", "Transcription worker")
    assert "processing" in house.attributes("sensor.cesar_activity")["options"]


async def test_a_path_that_is_notified_becomes_a_transcript_and_an_event(house, serve):
    serve()
    await house.until(shows(house, ENTITIES), "every entity")
    seen = events(house)
    await house.call("notify", "send_message", "notify.cesar_transcribe", message="speech.wav")
    await house.until_state("sensor.cesar_completed", "1")
    await house.until(lambda: HEARD in house.state("sensor.cesar_last_transcript"), "the transcript")
    attributes = house.attributes("sensor.cesar_last_transcript")
    job_id = attributes["job_id"]
    assert HEARD in attributes["text"]
    assert (attributes["language"], attributes["text_truncated"]) == (None, False), "the model knows English only"
    await house.until(lambda: len(seen) >= 3, "three events")
    assert seen == [("queued", job_id), ("processing", job_id), ("completed", job_id)]
    assert HEARD in house.attributes("event.cesar_job")["text"]


async def test_any_text_that_is_notified_is_valid_json_and_its_failure_is_shown(house, serve, bus):
    serve()
    await house.until(shows(house, ENTITIES), "every entity")
    awkward = 'it\'s "quoted" {{ 1 + 1 }} \\ <b>\n\N{SNOWMAN}\N{GRINNING FACE} ' + "long " * 80
    await house.call("notify", "send_message", "notify.cesar_transcribe", message=awkward.strip())
    assert json.loads(await seen_by(house, bus, "cesar/jobs")) == {"audio_path": awkward.strip()}
    await house.until_state("sensor.cesar_errors", "1")
    await house.until(lambda: house.state("sensor.cesar_last_error") != "unknown", "the error")
    attributes = house.attributes("sensor.cesar_last_error")
    assert attributes["error_code"] == "audio_not_found"
    assert house.state("sensor.cesar_last_error") == attributes["error_message"][:255]
    await house.call("notify", "send_message", "notify.cesar_transcribe", message="speech.wav")
    await house.until_state("sensor.cesar_completed", "1")
    assert house.attributes("sensor.cesar_last_error")["job_id"] == attributes["job_id"], "it stays"


async def test_a_url_that_is_notified_is_sent_as_one(house, serve, bus):
    serve()
    await house.until(shows(house, ENTITIES), "every entity")
    await house.call("notify", "send_message", "notify.cesar_transcribe", message="https://example.org/a.mp3")
    assert json.loads(await seen_by(house, bus, "cesar/jobs")) == {"audio_url": "https://example.org/a.mp3"}
    await house.until_state("sensor.cesar_errors", "1")


@pytest.mark.parametrize(
    ("said", "request_"),
    [
        ("  HTTP://example.org/a.mp3\n", {"audio_url": "HTTP://example.org/a.mp3"}),
        (" notes/a b.wav ", {"audio_path": "notes/a b.wav"}),
        ('{"audio_path": "a.wav", "language": "en"}', {"audio_path": "a.wav", "language": "en"}),
    ],
)
async def test_blanks_any_case_and_objects_may_be_notified(house, serve, bus, said, request_):
    serve()
    await house.until(shows(house, ENTITIES), "every entity")
    await house.call("notify", "send_message", "notify.cesar_transcribe", message=said)
    assert json.loads(await seen_by(house, bus, "cesar/jobs")) == request_
    await house.until_state("sensor.cesar_errors", "1")


async def test_a_running_job_shows_its_recording_its_progress_and_its_end(house, serve, repeated):
    recording = repeated(3)
    serve()
    await house.until(shows(house, ENTITIES), "every entity")
    shown = []

    @callback
    def note(event):
        state = event.data["new_state"]
        if state is not None and event.data["entity_id"] in {"sensor.cesar_progress", "sensor.cesar_ready_at"}:
            shown.append((event.data["entity_id"], state.state))

    house.hass.bus.async_listen("state_changed", note)
    await house.call("notify", "send_message", "notify.cesar_transcribe", message=recording)
    await house.until_state("sensor.cesar_current_recording", recording)
    await house.until_state("sensor.cesar_completed", "1")
    await house.until_state("sensor.cesar_current_recording", "unknown")
    percent = [float(state) for entity, state in shown if entity == "sensor.cesar_progress" and state != "unknown"]
    assert percent
    assert percent == sorted(percent)
    assert max(percent) <= 100
    ends = [state for entity, state in shown if entity == "sensor.cesar_ready_at" and state != "unknown"]
    assert ends
    assert all(abs(dt_util.parse_datetime(end).timestamp() - time.time()) < 600 for end in ends)
    await house.until_state("sensor.cesar_progress", "unknown")
    await house.until_state("sensor.cesar_ready_at", "unknown")
    await house.until_number("sensor.cesar_length_of_the_last_recording", 60)


async def test_the_last_transcript_and_the_last_error_survive_a_restart(house, serve):
    serve()
    await house.until(shows(house, ENTITIES), "every entity")
    for message in ("speech.wav", "missing.wav"):
        await house.call("notify", "send_message", "notify.cesar_transcribe", message=message)
    await house.until(lambda: HEARD in house.state("sensor.cesar_last_transcript"), "the transcript")
    await house.until(lambda: "missing.wav" in house.state("sensor.cesar_last_error"), "the error")
    for entity in ("sensor.cesar_last_transcript", "sensor.cesar_last_error"):
        house.hass.states.async_set(entity, "unknown")
    await house.connect_again()
    await house.until(lambda: HEARD in house.state("sensor.cesar_last_transcript"), "the transcript again")
    await house.until(lambda: "missing.wav" in house.state("sensor.cesar_last_error"), "the error again")
    assert house.attributes("sensor.cesar_last_error")["audio_source"] == "missing.wav"


async def test_what_a_failed_job_needs_can_be_put_there_and_the_job_retried(house, serve):
    serve()
    await house.until(shows(house, ENTITIES), "every entity")
    await house.call("switch", "turn_on", "switch.cesar_pause")
    await house.until_state("switch.cesar_pause", "on")
    for _ in range(2):
        await house.call("notify", "send_message", "notify.cesar_transcribe", message="speech.wav")
    await house.until_state("sensor.cesar_queue_length", "2")
    await house.until_state("button.cesar_cancel_all_jobs", "unknown")
    await house.call("button", "press", "button.cesar_cancel_all_jobs")
    await house.until_state("sensor.cesar_cancelled", "2")
    await house.call("switch", "turn_off", "switch.cesar_pause")
    await house.until_state("button.cesar_retry_last_failure", "unknown")
    for number in (1, 2):
        await house.call("button", "press", "button.cesar_retry_last_failure")
        await house.until_state("sensor.cesar_completed", str(number))
    await house.until_state("button.cesar_retry_last_failure", "unavailable")


async def test_the_defaults_of_jobs_can_be_chosen(house, serve, bus):
    serve()
    await house.until(shows(house, ENTITIES), "every entity")
    assert "base" in house.attributes("select.cesar_default_model")["options"]
    await house.call("select", "select_option", "select.cesar_default_language", option="en")
    await house.until_state("select.cesar_default_language", "en")
    await house.call("select", "select_option", "select.cesar_default_model", option="base")
    await house.until_state("select.cesar_default_model", "base")


async def test_a_consumer_that_announces_no_more_leaves_nothing(house, serve):
    consumer = serve()
    await house.until(shows(house, ENTITIES), "every entity")
    consumer.stop()
    consumer.start(CESAR_HOMEASSISTANT__ENABLED="false")
    await house.until(lambda: not house.entities() and not house.devices(), "nothing")


@pytest.mark.parametrize(
    ("changed", "ids"),
    [
        ({"CESAR_CONSUMER__NAME": "attic"}, "cesar_attic"),
        ({"CESAR_TOPIC_PREFIX": "voices"}, "cesar"),
        ({"CESAR_HOMEASSISTANT__PREFIX": "homeassistant/house"}, None),
    ],
)
async def test_a_changed_name_or_prefix_leaves_nothing(house, serve, bus, changed, ids):
    consumer = serve()
    await house.until(shows(house, ENTITIES), "every entity")
    await house.call("notify", "send_message", "notify.cesar_transcribe", message="speech.wav")
    await house.until_state("sensor.cesar_completed", "1")
    consumer.stop()
    await house.until_state("binary_sensor.cesar_connection", "off")
    consumer.start(**changed)
    if ids is None:
        await house.until(lambda: not house.entities() and not house.devices(), "nothing")
    else:
        connection = f"binary_sensor.{ids}_connection"
        theirs = {entity.replace(".cesar_", f".{ids}_") for entity in {*ENTITIES, *MEASURED}}
        await house.until(lambda: set(house.entities()) == theirs, "the entities of the new name, and no other")
        await house.until(lambda: len(house.devices()) == 1 and house.state(connection) == "on", "one device")
    consumer.stop()
    await house.hass.async_add_executor_job(consumer.command, "discovery", "remove", "--all")
    await house.until(lambda: not house.entities() and not house.devices(), "nothing")
    assert await house.hass.async_add_executor_job(bus.retained_topics) == []


async def test_a_restart_shows_no_stop(house, serve):
    consumer = serve()
    await house.until(shows(house, ENTITIES), "every entity")
    consumer.stop()
    await house.until_state("binary_sensor.cesar_connection", "off")
    seen = []

    @callback
    def note(event):
        if event.data["entity_id"] == "sensor.cesar_activity" and event.data["new_state"] is not None:
            seen.append(event.data["new_state"].state)

    house.hass.bus.async_listen("state_changed", note)
    consumer.start()
    await house.until(shows(house, ENTITIES), "every entity")
    assert "draining" not in seen


async def test_a_long_transcript_is_cut_in_the_state_and_whole_in_the_attribute(house, serve, repeated):
    serve()
    await house.until(shows(house, ENTITIES), "every entity")
    await house.call("notify", "send_message", "notify.cesar_transcribe", message=repeated(3))
    await house.until_state("sensor.cesar_completed", "1")
    await house.until(lambda: house.state("sensor.cesar_last_transcript") != "unknown", "the transcript")
    shown, attributes = house.state("sensor.cesar_last_transcript"), house.attributes("sensor.cesar_last_transcript")
    assert len(shown) in {254, 255}  # a blank at the end is left out
    assert attributes["text"].startswith(shown)
    assert len(attributes["text"].split()) > 300
    assert len(json.dumps(attributes, default=str)) < MOST_RECORDED_BYTES
    # A job without a transcript leaves the last one as it is.
    await house.call("notify", "send_message", "notify.cesar_transcribe", message="missing.wav")
    await house.until_state("sensor.cesar_errors", "1")
    await house.until(lambda: house.state("sensor.cesar_last_error") != "unknown", "the error")
    assert house.state("sensor.cesar_last_transcript") == shown
    assert house.attributes("sensor.cesar_last_transcript")["text"] == attributes["text"]


async def test_the_switch_pauses_and_the_button_cancels(house, serve, repeated):
    recording = repeated(30)  # runs for as long as the button takes on a busy machine
    serve()
    await house.until(shows(house, ENTITIES), "every entity")
    await house.call("switch", "turn_on", "switch.cesar_pause")
    await house.until_state("switch.cesar_pause", "on")
    await house.until_state("sensor.cesar_activity", "paused")
    await house.call("notify", "send_message", "notify.cesar_transcribe", message=recording)
    await house.until_state("sensor.cesar_queue_length", "1")
    await house.call("switch", "turn_off", "switch.cesar_pause")
    await house.until_state("sensor.cesar_activity", "processing")
    assert house.state("switch.cesar_pause") == "off"
    await house.until_state("button.cesar_cancel_current_job", "unknown")
    await house.call("button", "press", "button.cesar_cancel_current_job")
    await house.until_state("sensor.cesar_cancelled", "1")
    await house.until(lambda: house.attributes("event.cesar_job").get("event_type") == "cancelled", "the event")


async def test_a_consumer_that_is_gone_is_shown_as_such(house, serve):
    consumer = serve()
    await house.until(shows(house, ENTITIES), "every entity")
    consumer.kill()
    await house.until_state("binary_sensor.cesar_connection", "off")
    await house.until_state("switch.cesar_pause", "unavailable")
    assert house.state("sensor.cesar_last_transcript") == "unknown"  # it can still be read
    assert house.state("notify.cesar_transcribe") == "unknown"  # the broker keeps what is sent
    consumer.start()
    await house.until(shows(house, ENTITIES), "every entity")


async def test_home_assistant_is_told_again_when_it_has_started(house, serve, bus):
    serve()
    await house.until(shows(house, ENTITIES), "every entity")
    bus.publish(DEVICE, b"", retain=True)
    await house.until(lambda: not house.entities(), "no entity")
    await house.connect_again()
    await house.until(shows(house, ENTITIES), "every entity")


@pytest.mark.parametrize("modes", [("device", "component"), ("component", "device")])
async def test_the_way_of_announcing_can_be_changed(house, serve, bus, modes):
    before, after = modes
    consumer = serve(CESAR_HOMEASSISTANT__DISCOVERY=before)
    await house.until(shows(house, ENTITIES), "every entity")
    await house.until(lambda: set(house.entities()) == set(ENTITIES) | MEASURED, "each entity, and no other")
    ids = house.entities()
    consumer.stop()
    first = await seen_by(house, bus, "cesar/consumer/cesar/state", lambda said: b"offline" in said)
    assert first
    consumer.start(CESAR_HOMEASSISTANT__DISCOVERY=after)
    await house.until(lambda: not house.entities(), "no entity")
    await house.until(shows(house, ENTITIES), "every entity")
    await house.until(lambda: house.entities() == ids, "each entity with its former id")
    await house.until(lambda: len(house.devices()) == 1, "one device")


@pytest.mark.parametrize("mode", ["device", "component"])
async def test_what_is_removed_leaves_nothing(house, serve, mode):
    consumer = serve(CESAR_HOMEASSISTANT__DISCOVERY=mode)
    await house.until(shows(house, ENTITIES), "every entity")
    await house.until(lambda: set(house.entities()) == set(ENTITIES) | MEASURED, "each entity, and no other")
    consumer.stop()
    said = await house.hass.async_add_executor_job(consumer.command, "discovery", "remove")
    assert said.count("removed ") == (1 if mode == "device" else len(ENTITIES) + len(MEASURED))
    await house.until(lambda: not house.entities() and not house.devices(), "nothing")
    await house.until(
        lambda: not [name for name in house.hass.states.async_entity_ids() if "cesar" in name], "no state"
    )
    await house.connect_again()
    await house.until_born()
    assert not house.entities()


async def test_consumers_side_by_side_are_devices_side_by_side(house, serve):
    serve()
    serve("kitchen", CESAR_TOPIC_PREFIX="kitchen")
    serve("attic", CESAR_CONSUMER__GROUP="house")
    await house.until(shows(house, ENTITIES), "every entity of the first")
    for name in ("kitchen", "attic"):
        theirs = {entity.replace("cesar", f"cesar_{name}"): state for entity, state in ENTITIES.items()}
        await house.until(shows(house, theirs), f"every entity of the one called {name}")
    await house.until(lambda: len(house.entities()) == 3 * (len(ENTITIES) + len(MEASURED)), "each of their entities")
    assert sorted(device.name for device in house.devices()) == ["cesar", "cesar attic", "cesar kitchen"]
