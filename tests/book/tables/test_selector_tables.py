"""Votes with a sigma for each image, kept: every certificate, frozen or sound, is made again from the record."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from smoothbook import tables
from smoothbook.cli import main
from smoothbook.sigma.selectors import NearestPrototype
from smoothbook.sigma.sound import Choice, by_min_rule, read_geometry, read_sound
from smoothbook.tables import Row, RowError, load_rows
from smoothbook.tables.build import certified_images, check_row, schedule_of
from smoothbook.tables.make import certify_row, keep_row, make_table
from smoothbook.tables.selectors import read_search, read_selector, read_table
from smoothbook.training import Fitted
from smoothkit import data, models
from smoothkit.certify import certificates
from smoothkit.records import PER_IMAGE, RecordError, create_record, open_record
from smoothkit.sampling.run import collect_votes
from smoothkit.types import ABSTAIN, StoppingRule

SIGMAS = [0.12, 0.25, 0.31]
HOW = dict(stopping_rule=StoppingRule(n0=20, n=200, alpha=0.001), seed=3, progress=False)


@pytest.fixture(scope="module")
def few(digits):
    return digits.take("first:3")


@pytest.fixture(scope="module")
def kept(starter, few, tmp_path_factory):
    return collect_votes(starter, few, sigma=SIGMAS, out=tmp_path_factory.mktemp("kept") / "r", **HOW)


# --- the record --------------------------------------------------------------------------------------


def test_a_record_keeps_each_images_sigma(kept, starter, few):
    """Its certificates are those of records at one sigma each."""
    record = open_record(kept.path)
    assert record.identity.sigma == PER_IMAGE and record.per_image and PER_IMAGE in repr(record)
    assert record.votes()["sigma"].tolist() == SIGMAS
    again = certificates(record)
    assert again["sigma"].tolist() == SIGMAS and (again["radius"] <= 3 * again["sigma"]).all()
    apart = [certificates(collect_votes(starter, few, sigma=s, **HOW)).iloc[[i]] for i, s in enumerate(SIGMAS)]
    pd.testing.assert_frame_equal(again, pd.concat(apart), check_exact=True)
    in_memory = collect_votes(starter, few, sigma=SIGMAS, **HOW)
    pd.testing.assert_frame_equal(certificates(in_memory), again)


def test_votes_at_one_sigma_are_those_of_a_plain_record(kept, starter, few):
    for i, sigma in enumerate(SIGMAS):
        plain = collect_votes(starter, few, sigma=sigma, **HOW).votes()
        assert plain["sigma"].tolist() == [sigma] * 3
        assert (plain["counts_estimation"][i] == kept.votes()["counts_estimation"][i]).all()


def test_a_run_goes_on_at_the_same_sigmas_only(starter, few, tmp_path):
    part, whole = (dataclasses.replace(x, subset="the same") for x in (few.take("first:2"), few))
    collect_votes(starter, part, sigma=SIGMAS[:2], out=tmp_path / "r", **HOW)
    record = open_record(tmp_path / "r")
    collect_votes(starter, whole, sigma=SIGMAS, out=tmp_path / "r", **HOW)
    assert record.votes()["sigma"].tolist() == SIGMAS
    with pytest.raises(ValueError, match=r"was sampled at sigma 0\.25 in .*, and now is to be at 0\.26"):
        collect_votes(starter, whole, sigma=[0.12, 0.26, 0.31], out=tmp_path / "r", **HOW)
    with pytest.raises(RecordError, match=r"sigma 0\.25 instead of 'per-image'"):
        collect_votes(starter, whole, sigma=0.25, out=tmp_path / "r", **HOW)
    with pytest.raises(ValueError, match="above 0"):
        collect_votes(starter, few, sigma=[0.25, 0.0, 0.25], **HOW)


def test_rows_must_say_their_sigma(kept, tmp_path):
    rows_of = [rows_from(r) for r in kept.rows().to_dict("records")]
    plain = create_record(None, dataclasses.replace(kept.identity, sigma=0.25))
    with pytest.raises(RecordError, match="if, and only if"):
        plain.append(rows_of, {})
    other = create_record(tmp_path / "r", kept.identity)
    with pytest.raises(RecordError, match="if, and only if"):
        other.append([dataclasses.replace(r, sigma=None) for r in rows_of], {})
    other.append(rows_of, {})
    other.append([dataclasses.replace(rows_of[0], sigma=0.7, start=20, stop=40)], {})
    with pytest.raises(RecordError, match="sampled at two sigmas"):
        other.rows()


def rows_from(fields: dict):
    from smoothkit.records import Row as VoteRow

    return VoteRow(**fields)


def test_report_reads_it(kept, capsys):
    assert main(["report", str(kept.path), "--format", "csv"]) == 0
    head, line = capsys.readouterr().out.splitlines()[:2]
    assert line.split(",")[head.split(",").index("sigma")] == ""


# --- the min rule ------------------------------------------------------------------------------------


def test_by_min_rule():
    table = pd.DataFrame(
        {"predict": [1, 1, ABSTAIN, 2], "radius": [0.4, 0.4, 0.0, 0.3], "label": [1, 1, 1, 1], "alpha": 0.0005}
    )
    choice = Choice(np.full(4, 0.25), np.array([0.2, 0.9, 0.5, 0.5]), np.array([True, False, True, True]), alpha=0.0005)
    sound = by_min_rule(table, choice, alpha=0.001)
    assert sound["radius"].tolist() == [0.2, 0.0, 0.0, 0.3] and sound["predict"].tolist() == [1, ABSTAIN, ABSTAIN, 2]
    assert sound["correct"].tolist() == [True, False, False, False]
    assert (sound["alpha"] == 0.001).all() and (sound["alpha_class"] == 0.0005).all()


# --- rows --------------------------------------------------------------------------------------------

SEARCH = {"steps": 3, "step_size": 0.01, "pilot": 10}
PROTOTYPES = {"kind": "prototypes", "sigmas": [0.18, 0.25, 0.35], "each": 2, "train_images": "first:40"}
SMOOTHED = {
    "kind": "smoothed", "sigmas": [0.18, 0.25], "sigma_e": 0.3, "train_images": "first:60", "epochs": 1, "base": "starter:digits-vit-clean",
}  # fmt: skip
CERTIFIED = dict(
    sigma=0.25, method="clean", base="starter:digits-vit-0.25", n0=20, n=200, images="first:4", search=SEARCH
)


def make(row: Row, folder, starter):
    train, test = data.load("digits", split="train"), data.load("digits")
    images = certified_images(row, train, test)
    record = certify_row(row, starter, images, out=folder / "work", train=train, progress=False)
    keep_row(row, Fitted(starter, [], models_trainable(starter), 0, 0.0, False, None), record, folder / row.name)
    return images


def models_trainable(model):
    from smoothbook.adapters import trainable

    return trainable(model)


def test_a_searched_row_is_kept_and_read(starter, tmp_path):
    row = Row(name="ds", title="DS", **CERTIFIED)
    images = make(row, tmp_path / "t", starter)
    (tmp_path / "t" / "work").rename(tmp_path / "work")
    table = tables.Table("t", [row], tmp_path / "t")["ds"].certificates
    found = json.loads((tmp_path / "work" / "sigma.json").read_text())
    assert table["sigma"].tolist() == found["sigma"] and found["images"] == list(images.ids)
    assert (table["sigma"] != 0.25).any()
    changed = dataclasses.replace(
        row, search=SEARCH | {"steps": 4}
    )  # another search: what was found before is not taken
    with pytest.raises(ValueError, match="and now is to be at"):
        certify_row(changed, starter, images, out=tmp_path / "work", progress=False)


def test_a_row_with_prototypes(starter, tmp_path):
    row = Row(name="p", title="P", selector=PROTOTYPES, **CERTIFIED)
    images = make(row, tmp_path / "t", starter)
    kept = read_geometry(tmp_path / "t" / "p")
    selector = NearestPrototype(torch.from_numpy(kept["prototypes"]), kept["sigmas"])
    choice = selector.choose(images)
    table = read_sound(tmp_path / "t" / "p")
    assert table["sigma_radius"].tolist() == choice.radius.tolist() and table["sigma"].tolist() == choice.sigma.tolist()
    assert (table["radius"] <= table["sigma_radius"]).all() and (table["alpha_class"] == 0.001).all()
    (tmp_path / "t" / "p" / "selector.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(RecordError, match=r"selector\.npz cannot be read"):
        read_sound(tmp_path / "t" / "p")


def test_a_row_with_a_smoothed_selector(starter, tmp_path):
    row = Row(name="d", title="D", selector=SMOOTHED, **CERTIFIED)
    make(row, tmp_path / "t", starter)
    table = read_sound(tmp_path / "t" / "d", sigmas=SMOOTHED["sigmas"])
    assert set(table["sigma"]) <= {0.18, 0.25}
    assert (table["alpha"] == 0.001).all() and (table["alpha_class"] == 0.0005).all()
    assert (table["radius"] <= np.minimum(table["sigma_radius"], table["class_radius"])).all()
    with pytest.raises(RecordError, match="not at the sigmas the selector chooses"):
        read_sound(tmp_path / "t" / "d", sigmas=[0.3, 0.4])
    with pytest.raises(RecordError, match="2 classes, and there are 1 sigmas"):
        read_sound(tmp_path / "t" / "d", sigmas=[0.3])


def test_they_are_made_in_a_table_that_copies_votes_that_are_there(tmp_path, capsys):
    root = tmp_path / "data"
    (root / "rows").mkdir(parents=True)
    shared = dict(base="starter:digits-vit-0.25", method="clean", sigma=0.25, n0=20, n=200, images="first:2")
    ds = dict(name="ds", title="DS", search=SEARCH)
    sound = dict(name="sound", title="sound", search=SEARCH, selector=PROTOTYPES | {"train_images": "first:12"})
    content = dict(defaults=shared, rows=[dict(name="fixed", title="fixed"), ds, sound])
    (root / "rows" / "mine.yaml").write_text(json.dumps(content))
    assert make_table("mine", data=root) == ["fixed", "ds", "sound"]
    assert make_table("mine", data=root) == []
    curves = tables.open("mine", data=root).certificates()
    assert list(curves) == ["fixed", "DS", "sound"]
    assert (curves["sound"]["radius"] <= curves["sound"]["class_radius"]).all()
    assert not list((tmp_path / "runs" / "rows" / "mine").glob("votes-*"))
    other = dict(
        defaults=shared | {"base": "row:copy"}, rows=[dict(name="copy", base=shared["base"]), dict(name="again")]
    )
    (root / "rows" / "other.yaml").write_text(json.dumps(other))
    capsys.readouterr()
    make_table("other", only=["again"], data=root)
    assert "again: has the votes of mine/fixed, copied from there" in capsys.readouterr().err
    again = tables.open("other", data=root)["again"].certificates
    pd.testing.assert_frame_equal(again, curves["fixed"])


def test_held_out_images_are_those_training_leaves_out(digits):
    train = data.load("digits", split="train")
    row = Row(name="h", sigma=0.25, images="held-out")
    images = certified_images(row, train, digits)
    assert len(images) == round(0.1 * len(train)) and images.split == "train" and images.subset == "held-out:0.1:seed0"
    from smoothbook.training.images import split_images

    assert images.index.tolist() == train.index[split_images(train, 0.1, 0)[1][1]].tolist()


def test_bad_settings(tmp_path):
    for settings, message in (
        ({"objective": "best"}, "search: objective 'best' is unknown; choose one of clamped, released, finite"),
        ({"clmap": 0.1}, "unknown key 'clmap'"),
        ({"objective": "finite", "clamp": 0.1}, "unknown key 'clamp'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_search(settings)
    assert read_table(0.25, {"fixed_for": 0.5, "draws": 8}).search.draws == 8
    with pytest.raises(ValueError, match="selector: kind 'oracle' is unknown; choose one of prototypes, smoothed"):
        read_selector({"kind": "oracle"})
    with pytest.raises(ValueError, match="selector: sigmas, each are missing"):
        read_selector({"kind": "prototypes", "train_images": "all"})
    with pytest.raises(RowError, match="a selector is made of searched sigmas"):
        Row(name="s", sigma=0.25, selector=PROTOTYPES)
    path = tmp_path / "t.yaml"
    path.write_text("rows:\n  - {name: a, sigma: 0.25, schedule: clean, table: {draws: 1}}\n")
    with pytest.raises(RowError, match="a table of sigmas is a schedule"):
        load_rows(path, check=check_row)
    row = Row(name="p", selector=PROTOTYPES, **CERTIFIED)
    with pytest.raises(RowError, match="needs the training images and a folder"):
        certify_row(row, models.load("starter:digits-vit-0.25"), data.load("digits", subset="first:2"))


def test_search_and_table_change_the_right_digests():
    plain = Row(name="a", sigma=0.25)
    assert dataclasses.replace(plain, search=SEARCH).training_digest() == plain.training_digest()
    assert dataclasses.replace(plain, table={"draws": 8}).training_digest() != plain.training_digest()
    assert not dataclasses.replace(plain, search=SEARCH).made_like(plain)
    assert schedule_of(dataclasses.replace(plain, table={"draws": 8})).sigma0 == 0.25
