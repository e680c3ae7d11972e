"""How long calibration takes for a shape too large to wait for: a line through two numbers of layers.

    python benchmarks/calibration.py --shape opt-6.7b --layers 2 4 --windows 96

Random weights and random tokens: a fit takes the same steps whatever it learns. What it loses doesn't count here. The
text is limited by `--windows` of 512 tokens: without a `workdir`, `dv.calibrate` keeps less of it for more layers, so give
what all layers would keep. Prints the seconds for each number of layers and those that the line gives for the shape's own.
"""

import argparse
import time
from pathlib import Path

import torch

import dejavu_compile as dv
from dejavu_compile.bench import environment, write
from dejavu_compile.shapes import SHAPES, build

RESULTS = Path(__file__).parent / "results"
WINDOW = 512


def seconds(shape: str, layers: int, windows: int, dtype: torch.dtype) -> float:
    """Of one `dv.calibrate` of all MLPs, without what is compiled on a first call in a process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(shape, device, dtype, layers, WINDOW)
    make = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (windows, WINDOW), generator=make)
    started = time.monotonic()
    dv.calibrate(
        model, list(ids.to(device).split(4)), policy="predict", density=0.1, progress=False
    )
    return time.monotonic() - started


def main() -> None:
    """Parse the command line, run, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", choices=SHAPES, help="default: opt-6.7b on a GPU, else opt-125m"
    )
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 4])
    parser.add_argument("--windows", type=int, default=96, help="of 512 tokens")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, default=RESULTS / "calibration.json")
    args = parser.parse_args()
    print(environment(), flush=True)
    args.shape = args.shape or ("opt-6.7b" if torch.cuda.is_available() else "opt-125m")
    dtype = getattr(torch, args.dtype)
    seconds(args.shape, 1, 8, dtype)  # what a process does once
    few, many = sorted(args.layers)
    taken = {n: seconds(args.shape, n, args.windows, dtype) for n in (few, many)}
    of_shape = SHAPES[args.shape].num_hidden_layers
    slope = (taken[many] - taken[few]) / (many - few)
    whole = taken[few] + slope * (of_shape - few)
    for layers, s in (*taken.items(), (of_shape, whole)):
        print(
            f"{layers:>4} layers {s:8.1f} s" + (" (from the line)" if layers == of_shape else "")
        )
    write(args.out, {"shape": args.shape, "dtype": args.dtype, "tokens": WINDOW * args.windows,
                     "seconds": taken, "layers_of_shape": of_shape, "extrapolated_s": whole})  # fmt: skip


if __name__ == "__main__":
    main()
