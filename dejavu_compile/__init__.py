"""Contextual sparsity for decoder language models, as a `torch.compile` backend.

    model.compile(backend="dejavu")         # lossless: skips what the model's own ReLU zeroes
    dv.calibrate(model, batches)            # then: skips what a predictor says is small

After Deja Vu (Liu et al., ICML 2023).
"""

from .artifact import Calibration, detach
from .backend import dejavu, dejavu_eager
from .calibrate import calibrate
from .errors import (
    ArtifactError,
    ArtifactMismatchError,
    CalibrationError,
    DejavuError,
    DiskFullError,
    InternalError,
    ModelStateError,
    OptionError,
    WorkdirError,
)
from .evaluate import Evaluation, evaluate
from .explain import Report, SiteReport, explain
from .read_artifact import load
from .verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "ArtifactMismatchError",
    "Calibration",
    "CalibrationError",
    "DejavuError",
    "DiskFullError",
    "Evaluation",
    "InternalError",
    "ModelStateError",
    "OptionError",
    "Report",
    "SiteReport",
    "Verification",
    "WorkdirError",
    "calibrate",
    "dejavu",
    "dejavu_eager",
    "detach",
    "evaluate",
    "explain",
    "load",
    "verify",
]
