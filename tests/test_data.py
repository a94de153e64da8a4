"""Data sources, subsets, and the refusal of bad images."""

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from smoothkit import data
from smoothkit.data import DataMissing


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def write_parquet(path, column="img", sizes=((32, 32), (32, 32)), labels=(3, 7), metadata=None):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    table = pa.table({column: [{"bytes": png(a), "path": None} for a in arrays], "label": pa.array(labels, pa.int64())})
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return arrays


def test_digits_splits_are_fixed_and_disjoint():
    parts = {split: data.load("digits", split=split) for split in ("train", "validation", "test")}
    assert {s: len(p) for s, p in parts.items()} == {"train": 1257, "validation": 180, "test": 360}
    assert len(set().union(*(p.keys for p in parts.values()))) == 1797
    assert parts["test"].keys[:5] == ("4", "6", "10", "15", "16")  # written down: the split is part of every record
    assert np.bincount(parts["test"].labels).min() > 25
    image = parts["test"][0]
    assert image.shape == (1, 8, 8) and image.dtype == torch.float32
    assert parts["test"].grid == 256 and float((image * 256 - (image * 256).round()).abs().max()) == 0


def test_ids_are_hashes_of_dataset_split_and_key(digits):
    from smoothkit.kernels.philox import image_id

    assert digits.ids[0] == image_id("digits:test:4")
    assert len(set(digits.ids)) == 360
    assert digits.digest(0) == digits.digest(0) != digits.digest(1)


@pytest.mark.parametrize(
    ("rule", "index"),
    [("all", range(360)), ("first:3", [0, 1, 2]), ("every:100", [0, 100, 200, 300]), ("range:5:8", [5, 6, 7])],
)
def test_subset_rules(digits, rule, index):
    subset = digits.take(rule)
    assert subset.index.tolist() == list(index)
    assert all(torch.equal(subset[i], digits[j]) for i, j in enumerate(list(index)[:4]))
    assert subset.labels.tolist() == digits.labels[list(index)].tolist()
    assert subset.ids == tuple(digits.ids[i] for i in index)


@pytest.mark.parametrize("rule", ["every", "each:20", "first:0", "first:x", "range:9:9", "first:-1", ""])
def test_unknown_subset_rules(digits, rule):
    with pytest.raises(ValueError, match="use all, first:100, every:20, range:500:1000 or classes:6-9"):
        digits.take(rule)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("digit", "did you mean 'digits'"),
        ("cifar-10", "did you mean 'cifar10'"),
        ("xyzzy", "choose one of digits, cifar10"),
    ],
)
def test_unknown_names(name, match):
    with pytest.raises(ValueError, match=match):
        data.load(name)


def test_unknown_split():
    with pytest.raises(ValueError, match="no split 'dev'; choose one of test, validation, train"):
        data.load("digits", split="dev")


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8) + 200, "divide by 255"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), r"convert with .float\(\)"),
        (torch.zeros(3, 8, 8), r"add the batch axis with images\[None\]"),
        (torch.full((1, 1, 2, 2), 255.0), "divide by 255"),
        (torch.full((1, 1, 2, 2), -1.0), "undo the normalisation"),
        (torch.full((1, 1, 2, 2), float("nan")), "NaN"),
        (torch.zeros(0, 1, 2, 2), "must not be empty"),
        (np.zeros((1, 1, 2, 2)), "torch.from_numpy"),
    ],
)
def test_bad_images(images, match):
    with pytest.raises(ValueError, match=match):
        data.check_images(images)


def test_points_around_a_checked_image_may_leave_the_range():
    data.check_images(torch.full((1, 1, 2, 2), 1.5), check_range=False)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        data.check_images(torch.full((1, 1, 2, 2), 1.5))


def test_arrays(digits):
    images = data.from_arrays(digits.batch(0, 3), digits.labels[:3], grid=16)
    assert len(images) == 3 and torch.equal(images[1], digits[1])
    assert images.ids == tuple(int(digits.digest(i, 56), 16) for i in range(3))
    assert len(digits.digest(0)) == 32 and digits.digest(0)[:14] != digits.digest(0, 56)
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\)"):
        data.from_arrays(digits.batch(0, 3), [1, 2])
    with pytest.raises(ValueError, match="values lie off it"):
        data.from_arrays(digits.batch(0, 3), grid=15)
    with pytest.raises(ValueError, match=r"label 12 of image .* lies outside the 10 classes"):
        data.from_arrays(digits.batch(0, 1), [12], class_names=tuple("0123456789"))


def test_cifar10_from_parquet(tmp_path, monkeypatch):
    arrays = write_parquet(tmp_path / "cifar10" / "test-00000-of-00001.parquet")
    monkeypatch.setenv("SMOOTHKIT_DATA", str(tmp_path))
    images = data.load("cifar10")
    assert len(images) == 2 and images.class_name(7) == "horse" and images.grid == 255
    assert torch.equal(images[0], torch.from_numpy(arrays[0].transpose(2, 0, 1) / np.float32(255)))
    with pytest.raises(ValueError, match="models resize inside"):
        data.load("cifar10", size=224)


def test_cifar10_from_torchvision(tmp_path, monkeypatch):
    """The folder that torchvision's download leaves, with its integrity check pointed at our small files."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import calculate_md5

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (2, 3072), dtype=np.uint8)
    for name, content in {
        "test_batch": {"data": pixels, "labels": [1, 9]},
        "batches.meta": {"label_names": list(data.CIFAR10_CLASSES)},
    }.items():
        (folder / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(CIFAR10, "train_list", [])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", calculate_md5(folder / "test_batch")]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": calculate_md5(folder / "batches.meta")}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    monkeypatch.setenv("SMOOTHKIT_DATA", str(tmp_path))
    images = data.load("cifar10")
    assert images.labels.tolist() == [1, 9]
    assert torch.equal(images[1], torch.from_numpy(pixels[1].reshape(3, 32, 32) / np.float32(255)))


def test_missing_data_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("SMOOTHKIT_DATA", raising=False)
    with pytest.raises(DataMissing, match="SMOOTHKIT_DATA to name the folder"):
        data.load("cifar10")
    monkeypatch.setenv("SMOOTHKIT_DATA", str(tmp_path))
    with pytest.raises(DataMissing, match=r"uoft-cs/cifar10 into .* or call smoothkit.data.download_cifar10"):
        data.load("cifar10")
    with pytest.raises(DataMissing, match="ILSVRC/imagenet-1k"):
        data.load("imagenet")
    monkeypatch.setenv("SMOOTHKIT_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataMissing, match="not a folder"):
        data.load("cifar10")


def test_imagenet_folder_and_any_folder(tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    for name in ("n01440764/a.JPEG", "n01440764/b.JPEG", "n01443537/c.JPEG"):
        path = tmp_path / "imagenet" / "val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (240, 300, 3), dtype=np.uint8)).save(path)
    monkeypatch.setenv("SMOOTHKIT_DATA", str(tmp_path))
    images = data.load("imagenet")
    assert images[0].shape == (3, 224, 224) and images.labels.tolist() == [0, 0, 1]
    assert images.keys[2] == "n01443537/c.JPEG" and images.class_name(1) == "n01443537"
    folder = data.load(f"folder:{tmp_path / 'imagenet' / 'val'}", size=32, subset="every:2")
    assert folder.batch().shape == (2, 3, 32, 32) and folder.keys == ("n01440764/a.JPEG", "n01443537/c.JPEG")
    with pytest.raises(DataMissing, match="no folder"):
        data.load("folder:/nowhere/at/all")


def test_parquet_of_images(tmp_path):
    names = {"info": {"features": {"label": {"names": [f"class {i}" for i in range(10)]}}}}
    write_parquet(tmp_path / "a.parquet", column="image", metadata=names)
    images = data.load(f"parquet:{tmp_path / 'a.parquet'}")
    assert images.class_name(3) == "class 3" and images[1].shape == (3, 32, 32)
    write_parquet(tmp_path / "b.parquet", sizes=((32, 32), (16, 16)))
    uneven = data.load(f"parquet:{tmp_path / 'b.parquet'}")
    with pytest.raises(ValueError, match="give size="):
        uneven.batch()
    assert data.load(f"parquet:{tmp_path / 'b.parquet'}", size=24).batch().shape == (2, 3, 24, 24)


def test_damaged_files(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-50])
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        data.load(f"parquet:{tmp_path / 'cut.parquet'}")
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "text.parquet")
    with pytest.raises(ValueError, match="needs a column img or image"):
        data.load(f"parquet:{tmp_path / 'text.parquet'}")
    (tmp_path / "p.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="not a picture"):
        data.load_image(tmp_path / "p.png")


def test_own_picture(tmp_path):
    array = np.arange(40 * 60 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 60, 3)
    Image.fromarray(array).save(tmp_path / "mine.png")
    assert data.load_image(tmp_path / "mine.png")[0].shape == (3, 40, 60)
    grey = data.load_image(tmp_path / "mine.png", size=8, channels=1)
    assert grey[0].shape == (1, 8, 8) and grey.grid == 255 and grey.labels.tolist() == [data.UNLABELLED]
    with pytest.raises(DataMissing, match="no picture at"):
        data.load_image(tmp_path / "yours.png")


def test_public_cifar10(public_data):
    images = data.load("cifar10", subset="every:20")
    assert len(images) == 500 and images.index[:3].tolist() == [0, 20, 40]
    assert images[0].shape == (3, 32, 32) and images.grid == 255
    assert np.bincount(data.load("cifar10").labels).tolist() == [1000] * 10


def test_classes_are_taken_and_numbered_anew(digits):
    part = digits.take("classes:6-9")
    assert part.class_names == ("6", "7", "8", "9") and set(part.labels) == {0, 1, 2, 3}
    whole = dict(zip(digits.ids, digits.labels, strict=True))
    assert [whole[i] - 6 for i in part.ids] == list(part.labels) and len(part) == (digits.labels >= 6).sum()
    both = digits.take("classes:6-9,every:2")
    assert both.ids == part.ids[::2] and both.subset == "classes:6-9,every:2"
    assert torch.equal(both[1], part[2])
    with pytest.raises(ValueError, match=r"must name two classes within 0\.\.9, as classes:0-9"):
        digits.take("classes:8-12")
