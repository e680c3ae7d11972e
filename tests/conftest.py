"""What every test gets: the real package, hypothesis profiles, a fixed seed, a fresh compiler."""

import importlib.util
import os
import sys
from pathlib import Path

# Helpers are imported by name (`from strategies import ...`), so tests/ must be on the path; but then
# tests/dejavu_compile would pass for the package, as a namespace. Import the package first.
TESTS = str(Path(__file__).parent)
sys.path[:] = [entry for entry in sys.path if entry != TESTS]
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers already fill the cores
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import dejavu_compile  # noqa: E402, F401

sys.path.insert(0, TESTS)
# Tiny models with random weights have little to learn. (The package's `calibrate` is the function.)
sys.modules["dejavu_compile.calibrate"].FIT_STEPS = 60

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402

settings.register_profile("dev", deadline=None, max_examples=20)
settings.register_profile(
    "ci",
    deadline=None,
    max_examples=20,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
# The first failure as it is drawn, at once
settings.register_profile(
    "quick",
    deadline=None,
    max_examples=int(os.environ.get("EXAMPLES", "20")),
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
settings.register_profile("nightly", deadline=None, max_examples=500, print_blob=True)
# `--hypothesis-profile` comes later and wins
settings.load_profile("ci" if os.environ.get("CI") else "dev")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine, or this run, can't do."""
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs an NVIDIA GPU"
    # These set TRITON_INTERPRET=1 in a process of their own
    if importlib.util.find_spec("triton") is None:
        missing["interpret"] = "needs Triton"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same seed, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """A test that compiled leaves no graph, guard or recompile count to the next one."""
    yield
    # Without Dynamo loaded nothing has compiled, and resetting would load it
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def prepared(monkeypatch):
    """What our passes did with each graph, in order: also proof that the backend was reached."""
    backend = sys.modules["dejavu_compile.backend"]
    seen, run = [], backend.prepare

    def spy(*args, **kwargs):
        seen.append(run(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(backend, "prepare", spy)
    return seen
