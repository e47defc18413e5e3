"""`python live.py`: a conversation at the terminal, tried with a recording in place of the microphone."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import KEY, ROOT, Serve
from hypothesis import given
from hypothesis import strategies as st

import live
import sandbox as played
import voice


async def run(tmp_path: Path, *arguments: str, **environ: str) -> tuple[int | None, str, str]:
    """Exit code, standard output and standard error."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "live.py"), *arguments),
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, errors = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode, out.decode(), errors.decode()


def recorded(tmp_path: Path, text: str) -> str:
    (tmp_path / "said.wav").write_bytes(voice.wav(played.speech(text, 16_000), 16_000))
    return str(tmp_path / "said.wav")


def words_in(path: Path) -> str:
    sound = voice.read_wav(path.read_bytes())
    return " ".join(said.word for said in played.Ear(sound.sample_rate, iter(())).feed(sound.pcm))


@pytest.mark.parametrize("through", ["nothing", "a gateway"])
async def test_a_conversation(environ: dict[str, str], serve: Serve, tmp_path: Path, through: str) -> None:
    """What was said and what was answered, line by line; with `-o` the answer's sound, from its first to its last."""
    if through == "a gateway":
        environ = {"VAI_BASE_URL": (await serve(live={"detector": "energy"})).url, "VAI_API_KEY": KEY}
    wav = recorded(tmp_path, "[say Of course.]")
    code, out, errors = await run(tmp_path, "-m", "openai/gpt-4o", "--wav", wav, "-o", "spoken.wav", **environ)
    assert (code, errors) == (0, "")
    assert out == "you: [say Of course.]\nopenai/gpt-4o: Of course.\n"
    assert words_in(tmp_path / "spoken.wav") == "Of course."


async def test_an_error_of_the_provider(environ: dict[str, str], tmp_path: Path) -> None:
    """One line on standard error; what is the end is exit code 1."""
    wav = recorded(tmp_path, "Hello.")
    environ["CARTESIA_API_KEY"] = "bad-key"
    code, out, errors = await run(tmp_path, "-m", "openai/gpt-4o", "--wav", wav, **environ)
    assert (code, out, errors.count("\n")) == (1, "", 1)
    assert errors.startswith("vai: cartesia: ")


async def test_a_conversation_that_is_ended(serve: Serve, tmp_path: Path) -> None:
    """The user is told why, and so is the shell."""
    gateway = await serve(live={"detector": "energy", "max_duration": 1})
    environ = {"VAI_BASE_URL": gateway.url, "VAI_API_KEY": KEY}
    wav = recorded(tmp_path, "[wait 5]")
    code, _, errors = await run(tmp_path, "-m", "openai/gpt-4o", "--wav", wav, **environ)
    assert (code, errors) == (1, "vai: the conversation was ended: max_duration\n")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "live.py: which model?"),
        (["-m", "openai/gpt-4o", "-o", "x.wav"], 2, "live.py: --output needs --wav"),
        (["-m", "openai/gpt-4o", "--wav", "missing.wav"], 1, "missing.wav"),
        (["-m", "openai/gpt-4o", "--wav", "no.wav"], 2, "not a WAV file"),
        (["-m", "gpt-4o", "--wav", "good.wav"], 2, "provider/model"),
    ],
)
async def test_wrong_usage(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    (tmp_path / "no.wav").write_bytes(b"no sound")
    (tmp_path / "good.wav").write_bytes(voice.wav(bytes(3200), 16_000))
    got, out, errors = await run(tmp_path, *arguments)
    assert (got, out, errors.count("\n")) == (code, "", 1)
    assert says in errors


@pytest.mark.parametrize("fake", ["", "raise OSError('PortAudio library not found')", "DEVICES"])
async def test_no_sound_here(tmp_path: Path, fake: str) -> None:
    """Without the library, without PortAudio or without a device: one line that says what would help."""
    none = "class PortAudioError(Exception): ...\ndef check_input_settings(**_): raise PortAudioError('no device\\n-1')"
    text = none if fake == "DEVICES" else fake or "raise ImportError"
    (tmp_path / "sounddevice.py").write_text(text)
    code, out, errors = await run(tmp_path, "-m", "openai/gpt-4o", PYTHONPATH=str(tmp_path))
    assert (code, out, errors.count("\n")) == (1, "", 1)
    assert "--wav FILE" in errors


@given(st.lists(st.tuples(st.sampled_from(["feed", "take", "pause", "resume"]), st.integers(0, 50)), max_size=40))
def test_the_loudspeaker_loses_nothing(steps: list[tuple[str, int]]) -> None:
    """Whatever is fed and taken, paused and resumed: what comes out is what went in, in order, with silence between."""
    speaker = live.Loudspeaker(16_000)
    speaker.start("r")
    fed, out, number = b"", b"", 0
    for step, count in steps:
        if step == "feed":
            fed += (piece := bytes(number + at & 127 | 128 for at in range(count)))
            number += count
            speaker.feed(piece)
        elif step == "take":
            taken = speaker.take(count)
            assert len(taken) == count
            out += taken.strip(b"\0")
        else:
            speaker.pause(step == "pause")
    speaker.pause(False)
    out += speaker.take(len(fed)).strip(b"\0")
    assert out == fed
    assert speaker.played == len(fed) / 32_000
    speaker.feed(b"late")
    speaker.flush()
    assert speaker.take(4) == bytes(4)


async def test_a_file_has_its_own_pace(tmp_path: Path) -> None:
    """The recording comes in real time, at a rate that a session takes, and then silence without end."""
    (tmp_path / "low.wav").write_bytes(voice.wav(b"\1\1" * 800, 8_000))
    file = live._SoundFile(str(tmp_path / "low.wav"), 24_000)
    assert file.sample_rate == 16_000
    pieces: asyncio.Queue[bytes] = asyncio.Queue()
    file.start(pieces.put_nowait, live.Loudspeaker(24_000))
    try:
        got = [await asyncio.wait_for(pieces.get(), 5) for _ in range(8)]
    finally:
        file.stop()
    assert {len(piece) for piece in got} == {640}
    assert any(got[4])
    assert not any(got[7])
