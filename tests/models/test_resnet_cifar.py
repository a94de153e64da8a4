"""Residual networks for 32x32 images: the sizes papers state, and timm's ways with them."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from smoothkit import models
from smoothkit.models import resnet_cifar as networks


def count(model: torch.nn.Module) -> tuple[float, float]:
    """Millions of parameters, and of FLOP (2 x multiply-add) for one 3x32x32 image."""
    with FlopCounterMode(display=False) as flop, torch.inference_mode():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    return sum(p.numel() for p in model.parameters()) / 1e6, flop.get_total_flops() / 1e6


@pytest.mark.parametrize(("depth", "parameters"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_parameters_as_the_paper_states(depth, parameters):
    """He et al. 2016, Table 6; 1x1 shortcuts (option B) add 2,752 to their option A."""
    found, _ = count(timm.create_model(f"resnet{depth}_cifar"))
    assert found == pytest.approx(parameters, abs=0.032)


def test_resnet20():
    parameters, flop = count(timm.create_model("resnet20_cifar"))
    assert parameters == pytest.approx(0.272474) and flop == pytest.approx(81.6, abs=0.1)


def test_loads_by_name():
    model = models.load("resnet20_cifar", pretrained=False)
    assert model.size is None and not model.training
    assert model.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(FileNotFoundError, match="weights of resnet20_cifar are not at hand"):
        models.load("resnet20_cifar")


def test_other_heads_and_features():
    grey = timm.create_model("resnet20_cifar", in_chans=1, num_classes=7)
    assert grey(torch.rand(1, 1, 28, 28)).shape == (1, 7)
    features = timm.create_model("resnet20_cifar", features_only=True)(torch.rand(1, 3, 32, 32))
    assert [f.shape[1:] for f in features] == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_depth_is_checked():
    with pytest.raises(ValueError, match="depth must be 6 k"):
        networks.CifarResNet(depth=21)
