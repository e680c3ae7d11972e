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


def _holds_integers(tensor: torch.Tensor) -> bool:
    dtype = tensor.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return repr(type(value))


def _check_others(number: int, batch: Mapping[str, Any]) -> None:
    """What goes with a batch's `input_ids` are tensors, and its mask says of each token whether it is padding."""
    for key, value in batch.items():
        if not isinstance(value, torch.Tensor):
            raise CalibrationError(
                f"batch {number} has a {key} that isn't a tensor",
                found=_kind(value),
                expected="tensors, which go to the model's forward as they are",
                fix=f"leave {key} out",
            )
    mask, shape = batch.get("attention_mask"), tuple(batch["input_ids"].shape)
    if mask is None:
        return
    if mask.shape != shape:
        raise CalibrationError(
            f"batch {number} has an attention_mask that doesn't say which tokens are padding",
            found=f"shape {tuple(mask.shape)}",
            expected=f"shape {shape}, that of input_ids: 1 for a token, 0 for padding",
            fix="give the tokenizer's own mask; the causal one is the model's business",
        )
    if not mask.any():
        raise CalibrationError(
            f"batch {number} has no token that counts",
            found="an attention_mask of zeros only",
            expected="1 for a token, 0 for padding",
            fix="leave out batches that are all padding",
        )


def check_batches(
    model: nn.Module, batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]]
) -> list[Batch]:
    """The batches as dicts with int64 `input_ids` [B, T] on the model's device.

    Raises CalibrationError for no batches, a wrong type or shape, fewer than two tokens, only padding, or ids that
    the model has no embedding for.
    """
    if isinstance(batches, torch.Tensor | Mapping):
        batches = [batches]
    device = next(model.parameters()).device
    vocabulary = _vocabulary(model)
    checked = []
    for number, batch in enumerate(batches):
        given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        ids = given.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or not _holds_integers(ids):
            raise CalibrationError(
                f"batch {number} has no usable input_ids",
                found=_kind(ids),
                expected="integers [B, T]",
                fix='tokenizer(texts, return_tensors="pt").input_ids',
            )
        # Embeddings take no other integers than these and int32, nor does int8 compare with every vocabulary.
        ids = given["input_ids"] = ids.long()
        if ids.shape[0] == 0:
            raise CalibrationError(
                f"batch {number} has no sequences",
                found=f"input_ids of shape {tuple(ids.shape)}",
                expected="at least one sequence",
                fix="leave empty batches out",
            )
        if ids.shape[1] < 2:
            raise CalibrationError(
                f"batch {number} is too short to measure a next token",
                found=f"{ids.shape[1]} tokens a sequence",
                expected="at least 2, better hundreds",
                fix="longer sequences",
            )
        _check_others(number, given)
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
