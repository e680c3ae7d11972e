"""Block sizes of a launch: what a search on this machine chose for it, else its launcher's own rule.

A launcher asks while a graph is traced, with tensors that hold no numbers: so shapes, dtypes and flags decide, in
a key. How many units a selection holds is no part of it, since no launcher can know: whoever compiles a graph
does, and puts in force what was chosen for that graph's densities. Outside of such a compile the rule holds.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

Config = dict[str, int]  # block sizes, warps, splits: what a launcher takes as `config`
MOST = 8  # candidates of one launch, its rule among them: compiling one takes 0.25 s

_in_force: ContextVar[Mapping[str, Config]] = ContextVar("dejavu_configs")


def key_of(kernel: str, x: Tensor, **sizes: object) -> str:
    """`rows bfloat16 tokens=1 n=16384 d=4096`: what a launch is, by its input's dtype and by what it says of itself.

    A size that is no number yet stays a symbol, which nothing was ever chosen for.
    """
    dtype = str(x.dtype).removeprefix("torch.")
    return " ".join([kernel, dtype, *(f"{name}={size}" for name, size in sizes.items())])


def config_for(key: str, rule: Config) -> Config:
    """What is in force for this key, or `rule`; a copy."""
    return dict(_in_force.get({}).get(key, rule))


@contextmanager
def in_force(configs: Mapping[str, Config]) -> Iterator[None]:
    """Meanwhile launchers that ask with one of these keys get its configuration. In this thread only."""
    token = _in_force.set(configs)
    try:
        yield
    finally:
        _in_force.reset(token)


def candidates(rule: Config, others: Iterable[Config]) -> list[Config]:
    """The rule, then up to MOST - 1 others that differ from it and from each other."""
    found = [rule]
    for other in others:
        if other not in found and len(found) < MOST:
            found.append(other)
    return found
