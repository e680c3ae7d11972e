"""The backends `dejavu` and `dejavu_eager`: the pipeline, as one visible list.

capture (Dynamo) -> normalize -> find sites -> plan -> rewrite -> fuse -> schedule -> gemv, attention, caches -> one buffer -> Inductor
"""

import dataclasses
import hashlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

import dejavu_compile.kernels
import dejavu_compile.passes
from dejavu_compile.kernels.tuning import Config, in_force
from dejavu_compile.passes.counters import count_together
from dejavu_compile.passes.decode_attention import use_decode_attention
from dejavu_compile.passes.early import early_launch
from dejavu_compile.passes.find_sites import find_sites, resolve
from dejavu_compile.passes.fuse import fuse
from dejavu_compile.passes.gemv import use_gemv
from dejavu_compile.passes.into_cache import write_into_caches
from dejavu_compile.passes.normalize import normalize
from dejavu_compile.passes.one_buffer import one_buffer
from dejavu_compile.passes.rewrite import rewrite
from dejavu_compile.passes.schedule import Issue, schedule
from dejavu_compile.passes.site import Found, Policy, SiteKind

from . import _compat
from ._compat import (
    EARLY_LAUNCH,
    CustomGraphPass,
    check_strides_every_call,
    compile_fx,
    guard_identity,
    has_early_launch,
    inductor_option_names,
    kernels_analysed_once,
    launched_early,
    norms_in_one_step,
    unset_fake_temporarily,
)
from .attachments import attached, guards_needed, lay_out, note_compiled
from .autotune import block_sizes, in_table
from .dump import Dump
from .errors import OptionError
from .launches import Launch, launches_of
from .options import ExecutionMode, IssueMode, Options, split_options
from .plan import Plan, Relayout, check_fingerprint, make_plan

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Watched:
    """A weight of a site for which a graph has something attached built in: where it is among the inputs."""

    position: int
    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """A graph module after our passes, with what they found and decided.

    `few_tokens`: projections became GEMVs, as in a decode step. `early_launch`: the mode in which kernels
    may start while those before them still run, 0 for not at all. `launches`: those of our kernels whose block sizes can be chosen.
    `watched`: the weights that must be as they were when they were calibrated.
    """

    found: Found
    plan: Plan
    relayout: tuple[tuple[int, Relayout], ...]
    modified: bool
    few_tokens: bool = False
    early_launch: int = 0
    launches: tuple[Launch, ...] = ()
    watched: tuple[Watched, ...] = ()


def _issue(options: Options) -> Issue:
    return Issue.INLINE if options.issue is IssueMode.AUTO else Issue(str(options.issue))


def _on_side_stream(
    options: Options, inductor: dict[str, Any], example_inputs: Sequence[Any]
) -> Options:
    """`auto` is the side stream within CUDA graphs: a tenth off a layer of OPT-6.7B (docs/performance.md).

    Elsewhere the host pays for events more than the device gains.
    """
    cuda = any(isinstance(x, torch.Tensor) and x.is_cuda for x in example_inputs)
    if options.issue is IssueMode.AUTO and cuda and inductor.get("triton.cudagraphs"):
        return dataclasses.replace(options, issue=IssueMode.SIDE_STREAM)
    return options


def prepare(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
) -> Prepared:
    """Run our passes on `gm`, in place. Without a sparse site the graph is left as it was."""
    dump = Dump(options.dump)
    dump.graph("capture", gm)
    normalized = normalize(gm, example_inputs)
    dump.graph("normalize", gm)
    found = find_sites(gm)
    inputs = dict(
        zip((n for n in gm.graph.nodes if n.op == "placeholder"), example_inputs, strict=True)
    )
    with unset_fake_temporarily():
        plan = make_plan(found, lambda node: resolve(gm, node, inputs), options)
        note_compiled(resolve(gm, site.output.weight, inputs) for site in found.sites)
    if guards_needed():
        for site in found.sites:
            guard_identity(site.output.weight)
    modified = plan.num_sparse > 0
    if plan.num_sparse:
        rewritten = rewrite(gm, plan.decisions)
        dump.graph("rewrite", gm)
        fuse(gm)
        dump.graph("fuse", gm)
        schedule(gm, rewritten.selects, _issue(options), _overlaps(options, example_inputs))
        dump.graph("schedule", gm)
    few_tokens = False
    if options.gemv and options.execution is ExecutionMode.AUTO:
        few_tokens = use_gemv(gm).count > 0
        modified |= few_tokens
        modified |= use_decode_attention(gm).count > 0
        if modified:
            fuse(gm)
            count_together(gm)
            write_into_caches(gm)
        dump.graph("gemv", gm)
    if modified:
        one_buffer(gm)
        dump.graph("one_buffer", gm)
    else:
        normalized.restore()
    log.info("%d sites sparse, %d dense", plan.num_sparse, len(plan.sites) - plan.num_sparse)
    for site_plan in plan.sites:
        log.debug("%s: %s (%s)", site_plan.site.name, site_plan.decision.policy, site_plan.reason)
    position = {node: i for i, node in enumerate(inputs)}
    relayout = tuple((position[r.weight], r) for r in plan.relayout if r.weight in position)
    early = 0
    if few_tokens and _overlaps(options, example_inputs):
        how = early_launch(gm.graph)
        early = how.mode
        if how.reason is not None:
            log.info("kernels aren't launched early: %s", how.reason)
    launches = launches_of(gm.graph, _densities(plan)) if modified else ()
    watched = _watched(plan, position, example_inputs)
    return Prepared(found, plan, relayout, modified, few_tokens, early, launches, watched)


def _watched(
    plan: Plan, position: Mapping[fx.Node, int], example_inputs: Sequence[Any]
) -> tuple[Watched, ...]:
    """The weights of the sparse sites that have something attached, as far as their fingerprints are known."""
    found = []
    at = {id(example_inputs[i]): i for i in position.values()}
    for decision in plan.decisions:
        output = position.get(decision.site.output.weight)
        if decision.policy is Policy.DENSE or output is None:
            continue
        attachment = attached(example_inputs[output])
        if attachment is None:
            continue
        found.append(Watched(output, decision.site.name, attachment.fingerprint))
        found += [
            Watched(at[id(weight)], one.name, one.fingerprint)
            for one in attachment.inputs
            if (weight := one.weight()) is not None and id(weight) in at
        ]
    return tuple(dict.fromkeys(found))


# Where the graph's own zeros decide, how many there are isn't known: a few percent in a trained ReLU decoder, half
# in a random one.
UNKNOWN_DENSITY = 0.25


def _densities(plan: Plan) -> dict[SiteKind, float]:
    """The mean density of the sparse sites of a kind, as far as it is known."""
    known: dict[SiteKind, list[float]] = {kind: [] for kind in SiteKind}
    for site in plan.sites:
        if site.decision.policy is not Policy.DENSE and not math.isnan(site.density):
            known[site.site.kind].append(site.density)
    return {kind: sum(d) / len(d) if d else UNKNOWN_DENSITY for kind, d in known.items()}


def _device(example_inputs: Sequence[Any]) -> torch.device:
    """Where the graph runs."""
    tensors = (x for x in example_inputs if isinstance(x, torch.Tensor))
    return max((x.device for x in tensors), key=lambda device: device.type != "cpu")


def _overlaps(options: Options, example_inputs: Sequence[Any]) -> bool:
    """Whether kernels may be launched before those before them have ended: the device can, and the user lets it."""
    return options.pdl and has_early_launch(_device(example_inputs))


_warned_of_grad = False


def _needs_grad(example_inputs: Sequence[Any]) -> bool:
    """Autograd would record through this graph: it is compiled dense, with one warning."""
    global _warned_of_grad
    if not torch.is_grad_enabled():
        return False
    if not any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        return False
    if not _warned_of_grad:
        _warned_of_grad = True
        warnings.warn(
            "dejavu: gradients are enabled and parameters require them, so this graph is compiled dense. "
            "Run under torch.no_grad() or torch.inference_mode() to make it sparse.",
            stacklevel=2,
        )
    return True


def _relayout_after_call(compiled: Compiled, relayout: tuple) -> Compiled:
    """Change the strides of the parameters that `exact` needs, after a call with them.

    Dynamo has just recorded them, so they can't change while the backend runs. Its guard then fails
    once, and the second compile finds the columns contiguous. (facts: trap 17) The next model of the class, or
    layer, comes here once with its own parameters: Dynamo has one graph for all.
    """
    if not relayout:
        return compiled
    check_strides_every_call()

    def call(*args: Any) -> Any:
        result = compiled(*args)
        lay_out(((args[at], r.contracted, r.produces_units) for at, r in relayout), among=args)
        return result

    return call


def _check_written(
    compiled: Compiled, watched: tuple[Watched, ...], example_inputs: Sequence[Any]
) -> Compiled:
    """Raise ArtifactMismatchError before a step with weights that were written since calibration.

    PyTorch counts what is written into a tensor, so that a step only compares numbers. Fingerprints are taken where
    these changed: `load_state_dict` may have brought the same values.
    """
    # Inference tensors aren't counted
    watched = tuple(w for w in watched if not example_inputs[w.position].is_inference())
    if not watched:
        return compiled
    positions = [w.position for w in watched]
    known = [example_inputs[position]._version for position in positions]

    def call(*args: Any) -> Any:
        nonlocal known
        versions = [args[position]._version for position in positions]
        if versions != known:
            for site in watched:
                check_fingerprint(site.name, args[site.position], site.fingerprint)
            known = versions
        return compiled(*args)

    return call


def _as_called(compiled: Compiled, prepared: Prepared, example_inputs: Sequence[Any]) -> Compiled:
    """What Dynamo calls: `compiled`, and around it what depends on the arguments of a call."""
    checked = _check_written(compiled, prepared.watched, example_inputs)
    return _relayout_after_call(checked, prepared.relayout)


class _CacheKey(CustomGraphPass):
    """Puts our options, sources and block sizes into the key of torch's on-disk caches; changes no graph.

    Without it the caches answer with code from before an edit of a kernel's body, or from before a search. (facts:
    trap 10)
    """

    def __init__(self, options: Options, configs: Mapping[str, Config]) -> None:
        # What a search found is in the code, whether there was one is not.
        self.options = dataclasses.replace(options, autotune=False)
        self.configs = json.dumps(configs, sort_keys=True)

    def __call__(self, graph: fx.Graph) -> None:
        """Leave the graph alone."""

    def uuid(self) -> str:
        """The options, the block sizes that no rule gives, and a digest of all sources that decide about code."""
        return f"{_sources_digest()} {self.options} {self.configs}"


@cache
def _sources_digest() -> str:
    digest = hashlib.sha256(Path(_compat.__file__).read_bytes())
    for package in (dejavu_compile.passes, dejavu_compile.kernels):
        for file in sorted(Path(package.__file__).parent.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _check_option_names(inductor: dict[str, Any]) -> None:
    """Raise OptionError for an option that Inductor doesn't have."""
    known = inductor_option_names()
    for key in inductor:
        if key.replace("-", "_") not in known:
            raise OptionError(
                f"unknown option {key!r}",
                expected="an option of dejavu (dejavu.execution, ...) or of Inductor",
                fix="torch._inductor.list_options() lists Inductor's",
            )


def _inductor_config(
    options: Options, inductor: dict[str, Any], prepared: Prepared, configs: Mapping[str, Config]
) -> dict[str, Any]:
    """The user's Inductor options with what our graph needs."""
    if not prepared.modified:
        return inductor
    slot = "post_grad_custom_post_pass"
    if inductor.get(slot) is not None:
        slot = "post_grad_custom_pre_pass"
    # Inductor would sink a predictor to just before its site, and undo the lookahead. (facts: trap 6)
    ordering = {"reorder_for_locality": False, "reorder_for_peak_memory": False}
    if prepared.early_launch:
        ordering[EARLY_LAUNCH] = True
    if prepared.few_tokens:
        # A norm is one launch instead of three: there is nothing to spread over the chip.
        ordering["split_reductions"] = False
    return {**ordering, **inductor, slot: _CacheKey(options, configs)}


def dejavu(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Compiled:
    """`torch.compile(model, backend="dejavu")`: sparse where proven or calibrated, then Inductor.

    `mode` and `options` are those of `torch.compile`; our own options begin with `dejavu.` (see
    `dejavu_compile.options.Options`). Raises OptionError for options that don't exist, and
    ArtifactMismatchError if calibrated weights have changed since.
    """
    own, inductor = split_options(mode, options)
    _check_option_names(inductor)
    if _needs_grad(example_inputs):
        return compile_fx(gm, example_inputs, config_patches=inductor or None)
    prepared = prepare(gm, example_inputs, _on_side_stream(own, inductor, example_inputs))
    if not inductor.get("triton.cudagraphs"):
        # Outside CUDA graphs the kernel before ours may be one that writes a weight.
        prepared = dataclasses.replace(prepared, early_launch=0)
    configs = in_table(block_sizes(prepared.launches, own.autotune))
    patches = _inductor_config(own, inductor, prepared, configs)
    early = prepared.early_launch and patches[EARLY_LAUNCH]  # or the user's own wish
    launching = launched_early(prepared.early_launch) if early else nullcontext()
    norms = norms_in_one_step() if prepared.few_tokens else nullcontext()
    with kernels_analysed_once(), launching, norms, in_force(configs):
        compiled = compile_fx(gm, example_inputs, config_patches=patches or None)
    return _as_called(compiled, prepared, example_inputs)


def dejavu_eager(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Compiled:
    """Everything but Inductor: the rewritten graph, run eagerly. For tests and for bisecting."""
    own, _ = split_options(mode, options)
    if _needs_grad(example_inputs):
        return gm.forward
    prepared = prepare(gm, example_inputs, own)
    return _as_called(gm.forward, prepared, example_inputs)
