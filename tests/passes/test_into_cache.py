"""Keys and values written into their caches by the launch that projects them."""

import sys

import pytest
import torch
from tiny import decode_graph, text, tiny

from dejavu_compile.passes import gemv, into_cache

ops, aten = torch.ops.dejavu, torch.ops.aten


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(into_cache, "_pays", lambda gemv: True)
    monkeypatch.setattr(gemv, "CPU_FROM", 0)


def count(graph, op):
    return len(graph.find_nodes(op="call_function", target=op))


@pytest.mark.parametrize("name, pairs", [("opt", 2), ("bloom", 0), ("llama", 0)])
@torch.no_grad()
def test_pairs_of_a_decoder_without_rotary_embedding(name, pairs):
    """Bloom's come out of one fused weight, Llama's keys are rotated."""
    graph = decode_graph(tiny(name, layers=2))
    assert count(graph, ops.gemv_into.default) == pairs
    assert count(graph, aten.index_copy_.default) == 4 - 2 * pairs


@pytest.mark.parametrize("backend", ["dejavu_eager", "dejavu"])
@torch.no_grad()
def test_the_same_tokens_and_the_same_cache(backend, monkeypatch):
    module, counts = sys.modules["dejavu_compile.backend"], []
    write = module.write_into_caches
    monkeypatch.setattr(module, "write_into_caches", lambda gm: counts.append(write(gm)))
    model = tiny("opt", layers=2)
    ids = text(5, batch=1, length=8)
    how = {
        "max_new_tokens": 12, "do_sample": False, "cache_implementation": "static",
        "return_dict_in_generate": True, "disable_compile": True,
    }  # fmt: skip
    wanted = model.generate(ids, **how)
    torch.compiler.reset()
    model.compile(backend=backend)
    got = model.generate(ids, **how)
    assert 2 in counts
    assert torch.equal(got.sequences, wanted.sequences)
    for ours, theirs in zip(
        got.past_key_values.layers, wanted.past_key_values.layers, strict=True
    ):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_slot_that_a_cache_has_not_is_refused():
    x, weight = torch.randn(1, 16), torch.randn(24, 16)
    keys, values = torch.zeros(2, 1, 3, 5, 8)
    with pytest.raises(IndexError):
        ops.gemv_into(
            x,
            [weight] * 2,
            [None] * 2,
            "identity",
            None,
            None,
            keys,
            values,
            torch.tensor(5),
            0,
            1,
        )


@torch.no_grad()
def test_a_counter_that_is_written_first_is_not_read_by_the_projection(monkeypatch):
    """Its writes come after every read of it; here one comes before, and the slot is another than the projection would see."""
    graphs = []

    def count_first(gm):
        for write in gm.graph.find_nodes(op="call_function", target=aten.index_copy_.default):
            counter = write.args[2].args[1] if write.args[2].target is aten.add.Tensor else None
            counter = counter if counter is not None else write.args[2]
            with gm.graph.inserting_before(write.args[2]):
                gm.graph.call_function(aten.add_.Tensor, (counter, 0))
        graphs.append(into_cache.write_into_caches(gm))

    monkeypatch.setattr(sys.modules["dejavu_compile.backend"], "write_into_caches", count_first)
    decode_graph(tiny("opt", layers=2))
    assert graphs[-1] == 0
