"""Any model behind one message API, in process or through a gateway.

    from vai import Client

    client = Client()  # keys from the environment; Client(base_url=…, api_key=…) talks to a gateway
    message = client.messages.create(model="anthropic/claude-sonnet-5-5", messages="What is the capital of France?")
    print(message.text, message.usage.total_tokens)

Needs providers.py beside it, pydantic and aiohttp. Whatever providers.py makes public is importable from here.

Contents (`grep -n '^# == '` lists the sections):
    tools · content helpers · what a caller may pass · engines (direct, remote) · the asynchronous client ·
    the synchronous client · the command line
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import functools
import importlib
import inspect
import json
import mimetypes
import os
import random
import re
import secrets
import sys
import threading
import urllib.parse
import warnings
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    get_type_hints,
    overload,
)

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

if TYPE_CHECKING or not __package__:
    import providers
    from providers import *
else:
    from . import providers
    from .providers import *

__version__ = "0.1.0"
if getattr(providers, "__version__", None) != __version__:
    found = getattr(providers, "__version__", "unknown")
    raise ImportError(f"vai {__version__} needs its own providers.py; version {found} is at {providers.__file__}")

__all__ = [
    *providers.__all__,
    "AsyncClient",
    "AsyncMessageStream",
    "Client",
    "Direct",
    "EventStream",
    "MessageStream",
    "Messages",
    "Models",
    "ProviderInfo",
    "Remote",
    "RequestFields",
    "Turn",
    "audio",
    "Tool",
    "document",
    "image",
    "image_url",
    "text",
    "tool",
    "tool_result",
    "video",
]

T = TypeVar("T")


# == Tools ============================================================================================================


P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)


class Tool(Generic[P, R_co]):
    """A function that a model can call; what `@tool` makes. Calling it calls the function."""

    def __init__(
        self,
        function: Callable[P, R_co],
        *,
        name: str | None = None,
        description: str | None = None,
        strict: bool | None = None,
    ) -> None:
        functools.update_wrapper(self, function)
        summary, about = read_docstring(inspect.getdoc(function) or "")
        self.function = function
        self.name = name or function.__name__
        self.description = summary if description is None else description
        self.strict = strict
        self._input = _input_model(function, self.name, about)
        self.input_schema: JSON = _untitled(self._input.model_json_schema())

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"tool({self.name})"

    def to_wire(self) -> JSON:
        """The tool as a request has it."""
        wire: JSON = {"name": self.name, "input_schema": self.input_schema}
        wire |= {"description": self.description} if self.description else {}
        return wire | ({"strict": self.strict} if self.strict is not None else {})

    def run(self, input: JSON) -> R_co:
        """Call the function with a tool call's input, checked and converted to what the annotations say.

        Raises `ValueError`, whose text helps a model to mend its call, for input that does not fit.
        """
        if input.get("invalid_json"):
            raise ValueError("The input is not a whole JSON object. Call the tool again with valid JSON.")
        try:
            checked = self._input.model_validate(input)
        except ValidationError as fault:
            wrong = fault.errors(include_url=False, include_context=False, include_input=False)
            lines = [f"- {'.'.join(map(str, e['loc'])) or 'input'}: {e['msg']}" for e in wrong[:10]]
            raise ValueError("\n".join(["The input does not fit the tool's schema:", *lines])) from None
        call: Callable[..., R_co] = self.function
        return call(**{name: getattr(checked, name) for name in checked.model_fields_set})


@overload
def tool(
    function: Callable[P, R_co],
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    strict: bool | None = None,
) -> Tool[P, R_co]: ...
@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    strict: bool | None = None,
) -> Callable[[Callable[P, R_co]], Tool[P, R_co]]: ...
def tool(function: Any = None, /, **options: Any) -> Any:
    """Make a tool of a function: its name, docstring and annotations become name, description and schema.

    Parameter descriptions come from `Annotated[str, "…"]` or from the docstring (Google, NumPy or Sphinx style).
    `strict` asks the provider to hold the model to the schema. Raises `TypeError` for `*args` and `**kwargs`.
    """
    return Tool(function, **options) if function is not None else lambda function: Tool(function, **options)


def _input_model(function: Callable[..., Any], name: str, about: Mapping[str, str]) -> type[BaseModel]:
    """A pydantic model of a function's parameters."""
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"a tool takes named parameters only; {name}() has {parameter}")
        hint = hints.get(parameter.name, Any)
        notes = getattr(hint, "__metadata__", ())
        described = next((note for note in notes if isinstance(note, str)), about.get(parameter.name))
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hint, Field(default, description=described))
    return create_model(f"{name}_input", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)


def _untitled(schema: Any) -> Any:
    """Without the titles that pydantic makes up, which only cost tokens."""
    if isinstance(schema, list):
        return [_untitled(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: _untitled(item) for name, item in value.items()}
        if key in ("properties", "$defs")
        else _untitled(value)
        for key, value in schema.items()
        if key != "title" or not isinstance(value, str)
    }


_SECTION = re.compile(
    r"(args|arguments|parameters|params|returns?|raises|yields?|examples?|notes?|see also)\s*:?\s*", re.IGNORECASE
)


def read_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """The description of a docstring, and what it says of each parameter: Google, NumPy and Sphinx styles."""
    summary: list[str] = []
    about: dict[str, str] = {}
    section, name, indent = "", "", 0
    lines = doc.expandtabs().splitlines()
    for number, line in enumerate(lines):
        text = line.strip()
        if found := re.match(r":param\s+(?:[^:]*\s)?\*{0,2}(\w+)\s*:\s*(.*)", text):  # Sphinx
            section, name, indent = "sphinx", found[1], len(line) - len(line.lstrip())
            about[name] = found[2]
        elif text.startswith(":"):
            section, name = "other", ""
        elif _SECTION.fullmatch(text) and (text.endswith(":") or _underlined(lines, number)):
            section, name = ("parameters" if text.lower().startswith(("arg", "param")) else "other"), ""
        elif section == "parameters" and set(text) == {"-"}:
            continue
        elif not section:
            summary.append(line)
        elif not text:
            name = name if section == "parameters" else ""
        elif section == "parameters" and (begun := _parameter(line, text, name, indent)):
            name, indent = begun[0], len(line) - len(line.lstrip())
            about[name] = begun[1]
        elif name:
            about[name] = f"{about[name]} {text}".strip()
    return "\n".join(summary).strip(), {key: value for key, value in about.items() if value}


def _underlined(lines: Sequence[str], number: int) -> bool:
    return number + 1 < len(lines) and len(rule := lines[number + 1].strip()) > 2 and set(rule) == {"-"}


def _parameter(line: str, text: str, name: str, indent: int) -> tuple[str, str] | None:
    """`city (str): where` of Google's style, `city : str` of NumPy's; None for a line that goes on."""
    here = len(line) - len(line.lstrip())
    if name and here > indent:
        return None
    if found := re.match(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)", text):
        numpy = re.match(r"\w+ : ", text) is not None
        return found[1], "" if numpy else found[2]
    if re.fullmatch(r"\w+", text):
        return text, ""
    return None


# == Content helpers ===================================================================================================

Source: TypeAlias = str | bytes | os.PathLike[str]
_MAGIC = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"%PDF", "application/pdf"),
    (b"ID3", "audio/mpeg"),
    (b"\xff\xfb", "audio/mpeg"),
    (b"OggS", "audio/ogg"),
    (b"fLaC", "audio/flac"),
    (b"\x1aE\xdf\xa3", "video/webm"),
)


def text(text: str) -> JSON:
    """A text block."""
    return {"type": "text", "text": text}


def image(source: Source, media_type: str | None = None) -> JSON:
    """An image block from a path, bytes or an http(s) URL."""
    return {"type": "image", "source": _source(source, media_type, "image/png")}


def image_url(url: str) -> JSON:
    """An image block that the provider fetches itself."""
    return {"type": "image", "source": {"type": "url", "url": url}}


def audio(source: Source, media_type: str | None = None) -> JSON:
    """An audio block from a path or bytes."""
    return {"type": "audio", "source": _source(source, media_type, "audio/wav")}


def video(source: Source, media_type: str | None = None) -> JSON:
    """A video block from a path, bytes or an http(s) URL."""
    return {"type": "video", "source": _source(source, media_type, "video/mp4")}


def document(source: Source, media_type: str | None = None, *, title: str | None = None) -> JSON:
    """A document block from a path, bytes or an http(s) URL: a PDF, or anything that is text."""
    given = _source(source, media_type, "application/pdf")
    if given["type"] == "base64" and given["media_type"].startswith(("text/", "application/json")):
        plain = base64.b64decode(given["data"]).decode("utf-8", "replace")
        given = {"type": "text", "media_type": "text/plain", "data": plain}
    if title is None and isinstance(source, (str, os.PathLike)) and given["type"] != "url":
        title = Path(source).name
    return {"type": "document", "source": given} | ({"title": title} if title else {})


RESULT_BLOCKS = ("text", "image", "document", "search_result")  # of what a tool result may consist


def tool_result(tool_use_id: str, content: object = "", *, is_error: bool = False) -> JSON:
    """The answer to a `tool_use`: text, blocks, or anything that JSON can hold."""
    plain = _plain(content)
    blocks = isinstance(plain, list) and all(isinstance(b, dict) and b.get("type") in RESULT_BLOCKS for b in plain)
    if not isinstance(plain, str) and not blocks:
        plain = json.dumps(plain, ensure_ascii=False)
    block = {"type": "tool_result", "tool_use_id": tool_use_id, "content": plain}
    return block | ({"is_error": True} if is_error else {})


def _source(source: Source, media_type: str | None, default: str) -> JSON:
    if isinstance(source, str) and re.match(r"https?://", source):
        return {"type": "url", "url": source}
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    if media_type is None and not isinstance(source, bytes):
        media_type = mimetypes.guess_type(os.fspath(source))[0]
    if media_type is None:
        media_type = _sniff(data) or default
    return {"type": "base64", "media_type": media_type, "data": base64.b64encode(data).decode("ascii")}


def _sniff(data: bytes) -> str | None:
    if data[:4] == b"RIFF":
        return {b"WEBP": "image/webp", b"WAVE": "audio/wav"}.get(data[8:12])
    if data[4:8] == b"ftyp":
        return "audio/mp4" if data[8:11] == b"M4A" else "video/mp4"
    return next((kind for magic, kind in _MAGIC if data.startswith(magic)), None)


# == What a caller may pass ============================================================================================

Block: TypeAlias = Mapping[str, Any] | BaseModel
Turn: TypeAlias = Mapping[str, Any] | Message
Messages: TypeAlias = str | Sequence[Turn]


class RequestFields(TypedDict, total=False):
    """The fields of a request beside `model` and `messages`: Anthropic's, and a few of vai's own."""

    max_tokens: int
    system: str | Sequence[Block]
    stop_sequences: Sequence[str]
    metadata: Mapping[str, Any]
    thinking: Mapping[str, Any]
    output_config: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any] | Tool[..., Any]]
    tool_choice: Mapping[str, Any]
    temperature: float
    top_p: float
    top_k: int
    output_format: Mapping[str, Any]
    output: Mapping[str, Any]
    voice: Mapping[str, Any]
    extensions: Mapping[str, Mapping[str, Any]]
    cache_control: Mapping[str, Any]
    container: Any
    context_management: Mapping[str, Any]
    mcp_servers: Sequence[Mapping[str, Any]]
    service_tier: str
    extra_headers: Mapping[str, str]
    extra_body: Mapping[str, Any]
    provider_keys: Mapping[str, str]


def request_body(model: str, messages: Messages, fields: Mapping[str, Any]) -> JSON:
    """The JSON body of a request, with answers of earlier turns and pydantic objects made plain."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else [_turn(turn) for turn in messages]
    rest = {key: _plain(value) for key, value in fields.items() if value is not None}
    return {"model": model, "messages": turns} | rest


def _turn(turn: Turn) -> Any:
    if isinstance(turn, Message):
        return {"role": "assistant", "content": [block.to_wire() for block in turn.content]}
    return _plain(turn)


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, Tool):
        return value.to_wire()
    if isinstance(value, BaseModel):
        if hasattr(value, "to_wire"):
            return value.to_wire()
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)):
        return [_plain(item) for item in value]
    return value


# == Engines ===========================================================================================================
# An engine turns a request into an answer: `Direct` asks the provider, `Remote` asks a vai gateway. Clients and the
# gateway itself are written against this shape; everything that differs between the two modes is here.


class Engine(Protocol):
    """What a client needs of either mode. `parse` raises for a request that is wrong; the rest does I/O."""

    def parse(self, body: JSON, headers: Mapping[str, str] | None = None) -> Any: ...
    async def create(self, request: Any, keys: Mapping[str, str] | None = None) -> Message: ...
    async def open(self, request: Any, keys: Mapping[str, str] | None = None) -> EventStream: ...
    async def models(self) -> Models: ...
    async def close(self) -> None: ...


class ProviderInfo(BaseModel):
    """A provider, as `GET /v1/models` lists it."""

    id: str
    name: str
    available: bool
    capabilities: dict[str, bool]
    native_tools: list[str]
    auth: dict[str, str]


class Models(BaseModel):
    """What can be asked: providers with their capabilities, and aliases. There is no catalogue of models."""

    providers: list[ProviderInfo]
    aliases: dict[str, str] = {}
    voice: dict[str, list[str]] = {}


class EventStream:
    """An answer coming in: iterate for lists of events, one list for each read of the socket.

    Ends after `message_stop`, or raises the `Error` that ended it. Closing it lets go of the provider at once.
    """

    def __init__(
        self,
        upstream: Upstream,
        decoder: StreamDecoder,
        dropped: list[str],
        *,
        credential: Credential | None = None,
        request_id: str | None = None,
    ) -> None:
        self.dropped = dropped
        self.request_id = request_id
        self._credential = credential
        self._upstream = upstream
        self._decoder = decoder
        self._sse = SSEDecoder(provider=decoder.provider)
        self._head = b""  # of a body in which there was no event yet: it may be an error in JSON
        self._ready: list[StreamEvent] = []
        self._fault: Error | None = None
        self._until = 0.0  # when what may follow a whole answer has had its time

    async def start(self) -> EventStream:
        """Wait for the first events, so that an answer that is an error from the start is raised here."""
        try:
            self._ready = await self._next()
        except BaseException:
            self.close()
            raise
        return self

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> list[StreamEvent]:
        if self._ready:
            events, self._ready = self._ready, []
            return events
        if events := await self._next():
            return events
        raise StopAsyncIteration

    async def _next(self) -> list[StreamEvent]:
        """The next events; none at the end."""
        decoder = self._decoder
        while not decoder.ended:
            if self._fault:
                raise self._fault
            events: list[StreamEvent] = []
            try:
                await self._read(events)
            except Error as fault:
                self._fault = providers.for_caller(fault, self._credential) if self._credential else fault
            if events:
                return events
        return []

    async def _read(self, events: list[StreamEvent]) -> None:
        decoder, patience = self._decoder, None
        if decoder.ending:
            now = asyncio.get_running_loop().time()
            self._until = self._until or now + 1.0
            patience = self._until - now
        try:
            data = await self._upstream.chunk(patience) if patience is None or patience > 0 else b""
        except Error as fault:
            if not decoder.ending:
                raise _cut(fault, "connection_broken") from None
            data = b""
        if data:
            for sse in self._sse.feed(data):
                events += decoder.feed(sse)
            if not decoder.build.started and len(self._head) < 64 << 10:
                self._head += data
            return
        for sse in self._sse.close():  # an event that lacks its blank line: half a one is the mark of a broken stream
            try:
                events += decoder.feed(sse)
            except Error as fault:
                if decoder.ending and fault.code == "unreadable_answer":
                    break
                raise _cut(fault, "unreadable_answer") from None
        self._check_head()
        events += decoder.close()

    def _check_head(self) -> None:
        """A body that holds no event at all may be an error in JSON, whatever its content type says."""
        if self._decoder.build.started or self._head.lstrip()[:1] not in (b"{", b"["):
            return
        with contextlib.suppress(ValueError):
            body = providers.loads(self._head)
            found = body[0] if isinstance(body, list) and body else body
            if isinstance(found, dict) and found.get("error"):
                raise providers.stream_error(self._decoder.provider, found["error"])

    async def finish(self) -> None:
        """After the end: give the provider a moment to end the body, so that the connection can be used again."""
        await self._upstream.drain()
        self._upstream.abort()

    def close(self) -> None:
        self._upstream.abort()

    @property
    def model(self) -> str:
        """The model that answers, as far as it has said so."""
        first = self._ready[0] if self._ready else None
        return first.message.model if isinstance(first, MessageStart) else ""

    @property
    def usage(self) -> Usage | None:
        """What it cost, once the answer is whole."""
        return self._decoder.build.usage


def _cut(fault: Error, code: str) -> Error:
    """What a broken-off stream looks like where it is read, as what it is."""
    return StreamTruncated(provider=fault.provider) if fault.code == code else fault


@contextlib.contextmanager
def _begun(provider: str) -> Iterator[None]:
    """An answer is coming in: whatever goes wrong from here is not to be asked, and paid for, again."""
    try:
        yield
    except ValueError:
        fault: Error = providers.unreadable(provider)
        fault.begun = True
        raise fault from None
    except Error as fault:
        fault.begun = True
        raise


class Direct:
    """Asks the providers themselves.

    `provider_keys` by provider id (or its BYOK name); what is missing comes from `environ`, as do base URLs.
    `own_keys` says that a refused key is the caller's to mend: true for a script, false for a gateway's own keys.
    `keyless` has no keys at all but those that come with a request.
    """

    def __init__(
        self,
        *,
        provider_keys: Mapping[str, str] | None = None,
        base_urls: Mapping[str, str] | None = None,
        aliases: Mapping[str, str] | None = None,
        environ: Mapping[str, str] | None = None,
        timeouts: Timeouts | None = None,
        max_tokens: int = 4096,
        own_keys: bool = True,
        keyless: bool = False,
    ) -> None:
        environ = os.environ if environ is None else environ
        given = byok(provider_keys or {})
        self.aliases = dict(aliases or {})
        self.max_tokens = max_tokens
        self.own_keys = own_keys
        self.keys: dict[str, Secret] = {}
        self.base_urls: dict[str, str] = {}
        for adapter in PROVIDERS.values():
            found = [given.get(name) for name in adapter.byok] + [environ.get(name) for name in adapter.key_env]
            if not keyless and (key := next((key.strip() for key in found if key and key.strip()), None)):
                self.keys[adapter.id] = _checked_key(key, f"the key for {adapter.id}")
            self.base_urls[adapter.id] = _base_url(adapter, base_urls or {}, environ)
        self.login = GoogleLogin.from_environ(environ)
        self.login.own = own_keys
        self._logs_in = self.login.configured and not keyless
        self.transport = Transport(timeouts)

    def parse(self, body: JSON, headers: Mapping[str, str] | None = None) -> MessageRequest:
        """The request, checked. `headers` may hold `anthropic-version` and `anthropic-beta`."""
        low = {name.lower(): value for name, value in (headers or {}).items()}
        kept = {name: low[name] for name in FORWARDED_HEADERS if low.get(name)}
        for name, value in kept.items():
            if len(value) > 1024 or not re.fullmatch(r"[\x20-\x7e]*", value):
                raise InvalidRequestError(f"the header {name} is not a plain list of names", param=name)
        return providers.parse_request(body, headers=kept, aliases=self.aliases)

    async def create(self, request: MessageRequest, keys: Mapping[str, str] | None = None) -> Message:
        adapter = PROVIDERS[request.provider]
        upstream, credential = await self._send(adapter, request, keys or {})
        raw = b""
        try:
            with _begun(adapter.id):
                async with upstream:
                    raw = await upstream.read()
                message = adapter.decode(providers.loads(raw.decode("utf-8-sig", "replace")), request)
        except Error as fault:
            raise providers.for_caller(fault, credential) from None
        finally:
            del raw  # a traceback's locals would show what the provider echoed
        message._dropped = list(request.dropped)
        return message

    async def open(self, request: MessageRequest, keys: Mapping[str, str] | None = None) -> EventStream:
        adapter = PROVIDERS[request.provider]
        upstream, credential = await self._send(adapter, request, keys or {})
        stream = EventStream(upstream, adapter.decoder(request), request.dropped, credential=credential)
        return await stream.start()

    async def models(self) -> Models:
        listed = [
            ProviderInfo(
                id=adapter.id,
                name=adapter.name,
                available=self.available(adapter.id),
                capabilities=dict.fromkeys(adapter.capabilities, True),
                native_tools=list(adapter.native_tools),
                auth={"header": f"X-Provider-Key-{_HEADER_NAMES.get(adapter.id, adapter.id.title())}"},
            )
            for adapter in PROVIDERS.values()
        ]
        return Models(providers=listed, aliases=self.aliases)

    def available(self, provider: str) -> bool:
        """Whether there is a key for the provider."""
        return provider in self.keys or (provider == "gemini-oauth" and self._logs_in)

    async def close(self) -> None:
        await self.transport.close()

    async def credential(
        self, adapter: Adapter, request: MessageRequest, keys: Mapping[str, str], refused: str | None = None
    ) -> Credential:
        """Whose key pays: the caller's (`keys`, then the body's `provider_keys`), else our own."""
        brought = (
            given[name] for given in (byok(keys), byok(request.provider_keys)) for name in adapter.byok if name in given
        )
        if key := next(brought, None):
            return Credential(key, own=True, project=self.login.project)
        if adapter.id in self.keys:
            return Credential(self.keys[adapter.id], own=self.own_keys, project=self.login.project)
        if adapter.id == "gemini-oauth" and self._logs_in:
            return await self.login.credential(self.transport, self.base_urls[adapter.id], refused=refused)
        where = " or ".join(adapter.key_env) or "credentials (`vai login gemini-oauth`)"
        message = f"no key for {adapter.id}: set {where}, or bring one as provider_keys.{adapter.id}"
        raise AuthenticationError(message, provider=adapter.id, code="no_provider_key")

    async def _send(
        self, adapter: Adapter, request: MessageRequest, keys: Mapping[str, str]
    ) -> tuple[Upstream, Credential]:
        """The provider's 200, and whose key got it.

        A request is repeated once without an advisory field that was refused, and once with a fresh token.
        """
        refused: str | None = None
        mended = False
        for _ in range(3):
            credential = await self.credential(adapter, request, keys, refused)
            sent = adapter.encode(request, credential, self.base_urls[adapter.id], self.max_tokens)
            upstream = await self.transport.send(sent, adapter.id)
            if upstream.status == 200:
                return upstream, credential
            fault = await self._fault(upstream, adapter, credential)
            if upstream.status == 401 and credential.renewable and refused is None:
                refused = credential.key
            elif (name := adapter.refused_field(fault, request, sent)) and not mended:
                mended = True
                request.drop(name)
            else:
                raise fault
        raise fault

    async def _fault(self, upstream: Upstream, adapter: Adapter, credential: Credential) -> Error:
        async with upstream:
            body = await upstream.read_some()
        return providers.provider_error(
            adapter.id, upstream.status, upstream.headers, body, keys=[credential.key], own_key=credential.own
        )


def _base_url(adapter: Adapter, given: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """Where the provider is. Raises `InvalidRequestError` that names the setting."""
    named = [
        (f"base_urls.{adapter.id}", given.get(adapter.id)),
        *((name, environ.get(name)) for name in adapter.url_env),
    ]
    return next((_http_url(name, url) for name, url in named if url and url.strip()), adapter.base_url)


def _http_url(name: str, url: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#]+[^\s?#]*", url.strip()):
        raise InvalidRequestError(f"{name}: not an http(s) URL", param=name)
    return url.strip().rstrip("/")


_HEADER_NAMES = {"openai": "OpenAI", "oai-resp": "OAI-Resp", "gemini-oauth": "Gemini-OAuth"}
FORWARDED_HEADERS = ("anthropic-version", "anthropic-beta")
BYOK_NAMES = {name for adapter in PROVIDERS.values() for name in adapter.byok} | {"cartesia"}


def _key_name(name: str) -> str:
    return name.lower().replace("_", "-")


def byok(keys: Mapping[str, str]) -> dict[str, Secret]:
    """Keys that a caller brought, by BYOK name; empty ones are none. Raises `InvalidRequestError`, showing no value."""
    keys = {name: Secret(key.strip()) for name, key in keys.items()}
    out: dict[str, Secret] = {}
    for name, key in keys.items():
        if _key_name(name) not in BYOK_NAMES:
            known = ", ".join(sorted(BYOK_NAMES))
            raise InvalidRequestError(f"no provider takes a key by this name; known: {known}", param="provider_keys")
        if key:
            out[_key_name(name)] = _checked_key(key, f"provider_keys.{_key_name(name)}")
    return out


def _checked_key(key: str, param: str) -> Secret:
    if not re.fullmatch(r"[\x21-\x7e]{1,8192}", key):
        raise InvalidRequestError(f"{param}: not a key (printable ASCII without spaces)", param=param)
    return Secret(key)


class _GatewayRequest:
    """A request that the gateway will check: body and headers as they go."""

    def __init__(self, body: JSON, headers: Mapping[str, str]) -> None:
        self.body = body
        self.headers = headers


class Remote:
    """Asks a vai gateway. Its answers are canonical already: they are read, not translated."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        provider_keys: Mapping[str, str] | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        self.base_url = _http_url("base_url", base_url)
        self.transport = Transport(timeouts)
        self._headers: dict[str, str] = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = providers.bearer(_checked_key(api_key, "api_key"))
        self._headers |= self._byok(provider_keys or {})

    @staticmethod
    def _byok(keys: Mapping[str, str]) -> dict[str, str]:
        return {f"X-Provider-Key-{name}": key for name, key in byok(keys).items()}

    def parse(self, body: JSON, headers: Mapping[str, str] | None = None) -> _GatewayRequest:
        return _GatewayRequest(body, headers or {})

    async def create(self, request: _GatewayRequest, keys: Mapping[str, str] | None = None) -> Message:
        upstream = await self._send("POST", "/v1/messages", request, keys)
        with _begun("gateway"):
            async with upstream:
                message = Message.model_validate(await self._json(upstream))
        message._dropped = _listed(upstream.headers.get("X-Vai-Dropped"))
        message._request_id = upstream.headers.get("X-Request-ID")
        return message

    async def open(self, request: _GatewayRequest, keys: Mapping[str, str] | None = None) -> EventStream:
        request.body = request.body | {"stream": True}
        upstream = await self._send("POST", "/v1/messages", request, keys)
        dropped, id = _listed(upstream.headers.get("X-Vai-Dropped")), upstream.headers.get("X-Request-ID")
        return await EventStream(upstream, GatewayDecoder(), dropped, request_id=id).start()

    async def models(self) -> Models:
        async with await self._send("GET", "/v1/models", _GatewayRequest({}, {}), None) as upstream:
            return Models.model_validate(await self._json(upstream))

    async def close(self) -> None:
        await self.transport.close()

    async def _send(self, method: str, path: str, request: _GatewayRequest, keys: Mapping[str, str] | None) -> Upstream:
        headers = {**self._headers, **request.headers, **self._byok(keys or {})}
        try:
            raw = providers.dumps(request.body) if method == "POST" else b""
        except ValueError:
            providers.parse_request(request.body)  # says where
            raise InvalidRequestError("the request holds a number that JSON cannot") from None
        sent = providers.HTTPRequest(self.base_url + path, headers, raw, method)
        upstream = await self.transport.send(sent, "gateway")
        if upstream.status == 200:
            return upstream
        async with upstream:
            body = await upstream.read_some()
        raise error_from_wire(body, upstream.status)

    @staticmethod
    async def _json(upstream: Upstream) -> Any:
        try:
            return providers.loads(await upstream.read())
        except ValueError:
            raise ProviderError("the gateway's answer is not JSON", code="unreadable_answer") from None


def _listed(header: str | None) -> list[str]:
    return [name.strip() for name in (header or "").split(",") if name.strip()]


def error_from_wire(body: bytes | JSON, status: int = 500) -> Error:
    """The error that an envelope speaks of: same class, same fields."""
    try:
        envelope = providers.loads(body) if isinstance(body, bytes) else body
        error = envelope["error"]
        cls = ERRORS.get(error["type"], APIError)
        fields = {name: error.get(name) for name in ("param", "code", "provider", "provider_error", "retry_after")}
        if fields["code"] == "stream_truncated":
            cls = StreamTruncated
        return cls(str(error["message"]), request_id=error.get("request_id"), **fields)
    except (ValueError, KeyError, TypeError):
        return providers.provider_error("gateway", status, {}, body if isinstance(body, bytes) else b"")


class GatewayDecoder(StreamDecoder):
    """The canonical events off the wire."""

    def __init__(self) -> None:
        self.provider = "gateway"
        self.build = providers.EventBuilder("gateway")
        self._cutter = None

    def chunk(self, chunk: Any) -> list[StreamEvent]:
        if chunk["type"] == "error":
            raise error_from_wire(chunk)
        event = providers.event_from_wire(chunk)
        if event is None:
            return []
        self.build.started = True
        self.build.ended = event.type == "message_stop"
        return [event]


# == The asynchronous client ===========================================================================================


class AsyncMessageStream:
    """A streamed answer. Iterate it for events, or `text` for text alone; `final()` is the whole message.

    async with client.messages.stream(model=…, messages=…) as stream:
        async for piece in stream.text:
            print(piece, end="", flush=True)
        message = await stream.final()
    """

    def __init__(self, open: Callable[[], Awaitable[EventStream]]) -> None:
        self._open = open
        self._inside = False
        self._ended = False
        self._stream: EventStream | None = None
        self._total = Accumulator()
        self._events: collections.deque[StreamEvent] = collections.deque()

    async def __aenter__(self) -> AsyncMessageStream:
        if self._stream is not None:
            raise RuntimeError("a stream is used once")
        self._stream = await self._open()
        self._inside = True
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def __aiter__(self) -> AsyncMessageStream:
        return self

    async def __anext__(self) -> StreamEvent:
        while not self._events:
            self._events.extend(await self._batch())
        return self._events.popleft()

    async def _batch(self) -> list[StreamEvent]:
        """The events of one read of the socket. Raises `StopAsyncIteration` at the end."""
        if self._stream is None or not self._inside:
            raise RuntimeError("a stream is used inside its `with` or `async with`")
        try:
            events = await anext(self._stream)
        except StopAsyncIteration:
            self._ended = True
            raise
        self._ended = events[-1].type == "message_stop"
        for event in events:
            self._total.add(event)
        return events

    @property
    def text(self) -> AsyncIterator[str]:
        """The pieces of text, as they come."""
        return text_of(self)

    @property
    def message(self) -> Message | None:
        """The answer as far as it has come; None before it begins."""
        return self._total.message

    @property
    def dropped(self) -> list[str]:
        """Advisory fields of the request that the provider does not take."""
        return self._stream.dropped if self._stream else []

    @property
    def request_id(self) -> str | None:
        return self._stream.request_id if self._stream else None

    async def final(self) -> Message:
        """Read to the end: the message that a request without `stream` would have got."""
        if not self._ended:
            async for _ in self:
                pass
        message = self._total.message
        if message is None:
            raise StreamTruncated("the stream was closed before it began")
        message._dropped = list(self.dropped)
        message._request_id = self.request_id
        return message

    async def close(self) -> None:
        """Let go of the provider, at once if the answer is not whole."""
        self._inside = False
        if self._stream is not None:
            self._stream.close()


async def text_of(stream: AsyncMessageStream) -> AsyncIterator[str]:
    """The text deltas of a stream."""
    async for event in stream:
        if isinstance(event, ContentBlockDelta) and isinstance(event.delta, TextDelta):
            yield event.delta.text


class AsyncMessages:
    """`client.messages`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def create(self, *, model: str, messages: Messages, **fields: Unpack[RequestFields]) -> Message:
        """The whole answer. Raises an `Error` whose class and fields say what went wrong."""
        request, keys = self._client._prepare(model, messages, fields)
        return await self._client._retrying(lambda: self._client._engine.create(request(), keys))

    def stream(self, *, model: str, messages: Messages, **fields: Unpack[RequestFields]) -> AsyncMessageStream:
        """The answer as it comes; to be used with `async with`."""
        return AsyncMessageStream(lambda: self._open(model, messages, fields))

    async def _open(self, model: str, messages: Messages, fields: RequestFields) -> EventStream:
        request, keys = self._client._prepare(model, messages, fields, stream=True)
        return await self._client._retrying(lambda: self._client._engine.open(request(), keys))


class AsyncModels:
    """`client.models`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> Models:
        return await self._client._retrying(self._client._engine.models)


class AsyncClient:
    """Any model, in process (`AsyncClient()`) or through a gateway (`AsyncClient(base_url=…, api_key=…)`).

    `timeout` is in seconds for a whole request; `max_retries` repeats 408, 409, 429, 5xx and failed connections, with
    growing pauses or after `retry_after`, and never once the answer has begun.
    """

    def __init__(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        provider_keys: Mapping[str, str] | None = None,
        base_urls: Mapping[str, str] | None = None,
        aliases: Mapping[str, str] | None = None,
        timeout: float | Timeouts = 600,
        max_retries: int = 2,
    ) -> None:
        timeouts = timeout if isinstance(timeout, Timeouts) else Timeouts(
            connect=min(10, timeout), first_byte=min(120, timeout), idle=min(120, timeout), total=timeout
        )  # fmt: skip
        self._engine: Engine
        if base_url is None and api_key is not None:
            raise TypeError("api_key is a gateway's and needs base_url; a provider's goes into provider_keys")
        if base_url is not None and (base_urls or aliases):
            raise TypeError("base_urls and aliases are for direct mode; a gateway has its own")
        if base_url is None:
            self._engine = Direct(provider_keys=provider_keys, base_urls=base_urls, aliases=aliases, timeouts=timeouts)
        else:
            self._engine = Remote(base_url, api_key, provider_keys=provider_keys, timeouts=timeouts)
        self._max_retries = max_retries
        self._closed = False
        self.messages = AsyncMessages(self)
        self.models = AsyncModels(self)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        self._closed = True
        await self._engine.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._engine).__name__.lower()})"

    def _prepare(
        self, model: str, messages: Messages, fields: RequestFields, stream: bool = False
    ) -> tuple[Any, Mapping[str, str]]:
        """A maker of the request (a retry starts afresh), and the keys that come with it."""
        if "stream" in fields:
            raise TypeError("create() has no stream=; use messages.stream(…)")
        rest = dict(fields)
        headers: Any = rest.pop("extra_headers", None) or {}
        keys: Any = rest.pop("provider_keys", None) or {}
        more: Any = rest.pop("extra_body", None) or {}
        body = request_body(model, messages, {**rest, **more, **({"stream": True} if stream else {})})
        return lambda: self._engine.parse(body, headers), keys

    async def _retrying(self, attempt: Callable[[], Awaitable[T]]) -> T:
        if self._closed:
            raise RuntimeError("the client is closed")
        for tries in range(self._max_retries + 1):
            try:
                return await attempt()
            except Error as fault:
                if self._closed:
                    raise RuntimeError("the client was closed") from None
                if tries == self._max_retries or not fault.retryable:
                    raise
                pause = fault.retry_after if fault.retry_after is not None else min(8.0, 0.5 * 2**tries)
                if pause > 60:
                    raise
                await asyncio.sleep(pause * (1 if fault.retry_after else random.uniform(0.75, 1.25)))
        raise AssertionError("unreachable")


# == The synchronous client ============================================================================================


class _Portal:
    """An event loop on a thread of its own, where the asynchronous client does the work of the synchronous one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False

    @property
    def started(self) -> bool:
        return self._loop is not None

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._stopped:
                raise RuntimeError("the client is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="vai", daemon=True)
                self._thread.start()
            return self._loop

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end on the loop's thread; Ctrl-C here cancels it there."""
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._running())
        except RuntimeError:
            work.close()
            raise
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError("the client was closed") from None
        except BaseException:
            if future.cancel():
                with contextlib.suppress(concurrent.futures.CancelledError, Exception):
                    future.result(1)
            raise

    def stop(self) -> None:
        """Cancel what still runs, and end the thread."""
        with self._lock:
            loop, thread, self._stopped = self._loop, self._thread, True
        if loop and thread and loop.is_running():
            asyncio.run_coroutine_threadsafe(self._cancel_all(), loop).result(5)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(5)
            loop.close()
        self._loop = None

    @staticmethod
    async def _cancel_all() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.get_running_loop().shutdown_asyncgens()


class MessageStream:
    """`AsyncMessageStream` without `await`: events come over in batches, one for each read of the socket."""

    def __init__(self, client: Client, stream: AsyncMessageStream) -> None:
        self._client = client  # which lives as long as its streams
        self._portal = client._portal
        self._async = stream
        self._events: collections.deque[StreamEvent] = collections.deque()
        self._ended = False

    def __enter__(self) -> MessageStream:
        try:
            self._portal.call(self._async.__aenter__())
        except BaseException:  # Ctrl-C just when the stream was there
            with contextlib.suppress(RuntimeError):
                self._portal.call(self._async.close())
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[StreamEvent]:
        return self

    def __next__(self) -> StreamEvent:
        while not self._events:
            if self._ended:
                raise StopIteration
            batch = self._portal.call(self._next_batch())
            self._ended = not batch
            self._events.extend(batch)
        return self._events.popleft()

    async def _next_batch(self) -> list[StreamEvent]:
        try:
            return await self._async._batch()
        except StopAsyncIteration:
            return []

    @property
    def text(self) -> Iterator[str]:
        """The pieces of text, as they come."""
        for event in self:
            if isinstance(event, ContentBlockDelta) and isinstance(event.delta, TextDelta):
                yield event.delta.text

    @property
    def message(self) -> Message | None:
        return self._async.message

    @property
    def dropped(self) -> list[str]:
        return self._async.dropped

    @property
    def request_id(self) -> str | None:
        return self._async.request_id

    def final(self) -> Message:
        self._events.clear()
        return self._portal.call(self._async.final())

    def close(self) -> None:
        self._portal.call(self._async.close())


class SyncMessages:
    """`client.messages`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(self, *, model: str, messages: Messages, **fields: Unpack[RequestFields]) -> Message:
        """The whole answer. Raises an `Error` whose class and fields say what went wrong."""
        client = self._client
        return client._portal.call(client._async.messages.create(model=model, messages=messages, **fields))

    def stream(self, *, model: str, messages: Messages, **fields: Unpack[RequestFields]) -> MessageStream:
        """The answer as it comes; to be used with `with`."""
        return MessageStream(
            self._client, self._client._async.messages.stream(model=model, messages=messages, **fields)
        )


class SyncModels:
    """`client.models`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> Models:
        return self._client._portal.call(self._client._async.models.list())


class Client:
    """`AsyncClient` without `await`, for scripts, threads and notebooks; it works inside a running event loop too."""

    def __init__(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        provider_keys: Mapping[str, str] | None = None,
        base_urls: Mapping[str, str] | None = None,
        aliases: Mapping[str, str] | None = None,
        timeout: float | Timeouts = 600,
        max_retries: int = 2,
    ) -> None:
        self._async = AsyncClient(
            base_url=base_url,
            api_key=api_key,
            provider_keys=provider_keys,
            base_urls=base_urls,
            aliases=aliases,
            timeout=timeout,
            max_retries=max_retries,
        )
        self._portal = _Portal()
        self._finalizer = weakref.finalize(self, _forgotten, self._async, self._portal)

    @property
    def messages(self) -> SyncMessages:
        return SyncMessages(self)

    @property
    def models(self) -> SyncModels:
        return SyncModels(self)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._async).replace("AsyncClient", "Client")

    def close(self) -> None:
        self._finalizer.detach()
        if self._portal.started and not self._async._closed:
            self._portal.call(self._async.close())
        self._async._closed = True
        self._portal.stop()


def _forgotten(client: AsyncClient, portal: _Portal) -> None:
    """A client that nobody closed: at its end, or at the interpreter's, its connections and its thread go too."""
    if portal.started and not client._closed:
        warnings.warn("a vai.Client was not closed", ResourceWarning, stacklevel=2)
        if threading.current_thread() is not portal._thread:
            portal.call(client.close())
            portal.stop()


# == The command line ==================================================================================================


def main(argv: Sequence[str] | None = None) -> None:
    """`vai "prompt" -m MODEL` · `vai models` · `vai login gemini-oauth`.

    Exit codes: 0, 1 for an error of a provider or gateway, 2 for usage, 130 for Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    commands = {"models": _models_command, "login": _login_command}
    try:
        if argv and argv[0] in commands:
            commands[argv[0]](argv[1:])
        else:
            _prompt_command(argv)
    except Error as fault:
        whose = f"{fault.provider}: " if fault.provider and fault.provider not in fault.message else ""
        print(f"vai: {whose}{fault}", file=sys.stderr)
        raise SystemExit(2 if isinstance(fault, InvalidRequestError) and fault.provider is None else 1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of a pipe has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _prompt_command(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="vai",
        description="Ask any model. A prompt on the command line, on standard input, or both.",
        epilog="other commands: vai models · vai login gemini-oauth",
    )
    parser.add_argument("prompt", nargs="?", help="what to ask")
    parser.add_argument("-m", "--model", default=os.environ.get("VAI_MODEL"), help="provider/model ($VAI_MODEL)")
    parser.add_argument("-s", "--system", help="system prompt")
    parser.add_argument("--max-tokens", type=int, metavar="N")
    parser.add_argument("--json", action="store_true", help="print the whole message as JSON")
    parser.add_argument("--version", action="version", version=f"vai {__version__}")
    options = parser.parse_args(argv)
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8", "replace")
    prompt = "\n\n".join(part for part in (options.prompt, piped.strip()) if part)
    if not prompt:
        parser.error("there is no prompt")
    if not options.model:
        parser.error("which model? -m provider/model, or set VAI_MODEL")
    fields: RequestFields = {}
    if options.system:
        fields["system"] = options.system
    if options.max_tokens:
        fields["max_tokens"] = options.max_tokens
    with _environment_client() as client:
        if options.json:
            message = client.messages.create(model=options.model, messages=prompt, **fields)
            print(json.dumps(message.to_wire(), ensure_ascii=False, indent=2))
            return
        with client.messages.stream(model=options.model, messages=prompt, **fields) as stream:
            for piece in stream.text:
                print(piece, end="", flush=True)
        print()


def _models_command(argv: Sequence[str]) -> None:
    argparse.ArgumentParser(prog="vai models", description="Providers, and what they can do.").parse_args(argv)
    with _environment_client() as client:
        listed = client.models.list()
    for row in listed.providers:
        able = ", ".join([*row.capabilities, *row.native_tools])
        print(f"{row.id:13} {'ready ' if row.available else 'no key'}  {able}")
    for name, model in listed.aliases.items():
        print(f"{name:13} alias   {model}")


def _environment_client() -> Client:
    """Through the gateway that VAI_BASE_URL names, if any; else in process."""
    return Client(base_url=os.environ.get("VAI_BASE_URL") or None, api_key=os.environ.get("VAI_API_KEY") or None)


def _login_command(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="vai login", description="Log in to Gemini Code Assist.")
    parser.add_argument("provider", choices=["gemini-oauth"])
    parser.parse_args(argv)
    login = GoogleLogin.from_environ(os.environ)
    if not login.client_id:
        parser.error(
            "set GEMINI_OAUTH_CLIENT_ID and GEMINI_OAUTH_CLIENT_SECRET: an OAuth client of your own organisation"
        )
    asyncio.run(_log_in(login))
    print(f"Logged in; the credentials are in {login.path}")


async def _log_in(login: GoogleLogin) -> None:
    """Wait for the redirect, or for its URL to be pasted (over SSH the browser is elsewhere)."""
    state, verifier = secrets.token_urlsafe(24), secrets.token_urlsafe(48)
    answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with await asyncio.start_server(lambda r, w: _redirected(r, w, answered), "127.0.0.1", 0) as listener:
        redirect_uri = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/"
        print(f"Open this page:\n\n  {login.consent_url(redirect_uri, state, verifier)}\n")
        print("If the browser ends on a page that does not load, paste its address here.", flush=True)
        _read_line(answered)
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(await answered).query)
    if query.get("state") != [state] or not query.get("code"):
        reason = query.get("error", ["the address holds no code, or one of another login"])[0]
        raise AuthenticationError(f"the login did not succeed: {reason}", provider="gemini-oauth")
    direct = Direct(keyless=True)
    try:
        await login.log_in(direct.transport, direct.base_urls["gemini-oauth"], query["code"][0], redirect_uri, verifier)
    finally:
        await direct.close()


async def _redirected(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answered: asyncio.Future[str]
) -> None:
    target = (await reader.readline()).decode("latin-1").split(" ")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\nYou can close this page.\n")
    await writer.drain()
    writer.close()
    if len(target) > 1 and "state=" in target[1] and not answered.done():
        answered.set_result(target[1])


def _read_line(answered: asyncio.Future[str]) -> None:
    """A pasted address counts as the redirect. On a daemon thread: reading a terminal cannot be cancelled."""
    loop = asyncio.get_running_loop()

    def settle(line: str) -> None:
        if not answered.done() and "state=" in line:
            answered.set_result(line.strip())

    def read() -> None:
        for line in sys.stdin:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, line)

    threading.Thread(target=read, name="vai-login", daemon=True).start()


if __name__ == "__main__":  # through the module, so that script and module are not two different things
    importlib.import_module(f"{__package__}.vai" if __package__ else "vai").main()
