"""Text files as token windows."""

from pathlib import Path
from typing import Any

import torch

from .errors import CalibrationError, OptionError


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
    shorter than one window, or isn't UTF-8, and OptionError for windows that hold no next token, or none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text", found=f"byte {error.start}: {error.reason}",
            fix="give a text file, converted to UTF-8",
        ) from None  # fmt: skip
    return windows_of(tokenizer, text, str(path), length=length, limit=limit, batch=batch)


def windows_of(
    tokenizer: Any,
    text: str,
    name: str,
    *,
    length: int = 512,
    limit: int | None = None,
    batch: int = 4,
) -> list[torch.Tensor]:
    """`windows` of a text at hand; errors call it `name`."""
    if length < 2 or (limit is not None and limit < 1):
        raise OptionError(
            "there is nothing to learn from such windows",
            found=f"{'all' if limit is None else limit} windows of {length} tokens",
            expected="at least 1 window of at least 2 tokens",
        )
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    count = len(ids) // length
    if count == 0:
        raise CalibrationError(
            f"{name} is too short",
            found=f"{len(ids)} tokens",
            expected=f"at least one window of {length}",
            fix="give a longer text or a smaller window",
        )
    rows = ids[: count * length].view(count, length)
    if limit is not None and limit < count:
        rows = rows[torch.linspace(0, count - 1, limit).long()]
    return list(rows.split(batch))
