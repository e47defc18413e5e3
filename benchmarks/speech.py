"""How long after its first sentence an answer is heard: the gateway's own share of it.

    python benchmarks/speech.py [--rounds 200] [--side-by-side 20] [--most MS]

A real gateway (`server.py`, no auth) on loopback, a model that writes a first sentence in one piece and then is silent,
and a speech service that answers each text at once with 0.1 s of audio; both are played by this process. Measured is

    text     from the model's first sentence, sent, to its arrival at the speech service: reading the stream, finding
             the sentence, and the handshake of a socket
    audio    from the service's first audio, sent, to its arrival at the caller
    share    both together: all that the gateway adds, whatever the model and the service take

The load generator shares the machine with the gateway, so that the numbers are upper bounds. With `--most` the exit
code is 1 if the median share, one caller at a time, is over so many milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import statistics
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from time import perf_counter

import aiohttp
from aiohttp import web
from gateway import gateway_environ, running

ROOT = Path(__file__).parent.parent
SENTENCE = "This is answer {} of them all. And"
CHUNK = base64.b64encode(bytes(4800)).decode()

Times = dict[str, dict[str, float]]  # number of the answer → what happened when


def number_in(text: str) -> str:
    return text.partition("answer ")[2].split()[0]


def upstreams(times: Times) -> web.Application:
    """The model and the speech service."""

    async def model(request: web.Request) -> web.StreamResponse:
        number = (await request.json())["messages"][-1]["content"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        def chunk(text: str, stop: str | None = None) -> bytes:
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": stop}
            return b"data: %b\n\n" % json.dumps({"id": "x", "model": "m", "choices": [choice]}).encode()

        heard = times[number]["heard"] = asyncio.Event()  # type: ignore[assignment]
        times[number]["sentence"] = perf_counter()
        await response.write(chunk(SENTENCE.format(number)))
        await heard.wait()  # type: ignore[attr-defined]
        await response.write(chunk(" the rest.", "stop") + b"data: [DONE]\n\n")
        return response

    async def speech(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(compress=False)
        await socket.prepare(request)
        async for frame in socket:
            message = json.loads(frame.data)
            context = {"context_id": message["context_id"]}
            if said := message.get("transcript"):
                if "answer" in said:
                    number = number_in(said)
                    times[number]["asked"] = perf_counter()
                    times[number]["spoken"] = perf_counter()
                await socket.send_json({"type": "chunk", "data": CHUNK, "done": False, "status_code": 206, **context})
            elif not message.get("cancel"):
                await socket.send_json({"type": "done", "done": True, "status_code": 200, **context})
        return socket

    app = web.Application()
    app.router.add_post("/chat/completions", model)
    app.router.add_get("/tts/websocket", speech)
    return app


@contextlib.asynccontextmanager
async def serving(upstream: str, **environ: str) -> AsyncIterator[tuple[str, int]]:
    """`server.py` in a process of its own, with model and speech played by `upstream`: its address and pid."""
    command = [str(ROOT / "server.py"), "--auth", "none", "--port", "0", "--log-level", "error"]
    with tempfile.TemporaryDirectory() as folder:
        played = {"VAI_OPENAI_BASE_URL": upstream, "VAI_CARTESIA_BASE_URL": upstream, "CARTESIA_API_KEY": "any"}
        environ = gateway_environ(upstream, folder) | played | environ
        async with running("gateway", set(), command, env=environ, cwd=folder) as served:
            yield served


async def answer(http: aiohttp.ClientSession, url: str, number: str, times: Times) -> None:
    """One spoken answer, to its end."""
    body = {"model": "openai/m", "stream": True, "voice": {"output": {"format": "pcm"}}}
    body["messages"] = [{"role": "user", "content": number}]
    times[number] = {}
    async with http.post(f"{url}/v1/messages", json=body) as response:
        assert response.status == 200, await response.text()
        raw = b""
        async for piece in response.content.iter_any():
            raw = raw[-40:] + piece
            if "audible" not in times[number] and b"event: audio_delta" in raw:
                times[number]["audible"] = perf_counter()
                times[number]["heard"].set()  # type: ignore[attr-defined]
            if b"event: error" in raw or b"event: audio_error" in raw:
                raise SystemExit(f"an answer went wrong: {raw!r}")


def row(name: str, times: Times, first: int) -> float:
    """Prints the spread; gives the median share in milliseconds."""
    kept = [one for number, one in times.items() if int(number) >= first]
    text = [1000 * (one["asked"] - one["sentence"]) for one in kept]
    audio = [1000 * (one["audible"] - one["spoken"]) for one in kept]
    share = [a + b for a, b in zip(text, audio, strict=True)]
    columns = [
        f"{statistics.median(each):8.2f} {sorted(each)[int(len(each) * 0.99)]:8.2f}" for each in (text, audio, share)
    ]
    print(f"{name:24}", *columns, sep="  ")
    return statistics.median(share)


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--side-by-side", type=int, default=20)
    parser.add_argument("--most", type=float, metavar="MS")
    options = parser.parse_args()
    times: Times = {}
    runner = web.AppRunner(upstreams(times), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        upstream = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with serving(upstream) as (url, _), aiohttp.ClientSession() as http:
            for number in range(10):  # not counted
                await answer(http, url, str(number), times)
            print("milliseconds: median and 99th percentile")
            print(f"{'':24}", *(f"{name:>17}" for name in ("text", "audio", "share")), sep="  ")
            for number in range(10, 10 + options.rounds):
                await answer(http, url, str(number), times)
            alone = row("one at a time", times, 10)
            first = 10 + options.rounds
            numbers = iter(range(first, first + options.rounds))

            async def caller() -> None:
                for number in numbers:
                    await answer(http, url, str(number), times)

            await asyncio.gather(*(caller() for _ in range(options.side_by_side)))
            row(f"{options.side_by_side} side by side", times, first)
    finally:
        await runner.cleanup()
    if options.most is not None and alone > options.most:
        raise SystemExit(1)


if __name__ == "__main__":
    asyncio.run(main())
