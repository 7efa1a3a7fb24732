# mypy: ignore-errors
"""Assist in Home Assistant: its own Wyoming integration, and a pipeline that uses it, in front of a real consumer."""

import asyncio
import json
import os
import socket
import subprocess
import wave
from pathlib import Path

import pytest
from homeassistant.components import assist_pipeline, stt
from homeassistant.components.wyoming.data import load_wyoming_info
from homeassistant.core import Context
from homeassistant.helpers import area_registry
from homeassistant.setup import async_setup_component
from pytest_homeassistant_custom_component.common import MockConfigEntry
from tests.homeassistant.conftest import PATIENCE_S

SPEECH = Path(__file__).parents[1] / "data" / "speech.wav"
ENTITY = "stt.cesar_mqtt"
HEARD = "call the plumber"


def metadata() -> stt.SpeechMetadata:
    return stt.SpeechMetadata(
        language="en",
        format=stt.AudioFormats.WAV,
        codec=stt.AudioCodecs.PCM,
        bit_rate=stt.AudioBitRates.BITRATE_16,
        sample_rate=stt.AudioSampleRates.SAMPLERATE_16000,
        channel=stt.AudioChannels.CHANNEL_MONO,
    )


async def spoken():
    with wave.open(str(SPEECH)) as file:
        while samples := file.readframes(320):
            yield samples
    for _ in range(100):
        yield bytes(640)  # the pipeline listens for a silence


async def served_models(port):
    """Wait for the models that the server offers: it listens before it knows them."""
    info = None
    async with asyncio.timeout(PATIENCE_S):
        while info is None or not any(program.models for program in info.asr):
            info = await load_wyoming_info("127.0.0.1", port, retries=0, retry_wait=0.1)
            await asyncio.sleep(0.1)


async def test_assist_hears_through_the_wyoming_server(house, serve):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    serve(CESAR_WYOMING__LISTEN=f"127.0.0.1:{port}")
    await served_models(port)
    hass = house.hass
    assert await async_setup_component(hass, "homeassistant", {})
    entry = MockConfigEntry(domain="wyoming", title="cesar-mqtt", data={"host": "127.0.0.1", "port": port})
    entry.add_to_hass(hass)
    assert await hass.config_entries.async_setup(entry.entry_id)
    await hass.async_block_till_done()

    entity = stt.async_get_speech_to_text_entity(hass, ENTITY)
    assert "en" in entity.supported_languages
    result = await entity.async_process_audio_stream(metadata(), spoken())
    assert result.result is stt.SpeechResultState.SUCCESS
    assert HEARD in result.text.lower()

    pipeline = assist_pipeline.async_get_pipeline(hass)
    await assist_pipeline.async_update_pipeline(hass, pipeline, stt_engine=ENTITY, stt_language="en")
    events = []
    await assist_pipeline.async_pipeline_from_audio_stream(
        hass,
        context=Context(),
        event_callback=events.append,
        stt_metadata=metadata(),
        stt_stream=spoken(),
        pipeline_id=pipeline.id,
        start_stage=assist_pipeline.PipelineStage.STT,
        end_stage=assist_pipeline.PipelineStage.INTENT,
    )
    seen = {event.type: event.data for event in events}
    assert HEARD in seen[assist_pipeline.PipelineEventType.STT_END]["stt_output"]["text"].lower()
    assert assist_pipeline.PipelineEventType.INTENT_END in seen
    assert await hass.config_entries.async_unload(entry.entry_id)


FETCH = """import json, sys
from pathlib import Path
from cesar_mqtt.config import WyomingSettings
from cesar_mqtt.gateway.home_assistant import HomeAssistantNames
url, file = sys.argv[1:]
names = HomeAssistantNames(WyomingSettings(home_assistant_url=url, home_assistant_token_file=Path(file)))
print(json.dumps([names.fetch(), names.fetch()]))
"""


@pytest.fixture
async def api(hass, socket_enabled, hass_client) -> str:
    """The address of Home Assistant's own API, with an area, a lamp and a sensor."""
    assert await async_setup_component(hass, "api", {})
    area_registry.async_get(hass).async_create("Wintergarten")
    hass.states.async_set("light.desk", "on", {"friendly_name": "Büro Hängelampe"})
    hass.states.async_set("sensor.outside", "12", {"friendly_name": "Outside"})
    return str((await hass_client()).make_url("/"))


async def fetched_names(hass, api, token, folder):
    file = folder / "token"
    file.write_text(token)
    command = [Path(os.environ["CESAR_MQTT"]).parent / "python", "-c", FETCH, api, file]
    fetched = await hass.async_add_executor_job(
        lambda: subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    )
    assert fetched.returncode == 0, fetched.stderr
    return json.loads(fetched.stdout)


async def test_the_names_of_a_house_are_fetched_over_its_api(hass, api, hass_access_token, tmp_path):
    assert await fetched_names(hass, api, hass_access_token, tmp_path) == [["Wintergarten", "Büro Hängelampe"]] * 2


async def test_who_is_no_administrator_asks_for_areas_once(hass, api, hass_read_only_access_token, tmp_path, caplog):
    """Each time would be a failed login, of which Home Assistant shows a notice, and after some of them bans."""
    assert await fetched_names(hass, api, hass_read_only_access_token, tmp_path) == [["Büro Hängelampe"]] * 2
    assert caplog.text.count("Login attempt or request with invalid authentication") == 1
    caplog.clear()
