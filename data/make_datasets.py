"""Rebuild the data sets of the CIFAR-10 rows from their public sources, and compare what is at hand with data/datasets.json.

    python data/make_datasets.py cifar10-jpeg75 [--source FOLDER_OR_ZIP]
    python data/make_datasets.py tiny-imagenet-32 [--source ZIP]
    python data/make_datasets.py --check

Files go to the folder named by SMOOTHKIT_DATA; none that is there is overwritten. Without --source the source is downloaded.

cifar10-jpeg75      CIFAR-10 as JPEG, quality 75, chroma 4:2:0. Source: the parquet files of uoft-cs/cifar10, encoded here; or a
                    folder or zip with train/CLASS/0000.jpg ... and test/CLASS/..., whose JPEGs are taken as they are.
tiny-imagenet-32    Tiny ImageNet, 64x64 JPEG, by a 2x2 box filter to 32x32, WebP, quality 88. Source: a zip in the layout of
                    tiny-imagenet-200.zip. That archive has 200 classes. The copy that the records were made with has 202, gorilla
                    and groom beside them, with the names, labels and order of the archive at TINY_IMAGENET below, which is
                    the default. With only the 200, every class keeps its number and two stay empty.

Rows are in the order of `numpy.random.default_rng(0).permutation` over the sorted files (for the validation part, over the
lines of its annotations): found from the names in the copy, and true of all its rows. What could not be tried, for want of
the sources: whether the pixels come out the same, for which the encoders of JPEG and WebP, how the filter rounds, and for CIFAR-10
what was encoded, must agree. `--check` says it: data/datasets.json has digests of the contents of each file, whatever its order, of
each class, and of the rows in order. A record names images by row and keeps their digests, so other images are refused.
"""

import argparse
import functools
import hashlib
import io
import json
import os
import re
import sys
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from smoothkit import data
from smoothkit.records import read_json
from smoothkit.sampling.progress import Progress, say

DIGESTS = Path(__file__).parent / "datasets.json"
CIFAR10 = "https://huggingface.co/datasets/uoft-cs/cifar10/resolve/main/plain_text/{}-00000-of-00001.parquet"
TINY_IMAGENET = "https://codeload.github.com/rangeetpan/IMagenet/zip/6125d8a1069df02232eb57678fd46c700411dd45"
TINY_IMAGENET_200 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"  # the original, for --source
FILES = {
    "cifar10-jpeg75": ("cifar10-jpeg/train.parquet", "cifar10-jpeg/test.parquet"),
    "tiny-imagenet-32": (
        "tiny-imagenet-32/train-classes-000-100.parquet",
        "tiny-imagenet-32/train-classes-101-201.parquet",
        "tiny-imagenet-32/val.parquet",
    ),
}
HALF = 101  # classes in the first training file of Tiny ImageNet
Picture = tuple[str, int, bytes]  # path, label, encoded


class SourceError(ValueError):
    """A source that is not what it should be; the message says what was looked for."""


# --- CIFAR-10 --------------------------------------------------------------------------------------


def make_cifar10(source: Path, out: Path) -> None:
    """Write train.parquet and test.parquet from a folder with parquet files, or a folder or zip of JPEGs by class."""
    for split in ("train", "test"):
        parquet = sorted(source.glob(f"{split}*.parquet")) if source.is_dir() else []
        pictures = list(_encoded(parquet) if parquet else _jpegs(source, split))
        if not pictures:
            raise SourceError(f"{source} has neither {split}*.parquet nor {split}/CLASS/0000.jpg")
        write(out / f"{split}.parquet", "img", shuffled(sorted(pictures)))


def _encoded(files: list[Path]) -> Iterator[Picture]:
    """The k-th image of a class in the source is CLASS/000k.jpg."""
    seen = [0] * len(data.CIFAR10_CLASSES)
    for file in files:
        table = pq.read_table(file)
        if not {"img", "label"} <= set(table.column_names):
            raise SourceError(f"{file} must have the columns img and label, found {', '.join(table.column_names)}")
        encoded, labels = table["img"].combine_chunks().field("bytes"), table["label"].to_pylist()
        for i, label in enumerate(labels):
            yield f"{data.CIFAR10_CLASSES[label]}/{seen[label]:04d}.jpg", label, jpeg75(encoded[i].as_py())
            seen[label] += 1


def jpeg75(encoded: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(encoded)).convert("RGB").save(buffer, "JPEG", quality=75, subsampling="4:2:0")
    return buffer.getvalue()


def _jpegs(source: Path, split: str) -> Iterator[Picture]:
    for name, read in files_of(source):
        found = re.search(rf"(?:^|/){split}/([a-z]+)/(\d+\.jpe?g)$", name)
        if found and found[1] in data.CIFAR10_CLASSES:
            yield f"{found[1]}/{found[2]}", data.CIFAR10_CLASSES.index(found[1]), read()


# --- Tiny ImageNet ---------------------------------------------------------------------------------


def make_tiny_imagenet(source: Path, out: Path, classes: list[str]) -> None:
    """Write the three parquet files and classes.tsv from an archive; `classes` are "WNID WORDS" in the order of the labels."""
    label_of = {line.split()[0]: label for label, line in enumerate(classes)}
    found = dict(files_of(source))
    train: tuple[list[Picture], list[Picture]] = ([], [])
    images, annotations = {}, None
    for name, read in found.items():
        parts = name.split("/")
        if re.search(r"(?:^|/)train/(n\d+)/images/\1_\d+\.JPEG$", name):
            label = _label(parts[-3], label_of)
            train[label >= HALF].append((parts[-1], label, read))
        elif re.search(r"(?:^|/)val/images/val_\d+\.JPEG$", name):
            images[parts[-1]] = read
        elif name.endswith("val/val_annotations.txt"):
            annotations = read().decode().splitlines()
    if annotations is None or not images or not any(train):
        raise SourceError(
            f"{source} is not laid out as tiny-imagenet-200.zip: train/WNID/images/WNID_0.JPEG, val/images/val_0.JPEG, "
            f"val/val_annotations.txt"
        )
    empty = sorted(set(range(len(classes))) - {label for half in train for _, label, _ in half})
    if empty:
        named = ", ".join(f"{label} ({classes[label]})" for label in empty[:4])
        say(f"{len(empty)} of {len(classes)} classes are not in {source.name} and stay empty: {named}")
    for half, file in zip(train, FILES["tiny-imagenet-32"], strict=False):
        write(out / Path(file).name, "image", map(_shrunk, shuffled(sorted(half, key=lambda p: p[0]))))
    lines = [line.split("\t") for line in annotations if line]
    held = [(name, _label(wnid, label_of), images[name]) for name, wnid, *_ in lines]
    write(out / "val.parquet", "image", map(_shrunk, shuffled(held)))
    table = ["\t".join([str(label), *line.split(" ", 1)]) for label, line in enumerate(classes)]
    (out / "classes.tsv").write_text("\n".join(["label\twnid\twords", *table]) + "\n", encoding="utf-8")


def _label(wnid: str, label_of: dict[str, int]) -> int:
    if wnid not in label_of:
        raise SourceError(f"class {wnid} is none of the {len(label_of)} in {DIGESTS.name}")
    return label_of[wnid]


def _shrunk(picture: tuple) -> Picture:
    path, label, read = picture
    return path, label, webp32(read(), path)


def webp32(encoded: bytes, name: str = "image") -> bytes:
    picture = Image.open(io.BytesIO(encoded)).convert("RGB")
    if picture.size != (64, 64):
        raise SourceError(f"{name} is {picture.size[0]}x{picture.size[1]}; Tiny ImageNet's images are 64x64")
    buffer = io.BytesIO()
    picture.resize((32, 32), Image.Resampling.BOX).save(buffer, "WEBP", quality=88)
    return buffer.getvalue()


# --- files -----------------------------------------------------------------------------------------


def files_of(source: Path) -> Iterator[tuple[str, functools.partial]]:
    """(name, function that reads it) of all files in a folder or zip."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.is_file():
                yield path.relative_to(source).as_posix(), functools.partial(path.read_bytes)
    elif zipfile.is_zipfile(source):
        archive = zipfile.ZipFile(source)
        for name in sorted(archive.namelist()):
            yield name, functools.partial(archive.read, name)
    else:
        raise SourceError(f"{source} is neither a folder nor a zip")


def shuffled(pictures: list) -> list:
    return [pictures[i] for i in np.random.default_rng(0).permutation(len(pictures))]


def write(path: Path, column: str, pictures: Iterable[Picture]) -> None:
    paths, labels, encoded = zip(*pictures, strict=True)
    images = pa.array(
        [{"bytes": b, "path": p} for b, p in zip(encoded, paths, strict=True)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(pa.table({column: images, "label": pa.array(labels, pa.int64())}), path, compression="zstd")
    say(f"{path.parent.name}/{path.name}: {len(labels):,} images")


def download(url: str, path: Path) -> Path:
    """Fetch a file unless it is there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        say(f"downloading {url}")
        part = path.with_suffix(".part")
        with urllib.request.urlopen(url) as answer, part.open("wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
        part.rename(path)
    return path


def fetch(name: str, root: Path) -> Path:
    """The public source, downloaded into ROOT/sources, where no data set is looked for."""
    if name == "tiny-imagenet-32":
        return download(TINY_IMAGENET, root / "sources" / "tiny-imagenet.zip")
    for split in ("train", "test"):
        download(CIFAR10.format(split), root / "sources" / "cifar10" / f"{split}.parquet")
    return root / "sources" / "cifar10"


def make(name: str, root: Path, source: Path | None = None) -> Path:
    """Build a data set under a root; the folder appears when all of it is there."""
    folder = root / Path(FILES[name][0]).parent
    if folder.exists():
        raise SourceError(f"{folder} is there already; move it away, or try --check")
    source = source or fetch(name, root)
    new = folder.with_name(f".{folder.name}.new")
    new.mkdir(parents=True, exist_ok=True)
    if name == "cifar10-jpeg75":
        make_cifar10(source, new)
    else:
        make_tiny_imagenet(source, new, read_json(DIGESTS)[name]["classes"])
    new.rename(folder)
    return folder


# --- digests ---------------------------------------------------------------------------------------


def digests(path: Path, classes: int) -> dict:
    """Of the images in a parquet file as smoothkit reads them: whatever their order, in their order, and by class."""
    images = data.load(f"parquet:{path}")
    each = []
    with Progress(len(images), f"reading {path.parent.name}/{path.name}", show=len(images) > 1_000) as bar:
        for i in range(len(images)):
            each.append(images.digest(i, 56))
            bar.update(1)
    labels = images.labels.tolist()
    groups = [sorted(d for d, label in zip(each, labels, strict=True) if label == c) for c in range(classes)]
    return {
        "images": len(each),
        "contents": _sha256(sorted(each)),
        "rows": _sha256(f"{d} {label}" for d, label in zip(each, labels, strict=True)),
        "classes": " ".join(_sha256(group)[:12] if group else "-" for group in groups),
    }


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def compare(found: dict, known: dict) -> str:
    """A sentence on a file, "the same" where nothing differs."""
    if found["rows"] == known["rows"]:
        return "the same images in the same order"
    if found["contents"] == known["contents"]:
        return "the same images, in another order or with other labels: records name images by row, so make them again"
    pairs = zip(found["classes"].split(), known["classes"].split(), strict=True)
    wanted = [(a, b) for a, b in pairs if b != "-"]
    same = sum(a == b for a, b in wanted)
    return (
        f"not the same images: {found['images']:,} for {known['images']:,}, {same} of {len(wanted)} classes are equal, "
        f"{sum(a == '-' for a, _ in wanted)} are empty"
    )


def check(root: Path, names: Iterable[str] = FILES) -> bool:
    """Say for each file at hand whether it is the one known; True if none differs."""
    known, good, seen = read_json(DIGESTS), True, 0
    for name in names:
        for file in FILES[name]:
            if not (root / file).is_file():
                print(f"{name}: {file} is not at hand")
                continue
            wanted = known[name]["files"].get(file)
            if wanted is None:
                print(
                    f"{name}: {file}: no digests to compare with; --write-digests makes them from a copy that is right"
                )
                continue
            said = compare(digests(root / file, len(wanted["classes"].split())), wanted)
            print(f"{name}: {file}: {said}")
            good, seen = good and said.startswith("the same images in the same"), seen + 1
    if not seen:
        print(f"nothing to compare in {root}")
    return good


def write_digests(root: Path) -> None:
    """Add what data/datasets.json lacks from what is at hand, file by file; delete it to make all anew."""
    known = read_json(DIGESTS) if DIGESTS.is_file() else {}
    for name, files in FILES.items():
        part = known.setdefault(name, {"classes": list(data.CIFAR10_CLASSES)})
        if name == "tiny-imagenet-32":
            lines = (root / "tiny-imagenet-32" / "classes.tsv").read_text(encoding="utf-8").splitlines()[1:]
            part["classes"] = [line.split("\t", 1)[1].replace("\t", " ") for line in lines]
        for file in files:
            if file not in part.setdefault("files", {}):
                part["files"][file] = digests(root / file, len(part["classes"]))
                DIGESTS.write_text(json.dumps(known, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=[*FILES], help="the data set to make, or to check")
    parser.add_argument("--source", type=Path, help="a folder or zip in place of the download")
    parser.add_argument("--check", action="store_true", help="make nothing; compare what is there with known digests")
    parser.add_argument("--write-digests", action="store_true", help="add digests that are not known yet")
    options = parser.parse_args()
    if not os.environ.get("SMOOTHKIT_DATA"):
        sys.exit("SMOOTHKIT_DATA must name the folder where data sets live")
    root = Path(os.environ["SMOOTHKIT_DATA"]).expanduser()
    if options.write_digests:
        return write_digests(root)
    if not options.check:
        if options.name is None:
            parser.error(f"which? one of {', '.join(FILES)}, or --check")
        try:
            make(options.name, root, options.source)
        except (SourceError, OSError) as error:
            sys.exit(f"{options.name}: {error}")
    sys.exit(0 if check(root, [options.name] if options.name else FILES) else 1)


if __name__ == "__main__":
    main()
