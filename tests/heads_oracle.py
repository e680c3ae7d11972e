"""Attention whose heads are chosen by hooks on the eager model: what compiled heads are compared with."""

import dataclasses

from torch import nn

from dejavu_compile import Calibration
from dejavu_compile.artifact import SiteRecord
from dejavu_compile.passes.site import SiteKind


def attention_sites(calibration: Calibration) -> list[SiteRecord]:
    """The records of attention, by layer."""
    return [site for site in calibration.sites if site.kind is SiteKind.ATTENTION]


def heads_only(calibration: Calibration) -> Calibration:
    """Without what it does to MLPs."""
    return calibration.with_sites(
        site
        if site.kind is SiteKind.ATTENTION
        else dataclasses.replace(site, policy="dense", predictor=None)
        for site in calibration.sites
    )


def projections(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(query, output) projections of each layer."""
    inner = model.model
    attentions = [x.self_attn for x in getattr(inner, "decoder", inner).layers]
    return [(a.q_proj, a.out_proj if hasattr(a, "out_proj") else a.o_proj) for a in attentions]


class HeadsByHooks:
    """Eager, every head's predictor reading the attention input a layer earlier, in float64.

    `decode_only`: steps of several tokens are dense, as they are in a compiled model.
    """

    def __init__(
        self, model: nn.Module, calibration: Calibration, *, decode_only: bool = False
    ) -> None:
        self.inputs, self.kept, self.handles = {}, [], []
        self.decode_only = decode_only
        for number, (query, out) in enumerate(projections(model)):
            site = attention_sites(calibration)[number]
            self.handles.append(query.register_forward_pre_hook(self._remember(number)))
            if site.predictor is not None:
                self.handles.append(out.register_forward_pre_hook(self._zero(number, site)))

    def _remember(self, number):
        return lambda module, args: self.inputs.__setitem__(number, args[0])

    def _zero(self, number, site):
        predictor = site.predictor

        def hook(module, args):
            if self.decode_only and args[0].shape[1] > 1:
                return None
            source = self.inputs[number - site.lookahead].double()
            score = source @ predictor.up.double().T * predictor.scale + predictor.bias
            keep = score > site.threshold
            self.kept.append(keep.double().mean().item())
            heads = args[0].unflatten(-1, (keep.shape[-1], -1))
            return ((heads * keep[..., None]).flatten(-2),)

        return hook

    @property
    def density(self) -> float:
        """Mean share of the heads that ran."""
        return sum(self.kept) / len(self.kept)

    def __enter__(self) -> "HeadsByHooks":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
