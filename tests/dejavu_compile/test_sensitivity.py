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
from dejavu_compile.sensitivity import head_costs


def recorded(model, batches):
    return collect(
        model, batches, max_tokens=10**6, progress=lambda *_: None, kinds=(SiteKind.ATTENTION,)
    )


def measured(model, batches, seed=3):
    """The recordings, and costs [layers, tokens, units]."""
    found = recorded(model, batches)
    result = head_costs(model, batches, found, seed=seed, progress=lambda *_: None)
    return found, torch.stack(result)


def by_hooks(model, batches, units, seed=3):
    """(d log p / d gate)^2, [layers, tokens, units], in eager mode."""
    outputs, gates = [out for _, out in projections(model)], {}

    def gate(number):
        def hook(module, args):
            heads = args[0].unflatten(-1, (units, -1))
            gates[number] = torch.ones_like(heads[..., :1]).requires_grad_()
            return ((heads * gates[number]).flatten(-2),)

        return hook

    handles = [out.register_forward_pre_hook(gate(i)) for i, out in enumerate(outputs)]
    generator, squares = torch.Generator().manual_seed(seed), []
    for batch in batches:
        prediction = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        at = torch.rand(len(prediction), 1, generator=generator)
        drawn = (prediction.exp().cumsum(-1) < at).sum(-1, keepdim=True)
        loss = prediction.gather(1, drawn.clamp(max=prediction.shape[1] - 1)).sum()
        gradients = torch.autograd.grad(loss, [gates[i] for i in range(len(outputs))])
        squares.append(torch.stack([g.square().squeeze(-1).flatten(0, 1) for g in gradients]))
    for handle in handles:
        handle.remove()
    return torch.cat(squares, dim=1)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_gradients_are_those_of_gates_on_the_eager_model(name):
    model = tiny(name)
    batches = check_batches(model, [text(seed) for seed in (1, 2)])
    found, result = measured(model, batches)
    fisher = by_hooks(model, batches, found[0].site.units).double()
    contributions = torch.stack([r.stacked("hidden").double().square() for r in found])
    estimate = contributions * fisher.mean(1, True) / contributions.mean(1, True)
    expected = (fisher + estimate) / (fisher + estimate).mean()
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_a_head_that_adds_nothing_costs_nothing():
    model = tiny("opt")
    with torch.no_grad():
        _, out = projections(model)[0]
        width = out.in_features // model.config.num_attention_heads
        out.weight[:, :width] = 0
    _, result = measured(model, check_batches(model, [text(1)]))
    assert result.isfinite().all()
    assert (result[0, :, 0] == 0).all()
    assert (result[0, :, 1:].mean(0) > 0).all()


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


def test_without_gradients_contributions_of_each_layer_count_alike(monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("derivative for aten::_int_mm is not implemented")

    model = tiny("opt")
    monkeypatch.setattr(sensitivity.torch.autograd, "grad", refuse)
    with caplog.at_level(logging.WARNING):
        found, result = measured(model, check_batches(model, [text(1)]))
    contributions = torch.stack([r.stacked("hidden").float().square() for r in found])
    torch.testing.assert_close(result, contributions / contributions.mean((1, 2), keepdim=True))
    assert "aten::_int_mm" in caplog.text
