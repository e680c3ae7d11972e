"""Check a model and the token batches it is to be run on; run them alike everywhere."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .errors import CalibrationError, ModelStateError

Batch = dict[str, torch.Tensor]


def check_model(model: nn.Module, purpose: str) -> None:
    """Raise ModelStateError unless the weights are there and the model is in eval mode."""
    if model.training:
        raise ModelStateError(
            f"can't {purpose} a model in training mode: dropout would be learnt too",
            found=f"{type(model).__name__}.training is True",
            expected="evaluation mode",
            fix="model.eval()",
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelStateError(
                f"can't {purpose} a model whose weights are offloaded",
                found=f"{name} on the meta device (accelerate, device_map='auto')",
                expected="every weight on one device",
                fix="load it without offloading, e.g. device_map='cuda'",
            )


def _vocabulary(model: nn.Module) -> int | None:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return getattr(embeddings, "num_embeddings", None)


def check_batches(
    model: nn.Module, batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]]
) -> list[Batch]:
    """The batches as dicts with `input_ids` [B, T] on the model's device.

    Raises CalibrationError for no batches, a wrong type, fewer than two tokens, or ids that the model
    has no embedding for.
    """
    if isinstance(batches, torch.Tensor | Mapping):
        batches = [batches]
    device = next(model.parameters()).device
    vocabulary = _vocabulary(model)
    checked = []
    for number, batch in enumerate(batches):
        given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        ids = given.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
            kind = (
                f"{tuple(ids.shape)} {ids.dtype}"
                if isinstance(ids, torch.Tensor)
                else repr(type(ids))
            )
            raise CalibrationError(
                f"batch {number} has no usable input_ids", found=kind, expected="integers [B, T]"
            )
        if ids.shape[1] < 2:
            raise CalibrationError(
                f"batch {number} is too short to measure a next token",
                found=f"{ids.shape[1]} tokens a sequence",
                expected="at least 2, better hundreds",
            )
        if vocabulary is not None and (ids.min() < 0 or ids.max() >= vocabulary):
            raise CalibrationError(
                f"batch {number} has ids that the model has no embedding for",
                found=f"ids from {ids.min().item()} to {ids.max().item()}",
                expected=f"0 to {vocabulary - 1}",
                fix="tokenize with this model's own tokenizer",
            )
        checked.append({key: value.to(device) for key, value in given.items()})
    if not checked:
        raise CalibrationError(
            "there are no batches",
            found="an empty iterable",
            expected="input_ids tensors [B, T], or dicts of model inputs",
            fix="if `batches` is a generator, it may have been used up: make it anew",
        )
    return checked


def call_kwargs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Arguments for one forward pass: no cache, for a transformers model."""
    config = getattr(model, "config", None)
    return {**batch, "use_cache": False} if hasattr(config, "use_cache") else dict(batch)


def logits_of(output: Any) -> torch.Tensor:
    """The logits [B, T, vocabulary] of a transformers output, a tuple, or a bare tensor."""
    if isinstance(output, torch.Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def counted(batch: Batch) -> torch.Tensor:
    """Mask [B, T]: the tokens that are not padding."""
    mask = batch.get("attention_mask")
    ids = batch["input_ids"]
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
