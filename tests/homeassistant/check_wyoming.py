# mypy: ignore-errors
"""Assist in Home Assistant: its own Wyoming integration, and a pipeline that uses it, in front of a real consumer."""

import asyncio
import socket
import wave
from pathlib import Path

from homeassistant.components import assist_pipeline, stt
from homeassistant.components.wyoming.data import load_wyoming_info
from homeassistant.core import Context
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
