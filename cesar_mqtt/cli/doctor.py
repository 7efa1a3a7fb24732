"""The command `doctor`: checks everything that a consumer and its producers need, with advice for each problem.

For the main thread. Each check is a function that returns findings and raises nothing; it changes nothing that lasts,
and its findings hold no secret.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cesar_mqtt import __file__ as package_file
from cesar_mqtt.cli import interrupt
from cesar_mqtt.cli.console import out
from cesar_mqtt.cli.control_client import ControlClient
from cesar_mqtt.cli.jobs import quiet
from cesar_mqtt.cli.text import duration, many, number, printable, size
from cesar_mqtt.config import AudioSettings, JetStreamSettings, ModelSettings, Settings
from cesar_mqtt.errors import BrokerRefusedError, CesarError, ExitCode, LedgerError, LedgerInUseError, lacks
from cesar_mqtt.gateway.session import NoAnswerError
from cesar_mqtt.ledger import repair as salvage
from cesar_mqtt.ledger.ledger import acquire_lock, data_dir_problem
from cesar_mqtt.protocol.consumer_payloads import QUARANTINE_ADVICE as ADVICE
from cesar_mqtt.protocol.topics import Topics

if TYPE_CHECKING:
    from cesar_mqtt.whisper.catalogue import Place
    from cesar_mqtt.whisper.model_store import ModelStore

_ROOM_BYTES = 1 << 30
_DAY_S = 24 * 3600.0
_REINSTALL = (
    "Install cesar-mqtt in the clone with the versions that it is tested with: pip install -c constraints.txt '.[all]'"
)


_PROTECTIONS = {
    "memory": "memory",
    "cpu": "processor time",
    "files": "no further files and connections",
    "landlock": "no access to files and network (Landlock)",
    "seccomp": "few system calls (seccomp)",
}
"""Those of `cesar_mqtt.audio.confinement`, in words."""


_DROPPED_TOPICS = ("$SYS/broker/publish/messages/dropped",)
"""Where mosquitto says how many messages it has dropped; other brokers have no such topic."""


class Severity(StrEnum):
    """The outcome of a check."""

    OK = "ok"
    NOTE = "note"
    """Not a problem, but worth knowing."""
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check of the report, above its advice; `what_to_do` is empty where there is nothing to do."""

    check: str
    verdict: Severity
    detail: str
    what_to_do: str = ""


def examine(settings: Settings, *, as_json: bool, timeout_s: float) -> ExitCode:
    """Run all checks and print a line for each as soon as it is done; FAILED if there is a problem."""
    quiet()
    code = ExitCode.OK
    for finding in _all(settings, timeout_s):
        if finding.verdict is Severity.WRONG:
            code = ExitCode.FAILED
        _print(finding, as_json=as_json)
    return code


def _all(settings: Settings, timeout_s: float) -> Iterator[Finding]:
    yield from check_broker(settings, timeout_s)
    if settings.queue.engine == "jetstream":
        yield check_shared_queue(settings.queue.jetstream, timeout_s)
    decoder = check_decoder()
    yield decoder
    if decoder.verdict is Severity.OK:  # without a decoder no model can transcribe
        yield check_decoder_process()
        yield from check_model(settings)
        yield from check_languages(settings)
    yield from check_folders(settings)
    yield from check_audio(settings)
    yield from check_ledger(settings)
    yield from check_clock(time.time())


# -- broker and consumer -----------------------------------------------------------------------------------------------


def check_broker(settings: Settings, timeout_s: float) -> Iterator[Finding]:
    """Connect, try what this user may publish and read, and ask a consumer for its health."""
    topics = Topics(settings.topic_prefix, settings.consumer.name)
    wanted = [topics.status("+"), topics.rejected]
    try:
        client = ControlClient(settings, ["health"], timeout_s=timeout_s, also=[*wanted, *_DROPPED_TOPICS])
        connection = client.connect()
    except CesarError as exc:
        yield Finding("broker", Severity.WRONG, exc.problem, exc.advice or "Correct that setting.")
        return
    try:
        yield Finding("broker", Severity.OK, f"{client.address} answers in MQTT {connection.protocol}")
        refused = tuple(topic for topic in connection.refused_filters if topic not in _DROPPED_TOPICS)
        yield _check_subscribing(refused, needed=wanted)
        yield _check_publishing(client, topics, has_refusals=connection.protocol == "5")
        yield from _check_consumer(client)
        yield from _check_dropped(client)
    finally:
        client.close()


def _check_subscribing(refused: tuple[str, ...], *, needed: list[str]) -> Finding:
    if not refused:
        return Finding("subscribing", Severity.OK, "The broker grants the topics of statuses and responses")
    missing = [topic for topic in refused if topic in needed]
    if missing:
        advice = "Allow this user to read them, in the broker's access list."
        return Finding("subscribing", Severity.WRONG, f"The broker does not grant {', '.join(missing)}", advice)
    detail = f"The broker does not grant {', '.join(refused)}, which `submit` does not need"
    return Finding(
        "subscribing", Severity.NOTE, detail, "Allow this user to read them for `jobs`, `show` and the like."
    )


def _check_publishing(client: ControlClient, topics: Topics, *, has_refusals: bool) -> Finding:
    """Publish an empty job, which consumers ignore. A user that may publish responses is the consumer's own."""
    reason = client.try_to_publish(topics.jobs, b"")
    if reason is not None:
        is_consumer = client.try_to_publish(topics.response("health"), b"") is None
        verdict = Severity.NOTE if is_consumer else Severity.WRONG
        advice = "Allow this user to write there, in the broker's access list"
        advice += ", unless it is the consumer's alone." if is_consumer else "."
        return Finding("publishing", verdict, f"On {topics.jobs}: {printable(reason)}", advice)
    if not has_refusals:
        return Finding("publishing", Severity.NOTE, "MQTT 3.1.1 does not show whether the broker drops messages")
    return Finding("publishing", Severity.OK, f"The broker accepts messages on {topics.jobs}")


def _check_consumer(client: ControlClient) -> Iterator[Finding]:
    try:
        health = client.ask("health")
    except BrokerRefusedError as exc:  # a producer's user needs no more than to see that a consumer is online
        detail = f"{', '.join(client.online)} is online, but {exc.problem}"
        yield Finding("consumer", Severity.NOTE, detail, "Allow it for `jobs`, `show`, `cancel` and the like.")
        return
    except NoAnswerError as exc:
        yield Finding("consumer", Severity.WRONG, exc.problem, exc.advice or "Correct that setting.")
        return
    except CesarError as exc:
        yield Finding("consumer", Severity.WRONG, str(exc), "See the consumer's log.")
        return
    names = ", ".join(client.online) or "A consumer"
    if health.get("worker_alive") is not True:
        yield Finding(
            "consumer", Severity.WRONG, f"{names} answers, but its worker has ended", "Restart it; see its log."
        )
        return
    uptime = duration(number(health.get("uptime")))
    yield Finding("consumer", Severity.OK, f"{names} is online and answers; uptime {uptime}")
    for message in health.get("quarantined") or ():
        yield _not_accepted(message)
    webhook = health.get("webhook")
    if isinstance(webhook, Mapping):
        yield _check_webhook(webhook)


def _check_dropped(client: ControlClient) -> Iterator[Finding]:
    """Report what mosquitto has dropped because a client did not read fast enough, such as the jobs of a consumer."""
    dropped = client.broker_statistics.get(_DROPPED_TOPICS[0])
    if dropped is None or not dropped.isdecimal() or int(dropped) == 0:
        return
    detail = f"The broker has dropped {many(int(dropped), 'message')} since its start, among them jobs perhaps"
    advice = (
        "Raise max_queued_messages in mosquitto.conf: by default it queues 1,000 for a client, also for one online."
    )
    yield Finding("queue of broker", Severity.NOTE, detail, advice)


def _check_webhook(webhook: Mapping[str, Any]) -> Finding:
    """Return the finding about the consumer's webhook, as `health` has it."""
    pending, given_up = (int(number(webhook.get(name)) or 0) for name in ("pending", "given_up"))
    problem = webhook.get("problem")
    detail = f"{many(given_up, 'request')} given up since the start, {pending} pending"
    if not problem and not given_up:
        return Finding("webhook", Severity.OK, detail)
    if problem:
        detail += f". The last one failed: {printable(str(problem))}"
    verdict = Severity.WRONG if problem else Severity.NOTE
    return Finding("webhook", verdict, detail, "Check the receiver, and webhook.url; what is pending is sent again.")


def _not_accepted(message: Mapping[str, Any]) -> Finding:
    """Return the finding about a message of the consumer that the broker does not accept."""
    outcome = "is skipped" if message.get("skipped") else "is cut, and published last"
    detail = f"The broker does not accept the consumer's message on {message.get('topic')}"
    detail += f" ({size(number(message.get('size_bytes')) or 0)}), which {outcome}"
    return Finding("consumer", Severity.WRONG, detail, ADVICE.get(str(message.get("cause")), "See the consumer's log."))


def check_shared_queue(settings: JetStreamSettings, timeout_s: float) -> Finding:
    """Ask the NATS servers for the queue that consumers share."""
    check, start = "shared queue", "Start a consumer before the first job is published: it makes the queue."
    try:
        from cesar_mqtt.engines.jetstream import look  # noqa: PLC0415 - nats-py is an extra

        queue = look(settings, timeout_s)
    except ModuleNotFoundError as exc:
        if not lacks(exc, "nats"):
            raise
        return Finding(check, Severity.WRONG, "nats-py is not installed", "Install the extra cluster.")
    except CesarError as exc:
        advice = exc.advice or "Start the servers, or correct queue.jetstream.url and its credentials."
        return Finding(check, Severity.WRONG, printable(exc.problem), advice)
    if queue is None:
        return Finding(check, Severity.WRONG, f"There is no queue {settings.stream} on the servers", start)
    detail = (
        f"{settings.stream}: {many(queue.requests, 'request')} to be admitted, {many(queue.waiting, 'job')} waiting, "
        f"{queue.delivered} at consumers; stored on {many(queue.replicas, 'server')}"
    )
    if queue.absent:
        names = ", ".join(map(printable, queue.absent))
        return Finding(check, Severity.WRONG, f"{detail}; away or behind: {names}", "Start that server.")
    return Finding(check, Severity.OK, detail)


# -- the decoder and the model -----------------------------------------------------------------------------------------


def check_decoder() -> Finding:
    """Decode the bundled recording: an unsuitable PyAV fails here as in every job, with or without a model."""
    defaults = AudioSettings()
    try:
        # Imported here: the broker's lines do not wait for these.
        from cesar_mqtt.audio.decoder import AudioLimits, open_audio  # noqa: PLC0415
        from cesar_mqtt.cli.demo import RECORDING  # noqa: PLC0415

        limits = AudioLimits(max_bytes=defaults.max_bytes, max_duration_s=defaults.max_duration)
        with open_audio(RECORDING.resolve(), limits) as audio:
            for _ in audio.blocks():
                pass
            return Finding("decoder", Severity.OK, f"{audio.decoded_s:.1f} s of a bundled recording were decoded")
    except Exception as exc:  # noqa: BLE001  # an unsuitable version fails with TypeError, AttributeError and others
        _raise_if_interrupted()
        return Finding(
            "decoder", Severity.WRONG, f"The bundled recording cannot be decoded: {_describe(exc)}", _REINSTALL
        )


def check_decoder_process() -> Finding:
    """Decode it as the consumer does, in a process of its own, and report what that process cannot do."""
    try:
        # Imported here: the broker's lines do not wait for these.
        from cesar_mqtt.audio.decoder_process import limits_of, open_audio, stop  # noqa: PLC0415
        from cesar_mqtt.cli.demo import RECORDING  # noqa: PLC0415

        try:
            with open_audio(RECORDING.resolve(), limits_of(AudioSettings())) as audio:
                for _ in audio.blocks():
                    pass
                missing = [name for name in _PROTECTIONS if name not in audio.protections]
        finally:
            stop()
    except Exception as exc:  # noqa: BLE001  # as for the decoder
        _raise_if_interrupted()
        return Finding(
            "decoder process", Severity.WRONG, f"It cannot decode the bundled recording: {_describe(exc)}", _REINSTALL
        )
    held = ", ".join(_PROTECTIONS[name] for name in _PROTECTIONS if name not in missing)
    if missing:
        lost = ", ".join(_PROTECTIONS[name] for name in missing)
        advice = "The system does not offer it here; a recording is decoded in a process of its own all the same."
        return Finding("decoder process", Severity.NOTE, f"In force: {held}. Not in force: {lost}", advice)
    return Finding("decoder process", Severity.OK, f"Each recording has its own, which is limited: {held}")


def check_model(settings: Settings) -> Iterator[Finding]:
    """Transcribe with the default model as the consumer does, without downloading or keeping anything."""
    # Imported here: the broker's lines do not wait for these.
    from cesar_mqtt.cli.models import models_folder  # noqa: PLC0415
    from cesar_mqtt.whisper.model_store import ModelStore  # noqa: PLC0415

    local = settings.models.model_copy(update={"download": False})
    folder = models_folder(settings)
    advice = "See `cesar-mqtt models list`."
    try:
        store = ModelStore(local, folder=folder)
        name = store.default_name()
        place = store.catalogue.find(name)
        if place is None and settings.models.download:
            advice = f"It is downloaded at the first job, or now with `cesar-mqtt models pull {name}`."
            yield Finding("model", Severity.NOTE, f"{name} is not on this machine", advice)
            return
        if place is not None and place.path is None:
            yield _check_joined(ModelStore, local, settings, name)
            return
        yield Finding("model", Severity.OK, f"{name}{_origin(place, folder)} {_transcribe(store, name)}")
    except CesarError as exc:
        yield Finding("model", Severity.WRONG, str(exc), advice)
    except Exception as exc:  # noqa: BLE001  # as for the decoder
        yield Finding("model", Severity.WRONG, f"The model cannot transcribe: {_describe(exc)}", _REINSTALL)


def check_languages(settings: Settings) -> Iterator[Finding]:
    """Check that the default model knows the languages of jobs; `check_model` reports settings that are wrong."""
    from cesar_mqtt.cli.models import models_folder  # noqa: PLC0415
    from cesar_mqtt.whisper.catalogue import ENGLISH_ONLY_ADVICE, Catalogue  # noqa: PLC0415

    with suppress(CesarError):
        catalogue = Catalogue(settings.models, folder=models_folder(settings))
        name = catalogue.default_name()
        if catalogue.assumes_english:
            detail = f"The default model {name} knows English only"
            yield Finding("languages", Severity.NOTE, detail, ENGLISH_ONLY_ADVICE)


def _check_joined(make_store: "type[ModelStore]", models: ModelSettings, settings: Settings, name: str) -> Finding:
    """Join a model on the disk of the data directory, in a temporary folder. Raises JobFailedError."""
    beside = _nearest(settings.data_dir)
    place = beside if os.access(beside, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".cesar-mqtt-doctor-", dir=place) as temporary:
        result = _transcribe(make_store(models, folder=Path(temporary)), name)
    advice = f"The first job joins it for good, or `cesar-mqtt models pull {name}` now."
    return Finding("model", Severity.OK, f"{name}, joined from its packages for this check, {result}", advice)


def _transcribe(store: "ModelStore", name: str) -> str:
    """Load a model and transcribe the bundled recording, through every part that a job needs.

    Raises:
        JobFailedError: the model cannot be loaded, or fails.
        Exception: anything that an unsuitable version of a library raises.
    """
    from cesar_mqtt.cli.demo import RECORDING  # noqa: PLC0415
    from cesar_mqtt.transcript import TranscriptionOptions  # noqa: PLC0415
    from cesar_mqtt.whisper.transcriber import Transcriber  # noqa: PLC0415

    started = time.monotonic()
    store.load(name)
    loaded = time.monotonic()
    transcriber = Transcriber(store, AudioSettings())
    options = TranscriptionOptions(model_size=name)
    with closing(transcriber.open(RECORDING.resolve(), options)) as recording:
        transcriber.transcribe(
            recording,
            options,
            on_progress=_ignore,
            on_segment=_ignore,
            on_window=_ignore,
            should_stop=lambda: False,
        )
    took = time.monotonic() - loaded
    return (
        f"runs on {store.device} in {store.compute_type} (loaded in {loaded - started:.1f} s, "
        f"a bundled recording transcribed in {took:.1f} s)"
    )


def _raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt: a library that is interrupted while it is imported raises something else."""
    if interrupt.is_requested():
        raise KeyboardInterrupt


def _ignore(_: object) -> None:
    """Ignore the progress of a transcription."""


def _describe(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"


def _origin(place: "Place | None", joined_in: Path) -> str:
    if place is None or place.path is None:
        return ""
    if place.path.parent == joined_in:
        return f", joined from its packages in {place.path},"
    return f" from the {place.origin} {place.path}"


# -- files -------------------------------------------------------------------------------------------------------------


def check_folders(settings: Settings) -> Iterator[Finding]:
    """Check that the data directory and the spool are writable and have free space."""
    for name, folder in (("data directory", settings.data_dir), ("spool", settings.data_dir / "spool")):
        yield _writable(name, folder)
    problem = data_dir_problem(settings.data_dir)
    if problem is not None:
        yield Finding("data directory", Severity.WRONG, *problem)
    yield _room(settings)


def _writable(name: str, folder: Path) -> Finding:
    there = _nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"0")
    except OSError as exc:
        advice = f"Give this user the right to write {there}, or choose another place with --data-dir."
        return Finding(name, Severity.WRONG, f"{there} cannot be written: {exc.strerror}", advice)
    if there != folder:
        return Finding(name, Severity.OK, f"{folder} does not exist yet; `serve` creates it")
    return Finding(name, Severity.OK, f"{folder} is writable")


def _room(settings: Settings) -> Finding:
    folder = _nearest(settings.data_dir)
    try:
        free = shutil.disk_usage(folder).free
    except OSError as exc:
        return Finding("room", Severity.WRONG, f"{folder}: {exc.strerror}", "Choose another place with --data-dir.")
    if free < settings.queue.max_payload_bytes:
        advice = "Free some space: without it no job is accepted. Retention deletes finished jobs."
        return Finding("room", Severity.WRONG, f"Only {size(free)} free at {folder}", advice)
    verdict = Severity.OK if free >= _ROOM_BYTES else Severity.NOTE
    return Finding("room", verdict, f"{size(free)} free at {folder}")


def check_audio(settings: Settings) -> Iterator[Finding]:
    """Check that the directories of `audio_path` are readable."""
    if not settings.audio.directories:
        yield Finding(
            "audio", Severity.NOTE, "audio.directories is not set: paths are looked up in the folder of `serve`"
        )
    for folder in settings.audio.directories:
        try:
            with os.scandir(folder) as entries:
                next(entries, None)
        except OSError as exc:
            advice = "Create it, let this user read it, or remove it from audio.directories."
            yield Finding("audio", Severity.WRONG, f"{folder} cannot be read: {exc.strerror}", advice)
        else:
            yield Finding("audio", Severity.OK, f"{folder} is readable")


def check_ledger(settings: Settings) -> Iterator[Finding]:
    """Read the whole ledger, unless a consumer has it open."""
    path = settings.data_dir / "ledger.json"
    if not path.exists() and not path.with_name(path.name + ".journal").exists():
        yield Finding("ledger", Severity.OK, f"There is none at {path} yet; `serve` creates it")
        return
    try:
        held = acquire_lock(path)
        try:
            found = salvage.examine(path)
        finally:
            held.release()
    except LedgerInUseError:
        yield Finding("ledger", Severity.OK, f"{path} is in use by a consumer, which read it at its start")
        return
    except LedgerError as exc:
        yield Finding("ledger", Severity.WRONG, str(exc), "Run this as the user that the consumer runs as.")
        return
    if found.damaged:
        first = f": {printable(salvage.first_sentences(found.lost)[0])}" if found.lost else ""
        advice = "`cesar-mqtt ledger check` shows more, `ledger repair` repairs it."
        yield Finding("ledger", Severity.WRONG, f"{path} is damaged{first}", advice)
        return
    yield Finding("ledger", Severity.OK, f"{path} is whole and holds {many(len(found.jobs), 'job')}")


def check_clock(now: float) -> Iterator[Finding]:
    """Check that the clock, in seconds since the epoch, is not before the day of this installation."""
    installed = Path(package_file).stat().st_mtime
    if now < installed - _DAY_S:
        detail = f"The clock shows {time.strftime('%Y-%m-%d', time.gmtime(now))}, before the date of this installation"
        yield Finding("clock", Severity.WRONG, detail, "Set it: retention and expiry depend on it.")
        return
    yield Finding("clock", Severity.OK, f"The clock shows {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(now))} UTC")


def _nearest(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next((above for above in (folder, *folder.parents) if above.exists()), folder)


# -- the report --------------------------------------------------------------------------------------------------------


def _print(finding: Finding, *, as_json: bool) -> None:
    if as_json:
        line = json.dumps(asdict(finding), ensure_ascii=False)
    else:
        line = f"{finding.verdict:<5}  {finding.check:<15}  {printable(finding.detail).rstrip('.')}"
        line = f"{line}\n{'':<24}{finding.what_to_do}" if finding.what_to_do else line
    out(line, flush=True)
