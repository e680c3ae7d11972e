"""Decoders of published shapes with random weights, their parts, and the bytes that a step of them reads."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
)

from dejavu_compile.passes.site import Policy

from .attachments import attached


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
    # 10 of its 35 layers keep 5 % of the gates; the class has this size by default
    "gemma-3n-e4b": Gemma3nTextConfig(),
}  # fmt: skip


TOO_SMALL_TO_MATTER = {
    "vocab_size": 1024, "vocab_size_per_layer_input": 1024, "ffn_dim": 64, "intermediate_size": 64,
}  # fmt: skip


def _with_layers(config: PreTrainedConfig, layers: int | None) -> PreTrainedConfig:
    """The first layers only. Layers that have no keys of their own, which come last, stay the last."""
    every = config.num_hidden_layers
    layers = layers or every
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == every:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
    if hasattr(config, "num_kv_shared_layers"):
        config.num_kv_shared_layers = max(0, config.num_kv_shared_layers - (every - layers))
    return config


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
    config = _with_layers(copy.deepcopy(SHAPES[shape]), layers)
    config.max_position_embeddings = max(context, config.max_position_embeddings)
    if attention_only:
        for name, size in TOO_SMALL_TO_MATTER.items():
            if hasattr(config, name):
                each = isinstance(getattr(config, name), list)
                setattr(config, name, [size] * config.num_hidden_layers if each else size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device=device).eval()
    model.tie_weights()
    # Only angles and scales, which no checkpoint holds, as transformers does after it loaded one
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.initialize_weights()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.dim() < 2:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    return model


# Bytes of a GPU that activations, caches and CUDA graphs may need beside two models
ROOM = 8 << 30


def in_float32(
    model: nn.Module, shape: str, context: int, attention_only: bool = False
) -> nn.Module | None:
    """A model of the same shape in fp32, or None where that is its dtype, or doesn't fit beside it on the GPU."""
    needed = 4 * sum(p.numel() for p in model.parameters()) + ROOM
    first = next(model.parameters())
    if first.dtype == torch.float32 or not first.is_cuda or needed > torch.cuda.mem_get_info()[0]:
        return None
    layers = model.config.num_hidden_layers
    return build(shape, "cuda", torch.float32, layers, context, attention_only)


@dataclass(frozen=True, slots=True)
class Part:
    """The MLP or the attention of one layer: weights into its units, weight out of them, how many units."""

    into: tuple[nn.Parameter, ...]
    out: nn.Parameter
    units: int
    act: nn.Module | None = (
        None  # of a gated MLP, if it is all that there is between gate and product
    )

    @property
    def is_mlp(self) -> bool:
        """A unit is one column of `out`, not a head's."""
        return self.units == self.out.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes that a dense evaluation reads."""
        return sum(w.numel() * w.element_size() for w in (*self.into, self.out))


def mlps(model: nn.Module) -> list[Part]:
    """The MLP of every layer of a model of one of these shapes."""
    inner = model.model
    if hasattr(inner, "decoder"):
        return [
            Part((layer.fc1.weight,), layer.fc2.weight, layer.fc2.in_features)
            for layer in inner.decoder.layers
        ]
    return [_mlp(layer.mlp) for layer in inner.layers]


def _mlp(m: nn.Module) -> Part:
    """Gated, or with one projection into its units (Nemotron)."""
    gate = getattr(m, "gate_proj", None)
    into = (m.up_proj.weight,) if gate is None else (gate.weight, m.up_proj.weight)
    gated = gate is not None and not getattr(m, "activation_sparsity", 0.0)
    return Part(into, m.down_proj.weight, m.down_proj.in_features, m.act_fn if gated else None)


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


def row_major(model: nn.Module) -> None:
    """Undo what attaching did to the strides of the weights: each lies as the model made it."""
    for part in (*mlps(model), *attentions(model)):
        for weight in (*part.into, part.out):
            weight.data = weight.data.contiguous()


def weight_bytes(
    model: nn.Module, density: float | None, head_density: float | None = None
) -> int:
    """Weights that one step reads, predictors too: an embedding only through the head that it is tied to."""
    head = model.get_output_embeddings().weight
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - {id(head)}
    total = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)
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
    """Keys and values that one step reads from a cache of `length` slots, each layer anew where several share them."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    layers = config.num_hidden_layers
    if head_density is not None:
        # Keys that a group of heads shares are read if any of them runs.
        group = config.num_attention_heads // heads
        layers = 1 + (layers - 1) * (1 - (1 - head_density) ** group)
    itemsize = next(model.parameters()).element_size()
    return round(2 * layers * heads * head_dim * length * itemsize)
