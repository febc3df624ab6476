"""Whether a map tells the truth: against known objects, removed pixels and broken networks."""

import copy
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from pydantic import InstanceOf
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn import functional as F

from ..base.device import own_random_numbers
from ..base.settings import check
from ..models.registry import in_mode


def random_maps(n: int, size: tuple[int, int], *, blur: float = 0.0, seed: int = 0) -> Tensor:
    """Maps that know nothing: uniform noise, float32 [n, H, W] in [0, 1].

    blur: standard deviation in pixels of a Gaussian that smooths it. A measure that blurred noise
    does well in favours smooth maps, whatever they show.
    """
    noise = np.random.default_rng(seed).random((n, *size), dtype=np.float32)
    maps = torch.from_numpy(gaussian_filter(noise, (0, blur, blur)))
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)  # a single pixel is 0


def centre_prior(n: int, size: tuple[int, int]) -> Tensor:
    """Maps that know photographers: highest in the centre, 0 in the corners, float32 [n, H, W]."""
    sides = [torch.linspace(-1, 1, side) if side > 1 else torch.zeros(1) for side in size]
    distance = torch.hypot(sides[0][:, None], sides[1])
    return (1 - distance / distance.max().clamp(min=1e-12)).expand(n, -1, -1).clone()


def localisation(maps: Tensor, masks: Tensor) -> pd.DataFrame:
    """How well maps [N, H, W], not negative, find objects, bool [N, H, W]: one row an image.

    pointing: whether the maximum lies on the object (Zhang et al. 2018,
        https://arxiv.org/abs/1608.00507). energy: the share of the map that does. recall: the share
        of the object under the highest pixels, as many as it has. chance: the object's share of
        the image, which a map of noise gets on the average in all three.
    Raises ValueError for shapes that differ, negative maps, and masks without an object.
    """
    kinds = dict.fromkeys(["maps", "masks"], InstanceOf[Tensor])
    check("localisation", kinds, {"maps": maps, "masks": masks})
    if maps.shape != masks.shape or maps.ndim != 3:
        shapes = f"{list(maps.shape)} and {list(masks.shape)}"
        raise ValueError(f"localisation: maps and masks are {shapes}. Give [N, H, W] for both.")
    places = ranks(maps).flatten(1)
    maps, masks = maps.flatten(1).cpu().double(), masks.flatten(1).cpu().bool()
    if not ((maps >= 0).all() and masks.any(1).all()):
        problem = "localisation: a map is negative somewhere, or a mask is empty"
        raise ValueError(f"{problem}. Give the positive part, and images with object.")
    # A map of zeros says nothing: like noise, it has the share of the object.
    total, area = maps.sum(1), masks.sum(1)
    chance = area / masks.shape[1]
    energy = torch.where(total > 0, (maps * masks).sum(1) / total.clamp(min=1e-300), chance)
    columns = {"pointing": (masks & (places == 0)).any(1).double(), "energy": energy}
    columns |= {"recall": (masks & (places < area[:, None])).sum(1) / area, "chance": chance}
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()})


def grow(masks: Tensor, pixels: int) -> Tensor:
    """Masks, bool [N, H, W], with all that lies within so many pixels of them, diagonally too."""
    near = F.max_pool2d(masks[:, None].float(), 2 * pixels + 1, stride=1, padding=pixels)
    return near[:, 0].bool()


def mosaics(images: Tensor) -> Tensor:
    """Four images [4 n, C, H, W] each in the quadrants of one: [n, C, 2 H, 2 W], row by row."""
    if len(images) % 4:
        raise ValueError(f"mosaics: there are {len(images)} images. Give a multiple of four.")
    rows = images.unflatten(0, (-1, 2, 2))  # [n, down, right, C, H, W]
    return rows.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def quadrant(maps: Tensor, index: int) -> Tensor:
    """The mask of a mosaic's quadrant 0 to 3, for maps [n, 2 H, 2 W]: bool, of the same shape."""
    mask = torch.zeros(maps.shape, dtype=torch.bool)
    down, right = divmod(index, 2)
    mask.unflatten(2, (2, -1)).unflatten(1, (2, -1))[:, down, :, right] = True
    return mask


def ranks(maps: Tensor) -> Tensor:
    """The place of each pixel in the order of its map [N, H, W], 0 for the highest: int64.

    Among equal pixels the order is random, another for each map, lest a flat one be credited.
    """
    values = maps.flatten(1).cpu()
    order = torch.from_numpy(np.random.default_rng(0).random(values.shape)).argsort(dim=1)
    shuffled = values.gather(1, order).argsort(dim=1, descending=True, stable=True)
    ranked = order.gather(1, shuffled)
    return ranked.argsort(dim=1).view_as(maps)


def removal(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    *,
    fill: Callable[[Tensor, Tensor], Tensor],
    steps: int = 10,
    keep: bool = False,
) -> pd.DataFrame:
    """The probability of a class as pixels are taken away, the highest of the map first.

    images: normalised, float [N, C, H, W]. maps: [N, H, W]. classes: int64 [N].
    fill: (images, gone), bool [N, 1, H, W], to images with something else where they are gone.
    keep: begin with nothing and add the highest pixels instead.
    One row an image, a column for each fraction of the pixels that are taken or added, 0 to 1;
    their mean stands for the area under the curve (deletion and insertion of Petsiuk et al. 2018,
    https://arxiv.org/abs/1806.07421; ROAD of Rong et al. 2022, https://arxiv.org/abs/2202.00449,
    depends on the fill alone). Raises ValueError for shapes that do not fit each other, and for a
    class without a logit.
    """
    if maps.shape != (len(classes), *images.shape[2:]) or len(classes) != len(images):
        shapes = f"{list(images.shape)}, {list(maps.shape)} and {list(classes.shape)}"
        needed = "[N, C, H, W], [N, H, W] and [N]"
        raise ValueError(f"removal: images, maps and classes are {shapes}. Give {needed}.")
    ranked, pixels, curves = ranks(maps)[:, None], maps[0].numel(), {}
    with in_mode(model, training=False), torch.inference_mode():
        for fraction in np.linspace(0, 1, steps + 1):
            highest = (ranked < round(fraction * pixels)).to(images.device)
            gone = ~highest if keep else highest
            changed = fill(images, gone)
            logits = torch.cat([model(batch).float() for batch in changed.split(64)])
            if not ((classes >= 0) & (classes < logits.shape[1])).all():
                problem = f"classes = {classes.tolist()} with {logits.shape[1]} logits an image"
                raise ValueError(f"removal: {problem}. Give 0 to {logits.shape[1] - 1}.")
            probability = logits.softmax(dim=1).gather(1, classes[:, None].to(images.device))
            curves[round(float(fraction), 4)] = probability[:, 0].cpu().numpy()
    return pd.DataFrame(curves)


def fill_grey(images: Tensor, gone: Tensor) -> Tensor:
    """The mean pixel where something is gone; images are normalised, so that it is 0."""
    return images * ~gone


def fill_blurred(images: Tensor, gone: Tensor) -> Tensor:
    """A strongly blurred image where something is gone, which leaves no edges."""
    size = max(3, min(images.shape[2:]) // 4 * 2 + 1)
    down, right = (_box_twice(side, size).to(images) for side in images.shape[2:])
    blurred = down.T @ images @ right
    return torch.where(gone, blurred, images)


def _box_twice(side: int, size: int) -> Tensor:
    """What turns a row of pixels into means of `size` mirrored neighbours, twice: [side, side].

    Twice a box is near enough to a Gaussian; as a matrix it costs the same for every size.
    """
    padded = F.pad(torch.eye(side)[None], (size // 2, size // 2), mode="reflect")
    box = F.avg_pool1d(padded, size, stride=1)[0]
    return box @ box


def fill_from_neighbours(images: Tensor, gone: Tensor) -> Tensor:
    """ROAD's: each missing pixel is the weighted mean of its eight neighbours, and a little noise.

    Solved image by image, by the package grad-cam, on the CPU.
    """
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    impute, filled = NoisyLinearImputer(noise=0.01), []
    with own_random_numbers(0), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it hands tensors to NumPy
        for image, missing in zip(images.cpu(), gone[:, 0].cpu()):
            # Where all is missing, no neighbour knows anything.
            some = missing.any() and not missing.all()
            filled.append(impute(image, (~missing).float()) if some else image * ~missing)
    return torch.stack(filled).to(images.device)


def rank_correlation(maps: Tensor, others: Tensor) -> np.ndarray:
    """Spearman's of each map with the other of its image, both float [N, h, w]: float [N].

    0 where one of the two is the same everywhere. Raises ValueError for shapes that differ.
    """
    if maps.shape != others.shape:
        shapes = f"{list(maps.shape)} and {list(others.shape)}"
        raise ValueError(f"rank_correlation: maps are {shapes}. Give the same size for both.")
    tables = (pd.DataFrame(values.flatten(1).cpu().numpy()) for values in (maps, others))
    ranks, others_ranks = (table.rank(axis=1) for table in tables)
    return ranks.corrwith(others_ranks, axis=1).fillna(0).to_numpy()


def randomisation(
    model: nn.Module, explain: Callable[[nn.Module], Tensor], *, seed: int = 0
) -> pd.DataFrame:
    """Do maps change when the network forgets (Adebayo et al. 2018, https://arxiv.org/abs/1810.03292)?

    Layers get fresh weights, one after the other from the head down, and after each the maps are
    compared with those of the trained network. explain: a network -> maps [N, h, w].
    One row a layer, named as in named_modules, a column an image: Spearman's rank correlation.
    The model itself is left alone.
    """
    broken, rows = copy.deepcopy(model), {}
    original = explain(broken)
    with own_random_numbers(seed):
        for name, layer in reversed(list(broken.named_modules())):
            if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                layer.reset_parameters()
                if not isinstance(layer, nn.BatchNorm2d):
                    rows[name] = rank_correlation(original, explain(broken))
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")
