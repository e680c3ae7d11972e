"""The MLP part of decode alone: a stack of residual MLPs, dense Inductor against dejavu, one run.

    python benchmarks/mlp.py --width 2048 --units 8192 --layers 24 --density 0.1

Random weights, bf16, one token; every MLP but the first runs the neurons that a predictor of 5 % of its
bytes selects. The two are timed in turns, so that what disturbs one disturbs the other, and a time counts
only after the result matched the stack with the other neurons zeroed.
"""

import argparse
import statistics
import time
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dejavu_compile.attachments import Attachment, attach, fingerprint, make_unit_major
from dejavu_compile.backend import dejavu
from dejavu_compile.bench import environment, write
from dejavu_compile.kernels.nibbles import pack
from dejavu_compile.passes.site import Policy, PredictorWeights
from dejavu_compile.predictors import rank_and_bits

RESULTS = Path(__file__).parent / "results"


class Stack(nn.Module):
    """x + down(relu(up(norm(x)))), repeated."""

    def __init__(self, width: int, units: int, layers: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, units, bias=False) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(units, width, bias=False) for _ in range(layers))

    def forward(self, x: torch.Tensor, masks: list[torch.Tensor] | None = None) -> torch.Tensor:
        """`masks` zero units, for the oracle."""
        for i, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            hidden = F.relu(up(F.layer_norm(x, x.shape[-1:])))
            x = x + down(hidden if masks is None else hidden * masks[i])
        return x


def predict(stack: Stack, density: float) -> list[torch.Tensor]:
    """Attach predictors that select a fixed random share of units; returns the masks."""
    generator, masks = torch.Generator().manual_seed(0), []
    for i, down in enumerate(stack.down):
        width, units = down.weight.shape
        if i == 0:
            masks.append(torch.ones(units, dtype=torch.bfloat16))
            continue
        chosen = torch.rand(units, generator=generator).argsort()[: round(density * units)]
        mask = torch.zeros(units, dtype=torch.bfloat16)
        mask[chosen] = 1
        masks.append(mask)
        rank, bits = rank_and_bits(2 * 2 * width * units, width, units)
        matrices = (
            torch.randint(-7, 8, shape, dtype=torch.int8, generator=generator)
            for shape in ((rank, width), (units, rank))
        )
        bias = (mask.float() * 2 - 1) * 1e6
        predictor = PredictorWeights(*(pack(m) if bits == 4 else m for m in matrices), bias)
        make_unit_major(down.weight, 1, produces_units=False)
        attach(
            down.weight,
            Attachment(Policy.PREDICT, density, fingerprint(down.weight), predictor=predictor,
                       source=weakref.ref(stack.down[i - 1].weight), lookahead=1),
        )  # fmt: skip
    return masks


def main() -> None:
    """Parse the command line, run, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--units", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS / "mlp-cpu.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    stack = (
        Stack(args.width, args.units, args.layers).to(torch.bfloat16).eval().requires_grad_(False)
    )
    x = torch.randn(1, args.width, dtype=torch.bfloat16)
    with torch.no_grad():
        dense = torch.compile(stack, backend="inductor")
        dense(x)
        # A copy for the sparse one: its strides change, and the dense one keeps its own.
        other = Stack(args.width, args.units, args.layers).to(torch.bfloat16).eval()
        other.requires_grad_(False).load_state_dict(stack.state_dict())
        masks = predict(other, args.density)
        torch.compiler.reset()
        dense, sparse = (
            torch.compile(stack, backend="inductor"),
            torch.compile(other, backend=dejavu),
        )
        expected = stack(x, masks).float()
        error = ((sparse(x).float() - expected).norm() / expected.norm()).item()
        # The first MLP's strides change after one call, and it compiles again.
        for _ in range(3):
            sparse(x), dense(x)
        times: dict[str, list[float]] = {"dense": [], "dejavu": []}
        for _ in range(args.repeats):
            for name, call in (("dense", dense), ("dejavu", sparse)):
                started = time.perf_counter()
                call(x)
                times[name].append(1e3 * (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in times.items()}
    # The first MLP is dense in both; the ratio asked for is that of the MLPs that are predicted.
    first = medians["dense"] / args.layers
    ratio = medians["dense"] / medians["dejavu"]
    predicted = (medians["dense"] - first) / (medians["dejavu"] - first)
    print(environment())
    print(f"medians of {args.repeats}: dense {medians['dense']:.2f} ms, dejavu {medians['dejavu']:.2f} ms, "
          f"{ratio:.2f}x; without the first, dense, MLP {predicted:.2f}x; error {error:.1e}")  # fmt: skip
    write(
        args.out,
        {"width": args.width, "units": args.units, "layers": args.layers, "density": args.density,
         "median_ms": medians, "ratio": ratio, "ratio_of_predicted_layers": predicted, "error": error},
    )  # fmt: skip


if __name__ == "__main__":
    main()
