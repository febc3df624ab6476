"""Residual networks, and their plain twins without the shortcuts."""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1

from ..base.settings import PositiveInt
from .convnets import ConvNet, ImageShape, conv_norm_relu, global_average
from .registry import Classes, register


@register
class ResNet(ConvNet):
    """Residual network of two-layer blocks (He et al. 2016, https://arxiv.org/abs/1512.03385).

    Takes images of any size. Stages: stem, stage1, stage2, ...; stage2 and later halve the size.
    depth: 18, with four stages of two blocks and projections where the shape changes; or 6n + 2 for
        the CIFAR family of section 4.2: three stages of n blocks, shortcuts padded with zeros.
    width: channels of the first stage, by default 64 and 16; each stage doubles them.
    stem_stride: 2 lets the first convolution halve the size, to a quarter of the operations, which
        small images cannot spare and photographs can.
    residual: False leaves out the shortcuts of the CIFAR family: the plain twin, whose parameters
        are the same in name, number and shape. There is none at depth 18.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: Classes,
        *,
        depth: int = 18,
        width: PositiveInt | None = None,
        stem_stride: PositiveInt = 1,
        residual: bool = True,
    ) -> None:
        if depth != 18 and depth not in range(8, 10_000, 6):
            raise ValueError(f"ResNet: depth = {depth}. Give 18, or 6n + 2: 8, 14, 20, ..., 9998.")
        if depth == 18 and not residual:
            hint = "its shortcuts have parameters, so that no twin is as large. Give 20, say."
            raise ValueError(f"ResNet: residual = False with depth = 18: {hint}")
        blocks = [2] * 4 if depth == 18 else [(depth - 2) // 6] * 3
        channels = width = width or (64 if depth == 18 else 16)
        stages = {"stem": nn.Sequential(*conv_norm_relu(image_shape[0], width, stride=stem_stride))}
        for index, count in enumerate(blocks):
            out = width * 2**index
            inputs = [channels, *[out] * (count - 1)]
            stage = [_block(size, out, residual=residual, project=depth == 18) for size in inputs]
            stages[f"stage{index + 1}"] = nn.Sequential(*stage)
            channels = out
        super().__init__(stages, global_average(), nn.Linear(channels, num_classes))
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                # He et al. 2015, https://arxiv.org/abs/1502.01852, as torchvision draws them.
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


class _PlainBlock(BasicBlock):
    """A residual block without its shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class _PadShortcut(nn.ZeroPad3d):
    """Every second row and column, and zeros for the new channels (option A of He et al. 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, ::2, ::2])


def _block(channels: int, out: int, *, residual: bool, project: bool) -> BasicBlock:
    stride = out // channels  # twice the channels, half the size
    if not residual:
        return _PlainBlock(channels, out, stride)
    if stride == 1:
        return BasicBlock(channels, out)
    if project:
        shortcut = nn.Sequential(conv1x1(channels, out, stride), nn.BatchNorm2d(out))
    else:
        shortcut = _PadShortcut((0, 0, 0, 0, 0, out - channels))
    return BasicBlock(channels, out, stride, shortcut)
