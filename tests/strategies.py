"""What hypothesis draws. A spec is plain numbers: a failure prints as something to paste."""

from dataclasses import dataclass

import decoders
import models
import torch
import torch.nn.functional as F
from decoders import DecoderSpec
from hypothesis import strategies as st
from kernel_cases import KernelCase
from torch import nn

ACTIVATIONS = {
    "relu": F.relu,
    "relu2": models.relu_squared,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "handspelled_gelu": models.handspelled_gelu,
    "tanh": torch.tanh,
}
SPELLINGS = {
    "plain": models.Plain,
    "gated": models.Gated,
    "chunked": models.Chunked,
    "interleaved": models.Interleaved,
    "conv1d": models.Conv1D,
    "matmul_t": models.MatmulT,
    "parallel": models.Parallel,
    "decoder": models.Decoder,
    "escaping_up": models.EscapingUp,
}
EXACT = ("relu", "relu2", "relu6")


@dataclass(frozen=True)
class Spec:
    """An MLP with random weights, its input and some of its units."""

    spelling: str
    activation: str
    width: int
    units: int
    bias: bool
    tokens: int
    kept: tuple[int, ...]
    seed: int

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            make = SPELLINGS[self.spelling]
            return make(ACTIVATIONS[self.activation], self.width, self.units, self.bias)

    def input(self) -> torch.Tensor:
        return models.tokens(self.seed, self.tokens, self.width)

    def keep(self) -> torch.Tensor:
        keep = torch.zeros(self.units, dtype=torch.bool)
        keep[list(self.kept)] = True
        return keep


@st.composite
def specs(draw, spellings=tuple(SPELLINGS), activations=tuple(ACTIVATIONS)) -> Spec:
    """A random MLP; none and all of its units are as likely as some."""
    units = draw(st.integers(2, 24), label="units")
    some = st.sets(st.integers(0, units - 1))
    kept = draw(st.one_of(st.just(set()), st.just(set(range(units))), some), label="kept")
    return Spec(
        spelling=draw(st.sampled_from(spellings)),
        activation=draw(st.sampled_from(activations)),
        width=2 * draw(st.integers(1, 8)),  # even, for two heads
        units=units,
        bias=draw(st.booleans()),
        tokens=draw(st.integers(1, 3)),
        kept=tuple(sorted(kept)),
        seed=draw(st.integers(0, 2**16)),
    )


def _activations(draw) -> tuple[str, ...]:
    """One to three steps, in any order."""
    return tuple(draw(st.lists(st.sampled_from(sorted(decoders.STEPS)), min_size=1, max_size=3)))


@st.composite
def decoder_specs(draw, **fixed: object) -> DecoderSpec:
    """A random decoder with its input; `fixed` choices aren't drawn. Shrinks towards DecoderSpec()."""
    choice = st.sampled_from
    groups = draw(st.integers(1, 3))
    spec = DecoderSpec(
        seed=draw(st.integers(0, 2**16)),
        layers=draw(choice([2, 1, 3])),
        heads=groups * draw(choice([2, 1, 3])) if groups > 1 else draw(choice([2, 4])),
        groups=groups,
        head_dim=draw(choice([4, 2, 6])),
        projections=draw(choice(["separate", "fused", "by_group"])),
        split=draw(choice(["view", "unflatten", "reshape"])),
        rotary=draw(choice(["none", "half", "pairs"])),
        qk_norm=draw(st.booleans()),
        attention=draw(choice(["sdpa", "sdpa_gqa", "softmax", "softmax_alibi", "baddbmm", "einsum"])),
        softcap=draw(st.booleans()),
        merge=draw(choice(["reshape", "flatten", "view", "permute"])),
        units=draw(st.integers(2, 20)),
        mlp=draw(choice(["plain", "gated", "mixed", "fused", "interleaved", "stacked", "paired"])),
        activation=_activations(draw),
        bias=draw(st.booleans()),
        spelling=draw(choice(["linear", "addmm", "matmul"])),
        norm=draw(choice(["layer", "rms", "none"])),
        wiring=draw(choice(["serial", "parallel"])),
        shared=draw(choice([False, False, True])),
        tied=draw(st.booleans()),
        escape=draw(choice(["nothing", "nothing", "hidden", "first", "queries", "attended", "attention"])),
        dtype=draw(choice(["float32", "float32", "bfloat16"])),
        batch=draw(st.integers(1, 3)),
        tokens=draw(choice([1, 1, 2])),
        past=draw(st.integers(3, 9)),
        kept=draw(st.integers(0, 2**16)),
        share=draw(choice([0.5, 0.2, 0.0, 1.0])),
    )  # fmt: skip
    return spec.but(**fixed)


@st.composite
def kernel_cases(
    draw, most: int = 90, dtypes: tuple[str, ...] = ("float32", "bfloat16")
) -> KernelCase:
    """Inputs for one op; none and all of the units are as likely as some."""
    return KernelCase(
        seed=draw(st.integers(0, 2**16)),
        n=draw(st.integers(1, most)),
        d=draw(st.integers(1, most)),
        m=draw(st.integers(1, 4)),
        share=draw(st.sampled_from([0.5, 0.1, 0.0, 1.0])),
        dtype=draw(st.sampled_from(dtypes)),
        stride=draw(st.integers(1, 3)),
        order=draw(st.sampled_from(["ascending", "descending", "shuffled"])),
    )
