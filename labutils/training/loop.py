"""`train`: one loop that trains a classifier, and continues where it was cut off.

Nothing in the loop waits for the device: losses and logits stay there until an epoch ends.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import platform
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn import functional as F

from ..base.device import Forward, device_name, threads
from ..base.files import runs_dir, write_json
from ..base.settings import TrainConfig, first_line
from ..data.augmentation import require_fit
from ..data.tensors import ImageData
from ..evaluation.metrics import loss_and_accuracy, predict
from ..models.registry import num_parameters
from . import checkpoint
from .key import identify, run_key
from .optim import lr_factor, make_optimizer, stop_reason
from .runs import Run, RunError, disk_errors, find, finish, open_part, save_weights, store_lock
from .watch import Mirror, Progress, close_mirrors, log_row, open_mirrors, say, warn


def train(
    model: nn.Module,
    data: ImageData,
    config: TrainConfig | None = None,
    *,
    name: str = "run",
    retrain: bool = False,
    track: str | Sequence[str] | None = "auto",
    progress: bool = True,
    checkpoint_seconds: float = 30.0,
    compile: bool = False,
) -> Run:
    """Train a classifier, or load the finished run that did exactly this before.

    model: takes float32 [n, C, H, W], returns logits [n, num_classes]; it is moved to the device of
        the data and ends with the weights of the best epoch by config.monitor; where only the card
        of the run is published, it stays as it is and the run has no model.
    name: label of the run and first part of its folder's name; letters, digits, '.', '_', '-'.
    retrain: train although a finished run is stored, and replace it when done.
    track: see tracking.open_mirrors. progress: live bar, and a line when a stored run is loaded.
    checkpoint_seconds: longest time of work that a kill can cost.
    compile: use torch.compile, which takes a minute or more and makes the steps faster. A matter
        of speed, like the device and the order in memory (channels last for convolutions): results
        differ in rounding, and in which values dropout drops, so it is no part of the run's key.
        Nor is what config.precision = 'auto' comes to; run.info has all of these.

    A run that was cut off goes on when it is called for again, with a model built and seeded like
    the first, and ends with the same bits on the same machine; on a GPU up to cuDNN's choice of
    algorithms, and with float32 convolutions in TF32, both as torch has them by default.
    Ctrl-C stops after the current batch, saves, and returns the unfinished run.
    Raises ValueError for bad arguments; RunError if the loss stops being finite, a checkpoint
    cannot be continued, or the runs folder cannot be written.
    """
    config = config or TrainConfig()
    _check_arguments(model, data, config, name)
    model.to(data.train.images.device)
    _check_outputs(model, data)
    spec, weights = identify(model, config.seed)
    key = run_key(config, spec, weights, data)
    run = None if retrain else find(key, model)
    if run is None:
        with disk_errors("train", runs_dir()), store_lock(key):
            # Another process may have finished this very run while we waited for the lock.
            run = None if retrain else find(key, model)
            if run is None:
                part = open_part(name, key)
                job = _Job(model, data, config, name, key, part, spec, weights)
                return job.run(track, progress, checkpoint_seconds, compile)
    if progress:
        say(str(run))
    return run


def _check_arguments(model: nn.Module, data: ImageData, config: TrainConfig, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"train: model = {model!r} is no torch.nn.Module.")
    if not isinstance(data, ImageData):
        raise ValueError(f"train: data = {data!r} is no labutils.ImageData.")
    if not isinstance(config, TrainConfig):
        raise ValueError(f"train: config = {config!r} is no labutils.TrainConfig.")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise ValueError(f"train: name = {name!r}. Use letters, digits, '.', '_' and '-' only.")
    if config.batch_size > len(data.train):
        raise ValueError(
            f"train: batch_size = {config.batch_size} is larger than the training split of "
            f"{len(data.train)} images. Choose at most {len(data.train)}."
        )
    require_fit(config.augment, data.image_shape)
    if not num_parameters(model):
        raise ValueError("train: the model has no parameter that requires a gradient.")


def _check_outputs(model: nn.Module, data: ImageData) -> None:
    """A wrong number of outputs shows late on a GPU, and takes the whole process with it."""
    few = dataclasses.replace(
        data.train, images=data.train.images[:2], labels=data.train.labels[:2]
    )
    try:
        shape = predict(model, few).shape
    except RuntimeError as error:
        raise ValueError(
            f"train: the model cannot take images of shape {data.image_shape} "
            f"({first_line(error)}). Build it for data.image_shape, an MLP with "
            f"in_features={data.num_features}."
        ) from error
    if shape[1] != data.num_classes:
        raise ValueError(
            f"train: the model has {shape[1]} outputs, the data {data.num_classes} classes. "
            f"Build it with num_classes={data.num_classes}."
        )


class _Job:
    """One training on its way."""

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        config: TrainConfig,
        name: str,
        key: str,
        part: Path,
        spec: dict[str, Any],
        weights: str,
    ) -> None:
        self.model, self.data, self.config, self.name, self.key = model, data, config, name, key
        self.part, self.device = part, data.train.images.device
        # First, since the optimizer and the average copy the order in memory that it sets.
        self.forward = Forward(model, config.precision, self.device)
        self.steps = data.train.num_batches(config.batch_size)
        self.at, self.tally = checkpoint.Position(), checkpoint.Tally()
        self.optimizer = make_optimizer(model, config)
        self.state = {
            "model": model,
            "optimizer": self.optimizer,
            "position": self.at,
            "tally": self.tally,
        }
        self.averaged = checkpoint.Average(model, config.ema) if config.ema else None
        if self.averaged is not None:
            self.state["averaged"] = self.averaged
        splits = {split: len(getattr(data, split)) for split in ("train", "val", "test")}
        self.settings = {
            "model": spec,
            "weights": weights,
            "parameters": num_parameters(model),
            "config": dataclasses.asdict(config),
            "data": {
                "name": data.name,
                "source": data.source,
                "fingerprint": data.fingerprint,
                "images": splits,
            },
        }

    def run(self, track: Any, progress: bool, checkpoint_seconds: float, compile: bool) -> Run:
        last, size = self.part / "last.pt", len(self.data.train)
        precision = self.forward.precision
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), ExitStack() as stack:
            stack.enter_context(threads(self.model, self.config.batch_size, self.device))
            self.threads = torch.get_num_threads() if self.device.type == "cpu" else None
            torch.manual_seed(self.config.seed)
            if last.exists():
                checkpoint.load(last, self.key, self.state, self.device, precision)
            else:
                write_json(self.part / "config.json", {"key": self.key, **self.settings})
            named = {"name": self.name, "key": self.key}
            mirrors = open_mirrors(track, **named, folder=self.part, settings=self.settings)
            done = size * self.at.epoch + self.tally.images
            bar = Progress(
                self.name,
                total=size * self.config.epochs,
                done=done,
                log=self.part / "train.log",
                show=progress,
            )
            stack.enter_context(closing(bar))
            self._prepare(compile, bar, progress)
            interrupted = stack.enter_context(_interrupts())
            reason = self._loop(bar, mirrors, interrupted, checkpoint_seconds)
            bar.note(reason)
        run = self._finish(reason, track)
        best = self.at.rows[self.at.best_epoch - 1] if self.at.best_epoch else {}
        close_mirrors(mirrors, {f"best/{name}": value for name, value in best.items()})
        return run

    def _prepare(self, compile: bool, bar: Progress, progress: bool) -> None:
        """Compile if asked to, and say what cannot be had here."""

        def tell(text: str) -> None:
            bar.note(text)
            if progress:
                warn(text)

        if self.config.precision == "bf16" != self.forward.precision:
            tell(f"{device_name(self.device)} does not compute in bf16: trained in float32")
        if compile:
            self.forward.compile(
                lambda why: tell(f"torch.compile fails here ({why}): trained without it")
            )

    def _loop(
        self, bar: Progress, mirrors: list[Mirror], interrupted: list, checkpoint_seconds: float
    ) -> str:
        config, model, optimizer, at = self.config, self.model, self.optimizer, self.at
        saved = time.monotonic()
        while (reason := stop_reason(at.rows, config)) is None:
            started = time.perf_counter()
            batches = self.data.train.shuffled(
                config.batch_size,
                seed=config.seed,
                epoch=at.epoch,
                start=at.batch,
                augment=config.augment,
            )
            model.train()
            for images, labels in batches:
                lr = self._lr(at.batch)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                logits = self.forward(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if self.averaged is not None:
                    self.averaged.update(model)
                self.tally.add(loss, logits, labels)
                at.batch += 1
                bar.step(len(labels))
                if interrupted or time.monotonic() - saved >= checkpoint_seconds:
                    now = time.perf_counter()
                    at.epoch_seconds, started = at.epoch_seconds + now - started, now
                    self._save()
                    saved = time.monotonic()
                    if interrupted:
                        return "interrupted"
            # Reading the losses waits for the device, so that its time is counted.
            self._require_finite()
            at.epoch_seconds += time.perf_counter() - started
            self._end_epoch()
            bar.epoch(at.rows[-1], config.epochs)
            log_row(mirrors, at.rows[-1])
        return reason

    def _lr(self, batch: int) -> float:
        """The learning rate for a batch of the current epoch."""
        step = self.at.epoch * self.steps + batch
        return self.config.lr * lr_factor(self.config, step, self.steps)

    def _end_epoch(self) -> None:
        at, started = self.at, time.perf_counter()
        train_loss, train_accuracy = self.tally.means()
        speed = self.tally.images / at.epoch_seconds
        scored = self.averaged.module if self.averaged is not None else self.model
        precision = self.forward.precision
        val_loss, val_accuracy = loss_and_accuracy(scored, self.data.val, precision=precision)
        if not math.isfinite(val_loss):
            self._diverged("validation loss", val_loss, at.batch - 1)
        seconds = at.epoch_seconds + time.perf_counter() - started
        row = {
            "epoch": at.epoch + 1,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "lr": self._lr(at.batch - 1),
            "images_per_second": round(speed, 1),
            "seconds": round(seconds, 4),
        }
        monitor = self.config.monitor
        sign = 1 if monitor == "val_loss" else -1
        if not at.best_epoch or sign * row[monitor] < sign * at.rows[at.best_epoch - 1][monitor]:
            at.best_epoch = row["epoch"]
            at.best_weights = {k: v.detach().clone() for k, v in scored.state_dict().items()}
        at.rows.append(row)
        at.epoch, at.batch = row["epoch"], 0
        at.seconds, at.epoch_seconds = at.seconds + seconds, 0.0
        self.tally.reset()

    def _require_finite(self) -> None:
        losses = self.tally.losses()
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            self._diverged("loss", float(losses[bad[0]]), int(bad[0]))

    def _diverged(self, what: str, value: float, batch: int) -> NoReturn:
        kept = "there is none yet"
        if self.at.best_epoch:
            save_weights(self.part / "best.safetensors", self.at.best_weights)
            kept = f"{self.part / 'best.safetensors'} (epoch {self.at.best_epoch})"
        raise RunError(
            f"train: {self.name}: the {what} became {value} in epoch {self.at.epoch + 1}, "
            f"step {batch + 1} of {self.steps}, at learning rate {self._lr(batch):.3g}. "
            f"Last good checkpoint: {kept}. Try a lower lr."
        )

    def _save(self) -> None:
        self._require_finite()
        last, precision = self.part / "last.pt", self.forward.precision
        checkpoint.save(last, self.key, self.state, self.device, precision)

    def _finish(self, reason: str, track: Any) -> Run:
        """Give the model its best weights; make a run that is complete visible to the store."""
        at, place = self.at, self.part
        info = {
            **self.settings,
            "epochs": at.epoch,
            "best_epoch": at.best_epoch,
            "stop_reason": reason,
            "seconds": round(at.seconds + at.epoch_seconds, 3),
            "device": device_name(self.device),
            "threads": self.threads,
            "precision": self.forward.precision,
            "compiled": self.forward.compiled,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "finished": datetime.date.today().isoformat(),
        }
        if reason != "interrupted":
            self._save()
            place = finish(self.part, self.name, self.key, info, at.rows, at.best_weights)
        if at.best_weights:
            self.model.load_state_dict(at.best_weights)
        return Run(self.name, self.key, info, at.rows, place, self.model, track=track)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C puts something into; a second Ctrl-C does what it always does."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(signum: int, frame: Any) -> None:
        seen.append(signum)
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, previous)
