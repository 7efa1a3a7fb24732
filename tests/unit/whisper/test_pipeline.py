from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import ctranslate2
import numpy as np
import pytest
from faster_whisper import WhisperModel
from faster_whisper.feature_extractor import FeatureExtractor

from cesar_mqtt.audio.decoder import SAMPLE_RATE, Samples
from cesar_mqtt.errors import Cancelled
from cesar_mqtt.transcript import TranscriptionOptions
from cesar_mqtt.whisper import decoding
from cesar_mqtt.whisper.chunk import RawSegment
from cesar_mqtt.whisper.pipeline import Pipeline

END, TIMES = 50, 100
"""Tokens: below `END` is text, from `TIMES` on are times in steps of 20 ms."""
BASE, MEDIUM = 512, 1024
"""Widths of models."""


class FakeTokenizer:
    timestamp_begin, eot, sot_prev = TIMES, END, END + 1

    def __init__(self, _: object, _multilingual: bool, task: str, language: str) -> None:  # noqa: FBT001
        self.language_code = language
        self.sot_sequence = [f"<{language}>", f"<{task}>"]

    def encode(self, text: str) -> list[str]:
        return text.split()

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(f" w{token}" for token in tokens if token < END)


def at(second: float) -> int:
    return TIMES + round(second / 0.02)


def said(*tokens: int, logprob: float = -0.2, no_speech: float = 0.0) -> SimpleNamespace:
    score = logprob * (len(tokens) + 1) / len(tokens)
    return SimpleNamespace(sequences_ids=[list(tokens)], scores=[score], no_speech_prob=no_speech)


LOOP = [number for _ in range(60) for number in (1, 2, 3)]


class FakeWhisper(WhisperModel):  # type: ignore[misc]
    """Encodes nothing, and answers from a script; notes what the encoder and the decoder were given.

    A word of the script that is a function is called with the frames that the piece was encoded at.
    """

    def __init__(
        self, *script: Any, multilingual: bool = False, languages: Sequence[tuple[str, float]] = (), width: int = BASE
    ) -> None:
        self.feature_extractor = FeatureExtractor()
        self.input_stride, self.time_precision, self.frames_per_second, self.max_length = 2, 0.02, 100, 448
        self.hf_tokenizer = SimpleNamespace(
            encode=lambda text, **_: SimpleNamespace(ids=text.split()),
            decode=" ".join,
            token_to_id={f"<|{code}|>": 1 for code in ("en", "es")}.get,
        )
        self.model = SimpleNamespace(
            is_multilingual=multilingual, n_mels=80, generate=self._generate, detect_language=self._detect
        )
        self._width = width
        self._script = list(script)
        self._languages = list(languages)
        self.encoded: list[int] = []
        self.asked: list[dict[str, Any]] = []
        self.detected = self.probed = 0

    def encode(self, features: Any) -> Any:
        if features.shape[1] > 2:
            self.encoded.append(features.shape[1])
        else:  # the width is asked for with two frames
            self.probed += 1
        return ctranslate2.StorageView.from_array(np.zeros((1, features.shape[1] // 2, self._width), np.float32))

    def add_word_timestamps(self, segments: Any, *_: object, **__: object) -> None:
        """Give each word of a segment as much time as the others."""
        for segment in segments[0]:
            tokens = [token for token in segment["tokens"] if token < END]
            step = (segment["end"] - segment["start"]) / len(tokens)
            starts = [segment["start"] + step * number for number in range(len(tokens))]
            segment["words"] = [
                {"word": f" w{token}", "start": start, "end": start + step, "probability": 1.0}
                for token, start in zip(tokens, starts, strict=True)
            ]

    def _generate(self, encoded: Any, prompts: list[list[int]], **options: Any) -> list[Any]:
        self.asked.append({"frames": 2 * encoded.shape[1], "prompts": prompts, **options})
        return [self._script.pop(0) for _ in prompts]

    def _detect(self, _: Any) -> list[list[tuple[str, float]]]:
        self.detected += 1
        code, probability = self._languages.pop(0)
        return [[(f"<|{code}|>", probability)]]


@pytest.fixture(autouse=True)
def _tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "Tokenizer", FakeTokenizer)
    monkeypatch.setattr(decoding, "get_suppressed_tokens", lambda _tokenizer, _given: (0,))


def sound(duration_s: float) -> Samples:
    """Noise with pauses, as loud and as quiet as speech."""
    rng = np.random.default_rng(3)
    noise = rng.normal(scale=0.1, size=round(duration_s * SAMPLE_RATE)).astype(np.float32)
    noise[np.arange(len(noise)) // 1600 % 3 == 0] *= 0.001
    return noise


def pipeline(
    model: FakeWhisper,
    *,
    device: str = "cpu",
    should_stop: Callable[[], bool] = lambda: False,
    short: bool = True,
    **options: Any,
) -> Pipeline:
    asked = TranscriptionOptions("any", **options)
    return Pipeline(model, asked, device=device, should_stop=should_stop, short_encoder_input=short)


def transcribe(
    model: FakeWhisper,
    *ranges_s: tuple[float, float],
    duration_s: float = 60.0,
    **options: Any,
) -> list[RawSegment]:
    """Transcribe ranges of a chunk in English, which was detected in an earlier one if the options do not give it."""
    speech = [(round(start * SAMPLE_RATE), round(end * SAMPLE_RATE)) for start, end in ranges_s]
    segments, _ = pipeline(model, **options).transcribe(sound(duration_s), speech, "en")
    return list(segments)


def spans(segments: Sequence[RawSegment]) -> list[tuple[float, float, str]]:
    return [(round(one.start, 2), round(one.end, 2), one.text) for one in segments]


# --- the length that the encoder is given


@pytest.mark.parametrize(
    ("width", "short", "frames"), [(BASE, True, 700), (BASE, False, 3000), (MEDIUM, True, 3000), (384, True, 700)]
)
def test_four_seconds_are_encoded_at_their_own_length_by_models_that_allow_it(
    width: int,
    short: bool,  # noqa: FBT001
    frames: int,
) -> None:
    model = FakeWhisper(said(at(0), 1, at(4)), width=width)
    transcribe(model, (1.0, 5.0), short=short)
    assert (model.encoded, model.asked[0]["frames"]) == ([frames], frames)


def test_speech_that_noise_hides_is_encoded_at_full_length() -> None:
    model = FakeWhisper(said(at(0), 1, at(4)))
    noise = np.random.default_rng(3).normal(scale=0.1, size=4 * SAMPLE_RATE).astype(np.float32)
    segments, _ = pipeline(model).transcribe(noise, [(0, len(noise))], "en")
    assert list(segments)
    assert model.encoded == [3000]


def test_the_width_of_a_model_is_asked_for_once() -> None:
    model = FakeWhisper(*[said(at(0), 1, at(4))] * 2)
    for _ in range(2):
        transcribe(model, (0.0, 4.0))
    assert model.probed == 1


def test_no_more_than_thirty_seconds_are_encoded() -> None:
    model = FakeWhisper(said(at(0), 1, at(29)))
    transcribe(model, (0.0, 29.0))
    assert model.encoded == [3000]


@pytest.mark.parametrize(
    "worst",
    [said(1, logprob=-1.5), said(*LOOP), said(1, logprob=-1.5, no_speech=0.9)],
    ids=["improbable", "repetitive", "silent"],
)
def test_what_fails_the_checks_is_encoded_at_full_length_before_it_is_believed(worst: SimpleNamespace) -> None:
    model = FakeWhisper(worst, said(at(0), 7, at(4)))
    assert spans(transcribe(model, (0.0, 4.0), beam_size=2)) == [(0.0, 4.0, " w7")]
    assert model.encoded == [700, 3000]
    assert [(asked["frames"], asked["beam_size"]) for asked in model.asked] == [(700, 2), (3000, 2)]


def test_temperatures_are_tried_at_full_length_and_the_most_probable_result_counts() -> None:
    short, last = (said(at(0), number, at(4), logprob=score) for number, score in ((0, -1.1), (6, -1.2)))
    model = FakeWhisper(short, *[said(at(0), *LOOP, logprob=-1.5)] * 5, last)
    assert spans(transcribe(model, (0.0, 4.0), beam_size=1)) == [(0.0, 4.0, " w0")]
    assert [asked.get("sampling_temperature", 0.0) for asked in model.asked] == [0.0, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert [asked["frames"] for asked in model.asked] == [700] + [3000] * 6


@pytest.mark.parametrize(
    ("beam_size", "text", "temperatures"),
    [(1, " w2", [0.0, 0.0, 0.2]), (5, " w1", [0.0, 0.0]), ("auto", " w1", [0.0] * 2)],
)
def test_no_temperature_is_tried_where_it_would_make_an_improbable_text_only_less_probable(
    beam_size: Any, text: str, temperatures: list[float]
) -> None:
    scores = (-1.9, -1.3, -1.2, -0.1)
    model = FakeWhisper(*(said(at(0), number, at(4), logprob=score) for number, score in enumerate(scores)))
    assert spans(transcribe(model, (0.0, 4.0), beam_size=beam_size)) == [(0.0, 4.0, text)]
    assert [asked.get("sampling_temperature", 0.0) for asked in model.asked] == temperatures


def test_a_temperature_that_ends_the_repetition_is_the_last_one() -> None:
    loops = [said(*LOOP, logprob=-0.1)] * 3
    model = FakeWhisper(*loops, said(at(0), 7, at(4), logprob=-1.5), said(at(0), 8, at(4), logprob=-0.9))
    assert spans(transcribe(model, (0.0, 4.0), beam_size=5)) == [(0.0, 4.0, " w7")]
    assert [asked.get("sampling_temperature", 0.0) for asked in model.asked] == [0.0, 0.0, 0.2, 0.4]


def test_higher_temperatures_are_tried_as_long_as_the_text_repeats_itself() -> None:
    loops = [said(*LOOP, logprob=score) for score in (-0.1, -0.2, -0.3, -0.4)]
    model = FakeWhisper(*loops, said(at(0), 7, at(4), logprob=-0.9))
    assert spans(transcribe(model, (0.0, 4.0), beam_size=1)) == [(0.0, 4.0, " w7")]
    assert [asked.get("sampling_temperature", 0.0) for asked in model.asked] == [0.0, 0.0, 0.2, 0.4, 0.6]


def test_a_job_s_own_temperatures_are_used() -> None:
    model = FakeWhisper(said(1, logprob=-2.0), said(1, logprob=-2.0))
    transcribe(model, (0.0, 4.0), temperature=0.3)
    assert [asked["sampling_temperature"] for asked in model.asked] == [0.3, 0.3]


# --- the beam size


@pytest.mark.parametrize(("logprob", "beams"), [(-0.1, [1]), (-0.9, [1, 5])])
def test_auto_uses_a_beam_only_for_what_the_model_is_unsure_of(logprob: float, beams: list[int]) -> None:
    model = FakeWhisper(said(at(0), 1, at(4), logprob=logprob), said(at(0), 2, at(4), logprob=logprob + 0.05))
    segments = transcribe(model, (0.0, 4.0))
    assert [asked["beam_size"] for asked in model.asked] == beams
    assert segments[0].text == f" w{len(beams)}"
    assert model.encoded == [700]


@pytest.mark.parametrize("logprob", [-0.1, -0.9])
@pytest.mark.parametrize(("detected", "frames"), [([0.2, 0.8], 3000), ([0.4], 700)])
def test_auto_uses_a_beam_at_once_where_the_language_is_uncertain(
    logprob: float, detected: list[float], frames: int
) -> None:
    languages = [("es", probability) for probability in detected]
    model = FakeWhisper(said(at(0), 1, at(4), logprob=logprob), multilingual=True, languages=languages)
    segments, _ = pipeline(model).transcribe(sound(10), [(0, 4 * SAMPLE_RATE)], None)
    assert list(segments)
    assert [(asked["frames"], asked["beam_size"]) for asked in model.asked] == [(frames, 5)]


@pytest.mark.parametrize("logprob", [-0.1, -0.9])
def test_auto_uses_a_beam_at_once_in_noise(logprob: float) -> None:
    model = FakeWhisper(said(at(0), 1, at(4), logprob=logprob))
    noise = np.random.default_rng(3).normal(scale=0.1, size=4 * SAMPLE_RATE).astype(np.float32)
    segments, _ = pipeline(model).transcribe(noise, [(0, len(noise))], "en")
    assert list(segments)
    assert [(asked["frames"], asked["beam_size"]) for asked in model.asked] == [(3000, 5)]


@pytest.mark.parametrize("beam_size", [1, 3, 10])
def test_a_job_s_own_beam_size_is_used(beam_size: int) -> None:
    model = FakeWhisper(said(at(0), 1, at(4), logprob=-0.9))
    transcribe(model, (0.0, 4.0), beam_size=beam_size)
    assert [asked["beam_size"] for asked in model.asked] == [beam_size]


# --- ranges in place


def test_each_range_is_decoded_in_place_and_no_segment_or_word_leaves_it() -> None:
    model = FakeWhisper(
        said(at(0), 1, at(2), at(2), 2, at(7)),  # longer than the range
        said(at(0.5), 3, at(1.5), at(3.5), 4, at(5)),  # text for the padding
    )
    assert spans(transcribe(model, (10.0, 14.0), (40.0, 43.0))) == [
        (10.0, 12.0, " w1"),
        (12.0, 14.0, " w2"),
        (40.5, 41.5, " w3"),
    ]
    assert model.encoded == [700, 600]


@pytest.mark.parametrize("word_timestamps", [False, True])
def test_ranges_with_a_short_pause_are_decoded_together_and_what_spans_the_pause_is_cut(
    word_timestamps: bool,  # noqa: FBT001
) -> None:
    model = FakeWhisper(
        said(at(0), 1, at(2.2), at(2.2), 2, 3, 4, 5, 6, at(7), at(7), 7, at(7.8))  # a pause after 4 s
    )
    found = transcribe(model, (10.0, 14.0), (18.0, 22.0), word_timestamps=word_timestamps)
    assert spans(found) == [
        (10.0, 12.2, " w1"),
        (12.2, 14.0, " w2 w3"),  # most of w3 is before the pause
        (18.12, 21.0, " w4 w5 w6"),
        (21.0, 21.8, " w7"),
    ]
    assert model.encoded == [1100]
    assert all(one.words is not None for one in found) == word_timestamps
    for one in found:
        assert all(one.start <= word.start <= word.end <= one.end for word in one.words or ())


def test_a_segment_that_reaches_into_the_padding_of_the_next_range_ends_with_its_own() -> None:
    model = FakeWhisper(said(at(0), 1, at(4.3), at(4.3), 2, at(8)))
    assert spans(transcribe(model, (10.0, 14.0), (18.0, 22.0))) == [(10.0, 14.0, " w1"), (18.3, 22.0, " w2")]


def test_ranges_with_a_long_pause_are_decoded_apart() -> None:
    model = FakeWhisper(*[said(at(0), number, at(4)) for number in range(2)])
    transcribe(model, (0.0, 4.0), (12.1, 16.1))
    assert model.encoded == [700, 700]


def test_a_piece_of_thirty_seconds_may_begin_in_any_range() -> None:
    model = FakeWhisper(said(at(0), 1, at(20), at(20), 2, at(28), at(28), 3), said(at(0), 3, at(4)))
    found = transcribe(model, (0.0, 20.0), (22.0, 34.0))
    assert spans(found) == [(0.0, 20.0, " w1"), (22.0, 30.0, " w2"), (30.0, 34.0, " w3")]
    assert model.encoded == [3000, 700]


def test_a_long_range_goes_on_where_the_last_whole_segment_ended() -> None:
    model = FakeWhisper(
        said(at(0), 1, at(20), at(20), 2, at(26), at(26), 3),
        said(at(0), 4, at(14)),
    )
    assert spans(transcribe(model, (5.0, 45.0))) == [(5.0, 25.0, " w1"), (25.0, 31.0, " w2"), (31.0, 45.0, " w4")]
    assert model.encoded == [3000, 1700]


def test_a_result_without_progress_does_not_last_for_ever() -> None:
    model = FakeWhisper(said(at(0), at(0), 1))
    transcribe(model, (0.0, 4.0))
    assert len(model.asked) == 1


def test_silence_and_ranges_shorter_than_a_frame_yield_nothing() -> None:
    model = FakeWhisper(*[said(1, logprob=-1.5, no_speech=0.9)] * 3)
    assert transcribe(model, (0.0, 4.0), (9.0, 9.005)) == []


def test_silence_of_full_length_is_believed_at_once() -> None:
    model = FakeWhisper(said(1, logprob=-1.5, no_speech=0.9))
    assert transcribe(model, (0.0, 30.0), beam_size=2) == []


@pytest.mark.parametrize(("no_speech", "vad_filter", "kept"), [(0.9, False, 0), (0.9, True, 1), (0.5, False, 1)])
def test_without_the_filter_the_vad_is_asked_where_the_model_doubts_that_there_is_speech(
    no_speech: float,
    vad_filter: bool,  # noqa: FBT001
    kept: int,
) -> None:
    model = FakeWhisper(said(at(0), 1, at(4), logprob=-0.4, no_speech=no_speech))
    assert len(transcribe(model, (0.0, 4.0), vad_filter=vad_filter)) == kept


def test_the_prompt_is_for_the_first_piece_and_the_hotwords_for_all() -> None:
    model = FakeWhisper(said(at(0), 1, at(4)), said(at(0), 1, at(4)))
    transcribe(model, (0.0, 4.0), (15.0, 19.0), initial_prompt="before", hotwords="hot")
    first, second = (asked["prompts"][0] for asked in model.asked)
    assert first == [END + 1, "hot", "before", "<en>", "<transcribe>"]
    assert second == [END + 1, "hot", "<en>", "<transcribe>"]


# --- what fails again and again


def test_a_long_piece_that_fails_is_cut_rather_than_decoded_at_higher_temperatures() -> None:
    model = FakeWhisper(said(*LOOP), said(at(0), 1, at(5), at(5)), said(at(0), 2, at(9)), said(at(0), 3, at(9)))
    segments = transcribe(model, (0.0, 30.0), beam_size=1, initial_prompt="before")
    assert segments[0].text == " w1"
    first, again, after = model.asked[:3]
    assert first["frames"] == 3000
    assert 1300 <= again["frames"] <= 2300
    assert after["frames"] > again["frames"]
    assert ["before" in asked["prompts"][0] for asked in (first, again, after)] == [True, True, False]
    assert {asked.get("sampling_temperature") for asked in model.asked} == {None}


def test_a_short_clip_has_room_for_no_more_tokens_than_can_be_spoken() -> None:
    model = FakeWhisper(said(at(0), 1, at(4)), said(at(0), 1, at(28)))
    transcribe(model, (0.0, 4.0))
    transcribe(model, (0.0, 28.0))
    assert [asked["max_length"] for asked in model.asked] == [2 + 40 + 160, 448]


def test_a_loop_that_stays_is_cut_to_its_first_time() -> None:
    model = FakeWhisper(*[said(at(0), 9, *LOOP)] * 7)
    assert [one.text for one in transcribe(model, (0.0, 4.0), beam_size=1)] == [" w9 w1 w2 w3"]


# --- batches


def test_a_batch_is_encoded_one_by_one_and_decoded_together_in_order_of_time() -> None:
    model = FakeWhisper(
        said(at(0), 1, at(2), at(2), 2),  # unfinished: goes on from 2 s
        said(at(0), 3, at(4)),
        said(at(0), 4, at(4)),
        said(at(0), 5, at(2)),
    )
    found = transcribe(model, (0.0, 4.0), (15.0, 20.0), (30.0, 34.0), batch_size=2, device="cuda")
    assert spans(found) == [(0.0, 2.0, " w1"), (2.0, 4.0, " w4"), (15.0, 19.0, " w3"), (30.0, 32.0, " w5")]
    assert [len(asked["prompts"]) for asked in model.asked] == [2, 2]
    assert model.encoded == [800, 800, 700, 700]  # each group at the length of its longest


def test_a_batch_cuts_long_speech_at_thirty_seconds() -> None:
    model = FakeWhisper(*[said(at(0), number, at(10)) for number in range(8)])
    transcribe(model, (0.0, 50.0), batch_size=8, device="cuda")
    assert len(model.asked[0]["prompts"]) == 2


def test_on_a_cpu_a_batch_is_decoded_piece_by_piece() -> None:
    model = FakeWhisper(*[said(at(0), number, at(4)) for number in range(2)])
    transcribe(model, (0.0, 4.0), (15.0, 19.0), batch_size=8)
    assert [len(asked["prompts"]) for asked in model.asked] == [1, 1]


# --- languages


@pytest.mark.parametrize("logprob", [-0.2, -0.9])
def test_the_language_is_detected_once_and_its_encoding_is_used_again(logprob: float) -> None:
    script = [said(at(0), number, at(4), logprob=logprob) for number in range(2)]
    model = FakeWhisper(*script, multilingual=True, languages=[("es", 0.9)])
    segments, language = pipeline(model).transcribe(sound(10), [(0, 4 * SAMPLE_RATE)], None)
    assert list(segments)
    assert (language, model.encoded, model.detected) == (("es", 0.9), [700], 1)
    assert model.asked[0]["prompts"] == [["<es>", "<transcribe>"]]


@pytest.mark.parametrize(
    ("detected", "taken", "encoded"),
    [([("fr", 0.2), ("es", 0.8)], ("es", 0.8), [700, 3000]), ([("fr", 0.4)], ("fr", 0.4), [700])],
)
def test_a_language_that_is_doubtful_is_detected_again_at_full_length(
    detected: list[tuple[str, float]], taken: tuple[str, float], encoded: list[int]
) -> None:
    model = FakeWhisper(said(at(0), 1, at(4)), multilingual=True, languages=detected)
    segments, language = pipeline(model).transcribe(sound(10), [(0, 4 * SAMPLE_RATE)], None)
    assert list(segments)
    assert language == taken
    assert (model.encoded, model.asked[0]["frames"]) == (encoded, encoded[-1])


def test_uncertain_pieces_vote_for_the_language() -> None:
    languages = [("es", 0.3), ("en", 0.4), ("es", 0.4), ("en", 0.2)]  # the fifth piece is not asked
    model = FakeWhisper(multilingual=True, languages=languages)
    _, language = pipeline(model).transcribe(sound(125), [(0, 125 * SAMPLE_RATE)], None)
    assert language == ("es", 0.4)
    assert model.detected == 4


@pytest.mark.parametrize(("given", "text"), [(None, " w2"), ("en", " w1")])
def test_what_the_model_is_unsure_of_is_decoded_in_its_own_language_unless_it_is_given(
    given: str | None, text: str
) -> None:
    script = [said(at(0), 1, at(4), logprob=-0.9), said(at(0), 2, at(4), logprob=-0.3)]
    model = FakeWhisper(*script, multilingual=True, languages=[("es", 0.9)])
    found = transcribe(model, (0.0, 4.0), beam_size=1, language=given)
    asked = [question["prompts"][0][0] for question in model.asked]
    assert asked == (["<en>", "<es>"] if given is None else ["<en>"])
    assert found[0].text == text


def test_the_language_may_change_between_two_pauses_if_it_is_asked_for() -> None:
    script = [said(at(0), 1, at(4)), said(at(0), 2, at(4)), said(at(0), 3, at(4))]
    languages = [("es", 0.9), ("en", 0.9), ("fr", 0.3)]  # the last is uncertain: as the one before
    model = FakeWhisper(*script, multilingual=True, languages=languages)
    speech = [(0, 4 * SAMPLE_RATE), (15 * SAMPLE_RATE, 20 * SAMPLE_RATE), (30 * SAMPLE_RATE, 34 * SAMPLE_RATE)]
    segments, language = pipeline(model, multilingual=True).transcribe(sound(60), speech, None)
    assert len(list(segments)) == 3
    assert [asked["prompts"][0][0] for asked in model.asked] == ["<es>", "<en>", "<en>"]
    assert language == ("en", 0.9)  # five seconds of it, and four of Spanish


def test_what_follows_in_one_language_without_a_pause_is_decoded_together() -> None:
    model = FakeWhisper(said(at(0), 1, at(20)), multilingual=True, languages=[("es", 0.9)] * 8)
    pipeline_of = pipeline(model, multilingual=True)
    segments, language = pipeline_of.transcribe(sound(20), [(0, 20 * SAMPLE_RATE)], None)
    assert [one.text for one in segments] == [" w1"]
    assert language == ("es", 0.9)


@pytest.mark.parametrize(
    ("language", "warnings", "found"), [(None, ("language_assumed",), None), ("en", (), ("en", 1.0))]
)
def test_an_english_only_model_does_not_claim_to_have_detected_english(
    language: str | None, warnings: tuple[str, ...], found: tuple[str, float] | None
) -> None:
    model = FakeWhisper(said(at(0), 1, at(4)))
    transcription = pipeline(model, language=language)
    segments, heard = transcription.transcribe(sound(4), [(0, 4 * SAMPLE_RATE)], language)
    assert len(list(segments)) == 1
    assert (transcription.warnings, heard) == (warnings, found)


# --- a stop


def test_a_stop_comes_before_each_step() -> None:
    for steps in range(6):
        left = [steps]

        def should_stop(left: list[int] = left) -> bool:
            left[0] -= 1
            return left[0] < 0

        model = FakeWhisper(
            said(at(0), 1, at(4), logprob=-0.9), said(at(0), 2, at(4)), multilingual=True, languages=[("es", 0.9)]
        )
        with pytest.raises(Cancelled):
            list(pipeline(model, should_stop=should_stop).transcribe(sound(4), [(0, 4 * SAMPLE_RATE)], None)[0])
        # features (two blocks), encoding, detection, greedy, beam
        assert (len(model.encoded), model.detected, len(model.asked)) == [
            (0, 0, 0),
            (0, 0, 0),
            (0, 0, 0),
            (1, 0, 0),
            (1, 1, 0),
            (1, 1, 1),
        ][steps]
