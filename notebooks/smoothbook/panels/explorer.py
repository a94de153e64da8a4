"""The radius explorer: several panels behind one row of buttons, each made when it is first asked for."""

from collections.abc import Callable, Mapping
from pathlib import Path

import ipywidgets as widgets
import traitlets

from smoothbook.panels.base import Panel, is_live, still


class Explorer(widgets.VBox):
    """Panels by name; `explorer["curve"]` is the panel itself, made at the first use.

    Parameters
    ----------
    makers : mapping from a name to a function that makes the panel
    current : str
        The panel in view; the first by default.
    """

    current = traitlets.Unicode()

    def __init__(self, makers: Mapping[str, Callable[[], Panel]], *, current: str | None = None) -> None:
        if not makers:
            raise ValueError("makers must name at least one panel")
        self._makers, self._made = dict(makers), {}
        super().__init__(current=next(iter(makers)) if current is None else current)
        self.buttons = widgets.ToggleButtons(options=list(makers), value=self.current)
        widgets.link((self, "current"), (self.buttons, "value"))

    def __getitem__(self, name: str) -> Panel:
        if name not in self._makers:
            raise KeyError(f"no panel {name!r}; there are {', '.join(self._makers)}")
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    @traitlets.validate("current")
    def _known(self, proposal: dict) -> str:
        if proposal["value"] not in self._makers:
            raise traitlets.TraitError(f"current must be one of {', '.join(self._makers)}, got {proposal['value']!r}")
        return proposal["value"]

    def show(self) -> None:
        """The explorer where a person is there; a line of text where notebooks are only executed."""
        if not is_live():
            print("The panels are live in JupyterLab; stills of them follow.")
            return
        from IPython.display import display  # loaded only where there is a notebook

        self._turn()
        self.observe(self._turn, "current")
        display(self)

    def _turn(self, _change: object = None) -> None:
        self.children = [self.buttons, self[self.current]]

    def still(self, name: str, *, figure: str, figures_dir: str | Path = "", caption: str = "") -> None:
        """Show and keep the figure of a panel as it is now, after the work it has under way."""
        still(self[name], figure, figures_dir=figures_dir, caption=caption)
