"""The commands `models list` and `models pull`: the models on this machine, and downloading one."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from cesar_mqtt import logs
from cesar_mqtt.cli.console import new_table, out, print_message, print_table
from cesar_mqtt.cli.text import size
from cesar_mqtt.config import Settings
from cesar_mqtt.errors import ExitCode, JobFailedError
from cesar_mqtt.whisper import diarization_models, hub
from cesar_mqtt.whisper.catalogue import Catalogue, ModelEntry
from cesar_mqtt.whisper.onnx_models import DiarizationError

_LINE_EVERY_S = 5.0
_LANGUAGES = {True: "multilingual", False: "English", None: "unknown"}


def list_models(settings: Settings, *, as_json: bool) -> ExitCode:
    """Print the models on this machine and those that may be downloaded. Raises ConfigError."""
    catalogue = _catalogue(settings)
    entries = catalogue.entries()
    speakers = diarization_models.find(settings.models)
    others = [entry.name for entry in entries if entry.origin is None and catalogue.may_download(entry.name)]
    if speakers is None and settings.models.download:
        others.append(diarization_models.NAME)
    here = [entry for entry in entries if entry.origin is not None]
    if as_json:
        models = [_plain(entry) for entry in here]
        diarization = None if speakers is None else {"origin": speakers.origin, "size_bytes": speakers.size_bytes}
        found = {"default": catalogue.default_name(), "models": models, "diarization": diarization}
        out(json.dumps(found | {"downloadable": others}))
        return ExitCode.OK
    _print_table(here)
    if speakers is not None:
        out(f"For speaker labels: {diarization_models.NAME}, from {speakers.origin}, {size(speakers.size_bytes)}.")
    if not any(entry.default for entry in here):
        out(f"The default is {catalogue.default_name()}, which is not on this machine.")
    if others:
        out(f"`cesar-mqtt models pull NAME` downloads: {', '.join(others)}")
        if hub.is_offline():
            out("HF_HUB_OFFLINE is set: nothing can be downloaded now.")
    elif not settings.models.download:
        out("Others may not be downloaded (models.download is false).")
    return ExitCode.OK


def pull(name: str, settings: Settings) -> ExitCode:
    """Make a model usable without a network and print its folder on stdout, the progress on stderr.

    Exit code 2: no model has this name, or `models.allowed` leaves it out; 1: the download failed.

    Raises:
        ConfigError: a setting names an impossible model.
    """
    logs.configure(settings.log.format, "error")  # the command prints sentences of its own
    if name == diarization_models.NAME:
        return _pull_diarization(settings)
    catalogue = _catalogue(settings)
    if not catalogue.is_allowed(name):
        print_message(f"{catalogue.explain_unknown(name)}.")
        return ExitCode.USAGE
    place = catalogue.find(name)
    unavailable = place is None and (hub.is_offline() or not catalogue.may_download(name))
    try:
        if unavailable or (place is not None and place.path is not None):
            path = catalogue.obtain(name)
            print_message(f"{name} is already here.")
        else:
            with _shown(name, "downloading it" if place is None else "joining it from its packages") as view:
                path = catalogue.obtain(name, on_progress=view.show)
    except JobFailedError as exc:
        print_message(exc.message)
        return ExitCode.FAILED
    out(str(path))
    return ExitCode.OK


def _pull_diarization(settings: Settings) -> ExitCode:
    name = diarization_models.NAME
    try:
        if diarization_models.find(settings.models) is not None:
            models = diarization_models.obtain(settings.models)
            print_message(f"{name} is already here.")
        else:
            with _shown(name, "downloading it") as view:
                models = diarization_models.obtain(settings.models, on_progress=view.show)
    except DiarizationError as exc:
        print_message(str(exc))
        return ExitCode.FAILED
    out(f"{models.segmentation}\n{models.embedding}")
    return ExitCode.OK


def _catalogue(settings: Settings) -> Catalogue:
    return Catalogue(settings.models, folder=models_folder(settings))


def models_folder(settings: Settings) -> Path:
    """Return the folder of models that were joined from packages."""
    return settings.data_dir / "models"


def _plain(entry: ModelEntry) -> dict[str, Any]:
    return asdict(entry) | {"path": None if entry.path is None else str(entry.path)}


def _print_table(entries: list[ModelEntry]) -> None:
    if not entries:
        out("No model is on this machine.")
        return
    table = new_table()
    for head in ("NAME", "FROM", "SIZE", "LANGUAGES", ""):
        table.add_column(head, justify="right" if head == "SIZE" else "left")
    for entry in entries:
        notes = ("default" if entry.default else None, entry.problem)
        table.add_row(
            entry.name,
            str(entry.origin),
            size(entry.size_bytes or 0),
            _LANGUAGES[entry.multilingual],
            "; ".join(note for note in notes if note),
        )
    print_table(table)


class _View(Protocol):
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def show(self, done_bytes: int, total_bytes: int) -> None: ...


def _shown(name: str, what: str) -> _View:
    console = Console(stderr=True)
    return _Bar(name, console) if console.is_terminal else _Lines(name, what)


class _Bar:
    """A progress bar, removed at the end."""

    def __init__(self, name: str, console: Console) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
        self._progress = Progress(
            *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, transient=True
        )
        self._task = self._progress.add_task(name, total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, done_bytes: int, total_bytes: int) -> None:
        self._progress.update(self._task, completed=done_bytes, total=total_bytes)


class _Lines:
    """A line every few seconds, where stderr is no terminal."""

    def __init__(self, name: str, what: str) -> None:
        self._name = name
        self._what = what
        self._printed_at: float | None = None

    def __enter__(self) -> Self:
        print_message(f"{self._name}: {self._what}.")
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if done_bytes == total_bytes or self._printed_at is None or now - self._printed_at >= _LINE_EVERY_S:
            self._printed_at = now
            print_message(f"{self._name}: {done_bytes / 1e6:.0f} of {total_bytes / 1e6:.0f} MB")
