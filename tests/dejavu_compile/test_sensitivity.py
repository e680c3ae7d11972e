"""How much a prediction depends on each head, against gates that hooks put on the eager model."""

import logging

import pytest
import torch
from heads_oracle import projections
from tiny import text, tiny

from dejavu_compile import sensitivity
from dejavu_compile.batches import check_batches
from dejavu_compile.collect import collect
from dejavu_compile.passes.site import SiteKind
from dejavu_compile.sensitivity import head_sensitivities


def recorded(model, batches):
    return collect(
        model, batches, max_tokens=10**6, progress=lambda *_: None, kinds=(SiteKind.ATTENTION,)
    )


def measured(model, batches, seed=3):
    found = recorded(model, batches)
    result = head_sensitivities(model, batches, found, seed=seed, progress=lambda *_: None)
    return found, torch.stack(result)


def by_hooks(model, batches, units, seed=3):
    """sum over tokens of (d log p / d gate)^2, [layers, units], in eager mode."""
    outputs, gates = [out for _, out in projections(model)], {}

    def gate(number):
        def hook(module, args):
            heads = args[0].unflatten(-1, (units, -1))
            gates[number] = torch.ones_like(heads[..., :1]).requires_grad_()
            return ((heads * gates[number]).flatten(-2),)

        return hook

    handles = [out.register_forward_pre_hook(gate(i)) for i, out in enumerate(outputs)]
    generator, total = torch.Generator().manual_seed(seed), 0.0
    for batch in batches:
        prediction = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        at = torch.rand(len(prediction), 1, generator=generator)
        drawn = (prediction.exp().cumsum(-1) < at).sum(-1, keepdim=True)
        loss = prediction.gather(1, drawn.clamp(max=prediction.shape[1] - 1)).sum()
        gradients = torch.autograd.grad(loss, [gates[i] for i in range(len(outputs))])
        total = total + torch.stack([g.square().sum((0, 1)).squeeze(-1) for g in gradients])
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_gradients_are_those_of_gates_on_the_eager_model(name):
    model = tiny(name)
    batches = check_batches(model, [text(seed) for seed in (1, 2)])
    found, result = measured(model, batches)
    units = found[0].site.units
    tokens = sum(b["input_ids"][:, 1:].numel() for b in batches)
    contributions = torch.stack([r.stacked("hidden").double().square().mean(0) for r in found])
    expected = (by_hooks(model, batches, units).double() / tokens / contributions).sqrt()
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_a_head_that_adds_nothing_has_no_sensitivity():
    model = tiny("opt")
    with torch.no_grad():
        _, out = projections(model)[0]
        width = out.in_features // model.config.num_attention_heads
        out.weight[:, :width] = 0
    _, result = measured(model, check_batches(model, [text(1)]))
    assert result.isfinite().all()
    assert result[0, 0] == 0
    assert (result[0, 1:] > 0).all()


def test_the_same_seed_gives_the_same_bits():
    model = tiny("llama")
    batches = check_batches(model, [text(1)])
    assert torch.equal(measured(model, batches, seed=5)[1], measured(model, batches, seed=5)[1])


def test_padding_counts_for_nothing():
    model = tiny("opt")
    ids = text(1, batch=2, length=24)
    padded = torch.cat((ids, ids.new_zeros(2, 8)), dim=1)
    mask = (torch.arange(32) < 24).long().expand(2, -1)
    _, plain = measured(model, check_batches(model, [{"input_ids": ids, "attention_mask": mask[:, :24]}]))  # fmt: skip
    _, got = measured(model, check_batches(model, [{"input_ids": padded, "attention_mask": mask}]))
    torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-6)


def test_without_gradients_all_heads_count_alike(monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("derivative for aten::_int_mm is not implemented")

    model = tiny("opt")
    monkeypatch.setattr(sensitivity.torch.autograd, "grad", refuse)
    with caplog.at_level(logging.WARNING):
        _, result = measured(model, check_batches(model, [text(1)]))
    assert (result == 1).all()
    assert "aten::_int_mm" in caplog.text
