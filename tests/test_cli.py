"""The command line: what it prints, and how it ends."""

import asyncio
import json
import os
import re
import signal
import sys
import urllib.request
from pathlib import Path

import pytest

from sandbox import Sandbox

ROOT = Path(__file__).parent.parent


async def start(sandbox: Sandbox, *arguments: str, **environ: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "vai.py", *arguments),
        cwd=ROOT,
        env={**os.environ, **sandbox.environ, "PYTHONUNBUFFERED": "1", **environ},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def run(sandbox: Sandbox, *arguments: str, stdin: str = "", **environ: str) -> tuple[int | None, str, str]:
    process = await start(sandbox, *arguments, **environ)
    out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 20)
    return process.returncode, out.decode(), err.decode()


async def test_prompt_is_answered() -> None:
    """A prompt gives the text of the answer and a line end."""
    async with Sandbox() as sandbox:
        assert await run(sandbox, "[say Hello, you.]", "-m", "openai/gpt-4o") == (0, "Hello, you.\n", "")


async def test_standard_input_follows_the_prompt() -> None:
    """What is piped in is part of the prompt; `-s` is the system prompt."""
    async with Sandbox() as sandbox:
        code, _, _ = await run(sandbox, "Sum up:", "-m", "openai/gpt-4o", "-s", "Be brief.", stdin="a long text")
        body = sandbox.requests[-1].body
    assert code == 0
    assert [message["content"] for message in body["messages"]] == ["Be brief.", "Sum up:\n\na long text"]


async def test_json_prints_the_message() -> None:
    """`--json` prints the whole message."""
    async with Sandbox() as sandbox:
        code, out, _ = await run(sandbox, "--json", "-m", "anthropic/claude-sonnet-5-5", stdin="[say Hi.]")
    message = json.loads(out)
    assert (code, message["type"], message["stop_reason"]) == (0, "message", "end_turn")


async def test_models_lists_providers() -> None:
    """`vai models` says which providers have a key."""
    async with Sandbox() as sandbox:
        code, out, _ = await run(sandbox, "models", GROQ_API_KEY="")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0
    assert rows["openai"].startswith("ready")
    assert rows["groq"].startswith("no key")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["hi", "-m", "gpt-4o"], 2, "provider/model"),
        (["hi", "-m", "mistral/x"], 2, "unknown provider"),
        (["hi"], 2, "which model"),
        (["-m", "openai/gpt-4o"], 2, "no prompt"),
        (["hi", "-m", "openai/not-exist"], 1, "not-exist"),
        (["[error 500]", "-m", "openai/gpt-4o"], 1, "vai: "),
        (["[break_off]", "-m", "openai/gpt-4o"], 1, "broke off"),
        (["login", "gemini-oauth"], 2, "GEMINI_OAUTH_CLIENT_ID"),
    ],
)
async def test_error_is_one_line(arguments: list[str], code: int, says: str) -> None:
    """An error is a readable last line on standard error, and an exit code: 1 the provider's, 2 the caller's."""
    async with Sandbox() as sandbox:
        status, _, err = await run(sandbox, *arguments, VAI_MODEL="")
    assert status == code
    assert says in err.splitlines()[-1]
    assert "Traceback" not in err


async def test_interrupt_ends_with_130() -> None:
    """Ctrl-C in mid-stream lets go of the provider and ends with exit code 130."""
    async with Sandbox() as sandbox:
        process = await start(sandbox, "[hang]", "-m", "openai/gpt-4o")
        assert process.stdin is not None
        process.stdin.close()
        request = await sandbox.wait_for(1)
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), 10)
        await asyncio.wait_for(request.closed.wait(), 5)
    assert (process.returncode, err) == (130, b"")


@pytest.mark.parametrize("pasted", [False, True], ids=["redirected", "pasted"])
async def test_login_writes_credentials(tmp_path: Path, pasted: bool) -> None:
    """The consent page's redirect, followed here or pasted as an address, makes a private credentials file."""
    file = tmp_path / "login.json"
    async with Sandbox() as sandbox:
        process = await start(
            sandbox,
            *("login", "gemini-oauth"),
            GEMINI_OAUTH_CLIENT_ID="sandbox-client",
            GEMINI_OAUTH_CLIENT_SECRET="sandbox-secret",
            GEMINI_OAUTH_TOKEN_URL=f"{sandbox.url}/oauth/token",
            GEMINI_OAUTH_AUTHORIZE_URL=f"{sandbox.url}/oauth/authorize",
            GEMINI_OAUTH_CREDENTIALS_PATH=str(file),
        )
        assert process.stdout is not None
        assert process.stdin is not None
        url = ""
        while not url:
            line = (await asyncio.wait_for(process.stdout.readline(), 10)).decode()
            url = found[0] if (found := re.search(r"http\S+/oauth/authorize\S+", line)) else ""
        redirect = await asyncio.to_thread(redirect_of, url)
        if pasted:
            process.stdin.write(redirect.encode() + b"\n")
        else:
            await asyncio.to_thread(fetch, redirect)
        _, err = await asyncio.wait_for(process.communicate(), 10)
        assert (process.returncode, err) == (0, b"")
        saved = json.loads(file.read_text())
        assert file.stat().st_mode & 0o777 == 0o600
        assert {"access_token", "refresh_token", "expiry_date"} <= saved.keys()
        code, out, _ = await run(
            sandbox, "[say Logged in.]", "-m", "gemini-oauth/gemini-3.5-flash", GEMINI_OAUTH_CREDENTIALS_PATH=str(file)
        )
    assert (code, out) == (0, "Logged in.\n")


def redirect_of(url: str) -> str:
    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args: object) -> None:
            return None

    try:
        urllib.request.build_opener(Stay).open(url, timeout=5)
    except urllib.error.HTTPError as answer:
        location = answer.headers["Location"]
        answer.close()
        return str(location)
    raise AssertionError("no redirect")


def fetch(url: str) -> None:
    with urllib.request.urlopen(url, timeout=5) as page:
        assert b"close this page" in page.read()
