"""`WS /v1/messages/live`: who may open a session, what may be sent on it, and how it ends."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import struct
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from conftest import JSON, KEY, Answer, Logged, Serve, Served

import server
from sandbox import Sandbox

LIVE = "/v1/messages/live"
PAGE = "https://app.example.org"
UPGRADE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode(),
}


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


async def hear(socket: aiohttp.ClientWebSocketResponse) -> Any:
    """The next message: JSON, or audio as bytes; of a close its code."""
    message = await asyncio.wait_for(socket.receive(), 5)
    if message.type is aiohttp.WSMsgType.TEXT:
        return json.loads(message.data)
    return message.data


async def last_words(socket: aiohttp.ClientWebSocketResponse) -> tuple[JSON, int | None]:
    """The last JSON message before the close, and the code of the close."""
    last: JSON = {}
    while isinstance(said := await hear(socket), (dict, bytes)):
        last = said if isinstance(said, dict) else last
    return last, socket.close_code


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
        await socket.send_json({"type": "input.text", "text": "Hello."})
        assert (await hear(socket))["error"]["code"] == "not_configured"
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
        while (await active())["active"] > 1:
            await asyncio.sleep(0)
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
