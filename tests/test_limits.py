"""Who may ask how often and for what, alone and through Redis; and callers who are slow, or no HTTP clients at all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
import pytest
from conftest import (
    KEY,
    LIVE,
    UPGRADE,
    Answer,
    Launch,
    Listen,
    Logged,
    Serve,
    Served,
    body_of,
    canned,
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
@example([("a", 0.0), ("a", 0.4), ("a", 59.95), ("a", 0.0)], 2, 9, 0.1)
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
    """A flood of callers takes bounded memory: who was quiet for longest is forgotten, one at a time."""
    limiter = Limiter(most=1000)
    tracemalloc.start()
    for number in range(20_000):
        limiter.admit(f"ip:{number}", 1, number / 1000)
        if number % 500 == 0:
            last = limiter.admit("busy", 1_000_000, number / 1000)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(limiter) == 1000
    assert size < 800 * 1000  # 65,536 of them are at most 50 MiB
    assert last.remaining == 1_000_000 - 40
    assert [limiter.admit(f"ip:{number}", 1, 20.0).refused for number in (19_999, 0)] == ["caller", ""]


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
        answer = await gateway.post(
            body_of("openai"), key=str(TWO[1]["key"]), headers={"X-Forwarded-For": f"1.2.3.{number}"}
        )
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


# == Redis =============================================================================================================

StartRedis: TypeAlias = Callable[[], Awaitable[subprocess.Popen[bytes]]]
redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("redis", reason="the extra `redis` is not installed")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is tried again soon."""
    monkeypatch.setattr(SharedLimiter, "PAUSE", 0.05)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is slow now and then is no failure."""
    monkeypatch.setattr(SharedLimiter, "PATIENCE", 1000)


@pytest.fixture
def redis_url(tmp_path: Path) -> str:
    return f"unix://{tmp_path}/redis.sock"


def redis_server(path: Path) -> subprocess.Popen[bytes]:
    """A Redis that listens on this socket only, and keeps nothing."""
    path.unlink(missing_ok=True)
    command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no"]
    return subprocess.Popen(command, cwd=path.parent, stdout=subprocess.DEVNULL)


@pytest.fixture
async def start_redis(library: Any, redis_url: str) -> AsyncIterator[StartRedis]:
    """Starts a Redis that answers at `redis_url`."""
    started: list[subprocess.Popen[bytes]] = []
    path = Path(redis_url.removeprefix("unix://"))

    async def start() -> subprocess.Popen[bytes]:
        started.append(redis_server(path))
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_unix_connection(path)
                    writer.close()
                    return started[-1]
                await asyncio.sleep(0.01)

    yield start
    for process in started:
        process.kill()
        process.wait()


async def connected(*gateways: Served) -> None:
    async with asyncio.timeout(10):
        for gateway in gateways:
            await gateway.gateway.rates.shared.connected.wait()


@redis
@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(1, 5), st.integers(1, 6), st.sampled_from([1_700_000_000.0, 1_700_000_000.9]))
def test_window_in_redis(scripted: Any, steps: list[tuple[str, float]], rpm: int, total: int, now: float) -> None:
    """The script in Redis says of any sequence what the window in this process says."""
    script, forget = scripted
    forget()
    limiter = Limiter(total)
    for caller, pause in steps:
        now += pause
        verdict = limiter.admit(caller, rpm, now)
        refused, counted, wait = script([caller, "all"], [rpm, total, repr(now)])
        assert ("", "caller", "global")[refused] == verdict.refused
        assert max(verdict.limit - counted, 0) == verdict.remaining
        assert abs(wait / 1000 - verdict.reset) <= 1.01


Scripted: TypeAlias = tuple[Callable[[list[str], list[Any]], Any], Callable[[], Any]]


@pytest.fixture(scope="module")
def redis_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    library = pytest.importorskip("redis", reason="the extra `redis` is not installed")
    path = tmp_path_factory.mktemp("redis") / "s"
    process = redis_server(path)
    client = library.Redis(
        unix_socket_path=str(path), retry=library.retry.Retry(library.backoff.ConstantBackoff(0.02), 500)
    )
    yield client
    client.close()
    process.kill()
    process.wait()


def timed(client: Any, script: str) -> Scripted:
    """The script, with the time as its last argument; and what clears Redis."""
    clock = "local time = redis.call('TIME')\nlocal now = time[1] + time[2] / 1000000\n"
    assert clock in script
    script = client.register_script(script.replace(clock, "local now = tonumber(ARGV[#ARGV])\n"))
    return lambda keys, args: script(keys=keys, args=args), client.flushall


@pytest.fixture(scope="module")
def scripted(redis_client: Any) -> Scripted:
    return timed(redis_client, server.SHARED_WINDOWS)


@pytest.fixture(scope="module")
def sessions(redis_client: Any) -> Scripted:
    return timed(redis_client, server.SHARED_SESSIONS)


@redis
def test_redis_set_its_clock_back(scripted: Any) -> None:
    """A clock that is set back by an hour frees what was counted; by an instant, nothing. Forward, all."""
    script, forget = scripted
    forget()
    base = 1_700_000_000.0
    moments = [base, base, base, base - 0.5, base - 3600, base - 3600, base - 3600, base + 86_400]
    told = [script(["a", "all"], [2, 100, repr(moment)]) for moment in moments]
    assert [refused for refused, *_ in told] == [0, 0, 1, 1, 0, 0, 1, 0]
    assert all(0 < wait <= 60_000 for *_, wait in told)


@redis
async def test_limits_are_shared(serve: Serve, start_redis: StartRedis, redis_url: str, patient: None) -> None:
    """Two gateways on one Redis let a caller through as often as one would, and all callers too."""
    await start_redis()
    limits = {"caller_rpm": 100, "global_rpm": 130, "redis_url": redis_url}
    gateways = [await serve(auth={"keys": TWO}, rate_limit=limits) for _ in range(2)]
    await connected(*gateways)
    answers = await asyncio.gather(*(gateways[number % 2].get("/v1/models") for number in range(400)))
    passed = [answer for answer in answers if answer.status == 200]
    assert len(passed) == 100
    assert sorted(standing(answer)[1] for answer in passed) == list(range(100))
    refused = next(answer for answer in answers if answer.status == 429)
    assert (refused.error["code"], standing(refused)[:2]) == ("caller_rpm", (100, 0))
    assert 1 <= refused.error["retry_after"] <= 60
    bobs = [await gateways[0].get("/v1/models", key=str(TWO[1]["key"])) for _ in range(6)]
    assert [answer.status for answer in bobs] == [200] * 5 + [429]
    assert [gateway.gateway.rates.shared.passed for gateway in gateways] == [0, 0]


@redis
async def test_redis_comes_and_goes(
    serve: Serve, start_redis: StartRedis, redis_url: str, logged: Logged, impatient: None
) -> None:
    """Without Redis, from the start or later, requests pass uncounted, with one line in the log; with it they count."""
    limits = {"caller_rpm": 2, "redis_url": redis_url}
    gateway = await serve(rate_limit=limits)
    shared = gateway.gateway.rates.shared

    async def statuses(number: int) -> list[int]:
        return [(await gateway.get("/v1/models")).status for _ in range(number)]

    for _ in range(2):
        assert await statuses(4) == [200] * 4
        process = await start_redis()
        await connected(gateway)
        shared.PATIENCE = 1000
        assert (await statuses(3))[-1] == 429
        shared.PATIENCE = 5
        running = [asyncio.create_task(gateway.get("/v1/models")) for _ in range(20)]
        process.kill()
        assert {answer.status for answer in await asyncio.gather(*running)} <= {200, 429}
        async with asyncio.timeout(10):
            while shared.connected.is_set():
                await statuses(1)
    assert shared.passed >= 8
    lines = [record.getMessage() for record in logged.records if record.levelname == "WARNING"]
    assert len(lines) == 1
    assert re.fullmatch(r"Redis fails \(\w+\): limits are not shared, requests pass", lines[0])


@redis
async def test_redis_that_hangs(serve: Serve, start_redis: StartRedis, redis_url: str) -> None:
    """A Redis that stops answering delays a request or two by a little, and nobody after them."""
    process = await start_redis()
    gateway = await serve(rate_limit={"caller_rpm": 3, "redis_url": redis_url})
    await connected(gateway)
    process.send_signal(signal.SIGSTOP)
    async with asyncio.timeout(3):  # it would never answer
        answers = [await gateway.get("/v1/models") for _ in range(8)]
    assert {answer.status for answer in answers} == {200}
    assert gateway.gateway.rates.shared.passed == 8
    assert LIMIT_HEADERS[0] not in answers[0].headers


@redis
async def test_redis_that_is_late(serve: Serve, start_redis: StartRedis, redis_url: str, logged: Logged) -> None:
    """Once an overdue answer has come, requests are counted again, on the same connection; the late one has counted."""
    process = await start_redis()
    gateway = await serve(rate_limit={"caller_rpm": 4, "redis_url": redis_url})
    shared = gateway.gateway.rates.shared
    await connected(gateway)
    shared.OVERDUE = 20.0
    process.send_signal(signal.SIGSTOP)
    assert (await gateway.get("/v1/models")).status == 200
    assert (shared.passed, shared.connected.is_set()) == (1, False)
    process.send_signal(signal.SIGCONT)
    await connected(gateway)
    shared.PATIENCE = 1000
    told = [await gateway.get("/v1/models") for _ in range(4)]
    assert [(answer.status, standing(answer)[1]) for answer in told] == [(200, 2), (200, 1), (200, 0), (429, 0)]
    assert [record.levelname for record in logged.records if record.name == "vai.server"] == ["WARNING"]


SHA = b"$40\r\n" + b"a" * 40 + b"\r\n"
NONSENSE = {
    "HTTP": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "bytes": b"\0\xff\r\n\r\n",
    "endless line": b"$" * 100_000,
    "text": b"$5\r\nhello\r\n",
    "number": b":1\r\n",
    "nothing": b"*-1\r\n",
    "short": b"*2\r\n:0\r\n:1\r\n",
    "strings": b"*3\r\n$1\r\na\r\n$1\r\nb\r\n$1\r\nc\r\n",
    "refusal unknown": b"*3\r\n:-1\r\n:1\r\n:1\r\n",
    "error": b"-ERR sk-fault no such script\r\n",
    "read only": b"-READONLY You can't write against a read only replica.\r\n",
    "closed": b"",
    "silence": b"*",
}


@pytest.mark.parametrize("when", ["at once", "at the first question"])
@pytest.mark.parametrize("answer", NONSENSE.values(), ids=NONSENSE)
async def test_redis_that_talks_nonsense(
    serve: Serve, listen: Listen, logged: Logged, library: Any, answer: bytes, when: str
) -> None:
    """Whatever comes from there, requests pass, and the log does not repeat it nor the password."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while command := await reader.read(1 << 16):
            if when == "at once" or b"EVALSHA" in command:
                writer.write(answer)
                if not answer:
                    return
            elif b"SCRIPT" in command:
                writer.write(SHA)
            else:
                writer.write(b"+OK\r\n" * len(re.findall(rb"(?m)^\*\d+\r$", command)))

    url = (await listen(talk)).replace("http://", "redis://:sk-fault@")
    gateway = await serve(rate_limit={"caller_rpm": 1, "redis_url": url})
    shared = gateway.gateway.rates.shared
    if when == "at the first question":
        await connected(gateway)
    answers = await asyncio.gather(*(gateway.get("/v1/models") for _ in range(10)))
    assert {answer.status for answer in answers} == {200}
    assert shared.passed == 10
    assert "sk-fault" not in "".join([*logged.json, *logged.text])


async def test_one_line_a_minute(library: Any, tmp_path: Path, logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often Redis fails, the log says so once a minute."""
    monkeypatch.setattr(SharedLimiter, "PAUSE", 0.0)
    failures, enough = 0, asyncio.Event()
    warn = SharedLimiter._warn

    def count(self: SharedLimiter, fault: Exception) -> None:
        nonlocal failures
        failures += 1
        warn(self, fault)
        if failures == 150:
            enough.set()

    monkeypatch.setattr(SharedLimiter, "_warn", count)
    limiter = SharedLimiter(f"unix://{tmp_path}/none", 9, lambda: float(failures))
    await limiter.start(0)
    async with asyncio.timeout(20):
        await enough.wait()
    await limiter.close()
    lines = [record for record in logged.records if record.levelname == "WARNING"]
    assert len(lines) == (failures - 1) // 60 + 1


def test_redis_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without its library a `redis_url` stops the start with what to install."""
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.setenv("VAI_REDIS_URL", "redis://:sk-fault@localhost")
    monkeypatch.setenv("VAI_API_KEYS", KEY)
    with pytest.raises(SystemExit) as ended:
        server.main(["--check-config"])
    out, errors = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert errors == "vai: rate_limit.redis_url: redis is missing: pip install 'vai[redis]'\n"


def test_redis_url_is_checked(library: Any) -> None:
    """A URL that cannot be one stops the start, and is not repeated."""
    for url in ("redis://:sk-fault@host:port", "redis://host:99999999"):
        with pytest.raises(server.ConfigError, match=r"^rate_limit\.redis_url: must be redis://") as caught:
            SharedLimiter(url, 1)
        assert "sk-fault" not in str(caught.value)


# == Live sessions in Redis ============================================================================================

TOLD = st.tuples(
    st.sampled_from("abc"),
    st.integers(0, 4),  # sessions
    st.sampled_from([None, 0, 3, 6]),  # how many may be in all; None only tells
    st.sampled_from([0.0, 0.5, 9.9, 10.0, 30.0, -0.5, -3600.0]),  # seconds since the last one: clocks are set back
)


@redis
@settings(max_examples=100, deadline=None)
@given(st.lists(TOLD, max_size=12))
@example([("a", 3, 3, 0.0), ("b", 1, 3, 10.0), ("b", 1, 3, 30.0)])  # who does not say it again counts no more
@example([("a", 3, 3, 0.0), ("a", 0, None, 0.0), ("b", 3, 3, 0.0)])
def test_sessions_of_several_gateways(sessions: Scripted, steps: list[tuple[str, int, int | None, float]]) -> None:
    """A session may begin where those that gateways told of in the last seconds leave room for it; nothing adds up."""
    script, forget = sessions
    forget()
    now, lease, rows = 1_700_000_000.0, 30.0, dict[str, tuple[int, float]]()
    for gateway, here, most, pause in steps:
        now += pause
        rows = {name: row for name, row in rows.items() if now < row[1] <= now + lease + 1}
        in_all = here + sum(count for name, (count, _) in rows.items() if name != gateway)
        refused = most is not None and in_all > most
        args = [gateway, here, "" if most is None else most, repr(lease), repr(now)]
        assert script(["{vai}:live"], args) == [refused, in_all]
        if not refused:
            rows[gateway] = here, now + lease


@contextlib.asynccontextmanager
async def talking(*gateways: Served) -> AsyncIterator[None]:
    """A live session on each of these."""
    async with contextlib.AsyncExitStack() as stack:
        for gateway in gateways:
            await stack.enter_async_context(gateway.http.ws_connect(f"{gateway.url}{LIVE}", headers={"X-API-Key": KEY}))
        yield


async def upgraded(gateway: Served) -> int:
    """The status of one more."""
    try:
        async with talking(gateway):
            return 101
    except aiohttp.WSServerHandshakeError as refused:
        return refused.status


async def upgrades(gateway: Served, status: int) -> None:
    """Soon, one more is let in, or refused."""
    async with asyncio.timeout(10):
        while await upgraded(gateway) != status:
            pass


async def active(*gateways: Served) -> list[int]:
    return [(await gateway.get("/health", key=None)).body["live"]["active"] for gateway in gateways]


ONE_EACH = {"max_sessions": 2, "detector": "energy"}


@redis
@pytest.mark.parametrize("limited", [True, False])
async def test_sessions_are_shared(
    serve: Serve, start_redis: StartRedis, redis_url: str, patient: None, limited: bool
) -> None:
    """Two gateways on one Redis have as many live sessions as one would, also where nobody limits requests."""
    await start_redis()
    limits = {"redis_url": redis_url, "enabled": limited}
    one, two = [await serve(live=ONE_EACH, rate_limit=limits) for _ in range(2)]
    await connected(one, two)
    async with talking(one):
        async with talking(two):
            for full in (one, two):
                answer = await full.get(LIVE, headers=UPGRADE)
                assert (answer.status, answer.error["code"]) == (503, "live_sessions")
            assert await active(one, two) == [1, 1]
        await upgrades(one, 101)
    await upgrades(one, 101)
    async with asyncio.timeout(10):
        while await active(one, two) != [0, 0]:
            pass
    async with talking(two, two):
        assert await upgraded(one) == 503
    assert one.gateway.rates.shared.passed == two.gateway.rates.shared.passed == 0
    text = (await one.get("/metrics")).raw
    assert "vai_rate_limits_unshared_total 0.0" in text


@redis
async def test_a_gateway_that_died(
    serve: Serve,
    start_redis: StartRedis,
    redis_url: str,
    patient: None,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it had counts no more after a while; of a gateway that lives it does, also if Redis has lost everything."""
    monkeypatch.setattr(SharedLimiter, "RENEW", 0.05)
    process = await start_redis()
    one, two = [await serve(live=ONE_EACH, rate_limit={"redis_url": redis_url}) for _ in range(2)]
    await connected(one, two)
    async with talking(one, one):
        assert await upgraded(two) == 503
        process.kill()
        process.wait()
        await start_redis()
        await upgrades(two, 503)
        monkeypatch.setattr(SharedLimiter, "LEASE", 0.5)
        assert await one.gateway.rates.shared.begin(2, 2)
        await one.gateway.rates.shared.close()
        await upgrades(two, 101)


@redis
async def test_sessions_without_redis(
    serve: Serve, start_redis: StartRedis, redis_url: str, logged: Logged, impatient: None
) -> None:
    """While Redis is down a gateway counts its own; what began then counts as soon as Redis is there."""
    one, two = [await serve(live=ONE_EACH, rate_limit={"redis_url": redis_url}) for _ in range(2)]
    async with talking(one, two, two):
        assert await upgraded(two) == 503
        assert "vai_rate_limits_unshared_total 5.0" in (await two.get("/metrics")).raw
        await start_redis()
        await connected(one, two)
        for gateway in (one, two):
            gateway.gateway.rates.shared.PATIENCE = 1000
        await upgrades(one, 503)
    await upgrades(one, 101)
    warnings = [record.getMessage() for record in logged.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert "limits are not shared, requests pass" in warnings[0]


@redis
async def test_sessions_are_told_again(
    serve: Serve, start_redis: StartRedis, redis_url: str, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every few seconds a gateway says how many it has, so that they count for as long as they last."""
    monkeypatch.setattr(SharedLimiter, "RENEW", 0.02)
    await start_redis()
    gateway = await serve(live=ONE_EACH, rate_limit={"redis_url": redis_url})
    await connected(gateway)
    async with library.asyncio.Redis.from_url(redis_url) as client, asyncio.timeout(10):
        async with talking(gateway):
            for _ in range(2):
                await client.flushall()
                while not await client.hlen(server.SESSIONS_KEY):
                    pass
                assert 0 < await client.pttl(server.SESSIONS_KEY) <= 30_000
        while await client.exists(server.SESSIONS_KEY):
            pass


@redis
async def test_sessions_where_redis_hangs(
    serve: Serve, start_redis: StartRedis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Redis that does not answer delays a session by little; what it has missed it is told when it does.

    One that is merely late is waited for.
    """
    process = await start_redis()
    one, two = [await serve(live=ONE_EACH, rate_limit={"redis_url": redis_url}) for _ in range(2)]
    await connected(one, two)
    one.gateway.rates.shared.OVERDUE = two.gateway.rates.shared.OVERDUE = 20.0
    monkeypatch.setattr(SharedLimiter, "SECOND_CHANCE", 0.05)
    process.send_signal(signal.SIGSTOP)
    async with talking(one, one):
        process.send_signal(signal.SIGCONT)
        await connected(one, two)
        monkeypatch.setattr(SharedLimiter, "SECOND_CHANCE", 20.0)
        await upgrades(two, 503)
        process.send_signal(signal.SIGSTOP)
        late = asyncio.create_task(upgraded(two))
        while two.gateway.rates.shared.connected.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        process.send_signal(signal.SIGCONT)
        assert await late == 503


@pytest.mark.parametrize(
    "answer", [NONSENSE[name] for name in ("text", "number", "nothing", "refusal unknown", "error")]
)
async def test_nonsense_about_sessions(serve: Serve, listen: Listen, library: Any, answer: bytes) -> None:
    """Whatever Redis says, a session may begin."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while command := await reader.read(1 << 16):
            commands = len(re.findall(rb"(?m)^\*\d+\r$", command))
            writer.write(answer if b"EVALSHA" in command else SHA if b"SCRIPT" in command else b"+OK\r\n" * commands)

    url = (await listen(talk)).replace("http://", "redis://")
    gateway = await serve(live=ONE_EACH, rate_limit={"redis_url": url, "enabled": False})
    await connected(gateway)
    assert await upgraded(gateway) == 101
    assert gateway.gateway.rates.shared.passed == 1


# == Slow callers ======================================================================================================

HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
POST = f"POST /v1/messages HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("start", "drip"), [(b"", b""), (b"GET /", b"x"), (HEALTH[:-2], b"x"), (b"", b"\r\n")], ids=str
)
async def test_slow_head(serve: Serve, start: bytes, drip: bytes) -> None:
    """A connection on which no whole head of a request arrives in time is closed, however it drips."""
    gateway = await serve(timeouts={"head": 0.2})
    async with gateway.raw(start) as (reader, writer), asyncio.timeout(5):
        rest = asyncio.create_task(reader.read())
        while not rest.done():
            writer.write(drip)
            await asyncio.wait({rest}, timeout=0.05)
        with contextlib.suppress(ConnectionError):  # what dripped after the end
            assert rest.result() == b""


async def next_answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    (length,) = re.findall(rb"Content-Length: (\d+)", head)
    return head + await reader.readexactly(int(length))


async def test_slow_head_after_a_good_one(serve: Serve) -> None:
    """An open connection may be idle for longer; the deadline is for the head of the next request, once it begins."""
    gateway = await serve(timeouts={"head": 0.2})
    async with gateway.raw(HEALTH) as (reader, writer), asyncio.timeout(5):
        assert (await next_answer(reader)).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.3)
        writer.write(HEALTH)
        assert (await next_answer(reader)).startswith(b"HTTP/1.1 200")
        writer.write(HEALTH[:20])
        assert await reader.read() == b""


async def test_many_slow_heads(serve: Serve) -> None:
    """Two hundred of them are gone in time, and hold nobody up."""
    gateway = await serve(timeouts={"head": 0.3})
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(10):
        pairs = [await stack.enter_async_context(gateway.raw(b"GET / HT")) for _ in range(200)]
        assert (await gateway.ask("openai")).status == 200
        assert await asyncio.gather(*(reader.read() for reader, _ in pairs)) == [b""] * 200


async def test_body_slower_than_its_deadline_but_never_silent(serve: Serve) -> None:
    """The deadline is for the whole body: a byte now and then does not put it off."""
    gateway = await serve(timeouts={"body": 0.3})
    async with gateway.raw(f"{POST}Content-Length: 1000\r\n\r\n".encode()) as (reader, writer), asyncio.timeout(5):
        first = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
        while not first.done():
            writer.write(b" ")
            await asyncio.wait({first}, timeout=0.05)
    assert first.result().startswith(b"HTTP/1.1 408")


async def test_a_gigabyte_slowly(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload over the limit is refused from its head; what comes all the same is not read for long."""
    monkeypatch.setattr(server, "LINGER", 0.3)
    gateway = await serve()
    sent = 0
    async with gateway.raw(f"{POST}Content-Length: {1 << 30}\r\n\r\n".encode()) as (reader, writer), asyncio.timeout(8):
        assert (await reader.readline()).startswith(b"HTTP/1.1 413")
        rest = asyncio.create_task(reader.read())
        while not rest.done():
            writer.write(b"x" * 1024)
            sent += 1
            await asyncio.wait({rest}, timeout=0.02)
        with contextlib.suppress(ConnectionError):
            assert b"request_too_large" in rest.result()
    assert sent < 1000


async def test_wrong_key_is_told_before_the_body(gateway: Served) -> None:
    """Whoever has no key is refused from the head; nothing is read of a large body that waits for a word."""
    head = POST.replace(KEY, "wrong-key") + "Content-Length: 9000000\r\nExpect: 100-continue\r\n\r\n"
    async with gateway.raw(head.encode()) as (reader, _), asyncio.timeout(5):
        assert (await reader.readline()).startswith(b"HTTP/1.1 401")


async def test_requests_with_a_slow_body_count(serve: Serve) -> None:
    """A request is counted once its head is there: a caller that never ends one has none left."""
    gateway = await serve(rate_limit={"caller_rpm": 1})
    waiting = f"{POST}Content-Length: 100\r\nExpect: 100-continue\r\n\r\n".encode()
    async with gateway.raw(waiting) as (reader, _), asyncio.timeout(5):
        assert (await reader.readline()).startswith(b"HTTP/1.1 100")
        assert (await gateway.ask("openai")).status == 429


BIG = {"id": "c", "model": "m", "choices": [{"message": {"content": "x" * (12 << 20)}, "finish_reason": "stop"}]}


async def test_answer_that_nobody_reads(serve: Serve, listen: Listen) -> None:
    """A JSON answer that is not read is given up after the write timeout, as a stream is."""
    url = await listen(canned(http_answer(json.dumps(BIG).encode()), []))
    gateway = await serve(providers={"openai": {"base_url": url}}, timeouts={"write": 0.1})
    async with gateway.raw(post_bytes(body_of("openai"))) as (_, writer), asyncio.timeout(20):
        assert isinstance(writer.transport, asyncio.ReadTransport)
        writer.transport.pause_reading()
        while not writer.transport.is_closing():  # whoever writes notices a reset
            writer.write(b"\r\n")  # which may stand before a next request
            await asyncio.sleep(0.02)


async def test_answer_that_is_read_slowly(serve: Serve, listen: Listen) -> None:
    """Whoever reads, however slowly, gets it all: the timeout is for a caller that takes nothing."""
    url = await listen(canned(http_answer(json.dumps(BIG).encode()), []))
    gateway = await serve(providers={"openai": {"base_url": url}}, timeouts={"write": 0.4})
    size = 0
    async with gateway.raw(post_bytes(body_of("openai"), "Connection: close")) as (reader, _), asyncio.timeout(20):
        while part := await reader.read(1 << 20):
            size += len(part)
            await asyncio.sleep(0.015)
    assert size > 12 << 20


async def test_connections_are_capped(serve: Serve, logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what the process can serve a connection is closed at once, and the log says so once a minute.

    When one goes there is room again.
    """
    monkeypatch.setattr(server, "most_connections", lambda: 2)
    gateway = await serve()
    async with asyncio.timeout(5):
        async with gateway.raw(HEALTH) as (first, _), gateway.raw(HEALTH) as (second, _):
            for reader in (first, second):
                assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            for _ in range(2):
                async with gateway.raw(HEALTH) as (third, _):
                    with contextlib.suppress(ConnectionError):
                        assert await third.read() == b""
        answer = b""
        while not answer.startswith(b"HTTP/1.1 200"):
            with contextlib.suppress(ConnectionError):
                async with gateway.raw(HEALTH) as (reader, _):
                    answer = await reader.readline()
    assert sum("over 2 connections" in line for line in logged.text) == 1


async def test_takes_the_files_it_may_have(launch: Launch) -> None:
    """The server raises its own limit of open files, and leaves half of them for providers."""
    process = await launch()
    soft, hard = resource.prlimit(process.process.pid, resource.RLIMIT_NOFILE)
    assert soft == hard or soft == 1 << 16


# == No HTTP ===========================================================================================================

MALFORMED = {
    "nonsense": b"nonsense\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "huge line": b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
    "huge header": b"GET /health HTTP/1.1\r\nX: " + b"x" * 9000 + b"\r\n\r\n",
    "many headers": b"GET /health HTTP/1.1\r\n" + b"X: 1\r\n" * 500 + b"\r\n",
    "length and chunks": f"{POST}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode(),
    "signed length": f"{POST}Content-Length: +5\r\n\r\n12345".encode(),
    "two lengths": f"{POST}Content-Length: 5, 5\r\n\r\n12345".encode(),
    "bad chunk": f"{POST}Transfer-Encoding: chunked\r\n\r\nzz\r\n{{}}\r\n".encode(),
}


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED)
async def test_no_http(gateway: Served, logged: Logged, raw: bytes) -> None:
    """What the parser refuses is an envelope too, with nothing of the input in it, and one short line in the log."""
    answer = await gateway.raw_answer(raw)
    head, _, body = answer.partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    error = Answer(400, headers, body.decode()).error
    assert re.match(rb"HTTP/1\.[01] 400 ", answer)
    assert (error["type"], error["message"]) == ("invalid_request_error", "the request is malformed")
    assert (headers["Server"], headers["Content-Type"]) == ("vai", "application/json")
    assert "Python" not in head.decode()
    (line,) = [record for record in logged.records if record.levelname != "DEBUG"]
    assert (line.name, line.levelname, len(logged.json[-1]) < 400) == ("vai.access", "INFO", True)
    assert logged.requests[0]["request_id"] == error["request_id"]


async def test_chunk_that_is_wrong_later(gateway: Served, logged: Logged) -> None:
    """A body that turns out malformed while it is read ends the request at once, with one answer."""
    waiting = f"{POST}Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n2\r\n{{}}\r\n".encode()
    async with gateway.raw(waiting) as (reader, writer), asyncio.timeout(5):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"zz\r\n")
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.") == 1
    assert b"malformed_body" in answer
    assert [line["status"] for line in logged.requests] == [400]


@pytest.mark.parametrize("coding", ["br", "zstd"])
async def test_coding_that_no_library_reads(gateway: Served, coding: str) -> None:
    """Where aiohttp refuses a compressed body before we do, the answer is the same."""
    answer = await gateway.raw_answer(f"{POST}Content-Encoding: {coding}\r\nContent-Length: 3\r\n\r\nabc".encode())
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert (answer[9:12], error["type"], error["code"]) == (b"400", "invalid_request_error", "unsupported_encoding")


async def test_no_http_after_good_requests(gateway: Served) -> None:
    """After good requests on a connection, what is no HTTP is refused as well, and ends it."""
    async with gateway.raw(HEALTH * 2) as (reader, writer), asyncio.timeout(5):
        for _ in range(2):
            assert (await next_answer(reader)).startswith(b"HTTP/1.1 200")
        writer.write(b"nonsense\r\n\r\n" + HEALTH)
        answer = await reader.read()
    assert re.findall(rb"HTTP/1\.[01] (\d+)", answer) == [b"400"]
