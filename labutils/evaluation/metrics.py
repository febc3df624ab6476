"""How good a classifier is on a split: one pass over the images, then torchmetrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base.device import autocast, usable_precision
from ..base.settings import Precision, check
from ..data.tensors import Split
from ..models.registry import evaluating

CALIBRATION_BINS = 15  # as in Guo et al. 2017, https://arxiv.org/abs/1706.04599


@dataclass(frozen=True)
class Metrics:
    """Scores of a classifier on one split: fractions in [0, 1], loss in nats."""

    n: int
    loss: float
    accuracy: float
    accuracy_interval: tuple[float, float]  # Wilson's 95 % interval for n images
    top_k: int
    top_k_accuracy: float
    precision: float  # this and the next two: mean over classes, weighted by their share
    recall: float
    f1: float
    calibration_error: float  # expected |confidence - accuracy|, 15 equal bins
    per_class: list[float]  # accuracy within each class
    confusion: list[list[int]]  # [true class][predicted class], images

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Metrics:
        return cls(**{**values, "accuracy_interval": tuple(values["accuracy_interval"])})

    def __str__(self) -> str:
        low, high = self.accuracy_interval
        return (
            f"accuracy {100 * self.accuracy:.2f} % [{100 * low:.2f}, {100 * high:.2f}], "
            f"loss {self.loss:.4f}, n = {self.n:,}"
        )


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int = 1024,
    top_k: int = 5,
    precision: str = "float32",
    tta: bool = False,
) -> Metrics:
    """Score a classifier on one split.

    split: images uint8 [N, C, H, W], labels int64 [N], on any device.
    precision, tta: as for predict.
    Returns Metrics; loss is mean cross-entropy in nats, accuracies are fractions in [0, 1].
    Raises ValueError if the split is empty or the model's output is not [N, num_classes].
    """
    options = {"batch_size": batch_size, "precision": precision, "tta": tta}
    return score(predict(model, split, **options), split.labels, top_k=top_k)


@torch.inference_mode()
def predict(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int = 1024,
    precision: str = "float32",
    tta: bool = False,
) -> Tensor:
    """Logits float32 [N, num_classes] on the device of the split; the model's mode is kept.

    precision: as in TrainConfig; float32 also where bf16 would be emulated.
    tta: test-time augmentation, the mean of the logits of each image and of its mirror image.
    Raises ValueError if the split is empty, the model's output is not [N, num_classes] or the
    precision is none.
    """
    if not len(split):
        raise ValueError("evaluate: the split is empty. Give one with at least one image.")
    check("evaluate", {"precision": Precision}, {"precision": precision})
    parameter = next(model.parameters(), None)
    device = split.images.device if parameter is None else parameter.device
    logits = []
    with evaluating(model), autocast(usable_precision(precision, device), device):
        for images, _ in split.batches(batch_size):
            images = images.to(device)
            found = model(images)
            logits.append((found.float() + model(images.flip(-1)).float()) / 2 if tta else found)
    if logits[0].ndim != 2 or len(logits[0]) != min(batch_size, len(split)):
        raise ValueError(
            f"evaluate: the model returned shape {list(logits[0].shape)} for a batch. "
            "A classifier returns logits [N, num_classes]."
        )
    return torch.cat(logits).float().to(split.images.device)


def loss_and_accuracy(
    model: nn.Module, split: Split, *, precision: str = "float32"
) -> tuple[float, float]:
    """Mean cross-entropy in nats and the fraction of hits: what training looks at every epoch."""
    logits = predict(model, split, precision=precision)
    hits = (logits.argmax(dim=1) == split.labels).float().mean()
    return F.cross_entropy(logits, split.labels).item(), hits.item()


def score(logits: Tensor, labels: Tensor, *, top_k: int = 5) -> Metrics:
    """Metrics from logits float [N, num_classes] and labels int64 [N].

    Raises ValueError if shapes disagree or a label has no column.
    """
    from scipy.stats import binomtest
    from torchmetrics.functional import classification as tm

    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"score: logits {list(logits.shape)} and labels {list(labels.shape)}. "
            "Needed: [N, num_classes] and [N] with N >= 1."
        )
    n, num_classes = logits.shape
    if int(labels.max()) >= num_classes:
        raise ValueError(
            f"score: label {int(labels.max())} with {num_classes} logits an image. "
            "The model needs one output for each class of the data."
        )
    # From the logits: softmax rounds, and can make two of them equal.
    preds, top_k = logits.argmax(dim=1), min(top_k, num_classes)
    # Below 1, because torchmetrics counts confidences of exactly 1 in a bin of their own.
    probs = logits.softmax(dim=1).clamp(max=1 - 2**-24)
    confusion = tm.multiclass_confusion_matrix(preds, labels, num_classes)
    hits = int(confusion.diagonal().sum())
    interval = binomtest(hits, n).proportion_ci(method="wilson")
    weighted = {"num_classes": num_classes, "average": "weighted"}
    # Stable like argmax, so that among equal logits the first is taken, on every machine.
    best = logits.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return Metrics(
        n=n,
        loss=F.cross_entropy(logits, labels).item(),
        accuracy=hits / n,
        accuracy_interval=(float(interval.low), float(interval.high)),
        top_k=top_k,
        top_k_accuracy=(best == labels[:, None]).any(dim=1).float().mean().item(),
        precision=tm.multiclass_precision(preds, labels, **weighted).item(),
        recall=tm.multiclass_recall(preds, labels, **weighted).item(),
        f1=tm.multiclass_f1_score(preds, labels, **weighted).item(),
        calibration_error=tm.multiclass_calibration_error(
            probs, labels, num_classes, n_bins=CALIBRATION_BINS
        ).item(),
        per_class=(confusion.diagonal() / confusion.sum(dim=1).clamp(min=1)).tolist(),
        confusion=confusion.tolist(),
    )


def reliability(logits: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """The bins of a reliability diagram that hold images: confidence, accuracy, images.

    logits float [N, num_classes], labels int64 [N]. confidence and accuracy are means in the bin,
    fractions; 15 equal bins, as in calibration_error.
    """
    labels = labels.cpu()
    confidence, preds = logits.cpu().softmax(dim=1).max(dim=1)
    bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    images = torch.bincount(bins, minlength=CALIBRATION_BINS)
    sums = {
        "confidence": torch.bincount(bins, confidence.double(), CALIBRATION_BINS),
        "accuracy": torch.bincount(bins, (preds == labels).double(), CALIBRATION_BINS),
    }
    filled = images > 0
    means = {name: (total[filled] / images[filled]).tolist() for name, total in sums.items()}
    return {**means, "images": images[filled].tolist()}
