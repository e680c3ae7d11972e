"""One decode step of a model, and its oracle: the eager step with all units zeroed that a selection leaves out."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import StaticCache

from .errors import OptionError
from .shapes import Part, attentions, linears, mlps

PROMPT_CHUNK = 1024  # tokens: attention that keeps all its weights needs the square of them


class DecodeStep:
    """One decode step of a transformers model with a static cache of `length` slots, at batch `batch`."""

    def __init__(
        self, model: nn.Module, forward: Callable[..., Any], length: int, batch: int = 1
    ) -> None:
        device = next(model.parameters()).device
        self.forward, self.start, self.config = forward, length // 2, model.config
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        shortest = min(layer.max_cache_len for layer in self.cache.layers)
        if shortest < length:
            raise OptionError(
                "the cache is longer than this model's sliding window, which has a mask of its own",
                found=f"{length} slots, a window of {shortest}",
                fix=f"a length of at most {shortest}",
            )
        self.token = 11 + 13 * torch.arange(batch, device=device)[:, None]
        self.position = torch.full((batch, 1), self.start, device=device)
        self.mask = torch.ones(batch, 1, 1, length, dtype=torch.bool, device=device)
        self.prompt = torch.arange(batch * self.start, device=device).view(batch, -1) % 1000 + 5
        positions = torch.arange(self.start, device=device).expand(batch, -1)
        with torch.no_grad():
            for begin in range(0, self.start, PROMPT_CHUNK):
                part = slice(begin, begin + PROMPT_CHUNK)
                model.forward(
                    input_ids=self.prompt[:, part],
                    position_ids=positions[:, part],
                    past_key_values=self.cache,
                    use_cache=True,
                )

    @torch.no_grad()
    def with_prompt(self) -> None:
        """The first step in one pass with its prompt, over a cache of its own: what a layer leaves is read by the next."""
        rows = self.start + 1
        mask = torch.ones(rows, self.mask.shape[-1], dtype=torch.bool, device=self.mask.device)
        mask[:-1].tril_()
        self.forward(
            input_ids=torch.cat([self.prompt, self.token], dim=1),
            attention_mask=mask.expand(len(self.token), 1, -1, -1),
            position_ids=torch.arange(rows, device=self.mask.device).expand(len(self.token), -1),
            past_key_values=StaticCache(self.config, max_cache_len=self.mask.shape[-1]),
            use_cache=True,
        )

    def reset(self) -> None:
        """Back to the first step after the prompt, in place: the addresses are static.

        The mask lets every slot be read, so those of later steps are emptied.
        """
        for layer in self.cache.layers:
            for slots in (layer.keys, layer.values):
                slots[:, :, self.start :].zero_()
            layer.cumulative_length.fill_(self.start)
            if hasattr(
                layer, "cumulative_length_int"
            ):  # of a sliding window, which decides by it in Python
                layer.cumulative_length_int = self.start

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Logits [batch, vocabulary]."""
        torch.compiler.cudagraph_mark_step_begin()
        output = self.forward(
            input_ids=self.token, attention_mask=self.mask, position_ids=self.position,
            past_key_values=self.cache, use_cache=True,
        )  # fmt: skip
        return output.logits[:, -1]


@dataclass(frozen=True, slots=True)
class Share:
    """What a step reads of one part: of its units' weights, and of the keys and values of its heads."""

    weights: float
    cache: float = 1.0


@dataclass(frozen=True, slots=True)
class Kept:
    """What a step runs of one part: the columns of `out` in `mask`, or the units whose |act(gate)| passes a threshold.

    mask: bool [columns], or [batch, 1, columns] where each sequence has its own.
    """

    part: Part
    mask: torch.Tensor | None = None
    threshold: float = 0.0

    def zero_others(self, modules: dict[int, nn.Linear]) -> RemovableHandle:
        """A hook on the eager model, of which `modules` are the `linears`. It takes one step of every sequence.

        A unit whose gate passes in one sequence runs for all.
        """
        if self.mask is None:
            return self.part.act.register_forward_hook(
                lambda module, args, out: out * (out.abs() > self.threshold).flatten(0, -2).any(0)
            )
        mask = self.mask.to(self.part.out.device)
        module = modules[id(self.part.out)]
        return module.register_forward_pre_hook(lambda module, args: (args[0] * mask,))

    def share(self, kv_heads: int) -> Share:
        """Of the units in `mask`: a unit's weights are read if any sequence runs it, its cache for each that does.

        Heads that share keys, of which there are `kv_heads`, read them if one of them runs.
        """
        width = self.part.out.shape[1] // self.part.units
        units = self.mask.view(-1, self.part.units, width)[..., 0]
        weights = units.any(0).float().mean().item()
        if self.part.is_mlp:
            return Share(weights)
        return Share(weights, units.unflatten(1, (kv_heads, -1)).any(2).float().mean().item())

    def in_model(self, own: nn.Module, other: nn.Module) -> "Kept":
        """The same of another model of the same shape."""
        parts = zip(mlps(own) + attentions(own), mlps(other) + attentions(other), strict=True)
        return next(replace(self, part=b) for a, b in parts if a.out is self.part.out)


@dataclass(frozen=True, slots=True)
class Oracle:
    """Logits of an eager step, and by the id of the weight out of each part what that step needed of it.

    Of an MLP the units that weren't zero for all sequences: what a ReLU leaves, where nothing else selects.
    """

    logits: torch.Tensor
    shares: dict[int, Share]


def oracle_step(model: nn.Module, kept: list[Kept], length: int, batch: int = 1) -> Oracle:
    """The eager step with all units zeroed that `kept` leaves out of the parts it names."""
    step = DecodeStep(model, model.forward, length, batch)
    modules, shares = linears(model), {}
    handles = [one.zero_others(modules) for one in kept]

    def count(module: nn.Linear, args: tuple[torch.Tensor]) -> None:
        used = (args[0].flatten(0, -2) != 0).any(0)
        shares[id(module.weight)] = Share(used.float().mean().item())

    handles += [modules[id(part.out)].register_forward_pre_hook(count) for part in mlps(model)]
    logits = step().float().clone()
    for handle in handles:
        handle.remove()
    kv_heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    shares |= {id(one.part.out): one.share(kv_heads) for one in kept if one.mask is not None}
    return Oracle(logits, shares)


def oracle_logits(model: nn.Module, kept: list[Kept], length: int, batch: int = 1) -> torch.Tensor:
    """The logits of `oracle_step`."""
    return oracle_step(model, kept, length, batch).logits


TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-4}


@dataclass(frozen=True, slots=True)
class Reference:
    """What a compiled step is compared with. `eager_error`: how far the eager model is off in its own dtype."""

    oracle: Oracle
    tolerance: float
    eager_error: float | None = None


def compared_with(
    model: nn.Module, wide: nn.Module | None, kept: list[Kept], length: int, batch: int
) -> Reference:
    """The oracle, in fp32 where `wide` is a model of the same shape in it, and the tolerance.

    A step in bf16 is off by what its dtype loses, and a gate next to its threshold falls on either side by rounding
    alone, in the eager model as in ours: so a row may be off by half more than the eager model is.
    """
    own = oracle_step(model, kept, length, batch)
    tolerance = TOLERANCE[model.dtype]
    if wide is None:
        return Reference(own, tolerance)
    wide.load_state_dict(model.state_dict())  # each time: `attach_gates` changes weights
    logits = oracle_logits(wide, [k.in_model(model, wide) for k in kept], length, batch)
    eager = ((own.logits - logits).norm() / logits.norm()).item()
    return Reference(Oracle(logits, own.shares), max(tolerance, 1.5 * eager), eager)
