"""Any model behind one message API, in process or through a gateway.

    from vai import Client

    client = Client()  # keys from the environment; Client(base_url=…, api_key=…) talks to a gateway
    message = client.messages.create(model="anthropic/claude-sonnet-5-5", messages="What is the capital of France?")
    print(message.text, message.usage.total_tokens)

Needs providers.py beside it, pydantic and aiohttp; for speech voice.py, which is loaded when it is first asked for.
Whatever providers.py makes public is importable from here.

Contents (`grep -n '^# == '` lists the sections):
    tools · native tools · content helpers · what a caller may pass · engines (direct, remote) · the asynchronous
    client · speech · live voice · the tool loop · structured answers · conversations · the synchronous client ·
    a model for tests · the command line
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import contextvars
import copy
import difflib
import functools
import importlib
import inspect
import io
import json
import mimetypes
import operator
import os
import queue
import random
import re
import secrets
import sys
import threading
import time
import types
import urllib.parse
import warnings
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Concatenate,
    Generic,
    Literal,
    NoReturn,
    NotRequired,
    ParamSpec,
    Protocol,
    Required,
    Self,
    TypeAlias,
    TypedDict,
    TypeVar,
    Union,
    Unpack,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic_core import to_jsonable_python

if TYPE_CHECKING or not __package__:
    import providers
    from providers import *
else:
    from . import providers
    from .providers import *

if TYPE_CHECKING:
    import live
    import voice
else:

    class _Later:
        """A module that is loaded when something of it is first asked for: without speech it is not needed."""

        def __init__(self, load: Callable[[], Any]) -> None:
            self._load = load

        def __getattr__(self, name: str) -> Any:
            return getattr(self._load(), name)

    def _voice() -> Any:
        if __package__:
            from . import voice as module
        else:
            import voice as module
        return module

    def _live() -> Any:
        if __package__:
            from . import live as module
        else:
            import live as module
        return module

    voice, live = _Later(_voice), _Later(_live)

__version__ = "0.1.0"
if getattr(providers, "__version__", None) != __version__:
    found = getattr(providers, "__version__", "unknown")
    raise ImportError(f"vai {__version__} needs its own providers.py; version {found} is at {providers.__file__}")

__all__ = [
    *providers.__all__,
    "AsyncClient",
    "AsyncConversation",
    "AsyncLive",
    "AsyncMessageStream",
    "AsyncRun",
    "AsyncSpeechStream",
    "Client",
    "Conversation",
    "Direct",
    "EventStream",
    "Extracted",
    "FakeModel",
    "Interrupted",
    "Live",
    "LiveFields",
    "MessageStream",
    "Messages",
    "Models",
    "Native",
    "ProviderInfo",
    "Remote",
    "RequestFields",
    "Run",
    "RunComplete",
    "RunEvent",
    "RunFields",
    "RunOptions",
    "RunResult",
    "SpeechStream",
    "Step",
    "StepComplete",
    "StepStart",
    "Tool",
    "ToolCall",
    "ToolCallStart",
    "ToolLike",
    "ToolResult",
    "Turn",
    "TurnFields",
    "attachment",
    "audio",
    "code_execution",
    "computer_use",
    "document",
    "file_search",
    "image",
    "image_generation",
    "image_url",
    "text",
    "text_editor",
    "tool",
    "tool_result",
    "tool_use",
    "video",
    "web_search",
]

T = TypeVar("T")


# == Tools ============================================================================================================


P = ParamSpec("P")
Q = ParamSpec("Q")
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
        timeout: float | None = None,
        side_effects: bool = False,
    ) -> None:
        if timeout is not None and not isinstance(timeout, (int, float)):
            raise TypeError(f"timeout is a number of seconds; not {timeout!r}")
        named: Any = function
        while isinstance(named, functools.partial):
            named = named.func
        if not callable(named) or not (name or hasattr(named, "__name__")):
            lacks = "has no name of its own: tool(…, name=…)" if callable(named) else "is no function"
            raise TypeError(f"{type(named).__name__} {lacks}")
        described = named if hasattr(named, "__name__") else named.__call__
        functools.update_wrapper(self, described, updated=())
        summary, about = read_docstring(inspect.getdoc(described) or "")
        self.function = function
        self.name: str = name or named.__name__
        self.description = summary if description is None else description
        self.strict = strict
        self.timeout = timeout
        self.side_effects = side_effects
        self._input = _input_model(function, described, self.name, about)
        self.input_schema: JSON = _lean(self._input.model_json_schema())

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        return self.function(*args, **kwargs)

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(
        self: Tool[Concatenate[Any, Q], R_co], instance: object, owner: type | None = None
    ) -> Tool[Q, R_co]: ...
    def __get__(self, instance: object, owner: type | None = None) -> Tool[..., R_co]:
        """Of a method: the tool of the object, whose `self` is no input of the model's."""
        if instance is None:
            return self
        bound: Callable[..., R_co] = self.function.__get__(instance, owner)
        options: Any = {"name": self.name, "description": self.description, "strict": self.strict}
        return Tool(bound, timeout=self.timeout, side_effects=self.side_effects, **options)

    def __repr__(self) -> str:
        return f"tool({self.name})"

    def to_wire(self) -> JSON:
        """The tool as a request has it."""
        wire: JSON = {"name": self.name, "input_schema": self.input_schema}
        wire |= {"description": self.description} if self.description else {}
        return wire | ({"strict": self.strict} if self.strict is not None else {})

    def run(self, input: JSON) -> R_co:
        """Call the function with a tool call's input. Raises `ValueError` as `bind` does."""
        call: Callable[..., R_co] = self.function
        return call(**self.bind(input))

    def bind(self, input: JSON) -> dict[str, Any]:
        """The arguments that a tool call's input stands for, checked and converted to what the annotations say.

        Raises `ValueError`, whose text helps a model to mend its call, for input that does not fit.
        """
        if input.get("invalid_json"):
            raise ValueError("The input is not a whole JSON object. Call the tool again with valid JSON.")
        try:
            checked = self._input.model_validate(input)
        except ValidationError as fault:
            raise ValueError(_told(fault, "The input does not fit the tool's schema:")) from None
        return {name.removeprefix(_FIELD): getattr(checked, name) for name in checked.model_fields_set}


@overload
def tool(
    function: Callable[P, R_co],
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    strict: bool | None = None,
    timeout: float | None = None,
    side_effects: bool = False,
) -> Tool[P, R_co]: ...
@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    strict: bool | None = None,
    timeout: float | None = None,
    side_effects: bool = False,
) -> Callable[[Callable[P, R_co]], Tool[P, R_co]]: ...
def tool(function: Any = None, /, **options: Any) -> Any:
    """Make a tool of a function: its name, docstring and annotations become name, description and schema.

    Parameter descriptions come from `Annotated[str, "…"]` or from the docstring (Google, NumPy or Sphinx style).
    `strict` asks the provider to hold the model to the schema; `timeout` (seconds) stands over a run's `tool_timeout`.
    `side_effects`: in live voice it is not called before it is sure that the user's turn is over.
    What a `functools.partial` gives by name is no input of the model's.
    Raises `TypeError` for `*args` and `**kwargs`, for a generator, and for an object that has no name.
    """
    return Tool(function, **options) if function is not None else lambda function: Tool(function, **options)


_FIELD = "arg_"  # before the names of fields: a parameter may be called as what pydantic's models have themselves


def _input_model(
    function: Callable[..., Any], described: Callable[..., Any], name: str, about: Mapping[str, str]
) -> type[BaseModel]:
    """A pydantic model of a function's parameters, whose annotations are those of `described`."""
    if inspect.isgeneratorfunction(described) or inspect.isasyncgenfunction(described):
        raise TypeError(f"{name}() is a generator; a tool returns its result whole")
    noted = {key: hint for key, hint in getattr(described, "__annotations__", {}).items() if key != "return"}
    hints = get_type_hints(types.SimpleNamespace(__annotations__=noted, __wrapped__=described), include_extras=True)
    fields: dict[str, Any] = {}
    parameters = list(inspect.signature(function).parameters.values())
    if parameters and parameters[0].name == "self" and "self" not in hints:  # of a method, before it is bound
        del parameters[0]
    given = function.keywords if isinstance(function, functools.partial) else {}
    for parameter in parameters:
        if parameter.name in given:
            continue
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"a tool takes named parameters only; {name}() has {parameter}")
        hint = _portable(hints.get(parameter.name, Any))
        notes = [getattr(note, "description", note) for note in getattr(hint, "__metadata__", ())]
        notes.append(about.get(parameter.name))
        fields[_FIELD + parameter.name] = (
            hint,
            Field(
                ... if parameter.default is parameter.empty else parameter.default,
                alias=parameter.name,
                description=next((note for note in notes if isinstance(note, str)), None),
            ),
        )
    return create_model(f"{name}_input", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)


def _portable(hint: Any, made: dict[Any, Any] | None = None) -> Any:
    """The type with each `typing.TypedDict` in it as one that pydantic takes; it refuses them before Python 3.12."""
    if sys.version_info >= (3, 12):
        return hint
    made = {} if made is None else made
    if type(hint).__name__ == "_TypedDictMeta" and type(hint).__module__ == "typing":
        if hint not in made:
            from typing_extensions import TypedDict as Portable  # which pydantic brings

            made[hint] = Portable(hint.__name__, {})  # type: ignore[operator]  # before its fields: one may be of it
            fields: dict[str, Any] = {}
            for name, item in get_type_hints(hint, include_extras=True).items():
                kind: Any = get_origin(item)
                if kind in (Required, NotRequired):
                    item = get_args(item)[0]
                else:
                    kind = Required if name in hint.__required_keys__ else NotRequired
                fields[name] = kind[_portable(item, made)]
            made[hint].__annotations__ = fields
        return made[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is None or origin is Literal or not args:
        return hint
    inner = tuple(_portable(arg, made) for arg in args)
    if inner == args:
        return hint
    if origin in (Union, types.UnionType):
        return functools.reduce(operator.or_, inner)
    return Annotated[(inner[0], *hint.__metadata__)] if origin is Annotated else origin[inner]


def _lean(schema: Any) -> Any:
    """A schema of pydantic's without the titles it makes up, which only cost tokens, with `anyOf` for `oneOf`, the one
    kind of union that every provider knows, and with nothing beside a `$ref`, as strict modes ask."""
    if isinstance(schema, list):
        return [_lean(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out: JSON = {}
    for key, value in schema.items():
        if key in ("properties", "$defs"):
            out[key] = {name: _lean(item) for name, item in value.items()}
        elif key in ("default", "examples", "enum", "const"):  # no schemas
            out[key] = value
        elif key not in ("title", "discriminator"):
            out["anyOf" if key == "oneOf" else key] = _lean(value)
    return {"anyOf": [{"$ref": out.pop("$ref")}], **out} if "$ref" in out and len(out) > 1 else out


def _told(fault: ValidationError, what: str) -> str:
    """What is wrong, in words that help a model to mend it."""
    wrong = fault.errors(include_url=False, include_context=False, include_input=False)
    return "\n".join([what, *(f"- {'.'.join(map(str, e['loc'])) or 'all of it'}: {e['msg']}" for e in wrong[:10])])


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


# == Native tools ======================================================================================================
# Tools of the provider's own, by neutral name. Most are run by the provider; `computer_use` and `text_editor` are run
# here, by a function of yours.


class Native:
    """A provider's own tool, as `web_search()` and its like make it; `config` is in the request."""

    def __init__(self, kind: str, config: Mapping[str, Any], act: Callable[[str, JSON], Any] | None = None) -> None:
        self.kind = kind
        self.config = {name: value for name, value in config.items() if value is not None}
        self.act = act

    def __repr__(self) -> str:
        return f"{self.kind}({', '.join(f'{name}={value!r}' for name, value in self.config.items())})"

    def to_wire(self) -> JSON:
        """The tool as a request has it."""
        return {"type": self.kind} | ({"config": self.config} if self.config else {})


def web_search(
    *,
    max_uses: int | None = None,
    allowed_domains: Sequence[str] | None = None,
    blocked_domains: Sequence[str] | None = None,
    user_location: Mapping[str, Any] | None = None,
    **config: Any,
) -> Native:
    """Search the web. What a provider has no setting for is reported in `dropped`."""
    known = {"max_uses": max_uses, "user_location": user_location}
    domains = {"allowed_domains": allowed_domains, "blocked_domains": blocked_domains}
    return Native("web_search", known | domains | config)


def code_execution(**config: Any) -> Native:
    """Run code in the provider's sandbox; `container` and `file_ids` on oai-resp."""
    return Native("code_execution", config)


def file_search(vector_store_ids: Sequence[str] | None = None, **config: Any) -> Native:
    """Search files that the provider holds: those of `vector_store_ids`, on Gemini of `fileSearchStoreNames`."""
    return Native("file_search", {"vector_store_ids": vector_store_ids, **config})


def computer_use(act: Callable[[str, JSON], Any] | None = None, **config: Any) -> Native:
    """Drive a screen. `act(name, input)` does what the model asks for and returns a screenshot, `vai.image(…)`."""
    return Native("computer_use", config, act)


def text_editor(act: Callable[[str, JSON], Any] | None = None, **config: Any) -> Native:
    """Edit files. `act(name, input)` does a command (`view`, `str_replace`, `create`, `insert`), returns its output."""
    return Native("text_editor", config, act)


def image_generation(**config: Any) -> Native:
    """Draw pictures: `size`, `quality`, `background`, `output_format` …"""
    return Native("image_generation", config)


_ACTING = {  # what a model may call of them, beside the members of Anthropic's set `computer`; the last are Gemini's
    "str_replace_based_edit_tool": "text_editor",
    "text_editor": "text_editor",
    "computer": "computer_use",
    **dict.fromkeys(
        (
            *("open_web_browser", "wait_5_seconds", "go_back", "go_forward", "search", "navigate", "click_at"),
            *("hover_at", "type_text_at", "key_combination", "scroll_document", "scroll_at", "drag_and_drop"),
        ),
        "computer_use",
    ),
}


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


def tool_use(name: str, /, **input: Any) -> JSON:
    """A tool call, as a model makes it: for the script of a `FakeModel`, or for a history made by hand."""
    return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": name, "input": input}


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


def attachment(source: Source) -> JSON:
    """The block for a file, bytes or a URL, by what it is. Raises `ValueError` for a kind that no model takes."""
    url = isinstance(source, str) and re.match(r"https?://", source)
    name = "" if isinstance(source, bytes) else urllib.parse.urlsplit(str(source)).path if url else os.fspath(source)
    kind = mimetypes.guess_type(name)[0] or ""
    if not url:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        if not data:
            raise ValueError(f"{name or 'this'} is empty")
        kind = kind or _sniff(data) or ""
    makers = {"image": image, "audio": audio, "video": video}
    maker = makers.get(kind.partition("/")[0])
    if maker and (url or kind != "image/svg+xml"):  # to a model that is text
        return maker(source)
    made = document(source)
    if kind == "application/pdf" or made["source"]["type"] != "base64":
        return made
    try:
        plain = base64.b64decode(made["source"]["data"]).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{name or 'this'} is neither an image, audio, video, a PDF nor text") from None
    return {**made, "source": {"type": "text", "media_type": "text/plain", "data": plain}}


RESULT_BLOCKS: dict[str, type[BaseModel]] = {  # of what a tool result may consist
    "text": providers.TextBlock,
    "image": providers.ImageBlock,
    "document": providers.DocumentBlock,
    "search_result": providers.SearchResultBlock,
}


def tool_result(tool_use_id: str, content: object = "", *, is_error: bool = False) -> JSON:
    """The answer to a `tool_use`: text, blocks, or anything else (numbers, dicts, pydantic models, the bytes of an
    image …), which goes as JSON or as an image."""
    block = {"type": "tool_result", "tool_use_id": tool_use_id, "content": _result_content(content)}
    return block | ({"is_error": True} if is_error else {})


def _result_content(value: Any) -> str | list[JSON]:
    if isinstance(value, str):
        return value
    if isinstance(value, (Message, RunResult)):  # of a model that was asked inside the tool
        return value.text
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    blocks = [_result_block(item) for item in items]
    if None in blocks or all(isinstance(item, str) for item in items):
        return json.dumps(to_jsonable_python(value, fallback=str, bytes_mode="base64"), ensure_ascii=False)
    return [block for block in blocks if block and block.get("text") != ""] or ""  # empty text is refused


def _result_block(item: Any) -> JSON | None:
    """An item as a block of a tool result; None for data that at most looks like one, which would break the history."""
    if isinstance(item, bytes):
        return image(item) if (_sniff(item) or "").startswith("image/") else None
    if isinstance(item, str):
        return text(item)
    block = _plain(item) if isinstance(item, (Mapping, BaseModel)) else None
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(block, dict) or not isinstance(kind, str) or kind not in RESULT_BLOCKS:
        return None
    fields = RESULT_BLOCKS[kind].model_fields.keys()
    try:
        source = getattr(RESULT_BLOCKS[kind].model_validate(block), "source", None)
    except ValidationError:
        return None
    broken = isinstance(source, providers.Base64Source) and not providers.is_base64(source.data)
    if broken or block.keys() - fields - {"citations", "transformations"}:
        return None
    return {key: value for key, value in block.items() if kind != "text" or key != "citations"}


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
ToolLike: TypeAlias = Mapping[str, Any] | Tool[..., Any] | Native


class RequestFields(TypedDict, total=False):
    """The fields of a request beside `model` and `messages`: Anthropic's, and a few of vai's own."""

    max_tokens: int
    system: str | Sequence[Block]
    stop_sequences: Sequence[str]
    metadata: Mapping[str, Any]
    thinking: Mapping[str, Any]
    output_config: Mapping[str, Any]
    tools: Sequence[ToolLike]
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


@dataclass(frozen=True, slots=True)
class _Call:
    """A request as it is made: its body, and what travels beside it."""

    body: JSON = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    keys: Mapping[str, str] = field(repr=False)


def _call(model: str, messages: Messages, fields: Mapping[str, Any]) -> _Call:
    if unknown := fields.keys() - RequestFields.__annotations__.keys():
        name = min(unknown)
        if name == "stream":
            raise TypeError("there is no stream=; use messages.stream(…)")
        near = difflib.get_close_matches(name, RunFields.__annotations__, 1)
        hint = f"did you mean {near[0]}?" if near else "a provider's own fields go into extra_body"
        if name in RunOptions.__annotations__:
            hint = "a whole request's is the Client's" if name == "timeout" else "run() and run_stream() take it"
        raise TypeError(f"unknown argument {name!r}; {hint}")
    beside = ("extra_headers", "extra_body", "provider_keys")
    rest = {name: value for name, value in fields.items() if name not in beside}
    if rest.get("tools") is not None:
        rest["tools"] = _tool_list(rest["tools"])
    body = request_body(model, messages, rest | dict(fields.get("extra_body") or {}))
    return _Call(body, fields.get("extra_headers") or {}, fields.get("provider_keys") or {})


def _tool_list(tools: Any) -> list[ToolLike]:
    """The tools of a request. Raises `TypeError` for what is none."""
    if tools is None:
        return []
    if isinstance(tools, (str, Mapping, BaseModel, Tool, Native)) or not isinstance(tools, Iterable):
        raise TypeError(f"tools is a list of tools; not of the type {type(tools).__name__}")
    given = list(tools)
    for tool in given:
        if not isinstance(tool, (Mapping, BaseModel, Tool, Native)):
            name = getattr(tool, "__name__", type(tool).__name__)
            raise TypeError(f"{name} is no tool" + ("; decorate it with @tool" if callable(tool) else ""))
    return given


def request_body(model: str, messages: Messages, fields: Mapping[str, Any]) -> JSON:
    """The JSON body of a request, with answers of earlier turns and pydantic objects made plain."""
    if isinstance(messages, (Mapping, BaseModel)) or not isinstance(messages, Iterable):
        raise TypeError(f"messages is a text or a list of turns; not of the type {type(messages).__name__}")
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else [_turn(turn) for turn in messages]
    rest = {key: _plain(value) for key, value in fields.items() if value is not None}
    return {"model": model, "messages": turns} | rest


def _turn(turn: Turn) -> Any:
    """A message of the history. Speech stays out of it where the text that was spoken stands beside it."""
    if isinstance(turn, Message):
        kept = [block for block in turn.content if block.type != "audio" or not turn.text]
        return {"role": "assistant", "content": [block.to_wire() for block in kept]}
    return _plain(turn)


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, (Tool, Native)):
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

    # Speech: `body` is that of `POST /v1/audio`, whose `audio` may be bytes.
    def parse_audio(self, body: JSON) -> Any: ...
    async def transcribe(self, request: Any, keys: Mapping[str, str] | None = None) -> voice.Transcription: ...
    async def synthesize(self, request: Any, keys: Mapping[str, str] | None = None) -> voice.Speech: ...
    async def open_speech(self, request: Any, keys: Mapping[str, str] | None = None) -> Audible: ...

    # Live voice: `config` is that of `session.configure`; of the tools, those that are functions.
    async def open_live(self, config: JSON, tools: Sequence[Tool[..., Any]] = ()) -> AsyncLive: ...


class AsyncLive(Protocol):
    """A live conversation, in process or through a gateway. `closed` says why it ended. See `live.LiveSession`."""

    closed: str | None

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc: object) -> None: ...
    def __aiter__(self) -> Self: ...
    async def __anext__(self) -> live.LiveEvent | live.LiveAudio: ...
    async def send(self, message: bytes | JSON) -> None: ...
    def close(self, reason: str = "client") -> None: ...


class Audible(Protocol):
    """Speech as it comes: iterate for what has the bytes in `data`. `duration` is in seconds of what came so far."""

    def __aiter__(self) -> AsyncIterator[Any]: ...
    async def __anext__(self) -> Any: ...
    @property
    def duration(self) -> float: ...
    def close(self) -> None: ...


class ProviderInfo(BaseModel):
    """A provider, as `GET /v1/models` lists it."""

    id: str
    name: str
    available: bool
    capabilities: dict[str, bool]
    native_tools: list[str]
    auth: dict[str, str]


class Models(BaseModel):
    """What can be asked: providers with their capabilities, and aliases. There is no catalogue of models.

    An alias stands for a model, or for several that are tried one after the other.
    """

    providers: list[ProviderInfo]
    aliases: dict[str, str | list[str]] = {}
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
            now = time.monotonic()
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
        return next((event.message.model for event in self._ready if isinstance(event, MessageStart)), "")

    @property
    def usage(self) -> Usage | None:
        """What it cost, once the answer is whole."""
        return self._decoder.build.usage


class SpokenStream(EventStream):
    """An answer that is spoken while it comes in: its text as it comes, and audio as soon as there is some.

    What ends the message waits for the end of the speech, nothing else does.
    """

    def __init__(self, answer: EventStream, speaker: voice.Speaker) -> None:
        self.dropped = answer.dropped
        self.request_id = answer.request_id
        self._answer = answer
        self._speaker = speaker
        self._reading: asyncio.Task[list[StreamEvent]] | None = None
        self._hearing: asyncio.Task[AudioDelta | AudioError | None] | None = None
        self._blocks = 0
        self._last: list[StreamEvent] = []  # what ends the message, as far as it has come
        self._written = False  # all of the answer has come
        self._silent = False  # all of it was spoken
        self._over = False

    async def __anext__(self) -> list[StreamEvent]:
        while not (self._written and self._silent):
            if events := await self._next():
                return events
        if self._over:
            raise StopAsyncIteration
        self._over = True
        return [*self._spoken_block(), *self._last]

    async def _next(self) -> list[StreamEvent]:
        """What comes first: more of the answer, or the next piece of its speech."""
        if not self._written and self._reading is None:
            self._reading = self._awaited(anext(self._answer))
        if not self._silent and self._hearing is None:
            self._hearing = self._awaited(self._speaker.next())
        await asyncio.wait(
            [task for task in (self._reading, self._hearing) if task], return_when=asyncio.FIRST_COMPLETED
        )
        events: list[StreamEvent] = []
        if self._reading and self._reading.done():
            read, self._reading = self._reading, None
            events += self._read_out(read.result())
        if self._hearing and self._hearing.done():
            heard, self._hearing = self._hearing, None
            piece = heard.result()
            self._silent = piece is None
            events += [piece] if piece else []
        return events

    @staticmethod
    def _awaited(work: Awaitable[T]) -> asyncio.Task[T]:
        async def wait() -> T:
            return await work

        task = asyncio.create_task(wait())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be there to see it
        return task

    def _read_out(self, events: Iterable[StreamEvent]) -> list[StreamEvent]:
        """Hands text on to be spoken. Thinking and tool calls are never spoken; they end a sentence."""
        passed: list[StreamEvent] = []
        for event in events:
            match event:
                case MessageDelta() | MessageStop():
                    if not self._last:
                        self._speaker.end()
                    self._last.append(event)
                    self._written = isinstance(event, MessageStop)
                    continue
                case ContentBlockDelta(delta=TextDelta(piece)):
                    self._speaker.feed(piece)
                case ContentBlockStart(content_block=block):
                    self._blocks += 1
                    if not isinstance(block, Text):
                        self._speaker.pause()
                    elif block.text:
                        self._speaker.feed(block.text)
            passed.append(event)
        return passed

    def _spoken_block(self) -> list[StreamEvent]:
        block = self._speaker.block
        return [ContentBlockStart(self._blocks, block), ContentBlockStop(self._blocks)] if block else []

    async def finish(self) -> None:
        await self._answer.finish()

    def close(self) -> None:
        for task in (self._reading, self._hearing):
            if task:
                task.cancel()
        self._speaker.stop()
        self._answer.close()

    @property
    def model(self) -> str:
        return self._answer.model

    @property
    def usage(self) -> Usage | None:
        return self._answer.usage


def _cut(fault: Error, code: str) -> Error:
    """What a broken-off stream looks like where it is read, as what it is."""
    return StreamTruncated(provider=fault.provider) if fault.code == code else fault


class _begun:
    """An answer is coming in: whatever goes wrong from here is not to be asked, and paid for, again."""

    def __init__(self, provider: str) -> None:
        self._provider = provider

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, raised: BaseException | None, traceback: object) -> None:
        fault = providers.unreadable(self._provider) if isinstance(raised, ValueError) else raised
        if isinstance(fault, Error):
            fault.begun = True
            if fault is not raised:
                raise fault from None


# Asked short questions in live voice, where no other model is named: the first of them that there is a key for.
FAST_MODELS = {
    "groq": "llama-3.3-70b-versatile",
    "cerebras": "llama-3.3-70b",
    "gemini": "gemini-2.5-flash-lite",
    "openai": "gpt-4.1-nano",
    "anthropic": "claude-haiku-4-5",
}
CHECK_TOKENS = 16  # of their answers


class Direct:
    """Asks the providers themselves.

    `provider_keys` by provider id (or its BYOK name); what is missing comes from `environ`, as do base URLs.
    An alias of several models is a fallback order: the next is asked where one could not answer (`Error.passes_on`).
    `own_keys` says that a refused key is the caller's to mend: true for a script, false for a gateway's own keys.
    `keyless` has no keys at all but those that come with a request.
    """

    def __init__(
        self,
        *,
        provider_keys: Mapping[str, str] | None = None,
        base_urls: Mapping[str, str] | None = None,
        aliases: Aliases | None = None,
        environ: Mapping[str, str] | None = None,
        timeouts: Timeouts | None = None,
        max_tokens: int = 4096,
        own_keys: bool = True,
        keyless: bool = False,
    ) -> None:
        environ = os.environ if environ is None else environ
        given = byok(provider_keys or {})

        def configured(adapter: Adapter | voice.SpeechAdapter) -> tuple[Secret | None, str]:
            """The key, if there is one, and the base URL."""
            found = [given.get(name) for name in adapter.byok] + [environ.get(name) for name in adapter.key_env]
            key = next((key.strip() for key in found if key and key.strip() and not keyless), None)
            checked = _checked_key(key, f"the key for {adapter.id}") if key else None
            return checked, _base_url(adapter, base_urls or {}, environ)

        self._configured = configured
        self.aliases = dict(aliases or {})
        for name, models in self.aliases.items():
            providers.alias_models(name, models)
        self.max_tokens = max_tokens
        self.own_keys = own_keys
        self.keys: dict[str, Secret] = {}
        self.base_urls: dict[str, str] = {}
        for adapter in PROVIDERS.values():
            key, self.base_urls[adapter.id] = configured(adapter)
            if key:
                self.keys[adapter.id] = key
        self.login = GoogleLogin.from_environ(environ)
        self.login.own = own_keys
        self._logs_in = self.login.configured and not keyless
        self.transport = Transport(timeouts)
        self._detectors: tuple[asyncio.AbstractEventLoop, live.Detectors] | None = None
        self._talking: weakref.WeakKeyDictionary[live.LiveSession, asyncio.AbstractEventLoop]
        self._talking = weakref.WeakKeyDictionary()

    def parse(self, body: JSON, headers: Mapping[str, str] | None = None) -> MessageRequest:
        """The request, checked. `headers` may hold `anthropic-version` and `anthropic-beta`."""
        low = {name.lower(): value for name, value in (headers or {}).items()}
        kept = {name: low[name] for name in FORWARDED_HEADERS if low.get(name)}
        for name, value in kept.items():
            if len(value) > 1024 or not re.fullmatch(r"[\x20-\x7e]*", value):
                raise InvalidRequestError(f"the header {name} is not a plain list of names", param=name)
        request = providers.parse_request(body, headers=kept, aliases=self.aliases)
        if request.voice:
            self.read_voice(request)
        return request

    async def create(self, request: MessageRequest, keys: Mapping[str, str] | None = None) -> Message:
        if not request.voice:
            return await self._first_of(request, keys or {}, self._create)
        speaker, heard = await self._voiced(request, keys)
        try:
            message = await self._first_of(request, keys or {}, self._create)
            return await _spoken(message, speaker, heard)
        finally:
            if speaker:
                speaker.stop()

    async def answer(self, request: MessageRequest, keys: Mapping[str, str] | None = None) -> tuple[JSON, list[str]]:
        """What `create` says, as it goes over the wire, and what was dropped from the request."""
        if request.voice:
            message = await self.create(request, keys)
            return message.to_wire(), message.dropped
        return await self._first_of(request, keys or {}, self._answer)

    async def open(self, request: MessageRequest, keys: Mapping[str, str] | None = None) -> EventStream:
        if not request.voice:
            return await self._first_of(request, keys or {}, self._open)
        speaker, heard = await self._voiced(request, keys)
        stream = await self._first_of(request, keys or {}, self._open)
        if heard:
            stream._ready.insert(0, TranscriptDelta(heard))
        return SpokenStream(stream, speaker) if speaker else stream

    async def _first_of(
        self,
        request: MessageRequest,
        keys: Mapping[str, str],
        ask: Callable[[MessageRequest, Mapping[str, str], float], Awaitable[T]],
    ) -> T:
        """Ask the model, or those of its alias one after the other until one answers; all within one `total`.

        When none does, the error is the first one's that was asked.
        """
        deadline = time.monotonic() + self.transport.timeouts.total
        failed: list[Error] = []
        for route in (request, *request.fallbacks):
            attempt = providers.Attempt(route.provider, route.model_name)
            request.attempts.append(attempt)
            try:
                return await ask(route, keys, deadline)
            except Error as fault:
                attempt.fault = fault
                failed.append(fault)
                if not request.fallbacks or not fault.passes_on:
                    raise
        sent = (fault for fault in failed if fault.code not in providers.UNSENT_CODES)
        raise next(sent, failed[0]) from None

    async def _create(self, request: MessageRequest, keys: Mapping[str, str], deadline: float) -> Message:
        message = await self._whole(request, keys, deadline, PROVIDERS[request.provider].decode)
        message._dropped = list(request.dropped)
        return message

    async def _answer(
        self, request: MessageRequest, keys: Mapping[str, str], deadline: float
    ) -> tuple[JSON, list[str]]:
        return await self._whole(request, keys, deadline, PROVIDERS[request.provider].answer), request.dropped

    async def _whole(
        self,
        request: MessageRequest,
        keys: Mapping[str, str],
        deadline: float,
        decode: Callable[[Any, MessageRequest], T],
    ) -> T:
        adapter = PROVIDERS[request.provider]
        upstream, credential = await self._send(adapter, request, keys, deadline)
        raw = b""
        try:
            with _begun(adapter.id):
                async with upstream:
                    raw = await upstream.read()
                return decode(providers.loads(raw.decode("utf-8", "replace").removeprefix("\ufeff")), request)
        except Error as fault:
            raise providers.for_caller(fault, credential) from None
        finally:
            del raw  # a traceback's locals would show what the provider echoed

    async def _open(self, request: MessageRequest, keys: Mapping[str, str], deadline: float) -> EventStream:
        adapter = PROVIDERS[request.provider]
        upstream, credential = await self._send(adapter, request, keys, deadline)
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
                auth={"header": byok_header(adapter.id)},
            )
            for adapter in PROVIDERS.values()
        ]
        aliases = {name: given if isinstance(given, str) else list(given) for name, given in self.aliases.items()}
        return Models(providers=listed, aliases=aliases, voice=_speech_models())

    def available(self, provider: str) -> bool:
        """Whether there is a key for the provider."""
        return provider in self.keys or (provider == "gemini-oauth" and self._logs_in)

    async def close(self) -> None:
        loop = asyncio.get_running_loop()
        for session in [session for session, its in list(self._talking.items()) if its is loop]:
            session.close()
        if self._detectors is not None and self._detectors[0] is loop:
            await self._detectors[1].close()
        if "speech" in self.__dict__:
            await self.speech.close()
        await self.transport.close()

    # -- speech --

    @functools.cached_property
    def speech(self) -> voice.Services:
        """The speech services. Raises `ModuleNotFoundError` without voice.py."""
        return voice.Services(self._configured, self.transport.timeouts, own_keys=self.own_keys)

    def read_voice(self, request: MessageRequest) -> voice.Voice:
        """The request's `voice`. Raises `InvalidRequestError` that names the setting."""
        return voice.read_settings(voice.Voice, request.voice, "voice")

    async def _voiced(
        self, request: MessageRequest, keys: Mapping[str, str] | None
    ) -> tuple[voice.Speaker | None, str | None]:
        """What will speak the answer, and what the user was heard to say, which stands in the request from here on."""
        settings, brought = self.read_voice(request), (byok(keys or {}), byok(request.provider_keys))
        spent = request.speech
        speaker = self.speech.speaker(settings.output, *brought, spent=spent) if settings.output else None
        heard = (
            await self.speech.hearing(settings.input, *brought, spent=spent).transcribe([request, *request.fallbacks])
            if settings.input
            else None
        )
        return speaker, heard

    def parse_audio(self, body: JSON) -> voice.TranscriptionRequest | voice.SynthesisRequest:
        return voice.read_audio_request(body)

    async def transcribe(
        self, request: voice.TranscriptionRequest, keys: Mapping[str, str] | None = None
    ) -> voice.Transcription:
        service = self.speech.service(request.provider, byok(keys or {}), byok(request.provider_keys))
        return await service.transcribe(request.recording, request, words=request.timestamps)

    async def synthesize(self, request: voice.SynthesisRequest, keys: Mapping[str, str] | None = None) -> voice.Speech:
        service = self.speech.service(request.provider, byok(keys or {}), byok(request.provider_keys))
        return await service.synthesize(request.text, request)

    async def open_speech(
        self, request: voice.SynthesisRequest, keys: Mapping[str, str] | None = None
    ) -> voice.SpeechStream:
        service = self.speech.service(request.provider, byok(keys or {}), byok(request.provider_keys))
        return await service.stream(request.text, request, words=False)

    # -- live voice --

    async def open_live(self, config: JSON, tools: Sequence[Tool[..., Any]] = ()) -> live.LiveSession:
        return self.live_session(live.read_config(config), detectors=await self._ready_detectors(), tools=tools)

    async def _ready_detectors(self) -> live.Detectors:
        """Those of this event loop: they have a process of their own, which is started once."""
        loop = asyncio.get_running_loop()
        if self._detectors is None or self._detectors[0] is not loop:
            self._detectors = loop, live.Detectors()
        detectors = self._detectors[1]
        await detectors.start()
        return detectors

    def live_session(
        self,
        config: live.LiveConfig,
        keys: Mapping[str, str] | None = None,
        *,
        detectors: live.Detectors,
        tools: Sequence[ToolLike] = (),
        may_check: Callable[[str], bool] = lambda model: True,
        timing: live.Timing | None = None,
        max_duration: float = 7200.0,
        session_id: str | None = None,
    ) -> live.LiveSession:
        """A live session. `tools` that are functions are called here, others by the client, asked by `tool_use`.

        `config.tools` is what the model is told of them. `may_check` says which provider/model may be asked short
        questions where the configuration names none. Raises `InvalidRequestError` for what is wrong with the
        configuration, `AuthenticationError` where there is no key for the speech service.
        """
        settings, brought = config.voice, (byok(keys or {}), byok(config.provider_keys))
        timing = timing or live.Timing()
        fields = {"model", "system", "max_tokens", "temperature", "thinking", "provider_keys"}
        asked: JSON = {**config.model_dump(include=fields, exclude_none=True), "stream": True}
        if config.tools:
            asked["tools"] = [{key: tool[key] for key in tool if key != "side_effects"} for tool in config.tools]
        check = self._fast_model(config, keys or {}, brought, may_check)
        self._check_live(asked, config)

        async def reply(messages: list[JSON], with_tools: bool) -> EventStream:
            more: JSON = {} if with_tools or not config.tools else {"tool_choice": {"type": "none"}}
            return await self.open(self.parse({**asked, "messages": messages, **more}), keys)

        hearing = self.speech.service(settings.input.provider, *brought)
        speaking = self.speech.service(settings.output.provider, *brought)
        turns = False if settings.input.turn_detection in ("vad", "manual") else None
        session = live.LiveSession(
            config,
            reply=reply,
            hear=functools.partial(
                hearing.listen, settings.input, sample_rate=live.RATE, turns=turns, patience=timing.patience
            ),
            speak=functools.partial(speaking.speak, patience=timing.patience),
            detect=detectors.open,
            check=check,
            tools={tool.name: functools.partial(_call_tool, tool) for tool in tools if isinstance(tool, Tool)},
            side_effects=[str(tool.get("name")) for tool in config.tools if tool.get("side_effects")],
            timing=timing,
            max_duration=max_duration,
            session_id=session_id,
        )
        self._talking[session] = asyncio.get_running_loop()
        return session

    def _check_live(self, asked: JSON, config: live.LiveConfig) -> None:
        """Raises `InvalidRequestError` for what no turn of the session could be asked with."""
        messages = [*config.messages, {"role": "user", "content": "Hello."}]
        place = "config"
        try:
            self.parse({**asked, "messages": messages})
            for place, model in (("vad", config.voice.vad.model), ("interrupt", config.voice.interrupt.model)):
                place = f"config.voice.{place}"
                if model != "auto" and model not in self.aliases:
                    providers.split_model(model, self.aliases)
        except InvalidRequestError as fault:
            param = f"{place}.{fault.param}" if fault.param else None
            raise InvalidRequestError(fault.message, param=param, code=fault.code) from None

    def _fast_model(
        self,
        config: live.LiveConfig,
        keys: Mapping[str, str],
        brought: Sequence[Mapping[str, Secret]],
        may_check: Callable[[str], bool],
    ) -> live.Check | None:
        """What asks a fast model; None where none is named, and there is no key for any that may be asked."""
        paid = (
            f"{name}/{model}"
            for name, model in FAST_MODELS.items()
            if self.available(name) or any(byok in given for given in brought for byok in PROVIDERS[name].byok)
        )
        fast = next(filter(may_check, paid), None)
        if fast is None and {config.voice.vad.model, config.voice.interrupt.model} == {"auto"}:
            return None

        async def check(model: str, instructions: str, question: str) -> str:
            name = fast if model == "auto" else model
            if name is None:
                raise InvalidRequestError("there is no fast model to ask")
            body: JSON = {"model": name, "system": instructions, "max_tokens": CHECK_TOKENS}
            body |= {"messages": [{"role": "user", "content": question}], "provider_keys": config.provider_keys}
            return (await self.create(self.parse(body), keys)).text

        return check

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
        self, adapter: Adapter, request: MessageRequest, keys: Mapping[str, str], deadline: float
    ) -> tuple[Upstream, Credential]:
        """The provider's 200, and whose key got it.

        A request is repeated once without an advisory field that was refused, and once with a fresh token.
        """
        refused: str | None = None
        mended = False
        repeats = request.attempts[-1].repeats
        for _ in range(3):
            credential = await self.credential(adapter, request, keys, refused)
            sent = adapter.encode(request, credential, self.base_urls[adapter.id], self.max_tokens)
            upstream = await self.transport.send(
                sent, adapter.id, deadline=deadline, again=lambda: repeats.append("connection")
            )
            if upstream.status == 200:
                return upstream, credential
            fault = await self._fault(upstream, adapter, credential)
            if upstream.status == 401 and credential.renewable and refused is None:
                refused = credential.key
                repeats.append("token")
            elif (name := adapter.refused_field(fault, request, sent)) and not mended:
                mended = True
                request.drop(name)
                repeats.append("field")
            else:
                raise fault
        raise fault

    async def _fault(self, upstream: Upstream, adapter: Adapter, credential: Credential) -> Error:
        async with upstream:
            body = await upstream.read_some()
        return providers.provider_error(
            adapter.id, upstream.status, upstream.headers, body, keys=[credential.key], own_key=credential.own
        )


async def _call_tool(tool: Tool[..., Any], input: JSON) -> tuple[str | list[JSON], bool]:
    """The content of its result, and whether it is an error. Whatever goes wrong is for the model to read."""
    try:
        async with asyncio.timeout(tool.timeout) as scope:
            return _result_content(await _invoke(tool.function, **tool.bind(input))), False
    except (Exception, SystemExit) as fault:
        late = isinstance(fault, TimeoutError) and scope.expired()
        return f"The tool took longer than {tool.timeout:g} seconds." if late else _tool_error(fault), True


async def _spoken(message: Message, speaker: voice.Speaker | None, heard: str | None) -> Message:
    """The message with what `voice` adds to it, as the events of a stream would."""
    total = Accumulator(message)
    if heard:
        message.metadata = {"user_transcript": heard}
    if speaker is None:
        return message
    for block in message.content:
        speaker.feed(block.text) if isinstance(block, Text) else speaker.pause()
    speaker.end()
    while event := await speaker.next():
        total.add(event)
    if speech := speaker.block:
        total.add(ContentBlockStart(len(message.content), speech))
    return message


def _speech_models() -> dict[str, list[str]]:
    """The models that hear and that speak, as `service/model`."""
    try:
        services = voice.SPEECH.values()
    except ModuleNotFoundError:  # a copy without speech
        return {}
    return {
        "stt": [f"{service.id}/{model}" for service in services for model in service.stt_models],
        "tts": [f"{service.id}/{model}" for service in services for model in service.tts_models],
    }


def _base_url(adapter: Adapter | voice.SpeechAdapter, given: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """Where the provider is. Raises `InvalidRequestError` that names the setting."""
    named = [
        (f"base_urls.{adapter.id}", given.get(adapter.id)),
        *((name, environ.get(name)) for name in adapter.url_env),
    ]
    return next((_http_url(name, url) for name, url in named if url and url.strip()), adapter.base_url)


def _http_url(name: str, url: str) -> str:
    if not re.fullmatch(HTTP_URL, url.strip()):
        raise InvalidRequestError(f"{name}: not an http(s) URL", param=name)
    return url.strip().rstrip("/")


KEY_FORM = r"[!#-&(-~]{1,8192}"  # without quotes: they stay on where an env file is no shell script
HTTP_URL = r"https?://[^\s/?#]+[^\s?#]*"  # of a base URL
_HEADER_NAMES = {"openai": "OpenAI", "oai-resp": "OAI-Resp", "gemini-oauth": "Gemini-OAuth"}
FORWARDED_HEADERS = ("anthropic-version", "anthropic-beta")
BYOK_NAMES = {name for adapter in PROVIDERS.values() for name in adapter.byok} | {"cartesia"}


def byok_header(provider: str) -> str:
    """The header in which a caller brings a key for this provider."""
    return f"X-Provider-Key-{_HEADER_NAMES.get(provider, provider.title())}"


def _key_name(name: str) -> str:
    return name.lower().replace("_", "-")


def byok(keys: Mapping[str, str]) -> dict[str, Secret]:
    """Keys that a caller brought, by BYOK name; empty ones are none. Raises `InvalidRequestError`, showing no value."""
    if not keys:
        return {}
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
    if not re.fullmatch(KEY_FORM, key):
        raise InvalidRequestError(f"{param}: not a key (printable ASCII without spaces or quotes)", param=param)
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

    def parse_audio(self, body: JSON) -> _GatewayRequest:
        audio = body.get("audio")
        if isinstance(audio, bytes):
            body = {**body, "audio": base64.b64encode(audio).decode("ascii")}
        return _GatewayRequest(body, {})

    async def transcribe(self, request: _GatewayRequest, keys: Mapping[str, str] | None = None) -> voice.Transcription:
        return await self._audio(request, keys, voice.Transcription.from_wire)

    async def synthesize(self, request: _GatewayRequest, keys: Mapping[str, str] | None = None) -> voice.Speech:
        return await self._audio(request, keys, voice.Speech.from_wire)

    async def _audio(self, request: _GatewayRequest, keys: Mapping[str, str] | None, read: Callable[[JSON], T]) -> T:
        upstream = await self._send("POST", "/v1/audio", request, keys)
        with _begun("gateway"):
            async with upstream:
                return read(await self._json(upstream))

    async def open_speech(self, request: _GatewayRequest, keys: Mapping[str, str] | None = None) -> GatewaySpeech:
        request.body = request.body | {"stream": True}
        return GatewaySpeech(await self._send("POST", "/v1/audio", request, keys))

    async def open_live(self, config: JSON, tools: Sequence[Tool[..., Any]] = ()) -> GatewayLive:
        url = self.base_url.replace("http", "ws", 1) + "/v1/messages/live"
        return GatewayLive(self._sockets, providers.HTTPRequest(url, self._headers, b"", "GET"), config, tools)

    @functools.cached_property
    def _sockets(self) -> voice.Sockets:
        return voice.Sockets(self.transport.timeouts)

    async def close(self) -> None:
        if "_sockets" in self.__dict__:
            await self._sockets.close()
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


class GatewaySpeech:
    """Speech off the wire: iterate for `voice.Audio`. Ends, or raises the `Error` that ended it."""

    def __init__(self, upstream: Upstream) -> None:
        self.duration = 0.0
        self._upstream = upstream
        self._sse = SSEDecoder(provider="gateway")
        self._ready: collections.deque[voice.Audio] = collections.deque()
        self._ended = False
        self._fault: Error | None = None

    def __aiter__(self) -> GatewaySpeech:
        return self

    async def __anext__(self) -> voice.Audio:
        while not self._ready:
            if self._fault:
                raise self._fault
            if self._ended:
                raise StopAsyncIteration
            try:
                with _begun("gateway"):
                    await self._read()
            except Error as fault:
                self._fault = fault  # after what came before it
        return self._ready.popleft()

    async def _read(self) -> None:
        data = await self._upstream.chunk()
        for sse in self._sse.feed(data) if data else self._sse.close():
            self._take(providers.loads(sse.data))
        if self._ended:
            await self._upstream.drain()
            self.close()
        elif not data:
            raise StreamTruncated("the gateway's answer ended before it was whole")

    def _take(self, event: JSON) -> None:
        with providers._readable("gateway"):
            if event["type"] == "error":
                raise error_from_wire(event)
            if event["type"] == "audio_chunk":
                self._ready.append(voice.Audio(base64.b64decode(event["data"])))
            elif event["type"] == "done":
                self.duration, self._ended = float(event["duration_seconds"]), True

    def close(self) -> None:
        self._upstream.abort()


class GatewayLive:
    """A live session of a gateway's: the same events, over a WebSocket. Functions are called here."""

    _FRAME = 1 << 16  # bytes of audio in one
    _HEARTBEAT = 20.0  # seconds between pings: a gateway that answers none is gone
    _ENDS = ("audio.done", "response.interrupted", "error")

    def __init__(
        self, sockets: voice.Sockets, request: providers.HTTPRequest, config: JSON, tools: Sequence[Tool[..., Any]]
    ) -> None:
        self.closed: str | None = None
        self._sockets, self._request, self._config = sockets, request, config
        self._tools = {tool.name: tool for tool in tools}
        self._socket: voice.Socket | None = None
        self._created: live.LiveEvent | None = None
        self._sample_rate = 24_000
        self._response_id = ""
        self._calls: dict[asyncio.Task[None], str] = {}
        self._closing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Raises what the gateway says to the connection or to the configuration."""
        self._socket = await self._sockets.connect(
            self._request, _gateway_adapter(), Credential(Secret("")), heartbeat=self._HEARTBEAT
        )
        try:
            await self._socket.send(providers.dumps({"type": "session.configure", "config": self._config}).decode())
            event = self._read(await self._socket.receive(self._sockets.timeouts.first_byte))
            if not isinstance(event, live.LiveEvent) or event.type == "error":
                raise error_from_wire(event.to_wire())
        except BaseException as fault:
            await self._socket.close()
            if isinstance(fault, TimeoutError):
                raise ProviderTimeoutError("the gateway did not answer in time", provider="gateway") from None
            raise
        self._created = event
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.closed = self.closed or "client"
        tasks = [*self._calls, *([self._closing] if self._closing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._socket is not None:
            await self._socket.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> live.LiveEvent | live.LiveAudio:
        if (created := self._created) is not None:
            self._created = None
            return created
        if self.closed is not None or self._socket is None:
            raise StopAsyncIteration
        try:
            event = self._read(await self._socket.receive_any())
        except Error:
            event = live.LiveEvent("session.closed", {"type": "session.closed", "reason": "connection_broken"})
        if isinstance(event, live.LiveEvent) and event.type == "session.closed":
            self.closed = event["reason"]
        return event

    async def send(self, message: bytes | JSON) -> None:
        if self.closed is not None or self._socket is None:
            return
        with contextlib.suppress(Error):  # iterating says that the connection is gone
            if isinstance(message, dict):
                await self._socket.send(providers.dumps(message).decode())
                return
            for at in range(0, len(message), self._FRAME):
                await self._socket.send(bytes(message[at : at + self._FRAME]))

    def close(self, reason: str = "client") -> None:
        """Ask the gateway to end it; `session.closed` comes as it does in process."""
        if self.closed is None and self._closing is None:
            self._closing = asyncio.create_task(self.send({"type": "session.close"}))

    def _read(self, frame: str | bytes) -> live.LiveEvent | live.LiveAudio:
        """Raises `ProviderError` for what a gateway does not say."""
        if isinstance(frame, bytes):
            return live.LiveAudio(self._response_id, frame, self._sample_rate)
        try:
            data = providers.loads(frame)
            if data["type"] == "audio_delta":
                pcm = base64.b64decode(data["delta"]["data"], validate=True)
                return live.LiveAudio(data["response_id"], pcm, data["delta"]["sample_rate"])
            self._note(data)
            return live.LiveEvent(data["type"] + "", data)
        except (ValueError, KeyError, TypeError):
            raise ProviderError("the gateway's message cannot be read", code="unreadable_answer") from None

    def _note(self, data: JSON) -> None:
        response_id = data.get("response_id")
        if data["type"] == "audio.start":
            self._response_id, self._sample_rate = data["response_id"], data["sample_rate"]
        elif data["type"] == "tool_use" and (tool := self._tools.get(data["name"])):
            call = asyncio.create_task(self._call(tool, data["id"], data["input"]))
            self._calls[call] = data["response_id"]
            call.add_done_callback(self._calls.pop)
        elif data["type"] == "grace_period.extended" or (data["type"] in self._ENDS and response_id):
            for call in [call for call, of in self._calls.items() if response_id in (None, of)]:
                call.cancel()

    async def _call(self, tool: Tool[..., Any], id: str, input: JSON) -> None:
        content, is_error = await _call_tool(tool, input)
        await self.send({"type": "tool_result", "tool_use_id": id, "content": content, "is_error": is_error})


@functools.cache
def _gateway_adapter() -> voice.SpeechAdapter:
    """The gateway, as what sockets are opened to."""

    class Gateway(voice.SpeechAdapter):
        def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, credential: Credential) -> Error:
            return error_from_wire(body, status)

    return Gateway("gateway", "gateway", "", (), (), (), (), ())


# == The asynchronous client ===========================================================================================


E = TypeVar("E")


class _Batches(Generic[E]):
    """What is iterated for events that come in batches, one for each read of a socket."""

    def __init__(self) -> None:
        self._events: collections.deque[E] = collections.deque()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> E:
        while (event := self._take()) is None:
            self._events.extend(await self._batch())
        return event

    def _take(self) -> E | None:
        return self._events.popleft() if self._events else None

    async def _batch(self) -> Sequence[E]:
        """The next events. Raises `StopAsyncIteration` at the end."""
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


class AsyncMessageStream(_Batches[StreamEvent]):
    """A streamed answer. Iterate it for events, or `text` for text alone; `final()` is the whole message.

    async with client.messages.stream(model=…, messages=…) as stream:
        async for piece in stream.text:
            print(piece, end="", flush=True)
        message = await stream.final()
    """

    def __init__(self, open: Callable[[], Awaitable[EventStream]]) -> None:
        super().__init__()
        self._open = open
        self._inside = False
        self._ended = False
        self._stream: EventStream | None = None
        self._total = Accumulator()

    async def __aenter__(self) -> AsyncMessageStream:
        if self._stream is not None:
            raise RuntimeError("a stream is used once")
        self._stream = await self._open()
        self._inside = True
        return self

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
        if self._stream is not None and self._ended:
            await self._stream.finish()
        elif self._stream is not None:
            self._stream.close()


async def text_of(stream: AsyncIterator[Any]) -> AsyncIterator[str]:
    """The text deltas of a stream's or a run's events."""
    async for event in stream:
        if isinstance(event, ContentBlockDelta) and isinstance(event.delta, TextDelta):
            yield event.delta.text


class AsyncMessages:
    """`client.messages`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def create(self, *, model: str, messages: Messages, **fields: Unpack[RequestFields]) -> Message:
        """The whole answer. Raises an `Error` whose class and fields say what went wrong."""
        return await self._client._create(_call(model, messages, fields))

    def stream(self, *, model: str, messages: Messages, **fields: Unpack[RequestFields]) -> AsyncMessageStream:
        """The answer as it comes; to be used with `async with`."""
        call = _call(model, messages, fields)
        return AsyncMessageStream(lambda: self._client._open(call))

    async def run(self, *, model: str, messages: Messages, **fields: Unpack[RunFields]) -> RunResult:
        """Ask, run the tools that the model calls, and ask again, until it is done or a limit is reached.

        Raises what a provider raises, with the result so far in `error.result`.
        """
        async with self._run(model, messages, fields, streaming=False) as run:
            return await run.final()

    @overload
    async def extract(
        self, kind: type[T], /, *, model: str, messages: Messages, **fields: Unpack[RequestFields]
    ) -> Extracted[T]: ...
    @overload
    async def extract(
        self, kind: Any, /, *, model: str, messages: Messages, **fields: Unpack[RequestFields]
    ) -> Extracted[Any]: ...
    async def extract(
        self, kind: Any, /, *, model: str, messages: Messages, **fields: Unpack[RequestFields]
    ) -> Extracted[Any]:
        """An answer of a type: a pydantic model, a dataclass, a `TypedDict`, `list[X]`, a `Literal`, a union …

        Of a `Literal` or a union, type checkers see `Any`: they are no classes; annotate the variable.
        An answer that does not fit goes back to the model once. Raises `ProviderError` (code `invalid_output`,
        `refusal` or `max_tokens`), with the last answer in `error.result`, where there is nothing to be had.
        """
        return await _extract(self._client, kind, _call(model, messages, fields))

    def run_stream(self, *, model: str, messages: Messages, **fields: Unpack[RunFields]) -> AsyncRun:
        """`run` with its events as they come; to be used with `async with`."""
        return self._run(model, messages, fields, streaming=True)

    def _run(
        self,
        model: str,
        messages: Messages,
        fields: RunFields,
        *,
        streaming: bool,
        call_hook: Callable[..., Awaitable[Any]] | None = None,
    ) -> AsyncRun:
        options, rest = _split_options(fields)
        call = _call(model, messages, rest)
        tools = _tool_list(rest.get("tools"))
        return AsyncRun(self._client, lambda: call, tools, options, streaming=streaming, call_hook=call_hook or _inline)


class AsyncModels:
    """`client.models`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> Models:
        return await self._client._retrying(self._client._engine.models)


class AsyncClient:
    """Any model, in process (`AsyncClient()`) or through a gateway (`AsyncClient(base_url=…, api_key=…)`).

    `timeout` is in seconds for a whole request; `max_retries` repeats 408, 409, 429, 5xx and failed connections, with
    growing pauses or after `retry_after`, and never once the answer has begun. `engine` takes the place of providers
    and gateway, as a `FakeModel` does in tests.
    """

    def __init__(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        provider_keys: Mapping[str, str] | None = None,
        base_urls: Mapping[str, str] | None = None,
        aliases: Aliases | None = None,
        timeout: float | Timeouts = 600,
        max_retries: int = 2,
        engine: Engine | None = None,
    ) -> None:
        timeouts = timeout if isinstance(timeout, Timeouts) else Timeouts(
            connect=min(10, timeout), first_byte=min(120, timeout), idle=min(120, timeout), total=timeout
        )  # fmt: skip
        self._engine: Engine
        if engine is not None and (base_url or api_key or provider_keys or base_urls or aliases):
            raise TypeError("an engine has its own keys and addresses")
        if base_url is None and api_key is not None:
            raise TypeError("api_key is a gateway's and needs base_url; a provider's goes into provider_keys")
        if base_url is not None and (base_urls or aliases):
            raise TypeError("base_urls and aliases are for direct mode; a gateway has its own")
        if engine is not None:
            self._engine = engine
        elif base_url is None:
            self._engine = Direct(provider_keys=provider_keys, base_urls=base_urls, aliases=aliases, timeouts=timeouts)
        else:
            self._engine = Remote(base_url, api_key, provider_keys=provider_keys, timeouts=timeouts)
        self._max_retries = max_retries
        self._closed = False
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self.messages = AsyncMessages(self)
        self.models = AsyncModels(self)
        self.audio = AsyncAudio(self)

    def conversation(self, *, model: str, messages: Messages = (), **fields: Unpack[RunFields]) -> AsyncConversation:
        """A conversation that keeps its history; the fields are those of all its requests."""
        return AsyncConversation(self, model, messages, fields)

    def load_conversation(self, data: Mapping[str, Any] | str, *, tools: Sequence[ToolLike] = ()) -> AsyncConversation:
        """The conversation that `dump()` gave, as a dict or as JSON; functions of tools are to be given again."""
        model, messages, fields, usage = _loaded(data, tools)
        chat = AsyncConversation(self, model, messages, fields)
        chat.usage = usage
        return chat

    @contextlib.asynccontextmanager
    async def live(self, *, model: str, **fields: Unpack[LiveFields]) -> AsyncIterator[AsyncLive]:
        """A conversation by voice: audio and messages in by `send`, events out by iterating.

            async with client.live(model="openai/gpt-5", voice="VOICE-ID", tools=[get_weather]) as session:
                ...                                     # await session.send(pcm), in a task of its own
                async for event in session:
                    if event.type == "audio_delta":     # event.data is PCM, s16le mono, 24 kHz
                        ...

        Needs live.py and voice.py. Raises the `Error` of what cannot be had. Functions with `@tool` are called here;
        for other tools a `tool_use` event comes, which a `tool_result` message answers.
        """
        if self._closed:
            raise RuntimeError("the client is closed")
        config, tools = _live_config(model, fields)
        async with await self._engine.open_live(config, tools) as session:
            yield session

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        self._closed = True
        for stream in list(self._streams):
            stream.close()
        await self._engine.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._engine).__name__.lower()})"

    async def _create(self, call: _Call) -> Message:
        engine = self._engine
        return await self._retrying(lambda: engine.create(engine.parse(call.body, call.headers), call.keys))

    async def _open(self, call: _Call) -> EventStream:
        engine, body = self._engine, call.body | {"stream": True}
        stream = await self._retrying(lambda: engine.open(engine.parse(body, call.headers), call.keys))
        self._streams.add(stream)
        return stream

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


# == Speech ============================================================================================================


class TranscribeOptions(TypedDict, total=False):
    """How a recording is to be heard. `format` (`pcm` or an encoding) and `sample_rate` are for bare samples only."""

    provider: str
    model: str
    language: str
    format: str
    sample_rate: int
    timestamps: bool
    provider_keys: Mapping[str, str]


class SpeechOptions(TypedDict, total=False):
    """How a text is to be spoken; `format` is `wav`, `mp3` or `pcm`, `sample_rate` is in Hz."""

    provider: str
    voice: str
    model: str
    language: str
    speed: float
    volume: float
    emotion: str
    format: Literal["wav", "mp3", "pcm"]
    sample_rate: int
    provider_keys: Mapping[str, str]


def _audio_body(options: Mapping[str, Any], known: type, **body: Any) -> JSON:
    if unknown := options.keys() - known.__annotations__.keys():
        raise TypeError(f"unknown argument {min(unknown)!r}; known: {', '.join(known.__annotations__)}")
    given = {name: value for name, value in options.items() if value is not None and name != "provider_keys"}
    return {**given, **body}


def _recorded(source: Source) -> bytes:
    """The bytes of a recording. Raises `OSError`, or `InvalidRequestError` for a URL: vai fetches none."""
    if isinstance(source, str) and re.match(r"https?://", source):
        raise InvalidRequestError("audio: a path or bytes, not a URL", param="audio")
    if not isinstance(source, bytes):
        voice.check_size(os.stat(source).st_size)
        source = Path(source).read_bytes()
    voice.check_size(len(source))
    return source


class AsyncSpeechStream(_Batches[bytes]):
    """Speech as it comes: iterate for bytes, which joined are a file. A WAV file's header leaves the length open.

    async with client.audio.stream_synthesize("Hello there.", format="mp3") as speech:
        async for data in speech:
            file.write(data)
    """

    def __init__(self, open: Callable[[], Awaitable[Audible]]) -> None:
        super().__init__()
        self._open = open
        self._stream: Audible | None = None

    async def __aenter__(self) -> AsyncSpeechStream:
        if self._stream is not None:
            raise RuntimeError("a stream is used once")
        self._stream = await self._open()
        return self

    async def _batch(self) -> list[bytes]:
        """The bytes of one read of the socket. Raises `StopAsyncIteration` at the end."""
        if self._stream is None:
            raise RuntimeError("a stream is used inside its `with` or `async with`")
        data: bytes = (await anext(self._stream)).data
        return [data]

    @property
    def duration(self) -> float:
        """Seconds of speech; final once it has ended."""
        return self._stream.duration if self._stream else 0.0

    async def close(self) -> None:
        """Let go of the service, at once if the speech is not whole."""
        if self._stream is not None:
            self._stream.close()


class AsyncAudio:
    """`client.audio`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def transcribe(self, audio: Source, **options: Unpack[TranscribeOptions]) -> voice.Transcription:
        """What a recording says: a path or bytes, of a file (WAV, MP3, FLAC, Ogg, M4A, WebM) or bare samples.

        Raises an `Error` whose `param` names what is wrong, and `OSError` for a file that cannot be read.
        """
        data = await asyncio.to_thread(_recorded, audio)
        body = _audio_body(options, TranscribeOptions, audio=data)
        engine, keys = self._client._engine, options.get("provider_keys")
        return await self._client._retrying(lambda: engine.transcribe(engine.parse_audio(body), keys))

    async def synthesize(self, text: str, **options: Unpack[SpeechOptions]) -> voice.Speech:
        """A text as speech, all of it: `audio` holds the bytes of the file."""
        body = _audio_body(options, SpeechOptions, text=text)
        engine, keys = self._client._engine, options.get("provider_keys")
        return await self._client._retrying(lambda: engine.synthesize(engine.parse_audio(body), keys))

    def stream_synthesize(self, text: str, **options: Unpack[SpeechOptions]) -> AsyncSpeechStream:
        """A text as speech, as it comes; to be used with `async with`."""
        body = _audio_body(options, SpeechOptions, text=text)
        client, engine, keys = self._client, self._client._engine, options.get("provider_keys")
        return AsyncSpeechStream(lambda: client._retrying(lambda: engine.open_speech(engine.parse_audio(body), keys)))


# == Live voice ========================================================================================================


class LiveFields(TypedDict, total=False):
    """The fields of a live conversation beside `model`."""

    voice: str | Mapping[str, Any]
    """A voice's id, or settings: `input`, `output`, `vad`, `grace_period`, `interrupt`."""
    system: str | Sequence[Block]
    messages: Messages
    """What was said before."""
    tools: Sequence[ToolLike]
    max_tokens: int
    temperature: float
    thinking: Mapping[str, Any]
    audio_in: Mapping[str, Any]
    """`sample_rate`, in Hz: 16000, 24000 or 48000. What is sent is PCM, s16le mono."""
    audio_out: Mapping[str, Any]
    """`sample_rate`, in Hz: 8000, 16000, 22050, 24000, 44100 or 48000."""
    provider_keys: Mapping[str, str]


def _live_config(model: str, fields: LiveFields) -> tuple[JSON, list[Tool[..., Any]]]:
    """The body of `session.configure`, and the tools that are functions. Raises `TypeError` for unknown arguments."""
    if unknown := fields.keys() - LiveFields.__annotations__.keys():
        near = difflib.get_close_matches(min(unknown), LiveFields.__annotations__, 1)
        raise TypeError(f"unknown argument {min(unknown)!r}" + (f"; did you mean {near[0]}?" if near else ""))
    given: dict[str, Any] = dict(fields)
    tools = given["tools"] = _tool_list(given.get("tools"))
    if isinstance(given.get("voice"), str):
        given["voice"] = {"output": {"voice": given["voice"], "format": "pcm"}}
    config = request_body(model, given.pop("messages", None) or [], given)
    for tool, wire in zip(tools, config["tools"], strict=True):
        if isinstance(tool, Tool) and tool.side_effects:
            wire["side_effects"] = True
    return config, [tool for tool in tools if isinstance(tool, Tool)]


# == The tool loop =====================================================================================================
# A run asks the model, runs the tools that it calls and asks again, until the model is done or a limit is reached.
# However it ends, `messages` is a history that every provider takes: each call has exactly one result.


class RunOptions(TypedDict, total=False):
    """Limits and hooks of a run; times in seconds, None for no limit and no hook. Hooks may be async.

    A tool that is cut short by a limit, `cancel` or Ctrl-C may tidy up (its `finally`), and is waited for meanwhile,
    however long that takes; a function that is not async goes on unheard on its thread.
    """

    max_tool_calls: int | None
    max_turns: int | None
    max_total_tokens: int | None
    timeout: float | None
    stop_when: Callable[[Message], Any] | None
    parallel_tools: bool
    tool_timeout: float | None
    before_call: Callable[[JSON], Any] | None
    after_response: Callable[[Message], Any] | None
    on_tool_call: Callable[[str, JSON, Any, str | None], Any] | None


class RunFields(RequestFields, RunOptions, total=False):
    """What `run` and `run_stream` take beside `model` and `messages`."""


@dataclass(slots=True)
class ToolCall:
    """A call that the model made: what the function returned, or the `error` that went back instead."""

    id: str
    name: str
    input: JSON
    output: Any = None
    error: str | None = None
    result: JSON | None = field(default=None, repr=False)  # the `tool_result` block, once there is one
    toolset: str | None = field(default=None, repr=False)  # Anthropic's name for the set that the tool is of


@dataclass(slots=True)
class Step:
    """One answer of the model, and the calls in it."""

    response: Message
    tool_calls: list[ToolCall] = field(default_factory=list)


@dataclass(slots=True)
class RunResult:
    """What a run came to, at any time of it.

    `stop_reason` is the last answer's own (`end_turn`, `max_tokens` …) or what ended the run: `max_tool_calls`,
    `max_turns`, `max_total_tokens`, `timeout`, `custom` (`stop_when`), `cancelled`, `error`; None while it goes on.
    `response` is the last whole answer; None if there was none. `messages` is the history, the request's included.
    `usage` is the sum over all answers, also of those that were cut short, as far as it is known.
    """

    messages: list[JSON]
    response: Message | None = None
    steps: list[Step] = field(default_factory=list)
    stop_reason: str | None = None
    usage: Usage = field(default_factory=Usage)
    turn_count: int = 0
    tool_call_count: int = 0

    @property
    def text(self) -> str:
        """The last answer's text."""
        return self.response.text if self.response else ""


@dataclass(slots=True)
class StepStart:
    index: int
    type: ClassVar[Literal["step_start"]] = "step_start"


@dataclass(slots=True)
class ToolCallStart:
    call: ToolCall
    type: ClassVar[Literal["tool_call_start"]] = "tool_call_start"


@dataclass(slots=True)
class ToolResult:
    """A call has its result. Results come as the tools finish; in the history they stand in order."""

    call: ToolCall
    type: ClassVar[Literal["tool_result"]] = "tool_result"


@dataclass(slots=True)
class StepComplete:
    index: int
    step: Step
    type: ClassVar[Literal["step_complete"]] = "step_complete"


@dataclass(slots=True)
class Interrupted:
    """The run goes on with a new message; `kept` is what was kept of the answer that it cut short."""

    kept: str
    type: ClassVar[Literal["interrupted"]] = "interrupted"


@dataclass(slots=True)
class RunComplete:
    result: RunResult
    type: ClassVar[Literal["run_complete"]] = "run_complete"


RunEvent: TypeAlias = StreamEvent | StepStart | ToolCallStart | ToolResult | StepComplete | Interrupted | RunComplete
Partial: TypeAlias = Literal["discard", "save", "marked"]

_NOT_RUN = {
    "max_tool_calls": "Not run: no more tool calls are allowed. Answer with what you have.",
    "max_turns": "Not run: the limit of turns is reached.",
    "max_total_tokens": "Not run: the limit of tokens is reached.",
    "custom": "Not run: the run was stopped.",
    "timeout": "Not finished: time is up.",
    "cancelled": "Not finished: the run was cancelled.",
    "interrupted": "Not finished: the user interrupted.",
    "error": "Not finished: the run failed.",
}


_LEAST = {"max_tool_calls": 0, "max_turns": 1, "max_total_tokens": 1, "timeout": 0, "tool_timeout": 0}


def _split_options(fields: RunFields) -> tuple[RunOptions, RequestFields]:
    """The run's own options, checked, and the fields of its requests."""
    own = RunOptions.__annotations__.keys()
    options: Any = {name: value for name, value in fields.items() if name in own}
    rest: Any = {name: value for name, value in fields.items() if name not in own}
    for name, least in _LEAST.items():
        if (value := options.get(name)) is not None and not value >= least:  # NaN is none either
            raise ValueError(f"{name} is {value}; the least is {least}")
    return options, rest


class _Stopped(Exception):
    """The run was cancelled, interrupted or out of time while it waited."""


class AsyncRun(_Batches[RunEvent]):
    """A run in progress. Iterate it for events, or `text` for text alone; `result` is what there is at any time.

        async with client.messages.run_stream(model=…, messages=…, tools=[get_weather]) as run:
            async for text in run.text:
                print(text, end="", flush=True)
        print(run.result.usage.total_tokens)

    `cancel()` ends it, `interrupt("actually …")` goes on with a new message; both also from inside the loop.
    """

    def __init__(
        self,
        client: AsyncClient,
        call: Callable[[], _Call],
        tools: Sequence[ToolLike],
        options: RunOptions,
        *,
        streaming: bool,
        call_hook: Callable[..., Awaitable[Any]],
        on_end: Callable[[RunResult], None] | None = None,
    ) -> None:
        super().__init__()
        self.result = RunResult(messages=[])
        self._client = client
        self._make_call = call
        self._tools = {tool.name: tool for tool in tools if isinstance(tool, Tool)}
        self._natives = [tool for tool in tools if isinstance(tool, Native) and tool.act]
        self._options = options
        self._streaming = streaming
        self._hook = call_hook
        self._on_end = on_end
        self._deadline: float | None = None
        self._scope: asyncio.Timeout | None = None  # around what the run waits for
        self._wanted: Literal["cancelled", "interrupted"] | None = None
        self._said: list[Any] = []  # the messages of interruptions
        self._keep: Partial = "discard"
        self._answer: Accumulator | None = None  # the answer that is coming in, as far as it was handed out
        self._tools_off = False
        self._pending: list[ToolCall] = []  # the calls of the last answer, until their results are in the history
        self._ending_tools = False
        self._reason: str | None = None  # why the run ends with the last answer, if it does
        self._inside = False
        self._ended = asyncio.Event()
        self._generator = self._steps()

    async def __aenter__(self) -> AsyncRun:
        self._inside = True
        return self

    async def _batch(self) -> list[RunEvent]:
        """The next events. Raises `StopAsyncIteration` at the end."""
        if not self._inside and self.result.stop_reason is None:
            raise RuntimeError("a run is used inside its `with` or `async with`")
        if not self._inside:
            raise StopAsyncIteration
        return await anext(self._generator)

    def _take(self) -> RunEvent | None:
        """An event that is there; what has come of an answer after it was cut short is not handed out."""
        if self._answer and self._wanted:
            self._events.clear()
        if not self._events:
            return None
        event = self._events.popleft()
        if self._answer:
            self._answer.add(event)  # type: ignore[arg-type]  # it passes over what is not the answer's
        return event

    @property
    def text(self) -> AsyncIterator[str]:
        """The pieces of text of all answers, as they come."""
        return text_of(self)

    @property
    def message(self) -> Message | None:
        """The answer that is coming in, as far as it has come; between two of them the last one."""
        return self._answer.message if self._answer else self.result.response

    async def final(self) -> RunResult:
        """Run to the end."""
        async for _ in self:
            pass
        return self.result

    async def close(self) -> None:
        """End it where it is; its history is whole all the same."""
        self._inside = False
        generator: Any = self._generator
        if generator.ag_running:  # in another task, where it comes to its end
            self.cancel()
            await self._ended.wait()
        else:
            await generator.aclose()

    def cancel(self) -> None:
        """End the run: no further call. What is left of an answer in progress is not in the history."""
        if self.result.stop_reason is None:
            self._wanted, self._keep = "cancelled", "discard"
            self._cut()

    def interrupt(self, message: str | Sequence[Block], partial: Partial = "discard") -> bool:
        """Stop the answer in progress, or its tools, and go on with a new message of the user.

        `partial` says what becomes of the text that was said: `discard`, `save`, or `marked` with `[interrupted]`.
        False if the run was over or cancelled already.
        """
        if partial not in get_args(Partial):
            raise ValueError(f"partial is one of {', '.join(get_args(Partial))}; not {partial!r}")
        if self.result.stop_reason is not None or self._wanted == "cancelled":
            return False
        self._said.append(_plain(message))
        self._keep = partial
        if self._wanted is None:
            self._wanted = "interrupted"
            self._cut()
        return True

    def _cut(self) -> None:
        if self._scope is not None and not self._scope.expired():
            self._scope.reschedule(0)

    # -- the loop ------------------------------------------------------------------------------------------------------

    async def _steps(self) -> AsyncGenerator[list[RunEvent], None]:
        result, call = self.result, self._start()
        try:
            while result.stop_reason is None:
                self._reason = None
                try:
                    yield [StepStart(len(result.steps))]
                    async with self._within():
                        asked = await self._next_call(call)
                    result.turn_count += 1
                    async with contextlib.aclosing(self._ask(asked)) as answer:
                        async for events in answer:
                            yield events
                    step = result.steps[-1]
                    async with self._within():
                        await self._judge(step)
                    if self._reason is None:
                        async with contextlib.aclosing(self._run_tools(step)) as results:
                            async for events in results:
                                yield events
                    self._settle(self._reason or "max_tool_calls")
                    yield [StepComplete(len(result.steps) - 1, step)]
                    if self._wanted:
                        raise _Stopped
                    result.stop_reason = self._reason
                except _Stopped:
                    why = self._wanted or self._reason or "timeout"
                    kept = self._keep_partial()
                    self._settle(why)
                    if why == "interrupted":
                        yield [self._go_on(kept)]
                        result.stop_reason = self._limit()
                    else:
                        result.stop_reason = why
        except BaseException as fault:
            self._keep = "discard"
            self._keep_partial()
            ended = "error" if isinstance(fault, Exception) else self._reason or "cancelled"
            self._settle(ended)
            result.stop_reason = result.stop_reason or ended
            if isinstance(fault, Error):
                fault.result = result
            raise
        finally:
            self._drop_unanswered()
            if self._on_end:
                self._on_end(result)
            self._ended.set()
        yield [RunComplete(result)]

    def _start(self) -> _Call:
        call, options = self._make_call(), self._options
        self.result.messages = call.body["messages"]
        if (timeout := options.get("timeout")) is not None:
            self._deadline = asyncio.get_running_loop().time() + timeout
        return call

    async def _ask(self, call: _Call) -> AsyncGenerator[list[RunEvent], None]:
        """Get the next answer, with its events if they are wanted, and take it into the history."""
        if not self._streaming:
            async with self._within():
                whole = await self._client._create(call)
            self._answered(whole)
            return
        async with self._within():
            stream = await self._client._open(call)
        try:
            self._answer = Accumulator()
            while events := await self._more(stream):
                yield events
                if isinstance(events[-1], MessageStop):
                    break
            await stream.finish()
        finally:
            stream.close()
        if (response := self._whole()) is None:
            raise _Stopped if self._wanted else StreamTruncated("the answer ended before it was whole")
        self._answered(response)

    async def _run_tools(self, step: Step) -> AsyncGenerator[list[RunEvent], None]:
        """Run the calls of an answer, and tell of each as it begins and ends."""
        tasks: list[asyncio.Task[ToolCall]] = []
        try:
            for group in self._groups(step):
                if self._wanted:  # by a hook
                    raise _Stopped
                yield [ToolCallStart(call) for call in group]
                tasks = running = [asyncio.create_task(_contained(self._use, call)) for call in group]
                while running:
                    async with self._within():
                        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    yield [ToolResult(_outcome(task)) for task in running if task in done]
                    running = [task for task in running if task not in done]
        finally:
            self._ending_tools = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._ending_tools = False

    @contextlib.asynccontextmanager
    async def _within(self) -> AsyncGenerator[None, None]:
        """Around whatever the run waits for: `_Stopped` where it is cancelled, interrupted or out of time.

        By a timeout's own means, which tell a cancellation of ours from one of the task's.
        """
        now = asyncio.get_running_loop().time()
        if self._wanted or (self._deadline is not None and now >= self._deadline):
            raise _Stopped
        scope = self._scope = asyncio.timeout_at(self._deadline)
        try:
            async with scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise _Stopped from None
        finally:
            self._scope = None

    async def _more(self, stream: EventStream) -> list[RunEvent]:
        async with self._within():
            async for events in stream:
                return [*events]
        return []

    def _whole(self) -> Message | None:
        """The answer that was handed out, if it is whole."""
        message = self._answer.message if self._answer else None
        return message if message and message.stop_reason else None

    async def _next_call(self, call: _Call) -> _Call:
        """The request for the next answer. A forced tool is forced once: for ever would be a loop without an end."""
        body = {**call.body, "messages": list(self.result.messages)}
        choice = body.get("tool_choice") or {}
        if self._tools_off and body.get("tools"):
            body["tool_choice"] = {"type": "none"}
        elif self.result.tool_call_count and choice.get("type") in ("any", "tool"):
            body["tool_choice"] = {**choice, "type": "auto"}
            body["tool_choice"].pop("name", None)
        if before_call := self._options.get("before_call"):
            body = copy.deepcopy(body)
            changed = await self._hook(before_call, body)
            if not isinstance(changed, (Mapping, type(None))):
                raise TypeError(f"before_call returns a request or None; not {type(changed).__name__}")
            body = body if changed is None else dict(changed)
        return replace(call, body=body)

    def _answered(self, response: Message) -> None:
        """Take a whole answer into the history, and see why the run ends with it, if it does."""
        result, calls = self.result, []
        self._answer = None
        for block in response.content:
            if isinstance(block, ToolUse):
                toolset = (block.model_extra or {}).get("toolset_name")
                calls.append(ToolCall(block.id, block.name, block.input, toolset=toolset))
        result.usage = _added(result.usage, response.usage)
        result.response = response
        result.steps.append(Step(response, calls))
        if response.content:
            result.messages.append(_turn(response))
        self._pending = calls
        reason = response.stop_reason or "end_turn"
        calling = bool(calls) and reason in ("tool_use", "end_turn")
        if not calling and reason != "pause_turn":
            reason = "end_turn" if reason == "tool_use" else reason
            self._reason = "max_tool_calls" if self._tools_off else reason
        else:
            self._reason = "max_tool_calls" if self._tools_off and calling else self._limit()

    async def _judge(self, step: Step) -> None:
        """Ask the hooks what they think of an answer."""
        if after_response := self._options.get("after_response"):
            await self._hook(after_response, step.response)
        if (stop_when := self._options.get("stop_when")) and await self._hook(stop_when, step.response):
            self._reason = "custom"

    def _limit(self) -> str | None:
        """Why there may be no further answer."""
        turns, tokens = self._options.get("max_turns"), self._options.get("max_total_tokens")
        if turns is not None and self.result.turn_count >= turns:
            return "max_turns"
        if tokens is not None and self.result.usage.total_tokens >= tokens:
            return "max_total_tokens"
        return None

    def _groups(self, step: Step) -> list[list[ToolCall]]:
        """The calls that may run, as they run side by side. Where some may not, the tools are off from here."""
        most = self._options.get("max_tool_calls")
        calls = step.tool_calls if most is None else step.tool_calls[: max(0, most - self.result.tool_call_count)]
        self._tools_off = self._tools_off or len(calls) < len(step.tool_calls)
        if not calls:
            return []
        return [calls] if self._options.get("parallel_tools", True) else [[tool_call] for tool_call in calls]

    async def _use(self, call: ToolCall) -> ToolCall:
        """Run a tool. Whatever goes wrong with it is for the model to read, and the run goes on."""
        self.result.tool_call_count += 1
        tool = self._tools.get(call.name)
        limit = tool.timeout if tool and tool.timeout is not None else self._options.get("tool_timeout", 30)
        try:
            async with asyncio.timeout(limit) as scope:
                call.output = await (_invoke(tool.function, **tool.bind(call.input)) if tool else self._act(call))
                await asyncio.sleep(0)  # where a tool that cancelled its own task is cancelled
            call.result = tool_result(call.id, call.output)
        except asyncio.CancelledError:
            if self._ending_tools:
                raise
            call.error = "The tool was cancelled."
        except (Exception, SystemExit) as fault:
            late = isinstance(fault, TimeoutError) and scope.expired()
            call.error = f"The tool took longer than {limit:g} seconds." if late else _tool_error(fault)
        if call.error is not None:
            call.result = tool_result(call.id, call.error, is_error=True)
        if on_tool_call := self._options.get("on_tool_call"):
            await self._hook(on_tool_call, call.name, call.input, call.output, call.error)
        return call

    async def _act(self, call: ToolCall) -> Any:
        """A call of a provider's own tool that is run here, if it is one."""
        kind = _ACTING.get(call.name) or ("computer_use" if call.toolset == "computer" else None)
        for native in self._natives:
            if native.act and native.kind == kind:
                return await _invoke(native.act, call.name, call.input)
        known = ", ".join(self._tools) or "none"
        raise _Told(f"There is no tool {call.name!r} that can be run. Tools: {known}.")

    def _settle(self, why: str) -> None:
        """Put the results of the last answer's calls into the history; one that has none says why."""
        calls, self._pending = self._pending, []
        for call in calls:
            if call.result is None:
                call.error = _NOT_RUN.get(why, f"Not run: the answer ended with {why}.")
                call.result = tool_result(call.id, call.error, is_error=True)
            if call.toolset:
                call.result["toolset_name"] = call.toolset
        if calls:
            self.result.messages.append({"role": "user", "content": [call.result for call in calls]})

    def _keep_partial(self) -> str:
        """What was said of an answer that was cut short, as far as it is to be kept; a whole one is kept whole."""
        whole = self._whole()
        answer, self._answer = self._answer, None
        if answer is None or answer.message is None:
            return ""
        if whole:
            self._answered(whole)
            return ""
        answer.settle()
        self.result.usage = _added(self.result.usage, answer.message.usage)
        said = answer.message.text
        if self._keep == "discard" or not said.strip():
            return ""
        said += " [interrupted]" if self._keep == "marked" else ""
        self._drop_unanswered()
        self.result.messages.append({"role": "assistant", "content": [text(said)]})
        return said

    def _go_on(self, kept: str) -> Interrupted:
        self._drop_unanswered()
        self.result.messages += ({"role": "user", "content": said} for said in self._said)
        self._wanted, self._said, self._keep, self._tools_off = None, [], "discard", False
        return Interrupted(kept)

    def _drop_unanswered(self) -> None:
        """A server tool that the provider had not run when it paused: without a result no provider takes it back."""
        last = self.result.messages[-1] if self.result.messages else {}
        blocks = _blocks(last) if last.get("role") == "assistant" else []
        answered = {block.get("tool_use_id") for block in blocks}
        uses = ("server_tool_use", "mcp_tool_use")
        kept = [block for block in blocks if block.get("type") not in uses or block.get("id") in answered]
        if len(kept) < len(blocks):
            self.result.messages[-1:] = [{**last, "content": kept}] if kept else []


def _blocks(turn: JSON) -> list[JSON]:
    """The blocks of a turn that may be anything yet."""
    content = turn.get("content") if isinstance(turn, dict) else None
    return [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []


class _Told(Exception):
    """An error whose text is for the model as it is."""


def _tool_error(fault: BaseException) -> str:
    plain = isinstance(fault, _Told) or (type(fault) is ValueError and str(fault))
    return str(fault) if plain else f"{type(fault).__name__}: {fault}"


def _added(total: Usage, more: Usage) -> Usage:
    """The sum of two usages, with all the details that providers give."""
    return Usage.model_validate(_sum(total.to_wire(), more.to_wire()))


def _sum(total: JSON, more: JSON) -> JSON:
    out = dict(total)
    for name, value in more.items():
        old = out.get(name)
        if isinstance(value, dict):
            out[name] = _sum(old if isinstance(old, dict) else {}, value)
        elif isinstance(value, (int, float)) and isinstance(old, (int, float)) and not isinstance(value, bool):
            out[name] = old + value
        else:
            out[name] = value
    return out


class _Exit(Exception):
    """Carries a `SystemExit` or `KeyboardInterrupt` out of a task. By itself it would end the event loop there, and
    whoever waits for the task would wait for ever."""


async def _contained(function: Callable[..., Awaitable[T]], *args: Any) -> T:
    """What every task is made of that runs functions of the user's; `_outcome` is its result."""
    try:
        return await function(*args)
    except (SystemExit, KeyboardInterrupt) as fault:
        raise _Exit(fault) from None


def _outcome(ended: asyncio.Task[T] | concurrent.futures.Future[T]) -> T:
    try:
        return ended.result()
    except _Exit as carrier:
        fault: BaseException = carrier.args[0]
        raise fault from None


async def _invoke(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of the user's: one that is not async on a thread of its own."""
    if inspect.iscoroutinefunction(function):
        return await function(*args, **kwargs)
    value = await _in_thread(function, *args, **kwargs)
    return await value if inspect.isawaitable(value) else value


async def _inline(function: Callable[..., Any], *args: Any) -> Any:
    value = function(*args)
    return await value if inspect.isawaitable(value) else value


async def _in_thread(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run on a daemon thread: one that hangs holds up neither other calls nor the end of the program, as an executor's
    would."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
    context, calls = contextvars.copy_context(), _ClientCalls()
    context.run(_CALLS.set, calls)

    def settle(value: Any, fault: BaseException | None) -> None:
        if not ended.done():
            ended.set_result((value, fault))

    def work() -> None:
        value, fault = None, None
        try:
            value = context.run(function, *args, **kwargs)
        except BaseException as raised:
            fault = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, value, fault)

    threading.Thread(target=work, name="vai-tool", daemon=True).start()
    try:
        value, fault = await ended
    except asyncio.CancelledError:
        calls.cancel()
        raise
    if fault is not None:
        raise fault
    returned: T = value
    return returned


class _ClientCalls:
    """What a function on a thread asks of a `Client`: it ends when the function is no longer waited for."""

    def __init__(self) -> None:
        self._futures: set[concurrent.futures.Future[Any]] = set()
        self._cancelled = False

    def add(self, future: concurrent.futures.Future[Any]) -> None:
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        if self._cancelled:
            future.cancel()

    def cancel(self) -> None:
        self._cancelled = True
        for future in list(self._futures):
            future.cancel()


_CALLS: contextvars.ContextVar[_ClientCalls | None] = contextvars.ContextVar("_CALLS", default=None)


# == Structured answers ================================================================================================


@dataclass(slots=True)
class Extracted(Generic[T]):
    """What `extract` got: `parsed` is of the type asked for; `usage` counts a mended answer too."""

    parsed: T
    response: Message
    usage: Usage


class _Form:
    """A type as a model is asked for it, and its answer read. What is no object in JSON is wrapped in one."""

    def __init__(self, kind: Any, tools: Sequence[JSON] = ()) -> None:
        taken = {tool.get("name") for tool in tools}
        names = ("answer", *(f"answer_{number}" for number in range(2, len(taken) + 3)))
        self.tool_name = next(name for name in names if name not in taken)
        self._ways = ["native", "forced", "offered"]
        self._adapter: TypeAdapter[Any] = TypeAdapter(_portable(kind))
        schema = self._adapter.json_schema()
        defs = _lean({"$defs": schema.pop("$defs", {})})["$defs"]
        schema = _lean(schema)
        if set(schema) == {"$ref"}:  # a model that refers to itself
            schema = defs[schema["$ref"].rpartition("/")[2]]
        self._wrapped = schema.get("type") != "object"
        if self._wrapped:
            schema = {"type": "object", "properties": {"value": schema}, "required": ["value"]}
        self.schema: JSON = schema | ({"$defs": defs} if defs else {})

    async def ask(self, client: AsyncClient, call: _Call) -> Message:
        """By structured output; where provider or model has none, by a tool that must be called, or may be."""
        while True:
            try:
                return await client._create(replace(call, body=call.body | self._wanted(call.body)))
            except InvalidRequestError as fault:
                words = f"{fault.param} {fault.message}"
                if len(self._ways) == 1 or not (fault.code == "unsupported_feature" or _NO_STRUCTURE.search(words)):
                    raise
                del self._ways[0]

    def _wanted(self, body: JSON) -> JSON:
        if self._ways[0] == "native":
            return {"output_format": {"type": "json_schema", "json_schema": self.schema}}
        about = "Gives the answer to the user. Always answer by calling this tool."
        tool = {"name": self.tool_name, "description": about, "input_schema": self.schema}
        forced = {"type": "tool", "name": self.tool_name, "disable_parallel_tool_use": True}
        choice = {"tool_choice": forced} if self._ways[0] == "forced" else {}
        return {"tools": [*body.get("tools", ()), tool], **choice}

    def read(self, response: Message) -> Any:
        """The value in an answer. Raises `ValueError`, whose text helps a model to mend it."""
        calls = [call.input for call in response.tool_calls if call.name == self.tool_name]
        try:
            found = calls[0] if calls else providers.loads(_unfenced(response.text))
        except ValueError as fault:
            raise ValueError(f"The answer is not JSON: {fault}") from None
        if calls and found.get("invalid_json"):
            raise ValueError("The answer is not a whole JSON object.")
        if self._wrapped and isinstance(found, dict) and "value" in found:
            found = found["value"]
        try:
            return self._adapter.validate_json(providers.dumps(found))
        except ValidationError as fault:
            raise ValueError(_told(fault, "The answer does not fit the schema:")) from None

    def mend(self, response: Message, wrong: str) -> list[JSON]:
        """The turns that ask for a better answer."""
        how = "" if self._ways[0] == "native" else f", by calling the tool {self.tool_name}"
        again = f"{wrong}\nGive the whole answer again, corrected{how}."
        calls = response.tool_calls
        results = [tool_result(call.id, again, is_error=True) for call in calls]
        return [_turn(response), {"role": "user", "content": results or again}]


def _unfenced(text: str) -> str:
    """What is inside ``` where a model puts its JSON there."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", text, re.DOTALL)
    return fenced[1] if fenced else text


_NO_STRUCTURE = re.compile(
    r"(?i)response.?format|json.?schema|response.?schema|output_(config|format)|structured|tool.?choice"
)
_UNMENDABLE = {
    "refusal": "the model declined to answer",
    "max_tokens": "the answer was cut off at max_tokens",
    "model_context_window_exceeded": "the answer was cut off at the end of the context window",
}


async def _extract(client: AsyncClient, kind: Any, call: _Call) -> Extracted[Any]:
    if taken := {"output_format", "tool_choice"} & call.body.keys():
        raise TypeError(f"extract() sets {min(taken)} itself")
    if "format" in (call.body.get("output_config") or {}):
        raise TypeError("extract() sets output_config.format itself")
    form, usage = _Form(kind, call.body.get("tools", ())), Usage()
    chances = 2
    while chances:
        response = await form.ask(client, call)
        usage = _added(usage, response.usage)
        if response.stop_reason == "pause_turn":
            call = replace(call, body={**call.body, "messages": [*call.body["messages"], _turn(response)]})
            continue
        chances -= 1
        try:
            return Extracted(form.read(response), response, usage)
        except ValueError as fault:
            why = _UNMENDABLE.get(response.stop_reason or "", str(fault))
        if response.stop_reason in _UNMENDABLE or not response.content:
            break
        call = replace(call, body={**call.body, "messages": [*call.body["messages"], *form.mend(response, why)]})
    code = response.stop_reason if response.stop_reason in _UNMENDABLE else "invalid_output"
    failed = ProviderError(f"nothing could be extracted: {why}", provider=response.model.partition("/")[0], code=code)
    failed.begun = True
    failed.result = response
    raise failed


# == Conversations =====================================================================================================


class TurnFields(RunFields, total=False):
    """What one turn of a conversation may have of its own."""

    model: str


_KEY_HOLDERS = ("extra_body", "extensions", "mcp_servers")
_KEY_FIELDS = {"provider_keys", "authorization_token", "authorization", "headers", "api_key"}


def _keyless(value: Any) -> Any:
    """What may be saved of a field in which providers have keys."""
    if isinstance(value, dict):
        return {key: _keyless(item) for key, item in value.items() if key.lower() not in _KEY_FIELDS}
    return [_keyless(item) for item in value] if isinstance(value, list) else value


class _Chat:
    """What both kinds of conversation are: a model, a history, and what every request of it says."""

    _call_hook: Callable[..., Awaitable[Any]] = staticmethod(_inline)

    def __init__(self, client: AsyncClient, model: str, messages: Messages, fields: RunFields) -> None:
        self.model = model
        self.messages: list[JSON] = request_body(model, messages, {})["messages"]
        self.usage = Usage()
        self._client = client
        self._fields = fields
        self._busy = False
        _call(model, messages, _split_options(fields)[1])  # raises for what is no field

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model}, {len(self.messages)} messages)"

    @property
    def system(self) -> str | Sequence[Block] | None:
        """The system prompt; it may be changed between turns."""
        return self._fields.get("system")

    @system.setter
    def system(self, system: str | Sequence[Block] | None) -> None:
        fields: Any = {**self._fields, "system": system}
        self._fields = fields

    def dump(self) -> JSON:
        """The conversation as JSON can hold it. Not in it: keys, headers, limits, hooks, and the functions of tools,
        of which only the descriptions are kept."""
        kept = RequestFields.__annotations__.keys() - {"provider_keys", "extra_headers"}
        fields = {name: _plain(value) for name, value in self._fields.items() if name in kept and value is not None}
        fields |= {name: _keyless(fields[name]) for name in _KEY_HOLDERS if name in fields}
        return {"version": 1, "model": self.model, "messages": copy.deepcopy(self.messages), "fields": fields,
                "usage": self.usage.to_wire()}  # fmt: skip

    def _like(self, other: _Chat) -> None:
        self.usage = other.usage.model_copy()
        self.messages = copy.deepcopy(other.messages)

    def _begin(self, content: Any, turn: TurnFields, *, streaming: bool) -> AsyncRun:
        given: Any = {**self._fields, **turn}
        model = given.pop("model", self.model)
        options, fields = _split_options(given)
        said = 0

        def start() -> _Call:
            if self._busy:
                raise RuntimeError("this conversation is still answering; fork() it to say two things at once")
            if content is None and not self.messages:
                raise ValueError("nothing was said yet")
            nonlocal said
            said = len(self.messages)
            new = [] if content is None else [{"role": "user", "content": content}]
            call = _call(model, [*self.messages, *new], fields)
            self._busy = True
            return call

        def end(result: RunResult) -> None:
            self._busy = False
            self.usage = _added(self.usage, result.usage)
            answered = any(turn["role"] == "assistant" for turn in result.messages[said:])
            if answered or result.stop_reason == "cancelled":  # else the same can be said once more
                self.messages = result.messages

        return AsyncRun(
            self._client,
            start,
            _tool_list(fields.get("tools")),
            options,
            streaming=streaming,
            call_hook=self._call_hook,
            on_end=end,
        )


def _loaded(data: Mapping[str, Any] | str, tools: Sequence[ToolLike]) -> tuple[str, list[JSON], RunFields, Usage]:
    """What `dump` gave. Raises `ValueError` for anything else; `tools` stand over the described ones."""
    try:
        saved = json.loads(data) if isinstance(data, str) else data
        if saved["version"] != 1:
            raise TypeError(f"a conversation of version {saved['version']}; this vai knows version 1")
        model, messages, fields = saved["model"], copy.deepcopy(saved["messages"]), saved["fields"]
        for name, value, kind in (("model", model, str), ("messages", messages, list), ("fields", fields, Mapping)):
            if not isinstance(value, kind):
                raise TypeError(f"{name} is of the type {type(value).__name__}")
        _call(model, messages, fields)
        if messages:
            providers.parse_request({"model": "anthropic/any", "messages": messages})
        usage = Usage.model_validate(saved.get("usage") or {})
    except (KeyError, json.JSONDecodeError) as fault:
        lacks = f"not JSON: {fault}" if isinstance(fault, ValueError) else f"it has no {fault}"
        raise ValueError(f"not a conversation as dump() gives it: {lacks}") from None
    except (TypeError, ValidationError, InvalidRequestError) as fault:
        raise ValueError(f"not a conversation as dump() gives it: {fault}") from None
    loaded: Any = dict(fields)
    if given := _tool_list(tools):
        own = {_tool_name(tool) for tool in given}
        loaded["tools"] = [*given, *(tool for tool in _tool_list(fields.get("tools")) if _tool_name(tool) not in own)]
    return model, messages, loaded, usage


def _tool_name(tool: ToolLike) -> Any:
    plain: Mapping[str, Any] = _plain(tool)
    return plain.get("name") or plain.get("type")


class AsyncConversation(_Chat):
    """A conversation, which keeps its history: `client.conversation(model=…, system=…, tools=[…])`.

    `model`, `system` and `messages` may be changed between turns.
    """

    async def say(self, content: str | Sequence[Block] | None = None, **turn: Unpack[TurnFields]) -> Message:
        """The model's answer, after whatever tools it called. Without `content` the model goes on."""
        return _response_of(await self.run(content, **turn))

    async def run(self, content: str | Sequence[Block] | None = None, **turn: Unpack[TurnFields]) -> RunResult:
        """`messages.run` with this conversation's history."""
        async with self._begin(content, turn, streaming=False) as run:
            return await run.final()

    def stream(self, content: str | Sequence[Block] | None = None, **turn: Unpack[TurnFields]) -> AsyncRun:
        """`messages.run_stream` with this conversation's history."""
        return self._begin(content, turn, streaming=True)

    def fork(self) -> AsyncConversation:
        """Another conversation that begins where this one is."""
        other = AsyncConversation(self._client, self.model, (), self._fields)
        other._like(self)
        return other


def _response_of(result: RunResult) -> Message:
    if result.response is None:
        raise ProviderTimeoutError("there was no answer in time", code="run_timeout")
    return result.response


# == The synchronous client ============================================================================================


class _Portal:
    """An event loop on a thread of its own, where the asynchronous client does the work of the synchronous one."""

    def __init__(self) -> None:
        _PORTALS.add(self)
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()  # a finalizer may come in between on the same thread
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.stopped = False

    @property
    def started(self) -> bool:
        return self._loop is not None

    def _submit(self, work: Callable[[], Awaitable[T]]) -> concurrent.futures.Future[T]:
        with self._lock:
            if self.stopped:
                raise RuntimeError("the client is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._serve, args=[self._loop], name="vai", daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(_contained(work), self._loop)

    @staticmethod
    def _serve(loop: asyncio.AbstractEventLoop) -> None:
        loop.run_forever()
        loop.close()

    def call(self, function: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        """Run to the end on the loop's thread; Ctrl-C here cancels it there, and gives it a second to tidy up."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("a Client cannot wait for itself: an async tool that asks a model uses an AsyncClient")
        # Queues, since Ctrl-C may come at any line: in the middle of a `threading.Condition` it breaks its lock.
        done: queue.SimpleQueue[object] = queue.SimpleQueue()
        tidied: queue.SimpleQueue[None] = queue.SimpleQueue()

        async def work() -> T:
            try:
                return await function(*args, **kwargs)
            finally:
                tidied.put(None)

        future = self._submit(work)
        future.add_done_callback(done.put)
        if calls := _CALLS.get():
            calls.add(future)
        try:
            done.get()
            return _outcome(future)
        except concurrent.futures.CancelledError:
            raise RuntimeError("the client was closed" if self.stopped else "the call was cancelled") from None
        except BaseException:
            if future.cancel():
                with contextlib.suppress(queue.Empty):
                    tidied.get(timeout=1)
            raise

    def soon(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function on the loop's thread, which may be this one."""

        async def called() -> T:
            return function(*args)

        return function(*args) if threading.current_thread() is self._thread else self.call(called)

    def let_go(self, close: Callable[[], Awaitable[None]]) -> None:
        """Begin to close what nobody holds any more; from whatever thread the collector runs on."""
        if self.started:
            with contextlib.suppress(RuntimeError):  # the client was closed, and all with it
                self._submit(close)

    def stop(self, close: Callable[[], Awaitable[None]]) -> None:
        """Close the client, cancel what still runs, and end the thread. On that thread all this only begins here."""
        with self._lock:
            loop, self._loop, self.stopped = self._loop, None, True
        if loop is None:
            return
        closed = asyncio.run_coroutine_threadsafe(self._end(close), loop)
        if self._thread and threading.current_thread() is not self._thread:
            self._thread.join()
            closed.result()

    @staticmethod
    async def _end(close: Callable[[], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            await close()
        finally:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            if others:
                await asyncio.wait(others, timeout=5)
            await loop.shutdown_asyncgens()
            loop.call_soon(loop.stop)  # after `closed` has its result


_PORTALS: weakref.WeakSet[_Portal] = weakref.WeakSet()


def _forked() -> None:
    """The child of a fork has the loops, but not the threads: each portal begins anew."""
    for portal in list(_PORTALS):
        providers.keep_for_ever(portal._loop)
        portal._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class _Blocking(Generic[E]):
    """A stream without `await`: events come over in batches, one for each read of the socket."""

    def __init__(self, client: Client, stream: AsyncMessageStream | AsyncRun | AsyncSpeechStream) -> None:
        self._client = client  # which lives as long as its streams
        self._portal = client._portal
        self._async: Any = stream
        self._ended = False
        self._process = os.getpid()
        self._finalizer = weakref.finalize(self, _dropped, stream, self._portal, self._process)
        self._finalizer.atexit = False  # the client's own sees to it

    def __enter__(self) -> Self:
        try:
            self._call(self._async.__aenter__)
        except BaseException:  # Ctrl-C just when the stream was there
            with contextlib.suppress(RuntimeError):
                self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[E]:
        return self

    def __next__(self) -> E:
        event: E | None
        while (event := self._async._take()) is None:
            if self._ended:
                raise StopIteration
            batch = self._call(self._next_batch)
            self._ended = not batch
            self._async._events.extend(batch)
        found: E = event
        return found

    async def _next_batch(self) -> Sequence[Any]:
        try:
            batch: Sequence[Any] = await self._async._batch()
        except StopAsyncIteration:
            return ()
        return batch

    def _call(self, function: Callable[[], Awaitable[T]]) -> T:
        if os.getpid() != self._process:
            raise RuntimeError("this stream is the parent's: a process that was forked opens its own")
        return self._portal.call(function)

    def close(self) -> None:
        if os.getpid() != self._process:
            providers.keep_for_ever(self)  # its socket is the parent's too
            return
        self._finalizer.detach()
        try:
            contextvars.Context().run(self._call, self._async.close)  # also in a tool that is no longer waited for
        except RuntimeError:
            if not self._portal.stopped:  # by which it was closed
                raise


def _dropped(stream: AsyncMessageStream | AsyncRun | AsyncSpeechStream, portal: _Portal, process: int) -> None:
    """A stream that nobody closed."""
    if os.getpid() == process:
        portal.let_go(stream.close)
    else:
        providers.keep_for_ever(stream)


class _BlockingEvents(_Blocking[E]):
    @property
    def text(self) -> Iterator[str]:
        """The pieces of text, as they come."""
        for event in self:
            if isinstance(event, ContentBlockDelta) and isinstance(event.delta, TextDelta):
                yield event.delta.text


class MessageStream(_BlockingEvents[StreamEvent]):
    """`AsyncMessageStream` without `await`."""

    _async: AsyncMessageStream

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
        return self._call(self._async.final)


class Run(_BlockingEvents[RunEvent]):
    """`AsyncRun` without `await`. `cancel` and `interrupt` may be called from any thread."""

    _async: AsyncRun

    @property
    def result(self) -> RunResult:
        return self._async.result

    @property
    def message(self) -> Message | None:
        return self._async.message

    def final(self) -> RunResult:
        return self._call(self._async.final)

    def cancel(self) -> None:
        self._portal.soon(self._async.cancel)

    def interrupt(self, message: str | Sequence[Block], partial: Partial = "discard") -> bool:
        return self._portal.soon(self._async.interrupt, message, partial)


class SpeechStream(_Blocking[bytes]):
    """`AsyncSpeechStream` without `await`."""

    _async: AsyncSpeechStream

    @property
    def duration(self) -> float:
        return self._async.duration


class Live:
    """`AsyncLive` without `await`: one thread iterates, others send."""

    def __init__(self, portal: _Portal, session: AsyncLive) -> None:
        self._portal = portal
        self._async = session

    @property
    def closed(self) -> str | None:
        return self._async.closed

    def __iter__(self) -> Iterator[live.LiveEvent | live.LiveAudio]:
        return self

    def __next__(self) -> live.LiveEvent | live.LiveAudio:
        if (event := self._portal.call(self._next)) is None:
            raise StopIteration
        return event

    async def _next(self) -> live.LiveEvent | live.LiveAudio | None:
        try:
            return await anext(self._async)
        except StopAsyncIteration:
            return None

    def send(self, message: bytes | JSON) -> None:
        self._portal.call(self._async.send, message)

    def close(self, reason: str = "client") -> None:
        self._portal.soon(self._async.close, reason)


class SyncMessages:
    """`client.messages`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._async = client._async.messages

    def create(self, *, model: str, messages: Messages, **fields: Unpack[RequestFields]) -> Message:
        """The whole answer. Raises an `Error` whose class and fields say what went wrong."""
        return self._client._portal.call(self._async.create, model=model, messages=messages, **fields)

    def stream(self, *, model: str, messages: Messages, **fields: Unpack[RequestFields]) -> MessageStream:
        """The answer as it comes; to be used with `with`."""
        return MessageStream(self._client, self._async.stream(model=model, messages=messages, **fields))

    def run(self, *, model: str, messages: Messages, **fields: Unpack[RunFields]) -> RunResult:
        """Ask, run the tools that the model calls, and ask again, until it is done or a limit is reached.

        Raises what a provider raises, with the result so far in `error.result`.
        """
        run = self._async._run(model, messages, fields, streaming=False, call_hook=_invoke)
        with Run(self._client, run) as running:
            return running.final()

    def run_stream(self, *, model: str, messages: Messages, **fields: Unpack[RunFields]) -> Run:
        """`run` with its events as they come; to be used with `with`."""
        return Run(self._client, self._async._run(model, messages, fields, streaming=True, call_hook=_invoke))

    @overload
    def extract(
        self, kind: type[T], /, *, model: str, messages: Messages, **fields: Unpack[RequestFields]
    ) -> Extracted[T]: ...
    @overload
    def extract(
        self, kind: Any, /, *, model: str, messages: Messages, **fields: Unpack[RequestFields]
    ) -> Extracted[Any]: ...
    def extract(
        self, kind: Any, /, *, model: str, messages: Messages, **fields: Unpack[RequestFields]
    ) -> Extracted[Any]:
        """An answer of a type: a pydantic model, a dataclass, a `TypedDict`, `list[X]`, a `Literal`, a union …

        Of a `Literal` or a union, type checkers see `Any`: they are no classes; annotate the variable.
        An answer that does not fit goes back to the model once. Raises `ProviderError` (code `invalid_output`,
        `refusal` or `max_tokens`), with the last answer in `error.result`, where there is nothing to be had.
        """
        return self._client._portal.call(self._async.extract, kind, model=model, messages=messages, **fields)


class Conversation(_Chat):
    """`AsyncConversation` without `await`."""

    _call_hook = staticmethod(_invoke)

    def __init__(self, owner: Client, model: str, messages: Messages, fields: RunFields) -> None:
        super().__init__(owner._async, model, messages, fields)
        self._owner = owner

    def say(self, content: str | Sequence[Block] | None = None, **turn: Unpack[TurnFields]) -> Message:
        """The model's answer, after whatever tools it called. Without `content` the model goes on."""
        return _response_of(self.run(content, **turn))

    def run(self, content: str | Sequence[Block] | None = None, **turn: Unpack[TurnFields]) -> RunResult:
        """`messages.run` with this conversation's history."""
        with Run(self._owner, self._begin(content, turn, streaming=False)) as run:
            return run.final()

    def stream(self, content: str | Sequence[Block] | None = None, **turn: Unpack[TurnFields]) -> Run:
        """`messages.run_stream` with this conversation's history."""
        return Run(self._owner, self._begin(content, turn, streaming=True))

    def fork(self) -> Conversation:
        """Another conversation that begins where this one is."""
        other = Conversation(self._owner, self.model, (), self._fields)
        other._like(self)
        return other


class SyncModels:
    """`client.models`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> Models:
        return self._client._portal.call(self._client._async.models.list)


class SyncAudio:
    """`client.audio`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._async = client._async.audio

    def transcribe(self, audio: Source, **options: Unpack[TranscribeOptions]) -> voice.Transcription:
        """What a recording says: a path or bytes, of a file (WAV, MP3, FLAC, Ogg, M4A, WebM) or bare samples.

        Raises an `Error` whose `param` names what is wrong, and `OSError` for a file that cannot be read.
        """
        return self._client._portal.call(self._async.transcribe, audio, **options)

    def synthesize(self, text: str, **options: Unpack[SpeechOptions]) -> voice.Speech:
        """A text as speech, all of it: `audio` holds the bytes of the file."""
        return self._client._portal.call(self._async.synthesize, text, **options)

    def stream_synthesize(self, text: str, **options: Unpack[SpeechOptions]) -> SpeechStream:
        """A text as speech, as it comes; to be used with `with`."""
        return SpeechStream(self._client, self._async.stream_synthesize(text, **options))


class Client:
    """`AsyncClient` without `await`, for scripts, threads and notebooks; it works inside a running event loop too."""

    def __init__(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        provider_keys: Mapping[str, str] | None = None,
        base_urls: Mapping[str, str] | None = None,
        aliases: Aliases | None = None,
        timeout: float | Timeouts = 600,
        max_retries: int = 2,
        engine: Engine | None = None,
    ) -> None:
        self._async = AsyncClient(
            base_url=base_url,
            api_key=api_key,
            provider_keys=provider_keys,
            base_urls=base_urls,
            aliases=aliases,
            timeout=timeout,
            max_retries=max_retries,
            engine=engine,
        )
        self._portal = _Portal()
        self._finalizer = weakref.finalize(self, _forgotten, self._async, self._portal)

    @property
    def messages(self) -> SyncMessages:
        return SyncMessages(self)

    @property
    def models(self) -> SyncModels:
        return SyncModels(self)

    @property
    def audio(self) -> SyncAudio:
        return SyncAudio(self)

    def conversation(self, *, model: str, messages: Messages = (), **fields: Unpack[RunFields]) -> Conversation:
        """A conversation that keeps its history; the fields are those of all its requests."""
        return Conversation(self, model, messages, fields)

    def load_conversation(self, data: Mapping[str, Any] | str, *, tools: Sequence[ToolLike] = ()) -> Conversation:
        """The conversation that `dump()` gave, as a dict or as JSON; functions of tools are to be given again."""
        model, messages, fields, usage = _loaded(data, tools)
        chat = Conversation(self, model, messages, fields)
        chat.usage = usage
        return chat

    @contextlib.contextmanager
    def live(self, *, model: str, **fields: Unpack[LiveFields]) -> Iterator[Live]:
        """A conversation by voice: audio and messages in by `send`, events out by iterating.

            with client.live(model="openai/gpt-5", voice="VOICE-ID", tools=[get_weather]) as session:
                ...                                     # session.send(pcm), on a thread of its own
                for event in session:
                    if event.type == "audio_delta":     # event.data is PCM, s16le mono, 24 kHz
                        ...

        Needs live.py and voice.py. Raises the `Error` of what cannot be had. Functions with `@tool` are called here;
        for other tools a `tool_use` event comes, which a `tool_result` message answers.
        """
        opened = self._async.live(model=model, **fields)
        session = self._portal.call(opened.__aenter__)
        try:
            yield Live(self._portal, session)
        finally:
            if not self._portal.stopped:  # by which it was closed
                self._portal.call(opened.__aexit__, None, None, None)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._async).replace("AsyncClient", "Client")

    def close(self) -> None:
        self._finalizer.detach()
        self._portal.stop(self._async.close)


def _forgotten(client: AsyncClient, portal: _Portal) -> None:
    """A client that nobody closed: at its end, or at the interpreter's, its connections and its thread go too."""
    if portal.started:
        portal.stop(client.close)
        warnings.warn("a vai.Client was not closed", ResourceWarning, stacklevel=2)


# == A model for tests =================================================================================================

Answer: TypeAlias = str | Message | Error | Sequence[Block | Error]


class FakeModel(Direct):
    """A model that answers from a script, for the tests of an application: no key, no network.

        model = FakeModel("Hello!", [vai.tool_use("get_weather", city="Oslo")], vai.RateLimitError("busy"))
        client = vai.Client(engine=model, max_retries=0)
        …
        assert model.calls[0]["messages"][-1]["content"] == "Hi"

    An answer is a text, a list of blocks, a `Message`, an `Error` to be raised (in a list: to break off there), or a
    function of the request's body that returns one. Requests are checked as for the model that they name, the
    history's tool calls and results included. `calls` holds their bodies.
    """

    def __init__(self, *answers: Answer | Callable[[JSON], Answer]) -> None:
        super().__init__(provider_keys=dict.fromkeys(PROVIDERS, "fake"), environ={})
        self.calls: list[JSON] = []
        self._answers = answers

    def parse(self, body: JSON, headers: Mapping[str, str] | None = None) -> MessageRequest:
        model = body.get("model")
        if isinstance(model, str) and model and "/" not in model:  # an alias of some gateway
            self.aliases[model] = f"openai/{model}"
        request = super().parse(body, headers)
        if request.voice:
            raise providers.unsupported("voice", "a FakeModel", param="voice")
        _check_results(request)
        adapter = PROVIDERS[request.provider]
        adapter.encode(request, Credential(Secret("fake")), adapter.base_url, self.max_tokens)
        return request

    async def create(self, request: MessageRequest, keys: Mapping[str, str] | None = None) -> Message:
        events, fault = self._next(request)
        message = providers.accumulate(events)
        if fault:
            fault.begun = bool(events)
            raise fault
        if message is None:
            raise StreamTruncated("the script's answer is empty")
        message._dropped = list(request.dropped)
        return message

    async def open(self, request: MessageRequest, keys: Mapping[str, str] | None = None) -> EventStream:
        events, fault = self._next(request)
        if fault and not events:
            raise fault
        frames = [*map(sse_frame, events), *([b"data: %b\n\n" % providers.dumps(fault.to_wire())] if fault else [])]
        return await EventStream(_Played(frames), GatewayDecoder(), request.dropped).start()

    def _next(self, request: MessageRequest) -> tuple[list[StreamEvent], Error | None]:
        """The events of the next answer, and the error that it ends in."""
        self.calls.append(copy.deepcopy(request.body))
        if len(self.calls) > len(self._answers):
            raise AssertionError(f"the script has {len(self._answers)} answers; this is request {len(self.calls)}")
        answer: Any = self._answers[len(self.calls) - 1]
        if callable(answer):
            answer = answer(request.body)
        if isinstance(answer, Error):
            return [], answer
        build = providers.EventBuilder(request.provider, request.tool_names)
        message = answer if isinstance(answer, Message) else None
        prompt = len(providers.dumps({**request.body, "stream": False})) // 4
        events = build.start(message and message.id, request.model_name, providers.make_usage(prompt))
        for key, block in enumerate(self._content(answer)):
            if isinstance(block, Error):
                return events, block
            events += self._block(build, key, block)
        said = sum(len(providers.dumps(event.to_wire())) for event in events) // 40
        usage = message.usage.to_wire() if message else providers.make_usage(prompt, said)
        stop = (message and message.stop_reason) or "end_turn"
        return [*events, *build.finish(stop, usage, stop_sequence=message.stop_sequence if message else None)], None

    @staticmethod
    def _content(answer: Any) -> list[JSON | Error]:
        """The blocks of an answer. Raises `TypeError` for what is none."""
        if isinstance(answer, str):
            return [text(answer)]
        content = answer.content if isinstance(answer, Message) else answer
        try:
            if not isinstance(content, (list, tuple)):
                raise ValueError
            blocks: list[JSON | Error] = [item if isinstance(item, Error) else _plain(item) for item in content]
            for block in blocks:
                if not isinstance(block, Error):
                    providers.parse_block(block)
        except ValueError:
            raise TypeError(f"an answer is a text, a list of blocks, a Message or an Error; not {answer!r}") from None
        return blocks

    @staticmethod
    def _block(build: EventBuilder, key: int, block: JSON) -> list[StreamEvent]:
        """A block's events, text in words as models send it."""
        events: list[StreamEvent] = []
        match block:
            case {"type": "text", "text": str(said), **rest}:
                for word in re.findall(r"\s*\S+\s*$|\s*\S+|\s+", said):
                    events += build.text(word, key)
                for citation in rest.get("citations") or ():
                    events += build.citation(citation, key)
            case {"type": "thinking", "thinking": str(thoughts), **rest}:
                events += build.open(key, ThinkingText(type="thinking", thinking="", signature=""))
                events += build.thinking(thoughts, key)
                events += build.delta(key, SignatureDelta(rest.get("signature") or ""))
            case {"type": "tool_use", "id": id, "name": str(name), "input": input, **rest}:
                events += build.tool_use(key, id, name, json.dumps(input), **rest)
            case _:
                return build.whole(block)
        return events + build.close(key)


class _Played(Upstream):
    """The bytes of a scripted answer, one event a read."""

    def __init__(self, frames: Iterable[bytes]) -> None:
        self._frames = iter(frames)

    async def chunk(self, patience: float | None = None) -> bytes:
        return next(self._frames, b"")

    def abort(self) -> None:
        pass


def _check_results(request: MessageRequest) -> None:
    """Each call has its result in the turn after it, as every provider demands."""
    turns = request.body["messages"]
    for i, turn in enumerate(turns):
        called = {block["id"] for block in _blocks(turn) if block.get("type") == "tool_use"}
        after = _blocks(turns[i + 1]) if i + 1 < len(turns) else []
        if missing := called - {block.get("tool_use_id") for block in after}:
            raise InvalidRequestError(f"the tool_use {min(missing)} has no result after it", param=f"messages[{i}]")


# == The command line ==================================================================================================


def main(argv: Sequence[str] | None = None) -> None:
    """`vai "prompt" -m MODEL` · `vai chat` · `vai speak` · `vai transcribe` · `vai models` · `vai login gemini-oauth`.

    Exit codes: 0, 1 for an error of a provider or gateway, 2 for usage, 130 for Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    commands = {
        "chat": _chat_command,
        "speak": _speak_command,
        "transcribe": _transcribe_command,
        "models": _models_command,
        "login": _login_command,
    }
    try:
        if argv and argv[0] in commands:
            commands[argv[0]](argv[1:])
        else:
            _prompt_command(argv)
    except Error as fault:
        print(_one_line(fault), file=sys.stderr)
        raise SystemExit(2 if isinstance(fault, InvalidRequestError) and fault.provider is None else 1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of a pipe has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(fault: Error) -> str:
    whose = f"{fault.provider}: " if fault.provider and fault.provider not in fault.message else ""
    return " ".join(f"vai: {whose}{fault}".split())


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is what `--help` is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser(name: str, description: str, **options: Any) -> argparse.ArgumentParser:
    """What asking and chatting have in common."""
    parser = _Parser(prog=name, description=description, **options)
    parser.add_argument("-m", "--model", default=os.environ.get("VAI_MODEL"), help="provider/model ($VAI_MODEL)")
    parser.add_argument("-s", "--system", help="system prompt")
    parser.add_argument("--max-tokens", type=int, metavar="N")
    return parser


def _request_fields(parser: argparse.ArgumentParser, options: argparse.Namespace) -> RequestFields:
    if not options.model:
        parser.error("which model? -m provider/model, or set VAI_MODEL")
    fields: RequestFields = {}
    if options.system:
        fields["system"] = options.system
    if options.max_tokens is not None:
        if options.max_tokens < 1:
            parser.error("max_tokens must be at least 1")
        fields["max_tokens"] = options.max_tokens
    return fields


def _prompt_command(argv: Sequence[str]) -> None:
    parser = _parser(
        "vai",
        "Ask any model. A prompt on the command line, on standard input, or both.",
        epilog="other commands: vai chat · vai speak · vai transcribe · vai models · vai login gemini-oauth",
    )
    parser.add_argument("prompt", nargs="?", help="what to ask")
    parser.add_argument(
        "-a",
        "--attach",
        action="append",
        default=[],
        metavar="FILE",
        help="an image, document, recording … (or its URL)",
    )
    parser.add_argument("--json", action="store_true", help="print the whole message as JSON")
    parser.add_argument("--version", action="version", version=f"vai {__version__}")
    options = parser.parse_args(argv)
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8", "replace")
    prompt = "\n\n".join(part for part in (options.prompt, piped.strip()) if part)
    if not prompt:
        parser.error("there is no prompt")
    fields = _request_fields(parser, options)
    try:
        attached = [attachment(source) for source in options.attach]
    except (OSError, ValueError) as fault:
        parser.error(f"cannot attach: {fault}")
    messages = [{"role": "user", "content": [*attached, text(prompt)] if attached else prompt}]
    with _environment_client() as client:
        if options.json:
            message = client.messages.create(model=options.model, messages=messages, **fields)
            print(json.dumps(message.to_wire(), ensure_ascii=False, indent=2))
            return
        with client.messages.stream(model=options.model, messages=messages, **fields) as stream:
            _print_text(stream.text)


def _print_text(pieces: Iterable[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


_CHAT_HELP = "/model NAME changes the model · /save FILE · /exit or Ctrl-D ends · Ctrl-C stops an answer"


def _chat_command(argv: Sequence[str]) -> None:
    parser = _parser("vai chat", "Talk with a model, line by line.", epilog=_CHAT_HELP)
    parser.add_argument("--load", metavar="FILE", help="go on with a conversation that /save wrote")
    options = parser.parse_args(argv)
    with _environment_client() as client:
        if options.load:
            try:
                chat = client.load_conversation(Path(options.load).read_text("utf-8"))
            except (OSError, ValueError) as fault:
                parser.error(f"cannot load {options.load}: {fault}")
            chat.model = options.model or chat.model
            chat.system = options.system or chat.system
        else:
            fields = _request_fields(parser, options)
            chat = client.conversation(model=options.model, **fields)
        with contextlib.suppress(ImportError):  # arrow keys and history, where the platform has them
            importlib.import_module("readline")
        print(f"{chat.model} · {_CHAT_HELP}", file=sys.stderr)
        while (line := _typed()) is not None and line != "/exit":
            if line.startswith("/"):
                _chat_order(chat, line)
            elif line:
                _chat_turn(chat, line)


def _typed() -> str | None:
    """A line of the user's; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _chat_order(chat: Conversation, line: str) -> None:
    order, _, rest = line.partition(" ")
    if order == "/model" and rest:
        chat.model = rest.strip()
    elif order == "/save" and rest:
        try:
            Path(rest.strip()).write_text(json.dumps(chat.dump(), ensure_ascii=False, indent=1), "utf-8")
        except OSError as fault:
            print(f"vai: cannot save: {fault}", file=sys.stderr)
    else:
        print(_CHAT_HELP, file=sys.stderr)


def _chat_turn(chat: Conversation, line: str) -> None:
    said: list[str] = []
    try:
        with chat.stream(line) as answer:
            _print_text(said.append(piece) or piece for piece in answer.text)  # type: ignore[func-returns-value]
    except Error as fault:
        print(_one_line(fault), file=sys.stderr)
    except KeyboardInterrupt:  # the answer is stopped; the model will know what it had said
        print()
        if text := "".join(said).strip():
            chat.messages.append({"role": "assistant", "content": f"{text} [interrupted]"})


def _speak_command(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="vai speak", description="Read a text aloud, into a sound file.")
    parser.add_argument("text", nargs="?", help="what to say; without it standard input")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="a .wav, .mp3 or .pcm; - is standard output"
    )
    parser.add_argument("--voice", help="an id of the service's")
    parser.add_argument("--language", metavar="CODE")
    parser.add_argument("--speed", type=float, metavar="X", help="1 is usual")
    parser.add_argument("--format", choices=["wav", "mp3", "pcm"], help="if the file's name does not say")
    parser.add_argument("--sample-rate", type=int, metavar="HZ")
    options = parser.parse_args(argv)
    said = options.text if options.text is not None else sys.stdin.buffer.read().decode("utf-8", "replace")
    suffix = Path(options.output).suffix.lower().removeprefix(".")
    form: Any = options.format or (suffix if suffix in ("mp3", "pcm") else "wav")
    names = ("voice", "language", "speed", "sample_rate")
    fields: Any = {name: value for name in names if (value := getattr(options, name)) is not None}
    with _environment_client() as client, _Progress() as progress:
        with client.audio.stream_synthesize(voice.speakable(said), format=form, **fields) as speech:
            pieces = []
            for data in speech:
                pieces.append(data)
                progress.show(f"spoken: {speech.duration:.0f} s")
    spoken = providers.whole_file(b"".join(pieces), form)
    try:
        if options.output == "-":
            sys.stdout.buffer.write(spoken)
        else:
            Path(options.output).write_bytes(spoken)
    except OSError as fault:
        parser.error(f"cannot write {options.output}: {fault.strerror}")


def _transcribe_command(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="vai transcribe", description="Write down what recordings say.")
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="WAV, MP3, FLAC, Ogg, M4A or WebM; - is standard input"
    )
    parser.add_argument("--language", metavar="CODE", help="en if not given")
    parser.add_argument("--json", action="store_true", help="with the times of words, one JSON object a file")
    options = parser.parse_args(argv)
    fields: Any = {"language": options.language} if options.language else {}
    with _environment_client() as client:
        for name in options.files:
            with _Progress() as progress:
                progress.tick(f"transcribing {name}")
                try:
                    source = sys.stdin.buffer.read() if name == "-" else Path(name)
                    heard = client.audio.transcribe(source, timestamps=options.json, **fields)
                except OSError as fault:
                    parser.error(f"cannot read {name}: {fault.strerror}")
            print(json.dumps(heard.to_wire(), ensure_ascii=False) if options.json else heard.text, flush=True)


class _Progress:
    """One line on standard error that changes, on a terminal only, and not before half a second has passed."""

    def __init__(self) -> None:
        self._shown = False
        self._begun = self._last = time.monotonic()
        self._on = sys.stderr is not None and sys.stderr.isatty()
        self._over = threading.Event()
        self._ticker: threading.Thread | None = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        if self._ticker:
            self._ticker.join()
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def show(self, line: str) -> None:
        now = time.monotonic()
        if self._on and now - self._last >= 0.5:
            self._last, self._shown = now, True
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def tick(self, line: str) -> None:
        """Show the line with the seconds that it takes, for as long as it takes."""

        def run() -> None:
            while not self._over.wait(0.5):
                self.show(f"{line}: {time.monotonic() - self._begun:.0f} s")

        if self._on:
            self._ticker = threading.Thread(target=run, name="vai-progress", daemon=True)
            self._ticker.start()


def _models_command(argv: Sequence[str]) -> None:
    _Parser(prog="vai models", description="Providers, and what they can do.").parse_args(argv)
    with _environment_client() as client:
        listed = client.models.list()
    for row in listed.providers:
        able = ", ".join([*row.capabilities, *row.native_tools])
        print(f"{row.id:13} {'ready ' if row.available else 'no key'}  {able}")
    for name, models in listed.aliases.items():
        print(f"{name:13} alias   {models if isinstance(models, str) else ', then '.join(models)}")
    for kind, models in listed.voice.items():
        print(f"{kind:13} speech  {', '.join(models)}")


def _environment_client() -> Client:
    """Through the gateway that VAI_BASE_URL names, if any; else in process."""
    base_url, api_key = os.environ.get("VAI_BASE_URL") or None, os.environ.get("VAI_API_KEY") or None
    if api_key and not base_url:
        raise InvalidRequestError("VAI_API_KEY is a gateway's key: set VAI_BASE_URL too", param="VAI_BASE_URL")
    return Client(base_url=base_url, api_key=api_key)


def _login_command(argv: Sequence[str]) -> None:
    parser = _Parser(prog="vai login", description="Log in to Gemini Code Assist.")
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
