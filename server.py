"""The gateway: vai's message API over HTTP, for a team, a browser, any language, any Anthropic SDK.

    python server.py --sandbox          # everything, without a key or a network
    python server.py --config vai.toml

Flags stand over the environment over `vai.toml` over the defaults; `OPTIONS` lists them all. Needs vai.py, voice.py and
providers.py beside it, pydantic and aiohttp; uvloop and prometheus-client are used where they are installed. For
several processes: `gunicorn server:app -k aiohttp.GunicornUVLoopWebWorker -w N`.

Contents (`grep -n '^# == '` lists the sections):
    configuration · callers and their keys · rate limits · limits in Redis · web pages · logs · metrics
    errors and responses · connections · live sessions · the endpoints · the OpenAPI document · the app · main
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import base64
import collections
import contextlib
import contextvars
import fnmatch
import functools
import gc
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
import tomllib
import traceback
from array import array
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, NamedTuple, NoReturn, TypeVar, get_args

import aiohttp
from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    SkipValidation,
    TypeAdapter,
    ValidationError,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import PydanticCustomError

if TYPE_CHECKING or not __package__:
    import live
    import providers
    import vai
    import voice
    from providers import JSON, PROVIDERS, Error, InvalidRequestError, sse_frame
else:
    from . import live, providers, vai, voice
    from .providers import JSON, PROVIDERS, Error, InvalidRequestError, sse_frame
if TYPE_CHECKING:
    from pydantic_core import core_schema

__version__ = "0.1.0"
if getattr(vai, "__version__", None) != __version__:
    found = getattr(vai, "__version__", "unknown")
    raise ImportError(f"server.py {__version__} needs its own vai.py; version {found} is at {vai.__file__}")

T = TypeVar("T")
UPSTREAMS = (*PROVIDERS, *voice.SPEECH)  # the ids of all that a gateway may have a key for
logger = logging.getLogger("vai.server")
access = logging.getLogger("vai.access")


# == Configuration =====================================================================================================


class ConfigError(Exception):
    """One line that names the source, the field and what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, frozen=True)


def _form(pattern: str, says: str) -> AfterValidator:
    """A string that must have a form, and what to say of one that has not."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise PydanticCustomError("form", "must be {says}", {"says": says})
        return value

    return AfterValidator(check)


class ServerSection(_Section):
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    allow_open: bool = False
    trusted_proxies: list[IPvAnyNetwork] = []


RPM = Annotated[int, Field(ge=1, le=1_000_000_000)]  # requests a minute
ModelPattern = Annotated[
    str, _form(r"[A-Za-z0-9*][A-Za-z0-9._:@/+*-]{0,255}", "an alias, provider/model, or either with * in it")
]
Origin = Annotated[str, _form(r"\*|[a-z][a-z0-9+.-]*://[^/?#\s,*@]+", "scheme://host[:port] in full, or *")]
Key = Annotated[str, _form(vai.KEY_FORM, "printable ASCII without spaces or quotes")]
HTTPURL = Annotated[str, _form(vai.HTTP_URL, "an http(s) URL without a query")]
RedisURL = Annotated[str, _form(r"(rediss?|unix)://\S+", "redis://, rediss:// or unix://")]


class KeyEntry(_Section):
    key: Key = Field(min_length=8, repr=False)
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "default"
    rpm: RPM | None = None
    models: Annotated[list[ModelPattern], Field(min_length=1)] | None = None


class AuthSection(_Section):
    mode: Literal["api_key", "passthrough", "none"] = "api_key"
    keys: list[KeyEntry] = []


class ProviderSection(_Section):
    api_key: Key | None = Field(default=None, repr=False)
    base_url: HTTPURL | None = None


class LimitsSection(_Section):
    max_body_bytes: Annotated[int, Field(ge=1024)] = 10 << 20
    max_json_depth: Annotated[int, Field(ge=8, le=500)] = 64
    max_messages: Annotated[int, Field(ge=1)] = 1000
    max_tools: Annotated[int, Field(ge=1)] = 256
    max_tokens_default: Annotated[int, Field(ge=1)] = 4096


class RateLimitSection(_Section):
    enabled: bool = True
    caller_rpm: RPM = 100_000
    global_rpm: RPM = 1_000_000
    redis_url: RedisURL | None = Field(default=None, repr=False)


Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class TimeoutsSection(_Section):
    connect: Seconds = 10
    first_byte: Seconds = 120
    idle: Seconds = 120
    total: Seconds = 600
    head: Seconds = 15
    body: Seconds = 60
    write: Seconds = 60
    drain: Annotated[float, Field(ge=0, le=86_400)] = 30


class SSESection(_Section):
    ping_interval: Seconds = 15


class CORSSection(_Section):
    allowed_origins: list[Origin] = []
    allow_credentials: bool = False


class MetricsSection(_Section):
    enabled: bool = True
    require_key: bool = False


class LiveSection(_Section):
    max_sessions: Annotated[int, Field(ge=0, le=100_000)] = 1000
    idle_timeout: Seconds = 300
    max_duration: Seconds = 7200
    detector: Literal["auto", "onnx", "pysilero", "energy"] = "auto"
    detector_model: Annotated[str, Field(min_length=1)] | None = None


class LogSection(_Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] | None = None


class Config(_Section):
    """What the gateway runs with; `load_config` makes it."""

    server: ServerSection = ServerSection()
    auth: AuthSection = AuthSection()
    providers: dict[str, ProviderSection] = {}
    aliases: dict[str, SkipValidation[str | list[str]]] = {}  # `providers.alias_models` says what is wrong
    limits: LimitsSection = LimitsSection()
    rate_limit: RateLimitSection = RateLimitSection()
    timeouts: TimeoutsSection = TimeoutsSection()
    sse: SSESection = SSESection()
    cors: CORSSection = CORSSection()
    metrics: MetricsSection = MetricsSection()
    live: LiveSection = LiveSection()
    log: LogSection = LogSection()


@dataclass(frozen=True, slots=True)
class Option:
    """A setting: its place in `vai.toml`, its environment variable, its flag."""

    path: str
    env: str
    flag: str | None = None
    help: str = ""
    many: bool = False  # in the environment a comma-separated list


OPTIONS = (
    Option("server.host", "VAI_HOST", "--host", "address to listen on (127.0.0.1)"),
    Option("server.port", "VAI_PORT", "--port", "port to listen on (8080; 0 takes a free one)"),
    Option("server.allow_open", "VAI_ALLOW_OPEN", "--allow-open", "let --auth none listen beyond this machine"),
    Option("server.trusted_proxies", "VAI_TRUSTED_PROXIES", many=True),
    Option("auth.mode", "VAI_AUTH_MODE", "--auth", "api_key, passthrough or none (api_key)"),
    Option("auth.keys", "VAI_API_KEYS", many=True),
    Option("limits.max_body_bytes", "VAI_MAX_BODY_BYTES"),
    Option("limits.max_tokens_default", "VAI_MAX_TOKENS_DEFAULT"),
    Option("rate_limit.enabled", "VAI_RATE_LIMIT"),
    Option("rate_limit.caller_rpm", "VAI_CALLER_RPM"),
    Option("rate_limit.global_rpm", "VAI_GLOBAL_RPM"),
    Option("rate_limit.redis_url", "VAI_REDIS_URL"),
    *(Option(f"timeouts.{name}", f"VAI_TIMEOUT_{name.upper()}") for name in TimeoutsSection.model_fields),
    Option("sse.ping_interval", "VAI_PING_INTERVAL"),
    Option("cors.allowed_origins", "VAI_CORS_ORIGINS", many=True),
    Option("cors.allow_credentials", "VAI_CORS_CREDENTIALS"),
    Option("metrics.enabled", "VAI_METRICS"),
    Option("metrics.require_key", "VAI_METRICS_REQUIRE_KEY"),
    *(Option(f"live.{name}", f"VAI_LIVE_{name.upper()}") for name in LiveSection.model_fields),
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
                _place(tree, option.path, _parsed(option, _clean(value, source)))
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


def _parsed(option: Option, value: str) -> Any:
    """A list from the environment is comma-separated; of `auth.keys` an item is `key` or `name=key`."""
    if not option.many:
        return value
    items = [item.strip() for item in value.split(",") if item.strip()]
    if option.path != "auth.keys":
        return items
    keys = []
    for number, item in enumerate(items, 1):
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
        if name not in UPSTREAMS:
            raise ConfigError(f"{source}: providers.{name}: unknown provider; known: {', '.join(UPSTREAMS)}")
    for name, models in config.aliases.items():
        try:
            providers.alias_models(name, models)
        except Error as fault:
            raise ConfigError(f"{source}: {fault.param}: {fault.message}") from None
    if config.metrics.require_key and config.auth.mode != "api_key":
        where = sources.get("metrics.require_key", source)
        raise ConfigError(f"{where}: metrics.require_key: needs auth.mode api_key, the only one with keys of its own")
    names = [entry.name for entry in config.auth.keys]
    if len({entry.key for entry in config.auth.keys}) < len(names) or len(set(names)) < len(names):
        raise ConfigError(f"{sources.get('auth.keys', source)}: auth.keys: keys and names must be unique")
    if "*" in config.cors.allowed_origins and config.cors.allow_credentials:
        place = sources.get("cors.allow_credentials") or sources.get("cors.allowed_origins") or source
        raise ConfigError(f"{place}: cors.allow_credentials: not with any origin ('*'): name the origins")
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


@functools.lru_cache(256)
def is_own_name(host: str) -> bool:
    """Whether a `Host` header names this machine, with a port or without."""
    return is_loopback(re.sub(r":\d*$", "", host))


# == Callers and their keys ============================================================================================


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: the name goes into logs; `key` is what was presented, for passthrough.

    `account` is whose requests are counted together, `rpm` and `models` what the configured key may do.
    """

    name: str
    key: str | None = field(default=None, repr=False)
    account: str = ""
    rpm: int | None = None
    models: Sequence[str] | None = None

    def may_use(self, *names: str) -> bool:
        """Whether one of these names of a model, alias or provider/model, is on the list."""
        return self.models is None or any(fnmatch.fnmatchcase(name, one) for name in names for one in self.models)

    def check_model(self, *names: str, param: str = "model") -> None:
        """Raise unless the model that was asked for in the field `param`, which has these names, is on the list."""
        if not self.may_use(*names):
            message = f"this key may not use {names[0]}"
            raise providers.PermissionDeniedError(message, param=param, code="model_not_allowed")

    def check_routes(self, asked: vai.MessageRequest, param: str = "model") -> None:
        """Raise unless every model that may answer is on the list, or the alias that stands for them."""
        if self.models is not None:
            for route in (asked, *asked.fallbacks):
                self.check_model(asked.model, f"{route.provider}/{route.model_name}", param=param)


IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


@functools.lru_cache(4096)
def ip_address(text: str) -> IPAddress | None:
    """An address as sockets and proxies write it: some add a port."""
    found = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\](?::\d+)?|(\d+\.\d+\.\d+\.\d+)(?::\d+)?|([0-9A-Fa-f:.]+)(?:%.*)?", text)
    if not found:
        return None
    try:
        address = ipaddress.ip_address(next(filter(None, found.groups())))
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


@functools.lru_cache(4096)
def account_of(text: str) -> str:
    """Of IPv6 the first 64 bits: whoever has one such address has them all (RFC 6177)."""
    address = ip_address(text)
    if address is None:
        return "ip:unknown"
    if isinstance(address, ipaddress.IPv6Address):
        return f"ip:{ipaddress.IPv6Address(int(address) >> 64 << 64)}/64"
    return f"ip:{address}"


@functools.lru_cache(4096)
def _anyone(account: str) -> Caller:
    return Caller("anyone", account=account)


class Callers:
    """Who may call. A key is looked up by its digest and compared in constant time; none is kept readable."""

    def __init__(self, config: AuthSection, *, loopback: bool, proxies: Sequence[IPNetwork] = ()) -> None:
        self.mode = config.mode
        self.proxies = proxies
        self.made: str | None = None
        entries = list(config.keys)
        if self.mode == "api_key" and not entries:
            self.made = f"vai_sk_{secrets.token_urlsafe(32)}"
            entries = [KeyEntry(key=self.made, name="default")]
        self._known = {
            hashlib.sha256(entry.key.encode()).digest(): Caller(
                entry.name, account=f"key:{entry.name}", rpm=entry.rpm, models=entry.models
            )
            for entry in entries
        }
        self._loopback_only = self.mode == "none" and loopback

    def check_host(self, request: web.Request) -> None:
        """An open gateway on loopback answers to this machine's names: a page whose name was rebound has another."""
        if self._loopback_only and not is_own_name(request.headers.get("Host", "")):
            raise providers.PermissionDeniedError("this gateway answers to this machine's own names only", code="host")

    def identify(self, request: web.Request) -> Caller:
        """The caller, or an error: there is no way past this but through it."""
        if self.mode == "none":
            return _anyone(self.address(request))
        key = presented_key(request)
        if self.mode == "passthrough" and key:
            return Caller("passthrough", key, account=self.address(request))
        digest = hashlib.sha256((key or "").encode("utf-8", "surrogateescape")).digest()
        caller = next((one for known, one in self._known.items() if hmac.compare_digest(known, digest)), None)
        if not key or caller is None:  # one answer, whatever is wrong
            raise providers.AuthenticationError("no valid API key: send X-API-Key: KEY, or Authorization: Bearer KEY")
        return caller

    def address(self, request: web.Request) -> str:
        """Where a request comes from, as an account: what trusted proxies have forwarded goes by its sender."""
        peer = request.remote or ""
        address = ip_address(peer) if self.proxies else None
        if address:
            hops = ",".join(request.headers.getall("X-Forwarded-For", ())).split(",")
            while hops and any(address in network for network in self.proxies):
                hop = ip_address(hops.pop().strip()[:64])
                if hop is None:
                    break  # what is further left was not written by anyone we trust
                address = hop
            return account_of(str(address))
        return account_of(peer)


def presented_key(request: web.Request) -> providers.Secret | None:
    """The credential of a request. As at Anthropic, `X-API-Key` goes before `Authorization`; two of a kind are none."""
    given = request.headers.getall("X-API-Key", [])
    if not given and request.path == LIVE and "Authorization" not in request.headers:
        given = page_key(request)
    elif not given:
        values = request.headers.getall("Authorization", [])
        given = [found[1] for value in values if (found := re.fullmatch(r"(?i:bearer) +(\S+)", value.strip()))]
        if len(given) != len(values):
            return None
    return providers.Secret(given[0].strip()) if len(given) == 1 else None


LIVE = "/v1/messages/live"
PROTOCOL = "vai.live"  # what follows is its companion, which brings a key
KEY_PROTOCOL = "vai.key."


def subprotocols(request: web.Request) -> list[str]:
    """What the client of a WebSocket offers to speak."""
    offered = ",".join(request.headers.getall("Sec-WebSocket-Protocol", ()))
    return [name.strip() for name in offered.split(",") if name.strip()]


def page_key(request: web.Request) -> list[str]:
    """The credential of a web page, which cannot set headers on a WebSocket: a subprotocol's, else the query's."""
    offered = [name.removeprefix(KEY_PROTOCOL) for name in subprotocols(request) if name.startswith(KEY_PROTOCOL)]
    return offered or request.query.getall("api_key", [])


def provider_keys(
    request: web.Request, caller: Caller, byok: Sequence[str], brought: Mapping[str, str]
) -> dict[str, providers.Secret]:
    """The keys that came in headers; in passthrough mode the caller's own, unless one was brought for the provider.

    `byok` are the names under which the provider's key may come, `brought` the keys in the body.
    """
    prefix = "x-provider-key-"
    given = ((name.lower(), value) for name, value in request.headers.items())
    keys = vai.byok({name.removeprefix(prefix): providers.Secret(v) for name, v in given if name.startswith(prefix)})
    if caller.key and not (keys.keys() | vai.byok(brought).keys()) & set(byok):
        keys |= vai.byok({byok[-1]: caller.key})  # the name that the provider's two wire formats share
    return keys


# == Rate limits =======================================================================================================

MINUTE = 60.0  # seconds
FAILURES_RPM = 1000  # requests without a valid key, from one address
MOST_ACCOUNTS = 1 << 16  # beyond these the one that was quiet for longest is forgotten

Refusal = Literal["", "caller", "global", "failures"]
REFUSALS = {"caller": "of one caller", "global": "of all callers together", "failures": "without a valid key"}


class Verdict(NamedTuple):
    """What became of a request: which limit refused it, if any, or else how its caller stands."""

    refused: Refusal
    limit: int  # requests a minute
    remaining: int
    reset: int  # whole seconds until more remain

    def headers(self) -> dict[str, str]:
        """As OpenAI names them; the reset is in seconds, and after a 429 it is what `Retry-After` says."""
        return {
            "X-RateLimit-Limit-Requests": str(self.limit),
            "X-RateLimit-Remaining-Requests": str(self.remaining),
            "X-RateLimit-Reset-Requests": str(self.reset),
        }

    def error(self) -> Error:
        message = f"over {self.limit} requests a minute {REFUSALS[self.refused]}; more in {self.reset} s"
        return providers.RateLimitError(message, code=f"{self.refused}_rpm", retry_after=self.reset)


class Window:
    """What was admitted in the last minute: of each second the moment of its last request, and how many there were.

    A second's requests are forgotten together, a minute after the last of them: no 60 seconds, wherever they begin,
    hold more than was admitted, and a window has 61 entries at most, whatever the limit.
    """

    __slots__ = ("marks", "total")

    def __init__(self) -> None:
        self.marks = array("d")  # moment, count, moment, count …
        self.total = 0

    def forget(self, now: float) -> None:
        while self.marks and self.marks[0] + MINUTE <= now:
            self.total -= int(self.marks[1])
            del self.marks[:2]

    def add(self, now: float) -> None:
        if self.marks and int(self.marks[-2]) == int(now):
            self.marks[-2] = now
            self.marks[-1] += 1
        else:
            self.marks.extend((now, 1))
        self.total += 1

    def verdict(self, refused: Refusal, limit: int, now: float) -> Verdict:
        wait = self.marks[0] + MINUTE - now if self.marks else 0
        return Verdict(refused, limit, max(limit - self.total, 0), whole_seconds(wait))


def whole_seconds(wait: float) -> int:
    """What a client is told to wait: at least a second."""
    return min(max(math.ceil(wait), 1), int(MINUTE))


class Limiter:
    """A window for each account and one for all. Time arrives with every call, from a clock that is never set back."""

    def __init__(self, rpm: int = 1 << 62, *, most: int = MOST_ACCOUNTS) -> None:
        self._rpm = rpm
        self._all = Window()
        self._windows: OrderedDict[str, Window] = OrderedDict()  # the quietest first
        self._most = most

    def __len__(self) -> int:
        return len(self._windows)

    def admit(self, account: str, rpm: int, now: float) -> Verdict:
        """Count a request if both windows have room for it. What is refused counts for nothing."""
        window = self._windows.get(account)
        if window is None:
            window = self._windows[account] = Window()
            if len(self._windows) > self._most:
                self._windows.popitem(last=False)
        else:
            self._windows.move_to_end(account)
            window.forget(now)
        self._all.forget(now)
        if window.total >= rpm:
            return window.verdict("caller", rpm, now)
        if self._all.total >= self._rpm:
            return self._all.verdict("global", self._rpm, now)
        window.add(now)
        self._all.add(now)
        return window.verdict("", rpm, now)


class RateLimits:
    """The limits of a gateway: its own, or shared with others through Redis."""

    def __init__(self, config: RateLimitSection, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._own = Limiter(config.global_rpm)
        self._failures = Limiter()
        self.shared = SharedLimiter(config.redis_url, config.global_rpm, clock) if config.redis_url else None

    async def admit(self, caller: Caller) -> Verdict | None:
        """Count a request. None where nothing counts: limits are off, or Redis does not answer."""
        if not self._config.enabled:
            return None
        rpm = caller.rpm or self._config.caller_rpm
        if self.shared:
            return await self.shared.admit(caller.account, rpm)
        return self._own.admit(caller.account, rpm, self._clock())

    def fail(self, address: str) -> Verdict | None:
        """Count a request without a valid key, by where it comes from: None if there may be more of them.

        Whoever has a valid key is never held up by others who have none, behind one address with it.
        """
        if not self._config.enabled:
            return None
        verdict = self._failures.admit(address, min(FAILURES_RPM, self._config.caller_rpm), self._clock())
        return verdict._replace(refused="failures") if verdict.refused else None


# == Limits in Redis ===================================================================================================

# The same windows: KEYS are one account's and everybody's, ARGV their limits. Redis' clock is the one that all share.
SHARED_WINDOWS = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local windows, refused = {}, 0
for i, key in ipairs(KEYS) do
  local raw = redis.call('GET', key)
  local marks, kept, total = raw and cmsgpack.unpack(raw) or {}, {}, 0
  for j = 1, #marks, 2 do
    if marks[j] + 60 > now and marks[j] <= now + 1 then  -- a later one is from before the clock was set back
      kept[#kept + 1], kept[#kept + 2] = math.min(marks[j], now), marks[j + 1]
      total = total + marks[j + 1]
    end
  end
  windows[i] = {kept, total}
  if total >= tonumber(ARGV[i]) and refused == 0 then refused = i end
end
if refused == 0 then
  for i, key in ipairs(KEYS) do
    local marks = windows[i][1]
    if #marks > 0 and math.floor(marks[#marks - 1]) == math.floor(now) then
      marks[#marks - 1], marks[#marks] = now, marks[#marks] + 1
    else
      marks[#marks + 1], marks[#marks + 2] = now, 1
    end
    windows[i][2] = windows[i][2] + 1
    redis.call('SET', key, cmsgpack.pack(marks), 'PX', 60000)
  end
end
local told = math.max(refused, 1)
local first = windows[told][1][1] or now
return {refused, windows[told][2], math.ceil((first + 60 - now) * 1000)}
"""
SHARED_REFUSALS: dict[int, Refusal] = {0: "", 1: "caller", 2: "global"}

# How many live sessions each gateway has: KEYS[1] is a hash of gateways, ARGV the one that asks, the sessions it has
# (with the one that wants to begin), how many may be in all (none: it only tells), and for how many seconds that counts
# unless it is said again. What a gateway says takes the place of what it said before: the next message makes good for
# one that was lost, and a gateway that has died is forgotten.
SHARED_SESSIONS = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local own, here, most, lease = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local rows, all = redis.call('HGETALL', KEYS[1]), here
for i = 1, #rows, 2 do
  local told = cmsgpack.unpack(rows[i + 1])
  if told[2] <= now or told[2] > now + lease + 1 then  -- a later one is from before the clock was set back
    redis.call('HDEL', KEYS[1], rows[i])
  elseif rows[i] ~= own then
    all = all + told[1]
  end
end
if most and all > most then return {1, all} end
if here > 0 then
  redis.call('HSET', KEYS[1], own, cmsgpack.pack({here, now + lease}))
  redis.call('PEXPIRE', KEYS[1], math.ceil(lease * 1000))
else
  redis.call('HDEL', KEYS[1], own)
end
return {0, all}
"""
SESSIONS_KEY = "{vai}:live"
Keys = tuple[str | float, ...]  # keys of Redis' and arguments


class SharedLimiter:
    """Limits that several gateways share through Redis (extra `redis`). Where Redis fails, requests pass uncounted.

    One task has the connection. What is asked while a call is under way goes out together, as the next. A request
    waits for the call under way and for its own, so for 50 ms at most; nobody waits while an answer is overdue.
    """

    TICK = 0.005  # seconds
    PATIENCE = 5  # ticks for one call
    BATCH = 256  # at most so many are asked at once
    OVERDUE = 1.0  # seconds, until a connection is given up; nobody waits for it
    PAUSE = 1.0  # seconds, from a failure to the next attempt
    LEASE = 30.0  # seconds for which the sessions of a gateway count, unless it says anew that it has them
    RENEW = 10.0  # seconds until it does
    SECOND_CHANCE = 0.5  # seconds that a session may wait for a Redis that is late, before it begins all the same

    def __init__(self, url: str, rpm: int, clock: Callable[[], float] = time.monotonic) -> None:
        try:
            from redis import asyncio as library
        except ImportError:
            raise ConfigError("rate_limit.redis_url: redis is missing: pip install 'vai[redis]'") from None
        try:
            library.ConnectionPool.from_url(url)
        except ValueError:
            raise ConfigError("rate_limit.redis_url: must be redis://[:password@]host[:port][/db]") from None
        self._library: Any = library
        self._url = url
        self._rpm = rpm
        self._may_warn = OnceAMinute(clock)
        self._wanted = asyncio.Event()
        self._asked: list[Asked[Any]] = []
        self._under_way: list[Asked[Any]] = []
        self._task: asyncio.Task[None] | None = None
        self._renewal: asyncio.TimerHandle | None = None
        self._late = False  # an answer is overdue, and may still come
        self._id = secrets.token_hex(8)  # among the gateways
        self._sessions = 0
        self._forgotten = True  # Redis holds nothing of ours
        self._tried = asyncio.Event()  # to connect, with or without success
        self.connected = asyncio.Event()
        self.passed = 0  # requests and sessions that went uncounted

    async def start(self, patience: float = 0.25) -> None:
        """Try to connect; if that takes longer, it goes on while the first requests pass."""
        self._task = asyncio.create_task(self._run())
        self._renew()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._tried.wait(), patience)

    async def close(self) -> None:
        if self._renewal:
            self._renewal.cancel()
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def admit(self, account: str, rpm: int) -> Verdict | None:
        """As `Limiter.admit`; None where Redis does not answer."""
        verdict = None
        if self.connected.is_set():
            keys = f"{{vai}}:rpm:{account}", "{vai}:rpm:all"  # in braces: one node of a cluster
            verdict = await self._put(SHARED_WINDOWS, keys, (rpm, self._rpm), functools.partial(self._verdict, rpm))
        self.passed += verdict is None
        return verdict

    def _verdict(self, rpm: int, told: Sequence[int]) -> Verdict:
        code, total, wait = told
        refused = SHARED_REFUSALS[code]
        limit = self._rpm if refused == "global" else rpm
        return Verdict(refused, limit, max(limit - total, 0), whole_seconds(wait / 1000))

    async def begin(self, sessions: int, most: int) -> bool | None:
        """Whether a live session may begin, the last of `sessions` here, where there may be `most` in all.

        None where Redis does not answer; for one that is late it waits a little. Whatever comes of it, `tell` how many
        there are when it is over.
        """
        self._sessions, self._forgotten = sessions, False
        question = SHARED_SESSIONS, (SESSIONS_KEY,), (self._id, sessions, most, self.LEASE)
        answer = None
        until = asyncio.get_running_loop().time() + self.SECOND_CHANCE
        with contextlib.suppress(TimeoutError):
            while answer is None and (self._late or self.connected.is_set()):
                async with asyncio.timeout_at(until):
                    await self.connected.wait()
                answer = await self._put(*question, self._may_begin)
        if self._sessions != sessions:  # while this one waited others came or went
            self._tell_again()
        self.passed += answer is None
        return answer

    def tell(self, sessions: int) -> None:
        """So many live sessions are left here. Nobody waits for that: what Redis misses now, it is told later."""
        self._sessions, self._forgotten = sessions, False
        if self.connected.is_set():
            args = self._id, sessions, "", self.LEASE
            self._put(SHARED_SESSIONS, (SESSIONS_KEY,), args, functools.partial(self._told, sessions))

    def _told(self, sessions: int, told: Sequence[int]) -> bool:
        self._forgotten = sessions == self._sessions == 0
        return self._may_begin(told)

    @staticmethod
    def _may_begin(told: Sequence[int]) -> bool:
        return {0: True, 1: False}[told[0]]

    def _tell_again(self) -> None:
        if not self._forgotten:
            self.tell(self._sessions)

    def _renew(self) -> None:
        self._renewal = asyncio.get_running_loop().call_later(self.RENEW, self._renew)
        self._tell_again()

    def _put(self, script: str, keys: Keys, args: Keys, read: Callable[[Any], T]) -> asyncio.Future[T | None]:
        """What `read` will make of the script's answer; None where Redis does not answer."""
        asked = Asked(script, (*keys, *args), len(keys), read, asyncio.get_running_loop().create_future())
        self._asked.append(asked)
        self._wanted.set()
        return asked.answer

    async def _run(self) -> None:
        while True:
            client = self._library.Redis.from_url(  # protocol 2: older servers know no other
                self._url, protocol=2, single_connection_client=True, retry=None, socket_connect_timeout=self.OVERDUE
            )
            try:
                await self._talk(client)
            except Exception as fault:  # whatever it is, no request may suffer from it
                self._warn(fault)
            finally:
                self._tried.set()
                self._let_pass()
                with contextlib.suppress(Exception):
                    await client.aclose()
            await asyncio.sleep(self.PAUSE)

    def _let_pass(self) -> None:
        """Whoever waits, and whoever comes until the next `connected`."""
        self.connected.clear()
        for asked in self._under_way + self._asked:
            asked.settle(None)
        self._asked = []

    async def _talk(self, client: Any) -> None:
        async with asyncio.timeout(self.OVERDUE):
            hashes = {script: await client.script_load(script) for script in (SHARED_WINDOWS, SHARED_SESSIONS)}
        self.connected.set()
        self._tried.set()
        self._tell_again()
        while True:
            if not self._asked:
                self._wanted.clear()
                await self._wanted.wait()
            self._under_way, self._asked = self._asked[: self.BATCH], self._asked[self.BATCH :]
            calls = client.pipeline(transaction=False)
            for asked in self._under_way:
                calls.evalsha(hashes[asked.script], asked.keys, *asked.given)
            answers = await self._answered(calls.execute())
            for asked, told in zip(self._under_way, answers, strict=True):
                asked.settle(asked.read(told))

    async def _answered(self, call: Coroutine[Any, Any, list[Any]]) -> list[Any]:
        """What Redis says. Ticks are longer where this process is too busy to read it: that is no fault of Redis."""
        task = asyncio.ensure_future(call)
        try:
            for _ in range(self.PATIENCE):
                await asyncio.wait({task}, timeout=self.TICK)
                if task.done():
                    return task.result()
            self._late = True
            self._let_pass()
            await asyncio.wait({task}, timeout=self.OVERDUE)
            if not task.done():
                raise TimeoutError
            self._warn(TimeoutError())
            self.connected.set()
            self._tell_again()
            return task.result()
        finally:
            self._late = False
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _warn(self, fault: Exception) -> None:
        if self._may_warn():
            logger.warning("Redis fails (%s): limits are not shared, requests pass", type(fault).__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Asked(Generic[T]):
    """A question to Redis: a script, what it is given (the first `keys` of it are keys), and what reads its answer."""

    script: str
    given: Keys
    keys: int
    read: Callable[[Any], T]
    answer: asyncio.Future[T | None]

    def settle(self, answer: T | None) -> None:
        if not self.answer.done():  # its caller may have gone
            self.answer.set_result(answer)


# == Web pages =========================================================================================================

EXPOSED = (
    *("X-Request-ID", "request-id", "X-Model", "X-Input-Tokens", "X-Output-Tokens", "X-Duration-Ms", "X-Vai-Dropped"),
    *("Retry-After", *Verdict("", 0, 0, 0).headers()),
)


class CORS:
    """Which web pages may read our answers: those of a configured origin, to the letter (Fetch standard, 3.2)."""

    def __init__(self, config: CORSSection) -> None:
        self._origins = frozenset(config.allowed_origins)
        self._credentials = config.allow_credentials

    def allows(self, origin: str | None) -> bool:
        return origin is not None and ("*" in self._origins or origin in self._origins)

    def headers(self, request: web.Request) -> dict[str, str]:
        """Of any answer, errors included: a browser hides what lacks them."""
        headers, origin = {"Vary": "Origin"}, request.headers.get("Origin")
        if origin is not None and self.allows(origin):
            headers["Access-Control-Allow-Origin"] = "*" if "*" in self._origins else origin
            headers["Access-Control-Expose-Headers"] = ", ".join(EXPOSED)
            if self._credentials:
                headers["Access-Control-Allow-Credentials"] = "true"
        return headers

    def preflight(self, request: web.Request) -> web.Response | None:
        """The answer to a browser that asks before it sends. Any header may be sent: what counts is the key."""
        if not self._origins or request.method != "OPTIONS":
            return None
        asked = request.headers.get("Access-Control-Request-Method")
        origin = request.headers.get("Origin")
        if asked is None or origin is None:
            return None
        headers = {}
        if self.allows(origin):
            headers = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": "600"}
            wanted = request.headers.get("Access-Control-Request-Headers", "")
            if re.fullmatch(r"[A-Za-z0-9_, -]{1,4096}", wanted):
                headers["Access-Control-Allow-Headers"] = wanted
        return web.Response(status=204, headers=headers)


# == Logs ==============================================================================================================

request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)


_log_line = json.JSONEncoder(default=str).encode


@functools.lru_cache(4)
def _second(moment: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))


def _line(created: float, level: str, name: str, message: str, fields: JSON) -> JSON:
    second = int(created)
    time = f"{_second(second)}.{int((created - second) * 1000):03d}Z"
    line: JSON = {"time": time, "level": level, "logger": name, "message": message}
    if id := request_id.get():
        line["request_id"] = id
    line |= fields
    return line


class JSONFormatter(logging.Formatter):
    """One JSON object a line. Of an exception only its type and where it was raised: its message may hold content."""

    def format(self, record: logging.LogRecord) -> str:
        message = providers.redact(record.getMessage())
        line = _line(record.created, record.levelname.lower(), record.name, message, getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[0]:
            line["exception"] = record.exc_info[0].__name__
            line["stack"] = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(record.exc_info[2])][-8:]
        return _log_line(line)


class TextFormatter(JSONFormatter):
    """The same for people; with `color` the status stands out on a terminal."""

    def __init__(self, *, color: bool = False) -> None:
        super().__init__()
        self._color = color

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line: JSON = json.loads(super().format(record))
        if record.name == access.name:
            return f"{clock}  {self._exchange(line)}"
        extra = "".join(f"\n    {place}" for place in line.get("stack", ()))
        return f"{clock}  {line['level'].upper()}  {line['message']}{extra}"

    def _exchange(self, line: JSON) -> str:
        """`200    1.2 s  POST /v1/messages  openai/gpt-4o  12 → 7 tokens  alice  req_…`"""
        what = [f"{line['method']} {json.dumps(line['path'])[1:-1]}"]
        if line.get("model"):
            what.append(f"{line['provider']}/{line['model']}")
        if line.get("fallbacks"):
            what.append(f"after {', '.join(line['fallbacks'])}")
        told = {"audio_in": "heard", "audio_out": "spoken"}
        what += [f"{line[name]:.1f} s {done}" for name, done in told.items() if name in line]
        if "output_tokens" in line:
            what.append(f"{line['input_tokens']} → {line['output_tokens']} tokens")
        if live := line.get("live"):
            what.append(f"{live['turns']} turns, {live['closed']}")
        what += [line.get("code") or line["error"]] if line.get("error") else []
        what += [line["caller"]] if line.get("caller") else []
        return "  ".join([self._status(line["status"]), _took(line["duration_ms"]), *what, line.get("request_id", "")])

    def _status(self, status: int) -> str:
        color = 32 if status < 400 else 33 if status < 500 else 31  # green, yellow, red
        return f"\x1b[{color}m{status}\x1b[0m" if self._color else str(status)


def _took(milliseconds: int) -> str:
    return f"{milliseconds:>5} ms" if milliseconds < 1000 else f"{milliseconds / 1000:>5.1f} s "


class OnceAMinute:
    """True at most once a minute: for lines that would otherwise fill the log."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = -math.inf

    def __call__(self) -> bool:
        now = self._clock()
        if now < self._until:
            return False
        self._until = now + MINUTE
        return True


class LogWriter:
    """A stream that never waits: a thread writes to the descriptor. What is not read in time is dropped and counted."""

    def __init__(self, descriptor: int, most: int = 10_000) -> None:
        self._descriptor = descriptor
        self._most = most
        self._lines: collections.deque[str] = collections.deque()
        self._dropped = 0
        self._more = threading.Event()
        threading.Thread(target=self._run, name="vai-log", daemon=True).start()

    def write(self, line: str) -> None:
        if len(self._lines) >= self._most:
            self._dropped += 1
            return
        self._lines.append(line)
        if not self._more.is_set():
            self._more.set()

    def flush(self) -> None:
        """Nothing: that would be waiting."""

    def finish(self, seconds: float = 1) -> None:
        """Wait a moment until all is written."""
        until = time.monotonic() + seconds
        while self._lines and time.monotonic() < until:
            time.sleep(0.001)

    def _run(self) -> None:
        try:
            while self._more.wait():
                self._more.clear()
                while lines := list(self._lines):
                    data = "".join(lines).encode("utf-8", "replace")
                    while data:
                        data = data[os.write(self._descriptor, data) :]
                    for _ in lines:
                        self._lines.popleft()
                if self._dropped:
                    dropped, self._dropped = self._dropped, 0
                    logger.warning("%d lines of the log were not read in time, and dropped", dropped)
                time.sleep(0.01)  # lines come in bunches
        except OSError:  # nobody will ever read it
            self._most = 0
            self._lines.clear()


def configure_logs(config: LogSection, *, alone: bool = True) -> None:
    """Logs go to stderr. aiohttp's own would repeat a malformed request with a traceback, so they stay out.

    `alone` says that all log lines of this process are ours, so that records need hold no more than ours say.
    """
    style = config.format or ("text" if sys.stderr.isatty() else "json")
    writer = LogWriter(sys.stderr.fileno())
    atexit.register(writer.finish)
    handler = logging.StreamHandler(writer)
    color = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    handler.setFormatter(JSONFormatter() if style == "json" else TextFormatter(color=color))
    if alone:  # no line says thread, process or line of code (logging HOWTO, "Optimization")
        logging._srcfile = None
        logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    Exchange.lines = writer if alone and style == "json" else None
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("vai").setLevel(config.level.upper())
    for noisy in ("aiohttp.server", "aiohttp.access", "aiohttp.websocket", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


@dataclass(slots=True)
class LiveTally:
    """What became of a live session."""

    audio_in: float = 0.0  # seconds
    audio_out: float = 0.0
    turns: int = 0
    interrupts: int = 0  # that were meant
    reconnects: int = 0  # to the speech service
    closed: str = "disconnected"  # why it ended

    def fields(self) -> JSON:
        seconds = {"audio_in": round(self.audio_in, 1), "audio_out": round(self.audio_out, 1)}
        counts = {"turns": self.turns, "interrupts": self.interrupts, "reconnects": self.reconnects}
        return {**seconds, **counts, "closed": self.closed}


@dataclass(slots=True)
class Exchange:
    """One request, as the log will tell it."""

    id: str
    begun: float = field(default_factory=time.monotonic)
    caller: str | None = None
    provider: str | None = None
    model: str | None = None
    usage: Mapping[str, int] | None = None  # tokens, by the names of `vai.Usage`
    speech: Mapping[tuple[str, str], float] = field(default_factory=dict)  # `providers.AudioSeconds`
    error: Error | None = None
    sent: int | None = None
    status: int = 499  # what the log says of a caller that went away
    first_token: float | None = None  # seconds from the beginning
    attempts: Sequence[providers.Attempt] = ()
    live: LiveTally | None = None
    lines: ClassVar[LogWriter | None] = None  # of a process in which nobody else takes log records

    def log(self, request: web.BaseRequest) -> None:
        """The line of the access log; straight into the stream if that is all that would become of a record."""
        if not access.isEnabledFor(logging.INFO):
            return
        fields = self.fields(request)
        if self.lines:
            self.lines.write(_log_line(_line(time.time(), "info", access.name, "request", fields)) + "\n")
        else:
            access.info("request", extra={"fields": fields})

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    @property
    def milliseconds(self) -> int:
        return int(self.seconds * 1000)

    def settle(self) -> None:
        """Whose answer or error the caller got, where an alias had several to ask."""
        if len(self.attempts) > 1:
            told = next((one for one in self.attempts if one.fault is self.error), self.attempts[-1])
            self.provider, self.model = told.provider, told.model

    def forget_frames(self) -> None:
        """An error holds the frames that it came through, and they the request, which holds the error.

        That ring is broken here: else each request that is refused would wait for the garbage collector.
        """
        faults: list[BaseException | None] = [self.error, *(attempt.fault for attempt in self.attempts)]
        while faults:
            if fault := faults.pop():
                faults += [fault.__context__, fault.__cause__]
                fault.__traceback__ = fault.__context__ = fault.__cause__ = None

    def fields(self, request: web.BaseRequest) -> JSON:
        out: JSON = {"request_id": self.id, "caller": self.caller, "method": request.method, "path": request.path[:200]}
        out |= {"status": self.status, "duration_ms": self.milliseconds, "provider": self.provider, "model": self.model}
        if self.usage:
            out |= {name: self.usage.get(name, 0) for name in ("input_tokens", "output_tokens")}
        for (_, direction), seconds in self.speech.items():
            out[f"audio_{direction}"] = round(seconds, 2)
        if self.error:
            out |= {"error": self.error.type, "code": self.error.code}
        if failed := [f"{one.provider} {one.fault.code or one.fault.type}" for one in self.attempts[:-1] if one.fault]:
            out["fallbacks"] = failed
        if self.live:
            out["live"] = self.live.fields()
        return {key: value for key, value in (out | {"bytes": self.sent}).items() if value is not None}


EXCHANGE = web.RequestKey("exchange", Exchange)
VERDICT = web.RequestKey("verdict", Verdict)


def new_request_id() -> str:
    return f"req_{next(_numbers)}"


def _random_numbers() -> Iterator[str]:
    """12 random bytes each, as hex. The system is asked for many at once; a process that was forked asks anew."""
    while True:
        many = secrets.token_hex(12 * 1024)
        yield from (many[start : start + 24] for start in range(0, len(many), 24))


_numbers = _random_numbers()


def _forked() -> None:
    global _numbers
    _numbers = _random_numbers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


# == Metrics ===========================================================================================================
# Label values come from closed sets, whatever callers send: provider ids, this app's routes, its own statuses and error
# types. What is none of these is `other`.

OTHER = "other"
DURATIONS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
LAGS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
DIRECTIONS = {
    "input": "input_tokens",
    "output": "output_tokens",
    "cache_read": "cache_read_input_tokens",
    "cache_write": "cache_creation_input_tokens",
}
TURN_LATENCIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 3, 5, 10, 30)
TURN_STAGES = ("stt_final", "decision", "first_token", "first_audio")
DISMISSALS = ("no_speech", "echo", "backchannel", "not_meant", "unclear")
CLOSING = {  # why a live session ended → the close code of its WebSocket (RFC 6455, 7.4.1)
    **dict.fromkeys(("client", "disconnected", "idle_timeout", "max_duration"), 1000),
    **{"draining": 1001, "audio_too_fast": 1008, "slow_client": 1008, "refused": 1008, "error": 1011},
}
FIRST_TOKENS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """What the gateway does, counted once a request. This one counts nothing; `missing` says why."""

    def __init__(self, missing: str = "") -> None:
        self.missing = missing
        self.streaming: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        self.talking: contextlib.AbstractContextManager[object] = contextlib.nullcontext()

    def request(self, endpoint: str, exchange: Exchange) -> None:
        """A request has been answered, or its caller has gone."""

    def rate_limited(self, scope: Refusal) -> None:
        """A request was refused by this limit of ours."""

    def limits_unshared(self) -> None:
        """A request, or a live session, passed a limit that several processes share: its store does not answer."""

    def lag(self, seconds: float) -> None:
        """The event loop was this late."""

    def session(self, tally: LiveTally) -> None:
        """A live session has ended."""

    def live_audio(self, direction: Literal["in", "out"], seconds: float) -> None:
        """So much audio came from a client, or went to one."""

    def turn(self, stages: Mapping[str, float]) -> None:
        """A turn has ended: seconds from the end of the user's speech to each stage that there was."""

    def interrupt(self, outcome: str) -> None:
        """Somebody spoke over an answer: `interrupted`, or why that was dismissed."""

    def live_error(self, provider: str, type: str) -> None:
        """An error was told to a live session's client."""

    def reconnected(self, times: int) -> None:
        """A live session lost a socket of the speech service's, and made it anew."""

    def text(self) -> bytes:
        """Prometheus' text format 0.0.4. Raises `NotFoundError` where nothing is counted."""
        raise providers.NotFoundError(self.missing, code="no_metrics")


class _Children(dict[tuple[Any, ...], T]):
    """The children of a metric by label values; each is looked up in the metric once."""

    def __init__(self, labels: Callable[..., T]) -> None:
        self._labels = labels

    def __missing__(self, values: tuple[Any, ...]) -> T:
        child = self[values] = self._labels(*values)
        return child


class PrometheusMetrics(Metrics):
    """Counts with prometheus-client; raises `ImportError` without it.

    With PROMETHEUS_MULTIPROC_DIR in the environment, an empty folder that several processes share, each of them shows
    the sums over all: https://prometheus.github.io/client_python/multiprocess/
    """

    def __init__(self) -> None:
        import prometheus_client as prometheus
        from prometheus_client import multiprocess

        super().__init__()
        prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]  # twice the series, and nothing told
        self._render = prometheus.generate_latest
        self._folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        registry = self._registry = prometheus.CollectorRegistry()

        def counter(name: str, help: str, *labels: str) -> _Children[prometheus.Counter]:
            return _Children(prometheus.Counter(f"vai_{name}", help, labels, registry=registry).labels)

        def histogram(name: str, help: str, bounds: Sequence[float], *labels: str) -> _Children[prometheus.Histogram]:
            return _Children(
                prometheus.Histogram(f"vai_{name}", help, labels, buckets=bounds, registry=registry).labels
            )

        self._requests = counter("requests", "Requests answered.", "provider", "endpoint", "status")
        self._durations = histogram(
            "request_duration_seconds", "From the request to the end of the answer.", DURATIONS, "provider", "endpoint"
        )
        self._first_tokens = histogram(
            "time_to_first_token_seconds", "From a streaming request to its first delta.", FIRST_TOKENS, "provider"
        )
        self._tokens = counter("tokens", "Tokens, as providers bill them.", "provider", "direction")
        self._speech = counter("speech_seconds", "Seconds of audio that was heard or spoken.", "provider", "direction")
        self._errors = counter("errors", "Errors told to callers.", "provider", "type")
        self._retries = counter("upstream_retries", "Requests repeated at one provider.", "provider", "reason")
        self._fallbacks = counter(
            "fallbacks", "Next models of an alias that were asked.", "provider", "next_provider", "reason"
        )
        self._limits = counter("rate_limit_hits", "Requests over a limit of the gateway's.", "scope")
        self._unshared = prometheus.Counter(
            "vai_rate_limits_unshared",
            "Requests, and live sessions, that passed while the store of the limits was down.",
            registry=registry,
        )
        self._lags = prometheus.Histogram(
            "vai_event_loop_lag_seconds",
            "How late the event loop was, looked at four times a second.",
            buckets=LAGS,
            registry=registry,
        )
        streams = prometheus.Gauge(
            "vai_streams_in_progress", "Streams in progress.", registry=registry, multiprocess_mode="livesum"
        )
        self.streaming = streams.track_inprogress()
        sessions = prometheus.Gauge(
            "vai_live_sessions_in_progress", "Live sessions.", registry=registry, multiprocess_mode="livesum"
        )
        self.talking = sessions.track_inprogress()
        self._sessions = counter("live_sessions", "Live sessions that have ended.", "reason")
        self._audio = counter("live_audio_seconds", "Seconds of audio in live sessions.", "direction")
        self._stages = histogram(
            "live_turn_seconds", "From the end of the user's speech to each stage of the turn.", TURN_LATENCIES, "stage"
        )
        self._interrupts = counter("live_interrupts", "Speech over an answer, by what became of it.", "outcome")
        self._reconnects = prometheus.Counter(
            "vai_live_reconnects", "Sockets of the speech service that were lost and made anew.", registry=registry
        )
        if self._folder:
            self._registry = prometheus.CollectorRegistry()
            multiprocess.MultiProcessCollector(self._registry, self._folder)  # type: ignore[no-untyped-call]
        else:
            prometheus.ProcessCollector(registry=registry)

    def request(self, endpoint: str, exchange: Exchange) -> None:
        provider = exchange.provider or OTHER
        self._requests[provider, endpoint, exchange.status].inc()
        self._durations[provider, endpoint].observe(exchange.seconds)
        if exchange.first_token is not None:
            self._first_tokens[provider,].observe(exchange.first_token)
        if usage := exchange.usage:
            for direction, name in DIRECTIONS.items():
                if (tokens := usage.get(name, 0)) > 0:  # a counter takes no less, whatever a provider says
                    self._tokens[provider, direction].inc(tokens)
        for (service, direction), seconds in exchange.speech.items():
            self._speech[service, direction].inc(seconds)
        if exchange.error:
            self._errors[provider, exchange.error.type].inc()
        for number, attempt in enumerate(exchange.attempts):
            for reason in attempt.repeats:
                self._retries[attempt.provider, reason].inc()
            if number:
                failed = exchange.attempts[number - 1]
                reason = failed.fault.type if failed.fault else OTHER
                self._fallbacks[failed.provider, attempt.provider, reason].inc()

    def rate_limited(self, scope: Refusal) -> None:
        self._limits[scope,].inc()

    def limits_unshared(self) -> None:
        self._unshared.inc()

    def lag(self, seconds: float) -> None:
        self._lags.observe(seconds)

    def session(self, tally: LiveTally) -> None:
        self._sessions[tally.closed if tally.closed in CLOSING else OTHER,].inc()

    def live_audio(self, direction: Literal["in", "out"], seconds: float) -> None:
        self._audio[direction,].inc(seconds)

    def turn(self, stages: Mapping[str, float]) -> None:
        for stage in TURN_STAGES:
            if stage in stages:
                self._stages[stage,].observe(stages[stage])

    def interrupt(self, outcome: str) -> None:
        self._interrupts[outcome if outcome in ("interrupted", *DISMISSALS) else OTHER,].inc()

    def live_error(self, provider: str, type: str) -> None:
        self._errors[provider, type if type in providers.ERRORS else OTHER].inc()

    def reconnected(self, times: int) -> None:
        self._reconnects.inc(times)

    def text(self) -> bytes:
        if self._folder and os.name == "posix":
            self._forget_the_dead(self._folder)
        return self._render(self._registry)

    @staticmethod
    def _forget_the_dead(folder: str) -> None:
        """The streams of a process that was killed are in progress no more."""
        from prometheus_client import multiprocess

        for path in Path(folder).glob("gauge_live*_*.db"):
            pid = int(path.stem.rpartition("_")[2])
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                multiprocess.mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
            except PermissionError:
                continue


def make_metrics(config: MetricsSection) -> Metrics:
    """What counts, as far as it is wanted and installed. Raises `ConfigError` for a shared folder that is none."""
    if not config.enabled:
        return Metrics("metrics are switched off here (metrics.enabled)")
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise ConfigError("PROMETHEUS_MULTIPROC_DIR: must be a folder that can be written to")
    try:
        return PrometheusMetrics()
    except ImportError:
        return Metrics("metrics need prometheus-client: pip install 'vai[metrics]'")


async def watch_loop(metrics: Metrics, every: float = 0.25, most: float = 0.1) -> None:
    """Count how late the event loop is, and say so (once a minute) where something has held it up for long."""
    may_warn = OnceAMinute()
    while True:
        due = time.monotonic() + every
        await asyncio.sleep(every)
        late = max(time.monotonic() - due, 0)
        metrics.lag(late)
        if late > most and may_warn():
            logger.warning("the event loop was held up for %d ms: too much work for one process?", late * 1000)


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
    if fault.status == 426:
        headers |= {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    return json_response(fault.to_wire(request_id.get()), status=fault.status, headers=headers)


def json_response(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    raw = providers.dump_body(body, finite=True)  # providers' numbers came through `loads`
    return web.Response(body=raw, status=status, headers=headers, content_type="application/json")


def header_safe(value: object, limit: int = 512) -> str:
    """What came from outside, fit for a response header."""
    text = str(value)
    if not (text.isascii() and text.isprintable()):
        text = HEADER_SAFE.sub("?", text)
    return text[:limit]


async def read_body(request: web.Request, limits: LimitsSection, seconds: float, *, forms: bool = False) -> JSON:
    """The body, JSON or (with `forms`) a form, checked while it is read: type, encoding, size, time, depth."""
    read: Callable[[bytes, LimitsSection], JSON] = read_keys
    if forms and request.content_type == "multipart/form-data":
        read = functools.partial(read_form, content_type=request.headers["Content-Type"])
    elif request.content_type != "application/json":
        message = f"the Content-Type must be application/json{' or multipart/form-data' * forms}"
        raise InvalidRequestError(message, code="unsupported_media_type")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise compressed()
    if (request.content_length or 0) > limits.max_body_bytes:
        raise too_large(limits)
    if "Expect" in request.headers:
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
    except web.RequestPayloadError:
        raise InvalidRequestError("the body is malformed: its length or its chunks", code="malformed_body") from None
    raw = b"".join(parts)
    try:
        body = await off_loop(size, read, raw, limits)
    except Error as fault:
        raise fault.with_traceback(None) from None
    finally:
        del parts, raw, part  # a traceback's locals would show the keys in it
    return body


def compressed() -> Error:
    return InvalidRequestError("compressed request bodies are not taken", code="unsupported_encoding")


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


MAX_FIELD_HEAD = 4096  # bytes before what a field of a form holds
FIELD_NAME = re.compile(  # other parameters are stepped over as a whole: a file may be called `x; name=y`
    rb"(?i)\r\ncontent-disposition:[ \t]*form-data[ \t]*"
    rb'(?:;[ \t]*(?!name=)[^\s;="]+=(?:"(?:[^"\\\r\n]|\\[^\r\n])*"|[^\s;"]*)[ \t]*)*'
    rb';[ \t]*name=(?:"([^"\r\n]{1,64})"|([^\s;"]{1,64}))'
)


def read_form(raw: bytes, limits: LimitsSection, content_type: str) -> JSON:
    """A form as the object that would have said the same: its `file` is `audio`, in bytes (RFC 7578)."""
    found = re.search(r'(?i)[;\s]boundary=(?:"([^"\r\n]{1,70})"|([^\s;"]{1,70}))', content_type)
    mark = b"\r\n--" + (found[1] or found[2]).encode("utf-8", "surrogateescape") if found else b""
    _, *parts = (b"\r\n" + raw).split(mark, 34) if mark else [b""]
    if len(parts) > 33:
        raise InvalidRequestError("the form has over 32 fields", code="malformed_form")
    if not parts or not parts[-1].startswith(b"--"):
        raise InvalidRequestError("the form is cut short, or not one", code="malformed_form")
    body: JSON = {}
    for part in parts[:-1]:
        head, _, data = part.partition(b"\r\n\r\n")
        named = FIELD_NAME.search(head[:MAX_FIELD_HEAD])
        if not named:
            raise InvalidRequestError("a field of the form has no name", code="malformed_form")
        name = (named[1] or named[2]).decode("utf-8", "replace")
        if name in body:
            raise InvalidRequestError(f"{header_safe(name)}: is in the form twice", param=header_safe(name))
        body[name] = data if name == "file" else _form_value(name, data)
    if "file" not in body or "audio" in body:
        raise InvalidRequestError("file: is required, and no audio beside it", param="file")
    body["audio"] = body.pop("file")
    return body


def _form_value(name: str, data: bytes) -> Any:
    """What a field's text stands for."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise InvalidRequestError(f"{header_safe(name)}: is not text", param=header_safe(name)) from None
    if name == "sample_rate" and re.fullmatch(r"-?[0-9]{1,9}", text):
        return int(text)
    return {"true": True, "false": False}.get(text, text) if name == "timestamps" else text


def _hidden(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _hidden(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_hidden(item) for item in value]
    return providers.Secret(value) if isinstance(value, str) else value


class _EventResponse(web.StreamResponse):
    _send_headers_immediately = False  # they go out with the first events, in one write


class EventWriter:
    """The SSE response to one request. It begins with the answer or with the first ping, whichever comes first."""

    def __init__(self, request: web.Request, ping_interval: float) -> None:
        self._request = request
        self._interval = ping_interval
        self._lock = asyncio.Lock()  # between the answer and the pings
        self._timer = asyncio.get_running_loop().call_later(ping_interval, self._keep_alive)
        self._pinger: asyncio.Task[None] | None = None  # of a stream that has lasted that long
        self._last = time.monotonic()
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
            await self.response.write(frames)
            self.sent += len(frames)
            self._last = time.monotonic()

    def _keep_alive(self) -> None:
        self._pinger = asyncio.create_task(self._ping())

    async def _ping(self) -> None:
        """Pings, whenever nothing was written for a while."""
        while True:
            silence = time.monotonic() - self._last
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
        self._timer.cancel()
        if self._pinger:
            self._pinger.cancel()
            await asyncio.gather(self._pinger, return_exceptions=True)


# == Connections =======================================================================================================


SPARE_FILES = 64  # open files that are no connections
KEEP_ALIVE = 75.0  # seconds that a connection may be idle between two requests
LINGER = 2.0  # seconds for which a body that is refused is read and thrown away, so that its sender sees the answer


def raise_file_limit() -> None:
    """Take all the open files that this process may have; many systems start with 1,024."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # ImportError: Windows
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = 1 << 16 if hard == resource.RLIM_INFINITY else hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def most_connections() -> int:
    """How many callers may be connected, so that each can have a connection to a provider."""
    try:
        import resource
    except ImportError:  # Windows
        return 1 << 15
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 15 if soft == resource.RLIM_INFINITY else max((soft - SPARE_FILES) // 2, 16)


class Connection(web.RequestHandler):
    """aiohttp's connection, with what that lacks: deadlines for heads and for readers, envelopes for what is no HTTP.

    Attributes that begin with `_` and are not in these slots are aiohttp's own.
    """

    __slots__ = ("_head_timer", "_link", "_may_warn", "_most", "_read_timer", "_times")

    def __init__(
        self, manager: web.Server, *, times: TimeoutsSection, most: int, may_warn: OnceAMinute, **options: Any
    ) -> None:
        super().__init__(manager, **options)
        self._times = times
        self._most = most
        self._may_warn = may_warn
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._link: asyncio.Transport | None = None  # also after a close, while there is something to write

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._link = self.transport
        if self._manager and len(self._manager._connections) > self._most and self._link:
            self._link.abort()
            if self._may_warn():
                logger.warning("over %d connections: more are closed (half of what `ulimit -n` allows)", self._most)
            return
        self._head_timer = self._loop.call_later(self._times.head, self.force_close)

    def connection_lost(self, exc: BaseException | None) -> None:
        for timer in (self._head_timer, self._read_timer):
            if timer:
                timer.cancel()
        self._link = None
        self._data_received_cb = None  # a WebSocket's; it holds this connection
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._request_count
        super().data_received(data)
        if self._request_count > before:
            if self._head_timer:
                self._head_timer.cancel()
                self._head_timer = None
            if self._current_request and not self._current_request.content.is_eof():
                # What came is no request but the parser's complaint of this one's body, whose reader it does not tell.
                self._current_request.content.set_exception(web.RequestPayloadError())
        elif data and self._head_timer is None and self._waiter and not self._waiter.done():  # a part of the next head
            self._head_timer = self._loop.call_later(self._times.head, self.force_close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read_timer:
            self._read_timer.cancel()

    def _watch_reader(self, before: int | None = None) -> None:
        """Called when there is too much to write, and as long as there is: did the caller read any of it?"""
        if self._link is None:
            return
        left = self._link.get_write_buffer_size()
        if before is not None and left >= before:
            self._link.abort()
        else:
            self._read_timer = self._loop.call_later(self._times.write, self._watch_reader, left)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun")
        if isinstance(exc, ContentEncodingError):  # one that aiohttp itself cannot read
            fault = compressed()
        elif status == 400:
            fault = InvalidRequestError("the request is malformed")
        else:
            fault = error_of(exc or Exception(), "")
        exchange = Exchange(new_request_id(), error=fault, status=fault.status)
        token = request_id.set(exchange.id)
        try:
            response = error_response(fault)
            exchange.log(request)
        finally:
            request_id.reset(token)
        response.headers.update({"Server": "vai", "X-Request-ID": exchange.id, "request-id": exchange.id})
        response.force_close()
        return response


class Listener(web.Server):
    """Makes a `Connection` of each connection."""

    def __init__(self, made: web.Server, times: TimeoutsSection, **options: Any) -> None:
        super().__init__(made.request_handler, request_factory=made.request_factory, handler_cancellation=True)
        self._options = {"times": times, "may_warn": OnceAMinute(), **options}

    def __call__(self) -> web.RequestHandler:
        return Connection(self, loop=self._loop, **self._options)


# == Live sessions =====================================================================================================
# `WS /v1/messages/live`: one task reads what the client sends, one writes what the session says. When one of them ends,
# so does the other, and with them the session.

CONFIGURE = 10.0  # seconds for the first message
GOODBYE = 2.0  # seconds for a client to answer a close
LEAVING = dict.fromkeys((1000, 1001, 1005), "client") | dict.fromkeys((1002, 1003, 1007, 1009), "refused")
MESSAGE_BYTES = 256 << 10
SEND_BUFFER = 128 << 10  # bytes that the system keeps for a client that does not read; as many are in the process
TYPED = ("input.text", "input.content")  # turns that cost no time to make: they count as requests
KEPT = (*TYPED, "tool_result")  # what is kept, and sent to the model with every turn from then on
BLOCK_BYTES = 1024  # what a content block counts at least
WORK_RATE = 4 << 20  # such bytes a second are read: large messages are work, for which other callers would wait
LEAST_PAUSE, MOST_PAUSE = 0.01, 2.0  # seconds; whoever is not read for long cannot be heard to live


class Allowance:
    """How much a client may send: as fast as any microphone does, and not as fast as a program can."""

    RATE = 1000.0  # a second
    BURST = 2000.0
    AUDIO, MESSAGE = 1, 10

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left = self.BURST
        self._last = clock()

    def take(self, cost: int) -> bool:
        now = self._clock()
        self._left = min(self._left + (now - self._last) * self.RATE, self.BURST) - cost
        self._last = now
        return self._left >= 0


def check_upgrade(request: web.Request) -> None:
    """Raise unless the request opens a WebSocket as RFC 6455 (4.2.1) has it."""
    headers = request.headers
    wanted = headers.get("Upgrade", "").lower() == "websocket" and "upgrade" in headers.get("Connection", "").lower()
    if request.body_exists or not wanted or headers.get("Sec-WebSocket-Version") != "13":
        fault = InvalidRequestError("this is a WebSocket, version 13", code="websocket")
        fault.status = 400 if request.body_exists else 426
        raise fault
    try:
        key = base64.b64decode(headers.get("Sec-WebSocket-Key", ""), validate=True)
    except ValueError:
        key = b""
    if len(key) != 16:
        raise InvalidRequestError("the Sec-WebSocket-Key must be 16 bytes in base64", code="websocket")
    if (offered := subprotocols(request)) and PROTOCOL not in offered:
        raise InvalidRequestError(f"the only subprotocol is {PROTOCOL}", code="websocket")


async def apart(work: Coroutine[Any, Any, None]) -> None:
    """Do it in a task of its own, which is cancelled with this one.

    The traceback of a cancelled request is in a cycle with it (aiohttp's request holds its task): what its frames hold
    stays until the garbage is collected, so that a whole session must not be among it.
    """
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        del task


class LiveSocket:
    """One caller's WebSocket, and the session behind it."""

    def __init__(self, gateway: Gateway, request: web.Request, caller: Caller) -> None:
        self._gateway, self._request, self._caller = gateway, request, caller
        self._exchange = request[EXCHANGE]
        self._tally = self._exchange.live = LiveTally()
        self._allowance = Allowance()
        self._session: live.LiveSession | None = None
        self._billed: JSON | None = None  # the usage of the answer that is coming in
        self._size = 0  # of the latest message, in characters
        self._kept = 0  # bytes
        self._socket = web.WebSocketResponse(
            protocols=(PROTOCOL,),
            heartbeat=gateway.config.sse.ping_interval,
            max_msg_size=MESSAGE_BYTES,
            compress=False,
            timeout=GOODBYE,
        )

    async def run(self) -> web.StreamResponse:
        """All of it, from the upgrade to the close."""
        await self._socket.prepare(self._request)
        self._exchange.status = 101
        if link := self._request.transport:
            link.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        try:
            message = await self._first()
            if message is not None:
                await apart(self._hold(message))
        except ConnectionError:  # the client is gone
            pass
        except asyncio.CancelledError:
            if not self._gateway.expired:
                raise
            await self._fail(self._gateway.outlived())
        except Exception as raised:
            await self._fail(error_of(raised, self._request.path))
        finally:
            self._settle()
            self._session = None
            await self._close(CLOSING.get(self._tally.closed, 1011))  # also of a client that is gone: it ends the pings
        return self._socket

    def end(self) -> None:
        """The gateway is shutting down."""
        if self._session:
            self._session.close("draining")

    @property
    def talks(self) -> bool:
        return self._session is not None

    # -- the session --

    async def _first(self) -> bytes | JSON | None:
        try:
            async with asyncio.timeout(CONFIGURE):
                return await self._message()
        except TimeoutError:
            late = InvalidRequestError(f"no session.configure came within {CONFIGURE:g} s", code="configure_timeout")
            late.status = 408
            raise late from None

    async def _open(self, message: bytes | JSON) -> live.LiveSession:
        if not isinstance(message, dict) or message.get("type") != "session.configure":
            raise InvalidRequestError("the first message must be session.configure", code="not_configured")
        gateway, caller = self._gateway, self._caller
        config = live.read_config(message.get("config"))
        gateway.check_counts({"messages": config.messages, "tools": config.tools})
        asked = self._asking(config.model, "config.model")
        self._exchange.provider, self._exchange.model = asked.provider, asked.model_name
        caller.check_routes(asked, "config.model")
        spoken = config.voice
        caller.check_model(voice.listener_of(spoken.input), param="config.voice.input.model")
        caller.check_model(voice.model_of(spoken.output), param="config.voice.output.model")
        for name, model in (("vad", spoken.vad.model), ("interrupt", spoken.interrupt.model)):
            if model != "auto":
                param = f"config.voice.{name}.model"
                caller.check_routes(self._asking(model, param), param)
        return gateway.engine.live_session(
            config,
            provider_keys(self._request, caller, PROVIDERS[asked.provider].byok, config.provider_keys),
            may_check=caller.may_use,
            detectors=await gateway.hearing(),
            timing=live.Timing(idle=gateway.config.live.idle_timeout),
            max_duration=gateway.config.live.max_duration,
            session_id=self._exchange.id,
        )

    def _asking(self, model: str, param: str) -> vai.MessageRequest:
        """A request to this model, which the field `param` names."""
        try:
            return self._gateway.engine.parse({"model": model, "messages": [{"role": "user", "content": "."}]})
        except InvalidRequestError as fault:
            raise InvalidRequestError(fault.message, param=param, code=fault.code) from None

    async def _hold(self, message: bytes | JSON) -> None:
        async with await self._open(message) as self._session:
            await self._talk(self._session)

    async def _talk(self, session: live.LiveSession) -> None:
        tasks = (asyncio.create_task(self._read(session)), asyncio.create_task(self._write(session)))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    # -- from the client --

    async def _message(self) -> bytes | JSON | None:
        """What the client says next; None when it has gone. Raises an `Error` for what is no message."""
        message = await self._socket.receive()
        if message.type is aiohttp.WSMsgType.BINARY:
            return bytes(message.data)
        if message.type is aiohttp.WSMsgType.TEXT:
            self._size = len(message.data)
            return read_keys(message.data.encode(), self._gateway.config.limits)
        wrong = message.data  # of what RFC 6455 forbids; `close_code` says 1006 then
        code = wrong.code if isinstance(wrong, aiohttp.WebSocketError) else self._socket.close_code
        self._tally.closed = LEAVING.get(code or 0, "disconnected")
        return None

    async def _read(self, session: live.LiveSession) -> None:
        seconds = 1 / (2 * session.config.audio_in.sample_rate)  # of a byte
        while True:
            fault = message = None
            try:
                message = await self._message()
            except Error as wrong:
                fault = wrong
            audio = isinstance(message, bytes)
            if not self._allowance.take(Allowance.AUDIO if audio else Allowance.MESSAGE):
                raise providers.RateLimitError("so many messages a second are not taken", code="flood")
            if isinstance(message, bytes):
                self._tally.audio_in += len(message) * seconds
                self._gateway.metrics.live_audio("in", len(message) * seconds)
            elif message is not None:
                fault = await self._over_limit(message)
            if fault:
                await self._say({**fault.to_wire(self._exchange.id), "fatal": False})
            elif message is None:
                return
            else:
                await session.send(message)
            if not isinstance(message, bytes) and (pause := self._work(message) / WORK_RATE) > LEAST_PAUSE:
                await asyncio.sleep(min(pause, MOST_PAUSE))

    def _work(self, message: JSON | None) -> int:
        """How much there is to do for a message: its bytes, and no fewer than its blocks count."""
        content = message.get("content") if message else None
        return max(self._size, BLOCK_BYTES * (1 + len(content) if isinstance(content, list) else 1))

    async def _over_limit(self, message: JSON) -> Error | None:
        if message.get("type") in KEPT:
            most = self._gateway.config.limits.max_body_bytes  # as much as one request could hold
            if self._kept + self._work(message) > most:
                text = f"a session keeps no more than {most} bytes of what is typed and sent"
                return providers.RequestTooLargeError(text, code="session_full")
            self._kept += self._work(message)
        if message.get("type") in TYPED:
            verdict = await self._gateway.count(self._caller)
            return verdict.error() if verdict and verdict.refused else None
        return None

    # -- to the client --

    async def _write(self, session: live.LiveSession) -> None:
        binary = session.config.audio_out.transport == "binary"
        async for event in session:
            if isinstance(event, live.LiveAudio):
                self._tally.audio_out += event.seconds
                self._gateway.metrics.live_audio("out", event.seconds)
                if binary:
                    await self._socket.send_bytes(event.data)
                    self._exchange.sent = (self._exchange.sent or 0) + len(event.data)
                    continue
            else:
                self._count(event)
                if event.type == "error":
                    event.data["request_id"] = event["error"]["request_id"] = self._exchange.id
                elif event.type == "session.closed" and event["reason"] == "draining":
                    await self._say_last(self._gateway.shutdown_error())
            await self._say(event.to_wire())

    async def _say(self, message: JSON) -> None:
        text = providers.dumps(message)
        await self._socket.send_frame(text, aiohttp.WSMsgType.TEXT)
        self._exchange.sent = (self._exchange.sent or 0) + len(text)

    async def _say_last(self, fault: Error) -> None:
        """Why this is the end."""
        self._exchange.error = fault
        await self._say({**fault.to_wire(self._exchange.id), "fatal": True})

    async def _fail(self, fault: Error) -> None:
        """Tell the client why this is the end, as far as it still listens."""
        self._tally.closed = "draining" if fault.code == "draining" else "refused" if fault.status < 500 else "error"
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(GOODBYE):
                await self._say_last(fault)
                if self._session:
                    await self._say({"type": "session.closed", "reason": self._tally.closed})

    async def _close(self, code: int) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(2 * GOODBYE):
                await self._socket.close(code=code)

    # -- for log and metrics --

    def _count(self, event: live.LiveEvent) -> None:
        metrics, tally = self._gateway.metrics, self._tally
        match event.type:
            case "message_start":
                self._bill(event["message"].get("usage"))
            case "message_delta":
                self._billed = event.get("usage") or self._billed
            case "turn.metrics":
                tally.turns += 1
                stages = {stage: event.get(f"{stage}_ms") for stage in TURN_STAGES}
                metrics.turn({stage: ms / 1000 for stage, ms in stages.items() if ms is not None})
            case "response.interrupted":
                tally.interrupts += 1
                metrics.interrupt("interrupted")
            case "interrupt.dismissed":
                metrics.interrupt(event["reason"])
            case "error":
                metrics.live_error(self._exchange.provider or OTHER, event["error"]["type"])
            case "session.closed":
                tally.closed = event["reason"]

    def _bill(self, usage: JSON | None) -> None:
        """One answer's usage is whole, or cut off: it counts, and the next one's begins."""
        if self._billed:
            total = dict(self._exchange.usage or {})
            for name in DIRECTIONS.values():
                total[name] = total.get(name, 0) + (self._billed.get(name) or 0)
            self._exchange.usage = total
        self._billed = usage

    def _settle(self) -> None:
        self._bill(None)
        if self._session:
            self._tally.reconnects = self._session.reconnects
            self._gateway.metrics.reconnected(self._session.reconnects)
        self._gateway.metrics.session(self._tally)


# == The endpoints =====================================================================================================


class Configured(BaseModel):
    """Whether the gateway has a key of its own for a provider."""

    configured: bool


class LiveState(BaseModel):
    """Live sessions: how many this process has, and how many there may be (with Redis, in all processes together)."""

    active: int = 0
    limit: int = 0


class Health(BaseModel):
    """What `GET /health` says; without secrets, and without asking a provider."""

    status: Literal["healthy", "draining"]
    version: str
    providers: dict[str, Configured]
    voice: dict[str, Configured]
    live: LiveState = LiveState()
    uptime_seconds: int


class Gateway:
    """The state of one running gateway, and its endpoints."""

    def __init__(self, config: Config, engine: vai.Direct) -> None:
        self.config = config
        self.engine = engine
        proxies = config.server.trusted_proxies
        self.callers = Callers(config.auth, loopback=is_loopback(config.server.host), proxies=proxies)
        self.rates = RateLimits(config.rate_limit)
        self.detectors = make_detectors(config.live)
        self._detecting = asyncio.Lock()
        self.sessions: dict[asyncio.Task[Any], LiveSocket] = {}
        self.cors = CORS(config.cors)
        self.metrics = make_metrics(config.metrics)
        self.endpoints: frozenset[str] = frozenset()  # the paths of all routes
        self.started = time.monotonic()
        self.retiring = False  # each connection gets one more answer
        self.draining = False
        self.expired = False  # the grace of the shutdown is over
        self.running: set[asyncio.Task[Any]] = set()
        self.idle = asyncio.Event()
        self.idle.set()
        self.loop: asyncio.AbstractEventLoop | None = None  # the one that this runs on, once it does
        self._openapi: bytes | None = None

    async def admit(self, request: web.Request) -> Caller:
        """Who calls, if they may and have not called too often."""
        try:
            caller = self.callers.identify(request)
        except providers.AuthenticationError:
            verdict = self.rates.fail(self.callers.address(request))
            if verdict is None:
                raise
            self.metrics.rate_limited(verdict.refused)
        else:
            request[EXCHANGE].caller = caller.name
            verdict = await self.count(caller)
        if verdict:
            request[VERDICT] = verdict
            if verdict.refused:
                raise verdict.error() from None
        return caller

    async def count(self, caller: Caller) -> Verdict | None:
        """Count a request of this caller's: as `RateLimits.admit`, and in the metrics."""
        verdict = await self.rates.admit(caller)
        if verdict is None and self.config.rate_limit.enabled:
            self.metrics.limits_unshared()
        elif verdict and verdict.refused:
            self.metrics.rate_limited(verdict.refused)
        return verdict

    # -- POST /v1/messages ------------------------------------------------------------------------------------------

    async def messages(self, request: web.Request) -> web.StreamResponse:
        caller = await self.admit(request)
        exchange = request[EXCHANGE]
        body = await read_body(request, self.config.limits, self.config.timeouts.body)
        self.check_counts(body)
        headers = {n: ",".join(request.headers.getall(n)) for n in vai.FORWARDED_HEADERS if n in request.headers}
        asked = await off_loop(request.content.total_bytes, self.engine.parse, body, headers)
        exchange.provider, exchange.model, exchange.attempts = asked.provider, asked.model_name, asked.attempts
        if asked.voice:
            exchange.speech = asked.speech
        caller.check_routes(asked)
        if asked.voice and caller.models is not None:
            for settings in self.engine.read_voice(asked).used:
                caller.check_model(voice.model_of(settings))
        keys = provider_keys(request, caller, PROVIDERS[asked.provider].byok, asked.provider_keys)
        if not asked.stream:
            return await self._create(request, asked, keys)
        return await self._stream(request, functools.partial(self._copy, request, asked, keys))

    def check_counts(self, body: JSON) -> None:
        limits = self.config.limits
        for name, most in (("messages", limits.max_messages), ("tools", limits.max_tools)):
            if isinstance(body.get(name), list) and len(body[name]) > most:
                raise InvalidRequestError(f"{name}: more than {most}", param=name)

    async def _create(self, request: web.Request, asked: vai.MessageRequest, keys: Mapping[str, str]) -> web.Response:
        answer, dropped = await self.engine.answer(asked, keys)
        exchange = request[EXCHANGE]
        exchange.usage = usage = answer["usage"]
        headers = {
            "X-Model": header_safe(answer["model"]),
            "X-Input-Tokens": str(usage.get("input_tokens", 0)),
            "X-Output-Tokens": str(usage.get("output_tokens", 0)),
            "X-Duration-Ms": str(exchange.milliseconds),
            **dropped_header(dropped),
        }
        return json_response(answer, headers=headers)

    async def _stream(self, request: web.Request, copy: Callable[[EventWriter], Awaitable[None]]) -> web.StreamResponse:
        out = EventWriter(request, self.config.sse.ping_interval)
        try:
            with self.metrics.streaming:
                await copy(out)
        except Exception as raised:
            if out.response is None or isinstance(raised, ConnectionError):
                raise
            request[EXCHANGE].error = fault = error_of(raised, request.path)
            await out.fail(fault)
        except asyncio.CancelledError:
            if not self.expired or out.response is None:
                raise
            await out.fail(self.outlived())
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
        exchange = request[EXCHANGE]
        try:
            out.headers = {"X-Model": header_safe(stream.model), **dropped_header(stream.dropped)}
            async for events in stream:
                if exchange.first_token is None and any(event.type == "content_block_delta" for event in events):
                    exchange.first_token = exchange.seconds
                await out.write(b"".join(map(sse_frame, events)))
            exchange.usage = stream.usage.to_wire() if stream.usage else None
            await out.end()
            exchange.status, exchange.sent = 200, out.sent  # whole, even for a caller that goes now
            await stream.finish()
        finally:
            stream.close()

    # -- POST /v1/audio ---------------------------------------------------------------------------------------------

    async def audio(self, request: web.Request) -> web.StreamResponse:
        caller = await self.admit(request)
        exchange = request[EXCHANGE]
        self._check_sender(request)
        body = await read_body(request, self.config.limits, self.config.timeouts.body, forms=True)
        try:
            asked = await off_loop(request.content.total_bytes, self.engine.parse_audio, body)
        except Error as fault:
            if fault.param == "audio" and request.content_type == "multipart/form-data":  # there it is called `file`
                fault.param, fault.message = "file", fault.message.replace("audio", "file", 1)
            raise
        del body
        model = voice.model_of(asked)
        exchange.provider, _, exchange.model = model.partition("/")
        caller.check_model(model)
        keys = provider_keys(request, caller, voice.SPEECH[asked.provider].byok, asked.provider_keys)
        if isinstance(asked, voice.SynthesisRequest) and asked.stream:
            return await self._stream(request, functools.partial(self._copy_speech, request, asked, keys))
        answer: voice.Transcription | voice.Speech
        if isinstance(asked, voice.TranscriptionRequest):
            answer, size = await self.engine.transcribe(asked, keys), 0
        else:
            answer = await self.engine.synthesize(asked, keys)
            size = len(answer.audio)
        direction = "out" if isinstance(answer, voice.Speech) else "in"
        exchange.speech = {(asked.provider, direction): answer.duration_seconds}
        headers = {"X-Model": header_safe(model), "X-Duration-Ms": str(exchange.milliseconds)}
        if isinstance(answer, voice.Speech) and wants_audio(request):
            return web.Response(body=answer.audio, headers={**headers, "Content-Type": answer.content_type})
        raw = await off_loop(size, lambda: providers.dumps(answer.to_wire()))
        return web.Response(body=raw, headers=headers, content_type="application/json")

    def _check_sender(self, request: web.Request) -> None:
        """A browser sends any page's form without asking first: where no key is wanted, the page must be allowed."""
        if request.content_type == "multipart/form-data" and self.callers.mode == "none":
            self._check_origin(request, "send forms")

    def _check_origin(self, request: web.Request, what: str) -> None:
        """Raise if it comes from a web page that is not allowed; `what` says what such a page may not do."""
        origin = request.headers.get("Origin")
        if origin is not None and not self.cors.allows(origin):
            message = f"pages of this origin may not {what} here: see cors.allowed_origins"
            raise providers.PermissionDeniedError(message, code="origin")

    async def _copy_speech(
        self, request: web.Request, asked: voice.SynthesisRequest, keys: Mapping[str, str], out: EventWriter
    ) -> None:
        exchange = request[EXCHANGE]
        stream = await self.engine.open_speech(asked, keys)
        try:
            out.headers = {"X-Model": header_safe(voice.model_of(asked))}
            index = 0
            async for event in stream:
                if isinstance(event, voice.Audio):
                    exchange.first_token = exchange.first_token or exchange.seconds
                    data = base64.b64encode(event.data).decode("ascii")
                    chunk = {"data": data, "index": index, "format": asked.format, "sample_rate": asked.sample_rate}
                    await out.write(event_frame("audio_chunk", chunk))
                    index += 1
            await out.write(event_frame("done", {"duration_seconds": stream.duration}))
            await out.end()
            exchange.status, exchange.sent = 200, out.sent
        finally:
            exchange.speech = {(asked.provider, "out"): stream.duration}
            stream.close()

    # -- WS /v1/messages/live ---------------------------------------------------------------------------------------

    async def converse(self, request: web.Request) -> web.StreamResponse:
        self._check_origin(request, "open sockets")
        caller = await self.admit(request)
        check_upgrade(request)
        if self.retiring:
            raise self.shutdown_error()
        most, task = self.config.live.max_sessions, asyncio.current_task(self.loop)
        full = providers.OverloadedError(f"{most} live sessions are open, and no more may be", code="live_sessions")
        if len(self.sessions) >= most or task is None:
            raise full
        self.sessions[task] = talk = LiveSocket(self, request, caller)
        try:
            if not await self._may_begin(most):
                raise full
            with self.metrics.talking:
                return await talk.run()
        finally:
            del self.sessions[task]
            if self.rates.shared:
                self.rates.shared.tell(len(self.sessions))

    async def _may_begin(self, most: int) -> bool:
        """Whether all gateways together have room for the last of the sessions here, or Redis does not say."""
        if not self.rates.shared:
            return True
        allowed = await self.rates.shared.begin(len(self.sessions), most)
        if allowed is None:
            self.metrics.limits_unshared()
        return allowed is not False

    async def hearing(self) -> live.Detectors:
        """The detectors, which `auto` starts with the first session: a gateway that nobody talks to needs none."""
        async with self._detecting:
            try:
                await self.detectors.start()
            except live.DetectorError as fault:
                logger.warning("speech is detected by energy alone: %s", fault)
                self.detectors = live.Detectors("energy")
        return self.detectors

    @staticmethod
    def shutdown_error() -> Error:
        return providers.OverloadedError("the gateway is shutting down", code="draining", retry_after=1)

    def outlived(self) -> Error:
        """The end of the grace has cancelled this request: take that back for as long as it takes to say so."""
        if task := asyncio.current_task():
            task.uncancel()
        return self.shutdown_error()

    # -- the rest ---------------------------------------------------------------------------------------------------

    async def models(self, request: web.Request) -> web.Response:
        await self.admit(request)
        provider, capability = request.query.get("provider"), request.query.get("capability")
        listed = await self.engine.models()
        rows = [row.model_dump() for row in listed.providers if provider in (None, row.id)]
        if capability is not None:
            rows = [r for r in rows if r["capabilities"].get(capability) or capability in r["native_tools"]]
        none: JSON = {"data": [], "has_more": False}  # Anthropic's SDKs look for a catalogue here, which vai has not
        return json_response({"providers": rows, "aliases": listed.aliases, "voice": listed.voice} | none)

    async def health(self, request: web.Request) -> web.Response:
        state = Health(
            status="draining" if self.draining else "healthy",
            version=providers.__version__,
            providers={id: Configured(configured=self.engine.available(id)) for id in PROVIDERS},
            voice={id: Configured(configured=known) for id, known in self.engine.speech.available.items()},
            live=LiveState(active=len(self.sessions), limit=self.config.live.max_sessions),
            uptime_seconds=int(time.monotonic() - self.started),
        )
        return json_response(state.model_dump(), status=503 if self.draining else 200)

    async def show_metrics(self, request: web.Request) -> web.Response:
        if self.config.metrics.require_key:
            await self.admit(request)
        text = await asyncio.to_thread(self.metrics.text)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def openapi(self, request: web.Request) -> web.Response:
        if self._openapi is None:
            self._openapi = await asyncio.to_thread(lambda: providers.dumps(openapi(self.config)))
        return web.Response(body=self._openapi, content_type="application/json")

    # -- around every request ---------------------------------------------------------------------------------------

    @web.middleware
    async def observe(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Request id, the log line, and any exception as an envelope."""
        given = request.headers.get("X-Request-ID", "")
        id = given if given and re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else new_request_id()
        token = request_id.set(id)
        exchange = request[EXCHANGE] = Exchange(id)
        try:
            response = await self._answered(request, handler)
            exchange.status = response.status
            if self.draining and not response.prepared:
                response.force_close()
            if isinstance(response, web.Response):
                exchange.sent = len(response.body) if isinstance(response.body, bytes) else 0
            return response
        finally:
            exchange.settle()
            self.metrics.request(request.path if request.path in self.endpoints else OTHER, exchange)
            exchange.log(request)
            exchange.forget_frames()
            request_id.reset(token)

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        allowed = ""
        try:
            self.callers.check_host(request)
            if preflight := self.cors.preflight(request):
                return preflight
            if self.draining and request.path.startswith("/v1/"):
                raise self.shutdown_error()
            return await self._counted(request, handler)
        except asyncio.CancelledError:
            if not self.expired:
                raise
            fault = self.outlived()
        except ConnectionError:  # the caller went away
            raise
        except Exception as raised:
            fault = error_of(raised, request.path)
            raised.__traceback__ = None  # aiohttp keeps the 404 of a request with the request, see `forget_frames`
            if isinstance(raised, web.HTTPMethodNotAllowed):
                allowed = raised.headers["Allow"]
        request[EXCHANGE].error = fault
        response = error_response(fault)
        if allowed:
            response.headers["Allow"] = allowed
        if fault.code in ("malformed_body", "websocket") or fault.status in (408, 413):
            response.force_close()
        return response

    async def _counted(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if not request.path.startswith("/v1/") or (task := asyncio.current_task(self.loop)) is None:
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
        if self.config.cors.allowed_origins:
            response.headers.update(self.cors.headers(request))
        if VERDICT in request:
            response.headers.update(request[VERDICT].headers())
        if self.retiring:
            response.headers["Connection"] = "close"
            response.force_close()
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
            if (talk := self.sessions.get(task)) and talk.talks:
                talk.end()
            else:
                task.cancel()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.idle.wait(), 2)


def event_frame(kind: str, data: JSON) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode("ascii"), providers.dumps({"type": kind, **data}))


def wants_audio(request: web.Request) -> bool:
    """Whether the caller would rather have the bytes of a sound file than JSON around them."""
    kinds = [kind.partition(";")[0].strip().lower() for kind in request.headers.get("Accept", "").split(",")]
    return any(kind.startswith("audio/") for kind in kinds) and "application/json" not in kinds


def dropped_header(dropped: Iterable[str]) -> dict[str, str]:
    names = ", ".join(dropped)
    return {"X-Vai-Dropped": header_safe(names, 1024)} if names else {}


# == The OpenAPI document ==============================================================================================

SCHEMAS = "#/components/schemas/"
EXAMPLE = {"model": "anthropic/claude-sonnet-5-5", "messages": [{"role": "user", "content": "Hello!"}]}
KEY_HEADERS = [vai.byok_header(provider) for provider in UPSTREAMS]
HEADERS = {
    "X-Request-ID": "The caller's, or one of the gateway's own. Also as `request-id`.",
    "X-Model": "The provider and the model that answered.",
    "X-Input-Tokens": "Of `usage`.",
    "X-Output-Tokens": "Of `usage`.",
    "X-Duration-Ms": "How long the whole answer took.",
    "X-RateLimit-Limit-Requests": "Requests a minute.",
    "X-RateLimit-Remaining-Requests": "How many of them are left now.",
    "X-RateLimit-Reset-Requests": "Whole seconds until more are.",
    "X-Vai-Dropped": "Advisory fields of the request that the provider does not take.",
    "Retry-After": "Whole seconds, where known.",
    "WWW-Authenticate": "Bearer.",
}
RATE_HEADERS = tuple(name for name in HEADERS if name.startswith("X-RateLimit-"))
ERROR_STATUSES = {  # status → when
    400: "The request is wrong; `param` names the place. Or the provider refuses it.",
    401: "No valid key for the gateway, no key for the provider, or the caller's own key was refused.",
    403: "The key may not do this, or (auth.mode none) the Host header is not this machine's.",
    404: "The provider does not know the model.",
    408: "The body did not arrive in time.",
    413: "The body is over a limit, of the gateway or of the provider.",
    417: "The only expectation that is met is 100-continue.",
    429: "Too many requests, or spent quota.",
    500: "The gateway's own fault.",
    502: "The provider failed, answered something unreadable, or refused the gateway's own key.",
    503: "The provider has no capacity, or the gateway is shutting down.",
    504: "The provider took too long.",
}


class _Schemas(GenerateJsonSchema):
    """JSON Schemas as OpenAPI has them: unions whose members may overlap, and no titles made of field names."""

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> JsonSchemaValue:
        return {"anyOf": super().tagged_union_schema(schema)["oneOf"]}

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def openapi(config: Config) -> JSON:
    """The OpenAPI 3.1 document of the endpoints, with the limits of this configuration."""
    closed = config.auth.mode != "none"
    secured: JSON = {"security": [{"key": []}, {"bearer": []}]} if closed else {}
    inputs = [_header(name, "A key of the caller's own for this provider.") for name in KEY_HEADERS]
    inputs += [_header(name, "Passed on to Anthropic.") for name in vai.FORWARDED_HEADERS]
    messages: JSON = {
        "summary": "Ask a model",
        "operationId": "createMessage",
        "parameters": [*inputs, _header("X-Request-ID", "Letters, digits and `._-`, at most 64."), _query("beta")],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref("MessageRequest"), "example": EXAMPLE}},
        },
        "responses": {
            "200": {
                "description": "The answer; with `stream` as events, the last of which is `message_stop` or `error`.",
                "headers": _headers("X-Request-ID", "X-Model", "X-Vai-Dropped", *RATE_HEADERS),
                "content": {
                    "application/json": {"schema": _ref("Message")},
                    # OpenAPI 3.1 has no word for the schema of an event's data.
                    "text/event-stream": {"x-event-schema": _ref("StreamEvent")},
                },
            },
            **_refusals(*ERROR_STATUSES),
        },
    }
    messages["responses"]["200"]["headers"] |= _headers("X-Input-Tokens", "X-Output-Tokens", "X-Duration-Ms")
    models: JSON = {
        "summary": "Providers, what they can do, and aliases",
        "operationId": "listModels",
        "parameters": [_query("provider"), _query("capability")],
        "responses": {
            "200": _answer("The list; no models, of which there is no catalogue.", _ref("Models"), *RATE_HEADERS)
        }
        | _refusals(401, 403, 429, 503),
    }
    health: JSON = {
        "summary": "Whether the gateway takes requests",
        "operationId": "getHealth",
        "responses": {
            "200": _answer("It does.", _ref("Health")),
            "503": _answer("It is shutting down.", _ref("Health")),
            **_refusals(),
        },
    }
    text = {"text/plain": {"schema": {"type": "string"}}}
    shown = _headers("X-Request-ID", *RATE_HEADERS)
    metrics: JSON = {
        "summary": "Metrics for Prometheus",
        "operationId": "getMetrics",
        "responses": {
            "200": {"description": "Text format 0.0.4.", "headers": shown, "content": text},
            **_refusals(401, 403, 429),
            "404": _refusal(404, "Metrics are off, or their library is not installed."),
        },
    }
    audio: JSON = {
        "summary": "Transcribe a recording, or speak a text",
        "operationId": "createAudio",
        "parameters": [_header(vai.byok_header(id), "A key of the caller's own for speech.") for id in voice.SPEECH],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"anyOf": [_ref("TranscriptionRequest"), _ref("SynthesisRequest")]},
                    "example": {"text": "Hello there.", "format": "mp3"},
                },
                "multipart/form-data": {"schema": _ref("TranscriptionForm")},
            },
        },
        "responses": {
            "200": {
                "description": "What was said, or the speech; `stream` makes it events, `Accept: audio/*` the bytes.",
                "headers": _headers("X-Request-ID", "X-Model", "X-Duration-Ms", *RATE_HEADERS),
                "content": {
                    "application/json": {"schema": {"anyOf": [_ref("Transcription"), _ref("Synthesis")]}},
                    "text/event-stream": {"x-event-schema": _ref("SpeechEvent")},
                    "audio/*": {},
                },
            },
            **_refusals(*ERROR_STATUSES),
        },
    }
    upgraded = "A WebSocket. The first message is `session.configure`; audio comes and goes in binary frames."
    talk: JSON = {
        "summary": "Talk to a model",
        "operationId": "openLiveSession",
        "parameters": [*inputs[: len(KEY_HEADERS)], _query("api_key")],
        "responses": {
            # OpenAPI 3.1 has no word for the messages of a WebSocket.
            "101": {"description": upgraded, "x-first-message": _ref("SessionConfigure")},
            **_refusals(400, 401, 403, 429, 503),
            "426": _refusal(426, "The request opens no WebSocket."),
        },
    }
    document: JSON = {
        "summary": "This document",
        "operationId": "getOpenAPI",
        "responses": {"200": _answer("OpenAPI 3.1.", {"type": "object"}), **_refusals()},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vai",
            "version": providers.__version__,
            "description": "Any model behind Anthropic's Messages API. A model is `provider/model`, or an alias.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "paths": {
            "/v1/messages": {"post": messages | secured},
            "/v1/audio": {"post": audio | secured},
            LIVE: {"get": talk | secured},
            "/v1/models": {"get": models | secured},
            "/health": {"get": health},
            "/metrics": {"get": metrics | (secured if config.metrics.require_key else {})},
            "/openapi.json": {"get": document},
        },
        "components": {
            "schemas": _schemas(config.limits),
            "headers": {name: {"description": about, "schema": {"type": "string"}} for name, about in HEADERS.items()},
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _schemas(limits: LimitsSection) -> JSON:
    """The schemas: of the models that check requests and make answers, and of what is no model."""
    models = (
        *(providers.MessageRequest, providers.Message, vai.Models, Health),
        *(voice.Voice, voice.TranscriptionRequest, voice.SynthesisRequest, live.LiveConfig),
    )
    _, made = models_json_schema(
        [(model, "validation") for model in models], ref_template=SCHEMAS + "{model}", schema_generator=_Schemas
    )
    schemas: JSON = made["$defs"]
    asked, message, listed = (schemas[name] for name in ("MessageRequest", "Message", "Models"))
    asked["description"] = "Anthropic's request, and some fields of vai's own."
    asked["properties"]["model"] |= {"maxLength": 256, "examples": ["anthropic/claude-sonnet-5-5", "openai/gpt-4o"]}
    asked["properties"]["messages"]["maxItems"] = limits.max_messages
    asked["properties"]["tools"]["maxItems"] = limits.max_tools
    for name, schema in asked["properties"].items():
        if name not in asked["required"] and {"type": "null"} not in schema.get("anyOf", ()):
            asked["properties"][name] = {"anyOf": [schema, {"type": "null"}]}  # null is as good as nothing
    message["description"] = "The answer."
    message["required"] = sorted(message["properties"].keys() - {"metadata"})
    schemas["Usage"]["required"] = sorted(schemas["Usage"]["properties"])
    schemas["ContentBlock"] = message["properties"]["content"]["items"]
    message["properties"]["content"]["items"] = _ref("ContentBlock")
    empty: JSON = {"description": "Where Anthropic has its catalogue of models.", "type": "array", "maxItems": 0}
    listed["properties"] |= {"data": empty, "has_more": {"const": False}}
    listed["required"] = sorted(listed["properties"])
    schemas["Health"]["required"] = sorted(schemas["Health"]["properties"])
    configure = {"type": {"const": "session.configure"}, "config": _ref("LiveConfig")}
    schemas["SessionConfigure"] = _object(configure, *configure)
    asked["properties"]["voice"] = {"anyOf": [_ref("Voice"), {"type": "null"}]}
    return schemas | _event_schemas() | _speech_schemas(schemas) | {"Error": _error_schema()}


def _error_schema() -> JSON:
    text = {"type": "string"}
    fields = {"message": text, "param": text, "code": text, "provider": {"enum": list(UPSTREAMS)}, "request_id": text}
    kinds = {"type": {"enum": list(providers.ERRORS)}, "retry_after": {"type": "integer", "minimum": 0}}
    error = _object(fields | kinds | {"provider_error": {}}, "type", "message", "request_id")
    error["additionalProperties"] = False
    envelope = {"type": {"const": "error"}, "error": error, "request_id": text}
    return {"description": "An error, as a body or as the last event of a stream.", **_object(envelope, *envelope)}


def _event_schemas() -> JSON:
    index, text = {"type": "integer", "minimum": 0}, {"type": "string"}
    stop = _object({name: {"type": ["string", "null"]} for name in ("stop_reason", "stop_sequence")}, "stop_reason")
    events: dict[str, JSON] = {
        "message_start": {"message": _ref("Message")},
        "content_block_start": {"index": index, "content_block": _ref("ContentBlock")},
        "content_block_delta": {"index": index, "delta": _ref("Delta")},
        "content_block_stop": {"index": index},
        "message_delta": {"delta": stop, "usage": _ref("Usage")},
        "message_stop": {},
        "ping": {},
        "transcript_delta": {"role": {"const": "user"}, "delta": _object({"text": text}, "text")},
        "audio_delta": {"delta": _object({"data": BASE64, **SOUND}, "data", *SOUND)},
        "audio_error": {"error": {"type": "object"}},
    }
    deltas: list[JSON] = [{"type": "object", "required": ["type"], "description": "One that vai does not know."}]
    for kind in (each for each in get_args(providers.Delta) if each is not providers.OtherDelta):
        fields = TypeAdapter(kind).json_schema(schema_generator=_Schemas)["properties"]
        deltas.insert(-1, _object({"type": {"const": kind.type}, **fields}, "type", *fields))
    named = {
        kind.title().replace("_", ""): _object({"type": {"const": kind}, **fields}, "type", *fields)
        for kind, fields in events.items()
    }
    return {"Delta": {"anyOf": deltas}, **named, "StreamEvent": {"anyOf": [_ref(name) for name in (*named, "Error")]}}


BASE64: JSON = {"type": "string", "contentEncoding": "base64"}
SOUND: JSON = {"format": {"enum": ["wav", "mp3", "pcm"]}, "sample_rate": {"type": "integer"}}


def _speech_schemas(schemas: JSON) -> JSON:
    text, seconds = {"type": "string"}, {"type": "number", "minimum": 0}
    schemas["TranscriptionRequest"]["properties"]["audio"] = BASE64
    form = {**schemas["TranscriptionRequest"]["properties"], "file": {"type": "string", "format": "binary"}}
    word = _object({"word": text, "start": seconds, "end": seconds}, "word", "start", "end")
    transcription = {
        "type": {"const": "transcription"},
        "text": text,
        "language": {"type": ["string", "null"]},
        "duration_seconds": seconds,
        "words": {"type": "array", "items": word},
    }
    synthesis = {"type": {"const": "synthesis"}, "audio": BASE64, **SOUND, "duration_seconds": seconds}
    chunk = {"type": {"const": "audio_chunk"}, "data": BASE64, "index": {"type": "integer", "minimum": 0}, **SOUND}
    done = {"type": {"const": "done"}, "duration_seconds": seconds}
    events = [_object(fields, *fields) for fields in (chunk, done)]
    return {
        "TranscriptionForm": _object(
            {name: form[name] for name in form if name not in ("audio", "provider_keys")}, "file"
        ),
        "Transcription": _object(transcription, *transcription),
        "Synthesis": _object(synthesis, *synthesis),
        "SpeechEvent": {"anyOf": [*events, _ref("Ping"), _ref("Error")]},
    }


def _object(properties: JSON, *required: str) -> JSON:
    return {"type": "object", "properties": properties, "required": list(required)}


def _ref(name: str) -> JSON:
    return {"$ref": SCHEMAS + name}


def _headers(*names: str) -> JSON:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _header(name: str, about: str) -> JSON:
    return {"name": name, "in": "header", "description": about, "schema": {"type": "string"}}


def _query(name: str) -> JSON:
    return {"name": name, "in": "query", "schema": {"type": "string"}}


def _answer(description: str, schema: JSON, *headers: str) -> JSON:
    content = {"application/json": {"schema": schema}}
    return {"description": description, "headers": _headers("X-Request-ID", *headers), "content": content}


def _refusals(*statuses: int) -> JSON:
    """The responses that are errors; `default` is for those that any route may have."""
    return {str(status): _refusal(status, ERROR_STATUSES[status]) for status in statuses} | {
        "default": _answer("Another error.", _ref("Error"), *RATE_HEADERS)
    }


def _refusal(status: int, description: str) -> JSON:
    kind = next((cls.type for cls in providers.ERRORS.values() if cls.status == status), "invalid_request_error")
    told = {"properties": {"error": {"properties": {"type": {"const": kind}}}}}
    answer = _answer(description, {"allOf": [_ref("Error"), told]}, *RATE_HEADERS)
    answer["headers"] |= _headers("Retry-After", *(["WWW-Authenticate"] if status == 401 else []))
    return answer


# == The app ===========================================================================================================

GATEWAY = web.AppKey("gateway", Gateway)


def make_engine(config: Config, environ: Mapping[str, str]) -> vai.Direct:
    """The engine of this configuration. In passthrough mode it has no keys of its own to fall back on."""
    times = config.timeouts
    engine = vai.Direct(
        provider_keys={id: section.api_key for id, section in config.providers.items() if section.api_key},
        base_urls={id: section.base_url for id, section in config.providers.items() if section.base_url},
        aliases=config.aliases,
        environ=environ,
        timeouts=vai.Timeouts(times.connect, times.first_byte, times.idle, times.total),
        max_tokens=config.limits.max_tokens_default,
        own_keys=False,
        keyless=config.auth.mode == "passthrough",
    )
    _ = engine.speech  # a key or an address that cannot be one stops the start
    return engine


def make_detectors(config: LiveSection) -> live.Detectors:
    """What hears that somebody speaks. Raises `ConfigError` for one that cannot be had."""
    if config.detector_model and not os.path.isfile(config.detector_model):
        raise ConfigError("live.detector_model: no such file")
    try:
        return live.Detectors(config.detector, config.detector_model)
    except live.DetectorError as fault:
        raise ConfigError(f"live.detector: {fault}") from None


async def _expect_nothing(request: web.Request) -> None:
    """`Expect` is answered when a body is read, after everything that can be refused without it."""


def make_app(config: Config, engine: vai.Direct) -> web.Application:
    gateway = Gateway(config, engine)
    app = web.Application(middlewares=[gateway.observe])
    app[GATEWAY] = gateway
    app.router.add_post("/v1/messages", gateway.messages, expect_handler=_expect_nothing)
    app.router.add_post("/v1/audio", gateway.audio, expect_handler=_expect_nothing)
    app.router.add_get(LIVE, gateway.converse, expect_handler=_expect_nothing, allow_head=False)
    app.router.add_get("/v1/models", gateway.models, expect_handler=_expect_nothing)
    app.router.add_get("/health", gateway.health, expect_handler=_expect_nothing)
    app.router.add_get("/metrics", gateway.show_metrics, expect_handler=_expect_nothing)
    app.router.add_get("/openapi.json", gateway.openapi, expect_handler=_expect_nothing)
    gateway.endpoints = frozenset(resource.canonical for resource in app.router.resources())
    app.on_response_prepare.append(gateway.mark)

    async def running(app: web.Application) -> AsyncIterator[None]:
        if config.live.detector != "auto":
            try:
                await gateway.detectors.start()
            except live.DetectorError as fault:
                raise ConfigError(f"live.detector: {fault}") from None
        watch = asyncio.create_task(watch_loop(gateway.metrics))
        gateway.loop = asyncio.get_running_loop()
        engine.transport.bind()
        if gateway.rates.shared:
            await gateway.rates.shared.start()
        yield
        await gateway.detectors.close()
        if gateway.rates.shared:
            await gateway.rates.shared.close()
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await engine.close()

    app.cleanup_ctx.append(running)
    return app


class Runner(web.AppRunner):
    """Runs the app on connections of ours."""

    async def _make_server(self) -> web.Server:
        times = self.app[GATEWAY].config.timeouts
        made = await super()._make_server()
        more: JSON = {"access_log": None, "keepalive_timeout": KEEP_ALIVE, "lingering_time": LINGER}
        return Listener(made, times, most=most_connections(), **more)


HANDOVER = 0.5  # seconds that a worker still serves the connections it has, so that a request on its way is not lost


class Worker(Runner):
    """Runs the app under gunicorn, which takes a runner for an app: what runs gets its grace before the end."""

    async def cleanup(self) -> None:
        gateway = self.app[GATEWAY]
        gateway.retiring = True
        if self.server:
            doors: list[Any] = [site._server for site in self.sites if site._server]
            await shut(doors, self.server)  # new connections are for the other workers
            await asyncio.sleep(HANDOVER)
            self.server.pre_shutdown()
        await gateway.drain(gateway.config.timeouts.drain)
        await super().cleanup()


async def app() -> Worker:
    """The app in a worker process: `gunicorn server:app -k aiohttp.GunicornUVLoopWebWorker`.

    Settings come from the environment and `vai.toml`; address and number of processes are gunicorn's. A configuration
    that cannot work stops gunicorn with one line.
    """
    try:
        check_aiohttp()
        config = load_config({}, os.environ)
        _check_worker_config(config)
        engine = make_engine(config, os.environ)
        runner = Worker(make_app(config, engine), shutdown_timeout=1)
    except (ConfigError, InvalidRequestError) as fault:
        _fail(str(fault), code=3)  # gunicorn's WORKER_BOOT_ERROR: do not try again
    configure_logs(config.log, alone=False)
    raise_file_limit()
    warm_up(engine)
    gateway = runner.app[GATEWAY]
    if not gateway.metrics.missing and not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        logger.warning("/metrics is of this process alone: set PROMETHEUS_MULTIPROC_DIR to an empty folder")
    for text in warnings_of(gateway):
        logger.warning("%s", text)
    logger.info("ready: %s", "; ".join(f"{name} {what}" for name, what in described(gateway)))
    return runner


AIOHTTP_FLOOR = (3, 14, 4)  # what is older has known holes; files that were copied have no metadata to say so


def check_aiohttp() -> None:
    """Raise `ConfigError` for an aiohttp that must not stand between callers and their keys."""
    found = tuple(map(int, re.findall(r"\d+", aiohttp.__version__)[:3]))
    if found < AIOHTTP_FLOOR:
        floor = ".".join(map(str, AIOHTTP_FLOOR))
        raise ConfigError(f"aiohttp {aiohttp.__version__} is too old: pip install 'aiohttp>={floor}'")


def _check_worker_config(config: Config) -> None:
    """What holds for several processes, of which none knows the address."""
    if config.auth.mode == "api_key" and not config.auth.keys:
        raise ConfigError("auth.keys: several processes need a key that is configured: set VAI_API_KEYS")
    if config.auth.mode == "none" and not config.server.allow_open:
        raise ConfigError("auth.mode none needs server.allow_open here: gunicorn's address is not known to vai")


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
    raise_file_limit()
    engine = make_engine(config, environ)
    warm_up(engine)
    runner = Runner(make_app(config, engine), shutdown_timeout=1)
    gateway = runner.app[GATEWAY]
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
        assert runner.server is not None  # noqa: S101  (it was set up)
        try:
            door = await loop.create_server(runner.server, config.server.host, config.server.port, backlog=1024)
        except OSError as fault:
            number = fault.errno or 0  # below 0 where a name cannot be resolved
            reason = os.strerror(number) if number > 0 else fault.strerror or str(fault)
            raise ConfigError(f"cannot listen on {config.server.host}:{config.server.port}: {reason}") from None
        host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
        banner(f"http://{host}:{door.sockets[0].getsockname()[1]}", gateway)
        await stopped.wait()
        logger.info("shutting down; %d requests in progress", len(gateway.running))
        await gateway.drain(config.timeouts.drain)
        await shut([door], runner.server)
    finally:
        await runner.cleanup()


async def shut(doors: Sequence[asyncio.Server], server: web.Server) -> None:
    """Stop listening. Whoever has come in by then is still answered: closing a socket resets those who wait at it."""
    sockets = [socket.fromfd(one.fileno(), one.family, one.type) for door in doors for one in door.sockets]
    await asyncio.sleep(0.001)  # a timer's turn comes after that of connections just accepted, which `close` would drop
    for door in doors:
        door.close()
    waiting: list[socket.socket] = []
    for last in sockets:
        last.setblocking(False)
        with last, contextlib.suppress(BlockingIOError):  # nobody is there any more
            while True:
                waiting.append(last.accept()[0])
    for connection in waiting:
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().connect_accepted_socket(server, connection)
    for _ in range(50):  # 0.5 s for what is on its way over connections that were kept alive
        if server.connections:
            await asyncio.sleep(0.01)


def described(gateway: Gateway) -> list[tuple[str, str]]:
    """What is on, as pairs of a word and what there is to say of it."""
    config, callers = gateway.config, gateway.callers
    ready = [id for id in PROVIDERS if gateway.engine.available(id)]
    names = ", ".join(entry.name for entry in config.auth.keys)
    match callers.mode:
        case "api_key":
            auth = f"api_key; keys of {names}" if names else "api_key"
        case "passthrough":
            auth = "passthrough; the callers' own provider keys, none of this gateway's"
        case _:
            auth = "none; " + ("anyone on this machine" if is_loopback(config.server.host) else "anyone")
    lines = [("auth", auth)]
    if callers.mode != "passthrough":
        lacking = ", ".join(id for id in PROVIDERS if id not in ready)
        also = f" (no key for {lacking})" if ready and lacking else ""
        none = "none has a key: bring one with each request, or set OPENAI_API_KEY …"
        lines.append(("providers", f"{', '.join(ready)}{also}" if ready else none))
        spoken = ", ".join(id for id, known in gateway.engine.speech.available.items() if known)
        lines.append(("speech", spoken or "no key: set CARTESIA_API_KEY, or bring one with each request"))
    for name, models in config.aliases.items():
        lines.append(("alias", f"{name} = {models if isinstance(models, str) else ', then '.join(models)}"))
    limits, times = config.limits, config.timeouts
    sizes = f"body {limits.max_body_bytes / (1 << 20):g} MiB, {limits.max_messages} messages, {limits.max_tools} tools"
    lines.append(("rates", say_limits(config.rate_limit)))
    if config.cors.allowed_origins:
        lines.append(("web pages", ", ".join(config.cors.allowed_origins)))
    lines.append(("limits", f"{sizes}; {times.first_byte:g} s to the first byte, {times.total:g} s in all"))
    most = f"{config.live.max_sessions:,} sessions at most{say_shared(config.rate_limit)}"
    lines.append(("live", f"{most}; speech detector {gateway.detectors.kind}"))
    lines.append(("metrics", gateway.metrics.missing or f"/metrics{', with a key' * config.metrics.require_key}"))
    return lines


def warnings_of(gateway: Gateway) -> list[str]:
    """What an operator should know before the first request."""
    config = gateway.config
    found = []
    if HttpRequestParser is HttpRequestParserPy:
        found.append("aiohttp has no C parser here: it is slow, and laxer with malformed requests")
    if config.auth.keys and config.auth.mode != "api_key":
        found.append(f"auth.mode {config.auth.mode}: auth.keys, with their rpm and models, count for nothing")
    if not is_loopback(config.server.host):
        found.append("other machines reach this port, without TLS: put a proxy with TLS in front")
        if config.auth.mode == "none":
            found.append("auth.mode none: anyone who reaches the port spends your money")
        if not gateway.metrics.missing and not config.metrics.require_key:
            found.append("/metrics is open to them too: metrics.require_key closes it")
    return found


def say_hello(url: str, gateway: Gateway, *, sandbox: bool) -> None:
    """What is on, and what to type next."""
    config, made = gateway.config, gateway.callers.made
    pairs = described(gateway)
    if made:
        pairs.insert(1, ("key", f"{made}   (made for this run; set VAI_API_KEYS to keep one)"))
    if sandbox:
        pairs.append(("sandbox", "every provider is played on this machine; no key, no network, no bill"))
    pairs += [("warning", text) for text in warnings_of(gateway)]
    lines = [f"vai {providers.__version__} listens on {url}", *(f"  {name:10} {what}" for name, what in pairs)]
    ready = [id for id in PROVIDERS if gateway.engine.available(id)]
    model = "anthropic/claude-sonnet-5-5" if "anthropic" in ready or not ready else f"{ready[0]}/MODEL"
    key = {"api_key": made or "YOUR_KEY", "passthrough": "YOUR_KEY_AT_ANTHROPIC", "none": ""}[config.auth.mode]
    auth = f"-H 'x-api-key: {key}' " if key else ""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]})
    lines.append(f"\nTry it:\n  curl {url}/v1/messages {auth}-H 'content-type: application/json' -d '{body}'")
    try:
        print("\n".join(lines), flush=True)
    except OSError:  # nobody reads it; the flush at the end is not to fail once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_limits(config: RateLimitSection) -> str:
    if not config.enabled:
        return "none"
    return f"{config.caller_rpm:,} requests a minute for one caller, {config.global_rpm:,} in all{say_shared(config)}"


def say_shared(config: RateLimitSection) -> str:
    return ", shared through Redis" if config.redis_url else ""


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
    open_streams()
    options = arguments(sys.argv[1:] if argv is None else argv)
    try:
        check_aiohttp()
        config = load_config(vars(options), os.environ)
        if options.check_config:
            make_app(config, make_engine(config, os.environ))
            print("the configuration is good")
            return
        configure_logs(config.log)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(run(config, os.environ, sandbox=options.sandbox))
    except (ConfigError, InvalidRequestError) as fault:
        _fail(str(fault))
    except KeyboardInterrupt:
        return


def open_streams() -> None:
    """Without its standard streams, a process would have sockets by their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"vai: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
