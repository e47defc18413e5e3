"""The gateway: vai's message API over HTTP, for a team, a browser, any language, any Anthropic SDK.

    python server.py --sandbox          # everything, without a key or a network
    python server.py --config vai.toml

Flags stand over the environment over `vai.toml` over the defaults; `OPTIONS` lists them all. Needs vai.py and
providers.py beside it, pydantic and aiohttp; uvloop is used where it is installed.

Contents (`grep -n '^# == '` lists the sections):
    configuration · callers and their keys · logs · errors and responses · the endpoints · the app · main
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import contextvars
import functools
import gc
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import signal
import sys
import time
import tomllib
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING or not __package__:
    import providers
    import vai
    from providers import JSON, PROVIDERS, Error, InvalidRequestError, sse_frame
else:
    from . import providers, vai
    from .providers import JSON, PROVIDERS, Error, InvalidRequestError, sse_frame

__version__ = "0.1.0"
if getattr(vai, "__version__", None) != __version__:
    found = getattr(vai, "__version__", "unknown")
    raise ImportError(f"server.py {__version__} needs its own vai.py; version {found} is at {vai.__file__}")

T = TypeVar("T")
logger = logging.getLogger("vai.server")
access = logging.getLogger("vai.access")


# == Configuration =====================================================================================================


class ConfigError(Exception):
    """One line that names the source, the field and what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, frozen=True)


class ServerSection(_Section):
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    allow_open: bool = False


class KeyEntry(_Section):
    key: str = Field(min_length=8, pattern=r"^[\x21-\x7e]+$", repr=False)
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "default"


class AuthSection(_Section):
    mode: Literal["api_key", "passthrough", "none"] = "api_key"
    keys: list[KeyEntry] = []


class ProviderSection(_Section):
    api_key: str | None = Field(default=None, min_length=1, pattern=r"^[\x21-\x7e]+$", repr=False)
    base_url: Annotated[str, Field(pattern=r"^https?://[^\s/]+[^\s]*$")] | None = None


class LimitsSection(_Section):
    max_body_bytes: Annotated[int, Field(ge=1024)] = 10 << 20
    max_json_depth: Annotated[int, Field(ge=8, le=500)] = 64
    max_messages: Annotated[int, Field(ge=1)] = 1000
    max_tools: Annotated[int, Field(ge=1)] = 256
    max_tokens_default: Annotated[int, Field(ge=1)] = 4096


Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class TimeoutsSection(_Section):
    connect: Seconds = 10
    first_byte: Seconds = 120
    idle: Seconds = 120
    total: Seconds = 600
    body: Seconds = 60
    write: Seconds = 60
    drain: Annotated[float, Field(ge=0, le=86_400)] = 30


class SSESection(_Section):
    ping_interval: Seconds = 15


class LogSection(_Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] | None = None


class Config(_Section):
    """What the gateway runs with; `load_config` makes it."""

    server: ServerSection = ServerSection()
    auth: AuthSection = AuthSection()
    providers: dict[str, ProviderSection] = {}
    aliases: dict[str, str] = {}
    limits: LimitsSection = LimitsSection()
    timeouts: TimeoutsSection = TimeoutsSection()
    sse: SSESection = SSESection()
    log: LogSection = LogSection()


@dataclass(frozen=True, slots=True)
class Option:
    """A setting: its place in `vai.toml`, its environment variable, its flag."""

    path: str
    env: str
    flag: str | None = None
    help: str = ""


OPTIONS = (
    Option("server.host", "VAI_HOST", "--host", "address to listen on (127.0.0.1)"),
    Option("server.port", "VAI_PORT", "--port", "port to listen on (8080; 0 takes a free one)"),
    Option("server.allow_open", "VAI_ALLOW_OPEN", "--allow-open", "let --auth none listen beyond this machine"),
    Option("auth.mode", "VAI_AUTH_MODE", "--auth", "api_key, passthrough or none (api_key)"),
    Option("auth.keys", "VAI_API_KEYS"),
    Option("limits.max_body_bytes", "VAI_MAX_BODY_BYTES"),
    Option("limits.max_tokens_default", "VAI_MAX_TOKENS_DEFAULT"),
    *(Option(f"timeouts.{name}", f"VAI_TIMEOUT_{name.upper()}") for name in TimeoutsSection.model_fields),
    Option("sse.ping_interval", "VAI_PING_INTERVAL"),
    Option("log.level", "VAI_LOG_LEVEL", "--log-level", "debug, info, warning or error (info)"),
    Option("log.format", "VAI_LOG_FORMAT", "--log-format", "json or text (text on a terminal)"),
)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name, description="vai's gateway: any model behind one API."
    )
    for option in OPTIONS:
        if option.flag == "--allow-open":
            parser.add_argument(option.flag, dest=option.path, action="store_const", const="true", help=option.help)
        elif option.flag:
            parser.add_argument(option.flag, dest=option.path, metavar="X", help=option.help)
    parser.add_argument("--config", metavar="FILE", help="configuration (./vai.toml if there)")
    parser.add_argument("--check-config", action="store_true", help="check the configuration and end")
    parser.add_argument("--sandbox", action="store_true", help="play all providers locally: no key, no network")
    parser.add_argument("--version", action="version", version=f"vai {providers.__version__}")
    return parser.parse_args(argv)


def load_config(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Config:
    """Merge flags over environment over file. Raises `ConfigError`, which says where a wrong value came from."""
    tree, sources = _read_file(flags.get("config") or environ.get("VAI_CONFIG"), environ)
    for option in OPTIONS:
        for source, value in ((option.env, environ.get(option.env)), (option.flag, flags.get(option.path))):
            if source and value is not None:
                _place(tree, option.path, _parsed(option.path, _clean(value, source)))
                sources[option.path] = source
    try:
        config = Config.model_validate(tree)
    except ValidationError as fault:
        raise _config_error(fault, sources) from None
    _check_config(config, sources)
    return config


def _read_file(name: str | None, environ: Mapping[str, str]) -> tuple[JSON, dict[str, str]]:
    path = Path(name or "vai.toml")
    if name is None and not path.is_file():
        return {}, {}
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise ConfigError(f"{path}: cannot be read: {fault.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise ConfigError(f"{path}: {fault}") from None
    return _filled_in(tree, environ, str(path)), {"": str(path)}


def _filled_in(value: Any, environ: Mapping[str, str], where: str) -> Any:
    """`${NAME}` in a string is the environment's; strings are stripped."""
    if isinstance(value, dict):
        return {key: _filled_in(item, environ, f"{where}: {key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_filled_in(item, environ, where) for item in value]
    if not isinstance(value, str):
        return value

    def variable(found: re.Match[str]) -> str:
        if found[1] not in environ:
            raise ConfigError(f"{where}: the environment has no {found[1]}")
        return environ[found[1]]

    return _clean(re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", variable, value), where)


def _clean(value: str, where: str) -> str:
    value = value.strip()
    if re.search(r"[\x00-\x1f\x7f]", value):
        raise ConfigError(f"{where}: holds a control character")
    return value


def _parsed(path: str, value: str) -> Any:
    """`auth.keys` from the environment: `key` or `name=key`, comma-separated."""
    if path != "auth.keys":
        return value
    keys = []
    for number, item in enumerate((item.strip() for item in value.split(",") if item.strip()), 1):
        named = re.fullmatch(r"([A-Za-z0-9._-]{1,64})=(?!=*$)(.+)", item)  # not the padding of a base64 key
        keys.append({"name": named[1], "key": named[2]} if named else {"name": f"key{number}", "key": item})
    return keys


def _place(tree: JSON, path: str, value: Any) -> None:
    section, name = path.split(".")
    tree.setdefault(section, {})
    if isinstance(tree[section], dict):
        tree[section][name] = value


def _config_error(fault: ValidationError, sources: Mapping[str, str]) -> ConfigError:
    first = fault.errors(include_url=False, include_input=False, include_context=False)[0]
    path = ".".join(str(step) for step in first["loc"])
    given = (name for prefix, name in sources.items() if prefix and f"{path}.".startswith(f"{prefix}."))
    source = next(given, sources.get("", "vai.toml"))
    reason = providers.FAULTS.get(first["type"], first["msg"])
    return ConfigError(f"{source}: {path}: {reason}")


def _check_config(config: Config, sources: Mapping[str, str]) -> None:
    source = sources.get("", "configuration")
    for name in config.providers:
        if name not in PROVIDERS:
            raise ConfigError(f"{source}: providers.{name}: unknown provider; known: {', '.join(PROVIDERS)}")
    for name, model in config.aliases.items():
        try:
            providers.split_model(model)
        except Error as fault:
            raise ConfigError(f"{source}: aliases.{name}: {fault.message}") from None
    names = [entry.name for entry in config.auth.keys]
    if len({entry.key for entry in config.auth.keys}) < len(names) or len(set(names)) < len(names):
        raise ConfigError(f"{sources.get('auth.keys', source)}: auth.keys: keys and names must be unique")
    if config.auth.mode == "none" and not is_loopback(config.server.host) and not config.server.allow_open:
        raise ConfigError(
            f"auth.mode none on {config.server.host} would let anyone in who reaches the port: "
            "use another mode, host 127.0.0.1, or --allow-open"
        )


@functools.lru_cache(256)
def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return False


# == Callers and their keys ============================================================================================


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: the name goes into logs; `key` is what was presented, for passthrough."""

    name: str
    key: str | None = field(default=None, repr=False)


class Callers:
    """Who may call. A key is looked up by its digest and compared in constant time; none is kept readable."""

    def __init__(self, config: AuthSection, *, loopback: bool) -> None:
        self.mode = config.mode
        self.made: str | None = None
        entries = list(config.keys)
        if self.mode == "api_key" and not entries:
            self.made = f"vai_sk_{secrets.token_urlsafe(32)}"
            entries = [KeyEntry(key=self.made, name="default")]
        self._names = {hashlib.sha256(entry.key.encode()).digest(): entry.name for entry in entries}
        self._loopback_only = self.mode == "none" and loopback

    def identify(self, request: web.Request) -> Caller:
        """The caller, or an error: there is no way past this but through it."""
        if self.mode == "none":
            host = request.headers.get("Host", "")
            if self._loopback_only and not is_loopback(re.sub(r":\d*$", "", host)):
                raise providers.PermissionDeniedError(
                    "this gateway answers to this machine's own names only", code="host"
                )
            return Caller("anyone")
        key = presented_key(request)
        if self.mode == "passthrough" and key:
            return Caller("passthrough", key)
        digest = hashlib.sha256((key or "").encode("utf-8", "surrogateescape")).digest()
        name = next((name for known, name in self._names.items() if hmac.compare_digest(known, digest)), None)
        if not key or name is None:  # one answer, whatever is wrong
            raise providers.AuthenticationError("no valid API key: send X-API-Key: KEY, or Authorization: Bearer KEY")
        return Caller(name)


def presented_key(request: web.Request) -> providers.Secret | None:
    """The credential of a request. As at Anthropic, `X-API-Key` goes before `Authorization`; two of a kind are none."""
    given = request.headers.getall("X-API-Key", [])
    if not given:
        values = request.headers.getall("Authorization", [])
        given = [found[1] for value in values if (found := re.fullmatch(r"(?i:bearer) +(\S+)", value.strip()))]
        if len(given) != len(values):
            return None
    return providers.Secret(given[0].strip()) if len(given) == 1 else None


def provider_keys(request: web.Request, caller: Caller, asked: vai.MessageRequest) -> dict[str, providers.Secret]:
    """The keys that came in headers; in passthrough mode the caller's own, unless one was brought for the provider."""
    prefix, byok = "x-provider-key-", PROVIDERS[asked.provider].byok
    given = ((name.lower(), value) for name, value in request.headers.items())
    keys = vai.byok({name.removeprefix(prefix): providers.Secret(v) for name, v in given if name.startswith(prefix)})
    if caller.key and not (keys.keys() | vai.byok(asked.provider_keys).keys()) & set(byok):
        keys |= vai.byok({byok[0]: caller.key})
    return keys


# == Logs ==============================================================================================================

request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)


_log_line = json.JSONEncoder(default=str).encode


@functools.lru_cache(4)
def _second(moment: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))


class JSONFormatter(logging.Formatter):
    """One JSON object a line. Of an exception only its type and where it was raised: its message may hold content."""

    def format(self, record: logging.LogRecord) -> str:
        line: JSON = {
            "time": f"{_second(int(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": providers.redact(record.getMessage()),
        }
        if id := request_id.get():
            line["request_id"] = id
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[0]:
            line["exception"] = record.exc_info[0].__name__
            line["stack"] = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(record.exc_info[2])][-8:]
        return _log_line(line)


class TextFormatter(JSONFormatter):
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line: JSON = json.loads(super().format(record))
        if record.name == access.name:
            tokens = f" {line['input_tokens']}→{line['output_tokens']} tokens" if "output_tokens" in line else ""
            model = f" {line['provider']}/{line['model']}" if line.get("model") else ""
            path = json.dumps(line["path"])[1:-1]
            why = f" {line.get('code') or line['error']}" if line.get("error") else ""
            who = f" for {line['caller']}" if line.get("caller") else ""
            what = f"{line['method']} {path}{model}{tokens}{why}{who}"
            return f"{clock} {line['status']} {line['duration_ms']:>6} ms  {what}  {line.get('request_id', '')}"
        extra = "".join(f"\n    {place}" for place in line.get("stack", ()))
        return f"{clock} {line['level'].upper()} {line['message']}{extra}"


def configure_logs(config: LogSection) -> None:
    """Logs go to stderr. aiohttp's own would repeat a malformed request with a traceback, so they stay out."""
    style = config.format or ("text" if sys.stderr.isatty() else "json")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter() if style == "json" else TextFormatter())
    logging._srcfile = None  # nor the line of code (logging HOWTO, "Optimization")
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # no line says them
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("vai").setLevel(config.level.upper())
    for noisy in ("aiohttp.server", "aiohttp.access", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


@dataclass(slots=True)
class Exchange:
    """One request, as the log will tell it."""

    id: str
    begun: float = field(default_factory=time.monotonic)
    caller: str | None = None
    provider: str | None = None
    model: str | None = None
    usage: vai.Usage | None = None
    error: Error | None = None
    sent: int | None = None

    @property
    def milliseconds(self) -> int:
        return int((time.monotonic() - self.begun) * 1000)

    def fields(self, request: web.Request, status: int) -> JSON:
        out: JSON = {"request_id": self.id, "caller": self.caller, "method": request.method, "path": request.path[:200]}
        out |= {"status": status, "duration_ms": self.milliseconds, "provider": self.provider, "model": self.model}
        if self.usage:
            out |= {"input_tokens": self.usage.input_tokens, "output_tokens": self.usage.output_tokens}
        if self.error:
            out |= {"error": self.error.type, "code": self.error.code}
        return {key: value for key, value in (out | {"bytes": self.sent}).items() if value is not None}


EXCHANGE = web.RequestKey("exchange", Exchange)


# == Errors and responses ==============================================================================================

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
HEADER_SAFE = re.compile(r"[^\x20-\x7e]+")


def error_of(fault: BaseException, path: str) -> Error:
    """Any exception as one of ours. What is nobody's fault but our own says nothing about its insides."""
    match fault:
        case Error():
            return fault
        case web.HTTPRequestEntityTooLarge():
            return providers.RequestTooLargeError("the body is too large")
        case web.HTTPNotFound():
            return providers.NotFoundError(f"no such route: {path[:100]}")
        case web.HTTPMethodNotAllowed(method=method, allowed_methods=allowed):
            wrong = InvalidRequestError(f"{method} is not for this route; it takes {', '.join(sorted(allowed))}")
            wrong.status = 405
            return wrong
        case web.HTTPException(status=status) if 400 <= status < 500:
            refused = InvalidRequestError("the request is malformed")
            refused.status = status
            return refused
    logger.error("unexpected %s", type(fault).__name__, exc_info=fault)
    return providers.APIError("internal error")


def error_response(fault: Error) -> web.Response:
    headers = {}
    if fault.retry_after is not None:
        headers["Retry-After"] = str(fault.retry_after)
    if fault.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(fault.to_wire(request_id.get()), status=fault.status, headers=headers)


def json_response(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    raw = providers.dumps(body)
    return web.Response(body=raw, status=status, headers=headers, content_type="application/json")


def header_safe(value: object, limit: int = 512) -> str:
    """What came from outside, fit for a response header."""
    return HEADER_SAFE.sub("?", str(value))[:limit]


async def read_body(request: web.Request, limits: LimitsSection, seconds: float) -> JSON:
    """The JSON body, checked while it is read: type, encoding, size, time, depth."""
    if request.content_type != "application/json":
        message = "the Content-Type must be application/json"
        raise InvalidRequestError(message, code="unsupported_media_type")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise InvalidRequestError("compressed request bodies are not taken", code="unsupported_encoding")
    if (request.content_length or 0) > limits.max_body_bytes:
        raise too_large(limits)
    await _continue(request)
    part, parts, size = b"", [], 0
    if request.content.is_eof():  # it came with the head, as nearly always
        part = request.content.read_nowait()
        parts, size = [part], len(part)
        if size > limits.max_body_bytes:
            raise too_large(limits)
    try:
        if not parts:
            async with asyncio.timeout(seconds):
                async for part in request.content.iter_any():
                    parts.append(part)
                    size += len(part)
                    if size > limits.max_body_bytes:
                        raise too_large(limits)
    except TimeoutError:
        slow = InvalidRequestError("the body did not arrive in time", code="body_timeout")
        slow.status = 408
        raise slow from None
    raw = b"".join(parts)
    try:
        body = await off_loop(size, read_keys, raw, limits)
    except Error as fault:
        raise fault.with_traceback(None) from None
    finally:
        del parts, raw, part  # a traceback's locals would show the keys in it
    return body


def too_large(limits: LimitsSection) -> Error:
    return providers.RequestTooLargeError(f"the body is over {limits.max_body_bytes} bytes")


async def off_loop(size: int, work: Callable[..., T], *given: Any) -> T:
    """Work on a body of `size` bytes: on a thread if it is large, so that other callers do not wait for it."""
    return await asyncio.to_thread(work, *given) if size > 1 << 20 else work(*given)


async def _continue(request: web.Request) -> None:
    """Tell a caller that waits for a word to go on (RFC 9110, 10.1.1)."""
    expected = request.headers.get("Expect", "")
    if expected.lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer itself has not begun
    elif expected:
        wrong = InvalidRequestError("the only expectation known is 100-continue")
        wrong.status = 417
        raise wrong


def read_keys(raw: bytes, limits: LimitsSection) -> JSON:
    """The body as an object, its `provider_keys` hidden from any repr."""
    body = providers.read_request(raw, limits.max_json_depth)
    if "provider_keys" in body:
        body["provider_keys"] = _hidden(body["provider_keys"])
    return body


def _hidden(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _hidden(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_hidden(item) for item in value]
    return providers.Secret(value) if isinstance(value, str) else value


def _give_up(request: web.Request) -> None:
    """The caller does not read: with its connection the handler ends too."""
    if request.transport:
        request.transport.abort()


class _EventResponse(web.StreamResponse):
    _send_headers_immediately = False  # they go out with the first events, in one write


class EventWriter:
    """The SSE response to one request. It begins with the answer or with the first ping, whichever comes first."""

    def __init__(self, request: web.Request, ping_interval: float, write_timeout: float) -> None:
        loop = asyncio.get_running_loop()
        self._request = request
        self._interval = ping_interval
        self._timeout = write_timeout
        self._watchdog = providers.Watchdog(functools.partial(_give_up, request))
        self._clock = loop.time
        self._lock = asyncio.Lock()  # between the answer and the pings
        self._timer = loop.call_later(ping_interval, self._keep_alive)
        self._pinger: asyncio.Task[None] | None = None  # of a stream that has lasted that long
        self._last = self._clock()
        self.response: web.StreamResponse | None = None
        self.headers: dict[str, str] = {}
        self.sent = 0

    async def write(self, frames: bytes) -> None:
        async with self._lock:
            if self.response is None:
                headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **self.headers}
                response = _EventResponse(headers=headers)
                response.content_type = "text/event-stream"
                await response.prepare(self._request)
                self.response = response
            self._watchdog.start(self._clock() + self._timeout)
            try:
                await self.response.write(frames)
            finally:
                self._watchdog.stop()
            self.sent += len(frames)
            self._last = self._clock()

    def _keep_alive(self) -> None:
        self._pinger = asyncio.create_task(self._ping())

    async def _ping(self) -> None:
        """Pings, whenever nothing was written for a while."""
        while True:
            silence = self._clock() - self._last
            if silence < self._interval:
                await asyncio.sleep(self._interval - silence)
            else:
                await self.write(b'event: ping\ndata: {"type":"ping"}\n\n')

    async def fail(self, fault: Error) -> None:
        """The last event of a stream that cannot end well."""
        await self.write(b"event: error\ndata: %b\n\n" % providers.dumps(fault.to_wire(request_id.get())))

    async def end(self) -> None:
        if self.response is not None:
            await self.response.write_eof()

    async def close(self) -> None:
        """No more pings, and no watch over writes."""
        self._watchdog.close()
        self._timer.cancel()
        if self._pinger:
            self._pinger.cancel()
            await asyncio.gather(self._pinger, return_exceptions=True)


# == The endpoints =====================================================================================================


class Gateway:
    """The state of one running gateway, and its endpoints."""

    def __init__(self, config: Config, engine: vai.Direct) -> None:
        self.config = config
        self.engine = engine
        self.callers = Callers(config.auth, loopback=is_loopback(config.server.host))
        self.started = time.monotonic()
        self.draining = False
        self.expired = False  # the grace of the shutdown is over
        self.running: set[asyncio.Task[Any]] = set()
        self.idle = asyncio.Event()
        self.idle.set()

    # -- POST /v1/messages ------------------------------------------------------------------------------------------

    async def messages(self, request: web.Request) -> web.StreamResponse:
        caller = self.callers.identify(request)
        exchange = request[EXCHANGE]
        exchange.caller = caller.name
        body = await read_body(request, self.config.limits, self.config.timeouts.body)
        self._check_counts(body)
        headers = {name: request.headers[name] for name in vai.FORWARDED_HEADERS if name in request.headers}
        asked = await off_loop(request.content.total_bytes, self.engine.parse, body, headers)
        exchange.provider, exchange.model = asked.provider, asked.model_name
        keys = provider_keys(request, caller, asked)
        return await (self._stream if asked.stream else self._create)(request, asked, keys)

    def _check_counts(self, body: JSON) -> None:
        limits = self.config.limits
        for name, most in (("messages", limits.max_messages), ("tools", limits.max_tools)):
            if isinstance(body.get(name), list) and len(body[name]) > most:
                raise InvalidRequestError(f"{name}: more than {most}", param=name)

    async def _create(self, request: web.Request, asked: vai.MessageRequest, keys: Mapping[str, str]) -> web.Response:
        message = await self.engine.create(asked, keys)
        exchange, usage = request[EXCHANGE], message.usage
        exchange.usage = usage
        headers = {
            "X-Model": header_safe(message.model),
            "X-Input-Tokens": str(usage.input_tokens),
            "X-Output-Tokens": str(usage.output_tokens),
            "X-Duration-Ms": str(exchange.milliseconds),
            **dropped_header(message.dropped),
        }
        return json_response(message.to_wire(), headers=headers)

    async def _stream(
        self, request: web.Request, asked: vai.MessageRequest, keys: Mapping[str, str]
    ) -> web.StreamResponse:
        out = EventWriter(request, self.config.sse.ping_interval, self.config.timeouts.write)
        try:
            await self._copy(request, asked, keys, out)
        except Exception as raised:
            if out.response is None or isinstance(raised, ConnectionError):
                raise
            request[EXCHANGE].error = fault = error_of(raised, request.path)
            await out.fail(fault)
        except asyncio.CancelledError:
            if not self.expired or out.response is None:
                raise
            await out.fail(self._outlived())
        finally:
            await out.close()
        await out.end()
        request[EXCHANGE].sent = out.sent
        assert out.response is not None  # noqa: S101  (the answer began, or an error was raised)
        return out.response

    async def _copy(
        self, request: web.Request, asked: vai.MessageRequest, keys: Mapping[str, str], out: EventWriter
    ) -> None:
        """The hot path: events of one read of the provider's socket are one write to the caller's."""
        stream = await self.engine.open(asked, keys)
        try:
            out.headers = {"X-Model": header_safe(stream.model), **dropped_header(stream.dropped)}
            async for events in stream:
                await out.write(b"".join(map(sse_frame, events)))
            request[EXCHANGE].usage = stream.usage
            await out.end()
            await stream.finish()
        finally:
            stream.close()

    @staticmethod
    def _shutdown_error() -> Error:
        return providers.OverloadedError("the gateway is shutting down", code="draining", retry_after=1)

    def _outlived(self) -> Error:
        """The end of the grace has cancelled this request: take that back for as long as it takes to say so."""
        if task := asyncio.current_task():
            task.uncancel()
        return self._shutdown_error()

    # -- the rest ---------------------------------------------------------------------------------------------------

    async def models(self, request: web.Request) -> web.Response:
        self.callers.identify(request)
        provider, capability = request.query.get("provider"), request.query.get("capability")
        listed = await self.engine.models()
        rows = [row.model_dump() for row in listed.providers if provider in (None, row.id)]
        if capability is not None:
            rows = [r for r in rows if r["capabilities"].get(capability) or capability in r["native_tools"]]
        none: JSON = {"data": [], "has_more": False}  # Anthropic's SDKs look for a catalogue here, which vai has not
        return json_response({"providers": rows, "aliases": listed.aliases, "voice": {"stt": [], "tts": []}} | none)

    async def health(self, request: web.Request) -> web.Response:
        state: JSON = {
            "status": "draining" if self.draining else "healthy",
            "version": providers.__version__,
            "providers": {id: {"configured": self.engine.available(id)} for id in PROVIDERS},
            "uptime_seconds": int(time.monotonic() - self.started),
        }
        return json_response(state, status=503 if self.draining else 200)

    # -- around every request ---------------------------------------------------------------------------------------

    @web.middleware
    async def observe(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Request id, the log line, and any exception as an envelope."""
        given = request.headers.get("X-Request-ID", "")
        id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else f"req_{secrets.token_hex(12)}"
        token = request_id.set(id)
        exchange = request[EXCHANGE] = Exchange(id)
        status = 499  # what the log says of a caller that went away
        try:
            response = await self._answered(request, handler)
            status = response.status
            if isinstance(response, web.Response):
                exchange.sent = len(response.body) if isinstance(response.body, bytes) else 0
            return response
        finally:
            access.info("request", extra={"fields": exchange.fields(request, status)})
            request_id.reset(token)

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        allowed = ""
        try:
            if self.draining and request.path.startswith("/v1/"):
                raise self._shutdown_error()
            return await self._counted(request, handler)
        except asyncio.CancelledError:
            if not self.expired:
                raise
            fault = self._outlived()
        except ConnectionError:  # the caller went away
            raise
        except Exception as raised:
            fault = error_of(raised, request.path)
            if isinstance(raised, web.HTTPMethodNotAllowed):
                allowed = raised.headers["Allow"]
        request[EXCHANGE].error = fault
        response = error_response(fault)
        if allowed:
            response.headers["Allow"] = allowed
        if fault.code == "draining" or fault.status in (408, 413):
            response.force_close()
        return response

    async def _counted(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        task = asyncio.current_task()
        if task is None or not request.path.startswith("/v1/"):
            return await handler(request)
        self.running.add(task)
        self.idle.clear()
        try:
            return await handler(request)
        finally:
            self.running.discard(task)
            if not self.running:
                self.idle.set()

    async def mark(self, request: web.Request, response: web.StreamResponse) -> None:
        """Headers of every response; `request-id` is where Anthropic's SDKs look."""
        response.headers["Server"] = "vai"
        if EXCHANGE in request:
            response.headers["X-Request-ID"] = response.headers["request-id"] = request[EXCHANGE].id

    # -- the end ----------------------------------------------------------------------------------------------------

    async def drain(self, grace: float) -> None:
        """Let what runs come to its end; what has not after `grace` seconds is told so."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.idle.wait(), grace)
        self.expired = True
        for task in list(self.running):
            task.cancel()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.idle.wait(), 2)


def dropped_header(dropped: Iterable[str]) -> dict[str, str]:
    names = ", ".join(dropped)
    return {"X-Vai-Dropped": header_safe(names, 1024)} if names else {}


# == The app ===========================================================================================================

GATEWAY = web.AppKey("gateway", Gateway)


def make_engine(config: Config, environ: Mapping[str, str]) -> vai.Direct:
    """The engine of this configuration. In passthrough mode it has no keys of its own to fall back on."""
    times = config.timeouts
    return vai.Direct(
        provider_keys={id: section.api_key for id, section in config.providers.items() if section.api_key},
        base_urls={id: section.base_url for id, section in config.providers.items() if section.base_url},
        aliases=config.aliases,
        environ=environ,
        timeouts=vai.Timeouts(times.connect, times.first_byte, times.idle, times.total),
        max_tokens=config.limits.max_tokens_default,
        own_keys=False,
        keyless=config.auth.mode == "passthrough",
    )


async def _expect_nothing(request: web.Request) -> None:
    """`Expect: 100-continue` is answered when the body is read, after everything that can be refused without it."""


def make_app(config: Config, engine: vai.Direct) -> web.Application:
    gateway = Gateway(config, engine)
    app = web.Application(middlewares=[gateway.observe])
    app[GATEWAY] = gateway
    app.router.add_post("/v1/messages", gateway.messages, expect_handler=_expect_nothing)
    app.router.add_get("/v1/models", gateway.models)
    app.router.add_get("/health", gateway.health)
    app.on_response_prepare.append(gateway.mark)

    async def cleanup(app: web.Application) -> None:
        await engine.close()

    app.on_cleanup.append(cleanup)
    return app


# == Main ==============================================================================================================


def warm_up(engine: vai.Direct) -> None:
    """Build what is built on first use, so that the first caller does not wait for it."""
    body = {"model": "openai/warm-up", "messages": [{"role": "user", "content": "."}]}
    answer = {"choices": [{"message": {"content": "."}, "finish_reason": "stop"}]}
    PROVIDERS["openai"].decode(answer, engine.parse(body)).to_wire()
    gc.collect()
    gc.freeze()  # what is here now stays; a collection need not look at it again
    gc.set_threshold(10_000, 20, 20)


async def serve(config: Config, environ: Mapping[str, str], *, banner: Callable[[str, Gateway], None]) -> None:
    """Run until a signal; then no new work, a grace for what runs, and the end. A second signal ends at once."""
    engine = make_engine(config, environ)
    warm_up(engine)
    app = make_app(config, engine)
    gateway = app[GATEWAY]
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1, keepalive_timeout=75)
    await runner.setup()
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop() -> None:
        if stopped.is_set():
            os._exit(0)
        stopped.set()

    with contextlib.suppress(NotImplementedError):  # Windows
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, stop)
        loop.add_signal_handler(signal.SIGHUP, lambda: None)  # a closed terminal is no reason to go
    try:
        site = web.TCPSite(runner, config.server.host, config.server.port, backlog=1024)
        try:
            await site.start()
        except OSError as fault:
            reason = os.strerror(fault.errno) if fault.errno else str(fault)
            raise ConfigError(f"cannot listen on {config.server.host}:{config.server.port}: {reason}") from None
        host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
        banner(f"http://{host}:{runner.addresses[0][1]}", gateway)
        await stopped.wait()
        logger.info("shutting down; %d requests in progress", len(gateway.running))
        await gateway.drain(config.timeouts.drain)
    finally:
        await runner.cleanup()


def say_hello(url: str, gateway: Gateway, *, sandbox: bool) -> None:
    """What is on, and what to type next."""
    config, engine = gateway.config, gateway.engine
    ready = [id for id in PROVIDERS if engine.available(id)]
    lines = [f"vai {providers.__version__} listens on {url}", f"  auth       {config.auth.mode}"]
    if gateway.callers.made:
        lines.append(f"  key        {gateway.callers.made}   (made for this run; set VAI_API_KEYS to keep one)")
    lines.append(
        f"  providers  {', '.join(ready) or 'none has a key: bring one with each request, or set OPENAI_API_KEY …'}"
    )
    if sandbox:
        lines.append("  sandbox    every provider is played on this machine; no key, no network, no bill")
    if config.aliases:
        lines.append(f"  aliases    {', '.join(config.aliases)}")
    if config.auth.mode != "passthrough":
        key = gateway.callers.made or "YOUR_KEY"
        auth = f"-H 'x-api-key: {key}' " if config.auth.mode == "api_key" else ""
        model = "anthropic/claude-sonnet-5-5" if "anthropic" in ready or not ready else f"{ready[0]}/MODEL"
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]})
        lines.append(f"\nTry it:\n  curl {url}/v1/messages {auth}-H 'content-type: application/json' -d '{body}'")
    print("\n".join(lines), flush=True)


async def run(config: Config, environ: Mapping[str, str], *, sandbox: bool) -> None:
    async with contextlib.AsyncExitStack() as stack:
        if sandbox:
            environ = {**environ, **await stack.enter_async_context(_sandbox())}
            config = config.model_copy(update={"providers": {}})
        await serve(config, environ, banner=lambda url, gateway: say_hello(url, gateway, sandbox=sandbox))


@contextlib.asynccontextmanager
async def _sandbox() -> Any:
    if TYPE_CHECKING or not __package__:
        from sandbox import Sandbox
    else:
        from .sandbox import Sandbox
    async with Sandbox() as local:
        yield local.environ


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Exit code 0 after a shutdown, 2 for a configuration that cannot work."""
    options = arguments(sys.argv[1:] if argv is None else argv)
    try:
        config = load_config(vars(options), os.environ)
        if options.check_config:
            make_engine(config, os.environ)
            print("the configuration is good")
            return
        configure_logs(config.log)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(run(config, os.environ, sandbox=options.sandbox))
    except (ConfigError, InvalidRequestError) as fault:
        _fail(str(fault))
    except KeyboardInterrupt:
        return


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _fail(message: str) -> NoReturn:
    print(f"vai: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
