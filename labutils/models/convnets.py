"""Convolutional networks of exercise 1.3, each a chain of named stages, a pool and a head."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, NotRequired

from pydantic import Field
from torch import Tensor, nn

from ..base.settings import Pixels, PositiveInt, check
from .registry import Classes, register

ImageShape = Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]
Widths = Annotated[list[PositiveInt], Field(min_length=1, max_length=30)]  # each halves the size
Layers = Annotated[list[Any], Field(min_length=1)]
_LAYERS = (64, {"channels": 64, "pool": True}, 128, {"channels": 128, "pool": True}, 256, 256)
_OPTIONAL = {"kernel": PositiveInt, "stride": PositiveInt, "padding": Pixels, "pool": bool}
_LAYER = {"channels": PositiveInt} | {key: NotRequired[kind] for key, kind in _OPTIONAL.items()}


class ConvNet(nn.Module):
    """What transfer and explanation rely on: logits = head(pool(features(images))).

    stages: name -> module, in order: stage1, stage2, ..., and what a network adds. pool: turns
        their output into the head's input [n, F], without parameters.
    Takes float images [n, C, H, W]; image_shape is (C, H, W). Returns logits [n, num_classes].
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

    def train(self, mode: bool = True) -> "ConvNet":
        """As in torch; but a stage that is frozen as a whole stays in evaluation mode."""
        super().train(mode)
        for stage in self.stages.values():
            trained = [parameter.requires_grad for parameter in stage.parameters()]
            if trained and not any(trained):
                stage.eval()
        return self


@register
class SimpleCNN(ConvNet):
    """Convolution 3x3, ReLU, max-pool for each width; then a stage `hidden`: linear, ReLU."""

    def __init__(
        self, image_shape: ImageShape, num_classes: Classes, *, widths: Widths = (32, 64)
    ) -> None:
        require_size("SimpleCNN", image_shape, 2 ** len(widths))
        channels, height, width = image_shape
        stages: dict[str, nn.Module] = {}
        for number, out in enumerate(widths, start=1):
            conv = nn.Conv2d(channels, out, 3, padding=1)
            stages[f"stage{number}"] = nn.Sequential(conv, nn.ReLU(inplace=True), nn.MaxPool2d(2))
            channels, height, width = out, height // 2, width // 2
        flat = nn.Linear(channels * height * width, 256)
        stages["hidden"] = nn.Sequential(nn.Flatten(), flat, nn.ReLU())
        super().__init__(stages, nn.Identity(), nn.Linear(256, num_classes))


@register
class CNN(ConvNet):
    """Two times (convolution 3x3, batch norm, ReLU), then max-pool, for each width.

    Global average pooling, dropout of 30 % and a linear layer classify.
    """

    def __init__(
        self, image_shape: ImageShape, num_classes: Classes, *, widths: Widths = (64, 128, 256)
    ) -> None:
        require_size("CNN", image_shape, 2 ** len(widths))
        stages = {}
        for number, (before, width) in enumerate(pairwise([image_shape[0], *widths]), start=1):
            layers = conv_norm_relu(before, width) + conv_norm_relu(width, width)
            stages[f"stage{number}"] = nn.Sequential(*layers, nn.MaxPool2d(2))
        super().__init__(stages, global_average(0.3), nn.Linear(widths[-1], num_classes))


@register
class FullyConvCNN(ConvNet):
    """Convolution, batch norm, ReLU, dropout and perhaps max-pool for each layer of a list.

    Global average pooling and a linear layer classify, so that class activation maps (Zhou et al.
    2016, https://arxiv.org/abs/1512.04150) are exact. Each layer is a stage. Training drops 10 % of
    its maps as a whole (Tompson et al. 2015, https://arxiv.org/abs/1411.4280).
    layers: each a number of channels, or a dict of channels and, where wanted, kernel (default 3),
        stride (1), padding (kernel // 2) and pool (False; True halves the size).
    """

    def __init__(
        self, image_shape: ImageShape, num_classes: Classes, *, layers: Layers = _LAYERS
    ) -> None:
        channels, *size = image_shape
        stages = {}
        for index, given in enumerate(layers):
            layer = given if isinstance(given, dict) else {"channels": given}
            layer = check(f"FullyConvCNN: layers[{index}]", _LAYER, layer)
            out, kernel, stride = layer["channels"], layer.get("kernel", 3), layer.get("stride", 1)
            padding, pool = layer.get("padding", kernel // 2), layer.get("pool", False)
            before = "x".join(map(str, size))
            size = [((side + 2 * padding - kernel) // stride + 1) // (1 + pool) for side in size]
            if min(size) < 1:
                problem = f"layers[{index}] = {given!r} leaves nothing of {before} pixels"
                hint = f"Shrink less before it, or enlarge image_shape = {tuple(image_shape)}"
                raise ValueError(f"FullyConvCNN: {problem}. {hint}.")
            parts = conv_norm_relu(channels, out, kernel, stride, padding)
            parts += [nn.Dropout2d(0.1), *([nn.MaxPool2d(2)] if pool else [])]
            stages[f"stage{index + 1}"] = nn.Sequential(*parts)
            channels = out
        super().__init__(stages, global_average(), nn.Linear(channels, num_classes))


def conv_norm_relu(channels: int, out: int, kernel=3, stride=1, padding=1) -> list[nn.Module]:
    """Convolution, batch norm and ReLU: maps [n, channels, H, W] to [n, out, h, w]."""
    # Batch norm adds an offset of its own, so a bias would have no effect.
    layer = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
    return [layer, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


def global_average(dropout: float = 0.0) -> nn.Sequential:
    """Maps [n, C, h, w] to their means [n, C], of which training drops a fraction."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout))


def require_size(owner: str, image_shape: Sequence[int], smallest: int) -> None:
    """Raise ValueError if a side of the images is shorter than the layers need."""
    if min(image_shape[1:]) < smallest:
        needed = f"at least {smallest}x{smallest} pixels"
        raise ValueError(f"{owner}: image_shape = {tuple(image_shape)}. Give {needed}.")
