"""Records on disk: append-only, whole or not at all, and suspicious of everything."""

import json

import numpy as np
import pytest

from smoothkit.records import Identity, RecordError, Row, compact, create_record, format, open_record
from smoothkit.records import record as records
from smoothkit.types import StoppingRule, block_edges


def identity(**changes) -> Identity:
    settings = dict(
        dataset="digits", split="test", subset="first:2", model="m", fingerprint="abc", num_classes=3, sigma=0.25,
        seed=0, noise="grid:256", precision="float32", stopping_rule=StoppingRule(n0=100, n=2_000, alpha=0.001),
    )  # fmt: skip
    return Identity(**{**settings, **changes})


def row(image=7, purpose="select", start=0, stop=100, counts=(90, 10, 0), **changes) -> Row:
    settings = dict(index=image, key=str(image), image_id=image, digest="d", label=0)
    return Row(**{**settings, **changes}, purpose=purpose, start=start, stop=stop, counts=counts)


def complete(image=7, **changes) -> list[Row]:
    return [
        row(image, **changes),
        row(image, "estimate", 0, 100, (95, 5, 0), **changes),
        row(image, "estimate", 100, 1_000, (800, 99, 1), **changes),
        row(image, "estimate", 1_000, 2_000, (1_000, 0, 0), **changes),
    ]


@pytest.fixture
def record(tmp_path):
    return create_record(tmp_path / "r", identity())


def test_block_grid():
    assert block_edges(50) == [0, 50]
    assert block_edges(100) == [0, 100]
    assert block_edges(2_000) == [0, 100, 1_000, 2_000]
    assert block_edges(100_000) == [0, 100, 1_000, *range(10_000, 100_001, 10_000)]


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_round_trip(where, tmp_path):
    record = create_record(tmp_path / "r" if where == "disk" else None, identity(), ("a", "b", "c"))
    record.append(complete(9)[:2], {"compute_batch": 100})
    record.append(complete(9)[2:] + complete(3), {"compute_batch": 50})
    if where == "disk":
        record = open_record(tmp_path / "r")
        assert [p["compute_batch"] for p in record.provenance()] == [100, 50]
        assert record.class_names == ("a", "b", "c") and record.identity == identity()
    votes = record.votes()
    assert votes["index"].tolist() == [3, 9] and votes["n"].tolist() == [2_000, 2_000]
    assert votes["counts_selection"][0].tolist() == [90, 10, 0]
    assert votes["counts_estimation"][1].tolist() == [1895, 104, 1]
    assert record.votes(n=1_000)["counts_estimation"][0].tolist() == [895, 104, 1]
    with pytest.raises(RecordError, match=r"not a block edge; choose one of \[100, 1000, 2000\]"):
        record.votes(n=500)


def test_incomplete_images_are_left_out(record):
    record.append(complete(3)[:3] + complete(4), {})
    assert record.votes()["index"].tolist() == [4]
    assert record.votes(n=1_000)["index"].tolist() == [3, 4]


def test_equal_duplicates_collapse_and_unequal_ones_are_refused(record):
    record.append(complete(3), {})
    record.append(complete(3)[:2], {})
    assert record.votes()["counts_estimation"][0].sum() == 2_000
    record.append([row(3, counts=(89, 11, 0))], {})
    with pytest.raises(RecordError, match="image 3 has two different counts for one block"):
        record.votes()


@pytest.mark.parametrize("counts", [(90, 10), (90, 11, 0)])
def test_counts_that_do_not_fit(record, counts):
    record.append([row(counts=counts)], {})
    with pytest.raises(RecordError, match="do not fit"):
        record.rows()


def test_nan_rows_may_leave_counts_short(record):
    record.append([row(counts=(80, 10, 0))], {})
    assert len(record.rows()) == 1


@pytest.mark.parametrize(
    "change",
    [dict(sigma=0.5), dict(seed=1), dict(fingerprint="x"), dict(noise="float"), dict(dataset="cifar10"),
     dict(stopping_rule=StoppingRule(n0=100, n=3_000, alpha=0.001))],
)  # fmt: skip
def test_another_run_is_refused(record, change):
    record.append(complete(), {})
    with pytest.raises(RecordError, match=f"record of another run: this one has {next(iter(change))}"):
        create_record(record.path, identity(**change))
    assert len(open_record(record.path).rows()) == 4


def test_the_same_run_goes_on_whatever_the_model_is_called(record):
    assert create_record(record.path, identity(model="other name")).path == record.path


@pytest.mark.parametrize("damage", ["cut short", "flipped byte", "other columns"])
def test_damaged_parts_are_named(record, damage):
    record.append([r for image in range(200) for r in complete(image)], {})
    part = record.parts()[0]
    content = bytearray(part.read_bytes())
    if damage == "cut short":
        part.write_bytes(bytes(content[: len(content) // 2]))
    elif damage == "flipped byte":
        content[len(content) // 3] ^= 0x10
        part.write_bytes(bytes(content))
    else:
        import pandas as pd

        pd.DataFrame({"a": [1]}).to_parquet(part)
    with pytest.raises(RecordError, match=part.name):
        record.rows()


def test_folders_that_are_no_records(tmp_path):
    with pytest.raises(RecordError, match="no vote record"):
        open_record(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RecordError, match="exists and is no record"):
        create_record(tmp_path, identity())
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1}', "lacks .identity"),
    ],
)
def test_damaged_descriptions(record, text, match):
    (record.path / "run.json").write_text(text)
    with pytest.raises(RecordError, match=match):
        open_record(record.path)


def test_a_failed_write_leaves_nothing(record, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.pq, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        record.append(complete(), {})
    assert list((record.path / "parts").iterdir()) == []


def test_no_radius_is_stored(record):
    record.append(complete(), {})
    text = (record.path / "run.json").read_text()
    assert "radius" not in text and "radius" not in format._SCHEMA.names
    assert json.loads(text)["identity"]["stopping_rule"]["n"] == 2_000


def test_compact(record, tmp_path):
    record.append(complete(3), {"compute_batch": 100, "time": "a"})
    record.append(complete(4), {"compute_batch": 100, "time": "b"})
    copy = compact(record, tmp_path / "kept")
    assert len(copy.parts()) == 1 and copy.provenance() == [{"compute_batch": 100, "time": "b"}]
    for column in ("counts_selection", "counts_estimation"):
        assert np.array_equal(np.stack(copy.votes()[column]), np.stack(record.votes()[column]))
    with pytest.raises(RecordError, match="already has parts"):
        compact(record, tmp_path / "kept")
