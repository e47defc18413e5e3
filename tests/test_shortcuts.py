"""The short ways through the hot path: each gives what the plain way beside it gives, whatever comes in."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Served
from hypothesis import example, given, settings
from hypothesis import strategies as st

import providers
import server
import vai
from providers import PROVIDERS, Adapter, Error, SSEDecoder, StreamDecoder, TextCut, dumps, loads, sse_frame

FUZZ = settings(deadline=None, database=None, derandomize=True, max_examples=150)
NEVER = re.compile(r"(?!)")

MODELS = {
    "anthropic": "anthropic/claude-sonnet-5-5",
    "openai": "openai/gpt-5.2",
    "groq": "groq/llama-3.3-70b-versatile",
    "cerebras": "cerebras/gpt-oss-120b",
}

# What the providers send for one text delta; TEXT stands for the inside of the string.
DELTAS = {
    "anthropic": (
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"TEXT"}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"TEXT"}   }',
        '{"type":"content_block_delta","index":1,"delta":{"type":"text_delta","text":"TEXT"} }',
        '{"delta":{"text":"TEXT","type":"text_delta"},"index":0,"type":"content_block_delta"}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"TEXT"}}',
    ),
    "chat": (
        '{"id":"a","object":"chat.completion.chunk","created":7,"model":"m","service_tier":"default",'
        '"system_fingerprint":null,"choices":[{"index":0,"delta":{"content":"TEXT"},"logprobs":null,'
        '"finish_reason":null}],"usage":null,"obfuscation":"x9Zq"}',
        '{"id":"a","choices":[{"delta":{"content":"TEXT"},"index":0}],"created":7,"model":"m",'
        '"object":"chat.completion.chunk"}',
        '{"id":"a","choices":[{"index":0,"delta":{"content":"TEXT"},"finish_reason":"stop"}],"model":"m"}',
        '{"id":"a","choices":[{"index":1,"delta":{"content":"TEXT"},"finish_reason":null}],"model":"m"}',
        '{"id":"a","choices":[{"index":0,"delta":{"role":"assistant","content":"TEXT"},"finish_reason":null}]}',
        '{"id":"a","choices":[{"index":0,"delta":{"reasoning":"TEXT"}}],"x_groq":{"id":"r"}}',
        '{"id": "a", "choices": [{"index": 0, "delta": {"content": "TEXT"}}]}',
        '{"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"TEXT"}}],'
        '"usage":{"prompt_tokens":3,"completion_tokens":4}}',
        "[DONE]",
    ),
}
BEGINNINGS = {
    "anthropic": (
        '{"type":"message_start","message":{"id":"msg_1","model":"m","usage":{"input_tokens":1}}}',
        '{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}',
    ),
    "chat": ('{"id":"a","choices":[{"index":0,"delta":{"role":"assistant","content":""}}],"model":"m"}',),
}
# What may stand in a string of JSON, or must not.
texts = st.text(max_size=12).map(lambda text: json.dumps(text)[1:-1]) | st.sampled_from(
    [
        "",
        "é",
        "\\u00e9",
        "\\ud83d\\ude00",
        "\\ud83d",
        "\\/",
        "\\x",
        "\\",
        '\\"',
        '"',
        "\x01",
        "\\u12",
        " ",
        "​",
        "a\\nb",
        "😀",
    ]
)
# What is put somewhere into an event to break it, or to change what it means.
SPLICES = [
    *("", " ", '"', "\\", "{", "}", ",", "null", "0", "-1", "1e9", "é", "\x00", "\\u0061", "NaN", "9" * 20),
    *(
        ',"error":{"message":"no"}',
        '"error":"no",',
        '"usage":7,',
        ',"choices":null',
        '"choices":"x",',
        '"x_groq":{"error":{"message":"no"}},',
        ',"usage":{"prompt_tokens":9}',
    ),
    *('"choices":[],', ',"choices":[{"delta":{"content":"other"}}]', '"delta":{"content":"other"},', ',"index":1'),
    *(',"finish_reason":"length"', ',"audio":{"data":"AAAA"}', ',"refusal":"no"', ',"usage":null', ',"us\\u0061ge":5'),
]


@st.composite
def streams(draw: st.DrawFn, family: str) -> list[str]:
    """The data of some events: the beginning of a stream, and texts in many forms, some of them spoilt."""
    events = list(BEGINNINGS[family]) if draw(st.integers(0, 9)) else []
    for _ in range(draw(st.integers(1, 6))):
        event = draw(st.sampled_from(DELTAS[family])).replace("TEXT", draw(texts))
        if not draw(st.integers(0, 3)):
            start = draw(st.integers(0, len(event)))
            event = event[:start] + draw(st.sampled_from(SPLICES)) + event[start + draw(st.integers(0, 3)) :]
        events += [event] * draw(st.integers(1, 2))
    return [re.sub(r"[\r\n]", " ", event) for event in events]


def decoder(provider: str, plainly: bool, stop: list[str]) -> StreamDecoder:
    body = {"model": MODELS[provider], "messages": [{"role": "user", "content": "hi"}], "stop_sequences": stop}
    made = PROVIDERS[provider].decoder(providers.parse_request(body))
    if plainly:
        made._texts = TextCut(NEVER, NEVER)  # type: ignore[attr-defined]
    return made


def told(decoder: StreamDecoder, chunks: list[bytes]) -> tuple[bytes, Any]:
    """What goes out for what comes in, and the error that ended it."""
    sse, out = SSEDecoder(), b""
    try:
        for chunk in chunks:
            for event in sse.feed(chunk):
                out += re.sub(rb"msg_\w{24}", b"made up", b"".join(map(sse_frame, decoder.feed(event))))
    except Error as fault:
        return out, (type(fault), fault.code, fault.message, fault.provider_error)
    return out, (decoder.ended, decoder.ending)


@pytest.mark.parametrize("provider", MODELS)
@FUZZ
@given(st.data())
def test_text_cut_out(provider: str, data: st.DataObject) -> None:
    """A text that is cut out of its event is what reading the whole event gives, for any stream and chunking."""
    events = data.draw(streams("anthropic" if provider == "anthropic" else "chat"))
    raw = "".join(f"data: {event}\n\n" for event in events).encode("utf-8", "surrogatepass")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=5)))
    chunks = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    stop = data.draw(st.sampled_from([[], ["b"], ["other"], ["1", "2", "3", "4", "5 5"]]))
    assert told(decoder(provider, False, stop), chunks) == told(decoder(provider, True, stop), [raw])


@pytest.mark.parametrize(("provider", "form"), [("anthropic", 0), ("anthropic", 1), ("openai", 0), ("cerebras", 1)])
def test_text_cut_out_of_anything(provider: str, form: int) -> None:
    """The same with anything put anywhere into the forms that are cut."""
    family = "anthropic" if provider == "anthropic" else "chat"
    good = DELTAS[family][form].replace("TEXT", "b\\n")
    for splice in SPLICES:
        for place in range(len(good) + 1):
            events = [*BEGINNINGS[family], good, good[:place] + splice + good[place:], good]
            chunks = [f"data: {event}\n\n".encode() for event in events]
            seen = told(decoder(provider, False, []), chunks), told(decoder(provider, True, []), chunks)
            assert seen[0] == seen[1], events[-2]


@pytest.mark.parametrize("family", DELTAS)
def test_what_is_cut_out(family: str) -> None:
    """The short way is taken for the forms that providers send, again and again, and not for what says more."""
    cut = {
        "anthropic": TextCut(providers._ANTHROPIC_BEFORE, providers._ANTHROPIC_AFTER),
        "chat": TextCut(providers._CHAT_BEFORE, providers._CHAT_AFTER),
    }[family]
    taken = [cut.text(form.replace("TEXT", "a\\u00e9 ")) for form in DELTAS[family] for _ in range(2)]
    short = {"anthropic": 3, "chat": 2}[family]
    assert taken == ["aé "] * 2 * short + [None] * 2 * (len(DELTAS[family]) - short)


# == Whole answers =====================================================================================================

ANSWER: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None, "annotations": []},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}},
}
ODD: list[Any] = [None, "", "x", 0, 1, -1, 1e300, True, [], {}, [1], {"a": 1}, [{}], ["x"], "tool_calls", "odd"]
NAMES = [
    *("id", "model", "choices", "usage", "error", "x_groq", "index", "message", "delta", "finish_reason", "content"),
    *("refusal", "annotations", "tool_calls", "reasoning", "reasoning_content", "executed_tools", "audio", "object"),
    *("prompt_tokens", "completion_tokens", "prompt_tokens_details", "completion_tokens_details", "cached_tokens"),
]


def spoilt(value: Any, edits: list[tuple[int, str, Any]]) -> Any:
    """A copy with some members set anew, each in one of the objects inside."""
    copy = json.loads(json.dumps(value))
    for place, name, new in edits:
        objects = [copy]
        for item in objects:  # grows while it is read
            objects += [
                child for child in (item.values() if isinstance(item, dict) else item) if isinstance(child, dict)
            ]
            lists = [child for child in (item.values() if isinstance(item, dict) else ()) if isinstance(child, list)]
            objects += [child for found in lists for child in found if isinstance(child, dict)]
        objects[place % len(objects)][name] = json.loads(json.dumps(new))
    return copy


def read(decode: Callable[..., Any], adapter: Adapter, body: Any, stop: list[str]) -> Any:
    asked = {"model": MODELS[adapter.id], "messages": [{"role": "user", "content": "hi"}], "stop_sequences": stop}
    try:
        message = decode(adapter, body, providers.parse_request(asked)).to_wire()
    except Error as fault:
        return type(fault), fault.code, fault.message
    return re.sub(r"msg_\w{24}", "made up", dumps(message).decode())


def test_whole_text() -> None:
    """An answer that is one text is read as the detour over events reads it; any other is left to that."""
    adapter = PROVIDERS["openai"]
    assert isinstance(adapter, providers.Chat)
    request = providers.parse_request({"model": MODELS["openai"], "messages": [{"role": "user", "content": "hi"}]})
    assert adapter._only_text(ANSWER, request) is not None
    for place, name, new in itertools.product(range(6), NAMES, ODD):
        body = spoilt(ANSWER, [(place, name, new)])
        assert read(type(adapter).decode, adapter, body, []) == read(Adapter.decode, adapter, body, []), body


@pytest.mark.parametrize("body", [None, [], "x", {}, {"choices": []}, {"choices": ANSWER["choices"] * 2, "usage": {}}])
@pytest.mark.parametrize("stop", [[], ["1", "2", "3", "4", "ll"]])
def test_whole_text_of_another_form(body: Any, stop: list[str]) -> None:
    for provider in ("openai", "groq", "cerebras"):
        for answer in (body, ANSWER):
            adapter = PROVIDERS[provider]
            assert read(type(adapter).decode, adapter, answer, stop) == read(Adapter.decode, adapter, answer, stop)


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from(NAMES), st.sampled_from(ODD)), min_size=2, max_size=4))
def test_whole_text_fuzzed(edits: list[tuple[int, str, Any]]) -> None:
    adapter, body = PROVIDERS["groq"], spoilt(ANSWER, edits)
    assert read(type(adapter).decode, adapter, body, []) == read(Adapter.decode, adapter, body, [])


# == JSON ==============================================================================================================

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=9) | st.binary()
leaves |= st.sampled_from(["null", "\ud800", 2**64, -(2**63) - 1, 10**400, object(), {1, 2}, providers.Secret("s")])
values = st.recursive(
    leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner), max_leaves=9
)


@FUZZ
@given(values)
@example([[[0.1, 1e16, -0.0, "\x7f\u2028é"]]])
@example(float("nan"))
@example({"deep": functools.reduce(lambda inner, _: [inner], range(300), 0)})
def test_request_body(value: Any) -> None:
    """With orjson a body says the same as without, and what JSON cannot say is the same error."""
    pytest.importorskip("orjson")

    def written(dump: Callable[[Any], bytes]) -> Any:
        try:
            return json.dumps(loads(dump(value)))
        except (TypeError, ValueError) as fault:
            return type(fault)

    assert written(providers.dump_body) == written(dumps)


def test_request_body_in_utf8() -> None:
    pytest.importorskip("orjson")
    assert providers.dump_body({"text": "é"}) == '{"text":"é"}'.encode()


# == Time limits =======================================================================================================


class Clock:
    """The part of an event loop that a watchdog uses, with a clock that is set by hand."""

    def __init__(self) -> None:
        self.now, self.timers = 0.0, 0
        self.due: dict[asyncio.TimerHandle, Callable[[], None]] = {}

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> Any:
        self.timers += 1
        handle = type("Handle", (), {"when": when, "cancel": lambda handle: self.due.pop(handle, None)})()
        self.due[handle] = callback
        return handle

    def pass_to(self, now: float) -> None:
        while soon := [handle for handle in self.due if handle.when <= now]:  # type: ignore[attr-defined]
            handle = min(soon, key=lambda handle: handle.when)  # type: ignore[attr-defined]
            self.now = max(self.now, handle.when)  # type: ignore[attr-defined]
            self.due.pop(handle)()
        self.now = now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: clock)
    return clock


@FUZZ
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9)), max_size=12))
def test_watchdog(waits: list[tuple[int, int, int]]) -> None:
    """It is heard of exactly when a wait goes on past its limit, at that moment, once, whatever came before."""
    with pytest.MonkeyPatch.context() as patch:
        clock, heard = Clock(), []
        patch.setattr(asyncio, "get_running_loop", lambda: clock)
        watchdog = providers.Watchdog(lambda: heard.append(clock.now))
        expected = []
        for limit, length, pause in waits:
            begun = clock.now
            watchdog.start(begun + limit)
            clock.pass_to(begun + length)
            watchdog.stop()
            expected += [begun + limit] if limit <= length else []
            clock.pass_to(clock.now + pause)
        watchdog.close()
        assert heard == expected
        assert not clock.due


def test_watchdog_leaves_its_timer_alone(clock: Clock) -> None:
    """A thousand waits in a row, one timer."""
    watchdog = providers.Watchdog(lambda: None)
    for _ in range(1000):
        watchdog.start(clock.now + 60)
        clock.pass_to(clock.now + 0.05)
        watchdog.stop()
    assert clock.timers == 1
    clock.pass_to(clock.now + 100)
    assert not clock.due


# == Memory ============================================================================================================


@pytest.mark.parametrize("stream", [False, True])
async def test_no_cycles(gateway: Served, stream: bool) -> None:
    """What a request needed is let go when it ends, without the garbage collector."""
    kinds = (vai.EventStream, server.EventWriter, server.Exchange, providers.Upstream, providers.MessageRequest)

    def left() -> int:
        return sum(type(item) in kinds for item in gc.get_objects())

    await gateway.ask("openai", stream=stream)
    gc.collect()
    before = left()
    gc.disable()
    try:
        for provider in ("openai", "anthropic", "gemini", "oai-resp"):
            await gateway.ask(provider, stream=stream)
        await gateway.gateway.idle.wait()
        for _ in range(100):  # what is done may still have to be swept up
            await asyncio.sleep(0)
        assert left() <= before
    finally:
        gc.enable()
