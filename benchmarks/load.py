"""What the gateway bears: many live streams at once, idle ones, callers that leave, faults without end.

    python benchmarks/load.py [--quick] [--only pace,idle,aborts,soak] [--json FILE]

Everything is on loopback and bounded. The gateway (one process, no auth) has one core; the upstream and the load share
the other. By default it runs as long as its figures need (about 14 minutes), with `--quick` about 40 seconds.

    pace     256 streams of 25 events a second each, for 60 seconds: every event carries the moment at which it was
             sent. Once against the upstream itself, once through the gateway. An event is on time if it arrives before
             the next one is due (40 ms); none may be lost or out of order. Also: the time to the first event when all
             streams begin at once, and the memory meanwhile
    idle     1,000 streams that say nothing after their first event: memory per stream
    aborts   10,000 streams, each left by its caller (FIN and RST by turns) while it flows: open files, tasks and memory
             of the gateway before and after
    soak     10 minutes of whole answers, streams and faults of every kind (errors before and within the answer, broken
             and reset connections, silence) from all providers of the sandbox: does memory, files or tasks climb?

Nothing here passes or fails by a time. The exit code is 1 only if something could not run, or an event was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from gateway import (
    LENGTH,
    MODELS,
    OPENAI_USAGE,
    PATHS,
    SSE_HEAD,
    BenchmarkError,
    conditions,
    cores,
    gateway_environ,
    loop_factory,
    packed,
    percentile,
    pin,
    running,
    say,
)

PROJECT = Path(__file__).resolve().parent.parent
INTERVAL = 0.04  # 25 events a second
BATCH = 200  # connections opened at a time


@dataclass(frozen=True)
class Plan:
    streams: int
    seconds: float
    idle: int
    aborts: int
    soak: float


FULL = Plan(streams=256, seconds=60, idle=1_000, aborts=10_000, soak=600)
QUICK = Plan(streams=256, seconds=5, idle=400, aborts=1_000, soak=12)


# == The upstream ======================================================================================================
# It answers any chat request with a stream. A word in the request says of which kind.


def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    body = {"id": "chatcmpl-Load", "object": "chat.completion.chunk", "created": 1, "model": MODELS["openai"],
            "choices": choices, "usage": None}  # fmt: skip
    return framed(b"data: %b\n\n" % packed(body))


def framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


FIRST = chunk({"role": "assistant", "content": ""})
LAST = chunk({}, "stop") + framed(
    b"data: %b\n\ndata: [DONE]\n\n"
    % packed({"id": "chatcmpl-Load", "object": "chat.completion.chunk", "choices": [], "usage": OPENAI_USAGE})
)


class Upstream(asyncio.Protocol):
    """`live N`: N events at the pace of `INTERVAL`, each with its number and the clock. `idle`: one, then silence."""

    def __init__(self) -> None:
        self._buffer = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if not found or (length and len(body) < int(length[1])):
            return
        self._buffer = b""
        wanted = re.search(rb"live (\d+)", body)
        self._transport.write(SSE_HEAD + FIRST)
        self._next(0, int(wanted[1]) if wanted else 1, asyncio.get_running_loop().time(), bool(wanted))

    def _next(self, number: int, last: int, begun: float, ends: bool) -> None:
        if self._transport.is_closing():
            return
        if number < last:
            self._transport.write(chunk({"content": f"{number} {time.monotonic():.6f} "}))
            due = begun + (number + 1) * INTERVAL
            self._timer = asyncio.get_running_loop().call_at(due, self._next, number + 1, last, begun, ends)
        elif ends:
            self._transport.write(LAST + b"0\r\n\r\n")


async def serve_upstream() -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0, backlog=1024)
    say(f"listens on http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await server.serve_forever()


async def serve_sandbox() -> None:
    sys.path.insert(0, str(PROJECT))
    from sandbox import Sandbox

    async with Sandbox(keep=10) as sandbox:
        say(f"listens on {sandbox.url}")
        await asyncio.Event().wait()


# == The gateway, and what it uses =====================================================================================


async def serve_gateway() -> None:
    """The gateway itself, which also notes the number of its tasks in a file when it gets SIGUSR1."""
    sys.path.insert(0, str(PROJECT))
    import server

    def note() -> None:
        Path(os.environ["LOAD_NOTES"]).write_text(str(len(asyncio.all_tasks())))

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, note)
    config = server.load_config({"auth.mode": "none", "server.port": "0"}, {})
    server.configure_logs(config.log)
    await server.run(config, os.environ, sandbox=False)


@dataclass(frozen=True)
class Use:
    """What a process holds: KiB of memory, open files, tasks."""

    rss: int
    files: int
    tasks: int


@dataclass(frozen=True)
class Gateway:
    url: str
    pid: int
    notes: Path

    def rss(self) -> int:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") // 1024

    async def use(self) -> Use:
        self.notes.unlink(missing_ok=True)
        os.kill(self.pid, signal.SIGUSR1)
        async with asyncio.timeout(10):
            while not (self.notes.exists() and (noted := self.notes.read_text())):  # noqa: ASYNC110  (of a process)
                await asyncio.sleep(0.01)
        return Use(self.rss(), len(os.listdir(f"/proc/{self.pid}/fd")), int(noted))

    async def settled(self, before: Use, seconds: float) -> Use:
        """What it uses once files and tasks are back where they were, or after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            now = await self.use()
            if (now.files <= before.files + 5 and now.tasks <= before.tasks + 2) or time.monotonic() > deadline:
                return now
            await asyncio.sleep(0.2)


@contextlib.asynccontextmanager
async def gateway(on: set[int], environ: dict[str, str], home: str) -> AsyncIterator[Gateway]:
    notes = Path(home) / "notes"
    command = [__file__, "--role", "gateway"]
    environ = environ | {"LOAD_NOTES": str(notes)}
    async with running("gateway", on, command, env=environ, cwd=home) as (url, pid):
        yield Gateway(url, pid, notes)


# == The load ==========================================================================================================

EVENT = re.compile(rb'"(?:text|content)":"(\d+) ([0-9.]+) "')


class Caller(asyncio.Protocol):
    """One stream: notes how late each event came, and whether any is missing."""

    def __init__(self, request: bytes, on_first: Callable[[Caller], None] | None = None) -> None:
        self._request = request
        self._on_first = on_first
        self._rest = b""
        self.sent = self.first = 0.0
        self.next = 0
        self.late: list[float] = []
        self.fault = ""
        self.begun = asyncio.Event()
        self.done = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def ask(self) -> None:
        self.sent = time.monotonic()
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        *_, self._rest = lines = (self._rest + data).split(b"\n")
        for line in lines[:-1]:
            if found := EVENT.search(line):
                if not self.first:
                    self.first = now
                    self.begun.set()
                    if self._on_first:
                        self._on_first(self)
                if int(found[1]) != self.next:
                    self.fault = self.fault or f"event {int(found[1])} where {self.next} was due"
                self.next += 1
                self.late.append(now - float(found[2]))
            elif line.startswith((b'data: {"type":"error"', b"HTTP/1.1 4", b"HTTP/1.1 5")):
                self.fault = self.fault or line.decode()[:200]
        if self._rest == b"" and lines[-3:-1] == [b"0\r", b"\r"]:
            self.done.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.begun.set()
        self.done.set()


def question(url: str, what: str, direct: bool) -> bytes:
    turns = [{"role": "user", "content": what}]
    if direct:
        path, body = PATHS["openai"], packed({"model": MODELS["openai"], "messages": turns, "stream": True})
    else:
        path, body = PATHS["anthropic"], packed({"model": f"openai/{MODELS['openai']}", "messages": turns,
                                                 "max_tokens": 1024, "stream": True})  # fmt: skip
    host = url.removeprefix("http://")
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


@contextlib.asynccontextmanager
async def callers(number: int, url: str, make: Callable[[], Caller]) -> AsyncIterator[list[Caller]]:
    """So many connections, none of which has asked anything yet."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    loop = asyncio.get_running_loop()
    group: list[Caller] = []
    try:
        for size in batches(number):
            made = await asyncio.gather(*(loop.create_connection(make, host, int(port)) for _ in range(size)))
            group += [caller for _, caller in made]
        yield group
    finally:
        for caller in group:
            caller.transport.abort()


def batches(number: int) -> Iterator[int]:
    while number > 0:
        yield min(number, BATCH)
        number -= BATCH


async def live_streams(url: str, streams: int, seconds: float, direct: bool) -> list[Caller]:
    """All streams begin at once and run to their end."""
    request = question(url, f"live {int(seconds / INTERVAL)}", direct)
    async with callers(streams, url, lambda: Caller(request)) as group:
        for caller in group:
            caller.ask()
        async with asyncio.timeout(seconds * 2 + 30):
            for caller in group:
                await caller.done.wait()
    return group


def summary(name: str, group: Sequence[Caller], events: int) -> dict[str, Any]:
    late = [delay for caller in group for delay in caller.late]
    firsts = [caller.first - caller.sent for caller in group if caller.first]
    if not late or not firsts:
        raise BenchmarkError(f"{name}: no event arrived; {group[0].fault}")
    return {
        "on_time": sum(delay <= INTERVAL for delay in late) / (events * len(group)),
        "lost": events * len(group) - len(late) + sum(bool(caller.fault) for caller in group),
        "late_p50_ms": percentile(late, 0.5) * 1e3,
        "late_p99_ms": percentile(late, 0.99) * 1e3,
        "first_p50_ms": percentile(firsts, 0.5) * 1e3,
        "first_p99_ms": percentile(firsts, 0.99) * 1e3,
    }


async def pace(plan: Plan, gate: Gateway, upstream: str) -> dict[str, Any]:
    await live_streams(gate.url, 8, 1, False)  # warm up
    idle, events = gate.rss(), int(plan.seconds / INTERVAL)
    direct = summary("directly", await live_streams(upstream, plan.streams, plan.seconds, True), events)
    before, peak = cpu_seconds(gate.pid), [idle]
    task = asyncio.create_task(live_streams(gate.url, plan.streams, plan.seconds, False))
    while not task.done():
        await asyncio.wait([task], timeout=0.5)
        peak.append(gate.rss())
    through = summary("through the gateway", await task, events)
    cpu = (cpu_seconds(gate.pid) - before) / (plan.streams * events) * 1e6
    return {"streams": plan.streams, "seconds": plan.seconds, "direct": direct, "gateway": through,
            "cpu_us_per_event": cpu, "rss_idle_kib": idle, "rss_peak_kib": max(peak)}  # fmt: skip


async def idle(plan: Plan, gate: Gateway) -> dict[str, Any]:
    request = question(gate.url, "idle", False)
    async with callers(50, gate.url, lambda: Caller(request)) as group:  # warm up
        await all_begun(group)
    await asyncio.sleep(0.5)
    before = await gate.use()
    async with callers(plan.idle, gate.url, lambda: Caller(request)) as group:
        await all_begun(group)
        held = await gate.use()
    after = await gate.settled(before, 10)
    each = (held.rss - before.rss) / plan.idle
    return {"streams": plan.idle, "kib_each": each, "before": asdict(before), "held": asdict(held),
            "after": asdict(after)}  # fmt: skip


async def all_begun(group: Sequence[Caller]) -> None:
    for start in range(0, len(group), BATCH):
        for caller in group[start : start + BATCH]:
            caller.ask()
        async with asyncio.timeout(30):
            for caller in group[start : start + BATCH]:
                await caller.begun.wait()
    if faults := [caller.fault for caller in group if not caller.first]:
        raise BenchmarkError(f"{len(faults)} streams did not begin; {faults[0]}")


async def aborts(plan: Plan, gate: Gateway) -> dict[str, Any]:
    request = question(gate.url, "live 1000", False)

    def leave(caller: Caller) -> None:
        way = caller.transport.close if random.random() < 0.5 else caller.transport.abort
        asyncio.get_running_loop().call_later(random.random() * 0.1, way)

    async def left(number: int) -> None:
        for size in batches(number):
            async with callers(size, gate.url, lambda: Caller(request, leave)) as group:
                for caller in group:
                    caller.ask()
                async with asyncio.timeout(30):
                    for caller in group:
                        await caller.done.wait()

    await left(max(500, plan.aborts // 5))  # warm up
    await asyncio.sleep(1)
    before = await gate.use()
    await left(plan.aborts)
    after = await gate.settled(before, 5)
    return {"streams": plan.aborts, "before": asdict(before), "after": asdict(after)}


# == The soak ==========================================================================================================

WANTED = (
    "Hello.", "[say all is well] now", "[words 60]", "[tool get_weather {\"city\":\"Oslo\"}]", "[think hard]",
    "[error 429 retry_after=7]", "[error 500]", "[error 503]", "[error 401]", "[error_in_stream 529]", "[break_off]",
    "[reset]", "[hang]",
)  # fmt: skip
PROVIDERS = {
    "anthropic": "claude-sonnet-5-5", "openai": "gpt-5.2", "oai-resp": "gpt-5.2", "gemini": "gemini-3-flash-preview",
    "groq": "openai/gpt-oss-120b", "cerebras": "gpt-oss-120b",
}  # fmt: skip
TOOL = {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}


async def soak(plan: Plan, gate: Gateway) -> dict[str, Any]:
    """16 callers ask for anything by chance; every hundredth second or so what the gateway uses is noted."""
    import aiohttp

    seen: Counter[str] = Counter()
    notes: list[tuple[float, Use]] = []
    begun = time.monotonic()
    until = begun + plan.soak

    async def caller(session: aiohttp.ClientSession) -> None:
        while time.monotonic() < until:
            provider, wanted = random.choice(list(PROVIDERS)), random.choice(WANTED)
            body = {"model": f"{provider}/{PROVIDERS[provider]}", "max_tokens": 1024, "stream": random.random() < 0.5,
                    "messages": [{"role": "user", "content": wanted}]}  # fmt: skip
            if "tool" in wanted:
                body["tools"] = [TOOL]
            patience = 0.3 if wanted == "[hang]" or random.random() < 0.1 else 20
            try:
                async with asyncio.timeout(patience):
                    async with session.post(f"{gate.url}/v1/messages", json=body) as answer:
                        raw = await answer.read()
                kind = "error in the stream" if b"event: error" in raw else str(answer.status)
            except TimeoutError:
                kind = "left by the caller"
            seen[kind] += 1

    async def observe() -> None:
        while time.monotonic() < until:
            await asyncio.sleep(min(1, plan.soak / 10))
            notes.append(((time.monotonic() - begun) / 60, await gate.use()))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        async with asyncio.TaskGroup() as group:
            group.create_task(observe())
            for _ in range(16):
                group.create_task(caller(session))
    later = [note for note in notes if note[0] > notes[-1][0] / 4]  # the first quarter is warm-up
    return {"minutes": notes[-1][0], "requests": dict(seen.most_common()),
            **{f"{name}_per_minute": slope([(at, getattr(use, name)) for at, use in later])
               for name in ("rss", "files", "tasks")},
            "first": asdict(later[0][1]), "last": asdict(later[-1][1])}  # fmt: skip


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares."""
    middle = sum(x for x, _ in points) / len(points)
    spread = sum((x - middle) ** 2 for x, _ in points)
    return sum((x - middle) * y for x, y in points) / spread if spread else 0.0


# == The run ===========================================================================================================


def cpu_seconds(pid: int) -> float:
    return time.clock_gettime((~pid << 3) | 2)


async def run(plan: Plan, parts: Sequence[str]) -> dict[str, Any]:
    tested, others = cores()
    pin(0, others)
    told: dict[str, Any] = {}
    for part in parts:
        say(f"{part} …", sys.stderr)
        async with contextlib.AsyncExitStack() as stack:
            home = stack.enter_context(tempfile.TemporaryDirectory())
            role = "sandbox" if part == "soak" else "upstream"
            upstream, _ = await stack.enter_async_context(running(role, others, [__file__, "--role", role]))
            environ = sandbox_environ(upstream, home) if part == "soak" else gateway_environ(upstream, home)
            gate = await stack.enter_async_context(gateway(tested, environ, home))
            if part == "pace":
                told[part] = await pace(plan, gate, upstream)
            else:
                told[part] = await {"idle": idle, "aborts": aborts, "soak": soak}[part](plan, gate)
    return told


def sandbox_environ(url: str, home: str) -> dict[str, str]:
    sys.path.insert(0, str(PROJECT))
    from sandbox import Sandbox

    played = Sandbox()
    played.url = url
    return {"HOME": home, "PATH": os.environ.get("PATH", ""), **played.environ}


def report(told: dict[str, Any]) -> str:
    lines = ["# The gateway under load", ""]
    lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in told["conditions"].items()]
    if found := told.get("pace"):
        title = f"{found['streams']} streams of {1 / INTERVAL:.0f} events a second, {found['seconds']:g} s"
        lines += ["", f"## {title}", "",
                  "| | on time | lost | late p50 ms | p99 ms | first event p50 ms | p99 ms |",
                  "|---|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
        for name in ("direct", "gateway"):
            row = found[name]
            times = " | ".join(f"{row[key]:.1f}" for key in row if key.endswith("_ms"))
            lines.append(f"| {name} | {row['on_time']:.2%} | {row['lost']} | {times} |")
        ratio = found["gateway"]["on_time"] / found["direct"]["on_time"]
        rss = f"{found['rss_idle_kib'] / 1024:.1f} MiB idle, {found['rss_peak_kib'] / 1024:.1f} MiB at most"
        lines += [
            "",
            f"On time against direct: {ratio:.2%}. CPU {found['cpu_us_per_event']:.1f} µs an event. RSS {rss}.",
        ]
    if found := told.get("idle"):
        lines += ["", f"## {found['streams']} idle streams", "", f"{found['kib_each']:.1f} KiB each.", *uses(found)]
    if found := told.get("aborts"):
        lines += ["", f"## {found['streams']} streams left by their callers", *uses(found)]
    if found := told.get("soak"):
        lines += ["", f"## {found['minutes']:.1f} minutes of mixed faults", ""]
        lines.append(", ".join(f"{number} × {kind}" for kind, number in found["requests"].items()))
        lines.append(f"A minute: {found['rss_per_minute']:+.1f} KiB RSS, {found['files_per_minute']:+.2f} files, "
                     f"{found['tasks_per_minute']:+.2f} tasks.")  # fmt: skip
        lines += uses(found)
    return "\n".join(lines) + "\n"


def uses(found: dict[str, Any]) -> list[str]:
    rows = [(name, found[name]) for name in ("before", "held", "after", "first", "last") if name in found]
    return ["", "| | RSS KiB | files | tasks |", "|---|--:|--:|--:|",
            *(f"| {name} | {use['rss']:,} | {use['files']} | {use['tasks']} |" for name, use in rows)]  # fmt: skip


ROLES = {"upstream": serve_upstream, "sandbox": serve_sandbox, "gateway": serve_gateway}
PARTS = ("pace", "idle", "aborts", "soak")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Put the gateway under load.")
    parser.add_argument("--quick", action="store_true", help="about 40 seconds instead of 14 minutes; rougher")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PARTS", help="comma-separated; of pace, idle, …")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--role", choices=tuple(ROLES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.only = options.only.split(",")
    if wrong := set(options.only) - set(PARTS):
        parser.error(f"no such part: {', '.join(wrong)}")
    return options


def main() -> int:
    options = arguments()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        if options.role:
            runner.run(ROLES[options.role]())
            return 0
        try:
            told = {"conditions": conditions()} | runner.run(run(QUICK if options.quick else FULL, options.only))
        except (BenchmarkError, TimeoutError, OSError) as fault:
            say(f"benchmark: {fault or 'timed out'}", sys.stderr)
            return 1
    say(report(told))
    if options.json:
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 1 if told.get("pace", {}).get("gateway", {}).get("lost") else 0


if __name__ == "__main__":
    raise SystemExit(main())
