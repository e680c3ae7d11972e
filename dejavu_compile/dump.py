"""The graph after each pass: to a folder, as Python, and to the log.

options={"dejavu.dump": "graphs"}           a file a pass
TORCH_LOGS="+dejavu_compile"                sites, decisions, times and graphs on stderr
"""

import itertools
import logging
import time
from pathlib import Path

from torch import fx

log = logging.getLogger(__name__)
_graphs = itertools.count()


class Dump:
    """One per compile. Files are named `GRAPH-STEP-pass.py`; with no folder, only times are logged."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder) if folder else None
        self._number = next(_graphs)
        self._step = itertools.count()
        self._last = time.perf_counter()

    def graph(self, name: str, gm: fx.GraphModule) -> None:
        """Record the graph as it is after pass `name`."""
        elapsed_ms = 1e3 * (time.perf_counter() - self._last)
        step = next(self._step)
        log.debug(
            "graph %d: %s took %.0f ms, %d nodes",
            self._number,
            name,
            elapsed_ms,
            len(gm.graph.nodes),
        )
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s", gm.print_readable(print_output=False))
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{self._number:03d}-{step:02d}-{name}.py"
            head = f"# Constructed by {name} ({elapsed_ms:.0f} ms): {len(gm.graph.nodes)} nodes\n"
            path.write_text(head + gm.print_readable(print_output=False), encoding="utf-8")
        self._last = time.perf_counter()
