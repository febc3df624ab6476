"""The perceptrons of exercises 1.1 and 1.2, with and without skips."""

import itertools
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from ..base.settings import Fraction, PositiveInt
from .registry import Classes, register


@register
class MLP(nn.Sequential):
    """Flatten, then linear, (batch norm), ReLU for each width, then linear: [N, ...] to logits.

    hidden: widths; [] is a linear classifier. dropout: fraction of the last layer's input.
    init: 'torch', or 'he': normal weights of variance 2 / inputs in front of a ReLU, which keep the
        size of the signal from layer to layer (He et al. 2015, https://arxiv.org/abs/1502.01852).
    """

    def __init__(
        self,
        in_features: PositiveInt,
        hidden: list[PositiveInt],
        num_classes: Classes,
        *,
        dropout: Fraction = 0.0,
        batch_norm: bool = False,
        init: Literal["torch", "he"] = "torch",
    ) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise([in_features, *hidden]):
            layers += [*_linear(inputs, outputs, batch_norm, init), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        super().__init__(*layers, nn.Linear([in_features, *hidden][-1], num_classes))


class ResidualBlock(nn.Module):
    """ReLU(body(x) + x), a skip over linear layers (He et al. 2016, arxiv.org/abs/1512.03385).

    widths: of the input [N, width], then of each linear layer in the body. A linear bridge without
        bias takes the place of the identity if the first and the last differ.
    dropout: fraction of the input of the body's last linear layer that training drops.
    """

    def __init__(self, widths: Sequence[int], dropout: float = 0.0, batch_norm: bool = False):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [*_linear(inputs, outputs, batch_norm), nn.ReLU()]
        layers.pop()  # the last activation comes after the sum
        if dropout:
            layers.insert(-2 if batch_norm else -1, nn.Dropout(dropout))
        self.body = nn.Sequential(*layers)
        same = widths[0] == widths[-1]
        self.bridge = nn.Identity() if same else nn.Linear(widths[0], widths[-1], bias=False)
        self.relu = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.relu(self.body(inputs) + self.bridge(inputs))


@register
class ResidualMLP(nn.Sequential):
    """The MLP with the same hidden layers, at least two, and skips over blocks of them.

    hidden: the first has no skip; those after it are cut into blocks of `block` layers, the last of
        which takes what is left. Equal widths: as many parameters as in the MLP.
    dropout: as in ResidualBlock.
    """

    def __init__(
        self,
        in_features: PositiveInt,
        hidden: Annotated[list[PositiveInt], Field(min_length=2)],
        num_classes: Classes,
        *,
        block: PositiveInt = 2,
        dropout: Fraction = 0.0,
        batch_norm: bool = False,
    ) -> None:
        layers = [nn.Flatten(), *_linear(in_features, hidden[0], batch_norm), nn.ReLU()]
        for first in range(0, len(hidden) - 1, block):
            layers.append(ResidualBlock(hidden[first : first + block + 1], dropout, batch_norm))
        super().__init__(*layers, nn.Linear(hidden[-1], num_classes))


def _linear(inputs: int, outputs: int, batch_norm: bool, init: str = "torch") -> list[nn.Module]:
    """A linear layer in front of a ReLU, and batch norm if wanted."""
    # Batch norm adds an offset of its own, so a bias would have no effect.
    layer = nn.Linear(inputs, outputs, bias=not batch_norm)
    if init == "he":
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return [layer, nn.BatchNorm1d(outputs)] if batch_norm else [layer]
