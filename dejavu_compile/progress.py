"""Progress bars, one a stage."""

from collections.abc import Callable

from tqdm.auto import tqdm

Progress = Callable[[str, int, int], None]


class Bars:
    """Call with (stage, done, total); a new stage closes the bar of the last."""

    def __init__(self, enabled: bool) -> None:
        self._enabled, self._bar, self._stage = enabled, None, None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is."""
        if not self._enabled:
            return
        if stage != self._stage:
            self.close()
            self._stage, self._bar = stage, tqdm(total=total, desc=stage, leave=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Remove the last bar."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage = None, None
