"""An audit finds what was changed, and says what it could not look at."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from smoothbook.cli import main
from smoothkit import Smoothed, data
from smoothkit.certify import sequential_rule
from smoothkit.reading import audit
from smoothkit.reading.audit import FAILED, NOT_CHECKED, PASSED, votes_apart
from smoothkit.records import Row, compact, create_record, open_record


@pytest.fixture
def made(tmp_path, linear):
    """A record of three digits by a linear classifier, and the classifier."""
    torch.manual_seed(0)
    classifier = linear(torch.randn(64), 0.1)
    images = data.load("digits", subset="classes:0-1,first:3")
    Smoothed(classifier, 0.25).sample(images, n=1_200, out=tmp_path / "r", progress=False)
    return tmp_path / "r", classifier


def verdicts(found) -> dict[str, str]:
    return {check.name: check.verdict for check in found.checks}


def changed(path, change):
    """The record with its rows changed, written anew with right checksums: what somebody who cheats would do."""
    record = open_record(path)
    rows = [Row(**row) for row in record.rows().to_dict("records")]
    other = create_record(path.parent / "changed", record.identity, record.class_names)
    other.append([change(row) for row in rows], record.provenance()[0])
    return other.path


def test_an_honest_record_passes(made):
    path, classifier = made
    found = audit(path, redraw=2, base_classifier=classifier)
    assert found.verdict == PASSED and found.exit_status == 0, found.table().to_string()
    drawn = found.checks[-1]
    assert drawn.name == "votes drawn again" and "all equal" in drawn.what and "same device" in drawn.what
    assert "1 their sha256" in found.checks[0].what


def test_a_record_without_labels_is_none_that_disagrees(made, tmp_path):
    """As that of a smoothed selector, whose classes are noise levels."""
    _, classifier = made
    images = data.load("digits", subset="classes:0-1,first:3")
    unlabelled = dataclasses.replace(images, labels=np.full(3, data.UNLABELLED))
    Smoothed(classifier, 0.25).sample(unlabelled, n=1_200, out=tmp_path / "u", progress=False)
    assert audit(tmp_path / "u", redraw=1, base_classifier=classifier).verdict == PASSED


def test_votes_moved_between_classes_are_found(made):
    path, classifier = made

    def cheat(row):
        counts = np.array(row.counts)
        counts[counts.argmax()] += counts.min()
        counts[counts.argmin()] = 0
        return dataclasses.replace(row, counts=tuple(counts.tolist()))

    found = audit(changed(path, cheat), redraw=3, base_classifier=classifier)
    assert verdicts(found)["votes drawn again"] == FAILED and found.exit_status == 1
    assert "votes of image" in found.checks[-1].what


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (dict(digest="00000000000000"), "images"),
        (dict(label=7), "images"),
        (dict(image_id=5), "image ids"),
        (dict(stop=77, start=60, counts=(10, 7)), "blocks"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_what_does_not_fit_is_named(made, change, check):
    path, classifier = made
    key = open_record(path).rows()["key"].iloc[0]
    altered = changed(path, lambda row: dataclasses.replace(row, **change) if row.key == key else row)
    found = audit(altered, base_classifier=classifier)
    assert verdicts(found)[check] == FAILED and found.exit_status == 1, found.table().to_string()


def test_a_description_that_was_edited(made):
    path, _ = made
    about = json.loads((path / "run.json").read_text())
    about["identity"]["sigma"] = 0.5  # twice the radii
    (path / "run.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="does not fit its checksum"):
        audit(path)
    del about["sha256"]
    (path / "run.json").write_text(json.dumps(about))
    found = audit(path)
    assert found.verdict == FAILED and "sigma 0.25 instead of 0.5" in found.checks[0].what


def test_what_is_not_at_hand_does_not_pass(made, tmp_path):
    path, _ = made
    found = audit(path)  # nobody can know a linear classifier by its name
    assert found.verdict == NOT_CHECKED and found.exit_status == 3
    assert verdicts(found)["classifier"] == verdicts(found)["votes drawn again"] == NOT_CHECKED
    identity = dataclasses.replace(open_record(path).identity, dataset="folder:/no/such/folder")
    record = create_record(tmp_path / "moved", identity)
    record.append(
        [Row(**row) for row in open_record(path).rows().to_dict("records")], open_record(path).provenance()[0]
    )
    found = audit(record.path)
    assert verdicts(found)["images"] == NOT_CHECKED and "no folder at" in found.table().to_string()


def test_another_batch_within_a_stated_number_of_votes(made):
    path, classifier = made
    record = open_record(path)
    other = create_record(path.parent / "other", record.identity)
    other.append(
        [Row(**row) for row in record.rows().to_dict("records")],
        record.provenance()[0] | {"device": "cuda of somebody"},
    )
    found = audit(other.path, base_classifier=classifier)
    said = {check.name: check.what for check in found.checks}
    assert found.verdict == PASSED and "device not known to be the record's" in said["votes drawn again"]
    assert "if 2 votes of every image were moved, its ACR is" in said["radii without them"]
    assert votes_apart(100) == 2 and votes_apart(100_000) == 100


def test_sequential_records_are_proved_look_by_look(made, tmp_path):
    _, classifier = made
    images = data.load("digits", subset="classes:0-1,first:3")
    smoothed = Smoothed(classifier, 0.25)
    for kind in ("hybrid", "kt", "staged"):
        out = tmp_path / kind
        rule = sequential_rule([0.05, 0.1], kind=kind, n_max=2_000)
        smoothed.sample(images, rule=rule, out=out, progress=False)
        assert audit(out, base_classifier=classifier).verdict == PASSED
    out = tmp_path / "radius"
    smoothed.sample(images, rule=sequential_rule(within=0.05, n_max=2_000), out=out, progress=False)
    assert audit(out, base_classifier=classifier).verdict == PASSED


def test_the_command(made, tmp_path, capsys):
    out = str(tmp_path / "starter")
    assert main(["certify", "--model", "starter:digits-vit-0.25", "--data", "digits", "--sigma", "0.25", "--n", "200",
                 "--subset", "first:2", "--out", out]) == 0  # fmt: skip
    assert main(["audit", out, "--redraw", "1"]) == 0
    assert capsys.readouterr().out.endswith(f"{out}: passed\n")
    assert main(["audit", str(made[0])]) == 3
    assert "not checked" in capsys.readouterr().out
    assert main(["audit", str(tmp_path)]) == 2


def test_every_committed_record_passes_without_its_votes_being_drawn(made):
    """As far as it can be checked here; `make audits` draws votes as well."""
    from results import ROOT, read

    folder = ROOT / "data" / "records"
    for run in sorted(folder.glob("*/run.json")):
        found = audit(run.parent, redraw=0)
        assert {c.name for c in found.checks if c.verdict != PASSED} == {"votes drawn again"}, found.table().to_string()
    kept = read("audits")
    assert kept["verdicts"][FAILED] == 0 and kept["records"] >= 100


def test_a_compacted_record_passes(made, tmp_path):
    path, classifier = made
    assert audit(compact(open_record(path), tmp_path / "kept").path, base_classifier=classifier).verdict == PASSED
