"""data/make_datasets.py on small sources made here: what it writes is read back, and compared with its digests."""

import importlib.util
import io
import json
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image

from smoothkit import data

CLASSES = ["n01443537 goldfish, Carassius auratus", "n02480855 gorilla, Gorilla gorilla", "n12267677 acorn"]
COUNTS = (50_000, 10_000, 50_500, 50_500, 10_100)  # images in the files of script.FILES


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_datasets", ROOT / "data" / "make_datasets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(script, tmp_path, monkeypatch):
    """Where data sets live, with known digests of its own."""
    monkeypatch.setenv("SMOOTHKIT_DATA", str(tmp_path))
    monkeypatch.setattr(script, "DIGESTS", tmp_path / "datasets.json")
    monkeypatch.setattr(script, "HALF", 2)
    known = {"tiny-imagenet-32": {"classes": CLASSES}}
    (tmp_path / "datasets.json").write_text(json.dumps(known))
    return tmp_path


def picture(number, size, form, mode="RGB"):
    shape = (size, size) if mode == "L" else (size, size, 3)
    pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue(), pixels


def cifar_source(folder, train=40, test=20):
    """Parquet files with the columns of uoft-cs/cifar10."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("train", train), ("test", test)):
        labels = rng.permutation(np.arange(n) % 10)
        struct = pa.array([{"bytes": picture(i, 32, "PNG")[0], "path": None} for i in range(n)])
        pq.write_table(pa.table({"img": struct, "label": labels}), folder / f"{name}-00000-of-00001.parquet")
    return folder


def tiny_source(path, leave_out=(), top="tiny-imagenet-200"):
    """A zip with the layout of tiny-imagenet-200.zip, two training images and one held out a class."""
    with zipfile.ZipFile(path, "w") as archive:
        lines = []
        for number, line in enumerate(CLASSES):
            wnid = line.split()[0]
            if wnid in leave_out:
                continue
            for k in range(2):
                mode = "L" if k else "RGB"  # some of the originals are grey
                encoded = picture(10 * number + k, 64, "JPEG", mode)[0]
                archive.writestr(f"{top}/train/{wnid}/images/{wnid}_{k}.JPEG", encoded)
            archive.writestr(f"{top}/train/{wnid}/{wnid}_boxes.txt", "")
            archive.writestr(f"{top}/val/images/val_{number}.JPEG", picture(90 + number, 64, "JPEG")[0])
            lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t63\t63")
        archive.writestr(f"{top}/val/val_annotations.txt", "\n".join(reversed(lines)) + "\n")
        archive.writestr(f"{top}/test/images/test_0.JPEG", b"")
    return path


# --- CIFAR-10 ---


def test_cifar10_is_encoded_named_and_read(script, root):
    source = cifar_source(root / "source")
    script.make("cifar10-jpeg75", root, source)
    images = data.load("cifar10", split="train")
    assert images.name == "cifar10-jpeg75:train:all" and images.class_names == data.CIFAR10_CLASSES
    table = pq.read_table(root / "cifar10-jpeg" / "train.parquet")
    paths = [row["path"] for row in table["img"].to_pylist()]
    everything = [f"{c}/{k:04d}.jpg" for c in data.CIFAR10_CLASSES for k in range(4)]
    assert paths == [everything[i] for i in np.random.default_rng(0).permutation(40)]
    original = pq.read_table(source / "train-00000-of-00001.parquet")
    labels = original["label"].to_numpy()
    for i, path in enumerate(paths):
        label = data.CIFAR10_CLASSES.index(path.split("/")[0])
        row = np.flatnonzero(labels == label)[int(path[-8:-4])]  # the k-th of its class
        encoded = script.jpeg75(original["img"][row].as_py()["bytes"])
        assert images.labels[i] == label and encoded == table["img"][i].as_py()["bytes"]
    first = Image.open(io.BytesIO(table["img"][0].as_py()["bytes"]))
    assert first.format == "JPEG" and first.layer[0][1:3] == (2, 2)  # chroma has half the resolution each way
    assert first.quantization[0][:8] == [8, 6, 5, 8, 12, 20, 26, 31]  # the standard table at quality 75


def test_cifar10_jpegs_by_class_are_taken_as_they_are(script, root):
    encoded = picture(0, 32, "JPEG")[0]
    with zipfile.ZipFile(root / "jpegs.zip", "w") as archive:
        for split in ("train", "test"):
            archive.writestr(f"CIFAR-10-images-main/{split}/frog/0000.jpg", encoded)
            archive.writestr(f"CIFAR-10-images-main/{split}/README.md", b"")
    script.make("cifar10-jpeg75", root, root / "jpegs.zip")
    row = pq.read_table(root / "cifar10-jpeg" / "test.parquet").to_pylist()[0]
    assert row == {"img": {"bytes": encoded, "path": "frog/0000.jpg"}, "label": 6}


# --- Tiny ImageNet ---


def test_tiny_imagenet_is_shrunk_and_read(script, root):
    script.make("tiny-imagenet-32", root, tiny_source(root / "tiny.zip"))
    train, test = (data.load("tiny-imagenet-32", split=s) for s in ("train", "test"))
    assert train.class_names == ("goldfish, Carassius auratus", "gorilla, Gorilla gorilla", "acorn")
    assert tuple(train[0].shape) == (3, 32, 32) and sorted(train.labels) == [0, 0, 1, 1, 2, 2]
    assert sorted(train.labels[:4]) == [0, 0, 1, 1]  # the first file has the first classes
    held = pq.read_table(root / "tiny-imagenet-32" / "val.parquet")["image"].to_pylist()
    order = [["val_2.JPEG", "val_1.JPEG", "val_0.JPEG"][i] for i in np.random.default_rng(0).permutation(3)]
    assert [row["path"] for row in held] == order  # shuffled from the order of the annotations
    assert [test.labels[i] for i in range(3)] == [int(p[4]) for p in order]


def test_the_filter_is_the_mean_of_two_by_two(script):
    pixels = np.repeat(np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[None], 64, 0), 2, 1)
    pixels = np.stack([pixels] * 3, axis=2)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    small = Image.open(io.BytesIO(script.webp32(buffer.getvalue())))
    assert small.format == "WEBP" and small.size == (32, 32)
    assert np.abs(np.asarray(small).astype(int) - pixels[::2, ::2]).mean() < 3


def test_classes_that_a_source_lacks_keep_their_numbers(script, root, capsys):
    script.make("tiny-imagenet-32", root, tiny_source(root / "tiny.zip", leave_out={"n02480855"}))
    assert "1 of 3 classes are not in tiny.zip and stay empty: 1 (n02480855 gorilla" in capsys.readouterr().err
    train = data.load("tiny-imagenet-32", split="train")
    assert set(train.labels) == {0, 2} and train.class_names[2] == "acorn"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "nothing", "is neither a folder nor a zip"),
        (lambda root: cifar_source(root / "cifar"), "is not laid out as tiny-imagenet-200.zip"),
        (lambda root: renamed(root), "class n00000001 is none of the 3"),
        (lambda root: enlarged(root), r"n01443537_0.JPEG is 32x32; Tiny ImageNet's images are 64x64"),
    ],
)
def test_other_sources_are_refused_and_leave_nothing(script, root, make, message):
    with pytest.raises(script.SourceError, match=message):
        script.make("tiny-imagenet-32", root, make(root))
    assert not (root / "tiny-imagenet-32").exists()
    script.make("tiny-imagenet-32", root, tiny_source(root / "tiny.zip"))  # what was begun is in nobody's way
    with pytest.raises(script.SourceError, match="is there already"):
        script.make("tiny-imagenet-32", root, root / "tiny.zip")


def renamed(root):
    path = root / "other.zip"
    with zipfile.ZipFile(tiny_source(path), "a") as archive:
        archive.writestr("tiny-imagenet-200/train/n00000001/images/n00000001_0.JPEG", picture(0, 64, "JPEG")[0])
    return path


def enlarged(root):
    path = root / "other.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train/n01443537/images/n01443537_0.JPEG", picture(0, 32, "JPEG")[0])
        archive.writestr("val/images/val_0.JPEG", picture(0, 64, "JPEG")[0])
        archive.writestr("val/val_annotations.txt", "val_0.JPEG\tn01443537\t0\t0\t9\t9\n")
    return path


# --- comparing ---


def test_check_tells_order_contents_and_classes_apart(script, root, capsys):
    script.make("cifar10-jpeg75", root, cifar_source(root / "source"))
    script.make("tiny-imagenet-32", root, tiny_source(root / "tiny.zip"))
    script.write_digests(root)
    assert script.check(root)
    assert capsys.readouterr().out.count("the same images in the same order") == 5
    assert json.loads(script.DIGESTS.read_text())["tiny-imagenet-32"]["classes"] == CLASSES
    test = root / "cifar10-jpeg" / "test.parquet"
    table = pq.read_table(test)
    pq.write_table(table.take(list(reversed(range(20)))), test)
    assert not script.check(root, ["cifar10-jpeg75"])
    assert "test.parquet: the same images, in another order" in capsys.readouterr().out
    pq.write_table(table.filter(pa.compute.not_equal(table["label"], 3)), test)
    assert not script.check(root, ["cifar10-jpeg75"])
    assert "not the same images: 18 for 20, 9 of 10 classes are equal, 1 are empty" in capsys.readouterr().out
    (root / "cifar10-jpeg" / "train.parquet").unlink()
    test.unlink()
    assert script.check(root, ["cifar10-jpeg75"])
    assert "train.parquet is not at hand" in capsys.readouterr().out


def test_downloads_appear_when_they_are_whole(script, tmp_path):
    (tmp_path / "there").write_bytes(b"x" * 3_000_000)
    url = (tmp_path / "there").as_uri()
    assert script.download(url, tmp_path / "sources" / "here").stat().st_size == 3_000_000
    with pytest.raises(OSError):
        script.download(url + "-not", tmp_path / "sources" / "other")
    assert sorted(p.name for p in (tmp_path / "sources").iterdir()) == ["here"]
    (tmp_path / "there").unlink()
    script.download(url, tmp_path / "sources" / "here")  # it is there


def test_committed_digests_fit_the_script(script):
    known = json.loads((ROOT / "data" / "datasets.json").read_text())
    counts = dict(zip([f for files in script.FILES.values() for f in files], COUNTS, strict=True))
    assert known.keys() == script.FILES.keys()
    for name, part in known.items():
        assert set(part["files"]) <= set(script.FILES[name])
        for file, found in part["files"].items():
            assert found["images"] == counts[file] and len(found["classes"].split()) == len(part["classes"])
    assert known["cifar10-jpeg75"]["classes"] == list(data.CIFAR10_CLASSES)
    assert len(known["tiny-imagenet-32"]["classes"]) == 202 == 2 * script.HALF


@pytest.mark.parametrize("file", ["cifar10-jpeg/test.parquet", "tiny-imagenet-32/val.parquet"])
def test_images_at_hand_are_those_known(script, public_data, file):
    """The test parts, in seconds; python data/make_datasets.py --check compares all."""
    if not (public_data / file).is_file():
        pytest.skip(f"{file} is not at hand")
    known = json.loads((ROOT / "data" / "datasets.json").read_text())
    wanted = next((part["files"][file] for part in known.values() if file in part["files"]), None)
    if wanted is None:
        pytest.skip(f"no digests of {file} are known yet: python data/make_datasets.py --write-digests")
    found = script.digests(public_data / file, len(wanted["classes"].split()))
    assert script.compare(found, wanted) == "the same images in the same order"
