"""An alias of several models: the next one is asked where one could not answer, and never once an answer has begun."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest
from conftest import (
    JSON,
    KEY,
    MODELS,
    PROVIDERS,
    Heard,
    Listen,
    Logged,
    Serve,
    Served,
    canned,
    hear,
    http_answer,
    text_of,
)

import vai
from sandbox import Sandbox

FIRST, SECOND = "anthropic/claude-sonnet-4-5", "openai/gpt-4o"
SMART = {"smart": [FIRST, SECOND]}
STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])


def smart(text: str = "[say Hello.]", **more: Any) -> JSON:
    return {"model": "smart", "messages": [{"role": "user", "content": text}], **more}


def said(answer: Any) -> str:
    return answer.text if answer.headers["Content-Type"] == "application/json" else text_of(answer.events)


def refusal(status: int, kind: str, *headers: str) -> bytes:
    """An error of Anthropic's."""
    body = {"type": "error", "error": {"type": kind, "message": "Not now."}}
    return http_answer(json.dumps(body).encode(), f"{status} No", "application/json", "Connection: close", *headers)


async def counted(gateway: Served, name: str) -> dict[str, float]:
    """The series of a counter, by their labels as the text has them."""
    lines = (await gateway.get("/metrics", key=None)).raw.splitlines()
    return {line.split("{")[1].split("}")[0]: float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{")}


# == Next, please ======================================================================================================

EVENT = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Later."}}\n\n'
FAULTS = {  # what the first provider does, and the type of error that it would have been
    "429": (refusal(429, "rate_limit_error", "Retry-After: 7"), "rate_limit_error"),
    "500": (refusal(500, "api_error"), "provider_error"),
    "503": (refusal(503, "api_error"), "overloaded_error"),
    "529": (refusal(529, "overloaded_error"), "overloaded_error"),
    "504": (refusal(504, "timeout_error"), "timeout_error"),
    "408": (refusal(408, "timeout_error"), "timeout_error"),
    "HTML": (http_answer(b"<html>", "502 Bad Gateway", "text/html"), "provider_error"),
    "closes": (b"", "provider_error"),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-", "provider_error"),
    "redirect": (http_answer(b"", "307 Moved", "text/html", "Location: http://127.0.0.1:9/"), "provider_error"),
    "refuses our key": (refusal(401, "authentication_error"), "provider_error"),
}


@STREAMS
@pytest.mark.parametrize(("raw", "reason"), FAULTS.values(), ids=FAULTS)
async def test_next_model_answers(
    serve: Serve, listen: Listen, sandbox: Sandbox, logged: Logged, raw: bytes, reason: str, stream: bool
) -> None:
    """The answer, its headers, the log and a metric say which model it was; each provider was asked once."""
    heard: list[Heard | None] = []
    gateway = await serve(aliases=SMART, providers={"anthropic": {"base_url": await listen(canned(raw, heard))}})
    answer = await gateway.post(smart(stream=stream))
    assert (answer.status, said(answer), answer.headers["X-Model"]) == (200, "Hello.", SECOND)
    assert (len(heard), sandbox.seen) == (1, 1)
    await gateway.gateway.idle.wait()
    line = logged.requests[0]
    assert (line["provider"], line["model"], len(line["fallbacks"])) == (*SECOND.split("/"), 1)
    assert line["fallbacks"][0].startswith("anthropic ")
    assert "after anthropic" in logged.text[-1]
    labels = f'next_provider="openai",provider="anthropic",reason="{reason}"'
    assert await counted(gateway, "vai_fallbacks_total") == {labels: 1}
    requests = await counted(gateway, "vai_requests_total")
    assert requests['endpoint="/v1/messages",provider="openai",status="200"'] == 1
    assert await counted(gateway, "vai_errors_total") == {}


@STREAMS
async def test_connection_refused(serve: Serve, sandbox: Sandbox, stream: bool) -> None:
    """A provider that cannot be reached is passed over."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        gateway = await serve(aliases=SMART, providers={"anthropic": {"base_url": url}})
        answer = await gateway.post(smart(stream=stream))
    assert (answer.status, said(answer), sandbox.seen) == (200, "Hello.", 1)
    assert await counted(gateway, "vai_upstream_retries_total") == {'provider="anthropic",reason="connection"': 1}


@STREAMS
async def test_silence(serve: Serve, listen: Listen, sandbox: Sandbox, stream: bool) -> None:
    """A provider that does not answer in time is passed over, and let go; pings do not count as an answer."""
    left = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hear(reader)
        await reader.read()
        left.set()

    gateway = await serve(
        aliases=SMART,
        providers={"anthropic": {"base_url": await listen(talk)}},
        timeouts={"first_byte": 0.3},
        sse={"ping_interval": 0.05},
    )
    answer = await gateway.post(smart(stream=stream))
    assert (answer.status, said(answer), sandbox.seen) == (200, "Hello.", 1)
    if stream:
        kinds = [event["type"] for event in answer.events]
        assert (kinds[0], kinds[-1]) == ("ping", "message_stop")
    await asyncio.wait_for(left.wait(), 5)


async def test_error_before_the_first_event(serve: Serve, listen: Listen, sandbox: Sandbox) -> None:
    """A stream that is an error from its start has not begun."""
    raw = http_answer(EVENT, "200 OK", "text/event-stream")
    gateway = await serve(aliases=SMART, providers={"anthropic": {"base_url": await listen(canned(raw, []))}})
    answer = await gateway.post(smart(stream=True))
    assert (answer.status, said(answer), sandbox.seen) == (200, "Hello.", 1)


@STREAMS
async def test_no_key(serve: Serve, environ: dict[str, str], sandbox: Sandbox, stream: bool) -> None:
    """A model of a provider for which there is no key is passed over; a key that the caller brings makes it the one."""
    without = {name: value for name, value in environ.items() if name != "ANTHROPIC_API_KEY"}
    gateway = await serve(environ=without, aliases=SMART)
    answer = await gateway.post(smart(stream=stream))
    assert (answer.status, answer.headers["X-Model"]) == (200, SECOND)
    brought = await gateway.post(smart(stream=stream), headers={"X-Provider-Key-Anthropic": "mine"})
    assert (brought.status, brought.headers["X-Model"]) == (200, FIRST)
    assert [(request.provider, request.key) for request in sandbox.requests][1] == ("anthropic", "mine")


@STREAMS
async def test_what_the_first_cannot_take(serve: Serve, sandbox: Sandbox, stream: bool) -> None:
    """A request that a provider has no form for goes to the next one that has; it was never sent to the first."""
    gateway = await serve(aliases={"smart": ["cerebras/gpt-oss-120b", "gemini/gemini-2.5-flash"]})
    video = {"type": "video", "source": {"type": "url", "url": "https://example.org/a.mp4"}}
    body = smart(stream=stream) | {"messages": [{"role": "user", "content": [video]}]}
    answer = await gateway.post(body)
    assert (answer.status, answer.headers["X-Model"]) == (200, "gemini/gemini-2.5-flash")
    assert [request.provider for request in sandbox.requests] == ["gemini"]


async def test_dropped_is_of_the_one_that_answers(serve: Serve, listen: Listen) -> None:
    """What the first model would not have taken is not reported of the second, which takes it."""
    url = await listen(canned(refusal(503, "api_error"), []))
    gateway = await serve(aliases={"smart": [SECOND, FIRST]}, providers={"openai": {"base_url": url}})
    answer = await gateway.post(smart(top_k=3, container="box"))
    assert (answer.status, answer.headers["X-Model"]) == (200, FIRST)
    assert "X-Vai-Dropped" not in answer.headers


@pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])
@pytest.mark.parametrize("second", PROVIDERS)
async def test_history_holds_for_each(
    serve: Serve, listen: Listen, sandbox: Sandbox, second: str, stream: bool
) -> None:
    """A tool loop with thinking, begun at one provider, goes on at whichever model answers."""
    tools = [{"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}]
    first = "gemini" if second == "anthropic" else "anthropic"
    asked = {"role": "user", "content": '[think Let me see.] [tool get_weather {"city":"Oslo"}] [then] [say Sunny.]'}
    fields: JSON = {"tools": tools, "max_tokens": 4000, "thinking": {"type": "enabled", "budget_tokens": 2000}}
    whole = await serve()
    turn = (await whole.post({"model": f"{first}/{MODELS[first]}", "messages": [asked], **fields})).body
    call = next(block for block in turn["content"] if block["type"] == "tool_use")
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "sunny"}
    messages = [asked, {"role": "assistant", "content": turn["content"]}, {"role": "user", "content": [result]}]
    url = await listen(canned(refusal(500, "api_error"), []))
    alias = [f"{first}/{MODELS[first]}", f"{second}/{MODELS[second]}"]
    gateway = await serve(aliases={"smart": alias}, providers={first: {"base_url": url}})
    answer = await gateway.post({"model": "smart", "messages": messages, "stream": stream, **fields})
    assert (answer.status, said(answer), sandbox.requests[-1].provider) == (200, "Sunny.", second)


# == No further ========================================================================================================

FINAL = {
    "400": (refusal(400, "invalid_request_error"), 400),
    "403": (refusal(403, "permission_error"), 403),
    "404": (refusal(404, "not_found_error"), 404),
    "413": (refusal(413, "request_too_large"), 413),
    "401": (refusal(401, "authentication_error"), 401),
}


@STREAMS
@pytest.mark.parametrize(("raw", "status"), FINAL.values(), ids=FINAL)
async def test_errors_that_are_the_callers(
    serve: Serve, listen: Listen, sandbox: Sandbox, raw: bytes, status: int, stream: bool
) -> None:
    """A request that is wrong, or a caller's key that is refused, is told at once; nobody else is asked."""
    gateway = await serve(aliases=SMART, providers={"anthropic": {"base_url": await listen(canned(raw, []))}})
    answer = await gateway.post(smart(stream=stream), headers={"X-Provider-Key-Anthropic": "mine"})
    assert (answer.status, answer.error["provider"], sandbox.seen) == (status, "anthropic", 0)


@pytest.mark.parametrize("ending", ["[reset]", "[break_off]", "[error_in_stream 529]"])
async def test_never_after_the_first_event(serve: Serve, sandbox: Sandbox, ending: str) -> None:
    """A stream that ends badly ends in an error, whoever else could have answered."""
    gateway = await serve(aliases=SMART)
    answer = await gateway.post(smart(f"[say one two three four] {ending}", stream=True))
    assert (answer.status, answer.events[0]["type"], answer.events[-1]["type"]) == (200, "message_start", "error")
    assert sandbox.seen == 1
    assert await counted(gateway, "vai_fallbacks_total") == {}


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"<html>"])
async def test_never_after_a_200(serve: Serve, listen: Listen, sandbox: Sandbox, body: bytes) -> None:
    """An answer that cannot be read may have been paid for: it is not asked for again elsewhere."""
    url = await listen(canned(http_answer(body), []))
    gateway = await serve(aliases=SMART, providers={"anthropic": {"base_url": url}})
    assert ((await gateway.post(smart())).status, sandbox.seen) == (502, 0)


@STREAMS
async def test_when_none_answers(serve: Serve, listen: Listen, environ: dict[str, str], stream: bool) -> None:
    """The error is the first one's that was asked, not that of a model without a key; the log names them all."""
    urls = [await listen(canned(refusal(status, "api_error", "Retry-After: 7"), [])) for status in (429, 503)]
    without = {name: value for name, value in environ.items() if name != "GROQ_API_KEY"}
    gateway = await serve(
        environ=without,
        aliases={"smart": ["groq/x", FIRST, SECOND]},
        providers={"anthropic": {"base_url": urls[0]}, "openai": {"base_url": urls[1]}},
    )
    answer = await gateway.post(smart(stream=stream))
    assert (answer.status, answer.error["provider"], answer.headers["Retry-After"]) == (429, "anthropic", "7")
    requests = await counted(gateway, "vai_requests_total")
    assert requests['endpoint="/v1/messages",provider="anthropic",status="429"'] == 1
    assert sum((await counted(gateway, "vai_fallbacks_total")).values()) == 2


async def test_no_key_for_any(serve: Serve, sandbox: Sandbox) -> None:
    """Where none has a key, the first one is named."""
    gateway = await serve(environ={"HOME": "/nonexistent"}, aliases=SMART)
    answer = await gateway.post(smart())
    assert (answer.status, answer.error["code"], answer.error["provider"]) == (401, "no_provider_key", "anthropic")


async def test_one_deadline_for_all(serve: Serve, listen: Listen) -> None:
    """`timeouts.total` is of the whole request: what is left of it after the first model is all that the next has."""
    heard: list[Heard | None] = []

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hear(reader)
        await reader.read()

    urls = [await listen(hang), await listen(canned(refusal(500, "api_error"), heard))]
    gateway = await serve(
        aliases=SMART,
        providers={"anthropic": {"base_url": urls[0]}, "openai": {"base_url": urls[1]}},
        timeouts={"total": 0.2},
    )
    answer = await gateway.post(smart())
    assert (answer.status, answer.error["type"], answer.error["provider"]) == (504, "timeout_error", "anthropic")
    assert heard in ([], [None])


async def test_a_callers_key_stays_with_its_provider(serve: Serve, listen: Listen, sandbox: Sandbox) -> None:
    """In passthrough mode the caller's credential is for the first model's provider; no other one sees it."""
    heard: list[Heard | None] = []
    url = await listen(canned(refusal(429, "rate_limit_error"), heard))
    gateway = await serve(
        auth={"mode": "passthrough"}, aliases=SMART, providers={"anthropic": {"base_url": url, "api_key": "not-used"}}
    )
    answer = await gateway.post(smart())
    assert (answer.status, sandbox.seen) == (429, 0)
    assert heard[0] is not None
    assert f"x-api-key: {KEY}" in heard[0].head.lower().replace(KEY.lower(), KEY)


# == The list ==========================================================================================================


async def test_models_lists_them(serve: Serve) -> None:
    """`/v1/models` has the list as it is configured."""
    gateway = await serve(aliases={**SMART, "fast": "groq/x"})
    assert (await gateway.get("/v1/models")).body["aliases"] == {**SMART, "fast": "groq/x"}


async def test_in_process(sandbox: Sandbox, listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client without a gateway goes down the list as well, and asks again when all of it failed."""
    for name, value in sandbox.environ.items():
        monkeypatch.setenv(name, value)
    heard: list[Heard | None] = []
    url = await listen(canned(refusal(529, "overloaded_error", "Retry-After: 0"), heard))
    async with vai.AsyncClient(aliases=SMART, base_urls={"anthropic": url}, max_retries=0) as client:
        message = await client.messages.create(model="smart", messages="[say Hello.]")
        assert (message.text, message.model) == ("Hello.", SECOND)
        async with client.messages.stream(model="smart", messages="[say Hello.]") as stream:
            assert (await stream.final()).model == SECOND
        assert (await client.models.list()).aliases == SMART
    async with vai.AsyncClient(aliases={"smart": (FIRST, "anthropic/b")}, base_urls={"anthropic": url}) as client:
        with pytest.raises(vai.OverloadedError):
            await client.messages.create(model="smart", messages="Hi")
    assert len(heard) == 2 + 2 * 3


@pytest.mark.parametrize(
    "models", [[], 7, ["groq/x", 7], ["groq/x", "groq/x"], ["groq/x", "gpt-4o"], "mistral/x", None]
)
def test_what_is_no_alias(models: Any) -> None:
    """A client is not made with an alias that could not be asked; the error names it."""
    with pytest.raises(vai.InvalidRequestError) as caught:
        vai.Client(aliases={"smart": models})
    assert caught.value.param == "aliases.smart"
