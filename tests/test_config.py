"""Flags stand over the environment over `vai.toml` over the defaults; whatever is wrong is one line that helps."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from anthropic import AsyncAnthropic
from conftest import KEY, ROOT, Serve
from pydantic import BaseModel

import providers
import server
from sandbox import Sandbox
from server import ConfigError, load_config

SECRET = "sk-fault-5e1f0a9c77d24b"
VALUES: dict[str, tuple[Any, Any, Any, Any]] = {  # default, then what file, environment and flag say
    "server.host": ("127.0.0.1", "::1", "127.0.0.2", "127.0.0.3"),
    "server.port": (8080, 1001, 1002, 1003),
    "server.allow_open": (False, True, False, True),
    "server.trusted_proxies": ([], ["10.0.0.0/8"], ["127.0.0.1/32", "fd00::/8"], None),
    "auth.mode": ("api_key", "none", "passthrough", "api_key"),
    "limits.max_body_bytes": (10 << 20, 2001, 2002, None),
    "limits.max_tokens_default": (4096, 11, 12, None),
    "rate_limit.enabled": (True, False, True, None),
    "rate_limit.caller_rpm": (100_000, 11, 12, None),
    "rate_limit.global_rpm": (1_000_000, 11, 12, None),
    "rate_limit.redis_url": (None, "redis://a:1/0", "unix:///run/redis.sock", None),
    "timeouts.connect": (10, 1.5, 2.5, None),
    "timeouts.first_byte": (120, 1.5, 2.5, None),
    "timeouts.idle": (120, 1.5, 2.5, None),
    "timeouts.total": (600, 1.5, 2.5, None),
    "timeouts.head": (15, 1.5, 2.5, None),
    "timeouts.body": (60, 1.5, 2.5, None),
    "timeouts.write": (60, 1.5, 2.5, None),
    "timeouts.drain": (30, 1.5, 2.5, None),
    "sse.ping_interval": (15, 1.5, 2.5, None),
    "cors.allowed_origins": ([], ["*"], ["https://a.test", "http://localhost:3000"], None),
    "cors.allow_credentials": (False, True, False, None),
    "metrics.enabled": (True, False, True, None),
    "metrics.require_key": (False, True, False, None),
    "live.max_sessions": (1000, 0, 12, None),
    "live.idle_timeout": (300, 1.5, 2.5, None),
    "live.max_duration": (7200, 1.5, 2.5, None),
    "live.detector": ("auto", "energy", "auto", None),
    "live.detector_model": (None, __file__, str(ROOT / "live.py"), None),
    "log.level": ("info", "debug", "warning", "error"),
    "log.format": (None, "text", "json", "text"),
}


def written(folder: Path, text: str) -> str:
    """The path of a `vai.toml` that holds this text."""
    path = folder / "vai.toml"
    path.write_text(text)
    return str(path)


def toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def test_every_option_is_tested() -> None:
    """Each environment variable and flag has its row in the table above; `auth.keys` has tests of its own."""
    assert {option.path for option in server.OPTIONS} == {*VALUES, "auth.keys"}


@pytest.mark.parametrize(("path", "values"), VALUES.items(), ids=VALUES)
def test_precedence(tmp_path: Path, path: str, values: tuple[Any, Any, Any, Any]) -> None:
    """A flag stands over the environment, that over the file, that over the default."""
    default, in_file, in_environ, in_flag = values
    option = next(option for option in server.OPTIONS if option.path == path)
    section, name = path.split(".")
    file = written(tmp_path, f"[{section}]\n{name} = {toml(in_file)}\n")
    environ = {option.env: ", ".join(in_environ) if option.many else str(in_environ).lower()}
    if path == "cors.allow_credentials":
        environ["VAI_CORS_ORIGINS"] = "https://a.test"

    def got(flags: dict[str, Any], environ: dict[str, str]) -> Any:
        value = getattr(getattr(load_config(flags, environ), section), name)
        return [str(item) for item in value] if option.many else value

    assert got({"config": file}, {}) == in_file
    assert got({"config": file}, environ) == in_environ
    assert got({}, {}) == default
    if option.flag:
        argv = ["--config", file, option.flag, *([] if in_flag is True else [str(in_flag)])]
        assert got(vars(server.arguments(argv)), environ) == in_flag
    else:
        assert in_flag is None


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--config` goes before `VAI_CONFIG` before `./vai.toml`, which need not be there."""
    monkeypatch.chdir(tmp_path)
    assert load_config({}, {}).server.port == 8080
    written(tmp_path, "server.port = 1")
    (tmp_path / "second.toml").write_text("server.port = 2")
    (tmp_path / "third.toml").write_text("server.port = 3")
    assert load_config({}, {}).server.port == 1
    assert load_config({}, {"VAI_CONFIG": "second.toml"}).server.port == 2
    assert load_config({"config": "third.toml"}, {"VAI_CONFIG": "second.toml"}).server.port == 3


def test_variables_and_blanks(tmp_path: Path) -> None:
    """`${NAME}` is the environment's, anywhere in a string of the file; what surrounds a value is stripped."""
    file = written(
        tmp_path,
        """
        auth.keys = [{ key = "  ${KEY}-${KEY}\\n", name = "${WHO}" }]
        [providers.openai]
        api_key = "${OPENAI}"
        base_url = "http://${HOST}:1/v1 "
        [aliases]
        fast = "groq/${MODEL}"
        """,
    )
    environ = {"KEY": "12345678", "WHO": "bob", "OPENAI": f" {SECRET}\n", "HOST": "h", "MODEL": "m", "VAI_PORT": " 7\n"}
    config = load_config({"config": file}, environ)
    assert config.auth.keys == [server.KeyEntry(key="12345678-12345678", name="bob")]
    assert config.providers["openai"] == server.ProviderSection(api_key=SECRET, base_url="http://h:1/v1")
    assert (config.aliases, config.server.port) == ({"fast": "groq/m"}, 7)


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        ("abcdefgh", {"key1": "abcdefgh"}),
        ("alice=abcdefgh", {"alice": "abcdefgh"}),
        (" alice=abcdefgh , bob=ijklmnop,", {"alice": "abcdefgh", "bob": "ijklmnop"}),
        ("abcdefgh,bob=ijklmnop,qrstuvwx", {"key1": "abcdefgh", "bob": "ijklmnop", "key3": "qrstuvwx"}),
        ("c2VjcmV0LWtleQ==, bob=c2VjcmV0LWtleXM=", {"key1": "c2VjcmV0LWtleQ==", "bob": "c2VjcmV0LWtleXM="}),
        ("", {}),
    ],
)
def test_keys_from_the_environment(value: str, keys: dict[str, str]) -> None:
    """`VAI_API_KEYS` holds `key` or `name=key`, comma-separated."""
    config = load_config({}, {"VAI_API_KEYS": value})
    assert {entry.name: entry.key for entry in config.auth.keys} == keys


WRONG: dict[str, tuple[str, dict[str, str], list[str], str]] = {  # file, environment, flags, the line ("FILE" = path)
    "bad TOML": (f'auth.keys = [{{key = "{SECRET}"', {}, [], r"FILE: .+"),
    "not UTF-8": ("\udcff", {}, [], r"FILE: .*"),
    "unknown section": ("[sever]\nport = 1", {}, [], r"FILE: sever: no such setting"),
    "unknown field": (f'[server]\nkey = "{SECRET}"', {}, [], r"FILE: server\.key: no such setting"),
    "unknown field beside one that is set": ("log.levels = 1", {"VAI_LOG_LEVEL": "info"}, [], r"FILE: log\.levels: .*"),
    "unknown field of a key": (
        f'[[auth.keys]]\nkey = "{SECRET}"\nkye = "{SECRET}"',
        {},
        [],
        r"FILE: auth\.keys\.0\.kye: no such setting",
    ),
    "key missing": ('[[auth.keys]]\nname = "x"', {}, [], r"FILE: auth\.keys\.0\.key: .*required"),
    "section no table": ("server = 5", {"VAI_PORT": "1"}, [], r".*: server: .*"),
    "type in the file": ('[server]\nport = "x"', {}, [], r"FILE: server\.port: .*integer.*"),
    "port in the environment": ("", {"VAI_PORT": "99999"}, [], r"VAI_PORT: server\.port: .*65535"),
    "port in a flag": ("", {"VAI_PORT": "1"}, ["--port", "x"], r"--port: server\.port: .*integer.*"),
    "boolean": ("", {"VAI_ALLOW_OPEN": "perhaps"}, [], r"VAI_ALLOW_OPEN: server\.allow_open: .*boolean.*"),
    "empty host": ("", {"VAI_HOST": " "}, [], r"VAI_HOST: server\.host: .*"),
    "mode": ("", {}, ["--auth", SECRET], r"--auth: auth\.mode: .*'api_key', 'passthrough' or 'none'"),
    "level": ("", {"VAI_LOG_LEVEL": "loud"}, [], r"VAI_LOG_LEVEL: log\.level: .*'debug', 'info', .*"),
    "negative timeout": ("timeouts.idle = -1", {}, [], r"FILE: timeouts\.idle: .*greater than 0"),
    "endless timeout": ("timeouts.idle = inf", {}, [], r"FILE: timeouts\.idle: .*"),
    "timeout in words": ("", {"VAI_TIMEOUT_TOTAL": "1 min"}, [], r"VAI_TIMEOUT_TOTAL: timeouts\.total: .*number.*"),
    "small body": ("limits.max_body_bytes = 10", {}, [], r"FILE: limits\.max_body_bytes: .*1024"),
    "short key": ("", {"VAI_API_KEYS": "short"}, [], r"VAI_API_KEYS: auth\.keys\.0\.key: .*8 characters"),
    "key with blanks": ("", {"VAI_API_KEYS": f"{SECRET} {SECRET}"}, [], r"VAI_API_KEYS: auth\.keys\.0\.key: .*"),
    "key name": ("", {"VAI_API_KEYS": f"a b={SECRET}"}, [], r"VAI_API_KEYS: auth\.keys\.0\.key: .*"),
    "key twice": ("", {"VAI_API_KEYS": f"a={SECRET},b={SECRET}"}, [], r"VAI_API_KEYS: auth\.keys: .*unique"),
    "name twice": ("", {"VAI_API_KEYS": f"a={SECRET},a={SECRET}2"}, [], r"VAI_API_KEYS: auth\.keys: .*unique"),
    "control character in the file": (f'providers.openai.api_key = "{SECRET}\\u0007x"', {}, [], r"FILE: .*control.*"),
    "control character in the environment": ("", {"VAI_API_KEYS": f"{SECRET}\nx"}, [], r"VAI_API_KEYS: .*control.*"),
    "control character in a flag": ("", {}, ["--host", "a\nb"], r"--host: .*control.*"),
    "control character from a variable": ('aliases.a = "${A}"', {"A": f"{SECRET}\0x"}, [], r"FILE: aliases: a: .*"),
    "live detector": ("", {"VAI_LIVE_DETECTOR": "best"}, [], r"VAI_LIVE_DETECTOR: live\.detector: .*'auto', 'onnx'.*"),
    "no such variable": ('aliases.a = "${NOPE}"', {}, [], r"FILE: aliases: a: the environment has no NOPE"),
    "empty provider key": ('providers.groq.api_key = "${A}"', {"A": ""}, [], r"FILE: providers\.groq\.api_key: .*"),
    "unknown provider": ("providers.mistral = {}", {}, [], r"FILE: providers\.mistral: .*anthropic, openai.*"),
    "base URL": ('providers.openai.base_url = "x"', {}, [], r"FILE: providers\.openai\.base_url: .*http.*"),
    "base URL with a query": (
        'providers.openai.base_url = "https://host/v1?key=sk-fault"',
        {},
        [],
        r"FILE: providers\.openai\.base_url: must be an http\(s\) URL without a query",
    ),
    "alias without provider": ('aliases.a = "gpt-4o"', {}, [], r"FILE: aliases\.a: .*provider/model.*"),
    "alias of an unknown provider": ('aliases.a = "mistral/x"', {}, [], r"FILE: aliases\.a: .*anthropic, openai.*"),
    "alias of an alias": ('aliases = {a = "b", b = "groq/x"}', {}, [], r"FILE: aliases\.a: .*provider/model.*"),
    "key without models": (f'[[auth.keys]]\nkey = "{SECRET}"\nmodels = []', {}, [], r"FILE: auth\.keys\.0\.models: .*"),
    "pattern of models": (
        f'[[auth.keys]]\nkey = "{SECRET}"\nmodels = ["openai/[ab]"]',
        {},
        [],
        r"FILE: auth\.keys\.0\.models\.0: .*",
    ),
    "rpm of a key": (f'[[auth.keys]]\nkey = "{SECRET}"\nrpm = 0', {}, [], r"FILE: auth\.keys\.0\.rpm: .* 1"),
    "rpm": ("", {"VAI_CALLER_RPM": "many"}, [], r"VAI_CALLER_RPM: rate_limit\.caller_rpm: .*integer.*"),
    "Redis": ("", {"VAI_REDIS_URL": f"http://:{SECRET}@h"}, [], r"VAI_REDIS_URL: rate_limit\.redis_url: .*redis.*"),
    "proxy": (
        "",
        {"VAI_TRUSTED_PROXIES": "10.0.0.0/8,nginx"},
        [],
        r"VAI_TRUSTED_PROXIES: server\.trusted_proxies\.1: .*",
    ),
    "origin with a path": (
        "",
        {"VAI_CORS_ORIGINS": "https://a.test/"},
        [],
        r"VAI_CORS_ORIGINS: cors\.allowed_origins\.0: .*",
    ),
    "origin null": ('cors.allowed_origins = ["null"]', {}, [], r"FILE: cors\.allowed_origins\.0: .*"),
    "any origin, with credentials": (
        'cors.allowed_origins = ["https://a.test", "*"]',
        {"VAI_CORS_CREDENTIALS": "true"},
        [],
        r"VAI_CORS_CREDENTIALS: cors\.allow_credentials: .*'\*'.*",
    ),
    "alias of nothing": ("aliases.a = []", {}, [], r"FILE: aliases\.a: must be a model, or a list of models"),
    "alias of a number": ("aliases.a = 7", {}, [], r"FILE: aliases\.a: must be a model, or a list of models"),
    "alias of numbers": ('aliases.a = ["groq/x", 7]', {}, [], r"FILE: aliases\.a: must be .*list of models"),
    "alias of a model twice": ('aliases.a = ["groq/x", "groq/x"]', {}, [], r"FILE: aliases\.a: .*each of them once"),
    "alias of too many": (
        f"aliases.a = {[f'groq/{n}' for n in range(17)]}",
        {},
        [],
        r"FILE: aliases\.a: .*at most 16.*",
    ),
    "alias with an unknown provider": ('aliases.a = ["groq/x", "mistral/x"]', {}, [], r"FILE: aliases\.a: .*openai.*"),
    "metrics with no key to require": (
        "metrics.require_key = true",
        {"VAI_AUTH_MODE": "passthrough"},
        [],
        r"FILE: metrics\.require_key: needs auth\.mode api_key.*",
    ),
    "open to all": ("", {}, ["--auth", "none", "--host", "0.0.0.0"], r".*0\.0\.0\.0.*--allow-open"),  # noqa: S104
    "open by name": ('auth.mode = "none"', {"VAI_HOST": "example.org"}, [], r".*example\.org.*--allow-open"),
}


@pytest.mark.parametrize(("text", "environ", "flags", "line"), WRONG.values(), ids=WRONG)
def test_errors_are_one_line(tmp_path: Path, text: str, environ: dict[str, str], flags: list[str], line: str) -> None:
    """What is wrong is one line with the source, the field and what is allowed, and never the value."""
    path = tmp_path / "vai.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        load_config(vars(server.arguments(["--config", str(path), *flags])), environ)
    message = str(caught.value)
    assert re.fullmatch(line.replace("FILE", re.escape(str(path))), message)
    assert SECRET not in f"{message}{caught.value!r}{caught.value.__cause__!r}{caught.value.__context__!r}"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({"OPENAI_API_KEY": f"{SECRET}\n{SECRET}"}, "vai: .*openai.*"),
        ({"GROQ_API_KEY": f"“{SECRET}”"}, "vai: .*groq.*"),
        ({"GROQ_API_KEY": f"'{SECRET}'"}, "vai: the key for groq: .*without .*quotes.*"),
        ({"VAI_API_KEYS": f'"{SECRET}"'}, r"vai: VAI_API_KEYS: auth\.keys\.0\.key: .*without .*quotes"),
        ({"VAI_OPENAI_BASE_URL": "localhost"}, "vai: VAI_OPENAI_BASE_URL: .*"),
        ({"VAI_LIVE_DETECTOR": "onnx"}, "vai: live.detector: .* needs onnxruntime, and a file with Silero's model"),
        ({"VAI_LIVE_DETECTOR_MODEL": f"/no/{SECRET}"}, "vai: live.detector_model: no such file"),
        ({"VAI_CONFIG": "missing.toml"}, "vai: missing.toml: cannot be read: No such file or directory"),
        ({"VAI_CONFIG": "."}, "vai: .: cannot be read: Is a directory"),
    ],
)
def test_start_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environ: dict[str, str],
    line: str,
) -> None:
    """`--check-config` ends with 2 and one line on standard error for what would not work, with 0 for what does."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("VAI_", "GEMINI_")) or name.endswith("_KEY")]:
        monkeypatch.delenv(name)
    server.main(["--check-config"])
    assert capsys.readouterr() == ("the configuration is good\n", "")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        server.main(["--check-config"])
    out, errors = capsys.readouterr()
    assert (ended.value.code, out, errors.count("\n")) == (2, "", 1)
    assert re.fullmatch(line, errors.strip())
    assert SECRET not in errors


@pytest.mark.parametrize(("version", "good"), [("3.14.3", False), ("3.9.5", False), ("3.14.4", True), ("4.0a1", True)])
def test_aiohttp_with_known_holes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, version: str, good: bool
) -> None:
    """Copied files have no metadata that asks for a version, so the start looks at it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("aiohttp.__version__", version)
    with contextlib.nullcontext() if good else pytest.raises(SystemExit):
        server.main(["--check-config"])
    old = f"vai: aiohttp {version} is too old: pip install 'aiohttp>=3.14.4'\n"
    assert capsys.readouterr() == (("the configuration is good\n", "") if good else ("", old))


def test_process_refuses_to_start(tmp_path: Path) -> None:
    """A port that is taken, or a configuration that cannot work, ends the process with 2 and one line."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for flags, line in (
            (["--port", port], rf"vai: cannot listen on 127\.0\.0\.1:{port}: .*in use.*"),
            (["--host", "nobody.invalid"], r"vai: cannot listen on nobody\.invalid:8080: .*(?<!-\d)"),
            (["--auth", "none", "--host", "0.0.0.0"], r"vai: .*--allow-open"),  # noqa: S104
        ):
            command = [sys.executable, str(ROOT / "server.py"), *flags]
            ended = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, timeout=20)
            assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
            assert re.fullmatch(line, ended.stderr.strip())


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` names every flag, `--version` the version; both end with 0."""
    for flag in ("--help", "--version"):
        with pytest.raises(SystemExit) as ended:
            server.main([flag])
        assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(option.flag in out for option in server.OPTIONS if option.flag)
    assert out.endswith(f"vai {providers.__version__}\n")


# == The example =======================================================================================================

EXAMPLE = (ROOT / "vai.example.toml").read_text(encoding="utf-8")


def options_of(section: type[BaseModel]) -> Iterator[str]:
    """Every option of a configuration, as `section.name`, the items of a list or table as the section's own."""
    for name, field in section.model_fields.items():
        models = [kind for kind in walk(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        yield from (f"{name}.{inner}" for model in models for inner in options_of(model))
        if not models:
            yield name


def walk(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from walk(inner)


def test_example_is_the_default(tmp_path: Path) -> None:
    """What the example says without a comment sign is what holds without it."""
    assert load_config({"config": written(tmp_path, EXAMPLE)}, {}) == server.Config()


def test_example_has_every_option(tmp_path: Path) -> None:
    """With its comments switched on, the example has every option that there is, and names its variable and flag."""
    whole = re.sub(r"(?m)^# (?=\[|\w+ = )", "", EXAMPLE)
    environ = {"WEBSITE_KEY": SECRET, "OPENAI_API_KEY": SECRET, "REDIS_PASSWORD": SECRET}
    config = load_config({"config": written(tmp_path, whole)}, environ)
    assert (config.auth.keys[0].rpm, config.auth.keys[0].models) == (600, ["openai/*", "fast"])
    tree = tomllib.loads(whole)
    found = {
        f"{section}.{name}" for section in tree for name in tree[section] if section not in ("aliases", "providers")
    }
    found |= {f"auth.keys.{name}" for name in tree["auth"]["keys"][0]}
    found |= {f"providers.{name}" for name in tree["providers"]["openai"]}
    assert found - {"auth.keys"} | {"aliases"} == set(options_of(server.Config))
    assert "aliases" in tree
    for option in server.OPTIONS:
        assert option.path.startswith("timeouts.") or option.env in EXAMPLE
        assert option.flag is None or option.flag in EXAMPLE


# == Effects ===========================================================================================================

ALIASES = {
    "fast": "groq/llama-3.3-70b-versatile",
    "claude-sonnet-5-5": "openai/gpt-4o",
    "a/b": "gemini/gemini-2.5-flash",
}


@pytest.mark.parametrize(("alias", "model"), ALIASES.items())
async def test_aliases(serve: Serve, sandbox: Sandbox, alias: str, model: str) -> None:
    """An alias stands for its model, also for a client that knows bare names only; the answer names the model."""
    gateway = await serve(aliases=ALIASES)
    asked: Any = {"model": alias, "messages": [{"role": "user", "content": "[say Hi.]"}], "max_tokens": 99}
    for stream in (False, True):
        answer = await gateway.post({**asked, "stream": stream})
        assert (answer.status, answer.headers["X-Model"]) == (200, model)
    async with AsyncAnthropic(base_url=gateway.url, api_key=KEY, max_retries=0) as client:
        assert (await client.messages.create(**asked)).model == model
    assert sandbox.seen == 3
    assert (await gateway.get("/v1/models")).body["aliases"] == ALIASES
    unknown = await gateway.post({**asked, "model": "slow"})
    assert (unknown.status, unknown.error["param"]) == (400, "model")
    assert "a/b, claude-sonnet-5-5, fast" in unknown.error["message"]


async def test_keys_and_urls_of_the_file(serve: Serve, sandbox: Sandbox, environ: dict[str, str]) -> None:
    """A provider's key and URL in the file go before those of the environment; the default `max_tokens` is sent."""
    provider = {"api_key": "sk-of-the-file", "base_url": sandbox.base_urls["anthropic"] + "/"}
    gateway = await serve(
        environ={**environ, "VAI_ANTHROPIC_BASE_URL": "http://127.0.0.1:9"},
        providers={"anthropic": provider},
        limits={"max_tokens_default": 17},
    )
    body = {"model": "anthropic/claude-sonnet-4-5", "messages": [{"role": "user", "content": "[say Hi.]"}]}
    assert (await gateway.post(body)).status == 200
    assert sandbox.requests[0].key == "sk-of-the-file"
    assert (sandbox.requests[0].body or {})["max_tokens"] == 17
