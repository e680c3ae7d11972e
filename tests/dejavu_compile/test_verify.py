"""The two-pass existence check, against hooks on the eager model."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import text, texts, tiny

import dejavu_compile as dv
from dejavu_compile.errors import CalibrationError, ModelStateError, OptionError

LAYERS = 3


def found(verification, kind, selector, density, layer=-1):
    wanted = (kind, layer, selector, density)
    (row,) = [
        e for e in verification.existence if (e.kind, e.layer, e.selector, e.density) == wanted
    ]
    return row.quality


@pytest.fixture(scope="module", params=["opt", "llama"])
def verified(request):
    model, batches = tiny(request.param, layers=LAYERS), texts(2)
    return model, batches, dv.verify(model, batches, (0.1, 0.5, 1.0), progress=False)


def neurons(model):
    """The output projection of each MLP."""
    inner = model.model
    if hasattr(inner, "decoder"):
        return [layer.fc2 for layer in inner.decoder.layers]
    return [layer.mlp.down_proj for layer in inner.layers]


@torch.no_grad()
def two_passes(model, ids, density):
    """Perplexity with the units that matter most to each token in a dense pass, by hooks."""
    chosen, handles = {}, []

    def remember(module, args):
        score = args[0].abs() * module.weight.norm(dim=0)
        order = score.argsort(dim=-1, descending=True)
        mask = torch.zeros_like(score)
        chosen[module] = mask.scatter(-1, order[..., : round(density * score.shape[-1])], 1.0)

    for module in neurons(model):
        handles.append(module.register_forward_pre_hook(remember))
    model.forward(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    handles = [
        module.register_forward_pre_hook(lambda module, args: (args[0] * chosen[module],))
        for module in neurons(model)
    ]
    logits = model.forward(ids, use_cache=False).logits[:, :-1].double()
    for handle in handles:
        handle.remove()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_second_pass_equals_hooks_on_the_eager_model(verified, density):
    model, batches, verification = verified
    loss = sum(two_passes(model, ids, density) for ids in batches)
    tokens = sum(ids[:, 1:].numel() for ids in batches)
    quality = found(verification, "mlp", "contextual", density)
    assert quality.tokens == tokens
    assert quality.perplexity_sparse == pytest.approx(math.exp(loss / tokens), rel=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "attention", "both"])
@pytest.mark.parametrize("selector", ["contextual", "static", "random"])
def test_everything_selected_is_dense(verified, kind, selector):
    quality = found(verified[2], kind, selector, 1.0)
    assert quality.top1_agreement == 1.0
    assert quality.kl < 1e-6


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_what_a_token_needs_is_nearer_to_dense_than_what_all_need_or_chance(verified, density):
    kl = {s: found(verified[2], "mlp", s, density).kl for s in ("contextual", "static", "random")}
    assert kl["contextual"] < kl["static"] < 1.5 * kl["random"]


def test_every_layer_is_sparse_alone_too(verified):
    _, _, verification = verified
    alone = [(e.kind, e.layer) for e in verification.existence if e.layer >= 0]
    assert sorted(alone) == sorted((k, n) for k in ("mlp", "attention") for n in range(LAYERS))
    whole = found(verification, "mlp", "contextual", 0.1).kl
    assert all(found(verification, "mlp", "contextual", 0.1, n).kl < whole for n in range(LAYERS))


@torch.no_grad()
def test_residual_streams_are_those_of_the_model(verified):
    model, batches, verification = verified
    inner = model.model.decoder if hasattr(model.model, "decoder") else model.model
    after = {}
    for number, layer in enumerate(inner.layers):
        layer.register_forward_hook(
            lambda module, args, out, n=number: after.setdefault(n, []).append(
                (out[0] if isinstance(out, tuple) else out).flatten(0, -2)
            )
        )
    for ids in batches:
        model.forward(ids, use_cache=False)
    stream = [torch.cat(after[n]) for n in range(LAYERS)]
    got = {s.layer: s.residual for s in verification.similarity if s.kind == "mlp"}
    want = {
        n: F.cosine_similarity(stream[n], stream[n - 1]).mean().item() for n in range(1, LAYERS)
    }
    assert got == pytest.approx(want, rel=1e-4)


def test_recall_of_a_layer_that_sees_what_the_one_before_saw_is_one():
    """With nothing added in between, the earlier input is the input."""
    model = tiny("opt", layers=2)
    layers = model.model.decoder.layers
    for module in (layers[0].fc2, layers[1].self_attn.out_proj):
        torch.nn.init.zeros_(module.weight)
        torch.nn.init.zeros_(module.bias)
    (recall,) = [
        s.lookahead_recall for s in dv.verify(model, texts(1), (0.5,), progress=False).similarity
        if s.kind == "mlp"
    ]  # fmt: skip
    assert recall == pytest.approx(1.0, abs=1e-3)


def test_unions_grow_with_the_batch_and_stay_below_independent_choice(verified):
    unions = [u for u in verified[2].unions if u.kind == "mlp" and u.density == 0.1]
    assert [u.batch for u in unions] == [1, 2, 4, 8, 16, 32]
    shares = [u.union for u in unions]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(0.1, abs=0.01)
    assert all(u.union <= u.independent + 0.02 for u in unions)


def test_batches_of_different_shapes_and_padding():
    model, batches = tiny("opt"), [text(0), text(1, batch=2, length=20)]
    padded = torch.cat((text(2, batch=2, length=20), torch.zeros(2, 5, dtype=torch.long)), dim=1)
    mask = torch.ones_like(padded)
    mask[:, 20:] = 0
    batches.append({"input_ids": padded, "attention_mask": mask})
    verification = dv.verify(model, batches, (0.5, 1.0), kinds=("mlp",), progress=False)
    quality = found(verification, "mlp", "contextual", 1.0)
    assert quality.tokens == 4 * 47 + 2 * 19 + 2 * 19
    assert quality.kl < 1e-6


def test_what_is_attached_plays_no_part_and_stays():
    model = tiny("opt", layers=2)
    before = dv.verify(model, texts(1), (0.2,), progress=False)
    dv.calibrate(model, texts(), density=0.3, progress=False)
    assert dv.verify(model, texts(1), (0.2,), progress=False).to_dict() == before.to_dict()
    assert dv.evaluate(model, texts(1)).kl > 0


def test_table_and_picture(verified, tmp_path):
    matplotlib = pytest.importorskip("matplotlib.image")
    verification = verified[2]
    assert "contextual" in str(verification)
    assert len(verification.rows()) == len(verification.existence)
    verification.plot(tmp_path / "verification.png")
    assert matplotlib.imread(tmp_path / "verification.png").std() > 0.05


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"densities": (0.5, 1.5)}, "out of range"), ({"kinds": ("mlps",)}, "unknown kind 'mlps'")],
)
def test_bad_option_is_refused(arguments, words):
    with pytest.raises(OptionError, match=words):
        dv.verify(tiny("opt"), texts(1), progress=False, **arguments)


def test_training_mode_and_models_without_sites_are_refused():
    with pytest.raises(ModelStateError, match="training mode"):
        dv.verify(tiny("opt").train(), texts(1), progress=False)

    class Embedding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(64, 8)

        def forward(self, input_ids):
            return self.table(input_ids) @ self.table.weight.T

    with pytest.raises(CalibrationError, match="no site was found"):
        dv.verify(Embedding().eval(), [text(0) % 64], progress=False)


def test_nan_is_refused_and_named():
    model = tiny("opt")
    model.model.decoder.layers[1].fc1.bias.data[0] = float("nan")
    with pytest.raises(CalibrationError, match=r"layers\.1\.\S+ sees NaN"):
        dv.verify(model, texts(1), progress=False)
