"""The command line: what it prints, and how it ends."""

import asyncio
import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_vai
from test_vai import JSON, PNG, World

import vai
from sandbox import Sandbox

running, world = test_vai.running, test_vai.world

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


async def test_an_error_of_the_process() -> None:
    """An error of the provider is one line on standard error and exit code 1."""
    async with Sandbox() as sandbox:
        code, _, err = await run(sandbox, "[break_off]", "-m", "openai/gpt-4o")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "broke off" in err


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


# == In this process ===================================================================================================


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Vai = Callable[..., Ended]


@pytest.fixture
def cli(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Vai:
    """Runs `vai` with these arguments and this standard input; nothing may be raised but an exit code."""
    for name in ("VAI_MODEL", "VAI_BASE_URL", "VAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str, stdin: str | bytes = "") -> Ended:
        raw = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8"))
        capsys.readouterr()
        code: Any = 0
        try:
            vai.main(arguments)
        except SystemExit as end:
            code = end.code or 0
        return Ended(code, *capsys.readouterr())

    return run


GPT = ("-m", "openai/gpt-4o")
CLAUDE = ("-m", "anthropic/claude-sonnet-4-5")


def last_line(err: str) -> str:
    """What is wrong, in one line that no traceback comes before."""
    assert "Traceback" not in err
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1 or err.startswith("usage: ")
    last = err.splitlines()[-1]
    assert re.match(r"vai( \w+)?: ", last)
    return last


@pytest.mark.parametrize(
    ("arguments", "stdin", "content"),
    [
        (["a"], "", "a"),
        ([], "b\n", "b"),
        (["a"], "b", "a\n\nb"),
        (["a"], b"\xff\xfe", "a\n\n\ufffd\ufffd"),
        (["a"], "\n \n", "a"),
    ],
)
def test_the_prompt(cli: Vai, world: World, arguments: list[str], stdin: str | bytes, content: str) -> None:
    """The argument, standard input, or one after the other."""
    assert cli(*arguments, *GPT, stdin=stdin).code == 0
    assert world.bodies[0]["messages"] == [{"role": "user", "content": content}]


def test_the_options(cli: Vai, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model from the environment, a system prompt, a limit; `--json` shows the message alone."""
    monkeypatch.setenv("VAI_MODEL", "anthropic/claude-sonnet-4-5")
    ended = cli("[say Gr\u00fc\u00dfe]", "-s", "Be brief.", "--max-tokens", "77", "--json")
    message = json.loads(ended.out)
    assert (ended.code, ended.err, message["content"]) == (0, "", [{"type": "text", "text": "Gr\u00fc\u00dfe"}])
    assert "Gr\u00fc\u00dfe" in ended.out
    assert (world.bodies[0]["system"], world.bodies[0]["max_tokens"]) == ("Be brief.", 77)


def test_models_lists_providers(cli: Vai, monkeypatch: pytest.MonkeyPatch) -> None:
    """`vai models` says which providers have a key."""
    monkeypatch.setenv("GROQ_API_KEY", "")
    ended = cli("models")
    rows = dict(line.split(maxsplit=1) for line in ended.out.splitlines())
    assert (ended.code, ended.err, list(rows)) == (0, "", [*vai.PROVIDERS, "stt", "tts"])
    assert rows["openai"].startswith("ready")
    assert rows["groq"].startswith("no key")


def test_through_a_gateway(cli: Vai, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """`VAI_BASE_URL` and `VAI_API_KEY` name it."""
    monkeypatch.setenv("VAI_BASE_URL", world.proxy)
    monkeypatch.setenv("VAI_API_KEY", "vai_sk_of_a_caller")
    assert cli("[say through]", *GPT) == Ended(0, "through\n", "")
    assert "anthropic" in cli("models").out
    monkeypatch.setenv("VAI_API_KEY", "vai_sk_of_nobody")
    ended = cli("[say through]", *GPT)
    assert (ended.code, "key" in last_line(ended.err)) == (1, True)


ATTACHED: dict[str, tuple[bytes, JSON]] = {
    "photo.png": (PNG, {"type": "image", "media_type": "image/png"}),
    "photo": (b"\xff\xd8\xff\xe0", {"type": "image", "media_type": "image/jpeg"}),
    "paper.pdf": (b"%PDF-1.7", {"type": "document", "media_type": "application/pdf"}),
    "paper": (b"%PDF-1.7", {"type": "document", "media_type": "application/pdf"}),
    "notes.txt": (b"some notes", {"type": "document", "data": "some notes"}),
    "data.json": (b"{}", {"type": "document", "data": "{}"}),
    "table.csv": (b"a,b", {"type": "document", "data": "a,b"}),
    "Makefile": (b"all:", {"type": "document", "data": "all:"}),
    "code.py": (b"print()", {"type": "document", "data": "print()"}),
    "drawing.svg": (b"<svg/>", {"type": "document", "data": "<svg/>"}),
    "run.sh": (b"echo", {"type": "document", "data": "echo"}),
}


@pytest.mark.parametrize("name", ATTACHED)
def test_attached_files(cli: Vai, world: World, tmp_path: Path, name: str) -> None:
    """Each goes before the prompt, as what it is; text goes as text, whatever its ending."""
    data, expected = ATTACHED[name]
    (tmp_path / name).write_bytes(data)
    ended = cli("[say seen]", "-a", str(tmp_path / name), *CLAUDE)
    assert ended == Ended(0, "seen\n", "")
    block, prompt = world.bodies[0]["messages"][0]["content"]
    assert prompt == {"type": "text", "text": "[say seen]"}
    assert {"type": block["type"]} | {key: block["source"][key] for key in expected if key != "type"} == expected


def test_attached_urls(cli: Vai, world: World, tmp_path: Path) -> None:
    """They are left to the provider; several attachments go in their order."""
    (tmp_path / "a.txt").write_text("text")
    urls = ("https://example.com/a.png?size=2", "https://example.com/paper.pdf")
    ended = cli("[say seen]", "-a", urls[0], "-a", str(tmp_path / "a.txt"), "--attach", urls[1], *CLAUDE)
    assert ended == Ended(0, "seen\n", "")
    blocks = world.bodies[0]["messages"][0]["content"]
    assert [block["type"] for block in blocks] == ["image", "document", "document", "text"]
    assert [blocks[0]["source"], blocks[2]["source"]] == [{"type": "url", "url": url} for url in urls]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("tool.bin", bytes(range(256)), "tool.bin"),
        ("tool", bytes(range(256)), "tool"),
        ("archive.zip", b"PK\x03\x04\xff", "archive.zip"),
        ("missing.png", None, "missing.png"),
        (".", None, "directory"),
        ("empty.txt", b"", "empty"),
    ],
)
def test_files_that_cannot_be_attached(
    cli: Vai, world: World, tmp_path: Path, name: str, data: bytes | None, says: str
) -> None:
    """One line names the file and says why; nobody is asked."""
    if data is not None:
        (tmp_path / name).write_bytes(data)
    ended = cli("look", "-a", str(tmp_path / name), *CLAUDE)
    assert (ended.code, ended.out) == (2, "")
    assert says in last_line(ended.err)
    assert not world.requests


@pytest.mark.parametrize(
    ("arguments", "environ", "code", "says"),
    [
        (["hi", "-m", "gpt-4o"], {}, 2, "provider/model"),
        (["hi", "-m", "mistral/x"], {}, 2, "unknown provider"),
        (["hi", "-m", "openai/../x"], {}, 2, "model"),
        (["hi"], {}, 2, "which model"),
        ([*GPT], {}, 2, "no prompt"),
        (["hi", *GPT, "--bogus"], {}, 2, "--bogus"),
        (["hi", *GPT, "--max-tokens", "x"], {}, 2, "max-tokens"),
        (["hi", *GPT, "--max-tokens", "0"], {}, 2, "max_tokens"),
        (["hi", *GPT, "--max-tokens", "-5"], {}, 2, "max_tokens"),
        (["login"], {}, 2, "provider"),
        (["login", "openai"], {}, 2, "gemini-oauth"),
        (["login", "gemini-oauth"], {"GEMINI_OAUTH_CLIENT_ID": ""}, 2, "GEMINI_OAUTH_CLIENT_ID"),
        (["models", "x"], {}, 2, "x"),
        (["chat"], {}, 2, "which model"),
        (["chat", "--load", "/nowhere/x.json"], {}, 2, "/nowhere/x.json"),
        (["chat", "--load", __file__], {}, 2, "cannot load"),
        (["hi", *GPT], {"VAI_BASE_URL": "localhost"}, 2, "http"),
        (["hi", *GPT], {"VAI_API_KEY": "vai_sk_1"}, 2, "VAI_BASE_URL"),
        (["hi", *GPT], {"VAI_OPENAI_BASE_URL": "nonsense"}, 2, "VAI_OPENAI_BASE_URL"),
        (["hi", *GPT], {"OPENAI_API_KEY": "two words"}, 2, "key"),
        (["hi", *GPT], {"OPENAI_API_KEY": ""}, 1, "OPENAI_API_KEY"),
        (["hi", *GPT], {"OPENAI_API_KEY": "bad-key"}, 1, "openai"),
        (["hi", "-m", "openai/not-exist"], {}, 1, "not-exist"),
        (["[error 400]", *GPT], {}, 1, "openai"),
        (["[error 400]", *GPT, "--json"], {}, 1, "openai"),
        (["[error_in_stream 400]", *GPT], {}, 1, "openai"),
        (["[break_off]", *GPT], {}, 1, "broke off"),
    ],
)
def test_errors(
    cli: Vai, monkeypatch: pytest.MonkeyPatch, arguments: list[str], environ: dict[str, str], code: int, says: str
) -> None:
    """One readable line on standard error: 2 where the caller is wrong, 1 where provider or gateway is."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    ended = cli(*arguments)
    assert ended.code == code
    assert says in last_line(ended.err)
    assert "two words" not in ended.err


@pytest.mark.parametrize("arguments", [["hi"], ["hi", *GPT, "-a", "/nowhere/x.png"], ["chat"], ["login"]])
def test_usage_errors_are_one_line_too(cli: Vai, arguments: list[str]) -> None:
    """The usage is what `--help` is for."""
    ended = cli(*arguments)
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help(cli: Vai, option: str) -> None:
    """Goes to standard output."""
    ended = cli(option)
    assert (ended.code, ended.err) == (0, "")
    assert "vai" in ended.out


def test_chat_from_a_pipe(cli: Vai, world: World, tmp_path: Path) -> None:
    """Each line is a turn, without a prompt; errors are one line each and the chat goes on; it ends with the input."""
    file, lost = tmp_path / "chat.json", tmp_path / "no" / "chat.json"
    lines = ["[say one]", "", "  [say two]  ", "[error 400]", "/model gpt-4o", "[say x]", "/model groq/llama-3.3-70b",
             "[say three]", f"/save {lost}", "/what", "/model", f"/save {file}", "/exit", "[say never]"]  # fmt: skip
    ended = cli("chat", *GPT, "-s", "Be brief.", stdin="\n".join(lines))
    assert (ended.code, ended.out) == (0, "one\ntwo\nthree\n")
    banner, *errors = ended.err.splitlines()
    assert "openai/gpt-4o" in banner
    assert [error for error in errors if error.startswith("vai: ")] == errors[:3]
    assert ("Bad request" in errors[0], "provider/model" in errors[1], str(lost) in errors[2]) == (True,) * 3
    assert len(errors) == 5
    assert [len(body["messages"]) for body in world.bodies] == [2, 4, 6, 6]  # with the system prompt

    ended = cli("chat", "--load", str(file), stdin="[say four]")
    assert (ended.code, ended.out) == (0, "four\n")
    assert ended.err.startswith("groq/llama-3.3-70b")
    assert [message["content"] for message in world.bodies[-1]["messages"]] == [
        "Be brief.", "[say one]", "one", "[say two]", "two", "[say three]", "three", "[say four]"
    ]  # fmt: skip
    assert cli("chat", "--load", str(file), *CLAUDE, "-s", "Be long.", stdin="[say five]").out == "five\n"
    assert world.bodies[-1]["system"] == "Be long."


def test_chat_takes_bytes_that_are_no_text(cli: Vai) -> None:
    """As a prompt does."""
    ended = cli("chat", *GPT, stdin=b"\xff\n[say fine]\n")
    assert (ended.code, ended.out.splitlines()[-1:]) == (0, ["fine"])


# == Processes =========================================================================================================


@contextlib.contextmanager
def terminal(world: World, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`vai` on a terminal of its own: the process, and our end of the terminal."""

    def adopt() -> None:  # Ctrl-C comes from a terminal only to the group in front of it
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    ours, theirs = pty.openpty()
    environ = {**os.environ, **world.sandbox.environ, "TERM": "dumb"}
    process = subprocess.Popen(
        [sys.executable, "vai.py", *arguments], cwd=ROOT, env=environ, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=adopt,
    )  # fmt: skip
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(ours: int, end: str) -> str:
    """What comes on a terminal up to this text."""
    seen = ""
    while end not in seen:
        try:
            data = os.read(ours, 4096)
        except OSError:  # the other end is closed
            data = b""
        assert data, f"no {end!r} in {seen!r}"
        seen += data.decode()
    return seen


def test_chat_on_a_terminal(world: World, tmp_path: Path) -> None:
    """A prompt; Ctrl-C stops an answer and not the chat, and the model is told what it had said; Ctrl-D ends it."""
    file = tmp_path / "chat.json"
    with terminal(world, "chat", *GPT) as (process, ours):
        read_until(ours, "> ")
        os.write(ours, b"[words 400][slow 0.02]\n")
        shown = read_until(ours, "0.02]\r\n")
        while len(shown.rpartition("]\r\n")[2].split()) < 3:  # words of the answer, after the echo
            shown += read_until(ours, " ")
        os.write(ours, b"\x03")
        shown += read_until(ours, "\n> ")
        world.hung_up(1)
        os.write(ours, b"/model anthropic/claude-sonnet-4-5\n")
        read_until(ours, "> ")
        os.write(ours, b"[say going on]\n")
        read_until(ours, "going on\r\n> ")
        os.write(ours, f"/save {file}\n".encode())
        read_until(ours, "> ")
        os.write(ours, b"\x04")
        assert process.wait(10) == 0
    assert "Traceback" not in shown
    turns = world.bodies[1]["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    said = turns[1]["content"] if isinstance(turns[1]["content"], str) else turns[1]["content"][0]["text"]
    assert said.endswith(" [interrupted]")
    assert said.split()[0] in shown
    assert len(json.loads(file.read_text())["messages"]) == 4


def test_ctrl_c_at_the_prompt_of_a_chat(world: World) -> None:
    """Ends it with 130, without a word."""
    with terminal(world, "chat", *GPT) as (process, ours):
        read_until(ours, "> ")
        while process.poll() is None:  # readline misses one that comes before it listens
            os.write(ours, b"\x03")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
        with pytest.raises(AssertionError, match="no 'Traceback'"):
            read_until(ours, "Traceback")
        assert process.returncode == 130


async def test_a_reader_that_has_had_enough() -> None:
    """A broken pipe ends the answer quietly, and lets go of the provider."""
    async with Sandbox() as sandbox:
        process = await start(sandbox, "[words 5000][slow 0.01]", *GPT)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.close()
        await process.stdout.read(1)
        process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
        err = await asyncio.wait_for(process.stderr.read(), 10)
        await asyncio.wait_for(process.wait(), 10)
        await asyncio.wait_for((await sandbox.wait_for(1)).closed.wait(), 5)
    assert (process.returncode, err) == (0, b"")
