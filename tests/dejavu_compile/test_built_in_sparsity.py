"""Sparsity that a model has by itself: proved exact by what keeps a zero a zero, and lossless."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import dejavu_compile as dv

PATTERN = (0.9, 0.5, 0.0)


@pytest.fixture
def gemma3n():
    """The text model, two layers of three with the Gaussian top-k of MatFormer's MLPs."""
    config = transformers.Gemma3nTextConfig(
        vocab_size=128, vocab_size_per_layer_input=128, hidden_size=64, hidden_size_per_layer_input=16,
        num_hidden_layers=3, num_kv_shared_layers=0, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=[96] * 3, activation_sparsity_pattern=list(PATTERN), laurel_rank=8, sliding_window=32,
        layer_types=["full_attention"] * 3, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma3nForCausalLM(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model


def test_gemma3n_is_exact_on_its_sparse_layers_and_lossless(gemma3n, prepared):
    report = dv.explain(gemma3n, torch.tensor([[5]]), use_cache=False)
    policies = {
        site.name: site.policy
        for site in report.sites
        if site.name.endswith("mlp.down_proj.weight")
    }
    assert len(policies) == len(PATTERN)
    prompt = torch.arange(3, 12)[None]
    settings = {
        "max_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    want = gemma3n.generate(prompt, **settings)
    forward = gemma3n.forward
    gemma3n.forward = torch.compile(forward, backend="dejavu_eager")
    got = gemma3n.generate(prompt, **settings)
    gemma3n.forward = forward
    assert torch.equal(got.sequences, want.sequences)
    for ours, theirs in zip(got.logits, want.logits, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    ran = {
        plan.site.name: str(plan.decision.policy)
        for plan in prepared[-1].plan.sites
        if plan.site.name in policies
    }
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]
    assert [ran[name] for name in names] == ["exact", "exact", "dense"]


ACTIVATIONS = {
    "relu": F.relu,
    "relu squared": lambda x: F.relu(x).square(),
    "relu times itself": lambda x: F.relu(x) * x,
    "cut off and bent": lambda x: F.gelu(
        F.relu(x - x.mean(-1, keepdim=True) - x.std(-1, keepdim=True))
    ),
    "dropped out in eval": lambda x: F.dropout(F.relu(x), 0.5, training=False),
    "scaled and cast": lambda x: (F.relu(x) * 3).to(torch.float64).to(x.dtype),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_zeros_are_followed_to_the_output(name, gated, prepared):
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(32, 80), nn.Linear(32, 80), nn.Linear(80, 32)

        def forward(self, x):
            h = ACTIVATIONS[name](self.gate(x))
            return self.down(h * self.up(x) if gated else h)

    torch.manual_seed(0)
    model, x = MLP().eval().requires_grad_(False), torch.randn(1, 1, 32)
    compiled = torch.compile(model, backend="dejavu_eager")
    for _ in range(2):  # the second finds the columns contiguous
        want = model(x)
        assert (compiled(x) - want).abs().max() <= 1e-5 * want.abs().max()
    # The cutoff of an MLP without a gate is made of all units: nothing is left to skip
    expected = [] if name == "cut off and bent" and not gated else ["exact"]
    assert [str(p.decision.policy) for p in prepared[-1].plan.sites] == expected


@pytest.mark.parametrize(
    "after", [torch.cos, torch.exp, lambda x: x + 1, lambda x: x - x.mean(-1, keepdim=True)]
)
def test_zeros_that_do_not_stay_zero_are_not_exact(after):
    model = nn.Sequential(nn.Linear(32, 80), nn.ReLU(), nn.Identity(), nn.Linear(80, 32))
    model[2].forward = after
    report = dv.explain(model.eval(), torch.randn(1, 1, 32))
    assert [site.policy for site in report.sites] in ([], ["dense"])
