"""Train the base classifiers of data/pretraining.yaml and write each as a starter, with a card.

    python data/make_pretrained.py [--variant reduced] [--only tin32-vit-clean ...] [--device cuda]

Needs the data set under SMOOTHKIT_DATA. A checkpoint an epoch is kept in runs/pretraining, where an interrupted run goes
on. The reduced variant takes 12 to 20 minutes a model on one core.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch

from smoothkit import data
from smoothkit.models import save_local
from smoothkit.progress import format_seconds, say
from smoothkit.rows import Row, RowError, build, load_rows, train_row
from smoothkit.training import Fitted

HERE = Path(__file__).parent
SETTINGS, STARTERS, BUILD = HERE / "pretraining.yaml", HERE / "starters", HERE.parent / "runs" / "pretraining"


def card(row: Row, variant: str | None, fitted: Fitted, images: data.Images, weights: Path) -> dict:
    """What a user of the starter wants to know."""
    last = fitted.rows[-1]
    return {
        "name": row.name,
        "architecture": row.base.partition(":")[2],
        "model_args": row.model_args,
        "parameters": fitted.trained.total,
        "trained_on": f"{images.name}, {len(images):,} images",
        "content_digest": digest(images),
        "schedule": row.schedule,
        "variant": variant or "full",
        "epochs": row.epochs,
        "seed": row.seed,
        "seconds": round(fitted.seconds),
        "threads": torch.get_num_threads(),
        "maker": "data/make_pretrained.py",
        "validation_accuracy_clean": round(last["validation_clean_accuracy"], 4),
        "validation_accuracy_under_its_own_noise": round(last["validation_accuracy"], 4),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "license": "MIT",
    }


def digest(images: data.Images, sample: int = 200) -> str:
    """Of the contents of every (N / sample)-th image."""
    every = max(1, len(images) // sample)
    text = "".join(images.digest(i) for i in range(0, len(images), every))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def make(row: Row, variant: str | None, device: str | None) -> None:
    images = data.load(row.data, split="train")
    say(f"{row.name}: {row.epochs} epochs of {len(images):,} images")
    out = BUILD / f"{row.name}-{row.training_digest()}"
    fitted = train_row(row, images, device=device, out=out)
    if fitted.interrupted:
        sys.exit(f"{row.name}: interrupted; the same command goes on")
    folder = STARTERS / row.name
    model = fitted.model
    model.class_names = tuple(images.class_names)
    save_local(model, folder, architecture=row.base.partition(":")[2], model_args=row.model_args)
    stated = card(row, variant, fitted, images, folder / "model.safetensors")
    (folder / "card.json").write_text(json.dumps(stated, indent=2) + "\n")
    say(f"{row.name}: {stated['validation_accuracy_clean']:.3f} clean, {format_seconds(fitted.seconds)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--device")
    options = parser.parse_args()
    try:
        rows = load_rows(SETTINGS, options.variant)
    except RowError as error:
        sys.exit(str(error))
    for row in rows:
        build(row)  # a mistake shows before anything is trained
    for row in rows:
        if not options.only or row.name in options.only:
            make(row, options.variant, options.device)


if __name__ == "__main__":
    main()
