"""The name `kernels`, which Hugging Face's package has too.

Python run in a checkout (`python -c`, a notebook) has the checkout first on its path, and transformers
asks for `kernels`. This folder, met under that name, gives it up.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def hand_over() -> None:
    """Put Hugging Face's package in place of top-level `kernels`; where there is none, an empty one.

    The empty one has no file: transformers then takes it for not installed.
    """
    ours = sys.modules["kernels"]
    checkout = Path(__file__).resolve().parents[1]
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != checkout]
    spec = PathFinder.find_spec("kernels", elsewhere)
    if spec is None or spec.loader is None:
        ours.__file__, ours.__path__ = None, []
        return
    theirs = sys.modules["kernels"] = module_from_spec(spec)
    spec.loader.exec_module(theirs)
