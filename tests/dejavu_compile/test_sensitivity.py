"""How much a prediction depends on each unit, against gates that hooks put on the eager model."""

import logging

import pytest
import torch
from heads_oracle import projections
from tiny import text, tiny

from dejavu_compile import sensitivity
from dejavu_compile.artifact import attach_calibration, detach
from dejavu_compile.batches import check_batches
from dejavu_compile.calibrate import fit
from dejavu_compile.collect import collect
from dejavu_compile.evaluate import compare, masked
from dejavu_compile.kernels.nibbles import unpacked
from dejavu_compile.passes.site import SiteKind
from dejavu_compile.sensitivity import gate_sensitivities, head_costs, skipping_costs
from dejavu_compile.workdir import Memory


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


def mlp_gates(model, batch, seed):
    """In eager mode: d log p / d gate of each unit of each MLP, and what each MLP reads, [tokens, units or width]."""
    layers, gates, inputs, handles = model.model.decoder.layers, [], [], []

    def gate(module, args):
        gates.append(torch.ones_like(args[0]).requires_grad_())
        return (args[0] * gates[-1],)

    for layer in layers:
        handles.append(layer.fc2.register_forward_pre_hook(gate))
        handles.append(layer.fc1.register_forward_pre_hook(lambda _, a: inputs.append(a[0])))
    prediction = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    for handle in handles:
        handle.remove()
    at = torch.rand(len(prediction), 1, generator=torch.Generator().manual_seed(seed))
    drawn = (prediction.exp().cumsum(-1) < at).sum(-1, keepdim=True)
    loss = prediction.gather(1, drawn.clamp(max=prediction.shape[1] - 1)).sum()
    gradients = torch.autograd.grad(loss, gates)
    return [[v.detach().flatten(0, -2) for v in values] for values in (gradients, inputs)]


def test_skipping_costs_are_those_of_gates_on_the_eager_model():
    model = tiny("opt", layers=3, units=512)
    batches = check_batches(model, [text(seed) for seed in range(4)])
    options = {"seed": 3, "progress": lambda *_: None, "store": Memory()}
    found, _ = fit(model, batches, "predict", heads=False, lookahead=1, **options)
    records = found.sites[1:]
    result = skipping_costs(model, batches[:1], records, **options)
    gradients, inputs = mlp_gates(model, batches[0], seed=3)
    for number, (record, costs) in enumerate(zip(records, result, strict=True), start=1):
        p = record.predictor
        down, up = (unpacked(matrix).double() for matrix in (p.down, p.up))
        score = inputs[number - 1].double() @ down.T @ up.T
        score = score * p.scale.double() + p.bias.double()
        assert {cost.asked for cost in costs} > set(record.curve.densities)
        for cost in costs:
            runs = score > record.curve.at(cost.asked)
            expected = (gradients[number].double() * ~runs).sum(1).square().mean().item() / 2
            assert cost.density == pytest.approx(runs.double().mean().item(), abs=1e-4)
            assert cost.loss == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("policy", ["gate", "sketch"])
def test_skipping_costs_are_the_divergence_of_each_site_alone(policy):
    model = tiny("llama")
    batches = check_batches(model, [text(seed, batch=16) for seed in range(4)])
    options = {"seed": 0, "progress": lambda *_: None, "store": Memory()}
    found, _ = fit(model, batches, policy, heads=False, lookahead=1, **options)
    for record, costs in zip(
        found.sites, skipping_costs(model, batches, found.sites, **options), strict=True
    ):
        for cost in (cost for cost in costs if cost.asked in (0.7, 0.9)):
            attach_calibration(model, found.with_sites([record.at_density(cost.asked)]))
            kl = compare(model, batches, masked(model)).kl
            detach(model)
            assert cost.loss == pytest.approx(kl, rel=0.1)


def test_sensitivity_of_a_gate_is_that_of_the_eager_models_activation():
    model = tiny("llama")
    batches = check_batches(model, [text(seed) for seed in (1, 2)])
    found = gate_sensitivities(model, batches, seed=3, progress=lambda *_: None)
    assert list(found) == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    got = torch.stack(list(found.values()))

    gates, sums = {}, 0
    handles = [
        layer.mlp.act_fn.register_forward_hook(
            lambda module, args, out, i=i: gates.__setitem__(
                i, out.requires_grad_() if out.is_leaf else out
            )
        )
        for i, layer in enumerate(model.model.layers)
    ]
    generator = torch.Generator().manual_seed(3)
    for batch in batches:
        prediction = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        at = torch.rand(len(prediction), 1, generator=generator)
        drawn = (prediction.exp().cumsum(-1) < at).sum(-1, keepdim=True)
        loss = prediction.gather(1, drawn.clamp(max=prediction.shape[1] - 1)).sum()
        gradients = torch.autograd.grad(loss, [gates[i] for i in range(len(found))])
        sums = sums + torch.stack([g.double().square().flatten(0, 1).sum(0) for g in gradients])
    for handle in handles:
        handle.remove()
    expected = sums.sqrt()
    torch.testing.assert_close(got.double(), expected / expected.mean(), rtol=1e-3, atol=1e-5)


def test_without_gradients_gates_have_thresholds_of_their_own(monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("derivative for aten::_int_mm is not implemented")

    model = tiny("llama")
    batches = check_batches(model, [text(1)])
    monkeypatch.setattr(sensitivity.torch.autograd, "grad", refuse)
    with caplog.at_level(logging.WARNING):
        assert not gate_sensitivities(model, batches, seed=3, progress=lambda *_: None)
    assert "aten::_int_mm" in caplog.text
