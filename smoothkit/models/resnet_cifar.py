"""Residual networks for 32x32 images, as papers on CIFAR-10 use them, in timm's registry.

timm's own ResNets shrink an image by four before their first block. These keep its size: a 3x3
convolution, three stages of 16, 32 and 64 channels, no pooling before the end.

Reference: He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, Section 4.2
(with 1x1 convolutions where the shape changes: option B there).
"""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

DEPTHS = (20, 32, 44, 56, 110)
CHANNELS = (16, 32, 64)


class CifarResNet(ResNet):
    """timm's ResNet of basic blocks with a stem that keeps the image's size; `depth` is 6 k + 2."""

    def __init__(self, depth: int = 20, in_chans: int = 3, zero_init_last: bool = False, **settings) -> None:
        if depth % 6 != 2 or depth < 8:
            raise ValueError(f"depth must be 6 k + 2 (8, 14, 20, ...), got {depth}")
        blocks = (depth - 2) // 6
        # a deep stem of width 8 is the way to ask timm for 16 channels; its convolutions give way to one below
        super().__init__(
            BasicBlock,
            layers=(blocks,) * len(CHANNELS),
            channels=CHANNELS,
            stem_type="deep",
            stem_width=CHANNELS[0] // 2,
            in_chans=in_chans,
            **settings,
        )
        self.conv1 = nn.Conv2d(in_chans, CHANNELS[0], 3, padding=1, bias=False)
        self.maxpool = nn.Identity()
        self.layer4 = nn.Identity()  # timm's forward pass names four stages
        for stage in self.feature_info:  # timm counts its stem's stride of 2 and the pool's
            stage["reduction"] = max(1, stage["reduction"] // 4)
        self.init_weights(zero_init_last=zero_init_last)


default_cfgs = generate_default_cfgs(
    {
        f"resnet{depth}_cifar": {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": (8, 8),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2471, 0.2435, 0.2616),
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for depth in DEPTHS
    }
)


def _register(depth: int) -> None:
    """Make `resnet{depth}_cifar` a name for timm.create_model."""

    def create(pretrained: bool = False, **settings) -> CifarResNet:
        stages = {"out_indices": (0, 1, 2, 3)}  # for features_only=True
        return build_model_with_cfg(
            CifarResNet, create.__name__, pretrained, depth=depth, feature_cfg=stages, **settings
        )

    create.__name__ = f"resnet{depth}_cifar"
    register_model(create)


for _depth in DEPTHS:
    _register(_depth)
