"""Damaged recordings of every container through the decoder's process: `make fuzz`, or `python -m tests.fuzz 5000`.

Each is a recording with some changes: bytes overwritten, removed, inserted or repeated, its end cut off, headers more
than the rest. It has to end as a transcript's samples or as an error of the file, within its limits; what crashes,
hangs or needs more memory than the limit is counted, and kept in build/fuzz. The exit code is 1 if anything ended
otherwise, such as an exception that nothing expected.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cesar_mqtt.audio import decoder_process
from cesar_mqtt.audio.decoder import SAMPLE_RATE, AudioLimits
from cesar_mqtt.errors import ErrorCode, JobFailedError
from tests import pictures

KEPT = Path("build") / "fuzz"
LIMITS = AudioLimits(max_bytes=1 << 30, max_duration_s=3600.0, decoder_memory_bytes=256 << 20, decoder_timeout_s=40.0)
NEVER = frozenset({"internal", "audio_io_error", "samples that are no numbers"})
BAD = NEVER | {"crashed", "killed", "memory", "no progress", "processor time"}
RECORDINGS = {
    "a.wav": "pcm_s16le",
    "b.wav": "adpcm_ima_wav",
    "a.w64": "pcm_s16le",
    "a.aiff": "pcm_s16be",
    "a.au": "pcm_s16be",
    "a.caf": "alac",
    "a.flac": "flac",
    "a.mp3": "libmp3lame",
    "a.mp2": "mp2",
    "a.aac": "aac",
    "a.m4a": "aac",
    "b.m4a": "alac",
    "a.mov": "pcm_s16le",
    "a.ogg": "libopus",
    "b.ogg": "flac",
    "a.webm": "libopus",
    "a.mka": "aac",
    "b.mka": "flac",
    "a.avi": "libmp3lame",
    "a.ts": "mp2",
    "a.mpg": "mp2",
    "a.flv": "aac",
    "a.wv": "wavpack",
    "a.tta": "tta",
    "a.asf": "libmp3lame",
    "a.nut": "flac",
    "a.3gp": "aac",
}


def mutate(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 3, 20))):
        place = chance.randrange(max(1, min(len(changed), chance.choice((64, 512, 4096, 1 << 20)))))
        length = chance.choice((1, 1, 2, 4, 40, 4000))
        piece = changed[place : place + length]
        match chance.randrange(6):
            case 0:
                changed[place : place + length] = chance.randbytes(len(piece))
            case 1:
                changed[place : place + length] = bytes([chance.choice((0x00, 0x7F, 0x80, 0xFF))]) * len(piece)
            case 2:
                del changed[place : place + length]
            case 3:
                changed[place:place] = chance.randbytes(length)
            case 4:
                changed[place:place] = piece * chance.choice((1, 2, 50))
            case _:
                del changed[chance.randrange(len(changed) + 1) :]
    return bytes(changed)


def outcome_of(path: Path) -> str:
    try:
        with decoder_process.open_audio(path, LIMITS) as audio:
            samples = [block for block in audio.blocks() if len(block)]
            if not all(np.isfinite(block).all() for block in samples):
                return "samples that are no numbers"
            return "decoded, with warnings" if audio.warnings else "decoded"
    except JobFailedError as exc:
        for words in ("crashed", "killed", "memory", "no progress", "processor time"):
            if exc.code is ErrorCode.AUDIO_UNREADABLE and words in exc.message:
                return words
        return exc.code.value


def decode_damaged(folder: Path, count: int, seed: int, on_bad: Callable[[Path, str], object]) -> Counter[str]:
    """Decode `count` damaged recordings; return how many ended how. `on_bad` gets those that ended their decoder."""
    chance = random.Random(seed)  # noqa: S311 - the same damage in every run with a seed
    noise = np.random.default_rng(1).integers(-8000, 8000, 2 * SAMPLE_RATE, np.int16)
    whole = {
        name: pictures.encode(folder / name, codec, noise, rate=48_000).read_bytes()
        for name, codec in RECORDINGS.items()
    }
    ended: Counter[str] = Counter()
    for number in range(count):
        name = chance.choice(list(whole))
        path = folder / f"{seed}-{number}-{name}"
        path.write_bytes(mutate(whole[name], chance))
        outcome = outcome_of(path)
        ended[outcome] += 1
        if outcome in BAD:
            on_bad(path, outcome)
        path.unlink()
    return ended


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description="Decode damaged recordings, and count how they end.")
    parser.add_argument("count", nargs="?", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    def keep(path: Path, outcome: str) -> None:
        KEPT.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, KEPT)
        print(f"{outcome}: {KEPT / path.name}", flush=True)

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cesar-mqtt-fuzz-") as folder:
        ended = decode_damaged(Path(folder).resolve(), arguments.count, arguments.seed, keep)
    decoder_process.stop()
    for outcome, times in ended.most_common():
        print(f"{times:>6}  {outcome}")
    print(f"{arguments.count} recordings in {time.monotonic() - started:.0f} s, seed {arguments.seed}")
    return 1 if ended.keys() & NEVER else 0


if __name__ == "__main__":
    sys.exit(main())
