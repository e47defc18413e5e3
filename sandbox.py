"""A local upstream that plays every model provider and the speech service, for first steps without keys and for tests.

    python sandbox.py --port 8099               # prints the environment lines to export

    async with Sandbox() as sandbox:            # a free loopback port
        sandbox.base_urls["anthropic"]          # "http://127.0.0.1:PORT/anthropic"
        request = await sandbox.wait_for(1)     # the first request that came in
        await request.closed.wait()             # the caller hung up before the answer was whole

It answers as the provider does (wire shapes, event order, ids, usage), refuses as the provider does (status, body and
wording) and signs what must come back unaltered (thinking, reasoning items, thought signatures). Any key will do,
except one that starts with `bad`. A model whose name holds `not-exist` or `nonexistent` is not found. The same request
always gets the same answer. It shares no code with the adapters that it is there to test.

The last text of the user may hold directives; what they do not mention is left as it would be without them:

    [say exact text]               the answer, word for word
    [words 500]                    an answer of so many words
    [think some thoughts]          thoughts before the answer; shown where the request asks to see them
    [redacted]                     a redacted thinking block (Anthropic)
    [tool get_weather {"city":"Oslo"}]   a tool call; several make parallel calls; made-up arguments where none are
                                   given; such as are not JSON go out raw where the wire has them as a string
    [search rain in Oslo]          a web search, with sources and citations, where the request offers one
    [code print(2)]                a code execution, where the request offers one
    [cite]                         a citation on the answer, where the wire has one
    [image]                        a picture: Gemini image models, the Responses API's image_generation tool
    [then]                         what follows is for the turn after the tool results: [tool a {}] [then] [say done]
    [refuse] [refuse prompt]       the model declines; Gemini blocks the prompt itself
    [stop max_tokens]              another stop reason: max_tokens, refusal, pause_turn, or the provider's own word
    [error 429 retry_after=7]      an error instead of an answer; also code=... for the OpenAI family
    [error_in_stream 529]          an error after some deltas, in the provider's spelling (the status is optional)
    [break_off]                    the answer ends without its terminal event; a JSON body ends half-way
    [reset]                        the same with a connection reset
    [hang]                         silence after some deltas; without streaming, before the headers
    [slow 0.2]                     seconds between two events
    [wait 3]                       seconds before the headers

Without any: tool results are quoted, structured output gets a minimal valid instance, a tool that is forced or that the
prompt speaks of (`get_weather`: "weather") is called with one,
and anything else gets a short friendly answer.

Speech (Cartesia) is a tone a word (from the command line: real speech where espeak-ng is installed), by which the
sandbox knows the word again when it listens. A text to be spoken may hold [error], [error_in_stream], [break_off],
[reset], [hang], [slow] and [wait] where that is to happen; so may a recording's words hold [error], [hang] and [wait],
and a stream's [error], [break_off] and [reset].

Code Assist login: `/oauth/authorize` sends the browser back with a code at once, `/oauth/token` checks PKCE and issues
tokens. An access token that starts with `new` belongs to an account that has to be onboarded first.

Contents: Requests and refusals · Shapes · Directives · Schema instances · Signatures · Usage · Anthropic ·
Chat Completions (OpenAI, Groq, Cerebras) · Responses · Gemini and Code Assist · OAuth · Cartesia · HTTP · Sandbox ·
Command line
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import collections
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import io
import itertools
import json
import math
import random
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import urllib.parse
import wave
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import web

__all__ = ["Request", "Sandbox", "make_app", "speech"]

Json = dict[str, Any]

# Answers are the same from run to run, so time stands still: 2026-11-23 00:00 UTC.
NOW = 1795392000
NOW_TEXT = "2026-11-23T00:00:00Z"


# == Requests and refusals ===========================================================================================


@dataclass(frozen=True)
class Call:
    """A request as the checks and the renderers see it. `body` is the inner one for Code Assist, `outer` the whole."""

    provider: str
    model: str
    stream: bool
    body: Json
    headers: Mapping[str, str]
    key: str
    outer: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """An error of the provider, in no provider's spelling yet. `retry_after` is in seconds."""

    message: str
    param: str | None = None
    code: str | None = None
    status: int = 400
    reason: str = ""
    retry_after: float | None = None


class Failure(NamedTuple):
    anthropic: str
    google: str
    openai: str
    code: str | None
    message: str


FAILURES = {
    400: Failure("invalid_request_error", "INVALID_ARGUMENT", "invalid_request_error", None, "Bad request"),
    401: Failure("authentication_error", "UNAUTHENTICATED", "invalid_request_error", "invalid_api_key", "Invalid key"),
    402: Failure("billing_error", "FAILED_PRECONDITION", "payment_required", "payment_required", "Payment required"),
    403: Failure("permission_error", "PERMISSION_DENIED", "invalid_request_error", None, "Permission denied"),
    404: Failure("not_found_error", "NOT_FOUND", "invalid_request_error", "model_not_found", "Not found"),
    408: Failure("timeout_error", "DEADLINE_EXCEEDED", "timeout_error", None, "Request timed out"),
    409: Failure("conflict_error", "ABORTED", "invalid_request_error", None, "Conflict"),
    413: Failure(
        "request_too_large", "INVALID_ARGUMENT", "invalid_request_error", None, "Request exceeds the maximum size"
    ),
    422: Failure("invalid_request_error", "INVALID_ARGUMENT", "invalid_request_error", None, "Unprocessable entity"),
    429: Failure("rate_limit_error", "RESOURCE_EXHAUSTED", "requests", "rate_limit_exceeded", "Rate limit reached"),
    498: Failure("api_error", "UNAVAILABLE", "capacity_exceeded", "capacity_exceeded", "Flex tier capacity exceeded"),
    499: Failure("api_error", "CANCELLED", "cancelled", None, "The operation was cancelled."),
    500: Failure("api_error", "INTERNAL", "server_error", None, "Internal server error"),
    502: Failure("api_error", "INTERNAL", "server_error", None, "Bad gateway"),
    503: Failure("overloaded_error", "UNAVAILABLE", "server_error", "server_overloaded", "The model is overloaded."),
    504: Failure("timeout_error", "DEADLINE_EXCEEDED", "server_error", None, "Deadline expired"),
    529: Failure("overloaded_error", "UNAVAILABLE", "server_error", "server_overloaded", "Overloaded"),
}


def failure(status: int) -> Failure:
    return FAILURES.get(status) or FAILURES[500 if status >= 500 else 400]


def digest(*values: Any) -> str:
    """Hex that stands for these values: the source of every id, so that equal requests get equal answers."""
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()


def dicts(value: Any) -> Iterator[tuple[int, Json]]:
    return (
        ((i, item) for i, item in enumerate(value) if isinstance(item, dict)) if isinstance(value, list) else iter(())
    )


def sub(value: Any, *keys: str) -> Json:
    """The object at these keys, {} where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


# == Shapes ==========================================================================================================

# "key:type" with ! for required and ? for nullable; `text` is a string or a list of parts.
TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "str": ("a string", (str,)),
    "int": ("an integer", (int,)),
    "num": ("a number", (int, float)),
    "bool": ("a boolean", (bool,)),
    "list": ("an array", (list,)),
    "strs": ("an array of strings", (list,)),
    "dict": ("an object", (dict,)),
    "text": ("a string or an array", (str, list)),
    "any": ("a value", (object,)),
}


class Fault(NamedTuple):
    what: str  # "unknown", "missing" or "type"
    key: str
    expected: str = ""


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@functools.cache
def shape(spec: str) -> dict[str, tuple[str, bool, bool]]:
    """Key -> (type, required, nullable)."""
    parsed = {}
    for entry in spec.split():
        name, _, kind = entry.partition(":")
        parsed[name] = ((kind or "any").rstrip("!?"), kind.endswith("!"), kind.endswith("?") or kind == "")
    return parsed


def faults(value: Json, spec: str) -> Iterator[Fault]:
    known = shape(spec)
    for key, (_, required, _) in known.items():
        if required and key not in value:
            yield Fault("missing", key)
    for key, item in value.items():
        if key not in known:
            yield Fault("unknown", key)
        elif not fits(item, known[key][0], known[key][2]):
            yield Fault("type", key, TYPES[known[key][0]][0])


def fits(value: Any, kind: str, nullable: bool) -> bool:
    if value is None:
        return nullable or kind == "any"
    if kind == "strs" and isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, TYPES[kind][1]) and not (isinstance(value, bool) and kind in ("int", "num"))


def malformed(schema: Any) -> bool:
    """Whether a JSON Schema is none, as far as a provider would notice before it compiles it."""
    if not isinstance(schema, dict):
        return not isinstance(schema, bool)
    kind, required, enum = schema.get("type", "object"), schema.get("required") or [], schema.get("enum", [None])
    if (
        not fits([kind] if isinstance(kind, str) else kind, "strs", False)
        or not kind
        or not fits(required, "strs", False)
    ):
        return True
    groups = [schema[group] for group in ("anyOf", "oneOf", "allOf") if group in schema]
    if not isinstance(enum, list) or not enum or any(not isinstance(group, list) or not group for group in groups):
        return True
    named = [schema.get(group, {}) for group in ("properties", "$defs", "definitions")]
    if any(not isinstance(group, dict) for group in named):
        return True
    inner = [item for group in named for item in group.values()] + [item for group in groups for item in group]
    inner += [schema["items"]] if "items" in schema else []
    return any(malformed(item) for item in inner)


def open_objects(schema: Any, all_required: bool, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """What constrained decoding cannot take: (context, "additionalProperties" or the property that is not required)."""
    if not isinstance(schema, dict):
        return
    context = "(" + ", ".join(f"'{part}'" for part in path) + ")"
    properties = sub(schema, "properties")
    if schema.get("type") == "object" or properties:
        if schema.get("additionalProperties") is not False:
            yield context, "additionalProperties"
        if all_required:
            yield from ((context, key) for key in properties if key not in (schema.get("required") or []))
    for place, inner in subschemas(schema, path):
        yield from open_objects(inner, all_required, place)


def subschemas(schema: Json, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for group in ("properties", "$defs", "definitions"):
        for name, inner in sub(schema, group).items():
            yield (*path, group, name), inner
    for group in ("anyOf", "allOf"):
        for i, inner in dicts(schema.get(group)):
            yield (*path, group, str(i)), inner
    if "items" in schema:
        yield (*path, "items"), schema["items"]


NOT_STRICT = ("allOf", "oneOf", "not", "if", "patternProperties", "prefixItems", "uniqueItems", "contains")


def strict_words(schema: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """What OpenAI's strict mode says of a schema that uses more of JSON Schema than it knows, or says nothing."""
    if not isinstance(schema, dict):
        return
    context = "(" + ", ".join(f"'{part}'" for part in path) + ")"
    yield from (f"In context={context}, '{word}' is not permitted." for word in NOT_STRICT if word in schema)
    beside = sorted(schema.keys() - {"$ref", "$defs", "definitions"})
    if "$ref" in schema and beside:
        yield f"context={context}, $ref cannot have keywords {{'{beside[0]}'}}."
    if not schema.keys() & {"type", "anyOf", "$ref"}:
        yield f"In context={context}, schema must have a 'type' key."
    if schema.get("type") == "array" and "items" not in schema:
        yield f"In context={context}, array schema missing items."
    for place, inner in subschemas(schema, path):
        yield from strict_words(inner, place)


# == Directives ======================================================================================================


class Turn(NamedTuple):
    """What the caller added between two answers of the model."""

    text: str
    results: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """What a request asks for, in no provider's words. `limit` is in tokens."""

    call: Call
    turns: tuple[Turn, ...]
    tools: dict[str, Json] = field(default_factory=dict)
    forced: str | None = None
    one_call: bool = False
    schema: Json | None = None
    thinks: bool = False
    limit: int | None = None
    stops: tuple[str, ...] = ()
    offers: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Step:
    """One piece of an answer: say, think, redacted, tool, search, code or image."""

    kind: str
    text: str = ""
    name: str = ""
    cited: bool = False


@dataclass(frozen=True)
class Script:
    """What to answer, and how the answer is to go wrong. `wait` and `slow` are in seconds."""

    steps: tuple[Step, ...]
    stop: str = "end_turn"
    stop_sequence: str | None = None
    error: Refusal | None = None
    ending: str = ""
    broken: Refusal = Refusal("Overloaded", status=529)
    wait: float = 0.0
    slow: float = 0.0


STEPS = ("say", "words", "think", "redacted", "tool", "search", "code", "image")
ENDINGS = ("error_in_stream", "break_off", "reset", "hang")
DIRECTIVES = (*STEPS, *ENDINGS, "cite", "refuse", "stop", "error", "slow", "wait", "then")
OPENING = re.compile(r"\[(" + "|".join(DIRECTIVES) + r")(?=[\s\]])")
WORD = re.compile(r"\w+|[^\w\s]")
PIECE = re.compile(r"\s*\S+|\s+$")
PANGRAM = ("the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "then", "takes", "a", "nap.")


def directives(text: str) -> list[tuple[str, str]]:
    """The (name, argument) pairs in a text; an unclosed one is plain text."""
    found, at = [], 0
    while match := OPENING.search(text, at):
        end = closing(text, match.end(), quotes=match[1] == "tool")
        if end < 0:
            break
        found.append((match[1], text[match.end() : end].strip()))
        at = end + 1
    return found


def closing(text: str, at: int, quotes: bool) -> int:
    """Where the bracket that is open at `at` closes; brackets in JSON strings do not count."""
    depth, quoted = 1, False
    while at < len(text):
        char = text[at]
        if quotes and char == '"':
            quoted = not quoted
        elif quoted:
            at += char == "\\"
        else:
            depth += {"[": 1, "]": -1}.get(char, 0)
        if not depth:
            return at
        at += 1
    return -1


def asked(turns: tuple[Turn, ...]) -> tuple[str, int]:
    """The last text of the user, and how many rounds of tool results came after it."""
    for stage, turn in enumerate(reversed(turns)):
        if turn.text.strip():
            return turn.text, stage
    return "", 0


def plan(prompt: Prompt) -> Script:
    """What to answer. Pure: the same prompt gives the same script."""
    text, stage = asked(prompt.turns)
    rounds = re.split(r"\[then\]", text)
    found = directives(rounds[stage]) if stage < len(rounds) else []
    steps = [step for name, argument in found if name in STEPS for step in staged(prompt, name, argument)]
    if not any(step.kind in ("say", "tool", "image") for step in steps):
        steps += fallback(prompt, text)
    if prompt.thinks and not any(step.kind == "think" for step in steps):
        steps.insert(0, Step("think", f"The user wrote {len(WORD.findall(text))} words. A short answer will do."))
    named = dict(found)
    if "cite" in named or any(step.kind == "search" for step in steps):
        steps = [dataclasses.replace(step, cited=step.kind == "say") for step in steps]
    if "refuse" in named:
        steps = [step for step in steps if step.kind == "think"]
    return directed(finished(prompt, steps), named)


def staged(prompt: Prompt, name: str, argument: str) -> Iterator[Step]:
    if name == "words":
        count = int(argument) if argument.isdigit() else 100
        yield Step("say", " ".join(PANGRAM[i % len(PANGRAM)] for i in range(count)))
    elif name == "tool":
        tool, _, arguments = argument.partition(" ")
        yield Step("tool", arguments.strip() or compact(example(prompt.tools.get(tool, {}))), tool)
    elif name in ("search", "code", "image"):
        if name in prompt.offers:
            yield Step(name, argument)
    else:
        yield Step(name, argument)


def forbids_tools(body: Json) -> bool:
    choice, mode = body.get("tool_choice"), sub(body, "toolConfig", "functionCallingConfig").get("mode")
    return choice == "none" or (isinstance(choice, dict) and choice.get("type") == "none") or mode == "NONE"


def mentioned(tools: Mapping[str, Any], text: str) -> str | None:
    """The tool that the words of the prompt ask for: "weather" asks for `get_weather`."""
    words = {word.lower() for word in WORD.findall(text)}
    return next((name for name in tools if words & {part for part in re.split(r"[_-]", name) if len(part) > 4}), None)


def fallback(prompt: Prompt, text: str) -> list[Step]:
    """The answer where no directive says one."""
    results = prompt.turns[-1].results if prompt.turns else ()
    if prompt.forced and not results:
        return [Step("tool", compact(example(prompt.tools.get(prompt.forced, {}))), prompt.forced)]
    if not results and not forbids_tools(prompt.call.body) and (tool := mentioned(prompt.tools, text)):
        return [Step("tool", compact(example(prompt.tools[tool])), tool)]
    if prompt.schema is not None:
        return [Step("say", compact(example(prompt.schema, seed=text)))]
    if "image" in prompt.offers and prompt.call.provider != "oai-resp":
        return [Step("image", text)]
    if results:
        return [Step("say", "The tool says: " + " And: ".join(shorten(result, 60) for result in results))]
    return [Step("say", friendly(prompt.call, text))]


def friendly(call: Call, text: str) -> str:
    if "capital of france" in text.lower():
        return "The capital of France is Paris."
    plain = " ".join(text.split())
    greeting = f"You said: “{shorten(plain, 12)}”." if plain else "Hello!"
    return f"{greeting} I am the sandbox, standing in for {call.model} at {call.provider}: no key, no bill."


def shorten(text: str, words: int) -> str:
    parts = text.split(" ")
    return text if len(parts) <= words else " ".join(parts[:words]) + " …"


def finished(prompt: Prompt, steps: list[Step]) -> Script:
    """Cuts the steps where the limit or a stop sequence ends them, and says why they ended."""
    kept: list[Step] = []
    room = float("inf") if prompt.limit is None else prompt.limit
    for step in steps:
        if step.kind == "tool" and prompt.one_call and any(earlier.kind == "tool" for earlier in kept):
            continue
        stop = first_stop(step.text, prompt.stops) if step.kind == "say" else None
        text = step.text.partition(stop)[0] if stop else step.text
        if len(WORD.findall(text)) > room:
            if step.kind in ("say", "think"):
                kept.append(dataclasses.replace(step, text=head(text, int(room))))
            return Script(tuple(step for step in kept if step.text or step.kind != "say"), "max_tokens")
        kept.append(dataclasses.replace(step, text=text))
        room -= len(WORD.findall(text))
        if stop:
            return Script(tuple(kept), "stop_sequence", stop)
    return Script(tuple(kept), "tool_use" if any(step.kind == "tool" for step in kept) else "end_turn")


def first_stop(text: str, stops: tuple[str, ...]) -> str | None:
    found = [(text.find(stop), stop) for stop in stops if stop and stop in text]
    return min(found)[1] if found else None


def head(text: str, count: int) -> str:
    """The first `count` tokens of a text."""
    ends = [match.end() for match in WORD.finditer(text)][:count]
    return text[: ends[-1]] if ends else ""


def directed(script: Script, named: dict[str, str]) -> Script:
    """The script with what the directives say about its end and its pace."""
    changes: Json = {"ending": next((name for name in ENDINGS if name in named), "")}
    if "refuse" in named:
        changes |= {"stop": "blocked" if named["refuse"] == "prompt" else "refusal"}
    if named.get("stop"):
        changes |= {"stop": named["stop"]}
    if "error" in named:
        changes |= {"error": ordered(named["error"], 500)}
    if "error_in_stream" in named:
        changes |= {"broken": ordered(named["error_in_stream"], 529)}
    for pace in ("wait", "slow"):
        if re.fullmatch(r"\d+(\.\d+)?", named.get(pace, "")):
            changes |= {pace: float(named[pace])}
    return dataclasses.replace(script, **changes)


def ordered(argument: str, default: int) -> Refusal:
    """The error that `429 retry_after=7 code=insufficient_quota` orders."""
    words = argument.split()
    status = int(words[0]) if words and re.fullmatch(r"[45]\d\d", words[0]) else default
    options = dict(word.split("=", 1) for word in words if "=" in word)
    after = options.get("retry_after", "")
    return Refusal(
        failure(status).message,
        code=options.get("code", failure(status).code),
        status=status,
        retry_after=float(after) if re.fullmatch(r"\d+(\.\d+)?", after) else None,
    )


def compact(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # half a surrogate pair stays an escape


def parsed(arguments: str) -> Json:
    """Tool arguments as an object, for the wires that have them as one."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def pieces(text: str) -> list[str]:
    """A text as a model would stream it, word by word."""
    return PIECE.findall(text)


def fragments(text: str, size: int = 9) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


# == Schema instances ================================================================================================

FORMATS = {"date": "2026-11-23", "date-time": NOW_TEXT, "time": "12:00:00", "email": "ada@example.com"}
FORMATS |= {"uri": "https://example.com/", "uuid": "00000000-0000-4000-8000-000000000000", "ipv4": "192.0.2.1"}


def example(schema: Any, seed: str = "") -> Any:
    """A minimal instance of a JSON Schema (or of Gemini's OpenAPI subset), the same for the same seed."""
    return instance(schema, schema, random.Random(seed), "value", 0)


def instance(schema: Any, root: Any, rng: random.Random, name: str, depth: int) -> Any:
    if not isinstance(schema, dict) or depth > 24:
        return f"example {name}"
    if "$ref" in schema:
        return instance(resolve(schema["$ref"], root), root, rng, name, depth + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return rng.choice(schema["enum"])
    for group in ("anyOf", "oneOf"):
        if schema.get(group):
            return instance(schema[group][0], root, rng, name, depth + 1)
    if schema.get("allOf"):
        return instance(merged(schema["allOf"], root), root, rng, name, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = str(kind[0] if isinstance(kind, list) else kind).lower()
    return MAKERS[kind](schema, root, rng, name, depth) if kind in MAKERS else None


def resolve(ref: Any, root: Any) -> Any:
    for part in str(ref).removeprefix("#").strip("/").split("/"):
        if part:
            root = root.get(part.replace("~1", "/").replace("~0", "~"), {}) if isinstance(root, dict) else {}
    return root


def merged(schemas: list[Any], root: Any) -> Json:
    whole: Json = {"type": "object", "properties": {}, "required": []}
    for schema in schemas:
        schema = resolve(schema["$ref"], root) if "$ref" in schema else schema
        whole["properties"] |= sub(schema, "properties")
        whole["required"] += schema.get("required") or []
        whole |= {key: value for key, value in schema.items() if key not in ("properties", "required")}
    return whole


def make_object(schema: Json, root: Any, rng: random.Random, name: str, depth: int) -> Json:
    properties = sub(schema, "properties")
    return {key: instance(properties.get(key), root, rng, key, depth + 1) for key in schema.get("required") or []}


def make_array(schema: Json, root: Any, rng: random.Random, name: str, depth: int) -> list[Any]:
    count = int(schema.get("minItems") or 0)
    return [instance(schema.get("items", {}), root, rng, name, depth + 1) for _ in range(count)]


def make_string(schema: Json, root: Any, rng: random.Random, name: str, depth: int) -> str:
    text = FORMATS.get(str(schema.get("format")), f"example {name}")
    return text.ljust(int(schema.get("minLength") or 0), "x")[: int(schema.get("maxLength") or len(text) + 10**6)]


def make_number(schema: Json, root: Any, rng: random.Random, name: str, depth: int) -> float:
    step = schema.get("multipleOf") or 1
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    number = step
    if low is not None:
        number = -(-low // step) * step
    elif above is not None:
        number = (above // step + 1) * step
    if high is not None and number > high:
        number = high // step * step
    if below is not None and number >= below:
        number = -(-below // step - 1) * step if low is None else low
    return float(number) if isinstance(number, float) and not number.is_integer() else int(number)


MAKERS: dict[str, Callable[[Json, Any, random.Random, str, int], Any]] = {
    "object": make_object,
    "array": make_array,
    "string": make_string,
    "number": make_number,
    "integer": make_number,
    "boolean": lambda *_: True,
}


# == Signatures ======================================================================================================

# Not a secret: it binds a signature to its issuer, and conversations outlive a restart of the sandbox.
SIGNING_KEY = b"vai sandbox"


def sign(provider: str, kind: str, **claims: str) -> str:
    """An opaque token, base64, that only this provider takes back, and only unaltered."""
    payload = json.dumps([provider, kind, claims], separators=(",", ":")).encode()
    packed = zlib.compress(payload)
    return base64.b64encode(hmac.digest(SIGNING_KEY, packed, "sha256")[:16] + packed).decode()


def opened(token: Any, provider: str, kind: str) -> dict[str, str] | None:
    """The claims of a token that this provider issued for this use, else None."""
    try:
        raw = base64.b64decode(str(token), validate=True)
        if not hmac.compare_digest(hmac.digest(SIGNING_KEY, raw[16:], "sha256")[:16], raw[:16]):
            return None
        issuer, use, claims = json.loads(zlib.decompress(raw[16:]))
    except (ValueError, zlib.error):
        return None
    return dict(claims) if (issuer, use) == (provider, kind) else None


# == Usage ===========================================================================================================


@dataclass(frozen=True)
class Usage:
    """Tokens. `input` is everything that went in, `cached` and `written` are parts of it, `thinking` of `output`."""

    input: int
    cached: int
    written: int
    written_1h: int
    output: int
    thinking: int


class Answer(NamedTuple):
    """All that a renderer needs. `seed` is the hex that the ids come from."""

    call: Call
    prompt: Prompt
    script: Script
    usage: Usage
    seed: str


@dataclass(frozen=True)
class Frame:
    """One event of a stream. `delta`: it carries a part of the answer."""

    data: Json
    event: str = ""
    delta: bool = False


Cache = collections.OrderedDict[str, int]


def weight(value: Any) -> int:
    """Tokens of a JSON value; a long run without spaces is media, and counts as one tile."""
    if isinstance(value, str):
        return 258 if len(value) > 2000 and " " not in value[:2000] else len(WORD.findall(value))
    if isinstance(value, dict):
        return sum(weight(item) for item in value.values())
    if isinstance(value, list):
        return sum(weight(item) for item in value)
    return 1


def measured(call: Call, parts: list[tuple[Any, str]], script: Script, cache: Cache) -> Usage:
    """Usage of a request whose prompt is made of `parts`, each with the lifetime ("5m", "1h", "auto") of its mark."""
    total = cached = written = hours = 0
    chain = digest(call.provider, call.model, call.key)
    last = max((i for i, (_, mark) in enumerate(parts) if mark), default=-1)
    for i, (part, mark) in enumerate(parts):
        total += weight(part)
        chain = digest(chain, uncached(part))
        if i <= last and cache.get(chain) == total:
            cached = total
        if mark and (mark != "auto" or total >= 1024):
            hours += max(0, total - max(cached, written)) if mark == "1h" else 0
            written = total
            cache[chain] = total
    while len(cache) > 10_000:
        cache.popitem(last=False)
    thinking = sum(len(WORD.findall(step.text)) for step in script.steps if step.kind == "think")
    output = sum(max(1, len(WORD.findall(step.text + step.name))) for step in script.steps if step.kind != "think")
    return Usage(max(1, total), cached, max(0, written - cached), hours, output + thinking, thinking)


def uncached(value: Any) -> Any:
    """The value without its cache marks, which move from turn to turn and change nothing in the prompt."""
    if isinstance(value, dict):
        return {key: uncached(item) for key, item in value.items() if key != "cache_control"}
    return [uncached(item) for item in value] if isinstance(value, list) else value


SOURCES = (("https://example.com/sandbox", "The sandbox guide"), ("https://example.org/notes", "Notes on fakes"))


@functools.cache
def picture() -> str:
    """A blue square of 8 × 8 pixels, PNG, base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\x30\x60\xc0" * 8) * 8
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    image = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return base64.b64encode(image).decode()


def bearer(headers: Mapping[str, str]) -> str:
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


# == Anthropic =======================================================================================================

ANTHROPIC_VERSIONS = ("2023-06-01", "2026-10-21")
ANTHROPIC_BODY = (
    "model:str! max_tokens:int! messages:list! system:text stop_sequences:strs stream:bool tools:list tool_choice:dict "
    "thinking:dict output_config:dict metadata:dict service_tier:str speed:str? cache_control:dict? container:any "
    "diagnostics:dict? inference_geo:str?"
)
ANTHROPIC_SAMPLING = " temperature:num top_p:num top_k:int"
# Body fields that only exist under a beta header.
ANTHROPIC_BETA = {
    "mcp_servers": "mcp-client",
    "context_management": "context-management",
    "fallbacks": "server-side-fallback",
    "fallback_credit_token": "server-side-fallback",
    "compaction": "compact",
    "output_format": "structured-outputs",
}
ANTHROPIC_BLOCKS = {
    "text": "type:str! text:str! citations:list? cache_control:dict?",
    "image": "type:str! source:dict! cache_control:dict? transformations:dict?",
    "document": "type:str! source:dict! title:str? context:str? citations:dict? cache_control:dict?",
    "search_result": "type:str! source:str! title:str! content:list! citations:dict? cache_control:dict?",
    "thinking": "type:str! thinking:str! signature:str!",
    "redacted_thinking": "type:str! data:str!",
    "tool_use": "type:str! id:str! name:str! input:dict! caller:dict? toolset_name:str? cache_control:dict?",
    "tool_result": "type:str! tool_use_id:str! content:text is_error:bool toolset_name:str? cache_control:dict?",
    "server_tool_use": "type:str! id:str! name:str! input:dict! caller:dict? cache_control:dict?",
    "container_upload": "type:str! file_id:str! cache_control:dict?",
    "mcp_tool_use": "type:str! id:str! name:str! server_name:str! input:dict! cache_control:dict?",
    "mcp_tool_result": "type:str! tool_use_id:str! content:text is_error:bool cache_control:dict?",
}
SERVER_RESULT = "type:str! tool_use_id:str! content:any! caller:dict? cache_control:dict?"
SERVER_RESULTS = ("web_search", "web_fetch", "code_execution", "bash_code_execution", "text_editor_code_execution")
ANTHROPIC_BLOCKS |= {f"{name}_tool_result": SERVER_RESULT for name in (*SERVER_RESULTS, "tool_search", "advisor")}
USER_BLOCKS = ("text", "image", "document", "search_result", "tool_result", "container_upload")
MODEL_BLOCKS = tuple(kind for kind in ANTHROPIC_BLOCKS if kind not in ("image", "search_result", "tool_result"))
BAD_SCHEMA = "JSON schema is invalid. It must match JSON Schema draft 2020-12."
ANTHROPIC_SOURCES = {
    "base64": "type:str! media_type:str! data:str!",
    "url": "type:str! url:str!",
    "text": "type:str! media_type:str! data:str!",
    "content": "type:str! content:text!",
    "file": "type:str! file_id:str!",
}
ANTHROPIC_TOOL = (
    "name:str! input_schema:dict! description:str type:str? strict:bool cache_control:dict? defer_loading:bool "
    "eager_input_streaming:bool? input_examples:list allowed_callers:list"
)
# Tools of Anthropic's own: type prefix -> what the sandbox can play with it.
ANTHROPIC_NATIVE = {
    "web_search_": "search",
    "code_execution_": "code",
    "web_fetch_": "",
    "text_editor_": "",
    "bash_": "",
    "memory_": "",
    "computer_": "",
    "browser_toolset_": "",
    "tool_search_tool_": "",
    "advisor_": "",
    "mcp_toolset": "",
}
# Families, from which version on, the thinking types taken, and whether the model thinks unasked. First match.
CLAUDE_THINKING = (
    ("fable mythos", (0, 0), ("adaptive",), True),
    ("opus", (5, 5), ("adaptive",), True),
    ("sonnet", (5, 5), ("adaptive", "between_tools"), True),
    ("opus sonnet haiku", (5, 0), ("adaptive", "disabled"), True),
    ("opus sonnet haiku", (4, 7), ("adaptive", "disabled"), False),
    ("opus sonnet haiku", (4, 6), ("adaptive", "enabled", "disabled"), False),
    ("", (0, 0), ("enabled", "disabled"), False),
)
EFFORTS = ("low", "medium", "high", "xhigh", "max")


def claude(model: str) -> tuple[str, tuple[int, int]]:
    """Family and version, ("", (3, 0)) for a name that says neither."""
    if match := re.match(r"claude-(opus|sonnet|haiku|fable|mythos)-(\d+)(?:-(\d{1,2})(?!\d))?", model):
        return match[1], (int(match[2]), int(match[3] or 0))
    if match := re.match(r"claude-(\d)(?:[-.](\d))?(?!\d)(?:-(opus|sonnet|haiku))?", model):
        return match[3] or "", (int(match[1]), int(match[2] or 0))
    return "", (3, 0)


def claude_thinking(model: str) -> tuple[tuple[str, ...], bool]:
    family, version = claude(model)
    for families, since, kinds, unasked in CLAUDE_THINKING:
        if not families or (family in families.split() and version >= since):
            return kinds, unasked
    raise AssertionError("the last row takes every model")


def newer(model: str, **since: tuple[int, int]) -> bool:
    """Whether a model's family is named here and it is of this version or later; `new` stands for Fable and Mythos."""
    family, version = claude(model)
    family = "new" if family in ("fable", "mythos") else family
    return family in since and version >= since[family]


def since_46(model: str) -> bool:
    return newer(model, new=(0, 0), opus=(4, 6), sonnet=(4, 6), haiku=(4, 6))


def since_47(model: str) -> bool:
    return newer(model, new=(0, 0), opus=(4, 7), sonnet=(4, 7), haiku=(4, 7))


def binds_prefix(model: str) -> bool:
    return newer(model, new=(5, 1), opus=(5, 5), sonnet=(5, 5), haiku=(5, 5))


def anthropic_error(refusal: Refusal) -> Json:
    error = {"type": failure(refusal.status).anthropic, "message": refusal.message}
    return {"type": "error", "error": error, "request_id": "req_01" + digest(refusal.message)[:22]}


def anthropic_key(headers: Mapping[str, str], query: Mapping[str, str]) -> str:
    return headers.get("x-api-key") or bearer(headers)


def anthropic_access(call: Call) -> Iterator[Refusal]:
    if not call.key:
        yield Refusal("x-api-key header is required", status=401)
    if call.key.startswith("bad"):
        yield Refusal("invalid x-api-key", status=401)
    version = call.headers.get("anthropic-version")
    if version is None:
        yield Refusal("anthropic-version: header is required")
    elif version not in ANTHROPIC_VERSIONS:
        yield Refusal(f'anthropic-version: "{version}" is not a valid version')


def anthropic_faults(path: str, value: Json, spec: str) -> Iterator[Refusal]:
    words = {"unknown": "Extra inputs are not permitted", "missing": "Field required"}
    for fault in faults(value, spec):
        at = f"{path}.{fault.key}" if path else fault.key
        yield Refusal(f"{at}: {words.get(fault.what) or f'Input should be {fault.expected}'}")


def anthropic_check(call: Call) -> Iterator[Refusal]:
    body, betas = call.body, call.headers.get("anthropic-beta", "")
    old = call.headers.get("anthropic-version") == "2023-06-01"
    spec = ANTHROPIC_BODY + (ANTHROPIC_SAMPLING if old else "")
    spec += "".join(f" {key}" for key, beta in ANTHROPIC_BETA.items() if beta in betas)
    yield from anthropic_faults("", body, spec)
    yield from model_check(call, r"claude", f"model: {call.model}")
    if not body["messages"]:
        yield Refusal("messages: at least one message is required")
    yield from anthropic_messages(call, old)
    yield from anthropic_pairs(body["messages"])
    yield from anthropic_tools(call)
    yield from anthropic_thinking(call)
    yield from anthropic_options(call)
    yield from anthropic_signatures(call, "thinking-binding-controls" in betas)


def model_check(
    call: Call, pattern: str, message: str, status: int = 404, param: str | None = None
) -> Iterator[Refusal]:
    if re.search("not-exist|nonexistent", call.model) or not re.match(pattern, call.model):
        yield Refusal(message, param=param, code="model_not_found", status=status)


def blocks(message: Any) -> list[Json]:
    """The content of a message as blocks; a string is one text block."""
    content = message.get("content") if isinstance(message, dict) else message
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [block for _, block in dicts(content)]


def anthropic_messages(call: Call, old: bool) -> Iterator[Refusal]:
    messages = call.body["messages"]
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            yield Refusal(f"messages.{i}: Input should be a valid dictionary")
        yield from anthropic_faults(f"messages.{i}", message, "role:str! content:text!")
        role = message["role"]
        if role not in ("user", "assistant", "system"):
            yield Refusal(f"messages.{i}.role: Input should be 'user', 'assistant' or 'system'")
        final = i == len(messages) - 1 and role == "assistant"
        if not message["content"] and not final:
            yield Refusal(
                f"messages.{i}: all messages must have non-empty content except for the optional final assistant "
                "message"
            )
        if isinstance(message["content"], list):
            for j, block in enumerate(message["content"]):
                yield from anthropic_block(f"messages.{i}.content.{j}", block, role, old)
        texts = [block.get("text", "") for block in blocks(message) if block.get("type") == "text"]
        if texts and not any(text.strip() for text in texts) and len(texts) == len(blocks(message)) and not final:
            yield Refusal("messages: text content blocks must contain non-whitespace text")
        if final and texts and texts[-1] != texts[-1].rstrip():
            yield Refusal("messages: final assistant content cannot end with trailing whitespace")
    if messages[0]["role"] == "assistant":
        yield Refusal('messages: first message must use the "user" role')
    for i, block in enumerate(blocks(call.body.get("system"))):
        yield from anthropic_block(f"system.{i}", block, "system", old)


def anthropic_block(path: str, block: Any, role: str, old: bool) -> Iterator[Refusal]:
    kind = str(sub(block).get("type"))
    if kind not in ANTHROPIC_BLOCKS:
        tags = ", ".join(f"'{tag}'" for tag in USER_BLOCKS)
        yield Refusal(f"{path}: Input tag '{kind}' found using 'type' does not match any of the expected tags: {tags}")
    allowed = {"user": USER_BLOCKS, "assistant": MODEL_BLOCKS, "system": ("text",)}[role]
    if kind not in allowed:
        home = "user" if kind in USER_BLOCKS else "assistant"
        yield Refusal(f"{path.partition('.content')[0]}: `{kind}` blocks can only be in `{home}` messages")
    yield from anthropic_faults(f"{path}.{kind}", block, ANTHROPIC_BLOCKS[kind])
    if kind == "text" and not block["text"]:
        yield Refusal(f"{path}: text content blocks must be non-empty")
    if kind == "text" and role == "user" and block.get("citations") and not old:
        yield Refusal(f"{path}.text.citations: Extra inputs are not permitted")
    if kind == "document" and role == "assistant" and not old:
        yield Refusal(f"{path}: `document` blocks can only be in `user` messages")
    if kind in ("image", "document"):
        yield from anthropic_source(f"{path}.{kind}.source", block["source"])
    pattern = r"srvtoolu_[a-zA-Z0-9_]+" if kind == "server_tool_use" else r"[a-zA-Z0-9_-]+"
    for key in ("id", "tool_use_id"):
        if (
            key in block
            and kind in ("tool_use", "tool_result", "server_tool_use")
            and not re.fullmatch(pattern, block[key])
        ):
            yield Refusal(f"{path}.{kind}.{key}: String should match pattern '^{pattern}$'")
    if kind == "tool_use" and not 1 <= len(block["name"]) <= 200:
        yield Refusal(f"{path}.tool_use.name: String should have at least 1 character and at most 200 characters")
    if kind == "tool_result" and isinstance(block.get("content"), list):
        for k, inner in enumerate(block["content"]):
            if sub(inner).get("type") not in ("tool_reference", "browser_state"):
                yield from anthropic_block(f"{path}.tool_result.content.{k}", inner, "user", old)


def anthropic_source(path: str, source: Json) -> Iterator[Refusal]:
    kind = str(source.get("type"))
    if kind not in ANTHROPIC_SOURCES:
        tags = ", ".join(f"'{tag}'" for tag in ANTHROPIC_SOURCES)
        yield Refusal(f"{path}: Input tag '{kind}' found using 'type' does not match any of the expected tags: {tags}")
    yield from anthropic_faults(f"{path}.{kind}", source, ANTHROPIC_SOURCES[kind])
    media = "image" if ".image." in path else "document"
    types = {"image": r"image/(jpeg|png|gif|webp)", "document": "application/pdf"}[media]
    if kind == "base64" and not re.fullmatch(types, source["media_type"]):
        yield Refusal(f"{path}.base64.media_type: Input should match '{types}'")
    if kind == "base64" and not is_base64(source["data"]):
        yield Refusal(f"{path}.base64.data: invalid base64 data")


def is_base64(data: str) -> bool:
    try:
        return bool(base64.b64decode(data, validate=True))
    except binascii.Error:
        return False


def merged_turns(messages: list[Json]) -> list[tuple[str, int, list[Json]]]:
    """(role, index of the first message, blocks) per turn: consecutive messages of a role are one turn."""
    turns: list[tuple[str, int, list[Json]]] = []
    for i, message in dicts(messages):
        if message["role"] == "system":
            continue
        if turns and turns[-1][0] == message["role"]:
            turns[-1][2].extend(blocks(message))
        else:
            turns.append((message["role"], i, blocks(message)))
    return turns


def of(kind: str, items: Iterable[Json], key: str) -> list[str]:
    return [str(item.get(key)) for item in items if item.get("type") == kind]


def anthropic_pairs(messages: list[Json]) -> Iterator[Refusal]:
    """Every tool_use answered once, first thing in the next user turn, and nothing else answered."""
    turns = merged_turns(messages)
    seen: set[str] = set()
    for (role, i, content), (_, _, after) in zip(turns, [*turns[1:], ("", 0, [])], strict=False):
        calls = of("tool_use", content, "id")
        if role == "user" and i == 0:
            yield from orphans(i, of("tool_result", content, "tool_use_id"), [])
        if role != "assistant":
            continue
        yield from orphans(i + 1, of("tool_result", after, "tool_use_id"), calls)
        if len(set(calls)) < len(calls) or seen & set(calls):
            yield Refusal(f"messages.{i}: `tool_use` ids must be unique")
        seen |= set(calls)
        leading = [
            block for n, block in enumerate(after) if all(b.get("type") == "tool_result" for b in after[: n + 1])
        ]
        missing = [name for name in calls if name not in of("tool_result", leading, "tool_use_id")]
        if missing:
            yield Refusal(
                f"messages.{i}: `tool_use` ids were found without `tool_result` blocks immediately after: "
                f"{', '.join(missing)}. Each `tool_use` block must have a corresponding `tool_result` block in the "
                "next message."
            )
        yield from unfinished(i, content, last=not after)


def orphans(i: int, results: list[str], calls: list[str]) -> Iterator[Refusal]:
    for result in results:
        if result not in calls:
            yield Refusal(
                f"messages.{i}.content.0: unexpected `tool_use_id` found in `tool_result` blocks: {result}. Each "
                "`tool_result` block must have a corresponding `tool_use` block in the previous message."
            )
        if results.count(result) > 1:
            yield Refusal(
                f"messages.{i}.content.1: each tool_use must have a single result. Found multiple `tool_result` blocks "
                f"with id: {result}"
            )


def unfinished(i: int, content: list[Json], last: bool) -> Iterator[Refusal]:
    """Server tools are answered in the same turn, except in one that was paused."""
    answered = {str(block.get("tool_use_id")) for block in content}
    for block in content:
        if block.get("type") == "server_tool_use" and block["id"] not in answered and not last:
            name = block["name"]
            yield Refusal(
                f"messages.{i}: `{name}` tool use with id `{block['id']}` was found without a corresponding "
                f"`{name}_tool_result` block"
            )


def anthropic_tools(call: Call) -> Iterator[Refusal]:
    tools, choice = call.body.get("tools") or [], sub(call.body, "tool_choice")
    names = []
    for i, tool in dicts(tools):
        kind = tool.get("type")
        names.append(str(tool.get("name") or kind))
        if kind in (None, "custom"):
            yield from anthropic_tool(f"tools.{i}.custom", tool)
        elif not str(kind).startswith(tuple(ANTHROPIC_NATIVE)):
            yield Refusal(f"tools.{i}: Input tag '{kind}' found using 'type' does not match any of the expected tags")
    if len(set(names)) < len(names):
        yield Refusal("tools: Tool names must be unique.")
    if not choice:
        return
    kind = choice.get("type")
    if kind not in ("auto", "any", "tool", "none"):
        yield Refusal("tool_choice: Input tag does not match any of the expected tags: 'auto', 'any', 'tool', 'none'")
    extra = " name:str!" if kind == "tool" else ""
    extra += "" if kind == "none" else " disable_parallel_tool_use:bool"
    yield from anthropic_faults(f"tool_choice.{kind}", choice, "type:str!" + extra)
    if not tools and kind != "none":
        yield Refusal("tool_choice may only be specified while providing tools.")
    if kind == "tool" and choice["name"] not in names:
        yield Refusal(f"Tool '{choice['name']}' not found in provided tools")
    if kind in ("any", "tool"):
        if newer(call.model, new=(5, 1), opus=(5, 5), sonnet=(5, 5)):
            yield Refusal('tool_choice: type "tool" and "any" are not supported for this model.')
        if sub(call.body, "thinking").get("type") == "enabled":
            yield Refusal("Thinking may not be enabled when tool_choice forces tool use.")


def anthropic_tool(path: str, tool: Json) -> Iterator[Refusal]:
    yield from anthropic_faults(path, tool, ANTHROPIC_TOOL)
    if not re.fullmatch(r"[a-zA-Z0-9_-]{1,128}", tool["name"]):
        yield Refusal(f"{path}.name: String should match pattern '^[a-zA-Z0-9_-]{{1,128}}$'")
    if malformed(tool["input_schema"]):
        yield Refusal(f"{path}.input_schema: {BAD_SCHEMA}")
    if tool["input_schema"].get("type") != "object":
        yield Refusal(f"{path}.input_schema.type: Input should be 'object'")
    if tool.get("strict") and any(open_objects(tool["input_schema"], False)):
        yield Refusal(f"{path}: For 'object' type, 'additionalProperties' must be explicitly set to false")


def anthropic_thinking(call: Call) -> Iterator[Refusal]:
    body = call.body
    thinking, effort = sub(body, "thinking"), sub(body, "output_config").get("effort")
    kind = thinking.get("type")
    kinds, _ = claude_thinking(call.model)
    if "thinking" in body and kind not in ("enabled", "disabled", "adaptive", "between_tools"):
        tags = "'adaptive', 'between_tools', 'disabled', 'enabled'"
        yield Refusal(
            f"thinking: Input tag '{kind}' found using 'type' does not match any of the expected tags: {tags}"
        )
    if kind == "adaptive" and kind not in kinds:
        yield Refusal("adaptive thinking is not supported on this model")
    if kind and kind not in kinds:
        yield Refusal(
            f'"thinking.type.{kind}" is not supported for this model. Use "thinking.type.{kinds[-1]}" and '
            '"output_config.effort" to control thinking behavior.'
        )
    spec = {
        "enabled": "type:str! budget_tokens:int! display:str?",
        "adaptive": "type:str! display:str? block_binding:dict?",
    }.get(str(kind), "type:str!")
    yield from anthropic_faults(f"thinking.{kind}" if kind else "thinking", thinking, spec if kind else "")
    if thinking.get("display") not in (None, "summarized", "omitted", "updates"):
        yield Refusal(f"thinking.{kind}.display: Input should be 'summarized' or 'omitted'")
    if (
        kind in ("disabled", "between_tools")
        and effort in ("xhigh", "max")
        and newer(call.model, opus=(5, 0), sonnet=(5, 5), haiku=(5, 5))
    ):
        yield Refusal(f'"thinking.type.{kind}" is not supported at effort "{effort}".')
    if kind == "enabled":
        yield from anthropic_budget(body, thinking["budget_tokens"])


def anthropic_budget(body: Json, budget: int) -> Iterator[Refusal]:
    if budget < 1024:
        yield Refusal("thinking.enabled.budget_tokens: Input should be greater than or equal to 1024")
    if budget >= body["max_tokens"]:
        yield Refusal("`max_tokens` must be greater than `thinking.budget_tokens`.")
    if body.get("temperature") not in (None, 1):
        yield Refusal("`temperature` may only be set to 1 when thinking is enabled.")
    turns = merged_turns(body["messages"])
    results = turns and turns[-1][0] == "user" and of("tool_result", turns[-1][2], "tool_use_id")
    if results and len(turns) > 1 and turns[-2][2][0]["type"] not in ("thinking", "redacted_thinking"):
        yield Refusal(
            f"messages.{turns[-2][1]}.content.0.type: Expected `thinking` or `redacted_thinking`, but found "
            f"`{turns[-2][2][0]['type']}`. When `thinking` is enabled, a final `assistant` message must start with a "
            "thinking block (preceeding the lastmost set of `tool_use` and `tool_result` blocks)."
        )


def anthropic_options(call: Call) -> Iterator[Refusal]:
    body, model = call.body, call.model
    config, effort = sub(body, "output_config"), sub(body, "output_config").get("effort")
    yield from anthropic_faults("output_config", config, "effort:str? format:dict? task_budget:dict?")
    if effort and effort not in EFFORTS:
        yield Refusal("output_config.effort: Input should be 'low', 'medium', 'high', 'xhigh' or 'max'")
    if effort and not newer(model, new=(0, 0), opus=(4, 5), sonnet=(4, 6), haiku=(4, 6)):
        yield Refusal("This model does not support the effort parameter.")
    if (effort == "xhigh" and not since_47(model)) or (effort == "max" and not since_46(model)):
        yield Refusal(f"output_config.effort: '{effort}' is not supported for this model.")
    form = sub(config, "format") or sub(body, "output_format")
    yield from anthropic_faults("output_config.format", form, "type:str! schema:dict!" if form else "")
    if form and malformed(form["schema"]):
        yield Refusal(f"output_config.format.schema: {BAD_SCHEMA}")
    if any(open_objects(form.get("schema"), False)):
        yield Refusal(
            "output_config.format.schema: For 'object' type, 'additionalProperties' must be explicitly set to false"
        )
    yield from anthropic_faults("metadata", sub(body, "metadata"), "user_id:str?")
    if body["max_tokens"] < 0:
        yield Refusal("max_tokens: Input should be greater than or equal to 0")
    if len(body.get("stop_sequences") or []) != len([s for s in body.get("stop_sequences") or [] if str(s).strip()]):
        yield Refusal("stop_sequences: each stop sequence must contain non-whitespace")
    if body["messages"][-1]["role"] == "assistant" and since_46(model) and not paused(body["messages"][-1]):
        yield Refusal(
            "This model does not support assistant message prefill. The conversation must end with a user message."
        )
    yield from anthropic_sampling(body, model)


def paused(message: Json) -> bool:
    """An assistant turn that the caller sends back as it is, to continue a loop of server tools."""
    return any(str(block.get("type")).endswith(("_tool_result", "server_tool_use")) for block in blocks(message))


def anthropic_sampling(body: Json, model: str) -> Iterator[Refusal]:
    for key, default in (("temperature", 1), ("top_p", 1), ("top_k", None)):
        if since_47(model) and body.get(key, default) != default:
            yield Refusal(f"`{key}` is deprecated for this model.")
    if not 0 <= body.get("temperature", 1) <= 1:
        yield Refusal("temperature: range: 0..1")
    if newer(model, opus=(4, 5), sonnet=(4, 5), haiku=(4, 5)) and "temperature" in body and "top_p" in body:
        yield Refusal("`temperature` and `top_p` cannot both be specified for this model. Please use only one.")


def prefix(body: Json, until: int) -> str:
    """Hash of what stands before a message: instructions, tools and the messages up to there."""
    system = blocks(body.get("system"))
    earlier = [[message["role"], blocks(message)] for message in body["messages"][:until]]
    return digest(uncached([system, body.get("tools") or [], earlier]))


def anthropic_signatures(call: Call, may_drop: bool) -> Iterator[Refusal]:
    binding = sub(call.body, "thinking", "block_binding").get("prefix_mismatch_behavior")
    bound = binds_prefix(call.model) and not (may_drop and binding == "drop_block")
    for i, message in dicts(call.body["messages"]):
        for j, block in enumerate(blocks(message)):
            at, kind = f"messages.{i}.content.{j}", block.get("type")
            if kind == "web_search_tool_result":
                yield from anthropic_results(at, block)
            if kind not in ("thinking", "redacted_thinking"):
                continue
            claims = opened(block.get("signature") or block.get("data"), "anthropic", kind)
            if claims is None or claims["text"] != digest(block.get("thinking", "")):
                yield Refusal(f"{at}: Invalid signature in {kind} block")
            # A block of another model is dropped without a word.
            elif claims["model"] == call.model and bound and claims["prefix"] != prefix(call.body, i):
                yield Refusal(
                    f"{at}: Invalid signature in thinking block. The block is bound to a different conversation: the "
                    "system prompt, the tools or an earlier message has changed."
                )


def anthropic_results(path: str, block: Json) -> Iterator[Refusal]:
    for i, result in dicts(block.get("content")):
        if opened(result.get("encrypted_content"), "anthropic", "search") is None:
            yield Refusal(f"{path}.web_search_tool_result.content.{i}: Invalid `encrypted_content` in search result")


def anthropic_prompt(call: Call) -> Prompt:
    body = call.body
    choice, thinking = sub(body, "tool_choice"), sub(body, "thinking").get("type")
    tools = {tool["name"]: tool["input_schema"] for _, tool in dicts(body.get("tools")) if "input_schema" in tool}
    native = {
        played
        for _, tool in dicts(body.get("tools"))
        for start, played in ANTHROPIC_NATIVE.items()
        if played and str(tool.get("type")).startswith(start)
    }
    return Prompt(
        call,
        tuple(anthropic_turn(content) for role, _, content in merged_turns(body["messages"]) if role == "user"),
        tools,
        forced={"tool": choice.get("name"), "any": next(iter(tools), None)}.get(str(choice.get("type"))),
        one_call=choice.get("disable_parallel_tool_use") is True,
        schema=sub(body, "output_config", "format").get("schema") or sub(body, "output_format").get("schema"),
        thinks=thinking in ("enabled", "adaptive") or (thinking is None and claude_thinking(call.model)[1]),
        limit=body["max_tokens"],
        stops=tuple(body.get("stop_sequences") or ()),
        offers=frozenset(native),
    )


def anthropic_turn(content: list[Json]) -> Turn:
    texts = [block["text"] for block in content if block.get("type") == "text"]
    results = [
        " ".join(inner.get("text", "") for inner in blocks(block))
        for block in content
        if block.get("type") == "tool_result"
    ]
    return Turn("\n".join(texts), tuple(results))


def anthropic_parts(call: Call) -> list[tuple[Any, str]]:
    """The prompt in the order in which it is cached, with the lifetimes of the cache marks."""
    body = call.body
    whole = [tool for _, tool in dicts(body.get("tools"))] + blocks(body.get("system"))
    whole += [block | {"role": message["role"]} for _, message in dicts(body["messages"]) for block in blocks(message)]
    marks = [sub(block, "cache_control").get("ttl", "5m") if block.get("cache_control") else "" for block in whole]
    if marks and body.get("cache_control"):
        marks[-1] = sub(body, "cache_control").get("ttl", "5m")
    return list(zip(whole, marks, strict=True))


ANTHROPIC_STOPS = {"refusal": "refusal", "blocked": "refusal"}


def anthropic_body(answer: Answer) -> Json:
    script, usage, seed = answer.script, answer.usage, answer.seed
    content = [
        block for i, step in enumerate(script.steps) for block in anthropic_step(answer, step, f"{seed[:20]}{i}")
    ]
    stop = ANTHROPIC_STOPS.get(script.stop, script.stop)
    searches = sum(step.kind == "search" for step in script.steps)
    details = {"type": "refusal", "category": "general_harms", "explanation": "The sandbox was told to decline."}
    container = {"id": f"container_01{seed[:20]}", "expires_at": NOW_TEXT}
    return {
        "id": f"msg_01{seed[:22]}",
        "type": "message",
        "role": "assistant",
        "model": answer.call.model,
        "content": content,
        "stop_reason": stop,
        "stop_sequence": script.stop_sequence,
        "stop_details": details if stop == "refusal" else None,
        "container": container if any(step.kind == "code" for step in script.steps) else None,
        "diagnostics": None,
        "usage": {
            # A search reads its results, which count as input.
            "input_tokens": usage.input - usage.cached - usage.written + 300 * searches,
            "cache_creation_input_tokens": usage.written,
            "cache_read_input_tokens": usage.cached,
            "cache_creation": {
                "ephemeral_5m_input_tokens": usage.written - usage.written_1h,
                "ephemeral_1h_input_tokens": usage.written_1h,
            },
            "output_tokens": usage.output,
            "output_tokens_details": {"thinking_tokens": usage.thinking},
            "server_tool_use": {"web_search_requests": searches, "web_fetch_requests": 0},
            "service_tier": "standard",
            "speed": "standard",
            "inference_geo": "global",
        },
    }


def anthropic_step(answer: Answer, step: Step, name: str) -> list[Json]:
    call = answer.call
    if step.kind == "think":
        return [thought_block(call, step.text)]
    if step.kind == "redacted":
        claims = {"model": call.model, "text": digest(""), "prefix": prefix(call.body, len(call.body["messages"]))}
        return [{"type": "redacted_thinking", "data": sign("anthropic", "redacted_thinking", **claims)}]
    if step.kind == "tool":
        caller = {"type": "direct"}
        return [
            {
                "type": "tool_use",
                "id": f"toolu_01{name}",
                "name": step.name,
                "input": parsed(step.text),
                "caller": caller,
            }
        ]
    if step.kind == "search":
        return searched(step.text, f"srvtoolu_01{name}")
    if step.kind == "code":
        return executed(step.text, f"srvtoolu_01{name}")
    if step.kind == "say":
        citation = cite_document(call) or cite_search(answer) if step.cited else None
        return [{"type": "text", "text": step.text} | ({"citations": [citation]} if citation else {})]
    return []


def thought_block(call: Call, text: str) -> Json:
    display = sub(call.body, "thinking").get("display") or ("omitted" if since_47(call.model) else "summarized")
    shown = "" if display == "omitted" else text
    claims = {"model": call.model, "text": digest(shown), "prefix": prefix(call.body, len(call.body["messages"]))}
    return {"type": "thinking", "thinking": shown, "signature": sign("anthropic", "thinking", **claims)}


def searched(query: str, name: str) -> list[Json]:
    results = [
        {
            "type": "web_search_result",
            "title": title,
            "url": url,
            "encrypted_content": sign("anthropic", "search", url=url),
            "page_age": None,
        }
        for url, title in SOURCES
    ]
    return [
        {"type": "server_tool_use", "id": name, "name": "web_search", "input": {"query": query}},
        {"type": "web_search_tool_result", "tool_use_id": name, "content": results},
    ]


def executed(code: str, name: str) -> list[Json]:
    result = {"type": "bash_code_execution_result", "stdout": "42\n", "stderr": "", "return_code": 0, "content": []}
    return [
        {"type": "server_tool_use", "id": name, "name": "bash_code_execution", "input": {"command": code}},
        {"type": "bash_code_execution_tool_result", "tool_use_id": name, "content": result},
    ]


def cite_document(call: Call) -> Json | None:
    """A citation of the first plain text document that may be cited."""
    content = [block for message in call.body["messages"] for block in blocks(message)]
    documents = [block for block in content if block.get("type") == "document"]
    for i, document in enumerate(documents):
        text = sub(document, "source").get("data", "")
        if sub(document, "citations").get("enabled") and sub(document, "source").get("type") == "text":
            return {
                "type": "char_location",
                "cited_text": text[:40],
                "document_index": i,
                "document_title": document.get("title"),
                "start_char_index": 0,
                "end_char_index": min(40, len(text)),
                "file_id": None,
            }
    return None


def cite_search(answer: Answer) -> Json | None:
    if not any(step.kind == "search" for step in answer.script.steps):
        return None
    url, title = SOURCES[0]
    index = sign("anthropic", "index", url=url)
    location = {"type": "web_search_result_location", "cited_text": title, "encrypted_index": index}
    return location | {"url": url, "title": title}


def anthropic_frames(body: Json, answer: Answer) -> Iterator[Frame]:
    usage = body["usage"]
    first = usage | {
        "input_tokens": answer.usage.input - answer.usage.cached - answer.usage.written,
        "output_tokens": 1,
    }
    for later in ("output_tokens_details", "server_tool_use"):
        first.pop(later)
    blank: Json = {"content": [], "stop_reason": None, "stop_sequence": None, "stop_details": None, "container": None}
    yield Frame({"type": "message_start", "message": body | blank | {"usage": first}})
    for i, block in enumerate(body["content"]):
        yield Frame({"type": "content_block_start", "index": i, "content_block": opening(block)})
        if i == 0:
            yield Frame({"type": "ping"})
        for delta in anthropic_deltas(block):
            yield Frame({"type": "content_block_delta", "index": i, "delta": delta}, delta=True)
        yield Frame({"type": "content_block_stop", "index": i})
    ending = {key: body[key] for key in ("stop_reason", "stop_sequence", "stop_details", "container")}
    shown = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")
    final = {key: usage[key] for key in (*shown, "output_tokens_details", "server_tool_use")}
    yield Frame({"type": "message_delta", "delta": ending, "usage": final})
    yield Frame({"type": "message_stop"})


def opening(block: Json) -> Json:
    """A block as it is before its deltas; results of server tools arrive whole."""
    empty: Json = {"text": "", "thinking": "", "signature": "", "input": {}, "citations": []}
    changing = ("text", "citations", "thinking", "signature", "input")
    return {key: empty[key] if key in changing else value for key, value in block.items()}


def anthropic_deltas(block: Json) -> Iterator[Json]:
    for citation in block.get("citations", []):
        yield {"type": "citations_delta", "citation": citation}
    for piece in pieces(block.get("text", "")):
        yield {"type": "text_delta", "text": piece}
    for piece in pieces(block.get("thinking", "")):
        yield {"type": "thinking_delta", "thinking": piece}
    if "signature" in block:
        yield {"type": "signature_delta", "signature": block["signature"]}
    if "input" in block:
        yield {"type": "input_json_delta", "partial_json": ""}
        for fragment in fragments(compact(block["input"]) if block["input"] else ""):
            yield {"type": "input_json_delta", "partial_json": fragment}


def anthropic_broken(refusal: Refusal, body: Json) -> list[Frame]:
    return [Frame(anthropic_error(refusal))]


# == Chat Completions (OpenAI, Groq, Cerebras) =======================================================================

CHAT_BODY = {
    "openai": (
        "model:str! messages:list! max_completion_tokens:int? max_tokens:int? temperature:num? top_p:num? "
        "frequency_penalty:num? presence_penalty:num? logit_bias:dict? logprobs:bool? top_logprobs:int? n:int? "
        "seed:int? stop stream:bool? stream_options:dict? tools:list tool_choice parallel_tool_calls:bool "
        "response_format:dict reasoning_effort:str? verbosity:str? modalities:list? audio:dict? prediction:dict? "
        "web_search_options:dict service_tier:str? store:bool? metadata:dict? prompt_cache_key:str? "
        "prompt_cache_options:dict prompt_cache_retention:str? safety_identifier:str? moderation:dict? user:str "
        "functions:list function_call"
    ),
    "groq": (
        "model:str! messages:list! max_completion_tokens:int? max_tokens:int? temperature:num? top_p:num? stop "
        "seed:int? stream:bool? stream_options:dict? tools:list? tool_choice parallel_tool_calls:bool? "
        "response_format:dict? reasoning_effort:str? reasoning_format:str? include_reasoning:bool? "
        "service_tier:str? user:str? documents:list? disable_tool_validation:bool citation_options:str? "
        "compound_custom:dict? search_settings:dict? n:int? logprobs:bool? top_logprobs:int? logit_bias:dict? "
        "frequency_penalty:num? presence_penalty:num? metadata:dict? store:bool? functions:list? function_call"
    ),
    "cerebras": (
        "model:str! messages:list! max_completion_tokens:int? max_tokens:int? min_completion_tokens:int? "
        "min_tokens:int? temperature:num? top_p:num? frequency_penalty:num? presence_penalty:num? logit_bias "
        "logprobs:bool? top_logprobs:int? n:int? seed:int? stop stream:bool? stream_options:dict? tools:list? "
        "tool_choice parallel_tool_calls:bool? response_format:dict? reasoning_effort:str? reasoning_format:str? "
        "disable_reasoning:bool? clear_thinking:bool? prediction:dict? prompt_cache_key:str? service_tier:str? "
        "model_parameters:dict? user:str?"
    ),
}
CHAT_ASSISTANT = "role:str! content:text? tool_calls:list name:str"
CHAT_ROLES = {
    "openai": {
        "system": "role:str! content:text! name:str",
        "developer": "role:str! content:text! name:str",
        "user": "role:str! content:text! name:str",
        "assistant": CHAT_ASSISTANT + " refusal:str? audio:dict? function_call:dict?",
        "tool": "role:str! content:text! tool_call_id:str!",
        "function": "role:str! content:str! name:str!",
    },
    "groq": {
        "system": "role:str! content:text!",
        "developer": "role:str! content:text!",
        "user": "role:str! content:text!",
        "assistant": "role:str! content:text? tool_calls:list reasoning:str? function_call:dict?",
        "tool": "role:str! content:text! tool_call_id:str!",
        "function": "role:str! content:str! name:str!",
    },
    "cerebras": {
        "system": "role:str! content:text! name:str?",
        "developer": "role:str! content:text! name:str?",
        "user": "role:str! content:text! name:str?",
        "assistant": CHAT_ASSISTANT + "? reasoning:text?",
        "tool": "role:str! content:text! tool_call_id:str! name:str?",
    },
}
CHAT_PARTS = {
    "text": "type:str! text:str! prompt_cache_breakpoint:dict",
    "image_url": "type:str! image_url:dict! prompt_cache_breakpoint:dict",
    "input_audio": "type:str! input_audio:dict! prompt_cache_breakpoint:dict",
    "file": "type:str! file:dict! prompt_cache_breakpoint:dict",
    "refusal": "type:str! refusal:str!",
    "document": "type:str! document:dict!",
}
# Which parts a role may hold; only text where nothing is said.
CHAT_ROLE_PARTS = {
    ("openai", "user"): ("text", "image_url", "input_audio", "file"),
    ("openai", "assistant"): ("text", "refusal"),
    ("groq", "user"): ("text", "image_url", "document"),
    ("groq", "tool"): ("text", "image_url", "document"),
    ("cerebras", "user"): ("text", "image_url"),
    ("cerebras", "system"): ("text", "image_url"),
}
# An assistant message needs one of these.
CHAT_SUBSTANCE = ("content", "tool_calls", "function_call", "refusal", "audio", "reasoning")
GROQ_NATIVE = {"browser_search": "search", "code_interpreter": "code", "mcp": ""}
# Reasoning models of OpenAI: pattern, efforts, the effort when none is given. First match.
OPENAI_EFFORTS = (
    (r"gpt-5.*chat", (), ""),
    (r"(o\d|codex)", ("low", "medium", "high"), "medium"),
    (r"gpt-5\.1", ("none", "low", "medium", "high"), "none"),
    (r"gpt-5\.[234]", ("none", "low", "medium", "high", "xhigh"), "none"),
    (r"gpt-5\.5", ("none", "low", "medium", "high", "xhigh"), "medium"),
    (r"gpt-6-astra|gpt-6\.", ("low", "medium", "high", "xhigh", "max"), "medium"),
    (r"gpt-5\.|gpt-6", ("none", "low", "medium", "high", "xhigh", "max"), "medium"),
    (r"gpt-5", ("minimal", "low", "medium", "high"), "medium"),
)
RESPONSES_ONLY = r".*(-codex|-pro\b|deep-research|computer-use-preview)"
NOT_OPENAI = r"(?!claude-|gemini-)"


def openai_efforts(model: str) -> tuple[tuple[str, ...], str]:
    """The reasoning efforts of a model and its default; none at all for one that does not reason."""
    for pattern, efforts, default in OPENAI_EFFORTS:
        if re.match(pattern, model):
            return efforts, default
    return (), ""


def openai_error(refusal: Refusal) -> Json:
    known = failure(refusal.status)
    kind = "insufficient_quota" if refusal.code == "insufficient_quota" else known.openai
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}}


def groq_error(refusal: Refusal) -> Json:
    error = {"message": refusal.message, "type": failure(refusal.status).openai}
    return {"error": error | ({"code": refusal.code} if refusal.code else {})}


CEREBRAS_TYPES = {429: "too_many_requests_error", 404: "not_found_error", 402: "payment_required_error"}


def cerebras_error(refusal: Refusal) -> Json:
    """Bare, as recorded; under `error` in a stream only."""
    kind = CEREBRAS_TYPES.get(refusal.status, failure(refusal.status).openai)
    code = {400: "wrong_api_format", 429: "request_quota_exceeded", 503: "queue_exceeded"}.get(refusal.status)
    param = refusal.param or ("validation_error" if refusal.status == 400 else None)
    return {"message": refusal.message, "type": kind, "param": param, "code": refusal.code or code}


def openai_broken(refusal: Refusal, body: Json) -> list[Frame]:
    return [Frame(openai_error(refusal))]


def groq_broken(refusal: Refusal, body: Json) -> list[Frame]:
    error = {"message": refusal.message, "type": failure(refusal.status).openai, "status_code": refusal.status}
    return [Frame({"error": error}, event="error")]


def cerebras_broken(refusal: Refusal, body: Json) -> list[Frame]:
    error = cerebras_error(refusal) | {"id": "chatcmpl-" + digest(refusal.message)[:24]}
    return [Frame({"error": error, "status_code": refusal.status})]


def bearer_key(headers: Mapping[str, str], query: Mapping[str, str]) -> str:
    return bearer(headers)


def chat_access(call: Call) -> Iterator[Refusal]:
    if call.key and not call.key.startswith("bad"):
        return
    if call.provider == "groq":
        yield Refusal("Invalid API Key", code="invalid_api_key", status=401)
    if call.provider == "cerebras":
        yield Refusal("Wrong API Key", param="api_key", code="wrong_api_key", status=401)
    if not call.key:
        yield Refusal(
            "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer "
            "auth (i.e. Authorization: Bearer YOUR_KEY).",
            status=401,
        )
    yield Refusal(
        f"Incorrect API key provided: {call.key[:8]}***. You can find your API key at "
        "https://platform.openai.com/account/api-keys.",
        code="invalid_api_key",
        status=401,
    )


def chat_faults(provider: str, path: str, value: Json, spec: str) -> Iterator[Refusal]:
    """What is wrong with the keys of one object, in the words of each of the three."""
    for what, key, expected in faults(value, spec):
        at = f"{path}.{key}" if path else key
        dotted = re.sub(r"\[(\d+)\]", r".\1", at)
        if provider == "cerebras":
            if re.fullmatch(r"messages\.\d+\.\w+", dotted) and "role" in value:
                dotted = dotted.replace(f".{key}", f".{value['role']}.{key}")
            words = {"unknown": "is unsupported", "missing": "is missing"}.get(what, f"must be {expected}")
            yield Refusal(f"{dotted}: property '{dotted}' {words}")
        elif provider == "groq":
            words = {"unknown": "is unsupported", "missing": "is missing"}.get(what, f"must be {expected}")
            where = re.sub(r"\[(\d+)\]", r".\1", path)
            yield Refusal(f"'{where}' : property '{key}' {words}" if path else f"property '{key}' {words}")
        elif what == "unknown":
            words = f"Unknown parameter: '{at}'." if path else f"Unrecognized request argument supplied: {key}"
            yield Refusal(words, param=at if path else None, code="unknown_parameter" if path else None)
        elif what == "missing":
            yield Refusal(f"Missing required parameter: '{at}'.", param=at, code="missing_required_parameter")
        else:
            yield Refusal(f"Invalid type for '{at}': expected {expected}.", param=at, code="invalid_type")


def chat_check(call: Call) -> Iterator[Refusal]:
    body, provider = call.body, call.provider
    yield from chat_faults(provider, "", body, CHAT_BODY[provider])
    missing = f"The model `{call.model}` does not exist or you do not have access to it."
    yield from model_check(call, NOT_OPENAI, missing)
    if provider == "openai" and re.match(RESPONSES_ONLY, call.model):
        yield Refusal(
            "This model is only supported in v1/responses and not in v1/chat/completions.", param="model", status=404
        )
    yield from chat_options(body)
    yield from chat_messages(provider, body["messages"])
    yield from chat_pairs(body["messages"])
    yield from chat_tools(provider, body)
    yield from chat_format(provider, sub(body, "response_format"))
    yield from {"openai": openai_rules, "groq": groq_rules, "cerebras": cerebras_rules}[provider](call)


def chat_options(body: Json) -> Iterator[Refusal]:
    if not body["messages"]:
        yield empty("messages")
    stop = body.get("stop")
    if not (stop is None or isinstance(stop, str) or fits(stop, "strs", False)):
        message = "Invalid type for 'stop': expected a string or an array of strings."
        yield Refusal(message, param="stop", code="invalid_type")
    if isinstance(stop, list) and len(stop) > 4:
        yield Refusal(
            "Invalid 'stop': array too long. Expected an array with maximum length 4, but got an array with length "
            f"{len(stop)} instead.",
            param="stop",
            code="array_above_max_length",
        )
    if body.get("stream_options") is not None and not body.get("stream"):
        yield Refusal(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
        )
    if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
        yield Refusal("Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.")
    if body.get("tools") == []:
        yield empty("tools")
    for key in ("tool_choice", "parallel_tool_calls"):
        if body.get(key) not in (None, "none") and not body.get("tools"):
            yield Refusal(f"Invalid value for '{key}': '{key}' is only allowed when 'tools' are specified.", param=key)


def empty(key: str) -> Refusal:
    message = f"Invalid '{key}': empty array. Expected an array with minimum length 1, but got an empty array instead."
    return Refusal(message, param=key, code="empty_array")


def chat_messages(provider: str, messages: list[Any]) -> Iterator[Refusal]:
    roles = CHAT_ROLES[provider]
    for i, message in enumerate(messages):
        at, role = f"messages[{i}]", str(sub(message).get("role"))
        if role not in roles:
            supported = ", ".join(f"'{name}'" for name in roles)
            yield Refusal(
                f"Invalid value: '{role}'. Supported values are: {supported}.", param=f"{at}.role", code="invalid_value"
            )
        yield from chat_faults(provider, at, message, roles[role])
        if role == "assistant" and all(message.get(key) is None for key in CHAT_SUBSTANCE):
            message_text = "Invalid value for 'content': expected a string, got null."
            yield Refusal(message_text, param=f"{at}.content")
        if isinstance(message.get("content"), list):
            if not message["content"]:
                yield empty(f"{at}.content")
            for j, part in enumerate(message["content"]):
                yield from chat_part(provider, f"{at}.content[{j}]", role, part)
        yield from chat_calls(provider, at, message)


def chat_part(provider: str, at: str, role: str, part: Any) -> Iterator[Refusal]:
    kind, allowed = str(sub(part).get("type")), CHAT_ROLE_PARTS.get((provider, role), ("text",))
    if kind not in allowed:
        supported = ", ".join(f"'{name}'" for name in allowed)
        yield Refusal(
            f"Invalid value: '{kind}'. Supported values are: {supported}.", param=f"{at}.type", code="invalid_value"
        )
    spec = CHAT_PARTS[kind]
    yield from chat_faults(provider, at, part, spec if provider == "openai" else spec.split(" prompt_cache")[0])
    if kind == "image_url":
        yield from chat_faults(provider, f"{at}.image_url", part["image_url"], "url:str! detail:str")
        if provider == "cerebras" and not re.match(r"data:image/(png|jpe?g);base64,", part["image_url"]["url"]):
            yield Refusal(
                "Image URLs are not supported. Send the image as a base64 data URI (png or jpeg).",
                code="wrong_api_format",
            )
        if not re.match(r"(https?://|data:image/[a-z+]+;base64,)", part["image_url"]["url"]):
            yield Refusal("Invalid image URL.", param=f"{at}.image_url.url", code="invalid_image_url")
    if kind == "input_audio":
        audio = part["input_audio"]
        yield from chat_faults(provider, f"{at}.input_audio", audio, "data:str! format:str!")
        if audio["format"] not in ("wav", "mp3") or not is_base64(audio["data"]):
            yield Refusal("Invalid audio data.", param=f"{at}.input_audio", code="invalid_value")
    if kind == "file":
        yield from chat_faults(provider, f"{at}.file", part["file"], "filename:str file_data:str file_id:str")
        if "file_data" in part["file"] and not re.match(r"data:[^;,]+;base64,", part["file"]["file_data"]):
            yield Refusal("Invalid file data: expected a base64-encoded data URL.", param=f"{at}.file.file_data")


def chat_calls(provider: str, at: str, message: Json) -> Iterator[Refusal]:
    calls = message.get("tool_calls")
    if calls == []:
        yield empty(f"{at}.tool_calls")
    for j, call in dicts(calls):
        where = f"{at}.tool_calls[{j}]"
        custom = call.get("type") == "custom" and provider == "openai"
        yield from chat_faults(provider, where, call, f"id:str! type:str! {'custom' if custom else 'function'}:dict!")
        if not custom:
            yield from chat_faults(provider, f"{where}.function", call["function"], "name:str! arguments:str!")
    for key, value in [(f"{at}.tool_call_id", message.get("tool_call_id"))] + [
        (f"{at}.tool_calls[{j}].id", call.get("id")) for j, call in dicts(calls)
    ]:
        if provider == "openai" and len(str(value or "")) > 40:
            yield too_long(key, str(value), 40)


def too_long(key: str, value: str, most: int) -> Refusal:
    return Refusal(
        f"Invalid '{key}': string too long. Expected a string with maximum length {most}, but got a string with length "
        f"{len(value)} instead.",
        param=key,
        code="string_above_max_length",
    )


def chat_pairs(messages: list[Json]) -> Iterator[Refusal]:
    """Tool messages directly after the assistant message that called, one for every call."""
    waiting: list[str] = []
    for i, message in enumerate([*messages, {"role": "end"}]):
        if message["role"] == "tool":
            if message["tool_call_id"] not in waiting:
                yield Refusal(
                    "Invalid parameter: messages with role 'tool' must be a response to a preceeding message with "
                    "'tool_calls'.",
                    param=f"messages.[{i}].role",
                )
            waiting.remove(message["tool_call_id"])
            continue
        if waiting:
            yield Refusal(
                "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
                f"'tool_call_id'. The following tool_call_ids did not have response messages: {', '.join(waiting)}",
                param=f"messages.[{i}].role",
            )
        waiting = [call["id"] for _, call in dicts(message.get("tool_calls"))]


def chat_tools(provider: str, body: Json) -> Iterator[Refusal]:
    names = []
    for i, tool in dicts(body.get("tools")):
        at, kind = f"tools[{i}]", str(tool.get("type"))
        if provider == "groq" and kind in GROQ_NATIVE:
            continue
        if kind not in ("function", "custom") or (kind == "custom" and provider != "openai"):
            yield Refusal(f"Invalid value: '{kind}'. Supported values are: 'function'.", param=f"{at}.type")
        yield from chat_faults(provider, at, tool, f"type:str! {kind}:dict!")
        function = tool[kind]
        spec = "name:str! description:str? " + ("format:dict" if kind == "custom" else "parameters:dict? strict:bool?")
        yield from chat_faults(provider, f"{at}.{kind}", function, spec)
        names.append(function["name"])
        yield from function_rules(f"{at}.function", function["name"], function, provider != "cerebras")
    yield from unique(names)
    choice = body.get("tool_choice")
    if isinstance(choice, str) and choice not in ("none", "auto", "required"):
        yield Refusal(
            f"Invalid value: '{choice}'. Supported values are: 'none', 'auto', and 'required'.", "tool_choice"
        )
    chosen = sub(choice, "function").get("name")
    if chosen is not None and chosen not in names:
        yield Refusal(f"Tool choice '{chosen}' not found in 'tools' parameter.", param="tool_choice")


def unique(names: list[str]) -> Iterator[Refusal]:
    for name in names:
        if names.count(name) > 1:
            yield Refusal(f"Invalid 'tools': function names must be unique, got '{name}' twice.", param="tools")


def function_rules(at: str, name: str, function: Json, all_required: bool) -> Iterator[Refusal]:
    """The name and the strict schema of a function tool."""
    if len(name) > 64:
        yield too_long(f"{at}.name", name, 64)
    if not re.fullmatch(r"[a-zA-Z0-9_-]+", name):
        yield Refusal(
            f"Invalid '{at}.name': string does not match pattern. Expected a string that matches the pattern "
            "'^[a-zA-Z0-9_-]+$'.",
            param=f"{at}.name",
            code="invalid_value",
        )
    if malformed(function.get("parameters") or {}):
        yield Refusal(f"Invalid schema for function '{name}'.", f"{at}.parameters", "invalid_function_parameters")
    if function.get("strict"):
        yield from strict_rules(f"function '{name}'", f"{at}.parameters", function.get("parameters"), all_required)


def strict_rules(what: str, param: str, schema: Any, all_required: bool) -> Iterator[Refusal]:
    code = "invalid_function_parameters" if "function" in what else "invalid_json_schema"
    for context, key in open_objects(schema, all_required):
        words = f"'{key}' is required to be supplied and to be false."
        if key != "additionalProperties":
            words = "'required' is required to be supplied and to be an array including every key in properties. "
            words += f"Missing '{key}'."
        yield Refusal(f"Invalid schema for {what}: In context={context}, {words}", param=param, code=code)
    if all_required:
        for words in strict_words(schema):
            yield Refusal(f"Invalid schema for {what}: {words}", param=param, code=code)


def chat_format(provider: str, form: Json) -> Iterator[Refusal]:
    if not form:
        return
    if form.get("type") not in ("text", "json_object", "json_schema"):
        yield Refusal(f"Invalid value: '{form.get('type')}'.", param="response_format.type", code="invalid_value")
    spec = "type:str! json_schema:dict!" if form["type"] == "json_schema" else "type:str!"
    yield from chat_faults(provider, "response_format", form, spec)
    if form["type"] == "json_schema":
        schema = form["json_schema"]
        at = "response_format.json_schema"
        yield from chat_faults(provider, at, schema, "name:str! description:str schema:dict strict:bool?")
        if malformed(schema.get("schema") or {}):
            yield Refusal(f"Invalid schema for response_format '{schema['name']}'.", param="response_format")
        if schema.get("strict"):
            what = f"response_format '{schema['name']}'"
            yield from strict_rules(what, "response_format", schema.get("schema"), provider != "cerebras")


def openai_rules(call: Call) -> Iterator[Refusal]:
    body, model = call.body, call.model
    efforts, default = openai_efforts(model)
    if re.match(r"gpt-6\.1", model):
        efforts = tuple(effort for effort in efforts if effort != "max")
    effort = body.get("reasoning_effort")
    yield from effort_rules("reasoning_effort", effort, efforts)
    if not efforts:
        return
    if body.get("max_tokens") is not None:
        yield unsupported("max_tokens", "Use 'max_completion_tokens' instead.")
    reasons = (effort or default) != "none"
    yield from sampling_rules(body, reasons)
    if re.match(r"o3|o4-mini", model) and body.get("stop") is not None:
        yield unsupported("stop")
    if body.get("tools") and reasons and re.match(r"gpt-(5\.[4-9]|6)", model):
        remedy = " or set reasoning_effort to 'none'" if "none" in efforts else ""
        yield Refusal(
            f"Function tools with reasoning_effort are not supported for {model} in /v1/chat/completions. To use "
            f"function tools, use /v1/responses{remedy}.",
            param="reasoning_effort",
        )


def effort_rules(param: str, effort: str | None, efforts: tuple[str, ...]) -> Iterator[Refusal]:
    if effort is None or effort in efforts:
        return
    if not efforts:
        yield unsupported(param)
    supported = ", ".join(f"'{word}'" for word in efforts)
    yield Refusal(
        f"Unsupported value: '{param}' does not support '{effort}' with this model. Supported values are: {supported}.",
        param=param,
        code="unsupported_value",
    )


def sampling_rules(body: Json, reasons: bool) -> Iterator[Refusal]:
    refused = ("temperature", "top_p", "logprobs", "top_logprobs") if reasons else ()
    for key in (*refused, "presence_penalty", "frequency_penalty", "logit_bias"):
        if body.get(key) is not None:
            yield unsupported(key)


def unsupported(param: str, remedy: str = "") -> Refusal:
    message = f"Unsupported parameter: '{param}' is not supported with this model. {remedy}".strip()
    return Refusal(message, param=param, code="unsupported_parameter")


def groq_rules(call: Call) -> Iterator[Refusal]:
    body, model = call.body, call.model
    effort, form = body.get("reasoning_effort"), body.get("reasoning_format")
    if form is not None and body.get("include_reasoning") is not None:
        yield Refusal("reasoning_format and include_reasoning are mutually exclusive: specify only one of them")
    efforts = groq_efforts(model)
    if effort is not None and effort not in efforts:
        expected = ", ".join(f"`{word}`" for word in efforts) if efforts else "no value"
        yield Refusal(f"`reasoning_effort` must be one of {expected} for model `{model}`", param="reasoning_effort")
    if form is not None and form not in ("hidden", "raw", "parsed"):
        yield Refusal("`reasoning_format` must be one of `hidden`, `raw`, `parsed`", param="reasoning_format")
    if form is not None and ("gpt-oss" in model or not (efforts or "deepseek-r1" in model)):
        yield Refusal(f"reasoning_format is not supported with model `{model}`", param="reasoning_format")
    if form == "raw" and (body.get("tools") or sub(body, "response_format").get("type", "text") != "text"):
        yield Refusal(
            "reasoning_format `raw` is not supported with tool calling or JSON mode", param="reasoning_format"
        )
    if body.get("n") not in (None, 1):
        yield Refusal("'n' : number must be at most 1", param="n")
    for key in ("logprobs", "top_logprobs", "logit_bias", "frequency_penalty", "presence_penalty"):
        if body.get(key):
            yield Refusal(f"`{key}` is not supported with this model", param=key)


def groq_efforts(model: str) -> tuple[str, ...]:
    if "gpt-oss" in model:
        return ("low", "medium", "high")
    if "qwen3" in model:
        return ("none", "default", *(("low", "medium", "high") if "3.8" in model else ()))
    return ()


def cerebras_rules(call: Call) -> Iterator[Refusal]:
    effort, form = call.body.get("reasoning_effort"), call.body.get("reasoning_format")
    if effort not in (None, "none", "low", "medium", "high") or (effort == "none" and "gpt-oss" in call.model):
        yield Refusal(f"reasoning_effort: '{effort}' is not supported by {call.model}: use low, medium or high")
    if form not in (None, "none", "parsed", "text_parsed", "raw", "hidden"):
        yield Refusal(f"reasoning_format: unknown value '{form}'")


def chat_prompt(call: Call) -> Prompt:
    body = call.body
    choice, limit = body.get("tool_choice"), body.get("max_completion_tokens")
    functions = [tool["function"] for _, tool in dicts(body.get("tools")) if "function" in tool]
    tools = {function["name"]: function.get("parameters") or {} for function in functions}
    form, stop = sub(body, "response_format"), body.get("stop")
    schema = sub(form, "json_schema").get("schema") or {} if form.get("type", "text") != "text" else None
    return Prompt(
        call,
        chat_turns(body["messages"]),
        tools,
        forced=sub(choice, "function").get("name") or (next(iter(tools), None) if choice == "required" else None),
        one_call=body.get("parallel_tool_calls") is False,
        schema={"type": "object", **schema} if schema is not None else None,
        thinks=chat_thinks(call),
        limit=limit if limit is not None else body.get("max_tokens"),
        stops=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        offers=chat_offers(call),
    )


def chat_turns(messages: list[Json]) -> tuple[Turn, ...]:
    turns = [Turn("")]
    for message in messages:
        text = " ".join(part.get("text", "") for part in blocks(message))
        if message["role"] == "assistant":
            turns.append(Turn(""))
        elif message["role"] == "tool":
            turns[-1] = Turn(turns[-1].text, (*turns[-1].results, text))
        elif message["role"] == "user":
            turns[-1] = Turn(f"{turns[-1].text}\n{text}".strip(), turns[-1].results)
    return tuple(turns)


def chat_thinks(call: Call) -> bool:
    body, model = call.body, call.model
    effort = body.get("reasoning_effort")
    if call.provider == "openai":
        efforts, default = openai_efforts(model)
        return bool(efforts) and (effort or default) != "none"
    return bool(re.search("gpt-oss|qwen-?3|deepseek-r1|glm", model)) and not (
        effort == "none" or body.get("disable_reasoning") or "coder" in model
    )


def chat_offers(call: Call) -> frozenset[str]:
    if "search-preview" in call.model or "web_search_options" in call.body:
        return frozenset({"search"})
    if "compound" in call.model:
        return frozenset({"search", "code"})
    return frozenset(GROQ_NATIVE.get(str(tool.get("type")), "") for _, tool in dicts(call.body.get("tools"))) - {""}


def chat_parts(call: Call) -> list[tuple[Any, str]]:
    """The prompt message by message; prefixes of 1024 tokens and more are cached without being asked."""
    whole = [tool for _, tool in dicts(call.body.get("tools"))] + call.body["messages"]
    return [(part, "auto") for part in whole]


def reasoning_place(call: Call) -> str:
    """Where the text of the thoughts goes: "reasoning", "content" (as <think>) or nowhere ("")."""
    body = call.body
    form, model = body.get("reasoning_format"), call.model
    if call.provider == "openai" or body.get("include_reasoning") is False or form in ("hidden", "none"):
        return ""
    if form in ("parsed", "text_parsed") or body.get("include_reasoning"):
        return "reasoning"
    tools_or_json = body.get("tools") or sub(body, "response_format").get("type", "text") != "text"
    raw_by_default = "qwen" in model and not (call.provider == "groq" and tools_or_json)
    return "content" if form == "raw" or raw_by_default else "reasoning"


CHAT_STOPS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "refusal": "content_filter",
    "blocked": "content_filter",
}


def chat_message(answer: Answer) -> Json:
    call, steps = answer.call, answer.script.steps
    place = reasoning_place(call)
    thoughts = " ".join(step.text for step in steps if step.kind == "think")
    said = "".join(step.text for step in steps if step.kind == "say")
    if thoughts and place == "content":
        said = f"<think>\n{thoughts}\n</think>\n\n{said}"
    calls = [step for step in steps if step.kind == "tool"]
    message: Json = {"role": "assistant", "content": said or (None if calls else "")}
    if call.provider == "openai":
        message |= {"refusal": None, "annotations": cite_url(answer, said)}
        if answer.script.stop == "refusal" and answer.prompt.schema is not None:
            message |= {"content": None, "refusal": "I'm sorry, I can't assist with that request."}
    if thoughts and place == "reasoning":
        message |= {"reasoning": thoughts}
    if tools := executed_tools(steps):
        message |= {"executed_tools": tools} if call.provider == "groq" else {}
    if calls:
        message["tool_calls"] = [
            {"id": f"call_{answer.seed[:20]}{i}", "type": "function", "function": {"name": c.name, "arguments": c.text}}
            for i, c in enumerate(calls)
        ]
    return message


def cite_url(answer: Answer, said: str) -> list[Json]:
    if "search" not in answer.prompt.offers or not any(step.cited for step in answer.script.steps):
        return []
    url, title = SOURCES[0]
    place = {"start_index": 0, "end_index": len(said), "url": url, "title": title}
    return [{"type": "url_citation", "url_citation": place}]


def executed_tools(steps: tuple[Step, ...]) -> list[Json]:
    tools: list[Json] = []
    for step in steps:
        if step.kind == "search":
            found = [{"title": title, "url": url, "content": title, "score": 0.9} for url, title in SOURCES]
            tools.append(
                {"type": "search", "arguments": compact({"query": step.text}), "search_results": {"results": found}}
            )
        if step.kind == "code":
            results = [{"text": "42\n"}]
            tools.append({"type": "python", "arguments": compact({"code": step.text}), "code_results": results})
    return [{"index": i, "output": "done", **tool} for i, tool in enumerate(tools)]


def chat_body(answer: Answer) -> Json:
    call, seed = answer.call, answer.seed
    message = chat_message(answer)
    stop = CHAT_STOPS.get(answer.script.stop, answer.script.stop)
    if stop == "content_filter" and (message.get("refusal") or call.provider == "groq"):
        stop = "stop"
        if call.provider == "groq":
            message["content"] = "I'm sorry, but I can't help with that."
    choice: Json = {"index": 0, "message": message, "finish_reason": stop}
    if call.provider != "cerebras":
        choice["logprobs"] = None
    body = {"id": f"chatcmpl-{seed[:29]}", "object": "chat.completion", "created": NOW, "model": call.model}
    body |= {"choices": [choice], "usage": chat_usage(answer), "system_fingerprint": f"fp_{seed[:10]}"}
    if call.provider == "groq":
        return body | {"service_tier": "on_demand", "x_groq": {"id": f"req_{seed[:26]}", "seed": 42}}
    if call.provider == "cerebras":
        return body | {"time_info": TIME_INFO}
    return body | {"service_tier": "default"}


TIME_INFO = {
    "queue_time": 0.001,
    "prompt_time": 0.002,
    "completion_time": 0.03,
    "total_time": 0.04,
    "created": float(NOW),
}


def chat_usage(answer: Answer) -> Json:
    usage, provider = answer.usage, answer.call.provider
    reasoning = {"reasoning_tokens": usage.thinking}
    rejected = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    counts: Json = {"prompt_tokens": usage.input, "completion_tokens": usage.output}
    counts |= {"total_tokens": usage.input + usage.output, "prompt_tokens_details": {"cached_tokens": usage.cached}}
    if provider == "groq":
        times = {key: TIME_INFO[key] for key in ("queue_time", "prompt_time", "completion_time", "total_time")}
        return counts | times | {"completion_tokens_details": reasoning}
    if provider == "cerebras":
        return counts | {"completion_tokens_details": reasoning | rejected}
    written = usage.written if re.match(r"gpt-5\.[6-9]|gpt-6", answer.call.model) else None
    counts["prompt_tokens_details"] |= {"audio_tokens": 0, "cache_write_tokens": written}
    return counts | {"completion_tokens_details": reasoning | rejected | {"audio_tokens": 0}}


def chat_frames(body: Json, answer: Answer) -> Iterator[Frame]:
    provider = answer.call.provider
    message, stop = body["choices"][0]["message"], body["choices"][0]["finish_reason"]
    base = {key: body[key] for key in ("id", "created", "model", "system_fingerprint")}
    base |= {"object": "chat.completion.chunk"}
    usage = body["usage"]
    asked_for = sub(answer.call.body, "stream_options").get("include_usage") is True
    extra: Json = {"usage": None} if provider == "openai" and asked_for else {}
    extra |= {"service_tier": "default"} if provider == "openai" else {}

    def chunk(delta: Json, finish: str | None = None, **more: Any) -> Json:
        choice: Json = {"index": 0, "delta": delta}
        if provider != "cerebras" or finish:
            choice["finish_reason"] = finish
        if provider != "cerebras":
            choice["logprobs"] = None
        return base | extra | {"choices": [choice]} | more

    silent = provider == "groq" and message.get("tool_calls")
    first: Json = {"role": "assistant", "content": None if silent else ""}
    first |= {"refusal": None} if provider == "openai" else {}
    opened_by = {"x_groq": body["x_groq"]} if provider == "groq" else {}
    yield Frame(chunk(first) | opened_by)
    for delta in chat_deltas(provider, message):
        yield Frame(chunk(delta), delta=True)
    if provider == "groq":
        yield Frame(chunk({}, stop, usage=usage, x_groq={"id": body["x_groq"]["id"], "usage": usage}))
    elif provider == "cerebras":
        yield Frame(chunk({}, stop, usage=usage, time_info=TIME_INFO))
    else:
        yield Frame(chunk({}, stop))
    if asked_for and provider != "cerebras":
        yield Frame(
            base | ({"service_tier": "default"} if provider == "openai" else {}) | {"choices": [], "usage": usage}
        )


def chat_deltas(provider: str, message: Json) -> Iterator[Json]:
    for key in ("reasoning", "content", "refusal"):
        yield from ({key: piece} for piece in pieces(message.get(key) or ""))
    if message.get("executed_tools"):
        yield {"executed_tools": message["executed_tools"]}
    for i, call in enumerate(message.get("tool_calls", [])):
        if provider != "openai":
            yield {"tool_calls": [{"index": i, **call}]}
            continue
        name = {"name": call["function"]["name"], "arguments": ""}
        yield {"tool_calls": [{"index": i, "id": call["id"], "type": "function", "function": name}]}
        for fragment in fragments(call["function"]["arguments"]):
            yield {"tool_calls": [{"index": i, "function": {"arguments": fragment}}]}


# == Responses =======================================================================================================

RESPONSES_BODY = (
    "model:str! input:text! instructions:str? max_output_tokens:int? max_tool_calls:int? temperature:num? top_p:num? "
    "top_logprobs:int? tools:list tool_choice parallel_tool_calls:bool? reasoning:dict? text:dict include:list? "
    "store:bool? previous_response_id:str? conversation prompt:dict? background:bool? background_options:dict? "
    "context_management:list? truncation:str? service_tier:str? stream:bool? stream_options:dict? metadata:dict? "
    "prompt_cache_key:str prompt_cache_options:dict prompt_cache_retention:str? safety_identifier:str moderation:dict? "
    "image:dict? access_programs:dict? user:str"
)
RESPONSES_ITEMS = {
    "message": "type:str id:str role:str! content:text! status:str? phase:str?",
    "reasoning": "type:str! id:str summary:list! encrypted_content:str? content:list? status:str?",
    "function_call": (
        "type:str! call_id:str! name:str! arguments:str! id:str? status:str? namespace:str? caller:dict? async:bool?"
    ),
    "function_call_output": "type:str! call_id:str! output:text! id:str? status:str? caller:dict?",
}
# Items that are taken back as they went out.
RESPONSES_OTHER_ITEMS = words(
    "web_search_call file_search_call code_interpreter_call image_generation_call computer_call computer_call_output "
    "shell_call shell_call_output local_shell_call local_shell_call_output apply_patch_call apply_patch_call_output "
    "mcp_call mcp_list_tools mcp_approval_request mcp_approval_response custom_tool_call custom_tool_call_output "
    "compaction configuration_update item_reference tool_search_call tool_search_output additional_tools program"
)
RESPONSES_PARTS = {
    "input_text": "type:str! text:str! prompt_cache_breakpoint:dict?",
    "input_image": "type:str! image_url:str? file_id:str? detail:str prompt_cache_breakpoint:dict?",
    "input_file": "type:str! file_data:str file_id:str? file_url:str filename:str detail:str "
    "prompt_cache_breakpoint:dict?",
    "output_text": "type:str! text:str! annotations:list logprobs:list?",
    "refusal": "type:str! refusal:str!",
}
RESPONSES_FUNCTION = (
    "type:str! name:str! parameters:dict? strict:bool? description:str? defer_loading:bool async:bool "
    "output_schema:dict? allowed_callers:list?"
)
RESPONSES_NATIVE = {
    "web_search": "search",
    "web_search_preview": "search",
    "code_interpreter": "code",
    "image_generation": "image",
} | dict.fromkeys(
    words(
        "file_search computer computer_use_preview mcp shell local_shell apply_patch custom tool_search namespace "
        "programmatic_tool_calling"
    ),
    "",
)
RESPONSES_CHOICES = words(
    "function allowed_tools file_search web_search_preview computer computer_use_preview image_generation "
    "code_interpreter mcp custom apply_patch shell"
)
RESPONSES_INCLUDES = words(
    "reasoning.encrypted_content web_search_call.action.sources web_search_call.results code_interpreter_call.outputs "
    "file_search_call.results message.input_image.image_url computer_call_output.output.image_url "
    "message.output_text.logprobs"
)


def responses_faults(path: str, value: Json, spec: str) -> Iterator[Refusal]:
    for refusal in chat_faults("openai", path, value, spec):
        key = refusal.message.removeprefix("Unrecognized request argument supplied: ")
        unknown = Refusal(f"Unknown parameter: '{key}'.", param=key, code="unknown_parameter")
        yield unknown if key != refusal.message else refusal


def responses_check(call: Call) -> Iterator[Refusal]:
    body = call.body
    yield from responses_faults("", body, RESPONSES_BODY)
    missing = f"The requested model '{call.model}' does not exist."
    yield from model_check(call, NOT_OPENAI, missing, status=400, param="model")
    if body.get("previous_response_id"):
        name = body["previous_response_id"]
        yield Refusal(
            f"Previous response with id '{name}' not found.", "previous_response_id", "previous_response_not_found"
        )
    yield from responses_options(call)
    if isinstance(body["input"], list):
        yield from responses_items(body["input"])
        yield from responses_pairs(body["input"])
        yield from responses_signatures(body)
    yield from responses_tools(body)


def responses_options(call: Call) -> Iterator[Refusal]:
    body = call.body
    if (body.get("max_output_tokens") or 16) < 16:
        yield Refusal(
            "Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 16, but got "
            f"{body['max_output_tokens']} instead.",
            param="max_output_tokens",
            code="integer_below_min_value",
        )
    for i, name in enumerate(body.get("include") or []):
        if name not in RESPONSES_INCLUDES:
            supported = ", ".join(f"'{known}'" for known in RESPONSES_INCLUDES)
            yield Refusal(
                f"Invalid value: '{name}'. Supported values are: {supported}.", f"include[{i}]", "invalid_value"
            )
    reasoning, text = sub(body, "reasoning"), sub(body, "text")
    spec = "effort:str? summary:str? context:str? mode:str? generate_summary:str?"
    yield from responses_faults("reasoning", reasoning, spec)
    efforts, default = openai_efforts(call.model)
    yield from effort_rules("reasoning.effort", reasoning.get("effort"), efforts)
    if efforts:
        yield from sampling_rules(body, (reasoning.get("effort") or default) != "none")
    yield from responses_faults("text", text, "format:dict verbosity:str?")
    form = sub(text, "format")
    if form.get("type", "text") not in ("text", "json_schema", "json_object"):
        yield Refusal(f"Invalid value: '{form['type']}'.", param="text.format.type", code="invalid_value")
    if form.get("type") == "json_schema":
        spec = "type:str! name:str! schema:dict! strict:bool? description:str"
        yield from responses_faults("text.format", form, spec)
        if malformed(form["schema"]):
            yield Refusal(f"Invalid schema for response_format '{form['name']}'.", "text.format.schema")
        if form.get("strict"):
            yield from strict_rules(f"response_format '{form['name']}'", "text.format.schema", form["schema"], True)


def responses_items(items: list[Any]) -> Iterator[Refusal]:
    if not items:
        yield empty("input")
    for i, item in enumerate(items):
        at, kind = f"input[{i}]", str(sub(item).get("type", "message"))
        if kind in RESPONSES_OTHER_ITEMS:
            continue
        if kind not in RESPONSES_ITEMS:
            supported = ", ".join(f"'{name}'" for name in (*RESPONSES_ITEMS, *RESPONSES_OTHER_ITEMS))
            yield Refusal(f"Invalid value: '{kind}'. Supported values are: {supported}.", at, "invalid_value")
        yield from responses_faults(at, sub(item), RESPONSES_ITEMS[kind])
        if kind == "message":
            yield from responses_message(at, item)
        if kind == "function_call_output" and isinstance(item["output"], list):
            for j, part in enumerate(item["output"]):
                yield from responses_part(f"{at}.output[{j}]", part, "user")
        letters = {"message": "msg", "reasoning": "rs", "function_call": "fc"}.get(kind, "")
        if "id" in item and not str(item["id"] or letters).startswith(letters):
            yield Refusal(
                f"Invalid '{at}.id': '{item['id']}'. Expected an ID that begins with '{letters}'.",
                param=f"{at}.id",
                code="invalid_value",
            )
        if len(item.get("call_id", "")) > 64:
            yield too_long(f"{at}.call_id", item["call_id"], 64)


def responses_message(at: str, item: Json) -> Iterator[Refusal]:
    if item["role"] not in ("user", "assistant", "system", "developer"):
        yield Refusal(
            f"Invalid value: '{item['role']}'. Supported values are: 'assistant', 'system', 'developer', and 'user'.",
            param=f"{at}.role",
            code="invalid_value",
        )
    if item.get("phase") not in (None, "commentary", "final_answer"):
        yield Refusal(f"Invalid value: '{item['phase']}'.", param=f"{at}.phase", code="invalid_value")
    if isinstance(item["content"], list):
        for j, part in enumerate(item["content"]):
            yield from responses_part(f"{at}.content[{j}]", part, item["role"])


def responses_part(at: str, part: Any, role: str) -> Iterator[Refusal]:
    allowed = ("output_text", "refusal") if role == "assistant" else ("input_text", "input_image", "input_file")
    kind = str(sub(part).get("type"))
    if kind not in allowed:
        supported = " and ".join(f"'{name}'" for name in allowed)
        yield Refusal(f"Invalid value: '{kind}'. Supported values are: {supported}.", f"{at}.type", "invalid_value")
    yield from responses_faults(at, part, RESPONSES_PARTS[kind])
    image = part.get("image_url")
    if image is not None and not re.match(r"(https?://|data:image/[a-z+]+;base64,)", image):
        yield Refusal(f"Invalid '{at}.image_url'. Expected a valid URL.", f"{at}.image_url", "invalid_value")
    if "file_data" in part and not re.match(r"data:[^;,]+;base64,", part["file_data"]):
        yield Refusal(
            f"Invalid '{at}.file_data'. Expected a base64-encoded data URL.", f"{at}.file_data", "invalid_value"
        )


def responses_pairs(items: list[Json]) -> Iterator[Refusal]:
    """Calls and outputs belong together, and so do a reasoning item and what follows from it."""
    calls = of("function_call", items, "call_id")
    outputs = of("function_call_output", items, "call_id")
    for i, item in enumerate(items):
        earlier = of("function_call", items[:i], "call_id")
        if item.get("type") == "function_call_output" and item["call_id"] not in earlier:
            yield Refusal(f"No tool call found for function call output with call_id {item['call_id']}.", "input")
        if item.get("type") == "reasoning":
            rest = [later for later in items[i + 1 :] if later.get("type") != "reasoning"]
            if not rest or not (rest[0].get("role") == "assistant" or str(rest[0].get("type")).endswith("_call")):
                yield Refusal(
                    f"Item '{item.get('id')}' of type 'reasoning' was provided without its required following item.",
                    "input",
                )
        # The ids say which reasoning an item came from.
        match = re.fullmatch(r"(?:fc|msg)_(a[0-9a-f]{24})\d+", str(item.get("id")))
        if match and not any(str(other.get("id")).startswith(f"rs_{match[1]}") for other in items[:i]):
            yield Refusal(
                f"Item '{item['id']}' of type '{item.get('type', 'message')}' was provided without its required "
                f"'reasoning' item: 'rs_{match[1]}0'.",
                param="input",
            )
    for missing in calls:
        if missing not in outputs:
            yield Refusal(f"No tool output found for function call {missing}.", param="input")


def responses_signatures(body: Json) -> Iterator[Refusal]:
    for _, item in dicts(body["input"]):
        sealed = item.get("encrypted_content")
        if item.get("type") != "reasoning":
            continue
        if sealed is None and body.get("store") is False:
            yield Refusal(
                f"Item with id '{item.get('id')}' not found. Items are not persisted when `store` is set to false. Try "
                "again with `store` set to true, or remove this item from your input.",
                param="input",
                status=404,
            )
        claims = opened(sealed, "oai-resp", "reasoning") if sealed is not None else {"id": item.get("id", "")}
        if claims is None or claims["id"] != item.get("id", ""):
            why = "could not be decrypted or parsed" if claims is None else "item_id did not match the target item id"
            yield Refusal(
                f"The encrypted content {str(sealed)[:4]}...{str(sealed)[-4:]} could not be verified. Reason: "
                f"Encrypted content {why}.",
                code="invalid_encrypted_content",
            )


def responses_tools(body: Json) -> Iterator[Refusal]:
    names: list[str] = []
    for i, tool in dicts(body.get("tools")):
        at, kind = f"tools[{i}]", tool.get("type")
        if kind == "function":
            yield from responses_faults(at, tool, RESPONSES_FUNCTION)
            yield from function_rules(at, tool["name"], tool, True)
            names.append(tool["name"])
        elif not str(kind).startswith(tuple(RESPONSES_NATIVE)):
            supported = ", ".join(f"'{name}'" for name in ("function", *RESPONSES_NATIVE))
            yield Refusal(f"Invalid value: '{kind}'. Supported values are: {supported}.", f"{at}.type", "invalid_value")
        if kind == "code_interpreter" and "container" not in tool:
            yield Refusal(
                f"Missing required parameter: '{at}.container'.", f"{at}.container", "missing_required_parameter"
            )
    yield from unique(names)
    choice = body.get("tool_choice")
    words = ("none", "auto", "required") if isinstance(choice, str) else RESPONSES_CHOICES
    chosen = choice if isinstance(choice, str) else sub(choice).get("type")
    if choice is not None and chosen not in words:
        yield Refusal(f"Invalid value: '{chosen}'.", param="tool_choice", code="invalid_value")
    if chosen == "required" and not body.get("tools"):
        yield Refusal("Tool choice 'required' must be specified with 'tools' parameter.", param="tool_choice")
    if chosen == "function" and sub(choice).get("name") not in names:
        name = sub(choice).get("name")
        yield Refusal(f"Tool choice 'function' named '{name}' not found in 'tools' parameter.", param="tool_choice")


def responses_prompt(call: Call) -> Prompt:
    body = call.body
    choice, form = body.get("tool_choice"), sub(body, "text", "format")
    functions = [tool for _, tool in dicts(body.get("tools")) if tool.get("type") == "function"]
    tools = {tool["name"]: tool.get("parameters") or {} for tool in functions}
    schema = {"type": "object", **(form.get("schema") or {})} if form.get("type", "text") != "text" else None
    efforts, default = openai_efforts(call.model)
    forced = sub(choice).get("name") if sub(choice).get("type") == "function" else None
    return Prompt(
        call,
        responses_turns(body["input"]),
        tools,
        forced=forced or (next(iter(tools), None) if choice == "required" else None),
        one_call=body.get("parallel_tool_calls") is False,
        schema=schema,
        thinks=bool(efforts) and (sub(body, "reasoning").get("effort") or default) != "none",
        limit=body.get("max_output_tokens"),
        offers=frozenset(RESPONSES_NATIVE.get(str(tool.get("type")), "") for _, tool in dicts(body.get("tools")))
        - {""},
    )


def responses_turns(items: str | list[Json]) -> tuple[Turn, ...]:
    if isinstance(items, str):
        return (Turn(items),)
    turns = [Turn("")]
    for item in items:
        text = " ".join(
            part.get("text", "") for part in blocks(item if "content" in item else {"content": item.get("output")})
        )
        if item.get("type") == "function_call_output":
            turns[-1] = Turn(turns[-1].text, (*turns[-1].results, text))
        elif item.get("role") == "user":
            turns[-1] = Turn(f"{turns[-1].text}\n{text}".strip(), turns[-1].results)
        elif turns[-1] != Turn("") and item.get("role") not in ("system", "developer"):
            turns.append(Turn(""))
    return tuple(turns)


def responses_parts(call: Call) -> list[tuple[Any, str]]:
    body = call.body
    items = body["input"] if isinstance(body["input"], list) else [{"role": "user", "content": body["input"]}]
    instructions = [body["instructions"]] if body.get("instructions") else []
    return [(part, "auto") for part in [*(body.get("tools") or []), *instructions, *items]]


def responses_output(answer: Answer) -> list[Json]:
    steps = answer.script.steps
    reasoned = any(step.kind == "think" for step in steps)
    base = ("a" if reasoned else "0") + answer.seed[:24]
    items = [item for i, step in enumerate(steps) if (item := responses_item(answer, step, f"{base}{i}", i))]
    if answer.script.stop == "refusal":
        part = {"type": "refusal", "refusal": "I'm sorry, but I can't help with that."}
        items.append(spoken(answer, part, f"msg_{base}{len(steps)}"))
    return items


def spoken(answer: Answer, part: Json, name: str) -> Json:
    whole = answer.script.stop in ("end_turn", "tool_use", "refusal")
    message: Json = {"type": "message", "id": name, "role": "assistant", "content": [part]}
    message["status"] = "completed" if whole else "incomplete"
    if re.match(r"gpt-5\.3-codex|gpt-5\.[4-9]|gpt-6", answer.call.model):
        message["phase"] = "commentary" if answer.script.stop == "tool_use" else "final_answer"
    return message


def responses_item(answer: Answer, step: Step, name: str, position: int) -> Json | None:
    body = answer.call.body
    include = body.get("include") or []
    if step.kind == "think":
        shown = sub(body, "reasoning").get("summary") or sub(body, "reasoning").get("generate_summary")
        summary = [{"type": "summary_text", "text": step.text}] if shown else []
        sealed = sign("oai-resp", "reasoning", id=f"rs_{name}", model=answer.call.model)
        return {"id": f"rs_{name}", "type": "reasoning", "summary": summary, "encrypted_content": sealed}
    if step.kind == "say":
        annotations = cite_text(answer, step)
        return spoken(
            answer,
            {"type": "output_text", "text": step.text, "annotations": annotations, "logprobs": []},
            f"msg_{name}",
        )
    if step.kind == "tool":
        call_id = f"call_{answer.seed[:20]}{position}"
        item = {"id": f"fc_{name}", "type": "function_call", "status": "completed", "name": step.name}
        return item | {"call_id": call_id, "arguments": step.text}
    if step.kind == "search":
        action: Json = {"type": "search", "query": step.text}
        if "web_search_call.action.sources" in include:
            action["sources"] = [{"type": "url", "url": url} for url, _ in SOURCES]
        return {"id": f"ws_{name}", "type": "web_search_call", "status": "completed", "action": action}
    if step.kind == "code":
        outputs = [{"type": "logs", "logs": "42\n"}] if "code_interpreter_call.outputs" in include else None
        item = {"id": f"ci_{name}", "type": "code_interpreter_call", "status": "completed", "code": step.text}
        return item | {"container_id": f"cntr_{answer.seed[:24]}", "outputs": outputs}
    if step.kind == "image":
        item = {"id": f"ig_{name}", "type": "image_generation_call", "status": "completed", "result": picture()}
        return item | {"output_format": "png"}
    return None


def cite_text(answer: Answer, step: Step) -> list[Json]:
    if not step.cited or "search" not in answer.prompt.offers:
        return []
    url, title = SOURCES[0]
    return [{"type": "url_citation", "start_index": 0, "end_index": len(step.text), "url": url, "title": title}]


def responses_body(answer: Answer) -> Json:
    request, usage, stop = answer.call.body, answer.usage, answer.script.stop
    reason = {"max_tokens": "max_output_tokens", "blocked": "content_filter"}.get(stop, stop)
    incomplete = reason in ("max_output_tokens", "content_filter", "max_messages", "steered")
    failed = {"code": "server_error", "message": "The model failed to generate a response."}
    _, default = openai_efforts(answer.call.model)
    reasoning = {"effort": sub(request, "reasoning").get("effort") or default or None}
    reasoning |= {"summary": sub(request, "reasoning").get("summary")}
    echoed = ("instructions", "max_output_tokens", "max_tool_calls", "previous_response_id", "prompt_cache_key", "user")
    return {
        "id": f"resp_{answer.seed[:48]}",
        "object": "response",
        "created_at": NOW,
        "status": "incomplete" if incomplete else "failed" if stop == "failed" else "completed",
        "background": False,
        "completed_at": NOW,
        "error": failed if stop == "failed" else None,
        "incomplete_details": {"reason": reason} if incomplete else None,
        "model": answer.call.model,
        "output": responses_output(answer),
        "parallel_tool_calls": request.get("parallel_tool_calls") is not False,
        "reasoning": reasoning,
        "safety_identifier": request.get("safety_identifier"),
        "service_tier": "default",
        "store": request.get("store") is not False,
        "temperature": float(request.get("temperature") or 1),
        "text": {"format": {"type": "text"}, "verbosity": "medium"} | sub(request, "text"),
        "tool_choice": request.get("tool_choice") or "auto",
        "tools": [echo_tool(tool) for _, tool in dicts(request.get("tools"))],
        "top_logprobs": 0,
        "top_p": float(request.get("top_p") or 1),
        "truncation": "disabled",
        "usage": {
            "input_tokens": usage.input,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": usage.written},
            "output_tokens": usage.output,
            "output_tokens_details": {"reasoning_tokens": usage.thinking},
            "total_tokens": usage.input + usage.output,
        },
        "metadata": request.get("metadata") or {},
    } | {key: request.get(key) for key in echoed}


def echo_tool(tool: Json) -> Json:
    if tool.get("type") != "function":
        return tool
    return {"description": None, "parameters": None, "strict": True} | tool


def responses_frames(body: Json, answer: Answer) -> Iterator[Frame]:
    """The events in their order, numbered."""
    terminal = {"completed": "response.completed", "failed": "response.failed"}.get(
        body["status"], "response.incomplete"
    )
    for number, frame in enumerate(responses_events(body, terminal)):
        yield dataclasses.replace(frame, data=frame.data | {"sequence_number": number})


def responses_events(body: Json, terminal: str) -> Iterator[Frame]:
    blank: Json = {"status": "in_progress", "completed_at": None, "output": [], "usage": None, "error": None}
    begun = body | blank | {"incomplete_details": None}
    yield Frame({"type": "response.created", "response": begun})
    yield Frame({"type": "response.in_progress", "response": begun})
    for i, item in enumerate(body["output"]):
        yield Frame({"type": "response.output_item.added", "output_index": i, "item": unbegun(item)})
        for name, data, delta in item_events(item):
            where = {"type": f"response.{name}", "item_id": item["id"], "output_index": i}
            yield Frame(where | data, delta=delta)
        yield Frame({"type": "response.output_item.done", "output_index": i, "item": item})
    yield Frame({"type": terminal, "response": body})


def unbegun(item: Json) -> Json:
    """An item as it is announced: encrypted content is not whole yet, a search does not know its query."""
    changes: Json = {"status": "in_progress"} if "status" in item else {}
    if item["type"] == "reasoning":
        changes |= {"summary": [], "encrypted_content": item["encrypted_content"][:24]}
    changes |= {key: empty for key, empty in (("content", []), ("arguments", ""), ("code", "")) if key in item}
    changes |= {"outputs": None} if "outputs" in item else {}
    changes |= {"result": None} if "result" in item else {}
    announced = item | changes
    announced.pop("action", None)
    return announced


Event = tuple[str, Json, bool]


def item_events(item: Json) -> Iterator[Event]:
    kind = item["type"]
    if kind == "message":
        yield from message_events(item["content"][0])
    elif kind == "reasoning":
        for i, part in enumerate(item["summary"]):
            yield from summary_events(part, {"summary_index": i})
    elif kind == "function_call":
        for fragment in fragments(item["arguments"]):
            yield "function_call_arguments.delta", {"delta": fragment, "obfuscation": "x" * (16 - len(fragment))}, True
        yield "function_call_arguments.done", {"arguments": item["arguments"]}, False
    elif kind == "code_interpreter_call":
        yield f"{kind}.in_progress", {}, False
        for piece in pieces(item["code"]):
            yield "code_interpreter_call_code.delta", {"delta": piece}, True
        yield "code_interpreter_call_code.done", {"code": item["code"]}, False
        yield f"{kind}.interpreting", {}, False
        yield f"{kind}.completed", {}, False
    else:
        yield f"{kind}.in_progress", {}, False
        yield f"{kind}.{'searching' if kind == 'web_search_call' else 'generating'}", {}, False
        yield f"{kind}.completed", {}, True


def message_events(part: Json) -> Iterator[Event]:
    at = {"content_index": 0}
    yield (
        "content_part.added",
        at | {"part": part | ({"text": "", "annotations": []} if "text" in part else {"refusal": ""})},
        False,
    )
    if "refusal" in part:
        for piece in pieces(part["refusal"]):
            yield "refusal.delta", at | {"delta": piece}, True
        yield "refusal.done", at | {"refusal": part["refusal"]}, False
    else:
        for piece in pieces(part["text"]):
            padding = "x" * (16 - len(piece) % 16)
            yield "output_text.delta", at | {"delta": piece, "logprobs": [], "obfuscation": padding}, True
        for i, annotation in enumerate(part["annotations"]):
            yield "output_text.annotation.added", at | {"annotation": annotation, "annotation_index": i}, False
        yield "output_text.done", at | {"text": part["text"], "logprobs": []}, False
    yield "content_part.done", at | {"part": part}, False


def summary_events(part: Json, at: Json) -> Iterator[Event]:
    yield "reasoning_summary_part.added", at | {"part": part | {"text": ""}}, False
    for piece in pieces(part["text"]):
        yield "reasoning_summary_text.delta", at | {"delta": piece, "obfuscation": "x" * 8}, True
    yield "reasoning_summary_text.done", at | {"text": part["text"]}, False
    yield "reasoning_summary_part.done", at | {"part": part}, False


def responses_broken(refusal: Refusal, body: Json) -> list[Frame]:
    """As recorded: an event with a nested error, which is not how the documentation has it."""
    failed = {"status": "failed", "error": {"code": "server_error", "message": refusal.message}, "output": []}
    return [
        Frame({"type": "error", "sequence_number": 98, **openai_error(refusal)}),
        Frame({"type": "response.failed", "sequence_number": 99, "response": body | failed}),
    ]


# == Gemini and Code Assist ==========================================================================================

GEMINI_BODY = (
    "contents:list! systemInstruction:dict tools:list toolConfig:dict safetySettings:list generationConfig:dict "
    "cachedContent:str labels:dict modelArmorConfig:dict "
)
GEMINI_TOP = {"gemini": GEMINI_BODY + "model:str serviceTier store:bool continuationToken:str"}
GEMINI_TOP |= {"gemini-oauth": GEMINI_BODY + "sessionId:str"}
CODE_ASSIST = "model:str! project:str user_prompt_id:str request:dict! enabled_credit_types:list"
GEMINI_DATA = {
    "text": None,
    "inlineData": "mimeType:str! data:str! displayName:str",
    "fileData": "mimeType:str fileUri:str! displayName:str",
    "functionCall": "id:str name:str! args:dict",
    "functionResponse": "id:str name:str! response:dict! parts:list scheduling:str willContinue:bool",
    "executableCode": "id:str language:str! code:str!",
    "codeExecutionResult": "id:str outcome:str! output:str",
    "toolCall": None,
    "toolResponse": None,
}
GEMINI_PART = "text:str thought:bool thoughtSignature:str videoMetadata:dict mediaResolution:any partMetadata:dict "
GEMINI_PART += " ".join(f"{key}:dict" for key in GEMINI_DATA if key != "text")
VERTEX_REFUSES = ("toolCall", "toolResponse", "partMetadata")
GEMINI_CONFIG = (
    "temperature:num topP:num topK:num candidateCount:int maxOutputTokens:int stopSequences:strs responseLogprobs:bool "
    "logprobs:int presencePenalty:num frequencyPenalty:num seed:int responseMimeType:str responseSchema:dict "
    "responseJsonSchema:dict responseModalities:list mediaResolution:str speechConfig:dict thinkingConfig:dict "
    "imageConfig:dict enableEnhancedCivicAnswers:bool audioTranscriptionConfig:dict"
)
GEMINI_TOOL = (
    "functionDeclarations:list googleSearch:dict googleSearchRetrieval:dict codeExecution:dict urlContext:dict "
)
GEMINI_TOOL += "fileSearch:dict googleMaps:dict computerUse:dict mcpServers:list"
GEMINI_FUNCTION = (
    "name:str! description:str parameters:dict parametersJsonSchema:dict response:dict responseJsonSchema:dict "
    "behavior:str"
)
GEMINI_NATIVE = {"googleSearch": "search", "googleSearchRetrieval": "search", "codeExecution": "code"}
# Values whose keys are the caller's own.
FREE_FORM = ("args", "response", "parameters", "parametersJsonSchema", "responseSchema", "responseJsonSchema", "labels")
REPEATED = ("contents", "parts", "tools", "functionDeclarations", "safetySettings")
ANY_SIGNATURE = ("skip_thought_signature_validator", "context_engineering_is_the_way_to_go")
THOUGHTLESS = re.compile(r"gemini-(1|2\.0)|gemini-2\.5-flash-image|.*tts|gemma")


def gemini_version(model: str) -> tuple[int, int]:
    match = re.match(r"gemini-(\d+)(?:\.(\d+))?", model)
    return (int(match[1]), int(match[2] or 0)) if match else (3, 5)


def camel(value: Any) -> Any:
    """What the service makes of JSON: keys of both spellings, null as absent, a single object as a list of one."""
    if isinstance(value, list):
        return [camel(item) for item in value]
    if not isinstance(value, dict):
        return value
    given = {re.sub(r"_([a-z])", lambda match: match[1].upper(), key): item for key, item in value.items()}
    given = {key: [item] if key in REPEATED and isinstance(item, dict) else item for key, item in given.items()}
    return {key: item if key in FREE_FORM else camel(item) for key, item in given.items() if item is not None}


def standard(data: str) -> str:
    """Base64 in the usual alphabet: the service takes both, and its own SDK sends the other."""
    return data.translate(str.maketrans("-_", "+/"))


def gemini_error(refusal: Refusal) -> Json:
    name = failure(refusal.status).google if refusal.code != "FAILED_PRECONDITION" else refusal.code
    error: Json = {"code": refusal.status, "message": refusal.message, "status": name}
    details: list[Json] = []
    kind = "type.googleapis.com/google.rpc."
    if refusal.reason:
        info = {"reason": refusal.reason, "domain": "googleapis.com"}
        details.append({"@type": kind + "ErrorInfo", **info})
    if refusal.param:
        violation = {"field": refusal.param, "description": refusal.message}
        details.append({"@type": kind + "BadRequest", "fieldViolations": [violation]})
    if refusal.retry_after is not None:
        details.append({"@type": kind + "RetryInfo", "retryDelay": f"{refusal.retry_after:g}s"})
    return {"error": error | ({"details": details} if details else {})}


def google_broken(refusal: Refusal, body: Json) -> list[Frame]:
    return [Frame(gemini_error(dataclasses.replace(refusal, status=503 if refusal.status == 529 else refusal.status)))]


def gemini_key(headers: Mapping[str, str], query: Mapping[str, str]) -> str:
    return headers.get("x-goog-api-key", "") or query.get("key", "")


def gemini_access(call: Call) -> Iterator[Refusal]:
    if not call.key:
        yield Refusal(
            "Method doesn't allow unregistered callers (callers without established identity). Please use API Key or "
            "other form of API consumer identity to call this API.",
            status=403,
        )
    if call.key.startswith("bad"):
        yield Refusal("API key not valid. Please pass a valid API key.", reason="API_KEY_INVALID")


def oauth_access(call: Call) -> Iterator[Refusal]:
    if not call.key or call.key.startswith("bad"):
        yield Refusal(
            "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or other "
            "valid authentication credential. See https://developers.google.com/identity/sign-in/web/devconsole-project.",
            status=401,
        )


def gemini_faults(path: str, value: Json, spec: str) -> Iterator[Refusal]:
    for what, key, expected in faults(value, spec):
        where = f" at '{path}'" if path else ""
        at = f"{path}.{key}" if path else key
        if what == "unknown":
            yield Refusal(
                f'Invalid JSON payload received. Unknown name "{key}"{where}: Cannot find field.', param=path or None
            )
        elif what == "missing":
            yield Refusal(f"* GenerateContentRequest.{at}: {key} is not specified\n")
        else:
            yield Refusal(f"Invalid value at '{at}': expected {expected}", param=at)


def code_assist_check(call: Call) -> Iterator[Refusal]:
    yield from gemini_faults("", call.outer, CODE_ASSIST)
    if call.model.startswith("models/"):
        yield Refusal("Requested entity was not found.", status=404)
    if re.fullmatch(r"\d+", call.outer.get("project", "")):
        yield Refusal("Invalid project: expected a project id, not a project number.")
    yield from gemini_check(call)


def gemini_check(call: Call) -> Iterator[Refusal]:
    body, provider = call.body, call.provider
    yield from gemini_faults("", body, GEMINI_TOP[provider])
    missing = f"models/{call.model} is not found for API version v1beta, or is not supported for generateContent."
    yield from model_check(call, r"(gemini|gemma|learnlm|imagen|models/)", missing)
    if not body["contents"]:
        yield Refusal("* GenerateContentRequest.contents: contents is not specified\n")
    yield from gemini_contents(call)
    yield from gemini_pairs(call)
    yield from gemini_tools(call)
    yield from gemini_config(call)
    yield from gemini_signatures(call)


def gemini_contents(call: Call) -> Iterator[Refusal]:
    for i, content in enumerate(call.body["contents"]):
        at = f"contents[{i}]"
        yield from gemini_faults(at, sub(content), "role:str parts:list")
        role = sub(content).get("role", "user" if call.provider == "gemini" else None)
        if role not in ("user", "model"):
            yield Refusal("Please use a valid role: user, model.")
        if i == 0 and role != "user":
            yield Refusal("First content should be with role 'user', got 'model'.")
        if not sub(content).get("parts"):
            yield Refusal(f"* GenerateContentRequest.{at}.parts: contents.parts must not be empty.\n")
        for j, part in enumerate(content["parts"]):
            yield from gemini_part(call, f"{at}.parts[{j}]", part, str(role))
    yield from gemini_faults("system_instruction", sub(call.body, "systemInstruction"), "role:str parts:list")


def gemini_part(call: Call, at: str, part: Any, role: str) -> Iterator[Refusal]:
    yield from gemini_faults(at, sub(part), GEMINI_PART)
    kinds = [key for key in GEMINI_DATA if key in sub(part)]
    if not kinds:
        yield Refusal(
            f"* GenerateContentRequest.{at}.data: required oneof field 'data' must have one initialized field\n"
        )
    if len(kinds) > 1:
        yield Refusal(f"Invalid value at '{at}' (oneof), oneof field 'data' is already set. Cannot set '{kinds[1]}'")
    if call.provider == "gemini-oauth" and (set(part) & set(VERTEX_REFUSES)):
        name = next(key for key in part if key in VERTEX_REFUSES)
        yield Refusal(f"Invalid JSON payload received. Unknown name \"{name}\" at '{at}': Cannot find field.", param=at)
    kind = kinds[0]
    if spec := GEMINI_DATA[kind]:
        yield from gemini_faults(f"{at}.{kind}", part[kind], spec)
    if kind == "inlineData" and not is_base64(standard(part[kind]["data"])):
        yield Refusal(f"Invalid value at '{at}.inline_data.data' (TYPE_BYTES), Base64 decoding failed", param=at)
    home = {"functionCall": "model", "functionResponse": "user"}.get(kind, role)
    if role != home:
        turn = "function call turn" if kind == "functionCall" else "function response turn"
        yield Refusal(f"Please ensure that {turn} comes with role '{home}'.")


def parts_of(content: Json, kind: str) -> list[Json]:
    return [part[kind] for _, part in dicts(content.get("parts")) if kind in part]


def gemini_pairs(call: Call) -> Iterator[Refusal]:
    """A turn of function calls, then one of as many responses, for the same names (and ids, where there are any)."""
    contents = call.body["contents"]
    for before, content in zip([{}, *contents], [*contents, {}], strict=True):
        calls, answers = parts_of(before, "functionCall"), parts_of(content, "functionResponse")
        if answers and not calls:
            yield Refusal("Please ensure that function response turn comes immediately after a function call turn.")
        if calls and len(calls) != len(answers):
            yield Refusal(
                "Please ensure that the number of function response parts is equal to the number of function call "
                "parts of the function call turn."
            )
        for key in ("name", "id"):
            if sorted(str(item.get(key)) for item in calls) != sorted(str(item.get(key)) for item in answers):
                yield Refusal(f"Please ensure that the {key}s of function responses match those of the function calls.")


def gemini_tools(call: Call) -> Iterator[Refusal]:
    body, version = call.body, gemini_version(call.model)
    tools = [tool for _, tool in dicts(body.get("tools"))]
    names = []
    for i, tool in enumerate(tools):
        yield from gemini_faults(f"tools[{i}]", tool, GEMINI_TOOL)
        if call.provider == "gemini-oauth" and "fileSearch" in tool:
            yield Refusal(
                f"Invalid JSON payload received. Unknown name \"fileSearch\" at 'tools[{i}]': Cannot find field."
            )
        for j, function in dicts(tool.get("functionDeclarations")):
            yield from gemini_function(f"tools[{i}].function_declarations[{j}]", function)
            names.append(function["name"])
    for name in names:
        if names.count(name) > 1:
            yield Refusal(f"Duplicate function declaration found: {name}")
    config = sub(body, "toolConfig")
    known = "functionCallingConfig:dict retrievalConfig:dict includeServerSideToolInvocations:bool"
    yield from gemini_faults("tool_config", config, known)
    builtin = any(key in tool for tool in tools for key in ("googleSearch", "codeExecution", "urlContext"))
    if names and builtin and version < (3, 0):
        yield Refusal("Tool use with function calling is unsupported by the model.")
    if names and builtin and call.provider == "gemini" and not config.get("includeServerSideToolInvocations"):
        yield Refusal(
            "Please enable tool_config.include_server_side_tool_invocations to use Built-in tools with Function "
            "calling."
        )
    yield from gemini_choice(sub(config, "functionCallingConfig"), names)


def gemini_function(at: str, function: Json) -> Iterator[Refusal]:
    yield from gemini_faults(at, function, GEMINI_FUNCTION)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.:-]{0,127}", function["name"]):
        yield Refusal(
            f"* GenerateContentRequest.{at}.name: Invalid function name. Must start with a letter or an underscore. "
            "Must be alphameric (a-z, A-Z, 0-9), underscores (_), dots (.), colons (:), or dashes (-), with a maximum "
            "length of 128.\n"
        )
    if any(malformed(function.get(key, {})) for key in ("parameters", "parametersJsonSchema")):
        yield Refusal(f"* GenerateContentRequest.{at}.parameters: invalid schema\n")
    if "parameters" in function and "parametersJsonSchema" in function:
        yield Refusal(f"* GenerateContentRequest.{at}: only one of parameters and parameters_json_schema can be set\n")


def gemini_choice(config: Json, names: list[str]) -> Iterator[Refusal]:
    known = "mode:str allowedFunctionNames:list streamFunctionCallArguments:bool"
    yield from gemini_faults("tool_config.function_calling_config", config, known)
    mode, allowed = str(config.get("mode", "AUTO")).upper(), config.get("allowedFunctionNames") or []
    if mode not in ("MODE_UNSPECIFIED", "AUTO", "ANY", "NONE", "VALIDATED"):
        yield Refusal(f"Invalid value at 'tool_config.function_calling_config.mode': \"{mode}\"")
    if allowed and mode not in ("ANY", "VALIDATED"):
        yield Refusal("allowed_function_names should only be set when the function calling mode is ANY.")
    if mode == "ANY" and not names:
        yield Refusal("Function calling config is set without function_declarations.")
    for name in allowed:
        if name not in names:
            yield Refusal(f"allowed_function_names: '{name}' is not a declared function.")


def gemini_config(call: Call) -> Iterator[Refusal]:
    body, model = call.body, call.model
    config, version = sub(body, "generationConfig"), gemini_version(call.model)
    yield from gemini_faults("generation_config", config, GEMINI_CONFIG)
    if len(config.get("stopSequences") or []) > 5:
        yield Refusal(
            "* GenerateContentRequest.generation_config.stop_sequences: at most 5 stop sequences are allowed\n"
        )
    if any(malformed(config.get(key, {})) for key in ("responseSchema", "responseJsonSchema")):
        yield Refusal("* GenerateContentRequest.generation_config.response_schema: invalid schema\n")
    schema = "responseSchema" in config or "responseJsonSchema" in config
    if "responseSchema" in config and "responseJsonSchema" in config:
        yield Refusal("Only one of response_schema and response_json_schema can be set.")
    if schema and config.get("responseMimeType") not in ("application/json", "text/x.enum"):
        yield Refusal("response_mime_type must be application/json or text/x.enum when a response schema is set.")
    functions = any("functionDeclarations" in tool for _, tool in dicts(body.get("tools")))
    if functions and config.get("responseMimeType") == "application/json" and version < (3, 0):
        yield Refusal("Function calling with a response mime type: 'application/json' is unsupported")
    modalities = [str(name).upper() for name in config.get("responseModalities") or []]
    if ("IMAGE" in modalities and "image" not in model) or ("AUDIO" in modalities and "tts" not in model):
        wanted = ", ".join(modalities)
        yield Refusal(f"The requested combination of response modalities ({wanted}) is not supported by the model.")
    yield from gemini_thinking(model, version, sub(config, "thinkingConfig"))


def gemini_thinking(model: str, version: tuple[int, int], config: Json) -> Iterator[Refusal]:
    path = "generation_config.thinking_config"
    yield from gemini_faults(path, config, "includeThoughts:bool thinkingBudget:int thinkingLevel:str")
    level, budget = str(config.get("thinkingLevel", "")).upper(), config.get("thinkingBudget")
    if level and budget is not None:
        yield Refusal("You can only set only one of thinking budget and thinking level.")
    if (level or budget) and THOUGHTLESS.match(model):
        yield Refusal("Thinking is not supported by this model.")
    if level and version < (3, 0):
        yield Refusal("Thinking level is not supported for this model.")
    if level not in ("", "MINIMAL", "LOW", "MEDIUM", "HIGH", "XHIGH", "THINKING_LEVEL_UNSPECIFIED"):
        yield Refusal(f"Invalid value at '{path}.thinking_level': \"{level}\"", param=path)
    if level == "MINIMAL" and ("3.8" in model or "pro" in model):
        yield Refusal("Thinking level MINIMAL is not supported for this model. Please retry with other thinking level.")
    if budget is None or version >= (3, 0):
        return
    low, high = (128, 32768) if "pro" in model else (0, 24576)
    if budget == 0 and low:
        yield Refusal("Budget 0 is invalid. This model only works in thinking mode.")
    if budget != -1 and not low <= budget <= high:
        yield Refusal(f"The thinking budget {budget} is invalid. Please choose a value between {low} and {high}.")


def gemini_signatures(call: Call) -> Iterator[Refusal]:
    contents = call.body["contents"]
    for content in contents:
        for _, part in dicts(content.get("parts")):
            signature = part.get("thoughtSignature")
            taken = signature is None or signature in ("", *ANY_SIGNATURE)
            if not taken and opened(standard(str(signature)), call.provider, "thought") is None:
                yield Refusal("Corrupted thought signature.")
    if gemini_version(call.model) < (3, 0):
        return
    # The current turn begins after the last user content that is not a function response.
    asked_at = [
        i
        for i, content in enumerate(contents)
        if content.get("role") != "model" and not parts_of(content, "functionResponse")
    ]
    for i, content in enumerate(contents[max(asked_at, default=0) :], max(asked_at, default=0)):
        calls = [(j, part) for j, part in dicts(content.get("parts")) if "functionCall" in part]
        if calls and not calls[0][1].get("thoughtSignature"):
            name = calls[0][1]["functionCall"]["name"]
            yield Refusal(
                "Function call is missing a thought_signature in functionCall parts. This is required for tools to "
                "work correctly, and missing thought_signature may lead to degraded model performance. Additional "
                f"data, function call `default_api:{name}` , position {i + 1}. Please refer to "
                "https://ai.google.dev/gemini-api/docs/thought-signatures for more details."
            )


def gemini_prompt(call: Call) -> Prompt:
    body = call.body
    config, choice = sub(body, "generationConfig"), sub(body, "toolConfig", "functionCallingConfig")
    functions = [item for _, tool in dicts(body.get("tools")) for _, item in dicts(tool.get("functionDeclarations"))]
    tools = {item["name"]: item.get("parametersJsonSchema") or item.get("parameters") or {} for item in functions}
    forced = next(iter(choice.get("allowedFunctionNames") or tools), None)
    schema = config.get("responseJsonSchema") or config.get("responseSchema") or {"type": "object"}
    offers = {GEMINI_NATIVE.get(key, "") for _, tool in dicts(body.get("tools")) for key in tool} - {""}
    if "IMAGE" in [str(name).upper() for name in config.get("responseModalities") or []]:
        offers |= {"image"}
    return Prompt(
        call,
        gemini_turns(body["contents"]),
        tools,
        forced=forced if str(choice.get("mode")).upper() == "ANY" else None,
        schema=schema if config.get("responseMimeType") in ("application/json", "text/x.enum") else None,
        thinks=gemini_thinks(call.model, sub(config, "thinkingConfig")),
        limit=config.get("maxOutputTokens"),
        stops=tuple(config.get("stopSequences") or ()),
        offers=frozenset(offers),
    )


def gemini_thinks(model: str, config: Json) -> bool:
    if THOUGHTLESS.match(model):
        return False
    # Flash-Lite 2.5 thinks when asked to; everything later always does.
    lite = "lite" in model and gemini_version(model) < (3, 0)
    return bool(config.get("thinkingBudget", 0 if lite else -1))


def gemini_turns(contents: list[Json]) -> tuple[Turn, ...]:
    turns = [Turn("")]
    for content in contents:
        if content.get("role") == "model":
            turns.append(Turn(""))
            continue
        text = "\n".join(str(text) for text in parts_of(content, "text"))
        results = [spelled(item["response"]) for item in parts_of(content, "functionResponse")]
        turns[-1] = Turn(f"{turns[-1].text}\n{text}".strip(), (*turns[-1].results, *results))
    return tuple(turns)


def spelled(response: Json) -> str:
    value = response.get("output", response.get("result", response.get("error", response)))
    return value if isinstance(value, str) else compact(value)


def gemini_parts(call: Call) -> list[tuple[Any, str]]:
    body = call.body
    instruction = [body["systemInstruction"]] if "systemInstruction" in body else []
    return [(part, "auto") for part in [*(body.get("tools") or []), *instruction, *body["contents"]]]


GEMINI_STOPS = {
    "end_turn": "STOP",
    "stop_sequence": "STOP",
    "tool_use": "STOP",
    "max_tokens": "MAX_TOKENS",
    "refusal": "SAFETY",
    "pause_turn": "CONTINUATION",
}


def gemini_answer_parts(answer: Answer) -> list[Json]:
    """The parts of the answer, signed where the model signs: the first call of a step, else the last text."""
    call, steps = answer.call, answer.script.steps
    shows = sub(call.body, "generationConfig", "thinkingConfig").get("includeThoughts")
    parts: list[Json] = []
    for i, step in enumerate(steps):
        if step.kind == "think" and shows:
            parts.append({"text": step.text, "thought": True})
        elif step.kind == "say":
            parts.append({"text": step.text})
        elif step.kind == "tool":
            function: Json = {"name": step.name, "args": parsed(step.text)}
            if gemini_version(call.model) >= (3, 0):
                function = {"id": f"{answer.seed[:8]}{i}"} | function
            parts.append({"functionCall": function})
        elif step.kind == "code":
            parts.append({"executableCode": {"language": "PYTHON", "code": step.text}})
            parts.append({"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "42\n"}})
        elif step.kind == "image":
            parts.append({"inlineData": {"mimeType": "image/png", "data": picture()}})
    thought = any(step.kind == "think" for step in steps)
    signed = [part for part in parts if "functionCall" in part][:1] or [p for p in parts if "thought" not in p][-1:]
    late = gemini_version(call.model) >= (3, 0) and not THOUGHTLESS.match(call.model)
    if signed and (late or (thought and "functionCall" in signed[0])):
        signed[0]["thoughtSignature"] = sign(call.provider, "thought", seed=answer.seed[:16], model=call.model)
    return parts


def grounding(answer: Answer, parts: list[Json]) -> Json:
    """Search results on the last text; the offsets count bytes."""
    texts = [(i, part["text"]) for i, part in enumerate(parts) if "text" in part and "thought" not in part]
    if not texts or not any(step.cited for step in answer.script.steps):
        return {}
    index, text = texts[-1]
    queries = [step.text for step in answer.script.steps if step.kind == "search"]
    url, _ = SOURCES[0]
    if not queries:
        source = {"startIndex": 0, "endIndex": len(text.encode()), "uri": url}
        return {"citationMetadata": {"citationSources": [source]}}
    segment = {"partIndex": index, "startIndex": 0, "endIndex": len(text.encode()), "text": text}
    return {
        "groundingMetadata": {
            "webSearchQueries": queries,
            "searchEntryPoint": {"renderedContent": "<div>Search suggestions</div>"},
            "groundingChunks": [{"web": {"uri": url, "title": title}} for url, title in SOURCES],
            "groundingSupports": [{"segment": segment, "groundingChunkIndices": [0], "confidenceScores": [0.9]}],
        }
    }


def gemini_body(answer: Answer) -> Json:
    script, usage = answer.script, answer.usage
    prompted = [{"modality": "TEXT", "tokenCount": usage.input}]
    searched = 40 * sum(step.kind in ("search", "code") for step in script.steps)
    candidates = usage.output - usage.thinking
    counts: Json = {
        "promptTokenCount": usage.input,
        "candidatesTokenCount": candidates,
        "promptTokensDetails": prompted,
    }
    counts |= {"thoughtsTokenCount": usage.thinking} if usage.thinking else {}
    counts |= {"toolUsePromptTokenCount": searched} if searched else {}
    counts |= {"cachedContentTokenCount": usage.cached} if usage.cached else {}
    counts["totalTokenCount"] = usage.input + usage.output + searched
    tail = {"modelVersion": answer.call.model, "responseId": answer.seed[:22]}
    if script.stop == "blocked":
        return {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": counts, **tail}
    parts = gemini_answer_parts(answer)
    stop = GEMINI_STOPS.get(script.stop, script.stop)
    candidate: Json = {"content": {"role": "model", "parts": parts}, "finishReason": stop, "index": 0}
    candidate |= grounding(answer, parts)
    return {"candidates": [candidate], "usageMetadata": counts, **tail}


def gemini_frames(body: Json, answer: Answer) -> Iterator[Frame]:
    if "candidates" not in body:
        yield Frame(body)
        return
    final = body["candidates"][0]
    whole = body["usageMetadata"]
    partial = {key: whole[key] for key in ("promptTokenCount", "promptTokensDetails")}
    partial["totalTokenCount"] = whole["promptTokenCount"]
    streamed = [piece for part in final["content"]["parts"] for piece in gemini_deltas(part)]
    # What closes the stream: an empty text that carries the signature, or the last piece itself.
    last = streamed.pop() if streamed else {"text": ""}
    for piece in streamed:
        candidate = {"content": {"role": "model", "parts": [piece]}, "index": 0}
        yield Frame(body | {"candidates": [candidate], "usageMetadata": partial}, delta=True)
    yield Frame(body | {"candidates": [final | {"content": {"role": "model", "parts": [last]}}]})


def gemini_deltas(part: Json) -> Iterator[Json]:
    if "text" not in part:
        yield part
        return
    thought = {"thought": True} if "thought" in part else {}
    yield from ({"text": piece} | thought for piece in pieces(part["text"]))
    if "thoughtSignature" in part:
        yield {"text": "", "thoughtSignature": part["thoughtSignature"]}


def code_assist_body(answer: Answer) -> Json:
    return {"response": gemini_body(answer), "traceId": answer.seed[:16]}


def code_assist_frames(body: Json, answer: Answer) -> Iterator[Frame]:
    for frame in gemini_frames(body["response"], answer):
        yield dataclasses.replace(frame, data={"response": frame.data, "traceId": body["traceId"]})


TIERS = {"free-tier": "Gemini Code Assist for individuals", "standard-tier": "Gemini Code Assist Standard"}


def load_code_assist(body: Json, key: str) -> Json:
    """The tier and project of an account; a new one gets neither, but the tiers to choose from."""
    standard = {"id": "standard-tier", "name": TIERS["standard-tier"]}
    if key.startswith("new"):
        tier = standard | {"isDefault": True, "userDefinedCloudaicompanionProject": True}
        return {"allowedTiers": [tier], "ineligibleTiers": []}
    project = body.get("cloudaicompanionProject") or "sandbox-project"
    return {"currentTier": standard, "allowedTiers": [], "cloudaicompanionProject": project}


def onboard(body: Json) -> Refusal | Json:
    """A long-running operation; the free tier must come without a project, every other with one."""
    tier, project = body.get("tierId"), body.get("cloudaicompanionProject")
    if tier not in (*TIERS, "legacy-tier"):
        return Refusal(f"Invalid tier: {tier}")
    if (tier == "free-tier") == bool(project):
        return Refusal("Precondition check failed.", code="FAILED_PRECONDITION")
    name = base64.urlsafe_b64encode((project or "sandbox-project").encode()).decode()
    return {"name": f"operations/{name}", "done": False}


def operation(name: str) -> Json:
    project = base64.urlsafe_b64decode(name).decode()
    response = {"cloudaicompanionProject": {"id": project, "name": project}}
    return {"name": f"operations/{name}", "done": True, "response": response}


# == OAuth ===========================================================================================================


class Grant(NamedTuple):
    """What an authorization code was given for."""

    client_id: str
    redirect_uri: str
    challenge: str


def authorize(query: Mapping[str, str], grants: dict[str, Grant]) -> str:
    """The address to send the browser to, with a new code. Raises ValueError for a request no browser should follow."""
    redirect = query.get("redirect_uri", "")
    if urllib.parse.urlsplit(redirect).hostname not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError("redirect_uri_mismatch")
    if query.get("response_type") != "code" or not query.get("client_id"):
        raise ValueError("invalid_request")
    if query.get("code_challenge") and query.get("code_challenge_method") != "S256":
        raise ValueError("invalid_request: code_challenge_method")
    code = f"4/{secrets.token_urlsafe(24)}"
    grants[code] = Grant(query["client_id"], redirect, query.get("code_challenge", ""))
    answer = {"code": code, "scope": query.get("scope", "")} | ({"state": query["state"]} if "state" in query else {})
    return f"{redirect}{'&' if '?' in redirect else '?'}{urllib.parse.urlencode(answer)}"


def token(form: Mapping[str, str], grants: dict[str, Grant]) -> tuple[int, Json]:
    """Status and body of the token endpoint. A code is good for one use, and only with its PKCE verifier."""
    client, kind = form.get("client_id", ""), form.get("grant_type")
    if not client or client.startswith("bad"):
        return 401, {"error": "invalid_client", "error_description": "The OAuth client was not found."}
    issued = {"expires_in": 3599, "scope": "https://www.googleapis.com/auth/cloud-platform", "token_type": "Bearer"}
    access = f"ya29.{secrets.token_urlsafe(24)}"
    if kind == "refresh_token":
        if not form.get("refresh_token") or form["refresh_token"].startswith("bad"):
            return 400, {"error": "invalid_grant", "error_description": "Token has been expired or revoked."}
        return 200, {"access_token": access, **issued}
    if kind != "authorization_code":
        return 400, {"error": "unsupported_grant_type", "error_description": f"Invalid grant_type: {kind}"}
    grant = grants.pop(form.get("code", ""), None)
    hashed = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
    challenge = base64.urlsafe_b64encode(hashed).decode().rstrip("=")
    if grant is None or (grant.client_id, grant.redirect_uri) != (client, form.get("redirect_uri")):
        return 400, {"error": "invalid_grant", "error_description": "Malformed auth code."}
    if grant.challenge and not hmac.compare_digest(grant.challenge, challenge):
        return 400, {"error": "invalid_grant", "error_description": "Invalid code verifier."}
    return 200, {"access_token": access, "refresh_token": f"1//{secrets.token_urlsafe(24)}", **issued}


# == Cartesia ========================================================================================================

CARTESIA_VERSIONS = ("2024-06-10", "2024-11-13", "2025-04-16", "2026-03-01", "2026-08-14")
CARTESIA_JSON = "2026-03-01"  # the first version whose errors are JSON
CARTESIA_RATES = (8000, 16000, 22050, 24000, 44100, 48000)
CARTESIA_BIT_RATES = (32000, 64000, 96000, 128000, 192000)
CARTESIA_SPOKEN = words(
    "en fr de es pt zh ja hi it ko nl pl ru sv tr tl bg ro ar cs el fi hr ms sk da ta uk hu no vi bn th he ka id te gu "
    "kn ml mr pa or ur"
)
CARTESIA_TITLES = {400: "Bad request", 401: "Authentication failed", 404: "Not found", 422: "Unprocessable entity"} | {
    429: "Too many concurrent requests",
    500: "Internal server error",
    503: "Service unavailable",
}
CARTESIA_CODES = {401: "authentication_failed", 429: "concurrency_limited"}
WHISPERS = ("ink-whisper", "ink-whisper-2025-06-04")
DEAD_VOICES = ("sonic", "sonic-english", "sonic-multilingual")
SPEECH_BODY = (
    "model_id:str! transcript:str! voice:dict! output_format:dict! language:str locale:str generation_config:dict "
    "normalization:str pronunciation_dict_id:str save:bool speed:str"
)
SPEECH_STREAM = " context_id:str add_timestamps:bool add_phoneme_timestamps:bool use_normalized_timestamps:bool"
SPEECH_CONTEXT = SPEECH_STREAM + " continue:bool flush:bool max_buffer_delay_ms:int"
SPEECH_FORMATS = {
    "raw": "container:str! encoding:str! sample_rate:int!",
    "wav": "container:str! encoding:str! sample_rate:int!",
    "mp3": "container:str! sample_rate:int! bit_rate:int!",
}

# -- Audio that carries its words ------------------------------------------------------------------------------------
#
# Each word is a tone of its own. The lowest bits of its samples spell the word and its length, so that speech of the
# sandbox, as long as it stays 16-bit at its rate, is understood by the sandbox, with the true times of its words.

MARK = b"\xa7\x5c\x3b"
BITS = {byte: bytes(48 + (byte >> i & 1) for i in range(7, -1, -1)) for byte in range(256)}
LOWEST = bytes(48 + (value & 1) for value in range(256))
LOUD = 600  # of 32767: what counts as sound where no words are hidden


class Said(NamedTuple):
    """A word in a recording; times in seconds from its beginning."""

    word: str
    start: float
    end: float


def bits(data: bytes) -> bytes:
    return b"".join(BITS[byte] for byte in data)


def unbits(data: bytes) -> bytes:
    return bytes(int(data[at : at + 8], 2) for at in range(0, len(data) - 7, 8))


def pause_after(word: str) -> float:
    """Seconds of silence behind a word."""
    return 0.2 if re.search(r"[.!?…。！？।]\W*$", word) else 0.12 if re.search(r"[,;:、，]\W*$", word) else 0.06


def tone(word: str, rate: int, speed: float) -> list[float]:
    """A word, -1 to 1: its pitch and its length come from its letters."""
    count = round(min(0.6, 0.1 + 0.04 * len(word)) / speed * rate)
    step = 2 * math.pi * (160 + int(digest(word)[:4], 16) % 240) / rate
    swell = rate // 100
    return [0.3 * min(1.0, (i + 1) / swell, (count - i) / swell) * math.sin(step * i) for i in range(count)]


def espeak(word: str, rate: int, speed: float, language: str) -> list[float]:
    """A word as espeak-ng says it, without the silence around it."""
    command = ["espeak-ng", "-v", language, "-s", str(round(170 * speed)), "--stdin", "--stdout"]
    file = subprocess.run(command, input=word.encode(), capture_output=True, timeout=10, check=True).stdout
    source = int.from_bytes(file[24:28], "little")
    pcm = file[file.find(b"data") + 8 :]
    samples = struct.unpack(f"<{len(pcm) // 2}h", pcm[: len(pcm) & ~1])
    loud = [i for i, sample in enumerate(samples) if abs(sample) > LOUD // 4] or [0]
    samples = (*samples[loud[0] : loud[-1] + 1], 0)
    places = (i * source / rate for i in range(int((len(samples) - 1) * rate / source)))
    return [(samples[int(at)] * (1 - at % 1) + samples[int(at) + 1] * (at % 1)) / 32768 for at in places]


@functools.lru_cache(4096)
def sound(word: str, rate: int, speed: float, volume: float, language: str | None) -> bytes:
    """A word as 16-bit samples that hold it; spoken by espeak-ng where there is a `language`."""
    hidden = word.encode()[:60].decode("utf-8", "ignore").encode()
    levels = tone(word, rate, speed) if language is None else espeak(word, rate, speed, language)
    levels += [0.0] * (rate // 10 - len(levels))
    millis = len(levels) * 1000 // rate
    samples = [round(max(-0.99, min(0.99, volume * level)) * 32767) & ~1 for level in levels[: rate * millis // 1000]]
    frame = millis.to_bytes(2, "big") + bytes([len(hidden)]) + hidden
    for i, bit in enumerate(bits(MARK + frame + bytes([zlib.crc32(frame) & 0xFF]))):
        samples[i] |= bit & 1
    return struct.pack(f"<{len(samples)}h", *samples)


def utter(
    text: str, rate: int, speed: float = 1.0, volume: float = 1.0, at: float = 0.0, language: str | None = None
) -> tuple[bytes, list[Said]]:
    """A text as PCM, and when its words are said; `at` is when it begins."""
    pcm, said = bytearray(), []
    for word in spoken_words(text):
        samples = sound(word, rate, speed, volume, language)
        start = at + len(pcm) / 2 / rate
        said.append(Said(word, round(start, 4), round(start + len(samples) / 2 / rate, 4)))
        pcm += samples + bytes(2 * round(rate * pause_after(word) / speed))
    return bytes(pcm), said


def spoken_words(text: str) -> list[str]:
    """Words as Cartesia times them: Chinese and Japanese by the character."""
    pieces = re.findall(r"[\u3040-\u30ff\u3400-\u9fff][^\w\s]*|[^\s\u3040-\u30ff\u3400-\u9fff]+", text)
    return [piece for piece in pieces if any(map(str.isalnum, piece))]


def speech(text: str, sample_rate: int = 24000) -> bytes:
    """What the sandbox says for a text: 16-bit mono PCM, a tone a word, that the sandbox also understands."""
    return utter(text, sample_rate)[0]


class Ear:
    """16-bit audio in, words out, as soon as each has been said.

    Where none are hidden in it, sound is taken for the words of `script`, one for every 0.3 seconds of it.
    """

    def __init__(self, rate: int, script: Iterator[str]) -> None:
        self.rate = rate
        self.script = script
        self.seconds = 0.0
        self._samples = 0
        self._understands = False
        self._bits = b""  # the lowest of each sample, where a word may still begin
        self._window = b""  # 0.1 seconds that are not whole yet
        self._windows = 0
        self._loud = 0  # windows with sound since the last word of the script

    def feed(self, pcm: bytes) -> list[Said]:
        self._samples += len(pcm) // 2
        self.seconds = self._samples / self.rate
        self._bits += pcm[::2].translate(LOWEST)
        hidden, sounds = list(self._hidden()), list(self._sounds(pcm))
        return hidden if self._understands else sounds

    def _hidden(self) -> Iterator[Said]:
        mark = bits(MARK)
        while (at := self._bits.find(mark)) >= 0:
            self._bits = self._bits[at:]
            head = unbits(self._bits[len(mark) : len(mark) + 24])
            end = len(mark) + 24 + 8 * (head[2] if len(head) == 3 else 0)
            if len(head) < 3 or len(self._bits) < end + 8:
                return
            frame, check = unbits(self._bits[len(mark) : end]), unbits(self._bits[end : end + 8])
            if check != bytes([zlib.crc32(frame) & 0xFF]):
                self._bits = self._bits[1:]
                continue
            self._understands = True
            length = self.rate * int.from_bytes(frame[:2], "big") // 1000
            if len(self._bits) < length:
                return
            start = self._samples - len(self._bits)
            yield Said(frame[3:].decode(), round(start / self.rate, 4), round((start + length) / self.rate, 4))
            self._bits = self._bits[length:]
        self._bits = self._bits[-len(mark) :]

    def _sounds(self, pcm: bytes) -> Iterator[Said]:
        self._window += pcm
        size = 2 * (self.rate // 10)
        while len(self._window) >= size:
            samples = struct.unpack(f"<{size // 2}h", self._window[:size])
            self._window = self._window[size:]
            self._windows += 1
            self._loud += max(map(abs, samples)) > LOUD
            if self._loud == 3:
                self._loud = 0
                if word := next(self.script, None):
                    yield Said(word, round(self._windows / 10 - 0.3, 4), self._windows / 10)


def script_of(sandbox: Sandbox) -> Iterator[str]:
    """The words for sound that holds none: the next of `sandbox.transcripts`, else a pangram over and over."""
    if sandbox.transcripts:
        return iter(sandbox.transcripts.popleft().split())
    return itertools.cycle(PANGRAM)


# -- Refusals --------------------------------------------------------------------------------------------------------


def cartesia_key(headers: Mapping[str, str], query: Mapping[str, str]) -> str:
    return str(bearer(headers) or headers.get("X-API-Key", ""))


def cartesia_version(request: web.Request) -> str:
    return str(request.query.get("cartesia_version") or request.headers.get("Cartesia-Version", ""))


def cartesia_access(request: web.Request) -> Iterator[Refusal]:
    key = cartesia_key(request.headers, request.query)
    if {"api_key", "key"} & set(request.query):
        yield Refusal("API keys do not belong into URLs.", status=400)
    if not key or key.startswith("bad"):
        yield Refusal("Invalid API key.", status=401)
    version = cartesia_version(request)
    if version not in CARTESIA_VERSIONS:
        yield Refusal(f"Unknown or missing Cartesia-Version: {version!r}.")


def cartesia_error(refusal: Refusal, **more: Any) -> Json:
    code = refusal.code or CARTESIA_CODES.get(refusal.status)
    title = CARTESIA_TITLES.get(refusal.status) or failure(refusal.status).message
    id = digest(refusal.message)
    request_id = f"{id[:8]}-{id[8:12]}-4{id[13:16]}-8{id[17:20]}-{id[20:32]}"
    return {"error_code": code, "title": title, "message": refusal.message, "request_id": request_id, **more}


def cartesia_refuse(request: web.Request, refusal: Refusal) -> web.Response:
    """An error over HTTP, as the version that was asked for has it."""
    headers = {} if refusal.retry_after is None else {"retry-after": f"{refusal.retry_after:g}"}
    body = cartesia_error(refusal)
    headers["X-Request-ID"] = body["request_id"]
    if cartesia_version(request) and cartesia_version(request) < CARTESIA_JSON:
        return web.Response(text=f"{body['title']}: {body['message']}", status=refusal.status, headers=headers)
    return web.json_response(body, status=refusal.status, headers=headers)


def cartesia_order(argument: str) -> Refusal:
    """What `[error 429 retry_after=7]` orders, without the words of other providers."""
    ordinary = ordered(argument, 500)
    given = "code=" in argument
    return dataclasses.replace(ordinary, code=ordinary.code if given else None)


def language_faults(language: Any, known: tuple[str, ...] = ()) -> Iterator[Refusal]:
    if language is not None and (not re.fullmatch("[a-z]{2,3}", str(language)) or (known and language not in known)):
        yield Refusal(f"Unsupported language: {language}.")


def no_model(what: str = "model") -> Refusal:
    return Refusal(f"The {what} is not valid, make sure it is a valid model ID.", code="model_not_found")


def speech_check(body: Json, spec: str, *, raw_only: bool) -> Iterator[Refusal]:
    """What Cartesia would refuse in a request for speech."""
    for fault in faults(body, spec):
        yield Refusal(told(fault), status=422)
    model, voice, form = str(body["model_id"]), body["voice"], body["output_format"]
    if model in DEAD_VOICES:
        yield Refusal("This model has been sunset.", code="model_sunsetted")
    if not re.fullmatch(r"sonic-[\w.-]+", model) or "not-exist" in model:
        yield no_model()
    if voice.keys() != {"mode", "id"} or voice["mode"] != "id" or not isinstance(voice["id"], str):
        yield Refusal('voice: must be {"mode":"id","id":…}', status=422)
    if not voice["id"] or "not-exist" in voice["id"]:
        yield Refusal("Voice not found.", status=404)
    yield from language_faults(body.get("language"), CARTESIA_SPOKEN)
    if "locale" in body and "language" in body:
        yield Refusal("locale and language exclude each other.")
    spec = SPEECH_FORMATS.get(str(form.get("container")), "")
    if not spec or (raw_only and form["container"] != "raw"):
        yield Refusal("output_format.container: not supported here")
    for fault in faults(form, spec):
        yield Refusal(f"output_format.{told(fault)}", status=422)
    if form["sample_rate"] not in CARTESIA_RATES:
        yield Refusal("output_format.sample_rate: not supported")
    if form.get("encoding", "pcm_s16le") not in ("pcm_s16le", "pcm_f32le", "pcm_mulaw", "pcm_alaw"):
        yield Refusal("output_format.encoding: not supported")
    if form.get("bit_rate", 128000) not in CARTESIA_BIT_RATES:
        yield Refusal("output_format.bit_rate: not supported")
    config = sub(body, "generation_config")
    for fault in faults(config, "speed:num volume:num emotion:str"):
        yield Refusal(f"generation_config.{told(fault)}", status=422)
    if not 0.6 <= config.get("speed", 1) <= 1.5 or not 0.5 <= config.get("volume", 1) <= 2:
        yield Refusal("generation_config: speed is 0.6 to 1.5, volume 0.5 to 2.0")
    if config and re.match(r"sonic-(2|turbo)\b", model):
        yield Refusal("generation_config needs sonic-3 or newer.")


def told(fault: Fault) -> str:
    what = {"unknown": "unknown field", "missing": "is required"}.get(fault.what, f"must be {fault.expected}")
    return f"{fault.key}: {what}"


def nothing_to_say(text: str) -> Iterator[Refusal]:
    if not any(map(str.isalnum, text)):
        yield Refusal("The transcript is empty or contains only punctuation.")


# -- Speaking --------------------------------------------------------------------------------------------------------


def cues(text: str) -> Iterator[tuple[str, str]]:
    """What a transcript orders, in turn: ("", text to say) and (directive, argument)."""
    at = 0
    while match := OPENING.search(text, at):
        end = closing(text, match.end(), quotes=False)
        if end < 0:
            break
        yield "", text[at : match.start()]
        yield match[1], text[match.end() : end].strip()
        at = end + 1
    yield "", text[at:]


def voiced(body: Json, text: str, real: bool, at: float = 0.0) -> tuple[bytes, list[Said]]:
    """16-bit PCM for a text, as a request wants it, and when its words are said."""
    config = sub(body, "generation_config")
    rate, language = body["output_format"]["sample_rate"], body.get("language", "en") if real else None
    return utter(text, rate, config.get("speed", 1.0), config.get("volume", 1.0), at, language)


def sound_encoded(pcm: bytes, encoding: str) -> bytes:
    samples = struct.unpack(f"<{len(pcm) // 2}h", pcm)
    if encoding == "pcm_f32le":
        return struct.pack(f"<{len(samples)}f", *(sample / 32768 for sample in samples))
    if encoding in ("pcm_mulaw", "pcm_alaw"):
        return bytes(map({"pcm_mulaw": mulaw, "pcm_alaw": alaw}[encoding], samples))
    return pcm


def mulaw(sample: int) -> int:
    """G.711, by its own words: sign, segment, step; all bits turned round."""
    size = min(abs(sample), 32635) + 132
    segment = size.bit_length() - 8
    return ~((0x80 if sample < 0 else 0) | segment << 4 | size >> segment + 3 & 0x0F) & 0xFF


def alaw(sample: int) -> int:
    size = min(sample if sample >= 0 else ~sample, 32767) >> 4
    segment = max(0, size.bit_length() - 4)
    code = segment << 4 | (size >> segment - 1 if segment > 1 else size) & 0x0F
    return (code | (0x80 if sample >= 0 else 0)) ^ 0x55


def mp3(pcm: bytes, rate: int, bit_rate: int) -> bytes:
    """MPEG frames of the right number, silent all of them: no library writes sounding ones. They hold a digest."""
    version = 3 if rate >= 32000 else 2 if rate >= 16000 else 0
    per_frame = 1152 if version == 3 else 576
    index = {3: {32: 1, 64: 5, 96: 7, 128: 9, 192: 11}}.get(version, {32: 4, 64: 8, 96: 10, 128: 12, 192: 14})
    sampling = {44100: 0, 48000: 1, 22050: 0, 24000: 1, 16000: 2, 8000: 2}[rate]
    head = bytes([0xFF, 0xE3 | version << 3, index[bit_rate // 1000] << 4 | sampling << 2, 0xC0])
    real = min(bit_rate, 160_000) if version < 3 else bit_rate
    size = per_frame // 8 * real // rate
    mark = hashlib.sha256(pcm).digest()[: max(0, size - 24)]
    frame = (head + bytes(20)).ljust(size - len(mark), b"\0") + mark
    return frame * -(-len(pcm) // 2 // per_frame)


def sound_file(body: Json, pcm: bytes) -> tuple[str, bytes]:
    """Content type and bytes of speech in the format that was asked for."""
    form = body["output_format"]
    rate = form["sample_rate"]
    if form["container"] == "mp3":
        return "audio/mpeg", mp3(pcm, rate, form["bit_rate"])
    data = sound_encoded(pcm, form["encoding"])
    if form["container"] == "raw":
        return "audio/pcm", data
    code, width = {"pcm_s16le": (1, 2), "pcm_f32le": (3, 4), "pcm_mulaw": (7, 1), "pcm_alaw": (6, 1)}[form["encoding"]]
    shape = struct.pack("<IHHIIHH", 16, code, 1, rate, rate * width, width, 8 * width)
    riff = struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + shape
    return "audio/wav", b"RIFF" + riff + b"data" + struct.pack("<I", len(data)) + data


class Performance:
    """The messages for one transcript after another in a context; `at` is the seconds of audio so far."""

    def __init__(self, body: Json, real: bool) -> None:
        self.body, self.real = body, real
        self.context_id: str | None = body.get("context_id")
        self.timed = body.get("add_timestamps") is True
        self.at = 0.0
        self.flush_id = 1

    def say(self, text: str) -> list[Json]:
        pcm, said = voiced(self.body, text, self.real, self.at)
        form = self.body["output_format"]
        self.at += len(pcm) / 2 / form["sample_rate"]
        data = sound_encoded(pcm, form["encoding"])
        width = {"pcm_s16le": 2, "pcm_f32le": 4}.get(form["encoding"], 1)
        size = width * (form["sample_rate"] // 10)
        out = [self.chunk(data[at : at + size]) for at in range(0, len(data), size)]
        if self.timed and said:  # before the audio that they are about, or behind it
            out.insert(len(out) * (int(digest(text)[0], 16) % 2), self.times(said))
        return out

    def chunk(self, data: bytes) -> Json:
        return self.message("chunk", data=base64.b64encode(data).decode(), step_time=12.5)

    def times(self, said: list[Said]) -> Json:
        columns = {"words": [one.word for one in said], "start": [one.start for one in said]}
        return self.message("timestamps", word_timestamps={**columns, "end": [one.end for one in said]})

    def flushed(self) -> Json:
        message = self.message("flush_done", flush_done=True)
        self.flush_id += 1
        return message

    def done(self) -> Json:
        return {**self.message("done"), "done": True, "status_code": 200}

    def error(self, refusal: Refusal) -> Json:
        return {**self.message("error"), **cartesia_error(refusal), "done": True, "status_code": refusal.status}

    def message(self, kind: str, **more: Any) -> Json:
        context = {"context_id": self.context_id} if self.context_id else {}
        flush = {"flush_id": self.flush_id} if context and kind in ("chunk", "timestamps", "flush_done") else {}
        return {"type": kind, "done": False, "status_code": 206, **more, **context, **flush}


async def cartesia_tts(request: web.Request) -> web.StreamResponse:
    """`/tts/bytes` and `/tts/sse`."""
    sandbox, sse = request.app[SANDBOX], request.path.endswith("/sse")
    raw = await request.read()
    try:
        body = json.loads(raw)
    except ValueError:
        body = None
    with sandbox.entered(request, "cartesia", body if isinstance(body, dict) else None) as record:
        refusal = next(cartesia_access(request), None)
        if not isinstance(body, dict):
            refusal = refusal or Refusal("Invalid JSON.")
        else:
            spec = SPEECH_BODY + SPEECH_STREAM if sse else SPEECH_BODY
            refusal = refusal or next(speech_check(body, spec, raw_only=sse), None)
            refusal = refusal or next(nothing_to_say(body["transcript"]), None)
        if refusal or body is None:
            return cartesia_refuse(request, refusal or Refusal(""))
        performance = Performance(body, sandbox.real_speech)
        orders = list(cues(body["transcript"]))
        refused = ("error",) if sse else ("error", "error_in_stream")
        if ordered_error := next((cartesia_order(argument) for name, argument in orders if name in refused), None):
            return cartesia_refuse(request, ordered_error)
        response = web.StreamResponse()
        response.content_type = "text/event-stream" if sse else "application/octet-stream"
        pieces, ending, slow = await asyncio.to_thread(spoken_pieces, performance, orders, sse)
        if not sse:
            texts = [text for name, text in orders if not name]
            pcm = b"".join([(await asyncio.to_thread(voiced, body, text, sandbox.real_speech))[0] for text in texts])
            response.content_type, whole = sound_file(body, pcm)
            pieces = [whole[at : at + 4800] for at in range(0, len(whole), 4800)]
            pieces = pieces[: len(pieces) // 2] if ending else pieces
        await asyncio.sleep(next((float(argument) for name, argument in orders if name == "wait"), 0))
        await response.prepare(request)
        for piece in pieces:
            await asyncio.sleep(slow)
            await response.write(piece)
        if ending == "hang":
            await asyncio.Event().wait()
        if ending in ("break_off", "reset"):
            return hang_up(request, record, response, reset=ending == "reset")
        await response.write_eof()
        return response


def spoken_pieces(performance: Performance, orders: list[tuple[str, str]], sse: bool) -> tuple[list[bytes], str, float]:
    """Server-sent events for what is to be said until something ends it; how it ends; seconds between two."""
    messages: list[Json] = []
    ending, slow = "", 0.0
    for name, argument in orders:
        if not name and sse:
            messages += performance.say(argument)
        elif name == "slow":
            slow = float(argument)
        elif name == "error_in_stream":
            messages.append(performance.error(cartesia_order(argument)))
            break
        elif name in ("break_off", "reset", "hang"):
            ending = name
            break
    else:
        messages.append(performance.done())
    return [f"data: {compact(message)}\n\n".encode() for message in messages], ending, slow


FLUSH, END = object(), object()


class Context:
    """A context of a socket: what is still to be said, and the task that says it."""

    def __init__(self, body: Json, real: bool) -> None:
        self.settings = self.settings_of(body)
        self.performance = Performance(body, real)
        self.jobs: asyncio.Queue[Any] = asyncio.Queue()
        self.held = ""  # text that waits for more
        self.cancelled = False
        self.closed = False  # takes no more text
        self.task: asyncio.Task[None] | None = None

    @staticmethod
    def settings_of(body: Json) -> Json:
        return {key: value for key, value in body.items() if key not in ("transcript", "continue", "flush")}


class Voice:
    """One socket of `/tts/websocket`."""

    def __init__(self, request: web.Request, record: Request, ws: web.WebSocketResponse) -> None:
        self.sandbox = request.app[SANDBOX]
        self.request, self.record, self.ws = request, record, ws
        self.contexts: dict[str, Context] = {}
        self.over: set[str] = set()

    async def run(self) -> None:
        try:
            async for message in self.ws:
                self.record.note(message.data)
                await self.take(message.data)
        finally:
            tasks = [context.task for context in self.contexts.values() if context.task]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.sandbox.speaking -= len(self.contexts)

    async def take(self, frame: Any) -> None:
        try:
            body = json.loads(frame) if isinstance(frame, str) else None
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return await self.refuse(Refusal("Invalid message: a JSON object is expected."), None)
        context_id = body.get("context_id")
        if not isinstance(context_id, str) or not re.fullmatch(r"[\w.-]{1,128}", context_id):
            return await self.refuse(Refusal("context_id: is required", status=422), None)
        context = self.contexts.get(context_id)
        if body.get("cancel") is True:
            if context:
                context.cancelled = True
                context.jobs.put_nowait(END)
            return None
        if refusal := next(self.faults(body, context), None):
            return await self.refuse(refusal, context_id)
        if context is None:
            context = self.contexts[context_id] = Context(body, self.sandbox.real_speech)
            self.sandbox.speaking += 1
            context.task = asyncio.create_task(self.perform(context))
        self.order(body, context)
        return None

    def faults(self, body: Json, context: Context | None) -> Iterator[Refusal]:
        yield from speech_check(body, SPEECH_BODY + SPEECH_CONTEXT, raw_only=True)
        if not 0 <= body.get("max_buffer_delay_ms", 3000) <= 5000:
            yield Refusal("max_buffer_delay_ms: must be between 0 and 5000")
        if body["context_id"] in self.over or (context and context.closed):
            yield Refusal("This context is closed.", code="context_closed")
        if context is None:
            yield from nothing_to_say(body["transcript"])
            if self.sandbox.speaking >= self.sandbox.most_contexts:
                yield Refusal("You have exceeded your plan's concurrency limit.", status=429)
        elif context.settings != Context.settings_of(body):
            yield Refusal("All fields but transcript, continue and flush must stay the same within a context.")

    def order(self, body: Json, context: Context) -> None:
        """Text is spoken at once without a buffer, with one when a sentence is whole."""
        context.held += body["transcript"]
        last = body.get("continue") is not True
        whole = re.search(r"[.!?。！？।]\s*$", context.held)
        if context.held and (last or body.get("flush") or not body.get("max_buffer_delay_ms", 3000) or whole):
            context.jobs.put_nowait(context.held)
            context.held = ""
        if body.get("flush") is True:
            context.jobs.put_nowait(FLUSH)
        if last:
            context.closed = True
            context.jobs.put_nowait(END)

    async def perform(self, context: Context) -> None:
        """Says one thing after the other. A context expires a second after its last audio."""
        performance, slow = context.performance, self.sandbox.pace
        try:
            while not context.cancelled:
                async with asyncio.timeout(self.sandbox.context_expires if performance.at else None):
                    job = await context.jobs.get()
                if job is END:
                    break
                if job is FLUSH:
                    await self.send(performance.flushed())
                    continue
                for name, argument in cues(job):
                    if name == "slow":
                        slow = float(argument)
                    elif not await self.act(name, argument, job, context):
                        return
                    for message in await asyncio.to_thread(performance.say, argument) if not name else []:
                        await asyncio.sleep(slow)
                        await self.send(message)
                        if context.cancelled:  # this one was on its way
                            break
            await self.send(performance.done())
        except TimeoutError:
            await self.send(performance.done())
        except ConnectionError:
            pass
        finally:
            self.over.add(str(performance.context_id))
            if self.contexts.pop(str(performance.context_id), None):
                self.sandbox.speaking -= 1

    async def act(self, name: str, argument: str, job: str, context: Context) -> bool:
        """Does what a directive orders; false if that was the end. A socket breaks off once at the same words."""
        if name in ("error", "error_in_stream"):
            await self.send(context.performance.error(cartesia_order(argument)))
            return False
        if name == "wait":
            await asyncio.sleep(float(argument))
        if name == "hang":
            await asyncio.Event().wait()
        if name in ("break_off", "reset"):
            rest = job.partition(f"[{name}")[2]
            if rest not in self.sandbox.broken:
                self.sandbox.broken.add(rest)
                drop(self.request, reset=name == "reset")
                return False
        return True

    async def refuse(self, refusal: Refusal, context_id: str | None) -> None:
        more = {"context_id": context_id} if context_id else {}
        await self.send(cartesia_error(refusal, type="error", done=True, status_code=refusal.status, **more))

    async def send(self, message: Json) -> None:
        if not self.sandbox.mute:
            await self.ws.send_str(compact(message))


def drop(request: web.Request, reset: bool = False) -> None:
    """Cuts a connection, with a FIN or a RST, and no WebSocket goodbye."""
    transport = request.transport
    if transport is None:
        return
    if reset:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


# -- Hearing ---------------------------------------------------------------------------------------------------------


async def cartesia_stt(request: web.Request) -> web.StreamResponse:
    """`POST /stt`: a recording in a form."""
    form: Json = {}
    try:
        if request.content_type != "multipart/form-data":
            raise ValueError
        for name, value in (await request.post()).items():
            if isinstance(value, web.FileField):
                with value.file:
                    form[name] = value.file.read()
            else:
                form[name] = value
    except (ValueError, AssertionError):
        form = {}
    with request.app[SANDBOX].entered(request, "cartesia", form):
        refusal = next(cartesia_access(request), None) or next(stt_faults(form), None)
        if refusal:
            return cartesia_refuse(request, refusal)
        try:
            pcm, rate, seconds = decoded(form["file"], request.query)
        except ValueError as fault:
            return cartesia_refuse(request, Refusal(str(fault)))
        sandbox = request.app[SANDBOX]
        ear = Ear(rate, script_of(sandbox))
        said = ear.feed(pcm)
        if not pcm:  # a file that cannot be looked into
            script = list(itertools.islice(ear.script, max(1, int(seconds / 0.3))))
            said = [Said(word, round(i * 0.3, 4), round(i * 0.3 + 0.25, 4)) for i, word in enumerate(script)]
        text = " ".join(one.word for one in said)
        named = dict(directives(text))
        await asyncio.sleep(float(named.get("wait", 0)))
        if "error" in named:
            return cartesia_refuse(request, cartesia_order(named["error"]))
        if "hang" in named:
            await asyncio.Event().wait()
        body = {"type": "transcript", "text": text, "language": form.get("language", "en"), "is_final": True}
        body |= {"duration": round(seconds, 4), "request_id": digest(text)[:32]}
        if "timestamp_granularities[]" in form:
            body["words"] = [one._asdict() for one in said]
        return web.json_response(body)


def stt_faults(form: Json) -> Iterator[Refusal]:
    if not isinstance(form.get("file"), bytes):
        yield Refusal("file: is required", status=422)
    if unknown := form.keys() - {"file", "model", "language", "timestamp_granularities[]"}:
        yield Refusal(f"unknown fields: {', '.join(sorted(unknown))}", status=422)
    if form.get("model") not in WHISPERS:
        yield no_model()
    yield from language_faults(form.get("language"))
    if form.get("timestamp_granularities[]", "word") != "word":
        yield Refusal("timestamp_granularities[]: only word is supported")


def decoded(data: bytes, query: Mapping[str, str]) -> tuple[bytes, int, float]:
    """16-bit PCM, its rate and its seconds; no PCM for files that take a decoder. Raises ValueError."""
    if "encoding" in query or "sample_rate" in query:
        encoding, rate = query.get("encoding", ""), query.get("sample_rate", "")
        widths = {"pcm_s16le": 2, "pcm_s32le": 4, "pcm_f16le": 2, "pcm_f32le": 4, "pcm_mulaw": 1, "pcm_alaw": 1}
        if encoding not in widths or not rate.isdigit() or not int(rate):
            raise ValueError("encoding and sample_rate are needed for raw audio")
        if len(data) % widths[encoding] or not data:
            raise ValueError("The audio is empty or ends in the middle of a sample.")
        return (data if encoding == "pcm_s16le" else b""), int(rate), len(data) / widths[encoding] / int(rate)
    if data[:4] == b"RIFF":
        try:
            with wave.open(io.BytesIO(data)) as file:
                if file.getnchannels() != 1 or file.getsampwidth() != 2:
                    return b"", file.getframerate(), file.getnframes() / file.getframerate()
                pcm = file.readframes(file.getnframes())
                return pcm, file.getframerate(), len(pcm) / 2 / file.getframerate()
        except (wave.Error, EOFError) as fault:
            raise ValueError(f"Invalid WAV file: {fault}") from None
    if data[:4] in (b"fLaC", b"OggS", b"\x1a\x45\xdf\xa3") or data[:3] == b"ID3" or data[4:8] == b"ftyp":
        return b"", 16000, len(data) / 16000
    if data[:1] == b"\xff" and len(data) > 4 and data[1] & 0xE0 == 0xE0:
        return b"", 16000, len(data) / 16000
    raise ValueError("Invalid or unsupported audio file.")


class Stream:
    """One socket of `/stt/websocket` or `/stt/turns/websocket`: audio and commands in, messages out. No I/O."""

    def __init__(self, query: Mapping[str, str], script: Iterator[str], turns: bool) -> None:
        self.turns = turns
        self.language = query.get("language", "en")
        self.request_id = digest(dict(query))[:32]
        rate = query.get("sample_rate", "")
        self.ear = Ear(int(rate) if rate.isdigit() and int(rate) else 16000, script)
        self.words: list[Said] = []  # since the last final transcript, or of the turn
        self.finals = 0
        self.final_at = 0.0
        self.eager = False

    def audio(self, pcm: bytes) -> list[Json]:
        said = self.ear.feed(pcm)
        if self.turns:
            out = [message for one in said for message in (*self.quiet(one.start), *self.hear(one))]
            return out + list(self.quiet(self.ear.seconds))
        self.words += said
        return [self.transcript(final=False)] if said else []

    def hear(self, one: Said) -> Iterator[Json]:
        if not self.words:
            yield self.message("turn.start")
        elif self.eager:
            yield self.message("turn.resume")
        self.eager = False
        self.words.append(one)
        yield self.message("turn.update", transcript=self.text)

    def quiet(self, until: float) -> Iterator[Json]:
        """Silence since the last word ends a turn, first probably, then for good. The audio is the clock."""
        gap = until - self.words[-1].end if self.words else 0
        if gap >= 0.4 and not self.eager:
            self.eager = True
            yield self.message("turn.eager_end", transcript=self.text)
        if gap >= 0.8:
            yield self.message("turn.end", transcript=self.text)
            self.words, self.eager = [], False

    @property
    def text(self) -> str:
        return " ".join(one.word for one in self.words)

    def command(self, text: str) -> list[Json]:
        """Raises ValueError for what is none."""
        if self.turns:
            message = json.loads(text)
            if not isinstance(message, dict) or message.get("type") not in ("config", "close"):
                raise ValueError("unknown message")
            return []
        if text == "finalize":
            return [*self.final(), self.message("flush_done")]
        if text in ("close", "done"):
            return [*self.final(), self.message("done")]
        raise ValueError("unknown command")

    def final(self) -> list[Json]:
        if not self.words:
            self.final_at = self.ear.seconds
            return []
        message = self.transcript(final=True)
        self.words, self.finals, self.final_at = [], self.finals + 1, self.ear.seconds
        return [message]

    def transcript(self, final: bool) -> Json:
        text = " " * (self.finals > 0) + self.text
        message = self.message("transcript", is_final=final, text=text)
        if not final:
            return message
        seconds = round(self.ear.seconds - self.final_at, 4)
        return {**message, "duration": seconds, "language": self.language, "words": [w._asdict() for w in self.words]}

    def message(self, kind: str, **more: Any) -> Json:
        return {"type": kind, **more, "request_id": self.request_id}


def stream_faults(query: Mapping[str, str], turns: bool) -> Iterator[Refusal]:
    model = query.get("model", "")
    if model not in (("ink-2",) if turns else ("ink-2", *WHISPERS)):
        yield no_model()
    if query.get("encoding") != "pcm_s16le":
        yield Refusal("encoding: the sandbox hears pcm_s16le")
    if not query.get("sample_rate", "").isdigit() or not 8000 <= int(query["sample_rate"]) <= 48000:
        yield Refusal("sample_rate: is required")
    thresholds = {"turn_start_threshold", "turn_eager_end_threshold", "turn_end_threshold", "turn_end_timeout_ms"}
    known = {"model", "encoding", "sample_rate", "keyterm", "cartesia_version", "access_token"}
    known |= thresholds if turns else {"language", "min_volume", "max_silence_duration_secs"}
    if unknown := query.keys() - known:
        yield Refusal(f"unknown parameters: {', '.join(sorted(unknown))}")
    if not turns and model == "ink-2" and query.get("language", "en") != "en":
        yield Refusal("ink-2 hears English only.")
    yield from language_faults(query.get("language"))


async def cartesia_handshake(sandbox: Sandbox) -> Refusal | None:
    """What `Sandbox.handshakes` orders."""
    if sandbox.handshakes == "hang":
        await asyncio.Event().wait()
    return Refusal("The service is unavailable.", status=503) if sandbox.handshakes == "refuse" else None


async def cartesia_listen(request: web.Request) -> web.StreamResponse:
    """The two sockets for streaming STT."""
    sandbox, turns = request.app[SANDBOX], "/turns/" in request.path
    with sandbox.entered(request, "cartesia", dict(request.query)) as record:
        if refusal := next(cartesia_access(request), None) or await cartesia_handshake(sandbox):
            return cartesia_refuse(request, refusal)
        ws = web.WebSocketResponse(compress=False, heartbeat=60)
        await ws.prepare(request)
        with sandbox.connected(request):
            fault = next(stream_faults(request.query, turns), None)
            stream = Stream(request.query, script_of(sandbox), turns)
            if fault:
                await ws.send_json(cartesia_error(fault, type="error", status_code=fault.status))
                await ws.close(code=1008)
            elif turns:
                await ws.send_json(stream.message("connected"))
            async for message in ws:
                record.note(message.data)
                if not await hear(request, ws, stream, message.data):
                    break
            record.finish(closed=ws.close_code != 1000)
            return ws


async def hear(request: web.Request, ws: web.WebSocketResponse, stream: Stream, data: Any) -> bool:
    """Answers a frame; false after the last."""
    try:
        if isinstance(data, bytes) and len(data) % 2:
            raise ValueError("the frame ends in the middle of a sample")
        messages = stream.audio(data) if isinstance(data, bytes) else stream.command(data)
    except ValueError as fault:
        await ws.send_json(cartesia_error(Refusal(str(fault)), type="error", status_code=400))
        return True
    broken = request.app[SANDBOX].broken
    for name, argument in directives(stream.text):
        if name == "error":
            refusal = cartesia_order(argument)
            await ws.send_json(cartesia_error(refusal, type="error", status_code=refusal.status))
            return False
        if name in ("break_off", "reset") and (request.path, name) not in broken:
            broken.add((request.path, name))
            drop(request, reset=name == "reset")
            return False
    for message in messages:
        if not request.app[SANDBOX].mute:
            await ws.send_str(compact(message))
    if isinstance(data, str) and (data in ("close", "done") or '"close"' in data):
        await ws.close()
        return False
    return True


async def cartesia_speak(request: web.Request) -> web.StreamResponse:
    """`/tts/websocket`."""
    sandbox = request.app[SANDBOX]
    with sandbox.entered(request, "cartesia", dict(request.query)) as record:
        if refusal := next(cartesia_access(request), None) or await cartesia_handshake(sandbox):
            return cartesia_refuse(request, refusal)
        ws = web.WebSocketResponse(compress=False, heartbeat=60)
        await ws.prepare(request)
        with sandbox.connected(request):
            await Voice(request, record, ws).run()
        record.finish(closed=ws.close_code != 1000)
        return ws


# == HTTP ============================================================================================================


@dataclass(frozen=True)
class Wire:
    """How one provider is played: all pure, data in, data out."""

    provider: str
    key: Callable[[Mapping[str, str], Mapping[str, str]], str]
    access: Callable[[Call], Iterator[Refusal]]
    check: Callable[[Call], Iterator[Refusal]]
    prompt: Callable[[Call], Prompt]
    parts: Callable[[Call], list[tuple[Any, str]]]
    body: Callable[[Answer], Json]
    frames: Callable[[Json, Answer], Iterator[Frame]]
    error: Callable[[Refusal], Json]
    broken: Callable[[Refusal, Json], list[Frame]]
    request_id: str
    named: bool = False
    done: bool = False
    newline: str = "\n"
    limit: int = 64 * 2**20


def chat_wire(
    provider: str, error: Callable[[Refusal], Json], broken: Callable[[Refusal, Json], list[Frame]], limit: int
) -> Wire:
    parts = (bearer_key, chat_access, chat_check, chat_prompt, chat_parts, chat_body, chat_frames, error, broken)
    return Wire(provider, *parts, request_id="x-request-id", done=True, limit=limit)


WIRES = {
    "anthropic": Wire(
        "anthropic",
        anthropic_key,
        anthropic_access,
        anthropic_check,
        anthropic_prompt,
        anthropic_parts,
        anthropic_body,
        anthropic_frames,
        anthropic_error,
        anthropic_broken,
        request_id="request-id",
        named=True,
        limit=32 * 2**20,
    ),
    "openai": chat_wire("openai", openai_error, openai_broken, 64 * 2**20),
    "groq": chat_wire("groq", groq_error, groq_broken, 32 * 2**20),
    "cerebras": chat_wire("cerebras", cerebras_error, cerebras_broken, 32 * 2**20),
    "oai-resp": Wire(
        "oai-resp",
        bearer_key,
        chat_access,
        responses_check,
        responses_prompt,
        responses_parts,
        responses_body,
        responses_frames,
        openai_error,
        responses_broken,
        request_id="x-request-id",
        named=True,
    ),
    "gemini": Wire(
        "gemini",
        gemini_key,
        gemini_access,
        gemini_check,
        gemini_prompt,
        gemini_parts,
        gemini_body,
        gemini_frames,
        gemini_error,
        google_broken,
        request_id="x-request-id",
        newline="\r\n",
        limit=100 * 2**20,
    ),
    "gemini-oauth": Wire(
        "gemini-oauth",
        bearer_key,
        oauth_access,
        code_assist_check,
        gemini_prompt,
        gemini_parts,
        code_assist_body,
        code_assist_frames,
        gemini_error,
        google_broken,
        request_id="x-cloudaicompanion-trace-id",
        newline="\r\n",
        limit=100 * 2**20,
    ),
}


def check(call: Call) -> Refusal | None:
    """The first thing that the provider would refuse a request for."""
    wire = WIRES[call.provider]
    return next(wire.access(call), None) or next(wire.check(call), None)


def answered(call: Call, script: Script, prompt: Prompt, cache: Cache) -> Answer:
    usage = measured(call, WIRES[call.provider].parts(call), script, cache)
    return Answer(call, prompt, script, usage, digest(call.provider, call.model, call.body))


def encoded(frame: Frame, wire: Wire) -> bytes:
    """A frame as server-sent event."""
    name = frame.event or (frame.data["type"] if wire.named else "")
    lines = ([f"event: {name}"] if name else []) + [f"data: {compact(frame.data)}", "", ""]
    return wire.newline.join(lines).encode()


def cut_short(frames: list[Frame]) -> list[Frame]:
    """The frames up to the third delta, and never the terminal one."""
    deltas = [i for i, frame in enumerate(frames) if frame.delta]
    return frames[: deltas[:3][-1] + 1] if deltas else frames[:1] if len(frames) > 1 else []


PARSE_ERRORS = {
    "anthropic": "The request body is not valid JSON",
    "gemini": "Invalid JSON payload received. Unexpected token.",
    "gemini-oauth": "Invalid JSON payload received. Unexpected token.",
}
UNPARSED = "We could not parse the JSON body of your request."


def read(wire: Wire, raw: bytes) -> Json | Refusal:
    if len(raw) > wire.limit:
        return Refusal("Request exceeds the maximum size", status=413)
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    return body if isinstance(body, dict) else Refusal(PARSE_ERRORS.get(wire.provider, UNPARSED))


def call_of(wire: Wire, request: web.Request, body: Json) -> Call:
    """The call in an HTTP request; Google has the model and the method in the path."""
    key = wire.key(request.headers, request.query)
    target = request.match_info.get("target", "")
    if wire.provider == "gemini":
        model, _, method = target.rpartition(":")
        return Call("gemini", model, method.startswith("stream"), camel(body), request.headers, key)
    if wire.provider == "gemini-oauth":
        inner = camel(sub(body, "request"))
        model = str(body.get("model", ""))
        return Call("gemini-oauth", model, target.startswith("stream"), inner, request.headers, key, body)
    return Call(wire.provider, str(body.get("model", "")), body.get("stream") is True, body, request.headers, key)


def refuse(wire: Wire, refusal: Refusal, call: Call | None, sse: bool = True) -> web.Response:
    headers = {wire.request_id: "req_" + digest(refusal.message)[:24]}
    google = wire.provider.startswith("gemini")
    if refusal.retry_after is not None and not google:
        headers["retry-after"] = f"{refusal.retry_after:g}"
        headers |= (
            {"retry-after-ms": f"{refusal.retry_after * 1000:g}"} if wire.provider in ("openai", "oai-resp") else {}
        )
    body: Any = wire.error(refusal)
    if google and call and call.stream and not sse:
        body = [body]
    return web.json_response(body, status=refusal.status, headers=headers)


def rate_headers(provider: str) -> dict[str, str]:
    """The limits that a provider reports with every answer."""
    if provider == "anthropic":
        counts = {"limit": "4000", "remaining": "3999", "reset": NOW_TEXT}
        return {f"anthropic-ratelimit-requests-{key}": value for key, value in counts.items()}
    if provider.startswith("gemini"):
        return {}
    windows = ("requests-day", "tokens-minute") if provider == "cerebras" else ("requests", "tokens")
    reset = "60.0" if provider == "cerebras" else "1s"
    counts = {"limit": "10000", "remaining": "9999", "reset": reset}
    return {f"x-ratelimit-{key}-{window}": value for key, value in counts.items() for window in windows}


async def generate(request: web.Request, provider: str) -> web.StreamResponse:
    """Reads, checks, plans and answers one request for a model's output."""
    sandbox, wire = request.app[SANDBOX], WIRES[provider]
    body = read(wire, await request.read())
    call = None if isinstance(body, Refusal) else call_of(wire, request, body)
    with sandbox.entered(request, provider, None if isinstance(body, Refusal) else body) as record:
        refusal = body if isinstance(body, Refusal) else check(call) if call else None
        sse = not provider.startswith("gemini") or request.query.get("alt") == "sse"
        if refusal or call is None:
            return refuse(wire, refusal or Refusal(UNPARSED), call, sse)
        prompt = wire.prompt(call)
        script = plan(prompt)
        await asyncio.sleep(script.wait)
        if script.error or (script.ending == "error_in_stream" and not call.stream):
            return refuse(wire, script.error or script.broken, call, sse)
        answer = answered(call, script, prompt, sandbox.cache)
        headers = {wire.request_id: f"req_{answer.seed[:24]}"} | rate_headers(provider)
        if call.stream and sse:
            return await stream(request, record, wire, answer, headers)
        return await whole(request, record, wire, answer, headers)


async def whole(
    request: web.Request, record: Request, wire: Wire, answer: Answer, headers: dict[str, str]
) -> web.StreamResponse:
    """A JSON body, or half of one. Google streams without `alt=sse` are an array of chunks."""
    body: Any = wire.body(answer)
    if answer.call.stream:
        body = [frame.data for frame in wire.frames(body, answer)]
    raw = compact(body).encode()
    if answer.script.ending == "hang":
        await asyncio.Event().wait()
    if not answer.script.ending:
        return web.Response(body=raw, content_type="application/json", headers=headers)
    response = web.StreamResponse(headers=headers | {"Content-Length": str(len(raw))})
    response.content_type = "application/json"
    await response.prepare(request)
    await response.write(raw[: len(raw) // 2])
    return hang_up(request, record, response, reset=answer.script.ending == "reset")


async def stream(
    request: web.Request, record: Request, wire: Wire, answer: Answer, headers: dict[str, str]
) -> web.StreamResponse:
    """Server-sent events, one write each, ended as the script says."""
    body, script = wire.body(answer), answer.script
    frames = list(wire.frames(body, answer))
    if script.ending:
        frames = cut_short(frames)
    if script.ending == "error_in_stream":
        frames += wire.broken(script.broken, body)
    response = web.StreamResponse(headers=headers | {"Cache-Control": "no-cache"})
    response.content_type = "text/event-stream"
    await response.prepare(request)
    for i, frame in enumerate(frames):
        if script.slow and i:
            await asyncio.sleep(script.slow)
        await response.write(encoded(frame, wire))
    if wire.done and not script.ending:
        await response.write(b"data: [DONE]\n\n")
    if script.ending == "hang":
        await asyncio.Event().wait()
    if script.ending == "reset":
        return hang_up(request, record, response, reset=True)
    await response.write_eof()
    return response


def hang_up(request: web.Request, record: Request, response: web.StreamResponse, reset: bool) -> web.StreamResponse:
    """Ends the connection from this side: with a reset, or in good order but too early."""
    record.finish()
    transport = request.transport
    if transport is not None and reset:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    elif transport is not None:
        transport.close()
    return response


async def code_assist(request: web.Request) -> web.StreamResponse:
    """The methods of Code Assist: the model's, and those that find the project."""
    method = request.match_info["target"]
    if method in ("generateContent", "streamGenerateContent"):
        return await generate(request, "gemini-oauth")
    wire = WIRES["gemini-oauth"]
    body = read(wire, await request.read())
    with request.app[SANDBOX].entered(request, "gemini-oauth", None if isinstance(body, Refusal) else body) as record:
        if isinstance(body, Refusal):
            return refuse(wire, body, None)
        if denied := next(oauth_access(Call("gemini-oauth", "", False, body, request.headers, record.key)), None):
            return refuse(wire, denied, None)
        if method == "loadCodeAssist":
            return web.json_response(load_code_assist(body, record.key))
        if method == "onboardUser":
            begun = onboard(body)
            return refuse(wire, begun, None) if isinstance(begun, Refusal) else web.json_response(begun)
        return refuse(wire, Refusal(f"Method not found: {method}", status=404), None)


async def code_assist_operation(request: web.Request) -> web.Response:
    with request.app[SANDBOX].entered(request, "gemini-oauth", None):
        try:
            return web.json_response(operation(request.match_info["name"]))
        except ValueError:
            return refuse(WIRES["gemini-oauth"], Refusal("Operation not found.", status=404), None)


async def oauth_authorize(request: web.Request) -> web.Response:
    with request.app[SANDBOX].entered(request, "oauth", None):
        try:
            target = authorize(request.query, request.app[SANDBOX].grants)
        except ValueError as error:
            return web.Response(status=400, text=f"Error 400: {error}")
        return web.Response(status=302, headers={"Location": target})


async def oauth_token(request: web.Request) -> web.Response:
    form = {key: str(value) for key, value in (await request.post()).items()}
    with request.app[SANDBOX].entered(request, "oauth", form):
        status, body = token(form, request.app[SANDBOX].grants)
        return web.json_response(body, status=status)


def generator(provider: str) -> Callable[[web.Request], Any]:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await generate(request, provider)

    return handler


# Some SDKs add a version to the address that they are given, hence the second spellings.
ROUTES: tuple[tuple[str, str, Callable[[web.Request], Any]], ...] = (
    ("POST", "/anthropic/v1/messages", generator("anthropic")),
    ("POST", "/openai/chat/completions", generator("openai")),
    ("POST", "/oai-resp/responses", generator("oai-resp")),
    ("POST", "/groq/chat/completions", generator("groq")),
    ("POST", "/groq/openai/v1/chat/completions", generator("groq")),
    ("POST", "/cerebras/chat/completions", generator("cerebras")),
    ("POST", "/cerebras/v1/chat/completions", generator("cerebras")),
    ("POST", r"/gemini/models/{target:[^/]+:(?:stream[gG]|g)enerateContent}", generator("gemini")),
    (
        "POST",
        r"/gemini/{version:v1(?:beta)?}/models/{target:[^/]+:(?:stream[gG]|g)enerateContent}",
        generator("gemini"),
    ),
    ("POST", "/gemini-oauth/v1internal:{target}", code_assist),
    ("GET", "/gemini-oauth/v1internal/operations/{name}", code_assist_operation),
    ("GET", "/oauth/authorize", oauth_authorize),
    ("POST", "/oauth/token", oauth_token),
    ("POST", "/cartesia/tts/{kind:bytes|sse}", cartesia_tts),
    ("GET", "/cartesia/tts/websocket", cartesia_speak),
    ("POST", "/cartesia/stt", cartesia_stt),
    ("GET", "/cartesia/stt/websocket", cartesia_listen),
    ("GET", "/cartesia/stt/turns/websocket", cartesia_listen),
)


def make_app(sandbox: Sandbox | None = None) -> web.Application:
    """The aiohttp application that plays the providers; what comes in is noted in `sandbox`.

    Serve it with `handler_cancellation=True`: that is how a caller's hanging up is noticed while an answer hangs.
    """
    app = web.Application(client_max_size=128 * 2**20)
    app[SANDBOX] = sandbox or Sandbox()
    for method, path, handler in ROUTES:
        app.router.add_route(method, path, handler)
    return app


# == Sandbox =========================================================================================================


@dataclass
class Request:
    """One request as it came in. `body` is the decoded JSON or form, None where there was none or it did not parse.

    `done` is set when the answer ended or the caller went away, `closed` only in the second case; `ended` is the loop
    time (seconds) of either, None until then. For a WebSocket, `body` is the query and `messages` what came over it.
    """

    provider: str
    path: str
    headers: dict[str, str]
    body: Json | None
    key: str
    started: float
    ended: float | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    messages: list[Any] = field(default_factory=list)
    arrival: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def note(self, frame: str | bytes) -> None:
        """Notes a frame of a WebSocket: bytes, or text, decoded where it is a JSON object."""
        message: Any = frame
        if isinstance(frame, str) and frame.startswith("{"):
            with contextlib.suppress(ValueError):
                message = json.loads(frame)
        self.messages.append(message)
        self.arrival.set()
        self.arrival = asyncio.Event()

    async def heard(self, wanted: Callable[[Any], bool]) -> Any:
        """The first frame that is `wanted`; waits until it has come in."""
        at = 0
        while True:
            while at < len(self.messages):
                at += 1
                if wanted(self.messages[at - 1]):
                    return self.messages[at - 1]
            await self.arrival.wait()

    def finish(self, closed: bool = False) -> None:
        """Notes the end; only the first call counts."""
        if self.done.is_set():
            return
        self.ended = asyncio.get_running_loop().time()
        if closed:
            self.closed.set()
        self.done.set()


class Entry:
    """Counts a request as open for as long as a `with` block lasts, and notes how it ended."""

    def __init__(self, sandbox: Sandbox, record: Request) -> None:
        self.sandbox, self.record = sandbox, record

    def __enter__(self) -> Request:
        self.sandbox.open += 1
        return self.record

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.sandbox.open -= 1
        self.record.finish(closed=isinstance(error, (asyncio.CancelledError, ConnectionError)))


PROVIDER_PATHS = {provider: f"/{provider}" for provider in (*WIRES, "cartesia")}
PROVIDER_PATHS["gemini-oauth"] = "/gemini-oauth/v1internal"
KEYS = ("anthropic", "openai", "groq", "gemini", "cerebras", "cartesia")


class Sandbox:
    """A running sandbox, and what it was asked.

    async with Sandbox() as sandbox: ...     # a free loopback port; or `await start(host, port)` and `await close()`

    url        "http://127.0.0.1:PORT"
    base_urls  provider id -> base URL, as a client of that provider takes it
    environ    the variables that point vai here, with made-up keys
    oauth_url  where `/authorize` and `/token` are
    requests   the last `keep` requests, oldest first; `seen` counts all of them
    open       requests in progress

    transcripts     what recordings say in which the sandbox finds no words of its own (`speech` makes some with)
    real_speech     words are spoken by espeak-ng, which must be installed, and are no tones
    pace            seconds that speech over WebSockets takes for each 0.1 seconds of audio
    most_contexts   of speech at a time, then a 429
    context_expires seconds after the last audio of a context until it takes no more text
    mute            nothing is said on speech WebSockets while this is set: what would have been is lost
    handshakes      what a new speech WebSocket meets: "" a welcome, "refuse" a 503, "hang" silence
    """

    def __init__(self, keep: int = 10_000) -> None:
        self.requests: collections.deque[Request] = collections.deque(maxlen=keep)
        self.seen = 0
        self.open = 0
        self.cache: Cache = Cache()
        self.grants: dict[str, Grant] = {}
        self.transcripts: collections.deque[str] = collections.deque()
        self.real_speech = False
        self.pace = 0.0
        self.most_contexts = 15
        self.context_expires = 1.0
        self.mute = False
        self.handshakes = ""
        self.speaking = 0  # contexts
        self.broken: set[Any] = set()  # where streams were broken off as ordered: they are not a second time
        self._sockets: dict[int, web.Request] = {}
        self.url = ""
        self._arrival = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # of the credentials of Code Assist

    @property
    def base_urls(self) -> dict[str, str]:
        return {provider: self.url + path for provider, path in PROVIDER_PATHS.items()}

    @property
    def oauth_url(self) -> str:
        return f"{self.url}/oauth"

    @property
    def environ(self) -> dict[str, str]:
        names = {provider: provider.upper().replace("-", "_") for provider in PROVIDER_PATHS}
        urls = {f"VAI_{names[provider]}_BASE_URL": url for provider, url in self.base_urls.items()}
        keys = {f"{names[provider]}_API_KEY": f"sandbox-{provider}-key" for provider in KEYS}
        login = {
            "GEMINI_OAUTH_PROJECT_ID": "sandbox-project",
            "GEMINI_OAUTH_AUTHORIZE_URL": f"{self.oauth_url}/authorize",
            "GEMINI_OAUTH_TOKEN_URL": f"{self.oauth_url}/token",
        }
        if self._folder:
            login["GEMINI_OAUTH_CREDENTIALS_PATH"] = str(Path(self._folder.name) / "gemini-oauth.json")
        return urls | keys | login

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listens; port 0 takes a free one. Raises OSError if the port is taken."""
        runner = web.AppRunner(make_app(self), handler_cancellation=True, shutdown_timeout=0.2, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, backlog=1024).start()
        except OSError:
            await runner.cleanup()
            raise
        self._runner = runner
        self._folder = login_folder()
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{runner.addresses[0][1]}"

    async def close(self) -> None:
        """Stops listening and ends what still runs. Harmless when not started."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    async def __aenter__(self) -> Sandbox:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def wait_for(self, number: int) -> Request:
        """The request of this number, counted from 1 over all; waits until it has come in.

        Raises LookupError if it is so old that it is no longer kept.
        """
        while self.seen < number:
            await self._arrival.wait()
        back = self.seen - number
        if back >= len(self.requests):
            raise LookupError(f"request {number} is no longer kept")
        return self.requests[-1 - back]

    def entered(self, request: web.Request, provider: str, body: Json | None) -> Entry:
        """Notes a request; the result is a context manager for the time of its answer."""
        wire = WIRES.get(provider)
        find = wire.key if wire else cartesia_key if provider == "cartesia" else None
        key = find(request.headers, request.query) if find else ""
        now = asyncio.get_running_loop().time()
        record = Request(provider, request.path, dict(request.headers), body, key, now)
        self.requests.append(record)
        self.seen += 1
        # Whoever waits holds the old event; the next arrival sets a new one.
        self._arrival.set()
        self._arrival = asyncio.Event()
        return Entry(self, record)

    @contextlib.contextmanager
    def connected(self, request: web.Request) -> Iterator[None]:
        """Keeps a WebSocket in mind for `drop_sockets`."""
        self._sockets[id(request)] = request
        try:
            yield
        finally:
            del self._sockets[id(request)]

    def drop_sockets(self) -> int:
        """Cuts all WebSockets off, as a network that fails would, and says how many."""
        cut = list(self._sockets.values())
        for request in cut:
            drop(request)
        return len(cut)


def login_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder with credentials of Code Assist that do not expire."""
    folder = tempfile.TemporaryDirectory(prefix="vai-sandbox-")
    login = {"access_token": "sandbox-oauth-token", "refresh_token": "none", "expiry_date": 32503680000000}
    (Path(folder.name) / "gemini-oauth.json").write_text(json.dumps(login))
    return folder


SANDBOX = web.AppKey("sandbox", Sandbox)


# == Command line ====================================================================================================


async def run(host: str, port: int) -> None:
    sandbox = Sandbox()
    sandbox.real_speech = shutil.which("espeak-ng") is not None
    await sandbox.start(host, port)
    lines = [f"export {name}={value}" for name, value in sandbox.environ.items()]
    print("\n".join(lines), f"# listening on {sandbox.url}, Ctrl-C ends it", sep="\n", flush=True)
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await stopped.wait()
    await sandbox.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Plays every model provider on this machine, without keys.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8099)
    options = parser.parse_args()
    asyncio.run(run(options.host, options.port))


if __name__ == "__main__":
    main()
