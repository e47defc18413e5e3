"""A conversation goes on with another model at any point, and back, with tool calls and reasoning in its history.

The sandbox refuses what a provider would: foreign or altered signatures, ids without a match, roles out of order.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest

import vai
from sandbox import Request, Sandbox

MODELS = (
    "anthropic/claude-sonnet-5-5",
    "anthropic/claude-sonnet-4-5",
    "openai/gpt-5-mini",
    "oai-resp/gpt-6-astra",
    "groq/openai/gpt-oss-120b",
    "gemini/gemini-3.5-flash",
    "gemini-oauth/gemini-3.1-pro-preview",
    "cerebras/gpt-oss-120b",
)
WEATHER = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
FIELDS: Any = {"tools": [WEATHER], "thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 4000}
TWO_CALLS = '[think Where to look?][tool weather {"city":"Oslo"}][tool weather {"city":"Bergen"}]'
ONE_CALL = '[think And there?][tool weather {"city":"Narvik"}]'


class Conversation:
    """Messages so far, with whichever models answered them."""

    def __init__(self, client: vai.AsyncClient, sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
        self.client, self.sandbox, self.http = client, sandbox, http
        self.messages: list[Any] = []
        self.results: list[str] = []
        self.reasoned: list[tuple[str, list[str]]] = []  # provider, and what it wants back
        self.streaming = False

    def say(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    async def ask(self, model: str) -> vai.Message:
        """The answer of this model; the tools that it calls are run."""
        if self.streaming:
            async with self.client.messages.stream(model=model, messages=self.messages, **FIELDS) as stream:
                answer = await stream.final()
        else:
            answer = await self.client.messages.create(model=model, messages=self.messages, **FIELDS)
        await self.check(self.sandbox.requests[-1])
        self.messages.append(answer)
        if answer.tool_calls:
            found = [f"{call.input['city']} has {len(self.messages)} drops" for call in answer.tool_calls]
            blocks = [vai.tool_result(call.id, text) for call, text in zip(answer.tool_calls, found, strict=True)]
            self.messages.append({"role": "user", "content": blocks})
            self.results += found
        return answer

    async def check(self, request: Request) -> None:
        """The provider got every tool result, and of all reasoning its own, as it had given it."""
        sent = json.dumps(request.body)
        assert [text for text in self.results if text not in sent] == []
        own = [text for provider, texts in self.reasoned if provider == request.provider for text in texts]
        assert list(reasoning(request.body)) == own
        self.reasoned.append((request.provider, list(reasoning(await self.replayed(request)))))

    async def replayed(self, request: Request) -> Any:
        """What the provider answers to this request, in its own format; it always answers the same."""
        ids = request.provider == "oai-resp"  # there they depend on whether the answer is streamed
        body = {name: value for name, value in (request.body or {}).items() if ids or not name.startswith("stream")}
        named = {name: value for name, value in request.headers.items() if not name.startswith("Content")}
        url = self.sandbox.url + request.path.replace("streamG", "g")
        async with self.http.post(url, json=body, headers=named) as response:
            return json.loads((await response.text()).rpartition("data: ")[2])


def reasoning(body: Any) -> Iterator[str]:
    """What carries reasoning in a request or an answer of any provider, in order."""
    if isinstance(body, list):
        for item in body:
            yield from reasoning(item)
    elif isinstance(body, dict):
        for name, value in body.items():
            if name not in ("signature", "encrypted_content", "thoughtSignature", "reasoning", "data"):
                yield from reasoning(value)
            elif isinstance(value, str) and value != "skip_thought_signature_validator":
                yield value


@pytest.fixture
async def conversation(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Conversation]:
    async with Sandbox() as sandbox, aiohttp.ClientSession() as http:
        for name, value in sandbox.environ.items():
            monkeypatch.setenv(name, value)
        async with vai.AsyncClient(max_retries=0) as client:
            yield Conversation(client, sandbox, http)


pairs = pytest.mark.parametrize(("one", "other"), list(itertools.product(MODELS, repeat=2)))
both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])


@both_ways
@pairs
async def test_between_turns(conversation: Conversation, one: str, other: str, streaming: bool) -> None:
    """A new question goes to another model, and the next one back to the first."""
    conversation.streaming = streaming
    for number, model in enumerate((one, other, one)):
        conversation.say(f"Rain? {TWO_CALLS}[then][think So.][say Rain {number}.]")
        assert [call.input["city"] for call in (await conversation.ask(model)).tool_calls] == ["Oslo", "Bergen"]
        answer = await conversation.ask(model)
        assert (answer.text, answer.stop_reason) == (f"Rain {number}.", "end_turn")
        assert answer.dropped == []
    assert len(conversation.results) == 6
    assert all(texts for provider, texts in conversation.reasoned if provider != "openai")


@both_ways
@pairs
async def test_inside_a_tool_loop(conversation: Conversation, one: str, other: str, streaming: bool) -> None:
    """The results of one model's calls go to another one, whose call is answered to the first.

    Where a Claude with a thinking budget would demand thinking that never was, it answers without, and that is said.
    """
    conversation.streaming = streaming
    conversation.say(f"Rain? {TWO_CALLS}[then]{ONE_CALL}[then][think So.][say Rain.]")
    answers = [await conversation.ask(model) for model in (one, other, one)]
    assert [len(answer.tool_calls) for answer in answers] == [2, 1, 0]
    assert answers[-1].text == "Rain."
    assert len(conversation.results) == 3
    for before, answer in itertools.pairwise(answers):
        unthought = "claude-sonnet-4-5" in answer.model and not before.model.startswith("anthropic/")
        assert answer.dropped == (["thinking"] if unthought else [])
    conversation.say("[say Bye.]")
    assert (await conversation.ask(other)).text == "Bye."


async def test_round_all_providers(conversation: Conversation) -> None:
    """One tool loop may have a different model for every step, twice round, and end with any of them."""
    round_trip = (*MODELS, *MODELS)
    conversation.say("Rain? " + f"{TWO_CALLS}[then]" * len(round_trip) + "[say Rain.]")
    for number, model in enumerate(round_trip):
        conversation.streaming = bool(number % 2)
        assert len((await conversation.ask(model)).tool_calls) == 2
    messages, reasoned = conversation.messages, conversation.reasoned
    for model in MODELS:
        conversation.messages, conversation.reasoned = list(messages), list(reasoned)
        assert (await conversation.ask(model)).text == "Rain."
