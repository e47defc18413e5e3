"""What the tests share: a sandbox for an upstream, a gateway in front of it, and ways to talk to both.

`serve(**sections)` runs a gateway in this process, `launch(*flags, **environ)` runs `python server.py` as one of its
own. Both have the sandbox behind them. `listen(talk)` is an upstream that may do what no provider should.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import os
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import aiohttp
import pytest
from aiohttp import web
from anthropic import AsyncAnthropic

import server
from sandbox import Sandbox

JSON: TypeAlias = dict[str, Any]
KEY = "vai_sk_the-key-of-alice-0123456789"
ROOT = Path(server.__file__).parent
LIVE = "/v1/messages/live"
UPGRADE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode(),
}
MODELS = {
    "anthropic": "claude-sonnet-4-5",
    "openai": "gpt-4o",
    "oai-resp": "gpt-4o",
    "groq": "llama-3.3-70b-versatile",
    "gemini": "gemini-2.5-flash",
    "gemini-oauth": "gemini-2.5-flash",
    "cerebras": "gpt-oss-120b",
}
PROVIDERS = tuple(MODELS)


# == Requests and answers ==============================================================================================


def body_of(provider: str, text: str = "[say Hello.]", /, **more: Any) -> JSON:
    """The plainest request that says this text to a model of this provider."""
    return {"model": f"{provider}/{MODELS[provider]}", "messages": [{"role": "user", "content": text}], **more}


def text_of(events: list[JSON]) -> str:
    return "".join(event["delta"].get("text", "") for event in events if event["type"] == "content_block_delta")


@dataclass
class Answer:
    """What came back for a request, all of it."""

    status: int
    headers: Mapping[str, str]
    raw: str

    @property
    def body(self) -> Any:
        return json.loads(self.raw)

    @property
    def text(self) -> str:
        return "".join(block.get("text", "") for block in self.body["content"])

    @property
    def error(self) -> JSON:
        """The `error` of an envelope that is whole: the ids agree, here and in both headers."""
        body = self.body
        error: JSON = body["error"]
        assert body.keys() == {"type", "error", "request_id"}
        assert (body["type"], body["request_id"]) == ("error", error["request_id"])
        assert self.headers["X-Request-ID"] == self.headers["request-id"] == body["request_id"]
        return error

    @property
    def events(self) -> list[JSON]:
        """The data of each server-sent event; its name is the data's type."""
        assert self.headers["Content-Type"] == "text/event-stream"
        events = []
        for block in self.raw.split("\n\n")[:-1]:
            name, data = block.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
        return events


@dataclass
class Served:
    """A gateway at `url`, and its own state where it runs in this process."""

    url: str
    http: aiohttp.ClientSession
    gateway: Any = None

    async def send(self, method: str, path: str, /, *, key: str | None = KEY, **options: Any) -> Answer:
        headers = {**({"Authorization": f"Bearer {key}"} if key else {}), **options.pop("headers", {})}
        async with self.http.request(method, self.url + path, headers=headers, **options) as response:
            return Answer(response.status, response.headers, await response.text())

    async def get(self, path: str, /, **options: Any) -> Answer:
        return await self.send("GET", path, **options)

    async def post(self, body: Any, /, **options: Any) -> Answer:
        return await self.send("POST", "/v1/messages", json=body, **options)

    async def ask(self, provider: str, text: str = "[say Hello.]", /, *, headers: Any = (), **more: Any) -> Answer:
        return await self.post(body_of(provider, text, **more), headers=dict(headers))

    @contextlib.asynccontextmanager
    async def raw(self, data: bytes) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A bare connection on which these bytes were sent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", int(self.url.rpartition(":")[2]))
        try:
            writer.write(data)
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def raw_answer(self, data: bytes) -> bytes:
        """All that comes back for these bytes until the gateway closes the connection."""
        async with self.raw(data) as (reader, _), asyncio.timeout(5):
            return await reader.read()


def post_bytes(body: JSON, *headers: str) -> bytes:
    """A whole request, as bytes."""
    raw = json.dumps(body).encode()
    start = ("POST /v1/messages HTTP/1.1", "Host: 127.0.0.1", f"X-API-Key: {KEY}", "Content-Type: application/json")
    return "\r\n".join([*start, f"Content-Length: {len(raw)}", *headers, "", ""]).encode() + raw


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


# == Gateways ==========================================================================================================

Serve: TypeAlias = Callable[..., Awaitable[Served]]


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with Sandbox() as running:
        yield running


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(20)) as session:
        yield session


def log_in(path: Path, **login: Any) -> None:
    """Write a login for gemini-oauth that is good for the next centuries."""
    path.write_text(json.dumps({"access_token": "ya29.of-the-server", "expiry_date": 1 << 45, **login}))


@pytest.fixture
def credentials(tmp_path: Path) -> Path:
    log_in(tmp_path / "gemini-oauth.json")
    return tmp_path / "gemini-oauth.json"


@pytest.fixture
def environ(sandbox: Sandbox, credentials: Path) -> dict[str, str]:
    """Points a gateway at the sandbox, with a key of its own for every provider."""
    oauth = {"GEMINI_OAUTH_CREDENTIALS_PATH": str(credentials), "GEMINI_OAUTH_TOKEN_URL": f"{sandbox.oauth_url}/token"}
    return {**sandbox.environ, **oauth, "GEMINI_OAUTH_CLIENT_ID": "client"}


@pytest.fixture
async def serve(environ: dict[str, str], http: aiohttp.ClientSession) -> AsyncIterator[Serve]:
    """Runs gateways until the test ends, with these sections of a configuration and this environment."""
    async with contextlib.AsyncExitStack() as stack:

        async def run(*, environ: Mapping[str, str] = environ, **sections: JSON) -> Served:
            auth = {"keys": [{"key": KEY, "name": "alice"}]}
            config = server.Config.model_validate({"auth": auth, **sections})
            app = server.make_app(config, server.make_engine(config, environ))
            runner = server.Runner(app, shutdown_timeout=0.1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            return Served(f"http://127.0.0.1:{runner.addresses[0][1]}", http, app[server.GATEWAY])

        yield run


@pytest.fixture
async def gateway(serve: Serve) -> Served:
    """A gateway in its default configuration; `KEY` is the key of alice."""
    return await serve()


@pytest.fixture
async def sdk(gateway: Served) -> AsyncIterator[AsyncAnthropic]:
    """Anthropic's own SDK, pointed at the gateway."""
    async with AsyncAnthropic(base_url=gateway.url, api_key=KEY, max_retries=0) as client:
        yield client


# == Upstreams that misbehave ==========================================================================================


class Heard(NamedTuple):
    """A request as it came over the wire."""

    head: str
    body: bytes


Talk: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Listen: TypeAlias = Callable[[Talk], Awaitable[str]]


async def hear(reader: asyncio.StreamReader) -> Heard | None:
    """The next request on a connection; None at its end."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        size = next(int(line[15:]) for line in head.lower().split("\r\n") if line.startswith("content-length:"))
        return Heard(head, await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def http_answer(body: bytes, status: str = "200 OK", kind: str = "application/json", *more: str) -> bytes:
    """An answer, as bytes."""
    lines = (f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *more)
    return "\r\n".join([*lines, "", ""]).encode() + body


def canned(raw: bytes, heard: list[Heard | None]) -> Talk:
    """Answers one request with these bytes, and hangs up."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await hear(reader))
        writer.write(raw)

    return talk


@contextlib.asynccontextmanager
async def websocket_server(
    talk: Callable[[web.WebSocketResponse], Awaitable[None]], **options: Any
) -> AsyncIterator[str]:
    """A service that accepts any WebSocket, and does what `talk` says."""

    async def accept(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(**options)
        await ws.prepare(request)
        await talk(ws)
        return ws

    app = web.Application()
    app.router.add_get("/{path:.*}", accept)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture
async def listen() -> AsyncIterator[Listen]:
    """Starts TCP servers, each with its handler of connections, and gives their URLs."""
    running: list[asyncio.Server] = []
    tasks: set[asyncio.Task[None]] = set()

    async def start(talk: Talk) -> str:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(talk(reader, writer))
            tasks.add(task)
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await task
            tasks.discard(task)
            writer.close()

        running.append(await asyncio.start_server(connected, "127.0.0.1", 0, backlog=1024))
        return f"http://127.0.0.1:{running[-1].sockets[0].getsockname()[1]}"

    yield start
    for listening in running:
        listening.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# == Logs ==============================================================================================================


class Logged(logging.Handler):
    """What a log at DEBUG holds, in both formats."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.json: list[str] = []
        self.text: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.json.append(server.JSONFormatter().format(record))
        self.text.append(server.TextFormatter().format(record))

    @property
    def requests(self) -> list[JSON]:
        return [line for line in map(json.loads, self.json) if line["logger"] == server.access.name]


@pytest.fixture
def logged() -> Iterator[Logged]:
    handler, root = Logged(), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)


# == Processes =========================================================================================================


@dataclass
class Process:
    """`python server.py`, running. `out` and `errors` are what it has written up to now."""

    process: asyncio.subprocess.Process
    gateway: Served
    out: str = ""
    errors: list[str] = field(default_factory=list)
    readers: list[asyncio.Task[None]] = field(default_factory=list)
    listens: asyncio.Event = field(default_factory=asyncio.Event)

    async def read_out(self) -> None:
        async for line in self.process.stdout or ():  # type: ignore[union-attr]
            self.out += line.decode()
            if "listens on" in self.out:
                self.gateway.url = self.out.partition("listens on ")[2].split()[0]
            if "curl" in self.out:
                self.listens.set()

    async def read_errors(self) -> None:
        async for line in self.process.stderr or ():  # type: ignore[union-attr]
            self.errors.append(line.decode())

    def signal(self, name: signal.Signals) -> None:
        self.process.send_signal(name)

    async def ended(self, seconds: float) -> int:
        """The exit code, once it has ended and all it wrote is read. It never writes a traceback."""
        async with asyncio.timeout(seconds):
            await asyncio.gather(*self.readers)
            code = await self.process.wait()
        assert "Traceback" not in "".join(self.errors)
        return code


Launch: TypeAlias = Callable[..., Awaitable[Process]]


@pytest.fixture
async def launch(environ: dict[str, str], http: aiohttp.ClientSession, tmp_path: Path) -> AsyncIterator[Launch]:
    """Starts `python server.py` with these flags and variables and waits until it listens."""
    started: list[Process] = []

    async def run(*flags: str, **more: str) -> Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(ROOT / "server.py"), "--port", "0", "--log-format", "json", *flags),
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], **environ, "VAI_API_KEYS": f"alice={KEY}", **more},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        new = Process(process, Served("", http))
        new.readers += [asyncio.create_task(new.read_out()), asyncio.create_task(new.read_errors())]
        started.append(new)
        async with asyncio.timeout(20):
            await new.listens.wait()
        return new

    yield run
    for new in started:
        if new.process.returncode is None:
            new.process.kill()
        await new.process.wait()
        await asyncio.gather(*new.readers)
