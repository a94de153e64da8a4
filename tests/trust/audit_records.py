"""Audit every committed record: `make audits`. What is not at hand is counted apart, never as passed."""

import argparse
import collections
import time

from results import ROOT, keep

from smoothbook.tables import RowError, classifier_of
from smoothkit.reading import audit
from smoothkit.reading.audit import FAILED, NOT_CHECKED, PASSED


def kept_classifier(record):
    try:
        return classifier_of(record)
    except RowError:  # not stored: the audit says that it is not at hand
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redraw", type=int, default=2, help="images of each record whose votes are drawn again")
    options = parser.parse_args()
    begin, rows, names = time.perf_counter(), [], collections.Counter()
    for run in sorted((ROOT / "data" / "records").rglob("run.json")):
        found = audit(run.parent, base_classifier=kept_classifier(run.parent), redraw=options.redraw, seed=0)
        name = run.parent.relative_to(ROOT / "data" / "records").as_posix()
        left_out = {c.name: c.what for c in found.checks if c.verdict != PASSED}
        drawn = next((c.what for c in found.checks if c.name == "votes drawn again" and c.verdict == PASSED), None)
        rows.append({"record": name, "verdict": found.verdict, "not passed": left_out, "drawn again": drawn})
        names[found.verdict] += 1
        print(f"{name}: {found.verdict}", flush=True)
    verdicts = {verdict: names[verdict] for verdict in (PASSED, FAILED, NOT_CHECKED)}
    keep(
        "audits",
        begin,
        {
            "made_by": "make audits",
            "headline": f"{len(rows)} records: " + ", ".join(f"{k} {verdict}" for verdict, k in verdicts.items()),
            "records": len(rows),
            "verdicts": verdicts,
            "drawn_again": sum(row["drawn again"] is not None for row in rows),
            "redraw": options.redraw,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
