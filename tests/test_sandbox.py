"""The sandbox answers, refuses and breaks off as the providers do."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from sandbox import Sandbox

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 3},
        "unit": {"type": "string", "enum": ["C", "F"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}
ASK = 'Weather? [tool weather {"city":"Oslo"}]'
TWICE = 'Weather? [tool weather {"city":"Oslo"}][tool weather {"city":"Bergen"}][then][say sunny]'
CHAT = ("openai", "groq", "cerebras")
PROVIDERS = ("anthropic", *CHAT, "oai-resp", "gemini", "gemini-oauth")
MODELS = {
    "anthropic": "claude-opus-4-6",
    "openai": "gpt-4o",
    "groq": "llama-3.3-70b-versatile",
    "cerebras": "gpt-oss-120b",
    "oai-resp": "gpt-6-sol",
    "gemini": "gemini-3-flash-preview",
    "gemini-oauth": "gemini-3-flash-preview",
}


def strict(field: Any, *, flat: bool = False) -> dict[str, Any]:
    """A request for structured output of one field, in strict mode."""
    schema = {"type": "object", "properties": {"x": field}, "required": ["x"], "additionalProperties": False}
    form = {"name": "answer", "strict": True, "schema": schema}
    if flat:
        return {"text": {"format": {"type": "json_schema", **form}}}
    return {"response_format": {"type": "json_schema", "json_schema": form}}


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with Sandbox() as running:
        yield running


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def headers(provider: str, key: str = "any") -> dict[str, str]:
    if provider == "anthropic":
        return {"x-api-key": key, "anthropic-version": "2026-10-21"}
    return {"x-goog-api-key": key} if provider == "gemini" else {"Authorization": f"Bearer {key}"}


def request(
    provider: str, text: str, /, stream: bool = False, model: str = "", **more: Any
) -> tuple[str, dict[str, Any]]:
    """Path and body of the plainest request that says this text; `more` goes into the body (Google's inner one)."""
    model = model or MODELS[provider]
    streaming = {"stream": True} if stream else {}
    messages = {"messages": [{"role": "user", "content": text}]}
    if provider == "anthropic":
        return "/v1/messages", {"model": model, "max_tokens": 2000, **messages, **streaming, **more}
    if provider in CHAT:
        return "/chat/completions", {"model": model, **messages, **streaming, **more}
    if provider == "oai-resp":
        return "/responses", {"model": model, "input": text, "store": False, **streaming, **more}
    method = "streamGenerateContent?alt=sse" if stream else "generateContent"
    inner = {"contents": [{"role": "user", "parts": [{"text": text}]}], **more}
    if provider == "gemini":
        return f"/models/{model}:{method}", inner
    return f":{method}", {"model": model, "project": "p", "request": inner}


async def post(
    sandbox: Sandbox, http: aiohttp.ClientSession, provider: str, path: str, body: Any, **more: str
) -> tuple[int, Any]:
    url = sandbox.base_urls[provider] + path
    async with http.post(url, json=body, headers=headers(provider) | more) as response:
        if response.content_type == "text/event-stream":
            return response.status, events(await response.text())
        return response.status, await response.json()


def events(text: str) -> list[Any]:
    blocks = [block for block in text.replace("\r\n", "\n").split("\n\n") if block]
    datas = [line[6:] for block in blocks for line in block.split("\n") if line.startswith("data: ")]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


def error_text(body: Any) -> str:
    return str(body.get("error", body).get("message"))


def text_of(provider: str, body: Any) -> str:
    if provider == "anthropic":
        return "".join(block.get("text", "") for block in body["content"])
    if provider in CHAT:
        return str(body["choices"][0]["message"]["content"])
    if provider == "oai-resp":
        return "".join(part["text"] for item in body["output"] for part in item.get("content", []))
    inner = body.get("response", body)
    return "".join(part.get("text", "") for part in inner["candidates"][0]["content"]["parts"])


def streamed_text(provider: str, stream: list[Any]) -> str:
    if provider == "anthropic":
        return "".join(event.get("delta", {}).get("text", "") for event in stream)
    if provider in CHAT:
        choices = [choice for event in stream[:-1] for choice in event["choices"]]
        return "".join(choice["delta"].get("content") or "" for choice in choices)
    if provider == "oai-resp":
        return "".join(event["delta"] for event in stream if event["type"] == "response.output_text.delta")
    return "".join(text_of(provider, event) for event in stream)


# -- Answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_says_the_same_with_and_without_streaming(sandbox: Sandbox, http: Any, provider: str) -> None:
    text = "two  spaces\nand ünïcode"
    status, body = await post(sandbox, http, provider, *request(provider, f"[say {text}]"))
    assert (status, text_of(provider, body)) == (200, text)
    status, stream = await post(sandbox, http, provider, *request(provider, f"[say {text}]", stream=True))
    assert (status, streamed_text(provider, stream)) == (200, text)
    assert (stream[-1] == "[DONE]") == (provider in CHAT)


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_greets_a_newcomer(sandbox: Sandbox, http: Any, provider: str) -> None:
    _, body = await post(sandbox, http, provider, *request(provider, "Hello there"))
    assert "Hello there" in text_of(provider, body)
    assert MODELS[provider] in text_of(provider, body)
    _, again = await post(sandbox, http, provider, *request(provider, "Hello there"))
    assert again == body


@pytest.mark.parametrize(
    ("provider", "stop"),
    [
        ("anthropic", lambda body: body["stop_reason"] == "max_tokens"),
        ("openai", lambda body: body["choices"][0]["finish_reason"] == "length"),
        ("oai-resp", lambda body: body["incomplete_details"] == {"reason": "max_output_tokens"}),
        ("gemini", lambda body: body["candidates"][0]["finishReason"] == "MAX_TOKENS"),
    ],
)
async def test_stop_directive(sandbox: Sandbox, http: Any, provider: str, stop: Any) -> None:
    _, body = await post(sandbox, http, provider, *request(provider, "[stop max_tokens]"))
    assert stop(body)


async def test_stream_shapes(sandbox: Sandbox, http: Any) -> None:
    tools = [{"name": "weather", "input_schema": SCHEMA}]
    _, stream = await post(sandbox, http, "anthropic", *request("anthropic", ASK, stream=True, tools=tools))
    kinds = [event["type"] for event in stream]
    assert kinds[:4] == ["message_start", "content_block_start", "ping", "content_block_delta"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert stream[3]["delta"] == {"type": "input_json_delta", "partial_json": ""}

    path, body = request("groq", "hi", stream=True)
    _, stream = await post(sandbox, http, "groq", path, body)
    assert stream[-2]["usage"] == stream[-2]["x_groq"]["usage"]

    _, stream = await post(sandbox, http, "openai", *request("openai", "hi", stream=True))
    assert all("usage" not in event for event in stream[:-1])
    options: Any = {"stream_options": {"include_usage": True}}
    _, stream = await post(sandbox, http, "openai", *request("openai", "hi", stream=True, **options))
    assert stream[-2]["choices"] == []
    assert stream[-2]["usage"]["total_tokens"] > 0

    _, stream = await post(sandbox, http, "oai-resp", *request("oai-resp", "hi", stream=True))
    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    added, done = (
        next(event["item"] for event in stream if event["type"] == f"response.output_item.{kind}")
        for kind in ("added", "done")
    )
    assert len(added["encrypted_content"]) < len(done["encrypted_content"])


@pytest.mark.parametrize(
    ("provider", "more"),
    [
        ("anthropic", {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}),
        ("openai", {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}),
        ("oai-resp", {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}),
        ("gemini", {"generationConfig": {"responseMimeType": "application/json", "responseJsonSchema": SCHEMA}}),
    ],
)
async def test_structured_output_is_valid(sandbox: Sandbox, http: Any, provider: str, more: Any) -> None:
    _, body = await post(sandbox, http, provider, *request(provider, "Where?", **more))
    answer = json.loads(text_of(provider, body))
    assert set(answer) == set(SCHEMA["required"])
    assert answer["days"] >= 3
    assert answer["unit"] in "CF"


async def test_search_with_citations(sandbox: Sandbox, http: Any) -> None:
    tools: Any = [{"type": "web_search_20260318", "name": "web_search"}]
    _, body = await post(sandbox, http, "anthropic", *request("anthropic", "[search rain]", tools=tools))
    assert [block["type"] for block in body["content"]] == ["server_tool_use", "web_search_tool_result", "text"]
    assert body["content"][2]["citations"][0]["type"] == "web_search_result_location"
    tools = [{"type": "web_search"}]
    _, body = await post(sandbox, http, "oai-resp", *request("oai-resp", "[search rain][say Ja.]", tools=tools))
    assert body["output"][-1]["content"][0]["annotations"][0]["end_index"] == 3
    tools = [{"googleSearch": {}}]
    _, body = await post(sandbox, http, "gemini", *request("gemini", "[search rain][say é]", tools=tools))
    support = body["candidates"][0]["groundingMetadata"]["groundingSupports"][0]
    assert support["segment"]["endIndex"] == 2


async def test_prompt_cache(sandbox: Sandbox, http: Any) -> None:
    path, body = request(
        "anthropic", "hi", system=[{"type": "text", "text": "a b c", "cache_control": {"type": "ephemeral"}}]
    )
    usages = [(await post(sandbox, http, "anthropic", path, body))[1]["usage"] for _ in range(2)]
    assert usages[0]["cache_read_input_tokens"] == 0 < usages[0]["cache_creation_input_tokens"]
    assert usages[1]["cache_read_input_tokens"] == usages[0]["cache_creation_input_tokens"]
    assert usages[1]["input_tokens"] == usages[0]["input_tokens"]


# -- Tool loops ------------------------------------------------------------------------------------------------------


async def test_tool_loop_anthropic(sandbox: Sandbox, http: Any) -> None:
    more: Any = {"tools": [{"name": "weather", "input_schema": SCHEMA}], "thinking": {"type": "adaptive"}}
    path, body = request("anthropic", TWICE, model="claude-opus-5-5", **more)
    _, answer = await post(sandbox, http, "anthropic", path, body)
    assert [block["type"] for block in answer["content"]] == ["thinking", "tool_use", "tool_use"]
    results = [
        {"type": "tool_result", "tool_use_id": block["id"], "content": "20"}
        for block in answer["content"]
        if block["type"] == "tool_use"
    ]
    turns = [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": results}]
    status, final = await post(sandbox, http, "anthropic", path, body | {"messages": body["messages"] + turns})
    assert (status, text_of("anthropic", final)) == (200, "sunny")
    # The signature is bound to what stood before it.
    changed = [{"role": "user", "content": "something else"}, *turns]
    status, refused = await post(sandbox, http, "anthropic", path, body | {"messages": changed})
    assert status == 400
    assert "messages.1.content.0: Invalid signature in thinking block. The block is bound" in error_text(refused)
    # Another model drops the block without a word.
    other = body | {"messages": changed, "model": "claude-opus-4-8"}
    assert (await post(sandbox, http, "anthropic", path, other))[0] == 200


@pytest.mark.parametrize("provider", CHAT)
async def test_tool_loop_chat(sandbox: Sandbox, http: Any, provider: str) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
    path, body = request(provider, TWICE, tools=tools)
    _, answer = await post(sandbox, http, provider, path, body)
    message = answer["choices"][0]["message"]
    calls = message["tool_calls"]
    assert [json.loads(call["function"]["arguments"])["city"] for call in calls] == ["Oslo", "Bergen"]
    turn = {"role": "assistant", "content": None, "tool_calls": calls}
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "20"} for call in calls]
    status, final = await post(sandbox, http, provider, path, body | {"messages": [*body["messages"], turn, *results]})
    assert (status, text_of(provider, final)) == (200, "sunny")
    unanswered = body | {"messages": [*body["messages"], turn, results[0]]}
    assert (await post(sandbox, http, provider, path, unanswered))[0] == 400


async def test_tool_loop_responses(sandbox: Sandbox, http: Any) -> None:
    tools = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}]
    path, body = request("oai-resp", TWICE, tools=tools)
    _, answer = await post(sandbox, http, "oai-resp", path, body)
    assert [item["type"] for item in answer["output"]] == ["reasoning", "function_call", "function_call"]
    ask = {"role": "user", "content": TWICE}
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "20"} for item in answer["output"][1:]
    ]
    status, final = await post(sandbox, http, "oai-resp", path, body | {"input": [ask, *answer["output"], *results]})
    assert (status, text_of("oai-resp", final)) == (200, "sunny")
    for items, message in (
        ([ask, answer["output"][0]], "without its required following item"),
        ([ask, *answer["output"][1:], *results], "without its required 'reasoning' item"),
        ([ask, *answer["output"], results[0]], "No tool output found for function call"),
        (
            [ask, answer["output"][0] | {"encrypted_content": "x"}, *answer["output"][1:], *results],
            "could not be verified",
        ),
    ):
        status, refused = await post(sandbox, http, "oai-resp", path, body | {"input": items})
        assert status == 400
        assert message in error_text(refused)


@pytest.mark.parametrize("provider", ["gemini", "gemini-oauth"])
async def test_tool_loop_gemini(sandbox: Sandbox, http: Any, provider: str) -> None:
    tools = [{"functionDeclarations": [{"name": "weather", "parametersJsonSchema": SCHEMA}]}]
    path, body = request(provider, TWICE, tools=tools)
    _, answer = await post(sandbox, http, provider, path, body)
    parts = answer.get("response", answer)["candidates"][0]["content"]["parts"]
    assert ["thoughtSignature" in part for part in parts] == [True, False]
    calls = [part["functionCall"] for part in parts]
    results = [
        {"functionResponse": {"id": call["id"], "name": call["name"], "response": {"output": "20"}}} for call in calls
    ]

    async def continued(signature: str | None, count: int = 2) -> tuple[int, Any]:
        first = {"functionCall": calls[0]} | ({"thoughtSignature": signature} if signature else {})
        inner = body.get("request", body)
        turns = [{"role": "model", "parts": [first, *parts[1:]]}, {"role": "user", "parts": results[:count]}]
        changed = inner | {"contents": inner["contents"] + turns}
        return await post(sandbox, http, provider, path, body | {"request": changed} if "request" in body else changed)

    status, final = await continued(parts[0]["thoughtSignature"])
    assert (status, text_of(provider, final)) == (200, "sunny")
    assert (await continued("skip_thought_signature_validator"))[0] == 200
    assert "missing a thought_signature" in error_text((await continued(None))[1])
    assert "Corrupted thought signature." in error_text((await continued("AAAA"))[1])
    assert "number of function response parts" in error_text((await continued(parts[0]["thoughtSignature"], 1))[1])


async def test_the_two_geminis_do_not_take_each_others_signatures(sandbox: Sandbox, http: Any) -> None:
    _, body = await post(sandbox, http, "gemini", *request("gemini", "hi"))
    path, other = request("gemini-oauth", "hi")
    other["request"]["contents"] += [body["candidates"][0]["content"], {"role": "user", "parts": [{"text": "go on"}]}]
    status, refused = await post(sandbox, http, "gemini-oauth", path, other)
    assert (status, error_text(refused)) == (400, "Corrupted thought signature.")


# -- Refusals --------------------------------------------------------------------------------------------------------


def messages(*contents: Any, first: str = "user") -> dict[str, Any]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "20"}
TOOL = {"name": "weather", "input_schema": SCHEMA}
FUNCTION = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
DECLARED = {"functionDeclarations": [{"name": "weather", "parametersJsonSchema": SCHEMA}]}


@pytest.mark.parametrize(
    ("provider", "model", "more", "message"),
    [
        ("anthropic", "", {"top_k": 3}, "top_k: Extra inputs are not permitted"),
        ("anthropic", "", {"temperature": 1}, "temperature: Extra inputs are not permitted"),
        (
            "anthropic",
            "",
            messages([{"type": "text", "text": "a", "x": 1}]),
            "messages.0.content.0.text.x: Extra inputs",
        ),
        ("anthropic", "", messages([{"type": "text", "text": ""}]), "text content blocks must be non-empty"),
        ("anthropic", "", messages(" "), "must contain non-whitespace text"),
        ("anthropic", "", messages("a", [USE], "b"), "`tool_use` ids were found without `tool_result` blocks"),
        ("anthropic", "", messages([RESULT]), "unexpected `tool_use_id` found in `tool_result` blocks: toolu_1"),
        ("anthropic", "", messages("a", [USE | {"id": "a.b"}], "b"), "String should match pattern '^[a-zA-Z0-9_-]+$'"),
        ("anthropic", "", messages([USE]), "`tool_use` blocks can only be in `assistant` messages"),
        ("anthropic", "", messages("a", "b"), "does not support assistant message prefill"),
        ("anthropic", "", {"tools": [TOOL, TOOL]}, "Tool names must be unique"),
        ("anthropic", "", {"tools": [TOOL | {"name": "a b"}]}, "tools.0.custom.name: String should match pattern"),
        ("anthropic", "", {"tool_choice": {"type": "any"}}, "may only be specified while providing tools"),
        (
            "anthropic",
            "claude-opus-4-8",
            {"thinking": {"type": "enabled", "budget_tokens": 1024}},
            "not supported for this",
        ),
        (
            "anthropic",
            "claude-opus-5-5",
            {"thinking": {"type": "disabled"}},
            '"thinking.type.disabled" is not supported',
        ),
        ("anthropic", "claude-sonnet-4-5", {"thinking": {"type": "adaptive"}}, "adaptive thinking is not supported"),
        ("anthropic", "claude-opus-5-5", {"tools": [TOOL], "tool_choice": {"type": "any"}}, '"any" are not supported'),
        (
            "anthropic",
            "claude-haiku-4-5",
            {"output_config": {"effort": "low"}},
            "does not support the effort parameter",
        ),
        (
            "anthropic",
            "",
            messages("a", [USE], [RESULT]) | {"thinking": {"type": "enabled", "budget_tokens": 1024}},
            "Expected `thinking` or `redacted_thinking`, but found `tool_use`",
        ),
        (
            "anthropic",
            "",
            messages("a", [{"type": "thinking", "thinking": "x", "signature": "x"}], "b"),
            "messages.1.content.0: Invalid signature in thinking block",
        ),
        ("openai", "", {"top_k": 3}, "Unrecognized request argument supplied: top_k"),
        (
            "openai",
            "",
            messages([{"type": "text", "text": "a", "x": 1}]),
            "Unknown parameter: 'messages[0].content[0].x'.",
        ),
        ("openai", "", {"tools": []}, "Invalid 'tools': empty array."),
        ("openai", "", {"tool_choice": "auto"}, "'tool_choice' is only allowed when 'tools' are specified"),
        ("openai", "", {"stream_options": {}}, "only allowed when 'stream' is enabled"),
        ("openai", "", {"stop": list("abcde")}, "Invalid 'stop': array too long"),
        ("openai", "", {"reasoning_effort": "low"}, "Unsupported parameter: 'reasoning_effort'"),
        ("openai", "gpt-5", {"max_tokens": 9}, "Use 'max_completion_tokens' instead."),
        ("openai", "gpt-5", {"temperature": 0.5}, "Unsupported parameter: 'temperature'"),
        ("openai", "gpt-5", {"reasoning_effort": "none"}, "Supported values are: 'minimal', 'low', 'medium', 'high'"),
        ("openai", "gpt-6-sol", {"tools": [FUNCTION]}, "set reasoning_effort to 'none'"),
        ("openai", "gpt-5.3-codex", {}, "only supported in v1/responses"),
        ("openai", "no-not-exist", {}, "does not exist or you do not have access to it"),
        ("groq", "", {"top_k": 3}, "property 'top_k' is unsupported"),
        ("groq", "qwen/qwen3-32b", {"reasoning_format": "raw", "include_reasoning": True}, "mutually exclusive"),
        ("groq", "openai/gpt-oss-20b", {"reasoning_effort": "none"}, "must be one of `low`, `medium`, `high`"),
        ("cerebras", "", messages("a", [{"type": "refusal", "refusal": "b"}]), "Invalid value: 'refusal'"),
        ("cerebras", "", {"reasoning_effort": "none"}, "'none' is not supported"),
        (
            "cerebras",
            "",
            messages([{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]),
            "Send the image as a base64 data URI",
        ),
        ("oai-resp", "", {"stop": ["a"]}, "Unknown parameter: 'stop'."),
        ("oai-resp", "", {"input": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "'input_text'"),
        ("oai-resp", "", {"top_p": 0.5}, "Unsupported parameter: 'top_p'"),
        ("oai-resp", "", {"max_output_tokens": 3}, "integer below minimum value"),
        ("oai-resp", "", {"previous_response_id": "resp_1"}, "Previous response with id 'resp_1' not found."),
        (
            "oai-resp",
            "",
            {"tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}]},
            "'additionalProperties' is required to be supplied and to be false",
        ),
        ("openai", "", strict({"$ref": "#", "description": "d"}), "$ref cannot have keywords {'description'}"),
        ("openai", "", strict({"enum": ["a"]}), "In context=('properties', 'x'), schema must have a 'type' key."),
        ("openai", "", strict({"type": "array", "items": {}}), "schema must have a 'type' key."),
        ("oai-resp", "", strict({"type": "array"}, flat=True), "array schema missing items"),
        (
            "oai-resp",
            "",
            strict({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, flat=True),
            "'uniqueItems' is not permitted",
        ),
        ("gemini", "", {"temperature": 1}, 'Unknown name "temperature": Cannot find field.'),
        (
            "gemini",
            "",
            {"contents": [{"role": "user", "parts": [{"txt": "a"}]}]},
            'Unknown name "txt" at \'contents[0]',
        ),
        (
            "gemini",
            "",
            {"contents": [{"role": "model", "parts": [{"text": "a"}]}]},
            "First content should be with role",
        ),
        (
            "gemini",
            "",
            {"contents": [{"role": "tool", "parts": [{"text": "a"}]}]},
            "Please use a valid role: user, model.",
        ),
        ("gemini", "", {"tools": [DECLARED, DECLARED]}, "Duplicate function declaration found: weather"),
        ("gemini", "", {"generationConfig": {"stopSequences": list("abcdef")}}, "at most 5 stop sequences"),
        (
            "gemini",
            "",
            {"generationConfig": {"thinkingConfig": {"thinkingBudget": 1, "thinkingLevel": "LOW"}}},
            "only one of thinking budget and thinking level",
        ),
        (
            "gemini",
            "gemini-2.5-flash",
            {"generationConfig": {"thinkingConfig": {"thinkingLevel": "LOW"}}},
            "Thinking level is not supported for this model.",
        ),
        ("gemini-oauth", "", {"store": True}, 'Unknown name "store": Cannot find field.'),
    ],
)
async def test_refuses(sandbox: Sandbox, http: Any, provider: str, model: str, more: Any, message: str) -> None:
    status, body = await post(sandbox, http, provider, *request(provider, "hi", model=model, **more))
    assert message in error_text(body)
    assert status == (404 if "only supported in" in message or "does not exist" in message else 400)


@pytest.mark.parametrize(
    ("provider", "key", "status", "message"),
    [
        ("anthropic", "bad", 401, "invalid x-api-key"),
        ("anthropic", "", 401, "x-api-key header is required"),
        ("openai", "bad", 401, "Incorrect API key provided"),
        ("openai", "", 401, "You didn't provide an API key"),
        ("groq", "bad", 401, "Invalid API Key"),
        ("cerebras", "bad", 401, "Wrong API Key"),
        ("oai-resp", "bad", 401, "Incorrect API key provided"),
        ("gemini", "bad", 400, "API key not valid"),
        ("gemini", "", 403, "unregistered callers"),
        ("gemini-oauth", "bad", 401, "invalid authentication credentials"),
    ],
)
async def test_wants_a_key(sandbox: Sandbox, http: Any, provider: str, key: str, status: int, message: str) -> None:
    given, body = await post(sandbox, http, provider, *request(provider, "hi"), **headers(provider, key))
    assert given == status
    assert message in error_text(body)


async def test_anthropic_version(sandbox: Sandbox, http: Any) -> None:
    path, body = request("anthropic", "hi", temperature=0.5)
    assert (await post(sandbox, http, "anthropic", path, body))[0] == 400
    assert (await post(sandbox, http, "anthropic", path, body, **{"anthropic-version": "2023-06-01"}))[0] == 200
    async with http.post(sandbox.base_urls["anthropic"] + path, json=body, headers={"x-api-key": "k"}) as response:
        assert "anthropic-version: header is required" in await response.text()


NONSENSE = [[], 1, "x", None, {}, [[]], [1], [{}], [None], {"a": 1}]


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_nonsense_is_a_400(sandbox: Sandbox, http: Any, provider: str) -> None:
    path, body = request(provider, "hi")
    inner = body.get("request", body)
    for key in (
        "messages",
        "input",
        "contents",
        "tools",
        "tool_choice",
        "generationConfig",
        "toolConfig",
        "system",
        "text",
    ):
        for value in NONSENSE:
            changed = inner | {key: value}
            changed = body | {"request": changed} if "request" in body else changed
            assert (await post(sandbox, http, provider, path, changed))[0] in (200, 400), (key, value)
    for raw in (b"", b"{", b"[]", b"\xff"):
        async with http.post(sandbox.base_urls[provider] + path, data=raw, headers=headers(provider)) as response:
            assert response.status == 400


# -- Faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_errors_to_order(sandbox: Sandbox, http: Any, provider: str) -> None:
    path, body = request(provider, "[error 429 retry_after=7]")
    async with http.post(sandbox.base_urls[provider] + path, json=body, headers=headers(provider)) as response:
        assert response.status == 429
        if provider.startswith("gemini"):
            assert '"retryDelay": "7s"' in await response.text()
        else:
            assert response.headers["retry-after"] == "7"


SPELLINGS = {
    "anthropic": lambda event: event["error"]["type"] == "overloaded_error",
    "openai": lambda event: event["error"]["type"] == "server_error",
    "groq": lambda event: event["error"]["status_code"] == 529,
    "cerebras": lambda event: event["status_code"] == 529,
    "oai-resp": lambda event: event["type"] == "response.failed",
    "gemini": lambda event: event["error"]["status"] == "UNAVAILABLE",
    "gemini-oauth": lambda event: event["error"]["status"] == "UNAVAILABLE",
}


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_error_in_stream(sandbox: Sandbox, http: Any, provider: str) -> None:
    status, stream = await post(sandbox, http, provider, *request(provider, "[error_in_stream]", stream=True))
    assert status == 200
    assert len(stream) > 3
    assert SPELLINGS[provider](stream[-1])


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_break_off(sandbox: Sandbox, http: Any, provider: str) -> None:
    _, whole = await post(sandbox, http, provider, *request(provider, "[words 9]", stream=True))
    _, stream = await post(sandbox, http, provider, *request(provider, "[words 9][break_off]", stream=True))
    assert len(stream) < len(whole)
    assert "[DONE]" not in stream
    with pytest.raises(aiohttp.ClientPayloadError):
        await post(sandbox, http, provider, *request(provider, "[break_off]"))


@pytest.mark.parametrize("stream", [False, True])
async def test_reset(sandbox: Sandbox, http: Any, stream: bool) -> None:
    with pytest.raises((aiohttp.ClientError, ConnectionError)):
        await post(sandbox, http, "openai", *request("openai", "[words 9][reset]", stream=stream))
    assert not (await sandbox.wait_for(1)).closed.is_set()


@pytest.mark.parametrize("stream", [False, True])
async def test_notices_that_the_caller_hung_up(sandbox: Sandbox, http: Any, stream: bool) -> None:
    asking = asyncio.create_task(post(sandbox, http, "groq", *request("groq", "[hang]", stream=stream)))
    record = await sandbox.wait_for(1)
    assert (record.provider, record.key, sandbox.open, record.done.is_set()) == ("groq", "any", 1, False)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    async with asyncio.timeout(5):
        await record.closed.wait()
    assert record.ended is not None
    assert record.ended >= record.started
    assert sandbox.open == 0


async def test_records_what_came_in(sandbox: Sandbox, http: Any) -> None:
    path, body = request("oai-resp", "[wait 0.1][slow 0.01] hi", stream=True)
    await post(sandbox, http, "oai-resp", path, body)
    record = await sandbox.wait_for(1)
    await record.done.wait()
    assert (record.path, record.body, record.closed.is_set()) == ("/oai-resp/responses", body, False)
    assert record.ended is not None
    assert record.ended - record.started > 0.1


async def test_environment(sandbox: Sandbox) -> None:
    assert sandbox.environ["VAI_OAI_RESP_BASE_URL"] == f"{sandbox.url}/oai-resp"
    assert sandbox.environ["VAI_GEMINI_OAUTH_BASE_URL"] == f"{sandbox.url}/gemini-oauth/v1internal"
    assert sandbox.environ["ANTHROPIC_API_KEY"] == "sandbox-anthropic-key"
    assert sandbox.environ["GEMINI_OAUTH_PROJECT_ID"] == "sandbox-project"


# -- Code Assist -----------------------------------------------------------------------------------------------------


async def test_login(sandbox: Sandbox, http: Any) -> None:
    verifier, redirect = "v" * 50, "http://127.0.0.1:1/callback"
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")
    query = {"client_id": "c", "redirect_uri": redirect, "response_type": "code", "state": "s"}
    query |= {"code_challenge": challenge, "code_challenge_method": "S256"}

    async def code() -> str:
        url = f"{sandbox.oauth_url}/authorize"
        async with http.get(url, params=query, allow_redirects=False) as response:
            location = urllib.parse.urlsplit(response.headers["Location"])
        answer = dict(urllib.parse.parse_qsl(location.query))
        assert answer["state"] == "s"
        return str(answer["code"])

    async def exchange(**form: str) -> tuple[int, Any]:
        async with http.post(f"{sandbox.oauth_url}/token", data={"client_id": "c", **form}) as response:
            return response.status, await response.json()

    given = {"grant_type": "authorization_code", "redirect_uri": redirect}
    used = await code()
    status, tokens = await exchange(**given, code=used, code_verifier=verifier)
    assert (status, tokens["token_type"], tokens["expires_in"]) == (200, "Bearer", 3599)
    assert (await exchange(**given, code=used, code_verifier=verifier))[1]["error"] == "invalid_grant"
    assert (await exchange(**given, code=await code(), code_verifier="w" * 50))[1]["error"] == "invalid_grant"
    refresh = {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]}
    status, refreshed = await exchange(**refresh)
    assert status == 200
    assert "refresh_token" not in refreshed
    assert (await exchange(**refresh | {"refresh_token": "bad"}))[0] == 400
    async with http.get(f"{sandbox.oauth_url}/authorize", params=query | {"redirect_uri": "https://a.b"}) as response:
        assert response.status == 400


async def test_project_discovery(sandbox: Sandbox, http: Any) -> None:
    _, found = await post(sandbox, http, "gemini-oauth", ":loadCodeAssist", {"metadata": {}})
    assert found["cloudaicompanionProject"] == "sandbox-project"
    new = {"Authorization": "Bearer new-account"}
    _, found = await post(sandbox, http, "gemini-oauth", ":loadCodeAssist", {"metadata": {}}, **new)
    assert "currentTier" not in found
    order = {"tierId": "standard-tier", "cloudaicompanionProject": "mine"}
    _, begun = await post(sandbox, http, "gemini-oauth", ":onboardUser", order)
    assert begun["done"] is False
    async with http.get(f"{sandbox.base_urls['gemini-oauth']}/{begun['name']}") as response:
        assert (await response.json())["response"]["cloudaicompanionProject"]["id"] == "mine"
    free = {"tierId": "free-tier", "cloudaicompanionProject": "mine"}
    assert (await post(sandbox, http, "gemini-oauth", ":onboardUser", free))[0] == 400
