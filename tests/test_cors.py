"""Which web pages may call the gateway, and what their browsers are told."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import KEY, Answer, Serve, Served, body_of

from sandbox import Sandbox

PAGE = "https://app.example.org"
ALLOW = "Access-Control-Allow-Origin"
STRANGERS = [
    "https://evil.test",
    "https://app.example.org.evil.test",
    "http://app.example.org",
    "https://app.example.org:8443",
    "https://APP.example.org",
    "https://sub.app.example.org",
    "app.example.org",
    "null",
    "*",
    "",
]


def told(answer: Answer) -> dict[str, str]:
    """What an answer says of web pages."""
    return {name: value for name, value in answer.headers.items() if name.startswith("Access-Control")}


async def preflight(gateway: Served, origin: str | None, headers: str = "", path: str = "/v1/messages") -> Answer:
    sent = {"Access-Control-Request-Method": "POST"} | ({"Origin": origin} if origin is not None else {})
    sent |= {"Access-Control-Request-Headers": headers} if headers else {}
    return await gateway.send("OPTIONS", path, key=None, headers=sent)


@pytest.fixture
async def gateway(serve: Serve) -> Served:
    """A gateway for the pages of two origins."""
    return await serve(cors={"allowed_origins": [PAGE, "http://localhost:3000"]})


SDK = "authorization,content-type,x-api-key,anthropic-version,anthropic-dangerous-direct-browser-access,x-stainless-os"


async def test_preflight(gateway: Served, sandbox: Sandbox) -> None:
    """A page of an allowed origin may send any header, as Anthropic's SDK does, and needs no key to ask."""
    for origin in (PAGE, "http://localhost:3000"):
        answer = await preflight(gateway, origin, SDK)
        assert (answer.status, answer.raw, answer.headers["Vary"]) == (204, "", "Origin")
        assert answer.headers[ALLOW] == origin
        assert answer.headers["Access-Control-Allow-Methods"] == "GET, POST"
        assert answer.headers["Access-Control-Allow-Headers"] == SDK
        assert int(answer.headers["Access-Control-Max-Age"]) > 0
        assert "Access-Control-Allow-Credentials" not in answer.headers
    assert sandbox.seen == 0


@pytest.mark.parametrize("origin", STRANGERS)
async def test_strangers(gateway: Served, origin: str) -> None:
    """Any other origin, however alike, is told nothing, before it sends and after; caches know it depends."""
    answers = [
        await preflight(gateway, origin, SDK),
        await gateway.ask("openai", headers={"Origin": origin}),
        await gateway.get("/v1/nope", headers={"Origin": origin}),
    ]
    assert [told(answer) for answer in answers] == [{}] * 3
    assert [answer.headers["Vary"] for answer in answers] == ["Origin"] * 3


async def test_answers_and_errors(serve: Serve) -> None:
    """Every answer of any kind lets the page read it and its headers; without that a browser hides even the error."""
    gateway = await serve(
        cors={"allowed_origins": [PAGE]}, limits={"max_body_bytes": 4096}, rate_limit={"caller_rpm": 7}
    )
    page = {"Origin": PAGE}
    answers = {
        200: await gateway.ask("openai", headers=page),
        413: await gateway.ask("openai", "x" * 9999, headers=page),
        401: await gateway.post(body_of("openai"), key="wrong-key", headers=page),
        400: await gateway.post({}, headers=page),
        404: await gateway.get("/v1/nope", headers=page),
        405: await gateway.get("/v1/messages", headers=page),
        502: await gateway.ask("openai", "[error 500]", headers=page),
    }
    stream = await gateway.ask("openai", stream=True, headers=page)
    broken = gateway.gateway.engine.parse
    gateway.gateway.engine.parse = None
    answers[500] = await gateway.ask("openai", headers=page)
    gateway.gateway.engine.parse = broken
    assert (await gateway.ask("openai", headers=page)).status == 200
    answers[429] = await gateway.ask("openai", headers=page)
    gateway.gateway.draining = True
    answers[503] = await gateway.ask("openai", headers=page)
    for status, answer in answers.items():
        assert answer.status == status
    assert stream.events[-1]["type"] == "message_stop"
    for answer in (*answers.values(), stream):
        exposed = answer.headers["Access-Control-Expose-Headers"].split(", ")
        assert (answer.headers[ALLOW], answer.headers["Vary"]) == (PAGE, "Origin")
        assert {"X-Request-ID", "request-id", "X-Model", "Retry-After", "X-RateLimit-Limit-Requests"} < set(exposed)


async def test_any_origin(serve: Serve) -> None:
    """`*` is for every page, the sandboxed ones too, and never with credentials."""
    gateway = await serve(cors={"allowed_origins": ["*"]})
    for origin in ("https://evil.test", "null", PAGE):
        for answer in (await preflight(gateway, origin, SDK), await gateway.ask("openai", headers={"Origin": origin})):
            assert answer.headers[ALLOW] == "*"
            assert "Access-Control-Allow-Credentials" not in answer.headers


async def test_credentials(serve: Serve) -> None:
    """Where cookies are wanted, for a proxy before the gateway, named origins get them."""
    gateway = await serve(cors={"allowed_origins": [PAGE], "allow_credentials": True})
    for answer in (await preflight(gateway, PAGE), await gateway.ask("openai", headers={"Origin": PAGE})):
        assert (answer.headers[ALLOW], answer.headers["Access-Control-Allow-Credentials"]) == (PAGE, "true")
    assert told(await preflight(gateway, "https://evil.test")) == {}


async def test_no_pages_by_default(serve: Serve) -> None:
    """Without configuration no page is told anything, and `OPTIONS` is a method like any other."""
    gateway = await serve()
    answer = await preflight(gateway, PAGE)
    assert (answer.status, answer.headers["Allow"], told(answer)) == (405, "POST", {})
    assert told(await gateway.ask("openai", headers={"Origin": PAGE})) == {}


@pytest.mark.parametrize("headers", ["x" * 5000, "x-a: b", "x;y", '"x"'])
async def test_preflight_repeats_names_only(gateway: Served, headers: str) -> None:
    """What cannot be a list of header names is not repeated."""
    answer = await preflight(gateway, PAGE, headers)
    assert (answer.status, "Access-Control-Allow-Headers" in answer.headers) == (204, False)


async def test_no_preflight(gateway: Served) -> None:
    """`OPTIONS` without an origin, or without the method that is to come, asks for nothing."""
    assert (await preflight(gateway, None)).status == 405
    assert (await gateway.send("OPTIONS", "/v1/messages", headers={"Origin": PAGE})).status == 405


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/models", "/health", "/v1/nope", "/"])
async def test_rebound_names_reach_nothing(serve: Serve, path: str) -> None:
    """An open gateway on loopback has a 403 for every route, and every preflight, under a name that is not its own."""
    gateway = await serve(auth={"mode": "none"}, cors={"allowed_origins": ["*"]})
    rebound: Any = {"key": None, "headers": {"Host": "evil.test:8080", "Origin": "http://evil.test:8080"}}
    for method in ("GET", "POST", "OPTIONS"):
        answer = await gateway.send(method, path, **rebound)
        assert (answer.status, answer.error["type"], answer.error["code"]) == (403, "permission_error", "host")


async def test_a_page_cannot_post_unasked(gateway: Served, sandbox: Sandbox) -> None:
    """What a browser sends across origins without a preflight, a form or plain text, is refused whatever it holds."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        headers = {"Content-Type": kind, "Origin": "https://evil.test"}
        answer = await gateway.send("POST", "/v1/messages", data=b"{}", headers=headers, key=KEY)
        assert (answer.status, answer.error["code"]) == (400, "unsupported_media_type")
    assert sandbox.seen == 0
