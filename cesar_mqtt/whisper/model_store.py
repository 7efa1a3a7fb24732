"""The one Whisper model in memory: its device, how it is loaded and warmed up, and when it is unloaded.

`load`, `unload` and the methods about idling are for the worker thread; any thread may call the others.
"""

import copy
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ctranslate2
import numpy as np
from faster_whisper import WhisperModel

from cesar_mqtt.audio.vad import speech_probabilities
from cesar_mqtt.config import ModelSettings
from cesar_mqtt.errors import ConfigError
from cesar_mqtt.logs import get_logger
from cesar_mqtt.threads import never_stop
from cesar_mqtt.whisper import model_files
from cesar_mqtt.whisper.catalogue import Catalogue, ModelEntry
from cesar_mqtt.whisper.hardware import divide_cores, limit_heap, release_memory, usable_cores
from cesar_mqtt.whisper.model_files import unavailable, unusable
from cesar_mqtt.whisper.model_steps import ModelSteps
from cesar_mqtt.whisper.step_threads import StepThreads

log = get_logger(__name__)

_COMPUTE_TYPES = {"cpu": ("int8", "float32"), "cuda": ("float16", "int8_float16", "int8", "float32")}
"""Best first, for `auto`."""
_WARM_UP_FRAMES = 100
"""Of 10 ms each."""
_MEASURED_LENGTH = 11
"""Five tokens, as CTranslate2 keeps half of it for the prompt. The first takes longest, and must not decide alone."""


@dataclass(frozen=True, slots=True)
class StoreDescription:
    """The effective settings and the models of this machine.

    Attributes:
        allowed: every name that a job may give.
        default: the model of jobs that name none.
        default_language: the language of jobs that name none; None: it is detected.
        loaded: the model in memory; None: none.
        device: `cpu` or `cuda`.
        compute_type: the precision, as CTranslate2 calls it.
        workers: how many windows of a long recording are transcribed at once.
        cpu_threads: how many threads each of them uses on the CPU.
        models: each allowed model, once.
    """

    allowed: tuple[str, ...]
    default: str
    default_language: str | None
    loaded: str | None
    device: str
    compute_type: str
    workers: int
    cpu_threads: int
    models: tuple[ModelEntry, ...]


class ModelStore:
    """The models of this machine, and one of them in memory.

    Only one is kept: it is unloaded before another is loaded, so that memory never has to hold two.

    Attributes:
        catalogue: the models and where they are.
        device: `cpu` or `cuda`.
        compute_type: the precision of the computation, as CTranslate2 calls it.
        workers: how many threads may use a model at once.
        cpu_threads: how many threads a model uses on the CPU for each of them.
        on_loaded: called with the name of a model that was loaded and the seconds that it took, a download included.
        on_unloaded: called when the model in memory was dropped. Both run in the worker thread.
    """

    def __init__(
        self, settings: ModelSettings, *, folder: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Check the settings against this machine; nothing is loaded or downloaded.

        Args:
            settings: the `models` section.
            folder: where models that come in parts are joined; None: in the user's data directory.
            clock: a monotonic clock, in seconds.

        Raises:
            ConfigError: a setting names something that this machine does not have; the message names the setting.
        """
        self.device, self.compute_type = _choose_device(settings)
        limit_heap()
        workers = settings.workers or (1 if self.device == "cuda" else None)
        self.workers, self.cpu_threads = divide_cores(settings.cpu_threads or usable_cores(), workers)
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
        """The model of jobs that name none."""
        return self.catalogue.default_name()

    def language_for(self, name: str) -> str | None:
        """Return the default language for jobs of a model; None: it is detected."""
        return self.catalogue.language_for(name)

    def is_allowed(self, name: str) -> bool:
        """Whether a job may name this model, on this machine or not."""
        return self.catalogue.is_allowed(name)

    def explain_unknown(self, name: str) -> str:
        """Return why a job may not name this model, as a part of a sentence; see `Catalogue.explain_unknown`."""
        return self.catalogue.explain_unknown(name)

    def is_multilingual(self, name: str) -> bool | None:
        """Whether a model knows more than English; None: unknown before it is loaded."""
        return self.catalogue.is_multilingual(name)

    def describe(self) -> StoreDescription:
        """Describe the models and the effective settings; reads the disk for some milliseconds."""
        return StoreDescription(
            allowed=self.catalogue.allowed_names(),
            default=self.default_name(),
            default_language=self.catalogue.default_language,
            loaded=self._name,
            device=self.device,
            compute_type=self.compute_type,
            cpu_threads=self.cpu_threads,
            workers=self.workers,
            models=self.catalogue.entries(),
        )

    def load(self, name: str, *, should_stop: Callable[[], bool] = never_stop) -> WhisperModel:
        """Return a warmed-up model: the one in memory, or another that is loaded in its place.

        One that is not on this machine is downloaded first, if that is allowed. Only for the worker thread; the model
        belongs to that thread, and to the `workers` threads that it starts, until the next call.

        Args:
            name: as a job gives it.
            should_stop: asked several times a second during a join or download; loading cannot be interrupted.

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
            self._model = self._load(name, path)
            self._path = path
            log.info("Model %s is ready", name, action="model_loaded", device=self.device, path=path)
            self.on_loaded(name, time.perf_counter() - started)
        self._name = name
        self.mark_used()
        return self._model

    def unload(self) -> None:
        """Release the model; its memory is freed once the caller has dropped it, too. Only for the worker thread."""
        if self._model is not None:
            self._model = self._name = self._path = None
            release_memory()
            self.on_unloaded()

    def mark_used(self) -> None:
        """Start the idle time anew: the model is in use now, or was until now. Only for the worker thread."""
        self._used_at = self._clock()

    def idle_deadline(self) -> float | None:
        """When the model is due to be unloaded, on the monotonic clock. Only for the worker thread.

        None: never, because no model is loaded or `models.idle_timeout` keeps it.
        """
        return None if self._model is None or self._idle_s is None else self._used_at + self._idle_s

    def unload_if_idle(self) -> bool:
        """Unload the model if it is due, and return whether it was. Only for the worker thread, between jobs."""
        deadline = self.idle_deadline()
        if deadline is None or self._clock() < deadline:
            return False
        log.info("Model %s has idled and is unloaded", self._name, action="model_unloaded")
        self.unload()
        return True

    def _load(self, name: str, path: Path) -> WhisperModel:
        _warn_of_address_space()
        try:
            model_files.check(path)
            model = WhisperModel(
                str(path),
                device=self.device,
                compute_type=self.compute_type,
                num_workers=self.workers,
                cpu_threads=self.cpu_threads,
            )
            _warm_up(model)
            threads = StepThreads()
            if self.device == "cpu" and self.cpu_threads > 1:
                threads.measure(_short_decoding(model))
            model.model = ModelSteps(model.model, at_once=max(1, self.workers // 2), threads=threads)
        except Exception as exc:
            # Only the model can be at fault here, and a broken one raises anything: the tokenizer's loader a bare
            # Exception, its encoder an IndexError, CTranslate2 whatever its own files lead to.
            log.warning("Model %s cannot be loaded: %s", name, exc, action="model_failed", path=path)
            if is_out_of_memory(exc):
                raise unavailable(
                    f"There is not enough memory for the model {name!r}: free some and retry, or choose a smaller one."
                ) from exc
            raise unusable(name, "its files are damaged or of another kind") from exc
        return model


def _warn_of_address_space() -> None:
    """Say what a crash would mean: where `mmap` fails, the libraries under the model crash, and nothing is raised.

    No limit can be called enough: loading tiny.en maps 790 MB more than before, of which little is used [measured].
    """
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit_bytes != resource.RLIM_INFINITY:
        message = (
            "The address space of this process is limited to %d bytes (RLIMIT_AS, `ulimit -v`). Loading a model maps "
            "far more than it uses: if the process ends here by a signal, remove that limit, and limit memory instead "
            "(MemoryMax= of the unit, or the container's limit)."
        )
        log.warning(message, limit_bytes, action="model")


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether an exception of a model means that the machine or the device ran out of memory.

    CTranslate2 raises RuntimeError for that, so the text has to be read.
    """
    return isinstance(exc, MemoryError) or any(words in str(exc) for words in ("out of memory", "alloc"))


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
    """Run the model on a second of quiet noise: some broken ones fail only at the first use.

    faster-whisper pads it to half a minute, which takes as long to encode as half a minute of speech.
    """
    noise = np.random.default_rng(seed=0).normal(scale=1e-3, size=16_000).astype(np.float32)
    unpadded = copy.copy(model)
    unpadded.encode = lambda features: model.encode(features[..., :_WARM_UP_FRAMES])
    segments, _ = unpadded.transcribe(noise, language="en", beam_size=1, temperature=0.0, max_new_tokens=8)
    for _ in segments:
        pass
    speech_probabilities(noise)  # loads the VAD, which the first recording would have to wait for


def _short_decoding(model: WhisperModel) -> Callable[[], object]:
    """Return a beam search that always takes as many steps."""
    encoded = model.encode(np.zeros((model.model.n_mels, _WARM_UP_FRAMES), np.float32))
    start, end = (model.hf_tokenizer.token_to_id(f"<|{name}|>") for name in ("startoftranscript", "endoftext"))
    return partial(
        model.model.generate, encoded, [[start]], beam_size=5, max_length=_MEASURED_LENGTH, suppress_tokens=[end]
    )
