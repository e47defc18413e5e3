"""The seven wire formats: what goes out, what comes in, whole and in pieces, and what goes wrong.

Requests are tables of (canonical, the provider's). Answers are files under `wire/PROVIDER/`: `CASE.sse` and `CASE.json`
say the same, and mean the same message.
"""

from __future__ import annotations

import base64
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import providers
from providers import JSON, PROVIDERS, Error, ProviderError, SSEDecoder, StreamEvent, StreamTruncated, dumps, loads
from providers import provider_error as status_error

WIRE = Path(__file__).parent / "wire"
FUZZ = settings(deadline=None, database=None, derandomize=True, max_examples=80)

A, A6, O, R = "anthropic/claude-sonnet-4-5", "anthropic/claude-opus-4-6", "openai/gpt-4o", "oai-resp/gpt-4o"  # noqa: E741
Q, C, OSS = "groq/llama-3.3-70b-versatile", "cerebras/llama-3.3-70b", "groq/openai/gpt-oss-20b"
G, GO = "gemini/gemini-3-flash-preview", "gemini-oauth/gemini-3-flash-preview"
G3, G2 = "gemini/gemini-3.5-flash", "gemini/gemini-2.5-flash"
OPUS47, OPUS5, OPUS6 = (f"anthropic/claude-opus-{version}" for version in ("4-7", "5", "6"))
OPUS55, SONNET55 = "anthropic/claude-opus-5-5", "anthropic/claude-sonnet-5-5"
QWEN, QWEN3, CQWEN = "groq/qwen/qwen3.8-27b", "groq/qwen/qwen3-32b", "cerebras/qwen-3.8-27b"
SOL, ASTRA, RSOL = "openai/gpt-6-sol", "openai/gpt-6-astra", "oai-resp/gpt-6-sol"
CHATS, OTHERS, ALL = (O, Q, C), (O, R, Q, C, G), (A, O, R, Q, C, G, GO)


# == Encoding ==========================================================================================================


class Sent(NamedTuple):
    http: providers.HTTPRequest
    body: Any
    dropped: list[str]


def parsed(model: str, /, *, headers: dict[str, str] | None = None, **fields: Any) -> providers.MessageRequest:
    return providers.parse_request({"model": model, "messages": [user("hi")]} | fields, headers=headers)


def encode(request: providers.MessageRequest, project: str | None = "p") -> Sent:
    credential = providers.Credential(providers.Secret("k"), project=project)
    sent = PROVIDERS[request.provider].encode(request, credential, "https://up.test", 4096)
    body = loads(sent.body)  # the envelope of Code Assist has a test of its own
    return Sent(sent, body["request"] if request.provider == "gemini-oauth" else body, request.dropped)


def send(model: str, /, **fields: Any) -> Sent:
    return encode(parsed(model, **fields))


def at(body: Any, path: str) -> Any:
    """What stands at `a.b.0.c`; None where nothing does."""
    for step in path.split("."):
        if isinstance(body, list):
            body = body[int(step)] if int(step) < len(body) else None
        else:
            body = body.get(step) if isinstance(body, dict) else None
    return body


def turns(sent: Sent) -> list[JSON]:
    """The history, under whichever name."""
    return next(sent.body[name] for name in ("messages", "input", "contents") if name in sent.body)


def user(*content: Any) -> JSON:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def assistant(*content: Any) -> JSON:
    return user(*content) | {"role": "assistant"}


def text(value: str, **more: Any) -> JSON:
    return {"type": "text", "text": value, **more}


def thought(value: str, signature: str = "") -> JSON:
    return {"type": "thinking", "thinking": value, "signature": signature}


def call(id: str, name: str, input: JSON) -> JSON:
    return {"type": "tool_use", "id": id, "name": name, "input": input}


def result(id: str, content: Any = "", **more: Any) -> JSON:
    return {"type": "tool_result", "tool_use_id": id, "content": content, **more}


def media(kind: str, media_type: str, data: str = "AAAA", **more: Any) -> JSON:
    return {"type": kind, "source": {"type": "base64", "media_type": media_type, "data": data}, **more}


def block(kind: str, **fields: Any) -> JSON:
    return {"type": kind, **fields}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ALL)
def test_where_a_request_goes(model: str, stream: bool) -> None:
    """Each provider has its path, its way to carry the key and its way to ask for a stream."""
    provider, sent = model.partition("/")[0], send(model, **({"stream": True} if stream else {})).http
    method = "streamGenerateContent?alt=sse" if stream else "generateContent"
    paths = {"anthropic": "/v1/messages", "oai-resp": "/responses", "gemini-oauth": f":{method}",
             "gemini": f"/models/gemini-3-flash-preview:{method}"}  # fmt: skip
    keys = {"anthropic": {"x-api-key": "k", "anthropic-version": "2026-10-21"}, "gemini": {"x-goog-api-key": "k"}}

    assert sent.url == "https://up.test" + paths.get(provider, "/chat/completions")
    assert sent.headers == {"Content-Type": "application/json"} | keys.get(provider, {"Authorization": "Bearer k"})
    assert loads(sent.body).get("stream") is (True if stream and "gemini" not in model else None)
    asks = {"include_usage": True} if stream and model in (O, C) else None
    assert loads(sent.body).get("stream_options") == asks
    assert "Bearer" not in repr(sent)


@pytest.mark.parametrize("project", ["p", None])
def test_the_envelope_of_code_assist(project: str | None) -> None:
    """`gemini-oauth` sends what `gemini` sends, inside `request`, with the model and project beside it."""
    sent = encode(parsed(GO, extensions={"gemini-oauth": {"session_id": "s"}}), project)
    inner = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}], "session_id": "s"}
    envelope = {"model": "gemini-3-flash-preview", "request": inner} | ({"project": project} if project else {})
    assert loads(sent.http.body) == envelope


Expected: TypeAlias = dict[str | tuple[str, ...], JSON]
SIX = list("abcdef")
STOPS_AT: JSON = {"stop_sequences": SIX}
USER: JSON = {"metadata": {"user_id": "u"}}
TOOL: JSON = {"name": "now", "description": "d", "input_schema": {"type": "object"}, "strict": True}
PLAIN: JSON = {"name": "now", "input_schema": {"type": "object"}}
CHAT_TOOL: JSON = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
RESPONSES_TOOL: JSON = {"type": "function", "name": "now", "parameters": {"type": "object"}, "strict": False}
DECLARED: JSON = {"name": "now", "parametersJsonSchema": {"type": "object"}}
SCHEMA: JSON = {"type": "object", "properties": {"a": {"type": "object", "properties": {}}}, "required": ["a"]}
INNER: JSON = {"type": "object", "properties": {}, "additionalProperties": False}
CLOSED: JSON = SCHEMA | {"properties": {"a": INNER}, "additionalProperties": False}
LOOSE: JSON = {"type": "object", "properties": {"a": {"type": "string"}}}
SAMPLING: JSON = {"temperature": 0.5, "top_p": 0.9, "top_k": 5}
UNSAMPLED: JSON = {"temperature": None, "top_p": None, "top_k": None, "dropped": "temperature top_p top_k"}
TWO: JSON = {"temperature": 0.5, "top_p": 0.9, "top_k": None, "dropped": "top_k"}
AMID: JSON = {"messages": [user("hi"), {"role": "system", "content": "In French"}, user("go")]}
CACHED: JSON = {"messages": [user(text("hi", cache_control={"type": "ephemeral"}))], "brand_new": 1}
MODE, REPLY = "toolConfig.functionCallingConfig", "response_format.json_schema"
SERIAL: JSON = {"disable_parallel_tool_use": True}


def choose(kind: str, **more: Any) -> JSON:
    return {"tools": [PLAIN], "tool_choice": {"type": kind, **({"name": "now"} if kind == "tool" else {}), **more}}


def structured(schema: JSON) -> JSON:
    return {"output_format": {"type": "json_schema", "json_schema": schema}}


def output(*kinds: str, **more: JSON) -> JSON:
    return {"output": {"modalities": ["text", *kinds], **more}}


CACHED_RESULT: JSON = {"messages": [
    user("?"), assistant(call("t", "now", {})), user(result("t", [text("x", cache_control={"type": "ephemeral"})])),
]}  # fmt: skip
FIELDS: list[tuple[JSON, Expected]] = [  # fields; by model, what the body has (None: not there)
    ({}, {A: {"model": "claude-sonnet-4-5", "max_tokens": 4096, "messages": [user("hi")], "stream": None},
          O: {"model": "gpt-4o", "max_completion_tokens": None, "messages": [user("hi")]},
          R: {"model": "gpt-4o", "max_output_tokens": None, "input": [user("hi")], "store": False},
          G: {"model": None, "generationConfig": None, "contents": [{"role": "user", "parts": [{"text": "hi"}]}]}}),
    ({"max_tokens": 9}, {A: {"max_tokens": 9}, (*CHATS, "openai/o3"): {"max_completion_tokens": 9, "max_tokens": None},
                         "openai/llama3.2": {"max_completion_tokens": None, "max_tokens": 9},
                         R: {"max_output_tokens": 9}, G: {"generationConfig.maxOutputTokens": 9}}),
    ({"system": "S"}, {A: {"system": "S"}, CHATS: {"messages": [{"role": "system", "content": "S"}, user("hi")]},
                       ("openai/o3", "openai/gpt-5"): {"messages.0": {"role": "developer", "content": "S"}},
                       R: {"instructions": "S"}, G: {"systemInstruction.parts": [{"text": "S"}]}}),
    ({"system": [text("a"), text("b")]}, {A: {"system": [text("a"), text("b")]}, O: {"messages.0.content": "a\n\nb"},
                                          G: {"systemInstruction.parts": [{"text": "a"}, {"text": "b"}]}}),
    ({"system": " "}, {A: {"system": None}}),
    (AMID, {(A, *CHATS): AMID, "openai/gpt-5": {"messages.1": {"role": "developer", "content": "In French"}},
            R: {"input.1": {"role": "developer", "content": "In French"}},
            G: {"contents.0.parts.1": {"text": "<system>\nIn French\n</system>"}, "contents.1": None}}),
    (STOPS_AT, {A: STOPS_AT, CHATS: {"stop": SIX[:4]}, ("openai/o3", R): {"stop": None, "stop_sequences": None},
                G: {"generationConfig.stopSequences": SIX[:5]}}),
    (USER, {A: USER, (O, R): {"safety_identifier": "u", "metadata": None}, (Q, C): {"user": "u", "metadata": None},
            G: {"metadata": None, "dropped": "metadata"}}),
    # tools and the choice between them
    ({"tools": [TOOL]}, {A: {"tools": [TOOL]}, CHATS: {"tools.0.function": CHAT_TOOL["function"] | {
        "description": "d", "strict": True}}, R: {"tools": [RESPONSES_TOOL | {"description": "d", "strict": True}]}}),
    ({"tools": [PLAIN]}, {CHATS: {"tools": [CHAT_TOOL], "tool_choice": None, "parallel_tool_calls": None},
                          R: {"tools": [RESPONSES_TOOL]}, G: {"tools": [{"functionDeclarations": [DECLARED]}]},
                          "openai/gpt-5": {"reasoning_effort": None}, "oai-resp/gpt-6-astra": {"reasoning": None},
                          ("openai/gpt-5.4", "openai/gpt-6-sol"): {"reasoning_effort": "none"}}),
    ({"tools": [PLAIN | {"type": "function"}]}, {A: {"tools": [PLAIN | {"type": "custom"}]}}),
    ({"tools": [PLAIN | {"name": "2"}]}, {G: {"tools.0.functionDeclarations.0.name": "_2"}}),
    (choose("auto"), {A: choose("auto"), (*CHATS, R): {"tool_choice": "auto"}, G: {MODE: {"mode": "AUTO"}}}),
    (choose("any"), {A: choose("any"), (*CHATS, R): {"tool_choice": "required"}, G: {MODE: {"mode": "ANY"}}}),
    (choose("none"), {A: choose("none"), (*CHATS, R): {"tool_choice": "none"}, G: {MODE: {"mode": "NONE"}}}),
    (choose("tool"), {A: choose("tool"), CHATS: {"tool_choice": {"type": "function", "function": {"name": "now"}}},
                      R: {"tool_choice": {"type": "function", "name": "now"}},
                      G: {MODE: {"mode": "ANY", "allowedFunctionNames": ["now"]}}}),
    (choose("auto", **SERIAL), {A: choose("auto", **SERIAL), (*CHATS, R): {"parallel_tool_calls": False},
                                G: {"dropped": "tool_choice.disable_parallel_tool_use"}}),
    ({"tool_choice": {"type": "none"}}, {OTHERS: {"tools": None, "tool_choice": None}}),
    # structured output, in any of its spellings
    (structured(SCHEMA), {
        A: {"output_config.format": {"type": "json_schema", "schema": CLOSED}, "output_format": None},
        (O, C, OSS): {REPLY: {"name": "response", "schema": CLOSED, "strict": True}}, Q: {f"{REPLY}.strict": False},
        R: {"text.format": {"type": "json_schema", "name": "response", "schema": CLOSED, "strict": True}},
        G: {"generationConfig": {"responseMimeType": "application/json", "responseJsonSchema": SCHEMA}}}),
    ({"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, {
        A: {"output_config.format.schema": SCHEMA}, O: {f"{REPLY}.schema": CLOSED, "output_config": None}}),
    ({"output_format": {"type": "json_schema", "schema": SCHEMA}}, {O: {f"{REPLY}.schema": CLOSED}}),
    (structured({"name": "n", "schema": SCHEMA}), {O: {f"{REPLY}.schema": CLOSED}}),
    (structured(LOOSE), {(O, OSS): {f"{REPLY}.strict": False}}),
    # images and speech
    (output("image", image={"size": "1792x1024"}), {
        R: {"tools": [{"type": "image_generation", "size": "1792x1024"}]},
        G: {"generationConfig.responseModalities": ["TEXT", "IMAGE"],
            "generationConfig.imageConfig.aspectRatio": "16:9"}}),
    (output("audio", audio={"voice": "ash"}), {
        O: {"modalities": ["text", "audio"], "audio": {"voice": "ash", "format": "wav"}},
        G3: {"generationConfig.speechConfig.voiceConfig.prebuiltVoiceConfig.voiceName": "ash"}}),
    (output("audio") | {"stream": True}, {O: {"audio.format": "pcm16"}}),
    # sampling: Claude takes it on one version only, models that reason not at all
    (SAMPLING, {
        ("anthropic/claude-3-5-haiku-20241022", "anthropic/claude-sonnet-4-20250514"): SAMPLING,
        (A, A6): {"temperature": 0.5, "top_p": None, "top_k": 5, "dropped": "top_p"},
        (OPUS47, OPUS6): UNSAMPLED,
        (*CHATS, R, "openai/llama3.2"): TWO,
        ("openai/o3", "openai/gpt-5", "openai/gpt-5.1", "openai/gpt-7", "oai-resp/gpt-6-sol"): UNSAMPLED,
        G: {"generationConfig": {"temperature": 0.5, "topP": 0.9, "topK": 5}}}),
    (SAMPLING | {"thinking": {"type": "disabled"}}, {
        ("openai/gpt-5.1", "oai-resp/gpt-6-sol"): TWO, "openai/gpt-6-astra": UNSAMPLED}),
    (SAMPLING | {"thinking": {"type": "enabled", "budget_tokens": 2048}}, {A: UNSAMPLED, A6: UNSAMPLED}),
    (SAMPLING | {"tools": [PLAIN]}, {"openai/gpt-6-sol": TWO}),
    # what only Anthropic knows, and what only the caller knows
    (CACHED, {A: CACHED, OTHERS: {"brand_new": None, "dropped": "cache_control brand_new"}}),
    (CACHED_RESULT, {A: CACHED_RESULT, OTHERS: {"dropped": "cache_control"}}),
    ({"extensions": {"anthropic": {"speed": "fast"}, "openai": {"seed": 1, "audio": {"x": 1}}}}, {
        A: {"speed": "fast", "seed": None}, O: {"seed": 1, "audio": {"x": 1}, "extensions": None}, R: {"seed": None}}),
    ({"max_tokens": 9, "extensions": {id: {"generationConfig": {"seed": 1}} for id in ("gemini", "gemini-oauth")}}, {
        G: {"generationConfig": {"maxOutputTokens": 9, "seed": 1}}}),
]  # fmt: skip


def budget(tokens: int, **more: Any) -> JSON:
    return {"thinking": {"type": "enabled", "budget_tokens": tokens}, "max_tokens": 64_000, **more}


OFF: JSON = {"thinking": {"type": "disabled"}}
AUTO: JSON = {"thinking": {"type": "adaptive"}, "max_tokens": 20_000}
MOST: JSON = {"output_config": {"effort": "max"}}
ASKED: list[JSON] = [OFF, budget(2000), budget(8192), budget(16_384), budget(99_000), AUTO, MOST]
# What goes out for each of these: type, budget or level; + is shown, * parsed, ~ hidden, - dropped, a comma nothing.
SCALE = """
anthropic/claude-3-5-haiku  disabled -thinking    -thinking    -thinking     -thinking     -thinking    -effort
anthropic/claude-sonnet-4-5 disabled enabled,2000 enabled,8192 enabled,16384 enabled,63999 enabled,8192 -effort
anthropic/claude-opus-4-5   disabled enabled,2000 enabled,8192 enabled,16384 enabled,63999 enabled,8192 high
anthropic/claude-opus-4-6   disabled enabled,2000 enabled,8192 enabled,16384 enabled,63999 adaptive     max
anthropic/claude-opus-4-7   disabled      adaptive,low+ adaptive,medium+ adaptive,high+ adaptive,high+ adaptive max
anthropic/claude-opus-5     disabled      adaptive,low+ adaptive,medium+ adaptive,high+ adaptive,high+ adaptive max
anthropic/claude-haiku-5-5  disabled      adaptive,low+ adaptive,medium+ adaptive,high+ adaptive,high+ adaptive max
anthropic/claude-sonnet-5-5 between_tools adaptive,low+ adaptive,medium+ adaptive,high+ adaptive,high+ adaptive max
anthropic/claude-opus-5-5   low           adaptive,low+ adaptive,medium+ adaptive,high+ adaptive,high+ adaptive max
anthropic/claude-fable-5-1  low           adaptive,low+ adaptive,medium+ adaptive,high+ adaptive,high+ adaptive max
anthropic/claude-opus-6     low           adaptive,low+ adaptive,medium+ adaptive,high+ adaptive,high+ adaptive max
openai/gpt-4o                 ,       -thinking -thinking -thinking -thinking -thinking -effort
openai/o3                     low     low       medium    high      high      medium    high
openai/gpt-5                  minimal low       medium    high      high      medium    high
openai/gpt-5.1                none    low       medium    high      high      medium    high
openai/gpt-5.2                none    low       medium    high      high      medium    xhigh
openai/gpt-6-sol              none    low       medium    high      high      medium    max
openai/gpt-6-astra            low     low       medium    high      high      medium    max
openai/my-local-model         none    low       medium    high      high      medium    max
oai-resp/gpt-4o               ,       -thinking -thinking -thinking -thinking -thinking -effort
oai-resp/gpt-6-sol            none    low+      medium+   high+     high+     medium+   max
groq/llama-3.3-70b-versatile  ,       -thinking -thinking -thinking -thinking -thinking -effort
groq/openai/gpt-oss-20b       low~    low       medium    high      high      medium    high
groq/qwen/qwen3.8-27b         none*   low*      medium*   high*     high*     medium*   high*
groq/qwen/qwen3-32b           none*   default*  default*  default*  default*  default*  default*
cerebras/gpt-oss-120b         low*    low*      medium*   high*     high*     medium*   high*
cerebras/qwen-3.8-27b         none*   low*      medium*   high*     high*     medium*   high*
gemini/gemini-3-flash-preview MINIMAL LOW+      MEDIUM+   HIGH+     HIGH+     +         HIGH
gemini/gemini-3.1-pro-preview LOW     LOW+      MEDIUM+   HIGH+     HIGH+     +         HIGH
gemini/gemini-4-flash         LOW     LOW+      MEDIUM+   HIGH+     HIGH+     +         HIGH
gemini/gemini-2.5-flash       0       2000+     8192+     16384+    24576+    -1+       24576
gemini/gemini-2.5-pro         128     2000+     8192+     16384+    32768+    -1+       32768
gemini/gemini-2.0-flash       ,       -thinking -thinking -thinking -thinking -thinking -effort
"""
SCALED = [(row[0], ASKED[n], cell) for row in map(str.split, SCALE.split("\n")) for n, cell in enumerate(row[1:])]


@pytest.mark.parametrize(("model", "fields", "expected"), SCALED, ids=[f"{model}-{cell}" for model, _, cell in SCALED])
def test_thinking_is_one_scale(model: str, fields: JSON, expected: str) -> None:
    """`thinking` and effort come out in the words of the model's family, at the nearest level that it has."""
    sent = send(model, **fields)
    names = """thinking.type thinking.budget_tokens output_config.effort reasoning_effort reasoning.effort
        generationConfig.thinkingConfig.thinkingLevel generationConfig.thinkingConfig.thinkingBudget"""
    said = [str(value) for name in names.split() if (value := at(sent.body, name)) is not None]
    shown = ("thinking.display", "reasoning.summary", "generationConfig.thinkingConfig.includeThoughts")
    marks = "+" * any(at(sent.body, name) for name in shown) + "*" * (at(sent.body, "reasoning_format") == "parsed")
    marks += "~" * (at(sent.body, "include_reasoning") is False)
    dropped = ["-" + name.removeprefix("output_config.") for name in sent.dropped]
    assert ",".join([*said, *dropped]) + marks == expected.strip(",")


THOUGHTS: list[tuple[JSON, Expected]] = [  # what stands between the columns above
    (budget(500), {A: {"thinking.budget_tokens": 1024}}),
    (budget(2000, max_tokens=1000), {A: {"thinking": None, "dropped": "thinking"}}),
    (AUTO | {"output_config": {"effort": "xhigh"}}, {
        A6: {"output_config.effort": "high"}, OPUS47: {"output_config.effort": "xhigh"}}),
    (AUTO | {"output_config": {"effort": "low"}}, {G: {"generationConfig.thinkingConfig.thinkingLevel": "LOW"}}),
    (OFF | MOST, {OPUS5: OFF | {"output_config.effort": "high"}}),
    ({}, {(Q, C, OSS): {"reasoning_format": None},
          (QWEN, CQWEN): {"reasoning_effort": None, "reasoning_format": "parsed"}}),
]  # fmt: skip


WEB, CODE, FILES, COMPUTER, DRAW, EDIT = (
    {"type": name} for name in (*providers.NATIVE_TOOLS[:4], "image_generation", "text_editor")
)
BASH, OLD_WEB = block("bash_20250124", name="bash"), block("web_search_20250305", name="web_search")
ONCE: JSON = {"type": "web_search", "config": {"max_uses": 2}}
TUNED: JSON = {"type": "web_search", "config": {"allowed_domains": ["x.test"], "search_context_size": "low"}}
STORE: JSON = {"type": "file_search", "config": {"vector_store_ids": ["v"]}}
SHELF: JSON = {"type": "file_search", "config": {"fileSearchStoreNames": ["s"]}}
USED = {"dropped": "tools.web_search.max_uses"}


def tool(kind: str, **more: Any) -> JSON:
    return {"tools": [{"type": kind, **more}]}


NATIVE: list[tuple[JSON, Expected]] = [  # native tools, by model
    (ONCE, {A: tool("web_search_20250305", name="web_search", max_uses=2), "groq/groq/compound": {
                "compound_custom": {"tools": {"enabled_tools": ["web_search"]}}, "tools": None} | USED,
            R: tool("web_search") | USED | {"include": ["web_search_call.action.sources"]},
            OSS: tool("browser_search") | USED, G: {"tools": [{"googleSearch": {}}]} | USED,
            "openai/gpt-4o-search-preview": {"web_search_options": {}, "tools": None} | USED}),
    (TUNED, {R: tool("web_search", filters={"allowed_domains": ["x.test"]}, search_context_size="low")}),
    (WEB, {A6: tool("web_search_20260318", name="web_search")}),
    (OLD_WEB, {A6: {"tools": [OLD_WEB]}, R: tool("web_search"), G: {"tools.0": {"googleSearch": {}}}}),
    (CODE, {A: tool("code_execution_20250825", name="code_execution"),
            A6: tool("code_execution_20260521", name="code_execution"), OSS: tool("code_interpreter"),
            R: tool("code_interpreter", container={"type": "auto"}) | {"include": ["code_interpreter_call.outputs"]},
            G: {"tools": [{"codeExecution": {}}]}}),
    (EDIT, {A6: tool("text_editor_20250728", name="str_replace_based_edit_tool")}),
    (COMPUTER, {OPUS5: tool("computer_toolset_20260801"), R: tool("computer"),
                G3: {"tools": [{"computerUse": {"environment": "ENVIRONMENT_BROWSER"}}]}}),
    (STORE, {R: tool("file_search", vector_store_ids=["v"]) | {"include": ["file_search_call.results"]}}),
    (SHELF, {G3: {"tools": [{"fileSearch": {"fileSearchStoreNames": ["s"]}}]}}),
    (DRAW | {"config": {"quality": "low"}}, {R: tool("image_generation", quality="low")}),
    (BASH, {A: {"tools": [BASH]}}),
]  # fmt: skip


def by_model(table: list[tuple[JSON, Expected]]) -> list[tuple[str, JSON, JSON]]:
    """(model, fields, what is expected), row by row; `gemini-oauth` has its row wherever G has one."""
    return [
        (model, fields, expected)
        for fields, rows in table
        for models, expected in rows.items()
        for model in ((models,) if isinstance(models, str) else models)
        for model in ((G, GO) if model == G else (model,))
    ]


ENCODED = by_model([*FIELDS, *THOUGHTS, *(({"tools": [each]}, rows) for each, rows in NATIVE)])


@pytest.mark.parametrize(("model", "fields", "expected"), ENCODED, ids=[row[0] for row in ENCODED])
def test_a_field_goes_where_the_provider_has_it(model: str, fields: JSON, expected: JSON) -> None:
    """Each field has its name and form, thinking its nearest level; the advisory rest is dropped, and said."""
    sent = send(model, **fields)

    assert {path: at(sent.body, path) for path in expected if path != "dropped"} == {
        path: value for path, value in expected.items() if path != "dropped"
    }
    assert sent.dropped == expected.get("dropped", "").split()


def test_native_and_function_tools_mix() -> None:
    """Both kinds go out together, on Gemini with the switch that it wants for it."""
    sent = send(G, tools=[PLAIN, WEB])

    assert len(sent.body["tools"]) == 2
    assert sent.body["toolConfig"] == {"includeServerSideToolInvocations": True}
    assert [made["type"] for made in send(R, tools=[WEB, PLAIN]).body["tools"]] == ["function", "web_search"]


DATA, PDF_DATA, URL = "data:image/png;base64,AAAA", "data:application/pdf;base64,AAAA", "https://x.test/a.png"
IMAGE = media("image", "image/png")
PHOTO = block("image", source={"type": "url", "url": URL})
PDF = media("document", "application/pdf", title="A/b")
PAPER = block("document", source={"type": "url", "url": "https://x.test/a.pdf"})
NOTE: JSON = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "D"}, "title": "T"}
FOUND: JSON = {"type": "search_result", "source": "s", "title": "t", "content": [text("x")]}
WAV, MP3, MP4 = media("audio", "audio/wav"), media("audio", "audio/mpeg"), media("video", "video/mp4")
FILM = block("video", source={"type": "url", "url": "https://youtu.be/x"})


def input_image(url: str) -> JSON:
    return block("input_image", image_url=url, detail="auto")


def inline(kind: str) -> JSON:
    return {"inlineData": {"mimeType": kind, "data": "AAAA"}}


def by_uri(uri: str, **kind: str) -> JSON:
    return {"fileData": {"fileUri": uri, **kind}}


SEEN, SEEN_URL = block("image_url", image_url={"url": DATA}), block("image_url", image_url={"url": URL})
HEARD = {kind: block("input_audio", input_audio={"data": "AAAA", "format": kind}) for kind in ("wav", "mp3")}
BLOCKS = by_model([  # a block, and the part that each provider gets of it
    (text("x"), {(A, *CHATS): text("x"), R: block("input_text", text="x"), G: {"text": "x"}}),
    (IMAGE, {A: IMAGE, CHATS: SEEN, R: input_image(DATA), G: inline("image/png")}),
    (PHOTO, {A: PHOTO, (O, Q): SEEN_URL, R: input_image(URL), G: by_uri(URL, mimeType="image/png")}),
    (PDF, {A: PDF, O: block("file", file={"filename": "A_b.pdf", "file_data": PDF_DATA}), G: inline("application/pdf"),
           R: block("input_file", filename="A_b.pdf", file_data=PDF_DATA)}),
    (PAPER, {A: PAPER, R: {"type": "input_file", "file_url": "https://x.test/a.pdf"},
             G: by_uri("https://x.test/a.pdf", mimeType="application/pdf")}),
    (NOTE, {A: NOTE, CHATS: text("T\n\nD"), R: block("input_text", text="T\n\nD"), G: {"text": "T\n\nD"}}),
    (FOUND, {A: FOUND, CHATS: text("t\ns\nx"), R: block("input_text", text="t\ns\nx"), G: {"text": "t\ns\nx"}}),
    (WAV, {O: HEARD["wav"], G: inline("audio/wav")}),
    (MP3, {O: HEARD["mp3"], G: inline("audio/mpeg")}),
    (MP4, {G: inline("video/mp4")}),
    (FILM, {G: by_uri("https://youtu.be/x")}),
])  # fmt: skip


@pytest.mark.parametrize(("model", "block", "part"), BLOCKS, ids=[f"{row[0]}-{row[1]['type']}" for row in BLOCKS])
def test_a_block_becomes_the_provider_s_part(model: str, block: JSON, part: JSON) -> None:
    """Text, images, documents, audio and video by value and by reference, as far as each provider reads them."""
    turn = turns(send(model, messages=[user(text("see"), block)]))[-1]

    assert (turn.get("parts") or turn["content"])[1:] == [part]


LOOP: list[JSON] = [
    user("Weather?"),
    assistant(text("Looking."), call("t1", "sky", {"city": "Oslo"}), call("t2", "sky", {"city": "Rome"})),
    user(result("t2", "no", is_error=True), result("t1", [text("sun"), IMAGE]), text("So?")),
]
ARGUMENTS = [{"name": "sky", "arguments": f'{{"city":"{city}"}}'} for city in ("Oslo", "Rome")]
CHAT_LOOP: list[JSON] = [
    user("Weather?"),
    {"role": "assistant", "content": "Looking.", "tool_calls": [
        {"id": f"t{n}", "type": "function", "function": function} for n, function in enumerate(ARGUMENTS, 1)]},
    {"role": "tool", "tool_call_id": "t2", "content": "Error: no"},
    {"role": "tool", "tool_call_id": "t1", "content": "sun"},
    user(SEEN, text("So?")),
]  # fmt: skip
RESPONSES_LOOP: list[JSON] = [
    user("Weather?"),
    {"role": "assistant", "content": "Looking."},
    *({"type": "function_call", "call_id": f"t{n}", **function} for n, function in enumerate(ARGUMENTS, 1)),
    {"type": "function_call_output", "call_id": "t2", "output": "Error: no"},
    {"type": "function_call_output", "call_id": "t1", "output": [block("input_text", text="sun"), input_image(DATA)]},
    user("So?"),
]


def gemini_loop(modern: bool) -> list[JSON]:
    """Answers stand in the order of the calls; a call that Gemini did not make carries Google's own word for that."""
    one, two, image = ({"id": "t1"}, {"id": "t2"}, [inline("image/png")]) if modern else ({}, {}, [])
    skip = {"thoughtSignature": "skip_thought_signature_validator"} if modern else {}
    sun = {"name": "sky", "response": {"output": "sun"}, **one, **({"parts": image} if modern else {})}
    return [
        {"role": "user", "parts": [{"text": "Weather?"}]},
        {"role": "model", "parts": [
            {"text": "Looking."}, {"functionCall": {"name": "sky", "args": {"city": "Oslo"}, **one}, **skip},
            {"functionCall": {"name": "sky", "args": {"city": "Rome"}, **two}}]},
        {"role": "user", "parts": [
            {"functionResponse": sun}, {"functionResponse": {"name": "sky", "response": {"error": "no"}, **two}},
            *([] if modern else [inline("image/png")]), {"text": "So?"}]},
    ]  # fmt: skip


BLANK: list[JSON] = [user("hi"), assistant(text(" \n")), assistant(IMAGE), user(text(" "), text("go"))]
HI_GO = [user("hi"), user("go")]
HISTORIES: list[tuple[str, list[JSON], list[JSON]]] = [
    (A, LOOP, LOOP), *((model, LOOP, CHAT_LOOP) for model in CHATS), (R, LOOP, RESPONSES_LOOP),
    (G, LOOP, gemini_loop(True)), (GO, LOOP, gemini_loop(True)), (G2, LOOP, gemini_loop(False)),
    (A, BLANK, [user("hi"), user(text("go"))]), (A, [user("hi"), assistant("  "), user("go")], HI_GO),
    (A, [*LOOP[:2], user(text("x"), *LOOP[2]["content"][:2])], [*LOOP[:2], user(*LOOP[2]["content"][:2], text("x"))]),
    (O, [user("hi"), assistant(WAV | {"transcript": "Ho"}), user("go")], [user("hi"), assistant("Ho"), user("go")]),
    (R, [user("hi"), assistant(IMAGE), user("go")], HI_GO),
    (G, [*HI_GO, assistant(text("a")), assistant("b"), user("on")], [
        {"role": "user", "parts": [{"text": "hi"}, {"text": "go"}]},
        {"role": "model", "parts": [{"text": "a"}, {"text": "b"}]}, {"role": "user", "parts": [{"text": "on"}]}]),
]  # fmt: skip


@pytest.mark.parametrize(("model", "history", "expected"), HISTORIES, ids=[row[0] for row in HISTORIES])
def test_a_history_is_told_in_the_provider_s_way(model: str, history: list[JSON], expected: list[JSON]) -> None:
    """A tool loop keeps its meaning; what has no form is left out, results come first, neighbours merge."""
    assert turns(send(model, messages=history, tools=[PLAIN | {"name": "sky"}])) == expected


@pytest.mark.parametrize("model", ALL)
def test_nothing_to_say_is_refused(model: str) -> None:
    """A history that holds nothing for the provider is a 400, not an empty request."""
    with pytest.raises(providers.InvalidRequestError) as caught:
        send(model, messages=[user(text(" " if model == A else ""))])
    assert caught.value.param == "messages"


def asking(block: JSON) -> JSON:
    return {"messages": [user(text("see"), block)]}


HEAR, SPEAK, DRAWN_BY = "openai, gemini, gemini-oauth", "openai, gemini", "oai-resp, gemini, gemini-oauth"
READ, SEARCH = "anthropic, openai, oai-resp, gemini, gemini-oauth", "anthropic, oai-resp, groq, gemini, gemini-oauth"
SEE = "anthropic, openai, oai-resp, groq, gemini, gemini-oauth"
BLOCK = "messages[0].content[1]"
UNSUPPORTED: list[tuple[tuple[str, ...], JSON, str, str, str]] = [  # models, fields, param, feature, who has it
    ((A, R, Q), asking(WAV), BLOCK, "input", HEAR),
    ((A, *CHATS, R), asking(MP4), BLOCK, "video input", "gemini, gemini-oauth"),
    ((O,), asking(media("audio", "audio/ogg")), BLOCK, "audio/ogg input", "gemini, gemini-oauth"),
    ((O,), asking(PAPER), BLOCK, "a document", "anthropic, oai-resp, gemini, gemini-oauth"),
    ((Q, C), asking(PDF), BLOCK, "a document", READ),
    ((C,), asking(PHOTO), BLOCK, "an image", SEE),
    ((A, GO), {"tools": [FILES]}, "tools", "file_search", "oai-resp, gemini"),
    ((A, G), {"tools": [DRAW]}, "tools", "image_generation", "oai-resp"),
    ((O, C), {"tools": [WEB]}, "tools", "web_search", SEARCH),
    ((O, C), {"tools": [CODE]}, "tools", "code_execution", SEARCH),
    ((Q, GO), {"tools": [COMPUTER]}, "tools", "computer_use", "anthropic, oai-resp, gemini"),
    ((R, G), {"tools": [EDIT]}, "tools", "text_editor", "anthropic"),
    ((O, R, G), {"tools": [BASH]}, "tools", "bash", "anthropic"),
    ((A, *CHATS), output("image"), "output.modalities", "image output", DRAWN_BY),
    ((A, Q, C, R, GO), output("audio"), "output.modalities", "audio output", SPEAK),
    ((ASTRA,), {"tools": [PLAIN]}, "tools", "tools on gpt-6-astra", "oai-resp"),
    ((SOL,), {"tools": [PLAIN]} | AUTO, "tools", "tools with thinking on gpt-6-sol", "oai-resp"),
    ((G2, GO), {"tools": [PLAIN, WEB]}, "tools", "native tools beside function tools", ""),
    ((OPUS55, SONNET55, OPUS6), choose("any"), "tool_choice", "tool_choice with claude-", ""),
    ((A6, OPUS5), {"messages": [user("hi"), assistant("Once")]}, "messages", "prefill", ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "fields", "param", "feature", "have"), [(model, *row[1:]) for row in UNSUPPORTED for model in row[0]]
)
def test_what_a_provider_cannot_do_is_said(model: str, fields: JSON, param: str, feature: str, have: str) -> None:
    """A 400 names the feature, the provider, and exactly those providers that have it."""
    with pytest.raises(providers.InvalidRequestError) as caught:
        send(model, **fields)
    fault, provider = caught.value, model.partition("/")[0]

    assert (fault.code, fault.param, fault.provider, fault.retryable) == ("unsupported_feature", param, provider, False)
    assert provider in fault.message
    assert feature in fault.message
    assert fault.message.partition("providers that do: ")[2].partition(";")[0] == (
        ", ".join(id for id in have.split(", ") if id != provider)
    )


WARM: JSON = {"temperature": 0.5}
DESK, DESK_BETA = {"tools": [COMPUTER]}, "computer-use-2025-01-24"
OLD, NEW, BETA = {"anthropic-version": "2023-06-01"}, {"anthropic-version": "2026-10-21"}, {"anthropic-beta": "a-1,b"}


@pytest.mark.parametrize(
    ("model", "fields", "given", "version", "beta", "dropped"),
    [
        (A, {}, {}, "2026-10-21", None, ""), (A, WARM, {}, "2023-06-01", None, ""),
        (A, {}, OLD, "2023-06-01", None, ""),
        (A, WARM, NEW, "2026-10-21", None, "temperature"), (A, WARM, OLD, "2023-06-01", None, ""),
        (OPUS47, WARM, {}, "2026-10-21", None, "temperature"), (A, {}, BETA, "2026-10-21", "a-1,b", ""),
        (A, DESK, {}, "2026-10-21", DESK_BETA, ""), (A, DESK, BETA, "2026-10-21", f"a-1,b,{DESK_BETA}", ""),
        (A, DESK, {"anthropic-beta": DESK_BETA}, "2026-10-21", DESK_BETA, ""),
    ],
)  # fmt: skip
def test_the_version_and_betas_of_anthropic(
    model: str, fields: JSON, given: dict[str, str], version: str, beta: str | None, dropped: str
) -> None:
    """The caller's headers go through; without a version, sampling decides which one; a tool's beta is added once."""
    sent = encode(parsed(model, headers=given, **fields))

    assert (sent.http.headers["anthropic-version"], sent.http.headers.get("anthropic-beta")) == (version, beta)
    assert sent.dropped == dropped.split()


@pytest.mark.parametrize("tail", [assistant(text("more")), assistant(thought("", "sig2"), call("t3", "sky", {}))])
def test_a_history_keeps_its_bytes_for_anthropic(tail: JSON) -> None:
    """What was sent in one turn is sent again in the next, byte for byte, keys in the caller's order."""
    odd = {"text": "Z\u00fcrich \ud83d\ude00", "type": "text", "brand_new": {"b": 1, "a": 2}}
    history = [user(odd, text(" ")), assistant(thought("hm", "sig+/="), *LOOP[1]["content"]), LOOP[2]]
    fixed = {"system": [text("S", cache_control={"type": "ephemeral"})], "tools": [TOOL]}
    go = user(result("t3", "x")) if len(tail["content"]) == 2 else user("go")
    first = send(A6, messages=history, **fixed).body
    second = send(A6, messages=[*history, tail, go], **fixed).body | {"messages": None}
    again = send(A6, messages=[*history, tail, go], **fixed).body["messages"]

    assert json.dumps(again[: len(history)]) == json.dumps(first["messages"])
    assert json.dumps(first | {"messages": None}) == json.dumps(second)
    assert json.dumps(first["messages"][0]["content"][0]) == json.dumps(odd)


def test_thinking_that_never_was_is_not_demanded() -> None:
    """In a tool loop that another model began, Claude would ask for a thinking block: `thinking` is dropped."""
    foreign = assistant(thought("", providers.sign("openai", {"text": 1})), call("c", "now", {}))
    for model_s, after, kept in (
        (foreign, [], False),
        (foreign, [assistant("Noon."), user("And now?")], True),
        (foreign, [user("Stop.")], True),
        (assistant(thought("hm", "sig"), call("c", "now", {})), [], True),
    ):
        sent = send(A, messages=[user("hi"), model_s, user(result("c")), *after], tools=[PLAIN], **budget(2000))
        assert ("thinking" in sent.body, sent.dropped) == (kept, [] if kept else ["thinking"])
        assert sent.body["messages"][1]["content"][-1] == call("c", "now", {})


@pytest.mark.parametrize("model", [*CHATS, R])
@pytest.mark.parametrize("id", ["functions.add:0", "x" * 41, "a b", "\u00e9"])
def test_a_tool_call_id_is_mapped_alike_everywhere(model: str, id: str) -> None:
    """An id that the target would refuse becomes the same stand-in in the call and its result, turn after turn."""
    history = [user("hi"), assistant(call(id, "now", {})), user(result(id, "noon"))]
    bodies = [json.dumps(turns(send(model, messages=m))) for m in (history, [*history, assistant("ok"), user("go")])]
    ids = {match for body in bodies for match in re.findall(r'"(?:id|call_id|tool_call_id)": "([^"]*)"', body)}

    assert len(ids) == 1
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,40}", ids.pop())
    assert providers.portable_id(id) != providers.portable_id(id + "x")
    assert all(providers.portable_id(good) == good for good in ("call_1", "toolu_01A-b", "x" * 40))


NOT_PERMITTED = "{}: Extra inputs are not permitted"
SERIAL_FIELD = "tool_choice.disable_parallel_tool_use"
REFUSED: list[tuple[str, JSON, str, str, str]] = [  # model, fields, the 400's param or words, what is left out, where
    (A, SAMPLING, "temperature", "temperature", "temperature"),
    (A, USER, NOT_PERMITTED.format("metadata"), "metadata", "metadata"),
    (A, budget(2000), NOT_PERMITTED.format("thinking"), "thinking", "thinking"),
    (O, SAMPLING, "Unsupported parameter: 'top_p' is not supported with this model.", "top_p", "top_p"),
    ("openai/local", MOST, "reasoning_effort", "thinking", "reasoning_effort"),
    (O, USER, "Unrecognized request argument supplied: safety_identifier", "metadata", "safety_identifier"),
    (O, choose("auto", **SERIAL), "parallel_tool_calls", SERIAL_FIELD, "parallel_tool_calls"),
    (RSOL, AUTO, "reasoning.effort", "thinking", "reasoning"),
    (Q, USER, "user", "metadata", "user"),
    (QWEN3, AUTO, "reasoning_format", "thinking", "reasoning_format"),
    (CQWEN, AUTO, "reasoning_effort", "thinking", "reasoning_effort"),
    (G, SAMPLING, "topK is not supported for this model", "top_k", "generationConfig.topK"),
    (G, AUTO, "thinking_level is not supported", "thinking", "generationConfig.thinkingConfig"),
]


@pytest.mark.parametrize(("model", "fields", "words", "name", "path"), REFUSED, ids=[f"{r[0]}-{r[3]}" for r in REFUSED])
def test_a_refused_advisory_field_is_left_out_once(model: str, fields: JSON, words: str, name: str, path: str) -> None:
    """A 400 that names an advisory field that was sent says what to leave out of a second try; there is no third."""
    request = parsed(model, **fields)
    adapter, sent = PROVIDERS[request.provider], encode(request)
    error = {"message": words} if " " in words else {"message": "bad", "param": words}
    fault = status_error(adapter.id, 400, {}, dumps({"error": error}))

    assert at(sent.body, path) is not None
    assert adapter.refused_field(fault, request, sent.http) == name
    for status, said in ((400, "model is not supported"), (500, words)):
        other = status_error(adapter.id, status, {}, dumps({"message": said}))
        assert adapter.refused_field(other, request, sent.http) is None
    request.drop(name)
    again = encode(request)
    assert at(again.body, path) is None
    assert adapter.refused_field(fault, request, again.http) is None


# == The grammar of a stream ===========================================================================================

STOPPED = "end_turn max_tokens stop_sequence tool_use pause_turn refusal model_context_window_exceeded"
DELTAS = {"text": ["text_delta"], "thinking": ["thinking_delta", "signature_delta"], "tool_use": ["input_json_delta"]}
PARTS = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


def check_usage(usage: JSON) -> None:
    assert all(type(usage[name]) is int and usage[name] >= 0 for name in (*PARTS, "total_tokens"))
    assert usage["total_tokens"] == sum(usage[name] for name in PARTS)


def check_grammar(events: list[StreamEvent], provider: str, complete: bool = True) -> None:
    """`message_start`, blocks from 0 that neither overlap nor reopen, `message_delta`, `message_stop`, and no more."""
    frames = [event.to_wire() for event in events]
    said = [frame for frame in frames if frame["type"] != "ping"]
    kinds = [frame["type"] for frame in said]
    assert said[:1] == frames[:1]
    assert [place for place, kind in enumerate(kinds) if kind == "message_start"] == ([0] if said else [])
    if complete or "message_stop" in kinds or "message_delta" in kinds:
        assert kinds[-2:] == ["message_delta", "message_stop"]
        assert kinds.count("message_delta") == kinds.count("message_stop") == 1
    index, kind = -1, None
    for frame in said:
        match frame:
            case {"type": "message_start", "message": message}:
                assert (message["type"], message["role"], message["content"]) == ("message", "assistant", [])
                assert message["model"].startswith(f"{provider}/")
                assert isinstance(message["id"], str)
                check_usage(message["usage"])
            case {"type": "content_block_start", "content_block": block}:
                assert kind is None
                index, kind = index + 1, block["type"]
                if kind == "tool_use" and provider != "anthropic":
                    assert re.fullmatch(r"[A-Za-z0-9_-]{1,40}", block["id"])
                    assert block["input"] == {}
            case {"type": "content_block_delta", "delta": delta}:
                assert kind is not None
                if delta["type"] in ("text_delta", "thinking_delta", "signature_delta", "input_json_delta"):
                    assert delta["type"] in DELTAS.get(kind, [delta["type"]])
                    assert all(isinstance(value, str) for value in delta.values())
            case {"type": "content_block_stop"}:
                assert kind is not None
                kind = None
            case {"type": "message_delta"}:
                assert kind is None
                assert frame["delta"]["stop_reason"] in STOPPED.split()
                assert isinstance(frame["delta"]["stop_sequence"], str | None)
                check_usage(frame["usage"])
        assert frame.get("index", index) == index
    ids = [frame["content_block"].get("id") for frame in said if "content_block" in frame]
    made = [id for id in ids if isinstance(id, str) and id.startswith("toolu_vai_")]
    assert len(made) == len(set(made))


def check_played(provider: str, events: list[StreamEvent], fault: Error | None) -> None:
    """Whatever came in: the grammar holds, each event can be written and read, and the end is clean."""
    check_grammar(events, provider, complete=fault is None)
    assert fault is None or (fault.provider == provider and dumps(fault.to_wire()))
    for event in events:
        (frame,) = SSEDecoder().feed(providers.sse_frame(event))
        assert (frame.event, loads(frame.data)) == (event.type, event.to_wire())
        assert providers.event_from_wire(loads(frame.data)) == event
    if events:
        assert dumps(added(events).to_wire())


# == Decoding ==========================================================================================================


def signed(provider: str, state: JSON, words: str = "") -> JSON:
    return thought(words, providers.sign(provider, state))


def mused(provider: str, words: str) -> JSON:
    return signed(provider, {"text": 1}, words)


def page(url: str, title: str = "", **more: Any) -> JSON:
    where = {"type": "web_search_result_location", "url": url, "title": title}
    return {**where, "cited_text": "", "encrypted_index": "", **more}


def hits(id: str, *found: JSON, **more: Any) -> JSON:
    empty = {"type": "web_search_result", "title": "", "encrypted_content": "", "page_age": None}
    return {"type": "web_search_tool_result", "tool_use_id": id, "content": [empty | hit for hit in found], **more}


def ran(id: str, stdout: str = "2\n") -> JSON:
    content = {"type": "code_execution_result", "stdout": stdout, "stderr": "", "return_code": 0, "content": []}
    return {"type": "code_execution_tool_result", "tool_use_id": id, "content": content}


def server(id: str, name: str, **input: Any) -> JSON:
    return {"type": "server_tool_use", "id": id, "name": name, "input": input}


class Answer(NamedTuple):
    """What a fixture says: the model that it reports, the content, tokens in, out, read from and written to cache."""

    model: str
    content: list[JSON]
    usage: tuple[int, int, int, int]
    stop_reason: str = "end_turn"
    fields: JSON | None = None


SONNET, GPT, GPT6 = "claude-sonnet-4-5-20250929", "gpt-4o-2024-08-06", "gpt-6-sol-2026-09-01"
FLASH = "gemini-3-flash-preview"
HIT, HIT_Y = ({"url": f"https://{name}.test/", "title": name.upper()} for name in "xy")
OSLO, ROME, PNG = {"city": "Oslo"}, {"city": "Rome"}, "iVBORw0KGgo="
SUMMARY: JSON = {"item": {"type": "reasoning", "id": "rs_1", "encrypted_content": "gAAA+/="}, "parts": [6, 5]}
ACTION = {"type": "search", "query": "x", "sources": [{"type": "url", "url": "https://x.test/"}]}
SEARCHED = {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": ACTION}
RAN = {"type": "code_interpreter_call", "id": "ci_1", "status": "completed", "code": "print(2)",
       "container_id": "cntr_1", "outputs": [{"type": "logs", "logs": "2\n"}]}  # fmt: skip
DRAWN = {"type": "image_generation_call", "id": "ig_1", "status": "completed"}
PYTHON = {"executableCode": {"language": "PYTHON", "code": "print(2)"}, "thoughtSignature": "c2ln"}
PRINTED = {"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "2\n"}}
FROM, TO = (signed("gemini", {where: {"thoughtSignature": "c2ln"}}) for where in ("next", "prev"))
BOTH = [call("call_1", "weather", OSLO), call("call_2", "weather", ROME)]
SPAN: JSON = {"start_index": 3, "end_index": 8}
ANSWERS: dict[str, Answer] = {
    "anthropic/text": Answer(SONNET, [text("H\u00e9, world")], (12, 5, 3, 2)),
    "anthropic/tools": Answer(SONNET, [
        text("Looking."), call("toolu_1", "weather", OSLO), call("toolu_2", "now", {})], (7, 9, 0, 0), "tool_use"),
    "anthropic/thinking": Answer("claude-opus-4-6", [
        thought("Hm, well", "EqQB+/=="), {"type": "redacted_thinking", "data": "Zm9v"}, text("Yes")], (4, 30, 0, 0)),
    "anthropic/search": Answer(SONNET, [
        server("srvtoolu_1", "web_search", query="x"), hits("srvtoolu_1", HIT | {"encrypted_content": "Zg=="}),
        text("x is y", citations=[page(**HIT, encrypted_index="Eo", cited_text="x is y")])], (90, 8, 0, 0)),
    "openai/text": Answer(GPT, [text("H\u00e9llo")], (10, 7, 4, 6)),
    "openai/tools": Answer(GPT, [text("Two."), *BOTH], (5, 6, 0, 0), "tool_use"),
    "openai/local": Answer("llama3.2", [
        mused("openai", "Hm, so"), call("toolu_vai_NEW", "now", {"tz": "UTC"})], (0, 0, 0, 0), "tool_use"),
    "openai/refusal": Answer(GPT, [text("I cannot.")], (3, 2, 0, 0), "refusal"),
    "openai/citations": Answer(GPT, [text("Yes", citations=[page(**HIT, start_index=0, end_index=3)])], (3, 2, 0, 0)),
    "openai/audio": Answer(GPT, [media("audio", "audio/pcm16", "AAECAw==", transcript="Hi there")], (3, 2, 0, 0),
                           fields=output("audio", audio={"format": "pcm16"})),
    "groq/reasoning": Answer("openai/gpt-oss-20b", [mused("groq", "Hm ok"), text("Hi")], (11, 6, 0, 0)),
    "groq/tools": Answer("llama-3.3-70b-versatile", [
        call("abc1", "weather", OSLO), call("toolu_vai_NEW", "now", {})], (8, 4, 0, 0), "tool_use"),
    "groq/compound": Answer("groq/compound", [
        server("srvgroq_NEW", "web_search", query="x"), hits("srvgroq_NEW", HIT | {"text": "x is y"}),
        server("srvgroq_NEW", "code_execution", code="print(2)"), ran("srvgroq_NEW"), text("So.")], (8, 4, 0, 0)),
    "cerebras/tools": Answer("gpt-oss-120b", [mused("cerebras", "Both cities"), *BOTH], (4, 8, 5, 0), "tool_use"),
    "oai-resp/text": Answer(GPT6, [
        signed("oai-resp", {"next": {"phase": "final_answer"}}),
        text("H\u00e9llo", citations=[page(**HIT, start_index=0, end_index=5)])], (10, 7, 4, 6)),
    "oai-resp/tools": Answer(GPT6, [signed("oai-resp", SUMMARY, "First.\n\nThen."), *BOTH], (5, 6, 0, 0), "tool_use"),
    "oai-resp/native": Answer(GPT6, [
        signed("oai-resp", {"item": SEARCHED}), server("ws_1", "web_search", type="search", query="x"),
        hits("ws_1", HIT | {"title": ""}), signed("oai-resp", {"item": RAN}),
        server("ci_1", "code_execution", code="print(2)", container_id="cntr_1"), ran("ci_1"),
        signed("oai-resp", {"item": DRAWN}), media("image", "image/png", PNG), text("So.")], (50, 6, 0, 0)),
    "oai-resp/refusal": Answer(GPT6, [text("I cannot.")], (3, 2, 0, 0), "refusal"),
    "oai-resp/incomplete": Answer(GPT6, [text("Half")], (3, 2, 0, 0), "max_tokens"),
    "gemini/text": Answer(FLASH, [thought("Hm, well"), text("H\u00e9llo"), TO], (19, 7, 4, 0)),
    "gemini/tools": Answer(FLASH, [
        FROM, text("Both."), FROM, *BOTH, call("toolu_vai_NEW", "now", {})], (5, 6, 0, 0), "tool_use"),
    "gemini/search": Answer(FLASH, [
        text("So \u00e9 is y.", citations=[page(**HIT, **SPAN), page(**HIT_Y, **SPAN)]),
        server("srvgem_NEW", "web_search", queries=["x"]),
        hits("srvgem_NEW", HIT, HIT_Y, search_entry_point="<b>x</b>")], (5, 6, 0, 0)),
    "gemini/parts": Answer(FLASH, [
        signed("gemini", {"part": PYTHON}), server("srvgem_NEW", "code_execution", code="print(2)", language="python"),
        signed("gemini", {"part": PRINTED}), ran("srvgem_NEW"), FROM, media("image", "image/png", PNG),
        media("audio", "audio/wav", "UklGRg==", transcript=""), text("So.")], (5, 6, 0, 0)),
    "gemini/blocked": Answer(FLASH, [], (8, 0, 0, 0), "refusal"),
    "gemini/recited": Answer(FLASH, [
        text("Once upon", citations=[page("https://x.test/", start_index=0, end_index=4)])], (5, 6, 0, 0)),
    "gemini-oauth/text": Answer(FLASH, [text("H\u00e9llo")], (5, 6, 0, 0)),
    "gemini-oauth/partial": Answer(FLASH, [
        call("fc1", "book", OSLO | {"days": [2, {"am": True}], "note": None})], (5, 6, 0, 0), "tool_use"),
}  # fmt: skip
CASES = sorted(ANSWERS)


def asked(case: str, **more: Any) -> providers.MessageRequest:
    """The request that a fixture answers."""
    return parsed(f"{case.partition('/')[0]}/{ANSWERS[case].model}", **(ANSWERS[case].fields or {}), **more)


def recorded(case: str) -> bytes:
    return (WIRE / f"{case}.sse").read_bytes()


def decoded(provider: str, body: Any, model: str = "m", **fields: Any) -> providers.Message:
    return PROVIDERS[provider].decode(body, parsed(f"{provider}/{model}", **fields))


def play(request: providers.MessageRequest, pieces: Iterable[bytes]) -> tuple[list[StreamEvent], Error | None]:
    """Read a stream to its end; half an event there is the mark of a broken one, unless the answer is whole."""
    decoder, sse = PROVIDERS[request.provider].decoder(request), SSEDecoder()
    events: list[StreamEvent] = []
    try:
        for piece in pieces:
            for found in sse.feed(piece):
                events += decoder.feed(found)
        for found in sse.close():
            if is_json(found.data) or found.data == "[DONE]":
                events += decoder.feed(found)
            elif not decoder.ended and not decoder.ending:
                raise StreamTruncated(provider=request.provider)
        return events + decoder.close(), None
    except Error as fault:
        return events, fault


def is_json(data: str) -> bool:
    try:
        return loads(data) is not loads
    except ValueError:
        return False


def streamed(case: str, data: bytes | None = None) -> tuple[list[StreamEvent], Error | None]:
    return play(asked(case, stream=True), [recorded(case) if data is None else data])


def named(value: Any) -> Any:
    """The same, with the ids that vai has made up replaced."""
    return json.loads(re.sub(r"\b(msg|toolu_vai|srv[a-z]+)_[0-9a-f]{20,24}\b", r"\1_NEW", json.dumps(value)))


def wire(events: Iterable[StreamEvent]) -> list[JSON]:
    return [event.to_wire() for event in events]


def added(events: Iterable[StreamEvent]) -> providers.Message:
    message = providers.accumulate(events)
    assert message is not None
    return message


@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_read(case: str) -> None:
    """Streamed or whole, an answer is the same message: its blocks, stop reason, usage, model and id."""
    provider, answer, (events, fault) = case.partition("/")[0], ANSWERS[case], streamed(case)
    assert fault is None
    check_grammar(events, provider)
    whole = PROVIDERS[provider].decode(loads((WIRE / f"{case}.json").read_bytes()), asked(case))
    for message in (added(events), whole):
        assert named(message.to_wire()["content"]) == answer.content
        assert (message.stop_reason, message.stop_sequence) == (answer.stop_reason, None)
        assert tuple(message.to_wire()["usage"][name] for name in PARTS) == answer.usage
        assert message.usage.total_tokens == sum(answer.usage)
        assert message.model == f"{provider}/{answer.model}"
        assert message.id in ("msg_1", "chatcmpl-1", "resp_1", "trace_1")
    assert named(whole.to_wire()) == named(added(events).to_wire())


def test_every_fixture_is_read() -> None:
    """No file under `wire/` lies about unread, and each stream has its whole answer beside it."""
    files = {path.relative_to(WIRE).as_posix() for path in WIRE.glob("*/*")}
    assert files == {f"{case}.{kind}" for case in ANSWERS for kind in ("json", "sse")}


def script(events: Iterable[StreamEvent]) -> list[str]:
    """Events in short: `1 call_1`, `1 {"a"`, `1.`."""
    out = []
    for event in events:
        match event:
            case providers.ContentBlockStart(index, block):
                out.append(f"{index} {getattr(block, 'id', block.type)}")
            case providers.ContentBlockDelta(index, delta):
                out.append(f"{index} {getattr(delta, delta.__slots__[0])}")
            case providers.ContentBlockStop(index):
                out.append(f"{index}.")
    return out


SIGNED = providers.sign("oai-resp", SUMMARY)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("openai/tools", '0 text|0 Two.|0.|1 call_1|1 {"city":|1 "Oslo"}|1.|2 call_2|2 {"city":"R|2 ome"}|2.'),
        ("oai-resp/tools", f'0 thinking|0 Fir|0 st.|0 \n\nThe|0 n.|0 {SIGNED}|0.|1 call_1|1 {{"city":|1 "Oslo"}}|1.'),
        ("gemini/text", f"0 thinking|0 Hm,|0  well|0.|1 text|1 H\u00e9|1 llo|1.|2 thinking|2 {TO['signature']}|2."),
    ],
)  # fmt: skip
def test_pieces_go_out_as_they_come(case: str, said: str) -> None:
    """Deltas go out at once; of interleaved calls the later ones wait; a signature ends its block."""
    assert script(streamed(case)[0])[: said.count("|") + 1] == said.split("|")


GOOGLES = ("gemini", "gemini-oauth")
CHATTING = ("openai", "groq", "cerebras")
DONE = {id: "STOP" if id in GOOGLES else "stop" for id in PROVIDERS} | {
    "anthropic": "end_turn",
    "oai-resp": "completed",
}


def whole(provider: str, reason: str, words: str | None = "x", usage: Any = None, **more: Any) -> JSON:
    """The smallest answer in each format."""
    if provider == "anthropic":
        return {"content": [text(words)] if words else [], "stop_reason": reason, "usage": usage or {}, **more}
    if provider == "oai-resp":
        status, _, why = reason.partition(":")
        said = [{"type": "message", "content": [{"type": "output_text", "text": words}]}]
        return {"status": status, "incomplete_details": {"reason": why}, "output": said, "usage": usage, **more}
    if provider in GOOGLES:
        content = {"parts": [{"text": words}] if words else [], **more}
        body = {"candidates": [{"content": content, "finishReason": reason}], "usageMetadata": usage}
        return {"response": body} if provider == "gemini-oauth" else body
    message = {"content": words, **more}
    return {"choices": [{"index": 0, "message": message, "finish_reason": reason}], "usage": usage}


CALLED = {"tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}
REFUSALS = """SAFETY RECITATION BLOCKLIST PROHIBITED_CONTENT SPII LANGUAGE ESCALATION PUP_LIMITED_DISABLED MODEL_ARMOR
    IMAGE_SAFETY IMAGE_PROHIBITED_CONTENT IMAGE_RECITATION"""
FAILURES = """MALFORMED_FUNCTION_CALL UNEXPECTED_TOOL_CALL TOO_MANY_TOOL_CALLS MISSING_THOUGHT_SIGNATURE
    MALFORMED_RESPONSE NO_IMAGE IMAGE_OTHER OTHER BRAND_NEW"""
SILENT: JSON = {"words": None}


def item(kind: str, **more: Any) -> JSON:
    return {"output": [{"type": kind, "call_id": "c", "name": "f", **more}]}


STOPS: list[tuple[tuple[str, ...], str, JSON, str]] = [  # providers, their reasons, what else they say, ours
    *[(("anthropic",), reason, {}, reason) for reason in STOPPED.split()],
    (CHATTING, "stop brand_new", {}, "end_turn"), (CHATTING, "length", {}, "max_tokens"),
    (CHATTING, "content_filter", {}, "refusal"), (CHATTING, "stop", SILENT | {"refusal": "no"}, "refusal"),
    (CHATTING, "tool_calls function_call stop", CALLED, "tool_use"), (CHATTING, "length", CALLED, "max_tokens"),
    (CHATTING, "brand_new", SILENT, ""),
    (("oai-resp",), "completed incomplete:steered incomplete:max_messages", {}, "end_turn"),
    (("oai-resp",), "incomplete:max_output_tokens", {}, "max_tokens"),
    (("oai-resp",), "incomplete:content_filter", {}, "refusal"),
    (("oai-resp",), "completed", item("function_call", arguments="{}"), "tool_use"),
    (("oai-resp",), "completed", item("custom_tool_call", input="x"), "tool_use"),
    (("oai-resp",), "completed", item("message", content=[{"type": "refusal", "refusal": "no"}]), "refusal"),
    (("oai-resp",), "failed cancelled", {}, ""),
    (GOOGLES, "STOP OTHER BRAND_NEW", {}, "end_turn"), (GOOGLES, "MAX_TOKENS", {}, "max_tokens"),
    (GOOGLES, "STOP", {"parts": [{"functionCall": {"name": "f"}}]}, "tool_use"),
    (GOOGLES, "CONTINUATION", {}, "pause_turn"),
    (GOOGLES, REFUSALS, SILENT, "refusal"), (GOOGLES, FAILURES, SILENT, ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("provider", "reason", "more", "ours"), [(p, r, *row[2:]) for row in STOPS for p in row[0] for r in row[1].split()]
)
def test_stop_reasons(provider: str, reason: str, more: JSON, ours: str) -> None:
    """Each reason has its canonical one; an unknown one ends the turn if anything was said, else it is an error."""
    try:
        assert decoded(provider, whole(provider, reason, **more)).stop_reason == ours
    except ProviderError as fault:
        assert (ours, fault.provider, fault.status) == ("", provider, 502)  # noqa: PT017


def chat_tokens(prompt: int, cached: int | None = None, written: int | None = None) -> JSON:
    details = {"cached_tokens": cached, "cache_write_tokens": written}
    return {"prompt_tokens": prompt, "completion_tokens": 7, "prompt_tokens_details": details,
            "completion_tokens_details": {"reasoning_tokens": 5}}  # fmt: skip


INPUT_20: JSON = {"input_tokens": 20, "output_tokens": 7}
PROMPT_20: JSON = {"promptTokenCount": 20, "candidatesTokenCount": 5}
COUNTS = """input_tokens output_tokens prompt_tokens completion_tokens promptTokenCount candidatesTokenCount
    prompt_tokens_details input_tokens_details"""
WRONG: list[Any] = [-5, "7", [], {}, None, 1e999]
BAD_COUNTS = [dict.fromkeys(COUNTS.split(), wrong) for wrong in WRONG]
USAGE: list[tuple[Iterable[str], Any, tuple[int, int, int, int]]] = [
    (["anthropic"], INPUT_20 | {"cache_read_input_tokens": 5, "cache_creation_input_tokens": 6}, (20, 7, 5, 6)),
    (["anthropic"], {"input_tokens": 3, "output_tokens": None}, (3, 0, 0, 0)),
    (CHATTING, chat_tokens(20), (20, 7, 0, 0)), (CHATTING, chat_tokens(20, 15), (5, 7, 15, 0)),
    (CHATTING, chat_tokens(3, 15, 2), (0, 7, 15, 2)), (["openai"], chat_tokens(20, 15, 2), (3, 7, 15, 2)),
    (["oai-resp"], INPUT_20 | {"input_tokens_details": {"cached_tokens": 15, "cache_write_tokens": 2}}, (3, 7, 15, 2)),
    (["oai-resp"], INPUT_20 | {"input_tokens_details": None}, (20, 7, 0, 0)),
    (GOOGLES, PROMPT_20 | {"cachedContentTokenCount": 8, "toolUsePromptTokenCount": 3, "thoughtsTokenCount": 2},
     (15, 7, 8, 0)),
    (GOOGLES, PROMPT_20 | {"candidatesTokenCount": None}, (20, 0, 0, 0)),
    *[(PROVIDERS, usage, (0, 0, 0, 0)) for usage in (None, {}, "many", [1], *BAD_COUNTS)],
]  # fmt: skip


@pytest.mark.parametrize(("provider", "usage", "expected"), [(p, *row[1:]) for row in USAGE for p in row[0]])
def test_usage_adds_up(provider: str, usage: Any, expected: tuple[int, int, int, int]) -> None:
    """Cached and written tokens stand outside the input, reasoning inside the output; what is no number is none."""
    got = decoded(provider, whole(provider, DONE[provider], usage=usage)).to_wire()["usage"]

    assert tuple(got[name] for name in PARTS) == expected
    assert got["total_tokens"] == sum(expected)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "body",
    [None, [], {}, "x", 7, {"error": None}, {"choices": None}, {"choices": [None]}, {"content": None},
     {"candidates": []}, {"response": None}, {"output": {}}, {"status": "completed", "output": 7}],
)  # fmt: skip
def test_what_is_no_answer_is_one_error(provider: str, body: Any) -> None:
    """A 200 that holds nothing, or something else, is a `ProviderError`: never an empty message or a crash."""
    with pytest.raises(ProviderError) as caught:
        decoded(provider, body)
    assert (caught.value.provider, caught.value.status) == (provider, 502)


@pytest.mark.parametrize(
    ("id", "arguments", "input"),
    [
        ("functions.f:0", "{}", {}), (None, "", {}), ("", "null", {}), ("x" * 41, "  ", {}), ("c", '{"a":1}', {"a": 1}),
        ("c", '{"a":"b', {"a": "b", "invalid_json": True}), ("c", "[1]", {"invalid_json": "[1]"}),
        ("c", "oops", {"invalid_json": "oops"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("provider", [*CHATTING, "oai-resp"])
def test_a_tool_call_is_always_usable(provider: str, id: str | None, arguments: str, input: JSON) -> None:
    """Its id is one that every provider takes, new in the conversation; its input an object that keeps what came."""
    function = {"name": "f", "arguments": arguments}
    made = [{"id": id, "call_id": id, "type": "function_call", "function": function, **function}] * 2
    body = whole(provider, DONE[provider], None, **{"output" if provider == "oai-resp" else "tool_calls": made})
    calls = decoded(provider, body, messages=[user("?"), assistant(call("c", "f", {})), user(result("c"))]).tool_calls

    assert [(each.name, each.input) for each in calls] == [("f", input)] * 2
    assert len({"c", *(each.id for each in calls)}) == 3
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,40}", each.id) for each in calls)


def claude_error(kind: str) -> JSON:
    return {"type": "error", "error": {"type": kind, "message": "m"}}


def openai_error(kind: str, code: str | None = None) -> JSON:
    return {"error": {"message": "m", "type": kind, "param": None, "code": code}}


def google_error(code: int, status: str, *details: JSON) -> JSON:
    return {"error": {"code": code, "message": "m", "status": status, "details": list(details)}}


SERVER: JSON = {"code": "server_error", "message": "m"}
FAULTS: list[tuple[str, Any, str, str | None]] = [  # provider, the event, our error's type, its code
    ("anthropic", claude_error("overloaded_error"), "overloaded_error", None),
    ("anthropic", claude_error("api_error"), "provider_error", "api_error"),
    ("anthropic", claude_error("rate_limit_error"), "rate_limit_error", None),
    ("openai", openai_error("server_error"), "provider_error", "server_error"),
    ("openai", openai_error("insufficient_quota", "insufficient_quota"), "rate_limit_error", "insufficient_quota"),
    ("openai", {"error": "m"}, "provider_error", None),
    ("groq", {"x_groq": {"id": "r", "error": "m"}, "choices": []}, "provider_error", None),
    ("groq", openai_error("invalid_request_error", "tool_use_failed"), "invalid_request_error", "tool_use_failed"),
    ("cerebras", openai_error("t", "queue_exceeded") | {"status_code": 429}, "rate_limit_error", "queue_exceeded"),
    ("cerebras", {"error": {"message": "m"}, "status_code": 503}, "overloaded_error", None),
    ("oai-resp", {"type": "error", "param": None} | SERVER, "provider_error", "server_error"),
    ("oai-resp", {"type": "error"} | openai_error("insufficient_quota"), "rate_limit_error", "insufficient_quota"),
    ("oai-resp", {"type": "response.failed", "response": {"error": SERVER}}, "provider_error", "server_error"),
    ("oai-resp", {"type": "response.failed", "response": {"error": None}}, "provider_error", None),
    ("gemini", google_error(503, "UNAVAILABLE"), "overloaded_error", "UNAVAILABLE"),
    ("gemini", google_error(429, "RESOURCE_EXHAUSTED"), "rate_limit_error", "RESOURCE_EXHAUSTED"),
    ("gemini-oauth", google_error(499, "CANCELLED"), "invalid_request_error", "CANCELLED"),
    ("gemini-oauth", {"response": google_error(500, "INTERNAL")}, "provider_error", "INTERNAL"),
    *[(provider, junk, "provider_error", "unreadable_answer") for provider in PROVIDERS
      for junk in ("<html>", "{", "7", "null", '"x"', '{"type":', "[7]")],
]  # fmt: skip


@pytest.mark.parametrize(("provider", "event", "kind", "code"), FAULTS, ids=[f"{r[0]}-{r[2]}" for r in FAULTS])
@pytest.mark.parametrize("place", [0, 2])
def test_an_error_in_a_stream_ends_it(provider: str, event: Any, kind: str, code: str | None, place: int) -> None:
    """In every spelling, first or in the middle, it is one error of its own type, and the last thing said."""
    case = {"groq": "groq/reasoning", "cerebras": "cerebras/tools"}.get(provider, f"{provider}/text")
    parts = re.split(rb"(?<=\n)\r?\n", recorded(case))
    parts.insert(place, b"data: %b\n" % (event.encode() if isinstance(event, str) else dumps(event)))
    events, fault = streamed(case, b"\n".join(parts))

    assert fault is not None
    assert (fault.type, fault.code, fault.provider) == (kind, code, provider)
    assert wire(events) == wire(streamed(case)[0])[: len(events)]
    assert bool(events) == bool(place)


# == Streams in pieces =================================================================================================


def lines_of(data: bytes) -> list[bytes]:
    return data.replace(b"\r\n", b"\n").split(b"\n")


def spread(line: bytes) -> bytes:
    """A `data` line as several, broken where JSON allows it."""
    if not line.startswith(b"data: {"):
        return line
    return b"\n".join(b"data: " + part for part in json.dumps(json.loads(line[6:]), indent=1).encode().split(b"\n"))


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


FRAMINGS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "7 bytes": lambda lines: cut(b"\n".join(lines), 7),
    "byte by byte": lambda lines: cut(b"\n".join(lines), 1),
    "CRLF": lambda lines: cut(b"\r\n".join(lines), 11),
    "CRLF byte by byte": lambda lines: cut(b"\r\n".join(lines), 1),
    "CR": lambda lines: cut(b"\r".join(lines), 11),
    "CR byte by byte": lambda lines: cut(b"\r".join(lines), 1),
    "comments": lambda lines: [b": hi\n\n", b"\n:\n".join(lines), b"\n: bye\n\n"],
    "a BOM": lambda lines: [b"\xef\xbb", b"\xbf" + b"\n".join(lines)],
    "multi-line data": lambda lines: [b"\n".join(map(spread, lines))],
    "no space": lambda lines: [b"\n".join(line.replace(b": ", b":", 1) for line in lines)],
    "other fields": lambda lines: [b"\n".join(line and b"id: 1\nretry: 5\n" + line for line in lines)],
    "blank lines": lambda lines: [b"\n\n\n", b"\n".join(line or b"\n" for line in lines)],
    "empty chunks": lambda lines: [piece for line in lines for piece in (b"", line + b"\n")],
    "no last blank line": lambda lines: [b"\n".join(lines).rstrip(b"\n")],
}


@pytest.mark.parametrize("case", CASES)
def test_framing_does_not_matter(case: str) -> None:
    """However the bytes are cut and the lines end, the events are the same."""
    expected = named(wire(streamed(case)[0]))
    for name, framed in FRAMINGS.items():
        events, fault = play(asked(case, stream=True), framed(lines_of(recorded(case))))
        assert (name, fault, named(wire(events))) == (name, None, expected)


FINISHED = rb'"finish_reason":"[a-z]|"finishReason":"|"blockReason"|message_stop|response\.(completed|incomplete)"'


@pytest.mark.parametrize("case", CASES)
def test_a_stream_cut_anywhere_is_truncated(case: str) -> None:
    """The events up to the cut are those of the whole stream; without the provider's end they end in one error."""
    data, expected = recorded(case), named(wire(streamed(case)[0]))
    end = len(data[: max(data.find(b"\n", match.start()) for match in re.finditer(FINISHED, data))].rstrip())
    heard: list[JSON] = []
    for size in range(len(data)):
        events, fault = streamed(case, data[:size])
        assert isinstance(fault, StreamTruncated) if size < end else fault is None  # whole but for usage and the like
        if len(events) != len(heard):
            heard = named(wire(events))
            whole = [event["type"] for event in heard[-2:]] == ["message_delta", "message_stop"]
            assert whole == (fault is None)
            assert heard[: len(heard) - 2 * whole] == expected[: len(heard) - 2 * whole]


@pytest.mark.parametrize("case", CASES)
def test_nothing_comes_after_the_end(case: str) -> None:
    """A second answer, an error and garbage behind the end are not read."""
    decoder = PROVIDERS[case.partition("/")[0]].decoder(asked(case, stream=True))
    for found in SSEDecoder().feed(recorded(case)):
        decoder.feed(found)
    decoder.close()

    assert decoder.ended
    junk = b'data: {"error":{"message":"m"}}\n\ndata: <html>\n\ndata: [DONE]\n\n'
    assert not any(decoder.feed(found) for found in SSEDecoder().feed(recorded(case) + junk))
    assert decoder.close() == []


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("data", [b"", b": ping\n\n" * 3, b"\n\n", b"event: ping\n\n", b"data\n\n", b"data:\n\n"])
def test_an_empty_stream_is_truncated(provider: str, data: bytes) -> None:
    """Nothing, or comments alone, is an error and no event."""
    events, fault = play(parsed(f"{provider}/m", stream=True), [data])
    assert (events, type(fault)) == ([], StreamTruncated)
    assert fault is None or (fault.code, fault.retryable) == ("stream_truncated", False)


def test_half_a_character_waits_for_the_other() -> None:
    """UTF-8 cut in two is put together; what is none becomes U+FFFD, and the stream goes on."""
    sse = SSEDecoder()
    assert sse.feed(b"data: h\xc3") == []
    assert [found.data for found in sse.feed(b"\xa9\n\ndata: \xff\n\n")] == ["h\u00e9", "\ufffd"]


@pytest.mark.parametrize(
    ("data", "fits"),
    [(line + b"\n\n", True) for line in (b"data: x", b": ping", b"event: e")]
    + [(b"data: " + b"x" * 400, False), (b"data: xxxxxxxxxxxxxxxxxxxx\n", False)],
)
def test_an_event_has_a_limit(data: bytes, fits: bool) -> None:
    """One over the limit is an error of its own; many small events, and comments without end, are not."""
    sse = SSEDecoder(100)
    try:
        for piece in cut(data * 50, 10):
            sse.feed(piece)
        assert fits
    except ProviderError as fault:
        assert (fits, fault.code) == (False, "event_too_large")  # noqa: PT017


# == Stop sequences that the provider does not look for ================================================================


def spoken(words: list[str], stops: list[str]) -> tuple[str, str | None, str | None]:
    """What is left of text in pieces, from a provider without stop sequences."""
    chunks: list[JSON] = [{"type": "response.created", "response": {"id": "r", "model": "m"}}]
    chunks += [{"type": "response.output_text.delta", "delta": piece} for piece in words]
    chunks.append({"type": "response.completed", "response": {"usage": {"output_tokens": 9}}})
    events, fault = play(parsed("oai-resp/m", stream=True, stop_sequences=stops), framed(chunks))
    check_played("oai-resp", events, fault)
    message = added(events)
    assert (fault, message.usage.output_tokens) == (None, 9)
    return message.text, message.stop_reason, message.stop_sequence


def framed(chunks: Iterable[Any]) -> list[bytes]:
    return [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks]


@pytest.mark.parametrize(
    ("words", "stops", "left", "found"),
    [
        (["one END two"], ["END"], "one ", "END"), (["one E", "N", "D two"], ["END"], "one ", "END"),
        (["END"], ["END"], "", "END"), (["one E", "N", "d"], ["END"], "one ENd", None), (["EN"], ["END"], "EN", None),
        (["a", "a", "b"], ["ab"], "a", "ab"), (["x2y1"], ["1", "2"], "x", "2"), (["x"], ["y"] * 64, "x", None),
    ],
)  # fmt: skip
def test_text_ends_at_a_stop_sequence(words: list[str], stops: list[str], left: str, found: str | None) -> None:
    """What follows it is left out, what may be its beginning is held back, and the bill is the whole answer's."""
    assert spoken(words, stops) == (left, "stop_sequence" if found else "end_turn", found)


@pytest.mark.parametrize("stop", ["END", "fEND"])
def test_only_the_text_is_cut(stop: str) -> None:
    """A tool call behind the stop sequence goes too; thinking stays whole."""
    message = {"content": "a END b", "reasoning_content": "END", **CALLED}
    body = {"choices": [{"message": message, "finish_reason": "tool_calls"}]}
    got = decoded("openai", body, "o3", stop_sequences=[stop])
    assert got.thinking == "END"
    assert (got.text, len(got.tool_calls), got.stop_reason) == (
        ("a ", 0, "stop_sequence") if stop == "END" else ("a END b", 1, "tool_use")
    )


# == Properties ========================================================================================================


@FUZZ
@given(st.lists(st.text("ab", max_size=4), max_size=6), st.lists(st.text("ab", min_size=1, max_size=3), min_size=1))
@example(["ab", "a"], ["aba", "b"])
def test_a_stop_sequence_is_found_however_the_text_comes(words: list[str], stops: list[str]) -> None:
    """Any split gives the same answer: the text up to a stop sequence."""
    joined = "".join(words)
    left, reason, found = spoken(words, stops)

    assert (left, reason, found) == spoken([joined], stops)
    assert (reason == "stop_sequence") == (found is not None) == any(stop in joined for stop in stops)
    assert joined.startswith(left + (found or ""))
    assert not any(stop in left for stop in stops)


FRAGMENTS = st.lists(st.sampled_from([b"data: ", b"data:", b"x", b"\n", b"\r", b"\r\n", b":", b"event: e", b"\xc3"]))


@FUZZ
@given(FRAGMENTS.map(b"".join), st.lists(st.integers(0, 60), max_size=8))
def test_events_do_not_depend_on_the_split(data: bytes, cuts: list[int]) -> None:
    """Server-sent events are the same however their bytes arrive."""
    whole, split = SSEDecoder(), SSEDecoder()
    bounds = [0, *sorted(cuts), len(data) + 60]
    found = [each for start, end in itertools.pairwise(bounds) for each in split.feed(data[start:end])]
    assert [*found, *split.close()] == [*whole.feed(data), *whole.close()]


CHUNKS = {case: [json.loads(line[6:]) for line in lines_of(recorded(case)) if line[:7] == b"data: {"] for case in CASES}
VALUES: list[Any] = [None, True, -1, 5, 1.5, "", "x", "\ud800", [], {}, [None], {"type": "x"}, 10**30]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in items for place in places(each, (*path, key)))]


def words_of(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(words_of, value.values()))
    return set().union(*map(words_of, value)) if isinstance(value, list) else {str(value)}


def junk(provider: str) -> st.SearchStrategy[Any]:
    """JSON of the provider's own words, in any order."""
    words = st.sampled_from(sorted(words_of([CHUNKS[case] for case in CASES if case.startswith(f"{provider}/")])))
    leaves = st.sampled_from(VALUES) | st.floats() | st.text(max_size=5) | words
    return st.recursive(leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(words, x, max_size=5), max_leaves=9)


def mutated(chunks: list[JSON], draw: random.Random) -> list[Any]:
    """A recorded stream with events lost, doubled, swapped, and values replaced."""
    out: list[Any] = json.loads(json.dumps(chunks))
    for _ in range(draw.randint(1, 3)):
        (place, other), how = draw.choices(range(len(out)), k=2), draw.choice(["drop", "swap", "double", "set", "set"])
        if how == "drop":
            out[place : place + 1] = out[place : place + 1] if len(out) == 1 else []
        elif how == "swap":
            out[place], out[other] = out[other], out[place]
        else:
            *path, last = (place, *draw.choice(places(out[place])))
            here: Any = out
            for step in path:
                here = here[step]
            here[last] = draw.choice(VALUES) if how == "set" else [here[last], here[last]]
        out = json.loads(json.dumps(out))
    return out


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_bytes_break_a_decoder(provider: str) -> None:
    """Whatever comes, framed or not, streamed or whole: events by the grammar or a message, and at most one `Error`."""
    raw = st.lists(st.binary(max_size=20) | FRAGMENTS.map(b"".join), max_size=5)

    @FUZZ
    @given(raw | st.lists(junk(provider), max_size=4).map(framed), junk(provider))
    def run(data: list[bytes], body: Any) -> None:
        check_played(provider, *play(parsed(f"{provider}/m", stream=True), data))
        try:
            message = decoded(provider, body).to_wire()
        except Error as fault:
            assert fault.provider == provider  # noqa: PT017
        else:
            assert dumps(message)
            check_usage(message["usage"])

    run()


@pytest.mark.parametrize("case", CASES)
def test_no_mutation_breaks_a_decoder(case: str) -> None:
    """A stream with events lost, doubled, out of order or with wrong values: the grammar holds to its end."""
    for seed in range(50):
        chunks = framed(mutated(CHUNKS[case], random.Random(f"{case}{seed}")))
        for stops in ([], ["H", "o"]):
            check_played(case.partition("/")[0], *play(asked(case, stream=True, stop_sequences=stops), chunks))


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(-1e300, 1e300) | st.text(max_size=6)
KEYS = st.text(max_size=4)
NESTED = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=3), max_leaves=8)
OBJECTS = st.dictionaries(KEYS, NESTED, max_size=4)


@FUZZ
@given(OBJECTS, st.booleans(), st.booleans())
def test_arguments_that_broke_off_are_completed(input: JSON, ascii: bool, spaced: bool) -> None:
    """Wherever an object breaks off, what is added makes it one that says so; a whole one is kept."""
    whole = json.dumps(input, ensure_ascii=ascii, indent=1 if spaced else None)

    assert providers.tool_input(whole) == input
    for end in range(1, len(whole)):
        tail = providers.completion(whole[:end])
        assert loads(whole[:end] + tail)["invalid_json"] is True if tail else "\\" in whole[end - 6 : end]
        assert "invalid_json" in providers.tool_input(whole[:end])


@FUZZ
@given(st.lists(OBJECTS, min_size=1, max_size=4), st.randoms(use_true_random=False), st.booleans())
def test_fragments_in_any_order_make_the_calls(inputs: list[JSON], draw: random.Random, closed: bool) -> None:
    """Calls whose fragments interleave come out one after the other, in the order in which they began."""
    queue = {key: re.findall(".{1,%d}" % draw.randint(1, 20), json.dumps(each)) for key, each in enumerate(inputs)}  # noqa: UP031
    build = providers.EventBuilder("openai")
    events, began = build.start("id", "m"), []
    while queue:
        key = draw.choice(sorted(queue))
        if key not in began:
            began.append(key)
            events += build.tool_use(key, f"call_{key}", f"f{key}")
        events += build.arguments(key, queue[key].pop(0))
        if not queue[key]:
            del queue[key]
            events += build.close(key) if closed else []
    events += build.finish("end_turn", providers.make_usage())

    check_played("openai", events, None)
    message = added(events)
    assert [(made.id, made.input) for made in message.tool_calls] == [(f"call_{key}", inputs[key]) for key in began]
    assert message.stop_reason == "tool_use"


@FUZZ
@given(OBJECTS, st.sampled_from([id for id in PROVIDERS if id != "anthropic"]), st.text())
def test_a_signature_carries_state_to_its_own_provider(state: JSON, provider: str, other: str) -> None:
    """It comes back whole there, is nothing anywhere else, and nothing when damaged."""
    signature = providers.sign(provider, state)

    assert providers.signed_by(signature) == provider
    assert all(providers.carried(signature, id) == (state if id == provider else {}) for id in PROVIDERS)
    damaged = [*(signature[:end] for end in range(len(signature))), signature + "!", f"vai1.{provider}.{other}!", other]
    assert not any(providers.carried(each, provider) for each in damaged)
    assert providers.signed_by(other) in (None, "anthropic")


# == Reasoning over turns ==============================================================================================

FUNCTIONS = [{"name": "weather", "arguments": f'{{"city":"{city}"}}'} for city in ("Oslo", "Rome")]
REPLAYED: dict[str, list[JSON]] = {  # an answer, and how its provider gets it back
    "anthropic/thinking": [assistant(*ANSWERS["anthropic/thinking"].content)],
    "anthropic/search": [assistant(*ANSWERS["anthropic/search"].content)],
    "openai/local": [{"role": "assistant", "tool_calls": [
        {"id": "ID", "type": "function", "function": {"name": "now", "arguments": '{"tz":"UTC"}'}}]}],
    "groq/reasoning": [{"role": "assistant", "content": "Hi", "reasoning": "Hm ok"}],
    "oai-resp/text": [{"role": "assistant", "content": "H\u00e9llo", "phase": "final_answer"}],
    "oai-resp/tools": [
        SUMMARY["item"] | {"summary": [{"type": "summary_text", "text": words} for words in ("First.", "Then.")]},
        *({"type": "function_call", "call_id": f"call_{n}", **made} for n, made in enumerate(FUNCTIONS, 1))],
    "oai-resp/native": [SEARCHED, RAN, DRAWN | {"result": PNG}, {"role": "assistant", "content": "So."}],
    "gemini/text": [{"role": "model", "parts": [{"text": "H\u00e9llo"}, {"text": "", "thoughtSignature": "c2ln"}]}],
    "gemini/tools": [{"role": "model", "parts": [
        {"text": "Both.", "thoughtSignature": "c2ln"},
        {"functionCall": {"id": "call_1", "name": "weather", "args": OSLO}, "thoughtSignature": "c2ln"},
        {"functionCall": {"id": "call_2", "name": "weather", "args": ROME}},
        {"functionCall": {"name": "now", "args": {}}}]}],
    "gemini/parts": [{"role": "model", "parts": [
        PYTHON, PRINTED, {"inlineData": {"mimeType": "image/png", "data": PNG}, "thoughtSignature": "c2ln"},
        {"text": "So."}]}],
}  # fmt: skip


def answered(case: str) -> list[JSON]:
    """A history with the fixture's answer in it, its calls answered."""
    message = added(streamed(case)[0])
    results = [result(made.id, "ok") for made in message.tool_calls]
    return [user("hi"), {"role": "assistant", "content": message.to_wire()["content"]}, user(*results, text("go"))]


@pytest.mark.parametrize("case", REPLAYED)
def test_an_answer_comes_back_as_the_provider_sent_it(case: str) -> None:
    """Blocks sent back become the provider's own items and parts, reasoning, signatures and native tools included."""
    expected = REPLAYED[case]
    sent = turns(send(f"{case.partition('/')[0]}/{ANSWERS[case].model}", messages=answered(case)))
    got = re.sub(r'"toolu_vai_[0-9a-f]{20}"', '"ID"', json.dumps(sent[1 : 1 + len(expected)]))
    assert json.loads(got) == expected


@pytest.mark.parametrize("case", [case for case in CASES if case != "openai/audio"])
@pytest.mark.parametrize("model", [A6, O, RSOL, Q, C, G, GO])
def test_a_conversation_can_change_its_model(case: str, model: str) -> None:
    """Every other provider takes what was said and called, without signatures and items that it cannot read."""
    sent = send(model, messages=answered(case), tools=[PLAIN | {"name": name} for name in ("now", "weather", "book")])
    body = json.dumps(turns(sent), ensure_ascii=False)
    content = ANSWERS[case].content

    assert all(block["text"] in body for block in content if block["type"] == "text")
    calls = re.findall(r'"(type": "function_call"|functionCall"|type": "tool_use"|type": "function")', body)
    assert len(calls) == sum(block["type"] == "tool_use" for block in content)
    if case.partition("/")[0] != model.partition("/")[0]:
        assert not re.search(r"vai1\.|EqQB|Zm9v|gAAA|c2ln|srvtoolu_|ws_1|executableCode|phase", body)
        assert sent.dropped == []


# == Errors ============================================================================================================

STATUSES: list[tuple[str, str, int]] = [  # the provider's statuses, our type and status
    ("400 405 415 418 422 424 499", "invalid_request_error", 400), ("401", "authentication_error", 401),
    ("402 403", "permission_error", 403), ("404", "not_found_error", 404), ("413", "request_too_large", 413),
    ("429", "rate_limit_error", 429), ("500 501 502 520 599", "provider_error", 502),
    ("498 503 529", "overloaded_error", 503), ("408 504 524", "timeout_error", 504),
]  # fmt: skip
GARBAGE = [b'{"error":{"message":"no"}}', b"", b"<html>no</html>", b"null", b"[]", b'"no"', b"{", b"\xff"]


@pytest.mark.parametrize(("status", "kind", "ours"), [(int(s), *row[1:]) for row in STATUSES for s in row[0].split()])
@pytest.mark.parametrize("own", [True, False])
def test_a_status_is_an_error_of_its_own(status: int, kind: str, ours: int, own: bool) -> None:
    """The status decides, whatever the body; a refusal of the gateway's own key is not the caller's fault."""
    code = "billing" if status == 402 else None
    if status in (401, 403) and not own:
        kind, ours, code = "provider_error", 502, "provider_authentication"
    for body in GARBAGE:
        fault = status_error("openai", status, {}, body, own_key=own)
        shown = fault.to_wire("req_1")

        assert isinstance(fault, providers.ERRORS[kind])
        assert (fault.status, fault.code, fault.provider) == (ours, code, "openai")
        assert (shown["error"]["type"], shown["error"]["request_id"], shown["request_id"]) == (kind, "req_1", "req_1")
        assert fault.message
        assert "<" not in fault.message
        assert fault.retryable == ((ours == 429 or ours >= 500) and code is None)


BAD_KEY = google_error(400, "INVALID_ARGUMENT", {"@type": "x"}, {"reason": "API_KEY_INVALID"})
PER_DAY = google_error(429, "RESOURCE_EXHAUSTED", {"violations": [{"quotaId": "GenerateRequestsPerDayPerModel"}]})


def because(reason: str, code: int = 429, status: str = "RESOURCE_EXHAUSTED") -> JSON:
    return google_error(code, status, {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason})


BAD = "invalid_request_error"
BODIES: list[tuple[str, int, Any, str, str | None, bool]] = [  # provider, status, body; type, code, worth a retry?
    ("anthropic", 401, claude_error("authentication_error"), "authentication_error", None, False),
    ("anthropic", 402, claude_error("billing_error"), "permission_error", "billing", False),
    ("anthropic", 404, claude_error("not_found_error"), "not_found_error", None, False),
    ("anthropic", 413, claude_error("request_too_large"), "request_too_large", None, False),
    ("anthropic", 500, claude_error("api_error"), "provider_error", "api_error", True),
    ("anthropic", 529, claude_error("overloaded_error"), "overloaded_error", None, True),
    ("openai", 401, openai_error("t", "invalid_api_key"), "authentication_error", "invalid_api_key", False),
    ("oai-resp", 404, openai_error("t", "model_not_found"), "not_found_error", "model_not_found", False),
    ("openai", 400, openai_error("t", "context_length_exceeded"), BAD, "context_length_exceeded", False),
    ("openai", 400, openai_error(BAD), BAD, None, False),
    ("openai", 429, openai_error("t", "rate_limit_exceeded"), "rate_limit_error", "rate_limit_exceeded", True),
    ("openai", 429, openai_error("t", "insufficient_quota"), "rate_limit_error", "insufficient_quota", False),
    ("openai", 500, {"error": "m"}, "provider_error", None, True),
    ("openai", 500, {"detail": "m"}, "provider_error", None, True),
    ("groq", 498, openai_error("t", "flex_capacity_exceeded"), "overloaded_error", "flex_capacity_exceeded", True),
    ("groq", 400, openai_error("t", "model_decommissioned"), BAD, "model_decommissioned", False),
    ("cerebras", 401, {"message": "m", "code": "wrong_api_key"}, "authentication_error", "wrong_api_key", False),
    ("cerebras", 402, {"message": "m", "type": "payment"}, "permission_error", "billing", False),
    ("cerebras", 429, {"message": "m", "code": "queue_exceeded"}, "rate_limit_error", "queue_exceeded", True),
    ("gemini", 400, BAD_KEY, "authentication_error", "API_KEY_INVALID", False),
    ("gemini", 404, google_error(404, "NOT_FOUND"), "not_found_error", "NOT_FOUND", False),
    ("gemini", 503, [google_error(503, "UNAVAILABLE")], "overloaded_error", "UNAVAILABLE", True),
    ("gemini", 429, PER_DAY, "rate_limit_error", "insufficient_quota", False),
    ("gemini-oauth", 429, because("QUOTA_EXHAUSTED"), "rate_limit_error", "QUOTA_EXHAUSTED", False),
    ("gemini-oauth", 429, because("RATE_LIMIT_EXCEEDED"), "rate_limit_error", "RATE_LIMIT_EXCEEDED", True),
    ("gemini-oauth", 403, because("VALIDATION_REQUIRED", 403, "X"), "permission_error", "VALIDATION_REQUIRED", False),
]  # fmt: skip


@pytest.mark.parametrize(("provider", "status", "body", "kind", "code", "retry"), BODIES)
def test_a_provider_s_error_keeps_its_words(
    provider: str, status: int, body: Any, kind: str, code: str | None, retry: bool
) -> None:
    """Message, code and error object of every dialect arrive; spent quota is not worth a retry."""
    fault = status_error(provider, status, {}, dumps(body))
    detail = body[0] if isinstance(body, list) else body

    assert (fault.type, fault.code, fault.retryable, fault.message) == (kind, code, retry, "m")
    assert isinstance(detail.get("error"), str) or fault.provider_error == detail.get("error", detail)


def test_a_bad_gemini_key_of_the_gateway_is_not_the_caller_s_fault() -> None:
    """Google refuses a key with 400; it is read as the refusal of a key."""
    fault = status_error("gemini", 400, {}, dumps(BAD_KEY), own_key=False)
    assert (fault.status, fault.code) == (502, "provider_authentication")


LATE = "Wed, 21 Oct {} GMT"
RETRIES: list[tuple[str | None, str | None, int | None]] = [  # retry-after, retry-after-ms, our seconds
    (None, None, None), ("7", None, 7), (" 7 ", None, 7), ("0.2", None, 1), ("6.5", None, 7), (None, "1500", 2),
    (None, "12.5", 1), ("soon", "900", 1), (LATE.format("2015 07:28:00"), None, 10),
    ("Wed, 21 Oct 2015 09:28:00 +0200", None, 10), (LATE.format("2014 07:28:00"), None, None),
    (LATE.format("2099 07:28:00"), None, None),
    *((junk, None, None) for junk in ("soon", "-5", "1e9", "NaN", "inf", "86401", "9" * 400, "7\n8", "Wed, 99", "Wed")),
]  # fmt: skip


@pytest.mark.parametrize(("seconds", "millis", "expected"), RETRIES)
def test_retry_after(seconds: str | None, millis: str | None, expected: int | None) -> None:
    """Seconds, milliseconds or a date become whole seconds; garbage and the absurd are as good as nothing."""
    headers = {"retry-after": seconds, "retry-after-ms": millis}
    given = {name: value for name, value in headers.items() if value is not None}
    at_0727_50 = 1_445_412_470.0
    assert status_error("openai", 429, given, b"", now=at_0727_50).retry_after == expected


@pytest.mark.parametrize(
    ("delay", "expected"), [("34.4s", 35), ("7s", 7), ("0.1s", 1), *((odd, None) for odd in ("x", 7, "7", "99999999s"))]
)  # fmt: skip
def test_retry_info(delay: Any, expected: int | None) -> None:
    """Google's wait stands in the body; a header goes before it."""
    body = google_error(429, "RESOURCE_EXHAUSTED", {"@type": "x"}, {"@type": "RetryInfo", "retryDelay": delay})

    assert status_error("gemini", 429, {}, dumps(body)).retry_after == expected
    assert status_error("gemini", 429, {"retry-after": "3"}, dumps(body)).retry_after == 3
    assert providers.stream_error("gemini", body["error"]).retry_after == expected


GIVEN = ["k3y/with+odd=chars", "plainkey123456"]
SHAPES = ["sk-proj-abcdefghijklmnop", "gsk_abcdefghijklmnop", "csk-abcdefghijklmnop", "AIzaSyA-abcdefghijklmnopqrstu",
          "ya29.a0AfH6SMBxyz-123", "vai_sk_abcdefghijklmnop", "sk_car_abcdefghijkl", "Bearer abcdefghijkl"]  # fmt: skip


@pytest.mark.parametrize("secret", [*GIVEN, *(base64.b64encode(key.encode()).decode() for key in GIVEN), *SHAPES])
@pytest.mark.parametrize("form", ["%s", '"%s"', '{"error":{"message":"bad %s here","%s":["%s"]}}', "<b>%s"])
def test_no_key_comes_back(secret: str, form: str) -> None:
    """A key that a provider echoes, as it is, escaped, in base64 or by its shape, is in no part of the error."""
    escaped = "".join(f"\\u{ord(char):04x}" for char in secret)
    bodies = [form.replace("%s", shown).encode() for shown in (secret, escaped)]
    faults = [status_error("openai", 401, {}, body, keys=GIVEN) for body in bodies]
    if secret in SHAPES:
        echoed = ({"message": f"bad {secret}", "x": [secret]}, secret)
        faults += [providers.stream_error("openai", each) for each in echoed]
    for fault in faults:
        shown = json.dumps(fault.to_wire(), ensure_ascii=False) + str(fault) + repr(fault)
        assert secret.removeprefix("Bearer ").rstrip("=") not in shown


def test_an_error_is_one_printable_line() -> None:
    """Line breaks, NUL, ESC, C1 controls and lone surrogates in a message become blanks."""
    body = rb'{"error":{"message":"a\r\nb\u0000c\u001b[31md\u0085e\ud800f\u007f"}}'
    for fault in (status_error("openai", 400, {}, body), providers.stream_error("openai", loads(body)["error"])):
        assert fault.message == "a b c [31md e f"
    plain = status_error("openai", 502, {}, b"bad\r\ngateway\x00\x1b")
    assert plain.message == "openai answered with status 502: bad gateway"


@pytest.mark.parametrize("size", [100, 7_000, 9_000, 2_000_000])
def test_an_error_is_bounded(size: int) -> None:
    """Of a huge error object 8 KiB are kept; a small one whole."""
    detail = {"message": 'x"' * (size // 2), "more": ["y"] * 10}
    for fault in (status_error("openai", 400, {}, dumps({"error": detail})), providers.stream_error("openai", detail)):
        assert len(fault.message) <= 8192
        assert len((fault.provider_error or {}).get("truncated", "")) <= 8192
        assert (fault.provider_error == detail) == (size == 100)


@pytest.mark.parametrize("fault", [None, 7, "m", [], {}, {"message": 7}, {"code": []}, {"status": {}}, {"details": 7}])
def test_any_error_object_is_an_error(fault: Any) -> None:
    """What an error event holds need be no object, nor say anything."""
    error = providers.stream_error("openai", fault)
    assert (error.type, error.provider, bool(error.message)) == ("provider_error", "openai", True)
