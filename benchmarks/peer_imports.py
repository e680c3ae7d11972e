"""Modules of other projects, imported from a checkout that the user names. Nothing of theirs is in this repository.

Their files import more than their kernels need: plotting, tables, other people's extensions. What this Python lacks of
that is stood in for during the import, by names only, and the names are kept for the report.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from dejavu_compile.errors import OptionError

# What their files import beside torch and triton, and their kernels don't use
UNUSED = {"matplotlib", "msgspec", "numpy", "pandas", "pytest", "tqdm"}


class _StandIn(ModuleType):
    """A module of which every name is an empty class: it can be imported, called or inherited from."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _StandIns(MetaPathFinder, Loader):
    """Asked last: what no other finder knows, of the names in `UNUSED`."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for what is stood in for, else None."""
        if fullname.partition(".")[0] not in UNUSED:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Named in the report by its first part."""
        self.made.append(spec.name)
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


@contextmanager
def _borrowed(root: Path) -> Iterator[list[str]]:
    """`root` first on the path, and stand-ins, for the time of an import; yields the names of those made."""
    path, finder = list(sys.path), _StandIns()
    sys.path.insert(0, str(root))
    sys.meta_path.append(finder)
    try:
        yield finder.made
    finally:
        sys.path[:] = path  # theirs add to it as well
        sys.meta_path.remove(finder)
        for name in finder.made:
            sys.modules.pop(name, None)


def folder_with(project: str, root: Path, file: str, *below: str) -> Path:
    """The folder that holds `file`: `root`, or one of the named folders below it. Raises OptionError."""
    for folder in (root, *(root / name for name in below)):
        if (folder / file).is_file():
            return folder
    raise OptionError(
        f"{root} is no checkout of {project}",
        found="a folder without that file" if root.is_dir() else "no such folder",
        expected=file,
        fix=f"the path of a checkout of {project}",
    )


def load(root: Path, name: str) -> tuple[ModuleType, list[str]]:
    """The module `name`, dotted, of the packages in `root`; and which modules were stood in for."""
    with _borrowed(root) as made:
        module = importlib.import_module(name)
    home = Path(module.__file__ or "").resolve()
    if root.resolve() not in home.parents:
        raise ImportError(f"{name} was imported from {home} before, not from {root}")
    return module, _named(made)


def load_file(root: Path, file: str, name: str) -> tuple[ModuleType, list[str]]:
    """One file of `root` by itself, under a name of ours: theirs (`model`, `kernels`) are those of others too."""
    spec = importlib.util.spec_from_file_location(name, root / file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up
    with _borrowed((root / file).parent) as made:
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return module, _named(made)


def _named(made: list[str]) -> list[str]:
    """The packages of these modules, each once."""
    return sorted({name.partition(".")[0] for name in made})
