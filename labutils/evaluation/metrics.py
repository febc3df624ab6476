"""How good a classifier is on a split: one pass over the images, then torchmetrics."""

import base64
from dataclasses import asdict, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import InstanceOf
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from ..base.device import autocast, usable_precision
from ..base.settings import PositiveInt, Precision, check
from ..data.tensors import Split
from ..models.registry import in_mode

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, config={"extra": "forbid"})
class Metrics:
    """How good a classifier is on one split: fractions in [0, 1], loss in nats."""

    n: int
    loss: float
    accuracy: float
    accuracy_interval: tuple[float, float]  # Wilson's 95 % interval for n images
    top_k: int
    top_k_accuracy: float
    precision: float  # this and the next two: mean over classes, weighted by their share
    recall: float
    f1: float
    calibration_error: float  # mean over images of |accuracy - confidence| of their bin
    per_class: list[float]  # accuracy within each class
    confusion: list[list[int]]  # [true class][predicted class], images
    hits: str = field(default="", repr=False)  # of each image a bit, in base64; older cards: none

    @property
    def right(self) -> Tensor | None:
        """Which images it has right, bool [n]; None if the card that says so is an older one."""
        bits = np.frombuffer(base64.b64decode(self.hits), np.uint8)
        return torch.from_numpy(np.unpackbits(bits, count=self.n) > 0) if self.hits else None

    def values(self) -> dict[str, Any]:
        """What a card says; hits only if there are any, so that an older card stays as it is."""
        return {name: value for name, value in asdict(self).items() if value != ""}


def evaluate(model: nn.Module, split: Split, **options: Any) -> Metrics:
    """Score a classifier on one split; options are those of predict.

    Raises ValueError as predict does, if a label has no logit, or a logit is not finite.
    """
    return metrics_from_logits(predict(model, split, **options), split.labels)


def predict(
    model: nn.Module, split: Split, *, batch_size=1024, precision="float32", tta=False
) -> Tensor:
    """Logits float32 [N, num_classes], on the device of the split; the model's mode is kept.

    precision: as in TrainConfig; float32 also where bf16 would be emulated.
    tta: test-time augmentation, the mean of the logits of each image and of its mirror image.
    Raises ValueError if the split is empty, precision unknown or the output not [N, num_classes].
    """
    kinds = {"model": InstanceOf[nn.Module], "split": InstanceOf[Split], "precision": Precision}
    given = {"model": model, "split": split, "precision": precision, "batch_size": batch_size}
    check("evaluate", kinds | {"batch_size": PositiveInt}, given)
    if not len(split):
        raise ValueError("evaluate: the split is empty. Give one with at least one image.")
    device = next((parameter.device for parameter in model.parameters()), split.images.device)
    precision, batches = usable_precision(precision, device), []
    batch_size = min(batch_size, max(1, 2**22 // split.images[0].numel()))  # large ones take GB
    # Not inference_mode: what a model keeps from its first call may be needed in training.
    with in_mode(model, training=False), torch.no_grad(), autocast(precision, device):
        for images, _ in split.batches(batch_size):
            images = images.to(device)
            logits = model(images)
            if getattr(logits, "ndim", None) != 2 or len(logits) != len(images):
                found = type(logits).__name__
                if isinstance(logits, Tensor):
                    found = f"shape {list(logits.shape)}"
                raise ValueError(f"evaluate: the model returned {found}, not [N, num_classes].")
            batches.append((logits.float() + model(images.flip(-1)).float()) / 2 if tta else logits)
    return torch.cat(batches).float().to(split.images.device)


def loss_and_accuracy(model: nn.Module, split: Split, *, precision="float32") -> tuple:
    """Mean cross-entropy in nats and the fraction of hits: what training looks at every epoch."""
    logits = predict(model, split, precision=precision)
    hits = (logits.argmax(dim=1) == split.labels).float().mean()
    return F.cross_entropy(logits, split.labels).item(), hits.item()


def metrics_from_logits(logits: Tensor, labels: Tensor, *, top_k: int = 5) -> Metrics:
    """Metrics of logits [N, num_classes], labels int64 [N].

    Raises ValueError for others, if a label has no logit, or a logit is not finite.
    """
    from scipy.stats import binomtest
    from torchmetrics.functional import classification as tm

    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        found = f"logits {list(logits.shape)} and labels {labels.dtype} {list(labels.shape)}"
        raise ValueError(f"evaluate: {found}. Give logits [N, num_classes], labels int64 [N].")
    n, num_classes = logits.shape
    if len(bad := (~logits.isfinite().all(dim=1)).nonzero()):
        hint = "Check the weights, and that the images are normalised."
        raise ValueError(f"evaluate: the logits of image {int(bad[0])} are not finite. {hint}")
    low, high = map(int, labels.aminmax())
    if low < 0 or high >= num_classes:
        problem = f"evaluate: label {min(low, 0) or high} with {num_classes} logits an image"
        raise ValueError(f"{problem}. Give the model one output for each class of the data.")
    preds, top_k = logits.argmax(dim=1), min(top_k, num_classes)
    confusion = tm.multiclass_confusion_matrix(preds, labels, num_classes)
    right = (preds == labels).cpu().numpy()
    interval = binomtest(int(right.sum()), n).proportion_ci(method="wilson")
    weighted = {"num_classes": num_classes, "average": "weighted"}
    # Stable like argmax, so that among equal logits the first is taken, on every machine.
    best = logits.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    bins = calibration_bins(logits, labels)
    return Metrics(
        n=n,
        loss=F.cross_entropy(logits, labels).item(),
        accuracy=int(right.sum()) / n,
        accuracy_interval=(float(interval.low), float(interval.high)),
        top_k=top_k,
        top_k_accuracy=(best == labels[:, None]).any(dim=1).float().mean().item(),
        precision=tm.multiclass_precision(preds, labels, **weighted).item(),
        recall=tm.multiclass_recall(preds, labels, **weighted).item(),
        f1=tm.multiclass_f1_score(preds, labels, **weighted).item(),
        calibration_error=float((bins.accuracy - bins.confidence).abs() @ bins.images / n),
        per_class=(confusion.diagonal() / confusion.sum(dim=1).clamp(min=1)).tolist(),
        confusion=confusion.tolist(),
        hits=base64.b64encode(np.packbits(right)).decode(),
    )


def calibration_bins(logits: Tensor, labels: Tensor) -> "pd.DataFrame":
    """Images sorted into 15 equal bins by confidence (Guo 2017, https://arxiv.org/abs/1706.04599).

    logits: float [n, num_classes]. labels: int64 [n].
    Columns: confidence, accuracy, means in the bin, fractions; images, how many, if there are any.
    """
    import pandas as pd

    # Clamped, so that a confidence of 1 is in the last bin.
    confidence, preds = logits.cpu().float().softmax(dim=1).clamp(max=1 - 2**-24).max(dim=1)
    bins = torch.bucketize(confidence, torch.linspace(0, 1, 16), right=True) - 1
    rows = torch.stack([confidence, (preds == labels.cpu()).float(), torch.ones_like(confidence)])
    # Summed in float32, as torchmetrics does: so were the published values.
    sums = torch.zeros(3, 16).index_add_(1, bins, rows).double()
    confidence, accuracy, images = sums[:, sums[2] > 0].numpy()
    means = {"confidence": confidence / images, "accuracy": accuracy / images}
    return pd.DataFrame({**means, "images": images.astype(int)})
