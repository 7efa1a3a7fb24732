"""Settings: their names, types and defaults, and how flags, environment and file are merged into one frozen value.

Every setting is read once at start; nothing reads the environment later. Any thread may read the `Settings` value; the
main thread calls `load_settings`. `config_sources` reads the sources.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cesar_mqtt.config_sources import DIRECTORIES, SettingsSchema, SettingValue, read_environment, read_file, read_flags
from cesar_mqtt.errors import ConfigError

EMBEDDED_BROKER = "embedded"
"""The broker of `serve` when no source names one: an embedded one."""
LOCAL_BROKER = "mqtt://127.0.0.1:1883"
"""The broker of the other commands when no source names one."""

_HIDDEN = "***"
_SECRET = frozenset({"broker.url", "queue.jetstream.url", "webhook.url"})
_PUBLIC_URL = re.compile(
    r"(?P<scheme>[a-z]+://)(?P<credentials>.*@)?"
    r"(?P<address>([\w.-]+|\[[0-9a-f:.]+\])(:[0-9]+)?(/[\w./-]*)?)",
    re.IGNORECASE | re.ASCII,
)


TopicFilter = Annotated[
    str,
    Field(
        pattern=r"^((\+|[^+#\x00/]*)/)*(\+|#|[^+#\x00/]+)$",
        description="an MQTT topic filter such as `answers/#`",
    ),
]


ResultFormat = Literal["txt", "srt", "vtt", "tsv", "json", "md"]
"""As `protocol.fields` has them."""


class Section(BaseModel):
    """A frozen section of settings that rejects unknown names."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        str_strip_whitespace=True,
        allow_inf_nan=False,  # `inf` and `nan` are TOML, but not JSON, and the settings are published as JSON
        hide_input_in_errors=True,  # an input may be a URL with a password
    )


class BrokerSettings(Section):
    """The broker and the connection to it."""

    url: str = Field(default=EMBEDDED_BROKER, repr=False)
    """May hold a password: log only the address's `redacted`."""
    username: str | None = None
    password_file: Path | None = None
    """A file whose first line is the password; preferred to a password in the URL."""
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    keepalive: int = Field(default=30, ge=5, le=3600)
    """Seconds between PINGREQ packets; the broker publishes the last will after one and a half of them in silence."""
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    max_packet_bytes: int | None = Field(default=None, ge=1024)
    """The largest packet the broker accepts, for brokers that do not announce it (MQTT 3.1.1); None: no limit known."""


class ConsumerSettings(Section):
    """The consumer's identity on the broker."""

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
    """Consumers of one group share the requests: each job goes to one of them (MQTT 5 only). None: this consumer gets
    every job."""


class AudioSettings(Section):
    """The audio that may be read."""

    directories: tuple[Path, ...] = ()
    """Where `audio_path` is looked up, in order; empty: the folder that `serve` was started in."""
    max_bytes: int = Field(default=1 << 30, ge=1)
    max_duration: float = Field(default=24 * 3600.0, gt=0)
    """Seconds."""
    decoder_memory: int = Field(default=512 << 20, ge=64 << 20)
    """Bytes that decoding one recording may use; one that needs more ends as `audio_unreadable`."""
    decoder_timeout: float = Field(default=60.0, gt=0)
    """Seconds that decoding may take without progress; what can be decoded of a damaged file needs up to 30."""
    growing_timeout: float = Field(default=60.0, ge=0)
    """Seconds that a file is waited for while it is still being written; 0: it is taken as it is."""
    allowed_hosts: tuple[str, ...] = ()
    """Hosts that `audio_url` may name: `name`, `*.domain`, an address or a network such as `192.168.1.0/24`; each may
    end in `:port` or `:*`, else only the scheme's default port is allowed. A name allows public addresses only: list a
    private address beside it. Empty: URLs are off."""
    download_timeout: float = Field(default=300.0, gt=0)
    """Seconds that one download may take, retries included."""
    download_retries: int = Field(default=2, ge=0)
    """How often a download is retried after a temporary failure."""
    downloads_ahead: int = Field(default=12, ge=1, le=64)
    """How many of the next jobs' URLs are downloaded while another job is running."""


class ModelSettings(Section):
    """The Whisper models that may be used, and how they run."""

    default: str | None = None
    """None: `base` if it is on this machine, else the model of an installed package, else `base`, downloaded."""
    allowed: tuple[str, ...] | None = None
    """None: every name that faster-whisper knows, and the folders in `directory`."""
    default_language: str | None = None
    """The language of jobs that name none, where their model knows it, as Whisper's code, a name or a BCP-47 tag; None:
    it is detected."""
    directory: Path | None = None
    """A folder of CTranslate2 model folders, each named as its model."""
    download: bool = True
    """Whether a model that is not on this machine may be downloaded from the Hugging Face hub."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compute_type: str = "auto"
    cpu_threads: int = Field(default=0, ge=0)
    """How many cores the model may keep busy; 0: all usable ones."""
    workers: int = Field(default=0, ge=0, le=16)
    """How many windows of a long recording are transcribed at once, on these cores; 0: as many as help."""
    idle_timeout: float | None = Field(default=None, gt=0)
    """Seconds without a job after which the model is unloaded; None: it stays loaded."""


class TranscriberSettings(Section):
    """How a recording is transcribed."""

    window: float = Field(default=60.0, ge=10.0, le=3600.0)
    """The longest window, in seconds of audio. Those that are transcribed at once, and one more, are held in memory;
    they are what a crash can cost."""
    short_encoder_input: bool = True
    """Whether audio shorter than 30 s is encoded at its own length, with models that allow it; False: always 30 s."""


class SpeakerSettings(Section):
    """Names for speakers, of jobs with `diarize`."""

    directory: Path | None = None
    """A folder with one recording of each known voice, named as the speaker; None: speakers are numbered."""
    threshold: float = Field(default=0.6, gt=0, le=1)
    """How much a voice must resemble a known one to get its name, as a cosine."""


class WorkerSettings(Section):
    """Attempts, retries and time limits of a job."""

    max_attempts: int = Field(default=3, ge=1)
    """How many attempts may end in a crash of the process before the job ends as `error` `crashed`."""
    retries: int = Field(default=2, ge=0)
    """How often a job is retried automatically after a temporary failure."""
    retry_delay: float = Field(default=2.0, gt=0)
    """Seconds before the first retry, in which the jobs behind it run; four times as long each, up to an hour."""
    job_timeout: float | None = Field(default=None, gt=0)
    """Seconds that one attempt may take before the job ends as `error` `timeout`; None: no limit."""
    drain_timeout: float | None = Field(default=None, gt=0)
    """Seconds that a stop waits for the current job before it is requeued; None: no limit."""


class JetStreamSettings(Section):
    """The NATS server of `queue.engine = "jetstream"`; needs the extra `cluster`."""

    url: str = Field(
        default="nats://127.0.0.1:4222",
        repr=False,
        pattern=r"^(nats|tls|ws|wss)://[^\s,]+(,\s*(nats|tls|ws|wss)://[^\s,]+)*$",
        description="the nats://, tls://, ws:// or wss:// addresses of the servers, joined by commas",
    )
    """The servers of the cluster, joined by commas; may hold a password."""
    username: str | None = None
    password_file: Path | None = None
    """A file whose first line is that user's password."""
    credentials_file: Path | None = None
    """A file of NATS with a user's JWT and key, instead of user name and password."""
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    stream: str = Field(
        default="CESAR",
        pattern=r"^[A-Za-z0-9_-]{1,32}$",
        description="1 to 32 letters, digits, underscores or hyphens",
    )
    """The name of the queue, which all its consumers share: a stream, a bucket of keys, and the first token of the
    subjects. It is made where it is missing."""
    replicas: int = Field(default=1, ge=1, le=5)
    """On how many servers the queue is stored."""
    max_message_bytes: int | None = Field(default=None, ge=1024)
    """The largest request or upload; a larger one is rejected as `payload_too_large`. None: the server's `max_payload`,
    which has to leave 4 KiB for the queue's own headers."""
    ack_wait: float = Field(default=30.0, ge=1.0, le=3600.0)
    """Seconds without a sign of life after which the job of a consumer goes to another one."""


class QueueSettings(Section):
    """Where jobs come from, and limits on what is accepted from the bus."""

    engine: Literal["mqtt", "jetstream"] = "mqtt"
    """`mqtt`: this consumer subscribes to the jobs, and its ledger is the queue. `jetstream`: consumers on many
    machines share one queue on a NATS server, which is their broker, too."""
    mode: Literal["strict", "parallel"] = "strict"
    """With `jetstream`. `strict`: one job at a time in the whole group, in order; `parallel`: one in each consumer."""
    jetstream: JetStreamSettings = JetStreamSettings()
    max_queued: int = Field(default=100_000, ge=1)
    """The most queued jobs; the next is rejected as `queue_full`."""
    max_priority: int = Field(default=9, ge=0, le=9)
    """The highest priority of a job; a request with a higher one gets this. 0: all jobs are equal."""
    max_payload_bytes: int = Field(default=256 << 20, ge=1024)
    """The largest message accepted; a larger one is rejected as `payload_too_large`."""
    max_spool_bytes: int | None = Field(default=None, ge=1024)
    """How much uploaded audio may be stored. A larger recording is rejected as `storage_full`; what has no room beside
    the others waits at the broker, after the oldest audio of ended jobs was removed. None: what the disk holds."""


class RetentionSettings(Section):
    """How long finished jobs are kept, with their statuses and their audio."""

    days: float = Field(default=7.0, gt=0)
    """Finished jobs older than this are deleted."""
    max_finished: int = Field(default=1000, ge=0)
    """The most finished jobs kept; the oldest are deleted first."""
    max_rejected: int = Field(default=100, ge=0)
    """The most rejected requests kept that are recorded as jobs; they do not count as finished jobs."""


class SecuritySettings(Section):
    """What a request may have the consumer do with its rights at the broker."""

    response_topics: tuple[TopicFilter, ...] | None = None
    """Topic filters: a Response Topic that matches none gets no response, nor does one below the discovery prefix, one
    that begins with `$`, or one of the consumer's own topics. None: `response/#` and `replies/#` below the prefix."""


class GatewaySettings(Section):
    """The front doors of `serve`: its watch folder, transcript files, webhook, Wyoming server and web page."""

    username: str | None = None
    """The user that they have at the broker, where the consumer's own may not submit; None: the consumer's."""
    password_file: Path | None = None
    """A file whose first line is that user's password."""


class OutputSettings(Section):
    """Transcripts as files."""

    directory: Path | None = None
    """`serve`: each finished transcript is written here; None: none. `inbox`: None: beside the recordings."""
    formats: tuple[ResultFormat, ...] = Field(default=("txt",), min_length=1)
    """What is written."""


class InboxSettings(Section):
    """The watch folder; needs the extra `inbox`."""

    directories: tuple[Path, ...] = ()
    """`serve` submits each recording in these folders and their sub-folders; empty: there is no watch folder."""
    move_to: Path | None = None
    """Where a recording is moved once its transcript is written; None: it stays."""
    settle: float = Field(default=2.0, gt=0)
    """Seconds that a file must be unchanged; five times as long where the system cannot tell whether it is open."""
    rescan: float = Field(default=15.0, ge=1.0)
    """Seconds between two looks at the folders, for changes that the system does not report, as on network shares."""
    language: str | None = None
    """The language of the recordings; None: detected."""
    model: str | None = None
    """The model of the jobs; None: the consumer's default."""
    priority: int = Field(default=0, ge=0, le=9)
    """The priority of the jobs."""
    diarize: bool = False
    """Whether the speakers of the recordings are told apart."""


class LogSettings(Section):
    """Format and level of the log."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class MetricsSettings(Section):
    """Metrics for Prometheus, over HTTP; needs the extra `metrics`."""

    port: int | None = Field(default=None, ge=1, le=65535)
    """The port that serves `/metrics`; None: no metrics."""
    host: str = Field(default="127.0.0.1", min_length=1)
    """The address to listen on. There is no password: use another one only where the network is trusted."""


class HomeAssistantSettings(Section):
    """MQTT discovery: how the consumer announces itself to Home Assistant."""

    enabled: bool = True
    """False: nothing is announced; earlier announcements stay until `cesar-mqtt discovery remove`."""
    discovery: Literal["device", "component"] = "device"
    """One message for the whole device, or one for each entity for Home Assistant before 2024.11."""
    prefix: str = Field(
        default="homeassistant",
        pattern=r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*$",
        description="topic levels of letters, digits, underscores or hyphens, joined by single slashes",
    )
    """The discovery prefix of Home Assistant's MQTT integration; its birth message is expected below it."""


class WyomingSettings(Section):
    """Speech-to-text in the Wyoming protocol, for Home Assistant's Assist; needs the extra `wyoming`."""

    listen: str | None = Field(default=None, pattern=r"^\S+$", description="HOST:PORT, such as 127.0.0.1:10300")
    """The address; None: `serve` has no such server, and `wyoming` uses 127.0.0.1:10300. There is no password: use
    another address only where the network is trusted."""
    priority: int = Field(default=9, ge=0, le=9)
    """The priority of the jobs: a caller waits for each."""
    language: str | None = None
    """The language where the client names none; None: detected."""
    timeout: float = Field(default=30.0, gt=0)
    """Seconds that a client waits for its transcript; the job is cancelled then, as when the client disconnects."""
    keep_jobs: bool = False
    """Whether a job goes on when its client disconnects, or has waited too long while it runs."""
    announce: bool = True
    """Whether Home Assistant may find the server by mDNS; not where only this machine reaches it."""
    home_assistant_url: str | None = Field(
        default=None, pattern=r"^https?://[^\s?#@]+$", description="the http or https URL of a Home Assistant"
    )
    """Whose names of areas and entities transcripts are biased towards; None: none."""
    home_assistant_token_file: Path | None = None
    """A file with a long-lived access token of that Home Assistant."""


class WebhookSettings(Section):
    """Changes of jobs as signed HTTP requests."""

    url: str | None = Field(default=None, repr=False, pattern=r"^https?://\S+$", description="an http or https URL")
    """Where they are sent; may hold a secret. None: there is no webhook."""
    allowed_hosts: tuple[str, ...] | None = None
    """Hosts that the URL may name and lead to, written as `audio.allowed_hosts`, and that list by default."""
    key_file: Path | None = None
    """A file whose first line is the key of the signatures; None: `webhook.secret` in the data directory, which is
    made where it is missing."""
    events: tuple[Literal["queued", "processing", "completed", "error", "cancelled", "deleted"], ...] = (
        "completed",
        "error",
        "cancelled",
    )
    """Which changes are sent."""
    retry_for: float = Field(default=3 * 24 * 3600.0, ge=0)
    """Seconds for which a request that fails is sent again."""


class WebSettings(Section):
    """The web page and its HTTP API; needs the extra `web`."""

    listen: str | None = Field(default=None, pattern=r"^\S+$", description="HOST:PORT, such as 127.0.0.1:8188")
    """The address of the page; None: `serve` has none, and `web` uses 127.0.0.1:8188."""
    url: str | None = Field(
        default=None,
        pattern=r"^(https?|homeassistant)://[^\s?#]+$",
        description="the http or https URL of the page, or one of Home Assistant's own (homeassistant://)",
    )
    """How people reach the page, for `info` and Home Assistant; None: made of `listen`."""
    password_file: Path | None = None
    """A file whose first line is the password, hashed with argon2, or plain and readable for its owner only. OpenAI's
    clients send it as their API key. None: there is no password, and only this machine may reach the page."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks of proxies whose `X-Forwarded-...` headers are believed, as Home Assistant's ingress."""
    trusted_proxies_authenticate: bool = True
    """Whether these proxies authenticate the users themselves; false: the page asks for its password."""
    hosts: tuple[str, ...] = ()
    """Names by which the page may be called, beside addresses, `localhost` and the names of this machine."""


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
    speakers: SpeakerSettings = SpeakerSettings()
    worker: WorkerSettings = WorkerSettings()
    queue: QueueSettings = QueueSettings()
    retention: RetentionSettings = RetentionSettings()
    security: SecuritySettings = SecuritySettings()
    gateway: GatewaySettings = GatewaySettings()
    output: OutputSettings = OutputSettings()
    inbox: InboxSettings = InboxSettings()
    log: LogSettings = LogSettings()
    homeassistant: HomeAssistantSettings = HomeAssistantSettings()
    metrics: MetricsSettings = MetricsSettings()
    web: WebSettings = WebSettings()
    wyoming: WyomingSettings = WyomingSettings()
    webhook: WebhookSettings = WebhookSettings()

    def redacted(self) -> dict[str, Any]:
        """Return the settings as JSON values that may be published, without passwords and tokens.

        User names are removed as well: with some brokers the user name is the access token.
        """
        values = self.model_dump(mode="json")
        values["broker"]["url"] = _without_credentials(self.broker.url)
        if self.webhook.url is not None:
            values["webhook"]["url"] = _HIDDEN
        jetstream = values["queue"]["jetstream"]
        urls = self.queue.jetstream.url.split(",")
        jetstream["url"] = ",".join(_without_credentials(url.strip()) for url in urls)
        for section in (values["broker"], values["gateway"], jetstream):
            if section["username"] is not None:
                section["username"] = _HIDDEN
        return values


# Plain pydantic and tomllib rather than pydantic-settings, which would only merge the sources and split the names of
# variables. Unknown variables, errors in the spelling of the source, paths relative to the source and secrets that are
# never shown would still be ours, on top of subclasses of its sources.
def load_settings(
    *,
    flags: Mapping[str, Any],
    config_file: Path | None,
    environ: Mapping[str, str] = os.environ,
    cwd: Path,
    default_broker: str = EMBEDDED_BROKER,
    on_warning: Callable[[str], None] = lambda _sentence: None,
) -> Settings:
    """Read the settings: flags win over the environment, the environment over the file, the file over the defaults.

    The file is `config_file`, else the first found of `./cesar.toml` and `cesar.toml` in the user's and the system's
    configuration directory; files are not merged. A variable is named `CESAR_` and the setting, with two underscores
    between section and name (`CESAR_BROKER__URL`); an empty one counts as not set. A list in a variable is a JSON list,
    or its items joined by `:` (paths) or `,` (all others). Under systemd the default data directory is the unit's
    StateDirectory. A path may begin with `~`; a relative one starts from the folder of its file, or from `cwd` when it
    comes from a flag or a variable.

    Args:
        flags: the flags of the command line, nested as the settings are; None and empty lists count as not given.
        config_file: the file of `--config`, which must exist.
        environ: the variables; only those named `CESAR_...` are read.
        cwd: the folder the command was started in, absolute.
        default_broker: `broker.url` when no source names it (`LOCAL_BROKER` for every command but `serve`).
        on_warning: gets a sentence about each `CESAR_...` variable that is ignored.

    Raises:
        ConfigError: a setting is unknown or wrong, or the file cannot be read; one sentence names it as its source
            spells it.
    """
    schema = _schema()
    given = {"broker.url": SettingValue(default_broker, "broker.url", default_broker)}
    if state := environ.get("STATE_DIRECTORY"):  # systemd.exec(5): absolute, joined by colons when there are several
        given["data_dir"] = SettingValue(state.partition(":")[0], "STATE_DIRECTORY", state)
    given |= read_file(schema, config_file, cwd=cwd)
    given |= read_environment(schema, environ, cwd=cwd, on_unknown=on_warning)
    given |= read_flags(schema, flags, cwd=cwd)
    try:
        return Settings.model_validate(nest({name: entry.value for name, entry in given.items()}))
    except ValidationError as exc:
        raise _first_error(exc, given) from exc


def nest(values: Mapping[str, object]) -> dict[str, Any]:
    """Return values by dotted name as the settings nest them."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, leaf = name.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[leaf] = value
    return tree


def _first_error(error: ValidationError, given: Mapping[str, SettingValue]) -> ConfigError:
    """Translate the first error of pydantic; the next start shows the next one."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = [str(part) for part in first["loc"]]
    name = next((name for end in range(len(path), 0, -1) if (name := ".".join(path[:end])) in given), None)
    if name is not None and first["type"] != "value_error":
        return _schema().wrong_value(name, given[name])
    origin = (".".join(path) or "the settings") if name is None else given[name].origin
    return ConfigError(f"{origin}: {first['msg'].removeprefix('Value error, ')}")


@cache
def _schema() -> SettingsSchema:
    """Collect every setting's dotted name and the JSON Schema of its value."""
    return SettingsSchema(dict(_value_schemas(Settings, "")), secret=_SECRET)


def _value_schemas(section: type[Section], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, schema in section.model_json_schema()["properties"].items():
        kind = section.model_fields[name].annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from _value_schemas(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", schema


def _without_credentials(url: str) -> str:
    """Return the parts that hold no secret; in a URL of an unexpected shape any part may be one."""
    if url == EMBEDDED_BROKER:
        return url
    parts = _PUBLIC_URL.fullmatch(url)
    if parts is None:
        return _HIDDEN
    return f"{parts['scheme']}{_HIDDEN + '@' if parts['credentials'] else ''}{parts['address']}"
