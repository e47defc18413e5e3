"""Labelled sound to try detectors on: speech by espeak-ng with the moments at which it starts and ends, and noise.

Everything is made here, is the same at every run, and is PCM as live.py's detectors take it: 16 kHz, 16-bit, mono.
Needs `espeakng-loader`, which brings espeak-ng along as a library, and voice.py; numpy is not needed.
"""

from __future__ import annotations

import array
import ctypes
import functools
import itertools
import math
import operator
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from voice import resample

try:
    import espeakng_loader
except ImportError:
    espeakng_loader = None

RATE = 16_000
NORMAL, QUIET = -26.0, -38.0  # dBFS while somebody is speaking
SENTENCES = (
    "Yes.",
    "No, stop.",
    "I would like to book a flight to Paris.",
    "What is the weather like tomorrow?",
    "Wait a moment, please.",
    "Could you tell me how long that takes?",
    "My number is four seven one, two two nine.",
    "Thanks, that is all I wanted to know.",
    "Uh, and then we could have lunch.",
    "Sixteen ships sailed south on Sunday.",
    "Okay.",
    "Please send it to my sister instead.",
)
VOICES = ("en-us", "en-us+f2", "en-us+m3", "en-gb-x-rp", "en-gb-x-rp+f4", "en-gb-scotland", "en-us+m7", "en-029+f5")

Samples: TypeAlias = "array.array[int]"


@dataclass(frozen=True)
class Clip:
    """Sound, and where in it somebody speaks: (start, end) in samples."""

    samples: Samples
    speech: tuple[tuple[int, int], ...]

    @property
    def pcm(self) -> bytes:
        return packed(self.samples)

    @property
    def seconds(self) -> float:
        return len(self.samples) / RATE


def packed(samples: Samples) -> bytes:
    if sys.byteorder == "big":
        samples = samples[:]
        samples.byteswap()
    return samples.tobytes()


def unpacked(pcm: bytes) -> Samples:
    samples = array.array("h", pcm)
    if sys.byteorder == "big":
        samples.byteswap()
    return samples


def level(samples: Sequence[float]) -> float:
    """Root mean square, on the scale of 16-bit samples."""
    return math.hypot(*samples) / math.sqrt(len(samples)) if samples else 0.0


def loudness(dbfs: float) -> float:
    return float(32768 * 10 ** (dbfs / 20))


def scaled(samples: Sequence[float], factor: float) -> Samples:
    try:
        return array.array("h", [round(value * factor) for value in samples])
    except OverflowError:
        return array.array("h", (max(-32768, min(32767, round(value * factor))) for value in samples))


def at_level(samples: Sequence[float], dbfs: float) -> Samples:
    return scaled(samples, loudness(dbfs) / level(samples))


def mixed(first: Samples, second: Samples) -> Samples:
    """Both at once, as long as the first; the second is repeated as often as need be."""
    try:
        return array.array("h", map(operator.add, first, itertools.cycle(second)))
    except OverflowError:
        sums = map(operator.add, first, itertools.cycle(second))
        return array.array("h", (max(-32768, min(32767, value)) for value in sums))


# == Speech ============================================================================================================


@functools.cache
def _espeak() -> tuple[ctypes.CDLL, int]:
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = os.path.dirname(espeakng_loader.get_data_path()).encode()
    rate = library.espeak_Initialize(2, 0, data, 0)  # AUDIO_OUTPUT_SYNCHRONOUS
    if rate <= 0:
        raise RuntimeError("espeak-ng does not start")
    return library, rate


@functools.cache
def spoken(text: str, voice: str = "en-us", speed: int = 170) -> Samples:
    """This text as the voice says it, at the level `NORMAL`, with no silence around it."""
    library, rate = _espeak()
    pieces: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)  # type: ignore[untyped-decorator, unused-ignore]
    def take(wav: int | None, count: int, events: int) -> int:
        if wav and count:
            pieces.append(ctypes.string_at(wav, 2 * count))
        return 0

    library.espeak_SetSynthCallback(take)
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"espeak-ng has no voice {voice}")
    library.espeak_SetParameter(1, speed, 0)
    data = text.encode()
    library.espeak_Synth(data, len(data) + 1, 0, 1, 0, 1, None, None)  # from character 0; the text is UTF-8
    samples = unpacked(resample(b"".join(pieces), rate, RATE))
    windows = [level(samples[at : at + 160]) for at in range(0, len(samples) - 159, 160)]
    audible = max(windows) * 10 ** (-32 / 20)
    heard = [number for number, value in enumerate(windows) if value > audible]
    samples = samples[160 * heard[0] : 160 * (heard[-1] + 1)]
    active = math.sqrt(sum(value**2 for value in windows if value > audible) / len(heard))
    return scaled(samples, loudness(NORMAL) / active)


def conversation(count: int = 8, dbfs: float = NORMAL, seed: int = 0, lead: float = 1.5) -> Clip:
    """One speaker, `count` utterances with 0.8 to 2 seconds between them, in a silent room."""
    rng = random.Random(seed)
    voice = VOICES[seed % len(VOICES)]
    texts = itertools.islice(itertools.cycle(SENTENCES), seed, seed + count)
    samples, speech = array.array("h", bytes(2 * round(lead * RATE))), []
    for text in texts:
        words = scaled(spoken(text, voice), 10 ** ((dbfs - NORMAL) / 20))
        speech.append((len(samples), len(samples) + len(words)))
        samples += words
        samples.frombytes(bytes(2 * round(rng.uniform(0.8, 2.0) * RATE)))
    return Clip(samples, tuple(speech))


# == Noise =============================================================================================================


def _lowpass(values: Sequence[float], cutoff: float) -> list[float]:
    share = 1 - math.exp(-2 * math.pi * cutoff / RATE)
    return list(itertools.accumulate(values, lambda last, value: last + share * (value - last)))


def _tones(frequencies: Sequence[float], count: int) -> list[float]:
    sines = [[math.sin(2 * math.pi * f * i / RATE) for i in range(count)] for f in frequencies]
    return [sum(values) for values in zip(*sines, strict=True)]


def _white(rng: random.Random, count: int) -> list[float]:
    return [float(value) for value in array.array("h", rng.randbytes(2 * count))]


def _fan(rng: random.Random, count: int) -> list[float]:
    """Rumble and rush, and the hum of its motor."""
    rumble = _lowpass(_lowpass(_white(rng, count), 200), 400)
    rush = _lowpass(_white(rng, count), 1500)
    hum = _tones((120, 240), count)
    parts = ((rumble, 1.0), (rush, 0.25), (hum, 0.35))
    factors = [share / level(part) for part, share in parts]
    return [a * factors[0] + b * factors[1] + c * factors[2] for a, b, c in zip(rumble, rush, hum, strict=True)]


def _keyboard(rng: random.Random, count: int) -> list[float]:
    """About six keys a second: a click going down, a softer one going up."""
    out, at = [0.0] * count, 0
    while (at := at + int(rng.uniform(0.06, 0.3) * RATE)) < count - 3200:
        for start, size in ((at, rng.uniform(0.6, 1)), (at + int(rng.uniform(0.05, 0.1) * RATE), 0.4)):
            for i in range(400):
                out[start + i] += size * rng.uniform(-1, 1) * math.exp(-i / 80)
    return out


def _music(rng: random.Random, count: int) -> list[float]:
    """Chords and a bass, struck anew every half second; each note has overtones and dies away."""
    out = [0.0] * count
    for start in range(0, count, RATE // 2):
        root = 110 * 2 ** (rng.choice((0, 3, 5, 7, 10)) / 12)
        notes = [root * 2 ** (step / 12) for step in (0, 12, 16, 19)]
        partials = [(note * n, 1 / n) for note in notes for n in (1, 2, 3)]
        length = min(RATE // 2, count - start)
        for frequency, size in partials:
            turn, phase = 2 * math.pi * frequency / RATE, rng.uniform(0, 6)
            for i in range(length):
                out[start + i] += size * math.sin(turn * i + phase) * math.exp(-i / 5000)
    return out


def _babble(rng: random.Random, count: int) -> list[float]:
    """Six people talking at once, each without a pause."""
    out = [0.0] * count
    for talker, voice in enumerate(VOICES[:6]):
        words = [*SENTENCES[talker * 2 :], *SENTENCES[: talker * 2]]
        stream = list(itertools.islice(itertools.chain.from_iterable(spoken(text, voice) for text in words), count))
        out = [a + b for a, b in zip(out, itertools.cycle(stream), strict=False)]
    return out


NOISES = {"white": _white, "fan": _fan, "keyboard": _keyboard, "music": _music, "babble": _babble}


@functools.cache
def noise(kind: str, dbfs: float, seconds: float = 4.0) -> Samples:
    return at_level(NOISES[kind](random.Random(kind), round(seconds * RATE)), dbfs)


def noisy(clip: Clip, kind: str, snr: float, dbfs: float = NORMAL) -> Clip:
    """The clip with this noise all through it, so much below speech that is at `dbfs`."""
    return Clip(mixed(clip.samples, noise(kind, dbfs - snr)), clip.speech)


def alone(kind: str, dbfs: float, seconds: float) -> Clip:
    """Noise that nobody speaks in."""
    return Clip(array.array("h", itertools.islice(itertools.cycle(noise(kind, dbfs)), round(seconds * RATE))), ())


# == Echo ==============================================================================================================


def echo(played: Samples, db: float, delay: float, seed: int = 0) -> Samples:
    """What a microphone hears of this: through a small loudspeaker (300 Hz to 3.4 kHz), late, with a short reverb."""
    rng = random.Random(seed)
    thin = _lowpass(played, 3400)
    thin = [value - low for value, low in zip(thin, _lowpass(thin, 300), strict=True)]
    late = round(delay * RATE)
    out = [0.0] * late + thin
    for tap in range(12):
        shift, size = late + round(rng.uniform(0.003, 0.09) * RATE), rng.uniform(-0.5, 0.5) * math.exp(-tap / 5)
        for i, value in enumerate(thin[: len(out) - shift]):
            out[shift + i] += size * value
    out = out[: len(played)]
    loud = [value for value in played if value]
    heard = level(out) * math.sqrt(len(out) / max(1, len(loud)))
    return scaled(out, level(loud) * 10 ** (db / 20) / heard)


def available() -> bool:
    return espeakng_loader is not None
