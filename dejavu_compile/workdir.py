"""What calibration's stages made, in memory or in a folder: memory-mapped, complete or not there at all.

    WORKDIR/manifest.json                 for which model, batches and options
            collect-00003.safetensors     a shard: it takes this name only once it is written and flushed

A stage asks `store.once(name, make)`: a shard that an interrupted run has left is read, not made again.
"""

import errno
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import DiskFullError, WorkdirError

log = logging.getLogger(__name__)

FORMAT_VERSION = 2  # of the shards: another one isn't gone on from
MANIFEST = "manifest.json"
PARTIAL = ".partial"

# No space on the device, a quota, a limit on the size of files
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Tensors = dict[str, torch.Tensor]


class Store(Protocol):
    """Where the stages of a calibration leave what they make."""

    on_disk: bool

    def once(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """What `make` gives, or gave in a run before."""


class Memory:
    """Keeps nothing: what a stage makes stays where it was made."""

    on_disk = False

    def once(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """What `make` gives."""
        return make()


class Workdir:
    """A folder of shards for one calibration.

    `manifest` says which one: values that JSON has, by a name for people. Raises WorkdirError where the folder
    is for another one, OSError where it can't be made, and DiskFullError from `once`.
    """

    on_disk = True

    def __init__(self, folder: str | Path, manifest: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"*{PARTIAL}"):  # by a process that was killed
            left.unlink()
        manifest = {"format version": FORMAT_VERSION, **manifest}
        path = self.folder / MANIFEST
        if path.exists() or any(self.folder.glob("*.safetensors")):
            _check_manifest(path, manifest)
        else:
            with replacing(path) as (partial,):
                partial.write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    def once(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """The shard of this name, memory-mapped on the CPU; `make` is called where it isn't there yet."""
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            try:
                return load_file(path)
            except SafetensorError as error:  # the machine, not the process, stopped
                log.warning("%s is made again: it can't be read (%s)", path, error)
        made = {key: value.detach().cpu().contiguous() for key, value in make().items()}
        with replacing(path) as (partial,):
            save_file(made, partial)
        del made  # before the same is mapped
        return load_file(path)


def _check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        there = None
    if not isinstance(there, dict):
        raise WorkdirError(
            f"{path.parent} holds shards, but nothing says of which calibration",
            found=f"no readable {MANIFEST}", fix="give another (or an emptied) folder",
        )  # fmt: skip
    other = [key for key in {**manifest, **there} if manifest.get(key) != there.get(key)]
    if other:
        raise WorkdirError(
            f"{path.parent} holds the beginnings of another calibration",
            found=", ".join(f"{key} {manifest.get(key)}" for key in other) + " (asked for)",
            expected=", ".join(f"{key} {there.get(key)}" for key in other) + f" ({MANIFEST})",
            fix="give the same model, batches and options to go on, or another (or an emptied) folder",
        )


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Other names to write to: without an error the files are flushed and take their own names, together.

    Else nothing is left of them, and what was there stays. Raises DiskFullError where there is no room.
    """
    partials = [path.with_name(path.name + PARTIAL) for path in paths]
    try:
        yield partials
        for partial in partials:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        for partial, path in zip(partials, paths, strict=True):
            partial.replace(path)
    except (OSError, SafetensorError) as error:
        if _errno(error) not in _NO_ROOM:
            raise
        raise DiskFullError(
            f"there is no room to write {paths[0]}", found=str(error),
            fix="free some, and call again: what was written before is whole, and used",
        ) from None  # fmt: skip
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def _errno(error: Exception) -> int | None:
    """Safetensors gives the number in words."""
    if isinstance(error, OSError):
        return error.errno
    number = re.search(r"os error (\d+)", str(error))
    return int(number[1]) if number else None


class Rows:
    """Rows of tensors that lie in files, [rows, width], used like one tensor of which parts are read.

    Indexed by a slice or by row numbers [n] it gives a tensor on `device`; `narrow` stays in the files.
    """

    ndim = 2

    def __init__(
        self,
        pieces: Sequence[torch.Tensor],
        device: torch.device,
        span: tuple[int, int] | None = None,
    ) -> None:
        self.device = device
        self._pieces = pieces
        self._bounds = torch.tensor([0, *accumulate(len(piece) for piece in pieces)])
        self._start, self._stop = (0, int(self._bounds[-1])) if span is None else span

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), self._pieces[0].shape[1]))

    def numel(self) -> int:
        """Rows times width."""
        return self.shape.numel()

    def narrow(self, dim: int, start: int, length: int) -> "Rows":
        """Some of the rows, unread; as of a tensor, of its first dim."""
        assert dim == 0, "rows only"
        assert 0 <= start <= start + length <= len(self), "a part of the rows"
        first = self._start + start
        return Rows(self._pieces, self.device, (first, first + length))

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            return self._ascending(torch.arange(start, max(start, stop), step)).to(self.device)
        ascending, order = rows.cpu().sort()
        found = self._ascending(ascending)
        gathered = torch.empty_like(found)
        gathered[order] = found
        return gathered.to(self.device)

    def _ascending(self, numbers: torch.Tensor) -> torch.Tensor:
        numbers = numbers + self._start
        cuts = torch.searchsorted(numbers, self._bounds).tolist()
        parts = [
            piece[numbers[a:b] - first]
            for piece, first, (a, b) in zip(
                self._pieces, self._bounds[:-1], pairwise(cuts), strict=True
            )
            if a < b
        ]
        return torch.cat(parts) if parts else self._pieces[0][:0]
