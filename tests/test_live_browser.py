"""A page in a real browser, whose microphone is a recording, holds a conversation."""

from __future__ import annotations

import asyncio
import shutil
import urllib.parse
from pathlib import Path

import pytest
from aiohttp import web
from conftest import JSON, KEY, ROOT, Serve

import sandbox as played
import voice
from sandbox import Sandbox

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
TELL = """
<script>
  const told = [];
  let played = 0;
  talk(Object.fromEntries(new URLSearchParams(location.search)), (event, { speaker, say }) => {
    told.push(event);
    if (event.type !== "audio.done") return;
    played = speaker.played;
    say({ type: "session.close" });
  }).then(closed => ({ ...closed, played, told }), fault => ({ fault: String(fault) }))
    .then(result => fetch("/told", { method: "POST", body: JSON.stringify(result) }));
</script>
"""
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"),
    *("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"),
    "--autoplay-policy=no-user-gesture-required",
)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
async def test_a_page_talks(serve: Serve, sandbox: Sandbox, tmp_path: Path) -> None:
    """It opens the microphone and a socket, is heard, hears the answer, and says how much of it was played."""
    assert BROWSER
    sound = bytes(48_000) + played.speech("one two three four five six seven", 48_000)
    (tmp_path / "said.wav").write_bytes(voice.wav(sound, 48_000))
    sandbox.transcripts.append("[say Hello, you there.]")  # a browser's filters leave nothing of the hidden words
    told: asyncio.Future[JSON] = asyncio.get_running_loop().create_future()

    async def page(request: web.Request) -> web.StreamResponse:
        return web.Response(text=(ROOT / "examples" / "live.html").read_text() + TELL, content_type="text/html")

    async def tell(request: web.Request) -> web.Response:
        told.set_result(await request.json())
        return web.Response()

    app = web.Application()
    app.router.add_get("/", page)
    app.router.add_post("/told", tell)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    origin = f"http://127.0.0.1:{runner.addresses[0][1]}"
    gateway = await serve(cors={"allowed_origins": [origin]}, live={"detector": "energy"})
    asked = {"gateway": gateway.url.replace("http", "ws"), "key": KEY, "model": "openai/gpt-4o"}
    browser = await asyncio.create_subprocess_exec(
        *(BROWSER, *FLAGS, f"--use-file-for-fake-audio-capture={tmp_path / 'said.wav'}%noloop"),
        *(f"--user-data-dir={tmp_path / 'profile'}", f"{origin}/?{urllib.parse.urlencode(asked)}"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        result = await asyncio.wait_for(told, 40)
    finally:
        browser.kill()
        await browser.wait()
        await runner.cleanup()
    assert "fault" not in result, result
    assert (result["code"], result["protocol"]) == (1000, "vai.live")
    events = {event["type"]: event for event in result["told"]}
    assert events["input.committed"]["transcript"] == "[say Hello, you there.]"
    assert events["session.closed"]["reason"] == "client"
    said = [event["delta"].get("text", "") for event in result["told"] if event["type"] == "content_block_delta"]
    assert "".join(said) == "Hello, you there."
    assert result["played"] == pytest.approx(events["audio.done"]["duration_ms"] / 1000, abs=0.3)
