"""`train`: one loop that trains a classifier, and continues where it was cut off.

`_loop` is all there is to it, and nothing in it waits for the device. The rest of this file is what
stands around it; what a training remembers is in checkpoint.py, the store of runs in runs.py.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import platform
import re
import signal
import time
from contextlib import ExitStack, closing

import torch
from torch import nn
from torch.nn import functional as F

from ..base import device as machine
from ..base.files import runs_dir, write_json
from ..base.settings import NonNegativeFloat, TrainConfig, check, first_line
from ..data.augmentation import require_fit
from ..data.tensors import ImageData
from ..evaluation.metrics import loss_and_accuracy, predict
from ..models.registry import num_parameters
from . import checkpoint, watch
from .key import identify, run_key
from .optim import lr_factor, make_optimizer, stop_reason
from .runs import Run, RunError, disk_errors, find, finish, open_part, save_weights, store_lock


def train(
    model: nn.Module,
    data: ImageData,
    config: TrainConfig | None = None,
    *,
    name: str = "run",
    retrain: bool = False,
    track: str | list[str] | None = "auto",
    progress: bool = True,
    checkpoint_seconds: float = 30.0,
    compile: bool = False,
) -> Run:
    """Train a classifier, or load the finished run that did exactly this before.

    model: float32 [n, C, H, W] -> logits [n, num_classes]. It is moved to the device of the data
        and ends with the weights of the best epoch by config.monitor; where only the card of the
        run is published, it stays as it is and the run has no model.
    name: starts the name of the run's folder. retrain: train although a finished run is stored.
    track: see watch.open_mirrors. progress: live bar, and a line when a stored run is loaded.
    checkpoint_seconds: longest time of work that a kill can cost.
    compile: use torch.compile: a minute at the start, then faster steps. Like the device and what
        precision 'auto' comes to, it changes rounding and dropout's choice, but not the key.

    A run that was cut off goes on when it is called for again, with a model built and seeded like
    the first, and ends with the same bits on the same machine (on a GPU as far as cuDNN allows).
    Ctrl-C stops after the current batch, saves and returns the unfinished run; if it comes too late
    for that, the run is stored as finished, and KeyboardInterrupt raised.
    Raises ValueError for bad arguments; RunError if the loss stops being finite, a checkpoint
    cannot be continued, or the runs folder cannot be written.
    """
    config = config or TrainConfig()
    _check_arguments(model, data, config, name, checkpoint_seconds)
    run = _describe(model, data, config, name, track)
    found = None if retrain else find(run.key, model)
    if found is None:
        with disk_errors("train", runs_dir()), store_lock(run.key):
            # Another process may have finished this very run while we waited for the lock.
            found = None if retrain else find(run.key, model)
            if found is None:
                return _train(run, data, config, progress, checkpoint_seconds, compile)
    if progress:
        watch.say(str(found))
    return found


def _loop(state, data, config, forward, after_step, after_epoch) -> str | None:
    """Train on from `state` until a rule, which is returned, or after_step's True ends it."""
    model, optimizer, averaged = state.model, state.optimizer, state.averaged
    steps = data.train.num_batches(config.batch_size)  # in an epoch
    precision = machine.autocast(state.precision, data.train.images.device)
    for epoch in range(state.epoch, config.epochs):
        state.started = time.perf_counter()
        order = {"seed": config.seed, "epoch": epoch, "start": state.batch}
        batches = data.train.shuffled(config.batch_size, **order, augment=config.augment)
        model.train()
        for images, labels in batches:
            lr = config.lr * lr_factor(config, epoch * steps + state.batch, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with precision:
                logits = forward(images)
            logits = logits.float()
            loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if averaged is not None:
                averaged.update()
            # Reading the loss here would wait for the device; it is read when the epoch ends.
            state.add(loss, logits, labels)
            if after_step(len(labels)):
                return None  # interrupted
        after_epoch()
        if reason := stop_reason(state.rows, config):
            return reason


def _train(run, data, config, progress, checkpoint_seconds, compile) -> Run:
    """All around the loop: what it starts from, who watches it, what is saved and when."""
    with ExitStack() as stack:
        state = _start_or_continue(run, data, config, compile, stack)
        size, log = len(data.train), run.path / "train.log"
        images = {"total": size * config.epochs, "done": size * state.epoch + state.images}
        bar = watch.Progress(run.name, **images, log=log, show=progress)
        stack.enter_context(closing(bar))
        named = {"name": run.name, "key": run.key, "folder": run.path}
        mirrors = watch.open_mirrors(run.track, **named, settings=run.info)
        stack.callback(lambda: watch.close_mirrors(mirrors, state.summary()))
        forward = _forward(run, config, bar, progress, compile)
        interrupted = machine.interrupts(stack)
        last_save = time.monotonic()

        def after_step(images):
            nonlocal last_save
            bar.step(images)
            if interrupted or time.monotonic() - last_save >= checkpoint_seconds:
                state.stop_clock()
                _require_finite(run, state, data, config)
                checkpoint.save(run.path / "last.pt", run.key, state, data.train.images.device)
                last_save = time.monotonic()
            return bool(interrupted)

        def after_epoch():
            _score_epoch(run, state, data, config)
            bar.epoch(state.rows[-1], config.epochs)
            watch.log_row(mirrors, state.rows[-1])

        reason = _loop(state, data, config, forward, after_step, after_epoch)
        _finish(run, state, reason or "interrupted")
        bar.note(run.stop_reason)
    if interrupted and reason:
        # Too late to stop this run, which is stored; but the caller may have more to do.
        signal.raise_signal(signal.SIGINT)
    return run


def _start_or_continue(run, data, config, compile, stack) -> checkpoint.TrainingState:
    """The state at the start of a run or in its last checkpoint, with its seed and threads."""
    run.path = open_part(run.name, run.key)
    run.name = run.path.name.removesuffix(f"-{run.key}.part")  # as it was first called
    device, last = data.train.images.device, run.path / "last.pt"
    # First, since the optimizer and the average copy the order in memory that it sets.
    machine.prefer_channels_last(run.model, device)
    state = checkpoint.TrainingState(
        run.model,
        make_optimizer(run.model, config),
        checkpoint.Average(run.model, config.ema) if config.ema else None,
        precision=machine.usable_precision(config.precision, device),
        threads=machine.choose_threads(run.model, config.batch_size, device),
    )
    stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
    torch.manual_seed(config.seed)
    if last.exists():
        checkpoint.load(last, run.key, state, device)
    else:
        write_json(run.path / "config.json", {"key": run.key, **run.info})
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(state.threads)
    run.rows = state.rows
    run.info |= {"threads": state.threads, "precision": state.precision, "compiled": compile}
    return state


def _forward(run, config, bar, progress, compile):
    """The model, compiled if asked for; what cannot be had here is said."""

    def tell(text):
        bar.note(text)
        if progress:
            watch.warn(text)

    def fall_back(reason):
        run.info["compiled"] = False
        tell(f"torch.compile fails here ({reason}): trained without it")

    if config.precision == "bf16" != run.info["precision"]:
        tell(f"{run.info['device']} does not compute in bf16: trained in float32")
    return machine.compiled(run.model, fall_back) if compile else run.model


def _score_epoch(run, state, data, config) -> None:
    """Add the row of the epoch, and keep its weights if they are the best so far."""
    # This reads the losses, which waits for the device, so that its time is counted.
    _require_finite(run, state, data, config)
    state.stop_clock()
    speed = round(state.images / state.epoch_seconds, 1)
    scored = state.model if state.averaged is None else state.averaged.module
    val_loss, val_accuracy = loss_and_accuracy(scored, data.val, precision=state.precision)
    _require_finite(run, state, data, config, val_loss)
    state.stop_clock()
    row = {
        "epoch": state.epoch + 1,
        "train_loss": float(state.losses.cpu().double().sum()) / state.images,
        "train_accuracy": int(state.hits) / state.images,
        "val_loss": val_loss,
        "val_accuracy": val_accuracy,
        "lr": state.optimizer.param_groups[0]["lr"],
        "images_per_second": speed,
        "seconds": round(state.epoch_seconds, 4),
    }
    state.end_epoch(row, scored, config.monitor)


def _require_finite(run, state, data, config, val_loss=0.0) -> None:
    """Raise RunError if a loss of this epoch is not finite; the best weights are saved before."""
    state.count()
    losses = [*state.losses.tolist(), val_loss]
    bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is None:
        return
    what = "loss" if bad < state.batch else "validation loss"
    batch, steps = min(bad, state.batch - 1), data.train.num_batches(config.batch_size)
    lr = config.lr * lr_factor(config, state.epoch * steps + batch, steps)
    kept = "there is none yet"
    if state.best_epoch:
        save_weights(run.path / "best.safetensors", state.best_weights)
        kept = f"{run.path / 'best.safetensors'} (epoch {state.best_epoch})"
    raise RunError(
        f"train: {run.name}: the {what} became {losses[bad]} in epoch {state.epoch + 1}, "
        f"step {batch + 1} of {steps}, at learning rate {lr:.3g}. "
        f"Last good checkpoint: {kept}. Try a lower lr."
    )


def _finish(run, state, reason) -> None:
    """Give the model its best weights; put a run that is complete into the store."""
    run.info |= {"epochs": state.epoch, "best_epoch": state.best_epoch, "stop_reason": reason}
    run.info["seconds"] = round(sum(row["seconds"] for row in run.rows) + state.epoch_seconds, 3)
    run.info["finished"] = datetime.date.today().isoformat()
    if reason != "interrupted":
        run.path = finish(run.path, run.name, run.key, run.info, run.rows, state.best_weights)
        (run.path / "last.pt").unlink(missing_ok=True)
    if state.best_weights:
        run.model.load_state_dict(state.best_weights)


def _describe(model, data, config, name, track) -> Run:
    """The run with all that is known before it is trained, its key above all."""
    spec, weights = identify(model, config.seed)
    info = {
        "model": spec,
        "weights": weights,
        "parameters": num_parameters(model),
        "config": dataclasses.asdict(config),
        "data": {
            **{name: getattr(data, name) for name in ("name", "source", "fingerprint")},
            "images": {split: len(getattr(data, split)) for split in ("train", "val", "test")},
        },
        "device": machine.device_name(data.train.images.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    key = run_key(config, spec, weights, data.fingerprint)
    return Run(name=name, key=key, info=info, rows=[], path=runs_dir(), model=model, track=track)


def _check_arguments(model, data, config, name, checkpoint_seconds) -> None:
    """Raise ValueError for what cannot be trained; move the model to the data's device."""
    kinds = {"model": nn.Module, "data": ImageData, "config": TrainConfig}
    for (argument, kind), value in zip(kinds.items(), (model, data, config)):
        if not isinstance(value, kind):
            raise ValueError(f"train: {argument} = {value!r} is no {kind.__name__}.")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise ValueError(f"train: name = {name!r}. Use letters, digits, '.', '_' and '-' only.")
    seconds = {"checkpoint_seconds": checkpoint_seconds}
    check("train", dict.fromkeys(seconds, NonNegativeFloat), seconds)
    split, shape = data.train, data.image_shape
    if config.batch_size > len(split):
        raise ValueError(
            f"train: batch_size = {config.batch_size} is larger than the training split of "
            f"{len(split)} images. Choose at most {len(split)}."
        )
    require_fit(config.augment, shape)
    if not num_parameters(model):
        raise ValueError("train: the model has no parameter that requires a gradient.")
    model.to(split.images.device)
    two = dataclasses.replace(split, images=split.images[:2], labels=split.labels[:2])
    try:
        outputs = predict(model, two).shape[1]
    except RuntimeError as error:
        raise ValueError(
            f"train: the model cannot take images of shape {shape} ({first_line(error)}). "
            f"Build it for data.image_shape, an MLP with in_features={data.num_features}."
        ) from error
    # On a GPU this shows late, and takes the whole process with it.
    if outputs != data.num_classes:
        raise ValueError(
            f"train: the model has {outputs} outputs, the data {data.num_classes} classes. "
            f"Build it with num_classes={data.num_classes}."
        )
