"""What vai takes as a request: strict where it owns the meaning, open where Anthropic's API moves on.

Every refusal is an `InvalidRequestError` whose `param` is the place in the caller's own body.
"""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from providers import JSON, PROVIDERS, Credential, InvalidRequestError, MessageRequest, Secret, parse_request
from providers import read_request as read

IMAGE: JSON = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
CALL: JSON = {"type": "tool_use", "id": "t1", "name": "now", "input": {}}
RESULT: JSON = {"type": "tool_result", "tool_use_id": "t1", "content": "noon"}
TOOL: JSON = {"name": "now", "input_schema": {"type": "object"}}


def user(*blocks: Any) -> JSON:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Any) -> JSON:
    return {"role": "assistant", "content": list(blocks)}


def says(role: str, content: Any = "hi") -> JSON:
    return {"role": role, "content": content}


def with_data(data: Any) -> list[JSON]:
    return [user({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}})]


def result_with(*blocks: Any) -> list[JSON]:
    return [assistant(CALL), user({**RESULT, "content": list(blocks)})]


def parse(**fields: Any) -> MessageRequest:
    return parse_request({"model": "openai/gpt-4o", "messages": [says("user")]} | fields)


def refusal(**fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        parse(**fields)
    return caught.value


M0 = "messages[0].content[0]"
TEXT: JSON = {"type": "text", "text": "hi"}
FTP: JSON = {"type": "image", "source": {"type": "ftp"}}
FILE: JSON = {"type": "image", "source": {"type": "url", "url": "file:///x"}}
UNTYPED: JSON = {"type": "document", "source": {"type": "base64"}}
THOUGHT: JSON = {"type": "thinking", "thinking": "hm", "signature": "s"}
DOCUMENT: JSON = {"type": "document", "source": {"type": "text", "data": "x"}}
OTHER: JSON = {**RESULT, "tool_use_id": "t2"}
FIXED = ("model", "messages", "input", "contents", "stream", "base_url", "api_base")
WRONG: dict[str, dict[str, list[Any]]] = {  # field; the place that the error names, and what is wrong there
    "messages": {
        "messages": [[], "hi", {}], "messages[0]": [["hi"]], "messages[0].role": [[{"content": "hi"}], [says("tool")]],
        "messages[0].content": [[{"role": "user"}], *([says("user", odd)] for odd in (7, None, {"string": 1}))],
        "messages[1].content": [[says("user"), says("assistant", 7)]],
        # blocks, and the roles that may hold them
        M0: [[user("hi")], [user([])]],
        f"{M0}.type": [[user({"text": "hi"})], [user({"type": "hologram"})], [user({"type": ["text"]})], [user(CALL)],
                       [user(THOUGHT)], [assistant(DOCUMENT)], [says("system", [IMAGE])]],
        f"{M0}.text": [[user({"type": "text"})], [user({"type": "text", "text": 7})]],
        f"{M0}.cache_control": [[user({**TEXT, "cache_control": 7})]],
        f"{M0}.signature": [[assistant({**THOUGHT, "signature": 7})]],
        f"{M0}.source": [[user({"type": "image"})], [user({"type": "image", "source": "x"})]],
        f"{M0}.source.type": [[user(FTP)]], f"{M0}.source.url": [[user(FILE)]],
        "messages[0].content[1].source.media_type": [[user(IMAGE, UNTYPED)]],
        f"{M0}.input": [[assistant({**CALL, "input": "{}"})]], f"{M0}.id": [[assistant({**CALL, "id": ""})]],
        "messages[0].content[1].type": [[assistant(CALL, RESULT)]],
        "messages[1].content[0].content[0].type": [result_with({"type": "hologram"}), result_with(RESULT)],
        "messages[1].content[0].content[0].text": [result_with({"type": "text", "text": 7})],
        # calls and their results
        f"{M0}.tool_use_id": [[user(RESULT)], [user(RESULT), assistant(CALL)]],
        "messages[1].content[0].tool_use_id": [[assistant(CALL), user(OTHER)]],
        "messages[1].content[1].tool_use_id": [[assistant(CALL), user(RESULT, RESULT)]],
        "messages[2].content[0].tool_use_id": [[assistant(CALL), user(RESULT), user(RESULT)]],
        "messages[0].content[1].id": [[assistant(CALL, CALL)]],
    },
    "system": {"system": [7], "system[0]": [[7]], "system[0].text": [[{"type": "text"}]], "system[0].type": [[IMAGE]]},
    "max_tokens": {"max_tokens": ["9", 9.0, True, -1, 100_000_001, 10**400]},
    "temperature": {"temperature": ["1", 2.1, math.nan, math.inf, 10**400]},
    "top_p": {"top_p": [-0.1]},
    "top_k": {"top_k": [-1, 1.5]},
    "metadata": {"metadata.user_id": [{"user_id": 5}]},
    "thinking": {"thinking.type": [{"type": "deep"}],
                 "thinking.budget_tokens": [{"type": "enabled"}, {"type": "enabled", "budget_tokens": 0}]},
    "output_config": {"output_config.effort": [{"effort": "huge"}]},
    "output_format": {"output_format.type": [{"type": "xml"}], "output_format.json_schema": [{"type": "json_schema"}]},
    "output": {"output.modalities[0]": [{"modalities": ["smell"]}], "output.image.size": [{"image": {"size": "big"}}]},
    "provider_keys": {"provider_keys.openai": [{"openai": 5}]},
    "tools": {
        "tools": [{}], "tools[0]": [["now"]], "tools[0].type": [[{"type": "magic"}], [{"type": 7}]],
        "tools[0].name": [[{"input_schema": {}}], *([{**TOOL, "name": odd}] for odd in ("", "a\n", "\xe9", "a" * 500))],
        "tools[1].name": [[TOOL, TOOL], [TOOL, {**TOOL, "name": "what time"}]],
        "tools[0].input_schema": [[{"name": "now"}], [{"name": "now", "input_schema": "{}"}]],
    },
    "tool_choice": {"tool_choice": ["auto", {"type": "any"}], "tool_choice.type": [{"type": "required"}],
                    "tool_choice.name": [{"type": "tool"}, {"type": "tool", "name": "then"}]},
    "stream": {"stream": ["yes", 1]},
    "stop_sequences": {"stop_sequences": ["END", ["a"] * 65], "stop_sequences[0]": [[""], ["a" * 4097]],
                       "stop_sequences[1]": [["END", 7]]},
    "extensions": {"extensions": [5], "extensions.openai": [{"openai": 5}],
                   **{f"extensions.gemini.{name}": [{"gemini": {name: "x"}}] for name in FIXED}},
}  # fmt: skip
ROWS = [
    (field, value, param) for field, places in WRONG.items() for param, values in places.items() for value in values
]


@pytest.mark.parametrize(("field", "value", "param"), ROWS, ids=[f"{row[2]}-{i}" for i, row in enumerate(ROWS)])
def test_a_wrong_request_is_refused_at_its_place(field: str, value: Any, param: str) -> None:
    """What is wrong is a 400 that names the place, also in its text."""
    fault = refusal(**{field: value})

    assert fault.param == param
    assert fault.to_wire()["error"]["type"] == "invalid_request_error"
    assert len(fault.message) < 500


@pytest.mark.parametrize(
    "data",
    ["", "@@@@", "A", "AA", "AAA", "AA=", "=AAA", "A=AA", "AA==AAAA", "AAAA=", "AAAA====", "AA===", "AAAA\n", " AAAA",
     "AA AA", "AA\r\nAA", "-_-_", "data:image/png;base64,AAAA", "AAA\u00e9", "\uff21AAA", "AAAA\x00"],
)  # fmt: skip
def test_only_standard_base64_is_data(data: str) -> None:
    """Padding too short or too long, line breaks, blanks and the URL-safe alphabet are refused, at any depth."""
    assert refusal(messages=with_data(data)).param == f"{M0}.source.data"
    nested = result_with(*with_data(data)[0]["content"])
    assert refusal(messages=nested).param == "messages[1].content[0].content[0].source.data"


@pytest.mark.parametrize("data", ["AA==", "AAA=", "AAAA", "+/+/", "iVBORw0KGgo="])
def test_good_base64_passes(data: str) -> None:
    """The standard alphabet, padded, is data."""
    assert parse(messages=with_data(data))


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "provider", "name"),
    [
        ("openai/gpt-4o", "openai", "gpt-4o"),
        ("groq/openai/gpt-oss-20b", "groq", "openai/gpt-oss-20b"),
        ("openai/ft:gpt-4o:acme::x@1+2", "openai", "ft:gpt-4o:acme::x@1+2"),
        ("gemini-oauth/gemini-3-flash", "gemini-oauth", "gemini-3-flash"),
        ("openai/" + "a" * 249, "openai", "a" * 249),
    ],
)
def test_a_model_is_split_at_the_first_slash(model: str, provider: str, name: str) -> None:
    """What stands before it is the provider, the rest its own name for the model."""
    request = parse(model=model)

    assert (request.provider, request.model_name) == (provider, name)


@pytest.mark.parametrize(
    "model",
    ["", "gpt-4o", "/gpt-4o", "openai/", 7, None, ["openai/gpt-4o"],
     "gemini/../../x", "gemini/..%2f..%2fx", "gemini/%2e%2e/x", "gemini/a/../b", "gemini/a..b", "openai//x",
     "openai/a//b", "gemini/x?key=1", "gemini/x#y", "gemini/x y", "gemini/.x", "gemini/-x", "anthropic/@e/x",
     "gemini/x\\y", "openai/gpt-4o\n", "openai/gpt-4o\r\nX: y", "openai/gpt\x00", "openai/gpt-\u00e9", "openai/\ud800",
     "openai/" + "a" * 10_000],
)  # fmt: skip
def test_a_bad_model_name_is_refused(model: Any) -> None:
    """Anything but `provider/model` is a 400 that says what form is expected and does not echo it at length."""
    fault = refusal(model=model)

    assert fault.param == "model"
    assert "provider/model" in fault.message
    assert len(fault.message) < 300


def test_a_missing_model_is_refused() -> None:
    """A request without a model is told the form, too."""
    with pytest.raises(InvalidRequestError, match="provider/model") as caught:
        parse_request({"messages": [says("user")]})
    assert caught.value.param == "model"


@pytest.mark.parametrize("model", ["mistral/large", "together/x", "OpenAI/gpt-4o", " openai/gpt-4o"])
def test_an_unknown_provider_lists_the_known(model: str) -> None:
    """The 400 names every provider that there is."""
    fault = refusal(model=model)

    assert fault.param == "model"
    assert all(provider in fault.message for provider in PROVIDERS)


def test_an_alias_stands_for_a_model() -> None:
    """A bare name reaches the model that the configuration names; any other is told which names there are."""
    aliases = {"fast": "groq/llama-3.3-70b-versatile", "claude-sonnet-4-5": "anthropic/claude-sonnet-4-5"}
    body = {"messages": [says("user")]}

    assert parse_request(body | {"model": "fast"}, aliases=aliases).model_name == "llama-3.3-70b-versatile"
    assert parse_request(body | {"model": "openai/gpt-4o"}, aliases=aliases).provider == "openai"
    with pytest.raises(InvalidRequestError, match=r"provider/model.*claude-sonnet-4-5, fast"):
        parse_request(body | {"model": "slow"}, aliases=aliases)


def test_a_model_name_is_one_segment_of_a_url() -> None:
    """A colon or a slash in it does not reach another method of the provider."""
    request = parse(model="gemini/tuned/x:countTokens")
    sent = PROVIDERS["gemini"].encode(request, Credential(Secret("k")), "https://up.test", 9)

    assert sent.url == "https://up.test/models/tuned%2Fx%3AcountTokens:generateContent"


# -- what passes -------------------------------------------------------------------------------------------------------

WAV: JSON = {"type": "base64", "media_type": "audio/wav", "data": "UklGRg=="}
MP4: JSON = {**WAV, "media_type": "video/mp4"}
FOUND: JSON = {"type": "search_result", "source": "s", "title": "t", "content": [{"type": "text", "text": "x"}]}
DOCUMENTS: JSON = {
    "text": {"data": "x"}, "content": {"content": "x"}, "url": {"url": "https://x.test/a.pdf"},
    "file": {"file_id": "f"}, "base64": {"media_type": "application/pdf", "data": "AAAA"},
}  # fmt: skip
REDACTED: JSON = {"type": "redacted_thinking", "data": "x"}
SEARCH: JSON = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
HITS: JSON = {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}
GOOD: list[JSON] = [
    {"messages": [says("user"), says("assistant"), says("system"), says("user")]},
    {"messages": [says("user", text) for text in ("\x00\x1b", "\u2028\u202e", "\ud800", "\U0001f600")]},
    {"messages": [user({"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}, "brand_new": [1]})]},
    {"messages": [user({"type": "image", "source": {"type": "url", "url": "http://169.254.169.254/"}})]},
    {
        "messages": [
            user({"type": "document", "source": {"type": kind, **source}}) for kind, source in DOCUMENTS.items()
        ]
    },
    {"messages": [user({"type": "audio", "source": WAV}, {"type": "video", "source": MP4}, FOUND)]},
    {"messages": [assistant(THOUGHT, REDACTED, CALL), user(RESULT)]},
    {"messages": result_with(IMAGE, FOUND)},
    {"messages": [assistant(SEARCH, HITS), says("user")]},
    {"tools": [TOOL, {**TOOL, "name": "b", "type": "custom"}, {**TOOL, "name": "c", "type": "function"}]},
    {"tools": [{"type": "web_search_20250305", "name": "web_search"}, {"type": "code_execution", "config": {}}]},
    {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "now", "disable_parallel_tool_use": True}},
    {"tools": [{**TOOL, "input_schema": {"$ref": "#"}}]},
    {"stop_sequences": ["a"] * 64},
    {"stop_sequences": ["a" * 4096], "max_tokens": 0, "temperature": 1, "top_k": 10**30},
    {"stream": None, "tools": None, "system": None, "max_tokens": None},
    {"system": [{"type": "text", "text": "x"}], "brand_new": {"a": 1}},
    {"extensions": {"openai": {"seed": 1, "metadata": {"model": "nested is free"}}}},
]


@pytest.mark.parametrize("fields", GOOD, ids=range(len(GOOD)))
def test_a_good_request_passes(fields: JSON) -> None:
    """Every kind of block, tool and field is taken; the caller's content is kept as it came."""
    request = parse(**fields)

    assert request.body["messages"] == fields.get("messages", [says("user")])
    assert request.stream is False


def test_keys_are_not_kept_in_the_body() -> None:
    """`provider_keys` neither goes into the body that is forwarded nor shows in a repr."""
    request = parse(provider_keys={"openai": "sk-secret-123456"})

    assert "provider_keys" not in request.body
    assert "sk-secret" not in repr(request)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_number_that_json_has_not_never_goes_out(provider: str) -> None:
    """NaN in the middle of a tool's input, which only a caller in Python can send, is refused at its place."""
    model = {"anthropic": "claude-sonnet-4-5"}.get(provider, "m")
    messages = [says("user"), assistant({**CALL, "input": {"x": [1, math.nan]}}), user(RESULT)]
    with pytest.raises(InvalidRequestError) as caught:
        PROVIDERS[provider].encode(
            parse(model=f"{provider}/{model}", messages=messages), Credential(Secret("k")), "https://up.test", 9
        )
    assert caught.value.param == "messages[1].content[0].input.x[1]"


@pytest.mark.parametrize(
    "bait", ["(" * 1_000_000, "a" * 1_000_000 + "!", "\\" * 1_000_000, "a:" * 500_000, "/" * 1_000_000]
)
def test_no_text_takes_long_to_read(bait: str) -> None:
    """A megabyte of regex bait anywhere is answered at once."""
    begin = time.process_time()
    parse(messages=[user({"type": "text", "text": bait})], system=bait)
    for fields in (
        {"model": bait},
        {"model": f"openai/{bait}"},
        {"tools": [{**TOOL, "name": bait}]},
        {"stop_sequences": [bait]},
    ):
        refusal(**fields)
    refusal(messages=with_data(bait + "*"))
    refusal(messages=[user({"type": "image", "source": {"type": "url", "url": bait}})])
    assert time.process_time() - begin < 0.5


# -- the body ----------------------------------------------------------------------------------------------------------


def nested(depth: int) -> bytes:
    """An object with arrays inside, `depth` levels in all."""
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (b'{"a":1}', {"a": 1}),
        (b' \n{"a":1}\r\n', {"a": 1}),
        (b'\xef\xbb\xbf{"a":1}', {"a": 1}),
        (b'{"model":"a","model":"b"}', {"model": "b"}),
        (rb'{"a":"\ud800"}', {"a": "\ud800"}),
        (rb'{"a":"\u0000\u001b\u2028"}', {"a": "\x00\x1b\u2028"}),
        (b'{"a":1e308,"b":-0,"c":12345678901234567890}', {"a": 1e308, "b": 0, "c": 12345678901234567890}),
        (b'{"a":"[[[[' + b"[" * 200 + b'"}', {"a": "[" * 204}),
    ],
)
def test_a_body_is_read(raw: bytes, body: JSON) -> None:
    """UTF-8 JSON, with a BOM or without; of a key given twice the last value counts."""
    assert read(raw) == body


HUGE = b"9" * 5000
BAD_BODIES: list[tuple[bytes, str | None, str | None]] = [  # raw, param, code
    (b"", None, "invalid_json"),
    (b"{", None, "invalid_json"),
    (b'{"a":1}x', None, "invalid_json"),
    (b'{"a":1,}', None, "invalid_json"),
    (b"{'a':1}", None, "invalid_json"),
    (b'{"a":"\x00"}', None, "invalid_json"),
    (b'{"a":"\xff"}', None, "invalid_json"),
    (b"\xff\xfe" + '{"a":1}'.encode("utf-16-le"), None, "invalid_json"),
    ('{"a":1}'.encode("utf-16-be"), None, "invalid_json"),
    (b"null", None, None),
    (b"[]", None, None),
    (b'"x"', None, None),
    (b"7", None, None),
    (b'{"temperature":NaN}', "temperature", None),
    (b'{"temperature":Infinity}', "temperature", None),
    (b'{"temperature":-Infinity}', "temperature", None),
    (b'{"temperature":1e999}', "temperature", None),
    (b'{"messages":[{"content":[{"input":{"x":-1e999}}]}]}', "messages[0].content[0].input.x", None),
    (b'{"max_tokens":' + HUGE + b"}", "max_tokens", None),
    (b'{"tools":[{"input_schema":{"maximum":-' + HUGE + b"}}]}", "tools[0].input_schema.maximum", None),
    (HUGE, None, "invalid_json"),
    (nested(65), None, "json_too_deep"),
    (nested(66), None, "json_too_deep"),
    (nested(900), None, "json_too_deep"),
    (nested(100_000), None, "json_too_deep"),
    (b'{"a":' * 65 + b"1" + b"}" * 65, None, "json_too_deep"),
    (b'{"a":' * 100_000, None, "json_too_deep"),
    (b"[" * (10 << 20), None, "json_too_deep"),
]


@pytest.mark.parametrize(("raw", "param", "code"), BAD_BODIES, ids=[repr(row[0][:24]) for row in BAD_BODIES])
def test_a_bad_body_is_refused(raw: bytes, param: str | None, code: str | None) -> None:
    """What is no JSON object is a 400, at once; one with a number that JSON cannot hold names it."""
    begin = time.process_time()
    with pytest.raises(InvalidRequestError) as caught:
        read(raw)

    assert (caught.value.param, caught.value.code) == (param, code)
    assert time.process_time() - begin < 0.25
    if code is None and param is None:
        assert "object" in caught.value.message


def test_the_depth_is_counted_to_the_limit() -> None:
    """64 levels pass, brackets in text do not count, and the limit is the configuration's to set."""
    assert read(nested(64))
    assert read(nested(3), max_depth=3)
    with pytest.raises(InvalidRequestError) as caught:
        read(nested(4), max_depth=3)
    assert caught.value.code == "json_too_deep"
