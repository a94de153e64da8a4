"""Shards joined, records packed, and what a run would take."""

import re
import zipfile

import numpy as np
import pytest
import torch

from smoothbook.bench.plan import bytes_per_image, known_rate, plan
from smoothbook.cli import main
from smoothkit import Smoothed, data
from smoothkit.reading import audit
from smoothkit.reading.audit import PASSED
from smoothkit.records import RecordError, Row, create_record, merge, open_record, pack


@pytest.fixture
def classifier(linear):
    torch.manual_seed(0)
    return linear(torch.randn(64), 0.1)


def sample(classifier, subset, out, **settings):
    images = data.load("digits", subset=f"classes:0-1,{subset}")
    return Smoothed(classifier, 0.25).sample(images, n=500, out=out, progress=False, **settings)


def counts(record):
    rows = record.rows().sort_values(["image_id", "purpose", "start"])
    return rows[["image_id", "purpose", "start", "counts"]].to_numpy().tolist()


def test_shards_give_what_one_run_gives(classifier, tmp_path):
    whole = sample(classifier, "range:0:7", tmp_path / "whole")
    for i, subset in enumerate(("range:4:7", "range:0:3", "range:2:5")):  # they overlap, and equal blocks collapse
        sample(classifier, subset, tmp_path / f"{i}")
    merged = merge([tmp_path / f"{i}" for i in range(3)], tmp_path / "merged")
    assert counts(merged) == counts(whole) and merged.identity == whole.identity
    assert audit(merged.path, base_classifier=classifier).verdict == PASSED
    with pytest.raises(RecordError, match="already has parts"):
        merge([tmp_path / "0"], tmp_path / "merged", subset=merged.identity.subset)


def test_what_cannot_be_merged(classifier, tmp_path):
    first = sample(classifier, "range:0:2", tmp_path / "a")
    sample(classifier, "range:5:6", tmp_path / "gap")
    with pytest.raises(RecordError, match=r"say what they are together with subset="):
        merge([tmp_path / "a", tmp_path / "gap"], tmp_path / "out")
    sample(classifier, "range:2:3", tmp_path / "seed", seed=1)
    with pytest.raises(RecordError, match=r"of another run .* seed 1 instead of 0"):
        merge([tmp_path / "a", tmp_path / "seed"], tmp_path / "out")
    forged = create_record(tmp_path / "forged", first.identity)
    rows = [Row(**row) for row in first.rows().to_dict("records")]
    forged.append([Row(**{**vars(rows[0]), "counts": rows[0].counts[::-1]})], {})
    with pytest.raises(RecordError, match="two different counts for one block"):
        merge([tmp_path / "a", tmp_path / "forged"], tmp_path / "out")
    with pytest.raises(RecordError, match="at least one record"):
        merge([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_packed_record_names_no_path(tmp_path, linear):
    """A folder of pictures, packed, unpacked elsewhere, and audited by somebody who has the pictures elsewhere."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for where in ("mine", "yours"):
        for i in range(3):
            folder = tmp_path / where / "pictures" / f"class-{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    classifier = linear(torch.tensor(rng.normal(size=192)), 0.0)
    classifier.name = f"local-dir:{tmp_path}/mine/weights"
    mine = data.load(f"folder:{tmp_path / 'mine' / 'pictures'}")
    Smoothed(classifier, 0.25).sample(mine, n=200, out=tmp_path / "r", progress=False)
    packed = pack(tmp_path / "r", tmp_path / "shared.zip")
    again = pack(tmp_path / "r", tmp_path / "again.zip")
    with zipfile.ZipFile(packed) as archive, zipfile.ZipFile(again) as other:
        names = archive.namelist()
        assert {re.sub(r"part-000000-\w+", "part", n) for n in names} == {
            "shared/run.json",
            "shared/parts/part.parquet",
        }
        assert archive.read("shared/run.json") == other.read("again/run.json")
        assert all(str(tmp_path).encode() not in archive.read(n) for n in names)
        archive.extractall(tmp_path / "unpacked")
    record = open_record(tmp_path / "unpacked" / "shared")
    assert record.identity.dataset == "folder:pictures" and record.identity.model == "local-dir:weights"
    assert counts(record) == counts(open_record(tmp_path / "r"))
    yours = data.load(f"folder:{tmp_path / 'yours' / 'pictures'}")
    found = audit(record.path, images=yours, base_classifier=classifier)
    assert found.verdict == PASSED, found.table().to_string()
    with pytest.raises(RecordError, match="is there already"):
        pack(tmp_path / "r", packed)


def test_the_commands(classifier, tmp_path, capsys):
    for i in range(2):
        sample(classifier, f"range:{i}:{i + 1}", tmp_path / f"{i}")
    assert main(["merge", str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(tmp_path / "m")]) == 0
    assert "2 images of classes:0-1,range:0:2" in capsys.readouterr().out
    assert main(["pack", str(tmp_path / "m"), "--out", str(tmp_path / "m.zip")]) == 0
    assert main(["pack", str(tmp_path / "m"), "--out", str(tmp_path / "m.zip")]) == 2
    assert main(["plan", "--data", "imagenet", "--model", "resnet50", "--gpus", "1000", "--rate", "1000"]) == 0
    printed = capsys.readouterr().out
    assert "5,005,000,000" in printed and "until radius 0.5 is decided" in printed
    assert main(["plan", "--data", "digits", "--model", "x", "--rate", "nan"]) == 2


def test_the_arithmetic_of_a_plan():
    found = plan("imagenet", "resnet50", gpus=1_000, rate=1_000, price=2.0)
    fixed, early = found.costs[:2]
    assert fixed.calls == 50_000 * 100_100 and fixed.gpu_hours == pytest.approx(fixed.calls / 1_000 / 3_600)
    assert fixed.hours == pytest.approx(fixed.gpu_hours / 1_000) and fixed.cost == pytest.approx(2 * fixed.gpu_hours)
    assert early.calls < fixed.calls / 30
    assert found.bytes_out == 50_000 * 3 * 224 * 224 * 4 and found.bytes_model > 4 * 25_000_000
    assert found.bytes_back == 50_000 * (1 + 12) * 1_000 * 8
    slow = plan("cifar10", "unheard of", n=1_000, alpha=0.01, images=7)
    assert (
        slow.costs[0].hours is None and len(slow.costs) == 1 and any("no committed benchmark" in x for x in slow.notes)
    )
    assert known_rate("starter:digits-vit-0.25")[0] > 100
    with pytest.raises(ValueError, match="cannot reach alpha"):
        plan("imagenet", "resnet50", n=5)


def test_the_size_of_a_record_is_measured(classifier, tmp_path):
    """Made-up votes take at least what those of a real network take, and not ten times as much."""
    from conftest import ROOT

    real = ROOT / "data" / "records" / "digits-vit-0.25-sigma-0.25"
    (part,) = open_record(real).parts()
    assert part.stat().st_size / 360 < bytes_per_image(100, 10_000, 0.001, 10) < 10 * part.stat().st_size / 360


def test_a_huge_n_is_planned_and_a_larger_one_refused():
    """A record is measured on a part of its blocks, so that a plan of 10^9 samples needs no more memory than one of 10^6."""
    million, billion = (plan("digits", "starter:digits-vit-0.25", n=n) for n in (10**6, 10**9))
    assert 0.9 < billion.bytes_record / million.bytes_record / 1_000 < 1.1
    with pytest.raises(ValueError, match="n must be at most 1,000,000,000, got 2,147,483,648"):
        plan("digits", "starter:digits-vit-0.25", n=2**31)
