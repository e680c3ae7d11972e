"""Cheap approximations of a projection from inputs that were seen: of low rank, or of few bits a weight.

    y = M x + b        M [units, width] dense here: what it would be stored as decides its bytes, and its error

Both are fitted to second moments alone: C = cov(x), S = cov(y, x). Of low rank: reduced-rank regression, the best in
least squares, weighted by unit (Izenman 1975). Of few bits: each row rounded to a symmetric grid, one scale a row, the
error of a column made good by those after it (GPTQ: Frantar et al. 2023).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-3  # of the mean variance


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Means and covariances of what is approximated, y [units], and what it is approximated from, x [width]; fp64."""

    mean_x: Tensor
    mean_y: Tensor
    of_x: Tensor  # [width, width]
    of_yx: Tensor  # [units, width]

    @property
    def ridged(self) -> Tensor:
        """The covariance of x, made invertible."""
        eye = torch.eye(len(self.of_x), dtype=self.of_x.dtype)
        return self.of_x + RIDGE * self.of_x.diagonal().mean() * eye

    @property
    def regression(self) -> Tensor:
        """The best M of full rank."""
        return torch.linalg.solve(self.ridged, self.of_yx.T).T

    def bias(self, matrix: Tensor) -> Tensor:
        """b of the matrix M."""
        return self.mean_y - matrix @ self.mean_x


def moments(x: Tensor, y: Tensor) -> Moments:
    """Of some tokens: x [tokens, width], y [tokens, units]."""
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    return Moments(mean_x, mean_y, x.T @ x / len(x), y.T @ x / len(x))


def scales(matrix: Tensor, bits: float, importance: Tensor) -> Tensor:
    """One a row, [units, 1]: of 40 shrunk ones that with the least error, columns weighted by `importance`."""
    most = matrix.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / top(bits)
    best, least = most, torch.full_like(most, torch.inf)
    for share in torch.linspace(0.05, 1, 40, dtype=matrix.dtype):
        scale = most * share
        error = ((matrix - to_grid(matrix, scale, bits)).square() * importance).sum(
            1, keepdim=True
        )
        best, least = torch.where(error < least, scale, best), least.minimum(error)
    return best


def top(bits: float) -> float:
    """The largest value of the grid: 7 of int4, as the library's; 1.5 of 0.5 and 1.5 in two bits; 1 of -1, 0, 1."""
    return {1: 1.0, 1.6: 1.0, 2: 1.5, 3: 3.5}.get(bits, 2 ** (bits - 1) - 1)


def to_grid(values: Tensor, scale: Tensor, bits: float) -> Tensor:
    """Rounded to what so many bits hold: without a zero for 1 to 3 bits, of which three values take 1.6."""
    whole = values / scale
    if bits == 1:
        return torch.where(whole < 0, -scale, scale)
    if bits in (2, 3):
        return ((whole - 0.5).round() + 0.5).clamp(-top(bits), top(bits)) * scale
    return whole.round().clamp(-top(bits), top(bits)) * scale


def rounded(matrix: Tensor, bits: float, metric: Tensor | None = None) -> Tensor:
    """The matrix in so many bits; with the metric [width, width], the least error of M x rather than of M, nearly."""
    if metric is None:
        return to_grid(matrix, scales(matrix, bits, torch.ones(1, dtype=matrix.dtype)), bits)
    scale = scales(matrix, bits, metric.diagonal())
    order = metric.diagonal().argsort(descending=True)
    factor = torch.linalg.cholesky(torch.linalg.inv(metric[order][:, order]), upper=True)
    rest, result = matrix[:, order].clone(), torch.empty_like(matrix)
    for i, column in enumerate(order.tolist()):
        value = to_grid(rest[:, i : i + 1], scale, bits)
        result[:, column] = value[:, 0]
        rest[:, i:] -= (rest[:, i : i + 1] - value) / factor[i, i] * factor[i : i + 1, i:]
    return result


def few_bits(of: Moments, matrix: Tensor, bits: float, compensated: bool = True) -> Tensor:
    """`matrix`, usually the projection itself, rounded for inputs like those seen."""
    return rounded(matrix, bits, of.ridged if compensated else None)


def low_rank(
    of: Moments, rank: int, bits: float | None, weight: Tensor, rotated: bool = True
) -> tuple[Tensor, Tensor]:
    """(up, down): up @ down is the best M of this rank, rounded where `bits` is given; weight [units], of errors.

    rotated: singular values are spread over all columns of `up`, which have one step a row. Once `down` is rounded, `up`
    is fitted anew.
    """
    root, weight = torch.linalg.cholesky(of.ridged), weight.double()[:, None]
    u, s, v = torch.linalg.svd(weight * (of.regression @ root), full_matrices=False)
    up, down = (
        u[:, :rank] * s[:rank] / weight,
        torch.linalg.solve_triangular(root.T, v[:rank].T, upper=True).T,
    )
    if bits is None:
        return up, down
    if rotated:
        generator = torch.Generator().manual_seed(0)
        turn = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=up.dtype)).Q
        up, down = up @ turn, turn.T @ down
    down = rounded(down, bits, of.ridged)
    metric = down @ of.ridged @ down.T
    up = torch.linalg.solve(metric, down @ of.of_yx.T).T
    return rounded(up, bits, metric), down
