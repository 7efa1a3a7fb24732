"""The bytes of an `audio_base64`: plain base64, or a `data:` URI as browsers make it. Pure; any thread may call it."""

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

_BLANKS = b" \t\r\n\v\f"
# RFC 2397; a quoted parameter of the media type may hold a comma.
_DATA_URI = re.compile(r'data:(?P<type>(?:[^,"]|"[^"]*")*),', re.IGNORECASE)
_IS_BASE64 = re.compile(r";\s*base64\s*", re.IGNORECASE)
_SCHEME = "data:"
_BLOCK_CHARACTERS = 1 << 16


def decode_audio(text: str) -> bytes:
    """Return the bytes, at least one.

    Raises:
        ValueError: there are none; the message continues a sentence that begins with the field's name.
    """
    is_uri = text[: len(_SCHEME)].lower() == _SCHEME
    audio = _from_uri(text) if is_uri else _from_base64(text.encode("ascii", "replace"))
    if audio is None and is_uri:
        raise ValueError("is a data: URI whose data is not base64: use the standard alphabet after ';base64,'")
    if audio is None:
        raise ValueError("is not base64: use the standard alphabet, with padding")
    if not audio:
        raise ValueError("holds no audio")
    return audio


def _from_uri(text: str) -> bytes | None:
    head = _DATA_URI.match(text)
    if head is None:
        raise ValueError("is a data: URI without a comma before the data: write 'data:audio/wav;base64,' before it")
    data = _without_escapes(text[head.end() :])
    if not _ends_in_base64(head["type"]):
        return data
    encoded = data.translate(None, _BLANKS)
    # Browsers read a data: URI without its padding, too (Infra Standard, forgiving-base64 decode).
    return _from_base64(encoded + b"=" * (-len(encoded) % 4))


def _without_escapes(text: str) -> bytes:
    """Decode percent escapes, block by block: `unquote_to_bytes` makes an object of each, ten times the memory."""
    decoded, start = bytearray(), 0
    while start < len(text):
        end = start + _BLOCK_CHARACTERS
        cut = text.rfind("%", end - 2, end)  # an escape stays in one block
        end = cut if start < cut and end < len(text) else end
        decoded += unquote_to_bytes(text[start:end])
        start = end
    return bytes(decoded)


def _ends_in_base64(media_type: str) -> bool:
    _, separator, last = media_type.rpartition(";")
    return _IS_BASE64.fullmatch(separator + last) is not None


def _from_base64(encoded: bytes) -> bytes | None:
    """Return the bytes of base64 that may hold line ends, as `base64 FILE` writes them; None: it is no base64."""
    try:
        return base64.b64decode(encoded.translate(None, _BLANKS), validate=True)
    except (binascii.Error, ValueError):
        return None
