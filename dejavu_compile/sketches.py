"""Sketches of gated MLPs: both projections into the units, in so few bits that reading them costs an eighth of the site.

    score_u = |act(G_u x)| sqrt((U_u x)^2 + r_u^2) w_u        G in 4 bits a weight, U in 2; r: rms of what U misses

x is the site's own input. What a unit adds is act(gate_u) up_u, and |act(gate_u)| alone knows half of it: with 45 % of its
units a small Llama loses 7.3 % of perplexity by exact gates, 2.0 % by a sketch, and reads less for it. w_u is
s_u / rms(up_u), s_u the sensitivity of the gate (`sensitivity`). (docs/predictors.md, "What a gate doesn't know")

Each row is rounded to a symmetric grid of one step, and the error that a column makes is made good by those after it, as
far as the inputs that were seen are correlated. (GPTQ: Frantar et al. 2023)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu_compile.kernels import nibbles, pack_pairs, sketch_score_reference
from dejavu_compile.kernels.activations import REFERENCE
from dejavu_compile.kernels.pairs import MIDDLE

from .predictors import chunks
from .workdir import Rows

FIT_TOKENS = 32_768  # for a covariance
RIDGE = 1e-2  # of the mean variance
BLOCK = 128  # columns that are rounded before the others hear of it
TINY = 1e-20
DEAD = 1e-4  # of the largest rms of `up`: a unit below it is as insensitive as one at it
PARTS = ("gate", "up", "numbers")  # the tensors of a sketch, as they are stored


@dataclass(frozen=True, slots=True, eq=False)
class Projections:
    """What a sketch is of: weights [units, width], biases [units] or None, and the activation's name."""

    gate: Tensor
    up: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    activation: str


@dataclass(frozen=True, slots=True, eq=False)
class Sketch:
    """gate [units, width / 2] and up [units, width / 4] packed; numbers [5, units] fp32 (`kernels/sketch.py`)."""

    gate: Tensor
    up: Tensor
    numbers: Tensor
    activation: str

    @property
    def num_bytes(self) -> int:
        """What one evaluation reads."""
        return sum(t.numel() * t.element_size() for t in (self.gate, self.up, self.numbers))

    def score(self, source: Tensor) -> Tensor:
        """Scores [tokens, units] in fp32."""
        return sketch_score_reference(source, self.gate, self.up, self.numbers, self.activation)


def fit_sketch(
    of: Projections, source: Tensor | Rows, sensitivity: Tensor | None, norms: Tensor
) -> Sketch:
    """The sketch for inputs like `source` [tokens, width]; sensitivity [units] of the activated gates.

    Without it, where the model can't be differentiated, units weigh what they add: `norms` [units] of their columns.
    """
    source = source[:: max(1, -(-len(source) // FIT_TOKENS))]
    mean, covariance = _moments(source)
    gate, gate_step, gate_bias = _rounded(of.gate, of.gate_bias, mean, covariance, bits=4)
    up, up_step, up_bias = _rounded(of.up, of.up_bias, mean, covariance, bits=2)
    missed, energy, square = torch.zeros(3, len(up), device=up.device)
    for rows in chunks(len(source)):
        x = source[rows].float()
        exact = _projected(x, of.up, of.up_bias)
        guess = F.linear(x, up.float() - MIDDLE) * up_step + up_bias
        # What is missed matters where the gate is open.
        gated = REFERENCE[of.activation](_projected(x, of.gate, of.gate_bias)).square()
        missed += (gated * (exact - guess).square()).sum(0)
        energy += gated.sum(0)
        square += exact.square().sum(0)
    floor, weight = missed / energy.clamp(min=TINY), norms
    if sensitivity is not None:
        rms = (square / len(source)).sqrt()
        weight = sensitivity / rms.clamp(min=DEAD * rms.max().item() + TINY)
    numbers = torch.stack(
        (gate_step, gate_bias, up_step * weight, up_bias * weight, floor * weight.square())
    )
    return Sketch(nibbles.pack(gate), pack_pairs(up), numbers, of.activation)


def _projected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.float(), None if bias is None else bias.float())


def _moments(source: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [width] and covariance [width, width], which the ridge makes invertible; fp64."""
    count, width = source.shape
    mean = sum(source[rows].double().sum(0) for rows in chunks(count)) / count
    total = torch.zeros(width, width, dtype=torch.float64, device=source.device)
    for rows in chunks(count):
        x = source[rows].float() - mean.float()
        total += x.T @ x
    total /= count
    ridge = (RIDGE * total.diagonal().mean()).clamp(min=TINY)
    return mean, total + ridge * torch.eye(width, dtype=torch.float64, device=source.device)


def _rounded(
    weight: Tensor, bias: Tensor | None, mean: Tensor, covariance: Tensor, *, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [units, width] int8, step [units], bias [units]): about weight = step * (codes - middle).

    Codes are -7 to 7 in four bits, 0 to 3 about a middle of 1.5 in two.
    """
    weight = weight.float()
    middle, low, high = (MIDDLE, 0, 3) if bits == 2 else (0.0, -7, 7)

    def code(values: Tensor, step: Tensor) -> Tensor:
        return (values / step + middle).round().clamp(low, high)

    order = covariance.diagonal().argsort(descending=True)
    step = _steps(weight, covariance.diagonal().float(), code, middle, 0.5 if bits == 4 else 1.6)
    inverse = torch.linalg.inv(covariance[order][:, order])
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    rest, codes = weight[:, order], torch.empty_like(weight, dtype=torch.int8)
    for start in range(0, len(order), BLOCK):
        block = rest[:, start : start + BLOCK].clone()
        errors, stop = torch.empty_like(block), start + block.shape[1]
        for i in range(block.shape[1]):
            value = code(block[:, i], step)
            codes[:, order[start + i]] = value.to(torch.int8)
            row = factor[start + i]
            errors[:, i] = (block[:, i] - (value - middle) * step) / row[start + i]
            block[:, i:] -= errors[:, i, None] * row[start + i : stop]
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    lost = (weight - (codes - middle) * step[:, None]) @ mean.float()
    return codes, step, lost if bias is None else lost + bias.float()


def _steps(
    weight: Tensor,
    importance: Tensor,
    code: Callable[[Tensor, Tensor], Tensor],
    middle: float,
    most: float,
) -> Tensor:
    """Of 20 for each row, up to `most` times its rms, that with the least error, columns weighted by `importance`."""
    rms = weight.square().mean(1).sqrt().clamp(min=TINY)
    best, least = rms, torch.full_like(rms, torch.inf)
    for share in torch.linspace(0.2, 1.0, 20).tolist():
        step = rms * (share * most)
        values = (code(weight, step[:, None]) - middle) * step[:, None]
        error = ((weight - values).square() * importance).sum(1)
        best, least = torch.where(error < least, step, best), least.minimum(error)
    return best
