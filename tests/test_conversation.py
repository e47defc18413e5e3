"""Conversations, which keep a history that any provider takes; and `FakeModel`, which plays one for an application."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_vai
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from test_vai import JSON, MODELS, World, both_modes

import vai

running, world = test_vai.running, test_vai.world

GPT = "openai/gpt-4o"


@vai.tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"rain in {city}"


def outline(messages: list[JSON]) -> list[str]:
    """Who said what kind of thing."""
    kinds = []
    for turn in messages:
        content = turn["content"]
        blocks = [content] if isinstance(content, str) else [block.get("text", block["type"]) for block in content]
        kinds.append(f"{turn['role']}: {', '.join(blocks)}")
    return kinds


# == Turns =============================================================================================================


class Talk:
    """Both kinds of conversation behind one set of methods, so that a test is written once."""

    def __init__(self, client: Any, **fields: Any) -> None:
        self.client = client
        self.chat = client.conversation(**{"model": GPT, **fields})

    async def __call__(self, method: str, *args: Any, **turn: Any) -> Any:
        """`say` or `run`."""
        if isinstance(self.client, vai.AsyncClient):
            return await getattr(self.chat, method)(*args, **turn)
        return await asyncio.to_thread(getattr(self.chat, method), *args, **turn)

    async def stream(
        self, *args: Any, until: Callable[[Any], bool] = lambda event: False, **turn: Any
    ) -> vai.RunResult:
        """The turn streamed, as far as an event that `until` knows."""

        def blocking() -> vai.RunResult:
            with self.chat.stream(*args, **turn) as stream:
                for event in stream:
                    if until(event):
                        break
            return stream.result

        if isinstance(self.client, vai.Client):
            return await asyncio.to_thread(blocking)
        async with self.chat.stream(*args, **turn) as stream:
            async for event in stream:
                if until(event):
                    break
        return stream.result


@pytest.fixture(params=["async", "sync"])
def talk(request: pytest.FixtureRequest) -> Iterator[Callable[..., Talk]]:
    """Makes a conversation with a scripted model, or with another engine."""
    with contextlib.ExitStack() as stack:

        def make(*answers: Any, options: JSON | None = None, **fields: Any) -> Talk:
            options = {"engine": vai.FakeModel(*answers)} if options is None else options
            if request.param == "sync":
                return Talk(stack.enter_context(vai.Client(**options, max_retries=0)), **fields)
            return Talk(vai.AsyncClient(**options, max_retries=0), **fields)

        yield make


def calls_of(talk: Talk) -> list[JSON]:
    engine = getattr(talk.client, "_async", talk.client)._engine
    assert isinstance(engine, vai.FakeModel)
    return engine.calls


Maker = Callable[..., Talk]


async def test_a_history_is_kept(talk: Maker) -> None:
    """say, run and stream take turns with one history, which each request holds whole; usage adds up."""
    t = talk("one", "two", "three", "four", system="Be kind.", temperature=0.5)
    assert (await t("say", "a")).text == "one"
    result = await t("run", [vai.text("b")])
    assert (result.text, result.stop_reason) == ("two", "end_turn")
    assert (await t.stream("c")).text == "three"
    assert t.chat.messages == result.messages + t.chat.messages[4:]
    assert outline(t.chat.messages) == [
        "user: a", "assistant: one", "user: b", "assistant: two", "user: c", "assistant: three"
    ]  # fmt: skip
    calls = calls_of(t)
    assert [len(body["messages"]) for body in calls] == [1, 3, 5]
    assert {body["system"] for body in calls} == {"Be kind."}
    assert {body["temperature"] for body in calls} == {0.5}
    before = t.chat.usage.total_tokens
    last = (await t("say", "d")).usage
    assert t.chat.usage.total_tokens == before + last.total_tokens
    assert repr(t.chat).endswith("(openai/gpt-4o, 8 messages)")


async def test_tools_are_run(talk: Maker) -> None:
    """What tools did stays in the history, and a dangling call is answered."""
    call = [vai.text("Let me see."), vai.tool_use("weather", city="Oslo"), vai.tool_use("gone")]
    t = talk(call, "rain", "fine", tools=[weather])
    assert (await t("say", "Rain?")).text == "rain"
    assert (await t("say", "Thanks")).text == "fine"
    assert outline(t.chat.messages) == [
        "user: Rain?",
        "assistant: Let me see., tool_use, tool_use",
        "user: tool_result, tool_result",
        "assistant: rain",
        "user: Thanks",
        "assistant: fine",
    ]
    results = t.chat.messages[2]["content"]
    assert results[0]["content"] == "rain in Oslo"
    assert results[1]["is_error"] is True


async def test_a_turn_has_fields_of_its_own(talk: Maker) -> None:
    """Model, limits and fields given with a turn are that turn's alone."""
    call = [vai.tool_use("weather", city="Oslo")]
    t = talk(call, "later", "plain", tools=[weather], max_tokens=100)
    result = await t("run", "Rain?", model="groq/llama-3.3-70b-versatile", max_turns=1, max_tokens=7)
    assert result.stop_reason == "max_turns"
    assert "limit of turns" in t.chat.messages[-1]["content"][0]["content"]
    assert (await t("say", "And?")).text == "later"
    assert [body["model"] for body in calls_of(t)] == ["groq/llama-3.3-70b-versatile", GPT]
    assert [body["max_tokens"] for body in calls_of(t)] == [7, 100]


async def test_model_and_system_may_be_changed(talk: Maker) -> None:
    """From the next turn on; None is no system prompt."""
    t = talk("a", "b", "c", system="One.")
    await t("say", "x")
    t.chat.system, t.chat.model = "Two.", "gemini/gemini-3.5-flash"
    await t("say", "y")
    t.chat.system = None
    await t("say", "z")
    assert [body.get("system") for body in calls_of(t)] == ["One.", "Two.", None]
    assert [body["model"] for body in calls_of(t)] == [GPT, *["gemini/gemini-3.5-flash"] * 2]
    assert t.chat.system is None


async def test_forks_go_their_own_ways(talk: Maker) -> None:
    """A fork begins with the same history, fields and usage, and shares nothing from there."""
    t = talk("one", "two", "three", system="One.")
    await t("say", [vai.text("a")])
    other, history = t.chat.fork(), json.dumps(t.chat.messages)
    assert other.usage == t.chat.usage
    mine, t.chat = t.chat, other
    await t("say", "b")
    t.chat.system, t.chat.model = "Two.", "groq/other"
    t.chat.messages[0]["content"][0]["text"] = "changed"
    assert json.dumps(mine.messages) == history
    assert (mine.system, mine.model, type(other)) == ("One.", GPT, type(mine))
    assert other.usage.total_tokens > mine.usage.total_tokens
    t.chat = mine
    await t("say", "c")
    assert outline(mine.messages)[2:] == ["user: c", "assistant: three"]


async def test_without_content_the_model_goes_on(talk: Maker) -> None:
    """After an unfinished turn `say()` adds nothing; with nothing said it is a ValueError."""
    t = talk([vai.tool_use("weather", city="Oslo")], "rain", tools=[weather])
    with pytest.raises(ValueError, match="nothing was said"):
        await t("say")
    await t("run", "Rain?", max_turns=1)
    assert (await t("say")).text == "rain"
    assert outline(t.chat.messages)[-2:] == ["user: tool_result", "assistant: rain"]


async def test_a_history_to_begin_with(talk: Maker) -> None:
    """`messages` is copied: turns, answers, or a string."""
    given_: list[Any] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    t = talk("ok", messages=given_)
    await t("say", "c")
    assert len(given_) == 2
    assert outline(t.chat.messages) == ["user: a", "assistant: b", "user: c", "assistant: ok"]
    t = talk("ok", messages="a")
    assert (await t("say")).text == "ok"
    assert outline(t.chat.messages) == ["user: a", "assistant: ok"]


@pytest.mark.parametrize(
    "content",
    [
        "plain",
        [vai.text("one"), vai.image_url("https://example.com/a.png")],
        (vai.text("tuple"),),
        [vai.Text(text="pydantic")],
        [vai.document(b"%PDF-1.7", title="a")],
    ],
)
async def test_content_may_be_blocks(talk: Maker, content: Any) -> None:
    """Whatever `messages.create` takes; the history holds it as JSON can."""
    t = talk("ok", "ok")
    await t("say", content)
    await t.stream(content)
    assert json.loads(json.dumps(t.chat.messages)) == t.chat.messages
    assert calls_of(t)[1]["messages"][0] == calls_of(t)[1]["messages"][2]


@pytest.mark.parametrize("fields", [{"bogus": 1}, {"max_turn": 3}, {"stream": True}])
async def test_unknown_fields(talk: Maker, fields: JSON) -> None:
    """They are a TypeError where they are given, and leave the conversation as it was."""
    with pytest.raises(TypeError, match=next(iter(fields))):
        talk(**fields)
    t = talk("ok")
    with pytest.raises(TypeError, match=next(iter(fields))):
        await t("say", "a", **fields)
    assert t.chat.messages == []
    assert (await t("say", "a")).text == "ok"


# == What goes wrong ===================================================================================================


@pytest.mark.parametrize("way", ["say", "stream"])
@pytest.mark.parametrize(
    "fault",
    [vai.RateLimitError("busy"), [vai.text("half an ans"), vai.ProviderError("broken")], vai.StreamTruncated()],
    ids=["refused", "broken", "truncated"],
)
async def test_after_an_error_the_same_can_be_said(talk: Maker, way: str, fault: Any) -> None:
    """An error leaves the history as it was before the turn."""
    t = talk("one", fault, "two")
    await t("say", "a")
    history = json.dumps(t.chat.messages)
    with pytest.raises(vai.Error) as caught:
        await (t("say", "b") if way == "say" else t.stream("b"))
    assert isinstance(caught.value.result, vai.RunResult)
    assert caught.value.result.stop_reason == "error"
    assert json.dumps(t.chat.messages) == history
    assert (await t("say", "b")).text == "two"
    assert outline(t.chat.messages) == ["user: a", "assistant: one", "user: b", "assistant: two"]


async def test_an_error_after_tools_keeps_what_they_did(talk: Maker) -> None:
    """The calls ran and stay; `say()` goes on from there, so that nothing runs twice."""
    t = talk([vai.tool_use("weather", city="Oslo")], vai.OverloadedError("busy"), "rain", tools=[weather])
    with pytest.raises(vai.OverloadedError):
        await t("say", "Rain?")
    assert outline(t.chat.messages) == ["user: Rain?", "assistant: tool_use", "user: tool_result"]
    assert (await t("say")).text == "rain"


async def test_content_that_is_wrong(talk: Maker) -> None:
    """A bad block is refused with its place, and is not in the history."""
    t = talk("one", "two")
    await t("say", "a")
    with pytest.raises(vai.InvalidRequestError) as caught:
        await t("say", [{"type": "poem"}])
    assert caught.value.param == "messages[2].content[0].type"
    assert (await t("say", "b")).text == "two"


@pytest.mark.parametrize("text", ["", "   "])
async def test_nothing_said(talk: Maker, text: str) -> None:
    """An empty message is not what a provider takes: it is refused, or left to `say()`; no history is broken by it."""
    t = talk("one", "two")
    with contextlib.suppress(vai.InvalidRequestError, ValueError):
        await t("say", text)
    assert (await t("say", "b")).text


def delta(event: Any) -> bool:
    return bool(event.type == "content_block_delta")


async def test_leaving_a_stream_early(talk: Maker) -> None:
    """The answer is not in the history, what was said is; the next turn goes on from there."""
    t = talk("one two three", "four")
    result = await t.stream("a", until=delta)
    assert result.stop_reason == "cancelled"
    assert outline(t.chat.messages) == ["user: a"]
    assert (await t("say", "b")).text == "four"
    assert outline(t.chat.messages) == ["user: a", "user: b", "assistant: four"]


@pytest.mark.parametrize("enter", [False, True])
async def test_a_stream_that_was_not_begun(talk: Maker, enter: bool) -> None:
    """Nothing was said: there is nothing in the history, and the conversation is free."""
    t = talk("one")
    stream = t.chat.stream("a")
    if enter:
        if isinstance(stream, vai.Run):
            with stream:
                pass
        else:
            async with stream:
                pass
    assert t.chat.messages == []
    assert (await t("say", "b")).text == "one"


@pytest.mark.parametrize(
    ("partial", "kept"),
    [("discard", []), ("save", ["assistant: one"]), ("marked", ["assistant: one [interrupted]"])],
)
async def test_interrupting(talk: Maker, partial: Any, kept: list[str]) -> None:
    """The new message is part of the history, and so is what is to be kept of the answer."""
    t = talk("one two three", "four")
    heard: list[Any] = []

    def interrupt(run: Any, event: Any) -> None:
        if delta(event) and not heard:
            heard.append(run.interrupt("actually b", partial=partial))

    if isinstance(t.client, vai.Client):
        with t.chat.stream("a") as run:
            for event in run:
                interrupt(run, event)
    else:
        async with t.chat.stream("a") as run:
            async for event in run:
                interrupt(run, event)
    assert heard == [True]
    assert outline(t.chat.messages) == ["user: a", *kept, "user: actually b", "assistant: four"]


async def test_cancelling_a_stream(talk: Maker) -> None:
    """`cancel` in the middle of an answer ends the turn; usage counts what is known of it."""
    t = talk("one two three", "four")

    def cancel(event: Any) -> None:
        if delta(event):
            run.cancel()

    if isinstance(t.client, vai.Client):
        with t.chat.stream("a") as run:
            for event in run:
                cancel(event)
    else:
        async with t.chat.stream("a") as run:
            async for event in run:
                cancel(event)
    assert run.result.stop_reason == "cancelled"
    assert t.chat.usage.input_tokens > 0
    assert (await t("say")).text == "four"
    assert outline(t.chat.messages) == ["user: a", "assistant: four"]


async def test_cancelling_the_task(world: World) -> None:
    """A cancelled `say` lets go of the provider and leaves the conversation free."""
    async with vai.AsyncClient() as client:
        chat = client.conversation(model=GPT)
        task = asyncio.create_task(chat.say("[hang]"))
        await asyncio.to_thread(world.request)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(world.hung_up)
        assert outline(chat.messages) == ["user: [hang]"]
        chat.messages.clear()
        assert (await chat.say("[say hi]")).text == "hi"


async def test_no_answer_in_time(world: World) -> None:
    """`say` has nothing to return then and raises; `run` says so."""
    async with vai.AsyncClient() as client:
        chat = client.conversation(model=GPT, timeout=0.05)
        with pytest.raises(vai.ProviderTimeoutError) as caught:
            await chat.say("[hang]")
        assert caught.value.code == "run_timeout"
        assert (await chat.run("[hang]")).stop_reason == "timeout"
        assert (await chat.say("[say hi]", timeout=30)).text == "hi"
        assert chat.messages[-1]["role"] == "assistant"


async def test_one_turn_at_a_time() -> None:
    """A second turn is a RuntimeError, whatever kind it is, and does no harm to the first; a fork may talk."""
    model = vai.FakeModel("one two", "three", "four")
    async with vai.AsyncClient(engine=model) as client:
        chat = client.conversation(model=GPT)
        async with chat.stream("a") as stream:
            await anext(stream)
            for again in (chat.say("b"), chat.run("b")):
                with pytest.raises(RuntimeError, match=r"fork\(\)"):
                    await again
            async with chat.stream("b") as second:
                with pytest.raises(RuntimeError, match=r"fork\(\)"):
                    await anext(second)
            await chat.fork().say("c")
            await stream.final()
        assert outline(chat.messages) == ["user: a", "assistant: three"]
        assert (await chat.say("d")).text == "four"


def test_one_turn_at_a_time_in_threads(world: World) -> None:
    """The same for threads: the second one is refused while the first still waits."""
    with vai.Client() as client:
        chat = client.conversation(model=GPT)
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(chat.say("[wait 0.3][say one]").text))
        thread.start()
        world.request()
        with pytest.raises(RuntimeError, match="still answering"):
            chat.say("b")
        thread.join()
        assert answers == ["one"]
        assert chat.say("[say two]").text == "two"


# == Saving ============================================================================================================


def hook(*_: Any) -> None: ...


SECRETS = ("sk-secret", "tok-secret", "cookie-secret")
KEYS: JSON = {
    "provider_keys": {"openai": "sk-secret"},
    "extra_headers": {"cookie": "cookie-secret"},
    "before_call": hook, "after_response": hook, "on_tool_call": hook, "stop_when": hook, "max_turns": 9, "timeout": 5,
}  # fmt: skip


async def test_dump_and_load(talk: Maker) -> None:
    """The round trip through JSON keeps model, history, fields and usage; the functions of tools are given again."""
    call = [{"type": "thinking", "thinking": "Hm.", "signature": ""}, vai.tool_use("weather", city="Oslo")]
    t = talk(call, "rain", "more", "most", tools=[weather, vai.web_search(max_uses=2)], system=[vai.text("Be kind.")],
             model="anthropic/claude-sonnet-4-5", max_tokens=50, **KEYS)  # fmt: skip
    await t("say", [vai.text("Rain?"), vai.image(test_vai.PNG)])
    data = t.chat.dump()
    raw = json.dumps(data)
    assert not [word for word in (*SECRETS, "before_call", "hook", "max_turns") if word in raw]
    for given_ in (data, json.loads(raw), raw):
        loaded = t.client.load_conversation(given_, tools=[weather])
        assert type(loaded) is type(t.chat)
        assert loaded.dump()["fields"]["tools"] == data["fields"]["tools"]
        assert loaded.dump() == data
        assert (loaded.model, loaded.usage) == (t.chat.model, t.chat.usage)
    loaded.messages[0]["content"][0]["text"] = "changed"
    assert json.dumps(data) == raw
    t.chat = t.client.load_conversation(raw, tools=[weather])
    await t("say", "And?")
    body = calls_of(t)[-1]
    assert (body["system"], body["max_tokens"]) == ([{"type": "text", "text": "Be kind."}], 50)
    assert [tool.get("name") or tool["type"] for tool in body["tools"]] == ["weather", "web_search"]


@pytest.mark.parametrize(
    "fields",
    [
        {"extra_body": {"provider_keys": {"openai": "sk-secret"}, "seed": 7}},
        {"extra_body": {"tools": [{"type": "mcp", "headers": {"Authorization": "tok-secret"}}]}},
        {"extensions": {"openai": {"a": [{"API_KEY": "sk-secret"}]}}},
        {
            "mcp_servers": [
                {"type": "url", "name": "x", "url": "https://x.example", "authorization_token": "tok-secret"}
            ]
        },
    ],
    ids=["extra_body", "nested", "extensions", "mcp_servers"],
)
def test_no_key_is_saved(fields: JSON) -> None:
    """Wherever a request may hold one."""
    with vai.Client(engine=vai.FakeModel()) as client:
        chat = client.conversation(model="anthropic/claude-sonnet-4-5", tools=[weather], **fields)
        raw = json.dumps(chat.dump())
        assert client.load_conversation(raw).dump() == chat.dump()
    assert not [word for word in SECRETS if word in raw]
    assert ('"seed": 7' in raw) == ("seed" in str(fields))


def test_loaded_tools_cannot_run_without_their_functions() -> None:
    """A described tool is still told to the model; its call gets an error result."""
    model = vai.FakeModel([vai.tool_use("weather", city="Oslo")], "sorry")
    with vai.Client(engine=model) as client:
        data = client.conversation(model=GPT, tools=[weather]).dump()
        assert client.load_conversation(data).say("Rain?").text == "sorry"
    assert "weather" in model.calls[1]["messages"][-1]["content"][0]["content"]


EMPTY: JSON = {"version": 1, "model": GPT, "messages": [], "fields": {}, "usage": {}}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("null", "dump"),
        ("[]", "dump"),
        (5, "dump"),
        ({}, "version"),
        ({**EMPTY, "version": 2}, "version 2"),
        ({"version": 1}, "model"),
        ({**EMPTY, "model": 5}, "model"),
        ({**EMPTY, "messages": 0}, "messages"),
        ({**EMPTY, "messages": "Hi"}, "messages"),
        ({**EMPTY, "messages": [5]}, r"messages\[0\]"),
        ({**EMPTY, "messages": [{"role": "user", "content": [{"type": "poem"}]}]}, r"messages\[0\].content\[0\].type"),
        ({**EMPTY, "messages": [{"role": "user", "content": [vai.tool_result("t1")]}]}, "tool_use_id"),
        ({**EMPTY, "fields": None}, "dump"),
        ({**EMPTY, "fields": "abc"}, "dump"),
        ({**EMPTY, "fields": {"bogus": 1}}, "bogus"),
        ({**EMPTY, "fields": {"tools": 5}}, "tools"),
        ({**EMPTY, "usage": "much"}, "usage"),
    ],
)
def test_what_is_no_conversation(data: Any, says: str) -> None:
    """A ValueError says what is wrong with it."""
    with vai.Client(engine=vai.FakeModel()) as client, pytest.raises(ValueError, match=f"(?i){says}"):
        client.load_conversation(data, tools=[weather])


# == Every provider ====================================================================================================


@both_modes
@pytest.mark.parametrize("first", MODELS)
async def test_the_model_may_change_at_any_turn(world: World, mode: str, first: str) -> None:
    """One history, thoughts and tool calls in it, goes round all seven, and through JSON on the way."""
    thinking = {"type": "enabled", "budget_tokens": 2000}
    order = [*MODELS][[*MODELS].index(first) :] + [*MODELS][: [*MODELS].index(first)]
    async with vai.AsyncClient(**world.options(mode)) as client:
        chat = client.conversation(model=MODELS[first], tools=[weather], thinking=thinking, system="Be kind.")
        for number, provider in enumerate(order):
            chat.model = MODELS[provider]
            prompt = f'[think Hm.][tool weather {{"city":"Oslo"}}][then][say rain {number}]'
            answer = await chat.say(prompt)
            assert answer.text == f"rain {number}"
            assert answer.model.startswith(f"{provider}/")
            if number == 2:
                chat = client.load_conversation(json.dumps(chat.dump()), tools=[weather])
            if number == 4:
                async with chat.stream("[think Hm.][words 30]") as stream:
                    async for event in stream:
                        if delta(event):
                            break
    assert sum(turn["role"] == "assistant" for turn in chat.messages) == 14
    assert chat.usage.total_tokens > 0


# == A model for tests =================================================================================================


async def asked(fake: vai.FakeModel, way: str, **fields: Any) -> vai.Message:
    request: JSON = {"model": GPT, "messages": "Hi", **fields}
    async with vai.AsyncClient(engine=fake, max_retries=0) as client:
        if way == "whole":
            return await client.messages.create(**request)
        async with client.messages.stream(**request) as stream:
            return await stream.final()


THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "sig"}
MESSAGE = vai.Message.model_validate(
    {"id": "msg_mine", "type": "message", "role": "assistant", "model": GPT, "content": [vai.text("cut")],
     "stop_reason": "max_tokens", "usage": {"input_tokens": 5, "output_tokens": 7, "total_tokens": 12}}
)  # fmt: skip
CALL = vai.tool_use("weather", city="Oslo")


@pytest.mark.parametrize(
    ("answer", "content", "stop"),
    [
        ([{**CALL, "toolset_name": "computer"}], [{**CALL, "toolset_name": "computer"}], "tool_use"),
        ("Hello, you.", [vai.text("Hello, you.")], "end_turn"),
        ("", [], "end_turn"),
        ([], [], "end_turn"),
        ([vai.text("a"), vai.text("b")], [vai.text("a"), vai.text("b")], "end_turn"),
        ((vai.Text(text="pydantic"),), [vai.text("pydantic")], "end_turn"),
        ([THOUGHT, vai.text("Yes.")], [THOUGHT, vai.text("Yes.")], "end_turn"),
        ([{**THOUGHT, "thinking": ""}, vai.text("Yes.")], [{**THOUGHT, "thinking": ""}, vai.text("Yes.")], "end_turn"),
        ([CALL], [CALL], "tool_use"),
        ([vai.text("Let me see."), CALL, {**CALL, "id": "toolu_2"}],
         [vai.text("Let me see."), CALL, {**CALL, "id": "toolu_2"}], "tool_use"),
        (MESSAGE, [vai.text("cut")], "max_tokens"),
        (lambda body: f"You said {body['messages'][-1]['content']}.", [vai.text("You said Hi.")], "end_turn"),
        (lambda body: MESSAGE, [vai.text("cut")], "max_tokens"),
    ],
)  # fmt: skip
async def test_answers_of_a_script(answer: Any, content: list[JSON], stop: str) -> None:
    """A text, blocks, a message or a function; streamed, they add up to the same."""
    whole, streamed = [await asked(vai.FakeModel(answer), way) for way in ("whole", "streamed")]
    wire = [{key: value for key, value in block.to_wire().items() if value is not None} for block in whole.content]
    assert wire == content
    assert (whole.stop_reason, whole.model) == (stop, GPT)
    assert whole.usage.total_tokens > 0
    streamed.usage = whole.usage
    if whole.id != "msg_mine":
        streamed.id = whole.id
    assert streamed.to_wire() == whole.to_wire()


async def test_usage_does_not_depend_on_the_way() -> None:
    """The same request costs the same, streamed or not."""
    whole, streamed = [await asked(vai.FakeModel("Hello"), way) for way in ("whole", "streamed")]
    assert whole.usage == streamed.usage


@given(st.text(min_size=1))
async def test_texts_come_in_words(said: str) -> None:
    """Whatever the text, its pieces add up to it."""
    async with vai.AsyncClient(engine=vai.FakeModel(said)) as client:
        async with client.messages.stream(model=GPT, messages="Hi") as stream:
            pieces = [piece async for piece in stream.text]
    assert "".join(pieces) == said
    assert len(pieces) >= min(2, len(said.split()))


@pytest.mark.parametrize("way", ["whole", "streamed"])
async def test_errors_of_a_script(way: str) -> None:
    """They are raised as they are; in the middle of an answer after what came before."""
    fault = vai.RateLimitError("busy", retry_after=7)
    with pytest.raises(vai.RateLimitError, match="busy") as caught:
        await asked(vai.FakeModel(fault), way)
    assert caught.value.retry_after == 7
    with pytest.raises(vai.OverloadedError, match="over"):
        await asked(vai.FakeModel(lambda body: vai.OverloadedError("over")), way)
    with pytest.raises(vai.ProviderError, match="broke"):
        await asked(vai.FakeModel([vai.text("half an"), vai.ProviderError("broke")]), way)


async def test_a_stream_breaks_off_after_what_came() -> None:
    """The events before an error are handed out."""
    async with vai.AsyncClient(engine=vai.FakeModel([vai.text("half an"), vai.StreamTruncated()])) as client:
        async with client.messages.stream(model=GPT, messages="Hi") as stream:
            with pytest.raises(vai.StreamTruncated):
                await stream.final()
            assert stream.message is not None
            assert stream.message.text == "half an"


@pytest.mark.parametrize(
    ("script", "requests"),
    [
        ([vai.OverloadedError("over", retry_after=0), "fine"], 2),
        ([[vai.text("half"), vai.OverloadedError("over", retry_after=0)], "fine"], 1),
    ],
    ids=["before", "in the middle"],
)
async def test_what_is_tried_again(script: list[Any], requests: int) -> None:
    """As with a real model: an answer that had begun is not asked for again."""
    model = vai.FakeModel(*script)
    async with vai.AsyncClient(engine=model, max_retries=2) as client:
        with contextlib.suppress(vai.OverloadedError):
            await client.messages.create(model=GPT, messages="Hi")
    assert len(model.calls) == requests


@pytest.mark.parametrize("way", ["whole", "streamed"])
async def test_a_script_that_is_at_its_end(way: str) -> None:
    """One request too many is an AssertionError that says so, and is recorded."""
    model = vai.FakeModel("one")
    await asked(model, way)
    with pytest.raises(AssertionError, match="1 answers; this is request 2"):
        await asked(model, way)
    assert len(model.calls) == 2


@pytest.mark.parametrize(
    "answer",
    [5, None, {"type": "text", "text": "x"}, ["text"], [{"type": "text"}], [{"text": "x"}], lambda body: 5],
    ids=["number", "none", "block", "list of strings", "no text", "no type", "function"],
)
async def test_answers_that_are_none(answer: Any) -> None:
    """A script that holds something else is a TypeError that shows it, not one from deep inside."""
    with pytest.raises(TypeError, match="answer"):
        await asked(vai.FakeModel(answer), "whole")


async def test_calls_are_recorded() -> None:
    """The bodies as the application made them, whatever becomes of them later; no keys."""
    model = vai.FakeModel("one", "two")
    messages: list[Any] = [{"role": "user", "content": [vai.text("Hi")]}]
    await asked(model, "whole", messages=messages, tools=[weather], provider_keys={"openai": "sk-secret"}, system="x")
    messages[0]["content"][0]["text"] = "changed"
    await asked(model, "streamed", messages=messages)
    first = model.calls[0]
    assert first["messages"] == [{"role": "user", "content": [vai.text("Hi")]}]
    assert (first["model"], first["system"], first["tools"]) == (GPT, "x", [weather.to_wire()])
    assert [body.get("stream", False) for body in model.calls] == [False, True]
    assert "sk-secret" not in json.dumps(model.calls)


USED = {"role": "assistant", "content": [CALL]}
HI = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"model": "mistral/large"},
        {"model": "openai/../x"},
        {"messages": [{"role": "user", "content": [{"type": "poem"}]}]},
        {"messages": [HI, USED, {"role": "user", "content": [vai.tool_result("other")]}]},
        {"temperature": float("nan")},
        {"max_tokens": -1},
        {"tools": [vai.computer_use()]},
        {"tools": [{"name": "a b", "input_schema": 5}]},
        {"tool_choice": {"type": "tool", "name": "nothing"}},
        {"messages": [{"role": "user", "content": [{"type": "video", "source": {"type": "url", "url": "https://x"}}]}]},
        {"output": {"modalities": ["image"]}},
        {"model": "anthropic/claude-opus-4-8", "messages": [HI, {"role": "assistant", "content": "I"}]},
    ],
    ids=lambda fields: json.dumps(fields, default=repr)[:40],
)
async def test_requests_are_checked_as_by_the_real_thing(world: World, fields: JSON) -> None:
    """Same class, same fields as in direct mode, and nothing is recorded."""
    model = vai.FakeModel("one")
    found = []
    for engine in (model, vai.Direct()):
        async with vai.AsyncClient(engine=engine, max_retries=0) as client:
            with pytest.raises(vai.InvalidRequestError) as caught:
                await client.messages.create(**{"model": GPT, "messages": "Hi", **fields})
            found.append(test_vai.told(caught.value))
    assert found[0] == found[1]
    assert not model.calls
    assert not world.requests


@pytest.mark.parametrize(
    "messages", [[HI, USED], [HI, USED, HI], [HI, USED, HI, {"role": "user", "content": [vai.tool_result(CALL["id"])]}]]
)
async def test_calls_without_results_are_refused(messages: list[JSON]) -> None:
    """As every provider does; the id and the place are named."""
    with pytest.raises(vai.InvalidRequestError, match=CALL["id"]) as caught:
        await asked(vai.FakeModel("one"), "whole", messages=messages, tools=[weather])
    assert caught.value.param == "messages[1]"


@pytest.mark.parametrize("provider", MODELS)
async def test_every_provider_is_played(provider: str) -> None:
    """An answer says whose model it is of; an alias stands for one."""
    for way in ("whole", "streamed"):
        assert (await asked(vai.FakeModel("x"), way, model=MODELS[provider])).model == MODELS[provider]
    assert (await asked(vai.FakeModel("x"), "whole", model="fast")).text == "x"


class City(BaseModel):
    name: str


def test_an_application_is_tested() -> None:
    """run, run_stream, extract, a conversation and models, one script for all of them."""
    script = [[CALL], "rain", [CALL], "snow", '{"name": "Oslo"}', "bye"]
    model = vai.FakeModel(*script)
    with vai.Client(engine=model) as client:
        assert client.messages.run(model=GPT, messages="Rain?", tools=[weather]).text == "rain"
        with client.messages.run_stream(model=GPT, messages="Snow?", tools=[weather]) as run:
            assert "".join(run.text) == "snow"
        assert client.messages.extract(City, model=GPT, messages="Where?").parsed == City(name="Oslo")
        assert client.conversation(model=GPT).say("Bye").text == "bye"
        assert all(row.available for row in client.models.list().providers)
    assert len(model.calls) == len(script)
    assert model.calls[1]["messages"][-1]["content"][0]["content"] == "rain in Oslo"


def test_threads_share_a_script() -> None:
    """Each request gets one answer, whoever asks."""
    model = vai.FakeModel(*[lambda body: body["messages"][0]["content"]] * 20)
    with vai.Client(engine=model) as client:
        found: list[str] = []

        def ask(number: int) -> None:
            found.append(client.messages.create(model=GPT, messages=f"n{number}").text)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(found) == sorted(f"n{number}" for number in range(20))
