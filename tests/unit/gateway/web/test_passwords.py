"""The file with the password of the page."""

import stat
from pathlib import Path

import pytest
from argon2 import PasswordHasher

from cesar_mqtt.errors import ConfigError
from cesar_mqtt.gateway.web.passwords import Password, write_password

FAST = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


def file_with(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "password"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("line", ["sesame", FAST.hash("sesame")], ids=["plain", "hashed"])
def test_only_the_password_in_the_first_line_matches(tmp_path: Path, line: str) -> None:
    password = Password(file_with(tmp_path, f"{line}\nanother\n"))
    assert password.matches("sesame")
    for wrong in ("", "Sesame", "sesame ", "another", line * 2, "\ud800"):
        assert not password.matches(wrong)


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o660, 0o644])
def test_a_plain_password_that_others_may_read_stops_the_start_and_a_hash_does_not(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="others may read"):
        Password(file_with(tmp_path, "sesame", mode))
    assert Password(file_with(tmp_path, FAST.hash("sesame"), mode)).matches("sesame")


@pytest.mark.parametrize("text", ["", "\n", "  \nsesame\n", "$argon2id$v=19$m=8,t=1,p=1$broken"])
def test_a_file_without_a_usable_first_line_stops_the_start(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        Password(file_with(tmp_path, text))


def test_a_file_that_is_missing_or_no_text_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("nowhere", "bytes"):
        with pytest.raises(ConfigError, match="cannot be read"):
            Password(tmp_path / name)


def test_a_password_that_is_set_is_hashed_and_readable_for_its_owner_only(tmp_path: Path) -> None:
    path = file_with(tmp_path, "former and longer than the hash " * 20, 0o644)
    write_password(path, "sesame")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "sesame" not in path.read_text()
    assert Password(path).matches("sesame")


def test_a_password_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_password(tmp_path / "link", "sesame")
    assert not (tmp_path / "elsewhere").exists()
