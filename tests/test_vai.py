"""Both clients give the same answers and errors in both modes; content helpers; the login of gemini-oauth."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import inspect
import json
import os
import re
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

import server
import vai
from sandbox import Request, Sandbox

T = TypeVar("T")
JSON = dict[str, Any]

MODELS = {
    "anthropic": "anthropic/claude-sonnet-5-5",
    "openai": "openai/gpt-5-mini",
    "oai-resp": "oai-resp/gpt-6-astra",
    "groq": "groq/openai/gpt-oss-120b",
    "gemini": "gemini/gemini-3.5-flash",
    "gemini-oauth": "gemini-oauth/gemini-3.1-pro-preview",
    "cerebras": "cerebras/gpt-oss-120b",
}
CLAUDE = MODELS["anthropic"]
WEATHER: JSON = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALLS = '[tool weather {"city":"Oslo"}][tool weather {"city":"Bergen"}]'
both_modes = pytest.mark.parametrize("mode", ["direct", "proxy"])
both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])


class World:
    """The sandbox, and gateways in front of it, on a thread of their own, so that a test may block its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="world", daemon=True)
        self.thread.start()
        self.sandbox = Sandbox()
        self.servers: list[TestServer] = []
        self.before = 0
        self.threads_before: set[threading.Thread] = set()
        self.run(self.sandbox.start())
        self.proxy = self.gateway(self.sandbox.environ)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def gateway(self, environ: Mapping[str, str]) -> str:
        """The URL of a new gateway that takes the key `vai_sk_of_a_caller`."""

        async def start() -> TestServer:
            config = server.Config.model_validate({"auth": {"keys": [{"key": "vai_sk_of_a_caller", "name": "ada"}]}})
            running = TestServer(server.make_app(config, server.make_engine(config, environ)))
            await running.start_server()
            return running

        self.servers.append(self.run(start()))
        return str(self.servers[-1].make_url("")).rstrip("/")

    def options(self, mode: str) -> JSON:
        """What a client is made with."""
        return {} if mode == "direct" else {"base_url": self.proxy, "api_key": "vai_sk_of_a_caller"}

    def request(self, number: int = 1) -> Request:
        """The request of this number since the test began; waits for it."""
        return self.run(self.sandbox.wait_for(self.before + number))

    @property
    def requests(self) -> list[Request]:
        seen = self.sandbox.seen - self.before
        return list(self.sandbox.requests)[-seen:] if seen else []

    @property
    def bodies(self) -> list[JSON]:
        return [request.body or {} for request in self.requests]

    def hung_up(self, number: int = 1) -> None:
        """Returns once the caller of this request has gone away before its answer was whole."""
        self.run(self.request(number).closed.wait())

    @property
    def threads(self) -> int:
        """How many threads clients have started since the test began, and still run."""
        return sum(thread.name == "vai" for thread in set(threading.enumerate()) - self.threads_before)

    def close(self) -> None:
        for running in self.servers:
            self.run(running.close())
        self.run(self.sandbox.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def running() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture
def world(running: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    """The environment points to the sandbox, and to nothing else."""
    for adapter in vai.PROVIDERS.values():
        for name in (*adapter.key_env, *adapter.url_env):
            monkeypatch.delenv(name, raising=False)
    for name, value in running.sandbox.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    running.before, running.threads_before = running.sandbox.seen, set(threading.enumerate())
    return running


# == Both clients, both modes ==========================================================================================


class Outcome(NamedTuple):
    message: JSON
    error: JSON
    events: list[JSON]
    dropped: list[str]

    @property
    def gist(self) -> str:
        """What does not depend on the bytes of the request, as ids and signatures (and their place) do."""
        shown = [block for block in self.message["content"] if block.get("thinking") != ""]
        said = [next(block[name] for name in ("text", "thinking", "input") if name in block) for block in shown]
        lines = [f"{block['type']}: {text}" for block, text in zip(shown, said, strict=True)]
        return "\n".join([*lines, f"STOP: {self.message['stop_reason']} {self.message['stop_sequence']}"])


def told(fault: vai.Error) -> JSON:
    names = ("status", "message", "param", "code", "provider", "provider_error", "retry_after")
    return {"class": type(fault)} | {name: getattr(fault, name) for name in names}


async def asked(client: vai.AsyncClient, streaming: bool, request: JSON) -> Outcome:
    events: list[JSON] = []
    try:
        if not streaming:
            message = await client.messages.create(**request)
            return Outcome(message.to_wire(), {}, [], message.dropped)
        async with client.messages.stream(**request) as stream:
            async for event in stream:
                events.append(event.to_wire())
            message = await stream.final()
            return Outcome(message.to_wire(), {}, events, stream.dropped)
    except vai.Error as fault:
        return Outcome({}, told(fault), events, [])


def asked_blocking(client: vai.Client, streaming: bool, request: JSON) -> Outcome:
    events: list[JSON] = []
    try:
        if not streaming:
            message = client.messages.create(**request)
            return Outcome(message.to_wire(), {}, [], message.dropped)
        with client.messages.stream(**request) as stream:
            events += (event.to_wire() for event in stream)
            return Outcome(stream.final().to_wire(), {}, events, stream.dropped)
    except vai.Error as fault:
        return Outcome({}, told(fault), events, [])


async def outcome(world: World, provider: str, prompt: str, *, streaming: bool, **fields: Any) -> Outcome:
    """What four clients get, one for all. They bring their key, since one of the gateway's is not theirs to mend."""
    request = {"model": MODELS[provider], "messages": prompt, "provider_keys": {provider: "key-of-mine"}} | fields
    found = []
    for mode in ("direct", "proxy"):
        async with vai.AsyncClient(**world.options(mode), max_retries=0) as client:
            found.append(await asked(client, streaming, request))
        with vai.Client(**world.options(mode), max_retries=0) as blocking:
            found.append(asked_blocking(blocking, streaming, request))
    if "reset" in prompt:  # takes along what was not read yet
        found = [out._replace(events=out.events[:1]) for out in found]
    for other in found[1:]:
        assert other == found[0]
    assert {request.key for request in world.requests} <= {"key-of-mine"}
    return found[0]


STRUCTURED: JSON = {"output_format": {"type": "json_schema", "json_schema": WEATHER["input_schema"]}}
SCRIPTS: dict[str, tuple[str, JSON, str]] = {  # prompt, fields, and what the answer says
    "text": ("[say Grüße, 世界 \U0001f44b]", {}, r"text: Grüße, 世界 \U0001f44b"),
    "thinking": ("[think Hm.][say Yes.]", {"thinking": {"type": "enabled", "budget_tokens": 2000}}, r"text: Yes\."),
    "tools": (CALLS, {"tools": [WEATHER]}, r"tool_use: {'city': 'Oslo'}\ntool_use: {'city': 'Bergen'}\nSTOP: tool_use"),
    "structured output": ("Where?", STRUCTURED, r'text: {"city":.*}\n'),
    "refusal": ("[refuse]", {}, r"STOP: refusal|can't help"),
    "limit": ("[stop max_tokens]", {"max_tokens": 50}, "STOP: max_tokens"),
    "stop sequence": ("[say one STOP two]", {"stop_sequences": ["STOP"]}, "text: one \n"),
    "advisory field": ("[say Yes.]", {"top_k": 5}, "text: Yes."),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("provider", MODELS)
async def test_answers_are_the_same(world: World, provider: str, script: str) -> None:
    """Whichever client, mode or way asks, the answer is one."""
    prompt, fields, says = SCRIPTS[script]
    whole = await outcome(world, provider, prompt, streaming=False, **fields)
    streamed = await outcome(world, provider, prompt, streaming=True, **fields)
    assert whole.error == streamed.error == {}
    assert re.search(says, whole.gist)
    assert streamed.gist == whole.gist
    assert streamed.dropped == whole.dropped == (["top_k"] if "top_k" in fields and "gemini" not in provider else [])
    usage = whole.message["usage"]
    parts = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    assert usage["total_tokens"] == sum(usage[name] for name in parts) > 0


STATUSES: dict[type[vai.Error], str] = {
    vai.InvalidRequestError: "400 422",
    vai.AuthenticationError: "401",
    vai.PermissionDeniedError: "402 403",
    vai.NotFoundError: "404",
    vai.RequestTooLargeError: "413",
    vai.RateLimitError: "429",
    vai.ProviderError: "500 502",
    vai.OverloadedError: "498 503 529",
    vai.ProviderTimeoutError: "408 504",
}
ERRORS = [(status, cls) for cls, statuses in STATUSES.items() for status in statuses.split()]


@pytest.mark.parametrize(("status", "cls"), ERRORS)
@pytest.mark.parametrize("provider", MODELS)
async def test_errors_are_the_same(world: World, provider: str, status: str, cls: type[vai.Error]) -> None:
    """A provider's error is of one class, with the same fields, whichever client, mode or way meets it."""
    after = 7 if status == "429" else None
    prompt = f"[error {status} retry_after={after}]" if after else f"[error {status}]"
    whole = await outcome(world, provider, prompt, streaming=False)
    assert (await outcome(world, provider, prompt, streaming=True)).error == whole.error
    assert (whole.error["class"], whole.error["status"]) == (cls, cls.status)
    assert (whole.error["provider"], whole.error["retry_after"]) == (provider, after)
    assert whole.error["provider_error"]


@pytest.mark.parametrize(
    ("ending", "error", "code"),
    [
        ("error_in_stream 500", vai.ProviderError, None),
        ("error_in_stream 429", vai.RateLimitError, None),
        ("break_off", vai.StreamTruncated, "stream_truncated"),
        ("reset", vai.StreamTruncated, "stream_truncated"),
    ],
)
@pytest.mark.parametrize("provider", MODELS)
async def test_streams_fail_the_same(
    world: World, provider: str, ending: str, error: type[vai.Error], code: str | None
) -> None:
    """An answer that fails in its middle raises, a stream after what came before; no client takes it for whole."""
    out = await outcome(world, provider, f"[words 50][{ending}][slow 0.01]", streaming=True)
    assert out.error["class"] is error
    assert code in (None, out.error["code"])
    assert out.events[0]["type"] == "message_start"
    assert out.events[-1]["type"] != "message_stop"
    out = await outcome(world, provider, f"[words 50][{ending}]", streaming=False)
    assert out.error["class"] is (vai.ProviderError if code else error)
    assert out.error["code"] == "connection_broken" or not code


ORPHAN = {"role": "user", "content": [vai.tool_result("t1")]}


@both_ways
@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"model": "mistral/large"}, "model", "anthropic, openai, oai-resp, groq, gemini, gemini-oauth, cerebras"),
        ({"model": "gpt-5-mini"}, "model", "provider/model"),
        ({"model": "openai/../x"}, "model", ""),
        ({"messages": []}, "messages", ""),
        ({"messages": [{"role": "user", "content": [{"type": "poem"}]}]}, "messages[0].content[0].type", "poem"),
        ({"messages": [ORPHAN]}, "messages[0].content[0].tool_use_id", ""),
        ({"temperature": float("nan")}, "temperature", ""),
        ({"provider_keys": {"mistral": "secret-key-of-mine"}}, "provider_keys", "known"),
        ({"tools": [{"type": "computer_use"}]}, "tools", "gemini"),
    ],
)
async def test_wrong_requests(world: World, streaming: bool, fields: JSON, param: str, says: str) -> None:
    """A request that is wrong is refused before it goes to the provider, with the place in `param`."""
    out = await outcome(world, "openai", "Hi", streaming=streaming, **fields)
    assert (out.error["class"], out.error["param"]) == (vai.InvalidRequestError, param)
    assert says in out.error["message"]
    assert "secret" not in out.error["message"]
    assert not world.requests


async def test_models_are_the_same(world: World) -> None:
    """Both modes list the seven providers, what they can do, and whether there is a key."""
    found = []
    for mode in ("direct", "proxy"):
        async with vai.AsyncClient(**world.options(mode)) as client:
            found.append(await client.models.list())
        with vai.Client(**world.options(mode)) as blocking:
            found.append(blocking.models.list())
    assert [listed.providers for listed in found] == [found[0].providers] * 4
    assert [row.id for row in found[0].providers] == list(vai.PROVIDERS)
    assert all(row.available and row.capabilities["tools"] for row in found[0].providers)
    assert not world.requests


def test_the_clients_have_the_same_methods() -> None:
    """Names, parameters and their annotations agree; only `await` differs."""
    blocking = vai.Client()
    pairs: list[tuple[Any, Any]] = [(vai.AsyncClient(), blocking), (vai.AsyncMessageStream, vai.MessageStream)]
    pairs += [(getattr(pairs[0][0], name), getattr(blocking, name)) for name in ("messages", "models")]
    for one, other in pairs:
        names = {name for name in dir(one) if not name.startswith("_")}
        assert names == {name for name in dir(other) if not name.startswith("_")}
        for name in names:
            methods = getattr(one, name), getattr(other, name)
            assert callable(methods[0]) == callable(methods[1])
            if callable(methods[0]):
                assert inspect.signature(methods[0]).parameters == inspect.signature(methods[1]).parameters
    assert inspect.signature(vai.Client) == inspect.signature(vai.AsyncClient)
    blocking.close()


# == What is sent ======================================================================================================


@both_modes
@pytest.mark.parametrize(
    "messages",
    [
        "Hi there",
        [{"role": "user", "content": "Hi there"}],
        [{"role": "user", "content": [vai.text("Hi there")]}],
        ({"role": "user", "content": ({"type": "text", "text": "Hi there"},)},),
        [{"role": "user", "content": [vai.Text(type="text", text="Hi there")]}],
        [{"role": "user", "content": [vai.Text(text="Hi there")]}],
    ],
    ids=["string", "turn", "block", "tuples", "pydantic", "pydantic-defaults"],
)
def test_what_messages_may_be(world: World, mode: str, messages: Any) -> None:
    """A string is the user's turn; a turn's content is a string or blocks, plain or pydantic."""
    with vai.Client(**world.options(mode)) as client:
        assert "Hi there" in client.messages.create(model=CLAUDE, messages=messages, system=[vai.text("Be kind.")]).text
    content = world.bodies[0]["messages"][0]["content"]
    assert content in ("Hi there", [{"type": "text", "text": "Hi there"}])
    assert world.bodies[0]["system"] == [{"type": "text", "text": "Be kind."}]


@both_modes
@pytest.mark.parametrize("provider", MODELS)
def test_an_answer_is_a_turn_of_the_next_request(world: World, mode: str, provider: str) -> None:
    """A `Message`, its blocks, and what JSON makes of them are the same turn, reasoning and ids included."""
    ask = {"role": "user", "content": f"{CALLS}[then][say sunny]"}
    with vai.Client(**world.options(mode)) as client:
        first = client.messages.create(model=MODELS[provider], messages=[ask], tools=[WEATHER])
        wire = json.loads(json.dumps(first.to_wire()))["content"]
        results = {"role": "user", "content": [vai.tool_result(call.id, call.input) for call in first.tool_calls]}
        for turn in (
            first,
            {"role": "assistant", "content": first.content},
            {"role": "assistant", "content": wire},
            vai.Message.model_validate({**first.to_wire(), "content": wire}),
        ):
            history: Any = [ask, turn, results]
            again = client.messages.create(model=MODELS[provider], messages=history, tools=[WEATHER])
            assert again.text == "sunny"
    bodies = world.bodies
    assert bodies[1] == bodies[2] == bodies[3] == bodies[4]


PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)
FTYP = bytes(4) + b"ftyp"


@pytest.mark.parametrize(
    ("helper", "data", "media_type"),
    [
        (vai.image, PNG, "image/png"),
        (vai.image, b"\xff\xd8\xff\xe0", "image/jpeg"),
        (vai.image, b"GIF89a", "image/gif"),
        (vai.image, b"RIFF\x04\x00\x00\x00WEBPVP8 ", "image/webp"),
        (vai.image, b"?", "image/png"),
        (vai.audio, b"RIFF\x04\x00\x00\x00WAVEfmt ", "audio/wav"),
        (vai.audio, b"ID3\x04", "audio/mpeg"),
        (vai.audio, b"OggS", "audio/ogg"),
        (vai.audio, FTYP + b"M4A ", "audio/mp4"),
        (vai.video, FTYP + b"isom", "video/mp4"),
        (vai.video, b"\x1aE\xdf\xa3", "video/webm"),
        (vai.document, b"%PDF-1.7", "application/pdf"),
    ],
)
def test_media_types_are_read_off_the_bytes(helper: Callable[..., JSON], data: bytes, media_type: str) -> None:
    """Bytes become base64 of the type that they begin like; a type that is given stands."""
    encoded = base64.b64encode(data).decode()
    assert helper(data)["source"] == {"type": "base64", "media_type": media_type, "data": encoded}
    assert helper(data, "application/x-own")["source"]["media_type"] == "application/x-own"


def test_paths_and_urls(tmp_path: Path) -> None:
    """A path is read, a URL is left to the provider; both may be strings."""
    picture, note, data = tmp_path / "a.jpg", tmp_path / "note.txt", tmp_path / "data"
    picture.write_bytes(PNG)
    data.write_bytes(PNG)
    note.write_text("Grüße", encoding="utf-8")
    assert vai.image(picture)["source"]["media_type"] == vai.image(str(picture))["source"]["media_type"] == "image/jpeg"
    assert vai.image(data)["source"]["media_type"] == "image/png"
    for made in (vai.image("https://x.example/a.png"), vai.image_url("https://x.example/a.png")):
        assert made == {"type": "image", "source": {"type": "url", "url": "https://x.example/a.png"}}
    assert vai.video("http://x.example/v.mp4")["source"]["type"] == "url"
    plain = {"type": "text", "media_type": "text/plain", "data": "Grüße"}
    assert vai.document(note) == {"type": "document", "source": plain, "title": "note.txt"}
    assert "title" not in vai.document(b"%PDF-")
    assert vai.document("https://x.example/a.pdf", title="A")["title"] == "A"
    with pytest.raises(FileNotFoundError):
        vai.image(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("content", "sent"),
    [
        ("sunny", "sunny"),
        ({"sky": "klar, 3°"}, '{"sky": "klar, 3°"}'),
        (None, "null"),
        (3, "3"),
        ([vai.text("sunny")], [{"type": "text", "text": "sunny"}]),
        ([vai.Text(type="text", text="sunny")], [{"type": "text", "text": "sunny"}]),
        ([1, 2], "[1, 2]"),
        ([{"city": "Oslo"}], '[{"city": "Oslo"}]'),
    ],
)
def test_tool_results(content: Any, sent: Any) -> None:
    """Text and blocks go as they are, any other value as JSON."""
    assert vai.tool_result("t1", content) == {"type": "tool_result", "tool_use_id": "t1", "content": sent}
    assert vai.tool_result("t1", content, is_error=True)["is_error"] is True


async def test_helpers_make_what_a_provider_takes(world: World) -> None:
    """Every helper's block goes through to a provider that sees and hears."""
    media = [vai.image(PNG), vai.audio(b"ID3\x04"), vai.video(FTYP), vai.document(b"%PDF-1.7"), vai.text("Hm")]
    async with vai.AsyncClient(max_retries=0) as client:
        message = await client.messages.create(model=MODELS["gemini"], messages=[{"role": "user", "content": media}])
    assert "Hm" in message.text


# == Streams ===========================================================================================================


@both_modes
async def test_a_stream(world: World, mode: str) -> None:
    """Events first and text after come out of one stream; `final` is whole, whoever has read how far."""
    request: JSON = {"model": MODELS["openai"], "messages": "[say one two]", "top_k": 5}
    async with vai.AsyncClient(**world.options(mode)) as client, client.messages.stream(**request) as stream:
        assert isinstance(await anext(stream), vai.MessageStart)
        assert [piece async for piece in stream.text] == ["one", " two"]
        final = await stream.final()
    with vai.Client(**world.options(mode)) as blocking, blocking.messages.stream(**request) as other:
        assert isinstance(next(other), vai.MessageStart)
        assert list(other.text) == ["one", " two"]
        assert other.final().to_wire() == final.to_wire()
    for made in (stream, other):
        assert made.message
        assert made.message.to_wire() == final.to_wire()
        assert made.dropped == final.dropped == ["top_k"]
        assert (made.request_id is None) == (final.request_id is None) == (mode == "direct")


async def test_a_request_id_of_the_callers_own(world: World) -> None:
    """Through a gateway, answers, streams and errors carry the id that the caller gave."""
    async with vai.AsyncClient(**world.options("proxy")) as client:
        request: JSON = {"model": CLAUDE, "extra_headers": {"X-Request-ID": "mine-1"}}
        assert (await client.messages.create(messages="Hi", **request)).request_id == "mine-1"
        async with client.messages.stream(messages="Hi", **request) as stream:
            assert stream.request_id == "mine-1"
        with pytest.raises(vai.InvalidRequestError) as caught:
            await client.messages.create(messages="[error 400]", **request)
        assert caught.value.request_id == "mine-1"


@both_modes
@pytest.mark.parametrize("provider", MODELS)
def test_leaving_a_stream_lets_go_of_the_provider(world: World, mode: str, provider: str) -> None:
    """An early exit hangs up at once: no token is paid for that nobody reads."""
    with vai.Client(**world.options(mode)) as client:
        with client.messages.stream(model=MODELS[provider], messages="[words 500][slow 0.02]") as stream:
            next(stream)
        world.hung_up()


@both_modes
async def test_leaving_an_asynchronous_stream(world: World, mode: str) -> None:
    """The same for an exception in the body, and for a task that is cancelled."""
    request: JSON = {"model": CLAUDE, "messages": "[words 9][hang]"}
    async with vai.AsyncClient(**world.options(mode)) as client:
        with pytest.raises(KeyError):
            await reading(client, request, KeyError())
        await asyncio.to_thread(world.hung_up)
        for number, work in enumerate((client.messages.create(**request), reading(client, request)), 2):
            task = asyncio.create_task(work)
            await asyncio.to_thread(world.request, number)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(world.hung_up, number)
        assert (await client.messages.create(model=CLAUDE, messages="[say still here]")).text == "still here"


async def reading(client: vai.AsyncClient, request: JSON, fault: Exception | None = None) -> vai.Message:
    async with client.messages.stream(**request) as stream:
        await anext(stream)
        if fault:
            raise fault
        return await stream.final()


async def test_a_stream_outside_with(world: World) -> None:
    """Nothing is sent before `with`, nothing read after it; the error says where a stream belongs."""
    request: JSON = {"model": CLAUDE, "messages": "[words 500][slow 0.02]"}
    async with vai.AsyncClient() as client:
        stream = client.messages.stream(**request)
        for use in (stream.__anext__, stream.final, stream.text.__anext__):
            with pytest.raises(RuntimeError, match="async with"):
                await use()
        assert (stream.message, stream.dropped, stream.request_id) == (None, [], None)
        assert not world.requests
        async with stream:
            await anext(stream)
        with pytest.raises(RuntimeError, match="async with"):
            await stream.final()
    with vai.Client() as blocking:
        other = blocking.messages.stream(**request)
        for again in (other.__next__, other.final, other.text.__next__):
            with pytest.raises(RuntimeError, match="with"):
                again()
        with other:
            next(other)
        with pytest.raises(RuntimeError, match="with"):
            other.final()


# == Retries and timeouts ==============================================================================================

RETRIED = {  # prompt: how often it is asked with two retries, without streaming and with it
    **{f"[error {status}]": (3, 3) for status in (408, 409, 429, 500, 502, 503, 504, 529)},
    **{f"[error {status}]": (1, 1) for status in (400, 401, 402, 403, 404, 413, 422)},
    "[error 429 retry_after=100]": (1, 1),
    "[error 429 code=insufficient_quota]": (1, 1),
    "[words 20][error_in_stream 529]": (3, 1),
    "[words 20][break_off]": (1, 1),
    "[words 20][reset]": (1, 1),
}


async def test_what_is_tried_again(world: World) -> None:
    """Passing faults are, twice; wrong requests are not, nor is anything once the answer has begun."""
    table = [(prompt, way, times[way]) for prompt, times in RETRIED.items() for way in (False, True)]
    rows = [(*row, f"key{at}") for at, row in enumerate(table)]

    async def failing(prompt: str, streaming: bool, key: str) -> Outcome:
        request = {"model": MODELS["openai"], "messages": prompt, "provider_keys": {"openai": key}}
        return await asked(client, streaming, request)

    async with vai.AsyncClient() as client:
        found = await asyncio.gather(*(failing(prompt, way, key) for prompt, way, _, key in rows))
    assert all(out.error for out in found)
    keys = [request.key for request in world.requests]
    tried = {(prompt, way): keys.count(key) for prompt, way, _, key in rows}
    assert tried == {(prompt, way): times for prompt, way, times, _ in rows}


@pytest.mark.parametrize("mode", ["direct", "proxy"])
async def test_retry_after_is_waited_for(world: World, mode: str) -> None:
    """A provider that says when to come back is asked again then, and not before."""
    async with vai.AsyncClient(**world.options(mode), max_retries=1) as client:
        asks = (
            client.messages.create(model=MODELS[p], messages="[error 429 retry_after=1]", provider_keys={p: p})
            for p in MODELS
        )
        faults = await asyncio.gather(*asks, return_exceptions=True)
    assert {type(fault) for fault in faults} == {vai.RateLimitError}
    for provider in MODELS:
        first, second = (request.started for request in world.requests if request.key == provider)
        assert 1 <= second - first < 3


@both_ways
async def test_a_retry_can_succeed(world: World, streaming: bool) -> None:
    """The caller sees nothing of the failures before."""
    said = {"content": "At last."}
    body = json.dumps({"model": "x", "choices": [{"delta": said, "message": said, "finish_reason": "stop"}]})
    answers = iter([(503, ""), (200, f"data: {body}\n\n" if streaming else body)])

    async def flaky(request: web.Request) -> web.Response:
        status, text = next(answers)
        return web.Response(status=status, text=text)

    app = web.Application()
    app.router.add_post("/chat/completions", flaky)
    async with TestServer(app) as upstream, vai.AsyncClient(base_urls={"openai": str(upstream.make_url(""))}) as client:
        out = await asked(client, streaming, {"model": "openai/x", "messages": "Hi"})
    assert "At last." in out.gist


def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def test_a_connection_that_fails_is_tried_again(world: World) -> None:
    """An upstream that comes up during the pause is reached."""
    late, port = Sandbox(), unused_port()
    async with vai.AsyncClient(base_urls={"anthropic": f"http://127.0.0.1:{port}/anthropic"}) as client:
        asking = asyncio.create_task(client.messages.create(model=CLAUDE, messages="[say up]"))
        done, _ = await asyncio.wait([asking], timeout=0.1)  # the first attempt is over in a millisecond
        assert not done
        await late.start(port=port)
        assert (await asking).text == "up"
    await late.close()


@both_modes
@both_ways
async def test_no_connection(world: World, mode: str, streaming: bool) -> None:
    """An upstream that is not there is a `ProviderError` that names it."""
    gone = f"http://127.0.0.1:{unused_port()}"
    options: JSON = {"base_urls": {"anthropic": gone}} if mode == "direct" else {"base_url": gone}
    async with vai.AsyncClient(**options, max_retries=0) as client:
        out = await asked(client, streaming, {"model": CLAUDE, "messages": "Hi"})
    assert (out.error["class"], out.error["code"]) == (vai.ProviderError, "connection_failed")
    assert out.error["provider"] == ("anthropic" if mode == "direct" else "gateway")


@both_modes
@pytest.mark.parametrize(
    ("streaming", "prompt", "timeout"),
    [
        (False, "[hang]", 0.2),
        (True, "[hang]", 0.2),
        (False, "[wait 9]", vai.Timeouts(first_byte=0.2)),
        (True, "[wait 9]", vai.Timeouts(first_byte=0.2)),
        (True, "[words 9][hang]", vai.Timeouts(idle=0.2)),
        (True, "[words 999][slow 0.05]", vai.Timeouts(total=0.3)),
    ],
)
def test_timeouts(world: World, mode: str, streaming: bool, prompt: str, timeout: Any) -> None:
    """An answer that takes too long, in all or between two bytes, is a `ProviderTimeoutError`, and is given up."""
    with vai.Client(**world.options(mode), timeout=timeout, max_retries=0) as client:
        out = asked_blocking(client, streaming, {"model": CLAUDE, "messages": prompt})
        assert out.error["class"] is vai.ProviderTimeoutError
        world.hung_up()


# == Keys ==============================================================================================================


KEYS = {provider: f"{provider.upper()}_API_KEY" for provider in ("anthropic", "openai", "groq", "cerebras")}
KEYS |= {
    "oai-resp": "OPENAI_API_KEY",
    "gemini": "GEMINI_API_KEY or GOOGLE_API_KEY",
    "gemini-oauth": "login gemini-oauth",
}


@pytest.mark.parametrize("provider", KEYS)
async def test_a_missing_key_is_named(world: World, monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    """Without a key nothing is sent, and the error says where one would come from; the same behind a gateway."""
    for name in (*vai.PROVIDERS[provider].key_env, "GEMINI_OAUTH_CREDENTIALS_PATH"):
        monkeypatch.delenv(name, raising=False)
    urls = {name: value for name, value in world.sandbox.environ.items() if name.endswith("_BASE_URL")}
    proxy = {**world.options("proxy"), "base_url": world.gateway({"HOME": "/nonexistent", **urls})}
    found = []
    for options in ({}, proxy):
        async with vai.AsyncClient(**options) as client:
            found.append(await asked(client, False, {"model": MODELS[provider], "messages": "Hi"}))
    assert found[0] == found[1]
    assert (found[0].error["class"], found[0].error["code"]) == (vai.AuthenticationError, "no_provider_key")
    assert KEYS[provider] in found[0].error["message"]
    assert not world.requests


@pytest.mark.parametrize(("mode", "own"), [("direct", False), ("direct", True), ("proxy", False), ("proxy", True)])
def test_whose_key_it_is(world: World, mode: str, own: bool) -> None:
    """A key that is refused is the caller's to mend, unless it is the gateway's."""
    keys = {"provider_keys": {"anthropic": "bad-key"}} if own else {}
    with vai.Client(**world.options(mode), max_retries=0) as client:
        out = asked_blocking(client, False, {"model": CLAUDE, "messages": "[error 401]", **keys})
    of_gateway = mode == "proxy" and not own
    assert out.error["class"] is (vai.ProviderError if of_gateway else vai.AuthenticationError)
    assert (out.error["code"] == "provider_authentication") == of_gateway


def test_a_key_of_the_gateway_that_is_wrong(world: World) -> None:
    """The gateway's own refusal names no provider."""
    with vai.Client(base_url=world.proxy, api_key="vai_sk_of_a_stranger", max_retries=0) as client:
        out = asked_blocking(client, False, {"model": CLAUDE, "messages": "Hi"})
    assert (out.error["class"], out.error["provider"]) == (vai.AuthenticationError, None)


@both_modes
@pytest.mark.parametrize(
    ("of_client", "of_request", "provider", "used"),
    [
        ({"anthropic": "c"}, {}, "anthropic", "c"),
        ({"anthropic": "c"}, {"anthropic": "r"}, "anthropic", "r"),
        ({"groq": "c"}, {"openai": "r"}, "anthropic", "sandbox-anthropic-key"),
        ({"Gemini_OAuth": "c"}, {}, "gemini-oauth", "c"),
        ({"google": "c"}, {}, "gemini", "c"),
        ({}, {"google": "r"}, "gemini", "r"),
        ({"openai": "c"}, {}, "oai-resp", "c"),
        ({"openai": "c", "oai-resp": "d"}, {}, "oai-resp", "d"),
        ({"anthropic": " c\n"}, {}, "anthropic", "c"),
    ],
)
def test_which_key_is_used(
    world: World, mode: str, of_client: dict[str, str], of_request: dict[str, str], provider: str, used: str
) -> None:
    """A request's before the client's before the environment's (or gateway's), by any spelling of its name."""
    with vai.Client(**world.options(mode), provider_keys=of_client) as client:
        client.messages.create(model=MODELS[provider], messages="Hi", provider_keys=of_request)
    assert world.requests[0].key == used
    assert "provider_keys" not in world.bodies[0]


@both_modes
def test_a_key_of_nobody_is_refused(world: World, mode: str) -> None:
    """A misspelt provider is no silent loss; the key is not shown."""
    with pytest.raises(vai.InvalidRequestError, match="known: anthropic") as caught:
        vai.Client(**world.options(mode), provider_keys={"antropic": "sk-secret"})
    assert "sk-secret" not in str(caught.value)


def test_keys_from_the_environment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stray newline is not part of a key; what cannot be one is refused without being shown."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-with-a-newline\r\n")
    monkeypatch.delenv("GEMINI_API_KEY")
    monkeypatch.setenv("GOOGLE_API_KEY", "of-google")
    with vai.Client() as client:
        for provider in ("openai", "oai-resp", "gemini"):
            client.messages.create(model=MODELS[provider], messages="Hi")
    assert [request.key for request in world.requests] == ["sk-with-a-newline"] * 2 + ["of-google"]
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\nsk-other")
    with pytest.raises(vai.InvalidRequestError, match="openai") as caught:
        vai.Client()
    assert "secret" not in str(caught.value)


async def test_aliases(world: World) -> None:
    """A bare name may stand for a model."""
    async with vai.AsyncClient(aliases={"fast": MODELS["groq"]}) as client:
        message = await client.messages.create(model="fast", messages="Hi")
        assert (await client.models.list()).aliases == {"fast": MODELS["groq"]}
    assert message.model.startswith("groq/")


# == The synchronous client ============================================================================================


def test_threads_share_a_client(world: World) -> None:
    """Twenty threads at once get each its own answer, over one thread of the client's."""
    with vai.Client() as client, ThreadPoolExecutor(20) as pool:

        def ask(number: int) -> bool:
            request: JSON = {"model": list(MODELS.values())[number % 7], "messages": f"[say It is {number}.]"}
            return f"text: It is {number}.\n" in asked_blocking(client, bool(number % 2), request).gist

        assert all(pool.map(ask, range(100)))
        assert world.threads == 1
    assert world.threads == 0


async def test_inside_a_running_loop(world: World) -> None:
    """A notebook's loop runs while its cells call the synchronous client."""
    with vai.Client() as client:
        assert client.messages.create(model=CLAUDE, messages="[say here]").text == "here"
        with client.messages.stream(model=CLAUDE, messages="[say there]") as stream:
            assert "".join(stream.text) == "there"


async def test_after_close(world: World) -> None:
    """A client that is closed can be closed again, and nothing else; no thread comes back."""
    request: JSON = {"model": CLAUDE, "messages": "Hi"}
    blocking, client = vai.Client(), vai.AsyncClient()
    for _ in range(2):
        blocking.close()
        await client.close()
    stream = blocking.messages.stream(**request)
    for use in (lambda: blocking.messages.create(**request), stream.__enter__, blocking.models.list):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    calls = client.messages.create(**request), client.messages.stream(**request).__aenter__(), client.models.list()
    for call in calls:
        with pytest.raises(RuntimeError, match="closed"):
            await call
    assert world.threads == 0
    assert not world.requests


def test_close_ends_what_runs_in_other_threads(world: World) -> None:
    """A call in progress raises, once, instead of waiting for ever."""
    client, raised = vai.Client(), []

    def call() -> None:
        try:
            client.messages.create(model=CLAUDE, messages="[hang]")
        except (vai.Error, RuntimeError) as fault:
            raised.append(fault)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    world.request()
    client.close()
    thread.join(5)
    assert raised
    assert world.threads == 0
    assert len(world.requests) == 1


async def test_close_ends_what_runs_in_other_tasks(world: World) -> None:
    """The same without threads."""
    client = vai.AsyncClient()
    call = asyncio.create_task(client.messages.create(model=CLAUDE, messages="[hang]"))
    await asyncio.to_thread(world.request)
    await client.close()
    with pytest.raises((vai.Error, RuntimeError)):
        await asyncio.wait_for(call, 5)
    assert len(world.requests) == 1


@pytest.mark.parametrize("use", ["kept", "at once", "stream"])
def test_forgetting_to_close(world: World, use: str) -> None:
    """A client that nobody closes costs one warning, and nothing is left of it."""
    request: JSON = {"model": CLAUDE, "messages": "[say so]"}

    def ask() -> str:
        if use == "at once":
            return vai.Client().messages.create(**request).text
        if use == "stream":
            with vai.Client().messages.stream(**request) as stream:
                return "".join(stream.text)
        client = vai.Client()
        return client.messages.create(**request).text

    gc.collect()  # what earlier tests left
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert ask() == "so"
        gc.collect()
    assert [warning.category for warning in caught] == [ResourceWarning]
    assert "not closed" in str(caught[0].message)
    assert world.threads == 0


def test_forgetting_to_close_where_warnings_are_errors(world: World) -> None:
    """The warning comes when everything is closed already."""
    client = vai.Client()
    client.messages.create(model=CLAUDE, messages="[say so]")
    with pytest.raises(ResourceWarning, match="not closed"):  # as all warnings are errors here
        client._finalizer()
    assert world.threads == 0


def test_a_client_collected_on_its_own_thread(world: World) -> None:
    """The collector runs where it will; the client's own thread cannot wait for its end, and ends all the same."""

    class Ring:
        client: vai.Client
        itself: Ring

    def ask() -> None:
        ring = Ring()
        ring.itself, ring.client = ring, vai.Client()
        ring.client.messages.run(model=CLAUDE, messages="[say so]")
        portal = ring.client._portal
        assert portal._loop
        del ring
        collected = threading.Event()
        portal._loop.call_soon_threadsafe(lambda: (gc.collect(), collected.set()))
        assert collected.wait(5)
        assert portal._thread
        portal._thread.join(5)
        assert not portal._thread.is_alive()

    gc.collect()
    gc.disable()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ask()
    finally:
        gc.enable()
    assert [warning.category for warning in caught] == [ResourceWarning]


@both_modes
def test_a_stream_that_is_dropped_hangs_up(world: World, mode: str) -> None:
    """Also without `with`, and from whatever thread it is let go."""
    with vai.Client(**world.options(mode)) as client:
        client.messages.stream(model=CLAUDE, messages="Hi")
        assert world.threads == 0  # it was never opened
        stream = client.messages.stream(model=CLAUDE, messages="[words 3][hang]").__enter__()
        assert next(iter(stream)).type == "message_start"
        del stream
        gc.collect()
        world.hung_up()


@pytest.mark.parametrize("run", [False, True], ids=["stream", "run_stream"])
def test_a_stream_is_closed_with_its_client(world: World, run: bool) -> None:
    """Leaving its `with` after that is nothing."""
    with vai.Client() as client:
        open = client.messages.run_stream if run else client.messages.stream
        with open(model=CLAUDE, messages="[words 3][hang]") as stream:
            while next(stream).type != "message_start":
                pass
            client.close()
        world.hung_up()
        with pytest.raises(RuntimeError, match="closed"):
            list(stream)


async def test_an_asynchronous_stream_is_closed_with_its_client(world: World) -> None:
    async with vai.AsyncClient() as client:
        async with client.messages.stream(model=CLAUDE, messages="[words 3][hang]") as stream:
            await anext(stream)
            await client.close()
    await asyncio.to_thread(world.hung_up)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_leaves_the_parents_stream_alone(world: World) -> None:
    """It cannot read it, and leaving its `with` closes nothing; a client of the child's is as good as new."""
    with vai.Client() as client:
        with client.messages.stream(model=CLAUDE, messages="[say One two three.][slow 0.05]") as stream:
            while next(stream).type != "content_block_delta":
                pass
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    with contextlib.ExitStack() as stack:
                        stack.push(stream)
                        try:
                            stream.final()
                        except RuntimeError as fault:
                            code = 0 if "parent" in str(fault) else 2
                    if client.messages.create(model=CLAUDE, messages="[say so]").text != "so":
                        code = 3
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert stream.final().text == "One two three."


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # of the transports of loops that have ended
@pytest.mark.parametrize("more", [{}, {"voice": {"output": {"format": "wav"}}}], ids=["text", "spoken"])
def test_one_client_on_several_loops(world: World, more: JSON, caplog: pytest.LogCaptureFixture) -> None:
    """Its connections of a loop that has ended go without a word, and closing it closes those of all loops."""
    client, idle = vai.AsyncClient(), asyncio.new_event_loop()
    request: JSON = {"model": CLAUDE, "messages": "[say so]", **more}
    idle.run_until_complete(client.messages.create(**request))

    async def ask(last: bool = False) -> None:
        assert (await client.messages.create(**request)).text == "so"
        if last:
            await client.close()

    for last in (False, False, True):
        asyncio.run(ask(last))
    gc.collect()
    assert not client._engine.transport._lines  # type: ignore[attr-defined]
    assert not [record for record in caplog.records if "nclosed" in record.message]
    idle.close()


@both_modes
@both_ways
def test_ctrl_c_lets_go_of_the_provider(world: World, mode: str, streaming: bool) -> None:
    """Ctrl-C goes through to the caller at once and hangs up; the client can be used on."""
    waiting = threading.get_ident()

    def interrupt() -> None:
        world.request()
        time.sleep(0.1)  # by now the caller has read what there is, and waits
        signal.pthread_kill(waiting, signal.SIGINT)

    with vai.Client(**world.options(mode)) as client, ThreadPoolExecutor(1) as pool:
        pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            asked_blocking(client, streaming, {"model": CLAUDE, "messages": "[words 9][hang]"})
        world.hung_up()
        assert client.messages.create(model=CLAUDE, messages="[say on]").text == "on"


# == The login of gemini-oauth =========================================================================================

GEMINI = MODELS["gemini-oauth"]
SECRETS = ("ya29.first-access-token", "1//first-refresh-token", "secret-of-the-client")
HOUR = 3600_000


class Login:
    """A credentials file, and the environment that leads to it."""

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.world = path, world

    def save(self, **fields: Any) -> None:
        saved = {"access_token": SECRETS[0], "refresh_token": SECRETS[1], "expiry_date": time.time() * 1000 + HOUR}
        self.path.write_text(json.dumps({**saved, "other": "kept", **fields}))
        self.path.chmod(0o644)

    @property
    def saved(self) -> JSON:
        """What is in the file, which nobody else may read and beside which nothing was left."""
        assert self.path.stat().st_mode & 0o777 == 0o600
        assert [path.name for path in self.path.parent.iterdir()] == [self.path.name]
        return dict(json.loads(self.path.read_text()))

    def paths(self) -> list[str]:
        return [request.path.rpartition("/")[2].removeprefix("v1internal:") for request in self.world.requests]


@pytest.fixture
def login(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Login:
    made = Login(tmp_path / "login" / "credentials.json", world)
    made.path.parent.mkdir()
    monkeypatch.setenv("GEMINI_OAUTH_CREDENTIALS_PATH", str(made.path))
    monkeypatch.setenv("GEMINI_OAUTH_TOKEN_URL", f"{world.sandbox.oauth_url}/token")
    monkeypatch.setenv("GEMINI_OAUTH_CLIENT_ID", "client-of-ours")
    monkeypatch.setenv("GEMINI_OAUTH_CLIENT_SECRET", SECRETS[2])
    monkeypatch.setenv("GEMINI_OAUTH_PROJECT_ID", "ours")
    return made


@pytest.mark.parametrize("token", ["expired", "nearly expired", "refused", "absent"])
async def test_a_token_is_refreshed_once(login: Login, token: str) -> None:
    """Twenty requests at once cost one refresh, be the token out of date or refused; the file has the new one."""
    now = time.time() * 1000
    fields: dict[str, JSON] = {
        "expired": {"expiry_date": now - HOUR},
        "nearly expired": {"expiry_date": now + 50_000},
        "refused": {"access_token": "bad-" + SECRETS[0]},
        "absent": {"access_token": None, "expiry_date": None},
    }
    login.save(**fields[token])
    async with vai.AsyncClient() as client:
        asks = (client.messages.create(model=GEMINI, messages=f"[say {n}]") for n in range(20))
        assert [message.text for message in await asyncio.gather(*asks)] == [str(n) for n in range(20)]
    paths = login.paths()
    assert paths.count("token") == 1
    assert paths.count("generateContent") <= (40 if token == "refused" else 20)
    assert login.saved["access_token"].startswith("ya29.")
    assert login.saved["access_token"] not in SECRETS
    assert login.saved["expiry_date"] > now + HOUR * 0.9
    assert (login.saved["refresh_token"], login.saved["other"]) == (SECRETS[1], "kept")
    form = next(request.body or {} for request in login.world.requests if request.provider == "oauth")
    assert (form["grant_type"], form["refresh_token"]) == ("refresh_token", SECRETS[1])
    assert (form["client_id"], form["client_secret"]) == ("client-of-ours", SECRETS[2])


async def test_a_good_token_is_left_alone(login: Login) -> None:
    """No refresh, no write: the file stays as it was."""
    login.save()
    before = login.path.read_bytes()
    async with vai.AsyncClient() as client:
        async with client.messages.stream(model=GEMINI, messages="[say yes]") as stream:
            assert (await stream.final()).text == "yes"
    assert login.paths() == ["streamGenerateContent"]
    assert login.world.requests[0].key == SECRETS[0]
    assert login.path.read_bytes() == before


@pytest.mark.parametrize("source", ["environment", "file", "asked", "asked with a refused token"])
async def test_where_the_project_comes_from(login: Login, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """The environment's before the file's; else Code Assist is asked, once for all requests and all times."""
    known = {} if "asked" in source else {"project_id": "of-the-file"}
    login.save(**known, **({"access_token": "bad-token"} if "refused" in source else {}))
    if source != "environment":
        monkeypatch.delenv("GEMINI_OAUTH_PROJECT_ID")
    for _ in range(2):
        async with vai.AsyncClient() as client:
            await asyncio.gather(*(client.messages.create(model=GEMINI, messages="Hi") for _ in range(5)))
    bodies = [body for body in login.world.bodies if "project" in body]
    expected = {"environment": "ours", "file": "of-the-file"}.get(source, "sandbox-project")
    assert {body["project"] for body in bodies} == {expected}
    good = [request.path for request in login.world.requests if not request.key.startswith("bad")]
    assert sum("loadCodeAssist" in path for path in good) == ("asked" in source)
    assert "asked" not in source or login.saved["project_id"] == "sandbox-project"


@both_ways
@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (None, vai.AuthenticationError, "login gemini-oauth"),
        ("{", vai.AuthenticationError, "unreadable"),
        ("{}", vai.AuthenticationError, "no token"),
        ("[]", vai.AuthenticationError, "no token"),
        ({"expiry_date": 0, "refresh_token": "bad-" + SECRETS[1]}, vai.AuthenticationError, "expired or revoked"),
        ({"access_token": "bad-" + SECRETS[0], "refresh_token": "bad-"}, vai.AuthenticationError, "expired or revoked"),
        ({"access_token": "bad-" + SECRETS[0], "refresh_token": None}, vai.AuthenticationError, "login gemini-oauth"),
        ({"expiry_date": 0, "refresh_token": None}, vai.AuthenticationError, "login gemini-oauth"),
        ({"access_token": "new-account-token"}, vai.PermissionDeniedError, "GEMINI_OAUTH_PROJECT_ID"),
    ],
)
async def test_failures_of_the_login(
    login: Login, monkeypatch: pytest.MonkeyPatch, streaming: bool, content: Any, error: type[vai.Error], says: str
) -> None:
    """What cannot work says why and what to do, is not tried again, and shows no token."""
    if isinstance(content, str):
        login.path.write_text(content)
    elif content:
        login.save(**content)
    if "PROJECT" in says:
        monkeypatch.delenv("GEMINI_OAUTH_PROJECT_ID")
    async with vai.AsyncClient() as client:
        out = await asked(client, streaming, {"model": GEMINI, "messages": "Hi"})
    assert out.error["class"] is error
    assert says in out.error["message"]
    assert not any(secret in str(out.error) for secret in (*SECRETS, "new-account-token"))
    assert login.paths().count("token") <= 1


# == What cannot be meant ==============================================================================================


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"api_key": "vai_sk_lonely"}, "base_url"),
        ({"base_url": "http://127.0.0.1:1", "aliases": {"fast": "groq/m"}}, "direct mode"),
        ({"base_url": "http://127.0.0.1:1", "base_urls": {"groq": "http://x"}}, "direct mode"),
    ],
)
def test_options_of_the_other_mode_are_refused(options: JSON, says: str) -> None:
    """An option that would do nothing is a TypeError, and the key in it is not shown."""
    for make in (vai.Client, vai.AsyncClient):
        with pytest.raises(TypeError, match=says) as caught:
            make(**options)
        assert "lonely" not in str(caught.value)


def test_a_gateway_needs_an_address() -> None:
    """A base URL without a scheme is told at once, not after retries."""
    with pytest.raises(vai.InvalidRequestError, match="not an http"):
        vai.Client(base_url="localhost:8080")


@both_modes
def test_create_does_not_stream(world: World, mode: str) -> None:
    """`create(stream=True)`, the habit from elsewhere, says what to call instead and asks nobody."""
    with vai.Client(**world.options(mode)) as client, pytest.raises(TypeError, match=r"messages\.stream"):
        client.messages.create(model=CLAUDE, messages="Hi", stream=True)  # type: ignore[call-arg]
    assert not world.requests


@pytest.mark.parametrize("body", [b'{"x": 1}', b"<html>", b"[]"])
async def test_what_is_no_gateway_is_asked_once(body: bytes) -> None:
    """A 200 that is no message is one clear error; what was begun is not paid for again."""
    asked = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        await reader.readuntil(b"\r\n\r\n")
        asked += 1
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        async with vai.AsyncClient(base_url=url) as client:
            with pytest.raises(vai.ProviderError) as caught:
                await client.messages.create(model=CLAUDE, messages="Hi")
    assert (caught.value.code, asked) == ("unreadable_answer", 1)
