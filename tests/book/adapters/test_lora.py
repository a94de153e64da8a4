"""LoRA through peft: targets, named adapters, merging."""

import copy
import json

import pytest
import timm
import torch

from smoothbook import adapters
from smoothbook.adapters.lora import find_targets
from smoothbook.training import FitSettings, fit
from smoothkit import data, models


@pytest.fixture(scope="module")
def vit():
    return models.load("starter:digits-vit-clean")


@pytest.fixture(scope="module")
def images():
    return data.load("digits", split="train", subset="first:128")


def trained(model, images, sigma=0.4):
    fit(model, images, FitSettings(epochs=2, batch=64, lr=1e-2, schedule=sigma, progress=False, validation=None))
    return model


@torch.no_grad()
def answers(model, images):
    return model.eval()(images.batch(0, 32))


def test_merged_and_unmerged_agree(vit, images):
    model = trained(adapters.lora(vit, rank=4), images)
    before = answers(model, images)
    assert float((before - answers(vit, images)).abs().max()) > 0.1
    plain = model.merged()
    assert type(plain) is models.BaseClassifier and type(plain.network) is type(vit.network)
    assert torch.allclose(answers(plain, images), before, atol=1e-4)
    assert torch.equal(answers(model, images), before)  # merged() left it alone
    assert torch.allclose(answers(model.merge(), images), before, atol=1e-4) and model.is_merged
    assert torch.allclose(answers(model.unmerge(), images), before, atol=1e-4) and not model.is_merged


def test_merged_convolutions_agree(images):
    torch.manual_seed(0)
    base = models.wrap(timm.create_model("test_resnet", in_chans=1, num_classes=10))
    model = trained(adapters.lora(base, rank=2, targets=r"layer\d\.0\.conv[12]"), images)
    assert torch.allclose(answers(model.merged(), images), answers(model, images), atol=1e-4)


def test_a_merged_adapter_is_not_trained_switched_or_saved(vit, images, tmp_path):
    model = adapters.lora(vit, rank=2).merge()
    acts = [model.train, lambda: model.save(tmp_path), lambda: model.use("default"), lambda: trained(model, images)]
    for act in acts:
        with pytest.raises(ValueError, match=r"unmerge\(\)"):
            act()


def test_several_sigmas_on_one_backbone(vit, images, tmp_path):
    model = trained(adapters.lora(vit, rank=2, name="sigma_0_25"), images, 0.25)
    first = answers(model, images)
    state = model.adapter_state()
    model.add("sigma_0_50")
    assert torch.allclose(answers(model, images), answers(vit, images), atol=1e-6)  # each starts at the base
    trained(model, images, 0.5)
    second = answers(model, images)
    assert torch.equal(answers(model.use("sigma_0_25"), images), first) and not torch.equal(first, second)
    assert all(torch.equal(v, state[k]) for k, v in model.adapter_state().items())  # untouched by the other's training
    with model.plain():
        assert torch.allclose(answers(model, images), answers(vit, images), atol=1e-6)
    assert model.names == ("sigma_0_25", "sigma_0_50") and model.active == "sigma_0_25"
    per_adapter = adapters.trainable(model).trained
    assert per_adapter == sum(v.numel() for v in state.values())

    model.save(tmp_path)
    again = adapters.load(tmp_path, vit)
    assert again.names == model.names and again.active == "sigma_0_25"
    assert torch.equal(answers(again, images), first)
    assert torch.equal(answers(again.use("sigma_0_50"), images), second)


def test_folder_is_pefts_own(vit, images, tmp_path):
    """Another program reads it with peft alone."""
    from peft import PeftModel

    model = trained(adapters.lora(vit, rank=4), images)
    model.save(tmp_path)
    config = json.loads((tmp_path / "default" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 4 and config["modules_to_save"] == ["head"]
    network = PeftModel.from_pretrained(copy.deepcopy(vit.network), str(tmp_path / "default"))
    rebuilt = models.wrap(network, mean=(0.3,), std=(0.4,))
    assert torch.allclose(answers(rebuilt, images), answers(model, images), atol=1e-5)


def test_targets(vit):
    blocks = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
    assert find_targets(vit.network, "blocks") == blocks
    assert (
        adapters.trainable(adapters.lora(vit, rank=1, targets=r"blocks\.0\.mlp\.fc1", head="frozen")).trained
        == 64 + 128
    )
    report = adapters.trainable(adapters.lora(vit, rank=1, targets="attention", head="frozen"))
    assert not any("patch_embed" in part for part in report.parts)  # a list of names would match its `proj`
    # a pattern that also matches containers is narrowed to the layers it matches
    assert set(find_targets(vit.network, r"blocks\.0\.mlp.*").split("|")) == {
        r"blocks\.0\.mlp\.fc1",
        r"blocks\.0\.mlp\.fc2",
    }


@pytest.mark.parametrize("targets", ["query", r"attn\.qkv", r"head"])
def test_unknown_targets_list_the_candidates(vit, targets):
    with pytest.raises(ValueError, match=r"matches no layer of VisionTransformer") as error:
        adapters.lora(vit, targets=targets)
    message = str(error.value)
    assert "use one of qkv, attention, blocks, convolutions" in message
    assert (
        "patch_embed.proj, blocks.*.attn.qkv (4), blocks.*.attn.proj (4), blocks.*.mlp.fc1 (4), blocks.*.mlp.fc2 (4)"
        in message
    )
    assert "head" not in message.split("some of:")[1]


def test_bad_names_and_patterns(vit):
    with pytest.raises(ValueError, match="is not a regular expression"):
        adapters.lora(vit, targets="(")
    with pytest.raises(ValueError, match=r"sigma 0\.25 is `sigma_0_25`"):
        adapters.lora(vit, name="sigma-0.25")
    model = adapters.lora(vit, rank=1)
    with pytest.raises(ValueError, match="an adapter 'default' already"):
        model.add("default")
    with pytest.raises(ValueError, match="no adapter 'other'; choose one of default"):
        model.use("other")
