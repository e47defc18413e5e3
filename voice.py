"""Speech: audio as plain bytes, text fit to be read aloud, and speech services behind one API.

    service = Service(SPEECH["cartesia"], base_url, credential, transport, sockets)
    heard = await service.transcribe(read_recording(data), VoiceInput())        # heard.text, heard.words
    speech = await service.synthesize("Hello there.", VoiceOutput(format="wav"))  # speech.audio

    async with service.speak() as session, session.context(VoiceOutput()) as context:   # speech as the text is written
        await context.say("Hello there. ")
        await context.end()
        async for event in context: ...                                         # Audio, WordTimes

    async with service.listen(VoiceInput(), sample_rate=16_000) as session:     # text as the audio comes in
        await session.send(pcm)
        async for event in session: ...                                         # Transcript, TurnEnded, …

Audio is `bytes`: PCM, 16-bit signed little-endian, one channel, unless said otherwise. Times are seconds.

A speech service is a row in `SPEECH`; its adapter is pure translation, data in and data out, as those of providers.py
are. Only the sections from "sockets" on do I/O. Needs providers.py beside it, pydantic and aiohttp;
`soxr` (extra `voice`) makes resampling faster.

Contents (`grep -n '^# == '` lists the sections):
    PCM · sound files · resampling · speakable text · sentences · settings · requests · events · adapters · Cartesia ·
    registry · sockets · sessions · speech in messages · services
"""

from __future__ import annotations

import array
import asyncio
import base64
import binascii
import bisect
import collections
import contextlib
import contextvars
import functools
import hashlib
import html
import itertools
import logging
import math
import operator
import random
import re
import secrets
import struct
import sys
import unicodedata
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar
from urllib.parse import quote, urlencode

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING or not __package__:
    import providers
    from providers import (
        JSON,
        APIError,
        AudioDelta,
        AudioError,
        AuthenticationError,
        Credential,
        Error,
        HTTPRequest,
        InvalidRequestError,
        Media,
        MessageRequest,
        ProviderError,
        ProviderTimeoutError,
        RequestTooLargeError,
        Secret,
        SSEDecoder,
        StreamTruncated,
        Timeouts,
        Transport,
        Upstream,
    )
else:
    from . import providers
    from .providers import (
        JSON,
        APIError,
        AudioDelta,
        AudioError,
        AuthenticationError,
        Credential,
        Error,
        HTTPRequest,
        InvalidRequestError,
        Media,
        MessageRequest,
        ProviderError,
        ProviderTimeoutError,
        RequestTooLargeError,
        Secret,
        SSEDecoder,
        StreamTruncated,
        Timeouts,
        Transport,
        Upstream,
    )

if TYPE_CHECKING:
    import aiohttp

__version__ = "0.1.0"
if getattr(providers, "__version__", None) != __version__:
    found = getattr(providers, "__version__", "unknown")
    raise ImportError(f"voice {__version__} needs its own providers.py; version {found} is at {providers.__file__}")

__all__ = [
    "SPEECH",
    "STT",
    "TTS",
    "Audio",
    "Cartesia",
    "CartesiaSTT",
    "CartesiaTTS",
    "Done",
    "Flushed",
    "Recording",
    "Resampler",
    "STTEvent",
    "STTSession",
    "Sentences",
    "Service",
    "Services",
    "Sockets",
    "Sound",
    "Speakable",
    "Speaker",
    "Speech",
    "SpeechAdapter",
    "SpeechStream",
    "SpokenParts",
    "SynthesisRequest",
    "TTSContext",
    "TTSEvent",
    "TTSSession",
    "Transcript",
    "TranscriptBuilder",
    "Transcription",
    "TranscriptionRequest",
    "TurnEagerEnd",
    "TurnEnded",
    "TurnResumed",
    "TurnStarted",
    "Voice",
    "VoiceInput",
    "VoiceOutput",
    "Word",
    "WordTimes",
    "check_size",
    "check_text",
    "dbfs",
    "decode_pcm",
    "duration",
    "encode_pcm",
    "model_of",
    "mono",
    "read_audio_request",
    "read_recording",
    "read_settings",
    "read_wav",
    "resample",
    "rms",
    "silence",
    "sniff",
    "speakable",
    "wav",
    "wav_header",
]

logger = logging.getLogger("vai.voice")


def _split(text: str) -> frozenset[str]:
    return frozenset(text.split())


# == PCM ===============================================================================================================


def _samples(kind: str, data: bytes) -> array.array[Any]:
    """Little-endian numbers of this `array` type code; what is left of a number at the end falls away."""
    out = array.array(kind)
    out.frombytes(data[: len(data) - len(data) % out.itemsize])
    if sys.byteorder == "big":
        out.byteswap()
    return out


def _packed(kind: str, values: Iterable[Any]) -> bytes:
    out = array.array(kind, values)
    if sys.byteorder == "big":
        out.byteswap()
    return out.tobytes()


def rms(pcm: bytes) -> float:
    """How loud: the root mean square, 0 to 1, where 1 is a square wave at full scale. Silence and nothing are 0."""
    samples = _samples("h", pcm)
    if not samples:
        return 0.0
    total = math.hypot(*(math.hypot(*samples[at : at + 8192]) for at in range(0, len(samples), 8192)))
    return total / math.sqrt(len(samples)) / 32768


def dbfs(pcm: bytes) -> float:
    """The same in decibels: 0 at full scale, -inf for silence. A full-scale sine is at -3.01."""
    level = rms(pcm)
    return 20 * math.log10(level) if level else -math.inf


def duration(pcm: bytes | int, sample_rate: int, channels: int = 1) -> float:
    """Seconds of 16-bit audio; `pcm` may be its number of bytes."""
    return (pcm if isinstance(pcm, int) else len(pcm)) / (2 * channels * sample_rate)


def silence(seconds: float, sample_rate: int) -> bytes:
    return bytes(2 * round(seconds * sample_rate))


def mono(pcm: bytes, channels: int) -> bytes:
    """The mean of interleaved channels."""
    if channels == 1:
        return pcm
    samples = _samples("h", pcm)
    return _packed("h", (sum(frame) // channels for frame in zip(*[iter(samples)] * channels, strict=False)))


def _from_floats(values: Iterable[float]) -> bytes:
    scaled = (0.0 if math.isnan(value) else value * 32768 for value in values)
    return _packed("h", (round(max(-32768.0, min(32767.0, value))) for value in scaled))


def _from_u8(data: bytes) -> bytes:
    out = bytearray(2 * len(data))
    out[1::2] = data.translate(bytes(value ^ 0x80 for value in range(256)))
    return bytes(out)


def _from_wide(data: bytes, width: int) -> bytes:
    """The two upper bytes of each number of three or four."""
    data = data[: len(data) - len(data) % width]
    out = bytearray(len(data) // width * 2)
    out[0::2], out[1::2] = data[width - 2 :: width], data[width - 1 :: width]
    return bytes(out)


def _ulaw_value(code: int) -> int:
    code = ~code & 0xFF
    size = (((code & 0x0F) << 3) + 0x84 << ((code & 0x70) >> 4)) - 0x84
    return -size if code & 0x80 else size


def _alaw_value(code: int) -> int:
    code ^= 0x55
    size, segment = ((code & 0x0F) << 4) + 8, (code & 0x70) >> 4
    size = size + 0x100 << segment - 1 if segment else size
    return size if code & 0x80 else -size


_G711 = {"pcm_mulaw": _ulaw_value, "pcm_alaw": _alaw_value}


@functools.cache
def _expansion(encoding: str) -> tuple[int, ...]:
    """G.711: the 256 values of a code."""
    return tuple(map(_G711[encoding], range(256)))


@functools.cache
def _compression(encoding: str) -> bytes:
    """G.711: the code of each of the 65536 samples, read as unsigned: that of the nearest value."""
    codes = sorted((value, code) for code, value in enumerate(_expansion(encoding)))
    middles = [(low + high) / 2 for (low, _), (high, _) in itertools.pairwise(codes)]
    signed = ((sample ^ 0x8000) - 0x8000 for sample in range(65536))
    return bytes(codes[bisect.bisect_left(middles, sample)][1] for sample in signed)


_ENCODINGS: dict[str, int] = {  # name → bytes a sample
    "pcm_s16le": 2,
    "pcm_s32le": 4,
    "pcm_s24le": 3,
    "pcm_u8": 1,
    "pcm_f16le": 2,
    "pcm_f32le": 4,
    "pcm_f64le": 8,
    "pcm_mulaw": 1,
    "pcm_alaw": 1,
}


def decode_pcm(data: bytes, encoding: str) -> bytes:
    """16-bit PCM of samples in another encoding. Out-of-range floats are clipped, NaN is silence.

    Encodings: pcm_s16le, pcm_s24le, pcm_s32le, pcm_u8, pcm_f16le, pcm_f32le, pcm_f64le, pcm_mulaw, pcm_alaw. Raises
    `ValueError` for any other.
    """
    if encoding not in _ENCODINGS:
        raise ValueError(f"unknown encoding {encoding!r}; known: {', '.join(_ENCODINGS)}")
    if encoding == "pcm_s16le":
        return data
    if encoding == "pcm_u8":
        return _from_u8(data)
    if encoding in ("pcm_s24le", "pcm_s32le"):
        return _from_wide(data, _ENCODINGS[encoding])
    if encoding in _G711:
        return _packed("h", map(_expansion(encoding).__getitem__, data))
    if encoding == "pcm_f16le":
        return _from_floats(struct.unpack(f"<{len(data) // 2}e", data[: len(data) & ~1]))
    return _from_floats(_samples("f" if encoding == "pcm_f32le" else "d", data))


def encode_pcm(pcm: bytes, encoding: str) -> bytes:
    """16-bit PCM in pcm_s16le, pcm_f32le, pcm_mulaw or pcm_alaw. Raises `ValueError` for any other encoding."""
    if encoding == "pcm_s16le":
        return pcm
    if encoding == "pcm_f32le":
        return _packed("f", (sample / 32768 for sample in _samples("h", pcm)))
    if encoding in _G711:
        return bytes(map(_compression(encoding).__getitem__, _samples("H", pcm)))
    raise ValueError(f"cannot encode as {encoding!r}; known: pcm_s16le, pcm_f32le, pcm_mulaw, pcm_alaw")


# == Sound files =======================================================================================================


@dataclass(frozen=True, slots=True)
class Sound:
    """Decoded audio: 16-bit samples, channels interleaved."""

    pcm: bytes = field(repr=False)
    sample_rate: int
    channels: int = 1

    @property
    def duration(self) -> float:
        return duration(self.pcm, self.sample_rate, self.channels)

    def mono(self, sample_rate: int | None = None) -> bytes:
        """One channel, at this rate."""
        return resample(mono(self.pcm, self.channels), self.sample_rate, sample_rate or self.sample_rate)


def wav_header(sample_rate: int, data_bytes: int | None = None, channels: int = 1) -> bytes:
    """The 44 bytes before 16-bit PCM. Without `data_bytes` the length is left open, for a stream."""
    size = 0xFFFFFFFF if data_bytes is None else data_bytes
    riff = size if data_bytes is None else data_bytes + 36 + data_bytes % 2
    shape = struct.pack("<HHIIHH", 1, channels, sample_rate, sample_rate * channels * 2, channels * 2, 16)
    return b"RIFF" + struct.pack("<I", riff) + b"WAVEfmt \x10\0\0\0" + shape + b"data" + struct.pack("<I", size)


def wav(pcm: bytes, sample_rate: int, channels: int = 1) -> bytes:
    """A WAV file of 16-bit PCM."""
    return wav_header(sample_rate, len(pcm), channels) + pcm + bytes(len(pcm) % 2)


_WAV_ENCODINGS = {
    (1, 8): "pcm_u8",
    (1, 16): "pcm_s16le",
    (1, 24): "pcm_s24le",
    (1, 32): "pcm_s32le",
    (3, 16): "pcm_f16le",
    (3, 32): "pcm_f32le",
    (3, 64): "pcm_f64le",
    (6, 8): "pcm_alaw",
    (7, 8): "pcm_mulaw",
}


def _bad_audio(message: str, place: str) -> Error:
    return InvalidRequestError(f"{place}: {message}", param=place, code="invalid_audio")


def read_wav(data: bytes, place: str = "audio") -> Sound:
    """The sound in a WAV file: 8, 16, 24 or 32 bits, float, A-law or mu-law, plain or extensible, any channels.

    A length that was left open (a stream's header), or that goes beyond the end, means all that is there; half a frame
    at the end falls away. Raises `InvalidRequestError` (`invalid_audio`) with `param` `place`.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise _bad_audio("is not a WAV file", place)
    at, shape = 12, b""
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8
        if kind == b"data" and shape:
            until = None if size in (0, 0xFFFFFFFF, 0x7FFFFFFF) else at + size
            return _wav_sound(shape, data[at:until], place)
        if kind == b"fmt ":
            shape = data[at : at + size]
        at += size + size % 2
    raise _bad_audio("the WAV file holds no audio", place)


def _wav_sound(shape: bytes, data: bytes, place: str) -> Sound:
    if len(shape) < 16:
        raise _bad_audio("the WAV file's format is cut short", place)
    code, channels, sample_rate, _, align, bits = struct.unpack("<HHIIHH", shape[:16])
    if code == 0xFFFE and len(shape) >= 26:  # extensible: the code stands in the first bytes of a GUID
        code = int.from_bytes(shape[24:26], "little")
    encoding = _WAV_ENCODINGS.get((code, bits))
    if encoding is None:
        raise _bad_audio(f"WAV format {code} with {bits} bits is not supported (PCM, float, A-law, mu-law are)", place)
    if not 1 <= channels <= 64 or align != channels * bits // 8 or not 1000 <= sample_rate <= 768_000:
        raise _bad_audio(f"the WAV file claims {channels} channels of {align} bytes at {sample_rate} Hz", place)
    return Sound(decode_pcm(data[: len(data) - len(data) % align], encoding), sample_rate, channels)


CONTENT_TYPES = {
    "wav": "audio/wav",
    "mp3": "audio/mpeg",
    "flac": "audio/flac",
    "ogg": "audio/ogg",
    "m4a": "audio/mp4",
    "webm": "audio/webm",
    "pcm": "audio/pcm",
}


def sniff(data: bytes) -> str | None:
    """What kind of sound file this is, by its first bytes: wav, mp3, flac, ogg, m4a or webm; None for anything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "wav"
    marks = {b"fLaC": "flac", b"OggS": "ogg", b"\x1a\x45\xdf\xa3": "webm"}
    if (kind := marks.get(data[:4])) or data[:3] == b"ID3":
        return kind or "mp3"
    if data[4:8] == b"ftyp":
        return "m4a"
    head = int.from_bytes(data[:4], "big")  # an MPEG frame of layer II or III: sync, version, layer, bit rate, rate
    is_mpeg = head >> 21 == 0x7FF and head >> 19 & 3 != 1 and head >> 17 & 3 in (1, 2)
    return "mp3" if is_mpeg and 0 < head >> 12 & 15 < 15 and head >> 10 & 3 != 3 and len(data) > 4 else None


@dataclass(frozen=True, slots=True)
class Recording:
    """Audio to be transcribed: a file of `format`, or bare samples (`pcm`) in `encoding` at `sample_rate`."""

    data: bytes = field(repr=False)
    format: str
    encoding: str | None = None
    sample_rate: int | None = None


def read_recording(
    data: bytes, format: str | None = None, sample_rate: int | None = None, *, place: str = "audio"
) -> Recording:
    """Audio that came in, checked. `format` is needed for bare samples only: `pcm` or the name of an encoding.

    What a file is, its bytes say, not its name; a WAV file is never taken for bare samples. One that is not the
    plainest kind (another encoding, channels, other chunks, a length left open) is made one. Raises
    `InvalidRequestError` that names `audio`, `format` or `sample_rate`.
    """
    fields = place.rpartition(".")[0]
    if not data:
        raise _bad_audio("is empty", place)
    low = (format or "").lower().removeprefix("audio/")
    encoding = "pcm_s16le" if low in ("pcm", "raw", "l16") else low
    known = sniff(data)
    bare = encoding in _ENCODINGS and known != "wav"
    if (bare and sample_rate is None) or (sample_rate is not None and not 4000 <= sample_rate <= 192_000):
        param = f"{fields}.sample_rate".lstrip(".")
        said = "is required for bare samples" if sample_rate is None else "must be between 4000 and 192000"
        raise InvalidRequestError(f"{param}: {said}", param=param)
    if bare:
        if len(data) % _ENCODINGS[encoding]:
            raise _bad_audio(f"{len(data)} bytes are not whole samples of {encoding}", place)
        return Recording(data, "pcm", encoding, sample_rate)
    if low and known is None and low not in (*CONTENT_TYPES, *_OTHER_NAMES):
        param = f"{fields}.format".lstrip(".")
        choices = ", ".join((*CONTENT_TYPES, *_ENCODINGS))
        raise InvalidRequestError(f"{param}: unknown format {low[:40]!r}; known: {choices}", param=param)
    if known is None:
        raise _bad_audio(f"is not a sound file ({', '.join(CONTENT_TYPES)}); bare samples need a format", place)
    if known == "wav":
        sound = read_wav(data, place)
        if not sound.pcm:
            raise _bad_audio("the WAV file holds no audio", place)
        if data[:44] != wav_header(sound.sample_rate, len(data) - 44):
            data = wav(sound.mono(), sound.sample_rate)
    return Recording(data, known)


_OTHER_NAMES = ("x-wav", "wave", "mpeg", "mpga", "oga", "mp4", "x-m4a", "x-flac", "opus")


# == Resampling ========================================================================================================


class Resampler:
    """Mono PCM at one rate in, at another out: `feed` pieces of any length, `close` at the end.

    However it is cut, the same samples come out: as many as the duration asks for, rounded up. Nothing above the lower
    of the two Nyquist frequencies comes through (stop band -80 dB). Uses soxr where it is installed.
    """

    def __init__(self, source: int, target: int) -> None:
        for rate in (source, target):
            if not 1000 <= rate <= 768_000:
                raise ValueError(f"no sample rate to work with: {rate}")
        self.source, self.target = source, target
        self._odd = b""  # half a sample
        self._count = 0  # samples in
        self._made = 0  # samples out
        self._filter: _Soxr | _Polyphase | None = None
        if source != target:
            self._filter = _soxr_filter(source, target) or _Polyphase(source, target)

    @property
    def delay(self) -> float:
        """Seconds of audio that went in and are still to come out: soxr's filter holds up to 40 ms."""
        return self._count / self.source - self._made / self.target

    def feed(self, pcm: bytes) -> bytes:
        pcm = self._odd + pcm if self._odd else pcm
        whole = len(pcm) & ~1
        self._odd = pcm[whole:]
        return self._through(pcm[:whole], last=False)

    def close(self) -> bytes:
        self._odd = b""
        return self._through(b"", last=True)

    def _through(self, pcm: bytes, last: bool) -> bytes:
        if self._filter is None:
            return pcm
        self._count += len(pcm) // 2
        out = self._filter.feed(pcm, last)
        if last:  # the filter's own idea of the end may be a sample off
            missing = -(-self._count * self.target // self.source) - self._made - len(out) // 2
            out = out + bytes(2 * missing) if missing > 0 else out[: len(out) + 2 * missing]
        self._made += len(out) // 2
        return out


class _Soxr:
    def __init__(self, source: int, target: int) -> None:
        import numpy
        import soxr

        self._numpy = numpy
        self._stream = soxr.ResampleStream(source, target, 1, dtype="float32", quality="HQ")

    def feed(self, pcm: bytes, last: bool) -> bytes:
        """In floats: to whole numbers soxr would add noise, never the same twice."""
        numpy = self._numpy
        out = self._stream.resample_chunk(numpy.frombuffer(pcm, "<i2").astype("float32"), last=last)
        return bytes(numpy.clip(numpy.rint(out), -32768, 32767).astype("<i2").tobytes())


def _soxr_filter(source: int, target: int) -> _Soxr | None:
    """None where soxr is not installed; what it needs is only loaded when something is to be resampled."""
    try:
        return _Soxr(source, target)
    except ImportError:
        return None


_CROSSINGS = 24  # zero crossings of the filter on each side, counted at the lower rate
_PHASES = 1024  # as many as are tabled; the usual rates need fewer


@functools.lru_cache(32)
def _phases(source: int, target: int) -> tuple[int, list[tuple[float, ...]]]:
    """Half the length of the filter, and its taps for each position of an output sample between two inputs.

    A sinc in a Kaiser window; the sum of each phase is one. The width of the transition is that of Kaiser's formula
    for 80 dB, and it ends at the Nyquist frequency.
    """
    low = min(1.0, target / source)
    half = math.ceil(_CROSSINGS / low)
    beta, width = 7.857, (80 - 7.95) / (14.36 * 2 * _CROSSINGS)
    cutoff = low * (1 - width)
    count = min(target // math.gcd(source, target), _PHASES)
    table = []
    for phase in range(count):
        taps = []
        for tap in range(-half + 1, half + 1):
            x = tap - phase / count
            edge = max(0.0, 1 - (x / half) ** 2)
            sinc = math.sin(math.pi * x * cutoff) / (math.pi * x) if x else cutoff
            taps.append(sinc * _bessel(beta * math.sqrt(edge)))
        total = sum(taps)
        table.append(tuple(tap / total for tap in taps))
    return half, table


def _bessel(x: float) -> float:
    """The modified Bessel function of order zero, which shapes Kaiser's window."""
    total = term = 1.0
    for k in range(1, 40):
        term *= (x / 2 / k) ** 2
        total += term
        if term < total * 1e-12:
            break
    return total


class _Polyphase:
    """The filter in plain Python: about 5 % of a core for speech in real time."""

    def __init__(self, source: int, target: int) -> None:
        common = math.gcd(source, target)
        self._up, self._down = target // common, source // common
        self._half, self._table = _phases(source, target)
        self._window: list[int] = [0] * (self._half - 1)  # samples that still matter; before the first there is silence
        self._at = 0  # of the next output sample: its place in the window, in units of 1 / up

    def feed(self, pcm: bytes, last: bool) -> bytes:
        self._window += _samples("h", pcm)
        if last:
            self._window += [0] * self._half
        up, length, count, window = self._up, 2 * self._half, len(self._table), self._window
        out = array.array("h")
        while (start := self._at // up) + length <= len(window):
            taps = self._table[self._at % up * count // up]
            value = sum(map(operator.mul, taps, window[start : start + length]))
            out.append(max(-32768, min(32767, round(value))))
            self._at += self._down
        used = min(start, len(window))
        del window[:used]
        self._at -= used * up
        return _packed("h", out)


def resample(pcm: bytes, source: int, target: int) -> bytes:
    """The whole of it at another rate."""
    resampler = Resampler(source, target)
    return resampler.feed(pcm) + resampler.close()


# == Speakable text ====================================================================================================

_EMOJI = (
    "\u231a\u231b\u2328\u23cf\u23e9-\u23f3\u23f8-\u23fa\u25aa\u25ab\u25b6\u25c0\u25fb-\u25fe\u2600-\u27bf\u2b05-\u2b07"
    "\u2b1b\u2b1c\u2b50\u2b55\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
)
_DROPPED = re.compile(
    f"[{_EMOJI}\u00ad\u200b\u20e3\ufe00-\ufe0f\ufeff\U000e0020-\U000e007f\ud800-\udfff\x00-\x08\x0e-\x1f\x7f]"
)
_PICTURE = re.compile(f"[{_EMOJI}\ufe0f\U000e0020-\U000e007f]")
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uff66-\uff9f]")  # letters that need no space
_RUN = re.compile(r"[A-Za-z0-9]+|[^\W_A-Za-z0-9]+")
_SCHEMES = ("https", "http", "ftp", "www", "mailto")
_URL_END = re.compile(r"[\s<>\"`|{}\]“”«»「」『』【】\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af\uff00-\uffef]")
_URL_TAIL = frozenset(".,;:!?)*_~'’")
_LINK_TARGET = re.compile(r"\]\((?:[^()\n]|\([^()\n]*\))*\)")
_TAG = re.compile(
    r"</?(?P<name>[A-Za-z][\w-]*)(?:[ \t]+[\w:-]+[ \t]*=[ \t]*(?:\"[^\"<>\n]*\"|'[^'<>\n]*'|[^\s\"'<>]+))*[ \t]*/?>"
    r"|<(?:https?://|mailto:)[^\s<>]*>|<[\w.+-]+@[\w.-]+>|<!--[^<>\n]*-->"
)
_BREAKING_TAGS = _split("br p div li ul ol tr td th table h1 h2 h3 h4 h5 h6 hr")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
_ESCAPABLE = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
_MARKS = re.compile(r"[-*_=:+][-*_=:+| \t]*")


class Speakable:
    """Markdown in, what to read aloud out: `feed` pieces of any size, `close` at the end.

    Marks, code blocks, tables, rules, HTML tags, URLs, footnote marks and emoji are left out; a link is its text, an
    image its description, inline code the code. White space shrinks: to one newline where there was one, else to one
    space. However the text is cut, the same comes out, as soon as what follows can no longer change it.
    """

    def __init__(self) -> None:
        self._held = ""  # text that waits for what follows
        self._mode = self._inline
        self._at_line_start = True
        self._before = "\n"  # the character before
        self._fence = ""
        self._url = ""  # what may be punctuation after a URL
        self._depth = 0  # of parentheses inside a URL
        self._gap = ""  # white space and opening parentheses that nothing follows yet
        self._dropped = False  # something was left out since the last thing written
        self._begun = False
        self._out: list[str] = []

    def feed(self, text: str) -> str:
        self._held += text
        return self._read(final=False)

    def close(self) -> str:
        out = self._read(final=True)
        if self._mode == self._in_url:
            self._held, self._mode, self._before = self._url, self._inline, "/"
            out += self._read(final=True)
        if "(" not in self._gap:
            return out
        return out + (self._gap.rstrip() if self._begun else self._gap.strip())

    def _read(self, final: bool) -> str:
        at = 0
        while at < len(self._held):
            step = self._line_start if self._at_line_start and self._mode == self._inline else self._mode
            after = step(at, final)
            if after < 0:  # undecided
                break
            at = after
        self._held = self._held[at:]
        out = "".join(self._out)
        self._out.clear()
        return out

    # Each step takes a place in what is held and gives the next one, or -1 where it must see more first. What it
    # decides depends on nothing but the text, never on how far the text has come.

    def _line_start(self, at: int, final: bool) -> int:
        text, char = self._held, self._held[at]
        if char in " \t":
            return at + 1
        if char == "\n":
            return self._newline(at)
        if char == ">":
            return at + 1
        if char == "|":  # a row of a table
            self._mode = self._to_line_end
            return at
        if char in "`~":
            return self._fence_start(at, final)
        if char == "#":
            end = self._run_end(at)
            if end == len(text) and not final and end - at <= 6:
                return -1
            self._at_line_start = False
            return end if end - at <= 6 and text[end : end + 1] in ("", " ", "\t", "\n") else at
        if marks := _MARKS.match(text, at, at + 300):
            return self._rule_or_bullet(at, marks.end(), final)
        if char == "[":
            line = text[at : at + 110].partition("\n")[0]
            label = line.find("]")
            whole = final or len(line) < len(text) - at or len(line) == 110
            if not whole and (label < 0 or label == len(line) - 1):
                return -1
            if label > 1 and line[label + 1 : label + 2] == ":":  # where a reference link leads
                self._mode = self._to_line_end
                return at
            if line[:3].lower() in ("[ ]", "[x]") and line[3:4] in (" ", "\t"):
                return at + 4
        self._at_line_start = False
        return at

    def _run_end(self, at: int) -> int:
        """Past the characters that are the same as the first, 100 at most."""
        end = at
        while self._held[end : end + 1] == self._held[at] and end < at + 100:
            end += 1
        return end

    def _fence_start(self, at: int, final: bool) -> int:
        text, end = self._held, self._run_end(at)
        line_end = text.find("\n", end, at + 300)
        if end - at < 3 and (end < len(text) or final):
            self._at_line_start = False
            return at
        if line_end < 0 and not final and len(text) < at + 300 and "`" not in text[end:]:
            return -1
        info = text[end : line_end if line_end >= 0 else at + 300]
        self._at_line_start = False
        if "`" in info or end - at < 3:  # code within a line
            return end
        self._fence = text[at:end]
        self._mode = self._in_fence
        self._skip()
        return end

    def _in_fence(self, at: int, final: bool) -> int:
        text = self._held
        if not self._at_line_start:
            end = text.find("\n", at)
            self._at_line_start = end >= 0
            return end + 1 if end >= 0 else len(text)
        line = re.compile(rf"[ \t>]*{re.escape(self._fence[0])}*[ \t]*").match(text, at, at + 200)
        end = line.end() if line else at
        if end == len(text) and not final and end < at + 200:
            return -1
        if text[at:end].strip(" \t>").startswith(self._fence) and text[end : end + 1] in ("", "\n"):
            self._mode = self._inline
            return end
        self._at_line_start = False
        return at

    def _rule_or_bullet(self, at: int, end: int, final: bool) -> int:
        text = self._held
        if end == len(text) and end < at + 300 and not final:
            return -1
        if text[end : end + 1] in ("", "\n") or end >= at + 300:
            return end
        if text[at] in "-*+" and text[at + 1] in " \t":
            return at + 2
        self._at_line_start = False
        return at

    def _to_line_end(self, at: int, final: bool) -> int:
        end = self._held.find("\n", at)
        if end < 0:
            return len(self._held)
        self._mode = self._inline
        self._skip()
        return end

    def _in_url(self, at: int, final: bool) -> int:
        """Drops a URL; punctuation at its end belongs to the sentence."""
        end = stop.start() if (stop := _URL_END.search(self._held, at)) else len(self._held)
        for char in self._held[at:end]:
            closes = char == ")" and self._depth > 0
            self._depth += (char == "(") - closes
            self._url = self._url + char if char in _URL_TAIL and not closes else ""
        if end == len(self._held) and not final:
            return end
        self._held = self._held[:end] + self._url + self._held[end:]
        self._mode, self._url, self._depth, self._before = self._inline, "", 0, "/"
        return end

    def _inline(self, at: int, final: bool) -> int:
        text, char = self._held, self._held[at]
        if char == "\n":
            return self._newline(at)
        if char.isspace():
            self._space(" ")
            return self._past(at, at + 1)
        if run := _RUN.match(text, at):
            return self._word(at, run.end(), final)
        step = self._special.get(char)
        if step is not None:
            return step(self, at, final)
        if char == "\u200d" and _PICTURE.match(self._before):
            return self._drop(at, at + 1)
        if _DROPPED.match(char):
            return self._drop(at, at + 1) if _PICTURE.match(char) else self._past(at, at + 1)
        return self._put(at, at + 1)

    def _word(self, at: int, end: int, final: bool) -> int:
        """Letters and digits; a scheme at their beginning makes them a URL."""
        text = self._held
        if not self._before.isalnum() or _UNSPACED.match(self._before):
            word = text[at:end].lower()
            if end == len(text) and not final and any(scheme.startswith(word) for scheme in _SCHEMES):
                return -1
            if word in _SCHEMES:
                mark = {"www": ".", "mailto": ":"}.get(word, "://")
                if text.startswith(mark, end):
                    self._mode = self._in_url
                    self._skip()
                    return end
                if not final and mark.startswith(text[end:]):
                    return -1
        return self._put(at, end)

    def _newline(self, at: int) -> int:
        self._space("\n")
        self._at_line_start = True
        return self._past(at, at + 1)

    def _escape(self, at: int, final: bool) -> int:
        following = self._held[at + 1 : at + 2]
        if not following and not final:
            return -1
        if following and following in _ESCAPABLE:
            self._write(following)
            return self._past(at, at + 2)
        return self._past(at, at + 1)

    def _code(self, at: int, final: bool) -> int:
        return self._past(at, at + 1)

    def _emphasis(self, at: int, final: bool) -> int:
        """A run of `*`, `_` or `~`: a mark, unless it stands between spaces, or alone inside a word."""
        text, char = self._held, self._held[at]
        end = self._run_end(at)
        if end == len(text) and not final and end < at + 100:
            return -1
        before, after = self._before, text[end : end + 1]
        single = end - at == 1
        apart = before.isspace() and (not after or after.isspace())
        inside = single and before.isalnum() and after.isalnum()
        if (apart and single) or inside or (single and char == "~"):
            return self._put(at, end)
        return self._past(at, end)

    def _bracket(self, at: int, final: bool) -> int:
        text = self._held
        if mark := re.compile(r"\[(?:\^[^\]\s]{1,30}|\d{1,3})\]").match(text, at):  # a footnote's or a source's number
            return self._drop(at, mark.end())
        if not final and re.compile(r"\[(?:\^[^\]\s]{0,30}|\d{0,3})\Z").match(text, at):
            return -1
        return self._past(at, at + 1)

    def _bracket_end(self, at: int, final: bool) -> int:
        text = self._held[at : at + 2000]
        if len(text) == 1 and not final:
            return -1
        if text[1:2] == "(":
            if target := _LINK_TARGET.match(text):
                return self._past(at, at + target.end())
            if "\n" not in text and len(text) < 2000 and not final:
                return -1
        elif text[1:2] == "[":
            label = re.match(r"\]\[[^\]\n]{0,100}(\]?)", text)
            if label and label[1]:
                return self._past(at, at + label.end())
            if label and label.end() == len(text) and len(text) < 103 and not final:
                return -1
        return self._past(at, at + 1)

    def _exclamation(self, at: int, final: bool) -> int:
        if self._before.isalnum():
            return self._put(at, at + 1)
        following = self._held[at + 1 : at + 2]
        if not following and not final:
            return -1
        return self._past(at, at + 1) if following == "[" else self._put(at, at + 1)

    def _tag(self, at: int, final: bool) -> int:
        text = self._held[at : at + 200]
        if tag := _TAG.match(text):
            if (tag["name"] or "").lower() in _BREAKING_TAGS:
                self._space("\n")
            return self._drop(at, at + tag.end())
        open = re.compile(r"<(?:[A-Za-z/!][^<>\n]*)?\Z").match(text)
        if open and len(text) < 200 and not final:
            return -1
        return self._put(at, at + 1)

    def _entity(self, at: int, final: bool) -> int:
        text = self._held[at : at + 40]
        if entity := _ENTITY.match(text):
            for char in html.unescape(entity[0]):
                if char.isspace():
                    self._space(" ")
                elif not _DROPPED.match(char):
                    self._write(char)
            return self._past(at, at + entity.end())
        if re.match(r"&[#\w]*\Z", text, re.ASCII) and len(text) < 34 and not final:
            return -1
        return self._put(at, at + 1)

    def _pipe(self, at: int, final: bool) -> int:
        self._space(" ")
        return self._past(at, at + 1)

    def _citation(self, at: int, final: bool) -> int:
        text = self._held[at : at + 102]
        end = text.find("】")
        if end > 0 and "\n" not in text[:end]:
            return self._drop(at, at + end + 1)
        if "\n" not in text and len(text) < 102 and not final:
            return -1
        return self._past(at, at + 1)

    def _parenthesis(self, at: int, final: bool) -> int:
        self._gap += "("  # is never written if what it holds is left out
        return self._past(at, at + 1)

    _special: ClassVar[dict[str, Callable[[Speakable, int, bool], int]]] = {
        "\\": _escape,
        "`": _code,
        "*": _emphasis,
        "_": _emphasis,
        "~": _emphasis,
        "[": _bracket,
        "]": _bracket_end,
        "!": _exclamation,
        "<": _tag,
        "&": _entity,
        "|": _pipe,
        "【": _citation,
        "(": _parenthesis,
    }

    # -- what is written --

    def _past(self, at: int, end: int) -> int:
        self._before = self._held[end - 1]
        return end

    def _put(self, at: int, end: int) -> int:
        self._write(self._held[at:end])
        return self._past(at, end)

    def _drop(self, at: int, end: int) -> int:
        self._skip()
        return self._past(at, end)

    def _skip(self) -> None:
        self._dropped = True
        self._space(" ")

    def _space(self, white: str) -> None:
        last = self._gap[-1:]
        if white == "\n" and last == " ":
            self._gap = self._gap[:-1] + white
        elif last not in (" ", "\n"):
            self._gap += white

    def _write(self, text: str) -> None:
        if self._dropped and text[0] == ")" and self._gap.rstrip().endswith("("):
            self._gap = self._gap.rstrip()[:-1]
            self._space(" ")
            return
        if self._dropped and text[0] in ".,;:!?)。，、；：！？）":
            self._gap = self._gap.rstrip(" ")
        self._out.append((self._gap if self._begun else self._gap.lstrip()) + text)
        self._gap, self._dropped, self._begun = "", False, True


def speakable(text: str) -> str:
    """What to read aloud of a Markdown text."""
    reader = Speakable()
    return reader.feed(text) + reader.close()


# == Sentences =========================================================================================================

# Stops that need no space after them: CJK, Devanagari and their kin.
_WIDE_STOPS = "。！？｡．؟۔।॥։።။។‼⁇⁈⁉"
_CANDIDATE = re.compile(rf"\n|[.!?…{_WIDE_STOPS}]+|[,;:、，；：—–،؛]")
_CLOSERS = frozenset("\"'”’»›)]}）】」』》〉〕］｝")
_QUOTES = _CLOSERS | frozenset("“‘«")  # close after „ ‚ »; where spaces are written, an opening one has one before it
_INITIALS = re.compile(r"[^\W\d_]{1,2}(?:\.[^\W\d_]{1,2})+")
_TOKEN = re.compile(r"[^\s(\[{\"“‘'«„¿¡—–]*\Z")
# Never the end of a sentence.
_TITLES = _split(
    "dr mr mrs ms sr mx prof st mt ft gen col sgt capt lt cmdr rev hon sen rep gov pres vs cf approx dept viz fig figs "
    "eq e.g i.e et.al al ca bzw z.b d.h u.a o.ä s.o s.u evtl ggf inkl zzgl vgl str hr frl dipl ing mme mlle mgr m.m "
    "p.ex env c.-à-d sra srta dra ud uds pág núm sig dott avv geom exmo exma bijv d.w.z dhr mevr m.a.w т.е т.к ул "
    "им напр डॉ श्री प्रो"
)
# Not the end where a number follows.
_NUMBERED = _split(
    "no nos nr p pp vol ch sec art abs par par. jan feb mar apr jun jul aug sep sept oct okt nov dec dez § c ca tel "
    "ext bd s kap ziff núm pág n стр г"
)
# May well be the end where a capital follows.
_CLOSING = _split("a.m p.m etc usw ecc inc ltd corp co jr bros u.s.w т.д т.п и.т.д")
_MONTHS = _split(
    "januar jänner februar märz april mai juni juli august september oktober november dezember "
    "jahrhundert jahrhunderts klasse stock januari februari maart mei juni juli augustus "
    "januára február marca"
)
# After initials ("J. Smith", "U.S. Army", "the U.S. The …") only such a word begins a sentence.
_STARTERS = _split(
    "the a an it he she we they i you this that these those there in on at as if when while after before but and or so "
    "however then now what why how who where our his her my your its all some many most no yes for with from to "
    "der die das ein eine er sie es wir ich und aber in im dann doch dies diese le la les il elle nous je et mais un "
    "une el los las ella pero y ese esta lo gli ma e это он она мы но я и они"
)


class Sentences:
    """Text in, parts to speak out: `feed` pieces of any size, `close` at the end.

    The parts joined are the text, character for character, and are the same however it is cut. A part is a sentence
    (with the white space after it) or a line; so that speech begins early, the first may be a clause, of at least
    `clause` characters, and is at most `first` long; the others at most `longest`. A part is given out once what
    follows can no longer change it. Each holds a letter or digit, but for what may be left at the end and for lines of
    marks beyond all bounds.
    """

    def __init__(self, *, clause: int = 24, first: int = 90, longest: int = 300) -> None:
        self._clause, self._limit, self._longest = clause, first, longest
        self._is_first = True
        self._text = ""  # of the part that is being read
        self._seen = 0  # so far there is no end in it

    def feed(self, text: str) -> list[str]:
        self._text += text
        parts = []
        while cut := self._cut():
            parts.append(self._text[:cut])
            self._text = self._text[cut:]
            self._seen, self._limit, self._is_first = 0, self._longest, False
        return parts

    def close(self) -> list[str]:
        rest, self._text, self._seen = self._text, "", 0
        return [rest] if rest else []

    def _cut(self) -> int:
        """Where the part ends; 0 while that is not known."""
        text = self._text
        for stop in _CANDIDATE.finditer(text, self._seen):
            if stop.start() >= self._limit:
                break
            end = self._end(stop)
            if end is None:
                return 0
            if end and any(map(str.isalnum, text[:end])):
                return end
            self._seen = stop.end()
        return self._forced() if len(text) > self._limit else 0

    def _end(self, stop: re.Match[str]) -> int | None:
        """The end of the part if this is one, 0 if it is none, None if more must be seen."""
        text, mark, after = self._text, stop[0], stop.end()
        if mark == "\n":
            return after
        if mark[0] in ",;:、，；：—–،؛":
            return self._clause_end(stop)
        if after == len(text):
            return None
        wide = mark[-1] in _WIDE_STOPS
        while after < len(text) and text[after] in (_CLOSERS if wide else _QUOTES):
            after += 1
        if after == len(text):
            return None
        if not text[after].isspace():
            digits = text[stop.start() - 1 : stop.start()].isdigit() and text[after].isdigit()
            if wide:
                return 0 if digits else after
            bare = stop.start() > 0 and _UNSPACED.match(text[stop.start() - 1]) and _UNSPACED.match(text[after])
            return after if bare else 0
        end = self._after_space(after)
        if end is None or text[end - 1] == "\n" or end == after + 20:
            return end
        if text[end] == "»" and end + 1 < len(text) and text[end + 1].isspace():  # « Oui. » has spaces inside
            end = self._after_space(end + 1)
        elif text[end] == "»" and end + 1 == len(text):
            return None
        return end if end is None or wide or text[end - 1] == "\n" else self._sentence_end(stop, end)

    def _clause_end(self, stop: re.Match[str]) -> int | None:
        """The first part may end with a clause."""
        text, after = self._text, stop.end()
        if not self._is_first or stop.start() < self._clause:
            wide_enough = stop[0] in "、，；：" and self._is_first and stop.start() >= self._clause // 3
            if not wide_enough:
                return 0
        if after == len(text):
            return None
        if text[after].isspace():
            return self._after_space(after)
        return after if stop[0] in "、，；：—" and text[after] not in _CLOSERS else 0

    def _after_space(self, at: int) -> int | None:
        """Past the white space that begins here, to its first newline or 20 characters at most."""
        text, end = self._text, at
        while end < len(text) and text[end].isspace() and end < at + 20:
            end += 1
            if text[end - 1] == "\n":
                return end
        return None if end == len(text) and end < at + 20 else end

    def _sentence_end(self, stop: re.Match[str], end: int) -> int | None:
        """Whether a stop before white space ends a sentence. What follows stands at `end`."""
        text = self._text
        if text[end].islower():
            return 0
        if stop[0] != ".":
            return end
        before = text[max(0, stop.start() - 40) : stop.start()]
        token = _TOKEN.findall(before)[0]
        low = token.lower()
        if low in _TITLES or (low in _NUMBERED and text[end].isdigit()):
            return 0
        if low in _CLOSING:
            return end
        if len(token) == 1 and token.isalpha():
            if end + 1 == len(text):
                return None
            if text[end + 1] == ".":  # z. B.
                return 0
        initials = (len(token) == 1 and token.isupper()) or _INITIALS.fullmatch(token)
        ordinal = token.isdigit()
        if ordinal and not text[: stop.start() - len(token)].strip():  # the number of a list's item
            return 0
        if not initials and not ordinal:
            return end
        word = re.compile(r"\w*").match(text, end, end + 20)
        if word is None or (word.end() == len(text) and word.end() < end + 20):
            return None
        following = word[0].lower()
        return end if (following not in _MONTHS if ordinal else following in _STARTERS) else 0

    def _forced(self) -> int:
        """The best place to cut a part that is too long: after a clause, else a word, else before a letter."""
        head, least = self._text[: self._limit], self._limit // 3
        for pattern in (r"[,;:、，；：—–،؛]\s|[、，；：]", r"\s"):
            ends = [found.end() for found in re.finditer(pattern, head) if found.end() > least]
            if ends:
                return ends[-1]
        cut = self._limit
        while cut > least and (
            unicodedata.category(self._text[cut])[0] == "M" or "\u200d" in self._text[cut - 1 : cut + 1]
        ):
            cut -= 1
        return cut


class SpokenParts:
    """A model's text in, parts to speak out: what `Speakable` leaves of it, as `Sentences` cuts it.

    `begun` says that there will be something to speak.
    """

    def __init__(self, **options: int) -> None:
        self.begun = False
        self._speakable = Speakable()
        self._sentences = Sentences(**options)

    def feed(self, text: str) -> list[str]:
        text = self._speakable.feed(text)
        self.begun = self.begun or any(map(str.isalnum, text))
        return self._sentences.feed(text)

    def close(self) -> list[str]:
        """What is left; only punctuation is nothing to be spoken."""
        parts = self._sentences.feed(self._speakable.close()) + self._sentences.close()
        return [part for part in parts if any(map(str.isalnum, part))]


# == Settings ==========================================================================================================


class _Settings(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True, frozen=True)


_Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@/+-]*$")]


class VoiceInput(_Settings):
    """How to hear: `voice.input` of a request, and the settings of a transcription."""

    provider: str = "cartesia"
    model: _Name | None = None
    language: _Name | None = None


class VoiceOutput(_Settings):
    """How to speak: `voice.output` of a request, and the settings of a synthesis. `sample_rate` is in Hz."""

    provider: str = "cartesia"
    voice: _Name | None = None
    model: _Name | None = None
    language: _Name | None = None
    speed: float | None = None
    volume: float | None = None
    emotion: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z _-]{0,63}$")] | None = None
    format: Literal["wav", "mp3", "pcm"] = "wav"
    sample_rate: int = 24_000


class Voice(_Settings):
    """`voice` of a request."""

    input: VoiceInput | None = None
    output: VoiceOutput | None = None

    @property
    def used(self) -> list[VoiceInput | VoiceOutput]:
        return [part for part in (self.input, self.output) if part]


S = TypeVar("S", bound=_Settings)


def read_settings(cls: type[S], value: Any, place: str = "") -> S:
    """Settings that came in: a `Voice`, `VoiceInput` or `VoiceOutput`, also checked by the service that they name.

    Raises `InvalidRequestError` whose `param` is the field, after `place` (`voice.output.sample_rate`).
    """
    try:
        settings = cls.model_validate(value)
    except ValidationError as fault:
        first = fault.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join([*filter(None, [place]), *(str(step)[:100] for step in first["loc"])])
        said = providers.FAULTS.get(first["type"], first["msg"][:300])
        message = f"{param}: {said}" if param else f"the settings {said}"
        raise InvalidRequestError(message, param=param or None) from None
    for name, part in (("", settings), *((f".{name}", getattr(settings, name, None)) for name in ("input", "output"))):
        if isinstance(part, (VoiceInput, VoiceOutput)):
            _check_settings(part, f"{place}{name}".lstrip("."))
    return settings


def _check_settings(settings: VoiceInput | VoiceOutput, place: str) -> None:
    try:
        adapter = SPEECH.get(settings.provider)
        if adapter is None:
            known = ", ".join(SPEECH)
            raise InvalidRequestError(f"unknown speech provider; known: {known}", param="provider")
        adapter.check(settings)
    except InvalidRequestError as fault:
        param = f"{place}.{fault.param}".lstrip(".")
        raise InvalidRequestError(f"{param}: {fault.message}", param=param, code=fault.code) from None


# == Requests ==========================================================================================================


class TranscriptionRequest(VoiceInput):
    """`POST /v1/audio` with a recording. `timestamps` asks for the times of words."""

    audio: bytes = Field(repr=False)
    format: Annotated[str, Field(max_length=64)] | None = None
    sample_rate: int | None = None
    timestamps: bool = True
    provider_keys: dict[str, str] = Field(default={}, repr=False)

    @functools.cached_property
    def recording(self) -> Recording:
        return read_recording(self.audio, self.format, self.sample_rate)


class SynthesisRequest(VoiceOutput):
    """`POST /v1/audio` with a text. `stream` asks for the audio as it comes."""

    text: str = Field(repr=False)
    stream: bool = False
    provider_keys: dict[str, str] = Field(default={}, repr=False)


def read_audio_request(body: Mapping[str, Any]) -> TranscriptionRequest | SynthesisRequest:
    """What the body of `POST /v1/audio` asks for; `audio` is base64, or bytes where no JSON was in between.

    Raises `InvalidRequestError` that names the field.
    """
    given = {name: value for name, value in body.items() if value is not None}
    if "audio" in given and "text" in given:
        raise InvalidRequestError("text: either audio is transcribed or text is spoken, not both", param="text")
    if "text" in given:
        synthesis = read_settings(SynthesisRequest, given)
        check_text(synthesis.text)
        return synthesis
    audio = given.get("audio")
    if isinstance(audio, str):
        if not providers.is_base64(audio):
            raise _bad_audio("not valid base64", "audio")
        given["audio"] = base64.b64decode(audio)
    elif not isinstance(audio, bytes):
        said = "must be a string of base64" if "audio" in given else "is required, or text"
        raise InvalidRequestError(f"audio: {said}", param="audio")
    check_size(len(given["audio"]))
    transcription = read_settings(TranscriptionRequest, given)
    _ = transcription.recording  # reading it is what checks it
    return transcription


# == Events ============================================================================================================


@dataclass(slots=True)
class Word:
    """A word, as it is written, and when it is said: seconds from the beginning of the audio."""

    word: str
    start: float
    end: float

    def to_wire(self) -> JSON:
        return {"word": self.word, "start": self.start, "end": self.end}


@dataclass(slots=True)
class Transcript:
    """What was heard since the last final one (in a turn: since it began). Final ones add up, verbatim; others are
    replaced by the next. `duration`, of a final one: seconds of audio since the one before."""

    text: str
    is_final: bool
    words: tuple[Word, ...] = ()
    language: str | None = None
    duration: float = 0.0


@dataclass(slots=True)
class TurnStarted:
    """The user has begun to speak."""


@dataclass(slots=True)
class TurnEagerEnd:
    """The user has probably finished. `TurnEnded` or `TurnResumed` follows."""

    transcript: str


@dataclass(slots=True)
class TurnResumed:
    """The user had not finished."""


@dataclass(slots=True)
class TurnEnded:
    """The user has finished. `complete` is false where the stream ended first: this is what there was."""

    transcript: str
    complete: bool = True


@dataclass(slots=True)
class Flushed:
    """All that was sent before a `finalize` or `flush` has been dealt with."""

    id: int | None = None


@dataclass(slots=True)
class Audio:
    """The next piece of speech: whole samples of PCM, or bytes of a file in the format that was asked for."""

    data: bytes = field(repr=False)


@dataclass(slots=True)
class WordTimes:
    """When words are said in the audio, from its beginning; their audio may come before or after."""

    words: tuple[Word, ...]


@dataclass(slots=True)
class Done:
    """The end. Sessions keep it to themselves: their events just end."""


STTEvent: TypeAlias = Transcript | TurnStarted | TurnEagerEnd | TurnResumed | TurnEnded | Flushed | Done
TTSEvent: TypeAlias = Audio | WordTimes | Flushed | Done


class TranscriptBuilder:
    """Adds transcripts up: `text` is all that was heard, `final` the part of it that will not change."""

    def __init__(self) -> None:
        self.final = ""
        self.interim = ""
        self.words: list[Word] = []
        self._turn_over = False

    @property
    def text(self) -> str:
        return self._joined(self.interim)

    def add(self, event: STTEvent) -> None:
        if isinstance(event, TurnEnded):
            self._turn_over = True
        elif isinstance(event, Transcript):
            self.interim = event.text
            if event.is_final:
                self.final, self.interim, self._turn_over = self.text, "", False
                self.words += event.words

    def _joined(self, more: str) -> str:
        """Within a turn the service sends the spaces; between turns there is one."""
        return self.final + (_gap(self.final, more) if self._turn_over else "") + more


def _gap(before: str, after: str) -> str:
    """The space between two texts that were transcribed apart, in scripts that have one."""
    if not before or not after or before[-1].isspace() or after[0].isspace():
        return ""
    return "" if _UNSPACED.match(before[-1]) or _UNSPACED.match(after[0]) or before[-1] in _WIDE_STOPS[:4] else " "


@contextlib.contextmanager
def _as_value_error() -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError) as fault:
        raise ValueError(f"not what was expected: {type(fault).__name__}") from None


@dataclass(slots=True)
class Transcription:
    """What a recording says."""

    text: str
    language: str | None
    duration_seconds: float
    words: list[Word]

    @classmethod
    def from_wire(cls, body: JSON) -> Transcription:
        """Raises `ValueError` for what `to_wire` did not make."""
        with _as_value_error():
            words = [Word(item["word"] + "", float(item["start"]), float(item["end"])) for item in body["words"]]
            return cls(body["text"] + "", body.get("language"), float(body["duration_seconds"]), words)

    def to_wire(self) -> JSON:
        """The answer of `POST /v1/audio`."""
        words = [word.to_wire() for word in self.words]
        return {
            "type": "transcription",
            "text": self.text,
            "language": self.language,
            "duration_seconds": self.duration_seconds,
            "words": words,
        }


@dataclass(slots=True)
class Speech:
    """Speech, all of it."""

    audio: bytes = field(repr=False)
    format: str
    sample_rate: int
    duration_seconds: float

    @property
    def content_type(self) -> str:
        return providers.AUDIO_TYPES[self.format].format(self.sample_rate)

    @classmethod
    def from_wire(cls, body: JSON) -> Speech:
        """Raises `ValueError` for what `to_wire` did not make."""
        with _as_value_error():
            audio = base64.b64decode(body["audio"], validate=True)
            return cls(audio, body["format"] + "", int(body["sample_rate"]), float(body["duration_seconds"]))

    def to_wire(self) -> JSON:
        """The answer of `POST /v1/audio`."""
        return {
            "type": "synthesis",
            "audio": base64.b64encode(self.audio).decode("ascii"),
            "format": self.format,
            "sample_rate": self.sample_rate,
            "duration_seconds": self.duration_seconds,
        }


# == Adapters ==========================================================================================================

MP3_BIT_RATE = 128_000  # what mp3 is asked for in
MAX_AUDIO = 200 << 20  # bytes of one recording
MAX_TEXT = 20_000  # characters in one synthesis: over twenty minutes of speech


class STT:
    """One stream of audio, as a service wants it. `feed` what it sends, and get events."""

    turns: bool  # whether it finds the ends of turns itself

    def audio(self, pcm: bytes) -> list[bytes]:
        """PCM as frames."""
        raise NotImplementedError

    def finalize(self) -> str | None:
        """The frame that asks for all that was said so far; None where the service decides on its own."""
        raise NotImplementedError

    def finish(self) -> str:
        """The frame after which no audio comes."""
        raise NotImplementedError

    def feed(self, frame: str) -> list[STTEvent]:
        """Raises the `Error` that a frame speaks of."""
        raise NotImplementedError


class TTS:
    """One stretch of speech among others on a socket. Methods give the frames to send; `feed` gives events.

    It remembers what was said and what of it came back, so that `resume` can go on where a socket broke off.
    """

    context_id: str
    ended: bool = False  # no text will come

    def rest(self) -> None:
        """A while has passed: a service that closes what is idle may have done so, if all that was said has come."""

    def say(self, text: str) -> list[str]:
        raise NotImplementedError

    def flush(self) -> list[str]:
        raise NotImplementedError

    def end(self) -> list[str]:
        """No text will come. Empty if nothing was said that could be spoken: then there is nothing to wait for."""
        raise NotImplementedError

    def cancel(self) -> list[str]:
        raise NotImplementedError

    def resume(self) -> list[str]:
        """What to send on a new socket."""
        raise NotImplementedError

    def feed(self, message: JSON) -> list[TTSEvent]:
        """Raises the `Error` that a message speaks of."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class SpeechAdapter:
    """One speech service: where it is, what it can do, and the translation to and from its wire format."""

    id: str
    name: str
    base_url: str
    key_env: tuple[str, ...]
    url_env: tuple[str, ...]
    byok: tuple[str, ...]
    stt_models: tuple[str, ...]
    tts_models: tuple[str, ...]

    def check(self, settings: VoiceInput | VoiceOutput) -> None:
        """Raises `InvalidRequestError`, whose `param` is the field, for what the service would refuse."""
        raise NotImplementedError

    def model(self, settings: VoiceInput | VoiceOutput) -> str:
        """The model that takes a recording, or that speaks."""
        raise NotImplementedError

    def stream_model(self, settings: VoiceInput) -> str:
        """The model that listens as it is spoken."""
        raise NotImplementedError

    def encode_transcription(
        self, recording: Recording, settings: VoiceInput, credential: Credential, base_url: str, *, words: bool = True
    ) -> HTTPRequest:
        raise NotImplementedError

    def decode_transcription(self, body: bytes) -> Transcription:
        raise NotImplementedError

    def encode_synthesis(self, text: str, settings: VoiceOutput, credential: Credential, base_url: str) -> HTTPRequest:
        """Asks for the bytes of the audio: a file for `mp3`, bare samples for `pcm` and `wav`."""
        raise NotImplementedError

    def encode_speech(self, text: str, settings: VoiceOutput, credential: Credential, base_url: str) -> HTTPRequest:
        """Asks for server-sent events with bare samples and the times of words."""
        raise NotImplementedError

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, credential: Credential) -> Error:
        raise NotImplementedError

    def open_stt(
        self, settings: VoiceInput, sample_rate: int, turns: bool, credential: Credential, base_url: str
    ) -> HTTPRequest:
        """The handshake of a WebSocket for one stream of audio."""
        raise NotImplementedError

    def stt(self, settings: VoiceInput, sample_rate: int, turns: bool) -> STT:
        raise NotImplementedError

    def has_turns(self, settings: VoiceInput) -> bool:
        """Whether the service finds the ends of turns itself, for this model and language."""
        raise NotImplementedError

    def open_tts(self, credential: Credential, base_url: str) -> HTTPRequest:
        """The handshake of a WebSocket for any number of `TTS`."""
        raise NotImplementedError

    def tts(self, settings: VoiceOutput) -> TTS:
        raise NotImplementedError

    def read_tts(self, frame: str) -> tuple[str | None, JSON]:
        """A frame of that socket: whose it is (a `context_id`; None: everybody's), and what."""
        raise NotImplementedError


def check_size(size: int, place: str = "audio") -> None:
    """Raises `RequestTooLargeError` for a recording of more bytes than can be transcribed at once."""
    if size > MAX_AUDIO:
        message = f"{place}: {size >> 20} MiB; at most {MAX_AUDIO >> 20} MiB can be transcribed at once"
        raise RequestTooLargeError(message, param=place)


def check_text(text: str, place: str = "text") -> None:
    """Raises `InvalidRequestError` for text that cannot be spoken: none, no letter or digit in it, or too much."""
    if not any(map(str.isalnum, text)):
        raise InvalidRequestError(f"{place}: there is nothing in it to be spoken", param=place)
    if len(text) > MAX_TEXT:
        message = f"{place}: {len(text)} characters; at most {MAX_TEXT} can be spoken at once"
        raise InvalidRequestError(message, param=place, code="text_too_long")


def _no_audio(provider: str) -> Error:
    return ProviderError(f"{provider} sent no audio", provider=provider, code="unreadable_answer")


def _audio_seconds(size: int, settings: VoiceOutput) -> float:
    """Of so many bytes of speech, without a header."""
    return size * 8 / MP3_BIT_RATE if settings.format == "mp3" else duration(size, settings.sample_rate)


def _number(value: Any) -> float:
    """A finite number that is not negative; 0 for anything else."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return float(value) if good else 0.0


# == Cartesia ==========================================================================================================

# Source: docs.cartesia.ai and the types of its Python client 4.2.0, as of November 2026.

CARTESIA_VERSION = "2026-03-01"  # the first whose errors are JSON
CARTESIA_VOICE = "6ccbfb76-1fc6-48f7-b71d-91ac6298247b"  # the one of its documentation
CARTESIA_RATES = (8000, 16_000, 22_050, 24_000, 44_100, 48_000)
CARTESIA_ENCODINGS = ("pcm_s16le", "pcm_s32le", "pcm_f16le", "pcm_f32le", "pcm_mulaw", "pcm_alaw")
CARTESIA_LANGUAGES = _split(
    "en fr de es pt zh ja hi it ko nl pl ru sv tr tl bg ro ar cs el fi hr ms sk da ta uk hu no vi bn th he ka id te gu "
    "kn ml mr pa or ur"
)
CARTESIA_FRAME_SECONDS = 0.1  # of audio that is streamed in
CARTESIA_PAUSE_SECONDS = 0.4  # between two phrases it is not longer
STREAM_MODELS = "ink-2"  # take no files


@dataclass(frozen=True, slots=True)
class Cartesia(SpeechAdapter):
    version: str = CARTESIA_VERSION
    voice: str = CARTESIA_VOICE

    def check(self, settings: VoiceInput | VoiceOutput) -> None:
        if settings.language is not None:
            code = _language(settings.language)
            known = CARTESIA_LANGUAGES if isinstance(settings, VoiceOutput) else None
            if not re.fullmatch(r"[a-z]{2,3}", code) or (known and code not in known):
                hint = f"; known: {', '.join(sorted(known))}" if known else " (a code such as en or pt-BR is expected)"
                raise InvalidRequestError(f"{self.id} does not speak this language{hint}", param="language")
        if not isinstance(settings, VoiceOutput):
            return
        for name, low, high in (("speed", 0.6, 1.5), ("volume", 0.5, 2.0)):
            value = getattr(settings, name)
            if value is not None and not low <= value <= high:
                raise InvalidRequestError(f"must be between {low} and {high}", param=name)
        if settings.sample_rate not in CARTESIA_RATES:
            known_rates = ", ".join(map(str, CARTESIA_RATES))
            raise InvalidRequestError(f"{self.id} speaks at {known_rates} Hz", param="sample_rate")
        if re.match(r"sonic-(2|turbo)\b", settings.model or ""):
            for name in ("speed", "volume", "emotion"):
                if getattr(settings, name) is not None:
                    message = f"{settings.model} does not take it; sonic-3 and newer do"
                    raise InvalidRequestError(message, param=name, code="unsupported_feature")

    def model(self, settings: VoiceInput | VoiceOutput) -> str:
        return settings.model or (self.tts_models[0] if isinstance(settings, VoiceOutput) else "ink-whisper")

    # -- over HTTP --

    def encode_transcription(
        self, recording: Recording, settings: VoiceInput, credential: Credential, base_url: str, *, words: bool = True
    ) -> HTTPRequest:
        model = self.model(settings)
        if model == STREAM_MODELS:
            message = f"{model} hears live audio only; ink-whisper takes recordings"
            raise InvalidRequestError(f"model: {message}", param="model", code="unsupported_feature")
        fields = [("model", model), ("language", _language(settings.language or "en"))]
        if words:
            fields.append(("timestamp_granularities[]", "word"))
        query, data = "", recording.data
        if recording.format == "pcm":
            encoding = recording.encoding or "pcm_s16le"
            if encoding not in CARTESIA_ENCODINGS:
                encoding, data = "pcm_s16le", decode_pcm(data, encoding)
            query = "?" + urlencode({"encoding": encoding, "sample_rate": recording.sample_rate})
        kind = CONTENT_TYPES[recording.format]
        content_type, body = _multipart(fields, f"audio.{recording.format}", kind, data)
        return HTTPRequest(f"{base_url}/stt{query}", {**self._headers(credential), "Content-Type": content_type}, body)

    def decode_transcription(self, body: bytes) -> Transcription:
        with providers._readable(self.id):
            answer = providers.loads(body)
            language = answer.get("language")
            return Transcription(
                answer["text"] + "",
                language if isinstance(language, str) else None,
                _number(answer.get("duration")),
                list(_words(answer.get("words"))),
            )

    def encode_synthesis(self, text: str, settings: VoiceOutput, credential: Credential, base_url: str) -> HTTPRequest:
        body = {**self.generation(settings), "transcript": text}
        if settings.format == "mp3":
            rate = MP3_BIT_RATE
            body["output_format"] = {"container": "mp3", "sample_rate": settings.sample_rate, "bit_rate": rate}
        return self._posted("/tts/bytes", body, credential, base_url)

    def encode_speech(self, text: str, settings: VoiceOutput, credential: Credential, base_url: str) -> HTTPRequest:
        body = {**self.generation(settings), "transcript": text, "add_timestamps": True}
        return self._posted("/tts/sse", body, credential, base_url)

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, credential: Credential) -> Error:
        with contextlib.suppress(ValueError):
            fault = _cartesia_fault(providers.loads(body))
            status, body = fault.pop("status_code", status), providers.dumps(fault) if fault["message"] else b""
        error = providers.provider_error(self.id, status, headers, body, keys=[credential.key], own_key=credential.own)
        return _blaming(error)

    # -- over WebSockets --

    def has_turns(self, settings: VoiceInput) -> bool:
        return self.stream_model(settings) == "ink-2"

    def open_stt(
        self, settings: VoiceInput, sample_rate: int, turns: bool, credential: Credential, base_url: str
    ) -> HTTPRequest:
        query = {"model": self.stream_model(settings), "encoding": "pcm_s16le", "sample_rate": sample_rate}
        if not turns:
            query["language"] = _language(settings.language or "en")
        path = "/stt/turns/websocket" if turns else "/stt/websocket"
        return self._handshake(f"{path}?{urlencode(query, quote_via=quote)}", credential, base_url)

    def stt(self, settings: VoiceInput, sample_rate: int, turns: bool) -> CartesiaSTT:
        if turns and not self.has_turns(settings):
            message = f"{self.stream_model(settings)} finds no turns; ink-2 does, for English"
            raise InvalidRequestError(f"model: {message}", param="model", code="unsupported_feature")
        return CartesiaSTT(self, sample_rate, turns)

    def open_tts(self, credential: Credential, base_url: str) -> HTTPRequest:
        return self._handshake("/tts/websocket", credential, base_url)

    def tts(self, settings: VoiceOutput) -> CartesiaTTS:
        return CartesiaTTS(self, settings)

    def read_tts(self, frame: str) -> tuple[str | None, JSON]:
        try:
            message = providers._as_dict(providers.loads(frame))
        except ValueError:
            raise providers.unreadable(self.id) from None
        context_id = message.get("context_id")
        return context_id if isinstance(context_id, str) else None, message

    # -- what they share --

    def generation(self, settings: VoiceOutput) -> JSON:
        """What every request for speech says; all but the text must stay the same within a context."""
        body: JSON = {
            "model_id": self.model(settings),
            "voice": {"mode": "id", "id": settings.voice or self.voice},
            "output_format": {"container": "raw", "encoding": "pcm_s16le", "sample_rate": settings.sample_rate},
        }
        if settings.language is not None:
            body["language"] = _language(settings.language)
        wanted = {"speed": settings.speed, "volume": settings.volume, "emotion": settings.emotion}
        if config := {name: value for name, value in wanted.items() if value is not None}:
            body["generation_config"] = config
        return body

    def stream_model(self, settings: VoiceInput) -> str:
        """English has a model of its own."""
        return settings.model or ("ink-2" if _language(settings.language or "en") == "en" else "ink-whisper")

    def _headers(self, credential: Credential) -> dict[str, str]:
        return {"Authorization": providers.bearer(credential.key), "Cartesia-Version": self.version}

    def _posted(self, path: str, body: JSON, credential: Credential, base_url: str) -> HTTPRequest:
        headers = {**self._headers(credential), "Content-Type": "application/json"}
        return HTTPRequest(base_url + path, headers, providers.dumps(body))

    def _handshake(self, path: str, credential: Credential, base_url: str) -> HTTPRequest:
        return HTTPRequest(re.sub("^http", "ws", base_url) + path, self._headers(credential), b"", "GET")


def _language(language: str) -> str:
    """`pt` of `pt-BR`."""
    return re.split("[-_]", language)[0].lower()


def _multipart(fields: Sequence[tuple[str, str]], filename: str, kind: str, data: bytes) -> tuple[str, bytes]:
    """Content type and body of a form with a file. The same form is always the same bytes."""
    boundary = hashlib.sha256(data).hexdigest()
    head = "".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields
    )
    head += f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n'
    head += f"Content-Type: {kind}\r\n\r\n"
    return f"multipart/form-data; boundary={boundary}", head.encode() + data + f"\r\n--{boundary}--\r\n".encode()


def _words(value: Any) -> tuple[Word, ...]:
    given = (providers._as_dict(item) for item in value) if isinstance(value, list) else ()
    return tuple(
        Word(item["word"], _number(item.get("start")), _number(item.get("end")))
        for item in given
        if isinstance(item.get("word"), str)
    )


_MODEL_CODES = ("model_not_found", "model_sunsetted")


def _cartesia_fault(message: Any) -> JSON:
    """Cartesia's error object in the names that providers.py reads. Its text is in `message`, `title` or `error`."""
    fault = providers._as_dict(message)
    texts = (fault.get(name) for name in ("message", "title", "error", "error_code"))
    text = next((text for text in texts if isinstance(text, str) and text.strip()), "")
    kept = {name: fault[name] for name in ("title", "request_id", "doc_url", "status_code") if fault.get(name)}
    code = fault.get("error_code")
    if isinstance(code, str):
        kept["code"] = code
    if code in _MODEL_CODES:
        kept["status_code"] = 404
    return {"message": text, **kept}


def _cartesia_error(adapter: Cartesia, message: JSON) -> Error:
    return _blaming(providers.stream_error(adapter.id, _cartesia_fault(message)))


def _blaming(error: Error) -> Error:
    """Cartesia names no field. What it does not know is the model or, in requests such as ours, the voice."""
    if error.status == 404:
        error.param = "model" if error.code in _MODEL_CODES else "voice" if "voice" in error.message.lower() else None
    return error


class CartesiaSTT(STT):
    """A stream to `/stt/websocket`, which transcribes on `finalize`, or to `/stt/turns/websocket`."""

    def __init__(self, adapter: Cartesia, sample_rate: int, turns: bool) -> None:
        self.turns = turns
        self._adapter = adapter
        self._frame = 2 * round(sample_rate * CARTESIA_FRAME_SECONDS)

    def audio(self, pcm: bytes) -> list[bytes]:
        return [pcm[at : at + self._frame] for at in range(0, len(pcm), self._frame)]

    def finalize(self) -> str | None:
        return None if self.turns else "finalize"

    def finish(self) -> str:
        return '{"type":"close"}' if self.turns else "close"

    def feed(self, frame: str) -> list[STTEvent]:
        with providers._readable(self._adapter.id):
            message = providers.loads(frame)
            kind = message.get("type")
            if kind != "error":
                return self._turn(kind, message) if self.turns else self._manual(kind, message)
        raise _cartesia_error(self._adapter, message)

    def _manual(self, kind: Any, message: JSON) -> list[STTEvent]:
        if kind == "transcript":
            language, final = message.get("language"), message["is_final"] is True
            return [
                Transcript(
                    message["text"] + "",
                    final,
                    _words(message.get("words")),
                    language if isinstance(language, str) else None,
                    _number(message.get("duration")) if final else 0.0,
                )
            ]
        if kind == "flush_done":
            return [Flushed()]
        return [Done()] if kind == "done" else []

    def _turn(self, kind: Any, message: JSON) -> list[STTEvent]:
        """Transcripts hold all of the turn; what was sent once is not revised."""
        if kind == "turn.start":
            return [TurnStarted()]
        if kind == "turn.update":
            return [Transcript(message["transcript"] + "", False)]
        if kind == "turn.eager_end":
            return [Transcript(message["transcript"] + "", False), TurnEagerEnd(message["transcript"])]
        if kind == "turn.resume":
            return [TurnResumed()]
        if kind == "turn.end":
            return [Transcript(message["transcript"] + "", True), TurnEnded(message["transcript"])]
        return [Done()] if kind == "done" else []


class CartesiaTTS(TTS):
    """A context on `/tts/websocket`. Also reads `/tts/sse`, whose messages are the same."""

    def __init__(self, adapter: Cartesia, settings: VoiceOutput) -> None:
        self._adapter = adapter
        self._sample_rate = settings.sample_rate
        self._settings = {
            **adapter.generation(settings),
            "add_timestamps": True,
            "use_normalized_timestamps": False,  # the words as they were written
            "max_buffer_delay_ms": 0,  # whole phrases are sent: nothing is to be waited for
        }
        self.context_id = self._fresh_id()
        self.said = ""
        self.seconds = 0.0  # of audio that came
        self._from = 0  # what was said from here on, this context has spoken
        self._offset = 0.0  # of its audio
        self._words: list[Word] = []
        self._sent = 0  # of `said`; the rest waits for a letter or digit
        self._again = 0  # bytes that will come a second time
        self._odd = b""
        self._closed = False  # by the service

    @staticmethod
    def _fresh_id() -> str:
        return f"vai-{secrets.token_hex(8)}"

    def rest(self) -> None:
        """A context expires a second after its last audio was sent."""
        if self._sent > self._from and not self._to_come(self._heard()):
            self._closed = True

    def say(self, text: str) -> list[str]:
        """A context must not begin with mere punctuation."""
        if self._closed:
            self._renew(self._sent)
        self.said += text
        held = self.said[self._sent :]
        if self._sent == self._from and not any(map(str.isalnum, held)):
            return []
        self._sent = len(self.said)
        return [self._request(held)] if held else []

    def flush(self) -> list[str]:
        return [self._request("", flush=True)] if self._sent > self._from and not self._closed else []

    def end(self) -> list[str]:
        self.ended = True
        return [self._request("", more=False)] if self._sent > self._from and not self._closed else []

    def cancel(self) -> list[str]:
        self.ended = True
        frame = self._frame({"context_id": self.context_id, "cancel": True})
        return [frame] if self._sent > self._from and not self._closed else []

    def resume(self) -> list[str]:
        """Goes on with the word after the last whole one; a part of that word may have been heard twice then.

        Where audio came whose words are not known yet, it is spoken once more, and what came before is left out.
        """
        at, again = self._heard(), 0.0
        if not self._words:
            again = self.seconds - self._offset
        elif self._to_come(at):  # a pause is behind a word, but not before the first one
            again = max(0.0, self.seconds - self._words[-1].end - CARTESIA_PAUSE_SECONDS)
        self._renew(at, again)
        frames = self.say("")
        return frames + self.end() if self.ended else frames

    def _heard(self) -> int:
        """Where in `said` the last word ends whose audio has all come."""
        at = self._from
        for word in self._words:
            if word.end > self.seconds + 0.001:
                break
            found = self.said.find(word.word, at)
            at = found + len(word.word) if found >= 0 else at
        return at

    def _to_come(self, at: int) -> bool:
        """Whether there are words between there and what was sent last."""
        return any(map(str.isalnum, self.said[at : self._sent]))

    def _renew(self, at: int, again: float = 0.0) -> None:
        """A fresh context, for what was said from here on. So many seconds of its audio have come already."""
        self.context_id = self._fresh_id()
        self._from = self._sent = at
        self._offset, self._again = self.seconds - again, 2 * round(again * self._sample_rate)
        self._words, self._odd, self._closed = [], b"", False

    def feed(self, message: JSON) -> list[TTSEvent]:
        kind = message.get("type")
        with providers._readable(self._adapter.id):
            if kind == "chunk":
                return self._chunk(message["data"])
            if kind == "timestamps":
                return self._times(message["word_timestamps"])
            if kind == "flush_done":
                flush = message.get("flush_id")
                return [Flushed(flush if isinstance(flush, int) else None)]
        if kind == "error":
            raise _cartesia_error(self._adapter, message)
        if kind == "done" and not self.ended:  # too long a pause: what is said next needs a context of its own
            self._closed = True
            return []
        return [Done()] if kind == "done" else []

    def _chunk(self, data: str) -> list[TTSEvent]:
        pcm = self._odd + binascii.a2b_base64(data, strict_mode=True)
        again = min(self._again, len(pcm) & ~1)
        pcm, self._again = pcm[again:], self._again - again
        whole = len(pcm) & ~1
        self._odd = pcm[whole:]
        self.seconds += duration(whole, self._sample_rate)
        return [Audio(pcm[:whole])] if whole else []

    def _times(self, times: JSON) -> list[TTSEvent]:
        rows = zip(times["words"], times["start"], times["end"], strict=True)
        words = [
            Word(word + "", self._offset + _number(start), self._offset + _number(end)) for word, start, end in rows
        ]
        self._words += words
        return [WordTimes(tuple(words))] if words else []

    def _request(self, text: str, *, more: bool = True, flush: bool = False) -> str:
        message = {**self._settings, "context_id": self.context_id, "transcript": text, "continue": more}
        return self._frame({**message, "flush": True} if flush else message)

    @staticmethod
    def _frame(message: JSON) -> str:
        return providers.dumps(message).decode("ascii")


# == Registry ==========================================================================================================

SPEECH: dict[str, SpeechAdapter] = {
    adapter.id: adapter
    for adapter in (
        Cartesia(
            id="cartesia",
            name="Cartesia",
            base_url="https://api.cartesia.ai",
            key_env=("CARTESIA_API_KEY",),
            url_env=("VAI_CARTESIA_BASE_URL",),
            byok=("cartesia",),
            stt_models=("ink-2", "ink-whisper"),
            tts_models=("sonic-3.5", "sonic-3"),
        ),
    )
}


def model_of(settings: VoiceInput | VoiceOutput) -> str:
    """What takes a recording or speaks, as `service/model`."""
    return f"{settings.provider}/{SPEECH[settings.provider].model(settings)}"


def listener_of(settings: VoiceInput) -> str:
    """What listens as it is spoken, as `service/model`."""
    return f"{settings.provider}/{SPEECH[settings.provider].stream_model(settings)}"


# == Sockets ===========================================================================================================

_RECONNECTABLE = (None, 1000, 1001, 1005, 1006, 1011, 1012, 1013, 1015)
_refused: contextvars.ContextVar[list[bytes]] = contextvars.ContextVar("refused")


class Sockets:
    """Opens WebSockets to speech services. Follows no redirect, shares no connection; usable from several loops."""

    def __init__(self, timeouts: Timeouts | None = None) -> None:
        self.timeouts = timeouts or Timeouts()
        self._sessions = providers.PerLoop(functools.partial(self._open_session, self.timeouts))

    @staticmethod
    def _open_session(timeouts: Timeouts) -> aiohttp.ClientSession:
        import aiohttp

        async def keep_refusal(session: object, context: object, params: aiohttp.TraceRequestEndParams) -> None:
            """aiohttp shows no body of a handshake that was refused; the reason stands in it."""
            body = _refused.get(None)
            while body is not None and params.response.status != 101 and sum(map(len, body)) < 64 << 10:
                if not (part := await params.response.content.read(64 << 10)):
                    return
                body.append(part)

        async def stay(session: object, context: object, params: aiohttp.TraceRequestRedirectParams) -> None:
            raise aiohttp.TooManyRedirects(params.response.request_info, ())

        trace = aiohttp.TraceConfig()
        trace.on_request_end.append(keep_refusal)
        trace.on_request_redirect.append(stay)
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, connect=timeouts.connect),
            headers={"User-Agent": f"vai/{__version__}"},
            trace_configs=[trace],
        )

    async def connect(
        self, request: HTTPRequest, adapter: SpeechAdapter, credential: Credential, heartbeat: float | None = None
    ) -> Socket:
        """A socket. A connection that never stood is tried once more.

        Raises what the service says to the handshake, `ProviderTimeoutError`, or `ProviderError` with code
        `connection_failed`, `connection_broken`, `tls` or `redirect`.
        """
        import aiohttp

        session = self._sessions.here()
        name = adapter.id
        body: list[bytes] = []
        token = _refused.set(body)
        try:
            for attempt in (1, 2):
                try:
                    async with asyncio.timeout(min(self.timeouts.first_byte, self.timeouts.connect)):
                        raw = await session.ws_connect(
                            request.url,
                            headers=request.headers,
                            heartbeat=heartbeat,
                            timeout=aiohttp.ClientWSTimeout(ws_close=1.0),
                            max_msg_size=16 << 20,
                        )
                    return Socket(raw, name, self.timeouts)
                except aiohttp.WSServerHandshakeError as fault:
                    if fault.status == 101:
                        raise ProviderError(
                            f"{name} broke the handshake", provider=name, code="connection_broken"
                        ) from None
                    headers = dict(fault.headers or {})
                    raise adapter.decode_error(fault.status, headers, b"".join(body), credential) from None
                except aiohttp.TooManyRedirects:
                    raise providers.redirected(name) from None
                except (aiohttp.ClientError, OSError, ValueError) as raised:
                    problem = providers.connection_error(raised, name)
                    if problem.code != "connection_failed" or attempt == 2:
                        raise problem from None
        finally:
            _refused.reset(token)
        raise AssertionError("unreachable")

    async def close(self) -> None:
        """Hang up on whatever is in progress; nothing can be opened after."""
        await self._sessions.close()


class Socket:
    """An open WebSocket. What goes wrong is an `Error`; code `connection_broken` says that a new one may do better."""

    def __init__(self, raw: aiohttp.ClientWebSocketResponse, provider: str, timeouts: Timeouts) -> None:
        self._raw = raw
        self._provider = provider
        self._idle = timeouts.idle

    async def send(self, frame: str | bytes) -> None:
        import aiohttp

        try:
            async with asyncio.timeout(self._idle):
                await (self._raw.send_str(frame) if isinstance(frame, str) else self._raw.send_bytes(frame))
        except TimeoutError:
            raise ProviderTimeoutError(f"{self._provider} reads no more", provider=self._provider) from None
        except (aiohttp.ClientError, OSError, RuntimeError):
            raise self._broken("connection_broken") from None

    async def receive(self, patience: float | None = None) -> str:
        """The next text frame; waits `patience` seconds, without it for good. Raises `TimeoutError`."""
        while True:
            if isinstance(frame := await self.receive_any(patience), str):
                return frame

    async def receive_any(self, patience: float | None = None) -> str | bytes:
        """The next frame, text or binary."""
        import aiohttp

        async with asyncio.timeout(patience):
            message = await self._raw.receive()
        if message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
            data: str | bytes = message.data
            return data
        code = self._raw.close_code
        raise self._broken("connection_broken" if code in _RECONNECTABLE else "connection_refused", code)

    def _broken(self, code: str, close_code: int | None = None) -> Error:
        detail = f" ({close_code})" if close_code and close_code != 1006 else ""
        message = f"{self._provider} closed the connection{detail}"
        return ProviderError(message, provider=self._provider, code=code)

    async def close(self, patience: float = 1.0) -> None:
        """Says goodbye and waits for the answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._raw.close()


# == Sessions ==========================================================================================================

ATTEMPTS = 5  # to connect again, without anything heard in between


def pause_before(attempt: int) -> float:
    """Seconds before an attempt to connect again: none before the first, then half a second, doubling to eight."""
    return 0.0 if attempt < 2 else min(8.0, 0.25 * 2.0 ** (attempt - 1)) * random.uniform(0.75, 1.0)


@dataclass(frozen=True, slots=True)
class Service:
    """A speech service as one caller may use it: where it is, whose key pays, what it is reached through."""

    adapter: SpeechAdapter
    base_url: str
    credential: Credential
    transport: Transport
    sockets: Sockets

    async def transcribe(self, recording: Recording, settings: VoiceInput, *, words: bool = True) -> Transcription:
        """What a recording says. Raises an `Error`."""
        request = self.adapter.encode_transcription(recording, settings, self.credential, self.base_url, words=words)
        with self._for_caller():
            upstream = await self._sent(request)
            try:
                async with upstream:
                    return self.adapter.decode_transcription(await upstream.read())
            except Error as fault:
                fault.begun = True
                raise

    async def synthesize(self, text: str, settings: VoiceOutput) -> Speech:
        """Text as speech, all of it. Raises an `Error`."""
        async with await self.stream(text, settings, words=False) as stream:
            pieces = [event.data async for event in stream if isinstance(event, Audio)]
        audio = b"".join(pieces)
        return Speech(
            providers.whole_file(audio, settings.format), settings.format, settings.sample_rate, stream.duration
        )

    async def stream(self, text: str, settings: VoiceOutput, *, words: bool = True) -> SpeechStream:
        """Text as speech, as it comes, with the times of words unless it is mp3. Waits for the service to begin."""
        check_text(text)
        timed = words and settings.format != "mp3"
        encode = self.adapter.encode_speech if timed else self.adapter.encode_synthesis
        with self._for_caller():
            upstream = await self._sent(encode(text, settings, self.credential, self.base_url))
        return SpeechStream(self, upstream, settings, timed)

    def listen(
        self,
        settings: VoiceInput,
        *,
        sample_rate: int = 16_000,
        turns: bool | None = None,
        patience: float | None = None,
    ) -> STTSession:
        """Audio in, text out, as it is spoken. `turns`: let the service find their ends; without it, if it can.

        `patience`: seconds for a connection that broke to be made anew.
        """
        return STTSession(self, settings, sample_rate, turns, patience)

    def speak(self, *, patience: float | None = None) -> TTSSession:
        """Text in, audio out, as it is written. `patience`: seconds of silence, where speech is owed, before it is
        tried anew."""
        return TTSSession(self, patience)

    async def _sent(self, request: HTTPRequest) -> Upstream:
        upstream = await self.transport.send(request, self.adapter.id)
        if upstream.status == 200:
            return upstream
        async with upstream:
            body = await upstream.read_some()
        raise self.adapter.decode_error(upstream.status, upstream.headers, body, self.credential)

    @contextlib.contextmanager
    def _for_caller(self) -> Iterator[None]:
        """An error leaves without the key, and is the caller's only if the key is."""
        try:
            yield
        except Error as fault:
            raise providers.for_caller(fault, self.credential) from None


class SpeechStream:
    """Speech coming in over HTTP: iterate for `Audio` and `WordTimes`. Ends, or raises the `Error` that ended it.

    For `wav` the first audio begins with a header that leaves the length open. Closing it lets go of the service at
    once. `duration` is in seconds of what came so far (for mp3: by its bit rate).
    """

    def __init__(self, service: Service, upstream: Upstream, settings: VoiceOutput, timed: bool) -> None:
        self._service = service
        self._upstream = upstream
        self._settings = settings
        self._decoder = service.adapter.tts(settings) if timed else None
        if self._decoder:
            self._decoder.ended = True  # all text was sent
        self._sse = SSEDecoder()
        self._odd = b""
        self._bytes = 0
        self._ended = False
        self._fault: Error | None = None
        self._ready: collections.deque[TTSEvent] = collections.deque()

    async def __aenter__(self) -> SpeechStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def __aiter__(self) -> SpeechStream:
        return self

    async def __anext__(self) -> TTSEvent:
        while not self._ready:
            if self._fault:
                raise self._fault
            if self._ended:
                raise StopAsyncIteration
            try:
                with self._service._for_caller():
                    await self._read()
            except Error as fault:  # after what came before it
                fault.begun = True
                self._fault = fault
                self.close()
        event = self._ready.popleft()
        if isinstance(event, Audio):
            if not self._bytes and self._settings.format == "wav":
                event = Audio(wav_header(self._settings.sample_rate) + event.data)
                self._bytes = -44
            self._bytes += len(event.data)
        return event

    @property
    def duration(self) -> float:
        return _audio_seconds(self._bytes, self._settings)

    def close(self) -> None:
        self._upstream.abort()

    async def _read(self) -> None:
        data = await self._upstream.chunk()
        if self._decoder is None:
            self._bare(data)
            return
        for sse in self._sse.feed(data) if data else self._sse.close():
            _, message = self._service.adapter.read_tts(sse.data)
            for event in self._decoder.feed(message):
                self._ended = self._ended or isinstance(event, Done)
                if not isinstance(event, Done):
                    self._ready.append(event)
        if self._ended:
            await self._upstream.drain()
            self._upstream.abort()
            self._check_begun()
        elif not data:
            raise StreamTruncated(provider=self._service.adapter.id)

    def _bare(self, data: bytes) -> None:
        """A body of nothing but audio. Its end is its only terminal event: the length or the last chunk says so."""
        if self._settings.format != "mp3":
            data, odd = self._odd + data, len(data) > 0
            whole = len(data) & ~1 if odd else 0
            data, self._odd = data[:whole], data[whole:]
            self._ended = not odd
        else:
            self._ended = not data
        if data:
            self._ready.append(Audio(data))
        if self._ended:
            self._upstream.abort()
            self._check_begun()

    def _check_begun(self) -> None:
        if not self._bytes and not any(isinstance(event, Audio) for event in self._ready):
            raise _no_audio(self._service.adapter.id)


class STTSession:
    """Audio in, text out. One task may send while another iterates for events; iterating is what keeps it alive.

    A connection that breaks is made anew while iterating, and the audio that no final transcript covers yet is sent
    again, up to `KEPT_SECONDS` of it: no word is lost or told twice as final. The events end after `finish`.
    With `patience`, that must be done in so many seconds, or iterating raises; else in `ATTEMPTS`.
    """

    KEPT_SECONDS = 120.0
    ONSET_SECONDS = 15.0  # kept where no turn is open
    STEADY_SECONDS = 10.0  # a connection that stood so long is no failed attempt
    PIPELINE_SECONDS = 0.5  # kept when a turn ends: the next may have begun, and the end came after as much silence

    def __init__(
        self,
        service: Service,
        settings: VoiceInput,
        sample_rate: int,
        turns: bool | None,
        patience: float | None = None,
    ) -> None:
        adapter = service.adapter
        self._patience = patience
        self._service = service
        self._settings = settings
        self._sample_rate = sample_rate
        self.turns = adapter.has_turns(settings) if turns is None else turns
        self._stt = adapter.stt(settings, sample_rate, self.turns)
        self._socket: Socket | None = None
        self._writing = asyncio.Lock()
        self._events: collections.deque[STTEvent] = collections.deque()
        self._frames: collections.deque[str | bytes] = collections.deque()  # to be sent again on a new socket
        self._kept = 0  # bytes of audio in there
        self._covered = 0  # of them by final transcripts
        self._odd = b""
        self._failures = 0
        self._since = 0.0  # when the connection was made
        self.reconnects = 0
        self._interim = False  # words were told that are not final yet …
        self._after = 0  # … and bytes of audio sent since
        self._last = ""  # final transcript
        self._before = ""  # the last one of an older connection, until the first one of this
        self._turn: str | None = None  # the transcript of the open turn
        self._eager = False
        self._reopened = False  # the open turn will begin once more
        self._finishing = False
        self._ended = False

    async def __aenter__(self) -> STTSession:
        with self._service._for_caller():
            self._socket = await self._connected()
        self._since = asyncio.get_running_loop().time()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def __aiter__(self) -> STTSession:
        return self

    async def __anext__(self) -> STTEvent:
        while not self._events:
            if self._ended:
                raise StopAsyncIteration
            with self._service._for_caller():
                await self._read()
        return self._events.popleft()

    async def send(self, pcm: bytes) -> None:
        """More audio, any length; half a sample at the end waits for its other half."""
        pcm = self._odd + pcm
        whole = len(pcm) & ~1
        self._odd = pcm[whole:]
        await self._write(self._stt.audio(pcm[:whole]))

    async def finalize(self) -> None:
        """All that was sent so far is to be transcribed now; `Flushed` says that it has been. Nothing with turns."""
        if (frame := self._stt.finalize()) is not None:
            await self._write([frame])

    async def finish(self) -> None:
        """No audio will come: what there is becomes final, and the events end."""
        if not self._finishing:
            await self._write([self._stt.finish()])
            self._finishing = True

    async def renew(self) -> None:
        """Break off a connection that has fallen silent: whoever iterates makes it anew."""
        if self._socket is not None:
            await self._socket.close()

    def forget(self, seconds: float) -> None:
        """There is no speech in what was sent before the last `seconds`: it need not be sent again."""
        if not self._interim and self._turn is None:
            self._shrink(seconds)

    def unheard(self) -> bytes:
        """The audio of which no words were told: for another session to hear, when iterating has raised."""
        audio = b"".join(frame for frame in self._uncovered() if isinstance(frame, bytes))
        return audio[max(0, len(audio) - self._after) :] if self._interim else audio

    async def close(self) -> None:
        """Hang up, whatever has come."""
        self._ended = True
        socket, self._socket = self._socket, None
        if socket is not None:
            await socket.close()

    async def _connected(self) -> Socket:
        service = self._service
        request = service.adapter.open_stt(
            self._settings, self._sample_rate, self.turns, service.credential, service.base_url
        )
        return await service.sockets.connect(request, service.adapter, service.credential, heartbeat=30)

    async def _write(self, frames: Sequence[str | bytes]) -> None:
        """Frames go out, or wait for the next socket: whoever iterates makes it."""
        if self._ended or self._finishing:
            raise RuntimeError("the session takes no more audio")
        async with self._writing:
            for frame in frames:
                self._keep(frame)
                if self._socket is not None:
                    try:
                        await self._socket.send(frame)
                    except Error:
                        await self._socket.close()
                        self._socket = None

    def _keep(self, frame: str | bytes) -> None:
        self._frames.append(frame)
        if isinstance(frame, bytes):
            self._kept += len(frame)
            self._after += len(frame)
        self._shrink(self.ONSET_SECONDS if self.turns and self._turn is None else self.KEPT_SECONDS)

    async def _read(self) -> None:
        """The next frame's events, over a new socket if need be."""
        try:
            socket = self._socket
            if socket is None:
                raise ProviderError("gone", code="connection_broken")
            patience = self._service.sockets.timeouts.idle if self._finishing else None
            events = self._stt.feed(await socket.receive(patience))
        except TimeoutError:
            raise ProviderTimeoutError(
                f"{self._service.adapter.id} does not finish", provider=self._service.adapter.id
            ) from None
        except Error as fault:
            if self._ended:  # closed meanwhile
                return
            if fault.code != "connection_broken":
                raise
            if asyncio.get_running_loop().time() - self._since > self.STEADY_SECONDS:
                self._failures = 0
            if self._finishing and self.turns:  # this endpoint just hangs up
                self._end()
            elif self._failures >= ATTEMPTS:
                raise
            else:
                await self._reconnect()
            return
        for event in events:
            self._note(event)

    def _note(self, event: STTEvent) -> None:
        """Keeps account of what the transcripts cover, and passes the event on."""
        self._failures = 0
        if isinstance(event, Transcript):
            self._interim, self._after = not event.is_final and event.text != "", 0
        if isinstance(event, TurnStarted):
            if self._reopened:
                self._reopened = False
                return
            self._turn = ""
        elif isinstance(event, Transcript) and self.turns:
            self._turn = event.text
        elif isinstance(event, Transcript):
            event.text = _gap(self._before, event.text) + event.text
            self._covered += 2 * round(event.duration * self._sample_rate)
            if event.is_final:
                self._before, self._last = "", event.text
        elif isinstance(event, (TurnEagerEnd, TurnResumed)):
            self._eager = isinstance(event, TurnEagerEnd)
        elif isinstance(event, TurnEnded):
            self._turn, self._eager, self._reopened = None, False, False
            self._shrink(self.PIPELINE_SECONDS)
        elif isinstance(event, Flushed):
            self._forget_flushed()
        elif isinstance(event, Done):
            self._end()
            return
        self._events.append(event)

    def _shrink(self, seconds: float) -> None:
        """Forgets old audio until so much is left."""
        most = 2 * self._sample_rate * seconds
        while self._kept > most:
            if isinstance(frame := self._frames.popleft(), bytes):
                old = len(frame)
                self._kept, self._covered = self._kept - old, max(0, self._covered - old)

    def _forget_flushed(self) -> None:
        """Forgets the audio before the first `finalize`, and that."""
        self._covered = 0
        while self._frames:
            frame = self._frames.popleft()
            if isinstance(frame, str):
                return
            self._kept -= len(frame)

    def _end(self) -> None:
        self._ended = True
        if self._turn is not None:  # the last words of a turn whose end never came
            self._events += [Transcript(self._turn, True), TurnEnded(self._turn, complete=False)]

    async def _reconnect(self) -> None:
        loop, name = asyncio.get_running_loop(), self._service.adapter.id
        until = math.inf if self._patience is None else loop.time() + self._patience
        if self._socket is not None:
            await self._socket.close(patience=0.05)  # whoever is writing to it stops
        async with self._writing:
            self._socket = None
            while self._socket is None:
                await asyncio.sleep(min(pause_before(self._failures + 1), until - loop.time()))
                fault: Error | None = None
                try:
                    async with asyncio.timeout_at(None if self._patience is None else until):
                        self._socket = await self._caught_up()
                except TimeoutError:
                    raise ProviderTimeoutError(f"{name} does not answer", provider=name) from None
                except Error as raised:
                    fault = raised
                self._failures += 1  # not where whoever iterates has given up waiting
                if fault and (self._failures >= ATTEMPTS or not fault.retryable or loop.time() >= until):
                    raise fault
        self.reconnects += 1
        self._since = loop.time()
        self._before = self._last
        if self._turn is not None:
            self._reopened = True
            if self._eager:  # it was nearly over, and now it is not
                self._eager = False
                self._events.append(TurnResumed())

    async def _caught_up(self) -> Socket:
        """A new socket that has heard what the old one did, all of it."""
        socket = await self._connected()
        try:
            for frame in self._uncovered():
                await socket.send(frame)
        except BaseException:
            await socket.close()
            raise
        return socket

    def _uncovered(self) -> list[str | bytes]:
        frames = list(self._frames)
        skip = self._covered
        for number, frame in enumerate(frames):
            if not skip or isinstance(frame, str):
                break
            frames[number] = frame[skip:]
            skip = max(0, skip - len(frame))
        return [frame for frame in frames if frame]


class TTSSession:
    """Speech over one socket, opened with the first words (or ahead of them by `connect`) and shared by contexts.

    A socket that breaks is made anew, and each context goes on after the last word whose audio came. An idle socket
    is made anew as well: the service closes it after five minutes.

    With `patience`, a service that owes speech and gives none for so many seconds, or cannot take it, is tried anew
    for as long; without it, a silence is an error after `Timeouts.idle`, and so is a first refusal.
    """

    IDLE_SECONDS = 240.0
    PAUSE_SECONDS = 0.5  # after which what was said and heard needs no context any more
    MOST_UNREAD = 16 << 20  # bytes of audio for a context that nobody reads while others are read

    def __init__(self, service: Service, patience: float | None = None) -> None:
        self._service = service
        self.patience = patience
        self._socket: Socket | None = None
        self.reconnects = 0
        self._used = 0.0
        self._contexts: dict[str, TTSContext] = {}
        self._reading = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._closed = False

    async def __aenter__(self) -> TTSSession:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def context(self, settings: VoiceOutput) -> TTSContext:
        """One answer's speech, in `pcm` whatever `format` says. Use it with `async with`: leaving early cancels it."""
        return TTSContext(self, self._service.adapter.tts(settings))

    async def connect(self) -> None:
        """Open the socket now, so that the first words need not wait for it."""
        with self._service._for_caller():
            async with self._writing:
                await self._open(self.patience if self._used else None)

    async def close(self) -> None:
        """Hang up on all contexts."""
        self._closed = True
        socket, self._socket = self._socket, None
        if socket is not None:
            await socket.close()

    async def _open(self, patience: float | None) -> Socket:
        """The socket, a new one where there is none or it has been idle for long."""
        if self._closed:
            raise RuntimeError("the session is closed")
        service, now = self._service, asyncio.get_running_loop().time()
        if self._socket is not None and not self._contexts and now - self._used > self.IDLE_SECONDS:
            await self._lose(self._socket)
        if self._socket is None:
            request, name = service.adapter.open_tts(service.credential, service.base_url), service.adapter.id
            try:
                async with asyncio.timeout(patience):
                    self._socket = await service.sockets.connect(request, service.adapter, service.credential)
            except TimeoutError:
                raise ProviderTimeoutError(f"{name} does not answer", provider=name) from None
        self._used = now
        return self._socket

    async def _lose(self, socket: Socket, patience: float = 1.0) -> None:
        if self._socket is socket:
            self._socket = None
            self.reconnects += 1
        await socket.close(patience)

    async def _send(self, context: TTSContext, frames: list[str]) -> None:
        """Sends; a context whose socket is gone goes on from where it was on another, these frames included."""
        try:
            async with self._writing:
                if context.socket is None or context.socket is not self._socket:
                    context.socket = await self._open(self.patience)
                    if context.begun:
                        frames = self._resumed(context)
                context.begun = True
                if not context.finished:
                    self._forget(context)
                    self._contexts[context.tts.context_id] = context
                for frame in frames:
                    await context.socket.send(frame)
        except BaseException as fault:  # a cancel as well: not all of it was sent
            socket, context.socket, context.begun = context.socket, None, True
            if not isinstance(fault, Error) or not (fault.code == "connection_broken" or self._bears(fault)):
                raise
            context.trouble = fault
            if socket is not None:
                await self._lose(socket)  # whoever reads goes on with a new one

    def _bears(self, fault: Error) -> bool:
        return self.patience is not None and fault.retryable

    def _resumed(self, context: TTSContext) -> list[str]:
        frames = context.tts.resume()
        if not frames and context.tts.ended:  # all of it had come but for the word that it was the end
            context.finished = True
        return frames

    async def _read(self, context: TTSContext) -> None:
        """Waits for something for this context; whoever reads, reads for all."""
        async with self._reading:
            if context.ready or context.finished or context.fault:
                return
            if self._closed:
                context.finish()
                return
            if context.socket is None or context.socket is not self._socket:
                await self._go_on(context)
                return
            socket = context.socket
            try:
                frame = await socket.receive(self._until_due())
            except TimeoutError:
                if self._expire():
                    await self._lose(socket, patience=0.05)
                return
            except Error as fault:
                await self._lose(socket)
                if fault.code != "connection_broken":
                    raise
                return
        self._dispatch(frame)

    async def _go_on(self, context: TTSContext) -> None:
        """On another socket, from where it was."""
        now = asyncio.get_running_loop().time()
        if not context.failures:
            context.failing_since = now
        context.failures += 1
        context.resumed += 1
        left = math.inf if self.patience is None else context.failing_since + self.patience - now
        if left <= 0 or context.failures > ATTEMPTS or context.resumed > 2 * ATTEMPTS:
            if context.trouble is None or context.trouble.code == "connection_broken":
                raise StreamTruncated(provider=self._service.adapter.id)
            raise context.trouble
        try:
            await asyncio.sleep(min(pause_before(context.failures), left))
            await self._send(context, [])
        except asyncio.CancelledError:  # whoever iterates has given up waiting
            context.failures, context.resumed = context.failures - 1, context.resumed - 1
            raise
        except Error as fault:
            context.trouble = fault
            if not fault.retryable:
                raise
        context.owe()

    def _until_due(self) -> float:
        """Until the first deadline; a few seconds at most, since others may get one meanwhile.

        It may have passed while nobody read: what came meanwhile is to be read first.
        """
        now = asyncio.get_running_loop().time()
        deadlines = [context.deadline for context in self._contexts.values() if context.deadline is not None]
        return max(0.25, min([5.0, *(deadline - now for deadline in deadlines)]))

    def _expire(self) -> bool:
        """Whether a context is to be given another chance, on another socket."""
        now, name = asyncio.get_running_loop().time(), self._service.adapter.id
        late = [one for one in self._contexts.values() if one.deadline is not None and one.deadline <= now]
        for context in late:
            context.trouble = ProviderTimeoutError(f"{name} fell silent in mid-speech", provider=name)
            if context.failures or self.patience is None:
                context.fault = context.trouble
        return any(context.fault is None for context in late)

    def _dispatch(self, frame: str) -> None:
        context_id, message = self._service.adapter.read_tts(frame)
        if context_id is not None:
            found = self._contexts.get(context_id)  # none: it was cancelled
            for context in [found] if found else []:
                context.take(message)
        elif message.get("type") == "error":
            for context in list(self._contexts.values()):
                context.take(message)

    def _forget(self, context: TTSContext) -> None:
        for context_id in [id for id, known in self._contexts.items() if known is context]:
            del self._contexts[context_id]


class TTSContext:
    """One answer's speech. `say` phrases as they are there, `end` after the last; iterate for `Audio` and `WordTimes`.

    The times of words count from the first audio. Pieces are joined verbatim: the spaces between them are the caller's.
    """

    def __init__(self, session: TTSSession, tts: TTS) -> None:
        self.tts = tts
        self.socket: Socket | None = None  # where it lives
        self.begun = False  # something was said
        self.ready: collections.deque[TTSEvent] = collections.deque()
        self.finished = False
        self.fault: Error | None = None
        self.deadline: float | None = None  # by when the service owes something
        self.failures = 0  # since something last came
        self.failing_since = 0.0
        self.resumed = 0
        self.trouble: Error | None = None  # why it is resumed
        self._session = session
        self._unread = 0
        self._said = asyncio.Event()
        self._moved = asyncio.get_running_loop().time()  # when something was last sent or received

    async def __aenter__(self) -> TTSContext:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.cancel()

    def __aiter__(self) -> TTSContext:
        return self

    async def __anext__(self) -> TTSEvent:
        session = self._session
        while not self.ready:
            if self.fault is not None:
                raise self.fault
            if self.finished:
                raise StopAsyncIteration
            if not self.begun:
                await self._said.wait()
                continue
            try:
                with session._service._for_caller():
                    await session._read(self)
            except Error as fault:
                self.fault = fault
                session._forget(self)
        event = self.ready.popleft()
        if isinstance(event, Audio):
            self._unread -= len(event.data)
        return event

    async def say(self, text: str) -> None:
        """More to be spoken. Punctuation alone waits for the first letter or digit."""
        if not self._over():
            self._rested()
            await self._send(self.tts.say(text))

    async def flush(self) -> None:
        """Speak what was said so far without waiting for more; `Flushed` follows its audio."""
        if not self._over():
            await self._send(self.tts.flush())

    async def end(self) -> None:
        """No text will come: the events end with the last of the audio."""
        if self._over():
            return
        self._rested()
        frames = self.tts.end()
        if frames:
            await self._send(frames)
        else:
            self.finish()
            self._session._forget(self)

    async def cancel(self) -> None:
        """Stop at once: the service is told, and no more events come. Harmless after the end."""
        if self.finished:
            return
        frames, live = self.tts.cancel(), self.socket is not None and self.socket is self._session._socket
        self._session._forget(self)
        self.finish()
        self.ready.clear()
        if live:
            with contextlib.suppress(Error):
                await self._session._send(self, frames)

    def take(self, message: JSON) -> None:
        """A message for this context."""
        self._moved = asyncio.get_running_loop().time()
        try:
            events = self.tts.feed(message)
        except Error as raised:
            fault = providers.for_caller(raised, self._session._service.credential)
            self._session._forget(self)
            if self._session._bears(fault):
                self.socket, self.trouble = None, fault
            else:
                self.fault = fault
                self.finish()
            return
        for event in events:
            if isinstance(event, Done):
                self.finish()
                self._session._forget(self)
            else:
                self.failures, self.trouble, self.deadline = 0, None, None
                self.ready.append(event)
                self._unread += len(event.data) if isinstance(event, Audio) else 0
        if self.tts.ended and not self.finished:
            self.owe()
        if self._unread > self._session.MOST_UNREAD:
            self.fault = ProviderError("nobody reads the speech that was asked for", code="speech_unread")

    def _rested(self) -> None:
        if asyncio.get_running_loop().time() - self._moved > self._session.PAUSE_SECONDS:
            self.tts.rest()

    def _over(self) -> bool:
        """Whether there is nobody to speak any more: after the end, or a fault, which iterating tells of."""
        return self.finished or self.tts.ended or self.fault is not None

    def finish(self) -> None:
        """Nothing more will come."""
        self.finished, self.deadline = True, None
        self._said.set()

    def owe(self) -> None:
        """The service has something to say from now on."""
        idle = self._session._service.sockets.timeouts.idle
        patience = idle if self._session.patience is None else self._session.patience
        self.deadline = asyncio.get_running_loop().time() + patience

    async def _send(self, frames: list[str]) -> None:
        if not frames:
            return
        self.owe()
        self._moved = asyncio.get_running_loop().time()
        try:
            with self._session._service._for_caller():
                await self._session._send(self, frames)
        except Error as fault:
            self.fault = fault
            self._session._forget(self)
            raise
        finally:
            self._said.set()


# == Speech in messages ================================================================================================

SILENT_SECONDS = 10.0  # services speak faster than real time: one that is silent for so long has stopped
MOST_AT_ONCE = 4  # recordings of one request that are transcribed side by side
_BARE_TYPES = {"audio/pcm": "pcm", "audio/l16": "pcm", "audio/pcmu": "pcm_mulaw", "audio/pcma": "pcm_alaw"}


class Transcripts:
    """What recordings said, so that one which is sent again with every turn is transcribed once.

    Kept by a digest of audio, settings and key: neither audio nor key is in here, and no caller gets what another paid
    for.
    """

    MOST = 512

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(32)
        self._known: collections.OrderedDict[bytes, str] = collections.OrderedDict()

    def mark(self, recording: Recording, settings: VoiceInput, credential: Credential) -> bytes:
        about = (
            settings.model_dump(),
            recording.format,
            recording.encoding,
            recording.sample_rate,
            str(credential.key),
        )
        return hashlib.sha256(self._salt + providers.dumps(about) + recording.data).digest()

    def get(self, mark: bytes) -> str | None:
        if mark in self._known:
            self._known.move_to_end(mark)
        return self._known.get(mark)

    def add(self, mark: bytes, text: str) -> None:
        if len(text) <= MAX_TEXT:
            self._known[mark] = text
        if len(self._known) > self.MOST:
            self._known.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Hearing:
    """What becomes text before a model sees it: the recordings that users and tools gave."""

    service: Service
    settings: VoiceInput
    known: Transcripts
    spent: providers.AudioSeconds

    async def transcribe(self, requests: Sequence[MessageRequest]) -> str | None:
        """Puts text in place of each recording, in all of these, which are one request to several models.

        Gives what the last turn of the user says; None if there is no recording in it. Raises an `Error`.
        """
        found = list(_recordings(requests[0]))
        if not found:
            return None
        slots = asyncio.Semaphore(MOST_AT_ONCE)
        tasks = [asyncio.create_task(self._heard(block, place, slots)) for place, block in found]
        try:
            async with asyncio.timeout(self.service.sockets.timeouts.total):
                texts = await asyncio.gather(*tasks)
        except TimeoutError:
            name = self.service.adapter.id
            raise ProviderTimeoutError(f"{name} did not hear it all in time", provider=name) from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        said = {id(block): text for (_, block), text in zip(found, texts, strict=True)}
        transcript = _last_turn(requests[0], said)
        for request in requests:
            _put_in_place(request, said)
        return transcript

    async def _heard(self, block: providers.AudioBlock, place: str, slots: asyncio.Semaphore) -> str:
        if block.transcript is not None:
            return block.transcript
        if block.source is None:  # there is always one in what a user said
            return ""
        async with slots:
            if len(block.source.data) > 1 << 20:
                recording, mark = await asyncio.to_thread(self._read, block.source, place)
            else:
                recording, mark = self._read(block.source, place)
            if (text := self.known.get(mark)) is None:
                try:
                    heard = await self.service.transcribe(recording, self.settings, words=False)
                except Error as fault:
                    if fault.param:
                        fault.param = f"voice.input.{fault.param}"
                    elif isinstance(fault, InvalidRequestError):
                        fault.param = place
                    raise
                text = heard.text
                self.spent[self.settings.provider, "in"] += heard.duration_seconds
                self.known.add(mark, text)
        return text

    def _read(self, source: providers.Base64Source, place: str) -> tuple[Recording, bytes]:
        recording = _block_recording(source, place)
        return recording, self.known.mark(recording, self.settings, self.service.credential)


def _block_recording(source: providers.Base64Source, place: str) -> Recording:
    kind, _, rest = source.media_type.partition(";")
    bare, rate = _BARE_TYPES.get(kind.strip().lower()), re.search(r"\brate=(\d{1,6})\b", rest)
    if bare and not (rate and 4000 <= int(rate[1]) <= 192_000):
        param = f"{place}.source.media_type"
        raise InvalidRequestError(f"{param}: says no sample rate (as audio/pcm;rate=16000 does)", param=param)
    channels = re.search(r"\bchannels=(\d+)", rest)
    if bare and channels and int(channels[1]) != 1:
        param = f"{place}.source.media_type"
        raise InvalidRequestError(f"{param}: bare samples have one channel; a WAV file may have more", param=param)
    data = base64.b64decode(source.data)
    return read_recording(data, bare, int(rate[1]) if bare and rate else None, place=f"{place}.source.data")


def _recordings(request: MessageRequest) -> Iterator[tuple[str, providers.AudioBlock]]:
    """What is to be heard, with its place: all that does not come from an assistant."""
    for i, message in enumerate(request.messages):
        for j, block in enumerate(message.blocks if message.role != "assistant" else ()):
            place = f"messages[{i}].content[{j}]"
            if isinstance(block, providers.AudioBlock):
                yield place, block
            for k, inner in enumerate(block.blocks if isinstance(block, providers.ToolResultBlock) else ()):
                if isinstance(inner, providers.AudioBlock):
                    yield f"{place}.content[{k}]", inner


def _last_turn(request: MessageRequest, said: Mapping[int, str]) -> str | None:
    i, last = [(i, message) for i, message in enumerate(request.messages) if message.role == "user"][-1]
    spoken = [said[id(block)].strip() for block in last.blocks if isinstance(block, providers.AudioBlock)]
    if spoken and not any(spoken) and len(spoken) == len(last.blocks):
        place = f"messages[{i}].content[0]"
        raise InvalidRequestError(f"{place}: nothing was said in this recording", param=place, code="no_speech")
    return " ".join(filter(None, spoken)) if spoken else None


def _put_in_place(request: MessageRequest, said: Mapping[int, str]) -> None:
    for message, given in zip(request.messages, request.body["messages"], strict=True):
        if isinstance(message.content, list) and isinstance(given["content"], list):
            given["content"] = _raw_in_place(message.content, given["content"], said)
            message.content = _in_place(message.content, said)


def _in_place(blocks: Sequence[providers.Block], said: Mapping[int, str]) -> list[providers.Block]:
    out: list[providers.Block] = []
    for block in blocks:
        if id(block) in said:
            block = providers.TextBlock(text=said[id(block)])
        elif isinstance(block, providers.ToolResultBlock) and any(id(inner) in said for inner in block.blocks):
            block = block.model_copy(update={"content": _in_place(block.blocks, said)})
        out.append(block)
    return out


def _raw_in_place(blocks: Sequence[providers.Block], given: Sequence[JSON], said: Mapping[int, str]) -> list[JSON]:
    """The same in what the caller sent; what holds no recording stays as it is."""
    out: list[JSON] = []
    for block, raw in zip(blocks, given, strict=True):
        if id(block) in said:
            kept = {name: raw[name] for name in ("cache_control",) if name in raw}
            raw = {"type": "text", "text": said[id(block)], **kept}
        elif isinstance(block, providers.ToolResultBlock) and any(id(inner) in said for inner in block.blocks):
            raw = {**raw, "content": _raw_in_place(block.blocks, raw["content"], said)}
        out.append(raw)
    return out


class Speaker:
    """An answer's voice. `feed` it the text as it is written, which never waits, then `end`; `next` gives the audio.

    Speech begins with the first part that can be spoken. What goes wrong is an `AudioError` among the events; so is
    speech that has not ended `total` seconds after the request for it. Seconds spoken are added to `spent`.
    """

    AHEAD = 64  # pieces of audio that are taken from the service before anybody asks for them

    def __init__(
        self,
        service: Service,
        settings: VoiceOutput,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        spent: providers.AudioSeconds,
    ) -> None:
        self._service = service
        self._settings = settings
        self._spawn = spawn
        self._spent = spent
        self._deadline = asyncio.get_running_loop().time() + service.sockets.timeouts.total
        self._parts = SpokenParts()
        self._between = ""  # what was said before a pause and what comes after it
        self._spoken: list[str] = []
        self._unsaid: asyncio.Queue[str | None] = asyncio.Queue()
        self._events: asyncio.Queue[AudioDelta | AudioError | None] = asyncio.Queue(self.AHEAD)
        self._task: asyncio.Task[None] | None = None
        self._sounded = False
        self._ended = False
        self._over = False

    def feed(self, text: str) -> None:
        self._say(self._parts.feed(text))
        if self._parts.begun and self._task is None:  # the way to the service is open when the first part is there
            self._task = self._spawn(self._speak())

    def pause(self) -> None:
        """Something else comes between: what was said so far is whole."""
        if self._task:
            self._say(self._parts.close())
            self._parts, self._between = SpokenParts(), "\n"

    def end(self) -> None:
        """No text will come."""
        self._say(self._parts.close())
        if self._spoken and self._task is None:
            self._task = self._spawn(self._speak())
        self._unsaid.put_nowait(None)
        if self._task is None:
            self._events.put_nowait(None)

    def _say(self, parts: Iterable[str]) -> None:
        for part in parts:
            self._spoken.append(self._between + part)
            self._unsaid.put_nowait(self._between + part)
            self._between = ""

    async def next(self) -> AudioDelta | AudioError | None:
        """The next piece of audio, or why there is no more; None after the last."""
        return await self._events.get()

    @property
    def block(self) -> Media | None:
        """What stands in the message for what was spoken; None if nothing was. Its audio is in the events."""
        return Media(type="audio", transcript="".join(self._spoken).strip()) if self._sounded else None

    def stop(self) -> None:
        """Be silent at once; the service is told. Harmless after the end."""
        if self._task and not self._over:
            self._task.cancel()

    async def _speak(self) -> None:
        if self._settings.format == "mp3":  # sockets have bare samples only
            await self._pass_on(self._over_http())
            return
        async with self._service.speak() as session:
            await self._pass_on(self._over_socket(session))

    async def _pass_on(self, audio: AsyncGenerator[bytes, None]) -> None:
        settings = self._settings
        try:
            async with asyncio.timeout_at(self._deadline), contextlib.aclosing(audio):
                async for data in audio:
                    self._spent[settings.provider, "out"] += _audio_seconds(len(data), settings)
                    if settings.format == "wav" and not self._sounded:
                        data = wav_header(settings.sample_rate) + data
                    self._sounded = True
                    await self._events.put(AudioDelta(data, settings.format, settings.sample_rate))
            if not self._sounded and any(map(str.isalnum, "".join(self._spoken))):
                raise _no_audio(settings.provider)
        except Exception as raised:  # of whatever kind: the answer must not wait for a voice that is gone
            fault = raised if isinstance(raised, Error) else APIError("internal error")
            if isinstance(raised, TimeoutError):
                name = settings.provider
                fault = ProviderTimeoutError(f"{name} did not end its speech in time", provider=name)
            elif fault is not raised:
                logger.error("unexpected %s", type(raised).__name__, exc_info=raised)
            logger.info("an answer was not spoken: %s %s", settings.provider, fault.code or fault.type)
            if fault.param:
                fault.param = f"voice.output.{fault.param}"
            error = {name: value for name, value in fault.to_wire()["error"].items() if value is not None}
            await self._events.put(AudioError(error))
        await self._events.put(None)
        self._over = True

    async def _over_socket(self, session: TTSSession) -> AsyncGenerator[bytes, None]:
        await session.connect()
        async with session.context(self._settings) as context:
            saying = asyncio.create_task(self._say_all(context))
            try:
                async for event in context:
                    if isinstance(event, Audio):
                        yield event.data
            finally:
                saying.cancel()
                await asyncio.gather(saying, return_exceptions=True)

    async def _say_all(self, context: TTSContext) -> None:
        with contextlib.suppress(Error):  # iterating the context raises it
            while (part := await self._unsaid.get()) is not None:
                await context.say(part)
            await context.end()

    async def _over_http(self) -> AsyncGenerator[bytes, None]:
        """One file after the other."""
        while text := await self._written():
            if not any(map(str.isalnum, text)):
                continue
            try:
                async with asyncio.timeout(self._service.sockets.timeouts.idle):
                    stream = await self._service.stream(text, self._settings, words=False)
            except TimeoutError:
                name = self._service.adapter.id
                raise ProviderTimeoutError(f"{name} did not answer in time", provider=name) from None
            async with stream:
                async for event in stream:
                    if isinstance(event, Audio):
                        yield event.data

    async def _written(self) -> str:
        """All that was written meanwhile, at least a part; nothing at the end."""
        text = ""
        while not self._ended and (not text or not self._unsaid.empty()) and len(text) < MAX_TEXT // 2:
            part = await self._unsaid.get()
            self._ended = part is None
            text += part or ""
        return text


# == Services ==========================================================================================================


class Services:
    """The speech services as an engine uses them: whose key pays, where they are, what they are reached through.

    `configured` gives a service's key, if there is one, and its base URL. `own_keys` as for the engine.
    """

    def __init__(
        self,
        configured: Callable[[SpeechAdapter], tuple[Secret | None, str]],
        timeouts: Timeouts,
        *,
        own_keys: bool = True,
    ) -> None:
        self._places = {adapter.id: configured(adapter) for adapter in SPEECH.values()}
        self._own_keys = own_keys
        patient = replace(timeouts, idle=min(timeouts.idle, SILENT_SECONDS))
        self.transport = Transport(patient)
        self.sockets = Sockets(patient)
        self._transcripts = Transcripts()
        self._speaking: set[asyncio.Task[None]] = set()

    @property
    def available(self) -> dict[str, bool]:
        """Services, and whether there is a key for them."""
        return {id: key is not None for id, (key, _) in self._places.items()}

    def service(self, provider: str, *brought: Mapping[str, Secret]) -> Service:
        """A service with the key that pays: the first of those that the caller `brought`, by BYOK name, else our own.

        Raises `AuthenticationError` if there is none.
        """
        adapter, (own, base_url) = SPEECH[provider], self._places[provider]
        given = (keys[name] for keys in brought for name in adapter.byok if name in keys)
        if key := next(given, None):
            credential = Credential(key, own=True)
        elif own:
            credential = Credential(own, own=self._own_keys)
        else:
            where = " or ".join(adapter.key_env)
            message = f"no key for {provider}: set {where}, or bring one as provider_keys.{adapter.byok[0]}"
            raise AuthenticationError(message, provider=provider, code="no_provider_key")
        return Service(adapter, base_url, credential, self.transport, self.sockets)

    def hearing(
        self, settings: VoiceInput, *brought: Mapping[str, Secret], spent: providers.AudioSeconds | None = None
    ) -> Hearing:
        service = self.service(settings.provider, *brought)
        return Hearing(service, settings, self._transcripts, collections.defaultdict(float) if spent is None else spent)

    def speaker(
        self, settings: VoiceOutput, *brought: Mapping[str, Secret], spent: providers.AudioSeconds | None = None
    ) -> Speaker:
        service = self.service(settings.provider, *brought)
        return Speaker(service, settings, self._spawn, collections.defaultdict(float) if spent is None else spent)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that is let go of in its own time: a service is told that nobody listens any more."""
        task = asyncio.create_task(work)
        self._speaking.add(task)
        task.add_done_callback(self._speaking.discard)
        return task

    async def close(self) -> None:
        """Be silent, and hang up."""
        loop = asyncio.get_running_loop()
        tasks = [task for task in self._speaking if task.get_loop() is loop]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.transport.close()
        await self.sockets.close()
