"""Run `interpreted.py` in a process of its own: Triton decides at import whether to interpret."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run_kernels(interpret: str) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *["-n", "2" if interpret == "1" else "8"],
            HERE / "interpreted.py",
        ],
        env={**environment, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) > 50


@pytest.mark.interpret
def test_kernels_under_the_interpreter():
    run_kernels("1")


@pytest.mark.gpu
def test_kernels_on_the_gpu():
    run_kernels("0")
