"""A sentence through the Wyoming server: from the end of speech to the text, on an idle consumer."""

import asyncio
import time
from pathlib import Path

import numpy as np
from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient

from benchmarks.bus import _mosquitto
from benchmarks.corpus import Pcm, decode, to_pcm
from benchmarks.jobs import _consumer, _idle, _listening
from benchmarks.table import Row, median
from tests.acceptance.harness import SPEECH
from tests.conftest import find_free_port

ROUNDS = 15
SENTENCE_S = 3.0
BOUND_S = 0.6
_RATE = 16_000
_CHUNK = 1024


def run(folder: Path) -> list[Row]:
    """Send a sentence several times and wait for its text; how fast it is spoken does not matter."""
    sentence = to_pcm(decode(SPEECH))[: int(SENTENCE_S * _RATE)]
    port = find_free_port()
    with (
        _mosquitto(folder) as broker_port,
        _consumer(folder / "wyoming", broker_port, "--wyoming", f"127.0.0.1:{port}") as consumer,
        _listening(broker_port) as bus,
    ):
        consumer.wait_for_log("Wyoming is on ")
        _idle(bus)
        took = [asyncio.run(_speak(port, sentence)) for _ in range(ROUNDS)]
    beside = f"median of {ROUNDS}; slowest {max(took):.3f} s"
    return [Row("Wyoming: 3 s sentence, end of speech to text", median(took), "s", at_most=BOUND_S, beside=beside)]


async def _speak(port: int, sentence: Pcm) -> float:
    """Return the seconds from the end of speech to the transcript."""
    shape = {"rate": _RATE, "width": 2, "channels": 1}
    chunks = np.array_split(sentence, max(1, sentence.size // _CHUNK))
    async with AsyncTcpClient("127.0.0.1", port) as client:
        await client.write_event(Transcribe(language="en").event())
        await client.write_event(AudioStart(**shape).event())
        for chunk in chunks:
            await client.write_event(AudioChunk(audio=chunk.tobytes(), **shape).event())
        ended = time.perf_counter()
        await client.write_event(AudioStop().event())
        answer = await client.read_event()
    took_s = time.perf_counter() - ended
    if answer is None or not Transcript.from_event(answer).text:
        raise RuntimeError(f"no transcript: {answer}")
    return took_s
