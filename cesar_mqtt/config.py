"""Settings: what they are called, what they default to, and how they are put together.

Every setting is read once at start into one frozen `Settings` value; nothing reads the environment later. Any thread
may read that value; the main thread calls `load_settings`. Where settings come from is the matter of `sources`.
"""

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cesar_mqtt.config_sources import DIRECTORIES, Said, Vocabulary, environment_says, file_says, flags_say
from cesar_mqtt.errors import ConfigError

EMBEDDED_BROKER = "embedded"
"""What `serve` uses when nothing names a broker: one of its own."""
LOCAL_BROKER = "mqtt://127.0.0.1:1883"
"""What the other commands use when nothing names a broker."""

_HIDDEN = "***"
_SECRET = frozenset({"broker.url"})
_PUBLIC_URL = re.compile(
    r"(?P<scheme>[a-z]+://)(?P<credentials>.*@)?"
    r"(?P<address>([\w.-]+|\[[0-9a-f:.]+\])(:[0-9]+)?(/[\w./-]*)?)",
    re.IGNORECASE | re.ASCII,
)


class Section(BaseModel):
    """A frozen group of settings that refuses names it does not know."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        str_strip_whitespace=True,
        allow_inf_nan=False,  # `inf` and `nan` are TOML, but not JSON, and the settings are published as JSON
        hide_input_in_errors=True,  # an input may be a URL with a password
    )


class BrokerSettings(Section):
    """Where the broker is and how to talk to it."""

    url: str = Field(default=EMBEDDED_BROKER, repr=False)
    """May hold a password: say it with the address's `redacted`, never as it is."""
    username: str | None = None
    password_file: Path | None = None
    """A file whose first line is the password; preferred to a password in the URL."""
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    keepalive: int = Field(default=30, ge=5, le=3600)
    """Seconds between signs of life; the broker sends the last will after one and a half of them."""
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    max_packet_bytes: int | None = Field(default=None, ge=1024)
    """The largest packet the broker takes, for brokers that do not say (MQTT 3.1.1); None: no limit known."""


class ConsumerSettings(Section):
    """Who this consumer is."""

    name: str = Field(
        default="cesar",
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        description="1 to 64 letters, digits, underscores or hyphens",
    )
    """Topic level and MQTT client id: unique on the broker and stable, for the session is persistent."""
    group: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        description="1 to 64 letters, digits, underscores or hyphens",
    )
    """Consumers that name the same group share one input, so that each job goes to one of them (MQTT 5 only). None:
    this one gets every job."""


class AudioSettings(Section):
    """Which audio may be read."""

    directories: tuple[Path, ...] = ()
    """Where `audio_path` is looked up, in order; empty: the folder that `serve` was started in."""
    max_bytes: int = Field(default=1 << 30, ge=1)
    max_duration: float = Field(default=24 * 3600.0, gt=0)
    """Seconds."""
    allowed_hosts: tuple[str, ...] = ()
    """Hosts that `audio_url` may name: `name`, `*.domain`, an address or a network such as `192.168.1.0/24`; each may
    end in `:port` or `:*`, else it stands for the scheme's own port. A name alone opens public addresses only: one at
    home has to be listed beside it. Empty: URLs are off."""
    download_timeout: float = Field(default=300.0, gt=0)
    """Seconds that one download may take in all, retries included."""
    download_retries: int = Field(default=2, ge=0)
    """How often a download is tried again after a failure that may pass."""
    downloads_ahead: int = Field(default=8, ge=1, le=64)
    """How many of the next jobs' URLs are fetched at once while another job is worked on."""


class ModelSettings(Section):
    """Which Whisper models may be used, and how."""

    default: str | None = None
    """None: `base` if it is on this machine, else an installed package's model, else `base`, downloaded."""
    allowed: tuple[str, ...] | None = None
    """None: every name that faster-whisper knows, and the folders inside `directory`."""
    directory: Path | None = None
    """A folder of CTranslate2 model folders, each named as the model is called."""
    download: bool = True
    """Whether a model that is not on this machine may be fetched from the Hugging Face hub."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compute_type: str = "auto"
    cpu_threads: int = Field(default=0, ge=0)
    """0: all usable cores."""
    idle_timeout: float | None = Field(default=None, gt=0)
    """Seconds without a job after which the model's memory is given back; None: it is kept."""


class TranscriberSettings(Section):
    """How a recording is worked through."""

    window: float = Field(default=600.0, ge=30.0, le=3600.0)
    """Seconds of audio that are held in memory and worked on at once, at most; what a crash can cost."""


class WorkerSettings(Section):
    """How jobs are worked through."""

    max_attempts: int = Field(default=3, ge=1)
    """How often a job may be started before a crash of the process makes it `error` `crashed`."""
    retries: int = Field(default=2, ge=0)
    """How often a job is tried again by itself after a failure that may pass."""
    retry_delay: float = Field(default=2.0, gt=0)
    """Seconds before the first retry, in which the jobs behind it go on; four times as long before each further one."""
    job_timeout: float | None = Field(default=None, gt=0)
    """Seconds that one attempt at a job may take before it ends as `error` `timeout`; None: as long as it takes."""
    drain_timeout: float | None = Field(default=None, gt=0)
    """Seconds that a stop waits for the current job before it goes back into the queue; None: as long as it takes."""


class QueueSettings(Section):
    """What is taken from the bus."""

    max_queued: int = Field(default=100_000, ge=1)
    """Jobs waiting; one more is refused as `queue_full`."""
    max_payload_bytes: int = Field(default=256 << 20, ge=1024)
    """The largest message taken; a larger one is refused as `payload_too_large`."""


class RetentionSettings(Section):
    """How long finished jobs are kept, with their statuses and their audio."""

    days: float = Field(default=7.0, gt=0)
    """Jobs that ended longer ago are deleted."""
    max_finished: int = Field(default=1000, ge=0)
    """Of the others so many are kept, the newest."""


class LogSettings(Section):
    """How the log looks."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class MetricsSettings(Section):
    """Numbers for Prometheus, over HTTP; needs the extra `metrics`."""

    port: int | None = Field(default=None, ge=1, le=65535)
    """Where they are served, under `/metrics`; None: they are not taken."""
    host: str = Field(default="127.0.0.1", min_length=1)
    """The address to listen on. There is no password: name another one only where the network is trusted."""


class HomeAssistantSettings(Section):
    """How the consumer announces itself to Home Assistant."""

    enabled: bool = True
    """Whether it does. What was announced before stays until `cesar-mqtt discovery remove`."""
    discovery: Literal["device", "component"] = "device"
    """One message for the whole device, or one for each entity, as Home Assistant before 2024.11 needs it."""
    prefix: str = Field(
        default="homeassistant",
        pattern=r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*$",
        description="topic levels of letters, digits, underscores or hyphens, joined by single slashes",
    )
    """The discovery prefix that Home Assistant's MQTT integration is set to; its birth message is expected below it."""


class Settings(Section):
    """All settings of one process."""

    topic_prefix: str = Field(
        default="cesar",
        pattern=r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*$",
        description="topic levels of letters, digits, underscores or hyphens, joined by single slashes",
    )
    data_dir: Path = Field(default_factory=lambda: DIRECTORIES.user_data_path)
    broker: BrokerSettings = BrokerSettings()
    consumer: ConsumerSettings = ConsumerSettings()
    audio: AudioSettings = AudioSettings()
    models: ModelSettings = ModelSettings()
    transcriber: TranscriberSettings = TranscriberSettings()
    worker: WorkerSettings = WorkerSettings()
    queue: QueueSettings = QueueSettings()
    retention: RetentionSettings = RetentionSettings()
    log: LogSettings = LogSettings()
    homeassistant: HomeAssistantSettings = HomeAssistantSettings()
    metrics: MetricsSettings = MetricsSettings()

    def redacted(self) -> dict[str, Any]:
        """Give the settings as JSON values that may be published: no password, no token.

        User names go as well, for there are brokers whose access token is the user name.
        """
        values = self.model_dump(mode="json")
        values["broker"]["url"] = _without_credentials(self.broker.url)
        if self.broker.username is not None:
            values["broker"]["username"] = _HIDDEN
        return values


# Plain pydantic and tomllib rather than pydantic-settings: of what is wanted here it would only merge the sources and
# split the variables' names. Refusing an unknown variable, naming a wrong value as its own source spells it, resolving
# paths by source and never showing a secret would still be ours, on top of subclasses of its sources.
def load_settings(
    *,
    flags: Mapping[str, Any],
    config_file: Path | None,
    environ: Mapping[str, str] = os.environ,
    cwd: Path,
    default_broker: str = EMBEDDED_BROKER,
) -> Settings:
    """Read the settings: flags win over the environment, the environment over the file, the file over the defaults.

    The file is `config_file`, else the first found of `./cesar.toml` and `cesar.toml` in the user's and the system's
    configuration directory; files are not merged. A variable is called `CESAR_` and the setting, with two underscores
    between group and name (`CESAR_BROKER__URL`); an empty one counts as not set. A list in a variable is a JSON list,
    or its items joined by `:` (paths) or `,` (all others). Under systemd the default data directory is the unit's
    StateDirectory. A path may begin with `~`; a relative one starts from the
    folder of the file it stands in, or from `cwd` when it comes from a flag or a variable.

    Args:
        flags: what the command line says, nested as the settings are; None and empty lists count as not given.
        config_file: the file of `--config`, which then has to exist.
        environ: the variables; only those named `CESAR_...` are looked at.
        cwd: the folder the command was started in, absolute.
        default_broker: `broker.url` when no source names it (`LOCAL_BROKER` for every command but `serve`).

    Raises:
        ConfigError: a setting is unknown or wrong, or the file cannot be read; the one sentence says which, as the
            user wrote it.
    """
    vocabulary = _vocabulary()
    said = {"broker.url": Said(default_broker, "broker.url", default_broker)}
    if state := environ.get("STATE_DIRECTORY"):  # systemd.exec(5): absolute, joined by colons when there are several
        said["data_dir"] = Said(state.partition(":")[0], "STATE_DIRECTORY", state)
    said |= file_says(vocabulary, config_file, cwd=cwd)
    said |= environment_says(vocabulary, environ, cwd=cwd)
    said |= flags_say(vocabulary, flags, cwd=cwd)
    try:
        return Settings.model_validate(_tree(said))
    except ValidationError as exc:
        raise _in_one_sentence(exc, said) from exc


def _tree(said: Mapping[str, Said]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, entry in said.items():
        group, _, inner = name.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[inner] = entry.value
    return tree


def _in_one_sentence(error: ValidationError, said: Mapping[str, Said]) -> ConfigError:
    """Translate the first thing that pydantic found; the others are told once that one is mended."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = [str(part) for part in first["loc"]]
    name = next((name for name in (".".join(path[:2]), ".".join(path[:1])) if name in said), None)
    if name is not None and first["type"] != "value_error":
        return _vocabulary().wrong(name, said[name])
    where = (".".join(path) or "the settings") if name is None else said[name].where
    return ConfigError(f"{where}: {first['msg'].removeprefix('Value error, ')}")


@cache
def _vocabulary() -> Vocabulary:
    """Collect every setting's dotted name and the JSON Schema of its value."""
    schemas: dict[str, Any] = {}
    for name, schema in Settings.model_json_schema()["properties"].items():
        kind = Settings.model_fields[name].annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            inner = kind.model_json_schema()["properties"]
            schemas |= {f"{name}.{key}": value for key, value in inner.items()}
        else:
            schemas[name] = schema
    return Vocabulary(schemas, secret=_SECRET)


def _without_credentials(url: str) -> str:
    """Give only what is known to be harmless: in a URL of another shape a secret may stand anywhere."""
    if url == EMBEDDED_BROKER:
        return url
    parts = _PUBLIC_URL.fullmatch(url)
    if parts is None:
        return _HIDDEN
    return f"{parts['scheme']}{_HIDDEN + '@' if parts['credentials'] else ''}{parts['address']}"
