"""What an operator has: several processes, a container's health check, what the start and the log say."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib.util
import json
import os
import re
import resource
import signal
import socket
import sys
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
import pytest
from aiohttp import web
from conftest import KEY, LIVE, ROOT, Launch, Logged, Process, Serve, Served, body_of, post_bytes
from prometheus_client.mmap_dict import MmapedDict

import server
from sandbox import Sandbox

WORKER = "GunicornUVLoopWebWorker" if importlib.util.find_spec("uvloop") else "GunicornWebWorker"
CLOSE = {"Connection": "close"}
Gunicorn: TypeAlias = Callable[..., Awaitable[Process]]


# == Several processes =================================================================================================


@pytest.fixture
async def gunicorn(environ: dict[str, str], http: aiohttp.ClientSession, tmp_path: Path) -> AsyncIterator[Gunicorn]:
    """Starts `gunicorn server:app` with two workers and waits until both are there, or until it has ended."""
    started: list[Process] = []

    async def run(**more: str) -> Process:
        flags = ("-k", f"aiohttp.{WORKER}", "-w", "2", "-b", "127.0.0.1:0", "--graceful-timeout", "20")
        (tmp_path / "metrics").mkdir(exist_ok=True)
        shared = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics"), "HOME": str(tmp_path)}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gunicorn", "server:app", *flags, "--chdir", str(tmp_path)),
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environ, **shared, **more},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        new = Process(process, Served("", http))
        new.readers += [asyncio.create_task(new.read_out()), asyncio.create_task(new.read_errors())]
        started.append(new)
        async with asyncio.timeout(30):
            while sum("ready: " in line for line in new.errors) < 2 and process.returncode is None:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        address = re.search(r"Listening at: (\S+)", "".join(new.errors))
        new.gateway.url = address[1] if address else ""
        return new

    yield run
    for new in started:
        if new.process.returncode is None:
            new.process.kill()
        await new.process.wait()
        await asyncio.gather(*new.readers)


def served_by(folder: Path) -> list[float]:
    """How many requests each worker has counted."""
    counts = []
    for path in folder.glob("counter_*.db"):
        rows = MmapedDict.read_all_values_from_file(str(path))
        counts.append(sum(value for key, value, *_ in rows if json.loads(key)[0] == "vai_requests"))
    return counts


async def test_two_workers(gunicorn: Gunicorn, sandbox: Sandbox, tmp_path: Path) -> None:
    """Both answer, whichever is asked for metrics has the sum, and SIGTERM lets a stream come to its end.

    Each takes all the open files that it may have.
    """
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, limits[1]))
    try:
        process = await gunicorn(VAI_API_KEYS=f"alice={KEY}")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    gateway, asked = process.gateway, 0
    workers = [int(path.stem.rpartition("_")[2]) for path in (tmp_path / "metrics").glob("counter_*.db")]
    most = 1 << 16 if limits[1] == resource.RLIM_INFINITY else limits[1]
    assert {resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] for pid in workers} == {most}
    async with asyncio.timeout(20):
        while min(served_by(tmp_path / "metrics")) == 0:
            answers = await asyncio.gather(*(gateway.ask("openai", headers=CLOSE) for _ in range(20)))
            assert {answer.status for answer in answers} == {200}
            asked += 20
    series = 'vai_requests_total{endpoint="/v1/messages",provider="openai",status="200"} '
    for _ in range(4):
        scrape = (await gateway.get("/metrics", key=None, headers=CLOSE)).raw
        assert f"{series}{asked}.0" in scrape
    assert len(served_by(tmp_path / "metrics")) == 2
    stream = asyncio.create_task(gateway.ask("openai", "[words 8] [slow 0.1]", stream=True))
    await sandbox.wait_for(asked + 1)
    assert "vai_streams_in_progress 1.0" in (await gateway.get("/metrics", headers=CLOSE)).raw
    process.signal(signal.SIGTERM)
    assert (await stream).events[-1]["type"] == "message_stop"
    assert await process.ended(15) == 0
    requests = [json.loads(line) for line in process.errors if line.startswith('{"time"') and '"request"' in line]
    assert {line["status"] for line in requests} == {200}


async def test_new_workers_for_old(gunicorn: Gunicorn, sandbox: Sandbox) -> None:
    """SIGHUP exchanges the workers: a stream of an old one ends well, and every request is answered meanwhile."""
    process = await gunicorn(VAI_API_KEYS=f"alice={KEY}")
    stream = asyncio.create_task(process.gateway.ask("openai", "[words 8] [slow 0.2]", stream=True, headers=CLOSE))
    await sandbox.wait_for(1)
    process.signal(signal.SIGHUP)
    statuses = set()
    async with asyncio.timeout(20):
        while not stream.done() or sum("ready: " in line for line in process.errors) < 4:
            statuses.add((await process.gateway.get("/health", headers=CLOSE)).status)
            statuses.add((await process.gateway.ask("groq", headers=CLOSE)).status)
    assert (await stream).events[-1]["type"] == "message_stop"
    assert statuses == {200}
    process.signal(signal.SIGTERM)
    assert await process.ended(15) == 0


async def test_live_sessions_of_a_worker(gunicorn: Gunicorn, sandbox: Sandbox) -> None:
    """One that stops lets them go on for the grace, tells them of the end, and leaves nothing open."""
    process = await gunicorn(VAI_API_KEYS=f"alice={KEY}", VAI_TIMEOUT_DRAIN="1", VAI_LIVE_DETECTOR="energy")
    url, said = process.gateway.url + LIVE, []
    async with process.gateway.http.ws_connect(url, headers={"X-API-Key": KEY}) as link, asyncio.timeout(20):
        await link.send_json({"type": "session.configure", "config": {"model": "openai/gpt-4o"}})
        process.signal(signal.SIGTERM)
        await link.send_json({"type": "input.text", "text": "[words 200]"})
        async for message in link:
            if message.type is aiohttp.WSMsgType.TEXT:
                said.append(message.json())
    assert link.close_code == 1001
    assert [event["type"] for event in said][-2:] == ["error", "session.closed"]
    assert (said[-2]["error"]["code"], said[-1]["reason"]) == ("draining", "draining")
    assert "audio.start" in [event["type"] for event in said]
    assert await process.ended(15) == 0
    assert sandbox.open == 0


async def test_who_waits_at_the_door_of_a_worker(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that stops still answers those who have connected and whom nobody has accepted yet."""
    monkeypatch.setattr(server, "HANDOVER", 0.05)
    config = server.Config.model_validate({"auth": {"keys": [{"key": KEY}]}})
    worker = server.Worker(server.make_app(config, server.make_engine(config, environ)), shutdown_timeout=0.1)
    await worker.setup()
    with contextlib.ExitStack() as stack:
        door = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        await web.SockSite(worker, door).start()
        callers = [stack.enter_context(socket.create_connection(door.getsockname())) for _ in range(20)]
        for caller in callers:
            caller.sendall(post_bytes(body_of("openai")))
        await worker.cleanup()
        for caller in callers:
            caller.settimeout(5)
            assert caller.recv(12) == b"HTTP/1.1 200"


async def test_workers_that_cannot_start(gunicorn: Gunicorn) -> None:
    """What cannot work ends gunicorn with one line of each worker; it is no loop of restarts."""
    process = await gunicorn()
    async with asyncio.timeout(20):
        await asyncio.gather(*process.readers)
        assert await process.process.wait() in (1, 3)  # 1: gunicorn stumbled over the second worker's end
    assert 1 <= sum(line.startswith("vai: auth.keys: ") for line in process.errors) <= 2
    assert "server.py" not in "".join(process.errors)  # no traceback of ours


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({}, "vai: auth.keys: several processes need a key that is configured: set VAI_API_KEYS"),
        ({"VAI_AUTH_MODE": "none"}, "vai: auth.mode none needs server.allow_open here: .*"),
        ({"VAI_API_KEYS": KEY, "VAI_OPENAI_BASE_URL": "x"}, "vai: VAI_OPENAI_BASE_URL: not an .* URL.*"),
        (
            {"VAI_API_KEYS": KEY, "PROMETHEUS_MULTIPROC_DIR": "/nonexistent"},
            "vai: PROMETHEUS_MULTIPROC_DIR: must be a folder that can be written to",
        ),
        ({"VAI_API_KEYS": "short"}, "vai: VAI_API_KEYS: auth.keys.0.key: .*"),
    ],
)
async def test_what_no_worker_can_start_with(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    line: str,
) -> None:
    """One line, and the exit code that tells gunicorn not to try again."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("VAI_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        await server.app()
    out, errors = capsys.readouterr()
    assert (ended.value.code, out) == (3, "")
    assert re.fullmatch(line, errors.rstrip("\n"))


async def test_series_of_a_dead_process(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The streams of a process that was killed are forgotten; what it counted is not."""
    count = "import prometheus_client as p; p.Gauge('vai_streams_in_progress','',multiprocess_mode='livesum').set(5)"
    count += "; p.Counter('vai_rate_limit_hits','',['scope']).labels('caller').inc(3)"
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    killed = await asyncio.create_subprocess_exec(sys.executable, "-c", count)
    assert await killed.wait() == 0
    gateway = await serve()
    text = (await gateway.get("/metrics")).raw
    assert 'vai_rate_limit_hits_total{scope="caller"} 3.0' in text
    assert "vai_streams_in_progress 5.0" not in text


# == A container =======================================================================================================


DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")


async def health_check(port: int) -> int:
    """The exit code of the Dockerfile's health check, for a gateway at this port."""
    command = ast.literal_eval(DOCKERFILE.partition(" CMD [")[2].partition("\n")[0].join(("[", "")))
    environ = {"PATH": os.environ["PATH"], "VAI_PORT": str(port)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command[1:], env=environ, stderr=asyncio.subprocess.DEVNULL
    )
    return await process.wait()


async def test_health_check(gateway: Served) -> None:
    """A container is healthy while the gateway takes requests, and not while it shuts down, nor after."""
    port = int(gateway.url.rpartition(":")[2])
    assert await health_check(port) == 0
    gateway.gateway.draining = True
    assert await health_check(port) == 1
    assert await health_check(1) == 1


def test_the_image_has_what_it_needs() -> None:
    """All modules are copied, and the extras that it installs exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    copied = set(re.search(r"(?m)^COPY (.*) \./$", DOCKERFILE)[1].split())  # type: ignore[index]
    assert {f"{module}.py" for module in project["tool"]["setuptools"]["py-modules"]} <= copied
    assert all((ROOT / name).is_file() for name in copied)
    extras = set(re.search(r"'\.\[(.*)\]'", DOCKERFILE)[1].split(","))  # type: ignore[index]
    assert extras <= project["project"]["optional-dependencies"].keys()
    assert re.search(r"(?m)^USER \d+$", DOCKERFILE)


def test_variables_exist() -> None:
    """Every variable of vai's that README and Dockerfile name is one that is read."""
    known = {option.env for option in server.OPTIONS} | {"VAI_CONFIG", "VAI_MODEL", "VAI_BASE_URL", "VAI_API_KEY"}
    known |= {name for adapter in server.PROVIDERS.values() for name in adapter.url_env}
    for text in (DOCKERFILE, (ROOT / "README.md").read_text("utf-8")):
        assert set(re.findall(r"\bVAI_[A-Z_]*[A-Z]\b", text)) - known <= {"VAI_TIMEOUT_CONNECT"}


def test_codes_are_told() -> None:
    """README has every `code` that an error of the gateway may have."""
    found: set[str] = set()
    for name in ("server.py", "live.py", "vai.py", "providers.py"):
        found |= set(re.findall(r'\bcode="([a-z_]+)"', (ROOT / name).read_text("utf-8")))
    found |= {f"{scope}_rpm" for scope in server.REFUSALS}
    readme = (ROOT / "README.md").read_text("utf-8")
    assert {code for code in found if f"`{code}`" not in readme} == {"run_timeout"}  # of the tool loop


# == What it says ======================================================================================================


async def test_health(gateway: Served) -> None:
    """All of it, in its shape."""
    body = (await gateway.get("/health", key=None)).body
    assert body.keys() == {"status", "version", "providers", "voice", "live", "uptime_seconds"}
    assert body["providers"] == {id: {"configured": True} for id in server.PROVIDERS}
    assert (body["voice"], body["live"]) == ({"cartesia": {"configured": True}}, {"active": 0, "limit": 1000})


BANNERS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {  # sections, what it says, what it does not
    "plain": (
        {},
        ["auth       api_key; keys of alice", "providers  anthropic, ", "YOUR_KEY"],
        ["warning", "key        "],
    ),
    "made": ({"auth": {}}, ["key        vai_sk_", "made for this run"], ["YOUR_KEY"]),
    "passthrough": (
        {"auth": {"mode": "passthrough"}},
        ["the callers' own provider keys", "YOUR_KEY_AT_ANTHROPIC"],
        ["OPENAI_API_KEY", "VAI_API_KEYS", "none has a key"],
    ),
    "keys that count for nothing": (
        {"auth": {"mode": "passthrough", "keys": [{"key": KEY, "models": ["openai/*"]}]}},
        ["warning    auth.mode passthrough: auth.keys, with their rpm and models, count for nothing"],
        ["alice"],
    ),
    "none": ({"auth": {"mode": "none"}}, ["none; anyone on this machine"], ["x-api-key", "warning"]),
    "open": (
        {"auth": {"mode": "none"}, "server": {"host": "0.0.0.0", "allow_open": True}},  # noqa: S104
        ["auth       none; anyone\n", "warning    other machines", "spends your money", "metrics.require_key"],
        [],
    ),
    "aliases": ({"aliases": {"smart": ["groq/a", "openai/b"]}}, ["alias      smart = groq/a, then openai/b"], []),
    "limits": (
        {"limits": {"max_body_bytes": 1 << 20, "max_tools": 3}, "timeouts": {"total": 9}},
        ["limits     body 1 MiB, 1000 messages, 3 tools; 120 s to the first byte, 9 s in all"],
        [],
    ),
    "metrics off": ({"metrics": {"enabled": False}}, ["metrics    metrics are switched off"], []),
    "metrics for callers": ({"metrics": {"require_key": True}}, ["metrics    /metrics, with a key"], []),
}


@pytest.mark.parametrize(("sections", "says", "hides"), BANNERS.values(), ids=BANNERS)
async def test_banner(
    serve: Serve, capsys: pytest.CaptureFixture[str], sections: dict[str, Any], says: list[str], hides: list[str]
) -> None:
    """The start says what is on, warns of what is dangerous, and shows a request that works; no key but one it made."""
    gateway = await serve(**sections)
    server.say_hello("http://127.0.0.1:8080", gateway.gateway, sandbox=False)
    out = capsys.readouterr().out
    assert [text for text in says if text not in out] == []
    assert [text for text in hides if text in out] == []
    assert not [word for word in (KEY, "sandbox-") if word in out]
    assert out.count("curl http://127.0.0.1:8080/v1/messages") == 1


async def test_banner_without_keys(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """Where no provider has a key it says how to give one; where some have, which have not."""
    for environ, line in (
        ({}, "  providers  none has a key: bring one with each request, or set OPENAI_API_KEY …\n"),
        (
            {"GROQ_API_KEY": "x"},
            "  providers  groq (no key for anthropic, openai, oai-resp, gemini, gemini-oauth, cerebras)\n",
        ),
    ):
        gateway = await serve(environ={"HOME": "/nonexistent", **environ})
        server.say_hello("http://127.0.0.1:8080", gateway.gateway, sandbox=False)
        assert line in capsys.readouterr().out


async def test_passthrough_process(launch: Launch) -> None:
    """The banner of a real process in passthrough mode."""
    process = await launch("--auth", "passthrough", VAI_API_KEYS="")
    assert "OPENAI_API_KEY" not in process.out
    assert (await process.gateway.ask("openai", key="my-own-key")).status == 200


async def test_text_log(gateway: Served, logged: Logged) -> None:
    """For people: time, status, how long, what was asked of whom, what it cost, who asked, and the id."""
    await gateway.ask("openai", "[say Hi]", headers={"X-Request-ID": "one"})
    await gateway.ask("openai", "[error 429]", headers={"X-Request-ID": "two"})
    await gateway.get("/nope", headers={"X-Request-ID": "three"})
    clock, took = r"\d\d:\d\d:\d\d", r" {0,4}\d+ ms"
    lines = [line for line, record in zip(logged.text, logged.records, strict=True) if record.name == "vai.access"]
    for line, pattern in zip(
        lines,
        (
            rf"{clock}  200  {took}  POST /v1/messages  openai/gpt-4o  \d+ → \d+ tokens  alice  one",
            rf"{clock}  429  {took}  POST /v1/messages  openai/gpt-4o  rate_limit_exceeded  alice  two",
            rf"{clock}  404  {took}  GET /nope  not_found_error  three",
        ),
        strict=True,
    ):
        assert re.fullmatch(pattern, line), line
    record = next(record for record in logged.records if record.name == "vai.access")
    assert "\x1b[32m200\x1b[0m" in server.TextFormatter(color=True).format(record)
