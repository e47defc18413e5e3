"""The README's snippets run, against the sandbox."""

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from sandbox import Sandbox

ROOT = Path(__file__).parent.parent
SNIPPETS = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)


def test_there_are_snippets() -> None:
    """The fences are still where this test looks for them."""
    assert len(SNIPPETS) >= 6


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
async def test_snippet_runs(code: str) -> None:
    """Each runs as it stands, without a warning on standard error but for a client left open."""
    async with Sandbox() as sandbox:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-c", code),
            cwd=ROOT,
            env={**os.environ, **sandbox.environ},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        _, stderr = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, stderr.decode()) == (0, "")
