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

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

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
    "Action",
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
    "PauseAudio",
    "Playback",
    "Refused",
    "ReleaseRun",
    "ResumeAudio",
    "RunFailed",
    "STTFailed",
    "Said",
    "SpeechEnded",
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
