"""Bytes that a site reads a step, in closed form, and where sparse stops paying.

Decode takes as long as its reading does, so bytes stand for time. With n units of u weight bytes each,
density rho, a predictor or sketch of P bytes, a carrier that costs c bytes a unit, and, for attention, K bytes of
cached keys and values a unit and sequence, m tokens (each of a sequence of its own) read

    dense                   n u                          + m n K
    exact, gate             n c + q rho_m n (u - c)
    predict, sketch         q rho_m n u + p P            + m rho n K
    predict, cache only     n u + p P                    + m rho n K + t

Weights are read for the union of the tokens' selections: rho_m = 1 - (1 - rho)^m if they choose
independently, which is the worst case, since tokens of one text agree more. A cache belongs to one
sequence, so no batch makes its saving smaller.

q and p are 1 on a CPU, and for one token. A GPU's kernels go through a selected row once for four tokens, and several tokens are
more arithmetic than it does on the way: q = 1.6 + m / 4. Predictors go through their weights once for each: p = m. (H200,
OPT-6.7B, MLPs at 10 %, at 2, 4 and 8 sequences against library GEMMs: q 2.2, 2.7, 3.6; at 4, p 4) Attention that only skips
caches has launches more than a library's: t stands for their time, on a GPU 20 MB. (H200, OPT-6.7B, half of the heads, KV 512: at 4
sequences the 17 MB that a layer saves take 1 to 4 % of a step longer, at 8 its 34 MB are gained)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import sympy
import torch

from dejavu_compile.passes.demand import sizes
from dejavu_compile.passes.read_attention import as_decode_attention
from dejavu_compile.passes.site import Carrier, Execution, Policy, Site

n, u, c, P, m, q, p = sympy.symbols("n u c P m q p", positive=True)
K, t = sympy.symbols("K t", nonnegative=True)
rho = sympy.Symbol("rho", nonnegative=True)

UNION = 1 - (1 - rho) ** m
CACHE = m * rho * n * K
BYTES = {
    Policy.DENSE: n * u + m * n * K,
    Policy.PREDICT: q * UNION * n * u + p * P + CACHE,
    Policy.SKETCH: q * UNION * n * u + p * P + CACHE,
    Policy.EXACT: n * c + q * UNION * n * (u - c),
    Policy.GATE: n * c + q * UNION * n * (u - c),
}
BYTES_CACHE_ONLY = n * u + p * P + CACHE + t
LAUNCHES = 20e6  # what memory brings in 5 us


@cache
def _compiled(form: sympy.Expr) -> Callable[..., float]:
    return sympy.lambdify((n, u, c, P, K, q, p, t, m, rho), form)


@cache
def _break_even(policy: Policy) -> Callable[..., float]:
    """Density at which a policy reads as much as dense, for one token."""
    (solution,) = sympy.solve((BYTES[policy] - BYTES[Policy.DENSE]).subs({m: 1, q: 1, p: 1}), rho)
    return sympy.lambdify((n, u, c, P, K), solution)


@dataclass(frozen=True, slots=True)
class SiteCost:
    """The numbers of one site that the closed forms need, in bytes."""

    units: int
    bytes_per_unit: int
    carrier_bytes_per_unit: int
    predictor_bytes: int
    cache_bytes_per_unit: int = 0  # a sequence
    several_cost_more: bool = False  # than one token does, for the same rows: on a GPU

    def bytes(
        self, policy: Policy, density: float, tokens: int = 1,
        execution: Execution = Execution.GATHERED,
    ) -> float:  # fmt: skip
        """Bytes read a step under `policy`."""
        form = BYTES_CACHE_ONLY if execution is Execution.CACHE else BYTES[policy]
        more = self.several_cost_more and tokens > 1
        times = (1.6 + tokens / 4, tokens, LAUNCHES) if more else (1, 1, 0)
        return float(_compiled(form)(*self._sizes, *times, tokens, density))

    def break_even(self, policy: Policy) -> float:
        """The density above which `policy` reads more than dense, at one token."""
        return 1.0 if policy is Policy.DENSE else float(_break_even(policy)(*self._sizes))

    @property
    def _sizes(self) -> tuple[int, ...]:
        return (self.units, self.bytes_per_unit, self.carrier_bytes_per_unit, self.predictor_bytes,
                self.cache_bytes_per_unit)  # fmt: skip


def cost_of(site: Site, carrier: Carrier | None, predictor_bytes: int) -> SiteCost:
    """Read a site's numbers off the graph; a cache whose length has no number yet counts as it is now."""
    weight = site.output.weight.meta["val"]
    itemsize = weight.element_size()
    needed = carrier.needs if carrier is not None else frozenset()
    carrier_bytes = sum(
        leaf.projection.in_features * itemsize for leaf in site.row_leaves if leaf.node in needed
    )
    return SiteCost(
        site.units, site.bytes_per_unit, carrier_bytes, predictor_bytes, _cache_bytes(site),
        several_cost_more=weight.is_cuda,
    )  # fmt: skip


def _cache_bytes(site: Site) -> int:
    """Bytes of keys and values that a decode step reads for one head, where heads can be left out."""
    total = 0
    for core in site.cores:
        attention = as_decode_attention(core.node)
        if attention is None:
            return 0
        for value in (attention.k, attention.v):
            itemsize = value.meta["val"].element_size()
            total += torch.Size(sizes(value)).numel() * itemsize // attention.batch
    return total // site.units
