import pytest
from faster_whisper.tokenizer import _LANGUAGE_CODES
from hypothesis import given
from hypothesis import strategies as st

from cesar_mqtt.protocol.languages import language_code


@pytest.mark.parametrize("code", _LANGUAGE_CODES)
def test_every_code_of_whisper_stands_for_itself(code: str) -> None:
    assert language_code(code) == code
    assert language_code(code.upper()) == code


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("German", "de"),
        ("german", "de"),
        ("  French\n", "fr"),
        ("Haitian Creole", "ht"),
        ("Haitian", "ht"),
        ("Castilian", "es"),
        ("Mandarin", "zh"),
        ("Flemish", "nl"),
        ("Burmese", "my"),
        ("Letzeburgesch", "lb"),
        ("Moldavian", "ro"),
        ("Moldovan", "ro"),
        ("Panjabi", "pa"),
        ("Pushto", "ps"),
        ("Sinhalese", "si"),
        ("Valencian", "ca"),
        ("Cantonese", "yue"),
    ],
)
def test_english_names_are_understood(text: str, code: str) -> None:
    assert language_code(text) == code


@pytest.mark.parametrize(
    ("tag", "code"),
    [
        ("de-AT", "de"),
        ("en-US", "en"),
        ("en_GB", "en"),
        ("zh-Hans-CN", "zh"),
        ("PT-br", "pt"),
        ("sr-Latn", "sr"),
        ("nb-NO", "no"),
        ("nn", "nn"),
        ("jv", "jw"),
        ("fil-PH", "tl"),
        ("iw", "he"),
        ("in", "id"),
        ("cmn-Hant-TW", "zh"),
        ("es-419", "es"),
    ],
)
def test_bcp_47_tags_are_reduced_to_the_code_that_whisper_has(tag: str, code: str) -> None:
    assert language_code(tag) == code


@pytest.mark.parametrize("text", ["", " ", "-", "-de", "auto", "xx", "klingon", "x-klingon", "d", "de de", "1", "\0"])
def test_what_is_no_language_gives_none(text: str) -> None:
    assert language_code(text) is None


@given(st.text())
def test_any_text_gives_one_of_whispers_codes_or_none(text: str) -> None:
    assert language_code(text) in {None, *_LANGUAGE_CODES}
