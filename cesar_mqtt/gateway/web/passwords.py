"""The password of the page, read once from its file. Any thread may check one; that takes up to a tenth of a second."""

import hmac
import os
import stat
from pathlib import Path

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError, VerifyMismatchError

from cesar_mqtt.errors import ConfigError

_ARGON2 = "$argon2"
_MOST_BYTES = 4096
_FOR_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class Password:
    """A password, hashed with argon2 or plain."""

    def __init__(self, file: Path) -> None:
        """Read the first line of `web.password_file`.

        Raises:
            ConfigError: the file cannot be read, has no password, or a plain one that others may read.
        """
        try:
            with file.open("rb") as opened:
                mode = os.fstat(opened.fileno()).st_mode
                line = opened.readline(_MOST_BYTES).decode().strip()
        except (OSError, UnicodeDecodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
            raise ConfigError(f"web.password_file {file} cannot be read: {reason}") from exc
        if not line:
            raise ConfigError(f"web.password_file {file} is empty: its first line is the password, or its argon2 hash")
        self._is_hashed = line.startswith(_ARGON2)
        if not self._is_hashed and mode & _FOR_OTHERS:
            raise ConfigError(
                f"web.password_file {file} holds a plain password that others may read: "
                "chmod 600 it, or have `cesar-mqtt web --set-password FILE` write a hash"
            )
        self._secret = line
        self._hasher = PasswordHasher()
        self.matches("")  # a hash that cannot be read is found at the start

    def matches(self, text: str) -> bool:
        """Whether `text` is the password. Raises ConfigError if the hash is damaged."""
        if not self._is_hashed:
            return hmac.compare_digest(text.encode(errors="replace"), self._secret.encode())
        try:
            return self._hasher.verify(self._secret, text.encode(errors="replace"))
        except VerifyMismatchError:
            return False
        except (InvalidHashError, VerificationError) as exc:
            raise ConfigError(
                "The first line of web.password_file is no valid argon2 hash: set the password again"
            ) from exc


def write_password(file: Path, password: str) -> None:
    """Write the hash of a password, readable for its owner only. Raises ConfigError."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as opened:
            os.fchmod(opened.fileno(), 0o600)
            opened.write(f"{PasswordHasher().hash(password)}\n")
    except OSError as exc:
        raise ConfigError(f"{file} cannot be written: {exc.strerror}") from exc
