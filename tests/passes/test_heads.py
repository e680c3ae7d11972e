"""Attention sites: selected heads equal eager attention with the other heads' columns of W_O zeroed."""

import pytest
import torch
from tiny import EVERY_NAME, text, tiny
from torch import fx
from transformers import DynamicCache, StaticCache

from dejavu_compile.passes.find_sites import find_sites
from dejavu_compile.passes.gemv import use_gemv
from dejavu_compile.passes.normalize import normalize
from dejavu_compile.passes.rewrite import rewrite
from dejavu_compile.passes.site import (
    Decision,
    Execution,
    Policy,
    PredictorWeights,
    SiteKind,
)

ops = torch.ops.dejavu
STEPS = 64
PROMPT = 9


class Recorder(fx.Interpreter):
    """Runs a rewritten graph and keeps each site's selection, in graph order."""

    def __init__(self, gm, scores):
        super().__init__(gm)
        self.scores, self.seen = scores, []

    def run_node(self, node):
        value = super().run_node(node)
        if node in self.scores:
            self.seen.append((self.scores[node], value > 0))
        return value


class SelectingHeads:
    """A backend that rewrites every attention site but the first with a random predictor."""

    def __init__(self, execution=Execution.GATHERED):
        self.execution, self.recorder, self.sites = execution, None, []

    def __call__(self, gm, example_inputs, **_):
        normalize(gm, example_inputs)
        self.sites = [s for s in find_sites(gm).sites if s.kind is SiteKind.ATTENTION]
        decisions = []
        for number, (source, site) in enumerate(zip(self.sites, self.sites[1:], strict=False)):
            generator = torch.Generator().manual_seed(number)
            width = source.input.meta["val"].shape[-1]
            up = torch.randn(site.units, width, generator=generator)
            predictor = PredictorWeights(None, up, torch.zeros(site.units))
            decisions.append(
                Decision(site, Policy.PREDICT, self.execution, source.input, predictor)
            )
        rewrite(gm, tuple(decisions))
        names = [d.site.name for d in decisions]
        use_gemv(gm, max_tokens=3)
        attentions = gm.graph.find_nodes(
            op="call_function", target=ops.decode_attention_cpu.default
        )
        self.recorder = Recorder(
            gm, {n.args[6]: name for n, name in zip(attentions, names, strict=False)}
        )
        self.targets = [str(n.target) for n in gm.graph.nodes]
        return lambda *args: self.recorder.run(*args)


def zeroing(model, kept):
    """Hooks: the output projection of each named weight sees the kept heads only."""

    def hook(keep):
        def zero(module, args):
            heads = args[0].unflatten(-1, (keep.shape[-1], -1))
            return ((heads * keep.view(*heads.shape[:-1], 1)).flatten(-2),)

        return zero

    return [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook(keep))
        for name, keep in kept
    ]


def caches(model, kind, batch):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=PROMPT + STEPS + 1)


# Both batches and both caches for every model, all four pairs for these
CROSSED = ("opt", "llama", "gemma2", "bloom", "mpt")
CASES = [
    (name, batch, kind)
    for name in EVERY_NAME
    for batch, kind in ((1, "dynamic"), (3, "static"), (1, "static"), (3, "dynamic"))
    if (kind == "static") == (batch == 3) or name in CROSSED
]


@pytest.mark.parametrize(("name", "batch", "kind"), CASES)
def test_decode_equals_eager_with_other_heads_zeroed(name, batch, kind):
    backend = SelectingHeads()
    compare_with_eager(backend, name, batch, kind, STEPS)
    # OLMo-2 normalises all heads' queries together: every query needs every row.
    owned = [n for n in backend.recorder.module.graph.nodes if n.target is ops.gemv.default
             and len(n.args) > 4]  # fmt: skip
    assert len(owned) == (0 if name == "olmo2" else 1)
    assert backend.targets.count("dejavu.head_sum.default") == 1
    assert backend.targets.count("dejavu.decode_attention_cpu.default") == 1


@pytest.mark.parametrize("name", ["opt", "llama", "bloom", "gemma2"])
def test_batch_of_16_reads_the_cache_of_selected_heads_only(name):
    backend = SelectingHeads(Execution.CACHE)
    compare_with_eager(backend, name, batch=16, kind="dynamic", steps=8)
    assert backend.targets.count("dejavu.head_sum.default") == 0
    assert backend.targets.count("dejavu.decode_attention_cpu.default") == 1


def compare_with_eager(backend, name, batch, kind, steps):
    if kind == "static" and name in ("bloom", "mpt"):
        pytest.skip(f"transformers' {name} has no static cache")
    more = {"max_position_embeddings": 128} if name == "opt" else {}
    model = tiny(name, layers=2, **more)
    sparse = torch.compile(model.forward, backend=backend)
    ours, theirs = caches(model, kind, batch), caches(model, kind, batch)
    fractions = []
    with torch.no_grad():
        prompt = text(0, batch, PROMPT)
        for cache in (ours, theirs):
            model.forward(prompt, past_key_values=cache)
        for step in range(steps):
            token, at = text(step, batch, 1), {}
            if (
                name == "opt" and kind == "static"
            ):  # as generate() does: else Dynamo breaks the graph
                mask = torch.arange(PROMPT + STEPS + 1) <= PROMPT + step
                at = {"position_ids": torch.full((batch, 1), PROMPT + step),
                      "attention_mask": mask.expand(batch, 1, 1, -1)}  # fmt: skip
            got = sparse(token, past_key_values=ours, **at).logits
            seen, backend.recorder.seen = backend.recorder.seen, []
            assert [n for n, _ in seen] == [s.name for s in backend.sites[1:]]
            fractions.append(torch.stack([keep.float().mean() for _, keep in seen]).mean())
            hooks = zeroing(model, seen)
            want = model.forward(token, past_key_values=theirs, **at).logits
            for hook in hooks:
                hook.remove()
            assert (got - want).abs().max() <= 1e-5 * want.abs().max(), f"step {step}"
    assert 0.2 < torch.stack(fractions).mean() < 0.8
