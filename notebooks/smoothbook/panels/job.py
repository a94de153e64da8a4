"""Work that takes a while, on a thread of its own, with buttons to start and stop it and a bar that fills."""

import threading
import time
from collections.abc import Callable

import ipywidgets as widgets
import traitlets


class Job(widgets.HBox):
    """A start button, a stop button and a bar around work done on a thread of its own.

    `work(job)` looks at `job.stopped` between its pieces and tells `job.progress(share)`. What it raises is given to
    `complain`. One piece of work at a time: `start` while it runs is ignored, `restart` ends what runs and begins anew.
    `start_with` is called when the start button is pressed.
    """

    running = traitlets.Bool(False)

    def __init__(
        self,
        start: str,
        work: Callable[["Job"], None],
        complain: Callable[[BaseException | None], None],
        *,
        start_with: Callable[[], None] = lambda: None,
    ) -> None:
        self._work, self._complain, self._stop = work, complain, threading.Event()
        self._thread: threading.Thread | None = None
        self._guard, self._again = threading.Lock(), False
        self.start_button = widgets.Button(description=start, icon="play", button_style="primary")
        self.stop_button = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.bar = widgets.FloatProgress(min=0, max=1, layout={"width": "12em"})
        self.label = widgets.Label()
        super().__init__([self.start_button, self.stop_button, self.bar, self.label])
        self.start_button.on_click(lambda _: (start_with(), self.start()))
        self.stop_button.on_click(lambda _: self.stop())

    @property
    def stopped(self) -> bool:
        """Whether the work was asked to end."""
        return self._stop.is_set()

    def start(self) -> None:
        """Begin, unless the work is under way."""
        with self._guard:
            if not self.running:
                self._begin_work()

    def restart(self) -> None:
        """Begin, after what is under way has ended at its next piece."""
        with self._guard:
            if not self.running:
                self._begin_work()
            else:
                self._again = True
                self._stop.set()

    def stop(self) -> None:
        """Ask the work to end after the piece it is at."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> None:
        """Until the work is done, or the seconds have passed."""
        if self._thread is not None:
            self._thread.join(seconds)

    def progress(self, share: float, what: str = "") -> None:
        """Fill the bar to a share of 1; at most ten messages a second."""
        if share < 1 and time.perf_counter() - self._told < 0.1:
            return
        self._told = time.perf_counter()
        self.bar.value = share
        self.label.value = f"{what} {self._told - self._begin:.1f} s"

    def now_and_then(self, draw: Callable[[], None]) -> None:
        """Draw, unless that was done just now: drawing may take a third of the time, and is a fifth of a second apart."""
        begin = time.perf_counter()
        if begin < self._next:
            return
        draw()
        end = time.perf_counter()
        self._next = end + max(0.2, 2 * (end - begin))

    def _begin_work(self) -> None:
        self._stop.clear()
        self._again, self.running = False, True
        self.start_button.disabled, self.stop_button.disabled = True, False
        self._begin, self._told, self._next = time.perf_counter(), 0.0, 0.0
        self._thread = threading.Thread(target=self._run, name="smoothkit-panel", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                self._work(self)
            except Exception as error:
                self._complain(error)
            with self._guard:
                if self._again:
                    self._again = False
                    self._stop.clear()
                    continue
                self.start_button.disabled, self.stop_button.disabled = False, True
                self.running = False
                return
