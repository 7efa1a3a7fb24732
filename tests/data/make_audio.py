"""Makes the recordings of the demo and of the tests; see README.md beside it. Not run by the tests."""

import argparse
import subprocess
import tempfile
from pathlib import Path
from typing import cast

import av

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "cesar_mqtt" / "demo"

DEMO_TEXT = (
    "Every recording you publish becomes a job on disk. The transcript comes back as a message on the bus. "
    "Nothing ever leaves your own machine."
)
SPEECH_TEXT = "Please call the plumber on Monday morning, and order a new lamp."
LONG_TEXT = (
    "This recording lasts a little less than a minute. It is here so that a test can watch a job while it runs. "
    "A message arrives, and the service writes it to disk before it answers. Then the worker takes the oldest job "
    "from the queue. It reads the audio, finds the speech, and listens to one sentence after another. After each "
    "sentence it tells everyone how far it has come. If the power fails now, nothing is lost, because the job is still "
    "in the queue. When the light comes back, the work begins again. Someone may also change their mind and cancel the "
    "job. In that case the worker stops at the end of the sentence. When everything has been heard, the whole text is "
    "published, and the next job can start. That is the end of this recording."
)

OTHER_LANGUAGES = {
    "german": ("de", "Guten Morgen. Die Sonne scheint, und wir gehen heute Nachmittag in den Garten."),
    "spanish": ("es", "Buenos días. Por favor, venga el lunes por la mañana a nuestra casa."),
}


def speak(hibari: str, text: str, target: Path) -> None:
    """Speak a text with hibari-tts 0.2.1, the same noise each time, into a WAV of 24 kHz."""
    subprocess.run([hibari, "--seed", "7", "-o", str(target), text], check=True)


def convert(source: Path, target: Path, *, container: str, codec: str, rate: int, bit_rate: int | None = None) -> None:
    """Encode mono audio at another rate, without the encoder's name in it: a second run gives the same bytes."""
    with av.open(source) as heard, av.open(target, "w", format=container, options={"fflags": "+bitexact"}) as written:
        stream = cast("av.AudioStream", written.add_stream(codec, rate=rate))
        stream.layout = "mono"
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        if bit_rate is not None:
            stream.codec_context.bit_rate = bit_rate
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=rate)
        frames = [part for frame in heard.decode(audio=0) for part in resampler.resample(frame)]
        for frame in (*frames, *resampler.resample(None)):
            written.mux(stream.encode(frame))
        written.mux(stream.encode(None))


def main() -> None:
    """Make all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hibari", default="hibari", help="the command of hibari-tts")
    hibari = parser.parse_args().hibari
    with tempfile.TemporaryDirectory() as folder:
        spoken = Path(folder) / "spoken.wav"
        for text, target in ((DEMO_TEXT, DEMO / "recording.ogg"), (LONG_TEXT, HERE / "long.ogg")):
            speak(hibari, text, spoken)
            convert(spoken, target, container="ogg", codec="libopus", rate=24_000, bit_rate=24_000)
            target.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
        for name, (voice, text) in OTHER_LANGUAGES.items():
            subprocess.run(["espeak-ng", "-v", voice, "-s", "130", "-w", str(spoken), text], check=True)
            convert(spoken, HERE / f"{name}.ogg", container="ogg", codec="libopus", rate=24_000, bit_rate=24_000)
            (HERE / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
        speak(hibari, SPEECH_TEXT, spoken)
        convert(spoken, HERE / "speech.wav", container="wav", codec="pcm_s16le", rate=16_000)
        (HERE / "speech.txt").write_text(SPEECH_TEXT + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
