"""The short version of `make faults`, and that the harness would notice."""

import re

import pytest
from conftest import ROOT
from inject_faults import FAULTS, run, trial
from results import read

from smoothkit.records import format
from smoothkit.records import record as records


@pytest.mark.slow
def test_faults_of_every_kind_are_survived(tmp_path):
    found = run(len(FAULTS), 0, tmp_path, seed=4)
    assert [t for t in found if t["problem"]] == []
    assert {t["kind"] for t in found} == set(FAULTS) and any(t["again"] for t in found)


@pytest.mark.slow
def test_the_harness_notices_what_is_lost(tmp_path, monkeypatch):
    """With checksums that are never compared, a flipped bit goes unnoticed; the harness finds that."""
    from inject_faults import Bench, certify, counts

    bench = Bench(tmp_path, seed=0)
    monkeypatch.setattr(format, "_digest_of_line", lambda line: b"0" * 16)

    def forged(bench, out):
        writer = certify(bench.folder / "source")  # a journal as a killed run leaves it, with one vote moved
        record = records.create_record(out, writer.identity, writer.class_names)
        first = next(iter(writer.rows().to_dict("records")))
        moved = (*first["counts"][:-2], first["counts"][-1], first["counts"][-2])
        moved = moved if moved != first["counts"] else tuple(reversed(first["counts"]))
        record.journal().add(format.Row(**{**first, "counts": moved}), {})
        return 0, None

    assert counts(certify(tmp_path / "again")) == bench.expected
    assert trial(bench, "forged", forged, tmp_path / "t")["problem"] == "the final counts differ"


def test_a_journal_that_was_damaged_is_named(tmp_path):
    from inject_faults import certify

    record = certify(tmp_path / "r")
    journal, row = record.journal(), format.Row(**record.rows().to_dict("records")[0])
    journal.add(row, {"compute_batch": 100})
    journal.add(row, {"compute_batch": 100})
    whole = journal.path.read_bytes()
    assert len(record.rows()) == 20 and record.provenance()[-1] == {"compute_batch": 100}
    journal.path.write_bytes(whole[:-5])  # the last line was being written
    assert len(format.read_journal(journal.path)) == 1
    journal.path.write_bytes(whole.replace(b"image_id", b"image_ie", 1))
    with pytest.raises(format.RecordError, match=re.escape(f"{journal.path.name} is damaged at line 1")):
        record.rows()
    journal.clear()
    assert not journal.path.exists() and len(record.rows()) == 20


def test_a_run_killed_before_its_description_was_there(tmp_path):
    from inject_faults import certify

    (tmp_path / "r" / "parts").mkdir(parents=True)
    (tmp_path / "r" / ".run.json.ab12.tmp").write_text("{")
    assert len(certify(tmp_path / "r", pause=0).rows()) == 20
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(format.RecordError, match="exists and is no record"):
        certify(tmp_path / "other")


def test_the_kept_result():
    kept = read("faults")
    assert kept["injected"] == kept["survived"] >= 200 and kept["counts_lost"] == 0 and not kept["problems"]
    assert kept["fresh_interpreters"] >= 20 and {row["fault"] for row in kept["rows"]} >= set(FAULTS)
    assert re.search(r"^faults:", (ROOT / "Makefile").read_text(), flags=re.M)
