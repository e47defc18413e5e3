"""A user's script with all of the API: `mypy --strict` checks its types, test_run.py runs it against the sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, assert_type

from pydantic import BaseModel

import vai
from vai import AsyncClient, Client, tool

MODEL = "anthropic/claude-sonnet-4-5"
CALL = '[tool weather {"city":"Oslo"}][tool Desk_ask {"what":"tea"}][then][say Wet.]'


@tool
def weather(city: str, unit: Literal["c", "f"] = "c") -> str:
    """The weather in a city."""
    return f"Rain in {city}, 7 °{unit}"


@tool(timeout=5, description="How far it is.")
async def distance(city: str) -> int:
    return len(city)


class Desk:
    @tool(name="Desk_ask")
    def ask(self, what: str) -> str:
        return f"No {what}."


class Person(BaseModel):
    name: str
    age: int


@dataclass
class Point:
    x: float


class Place(TypedDict):
    city: str


assert_type(weather("Oslo", unit="f"), str)
assert_type(weather.input_schema, dict[str, Any])
desk = Desk()
assert_type(desk.ask("tea"), str)
desk.ask(7)  # type: ignore[arg-type]
TOOLS: list[vai.ToolLike] = [
    weather,
    distance,
    desk.ask,
    vai.web_search(max_uses=2),
    {"name": "x", "input_schema": {"type": "object"}},
]


def before(request: dict[str, Any]) -> None:
    request["system"] = "Be brief."


async def after(response: vai.Message) -> None:
    assert_type(response.tool_calls, list[vai.ToolUse])


def log(name: str, input: dict[str, Any], output: Any, error: str | None) -> None:
    assert error is None, (name, input, output)


def blocking() -> None:
    with Client(timeout=60, max_retries=1) as client:
        message = client.messages.create(model=MODEL, messages="[say Hi.]", max_tokens=100)
        assert_type(message, vai.Message)
        assert_type(message.text, str)
        assert_type(message.usage.total_tokens, int)
        assert_type(message.dropped, list[str])
        turns: list[vai.Turn] = [
            {"role": "user", "content": "[say Hi.]"},
            message,
            {"role": "user", "content": [vai.text("[say Ho.]")]},
        ]
        assert client.messages.create(model=MODEL, messages=turns).text == "Ho."

        with client.messages.stream(model=MODEL, messages="[say Hi.]", temperature=0.5) as stream:
            assert_type(stream, vai.MessageStream)
            for event in stream:
                assert_type(event, vai.StreamEvent)
                if event.type == "content_block_delta" and event.delta.type == "text_delta":
                    assert_type(event.delta.text, str)
            assert_type(stream.text, Iterator[str])
            assert_type(stream.final(), vai.Message)
            assert_type(stream.message, vai.Message | None)

        result = client.messages.run(
            model=MODEL,
            messages=CALL,
            tools=TOOLS,
            max_tool_calls=5,
            max_turns=4,
            max_total_tokens=100_000,
            timeout=30,
            stop_when=lambda response: "stop" in response.text,
            parallel_tools=True,
            tool_timeout=10,
            before_call=before,
            after_response=after,
            on_tool_call=log,
        )
        client.messages.run(
            model=MODEL,
            messages="[say Hi.]",
            max_tool_calls=None,
            max_turns=None,
            max_total_tokens=None,
            timeout=None,
            stop_when=None,
            tool_timeout=None,
            before_call=None,
            after_response=None,
            on_tool_call=None,
        )
        assert_type(result, vai.RunResult)
        assert_type(result.response, vai.Message | None)
        assert_type(result.messages, list[dict[str, Any]])
        assert_type(result.stop_reason, str | None)
        assert_type(result.usage, vai.Usage)
        for step in result.steps:
            assert_type(step, vai.Step)
            for call in step.tool_calls:
                assert_type(call, vai.ToolCall)
                assert_type(call.error, str | None)
        assert result.text == "Wet."

        with client.messages.run_stream(model=MODEL, messages=f"{CALL}[slow 0.005]", tools=TOOLS) as run:
            assert_type(run, vai.Run)
            for change in run:
                match change:
                    case vai.ToolCallStart(call) | vai.ToolResult(call):
                        assert_type(call, vai.ToolCall)
                    case vai.StepComplete(index, step):
                        assert_type(index, int)
                        assert_type(run.interrupt("[say Then this.]", partial="marked"), bool)
                    case vai.Interrupted(kept):
                        assert_type(kept, str)
                        run.cancel()
                    case vai.RunComplete(result):
                        assert_type(result, vai.RunResult)
            assert_type(run.result, vai.RunResult)
        assert run.result.stop_reason == "cancelled"

        person = client.messages.extract(Person, model=MODEL, messages="Who?")
        assert_type(person, vai.Extracted[Person])
        assert_type(person.parsed, Person)
        assert_type(person.usage, vai.Usage)
        assert_type(client.messages.extract(Point, model=MODEL, messages="Where?").parsed, Point)
        assert_type(client.messages.extract(Place, model=MODEL, messages="Where?").parsed, Place)
        assert_type(client.messages.extract(list[int], model=MODEL, messages="Which?").parsed, list[int])
        colour: Literal["red", "blue"] = client.messages.extract(
            Literal["red", "blue"], model=MODEL, messages="Which?"
        ).parsed
        assert colour in ("red", "blue")

        chat = client.conversation(model=MODEL, system="Be brief.", tools=TOOLS, max_turns=5)
        assert_type(chat, vai.Conversation)
        assert_type(chat.say(CALL), vai.Message)
        assert_type(chat.run("[say Hi.]"), vai.RunResult)
        with chat.stream("[say Hi.]", max_tokens=50) as run:
            assert_type(run.text, Iterator[str])
            assert "".join(run.text) == "Hi."
        fork = chat.fork()
        assert_type(fork, vai.Conversation)
        fork.model = "openai/gpt-4o"
        assert_type(fork.dump(), dict[str, Any])
        again = client.load_conversation(chat.dump(), tools=TOOLS)
        assert again.say("[say Again.]").text == "Again."

        models = client.models.list()
        assert_type(models.providers, list[vai.ProviderInfo])

        try:
            client.messages.run(model=MODEL, messages="[error 400]")
        except vai.InvalidRequestError as error:
            assert_type(error.status, int)
            assert_type(error.param, str | None)
            assert_type(error.code, str | None)
        except vai.Error as error:
            assert_type(error.provider, str | None)
            raise


async def asynchronous() -> None:
    async with AsyncClient() as client:
        assert_type(await client.messages.create(model=MODEL, messages="[say Hi.]"), vai.Message)
        async with client.messages.stream(model=MODEL, messages="[say Hi.]") as stream:
            assert_type(stream, vai.AsyncMessageStream)
            assert_type(stream.text, AsyncIterator[str])
            async for event in stream:
                assert_type(event, vai.StreamEvent)
            assert_type(await stream.final(), vai.Message)
        assert_type(await client.messages.run(model=MODEL, messages=CALL, tools=TOOLS), vai.RunResult)
        async with client.messages.run_stream(model=MODEL, messages=CALL, tools=TOOLS) as run:
            assert_type(run, vai.AsyncRun)
            async for change in run:
                assert_type(change, vai.RunEvent)
            assert_type(await run.final(), vai.RunResult)
        assert_type((await client.messages.extract(Person, model=MODEL, messages="Who?")).parsed, Person)
        chat = client.conversation(model=MODEL)
        assert_type(chat, vai.AsyncConversation)
        assert_type(await chat.say("[say Hi.]"), vai.Message)
        assert_type(chat.fork(), vai.AsyncConversation)
        assert_type(client.load_conversation(chat.dump()), vai.AsyncConversation)
        assert_type(await client.models.list(), vai.Models)


def tested() -> None:
    """As an application's own tests do."""
    model = vai.FakeModel([vai.tool_use("weather", city="Oslo")], "Wet.", vai.RateLimitError("busy"))
    with Client(engine=model, max_retries=0) as client:
        assert client.messages.run(model=MODEL, messages="Hi", tools=[weather]).text == "Wet."
        assert_type(model.calls, list[dict[str, Any]])


blocking()
asyncio.run(asynchronous())
tested()
print("done")  # noqa: T201
