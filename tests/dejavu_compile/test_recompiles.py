"""No more graphs than a dense compiler makes: growing caches, other batches, other prompts."""

import pytest
import torch
from tiny import text, tiny
from transformers import DynamicCache

from dejavu_compile._compat import compile_counters

WINDOW = {"mistral": {"sliding_window": 16}}


def growing_cache(model, forward):
    cache = DynamicCache(config=model.config)
    model(text(0, 1, 9), past_key_values=cache)
    for step in range(12):
        forward(text(step, 1, 1), past_key_values=cache)


def other_batches(model, forward):
    for batch in (1, 2, 3, 5):
        cache = DynamicCache(config=model.config)
        model(text(0, batch, 7), past_key_values=cache)
        forward(text(1, batch, 1), past_key_values=cache)


def other_prompts(model, forward):
    for length in (5, 9, 12, 17):
        forward(text(0, 1, length), use_cache=False)


@pytest.mark.parametrize(
    "use", [growing_cache, other_batches, other_prompts], ids=lambda u: u.__name__
)
@pytest.mark.parametrize("name", ["llama", "mistral"])
@torch.no_grad()
def test_no_more_graphs_than_aot_eager(name, use):
    """Nothing attached and no exact zeros: `exact` alone compiles once more, after laying weights out."""
    model = tiny(name, layers=1, **WINDOW.get(name, {}))
    made = {}
    for backend in ("aot_eager", "dejavu_eager"):
        torch.compiler.reset()
        before = compile_counters()["graphs"]
        use(model, torch.compile(model.forward, backend=backend))
        made[backend] = compile_counters()["graphs"] - before
    assert made["dejavu_eager"] <= made["aot_eager"]
