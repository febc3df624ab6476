"""What a batch is trained towards: its labels, and a teacher's logits beside them."""

from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.nn import functional as F

from ..base.settings import TrainConfig
from ..data.tensors import ImageData


@runtime_checkable
class Teacher(Protocol):
    """What `train` asks of a teacher; methods/distillation.py, a room above, has one."""

    key: str  # tells what it answers: part of the key of its students' runs

    def require_fit(self, data: ImageData) -> None:
        """Raise ValueError unless it knows the classes and the images of these data."""

    def lessons(self, data: ImageData, config: TrainConfig, epoch: int, batch_size: int) -> Tensor:
        """Logits [n, num_classes] for an epoch's views, in order of the batches, at full size."""


def require_teachable(teacher: Teacher | None, data: ImageData, config: TrainConfig) -> None:
    """Raise ValueError for a teacher who is missing, not asked or does not fit."""
    if bool(config.alpha) != (teacher is not None):
        problem = "is given a teacher" if teacher else "has no teacher"
        remedy = "Give alpha above 0 and a teacher, or neither: then labels alone count"
        raise ValueError(f"train: alpha = {config.alpha} {problem}. {remedy}.")
    if teacher is not None:
        teacher.require_fit(data)


def batch_loss(
    logits: Tensor, labels: Tensor, taught: Tensor | None, config: TrainConfig
) -> Tensor:
    """Mean cross-entropy with the labels or, with a teacher's logits, the loss of distillation.

    logits, taught: float32 [n, num_classes], the student's and the teacher's. labels: int64 [n].
    alpha T^2 KL(teacher || student), both softened by the temperature T, plus (1 - alpha) times the
    cross-entropy (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). The square makes up for
    gradients that fall with T^2. label_smoothing is of the labels' part alone.
    """
    hard = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
    if taught is None:
        return hard
    alpha, t = config.alpha, config.temperature
    student, teacher = (z.div(t).log_softmax(dim=1) for z in (logits, taught))
    soft = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return alpha * t**2 * soft + (1 - alpha) * hard
