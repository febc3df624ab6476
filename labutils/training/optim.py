"""What a recipe asks for, and decides: optimizer, learning rate, size of images, when to stop."""

import dataclasses
import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from ..base.settings import TrainConfig, check
from ..data.augmentation import require_fit, resize
from ..data.tensors import ImageData, Split
from ..evaluation.metrics import predict
from ..models.registry import num_parameters, takes_images, training_logits


def require_trainable(model: nn.Module, data: ImageData, config: TrainConfig) -> None:
    """Raise ValueError for what does not fit together; move the model to the data's device."""
    split, shape, classes = data.train, data.image_shape, data.num_classes
    names = Annotated[list[str], Field(min_length=2)]
    check("train", {"data.classes": names}, {"data.classes": list(data.classes)})
    for name in ("train", "val", "test"):  # load_data makes them so, others may not
        images, labels = getattr(data, name).images, getattr(data, name).labels
        numbers = labels.dtype == torch.int64 and not ((labels < 0) | (labels >= classes)).any()
        if images.shape[1:] != shape or (name == "val" and not len(images)):
            problem = f"{name} has images {list(images.shape)}, train {list(split.images.shape)}"
            raise ValueError(f"train: {problem}. Give at least one, all of one size.")
        if labels.shape != images.shape[:1] or not numbers:
            problem = f"{name} has {len(images)} images and {len(labels)} labels, {labels.dtype}"
            allowed = f"one label an image, int64, from 0 to {classes - 1}"
            raise ValueError(f"train: {problem}. Give {allowed}.")
    if config.batch_size > len(split):
        allowed = f"Choose at most {len(split)}, the images of the training split."
        raise ValueError(f"train: batch_size = {config.batch_size}. {allowed}")
    require_fit(config.augment, shape)
    if not num_parameters(model):
        raise ValueError("train: the model has no parameter that requires a gradient.")
    make_optimizer(model, config)
    model.to(split.images.device)
    remedy = f"Build it for data.image_shape, an MLP with in_features={data.num_features}."
    images = split.images[:2]
    outputs = _outputs(model, split, images, remedy)
    # On a GPU this shows late, and takes the whole process with it.
    if outputs != classes:
        problem = f"the model has {outputs} outputs, the data {classes} classes"
        raise ValueError(f"train: {problem}. Build it with num_classes={classes}.")
    if config.batch_size == config.accumulate:
        parts = f"batch_size = {config.batch_size} in {config.accumulate} parts are single images"
        # Batch normalisation has nothing to compare one with.
        with takes_images(f"train: {parts}", "Choose a larger batch_size."):
            training_logits(model, split.normalise(images[:1]))
    if config.image_sizes and {*shape[1:]} != {config.image_sizes[-1]}:
        wanted = f"End at the side of the data's images, which have to be square: {shape[1:]}."
        raise ValueError(f"train: image_sizes = {config.image_sizes}. {wanted}")
    for side in config.image_sizes[:-1]:
        remedy = f"Choose image_sizes above {side}, or a network that takes images of any size."
        _outputs(model, split, resize(images.float(), side), remedy)


def _outputs(model: nn.Module, split: Split, images: Tensor, remedy: str) -> int:
    """How many outputs the model has for the first images; ValueError if it cannot take them."""
    first = dataclasses.replace(split, images=images, labels=split.labels[: len(images)])
    problem = f"train: the model cannot take images of shape {tuple(images.shape[1:])}"
    with takes_images(problem, remedy):
        return predict(model, first).shape[1]


def stop_reason(rows: list[dict[str, float]], config: TrainConfig) -> str | None:
    """Why training ends after these epochs; None if it goes on.

    Stagnation: `patience` epochs without a better config.monitor.
    Overfitting: val loss above its lowest by more than overfit_delta, `overfit_patience` in a row.
    """
    sign = 1 if config.monitor == "val_loss" else -1
    best, waited, lowest, above = math.inf, 0, math.inf, 0
    for row in rows:
        value = sign * row[config.monitor]
        best, waited = (value, 0) if value < best else (best, waited + 1)
        lowest = min(lowest, row["val_loss"])
        above = above + 1 if row["val_loss"] > lowest + config.overfit_delta else 0
    if config.patience and waited >= config.patience:
        return f"stagnation: no better {config.monitor} for {waited} epochs"
    if config.overfit_patience and above >= config.overfit_patience:
        return f"overfitting: val_loss above its best for {above} epochs"
    return f"finished all {config.epochs} epochs" if len(rows) >= config.epochs else None


def lr_factor(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step as a fraction of config.lr; no schedule has a state to save.

    onecycle rises from 1/25 over the first 30 % and falls to almost 0, along cosines, as torch's
    OneCycleLR does (Smith and Topin 2018, https://arxiv.org/abs/1708.07120).
    """
    total = config.epochs * steps_per_epoch
    if config.schedule != "onecycle":
        return 1 - step / total if config.schedule == "linear" else 1.0
    peak = 0.3 * total - 1
    start, end, done = 1, 1 / 25e4, (step - peak) / (total - 1 - peak)
    if step <= peak:
        start, end, done = 1 / 25, 1, step / peak
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """An optimizer over the parameters that require a gradient, fused where torch has it so.

    sgd is with Nesterov momentum 0.9. muon, see below, is for the weights of all layers but the
    last, and decays none. SGD with Nesterov momentum 0.85 takes the last layer's, at head_lr, and
    all vectors, at bias_lr; their weight decay, an L2 term, is scaled to lr * weight_decay a step.
    Each group has a `share`: its learning rate as a fraction of the schedule's. With a stage_decay,
    that of a stage is multiplied by it for each stage between it and the head (Howard and Ruder
    2018, https://arxiv.org/abs/1801.06146). Raises ValueError for muon without such weights, and
    for a stage_decay of a network without stages.
    """
    free = [p for p in model.parameters() if p.requires_grad]
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    common = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "muon":
        weights = [p for p in model.parameters() if p.ndim > 1]
        hidden = [p for p in weights[:-1] if p.requires_grad]
        if not hidden:
            problem = "below its last layer, the model has no weights that require a gradient"
            raise ValueError(f"train: optimizer = 'muon': {problem}. Choose 'sgd' or 'adamw'.")
        head = [p for p in weights[-1:] if p.requires_grad]
        vectors = [p for p in free if p.ndim < 2]
        groups = [{"params": hidden, "hidden": True, "share": 1.0}]
        for params, lr in ((vectors, config.bias_lr), (head, config.head_lr)):
            rest = {"share": lr / config.lr, "weight_decay": config.weight_decay * config.lr / lr}
            groups.append({"params": params, "hidden": False} | rest)
        return Muon(_by_stage(model, config, groups), **common, momentum=0.85, nesterov=True)
    momentum = {"momentum": 0.9, "nesterov": True} if config.optimizer == "sgd" else {}
    groups = _by_stage(model, config, [{"params": free, "share": 1.0}])
    return kinds[config.optimizer](groups, **common, **momentum)


def _by_stage(model: nn.Module, config: TrainConfig, groups: list[dict]) -> list[dict]:
    """Groups of parameters, each split by the shares that config.stage_decay leaves its stages."""
    decay = config.stage_decay
    if decay == 1:
        return groups
    if not isinstance(stages := getattr(model, "stages", None), nn.ModuleDict):
        problem = f"train: stage_decay = {decay}, but {type(model).__name__} has no stages"
        raise ValueError(f"{problem}. Leave it at 1, or take a ConvNet.")
    factors = {}
    for distance, stage in enumerate(reversed(stages.values())):
        factors |= dict.fromkeys(stage.parameters(), decay**distance)
    split = []
    for group in groups:
        of_group = [factors.get(parameter, 1.0) for parameter in group["params"]]
        for factor in sorted(set(of_group), reverse=True):
            params = [p for p, own in zip(group["params"], of_group) if own == factor]
            split.append(group | {"params": params, "share": factor * group["share"]})
    return split


class Muon(torch.optim.SGD):
    """Orthogonalised momentum for the groups that are `hidden`, SGD for the others.

    Jordan 2024, https://kellerjordan.github.io/posts/muon/, in the form of his CIFAR-10 record
    (airbench94_muon, https://github.com/KellerJordan/cifar10-airbench): a filter [out, in, h, w] is
    a row of a matrix [out, in h w]; the norm of the matrix stays what it was, as batch norm cancels
    it; momentum is Nesterov's, 0.6. The learning rate is a step's length over that norm.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            hidden = group["params"] if group["hidden"] else ()
            for weight in (w for w in hidden if w.grad is not None):
                if not self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
                momentum = self.state[weight]["momentum"].mul_(0.6).add_(weight.grad)
                gradient = weight.grad.add(momentum, alpha=0.6)
                change, norm = orthogonalise(gradient.flatten(1)).view_as(weight), weight.norm()
                weight.sub_(change * (group["lr"] * norm / change.norm().clamp(min=1e-7)))
                weight.mul_(norm / weight.norm().clamp(min=1e-7))
                weight.grad = None  # so that SGD leaves it alone
        super().step()


def orthogonalise(matrix: Tensor) -> Tensor:
    """Bring the singular values of a float32 matrix [m, n] near 1: about U V' of U S V'.

    Newton-Schulz: three times, S becomes a S + b S^3 + c S^5 without being computed; coefficients
    and number of steps are those of airbench94_muon. They grow small values fastest, and leave all
    but the smallest between about 0.5 and 1.5.
    """
    x = matrix / matrix.norm().clamp(min=1e-7)  # no singular value above 1
    x = x.T if len(matrix) > matrix.shape[1] else x
    # A step multiplies x from the left by a polynomial of x x', so that all three can be computed
    # of that square matrix: half of the operations for a filter, nine times as wide as high.
    gram, one = x @ x.T, torch.eye(len(x), dtype=x.dtype, device=x.device)
    change = one
    for _ in range(3):
        square = change @ gram @ change
        change = (3.4445 * one - 4.775 * square + 2.0315 * square @ square) @ change
    x = change @ x
    return x.T if len(matrix) > matrix.shape[1] else x
