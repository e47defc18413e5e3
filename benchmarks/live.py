"""What a live session's own share of a conversation's delays is, how many fit into a process, and what each weighs.

    python benchmarks/live.py [--sessions 1 100 200] [--seconds 20] [--detector energy] [--most MS]

A real gateway (`server.py`, no auth) on loopback; a model, a speech service that hears and one that speaks, all of them
instant, are played by this process, and so are the clients: 24 kHz both ways, frames of 20 ms, in real time. Each
client says something for 0.8 s (words, where espeakng-loader is installed, else a tone, which only `energy` takes for
speech), is silent, hears three seconds of an answer (every other one interrupts it after half a second), and begins
again, all the time sending what its microphone hears. Measured are, in milliseconds,

    commit   from the end of the speech to `input.committed`, besides `silence_duration_ms`, with no fast model to ask
    audio    from the speech service's first audio, sent, to its arrival at the client
    flush    from the client's `input.interrupt` to `audio.flush`
    late     how much later than it is to be heard a piece of audio arrives: beyond 0 the client has run out of it

and for the process its share of one core (without the process of a neural detector) and its memory per session. The
load generator shares the machine with the gateway, so that the numbers are upper bounds. With `--most` the exit code is
1 if the 99th percentile of commit, audio or flush with the first number of sessions is over so many milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import math
import statistics
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import aiohttp
from aiohttp import web
from gateway import cpu_seconds
from speech import serving

sys.path.insert(0, str(Path(__file__).parent.parent))

import voice
from benchmarks import sounds

ROOT = Path(__file__).parent.parent
RATE, FRAME = 24_000, 0.02
SILENCE = 0.6  # `silence_duration_ms`, in seconds
SPOKEN, ANSWER, INTERRUPT = 0.8, 3.0, 0.5  # seconds
SIZE = 2 * round(FRAME * RATE)  # bytes
CHUNK = base64.b64encode(bytes(RATE // 10 * 2)).decode()
VAD = {"semantic_check": False, "silence_duration_ms": round(1000 * SILENCE)}
CONFIG = {
    "model": "openai/m",
    "voice": {"input": {"turn_detection": "vad"}, "vad": VAD, "grace_period": {"enabled": False}},
    "audio_in": {"sample_rate": RATE},
    "audio_out": {"sample_rate": RATE},
}


@dataclass
class Measured:
    """Milliseconds, of all sessions."""

    commit: list[float] = field(default_factory=list)
    audio: list[float] = field(default_factory=list)
    flush: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)


# == The services ======================================================================================================


def upstreams(spoken: dict[str, float]) -> web.Application:
    """The model and the speech service; when it spoke first, by the key that a client brings."""

    async def model(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        choice = {"index": 0, "delta": {"content": "This is all that there is to say of it."}, "finish_reason": "stop"}
        data = {"id": "x", "model": "m", "choices": [choice]}
        await response.write(b"data: %b\n\ndata: [DONE]\n\n" % json.dumps(data).encode())
        return response

    async def hearing(request: web.Request) -> web.WebSocketResponse:
        link = web.WebSocketResponse(compress=False)
        await link.prepare(request)
        loud = 0
        said = {"type": "transcript", "text": "Tell me more.", "is_final": False}
        async for frame in link:
            if frame.type is aiohttp.WSMsgType.BINARY:
                if frame.data.count(0) < len(frame.data) // 2:
                    loud += len(frame.data)
                    if loud - len(frame.data) < 16_000 <= loud:
                        await link.send_json(said)
            elif frame.data == "finalize":
                if loud:
                    await link.send_json({**said, "is_final": True, "duration": 1.0})
                await link.send_json({"type": "flush_done"})
                loud = 0
        return link

    async def speaking(request: web.Request) -> web.WebSocketResponse:
        link = web.WebSocketResponse(compress=False)
        await link.prepare(request)
        key = request.headers["Authorization"]
        async for frame in link:
            message = json.loads(frame.data)
            context = {"context_id": message["context_id"]}
            if message.get("transcript"):
                chunk = json.dumps({"type": "chunk", "data": CHUNK, "done": False, "status_code": 206, **context})
                spoken[key] = perf_counter()
                for _ in range(round(ANSWER / 0.1)):
                    await link.send_str(chunk)
            elif not message.get("cancel"):
                await link.send_json({"type": "done", "done": True, "status_code": 200, **context})
        return link

    app = web.Application()
    app.router.add_post("/chat/completions", model)
    app.router.add_get("/stt/websocket", hearing)
    app.router.add_get("/tts/websocket", speaking)
    return app


# == The gateway =======================================================================================================


class Gateway:
    """`server.py` in a process of its own."""

    def __init__(self, url: str, pid: int) -> None:
        self.url = url
        self._pid = pid

    @property
    def cpu(self) -> float:
        """Seconds of processor time."""
        return cpu_seconds(self._pid)

    @property
    def rss(self) -> float:
        """MiB."""
        lines = Path(f"/proc/{self._pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


# == The clients =======================================================================================================


def framed(opcode: int, payload: bytes) -> bytes:
    """A client's frame (RFC 6455, 5.2), masked with zeros."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + struct.pack("!H", size)
    return bytes([0x80 | opcode]) + length + bytes(4) + payload


def speech() -> bytes:
    if sounds.available():
        said = voice.resample(sounds.packed(sounds.spoken("Do tell me more about all of it.")), sounds.RATE, RATE)
    else:
        count = round(SPOKEN * RATE)
        said = struct.pack(f"<{count}h", *(round(9000 * math.sin(math.tau * 300 * at / RATE)) for at in range(count)))
    return said[: 2 * round(SPOKEN * RATE)]


def microphone(pcm: bytes) -> list[bytes]:
    return [framed(2, pcm[at : at + SIZE]) for at in range(0, len(pcm), SIZE)]


LOUD_FRAMES, QUIET_FRAME = microphone(speech()), framed(2, bytes(SIZE))


class Client(asyncio.Protocol):
    """One conversation, on a bare connection: what the load generator takes is missing elsewhere."""

    def __init__(self, number: int, measured: Measured, spoken: dict[str, float]) -> None:
        self._key = f"key-{number}"
        self._number = number
        self._measured = measured
        self._spoken = spoken
        self._link: asyncio.Transport | None = None
        self._data = bytearray()
        self._upgraded = False
        self._frames = 0  # that were sent
        self._pause = 75 + 37 * number % 250  # frames of silence before it speaks first: as people do, at any time
        self._until = -1  # frame with which its speech ends
        self._free = True  # to speak
        self._ended = 0.0  # when its speech had been sent
        self._asked_to_stop = 0.0
        self._due = 0.0  # when the next piece of audio is to be heard
        self._turn = number
        self.created: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def open(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").rpartition(":")
        await asyncio.get_running_loop().create_connection(lambda: self, host, int(port))
        await self.created

    def close(self) -> None:
        if self._link:
            self._link.write(framed(8, struct.pack("!H", 1000)))

    def tick(self) -> None:
        """A frame's time has passed: the microphone's next one, speech when it is its turn, else silence."""
        assert self._link
        if self._free and self._frames >= self._pause:
            self._free, self._until = False, self._frames + len(LOUD_FRAMES)
        self._link.write(LOUD_FRAMES[self._frames - self._until] if self._frames < self._until else QUIET_FRAME)
        self._frames += 1
        if self._frames == self._until:  # a microphone gives what it has recorded: this is the end of the speech
            self._ended = perf_counter()

    # -- asyncio.Protocol --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._link = cast(asyncio.Transport, transport)
        lines = ("GET /v1/messages/live HTTP/1.1", "Host: 127.0.0.1", "Upgrade: websocket", "Connection: Upgrade")
        more = ("Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")
        head = "\r\n".join([*lines, *more, f"X-Provider-Key-Cartesia: {self._key}", "", ""])
        configure = json.dumps({"type": "session.configure", "config": CONFIG}).encode()
        self._link.write(head.encode() + framed(1, configure))

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self._upgraded:
            head, end, rest = self._data.partition(b"\r\n\r\n")
            if not end:
                return
            assert head.startswith(b"HTTP/1.1 101 "), head
            self._upgraded, self._data = True, rest
        while len(self._data) >= 2:
            size, start = self._data[1], 2
            if size > 125:
                start = 4 if size == 126 else 10
                size = int.from_bytes(self._data[2:start])
            if len(self._data) < start + size:
                return
            opcode, payload = self._data[0] & 15, bytes(self._data[start : start + size])
            del self._data[: start + size]
            if opcode == 2:
                self._hear(len(payload))
            elif opcode == 1:
                self._take(json.loads(payload))
            elif opcode == 9 and self._link:
                self._link.write(framed(10, payload))

    def _hear(self, size: int) -> None:
        now, measured = perf_counter(), self._measured
        if not self._due:
            measured.audio.append(1000 * (now - self._spoken[f"Bearer {self._key}"]))
            self._due = now
        measured.late.append(1000 * (now - self._due))
        self._due = max(self._due, now) + size / (2 * RATE)

    def _take(self, event: dict[str, Any]) -> None:
        now, measured = perf_counter(), self._measured
        match event["type"]:
            case "session.created":
                self.created.set_result(None)
            case "input.committed":
                measured.commit.append(1000 * (now - self._ended - SILENCE))
            case "audio.start":
                self._due, self._turn = 0.0, self._turn + 1
                if self._turn % 2:
                    asyncio.get_running_loop().call_later(INTERRUPT, self._interrupt)
            case "audio.flush":
                measured.flush.append(1000 * (now - self._asked_to_stop))
            case "turn.metrics":
                self._free = True
            case "error":
                print(f"a session went wrong: {event}", file=sys.stderr)

    def _interrupt(self) -> None:
        if self._link and not self._link.is_closing():
            self._asked_to_stop = perf_counter()
            self._link.write(framed(1, b'{"type":"input.interrupt"}'))


async def talk(clients: Sequence[Client], seconds: float) -> None:
    """All microphones, in real time; their frames are spread over the time of one."""
    shares = [clients[at::10] for at in range(10)]
    began = perf_counter()
    for number in range(round(seconds / FRAME * 10)):
        await asyncio.sleep(max(0.0, began + number * FRAME / 10 - perf_counter()))
        for client in shares[number % 10]:
            client.tick()


def spread(values: list[float]) -> str:
    if not values:
        return f"{'':>15}"
    return f"{statistics.median(values):7.1f} {percentile(values):7.1f}"


def percentile(values: list[float], part: float = 0.99) -> float:
    return sorted(values)[min(int(len(values) * part), len(values) - 1)]


async def measure(count: int, seconds: float, detector: str, upstream: str, spoken: dict[str, float]) -> Measured:
    """Prints a row."""
    measured = Measured()
    async with serving(upstream, VAI_LIVE_DETECTOR=detector) as (url, pid):
        served = Gateway(url, pid)
        first = Client(-1, Measured(), spoken)  # what is made once is not a session's
        await first.open(served.url)
        await talk([first], 6)
        first.close()
        before = served.rss
        clients = [Client(number, measured, spoken) for number in range(count)]
        for at in range(0, count, 20):
            await asyncio.gather(*(client.open(served.url) for client in clients[at : at + 20]))
        cpu, began = served.cpu, perf_counter()
        await talk(clients, seconds)
        busy = (served.cpu - cpu) / (perf_counter() - began)
        weight = (served.rss - before) / count
        for client in clients:
            client.close()
        await asyncio.sleep(1)
    late = [max(0.0, value) for value in measured.late]
    columns = [spread(each) for each in (measured.commit, measured.audio, measured.flush)]
    worst = f"{percentile(late):7.1f} {max(late, default=0.0):7.1f}"
    print(
        f"{count:>8}", *columns, worst, f"{100 * busy:5.0f} %", f"{weight:6.2f}", f"{len(measured.commit):6}", sep="  "
    )
    return measured


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 100, 200])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--detector", default="energy", choices=["auto", "onnx", "pysilero", "energy"])
    parser.add_argument("--most", type=float, metavar="MS")
    options = parser.parse_args()
    spoken: dict[str, float] = {}
    runner = web.AppRunner(upstreams(spoken), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    upstream = f"http://127.0.0.1:{runner.addresses[0][1]}"
    print("milliseconds: median and 99th percentile, of late 99th percentile and the most; MiB for each session")
    names = "".join(f"{name:>17}" for name in ("commit", "audio", "flush", "late"))
    print(f"{'sessions':>8}{names}  {'busy':>7}  {'memory':>6}  {'turns':>6}")
    try:
        done = [await measure(n, options.seconds, options.detector, upstream, spoken) for n in options.sessions]
    finally:
        await runner.cleanup()
    if options.most is not None:
        worst = max(percentile(values) for values in (done[0].commit, done[0].audio, done[0].flush))
        raise SystemExit(worst > options.most)


if __name__ == "__main__":
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(main())
