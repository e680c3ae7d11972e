"""Errors that say what was found, what was expected, and what to do."""


class DejavuError(Exception):
    """Base of every error that this package raises on purpose."""

    def __init__(self, what: str, *, found: str = "", expected: str = "", fix: str = "") -> None:
        rows = [("found", found), ("expected", expected), ("fix", fix)]
        super().__init__("\n".join([what, *(f"  {k:<8}  {v}" for k, v in rows if v)]))


class OptionError(DejavuError, ValueError):
    """An option of the backend that doesn't exist, or a value that it can't have."""


class ArtifactError(DejavuError, ValueError):
    """A file of an artifact that can't be read."""


class ArtifactMismatchError(ArtifactError):
    """An artifact that was made for another model, or for other weights."""


class CalibrationError(DejavuError, ValueError):
    """Calibration data, or a model, that nothing can be learnt from."""


class WorkdirError(DejavuError, ValueError):
    """A folder that holds the beginnings of another calibration."""


class DiskFullError(DejavuError, OSError):
    """A disk, or a quota, without room for a file. Nothing half-written is left."""


class ModelStateError(DejavuError, RuntimeError):
    """A model in a state in which its weights can't be used: training, offloaded, on meta."""


class InternalError(DejavuError, RuntimeError):
    """Ours, please report. Never caught."""
