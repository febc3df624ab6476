"""The convolutional networks of exercise 1.3, each a chain of named stages, a pool and a head.

FastNet, which is made for speed, is in fastnet. Importing the module makes models.MODELS know them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, conv1x1

from ..base.settings import Fraction, PositiveInt, check, suggestion
from .registry import Classes, register

ImageShape = Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]
Widths = Annotated[list[PositiveInt], Field(min_length=1)]
Layers = Annotated[list[Any], Field(min_length=1)]  # see _layer for what an item may be
_LAYER = {
    "channels": PositiveInt,
    "kernel": PositiveInt,
    "stride": PositiveInt,
    "padding": Annotated[int, Field(ge=0)],
    "pool": bool,
}


class ConvNet(nn.Module):
    """What transfer and explanation rely on: logits = head(pool(features(images))).

    stages: name -> module, applied in this order; features() is what the last one returns.
    pool: turns that into the input of the head, [n, F]; it has no parameters, so that each belongs
        to one stage or to the head.
    head: the last linear layer.
    Every network takes float images [n, C, H, W] and returns logits [n, num_classes]. Its first two
    arguments are image_shape, (C, H, W), and num_classes, at least 2. An argument that is not
    allowed, and images too small for the layers, raise ValueError.
    """

    def __init__(self, stages: Mapping[str, nn.Module], pool: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.stages, self.pool, self.head = nn.ModuleDict(stages), pool, head

    def features(self, images: Tensor) -> Tensor:
        """The last stage's output: maps [n, C, h, w], but [n, hidden] for SimpleCNN."""
        for stage in self.stages.values():
            images = stage(images)
        return images

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.features(images)))


@register
class SimpleCNN(ConvNet):
    """Convolution 3x3, ReLU, max-pool for each width; then two fully connected layers.

    Stages: stage1, stage2, ..., and hidden, the first fully connected layer.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: Classes,
        *,
        widths: Widths = (32, 64),
        hidden: PositiveInt = 256,
    ) -> None:
        require_size("SimpleCNN", image_shape, 2 ** len(widths))
        channels, height, width = image_shape
        stages: dict[str, nn.Module] = {}
        for number, out in enumerate(widths, start=1):
            conv = nn.Conv2d(channels, out, 3, padding=1)
            stages[f"stage{number}"] = nn.Sequential(conv, nn.ReLU(inplace=True), nn.MaxPool2d(2))
            channels, height, width = out, height // 2, width // 2
        flat = nn.Linear(channels * height * width, hidden)
        stages["hidden"] = nn.Sequential(nn.Flatten(), flat, nn.ReLU())
        super().__init__(stages, nn.Identity(), nn.Linear(hidden, num_classes))


@register
class CNN(ConvNet):
    """Two times (convolution 3x3, batch norm, ReLU), then max-pool, for each width.

    Global average pooling, dropout and a linear layer classify. Stages: stage1, stage2, ...
    """

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: Classes,
        *,
        widths: Widths = (64, 128, 256),
        dropout: Fraction = 0.3,
    ) -> None:
        require_size("CNN", image_shape, 2 ** len(widths))
        channels = image_shape[0]
        stages = {}
        for number, width in enumerate(widths, start=1):
            layers = _conv_norm_relu(channels, width) + _conv_norm_relu(width, width)
            stages[f"stage{number}"] = nn.Sequential(*layers, nn.MaxPool2d(2))
            channels = width
        super().__init__(stages, _average(dropout), nn.Linear(channels, num_classes))


@register
class FullyConvCNN(ConvNet):
    """Convolution, batch norm, ReLU, dropout and perhaps max-pool for each layer of a list.

    Global average pooling and a linear layer classify, so that class activation maps (Zhou et al.
    2016, https://arxiv.org/abs/1512.04150) are exact. Stages: stage1, stage2, ..., one a layer.
    layers: each a number of channels, or a dict of channels and, where wanted, kernel (default 3),
        stride (1), padding (kernel // 2, which keeps the size if the kernel is odd) and pool
        (False; True halves the size).
    dropout: fraction of each layer's maps that training drops; whole maps, as a pixel says what its
        neighbours say too (Tompson et al. 2015, https://arxiv.org/abs/1411.4280).
    """

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: Classes,
        *,
        layers: Layers = (
            64,
            {"channels": 64, "pool": True},
            128,
            {"channels": 128, "pool": True},
            256,
            256,
        ),
        dropout: Fraction = 0.1,
    ) -> None:
        channels, *size = image_shape
        stages = {}
        for index, given in enumerate(layers):
            layer = _layer(index, given)
            kernel, stride, padding = layer["kernel"], layer["stride"], layer["padding"]
            before = "x".join(map(str, size))
            size = [(n + 2 * padding - kernel) // stride + 1 for n in size]
            size = [n // 2 for n in size] if layer["pool"] else size
            if min(size) < 1:
                raise ValueError(
                    f"FullyConvCNN: layers[{index}] = {given!r} leaves nothing of its input, "
                    f"{before} pixels. Shrink less before it, or give images larger than "
                    f"image_shape = {tuple(image_shape)}."
                )
            parts = _conv_norm_relu(channels, layer["channels"], kernel, stride, padding)
            parts.append(nn.Dropout2d(dropout))
            if layer["pool"]:
                parts.append(nn.MaxPool2d(2))
            stages[f"stage{index + 1}"] = nn.Sequential(*parts)
            channels = layer["channels"]
        super().__init__(stages, _average(), nn.Linear(channels, num_classes))


@register
class ResNet(ConvNet):
    """Residual network of two-layer blocks (He et al. 2016, https://arxiv.org/abs/1512.03385).

    Takes images of any size. Stages: stem, stage1, stage2, ...; stage2 and later halve the size.
    depth: 18, with four stages of two blocks and projections where the shape changes; or 6n + 2 for
        the CIFAR family of section 4.2, with three stages of n blocks, where a shortcut pads the
        missing channels with zeros and so has no parameters.
    width: channels of the first stage, by default 64 and 16; each stage doubles them.
    residual: False leaves out the shortcuts of the CIFAR family: the plain twin, whose parameters
        are the same in name, number and shape. There is none at depth 18, as projections have
        parameters.
    stem: 'cifar' is one convolution 3x3; 'deep' is three, the first with stride 2, and a max-pool,
        which together quarter the size of larger images (ResNet-C of He et al. 2019,
        https://arxiv.org/abs/1812.01187).
    """

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: Classes,
        *,
        depth: int = 18,
        width: PositiveInt | None = None,
        residual: bool = True,
        stem: Literal["cifar", "deep"] = "cifar",
    ) -> None:
        if depth != 18 and (depth < 8 or depth % 6 != 2):
            raise ValueError(
                f"ResNet: depth = {depth}. Give 18, or 6n + 2: 8, 14, 20, 32, 44, 56, 110, ..."
            )
        if depth == 18 and not residual:
            raise ValueError(
                "ResNet: residual = False with depth = 18: its projections have parameters, so the "
                "plain network would be smaller. Compare at a depth of 6n + 2, 20 say."
            )
        blocks = [2] * 4 if depth == 18 else [(depth - 2) // 6] * 3
        channels = width = width or (64 if depth == 18 else 16)
        stages = {"stem": _stem(image_shape[0], width, deep=stem == "deep")}
        for index, count in enumerate(blocks):
            stage = []
            for _ in range(count):
                out = width * 2**index
                stage.append(_block(channels, out, residual=residual, project=depth == 18))
                channels = out
            stages[f"stage{index + 1}"] = nn.Sequential(*stage)
        super().__init__(stages, _average(), nn.Linear(channels, num_classes))
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                # He et al. 2015, https://arxiv.org/abs/1502.01852, as torchvision draws them. Under
                # batch normalisation their scale decides how far a step turns the weights.
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


class _PlainBlock(BasicBlock):
    """A residual block without its shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class _PadShortcut(nn.Module):
    """Every second row and column, and zeros for the new channels (option A of He et al. 2016)."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_channels))


def _block(channels: int, out: int, *, residual: bool, project: bool) -> BasicBlock:
    stride = out // channels  # twice the channels, half the size
    if not residual:
        return _PlainBlock(channels, out, stride)
    if stride == 1:
        return BasicBlock(channels, out)
    if project:
        shortcut = nn.Sequential(conv1x1(channels, out, stride), nn.BatchNorm2d(out))
    else:
        shortcut = _PadShortcut(out - channels)
    return BasicBlock(channels, out, stride, shortcut)


def _stem(channels: int, width: int, *, deep: bool) -> nn.Sequential:
    if not deep:
        return nn.Sequential(*_conv_norm_relu(channels, width))
    half = (width + 1) // 2
    layers = _conv_norm_relu(channels, half, stride=2)
    layers += _conv_norm_relu(half, half) + _conv_norm_relu(half, width)
    return nn.Sequential(*layers, nn.MaxPool2d(3, stride=2, padding=1))


def _conv_norm_relu(
    channels: int, out: int, kernel: int = 3, stride: int = 1, padding: int = 1
) -> list[nn.Module]:
    # Batch norm has an offset of its own, which makes the one of the convolution idle.
    layer = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
    return [layer, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


def _average(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout))


def _layer(index: int, given: Any) -> dict[str, int]:
    """The complete description of one layer of FullyConvCNN."""
    layer = dict(given) if isinstance(given, Mapping) else {"channels": given}
    unknown = [str(name) for name in layer if name not in _LAYER]
    if unknown:
        raise ValueError(
            f"FullyConvCNN: layers[{index}] has no setting {unknown[0]!r}."
            f"{suggestion(unknown[0], _LAYER)} Known: {', '.join(_LAYER)}."
        )
    layer = {"channels": None, "kernel": 3, "stride": 1, "pool": False} | layer
    kernel = layer["kernel"]
    layer.setdefault("padding", kernel // 2 if isinstance(kernel, int) else 0)
    kinds = {f"layers[{index}].{name}": kind for name, kind in _LAYER.items()}
    check("FullyConvCNN", kinds, {f"layers[{index}].{name}": layer[name] for name in _LAYER})
    return layer


def require_size(owner: str, image_shape: Sequence[int], smallest: int) -> None:
    """Raise ValueError if a side of the images is shorter than the layers need."""
    if min(image_shape[1:]) < smallest:
        raise ValueError(
            f"{owner}: image_shape = {tuple(image_shape)}. Its layers need images of at least "
            f"{smallest}x{smallest} pixels."
        )
