"""One progress bar with images a second and time left, in a terminal and in a notebook.

In a notebook it is one output that is updated in place and keeps its last state when the notebook is
saved, which tqdm's widget does not.
"""

import sys
import time

from tqdm import tqdm


class Progress:
    """Counts up to `total` images; fractions of an image are fine. Use as a context manager."""

    def __init__(self, total: int, description: str, *, show: bool = True) -> None:
        self.total, self.description, self.done = total, description, 0.0
        self._start, self._last = time.perf_counter(), 0.0
        self._handle = self._bar = None
        if not show:
            return
        if _in_notebook():
            from IPython.display import display

            self._handle = display(self, display_id=True)
        else:
            form = (
                "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} images [{elapsed}<{remaining}, {rate_noinv_fmt}]"
            )
            self._bar = tqdm(
                total=total,
                desc=description,
                unit=" images",
                bar_format=form,
                file=sys.stderr,
                mininterval=0.5 if sys.stderr.isatty() else 10,
            )

    def update(self, images: float) -> None:
        images = min(images, self.total - self.done)  # rounding, and rows drawn again after running out of memory
        self.done += images
        if self._bar is not None:
            self._bar.update(images)
        elif self._handle is not None and time.perf_counter() - self._last > 0.2:
            self._last = time.perf_counter()
            self._handle.update(self)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._handle is not None:
            self._handle.update(self)

    def _line(self) -> str:
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rate = self.done / seconds
        left = (self.total - self.done) / rate if rate else float("inf")
        state = f"{seconds:.0f} s" if self.done >= self.total - 1e-6 else f"{format_seconds(left)} left"
        return f"{self.description}: {self.done:.0f}/{self.total} images, {rate:.3g} images/s, {state}"

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        share = 100 * min(1.0, self.done / max(1, self.total))
        bar = f'<progress value="{share:.1f}" max="100" style="width:12em;vertical-align:middle"></progress>'
        return {"text/plain": self._line(), "text/html": f"<div>{bar} {self._line()}</div>"}


def say(line: str) -> None:
    """A line for the reader: on standard error in a terminal; in a notebook, where that is red, on standard output."""
    print(line, file=sys.stdout if _in_notebook() else sys.stderr)


def format_seconds(seconds: float) -> str:
    """A duration to read: `8 s`, `3 min`, `2.5 h`."""
    if seconds == float("inf"):
        return "unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")
