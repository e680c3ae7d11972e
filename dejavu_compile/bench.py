"""Speed of a decode step on decoders of published shapes, with random weights and predictors of real size.

What `benchmarks/`, `dejavu bench` and the demo share: shapes, decoders, timing, JSON.
"""

import copy
import gc
import json
import platform
import statistics
import subprocess
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, StaticCache

from dejavu_compile.kernels.nibbles import pack
from dejavu_compile.passes.site import Policy, PredictorWeights, SketchWeights

from ._compat import compile_counters
from .attachments import Attachment, attach, attached, fingerprint, make_unit_major
from .errors import OptionError
from .evaluate import masked
from .predictors import rank_and_bits


def opt(hidden: int, ffn: int, layers: int, heads: int, context: int = 2048) -> OPTConfig:
    """An OPT configuration of a published size."""
    return OPTConfig(
        vocab_size=50272, hidden_size=hidden, ffn_dim=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, word_embed_proj_dim=hidden, max_position_embeddings=context,
        dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip


SHAPES = {
    "opt-125m": opt(768, 3072, 12, 12),
    "opt-1.3b": opt(2048, 8192, 24, 32),
    "opt-6.7b": opt(4096, 16384, 32, 32),
    "opt-30b": opt(7168, 28672, 48, 56),
    "opt-66b": opt(9216, 36864, 64, 72),
    "llama-3-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048,
        tie_word_embeddings=False,
    ),
}  # fmt: skip


def build(
    shape: str,
    device: str,
    dtype: torch.dtype,
    layers: int | None = None,
    context: int = 2048,
    attention_only: bool = False,
) -> nn.Module:
    """A decoder of the given shape with random weights, made on its device (no second copy).

    `attention_only` leaves MLPs and a vocabulary too small to matter.
    """
    config = copy.deepcopy(SHAPES[shape])
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.max_position_embeddings = max(context, config.max_position_embeddings)
    if attention_only:
        config.vocab_size = 1024
        setattr(config, "ffn_dim" if isinstance(config, OPTConfig) else "intermediate_size", 64)
    kind = OPTForCausalLM if isinstance(config, OPTConfig) else LlamaForCausalLM
    with torch.device("meta"):
        model = kind(config).to(dtype)
    model = model.to_empty(device=device).eval()
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.dim() < 2:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    if isinstance(config, LlamaConfig):
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model


@dataclass(frozen=True, slots=True)
class Part:
    """The MLP or the attention of one layer: weights into its units, weight out of them, how many units."""

    into: tuple[nn.Parameter, ...]
    out: nn.Parameter
    units: int
    act: nn.Module | None = None  # of a gated MLP

    @property
    def num_bytes(self) -> int:
        """Bytes that a dense evaluation reads."""
        return sum(w.numel() * w.element_size() for w in (*self.into, self.out))


def mlps(model: nn.Module) -> list[Part]:
    """The MLP of every layer of an OPT or Llama model."""
    inner = model.model
    if hasattr(inner, "decoder"):
        return [
            Part((layer.fc1.weight,), layer.fc2.weight, layer.fc2.in_features)
            for layer in inner.decoder.layers
        ]
    mlp = [layer.mlp for layer in inner.layers]
    return [
        Part((m.gate_proj.weight, m.up_proj.weight), m.down_proj.weight,
             m.down_proj.in_features, m.act_fn)
        for m in mlp
    ]  # fmt: skip


def attentions(model: nn.Module) -> list[Part]:
    """The part of the attention of every layer that a head can spare: queries and output."""
    heads, inner = model.config.num_attention_heads, model.model
    if hasattr(inner, "decoder"):
        found = [
            (layer.self_attn.q_proj, layer.self_attn.out_proj) for layer in inner.decoder.layers
        ]
    else:
        found = [(layer.self_attn.q_proj, layer.self_attn.o_proj) for layer in inner.layers]
    return [Part((q.weight,), o.weight, heads) for q, o in found]


def linears(model: nn.Module) -> dict[int, nn.Linear]:
    """The linear modules of a model by the id of their weight."""
    return {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear)}


@dataclass(frozen=True, slots=True)
class Kept:
    """What a step runs of one part: the columns of `out` in `mask`, or the units whose |act(gate)| passes a threshold.

    mask: bool [columns], or [batch, 1, columns] where each sequence has its own.
    """

    part: Part
    mask: torch.Tensor | None = None
    threshold: float = 0.0

    def zero_others(self, modules: dict[int, nn.Linear]) -> RemovableHandle:
        """A hook on the eager model, of which `modules` are the `linears`."""
        if self.mask is None:
            return self.part.act.register_forward_hook(
                lambda module, args, out: out * (out.abs() > self.threshold)
            )
        mask = self.mask.to(self.part.out.device)
        module = modules[id(self.part.out)]
        return module.register_forward_pre_hook(lambda module, args: (args[0] * mask,))

    def in_model(self, own: nn.Module, other: nn.Module) -> "Kept":
        """The same of another model of the same shape."""
        parts = zip(mlps(own) + attentions(own), mlps(other) + attentions(other), strict=True)
        return next(replace(self, part=b) for a, b in parts if a.out is self.part.out)


def attach_random_predictors(
    model: nn.Module,
    density: float | None,
    head_density: float | None = None,
    budget: float = 0.05,
) -> list[Kept]:
    """Predictors of the real byte size that select a fixed random share of units, in all layers but the first.

    Their scores are the bias: the matrices are read in full, and their product, bounded, changes nothing.
    A density of None leaves that kind of site dense. Returns what stays of each part.
    """
    kept = []
    for parts, share, make in (
        (mlps(model), density, _mlp_predictor),
        (attentions(model), head_density, _head_predictor),
    ):
        for number, part in enumerate(parts if share is not None else []):
            make_unit_major(part.out, 1, produces_units=False)
            if number == 0:
                continue
            generator = torch.Generator().manual_seed(number)
            order = torch.randperm(part.units, generator=generator)
            picked = order[: round(share * part.units)].sort().values
            predictor = make(part, budget, number)
            predictor.bias.fill_(-1e6)[picked.to(part.out.device)] = 1e6
            attach(
                part.out,
                Attachment(Policy.PREDICT, share, fingerprint(part.out), predictor=predictor,
                           source=weakref.ref(parts[number - 1].out), lookahead=1),
            )  # fmt: skip
            units = torch.zeros(part.units, dtype=torch.bool).index_fill(0, picked, True)
            kept.append(Kept(part, units.repeat_interleave(part.out.shape[1] // part.units)))
    return kept


def attach_heads_per_sequence(
    model: nn.Module, density: float, length: int, batch: int
) -> list[Kept]:
    """Predictors that select a random share of the heads for each sequence of a batch, in all layers but the first.

    Solved for the sources of one eager step with the same heads: score +1 for those that run, -1 for the others.
    Later steps have sources near to these.
    """
    parts = attentions(model)
    modules = linears(model)
    wanted, kept = [], []
    for number, part in enumerate(parts[1:], 1):
        order = torch.rand(batch, part.units, generator=torch.Generator().manual_seed(number))
        units = order.argsort().argsort() < round(density * part.units)
        wanted.append(units.to(part.out.device))
        mask = units.repeat_interleave(part.out.shape[1] // part.units, dim=1)
        kept.append(Kept(part, mask[:, None]))
    sources: list[torch.Tensor] = []
    handles = [
        modules[id(part.into[0])].register_forward_pre_hook(
            lambda module, args: sources.append(args[0][:, -1].float())
        )
        for part in parts
    ]
    oracle_logits(model, kept, length, batch)
    for handle in handles:
        handle.remove()
    steps = sources[-len(parts) :]  # after the prompt's
    for number, (part, units) in enumerate(zip(parts[1:], wanted, strict=True)):
        make_unit_major(part.out, 1, produces_units=False)
        up = (torch.linalg.pinv(steps[number]) @ (2.0 * units - 1)).T
        bias = torch.zeros(part.units, device=up.device)
        attach(
            part.out,
            Attachment(Policy.PREDICT, density, fingerprint(part.out),
                       predictor=PredictorWeights(None, up.to(part.out.dtype).contiguous(), bias),
                       source=weakref.ref(parts[number].out), lookahead=1),
        )  # fmt: skip
    return kept


def attach_gates(model: nn.Module, density: float, length: int, batch: int = 1) -> list[Kept]:
    """Thresholds that this share of the units passes in a decode step, others for each sequence, in all layers.

    Random gates lie on both sides of any threshold, and near it rounding decides which units run. So the gates'
    weights are changed, in place, by what makes the gates of the first step clear: well below for units that don't run,
    well above for the others. Gates of later steps lie around it like any.
    """
    parts, step = mlps(model), DecodeStep(model, model.forward, length, batch)
    modules = linears(model)
    thresholds = []

    def clear(number: int, weight: nn.Parameter, inputs: torch.Tensor) -> None:
        source = inputs[:, -1].float()
        generator = torch.Generator().manual_seed(number)
        order = torch.rand(batch, weight.shape[0], generator=generator).argsort().argsort()
        runs = (order < round(density * weight.shape[0])).to(weight.device)
        gates = source @ weight.float().T
        threshold = parts[number].act(gates).abs().flatten().quantile(1 - density).item()
        thresholds.append(threshold)
        wanted = torch.where(runs, gates.abs() + 2 * threshold + 0.5, -threshold)
        weight += (torch.linalg.pinv(source) @ (wanted - gates)).T.to(weight.dtype)

    handles = [
        modules[id(part.into[0])].register_forward_pre_hook(
            lambda module, args, number=number: clear(number, module.weight, args[0])
        )
        for number, part in enumerate(parts)
    ]
    step.with_prompt()
    for handle in handles:
        handle.remove()
    kept = []
    for part, threshold in zip(parts, thresholds, strict=True):
        for weight, produces in ((part.into[1], True), (part.out, False)):
            make_unit_major(weight, 1, produces_units=produces)
        attach(
            part.out,
            Attachment(Policy.GATE, density, fingerprint(part.out), threshold=threshold),
        )
        kept.append(Kept(part, threshold=threshold))
    return kept


def attach_random_sketches(model: nn.Module, density: float) -> list[Kept]:
    """Sketches of the real byte size that select a fixed random share of the units, in all layers of gated MLPs.

    Both are read in full, and their products count nothing: a gate is act(1), the other factor the root of a floor of 1
    or 0.
    """
    kept = []
    for number, part in enumerate(mlps(model)):
        for weight, produces in (*((w, True) for w in part.into), (part.out, False)):
            make_unit_major(weight, 1, produces_units=produces)
        (width, units), device = part.out.shape, part.out.device
        generator = torch.Generator().manual_seed(number)
        picked = torch.randperm(units, generator=generator)[: round(density * units)]
        runs = torch.zeros(units, dtype=torch.bool).index_fill(0, picked, True)
        codes = (
            torch.randint(0, 256, (units, width // per_byte), generator=generator)
            for per_byte in (2, 4)
        )
        numbers = torch.zeros(5, units)
        numbers[1], numbers[4] = 1, runs
        sketch = SketchWeights(*(c.to(device, torch.uint8) for c in codes), numbers.to(device))
        attach(
            part.out,
            Attachment(
                Policy.SKETCH, density, fingerprint(part.out), threshold=0.1, sketch=sketch
            ),
        )
        kept.append(Kept(part, runs))
    return kept


def _mlp_predictor(part: Part, budget: float, seed: int) -> PredictorWeights:
    """As calibration stores them, its rank set by the byte budget."""
    generator = torch.Generator(part.out.device).manual_seed(seed)
    width = part.out.shape[0]
    rank, bits = rank_and_bits(part.num_bytes, width, part.units, budget)
    down, up = (
        torch.randint(-7, 8, shape, generator=generator, dtype=torch.int8, device=part.out.device)
        for shape in ((rank, width), (part.units, rank))
    )
    if bits == 4:
        down, up = pack(down), pack(up)
    return PredictorWeights(down, up, torch.empty(part.units, device=part.out.device))


def _head_predictor(part: Part, budget: float, seed: int) -> PredictorWeights:
    """Of full rank, in the model's dtype: heads are few."""
    generator = torch.Generator().manual_seed(seed)
    like = {"device": part.out.device, "dtype": part.out.dtype}
    up = torch.randn(part.units, part.out.shape[0], generator=generator).to(**like)
    return PredictorWeights(None, up, torch.empty(part.units, device=part.out.device))


PROMPT_CHUNK = 1024  # tokens: attention that keeps all its weights needs the square of them


class DecodeStep:
    """One decode step of a transformers model with a static cache of `length` slots, at batch `batch`."""

    def __init__(
        self, model: nn.Module, forward: Callable[..., Any], length: int, batch: int = 1
    ) -> None:
        device = next(model.parameters()).device
        self.forward, self.start, self.config = forward, length // 2, model.config
        self.cache = StaticCache(config=model.config, max_cache_len=length)
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
        """Back to the first step after the prompt, in place: the addresses are static."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.start)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Logits [batch, vocabulary]."""
        torch.compiler.cudagraph_mark_step_begin()
        output = self.forward(
            input_ids=self.token, attention_mask=self.mask, position_ids=self.position,
            past_key_values=self.cache, use_cache=True,
        )  # fmt: skip
        return output.logits[:, -1]


def time_us(
    call: Callable[[], Any], repeats: int, *, warmup: int = 3, together: int = 1
) -> dict[str, float]:
    """p20, p50 and p80 of one call in microseconds; on CUDA by events around `together` calls in a row.

    Decoding queues one step behind the other, so the host's share shows only where it is the longer one.
    """
    for _ in range(warmup):
        call()
    samples = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            for _ in range(together):
                call()
            end.record()
            torch.cuda.synchronize()
            samples.append(1e3 * begin.elapsed_time(end) / together)
        else:
            start = time.perf_counter()
            call()
            samples.append(1e6 * (time.perf_counter() - start))
    quantiles = statistics.quantiles(samples, n=10)
    return {"p20": quantiles[1], "p50": statistics.median(samples), "p80": quantiles[7]}


@cache
def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 2 GiB on this GPU: what a byte floor is reckoned with.

    4.27e12 on an H200, some 3.0e12 on an H100.
    """
    source = torch.zeros(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us = time_us(lambda: target.copy_(source), 10)["p50"]
    return 2 * source.numel() / us * 1e6


def kernel_times(call: Callable[[], Any], calls: int = 10) -> list[dict[str, Any]]:
    """Time on the GPU by kernel, longest first: name, launches a call, microseconds a call."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name][0] += 1
            found[event.name][1] += event.device_time_total
    return [
        {"kernel": name[:100], "launches": count / calls, "us": us / calls}
        for name, (count, us) in sorted(found.items(), key=lambda item: -item[1][1])
    ]


def timeline(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """The GPU's work in one call, in order: kernel, stream, start and duration in microseconds."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    return [
        {
            "kernel": event.name[:100], "stream": event.device_resource_id,
            "start_us": round(event.time_range.start - events[0].time_range.start, 2),
            "us": round(event.time_range.elapsed_us(), 2),
        }
        for event in events
    ]  # fmt: skip


def oracle_logits(model: nn.Module, kept: list[Kept], length: int, batch: int = 1) -> torch.Tensor:
    """Logits of the eager step with all units zeroed that `kept` leaves out of the parts it names."""
    step = DecodeStep(model, model.forward, length, batch)
    modules = linears(model)
    handles = [part.zero_others(modules) for part in kept]
    logits = step().float().clone()
    for handle in handles:
        handle.remove()
    return logits


def weight_bytes(
    model: nn.Module, density: float | None, head_density: float | None = None
) -> int:
    """Weights that one step reads, predictors too: the embedding only through the head it is tied to."""
    skip = {id(p) for n, p in model.named_parameters() if "embed_positions" in n}
    total = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in skip)
    if model.config.tie_word_embeddings is False:
        embeddings = model.get_input_embeddings().weight
        total -= embeddings.numel() * embeddings.element_size()
    for parts, share in ((mlps(model), density), (attentions(model), head_density)):
        for part in parts if share is not None else []:
            attachment = attached(part.out)
            if attachment is None:
                continue
            total -= round(_skippable(part, attachment.policy) * (1 - share))
            total += attachment.selector_bytes
    return total


def _skippable(part: Part, policy: Policy) -> int:
    """Bytes of the rows and columns of units that don't run; a gate is read in full."""
    gate = part.into[0] if policy is Policy.GATE else None
    return part.num_bytes - (gate.numel() * gate.element_size() if gate is not None else 0)


def cache_bytes(model: nn.Module, length: int, head_density: float | None = None) -> int:
    """Keys and values that one step reads from a cache of `length` slots."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers
    if head_density is not None:
        # Keys that a group of heads shares are read if any of them runs.
        group = config.num_attention_heads // heads
        layers = 1 + (layers - 1) * (1 - (1 - head_density) ** group)
    itemsize = next(model.parameters()).element_size()
    return round(2 * layers * heads * head_dim * length * itemsize)


STEPS_BESIDE = 32  # those that warm up


def _together() -> int:
    """Steps a sample: on CUDA several, queued behind each other."""
    return 10 if torch.cuda.is_available() else 1


def measure(
    model: nn.Module,
    provider: str,
    length: int,
    repeats: int,
    expected: torch.Tensor,
    batch: int = 1,
    breakdown: bool = False,
    **compile_args: Any,
) -> dict[str, Any]:
    """Compile, check against the oracle, time, and count recompiles and skipped CUDA graphs."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    started = time.monotonic()
    step = DecodeStep(model, torch.compile(model.forward, **compile_args), length, batch)
    for _ in range(4):
        step.reset()
        logits = step().float().clone()
    compile_s = time.monotonic() - started
    error = ((logits - expected).norm() / expected.norm()).item()
    before = compile_counters()
    together = _together()
    assert repeats * together <= length - step.start - STEPS_BESIDE, (
        "the cache is too short for so many steps"
    )
    step.reset()
    times = time_us(step, repeats, together=together)
    after = compile_counters()
    step.reset()
    kernels = {"kernels": kernel_times(step), "timeline": timeline(step)} if breakdown else {}
    return {
        "provider": provider, "error": error, "compile_s": compile_s, **times,
        "recompiles": after["graphs"] - before["graphs"], "cudagraph_skips": after["cudagraph_skips"],
        **kernels,
    }  # fmt: skip


def compare_steps(
    model: nn.Module, length: int, batch: int = 1, repeats: int = 20
) -> list[dict[str, Any]]:
    """A decode step of `model` dense by Inductor, then by dejavu with what is attached: rows of `measure`.

    Errors: Inductor's against the eager step, dejavu's against the masked graph run without Inductor, which makes the
    same selections. Raises OptionError for a cache too short for the steps, or longer than the model's context.
    """
    steps = repeats * _together() + STEPS_BESIDE
    longest = getattr(model.config, "max_position_embeddings", None) or length
    if not 2 * steps <= length <= longest:
        raise OptionError(
            "the cache's length doesn't fit",
            found=f"{length} slots for {steps} steps that begin in its middle",
            expected=f"{2 * steps} to {longest}",
            fix="another length, or fewer repeats",
        )
    options = {"triton.cudagraphs": True} if torch.cuda.is_available() else {}
    rows = []
    for provider, reference, backend in (
        ("dense Inductor", model.forward, "inductor"),
        ("dejavu", masked(model), "dejavu"),
    ):
        torch.compiler.reset()
        expected = DecodeStep(model, reference, length, batch)().float().clone()
        rows.append(
            measure(model, provider, length, repeats, expected, batch, backend=backend, options=options)
        )  # fmt: skip
    return rows


def environment() -> dict[str, str]:
    """Machine, versions and commit, for the head of every result."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()  # fmt: skip
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "device": device or platform.machine(),
        "cores": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit or "unknown",
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Write JSON with the environment first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"environment": environment(), **result}, indent=1), encoding="utf-8"
    )
