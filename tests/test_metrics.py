"""`/metrics` says what the gateway does, at a bounded size and without a word of what callers send."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import KEY, PROVIDERS, Listen, Serve, Served, body_of, hear, http_answer, log_in, post_bytes
from prometheus_client.parser import text_string_to_metric_families

from sandbox import Sandbox

SIX = "[say one two three four five six]"
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scraped(gateway: Served) -> Series:
    """All series, read by Prometheus' own parser."""
    answer = await gateway.get("/metrics", key=None)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    families = text_string_to_metric_families(answer.raw)
    samples = [sample for family in families for sample in family.samples]
    found = {(each.name, tuple(sorted(each.labels.items()))): each.value for each in samples}
    assert len(found) == len(samples)
    return found


async def value(gateway: Served, name: str, **labels: str) -> float:
    """One series of `vai_`; 0 where it does not exist yet."""
    return (await scraped(gateway)).get((f"vai_{name}", tuple(sorted(labels.items()))), 0)


# == What is counted ===================================================================================================


@pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_request(gateway: Served, provider: str, stream: bool) -> None:
    """A request counts once, with its tokens and how long it took; the first token only where it streams."""
    answer = await gateway.ask(provider, SIX, stream=stream)
    await gateway.gateway.idle.wait()
    usage = answer.events[-2]["usage"] if stream else answer.body["usage"]
    place = {"provider": provider, "endpoint": "/v1/messages"}
    assert await value(gateway, "requests_total", **place, status="200") == 1
    assert await value(gateway, "request_duration_seconds_count", **place) == 1
    assert 0 < await value(gateway, "request_duration_seconds_sum", **place) < 5
    assert await value(gateway, "time_to_first_token_seconds_count", provider=provider) == stream
    assert await value(gateway, "tokens_total", provider=provider, direction="input") == usage["input_tokens"]
    assert await value(gateway, "tokens_total", provider=provider, direction="output") == usage["output_tokens"]
    assert [name for name, _ in await scraped(gateway) if name.endswith("_created")] == []


async def test_first_token_is_before_the_last(gateway: Served) -> None:
    """The time to the first token ends with the first delta, not with the answer."""
    await gateway.ask("openai", f"{SIX} [slow 0.05]", stream=True)
    await gateway.gateway.idle.wait()
    first = await value(gateway, "time_to_first_token_seconds_sum", provider="openai")
    whole = await value(gateway, "request_duration_seconds_sum", provider="openai", endpoint="/v1/messages")
    assert 0 < first < whole - 0.05


@pytest.mark.parametrize(
    ("text", "status", "kind"),
    [
        ("[error 429]", "429", "rate_limit_error"),
        ("[error 500]", "502", "provider_error"),
        ("[error 529]", "503", "overloaded_error"),
        (f"{SIX} [reset]", "200", "provider_error"),
    ],
)
async def test_errors(gateway: Served, text: str, status: str, kind: str) -> None:
    """An error counts by its type, also one at the end of a stream that began with a 200."""
    await gateway.ask("groq", text, stream=True)
    await gateway.gateway.idle.wait()
    assert await value(gateway, "errors_total", provider="groq", type=kind) == 1
    assert await value(gateway, "requests_total", provider="groq", endpoint="/v1/messages", status=status) == 1


async def test_tokens_of_a_cache(gateway: Served) -> None:
    """Tokens written to a cache and read from it are directions of their own."""
    long = {"type": "text", "text": "word " * 3000, "cache_control": {"type": "ephemeral"}}
    for _ in range(2):
        await gateway.ask("anthropic", system=[long])
    written = await value(gateway, "tokens_total", provider="anthropic", direction="cache_write")
    read = await value(gateway, "tokens_total", provider="anthropic", direction="cache_read")
    assert written == read > 1000


async def test_streams_in_progress(gateway: Served, sandbox: Sandbox) -> None:
    """A stream is in progress until it ends, or its caller goes away, which counts as 499."""
    assert await value(gateway, "streams_in_progress") == 0
    async with gateway.raw(post_bytes(body_of("openai", f"{SIX} [hang]", stream=True))) as (reader, _):
        await asyncio.wait_for(reader.readuntil(b"message_start"), 5)
        assert await value(gateway, "streams_in_progress") == 1
    await asyncio.wait_for(gateway.gateway.idle.wait(), 5)
    assert await value(gateway, "streams_in_progress") == 0
    assert await value(gateway, "requests_total", provider="openai", endpoint="/v1/messages", status="499") == 1


async def test_a_caller_that_goes_after_the_end_has_its_answer(serve: Serve, listen: Listen) -> None:
    """A caller that hangs up once the stream is whole is none that went away, however long the provider lingers."""
    whole = (
        b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":"Hi"}}]}\n\n'
        b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}\n\ndata: [DONE]\n\n'
    )

    async def linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head + b"%x\r\n%b\r\n" % (len(whole), whole))
        await reader.read()

    gateway = await serve(providers={"openai": {"base_url": await listen(linger)}})
    async with gateway.raw(post_bytes(body_of("openai", stream=True))) as (reader, _):
        await asyncio.wait_for(reader.readuntil(b"\r\n0\r\n\r\n"), 5)
    await asyncio.wait_for(gateway.gateway.idle.wait(), 5)
    assert await value(gateway, "requests_total", provider="openai", endpoint="/v1/messages", status="200") == 1


async def test_repeats(serve: Serve, listen: Listen, credentials: Path) -> None:
    """A request that went to the same provider again counts by its reason: a field was refused, a token had run out."""
    refused = b'{"error":{"message":"Unsupported parameter: top_p","param":"top_p","type":"invalid_request_error"}}'
    answered = b'{"choices":[{"message":{"content":"Hi"},"finish_reason":"stop"}]}'
    answers = iter([http_answer(refused, "400 No"), http_answer(answered)])

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await hear(reader):
            writer.write(next(answers))

    log_in(credentials, access_token="bad-token", refresh_token="good")
    gateway = await serve(providers={"openai": {"base_url": await listen(talk)}})
    assert (await gateway.ask("openai", top_p=0.5)).headers["X-Vai-Dropped"] == "top_p"
    await gateway.ask("gemini-oauth")
    assert await value(gateway, "upstream_retries_total", provider="openai", reason="field") == 1
    assert await value(gateway, "upstream_retries_total", provider="gemini-oauth", reason="token") == 1


async def test_limits(gateway: Served) -> None:
    """Limits count what they refuse by their scope, and what passes while their store is down."""
    for scope in ("caller", "caller", "global"):
        gateway.gateway.metrics.rate_limited(scope)
    gateway.gateway.metrics.limits_unshared()
    assert await value(gateway, "rate_limit_hits_total", scope="caller") == 2
    assert await value(gateway, "rate_limit_hits_total", scope="global") == 1
    assert await value(gateway, "rate_limits_unshared_total") == 1


# == What is not =======================================================================================================


async def test_series_are_bounded(gateway: Served) -> None:
    """Whatever callers make up, there are no more series than before, and none holds a word of it."""
    draw = random.Random(7)

    async def visit(number: int) -> None:
        mark = f"marker-{number}"
        body: Any = body_of(draw.choice(PROVIDERS), f"{mark} [error 404]")
        body["model"] = draw.choice([f"{mark}/gpt-4o", mark, f"openai/{mark}", f"groq/{mark}", f"smart-{mark}"])
        method = draw.choice(["GET", "POST", "PUT", "DELETE", "OPTIONS", "REPORT"])
        path = draw.choice(["/v1/messages", f"/v1/{mark}", f"/{mark}", f"/v1/models?x={mark}", f"/metrics/{mark}"])
        headers = {"User-Agent": mark, "Origin": f"http://{mark}", "X-Request-ID": mark}
        await gateway.send(method, path, json=body, headers=headers, key=draw.choice([KEY, mark]))

    for number in range(0, 400, 20):
        await asyncio.gather(*map(visit, range(number, number + 20)))
    await scraped(gateway)  # which is a request, too
    before = (await scraped(gateway)).keys()
    for number in range(400, 600, 20):
        await asyncio.gather(*map(visit, range(number, number + 20)))
    after = await scraped(gateway)
    assert after.keys() == before
    assert len(after) < 500
    assert "marker" not in str(after)
    assert {dict(labels).get("provider", "other") for _, labels in after} <= {*PROVIDERS, "other"}


async def test_unknown_provider_is_other(gateway: Served) -> None:
    """A provider that vai does not know has no label of its own."""
    assert (await gateway.post(body_of("openai") | {"model": "mistral/large"})).status == 400
    assert await value(gateway, "requests_total", provider="other", endpoint="/v1/messages", status="400") == 1
    assert await value(gateway, "errors_total", provider="other", type="invalid_request_error") == 1


async def test_no_secrets(gateway: Served) -> None:
    """No key, prompt, query or name of a caller is in it."""
    await gateway.ask("openai", "marker-in [say marker-out]", headers={"X-Provider-Key-OpenAI": "marker-key-123"})
    await gateway.ask("openai", "[error 401] marker", headers={"X-Provider-Key-OpenAI": "marker-key-123"})
    text = (await gateway.get("/metrics?api_key=marker", key=None)).raw
    assert not [word for word in ("marker", KEY, "alice", "sandbox-") if word in text]


# == Who may see it ====================================================================================================


async def test_off(serve: Serve) -> None:
    """Switched off there is no such page, and everything else works."""
    gateway = await serve(metrics={"enabled": False})
    assert (await gateway.ask("openai", stream=True)).status == 200
    answer = await gateway.get("/metrics")
    assert (answer.status, answer.error["type"], answer.error["code"]) == (404, "not_found_error", "no_metrics")
    assert "metrics.enabled" in answer.error["message"]


async def test_without_the_library(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where prometheus-client is not installed the page says which extra to install, and everything else works."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    gateway = await serve()
    assert (await gateway.ask("openai", stream=True)).status == 200
    answer = await gateway.get("/metrics")
    assert (answer.status, answer.error["code"]) == (404, "no_metrics")
    assert "pip install 'vai[metrics]'" in answer.error["message"]


async def test_require_key(serve: Serve) -> None:
    """With `require_key` it is for callers alone."""
    gateway = await serve(metrics={"require_key": True})
    for key, status in ((None, 401), ("wrong-key", 401), (KEY, 200)):
        assert (await gateway.get("/metrics", key=key)).status == status


async def test_rebinding(serve: Serve) -> None:
    """Without keys on this machine, a page of another name's does not get at it."""
    gateway = await serve(auth={"mode": "none"})
    assert (await gateway.get("/metrics", headers={"Host": "evil.test"})).status == 403
    assert (await gateway.get("/metrics")).status == 200


async def test_two_gateways_do_not_mix(serve: Serve) -> None:
    """Each app has its own registry."""
    first, second = await serve(), await serve()
    await first.ask("openai")
    place = {"provider": "openai", "endpoint": "/v1/messages", "status": "200"}
    assert (await value(first, "requests_total", **place), await value(second, "requests_total", **place)) == (1, 0)
