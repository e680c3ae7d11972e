"""What a launcher runs with: its rule, or what is in force for its key."""

import sys

import pytest
import torch
from launched import operations
from torch._subclasses import FakeTensorMode

from dejavu_compile.kernels import tuning
from dejavu_compile.launches import KERNELS, arguments_of

NAMES = pytest.mark.parametrize("name", operations(1))
TOKENS = pytest.mark.parametrize("tokens", [1, 3], ids=["m1", "m3"])


class Recorded:
    """Stands for a kernel; keeps how it was launched."""

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.grid, self.constants = grid, kwargs

        return launch


def launched(op, args, config=None):
    kernel = Recorded()
    KERNELS[op].launch(kernel, arguments_of(op, args), config)
    return kernel.grid, kernel.constants


def test_the_rule_holds_outside_and_after_an_error():
    rule = {"BLOCK_J": 2}
    with pytest.raises(KeyError), tuning.in_force({"a": {"BLOCK_J": 4}}):
        assert tuning.config_for("a", rule) == {"BLOCK_J": 4}
        assert tuning.config_for("b", rule) == rule
        raise KeyError
    assert tuning.config_for("a", rule) == rule


def test_a_launcher_may_change_what_it_gets():
    table, rule = {"a": {"splits": 4}}, {"splits": 2}
    with tuning.in_force(table):
        tuning.config_for("a", rule).pop("splits")
        tuning.config_for("b", rule).pop("splits")
    assert (table, rule) == ({"a": {"splits": 4}}, {"splits": 2})


def test_the_innermost_table_counts():
    with tuning.in_force({"a": {"splits": 4}}):
        with tuning.in_force({"a": {"splits": 8}}):
            assert tuning.config_for("a", {}) == {"splits": 8}
        assert tuning.config_for("a", {}) == {"splits": 4}


@NAMES
@TOKENS
def test_a_launcher_asks_with_the_key_that_a_graph_gives(name, tokens):
    op, *args = operations(tokens)[name]
    kernel, arguments = KERNELS[op], arguments_of(op, args)
    rule, *others = kernel.candidates(arguments)
    before = launched(op, args)
    assert before == launched(op, args, rule)
    for config in others:
        with tuning.in_force({kernel.key(arguments): config}):
            assert launched(op, args) == launched(op, args, config)
        with tuning.in_force({kernel.key(arguments) + " ": config}):
            assert launched(op, args) == before


@NAMES
@TOKENS
def test_what_is_asked_for_beats_what_is_in_force(name, tokens):
    op, *args = operations(tokens)[name]
    rule, other, *_ = KERNELS[op].candidates(arguments_of(op, args))
    with tuning.in_force({KERNELS[op].key(arguments_of(op, args)): rule}):
        assert launched(op, args, other) == launched(op, args, dict(other))
        assert launched(op, args, other) != launched(op, args)


@NAMES
def test_a_key_needs_no_numbers(name):
    op, *args = operations(3)[name]
    key = KERNELS[op].key(arguments_of(op, args))
    with FakeTensorMode() as mode:

        def fake(value):
            if isinstance(value, list):
                return [fake(v) for v in value]
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

        assert KERNELS[op].key(arguments_of(op, [fake(a) for a in args])) == key


def test_launches_that_differ_have_different_keys():
    keys = [
        KERNELS[op].key(arguments_of(op, args))
        for tokens in (1, 3)
        for op, *args in operations(tokens).values()
    ]
    op, x, *rest = operations(1)["rows"]
    halves = [
        v.half() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in rest
    ]
    keys.append(KERNELS[op].key(arguments_of(op, [x.half(), *halves])))
    assert len(set(keys)) == len(keys)


SHAPES = [(4096, 16384, 32), (9216, 36864, 72), (768, 3072, 12), (63, 100, 3), (1, 1, 1)]


@pytest.mark.parametrize(("d", "n", "heads"), SHAPES, ids=[f"d{d}" for d, *_ in SHAPES])
@pytest.mark.parametrize("tokens", [1, 2, 8], ids=["m1", "m2", "m8"])
def test_candidates_are_the_rule_and_a_few_others_of_its_form(d, n, heads, tokens):
    from dejavu_compile.kernels.attention import attention_candidates, attention_config
    from dejavu_compile.kernels.gathered_sum import sum_candidates, sum_config
    from dejavu_compile.kernels.gemv import gemv_candidates, gemv_config
    from dejavu_compile.kernels.heads import head_sum_candidates, head_sum_config
    from dejavu_compile.kernels.rows import rows_candidates, rows_config

    width = max(1, d // heads)
    for rule, found in (
        (rows_config(n, d, tokens), rows_candidates(n, d, tokens)),
        (gemv_config(d, False, tokens), gemv_candidates(d, 0, tokens)),
        (gemv_config(d, True, tokens), gemv_candidates(d, width, tokens)),
        (sum_config(n, d, tokens), sum_candidates(n, d, tokens)),
        (head_sum_config(heads, width, d, tokens), head_sum_candidates(heads, width, d, tokens)),
        (attention_config(tokens * heads, n, 2), attention_candidates(tokens * heads, n, 2)),
    ):
        assert found[0] == rule
        assert len(found) <= tuning.MOST
        assert len({tuple(sorted(c.items())) for c in found}) == len(found)
        for config in found:
            assert config.keys() == rule.keys()
            assert all(value > 0 for name, value in config.items() if name not in {"LOOP", "FOUR"})
            for name in ("BLOCK_J", "BLOCK_D", "BLOCK_S", "num_warps"):
                assert config.get(name, 1).bit_count() == 1, "Triton's tiles are powers of two"


@NAMES
def test_an_op_traced_for_a_gpu_runs_with_what_is_in_force(name, monkeypatch):
    op, *args = operations(1)[name]
    kernel, arguments = KERNELS[op], arguments_of(op, args)
    recorded = Recorded()
    module = sys.modules[kernel.kernel.__module__]
    monkeypatch.setattr(module, "wrap_triton", lambda given: recorded)

    def on_gpu(value):
        if isinstance(value, list):
            return [on_gpu(v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    config = kernel.candidates(arguments)[-1]
    with FakeTensorMode(), tuning.in_force({kernel.key(arguments): config}):
        op(*map(on_gpu, args))
    assert (recorded.grid, recorded.constants) == launched(op, args, config)
