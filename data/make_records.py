"""Rebuild the committed vote records: `make records`.

Each is sampled into runs/records/NAME, where an interrupted run goes on, and kept in data/records/NAME
as one part. Existing records are compared with the new counts first: equal ones stay as they are.
"""

import argparse
import shutil
from pathlib import Path

from smoothkit import Smoothed, data, models
from smoothkit.records import compact, open_record

HERE = Path(__file__).parent
BUILD = HERE.parent / "runs" / "records"

# name -> starter, sigma, n; all on the 360 held-out digits
RECORDS = {
    "digits-vit-0.12-sigma-0.12": ("digits-vit-0.12", 0.12, 10_000),
    "digits-vit-0.25-sigma-0.25": ("digits-vit-0.25", 0.25, 10_000),
    "digits-vit-0.50-sigma-0.50": ("digits-vit-0.50", 0.50, 10_000),
    "digits-vit-clean-sigma-0.25": ("digits-vit-clean", 0.25, 1_000),
}


def rebuild(name: str) -> None:
    starter, sigma, n = RECORDS[name]
    # not compiled: a compiled network may give another last bit, and these counts are meant to come again
    smoothed = Smoothed(models.load(f"starter:{starter}"), sigma, compile=False)
    record = smoothed.sample(data.load("digits", split="test"), n0=100, n=n, alpha=0.001, seed=0, out=BUILD / name)
    kept = HERE / "records" / name
    if kept.exists():
        if _equal(name, record, open_record(kept)):
            return
        shutil.rmtree(kept)
    compact(record, kept)


def _equal(name: str, new, old) -> bool:
    """Whether the counts are those kept before; says how many are."""
    if new.identity.differences(old.identity):
        print(f"{name}: the settings changed; counts are not compared")
        return False
    key = ["image_id", "purpose", "start"]
    both = new.rows().merge(old.rows(), on=key, suffixes=("", "_old"))
    same = int((both["counts"] == both["counts_old"]).sum())
    print(f"{name}: {same} of {len(old.rows())} blocks equal those kept before")
    return same == len(old.rows()) == len(new.rows())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=RECORDS, action="append")
    for name in parser.parse_args().only or RECORDS:
        rebuild(name)


if __name__ == "__main__":
    main()
