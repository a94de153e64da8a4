"""Every row of the imagenet table at 224 pixels, with random weights, on a generated folder in ImageNet's layout.

Two rows run by default; SMOOTHKIT_LONG_TESTS=1 runs one of each method and loss, some minutes on one core.
"""

import dataclasses
import os
import shutil

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

from smoothbook import tables
from smoothbook.tables import Row, cost, load_rows
from smoothbook.tables.build import check_row
from smoothbook.tables.make import make_table
from smoothkit.sampling import stream as votes

TABLE = ROOT / "data" / "rows" / "imagenet.yaml"
FULL, TRIAL = load_rows(TABLE, check=check_row), load_rows(TABLE, "trial", check=check_row)
NAMES = [row.name for row in TRIAL if row.name.endswith("-0.25")]
ALWAYS = ("resnet-head-only-0.25", "resnet-adapter-alone-0.25")
LONG = pytest.mark.skipif("SMOOTHKIT_LONG_TESTS" not in os.environ, reason="takes minutes; set SMOOTHKIT_LONG_TESTS=1")
VIT_B, VIT_B_HEAD, RESNET_50, RESNET_50_HEAD = 86_567_656, 769_000, 25_557_032, 2_049_000


def resnet_adapter(width=16, depth=2, stages=5, features=2048):
    """3x3 stem, basic blocks with BatchNorm, 1x1 shortcuts where the width changes, a linear layer."""
    count, before = 3 * width * 9 + 2 * width, width
    for stage in range(stages):
        out = width * 2**stage
        for _ in range(depth):
            count += 9 * before * out + 9 * out * out + 4 * out + (before * out + 2 * out if before != out else 0)
            before = out
    return count + before * features + features


def vit_adapter(width=192, depth=12, features=768):
    """A ViT on 14x14 patches of 16x16 with MLPs of twice its width."""
    block = 4 * width + (3 * width + 3) * width + (width + 1) * width + 2 * 2 * width * width + 3 * width
    return (3 * 256 + 1) * width + (1 + 197) * width + depth * block + 2 * width + (width + 1) * features


def lora_on_convolutions(rank=16):
    """A is a convolution like the layer's own to `rank` channels, B a 1x1 convolution from there."""
    with torch.device("meta"):
        layers = [m for m in timm.create_model("resnet50").modules() if isinstance(m, nn.Conv2d)]
    return sum(rank * (m.in_channels * m.kernel_size[0] * m.kernel_size[1] + m.out_channels) for m in layers)


TRAINED = {
    "clean-base": 0,
    "full": VIT_B,
    "head": VIT_B_HEAD,
    "lora-16": 2_359_296 + VIT_B_HEAD,
    "parallel": 1_189_632 + VIT_B_HEAD,
    "prompts-deep": 12 * 50 * 768 + VIT_B_HEAD,
    "caf": vit_adapter() + VIT_B_HEAD,
    "coordinator-weights": 9_120
    + 32 * 7 * 7
    - 384,  # BlackVIP's decoder, and the trigger that ViT-S's 384 features leave
    "resnet-clean": 0,
    **{f"resnet-{loss}": RESNET_50 for loss in ("full", "stability", "consistency", "macer", "smoothadv")},
    "resnet-lora-16": lora_on_convolutions() + RESNET_50_HEAD,
    "resnet-head-only": RESNET_50_HEAD,
    "resnet-adapter-alone": resnet_adapter() + RESNET_50_HEAD,
    "resnet-caf": resnet_adapter() + RESNET_50_HEAD,
    "resnet-ensemble": 0,
    "resnet-ensemble-noise": 9 * 3 * 16 + 16 + 9 * 16 * 16 + 16 + 2 * (2 * 16) + 2,
}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes a row from a generated ImageNet; its checkpoint, up to 1 GB, goes once it is made."""
    root = tmp_path_factory.mktemp("imagenet-rows")
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for wnid in ("n01440764", "n01443537"):
            folder = root / "images" / "imagenet" / part / wnid
            folder.mkdir(parents=True)
            for k in range(2):
                small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                small.resize((256, 240), Image.Resampling.BILINEAR).save(folder / f"{wnid}_{k}.png")
    shutil.copytree(TABLE.parent, root / "data" / "rows")
    members = {member for row in TRIAL for member in row.made_from}

    def one(name):
        assert make_table("imagenet:trial", only=[name], data=root / "data") == [name]
        keep = {f"training-{row.training_digest()}" for row in TRIAL if row.name in members}
        for path in (root / "runs" / "rows").glob("training-*"):
            if path.name not in keep:
                shutil.rmtree(path)
        return tables.open("imagenet:trial", data=root / "data")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOOTHKIT_DATA", str(root / "images"))
        patch.setattr(cost, "TRIAL", 1)  # images whose forward pass is timed
        patch.setattr(votes, "CPU_BATCH", 2)  # six samples an image do not fill a hundred
        yield one
    shutil.rmtree(root / "runs", ignore_errors=True)


def test_the_trial_is_the_table_with_random_weights():
    assert [row.name for row in TRIAL] == [row.name for row in FULL]
    for full, trial in zip(FULL, TRIAL, strict=True):
        assert trial.base == f"random:{full.base}" and ":" not in full.base
        assert (trial.method, trial.loss, trial.loss_settings) == (full.method, full.loss, full.loss_settings)
        if "encoder" in full.adapter:
            assert trial.adapter == full.adapter | {"encoder": f"random:{full.adapter['encoder']}"}
        else:
            assert trial.adapter == full.adapter
        assert timm.is_model(full.base.split(".")[0]) and full.base in timm.list_pretrained(full.base)


def test_rows_at_the_other_sigma_are_the_same_rows():
    by_name = {row.name: row for row in TRIAL}
    assert {row.sigma for row in TRIAL} == {0.25, 0.5} and len(TRIAL) == 2 * len(NAMES)
    for name in NAMES:
        other = by_name[name.removesuffix("0.25") + "0.50"]
        assert dataclasses.replace(other, sigma=0.25).made_like(by_name[name])


def test_random_weights_leave_other_rows_and_random_ones(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "variants: {trial: {random: true}}\ndefaults: {sigma: 0.25}\nrows:\n- {name: a}\n"
        "- {name: b, base: 'row:a'}\n- {name: c, base: 'random:resnet18'}\n"
        "- {name: d, method: coordinator, steps: 1, adapter: {encoder: resnet18}}\n"
    )
    found = load_rows(tmp_path / "mine.yaml", "trial")
    assert [row.base for row in found] == [f"random:{Row.base}", "row:a", "random:resnet18", found[0].base]
    assert found[3].adapter == {"encoder": "random:resnet18"}


def check(make, name):
    table = make(name)
    row, card, record = table[name].row, table[name].card, table[name].record
    assert card.trained == TRAINED[name.removesuffix("-0.25")]
    if row.method in ("clean", "full", "head", "lora"):
        base = RESNET_50 if name.startswith("resnet") else VIT_B
        added = card.trained if row.method == "lora" else 0  # peft keeps the base's head beside the adapter's
        assert card.parameters == base + added
    line = table.frame(names=[name]).loc[0]
    assert line.problem == "" and line.images == 2
    assert record.num_classes == 1000 and record.rows()["counts"].map(sum).sum() == 2 * (row.n0 + row.n)
    if card.steps:
        assert np.isfinite(card.end["loss"]) and card.steps == (1 if row.method == "coordinator" else 2)
    assert card.queries == (2 * 5 * 2 if row.method == "coordinator" else None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALWAYS)
def test_a_row_runs_at_224(make, name):
    check(make, name)


@LONG
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ALWAYS])
def test_every_row_runs_at_224(make, name):
    check(make, name)
