"""What a training has to remember to go on with the same bits after it was killed."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..base.files import atomic_write
from .runs import RunError


class Tally:
    """Losses and hits of the epoch so far. They stay on the device, so adding waits for nothing."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.images = 0
        self._hits: Tensor | int = 0
        self._losses: list[Tensor] = []
        self._uncounted: list[tuple[Tensor, Tensor]] = []

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """loss: mean over the batch. logits [n, num_classes]. labels int64 [n]."""
        self.images += len(labels)
        self._losses.append(loss.detach() * len(labels))
        self._uncounted.append((logits.detach(), labels))
        # Comparing many small batches at once costs a fraction of doing it in every step.
        if len(self._uncounted) == 64:
            self._count()

    def _count(self) -> None:
        if self._uncounted:
            logits, labels = (torch.cat(parts) for parts in zip(*self._uncounted))
            self._hits = self._hits + (logits.argmax(dim=1) == labels).sum()
            self._uncounted.clear()

    def losses(self) -> Tensor:
        """Summed loss of each batch so far, on the CPU."""
        return torch.stack(self._losses).cpu() if self._losses else torch.empty(0)

    def means(self) -> tuple[float, float]:
        """Loss and accuracy over the images so far."""
        self._count()
        return float(self.losses().double().sum()) / self.images, int(self._hits) / self.images

    def state_dict(self) -> dict[str, Any]:
        self._count()
        return {"losses": self.losses(), "hits": int(self._hits), "images": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        self._losses = list(state["losses"].unbind())
        self._hits, self.images = state["hits"], state["images"]


@dataclass
class Position:
    """How far a training has come, and the best weights on the way."""

    epoch: int = 0  # epochs finished
    batch: int = 0  # batches of the current epoch finished
    seconds: float = 0.0  # of finished epochs
    epoch_seconds: float = 0.0  # of the current epoch
    rows: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Average(AveragedModel):
    """Exponential moving average of a model's weights and of its statistics, which `update` feeds.

    The first update copies the model. Whole numbers, counters say, are copied always.
    torch's own update sends a counter to the device in every step, and waits for it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        weight = 1 - self._decay if self.n_averaged else 1.0
        ours, theirs = ([*part.parameters(), *part.buffers()] for part in (self.module, model))
        pairs = list(zip(ours, theirs))
        blended = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_(*map(list, zip(*blended)), weight)
        for our, their in pairs:
            if not our.is_floating_point():
                our.copy_(their)
        self.n_averaged += 1


def save(path: Path, key: str, parts: dict[str, Any], device: torch.device, precision: str) -> None:
    """Write the state_dict of all parts and torch's random state as one atomic file."""
    state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
    state |= {"key": key, "device": device.type, "precision": precision}
    state["rng"] = torch.get_rng_state()
    if device.type == "cuda":
        state["rng_cuda"] = torch.cuda.get_rng_state(device)
    # Writing straight to a file, torch reports a full disk as a RuntimeError about positions.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load(path: Path, key: str, parts: dict[str, Any], device: torch.device, precision: str) -> None:
    """Bring all parts to the state that `save` wrote.

    Raises RunError if the file is damaged, belongs to another run or model, or was made on another
    kind of device or in another precision.
    """
    advice = f"Remove {path.parent} to start this run anew."
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    # torch reports a damaged file as one of a dozen exceptions, depending on where it is cut.
    except Exception as error:
        raise RunError(
            f"train: the checkpoint {path} cannot be read; it was cut short or is no checkpoint "
            f"({type(error).__name__}). {advice}"
        ) from error
    if not isinstance(state, dict) or state.get("key") != key:
        raise RunError(f"train: the checkpoint {path} belongs to another run. {advice}")
    made, here = (state["device"], state["precision"]), (device.type, precision)
    if made != here:
        made, here = (" in ".join(place) for place in (made, here))
        raise RunError(
            f"train: the checkpoint {path} was made on {made}, this is {here}: "
            f"the run would not continue with the same bits. Go on there, or start anew. {advice}"
        )
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, ValueError, KeyError) as error:
        raise RunError(
            f"train: the checkpoint {path} belongs to another model ({error}). {advice}"
        ) from error
    torch.set_rng_state(state["rng"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["rng_cuda"].cpu(), device)
