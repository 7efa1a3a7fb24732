"""Files that were joined to one, as `cat` does: where the next one begins. Pure; for the thread that decodes.

Containers without a head for the whole file (MP3, AAC, MPEG-TS) go on by themselves; in others FFmpeg stops at the
end that the first head declares.
"""

from cesar_mqtt.audio.containers import EBML, EBML_SEGMENT, boxes, ebml_int, ogg_heads_end
from cesar_mqtt.audio.file_reader import FileReader

_HEAD_BYTES = 12
_MAX_PADDING = 8
# By the first bytes: how many of them are looked for in the rest of the file.
_MARKS = {
    b"fLaC\0\0\0\x22": 8,
    b"TTA1": 6,
    b"FLV\x01": 9,
    b"caff\0\x01": 8,
    b"#!AMR": 6,
    b"riff\x2e\x91": 16,
    b".snd": 8,
}
_OGG_FIRST_PAGE = b"OggS\0\x02"
_SEARCH_BYTES = 1 << 20


def next_start(file: FileReader) -> int | None:
    """Return the byte of the reader's file at which another one of the same kind begins; None: there is none."""
    head = file.read_at(0, _HEAD_BYTES)
    if head.startswith(b"RIFF") and head[8:] == b"WAVE":
        return _same_at(file, 8 + int.from_bytes(head[4:8], "little"), b"RIFF", b"WAVE")
    if head.startswith(b"FORM"):
        return _same_at(file, 8 + int.from_bytes(head[4:8], "big"), b"FORM", head[8:])
    if head[4:8] == b"ftyp":
        return _next_movie(file)
    if head.startswith(EBML):
        return _next_matroska(file)
    if head.startswith(b"OggS"):
        return _find(file, _OGG_FIRST_PAGE, after=ogg_heads_end(file))
    mark = next((mark for mark in _MARKS if head.startswith(mark)), None)
    return None if mark is None else _find(file, file.read_at(0, _MARKS[mark]))


def _same_at(file: FileReader, end: int, mark: bytes, form: bytes) -> int | None:
    """Where the same mark stands at the end of a file, or behind a few bytes of padding."""
    following = file.read_at(end, _MAX_PADDING + _HEAD_BYTES)
    place = following.find(mark)
    return end + place if 0 <= place <= _MAX_PADDING and following[place + 8 : place + 12] == form else None


def _next_movie(file: FileReader) -> int | None:
    has_index = False
    for name, start, _ in boxes(file, 0):
        if name == b"ftyp" and has_index:
            return start - 8
        has_index = has_index or name == b"moov"
    return None


def _next_matroska(file: FileReader) -> int | None:
    """The end of the first segment, if it is declared; without it FFmpeg reads on."""
    place = 0
    for mark in (EBML, EBML_SEGMENT):
        if file.read_at(place, 4) != mark:
            return None
        size, size_bytes = ebml_int(file.read_at(place + 4, 8))
        if size is None:
            return None
        place += 4 + size_bytes + size
    return place if file.read_at(place, 4) == EBML else None


def _find(file: FileReader, mark: bytes, *, after: int = 1) -> int | None:
    place = after
    while data := file.read_at(place, _SEARCH_BYTES):
        found = data.find(mark)
        if found >= 0:
            return place + found
        place += max(1, len(data) - len(mark) + 1) if len(data) > len(mark) else len(data)
    return None
