"""The one Whisper model that is kept in memory: on which device, how it is loaded and proved, and when it goes again.

`load`, `unload` and what belongs to idling are for the worker thread; everything else may be called from any thread.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ctranslate2
import numpy as np
from faster_whisper import WhisperModel

from cesar_mqtt.config import ModelSettings
from cesar_mqtt.errors import ConfigError, JobFailedError
from cesar_mqtt.logs import get_logger
from cesar_mqtt.threads import never_stop
from cesar_mqtt.whisper import model_files as modelfiles
from cesar_mqtt.whisper.catalogue import Catalogue, ModelEntry
from cesar_mqtt.whisper.hardware import give_memory_back, usable_cores
from cesar_mqtt.whisper.model_files import unavailable, unusable

log = get_logger(__name__)

_COMPUTE_TYPES = {"cpu": ("int8", "float32"), "cuda": ("float16", "int8_float16", "int8", "float32")}
"""Best first, for `auto`."""


@dataclass(frozen=True, slots=True)
class StoreDescription:
    """What this machine makes of the settings, and which models it has.

    Attributes:
        allowed: every name that a job may give.
        default: the model of jobs that name none.
        loaded: the model in memory; None: none.
        device: `cpu` or `cuda`.
        compute_type: the precision, as CTranslate2 calls it.
        cpu_threads: how many threads a model may use on the CPU.
        models: each allowed model, once.
    """

    allowed: tuple[str, ...]
    default: str
    loaded: str | None
    device: str
    compute_type: str
    cpu_threads: int
    models: tuple[ModelEntry, ...]


class ModelStore:
    """The models of this machine, and one of them in memory.

    Only one is kept: loading another lets go of the first before, so that two never need memory at the same time.

    Attributes:
        catalogue: which models there are.
        device: `cpu` or `cuda`.
        compute_type: the precision that models are run with, as CTranslate2 calls it.
        cpu_threads: how many threads a model may use on the CPU.
        on_loaded: called with the name of a model that was loaded and the seconds that it took, a download included.
        on_unloaded: called when the model in memory was dropped. Both run in the worker thread.
    """

    def __init__(
        self, settings: ModelSettings, *, folder: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Check the settings against this machine; nothing is loaded or downloaded.

        Args:
            settings: what the user has said.
            folder: where models that come in parts are joined; None: in the user's data directory.
            clock: seconds that never go back.

        Raises:
            ConfigError: a setting names what this machine does not have; the message names the setting.
        """
        self.device, self.compute_type = _choose_device(settings)
        self.cpu_threads = settings.cpu_threads or usable_cores()
        self.catalogue = Catalogue(settings, folder=folder)
        self._idle_s = settings.idle_timeout
        self._clock = clock
        self._used_at = clock()
        self._name: str | None = None
        self._path: Path | None = None
        self._model: WhisperModel | None = None
        self.on_loaded: Callable[[str, float], None] = lambda _name, _seconds: None
        self.on_unloaded: Callable[[], None] = lambda: None

    def default_name(self) -> str:
        """Return the model of jobs that name none; it stays the same for the life of the process."""
        return self.catalogue.default_name()

    def is_allowed(self, name: str) -> bool:
        """Whether a job may name this model; says nothing about whether it is on this machine."""
        return self.catalogue.is_allowed(name)

    def is_multilingual(self, name: str) -> bool | None:
        """Whether a model knows more than English; None: nobody can tell before it is loaded."""
        return self.catalogue.is_multilingual(name)

    def describe(self) -> StoreDescription:
        """Describe the models and how they are run; reads the disk, some milliseconds."""
        return StoreDescription(
            allowed=self.catalogue.allowed_names(),
            default=self.default_name(),
            loaded=self._name,
            device=self.device,
            compute_type=self.compute_type,
            cpu_threads=self.cpu_threads,
            models=self.catalogue.entries(),
        )

    def load(self, name: str, *, should_stop: Callable[[], bool] = never_stop) -> WhisperModel:
        """Return a model that has proved that it runs: the one in memory, or else the one from disk in its place.

        It is fetched first if it is not on this machine and that is allowed. Only for the worker thread; the model
        belongs to that thread until the next call.

        Args:
            name: as a job gives it.
            should_stop: asked several times a second while the model is fetched; loading cannot be interrupted.

        Raises:
            JobFailedError: `model_unavailable`.
            Cancelled: `should_stop` returned True.
        """
        self.mark_used()
        started = time.perf_counter()
        if self._model is not None and self._name == name:
            return self._model
        path = self.catalogue.obtain(name, should_stop=should_stop)
        if path != self._path or self._model is None:
            self.unload()
            self._model = self._start_or_renew(name, path, should_stop)
            self._path = path
            log.info("Model %s is ready", name, action="model_loaded", device=self.device, path=path)
            self.on_loaded(name, time.perf_counter() - started)
        self._name = name
        self.mark_used()
        return self._model

    def unload(self) -> None:
        """Give the model's memory back, once the caller holds it no longer either. Only for the worker thread."""
        if self._model is not None:
            self._model = self._name = self._path = None
            give_memory_back()
            self.on_unloaded()

    def mark_used(self) -> None:
        """Say that the model is needed now, or was until now: idling counts from here. Only for the worker thread."""
        self._used_at = self._clock()

    def idle_deadline(self) -> float | None:
        """When the model will have idled long enough, on the clock of `time.monotonic`.

        None: never, because nothing is loaded or the settings keep it. Only for the worker thread.
        """
        return None if self._model is None or self._idle_s is None else self._used_at + self._idle_s

    def unload_if_idle(self) -> bool:
        """Unload the model if its time has come, and say whether it was; only for the worker thread, between jobs."""
        deadline = self.idle_deadline()
        if deadline is None or self._clock() < deadline:
            return False
        log.info("Model %s has idled and is unloaded", self._name, action="model_unloaded")
        self.unload()
        return True

    def _start_or_renew(self, name: str, path: Path, should_stop: Callable[[], bool]) -> WhisperModel:
        """Start a model; one that was joined on this machine gets a second chance, from its packages."""
        try:
            return self._start(name, path)
        except _BrokenModelError as exc:
            if not self.catalogue.can_renew(name, path):
                raise unusable(name, "its files are damaged or of another kind") from exc
        try:
            return self._start(name, self.catalogue.renew(name, should_stop=should_stop))
        except _BrokenModelError as exc:
            raise unusable(name, "its files are damaged or of another kind") from exc

    def _start(self, name: str, path: Path) -> WhisperModel:
        try:
            modelfiles.check(path)
            model = WhisperModel(
                str(path), device=self.device, compute_type=self.compute_type, cpu_threads=self.cpu_threads
            )
            _warm_up(model)
        except Exception as exc:
            # Nothing but the model can be at fault here, and broken ones raise what they like: the tokenizer's loader
            # raises the bare Exception, its encoder an IndexError, CTranslate2 whatever its own files make it.
            log.warning("Model %s cannot be loaded: %s", name, exc, action="model_failed", path=path)
            if is_out_of_memory(exc):
                raise _no_memory(name) from exc
            raise _BrokenModelError from exc
        return model


class _BrokenModelError(Exception):
    """The files of a model cannot be loaded, or the model fails its first use."""


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether an exception of a model says that the memory, of the machine or of the device, was not enough."""
    return isinstance(exc, MemoryError) or any(words in str(exc) for words in ("out of memory", "alloc"))


def _no_memory(name: str) -> JobFailedError:
    return unavailable(
        f"There is not enough memory for the model {name!r}: free some and retry, or choose a smaller one."
    )


def _choose_device(settings: ModelSettings) -> tuple[str, str]:
    has_cuda = ctranslate2.get_cuda_device_count() > 0
    if settings.device == "cuda" and not has_cuda:
        raise ConfigError("`models.device` is 'cuda', but there is no CUDA device: set it to 'auto' or 'cpu'.")
    device = "cuda" if has_cuda and settings.device != "cpu" else "cpu"
    supported = ctranslate2.get_supported_compute_types(device)
    if settings.compute_type == "auto":
        return device, next(name for name in _COMPUTE_TYPES[device] if name in supported)
    if settings.compute_type not in supported:
        raise ConfigError(
            f"`models.compute_type` is {settings.compute_type!r}, but {device} takes only "
            f"{', '.join(sorted(supported))}: choose one of these, or 'auto'."
        )
    return device, settings.compute_type


def _warm_up(model: WhisperModel) -> None:
    """Run it on a second of quiet noise: some broken models show that only at the first use."""
    noise = np.random.default_rng(seed=0).normal(scale=1e-3, size=16_000).astype(np.float32)
    segments, _ = model.transcribe(noise, language="en", beam_size=1, temperature=0.0, max_new_tokens=8)
    for _ in segments:
        pass
