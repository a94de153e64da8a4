"""Train and certify the rows of a table that have no record yet.

    python data/make_rows.py noise-training [--variant reduced] [--only gaussian-0.25 ...] [--again] [--list] [--device cuda]

Settings come from data/rows/TABLE.yaml; votes and card go to data/records/rows/TABLE/ROW (TABLE-VARIANT for a variant).
Trainings and votes under way are kept in runs/rows, where an interrupted run goes on. Seeded: the same versions on the same
kind of processor give the same rows. A row with `keep: starter:NAME` writes that starter.
"""

import argparse
import sys
from pathlib import Path

from smoothbook import tables
from smoothbook.tables.make import make_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=sorted(p.stem for p in (Path(__file__).parent / "rows").glob("*.yaml")))
    parser.add_argument("--only", nargs="+", metavar="ROW")
    parser.add_argument("--again", action="store_true", help="also rows whose settings changed, or all of --only")
    parser.add_argument("--variant", help="settings of the table that go over all others, as reduced")
    parser.add_argument("--device", help="where to train, as cuda; certifying finds its own")
    parser.add_argument("--list", action="store_true", help="say which rows there are, and make none")
    options = parser.parse_args()
    name = f"{options.table}:{options.variant}" if options.variant else options.table
    try:
        if options.list:
            for row in tables.open(name).values():
                print(f"{row.state:8} {row.row.name}")
        else:
            make_table(name, only=options.only, again=options.again, device=options.device)
    except tables.RowError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
