"""What every adapter must do: start at its base, train only its own, and come back from disk the same."""

import copy
import json
import re
from unittest.mock import patch

import pytest
import timm
import torch
from torch import nn

from smoothbook import adapters
from smoothbook.adapters.base import head_name
from smoothbook.training import FitSettings, fit
from smoothbook.training.attacks import PGD
from smoothkit import data, models

CAF = dict(width=4, depth=1, stages=2)


@pytest.fixture(scope="module")
def images():
    return data.load("digits", split="train", subset="first:192")


@pytest.fixture(scope="module")
def vit():
    return models.load("starter:digits-vit-clean")


@pytest.fixture(scope="module")
def cnn():
    """A small ResNet with BatchNorm, trained on clean digits for a moment."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    base = models.wrap(network, mean=(0.3,), std=(0.4,), channels=1, name="cnn")
    some = data.load("digits", split="train", subset="first:512")
    return fit(base, some, quick(epochs=3, lr=5e-3, schedule=0.0)).model


def quick(**settings):
    return FitSettings(**{"batch": 64, "schedule": 0.4, "progress": False, "validation": None, **settings})


MAKERS = {
    "lora": ("vit", lambda base: adapters.lora(base, rank=4), 5e-3),
    "lora-frozen-head": ("vit", lambda base: adapters.lora(base, rank=4, head="frozen", targets="qkv"), 5e-3),
    "lora-convolutions": ("cnn", lambda base: adapters.lora(base, rank=2, targets="convolutions"), 5e-3),
    "houlsby": ("vit", lambda base: adapters.bottleneck(base, place="houlsby", width=8), 5e-3),
    "pfeiffer": ("vit", lambda base: adapters.bottleneck(base, place="pfeiffer"), 5e-3),
    "parallel": ("vit", lambda base: adapters.bottleneck(base, place="parallel", width=8, dropout=0.1), 5e-3),
    "parallel-frozen-head": ("vit", lambda base: adapters.bottleneck(base, width=8, head="frozen"), 5e-3),
    "prompts-deep": ("vit", lambda base: adapters.prompts(base, length=4), 2e-2),
    "prompts-shallow": ("vit", lambda base: adapters.prompts(base, length=4, deep=False), 2e-2),
    "caf-vit": ("vit", lambda base: adapters.certifying(base, adapter_settings=CAF), 5e-3),
    "caf-cnn": ("cnn", lambda base: adapters.certifying(base, adapter_settings=CAF), 5e-3),
    "caf-alone": ("vit", lambda base: adapters.certifying(base, adapter_settings=CAF, use_features=False), 3e-2),
    "caf-head-only": ("vit", lambda base: adapters.certifying(base, use_adapter=False), 5e-3),
    "caf-small-vit": (
        "vit",
        lambda base: adapters.certifying(
            base, adapter="vit", adapter_settings=dict(image_size=8, patch_size=4, width=16, depth=1, heads=2)
        ),
        5e-3,
    ),
}
START_ELSEWHERE = {"prompts-deep", "prompts-shallow", "caf-alone"}


@pytest.fixture(params=MAKERS)
def case(request):
    base, make, lr = MAKERS[request.param]
    base = request.getfixturevalue(base)
    return request.param, base, make(base), lr


def clean(images):
    return images.batch(0, 32)


@torch.no_grad()
def answers(model, x):
    return model.eval()(x)


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_starts_at_the_base(case, images):
    name, base, model, _ = case
    gap = float((answers(model, clean(images)) - answers(base, clean(images))).abs().max())
    assert gap > 1e-2 if name in START_ELSEWHERE else gap <= 1e-6


def test_learns_and_moves_only_its_own(case, images):
    """Loss falls; parameters and buffers that are not the adapter's are bit-identical, BatchNorm's statistics included."""
    name, base, model, lr = case
    given, before = copy.deepcopy(base.state_dict()), copy.deepcopy(model.state_dict())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    own_buffers = {n for n, _ in model.named_buffers() if n.startswith(model.own)} if name.startswith("caf") else set()
    done = fit(model, images, quick(epochs=5, lr=lr))
    assert done.history.loss.iloc[-1] < 0.97 * done.history.loss.iloc[0]
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert trained <= changed <= trained | own_buffers  # every one of its own has learned
    assert same_state(base.state_dict(), given) and all(p.requires_grad for p in base.parameters())
    assert done.trained.trained == sum(p.numel() for n, p in model.named_parameters() if n in trained)


def test_no_gradient_on_frozen_tensors_and_train_mode_is_partial(case, images):
    _, _, model, _ = case
    model.train()
    model(clean(images)).sum().backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.training == m.weight.requires_grad for m in norms)


def test_saves_and_loads_to_identical_logits(case, images, tmp_path):
    _, base, model, lr = case
    fit(model, images, quick(epochs=1, lr=lr))
    model.save(tmp_path)
    again = adapters.load(tmp_path, base)
    assert torch.equal(answers(again, clean(images)), answers(model, clean(images)))
    assert models.fingerprint(again) == models.fingerprint(model)
    assert same_state(again.adapter_state(), model.adapter_state())
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.suffix for p in written} == {".json", ".safetensors"} and all(p.stat().st_mode & 0o044 for p in written)
    assert str(adapters.trainable(again)) == str(adapters.trainable(model))


def test_another_base_is_refused(case, tmp_path):
    _, base, model, _ = case
    model.save(tmp_path)
    other = copy.deepcopy(base)
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "norm" in n or "bn" in n).mul_(2)
    other.name = "another"
    with pytest.raises(ValueError, match=rf"belongs to '{re.escape(base.name)}' .* not to 'another'"):
        adapters.load(tmp_path, other)


def test_attacks_reach_through(case, images):
    """The frozen part passes gradients to the image when an attack asks."""
    _, _, model, _ = case
    x, y = clean(images), torch.from_numpy(images.labels[:32])
    noise = 0.1 * torch.randn(1, *x.shape, generator=torch.Generator().manual_seed(0))
    attacked = PGD(0.3, steps=1)(model.eval(), x, y, noise)
    assert ((attacked - x).flatten(1).norm(dim=1) > 0.01).float().mean() > 0.9


def test_deterministic_in_eval_and_independent_of_the_batch(case, images):
    _, _, model, _ = case
    x = clean(images)
    whole, halves = answers(model, x), torch.cat([answers(model, x[:16]), answers(model, x[16:])])
    assert torch.equal(whole, answers(model, x)) and torch.allclose(whole, halves, atol=1e-4)


# --- the report, heads, errors ---------------------------------------------------------------------


def test_report(vit):
    report = adapters.trainable(adapters.prompts(vit, length=4))
    assert report.parts == {"blocks.*.prompts": 4 * 4 * 64, "head.weight": 640, "head.bias": 10}
    assert report.trained == 1674 and report.total == 137_162 and report.share == 1674 / 137_162
    assert str(report).startswith(
        "1,674 of 137,162 parameters trained (1.22%): blocks.*.prompts 1,024; head.weight 640"
    )
    assert str(adapters.trainable(nn.Linear(2, 2).requires_grad_(False))) == "0 of 6 parameters trained (0.00%): none"


@pytest.mark.parametrize("make", [adapters.lora, adapters.bottleneck, adapters.prompts])
def test_new_head_for_another_task(vit, images, tmp_path, make):
    model = make(vit, num_classes=4, class_names=("a", "b", "c", "d"))
    assert answers(model, clean(images)).shape == (32, 4) and model.class_names == ("a", "b", "c", "d")
    model.save(tmp_path)
    again = adapters.load(tmp_path, vit)
    assert torch.equal(answers(again, clean(images)), answers(model, clean(images)))
    assert again.class_names == model.class_names
    with pytest.raises(ValueError, match="must be trained; give head='trained'"):
        make(vit, num_classes=4, head="frozen")


def test_a_random_head_of_the_base_does_not_matter_when_the_head_is_trained(vit, images, tmp_path):
    """A backbone loaded with num_classes= has another random head each time; the adapter brings its own."""

    def base_with(seed):
        torch.manual_seed(seed)
        base = copy.deepcopy(vit)
        base.network.head = nn.Linear(64, 10)
        return base

    model = adapters.prompts(base_with(1), length=2)
    model.save(tmp_path / "trained")
    again = adapters.load(tmp_path / "trained", base_with(2))
    assert torch.equal(answers(again, clean(images)), answers(model, clean(images)))
    adapters.prompts(base_with(1), length=2, head="frozen").save(tmp_path / "frozen")
    with pytest.raises(ValueError, match="belongs to"):
        adapters.load(tmp_path / "frozen", base_with(2))


def test_seed_decides_the_start_and_the_global_generator_stays(vit):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    for make in (adapters.lora, adapters.bottleneck, adapters.prompts):
        a, b, c = (models.fingerprint(make(vit, seed=s)) for s in (0, 0, 1))
        assert a == b != c
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("make", [adapters.lora, adapters.bottleneck, adapters.prompts, adapters.certifying])
def test_bases_that_do_not_fit(vit, make):
    with pytest.raises(ValueError, match="base must be a BaseClassifier, got VisionTransformer"):
        make(vit.network)
    with pytest.raises(ValueError, match="already adapted"):
        make(adapters.prompts(vit, length=1))


@pytest.mark.parametrize(
    "make, what", [(adapters.bottleneck, "bottleneck adapters"), (adapters.prompts, "visual prompts")]
)
def test_models_without_the_block_structure(cnn, vit, make, what):
    with pytest.raises(ValueError, match=f"{what} need a timm VisionTransformer, got ResNet"):
        make(cnn)
    odd = copy.deepcopy(vit)
    odd.network.blocks[0] = nn.Identity()
    with pytest.raises(ValueError, match="ordinary Block of timm, got Identity"):
        make(odd)


def test_heads_are_found_or_asked_for():
    assert head_name(timm.create_model("test_resnet")) == "fc"
    assert head_name(timm.create_model("test_convnext")) == "head.fc"
    assert head_name(nn.ModuleDict({"classifier": nn.Linear(2, 2)})) == "classifier"
    with pytest.raises(ValueError, match="cannot find the head of Sequential"):
        head_name(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda b: adapters.bottleneck(b, place="after"), "place must be one of houlsby, pfeiffer, parallel"),
        (lambda b: adapters.bottleneck(b, width=0), "width must be at least 1"),
        (lambda b: adapters.prompts(b, length=0), "length must be at least 1"),
        (lambda b: adapters.prompts(b, head="new"), "head must be one of trained, frozen"),
        (lambda b: adapters.lora(b, rank=0), "rank must be at least 1"),
    ],
)
def test_bad_settings(vit, make, message):
    with pytest.raises(ValueError, match=message):
        make(vit)


def test_folders_that_are_no_adapters(vit, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter\.json"):
        adapters.load(tmp_path, vit)
    (tmp_path / "adapter.json").write_text(json.dumps({"kind": "new"}))
    with pytest.raises(ValueError, match="kind 'new', which load does not know"):
        adapters.load(tmp_path, vit)
    adapters.prompts(vit, length=2).save(tmp_path)
    config = json.loads((tmp_path / "adapter.json").read_text())
    config["settings"]["length"] = 3
    (tmp_path / "adapter.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"blocks\.0\.prompts has shape \(2, 64\), the model \(3, 64\)"):
        adapters.load(tmp_path, vit)
    config["settings"]["deep"] = False
    (tmp_path / "adapter.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"3 names differ, as 'network\.blocks\.1\.prompts'"):
        adapters.load(tmp_path, vit)


# --- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda b: adapters.prompts(b, length=10, deep=False, head="frozen"), 7_680),
        (lambda b: adapters.prompts(b, length=50, head="frozen"), 460_800),
        (lambda b: adapters.lora(b, rank=4, targets="qkv", head="frozen"), 147_456),
        (lambda b: adapters.lora(b, rank=4, targets="attention", head="frozen"), 221_184),
        (lambda b: adapters.lora(b, rank=16, head="frozen"), 2_359_296),
        (lambda b: adapters.bottleneck(b, place="parallel", head="frozen"), 1_189_632),
        (lambda b: adapters.bottleneck(b, place="pfeiffer", head="frozen"), 1_779_840),
        (lambda b: adapters.bottleneck(b, place="houlsby", head="frozen"), 2_379_264),
    ],
)
def test_parameters_on_vit_b(make, expected):
    """The table of papers/peftsmoothing.md, section 2.4; the network is on the meta device, so without values to hash."""
    with torch.device("meta"):
        network = timm.create_model("vit_base_patch16_224", num_classes=10)
    with patch("smoothbook.adapters.base.fingerprint", return_value="none"):
        assert adapters.trainable(make(models.wrap(network))).trained == expected
