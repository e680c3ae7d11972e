"""A rewritten graph with units S equals the dense module with every other unit zeroed, for any S."""

import models
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from kernel_cases import sketch_inputs, sketch_oracle
from models import TOYS, UNITS
from strategies import specs

from dejavu_compile.kernels.nibbles import unpack
from dejavu_compile.passes.find_sites import find_sites
from dejavu_compile.passes.glu import as_glu
from dejavu_compile.passes.rewrite import rewrite
from dejavu_compile.passes.site import (
    Decision,
    Execution,
    NoSite,
    Policy,
    PredictorWeights,
    SketchWeights,
)

KEPT = {
    "none": [],
    "one": [3],
    "last": [UNITS - 1],
    "some": [0, 2, 3, 11, 17],
    "all": list(range(UNITS)),
}

EXECUTIONS = (Execution.GATHERED, Execution.MASKED)  # the third has no meaning for MLPs


def mask(units):
    keep = torch.zeros(UNITS, dtype=torch.bool)
    keep[units] = True
    return keep


def decide(make, at=-1):
    """A pass that rewrites one site, as `make(site)` says."""

    def run(gm):
        done = rewrite(gm, (make(find_sites(gm).sites[at]),))
        gm.graph.lint()
        return done

    return run


def rewritten(model, x, make):
    """The MLP's result and the recorder."""
    result, recorder = models.record(model, x, passes=(decide(make),))
    return models.first(result), recorder


def assert_only(model, x, keep, execution):
    got, _ = rewritten(model, x, lambda site: models.forced(site, keep, execution))
    models.assert_near(got, models.first(models.oracle(model, x, keep)))


@pytest.mark.parametrize("execution", EXECUTIONS)
@given(specs())
def test_equals_dense_with_the_other_units_zeroed(execution, spec):
    assert_only(spec.model(), spec.input(), spec.keep(), execution)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", ["conv1d", "interleaved_bias", "parallel", "escaping_up"])
def test_counts_none_one_some_all(name, kept, execution):
    assert_only(TOYS[name].make(), models.tokens(), mask(KEPT[kept]), execution)


@pytest.mark.parametrize("name", models.EXACT)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_exact_equals_dense(name, execution):
    model, x = TOYS[name].make(), models.tokens()
    got, recorder = rewritten(model, x, lambda site: Decision(site, Policy.EXACT, execution))
    models.assert_near(got, models.first(models.oracle(model, x)))
    assert ("dejavu.compact" in recorder.targets) == (execution is Execution.GATHERED)


@pytest.mark.parametrize("name", ["glu", "reglu", "chunked", "interleaved", "interleaved_bias"])
def test_gate_runs_units_that_any_token_selects(name):
    model, x = TOYS[name].make(), models.tokens()
    threshold = 0.2
    both = F.linear(x, model.up.weight, model.up.bias)
    gate = {
        "glu": lambda: model.gate(x),
        "reglu": lambda: model.gate(x),
        "chunked": lambda: both[..., :UNITS],
    }.get(name, lambda: both[..., ::2])()
    above = model.act(gate).abs() > threshold
    for execution, keep in (
        (Execution.GATHERED, above.any(dim=1, keepdim=True)),
        (Execution.MASKED, above),
    ):
        got, _ = rewritten(
            model, x, lambda site, e=execution: Decision(site, Policy.GATE, e, threshold=threshold)
        )
        assert 0 < keep.sum() < keep.numel()
        models.assert_near(got, models.oracle(model, x, keep))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_gate_of_dense_up(execution):
    model, x = models.EscapingUp(), models.tokens(count=1)
    keep = (F.silu(model.gate(x)) * model.up(x)).abs() > 0.05
    got, _ = rewritten(
        model, x, lambda site: Decision(site, Policy.GATE, execution, threshold=0.05)
    )
    models.assert_near(got, models.oracle(model, x, keep)[0])


SKETCHED = {
    "glu": lambda: models.Gated(width=32),
    "glu_bias": lambda: models.Gated(width=32, bias=True),
    "reglu": lambda: models.Gated(F.relu, width=32),
    "geglu": lambda: models.Gated(lambda x: F.gelu(x, approximate="tanh"), width=32),
    "chunked": lambda: models.Chunked(width=32, bias=True),
    "interleaved": lambda: models.Interleaved(width=32),
}


@pytest.mark.parametrize("name", SKETCHED)
def test_sketch_runs_units_that_any_token_selects(name):
    model, x = SKETCHED[name](), models.tokens(width=32)
    _, gate, up, numbers = sketch_inputs(UNITS, 32, 1, seed=3)
    sketch = SketchWeights(gate, up, numbers)
    act = (lambda g: g.clamp(min=0)) if name == "reglu" else model.act
    score = sketch_oracle(x.flatten(0, 1), gate, up, numbers, act).view(*x.shape[:-1], -1)
    above = score > score.quantile(0.7)
    threshold = ((score[above].min() + score[~above].max()) / 2).item()
    for execution, keep in (
        (Execution.GATHERED, above.any(dim=1, keepdim=True)),
        (Execution.MASKED, above),
    ):
        got, recorder = rewritten(
            model, x,
            lambda site, e=execution: Decision(
                site, Policy.SKETCH, e, threshold=threshold, sketch=sketch
            ),
        )  # fmt: skip
        assert 0 < keep.sum() < keep.numel()
        models.assert_near(got, models.oracle(model, x, keep))
        assert ("dejavu.sketch_score" in recorder.targets) == (execution is Execution.GATHERED)


@pytest.mark.parametrize("name", ["relu", "glu", "handspelled_gelu", "escaping_up", "parallel"])
def test_no_sketch_of_what_is_not_a_gated_pair_wide_enough(name):
    found = []
    models.record(
        TOYS[name].make(), models.tokens(),
        passes=(lambda gm: found.extend(as_glu(site) for site in find_sites(gm).sites),),
    )  # fmt: skip
    assert found and set(found) == {None}


def test_packed_predictor_runs_units_that_any_token_selects():
    model, x = models.Gated(width=24), models.tokens(width=24)
    generator = torch.Generator().manual_seed(0)
    down, up = (
        torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        for shape in ((8, 12), (UNITS, 4))
    )
    score = F.linear(F.linear(x, unpack(down).float()), unpack(up).float())
    bias = torch.full((UNITS,), -score.quantile(0.7).item())
    above = score + bias > 0
    for execution, keep in (
        (Execution.GATHERED, above.any(dim=1, keepdim=True)),
        (Execution.MASKED, above),
    ):
        got, _ = rewritten(
            model, x, lambda site, e=execution: Decision(
                site, Policy.PREDICT, e, site.input, PredictorWeights(down, up, bias)
            ),
        )  # fmt: skip
        assert 0 < keep.sum() < keep.numel()
        models.assert_near(got, models.oracle(model, x, keep))


def test_escaping_value_stays_dense():
    model, x = models.EscapingUp(), models.tokens()
    (_, up), _ = models.record(
        model, x, passes=(decide(lambda site: models.forced(site, mask([1]))),)
    )
    models.assert_near(up, models.oracle(model, x)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["relu", "glu_bias", "conv1d"])
@torch.no_grad()
def test_low_precision(name, dtype):
    model, x, keep = TOYS[name].make().to(dtype), models.tokens().to(dtype), mask(KEPT["some"])
    got, _ = rewritten(model, x, lambda site: models.forced(site, keep))
    assert got.dtype is dtype
    models.assert_as_exact_as(model(x, keep), got, models.oracle(model, x, keep))


def test_nan_is_not_hidden():
    model, x = models.Gated(), models.tokens()
    x[0, 1, 2] = float("nan")
    for decision in (
        lambda site: models.forced(site, mask([1])),
        lambda site: models.forced(site, mask([1]), Execution.MASKED),
        lambda site: Decision(site, Policy.GATE, Execution.GATHERED, threshold=1e9),
        lambda site: Decision(site, Policy.GATE, Execution.MASKED, threshold=1e9),
    ):
        got, _ = rewritten(model, x, decision)
        assert got[0, 1].isnan().all()


def test_nan_score_selects():
    model, x = models.Gated(), models.tokens()

    def poisoned(execution):
        def make(site):
            decision = models.forced(site, mask([]), execution)
            decision.predictor.bias[4] = float("nan")
            return decision

        return make

    for execution in EXECUTIONS:
        got, _ = rewritten(model, x, poisoned(execution))
        models.assert_near(got, models.oracle(model, x, mask([4])))


def test_gathered_reads_only_listed_rows():
    """The dense projections of the site are gone."""
    _, recorder = rewritten(
        models.Gated(), models.tokens(), lambda site: models.forced(site, mask([1]))
    )
    assert recorder.targets.count("dejavu.gathered_rows") == 2
    assert recorder.targets.count("dejavu.gathered_sum") == 1
    assert "aten.linear" not in recorder.targets


def test_chunked_weights_are_views():
    _, recorder = rewritten(
        models.Chunked(), models.tokens(), lambda site: models.forced(site, mask([1]))
    )
    rows = [n for n in recorder.gm.graph.nodes if models.op(n) == "dejavu.gathered_rows"]
    assert [n.args[1].meta["val"].shape[0] for n in rows] == [UNITS, UNITS]
    assert not {"aten.clone", "aten.contiguous", "aten.index"} & set(recorder.targets)


def test_dense_decision_leaves_every_node():
    done = []

    def run(gm):
        done.append(
            rewrite(
                gm,
                tuple(Decision(s, Policy.DENSE, Execution.GATHERED) for s in find_sites(gm).sites),
            )
        )

    _, recorder = models.record(models.Parallel(), models.tokens(), passes=(run,))
    assert not done[0].modified
    assert models.listing(recorder.gm) == recorder.before


def test_no_decisions_leave_every_node():
    _, recorder = models.record(
        models.Parallel(), models.tokens(), passes=(lambda gm: rewrite(gm, ()),)
    )
    assert models.listing(recorder.gm) == recorder.before


def test_metadata_matches_what_runs():
    """Each inserted node's `val` has the shape and dtype that running it gives."""
    shapes = []

    class Run(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                expected = n.meta["val"]
                shapes.append(n)
                assert (value.shape, value.dtype) == (expected.shape, expected.dtype), n
            return value

    for name in TOYS:
        model, x = TOYS[name].make(), models.tokens()
        calls = []

        def backend(gm, inputs, calls=calls):
            models.normalize(gm, inputs)
            decide(lambda site: models.forced(site, mask([1, 2])))(gm)
            calls.append(gm)
            return Run(gm).run

        with torch.no_grad():
            torch.compile(model, backend=backend)(x)
    assert shapes


class _InARow(torch.nn.Module):
    """Two MLPs, the second on the first's result, with `between` in between."""

    def __init__(self, between):
        super().__init__()
        self.one, self.two, self.between = models.Plain(), models.Plain(), between

    def forward(self, x, keep=None):
        return self.two(self.between(self.one(x, keep)), keep)


def in_a_row(between, keep):
    model, x = _InARow(between), models.tokens()

    def both(gm):
        sites = [site for site in find_sites(gm).sites if site.units == UNITS]
        assert len(sites) == 2
        rewrite(gm, tuple(models.forced(site, keep) for site in sites))

    got, recorder = models.record(model, x, passes=(both,))
    models.assert_near(got, models.oracle(model, x, keep))
    assert "aten.linear" not in recorder.targets


def test_mlps_in_a_row_with_a_norm_between():
    in_a_row(lambda x: F.layer_norm(x, (models.WIDTH,)), mask([2, 5]))


def test_mlps_in_a_row():
    in_a_row(lambda x: x, mask([2, 5]))


class _Three(torch.nn.Module):
    """Three projections: the second is the output of one site and the leaf of the next."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(UNITS, UNITS) for _ in range(3))

    def forward(self, x, keep=None):
        h = models.masked(F.relu(self.a(x)), keep)
        return self.c(models.masked(F.relu(self.b(h)), keep))


def test_a_projection_is_not_restricted_twice():
    """`b` is the output of the first site, so its rows can't be skipped for a second one."""
    model, x = _Three(), models.tokens(width=UNITS)

    def exact(gm):
        found = find_sites(gm)
        assert [site.name for site in found.sites] == ["b.weight"]
        assert NoSite.SHARED in {u.code for u in found.unmatched}
        rewrite(gm, tuple(Decision(s, Policy.EXACT, Execution.GATHERED) for s in found.sites))

    got, _ = models.record(model, x, passes=(exact,))
    models.assert_near(got, models.oracle(model, x, mask(range(UNITS))))


def test_two_layers_and_a_source_one_layer_ahead():
    model, x, keep = models.Decoder(), models.tokens(), mask([2, 5])

    def ahead(gm):
        one, two = find_sites(gm).sites
        rewrite(
            gm,
            (models.forced(one, mask(range(UNITS))), models.forced(two, keep, source=one.input)),
        )

    got, _ = models.record(model, x, passes=(ahead,))
    models.assert_near(got, models.oracle(model, x, keep))


def test_source_decides():
    """A predictor that copies one element of its source: the units follow the tokens' signs."""
    model, x = models.Plain(torch.tanh), models.tokens()

    def make(site):
        decision = models.forced(site, mask([]))
        decision.predictor.bias.zero_()
        decision.predictor.down[0, 0] = 1.0
        decision.predictor.up[:, 0] = torch.where(mask([0, 1, 2]), 1.0, -1.0)
        return decision

    x[..., 0] = 1.0
    got, _ = rewritten(model, x, make)
    models.assert_near(got, models.oracle(model, x, mask([0, 1, 2])))
    x[..., 0] = -1.0
    got, _ = rewritten(model, x, make)
    models.assert_near(got, models.oracle(model, x, ~mask([0, 1, 2])))
    x[0, 0, 0] = 1.0  # one token wants the first three, the others the rest: the union runs
    got, _ = rewritten(model, x, make)
    models.assert_near(got, models.oracle(model, x))
