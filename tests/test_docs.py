"""The documents' Python blocks run, in order, and print what stands below them.

DEJAVU_UPDATE_DOCS=1 writes what they print into the documents.
"""

import contextlib
import io
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.S)


def run_blocks(text: str) -> list[tuple[str, str | None, str]]:
    """(code, expected output or None, actual output) of every block, in one namespace."""
    namespace: dict[str, object] = {"__name__": "__doc__"}
    results = []
    for code, expected in BLOCK.findall(text):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "<block>", "exec"), namespace)
        shown = "```text" in text[text.index(code) + len(code) :][:14]
        results.append((code, expected if shown else None, printed.getvalue()))
    return results


@pytest.mark.parametrize(
    "name", ["docs/how_it_works.md", pytest.param("README.md", marks=pytest.mark.slow)]
)
def test_blocks_print_what_the_document_shows(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    results = run_blocks(text)
    assert results
    if os.environ.get("DEJAVU_UPDATE_DOCS"):
        for code, expected, actual in results:
            if expected is not None:
                before = f"```python\n{code}```\n\n```text\n"
                text = text.replace(before + expected + "```", before + actual + "```")
        path.write_text(text, encoding="utf-8")
        return
    for code, expected, actual in results:
        if expected is not None:
            assert actual == expected, code
