"""Class activation maps: where in an image a network finds what speaks for a class."""

import contextlib
import copy
import importlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import InstanceOf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from ..base.settings import check
from ..models.convnets import ConvNet
from ..models.registry import evaluating

# Of the package grad-cam, https://github.com/jacobgil/pytorch-grad-cam.
METHODS = {
    "gradcam": "GradCAM",  # Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391
    "gradcam++": "GradCAMPlusPlus",  # Chattopadhay et al. 2018, https://arxiv.org/abs/1710.11063
    "hirescam": "HiResCAM",  # Draelos and Carin 2020, https://arxiv.org/abs/2011.08891
    "layercam": "LayerCAM",  # Jiang et al. 2021, https://doi.org/10.1109/TIP.2021.3089943
    "eigencam": "EigenCAM",  # Muhammad and Yeasin 2020, https://arxiv.org/abs/2008.00299
    "scorecam": "ScoreCAM",  # Wang et al. 2020, https://arxiv.org/abs/1910.01279
}
_PIXELS = 2**18  # at once, whose maps stay in the cache of a processor: 16 images of 128 px


@dataclass(frozen=True)
class Explanation:
    """One map an image, and what the network says of the image."""

    raw: Tensor  # float32 [N, h, w], signed, at the size of the layer
    classes: Tensor  # int64 [N], the class that is explained
    predicted: Tensor  # int64 [N]
    confidence: Tensor  # float32 [N], the softmax probability of the predicted class
    size: tuple[int, int]  # (H, W) of the images

    @property
    def maps(self) -> Tensor:
        """The positive part at the size of the images, bilinear, its maximum 1: [N, H, W]."""
        maps = self.raw.clamp(min=0)[:, None]
        maps = F.interpolate(maps, self.size, mode="bilinear", align_corners=False)[:, 0]
        return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)


def class_activation_map(
    model: nn.Module, images: Tensor, class_idx: int | Tensor | None = None
) -> Explanation:
    """Plain CAM (Zhou et al. 2016, https://arxiv.org/abs/1512.04150), exact and without gradients.

    images: normalised, float [N, C, H, W]. class_idx: one class, or int64 [N]; None: as predicted.
    The raw map is the last maps weighted by the head, in logits: its mean plus the head's bias is
    the logit. Raises ValueError for a network that does not average its last maps before a linear
    head, for images or classes that do not fit, and for logits that are not finite.
    """
    _check_images(model, images)
    pool = model.pool.modules() if isinstance(model, ConvNet) else ()
    averages = any(
        isinstance(p, nn.AdaptiveAvgPool2d) and p.output_size in (1, (1, 1)) for p in pool
    )
    if not averages or type(model.head) is not nn.Linear:
        kind, others = type(model).__name__, ", ".join(METHODS)
        problem = f"{kind} does not average its last maps before a linear head"
        raise ValueError(f"class_activation_map: {problem}. Choose another method: {others}.")
    wanted = _wanted(class_idx, len(images), model.head.out_features)
    raws, logits = [], []
    with evaluating(model, images):
        for batch, classes in _batches(images, wanted):
            features = model.features(batch)
            logits.append(model.head(model.pool(features)).float())
            chosen = torch.where(classes < 0, logits[-1].argmax(1).cpu(), classes)
            weights = model.head.weight[chosen.to(batch.device)].to(features.dtype)
            raws.append(torch.einsum("nchw,nc->nhw", features, weights).float())
    return _explanation(raws, logits, wanted, images)


@torch.inference_mode(False)
def explain(
    model: nn.Module,
    images: Tensor,
    method: str = "gradcam",
    layer: str | None = None,
    class_idx: int | Tensor | None = None,
) -> Explanation:
    """A map by a method of the package grad-cam; returns what class_activation_map does.

    images: float [N, C, H, W], normalised; class_idx: as there. method: a key of METHODS, or 'cam'
        for class_activation_map itself, at the last stage. layer: of the others, a module whose
        output is maps, as named in model.named_modules(); None: the last stage whose maps have
        more than one pixel.
    The raw map is the package's before it cuts off what is negative and rescales each image. The
    model is left as it was: mode, gradients, what is frozen, hooks, also after an error.
    Raises ValueError for a method or layer that does not exist, a layer that has no maps or is
    used twice, and as above.
    """
    kinds = {"method": Literal[*METHODS, "cam"], "layer": str | None}
    check("explain", kinds, {"method": method, "layer": layer})
    if method == "cam":
        if layer is not None:
            problem = f"layer = {layer!r}, where 'cam' takes the last stage"
            hint = f"Leave it, or choose another method: {', '.join(METHODS)}"
            raise ValueError(f"explain: {problem}. {hint}.")
        return class_activation_map(model, images, class_idx)
    _check_images(model, images)
    if images.dtype.itemsize < 4:  # the package computes with NumPy
        problem = f"model and images are {images.dtype}, which grad-cam cannot take"
        raise ValueError(f"explain: {problem}. Give model.float() and images.float().")
    name, num_classes = _layer(model, images, layer)
    wanted = _wanted(class_idx, len(images), num_classes)
    package = importlib.import_module("pytorch_grad_cam")
    of_class = package.utils.model_targets.ClassifierOutputTarget
    # A copy, so that the model stays as it is, whatever happens in here. Gradients begin at the
    # layer: nothing below it needs one, and the layers above it are the cheap ones.
    model = copy.deepcopy(model).eval().requires_grad_(False)
    target = model.get_submodule(name)
    target.register_forward_hook(lambda _, __, maps: maps.requires_grad_(True))
    raws, logits = [], []
    cam = getattr(package, METHODS[method])(model=model, target_layers=[target])
    # After its hooks, which keep the maps: the next layer may write over what it is given.
    target.register_forward_hook(lambda _, __, maps: maps.clone())
    compute = cam.get_cam_image

    def keep(images, layer, targets, maps, *others):
        raws.append(torch.as_tensor(compute(images, layer, targets, maps, *others)).float())
        if method == "eigencam":  # a singular vector has no sign: high is where the maps are
            alike = (raws[-1] * torch.as_tensor(maps).sum(1)).sum((1, 2), keepdim=True)
            raws[-1] *= torch.where(alike < 0, -1.0, 1.0)
        return raws[-1].numpy()

    cam.get_cam_image = keep
    # Score-CAM shows the network an image once for each of its maps, all of a batch at a time.
    for batch, classes in _batches(images, wanted, 1 if method == "scorecam" else None):
        targets = None if class_idx is None else [of_class(c) for c in classes.tolist()]
        # Score-CAM draws a bar an image.
        with torch.enable_grad(), contextlib.redirect_stderr(io.StringIO()):
            cam(input_tensor=batch, targets=targets)
        logits.append(cam.outputs.detach().float())
    # A cycle, which would keep the graph. Hooks go with cam; `with cam:` swallows an IndexError.
    del cam.get_cam_image
    return _explanation(raws, logits, wanted, images)


def _batches(images: Tensor, wanted: Tensor, count=None) -> Iterator[tuple[Tensor, Tensor]]:
    count = count or max(1, _PIXELS // images[0, 0].numel())
    return zip(images.detach().split(count), wanted.split(count))


def _wanted(class_idx: int | Tensor | None, count: int, num_classes: int) -> Tensor:
    """The class to explain for each image, -1 for the predicted one: int64 [N], on the CPU."""
    if class_idx is None:
        return torch.full((count,), -1)
    try:
        wanted = torch.as_tensor(class_idx).cpu()
    except (RuntimeError, TypeError, ValueError):  # a class's name, say
        wanted = torch.empty(0)
    whole = not wanted.is_floating_point() and wanted.dtype != torch.bool
    fits = whole and wanted.shape in ((), (count,))
    if not (fits and ((wanted >= 0) & (wanted < num_classes)).all()):
        given = class_idx.tolist() if isinstance(class_idx, Tensor) else class_idx
        allowed = f"0 to {num_classes - 1}, one for all or one for each of {count} images"
        raise ValueError(f"class_idx = {given!r}. Give whole numbers from {allowed}.")
    return wanted.long().expand(count)


def _explanation(raws, logits, wanted: Tensor, images: Tensor) -> Explanation:
    logits = torch.cat(logits)
    if len(bad := (~logits.isfinite().all(dim=1)).nonzero()):
        problem = f"the model's logits are not finite for image {int(bad[0])}"
        raise ValueError(f"{problem}. Check its weights, and that the images are normalised.")
    confidence, predicted = logits.softmax(dim=1).amax(dim=1), logits.argmax(dim=1)
    wanted = wanted.to(predicted.device)
    classes = torch.where(wanted < 0, predicted, wanted)
    raw = torch.cat(raws).to(images.device)
    return Explanation(raw, classes, predicted, confidence, tuple(images.shape[2:]))


def _check_images(model: nn.Module, images: Tensor) -> None:
    check("explain", {"model": InstanceOf[nn.Module]}, {"model": model})
    if not (isinstance(images, Tensor) and images.ndim == 4 and images.is_floating_point()):
        kind = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else images
        needed = "normalised images, float [N, C, H, W]; one image is images[None]"
        raise ValueError(f"images are {kind}. Give {needed}.")
    if not len(images):
        raise ValueError("images: there are none. Give at least one.")
    first = next(model.parameters(), images)
    if (images.dtype, images.device) != (first.dtype, first.device):
        problem = f"images are {images.dtype} on {images.device}"
        wanted = f"{first.dtype} on {first.device}, as the model is"
        raise ValueError(f"{problem}. Give {wanted}: images.to(next(model.parameters())).")
    parts = model.modules() if isinstance(model, ConvNet) else ()  # in the order of their use
    channels = next((m.in_channels for m in parts if isinstance(m, nn.Conv2d)), None)
    if channels not in (None, images.shape[1]):
        problem = f"images have {images.shape[1]} channels, the model takes {channels}"
        hint = "Give the images that it was made for"
        if images.shape[1] == 1:
            hint = f"Repeat the channel of grey images: images.expand(-1, {channels}, -1, -1)"
        raise ValueError(f"{problem}. {hint}.")


def layers_with_maps(model: nn.Module, images: Tensor) -> tuple[dict[str, nn.Module], int]:
    """The modules whose output is maps of more than a pixel, by name; and the number of classes.

    Without those that are used twice, as the ReLU of a residual block: which maps would be meant?
    """
    seen: Counter[nn.Module] = Counter()

    def note(part, inputs, output):
        if isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() > 1:
            seen[part] += 1

    with register_module_forward_hook(note), evaluating(model, images):
        logits = model(images[:1])
    if getattr(logits, "ndim", None) != 2:
        found = getattr(logits, "shape", type(logits).__name__)
        raise ValueError(f"explain: the model returned {found}, not logits [N, num_classes].")
    named = model.named_modules()
    return {name: part for name, part in named if name and seen[part] == 1}, logits.shape[1]


def _layer(model: nn.Module, images: Tensor, name: str | None) -> tuple[str, int]:
    """The name of a module whose output is maps, else ValueError; and the number of classes."""
    spatial, num_classes = layers_with_maps(model, images)
    stages = [each for each in spatial if each.startswith("stages.") and each.count(".") == 1]
    name = stages[-1] if name is None and stages else name
    if name not in spatial:
        known = ", ".join(spatial) or "none; choose a convolutional network"
        problem = "has no maps or does not exist, or is used twice"
        given = "is not given" if name is None else f"= {name!r} {problem}"
        raise ValueError(f"explain: layer {given}. Layers with maps: {known}.")
    return name, num_classes
