"""Speech: audio as bytes, the encodings of the speech service, and conversations with it, played by the sandbox."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import math
import shutil
import struct
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import aiohttp
import pytest
from aiohttp import web
from conftest import JSON, Listen, Logged, hear, http_answer, websocket_server
from hypothesis import given, settings
from hypothesis import strategies as st

import voice
from providers import Credential, Error, HTTPRequest, InvalidRequestError, Secret, Timeouts, Transport
from sandbox import Sandbox
from sandbox import speech as master
from voice import (
    SPEECH,
    TTS,
    Audio,
    Flushed,
    Recording,
    Resampler,
    Service,
    Sockets,
    Transcript,
    TranscriptBuilder,
    TTSContext,
    TurnEagerEnd,
    TurnEnded,
    TurnResumed,
    TurnStarted,
    Voice,
    VoiceInput,
    VoiceOutput,
    Word,
    WordTimes,
    dbfs,
    decode_pcm,
    duration,
    encode_pcm,
    mono,
    read_recording,
    read_settings,
    read_wav,
    resample,
    rms,
    silence,
    sniff,
    wav,
    wav_header,
)

KEY = "sk_car_0123456789abcdef"
TEXT = "Hello there, this is a test. It works."
CARTESIA = SPEECH["cartesia"]
BASE = "https://api.cartesia.ai"


def sine(hertz: float, rate: int, seconds: float = 0.5, level: float = 0.5) -> bytes:
    count = round(rate * seconds)
    return struct.pack(
        f"<{count}h", *(round(level * 32767 * math.sin(2 * math.pi * hertz * i / rate)) for i in range(count))
    )


def samples(pcm: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(pcm) // 2}h", pcm)


PCM = st.lists(st.integers(-32768, 32767), max_size=300).map(lambda values: struct.pack(f"<{len(values)}h", *values))


# == PCM ===============================================================================================================


def test_loudness() -> None:
    """Full scale is 1 and 0 dB, a sine 3 dB less; silence is -inf, and nothing is silent."""
    square = struct.pack("<4h", -32768, -32768, -32768, -32768)
    assert (rms(square), dbfs(square)) == (1.0, 0.0)
    assert dbfs(sine(440, 16_000, 1, 1.0)) == pytest.approx(-3.01, abs=0.01)
    assert (rms(b""), rms(bytes(10)), dbfs(bytes(10))) == (0.0, 0.0, -math.inf)
    assert rms(square + b"\x01") == 1.0
    assert rms(sine(440, 48_000, 5)) == pytest.approx(0.5 / math.sqrt(2), rel=1e-3)


def test_durations_and_channels() -> None:
    """Seconds follow from bytes, rate and channels; several channels become their mean."""
    assert duration(bytes(32_000), 16_000) == duration(64_000, 16_000, 2) == 1.0
    assert len(silence(0.25, 8000)) == 4000
    assert samples(mono(struct.pack("<6h", 10, 20, -30, 30, 32767, 32767), 2)) == (15, 0, 32767)
    assert mono(b"\1\0\2\0", 1) == b"\1\0\2\0"


@given(PCM)
def test_encodings_without_loss(pcm: bytes) -> None:
    """Floats and wider numbers hold 16 bits exactly."""
    values = samples(pcm)
    assert decode_pcm(encode_pcm(pcm, "pcm_f32le"), "pcm_f32le") == pcm
    assert decode_pcm(struct.pack(f"<{len(values)}d", *(value / 32768 for value in values)), "pcm_f64le") == pcm
    assert decode_pcm(struct.pack(f"<{len(values)}i", *(value << 16 for value in values)), "pcm_s32le") == pcm
    wide = b"".join((value << 8).to_bytes(3, "little", signed=True) for value in values)
    assert decode_pcm(wide, "pcm_s24le") == decode_pcm(wide + b"\1\2", "pcm_s24le") == pcm
    assert encode_pcm(pcm, "pcm_s16le") == decode_pcm(pcm, "pcm_s16le") == pcm


@pytest.mark.parametrize(
    ("encoding", "data", "values"),
    [
        ("pcm_u8", b"\x00\x80\xff", (-32768, 0, 32512)),
        ("pcm_mulaw", b"\xff\x7f\x80\x00\xf0", (0, 0, 32124, -32124, 120)),
        ("pcm_alaw", b"\xd5\x55\xaa\x2a", (8, -8, 32256, -32256)),
        ("pcm_f16le", struct.pack("<3e", 0.5, -1.0, 0.0) + b"\0", (16384, -32768, 0)),
        ("pcm_f32le", struct.pack("<4f", 2.0, -2.0, math.nan, math.inf) + b"\0\0", (32767, -32768, 0, 32767)),
    ],
)
def test_other_encodings(encoding: str, data: bytes, values: tuple[int, ...]) -> None:
    """Values by G.711's tables; what is too loud is clipped, NaN is silence, half a number at the end falls away."""
    assert samples(decode_pcm(data, encoding)) == values


@pytest.mark.parametrize("encoding", ["pcm_mulaw", "pcm_alaw"])
def test_companding(encoding: str) -> None:
    """Every code survives a round trip as its value; a sample comes back within the step of its size."""
    every = decode_pcm(bytes(range(256)), encoding)
    assert decode_pcm(encode_pcm(every, encoding), encoding) == every
    tone = sine(440, 8000, 0.1, 0.9)
    back = decode_pcm(encode_pcm(tone, encoding), encoding)
    assert all(abs(a - b) <= max(16, abs(a) / 16) for a, b in zip(samples(tone), samples(back), strict=True))


def test_unknown_encodings() -> None:
    for function in (decode_pcm, encode_pcm):
        with pytest.raises(ValueError, match="pcm_mulaw"):
            function(b"", "opus")


# == Sound files =======================================================================================================


def riff(shape: bytes, data: bytes, *, size: int | None = None, before: bytes = b"") -> bytes:
    """A WAV file, by hand."""
    head = b"fmt " + struct.pack("<I", len(shape)) + shape + before
    body = head + b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def shaped(code: int, channels: int, rate: int, bits: int) -> bytes:
    width = channels * bits // 8
    return struct.pack("<HHIIHH", code, channels, rate, rate * width, width, bits)


PLAIN = shaped(1, 1, 16_000, 16)
EXTENSIBLE = shaped(0xFFFE, 1, 16_000, 16) + struct.pack("<HHIH", 22, 16, 4, 1) + bytes(14)


@given(PCM, st.sampled_from([8000, 16_000, 44_100, 48_000]), st.sampled_from([1, 2]))
def test_wav_round_trip(pcm: bytes, rate: int, channels: int) -> None:
    """What is written is read again."""
    whole = pcm[: len(pcm) - len(pcm) % (2 * channels)]
    sound = read_wav(wav(whole, rate, channels))
    assert (sound.pcm, sound.sample_rate, sound.channels) == (whole, rate, channels)
    assert sound.duration == duration(whole, rate, channels)


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (riff(PLAIN, b"\1\0\2\0"), (1, 2)),
        (riff(PLAIN, b"\1\0\2\0\3"), (1, 2)),
        (riff(PLAIN, b"\1\0\2\0", size=0xFFFFFFFF), (1, 2)),
        (riff(PLAIN, b"\1\0\2\0", size=0), (1, 2)),
        (riff(PLAIN, b"\1\0\2\0", size=4000), (1, 2)),
        (riff(PLAIN, b"\1\0\2\0" + b"LIST\0\0\0\0", size=4), (1, 2)),
        (riff(PLAIN, b"\1\0", before=b"LIST\3\0\0\0abc\0fact\4\0\0\0\0\0\0\0"), (1,)),
        (riff(EXTENSIBLE, b"\1\0\2\0"), (1, 2)),
        (riff(shaped(1, 1, 8000, 8), b"\x00\x80"), (-32768, 0)),
        (riff(shaped(1, 1, 8000, 24), b"\xff\1\0\xff\2\0"), (1, 2)),
        (riff(shaped(1, 1, 8000, 32), b"\0\0\1\0"), (1,)),
        (riff(shaped(3, 1, 8000, 32), struct.pack("<f", 0.5)), (16384,)),
        (riff(shaped(6, 1, 8000, 8), b"\xd5"), (8,)),
        (riff(shaped(7, 1, 8000, 8), b"\x80"), (32124,)),
        (riff(shaped(1, 3, 8000, 16), struct.pack("<4h", 1, 2, 3, 4)), (1, 2, 3)),
        (wav_header(8000) + b"\5\0", (5,)),
    ],
)
def test_kinds_of_wav(data: bytes, values: tuple[int, ...]) -> None:
    """Depths, floats, companded, extensible, odd and open lengths, chunks in between."""
    assert samples(read_wav(data).pcm) == values


AUDIO_FAULTS: list[tuple[bytes, str | None, int | None, str, str]] = [
    (b"", None, None, "audio", "empty"),
    (b"This is no sound at all.", None, None, "audio", "not a sound file"),
    (b"This is no sound at all.", "wav", None, "audio", "not a sound file"),
    (b"\xff\xfeT\0e\0x\0t\0", None, None, "audio", "not a sound file"),
    (b"RIFF\4\0\0\0AVI ", None, None, "audio", "not a sound file"),
    (b"RIFF\4\0\0\0WAVE", None, None, "audio", "no audio"),
    (riff(PLAIN, b""), None, None, "audio", "no audio"),
    (riff(PLAIN, b"\1"), None, None, "audio", "no audio"),
    (riff(PLAIN[:8], b"\1\0"), None, None, "audio", "cut short"),
    (riff(shaped(2, 1, 8000, 4), b"\1\0"), None, None, "audio", "format 2"),
    (riff(shaped(1, 1, 8000, 20), b"\1\0"), None, None, "audio", "20 bits"),
    (riff(shaped(1, 0, 8000, 16), b"\1\0"), None, None, "audio", "0 channels"),
    (riff(shaped(1, 1, 0, 16), b"\1\0"), None, None, "audio", "0 Hz"),
    (riff(struct.pack("<HHIIHH", 1, 1, 8000, 8000, 7, 16), b"\1\0"), None, None, "audio", "7 bytes"),
    (b"\1\0\2", "pcm", 16_000, "audio", "whole samples"),
    (b"\1\0\2\0", "pcm", None, "sample_rate", "required"),
    (b"\1\0\2\0", "pcm_s16le", 12, "sample_rate", "between"),
    (b"\1\0\2\0", "aiff", None, "format", "unknown format"),
    (b"\1\0\2\0", "mp3", None, "audio", "not a sound file"),
]


@pytest.mark.parametrize(("data", "format", "rate", "param", "message"), AUDIO_FAULTS)
def test_bad_audio(data: bytes, format: str | None, rate: int | None, param: str, message: str) -> None:
    """What is no audio is told, with the field that is at fault, wherever it stands."""
    for place, prefix in (("audio", ""), ("input.audio", "input.")):
        with pytest.raises(InvalidRequestError, match=message) as caught:
            read_recording(data, format, rate, place=place)
        assert caught.value.param == prefix + param
        assert caught.value.message.startswith(prefix + param)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (wav(b"\1\0", 8000), "wav"),
        (b"ID3\4" + bytes(20), "mp3"),
        (b"\xff\xfb\x90\x64" + bytes(20), "mp3"),
        (b"\xff\xf3\x84\xc4" + bytes(20), "mp3"),
        (b"fLaC" + bytes(20), "flac"),
        (b"OggS" + bytes(20), "ogg"),
        (b"\0\0\0\x20ftypM4A ", "m4a"),
        (b"\x1a\x45\xdf\xa3" + bytes(20), "webm"),
        (b"\xff\xff\xff\xff" + bytes(20), None),
        (b"{}", None),
        (b"", None),
    ],
)
def test_sniffing(data: bytes, kind: str | None) -> None:
    """A file is what its bytes say."""
    assert sniff(data) == kind
    if kind:
        assert read_recording(data, "wav").format == kind


def test_recordings_become_plain() -> None:
    """A plain WAV file stays as it is, byte for byte; any other becomes one."""
    plain = wav(b"\1\0\2\0", 16_000)
    assert read_recording(plain) == Recording(plain, "wav")
    stereo = riff(shaped(3, 2, 16_000, 32), struct.pack("<4f", 0.5, 0.25, 0, 0))
    assert read_recording(stereo).data == wav(struct.pack("<2h", 12288, 0), 16_000)
    assert read_recording(wav_header(16_000) + b"\1\0").data == wav(b"\1\0", 16_000)
    assert read_recording(b"\1\2", "audio/pcm", 8000) == Recording(b"\1\2", "pcm", "pcm_s16le", 8000)
    assert read_recording(b"\1", "pcm_mulaw", 8000).encoding == "pcm_mulaw"


# == Resampling ========================================================================================================

RATES = (8000, 16_000, 22_050, 24_000, 44_100, 48_000)


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations((8000, 16_000, 24_000, 44_100), 2)))
def test_resampling(source: int, target: int) -> None:
    """A tone keeps its pitch and loudness, the length is the duration's, and what the rate cannot hold is gone."""
    tone = sine(440, source, 0.2)
    out = resample(tone, source, target)
    assert len(out) // 2 == math.ceil(len(tone) // 2 * target / source)
    middle = slice(target // 50 * 2, target // 50 * 8)
    assert rms(out[middle]) == pytest.approx(rms(tone), rel=0.02)
    wanted = sine(440, target, 0.2)[middle]
    error = [a - b for a, b in zip(samples(out[middle]), samples(wanted), strict=True)]
    assert max(map(abs, error)) < 60
    if target < source:
        high = resample(sine((target + source) / 4, source, 0.2), source, target)
        assert dbfs(high[middle]) < -60


@given(
    PCM, st.lists(st.integers(0, 90), max_size=20), st.sampled_from([(24_000, 16_000), (16_000, 22_050), (8000, 8000)])
)
@settings(deadline=None)
def test_resampling_in_pieces(pcm: bytes, sizes: list[int], rates: tuple[int, int]) -> None:
    """However the audio is cut, in the middle of a sample too, the same comes out."""
    resampler = Resampler(*rates)
    pieces, rest = [], pcm
    for size in sizes:
        pieces.append(resampler.feed(rest[:size]))
        rest = rest[size:]
    out = b"".join([*pieces, resampler.feed(rest), resampler.close()])
    assert out == resample(pcm, *rates)


def test_rates_without_a_common_measure() -> None:
    """Rates that share nothing work as well; impossible ones are refused."""
    assert rms(resample(sine(300, 44_099, 0.2), 44_099, 48_000)[2000:-2000]) == pytest.approx(0.3535, rel=0.03)
    for rates in ((0, 8000), (8000, 10**9)):
        with pytest.raises(ValueError, match="sample rate"):
            Resampler(*rates)


@pytest.mark.parametrize("ours", [False, True])
def test_a_resampler_says_what_is_still_in_it(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`delay` and what has come out make up what went in, soxr's steps of 30 ms included; at the end it is 0."""
    if ours:
        monkeypatch.setattr(voice, "_soxr_filter", lambda source, target: None)
    resampler, out = Resampler(24_000, 16_000), 0
    for number in range(1, 21):
        out += len(resampler.feed(bytes(2 * 480))) // 2
        assert number * 0.02 == pytest.approx(out / 16_000 + resampler.delay)
    resampler.close()
    assert resampler.delay == 0


def test_soxr_where_it_is_installed() -> None:
    """With the extra, the same lengths and the same tone."""
    pytest.importorskip("soxr")
    filter = Resampler(24_000, 16_000)._filter
    assert isinstance(filter, voice._Soxr)


def test_plain_python_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without soxr the filter is our own."""
    monkeypatch.setattr(voice, "_soxr_filter", lambda source, target: None)
    out = resample(sine(440, 24_000, 0.2), 24_000, 16_000)
    assert rms(out[1000:-1000]) == pytest.approx(0.3535, rel=0.01)


# == Settings ==========================================================================================================


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ("loud", "voice"),
        ({"input": {"provider": "nobody"}}, "voice.input.provider"),
        ({"input": {"speed": 1}}, "voice.input.speed"),
        ({"input": {"language": "english"}}, "voice.input.language"),
        ({"input": {"model": "a b"}}, "voice.input.model"),
        ({"output": {"language": "xx"}}, "voice.output.language"),
        ({"output": {"speed": 9.0}}, "voice.output.speed"),
        ({"output": {"speed": "fast"}}, "voice.output.speed"),
        ({"output": {"volume": 0.1}}, "voice.output.volume"),
        ({"output": {"volume": math.nan}}, "voice.output.volume"),
        ({"output": {"sample_rate": 12_345}}, "voice.output.sample_rate"),
        ({"output": {"sample_rate": "24000"}}, "voice.output.sample_rate"),
        ({"output": {"format": "ogg"}}, "voice.output.format"),
        ({"output": {"voice": ""}}, "voice.output.voice"),
        ({"output": {"emotion": "1"}}, "voice.output.emotion"),
        ({"output": {"model": "sonic-2", "emotion": "calm"}}, "voice.output.emotion"),
        ({"outputs": {}}, "voice.outputs"),
    ],
)
def test_bad_settings(given: Any, param: str) -> None:
    """What is wrong with settings is told with its place, in a request or at the top."""
    with pytest.raises(InvalidRequestError) as caught:
        read_settings(Voice, given, "voice")
    assert caught.value.param == param
    assert caught.value.message.startswith(param)


def test_good_settings() -> None:
    """Everything has a default; languages may name a region."""
    both = read_settings(Voice, {"input": {}, "output": {"language": "pt-BR", "speed": 1}}, "voice")
    assert both.input == VoiceInput(provider="cartesia")
    assert both.output == VoiceOutput(language="pt-BR", speed=1.0, format="wav", sample_rate=24_000)
    assert read_settings(VoiceOutput, {"format": "mp3"}).format == "mp3"
    with pytest.raises(InvalidRequestError) as caught:
        read_settings(VoiceOutput, {"sample_rate": 1})
    assert caught.value.param == "sample_rate"


# == Cartesia's wire format ============================================================================================

CREDENTIAL = Credential(Secret(KEY))


def body_of(request: HTTPRequest) -> JSON:
    body: JSON = json.loads(request.body)
    return body


@pytest.mark.parametrize(
    ("given", "path", "expected"),
    [
        ({}, "/tts/bytes", {"output_format": {"container": "raw", "encoding": "pcm_s16le", "sample_rate": 24_000}}),
        ({"format": "pcm", "sample_rate": 8000}, "/tts/bytes",
         {"output_format": {"container": "raw", "encoding": "pcm_s16le", "sample_rate": 8000}}),
        ({"format": "mp3"}, "/tts/bytes",
         {"output_format": {"container": "mp3", "sample_rate": 24_000, "bit_rate": 128_000}}),
        ({"voice": "abc", "model": "sonic-3", "language": "de-CH"}, "/tts/bytes",
         {"voice": {"mode": "id", "id": "abc"}, "model_id": "sonic-3", "language": "de"}),
        ({"speed": 1.2, "volume": 0.5, "emotion": "calm"}, "/tts/bytes",
         {"generation_config": {"speed": 1.2, "volume": 0.5, "emotion": "calm"}}),
    ],
)  # fmt: skip
def test_synthesis_is_encoded(given: JSON, path: str, expected: JSON) -> None:
    """A request for speech, as the service documents it; the key stands in a header, and in no repr."""
    request = CARTESIA.encode_synthesis("Hi.", VoiceOutput(**given), CREDENTIAL, BASE)
    assert (request.method, request.url) == ("POST", BASE + path)
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert request.headers["Cartesia-Version"] == "2026-03-01"
    body = body_of(request)
    assert body["transcript"] == "Hi."
    assert {key: body[key] for key in expected} == expected
    assert body["voice"]["mode"] == "id"
    assert ("generation_config" in body, "language" in body) == ("speed" in given, "language" in given)
    assert KEY not in repr(request)
    timed = CARTESIA.encode_speech("Hi.", VoiceOutput(**given), CREDENTIAL, BASE)
    assert timed.url == BASE + "/tts/sse"
    assert body_of(timed)["add_timestamps"] is True
    assert body_of(timed)["output_format"]["container"] == "raw"


def test_transcription_is_encoded() -> None:
    """A recording goes as a form; what bare samples are stands in the query."""
    request = CARTESIA.encode_transcription(
        Recording(b"RIFF\r\n--", "wav"), VoiceInput(language="de-AT"), CREDENTIAL, BASE
    )
    assert (request.method, request.url) == ("POST", BASE + "/stt")
    kind, _, boundary = request.headers["Content-Type"].partition("; boundary=")
    assert kind == "multipart/form-data"
    parts = request.body.split(f"--{boundary}".encode())
    assert parts[0] == b""
    assert parts[-1] == b"--\r\n"
    assert [part.partition(b"\r\n\r\n")[2][:-2] for part in parts[1:-1]] == [
        b"ink-whisper",
        b"de",
        b"word",
        b"RIFF\r\n--",
    ]
    assert b'name="timestamp_granularities[]"' in parts[3]
    assert b'name="file"; filename="audio.wav"\r\nContent-Type: audio/wav' in parts[4]
    raw = CARTESIA.encode_transcription(
        Recording(b"\x80\xff", "pcm", "pcm_u8", 8000), VoiceInput(), CREDENTIAL, BASE, words=False
    )
    assert raw.url == BASE + "/stt?encoding=pcm_s16le&sample_rate=8000"
    assert b"\r\n\r\n\x00\x00\x00\x7f\r\n--" in raw.body
    assert b"timestamp_granularities" not in raw.body
    mulaw = CARTESIA.encode_transcription(Recording(b"\x80", "pcm", "pcm_mulaw", 8000), VoiceInput(), CREDENTIAL, BASE)
    assert mulaw.url == BASE + "/stt?encoding=pcm_mulaw&sample_rate=8000"
    with pytest.raises(InvalidRequestError, match="ink-whisper") as caught:
        CARTESIA.encode_transcription(Recording(b"", "wav"), VoiceInput(model="ink-2"), CREDENTIAL, BASE)
    assert (caught.value.param, caught.value.code) == ("model", "unsupported_feature")


@pytest.mark.parametrize(
    ("given", "turns", "path", "query"),
    [
        ({}, True, "/stt/turns/websocket", {"model": "ink-2"}),
        ({"language": "en-US"}, False, "/stt/websocket", {"model": "ink-2", "language": "en"}),
        ({"language": "fr"}, False, "/stt/websocket", {"model": "ink-whisper", "language": "fr"}),
        ({"model": "ink-whisper"}, False, "/stt/websocket", {"model": "ink-whisper", "language": "en"}),
    ],
)
def test_streams_are_opened(given: JSON, turns: bool, path: str, query: JSON) -> None:
    """English has a model with turns of its own. No key stands in a URL."""
    input = VoiceInput(**given)
    assert CARTESIA.has_turns(input) == (query["model"] == "ink-2")
    url = CARTESIA.open_stt(input, 16_000, turns, CREDENTIAL, "http://127.0.0.1:1/cartesia").url
    split = urllib.parse.urlsplit(url)
    assert (split.scheme, split.path) == ("ws", f"/cartesia{path}")
    assert dict(urllib.parse.parse_qsl(split.query)) == {"encoding": "pcm_s16le", "sample_rate": "16000", **query}
    assert CARTESIA.open_tts(CREDENTIAL, BASE).url == "wss://api.cartesia.ai/tts/websocket"
    if query["model"] != "ink-2":
        with pytest.raises(InvalidRequestError) as caught:
            CARTESIA.stt(input, 16_000, True)
        assert caught.value.param == "model"


def fed(decoder: Any, *messages: JSON) -> list[Any]:
    return [event for message in messages for event in decoder.feed(json.dumps(message))]


def test_finalized_transcripts_are_decoded() -> None:
    """Final transcripts add up verbatim, interim ones replace each other; unknown messages are ignored."""
    stt = CARTESIA.stt(VoiceInput(), 16_000, False)
    assert (stt.finalize(), stt.finish()) == ("finalize", "close")
    assert [len(frame) for frame in stt.audio(bytes(8000))] == [3200, 3200, 1600]
    events = fed(
        stt,
        {"type": "transcript", "is_final": False, "text": "Ins"},
        {"type": "transcript", "is_final": True, "text": "Insert", "duration": 0.5, "language": "en",
         "words": [{"word": "Insert", "start": 0, "end": 0.4}, {"start": 1}]},
        {"type": "brand_new"},
        {"type": "transcript", "is_final": False, "text": "ing", "request_id": "r"},
        {"type": "flush_done", "request_id": "r"},
    )  # fmt: skip
    builder = TranscriptBuilder()
    for event in events:
        builder.add(event)
    assert events[1] == Transcript("Insert", True, (Word("Insert", 0, 0.4),), "en", 0.5)
    assert (builder.final, builder.text, builder.words) == ("Insert", "Inserting", [Word("Insert", 0, 0.4)])
    assert events[-1] == Flushed()


def test_turns_are_decoded() -> None:
    """A turn's transcript holds all of it; the turns of a conversation are put together with a space."""
    stt = CARTESIA.stt(VoiceInput(), 16_000, True)
    assert (stt.finalize(), json.loads(stt.finish())) == (None, {"type": "close"})
    turn = ["turn.start", "turn.update", "turn.eager_end", "turn.resume", "turn.update", "turn.end"]
    said = ["", "Hi I", "Hi I need", "", "Hi I need to", "Hi I need to go."]
    messages = [{"type": kind, "transcript": text} for kind, text in zip(turn, said, strict=True)]
    events = fed(stt, {"type": "connected"}, *messages)
    assert events == [
        TurnStarted(),
        Transcript("Hi I", False),
        Transcript("Hi I need", False),
        TurnEagerEnd("Hi I need"),
        TurnResumed(),
        Transcript("Hi I need to", False),
        Transcript("Hi I need to go.", True),
        TurnEnded("Hi I need to go."),
    ]
    builder = TranscriptBuilder()
    for event in [*events, TurnStarted(), Transcript("Bye.", True), TurnEnded("Bye.")]:
        builder.add(event)
    assert builder.text == "Hi I need to go. Bye."


def sent(frames: list[str]) -> list[JSON]:
    return [json.loads(frame) for frame in frames]


def test_contexts_are_encoded() -> None:
    """Pieces go verbatim with the same settings; punctuation waits for a letter; the end and a cancel are told."""
    tts = CARTESIA.tts(VoiceOutput(sample_rate=16_000, language="en"))
    assert tts.flush() == tts.say("… ") == tts.say("") == []
    first = sent(tts.say("The road "))[0]
    assert first == {
        "model_id": "sonic-3.5",
        "transcript": "… The road ",
        "voice": {"mode": "id", "id": voice.CARTESIA_VOICE},
        "output_format": {"container": "raw", "encoding": "pcm_s16le", "sample_rate": 16_000},
        "language": "en",
        "add_timestamps": True,
        "use_normalized_timestamps": False,
        "max_buffer_delay_ms": 0,
        "context_id": tts.context_id,
        "continue": True,
    }
    changed = {"transcript", "continue", "flush"}
    for frame, more in (
        (tts.say("…")[0], {"transcript": "…", "continue": True}),
        (tts.flush()[0], {"transcript": "", "continue": True, "flush": True}),
        (tts.end()[0], {"transcript": "", "continue": False}),
    ):
        message = json.loads(frame)
        assert {key: message[key] for key in message.keys() & changed} == more
        assert {k: v for k, v in message.items() if k not in changed} == {
            k: v for k, v in first.items() if k not in changed
        }
    other = CARTESIA.tts(VoiceOutput())
    assert other.cancel() == other.end() == []
    other.say("Hi")
    assert sent(other.cancel()) == [{"context_id": other.context_id, "cancel": True}]


def test_speech_is_decoded() -> None:
    """Chunks become whole samples, times become words; unknown messages are ignored, nonsense is an error."""
    tts = CARTESIA.tts(VoiceOutput(sample_rate=8000))
    tts.say("Hi")
    chunks = [{"type": "chunk", "data": base64.b64encode(data).decode()} for data in (b"\1\2\3", b"\4", b"\5")]
    times = {"type": "timestamps", "word_timestamps": {"words": ["Hi"], "start": [0.0], "end": [0.1]}}
    events = [event for message in (*chunks, times, {"type": "phoneme_timestamps"}) for event in tts.feed(message)]
    assert events == [Audio(b"\1\2"), Audio(b"\3\4"), WordTimes((Word("Hi", 0.0, 0.1),))]
    for nonsense in ({"type": "chunk", "data": "!"}, {"type": "chunk"}, {"type": "timestamps", "word_timestamps": 1}):
        with pytest.raises(Error) as caught:
            tts.feed(nonsense)
        assert caught.value.code == "unreadable_answer"


ERRORS: list[tuple[int, JSON | str, str, str | None, str]] = [
    (400, {"error_code": "bad", "title": "T", "message": "M"}, "invalid_request_error", "bad", "M"),
    (400, {"error_code": "model_not_found", "message": "M"}, "not_found_error", "model_not_found", "M"),
    (400, {"error_code": "model_sunsetted", "message": "M"}, "not_found_error", "model_sunsetted", "M"),
    (401, {"error_code": None, "title": "Title only"}, "authentication_error", None, "Title only"),
    (402, {"message": "Pay"}, "permission_error", "billing", "Pay"),
    (403, {"message": "No"}, "permission_error", None, "No"),
    (404, {"message": "No voice"}, "not_found_error", None, "No voice"),
    (422, {"message": "Wrong"}, "invalid_request_error", None, "Wrong"),
    (429, {"error_code": "concurrency_limited", "message": "Busy"}, "rate_limit_error", "concurrency_limited", "Busy"),
    (500, {"error": "Old form"}, "provider_error", None, "Old form"),
    (503, {}, "overloaded_error", None, "cartesia answered with status 503"),
    (504, {"message": "Late"}, "timeout_error", None, "Late"),
    (400, "Title: Message", "invalid_request_error", None, "cartesia answered with status 400: Title: Message"),
    (500, "<html>no</html>", "provider_error", None, "cartesia answered with status 500"),
]


@pytest.mark.parametrize(("status", "body", "type", "code", "message"), ERRORS)
def test_errors_are_mapped(status: int, body: JSON | str, type: str, code: str | None, message: str) -> None:
    """An error over HTTP is one of ours, whatever the version of the service; so is one in a stream."""
    raw = (body if isinstance(body, str) else json.dumps(body)).encode()
    fault = CARTESIA.decode_error(status, {"retry-after": "7"}, raw, CREDENTIAL)
    assert (fault.type, fault.code, fault.message) == (type, code, message)
    assert (fault.provider, fault.retry_after) == ("cartesia", 7)
    if isinstance(body, dict) and body:
        frame = {"type": "error", "status_code": status, "done": True, **body}
        for feed in (
            lambda: CARTESIA.tts(VoiceOutput()).feed(frame),
            lambda: CARTESIA.stt(VoiceInput(), 16_000, True).feed(json.dumps(frame)),
            lambda: CARTESIA.stt(VoiceInput(), 16_000, False).feed(json.dumps(frame)),
        ):
            with pytest.raises(Error) as caught:
                feed()
            assert (caught.value.type, caught.value.code, caught.value.message) == (type, code, message)


def test_refused_keys() -> None:
    """The caller's own key is theirs to mend; the gateway's is not, and neither is ever shown."""
    echo = json.dumps({"message": f"Bad key {KEY}", "title": KEY}).encode()
    own = CARTESIA.decode_error(401, {}, echo, CREDENTIAL)
    ours = CARTESIA.decode_error(401, {}, echo, Credential(Secret(KEY), own=False))
    assert (own.type, ours.type, ours.code) == ("authentication_error", "provider_error", "provider_authentication")
    assert KEY not in json.dumps([own.to_wire(), ours.to_wire()])


# == Over HTTP =========================================================================================================

Ask: TypeAlias = Callable[..., Service]


@pytest.fixture
async def ask(sandbox: Sandbox) -> AsyncIterator[Ask]:
    """Makes services that the sandbox plays; or whoever is at `base_url`."""
    async with contextlib.AsyncExitStack() as stack:

        def make(key: str = KEY, *, base_url: str = "", own: bool = True, timeouts: Timeouts | None = None) -> Service:
            transport, sockets = Transport(timeouts), Sockets(timeouts)
            stack.push_async_callback(transport.close)
            stack.push_async_callback(sockets.close)
            url = base_url or sandbox.base_urls["cartesia"]
            return Service(CARTESIA, url, Credential(Secret(key), own=own), transport, sockets)

        yield make


@pytest.fixture
def service(ask: Ask) -> Service:
    return ask()


def audio_of(events: list[Any]) -> bytes:
    return b"".join(event.data for event in events if isinstance(event, Audio))


def words_of(events: list[Any]) -> list[Word]:
    return [word for event in events if isinstance(event, WordTimes) for word in event.words]


@pytest.mark.parametrize("rate", RATES)
async def test_speech_is_gapless(service: Service, rate: int) -> None:
    """What comes back is the service's audio, byte for byte: as samples, as a file, and as it comes."""
    expected = master(TEXT, rate)
    pcm = await service.synthesize(TEXT, VoiceOutput(format="pcm", sample_rate=rate))
    assert pcm.audio == expected
    assert pcm.duration_seconds == duration(expected, rate)
    file = await service.synthesize(TEXT, VoiceOutput(sample_rate=rate))
    assert file.audio == wav(expected, rate)
    assert file.to_wire() == {
        "type": "synthesis",
        "audio": base64.b64encode(file.audio).decode(),
        "format": "wav",
        "sample_rate": rate,
        "duration_seconds": file.duration_seconds,
    }
    for words in (True, False):
        async with await service.stream(TEXT, VoiceOutput(sample_rate=rate), words=words) as stream:
            events = [event async for event in stream]
        assert audio_of(events) == wav_header(rate) + expected
        assert stream.duration == pytest.approx(duration(expected, rate))
        assert [word.word for word in words_of(events)] == (TEXT.split() if words else [])


async def test_mp3_passes_through(service: Service, http: aiohttp.ClientSession) -> None:
    """An MP3 file is the service's, byte for byte."""
    settings = VoiceOutput(format="mp3", sample_rate=44_100)
    request = CARTESIA.encode_synthesis(TEXT, settings, service.credential, service.base_url)
    async with http.post(request.url, headers=request.headers, data=request.body) as response:
        expected = await response.read()
    speech = await service.synthesize(TEXT, settings)
    assert (sniff(speech.audio), speech.audio) == ("mp3", expected)
    assert speech.duration_seconds == pytest.approx(duration(master(TEXT, 44_100), 44_100), abs=0.1)


async def test_speech_is_heard(service: Service) -> None:
    """What was spoken is understood, with the times of its words, from a file and from bare samples."""
    speech = await service.synthesize(TEXT, VoiceOutput(sample_rate=16_000))
    heard = await service.transcribe(read_recording(speech.audio), VoiceInput())
    assert (heard.text, heard.language, heard.duration_seconds) == (TEXT, "en", speech.duration_seconds)
    assert [word.word for word in heard.words] == TEXT.split()
    assert heard.to_wire()["words"][0] == {"word": "Hello", "start": 0.0, "end": 0.3}
    raw = await service.transcribe(
        read_recording(speech.audio[44:], "pcm", 16_000), VoiceInput(language="fr"), words=False
    )
    assert (raw.text, raw.language, raw.words) == (TEXT, "fr", [])


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 429, 500, 503, 504])
@pytest.mark.parametrize("own", [True, False])
async def test_errors_over_http(ask: Ask, sandbox: Sandbox, status: int, own: bool) -> None:
    """The same error whether it is spoken or heard, at once or in a stream, and whoever's the key is."""
    service, text = ask(own=own), f"[error {status} retry_after=3] Hi."
    faults = []
    for attempt in (
        service.synthesize(text, VoiceOutput()),
        service.stream(text, VoiceOutput()),
        service.transcribe(Recording(wav(master(f"[error {status} retry_after=3]"), 24_000), "wav"), VoiceInput()),
    ):
        with pytest.raises(Error) as caught:
            await attempt
        faults.append(caught.value)
    assert len({(fault.type, fault.status, fault.code, fault.retry_after) for fault in faults}) == 1
    masked = status in (401, 403) and not own
    assert faults[0].status == (502 if masked else {422: 400, 500: 502}.get(status, status))
    assert faults[0].retry_after == 3
    assert sandbox.open == 0


@pytest.mark.parametrize(
    ("ending", "type", "code"),
    [
        ("break_off", "provider_error", "connection_broken"),
        ("reset", "provider_error", "connection_broken"),
        ("hang", "timeout_error", None),
        ("error_in_stream 503", "overloaded_error", None),
    ],
)
@pytest.mark.parametrize("words", [True, False], ids=["events", "bytes"])
async def test_speech_that_breaks_off(ask: Ask, ending: str, type: str, code: str | None, words: bool) -> None:
    """Half an answer ends in an error, never as if it were whole; the connection is let go of."""
    if ending.startswith("error") and not words:
        return
    service = ask(timeouts=Timeouts(idle=0.3))
    async with await service.stream(f"{TEXT} [{ending}] {TEXT}", VoiceOutput(), words=words) as stream:
        fault = await fault_of(collected(stream))
        assert await fault_of(anext(stream)) is fault
        assert stream.duration > 1 or ending in ("break_off", "reset")  # a broken connection may lose what it held
    assert (fault.type, fault.code, fault.provider) == (type, code, "cartesia")


async def test_an_answer_without_audio(ask: Ask, listen: Listen) -> None:
    """A 200 with nothing in it, or with nonsense, is an error."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await hear(reader)
        assert request
        body = b"data: nonsense\n\n" if "/tts/sse" in request.head else b"[]" if "/stt" in request.head else b""
        writer.write(http_answer(body, "200 OK", "any/type", "Connection: close"))

    service = ask(base_url=await listen(talk))
    heard = service.transcribe(Recording(b"x", "mp3"), VoiceInput())
    for attempt in (service.synthesize("Hi", VoiceOutput()), heard):
        assert (await fault_of(attempt)).code == "unreadable_answer"
    async with await service.stream("Hi", VoiceOutput()) as stream:
        assert (await fault_of(collected(stream))).code == "unreadable_answer"


@pytest.mark.parametrize("text", ["", "   ", "😀🎉", "…?!", "x" * 20_001])
async def test_text_that_cannot_be_spoken(service: Service, sandbox: Sandbox, text: str) -> None:
    """Nothing but emoji, or far too much: told at once, without asking the service."""
    with pytest.raises(InvalidRequestError) as caught:
        await service.synthesize(text, VoiceOutput())
    assert caught.value.param == "text"
    assert sandbox.seen == 0


async def test_a_caller_that_leaves(service: Service, sandbox: Sandbox) -> None:
    """Closing a stream, or cancelling its reader, hangs up on the service."""
    stream = await service.stream(f"[slow 0.05] {TEXT}", VoiceOutput())
    await anext(stream)
    stream.close()
    async with asyncio.timeout(5):
        await (await sandbox.wait_for(1)).closed.wait()
    for number, attempt in enumerate(
        (
            service.synthesize(f"[slow 1] {TEXT}", VoiceOutput()),
            service.synthesize(f"[wait 30] {TEXT}", VoiceOutput()),
            service.transcribe(Recording(wav(master("[wait 30]"), 24_000), "wav"), VoiceInput()),
        ),
        2,
    ):
        task = asyncio.create_task(attempt)
        request = await sandbox.wait_for(number)
        task.cancel()
        async with asyncio.timeout(5):
            await request.closed.wait()
        with pytest.raises(asyncio.CancelledError):
            await task


# == Listening =========================================================================================================


async def collected(events: AsyncIterator[Any]) -> list[Any]:
    async with asyncio.timeout(10):
        return [event async for event in events]


async def listened(service: Service, pcm: bytes = b"", given: VoiceInput | None = None) -> list[Any]:
    """What comes for this audio, without turns, until the service ends it."""
    async with service.listen(given or VoiceInput(), turns=False) as session:
        await session.send(pcm)
        return await collected(session)


async def fault_of(attempt: Awaitable[Any]) -> Error:
    with pytest.raises(Error) as caught:
        await attempt
    return caught.value


def text_of(events: list[Any]) -> str:
    builder = TranscriptBuilder()
    for event in events:
        builder.add(event)
    return builder.text


@pytest.mark.parametrize("size", [1, 999, 3200, 1 << 20])
async def test_listening(service: Service, sandbox: Sandbox, size: int) -> None:
    """Words come as they are said, and are final after `finalize`, however the audio is cut."""
    pcm = master(TEXT, 16_000)[: 25_000 if size == 1 else None]
    async with service.listen(VoiceInput(), turns=False) as session:
        for at in range(0, len(pcm), size):
            await session.send(pcm[at : at + size])
        await session.finalize()
        await session.finish()
        events = await collected(session)
    heard = text_of(events)
    assert heard == (TEXT if size > 1 else "Hello there,")
    assert [event.is_final for event in events if isinstance(event, Transcript)][-1]
    assert Flushed() in events
    request = await sandbox.wait_for(1)
    assert b"".join(frame for frame in request.messages if isinstance(frame, bytes)) == pcm
    assert [frame for frame in request.messages if isinstance(frame, str)] == ["finalize", "close"]
    assert KEY not in request.path
    assert request.key == KEY


async def test_listening_by_turns(service: Service, sandbox: Sandbox) -> None:
    """The service finds where a turn ends; silence in mid-turn may look like it."""
    half = silence(0.5, 16_000)
    pcm = (
        master("I would like", 16_000)
        + half
        + master("some tea.", 16_000)
        + 2 * half
        + master("Bye.", 16_000)
        + 2 * half
    )
    async with service.listen(VoiceInput()) as session:
        assert session.turns
        await session.send(pcm)
        await session.finalize()
        await session.finish()
        events = await collected(session)
    kinds = [type(event) for event in events if not isinstance(event, Transcript)]
    first = [TurnStarted, TurnEagerEnd, TurnResumed, TurnEagerEnd, TurnEnded]
    assert kinds == [*first, TurnStarted, TurnEagerEnd, TurnEnded]
    assert [event for event in events if isinstance(event, TurnEnded)] == [
        TurnEnded("I would like some tea."),
        TurnEnded("Bye."),
    ]
    assert text_of(events) == "I would like some tea. Bye."


async def test_a_turn_that_was_not_over(service: Service) -> None:
    """Where the audio ends in mid-turn, its words are final all the same, and marked."""
    async with service.listen(VoiceInput()) as session:
        await session.send(master("Not yet", 16_000))
        await session.finish()
        events = await collected(session)
    assert events[-2:] == [Transcript("Not yet", True), TurnEnded("Not yet", complete=False)]


@pytest.mark.parametrize("turns", [True, False])
async def test_a_lost_connection_loses_no_word(service: Service, sandbox: Sandbox, turns: bool) -> None:
    """A connection that breaks is made anew, and what no final transcript covers is said again: word for word."""
    before, middle, after = (master(text, 16_000) for text in ("One two.", "Three four", "five six."))
    pause = silence(1, 16_000)
    events: list[Any] = []
    async with service.listen(VoiceInput(), turns=turns) as session, asyncio.timeout(10):
        await session.send(before + pause)
        await session.finalize()
        while not any(isinstance(event, TurnEnded if turns else Flushed) for event in events):
            events.append(await anext(session))
        await session.send(middle)
        while not (isinstance(events[-1], Transcript) and "four" in events[-1].text):
            events.append(await anext(session))
        assert sandbox.drop_sockets() == 1
        await session.send(after + pause)
        events.append(await anext(session))
        await session.finish()
        events += await collected(session)
    assert sandbox.seen == 2
    assert text_of(events) == "One two. Three four five six."
    if turns:
        assert [type(event) for event in events if isinstance(event, (TurnStarted, TurnEnded))] == 2 * [
            TurnStarted,
            TurnEnded,
        ]
    again = (await sandbox.wait_for(2)).messages
    resent = b"".join(frame for frame in again if isinstance(frame, bytes))
    assert resent.endswith(middle + after + pause)
    assert len(resent) <= len(middle + after + pause) + 3200 + 16_000 * turns


async def test_reconnecting_gives_up(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that always hangs up is tried a few times; then its error is told."""
    monkeypatch.setattr(voice, "pause_before", lambda attempt: 0)
    handshakes = 0

    async def hang_up(ws: web.WebSocketResponse) -> None:
        nonlocal handshakes
        handshakes += 1
        assert ws._req is not None
        assert ws._req.transport is not None
        ws._req.transport.abort()

    async with websocket_server(hang_up) as url:
        service = ask(base_url=url)
        assert (await fault_of(listened(service, bytes(3200)))).code == "connection_broken"
        assert handshakes == 1 + voice.ATTEMPTS
        handshakes = 0
        assert (await fault_of(spoken(service, "Hi."))).code == "stream_truncated"
        assert handshakes == 1 + voice.ATTEMPTS


@pytest.mark.parametrize(
    ("given", "said", "type"),
    [
        ({}, "[error 429]", "rate_limit_error"),
        ({"model": "ink-nonexistent"}, "x", "not_found_error"),
        ({"language": "zzz", "model": "ink-2"}, "x", "invalid_request_error"),
    ],
)
async def test_errors_while_listening(service: Service, given: JSON, said: str, type: str) -> None:
    """An error in the stream is told, and not tried again."""
    assert (await fault_of(listened(service, master(said, 16_000), VoiceInput(**given)))).type == type


# == Speaking ==========================================================================================================


async def test_speaking(service: Service, sandbox: Sandbox) -> None:
    """Pieces are spoken as they come, joined verbatim and without a gap, with the times of their words."""
    async with service.speak() as session, session.context(VoiceOutput(sample_rate=16_000)) as context:
        for piece in ("Hello there, ", "this is a test. "):
            await context.say(piece)
        await context.flush()
        await context.say("It works.")
        await context.end()
        events = await collected(context)
    assert audio_of(events) == master(TEXT, 16_000)
    words = words_of(events)
    assert [word.word for word in words] == TEXT.split()
    assert words[-1].end <= duration(master(TEXT, 16_000), 16_000)
    assert sorted(words, key=lambda word: word.start) == words
    flushed = events.index(Flushed(1))
    assert audio_of(events[:flushed]) == master("Hello there, this is a test. ", 16_000)
    request = await sandbox.wait_for(1)
    assert len({message["context_id"] for message in request.messages}) == 1
    assert request.key == KEY
    assert KEY not in json.dumps(request.body)


async def speak(context: TTSContext, *pieces: str) -> list[Any]:
    async with context:
        for piece in pieces:
            await context.say(piece)
        await context.end()
        return await collected(context)


async def spoken(service: Service, *pieces: str) -> list[Any]:
    async with service.speak() as session:
        return await speak(session.context(VoiceOutput()), *pieces)


async def connected(service: Service) -> None:
    async with service.speak() as session:
        await session.connect()


async def test_contexts_share_a_socket(service: Service, sandbox: Sandbox) -> None:
    """Answers that are spoken at the same time do not mix; a socket is used again."""
    sandbox.pace = 0.001
    texts = ["One two three four. ", "Five six seven. ", "Eight nine ten eleven twelve. "]
    async with service.speak() as session:
        await session.connect()
        spoken = await asyncio.gather(*(speak(session.context(VoiceOutput()), text) for text in texts))
        spoken.append(await speak(session.context(VoiceOutput()), TEXT))
    assert [audio_of(events) for events in spoken] == [master(text) for text in (*texts, TEXT)]
    assert sandbox.seen == 1
    assert sandbox.speaking == 0


async def test_punctuation_waits_for_words(service: Service, sandbox: Sandbox) -> None:
    """A context does not begin with mere punctuation; if there is nothing else, nothing is asked."""
    async with service.speak() as session:
        assert await speak(session.context(VoiceOutput()), "…", "?", "!") == []
        assert sandbox.seen == 0
        assert audio_of(await speak(session.context(VoiceOutput()), "… ", "Well", ".")) == master("… Well")


async def test_cancelling(service: Service, sandbox: Sandbox) -> None:
    """A cancel reaches the service, ends the events and leaves the socket for the next answer, which gets its own."""
    sandbox.pace = 0.05
    async with service.speak() as session:
        context = session.context(VoiceOutput())
        await context.say(100 * "On and on. ")
        await anext(context)
        await context.cancel()
        request = await sandbox.wait_for(1)
        async with asyncio.timeout(5):
            told = await request.heard(lambda message: message.get("cancel"))
        assert told == {"context_id": context.tts.context_id, "cancel": True}
        assert await collected(context) == []
        await context.say("ignored")
        sandbox.pace = 0
        assert audio_of(await speak(session.context(VoiceOutput()), TEXT)) == master(TEXT)
    assert sandbox.seen == 1
    async with asyncio.timeout(5):
        await request.done.wait()


async def test_a_speaker_that_leaves(service: Service, sandbox: Sandbox) -> None:
    """A task that is cancelled in mid-speech cancels its context on the way out, and closes the socket."""
    sandbox.pace = 0.05

    async def talk() -> None:
        async with service.speak() as session, session.context(VoiceOutput()) as context:
            await context.say(100 * "On and on. ")
            async for _ in context:
                begun.set()

    begun = asyncio.Event()
    task = asyncio.create_task(talk())
    async with asyncio.timeout(5):
        await begun.wait()
        task.cancel()
        request = await sandbox.wait_for(1)
        await request.heard(lambda message: message.get("cancel"))
        await request.done.wait()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("cut", ["[break_off]", "[reset]"])
async def test_speech_goes_on_after_a_lost_connection(service: Service, sandbox: Sandbox, cut: str) -> None:
    """Where a socket breaks, a new one speaks the words that had not come; their times go on."""
    async with service.speak() as session:
        events = await speak(session.context(VoiceOutput()), "Hello there, this ", f"is a {cut} long test.")
    assert [word.word for word in words_of(events)] == ["Hello", "there,", "this", "is", "a", "long", "test."]
    assert audio_of(events) == master("Hello there, this is a") + master("long test.")
    starts = [word.start for word in words_of(events)]
    assert starts == sorted(starts)
    again = (await sandbox.wait_for(2)).messages
    assert again[0]["transcript"] == f" {cut} long test."


async def test_a_socket_that_died_while_idle(service: Service, sandbox: Sandbox) -> None:
    """The next answer does not notice."""
    async with service.speak() as session:
        assert audio_of(await speak(session.context(VoiceOutput()), TEXT)) == master(TEXT)
        sandbox.drop_sockets()
        await (await sandbox.wait_for(1)).done.wait()
        assert audio_of(await speak(session.context(VoiceOutput()), TEXT)) == master(TEXT)
        assert sandbox.seen == 2


async def test_a_pause_in_mid_answer(service: Service, sandbox: Sandbox) -> None:
    """A model that thinks between two sentences is spoken to the end, though its context may have expired meanwhile."""
    async with service.speak() as session, session.context(VoiceOutput()) as context:
        session.PAUSE_SECONDS = 0  # type: ignore[misc]
        await context.say("First. ")
        events: list[Any] = []
        while not (len(audio_of(events)) >= len(master("First. ")) and words_of(events)):
            events.append(await anext(context))
        await context.say("Second.")
        await context.end()
        events += await collected(context)
    assert audio_of(events) == master("First. ") + master("Second.")
    assert [(word.word, word.start) for word in words_of(events)] == [("First.", 0.0), ("Second.", 0.54)]
    messages = (await sandbox.wait_for(1)).messages
    assert len({message["context_id"] for message in messages}) == 2


def test_a_context_that_the_service_ended() -> None:
    """What is said after the service ended a context goes into a new one; an end by then needs no word."""
    tts = CARTESIA.tts(VoiceOutput())
    first = json.loads(tts.say("First. ")[0])
    assert tts.feed({"type": "done", "context_id": tts.context_id}) == []
    second = json.loads(tts.say("Second.")[0])
    assert second["transcript"] == "Second."
    assert second["context_id"] != first["context_id"]
    assert tts.feed({"type": "done"}) == tts.flush() == tts.end() == []


def tenths(*levels: int) -> bytes:
    """A tenth of a second of each level, at 8 kHz."""
    return b"".join(800 * struct.pack("<h", level) for level in levels)


def chunk(*levels: int) -> JSON:
    return {"type": "chunk", "data": base64.b64encode(tenths(*levels)).decode()}


def times(*rows: tuple[str, float, float]) -> JSON:
    words, starts, ends = zip(*rows, strict=True)
    return {"type": "timestamps", "word_timestamps": {"words": words, "start": starts, "end": ends}}


def resumed(said: str, *messages: JSON) -> tuple[TTS, str]:
    """A context after these messages on a socket that broke, and what is said anew."""
    tts = CARTESIA.tts(VoiceOutput(sample_rate=8000))
    tts.say(said)
    for message in messages:
        tts.feed(message)
    return tts, json.loads(tts.resume()[0])["transcript"]


def test_speech_whose_words_are_not_known_is_spoken_again_and_not_heard_twice() -> None:
    """The words' times had not come: what was heard is left out of what comes again, the rest of a chunk is not."""
    tts, again = resumed("One two", chunk(1, 2, 3, 4))
    assert again == "One two"
    assert tts.feed(chunk(1, 2)) == []
    assert audio_of(tts.feed(chunk(3, 4, 5, 6))) == tenths(5, 6)
    assert audio_of(tts.feed(chunk(7))) == tenths(7)
    words = ("One", 0.0, 0.3), ("two", 0.3, 0.7)
    assert words_of(tts.feed(times(*words))) == [Word(*word) for word in words]


def test_a_phrase_whose_words_are_not_known_yet() -> None:
    """Those of the one before it are: the pause between them is no part of what comes again."""
    tts, again = resumed("One. Two three", times(("One.", 0.0, 0.2)), chunk(*range(10)))
    assert again == " Two three"
    assert audio_of(tts.feed(chunk(*range(100, 110)))) == tenths(*range(104, 110))
    (two,) = words_of(tts.feed(times(("Two", 0.0, 0.2))))
    assert (two.start, two.end) == pytest.approx((0.6, 0.8))


def test_speech_of_which_all_has_come_leaves_nothing_out() -> None:
    tts = CARTESIA.tts(VoiceOutput(sample_rate=8000))
    tts.say("One. ")
    tts.feed(times(("One.", 0.0, 0.2)))
    tts.feed(chunk(*range(10)))
    assert tts.resume() == []
    assert json.loads(tts.say("Two")[0])["transcript"].strip() == "Two"
    assert audio_of(tts.feed(chunk(1, 2))) == tenths(1, 2)


@pytest.mark.parametrize(
    ("text", "type", "code"),
    [
        ("Hi [error 429 code=concurrency_limited] there", "rate_limit_error", "concurrency_limited"),
        ("Hi [error 500] there", "provider_error", None),
        ("[hang] Hi", "timeout_error", None),
    ],
)
async def test_errors_while_speaking(ask: Ask, text: str, type: str, code: str | None) -> None:
    """An error ends its own context, not the others."""
    service = ask(timeouts=Timeouts(idle=0.3))
    async with service.speak() as session:
        with pytest.raises(Error) as caught:
            await speak(session.context(VoiceOutput()), text)
        assert (caught.value.type, caught.value.code) == (type, code)
        assert audio_of(await speak(session.context(VoiceOutput()), TEXT)) == master(TEXT)


async def test_too_many_answers(service: Service, sandbox: Sandbox) -> None:
    """The service's limit of contexts is its error, for the one that was too many."""
    sandbox.most_contexts, sandbox.pace = 1, 0.01
    async with service.speak() as session, session.context(VoiceOutput()) as first:
        await first.say(TEXT)
        await anext(first)
        with pytest.raises(Error) as caught:
            await speak(session.context(VoiceOutput()), "Too many.")
        assert (caught.value.type, caught.value.code) == ("rate_limit_error", "concurrency_limited")
        await first.end()
        await collected(first)


async def test_speech_that_nobody_reads(service: Service) -> None:
    """Audio for a context that is not read while another is does not pile up without end."""
    async with service.speak() as session:
        session.MOST_UNREAD = 50_000  # type: ignore[misc]
        async with session.context(VoiceOutput()) as deaf:
            await deaf.say(20 * TEXT)
            assert audio_of(await speak(session.context(VoiceOutput()), 30 * TEXT))
            with pytest.raises(Error) as caught:
                await collected(deaf)
    assert caught.value.code == "speech_unread"


# == Sockets ===========================================================================================================


@pytest.mark.parametrize("open", ["listen", "speak"])
async def test_refused_handshakes(ask: Ask, sandbox: Sandbox, logged: Logged, open: str) -> None:
    """A refusal says what the service says, and whose key it was; the key shows nowhere."""
    secret = "bad-key-0123456789"
    for own, type in ((True, "authentication_error"), (False, "provider_error")):
        service = ask(secret, own=own)
        fault = await fault_of(listened(service) if open == "listen" else connected(service))
        assert fault.type == type
        assert "Invalid API key." in fault.message
        shown = [repr(service), repr(fault), str(fault.to_wire()), str(fault.__cause__), *logged.text]
        assert secret not in "".join(shown)
        assert fault.__suppress_context__


async def test_handshakes_that_go_wrong(ask: Ask, listen: Listen) -> None:
    """A redirect is not followed, a refusal without a reason is still one, silence has an end."""
    answers = {
        "redirect": b"HTTP/1.1 307 X\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n",
        None: b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n",
        "connection_broken": b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    }
    for code, raw in answers.items():

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, raw: bytes = raw) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(raw)

        fault = await fault_of(connected(ask(base_url=await listen(talk))))
        assert (fault.code, fault.status) == (code, 502 if code else 503)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    slow = ask(base_url=await listen(silent), timeouts=Timeouts(connect=0.2))
    assert (await fault_of(connected(slow))).type == "timeout_error"
    assert (await fault_of(connected(ask(base_url="http://127.0.0.1:9")))).code == "connection_failed"


@pytest.mark.parametrize(
    "frame", ["nonsense", "[]", '{"type":"transcript"}', '{"type":"error","status_code":403,"message":"No."}']
)
async def test_nonsense_from_the_service(ask: Ask, frame: str) -> None:
    """What the service should not say is an error, or ignored; it never hangs."""

    async def talk(ws: web.WebSocketResponse) -> None:
        async for _ in ws:
            await ws.send_str(frame)

    async with websocket_server(talk) as url:
        service = ask(base_url=url, timeouts=Timeouts(idle=0.3))
        assert (await fault_of(listened(service, bytes(320)))).status == (403 if "403" in frame else 502)
        assert (await fault_of(spoken(service, "Hi."))).status in (403, 502, 504)


async def test_a_key_in_an_error_is_not_shown(ask: Ask) -> None:
    """A refusal in the middle of a conversation, which repeats the key, is masked like any other."""
    refusal = {"type": "error", "status_code": 401, "title": KEY, "message": f"The key {KEY} has been revoked."}

    async def talk(ws: web.WebSocketResponse) -> None:
        async for frame in ws:
            context = json.loads(frame.data)["context_id"] if frame.type == aiohttp.WSMsgType.TEXT else None
            await ws.send_json({**refusal, "context_id": context})

    async with websocket_server(talk) as url:
        service = ask(base_url=url, own=False)
        for attempt in (listened(service, bytes(320)), spoken(service, "Hi.")):
            fault = await fault_of(attempt)
            assert (fault.status, fault.code) == (502, "provider_authentication")
            assert KEY not in str(fault.to_wire()) + repr(fault)


async def test_a_reader_that_loses_patience(service: Service, sandbox: Sandbox) -> None:
    """Giving up on the next event, and asking again, loses nothing, not even while connections break."""
    sandbox.pace = 0.002

    async def hasty(events: AsyncIterator[Any]) -> list[Any]:
        got, patience = [], 0.005
        while True:
            try:
                async with asyncio.timeout(patience):
                    got.append(await anext(events))
            except TimeoutError:
                patience *= 1.2  # however slow the machine, it gets there
            except StopAsyncIteration:
                return got

    async with service.speak() as session, session.context(VoiceOutput()) as context, asyncio.timeout(20):
        await context.say("One two three [break_off] four five.")
        await context.end()
        events = await hasty(context)
    assert [word.word for word in words_of(events)] == ["One", "two", "three", "four", "five."]
    assert audio_of(events) == master("One two three") + master("four five.")
    async with service.listen(VoiceInput(), turns=False) as hearing, asyncio.timeout(20):
        await hearing.send(master("One two three [break_off] four five.", 16_000))
        await hearing.finish()
        assert text_of(await hasty(hearing)) == "One two three [break_off] four five."


async def test_a_policy_is_not_argued_with(ask: Ask) -> None:
    """A close code that says no is not answered with another attempt."""
    handshakes = 0

    async def refuse(ws: web.WebSocketResponse) -> None:
        nonlocal handshakes
        handshakes += 1
        await ws.close(code=1008)

    async with websocket_server(refuse) as url:
        fault = await fault_of(listened(ask(base_url=url)))
    assert (fault.code, handshakes) == ("connection_refused", 1)


async def test_sockets_are_closed(ask: Ask) -> None:
    """After the end nothing can be opened, said or sent."""
    service = ask()
    async with service.listen(VoiceInput()) as session:
        await session.finish()
        await session.finish()
        with pytest.raises(RuntimeError):
            await session.send(b"\0\0")
    async with service.speak() as speaking:
        pass
    with pytest.raises(RuntimeError):
        await speaking.connect()
    await service.sockets.close()
    with pytest.raises(RuntimeError):
        await service.speak().connect()


# == The sandbox as the service ========================================================================================


async def post(http: aiohttp.ClientSession, url: str, **options: Any) -> tuple[int, bytes]:
    headers = {"X-API-Key": KEY, "Cartesia-Version": "2026-03-01", **options.pop("headers", {})}
    async with http.post(url, headers=headers, **options) as response:
        return response.status, await response.read()


SPOKEN: JSON = {
    "model_id": "sonic-3.5",
    "transcript": TEXT,
    "voice": {"mode": "id", "id": "any"},
    "output_format": {"container": "raw", "encoding": "pcm_s16le", "sample_rate": 16_000},
}


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 200),
        ({"transcript": "?!"}, 400),
        ({"transcript": None}, 422),
        ({"voice": "any"}, 422),
        ({"voice": {"mode": "embedding", "embedding": []}}, 422),
        ({"voice": {"mode": "id", "id": "not-exist"}}, 404),
        ({"model_id": "sonic-english"}, 400),
        ({"model_id": "tts-1"}, 400),
        ({"language": "tlh"}, 400),
        ({"speaker": "x"}, 422),
        ({"output_format": {"container": "raw", "encoding": "pcm_s16le", "sample_rate": 11_025}}, 400),
        ({"output_format": {"container": "raw", "encoding": "opus", "sample_rate": 8000}}, 400),
        ({"output_format": {"container": "mp3", "sample_rate": 8000}}, 422),
        ({"output_format": {"container": "mp3", "sample_rate": 8000, "bit_rate": 1}}, 400),
        ({"generation_config": {"speed": 3.0}}, 400),
    ],
)
async def test_the_sandbox_is_strict(sandbox: Sandbox, http: aiohttp.ClientSession, change: JSON, status: int) -> None:
    """It refuses what the service refuses, and says the same to the same request."""
    url = sandbox.base_urls["cartesia"] + "/tts/bytes"
    first = await post(http, url, json=SPOKEN | change)
    assert first[0] == status
    assert await post(http, url, json=SPOKEN | change) == first
    assert status == 200 or {"error_code", "title", "message", "request_id"} <= json.loads(first[1]).keys()


async def test_the_sandbox_and_versions(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    """Errors of old versions are text; no version, no key or a key in the URL is refused."""
    url = sandbox.base_urls["cartesia"] + "/tts/bytes"
    old = {"Cartesia-Version": "2025-04-16"}
    assert await post(http, url, json=SPOKEN, headers=old) == (200, master(TEXT, 16_000))
    status, text = await post(http, url, json=SPOKEN | {"model_id": "x"}, headers=old)
    assert (status, text[:12]) == (400, b"Bad request:")
    for headers, query in (({"Cartesia-Version": "2020-01-01"}, ""), ({"X-API-Key": ""}, ""), ({}, "?api_key=k")):
        assert (await post(http, url + query, json=SPOKEN, headers=headers))[0] in (400, 401)


@pytest.mark.parametrize("encoding", ["pcm_f32le", "pcm_mulaw", "pcm_alaw"])
async def test_the_sandbox_speaks_other_encodings(sandbox: Sandbox, http: aiohttp.ClientSession, encoding: str) -> None:
    """Its files agree with our reading of them."""
    form = {"container": "wav", "encoding": encoding, "sample_rate": 8000}
    _, data = await post(http, sandbox.base_urls["cartesia"] + "/tts/bytes", json=SPOKEN | {"output_format": form})
    sound, expected = read_wav(data), master(TEXT, 8000)
    assert (sound.sample_rate, len(sound.pcm)) == (8000, len(expected))
    differences = (abs(a - b) / max(abs(a), 256) for a, b in zip(samples(expected), samples(sound.pcm), strict=True))
    assert max(differences) <= (0 if encoding == "pcm_f32le" else 0.1)


async def test_the_sandbox_hears_what_it_is_told(service: Service, sandbox: Sandbox) -> None:
    """In recordings without words of its own it hears those that the test gives it, else a pangram."""
    noise = sine(300, 16_000, 1.5)
    sandbox.transcripts += ["alpha beta gamma", "delta epsilon"]
    recording = read_recording(wav(noise, 16_000))
    assert (await service.transcribe(recording, VoiceInput())).text == "alpha beta gamma"
    assert (await service.transcribe(read_recording(b"OggS" + bytes(16_000)), VoiceInput())).text == "delta epsilon"
    assert (await service.transcribe(recording, VoiceInput())).text == "the quick brown fox jumps"
    assert (await service.transcribe(read_recording(wav(silence(1, 16_000), 16_000)), VoiceInput())).text == ""


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
async def test_real_speech(service: Service, sandbox: Sandbox) -> None:
    """With espeak-ng a sentence is really spoken: of a length and loudness that speech has, and understood again."""
    sandbox.real_speech = True
    speech = await service.synthesize(TEXT, VoiceOutput(sample_rate=16_000))
    sound = read_wav(speech.audio)
    assert (sound.sample_rate, sound.channels) == (16_000, 1)
    assert 1.5 < sound.duration < 6
    assert -35 < dbfs(sound.pcm) < -5
    assert sound.pcm != master(TEXT, 16_000)
    assert (await service.transcribe(read_recording(speech.audio), VoiceInput())).text == TEXT


def test_the_sandbox_is_audible() -> None:
    """Speech of the sandbox sounds: words are loud, pauses silent."""
    pcm = master("Hello there.", 16_000)
    assert dbfs(pcm[1600:8000]) > -20
    assert dbfs(pcm[-3200:]) == -math.inf
