"""A network made to reach 94 % on CIFAR-10 in the least time, and its whitening first layer."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .convnets import ConvNet, ImageShape, Widths, require_size
from .registry import Classes, register


@register
class FastNet(ConvNet):
    """94 % on CIFAR-10 in the least time. Call whiten() before training, which leaves its weights.

    From David Page, https://myrtle.ai/learn/how-to-train-your-resnet-8-bag-of-tricks/: the first
    convolution whitens small patches; batch norm learns an offset alone and comes after pooling;
    the largest value of each last map goes into the head, whose logits are scaled down. From
    https://github.com/tysam-code/hlb-CIFAR10: patches of 2x2 without padding, GELU, statistics that
    forget 40 % a step, scale 1/9. From Keller Jordan, https://arxiv.org/abs/2404.00498 and
    https://github.com/KellerJordan/cifar10-airbench: each whitening filter also negated, so that
    nothing is lost in the activation; two convolutions a stage, which start out as the identity.
    """

    def __init__(
        self, image_shape: ImageShape, num_classes: Classes, *, widths: Widths = (64, 256, 256)
    ) -> None:
        require_size("FastNet", image_shape, 2 ** len(widths) + 1)
        # Two filters, one the negative of the other, for each of the 4 C values in a patch.
        channels = 8 * image_shape[0]
        whiten = nn.Conv2d(image_shape[0], channels, 2)
        whiten.weight.requires_grad_(False)
        nn.init.zeros_(whiten.bias)
        stages = {"whiten": nn.Sequential(whiten, nn.GELU())}
        for number, (before, width) in enumerate(pairwise([channels, *widths]), start=1):
            first = [_identity_conv(before, width), nn.MaxPool2d(2), _offset_norm(width)]
            second = [_identity_conv(width, width), _offset_norm(width)]
            stages[f"stage{number}"] = nn.Sequential(*first, nn.GELU(), *second, nn.GELU())
        pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
        super().__init__(stages, pool, _ScaledLinear(widths[-1], num_classes, bias=False))

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Make the first layer whiten 2x2 patches of images like these.

        images: normalised training images, float [n, C, H, W], a few thousand; else ValueError.
        A filter is an eigenvector of the patches' covariance, divided by the root of its eigenvalue
        + 5e-4 (airbench's number), so that rare noise is not amplified; by decreasing eigenvalue,
        the largest component positive.
        """
        # In double precision: a difference in the last bit would be other weights, another run.
        layer = self.stages["whiten"][0]
        found, fits = type(images).__name__, False
        if isinstance(images, Tensor):  # and no batch, of images and labels
            found = f"{images.dtype} {list(images.shape)}"
            fits = images.ndim == 4 and images.shape[1] == layer.in_channels and len(images) > 0
            fits = fits and images.is_floating_point() and min(images.shape[2:]) > 1
        if not (fits and images.isfinite().all()):
            needed = f"finite float [n, {layer.in_channels}, H, W], n above 0, H and W above 1"
            raise ValueError(f"FastNet.whiten: images are {found}. Give normalised ones, {needed}.")
        count, total, moments = 0, 0, 0
        for chunk in images.split(512):  # all patches at once would take gigabytes
            patches = F.unfold(chunk.cpu().double(), 2).movedim(1, 0).flatten(1)
            count += patches.shape[1]
            total = total + patches.sum(1)
            moments = moments + patches @ patches.T
        covariance = moments / count - (total / count).outer(total / count)
        values, vectors = torch.linalg.eigh(covariance)
        filters = (vectors / (values.clamp(min=0) + 5e-4).sqrt()).T.flip(0)
        filters *= filters.gather(1, filters.abs().argmax(1, keepdim=True)).sign()
        layer.weight.copy_(torch.cat([filters, -filters]).view_as(layer.weight))


class _ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 9


def _identity_conv(channels: int, out: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, out, 3, padding=1, bias=False)
    nn.init.dirac_(layer.weight.detach()[:channels])
    return layer


def _offset_norm(width: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(width, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm
