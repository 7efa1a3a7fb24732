"""Containers: which are opened, what FFmpeg may do with them, and how long they say that they last.

FFmpeg gets the bytes of an open file and never a name, so no protocol and no playlist can make it read anything else.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import av
from av.audio.stream import AudioStream
from av.codec import codecs_available
from av.codec.codec import Codec, UnknownCodecError
from av.container import InputContainer

from cesar_mqtt.audio.file_reader import FileReader
from cesar_mqtt.audio.paths import UNREADABLE, failed
from cesar_mqtt.errors import ErrorCode

# Containers of recorded sound, film and speech; deliberately no playlists, network sessions or image sequences.
_CONTAINERS = (
    "aac,ac3,aea,aiff,amr,amrnb,amrwb,ape,asf,au,avi,bonk,caf,dhav,dsf,dss,dts,dtshd,dv,eac3,flac,flv,gsm,gxf,iff,ilbc,"
    "ircam,loas,matroska,mlp,mov,mp3,mpc,mpc8,mpeg,mpegts,mxf,nistsphere,nsv,nut,ogg,oma,osq,pvf,qcp,rm,shn,sox,tak,"
    "truehd,tta,voc,w64,wav,wavarc,wsd,wtv,wv,wve,xwma"
)
_PLAYLIST_MARKS = (b"#EXTM3U", b"[playlist]", b"ffconcat", b"<?xml", b"<MPD", b"<smil", b"<asx", b"v=0\r\n", b"v=0\n")
_REFUSED = (
    ErrorCode.AUDIO_NOT_ALLOWED,
    "The file is of a kind that is not decoded here (a playlist, a picture, a text): submit the recording itself.",
)

FFMPEG_TIMEOUT_S = 30.0
"""For opening and for each packet: in a file of the wrong kind FFmpeg may search for hours, 16 bytes at a time."""

TIMED = frozenset(
    {"asf", "avi", "dhav", "flac", "flv", "gxf", "matroska", "mov", "mpeg", "mpegts", "mxf", "nsv", "nut", "ogg"}
)
TIMED |= {"rm", "wtv"}
"""Containers whose time stamps tell where sound is; in all others FFmpeg only counts samples."""
GAPLESS = frozenset({"flac", "ogg"})
"""Those whose encoders leave no gaps: where there is one, sound is lost."""
JOINED_CLOCKS = frozenset({"mpeg", "mpegts"})
"""Those in which several recordings may follow each other without a head between them, each with its own clock."""
_LATE_STREAMS = frozenset({"flv", "mpeg", "mpegts", "nsv"})
"""Containers without an index of their streams: one that begins late is found only if enough is read for it."""
_LATE_SEARCH_BYTES = (50_000_000, 250_000_000)
"""How far to search them; the second, if there is no sound in the first."""
# Raw streams declare no duration; FFmpeg then guesses one from the bit rate of the first frames, which was ten times
# too long for speech after silence. In MPEG-TS and PS it is computed from time stamps, which may start again.
_UNDECLARED = frozenset({"aac", "ac3", "amr", "amrnb", "amrwb", "dts", "eac3", "gsm", "loas", "mpeg", "mpegts"})
_PER_TRACK = frozenset({"mov", "mxf"})
"""Containers that declare the duration of each track, and not only of the longest."""

_HEAD_BYTES = 4096
_RIFF_SIZE_UNKNOWN = 0x7FF0_0000
"""RIFF sizes from here on are placeholders of programs that wrote to a pipe."""
_MAX_CHUNKS = 1000
_LARGEST_FILE = 1 << 50
_CHUNK_HEAD_BYTES = 8
_CAF_HEAD_BYTES = 12
_ID3_HEAD_BYTES, _ID3_FOOTER = 10, 0x10
_TS_SYNC = 0x47
EBML, EBML_SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_MATROSKA_DURATION = re.compile(rb"\x44\x89[\x84\x88]")
"""An element of four or eight bytes (RFC 9559, section 5.1.2.10)."""
_MAX_ELEMENTS = 200_000
"""An hour of a live stream in Matroska has as many."""
_VOC = b"Creative Voice File\x1a"
_OGG_PAGE_BYTES = 65_307
_OGG_HEADER_BYTES = 27
_OGG_FIRST_PAGE, _OGG_LAST_PAGE = 2, 4


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a file says about its end.

    Attributes:
        end_s: on the file's clock; None: it does not say.
        expected_s: the same, as far as there are bytes for it.
        is_of_track: whether that is the end of the sound, and not perhaps of a longer picture.
        is_cut: whether the file shows, without a duration, that its end is missing.
    """

    end_s: float | None
    expected_s: float | None
    is_of_track: bool = True
    is_cut: bool = False


def name_of(container: InputContainer) -> str:
    """FFmpeg's short name of the container: of `mov,mp4,m4a,3gp,3g2,mj2` and the like, the first."""
    return container.format.name.partition(",")[0]


@contextmanager
def open_container(file: FileReader) -> Iterator[InputContainer]:
    """Open the container that begins where the file does.

    Raises:
        JobFailedError: `audio_unreadable`, `audio_not_allowed`, `audio_io_error`.
    """
    container = _open(file, _WHOLE_FILE if _has_unannounced_sound(file) else {})
    try:
        if name_of(container) in _LATE_STREAMS:
            for search_bytes in _LATE_SEARCH_BYTES:
                container.close()
                container = _open(file, _search(search_bytes))
                if container.streams.audio or search_bytes >= file.size():
                    break
        yield container
    finally:
        container.close()


_WHOLE_FILE = {"ignore_length": "1"}
"""Of the WAV demuxer."""


def _has_unannounced_sound(file: FileReader) -> bool:
    """Whether a WAV goes on behind the end of its sound without the head of a chunk: its recorder lost power."""
    head = file.read_at(0, 12)
    if not head.startswith(b"RIFF") or head[8:] != b"WAVE":
        return False
    byte_rate = 0
    for name, start, size in riff_chunks(file, 12):
        if name == b"fmt ":
            byte_rate = int.from_bytes(file.read_at(start + 8, 4), "little")
        elif name == b"data":
            end = start + size + size % 2
            left = file.size() - end
            if file.read_at(end, 4).strip().isalnum() or not 0 < byte_rate < left:
                return False
            # Zeros are room that was reserved.
            return any(file.read_at(end + left * part // 4, _HEAD_BYTES).strip(b"\0") for part in (1, 2, 3))
    return False


def _search(most_bytes: int) -> dict[str, str]:
    return {"probesize": str(most_bytes), "analyzeduration": str(24 * 3600 * av.time_base)}


def _open(file: FileReader, options: dict[str, str]) -> InputContainer:
    file.seek(0)
    if file.read_at(0, 64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(_PLAYLIST_MARKS):
        raise failed(_REFUSED)
    file.allow(FFMPEG_TIMEOUT_S)
    try:
        container = av.open(file, "r", container_options={**_OPEN_OPTIONS, **options}, metadata_errors="ignore")
    except av.FFmpegError as exc:
        file.raise_error()
        check_memory(exc)
        # There is no other way to tell a container that the whitelist lacks.
        raise failed(_REFUSED if isinstance(exc, av.ArgumentError) else UNREADABLE) from exc
    if file.error is not None:
        container.close()
        file.raise_error()
    return container


def check_memory(error: av.FFmpegError) -> None:
    """Raise MemoryError if FFmpeg had no memory left, which is no damage."""
    if error.errno == errno.ENOMEM:
        raise MemoryError from error


def _is_audio_decoder(name: str) -> bool:
    try:
        return Codec(name, "r").type == "audio"
    except UnknownCodecError:
        return False


# While FFmpeg looks for the parameters of the streams, it would decode cover art: a picture of 2 MB can take 2 GB and
# 30 s. With this list it has only the decoders of audio there.
_AUDIO_DECODERS = ",".join(sorted(name for name in codecs_available if _is_audio_decoder(name)))
_OPEN_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "", "codec_whitelist": _AUDIO_DECODERS}


_FROM_ZERO = frozenset({"asf", "avi", "flv", "matroska", "mov", "mxf", "nut", "rm"})


def zero_s(container: InputContainer, file: FileReader) -> float:
    """The time stamp at which the file's clock begins.

    A file whose declared duration includes the time before its first frame counts from 0. Others (a transport stream,
    a piece cut out of a live stream) begin at an arbitrary stamp: that of the first track.
    """
    start_s = (container.start_time or 0) / av.time_base
    if start_s <= 0 or name_of(container) not in _FROM_ZERO:
        return max(0.0, start_s)
    declared_s = (container.duration or 0) / av.time_base
    if name_of(container) == "mov":  # FFmpeg subtracts the start, and the edit list that causes it, from the duration
        declared_s = _movie_s(file)
    return 0.0 if start_s <= declared_s else start_s


def declaration(container: InputContainer, stream: AudioStream, file: FileReader) -> Declaration:
    """Read what the file says about the end of a track."""
    name = name_of(container)
    if name == "matroska" and (tagged_s := _tagged_s(stream)) is not None:
        return Declaration(tagged_s, tagged_s)
    # Without a duration in a Matroska file FFmpeg would guess one from the bit rate.
    if name in _UNDECLARED or (name == "matroska" and not _MATROSKA_DURATION.search(file.read_at(0, _HEAD_BYTES))):
        is_cut = _ends_in_packet(file) if name == "mpegts" else name == "matroska" and _lacks_bytes(file)
        return Declaration(None, None, is_cut=is_cut)
    if name == "mp3":
        tagged_s = _mp3_s(file.read_at(0, _HEAD_BYTES))
        return Declaration(tagged_s, tagged_s)
    end_s = _end_s(container, stream)
    if name == "wav":
        return Declaration(_wav_s(file) or end_s, end_s)
    if name == "flac":
        return Declaration(end_s, end_s)
    # Of a stream that goes on with another one, some programs do not mark the last page.
    is_cut = file.end is None and not _has_last_ogg_page(file) if name == "ogg" else _lacks_bytes(file)
    return Declaration(end_s, end_s, is_of_track=name in _PER_TRACK or name not in TIMED, is_cut=is_cut)


def _end_s(container: InputContainer, stream: AudioStream) -> float | None:
    """The end as FFmpeg reads it from the headers."""
    if name_of(container) in _PER_TRACK and stream.duration and stream.time_base:
        end_s = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    elif (
        (name_of(container) not in TIMED or name_of(container) in {"asf", "flac"})
        and stream.duration
        and stream.time_base
    ):
        # Of a track of ASF, FFmpeg gives the duration of the file, and adds its start to that of the container.
        end_s = float(stream.duration * stream.time_base)
    else:
        end_s = (container.duration or 0) / av.time_base
    return end_s if end_s > 0 else None


def _tagged_s(stream: AudioStream) -> float | None:
    """The end of a Matroska track: `00:00:05.857000000`, in the tag DURATION of FFmpeg and mkvmerge."""
    for key, text in stream.metadata.items():
        if key.upper().startswith("DURATION"):
            try:
                hours, minutes, seconds = text.strip("\0 ").split(":")
                return int(hours) * 3600 + int(minutes) * 60 + float(seconds) or None
            except ValueError:
                return None
    return None


_MP3_FRAME = re.compile(rb"\xff[\xe2-\xe3\xf2-\xf3\xfa-\xfb][\x00-\xff][\x00-\xff]")
"""The head of a frame of MPEG audio, layer III, of the versions 2.5, 2 and 1."""
_MP3_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_MP3_FRAME_SAMPLES = {3: 1152, 2: 576, 0: 576}
_MP3_LOWEST_BIT_RATES = {3: 32_000, 2: 8_000, 0: 8_000}
_MP3_TAG = re.compile(
    rb"(?:Xing|Info)...(?:[\x03\x07\x0b\x0f](?P<frames>....)(?P<bytes>....)|[\x01\x05\x09\x0d](?P<alone>....))"
    rb"|VBRI.{6}(?P<vbri_bytes>....)(?P<vbri>....)",
    re.DOTALL,
)


def _mp3_s(head: bytes) -> float | None:
    """The duration in a Xing, Info or VBRI tag; it is that of the first file, if several were joined.

    None: there is no tag, or it counts more frames than its bytes can hold.
    """
    frame = _MP3_FRAME.search(head)
    tag = _MP3_TAG.search(head, frame.start(), frame.start() + 64) if frame else None
    if frame is None or tag is None:
        return None
    version, rate = frame[0][1] >> 3 & 3, frame[0][2] >> 2 & 3
    if rate >= len(_MP3_RATES[version]):
        return None
    frames = int.from_bytes(tag["frames"] or tag["alone"] or tag["vbri"], "big")
    size = int.from_bytes(tag["bytes"] or tag["vbri_bytes"] or b"", "big")
    tagged_s = frames * _MP3_FRAME_SAMPLES[version] / _MP3_RATES[version][rate]
    is_wrong = 0 < 8 * size < tagged_s * _MP3_LOWEST_BIT_RATES[version]
    return None if is_wrong else tagged_s or None


def _wav_s(file: FileReader) -> float | None:
    """The duration that the header of a WAV declares, if there is less in the file: FFmpeg takes that of the file."""
    byte_rate, long_size = 0, 0
    for name, start, size in riff_chunks(file, 12):
        if name == b"ds64":
            long_size = int.from_bytes(file.read_at(start + 8, 8), "little")
        elif name == b"fmt ":
            byte_rate = int.from_bytes(file.read_at(start + 8, 4), "little")
        elif name == b"data":
            declared = long_size or size
            unknown = not long_size and size >= _RIFF_SIZE_UNKNOWN
            return None if unknown or not byte_rate or start + declared <= file.size() else declared / byte_rate
    return None


def _lacks_bytes(file: FileReader) -> bool:
    """Whether more than 5 % of the bytes are missing that the head of an AVI, a W64 or a CAF declares.

    Or a part of the last element of a Matroska file, or of the last block of a VOC.
    """
    head = file.read_at(0, 24)
    declared = 0
    if head.startswith(EBML):
        return _ends_in_element(file)
    if head.startswith(_VOC):
        return _ends_in_block(file, int.from_bytes(head[20:22], "little"))
    if head.startswith(b"RIFF"):
        size = int.from_bytes(head[4:8], "little")
        declared = 8 + size if size < _RIFF_SIZE_UNKNOWN else 0
    elif head.startswith(b"riff"):
        declared = int.from_bytes(head[16:24], "little")
    elif head.startswith(b"caff"):
        place = 8
        for _ in range(_MAX_CHUNKS):
            chunk = file.read_at(place, _CAF_HEAD_BYTES)
            declared = place = place + _CAF_HEAD_BYTES + int.from_bytes(chunk[4:], "big", signed=True)
            if len(chunk) < _CAF_HEAD_BYTES or chunk.startswith(
                b"data"
            ):  # whose size may be -1: to the end of the file
                break
    return declared < _LARGEST_FILE and 0.95 * declared > file.size()


def _ends_in_packet(file: FileReader) -> bool:
    """Whether the last packet of a transport stream is cut (ISO/IEC 13818-1; those of 192 bytes have a time before)."""
    head = file.read_at(0, 2 * _HEAD_BYTES)
    for packet_bytes in (188, 192, 204):
        starts = (at for at in range(packet_bytes) if set(head[at::packet_bytes]) == {_TS_SYNC})
        start = next(starts, None)
        if start is not None:
            whole, rest = divmod(file.size() - start, packet_bytes)
            # Zeros at the end are room that was reserved.
            is_stream = file.read_at(start + (whole - 1) * packet_bytes, 1) == bytes([_TS_SYNC])
            return is_stream and rest not in {0, 188}
    return False


def _ends_in_element(file: FileReader) -> bool:
    """Whether the file ends within an element of EBML (RFC 8794) that declares its length; live ones need not."""
    place = 0
    for _ in range(_MAX_ELEMENTS):
        head = file.read_at(place, 2 * _CHUNK_HEAD_BYTES)
        if not head or not head[0]:  # the end, or damage
            return False
        name_bytes = 9 - head[0].bit_length()
        size, size_bytes = ebml_int(head[name_bytes:])
        place += name_bytes + size_bytes
        if size is None or head[:name_bytes] == EBML_SEGMENT:
            continue  # its children follow
        place += size
        if place > file.size():
            return True
    return False


def ebml_int(data: bytes) -> tuple[int | None, int]:
    """An integer of EBML (RFC 8794, section 4) and its length; None: unknown, or none."""
    if not data or not data[0]:
        return None, 1
    length = 9 - data[0].bit_length()
    value = int.from_bytes(data[:length], "big") & ((1 << 7 * length) - 1)
    return (None if value == (1 << 7 * length) - 1 else value), length


def _ends_in_block(file: FileReader, place: int) -> bool:
    """Whether the last block of a Creative Voice file is cut."""
    for _ in range(_MAX_CHUNKS):
        head = file.read_at(place, 4)
        if len(head) < 4 or not head[0]:  # noqa: PLR2004 - one byte of type, three of length
            return False
        place += 4 + int.from_bytes(head[1:], "little")
        if place > file.size():
            return True
    return False


def id3_bytes(file: FileReader) -> int:
    """The length of the ID3v2 tags at the start (id3.org, section 3.1); FFmpeg looks for what follows in 1 MB only."""
    place = 0
    for _ in range(_MAX_CHUNKS):
        head = file.read_at(place, _ID3_HEAD_BYTES)
        if not head.startswith(b"ID3") or len(head) < _ID3_HEAD_BYTES:
            break
        size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        end = place + size + _ID3_HEAD_BYTES * (2 if head[5] & _ID3_FOOTER else 1)
        if end >= file.size():
            break
        place = end
    return place


def lacks_beginning(file: FileReader) -> bool:
    """Whether an MP3 begins within a frame: it was cut there, or its tag declares more than it has."""
    head = file.read_at(0, _HEAD_BYTES).lstrip(b"\0")
    return bool(head) and not head.startswith((b"\xff", b"RIFF", b"ID3", b"TAG", b"APETAGEX", b"LYRICS"))


def riff_chunks(file: FileReader, start: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, first byte and declared size of the chunks of a RIFF file."""
    for _ in range(_MAX_CHUNKS):
        head = file.read_at(start, _CHUNK_HEAD_BYTES)
        if len(head) < _CHUNK_HEAD_BYTES:
            return
        size = int.from_bytes(head[4:], "little")
        yield head[:4], start + 8, size
        start += 8 + size + size % 2


def boxes(file: FileReader, start: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, first byte and the byte behind the boxes of an MP4 file (ISO/IEC 14496-12, section 4.2)."""
    for _ in range(_MAX_CHUNKS):
        head = file.read_at(start, 2 * _CHUNK_HEAD_BYTES)
        size, head_bytes = int.from_bytes(head[:4], "big"), _CHUNK_HEAD_BYTES
        if size == 1:
            size, head_bytes = int.from_bytes(head[8:], "big"), 2 * _CHUNK_HEAD_BYTES
        if size < head_bytes:  # the end of the file, damage, or 0: a box that reaches to the end
            return
        yield head[4:8], start + head_bytes, start + size
        start += size


def _movie_s(file: FileReader) -> float:
    """The duration in the head of an MP4 file, edit lists included; 0 if it has none."""
    moov = next((start for name, start, _ in boxes(file, 0) if name == b"moov"), None)
    if moov is None:
        return 0.0
    mvhd = next((start for name, start, _ in boxes(file, moov) if name == b"mvhd"), None)
    if mvhd is None:
        return 0.0
    content = file.read_at(mvhd, 32)
    scale, duration = (content[12:16], content[16:20]) if content[:1] == b"\0" else (content[20:24], content[24:32])
    return int.from_bytes(duration, "big") / max(1, int.from_bytes(scale, "big"))


def ogg_heads_end(file: FileReader) -> int:
    """The byte behind the first pages of all streams that begin together (RFC 3533, section 6)."""
    place = 0
    for _ in range(_MAX_CHUNKS):
        head = file.read_at(place, _OGG_HEADER_BYTES + 255)
        if not head.startswith(b"OggS") or len(head) < _OGG_HEADER_BYTES or not head[5] & _OGG_FIRST_PAGE:
            break
        segments = head[_OGG_HEADER_BYTES : _OGG_HEADER_BYTES + head[_OGG_HEADER_BYTES - 1]]
        place += _OGG_HEADER_BYTES + len(segments) + sum(segments)
    return place


def _has_last_ogg_page(file: FileReader) -> bool:
    """Whether an Ogg file ends with a whole page that is marked as the last one (RFC 3533, section 6)."""
    tail = file.read_at(max(0, file.size() - 2 * _OGG_PAGE_BYTES), 2 * _OGG_PAGE_BYTES)
    place = tail.rfind(b"OggS")
    if place < 0 or len(tail) < place + _OGG_HEADER_BYTES:
        return False
    segments = tail[place + _OGG_HEADER_BYTES :][: tail[place + _OGG_HEADER_BYTES - 1]]
    whole = len(tail) >= place + _OGG_HEADER_BYTES + tail[place + _OGG_HEADER_BYTES - 1] + sum(segments)
    return whole and bool(tail[place + 5] & _OGG_LAST_PAGE)
