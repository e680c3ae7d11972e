"""Bytes of weights that a site reads, in closed form, and where sparse stops paying.

At batch 1 a decode step takes as long as reading its weights does, so bytes stand for time. With n units
of u bytes each, density rho, a predictor of P bytes and a carrier that costs c bytes a unit:

    dense            n u
    predict          rho_m n u + P
    exact, gate      n c + rho_m n (u - c)

For m tokens at once the union of their selections runs: rho_m = 1 - (1 - rho)^m if they choose
independently, which is the worst case, since tokens of one text agree more.
"""

from dataclasses import dataclass
from functools import cache

import sympy

from dejavu_compile.passes.site import Carrier, Policy, Site

n, u, c, P, m = sympy.symbols("n u c P m", positive=True)
rho = sympy.Symbol("rho", nonnegative=True)

UNION = 1 - (1 - rho) ** m
BYTES = {
    Policy.DENSE: n * u,
    Policy.PREDICT: UNION * n * u + P,
    Policy.EXACT: n * c + UNION * n * (u - c),
    Policy.GATE: n * c + UNION * n * (u - c),
}


@cache
def _compiled(policy: Policy) -> object:
    return sympy.lambdify((n, u, c, P, m, rho), BYTES[policy])


@cache
def _break_even(policy: Policy) -> object:
    """Density at which a policy reads as much as dense, for one token."""
    if policy is Policy.DENSE:
        return None
    (solution,) = sympy.solve((BYTES[policy] - BYTES[Policy.DENSE]).subs(m, 1), rho)
    return sympy.lambdify((n, u, c, P), solution)


@dataclass(frozen=True, slots=True)
class SiteCost:
    """The numbers of one site that the closed forms need, in bytes."""

    units: int
    bytes_per_unit: int
    carrier_bytes_per_unit: int
    predictor_bytes: int

    def bytes(self, policy: Policy, density: float, tokens: int = 1) -> float:
        """Bytes read a step under `policy`."""
        return float(
            _compiled(policy)(
                self.units, self.bytes_per_unit, self.carrier_bytes_per_unit,
                self.predictor_bytes, tokens, density,
            )
        )  # fmt: skip

    def break_even(self, policy: Policy) -> float:
        """The density above which `policy` reads more than dense, at one token."""
        if policy is Policy.DENSE:
            return 1.0
        solve = _break_even(policy)
        value = solve(
            self.units, self.bytes_per_unit, self.carrier_bytes_per_unit, self.predictor_bytes
        )
        return float(value)


def cost_of(site: Site, carrier: Carrier | None, predictor_bytes: int) -> SiteCost:
    """Read a site's numbers off the graph."""
    itemsize = site.output.weight.meta["val"].element_size()
    needed = carrier.needs if carrier is not None else frozenset()
    carrier_bytes = sum(
        leaf.projection.in_features * itemsize for leaf in site.row_leaves if leaf.node in needed
    )
    return SiteCost(site.units, site.bytes_per_unit, carrier_bytes, predictor_bytes)
