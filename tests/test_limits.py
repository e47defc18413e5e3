"""Who may ask how often and for what, alone and through Redis; and callers who are slow, or no HTTP clients at all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from conftest import (
    JSON,
    KEY,
    ROOT,
    Answer,
    Launch,
    Listen,
    Logged,
    Serve,
    Served,
    body_of,
    canned,
    hear,
    http_answer,
    post_bytes,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

import server
from sandbox import Sandbox
from server import Limiter, RateLimits, SharedLimiter

# == The window ========================================================================================================

STEPS = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([0.0, 0.1, 0.4, 1.0, 7.3, 29.9, 59.95, 60.0, 61.0])))


def in_last(moments: list[float], seconds: float, now: float) -> int:
    """How many of these moments are in the last so many seconds, the oldest instant excluded: the naive model."""
    return sum(moment + seconds > now for moment in moments)


@settings(max_examples=400)
@given(STEPS, st.integers(1, 5), st.integers(1, 6), st.floats(0, 1000))
@example([("a", 0.0)] * 3 + [("a", 60.0)] * 3, 3, 6, 0.9)
def test_window_against_the_naive_model(steps: list[tuple[str, float]], rpm: int, total: int, now: float) -> None:
    """In no 60 seconds more than the limit pass, by caller and in all; what is refused was near it; waiting helps."""
    limiter = Limiter(total)
    passed: dict[str, list[float]] = {"a": [], "b": []}
    for caller, pause in steps:
        now += pause
        everybody = passed["a"] + passed["b"]
        verdict = limiter.admit(caller, rpm, now)
        if not verdict.refused:
            passed[caller].append(now)
            assert (verdict.limit, verdict.remaining) == (rpm, rpm - limiter._windows[caller].total)
            assert in_last(passed[caller], 60, now) <= rpm
            assert in_last(everybody, 60, now) < total
        elif verdict.refused == "caller":
            assert in_last(passed[caller], 61, now) >= rpm
        else:
            assert in_last(everybody, 61, now) >= total
        assert 1 <= verdict.reset <= 60
        if verdict.refused:
            now += verdict.reset
            retried = limiter.admit(caller, rpm, now)
            if not retried.refused:
                passed[caller].append(now)
            assert retried.refused in ("", {"caller": "global", "global": "caller"}[verdict.refused])


def test_no_edge_between_minutes() -> None:
    """A hundred at the end of a minute leave nothing for the first second of the next."""
    limiter, base = Limiter(), 6000.0
    first = [limiter.admit("a", 100, base + 59.9).refused for _ in range(100)]
    second = [limiter.admit("a", 100, base + 60.1).refused for _ in range(100)]
    assert (first, second) == ([""] * 100, ["caller"] * 100)
    assert limiter.admit("a", 100, base + 119.9).refused == ""


def test_a_steady_caller_gets_what_is_allowed() -> None:
    """At exactly the limit next to nothing is refused, over many minutes."""
    limiter = Limiter()
    refused = [bool(limiter.admit("a", 600, number / 10).refused) for number in range(6000)]
    assert sum(refused) <= 120  # 2 %: a second's requests come free together


def test_a_million_callers() -> None:
    """A flood of callers takes bounded memory; who is active is remembered, and a full limiter forgets one at a time."""
    limiter = Limiter(most=1000)
    tracemalloc.start()
    for number in range(50_000):
        limiter.admit(f"ip:{number}", 1, float(number))
        if number % 500 == 0:
            last = limiter.admit("busy", 1_000_000, float(number))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(limiter) == 1000
    assert size < 800 * 1000  # 65,536 of them are at most 50 MiB
    assert limiter._windows["busy"].total == 1
    assert last.remaining == 999_999


def test_entries_are_bounded() -> None:
    """A busy caller's window has 61 entries at most."""
    limiter = Limiter()
    for number in range(20_000):
        limiter.admit("a", 1 << 40, number / 50)
    assert len(limiter._windows["a"].marks) <= 2 * 61


@pytest.mark.parametrize(
    ("peer", "forwarded", "account"),
    [
        ("203.0.113.9", [], "203.0.113.9"),
        ("203.0.113.9", ["1.2.3.4"], "203.0.113.9"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6, 1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6", "1.2.3.4, 10.9.9.9"], "1.2.3.4"),
        ("10.0.0.1", [", ".join(["6.6.6.6"] * 10 + ["1.2.3.4"] + ["10.0.0.7"] * 9)], "1.2.3.4"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", ["1.2.3.4, unknown, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", ["1.2.3.4, "], "10.0.0.1"),
        ("10.0.0.1", ["1.2.3.4:5678"], "1.2.3.4"),
        ("10.0.0.1", ["[2001:db8:1:2:3::4]:5678"], "2001:db8:1:2::/64"),
        ("10.0.0.1", ["1.2.3.4.5"], "10.0.0.1"),
        ("10.0.0.1", ["1" * 5000], "10.0.0.1"),
        ("fd00::1", ["2001:db8:1:2::9"], "2001:db8:1:2::/64"),
        ("::ffff:10.0.0.1", ["::ffff:1.2.3.4"], "1.2.3.4"),
        ("2001:db8::1%eth0", [], "2001:db8::/64"),
        (None, ["1.2.3.4"], "unknown"),
    ],
)
def test_where_a_request_comes_from(peer: str | None, forwarded: list[str], account: str) -> None:
    """`X-Forwarded-For` counts as far as trusted proxies wrote it: the right-most hop that is none of them."""
    config = server.ServerSection.model_validate({"trusted_proxies": ["10.0.0.0/8", "fd00::/8"]})
    callers = server.Callers(server.AuthSection(mode="none"), loopback=False, proxies=config.trusted_proxies)

    class Headers:
        def getall(self, name: str, default: Any) -> Any:
            return forwarded if name == "X-Forwarded-For" else default

    class Request:
        remote, headers = peer, Headers()

    assert callers.address(Request()) == f"ip:{account}"  # type: ignore[arg-type]


# == Limits of a gateway ===============================================================================================

LIMIT_HEADERS = [f"X-RateLimit-{name}-Requests" for name in ("Limit", "Remaining", "Reset")]
TWO = [{"key": KEY, "name": "alice"}, {"key": "vai_sk_of-bob-9876543210", "name": "bob", "rpm": 5}]


def standing(answer: Answer) -> tuple[int, int, int]:
    limit, remaining, reset = (int(answer.headers[name]) for name in LIMIT_HEADERS)
    return limit, remaining, reset


async def test_limit_by_key(serve: Serve, sandbox: Sandbox) -> None:
    """Each key has its own limit, counted on every route; a refusal says when to come back, in three places alike."""
    gateway = await serve(auth={"keys": TWO}, rate_limit={"caller_rpm": 3})
    told = [standing(await gateway.get("/v1/models"))]
    told += [standing(await gateway.ask("openai", stream=stream)) for stream in (False, True)]
    assert [(limit, remaining) for limit, remaining, _ in told] == [(3, 2), (3, 1), (3, 0)]
    assert all(1 <= reset <= 60 for *_, reset in told)
    for stream in (False, True):
        refused = await gateway.ask("openai", stream=stream)
        error = refused.error
        assert (refused.status, error["type"], error["code"]) == (429, "rate_limit_error", "caller_rpm")
        assert refused.headers["Retry-After"] == str(error["retry_after"]) == refused.headers[LIMIT_HEADERS[2]]
        assert standing(refused)[:2] == (3, 0)
        assert 1 <= error["retry_after"] <= 60
    assert sandbox.seen == 2
    for number in range(6):
        answer = await gateway.post(body_of("openai"), key=str(TWO[1]["key"]), headers={"X-Forwarded-For": f"1.2.3.{number}"})
        assert answer.status == (429 if number == 5 else 200)
    assert (await gateway.get("/health")).status == 200


async def test_limit_in_all(serve: Serve) -> None:
    """The limit of all callers together is told apart from one's own."""
    gateway = await serve(auth={"keys": TWO}, rate_limit={"global_rpm": 2})
    keys = [KEY, str(TWO[1]["key"]), KEY]
    answers = [await gateway.get("/v1/models", key=key) for key in keys]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert (answers[2].error["code"], standing(answers[2])[:2]) == ("global_rpm", (2, 0))


async def test_waiting_as_told_succeeds(serve: Serve) -> None:
    """Whoever comes back after `Retry-After` gets through, by a clock that goes on while the day's stands still."""
    gateway = await serve()
    now = 100.25
    gateway.gateway.rates = RateLimits(server.RateLimitSection(caller_rpm=2), lambda: now)
    assert [(await gateway.get("/v1/models")).status for _ in range(2)] == [200, 200]
    for _ in range(3):
        refused = await gateway.get("/v1/models")
        now += 0.5
    assert (refused.status, refused.headers["Retry-After"]) == (429, "59")
    now += int(refused.headers["Retry-After"]) - 0.5
    assert (await gateway.get("/v1/models")).status == 200


@pytest.mark.parametrize("mode", ["none", "passthrough"])
async def test_limit_by_address(serve: Serve, mode: str) -> None:
    """Without keys of the gateway a caller is an address; behind a trusted proxy, the one it forwards for."""
    gateway = await serve(
        auth={"mode": mode}, rate_limit={"caller_rpm": 1}, server={"trusted_proxies": ["127.0.0.1", "10.0.0.0/8"]}
    )

    async def statuses(*forwarded: str) -> list[int]:
        headers = [{"X-Forwarded-For": one} if one else {} for one in forwarded]
        return [(await gateway.get("/v1/models", key="any-key", headers=one)).status for one in headers]

    assert await statuses("1.2.3.4", "1.2.3.4", "9.9.9.9, 1.2.3.4, 10.0.0.1") == [200, 429, 429]
    assert await statuses("1.2.3.5", "2001:db8::1", "2001:db8::2", "2001:db8:0:1::1") == [200, 200, 429, 200]
    assert await statuses("", "") == [200, 429]


async def test_untrusted_peers_forward_nothing(serve: Serve) -> None:
    """A header that anyone can write does not make another caller of them."""
    gateway = await serve(auth={"mode": "none"}, rate_limit={"caller_rpm": 1})
    headers = [{"X-Forwarded-For": f"1.2.3.{number}"} for number in range(3)]
    assert [(await gateway.get("/v1/models", headers=one)).status for one in headers] == [200, 429, 429]


async def test_limits_off(serve: Serve) -> None:
    """Limits can be switched off; then nothing is counted nor said of them."""
    gateway = await serve(rate_limit={"enabled": False, "caller_rpm": 1, "global_rpm": 1})
    answers = [await gateway.get("/v1/models") for _ in range(3)]
    assert [answer.status for answer in answers] == [200] * 3
    assert not any(name in answers[2].headers for name in LIMIT_HEADERS)


async def test_guessing_keys(serve: Serve, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong keys are counted by address, as long as they are guessed; the right one passes all the while."""
    assert server.FAILURES_RPM < 10_000
    monkeypatch.setattr(server, "FAILURES_RPM", 20)
    gateway = await serve()
    answers = [await gateway.get("/v1/models", key=f"guess-{number}") for number in range(25)]
    assert [answer.status for answer in answers] == [401] * 20 + [429] * 5
    assert (answers[-1].error["code"], standing(answers[-1])[:2]) == ("failures_rpm", (20, 0))
    assert answers[-1].headers["Retry-After"] == str(answers[-1].error["retry_after"])
    assert not any(name in answers[0].headers for name in LIMIT_HEADERS)
    assert (await gateway.ask("openai")).status == 200
    assert sandbox.seen == 1


# == What a key may ask for ============================================================================================

ALIASES = {"fast": "groq/llama-3.3-70b-versatile", "mini": "openai/gpt-4o-mini", "best": "openai/gpt-4o"}
ALLOWED = [
    (["openai/*", "fast"], "openai/gpt-4o", 200),
    (["openai/*", "fast"], "best", 200),
    (["openai/*", "fast"], "fast", 200),
    (["openai/*", "fast"], "groq/llama-3.3-70b-versatile", 403),
    (["openai/*", "fast"], "oai-resp/gpt-4o", 403),
    (["openai/gpt-4o"], "openai/gpt-4o-mini", 403),
    (["openai/gpt-4o"], "mini", 403),
    (["openai/gpt-4o"], "best", 200),
    (["openai/gpt-4o*"], "mini", 200),
    (["*/gpt-4o"], "oai-resp/gpt-4o", 200),
    (["OpenAI/*"], "openai/gpt-4o", 403),
    (["*"], "groq/llama-3.3-70b-versatile", 200),
    (None, "groq/llama-3.3-70b-versatile", 200),
]


@pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])
@pytest.mark.parametrize(("models", "model", "status"), ALLOWED)
async def test_models_of_a_key(
    serve: Serve, sandbox: Sandbox, models: list[str] | None, model: str, status: int, stream: bool
) -> None:
    """A key with a list is for the models on it, by name, by pattern or by an alias, whatever that stands for."""
    key = {"key": KEY, "name": "alice"} | ({"models": models} if models else {})
    gateway = await serve(auth={"keys": [key]}, aliases=ALIASES)
    answer = await gateway.post(body_of("openai", stream=stream) | {"model": model})
    assert (answer.status, sandbox.seen) == (status, int(status == 200))
    if status == 403:
        error = answer.error
        assert (error["type"], error["param"], error["code"]) == ("permission_error", "model", "model_not_allowed")
        assert model in error["message"]
