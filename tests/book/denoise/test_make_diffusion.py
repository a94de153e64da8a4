"""The script that trains the small diffusion models."""

import dataclasses
import hashlib
import importlib.util
import json

import pytest
import torch
from conftest import ROOT

from smoothbook.denoise import load_diffusion


@pytest.fixture
def script(monkeypatch):
    """With a model so small that it is trained in a second."""
    spec = importlib.util.spec_from_file_location("make_diffusion", ROOT / "data" / "make_diffusion.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "make_diffusion", module)  # its dataclass looks there
    spec.loader.exec_module(module)
    tiny = dataclasses.replace(
        module.RECIPES["digits-ddpm"],
        unet=module.architecture(8, 1, (8, 8), {1}, attention_head_dim=8),
        batch=8,
        train=("train", "first:64"),
        validation=("validation", "first:4"),
        test="first:4",
    )
    monkeypatch.setitem(module.RECIPES, "digits-ddpm", tiny)
    monkeypatch.setattr(module, "CHECKPOINT", 2)
    return module


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(script, monkeypatch, tmp_path):
    whole = script.train("digits-ddpm", 4, tmp_path / "whole", "cpu")[0]
    written = script.write_checkpoint

    def stop_after(*args):
        written(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "write_checkpoint", stop_after)
    with pytest.raises(KeyboardInterrupt):
        script.train("digits-ddpm", 4, tmp_path / "parts", "cpu")
    monkeypatch.setattr(script, "write_checkpoint", written)
    again = script.train("digits-ddpm", 4, tmp_path / "parts", "cpu")[0]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with pytest.raises(ValueError, match="steps was 4, now 6"):
        script.train("digits-ddpm", 6, tmp_path / "parts", "cpu")


def test_what_is_written_is_read_in_half_the_bytes(script, tmp_path):
    unet, scheduler, _ = script.train("digits-ddpm", 2, tmp_path / "work", "cpu")
    script.save("digits-ddpm", unet, scheduler, tmp_path / "mine", steps=2, seconds=1.0)
    card = json.loads((tmp_path / "mine" / "card.json").read_text())
    weights = tmp_path / "mine" / "unet" / "diffusion_pytorch_model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == card["sha256"]
    assert 2 * card["parameters"] < weights.stat().st_size < 3 * card["parameters"] + 40_000
    denoiser = load_diffusion(tmp_path / "mine", sigma=0.5)
    assert all(p.dtype == torch.float32 for p in denoiser.unet.parameters())
    for name, value in unet.state_dict().items():
        assert torch.equal(value.float(), denoiser.unet.state_dict()[name])


def test_recipes_are_models(script):
    from diffusers import UNet2DModel

    small = UNet2DModel(**script.RECIPES["cifar10-ddpm"].unet)
    assert 1e6 < sum(p.numel() for p in small.parameters()) < 3e6
    with torch.device("meta"):
        large = UNet2DModel(**script.RECIPES["cifar10-ddpm-large"].unet)
    assert sum(p.numel() for p in large.parameters()) > 3e7
