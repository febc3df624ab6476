"""A network made to reach 94 % on CIFAR-10 in the least time, and its whitening first layer."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .convnets import ConvNet, ImageShape, Widths, require_size
from .registry import Classes, register


@register
class FastNet(ConvNet):
    """94 % on CIFAR-10 in the least time. Call whiten() before training, which skips stage whiten.

    From David Page, https://myrtle.ai/learn/how-to-train-your-resnet-8-bag-of-tricks/: the first
    convolution whitens small patches; batch norm learns an offset alone and comes after pooling;
    the largest value of each last map goes into the head, whose logits are scaled down. From
    https://github.com/tysam-code/hlb-CIFAR10: patches of 2x2 without padding, GELU. From Keller
    Jordan, https://github.com/KellerJordan/cifar10-airbench, https://arxiv.org/abs/2404.00498: each
    whitening filter also negated, so that nothing is lost in the activation; two convolutions a
    stage, which start out as the identity; batch statistics that forget 40 % a step; scale 1/9.

    mirror: give an image and its mirror image the same logits, at no cost (Cohen and Welling 2016,
        https://arxiv.org/abs/1602.07576). Map i + C/2 of the C maps of a stage sees in the mirrored
        image what map i sees, since weights are averaged with their mirrored partners' before they
        are used: half of them are free. Exact where H and W are multiples of 2^(stages); widths
        have to be even.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: Classes,
        *,
        widths: Widths = (64, 256, 256),
        mirror: bool = False,
    ) -> None:
        if mirror and any(width % 2 for width in widths):
            raise ValueError(f"FastNet: widths = {widths}. With mirror=True, each has to be even.")
        smallest = 2 ** (len(widths) + 1) if mirror else 2 ** len(widths) + 1
        require_size("FastNet", image_shape, smallest)
        # Two filters, one the negative of the other, for each of the 4 C values in a patch.
        channels = 8 * image_shape[0]
        whiten = (_MirrorWhitening if mirror else nn.Conv2d)(image_shape[0], channels, 2)
        whiten.weight.requires_grad_(False)
        nn.init.zeros_(whiten.bias)
        stages = {"whiten": nn.Sequential(whiten, nn.GELU())}
        conv = _MirrorConv if mirror else nn.Conv2d
        for number, (before, width) in enumerate(pairwise([channels, *widths]), start=1):
            after_whitening = _MirrorFirst if mirror and number == 1 else conv
            # Windows of three lie evenly on an odd number of pixels, so also on mirrored ones.
            first = [_identity_conv(after_whitening, before, width), nn.MaxPool2d(2 + mirror, 2)]
            first += [_offset_norm(width, mirror), nn.GELU()]
            second = [_identity_conv(conv, width, width), _offset_norm(width, mirror), nn.GELU()]
            stages[f"stage{number}"] = nn.Sequential(*first, *second)
        pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
        head = _MirrorLinear if mirror else _ScaledLinear
        super().__init__(stages, pool, head(widths[-1], num_classes, bias=False))
        self.mirror = mirror

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Make the first layer whiten 2x2 patches of images like these.

        images: normalised training images, float [n, C, H, W], a few thousand; else ValueError.
        A filter is an eigenvector of the patches' covariance, divided by the root of its eigenvalue
        + 5e-4 (airbench's number), so that rare noise is not amplified; by decreasing eigenvalue,
        the largest component positive. A mirroring network averages over mirrored patches, and has
        the filters that negate their mirror images before those that equal them.
        """
        # In double precision: a difference in the last bit would be other weights, another run.
        layer = self.stages["whiten"][0]
        fits = images.ndim == 4 and images.shape[1] == layer.in_channels and images.isfinite().all()
        if not (fits and len(images) and images.is_floating_point() and min(images.shape[2:]) > 1):
            needed = f"finite float [n, {layer.in_channels}, H, W], n above 0, H and W above 1"
            found = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"FastNet.whiten: images are {found}. Give normalised ones, {needed}.")
        count, total, moments = 0, 0, 0
        for chunk in images.split(512):  # all patches at once would take gigabytes
            patches = F.unfold(chunk.cpu().double(), 2).movedim(1, 0).flatten(1)
            count += patches.shape[1]
            total = total + patches.sum(1)
            moments = moments + patches @ patches.T
        covariance = moments / count - (total / count).outer(total / count)
        if self.mirror:
            pixels = torch.eye(len(covariance), dtype=torch.double)
            left, right = pixels[::2], pixels[1::2]
            bases = (left - right) / 2**0.5, (left + right) / 2**0.5
            filters = torch.cat([_whitening(b @ covariance @ b.T) @ b for b in bases])
        else:
            filters = _whitening(covariance)
        layer.weight.copy_(torch.cat([filters, -filters]).view_as(layer.weight))


class _ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 9


def _whitening(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    filters = (vectors / (values.clamp(min=0) + 5e-4).sqrt()).T.flip(0)
    return filters * filters.gather(1, filters.abs().argmax(1, keepdim=True)).sign()


def _identity_conv(kind: type[nn.Conv2d], channels: int, out: int) -> nn.Conv2d:
    layer = kind(channels, out, 3, padding=1, bias=False)
    nn.init.dirac_(layer.weight.detach()[:channels])
    if isinstance(layer, _MirrorConv):
        with torch.no_grad():
            layer.weight.copy_(layer.symmetric() * 2**0.5)  # averaging shrinks what is random
    return layer


def _offset_norm(width: int, mirror: bool) -> nn.BatchNorm2d:
    norm = _PairedNorm(width // 2, momentum=0.4) if mirror else nn.BatchNorm2d(width, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


def _swap_halves(values: Tensor, dim: int) -> Tensor:
    return values.roll(values.shape[dim] // 2, dim)


def _swap_whitening(values: Tensor, dim: int) -> Tensor:
    """Filters and their negatives; a mirror image turns the first half of each into the other's."""
    odd, even, minus_odd, minus_even = values.chunk(4, dim)
    return torch.cat([minus_odd, even, odd, minus_even], dim)


class _MirrorConv(nn.Conv2d):
    """A convolution whose filters are averaged with what their partners' mirror images would be."""

    swap_out, swap_in = staticmethod(_swap_halves), staticmethod(_swap_halves)

    def symmetric(self) -> Tensor:
        mirrored = self.swap_in(self.swap_out(self.weight.flip(3), 0), 1)
        return (self.weight + mirrored) / 2

    def forward(self, maps: Tensor) -> Tensor:
        bias = self.bias if self.bias is None else (self.bias + self.swap_out(self.bias, 0)) / 2
        return self._conv_forward(maps, self.symmetric(), bias)


class _MirrorFirst(_MirrorConv):
    swap_in = staticmethod(_swap_whitening)


class _MirrorWhitening(_MirrorConv):
    swap_out, swap_in = staticmethod(_swap_whitening), staticmethod(lambda values, dim: values)


class _MirrorLinear(nn.Linear):
    """The scaled head with larger weights and a smaller scale: it wants the rate of the offsets."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.weight.detach().mul_(48 / 9)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight + _swap_halves(self.weight, 1)) / 2) / 48


class _PairedNorm(nn.BatchNorm2d):
    """Batch norm in which both maps of a pair share their statistics and their offset."""

    def forward(self, maps: Tensor) -> Tensor:
        # As pixels of one map, side by side, which they are in memory if channels come last.
        n, channels, height, width = maps.shape
        pairs = maps.permute(0, 2, 3, 1).reshape(n, height, 2 * width, channels // 2)
        pairs = super().forward(pairs.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return pairs.reshape(n, height, width, channels).permute(0, 3, 1, 2)
