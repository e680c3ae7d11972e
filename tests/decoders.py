"""Decoders that nobody wrote: each choice that an architecture makes, made by a spec.

`RandomDecoder(spec)(ids, past, keep)` is plain PyTorch that knows nothing of passes. With `keep` it zeroes the other
units and heads where they enter their output projections: in float64, the oracle of every rewrite.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 17

# Steps of an activation; several in a row are one too.
STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "clamp": lambda x: x.clamp(min=0),
    "clamp_min": lambda x: torch.clamp_min(x, 0.0),
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "relu_": lambda x: (x + 0).relu_(),
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "cos": torch.cos,
    "square": torch.square,
    "cube": lambda x: x**3,
    "swish": lambda x: x * torch.sigmoid(x),
    "abs": torch.abs,
    "negate": torch.neg,
    "halve": lambda x: x / 2,
    "shift": lambda x: x - 0.1,
    "cutoff": lambda x: x - torch.full((), 0.05, dtype=x.dtype),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "wide": lambda x: x.float().to(x.dtype),
    "folded": lambda x: x.reshape(-1, x.shape[-1]).view(x.shape),
}
LINEAR = ("negate", "halve", "shift", "cutoff", "dropout", "wide", "folded")


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder, its input and what of it runs, as numbers and words to paste."""

    seed: int = 0
    layers: int = 2
    # attention
    heads: int = 4
    groups: int = 2  # heads of keys and values
    head_dim: int = 4
    projections: str = "separate"  # or fused, by_group
    split: str = "view"  # or unflatten, reshape
    rotary: str = "none"  # or half, pairs
    qk_norm: bool = False
    attention: str = "sdpa"  # or sdpa_gqa, softmax, softmax_alibi, baddbmm, einsum
    scaled: str = "logits"  # or queries
    softcap: bool = False
    merge: str = "reshape"  # or flatten, view, permute
    # MLP
    units: int = 8
    mlp: str = "plain"  # or gated, added, mixed, fused, interleaved, stacked, paired
    activation: tuple[str, ...] = ("silu",)
    # both
    bias: bool = False
    spelling: str = "linear"  # or addmm, matmul, twice
    norm: str = "layer"  # or rms, none
    wiring: str = "serial"  # or parallel
    shared: bool = False  # all layers are the same modules
    tied: bool = False
    escape: str = "nothing"  # or hidden, first, queries, attended, attention
    dtype: str = "float32"
    # input
    batch: int = 1
    tokens: int = 1
    past: int = 5
    kept: int = 0  # the seed of what is kept
    share: float = 0.5  # of units and heads that are

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return 2 * self.head_dim + 2

    @property
    def is_linear(self) -> bool:
        """The MLP has no nonlinearity of its own."""
        return all(step in LINEAR for step in self.activation)

    def model(self) -> "RandomDecoder":
        """The same weights at each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = RandomDecoder(self).eval().requires_grad_(False)
        return model.to(getattr(torch, self.dtype))

    def inputs(self) -> tuple[Tensor, Tensor]:
        """ids [batch, tokens] and past keys and values [layers, 2, batch, groups, past, head_dim]."""
        g = torch.Generator().manual_seed(self.seed + 1)
        ids = torch.randint(VOCABULARY, (self.batch, self.tokens), generator=g)
        shape = (self.layers, 2, self.batch, self.groups, self.past, self.head_dim)
        return ids, torch.randn(shape, generator=g).to(getattr(torch, self.dtype))

    def kept_units(self) -> Tensor:
        """A mask [layers, units] of the units that run."""
        g = torch.Generator().manual_seed(self.kept)
        return torch.rand(self.layers, self.units, generator=g) < self.share

    def but(self, **changes: object) -> "DecoderSpec":
        """The spec with some choices changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Keep:
    """Masks of one layer: units [units], the same for each token, and heads [batch, tokens or 1, heads]."""

    units: Tensor
    heads: Tensor


class Projection(nn.Module):
    """x @ W.T + b, spelled in one of the ways that models have.

    `twice`: what comes out of a site has its bias added once more. (What goes into one may be cut up first.)
    """

    def __init__(self, width: int, features: int, spec: DecoderSpec, *, out: bool = False) -> None:
        super().__init__()
        self.spelling, self.out = spec.spelling, out
        shape = (width, features) if spec.spelling == "addmm" else (features, width)
        self.weight = nn.Parameter(torch.randn(shape) / width**0.5)
        biased = spec.bias or spec.spelling == "addmm"
        self.bias = nn.Parameter(torch.randn(features) / 2) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling in ("linear", "twice"):
            y = F.linear(x, self.weight, self.bias)
            again = self.spelling == "twice" and self.out and self.bias is not None
            return y + self.bias if again else y
        if self.spelling == "addmm":  # GPT-2
            y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
            return y.view(*x.shape[:-1], y.shape[-1])
        y = x @ self.weight.T  # Falcon
        return y if self.bias is None else y + self.bias


class Norm(nn.Module):
    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind, self.width = kind, width
        self.weight = nn.Parameter(1 + torch.randn(width) / 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, (self.width,), self.weight)
        if self.kind == "rms":
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return x


class Attention(nn.Module):
    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        queries, keys = spec.heads * spec.head_dim, spec.groups * spec.head_dim
        if spec.projections == "separate":
            self.q = Projection(spec.width, queries, spec)
            self.k = Projection(spec.width, keys, spec)
            self.v = Projection(spec.width, keys, spec)
        else:
            self.qkv = Projection(spec.width, queries + 2 * keys, spec)
        if spec.qk_norm:
            self.q_norm, self.k_norm = (Norm(spec.head_dim, "rms") for _ in range(2))
        self.out = Projection(queries, spec.width, spec, out=True)

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        """[batch, tokens, heads * dim] -> [batch, heads, tokens, dim]."""
        d, how = self.spec.head_dim, self.spec.split
        if how == "unflatten":
            return x.unflatten(-1, (heads, d)).permute(0, 2, 1, 3)
        if how == "reshape":
            return x.reshape(x.shape[0], x.shape[1], heads, d).transpose(-3, -2)
        return x.view(*x.shape[:-1], heads, d).transpose(1, 2)

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec
        h, g, d = spec.heads, spec.groups, spec.head_dim
        if spec.projections == "separate":
            return self._heads(self.q(x), h), self._heads(self.k(x), g), self._heads(self.v(x), g)
        both = self.qkv(x)
        if spec.projections == "fused":
            q, k, v = both.split([h * d, g * d, g * d], dim=-1)
            return self._heads(q, h), self._heads(k, g), self._heads(v, g)
        # by_group: each group's queries, then its key and its value (Falcon, GPT-NeoX)
        grouped = both.view(*both.shape[:-1], g, h // g + 2, d)
        q, k, v = grouped[..., :-2, :], grouped[..., [-2], :], grouped[..., [-1], :]
        return tuple(t.flatten(2, 3).transpose(1, 2) for t in (q, k, v))

    def _rotate(self, x: Tensor, start: int) -> Tensor:
        if self.spec.rotary == "none":
            return x
        half = self.spec.head_dim // 2
        at = torch.arange(start, start + x.shape[-2], dtype=x.dtype)
        angle = at[:, None] * 0.5 ** torch.arange(half, dtype=x.dtype)
        cos, sin = angle.cos(), angle.sin()
        if self.spec.rotary == "half":
            one, two = x[..., :half], x[..., half:]
            return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1)
        one, two = x[..., ::2], x[..., 1::2]  # pairs
        return torch.stack((one * cos - two * sin, two * cos + one * sin), dim=-1).flatten(-2)

    def _mask(self, tokens: int, slots: int, dtype: torch.dtype) -> Tensor:
        """[tokens, slots], to be added: causal, and the third slot is masked for all."""
        slot = torch.arange(slots)
        hidden = slot[None, :] > torch.arange(slots - tokens, slots)[:, None]
        return torch.zeros(tokens, slots, dtype=dtype).masked_fill(hidden | (slot == 2), -1e9)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, heads, tokens, dim], and weights where the spelling has any."""
        spec = self.spec
        repeats = spec.heads // spec.groups
        scale = spec.head_dim**-0.5 if spec.scaled == "logits" else 1.0
        mask = self._mask(q.shape[2], k.shape[2], q.dtype)
        if spec.attention == "sdpa_gqa":
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=repeats > 1
            )
            return y, y
        if repeats > 1:
            k, v = (t[:, :, None].expand(-1, -1, repeats, -1, -1).reshape(
                t.shape[0], spec.heads, *t.shape[2:]) for t in (k, v))  # fmt: skip
        if spec.attention == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            return y, y
        if spec.attention == "baddbmm":  # Bloom
            flat = [t.reshape(-1, *t.shape[2:]) for t in (q, k, v)]
            logits = torch.baddbmm(mask.expand(flat[0].shape[0], -1, -1), flat[0], flat[1].mT,
                                   beta=1.0, alpha=scale)  # fmt: skip
            weights = torch.softmax(logits, dim=-1)
            return torch.bmm(weights, flat[2]).view(*q.shape[:2], *q.shape[2:]), weights
        if spec.attention == "einsum":
            logits = torch.einsum("bhtd,bhsd->bhts", q, k) * scale
        else:
            logits = torch.matmul(q, k.transpose(2, 3)) * scale
        if spec.softcap:
            logits = 2.0 * torch.tanh(logits / 2.0)
        if spec.attention == "softmax_alibi":
            slope = 0.5 ** torch.arange(spec.heads, dtype=q.dtype)
            logits = logits + slope[:, None, None] * torch.arange(k.shape[2], dtype=q.dtype)
        weights = F.softmax(
            logits + mask, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)
        )
        weights = weights.to(q.dtype)
        if spec.attention == "einsum":
            return torch.einsum("bhts,bhsd->bhtd", weights, v), weights
        return torch.matmul(weights, v), weights

    def _merge(self, y: Tensor) -> Tensor:
        how = self.spec.merge
        if how == "flatten":
            return y.transpose(1, 2).flatten(2)
        if how == "view":
            return y.transpose(1, 2).contiguous().view(y.shape[0], y.shape[2], -1)
        if how == "permute":
            return y.permute(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], -1)
        return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)

    def forward(self, x: Tensor, past: Tensor, keep: Keep | None) -> tuple[Tensor, Tensor, dict]:
        q, k, v = self._qkv(x)
        if self.spec.scaled == "queries":  # OPT
            q = q * self.spec.head_dim**-0.5
        if self.spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        start = past.shape[-2]
        q, k = self._rotate(q, start), self._rotate(k, start)
        k, v = torch.cat((past[0], k), dim=-2), torch.cat((past[1], v), dim=-2)
        y, weights = self._attend(q, k, v)
        attended = self._merge(y)
        out = attended
        if keep is not None:
            heads = out.unflatten(-1, (self.spec.heads, self.spec.head_dim))
            out = (heads * keep.heads[..., None].to(out.dtype)).flatten(-2)
        seen = {"queries": q, "attention": weights, "attended": attended}
        return self.out(out), torch.stack((k, v)), seen


class MLP(nn.Module):
    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        apart = ("gated", "added", "mixed")
        fused = spec.mlp not in ("plain", *apart)
        self.up = Projection(spec.width, spec.units * (2 if fused else 1), spec)
        if spec.mlp in apart:
            self.gate = Projection(spec.width, spec.units, spec)
        self.down = Projection(spec.units, spec.width, spec, out=True)

    def _act(self, x: Tensor) -> Tensor:
        for step in self.spec.activation:
            x = STEPS[step](x)
        return x

    def forward(self, x: Tensor, keep: Keep | None) -> tuple[Tensor, dict]:
        how, up = self.spec.mlp, self.up(x)
        first = up
        if how == "plain":
            hidden = self._act(up)
        elif how == "gated":
            hidden = self._act(self.gate(x)) * up
        elif how == "added":  # a unit is silent where both are
            hidden = self._act(self.gate(x)) + self._act(up)
        elif how == "mixed":  # a factor for which every unit is needed
            hidden = self._act(self.gate(x)) * F.softmax(up, dim=-1)
        else:
            units = self.spec.units
            both = up.view(*up.shape[:-1], 2, units), up.unflatten(-1, (units, 2))
            gate, up = {
                "fused": lambda: up.chunk(2, dim=-1),
                "interleaved": lambda: (up[..., ::2], up[..., 1::2]),
                "stacked": lambda: (both[0][..., 0, :], both[0][..., 1, :]),
                "paired": lambda: (both[1][..., 0], both[1][..., 1]),
            }[how]()
            hidden = self._act(gate) * up
        kept = hidden if keep is None else hidden * keep.units.to(hidden.dtype)
        return self.down(kept), {"hidden": hidden, "first": first}


class Layer(nn.Module):
    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.norm, self.norm2 = (Norm(spec.width, spec.norm) for _ in range(2))
        self.attention, self.mlp = Attention(spec), MLP(spec)

    def forward(self, x: Tensor, past: Tensor, keep: Keep | None) -> tuple[Tensor, Tensor, dict]:
        normed = self.norm(x)
        attended, cache, seen = self.attention(normed, past, keep)
        if self.spec.wiring == "parallel":
            y, more = self.mlp(normed, keep)
            return x + attended + y, cache, seen | more
        x = x + attended
        y, more = self.mlp(self.norm2(x), keep)
        return x + y, cache, seen | more


class RandomDecoder(nn.Module):
    """logits, the new cache and what escapes of the last layer."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(VOCABULARY, spec.width)
        first = Layer(spec)
        self.layers = nn.ModuleList(
            first if spec.shared else Layer(spec) for _ in range(spec.layers - 1)
        )
        self.layers.append(first)
        self.norm = Norm(spec.width, spec.norm)
        self.head = nn.Linear(spec.width, VOCABULARY, bias=False)
        if spec.tied:
            self.head.weight = self.embedding.weight

    def forward(
        self, ids: Tensor, past: Tensor, keep: Sequence[Keep] | None = None
    ) -> tuple[Tensor, ...]:
        x, caches, seen = self.embedding(ids), [], {}
        for number, layer in enumerate(self.layers):
            x, cache, seen = layer(x, past[number], None if keep is None else keep[number])
            caches.append(cache)
        escaped = () if self.spec.escape == "nothing" else (seen[self.spec.escape],)
        return (self.head(self.norm(x)), torch.stack(caches), *escaped)
