"""A trained network as the teacher of others: what it says of the very views that they see.

A teacher that answers for the images as they are, where the student sees crops, teaches it badly
(Beyer et al. 2022, https://arxiv.org/abs/2106.05237). What an epoch shows depends on the seed and
the epoch alone, so the answers are recorded by these: students of one seed, of whatever size,
temperature and alpha, share them. With shifts of 2 pixels and flips, all 50 views of an image would
take 50 passes; a record takes one an epoch, and holds every augmentation.
"""

from collections.abc import Sequence

import torch
from pydantic import InstanceOf
from torch import Tensor

from ..base import device as machine
from ..base.files import digest, file_name, read_sealed, runs_dir, write_sealed
from ..base.settings import TrainConfig, check, plain_numbers
from ..data.tensors import ImageData
from ..models.registry import in_mode
from ..training.key import weights_digest
from ..training.runs import Run
from ..training.store import store_lock
from ..training.watch import warn


class Teacher:
    """A finished run that teaches. Raises RunError for an interrupted one, or a card alone.

    classes: for each class of the data, which of the run's outputs answers for it; () is each its
        own. A permutation makes a teacher that is as sure of itself, of the wrong classes.
    Its answers are kept as float16 in the folder of runs, one small file for an epoch and a seed.
    """

    def __init__(self, run: Run, classes: Sequence[int] = ()) -> None:
        classes = plain_numbers(classes)
        given = {"run": run, "classes": classes}
        check("Teacher", {"run": InstanceOf[Run], "classes": list[int]}, given)
        run.require_finished()
        self.run, self.classes, self._model = run, classes, run.network()
        # By these its records are known: a run that was trained anew may have others.
        self._weights = weights_digest(self._model.state_dict())
        count = len(run.info["data"]["classes"])
        if classes and sorted(classes) != [*range(count)]:
            allowed = f"Give each of 0 to {count - 1} once, or none."
            raise ValueError(f"Teacher: classes = {classes}. {allowed}")
        self.key = " ".join([run.key, *map(str, classes)])

    def require_fit(self, data: ImageData) -> None:
        """Raise ValueError unless it was trained on such classes and images."""
        known = self.run.info["data"]
        for what, own, other in (
            ("classes", known["classes"], list(data.classes)),
            ("images of shape", known["shape"], list(data.image_shape)),
        ):
            if own != other:
                problem = f"the teacher {self.run.name} knows {what} {own}, the data have {other}"
                raise ValueError(f"train: {problem}. Train a teacher on data like these.")

    def lessons(self, data: ImageData, config: TrainConfig, epoch: int, batch_size: int) -> Tensor:
        """Logits for the images of an epoch as `train` shows them: float32 [n, num_classes].

        Recorded ones where there are, else the teacher answers now, in inference mode. A record
        that is damaged, or of other weights or data, is made anew, which is said once.
        """
        views = {"augment": config.values()["augment"], "batch_size": batch_size}
        views |= {"seed": config.seed, "epoch": epoch, "data": data.fingerprint}
        views["device"] = data.train.images.device.type
        home = file_name(f"{self.run.key}-{data.name}")  # which may be a path
        path = runs_dir() / ".teachers" / home / f"{digest(views)}.f16"
        owner = f"{self._weights} {data.fingerprint}"
        with store_lock(f"{path.parent.name}-{path.stem}"):  # another student may be waiting for it
            try:
                answers = read_sealed(path, owner) if path.exists() else b""
            except ValueError:
                problem, answers = "is damaged, or of another teacher or other data", b""
                warn(f"{home}: what the teacher said {problem}. It is asked again.")
            if not answers:
                answers = self._answer(data, config, epoch, batch_size).numpy().tobytes()
                write_sealed(path, answers, owner)
        logits = torch.frombuffer(bytearray(answers), dtype=torch.float16)
        logits = logits.view(-1, data.num_classes).to(data.train.images.device).float()
        return logits[:, self.classes] if self.classes else logits

    @torch.inference_mode()
    def _answer(self, data, config, epoch, batch_size) -> Tensor:
        """What it says of the views of an epoch: float16 [n, num_classes], on the CPU."""
        device, batches = data.train.images.device, []
        precision = machine.usable_precision(self.run.info.get("precision", "float32"), device)
        model = self._model.to(device)
        order = {"seed": config.seed, "epoch": epoch, "augment": config.augment}
        known = self.run.info["data"]  # its own images were normalised by other numbers, perhaps
        numbers = data.train.mean, data.train.std, known["mean"], known["std"]
        numbers = torch.tensor([[*map(float, each)] for each in numbers], device=device)
        mean, std, its_mean, its_std = numbers.view(4, 1, -1, 1, 1)
        alike = torch.allclose(mean, its_mean) and torch.allclose(std, its_std)
        with in_mode(model, training=False):
            for images, _ in data.train.shuffled(batch_size, **order):
                if not alike:
                    images = (images * std + mean - its_mean) / its_std
                with machine.autocast(precision, device):  # the images are made outside of it
                    batches.append(model(images).half())
        logits = torch.cat(batches).cpu()
        if not logits.isfinite().all():
            problem = f"the logits of the teacher {self.run.name} are not finite in float16"
            raise ValueError(f"train: {problem}. Take another teacher.")
        return logits
