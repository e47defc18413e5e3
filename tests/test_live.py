"""Live sessions: whole conversations with the sandbox, which hears word for word what its `speech` says.

They run on an event loop whose time goes `SPEED` times as fast as the clock on the wall, if the machine is not busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import selectors
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest
from aiohttp import WSMsgType, web
from conftest import JSON, KEY, Serve, websocket_server
from hypothesis import given
from hypothesis import strategies as st

import vai
from live import Detectors, LiveAudio, LiveEvent, LiveSession, Timing, read_config, read_message
from sandbox import Ear, Sandbox, speech
from voice import Resampler

SPEED = 8.0
FRAME = 640  # bytes of 20 ms at 16 kHz
TINY_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


# == Time ==============================================================================================================


class QuickSelector(selectors.DefaultSelector):
    """Counts the seconds that were waited on purpose."""

    waited = 0.0

    def select(self, timeout: float | None = None) -> Any:
        began = time.monotonic()
        ready = super().select(timeout and timeout / SPEED)
        waited = time.monotonic() - began
        self.waited += waited if timeout is None else min(waited, timeout / SPEED)
        return ready


class QuickLoop(asyncio.SelectorEventLoop):
    """Its time is what it has worked and waited: while others have the processor, it stands still."""

    def __init__(self) -> None:
        self._quick = QuickSelector()
        super().__init__(self._quick)

    def time(self) -> float:
        return (time.thread_time() + self._quick.waited) * SPEED


def quick(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60 * SPEED):
            await work

    with asyncio.Runner(loop_factory=QuickLoop) as runner:
        runner.run(bounded())


def now() -> float:
    return asyncio.get_running_loop().time()


# == Talking ===========================================================================================================


class Talk:
    """A session with a microphone that is always on, and all that came of it."""

    def __init__(self, session: LiveSession, sandbox: Sandbox) -> None:
        self.session, self.sandbox = session, sandbox
        self.events: list[LiveEvent | LiveAudio] = []
        self.times: list[float] = []
        self.rate = session.config.audio_in.sample_rate
        self.size = self.rate // 50 * 2
        self.microphone_on = True
        self.echo = 0.0
        self._playing = False
        self._coming_back = bytearray()
        self._resampler = Resampler(24_000, self.rate)
        self._seen = 0
        self._new = asyncio.Event()
        self._unsaid = bytearray()
        self._quiet = asyncio.Event()

    async def read(self) -> None:
        async for event in self.session:
            self.events.append(event)
            self.times.append(now())
            if self.echo:
                self.play_back(event)
            self._new.set()
        self._new.set()

    def play_back(self, event: LiveEvent | LiveAudio) -> None:
        """A loudspeaker that the microphone hears, `echo` of it; it does as it is told."""
        if isinstance(event, LiveAudio):
            pcm = self._resampler.feed(event.data)
            samples = struct.unpack(f"<{len(pcm) // 2}h", pcm)
            self._coming_back += struct.pack(f"<{len(samples)}h", *(round(self.echo * sample) for sample in samples))
        elif event.type in ("audio.pause", "audio.resume"):
            self._playing = event.type == "audio.resume"
        elif event.type in ("audio.start", "audio.flush"):
            self._coming_back.clear()
            self._playing = True

    async def speak(self) -> None:
        began, frames = now(), 0
        while True:
            if self.microphone_on:
                heard = self._coming_back if self._coming_back and self._playing else self._unsaid
                frame = bytes(heard[: self.size])
                del heard[: self.size]
                if not self._unsaid:
                    self._quiet.set()
                await self.session.send(frame + bytes(self.size - len(frame)))
            frames += 1
            await asyncio.sleep(max(0.0, began + frames * 0.02 - now()))

    async def say(self, text: str) -> None:
        """Returns when it was said."""
        await self.play(speech(text, self.rate))

    async def play(self, pcm: bytes) -> None:
        self._unsaid += pcm
        self._quiet.clear()
        await self._quiet.wait()

    async def send(self, type: str, **fields: Any) -> None:
        await self.session.send({"type": type, **fields})

    async def until(self, type: str, **fields: Any) -> LiveEvent:
        """The next event like this; what came before it is passed over."""
        while True:
            while self._seen < len(self.events):
                event = self.events[self._seen]
                self._seen += 1
                if not isinstance(event, LiveEvent) or event.type != type:
                    continue
                if all(event.get(name) == value for name, value in fields.items()):
                    return event
            assert self.session.closed is None or self.events[-1].type != "session.closed", self.types
            self._new.clear()
            await self._new.wait()

    @property
    def types(self) -> list[str]:
        """What was told but for the model's own events and the microphone's."""
        return [
            event.type
            for event in self.events
            if not event.type.startswith(("vad.", "transcript", "content_", "message_", "ping", "state", "audio_delta"))
        ]

    @property
    def story(self) -> list[str]:
        """For whoever has to find out why a test failed."""
        return [
            f"{when - self.times[0]:8.3f} {event.type} {event.data if isinstance(event, LiveEvent) else event.seconds}"[
                :200
            ]
            for event, when in zip(self.events, self.times, strict=True)
        ]

    def told(self, type: str) -> list[LiveEvent]:
        return [event for event in self.events if isinstance(event, LiveEvent) and event.type == type]

    def audio(self, response_id: str | None = None) -> bytes:
        pieces = [event for event in self.events if isinstance(event, LiveAudio)]
        return b"".join(piece.data for piece in pieces if response_id in (None, piece.response_id))

    def written(self) -> str:
        """What the model wrote."""
        return "".join(event["delta"].get("text", "") for event in self.told("content_block_delta"))

    def requests(self) -> list[JSON]:
        """What the model (not the fast one) was asked."""
        return [request.body or {} for request in self.sandbox.requests if request.provider == "anthropic"]


@contextlib.asynccontextmanager
async def talking(
    *,
    tools: Any = (),
    timing: Timing | None = None,
    patience: float = 20.0,
    max_duration: float = 7200.0,
    sandbox: Sandbox | None = None,
    **config: Any,
) -> AsyncIterator[Talk]:
    """A session with the sandbox. At its end nothing of it is left.

    `patience` is that with the speech service, whose words are made on a thread: they are late on a busy machine.
    """
    timing = dataclasses.replace(timing or Timing(), patience=patience, unheard=2 * patience)
    async with contextlib.AsyncExitStack() as stack:
        running = sandbox or await stack.enter_async_context(Sandbox())
        engine = vai.Direct(environ=running.environ)
        stack.push_async_callback(engine.close)
        before = asyncio.all_tasks()
        detectors = await stack.enter_async_context(Detectors("energy"))
        told = [
            {**tool.to_wire(), "side_effects": tool.side_effects} if isinstance(tool, vai.Tool) else tool
            for tool in tools
        ]
        given = read_config({"model": "anthropic/claude-sonnet-4-5", "tools": told, **config})
        session = engine.live_session(given, detectors=detectors, tools=tools, timing=timing, max_duration=max_duration)
        async with session:
            talk = Talk(session, running)
            reading, speaking = asyncio.create_task(talk.read()), asyncio.create_task(talk.speak())
            try:
                yield talk
            except BaseException as fault:
                fault.add_note("\n".join(talk.story))
                raise
            finally:
                speaking.cancel()
                session.close()
                await asyncio.wait([reading, speaking])
                left_at = now()
        assert now() - left_at < SPEED
        assert talk.events[-1].type == "session.closed"
        assert reading.exception() is None
        assert len(talk.told("session.closed")) == 1
        valid(session.messages)
        await nothing_left(running, before)


async def nothing_left(sandbox: Sandbox, before: set[Any]) -> None:
    """No request of the sandbox's is open, and no task is left but those of its connections, which are kept alive."""
    for _ in range(100):
        left = [task for task in asyncio.all_tasks() - before if "RequestHandler.start" not in repr(task.get_coro())]
        if not sandbox.open and left == [asyncio.current_task()][: len(left)]:
            return
        await asyncio.sleep(0.05)
    raise AssertionError((sandbox.open, left))


def valid(messages: list[JSON]) -> None:
    roles = [message["role"] for message in messages]
    assert all(one != other for one, other in itertools.pairwise(roles)), roles
    assert not roles or roles[0] == "user"


VAD: JSON = {"input": {"turn_detection": "vad"}, "vad": {"silence_duration_ms": 320, "max_silence_ms": 1200}}
NO_GRACE: JSON = {**VAD, "grace_period": {"enabled": False}}


# == Conversations =====================================================================================================


@pytest.mark.parametrize("detection", ["vad", "auto"])
def test_a_conversation(detection: str) -> None:
    """Two turns: the events in their order, the audio whole and in time, the history."""

    async def work() -> None:
        async with talking(voice={**VAD, "input": {"turn_detection": detection}}, system="Be brief.") as talk:
            for text in ("Hello there, my friend.", "Good bye."):
                await talk.say(f"[say {text}]")
                await talk.until("input.committed", transcript=f"[say {text}]")
                start = await talk.until("audio.start", format="pcm", sample_rate=24_000)
                started = now()
                done = await talk.until("audio.done")
                assert talk.audio(start["response_id"]) == speech(text)
                assert abs(done["duration_ms"] - len(speech(text)) / 48) < 2
                assert now() - started >= len(speech(text)) / 48_000 - 0.1
                metrics = await talk.until(
                    "turn.metrics", cancelled_runs=talk.told("turn.metrics")[-1]["cancelled_runs"]
                )
                assert 0 <= metrics["decision_ms"] <= metrics["first_audio_ms"]
                await talk.until("state", state="listening")
            turn = ["input.committed", "grace_period.started", "audio.start", "audio.done", "turn.metrics"]
            assert [type for type in talk.types if type != "grace_period.expired"] == ["session.created", *turn, *turn]
            assert [(one["role"], one["content"]) for one in talk.session.messages] == [
                ("user", "[say Hello there, my friend.]"),
                ("assistant", [{"type": "text", "text": "Hello there, my friend."}]),
                ("user", "[say Good bye.]"),
                ("assistant", [{"type": "text", "text": "Good bye."}]),
            ]
            assert talk.requests()[-1]["messages"] == talk.session.messages[:3]
            created = talk.told("session.created")[0]
            assert created["config"]["system"] == "Be brief."
            assert "provider_keys" not in created["config"]

    quick(work())


def test_audio_is_about_a_second_ahead() -> None:
    async def work() -> None:
        async with talking(voice=VAD) as talk:
            await talk.send("input.text", text="[words 18]")
            await talk.until("audio.done")
            at = next(i for i, event in enumerate(talk.events) if event.type == "audio.start")
            sent = 0.0
            for event, when in list(zip(talk.events, talk.times, strict=True))[at:]:
                if isinstance(event, LiveAudio):
                    assert event.seconds <= 0.1
                    sent += event.seconds
                    assert sent <= when - talk.times[at] + 1.2
            assert sent > 4

    quick(work())


@pytest.mark.parametrize("save", ["marked", "none", "full"])
def test_barge_in(save: str) -> None:
    """The answer stops at once; of it, history has what was heard."""

    async def work() -> None:
        async with talking(voice={**NO_GRACE, "interrupt": {"save_partial": save}}) as talk:
            await talk.send("input.text", text="[words 60]")
            start = await talk.until("audio.start")
            await asyncio.sleep(2)
            await talk.say("Stop.")
            pause = await talk.until("audio.pause", response_id=start["response_id"])
            flush = await talk.until("audio.flush", response_id=start["response_id"])
            assert flush["from_ms"] == pause["position_ms"] > 500
            told = await talk.until("response.interrupted")
            assert (told["interrupt_transcript"], told["audio_position_ms"]) == ("Stop.", flush["from_ms"])
            partial = told["partial_text"]
            assert talk.written().startswith(partial)
            assert 1 <= len(partial.split()) < 50
            await talk.until("input.committed", transcript="Stop.")
            await talk.until("audio.start")
            at = talk.events.index(flush)
            assert all(
                event.response_id != start["response_id"] for event in talk.events[at:] if isinstance(event, LiveAudio)
            )
            kept = {"marked": f"{partial} [interrupted]", "full": partial}.get(save)
            texts = [one["content"][0]["text"] for one in talk.requests()[-1]["messages"] if one["role"] == "assistant"]
            assert texts == ([kept] if kept else [])

    quick(work())


@pytest.mark.parametrize("reason", ["backchannel", "no_speech"])
def test_a_murmur_pauses_and_nothing_is_lost(reason: str) -> None:
    async def work() -> None:
        async with talking(voice=NO_GRACE) as talk:
            await talk.say("[words 14]")
            await talk.until("audio.start")
            await asyncio.sleep(0.8)
            await (talk.say("Yeah, yeah.") if reason == "backchannel" else talk.play(buzz(0.4)))
            pause = await talk.until("audio.pause")
            await talk.until("interrupt.dismissed", reason=reason)
            resume = await talk.until("audio.resume")
            assert pause["position_ms"] == resume["position_ms"]
            await talk.until("audio.done")
            between = talk.events[talk.events.index(pause) : talk.events.index(resume)]
            assert not any(isinstance(event, LiveAudio) for event in between)
            assert talk.audio() == speech(talk.written())
            assert len(talk.session.messages) == 2

    quick(work())


def buzz(seconds: float) -> bytes:
    """Sound without words."""
    return (struct.pack("<h", 6000) * 20 + struct.pack("<h", -6000) * 20) * round(seconds * 400)


@pytest.mark.parametrize("gain", [0.1, 0.03], ids=["-20 dB", "-30 dB"])
def test_our_own_voice_coming_back_interrupts_nothing(gain: float) -> None:
    """Even where the speech service makes words of it; and somebody who speaks over it is heard."""

    async def work() -> None:
        async with Sandbox() as sandbox:
            sandbox.transcripts.append("one two three four five six seven eight nine ten eleven twelve")
            async with talking(sandbox=sandbox, voice=NO_GRACE) as talk:
                text = "One two three four five six seven eight nine ten eleven twelve."
                talk.echo = gain
                await talk.send("input.text", text=f"[say {text}]")
                await talk.until("audio.done")
                assert not talk.told("response.interrupted")
                assert len(talk.told("audio.pause")) <= 1
                assert talk.audio() == speech(text)
                await asyncio.sleep(1)
                assert len(talk.told("input.committed")) == 1

    quick(work())


@pytest.mark.parametrize(("mode", "gain"), [("auto", 0.6), ("never", 0.25)])
def test_a_loudspeaker_without_echo_cancellation(mode: str, gain: float) -> None:
    """One speaks at a time: the user is heard afterwards, the client can still interrupt; and with headphones on, so
    can the user."""

    async def work() -> None:
        async with Sandbox() as sandbox:
            text = "One two three four five six seven eight nine ten."
            sandbox.transcripts.append(text.lower())
            async with talking(sandbox=sandbox, voice={**NO_GRACE, "interrupt": {"mode": mode}}) as talk:
                talk.echo = gain
                await talk.send("input.text", text=f"[say {text}]")
                await talk.until("audio.done")
                await asyncio.sleep(1)
                before = len(talk.told("vad.speech"))
                assert len(talk.told("audio.pause")) < 6
                await talk.send("input.text", text=f"[say {text}]")
                await talk.until("audio.done")
                await asyncio.sleep(1)
                assert len(talk.told("vad.speech")) == before
                await talk.say("Please [words 60] for me")
                await talk.until("audio.start")
                assert not talk.told("response.interrupted")
                assert len(talk.told("input.committed")) == 3
                talk.echo = 0.0
                await asyncio.sleep(8)
                await (talk.say("Stop.") if mode == "auto" else talk.send("input.interrupt"))
                await talk.until("response.interrupted")

    quick(work())


@pytest.mark.parametrize("mode", ["never", "manual", "disabled", "always"])
def test_modes_of_interruption(mode: str) -> None:
    """What is said over an answer ends it at once, or is the next turn when it is over."""

    async def work() -> None:
        async with talking(voice={**NO_GRACE, "interrupt": {"mode": mode}}) as talk:
            await talk.send("input.text", text="[words 8]")
            await talk.until("audio.start")
            await asyncio.sleep(0.6)
            await talk.say("[say Yes.] What about Rome?")
            if mode == "always":
                await talk.until("response.interrupted")
            else:
                await talk.until("audio.done")
                assert not talk.told("response.interrupted")
            await talk.until("input.committed", transcript="[say Yes.] What about Rome?")
            await talk.until("audio.done")
            assert not talk.told("audio.pause")
            assert talk.audio().endswith(speech("Yes."))

    quick(work())


def test_history_ends_where_the_client_says_that_it_played() -> None:
    """Its loudspeaker is late: what real time would allow was not heard."""

    async def work() -> None:
        async with talking(voice=NO_GRACE) as talk:
            await talk.send("input.text", text="[say One two three four five six seven eight nine ten.]")
            start = await talk.until("audio.start")
            await asyncio.sleep(2)
            end_of_three = len(speech("One two three")) / 48
            await talk.send("playback", response_id=start["response_id"], played_ms=end_of_three)
            await talk.send("input.interrupt")
            told = await talk.until("response.interrupted")
            assert told["partial_text"] == "One two three"
            assert abs(told["audio_position_ms"] - end_of_three) < 2

    quick(work())


def test_words_within_grace_make_one_turn() -> None:
    async def work() -> None:
        async with talking(voice=VAD) as talk:
            await talk.say("[wait 3] [say Fine.]")
            await talk.until("input.committed")
            await talk.say("And tomorrow as well.")
            extended = await talk.until("grace_period.extended")
            assert extended["previous_transcript"] == "[wait 3] [say Fine.]"
            both = "[wait 3] [say Fine.] And tomorrow as well."
            await talk.until("input.committed", transcript=both)
            await talk.until("audio.done")
            roles = [(one["role"], one["content"]) for one in talk.session.messages]
            assert roles == [("user", both), ("assistant", [{"type": "text", "text": "Fine."}])]
            assert [request["messages"][-1]["content"] for request in talk.requests()][-1] == both

    quick(work())


def test_the_model_begins_before_the_turn_is_over_and_is_held() -> None:
    """The fast model thinks; meanwhile the answer is made, but nothing of it goes out."""

    async def work() -> None:
        async with talking(voice=NO_GRACE) as talk:
            await talk.say("Would you [wait 0.2] [say Yes.]")
            await talk.until("vad.analyzing")
            await talk.until("input.committed")
            await talk.until("audio.done")
            committed = next(i for i, event in enumerate(talk.events) if event.type == "input.committed")
            assert not any(event.type.startswith(("message", "content", "audio")) for event in talk.events[:committed])
            requests = [request for request in talk.sandbox.requests if request.provider in ("anthropic", "groq")]
            assert sorted(request.provider for request in requests) == ["anthropic", "groq"]
            assert talk.audio() == speech("Yes.")

    quick(work())


def test_the_fast_model_says_no() -> None:
    """Then the silence goes on for as long as it may, and the turn is forced."""

    async def work() -> None:
        async with talking(voice=NO_GRACE) as talk:
            await talk.say("[say No.]")
            silent = now()
            await talk.until("input.committed", forced=True)
            assert now() - silent > 0.9
            await talk.until("audio.done")

    quick(work())


def test_a_fast_model_that_cannot_be_had() -> None:
    """It is asked once; the words alone decide."""

    async def work() -> None:
        async with talking(voice={**NO_GRACE, "vad": {**VAD["vad"], "model": "groq/not-exist"}}) as talk:
            for _ in range(2):
                await talk.say("[say Right.]")
                await talk.until("input.committed", forced=False)
                await talk.until("audio.done")
            assert [request.provider for request in talk.sandbox.requests].count("groq") == 1

    quick(work())


def test_push_to_talk() -> None:
    async def work() -> None:
        async with talking(voice={**VAD, "input": {"turn_detection": "manual"}}) as talk:
            await talk.say("[say Over.] My first part.")
            await asyncio.sleep(2)
            await talk.say("And my second.")
            assert not talk.told("input.committed")
            await talk.send("input.commit")
            told = await talk.until("input.committed", forced=False)
            assert told["transcript"] == "[say Over.] My first part. And my second."
            await talk.until("audio.done")
            await talk.send("input.commit")
            assert (await talk.until("error"))["error"]["code"] == "nothing_to_commit"
            assert talk.audio() == speech("Over.")

    quick(work())


def test_a_picture_waits_for_its_words() -> None:
    async def work() -> None:
        async with talking(voice=VAD) as talk:
            picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": TINY_PNG}}
            await talk.send("input.content", content=[picture])
            await talk.say("[say A dot.]")
            await talk.until("audio.done")
            asked = talk.requests()[-1]["messages"][-1]["content"]
            assert [block["type"] for block in asked] == ["image", "text"]

    quick(work())


# == Tools =============================================================================================================

CALL = '[tool get_weather {"city":"Oslo"}] [tool get_weather {"city":"Rome"}] [then] [say Mild.]'
WEATHER = {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}


def test_tools_in_this_process() -> None:
    """Side by side, and what goes wrong is for the model to read."""

    async def work() -> None:
        together = asyncio.Barrier(2)

        @vai.tool
        async def get_weather(city: str) -> str:
            "The weather."
            await together.wait()
            if city == "Rome":
                raise ValueError("no such city")
            return f"{city}: mild"

        async with talking(voice=VAD, tools=[get_weather]) as talk:
            await talk.send("input.text", text=CALL)
            await talk.until("tool_use", name="get_weather", input={"city": "Oslo"})
            await talk.until("audio.done")
            results = talk.session.messages[2]["content"]
            assert [(one["content"], one.get("is_error", False)) for one in results] == [
                ("Oslo: mild", False),
                ("no such city", True),
            ]
            assert talk.audio() == speech("Mild.")

    quick(work())


def test_tools_of_the_client() -> None:
    async def work() -> None:
        async with talking(voice=VAD, tools=[WEATHER]) as talk:
            await talk.send("input.text", text=CALL)
            uses = [await talk.until("tool_use"), await talk.until("tool_use")]
            assert [use["input"]["city"] for use in uses] == ["Oslo", "Rome"]
            for use in reversed(uses):
                await talk.send("tool_result", tool_use_id=use["id"], content=f"{use['input']['city']} is fine")
            await talk.send("tool_result", tool_use_id=uses[0]["id"], content="again")
            assert (await talk.until("error", fatal=False))["error"]["code"] == "unknown_tool_call"
            await talk.until("audio.done")
            results = talk.session.messages[2]["content"]
            assert [one["content"] for one in results] == ["Oslo is fine", "Rome is fine"]

    quick(work())


def test_an_interruption_cancels_tools() -> None:
    async def work() -> None:
        cancelled = asyncio.Event()

        @vai.tool
        async def get_weather(city: str) -> str:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return ""

        async with talking(voice=VAD, tools=[get_weather]) as talk:
            await talk.send("input.text", text='[tool get_weather {"city":"Oslo"}]')
            await talk.until("tool_use")
            await talk.send("input.interrupt", transcript="[say Never mind then.]")
            await talk.until("response.interrupted")
            await cancelled.wait()
            await talk.until("audio.done")
            assert talk.session.messages[2]["content"][0]["is_error"]

    quick(work())


def test_a_tool_that_takes_too_long() -> None:
    async def work() -> None:
        async with talking(voice=VAD, tools=[WEATHER], timing=Timing(tool=0.5)) as talk:
            await talk.send("input.text", text='[tool get_weather {"city":"Oslo"}] [then] [say Sorry.]')
            use = await talk.until("tool_use")
            await talk.until("audio.done")
            await talk.send("tool_result", tool_use_id=use["id"], content="late")
            assert (await talk.until("error"))["error"]["code"] == "unknown_tool_call"
            assert "timed out" in talk.session.messages[2]["content"][0]["content"]

    quick(work())


def test_side_effects_wait_for_the_end_of_grace() -> None:
    async def work() -> None:
        called: list[float] = []

        @vai.tool(side_effects=True)
        def get_weather(city: str) -> str:
            called.append(1)
            return city

        grace = {**VAD, "grace_period": {"duration_ms": 700}}
        async with talking(voice=grace, tools=[get_weather]) as talk:
            await talk.send("input.text", text='[tool get_weather {"city":"Oslo"}] [then] [say Done.]')
            await talk.until("message_stop")
            assert not called
            await talk.until("grace_period.expired")
            await talk.until("audio.done")
            assert called
            assert talk.types.index("grace_period.expired") < talk.types.index("tool_use")

    quick(work())


# == What comes in =====================================================================================================


@pytest.mark.parametrize("sizes", [(641, 639), (1, 1279), (333,)])
def test_frames_of_any_length(sizes: tuple[int, ...]) -> None:
    """A sample may be cut in two: none is lost, and none is moved."""

    async def work() -> None:
        async with talking(voice={**VAD, "input": {"turn_detection": "manual"}}) as talk:
            talk.microphone_on = False
            pcm, at = speech("[say Hi.] An odd thing to say.", 16_000), 0
            for number in range(len(pcm)):
                size = sizes[number % len(sizes)]
                await talk.session.send(pcm[at : at + size])
                at += size
                if at >= len(pcm):
                    break
            await talk.send("input.commit")
            await talk.until("input.committed", transcript="[say Hi.] An odd thing to say.")

    quick(work())


@pytest.mark.parametrize("rate", [24_000, 48_000])
def test_other_rates_of_the_microphone(rate: int) -> None:
    async def work() -> None:
        async with Sandbox() as sandbox:
            sandbox.transcripts.append("[say Heard.] and that is all")
            async with talking(sandbox=sandbox, voice=VAD, audio_in={"sample_rate": rate}) as talk:
                await talk.say("whatever it is that is said in here")
                told = await talk.until("input.committed")
                assert told["transcript"].startswith("[say Heard.]")
                await talk.until("audio.done")

    quick(work())


@pytest.mark.parametrize("rate", [8_000, 48_000])
def test_other_rates_of_the_answer(rate: int) -> None:
    async def work() -> None:
        async with talking(voice=VAD, audio_out={"sample_rate": rate, "transport": "json"}) as talk:
            await talk.send("input.text", text="[say Clear as a bell.]")
            await talk.until("audio.start", sample_rate=rate)
            await talk.until("audio.done")
            assert talk.audio() == speech("Clear as a bell.", rate)
            piece = next(event for event in talk.events if isinstance(event, LiveAudio)).to_wire()
            assert (piece["type"], piece["delta"]["sample_rate"]) == ("audio_delta", rate)
            assert piece["response_id"] == talk.told("audio.start")[0]["response_id"]

    quick(work())


MESSAGES: dict[str, tuple[Any, str | None, str | None]] = {
    "no type": ({}, "type", None),
    "unknown": ({"type": "input.dance"}, "type", "unknown_message"),
    "update": ({"type": "session.update", "config": {}}, "type", "unsupported_message"),
    "configured": ({"type": "session.configure", "config": {}}, "type", "already_configured"),
    "text": ({"type": "input.text", "text": 5}, "text", None),
    "empty text": ({"type": "input.text", "text": " "}, None, "nothing_to_commit"),
    "much text": ({"type": "input.text", "text": "a" * 1_000_000}, "text", "text_too_long"),
    "no content": ({"type": "input.content"}, "content", None),
    "empty content": ({"type": "input.content", "content": []}, None, "nothing_to_commit"),
    "a block": ({"type": "input.content", "content": [{"type": "image"}]}, "content[0].source", None),
    "a result": ({"type": "tool_result", "tool_use_id": "x", "content": 5}, "content", None),
    "nobody's result": ({"type": "tool_result", "tool_use_id": "x"}, "tool_use_id", "unknown_tool_call"),
    "is_error": ({"type": "tool_result", "tool_use_id": "x", "is_error": "no"}, "is_error", None),
    "playback": ({"type": "playback", "response_id": "x", "played_ms": -1}, "played_ms", None),
    "no playback": ({"type": "playback", "response_id": "x", "played_ms": True}, "played_ms", None),
    "commit": ({"type": "input.commit"}, None, "nothing_to_commit"),
    "interrupt": ({"type": "input.interrupt"}, None, "nothing_to_interrupt"),
    "interrupt with": ({"type": "input.interrupt", "transcript": None}, "transcript", None),
}


def test_messages_that_mean_nothing() -> None:
    """Each is an error, and the session goes on."""

    async def work() -> None:
        async with talking(voice=VAD) as talk:
            for name, (message, param, code) in MESSAGES.items():
                await talk.session.send(message)
                error = await talk.until("error", fatal=False)
                assert (error["error"].get("param"), error["error"].get("code")) == (param, code), name
            await talk.send("playback", response_id="resp_of_old", played_ms=10)
            await talk.send("input.text", text="[say Still here.]")
            await talk.until("audio.done")
            assert len(talk.told("error")) == len(MESSAGES)

    quick(work())


def test_audio_that_comes_too_fast() -> None:
    """It is slowed to what a voice can be; who goes on like that is no microphone."""

    async def work() -> None:
        async with talking(voice=VAD) as talk:
            talk.microphone_on = False
            began = now()
            for _ in range(4):
                await talk.session.send(bytes(32_000))
            assert now() - began > 2.5

            async def flood() -> None:
                while talk.session.closed is None:
                    await talk.session.send(bytes(32_000))

            talk.session._pace.patience = 1.0
            await asyncio.gather(*(flood() for _ in range(5)))
            assert (await talk.until("error", fatal=True))["error"]["code"] == "audio_too_fast"
            await talk.until("session.closed", reason="audio_too_fast")

    quick(work())


# == Faults ============================================================================================================


@pytest.mark.parametrize(
    ("fault", "type"),
    [
        ("[error 429 retry_after=7]", "rate_limit_error"),
        ("[error 500]", "provider_error"),
        ("[error_in_stream 529]", "overloaded_error"),
        ("[break_off]", "provider_error"),
        ("[reset]", "provider_error"),
    ],
)
def test_the_model_fails(fault: str, type: str) -> None:
    """The client is told, the user's words stay, and the next turn is answered."""

    async def work() -> None:
        async with talking(voice=VAD) as talk:
            await talk.send("input.text", text=f"{fault} [words 30]")
            error = await talk.until("error")
            assert (error["error"]["type"], error["fatal"]) == (type, False)
            assert error.get("response_id")
            assert error.get("turn_id")
            await talk.until("state", state="listening")
            await talk.say("Are you there?")
            await talk.until("input.committed", transcript="Are you there?")
            await talk.until("error")  # also of a run that failed before the turn was committed
            texts = [block["text"] for block in talk.requests()[-1]["messages"][-1]["content"]]
            assert texts == [f"{fault} [words 30]", "Are you there?"]

    quick(work())


def test_a_lost_connection_loses_no_word() -> None:
    """In the middle of what the user says."""

    async def work() -> None:
        async with talking(voice={**VAD, "input": {"turn_detection": "manual"}}) as talk:
            speaking = asyncio.create_task(talk.say("[say Yes.] I have been saying something rather long here."))
            await talk.until("transcript.delta", delta="[say Yes.] I have")
            assert talk.sandbox.drop_sockets() == 2
            await speaking
            await talk.send("input.commit")
            told = await talk.until("input.committed")
            assert told["transcript"] == "[say Yes.] I have been saying something rather long here."
            await talk.until("audio.done")
            assert talk.session.reconnects == 2
            assert not talk.told("error")
            assert talk.audio() == speech("Yes.")

    quick(work())


def test_speech_is_lost_in_the_middle_of_an_answer() -> None:
    async def work() -> None:
        async with Sandbox() as sandbox:
            sandbox.pace = 0.05
            async with talking(sandbox=sandbox, voice=VAD) as talk:
                text = "One two three. Four five six seven eight nine ten eleven twelve."
                await talk.send("input.text", text=f"[say {text}]")
                await talk.until("audio.start")
                await asyncio.sleep(1.2)
                assert sandbox.drop_sockets() == 2
                await talk.until("audio.done")
                assert len(talk.audio()) >= len(speech(text)) - 4800
                assert talk.session.messages[-1]["content"] == [{"type": "text", "text": text}]

    quick(work())


def test_speech_that_cannot_be_had() -> None:
    """The text still arrives, the client is told why it is silent, and the session goes on."""

    async def work() -> None:
        async with talking(voice=VAD) as talk:
            await talk.send("input.content", content=[{"type": "text", "text": "[words 2]"}])
            await talk.until("audio.done")
            talk.session._output = talk.session._output.model_copy(update={"voice": "not-exist"})
            await talk.send("input.text", text="[say Hello there.]")
            await talk.until("error", fatal=False)
            await talk.until("state", state="listening")

    quick(work())


@pytest.mark.parametrize("how", ["an error at some word", "a lost connection"])
def test_listening_fails_for_good(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said so far is a turn, the client is told, and another stream is opened."""

    async def work() -> None:
        async with talking(voice=VAD) as talk:
            await talk.say("[say Hello.] This was heard")
            with monkeypatch.context() as patch:
                patch.setattr("voice.ATTEMPTS", 0)
                if how == "a lost connection":
                    talk.sandbox.drop_sockets()
                else:
                    await talk.say("[error]")
                await talk.until("error", fatal=False)
            await talk.until("audio.done")
            assert talk.session.messages[0]["content"].startswith("[say Hello.] This was heard")
            await talk.say("[say Once more.] now")
            await talk.until("audio.done")
            assert talk.audio().endswith(speech("Once more."))
            assert talk.session.reconnects

    quick(work())


async def is_mute_until_called_again(sandbox: Sandbox) -> None:
    """The speech service says nothing, on connections that stand, until the next one comes."""
    sandbox.mute = True
    await sandbox.wait_for(sandbox.seen + 1)
    sandbox.mute = False


def said_in(messages: list[JSON]) -> str:
    """All that the user said in a conversation."""
    contents = [one["content"] for one in messages if one["role"] == "user"]
    texts = [[one] if isinstance(one, str) else [block["text"] for block in one] for one in contents]
    return " ".join(text for some in texts for text in some)


def heard_in(pcm: bytes, rate: int = 24_000) -> str:
    """The words of the sandbox's speech."""
    return " ".join(said.word for said in Ear(rate, iter(())).feed(pcm))


@pytest.mark.parametrize("detection", ["vad", "auto"])
def test_listening_that_falls_silent(detection: str) -> None:
    """Nothing comes of what the user says: it is heard once more, over another connection."""

    async def work() -> None:
        async with talking(patience=2.5, voice={**VAD, "input": {"turn_detection": detection}}) as talk:
            silence = asyncio.create_task(is_mute_until_called_again(talk.sandbox))
            await asyncio.sleep(0)
            await talk.say("[say Yes.] Is anybody there?")
            await silence
            await talk.until("input.committed", transcript="[say Yes.] Is anybody there?")
            await talk.until("audio.done")
            assert talk.session.reconnects == 1
            assert not talk.told("error")

    quick(work())


@pytest.mark.parametrize("detection", ["vad", "auto"])
def test_listening_that_stays_silent(detection: str) -> None:
    """After some attempts the client is told; and when it is back, all goes on."""

    async def work() -> None:
        async with talking(patience=1.0, voice={**VAD, "input": {"turn_detection": detection}}) as talk:
            talk.sandbox.mute = True
            saying = asyncio.create_task(talk.say("word " * 90))
            assert (await talk.until("error", fatal=False))["error"]["code"] == "stt_silent"
            assert talk.session.reconnects <= 3
            saying.cancel()
            talk._unsaid.clear()
            talk.sandbox.mute = False
            await asyncio.sleep(1.5)
            await talk.say("[say Here.] and now")
            await talk.until("audio.start")
            await talk.until("audio.done")
            assert [event["error"].get("code") for event in talk.told("error")].count("stt_silent") == 1

    quick(work())


@pytest.mark.parametrize("seconds", [5.0, 0.4], ids=["noise", "a cough"])
def test_sound_without_words_is_no_fault(seconds: float) -> None:
    """A speech service that says nothing of it is not taken for a dead one."""

    async def work() -> None:
        async with Sandbox() as sandbox:
            sandbox.transcripts.append("")
            async with talking(patience=1.0, sandbox=sandbox, voice=VAD) as talk:
                await talk.play(buzz(seconds))
                await asyncio.sleep(4)
                assert talk.told("vad.speech")
                assert not talk.told("error")
                assert talk.session.reconnects == 0

    quick(work())


@pytest.mark.parametrize("handshakes", ["refuse", "hang"])
@pytest.mark.parametrize("detection", ["vad", "auto"])
def test_listening_that_cannot_be_had_for_a_while(detection: str, handshakes: str) -> None:
    """The client is told within three seconds; what is said meanwhile is heard later."""

    async def work() -> None:
        async with talking(patience=2.5, voice={**VAD, "input": {"turn_detection": detection}}) as talk:
            await talk.say("[say Yes.] One two")
            await talk.until("transcript.delta", delta="[say Yes.] One two")
            talk.sandbox.handshakes = handshakes
            lost = now()
            talk.sandbox.drop_sockets()
            saying = asyncio.create_task(talk.say("three four five six seven eight nine ten eleven twelve"))
            await talk.until("error", fatal=False)
            assert now() - lost < 4.5  # of which 2.5 are waited
            await saying
            await asyncio.sleep(2)
            talk.sandbox.handshakes = ""
            while "twelve" not in said_in(talk.session.messages):
                await talk.until("input.committed")
            words = "[say Yes.] One two three four five six seven eight nine ten eleven twelve"
            assert said_in(talk.session.messages) == words
            assert [event.get("turn_id") for event in talk.told("error")].count(None) == 1

    quick(work())


NUMBERS = "One two three. Four five six seven. Eight nine ten eleven twelve."


@pytest.mark.parametrize(("text", "seconds"), [(NUMBERS, 0.0), (NUMBERS, 1.0), (NUMBERS.replace(".", ","), 0.4)])
def test_speech_that_falls_silent(text: str, seconds: float) -> None:
    """It goes on with the word at which it stopped, over another connection."""

    async def work() -> None:
        async with Sandbox() as sandbox:
            sandbox.pace = 0.05
            async with talking(patience=2.5, sandbox=sandbox, voice=VAD) as talk:
                await talk.send("input.text", text=f"[say {text}]")
                await (talk.until("audio.start") if seconds else talk.until("message_start"))
                await asyncio.sleep(seconds)
                began = now()
                await is_mute_until_called_again(sandbox)
                assert now() - began < 4.5
                await talk.until("audio.done")
                words = heard_in(talk.audio()).split()
                assert [word for word, _ in itertools.groupby(words)] == text.split()
                assert len(words) <= len(text.split()) + 1
                assert not talk.told("error")
                assert talk.session.reconnects == 1

    quick(work())


@pytest.mark.parametrize("fault", ["mute", "refuse", "hang", "too many"])
def test_speech_that_cannot_be_had_any_more(fault: str) -> None:
    """Within five seconds the client is told and listened to; and when it is back, all goes on."""

    async def work() -> None:
        async with talking(patience=2.5, voice=VAD) as talk:
            await talk.send("input.text", text="[say Ready.]")
            await talk.until("audio.done")
            if fault in ("refuse", "hang"):
                talk.sandbox.handshakes = fault
                talk.sandbox.drop_sockets()
            talk.sandbox.mute = fault == "mute"
            talk.sandbox.most_contexts = 0 if fault == "too many" else 15
            await talk.send("input.text", text="[say Now then.]")
            turn_id = (await talk.until("input.committed"))["turn_id"]
            began = now()
            assert not (await talk.until("error", turn_id=turn_id))["fatal"]
            await talk.until("state", state="listening")
            assert now() - began < 8  # of which 5 are waited
            talk.sandbox.mute, talk.sandbox.handshakes, talk.sandbox.most_contexts = False, "", 15
            await talk.send("input.text", text="[say Back.]")
            await talk.until("audio.done")
            assert heard_in(talk.audio()).endswith("Back.")

    quick(work())


def test_speech_that_is_refused_for_a_moment() -> None:
    """Others have all places of the plan, and one is free a little later."""

    async def work() -> None:
        async with talking(patience=2.5, voice=VAD) as talk:
            talk.sandbox.most_contexts = 0
            asyncio.get_running_loop().call_later(0.7, setattr, talk.sandbox, "most_contexts", 15)
            await talk.send("input.text", text="[say Now then.]")
            await talk.until("audio.done")
            assert heard_in(talk.audio()) == "Now then."
            assert not talk.told("error")

    quick(work())


def test_a_model_that_hangs_can_be_interrupted() -> None:
    """In each state before there is something to hear; a client that reports its playback is no sign of life."""

    async def work() -> None:
        async with talking(voice=NO_GRACE, timing=Timing(stall=4.0)) as talk:
            await talk.say("[hang] [words 5]")
            await talk.until("input.committed")
            await talk.say("Stop. [hang] [words 5]")
            await talk.until("response.interrupted")
            committed = await talk.until("input.committed")
            for _ in range(30):
                await talk.send("playback", response_id=talk.told("message_start")[-1]["response_id"], played_ms=0)
                await asyncio.sleep(0.2)
            error = await talk.until("error", turn_id=committed["turn_id"])
            assert error["error"]["code"] == "answer_stalled"
            await talk.until("state", state="listening")

    quick(work())


@pytest.mark.parametrize("kind", ["image/tiff", "video/mp4"])
def test_what_the_model_refuses_is_not_shown_to_it_again(kind: str) -> None:
    """Whether it is the provider that will not have it, or there is no form for it in its requests."""

    async def work() -> None:
        block = {"type": kind.split("/")[0], "source": {"type": "base64", "media_type": kind, "data": TINY_PNG}}
        async with talking(voice=VAD) as talk:
            await talk.send("input.content", content=[block])
            await talk.say("What is this?")
            error = await talk.until("error", fatal=False)
            assert error["error"]["type"] == "invalid_request_error"
            assert "no longer shown" in error["error"]["message"]
            await talk.until("state", state="listening")
            await talk.send("input.text", text="[say Never mind.]")
            await talk.until("audio.done")
            asked = talk.requests()[-1]["messages"][-1]["content"]
            assert [one["text"] for one in asked] == [
                f"[left out: {block['type']}]",
                "What is this?",
                "[say Never mind.]",
            ]

    quick(work())


# == Ends ==============================================================================================================


def test_nobody_is_there() -> None:
    """No audio and no message."""

    async def work() -> None:
        async with talking(voice=VAD, timing=Timing(idle=2.0)) as talk:
            await talk.send("input.text", text="[say Hello.]")
            await talk.until("audio.done")
            talk.microphone_on = False
            began = now()
            await talk.until("session.closed", reason="idle_timeout")
            assert now() - began > 0.5
            await talk.session.send(b"too late")
            await talk.send("input.text", text="too late")

    quick(work())


@pytest.mark.parametrize("reason", ["client", "max_duration", "draining"])
def test_the_end_of_a_session(reason: str) -> None:
    async def work() -> None:
        async with talking(voice=VAD, max_duration=6.0 if reason == "max_duration" else 7200.0) as talk:
            await talk.send("input.text", text="[words 50]")
            await talk.until("audio.start")
            if reason == "client":
                await talk.send("session.close")
            elif reason == "draining":
                talk.session.close(reason)
                talk.session.close("not this one")
            await talk.until("session.closed", reason=reason)
            assert talk.session.closed == reason

    quick(work())


MOMENTS = {
    "listening": ("vad.speech", "[say Hello there, my friend.]"),
    "grace": ("grace_period.started", "[wait 5]"),
    "writing": ("message_start", "[slow 1] [words 20]"),
    "speaking": ("audio.start", "[words 50]"),
    "a tool": ("tool_use", '[tool get_weather {"city":"Oslo"}]'),
    "a tool here": ("tool_use", "[tool wait {}]"),
}


@pytest.mark.parametrize("how", ["cancelled", "left"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_whoever_leaves_leaves_nothing_behind(moment: str, how: str) -> None:
    """In each state, cancelled or not: `talking` sees to it that no request and no task is left."""

    @vai.tool
    async def wait() -> str:
        await asyncio.Event().wait()
        return ""

    async def work() -> None:
        at, text = MOMENTS[moment]

        async def begin() -> None:
            async with talking(voice=VAD, tools=[WEATHER, wait]) as talk:
                saying = asyncio.create_task(talk.say(text) if moment == "listening" else typed(talk, text))
                try:
                    await talk.until(at)
                    if how == "cancelled":
                        raise asyncio.CancelledError
                finally:
                    saying.cancel()

        with contextlib.suppress(asyncio.CancelledError):
            await begin()

    async def typed(talk: Talk, text: str) -> None:
        await talk.send("input.text", text=text)

    quick(work())


def test_many_sessions_come_and_go() -> None:
    """One process listens for all of them; nothing of them is left."""

    async def work() -> None:
        async with Sandbox() as sandbox, Detectors("energy") as detectors:
            engine = vai.Direct(environ=sandbox.environ)
            config = read_config({"model": "anthropic/claude-sonnet-4-5", "voice": VAD})
            before = asyncio.all_tasks()

            async def one(number: int) -> None:
                async with engine.live_session(config, detectors=detectors) as session:
                    await session.send(speech("[say Hi.]", 16_000))
                    if number % 2:
                        await session.send({"type": "input.text", "text": "[words 30]"})
                    async for event in session:
                        if event.type == ("vad.speech", "audio_delta", "message_stop")[number % 3]:
                            break
                        if not number % 2 and event.type == "vad.silence":
                            break

            for _ in range(3):
                await asyncio.gather(*(one(number) for number in range(12)))
            await nothing_left(sandbox, before)
            await engine.close()

    quick(work())


def test_a_client_that_does_not_read() -> None:
    """What is said to nobody is kept up to a bound; no audio is made that nobody takes."""

    async def work() -> None:
        async with Sandbox() as sandbox, Detectors("energy") as detectors:
            engine = vai.Direct(environ=sandbox.environ)
            config = read_config({"model": "anthropic/claude-sonnet-4-5", "voice": VAD})
            async with engine.live_session(config, detectors=detectors) as session:
                await session.send({"type": "input.text", "text": "[words 600]"})
                await asyncio.sleep(3)
                assert len(session._out) < 400
                assert sum(len(response.audio) for response in session._responses.values()) < 1 << 20
                for _ in range(5000):
                    await session.send({"type": "nonsense"})
                assert session.closed == "slow_client"
                events = [event async for event in session]
                assert events[-1].get("reason") == "slow_client"  # type: ignore[union-attr]
            await engine.close()

    quick(work())


# == Clients ===========================================================================================================


@pytest.mark.parametrize("blocking", [False, True], ids=["async", "sync"])
@pytest.mark.parametrize("mode", ["direct", "gateway"])
async def test_clients(mode: str, blocking: bool, serve: Serve, sandbox: Sandbox) -> None:
    """The same events in both modes, with `await` and without; a function is called here."""
    cities: list[str] = []

    @vai.tool
    def get_weather(city: str) -> str:
        cities.append(city)
        return "mild"

    options = (
        {"base_url": (await serve()).url, "api_key": KEY}
        if mode == "gateway"
        else {"engine": vai.Direct(environ=sandbox.environ)}
    )
    fields: Any = {"model": "anthropic/claude-sonnet-4-5", "voice": "a-voice", "tools": [get_weather]}
    typed = {"type": "input.text", "text": '[tool get_weather {"city":"Oslo"}] [then] [say Mild.]'}
    events: list[LiveEvent | LiveAudio] = []

    async def talk() -> None:
        async with vai.AsyncClient(**options) as client, client.live(**fields) as session:
            await session.send(bytes(641))
            await session.send(typed)
            async for event in session:
                events.append(event)
                if event.type == "audio.done":
                    session.close()
            assert session.closed == "client"

    def talk_without_await() -> None:
        with vai.Client(**options) as client, client.live(**fields) as session:
            session.send(bytes(641))
            session.send(typed)
            for event in session:
                events.append(event)
                if event.type == "audio.done":
                    session.close()
            assert session.closed == "client"

    await (asyncio.to_thread(talk_without_await) if blocking else talk())
    assert cities == ["Oslo"]
    pieces = [event for event in events if isinstance(event, LiveAudio)]
    assert b"".join(piece.data for piece in pieces) == speech("Mild.")
    start = next(event for event in events if event.type == "audio.start")
    assert {piece.response_id for piece in pieces} == {start.to_wire()["response_id"]}
    order = ["session.created", "input.committed", "tool_use", "audio.start", "audio_delta", "audio.done"]
    told = [event.type for event in events]
    assert [type for type in dict.fromkeys(told) if type in order] == order
    assert told[-1] == "session.closed"


@pytest.mark.parametrize(
    ("fields", "fault", "param"),
    [
        ({"model": "nope"}, vai.InvalidRequestError, "config.model"),
        ({"voice": {"vad": {"model": "nope"}}}, vai.InvalidRequestError, "config.voice.vad.model"),
        ({"voice": {"output": {"speed": 9.0}}}, vai.InvalidRequestError, "config.voice.output.speed"),
        ({"audio_in": {"sample_rate": 7}}, vai.InvalidRequestError, "config.audio_in.sample_rate"),
        ({"temperature": 5.0}, vai.InvalidRequestError, "config.temperature"),
        ({"messages": [{"role": "nobody"}]}, vai.InvalidRequestError, "config.messages[0].role"),
        ({"provider_keys": {"cartesia": "bad-key"}}, vai.AuthenticationError, None),
        ({"voise": 1}, TypeError, None),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("mode", ["direct", "gateway"])
async def test_what_cannot_be_had(
    mode: str, fields: Any, fault: Any, param: str | None, serve: Serve, sandbox: Sandbox
) -> None:
    """It is raised where the session is opened, in both modes alike, and nothing stays open."""
    options = (
        {"base_url": (await serve()).url, "api_key": KEY}
        if mode == "gateway"
        else {"engine": vai.Direct(environ=sandbox.environ)}
    )
    async with vai.AsyncClient(**options) as client:
        with pytest.raises(fault) as raised:
            async with client.live(**{"model": "anthropic/claude-sonnet-4-5", **fields}):
                raise AssertionError
        assert getattr(raised.value, "param", None) == param
        assert "bad-key" not in str(raised.value)
    assert not sandbox.open


def gateway_that(
    talks: Callable[[web.WebSocketResponse], Awaitable[None]], **options: Any
) -> contextlib.AbstractAsyncContextManager[str]:
    """The URL of a gateway whose sessions go on like this after `session.created`."""

    async def talk(socket: web.WebSocketResponse) -> None:
        assert (await socket.receive_json())["config"]["model"] == "anthropic/any"
        await socket.send_json({"type": "session.created", "session_id": "live_1", "config": {}})
        await talks(socket)

    return websocket_server(talk, **options)


@pytest.mark.parametrize("last", [None, "not JSON", "[1]", '{"type": 5}'], ids=["hangs up", "text", "list", "number"])
async def test_a_gateway_that_breaks_off(last: str | None) -> None:
    """The events end all the same, and what is sent then goes nowhere."""

    async def talk(socket: web.WebSocketResponse) -> None:
        await socket.send_json({"type": "audio.start", "response_id": "resp_1", "sample_rate": 24_000})
        await socket.send_bytes(bytes(4))
        await (socket.close(code=1011) if last is None else socket.send_str(last))

    async with (
        gateway_that(talk) as url,
        vai.AsyncClient(base_url=url) as client,
        client.live(model="anthropic/any") as session,
    ):
        events = [event async for event in session]
        told = ["session.created", "audio.start", "audio_delta", "session.closed"]
        assert [event.type for event in events] == told
        assert events[-1].to_wire()["reason"] == session.closed == "connection_broken"
        await session.send(bytes(2))


async def test_a_gateway_that_is_gone_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers no ping: the connection is taken for broken."""
    monkeypatch.setattr("vai.GatewayLive._HEARTBEAT", 0.05)

    async def talk(socket: web.WebSocketResponse) -> None:
        while (await socket.receive()).type is not WSMsgType.CLOSE:
            pass

    async with (
        gateway_that(talk, autoping=False) as url,
        vai.AsyncClient(base_url=url) as client,
        client.live(model="anthropic/any") as session,
    ):
        assert [event.type async for event in session] == ["session.created", "session.closed"]
        assert session.closed == "connection_broken"


@pytest.mark.parametrize(
    "end",
    [
        {"type": "grace_period.extended", "turn_id": "turn_1"},
        {"type": "response.interrupted", "turn_id": "turn_1", "response_id": "resp_1"},
        {"type": "error", "error": {}, "fatal": False, "turn_id": "turn_1", "response_id": "resp_1"},
    ],
    ids=lambda end: end["type"],
)
async def test_the_end_of_a_turn_at_a_gateway_cancels_its_functions(end: JSON) -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()
    said: list[Any] = []

    @vai.tool
    async def wait() -> str:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return ""

    async def talk(socket: web.WebSocketResponse) -> None:
        use = {"type": "tool_use", "response_id": "resp_1", "id": "call_1", "name": "wait", "input": {}}
        await socket.send_json(use)
        await began.wait()
        await socket.send_json({"type": "error", "error": {}, "fatal": False})  # of a message: it ends nothing
        await socket.send_json({**end, "last": True})
        said.extend([message async for message in socket])

    async with (
        gateway_that(talk) as url,
        vai.AsyncClient(base_url=url) as client,
        client.live(model="anthropic/any", tools=[wait]) as session,
    ):
        async for event in session:
            assert not cancelled.is_set()
            if event.to_wire().get("last"):
                break
        await cancelled.wait()
    assert not said


async def test_a_client_that_is_closed_ends_its_sessions(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """In whatever they are; one that is iterated is told."""
    client = vai.AsyncClient(engine=vai.Direct(environ=sandbox.environ))
    events: list[str] = []
    async with client.live(model="anthropic/claude-sonnet-4-5", voice="a-voice") as session:
        await session.send({"type": "input.text", "text": "[words 50]"})
        async for event in session:
            events.append(event.type)
            if event.type == "audio_delta" and not session.closed:
                await client.close()
        assert session.closed == "client"
    assert events[-1] == "session.closed"
    assert not caplog.records


# == Messages ==========================================================================================================

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
TYPES = st.sampled_from(["input.commit", "input.interrupt", "input.text", "input.content", "tool_result", "playback"])
FIELDS = st.sampled_from(["transcript", "text", "content", "tool_use_id", "is_error", "response_id", "played_ms"])


@given(st.dictionaries(FIELDS, ANYTHING, max_size=4), TYPES | ANYTHING)
def test_any_message_is_read_or_refused(fields: JSON, kind: Any) -> None:
    """Nothing else is raised, whatever comes."""
    with contextlib.suppress(vai.InvalidRequestError):
        read_message({**fields, "type": kind})
