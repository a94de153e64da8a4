"""Base classifiers by name, from modules, from a hub cache; identity."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

from smoothkit import Smoothed, data, models

DIGITS = [name for name in models.starters() if name.startswith("digits")]


@pytest.mark.parametrize("name", DIGITS)
def test_starters_reach_what_their_cards_say(name, digits):
    card, model = models.starter_card(name), models.load(f"starter:{name}")
    with torch.inference_mode():
        accuracy = float((model(digits.batch()).argmax(1).numpy() == digits.labels).mean())
    assert accuracy == pytest.approx(card["test_accuracy_of_the_base_classifier_by_sigma"]["0"], abs=0.006)
    assert model.class_names == tuple("0123456789") and not model.training
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]


def test_starters_under_noise():
    cards = {name: models.starter_card(name)["test_accuracy_of_the_base_classifier_by_sigma"] for name in DIGITS}
    assert set(cards) == {"digits-vit-clean", "digits-vit-0.12", "digits-vit-0.25", "digits-vit-0.50"}
    assert cards["digits-vit-clean"]["0.25"] < 0.7 and cards["digits-vit-0.25"]["0.25"] > 0.9
    assert cards["digits-vit-0.50"]["0.5"] > 0.75


def test_preprocessing_is_inside():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.mean(dim=(2, 3))

    model = models.wrap(Spy(), mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), size=(16, 16), channels=3)
    model(torch.full((2, 1, 8, 8), 0.5))
    assert seen[0].shape == (2, 3, 16, 16)
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([0.0, 0.5, 2 / 3]))
    with pytest.raises(ValueError, match="wants 3 channels"):
        model(torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="interpolation must be"):
        models.wrap(Spy(), interpolation="nearest")
    with pytest.raises(ValueError, match="std must be above 0"):
        models.wrap(Spy(), std=(0.0,))


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("starter:digits-vit-025", ValueError, "did you mean starter:digits-vit-0.25"),
        ("resnt18", ValueError, "unknown model 'resnt18'; did you mean 'resnet18"),
        ("model.pth", ValueError, "looks like a pickle"),
        ("local-dir:weights/best.pt", ValueError, "looks like a pickle"),
        ("local-dir:/nowhere", FileNotFoundError, "no config.json"),
    ],
)
def test_names_that_do_not_work(name, error, match):
    with pytest.raises(error, match=match):
        models.load(name)


def test_local_dir_refuses_pickles_and_damage(tmp_path):
    source = ROOT / "data" / "starters" / "digits-vit-0.25"
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    assert models.load(f"local-dir:{folder}").class_names[3] == "3"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds a pickle \(pytorch_model.bin\)"):
        models.load(f"local-dir:{folder}")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors"):
        models.load(f"local-dir:{folder}")


def test_a_starter_that_is_not_the_one_its_card_describes(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "data" / "starters", tmp_path / "starters")
    weights = tmp_path / "starters" / "digits-vit-0.25" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    monkeypatch.setattr(sys.modules["smoothkit.models.load"], "data_dir", lambda: tmp_path)
    with pytest.raises(ValueError, match="not the file its card describes"):
        models.load("starter:digits-vit-0.25")


def test_timm_by_name_with_random_weights():
    model = models.load("resnet10t", pretrained=False, num_classes=7)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    named = models.load("resnet10t", pretrained=False)
    assert "goldfish" in named.class_names[1] and named.size is not None


@pytest.mark.slow
def test_hub_cache_without_network(tmp_path):
    """A local hub cache in the hub's own layout, with HF_HUB_OFFLINE=1, in a process of its own."""
    snapshot = tmp_path / "hub" / "models--smooth--digits" / "snapshots" / ("0" * 40)
    shutil.copytree(ROOT / "data" / "starters" / "digits-vit-0.25", snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    code = (
        "from smoothkit import Smoothed, data, models\n"
        "model = models.load('hf-hub:smooth/digits')\n"
        "print(Smoothed(model, 0.25).certify(data.load('digits', subset='first:1'), n=200, progress=False)[0].sentence())\n"
        "try: models.load('hf-hub:smooth/other')\n"
        "except FileNotFoundError as error: print('missing:', error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "moves this prediction: 4 (sigma = 0.25" in done.stdout
    assert "missing: the weights of hf-hub:smooth/other are not at hand" in done.stdout


def test_bare_module_and_torchvision_model_are_base_classifiers(digits):
    from torchvision.models import resnet18

    few = digits.take("first:2")
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert len(Smoothed(bare, 0.25).certify(few, n=100, progress=False)) == 2
    vision = models.wrap(resnet18(num_classes=10), mean=(0.5,), std=(0.25,), size=(32, 32), channels=3)
    assert [c.n for c in Smoothed(vision, 0.25, batch=20).certify(few, n0=10, n=30, progress=False)] == [30, 30]


def test_own_picture_through_a_timm_model(tmp_path, digits):
    from PIL import Image

    Image.fromarray((digits[0][0].numpy() * 255).astype("uint8")).save(tmp_path / "four.png")
    picture = data.load_image(tmp_path / "four.png", size=8, channels=1)
    certificate = Smoothed(models.load("starter:digits-vit-0.25"), 0.25).certify(picture, n=200, progress=False)[0]
    assert certificate.class_name == "4" and certificate.radius > 0


def test_fingerprints():
    torch.manual_seed(0)
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    assert models.fingerprint(a) != models.fingerprint(b)
    b.load_state_dict(a.state_dict())
    assert models.fingerprint(a) == models.fingerprint(b)
    assert models.fingerprint(nn.Sequential(a, nn.ReLU())) != models.fingerprint(nn.Sequential(a, nn.GELU()))
    wrapped = [models.fingerprint(models.wrap(a, size=(s, s))) for s in (8, 16)]
    assert wrapped[0] != wrapped[1]
    with pytest.raises(ValueError, match="give model_id="):
        models.identify(lambda x: x)
    assert models.identify(lambda x: x, "mine").fingerprint == "vouched:mine"
    with pytest.raises(ValueError, match="must be callable"):
        models.identify("resnet18")


def test_a_fingerprint_without_some_tensors():
    """A name leaves out that tensor, or all below that submodule, and no other that begins alike."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"head": nn.Linear(3, 2), "head2": nn.Linear(3, 2)})
    known = {left_out: models.fingerprint(net, without=left_out) for left_out in ((), ("head",), ("head.weight",))}
    assert len(set(known.values())) == 3 and known[()] == models.fingerprint(net)
    with torch.no_grad():
        net["head"].weight.add_(1)
    assert [models.fingerprint(net, without=w) == f for w, f in known.items()] == [False, True, True]
    with torch.no_grad():
        net["head2"].bias.add_(1)
    assert models.fingerprint(net, without=("head",)) != known[("head",)]


def test_cards_and_configs_agree():
    for name in models.starters():
        folder = ROOT / "data" / "starters" / name
        config, card = json.loads((folder / "config.json").read_text()), models.starter_card(name)
        assert config["architecture"] == card["architecture"] and config["pretrained_cfg"]["tag"] == name


def test_imagenet_sized_images_through_random_weights(tmp_path, monkeypatch):
    """The whole way at 224 pixels and 1,000 classes, on a generated folder."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(2):
        folder = tmp_path / "imagenet" / "val" / f"n{i:08d}"
        folder.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (256, 280, 3), dtype=np.uint8)).save(folder / "x.JPEG")
    monkeypatch.setenv("SMOOTHKIT_DATA", str(tmp_path))
    torch.manual_seed(0)
    smoothed = Smoothed(models.load("resnet10t", pretrained=False), 0.5, batch=8)
    record = smoothed.sample(data.load("imagenet"), n0=4, n=12, alpha=0.01, progress=False)
    assert record.num_classes == 1000 and record.identity.noise == "grid:255"
    assert [int(c.sum()) for c in record.votes()["counts_estimation"]] == [12, 12]


def test_saved_in_timms_layout_it_is_read_back(tmp_path):
    """A new head, an own size, half precision: the same logits."""
    made = models.load("vit_tiny_patch16_224", pretrained=False, num_classes=7, img_size=16, patch_size=4, embed_dim=32,
                       depth=1, num_heads=2)  # fmt: skip
    assert made.size == (16, 16)
    images = torch.rand(2, 3, 16, 16)
    models.save_local(made, tmp_path / "whole")
    whole = models.load(f"local-dir:{tmp_path / 'whole'}")
    assert torch.equal(whole(images), made(images)) and whole.size == (16, 16) and whole.network.num_classes == 7
    models.save_local(models.round_to_half(made), tmp_path / "half")
    again = models.load(f"local-dir:{tmp_path / 'half'}")
    assert torch.equal(again(images), made(images)) and again(images).dtype == torch.float32
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]
    with pytest.raises(ValueError, match=r"is not a timm network from smoothkit\.models\.load"):
        models.save_local(models.wrap(nn.Identity()), tmp_path / "no")
    large = nn.Linear(1, 1)
    large.bias.data.fill_(1e6)
    with pytest.raises(ValueError, match="bias has values beyond 65504"):
        models.round_to_half(large)


def test_the_size_that_the_network_gets_can_be_chosen():
    small = models.load("resnet18", pretrained=False, size=32, channels=[8, 8, 8, 8])
    assert small.size == (32, 32) and small(torch.rand(1, 3, 40, 40)).shape == (1, 1000)


def test_a_fingerprint_is_the_same_with_a_torch_that_says_less_of_norms(monkeypatch):
    """Up to torch 2.14 or so LayerNorm and its kin do not print that they have a bias."""
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False)
    )  # fmt: skip
    known = models.fingerprint(network)
    kinds = {next(base for base in type(m).__mro__ if "extra_repr" in vars(base)) for m in network if "Norm" in str(m)}
    for kind in kinds:
        says = kind.extra_repr
        monkeypatch.setattr(kind, "extra_repr", lambda self, says=says: re.sub(r", bias=\w+", "", says(self)))
    assert "bias=" not in "".join(str(m) for m in network if "Norm" in str(m)) and models.fingerprint(network) == known
