"""Which predictor or threshold belongs to which weight, by the identity of the weight.

A site is known by its output projection's parameter: the same object that the compiler sees. So nothing
has to be passed through `torch.compile`, and two models in one process don't disturb each other: Dynamo
runs one graph for all models of a class, so graphs that have attachments built in, or were compiled
beside some, are guarded by the identity of their weights (`guards_needed`).
"""

import hashlib
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from dejavu_compile.passes.site import Policy, PredictorWeights, SketchWeights

from ._compat import storage_id

_attached: WeakIdKeyDictionary = WeakIdKeyDictionary()
_compiled: WeakIdKeyDictionary = WeakIdKeyDictionary()
_any_unguarded = False  # a graph in Dynamo's cache takes any model of its class

FINGERPRINT_SAMPLES = 4096


@dataclass(frozen=True, slots=True)
class InputWeight:
    """A weight, or bias, between a site's input and its units, as it was when it was calibrated."""

    name: str
    weight: weakref.ref
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Attachment:
    """What calibration decided for one site.

    `source` is the output weight of the site whose input the predictor reads, `lookahead` layers
    earlier: the one declared edge. `fingerprint` is that of the site's output weight, `inputs` are its other weights;
    none where they aren't known. Of a gate, units run where |gate| * sensitivity is above `threshold`; sensitivity
    [units] fp32 on the weight's device, None for ones. Of a sketch, those whose score is.
    """

    policy: Policy
    density: float
    fingerprint: str
    threshold: float = 0.0
    sensitivity: torch.Tensor | None = None
    predictor: PredictorWeights | None = None
    source: weakref.ref | None = None
    lookahead: int = 0
    sketch: SketchWeights | None = None
    inputs: tuple[InputWeight, ...] = ()

    @property
    def selector_bytes(self) -> int:
        """Bytes that deciding which units run reads a step, but for a carrier."""
        return sum(p.num_bytes for p in (self.predictor, self.sketch) if p is not None)


def attach(weight: torch.Tensor, attachment: Attachment) -> None:
    """Attach, and make graphs that were compiled with this weight compile again.

    So must those that any model of its class could run: compiled while nothing was attached.
    """
    _attached[weight] = attachment
    invalidate([weight], unguarded=True)


def detach(weight: torch.Tensor) -> bool:
    """Remove what is attached to `weight`; False if nothing was."""
    if weight not in _attached:
        return False
    del _attached[weight]
    invalidate([weight])
    return True


def attached(weight: torch.Tensor) -> Attachment | None:
    """What is attached to `weight`."""
    return _attached.get(weight)


def guards_needed() -> bool:
    """Whether a graph compiled now is for its own weights only: something is attached to some model."""
    return len(_attached) > 0


def note_compiled(weights: Iterable[torch.Tensor]) -> None:
    """Remember that a compiled graph has decisions about these weights built in."""
    global _any_unguarded
    for weight in weights:
        _compiled[weight] = True
        _any_unguarded |= not guards_needed()


def invalidate(weights: Iterable[torch.Tensor], *, unguarded: bool = False) -> None:
    """Drop compiled graphs if one was built with one of these weights, or (`unguarded`) takes any."""
    global _any_unguarded
    if any(weight in _compiled for weight in weights) or (unguarded and _any_unguarded):
        _compiled.clear()
        _any_unguarded = False
        torch.compiler.reset()


def fingerprint(weight: torch.Tensor) -> str:
    """A digest of shape, dtype and evenly spaced elements, independent of strides and of the device.

    It reads FINGERPRINT_SAMPLES elements a row block, so that it costs nothing at compile time; another
    checkpoint, a merge or a step of training changes it. A vector is taken for a row.
    """
    matrix = weight.detach() if weight.dim() == 2 else weight.detach().reshape(1, -1)
    rows = max(1, min(matrix.shape[0], FINGERPRINT_SAMPLES // 16))
    columns = max(1, min(matrix.shape[1], FINGERPRINT_SAMPLES // rows))
    row_ids = torch.linspace(0, matrix.shape[0] - 1, rows).long().to(weight.device)
    column_ids = torch.linspace(0, matrix.shape[1] - 1, columns).long().to(weight.device)
    sample = matrix[row_ids[:, None], column_ids[None, :]].float().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype}".encode())
    digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def model_fingerprint(model: nn.Module) -> str:
    """A digest of a model's modules and of the `fingerprint` of each of its parameters and buffers."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.numel():
            matrix = tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)
            digest.update(f"{name} {tuple(tensor.shape)} {fingerprint(matrix)}".encode())
    return digest.hexdigest()[:16]


def is_unit_major(weight: torch.Tensor, contracted: int, *, produces_units: bool) -> bool:
    """Each unit's row (of a projection into the units) or column (out of them) is contiguous.

    `contracted` is the dim of `weight` that the projection sums over.
    """
    contiguous_dim = contracted if produces_units else 1 - contracted
    return weight.stride(contiguous_dim) == 1 or weight.shape[contiguous_dim] == 1


def fixed_layout(weight: torch.Tensor) -> str | None:
    """Why this tensor has to lie as it does, after "it ..."; None for a parameter that fills its memory.

    Another layout is other memory: whoever else has the old one would no longer see what is written, and a
    subclass keeps its values elsewhere.
    """
    if type(weight) is not nn.Parameter:
        what = "a tensor" if type(weight) is torch.Tensor else f"of type {type(weight).__name__}"
        return f"is {what}, no plain nn.Parameter"
    storage = weight.untyped_storage()
    if storage.nbytes() != weight.numel() * weight.element_size():
        return "is a view of a part of its memory"
    if not weight.is_cuda and weight.is_shared():  # on CUDA always true
        return "has its memory in common with other processes"
    return None


def make_unit_major(weight: torch.Tensor, contracted: int, *, produces_units: bool) -> None:
    """Change the strides of a parameter in place: same values, shape and object, no second copy.

    One weight at a time is held twice while it is copied. `state_dict` and `save_pretrained` see the
    same tensor as before. A weight of `fixed_layout` is left as it is. (design: "weights")
    """
    if is_unit_major(weight, contracted, produces_units=produces_units):
        return
    if fixed_layout(weight) is not None:
        return
    with torch.no_grad():
        weight.data = weight.data.t().contiguous().t()


def lay_out(wanted: Iterable[tuple[torch.Tensor, int, bool]], among: Iterable[object]) -> None:
    """`make_unit_major` for each (weight, contracted, produces_units), but where another parameter of `among` lies in its memory."""
    parameters = {id(p): p for p in among if isinstance(p, nn.Parameter)}
    lying = Counter(map(storage_id, parameters.values()))
    for weight, contracted, produces_units in wanted:
        if lying[storage_id(weight)] <= 1:
            make_unit_major(weight, contracted, produces_units=produces_units)
