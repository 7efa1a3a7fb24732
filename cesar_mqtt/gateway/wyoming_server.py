"""Speech-to-text in the Wyoming protocol, for Home Assistant's Assist: each utterance is a job of a high priority.

The thread `wyoming` has an event loop with a task for each connection; the thread of its bus brings the statuses.

Wyoming has no authentication: every client that reaches the port has speech transcribed. What one client may use is
bounded: the length of an utterance, the size of an event, what its samples grow to, the number of connections.
"""

import asyncio
import io
import ipaddress
import socket
import uuid
import wave
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioChunkConverter, AudioStart, AudioStop
from wyoming.error import Error
from wyoming.event import Event
from wyoming.info import AsrModel, AsrProgram, Attribution, Describe, Info
from wyoming.ping import Ping, Pong
from wyoming.server import AsyncEventHandler
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from cesar_mqtt import __version__
from cesar_mqtt.config import BrokerSettings, WyomingSettings
from cesar_mqtt.errors import CesarError
from cesar_mqtt.gateway.address import open_port, parse_address
from cesar_mqtt.gateway.bus import Bus, json_object
from cesar_mqtt.gateway.bus_client import BusClient
from cesar_mqtt.gateway.home_assistant import HomeAssistantNames
from cesar_mqtt.gateway.submission import Submission
from cesar_mqtt.logs import get_logger
from cesar_mqtt.mqtt.messages import Delivery, Subscription
from cesar_mqtt.protocol.languages import LANGUAGE_CODES
from cesar_mqtt.protocol.topics import Topics

log = get_logger(__name__)

DEFAULT_ADDRESS = "127.0.0.1:10300"

_SAMPLE_RATE = 16_000
_SAMPLE_BYTES = 2
_MAX_AUDIO_S = 300
"""The longest utterance: 10 MB. Longer speech is a recording, for the watch folder or `submit`."""
_MAX_EVENT_BYTES = 1 << 20
_MAX_CONNECTIONS = 32
"""Beyond it the client is disconnected that has waited longest without sending anything."""
_RATES = range(4_000, 192_001)
_WIDTHS = range(1, 5)
_CHANNELS = range(1, 3)
"""Of the samples that a client may send: audioop makes 16 GB of an event of 1 MiB at one sample a second."""
_NAMES_S = 300.0
"""How long names of Home Assistant are used before they are asked for again."""
_NAMES_CHARACTERS = 800
"""About as much as fits into the prompt; the consumer cuts the rest."""
_SERVICE = "_wyoming._tcp.local."
_MULTICAST = "224.0.0.251"
_ATTRIBUTION = Attribution(name="OpenAI, Systran", url="https://github.com/SYSTRAN/faster-whisper")
_ENGLISH_ONLY = ".en"


class JobError(Exception):
    """There is no transcript; `code` is for programs."""

    def __init__(self, text: str, code: str) -> None:
        super().__init__(text)
        self.code = code


class WyomingServer(BusClient):
    """The server on one address."""

    def __init__(self, settings: WyomingSettings, broker: BrokerSettings, topics: Topics) -> None:
        """Open the port; nothing is answered before `start`.

        Args:
            settings: the address, and what the jobs are like.
            broker: how to reach the broker.
            topics: the prefix, and the name under which the server is announced.

        Raises:
            ConfigError: the address, the token's file or a broker setting is wrong.
        """
        super().__init__("wyoming")
        self._settings = settings
        self._name = f"cesar-mqtt-{topics.consumer}"
        self._host, port = parse_address(
            settings.listen or DEFAULT_ADDRESS, setting="wyoming.listen", default=DEFAULT_ADDRESS
        )
        self._names = HomeAssistantNames(settings) if settings.home_assistant_url else None
        self._rejected_topic, self._status_level = topics.rejected, topics.status("")
        self._waiting: dict[str, tuple[Submission, Future[Mapping[str, Any]]]] = {}
        """The submissions without a final status, by the id of the job."""
        self._owners: dict[str, str] = {}
        """The consumer of each of them that was accepted."""
        self._abandoned: set[str] = set()
        """Jobs for which no client waits, and which no consumer has accepted yet."""
        self._models: dict[str, list[str]] = {}
        """The models of each consumer, its default first, by the topic that names them."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_asked = asyncio.Event()
        self._bus = Bus(
            broker,
            topics,
            role="wyoming",
            subscriptions=[
                Subscription(topics.status("+")),
                Subscription(topics.rejected),
                Subscription(f"{topics.prefix}/consumer/+/info", wants_retained=True),
            ],
            sends_commands=True,
            on_message=self._on_message,
            on_connected=self._on_connected,
        )
        self._socket = open_port(self._host, port, setting="wyoming.listen")
        self.port: int = self._socket.getsockname()[1]

    def _release(self) -> None:
        self._socket.close()

    def _wake(self) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # it is closed already
                self._loop.call_soon_threadsafe(self._stop_asked.set)

    # -- the thread of the bus -----------------------------------------------------------------------------------------

    def _on_connected(self) -> None:
        """Submit again what has no final status: it may have been published while there was no connection."""
        for item, _ in list(self._waiting.values()):
            self._bus.submit(item)

    def _on_message(self, delivery: Delivery) -> None:
        document = json_object(delivery.payload)
        if delivery.topic == self._rejected_topic:
            self._finish(str(document.get("job_id")), {**document, "status": "rejected"})
        elif delivery.topic.startswith(self._status_level):
            job_id = delivery.topic.removeprefix(self._status_level)
            if not document or document.get("status") in ("completed", "error", "cancelled"):
                self._finish(job_id, document)
            else:
                self._note_owner(job_id, document.get("consumer"))
        elif delivery.topic.endswith("/info") and isinstance(document.get("models"), list):
            names = dict.fromkeys((document.get("default_model"), *document["models"]))
            self._models[delivery.topic] = [name for name in names if isinstance(name, str)]

    def _note_owner(self, job_id: str, consumer: object) -> None:
        if isinstance(consumer, str) and job_id in self._waiting:
            self._owners[job_id] = consumer
        if isinstance(consumer, str) and job_id in self._abandoned:
            self._abandoned.discard(job_id)
            self._bus.command("cancel", {"job_id": job_id}, consumer=consumer)

    def _finish(self, job_id: str, status: Mapping[str, Any]) -> None:
        self._abandoned.discard(job_id)
        found = self._waiting.pop(job_id, None)
        if found is not None and found[1].set_running_or_notify_cancel():
            found[1].set_result(status)

    # -- the event loop ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        if self._stopping.is_set():
            return
        handlers: dict[_Handler, None] = {}  # the one that has sent nothing for longest comes first

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if len(handlers) >= _MAX_CONNECTIONS and not await _end_idle(handlers):
                writer.close()
                return

            def on_event() -> None:
                if handler in handlers:
                    handlers[handler] = handlers.pop(handler)

            handler = _Handler(reader, writer, self, on_event=on_event)
            handlers[handler] = None
            try:
                await handler.run()
            except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as exc:
                # A client that is gone, or that does not speak the protocol.
                log.debug("A client of Wyoming was disconnected: %r", exc, action="wyoming_refused")
            finally:
                handlers.pop(handler, None)
                writer.close()

        async with await asyncio.start_server(handle, sock=self._socket, limit=_MAX_EVENT_BYTES):
            announced = await self._announce()
            names = asyncio.create_task(self._names.refresh_for_ever(_NAMES_S)) if self._names else None
            log.info("Wyoming is on tcp://%s:%d", self._host, self.port, action="wyoming")
            await self._stop_asked.wait()
            if names is not None:
                names.cancel()
            if announced is not None:
                await announced.async_close()
            for handler in list(handlers):
                await handler.stop()

    async def _announce(self) -> AsyncZeroconf | None:
        """Announce the server in the local network, unless only this machine reaches it."""
        if not self._settings.announce or _is_loopback(self._host):
            return None
        try:
            return await announce(self._name, _reachable_address(self._host), self.port)
        except OSError as exc:
            log.warning("The Wyoming server is not announced: %s", exc.strerror or exc, action="wyoming_hidden")
            return None

    def info(self) -> Info:
        """Return what `describe` is answered with: the models of the consumers that are known."""
        names = dict.fromkeys(name for names in list(self._models.values()) for name in names) or {"default": None}
        models = [
            AsrModel(
                name=name,
                attribution=_ATTRIBUTION,
                installed=True,
                description=f"Whisper {name}",
                version=None,
                languages=["en"] if name.endswith(_ENGLISH_ONLY) else list(LANGUAGE_CODES),
            )
            for name in names
        ]
        program = AsrProgram(
            name="cesar-mqtt",
            attribution=Attribution(name="cesar-mqtt", url=""),
            installed=True,
            description="A durable transcription queue on MQTT",
            version=__version__,
            models=models,
        )
        return Info(asr=[program])

    async def transcribe(self, audio: bytes, request: Transcribe) -> Transcript:
        """Submit an utterance and wait for its transcript; without one in the end the job is cancelled.

        Args:
            audio: mono samples of 16 bits at 16 kHz.
            request: model, language and words that the client expects; each may be missing.

        Raises:
            JobError: there is none.
        """
        if not any(self._bus.consumers.values()):
            raise JobError("No consumer is online.", "no_consumer")
        job_id = f"wyoming-{uuid.uuid4().hex[:16]}"
        item = Submission(job_id, _wav(audio), "the utterance", self._options(request))
        future: Future[Mapping[str, Any]] = Future()
        self._waiting[job_id] = item, future
        self._bus.submit(item).add_done_callback(partial(self._on_sent, job_id))
        try:
            status = await asyncio.wait_for(asyncio.wrap_future(future), self._settings.timeout)
        except TimeoutError as exc:
            self._cancel(job_id)
            raise JobError(f"There was no transcript within {self._settings.timeout:g} s.", "timeout") from exc
        except asyncio.CancelledError:
            self._cancel(job_id)
            raise
        finally:
            self._waiting.pop(job_id, None)
            self._owners.pop(job_id, None)
        if status.get("status") == "completed":
            language = status.get("detected_language") or status.get("language")
            return Transcript(text=str(status.get("result_text") or "").strip(), language=language)
        text = status.get("error_message") or status.get("detail") or "The job was cancelled."
        raise JobError(str(text), str(status.get("error_code") or status.get("reason") or "cancelled"))

    def _cancel(self, job_id: str) -> None:
        """Cancel a job for which no client waits any more, unless `wyoming.keep_jobs` is set or the server stops."""
        if self._settings.keep_jobs or self._stopping.is_set():
            return
        log.info("Cancelling: no client waits for the transcript any more", action="wyoming_cancelled", job_id=job_id)
        self._abandoned.add(job_id)
        self._note_owner(job_id, self._owners.get(job_id))

    def _on_sent(self, job_id: str, sent: "Future[bool]") -> None:
        error = None if sent.cancelled() else sent.exception()
        if isinstance(error, CesarError):
            self._finish(job_id, {"status": "error", "error_code": "not_sent", "error_message": str(error)})

    def _options(self, request: Transcribe) -> dict[str, Any]:
        """Return the fields of the request; a job that cannot start in time is not worth starting."""
        known = {name for names in list(self._models.values()) for name in names}
        expected = (*(request.transcript_names or ()), *(request.transcript_terms or ()))
        names = dict.fromkeys(map(str, (*expected, *(self._names.names if self._names else ()))))
        fields = {
            "priority": self._settings.priority or None,
            "language": request.language or self._settings.language,
            "model_size": request.name if request.name in known else None,
            "hotwords": ", ".join(names)[:_NAMES_CHARACTERS] or None,
            "expires_in": self._settings.timeout,
            "metadata": {"source": "wyoming"},
        }
        return {name: value for name, value in fields.items() if value is not None}


class _Handler(AsyncEventHandler):
    """One connection: any number of utterances, answered one after the other.

    While one is transcribed the connection is read on, so that the end of it is noticed.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        server: WyomingServer,
        *,
        on_event: Callable[[], None],
    ) -> None:
        super().__init__(_BoundedReader(reader), writer)  # type: ignore[arg-type]
        self._server = server
        self._on_event = on_event
        self._request = Transcribe()
        self._audio = bytearray()
        self._converter = _converter()
        self._answer: asyncio.Task[None] | None = None

    @property
    def is_answering(self) -> bool:
        return self._answer is not None and not self._answer.done()

    async def handle_event(self, event: Event) -> bool:
        self._on_event()
        if Describe.is_type(event.type):
            await self.write_event(self._server.info().event())
        elif Ping.is_type(event.type):
            await self.write_event(Pong(text=Ping.from_event(event).text).event())
        elif Transcribe.is_type(event.type):
            self._request = Transcribe.from_event(event)
        elif AudioStart.is_type(event.type):
            self._audio.clear()
            self._converter = _converter()
        elif AudioChunk.is_type(event.type):
            return await self._append(AudioChunk.from_event(event))
        elif AudioStop.is_type(event.type):
            if self._answer is not None:
                await self._answer
            audio, self._audio = bytes(self._audio), bytearray()
            request, self._request = self._request, Transcribe()
            self._answer = asyncio.create_task(self._transcribe(audio, request))
        return True

    async def disconnect(self) -> None:
        """End the answer that no client reads."""
        if self._answer is not None:
            self._answer.cancel()

    async def _append(self, chunk: AudioChunk) -> bool:
        """Add samples to the utterance; a client that sends too many is told so, and disconnected."""
        if chunk.rate not in _RATES or chunk.width not in _WIDTHS or chunk.channels not in _CHANNELS:
            raise ValueError(f"samples of {chunk.width} bytes at {chunk.rate} Hz, {chunk.channels} channels")
        frame_bytes = chunk.width * chunk.channels
        whole = AudioChunk(
            chunk.rate, chunk.width, chunk.channels, chunk.audio[: len(chunk.audio) // frame_bytes * frame_bytes]
        )
        self._audio += self._converter.convert(whole).audio
        if len(self._audio) <= _MAX_AUDIO_S * _SAMPLE_RATE * _SAMPLE_BYTES:
            return True
        await self.write_event(Error(text=f"An utterance has at most {_MAX_AUDIO_S} s.", code="too_long").event())
        return False

    async def _transcribe(self, audio: bytes, request: Transcribe) -> None:
        """Answer an utterance; a client that gets no transcript is disconnected, so that it waits no longer."""
        with suppress(OSError):  # the client is gone
            try:
                transcript = await self._server.transcribe(audio, request) if audio else Transcript(text="")
            except JobError as exc:
                log.warning("No transcript for a client of Wyoming: %s", exc, action="wyoming_failed")
                await self.write_event(Error(text=str(exc), code=exc.code).event())
                await self.stop()
            else:
                await self.write_event(transcript.event())


async def _end_idle(handlers: dict[_Handler, None]) -> bool:
    """Disconnect the first client that waits for no transcript; False: all do."""
    idle = next((each for each in handlers if not each.is_answering), None)
    if idle is not None:
        del handlers[idle]
        await idle.stop()
    return idle is not None


class _BoundedReader:
    """A stream of which no event may demand more memory than `_MAX_EVENT_BYTES`; its lines are bounded already."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    async def readexactly(self, count: int) -> bytes:
        if count > _MAX_EVENT_BYTES:
            raise ValueError(f"an event of {count} bytes")
        return await self._reader.readexactly(count)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


async def announce(name: str, address: str, port: int) -> AsyncZeroconf:
    """Announce a Wyoming server at an IPv4 address by mDNS; Home Assistant then offers to add it. Raises OSError."""
    zeroconf = AsyncZeroconf(interfaces=[address])
    service = AsyncServiceInfo(
        _SERVICE, f"{name}.{_SERVICE}", addresses=[socket.inet_aton(address)], port=port, server=f"{name}.local."
    )
    await zeroconf.async_register_service(service, allow_name_change=True)
    return zeroconf


def _converter() -> AudioChunkConverter:
    return AudioChunkConverter(rate=_SAMPLE_RATE, width=_SAMPLE_BYTES, channels=1)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reachable_address(host: str) -> str:
    """Return the IPv4 address that others reach: of the interface towards them, where all are listened on."""
    with suppress(ValueError):
        if not ipaddress.ip_address(host).is_unspecified:
            return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((_MULTICAST, 1))  # nothing is sent
        return str(probe.getsockname()[0])


def _wav(audio: bytes) -> bytes:
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setparams((1, _SAMPLE_BYTES, _SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes(audio)
    return made.getvalue()
