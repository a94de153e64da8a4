"""Certified accuracy against the radius, with alpha and n as sliders and a brush that picks images.

Everything follows from kept counts: a slider recomputes bounds and radii, nothing is sampled.
"""

import dataclasses
import html
from collections.abc import Iterable, Mapping, Sequence

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import traitlets

from smoothbook import figures
from smoothbook.panels.base import LABEL, AlphaControl, EdgeControl, Panel, check_edge, note, row, thumbnail
from smoothkit.certify.bounds import clopper_pearson_lower, radius, sigma_of_proof
from smoothkit.certify.table import certificate_table
from smoothkit.records import Record, RecordError
from smoothkit.types import ABSTAIN, NoiseForm, check_alpha, round_down

STEPS = 400  # drawn of a curve; more cannot be told apart, and take time
SHOWN = 24  # pictures of a brushed region
ALPHAS = (0.5, 0.1, 0.01, 0.001, 1e-4, 1e-5, 1e-6)


@dataclasses.dataclass(frozen=True, eq=False)
class Counts:
    """What a record of fixed n says of each image: votes of the selected class at every block edge.

    `index`, `image_id`, `label` and `c_a` are int64 [images]; `n_a` is int64 [edges, images], cumulative.
    """

    name: str
    sigma: float
    noise: NoiseForm
    edges: tuple[int, ...]
    index: np.ndarray
    image_id: np.ndarray
    label: np.ndarray
    c_a: np.ndarray
    n_a: np.ndarray

    def certificates(self, *, alpha: float, n: int) -> pd.DataFrame:
        """As `certify.certificates` gives them at another alpha or n, a block edge, one row an image.

        Columns idx, label, predict, radius, correct, image_id.
        """
        check_alpha(alpha)
        check_edge(n, self.edges)
        p_a_lower = clopper_pearson_lower(self.n_a[self.edges.index(n)], n, alpha)
        radii = radius(p_a_lower, sigma_of_proof(self.sigma, self.noise))
        images = {"index": self.index, "label": self.label, "image_id": self.image_id}
        return certificate_table(images, np.where(radii > 0, self.c_a, ABSTAIN), radii)


def read_counts(record: Record, name: str = "") -> Counts:
    """The counts of all complete images of a record of fixed n."""
    votes = {n: record.votes(n).set_index("image_id") for n in record.edges()}
    complete = votes[record.edges()[-1]]
    if complete.empty:
        raise RecordError(f"{name or 'the record'} has no complete image yet; run the same command again to go on")
    c_a = np.stack(complete["counts_selection"].to_list()).argmax(axis=1)
    images = np.arange(len(complete))
    n_a = [np.stack(v.loc[complete.index, "counts_estimation"].to_list())[images, c_a] for v in votes.values()]
    return Counts(
        name=name or (record.path.name if record.path else record.identity.model),
        sigma=record.sigma,
        noise=NoiseForm.parse(record.identity.noise),
        edges=tuple(record.edges()),
        index=complete["index"].to_numpy(np.int64),
        image_id=complete.index.to_numpy(np.int64),
        label=complete["label"].to_numpy(np.int64),
        c_a=c_a,
        n_a=np.stack(n_a),
    )


def common_edges(counts: Iterable[Counts]) -> list[int]:
    """The block edges that all of them share; an n must be one of them."""
    edges = sorted(set.intersection(*(set(c.edges) for c in counts)))
    if not edges:
        raise ValueError("the records share no block edge, so no n can be read from all of them")
    return edges


def curve_figure(
    tables: Mapping[float | str, pd.DataFrame], *, alpha: float, n: int, brush: tuple[float, float] | None = None
) -> go.Figure:
    """Certified accuracy of certificate tables, with a brushed range of radii marked."""
    title = f"Certified accuracy at alpha = {alpha:.3g}, n = {n:,}"
    fig = figures.certified_accuracy_curve(tables, title=title, most=STEPS)
    if brush is not None:
        look = {"fillcolor": "#E69F00", "opacity": 0.22, "line": {"color": "#8A5A00", "width": 2}}
        fig.add_vrect(x0=brush[0], x1=brush[1], layer="below", **look)
    fig.update_layout(dragmode="select", selectdirection="h", uirevision="curve", meta={"alpha": alpha, "n": n})
    return fig


def curve_frames(counts: Mapping[float | str, Counts], *, n: int, alphas: Sequence[float] = ALPHAS) -> go.Figure:
    """The same figure with a slider over alpha that lives on in a page without Python."""
    if not alphas:
        raise ValueError("alphas must hold at least one failure probability")

    def at(alpha: float) -> go.Figure:
        return curve_figure({key: c.certificates(alpha=alpha, n=n) for key, c in counts.items()}, alpha=alpha, n=n)

    made = {alpha: at(alpha) for alpha in alphas}
    start = alphas.index(0.001) if 0.001 in alphas else 0
    fig = made[alphas[start]]
    longest = max(max(trace.x) for each in made.values() for trace in each.data)
    fig.update_xaxes(range=[0, 1.04 * longest])
    fig.frames = [
        go.Frame(name=f"{alpha:g}", data=each.data, layout={"title": {"text": each.layout.title.text}})
        for alpha, each in made.items()
    ]
    play = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [{"label": f"{a:g}", "method": "animate", "args": [[f"{a:g}"], play]} for a in alphas]
    slider = {"active": start, "steps": steps, "currentvalue": {"prefix": "alpha = "}, "pad": {"t": 46}}
    fig.update_layout(sliders=[slider], height=520, dragmode="zoom")
    return fig


def brushed(tables: Mapping[float | str, pd.DataFrame], brush: tuple[float, float]) -> pd.DataFrame:
    """The images whose certificates end within the range: correct, answered, and `brush[0] <= radius <= brush[1]`.

    One row an image and table, by radius; the column `curve` says which table.
    """
    low, high = brush
    parts = [
        table[table["correct"] & table["radius"].between(low, high)].assign(curve=figures.sigma_label(key))
        for key, table in tables.items()
    ]
    return pd.concat(parts).sort_values(["radius", "idx"], ignore_index=True)


class CurvePanel(Panel):
    """Certified accuracy against the radius, for one or more records of fixed n.

    Parameters
    ----------
    records : Record, or mapping from a name to Record
    images : data.Images, optional
        The whole split the records are of; its pictures show what is brushed.
    alpha : float in (0, 1), failure probability of each certificate
    n : int, estimation samples, a block edge of every record; the most by default
    brush : pair of L2 radii, pixel units on [0, 1], or () for none
        Drag across the curve, or move the two handles of the range slider.
    """

    alpha = traitlets.Float(0.001).tag(setting=True)
    n = traitlets.Int().tag(setting=True)
    brush = traitlets.Tuple().tag(setting=True)

    def __init__(
        self,
        records: Record | Mapping[str, Record],
        images: object = None,
        *,
        alpha: float = 0.001,
        n: int | None = None,
        brush: tuple[float, float] | tuple[()] = (),
    ) -> None:
        named = {"": records} if isinstance(records, Record) else dict(records)
        self.counts = _by_sigma([read_counts(record, name) for name, record in named.items()])
        self.edges = common_edges(self.counts.values())
        self.images = images
        self._place = {} if images is None else {int(i): place for place, i in enumerate(images.index)}
        super().__init__(dict(alpha=alpha, n=self.edges[-1] if n is None else n, brush=brush))
        self.live.on_select(self._selected)

    @traitlets.validate("brush")
    def _valid_brush(self, proposal: dict) -> tuple:
        value = tuple(float(r) for r in proposal["value"])
        if value and not (len(value) == 2 and 0 <= value[0] <= value[1]):
            raise traitlets.TraitError(f"brush must be two radii, at least 0 and in order, or (), got {value}")
        return value

    def controls(self) -> Sequence[widgets.Widget]:
        top = 1.04 * max(float(t["radius"].max()) for t in self.tables().values())
        self.range = widgets.FloatRangeSlider(
            value=self.brush or (0.0, 0.0), min=0.0, max=max(top, 0.1), step=0.01, readout_format=".2f",
            description="radii", tooltip="the images whose certificates end in this range", style=LABEL,
        )  # fmt: skip
        self.range.observe(self._ranged, "value")
        self.alpha_control, self.n_control = AlphaControl(self), EdgeControl(self)
        return [row(self.alpha_control, self.n_control, self.range)]

    def tables(self) -> dict[float | str, pd.DataFrame]:
        """The certificates at the alpha and n of now, by sigma or name."""
        return {key: c.certificates(alpha=self.alpha, n=self.n) for key, c in self.counts.items()}

    def draw(self) -> tuple[go.Figure, str]:
        tables = self.tables()
        fig = curve_figure(tables, alpha=self.alpha, n=self.n, brush=self.brush or None)
        words = " ".join(self._sentence(key, table) for key, table in tables.items())
        return fig, note(words) + (self._pictures(tables) if self.brush else note(_HOW_TO_BRUSH))

    def _sentence(self, key: float | str, table: pd.DataFrame) -> str:
        answered, right = int((table["predict"] != ABSTAIN).sum()), int(table["correct"].sum())
        return (
            f"{html.escape(figures.sigma_label(key))}: {right} of {len(table)} images certified correctly, "
            f"{len(table) - answered} without an answer, longest radius {round_down(float(table['radius'].max()))}."
        )

    def _pictures(self, tables: Mapping[float | str, pd.DataFrame]) -> str:
        found = brushed(tables, self.brush)
        low, high = self.brush
        head = f"{len(found)} certificates end between {round_down(low, 2)} and {round_down(high, 2)}" + (
            f"; the {SHOWN} shortest of them:" if len(found) > SHOWN else ":" if len(found) else "."
        )
        return note(head) + "".join(self._picture(image) for image in found.head(SHOWN).itertuples())

    def _picture(self, image) -> str:
        caption = f"{round_down(image.radius)}<br>{html.escape(image.curve)}"
        if image.idx not in self._place:
            return f'<span class="smoothkit-thumbnail">image {image.idx}<br>{caption}</span>'
        place = self._place[image.idx]
        named = html.escape(self.images.class_name(int(image.predict)))
        return thumbnail(self.images[place].numpy(), f"“{named}” {caption}")

    def _selected(self, box: dict) -> None:
        x = box.get("x")
        self.brush = (max(0.0, min(x)), max(0.0, max(x))) if x else ()

    def _ranged(self, change: dict) -> None:
        low, high = change["new"]
        wanted = (low, high) if high > low else ()
        if self._steps(wanted) != self._steps(self.brush):  # the page answers with what lies on the slider's steps
            self.brush = wanted

    def _steps(self, brush: tuple) -> tuple:
        return tuple(round(r / self.range.step) for r in brush)

    @traitlets.observe("brush")
    def _follow(self, change: dict) -> None:
        if hasattr(self, "range"):
            self.range.value = self.brush or (0.0, 0.0)


_HOW_TO_BRUSH = "Drag across the curve, or move the handles of “radii”, to see the images whose certificates end there."


def _by_sigma(counts: list[Counts]) -> dict[float | str, Counts]:
    """By sigma where that tells them apart, so that a sigma keeps its colour; else by name."""
    if not counts:
        raise ValueError("records must hold at least one record")
    sigmas = [c.sigma for c in counts]
    return {c.sigma if len(set(sigmas)) == len(sigmas) else c.name: c for c in counts}
