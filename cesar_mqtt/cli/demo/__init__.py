"""The command `demo`: everything in one process, so that a new user sees the life of a job without set-up.

A recording goes over MQTT to an embedded broker and a consumer; its transcript comes back the same way.
"""

import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cesar_mqtt import logs
from cesar_mqtt.cli.console import out, print_line
from cesar_mqtt.cli.producer import Producer, Recording
from cesar_mqtt.config import BrokerSettings, Settings
from cesar_mqtt.errors import ExitCode
from cesar_mqtt.monitoring.signals import StopSignals, handle_stop_signals
from cesar_mqtt.protocol.topics import Topics
from cesar_mqtt.service import Service

RECORDING = Path(__file__).with_name("recording.ogg")
_JOB_ID = "demo"
_CONNECT_S = 30.0
_LOOK_S = 0.5


def run() -> ExitCode:
    """Run the demo; the steps go to stderr, the transcript to stdout."""
    logs.configure("text", "warning")
    with tempfile.TemporaryDirectory(prefix="cesar-mqtt-demo-") as folder, handle_stop_signals() as stop:
        settings = Settings(
            data_dir=Path(folder),
            broker=BrokerSettings(url="embedded://127.0.0.1:0"),
        )
        service = Service(settings, directory=Path(folder))
        thread = threading.Thread(target=service.run, args=(stop,), name="service")
        thread.start()
        try:
            return _submit(service.url, stop)
        finally:
            stop.request()
            thread.join()


def _submit(url: str, stop: StopSignals) -> ExitCode:
    topics = Topics("cesar", "cesar")
    seen: list[str] = []
    item = Recording(_JOB_ID, str(RECORDING), by_path=False, options={})
    with Producer(BrokerSettings(url=url), topics, [item], on_status=lambda _, status: _show(status, seen)) as producer:
        producer.connect(_CONNECT_S)
        _step("broker", f"an embedded one at {url}")
        producer.wait_for_consumer(time.monotonic() + _CONNECT_S)
        _step("publish", f"{topics.audio(_JOB_ID)}  ({RECORDING.name}, {RECORDING.stat().st_size // 1024} KiB)")
        producer.publish(None)
        while not stop.is_requested() and not producer.follow(time.monotonic() + _LOOK_S):
            pass
        status = producer.status(item)
    interrupted = stop.is_requested() and (status is None or status["status"] != "completed")
    return ExitCode.INTERRUPTED if interrupted or status is None else _end(status)


def _show(status: Mapping[str, Any], seen: list[str]) -> None:
    state = str(status["status"])
    if state not in seen:
        seen.append(state)
        _step("status", state)


def _end(status: Mapping[str, Any]) -> ExitCode:
    if status["status"] != "completed":
        _step("failed", f"{status.get('error_code')}: {status.get('error_message')}")
        return ExitCode.FAILED
    _step(
        "done",
        f"{status['audio_duration']:.1f} s of audio, {status['speed']} times as fast as real time; the transcript:",
    )
    out(status["result_text"])
    return ExitCode.OK


def _step(name: str, text: str) -> None:
    print_line(f"{name:>8}  {text}")
