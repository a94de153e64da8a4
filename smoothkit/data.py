"""Images on [0, 1] with labels, ids and the grid their values lie on.

`load("digits")` needs nothing; the other sources are looked for under the folder named by the
environment variable SMOOTHKIT_DATA, or under the path given with the name (`folder:PATH`,
`parquet:PATH`). Images are read when asked for, so a data set may be larger than memory.
"""

import dataclasses
import difflib
import functools
import hashlib
import io
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smoothkit.kernels.philox import DIGEST_BITS, IMAGE_ID_BITS, OFF_GRID, content_digest, image_id, off_grid
from smoothkit.records.format import parse_json

SOURCES = ("digits", "cifar10", "tiny-imagenet-32", "imagenet", "folder:PATH", "parquet:PATH")
UNLABELLED = -1
LARGEST = 20_000  # pixels of a side
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def data_dir() -> Path:
    """The folder `data/` of the workbook, with starter models and committed records."""
    folder = Path(__file__).resolve().parent.parent / "data"
    if not folder.is_dir():
        raise DataMissing(
            "the workbook's data folder is not beside the package; install from a clone with pip install -e ."
        )
    return folder


class DataMissing(FileNotFoundError):
    """A data set is not at hand; the message says how to get it."""


@dataclasses.dataclass(frozen=True)
class Images:
    """A list of images of one size, read when indexed.

    `images[i]` is a float32 tensor [C, H, W] on [0, 1]. `index` counts within the whole split, so that
    "every 20th test image" keeps the numbers papers print. `grid` is the number of steps from 0 to 1
    that all values are multiples of (255 for 8-bit images), or None when nothing is known.
    """

    dataset: str
    split: str
    subset: str
    index: np.ndarray  # int64 [N], position in the whole split
    keys: tuple[str, ...]
    labels: np.ndarray  # int64 [N], UNLABELLED where unknown
    class_names: tuple[str, ...]
    grid: int | None
    read: Callable[[int], Tensor] = dataclasses.field(repr=False, compare=False)
    ids: tuple[int, ...] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> Tensor:
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        image = self.read(int(self.index[i]))
        check_images(image[None], name=f"image {self.keys[i]!r} of {self.dataset}")
        return image

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    @property
    def name(self) -> str:
        return f"{self.dataset}:{self.split}:{self.subset}"

    def batch(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Images start..stop-1 as one float32 tensor [N, C, H, W]."""
        return torch.stack([self[i] for i in range(*slice(start, stop).indices(len(self)))])

    def class_name(self, c: int) -> str:
        return self.class_names[c] if 0 <= c < len(self.class_names) else str(c)

    def digest(self, i: int, bits: int = DIGEST_BITS) -> str:
        return content_digest(self[i], bits)

    def take(self, rule: str) -> "Images":
        """A subset by a stated rule: `all`, `first:100`, `every:20` (0, 20, 40, ...), `range:500:1000`.

        `classes:6-9` takes the images of classes 6 to 9 and numbers these anew from 0; a comma joins rules, each of
        what the one before left, as `classes:6-9,every:2`.
        """
        images = self
        for part in rule.split(","):
            images = images._of_classes(part) if part.startswith("classes:") else images._take(part)
        return images

    def at(self, positions: np.ndarray, rule: str) -> "Images":
        """The images at these positions, whatever chose them; `rule` says what did, for records."""
        chosen = np.asarray(positions)
        subset = rule if self.subset == "all" else f"{self.subset},{rule}"
        return dataclasses.replace(
            self,
            subset=subset,
            index=self.index[chosen],
            keys=tuple(self.keys[i] for i in chosen),
            labels=self.labels[chosen],
            ids=tuple(self.ids[i] for i in chosen),
        )

    def _of_classes(self, rule: str) -> "Images":
        first, last = class_range(rule, len(self.class_names) or int(self.labels.max()) + 1)
        chosen = np.flatnonzero((self.labels >= first) & (self.labels <= last))
        if not len(chosen):
            raise ValueError(f"{self.name} has no image of the classes in {rule!r}")
        part = self.at(chosen, rule)
        return dataclasses.replace(part, labels=part.labels - first, class_names=self.class_names[first : last + 1])

    def _take(self, rule: str) -> "Images":
        return self.at(subset_indices(rule, len(self)), rule)


def class_range(rule: str, classes: int) -> tuple[int, int]:
    """First and last class of a rule `classes:6-9`."""
    found = re.fullmatch(r"classes:(\d+)-(\d+)", rule)
    if found is None or not int(found[1]) <= int(found[2]) < classes:
        raise ValueError(
            f"subset rule {rule!r} must name two classes within 0..{classes - 1}, as classes:0-{classes - 1}"
        )
    return int(found[1]), int(found[2])


def subset_indices(rule: str, n: int) -> np.ndarray:
    """The positions a subset rule chooses out of n."""
    kind, *numbers = rule.split(":")
    remedy = "use all, first:100, every:20, range:500:1000 or classes:6-9"
    if (kind, len(numbers)) not in {("all", 0), ("first", 1), ("every", 1), ("range", 2)}:
        raise ValueError(f"unknown subset rule {rule!r}; {remedy}")
    if not all(re.fullmatch(r"\d+", x) for x in numbers):
        raise ValueError(f"subset rule {rule!r} needs whole numbers; {remedy}")
    values = [int(x) for x in numbers]
    if kind in {"first", "every"} and values[0] < 1:
        raise ValueError(f"subset rule {rule!r} needs a number of at least 1; {remedy}")
    everything = np.arange(n)
    chosen = {
        "all": lambda: everything,
        "first": lambda: everything[: values[0]],
        "every": lambda: everything[:: values[0]],
        "range": lambda: everything[values[0] : values[1]],
    }[kind]()
    if len(chosen) == 0:
        raise ValueError(f"subset rule {rule!r} chooses none of {n} images; {remedy}")
    return chosen


def check_images(images: Tensor, *, name: str = "images", check_range: bool = True) -> None:
    """Refuse anything but float images [N, C, H, W] on [0, 1].

    Raises
    ------
    ValueError
        Naming what was found and what would do. `check_range=False` admits values outside [0, 1],
        for points around a checked image.
    """
    if not isinstance(images, Tensor):
        raise ValueError(f"{name} must be a torch tensor, got {type(images).__name__}; use torch.from_numpy")
    if images.ndim != 4:
        raise ValueError(
            f"{name} must have shape [N, C, H, W], got {tuple(images.shape)}"
            + ("; add the batch axis with images[None]" if images.ndim == 3 else "")
        )
    if not images.is_floating_point():
        remedy = "; divide by 255" if images.numel() and int(images.max()) > 1 else "; convert with .float()"
        raise ValueError(f"{name} must be floats on [0, 1], got {images.dtype}{remedy}")
    if images.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(images.shape)}")
    if bool(images.isnan().any()):
        raise ValueError(f"{name} must not contain NaN; {int(images.isnan().sum())} values are NaN")
    low, high = float(images.min()), float(images.max())
    if check_range and (low < 0 or high > 1):
        remedy = "divide by 255" if low >= 0 and high > 2 else "undo the normalisation; models normalise inside"
        raise ValueError(f"{name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}; {remedy}")


def load(name: str, *, split: str = "test", subset: str = "all", size: int | None = None) -> Images:
    """Open a data set.

    Parameters
    ----------
    name : str
        `digits`, `cifar10`, `tiny-imagenet-32`, `imagenet`, `folder:PATH` or `parquet:PATH`.
    split : str
        `test`, `train`, and `validation` for digits. Ignored for `folder:` and `parquet:`.
    subset : str
        A rule as in `Images.take`.
    size : int, optional
        For folders, parquet files and ImageNet: the shorter side is resized to size * 8/7 and the
        centre size x size is cut out, in 8-bit arithmetic. Digits and CIFAR-10 keep their size.

    Raises
    ------
    ValueError
        For an unknown name, split or rule.
    DataMissing
        If the data is not at hand, with the way to get it.
    """
    kind, _, path = name.partition(":")
    if kind == "folder" and path:
        images = _folder(Path(path).expanduser(), dataset=name, split="all", size=size)
    elif kind == "parquet" and path:
        images = _parquet(_parquet_files(Path(path).expanduser()), dataset=name, split="all", size=size)
    elif name in _NAMED:
        images = _NAMED[name](split, size)
    else:
        near = difflib.get_close_matches(name, [*_NAMED, "folder:", "parquet:"], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of " + ", ".join(SOURCES)
        raise ValueError(f"unknown data set {name!r}; {hint}")
    return images.take(subset) if subset != "all" else images


def from_arrays(
    images: Tensor,
    labels: np.ndarray | None = None,
    *,
    class_names: tuple[str, ...] = (),
    grid: int | None = None,
    name: str = "array",
) -> Images:
    """Wrap a tensor [N, C, H, W] on [0, 1]. Ids are digests of the contents.

    `grid` says on how many steps from 0 to 1 all values lie, 255 for 8-bit images (checked). If it is not given, 255 or 256
    is taken where all values lie on it; else noise is `float`.

    Raises
    ------
    ValueError
        Also for equal images with different labels.
    """
    check_images(images)
    images = images.detach().cpu().float()
    if grid is None:
        grid = next((g for g in (255, 256) if off_grid(images, g) <= OFF_GRID), None)
    elif off_grid(images, grid) > OFF_GRID:
        raise ValueError(
            f"grid={grid} given, but values lie off it by up to {off_grid(images, grid):.3f} steps; use grid=None"
        )
    labels = np.full(len(images), UNLABELLED) if labels is None else np.asarray(labels, dtype=np.int64)
    if labels.shape != (len(images),):
        raise ValueError(f"labels must have shape ({len(images)},), got {labels.shape}")
    digests = tuple(content_digest(x, IMAGE_ID_BITS) for x in images)
    _refuse_contradictions(digests, labels)
    return _make(
        name, "all", digests, labels, class_names, grid, images.__getitem__, ids=tuple(int(d, 16) for d in digests)
    )


def _refuse_contradictions(digests: tuple[str, ...], labels: np.ndarray) -> None:
    """Equal images are one image to a record; with two labels neither would be right."""
    seen: dict[str, int] = {}
    for i, digest in enumerate(digests):
        first = seen.setdefault(digest, i)
        if labels[first] != labels[i]:
            raise ValueError(
                f"images {first} and {i} are equal and have the labels {labels[first]} and {labels[i]}; leave one of them out"
            )


def load_image(
    path: str | os.PathLike, *, size: int | None = None, channels: int = 3, label: int = UNLABELLED
) -> Images:
    """One picture from a file, as `Images` of length 1 on the 8-bit grid.

    `size` resizes and crops to a square; `channels` is 3 for colour or 1 for grey.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels}")
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataMissing(f"no picture at {path}")
    tensor = _decode(path.read_bytes(), size=size, mode="L" if channels == 1 else "RGB", name=str(path))
    return from_arrays(tensor[None], np.array([label]), grid=255, name="picture")


def _make(dataset, split, keys, labels, class_names, grid, read, ids=None) -> Images:
    labels = np.asarray(labels, dtype=np.int64)
    if class_names:
        bad = np.flatnonzero((labels != UNLABELLED) & ((labels < 0) | (labels >= len(class_names))))
        if len(bad):
            raise ValueError(
                f"{dataset}: label {labels[bad[0]]} of image {keys[bad[0]]!r} lies outside the {len(class_names)} "
                f"classes ({len(bad)} such images)"
            )
    return Images(
        dataset=dataset,
        split=split,
        subset="all",
        index=np.arange(len(keys)),
        keys=tuple(keys),
        labels=labels,
        class_names=tuple(class_names),
        grid=grid,
        read=read,
        ids=ids or tuple(image_id(f"{dataset}:{split}:{key}") for key in keys),
    )


# --- named data sets -------------------------------------------------------------------------------


def _digits(split: str, size: int | None) -> Images:
    """The 1,797 handwritten digits of scikit-learn, 8x8, values k/16.

    They come in the order they were written, so neither the tail nor every fifth image is a fair
    sample. The split goes by a hash: images sorted by the BLAKE2b digest of `digits:<index>`; the first
    360 are the test split, the next 180 validation, the other 1,257 training.
    """
    from sklearn.datasets import load_digits

    _refuse_size("digits", size, 8)
    bunch = load_digits()
    order = sorted(range(len(bunch.target)), key=lambda i: hashlib.blake2b(f"digits:{i}".encode()).digest())
    parts = {"test": order[:360], "validation": order[360:540], "train": order[540:]}
    chosen = sorted(_choose("digits", split, parts))
    images = torch.from_numpy((bunch.images[chosen] / 16).astype(np.float32))[:, None]  # [N, 1, 8, 8]
    keys = [str(i) for i in chosen]
    names = tuple(str(c) for c in range(10))
    return _make("digits", split, keys, bunch.target[chosen], names, 256, images.__getitem__)


def _cifar10(split: str, size: int | None) -> Images:
    _refuse_size("cifar10", size, 32)
    _choose("cifar10", split, {"train": 0, "test": 0})
    root = _data_root("cifar10")
    for folder in (root / "cifar10", root / "cifar10" / "plain_text", root / "cifar10-jpeg"):
        files = sorted(folder.glob(f"{split}*.parquet"))
        if files:
            name = "cifar10-jpeg75" if folder.name == "cifar10-jpeg" else "cifar10"  # not the same pixels
            return _parquet(files, dataset=name, split=split, size=None, class_names=CIFAR10_CLASSES)
    for folder in (root, root / "cifar10"):
        if (folder / "cifar-10-batches-py").is_dir():
            return _cifar10_torchvision(folder, split)
    raise DataMissing(
        f"cifar10 is not under {root}; put the parquet files of uoft-cs/cifar10 into {root / 'cifar10'}, or call "
        f"smoothkit.data.download_cifar10() (170 MB)"
    )


def _cifar10_torchvision(folder: Path, split: str, download: bool = False) -> Images:
    from torchvision.datasets import CIFAR10

    source = CIFAR10(str(folder), train=split == "train", download=download)

    def read(i: int) -> Tensor:
        return _to_tensor(Image.fromarray(source.data[i]))

    return _make(
        "cifar10", split, [str(i) for i in range(len(source.data))], source.targets, CIFAR10_CLASSES, 255, read
    )


def download_cifar10(root: str | os.PathLike | None = None) -> Path:
    """Fetch CIFAR-10 through torchvision into SMOOTHKIT_DATA (or `root`); needs the network."""
    folder = Path(root).expanduser() if root else _data_root("cifar10")
    folder.mkdir(parents=True, exist_ok=True)
    _cifar10_torchvision(folder, "test", download=True)
    return folder


def _tiny_imagenet_32(split: str, size: int | None) -> Images:
    """Tiny ImageNet at 32x32, 202 classes: 500 training images each, and 50 of its validation part as `test`."""
    _refuse_size("tiny-imagenet-32", size, 32)
    pattern = _choose("tiny-imagenet-32", split, {"train": "train*.parquet", "test": "val*.parquet"})
    folder = _data_root("tiny-imagenet-32") / "tiny-imagenet-32"
    files = sorted(folder.glob(pattern))
    if not files:
        raise DataMissing(
            f"tiny-imagenet-32 is not in {folder}; python data/make_datasets.py tiny-imagenet-32 makes it"
        )
    names = folder / "classes.tsv"
    try:
        lines = names.read_text(encoding="utf-8").splitlines()[1:] if names.is_file() else []
        classes = tuple(line.split("\t")[2] for line in lines)
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{names} cannot be read ({error}); python data/make_datasets.py tiny-imagenet-32 makes it again"
        ) from None
    return _parquet(files, dataset="tiny-imagenet-32", split=split, size=None, class_names=classes)


def _imagenet(split: str, size: int | None) -> Images:
    folders = _choose("imagenet", split, {"test": ("val", "validation"), "train": ("train",)})
    root = _data_root("imagenet") / "imagenet"
    for name in folders:
        if (root / name).is_dir():
            return _folder(root / name, dataset="imagenet", split=split, size=size or 224)
        files = sorted(root.glob(f"**/{name}*.parquet"))
        if files:
            return _parquet(files, dataset="imagenet", split=split, size=size or 224)
    raise DataMissing(
        f"imagenet is not under {root}; put the validation images into {root / 'val'}/<class>/*.JPEG, "
        f"or the parquet files of ILSVRC/imagenet-1k into {root}"
    )


_NAMED = {"digits": _digits, "cifar10": _cifar10, "tiny-imagenet-32": _tiny_imagenet_32, "imagenet": _imagenet}


def _choose(dataset: str, split: str, parts: dict):
    if split not in parts:
        raise ValueError(f"{dataset} has no split {split!r}; choose one of {', '.join(parts)}")
    return parts[split]


def _refuse_size(dataset: str, size: int | None, own: int) -> None:
    if size not in (None, own):
        raise ValueError(
            f"size={size} given, but {dataset} images are {own}x{own}; models resize inside, after the noise"
        )


def _data_root(dataset: str) -> Path:
    value = os.environ.get("SMOOTHKIT_DATA")
    if not value:
        raise DataMissing(
            f"{dataset} needs the environment variable SMOOTHKIT_DATA to name the folder where data sets live"
        )
    root = Path(value).expanduser()
    if not root.is_dir():
        raise DataMissing(f"SMOOTHKIT_DATA names {root}, which is not a folder")
    return root


# --- folders and parquet files ---------------------------------------------------------------------


def _folder(root: Path, *, dataset: str, split: str, size: int | None) -> Images:
    """Sub-folders are classes, in sorted order; a flat folder of pictures has no labels."""
    if not root.is_dir():
        raise DataMissing(f"{dataset}: no folder at {root}")
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataMissing(f"{dataset}: no pictures in {root} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    keys = [p.relative_to(root).as_posix() for p in files]
    number = {name: i for i, name in enumerate(classes)}
    labels = [number.get(key.split("/")[0], UNLABELLED) if "/" in key else UNLABELLED for key in keys]

    def read(i: int) -> Tensor:
        return _decode(files[i].read_bytes(), size=size, mode="RGB", name=str(files[i]))

    return _make(dataset, split, keys, labels, classes, 255, _same_size(read, dataset))


def _parquet_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(f.is_file() for f in files):
        raise DataMissing(f"no parquet file at {path}")
    return files


def _parquet(
    files: list[Path], *, dataset: str, split: str, size: int | None, class_names: tuple[str, ...] = ()
) -> Images:
    """Rows with an encoded image (`img` or `image`: struct with `bytes`) and an integer `label`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pa.concat_tables([pq.read_table(f) for f in files], promote_options="default")
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{dataset}: {files[0]} cannot be read as parquet ({error})") from None
    column = next((c for c in ("img", "image") if c in table.column_names), None)
    if column is None or not pa.types.is_struct(table[column].type):
        raise ValueError(
            f"{dataset}: needs a column img or image with encoded bytes, as in uoft-cs/cifar10; "
            f"found {', '.join(table.column_names)}"
        )
    encoded = table[column].combine_chunks().field("bytes")
    labels = table["label"].to_numpy() if "label" in table.column_names else np.full(len(table), UNLABELLED)
    class_names = class_names or _hub_class_names((table.schema.metadata or {}).get(b"huggingface", b"{}"), files[0])

    def read(i: int) -> Tensor:
        return _decode(encoded[i].as_py(), size=size, mode="RGB", name=f"{dataset} row {i}")

    return _make(
        dataset, split, [str(i) for i in range(len(table))], labels, class_names, 255, _same_size(read, dataset)
    )


def _hub_class_names(metadata: bytes, file: Path) -> tuple[str, ...]:
    """Class names from the metadata that the hub writes into parquet files, if there."""
    found = parse_json(metadata, f"the hub's metadata in {file}", ValueError)
    for name in ("info", "features", "label", "names"):
        found = found.get(name) if isinstance(found, dict) else None
    return tuple(str(name) for name in found) if isinstance(found, list) else ()


def _same_size(read: Callable[[int], Tensor], dataset: str) -> Callable[[int], Tensor]:
    """All images of a data set have the shape of its first one."""

    @functools.cache
    def shape() -> torch.Size:
        return read(0).shape

    def checked(i: int) -> Tensor:
        image = read(i)
        if image.shape != shape():
            raise ValueError(
                f"{dataset}: image {i} has shape {tuple(image.shape)}, the first one {tuple(shape())}; give size=, as in size=224"
            )
        return image

    return checked


def _decode(encoded: bytes, *, size: int | None, mode: str, name: str) -> Tensor:
    if size is not None and not 1 <= size <= LARGEST:
        raise ValueError(f"size must lie in 1..{LARGEST:,} pixels, got {size}")
    try:
        picture = Image.open(io.BytesIO(encoded)).convert(mode)
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is not a picture that Pillow can read ({error})") from None
    return _to_tensor(picture if size is None else _resize_and_crop(picture, size))


def _resize_and_crop(picture: Image.Image, size: int) -> Image.Image:
    """Shorter side to size * 8/7 (256 for 224; not below the wanted size), then the centre."""
    scale = round(size * 8 / 7) / min(picture.size) if size >= 64 else size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def _to_tensor(picture: Image.Image) -> Tensor:
    array = np.asarray(picture, dtype=np.float32) / np.float32(255)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())
