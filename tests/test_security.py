"""Who may call, whose key pays, and where no key may ever show."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import re
import secrets
import traceback
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    JSON,
    KEY,
    PROVIDERS,
    Answer,
    Listen,
    Logged,
    Serve,
    Served,
    body_of,
    canned,
    hear,
    http_answer,
    log_in,
    post_bytes,
)

import providers
import server
import vai
from sandbox import Sandbox

# == Who may call ======================================================================================================

STRANGERS: dict[str, list[tuple[str, str]]] = {
    "nothing": [],
    "wrong": [("Authorization", "Bearer wrong-key-0123456789")],
    "wrong X-API-Key": [("X-API-Key", "wrong-key-0123456789")],
    "last byte": [("Authorization", f"Bearer {KEY[:-1]}x")],
    "prefix": [("Authorization", f"Bearer {KEY[:-1]}")],
    "longer": [("Authorization", f"Bearer {KEY}x")],
    "other case": [("Authorization", f"Bearer {KEY.upper()}")],
    "space inside": [("X-API-Key", f"{KEY[:9]} {KEY[9:]}")],
    "two words": [("Authorization", f"Bearer {KEY} x")],
    "Bearer alone": [("Authorization", "Bearer")],
    "no scheme": [("Authorization", KEY)],
    "Basic": [("Authorization", "Basic " + base64.b64encode(KEY.encode()).decode())],
    "empty": [("X-API-Key", "")],
    "quote": [("X-API-Key", "' OR '1'='1")],
    "percent": [("X-API-Key", f"{KEY}%00")],
    "non-ASCII": [("X-API-Key", "schlüssel-🔑")],
    "two Authorization": [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")],
    "two X-API-Key": [("X-API-Key", KEY), ("X-API-Key", "wrong-key")],
    "wrong X-API-Key beside the right bearer": [("X-API-Key", "wrong-key"), ("Authorization", f"Bearer {KEY}")],
}


@pytest.mark.parametrize("headers", STRANGERS.values(), ids=STRANGERS)
async def test_strangers(gateway: Served, sandbox: Sandbox, headers: list[tuple[str, str]]) -> None:
    """Whoever lacks the key gets a 401 on every route that needs one, and no provider hears of it."""
    async with gateway.http.post(f"{gateway.url}/v1/messages", json=body_of("openai"), headers=headers) as response:
        answer = Answer(response.status, response.headers, await response.text())
    async with gateway.http.get(f"{gateway.url}/v1/models", headers=headers) as response:
        assert response.status == 401
    assert (answer.status, answer.error["type"]) == (401, "authentication_error")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert sandbox.seen == 0


async def test_wrong_keys_are_told_apart_by_nothing(gateway: Served) -> None:
    """All wrong keys get the same bytes, but for the request's id."""
    wrong = [headers for headers in STRANGERS.values() if len(headers) == 1]
    answers = [await gateway.send("POST", "/v1/messages", key=None, headers=dict(headers)) for headers in wrong]
    assert len({re.sub(r"req_\w+", "", answer.raw) for answer in answers}) == 1


@pytest.mark.parametrize("raw", [b"x" * 100_000, b"a\0b"], ids=["100 KB", "NUL"])
async def test_impossible_keys(gateway: Served, raw: bytes) -> None:
    """What cannot stand in a header is refused before anybody looks at it."""
    answer = await gateway.raw_answer(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-API-Key: " + raw + b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.[01] 400 ", answer)


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer   {KEY}"},
        {"X-API-Key": KEY},
        {"x-api-key": f"  {KEY} "},
        {"X-API-Key": KEY, "Authorization": "Bearer of-something-else"},
    ],
    ids=str,
)
async def test_spellings_of_a_key(gateway: Served, headers: dict[str, str]) -> None:
    """The key is taken as bearer token or `X-API-Key`; of two, `X-API-Key` counts, as at Anthropic."""
    assert (await gateway.get("/v1/models", key=None, headers=headers)).status == 200


async def test_callers_by_the_whole_key(serve: Serve, logged: Logged) -> None:
    """Keys that share all but their last character belong to two callers."""
    keys = [{"key": f"{'k' * 60}{name[0]}", "name": name} for name in ("ada", "bob")]
    gateway = await serve(auth={"keys": keys})
    for entry in keys:
        assert (await gateway.post(body_of("openai"), key=entry["key"])).status == 200
    assert (await gateway.post(body_of("openai"), key="k" * 60)).status == 401
    assert [line.get("caller") for line in logged.requests] == ["ada", "bob", None]


@pytest.mark.parametrize(
    ("status", "host"),
    [
        *((200, host) for host in ("127.0.0.1:8080", "localhost", "LOCALHOST:1", "vai.localhost", "[::1]:8080")),
        *((403, host) for host in ("evil.test", "evil.test:80", "127.0.0.1.evil.test", "localhost.evil.test", "")),
        *((403, host) for host in ("192.168.0.1", "0.0.0.0", "[2001:db8::1]:80", "127.0.0.1@evil.test")),  # noqa: S104
    ],
)
async def test_open_gateway_checks_host(serve: Serve, sandbox: Sandbox, host: str, status: int) -> None:
    """Without keys, on loopback, only this machine's own names are answered: a web page cannot rebind its way in."""
    gateway = await serve(auth={"mode": "none"})
    answer = await gateway.post(body_of("openai"), key=None, headers={"Host": host})
    assert (answer.status, sandbox.seen) == (status, int(status == 200))
    assert status == 200 or answer.error["type"] == "permission_error"
    assert (await gateway.get("/v1/models", key=None, headers={"Host": host})).status == status


async def test_open_gateway_beyond_this_machine(serve: Serve) -> None:
    """With `--allow-open` any name is answered, and any key ignored."""
    gateway = await serve(auth={"mode": "none"}, server={"host": "0.0.0.0", "allow_open": True})  # noqa: S104
    answer = await gateway.post(body_of("openai"), key="whatever", headers={"Host": "vai.example.org"})
    assert answer.status == 200


# == Whose key pays ====================================================================================================


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_passthrough(serve: Serve, sandbox: Sandbox, provider: str) -> None:
    """The caller's credential is the provider's key; a key brought for the provider goes before it."""
    gateway = await serve(auth={"mode": "passthrough"})
    byok = {f"X-Provider-Key-{provider}": "of-the-header"}
    body = body_of(provider, provider_keys={provider: "of-the-body"})
    answers = [
        await gateway.post(body_of(provider), key="of-the-bearer"),
        await gateway.post(body_of(provider), key=None, headers={"X-API-Key": "of-x-api-key"}),
        await gateway.post(body_of(provider), key="of-the-bearer", headers=byok),
        await gateway.post(body, key="of-the-bearer"),
    ]
    assert [answer.status for answer in answers] == [200] * 4
    keys = [request.key for request in sandbox.requests]
    assert keys == ["of-the-bearer", "of-x-api-key", "of-the-header", "of-the-body"]


@pytest.mark.parametrize("models", [["oai-resp/gpt-4o", "openai/gpt-4o"], ["openai/gpt-4o", "oai-resp/gpt-4o"]])
async def test_passthrough_with_fallbacks(serve: Serve, sandbox: Sandbox, models: list[str]) -> None:
    """Of an alias's models the caller's credential is for the first one's provider, in both of its wire formats."""
    aliases = {"smart": [*models, "anthropic/claude-sonnet-4-5"]}
    gateway = await serve(auth={"mode": "passthrough"}, aliases=aliases)
    body = body_of("openai", "[error 500]") | {"model": "smart"}
    assert (await gateway.post(body, key="of-the-bearer")).status == 502
    asked = [(request.provider, request.key) for request in sandbox.requests]
    assert asked == [(model.partition("/")[0], "of-the-bearer") for model in models]


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_passthrough_has_no_keys_of_its_own(serve: Serve, sandbox: Sandbox, provider: str) -> None:
    """Without a credential, or with one that the provider refuses, the answer is 401: the server's keys stay unused."""
    config = {id: {"api_key": "of-the-file"} for id in PROVIDERS}
    gateway = await serve(auth={"mode": "passthrough"}, providers=config, server={"allow_open": True})
    assert (await gateway.post(body_of(provider), key=None)).status == 401
    assert sandbox.seen == 0
    refused = await gateway.post(body_of(provider), key="bad-key")
    assert [request.key for request in sandbox.requests] == ["bad-key"]
    assert (refused.status, refused.error["provider"]) == (401, provider)
    listed = (await gateway.get("/v1/models", key="any")).body["providers"]
    assert not any(row["available"] for row in listed)


ORDER: dict[str, tuple[str, dict[str, str], dict[str, str], str]] = {  # provider, headers, body, whose key is sent
    "header first": ("openai", {"X-Provider-Key-OpenAI": "H"}, {"openai": "B"}, "H"),
    "body second": ("openai", {"X-Provider-Key-Groq": "H"}, {"openai": "B"}, "B"),
    "file third": ("openai", {"X-Provider-Key-Groq": "H"}, {"groq": "B"}, "of-the-file"),
    "environment last": ("groq", {"X-Provider-Key-OpenAI": "H"}, {}, "sandbox-groq-key"),
    "an empty one is none": ("openai", {"X-Provider-Key-OpenAI": " "}, {"openai": "B"}, "B"),
    "any case": ("cerebras", {"x-PROVIDER-key-cerebras": "H"}, {"Cerebras": "B"}, "H"),
    "underscore": ("oai-resp", {"X-Provider-Key-OAI_Resp": "H"}, {}, "H"),
    "underscore in the body": ("gemini-oauth", {}, {"gemini_oauth": "B"}, "B"),
    "OpenAI's for Responses": ("oai-resp", {"X-Provider-Key-OpenAI": "H"}, {}, "H"),
    "Responses' own first": ("oai-resp", {"X-Provider-Key-OpenAI": "H", "X-Provider-Key-OAI-Resp": "R"}, {}, "R"),
    "Responses' is not OpenAI's": ("openai", {"X-Provider-Key-OAI-Resp": "R"}, {}, "of-the-file"),
    "Google's name": ("gemini", {"X-Provider-Key-Google": "H"}, {}, "H"),
    "Google's name before the body": ("gemini", {"X-Provider-Key-Google": "H"}, {"gemini": "B"}, "H"),
}


@pytest.mark.parametrize(("provider", "headers", "body", "key"), ORDER.values(), ids=ORDER)
async def test_order_of_keys(
    serve: Serve, sandbox: Sandbox, provider: str, headers: dict[str, str], body: dict[str, str], key: str
) -> None:
    """Header before body before file before environment; names in any case, `_` for `-`."""
    gateway = await serve(providers={"openai": {"api_key": "of-the-file"}})
    answer = await gateway.ask(provider, headers=headers, provider_keys=body)
    assert (answer.status, sandbox.requests[0].key) == (200, key)


async def test_key_of_another_provider(serve: Serve, sandbox: Sandbox, environ: dict[str, str]) -> None:
    """A key for one provider is not tried at another, which has none: 401, and nobody is asked."""
    urls = {name: value for name, value in environ.items() if name.endswith("URL")}
    gateway = await serve(environ={**urls, "HOME": "/nonexistent"})
    for provider in PROVIDERS:
        other = "groq" if provider != "groq" else "cerebras"
        answer = await gateway.ask(provider, headers={f"X-Provider-Key-{other}": "of-another"})
        assert (answer.status, answer.error["code"], answer.error["provider"]) == (401, "no_provider_key", provider)
    assert sandbox.seen == 0


IMPOSSIBLE = [{"openai": key} for key in ("a\r\nX-Evil: 1", "a\0b", "ключ-ключ", "a b", "k" * 100_000, 7, None)]


@pytest.mark.parametrize("keys", [*IMPOSSIBLE, 7, [], {"mistral": "k-e-y"}], ids=str)
async def test_impossible_provider_keys(gateway: Served, sandbox: Sandbox, keys: Any) -> None:
    """A key that no header could hold is a 400 that names its place and does not show it."""
    answer = await gateway.ask("openai", provider_keys=keys)
    known = isinstance(keys, dict) and "openai" in keys
    assert (answer.status, answer.error["param"]) == (400, "provider_keys.openai" if known else "provider_keys")
    value = json.dumps(next(iter(keys.values())))[1:-1] if isinstance(keys, dict) else ""
    assert sandbox.seen == 0
    assert len(value) < 3 or value not in answer.raw


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_what_is_not_forwarded(gateway: Served, sandbox: Sandbox, provider: str) -> None:
    """The provider sees its own key and nothing else of the caller's headers, nor `provider_keys`."""
    brought = {f"X-Provider-Key-{provider}": "mine-for-you", "X-Provider-Key-Cartesia": "mine-for-another"}
    more = {"Cookie": "session=1", "X-Forwarded-For": "10.0.0.1", "X-Forwarded-Host": "evil.test", "X-Custom-Host": "x"}
    body = {"provider_keys": {"cartesia": "mine-in-the-body"}}
    assert (await gateway.ask(provider, headers={**brought, **more, "X-Request-ID": "r-1"}, **body)).status == 200
    request = sandbox.requests[0]
    seen = json.dumps([request.headers, request.body])
    assert request.key == "mine-for-you"
    assert seen.count("mine-for-you") == 1
    assert not [
        word for word in (KEY, "mine-for-another", "mine-in", "provider_keys", "evil", "10.0.0") if word in seen
    ]
    assert not {"cookie", "x-request-id", "x-custom-host"} & {name.lower() for name in request.headers}


async def test_no_request_chooses_the_upstream(gateway: Served, sandbox: Sandbox, listen: Listen) -> None:
    """Fields that look like a base URL are dropped, or refused where they would reach the body's own fields."""
    heard: list[Any] = []
    url = await listen(canned(b"", heard))
    fields = {"base_url": url, "api_base": url, "api_key": "x"}
    answer = await gateway.ask("openai", **fields, headers={"X-Base-URL": url, "Host": url.removeprefix("http://")})
    assert (answer.status, answer.headers["X-Vai-Dropped"]) == (200, "base_url, api_base, api_key")
    for field in ("base_url", "api_base", "model", "messages", "stream"):
        answer = await gateway.ask("openai", extensions={"openai": {field: url}})
        assert (answer.status, answer.error["param"]) == (400, f"extensions.openai.{field}")
    assert (sandbox.seen, heard) == (1, [])


# == The other side ====================================================================================================


STRAY = http_answer(b"", "408 Request Timeout")
REPLY: JSON = {"id": "c", "model": "m", "choices": [{"index": 0, "message": {"content": ""}, "finish_reason": "stop"}]}


@pytest.mark.parametrize("way", ["a stray answer", "garbage", "close"])
async def test_pooled_connections_keep_answers_apart(serve: Serve, listen: Listen, way: str) -> None:
    """What arrives on an idle connection is nobody's answer: the next three calls get their own."""
    idle, done = asyncio.Event(), asyncio.Event()
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        first = connections == 1
        while request := await hear(reader):
            text = json.loads(request.body)["messages"][-1]["content"]
            answer = json.loads(json.dumps(REPLY))
            answer["choices"][0]["message"]["content"] = text
            writer.write(http_answer(json.dumps(answer).encode()))
            if first:
                first = False
                await idle.wait()
                writer.write({"a stray answer": STRAY, "garbage": b"\x00garbage\r\n\r\n", "close": b""}[way])
                if way == "close":
                    writer.close()
                done.set()

    gateway = await serve(providers={"openai": {"base_url": await listen(talk)}})
    assert (await gateway.ask("openai", "call 0")).text == "call 0"
    idle.set()
    await done.wait()
    await asyncio.sleep(0.05)  # the bytes are on their way to a socket that nobody reads from
    for number in (1, 2, 3):
        answer = await gateway.ask("openai", f"call {number}")
        assert (answer.status, answer.text) == (200, f"call {number}")
    assert connections == 2


# == Where keys may not show ===========================================================================================

HOLDERS = ("gateway", "header", "body", "server", "access", "refresh", "client")
RANDOM = {name: secrets.token_hex(12) for name in HOLDERS}
FAULT = {name: f"sk-fault-{hidden}" for name, hidden in RANDOM.items()}
PLAIN = {name: f"fault/{hidden}+{name}" for name, hidden in RANDOM.items()}  # not in the shape of any provider's keys
BAD = {name: f"bad-{hidden}" for name, hidden in RANDOM.items()}  # refused by the sandbox
CODED = [base64.b64encode(key.encode()).decode()[:-2] for key in (*FAULT.values(), *PLAIN.values())]


def shown(*texts: object) -> list[str]:
    """What of the keys above is in these texts."""
    text = "\n".join(map(str, texts))
    return [name for name in HOLDERS if RANDOM[name] in text] + [coded for coded in CODED if coded in text]


def told(fault: BaseException | None) -> Iterator[object]:
    """What an exception says, and those that it came from or came in the wake of."""
    while fault is not None:
        yield from (str(fault), repr(fault), fault.to_wire() if isinstance(fault, vai.Error) else "")
        fault = fault.__cause__ or fault.__context__


def leaks(fault: BaseException) -> list[str]:
    """The variables, in the frames of a traceback, whose `repr` shows a key; frames of these tests aside."""
    frames = traceback.TracebackException.from_exception(fault, capture_locals=True).stack
    found = [
        f"{frame.name}: {name}"
        for frame in frames
        for name, value in (frame.locals or {}).items()
        if frame.filename != __file__ and shown(value)
    ]
    cause = fault.__cause__ or (None if fault.__suppress_context__ else fault.__context__)
    return found + (leaks(cause) if cause else [])


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A provider that repeats the key in every way that its caller names."""
    while request := await hear(reader):
        key = next(line for line in request.head.split("\r\n") if line.startswith("Authorization")).split()[-1]
        coded = base64.b64encode(key.encode()).decode()
        error = {"message": f"no {key} here, nor {coded}", "type": "server_error", "code": key, "debug": [{"k": key}]}
        raw = json.dumps({"error": error}).encode()
        if b"in a stream" in request.body:
            start = b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'
            writer.write(http_answer(start + b"data: " + raw + b"\n\n", kind="text/event-stream"))
        elif b"as plain text" in request.body:
            writer.write(http_answer(f"denied: {key} {coded}".encode(), "401 No", "text/plain"))
        elif b"with escapes" in request.body:
            writer.write(http_answer(raw.replace(b"/", rb"\/"), "401 No"))
        elif b"in a header" in request.body:
            writer.write(http_answer(raw, "429 No", "application/json", f"Retry-After: {key}", f"X-Request-Id: {key}"))
        else:
            writer.write(http_answer(raw, "200 OK" if b"in a 200" in request.body else "400 No"))


def crash(*_: object) -> Any:
    raise ZeroDivisionError("in the adapter")


def sent(gateway: Served, provider: str, text: str, keys: dict[str, str], **more: Any) -> Awaitable[Answer]:
    """A request that brings keys in its header and body."""
    headers = {f"X-Provider-Key-{provider}": keys["header"]}
    body = body_of(provider, text, **{"provider_keys": {provider: keys["body"]}, **more})
    return gateway.post(body, key=FAULT["gateway"], headers=headers)


def bare(gateway: Served, provider: str, text: str = "hi", **more: Any) -> Awaitable[Answer]:
    """A request on the server's own key."""
    return gateway.post(body_of(provider, text, **more), key=FAULT["gateway"])


PATHS: dict[str, Callable[[Served], Awaitable[Any]]] = {
    "wrong key": lambda g: g.post(body_of("openai"), key=FAULT["gateway"] + "x"),
    "basic": lambda g: g.get("/v1/models", key=None, headers={"Authorization": f"Basic {FAULT['gateway']}"}),
    "key in the query": lambda g: g.get(f"/v1/models?api_key={FAULT['gateway']}", key=None),
    "no route": lambda g: g.get("/v1/none", key=FAULT["gateway"]),
    "health": lambda g: g.get("/health", key=FAULT["gateway"]),
    "models": lambda g: g.get("/v1/models", key=FAULT["gateway"]),
    "good": lambda g: sent(g, "openai", "hi", FAULT),
    "not JSON": lambda g: g.send(
        *("POST", "/v1/messages"),
        key=FAULT["gateway"],
        data=f'{{"provider_keys":{{"openai":"{FAULT["body"]}'.encode(),
        headers={"Content-Type": "application/json"},
    ),
    "wrong shape": lambda g: g.post(body_of("openai", provider_keys=[FAULT["body"]]), key=FAULT["gateway"]),
    "wrong field": lambda g: sent(g, "openai", "hi", FAULT, temperature="hot"),
    "no key at all": lambda g: sent(g, "openai", "hi", {"header": f"{FAULT['header']} x", "body": "k"}),
    "no key in the body": lambda g: sent(g, "openai", "hi", {"header": "k", "body": f"{FAULT['body']}\r\nX: y"}),
    "unknown name": lambda g: sent(g, "openai", "hi", FAULT, provider_keys={"mistral": FAULT["body"]}),
    **{f"{id} refuses the caller's": lambda g, id=id: sent(g, id, "hi", BAD) for id in PROVIDERS},  # type: ignore[misc]
    **{f"{id} refuses the server's": lambda g, id=id: bare(g, id) for id in PROVIDERS},  # type: ignore[misc]
    "error": lambda g: sent(g, "openai", "[error 500]", FAULT),
    "error in a stream": lambda g: sent(g, "anthropic", "[say a b c] [error_in_stream 401]", FAULT, stream=True),
    "broken stream": lambda g: sent(g, "openai", "[say a b c d] [reset]", FAULT, stream=True),
    "timeout": lambda g: sent(g, "openai", "[wait 9]", FAULT),
    "no connection": lambda g: sent(g, "cerebras", "hi", FAULT),
    **{
        f"echo {how} of {kind}": lambda g, how=how, keys=keys: sent(g, "groq", how, keys, stream="stream" in how)  # type: ignore[misc]
        for how in ("in an error", "in a 200", "in a stream", "as plain text", "with escapes", "in a header")
        for kind, keys in (("a key", FAULT), ("an odd key", PLAIN))
    },
    "crash": lambda g: sent(g, "oai-resp", "hi", FAULT),
    "crash in a stream": lambda g: sent(g, "oai-resp", "hi", FAULT, stream=True),
}


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Every exception that the gateway makes an answer of."""
    found: list[BaseException] = []
    real = server.error_of

    def seen(fault: BaseException, path: str) -> vai.Error:
        found.append(fault)
        return real(fault, path)

    monkeypatch.setattr(server, "error_of", seen)
    return found


def kept(fault: BaseException) -> BaseException:
    """Its frames, and those of its causes, which the gateway takes from an error once it is told."""
    same = BaseException(type(fault).__name__).with_traceback(fault.__traceback__)
    same.__cause__ = fault.__cause__ and kept(fault.__cause__)
    same.__context__ = fault.__context__ and kept(fault.__context__)
    same.__suppress_context__ = fault.__suppress_context__
    return same


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """The frames of all of these."""
    found: list[BaseException] = []
    real = server.error_of

    def seen(fault: BaseException, path: str) -> vai.Error:
        found.append(kept(fault))
        return real(fault, path)

    monkeypatch.setattr(server, "error_of", seen)
    return found


@pytest.fixture
async def careless(
    serve: Serve, environ: dict[str, str], credentials: Path, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> Served:
    """A gateway full of recognisable keys, with upstreams that repeat, refuse, or make its adapters crash."""
    asyncio.get_running_loop().set_debug(True)
    log_in(credentials, access_token=BAD["access"], refresh_token=BAD["refresh"])
    keys = {name: BAD["server"] for name in environ if name.endswith("_API_KEY")}
    for name in ("decode", "decoder"):
        monkeypatch.setattr(type(providers.PROVIDERS["oai-resp"]), name, crash)
    return await serve(
        environ={**environ, **keys, "GEMINI_OAUTH_CLIENT_SECRET": FAULT["client"]},
        auth={"keys": [{"key": FAULT["gateway"]}]},
        providers={"groq": {"base_url": await listen(echo)}, "cerebras": {"base_url": "http://127.0.0.1:1"}},
        timeouts={"first_byte": 0.2},
    )


@pytest.mark.parametrize("path", PATHS)
async def test_no_key_is_shown(careless: Served, logged: Logged, caught: list[BaseException], path: str) -> None:
    """Whatever goes wrong, no answer, header, log line or exception holds a key."""
    answer = await PATHS[path](careless)
    await careless.gateway.idle.wait()
    assert not shown(answer.raw, answer.headers)
    assert not shown(*logged.json, *logged.text)
    for fault in caught:
        assert not shown(*told(fault))


async def test_no_key_in_the_variables(careless: Served, traced: list[BaseException]) -> None:
    """Nor does a traceback that shows the variables of each frame, as error trackers and `rich` do."""
    found = {}
    for path, walk in PATHS.items():
        traced.clear()
        await walk(careless)
        if names := [name for fault in traced for name in leaks(fault)]:
            found[path] = names
    assert found == {}
    assert "crash" in [frame.name for frame in traceback.extract_tb(traced[-1].__traceback__)]


REFRESHES = {
    "refused": http_answer(b'{"error":"invalid_grant"}', "400 No"),
    "echoed": b"echo",
    "html": http_answer(b"<html>", "500 No", "text/html"),
    "not JSON": http_answer(b"{"),
    "no token": http_answer(b"{}"),
    "closed": b"",
    "elsewhere": http_answer(b"", "307 Elsewhere", "text/plain", "Location: http://127.0.0.1:1/"),
}


@pytest.mark.parametrize("raw", REFRESHES.values(), ids=REFRESHES)
async def test_failed_refresh_shows_no_token(
    serve: Serve,
    environ: JSON,
    credentials: Path,
    listen: Listen,
    logged: Logged,
    caught: list[BaseException],
    traced: list[BaseException],
    raw: bytes,
) -> None:
    """A login that cannot be refreshed is the server's fault, a 502, and no token is in answer, log or traceback."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await hear(reader)
        assert request is not None
        error = json.dumps({"error": "invalid_grant", "error_description": request.body.decode()}).encode()
        writer.write(http_answer(error, "400 No") if raw == b"echo" else raw)
        await writer.drain()

    log_in(credentials, access_token=FAULT["access"], refresh_token=PLAIN["refresh"], expiry_date=1)
    urls = {"GEMINI_OAUTH_TOKEN_URL": await listen(talk), "GEMINI_OAUTH_CLIENT_SECRET": FAULT["client"]}
    gateway = await serve(environ={**environ, **urls})
    answer = await gateway.ask("gemini-oauth")
    assert (answer.status, answer.error["provider"]) == (502, "gemini-oauth")
    assert not shown(answer.raw, answer.headers, *logged.json, *logged.text)
    for fault in caught:
        assert not shown(*told(fault))
    assert traced
    for fault in traced:
        assert leaks(fault) == []


async def test_objects_do_not_show_keys(serve: Serve, sandbox: Sandbox) -> None:
    """Clients, configuration, requests and credentials keep their keys out of their `repr` and `str`."""
    keys = {"openai": FAULT["header"], "anthropic": FAULT["body"]}
    body = body_of("anthropic", provider_keys={"anthropic": FAULT["body"]})
    request = vai.parse_request(body)
    credential = vai.Credential(vai.Secret(FAULT["server"]))
    config = server.Config.model_validate(
        {"auth": {"keys": [{"key": FAULT["gateway"]}]}, "providers": {"openai": {"api_key": FAULT["server"]}}}
    )
    gateway = await serve(auth={"keys": [{"key": FAULT["gateway"]}]})
    url = gateway.url
    async with (
        vai.AsyncClient(provider_keys=keys) as direct,
        vai.AsyncClient(base_url=url, api_key=FAULT["gateway"]) as c,
    ):
        objects = [direct, c, direct._engine, c._engine, direct.messages, request, credential, config, config.auth]
        for adapter in providers.PROVIDERS.values():
            objects.append(adapter.encode(vai.parse_request(body_of(adapter.id)), credential, url, 9))
    with vai.Client(provider_keys=keys) as client, vai.Client(base_url=url, api_key=FAULT["gateway"]) as other:
        objects += [client, other, client.messages]
    objects += [gateway.gateway.callers, gateway.gateway.engine, server.Caller("x", FAULT["header"]), credential.key]
    for one in objects:
        assert not shown(repr(one)), type(one)
        assert isinstance(one, str) or not shown(str(one)), type(one)


@pytest.mark.parametrize("mode", ["direct", "gateway"])
@pytest.mark.parametrize("text", ["refused", "[error 500]", "[say a b c d] [reset]", "unreachable", "nowhere"])
async def test_errors_of_clients_show_no_key(serve: Serve, sandbox: Sandbox, mode: str, text: str) -> None:
    """In both modes, synchronous and not, an error shows no key: not its text, its chain nor its frames' variables."""
    keys = {"openai": (BAD if text == "refused" else FAULT)["header"]}
    gateway = await serve(auth={"keys": [{"key": FAULT["gateway"]}]})
    options: JSON = {"provider_keys": keys, "max_retries": 0}
    if mode == "gateway":
        options |= {"base_url": gateway.url, "api_key": FAULT["gateway"]}
        if text == "unreachable":
            options["base_url"] = "http://127.0.0.1:1"
    else:
        options["base_urls"] = {
            "openai": "http://127.0.0.1:1" if text == "unreachable" else sandbox.base_urls["openai"]
        }
    asked: JSON = {"model": "mistral/x" if text == "nowhere" else "openai/gpt-4o", "messages": text}

    def synchronous() -> vai.Error:
        with vai.Client(**options) as client, pytest.raises(vai.Error) as caught:
            with client.messages.stream(**asked) as stream:
                stream.final()
        return caught.value

    async with vai.AsyncClient(**options) as client:
        with pytest.raises(vai.Error) as caught:
            await client.messages.create(**asked)
    for fault in (caught.value, await asyncio.to_thread(synchronous)):
        assert not shown(*told(fault))
        assert leaks(fault) == []


async def test_nothing_keeps_a_key(serve: Serve, listen: Listen) -> None:
    """Once a request is over, no object of the process refers to the keys it brought."""
    url = await listen(canned(http_answer(json.dumps(REPLY).encode()), []))
    gateway = await serve(providers={"openai": {"base_url": url}}, auth={"mode": "passthrough"})
    mark, last = secrets.token_hex(8), ("Connection: close",)
    for number in range(20):
        body = body_of("openai", provider_keys={"groq": f"{mark}-{number}"}, stream=number % 2 == 1)
        await gateway.raw_answer(post_bytes(body, f"X-Provider-Key-OpenAI: {mark}-1{number}", *last))
    await gateway.gateway.idle.wait()
    del body
    gc.collect()
    held = ((holder, text) for holder in gc.get_objects() for text in gc.get_referents(holder) if isinstance(text, str))
    assert [(type(holder), text) for holder, text in held if text.startswith(f"{mark}-")] == []
