"""Figures of scale and trust: hours on many machines, the driver of a run, faults survived, false certificates."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from smoothbook.figures.style import STYLES, WRONG, dress

GOOD, BAD = STYLES[2].colour, STYLES[1].colour


def hours_on_gpus(gpu_hours: pd.Series, most: int = 10_000) -> pd.DataFrame:
    """Hours of a run against the number of GPUs, if the work divides evenly.

    Parameters
    ----------
    gpu_hours : GPU hours of the whole run, by stopping rule
    most : GPUs at most

    Returns
    -------
    DataFrame with gpus, rule, hours
    """
    gpus = np.unique(np.geomspace(1, most, 40).astype(int))
    rows = [(m, rule, hours / m) for m in gpus.tolist() for rule, hours in gpu_hours.items()]
    return pd.DataFrame(rows, columns=["gpus", "rule", "hours"])


def hours_figure(hours: pd.DataFrame, title: str) -> go.Figure:
    """`hours_on_gpus` as lines, both axes logarithmic."""
    fig = go.Figure()
    for (rule, part), style in zip(hours.groupby("rule", sort=False), STYLES, strict=False):
        fig.add_scatter(x=part["gpus"], y=part["hours"], name=rule, line={"dash": style.dash, "color": style.colour})
    dress(fig, title, "GPUs", "hours")
    return _log_log(fig)


def driver_figure(driver: pd.DataFrame) -> go.Figure:
    """CPU seconds and memory of the process that hands out the work; columns images, driver seconds, driver MB."""
    fig = go.Figure()
    for column, style in (("driver seconds", STYLES[0]), ("driver MB", STYLES[1])):
        line = {"color": style.colour, "dash": style.dash}
        name = column.removeprefix("driver ")
        fig.add_scatter(x=driver["images"], y=driver[column], name=name, mode="lines+markers", line=line)
    dress(fig, "The driver of a run", "images", "seconds, MB")
    return _log_log(fig)


def _log_log(fig: go.Figure) -> go.Figure:
    return fig.update_xaxes(type="log", dtick=1).update_yaxes(type="log", dtick=1)


def faults_figure(injected: pd.DataFrame) -> go.Figure:
    """Runs that were broken, by kind of fault; columns fault, injected, survived."""
    lost = injected["injected"] - injected["survived"]
    fig = go.Figure()
    for name, runs, look in (
        ("survived", injected["survived"], {"color": GOOD}),
        ("not survived", lost, {"color": BAD, "pattern": {"shape": "/"}}),
    ):
        fig.add_bar(y=injected["fault"], x=runs, name=name, orientation="h", marker=look)
    dress(fig, "Faults injected", "runs that were broken", None)
    return fig.update_layout(barmode="stack", height=480, margin={"l": 230})


def coverage_figure(cases: pd.DataFrame) -> go.Figure:
    """Rates of false certificates over alpha, a point a simulated case; columns certificate, case, false, issued, alpha."""
    fig = go.Figure()
    for kind, part in cases.groupby("certificate", sort=False):
        fig.add_scatter(
            x=part["false"] / part["issued"] / part["alpha"], y=[kind] * len(part), mode="markers", name=kind,
            showlegend=False, text=part["case"], marker={"size": 10, "opacity": 0.6, "color": STYLES[0].colour},
        )  # fmt: skip
    fig.add_vline(x=1, line={"dash": "dot", "color": WRONG})
    dress(fig, "False certificates, as a share of those allowed", "rate of false certificates / α", None)
    return fig.update_layout(height=560, margin={"l": 290}).update_xaxes(rangemode="tozero")
