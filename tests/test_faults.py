"""What a provider can do wrong, at every provider, streaming or not: what the caller is told, and that it ends.

A relay stands between the gateway (or a client that asks the providers itself) and the sandbox. It fetches the honest
answer and spoils it on the way: a `Case` says how, step by step, and what is to come of it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import email.utils
import gzip
import io
import itertools
import json
import random
import re
import secrets
import signal
import socket
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import aiohttp
import pytest
from conftest import (
    JSON,
    KEY,
    PROVIDERS,
    Answer,
    Heard,
    Launch,
    Listen,
    Logged,
    Serve,
    Served,
    body_of,
    canned,
    hear,
    http_answer,
    log_in,
    reset,
    text_of,
)

import vai
from providers import Transport
from sandbox import Sandbox

# == The relay =========================================================================================================

SAID = "one two ünï 👋 five six"
SECRET = f"fault-{secrets.token_hex(8)}"  # in every key, the caller's and the server's
FINISHED = re.compile(rb'"finish_reason":"[a-z]|"finishReason":"|"message_stop"|response\.completed"')


class Honest(NamedTuple):
    """The sandbox's answer."""

    status: int
    kind: str
    body: bytes


@dataclass
class Visit:
    """One request, as both ends of the gateway see it."""

    case: Case
    asked: int = 0
    heard: asyncio.Event = field(default_factory=asyncio.Event)  # the request has come in
    begun: asyncio.Event = field(default_factory=asyncio.Event)  # the caller has the first of the answer
    over: asyncio.Event = field(default_factory=asyncio.Event)  # the relay's script has come to its end


@dataclass
class Line:
    """A connection on which a request came in, and the honest answer to it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    heard: Heard
    honest: Honest
    visit: Visit
    canary: str

    @property
    def streams(self) -> bool:
        return self.honest.kind == "text/event-stream"

    @property
    def body(self) -> bytes:
        return self.honest.body

    @property
    def events(self) -> list[bytes]:
        """Each server-sent event, with its blank line."""
        return re.findall(rb".*?\r?\n\r?\n", self.body, re.DOTALL)

    @property
    def end(self) -> int:
        """Which event says that the answer is whole."""
        return next(place for place, event in enumerate(self.events) if FINISHED.search(event))

    @property
    def some(self) -> bytes:
        """The answer as far as ` two`; of JSON half of it."""
        if not self.streams:
            return self.body[: len(self.body) // 2]
        return b"".join(self.events[: 1 + next(n for n, event in enumerate(self.events) if b'" two"' in event)])

    @property
    def rest(self) -> bytes:
        return self.body[len(self.some) :]

    @property
    def key(self) -> str:
        found = re.search(r"(?im)^(?:authorization: bearer|x-api-key:|x-goog-api-key:) *(\S+)", self.heard.head)
        assert found
        return found[1]

    def head(self, *more: str, status: str = "200 OK", kind: str | None = None) -> bytes:
        """The start of an answer that ends with its connection."""
        lines = (f"HTTP/1.1 {status}", f"Content-Type: {kind or self.honest.kind}", "Connection: close", *more)
        return "\r\n".join([*lines, "", ""]).encode()

    def whole(self, body: bytes | None = None, *more: str, status: str = "200 OK", kind: str | None = None) -> bytes:
        """An answer with its length."""
        raw = self.body if body is None else body
        return http_answer(raw, status, kind or self.honest.kind, "Connection: close", *more)

    def without(self, *places: int) -> bytes:
        """The stream but for some events."""
        return b"".join(event for place, event in enumerate(self.events) if place not in places)

    def lines(self, end: bytes) -> bytes:
        """The stream with other ends of line."""
        return re.sub(rb"\r?\n", end, self.body)


Step: TypeAlias = "bytes | Callable[[Line], bytes | list[bytes] | Awaitable[None]]"
Outcome: TypeAlias = tuple[int, str | None, str | None]  # status, type, code; an error in a 200 is an `error` event

WHOLE: Outcome = (200, None, None)
BROKEN: Outcome = (502, "provider_error", "connection_broken")
UNREADABLE: Outcome = (502, "provider_error", "unreadable_answer")
TRUNCATED: Outcome = (502, "provider_error", "stream_truncated")
CUT: Outcome = (200, "provider_error", "stream_truncated")
GARBLED: Outcome = (200, "provider_error", "unreadable_answer")
LATE: Outcome = (504, "timeout_error", None)
STALLED: Outcome = (200, "timeout_error", None)
REDIRECTED: Outcome = (502, "provider_error", "redirect")
SERVERS_KEY: Outcome = (502, "provider_error", "provider_authentication")
TOO_LARGE: Outcome = (502, "provider_error", "answer_too_large")
EVENT_TOO_LARGE: Outcome = (502, "provider_error", "event_too_large")
FAILED: Outcome = (502, "provider_error", None)
FAILING: Outcome = (200, "provider_error", None)
REFUSED: Outcome = (400, "invalid_request_error", None)
LIMITED: Outcome = (429, "rate_limit_error", None)


@dataclass(frozen=True)
class Case:
    """A fault: what the provider does, and what the caller gets."""

    steps: tuple[Step, ...]
    json: Outcome | None  # None: has no meaning here
    sse: Outcome | None
    own: bool = True  # the caller brings the key
    timeouts: tuple[str, float] | None = None  # the one that is to strike
    more: str = "\0"  # what the answer may go on with, without end
    says: Callable[[JSON], object] = lambda error: True
    direct: Outcome | None = None  # where a client that asks the providers itself is told something else

    def outcome(self, streaming: bool, mode: str) -> Outcome | None:
        return (mode == "direct" and self.direct) or (self.sse if streaming else self.json)


def case(*steps: Step, json: Outcome | None = None, sse: Outcome | None = None, **more: Any) -> Case:
    return Case(steps, json, sse, **more)


def both(outcome: Outcome, *steps: Step, **more: Any) -> Case:
    return Case(steps, outcome, outcome, **more)


async def hang(line: Line) -> None:
    """Say nothing more until the other side hangs up."""
    with contextlib.suppress(ConnectionError):
        while await line.reader.read(1 << 16):
            pass


async def heard_by_caller(line: Line) -> None:
    """Let what was said arrive, where it can arrive before the end."""
    if line.streams:
        await line.visit.begun.wait()


async def break_off(line: Line) -> None:
    reset(line.writer)


class Relay:
    """Between gateway and sandbox; `visits` by the name that the prompt holds."""

    def __init__(self, sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
        self.sandbox = sandbox
        self.http = http
        self.url = self.canary = ""
        self.visits: dict[str, Visit] = {}
        self.starting = asyncio.Semaphore(20)  # more at once would wait for each other while clocks run
        self.strayed = 0  # requests that followed a redirect
        self._answers: dict[tuple[str, bool], asyncio.Future[Honest]] = {}

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (heard := await hear(reader)) is None:
            return
        found = re.search(rb"visit: ([^.]*)\.", heard.body)
        assert found
        visit = self.visits[found[1].decode()]
        visit.asked += 1
        visit.heard.set()
        try:
            path = heard.head.split(" ", 2)[1]
            line = Line(reader, writer, heard, await self._honest(path, heard), visit, self.canary)
            for step in visit.case.steps:
                said = step(line) if callable(step) else step
                if isinstance(said, (bytes, list)):
                    for part in said if isinstance(said, list) else [said]:
                        writer.write(part)
                        await writer.drain()
                else:
                    await said
        finally:
            visit.over.set()

    async def stray(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.strayed += 1

    def _honest(self, path: str, heard: Heard) -> asyncio.Future[Honest]:
        """What the sandbox says, asked once: all requests of one kind want the same."""
        kind = (path, b'"stream":true' in heard.body)
        if kind not in self._answers:
            self._answers[kind] = asyncio.ensure_future(self._ask(path, heard))
        return self._answers[kind]

    async def _ask(self, path: str, heard: Heard) -> Honest:
        fields = (line.split(": ", 1) for line in heard.head.split("\r\n")[1:] if line)
        kept = {name: value for name, value in fields if name.lower() not in ("host", "content-length")}
        kept["Connection"] = "close"
        async with self.http.post(self.sandbox.url + path, data=heard.body, headers=kept) as answer:
            return Honest(answer.status, answer.content_type, await answer.read())


@pytest.fixture
async def relay(sandbox: Sandbox, http: aiohttp.ClientSession, listen: Listen) -> Relay:
    relay = Relay(sandbox, http)
    relay.url, relay.canary = await listen(relay.talk), await listen(relay.stray)
    return relay


@pytest.fixture
async def spoiled(environ: dict[str, str], relay: Relay, credentials: Path, listen: Listen) -> dict[str, str]:
    """Points to the relay instead of the sandbox, with keys that are easy to find again."""
    log_in(credentials, access_token=f"server-{SECRET}")
    refused = http_answer(b'{"error":"invalid_grant"}', "400 No", "application/json", "Connection: close")
    keys = {name: f"server-{SECRET}" for name in environ if name.endswith("_API_KEY")}
    urls = {name: url.replace(relay.sandbox.url, relay.url) for name, url in environ.items() if "_BASE_" in name}
    return {**environ, **keys, **urls, "GEMINI_OAUTH_TOKEN_URL": await listen(canned(refused, []))}


# == Asking ============================================================================================================


class Told(NamedTuple):
    """What the caller got."""

    status: int
    error: JSON | None
    text: str


Ask: TypeAlias = Callable[[Visit, JSON, dict[str, str]], Awaitable[Told]]


def told_by(answer: Answer, streaming: bool) -> Told:
    """An answer of the gateway, checked: ids agree, one terminal event, nothing that nobody should see."""
    for hidden in (SECRET, "Traceback", "<html", "\x1b"):
        assert hidden not in answer.raw + str(answer.headers)
    assert "X-Evil" not in answer.headers
    if answer.status != 200:
        refused = answer.error
        assert str(refused.get("retry_after", "")) == answer.headers.get("Retry-After", "")
        assert len(answer.raw) < 30_000
        return Told(answer.status, refused, "")
    if not streaming:
        assert answer.body["stop_reason"] == "end_turn"
        counts = [count for name, count in answer.body["usage"].items() if name.endswith("_tokens")]
        assert [isinstance(count, int) and count >= 0 for count in counts] == [True] * 5
        return Told(200, None, answer.text)
    events = [event for event in answer.events if event["type"] != "ping"]
    assert [event["type"] for event in events].count("message_start") == 1 == len([*filter(is_terminal, events)])
    assert is_terminal(events[-1])
    assert events[0]["type"] == "message_start"
    if error := events[-1].get("error"):
        assert events[-1]["request_id"] == error["request_id"] == answer.headers["X-Request-ID"]
    return Told(200, error or None, text_of(events))


def is_terminal(event: JSON) -> bool:
    return event["type"] in ("message_stop", "error")


def through(gateway: Served) -> Ask:
    async def ask(visit: Visit, body: JSON, keys: dict[str, str]) -> Told:
        headers = {"X-API-Key": KEY, "Connection": "close"} | {f"X-Provider-Key-{id}": key for id, key in keys.items()}
        async with gateway.http.post(f"{gateway.url}/v1/messages", json=body, headers=headers) as response:
            visit.begun.set()
            answer = Answer(response.status, response.headers, await response.text())
        return told_by(answer, bool(body.get("stream")))

    return ask


def straight(client: vai.AsyncClient) -> Ask:
    async def ask(visit: Visit, body: JSON, keys: dict[str, str]) -> Told:
        events: list[JSON] = []
        try:
            if not body.pop("stream", False):
                return Told(200, None, (await client.messages.create(**body, provider_keys=keys)).text)
            async with client.messages.stream(**body, provider_keys=keys) as stream:
                async for event in stream:
                    events.append(event.to_wire())
                    visit.begun.set()
            assert events[-1]["type"] == "message_stop"
            return Told(200, None, text_of(events))
        except vai.Error as raised:
            fault = raised
        assert SECRET not in f"{fault!r} {fault} {fault.to_wire()}"
        assert not [*filter(is_terminal, events)]
        return Told(200 if events else fault.status, fault.to_wire("r")["error"], text_of(events))

    return ask


@contextlib.asynccontextmanager
async def asking(
    mode: str, serve: Serve, environ: Mapping[str, str], timeouts: Mapping[str, float]
) -> AsyncIterator[Ask]:
    """A way to ask the relay: through a gateway, or straight."""
    if mode == "gateway":
        yield through(await serve(environ=environ, timeouts=dict(timeouts)))
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        client = vai.AsyncClient(max_retries=0)
    client._engine.transport = Transport(vai.Timeouts(**timeouts))  # type: ignore[attr-defined]
    async with client:
        yield straight(client)


async def visited(relay: Relay, ask: Ask, provider: str, name: str, case: Case, streaming: bool, mode: str) -> None:
    """Ask once, and check all that is to hold of it."""
    outcome = case.outcome(streaming, mode)
    assert outcome
    status, kind, code = outcome
    id = f"{name}, {provider}, {mode}, {'sse' if streaming else 'json'}"
    visit = relay.visits[id] = Visit(case)
    prompt = f"[say {SAID}] visit: {id}."
    keys = {provider: f"own-{SECRET}"} if case.own else {}
    try:
        async with asyncio.timeout(30):
            async with relay.starting:
                body = body_of(provider, prompt, **({"stream": True} if streaming else {}))
                task = asyncio.ensure_future(ask(visit, body, keys))
                task.add_done_callback(lambda _: visit.heard.set())
                await visit.heard.wait()
            told = await task
            await visit.over.wait()
        error = told.error or {}
        if case.timeouts and case.timeouts[0] == "total" and told.status == LATE[0]:
            status = LATE[0]  # the time was over before anything could come through
        assert (told.status, error.get("type")) == (status, kind), told
        assert code is None or error.get("code") == code, told
        assert kind is None or error["provider"] == provider
        assert kind is None or case.says(error), told
        text = told.text.replace(case.more, "")
        assert SAID.startswith(text) if kind else text == SAID
        assert visit.asked == 1
    except BaseException as fault:
        fault.add_note(id)
        raise


async def settled(before: set[asyncio.Task[Any]]) -> None:
    """Returns once nothing is left of what began since, here, in the gateway or in the relay."""
    async with asyncio.timeout(10):
        while asyncio.all_tasks() - before:  # noqa: ASYNC110  (nothing tells of the end of a task that nobody knows)
            await asyncio.sleep(0.001)


async def all_of(checks: Sequence[Awaitable[None]]) -> None:
    """Run them at once; every one that fails is shown."""
    failed = [fault for fault in await asyncio.gather(*checks, return_exceptions=True) if fault]
    if failed:
        raise BaseExceptionGroup(f"{len(failed)} of {len(checks)}", failed)


# == The faults ========================================================================================================


def error_of(message: object, **more: Any) -> bytes:
    return json.dumps({"error": {"message": message, "type": "t", **more}}).encode()


def refusal(
    status: str, body: bytes | Callable[[Line], bytes] = b"", *headers: str, kind: str = "application/json"
) -> Step:
    """An error with its status."""
    return lambda line: line.whole(body if isinstance(body, bytes) else body(line), *headers, status=status, kind=kind)


def nulled(line: Line) -> bytes:
    """The answer with null for everything that holds anything; in a stream, such an event among the others."""
    if not line.streams:
        return json.dumps(dict.fromkeys(json.loads(line.body))).encode()
    empty = json.dumps(dict.fromkeys(json.loads(line.events[2].partition(b"data: ")[2])))
    return b"".join([*line.events[:3], f"data: {empty}\n\n".encode(), *line.events[3:]])


def after_news(event: bytes) -> bytes:
    """An event, and before it one of a kind that nobody knows yet; the chat wire has no kinds: one that is empty."""
    if b'"object":"chat' in event:
        return re.sub(rb'"choices":.*', b'"choices":[]}\n\n', event.replace(b"\n", b"")) + event
    return b'event: news\ndata: {"type":"news","delta":{"text":"!"}}\n\n' + event


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


ERROR_EVENT = b"data: " + error_of("no") + b"\n\n"
LENGTH = "Content-Length: 99999"
COUNTS = re.compile(rb'("\w*(?:_tokens|TokenCount)"):\d+')
NAMES = re.compile(rb'("model(?:Version)?"):"[^"]*"')
CHUNKED = "Transfer-Encoding: chunked"
BOM = b"\xef\xbb\xbf"
HTML = b"<html><body><h1>Welcome to nginx!</h1></body></html>"
HEADER = "X-Padding: " + "x" * 8000


def elsewhere(status: str) -> Step:
    return lambda line: line.whole(b"", f"Location: {line.canary}/v1/messages", status=status)


def in_half_a_minute(line: Line) -> bytes:
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    return line.whole(error_of("no"), f"Retry-After: {date}", status="429 No")


def failed_head(line: Line) -> bytes:
    return line.head("Content-Length: 50000000", status="500 No") + b'{"error":{"message":"'


def half_a_chunk(line: Line) -> bytes:
    return line.head(CHUNKED) + chunk(line.body)[: len(line.some) + 3]


def without_done(line: Line) -> bytes:
    return line.body.replace(b"data: [DONE]\n\n", b"")


def without_retry_after(error: JSON) -> bool:
    return "retry_after" not in error


BEFORE = {  # nothing of an answer has come, or something that is none
    "close": both(BROKEN),
    "reset": both(BROKEN, break_off),
    "half a head": both(BROKEN, b"HTTP/1.1 200 OK\r\nContent-"),
    "garbage": both(BROKEN, b"garbage\r\n\r\n"),
    "garbage status": both(BROKEN, b"HTTP/1.1 abc OK\r\n\r\n"),
    "binary": both(BROKEN, bytes(range(256))),
    "another protocol": both(BROKEN, b"SSH-2.0-OpenSSH_9.6\r\n"),
    "huge header": both(BROKEN, b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 20) + b"\r\n\r\n"),
    "many headers": both(BROKEN, b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 10_000 + b"\r\n"),
    "endless head": both(BROKEN, b"HTTP/1.1 200 OK\r\n", lambda line: [HEADER.encode() + b"\r\n"] * 200),
    "NUL in a header": both(BROKEN, b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n"),
    "length and chunks": both(BROKEN, lambda line: line.whole(None, CHUNKED)),
    "bad length": both(BROKEN, lambda line: line.head("Content-Length: -1")),
    "early hints": both(WHOLE, b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", Line.whole),
    "continue": both(WHOLE, b"HTTP/1.1 100 Continue\r\n\r\n" * 3, Line.whole),
    "switching protocols": both(FAILED, b"HTTP/1.1 101 Go\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", hang),
    "no content": both(FAILED, b"HTTP/1.1 204 No Content\r\n\r\n"),
    "partial content": both(FAILED, refusal("206 Partial Content")),
    **{f"redirect {status}": both(REDIRECTED, elsewhere(f"{status} Go")) for status in (301, 302, 303, 307, 308)},
    "redirect nowhere": both(REDIRECTED, refusal("302 Go")),
    "not modified": both(REDIRECTED, b"HTTP/1.1 304 Not Modified\r\n\r\n"),
}  # fmt: skip

REFUSALS = {  # an error with a status
    **{
        f"{status}": both((ours, kind, None), refusal(f"{status} No", error_of("no")))
        for status, ours, kind in [
            (400, 400, "invalid_request_error"), (401, 401, "authentication_error"), (403, 403, "permission_error"),
            (404, 404, "not_found_error"), (408, 504, "timeout_error"), (413, 413, "request_too_large"),
            (422, 400, "invalid_request_error"), (500, 502, "provider_error"), (503, 503, "overloaded_error"),
            (504, 504, "timeout_error"), (529, 503, "overloaded_error"), (599, 502, "provider_error"),
            (999, 502, "provider_error"),
        ]
    },
    "402": both((403, "permission_error", "billing"), refusal("402 Pay", error_of("no"))),
    **{
        f"{status} of the server's key": both(
            SERVERS_KEY, refusal(f"{status} No", error_of("no")), own=False, direct=(status, kind, None)
        )
        for status, kind in [(401, "authentication_error"), (403, "permission_error")]
    },
    **{
        f"429 with {name}": both(LIMITED, refusal("429 No", error_of("no"), *more), says=says)
        for name, more, says in [
            ("seconds", ["Retry-After: 7"], lambda error: error["retry_after"] == 7),
            ("garbage", ["Retry-After: soon"], without_retry_after),
            ("control characters", ["Retry-After: \x01\x02"], without_retry_after),
            ("too much", ["Retry-After: 99999999999"], without_retry_after),
            ("less than nothing", ["Retry-After: -5"], without_retry_after),
            ("nothing", [], without_retry_after),
        ]
    },
    "429 with a date": both(
        LIMITED, in_half_a_minute, says=lambda error: 24 <= error["retry_after"] <= 31
    ),
    "html 502": both(FAILED, refusal("502 Bad Gateway", HTML, kind="text/html")),
    "error that is no JSON": both(FAILED, refusal("500 No", b"{")),
    "error that is empty": both(FAILED, refusal("500 No")),
    "error that is null": both(FAILED, refusal("500 No", b"null")),
    "error in a list": both((503, "overloaded_error", None), refusal("503 No", b'[{"error":{"message":7}}]')),
    "error that is a string": both(REFUSED, refusal("400 No", b'"no"')),
    "error that is deep": both(FAILED, refusal("500 No", b"[" * 50_000)),
    "error with a huge number": both(FAILED, refusal("500 No", b'{"error":' + b"9" * 5000 + b"}")),
    "error in gzip": both(
        REFUSED,
        refusal("400 No", gzip.compress(error_of("no")), "Content-Encoding: gzip"),
        says=lambda error: error["message"] == "no",
    ),
    "error in no gzip": both(FAILED, refusal("500 No", b"no", "Content-Encoding: gzip")),
    "error in Latin-1": both(REFUSED, refusal("400 No", "{'schlüssel'}".encode("latin-1"))),
    "error that breaks off": both(FAILED, failed_head),
    "error of 50 MB": both(FAILED, failed_head, lambda line: b"x" * 300_000, hang),
    "error with control characters": both(
        REFUSED,
        refusal("400 No", error_of("a\r\nb\0c\x1b[31md")),
        says=lambda error: error["message"] == "a b c [31md",
    ),
    "error that echoes the key": both(
        REFUSED,
        refusal("400 No", lambda line: error_of(f"no {line.key}!", debug=[{line.key: line.key}])),
        says=lambda error: error["message"] == "no [redacted]!",
    ),
    "error that echoes the server's key": both(
        REFUSED, refusal("400 No", lambda line: error_of(f"no {line.key}!")), own=False
    ),
}  # fmt: skip

BODIES = {  # a 200, and then
    "html": case(refusal("200 OK", HTML, kind="text/html"), json=UNREADABLE, sse=TRUNCATED),
    "no JSON": case(refusal("200 OK", b'{"choices":['), json=UNREADABLE, sse=TRUNCATED),
    "null": case(refusal("200 OK", b"null"), json=UNREADABLE, sse=TRUNCATED),
    "a list": case(refusal("200 OK", b"[1]"), json=UNREADABLE, sse=TRUNCATED),
    "an empty object": case(refusal("200 OK", b"{}"), json=UNREADABLE, sse=TRUNCATED),
    "an error": both(FAILED, refusal("200 OK", error_of("no"))),
    "empty": case(refusal("200 OK"), json=UNREADABLE, sse=TRUNCATED),
    "deep": case(refusal("200 OK", b'{"choices":' * 20_000), json=UNREADABLE, sse=TRUNCATED),
    "NaN": case(refusal("200 OK", b'{"choices":NaN}'), json=UNREADABLE, sse=TRUNCATED),
    "huge number": case(refusal("200 OK", b'{"choices":' + b"9" * 5000 + b"}"), json=UNREADABLE, sse=TRUNCATED),
    "bad UTF-8": case(refusal("200 OK", b"\xff\xfe{}"), json=UNREADABLE, sse=TRUNCATED),
    "nulls": case(lambda line: line.whole(nulled(line)), json=UNREADABLE, sse=WHOLE),
    "no content type": both(WHOLE, lambda line: line.whole().replace(b"Content-Type", b"X-Type")),
    "wrong content type": both(WHOLE, lambda line: line.whole(kind="text/html")),
    "BOM": both(WHOLE, lambda line: line.whole(BOM + line.body)),
    "numbers that are none": both(WHOLE, lambda line: line.whole(re.sub(COUNTS, rb'\1:"x"', line.body))),
    "numbers below zero": both(WHOLE, lambda line: line.whole(re.sub(COUNTS, rb"\1:-7", line.body))),
    "numbers beyond all": both(WHOLE, lambda line: line.whole(re.sub(COUNTS, rb"\1:1e30", line.body))),
    "a name with line breaks": both(
        WHOLE, lambda line: line.whole(re.sub(NAMES, rb'\1:"m\\r\\nX-Evil: 1"', line.body))
    ),
    "half a surrogate pair": both(
        WHOLE, lambda line: line.whole(line.body.replace(b"two", rb"two\ud800")), more="\ud800"
    ),
    "connection close": both(WHOLE, lambda line: line.head() + line.body),
    "one chunk": both(WHOLE, lambda line: line.head(CHUNKED) + chunk(line.body) + chunk(b"")),
    "byte by byte": both(WHOLE, Line.head, lambda line: [line.body[i : i + 1] for i in range(len(line.body))]),
    "gzip": both(WHOLE, lambda line: line.whole(gzip.compress(line.body), "Content-Encoding: gzip")),
    "deflate": both(WHOLE, lambda line: line.whole(zlib.compress(line.body), "Content-Encoding: deflate")),
    "no gzip": case(lambda line: line.whole(None, "Content-Encoding: gzip"), json=BROKEN, sse=TRUNCATED),
    "half of a gzip": case(
        lambda line: line.whole(gzip.compress(line.body)[:200], "Content-Encoding: gzip"),
        json=UNREADABLE, sse=TRUNCATED,
    ),
    "unknown coding": both(UNREADABLE, lambda line: line.whole(None, "Content-Encoding: rot13")),
    "brotli": case(lambda line: line.whole(None, "Content-Encoding: br"), json=BROKEN, sse=BROKEN),
    "cut, with a length": case(lambda line: line.head(LENGTH) + line.some, json=BROKEN, sse=CUT),
    "cut, in chunks": case(lambda line: line.head(CHUNKED) + chunk(line.some), json=BROKEN, sse=CUT),
    "cut, in a chunk": case(half_a_chunk, json=BROKEN, sse=CUT),
    "cut, at the connection's end": case(lambda line: line.head() + line.some, json=UNREADABLE, sse=CUT),
    "cut by a reset": case(
        lambda line: line.head(LENGTH) + line.some, heard_by_caller, break_off, json=BROKEN, sse=CUT
    ),
    "a chunk without a size": case(
        lambda line: line.head(CHUNKED) + chunk(line.some), heard_by_caller, b"zz\r\n", hang, json=BROKEN, sse=CUT
    ),
    "a chunk without a size, then closed": case(
        lambda line: line.head(CHUNKED) + chunk(line.some), heard_by_caller, b"zz\r\n", json=BROKEN, sse=CUT
    ),
}  # fmt: skip

STREAMS = {
    "LF": case(lambda line: line.whole(line.lines(b"\n")), sse=WHOLE),
    "CRLF": case(lambda line: line.whole(line.lines(b"\r\n")), sse=WHOLE),
    "CR": case(lambda line: line.whole(line.lines(b"\r")), sse=WHOLE),
    "comments": case(lambda line: line.whole(b": hi\n\n" + b"\n: hi\n\n".join(line.events)), sse=WHOLE),
    "other fields": case(lambda line: line.whole(b"id: 1\nretry: 5\n" + line.body), sse=WHOLE),
    "no space": case(lambda line: line.whole(line.body.replace(b"data: {", b"data:{")), sse=WHOLE),
    "no last blank line": case(lambda line: line.whole(line.body.rstrip()), sse=WHOLE),
    "unknown fields": case(lambda line: line.whole(line.body.replace(b"data: {", b'data: {"new":[1],')), sse=WHOLE),
    "unknown events": case(lambda line: line.whole(b"".join(map(after_news, line.events))), sse=WHOLE),
    "nothing but comments": case(refusal("200 OK", b": hi\n\n" * 9), sse=TRUNCATED),
    "no terminal event": case(lambda line: line.whole(line.without(*range(line.end, 99))), sse=CUT),
    "no [DONE]": case(lambda line: line.whole(without_done(line)), sse=WHOLE),
    "terminal event twice": case(lambda line: line.whole(line.body + line.events[-1] * 2), sse=WHOLE),
    "error after the end": case(lambda line: line.whole(line.body + ERROR_EVENT), sse=WHOLE),
    "garbage after the end": case(lambda line: line.whole(line.body + b"data: <html>\n\n\xff\xff"), sse=WHOLE),
    "end, then comments": case(Line.head, lambda line: line.body, lambda line: [b": hi\n\n"] * 50_000, sse=WHOLE),
    "end, then a reset": case(Line.head, lambda line: line.body, heard_by_caller, break_off, sse=WHOLE),
    "html in the middle": case(lambda line: line.whole(line.some + HTML + b"\n\n" + line.rest), sse=WHOLE),
    "html for data": case(lambda line: line.whole(line.some + b"data: <html>\n\n" + line.rest), sse=GARBLED),
    "null for data": case(lambda line: line.whole(line.some + b"data: null\n\n" + line.rest), sse=GARBLED),
    "half an event": case(lambda line: line.whole(line.some + b'data: {"a":\n\n' + line.rest), sse=GARBLED),
    "an error at once": case(lambda line: line.whole(ERROR_EVENT), sse=FAILED),
    "an error": case(lambda line: line.whole(line.some + ERROR_EVENT), sse=FAILING),
    "an error, then silence": case(
        lambda line: line.head() + line.some + ERROR_EVENT, hang, sse=FAILING
    ),
}  # fmt: skip

ALL = {
    **BEFORE,
    **REFUSALS,
    **{f"200, {k}": v for k, v in BODIES.items()},
    **{f"stream: {k}": v for k, v in STREAMS.items()},
}


def repeated(event: bytes, pause: float = 0.05) -> Step:
    """This, again and again, until the other side hangs up."""

    async def go_on(line: Line) -> None:
        with contextlib.suppress(TimeoutError, ConnectionError):
            while not line.reader.at_eof():
                line.writer.write(event)
                await line.writer.drain()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(line.reader.read(1), pause)

    return go_on


async def drip(line: Line) -> None:
    """The answer, a byte at a time."""
    for place in range(len(line.some)):
        line.writer.write(line.some[place : place + 1])
        await line.writer.drain()
    await repeated(b" ")(line)  # type: ignore[operator, misc]


async def babble(line: Line) -> None:
    """The last delta for ever."""
    place = next(place for place, event in enumerate(line.events) if b'" two"' in event)
    line.writer.write(b"".join(line.events[:place]))
    await repeated(line.events[place])(line)  # type: ignore[operator, misc]


SILENCES = {
    "nothing": both(LATE, hang, timeouts=("first_byte", 1)),
    "no connection in time": both(LATE, hang, timeouts=("total", 1)),
    "half a head": both(LATE, b"HTTP/1.1 200 OK\r\nContent-", hang, timeouts=("first_byte", 1)),
    "early hints": both(LATE, repeated(b"HTTP/1.1 103 Early Hints\r\n\r\n"), timeouts=("first_byte", 1)),
    "a head": both(LATE, Line.head, hang, timeouts=("idle", 0.5)),
    "half an answer": case(lambda line: line.head() + line.some, hang, json=LATE, sse=STALLED, timeouts=("idle", 0.5)),
    "half a chunk": case(half_a_chunk, hang, json=LATE, sse=STALLED, timeouts=("idle", 0.5)),
    "half an error": both(FAILED, failed_head, hang, timeouts=("idle", 0.5)),
    "an error, dripping": both(FAILED, failed_head, repeated(b" "), timeouts=("idle", 0.5)),
    "comments before": case(Line.head, repeated(b": hi\n\n"), sse=LATE, timeouts=("total", 2)),
    "comments": case(lambda line: line.head() + line.some, repeated(b": hi\n\n"), sse=STALLED, timeouts=("total", 2)),
    "drip": case(Line.head, drip, json=LATE, sse=STALLED, timeouts=("total", 2)),
    "babble": case(Line.head, babble, sse=STALLED, timeouts=("total", 2), more=" two"),
    "the end, then silence": case(Line.head, lambda line: line.body, hang, sse=WHOLE),
    "the end, then comments": case(Line.head, lambda line: line.body, repeated(b": hi\n\n"), sse=WHOLE),
    "all but [DONE], then silence": case(Line.head, lambda line: without_done(line), hang, sse=WHOLE),
    "all but [DONE], then comments": case(Line.head, lambda line: without_done(line), repeated(b": hi\n\n"), sse=WHOLE),
}  # fmt: skip


MB = 1 << 20


def stretched(line: Line) -> bytes:
    """The stream, ` two` being very long."""
    return line.whole(line.body.replace(b'" two"', b'" two' + b"!" * 20 * MB + b'"', 1))


def endlessly(start: bytes) -> Step:
    """Bytes without an end of line."""

    async def go_on(line: Line) -> None:
        line.writer.write(line.head() + start)
        with contextlib.suppress(ConnectionError):
            while True:
                line.writer.write(b"x" * MB)
                await line.writer.drain()

    return go_on


def bomb(line: Line) -> bytes:
    """A few KB in gzip that are a lot more without."""
    raw = zlib.compressobj(1, wbits=31)
    packed = raw.compress(b'{"a":"') + raw.compress(bytes(80 * MB)) + raw.flush()
    return line.whole(packed, "Content-Encoding: gzip")


FLOODS = {
    "a line of 20 MB": case(stretched, sse=WHOLE, more="!"),
    "a body without end": case(endlessly(b'{"a":"'), json=TOO_LARGE, sse=EVENT_TOO_LARGE),
    "a bomb": case(bomb, json=TOO_LARGE, sse=EVENT_TOO_LARGE),
    "comments without end": case(endlessly(b": "), sse=EVENT_TOO_LARGE),
}


@pytest.mark.parametrize("mode", ["gateway", "direct"])
@pytest.mark.parametrize("streaming", [False, True], ids=["json", "sse"])
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_faults(
    serve: Serve, relay: Relay, spoiled: JSON, logged: Logged, provider: str, streaming: bool, mode: str
) -> None:
    """One answer, of the right type; the provider was asked once and let go; nobody's key anywhere."""
    async with asking(mode, serve, spoiled, {}) as ask:
        before = asyncio.all_tasks()
        await all_of(
            [
                visited(relay, ask, provider, name, case, streaming, mode)
                for name, case in ALL.items()
                if case.outcome(streaming, mode)
            ]
        )
        await settled(before)
    assert relay.strayed == 0
    for hidden in (SECRET, "visit:", "ünï"):
        assert hidden not in "".join([*logged.json, *logged.text])


@pytest.mark.parametrize("mode", ["gateway", "direct"])
async def test_silences(serve: Serve, relay: Relay, spoiled: JSON, mode: str) -> None:
    """Whoever falls silent, or never comes to an end, is given up when the time is over, and hung up on."""
    async with contextlib.AsyncExitStack() as stack:
        asks = {
            limit: await stack.enter_async_context(asking(mode, serve, spoiled, dict([limit] if limit else [])))
            for limit in {case.timeouts for case in SILENCES.values()}
        }
        before = asyncio.all_tasks()
        await all_of(
            [
                visited(relay, asks[case.timeouts], provider, name, case, streaming, mode)
                for name, case in SILENCES.items()
                for provider in PROVIDERS
                for streaming in (False, True)
                if case.outcome(streaming, mode)
            ]
        )
        await settled(before)


@pytest.mark.parametrize("name", FLOODS)
async def test_floods(serve: Serve, relay: Relay, spoiled: JSON, name: str) -> None:
    """What is too large for any answer is not read to its end; a long line is."""
    async with asking("gateway", serve, spoiled, {}) as ask:
        for provider in ("anthropic", "openai"):
            for streaming in (False, True):
                if FLOODS[name].outcome(streaming, "gateway"):
                    await visited(relay, ask, provider, name, FLOODS[name], streaming, "gateway")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
async def test_floods_do_not_fill_the_memory(launch: Launch, relay: Relay, spoiled: JSON) -> None:
    """Nor does the gateway grow by more than what it is ready to read."""
    process = await launch(**spoiled)
    ask, status = through(process.gateway), Path(f"/proc/{process.process.pid}/status")

    async def peak(name: str, case: Case) -> int:
        """In MB, after this in all ways."""
        for streaming in (False, True):
            if case.outcome(streaming, "gateway"):
                await visited(relay, ask, "openai", name, case, streaming, "gateway")
        return int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) // 1000  # noqa: ASYNC240

    before = await peak("LF", STREAMS["LF"])
    assert await peak("error", REFUSALS["error of 50 MB"]) - before < 20
    for name in ("a body without end", "a bomb", "comments without end"):
        assert await peak(name, FLOODS[name]) - before < 130, name


@pytest.mark.parametrize("mode", ["gateway", "direct"])
async def test_nobody_there(serve: Serve, environ: JSON, logged: Logged, mode: str) -> None:
    """Where nobody listens it is a 502 at once, and one line in the log."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        nowhere = {name: url if "_BASE_" in name else value for name, value in environ.items()}
        async with asking(mode, serve, nowhere, {}) as ask, asyncio.timeout(5):
            for provider in PROVIDERS:
                for more in ({}, {"stream": True}):
                    told = await ask(Visit(BEFORE["close"]), body_of(provider, **more), {})
                    assert (told.status, (told.error or {})["code"]) == (502, "connection_failed")
    assert [line["code"] for line in logged.requests] == ["connection_failed"] * (14 if mode == "gateway" else 0)


@pytest.mark.parametrize("mode", ["gateway", "direct"])
async def test_no_way_there(serve: Serve, environ: JSON, mode: str) -> None:
    """Where nothing answers a connection, it is a 504 when the time for that is over."""
    with socket.socket() as full, contextlib.ExitStack() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        nowhere = {name: url if "_BASE_" in name else value for name, value in environ.items()}
        async with asking(mode, serve, nowhere, {"connect": 0.2}) as ask, asyncio.timeout(30):
            told = await ask(Visit(BEFORE["close"]), body_of("openai"), {})
    assert (told.status, (told.error or {})["type"]) == (504, "timeout_error")


@pytest.mark.parametrize("way", ["plain HTTP", "closes"])
async def test_no_tls_there(serve: Serve, listen: Listen, way: str) -> None:
    """Where TLS fails, nothing is sent without it."""
    heard: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(1 << 16))
        if way == "plain HTTP":
            writer.write(http_answer(b"", "400 Bad Request", "text/plain"))

    url = (await listen(talk)).replace("http:", "https:")
    gateway = await serve(providers={"openai": {"base_url": url}})
    answer = await gateway.ask("openai")
    assert (answer.status, answer.error["type"]) == (502, "provider_error")
    assert way == "closes" or answer.error["code"] == "tls"
    assert 1 <= len(heard) <= 2
    assert {hello[:1] for hello in heard} == {b"\x16"}


@pytest.mark.parametrize("way", ["closes", "waits", "reads on"])
async def test_refused_while_sending(serve: Serve, listen: Listen, way: str) -> None:
    """A provider that refuses a request before it has read it all is understood, whatever it does then."""
    refused = http_answer(error_of("too much"), "413 Too Large", "application/json", "Connection: close")

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(refused)
        await writer.drain()
        if way != "closes":
            while way == "reads on" and await reader.read(MB):
                pass
            await asyncio.sleep(30)

    gateway = await serve(providers={"openai": {"base_url": await listen(talk)}})
    for size in (10, 3 * MB):
        raw = io.BytesIO(json.dumps(body_of("openai", "x" * size)).encode())
        answer = await gateway.send("POST", "/v1/messages", data=raw, headers={"Content-Type": "application/json"})
        assert (answer.status, answer.error["message"]) == (413, "too much"), size


# == Callers who leave =================================================================================================

LEFT = {
    "before a head": case(hang),
    "before an answer": case(Line.head, hang),
    "in the middle": case(lambda line: line.head() + line.some, hang),
    "in an endless answer": case(Line.head, babble),
    "in an error": case(failed_head, hang),
    "in an endless error": case(failed_head, repeated(b" ")),
}


@pytest.mark.parametrize("mode", ["gateway", "direct"])
async def test_callers_who_leave(serve: Serve, relay: Relay, spoiled: JSON, mode: str) -> None:
    """Wherever the caller leaves, the provider is hung up on within two seconds, and nothing is left."""

    async def leave(ask: Ask, provider: str, name: str, streaming: bool) -> None:
        visit = relay.visits[f"{name} {provider} {streaming}"] = Visit(LEFT[name])
        body = body_of(
            provider, f"[say {SAID}] visit: {name} {provider} {streaming}.", **({"stream": True} if streaming else {})
        )
        task = asyncio.ensure_future(ask(visit, body, {}))
        async with asyncio.timeout(5):
            await (visit.begun if streaming and name.startswith("in ") and "error" not in name else visit.heard).wait()
            task.cancel()
            begun = time.monotonic()
            await visit.over.wait()
        assert time.monotonic() - begun < 2
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async with asking(mode, serve, spoiled, {}) as ask:
        before = asyncio.all_tasks()
        await all_of([leave(ask, *row) for row in itertools.product(PROVIDERS, LEFT, (False, True))])
        await settled(before)


# == Callers apart =====================================================================================================

ENDINGS = ("", "", "", "[error 500]", "[error 429]", "[error_in_stream]", "[break_off]", "[reset]", "[hang]")


async def test_tenants_apart(serve: Serve, sandbox: Sandbox) -> None:
    """With 280 callers at once, each with keys of its own, and a third of them leaving: no key pays for another's call.

    Every answer is the caller's own, errors too.
    """
    dice = random.Random(4)
    names = [f"tenant-{number:03}" for number in range(280)]
    gateway = await serve(auth={"keys": [{"key": f"vai_sk_{name}", "name": name} for name in names]})

    async def call(number: int, name: str) -> None:
        provider, streaming, ending = PROVIDERS[number % 7], dice.random() < 0.5, dice.choice(ENDINGS)
        byok: JSON = {"headers": {f"X-Provider-Key-{provider}": f"sk-{name}"}}
        body = body_of(provider, f"[wait 0.05] [say For {name} alone.] {ending}", stream=streaming)
        if dice.random() < 0.4:
            byok, body["provider_keys"] = {}, {provider: f"sk-{name}"}
        patience = dice.uniform(0, 0.3) if ending == "[hang]" or dice.random() < 0.3 else 10
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                answer = await gateway.post(body, key=f"vai_sk_{name}", **byok)
                assert set(re.findall(r"tenant-\d+", answer.raw)) <= {name}
                if not ending:
                    assert (text_of(answer.events) if streaming else answer.text) == f"For {name} alone."

    for _ in range(2):
        await all_of([call(number, name) for number, name in enumerate(names)])
    async with asyncio.timeout(5):
        await gateway.gateway.idle.wait()
    assert sandbox.seen > 400
    for request in sandbox.requests:
        assert set(re.findall(r"tenant-\d+", json.dumps([request.headers, request.body]))) == {request.key[3:]}


# == The end ===========================================================================================================


async def test_shutdown_under_load(launch: Launch, http: aiohttp.ClientSession) -> None:
    """A signal under load: whoever was let in is answered, to the end or with an error that says why."""
    process = await launch(VAI_TIMEOUT_DRAIN="1")
    url, headers = f"{process.gateway.url}/v1/messages", {"X-API-Key": KEY}
    seen: collections.Counter[str] = collections.Counter()
    draining = asyncio.Event()

    async def caller(number: int) -> None:
        text = f"[say {SAID}] {('', '[wait 0.1]', '[slow 0.05]', '[hang]')[number % 4]}"
        body = body_of(PROVIDERS[number % 7], text, stream=number % 3 > 0)
        own = {"Connection": "close"} if number % 2 else {}
        with contextlib.suppress(aiohttp.ClientConnectorError):  # nobody listens any more
            while True:
                async with http.post(url, json=body, headers=headers | own) as response:
                    answer = Answer(response.status, response.headers, await response.text())
                told = told_by(answer, bool(body["stream"]))
                if told.error:
                    assert (told.error["type"], told.error["code"]) == ("overloaded_error", "draining")
                    assert (told.status == 200) or (told.status, told.error["retry_after"]) == (503, 1)
                    draining.set()
                seen["refused" if told.status == 503 else "told" if told.error else "whole"] += 1

    callers = [asyncio.ensure_future(caller(number)) for number in range(60)]
    while seen["whole"] < 200:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    process.signal(signal.SIGTERM)
    assert await process.ended(10) == 0
    await all_of(callers)
    assert min(seen[kind] for kind in ("whole", "refused", "told")) > 0
