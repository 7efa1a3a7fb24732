"""The model and the language of jobs that name none, as the command `set` changes them. Any thread may call it."""

from typing import Protocol

from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.logs import get_logger
from cesar_mqtt.protocol.commands import AS_CONFIGURED

log = get_logger(__name__)


class HasDefaults(Protocol):
    """Where the defaults are in force."""

    def set_defaults(self, model: str | None, language: str | None) -> None:
        """Put them in force; None: that of the settings, and an empty language: it is detected. Raises ValueError."""


class StoredDefaults:
    """Keeps in the ledger what `set` changed, so that it lasts over restarts."""

    def __init__(self, ledger: Ledger, models: HasDefaults) -> None:
        """Put in force what was set before, as far as the settings still allow it."""
        self._ledger = ledger
        self._models = models
        try:
            self._put_in_force(ledger.defaults.get("model"), ledger.defaults.get("language"))
        except ValueError as exc:
            log.warning("The defaults set by command do not apply: %s", exc, action="defaults_ignored")

    def change(self, model: str | None, language: str | None) -> None:
        """Change what is not None; on return the change is on disk and in force.

        Args:
            model: the name of a model, or `AS_CONFIGURED`.
            language: a code; an empty text: it is detected.

        Raises:
            ValueError: jobs may not name the model, or it does not know the language: a part of a sentence.
            LedgerError: the disk failed. Nothing has changed then, either.
        """
        before = self._ledger.defaults
        wanted = {**before, **({} if model is None else {"model": model})}
        wanted |= {} if language is None else {"language": language}
        if wanted.get("model") == AS_CONFIGURED:
            del wanted["model"]
        self._put_in_force(wanted.get("model"), wanted.get("language"))
        try:
            self._ledger.set_defaults(wanted)
        except BaseException:
            self._put_in_force(before.get("model"), before.get("language"))
            raise

    def _put_in_force(self, model: str | None, language: str | None) -> None:
        self._models.set_defaults(model, language)
