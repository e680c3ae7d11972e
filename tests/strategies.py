"""What hypothesis draws. A spec is plain numbers: a failure prints as something to paste."""

import math
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


POWERS = {"square": 2, "cube": 3}
MOST_POWER = 27  # of an input, after all layers


class Genes:
    """Choices, each made by the next of some bytes: 0 is the first, the simplest.

    One drawn value, because hypothesis spends five of six examples on copying one drawn part over another
    where there are many, and that makes few different decoders. Bytes shrink one by one all the same.
    """

    SIZE = 48

    def __init__(self, data: bytes) -> None:
        self._next = iter(data)

    def choice(self, *options: object) -> object:
        """One of some."""
        return options[next(self._next) % len(options)]

    def number(self, low: int, high: int) -> int:
        """Both included."""
        return low + next(self._next) % (high - low + 1)

    def seed(self) -> int:
        """Of 16 bits."""
        return next(self._next) << 8 | next(self._next)


@st.composite
def decoder_specs(draw, **fixed: object) -> DecoderSpec:
    """A random decoder with its input; `fixed` choices aren't drawn. Shrinks towards the simplest."""
    genes = Genes(draw(st.binary(min_size=Genes.SIZE, max_size=Genes.SIZE)))
    choice, number = genes.choice, genes.number
    groups, steps = number(1, 3), sorted(decoders.STEPS)
    spec = DecoderSpec(
        layers=number(1, 3),
        heads=groups * (choice(2, 1, 3) if groups > 1 else choice(2, 4)),
        groups=groups,
        head_dim=choice(4, 2, 6),
        projections=choice("separate", "fused", "by_group"),
        split=choice("view", "unflatten", "reshape"),
        rotary=choice("none", "half", "pairs"),
        qk_norm=choice(False, True),
        attention=choice("sdpa", "sdpa_gqa", "softmax", "softmax_alibi", "baddbmm", "einsum"),
        scaled=choice("logits", "queries"),
        softcap=choice(False, True),
        merge=choice("reshape", "flatten", "view", "permute"),
        units=number(2, 20),
        mlp=choice(
            "plain", "gated", "added", "mixed", "fused", "interleaved", "stacked", "paired"
        ),
        activation=(choice("relu", *steps), *(choice(*steps) for _ in range(number(0, 2)))),
        bias=choice(False, True),
        spelling=choice("linear", "addmm", "matmul", "twice"),
        norm=choice("layer", "rms", "none"),
        wiring=choice("serial", "parallel"),
        shared=choice(False, False, True),
        tied=choice(False, True),
        escape=choice("nothing", "nothing", "hidden", "first", "queries", "attended", "attention"),
        dtype=choice("float32", "float32", "bfloat16"),
        batch=number(1, 3),
        tokens=choice(1, 1, 2),
        past=number(3, 9),
        share=choice(0.5, 0.2, 0.0, 1.0),
        kept=genes.seed(),
        seed=genes.seed(),
    ).but(**fixed)
    power = math.prod(POWERS.get(step, 1) for step in spec.activation)
    if spec.norm == "none" and power**spec.layers > MOST_POWER:
        # What leaves fp32's range can't be compared with anything.
        return spec.but(norm="layer")
    return spec


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
