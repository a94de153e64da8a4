"""How figures look: one style a method, one hue a sigma, axes and fonts."""

import colorsys
import dataclasses
import math
import zlib

import numpy as np
import plotly.graph_objects as go

RADIUS_AXIS = "L2 radius, pixel units on [0, 1]"
FONT = "Arial, Helvetica, DejaVu Sans, sans-serif"
WRONG, NO_ANSWER, QUIET = "#555555", "#B8B8B8", "#9AA5B1"  # colours of bars


# --- one sigma, one look -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Style:
    """How one curve looks, in the words of plotly; `line` and `marker` are matplotlib's words for the same."""

    colour: str
    dash: str
    symbol: str

    @property
    def line(self) -> str | tuple:
        return {
            "solid": "-",
            "dash": "--",
            "dot": ":",
            "dashdot": "-.",
            "longdash": (0, (8, 3)),
            "longdashdot": (0, (8, 3, 1, 3)),
        }[self.dash]

    @property
    def marker(self) -> str:
        names = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v", "x": "X"}
        return names[self.symbol]


# colours after Okabe and Ito, "Color Universal Design" (2008): told apart with any colour vision
STYLES = (
    Style("#0072B2", "solid", "circle"),
    Style("#D55E00", "dash", "square"),
    Style("#009E73", "longdash", "triangle-up"),
    Style("#CC79A7", "dashdot", "diamond"),
    Style("#E69F00", "longdashdot", "triangle-down"),
    Style("#56B4E9", "dot", "x"),
    Style("#000000", "dot", "circle"),
)
_SIGMA_STYLES = {
    0.0: Style("#000000", "dot", "x"),
    0.12: Style("#56B4E9", "dashdot", "diamond"),
    0.25: Style("#0072B2", "solid", "circle"),
    0.5: Style("#D55E00", "dash", "square"),
    1.0: Style("#009E73", "longdash", "triangle-up"),
}


def sigma_style(sigma: float) -> Style:
    """The one look of this sigma: fixed for the usual values, computed from the value for any other."""
    sigma = _checked_sigma(sigma)
    if sigma in _SIGMA_STYLES:
        return _SIGMA_STYLES[sigma]
    hue = (0.78 + 0.618 * math.log2(sigma)) % 1.0  # steps by the golden ratio: neighbours come out far apart
    red, green, blue = colorsys.hls_to_rgb(hue, 0.42, 0.5)
    pick = STYLES[zlib.crc32(f"{sigma:g}".encode()) % len(STYLES)]
    return Style(f"#{round(255 * red):02X}{round(255 * green):02X}{round(255 * blue):02X}", pick.dash, pick.symbol)


def sigma_colour(sigma: float) -> str:
    """The colour of this sigma as #RRGGBB, the same throughout the workbook."""
    return sigma_style(sigma).colour


def sigma_label(sigma: float | str) -> str:
    """`σ = 0.25` for a number; a name stays as it is."""
    return sigma if isinstance(sigma, str) else f"σ = {_checked_sigma(sigma):g}"


def _checked_sigma(sigma: float) -> float:
    sigma = float(sigma)
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be a finite number, at least 0, got {sigma}")
    return round(sigma, 9)


def style_of(key: float | str, position: int) -> Style:
    """A sigma's own look, or that of the name at this position: where colours come again, lines and markers differ."""
    if not isinstance(key, str):
        return sigma_style(key)
    again, place = divmod(position, len(STYLES))
    other = STYLES[(place + 3 * again) % len(STYLES)]
    return dataclasses.replace(STYLES[place], dash=other.dash, symbol=other.symbol)


# --- the look of all plotly figures ------------------------------------------------------------------

_AXIS = {
    "gridcolor": "#EBF0F8", "linecolor": "#EBF0F8", "zerolinecolor": "#EBF0F8", "zerolinewidth": 2, "ticks": "",
    "automargin": True, "title": {"standoff": 15},
}  # fmt: skip
# plotly's own templates name every kind of trace, and a figure copies its template: half of what a slider's step costs
_TEMPLATE = go.layout.Template(
    layout={
        "colorway": [style.colour for style in STYLES], "paper_bgcolor": "white", "plot_bgcolor": "white",
        "xaxis": _AXIS, "yaxis": _AXIS, "autotypenumbers": "strict", "hoverlabel": {"align": "left"},
        "annotationdefaults": {"arrowhead": 0, "arrowwidth": 1}, "coloraxis": {"colorbar": {"outlinewidth": 0}},
    }
)  # fmt: skip


def dress(fig: go.Figure, title: str, x: str | None = None, y: str | None = None) -> None:
    """Give a figure the workbook's look, its title and the titles of its axes."""
    fig.update_layout(
        template=_TEMPLATE,
        title={"text": title, "x": 0.01, "xanchor": "left", "font": {"size": 18}},
        font={"family": FONT, "size": 14, "color": "#1F2933"},
        margin={"l": 70, "r": 24, "t": 60 if title else 24, "b": 60},
        height=430,
        hovermode="closest",
        legend={"bgcolor": "rgba(255,255,255,0.7)", "font": {"size": 14}, "itemwidth": 44},
    )
    if x:
        fig.update_xaxes(title_text=x)
    if y:
        fig.update_yaxes(title_text=y)


def equal_scale(box: object) -> None:
    """Draw both axes of a subplot (`fig.get_subplot`) to one scale."""
    box.yaxis.scaleanchor = box.xaxis.plotly_name.replace("axis", "")


def circle(radius: float, x: float = 0.0, y: float = 0.0) -> dict[str, np.ndarray]:
    """The x and y of a circle around a point."""
    turn = np.linspace(0, 2 * np.pi, 181)
    return {"x": x + radius * np.cos(turn), "y": y + radius * np.sin(turn)}
