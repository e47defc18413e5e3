"""The modules: who imports whom, that each can be copied with no more than that, and what they make public."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
# Module: the siblings that it may import at its top, and those only inside a function.
MAY_IMPORT: dict[str, tuple[set[str], set[str]]] = {
    "providers": (set(), set()),
    "sandbox": (set(), set()),
    "vai": ({"providers"}, {"voice", "live"}),
    "voice": ({"providers"}, set()),
    "live": ({"providers", "voice"}, {"vai"}),
    "server": ({"live", "providers", "vai", "voice"}, {"sandbox"}),
}
# The core dependencies with what they bring along, as far as it may be installed.
PYDANTIC = r"pydantic(_core)?|annotated_types|typing_\w+"
AIOHTTP = r"aio\w+|attrs?|frozenlist|idna|multidict|propcache|yarl|typing_\w+|brotli\w*|cryptography|_?cffi\w*"
NEEDS = {"sandbox": AIOHTTP, "server": f"{PYDANTIC}|{AIOHTTP}"} | dict.fromkeys(
    ("providers", "vai", "voice", "live"), PYDANTIC
)
SITE = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
modules = pytest.mark.parametrize("module", MAY_IMPORT)
layouts = pytest.mark.parametrize("package", ["", "pkg"], ids=["flat", "package"])


class Imported(NamedTuple):
    module: str
    relative: bool
    lazy: bool


def imports(tree: ast.Module) -> set[Imported]:
    """The modules that a file imports; lazily, those that it imports inside a function or for type checkers alone."""
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    inside |= {id(inner) for node in typing for statement in node.body for inner in ast.walk(statement)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module, bool(node.level))] if node.module else [(a.name, True) for a in node.names]
        else:
            continue
        found |= {Imported(name.partition(".")[0], relative, id(node) in inside) for name, relative in names}
    return found


@modules
def test_imports_point_one_way(module: str) -> None:
    """A module imports what its arrows reach, flat and relatively alike, and nothing that imports it."""
    found = imports(ast.parse((ROOT / f"{module}.py").read_text("utf-8")))
    siblings = {one for one in found if one.module in MAY_IMPORT and one.module != module}
    top, lazy = MAY_IMPORT[module]
    assert {one.module for one in siblings if not one.lazy} <= top
    assert {one.module for one in siblings} <= top | lazy
    assert {one.module for one in siblings if one.relative} == {one.module for one in siblings if not one.relative}
    assert {one.module for one in found if one.relative} <= set(MAY_IMPORT)


def test_every_module_is_packaged() -> None:
    """What lies at the top of the project is what gets installed; vai's version is that of its providers."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["py-modules"]
    assert set(listed) == set(MAY_IMPORT) == {path.stem for path in ROOT.glob("*.py")} - {"setup"}


@modules
def test_all_names_what_exists(module: str) -> None:
    """`__all__` has no name twice, none that is private, and none that is not there."""
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", [])
    assert len(names) == len(set(names))
    assert [name for name in names if name.startswith("_") or not hasattr(loaded, name)] == []
    if module == "vai":
        providers = importlib.import_module("providers")
        assert set(providers.__all__) < set(names)
        assert [name for name in providers.__all__ if getattr(loaded, name) is not getattr(providers, name)] == []


# == Copies ============================================================================================================


def copied(folder: Path, package: str, *names: str) -> Path:
    """These modules alone in a folder, or in a package inside of it."""
    target = folder / package
    target.mkdir(exist_ok=True)
    if package:
        (target / "__init__.py").touch()
    for name in names:
        (target / f"{name}.py").write_bytes((ROOT / f"{name}.py").read_bytes())
    return target


def python(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in this folder; warnings are errors there too."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "SYSTEMROOT", "TMPDIR")}
    environ = {**kept, "HOME": str(folder), "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", **environ}
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False)


LOOK = """
import importlib, json, sys
before = set(sys.modules)
importlib.import_module(sys.argv[1])
loaded = {name: getattr(module, "__file__", None) for name, module in sys.modules.items() if name not in before}
print(json.dumps(loaded))
"""


@layouts
@modules
def test_a_module_needs_no_more_than_it_names(tmp_path: Path, module: str, package: str) -> None:
    """Copied with the siblings that it imports, a module imports, with them alone and the core dependencies.

    What it may import lazily is not loaded; providers.py and vai.py load no web server either, nor aiohttp yet.
    """
    needed = {module, *MAY_IMPORT[module][0]}
    target = copied(tmp_path, package, *needed)
    run = python(tmp_path, "-c", LOOK, f"{package}.{module}".lstrip("."))
    assert (run.returncode, run.stderr) == (0, "")
    loaded: dict[str, Any] = json.loads(run.stdout)
    ours = {Path(path) for path in loaded.values() if path and Path(path).is_relative_to(tmp_path)}
    assert ours == {target / f"{name}.py" for name in needed} | ({target / "__init__.py"} if package else set())
    installed = {name.partition(".")[0] for name, path in loaded.items() if path and path.startswith(SITE)}
    assert [name for name in installed if not re.fullmatch(NEEDS[module], name)] == []


ASK = """
import asyncio
from {package}sandbox import Sandbox
from {package}vai import AsyncClient, Message

async def main():
    async with Sandbox() as sandbox:
        keys = dict.fromkeys(("anthropic", "gemini"), "any")
        async with AsyncClient(base_urls=sandbox.base_urls, provider_keys=keys) as client:
            message = await client.messages.create(model="anthropic/claude-sonnet-5-5", messages="[say Hello,]")
            async with client.messages.stream(model="gemini/gemini-3.5-flash", messages="[say you.]") as stream:
                print(message.text, (await stream.final()).text, isinstance(message, Message))

asyncio.run(main())
"""


@layouts
def test_copies_work(tmp_path: Path, package: str) -> None:
    """Client and sandbox, copied, talk to each other; in a package the types are the package's own."""
    copied(tmp_path, package, "providers", "vai", "sandbox")
    run = python(tmp_path, "-c", ASK.format(package=f"{package}." if package else ""))
    assert (run.stdout, run.stderr) == ("Hello, you. True\n", "")


SPEAK = """
import asyncio
from {package}providers import Credential, Secret, Transport
from {package}sandbox import Sandbox
from {package}voice import SPEECH, Service, Sockets, VoiceInput, VoiceOutput, read_recording

async def main():
    async with Sandbox() as sandbox:
        transport, sockets = Transport(), Sockets()
        credential = Credential(Secret("any-key"))
        service = Service(SPEECH["cartesia"], sandbox.base_urls["cartesia"], credential, transport, sockets)
        speech = await service.synthesize("Hello, you.", VoiceOutput())
        print((await service.transcribe(read_recording(speech.audio), VoiceInput())).text)
        await transport.close()
        await sockets.close()

asyncio.run(main())
"""


@layouts
def test_speech_works_without_the_client(tmp_path: Path, package: str) -> None:
    """voice.py and providers.py alone speak and listen."""
    copied(tmp_path, package, "providers", "voice", "sandbox")
    run = python(tmp_path, "-c", SPEAK.format(package=f"{package}." if package else ""))
    assert (run.stdout, run.stderr) == ("Hello, you.\n", "")


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        ("vai", ["models"], "anthropic"),
        ("server", ["--check-config"], "the configuration is good"),
        ("sandbox", ["--help"], "--port"),
    ],
)
def test_commands_run_from_a_package(tmp_path: Path, module: str, arguments: list[str], says: str) -> None:
    """`python -m pkg.vai` finds itself and its siblings."""
    copied(tmp_path, "pkg", *MAY_IMPORT)
    run = python(tmp_path, "-m", f"pkg.{module}", *arguments)
    assert (run.returncode, run.stderr) == (0, "")
    assert says in run.stdout


@layouts
@pytest.mark.parametrize(
    ("module", "other"), [("vai", "older"), ("voice", "older"), ("server", "older"), ("vai", "a stranger's")]
)
def test_another_providers_is_an_import_error(tmp_path: Path, package: str, module: str, other: str) -> None:
    """A copy of another age, or a stranger's module of that name, is told from ours, with the file it was found at."""
    target = copied(tmp_path, package, *MAY_IMPORT) / "providers.py"
    older = re.sub(r'(?m)^__version__ = ".*"$', '__version__ = "0.0.1"', target.read_text("utf-8"))
    target.write_text(older if other == "older" else "JSON = dict\n", "utf-8")
    run = python(tmp_path, "-c", f"import {package}.{module}" if package else f"import {module}")
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert str(target) in last
    assert ("0.0.1" in last) == (other == "older")
