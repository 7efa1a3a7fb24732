"""A transcriber that sleeps, so that a few cores can run many consumers: what is left is the queue's own work.

`tests.template` installs it in a consumer whose environment has `PYTEST_TRANSCRIBER_S`: the seconds of each job.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from cesar_mqtt.errors import Cancelled
from cesar_mqtt.transcript import Segment, Transcript, TranscriptionOptions, Window
from cesar_mqtt.whisper.transcriber import Transcriber

VARIABLE = "PYTEST_TRANSCRIBER_S"
_LOOK_S = 0.02


def install(seconds: float) -> None:
    """Replace the transcriber of this process: the transcript is the prompt of the job."""

    def transcribe(
        _self: Transcriber,
        _recording: object,
        options: TranscriptionOptions,
        *,
        on_window: Callable[[Window], None],
        should_stop: Callable[[], bool],
        **_others: Any,
    ) -> Transcript:
        pause, until = threading.Event(), time.monotonic() + seconds
        while (left_s := until - time.monotonic()) > 0:
            pause.wait(min(_LOOK_S, left_s))
            if should_stop():
                raise Cancelled
        text = options.initial_prompt or "nothing"
        segment = Segment(1, 0.0, 0.5, text, -0.1, 0.0)
        window = Window(0, 0.5, text, "en", 1.0, (segment,))
        on_window(window)
        return Transcript(text, "en", 1.0, False, 0.5, (window,), ())  # noqa: FBT003 - as it is declared

    Transcriber.transcribe = transcribe  # type: ignore[method-assign,assignment]
    Transcriber.warm_up = lambda _self, _model: None  # type: ignore[method-assign,assignment]
