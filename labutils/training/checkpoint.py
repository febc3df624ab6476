"""What a training has to remember to go on with the same bits after it was killed."""

import copy
import io
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..base.files import read_sealed, write_sealed
from ..base.settings import first_line
from .cards import RunError


class Average(AveragedModel):
    """Exponential moving average of a model's weights and statistics; the first update copies."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self._decay = decay
        # Looked up once: a walk through a deep network in every step costs more than the averaging.
        pairs = [*zip(self.module.parameters(), model.parameters())]
        pairs += zip(self.module.buffers(), model.buffers())
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._integers = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        weight = 1 - self._decay if self.n_averaged else 1.0
        torch._foreach_lerp_(*map(list, zip(*self._floats)), weight)
        # Counters are copied: torch's own update sends them to the device each time, and waits.
        if self._integers:
            torch._foreach_copy_(*map(list, zip(*self._integers)))
        self.n_averaged += 1


@dataclass
class TrainingState:
    """Where a training stands: what `save` writes and `load` reads back."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    averaged: Average | None = None
    precision: str = "float32"  # or 'bf16'
    threads: int | None = None  # of the CPU: sums are split among them, so the last bits differ
    epoch: int = 0  # epochs finished
    batch: int = 0  # batches of the current epoch finished; what follows is of this epoch
    images: int = 0
    losses: Tensor = field(default_factory=lambda: torch.empty(0))  # summed over each batch
    hits: Tensor | int = 0
    uncounted: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    started: float = 0.0  # the clock of the current epoch
    epoch_seconds: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)  # one for each finished epoch
    best_epoch: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take note of a batch and its mean loss, on the device: nothing waits for it."""
        self.batch += 1
        self.images += len(labels)
        self.uncounted.append((loss.detach() * len(labels), logits.detach(), labels))
        # Comparing many small batches at once costs a fraction of doing it in every step.
        if len(self.uncounted) == 64:
            self.count()

    def count(self) -> None:
        if self.uncounted:
            losses, logits, labels = zip(*self.uncounted)
            self.losses = torch.cat([self.losses.to(labels[0].device), torch.stack(losses)])
            self.hits = self.hits + (torch.cat(logits).argmax(dim=1) == torch.cat(labels)).sum()
            self.uncounted.clear()

    def stop_clock(self) -> None:
        now = time.perf_counter()
        self.epoch_seconds, self.started = self.epoch_seconds + now - self.started, now

    def end_epoch(self, row: dict[str, float], scored: nn.Module, monitor: str) -> None:
        """Add the row of an epoch, and keep the weights of `scored` if they are the best so far."""
        self.rows.append(row)
        self.epoch, self.batch, self.images, self.hits = row["epoch"], 0, 0, 0
        self.losses, self.epoch_seconds = torch.empty(0), 0.0
        scores = [row[monitor] for row in self.rows]
        best = min(scores) if monitor == "val_loss" else max(scores)
        if scores.index(best) == len(scores) - 1:  # of equals, the first is the best
            self.best_epoch, self.best_weights = self.epoch, copy.deepcopy(scored.state_dict())

    def summary(self) -> dict[str, float]:
        best = self.rows[self.best_epoch - 1] if self.best_epoch else {}
        return {f"best/{name}": value for name, value in best.items()}


def save(path: Path, key: str, state: TrainingState, device: torch.device) -> None:
    """Write the state and torch's random numbers, atomically, behind their SHA-256."""
    state.count()
    content = {"key": key, "device": device.type, "rng": torch.get_rng_state()}
    if device.type == "cuda":
        content["rng_cuda"] = torch.cuda.get_rng_state(device)
    for name, value in vars(state).items():
        content[name] = value.state_dict() if hasattr(value, "state_dict") else value
    # Writing straight to a file, torch reports a full disk as a RuntimeError about positions.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_sealed(path, buffer.getvalue())  # torch.load alone overlooks every second flipped bit


def load(path: Path, key: str, state: TrainingState, device: torch.device) -> None:
    """Read what `save` wrote. RunError: damaged, or of another run, model, device, precision."""
    try:
        stored = io.BytesIO(read_sealed(path))
        content = torch.load(stored, map_location=device, weights_only=True)
        wanted = {"key": key, "device": device.type, "precision": state.precision}
        if (made := {name: content[name] for name in wanted}) != wanted:
            raise ValueError(f"it was made for {made}, this is {wanted}")
        for name, value in vars(state).items():
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(content[name])
            else:
                setattr(state, name, content[name])
        torch.set_rng_state(content["rng"].cpu())
        if device.type == "cuda":
            torch.cuda.set_rng_state(content["rng_cuda"].cpu(), device)
    # torch reports what does not fit as one of a dozen exceptions.
    except Exception as error:
        problem = f"the checkpoint {path} does not continue this run ({first_line(error)})"
        raise RunError(f"train: {problem}. Remove {path.parent} to start it anew.") from error
