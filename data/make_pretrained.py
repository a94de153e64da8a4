"""Train the base classifiers of data/pretraining.yaml and write each as a starter, with a card.

    python data/make_pretrained.py [--variant reduced] [--only tin32-vit-clean ...] [--device cuda]

Needs the data set under SMOOTHKIT_DATA. A checkpoint an epoch is kept in runs/pretraining, where an interrupted run goes
on. The reduced variant took 19 to 35 minutes a model on one core beside other work; cards say.
"""

import argparse
import sys
from pathlib import Path

from smoothbook.tables.build import build, check_row
from smoothbook.tables.make import save_starter, train_row
from smoothbook.tables.settings import Row, RowError, load_rows
from smoothkit import data
from smoothkit.sampling.progress import format_seconds, say

HERE = Path(__file__).parent


def make(row: Row, device: str | None) -> None:
    images = data.load(row.data, split="train")
    say(f"{row.name}: {row.epochs} epochs of {len(images):,} images")
    out = HERE.parent / "runs" / "pretraining" / f"{row.name}-{row.training_digest()}"
    fitted = train_row(row, images, device=device, out=out)
    if fitted.interrupted:
        sys.exit(f"{row.name}: interrupted; the same command goes on")
    stated = save_starter(row, fitted, images, HERE / "starters" / row.name)["validation_accuracy"]
    say(f"{row.name}: {stated['clean']:.3f} on clean validation images, {format_seconds(fitted.seconds)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--device")
    options = parser.parse_args()
    try:
        rows = load_rows(HERE / "pretraining.yaml", options.variant, check=check_row)
    except RowError as error:
        sys.exit(str(error))
    for row in rows:
        build(row)  # a mistake shows before anything is trained
    for row in rows:
        if not options.only or row.name in options.only:
            make(row, options.device)


if __name__ == "__main__":
    main()
