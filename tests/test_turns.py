"""Who has the floor: conversations in virtual time, as tables of (time, event) and (time, action).

`Room` plays everything around a `TurnTaker`: the speech services, the models, the tools, the network. Each test says
what the user does and what the others answer; what the turn taker did about it is compared line by line. Whatever the
conversation, `Rules` are checked after every event.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import live
from live import (
    Action,
    AudioDone,
    AudioMade,
    AudioReceived,
    AudioSent,
    Call,
    CallTool,
    CancelRun,
    CancelTool,
    CheckInterrupt,
    CheckTurn,
    Committed,
    ContinueRun,
    Event,
    FinalizeSTT,
    FirstToken,
    FlushAudio,
    GraceExpired,
    GraceExtended,
    GraceStarted,
    Idle,
    InputCommit,
    InputContent,
    InputInterrupt,
    InputText,
    InterruptCaptured,
    InterruptChecked,
    InterruptDetecting,
    InterruptDismissed,
    Interrupted,
    Ledger,
    LiveVoice,
    PauseAudio,
    Playback,
    Refused,
    ReleaseRun,
    ResumeAudio,
    RunFailed,
    Said,
    SpeechEnded,
    SpeechFailed,
    SpeechStarted,
    SpeechStopped,
    StartAudio,
    StartRun,
    State,
    StateChanged,
    Step,
    StepEnded,
    STTFailed,
    Tick,
    Timed,
    Timing,
    ToolReturned,
    TurnChecked,
    TurnFailed,
    TurnMetrics,
    TurnTaker,
    UserWords,
    answer_messages,
    beside_echo,
    is_backchannel,
    is_echo,
    is_filler,
    is_finished,
    is_stop,
    read_config,
    takes_time,
    words,
)
from providers import Error, InvalidRequestError, ProviderError, parse_request
from voice import Flushed, Transcript, TurnEagerEnd, TurnEnded, TurnResumed, TurnStarted, Word

JSON = dict[str, Any]
Script = list[tuple[float, Event]]
PACE = 0.25  # seconds a word, in the answers


# == The room ==========================================================================================================


@dataclass
class Tool:
    """A call that the model makes; `takes` seconds, or for ever."""

    name: str
    input: JSON = field(default_factory=dict)
    takes: float | None = 0.5
    result: str = "done"


@dataclass
class Reply:
    """What the model answers: text and tools, in turns. `first` seconds to its first token; `fails`: instead of an end.

    `late`: the speech service is that much slower; `timed`: it gives the times of words. `ends`: seconds from the first
    token to the end of the model's message.
    """

    steps: Sequence[str | Tool] = ("It is noon in Paris.",)
    first: float = 0.3
    fails: bool = False
    late: float = 0.1
    timed: bool = True
    ends: float = 0.05


@dataclass
class Run:
    """A run, as the session sees it."""

    reply: Reply
    held: bool
    waiting: list[Event] = field(default_factory=list)
    at_step: int = 0
    dead: bool = False
    audio: bool = False  # started, and not paused
    made: float = 0.0
    sent: float = 0.0
    played: float = 0.0
    moved: float = 0.0


@dataclass
class Room:
    """Everything around a turn taker.

    `checks` and `interrupts` are a fast model's answers by transcript, given after `delay` seconds; where nothing is
    listed, YES. `stt` is how long a final transcript takes; None: never.
    """

    replies: Sequence[Reply] = ()
    checks: dict[str, bool | None] = field(default_factory=dict)
    interrupts: dict[str, bool | None] = field(default_factory=dict)
    delay: float | None = 0.1
    stt: float | None = 0.1
    config: JSON = field(default_factory=dict)
    options: JSON = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.turns = TurnTaker(LiveVoice.model_validate(self.config), **self.options)
        self.rules = Rules(self.turns)
        self.queue: list[tuple[float, int, Event]] = []
        self.order = itertools.count()
        self.runs: dict[str, Run] = {}
        self.log: list[tuple[float, Action]] = []
        self.interim = ""
        self.now = 0.0
        self.answers = iter(self.replies)

    def play(self, script: Script, until: float = 60.0) -> None:
        for at, event in script:
            self.later(at, event)
        while True:
            due = [self.queue[0][0]] if self.queue else []
            at = min([*due, *([self.turns.deadline] if self.turns.deadline is not None else [])], default=until)
            if at >= until:
                return
            self.now = at
            is_tick = not due or (self.turns.deadline is not None and self.turns.deadline < due[0])
            self.feed(Tick() if is_tick else heapq.heappop(self.queue)[2])

    def feed(self, event: Event) -> None:
        if isinstance(event, Transcript):
            self.interim = "" if event.is_final else event.text
        if isinstance(event, Pump):
            self.pump(event.response_id)
            return
        if getattr(event, "response_id", None) == "":  # of the answer that is being given
            event.response_id = next(reversed(self.runs), "")  # type: ignore[union-attr]
        run = self.runs.get(getattr(event, "response_id", ""))
        if run is not None and run.held and not isinstance(event, (FirstToken, RunFailed)):
            run.waiting.append(event)
            return
        if run is not None and isinstance(event, AudioMade):
            run.made += event.seconds
        actions = self.turns.handle(self.now, event)
        self.rules.check(self.now, event, actions)
        for action in actions:
            self.log.append((round(self.now, 2), action))
            self.perform(action)
        if isinstance(event, AudioMade) and event.response_id in self.runs:
            self.pump(event.response_id)

    def later(self, at: float, event: Event) -> None:
        heapq.heappush(self.queue, (at, next(self.order), event))

    def soon(self, delay: float, *events: Event) -> None:
        for event in events:
            self.later(self.now + delay, event)

    def perform(self, action: Action) -> None:
        match action:
            case CheckTurn():
                if self.delay is not None:
                    self.soon(self.delay, TurnChecked(action.check_id, self.checks.get(action.transcript, True)))
            case CheckInterrupt():
                if self.delay is not None:
                    self.soon(
                        self.delay, InterruptChecked(action.check_id, self.interrupts.get(action.transcript, True))
                    )
            case FinalizeSTT():
                if self.stt is not None:
                    final = [Transcript(self.interim, True)] if self.interim else []
                    self.soon(self.stt, *final, Flushed())
            case StartRun():
                self.runs[action.response_id] = Run(next(self.answers, Reply()), action.held)
                self.step(action.response_id)
            case ReleaseRun():
                run = self.runs[action.response_id]
                run.held = False
                for number, event in enumerate(run.waiting, -len(run.waiting)):  # before what comes now
                    late = run.reply.late if isinstance(event, (Timed, AudioMade, SpeechEnded)) else 0
                    heapq.heappush(self.queue, (self.now + late, number, event))
            case ContinueRun():
                self.step(action.response_id, is_last=not action.tools)
            case CancelRun():
                self.runs[action.response_id].dead = True
            case CallTool():
                for tool in self.runs[action.response_id].reply.steps:
                    if isinstance(tool, Tool) and tool.name == action.name and tool.takes is not None:
                        self.soon(tool.takes, ToolReturned(action.id, tool.result))
            case StartAudio() | ResumeAudio():
                run = self.runs[action.response_id]
                run.audio, run.moved = True, self.now
                self.soon(0, Pump(action.response_id))
            case PauseAudio() | FlushAudio():
                run = self.runs[action.response_id]
                run.audio, run.played = False, self.played(run)
            case _:
                pass

    def step(self, response_id: str, is_last: bool = False) -> None:
        """The model's next step, and its speech."""
        run = self.runs[response_id]
        reply = run.reply
        self.soon(reply.first, FirstToken(response_id))
        events: list[tuple[float, Event]] = []
        content: list[JSON] = []
        steps = reply.steps[run.at_step :]
        calls = 0
        for number, step in enumerate(steps):
            if isinstance(step, str):
                if calls:
                    break
                content.append({"type": "text", "text": step})
                said = step.split()
                base = sum(len(text.split()) for text in reply.steps[: run.at_step] if isinstance(text, str)) * PACE
                times = [Word(word, base + n * PACE, base + n * PACE + 0.2) for n, word in enumerate(said)]
                events.append((0, Said(response_id, step + " ")))
                events += [(reply.late, Timed(response_id, tuple(times)))] * reply.timed
                events += [(reply.late, AudioMade(response_id, PACE)) for _ in said]
            else:
                calls += 1
                use = {"id": f"{response_id}_{step.name}{number}", "name": step.name, "input": step.input}
                content.append({"type": "tool_use", **use})
            run.at_step += 1
        if reply.fails:
            events = [*events[:1], (0.1, RunFailed(response_id, ProviderError("overloaded", provider="openai")))]
        else:
            events.append((reply.ends, StepEnded(response_id, content)))
            if is_last or not calls:
                events.append((reply.late, SpeechEnded(response_id)))
        for delay, event in sorted(events, key=lambda one: one[0]):
            self.soon(reply.first + delay, event)

    def played(self, run: Run) -> float:
        return min(run.sent, run.played + (self.now - run.moved if run.audio else 0))

    def pump(self, response_id: str) -> None:
        """Sends no more than a second ahead."""
        run = self.runs[response_id]
        if run.dead or not run.audio:
            return
        run.played, run.moved = self.played(run), self.now
        while run.sent < run.made - 1e-6 and run.sent - run.played < 1.0 and run.audio:
            run.sent += 0.125
            self.feed(AudioSent(response_id, 0.125))
        if run.sent < run.made - 1e-6 and run.audio:
            self.soon(0.1, Pump(response_id))

    def heard(self, action: Action) -> str:
        """What of an answer has been heard when it ends so."""
        match action:
            case Interrupted():
                return action.partial_text
            case AudioDone():
                run = self.runs[action.response_id]
                return " ".join(step for step in run.reply.steps[: run.at_step] if isinstance(step, str))
            case _:
                return ""

    def told(self, *also: str) -> list[str]:
        """What was done, a line for each time; of some kinds only if they are asked for."""
        quiet = {"finalize", "state", "metrics", "grace", "expired", "captured", "check", "run", "release"} - {*also}
        lines = [(at, line(action)) for at, action in self.log]
        shown = [(at, text) for at, text in lines if text.split()[0] not in quiet]
        times = itertools.groupby(shown, lambda one: one[0])
        return [f"{at:g} {' · '.join(text for _, text in told)}" for at, told in times]


def brief(messages: list[JSON]) -> list[str]:
    """A history, a line a message: `=` is a tool's result, `!` a call, `#` a block of another kind."""
    lines = []
    for message in messages:
        said = []
        for block in [message["content"]] if isinstance(message["content"], str) else message["content"]:
            match block:
                case str():
                    said.append(block)
                case {"type": "text", "text": text}:
                    said.append(text)
                case {"type": "tool_use", "name": name}:
                    said.append(f"!{name}")
                case {"type": "tool_result", "content": result}:
                    said.append(f"={result}")
                case _:
                    said.append(f"#{block['type']}")
        lines.append(f"{message['role']}: {' | '.join(said)}")
    return lines


@dataclass
class Pump:
    """Time to send more."""

    response_id: str


def line(action: Action) -> str:
    """An action in a few words."""
    match action:
        case StateChanged():
            return f"state {action.state.value}"
        case FinalizeSTT():
            return "finalize"
        case CheckTurn():
            return f"check {action.transcript}"
        case CheckInterrupt():
            return f"meant? {action.transcript}"
        case Committed():
            return f"{'commit!' if action.forced else 'commit'} {action.transcript}"
        case StartRun():
            return "run held" if action.held else "run"
        case ReleaseRun():
            return "release"
        case ContinueRun():
            return "continue" if action.tools else "continue without tools"
        case CancelRun():
            return "cancel"
        case CallTool():
            return f"call {action.name}"
        case CancelTool():
            return "cancel tool"
        case GraceStarted():
            return f"grace {action.duration:g}"
        case GraceExpired():
            return "expired"
        case GraceExtended():
            return f"extend {action.previous_transcript} + {action.new_transcript}"
        case StartAudio():
            return "audio"
        case PauseAudio() | ResumeAudio() | FlushAudio():
            return f"{type(action).__name__.removesuffix('Audio').lower()} {action.position:.2f}"
        case AudioDone():
            return f"done {action.duration:g}"
        case InterruptDetecting():
            return "detect"
        case InterruptCaptured():
            return f"captured {action.transcript}"
        case InterruptDismissed():
            return f"dismiss {action.reason} {action.transcript}".rstrip()
        case Interrupted():
            return f"interrupt {action.partial_text or '-'} < {action.interrupt_transcript or '-'}"
        case TurnFailed():
            return f"fail {action.error.message}"
        case TurnMetrics():
            return "metrics"
        case Refused():
            return f"refuse {action.error.code}"
        case Idle():
            return "idle"


# == Rules =============================================================================================================


class Rules:
    """What holds whatever happens."""

    def __init__(self, turns: TurnTaker) -> None:
        self.turns = turns
        self.now = 0.0
        self.turn: str | None = None
        self.run: str | None = None
        self.held: str | None = None
        self.grace = self.detecting = False
        self.audio = ""  # "", on, paused
        self.paused_at = 0.0
        self.played = 0.0  # seconds that the audio of the run was on, and …
        self.sent = 0.0  # … seconds of it that went out: what the user can have heard at most
        self.said = ""  # by the run
        self.broken_off = False  # the model wants to go on with its own message
        self.over: set[str] = set()
        self.committed: list[str] = []  # of turns that stay
        self.ended: list[str] = []  # turns
        self.unmeasured: str | None = None  # a turn that has just ended

    def check(self, now: float, event: Event, actions: list[Action]) -> None:
        self.played += now - self.now if self.audio == "on" else 0.0
        self.now = now
        if isinstance(event, Said) and event.response_id == self.run:
            self.said += event.text
        if isinstance(event, AudioSent) and event.response_id == self.run:
            self.sent += event.seconds
        if isinstance(event, StepEnded):
            self.broken_off = event.stop_reason == "pause_turn"
        for action in actions:
            self.follow(now, action)
        assert self.turns.deadline is None or self.turns.deadline > now
        assert self.audio != "paused" or now - self.paused_at <= 2.5 + 1e-6, "audio stays paused"
        assert (self.turns.state is State.LISTENING) == (self.turn is None)
        assert (self.turns.state is State.INTERRUPT_CAPTURING) == self.detecting
        assert self.turns.state is not State.GRACE or self.grace
        assert self.turns.state is not State.SPEAKING or self.audio == "on"
        assert self.turns.state in (State.SPEAKING, State.PROCESSING) or self.audio != "on"
        assert self.unmeasured is None, "a turn without metrics"
        valid(self.turns.messages, is_open=self.turn is not None)

    def follow(self, now: float, action: Action) -> None:
        if not isinstance(action, (Interrupted, TurnFailed)):
            assert getattr(action, "response_id", None) not in self.over, "of an answer that is over"
        match action:
            case StateChanged():
                assert action.state is not State.PROCESSING or not self.grace or self.sent > 0
            case Committed():
                assert self.turn is None, "two turns at once"
                assert action.turn_id not in self.ended
                self.turn = action.turn_id
                self.committed.append(action.transcript)
            case StartRun(held=True):
                assert self.held is None
                assert self.turn is None
                self.held = action.response_id
                valid(action.messages, asks=True)
            case StartRun():
                assert self.turn is not None
                assert self.held is None
                self.begin(action.response_id)
                valid(action.messages, asks=True)
            case ReleaseRun():
                assert self.turn is not None
                assert self.held == action.response_id
                self.begin(action.response_id)
                self.held = None
            case ContinueRun():
                assert self.run == action.response_id
                valid(action.messages, asks=not self.broken_off)
            case CallTool():
                assert self.run == action.response_id
            case CancelRun():
                assert action.response_id in (self.run, self.held)
                assert self.audio == "" or self.held == action.response_id, "audio that was not flushed"
                self.over.add(action.response_id)
                if self.held == action.response_id:
                    self.held = None
                else:
                    self.run = None
            case StartAudio():
                assert self.run == action.response_id
                assert self.audio == ""
                self.audio = "on"
            case PauseAudio():
                assert self.run == action.response_id
                assert self.audio == "on"
                assert self.detecting
                self.audio, self.paused_at = "paused", now
                self.heard(action.position)
            case ResumeAudio():
                assert self.run == action.response_id
                assert self.audio == "paused"
                self.audio = "on"
                self.heard(action.position)
            case FlushAudio():
                assert self.run == action.response_id
                assert self.audio
                self.audio = ""
                self.heard(action.position)
            case GraceStarted():
                assert not self.grace
                assert self.turn is not None
                self.grace = True
            case GraceExpired():
                assert self.grace
                self.grace = False
            case GraceExtended():
                assert self.grace
                assert self.run is None
                assert self.audio == ""
                self.grace = False
                self.committed.pop()
                self.end(action.turn_id)
                self.unmeasured = None
            case InterruptDetecting():
                assert not self.detecting
                assert self.turn is not None
                self.detecting = True
            case InterruptCaptured():
                assert self.detecting
            case InterruptDismissed():
                assert self.detecting
                self.detecting = False
            case AudioDone():
                assert self.run == action.response_id
                assert self.audio != "paused"
                assert not self.detecting
                self.heard(action.duration)
                self.over.add(action.response_id)
                self.audio, self.run = "", None
                self.end_turn()
            case Interrupted():
                assert self.run is None
                assert self.audio == ""
                self.detecting = False
                self.heard(action.position)
                assert self.said.strip().startswith(action.partial_text)
                assert action.position > 0 or not action.partial_text
                self.end(action.turn_id)
            case TurnFailed():
                assert self.run is None
                assert self.audio == ""
                self.detecting = False
                self.end(action.turn_id)
            case TurnMetrics():
                assert self.unmeasured == action.turn_id
                self.unmeasured = None
            case _:
                pass

    def begin(self, response_id: str) -> None:
        assert self.run is None, "two answers at once"
        self.run, self.audio, self.said, self.played, self.sent = response_id, "", "", 0.0, 0.0

    def heard(self, position: float) -> None:
        assert 0 <= position <= min(self.played, self.sent) + 1e-6, "more was heard than there was to hear"

    def end(self, turn_id: str) -> None:
        assert self.turn == turn_id
        self.end_turn()

    def end_turn(self) -> None:
        assert self.turn is not None
        assert not self.grace
        self.ended.append(self.turn)
        self.unmeasured, self.turn = self.turn, None


def valid(messages: list[JSON], *, is_open: bool = False, asks: bool = False) -> None:
    """A history that every provider takes: roles alternate, nothing is empty, each call has its result at once."""
    roles = [message["role"] for message in messages]
    assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
    assert not asks or roles[-1] == "user"
    open_calls: list[str] = []
    for number, message in enumerate(messages):
        content = message["content"]
        assert content
        assert not (isinstance(content, str) and not content.strip())
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        assert all(block["text"].strip() for block in blocks if block["type"] == "text")
        results = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
        assert results == open_calls
        assert [block["type"] for block in blocks[: len(results)]] == ["tool_result"] * len(results)
        open_calls = [block["id"] for block in blocks if block["type"] == "tool_use"]
        assert not open_calls or message["role"] == "assistant"
        assert number + 1 < len(messages) or not open_calls or is_open


# == Words for scripts =================================================================================================


def says(start: float, text: str, end: float) -> Script:
    """Speech from `start` to `end`: the detector hears it 60 ms late, and its end after 300 ms; the interim transcript
    comes with the end. The room makes it final when it is asked to."""
    return [
        (start + 0.06, SpeechStarted(0.06)),
        (end, Transcript(text, False)),
        (end + 0.3, SpeechStopped(0.3)),
    ]


def noise(start: float, end: float) -> Script:
    """A cough: the detector takes it for speech, no words come of it."""
    return [(start + 0.06, SpeechStarted(0.06)), (end + 0.3, SpeechStopped(0.3))]


def streamed(start: float, text: str, end: float, *, eager: bool = True) -> Script:
    """The same where the speech service finds turns itself."""
    script: Script = [(start + 0.06, SpeechStarted(0.06)), (start + 0.1, TurnStarted())]
    script += [(end, Transcript(text, False)), (end + 0.3, SpeechStopped(0.3))]
    script += [(end + 0.3, TurnEagerEnd(text))] * eager
    return [*script, (end + 0.5, Transcript(text, True)), (end + 0.5, TurnEnded(text))]


ASK = says(0.0, "What time is it?", 1.0)  # committed at 1.4; audio from 1.8 to 3.05: five words
NOON = "It is noon in Paris."
STORY = Reply(["Once upon a time there was a king who had three sons and one day he called them."])  # 4.5 s
IMAGE: JSON = {"type": "image", "source": {"type": "url", "url": "https://example.com/cat.png"}}
GONE = ProviderError("gone", provider="cartesia")


@dataclass
class Case:
    """What happens, and the table: what is done about it, and what is history then. `show` names kinds of lines that
    are else left out."""

    script: Script
    table: str
    show: str
    room: JSON


CASES: dict[str, Case] = {}


def case(name: str, script: Script, table: str, *, show: str = "", **room: Any) -> None:
    assert name not in CASES
    CASES[name] = Case(script, dedent(table).strip(), show, room)


# == Conversations =====================================================================================================

# -- The end of a turn --

case(
    "a question is answered as soon as the model says that it is finished",
    ASK,
    """
    1.3 finalize · check What time is it? · run held
    1.4 commit What time is it? · release
    1.7 audio
    2.95 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    show="finalize check run release",
)
case(
    "the answer begins after the commit and the floor goes back when it has been heard",
    ASK,
    """
    1.3 check What time is it? · run held
    1.4 commit What time is it? · release · grace 5 · state grace
    1.7 audio · state speaking
    2.95 expired · done 1.25 · state listening
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    show="state grace expired check run release",
)
case(
    "a thinking pause does not end the turn",
    says(0, "I want to fly to", 1) + says(2.5, "Paris in May", 3.5),
    """
    2.2 check I want to fly to
    4.1 check I want to fly to Paris in May · run held
    4.2 commit I want to fly to Paris in May · release
    4.5 audio
    5.75 done 1.25
    user: I want to fly to Paris in May
    assistant: It is noon in Paris.
    """,
    show="check run release",
    checks={"I want to fly to": False},
)
case(
    "after the longest silence the turn is committed all the same",
    says(0, "I want to fly to", 1),
    """
    2.2 check I want to fly to
    4 commit! I want to fly to · run
    4.4 audio
    5.65 done 1.25
    user: I want to fly to
    assistant: It is noon in Paris.
    """,
    show="check run release",
    checks={"I want to fly to": False},
)
case(
    "a trailing and is asked about later",
    says(0, "I would like a pizza and", 1),
    """
    2.2 check I would like a pizza and
    2.3 commit I would like a pizza and · run
    2.7 audio
    3.95 done 1.25
    user: I would like a pizza and
    assistant: It is noon in Paris.
    """,
    show="check run release",
)
case(
    "digits are given time",
    says(0, "My number is 555 123", 1),
    """
    2.2 check My number is 555 123 · run held
    2.3 commit My number is 555 123 · release
    2.6 audio
    3.85 done 1.25
    user: My number is 555 123
    assistant: It is noon in Paris.
    """,
    show="check run release",
)
case(
    "spelling is given time",
    says(0, "My name is S M I", 1) + says(1.9, "T H", 2.4),
    """
    3.6 check My name is S M I T H · run held
    3.7 commit My name is S M I T H · release
    4 audio
    5.25 done 1.25
    user: My name is S M I T H
    assistant: It is noon in Paris.
    """,
    show="check run release",
)
case(
    "a one-word answer is an answer",
    says(0, "Yes.", 0.4),
    """
    0.7 check Yes. · run held
    0.8 commit Yes. · release
    1.1 audio
    2.35 done 1.25
    user: Yes.
    assistant: It is noon in Paris.
    """,
    show="check run release",
)
case(
    "a self-correction within the pause is one turn",
    says(0, "Tuesday no wait", 1) + says(1.8, "Wednesday", 2.4),
    """
    3 check Tuesday no wait Wednesday · run held
    3.1 commit Tuesday no wait Wednesday · release
    3.4 audio
    4.65 done 1.25
    user: Tuesday no wait Wednesday
    assistant: It is noon in Paris.
    """,
    show="check run release",
)
case(
    "without punctuation the silence is waited for",
    says(0, "book a flight to Rome", 1),
    """
    1.6 check book a flight to Rome · run held
    1.7 commit book a flight to Rome · release
    2 audio
    3.25 done 1.25
    user: book a flight to Rome
    assistant: It is noon in Paris.
    """,
    show="check run release",
)
case(
    "a full stop of another script is one, too",
    says(0, "मुझे पानी चाहिए।", 1),
    """
    1.3 check मुझे पानी चाहिए। · run held
    1.4 commit मुझे पानी चाहिए। · release
    1.7 audio
    2.95 done 1.25
    user: मुझे पानी चाहिए।
    assistant: It is noon in Paris.
    """,
    show="check run release",
    config={"input": {"language": "hi"}},
)
case(
    "other marks may be named",
    says(0, "What time is it?", 1),
    """
    1.6 check What time is it? · run held
    1.7 commit What time is it? · release
    2 audio
    3.25 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    show="check run release",
    config={"vad": {"punctuation_trigger": "!"}},
)
case(
    "a check that is not answered is decided by the words",
    says(0, "book a flight to Rome", 1),
    """
    1.6 check book a flight to Rome · run held
    2 commit book a flight to Rome · release
    2.1 audio
    3.35 done 1.25
    user: book a flight to Rome
    assistant: It is noon in Paris.
    """,
    show="check run release",
    delay=None,
)
case(
    "a check without a model is decided by the words at the end of the silence",
    ASK,
    """
    1.3 check What time is it? · run held
    1.6 commit What time is it? · release
    1.7 audio
    2.95 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    show="check run release",
    checks={"What time is it?": None},
)
case(
    "an unfinished sentence without a model waits for the longest silence",
    says(0, "I would like to", 1),
    """
    2.2 check I would like to
    4 commit! I would like to · run
    4.4 audio
    5.65 done 1.25
    user: I would like to
    assistant: It is noon in Paris.
    """,
    show="check run release",
    delay=None,
)
case(
    "a late answer still counts while nothing was said since",
    says(0, "I think that was", 1),
    """
    2.2 check I think that was
    3.2 commit I think that was · run
    3.6 audio
    4.85 done 1.25
    user: I think that was
    assistant: It is noon in Paris.
    """,
    show="check run release",
    delay=1.0,
)
case(
    "a stale answer does not count",
    says(0, "Well I think.", 1) + says(1.35, "maybe I should wait and", 2.5),
    """
    1.3 check Well I think. · run held
    2.5 cancel
    3.7 check Well I think. maybe I should wait and
    5.5 commit! Well I think. maybe I should wait and · run
    5.9 audio
    7.15 done 1.25
    user: Well I think. maybe I should wait and
    assistant: It is noon in Paris.
    """,
    show="check run release",
    delay=0.6,
    checks={"Well I think. maybe I should wait and": False},
)
case(
    "the answer to another question does not count",
    [*says(0, "I want to", 1), (2.3, TurnChecked(99, True))],
    """
    2.2 check I want to
    4 commit! I want to · run
    4.4 audio
    5.65 done 1.25
    user: I want to
    assistant: It is noon in Paris.
    """,
    show="check run release",
    delay=None,
)
case(
    "speech during the check holds the commit back",
    says(0, "book a flight", 1) + says(1.6, "to Rome.", 2.4),
    """
    1.6 check book a flight · run held
    2.4 cancel
    2.7 check book a flight to Rome. · run held
    2.8 commit book a flight to Rome. · release
    3.1 audio
    4.35 done 1.25
    user: book a flight to Rome.
    assistant: It is noon in Paris.
    """,
    show="check run release",
)
case(
    "an answer is begun early a few times in a turn, and in each turn",
    says(0, "Book.", 0.5) + says(1, "A flight.", 1.5) + says(2, "To Rome.", 2.5) + says(6, "Thank you.", 6.5),
    """
    0.8 check Book. · run held
    1.5 cancel
    1.8 check Book. A flight. · run held
    2.5 cancel
    2.8 check Book. A flight. To Rome.
    3.1 commit Book. A flight. To Rome. · run
    3.5 audio
    4.75 done 1.25
    6.8 check Thank you. · run held
    7.1 commit Thank you. · release
    7.2 audio
    8.45 done 1.25
    user: Book. A flight. To Rome.
    assistant: It is noon in Paris.
    user: Thank you.
    assistant: It is noon in Paris.
    """,
    show="check run release",
    checks={"Book.": False, "Book. A flight.": False, "Book. A flight. To Rome.": None, "Thank you.": None},
    options={"timing": Timing(speculations=2)},
)
case(
    "a cough during the check keeps its answer",
    says(0, "book a flight", 1) + noise(1.6, 1.8),
    """
    1.6 check book a flight · run held
    2.2 commit book a flight · release
    2.3 audio
    3.55 done 1.25
    user: book a flight
    assistant: It is noon in Paris.
    """,
    show="check run release",
)
case(
    "without semantic check silence alone decides",
    says(0, "I want to", 1),
    """
    1.6 commit I want to · run
    2 audio
    3.25 done 1.25
    user: I want to
    assistant: It is noon in Paris.
    """,
    show="check run release",
    config={"vad": {"semantic_check": False}},
)
case(
    "too few words are not worth a check",
    says(0, "Yes.", 0.4),
    """
    1 commit Yes. · run
    1.4 audio
    2.65 done 1.25
    user: Yes.
    assistant: It is noon in Paris.
    """,
    show="check run release",
    config={"vad": {"min_words_for_check": 2}},
)
case(
    "a cough alone is no turn",
    noise(0, 0.3),
    """

    """,
    show="check run release",
)
case(
    "um alone is no turn, and is not lost",
    says(0, "Um", 0.5) + says(5, "what time is it?", 6),
    """
    6.3 check Um what time is it? · run held
    6.4 commit Um what time is it? · release
    6.7 audio
    7.95 done 1.25
    user: Um what time is it?
    assistant: It is noon in Paris.
    """,
    show="check run release",
    stt=0.1,
)
case(
    "a final transcript that comes late is waited for a little",
    ASK,
    """
    1.3 check What time is it? · run held
    1.6 commit What time is it? · release
    1.7 audio
    2.95 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    show="check run release",
    stt=0.3,
)
case(
    "a final transcript that never comes is not waited for",
    ASK,
    """
    1.3 check What time is it? · run held
    1.7 commit What time is it? · release
    1.8 audio
    3.05 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    show="check run release",
    stt=None,
)
case(
    "words that come after the commit are part of the turn",
    [*says(0, "book a flight", 1), (2.0, Transcript("Book a flight to Paris.", True))],
    """
    1.6 check book a flight · run held
    1.7 commit book a flight · release
    2 cancel · extend book a flight + to Paris. · check book a flight to Paris. · run held
    2.1 commit book a flight to Paris. · release
    2.4 audio
    3.65 done 1.25
    user: book a flight to Paris.
    assistant: It is noon in Paris.
    """,
    show="check run release",
    stt=None,
    replies=[Reply(first=2)],
)
case(
    "words without speech are speech that the detector missed",
    [(1, Transcript("hello there", False))],
    """
    1.6 check hello there · run held
    1.7 commit hello there · release
    2 audio
    3.25 done 1.25
    user: hello there
    assistant: It is noon in Paris.
    """,
    show="check run release",
)
case(
    "also when the last speech was long ago",
    [*noise(0, 0.3), (9, Transcript("hello there", False))],
    """
    9.6 check hello there · run held
    9.7 commit hello there · release
    10 audio
    11.25 done 1.25
    user: hello there
    assistant: It is noon in Paris.
    """,
    show="check run release",
)
case(
    "noise that keeps the detector open does not keep the user waiting",
    [(0.06, SpeechStarted(0.06)), (1, Transcript("What time is it?", False))],
    """
    4.4 commit! What time is it? · run
    4.8 audio
    6.05 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    show="check run release",
)
case(
    "an endless turn is committed in pieces",
    [(0.1, SpeechStarted()), *[(n + 0.5, Transcript("la " * (n + 1), False)) for n in range(12)]],
    """
    5.5 commit! la la la la la · run · detect
    6.1 meant? la
    6.2 cancel · interrupt - < la
    10.5 commit! la la la la la · run · detect
    11.1 meant? la
    11.2 cancel · interrupt - < la
    14.9 commit! la la · run
    15.3 audio
    16.55 done 1.25
    user: la la la la la | la la la la la | la la
    assistant: It is noon in Paris.
    """,
    show="check run release",
    options={"timing": Timing(turn=5)},
    config={"grace_period": {"enabled": False}},
)
case(
    "a muted microphone ends the turn",
    [(n * 0.1, AudioReceived()) for n in range(11)] + says(0, "I want to", 1.0)[:2],
    """
    3.1 commit! I want to · run
    3.5 audio
    4.75 done 1.25
    user: I want to
    assistant: It is noon in Paris.
    """,
    show="check run release",
)
case(
    "a muted microphone after um ends no turn",
    [*[(n * 0.1, AudioReceived()) for n in range(11)], (0.5, Transcript("Um", True))],
    """

    """,
    show="check run release",
)
case(
    "late words do not begin the silence anew",
    [*says(0, "book a flight", 1), (1.5, Transcript("Book a flight to Rome", True))],
    """
    1.7 commit Book a flight to Rome · run
    2.1 audio
    3.35 done 1.25
    user: Book a flight to Rome
    assistant: It is noon in Paris.
    """,
    show="check run release",
    stt=None,
    config={"vad": {"semantic_check": False}},
)
case(
    "nobody there",
    [(1, AudioReceived()), (30, InputText("Hello.")), (31, AudioReceived())],
    """
    21 idle
    30 commit Hello. · run
    30.4 audio
    31.65 done 1.25
    51.65 idle
    user: Hello.
    assistant: It is noon in Paris.
    """,
    show="check run release",
    options={"timing": Timing(idle=20)},
)
case(
    "nobody is there only when the answer has been heard",
    [(1, InputText("Hello."))],
    """
    1 commit Hello. · run
    1.4 audio
    5.9 done 4.5
    7.9 idle
    user: Hello.
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    """,
    show="check run release",
    replies=[STORY],
    options={"timing": Timing(idle=2)},
)
case(
    "a turn does not begin with um",
    says(0, "Um", 0.5) + says(5, "what time is it?", 6),
    """
    6.3 check Um what time is it? · run held
    6.4 commit Um what time is it? · release
    6.7 audio
    7.95 done 1.25
    user: Um what time is it?
    assistant: It is noon in Paris.
    """,
    show="check run release",
    options={"timing": Timing(turn=5)},
)
case(
    "words that are taken back when the microphone is muted are no turn, and nobody's fault",
    [(1, AudioReceived()), (1, Transcript("Hello", False)), (3.2, Transcript("", True))],
    """

    """,
    config={"vad": {"silence_duration_ms": 5000}},
    stt=None,
)
# -- Turns that the speech service finds --

case(
    "its turn end commits, and what was begun early is released",
    streamed(0, "What time is it?", 1),
    """
    1.3 run held
    1.5 commit What time is it? · release
    1.7 audio
    2.95 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    show="check run release",
    options={"stt_turns": True},
)
case(
    "a turn that resumes cancels what was begun early",
    [*streamed(0, "book a flight", 1)[:5], (1.6, TurnResumed()), *streamed(2, "book a flight to Rome", 3)[2:]],
    """
    1.3 run held
    1.6 cancel
    3.3 run held
    3.5 commit book a flight to Rome · release
    3.7 audio
    4.95 done 1.25
    user: book a flight to Rome
    assistant: It is noon in Paris.
    """,
    show="check run release",
    options={"stt_turns": True},
)
case(
    "its turn end needs no early end",
    streamed(0, "What time is it?", 1, eager=False),
    """
    1.5 commit What time is it? · run
    1.9 audio
    3.15 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    show="check run release",
    options={"stt_turns": True},
)
case(
    "a turn that it never ends is ended by silence",
    streamed(0, "What time is it?", 1, eager=False)[:4],
    """
    4 commit! What time is it? · run
    4.4 audio
    5.65 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    show="check run release",
    options={"stt_turns": True},
)
case(
    "um is not glued to what follows it",
    streamed(0, "Um", 0.5) + streamed(5, "what time is it?", 6, eager=False),
    """
    6.5 commit Um what time is it? · run
    6.9 audio
    8.15 done 1.25
    user: Um what time is it?
    assistant: It is noon in Paris.
    """,
    show="check run release",
    options={"stt_turns": True},
)
case(
    "vad as turn detection does not begin at its early end, either",
    streamed(0, "I want to", 1)[:5],
    """
    2.2 check I want to
    2.3 commit I want to · run
    2.7 audio
    3.95 done 1.25
    user: I want to
    assistant: It is noon in Paris.
    """,
    show="check run release",
    config={"input": {"turn_detection": "vad"}},
    options={"stt_turns": True},
)
case(
    "a turn without words is none",
    [(0.1, TurnStarted()), (0.5, TurnEnded(""))],
    """

    """,
    show="check run release",
    options={"stt_turns": True},
)
case(
    "its turn start over an answer is checked like any speech",
    [
        *streamed(0, "What time is it?", 1),
        (3, TurnStarted()),
        (3.3, Transcript("Yeah.", False)),
        (3.8, Transcript("Yeah.", True)),
        (3.8, TurnEnded("Yeah.")),
    ],
    """
    1.3 run held
    1.5 commit What time is it? · release
    1.7 audio
    3 detect · pause 1.30
    3.6 dismiss backchannel Yeah. · resume 1.30
    6.8 done 4.5
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    """,
    show="check run release",
    replies=[STORY],
    options={"stt_turns": True},
)
case(
    "an interruption that has ended is answered at once",
    [*streamed(0, "What time is it?", 1), *streamed(3, "No, in Rome.", 3.6)],
    """
    1.3 run held
    1.5 commit What time is it? · release
    1.7 audio
    3.2 detect · pause 1.50
    3.6 flush 1.50 · cancel · interrupt Once upon a time there was < No, in Rome.
    3.9 run held
    4.1 commit No, in Rome. · release
    4.3 audio
    5.55 done 1.25
    user: What time is it?
    assistant: Once upon a time there was [interrupted]
    user: No, in Rome.
    assistant: It is noon in Paris.
    """,
    show="check run release",
    replies=[STORY],
    options={"stt_turns": True},
)
case(
    "its turn end counts whatever the detector hears",
    [e for e in streamed(0, "What time is it?", 1) if not isinstance(e[1], SpeechStopped)],
    """
    1.3 run held
    1.5 commit What time is it? · release
    1.7 audio
    2.95 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    show="check run release",
    options={"stt_turns": True},
)
case(
    "what the client says of an interruption is a turn that has ended",
    [*streamed(0, "What time is it?", 1), (3, InputInterrupt("And in Rome?"))],
    """
    1.3 run held
    1.5 commit What time is it? · release
    1.7 audio
    3 flush 1.30 · cancel · interrupt Once upon a time there < And in Rome? · commit And in Rome? · run
    3.4 audio
    4.65 done 1.25
    user: What time is it?
    assistant: Once upon a time there [interrupted]
    user: And in Rome?
    assistant: It is noon in Paris.
    """,
    show="check run release",
    replies=[STORY],
    options={"stt_turns": True},
)
case(
    "vad as turn detection leaves its turns alone",
    streamed(0, "What time is it?", 1),
    """
    1.3 check What time is it? · run held
    1.5 commit What time is it? · release
    1.7 audio
    2.95 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    show="check run release",
    config={"input": {"turn_detection": "vad"}},
    options={"stt_turns": True},
)
# -- Push-to-talk --

case(
    "released, it commits",
    [*says(0, "I want to", 1)[:2], (1.2, InputCommit())],
    """
    1.3 commit I want to
    1.7 audio
    2.95 done 1.25
    user: I want to
    assistant: It is noon in Paris.
    """,
    config={"input": {"turn_detection": "manual"}},
)
case(
    "until then no silence is long enough",
    says(0, "What time is it?", 1),
    """

    """,
    config={"input": {"turn_detection": "manual"}},
)
case(
    "nor does a microphone end it that is muted",
    [(n * 0.1, AudioReceived()) for n in range(11)] + says(0, "I want to", 1.0)[:2],
    """

    """,
    config={"input": {"turn_detection": "manual"}},
)
case(
    "released before the words are there, it waits for them",
    [(0.1, SpeechStarted()), (0.9, InputCommit()), (1.5, Transcript("Hello.", False)), (1.6, Flushed())],
    """
    1.6 commit Hello.
    2 audio
    3.25 done 1.25
    user: Hello.
    assistant: It is noon in Paris.
    """,
    config={"input": {"turn_detection": "manual"}},
    stt=None,
)
case(
    "released twice, it waits once",
    [*says(0, "I want to", 1)[:2], (1.2, InputCommit()), (1.5, InputCommit())],
    """
    1.6 commit I want to
    2 audio
    3.25 done 1.25
    user: I want to
    assistant: It is noon in Paris.
    """,
    config={"input": {"turn_detection": "manual"}},
    stt=None,
)
case(
    "released without a word, it is refused",
    [(1, InputCommit())],
    """
    1.1 refuse nothing_to_commit
    """,
    config={"input": {"turn_detection": "manual"}},
)
case(
    "released over an answer, it interrupts",
    [*ASK, (1.5, InputCommit()), *says(2.6, "and in Rome", 3.2)[:2], (3.3, InputCommit())],
    """
    1.6 commit What time is it?
    2 audio
    2.8 detect · pause 0.80
    3.2 meant? and in Rome
    3.3 flush 0.80 · cancel · interrupt Once upon a < and in Rome · commit and in Rome
    3.7 audio
    4.95 done 1.25
    user: What time is it?
    assistant: Once upon a [interrupted]
    user: and in Rome
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
    config={"input": {"turn_detection": "manual"}},
)
case(
    "released over an answer, whatever was said is meant",
    [*ASK, (1.5, InputCommit()), (3, SpeechStarted()), (3.1, InputCommit()), (3.15, Transcript("Okay.", False))],
    """
    1.6 commit What time is it?
    2 audio
    3.15 flush 1.15 · cancel · interrupt Once upon a time < Okay.
    3.2 commit Okay.
    3.6 audio
    4.85 done 1.25
    user: What time is it?
    assistant: Once upon a time [interrupted]
    user: Okay.
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
    config={"input": {"turn_detection": "manual"}},
)
case(
    "released during the capture, too",
    [*ASK, (1.5, InputCommit()), (3, SpeechStarted()), (3.3, InputCommit()), (3.35, Transcript("Okay.", False))],
    """
    1.6 commit What time is it?
    2 audio
    3.2 detect · pause 1.20
    3.35 flush 1.20 · cancel · interrupt Once upon a time there < Okay.
    3.4 commit Okay.
    3.8 audio
    5.05 done 1.25
    user: What time is it?
    assistant: Once upon a time there [interrupted]
    user: Okay.
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
    config={"input": {"turn_detection": "manual"}},
)
case(
    "released over an answer without a word, it is refused and the answer goes on",
    [*ASK, (1.5, InputCommit()), (3, InputCommit())],
    """
    1.6 commit What time is it?
    2 audio
    3.1 refuse nothing_to_commit
    6.5 done 4.5
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    """,
    replies=[STORY],
    config={"input": {"turn_detection": "manual"}},
)
case(
    "released while words wait that were perhaps meant, it interrupts with them",
    [*ASK, *says(3, "What about Rome?", 3.5), (5, InputCommit())],
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    3.6 meant? What about Rome?
    3.9 dismiss unclear What about Rome? · resume 1.50
    5 flush 2.60 · cancel · interrupt Once upon a time there was a king who had < What about Rome?
    5.1 commit What about Rome?
    5.5 audio
    6.75 done 1.25
    user: What time is it?
    assistant: Once upon a time there was a king who had [interrupted]
    user: What about Rome?
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
    interrupts={"What about Rome?": None},
)
case(
    "released without a sign from the detector, it asks for the words again",
    [*noise(0, 0.5), (2, Transcript("Hello", False)), (2.5, InputCommit())],
    """
    0.8 finalize
    2.5 finalize
    2.9 commit Hello
    3.3 audio
    4.55 done 1.25
    user: Hello
    assistant: It is noon in Paris.
    """,
    show="finalize",
    config={"input": {"turn_detection": "manual"}},
    stt=None,
)
case(
    "in automatic mode it ends the turn at once",
    [*says(0, "I want to", 1)[:2], (1.1, InputCommit())],
    """
    1.2 commit I want to
    1.6 audio
    2.85 done 1.25
    user: I want to
    assistant: It is noon in Paris.
    """,
)
# -- Grace --

case(
    "speech within grace makes one turn of both parts",
    says(0, "Book a flight.", 1) + says(2, "To Paris.", 2.8),
    """
    1.4 commit Book a flight. · grace 5
    2.8 cancel · extend Book a flight. + To Paris.
    3.2 commit Book a flight. To Paris. · grace 5
    3.5 audio
    4.75 expired · done 1.25
    user: Book a flight. To Paris.
    assistant: It is noon in Paris.
    """,
    show="grace expired",
    replies=[Reply(first=2.0)],
)
case(
    "noise within grace changes nothing",
    ASK + noise(2, 2.3),
    """
    1.4 commit What time is it? · grace 5
    3.4 audio
    4.65 expired · done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    show="grace expired",
    replies=[Reply(first=2.0)],
)
case(
    "an answer waits for a moment while somebody begins to speak",
    ASK + noise(1.6, 2.2),
    """
    1.4 commit What time is it?
    2.5 audio
    3.75 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
)
case(
    "but not for noise that goes on",
    ASK + noise(1.6, 6.0),
    """
    1.4 commit What time is it?
    2.6 audio
    3.85 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
)
case(
    "a backchannel within grace changes nothing",
    ASK + says(2, "Okay.", 2.3),
    """
    1.4 commit What time is it?
    3.4 audio
    4.65 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    replies=[Reply(first=2.0)],
)
case(
    "what begins as a backchannel within grace may be more",
    [*ASK, *says(2, "Okay", 2.3), (2.35, Transcript("Okay but in Rome", False))],
    """
    1.4 commit What time is it?
    2.35 cancel · extend What time is it? + Okay but in Rome
    3 commit What time is it? Okay but in Rome
    3.3 audio
    4.55 done 1.25
    user: What time is it? Okay but in Rome
    assistant: It is noon in Paris.
    """,
    replies=[Reply(first=2.0)],
)
case(
    "once the answer is audible speech is an interruption",
    ASK + says(2.2, "I mean in Rome.", 3.0),
    """
    1.4 commit What time is it?
    1.7 audio
    2.4 detect · pause 0.70
    3 meant? I mean in Rome.
    3.1 flush 0.70 · cancel · expired · interrupt Once upon a < I mean in Rome.
    3.4 commit I mean in Rome.
    3.7 audio
    4.95 expired · done 1.25
    user: What time is it?
    assistant: Once upon a [interrupted]
    user: I mean in Rome.
    assistant: It is noon in Paris.
    """,
    show="expired",
    replies=[STORY],
)
case(
    "words that begin within grace and come after it still count",
    ASK + says(6.3, "In Rome.", 6.8),
    """
    1.4 commit What time is it?
    6.8 cancel · extend What time is it? + In Rome.
    7.2 commit What time is it? In Rome.
    7.5 audio
    8.75 expired · done 1.25
    user: What time is it? In Rome.
    assistant: It is noon in Paris.
    """,
    show="expired",
    replies=[Reply(first=9)],
)
case(
    "words after grace interrupt",
    ASK + says(6.9, "In Rome.", 7.4),
    """
    1.4 commit What time is it?
    6.4 expired
    7.4 detect
    7.5 meant? In Rome.
    7.6 cancel · interrupt - < In Rome.
    7.8 commit In Rome.
    8.1 audio
    9.35 expired · done 1.25
    user: What time is it? | In Rome.
    assistant: It is noon in Paris.
    """,
    show="expired",
    replies=[Reply(first=9)],
)
case(
    "speech that begins within grace and whose words come long after it interrupts",
    [*ASK, (6.36, SpeechStarted(0.06)), (7.35, Transcript("In Rome.", False)), (8, SpeechStopped(0.3))],
    """
    1.4 commit What time is it?
    7.3 expired
    7.35 detect
    7.95 meant? In Rome.
    8.05 cancel · interrupt - < In Rome.
    8.15 commit In Rome.
    8.45 audio
    9.7 expired · done 1.25
    user: What time is it? | In Rome.
    assistant: It is noon in Paris.
    """,
    show="expired",
    replies=[Reply(first=9)],
)
case(
    "a word at the very end of grace is in time",
    [*ASK, (6.39, Transcript("In Rome.", False))],
    """
    1.4 commit What time is it?
    6.39 cancel · extend What time is it? + In Rome.
    6.49 commit What time is it? In Rome.
    6.79 audio
    8.04 done 1.25
    user: What time is it? In Rome.
    assistant: It is noon in Paris.
    """,
    replies=[Reply(first=9)],
)
case(
    "and one at the end of it is late",
    [*ASK, (6.4, Transcript("In Rome.", False))],
    """
    1.4 commit What time is it?
    6.4 expired · detect
    7 meant? In Rome.
    7.1 cancel · interrupt - < In Rome.
    7.2 commit In Rome.
    7.5 audio
    8.75 expired · done 1.25
    user: What time is it? | In Rome.
    assistant: It is noon in Paris.
    """,
    show="expired",
    replies=[Reply(first=9)],
)
case(
    "without grace words before the answer interrupt",
    ASK + says(2, "In Rome.", 2.5),
    """
    1.4 commit What time is it?
    2.5 detect
    2.6 meant? In Rome.
    2.7 cancel · interrupt - < In Rome.
    2.9 commit In Rome.
    3.2 audio
    4.45 done 1.25
    user: What time is it? | In Rome.
    assistant: It is noon in Paris.
    """,
    replies=[Reply(first=9)],
    config={"grace_period": {"enabled": False}},
)
case(
    "a cough before the answer changes nothing, grace or not",
    ASK + noise(2, 2.3),
    """
    1.4 commit What time is it?
    3.4 audio
    4.65 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    replies=[Reply(first=2)],
    config={"grace_period": {"enabled": False}},
)
case(
    "nor does a backchannel",
    ASK + says(2, "Okay.", 2.3),
    """
    1.4 commit What time is it?
    3.4 audio
    4.65 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    replies=[Reply(first=2)],
    config={"grace_period": {"enabled": False}},
)
case(
    "a turn may be extended twice",
    says(0, "Book.", 0.5) + says(1.5, "A flight.", 2) + says(3, "To Paris.", 3.5),
    """
    0.9 commit Book.
    2 cancel · extend Book. + A flight.
    2.4 commit Book. A flight.
    3.5 cancel · extend Book. A flight. + To Paris.
    3.9 commit Book. A flight. To Paris.
    4.2 audio
    5.45 done 1.25
    user: Book. A flight. To Paris.
    assistant: It is noon in Paris.
    """,
    replies=[Reply(first=5)] * 2,
)
case(
    "typed text within grace belongs to the turn",
    [*ASK, (2, InputText("In Paris, I mean."))],
    """
    1.4 commit What time is it?
    2 cancel · extend What time is it? + In Paris, I mean. · commit What time is it? In Paris, I mean.
    2.4 audio
    3.65 done 1.25
    user: What time is it? | In Paris, I mean.
    assistant: It is noon in Paris.
    """,
    replies=[Reply(first=2.0)],
)
# -- Barge-in --

case(
    "a cough is dismissed and nothing is lost",
    ASK + noise(3, 3.4),
    """
    1.4 commit What time is it? · state grace
    1.7 audio · state speaking
    3.2 detect · pause 1.50 · state interrupt_capturing
    3.7 dismiss no_speech · resume 1.50 · state speaking
    6.7 done 4.5 · state listening
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    """,
    show="state",
    replies=[STORY],
)
case(
    "a click is too short to pause",
    [*ASK, (3.06, SpeechStarted(0.06)), (3.15, SpeechStopped())],
    """
    1.4 commit What time is it?
    1.7 audio
    6.2 done 4.5
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    """,
    replies=[STORY],
)
case(
    "stop interrupts at once",
    ASK + says(3, "Stop.", 3.4),
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    3.4 flush 1.50 · cancel · interrupt Once upon a time there was < Stop.
    3.8 commit Stop.
    4.1 audio
    5.35 done 1.25
    user: What time is it?
    assistant: Once upon a time there was [interrupted]
    user: Stop.
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
)
case(
    "a backchannel is dismissed",
    ASK + says(3, "Yeah, yeah.", 3.5),
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    3.6 captured Yeah, yeah.
    3.8 dismiss backchannel Yeah, yeah. · resume 1.50
    6.8 done 4.5
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    """,
    show="captured",
    replies=[STORY],
)
case(
    "a backchannel in Hindi is dismissed",
    ASK + says(3, "अच्छा, ठीक है।", 3.5),
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    3.8 dismiss backchannel अच्छा, ठीक है। · resume 1.50
    6.8 done 4.5
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    """,
    replies=[STORY],
    config={"input": {"language": "hi"}},
)
case(
    "the assistant's own words are an echo",
    ASK + says(2.6, "upon a time there", 3.6),
    """
    1.4 commit What time is it?
    1.7 audio
    2.8 detect · pause 1.10
    3.8 dismiss echo upon a time there · resume 1.10
    7.2 done 4.5
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    """,
    replies=[STORY],
)
case(
    "words of an echo come before the detector is sure, and are told all the same",
    [*ASK, (3, SpeechStarted(0.06)), (3.05, Transcript("upon a time", False)), (3.5, SpeechStopped(0.3))],
    """
    1.4 commit What time is it?
    1.7 audio
    3.05 detect · pause 1.35
    3.54 dismiss echo upon a time · resume 1.35
    6.69 done 4.5
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    """,
    replies=[STORY],
)
case(
    "its own stop words, too",
    ASK + says(2.4, "please stop the car", 3.4),
    """
    1.4 commit What time is it?
    1.7 audio
    2.6 detect · pause 0.90
    3.6 dismiss echo please stop the car · resume 0.90
    5.2 done 2.5
    user: What time is it?
    assistant: Now please stop the car and get out of it.
    """,
    replies=[Reply(["Now please stop the car and get out of it."])],
)
case(
    "a question is meant, says the model",
    ASK + says(3, "What about Rome?", 3.7),
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    3.7 captured What about Rome? · meant? What about Rome?
    3.8 flush 1.50 · cancel · interrupt Once upon a time there was < What about Rome?
    4.1 commit What about Rome?
    4.4 audio
    5.65 done 1.25
    user: What time is it?
    assistant: Once upon a time there was [interrupted]
    user: What about Rome?
    assistant: It is noon in Paris.
    """,
    show="captured",
    replies=[STORY],
)
case(
    "speaking to somebody else is not, says the model",
    ASK + says(3, "Honey, where are the keys?", 4.0),
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    4 meant? Honey, where are the keys?
    4.1 dismiss not_meant Honey, where are the keys? · resume 1.50
    7.1 done 4.5
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    """,
    replies=[STORY],
    interrupts={"Honey, where are the keys?": False},
)
case(
    "no answer and silence: the answer goes on, then the words are answered",
    ASK + says(3, "What about Rome?", 3.5),
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    3.6 meant? What about Rome?
    3.9 dismiss unclear What about Rome? · resume 1.50
    6.9 done 4.5
    7 commit What about Rome?
    7.3 audio
    8.55 done 1.25
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    user: What about Rome?
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
    interrupts={"What about Rome?": None},
)
case(
    "no answer and more words: the answer yields",
    [
        *ASK,
        (3.06, SpeechStarted(0.06)),
        (3.5, Transcript("What about", False)),
        (4.2, Transcript("What about the other", False)),
        (4.8, SpeechStopped()),
    ],
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    3.6 meant? What about
    4.2 flush 1.50 · cancel · interrupt Once upon a time there was < What about the other
    5.5 commit What about the other
    5.8 audio
    7.05 done 1.25
    user: What time is it?
    assistant: Once upon a time there was [interrupted]
    user: What about the other
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
    interrupts={"What about": None},
)
case(
    "words that came while the model was asked are asked about again",
    [
        *ASK,
        (3.06, SpeechStarted(0.06)),
        (3.5, Transcript("Honey", False)),
        (3.8, Transcript("Honey, no, I mean Rome", False)),
        (4, SpeechStopped()),
    ],
    """
    1.65 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    3.6 meant? Honey
    3.95 meant? Honey, no, I mean Rome
    4.3 flush 1.50 · cancel · interrupt Once upon a time there was < Honey, no, I mean Rome
    4.95 commit Honey, no, I mean Rome
    5 audio
    6.25 done 1.25
    user: What time is it?
    assistant: Once upon a time there was [interrupted]
    user: Honey, no, I mean Rome
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
    delay=0.35,
    interrupts={"Honey": False},
)
case(
    "words that come late are decided in time",
    [*ASK, (3.06, SpeechStarted(0.06)), (5.3, Transcript("What about", False)), (7, SpeechStopped())],
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    5.3 meant? What about
    5.7 flush 1.50 · cancel · interrupt Once upon a time there was < What about
    8.3 commit What about
    8.7 audio
    9.95 done 1.25
    user: What time is it?
    assistant: Once upon a time there was [interrupted]
    user: What about
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
    interrupts={"What about": None},
)
case(
    "no answer and speech that goes on: the answer yields",
    [*ASK, (3.06, SpeechStarted(0.06)), (3.5, Transcript("What about", False)), (6, SpeechStopped())],
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    3.6 meant? What about
    5 flush 1.50 · cancel · interrupt Once upon a time there was < What about
    7.3 commit What about
    7.7 audio
    8.95 done 1.25
    user: What time is it?
    assistant: Once upon a time there was [interrupted]
    user: What about
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
    interrupts={"What about": None},
)
case(
    "without semantic check words interrupt after the capture",
    ASK + says(3, "What about Rome?", 3.7),
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    3.7 flush 1.50 · cancel · interrupt Once upon a time there was < What about Rome?
    4.1 commit What about Rome?
    4.4 audio
    5.65 done 1.25
    user: What time is it?
    assistant: Once upon a time there was [interrupted]
    user: What about Rome?
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
    config={"interrupt": {"semantic_check": False}},
)
case(
    "a first word pauses where the detector heard nothing",
    [*ASK, (3, Transcript("What about", False)), (3.3, Transcript("What about Rome?", False))],
    """
    1.4 commit What time is it?
    1.7 audio
    3 detect · pause 1.30
    3.6 meant? What about Rome?
    3.7 flush 1.30 · cancel · interrupt Once upon a time there < What about Rome?
    3.8 commit What about Rome?
    4.1 audio
    5.35 done 1.25
    user: What time is it?
    assistant: Once upon a time there [interrupted]
    user: What about Rome?
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
)
case(
    "what is made while it is paused is heard after it",
    [*ASK, *noise(3, 3.4), (3.3, Said("", "And so on. ")), (3.3, AudioMade("", 0.75)), (3.4, SpeechEnded(""))],
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    3.7 dismiss no_speech · resume 1.50
    7.45 done 5.25
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    """,
    replies=[STORY],
)
case(
    "steady noise is dismissed after a while, and then let be",
    ASK + noise(3, 6.5),
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    5.7 dismiss no_speech · resume 1.50
    9.2 done 5
    user: What time is it?
    assistant: la la la la la la la la la la la la la la la la la la la la
    """,
    replies=[Reply(["la " * 19 + "la"])],
)
case(
    "always: sustained speech interrupts",
    ASK + noise(3, 3.4),
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 flush 1.50 · cancel · interrupt Once upon a time there was < -
    user: What time is it?
    assistant: Once upon a time there was [interrupted]
    """,
    replies=[STORY],
    config={"interrupt": {"mode": "always"}},
)
case(
    "never: the words wait until the answer is over",
    ASK + says(3, "What about Rome?", 3.7),
    """
    1.4 commit What time is it?
    1.7 audio
    6.2 done 4.5
    6.3 commit What about Rome?
    6.6 audio
    7.85 done 1.25
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    user: What about Rome?
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
    config={"interrupt": {"mode": "never"}},
)
case(
    "never: but the client may interrupt",
    [*ASK, (3, InputInterrupt("Enough"))],
    """
    1.4 commit What time is it?
    1.7 audio
    3 flush 1.30 · cancel · interrupt Once upon a time there < Enough
    3.7 commit Enough
    4 audio
    5.25 done 1.25
    user: What time is it?
    assistant: Once upon a time there [interrupted]
    user: Enough
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
    config={"interrupt": {"mode": "disabled"}},
)
case(
    "never: a backchannel is no turn when the answer is over",
    ASK + says(3, "Okay.", 3.3),
    """
    1.4 commit What time is it?
    1.7 audio
    6.2 done 4.5
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    """,
    replies=[STORY],
    config={"interrupt": {"mode": "never"}},
)
case(
    "never: nor is an echo",
    ASK + says(3, "there was a king", 4),
    """
    1.4 commit What time is it?
    1.7 audio
    6.2 done 4.5
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    """,
    replies=[STORY],
    config={"interrupt": {"mode": "never"}},
)
case(
    "twice",
    ASK + says(3, "What about Rome?", 3.5) + says(6, "What about Oslo?", 6.6),
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    3.6 meant? What about Rome?
    3.7 flush 1.50 · cancel · interrupt Once upon a time there was < What about Rome?
    3.9 commit What about Rome?
    4.2 audio
    6.2 detect · pause 2.00
    6.6 meant? What about Oslo?
    6.7 flush 2.00 · cancel · interrupt Once upon a time there was a king < What about Oslo?
    7 commit What about Oslo?
    7.3 audio
    11.8 done 4.5
    user: What time is it?
    assistant: Once upon a time there was [interrupted]
    user: What about Rome?
    assistant: Once upon a time there was a king [interrupted]
    user: What about Oslo?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    """,
    replies=[STORY] * 3,
)
case(
    "a second time while it is being decided",
    ASK + noise(3, 3.2) + says(3.4, "Wait!", 3.6),
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    3.6 flush 1.50 · cancel · interrupt Once upon a time there was < Wait!
    3.7 commit Wait!
    4 audio
    5.25 done 1.25
    user: What time is it?
    assistant: Once upon a time there was [interrupted]
    user: Wait!
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
)
case(
    "after a dismissal",
    ASK + noise(3, 3.2) + says(4.2, "Stop!", 4.6),
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    3.6 dismiss no_speech · resume 1.50
    4.4 detect · pause 2.30
    4.6 flush 2.30 · cancel · interrupt Once upon a time there was a king who < Stop!
    5 commit Stop!
    5.3 audio
    6.55 done 1.25
    user: What time is it?
    assistant: Once upon a time there was a king who [interrupted]
    user: Stop!
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
)
case(
    "the tail of the audio is not over until it is heard",
    ASK + says(5.4, "Wait!", 5.7),
    """
    1.4 commit What time is it?
    1.7 audio
    5.6 detect · pause 3.90
    5.7 flush 3.90 · cancel · interrupt Once upon a time there was a king who had three sons and one day < Wait!
    6.1 commit Wait!
    6.4 audio
    7.65 done 1.25
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day [interrupted]
    user: Wait!
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
)
case(
    "after the end it is a new turn",
    ASK + says(6.7, "And in Rome?", 7.4),
    """
    1.4 commit What time is it?
    1.7 audio
    6.2 done 4.5
    7.8 commit And in Rome?
    8.1 audio
    9.35 done 1.25
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    user: And in Rome?
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
)
case(
    "nothing was heard: no message",
    [*ASK, (1.85, Playback("", 0.1)), (1.9, InputInterrupt())],
    """
    1.4 commit What time is it?
    1.7 audio
    1.9 flush 0.10 · cancel · interrupt - < -
    user: What time is it?
    """,
    replies=[STORY],
)
case(
    "by the client",
    [*ASK, (3, InputInterrupt())],
    """
    1.4 commit What time is it?
    1.7 audio
    3 flush 1.30 · cancel · interrupt Once upon a time there < -
    user: What time is it?
    assistant: Once upon a time there [interrupted]
    """,
    replies=[STORY],
)
case(
    "by the client, with words",
    [*ASK, (3, InputInterrupt("And in Rome?"))],
    """
    1.4 commit What time is it?
    1.7 audio
    3 flush 1.30 · cancel · interrupt Once upon a time there < And in Rome?
    3.1 commit And in Rome?
    3.4 audio
    4.65 done 1.25
    user: What time is it?
    assistant: Once upon a time there [interrupted]
    user: And in Rome?
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
)
case(
    "by the client, with words of which we have heard more",
    [*ASK, (3, Transcript("And in Rome please", False)), (3.1, InputInterrupt("And in Rome"))],
    """
    1.4 commit What time is it?
    1.7 audio
    3 detect · pause 1.30
    3.1 flush 1.30 · cancel · interrupt Once upon a time there < And in Rome please
    3.7 commit And in Rome please
    4 audio
    5.25 done 1.25
    user: What time is it?
    assistant: Once upon a time there [interrupted]
    user: And in Rome please
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
)
case(
    "by the client when nothing is being said",
    [(1, InputInterrupt())],
    """
    1 refuse nothing_to_interrupt
    """,
)
case(
    "by typed text",
    [*ASK, (3, InputText("And in Rome?"))],
    """
    1.4 commit What time is it?
    1.7 audio
    3 flush 1.30 · cancel · interrupt Once upon a time there < - · commit And in Rome?
    3.4 audio
    4.65 done 1.25
    user: What time is it?
    assistant: Once upon a time there [interrupted]
    user: And in Rome?
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
)
case(
    "during the capture by the client",
    [*ASK, *noise(3, 4), (3.4, InputInterrupt())],
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    3.4 flush 1.50 · cancel · interrupt Once upon a time there was < -
    user: What time is it?
    assistant: Once upon a time there was [interrupted]
    """,
    replies=[STORY],
)
case(
    "the model is slow to answer and the audio waits for it",
    ASK + says(3, "What about Rome?", 3.7),
    """
    1.65 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    3.7 meant? What about Rome?
    4.05 flush 1.50 · cancel · interrupt Once upon a time there was < What about Rome?
    4.4 commit What about Rome?
    4.45 audio
    5.7 done 1.25
    user: What time is it?
    assistant: Once upon a time there was [interrupted]
    user: What about Rome?
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
    delay=0.35,
)
case(
    "an answer that is not there yet waits for the decision",
    ASK + says(2, "What about Rome?", 2.7),
    """
    1.4 commit What time is it?
    2.7 detect · meant? What about Rome?
    2.8 dismiss not_meant What about Rome? · audio
    4.05 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    replies=[Reply(first=1.4)],
    config={"grace_period": {"enabled": False}},
    interrupts={"What about Rome?": False},
)
case(
    "the end of the answer comes back as an echo",
    ASK + says(6.1, "he called them.", 6.9),
    """
    1.4 commit What time is it?
    1.7 audio
    6.2 done 4.5
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    """,
    replies=[STORY],
)
case(
    "who repeats its last words after the end means them",
    ASK + says(3.5, "noon in Paris", 4.3),
    """
    1.4 commit What time is it?
    1.7 audio
    2.95 done 1.25
    5 commit noon in Paris
    5.3 audio
    6.55 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    user: noon in Paris
    assistant: It is noon in Paris.
    """,
)
case(
    "stop over an echo is heard",
    ASK + says(2.6, "upon a time there stop", 3.6),
    """
    1.4 commit What time is it?
    1.7 audio
    2.8 detect · pause 1.10
    3.6 flush 1.10 · cancel · interrupt Once upon a time < upon a time there stop
    4.3 commit upon a time there stop
    4.6 audio
    5.85 done 1.25
    user: What time is it?
    assistant: Once upon a time [interrupted]
    user: upon a time there stop
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
)
case(
    "yes before the end of a question is a reply to it",
    ASK + says(2.6, "Yes.", 2.9),
    """
    1.4 commit What time is it?
    1.7 audio
    2.8 detect · pause 1.10
    3.2 dismiss backchannel Yes. · resume 1.10
    3.6 done 1.5
    3.7 commit Yes.
    4 audio
    5.25 done 1.25
    user: What time is it?
    assistant: Shall I book that one now?
    user: Yes.
    assistant: It is noon in Paris.
    """,
    replies=[Reply(["Shall I book that one now?"])],
)
case(
    "in the middle of it it is none",
    ASK + says(2.6, "Yes.", 2.9),
    """
    1.4 commit What time is it?
    1.7 audio
    2.8 detect · pause 1.10
    3.2 dismiss backchannel Yes. · resume 1.10
    5.35 done 3.25
    user: What time is it?
    assistant: There is one at noon. Shall I book that one for you now?
    """,
    replies=[Reply(["There is one at noon. Shall I book that one for you now?"])],
)
case(
    "never: yes at the end of a question is a reply to it, too",
    ASK + says(2.6, "Yes.", 2.9),
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 done 1.5
    3.3 commit Yes.
    3.6 audio
    4.85 done 1.25
    user: What time is it?
    assistant: Shall I book that one now?
    user: Yes.
    assistant: It is noon in Paris.
    """,
    replies=[Reply(["Shall I book that one now?"])],
    config={"interrupt": {"mode": "never"}},
)
case(
    "however long the capture, audio does not stay paused",
    ASK + noise(3, 8),
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    5.7 dismiss no_speech · resume 1.50
    8.7 done 4.5
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    """,
    replies=[STORY],
    config={"interrupt": {"capture_duration_ms": 10_000}},
)
# -- Playback --

case(
    "the client has heard less than real time allows",
    [*ASK, (2.5, Playback("", 0.5)), (3, InputInterrupt())],
    """
    1.4 commit What time is it?
    1.7 audio
    3 flush 0.50 · cancel · interrupt Once upon < -
    user: What time is it?
    assistant: Once upon [interrupted]
    """,
    replies=[STORY],
)
case(
    "the client cannot have heard more than real time allows",
    [*ASK, (2.5, Playback("", 4.0)), (3, InputInterrupt())],
    """
    1.4 commit What time is it?
    1.7 audio
    3 flush 1.30 · cancel · interrupt Once upon a time there < -
    user: What time is it?
    assistant: Once upon a time there [interrupted]
    """,
    replies=[STORY],
)
case(
    "a slow client is waited for",
    [*ASK, *[(1.75 + n / 4, Playback("", n / 8)) for n in range(11)]],
    """
    1.4 commit What time is it?
    1.7 audio
    4.25 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
)
case(
    "a client that stops reporting is not",
    [*ASK, (2, Playback("", 0.2))],
    """
    1.4 commit What time is it?
    1.7 audio
    3.95 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
)
case(
    "without word times what was heard is a share of the text",
    [*ASK, (4, InputInterrupt())],
    """
    1.4 commit What time is it?
    1.7 audio
    4 flush 2.30 · cancel · interrupt Once upon a time there was a king who had < -
    user: What time is it?
    assistant: Once upon a time there was a king who had [interrupted]
    """,
    replies=[Reply(STORY.steps, timed=False)],
)
case(
    "save_partial none keeps nothing",
    [*ASK, (3, InputInterrupt())],
    """
    1.4 commit What time is it?
    1.7 audio
    3 flush 1.30 · cancel · interrupt Once upon a time there < -
    user: What time is it?
    """,
    replies=[STORY],
    config={"interrupt": {"save_partial": "discard"}},
)
case(
    "save_partial full keeps the words without a mark",
    [*ASK, (3, InputInterrupt())],
    """
    1.4 commit What time is it?
    1.7 audio
    3 flush 1.30 · cancel · interrupt Once upon a time there < -
    user: What time is it?
    assistant: Once upon a time there
    """,
    replies=[STORY],
    config={"interrupt": {"save_partial": "full"}},
)
# -- Tools --

case(
    "the answer goes on after a tool",
    ASK,
    """
    1.4 commit What time is it? · state grace
    1.65 call search
    1.7 audio · state speaking
    2.15 continue
    3.3 done 1.5 · state listening
    user: What time is it?
    assistant: Let me look. | !search
    user: =done
    assistant: It is sunny.
    """,
    show="state",
    replies=[Reply(["Let me look.", Tool("search"), "It is sunny."])],
)
case(
    "while a tool takes its time nobody speaks",
    ASK,
    """
    1.4 commit What time is it? · state grace
    1.65 call search
    1.7 audio · state speaking
    2.45 state processing
    4.65 continue
    5.05 state speaking
    5.8 done 1.5 · state listening
    user: What time is it?
    assistant: Let me look. | !search
    user: =done
    assistant: It is sunny.
    """,
    show="state",
    replies=[Reply(["Let me look.", Tool("search", takes=3), "It is sunny."])],
)
case(
    "two tools run at once",
    ASK,
    """
    1.4 commit What time is it?
    1.65 call a · call b
    2.65 continue
    3.05 audio
    3.3 done 0.25
    user: What time is it?
    assistant: !a | !b
    user: =done | =done
    assistant: Both.
    """,
    replies=[Reply([Tool("a", takes=1), Tool("b", takes=0.5), "Both."])],
)
case(
    "barge-in during a tool",
    ASK + says(3.2, "Forget it.", 3.8),
    """
    1.4 commit What time is it? · state grace
    1.65 call search
    1.7 audio · state speaking
    2.45 state processing
    3.8 detect · pause 0.75 · state interrupt_capturing · meant? Forget it.
    3.9 flush 0.75 · cancel · interrupt Let me look. < Forget it. · state listening
    4.2 commit Forget it. · state grace
    4.5 audio · state speaking
    5.75 done 1.25 · state listening
    10.65 refuse unknown_tool_call
    user: What time is it?
    assistant: Let me look. | !search
    user: =cancelled: the turn ended before it was done | Forget it.
    assistant: It is noon in Paris.
    """,
    show="state",
    replies=[Reply(["Let me look.", Tool("search", takes=9), "Well."])],
)
case(
    "a backchannel during a tool",
    ASK + says(3.2, "Okay.", 3.5),
    """
    1.4 commit What time is it?
    1.65 call search
    1.7 audio
    3.5 detect · pause 0.75
    3.8 dismiss backchannel Okay. · resume 0.75
    4.65 continue
    5.3 done 1
    user: What time is it?
    assistant: Let me look. | !search
    user: =done
    assistant: Well.
    """,
    replies=[Reply(["Let me look.", Tool("search", takes=3), "Well."])],
)
case(
    "a tool that takes too long has an error as its result",
    ASK,
    """
    1.4 commit What time is it?
    1.65 call search
    6.65 cancel tool · continue
    7.05 audio
    7.8 done 0.75
    user: What time is it?
    assistant: !search
    user: =timed out after 5 seconds
    assistant: I found nothing.
    """,
    replies=[Reply([Tool("search", takes=None), "I found nothing."])],
    options={"timing": Timing(tool=5)},
)
case(
    "a tool that ran is kept when the turn is extended, and not called again",
    says(0, "Book a flight.", 1) + says(3, "To Paris.", 3.8),
    """
    1.4 commit Book a flight.
    1.65 call search · call never
    3.8 cancel · extend Book a flight. + To Paris.
    4.2 commit Book a flight. To Paris.
    4.45 continue
    4.85 audio
    5.6 done 0.75
    user: Book a flight. To Paris.
    assistant: !search
    user: =done
    assistant: !search
    user: =done
    assistant: There are three.
    """,
    replies=[Reply([Tool("search"), Tool("never", takes=None), "Well."]), Reply([Tool("search"), "There are three."])],
)
case(
    "also when the turn is extended twice",
    says(0, "Book a flight.", 1) + says(3, "To Paris.", 3.8) + says(5, "Please.", 5.5),
    """
    1.4 commit Book a flight.
    1.65 call search
    2.15 continue
    3.8 cancel · extend Book a flight. + To Paris.
    4.2 commit Book a flight. To Paris.
    5.5 cancel · extend Book a flight. To Paris. + Please.
    5.9 commit Book a flight. To Paris. Please.
    6.15 continue
    6.55 audio
    7.3 done 0.75
    user: Book a flight. To Paris. Please.
    assistant: !search
    user: =done
    assistant: !search
    user: =done
    assistant: There are three.
    """,
    replies=[
        Reply([Tool("search"), "Well."], late=5),
        Reply(["Hm."], first=5),
        Reply([Tool("search"), "There are three."]),
    ],
)
case(
    "a tool with side effects waits for the end of grace",
    ASK,
    """
    1.4 commit What time is it?
    1.65 call look
    6.4 expired · call pay
    6.9 continue
    7.3 audio
    7.55 done 0.25
    user: What time is it?
    assistant: !pay | !look
    user: =done | =done
    assistant: Paid.
    """,
    show="expired",
    replies=[Reply([Tool("pay"), Tool("look"), "Paid."])],
    options={"side_effects": ["pay"]},
)
case(
    "and is not called when the turn is extended",
    says(0, "Pay ten.", 1) + says(3, "No, twenty.", 3.8),
    """
    1.4 commit Pay ten.
    3.8 cancel · extend Pay ten. + No, twenty.
    4.2 commit Pay ten. No, twenty.
    4.5 audio
    5 done 0.5
    user: Pay ten. No, twenty.
    assistant: Twenty then.
    """,
    replies=[Reply([Tool("pay"), "Paid."], first=0.2), Reply(["Twenty then."])],
    options={"side_effects": ["pay"]},
)
case(
    "while a tool takes its time an answer is not given up",
    ASK,
    """
    1.4 commit What time is it?
    1.65 call a
    10.65 continue
    11.05 audio
    11.3 done 0.25
    user: What time is it?
    assistant: !a
    user: =done
    assistant: Done.
    """,
    replies=[Reply([Tool("a", takes=9), "Done."])],
    options={"timing": Timing(stall=5)},
)
case(
    "and has no result before it is called",
    [*ASK, (3, ToolReturned("resp_2_pay0", "paid"))],
    """
    1.4 commit What time is it?
    3 refuse unknown_tool_call
    6.4 call pay
    6.9 continue
    7.3 audio
    7.55 done 0.25
    user: What time is it?
    assistant: !pay
    user: =done
    assistant: Paid.
    """,
    replies=[Reply([Tool("pay"), "Paid."])],
    options={"side_effects": ["pay"]},
)
case(
    "or interrupted",
    [*ASK, (3, InputInterrupt())],
    """
    1.4 commit What time is it?
    1.7 audio
    3 flush 0.75 · cancel · interrupt I will pay. < -
    user: What time is it?
    assistant: I will pay. | !pay
    user: =cancelled: the turn ended before it was called
    """,
    replies=[Reply(["I will pay.", Tool("pay"), "Paid."])],
    options={"side_effects": ["pay"]},
)
case(
    "a result that nobody waits for is refused",
    [*ASK, (3, ToolReturned("toolu_1", "x"))],
    """
    1.4 commit What time is it?
    1.7 audio
    2.95 done 1.25
    3 refuse unknown_tool_call
    user: What time is it?
    assistant: It is noon in Paris.
    """,
)
case(
    "a loop of tools ends",
    ASK,
    """
    1.4 commit What time is it?
    1.65 call a
    2.15 continue
    2.5 call b
    2.55 audio
    3 continue without tools
    3.65 done 0.5
    user: What time is it?
    assistant: !a
    user: =done
    assistant: One. | !b
    user: =done
    assistant: Two. | !c
    user: =no more tools are called in this turn
    """,
    replies=[Reply([Tool("a"), "One.", Tool("b"), "Two.", Tool("c"), "Three."])],
    options={"timing": Timing(tool_rounds=2)},
)
# -- Faults --

case(
    "the model fails before the answer",
    ASK,
    """
    1.4 commit What time is it? · state grace
    1.9 cancel · fail overloaded · state listening
    user: What time is it?
    """,
    show="state",
    replies=[Reply(fails=True, first=0.5)],
)
case(
    "the model fails in the middle of it",
    ASK,
    """
    1.4 commit What time is it?
    1.7 cancel · fail overloaded
    user: What time is it?
    """,
    replies=[Reply(STORY.steps, fails=True)],
)
case(
    "the model fails while it is held: it is asked again",
    ASK,
    """
    1.42 cancel
    1.6 commit What time is it?
    2 audio
    3.25 done 1.25
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    replies=[Reply(fails=True, first=0.02), Reply()],
    delay=0.3,
)
case(
    "after a failure the words are still there",
    ASK + says(4, "Hello?", 4.5),
    """
    1.4 commit What time is it?
    1.9 cancel · fail overloaded
    4.9 commit Hello?
    5.2 audio
    6.45 done 1.25
    user: What time is it? | Hello?
    assistant: It is noon in Paris.
    """,
    replies=[Reply(fails=True, first=0.5), Reply()],
)
case(
    "the speech service fails in mid-answer",
    [*ASK, (3, SpeechFailed("", GONE))],
    """
    1.4 commit What time is it?
    1.7 audio
    3 flush 1.30 · cancel · fail gone
    user: What time is it?
    assistant: Once upon a time there [interrupted]
    """,
    replies=[STORY],
)
case(
    "a murmur is no turn when an answer has failed, either",
    [*ASK, *says(3, "Okay.", 3.3), (4, SpeechFailed("", GONE))],
    """
    1.4 commit What time is it?
    1.7 audio
    4 flush 2.30 · cancel · fail gone
    user: What time is it?
    assistant: Once upon a time there was a king who [interrupted]
    """,
    replies=[STORY],
    config={"interrupt": {"mode": "never"}},
)
case(
    "the ear fails: words that wait for the end of an answer go on waiting",
    [*ASK, *says(3, "What about Rome?", 3.7), (4.5, STTFailed(GONE))],
    """
    1.4 commit What time is it?
    1.7 audio
    4.5 refuse None
    6.2 done 4.5
    6.3 commit What about Rome?
    6.6 audio
    7.85 done 1.25
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    user: What about Rome?
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
    config={"interrupt": {"mode": "never"}},
)
case(
    "the ear fails: what was said is committed",
    [*says(0, "I want to", 1)[:2], (1.2, STTFailed(GONE))],
    """
    1.2 refuse None · commit! I want to
    1.6 audio
    2.85 done 1.25
    user: I want to
    assistant: It is noon in Paris.
    """,
)
case(
    "the ear fails while it is being decided",
    [*ASK, *noise(3, 3.2), (3.55, STTFailed(GONE))],
    """
    1.7 commit What time is it?
    1.8 audio
    3.2 detect · pause 1.40
    3.55 refuse None
    3.6 dismiss no_speech · resume 1.40
    6.7 done 4.5
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    """,
    replies=[STORY],
    stt=None,
)
case(
    "a failure while it is being decided",
    [*ASK, *noise(3, 4), (3.4, RunFailed("", GONE))],
    """
    1.4 commit What time is it?
    1.7 audio
    3.2 detect · pause 1.50
    3.4 flush 1.50 · cancel · fail gone
    user: What time is it?
    assistant: Once upon a time there was [interrupted]
    """,
    replies=[STORY],
)
case(
    "the speech ends before the text",
    [*ASK, (2.0, SpeechEnded(""))],
    """
    1.4 commit What time is it?
    1.65 call a
    1.7 audio
    2.65 continue
    3.3 done 0.5
    user: What time is it?
    assistant: One. | !a
    user: =done
    assistant: Two.
    """,
    replies=[Reply(["One.", Tool("a", takes=1), "Two."])],
)
case(
    "the speech ends long before the model does",
    ASK,
    """
    1.4 commit What time is it? · state grace
    1.7 audio · state speaking
    4.6 done 1.25 · state listening
    user: What time is it?
    assistant: It is noon in Paris.
    """,
    show="state",
    replies=[Reply(ends=3)],
)
case(
    "interrupted while the model is still writing",
    [*ASK, (3, InputInterrupt())],
    """
    1.4 commit What time is it?
    1.7 audio
    3 flush 1.30 · cancel · interrupt Once upon a time there < -
    user: What time is it?
    assistant: Once upon a time there [interrupted]
    """,
    replies=[Reply(STORY.steps, ends=9)],
)
case(
    "an answer without words is over at once",
    ASK,
    """
    1.4 commit What time is it?
    1.7 done 0
    user: What time is it?
    """,
    replies=[Reply([])],
)
case(
    "an answer that never goes on is given up",
    ASK,
    """
    1.4 commit What time is it?
    11.4 cancel · fail the answer does not go on
    user: What time is it?
    """,
    replies=[Reply(first=50)],
    options={"timing": Timing(stall=10)},
)
case(
    "reports of a client do not keep alive what never goes on",
    [*ASK, *[(2 + n, Playback("", 0.0)) for n in range(30)]],
    """
    1.4 commit What time is it?
    11.4 cancel · fail the answer does not go on
    user: What time is it?
    """,
    replies=[Reply(first=50)],
    options={"timing": Timing(stall=10)},
)
case(
    "words of which no audio came were not heard",
    [*ASK, (1.71, SpeechEnded("")), (1.9, InputInterrupt())],
    """
    1.4 commit What time is it?
    1.65 call a
    1.9 cancel · interrupt - < -
    10.65 refuse unknown_tool_call
    user: What time is it?
    assistant: !a
    user: =cancelled: the turn ended before it was done
    """,
    replies=[Reply(["One.", Tool("a", takes=9), "Two."], late=5)],
)
case(
    "the ear fails after um: that is no turn",
    [(0.5, Transcript("Um", False)), (1, STTFailed(GONE)), (1.2, InputCommit())],
    """
    1 refuse None
    1.3 commit Um
    1.7 audio
    2.95 done 1.25
    user: Um
    assistant: It is noon in Paris.
    """,
)
case(
    "late events of an answer that is over mean nothing",
    [
        *ASK,
        (3, InputInterrupt()),
        (3.1, AudioMade("resp_2", 1)),
        (3.2, AudioSent("resp_2", 1)),
        (3.3, RunFailed("resp_2", GONE)),
        (3.4, Playback("resp_2", 3)),
    ],
    """
    1.4 commit What time is it?
    1.7 audio
    3 flush 1.30 · cancel · interrupt Once upon a time there < -
    user: What time is it?
    assistant: Once upon a time there [interrupted]
    """,
    replies=[STORY],
)
# -- Text and images --

case(
    "typed text is a turn",
    [(1, InputText("Hello."))],
    """
    1 commit Hello.
    1.4 audio
    2.65 done 1.25
    user: Hello.
    assistant: It is noon in Paris.
    """,
)
case(
    "empty text is refused",
    [(1, InputText(" "))],
    """
    1 refuse nothing_to_commit
    """,
)
case(
    "an image waits for the words that belong to it",
    [(0.2, InputContent([IMAGE])), *says(1, "What is this?", 2)],
    """
    2.4 commit What is this?
    2.7 audio
    3.95 done 1.25
    user: #image | What is this?
    assistant: It is noon in Paris.
    """,
)
case(
    "blank text is no text",
    [
        (0.2, InputContent([IMAGE, {"type": "text", "text": " "}])),
        (0.3, InputContent([{"type": "text", "text": ""}])),
        *says(1, "What is this?", 2),
    ],
    """
    0.3 refuse nothing_to_commit
    2.4 commit What is this?
    2.7 audio
    3.95 done 1.25
    user: #image | What is this?
    assistant: It is noon in Paris.
    """,
)
case(
    "an image with text is a turn",
    [(1, InputContent([IMAGE, {"type": "text", "text": "What is this?"}]))],
    """
    1 commit What is this?
    1.4 audio
    2.65 done 1.25
    user: #image | What is this?
    assistant: It is noon in Paris.
    """,
)
case(
    "typed text makes another turn of one whose answer has begun",
    [*ASK, (1.35, InputText("In Rome."))],
    """
    1.3 run held
    1.35 cancel · commit What time is it? In Rome. · run
    1.75 audio
    3 done 1.25
    user: What time is it? | In Rome.
    assistant: It is noon in Paris.
    """,
    show="run release",
)
case(
    "typed text ends the turn that is being spoken",
    [*says(0, "I want to", 1)[:2], (1.1, InputText("fly to Rome"))],
    """
    1.1 commit I want to fly to Rome
    1.5 audio
    2.75 done 1.25
    user: I want to | fly to Rome
    assistant: It is noon in Paris.
    """,
)
case(
    "typed text that was taken back for words that are none is a turn all the same",
    [(1, InputText("Hello.")), (1.3, Transcript("so", False)), (1.6, Transcript("", True))],
    """
    1 commit Hello.
    1.3 cancel · extend Hello. + so
    1.7 commit Hello.
    2 audio
    3.25 done 1.25
    user: Hello.
    assistant: It is noon in Paris.
    """,
    replies=[Reply(first=5)],
)
case(
    "an echo of the answer that typed text has interrupted is no part of it",
    [*ASK, (3, InputText("And in Rome?")), (3.3, Transcript("upon a time there", True))],
    """
    1.4 commit What time is it?
    1.7 audio
    3 flush 1.30 · cancel · interrupt Once upon a time there < - · commit And in Rome?
    4 audio
    5.25 done 1.25
    user: What time is it?
    assistant: Once upon a time there [interrupted]
    user: And in Rome?
    assistant: It is noon in Paris.
    """,
    replies=[STORY, Reply(first=0.9)],
)
case(
    "an image within grace stands where it came",
    [*ASK, (1.6, InputContent([IMAGE])), *says(2, "And in Rome?", 2.5)],
    """
    1.4 commit What time is it?
    2.5 cancel · extend What time is it? + And in Rome?
    2.9 commit What time is it? And in Rome?
    3.2 audio
    4.45 done 1.25
    user: What time is it? | #image | And in Rome?
    assistant: It is noon in Paris.
    """,
    replies=[Reply(first=5)],
)
case(
    "an image while the answer is spoken waits for the next turn",
    [*ASK, (3, InputContent([IMAGE])), *says(8, "What is this?", 9)],
    """
    1.4 commit What time is it?
    1.7 audio
    6.2 done 4.5
    9.4 commit What is this?
    9.7 audio
    10.95 done 1.25
    user: What time is it?
    assistant: Once upon a time there was a king who had three sons and one day he called them.
    user: #image | What is this?
    assistant: It is noon in Paris.
    """,
    replies=[STORY],
)


@pytest.mark.parametrize("name", CASES)
def test_conversation(name: str) -> None:
    """A scripted conversation goes as its table says, and keeps the rules."""
    case = CASES[name]
    room = Room(**case.room)
    room.play([(at, copy(event)) for at, event in case.script])
    assert "\n".join([*room.told(*case.show.split()), *brief(room.turns.messages)]) == case.table


BEGINNINGS = [round(1.8 + n / 4, 2) for n in range(17)]  # from the beginning of the story to its end


@pytest.mark.parametrize("grace", [True, False])
@pytest.mark.parametrize("text", ["", "Okay.", "Mm-hmm, yeah.", "once upon a time", "Honey, where are the keys?"])
@pytest.mark.parametrize("start", BEGINNINGS)
def test_what_is_not_meant_changes_nothing(start: float, text: str, grace: bool) -> None:
    """At no point of an answer does a cough, a murmur, an echo of it or a word to somebody else change it."""
    room = Room([STORY], interrupts={text: False}, config={"grace_period": {"enabled": grace}})
    over = says(start, text, start + 0.5) if text else noise(start, start + 0.5)
    room.play([(at, copy(event)) for at, event in [*ASK, *over]])
    assert brief(room.turns.messages) == ["user: What time is it?", f"assistant: {STORY.steps[0]}"]


@pytest.mark.parametrize("text", ["Stop.", "Okay, wait.", "What about Rome?"])
@pytest.mark.parametrize("start", BEGINNINGS)
def test_what_is_meant_interrupts(start: float, text: str) -> None:
    """At each point of an answer; and what was heard of it until then is what history holds."""
    room = Room([STORY])
    room.play([(at, copy(event)) for at, event in [*ASK, *says(start, text, start + 0.5)]])
    paused = next(action.position for _, action in room.log if isinstance(action, PauseAudio))
    heard = STORY.steps[0].split()[: int((paused - 0.2) / PACE + 1 + 1e-6)]
    partly = [f"assistant: {' '.join(heard)} [interrupted]"] * bool(heard)
    assert start + 0.2 - 1.7 <= paused + 1e-6 <= start + 0.3 - 1.7
    assert brief(room.turns.messages)[: 1 + len(partly)] == ["user: What time is it?", *partly]
    assert brief(room.turns.messages)[1 + len(partly) :] == [f"user: {text}", "assistant: It is noon in Paris."]


def test_metrics_tell_what_the_user_waited_for() -> None:
    """The times of a turn are the clock's: end of speech, final transcript, decision, first token, first audio."""
    room = Room(replies=[Reply(first=2.0), STORY])
    room.play([(at, copy(event)) for at, event in [*says(0, "Book a flight.", 1), *says(2, "To Paris.", 2.8)]])
    metrics = [action for _, action in room.log if isinstance(action, TurnMetrics)]
    times = [pytest.approx(time) for time in (2.8, 3.2, 3.2, 3.4, 3.5)]
    assert metrics == [TurnMetrics(metrics[0].turn_id, *times, cancelled_runs=1)]


def test_metrics_of_what_was_typed() -> None:
    """There was no speech that could have ended, and no transcript; an answer that was not heard has no audio."""
    room = Room([Reply(first=2)])
    room.play([(1, SpeechStarted()), (1.5, SpeechStopped()), (9, InputText("Hello.")), (10, InputInterrupt())])
    metrics = [action for _, action in room.log if isinstance(action, TurnMetrics)]
    assert metrics == [TurnMetrics(metrics[0].turn_id, decision=9)]


def test_a_frame_of_audio_costs_nothing() -> None:
    """Fifty frames a second do not make the turn taker think."""
    turns = TurnTaker()
    assert [turns.handle(n / 50, AudioReceived()) for n in range(500)] == [[]] * 500


def test_what_was_said_before_the_session_is_history() -> None:
    """The configured messages come first, and are never changed."""
    before = [{"role": "user", "content": "Hi."}]
    turns = TurnTaker(history=before)
    start = next(action for action in turns.handle(0, InputText("Hello.")) if isinstance(action, StartRun))
    assert brief(start.messages) == ["user: Hi. | Hello."]
    assert before == [{"role": "user", "content": "Hi."}]


# == Any order =========================================================================================================

HEARD = ["word", "word", "okay", "stop", "um", "word and", "one two three", "no problem", "555 word"]
DELAYS = [*(0.0, 0.0, 0.0, 0.05, 0.05, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0, 1.0, 2.0, 2.5, 6.0), 40.0]
OPERATIONS = [
    *("utterance", "utterance", "question", "question", "question", "answer", "answer", "answer", "answer"),
    *("barge-in", "barge-in", "barge-in", "speech", "silence", "silence", "interim", "interim", "final", "flushed"),
    *("turn start", "eager end", "resume", "turn end", "yes", "no", "dunno"),
    *("commit", "interrupt", "interrupt with words", "text", "image", "image with text", "playback"),
    *("token", "step", "tools", "two tools", "pause_turn", "failed", "returned", "tool failed", "said", "timed"),
    *("made", "sent", "sent", "spoken", "speech failed", "frame", "frame", "ear failed", "tick", "eternity"),
]


class Chaos:
    """Everything at any time: the services are consistent in themselves, and in no order with each other."""

    def __init__(self, turns: TurnTaker) -> None:
        self.turns = turns
        self.rules = Rules(turns)
        self.now = 0.0
        self.numbers = itertools.count(1)
        self.utterance = ""  # what the speech service has not made final yet
        self.runs = ["resp_0"]
        self.calls = ["toolu_0"]
        self.questions = [0]
        self.said: list[str] = []
        self.dismissed = ""

    def feed(self, *events: Event) -> None:
        for event in events:
            if isinstance(event, AudioSent) and (event.response_id, "on") != (self.rules.run, self.rules.audio):
                continue
            actions = self.turns.handle(self.now, event)
            self.rules.check(self.now, event, actions)
            for action in actions:
                if isinstance(action, StartRun):
                    self.runs.append(action.response_id)
                elif isinstance(action, CallTool):
                    self.calls.append(action.id)
                elif isinstance(action, (CheckTurn, CheckInterrupt)):
                    self.questions.append(action.check_id)
                elif isinstance(action, InterruptDismissed):
                    self.dismissed += f" {action.transcript}"

    def wait(self, seconds: float) -> None:
        """Time passes; what is due on the way is done."""
        until = self.now + seconds
        while self.turns.deadline is not None and self.turns.deadline <= until:
            self.now = self.turns.deadline
            self.feed(Tick())
        self.now = until

    def say(self, kind: str) -> None:
        self.utterance += f" {kind.replace('word', self.word()) if 'word' in kind else kind}"

    def word(self) -> str:
        """One that nobody has said before."""
        self.said.append(f"w{next(self.numbers)}")
        return self.said[-1]

    def end_utterance(self) -> list[Event]:
        final, self.utterance = self.utterance, ""
        return [Transcript(final, True)] if final else []

    def tools(self, count: int) -> list[JSON]:
        ids = [f"toolu_{next(self.numbers)}" for _ in range(count)]
        return [{"type": "tool_use", "id": use, "name": "ab"[n], "input": {}} for n, use in enumerate(ids)]

    def act(self, operation: str, which: int, kind: str) -> None:
        current = self.rules.run or self.rules.held or self.runs[-1]
        run = current if which > 1 else self.runs[-1 - which % len(self.runs)]
        error = ProviderError("broken", provider="openai")
        text = block("one two three four")
        match operation:
            case "utterance":
                self.say(kind)
                self.feed(SpeechStarted(0.06), Transcript(self.utterance, False), SpeechStopped(0.3))
                self.feed(*self.end_utterance(), Flushed())
            case "question":
                self.act("utterance", which, kind)
                self.wait(0.7)
                self.act("yes", 0, kind)
                self.act("commit", which, kind) if which % 3 else self.wait(3)
            case "answer":
                self.feed(FirstToken(run), Said(run, "one two three four "), AudioMade(run, 2), AudioSent(run, 1))
                times = tuple(Word(word, n / 2, n / 2 + 0.4) for n, word in enumerate(text["text"].split()))
                self.feed(Timed(run, times), AudioSent(run, 1), StepEnded(run, [text]), SpeechEnded(run))
            case "barge-in":
                self.feed(SpeechStarted(0.06))
                self.wait(0.2)
                self.say(kind)
                self.feed(Transcript(self.utterance, False))
            case "speech":
                self.feed(SpeechStarted(0.06))
            case "silence":
                self.feed(SpeechStopped(0.3))
            case "interim":
                self.say(kind)
                self.feed(Transcript(self.utterance, False))
            case "final":
                self.feed(*self.end_utterance())
            case "flushed":
                self.feed(*self.end_utterance(), Flushed())
            case "turn start":
                self.feed(TurnStarted())
            case "eager end":
                self.feed(TurnEagerEnd(self.utterance))
            case "resume":
                self.feed(TurnResumed())
            case "turn end":
                final = self.utterance
                self.feed(*self.end_utterance(), TurnEnded(final))
            case "yes" | "no" | "dunno":
                answer = {"yes": True, "no": False, "dunno": None}[operation]
                question = self.questions[-1 - which % len(self.questions)]
                self.feed(TurnChecked(question, answer), InterruptChecked(question, answer))
            case "commit":
                self.feed(InputCommit())
            case "interrupt":
                self.feed(InputInterrupt())
            case "interrupt with words":
                self.feed(InputInterrupt(self.word()))
            case "text":
                self.feed(InputText(self.word()))
            case "image":
                self.feed(InputContent([IMAGE]))
            case "image with text":
                self.feed(InputContent([IMAGE, {"type": "text", "text": self.word()}]))
            case "playback":
                self.feed(Playback(run, which / 4))
            case "token":
                self.feed(FirstToken(run))
            case "step":
                self.feed(StepEnded(run, [text]))
            case "tools":
                self.feed(StepEnded(run, [text, *self.tools(1)], "tool_use"))
            case "two tools":
                self.feed(StepEnded(run, [THINKING, *self.tools(2)], "tool_use"))
            case "pause_turn":
                self.feed(StepEnded(run, [text], "pause_turn"))
            case "failed":
                self.feed(RunFailed(run, error))
            case "returned" | "tool failed":
                call = self.calls[-1 - which % min(3, len(self.calls))]
                self.feed(ToolReturned(call, "result", operation == "tool failed"))
            case "said":
                self.feed(Said(run, "one two three four "))
            case "timed":
                self.feed(Timed(run, (Word("one", 0, 0.2), Word("two", 0.3, 0.5))))
            case "made":
                self.feed(AudioMade(run, 0.5))
            case "sent":
                self.feed(AudioSent(run, 0.5))
            case "spoken":
                self.feed(SpeechEnded(run))
            case "speech failed":
                self.feed(SpeechFailed(run, error))
            case "frame":
                self.feed(AudioReceived())
            case "ear failed":
                self.feed(*self.end_utterance(), STTFailed(error))
            case "eternity":
                self.wait(1000)
            case _:
                self.feed(Tick())

    def rest(self) -> None:
        """The user falls silent, and nothing more comes: no answer that was begun gets anywhere."""
        self.feed(SpeechStopped(), *self.end_utterance(), Flushed())
        self.wait(3600)
        assert self.turns.state is State.LISTENING, "stuck"
        self.feed(InputCommit())  # of what was said where nobody but the user ends a turn
        self.wait(3600)
        assert self.turns.state is State.LISTENING, "stuck"


SETTINGS = st.fixed_dictionaries(
    {
        "input": st.fixed_dictionaries({"turn_detection": st.sampled_from(["auto", "stt", "vad", "manual"])}),
        "grace_period": st.fixed_dictionaries(
            {"enabled": st.booleans(), "duration_ms": st.sampled_from([0, 300, 5000, 5000, 60_000])}
        ),
        "interrupt": st.fixed_dictionaries(
            {
                "mode": st.sampled_from(["auto", "auto", "always", "never"]),
                "save_partial": st.sampled_from(["none", "marked", "full"]),
                "semantic_check": st.sampled_from([True, True, False]),
                "capture_duration_ms": st.sampled_from([0, 600, 600, 10_000]),
            }
        ),
        "vad": st.fixed_dictionaries(
            {
                "semantic_check": st.sampled_from([True, True, False]),
                "silence_duration_ms": st.sampled_from([0, 600, 600, 600, 10_000]),
                "max_silence_ms": st.sampled_from([0, 3000, 3000]),
                "min_words_for_check": st.sampled_from([0, 1, 3]),
            }
        ),
    }
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    script=st.lists(
        st.tuples(st.sampled_from(DELAYS), st.sampled_from(OPERATIONS), st.integers(0, 12), st.sampled_from(HEARD)),
        min_size=12,
        max_size=60,
    ),
    config=SETTINGS,
    stt_turns=st.booleans(),
    side_effects=st.sampled_from(["", "a", "ab"]),
)
def test_any_order_of_events_keeps_the_rules(
    script: list[tuple[float, str, int, str]], config: JSON, stt_turns: bool, side_effects: str
) -> None:
    """Whatever comes when: the rules hold, no state is stuck, and each word is in exactly one turn."""
    turns = TurnTaker(LiveVoice.model_validate(config), stt_turns=stt_turns, side_effects=side_effects)
    chaos = Chaos(turns)
    for delay, operation, which, kind in script:
        chaos.wait(delay)
        chaos.act(operation, which, kind)
    chaos.rest()
    asked = words_of("user", turns.messages)
    assert asked == words(" ".join(chaos.rules.committed)), "history is not what was committed"
    assert len(numbered(asked)) == len(set(numbered(asked))), "a word in two turns"
    assert {*chaos.said} <= {*asked, *words(chaos.dismissed)}, "a word was lost"
    parse_request({"model": "openai/any", "messages": [*turns.messages, {"role": "user", "content": "."}]})


def words_of(role: str, messages: list[JSON]) -> list[str]:
    """All that the user or the assistant says in a history."""
    contents = [message["content"] for message in messages if message["role"] == role]
    blocks = [[block(content)] if isinstance(content, str) else content for content in contents]
    texts = [one["text"].removesuffix("[interrupted]") for one in itertools.chain(*blocks) if one["type"] == "text"]
    return [word for text in texts for word in words(text)]


def numbered(said: list[str]) -> list[str]:
    return [word for word in said if word[0] == "w" and word[1:].isdigit()]


class Talk(Room):
    """A room whose speech service says again what is not final yet, with what is new."""

    def perform(self, action: Action) -> None:
        if isinstance(action, FinalizeSTT):
            self.soon(self.stt or 0.0, Flushed())
        else:
            super().perform(action)

    def feed(self, event: Event) -> None:
        match event:
            case Transcript(text, False):
                event = Transcript(f"{self.interim} {text}".strip(), False)
            case Transcript(text, True):
                event = Transcript(self.interim, True)
            case Flushed() if self.interim:
                super().feed(Transcript(self.interim, True))
            case _:
                pass
        super().feed(event)


class Fickle(dict[str, bool | None]):
    """A fast model that answers this and that, whatever it is asked."""

    def __init__(self, answers: Sequence[bool | None]) -> None:
        super().__init__()
        self.answers = itertools.cycle(answers)

    def get(self, asked: str, default: object = None) -> bool | None:  # type: ignore[override]
        return next(self.answers)


LONG = Reply(["Let me look.", Tool("a", takes=2), *STORY.steps, Tool("b", takes=None), "Nothing."])
REPLIES = [
    *(Reply(), STORY, STORY, LONG, LONG, Reply([]), Reply(["Wait.", Tool("a"), Tool("b"), "So?"])),
    *(Reply(STORY.steps, first=2.5, late=0.6), Reply(STORY.steps, first=7), Reply(STORY.steps, timed=False)),
    *(Reply(fails=True, first=1), Reply(STORY.steps, ends=3)),
]
DEEDS = ["says", "says", "says", "says", "says", "noise", "text", "interrupt", "commit", "image", "report", "fail"]
REMARKS = ["{}", "{}", "{}", "what about {}?", "{} and", "No, {}.", "Okay.", "Stop.", "Um", "upon a time there"]


def spoken_script(deeds: list[tuple[float, str, str, float]], stt_turns: bool) -> tuple[Script, list[str]]:
    """What a user does one after the other, and the words that are there only once."""
    script: Script = []
    at, numbers, said = 0.5, itertools.count(1), []
    for gap, deed, remark, length in deeds:
        at += gap
        text = remark.format(f"w{next(numbers)}")
        if deed in ("says", "text"):
            said += numbered(words(text))
        match deed:
            case "says":
                script += streamed(at, text, at + length) if stt_turns else says(at, text, at + length)
            case "noise":
                script += noise(at, at + length)
            case "text":
                script.append((at, InputText(text)))
            case "interrupt":
                script.append((at, InputInterrupt()))
            case "commit":
                script.append((at, InputCommit()))
            case "image":
                script.append((at, InputContent([IMAGE])))
            case "report":
                script.append((at, Playback("", length)))
            case _:
                script.append((at, SpeechFailed("", GONE)))
        at += length
    return [*script, (at + 900, InputCommit())], said


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    deeds=st.lists(
        st.tuples(
            st.sampled_from([0.05, 0.2, 0.45, 0.7, 1.1, 1.6, 2.5, 5.2, 9.0]),
            st.sampled_from(DEEDS),
            st.sampled_from(REMARKS),
            st.sampled_from([0.15, 0.4, 0.8, 1.5, 4.0]),
        ),
        min_size=6,
        max_size=16,
    ),
    replies=st.lists(st.sampled_from(REPLIES), min_size=1, max_size=6),
    checks=st.lists(st.sampled_from([True, True, False, None]), min_size=1, max_size=5),
    delay=st.sampled_from([0.05, 0.1, 0.35, 1.0, None]),
    stt=st.sampled_from([0.05, 0.1, 0.3, 0.9]),
    config=SETTINGS,
    stt_turns=st.booleans(),
    side_effects=st.sampled_from(["", "a", "ab"]),
)
def test_any_conversation_keeps_the_rules(
    deeds: list[tuple[float, str, str, float]],
    replies: list[Reply],
    checks: list[bool | None],
    delay: float | None,
    stt: float,
    config: JSON,
    stt_turns: bool,
    side_effects: str,
) -> None:
    """Where the services do what they should, however slowly: every word that was said is in one turn or was told to be
    dismissed, and of each answer history holds what was heard."""
    options = {"stt_turns": stt_turns, "side_effects": side_effects}
    fickle = Fickle(checks)
    room = Talk([*replies, *replies], fickle, fickle, delay, stt, config, options)
    script, said = spoken_script(deeds, stt_turns)
    room.play(script, until=script[-1][0] + 900)
    assert room.turns.state is State.LISTENING, "stuck"
    asked = words_of("user", room.turns.messages)
    assert asked == words(" ".join(room.rules.committed)), "history is not what was committed"
    assert len(numbered(asked)) == len(set(numbered(asked))), "a word in two turns"
    dismissed = [word for _, one in room.log if isinstance(one, InterruptDismissed) for word in words(one.transcript)]
    assert {*said} <= {*asked, *dismissed}, "a word was lost"
    heard = [word for _, one in room.log for word in words(room.heard(one))]
    if config["interrupt"]["save_partial"] != "none" and not any(isinstance(one, TurnFailed) for _, one in room.log):
        assert words_of("assistant", room.turns.messages) == heard, "history is not what was heard"


# == Heard text ========================================================================================================


def spoken(*words: str, seconds: float = 0.25) -> Ledger:
    """An answer of a word each quarter of a second, all sent at 0."""
    ledger = Ledger()
    ledger.say(" ".join(words))
    ledger.time([Word(word, n * seconds, n * seconds + 0.2) for n, word in enumerate(words)])
    ledger.make(len(words) * seconds)
    ledger.send(0.0, len(words) * seconds)
    return ledger


def test_words_are_heard_when_they_end() -> None:
    """A word counts once its end has been heard."""
    ledger = spoken("Hello", "there,", "you.")
    assert [ledger.heard(time) for time in (0.0, 0.19, 0.2, 0.46)] == ["", "", "Hello", "Hello there,"]
    assert ledger.heard(0.8) == "Hello there, you."


def test_a_pause_stands_still() -> None:
    """Nothing is heard while paused, and nothing is skipped."""
    ledger = spoken("Hello", "there,", "you.")
    ledger.pause(0.3)
    assert (ledger.position(5), ledger.heard_at(5, 1)) == (0.3, None)
    ledger.resume(5)
    assert (round(ledger.position(5.2), 6), ledger.heard_at(5.2, 1)) == (0.5, pytest.approx(5.45))


def test_nothing_is_heard_before_it_is_sent() -> None:
    """Where audio was missing for a while, the clock waits for it."""
    ledger = Ledger()
    ledger.make(2)
    ledger.send(1.0, 0.5)
    assert (ledger.position(3), ledger.heard_at(3, 1)) == (0.5, None)
    ledger.send(3.0, 1.5)
    assert (ledger.position(3.5), ledger.heard_at(3.5, 1)) == (1.0, 4.5)
    assert ledger.heard_at(9, 1) == 4.5


@pytest.mark.parametrize(
    ("reports", "at", "position"),
    [
        ([], 1.0, 1.0),
        ([(0.5, 0.2)], 1.0, 0.2),
        ([(0.5, 3.0)], 1.0, 1.0),
        ([(0.5, 0.4), (0.6, 0.1)], 1.0, 0.4),
        ([(0.5, -1.0)], 1.0, 0.0),
        ([(0.1, 99.0)], 99.0, 2.0),
    ],
)
def test_a_position_is_the_smaller_one(reports: list[tuple[float, float]], at: float, position: float) -> None:
    """What the client reports counts as far as real time and what was sent allow; it never goes back."""
    ledger = spoken(*["la"] * 8)
    for time, played in reports:
        ledger.report(time, played)
    assert ledger.position(at) == pytest.approx(position)


@pytest.mark.parametrize(
    ("text", "complete", "at", "heard"),
    [
        ("one two three four", True, 0.0, ""),
        ("one two three four", True, 1.0, "one two"),
        ("one two three four", True, 2.0, "one two three four"),
        ("one two three four", False, 0.5, "one"),
        (" ".join(["la"] * 20), False, 1.0, "la la la la la"),
        ("今日は天気がいい", True, 1.0, "今日は天"),
    ],
)
def test_without_word_times_a_share_is_heard(text: str, complete: bool, at: float, heard: str) -> None:
    """The share of the audio is the share of the text, in whole words."""
    ledger = Ledger()
    ledger.say(text)
    ledger.make(2)
    ledger.send(0, 2)
    ledger.complete = complete
    assert ledger.heard(at) == heard


def test_words_whose_times_have_not_come_are_not_heard() -> None:
    """Where the speech service gives times, what has none yet was not spoken yet."""
    ledger = spoken("Hello", "there.")
    ledger.say(" How are you?")
    assert ledger.heard(0.5) == "Hello there."


THINKING: JSON = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}
USE: JSON = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}
RESULT: JSON = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "There."}


def block(text: str) -> JSON:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("heard", "save", "kept"),
    [
        (None, "marked", [[THINKING, block("*Let* me look."), USE], [RESULT], [THINKING, block("It is **there**.")]]),
        (25, "marked", [[THINKING, block("*Let* me look."), USE], [RESULT], [THINKING, block("It is **there**.")]]),
        (19, "marked", [[THINKING, block("*Let* me look."), USE], [RESULT], [block("It is [interrupted]")]]),
        (19, "full", [[THINKING, block("*Let* me look."), USE], [RESULT], [block("It is")]]),
        (19, "none", [[THINKING, block("*Let* me look."), USE], [RESULT]]),
        (12, "marked", [[THINKING, block("*Let* me look."), USE], [RESULT]]),
        (6, "marked", [[THINKING, block("Let me [interrupted]"), USE], [RESULT]]),
        (0, "marked", [[THINKING, USE], [RESULT]]),
    ],
)
def test_what_stays_of_an_answer(heard: int | None, save: str, kept: list[list[JSON]]) -> None:
    """What was heard to its end stays as it was written, what was cut off as it was spoken; tool calls always stay, and
    thinking with them."""
    said = "Let me look. It is there."
    call = Call("toolu_1", "look", {}, called=True, result=RESULT, ran=True)
    steps = [Step([THINKING, block("*Let* me look."), USE], 13, [call])]
    steps += [Step([THINKING, block("It is **there**.")], 25, [])]
    answer = answer_messages(steps, said, heard, save)
    assert [content for _, content in answer] == kept
    assert [role for role, _ in answer] == ["assistant", "user", "assistant"][: len(kept)]


PICTURE: JSON = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
EARLIER: list[JSON] = [
    {"role": "user", "content": [PICTURE, block("And this?")]},
    {"role": "assistant", "content": [block("A dot.")]},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": [block("Welcome.")]},
]


def refused(turns: TurnTaker, error: Error, *parts: JSON) -> str:
    """What is told of a turn that the model refuses."""
    (run,) = [one for one in turns.handle(1, InputContent(list(parts))) if isinstance(one, StartRun)]
    (told,) = [one for one in turns.handle(1, RunFailed(run.response_id, error)) if isinstance(one, TurnFailed)]
    return told.error.message


def test_a_request_that_is_refused_is_not_made_again() -> None:
    """What is no text leaves the turn, then the history, and then its older half leaves; the roles alternate."""
    turns = TurnTaker(history=EARLIER)
    fault = InvalidRequestError("no pictures, and it is too long")
    assert "in this turn" in refused(turns, fault, PICTURE, block("What is it?"))
    left_out = block("[left out: image]")
    assert turns.messages == [*EARLIER, {"role": "user", "content": [left_out, block("What is it?")]}]
    assert "earlier turns" in refused(turns, fault, block("Well?"))
    assert turns.messages[0]["content"] == [left_out, block("And this?")]
    assert "older half" in refused(turns, fault, block("Hm."))
    assert turns.messages[0] == EARLIER[2]
    assert turns.messages[-1]["content"] == [left_out, *map(block, ("What is it?", "Well?", "Hm."))]
    valid(turns.messages, is_open=True)
    assert refused(turns, ProviderError("broken"), PICTURE, block("And?")) == "broken"
    assert PICTURE in turns.messages[-1]["content"]


def test_a_result_that_is_refused_is_not_shown_again() -> None:
    turns = TurnTaker()
    (run,) = [one for one in turns.handle(0, InputText("Look.")) if isinstance(one, StartRun)]
    use = {"type": "tool_use", "id": "1", "name": "look", "input": {}}
    turns.handle(0, StepEnded(run.response_id, [use], "tool_use"))
    turns.handle(0, ToolReturned("1", [PICTURE, block("a dot")]))
    turns.handle(0, RunFailed(run.response_id, InvalidRequestError("no pictures")))
    result = {"type": "tool_result", "tool_use_id": "1", "content": [block("[left out: image]"), block("a dot")]}
    assert turns.messages[-1] == {"role": "user", "content": [result]}


def test_speech_that_is_resumed_tells_its_words_anew() -> None:
    ledger = spoken("the", "cat", "saw", "the", "dog")
    ledger.time([Word("saw", 0.6, 0.8), Word("the", 0.85, 1.05), Word("dog", 1.1, 1.2)])
    assert [ledger.heard(at) for at in (0.75, 0.82, 1.0, 1.1)] == ["the cat", *["the cat saw"] * 2, "the cat saw the"]


@given(st.lists(st.tuples(st.sampled_from(["send", "pause", "resume", "report"]), st.floats(0, 3)), max_size=30))
def test_a_position_never_goes_back(operations: list[tuple[str, float]]) -> None:
    """Whatever is sent, paused and reported: 0 ≤ position ≤ sent, and it only grows but for a first, lower report."""
    ledger, now, before, reported = Ledger(), 0.0, 0.0, False
    for operation, value in operations:
        now += value
        if operation == "send":
            ledger.make(value)
            ledger.send(now, value)
        elif operation == "report":
            ledger.report(now, value)
        else:
            getattr(ledger, operation)(now)
        position = ledger.position(now)
        assert 0 <= position <= ledger.sent
        assert position >= before - 1e-9 or (operation == "report" and not reported)
        before, reported = position, reported or operation == "report"


@pytest.mark.parametrize(
    ("heard", "left"),
    [
        ([("Book a flight", False), "take", ("Book a flight to Paris.", True)], "to Paris."),
        ([("Book a flight", False), "take", ("Book a flight.", True)], ""),
        ([("Book a flight too", False), "take", ("Book a flight to Paris.", True)], "Paris."),
        ([("Hello.", True), "part", ("Hello again.", True)], "Hello. Hello again."),
        ([("Hel", True), ("lo.", True)], "Hello."),
        ([("Yeah", False), "dismiss", ("Yeah", True)], ""),
        ([("Book a flight", False), "take", "part", ("And a hotel", False)], "And a hotel"),
        ([("Yeah", False), "dismiss", ("Yeah but no", False)], "Yeah but no"),
        ([("Yeah.", True), "dismiss", ("What?", True)], "What?"),
        ([("Yeah", False), "dismiss", ("Yeah.", True), ("What?", True)], "What?"),
        ([("今日", False), "take", ("今日は天気", True)], "は天気"),
        ([("...", False)], ""),
    ],
)
def test_no_word_is_taken_twice(heard: list[Any], left: str) -> None:
    """Interim transcripts grow and are revised; what was taken of them stays taken, what was dismissed may grow."""
    user = UserWords()
    for one in heard:
        if isinstance(one, tuple):
            user.add(*one)
        else:
            getattr(user, one)()
    assert user.fresh == left


# == Classifiers =======================================================================================================


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yeahhh, YEAH!", ["yeah", "yeah"]),
        ("Uh-huh.", ["uh", "huh"]),
        ("I don’t know", ["i", "dont", "know"]),
        ("ठीक है।", ["ठीक", "है"]),
        ("1000 times", ["1000", "times"]),
        ("「はい」", ["は", "い"]),
        ("İptal", ["iptal"]),
        ("می‌خواهم", ["میخواهم"]),
        ("ＯＫ！", ["ok"]),
        ("…!?", []),
    ],
)
def test_words(text: str, said: list[str]) -> None:
    """Case, punctuation and drawn-out letters make no difference."""
    assert words(text) == said


@pytest.mark.parametrize(
    ("language", "texts"),
    [
        ("en", "Yeah, yeah.|Uh-huh.|Mmm-hmmm|Okay.|I see.|Right, right|Oh wow, that's right.|Got it!|No problem."),
        ("en-US", "No, keep going.|Don't stop!|Yeah, don’t stop|Please go on|OK OK OK OK OK OK"),
        ("de", "Ja, ja.|Genau!|Ach so.|Mhm|Alles klar, verstehe|Nein, mach weiter|Hör nicht auf"),
        ("es", "Sí, sí.|Claro que sí|Vale, vale|Ajá|No pares"),
        ("fr", "Oui oui.|D'accord.|Ah bon?|Je vois, très bien|N'arrête pas !"),
        ("hi", "हाँ हाँ|अच्छा, ठीक है।|जी हाँ|Haan ji|accha|मत रुको"),
        ("it", "Sì, sì.|Va bene|D'accordo, continua"),
        ("pt_BR", "Sim, claro.|Tá bom|Não pare"),
        ("ar", "نعم، نعم.|حسنًا|تمام، طيب|لا تتوقف"),
        ("bn", "হ্যাঁ, ঠিক আছে।|আচ্ছা"),
        ("ja", "はい、はい。|なるほど|うん、そうですね|止めないで"),
        ("ko", "네, 네.|그렇군요|응 알겠어"),
        ("nl", "Ja, precies.|Oké|Nee, ga door"),
        ("pl", "Tak, tak.|Dobrze, rozumiem"),
        ("ru", "Да, да.|Хорошо, понятно|Нет проблем"),
        ("ta", "சரி, சரி.|ஆமாம்"),
        ("te", "అవును, సరే."),
        ("tr", "Evet, tamam.|Devam et"),
        ("zh", "好的，明白了。|嗯，对对对|别停"),
    ],
)
def test_backchannels(language: str, texts: str) -> None:
    """Acknowledgements are told by language, and where none is given; none of them is a stop word."""
    for text in texts.split("|"):
        assert is_backchannel(text, language), text
        assert is_backchannel(text), text
        assert not is_stop(text, language), text


@pytest.mark.parametrize(
    ("language", "texts"),
    [
        ("en", "Stop!|stop stop|Wait a second|Okay, wait.|Please stop.|No, I meant Rome|Hold on|Um, never mind"),
        ("en-GB", "Yeah, but stop|okay cancel it|no|No, no, no!|Could you please stop?|Just stop it|Actually, no"),
        ("en", "No problem, but wait|Oh no, stop|Don't stop, no, stop|sorry"),
        ("de", "Stopp!|Moment mal|Nein, nicht das|Warte bitte|Ja, aber halt|Kannst du bitte aufhören?"),
        ("es", "Para.|Espera un poco|Basta ya|No.|Un momento|No, para|Vale, pero espera"),
        ("fr", "Arrête !|Attends, non|Oui mais stop|Ça suffit|Tu peux arrêter ?"),
        ("hi", "रुको|नहीं, वो नहीं|बस|ruko zara|एक मिनट|बस करो"),
        ("it", "Aspetta un attimo|Basta.|Puoi fermarti?"),
        ("pt", "Espera aí|Não!|Para!|Pode parar?"),
        ("ar", "توقف!|انتظر لحظة|لا."),
        ("bn", "থামো!|না।|এক মিনিট দাঁড়াও"),
        ("ja", "待って！|ちょっと待ってください|いや、違う|はい、ストップ"),
        ("ko", "잠깐만요|그만해!|아니, 로마요"),
        ("nl", "Wacht even|Nee, Rome|Stop maar"),
        ("pl", "Czekaj|Nie!|Dobrze, wystarczy"),
        ("ru", "Подожди|Нет, в Риме|Да хватит"),
        ("ta", "போதும்|நிறுத்து!"),
        ("te", "ఆపండి|చాలు"),
        ("tr", "Bekle|Dur!|Tamam, yeter|İptal et"),
        ("zh", "等一下！|停|不是，是罗马|好的，停下"),
    ],
)
def test_stop_words(language: str, texts: str) -> None:
    """Words that claim the floor, first or after an acknowledgement."""
    for text in texts.split("|"):
        assert is_stop(text, language), text
        assert not is_backchannel(text, language), text


@pytest.mark.parametrize(
    ("language", "texts"),
    [
        ("en", "stopwatch|the bus stop|What about Rome?|Para mí, sí||?!|I said okay|non-stop|I can't wait|Um, Rome"),
        ("en", "not an interrupt|don't cancel it|Why did you stop?|Yes, book it|Okay, next|Right now|Of course not"),
        ("en", "No problem, take your time|okay I see great perfect awesome right got it|Go ahead and book it"),
        ("de", "die Bushaltestelle|Gut, dann buch das|im Moment nicht|stimmt nicht"),
        ("es", "para mí un café|No sé|claro que no|no importa"),
        ("fr", "un arrêt de bus|bien sûr que non"),
        ("it", "No so|Fine"),
        ("pt", "No domingo|para mim|Não sei"),
        ("hi", "बस स्टॉप"),
        ("ar", "لا أعرف"),
        ("ja", "バス停はどこ？"),
        ("zh", "停车场在哪里？|不知道"),
        ("pl", "Nie wiem"),
        ("tr", "durak nerede"),
    ],
)
def test_neither(language: str, texts: str) -> None:
    """What has to be asked."""
    for text in texts.split("|"):
        assert not is_stop(text, language), text
        assert not is_backchannel(text, language), text


@pytest.mark.parametrize(
    ("table", "joined", "is_meant"),
    [
        (live._FILLERS, "{}", is_filler),
        (live._BACKCHANNELS, "{}", is_backchannel),
        (live._STOPS, "{}", is_stop),
        (live._WHOLE_STOPS, "{}", is_stop),
        (live._POLITE, "{} stop", is_stop),
        (live._OPEN, "{}.", lambda text, language: language is None or not is_finished(text, language)),
        (live._OPEN_UNMARKED, "{}", lambda text, language: language is None or not is_finished(text, language)),
    ],
)
def test_each_phrase_says_what_its_table_says(
    table: dict[str, frozenset[tuple[str, ...]]], joined: str, is_meant: Callable[[str, str | None], bool]
) -> None:
    """In its own language, and where the language is not known: no phrase of another means the opposite."""
    for language, phrases in table.items():
        for phrase in phrases:
            text = joined.format(" ".join(phrase))
            assert is_meant(text, language), (language, text)
            assert is_meant(text, None), (language, text)
            assert is_backchannel(text) + is_stop(text) < 2, (language, text)


@pytest.mark.parametrize(
    ("language", "finished", "open_ended"),
    [
        (
            "en",
            "Yes|No.|Paris|What is it made of?|That's what I asked for.|I like that.|Call me at 5",
            "I want to|and|Well, I think that|a pizza and.|the|um|So, uh|I'd like,|Wait...|can you",
        ),
        (
            "de",
            "Ja|Mach das Licht an.|Schalte es ein.|Wie spät ist es?",
            "Ich möchte|und dann|weil.|Das ist der|ähm|mit",
        ),
        ("es", "Sí|¿Qué hora es?|Quiero un café.", "Quiero|y|porque|un café con|este"),
        ("fr", "Oui|Quelle heure est-il ?|Je veux un café.", "je veux|et|parce que|un café avec|euh"),
        ("hi", "हाँ|मुझे पानी चाहिए|समय क्या है?", "मुझे|और|क्योंकि|मैं"),
        ("ja", "はい|水をください|今何時ですか？|こんにちは", "東京に|それで|えっと|水を"),
        ("ko", "네|지금 몇 시예요?|물 주세요", "그리고|물을|저는"),
        ("zh", "好的|现在几点？|我要水", "然后|因为|我想要苹果和"),
        ("ru", "Да|Который час?|Хочу кофе.", "я хочу|и|потому что"),
        ("ar", "نعم|كم الساعة؟|أريد قهوة", "أريد|و|لأن"),
        ("th", "ใช่|กี่โมงแล้ว?", "…|กาแฟ,"),
        (None, "No|Hello.", "and|to"),
    ],
)
def test_the_local_heuristic(language: str | None, finished: str, open_ended: str) -> None:
    """The last words tell whether a sentence is over, whatever mark the speech service put behind it."""
    for text in finished.split("|"):
        assert is_finished(text, language), text
    for text in open_ended.split("|"):
        assert not is_finished(text, language), text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("My number is 555 123", True),
        ("It's five five five", True),
        ("The order is 4512.", True),
        ("S M I", True),
        ("a pizza and", True),
        ("42", False),
        ("Is it 555 123?", False),
        ("I am here.", False),
    ],
)
def test_pauses_to_be_expected(text: str, expected: bool) -> None:
    """Digits, spelling and open ends take time."""
    assert takes_time(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("upon a time", True),
        ("Upon a time, there was.", True),
        ("once upon the time there was", True),
        ("king", True),
        ("pon a time there wa", True),
        ("who is the king", False),
        ("stop it now", False),
        ("a a a", False),
        ("Rome upon a time there was", False),
        ("upon a time there was Rome", False),
        ("stop upon a time there was", False),
        ("time was king", False),
        ("a king a time", False),
        ("", False),
        ("...", False),
    ],
)
def test_echo(text: str, expected: bool) -> None:
    """The assistant's own words, in its own order, nearly all of them right."""
    assert is_echo(text, "Once upon a time there was a king.") is expected


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Upon a time there was", ""),
        ("Upon a time there was, stop", "stop"),
        ("No! Upon a time there was", "no"),
        ("What about Rome?", "What about Rome?"),
        ("king Rome", "king Rome"),
        ("", ""),
    ],
)
def test_what_the_user_says_beside_an_echo(text: str, left: str) -> None:
    """The assistant's words are taken away, those of the user stay."""
    assert beside_echo(text, "Once upon a time there was a king.") == left


LANGUAGES = [None, "xx", *sorted(live._BACKCHANNELS)]
PHRASES = sorted({" ".join(one) for table in (live._BACKCHANNELS, live._STOPS, live._OPEN) for one in table["en"]})


@given(st.text(max_size=60), st.sampled_from(LANGUAGES))
def test_any_text_is_classified(text: str, language: str | None) -> None:
    """No text makes them fail, and none both stops and agrees."""
    assert not (is_stop(text, language) and is_backchannel(text, language))
    is_finished(text, language)
    takes_time(text, language)
    assert not words(text) or is_echo(text, f"so {text} then")


@given(st.lists(st.sampled_from([*PHRASES, "12", "S", "Rome"]), max_size=5), st.sampled_from(LANGUAGES))
def test_case_and_punctuation_make_no_difference(phrases: list[str], language: str | None) -> None:
    """Whatever marks the speech service puts into what was said."""
    plain, marked = " ".join(phrases), f"«{', '.join(phrases).upper()}»!"
    assert is_stop(marked, language) == is_stop(plain, language)
    assert is_backchannel(marked, language) == is_backchannel(plain, language)


# == Settings ==========================================================================================================


def test_settings_have_the_documented_defaults() -> None:
    """An empty `voice` is a whole one."""
    voice = read_config({"model": "openai/gpt-4o"}).voice
    vad, grace, interrupt = voice.vad, voice.grace_period, voice.interrupt
    assert (vad.model, vad.semantic_check, vad.silence_duration_ms, vad.max_silence_ms) == ("auto", True, 600, 3000)
    assert (vad.energy_threshold, vad.min_words_for_check, vad.prefix_padding_ms) == (0.02, 1, 400)
    assert set(".!?。！？।") <= set(vad.punctuation_trigger)
    assert (grace.enabled, grace.duration_ms) == (True, 5000)
    assert (interrupt.mode, interrupt.energy_threshold, interrupt.capture_duration_ms) == ("auto", 0.05, 600)
    assert (interrupt.semantic_check, interrupt.model, interrupt.save_partial) == (True, "auto", "marked")


@pytest.mark.parametrize(
    ("field", "spelled", "meant"),
    [
        ("mode", "manual", "never"),
        ("mode", "disabled", "never"),
        ("save_partial", "discard", "none"),
        ("save_partial", "save", "full"),
    ],
)
def test_other_spellings(field: str, spelled: str, meant: str) -> None:
    """Older names of the same choices are taken."""
    config = read_config({"model": "openai/gpt-4o", "voice": {"interrupt": {field: spelled}}})
    assert getattr(config.voice.interrupt, field) == meant


@pytest.mark.parametrize(
    ("config", "param"),
    [
        ({}, "config.model"),
        ({"model": "a/b", "voice": {"vad": {"silence_duration_ms": -1}}}, "config.voice.vad.silence_duration_ms"),
        ({"model": "a/b", "voice": {"interrupt": {"mode": "sometimes"}}}, "config.voice.interrupt.mode"),
        ({"model": "a/b", "voice": {"input": {"provider": "nobody"}}}, "config.voice.input.provider"),
        ({"model": "a/b", "audio_in": {"sample_rate": 8000}}, "config.audio_in.sample_rate"),
        ({"model": "a/b", "audio_out": {"transport": "smoke"}}, "config.audio_out.transport"),
        ({"model": "a/b", "surprise": 1}, "config.surprise"),
    ],
)
def test_a_bad_setting_is_named(config: JSON, param: str) -> None:
    """The error says which field."""
    with pytest.raises(InvalidRequestError) as caught:
        read_config(config)
    assert caught.value.param == param
