"""What the gateway costs, beside a forwarder that only copies bytes and the least that translates.

    python benchmarks/gateway.py [--quick] [--json FILE] [--litellm venv/bin/litellm]

One run, on loopback, measures by turns: the real gateway (`server.py`, no auth, its access log to /dev/null) on its
routes anthropic→anthropic and anthropic→openai; a bare aiohttp forwarder that posts each body on and copies the answer
back, on the same two upstreams; and a bare aiohttp translator of text, anthropic→openai. LiteLLM too, if the command is
given (`pip install 'litellm[proxy]'` in an environment of its own). The upstream is canned: answers serialised
beforehand, sent by a raw protocol. The load comes from raw protocols too, closed loop: each connection sends again once
it has its answer.

    non-streaming            one answer of about 1.3 kB
    streaming, at once       200 text deltas in one write, as fast as possible: what a busy gateway can do
    streaming, one by one    one event per write, paced so that each is read by itself: what live tokens cost

How to read the tables: `CPU µs` is the processor time of the process under test (user and system, of all its threads)
per request or per text delta, everything around it included; of all columns it is the steadiest, and `× forwarder`,
`× translator` are its ratios to theirs on the same upstream in the same run. `busy` is how much of its core the process
used: near 100 % the rate is the most it can do, and the latency is that of a full queue; one by one, the rate is the
upstream's. `first` is the time to the first event. The process under test has one core, everything else shares the
other one. Targets take turns, and of each one's rounds (3; 2 if quick) the one with the least CPU is shown: what else
runs on the machine can only add to it.

Nothing here passes or fails by a time. The exit code is 1 only if something could not run or answered wrongly.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

DELTAS = 200
DRIPS_PER_TICK = 4  # events per millisecond over all connections; far below what one core can do
WORDS = (" the", " gateway", " copies", " every", " tok", "en", ",", " and", " café", " stays", ' "quoted"', ".\n\n")
PIECES = [WORDS[i % len(WORDS)] for i in range(DELTAS)]

Mode = Literal["whole", "burst", "drip"]
TITLES: dict[Mode, str] = {
    "whole": "Non-streaming",
    "burst": "Streaming, all events at once",
    "drip": "Streaming, one event per write",
}
MODELS = {"anthropic": "claude-sonnet-5-5", "openai": "gpt-5.2"}
PATHS = {"anthropic": "/v1/messages", "openai": "/v1/chat/completions"}


class BenchmarkError(Exception):
    """Something did not start, or answered wrongly."""


# == What the upstream says ============================================================================================


def packed(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def anthropic_answer() -> bytes:
    usage = {"input_tokens": 120, "output_tokens": 210, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0}
    return packed({"id": "msg_01Benchmark", "type": "message", "role": "assistant", "model": MODELS["anthropic"],
                   "content": [{"type": "text", "text": "".join(PIECES)}], "stop_reason": "end_turn",
                   "stop_sequence": None, "usage": usage})  # fmt: skip


def anthropic_events() -> list[bytes]:
    message: dict[str, Any] = {**json.loads(anthropic_answer()), "content": [], "stop_reason": None}
    block = {"type": "text", "text": ""}
    deltas = [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": t}} for t in PIECES]
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": block},
        *deltas,
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 210}},
        {"type": "message_stop"},
    ]
    return [b"event: %b\ndata: %b\n\n" % (event["type"].encode(), packed(event)) for event in events]


OPENAI_USAGE = {
    "prompt_tokens": 120, "completion_tokens": 210, "total_tokens": 330,
    "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 0},
}  # fmt: skip


def openai_answer() -> bytes:
    message: dict[str, Any] = {"role": "assistant", "content": "".join(PIECES), "refusal": None, "annotations": []}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return packed({"id": "chatcmpl-Benchmark", "object": "chat.completion", "created": 1, "model": MODELS["openai"],
                   "choices": [choice], "usage": OPENAI_USAGE, "service_tier": "default"})  # fmt: skip


def openai_events() -> list[bytes]:
    def chunk(delta: dict[str, Any] | None, finish: str | None = None, usage: Any = None) -> bytes:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
        body = {"id": "chatcmpl-Benchmark", "object": "chat.completion.chunk", "created": 1, "model": MODELS["openai"],
                "service_tier": "default", "choices": choices, "usage": usage, "obfuscation": "aB3dE5"}  # fmt: skip
        return b"data: %b\n\n" % packed(body)

    first = chunk({"role": "assistant", "content": "", "refusal": None})
    last = [chunk({}, "stop"), chunk(None, usage=OPENAI_USAGE), b"data: [DONE]\n\n"]
    return [first, *(chunk({"content": piece}) for piece in PIECES), *last]


def in_chunks(events: Sequence[bytes]) -> list[bytes]:
    """One HTTP chunk for each event, as the providers send them."""
    chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in events]
    return [*chunks[:-1], chunks[-1] + b"0\r\n\r\n"]


def question(upstream: str, mode: Mode, model: str) -> bytes:
    """A short conversation. The word `drip` in it asks the upstream to send one event at a time."""
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": f"Which pace is this? {mode}. " + "Say at length what a gateway does. " * 8},
        {"role": "assistant", "content": "It takes a request in one format and passes it on in another. " * 6},
        {"role": "user", "content": "Go on."},
    ]
    system = "You are a careful assistant who answers in plain words. " * 4
    if upstream == "openai":
        turns.insert(0, {"role": "system", "content": system})
        return packed({"model": model, "messages": turns, "max_completion_tokens": 1024, "stream": mode != "whole"})
    body = {"model": model, "system": system, "messages": turns, "max_tokens": 1024}
    return packed(body | ({"stream": True} if mode != "whole" else {}))


# == The canned upstream ===============================================================================================

SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


class Dripper:
    """Sends single events, by turns over all streams that are under way."""

    def __init__(self) -> None:
        self._streams: deque[tuple[asyncio.Transport, Iterator[bytes]]] = deque()
        self._ticking = False

    def add(self, transport: asyncio.Transport, chunks: Sequence[bytes]) -> None:
        self._streams.append((transport, iter(chunks)))
        if not self._ticking:
            self._ticking = True
            self._tick()

    def _tick(self) -> None:
        for _ in range(min(DRIPS_PER_TICK, len(self._streams))):
            transport, chunks = self._streams.popleft()
            chunk = next(chunks, None)
            if chunk is not None and not transport.is_closing():
                transport.write(chunk)
                self._streams.append((transport, chunks))
        self._ticking = bool(self._streams)
        if self._ticking:
            asyncio.get_running_loop().call_later(0.001, self._tick)


class Upstream(asyncio.Protocol):
    """Anthropic and OpenAI at once, told apart by the path; it reads no more of a request than it must."""

    def __init__(self, canned: dict[bytes, tuple[bytes, list[bytes]]], dripper: Dripper) -> None:
        self._canned = canned
        self._dripper = dripper
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if not found or (length and len(body) < int(length[1])):
            return
        self._buffer = b""
        answer, chunks = self._canned[head.split(b" ", 2)[1]]
        if b'"stream":true' not in body:
            self._transport.write(answer)
        elif b"drip" in body:
            self._transport.write(SSE_HEAD + b"".join(chunks[:2]))
            self._dripper.add(self._transport, chunks[2:])
        else:
            self._transport.write(SSE_HEAD + b"".join(chunks))


async def serve_upstream(_: str) -> None:
    def whole(body: bytes) -> bytes:
        return JSON_HEAD % len(body) + body

    canned = {
        PATHS["anthropic"].encode(): (whole(anthropic_answer()), in_chunks(anthropic_events())),
        PATHS["openai"].encode(): (whole(openai_answer()), in_chunks(openai_events())),
    }
    dripper = Dripper()
    server = await asyncio.get_running_loop().create_server(lambda: Upstream(canned, dripper), "127.0.0.1", 0)
    say(f"listens on http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await server.serve_forever()


# == The forwarder =====================================================================================================


async def serve_forwarder(upstream: str) -> None:
    """The floor: aiohttp on both sides and nothing in between."""
    import aiohttp
    from aiohttp import web

    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
        auto_decompress=False,
    )

    async def forward(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {"Content-Type": request.headers["Content-Type"], "x-api-key": "sk-benchmark-not-a-key"}
        async with session.post(upstream + request.path, data=body, headers=headers) as answer:
            kind = answer.headers["Content-Type"]
            if kind != "text/event-stream":
                return web.Response(body=await answer.read(), status=answer.status, headers={"Content-Type": kind})
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": kind})
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    app = web.Application()
    app.router.add_post("/{path:.*}", forward)
    await serve_app(app)


async def serve_app(app: Any) -> None:
    from aiohttp import web

    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    say(f"listens on http://127.0.0.1:{runner.addresses[0][1]}")
    await asyncio.Event().wait()


# == The translator ====================================================================================================
# The least that translates: text only, Anthropic's messages in, OpenAI's chat out. It checks nothing, promises nothing,
# has neither errors nor timeouts, logs or tools: what a gateway costs beyond it is the price of all that.

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


def chat_request(asked: dict[str, Any]) -> bytes:
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in asked["messages"]]
    if "system" in asked:
        turns.insert(0, {"role": "system", "content": asked["system"]})
    body = {"model": asked["model"], "messages": turns, "max_completion_tokens": asked["max_tokens"]}
    if asked.get("stream"):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return packed(body)


def message_answer(answer: dict[str, Any]) -> bytes:
    choice, used = answer["choices"][0], answer["usage"]
    return packed({"id": answer["id"], "type": "message", "role": "assistant", "model": answer["model"],
                   "content": [{"type": "text", "text": choice["message"]["content"]}],
                   "stop_reason": STOP_REASONS[choice["finish_reason"]], "stop_sequence": None,
                   "usage": {"input_tokens": used["prompt_tokens"], "output_tokens": used["completion_tokens"]},
                   })  # fmt: skip


def message_event(body: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (body["type"].encode(), packed(body))


class ChatStream:
    """Chat completion chunks in, as they are read; Anthropic's events out."""

    def __init__(self) -> None:
        self._rest = b""
        self._begun = False
        self._stop = ""

    def feed(self, data: bytes) -> bytes:
        *lines, self._rest = (self._rest + data).split(b"\n")
        return b"".join([message_event(body) for line in lines if line[:7] == b"data: {" for body in self._read(line)])

    def _read(self, line: bytes) -> list[dict[str, Any]]:
        chunk = json.loads(line[6:])
        out: list[dict[str, Any]] = []
        if not self._begun:
            self._begun = True
            message = {"id": chunk["id"], "type": "message", "role": "assistant", "model": chunk["model"],
                       "content": [], "stop_reason": None, "stop_sequence": None,
                       "usage": {"input_tokens": 0, "output_tokens": 0}}  # fmt: skip
            block = {"type": "text", "text": ""}
            out = [{"type": "message_start", "message": message},
                   {"type": "content_block_start", "index": 0, "content_block": block}]  # fmt: skip
        for choice in chunk["choices"]:
            if text := choice["delta"].get("content"):
                delta = {"type": "text_delta", "text": text}
                out.append({"type": "content_block_delta", "index": 0, "delta": delta})
            if choice["finish_reason"]:
                self._stop = STOP_REASONS[choice["finish_reason"]]
                out.append({"type": "content_block_stop", "index": 0})
        if used := chunk["usage"]:
            tokens = {"input_tokens": used["prompt_tokens"], "output_tokens": used["completion_tokens"]}
            delta = {"stop_reason": self._stop, "stop_sequence": None}
            out += [{"type": "message_delta", "delta": delta, "usage": tokens}, {"type": "message_stop"}]
        return out


async def serve_translator(upstream: str) -> None:
    import aiohttp
    from aiohttp import web

    url = upstream + PATHS["openai"]
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-benchmark-not-a-key"}
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
    )

    async def translate(request: web.Request) -> web.StreamResponse:
        asked = json.loads(await request.read())
        async with session.post(url, data=chat_request(asked), headers=headers) as answer:
            if not asked.get("stream"):
                body = message_answer(json.loads(await answer.read()))
                return web.Response(body=body, content_type="application/json")
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            stream = ChatStream()
            async for data in answer.content.iter_any():
                if events := stream.feed(data):
                    await response.write(events)
            await response.write_eof()
            return response

    app = web.Application()
    app.router.add_post("/v1/messages", translate)
    await serve_app(app)


# == LiteLLM ===========================================================================================================


def become_litellm(command: str, upstream: str) -> NoReturn:
    """Turn this process into LiteLLM's proxy, with one worker, no key and no log."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    model = {"model": f"openai/{MODELS['openai']}", "api_base": f"{upstream}/v1", "api_key": "sk-benchmark-not-a-key"}
    config = {
        "model_list": [{"model_name": MODELS["openai"], "litellm_params": model}],
        "litellm_settings": {"telemetry": False, "use_chat_completions_url_for_anthropic_messages": True},
    }
    Path("litellm.json").write_bytes(packed(config))
    say(f"listens on http://127.0.0.1:{port}")  # or will
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    environ = {
        "HOME": os.getcwd(),
        "PATH": os.environ.get("PATH", ""),
        "LITELLM_LOG": "ERROR",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    os.execve(command, [command, "--config", "litellm.json", "--host", "127.0.0.1", "--port", str(port)], environ)


async def answering(url: str) -> None:
    """Wait until something listens there."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    async with asyncio.timeout(120):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(host, int(port))
                writer.close()
                return
            await asyncio.sleep(0.2)


# == The load ==========================================================================================================


@dataclass(slots=True)
class Sample:
    """What a group of connections saw; they send until `until`, and finish what they began."""

    until: float
    seconds: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)


class Caller(asyncio.Protocol):
    """One connection that asks the same thing again and again."""

    def __init__(self, request: bytes, streams: bool) -> None:
        self._request = request
        self._streams = streams
        self.body = b""  # as much of it as was kept: all for a JSON answer, the beginning for a stream
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    async def run(self, sample: Sample, delay: float = 0) -> None:
        await asyncio.sleep(delay)
        self._sample = sample
        self._done = asyncio.get_running_loop().create_future()
        self._send()
        await self._done

    def _send(self) -> None:
        self._head = self.body = self._tail = b""
        self._first = 0.0
        self._sent = time.perf_counter()
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._tail and not self.body:
            head, found, data = (self._head + data).partition(b"\r\n\r\n")
            self._head = head + found + (b"" if found else data)
            if not found or not data:
                return
            if not head.startswith(b"HTTP/1.1 200 "):
                self._fail(f"answered {(head + found + data)[:300]!r}")
                return
        if self._streams:
            if not self._first:
                self.body += data
                self._first = time.perf_counter() if b"data: {" in self.body else 0.0
            self._tail = (self._tail + data)[-7:]
            ended = self._tail == b"\r\n0\r\n\r\n"
        else:
            self.body += data
            ended = len(self.body) == int((LENGTH.search(self._head) or [b"", b"-1"])[1])
        if ended:
            self._answered(time.perf_counter())

    def _answered(self, now: float) -> None:
        self._sample.seconds.append(now - self._sent)
        self._sample.firsts.append(self._first - self._sent)
        if now < self._sample.until:
            self._send()
        elif self._done and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("closed the connection")

    def _fail(self, reason: str) -> None:
        if self._done and not self._done.done():
            self._done.set_exception(BenchmarkError(reason))


@dataclass(frozen=True, slots=True)
class Target:
    """A process under test and what to send it."""

    name: str
    upstream: str
    url: str
    pid: int
    model: str

    def request(self, mode: Mode) -> bytes:
        spoken = self.upstream if self.name == "forwarder" else "anthropic"
        path, body = PATHS[spoken], question(spoken, mode, self.model)
        host = self.url.removeprefix("http://")
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        return head.encode() + b"\r\n\r\n" + body


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement. `cpu` is in µs per request, or per text delta; `rate` counts the same."""

    target: str
    upstream: str
    mode: Mode
    connections: int
    rate: float
    p50: float
    p99: float
    cpu: float
    busy: float
    rest: float  # how busy the other core was with upstream and load


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all threads: `/proc/PID/stat` in nanoseconds (Linux `clock_getcpuclockid`)."""
    return time.clock_gettime((~pid << 3) | 2)


def percentile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


async def measure(target: Target, mode: Mode, connections: int, seconds: float, upstream_pid: int) -> Cell:
    """Warm up, then run all connections for `seconds`, each to the end of its last answer."""
    async with callers(target, mode, connections) as group:
        if mode != "drip":
            await together(group, Sample(time.perf_counter() + seconds / 6), 0)
        before, rest = cpu_seconds(target.pid), time.process_time() + cpu_seconds(upstream_pid)
        begun = time.perf_counter()
        sample = Sample(begun + seconds)
        await together(group, sample, 0.004 if mode == "drip" else 0)
        took = time.perf_counter() - begun
        cpu = cpu_seconds(target.pid) - before
        rest = time.process_time() + cpu_seconds(upstream_pid) - rest
    units = len(sample.seconds) * (1 if mode == "whole" else DELTAS)
    seen = sample.seconds if mode == "whole" else sample.firsts
    return Cell(target.name, target.upstream, mode, connections, units / took, percentile(seen, 0.5),
                percentile(seen, 0.99), cpu / units * 1e6, cpu / took, rest / took)  # fmt: skip


@contextlib.asynccontextmanager
async def callers(target: Target, mode: Mode, connections: int) -> AsyncIterator[list[Caller]]:
    host, _, port = target.url.removeprefix("http://").rpartition(":")
    loop, request = asyncio.get_running_loop(), target.request(mode)
    group: list[Caller] = []
    try:
        for _ in range(connections):
            _, caller = await loop.create_connection(lambda: Caller(request, mode != "whole"), host, int(port))
            group.append(caller)
        yield group
    finally:
        for caller in group:
            caller.transport.abort()


async def together(group: Sequence[Caller], sample: Sample, stagger: float) -> None:
    async with asyncio.timeout(sample.until - time.perf_counter() + 30):
        await asyncio.gather(*(caller.run(sample, number * stagger) for number, caller in enumerate(group)))


async def check(target: Target) -> None:
    """That the answers are whole: every piece of text, in both forms."""
    host, _, port = target.url.removeprefix("http://").rpartition(":")
    for mode, end in (("whole", b"}"), ("burst", b"\r\n0\r\n\r\n")):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(target.request("whole" if mode == "whole" else "burst"))
        got = b""
        async with asyncio.timeout(10):
            while b"\r\n\r\n" not in got or not got.endswith(end):
                if not (data := await reader.read(1 << 20)):
                    break
                got += data
        writer.close()
        piece = rb"caf(?:\\u00e9|\xc3\xa9)" if mode == "whole" else rb'"(?:text|content)": ?"[^"]'
        words = len(re.findall(piece, got))
        if words < (DELTAS // len(WORDS) if mode == "whole" else DELTAS):
            raise BenchmarkError(f"{target.name} to {target.upstream}, {mode}: {words} pieces of text in {got[:400]!r}")


# == Processes =========================================================================================================


@contextlib.asynccontextmanager
async def running(name: str, cores: set[int], command: Sequence[str], **options: Any) -> AsyncIterator[tuple[str, int]]:
    """A child process that says where it listens: its URL and pid. It is ended by its pid, whatever happens."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, **options
    )
    try:
        pin(process.pid, cores)
        output = cast(asyncio.StreamReader, process.stdout)
        try:
            line = await asyncio.wait_for(output.readline(), 20)
        except TimeoutError:
            line = b""
        found = re.search(r"listens on (http://127\.0\.0\.1:\d+)", line.decode())
        if not found:
            raise BenchmarkError(f"the {name} did not start; it said {line!r}")
        yield found[1], process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.communicate(), 5)
        except TimeoutError:
            process.kill()
            await process.wait()


def pin(pid: int, cores: set[int]) -> None:
    if cores:
        os.sched_setaffinity(pid, cores)


def cores() -> tuple[set[int], set[int]]:
    """One core for the process under test and one for the rest; none of them on a machine with a single core."""
    have = sorted(os.sched_getaffinity(0))
    return ({have[0]}, {have[1]}) if len(have) > 1 else (set(), set())


def gateway_environ(upstream: str, home: str) -> dict[str, str]:
    """Nothing of this shell's settings and keys, so that a run is the same everywhere."""
    return {
        "HOME": home,
        "PATH": os.environ.get("PATH", ""),
        "VAI_ANTHROPIC_BASE_URL": upstream,
        "VAI_OPENAI_BASE_URL": f"{upstream}/v1",
        "ANTHROPIC_API_KEY": "sk-benchmark-not-a-key",
        "OPENAI_API_KEY": "sk-benchmark-not-a-key",
        "VAI_CALLER_RPM": "1000000000",  # counted as ever, and never reached
        "VAI_GLOBAL_RPM": "1000000000",
    }


# == The run ===========================================================================================================


@dataclass(frozen=True, slots=True)
class Plan:
    connections: tuple[int, ...]
    rounds: int
    seconds: float
    litellm: str = ""


async def run(plan: Plan, project: Path, progress: Callable[[str], None]) -> list[Cell]:
    """Every target on every load, by turns; of its rounds the one that cost least stands."""
    tested, others = cores()
    pin(0, others)
    cells: list[Cell] = []
    async with contextlib.AsyncExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory())
        upstream, upstream_pid = await stack.enter_async_context(
            running("upstream", others, [__file__, "--role", "upstream"])
        )
        floors = {
            name: await stack.enter_async_context(
                running(name, tested, [__file__, "--role", name, "--upstream", upstream])
            )
            for name in ("forwarder", "translator")
        }
        if plan.litellm:
            command = [__file__, "--role", "litellm", "--upstream", upstream, "--litellm", plan.litellm]
            floors["litellm"] = await stack.enter_async_context(running("litellm", tested, command, cwd=home))
            await answering(floors["litellm"][0])
        command = [str(project / "server.py"), "--auth", "none", "--port", "0", "--log-format", "json"]
        gateway = await stack.enter_async_context(
            running("gateway", tested, command, env=gateway_environ(upstream, home), cwd=home)
        )
        targets = [
            Target(name, provider, url, pid, f"{provider}/{model}" if name == "gateway" else model)
            for provider, model in MODELS.items()
            for name, (url, pid) in {**floors, "gateway": gateway}.items()
            if provider == "openai" or name not in ("translator", "litellm")
        ]
        for target in targets:
            await check(target)
        for mode in TITLES:
            for connections in plan.connections:
                progress(f"{TITLES[mode]}, {connections} connections")
                rounds = [
                    [await measure(target, mode, connections, plan.seconds, upstream_pid) for target in targets]
                    for _ in range(plan.rounds)
                ]
                cells += [min(seen, key=lambda cell: cell.cpu) for seen in zip(*rounds, strict=True)]
    return cells


def conditions() -> dict[str, Any]:
    tested, others = cores()
    return {
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "under_test_on": sorted(tested) or "not pinned",
        "rest_on": sorted(others) or "not pinned",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "aiohttp": installed("aiohttp"),
        "pydantic": installed("pydantic"),
        "loop": f"uvloop {installed('uvloop')}" if loop_factory() else "asyncio",
        "load_average": round(os.getloadavg()[0], 2),
    }


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8")):
            return found[1]
    return platform.machine()


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def loop_factory() -> Any:
    """The loop that the gateway would take, for every process here."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


# == The report ========================================================================================================


def report(cells: Sequence[Cell], told: dict[str, Any]) -> str:
    lines = ["# The gateway beside the least that forwards and translates", ""]
    lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in told.items()]
    lines += [f"- the load and the upstream together used {max(c.rest for c in cells):.0%} of their core at most"]
    for mode, title in TITLES.items():
        lines += ["", f"## {title}", "", *table([cell for cell in cells if cell.mode == mode], mode)]
    return "\n".join(lines) + "\n"


def table(cells: Sequence[Cell], mode: Mode) -> list[str]:
    unit, seen = ("requests", "latency") if mode == "whole" else ("events", "first")
    lines = [
        f"| route | connections | {unit}/s | {seen} p50 ms | p99 ms | CPU µs per {unit[:-1]} | busy "
        "| × forwarder | × translator |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    floors: dict[str, Cell] = {}
    for cell in cells:
        if cell.target == "forwarder":  # of each upstream the forwarder is measured first, the gateway last
            floors.clear()
        lines.append(row(cell, floors))
        floors[cell.target] = cell
    return lines


def row(cell: Cell, floors: Mapping[str, Cell]) -> str:
    source = cell.upstream if cell.target == "forwarder" else "anthropic"
    route = f"{source}→{cell.upstream}" + ("" if cell.target == "gateway" else f" ({cell.target})")
    times = f"{cell.p50 * 1e3:.2f} | {cell.p99 * 1e3:.2f} | {cell.cpu:.1f} | {cell.busy:.0%}"
    ratios = [f"{cell.cpu / floors[name].cpu:.2f}" if name in floors else "" for name in ("forwarder", "translator")]
    return f"| {route} | {cell.connections} | {cell.rate:,.0f} | {times} | {' | '.join(ratios)} |"


ROLES = {"upstream": serve_upstream, "forwarder": serve_forwarder, "translator": serve_translator}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the gateway beside a bare forwarder.")
    parser.add_argument("--quick", action="store_true", help="under 40 seconds instead of 3 minutes; rougher")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--litellm", default="", metavar="COMMAND", help="measure this LiteLLM, too")
    parser.add_argument("--project", type=Path, default=Path(__file__).resolve().parent.parent, help=argparse.SUPPRESS)
    parser.add_argument("--role", choices=(*ROLES, "litellm"), help=argparse.SUPPRESS)
    parser.add_argument("--upstream", help=argparse.SUPPRESS)
    return parser.parse_args()


def say(text: str, stream: Any = None) -> None:
    stream = stream or sys.stdout
    stream.write(text + "\n")
    stream.flush()


def main() -> int:
    options = arguments()
    if options.role == "litellm":
        become_litellm(options.litellm, options.upstream)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        if options.role:
            runner.run(ROLES[options.role](options.upstream))
            return 0
        told = conditions()
        litellm = os.path.abspath(options.litellm) if options.litellm else ""
        plan = Plan((1, 16), 2, 0.45, litellm) if options.quick else Plan((1, 16, 64), 3, 0.9, litellm)
        try:
            cells = runner.run(run(plan, options.project.resolve(), lambda text: say(text, sys.stderr)))
        except (BenchmarkError, TimeoutError, OSError) as fault:
            say(f"benchmark: {fault or 'timed out'}", sys.stderr)
            return 1
    say(report(cells, told))
    if options.json:
        rows = [{name: getattr(cell, name) for name in Cell.__slots__} for cell in cells]
        options.json.write_text(json.dumps({"conditions": told, "cells": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
