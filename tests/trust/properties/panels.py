"""Panels."""

import functools

from hypothesis import strategies as st
from traitlets import TraitError

from properties.inputs import (
    Halves,
    alphas,
    holds,
    mostly,
    numbers,
    patch_record,
    patches,
    refused,
    sigmas,
    small,
    wholes,
)
from smoothbook.panels.attack import AttackPanel
from smoothbook.panels.compare import ComparePanel
from smoothbook.panels.curve import CurvePanel, curve_frames, read_counts
from smoothbook.panels.explorer import Explorer
from smoothbook.panels.image import ImagePanel
from smoothbook.panels.memory import MemoryPanel
from smoothbook.panels.slice import SlicePanel
from smoothbook.sigma.memory import RULES


@functools.cache
def panels() -> dict:
    """Every panel once; examples set its settings one after the other, as a reader does."""
    records = {"a": patch_record(0.25), "b": patch_record(0.12)}
    return {
        "attack": AttackPanel(Halves(), patches(), records["a"], number=2),
        "compare": ComparePanel(records),
        "curve": CurvePanel(records, patches()),
        "image": ImagePanel(Halves(), patches()),
        "memory": MemoryPanel(),
        "slice": SlicePanel(Halves(), patches()),
    }


panel_settings = {
    "alpha": alphas,
    "n": st.one_of(st.sampled_from([100, 300]), wholes),
    "n0": wholes,
    "number": wholes,
    "reach": numbers,
    "seed": st.one_of(small, st.sampled_from([2**31, 2**63, 2**64 - 1, 2**64, 10**30])),
    "first": st.sampled_from(["a", "b", "", "∞"]),
    "second": st.sampled_from(["a", "b", "", "∞"]),
    "brush": st.lists(numbers, max_size=3).map(tuple),
    "image": st.one_of(st.integers(0, 5), wholes),
    "sigma": sigmas,
    "questions": st.lists(st.lists(numbers, max_size=5), max_size=3).map(tuple),
    "label": st.integers(-2, 2),
    "radius": numbers,
    "rule": st.sampled_from([*RULES, "x"]),
    "order": st.sampled_from(["as asked", "reversed", "x"]),
    "direction": st.sampled_from(["two random directions", "towards another image", "attack", "x"]),
}
moves = st.sampled_from(["attack", "compare", "curve", "image", "memory", "slice"]).flatmap(
    lambda name: st.tuples(
        st.just(name), st.sampled_from(SETTINGS[name]).flatmap(lambda s: st.tuples(st.just(s), panel_settings[s]))
    )
)
SETTINGS = {
    name: kind.settings()
    for name, kind in dict(
        attack=AttackPanel,
        compare=ComparePanel,
        curve=CurvePanel,
        image=ImagePanel,
        memory=MemoryPanel,
        slice=SlicePanel,
    ).items()
}


@holds(moves, share=0.5)
def panels_at_any_setting(move):
    """A setting is refused by its trait, or the figure moves; whatever was wrong is one line, and no title says NaN."""
    name, (setting, value) = move
    panel = panels()[name]
    before = getattr(panel, setting)
    with refused(TraitError):
        setattr(panel, setting, value)
    panel.settle()
    title = panel.figure.layout.title.text or ""
    assert "nan" not in title.lower() and "inf" not in title.lower() and "\n" not in panel.error
    assert not panel.error or panel.error.startswith(("ValueError: ", "RecordError: ")), panel.error
    setattr(panel, setting, before)
    panel.settle()
    assert panel.error == ""


@holds(mostly(st.sampled_from([100, 300]), wholes), mostly(st.just([0.05]), st.lists(alphas, max_size=2)), share=0.1)
def sliders_that_need_no_python(n, several):
    with refused(TraitError):
        fig = curve_frames({0.25: read_counts(patch_record())}, n=n, alphas=several)
    assert len(fig.frames) == len(several) and "nan" not in fig.layout.title.text


@holds(
    mostly(st.just(["a", "b"]), st.lists(st.sampled_from(["a", "b"]), max_size=2)),
    mostly(st.just("b"), st.just("x")),
    share=0.1,
)
def explorers_of_some_panels(found, current):
    made = Explorer({name: lambda: panels()["curve"] for name in found})
    with refused(TraitError):
        made.current = current
    assert made.current in found and made[current].figure is not None
