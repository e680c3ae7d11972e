"""Inputs of any shape, stride and count for every op, and what the op must give, in float64."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAN = float("nan")


@dataclass(frozen=True)
class KernelCase:
    """A selection of `share` of n units, m tokens, d features; `order`: how the selection lists them."""

    seed: int
    n: int
    d: int
    m: int
    share: float
    dtype: str
    stride: int  # rows lie `stride` rows apart
    order: str  # ascending, descending or shuffled
    device: str = "cpu"

    def on(self, device: str) -> "KernelCase":
        """The same case, handed to ops on a device."""
        return dataclasses.replace(self, device=device)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def kept(self) -> Tensor:
        """[n] bool: none and all for shares of 0 and 1."""
        return torch.rand(self.n, generator=self.generator()) < self.share

    def randn(self, *shape: int, part: int) -> Tensor:
        """Of the case's dtype; `part` tells the inputs of one op apart."""
        generator = torch.Generator().manual_seed(self.seed * 31 + part)
        return torch.randn(shape, generator=generator).to(getattr(torch, self.dtype))

    def rows(self, n: int, d: int, *, part: int) -> Tensor:
        """[n, d] with any row stride."""
        return self.randn(n * self.stride, d, part=part)[:: self.stride]

    def selection(self) -> tuple[Tensor, Tensor]:
        """index [n] int32, wild past the count, and count."""
        units = self.kept().nonzero().flatten()
        if self.order == "descending":
            units = units.flip(0)
        if self.order == "shuffled":
            units = units[torch.randperm(len(units), generator=self.generator())]
        index = torch.full((self.n,), 2**30, dtype=torch.int32)
        index[: len(units)] = units
        return index, torch.tensor(len(units), dtype=torch.int32)

    def run(self, op: Callable, *inputs: Any) -> Any:
        """What `op` returns for `inputs`, which are on the CPU, as is the result."""

        def move(value: Any, device: str) -> Any:
            if isinstance(value, Tensor):
                return value.to(device) if device != "cpu" else value.cpu()
            if isinstance(value, list | tuple):
                return type(value)(move(v, device) for v in value)
            return value

        return move(op(*(move(v, self.device) for v in inputs)), "cpu")

    def close(self, got: Tensor, exact: Tensor, rounded: str | None = None) -> None:
        """Sums in fp32, one rounding to `rounded` (the case's dtype)."""
        eps = torch.finfo(getattr(torch, rounded or self.dtype)).eps
        assert got.shape == exact.shape
        if exact.numel():
            scale = exact.abs().max().clamp_min(1)
            assert ((got.double() - exact).abs() <= (eps + 4e-6) * scale).all()

    # --- what each op gets and must give ------------------------------------------------------------------

    def check_compact(self, compact) -> None:
        values = self.randn(self.m, self.n, part=1)
        index, count = self.run(compact, values, 0.5)[:2]
        expected = (values.float().abs() > 0.5).any(0).nonzero().flatten()
        assert torch.equal(index[: int(count)].long(), expected)
        scale = self.randn(self.n, part=2).float().abs()
        index, count = self.run(compact, values, 0.5, scale)[:2]
        expected = (values.float().abs() * scale > 0.5).any(0).nonzero().flatten()
        assert torch.equal(index[: int(count)].long(), expected)

    def check_rows(self, gathered_rows) -> None:
        x, weight = self.randn(self.m, self.d, part=1), self.rows(self.n, self.d, part=2)
        bias, (index, count) = self.randn(self.n, part=3), self.selection()
        weight[~self.kept()] = NAN if self.share < 0.25 else 0.0  # on a CPU more are read at once
        got = self.run(gathered_rows, x, weight, bias, (index, count), "relu")[:, : int(count)]
        exact = x.double() @ weight.double().T + bias.double()
        self.close(got, exact[:, index[: int(count)].long()].clamp(min=0))

    def check_glu(self, gathered_glu) -> None:
        x = self.randn(self.m, self.d, part=1)
        gate, up = (self.rows(self.n, self.d, part=part) / self.d**0.5 for part in (2, 3))
        index, count = self.selection()
        got = self.run(gathered_glu, x, gate, up, (index, count), "silu")[:, : int(count)]
        a, b = (x.double() @ w.double().T for w in (gate, up))
        self.close(got, (a * torch.sigmoid(a) * b)[:, index[: int(count)].long()])

    def check_sum(self, gathered_sum, compacted: bool) -> None:
        (index, count), k = self.selection(), int(self.kept().sum())
        units, by_unit = index[:k].long(), self.randn(self.m, self.n, part=1)
        hidden = torch.full_like(by_unit, NAN)
        hidden[:, slice(0, k) if compacted else units] = by_unit[:, units]
        weight = self.rows(self.n, self.d, part=2)
        got = self.run(gathered_sum, hidden, weight, (index, count), compacted)
        self.close(got, by_unit[:, units].double() @ weight[units].double(), "float32")

    def scores(self, heads: int) -> tuple[Tensor, Tensor]:
        """Scores [m, heads], and which heads run: a score that is NaN is no reason to leave one out."""
        kept = torch.rand(self.m, heads, generator=self.generator()) < self.share
        score = torch.where(kept, 0.3, -0.0)
        lost = torch.rand(self.m, heads, generator=self.generator()) < self.share / 4
        return score.masked_fill(lost & kept, NAN), kept

    def check_gemv(self, gemv) -> None:
        """A first weight of heads of two rows and rows of no head, and a second weight."""
        heads = self.n
        owner = torch.stack((torch.arange(heads), torch.full((heads,), -1)), 1).flatten().int()
        (score, kept), x = self.scores(heads), self.randn(self.m, self.d, part=1)
        first, second = self.rows(4 * heads, self.d, part=2), self.rows(5, self.d, part=3)
        runs = kept.any(0)[owner.clamp(min=0).long()] | (owner < 0)
        runs = torch.cat((runs.repeat_interleave(2), torch.ones(5, dtype=torch.bool)))
        exact = x.double() @ torch.cat((first, second)).double().T
        got = self.run(gemv, x, [first.masked_fill(~runs[:-5, None], NAN), second], owner, score)
        self.close(got[:, runs], exact[:, runs])

    def check_head_sum(self, head_sum) -> None:
        heads, width = self.n, 2 + self.seed % 5
        score, kept = self.scores(heads)
        kept = kept.repeat_interleave(width, dim=1)
        hidden, weight = (
            self.randn(self.m, heads * width, part=1),
            self.rows(heads * width, self.d, part=2),
        )
        exact = hidden.double().masked_fill(~kept, 0) @ weight.double()
        self.close(
            self.run(head_sum, hidden.masked_fill(~kept, NAN), weight, score), exact, "float32"
        )

    def check_attention(self, attention, masked: bool, softcap: float) -> None:
        groups, slots, d = 1 + self.seed % 3, 1 + self.n, 2 * (1 + self.d % 8)
        heads = groups * (1 + self.seed % 2)
        score, kept = self.scores(heads)
        q = self.randn(self.m, heads, 1, d, part=1)
        k, v = (self.randn(self.m, groups, slots, d, part=part) for part in (2, 3))
        mask = (
            torch.rand(self.m, 1, 1, slots, generator=self.generator()) < 0.6 if masked else None
        )
        logits = 0.3 * q.double() @ k.double().repeat_interleave(heads // groups, 1).mT
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        nothing = torch.zeros(self.m, 1, 1, 1, dtype=torch.bool)
        if mask is not None:
            logits, nothing = logits.masked_fill(~mask, -torch.inf), ~mask.any(-1, keepdim=True)
        weights = logits.softmax(-1).masked_fill(nothing, 0)
        off = ~kept[:, :, None, None]
        exact = (weights @ v.double().repeat_interleave(heads // groups, 1)).masked_fill(off, 0)
        scale = 0.3 / softcap if softcap else 0.3
        self.close(
            self.run(attention, q.masked_fill(off, NAN), k, v, mask, scale, softcap, score), exact
        )


def sketch_inputs(n: int, width: int, m: int, dtype=torch.float32, seed=0) -> tuple[Tensor, ...]:
    """What `sketch_score` takes but for the activation, of n units and m tokens."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, width, generator=g).to(dtype)
    gate, up = (
        torch.randint(0, 256, (n, width // k), generator=g).to(torch.uint8) for k in (2, 4)
    )
    return x, gate, up, torch.rand(5, n, generator=g) - torch.tensor([0, 0.5, 0, 0.5, 0])[:, None]


def sketch_oracle(x, gate, up, numbers, activation="silu") -> Tensor:
    """In float64, every weight by itself: bits 2 k of byte i of `up` are of column i + k width / 4."""
    columns = torch.arange(x.shape[1])
    byte = gate.long()[:, columns % gate.shape[1]]
    nibble = (byte // 16 ** (columns // gate.shape[1])) % 16
    pair = (up.long()[:, columns % up.shape[1]] // 4 ** (columns // up.shape[1])) % 4
    a, b, c, d, f = numbers.double()
    g = x.double() @ (nibble - 16 * (nibble > 7)).double().T * a + b
    named = {"silu": g * torch.sigmoid(g), "relu": g.clamp(min=0), "identity": g}
    gated = activation(g) if callable(activation) else named[activation]
    return gated.abs() * ((x.double() @ (pair - 1.5).double().T * c + d) ** 2 + f).sqrt()
