"""Text files as token windows."""

from pathlib import Path
from typing import Any

import torch

from .errors import CalibrationError


def windows(
    tokenizer: Any,
    path: str | Path,
    *,
    length: int = 512,
    limit: int | None = None,
    batch: int = 4,
) -> list[torch.Tensor]:
    """Non-overlapping windows of a UTF-8 file, `input_ids` [batch, length] each.

    `limit` takes that many windows, spread evenly over the file. Raises CalibrationError if the text is
    shorter than one window.
    """
    text = Path(path).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    count = len(ids) // length
    if count == 0:
        raise CalibrationError(
            f"{path} is too short",
            found=f"{len(ids)} tokens",
            expected=f"at least one window of {length}",
            fix="give a longer text or a smaller window",
        )
    rows = ids[: count * length].view(count, length)
    if limit is not None and limit < count:
        rows = rows[torch.linspace(0, count - 1, limit).long()]
    return list(rows.split(batch))
