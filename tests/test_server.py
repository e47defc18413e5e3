"""The gateway answers, refuses, streams, times out, notices who leaves, and ends as it should."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import logging
import os
import re
import signal
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import pytest
from anthropic import AsyncAnthropic
from conftest import (
    JSON,
    KEY,
    MODELS,
    PROVIDERS,
    ROOT,
    Launch,
    Listen,
    Logged,
    Serve,
    Served,
    body_of,
    canned,
    hear,
    log_in,
    post_bytes,
    reset,
    text_of,
)

import providers
import server
from sandbox import Sandbox

THINKERS = MODELS | {"openai": "gpt-5.1", "oai-resp": "gpt-5.1", "groq": "openai/gpt-oss-20b"}
WEATHER: Any = {
    "name": "get_weather",
    "description": "Current weather for a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
LOOP = '[think Let me see.] [tool get_weather {"city":"Oslo"}] [then] [say Sunny.]'
SIX = "[say one two three four five six]"


# == Answers ===========================================================================================================


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_answers_for_every_provider(gateway: Served, sandbox: Sandbox, provider: str) -> None:
    """The message has the provider's id in its model, a bill that adds up, and the same figures in the headers."""
    answer = await gateway.ask(provider, "[say Hello there.]")
    usage = answer.body["usage"]
    assert (answer.status, answer.text) == (200, "Hello there.")
    assert answer.body["model"] == answer.headers["X-Model"] == f"{provider}/{MODELS[provider]}"
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Input-Tokens"] == str(usage["input_tokens"])
    assert answer.headers["X-Output-Tokens"] == str(usage["output_tokens"])
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0
    assert int(answer.headers["X-Duration-Ms"]) < 5000
    assert re.fullmatch("req_[0-9a-f]{24}", answer.headers["X-Request-ID"])
    assert answer.headers["request-id"] == answer.headers["X-Request-ID"]
    assert answer.headers["Server"] == "vai"
    assert (sandbox.seen, sandbox.requests[0].provider) == (1, provider)


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_streams_for_every_provider(gateway: Served, sandbox: Sandbox, provider: str) -> None:
    """The events follow Anthropic's grammar and come with headers that keep proxies from holding them back."""
    answer = await gateway.ask(provider, SIX, stream=True)
    kinds = [event["type"] for event in answer.events if event["type"] not in ("content_block_delta", "ping")]
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert answer.headers["X-Model"] == f"{provider}/{MODELS[provider]}"
    assert answer.headers["request-id"] == answer.headers["X-Request-ID"]
    assert text_of(answer.events) == "one two three four five six"
    blocks = ["content_block_start", "content_block_stop"] * (len(kinds) // 2 - 1)
    assert kinds == ["message_start", *blocks, "message_delta", "message_stop"]
    assert answer.events[-2]["delta"]["stop_reason"] == "end_turn"
    assert sandbox.seen == 1


async def test_events_are_flushed_one_by_one(gateway: Served, sandbox: Sandbox) -> None:
    """A delta is with the caller before the provider has said the next one."""
    async with gateway.raw(post_bytes(body_of("openai", f"{SIX} [hang]", stream=True))) as (reader, _):
        async with asyncio.timeout(5):
            await reader.readuntil(b'" three"')
        assert not sandbox.requests[0].done.is_set()


@pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])
@pytest.mark.parametrize(("provider", "dropped"), [("openai", "container, top_k"), ("gemini", "container")])
async def test_says_what_it_dropped(gateway: Served, provider: str, dropped: str, stream: bool) -> None:
    """Advisory fields that the provider does not take are listed in `X-Vai-Dropped`, and never refused."""
    answer = await gateway.ask(provider, stream=stream, top_k=3, container="x")
    assert (answer.status, sorted(answer.headers["X-Vai-Dropped"].split(", "))) == (200, dropped.split(", "))


async def test_models_lists_providers(gateway: Served) -> None:
    """`/v1/models` has every provider with capabilities and BYOK header; `provider` and `capability` filter it."""
    listed = (await gateway.get("/v1/models")).body
    assert [row["id"] for row in listed["providers"]] == list(providers.PROVIDERS)
    assert listed["aliases"] == {}
    row = next(row for row in listed["providers"] if row["id"] == "openai")
    assert (row["name"], row["available"], row["auth"]) == ("OpenAI", True, {"header": "X-Provider-Key-OpenAI"})
    assert row["capabilities"]["tools"] is True
    found: dict[str, list[str]] = {"provider=groq": ["groq"], "provider=none": []}
    found |= {"capability=video": ["gemini", "gemini-oauth"], "provider=groq&capability=web_search": ["groq"]}
    for query, ids in found.items():
        rows = (await gateway.get(f"/v1/models?{query}")).body["providers"]
        assert [row["id"] for row in rows] == ids


async def test_health_needs_no_key(serve: Serve, sandbox: Sandbox) -> None:
    """`/health` tells which providers have a key, to anybody, without asking them."""
    gateway = await serve(environ={"OPENAI_API_KEY": "sk-x", "HOME": "/nonexistent"})
    answer = await gateway.get("/health", key=None)
    assert (answer.status, answer.body["status"], answer.body["version"]) == (200, "healthy", "0.1.0")
    configured = {id for id, state in answer.body["providers"].items() if state["configured"]}
    assert configured == {"openai", "oai-resp"}
    assert answer.body["uptime_seconds"] >= 0
    assert sandbox.seen == 0


# == Anthropic's SDK ===================================================================================================


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("stream", [False, True], ids=["create", "stream"])
async def test_sdk_runs_a_tool_loop(sdk: AsyncAnthropic, provider: str, stream: bool) -> None:
    """Thinking and tool calls come out as the SDK's own blocks, and are taken back as they are in the next turn."""

    async def say(messages: Any) -> Any:
        fields: Any = {"model": f"{provider}/{THINKERS[provider]}", "max_tokens": 4000, "tools": [WEATHER]}
        fields |= {"thinking": {"type": "enabled", "budget_tokens": 2000}, "messages": messages}
        if not stream:
            return await sdk.messages.create(**fields)
        async with sdk.messages.stream(**fields) as events:
            return await events.get_final_message()

    asked = {"role": "user", "content": LOOP}
    first = await say([asked])
    call = next(block for block in first.content if block.type == "tool_use")
    thoughts = [block.thinking for block in first.content if block.type == "thinking"]
    assert (first.stop_reason, call.name, call.input) == ("tool_use", "get_weather", {"city": "Oslo"})
    assert thoughts == ([] if provider == "openai" else ["Let me see."])
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny, 20 degrees"}
    second = await say([asked, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}])
    assert second.stop_reason == "end_turn"
    assert [block.text for block in second.content if block.type == "text"] == ["Sunny."]
    assert second.usage.input_tokens > 0


async def test_sdk_beta(sdk: AsyncAnthropic) -> None:
    """The SDK's beta namespace and its `?beta=true` work; its request id is the gateway's."""
    asked: Any = {"max_tokens": 10, "messages": [{"role": "user", "content": "[say Hi]"}], "model": "openai/gpt-4o"}
    raw = await sdk.beta.messages.with_raw_response.create(betas=["x-1"], extra_query={"beta": "true"}, **asked)
    assert raw.headers["x-model"] == "openai/gpt-4o"
    assert raw.request_id == raw.headers["x-request-id"]


SDK_ERRORS: list[tuple[str, int, type[anthropic.APIStatusError]]] = [
    ("[error 400]", 400, anthropic.BadRequestError),
    ("[error 402]", 403, anthropic.PermissionDeniedError),
    ("[error 404]", 404, anthropic.NotFoundError),
    ("[error 413]", 413, anthropic.APIStatusError),
    ("[error 429]", 429, anthropic.RateLimitError),
    ("[error 500]", 502, anthropic.InternalServerError),
    ("[error 503]", 503, anthropic.APIStatusError),
    ("[error 504]", 504, anthropic.APIStatusError),
]


@pytest.mark.parametrize("stream", [False, True], ids=["create", "stream"])
@pytest.mark.parametrize(("text", "status", "kind"), SDK_ERRORS)
async def test_sdk_raises_its_own_errors(
    sdk: AsyncAnthropic, text: str, status: int, kind: type[anthropic.APIStatusError], stream: bool
) -> None:
    """An error is the SDK's exception of that status, with the gateway's request id."""
    with pytest.raises(kind) as caught:
        await sdk.messages.create(
            model="openai/gpt-4o", max_tokens=10, messages=[{"role": "user", "content": text}], stream=stream
        )
    assert caught.value.status_code == status
    assert str(caught.value.request_id).startswith("req_")
    assert caught.value.request_id == caught.value.body["request_id"]  # type: ignore[index]


async def test_sdk_raises_in_the_stream(sdk: AsyncAnthropic, gateway: Served) -> None:
    """An error event ends the SDK's iteration with an exception; a wrong gateway key is its authentication error."""
    asked: Any = {"max_tokens": 99, "messages": [{"role": "user", "content": f"{SIX} [error_in_stream]"}]}
    with pytest.raises(anthropic.APIStatusError, match="overloaded_error"):
        async with sdk.messages.stream(model="groq/llama-3.3-70b-versatile", **asked) as events:
            await events.until_done()
    async with AsyncAnthropic(base_url=gateway.url, api_key="wrong-key", max_retries=0) as stranger:
        with pytest.raises(anthropic.AuthenticationError):
            await stranger.messages.create(model="openai/gpt-4o", **asked)


# == Errors ============================================================================================================

ERRORS = [  # what the provider says, of the caller's own key or not; the status, type and code that the caller gets
    (400, False, 400, "invalid_request_error", None),
    (401, False, 502, "provider_error", "provider_authentication"),
    (401, True, 401, "authentication_error", None),
    (402, False, 403, "permission_error", "billing"),
    (403, False, 502, "provider_error", "provider_authentication"),
    (403, True, 403, "permission_error", None),
    (404, False, 404, "not_found_error", None),
    (408, False, 504, "timeout_error", None),
    (409, False, 400, "invalid_request_error", None),
    (413, False, 413, "request_too_large", None),
    (422, False, 400, "invalid_request_error", None),
    (429, False, 429, "rate_limit_error", None),
    (498, False, 503, "overloaded_error", None),
    (500, False, 502, "provider_error", None),
    (502, False, 502, "provider_error", None),
    (503, False, 503, "overloaded_error", None),
    (504, False, 504, "timeout_error", None),
    (529, False, 503, "overloaded_error", None),
]


@pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])
@pytest.mark.parametrize(("said", "own", "status", "kind", "code"), ERRORS)
async def test_provider_errors(
    gateway: Served, sandbox: Sandbox, said: int, own: bool, status: int, kind: str, code: str | None, stream: bool
) -> None:
    """Before the first byte an error is a status, on every provider and for a stream too; nothing is asked twice."""
    for provider in PROVIDERS:
        if (said, own, provider) == (401, False, "gemini-oauth"):
            continue  # a login is refreshed first
        asked = sandbox.seen
        key = {f"X-Provider-Key-{provider}": "my-own-key"} if own else {}
        answer = await gateway.ask(provider, f"[error {said} retry_after=7]", stream=stream, headers=key)
        error = answer.error
        assert (answer.status, error["type"], error["provider"]) == (status, kind, provider)
        assert code in (None, error.get("code"))
        assert (error["retry_after"], answer.headers["Retry-After"]) == (7, "7")
        assert error["message"].endswith(error["provider_error"]["message"])
        assert sandbox.seen == asked + 1


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_keys_that_are_no_good(
    serve: Serve, environ: dict[str, str], provider: str, own: bool, credentials: Path
) -> None:
    """A key that the provider does not know gets the same two answers, whatever status the provider has for it."""
    log_in(credentials, access_token="bad-token", refresh_token="bad")
    bad = {name: f"bad-{key}" if name.endswith("_KEY") else key for name, key in environ.items()}
    gateway = await serve(environ=bad)
    answer = await gateway.ask(provider, headers={f"X-Provider-Key-{provider}": "bad-of-mine"} if own else {})
    wanted = (401, "authentication_error") if own else (502, "provider_error")
    assert (answer.status, answer.error["type"]) == wanted
    assert own or answer.error["code"] == "provider_authentication"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("ending", "kind", "code"),
    [
        ("[error_in_stream]", "overloaded_error", None),
        ("[error_in_stream 500]", "provider_error", None),
        ("[break_off]", "provider_error", "stream_truncated"),
        ("[reset]", "provider_error", "stream_truncated"),
    ],
)
async def test_errors_in_mid_stream(gateway: Served, provider: str, ending: str, kind: str, code: str | None) -> None:
    """Once events have gone out, an error is the last of them, with the fields it would have had as a body."""
    answer = await gateway.ask(provider, f"{SIX} {ending}", stream=True)
    last = answer.events[-1]
    if provider in ("openai", "oai-resp") and ending == "[error_in_stream]":
        assert last["error"]["type"] in (kind, "provider_error")  # their events have no word for an overload
    else:
        assert last["error"]["type"] == kind
    assert (answer.status, last["type"], last["error"]["provider"]) == (200, "error", provider)
    assert code in (None, last["error"].get("code"))
    assert last["request_id"] == last["error"]["request_id"] == answer.headers["X-Request-ID"]
    kinds = [event["type"] for event in answer.events]
    assert kinds.count("error") == 1
    assert "message_stop" not in kinds
    assert "one two three six".startswith(text_of(answer.events)) or ending == "[reset]"


async def test_server_key_refused_in_mid_stream(gateway: Served) -> None:
    """Also inside a stream, a refusal of the gateway's own key is not the caller's fault."""
    answer = await gateway.ask("anthropic", f"{SIX} [error_in_stream 401]", stream=True)
    error = answer.events[-1]["error"]
    assert (error["type"], error.get("code")) == ("provider_error", "provider_authentication")


# == Requests ==========================================================================================================

WRONG: dict[str, tuple[Any, str | None, str | None]] = {  # body, param, code
    "no JSON": (b"{", None, "invalid_json"),
    "depth 65": (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", None, "json_too_deep"),
    "depth 100,000": (b"[" * 100_000, None, "json_too_deep"),
    "NaN": (b'{"temperature":NaN}', "temperature", None),
    "1,001 messages": (body_of("openai") | {"messages": body_of("openai")["messages"] * 1001}, "messages", None),
    "257 tools": (body_of("openai", tools=[WEATHER | {"name": f"t{n}"} for n in range(257)]), "tools", None),
    "model bare": (body_of("openai") | {"model": "gpt-4o"}, "model", None),
    "model a path": (body_of("openai") | {"model": "gemini/../../x"}, "model", None),
    "no block": (
        {"model": "a/b", "messages": [{"role": "user", "content": [{}]}]},
        "messages[0].content[0].type",
        None,
    ),
}


@pytest.mark.parametrize(("body", "param", "code"), WRONG.values(), ids=WRONG)
async def test_wrong_bodies(gateway: Served, sandbox: Sandbox, body: Any, param: str | None, code: str | None) -> None:
    """A wrong body is refused with the place or a code, without a word to the provider, and shortly."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await gateway.send("POST", "/v1/messages", data=raw, headers=JSON_TYPE)
    error = answer.error
    assert (answer.status, error["type"]) == (400, "invalid_request_error")
    assert (error.get("param"), error.get("code")) == (param, code)
    assert len(answer.raw) < 1000
    assert sandbox.seen == 0


JSON_TYPE = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        *(({"Content-Type": kind}, "unsupported_media_type") for kind in ("text/plain", "application/octet-stream")),
        *((JSON_TYPE | {"Content-Encoding": name}, "unsupported_encoding") for name in ("gzip", "deflate")),
        ({"Content-Type": "application/json; charset=latin-1"}, None),
        ({"Content-Type": "APPLICATION/JSON", "Content-Encoding": "identity"}, None),
    ],
)
async def test_types_and_encodings(gateway: Served, sandbox: Sandbox, headers: JSON, code: str | None) -> None:
    """Only `application/json` is taken, which a web page cannot send unasked, and nothing compressed."""
    raw = json.dumps(body_of("openai")).encode()
    data = gzip.compress(raw) if headers.get("Content-Encoding") == "gzip" else raw
    answer = await gateway.send("POST", "/v1/messages", data=data, headers=headers)
    assert answer.status == (400 if code else 200)
    assert code is None or (answer.error["code"], sandbox.seen) == (code, 0)


POST = f"POST /v1/messages HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Type: application/json\r\n"
CHUNK = b"400\r\n" + b"x" * 1024 + b"\r\n"


@pytest.mark.parametrize(
    ("head", "body", "tail"),
    [
        ("Content-Length: 5000", b"", b"x" * 5000),
        ("Content-Length: 5000\r\nExpect: 100-continue", b"", b"x" * 5000),
        ("Transfer-Encoding: chunked", CHUNK, CHUNK * 3 + b"0\r\n\r\n"),
        ("Transfer-Encoding: chunked", CHUNK * 4, b"0\r\n\r\n"),
    ],
    ids=["length", "expect", "chunked", "chunked at once"],
)
async def test_body_over_the_limit(
    serve: Serve, sandbox: Sandbox, logged: Logged, head: str, body: bytes, tail: bytes
) -> None:
    """Too large a body is a 413, from its length alone or while it is read, and the connection is closed."""
    gateway = await serve(limits={"max_body_bytes": 2048})
    async with gateway.raw(f"{POST}{head}\r\n\r\n".encode() + body) as (reader, writer), asyncio.timeout(5):
        if "chunked" in head:
            writer.write(tail)
            tail = b""
        first = await reader.readuntil(b"\r\n\r\n")
        writer.write(tail)
        rest = await reader.read()
    assert first.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in first.lower()
    answer = json.loads(rest)
    assert (answer["error"]["type"], answer["error"]["message"]) == ("request_too_large", "the body is over 2048 bytes")
    assert f"X-Request-ID: {answer['request_id']}\r\n".encode() in first
    assert (sandbox.seen, [line["status"] for line in logged.requests]) == (0, [413])


async def test_bodies_of_some_megabytes(gateway: Served, sandbox: Sandbox) -> None:
    """A body under the limit goes through whole; at 10 MiB the default limit ends it."""
    statuses = []
    for size in (9 << 20, 10 << 20):
        raw = json.dumps(body_of("openai", "x" * size + " [say Long.]")).encode()
        answer = await gateway.send("POST", "/v1/messages", data=io.BytesIO(raw), headers=JSON_TYPE)
        statuses.append(answer.status)
    assert (statuses, sandbox.seen) == ([200, 413], 1)


@pytest.mark.parametrize("sent", [b'{"model":', b"", b"5\r\n{}"], ids=["half", "nothing", "half a chunk"])
async def test_slow_body(serve: Serve, sent: bytes) -> None:
    """A body that does not arrive in time is a 408, and the connection is closed."""
    gateway = await serve(timeouts={"body": 0.1})
    length = "Transfer-Encoding: chunked" if b"\r" in sent else "Content-Length: 100"
    async with gateway.raw(f"{POST}{length}\r\n\r\n".encode() + sent) as (reader, writer), asyncio.timeout(5):
        first = await reader.readuntil(b"\r\n\r\n")
        writer.write_eof()
        error = json.loads(await reader.read())["error"]
    assert first.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in first.lower()
    assert (error["type"], error["code"]) == ("invalid_request_error", "body_timeout")


LOST = ("/v1/nope", "/v1//messages", "/V1/messages", "/v1/messages/", "/v1/messages/count_tokens", "/", "/..%2fetc")


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        *(("POST", path, 404, None) for path in LOST),
        ("GET", "/v1/messages", 405, "POST"),
        ("DELETE", "/v1/messages", 405, "POST"),
        ("POST", "/v1/models", 405, "GET,HEAD"),
        ("PUT", "/health", 405, "GET,HEAD"),
    ],
)
async def test_routes_and_methods(gateway: Served, method: str, path: str, status: int, allow: str | None) -> None:
    """An unknown route is a 404, a wrong method a 405 with `Allow`, both as envelopes."""
    answer = await gateway.send(method, path)
    kind = "not_found_error" if status == 404 else "invalid_request_error"
    assert (answer.status, answer.error["type"], answer.headers.get("Allow")) == (status, kind, allow)
    assert answer.headers["Server"] == "vai"


@pytest.mark.parametrize("id", ["my-request_1.2", "x" * 64, "x" * 65, "a b", "a\tb", "../..", 'req_1"}', "ünï", ""])
async def test_request_ids(gateway: Served, logged: Logged, id: str) -> None:
    """The caller's `X-Request-ID` comes back in headers, errors and log if it is plain; else it is replaced."""
    answer = await gateway.ask("openai", "[error 500]", headers={"X-Request-ID": id})
    given = answer.error["request_id"]
    assert given == id if id in ("my-request_1.2", "x" * 64) else re.fullmatch("req_[0-9a-f]{24}", given)
    assert [line["request_id"] for line in logged.requests] == [given]


MALFORMED = {
    "request line": b"nonsense\r\n\r\n",
    "two lengths": f"{POST}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{{}}".encode(),
    "negative length": f"{POST}Content-Length: -2\r\n\r\n{{}}".encode(),
    "length and chunks": f"{POST}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode(),
    "space before colon": b"GET /health HTTP/1.1\r\nHost : 127.0.0.1\r\n\r\n",
    "folded header": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a\r\n b\r\n\r\n",
    "long header": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 9000 + b"\r\n\r\n",
    **{
        f"length {length!r}": f"{POST}Content-Length: {length}\r\n\r\n{{}}".encode()
        for length in ("+2", "2, 2", "0x2", "2 2", "", "-0", "9" * 30)
    },
    **{
        f"transfer {coding!r}": f"{POST}Transfer-Encoding: {coding}\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n".encode()
        for coding in ("chunked, chunked", "chunked, gzip", "xchunked", "identity")
    },
    "bare LF": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\nX: y\r\n\r\n",
    "bare CR": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: y\rz\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.test\r\n\r\n",
    "two content types": f"{POST}Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{{}}".encode(),
    "many headers": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: y\r\n" * 500 + b"\r\n",
    "a later version": b"GET /health HTTP/9.9\r\nHost: 127.0.0.1\r\n\r\n",
    "bad chunk": f"{POST}Transfer-Encoding: chunked\r\n\r\nzz\r\n{{}}\r\n0\r\n\r\n".encode(),
    "NUL in a header": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a\0b\r\n\r\n",
}


async def test_malformed_http(launch: Launch) -> None:
    """Malformed requests are answered with 400 and a closed connection, and cannot fill the log."""
    process = await launch()
    for name, raw in MALFORMED.items():
        answer = await process.gateway.raw_answer(raw)
        assert re.match(rb"HTTP/1\.[01] 400 ", answer), name
        assert answer.count(b"HTTP/1.") == 1, name
        assert b"\r\nServer: vai\r\n" in answer, name
    process.signal(signal.SIGTERM)
    assert await process.ended(5) == 0
    assert len(process.errors) <= len(MALFORMED) + 1


async def test_pipelined(gateway: Served, sandbox: Sandbox) -> None:
    """Requests on one connection are answered in their order, each once."""
    get = b"GET /v1/%d HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    raw = b"".join([post_bytes(body_of("openai")), *(get % number for number in range(500))])
    answers = await gateway.raw_answer(raw + post_bytes(body_of("openai"), "Connection: close"))
    assert [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", answers)] == [200, *[404] * 500, 200]
    assert [int(route) for route in re.findall(rb"no such route: /v1/(\d+)", answers)] == list(range(500))
    assert sandbox.seen == 2


async def test_type_that_is_missing(gateway: Served) -> None:
    """A body that does not say what it is, is not taken."""
    answer = await gateway.raw_answer(
        post_bytes(body_of("openai"), "Connection: close").replace(b"Content-Type: application/json\r\n", b"")
    )
    assert b" 400 " in answer[:16]
    assert b'"unsupported_media_type"' in answer


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_odd_characters_go_through(gateway: Served, sandbox: Sandbox, provider: str) -> None:
    """NUL, ESC, line separators, marks of direction and what is no character at all are the model's to read."""
    odd = "\0\x1b\x7f\u2028\u202e\ufeff\ud7ff\uffff\U0010ffff"
    answer = await gateway.ask(provider, f"{odd} [say {odd}]")
    assert (answer.status, answer.text) == (200, odd)
    assert json.dumps(odd)[1:-1] in json.dumps(sandbox.requests[0].body)


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_no_url_is_fetched(gateway: Served, listen: Listen, provider: str) -> None:
    """An address in a request is the provider's to fetch, or refused."""
    heard: list[Any] = []
    url = await listen(canned(b"", heard))
    for scheme, statuses in (("http", {200, 400}), ("file", {400}), ("ftp", {400}), ("gopher", {400})):
        for kind in ("image", "document"):
            source = {"type": "url", "url": url.replace("http", scheme) + "/x.pdf"}
            content = [{"type": "text", "text": "[say Hm.]"}, {"type": kind, "source": source}]
            body = body_of(provider) | {"messages": [{"role": "user", "content": content}]}
            assert (await gateway.post(body)).status in statuses
    assert heard == []


async def test_headers_for_anthropic(gateway: Served, sandbox: Sandbox) -> None:
    """Of `anthropic-beta` all go through, however many headers they are spread over; what is no list is refused."""
    betas = ("anthropic-beta: a-1", "Anthropic-Beta: b-2,c-3", "Connection: close")
    answer = await gateway.raw_answer(post_bytes(body_of("anthropic"), *betas))
    assert b" 200 " in answer[:16]
    assert sandbox.requests[0].headers["anthropic-beta"] == "a-1,b-2,c-3"
    for wrong in ("b," * 600, "\x80"):
        raw = post_bytes(body_of("anthropic"), "anthropic-beta: X", "Connection: close")
        answer = await gateway.raw_answer(raw.replace(b"beta: X", b"beta: " + wrong.encode("latin-1")))
        assert b" 400 " in answer[:16]
        assert b'"param":"anthropic-beta"' in answer
    assert sandbox.seen == 1


# == Disconnects =======================================================================================================


@pytest.mark.parametrize("way", ["FIN", "RST", "half-close"])
@pytest.mark.parametrize(
    ("text", "stream"),
    [("[wait 30]", False), ("[wait 30]", True), (f"{SIX} [hang]", True), ("[words 500] [slow 0.05]", True)],
    ids=["thinking", "before the stream", "silent stream", "flowing stream"],
)
async def test_caller_that_leaves(
    gateway: Served, sandbox: Sandbox, logged: Logged, text: str, stream: bool, way: str
) -> None:
    """When the caller goes, the provider's connection closes within 100 ms; a half-closed one counts as gone."""
    loop, delays = asyncio.get_running_loop(), []
    for _ in range(3):
        async with asyncio.timeout(5), gateway.raw(post_bytes(body_of("openai", text, stream=stream))) as pair:
            reader, writer = pair
            request = await sandbox.wait_for(sandbox.seen + 1)
            if "wait" not in text:
                await reader.readuntil(b"text_delta")
            left = loop.time()
            {"FIN": asyncio.StreamWriter.close, "RST": reset, "half-close": asyncio.StreamWriter.write_eof}[way](writer)
            await request.closed.wait()
            assert request.ended is not None
            delays.append(request.ended - left)
    assert statistics.median(delays) < 0.1
    async with asyncio.timeout(5):
        await gateway.gateway.idle.wait()
    assert (sandbox.open, gateway.gateway.running) == (0, set())
    assert {line["status"] for line in logged.requests} == {499}
    assert not [record for record in logged.records if record.levelname in ("WARNING", "ERROR")]


async def test_many_that_leave(gateway: Served, sandbox: Sandbox) -> None:
    """Sixty callers who leave at once leave no task and no open request behind."""
    before = len(asyncio.all_tasks())

    async def visit() -> None:
        async with gateway.raw(post_bytes(body_of("groq", f"{SIX} [hang]", stream=True))) as (reader, _):
            await reader.readuntil(b"text_delta")

    async with asyncio.timeout(10):
        await asyncio.gather(*(visit() for _ in range(60)))
        await asyncio.gather(*[request.closed.wait() for request in sandbox.requests])
        await gateway.gateway.idle.wait()
        for _ in range(100):  # what is done may still have to be swept up
            await asyncio.sleep(0)
    assert (sandbox.seen, sandbox.open, len(asyncio.all_tasks())) == (60, 0, before)


async def test_reader_that_never_reads(serve: Serve, listen: Listen) -> None:
    """A caller that does not read is given up after the write timeout, and the provider is let go."""
    gone = asyncio.Event()
    delta = b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{"content":"' + b"x" * 60_000 + b'"}}]}\n\n'

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hear(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        try:
            while True:
                writer.write(delta)
                await writer.drain()
        finally:
            gone.set()

    gateway = await serve(providers={"openai": {"base_url": await listen(talk)}}, timeouts={"write": 0.2})
    async with gateway.raw(post_bytes(body_of("openai", stream=True))) as (_, writer), asyncio.timeout(8):
        assert isinstance(writer.transport, asyncio.ReadTransport)
        writer.transport.pause_reading()
        await gone.wait()
        await gateway.gateway.idle.wait()


async def test_hung_provider_holds_up_nobody(gateway: Served, sandbox: Sandbox) -> None:
    """With 120 calls hanging at one provider, it and the others still answer at once."""
    hung = [asyncio.create_task(gateway.ask("openai", "[hang]")) for _ in range(120)]
    await sandbox.wait_for(120)
    async with asyncio.timeout(2):
        for provider in ("groq", "openai"):
            assert (await gateway.ask(provider)).status == 200
    for task in hung:
        task.cancel()
    await asyncio.gather(*hung, return_exceptions=True)


# == Pings and timeouts ================================================================================================


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_pings_while_the_provider_thinks(serve: Serve, provider: str) -> None:
    """A silent provider's caller gets the 200 and pings, then the whole answer."""
    gateway = await serve(sse={"ping_interval": 0.05})
    answer = await gateway.ask(provider, f"[wait 0.2] {SIX}", stream=True)
    kinds = [event["type"] for event in answer.events]
    begun = kinds.index("message_start")
    assert kinds[:begun] == ["ping"] * begun != []
    assert kinds[-1] == "message_stop"
    assert text_of(answer.events) == "one two three four five six"


async def test_error_after_a_ping(serve: Serve) -> None:
    """An error that comes after the first ping is an event with all its fields."""
    gateway = await serve(sse={"ping_interval": 0.05})
    answer = await gateway.ask("groq", "[wait 0.2] [error 429 retry_after=7]", stream=True)
    *pings, last = answer.events
    assert answer.status == 200
    assert {event["type"] for event in pings} == {"ping"}
    assert (last["error"]["type"], last["error"]["retry_after"]) == ("rate_limit_error", 7)
    assert last["request_id"] == answer.headers["X-Request-ID"]


async def test_no_ping_without_need(serve: Serve) -> None:
    """An answer that flows has no pings, however long it takes."""
    gateway = await serve(sse={"ping_interval": 0.5})
    answer = await gateway.ask("openai", "[words 10] [slow 0.06]", stream=True)
    assert "ping" not in [event["type"] for event in answer.events]


# == Processes =========================================================================================================

STOPS = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("stop", STOPS)
async def test_stops_when_idle(launch: Launch, stop: signal.Signals) -> None:
    """A signal ends an idle gateway at once, with exit code 0 and nothing but JSON on standard error."""
    process = await launch()
    assert (await process.gateway.ask("openai")).status == 200
    process.signal(stop)
    assert await process.ended(2) == 0
    lines = [json.loads(line) for line in process.errors]
    assert [line["logger"] for line in lines] == ["vai.access", "vai.server"]


@pytest.mark.parametrize("stop", STOPS)
async def test_running_streams_finish(launch: Launch, sandbox: Sandbox, stop: signal.Signals) -> None:
    """After a signal what runs comes to its end, streaming or not."""
    process = await launch()
    text = "[words 8] [slow 0.05]"
    asked = [process.gateway.ask("openai", text, stream=True) for _ in range(10)]
    running = [asyncio.create_task(answer) for answer in (*asked, process.gateway.ask("groq", "[wait 0.5] [say Hi.]"))]
    await sandbox.wait_for(len(running))
    process.signal(stop)
    *streams, whole = await asyncio.gather(*running)
    assert [answer.events[-1]["type"] for answer in streams] == ["message_stop"] * 10
    assert whole.text == "Hi."
    assert await process.ended(3) == 0


@pytest.mark.parametrize("stop", STOPS)
async def test_drain(launch: Launch, sandbox: Sandbox, stop: signal.Signals) -> None:
    """While it drains, the gateway says so to whoever asks; what is left after the drain is told, and it ends."""
    process = await launch(VAI_TIMEOUT_DRAIN="1")
    gateway = process.gateway
    stream = asyncio.create_task(gateway.ask("openai", f"{SIX} [hang]", stream=True))
    whole = asyncio.create_task(gateway.ask("openai", "[hang]"))
    await sandbox.wait_for(2)
    begun = time.monotonic()
    process.signal(stop)
    async with asyncio.timeout(1):
        while (health := await gateway.get("/health")).status == 200:
            pass
    refused = await gateway.ask("openai")
    assert (health.status, health.body["status"]) == (503, "draining")
    assert (refused.status, refused.error["type"], refused.error["code"]) == (503, "overloaded_error", "draining")
    assert (refused.headers["Retry-After"], refused.error["retry_after"]) == ("1", 1)
    assert refused.headers["Connection"].lower() == "close"
    last = (await stream).events[-1]
    assert (last["type"], last["error"]["type"], last["error"]["code"]) == ("error", "overloaded_error", "draining")
    assert ((await whole).status, (await whole).error["code"]) == (503, "draining")
    assert await process.ended(3) == 0
    assert 0.9 < time.monotonic() - begun < 4
    assert sandbox.seen == 2


@pytest.mark.parametrize(("first", "second"), [STOPS, STOPS[::-1]])
async def test_second_signal(launch: Launch, sandbox: Sandbox, first: signal.Signals, second: signal.Signals) -> None:
    """A second signal ends the gateway at once, still with exit code 0."""
    process = await launch()
    stream = asyncio.create_task(process.gateway.ask("openai", f"{SIX} [hang]", stream=True))
    await sandbox.wait_for(1)
    process.signal(first)
    while (await process.gateway.get("/health")).status == 200:
        pass
    process.signal(second)
    assert await process.ended(2) == 0
    with pytest.raises(Exception, match=r"payload|disconnect|reset"):
        await stream


async def test_hangup_is_survived(launch: Launch) -> None:
    """A terminal that goes away does not take the gateway with it."""
    process = await launch()
    process.signal(signal.SIGHUP)
    assert (await process.gateway.ask("openai")).status == 200


@pytest.mark.parametrize("missing", ["<&- >&- 2>&-", "2>&-", "> /dev/full"])
async def test_missing_streams(environ: JSON, http: aiohttp.ClientSession, missing: str, tmp_path: Path) -> None:
    """Without a standard stream, or somebody who reads it, the gateway starts and answers like any other."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = f"exec {sys.executable} {ROOT / 'server.py'} --port {port} {missing}"
    env = {"PATH": os.environ["PATH"], **environ, "VAI_API_KEYS": KEY}
    process = await asyncio.create_subprocess_shell(command, cwd=tmp_path, env=env, stdout=-3, stderr=-3)
    gateway = Served(f"http://127.0.0.1:{port}", http)
    try:
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(aiohttp.ClientConnectorError):
                    assert (await gateway.ask("openai")).status == 200
                    break
                await asyncio.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    assert await process.wait() == 0


async def test_sandbox_flag(launch: Launch) -> None:
    """`--sandbox` answers for every provider without key or network; with no key configured, one is made and shown."""
    process = await launch("--sandbox", VAI_API_KEYS="", GEMINI_OAUTH_CREDENTIALS_PATH="")
    (key,) = set(re.findall(r"vai_sk_[\w-]{40,}", process.out))
    for provider in PROVIDERS:
        assert (await process.gateway.post(body_of(provider), key=key)).status == 200
    assert (await process.gateway.ask("openai")).status == 401
    process.signal(signal.SIGTERM)
    assert await process.ended(5) == 0
    assert key not in "".join(process.errors)


# == Logs ==============================================================================================================


@pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])
async def test_log_line(gateway: Served, logged: Logged, stream: bool) -> None:
    """A request is one line: who, what, how long, what it cost and how much was sent, and nothing of what was said."""
    answer = await gateway.ask("openai", "[say marker-out] marker-in", stream=stream, system="marker-system")
    await gateway.gateway.idle.wait()
    (line,) = logged.requests
    assert line["request_id"] == answer.headers["X-Request-ID"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert (line["level"], line["caller"], line["method"], line["path"]) == ("info", "alice", "POST", "/v1/messages")
    assert (line["status"], line["provider"], line["model"]) == (200, "openai", "gpt-4o")
    usage = answer.events[-2]["usage"] if stream else answer.body["usage"]
    assert (line["input_tokens"], line["output_tokens"]) == (usage["input_tokens"], usage["output_tokens"])
    assert 0 <= line["duration_ms"] < 5000
    assert line["bytes"] == len(answer.raw.encode())
    assert "marker" not in "".join([*logged.json, *logged.text])


@pytest.mark.parametrize("text", ["[error 500]", f"{SIX} [error_in_stream 500]", f"{SIX} [reset]"])
async def test_log_of_an_error(gateway: Served, logged: Logged, text: str) -> None:
    """An error's line has its type; neither the prompt nor the provider's words are in it."""
    await gateway.ask("groq", f"{text} marker-in", stream=True)
    await gateway.gateway.idle.wait()
    (line,) = logged.requests
    assert line["error"] == "provider_error"
    assert "marker" not in "".join(logged.json)


async def test_log_that_nobody_reads(launch: Launch) -> None:
    """A log that is not read holds up no request, nor the end; once it is read, it is all there."""
    process = await launch()
    errors = process.readers.pop()
    errors.cancel()  # a few hundred KB fit into what lies between
    paths = [f"/v1/{number:0>900}" for number in range(1500)]
    for path in paths:
        assert (await process.gateway.get(path)).status == 404
    process.readers.append(asyncio.create_task(process.read_errors()))
    process.signal(signal.SIGTERM)
    assert await process.ended(5) == 0
    assert len([line for line in process.errors if "vai.access" in line]) == len(paths)


async def test_log_that_is_read_too_late() -> None:
    """Beyond so many lines they are dropped, and the log says how many."""
    reading, writing = os.pipe()
    writer = server.LogWriter(writing, 10)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    server.logger.addHandler(handler)
    try:
        for _ in range(100):
            writer.write("x" * 10_000 + "\n")
        read = dropped = 0
        while read + dropped < 100:
            read += (await asyncio.to_thread(os.read, reading, 1 << 20)).count(b"\n")
            dropped = sum(int(re.findall(r"\d+", line)[0]) for line in said)
        assert 10 <= read < 100
        os.close(reading)
        writer.write("x\n")
        writer.finish()
    finally:
        server.logger.removeHandler(handler)
        os.close(writing)


HOSTILE = 'a\n{"level":"x"}\r\x1b[31m"\u2028'


@pytest.mark.parametrize("place", ["path", "query", "model", "request id", "user agent", "tool", "alias"])
async def test_hostile_input_stays_on_its_line(gateway: Served, logged: Logged, place: str) -> None:
    """Newlines, quotes and escapes from outside make no second line, in either format."""
    quoted = "".join(f"%{byte:02x}" for byte in HOSTILE.encode())
    plain = HOSTILE.translate({10: None, 13: None, 27: None})
    if place == "path":
        await gateway.raw_answer(f"GET /v1/{quoted} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    elif place == "query":
        await gateway.raw_answer(f"GET /v1/models?{quoted} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    elif place in ("model", "alias"):
        await gateway.post(body_of("openai") | {"model": f"openai/{HOSTILE}" if place == "model" else HOSTILE})
    elif place == "tool":
        await gateway.ask("openai", tools=[WEATHER | {"name": HOSTILE}])
    else:
        name = "X-Request-ID" if place == "request id" else "User-Agent"
        await gateway.raw_answer(post_bytes(body_of("openai"), f"{name}: {plain}", "Connection: close"))
    assert len(logged.requests) == 1
    for line in (*logged.json, *logged.text):
        assert not re.search(r"[\x00-\x1f\x7f\u2028]", line)


def test_crash_in_the_log(logged: Logged) -> None:
    """Of an exception the log has type and places; its message, which may hold content, stays out."""
    try:
        raise ValueError("marker")
    except ValueError as fault:
        answered = server.error_of(fault, "/x")
    assert (answered.status, answered.message) == (500, "internal error")
    line = json.loads(logged.json[-1])
    assert (line["exception"], line["level"], len(line["stack"])) == ("ValueError", "error", 1)
    assert "marker" not in "".join([*logged.json, *logged.text])
