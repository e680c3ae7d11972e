"""Tiny decoders of transformers with random weights: one for each spelling that matters.

Hidden 128 and 256 units, so that a predictor of rank 16 fits five per cent of a site's bytes.
"""

import dataclasses
import math
import sys
from unittest import mock

import torch
import transformers
from torch import fx, nn

from dejavu_compile import Calibration
from dejavu_compile.passes import gemv
from dejavu_compile.predictors import ThresholdCurve

VOCABULARY = 128
HIDDEN = 128

# One name for each size in the configs that don't share the common ones
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_head": 4}
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_head": 4}
_COMMON = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_attention_heads": 4}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}

# class, arguments, name of the layer count, name of the unit count
_MODELS = {
    "opt": ("OPT", {**_COMMON, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": 64},
            "num_hidden_layers", "ffn_dim"),
    "gpt2": ("GPT2", _GPT2, "n_layer", "n_inner"),
    "llama": ("Llama", _GROUPED, "num_hidden_layers", "intermediate_size"),
    "gemma2": ("Gemma2", {**_GROUPED, "head_dim": 32}, "num_hidden_layers", "intermediate_size"),
    "gpt_neox": ("GPTNeoX", _COMMON, "num_hidden_layers", "intermediate_size"),
    "falcon": ("Falcon", _COMMON, "num_hidden_layers", "ffn_hidden_size"),
    "bloom": ("Bloom", _BLOOM, "n_layer", None),  # always four times its width
    "phi3": ("Phi3", {**_COMMON, "pad_token_id": 0}, "num_hidden_layers", "intermediate_size"),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 32}, "num_hidden_layers", "intermediate_size"),
    "nemotron": ("Nemotron", _GROUPED, "num_hidden_layers", "intermediate_size"),
    "gptj": ("GPTJ", {**_GPT2, "rotary_dim": 16}, "n_layer", "n_inner"),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": 24}, "num_hidden_layers", "intermediate_size"),
    "cohere": ("Cohere", _GROUPED, "num_hidden_layers", "intermediate_size"),
    "mpt": ("Mpt", {"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_heads": 4}, "n_layers", None),
    "stablelm": ("StableLm", _GROUPED, "num_hidden_layers", "intermediate_size"),
    "olmo2": ("Olmo2", _GROUPED, "num_hidden_layers", "intermediate_size"),
}  # fmt: skip

# One for each spelling of an MLP, and all: more spellings of attention
NAMES = tuple(_MODELS)[:10]
EVERY_NAME = tuple(_MODELS)


def tiny(name: str, *, layers: int = 2, units: int = 256, **more: object) -> nn.Module:
    """A fp32 decoder in eval mode; the same weights at each call."""
    prefix, arguments, layers_name, units_name = _MODELS[name]
    arguments = {**arguments, layers_name: layers, **more}
    if units_name is not None:
        arguments[units_name] = units
    config = getattr(transformers, f"{prefix}Config")(**arguments)
    head = "LMHeadModel" if name == "gpt2" else "ForCausalLM"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{prefix}{head}")(config).eval()
    # The default ids lie outside this vocabulary; and no test wants an early end.
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def text(seed: int, batch: int = 4, length: int = 48) -> torch.Tensor:
    """Random ids [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def texts(count: int = 3) -> list[torch.Tensor]:
    """Batches enough to fit predictors on."""
    return [text(seed) for seed in range(count)]


def selecting_everything(calibration: Calibration) -> Calibration:
    """Every unit passes, at a density that the plan still finds worth while: the sparse path, lossless."""
    curve = ThresholdCurve((0.1,), (-math.inf,))
    return calibration.with_sites(
        dataclasses.replace(site, curve=curve, density=0.1, metrics=None)
        for site in calibration.sites
    )


def decode_graph(model: nn.Module, **options: object) -> fx.Graph:
    """The graph of a decode step as our passes leave it, at one sequence with a static cache; GEMVs of every size are ops of ours."""
    backend, graphs = sys.modules["dejavu_compile.backend"], []
    prepare = backend.prepare

    def spy(gm: fx.GraphModule, *args: object, **kwargs: object) -> object:
        result = prepare(gm, *args, **kwargs)
        graphs.append(gm.graph)
        return result

    torch.compiler.reset()
    with mock.patch.object(backend, "prepare", spy), mock.patch.object(gemv, "CPU_FROM", 0):
        model.compile(
            backend="dejavu_eager", options={f"dejavu.{k}": v for k, v in options.items()}
        )
        model.generate(
            text(5, batch=1, length=8), max_new_tokens=3, do_sample=False, cache_implementation="static"
        )  # fmt: skip
    return graphs[-1]
