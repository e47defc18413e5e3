"""The tool loop: limits, hooks, events, interruptions, what tools return and how they fail, and what is left of a run.

However a run ends, its history goes to any of the seven providers, which the sandbox plays strictly.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import re
import signal
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Coroutine, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from test_switching import MODELS as EVERY_MODEL
from test_vai import MODELS, World, told

import sandbox
import vai

JSON = dict[str, Any]
CLAUDE = "anthropic/claude-sonnet-4-5"
PNG = base64.b64decode(sandbox.picture())
both_kinds = pytest.mark.parametrize("kind", ["async", "sync"])
both_modes = pytest.mark.parametrize("mode", ["direct", "proxy"])
WAYS = ("run", "run_stream", "sync run", "sync run_stream")
ways = pytest.mark.parametrize("way", WAYS)
partials = pytest.mark.parametrize("partial", ["discard", "save", "marked"])


@pytest.fixture(scope="module")
def running() -> Iterator[World]:
    world = World()
    with pytest.MonkeyPatch.context() as patch:
        for adapter in vai.PROVIDERS.values():
            for name in (*adapter.key_env, *adapter.url_env):
                patch.delenv(name, raising=False)
        for name, value in world.sandbox.environ.items():
            patch.setenv(name, value)
        yield world
    world.close()


@pytest.fixture
def world(running: World) -> World:
    running.before, running.threads_before = running.sandbox.seen, set(threading.enumerate())
    return running


# == Tools and runs ====================================================================================================


@vai.tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"Rain in {city}."


@vai.tool
async def distance(city: str, km: int = 0) -> int:
    """How far it is to a city."""
    return km + len(city)


@vai.tool
def fail() -> None:
    """Fail."""
    raise LookupError("nothing here")


@vai.tool
async def stuck() -> None:
    """Never come back."""
    await asyncio.Event().wait()


@vai.tool
def picture() -> list[Any]:
    """Show a picture."""
    return ["Look:", PNG]


TOOLS = [weather, distance, fail, stuck, picture]
OSLO, BERGEN, NARVIK = (f'[tool weather {{"city":"{city}"}}]' for city in ("Oslo", "Bergen", "Narvik"))
NO_MORE = "Not run: no more tool calls are allowed. Answer with what you have."


class Ran(NamedTuple):
    """What came of a run: its events, as far as there were any, its result and its error."""

    events: list[vai.RunEvent]
    result: vai.RunResult
    error: vai.Error | None = None

    @property
    def results(self) -> list[Any]:
        """What went back to the model, in order."""
        return [block["content"] for block in blocks(self.result.messages, "tool_result")]

    @property
    def order(self) -> str:
        """The events of the run itself, with `answer` for those of an answer."""
        names = (event.type for event in self.events if event.type != "ping")
        own = ("step_start", "tool_call_start", "tool_result", "step_complete", "interrupted", "run_complete")
        return " ".join(name for name, _ in itertools.groupby(name if name in own else "answer" for name in names))


Watch = Callable[[Any, Any], Any]


async def ran(
    world: World, way: str, messages: Any, /, *, mode: str = "direct", watch: Watch | None = None, **fields: Any
) -> Ran:
    """Run to the end, whichever way. `watch` sees the run and each of its events."""
    request: JSON = {"model": CLAUDE, "tools": TOOLS, "messages": messages, **fields}
    streamed: list[vai.RunEvent] = []
    try:
        if way == "run":
            async with vai.AsyncClient(**world.options(mode), max_retries=0) as client:
                return Ran([], await client.messages.run(**request))
        if way == "sync run":
            with vai.Client(**world.options(mode), max_retries=0) as blocking:
                return Ran([], blocking.messages.run(**request))
        if way == "run_stream":
            async with vai.AsyncClient(**world.options(mode), max_retries=0) as client:
                async with client.messages.run_stream(**request) as run:
                    async for event in run:
                        streamed.append(event)
                        if watch:
                            watch(run, event)
                    return Ran(streamed, run.result)
        with vai.Client(**world.options(mode), max_retries=0) as blocking:
            with blocking.messages.run_stream(**request) as running:
                for event in running:
                    streamed.append(event)
                    if watch:
                        watch(running, event)
                return Ran(streamed, running.result)
    except vai.Error as fault:
        return Ran(streamed, fault.result, fault)


def blocks(messages: list[JSON], kind: str) -> list[JSON]:
    turns = [turn["content"] for turn in messages if isinstance(turn["content"], list)]
    return [block for content in turns for block in content if block["type"] == kind]


def check_pairs(messages: list[JSON]) -> None:
    """Each turn with calls is followed by exactly their results, in order."""
    for turn, after in zip(messages, [*messages[1:], {"role": "none", "content": []}], strict=True):
        called = [block["id"] for block in blocks([turn], "tool_use")]
        assert [block["tool_use_id"] for block in blocks([after], "tool_result")] == called
    results = [block["tool_use_id"] for block in blocks(messages, "tool_result")]
    assert len(set(results)) == len(results)


async def check_history(messages: list[JSON], tools: list[Any] = TOOLS, models: Any = EVERY_MODEL) -> None:
    """The history is whole, and every model takes it with a user turn after it."""
    check_pairs(messages)
    turns = going_on(messages)
    async with vai.AsyncClient(max_retries=0) as client, asyncio.timeout(10):
        asked = [client.messages.create(model=model, messages=turns, tools=tools) for model in models]
        assert {answer.text for answer in await asyncio.gather(*asked)} == {"Go on."}


def going_on(messages: list[JSON]) -> list[JSON]:
    """The history with a user turn after it. What the sandbox was told and did not do yet, it is to do no more."""
    said = [
        turn["role"] == "assistant" and (texts([turn])[0].strip() or blocks([turn], "tool_use")) for turn in messages
    ]
    answered = max((number for number, something in enumerate(said, 1) if something), default=0)
    waiting = [
        turn if isinstance(turn["content"], list) else {**turn, "content": turn["content"].replace("[", "(")}
        for turn in messages[answered:]
    ]
    return [*messages[:answered], *waiting, {"role": "user", "content": "[say Go on.]"}]


def texts(messages: list[JSON]) -> list[str]:
    """Who said what, as far as it is text."""
    said = []
    for turn in messages:
        content = turn["content"]
        said.append(content if isinstance(content, str) else "".join(block.get("text", "") for block in content))
    return said


# == Why runs end ======================================================================================================


class Case(NamedTuple):
    prompt: str
    stop_reason: str
    results: list[str]
    text: str | None  # of the last answer; None where there is none
    turns: int
    fields: JSON = {}  # noqa: RUF012
    calls: int | None = None  # that were run, where not all were
    events: str = ""


ONE = "step_start answer step_complete"
WITH_TOOLS = "step_start answer tool_call_start tool_result step_complete"
HANG = "[words 3][hang]"
RAIN = [f"Rain in {city}." for city in ("Oslo", "Bergen", "Narvik")]
NOT_RUN = "Not run: the limit of {} is reached."
CASES: dict[str, Case] = {
    "no tools": Case("[say Hi.]", "end_turn", [], "Hi.", 1, events=f"{ONE} run_complete"),
    "calls in two steps": Case(
        f"{OSLO}[then]{BERGEN}[then][say Wet.]", "end_turn", RAIN[:2], "Wet.", 3,
        events=f"{WITH_TOOLS} {WITH_TOOLS} {ONE} run_complete",
    ),
    "text with a call": Case(f"[say Well.]{OSLO}[then][say Wet.]", "end_turn", RAIN[:1], "Wet.", 2),
    "parallel": Case(f"{OSLO}{BERGEN}{NARVIK}[then][say Wet.]", "end_turn", RAIN, "Wet.", 2),
    "serial": Case(
        f"{OSLO}{BERGEN}[then][say Wet.]", "end_turn", RAIN[:2], "Wet.", 2, {"parallel_tools": False},
        events=f"{WITH_TOOLS.replace('step_complete', '')}tool_call_start tool_result step_complete {ONE} run_complete",
    ),
    "max_tokens": Case("[say One two three.]", "max_tokens", [], "One two", 1, {"max_tokens": 2}),
    "max_tokens in a call": Case(
        f"{OSLO}[stop max_tokens]", "max_tokens", ["Not run: the answer ended with max_tokens."], "", 1, calls=0
    ),
    "refusal": Case("[refuse]", "refusal", [], "", 1),
    "refusal after a call": Case(f"{OSLO}[then][refuse]", "refusal", RAIN[:1], "", 2),
    "context window": Case(
        "[say So][stop model_context_window_exceeded]", "model_context_window_exceeded", [], "So", 1
    ),
    "stop_sequence": Case("[say one STOP two]", "stop_sequence", [], "one ", 1, {"stop_sequences": ["STOP"]}),
    "max_tool_calls": Case(
        f"{OSLO}{BERGEN}{NARVIK}[then][say Wet.]", "max_tool_calls", [*RAIN[:2], NO_MORE], "Wet.", 2,
        {"max_tool_calls": 2}, 2,
    ),
    "max_tool_calls=0": Case(
        f"{OSLO}{BERGEN}[then][say Wet.]", "max_tool_calls", [NO_MORE] * 2, "Wet.", 2, {"max_tool_calls": 0}, 0,
        f"{ONE} {ONE} run_complete",
    ),
    "exactly max_tool_calls": Case(
        f"{OSLO}{BERGEN}[then][say Wet.]", "end_turn", RAIN[:2], "Wet.", 2, {"max_tool_calls": 2}
    ),
    "max_tool_calls in the second step": Case(
        f"{OSLO}[then]{BERGEN}[then][say Wet.]", "max_tool_calls", [RAIN[0], NO_MORE], "Wet.", 3,
        {"max_tool_calls": 1}, 1,
    ),
    "max_turns=1": Case(
        f"{OSLO}[then][say Wet.]", "max_turns", [NOT_RUN.format("turns")], "", 1, {"max_turns": 1}, 0
    ),
    "max_turns=2": Case(
        f"{OSLO}[then]{BERGEN}[then]", "max_turns", [RAIN[0], NOT_RUN.format("turns")], "", 2, {"max_turns": 2}, 1
    ),
    "exactly max_turns": Case(f"{OSLO}[then][say Wet.]", "end_turn", RAIN[:1], "Wet.", 2, {"max_turns": 2}),
    "max_turns with max_tool_calls": Case(
        f"{OSLO}{BERGEN}[then]", "max_turns", [NOT_RUN.format("turns")] * 2, "", 1,
        {"max_turns": 1, "max_tool_calls": 1}, 0,
    ),
    "max_total_tokens": Case(
        f"{OSLO}[then]", "max_total_tokens", [NOT_RUN.format("tokens")], "", 1, {"max_total_tokens": 1}, 0
    ),
    "max_total_tokens not needed": Case("[say Hi.]", "end_turn", [], "Hi.", 1, {"max_total_tokens": 1}),
    "timeout before it begins": Case(HANG, "timeout", [], None, 0, {"timeout": 0}, events="step_start run_complete"),
    "timeout in an answer": Case(HANG, "timeout", [], None, 1, {"timeout": 0.1}),
    "timeout in a tool": Case(
        f"{OSLO}[tool stuck][then]", "timeout", [RAIN[0], "Not finished: time is up."], "", 1, {"timeout": 0.3}
    ),
    "timeout in a later answer": Case(f"{OSLO}[then]{HANG}", "timeout", RAIN[:1], "", 2, {"timeout": 0.3}),
    "stop_when": Case(
        f"{OSLO}[then]", "custom", ["Not run: the run was stopped."], "", 1, {"stop_when": lambda answer: True}, 0
    ),
    "stop_when of the second answer": Case(
        f"{OSLO}[then][say Wet.]{BERGEN}[then]", "custom", [RAIN[0], "Not run: the run was stopped."], "Wet.", 2,
        {"stop_when": lambda answer: "Wet" in answer.text}, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", ["run_stream", "sync run"])
@pytest.mark.parametrize("name", CASES)
async def test_why_a_run_ends(world: World, name: str, way: str) -> None:
    """The reason, the answer, what was counted, what went back for each call, and the events, whichever way."""
    case = CASES[name]
    out = await ran(world, way, case.prompt, **case.fields)
    result = out.result
    assert (result.stop_reason, out.results) == (case.stop_reason, case.results)
    assert (result.turn_count, result.tool_call_count) == (
        case.turns, len(case.results) if case.calls is None else case.calls
    )  # fmt: skip
    assert (result.response.text if result.response else None) == case.text
    assert result.text == (case.text or "")
    assert result.usage.total_tokens >= sum(step.response.usage.total_tokens for step in result.steps)
    if case.events and out.events:
        assert out.order == case.events
    errors = [block for block in blocks(result.messages, "tool_result") if block.get("is_error")]
    assert all("Not " in block["content"] for block in errors)
    offered = [body.get("tool_choice") for body in world.bodies]
    assert offered[-1:] in ([], [{"type": "none"} if case.stop_reason == "max_tool_calls" else None])
    assert len(world.requests) == case.turns
    if name not in SEEN:
        SEEN.add(name)
        await check_history(result.messages)


SEEN: set[str] = set()  # the cases whose history went to all models


@pytest.mark.parametrize("model", EVERY_MODEL)
async def test_tools_are_off_for_the_last_answer(world: World, model: str) -> None:
    """Once the calls are used up, no provider is offered a tool, and its answer is the response."""
    out = await ran(world, "run_stream", f"{OSLO}{BERGEN}[then]", model=model, max_tool_calls=1)
    assert (out.result.stop_reason, out.results) == ("max_tool_calls", [RAIN[0], NO_MORE])
    assert out.result.text.startswith("The tool says: Rain in Oslo.")


async def test_pause_turn_goes_on() -> None:
    """A paused answer goes back as it is, and counts as a turn of its own."""
    model = vai.FakeModel(paused("Let me see."), "There.")
    async with vai.AsyncClient(engine=model) as client:
        result = await client.messages.run(model=CLAUDE, messages="Hi")
        assert (result.stop_reason, result.turn_count, result.text) == ("end_turn", 2, "There.")
        assert texts(model.calls[1]["messages"]) == ["Hi", "Let me see."]
        client._engine = vai.FakeModel(paused("Let me see."))
        result = await client.messages.run(model=CLAUDE, messages="Hi", max_turns=1)
        assert (result.stop_reason, texts(result.messages)) == ("max_turns", ["Hi", "Let me see."])


def paused(said: str, *more: JSON) -> vai.Message:
    content = [vai.text(said), *more]
    return vai.Message.model_validate(
        {"id": "msg_1", "model": CLAUDE, "content": content, "stop_reason": "pause_turn", "usage": {}}
    )


@pytest.mark.parametrize("then", ["interrupt", "cancel", "fail", "limit"])
async def test_a_pause_that_does_not_go_on(world: World, then: str) -> None:
    """A search that the provider had not run when it paused is not left in the history without its result."""
    search = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "rain"}}
    model = vai.FakeModel(
        paused("Let me see.", search), [vai.text("It is now"), vai.StreamTruncated()] if then == "fail" else "It is now"
    )

    async with vai.AsyncClient(engine=model, max_retries=0) as client:
        options: Any = {"max_turns": 2 if then != "limit" else 1}
        async with client.messages.run_stream(model=CLAUDE, messages="Hi", **options) as run:
            with contextlib.suppress(vai.StreamTruncated):
                async for event in run:
                    if event.type == "content_block_delta" and run.result.turn_count == 2 and then == "cancel":
                        run.cancel()
                    elif event.type == "content_block_delta" and run.result.turn_count == 2 and then == "interrupt":
                        run.interrupt("Stop.", partial="save")
    await check_history(run.result.messages, models=[CLAUDE])


def test_limits_are_checked() -> None:
    client = vai.Client(engine=vai.FakeModel())
    for name, value in {"max_tool_calls": -1, "max_turns": 0, "max_total_tokens": 0, "timeout": -1}.items():
        options: Any = {name: value}
        with pytest.raises(ValueError, match=name):
            client.messages.run(model=CLAUDE, messages="Hi", **options)
    misspelt: Any = {"max_tool_call": 1}
    with pytest.raises(TypeError, match="did you mean max_tool_calls"):
        client.messages.run(model=CLAUDE, messages="Hi", **misspelt)
    client.close()


ENDS = {
    "error 400": vai.InvalidRequestError,
    "error 429": vai.RateLimitError,
    "error 529": vai.OverloadedError,
    "break_off": vai.ProviderError,
    "reset": vai.ProviderError,
}


@ways
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("steps", [0, 1])
async def test_an_error_has_the_result_so_far(world: World, end: str, steps: int, way: str) -> None:
    out = await ran(world, way, f"{OSLO}[then]" * steps + f"[words 9][{end}]")
    assert isinstance(out.error, ENDS[end])
    assert (out.result.stop_reason, len(out.result.steps), out.result.turn_count) == ("error", steps, steps + 1)
    assert out.results == RAIN[:steps]
    assert "run_complete" not in out.order
    await check_history(out.result.messages, models=[CLAUDE, MODELS["openai"]])


async def test_a_run_that_is_left() -> None:
    """`run.result` is there in every case: before it begins, and after leaving in the middle."""
    client = vai.AsyncClient(engine=vai.FakeModel("One two.", "Three."))
    run = client.messages.run_stream(model=CLAUDE, messages="Hi")
    with pytest.raises(RuntimeError, match="inside"):
        await anext(run)
    async with run:
        async for text in run.text:
            assert text == "One"
            break
    assert (run.result.stop_reason, texts(run.result.messages)) == ("cancelled", ["Hi"])
    assert [event async for event in run] == []
    async with client.messages.run_stream(model=CLAUDE, messages="Hi") as run:
        pass
    assert (run.result.stop_reason, run.result.messages) == (None, [])  # nothing was asked


# == Hooks =============================================================================================================


@ways
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_hooks(world: World, asynchronous: bool, way: str) -> None:
    """Each sees what it is for, once for each time, and may be async."""
    seen: list[Any] = []

    def hook(name: str, *values: Any) -> None:
        seen.append((name, *values))

    async def later(name: str, *values: Any) -> None:
        await asyncio.sleep(0)
        hook(name, *values)

    made: Any = later if asynchronous else hook
    hooks = {name: functools.partial(made, name) for name in ("before_call", "after_response", "on_tool_call")}
    out = await ran(
        world, way, f"{OSLO}[tool fail][then][say Wet.]", **hooks, stop_when=functools.partial(made, "stop_when"),
        parallel_tools=False,
    )  # fmt: skip
    assert [entry[0] for entry in seen] == [
        *("before_call", "after_response", "stop_when", "on_tool_call", "on_tool_call"),
        *("before_call", "after_response", "stop_when"),
    ]
    requests = [values[0] for name, *values in seen if name == "before_call"]
    assert [len(request["messages"]) for request in requests] == [1, 3]
    assert [values for name, *values in seen if name == "on_tool_call"] == [
        ["weather", {"city": "Oslo"}, "Rain in Oslo.", None],
        ["fail", {}, None, "LookupError: nothing here"],
    ]
    answers = [values[0] for name, *values in seen if name == "after_response"]
    assert answers == [step.response for step in out.result.steps]


@ways
@pytest.mark.parametrize("returns", [False, True])
async def test_before_call_changes_the_request(world: World, returns: bool, way: str) -> None:
    """In place or by another one; what it changes is for that request alone."""

    def changed(request: JSON) -> JSON | None:
        body = dict(request) if returns else request
        body["system"] = f"Turn {len(request['messages'])}"
        body["messages"] = [*request["messages"][:-1], {**request["messages"][-1]}]
        body["messages"][0]["content"] += "[say changed]"
        return body if returns else None

    out = await ran(world, way, f"{OSLO}[then][say Wet.]", before_call=changed)
    assert [body["system"] for body in world.bodies] == ["Turn 1", "Turn 3"]
    assert texts(out.result.messages)[0] == f"{OSLO}[then][say Wet.]"
    assert all("[say changed]" in json.dumps(body["messages"]) for body in world.bodies)
    assert out.result.text == "Wet.changed"


@ways
@pytest.mark.parametrize("name", ["before_call", "after_response", "stop_when", "on_tool_call"])
async def test_a_hook_that_raises_ends_the_run(world: World, name: str, way: str) -> None:
    """What it raises goes to the caller, and the tools that run are ended."""

    def raising(*values: Any) -> None:
        raise ZeroDivisionError(name)

    with pytest.raises(ZeroDivisionError, match=name):
        await ran(world, way, f"{OSLO}[tool stuck][then]", **{name: raising})
    assert len(asyncio.all_tasks()) == 1


@ways
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
async def test_a_tool_is_forced_once(world: World, choice: JSON, way: str) -> None:
    """For ever would be a loop without an end."""
    choice = {**choice, "disable_parallel_tool_use": True}
    out = await ran(world, way, "Rain?", tool_choice=choice, tools=[weather])
    assert (out.result.stop_reason, out.result.tool_call_count) == ("end_turn", 1)
    sent = [body["tool_choice"] for body in world.bodies]
    assert sent == [choice, {"type": "auto", "disable_parallel_tool_use": True}]


# == Tools side by side ================================================================================================


@both_kinds
async def test_results_come_as_they_finish_and_stand_in_order(world: World, kind: str) -> None:
    """A call that is slow holds up no other one; in the history the results are in the order of the calls."""
    went = threading.Event()

    @vai.tool
    def first() -> str:
        assert went.wait(5)
        return "one"

    @vai.tool
    def second() -> str:
        return "two"

    def watch(run: Any, event: vai.RunEvent) -> None:
        if event.type == "tool_result":
            went.set()

    way = "run_stream" if kind == "async" else "sync run_stream"
    out = await ran(world, way, "[tool first][tool second][then][say So.]", tools=[first, second], watch=watch)
    assert [event.call.name for event in out.events if event.type == "tool_result"] == ["second", "first"]
    assert out.results == ["one", "two"]


@both_kinds
async def test_every_call_has_its_events(world: World, kind: str) -> None:
    """A result that comes while the caller is busy with another one is told of all the same."""
    both = [threading.Event(), threading.Event()]

    @vai.tool
    async def quick() -> int:
        return 1

    @vai.tool
    async def next_one() -> int:
        await asyncio.to_thread(both[0].wait, 5)
        asyncio.get_running_loop().call_later(0.02, both[1].set)
        return 2

    def busy() -> None:
        both[0].set()
        assert both[1].wait(5)

    tools, prompt = [quick, next_one], "[tool quick][tool next_one][then][say So.]"
    names = []
    if kind == "async":
        async with vai.AsyncClient() as client:
            async with client.messages.run_stream(model=CLAUDE, messages=prompt, tools=tools) as run:
                async for event in run:
                    if event.type == "tool_result":
                        names.append(event.call.name)
                        await asyncio.to_thread(busy)
    else:
        with vai.Client() as blocking:
            with blocking.messages.run_stream(model=CLAUDE, messages=prompt, tools=tools) as running:
                for event in running:
                    if event.type == "tool_result":
                        names.append(event.call.name)
                        busy()
    assert names == ["quick", "next_one"]


@both_kinds
@pytest.mark.parametrize("parallel", [True, False])
async def test_parallel_and_serial(world: World, parallel: bool, kind: str) -> None:
    """Tools of one answer run side by side unless told otherwise."""
    at_once, most = 0, 0
    meeting = asyncio.Barrier(3)

    @vai.tool
    async def meet() -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        if parallel:
            async with asyncio.timeout(5):
                await meeting.wait()
        await asyncio.sleep(0)
        at_once -= 1

    way = "run" if kind == "async" else "sync run"
    out = await ran(world, way, "[tool meet]" * 3 + "[then][say So.]", tools=[meet], parallel_tools=parallel)
    assert (out.results, most) == (["null"] * 3, 3 if parallel else 1)


@ways
async def test_time_limits_of_tools(world: World, way: str) -> None:
    """A tool's own limit stands over the run's. A thread that goes on after its limit does no harm."""
    free, ended = threading.Event(), threading.Event()

    @vai.tool
    def threaded() -> str:
        free.wait(5)
        ended.set()
        return "too late"

    @vai.tool(timeout=0.02)
    async def short() -> None:
        await asyncio.Event().wait()

    @vai.tool(timeout=5)
    async def long() -> str:
        await asyncio.sleep(0.1)
        return "in time"

    def watch(run: Any, event: vai.RunEvent) -> None:
        if event.type == "step_complete":
            free.set()

    out = await ran(
        world, way, "[tool threaded][tool short][tool long][then][say So.]", tools=[threaded, short, long],
        tool_timeout=0.05, watch=watch,
    )  # fmt: skip
    free.set()
    assert ended.wait(5)
    late = "The tool took longer than {} seconds."
    assert out.results == [late.format("0.05"), late.format("0.02"), "in time"]
    assert (out.result.stop_reason, out.result.text) == ("end_turn", "So.")
    calls = out.result.steps[0].tool_calls
    assert [(call.output, call.error) for call in calls] == [
        (None, out.results[0]), (None, out.results[1]), ("in time", None)
    ]  # fmt: skip


# == What tools return, and how they fail ==============================================================================


class Place(BaseModel):
    city: str


@dataclasses.dataclass
class Point:
    x: int


class Mute:
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


IMAGE = vai.image(PNG)
ROUND: list[Any] = []
ROUND.append(ROUND)
RETURNS: dict[str, tuple[Any, Any]] = {
    "text": ("Rain.", "Rain."),
    "no text": ("", ""),
    "number": (7, "7"),
    "bool": (True, "true"),
    "none": (None, "null"),
    "dict": ({"a": [1, "ä"]}, '{"a": [1, "ä"]}'),
    "model": (Place(city="Oslo"), '{"city": "Oslo"}'),
    "models": ([Place(city="Oslo")], '[{"city": "Oslo"}]'),
    "dataclass": (Point(3), '{"x": 3}'),
    "texts": (["a", "b"], '["a", "b"]'),
    "set": ({4}, "[4]"),
    "bytes": (b"\x00\x01", '"AAE="'),
    "image bytes": (PNG, [IMAGE]),
    "image": (IMAGE, [IMAGE]),
    "text and image": (["Look:", IMAGE], [vai.text("Look:"), IMAGE]),
    "blocks": ([vai.text("a"), vai.text("b")], [vai.text("a"), vai.text("b")]),
    "not serialisable": (Case, json.dumps(str(Case))),
    "something with a type": ({"type": "document", "title": "Q3"}, '{"type": "document", "title": "Q3"}'),
    "half a character": ("\ud800!", "\ud800!"),
}


@both_kinds
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", RETURNS)
async def test_what_tools_return(world: World, name: str, asynchronous: bool, kind: str) -> None:
    value, content = RETURNS[name]

    def give() -> Any:
        return value

    async def give_later() -> Any:
        return value

    tool = vai.tool(give_later if asynchronous else give, name="give")
    way = "run" if kind == "async" else "sync run"
    out = await ran(world, way, "[tool give][then][say So.]", tools=[tool])
    assert out.error is None
    assert (out.results, out.result.text) == ([content], "So.")
    assert out.result.steps[0].tool_calls[0].output is value
    if kind == "sync" and asynchronous:
        await check_history(out.result.messages, [tool])


FAILS: dict[str, tuple[BaseException | Any, str]] = {
    "ValueError": (ValueError("No such city."), "No such city."),
    "KeyError": (KeyError("x"), "KeyError: 'x'"),
    "TimeoutError": (TimeoutError("mine"), "TimeoutError: mine"),
    "CancelledError": (asyncio.CancelledError(), "The tool was cancelled."),
    "StopIteration": (StopIteration(1), "StopIteration"),
    "StopAsyncIteration": (StopAsyncIteration(1), "StopAsyncIteration"),
    "SystemExit": (SystemExit(3), "SystemExit: 3"),
    "returns a circle": (ROUND, "Circular reference"),
    "returns what has no text": (Mute(), "RuntimeError: no words|Unable to serialize"),
}


@both_kinds
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", FAILS)
async def test_how_tools_fail(world: World, name: str, asynchronous: bool, kind: str) -> None:
    """Whatever goes wrong is for the model to read, and the other tools and the run go on."""
    fault, says = FAILS[name]

    def give() -> Any:
        if isinstance(fault, BaseException):
            raise fault
        return fault

    async def give_later() -> Any:
        return give()

    tool = vai.tool(give_later if asynchronous else give, name="give")
    way = "run" if kind == "async" else "sync run"
    out = await ran(world, way, f"[tool give]{OSLO}[then][say So.]", tools=[tool, weather])
    assert re.search(says, out.results[0])
    assert (out.results[1:], out.result.text, out.result.stop_reason) == (RAIN[:1], "So.", "end_turn")
    assert blocks(out.result.messages, "tool_result")[0]["is_error"] is True
    assert out.result.steps[0].tool_calls[0].error == out.results[0]


def test_ctrl_c_in_a_tool_goes_to_the_caller() -> None:
    """A KeyboardInterrupt that a tool raises is nobody's to swallow, and no reason to hang."""

    @vai.tool
    def give() -> None:
        raise KeyboardInterrupt

    raised: list[BaseException] = []

    def ask() -> None:
        with vai.Client(engine=vai.FakeModel([vai.tool_use("give")], "So.")) as client:
            try:
                client.messages.run(model=CLAUDE, messages="Hi", tools=[give])
            except BaseException as fault:
                raised.append(fault)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2)
    assert [type(fault) for fault in raised] == [KeyboardInterrupt]


@both_kinds
@pytest.mark.parametrize("fault", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("hook", ["before_call", "after_response", "stop_when", "on_tool_call"])
def test_what_ends_a_program_goes_to_the_caller(hook: str, fault: type[BaseException], kind: str) -> None:
    """Out of whichever task a hook runs in, and the client can be used on."""

    def raising(*values: Any) -> None:
        raise fault

    request: Any = {"model": CLAUDE, "messages": "Hi", "tools": [weather], hook: raising}
    answers = [vai.tool_use("weather", city="Oslo")], "So.", "So."
    if kind == "sync":
        with vai.Client(engine=vai.FakeModel(*answers)) as client:
            with pytest.raises(fault):
                client.messages.run(**request)
            assert client.models.list()
    else:
        with pytest.raises(fault), asyncio.Runner() as runner:
            runner.run(vai.AsyncClient(engine=vai.FakeModel(*answers)).messages.run(**request))


@both_kinds
@pytest.mark.parametrize("waits", [True, False])
async def test_a_tool_that_cancels_itself(world: World, waits: bool, kind: str) -> None:
    """It is a tool that failed; neither the other tools nor the run are cancelled with it."""

    @vai.tool
    async def give() -> str:
        task = asyncio.current_task()
        assert task
        task.cancel()
        if waits:
            await asyncio.sleep(5)
        return "too late"

    seen: list[Any] = []
    out = await ran(
        world, "run" if kind == "async" else "sync run", f"[tool give]{OSLO}[then][say So.]", tools=[give, weather],
        on_tool_call=lambda name, input, output, error: seen.append(error),
    )  # fmt: skip
    assert out.results == ["The tool was cancelled.", RAIN[0]]
    assert (out.result.stop_reason, out.result.text) == ("end_turn", "So.")
    assert sorted(map(str, seen)) == ["None", "The tool was cancelled."]


BAD_CALLS = {
    "[tool nothing {}]": "There is no tool 'nothing' that can be run. Tools: weather, distance",
    "[tool weather {}]": "city: Field required",
    '[tool weather {"city":7}]': "city: Input should be a valid string",
    '[tool weather {"city":"Oslo","mood":"glad"}]': "mood: Extra inputs are not permitted",
    '[tool distance {"city":"Oslo","km":"far"}]': "km: Input should be a valid integer",
    '[tool weather {"city": nonsense}]': "Call the tool again with valid JSON|city: Field required",
    '[tool weather ["Oslo"]]': "Call the tool again with valid JSON|city: Field required",
}


@pytest.mark.parametrize("call", BAD_CALLS)
@pytest.mark.parametrize("provider", MODELS)
async def test_calls_that_do_not_fit(world: World, provider: str, call: str) -> None:
    """The model is told what is wrong, in words that help it to mend its call; the next call may be right."""
    out = await ran(world, "run_stream", f"{call}[then]{OSLO}[then][say So.]", model=MODELS[provider])
    assert re.search(BAD_CALLS[call], out.results[0])
    assert (out.results[1:], out.result.text) == (RAIN[:1], "So.")
    await check_history(out.result.messages, models=[CLAUDE, MODELS["oai-resp"], MODELS["gemini"]])


async def test_methods_are_tools(world: World) -> None:
    """`self` is no input of the model's; two objects have a tool each."""

    class Desk:
        def __init__(self, name: str) -> None:
            self.name = name

        @vai.tool
        def ask(self, what: str) -> str:
            """Ask the desk."""
            return f"{self.name} knows {what}."

        @vai.tool(timeout=3)
        async def call(self) -> str:
            return self.name

    desk = Desk("Ada")
    assert desk.ask("this") == "Ada knows this."
    assert list(desk.ask.input_schema["properties"]) == ["what"]
    out = await ran(world, "run", '[tool ask {"what":"all"}][tool call][then][say So.]', tools=[desk.ask, desk.call])
    assert out.results == ["Ada knows all.", "Ada"]


@both_kinds
async def test_a_run_inside_a_tool(world: World, kind: str) -> None:
    """A tool may ask a model itself, with the same client, and return its answer or its whole run."""
    async_client, client = vai.AsyncClient(), vai.Client()

    @vai.tool
    def ask(about: str) -> vai.RunResult:
        return client.messages.run(model=MODELS["openai"], messages=f"{about}[then][say Inner.]", tools=[weather])

    @vai.tool
    async def ask_later(about: str) -> vai.Message:
        return await async_client.messages.create(model=MODELS["gemini"], messages=f"[say {about}]")

    request: Any = {"model": CLAUDE, "tools": [ask, ask_later]}
    if kind == "async":
        prompt = '[tool ask_later {"about":"This"}][tool ask_later {"about":"That"}][then][say Outer.]'
        result = await async_client.messages.run(messages=prompt, **request)
        assert Ran([], result).results == ["This", "That"]
    else:
        inner = json.dumps({"about": OSLO})
        result = client.messages.run(messages=f"[tool ask {inner}][tool ask {inner}][then][say Outer.]", **request)
        assert Ran([], result).results == ["Inner.", "Inner."]
    assert result.text == "Outer."
    client.close()
    await async_client.close()


def test_a_client_does_not_wait_for_itself(world: World) -> None:
    """In an async tool a Client would wait for ever for its own loop; instead the model is told, and it goes on."""
    with vai.Client() as client:

        @vai.tool
        async def ask() -> str:
            return client.messages.create(model=CLAUDE, messages="Hi").text

        @vai.tool
        async def stream() -> str:
            with client.messages.stream(model=CLAUDE, messages="Hi") as answer:
                return answer.final().text

        prompt = "[tool ask][tool stream][then][say So.]"
        result = client.messages.run(model=CLAUDE, messages=prompt, tools=[ask, stream])
        for told_to_model in Ran([], result).results:
            assert re.match("RuntimeError: .*an async tool that asks a model uses an AsyncClient", told_to_model)
        assert (result.text, len(world.requests)) == ("So.", 2)


# == Interruptions and cancellation ====================================================================================

KEPT = {"discard": [], "save": ["The quick"], "marked": ["The quick [interrupted]"]}
SAYING = "[say The quick brown fox.]"
BUT = "But [say so.]"


def interrupting(when: Callable[[Any, vai.RunEvent], bool], *orders: tuple[str, ...]) -> Watch:
    """Gives the orders when the time has come, once."""
    given_orders: list[Any] = []

    def watch(run: Any, event: vai.RunEvent) -> None:
        if not given_orders and when(run, event):
            given_orders.extend(getattr(run, name)(*arguments) for name, *arguments in orders)
            assert all(answer in (None, True) for answer in given_orders)

    return watch


def in_text(run: Any, event: vai.RunEvent) -> bool:
    return event.type == "content_block_delta" and "quick" in getattr(event.delta, "text", "")


def in_answer(run: Any, event: vai.RunEvent) -> bool:
    return event.type == "content_block_delta"


@both_kinds
@both_modes
@partials
async def test_interrupted_in_its_text(world: World, partial: str, mode: str, kind: str) -> None:
    """What was said until then is dropped, kept or marked, and the new message is answered. No event comes between."""
    way = "run_stream" if kind == "async" else "sync run_stream"
    watch = interrupting(in_text, ("interrupt", BUT, partial))
    out = await ran(world, way, f"{SAYING}[slow 0.01]", mode=mode, watch=watch)
    *history, said = texts(out.result.messages)
    assert history == [f"{SAYING}[slow 0.01]", *KEPT[partial], BUT]
    assert said.endswith("so.")  # without an answer between them, both messages are one turn for the sandbox
    assert (out.result.stop_reason, len(out.result.steps)) == ("end_turn", 1)
    assert out.order == f"step_start answer interrupted {ONE} run_complete"
    assert [event.kept for event in out.events if event.type == "interrupted"] == ["".join(KEPT[partial])]
    world.hung_up()
    assert out.result.usage.input_tokens > out.result.steps[0].response.usage.input_tokens
    await check_history(out.result.messages, models=EVERY_MODEL if mode == "direct" else [CLAUDE])


@both_kinds
async def test_interrupted_in_a_tool(world: World, kind: str) -> None:
    """A call that has its result keeps it; the other one's result says why there is none."""
    way = "run_stream" if kind == "async" else "sync run_stream"
    watch = interrupting(lambda run, event: event.type == "tool_result", ("interrupt", BUT))
    out = await ran(world, way, f"[tool stuck]{OSLO}[then]", watch=watch, tool_timeout=None)
    assert out.results == ["Not finished: the user interrupted.", RAIN[0]]
    assert (out.result.stop_reason, out.result.text) == ("end_turn", "so.")
    await check_history(out.result.messages)


AFTER = {
    "step_start": [f"{SAYING}", BUT, "The quick brown fox.so."],
    "message_stop": [f"{SAYING}", "The quick brown fox.", BUT, "so."],
    "step_complete": [f"{SAYING}", "The quick brown fox.", BUT, "so."],
}


@both_kinds
@pytest.mark.parametrize("last", AFTER)
async def test_interrupted_between_answers(world: World, last: str, kind: str) -> None:
    """At its start there is nothing to keep; at its end the answer is whole. The message is never lost."""
    way = "run_stream" if kind == "async" else "sync run_stream"
    watch = interrupting(lambda run, event: event.type == last, ("interrupt", BUT))
    out = await ran(world, way, SAYING, watch=watch)
    assert texts(out.result.messages) == AFTER[last]
    assert out.result.stop_reason == "end_turn"
    await check_history(out.result.messages, models=[CLAUDE])


@both_kinds
async def test_interrupted_after_the_end(world: World, kind: str) -> None:
    refused: list[bool] = []

    def watch(run: Any, event: vai.RunEvent) -> None:
        if event.type == "run_complete":
            refused.append(run.interrupt(BUT))
            run.cancel()

    out = await ran(world, "run_stream" if kind == "async" else "sync run_stream", SAYING, watch=watch)
    assert (refused, out.result.stop_reason, len(out.result.messages)) == ([False], "end_turn", 2)


@both_kinds
async def test_two_orders_at_once(world: World, kind: str) -> None:
    """Two interruptions are two messages, and the last one says what is kept; a cancellation after it ends the run."""
    way = "run_stream" if kind == "async" else "sync run_stream"
    twice = (("interrupt", "And", "marked"), ("interrupt", BUT, "save"))
    out = await ran(world, way, SAYING, watch=interrupting(in_text, *twice))
    assert texts(out.result.messages) == [SAYING, "The quick", "And", BUT, "so."]
    await check_history(out.result.messages, models=[CLAUDE])
    out = await ran(world, way, SAYING, watch=interrupting(in_text, ("interrupt", BUT, "save"), ("cancel",)))
    assert (out.result.stop_reason, len(out.result.steps)) == ("cancelled", 0)
    check_pairs(out.result.messages)


@both_kinds
async def test_cancelled_after_an_interruption(world: World, kind: str) -> None:
    """What an interruption kept of one answer says nothing about the next one, which is cancelled."""
    way = "run_stream" if kind == "async" else "sync run_stream"

    def watch(run: Any, event: vai.RunEvent) -> None:
        if in_text(run, event):
            run.interrupt(SAYING, "save") if run.result.turn_count == 1 else run.cancel()

    out = await ran(world, way, SAYING, watch=watch)
    assert (texts(out.result.messages), out.result.stop_reason) == ([SAYING, "The quick", SAYING], "cancelled")


@both_kinds
async def test_interrupted_after_cancelling(world: World, kind: str) -> None:
    """A run that is being cancelled takes no message, and says so."""
    taken: list[bool] = []

    def watch(run: Any, event: vai.RunEvent) -> None:
        if in_text(run, event):
            run.cancel()
            taken.append(run.interrupt(BUT))

    out = await ran(world, "run_stream" if kind == "async" else "sync run_stream", SAYING, watch=watch)
    assert (out.result.stop_reason, taken) == ("cancelled", [False])


@both_kinds
async def test_cancelled_by_a_hook(world: World, kind: str) -> None:
    """No call begins after it, and none is told of."""
    runs: list[Any] = []
    out = await ran(
        world, "run_stream" if kind == "async" else "sync run_stream", f"{OSLO}[then]",
        watch=lambda run, event: runs.append(run), after_response=lambda response: runs[0].cancel(),
    )  # fmt: skip
    assert (out.result.stop_reason, out.results) == ("cancelled", ["Not finished: the run was cancelled."])
    assert out.order == f"{ONE.replace(' step_complete', '')} run_complete"
    assert out.result.tool_call_count == 0


async def test_an_end_comes_before_a_time_limit() -> None:
    """An answer that was whole in time is the end, however long its hook takes."""
    async with vai.AsyncClient(engine=vai.FakeModel("So.")) as client:

        async def long(response: vai.Message) -> None:
            await asyncio.Event().wait()

        result = await client.messages.run(model=CLAUDE, messages="Hi", after_response=long, timeout=0.05)
    assert (result.stop_reason, result.text) == ("end_turn", "So.")


@both_kinds
@pytest.mark.parametrize(
    ("script", "last", "reason"),
    [
        ("[say So.]", "message_stop", "end_turn"),
        ("[say So.]", "step_complete", "end_turn"),
        (f"{OSLO}[then]", "message_stop", "cancelled"),
        (f"{OSLO}[then]", "tool_result", "cancelled"),
    ],
)
async def test_left_after_a_whole_answer(world: World, script: str, last: str, reason: str, kind: str) -> None:
    """It is kept, with the reason that was settled by then; a call that was not run says so."""
    if kind == "async":
        async with vai.AsyncClient() as client:
            async with client.messages.run_stream(model=CLAUDE, messages=script, tools=TOOLS) as run:
                async for event in run:
                    if event.type == last:
                        break
        result = run.result
    else:
        with vai.Client() as blocking:
            with blocking.messages.run_stream(model=CLAUDE, messages=script, tools=TOOLS) as running:
                for event in running:
                    if event.type == last:
                        break
            result = running.result
    assert (result.stop_reason, len(result.steps)) == (reason, 1)
    assert result.messages[1]["role"] == "assistant"
    assert result.usage.total_tokens > 0
    await check_history(result.messages, models=[CLAUDE])


async def test_closed_while_another_task_reads(world: World) -> None:
    """Closing waits for the end; whoever reads meanwhile comes to its end too."""
    client = vai.AsyncClient()
    run = client.messages.run_stream(model=CLAUDE, messages="[tool stuck]", tools=TOOLS, tool_timeout=None)
    began = asyncio.Event()
    events: list[str] = []

    async def read() -> None:
        async for event in run:
            events.append(event.type)
            if event.type == "tool_call_start":
                began.set()

    async with run:
        reading = asyncio.create_task(read())
        await began.wait()
        await run.close()
        assert run.result.stop_reason == "cancelled"
        check_pairs(run.result.messages)
    await asyncio.wait_for(reading, 5)
    assert events[-1] == "run_complete"
    await client.close()


def test_closed_while_another_thread_reads(world: World) -> None:
    client = vai.Client()
    run = client.messages.run_stream(model=CLAUDE, messages="[tool stuck]", tools=TOOLS, tool_timeout=None)
    began, events = threading.Event(), []

    def read() -> None:
        for event in run:
            events.append(event.type)
            if event.type == "tool_call_start":
                began.set()

    with run:
        reading = threading.Thread(target=read)
        reading.start()
        assert began.wait(5)
    assert run.result.stop_reason == "cancelled"
    reading.join(5)
    assert events[-1] == "run_complete"
    client.close()


@both_kinds
async def test_a_run_inside_a_tool_ends_with_it(world: World, kind: str) -> None:
    """A function on a thread cannot be ended from outside; what it asks of a client can, and is."""
    inner, ended, runs = vai.Client(), threading.Event(), []
    raised: list[BaseException] = []

    @vai.tool
    def ask() -> str:
        try:
            return inner.messages.run(model=CLAUDE, messages="[hang]").text
        except BaseException as fault:
            raised.append(fault)
            raise
        finally:
            ended.set()

    def stop(call: Callable[..., Any]) -> None:
        world.request(2)
        call(runs[0].cancel)

    here: Callable[..., Any] = asyncio.get_running_loop().call_soon_threadsafe
    stopping = threading.Thread(target=stop, args=[here if kind == "async" else lambda cancel: cancel()])
    stopping.start()
    way = "run_stream" if kind == "async" else "sync run_stream"
    out = await ran(
        world, way, "[tool ask][then]", tools=[ask], tool_timeout=None, watch=lambda run, event: runs.append(run)
    )
    stopping.join()
    assert (out.result.stop_reason, out.results) == ("cancelled", ["Not finished: the run was cancelled."])
    assert ended.wait(5)
    assert [str(fault) for fault in raised] == ["the call was cancelled"]
    world.hung_up(2)
    inner.close()


@both_kinds
@pytest.mark.parametrize("order", ["cancel", "interrupt"])
@pytest.mark.parametrize("where", ["answer", "tool"])
async def test_orders_from_elsewhere(world: World, where: str, order: str, kind: str) -> None:
    """From another thread in sync, from another task in async, while the run waits."""
    prompt = f"{SAYING}[hang]" if where == "answer" else "[tool hold][then]"
    reached = threading.Event()
    runs: list[Any] = []

    @vai.tool
    async def hold() -> None:
        reached.set()
        await asyncio.Event().wait()

    def watch(run: Any, event: vai.RunEvent) -> None:
        runs.append(run)
        if where == "answer" and "brown" in getattr(getattr(event, "delta", None), "text", ""):
            reached.set()

    def give_order() -> None:
        assert reached.wait(5)
        runs[0].cancel() if order == "cancel" else runs[0].interrupt(BUT, "save")

    async def give_order_here() -> None:
        await asyncio.to_thread(reached.wait, 5)
        give_order()

    if kind == "async":
        giving = asyncio.create_task(give_order_here())
        out = await ran(world, "run_stream", prompt, watch=watch, tools=[hold], timeout=10)
        await giving
    else:
        thread = threading.Thread(target=give_order)
        thread.start()
        out = await ran(world, "sync run_stream", prompt, watch=watch, tools=[hold], timeout=10)
        thread.join()
    assert out.result.stop_reason == ("cancelled" if order == "cancel" else "end_turn")
    assert out.result.text == ("so." if order == "interrupt" else "")
    if where == "answer":
        world.hung_up()
    check_pairs(out.result.messages)


@both_kinds
async def test_a_tool_cancels_its_own_run(world: World, kind: str) -> None:
    runs: list[Any] = []

    @vai.tool
    def enough() -> str:
        runs[0].cancel()
        time.sleep(0.05)
        return "too late"

    way = "run_stream" if kind == "async" else "sync run_stream"
    if kind == "async":  # whose loop is not to be touched from a tool's thread

        @vai.tool(name="enough")
        async def enough_here() -> str:
            runs[0].cancel()
            await asyncio.sleep(5)
            return "too late"

        enough = enough_here  # type: ignore[assignment]
    out = await ran(
        world, way, "[tool enough][then]", tools=[enough], watch=lambda run, event: runs.append(run)
    )  # fmt: skip
    assert (out.result.stop_reason, out.results) == ("cancelled", ["Not finished: the run was cancelled."])


@pytest.mark.parametrize("reason", ["cancelled", "timeout"])
async def test_cancelled_and_timed_out_are_told_apart(world: World, reason: str) -> None:
    """Also where both come together, and on every provider."""
    for model in MODELS.values():
        watch = interrupting(in_answer, ("cancel",)) if reason == "cancelled" else None
        limits = {"timeout": 0.1} if reason == "timeout" else {"timeout": 10}
        out = await ran(world, "run_stream", f"{SAYING}[hang]", model=model, watch=watch, **limits)
        assert (out.result.stop_reason, texts(out.result.messages)) == (reason, [f"{SAYING}[hang]"])
    assert all(request.closed.is_set() or world.run(request.closed.wait()) is True for request in world.requests)


# == Whatever happens ==================================================================================================

CALLS = {
    "good": OSLO,
    "async": '[tool distance {"city":"Oslo","km":3}]',
    "image": "[tool picture]",
    "unknown": "[tool nothing {}]",
    "raising": "[tool fail]",
    "stuck": "[tool stuck]",
    "bad input": '[tool weather {"city":7}]',
    "no JSON": '[tool weather {"city": oh}]',
    "cut": "[tool cut]",
}
openings = st.sampled_from(["", "[think Hm.]", "[say Well.]", "[think Hm.][say Well.]", "[redacted]"])
steps = st.tuples(openings, st.lists(st.sampled_from([*CALLS.values()]), min_size=1, max_size=3)).map(
    lambda step: step[0] + "".join(step[1])
)
ENDINGS = (
    *(
        "[say So.]",
        "[say  ]",
        "[think Hm.][words 5]",
        "[refuse]",
        f"{OSLO}[stop max_tokens]",
        "[stop pause_turn][say So.]",
    ),
    *("[error 400]", "[error 500]", "[error 529]", "[words 5][break_off]", f"[words 3]{OSLO}[break_off]"),
    *("[words 5][error_in_stream 500]", "[think Hm.][reset]", "[think Hm.][words 3][hang]"),
)
endings = st.sampled_from(ENDINGS)
scripts = st.tuples(st.lists(steps, max_size=3), endings).map(lambda script: "[then]".join([*script[0], script[1]]))
limits = st.fixed_dictionaries(
    {"max_turns": st.integers(1, 4)},
    optional={
        "max_tool_calls": st.integers(0, 4),
        "max_total_tokens": st.integers(1, 900),
        "parallel_tools": st.booleans(),
        "thinking": st.just({"type": "enabled", "budget_tokens": 1024}),
    },
)
orders = st.tuples(
    st.sampled_from(["", "cancel", "discard", "save", "marked", "leave", "task", "timeout"]), st.integers(0, 25)
)


async def shaken(world: World, model: str, script: str, options: JSON, order: tuple[str, int], streamed: bool) -> Any:
    """The result of a run that is disturbed: at the n-th event, and whenever the tool `cut` is called."""
    what, when = order
    runs: list[vai.AsyncRun] = []

    def disturb() -> None:
        match what:
            case "cancel":
                runs[0].cancel()
            case "discard" | "save" | "marked":
                runs[0].interrupt(f"{BERGEN}[then][say Right.]", what)  # type: ignore[arg-type]
            case "task":
                task.cancel()

    @vai.tool
    async def cut() -> None:
        disturb()
        await asyncio.sleep(0.01)

    request: Any = {"model": model, "messages": script, "tools": [*TOOLS, cut], "tool_timeout": 0.02, **options}
    request["timeout"] = 0.05 + when / 500 if what == "timeout" or "hang" in script else 20

    async def go() -> vai.RunResult:
        async with vai.AsyncClient(max_retries=0) as client:
            runs.append(client.messages._run(**{key: request.pop(key) for key in ("model", "messages")},
                                             fields=request, streaming=streamed))  # fmt: skip
            with contextlib.suppress(vai.Error):
                async with runs[0] as run:
                    count = 0
                    async for _ in run:
                        if count == when and what == "leave":
                            break
                        if count == when:
                            disturb()
                        count += 1
            return runs[0].result

    task = asyncio.create_task(go())
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}
    return runs[0].result


@settings(deadline=None, database=None, derandomize=True, max_examples=60)
@given(st.sampled_from(EVERY_MODEL), scripts, limits, orders, st.booleans())
def test_however_a_run_ends_its_history_is_whole(
    running: World, model: str, script: str, options: JSON, order: tuple[str, int], streamed: bool
) -> None:
    """Whatever models and tools do and whenever it is disturbed: every call has one result, every model goes on."""

    async def check() -> None:
        result = await shaken(running, model, script, options, order, streamed)
        assert result.stop_reason is not None
        assert result.usage.total_tokens >= sum(step.response.usage.total_tokens for step in result.steps)
        await check_history(result.messages)

    asyncio.run(check())


@pytest.mark.parametrize("model", EVERY_MODEL)
async def test_thinking_after_a_run_without(world: World, model: str) -> None:
    """Where Claude would demand thinking that never was, it answers without, and that is said."""
    out = await ran(world, "run", f"{OSLO}[then]", model=model, max_turns=1)
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    async with vai.AsyncClient(max_retries=0) as client:
        request: Any = {"messages": going_on(out.result.messages), "tools": TOOLS, "thinking": thinking}
        answer = await client.messages.create(model=CLAUDE, **request)
    assert answer.text == "Go on."
    assert answer.dropped == (
        [] if model.startswith("anthropic/claude-sonnet-5") else ["thinking"]
    )  # it thinks unasked


# == Nothing is left behind ============================================================================================


class Cancelling:
    """Awaits a coroutine, and cancels the task in its n-th wait: as it begins, or just when it is over."""

    def __init__(self, work: Coroutine[Any, Any, Any], at: int, late: bool) -> None:
        self.work, self.at, self.late = work, at, late
        self.cancelled = False

    def __await__(self) -> Generator[Any, Any, Any]:
        task = asyncio.current_task()
        assert task is not None
        step: Callable[[], Any] = functools.partial(self.work.send, None)
        for number in itertools.count():
            try:
                waited = step()
            except StopIteration as end:
                return end.value
            if number == self.at:
                self.cancelled = True
                if self.late and waited is not None:
                    waited.add_done_callback(lambda _: task.cancel())
                else:
                    task.cancel()
            try:
                yield waited
                step = functools.partial(self.work.send, None)
            except BaseException as fault:
                step = functools.partial(self.work.throw, fault)
        return None


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("streamed", [False, True], ids=["run", "run_stream"])
async def test_cancelled_at_every_await(world: World, streamed: bool, late: bool) -> None:
    """No task, no thread and no request outlives the run, its history is whole, and the client can be used on."""
    request: Any = {"model": CLAUDE, "messages": f"{OSLO}[tool distance][then][words 3]", "tools": TOOLS}
    histories: dict[str, list[JSON]] = {}
    async with vai.AsyncClient(max_retries=0) as client:
        for at in itertools.count():
            fields: Any = {key: value for key, value in request.items() if key == "tools"}
            run = client.messages._run(request["model"], request["messages"], fields, streaming=streamed)

            async def go(run: vai.AsyncRun) -> None:
                async with run:
                    async for _ in run:
                        await asyncio.sleep(0)

            async def all_of_it(waits: Cancelling) -> None:
                await waits

            waits = Cancelling(go(run), at, late)
            task = asyncio.create_task(all_of_it(waits))
            await asyncio.wait([task])
            assert asyncio.all_tasks() == {asyncio.current_task()}
            if not waits.cancelled:
                break
            assert task.cancelled()
            assert run.result.stop_reason == "cancelled" or run.result.text
            check_pairs(run.result.messages)
            shape = json.dumps([[turn["role"], str(turn["content"])[:9]] for turn in run.result.messages])
            histories[shape] = run.result.messages
        assert task.exception() is None
        assert run.result.stop_reason == "end_turn"
        for asked in world.requests:
            world.run(asked.done.wait())
        assert world.sandbox.open == 0
        assert at > 10
        for messages in histories.values():
            await check_history(messages)
    await asyncio.to_thread(lambda: [thread.join(5) for thread in threading.enumerate() if thread.name == "vai-tool"])
    assert len(histories) > 1


HELD = {
    "answer": HANG,
    "sync tool": "[tool threaded][then]",
    "async tool": "[tool held][then]",
    "hook": f"{OSLO}[then]",
    "async tool that tidies up": "[tool tidy][then]",
}


@pytest.mark.parametrize(("where", "mode"), [*((where, "direct") for where in HELD), ("answer", "proxy")])
@pytest.mark.parametrize("use", ["run", "run_stream", "conversation"])
def test_ctrl_c(world: World, where: str, use: str, mode: str) -> None:
    """It comes through at once wherever the run is; the run is over then, its history whole, the client good."""
    reached, free, tidied = threading.Event(), threading.Event(), threading.Event()
    waiting = threading.get_ident()

    @vai.tool
    def threaded() -> None:
        reached.set()
        free.wait(5)

    @vai.tool
    async def held() -> None:
        reached.set()
        await asyncio.Event().wait()

    @vai.tool
    async def tidy() -> None:
        try:
            await held.function()
        finally:
            await asyncio.sleep(0.1)
            tidied.set()

    def hook(*values: Any) -> None:
        if where == "hook":
            reached.set()
            free.wait(5)

    def press() -> None:
        if where == "answer":
            world.request()
        else:
            assert reached.wait(5)
        time.sleep(0.05)  # by now the caller waits
        signal.pthread_kill(waiting, signal.SIGINT)

    fields: Any = {"tools": [weather, threaded, held, tidy], "on_tool_call": hook, "tool_timeout": None}
    pressing = threading.Thread(target=press)
    with vai.Client(**world.options(mode), max_retries=0) as client:
        chat = client.conversation(model=CLAUDE, **fields)
        pressing.start()
        try:
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012
                if use == "run":
                    client.messages.run(model=CLAUDE, messages=HELD[where], **fields)
                elif use == "conversation":
                    chat.say(HELD[where])
                else:
                    with client.messages.run_stream(model=CLAUDE, messages=HELD[where], **fields) as run:
                        list(run)
            if use == "run_stream":
                assert run.result.stop_reason == "cancelled"
                check_pairs(run.result.messages)
            if use == "conversation":
                chat.messages = going_on(chat.messages)[:-1]
                assert chat.say("[say on]").text == "on"
                check_pairs(chat.messages)
            if where == "answer":
                world.hung_up()
            if where.endswith("tidies up"):
                assert tidied.wait(5)
        finally:
            free.set()
            pressing.join()
        assert client.messages.create(model=CLAUDE, messages="[say on]").text == "on"
    assert world.threads == 0


# == Both modes, both kinds ============================================================================================


def shown(value: Any) -> Any:
    """An event, a result or an error as plain data, without what names the request."""
    if isinstance(value, vai.Error):
        return told(value) | {"result": shown(value.result)}
    if hasattr(value, "to_wire"):
        return value.to_wire()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: shown(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": getattr(value, "type", type(value).__name__)} | fields
    if isinstance(value, (list, tuple)):
        return [shown(item) for item in value]
    return value


SAME = {
    "tools": f"[think Hm.][say Well.]{OSLO}[tool fail][tool nothing][then][say Wet.]",
    "limit": f"{OSLO}{BERGEN}[then]{BERGEN}[then]",
    "refusal": f"{OSLO}[then][refuse]",
    "error 429": f"{OSLO}[then][error 429 retry_after=99]",
    "error 400": "[error 400]",
    "broken off": f"{OSLO}[then][words 9][break_off]",
    "error in the stream": f"{OSLO}[then][words 9][error_in_stream 529]",
}


@pytest.mark.parametrize("streamed", [False, True], ids=["run", "run_stream"])
@pytest.mark.parametrize("script", SAME)
@pytest.mark.parametrize("provider", MODELS)
async def test_runs_are_the_same(world: World, provider: str, script: str, streamed: bool) -> None:
    """Events, results and errors, in both modes and with both clients."""
    fields: Any = {"provider_keys": {provider: "key-of-mine"}, "model": MODELS[provider], "parallel_tools": False}
    fields |= {"max_tool_calls": 2} if script == "limit" else {}
    way = "run_stream" if streamed else "run"
    found = [
        shown(await ran(world, kind + way, SAME[script], mode=mode, **fields))
        for mode, kind in (("direct", ""), ("proxy", "sync "))
    ]
    assert found[1] == found[0]
    assert (found[0][2] is None) == (not re.search("error|broken", script))


class Pet(BaseModel):
    name: str
    legs: int


EXTRACTS: dict[str, tuple[Any, str, JSON]] = {
    "model": (Pet, "A pet?", {}),
    "exact": (Pet, '[say {"name":"Rex","legs":4}]', {}),
    "list": (list[int], "Numbers?", {}),
    "literal": (typing.Literal["red", "blue"], "Which?", {}),
    "dataclass": (Point, "Where?", {}),
    "union": (Pet | Point, "What?", {}),
    "mended": (Pet, '[say {"name":"Rex"}]', {}),
    "refusal": (Pet, "[refuse]", {}),
    "cut off": (Pet, '[say {"name":"' + "Rex " * 30 + '", "legs": 4}]', {"max_tokens": 16}),
    "error": (Pet, "[error 529]", {}),
}


@pytest.mark.parametrize("case", EXTRACTS)
@pytest.mark.parametrize("provider", MODELS)
async def test_extracts_are_the_same(world: World, provider: str, case: str) -> None:
    kind, prompt, fields = EXTRACTS[case]
    keys = {"provider_keys": {provider: "key-of-mine"}}
    request: Any = {"model": MODELS[provider], "messages": prompt, **keys, **fields}
    found: list[Any] = []
    async with vai.AsyncClient(max_retries=0) as client:
        try:
            found.append(shown(await client.messages.extract(kind, **request)))
        except vai.Error as fault:
            found.append(shown(fault))
    with vai.Client(**world.options("proxy"), max_retries=0) as blocking:
        try:
            found.append(shown(blocking.messages.extract(kind, **request)))
        except vai.Error as fault:
            found.append(shown(fault))
    assert found[1] == found[0]
    failed = {"cut off": "max_tokens", "error": found[0].get("code")}
    if case != "refusal":  # which some providers put into words
        assert found[0].get("code", "parsed" in found[0]) == failed.get(case, True)


@pytest.mark.parametrize("provider", MODELS)
async def test_conversations_are_the_same(world: World, provider: str) -> None:
    """What is said, dumped, loaded, forked and refused, in both modes and with both clients."""
    start: Any = {"model": MODELS[provider], "system": "Be brief.", "tools": TOOLS}
    start["provider_keys"] = {provider: "key-of-mine"}
    other = MODELS["groq" if provider == "openai" else "openai"]
    found: list[Any] = []
    for mode in ("direct", "proxy"):
        async with vai.AsyncClient(**world.options(mode), max_retries=0) as client:
            chat = client.conversation(**start)
            notes: list[Any] = [shown(await chat.say(f"{OSLO}[then][say Wet.]"))]
            async with chat.stream(f"{SAYING}[slow 0.001]") as run:
                notes.append([shown(event) async for event in run])
            try:
                await chat.say("[error 400]")
            except vai.Error as fault:
                notes.append(shown(fault))
            fork = chat.fork()
            fork.model = other
            notes += [shown(await fork.run("[say Fork.]", provider_keys={})), chat.dump(), fork.dump()]
            again = client.load_conversation(json.dumps(chat.dump()), tools=TOOLS)
            notes.append(shown(await again.say("[say Again.]", provider_keys=start["provider_keys"])))
            found.append([notes, again.messages])
        with vai.Client(**world.options(mode), max_retries=0) as blocking:
            talk = blocking.conversation(**start)
            notes = [shown(talk.say(f"{OSLO}[then][say Wet.]"))]
            with talk.stream(f"{SAYING}[slow 0.001]") as running:
                notes.append([shown(event) for event in running])
            try:
                talk.say("[error 400]")
            except vai.Error as fault:
                notes.append(shown(fault))
            branch = talk.fork()
            branch.model = other
            notes += [shown(branch.run("[say Fork.]", provider_keys={})), talk.dump(), branch.dump()]
            once_more = blocking.load_conversation(json.dumps(talk.dump()), tools=TOOLS)
            notes.append(shown(once_more.say("[say Again.]", provider_keys=start["provider_keys"])))
            found.append([notes, once_more.messages])
    for mine in found[1:]:
        assert mine == found[0]
    assert texts(found[0][1])[-3:] == ["The quick brown fox.", "[say Again.]", "Again."]


def in_sync(annotation: Any) -> str:
    """An annotation of the asynchronous client as the synchronous one has it."""
    return re.sub(r"\bAsync(?=[A-Z])", "", str(annotation))


PAIRS = [
    (vai.AsyncClient, vai.Client),
    (vai.AsyncMessages, vai.SyncMessages),
    (vai.AsyncModels, vai.SyncModels),
    (vai.AsyncAudio, vai.SyncAudio),
    (vai.AsyncMessageStream, vai.MessageStream),
    (vai.AsyncRun, vai.Run),
    (vai.AsyncSpeechStream, vai.SpeechStream),
    (vai.AsyncConversation, vai.Conversation),
]


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=[pair[1].__name__ for pair in PAIRS])
def test_both_kinds_have_the_same_methods(one: Any, other: Any) -> None:
    """The same names, parameters, defaults, types and docstrings; only `await` differs."""
    names = {name for name in {**vars(one), **vars(vai._Chat)} if hasattr(one, name) and not name.startswith("_")}
    instance = (
        {"result"} if one is vai.AsyncRun else {"messages", "models", "audio"} if one is vai.AsyncClient else set()
    )
    assert names | instance == {name for name in dir(other) if not name.startswith("_")}
    for name in names:
        methods = getattr(one, name), getattr(other, name)
        if isinstance(methods[0], property):
            methods = methods[0].fget, methods[1].fget
        assert not inspect.iscoroutinefunction(methods[1])
        signatures = [inspect.signature(method) for method in methods]
        shapes = [
            [(item.name, item.kind, item.default, in_sync(item.annotation)) for item in signature.parameters.values()]
            for signature in signatures
        ]
        assert shapes[0] == shapes[1], name
        assert in_sync(signatures[0].return_annotation) == in_sync(signatures[1].return_annotation), name
        overloads = [[in_sync(inspect.signature(form)) for form in typing.get_overloads(method)] for method in methods]
        assert overloads[0] == overloads[1]
    constructors = inspect.signature(one), inspect.signature(other)
    if one is vai.AsyncClient:
        assert str(constructors[0]) == str(constructors[1])


# == Usage =============================================================================================================


def billed(provider: str, body: JSON) -> int:
    """All tokens of an answer, in its provider's own arithmetic."""
    if provider == "anthropic":
        names = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
        return sum(body["usage"][name] for name in names)
    if provider == "gemini-oauth":
        body = body["response"]
    found: JSON = body.get("usage") or body["usageMetadata"]
    return int(found.get("total_tokens") or found["totalTokenCount"])


@pytest.mark.parametrize("way", ["run", "sync run_stream"])
@pytest.mark.parametrize("provider", MODELS)
async def test_usage_adds_up(world: World, provider: str, way: str) -> None:
    """The sum over all steps is what the provider counted, thinking and cached tokens included."""
    system = [{"type": "text", "text": "Be brief. " * 600, "cache_control": {"type": "ephemeral"}}]
    thinking = {"type": "enabled", "budget_tokens": 1024}
    prompt = f"[think Where?]{OSLO}{BERGEN}[then][think And?]{NARVIK}[then][think So.][say Wet.]"
    out = await ran(world, way, prompt, model=MODELS[provider], system=system, thinking=thinking)
    result, counted = out.result, list(world.requests)
    assert [len(step.tool_calls) for step in result.steps] == [2, 1, 0]
    for name in ("input_tokens", "output_tokens", "cache_read_input_tokens", "total_tokens"):
        assert getattr(result.usage, name) == sum(getattr(step.response.usage, name) for step in result.steps)
    total = 0
    async with aiohttp.ClientSession() as http:
        for request in counted:  # the sandbox answers the same request the same way
            body = {name: value for name, value in (request.body or {}).items() if not name.startswith("stream")}
            headers = {name: value for name, value in request.headers.items() if not name.startswith("Content")}
            url = world.sandbox.url + request.path.replace("streamG", "g")
            async with http.post(url, json=body, headers=headers) as response:
                total += billed(provider, await response.json())
    assert result.usage.total_tokens == total > 0


@pytest.mark.parametrize("provider", MODELS)
async def test_usage_of_an_answer_that_was_cut_short(world: World, provider: str) -> None:
    """As far as the provider has told it, and no further."""
    watch = interrupting(in_text, ("interrupt", BUT))
    out = await ran(world, "run_stream", f"{SAYING}[slow 0.002]", model=MODELS[provider], watch=watch)
    [step] = out.result.steps
    assert out.result.usage.total_tokens >= step.response.usage.total_tokens > 0
    assert out.result.usage.output_tokens >= step.response.usage.output_tokens


# == A user's script ===================================================================================================


def test_a_script_that_uses_it_all(running: World) -> None:
    """It is what mypy checks for users' sakes; here it runs."""
    script = Path(__file__).with_name("typed_script.py")
    command = [sys.executable, "-W", "error", str(script)]
    environ = {**running.sandbox.environ, "PYTHONPATH": str(script.parent.parent), "PATH": ""}
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stderr, ended.stdout.splitlines()[-1:]) == (0, "", ["done"])
