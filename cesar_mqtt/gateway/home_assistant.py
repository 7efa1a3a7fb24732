"""The names of a Home Assistant's areas and entities, towards which Assist's transcripts are biased.

The event loop that refreshes them owns a `HomeAssistantNames`.
"""

import asyncio
from http import HTTPStatus
from typing import Any

import httpx2

from cesar_mqtt.config import WyomingSettings
from cesar_mqtt.errors import ConfigError
from cesar_mqtt.logs import get_logger

log = get_logger(__name__)

_TIMEOUT_S = 10.0
_DOMAINS = frozenset(
    {"alarm_control_panel", "climate", "cover", "fan", "humidifier", "input_boolean", "lawn_mower", "light", "lock"}
    | {"media_player", "scene", "script", "switch", "todo", "vacuum", "valve", "water_heater"}
)
"""What people call by name; sensors and updates would fill the prompt."""
_AREAS = "{{ areas() | map('area_name') | list | to_json }}"


class HomeAssistantNames:
    """Asks a Home Assistant for names, over its REST API.

    Attributes:
        names: those of areas, then those of entities; empty until they were fetched once.
    """

    def __init__(self, settings: WyomingSettings) -> None:
        """Read the token. Raises ConfigError."""
        self.names: tuple[str, ...] = ()
        self._url = (settings.home_assistant_url or "").rstrip("/")
        file = settings.home_assistant_token_file
        if file is None:
            raise ConfigError("wyoming.home_assistant_url needs wyoming.home_assistant_token_file: a file with a token")
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"wyoming.home_assistant_token_file '{file}' cannot be read: {exc}.") from exc
        self._headers = {"Authorization": f"Bearer {token}"}
        self._may_ask_areas = True
        """Until they are refused: Home Assistant counts that as a failed login, and may ban the address of this one."""

    async def refresh_for_ever(self, every_s: float) -> None:
        """Fetch the names now and then; a failure keeps those that were fetched before. A refused token ends it."""
        while True:
            try:
                self.names = await asyncio.to_thread(self.fetch)
                log.debug("%d names of Home Assistant are known", len(self.names), action="wyoming_names")
            except (httpx2.HTTPError, ValueError, LookupError, TypeError, AttributeError) as exc:
                log.warning("No names from Home Assistant at %s: %s", self._url, exc, action="wyoming_names")
                if isinstance(exc, httpx2.HTTPStatusError) and exc.response.status_code == HTTPStatus.UNAUTHORIZED:
                    log.warning("Its token is not used again before the next start", action="wyoming_names")
                    return
            await asyncio.sleep(every_s)

    def fetch(self) -> tuple[str, ...]:
        """Ask for the names; waits.

        Raises:
            httpx2.HTTPError: it does not answer, or refuses the token.
            ValueError: the answer is not JSON; LookupError, TypeError, AttributeError: it is not Home Assistant's.
        """
        with httpx2.Client(headers=self._headers, timeout=_TIMEOUT_S, trust_env=False) as client:
            states = client.get(f"{self._url}/api/states").raise_for_status().json()
            named = self._areas(client) if self._may_ask_areas else []
        entities = (name for state in states if (name := _name_of(state)) is not None)
        return tuple(dict.fromkeys((*map(str, named), *entities)))

    def _areas(self, client: httpx2.Client) -> Any:
        """Return the names of areas: a template, which needs the token of an administrator."""
        areas = client.post(f"{self._url}/api/template", json={"template": _AREAS})
        self._may_ask_areas = areas.status_code not in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
        return areas.json() if areas.is_success else []


def _name_of(state: Any) -> str | None:
    """Return the name of an entity that is called by name; None: it is none."""
    if str(state["entity_id"]).partition(".")[0] not in _DOMAINS:
        return None
    name = state.get("attributes", {}).get("friendly_name")
    return name.strip() or None if isinstance(name, str) else None
