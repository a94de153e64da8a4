"""The committed rows with a sigma for each image: comparable with each other, and sound where they say so."""

import numpy as np
import pytest
import torch

from smoothbook import tables
from smoothbook.sigma.distances import relative_error
from smoothbook.sigma.selectors import NearestPrototype
from smoothbook.sigma.sound import GEOMETRY, read_geometry

TABLES = {"sigma": ("gaussian", "smoothadv", "macer"), "cifar10-sigma:reduced": ("cnn", "vit")}


@pytest.mark.parametrize("table", TABLES)
def test_rows_are_of_the_same_images_noise_and_classifier(table):
    """Common random numbers: one seed, one form of noise, one rule; images in the same order."""
    assert table in tables.kept()
    opened = tables.open(table)
    rows, kept = opened.rows, [name for name in opened.made if "held-out" not in name]
    records, found = ({name: getattr(opened[name], what) for name in kept} for what in ("record", "certificates"))
    about = {
        (r.identity.dataset, r.identity.subset, r.identity.seed, r.identity.noise, r.stopping_rule)
        for r in records.values()
    }
    assert len(about) == 1
    assert len({tuple(t["image_id"]) for t in found.values()}) == 1
    for training in TABLES[table]:
        of_one_classifier = [n for n in kept if (n.startswith(training) and rows[n].method == "clean") or n == training]
        assert len({records[n].identity.fingerprint for n in of_one_classifier}) <= 1
    searched = [name for name in kept if rows[name].search]
    assert len(searched) >= 2 and all(records[name].per_image for name in searched)
    for name in searched:
        sigmas, selector = set(found[name]["sigma"]), rows[name].selector
        assert sigmas <= set(selector["sigmas"]) if selector else len(sigmas) > 20


def test_sound_radii_are_those_of_the_kept_prototypes(digits):
    """No kept radius is above the true one, which `choose` gives in exact arithmetic, the same on every machine.

    The kept ones were made in float64 on another, and rounded down: by `relative_error` of the sums' size, at most
    4 sqrt(d) times the distance of two prototypes for d pixels on [0, 1], and of the radius, below sqrt(d), twice.
    """
    table = tables.open("sigma")
    place = {image_id: i for i, image_id in enumerate(digits.ids)}
    found = [table[name] for name in table.made if (table[name].folder / GEOMETRY).is_file()]
    assert found
    for row in found:
        kept = read_geometry(row.folder)
        selector = NearestPrototype(torch.from_numpy(kept["prototypes"]), kept["sigmas"])
        choice = selector.choose(digits.at(np.array([place[i] for i in kept["image_ids"]]), "kept"))
        pixels = kept["prototypes"][0].size
        assert (kept["radius"] <= choice.radius).all()
        assert (kept["radius"] >= choice.radius - 6 * pixels**0.5 * relative_error(pixels)).all()
        made = row.certificates
        assert made["sigma"].tolist() == choice.sigma.tolist()
        assert (made["radius"] <= np.minimum(made["sigma_radius"], made["class_radius"])).all()


def test_the_papers_claims_are_rows():
    mine = (table := tables.claims())[table["system"].str.startswith("Data-dependent smoothing")]
    assert len(mine) >= 15 and set(mine["holds"]) <= {"yes", "no", "unclear", "not measured"}
    measured = mine[mine["holds"] != "not measured"]
    assert len(measured) >= 8 and (measured["interval"] != "").all()
    memory = mine[mine["claim"].str.startswith("the memory changes no answer")]
    assert memory["measured"].str.match(r"\d+ of 180").sum() >= 1
