"""Options of the backend: ours begin with `dejavu.`, all others go to Inductor."""

import dataclasses
import difflib
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ._compat import list_mode_options
from .errors import OptionError

PREFIX = "dejavu."


class ExecutionMode(StrEnum):
    """`auto`: sparse decode, dense prefill. `masked`: every token sparse, for quality. `dense`: off."""

    AUTO = "auto"
    MASKED = "masked"
    DENSE = "dense"


class IssueMode(StrEnum):
    """How predictors run on CUDA: `auto` is the side stream within CUDA graphs, in line elsewhere."""

    AUTO = "auto"
    INLINE = "inline"
    SIDE_STREAM = "side_stream"


@dataclass(frozen=True, slots=True)
class Options:
    """Our own options, by their names without the prefix."""

    execution: ExecutionMode = ExecutionMode.AUTO
    issue: IssueMode = IssueMode.AUTO  # how predictors are issued on CUDA
    max_tokens: int = 4  # tokens a step up to which an MLP runs the union of the selections
    exact: bool = True  # skip units that the graph's own ReLU zeroes, also with no artifact
    gemv: bool = (
        True  # our ops for the projections and the attention of a decode step that stay dense
    )
    pdl: bool = (
        True  # programmatic dependent launch, within CUDA graphs on compute capability 9.0 and up
    )
    autotune: bool = False  # search block sizes on this GPU, once; max-autotune does
    dump: str = ""  # a folder for the graph before and after each pass


def _parse(name: str, value: Any) -> Any:
    field = {f.name: f for f in dataclasses.fields(Options)}[name]
    kind = field.type
    try:
        if isinstance(kind, type) and issubclass(kind, StrEnum):
            return kind(value)
    except ValueError:
        raise OptionError(
            f"option {PREFIX}{name} can't be {value!r}",
            expected=f"one of {', '.join(repr(str(v)) for v in kind)}",
        ) from None
    if type(value) is not kind:
        raise OptionError(
            f"option {PREFIX}{name} has the wrong type",
            found=f"{value!r} ({type(value).__name__})",
            expected=kind.__name__,
        )
    return value


def split_options(
    mode: str | None, options: dict[str, Any] | None
) -> tuple[Options, dict[str, Any]]:
    """Our options and Inductor's, from what `torch.compile` hands to a backend.

    The modes that begin with `max-autotune` set `dejavu.autotune`, unless the options say otherwise.
    Raises OptionError for an unknown key of ours (naming the nearest) or a value of the wrong type.
    Inductor checks its own.
    """
    known = [f.name for f in dataclasses.fields(Options)]
    ours: dict[str, Any] = {}
    inductor = dict(list_mode_options(mode)) if mode and mode != "default" else {}
    for key, value in (options or {}).items():
        if not key.startswith(PREFIX):
            inductor[key] = value
            continue
        name = key.removeprefix(PREFIX)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=len(known), cutoff=0.0)
            raise OptionError(
                f"unknown option {key!r}",
                expected="one of " + ", ".join(PREFIX + n for n in near),
                fix=f"did you mean {PREFIX + near[0]!r}?",
            )
        ours[name] = _parse(name, value)
    if mode is not None and mode.startswith("max-autotune"):
        ours.setdefault("autotune", True)
    return Options(**ours), inductor
