"""Speech in the API: `client.audio`, `POST /v1/audio`, and `voice` in messages, in process and through a gateway."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import re
import shutil
import sys
import wave
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import JSON, KEY, MODELS, ROOT, Answer, Listen, Logged, Serve, Served, body_of, hear, post_bytes, reset
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import server
import vai
from providers import (
    AudioDelta,
    AudioError,
    Error,
    InvalidRequestError,
    Media,
    Message,
    MessageDelta,
    MessageStop,
    TranscriptDelta,
    accumulate,
)
from sandbox import Request, Sandbox
from sandbox import speech as master
from vai import AsyncClient
from voice import Transcription, VoiceOutput, duration, read_wav, rms, silence, wav, wav_header

SAID = "Hello there. **How** are you today? I am fine, `thank you`."
SPOKEN = "Hello there. How are you today? I am fine, thank you."
QUESTION = wav(master("What is two plus two?"), 24_000)
SPEAK: JSON = {"output": {}}
HEAR: JSON = {"input": {}}
MODES = ("direct", "proxy")
both = pytest.mark.parametrize("mode", MODES)
formats = pytest.mark.parametrize("format", ["pcm", "wav", "mp3"])
Connect = Callable[..., Awaitable[AsyncClient]]


@pytest.fixture
async def connect(environ: dict[str, str], serve: Serve) -> AsyncIterator[Connect]:
    """Makes clients: in process, or of a gateway."""
    clients: list[AsyncClient] = []

    async def make(mode: str, **more: str) -> AsyncClient:
        if mode == "proxy":
            gateway = await serve(environ={**environ, **more})
            client = AsyncClient(base_url=gateway.url, api_key=KEY, max_retries=0)
        else:
            client = AsyncClient(engine=vai.Direct(environ={**environ, **more}), max_retries=0)
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.close()


def model(provider: str) -> str:
    return f"{provider}/{MODELS[provider]}"


def asks(*audio: bytes, text: str = "") -> list[JSON]:
    content = [*map(vai.audio, audio), *([vai.text(text)] if text else [])]
    return [{"role": "user", "content": content}]


def calls(sandbox: Sandbox, path: str) -> list[Request]:
    return [request for request in sandbox.requests if request.path.endswith(path)]


async def arrived(sandbox: Sandbox, path: str) -> Request:
    """The first request to this path; waits until it has come in."""
    number = 1
    while not (request := await sandbox.wait_for(number)).path.endswith(path):
        number += 1
    return request


def sound_of(message: Message) -> bytes:
    """The bytes of the message's one audio block, which is the last."""
    block = message.content[-1]
    assert isinstance(block, Media)
    assert [one.type for one in message.content].count("audio") == 1
    return base64.b64decode(block.source["data"])


async def master_of(sandbox: Sandbox, text: str, format: str) -> bytes:
    """The file that the service itself makes of a text."""
    if format == "pcm":
        return master(text)
    if format == "wav":
        return wav(master(text), 24_000)
    async with AsyncClient(engine=vai.Direct(environ=sandbox.environ)) as client:
        return (await client.audio.synthesize(text, format="mp3")).audio


# == Answers that are spoken ===========================================================================================


@both
@formats
@pytest.mark.parametrize("provider", ["anthropic", "openai", "gemini"])
async def test_an_answer_is_spoken(provider: str, format: str, mode: str, connect: Connect, sandbox: Sandbox) -> None:
    """The block at the end holds the text as it is read aloud, complete; a stream adds up to the same."""
    client = await connect(mode)
    asked: Any = {"model": model(provider), "messages": f"[say {SAID}]", "voice": {"output": {"format": format}}}
    message = await client.messages.create(**asked)
    assert message.text == SAID
    assert message.metadata is None
    block = message.content[-1]
    assert isinstance(block, Media)
    assert (block.transcript, block.source["type"]) == (SPOKEN, "base64")
    types = {"pcm": "audio/pcm;rate=24000", "wav": "audio/wav", "mp3": "audio/mpeg"}
    assert block.source["media_type"] == types[format]
    audio = sound_of(message)
    if format == "mp3":  # one file after the other
        assert audio.startswith(b"\xff")
    else:
        assert audio == await master_of(sandbox, SPOKEN, format)

    async with client.messages.stream(**asked) as stream:
        events = [event async for event in stream]
        final = await stream.final()
    pieces = [event.data for event in events if isinstance(event, AudioDelta)]
    if format != "mp3":  # whose frames depend on how much was written when
        assert final.content == message.content
    assert final.content[-1].transcript == SPOKEN  # type: ignore[union-attr]
    header = wav_header(24_000)
    assert b"".join(pieces)[:44] == header or format != "wav"
    assert b"".join(pieces)[44:] == sound_of(final)[44:]
    assert isinstance(events[-1], MessageStop)
    assert isinstance(events[-2], MessageDelta)
    assert [type(event) for event in events].index(AudioDelta) > 1


async def test_a_stream_on_the_wire(gateway: Served) -> None:
    """Anthropic's grammar with `audio_delta` in between: blocks are numbered, each is closed, nothing follows."""
    answer = await gateway.ask("anthropic", f"[slow 0.005] [think a while] [say {SAID}]", stream=True, voice=SPEAK)
    deltas = [event["delta"] for event in answer.events if event["type"] == "audio_delta"]
    assert {(one["format"], one["sample_rate"], len(one)) for one in deltas} == {("wav", 24_000, 3)}
    assert b"".join(base64.b64decode(one["data"]) for one in deltas) == wav_header(24_000) + master(SPOKEN)
    begun = [event["index"] for event in answer.events if event["type"] == "content_block_start"]
    ended = [event["index"] for event in answer.events if event["type"] == "content_block_stop"]
    assert begun == ended == list(range(len(begun)))
    assert [event["type"] for event in answer.events[-2:]] == ["message_delta", "message_stop"]
    last = [event for event in answer.events if event["type"] == "content_block_start"][-1]
    assert last["content_block"] == {"type": "audio", "transcript": SPOKEN}


@both
async def test_text_is_never_held_up(mode: str, connect: Connect, listen: Listen) -> None:
    """With a speech service that accepts and says nothing, text comes as it comes without voice."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    client = await connect(mode, VAI_CARTESIA_BASE_URL=await listen(talk))
    asked: Any = {"model": model("openai"), "messages": f"[say {SAID}]"}
    async with client.messages.stream(**asked) as stream:
        plain = [event async for event in stream][:-2]
    async with asyncio.timeout(8), client.messages.stream(**asked, voice=SPEAK) as stream:
        assert [await anext(stream) for _ in plain] == plain


@pytest.mark.parametrize("where", ["handshake", "socket"])
async def test_a_hung_voice_ends_the_answer_late_but_well(where: str, environ: dict[str, str], listen: Listen) -> None:
    """Once the service's silence is too long, an `audio_error` says so, and the message ends with its text whole."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    if where == "handshake":
        environ = {**environ, "VAI_CARTESIA_BASE_URL": await listen(talk)}
    said = SAID if where == "handshake" else r"Hello there. \[hang\] And more."
    timeouts = vai.Timeouts(connect=0.2, idle=0.2)
    async with AsyncClient(engine=vai.Direct(environ=environ, timeouts=timeouts)) as client:
        async with client.messages.stream(model=model("openai"), messages=f"[say {said}]", voice=SPEAK) as stream:
            events = [event async for event in stream]
            final = await stream.final()
    (fault,) = [event for event in events if isinstance(event, AudioError)]
    assert (fault.error["type"], fault.error["provider"]) == ("timeout_error", "cartesia")
    assert isinstance(events[-1], MessageStop)
    assert (final.text, final.stop_reason) == (said, "end_turn")
    assert final.metadata == {"audio_error": fault.error}
    assert [block.type for block in final.content] == (["text"] if where == "handshake" else ["text", "audio"])


async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    """Takes a WebSocket, and gives the `context_id` of its first message."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    key = re.search(r"(?i)sec-websocket-key: (\S+)", head)
    assert key
    proof = base64.b64encode(hashlib.sha1(f"{key[1]}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest())
    head = "HTTP/1.1 101 OK\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
    writer.write(head.encode() + proof + b"\r\n\r\n")
    size = (await reader.readexactly(2))[1] & 127
    size = int.from_bytes(await reader.readexactly(2), "big") if size == 126 else size
    mask, data = await reader.readexactly(4), await reader.readexactly(size)
    said: str = json.loads(bytes(byte ^ mask[i % 4] for i, byte in enumerate(data)))["context_id"]
    return said


def text_frame(message: JSON) -> bytes:
    data = json.dumps(message).encode()
    return b"\x81" + (bytes([len(data)]) if len(data) < 126 else b"\x7e" + len(data).to_bytes(2, "big")) + data


@pytest.mark.parametrize("format", ["pcm", "mp3"])
async def test_a_voice_without_end(format: str, environ: dict[str, str], listen: Listen) -> None:
    """Speech counts into the time of the whole request: a service that goes on and on is cut off."""
    piece = {"type": "chunk", "data": base64.b64encode(bytes(48)).decode()}

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if format == "mp3":
            await hear(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\nTransfer-Encoding: chunked\r\n\r\n")
            more = b"4\r\n\xff\xf3\xc4\xc4\r\n"
        else:
            more = text_frame({**piece, "context_id": await accepted(reader, writer)})
        while not reader.at_eof():
            writer.write(more)
            await asyncio.sleep(0.01)

    environ = {**environ, "VAI_CARTESIA_BASE_URL": await listen(talk)}
    engine = vai.Direct(environ=environ, timeouts=vai.Timeouts(total=0.5))
    async with asyncio.timeout(8), AsyncClient(engine=engine) as client:
        voice = {"output": {"format": format}}
        async with client.messages.stream(model=model("openai"), messages=f"[say {SAID}]", voice=voice) as stream:
            final = await stream.final()
    assert final.metadata is not None
    assert final.metadata["audio_error"]["type"] == "timeout_error"
    assert (final.text, final.stop_reason, final.content[-1].type) == (SAID, "end_turn", "audio")


async def test_a_voice_that_says_nothing_is_told(environ: dict[str, str], listen: Listen) -> None:
    """Speech that ends before it began has failed: the answer says so."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        context = await accepted(reader, writer)
        writer.write(text_frame({"type": "done", "done": True, "status_code": 200, "context_id": context}))
        await reader.read()

    environ = {**environ, "VAI_CARTESIA_BASE_URL": await listen(talk)}
    async with AsyncClient(engine=vai.Direct(environ=environ)) as client:
        message = await client.messages.create(model=model("openai"), messages="[say Hello.]", voice=SPEAK)
    assert message.metadata is not None
    assert message.metadata["audio_error"]["message"] == "cartesia sent no audio"
    assert [block.type for block in message.content] == ["text"]


async def test_the_log_says_why_an_answer_was_not_spoken(gateway: Served, logged: Logged) -> None:
    """The request is a 200; what its speech failed of has a line of its own, with the request's id and no content."""
    answer = await gateway.ask(
        "openai", "[say Marked.]", voice=SPEAK, headers={"X-Provider-Key-Cartesia": "bad-secret"}
    )
    assert answer.body["metadata"]["audio_error"]["type"] == "authentication_error"
    (line,) = [line for line in map(json.loads, logged.json) if line["logger"] == "vai.voice"]
    assert line["message"] == "an answer was not spoken: cartesia authentication_failed"
    assert line["request_id"] == answer.headers["X-Request-ID"]
    assert not [line for line in logged.json if "Marked" in line or "bad-secret" in line]


@both
async def test_an_unknown_voice_is_named(mode: str, connect: Connect) -> None:
    """As what the request calls it; so is a model that does not hear."""
    client = await connect(mode)
    voice = {"output": {"voice": "not-exist"}}
    message = await client.messages.create(model=model("openai"), messages="[say Hello.]", voice=voice)
    assert message.metadata is not None
    error = message.metadata["audio_error"]
    assert (error["type"], error["param"]) == ("not_found_error", "voice.output.voice")
    voice = {"input": {"model": "not-exist"}}
    with pytest.raises(vai.NotFoundError) as caught:
        await client.messages.create(model=model("openai"), messages=asks(QUESTION), voice=voice)
    assert caught.value.param == "voice.input.model"


FAILURES: dict[str, tuple[str, str]] = {  # what happens to the speech → type of the error
    r"\[error 500\]": ("provider_error", "[error 500]"),
    r"\[error 429\]": ("rate_limit_error", "[error 429]"),
    r"One. \[error_in_stream\] Two.": ("provider_error", ""),
}


@both
@pytest.mark.parametrize("format", ["pcm", "mp3"])
@pytest.mark.parametrize("said", FAILURES)
async def test_failing_speech_leaves_the_text(said: str, format: str, mode: str, connect: Connect) -> None:
    """The text is whole, one `audio_error` says why; without a stream it stands in `metadata`."""
    client = await connect(mode)
    text = f"Hello. {said} Good bye."
    asked: Any = {"model": model("openai"), "messages": f"[say {text}]", "voice": {"output": {"format": format}}}
    message = await client.messages.create(**asked)
    async with client.messages.stream(**asked) as stream:
        events = [event async for event in stream]
    total = accumulate(events)
    assert total is not None
    for one in (message, total):
        assert (one.text, one.stop_reason) == (text, "end_turn")
        assert one.metadata is not None
        assert one.metadata["audio_error"]["type"] == FAILURES[said][0]
        assert one.metadata["audio_error"]["provider"] == "cartesia"
    assert [type(event) for event in events].count(AudioError) == 1
    assert isinstance(events[-1], MessageStop)


async def test_speech_begins_before_the_text_has_ended(environ: dict[str, str], listen: Listen) -> None:
    """The first sentence is heard while the model still writes."""
    heard = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hear(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")

        def chunk(text: str, **more: Any) -> bytes:
            choice = {"index": 0, "delta": {"content": text}, **more}
            return b"data: %b\n\n" % json.dumps({"id": "1", "model": "m", "choices": [choice]}).encode()

        writer.write(chunk("Hello there, my friend. And"))
        await heard.wait()
        writer.write(chunk(" more.", finish_reason="stop") + b"data: [DONE]\n\n")

    environ = {**environ, "VAI_OPENAI_BASE_URL": await listen(talk)}
    async with asyncio.timeout(8), AsyncClient(engine=vai.Direct(environ=environ)) as client:
        async with client.messages.stream(model="openai/m", messages="Hi", voice=SPEAK) as stream:
            async for event in stream:
                if isinstance(event, AudioDelta):
                    heard.set()
            assert (await stream.final()).text == "Hello there, my friend. And more."
    assert heard.is_set()


@pytest.mark.parametrize(
    "answer",
    [
        "[tool get_weather {}]",
        "```python\nprint(1)\n```",
        "\N{GRINNING FACE}\N{THUMBS UP SIGN}",
        "[think Aloud.] [tool get_weather {}]",
    ],
)
async def test_what_is_not_spoken(answer: str, connect: Connect, sandbox: Sandbox) -> None:
    """Tool calls, thinking, code and emoji are silent: no block, no error, and the service is not asked."""
    client = await connect("direct")
    tools = [{"name": "get_weather", "input_schema": {"type": "object"}}]
    prompt = answer if answer.startswith("[t") else f"[say {answer}]"
    asked: Any = {"model": model("anthropic"), "messages": prompt, "tools": tools, "voice": SPEAK}
    message = await client.messages.create(**asked)
    async with client.messages.stream(**asked) as stream:
        events = [event async for event in stream]
    assert "audio" not in [block.type for block in message.content]
    assert message.metadata is None
    assert not [event for event in events if isinstance(event, (AudioDelta, AudioError))]
    assert not [request for request in sandbox.requests if request.provider == "cartesia"]


@pytest.mark.parametrize("cut", ["break_off", "reset"])
async def test_a_lost_connection_is_not_heard(cut: str, connect: Connect, sandbox: Sandbox) -> None:
    """The speech goes on over another socket, complete."""
    client = await connect("direct")
    said = rf"Hello there. \[{cut}\] How are you? Fine."
    asked: Any = {"model": model("openai"), "messages": f"[say {said}]", "voice": {"output": {"format": "pcm"}}}
    async with client.messages.stream(**asked) as stream:
        final = await stream.final()
    assert final.metadata is None
    assert sound_of(final) == master("Hello there. How are you? Fine.")
    assert len(calls(sandbox, "/tts/websocket")) > 1


async def test_a_pause_ends_a_sentence(environ: dict[str, str]) -> None:
    """What was said before a tool call is spoken while the call is written; words on both sides stay apart."""
    engine = vai.Direct(environ=environ)
    speaker = engine.speech.speaker(VoiceOutput(format="pcm"))
    speaker.feed("Let me see")
    speaker.pause()
    async with asyncio.timeout(8):
        first = await speaker.next()
        assert isinstance(first, AudioDelta)
        speaker.feed("It rains")
        speaker.end()
        pieces = [first.data]
        while isinstance(event := await speaker.next(), AudioDelta):
            pieces.append(event.data)
    assert b"".join(pieces) == master("Let me see It rains")
    assert speaker.block is not None
    assert (speaker.block.transcript or "").split() == ["Let", "me", "see", "It", "rains"]
    await engine.close()


@both
@pytest.mark.parametrize("ending", ["[error_in_stream 529]", "[break_off]"])
async def test_a_model_that_fails_ends_its_voice(ending: str, mode: str, connect: Connect, sandbox: Sandbox) -> None:
    """The stream ends in the model's error, and nothing is spoken any more."""
    client = await connect(mode)
    asked: Any = {"model": model("anthropic"), "messages": f"[say {SAID} {SAID}] {ending}", "voice": SPEAK}
    async with client.messages.stream(**asked) as stream:
        with pytest.raises(vai.Error) as caught:
            await stream.final()
    assert caught.value.status in (502, 503)
    async with asyncio.timeout(8):
        for request in list(sandbox.requests):
            await request.done.wait()


async def test_the_next_model_of_an_alias_hears_as_well(environ: dict[str, str], sandbox: Sandbox) -> None:
    aliases = {"fast": [model("anthropic"), model("openai")]}
    engine = vai.Direct(environ={**environ, "ANTHROPIC_API_KEY": ""}, aliases=aliases)
    async with AsyncClient(engine=engine, max_retries=0) as client:
        message = await client.messages.create(model="fast", messages=asks(QUESTION), voice={**HEAR, **SPEAK})
    assert message.model.startswith("openai/")
    assert "What is two plus two?" in message.text
    assert message.metadata == {"user_transcript": "What is two plus two?"}
    assert sound_of(message)


async def test_no_key_for_speech_is_said_before_the_model_is_asked(connect: Connect, sandbox: Sandbox) -> None:
    client = await connect("direct", CARTESIA_API_KEY="")
    for settings in (SPEAK, HEAR):
        with pytest.raises(vai.AuthenticationError) as caught:
            await client.messages.create(model=model("openai"), messages=asks(QUESTION), voice=settings)
        assert (caught.value.code, caught.value.provider) == ("no_provider_key", "cartesia")
        assert "CARTESIA_API_KEY" in caught.value.message
    assert sandbox.seen == 0


# == Recordings that are heard =========================================================================================


@both
@pytest.mark.parametrize("provider", MODELS)
async def test_recordings_become_text(provider: str, mode: str, connect: Connect, sandbox: Sandbox) -> None:
    """Every model reads what was said; the answer tells what that was, a stream before it begins."""
    client = await connect(mode)
    asked: Any = {"model": model(provider), "messages": asks(QUESTION, text="Quick!"), "voice": HEAR}
    message = await client.messages.create(**asked)
    assert message.metadata == {"user_transcript": "What is two plus two?"}
    sent = json.dumps(sandbox.requests[-1].body)
    assert "What is two plus two?" in sent
    assert "Quick!" in sent
    assert "audio" not in sent
    async with client.messages.stream(**asked) as stream:
        first = await anext(stream)
        final = await stream.final()
    assert first == TranscriptDelta("What is two plus two?")
    assert (final.metadata, final.content) == (message.metadata, message.content)
    assert stream.dropped == message.dropped
    assert len(calls(sandbox, "/stt")) == 1  # what is known is not paid for again


BARE = master("Two words.", 16_000)
HEARD: dict[str, tuple[list[JSON], str | None]] = {  # content of the last turn → transcript
    "several": ([vai.audio(wav(master("One."), 24_000)), vai.audio(wav(master("Two."), 24_000))], "One. Two."),
    "bare": ([vai.audio(BARE, "audio/pcm;rate=16000")], "Two words."),
    "L16": ([vai.audio(BARE, "audio/L16; rate=16000; channels=1")], "Two words."),
    "wrongly named": ([vai.audio(QUESTION, "audio/mpeg")], "What is two plus two?"),
    "written down": ([{**vai.audio(b"RIFF"), "transcript": "By hand."}], "By hand."),
    "no recording": ([vai.text("Only text.")], None),
    "silence beside text": ([vai.audio(wav(silence(0.2, 24_000), 24_000)), vai.text("Hi.")], ""),
}


@pytest.mark.parametrize("case", HEARD)
async def test_what_was_heard(case: str, connect: Connect) -> None:
    content, transcript = HEARD[case]
    client = await connect("direct")
    messages = [{"role": "user", "content": content}]
    message = await client.messages.create(model=model("anthropic"), messages=messages, voice=HEAR)
    assert message.metadata == ({"user_transcript": transcript} if transcript else None)
    if transcript:
        assert transcript in message.text


async def test_many_recordings_have_the_time_of_one_request(environ: dict[str, str], sandbox: Sandbox) -> None:
    recordings = [wav(master(f"[wait 0.3] Recording {n}"), 24_000) for n in range(12)]
    engine = vai.Direct(environ=environ, timeouts=vai.Timeouts(total=0.5))
    async with asyncio.timeout(8), AsyncClient(engine=engine, max_retries=0) as client:
        with pytest.raises(vai.ProviderTimeoutError) as caught:
            await client.messages.create(model=model("openai"), messages=asks(*recordings), voice=HEAR)
    assert caught.value.provider == "cartesia"
    assert not calls(sandbox, "/chat/completions")


async def test_earlier_turns_and_tool_results_are_heard_too(connect: Connect, sandbox: Sandbox) -> None:
    """All recordings become text; only those of the last turn are its transcript. What Anthropic gets else is kept."""
    client = await connect("direct")
    call = vai.tool_use("listen")
    cached = {**vai.audio(QUESTION), "cache_control": {"type": "ephemeral"}}
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [vai.audio(wav(master("Rain."), 24_000))]}
    messages: list[Any] = [
        {"role": "user", "content": [cached]},
        {"role": "assistant", "content": [vai.text("Four."), {"type": "audio", "transcript": "Four."}, call]},
        {"role": "user", "content": [result]},
    ]
    tools = [{"name": "listen", "input_schema": {"type": "object"}}]
    message = await client.messages.create(model=model("anthropic"), messages=messages, tools=tools, voice=HEAR)
    assert message.metadata is None
    body = sandbox.requests[-1].body
    assert body is not None
    first, _, last = body["messages"]
    said = {"type": "text", "text": "What is two plus two?", "cache_control": {"type": "ephemeral"}}
    assert first["content"] == [said]
    assert last["content"][0]["content"] == [{"type": "text", "text": "Rain."}]


@pytest.mark.parametrize("provider", MODELS)
async def test_what_an_assistant_said_is_history(provider: str, connect: Connect, sandbox: Sandbox) -> None:
    """A spoken answer can be sent back as it came, whole or off a stream, to any model; its text stands for it."""
    client = await connect("direct")
    spoken = {"type": "audio", "source": vai.audio(QUESTION)["source"], "transcript": "Only spoken."}
    for content in ([vai.text("Hello."), {"type": "audio", "transcript": "Hello."}], [spoken]):
        history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
        await client.messages.create(model=model(provider), messages=[*history, {"role": "user", "content": "Go on."}])
        sent = json.dumps(sandbox.requests[-1].body)
        assert ("Hello." in sent) == (content[0]["type"] == "text")
        assert sent.count("Hello.") + sent.count("Only spoken.") == 1
        assert "audio" not in sent


@both
@pytest.mark.parametrize(
    ("content", "voice", "param", "code"),
    [
        ([vai.audio(b"Words, not sounds.", "audio/wav")], HEAR, "messages[0].content[0].source.data", "invalid_audio"),
        ([vai.text("x"), vai.audio(wav(b"", 8000))], HEAR, "messages[0].content[1].source.data", "invalid_audio"),
        ([vai.audio(b"\0\0\0", "audio/pcm;rate=16000")], HEAR, "messages[0].content[0].source.data", "invalid_audio"),
        ([vai.audio(b"\0\0", "audio/pcm")], HEAR, "messages[0].content[0].source.media_type", None),
        ([vai.audio(b"AB", "audio/pcm;rate=8000;channels=2")], HEAR, "messages[0].content[0].source.media_type", None),
        ([vai.audio(wav(silence(0.2, 24_000), 24_000))], HEAR, "messages[0].content[0]", "no_speech"),
        ([{"type": "audio", "transcript": "x"}], HEAR, "messages[0].content[0].source", None),
        ([vai.audio(QUESTION)], {"input": {"model": "ink-2"}}, "voice.input.model", "unsupported_feature"),
        ([vai.audio(QUESTION)], {"input": {"language": "klingon"}}, "voice.input.language", None),
        ("Hi", {"output": {"format": "ogg"}}, "voice.output.format", None),
        ("Hi", {"output": {"sample_rate": 11_025}}, "voice.output.sample_rate", None),
        ("Hi", {"output": {"provider": "elsewhere"}}, "voice.output.provider", None),
        ("Hi", {"output": {"speed": 9}}, "voice.output.speed", None),
        ("Hi", {"outputs": {}}, "voice.outputs", None),
        ("Hi", {"output": []}, "voice.output", None),
    ],
)  # fmt: skip
async def test_bad_voice_in_messages(
    content: Any, voice: JSON, param: str, code: str | None, mode: str, connect: Connect, sandbox: Sandbox
) -> None:
    """A 400 that names the place; no model is asked."""
    client = await connect(mode)
    with pytest.raises(InvalidRequestError) as caught:
        await client.messages.create(
            model=model("anthropic"), messages=[{"role": "user", "content": content}], voice=voice
        )
    assert (caught.value.param, caught.value.code) == (param, code)
    assert param in str(caught.value)
    assert not calls(sandbox, "/messages")


async def test_audio_without_voice_is_for_models_that_hear(connect: Connect) -> None:
    client = await connect("direct")
    await client.messages.create(model=model("gemini"), messages=asks(QUESTION))
    with pytest.raises(InvalidRequestError, match=r"voice\.input") as caught:
        await client.messages.create(model=model("anthropic"), messages=asks(QUESTION), voice=SPEAK)
    assert caught.value.code == "unsupported_feature"


# == Runs and conversations ============================================================================================


@vai.tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"rain in {city}"


@both
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_run_is_heard_once_and_spoken_step_by_step(
    streaming: bool, mode: str, connect: Connect, sandbox: Sandbox
) -> None:
    """What each step says is spoken; the history holds text, and other models take it."""
    client = await connect(mode)
    order = '[say Let me see.] [tool get_weather {"city":"Oslo"}] [then] [say It rains.]'
    recording = wav(master("Now."), 24_000)
    asked: Any = {
        "model": model("anthropic"),
        "messages": asks(recording, text=order),
        "tools": [get_weather],
        "voice": {**HEAR, **SPEAK},
    }
    if streaming:
        async with client.messages.run_stream(**asked) as run:
            events = [event async for event in run]
        result = run.result
        assert [event.text for event in events if isinstance(event, TranscriptDelta)] == ["Now."]
        assert any(isinstance(event, AudioDelta) for event in events)
    else:
        result = await client.messages.run(**asked)
    first, second = (step.response for step in result.steps)
    assert sound_of(first) == wav(master("Let me see."), 24_000)
    assert sound_of(second) == wav(master("It rains."), 24_000)
    assert (first.metadata, second.metadata) == ({"user_transcript": "Now."}, None)
    assert len(calls(sandbox, "/stt")) == 1
    assert [block["type"] for block in result.messages[-1]["content"]] == ["text"]
    more = [*result.messages, {"role": "user", "content": "Thanks."}]
    assert (await client.messages.create(model=model("openai"), messages=more, voice=HEAR)).text


async def test_a_conversation_by_voice(connect: Connect) -> None:
    """Spoken and heard, from one provider to the next, and kept as JSON."""
    client = await connect("proxy")
    chat = client.conversation(model=model("anthropic"), voice={**HEAR, **SPEAK})
    assert sound_of(await chat.say([vai.audio(QUESTION)]))
    other = client.load_conversation(json.dumps(chat.dump()))
    other.model = model("gemini")
    async with other.stream("[say Good.]") as answer:
        assert "".join([piece async for piece in answer.text]) == "Good."
        assert answer.message is not None
        assert sound_of(answer.message) == wav(master("Good."), 24_000)


# == Callers that leave ================================================================================================


@pytest.mark.parametrize("way", ["close", "reset"])
@pytest.mark.parametrize("moment", ["speaking", "writing", "listening"])
async def test_a_caller_that_leaves_ends_it_all(moment: str, way: str, gateway: Served, sandbox: Sandbox) -> None:
    """Model, TTS and STT are let go of at once, whatever of them was at work."""
    body = {
        "speaking": body_of("openai", r"[say Hello there. \[hang\] And more.]", stream=True, voice=SPEAK),
        "writing": body_of("openai", "[say Hello there, you. This is it, and more.] [hang]", stream=True, voice=SPEAK),
        "listening": body_of("openai", voice=HEAR, messages=asks(wav(master("[hang]"), 24_000))),
    }[moment]
    async with asyncio.timeout(8):
        async with gateway.raw(post_bytes(body)) as (reader, writer):
            expected = {"speaking": "/tts/websocket", "writing": "/chat/completions", "listening": "/stt"}[moment]
            found = await arrived(sandbox, expected)
            if moment != "listening":
                await reader.readuntil(b"text_delta")
            if way == "reset":
                reset(writer)
        await found.done.wait()
        for request in list(sandbox.requests):
            await request.done.wait()
    assert sandbox.open == 0


@both
async def test_leaving_a_stream_early_says_so_to_the_service(mode: str, connect: Connect, sandbox: Sandbox) -> None:
    """The client's way out of the `with` cancels the context of the speech, and hangs up."""
    client = await connect(mode)
    sandbox.pace = 0.05
    async with asyncio.timeout(8):
        async with client.messages.stream(model=model("openai"), messages=f"[say {SAID}]", voice=SPEAK) as stream:
            async for event in stream:
                if isinstance(event, AudioDelta):
                    break
        (socket,) = calls(sandbox, "/tts/websocket")
        await socket.heard(lambda message: isinstance(message, dict) and message.get("cancel") is True)
        await socket.done.wait()


# == client.audio ======================================================================================================


@both
async def test_transcriptions(mode: str, connect: Connect, tmp_path: Path) -> None:
    """From bytes, a path, or bare samples: text, length, and the times of words."""
    client = await connect(mode)
    heard = await client.audio.transcribe(QUESTION)
    assert isinstance(heard, Transcription)
    assert (heard.text, heard.language) == ("What is two plus two?", "en")
    assert heard.duration_seconds == pytest.approx(len(QUESTION) / 48_000, abs=0.01)
    assert [word.word for word in heard.words] == heard.text.split()
    assert all(0 <= word.start < word.end <= heard.duration_seconds for word in heard.words)
    path = tmp_path / "question.txt"  # what a file is, its bytes say
    path.write_bytes(QUESTION)
    assert await client.audio.transcribe(path) == await client.audio.transcribe(str(path)) == heard
    bare = await client.audio.transcribe(BARE, format="pcm", sample_rate=16_000, timestamps=False, language="de")
    assert (bare.text, bare.words, bare.language) == ("Two words.", [], "de")


@both
@formats
async def test_speech(format: Any, mode: str, connect: Connect, sandbox: Sandbox) -> None:
    """The whole file, byte for byte as the service makes it, at once or in pieces."""
    client = await connect(mode)
    whole = await master_of(sandbox, SPOKEN, format)
    speech = await client.audio.synthesize(SPOKEN, voice="a-voice", format=format)
    assert (speech.audio, speech.format, speech.sample_rate) == (whole, format, 24_000)
    assert speech.duration_seconds == pytest.approx(len(master(SPOKEN)) / 48_000, rel=0.03)
    body = sandbox.requests[-1].body
    assert body is not None
    assert body["voice"] == {"mode": "id", "id": "a-voice"}
    async with client.audio.stream_synthesize(SPOKEN, voice="a-voice", format=format) as stream:
        joined = b"".join([data async for data in stream])
        assert stream.duration == pytest.approx(speech.duration_seconds)
    assert joined == (wav_header(24_000) + whole[44:] if format == "wav" else whole)


async def test_speech_settings(connect: Connect, sandbox: Sandbox) -> None:
    client = await connect("proxy")
    wanted: Any = {"speed": 1.2, "volume": 0.8, "emotion": "calm", "language": "en-GB", "sample_rate": 8000}
    speech = await client.audio.synthesize("Hello.", model="sonic-3", **wanted)
    body = sandbox.requests[-1].body
    assert body is not None
    assert (body["model_id"], body["language"]) == ("sonic-3", "en")
    assert body["generation_config"] == {"speed": 1.2, "volume": 0.8, "emotion": "calm"}
    assert read_wav(speech.audio).sample_rate == 8000


def test_without_await(environ: dict[str, str], tmp_path: Path) -> None:
    """The same from a script, on a thread of its own; what is no argument is a `TypeError`."""

    async def run() -> None:
        async with Sandbox() as sandbox:
            await asyncio.to_thread(speak, sandbox)

    def speak(sandbox: Sandbox) -> None:
        with vai.Client(engine=vai.Direct(environ=sandbox.environ)) as client:
            speech = client.audio.synthesize("Hello, you.")
            assert client.audio.transcribe(speech.audio).text == "Hello, you."
            with client.audio.stream_synthesize("Hello, you.", format="pcm") as stream:
                assert b"".join(stream) == speech.audio[44:]
                assert stream.duration == speech.duration_seconds
            with pytest.raises(RuntimeError, match="inside"):
                next(client.audio.stream_synthesize("Hello."))
            with pytest.raises(TypeError, match="voices"):
                client.audio.synthesize("Hello.", voices="x")  # type: ignore[call-arg]
            with client.messages.stream(model=model("groq"), messages="[say Hi there.]", voice=SPEAK) as answer:
                assert "".join(answer.text) == "Hi there."
                assert sound_of(answer.final()) == wav(master("Hi there."), 24_000)

    asyncio.run(run())


LONG = "This is a sentence. " * 5000
BAD_SPEECH: dict[str, tuple[Any, JSON, str | None, str | None]] = {  # text, options → param, code
    "nothing": ("", {}, "text", None),
    "emoji": ("\N{GRINNING FACE}!?", {}, "text", None),
    "too long": (LONG, {}, "text", "text_too_long"),
    "no text": (7, {}, "text", None),
    "format": ("Hi.", {"format": "ogg"}, "format", None),
    "rate": ("Hi.", {"sample_rate": 12_345}, "sample_rate", None),
    "language": ("Hi.", {"language": "tlh"}, "language", None),
    "service": ("Hi.", {"provider": "elsewhere"}, "provider", None),
    "old model": ("Hi.", {"model": "sonic-2", "speed": 1.1}, "speed", "unsupported_feature"),
    "dead model": ("Hi.", {"model": "sonic-english"}, "model", "model_sunsetted"),
    "unknown voice": ("Hi.", {"voice": "not-exist"}, "voice", None),
    "refused": ("[error 429]", {}, None, None),
    "overloaded": ("[error 503]", {}, None, None),
}


@pytest.mark.parametrize("case", BAD_SPEECH)
async def test_speech_that_cannot_be(case: str, connect: Connect) -> None:
    """The same error in process and through a gateway, whole or streamed, that names what is wrong."""
    text, options, param, code = BAD_SPEECH[case]
    told = []
    for mode in MODES:
        client = await connect(mode)
        with pytest.raises(Error) as caught:
            await client.audio.synthesize(text, **options)
        told.append(caught.value)
        with pytest.raises(Error) as caught:
            async with client.audio.stream_synthesize(text, **options):
                pass
        told.append(caught.value)
    assert len({(type(one), one.message, one.param, one.code, one.provider) for one in told}) == 1
    assert told[0].param == param
    assert code is None or told[0].code == code


@pytest.mark.parametrize("mode", MODES)
async def test_what_may_pass_is_tried_again(mode: str, connect: Connect, sandbox: Sandbox) -> None:
    """A client asks again for speech as it does for messages, and in process not once an answer has begun."""
    client = await connect(mode)
    client._max_retries = 1
    with pytest.raises(vai.RateLimitError):
        await client.audio.synthesize("Hello. [error 429 retry_after=0]")
    assert len(calls(sandbox, "/tts/bytes")) == 2
    if mode == "direct":
        with pytest.raises(vai.ProviderError, match="mid-answer"):
            await client.audio.synthesize("Hello there, all of you. [break_off]", format="mp3")
        assert len(calls(sandbox, "/tts/bytes")) == 3


BAD_RECORDINGS: dict[str, tuple[Any, JSON, str, str | None]] = {
    "nothing": (b"", {}, "audio", "invalid_audio"),
    "words": (b"These are words in a file called .wav, and nothing else.", {}, "audio", "invalid_audio"),
    "no sound": (wav(b"", 8000), {}, "audio", "invalid_audio"),
    "half a sample": (b"\0\0\0", {"format": "pcm", "sample_rate": 8000}, "audio", "invalid_audio"),
    "no rate": (b"\0\0", {"format": "pcm"}, "sample_rate", None),
    "odd rate": (b"\0\0", {"format": "pcm", "sample_rate": 1}, "sample_rate", None),
    "odd rate of a file": (QUESTION, {"sample_rate": -1}, "sample_rate", None),
    "odd format": (b"\0\0", {"format": "aiff"}, "format", None),
    "language": (QUESTION, {"language": "?"}, "language", None),
    "model": (QUESTION, {"model": "ink-2"}, "model", "unsupported_feature"),
    "service": (QUESTION, {"provider": "elsewhere"}, "provider", None),
    "web page": ("https://example.org/a.wav", {}, "audio", None),
}


@pytest.mark.parametrize("case", BAD_RECORDINGS)
async def test_recordings_that_cannot_be_heard(case: str, connect: Connect, sandbox: Sandbox) -> None:
    audio, options, param, code = BAD_RECORDINGS[case]
    told = []
    for mode in MODES:
        client = await connect(mode)
        with pytest.raises(InvalidRequestError) as caught:
            await client.audio.transcribe(audio, **options)
        told.append(caught.value)
    assert [(one.param, one.code, one.message) for one in told] == [(param, code, told[0].message)] * 2
    assert param in told[0].message
    assert sandbox.seen == 0


@both
async def test_half_a_gigabyte(mode: str, connect: Connect, tmp_path: Path) -> None:
    """Is refused by its size, before it is read."""
    client = await connect(mode)
    path = tmp_path / "long.wav"
    with path.open("wb") as file:
        file.truncate(500 << 20)
    with pytest.raises(vai.RequestTooLargeError) as caught:
        await client.audio.transcribe(path)
    assert (caught.value.param, "500 MiB" in caught.value.message) == ("audio", True)
    with pytest.raises(FileNotFoundError):
        await client.audio.transcribe(tmp_path / "none.wav")


async def test_a_fake_model_has_no_voice() -> None:
    """It says so, rather than leave the voice out."""
    async with AsyncClient(engine=vai.FakeModel("Hi."), max_retries=0) as client:
        with pytest.raises(InvalidRequestError) as caught:
            await client.messages.create(model="openai/x", messages="Hi", voice=SPEAK)
    assert (caught.value.param, caught.value.code) == ("voice", "unsupported_feature")


# == POST /v1/audio ====================================================================================================


async def post(gateway: Served, body: Any, /, **options: Any) -> Answer:
    return await gateway.send("POST", "/v1/audio", json=body, **options)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def test_the_three_kinds(gateway: Served) -> None:
    heard = await post(gateway, {"audio": b64(QUESTION)})
    assert heard.body.keys() == {"type", "text", "language", "duration_seconds", "words"}
    assert (heard.body["type"], heard.body["words"][0].keys()) == ("transcription", {"word", "start", "end"})
    assert heard.headers["X-Model"] == "cartesia/ink-whisper"
    spoken = await post(gateway, {"text": "Hello.", "voice": "v"})
    assert spoken.body["type"] == "synthesis"
    assert base64.b64decode(spoken.body["audio"]) == wav(master("Hello."), 24_000)
    assert spoken.body.keys() == {"type", "audio", "format", "sample_rate", "duration_seconds"}
    streamed = (await post(gateway, {"text": "Hello.", "voice": "v", "stream": True, "format": "pcm"})).events
    *chunks, done = streamed
    assert [one["index"] for one in chunks] == list(range(len(chunks)))
    assert b"".join(base64.b64decode(one["data"]) for one in chunks) == master("Hello.")
    assert {(one["type"], one["format"], one["sample_rate"]) for one in chunks} == {("audio_chunk", "pcm", 24_000)}
    assert done == {"type": "done", "duration_seconds": spoken.body["duration_seconds"]}


@pytest.mark.parametrize(
    ("accept", "format", "kind"),
    [
        ("audio/*", "wav", "audio/wav"),
        ("audio/mpeg, */*;q=0.1", "mp3", "audio/mpeg"),
        ("text/html, audio/wav;q=0.5", "pcm", "audio/pcm;rate=24000"),
        ("*/*", "wav", "application/json"),
        ("application/json, audio/*", "wav", "application/json"),
    ],
)
async def test_bare_bytes(accept: str, format: str, kind: str, gateway: Served, sandbox: Sandbox) -> None:
    """`Accept: audio/*` gets the file itself."""
    body = {"text": "Hello.", "voice": "v", "format": format}
    headers = {"Authorization": f"Bearer {KEY}", "Accept": accept}
    async with gateway.http.post(f"{gateway.url}/v1/audio", json=body, headers=headers) as response:
        raw = await response.read()
        assert (response.status, response.headers["Content-Type"].partition("; ch")[0]) == (200, kind)
    assert kind == "application/json" or raw == await master_of(sandbox, "Hello.", format)


def form(*fields: tuple[str, bytes], boundary: str = "xyz", filename: str = "a.wav") -> bytes:
    parts = []
    for name, data in fields:
        more = f'; filename="{filename}"\r\nContent-Type: audio/wav' if name == "file" else ""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


async def post_form(gateway: Served, raw: bytes, kind: str = "multipart/form-data; boundary=xyz") -> Answer:
    return await gateway.send("POST", "/v1/audio", data=raw, headers={"Content-Type": kind})


async def test_forms(gateway: Served) -> None:
    """A file in a form is what base64 in JSON is; other fields are its settings."""
    answer = await post_form(gateway, form(("language", b"de"), ("file", QUESTION), ("timestamps", b"false")))
    assert (answer.body["text"], answer.body["language"], answer.body["words"]) == ("What is two plus two?", "de", [])
    bare = form(("file", BARE), ("format", b"pcm"), ("sample_rate", b"16000"))
    assert (await post_form(gateway, bare, 'multipart/form-data; charset=utf-8; boundary="xyz"')).body["text"]
    misnamed = form(("file", QUESTION), ("format", b"pcm"), ("sample_rate", b"8000"))  # its bytes say what it is
    seconds = (await post_form(gateway, misnamed)).body["duration_seconds"]
    assert seconds == pytest.approx(duration(QUESTION[44:], 24_000), abs=0.001)


@pytest.mark.parametrize(
    "disposition",
    [
        'name="file"; filename="../../x; name=model"',
        'filename="a; name=\\"text\\"; .wav"; name="file"',
        "Name=file; filename=a.wav; filename*=UTF-8''n%61me%3Dx",
        'filename=""; name="file"',
        'x="; name=text" ; name="file"',
    ],
)
async def test_what_a_file_is_called_is_not_read(disposition: str, gateway: Served) -> None:
    """Nothing inside another parameter is the name of a field."""
    raw = b"--xyz\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n--xyz--\r\n" % (disposition.encode(), QUESTION)
    assert (await post_form(gateway, raw)).body["text"] == "What is two plus two?"


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (form(("language", b"de")), "file"),
        (form(("file", QUESTION), ("file", QUESTION)), "file"),
        (form(("file", QUESTION), ("audio", b"UklGRg==")), "file"),
        (form(("file", QUESTION), ("sample_rate", b"many")), "sample_rate"),
        (form(("file", QUESTION), ("sample_rate", b"-1")), "sample_rate"),
        (form(("file", b"Words."), filename="a.wav"), "file"),
        (form(("file", QUESTION), ("timestamps", b"maybe")), "timestamps"),
        (form(("file", QUESTION), ("language", b"\xff")), "language"),
        (form(("file", QUESTION), ("prompt", b"x")), "prompt"),
        (form(("file", QUESTION), ("text", b"x")), "text"),
        (form(("file", b"")), "file"),
        (form(("file", QUESTION))[:-20], None),
        (form(("file", QUESTION), boundary="abc"), None),
        (b"--xyz\r\n\r\nx\r\n--xyz--", None),
        (b'--xyz\r\nContent-Disposition: form-data; %bname="file"\r\n\r\nx\r\n--xyz--' % (b"a=b;" * 2000), None),
        (form(*((f"f{n}", b"") for n in range(40))), None),
        (b"", None),
    ],
)
async def test_bad_forms(raw: bytes, param: str | None, gateway: Served) -> None:
    error = (await post_form(gateway, raw)).error
    assert (error["type"], error.get("param")) == ("invalid_request_error", param)
    assert param or error["code"] == "malformed_form"


@given(st.dictionaries(st.sampled_from(["language", "model", "file"]), st.binary(max_size=80), min_size=1))
def test_any_bytes_survive_a_form(fields: dict[str, bytes]) -> None:
    """What a field holds comes out as it went in; no text and no missing file is an error, never anything else."""
    fields = {name: data for name, data in fields.items() if b"\r\n--xyz" not in b"\r\n" + data}
    try:
        body = server.read_form(form(*fields.items()), server.LimitsSection(), "multipart/form-data; boundary=xyz")
    except InvalidRequestError as fault:
        name = fault.param
        assert name in fields or (name == "file" and "file" not in fields)
    else:
        assert body.pop("audio") == fields.pop("file")
        assert {name: value.encode() for name, value in body.items()} == fields


@given(st.binary(max_size=300))
def test_no_form_is_too_odd(raw: bytes) -> None:
    """Whatever comes is read, or refused as what the caller can mend."""
    for prefix in (b"", b"--xyz\r\n", b'--xyz\r\nContent-Disposition: form-data; name="file"\r\n\r\n'):
        try:
            server.read_form(prefix + raw, server.LimitsSection(), "multipart/form-data; boundary=xyz")
        except InvalidRequestError:
            continue


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "audio", None),
        ({"audio": "UklGR", "language": "en"}, "audio", "invalid_audio"),
        ({"audio": "data:audio/wav;base64," + b64(QUESTION)}, "audio", "invalid_audio"),
        ({"audio": ""}, "audio", "invalid_audio"),
        ({"audio": 7}, "audio", None),
        ({"audio": None, "text": None}, "audio", None),
        ({"audio": b64(QUESTION), "text": "Hi."}, "text", None),
        ({"audio": b64(QUESTION), "stream": True}, "stream", None),
        ({"audio": b64(QUESTION), "timestamps": 1}, "timestamps", None),
        ({"audio": b64(QUESTION), "sample_rate": "16000"}, "sample_rate", None),
        ({"text": "Hi.", "voice": ""}, "voice", None),
        ({"text": "Hi.", "voice": {"id": "v"}}, "voice", None),
        ({"text": "Hi.", "speed": "fast"}, "speed", None),
        ({"text": "Hi.", "model": "a b"}, "model", None),
        ({"text": ["Hi."]}, "text", None),
        ({"text": "Hi.", "output_format": {}}, "output_format", None),
        ({"text": "Hi.", "provider_keys": {"cartesia": 7}}, "provider_keys.cartesia", None),
        ({"text": "Hi.", "provider_keys": {"nobody": "x"}}, "provider_keys", None),
    ],
)
async def test_bad_bodies(body: JSON, param: str, code: str | None, gateway: Served, sandbox: Sandbox) -> None:
    error = (await post(gateway, body)).error
    assert (error["type"], error["param"], error.get("code")) == ("invalid_request_error", param, code)
    assert sandbox.seen == 0


async def test_the_document_tells_of_it(gateway: Served) -> None:
    """Requests and answers have the shapes that `/openapi.json` gives them."""
    document = (await gateway.get("/openapi.json", key=None)).body
    post_audio = document["paths"]["/v1/audio"]["post"]
    asked = post_audio["requestBody"]["content"]["application/json"]["schema"]
    told = post_audio["responses"]["200"]["content"]

    def check(schema: JSON, value: Any) -> None:
        Draft202012Validator(schema | {"components": document["components"]}).validate(value)

    for body in ({"audio": b64(QUESTION), "language": "en"}, {"text": "Hello.", "voice": "v", "speed": 1.1}):
        check(asked, body)
        check(told["application/json"]["schema"], (await post(gateway, body)).body)
    for event in (await post(gateway, {"text": "Hello.", "stream": True})).events:
        check(told["text/event-stream"]["x-event-schema"], event)
    messages = document["paths"]["/v1/messages"]["post"]["responses"]["200"]["content"]
    spoken = {"voice": {**HEAR, **SPEAK}, "messages": asks(QUESTION)}
    check(messages["application/json"]["schema"], (await gateway.ask("openai", **spoken)).body)
    for event in (await gateway.ask("openai", **spoken, stream=True)).events:
        check(messages["text/event-stream"]["x-event-schema"], event)


async def test_limits_and_doors(gateway: Served, serve: Serve) -> None:
    """Size, type, method, key and draining as for messages."""
    small = await serve(limits={"max_body_bytes": 2000})
    assert (await post(small, {"audio": b64(QUESTION)})).status == 413
    assert (await post_form(small, form(("file", QUESTION)))).status == 413
    assert (await post(gateway, {"text": "Hi."}, key="wrong")).status == 401
    assert (await post(gateway, {"text": "Hi."}, key=None)).status == 401
    wrong = await gateway.send("POST", "/v1/audio", data=QUESTION, headers={"Content-Type": "audio/wav"})
    assert (wrong.status, wrong.error["code"]) == (400, "unsupported_media_type")
    form_to_messages = await gateway.send(
        "POST", "/v1/messages", data=form(("file", b"")), headers={"Content-Type": "multipart/form-data; boundary=xyz"}
    )
    assert form_to_messages.error["code"] == "unsupported_media_type"
    got = await gateway.get("/v1/audio")
    assert (got.status, got.headers["Allow"]) == (405, "POST")


@pytest.mark.parametrize("origin", ["https://evil.test", "null", "https://app.test", None])
async def test_a_web_page_sends_no_form_unasked(origin: str | None, serve: Serve, sandbox: Sandbox) -> None:
    """A form needs no preflight: without keys, any page could spend ours on this machine."""
    gateway = await serve(auth={"mode": "none", "keys": []}, cors={"allowed_origins": ["https://app.test"]})
    headers = {"Content-Type": "multipart/form-data; boundary=xyz", **({"Origin": origin} if origin else {})}
    raw = form(("file", QUESTION))
    answer = await gateway.send("POST", "/v1/audio", key=None, data=raw, headers=headers)
    if origin in ("https://app.test", None):
        assert answer.body["text"] == "What is two plus two?"
    else:
        assert (answer.status, answer.error["type"], answer.error["code"]) == (403, "permission_error", "origin")
        assert not sandbox.requests
    page = {"Origin": "https://its-own.test"}  # with a key no page of a stranger gets here
    keyed = await serve()
    assert (await keyed.send("POST", "/v1/audio", data=raw, headers={**headers, **page})).status == 200


async def test_whose_key_pays(environ: dict[str, str], serve: Serve, sandbox: Sandbox) -> None:
    """Header before body before the gateway's own; in passthrough the caller's, for messages one of its own."""
    gateway, bare = await serve(), await serve(environ={**environ, "CARTESIA_API_KEY": ""})
    through = await serve(auth={"mode": "passthrough"})
    header, in_body = {"X-Provider-Key-Cartesia": "of-header"}, {"cartesia": "of-body"}

    async def paid(at: Served, more: JSON = {}, **options: Any) -> str:  # noqa: B006
        answer = await post(at, {"text": "Hi.", "voice": "v", **more}, **options)
        return sandbox.requests[-1].key if answer.status == 200 else answer.error["code"]

    assert await paid(gateway) == environ["CARTESIA_API_KEY"]
    assert await paid(bare) == "no_provider_key"
    assert await paid(bare, {"provider_keys": in_body}) == "of-body"
    assert await paid(gateway, {"provider_keys": in_body}, headers=header) == "of-header"
    assert await paid(through, key="of-caller") == "of-caller"
    assert await paid(through, key="of-caller", headers=header) == "of-header"
    asked = body_of("openai", voice=SPEAK)
    refused = await through.post(asked, key="of-caller")
    assert (refused.status, refused.error["code"]) == (401, "no_provider_key")
    answer = await through.post(asked, key="of-caller", headers=header)
    assert [block["type"] for block in answer.body["content"]] == ["text", "audio"]
    assert {(one.provider, one.key) for one in list(sandbox.requests)[-2:]} == {
        ("openai", "of-caller"),
        ("cartesia", "of-header"),
    }


async def test_a_refused_key_of_ours_is_not_the_callers(environ: dict[str, str], serve: Serve) -> None:
    gateway = await serve(environ={**environ, "CARTESIA_API_KEY": "bad-key-of-the-gateway"})
    own = await post(gateway, {"text": "Hi."})
    assert (own.status, own.error["type"]) == (502, "provider_error")
    callers = await post(gateway, {"text": "Hi."}, headers={"X-Provider-Key-Cartesia": "bad-key-of-the-caller"})
    assert (callers.status, callers.error["provider"]) == (401, "cartesia")
    message = await gateway.ask("openai", voice=SPEAK)
    assert message.body["metadata"]["audio_error"]["type"] == "provider_error"
    for answer in (own, callers, message):
        assert "bad-key" not in answer.raw


@pytest.mark.parametrize("kind", ["message", "stream", "file", "speech", "speech stream"])
async def test_what_was_heard_and_spoken_is_counted(kind: str, gateway: Served, logged: Logged) -> None:
    """In the log by request, in the metrics by service: seconds."""
    expected = {"in": duration(QUESTION[44:], 24_000), "out": duration(master("Hello."), 24_000)}
    if kind in ("message", "stream"):
        asked = asks(QUESTION, text="[say Hello.]")
        answer = await gateway.ask("openai", messages=asked, voice={**HEAR, **SPEAK}, stream=kind == "stream")
    elif kind == "file":
        answer = await post(gateway, {"audio": b64(QUESTION)})
        del expected["out"]
    else:
        answer = await post(gateway, {"text": "Hello.", "stream": kind == "speech stream"})
        del expected["in"]
    assert answer.status == 200
    await gateway.gateway.idle.wait()
    line, text = json.loads(logged.json[-1]), logged.text[-1]
    found = {way: line[f"audio_{way}"] for way in ("in", "out") if f"audio_{way}" in line}
    assert found == pytest.approx(expected, abs=0.006)
    assert all(
        f"{found[way]:.1f} s {done}" in text for way, done in (("in", "heard"), ("out", "spoken")) if way in found
    )
    counted = (await gateway.get("/metrics")).raw
    rows = re.findall(r'(?m)^vai_speech_seconds_total{direction="(\w+)",provider="cartesia"} (\S+)$', counted)
    assert {way: float(seconds) for way, seconds in rows} == pytest.approx(expected, abs=0.001)


async def test_models_that_a_key_may_use(serve: Serve) -> None:
    """A list of models holds for speech as well."""
    keys = [{"key": KEY, "name": "a", "models": ["openai/*", "cartesia/sonic-3.5"]}]
    gateway = await serve(auth={"keys": keys})
    assert (await post(gateway, {"text": "Hi."})).status == 200
    assert (await post(gateway, {"text": "Hi.", "model": "sonic-3"})).error["code"] == "model_not_allowed"
    assert (await post(gateway, {"audio": b64(QUESTION)})).error["code"] == "model_not_allowed"
    assert (await gateway.ask("openai", voice=SPEAK)).status == 200
    assert (await gateway.ask("openai", voice={**SPEAK, **HEAR})).error["code"] == "model_not_allowed"


async def test_an_error_in_mid_speech(gateway: Served) -> None:
    """Ends the events as an `error`; what came before it was told."""
    answer = await post(gateway, {"text": "Hello there, all of you. [break_off] Gone.", "stream": True})
    assert answer.events[0]["type"] == "audio_chunk"
    assert (answer.events[-1]["type"], answer.events[-1]["error"]["type"]) == ("error", "provider_error")
    cut = await post(gateway, {"text": "Hello there. [error 500]", "stream": True})
    assert cut.status == 502


async def test_what_is_listed(gateway: Served, environ: dict[str, str], connect: Connect) -> None:
    """Models that hear and speak, and whether there is a key."""
    listed = {
        "stt": ["cartesia/ink-2", "cartesia/ink-whisper"],
        "tts": ["cartesia/sonic-3.5", "cartesia/sonic-3"],
    }
    assert (await gateway.get("/v1/models")).body["voice"] == listed
    for mode in MODES:
        assert (await (await connect(mode)).models.list()).voice == listed
    assert (await gateway.get("/health", key=None)).body["voice"] == {"cartesia": {"configured": True}}
    without = vai.Direct(environ={**environ, "CARTESIA_API_KEY": ""})
    assert without.speech.available == {"cartesia": False}
    await without.close()


# == Speech cut anywhere ===============================================================================================


@given(st.binary(min_size=2, max_size=200), st.lists(st.integers(1, 40)))
async def test_chunks_cut_anywhere(audio: bytes, cuts: list[int]) -> None:
    """However the wire cuts the events, the audio is complete; an answer that lacks its end is an error."""
    pieces = [audio[at : at + 16] for at in range(0, len(audio), 16)]
    chunks = [server.event_frame("audio_chunk", {"data": b64(piece), "index": n}) for n, piece in enumerate(pieces)]
    raw = b"".join([*chunks, server.event_frame("ping", {}), server.event_frame("done", {"duration_seconds": 1.5})])

    def cut(raw: bytes) -> list[bytes]:
        out, at = [], 0
        for size in [*cuts, len(raw)]:
            out.append(raw[at : at + size])
            at += size
        return [piece for piece in out if piece]

    whole = vai.GatewaySpeech(_played(cut(raw)))
    assert b"".join([event.data async for event in whole]) == audio
    assert whole.duration == 1.5
    broken = vai.GatewaySpeech(_played(cut(raw[: raw.index(b"event: done")])))
    assert b"".join([(await anext(broken)).data for _ in pieces]) == audio
    with pytest.raises(vai.StreamTruncated):
        await anext(broken)


class _Wire(vai._Played):
    async def drain(self) -> None:
        pass


def _played(frames: list[bytes]) -> vai.Upstream:
    return _Wire(frames)


# == The command line ==================================================================================================


async def command(sandbox: Sandbox, *arguments: str, stdin: bytes = b"") -> tuple[int, bytes, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "vai.py"), *arguments),
        env={**os.environ, **sandbox.environ},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await asyncio.wait_for(process.communicate(stdin), 20)
    return process.returncode or 0, out, errors.decode()


async def test_speak_and_transcribe(sandbox: Sandbox, tmp_path: Path) -> None:
    """A text goes into a file, and comes out of it; nothing of progress where there is no terminal."""
    path = tmp_path / "out.wav"
    assert await command(sandbox, "speak", "Hello, **you**.", "-o", str(path)) == (0, b"", "")
    assert path.read_bytes() == wav(master("Hello, you."), 24_000)
    said, heard = await asyncio.gather(
        command(sandbox, "speak", "-o", "-", "--format", "pcm", stdin=b"Hello, you."),
        command(sandbox, "transcribe", str(path), "--json"),
    )
    assert said == (0, master("Hello, you."), "")
    assert (heard[0], json.loads(heard[1])["text"], heard[2]) == (0, "Hello, you.", "")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no terminals of this kind")
async def test_progress_on_a_terminal(sandbox: Sandbox, tmp_path: Path) -> None:
    """A recording that takes long shows a line, which is gone in the end."""
    path = tmp_path / "long.wav"
    path.write_bytes(wav(master("[wait 1]"), 24_000))
    leader, terminal = os.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "vai.py"), "transcribe", str(path)),
        env={**os.environ, **sandbox.environ},
        stdout=asyncio.subprocess.PIPE,
        stderr=terminal,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 20)
    shown = os.read(leader, 4096).decode()
    os.close(leader)
    os.close(terminal)
    assert (process.returncode, out.decode()) == (0, "[wait 1]\n")
    assert f"transcribing {path}" in shown
    assert shown.endswith("\r\x1b[K")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("speak", "!?", "-o", "-"), 2, "text: there is nothing"),
        (("speak", "Hi.", "-o", "/nonexistent/x.wav"), 2, "cannot write"),
        (("transcribe", "/nonexistent.wav"), 2, "cannot read"),
        (("speak", r"\[error 402\]", "-o", "-"), 1, "cartesia"),
    ],
)
async def test_commands_that_fail(
    arguments: tuple[str, ...], code: int, says: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    ended, out, errors = await command(sandbox, *arguments)
    assert (ended, out) == (code, b"")
    assert says in errors
    assert "Traceback" not in errors


# == Real sound ========================================================================================================


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
async def test_a_real_voice(connect: Connect, sandbox: Sandbox) -> None:
    """A sentence is spoken: at its rate, as long as a sentence takes, as loud as speech, and silent between words."""
    sandbox.real_speech = True
    client = await connect("proxy")
    speech = await client.audio.synthesize("The quick brown fox jumps over the lazy dog.", sample_rate=16_000)
    with wave.open(io.BytesIO(speech.audio)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16_000, 1, 2)
        seconds = file.getnframes() / file.getframerate()
    assert 1.5 < seconds < 6
    assert speech.duration_seconds == pytest.approx(seconds)
    pcm = read_wav(speech.audio).pcm
    assert 0.01 < rms(pcm) < 0.5
    frames = [rms(pcm[at : at + 640]) for at in range(0, len(pcm), 640)]
    assert max(frames) > 20 * (min(frames) + 1e-4)
    assert (await client.audio.transcribe(speech.audio)).text == "The quick brown fox jumps over the lazy dog."
