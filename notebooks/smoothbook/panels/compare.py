"""Two records on common images: whose radii are longer, for which classes, and how sure that is."""

import html
from collections.abc import Mapping, Sequence

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import traitlets
from plotly.subplots import make_subplots

from smoothbook import figures
from smoothbook.panels.base import LABEL, AlphaControl, EdgeControl, Panel, linked, note, row
from smoothbook.panels.curve import Counts, common_edges, read_counts
from smoothkit.reading import paired_bootstrap
from smoothkit.records import Record
from smoothkit.types import round_down

RADII = (0.0, 0.25, 0.5, 0.75)
WEIGHTS = 4_000_000  # of the bootstrap at most, so that a slider answers at once


def common_images(first: Counts, second: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Positions in both records of the images they share, which must have the same labels."""
    _, mine, theirs = np.intersect1d(first.image_id, second.image_id, return_indices=True)
    if not len(mine):
        raise ValueError(f"the records {first.name} and {second.name} have no image in common")
    if (first.label[mine] != second.label[theirs]).any():
        raise ValueError(f"the records {first.name} and {second.name} give one image two labels")
    order = mine.argsort()  # as the first record has them
    return mine[order], theirs[order]


def counted_radius(table: pd.DataFrame) -> np.ndarray:
    """The radius where the answer is correct, else 0: what certified accuracy counts."""
    return np.where(table["correct"], table["radius"], 0.0)


def by_class(first: pd.DataFrame, second: pd.DataFrame, names: tuple[str, str]) -> pd.DataFrame:
    """Average certified radius of both, and whose radii are longer, for each class and for all images.

    Columns class, images, the two names, difference, and how many images each has the longer radius on.
    """
    one, two = counted_radius(first), counted_radius(second)
    rows = []
    for which in [*sorted(first["label"].unique()), None]:
        mask = np.ones(len(first), bool) if which is None else (first["label"] == which).to_numpy()
        a, b = one[mask], two[mask]
        counts = (int((a > b).sum()), int((b > a).sum()))
        rows.append(
            ("all" if which is None else which, int(mask.sum()), a.mean(), b.mean(), b.mean() - a.mean(), *counts)
        )
    columns = ["class", "images", *names, "difference", f"longer: {names[0]}", f"longer: {names[1]}"]
    return pd.DataFrame(rows, columns=columns)


def compare_figure(
    first: pd.DataFrame,
    second: pd.DataFrame,
    differences: pd.DataFrame,
    *,
    names: tuple[str, str],
    title: str,
    level: float = 0.95,
) -> go.Figure:
    """Left: the two radii of each image. Right: differences, second minus first, with paired intervals.

    `differences` is as `reading.paired_bootstrap` gives it.
    """
    fig = make_subplots(
        rows=1, cols=2, column_widths=[0.52, 0.48], horizontal_spacing=0.13,
        subplot_titles=("each image", f"all images, {level:.0%} intervals"),
    )  # fmt: skip
    one, two = counted_radius(first), counted_radius(second)
    top = 1.05 * max(float(one.max()), float(two.max()), 0.1)
    fig.add_scatter(
        x=[0, top], y=[0, top], mode="lines", line={"color": "#9AA5B1", "dash": "dot"}, name="equal", hoverinfo="skip"
    )
    looks = (
        (names[1], two > one, "#0072B2", "triangle-up"), (names[0], one > two, "#E69F00", "square"),
        ("neither", one == two, "#6B7785", "circle-open"),
    )  # fmt: skip
    for name, mask, colour, symbol in looks:
        fig.add_scatter(
            x=one[mask], y=two[mask], mode="markers", name=f"longer: {html.escape(name)}" if name != "neither" else name,
            marker={"color": colour, "symbol": symbol, "size": 7, "opacity": 0.75},
            customdata=first["idx"].to_numpy()[mask], row=1, col=1,
            text=[f"{round_down(a)} and {round_down(b)}" for a, b in zip(one[mask], two[mask], strict=True)],
            hovertemplate="image %{customdata}: %{text}<extra></extra>",
        )  # fmt: skip
    up, down = differences["high"] - differences["difference"], differences["difference"] - differences["low"]
    fig.add_scatter(
        x=[f"r = {w}" if w != "ACR" else w for w in differences["what"]], y=differences["difference"], mode="markers",
        marker={"color": "#1F2933", "size": 10}, name="difference", showlegend=False, row=1, col=2,
        error_y={"type": "data", "array": up, "arrayminus": down, "thickness": 2, "width": 6, "color": "#1F2933"},
        customdata=differences[["low", "high"]].to_numpy(),
        hovertemplate="%{y:+.3f}, from %{customdata[0]:+.3f} to %{customdata[1]:+.3f}<extra></extra>",
    )  # fmt: skip
    fig.add_hline(y=0, line={"color": "#444444", "dash": "dot", "width": 1.5}, row=1, col=2)
    figures.dress(fig, title)
    fig.update_xaxes(title_text=f"radius, {html.escape(names[0])}", range=[-0.02 * top, top], row=1, col=1)
    fig.update_yaxes(title_text=f"radius, {html.escape(names[1])}", range=[-0.02 * top, top], row=1, col=1)
    fig.update_xaxes(title_text="certified accuracy, and ACR", row=1, col=2)
    fig.update_yaxes(title_text="second minus first", row=1, col=2, zeroline=False)
    below = {"orientation": "h", "x": 0.25, "xanchor": "center", "y": -0.26, "yanchor": "top"}
    return fig.update_layout(height=520, legend=below, margin={"t": 92, "b": 40}, uirevision="compare")


class ComparePanel(Panel):
    """Two of some records, on the images they share.

    Parameters
    ----------
    records : mapping from a name to Record, at least two
    class_names : sequence of str, optional
    alpha : float in (0, 1), failure probability of each certificate
    n : int, estimation samples, a block edge of every record; the most by default
    first, second : names of two of the records; the first two by default
    """

    alpha = traitlets.Float(0.001).tag(setting=True)
    n = traitlets.Int().tag(setting=True)
    first = traitlets.Unicode().tag(setting=True)
    second = traitlets.Unicode().tag(setting=True)

    def __init__(
        self,
        records: Mapping[str, Record],
        class_names: Sequence[str] = (),
        *,
        alpha: float = 0.001,
        n: int | None = None,
        first: str | None = None,
        second: str | None = None,
    ) -> None:
        if len(records) < 2:
            raise ValueError(f"records must hold at least two, got {len(records)}")
        self.counts = {name: read_counts(record, name) for name, record in records.items()}
        self.edges = common_edges(self.counts.values())
        self.class_names = tuple(class_names)
        names = list(self.counts)
        first, second = names[0] if first is None else first, names[1] if second is None else second
        super().__init__(dict(alpha=alpha, n=self.edges[-1] if n is None else n, first=first, second=second))

    @traitlets.validate("first", "second")
    def _valid_name(self, proposal: dict) -> str:
        if proposal["value"] not in self.counts:
            raise traitlets.TraitError(
                f"{proposal['trait'].name} must be one of {', '.join(self.counts)}, got {proposal['value']!r}"
            )
        return proposal["value"]

    def controls(self) -> Sequence[widgets.Widget]:
        self.choices = [
            linked(self, x, widgets.Dropdown(options=list(self.counts), value=getattr(self, x), description=x, style=LABEL))
            for x in ("first", "second")
        ]  # fmt: skip
        self.alpha_control, self.n_control = AlphaControl(self), EdgeControl(self)
        return [row(*self.choices), row(self.alpha_control, self.n_control)]

    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The certificates of both on their common images, in one order."""
        one, two = self.counts[self.first], self.counts[self.second]
        places = common_images(one, two)
        made = (c.certificates(alpha=self.alpha, n=self.n) for c in (one, two))
        return tuple(table.iloc[place].reset_index(drop=True) for table, place in zip(made, places, strict=True))

    def draw(self) -> tuple[go.Figure, str]:
        first, second = self.tables()
        names = (self.first, self.second)
        draws = int(np.clip(WEIGHTS // len(first), 200, 4_000))
        differences = paired_bootstrap(second, first, RADII, draws=draws)
        title = f"{len(first)} common images at alpha = {self.alpha:.3g}, n = {self.n:,}"
        fig = compare_figure(first, second, differences, names=names, title=title)
        fig.layout.meta = self.chosen("alpha", "n", "first", "second")
        acr = differences.set_index("what").loc["ACR"]
        words = (
            f"Average certified radius: {html.escape(self.second)} minus {html.escape(self.first)} is "
            f"{acr.difference:+.3f}, 95% interval {acr.low:+.3f} to {acr.high:+.3f} over the choice of images."
        )
        return fig, note(words) + self._table(by_class(first, second, ("first", "second")))

    def _table(self, table: pd.DataFrame) -> str:
        shown = table.copy()
        shown["class"] = [
            self.class_names[c] if c != "all" and c < len(self.class_names) else str(c) for c in table["class"]
        ]
        for column in ("first", "second"):
            shown[column] = [round_down(v) for v in table[column]]
        shown["difference"] = [f"{v:+.3f}" for v in table["difference"]]
        return shown.to_html(index=False, border=0, classes="smoothkit-table")
