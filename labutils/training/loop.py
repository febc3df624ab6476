"""`train`: one loop that trains a classifier, and continues where it was cut off.

`_loop` is all there is to it, and nothing in it waits for the device; the rest stands around it.
What a training remembers is in checkpoint.py, how it is stored in store.py.
"""

import datetime
import json
import math
import platform
import signal
import time
from contextlib import ExitStack, suppress
from itertools import islice
from typing import Annotated, Literal

import torch
from pydantic import Field, InstanceOf
from torch import nn

from ..base import device as machine
from ..base.files import runs_dir
from ..base.settings import NonNegativeFloat, TrainConfig, check
from ..data.augmentation import resize
from ..data.tensors import ImageData
from ..evaluation.metrics import loss_and_accuracy
from ..models.registry import num_parameters
from . import checkpoint, watch
from .cards import RunError, save_weights
from .key import identify, run_key
from .optim import lr_factor, make_optimizer, require_trainable, stop_reason
from .runs import Run, find
from .store import finish, open_part, store_lock
from .target import Teacher, batch_loss, require_teachable

_KINDS = {"model": InstanceOf[nn.Module], "data": InstanceOf[ImageData]}
_KINDS |= {"config": InstanceOf[TrainConfig], "checkpoint_seconds": NonNegativeFloat}
_KINDS |= {"teacher": InstanceOf[Teacher] | None, "track": list[Literal["auto", *watch.MIRRORS]]}
_KINDS |= {"name": Annotated[str, Field(pattern="^[A-Za-z0-9._-]+$", max_length=200)]}


def train(
    model: nn.Module,
    data: ImageData,
    config: TrainConfig | None = None,
    *,
    teacher: Teacher | None = None,
    name: str = "run",
    retrain: bool = False,
    track: str | list[str] | None = "auto",
    progress: bool = True,
    checkpoint_seconds: float = 30.0,
) -> Run:
    """Train a classifier, or load the finished run that did exactly this before.

    model: float32 [n, C, H, W] -> logits [n, num_classes]. It is moved to the device of the data
        and ends with the weights of the best epoch by config.monitor, unless only the card of the
        run is published.
    teacher: who answers beside the labels, as much as config.alpha says; see target.batch_loss.
    name: starts the run's folder. retrain: even if the run is stored.
    track: see watch.open_mirrors. progress: live bar, and a line when a stored run is loaded.
    config.accumulate: a step is computed in so many parts, whose gradients add up to those of the
        batch; batch norm sees one part at a time. config.image_sizes: images are shrunk to each of
        these in turn, for equal shares of the steps (Tan and Le 2021,
        https://arxiv.org/abs/2104.00298); the last is their own. Scored at full size.
    checkpoint_seconds: time between checkpoints; besides, a kill costs a step or a validation.
    A model.compile() before, like the device and bf16, changes rounding and dropout's choice, but
    not the key.

    A run that was cut off goes on when it is called for again, with a model built and seeded like
    the first, and ends with the same bits on the same machine (on a GPU as far as cuDNN allows); a
    network of your own starts anew.
    Ctrl-C stops after the batch, saves and returns the unfinished run; too late for that, it is
    raised when the run is stored. Raises ValueError for bad arguments; RunError if the loss stops
    being finite, a checkpoint cannot be continued, or the runs folder cannot be written.
    """
    config = config or TrainConfig()
    track = [track] if isinstance(track, str) else track or []
    given = {"model": model, "data": data, "config": config, "name": name}
    given |= {"teacher": teacher, "track": track, "checkpoint_seconds": checkpoint_seconds}
    check("train", _KINDS, given)
    require_trainable(model, data, config)
    require_teachable(teacher, data, config)
    run = _describe(model, data, config, teacher, name)
    found = None
    with suppress(RunError):  # another process may be replacing it: under the lock nobody does
        found = None if retrain else find(run.key, model)
    if not found:
        with store_lock(run.key):
            # Another process may have finished this very run while we waited for the lock.
            if retrain or not (found := find(run.key, model)):
                return _train(run, data, config, teacher, track, progress, checkpoint_seconds)
    if progress:
        watch.say(str(found))
    return found


def _loop(state, data, config, teacher, after_step, after_epoch) -> str | None:
    """Train on from `state` until a rule, which is returned, or after_step's True ends it."""
    model, optimizer, averaged = state.model, state.optimizer, state.averaged
    steps = _steps(data, config)  # in an epoch
    precision = machine.autocast(state.precision, data.train.images.device)
    model.zero_grad()  # it may bring gradients along
    for epoch in range(state.epoch, config.epochs):
        state.started = time.perf_counter()
        taught = teacher and teacher.lessons(data, config, epoch, _part_size(config))
        order = {"seed": config.seed, "epoch": epoch, "start": state.batch}
        batches = data.train.shuffled(_part_size(config), **order, augment=config.augment)
        model.train()
        while parts := [*islice(batches, config.accumulate)]:  # the batches of one step
            step = epoch * steps + state.batch // config.accumulate
            size = sum(len(labels) for _, labels in parts)
            for images, labels in parts:
                if sizes := config.image_sizes:  # each in turn, for equal shares of the steps
                    images = resize(images, sizes[step * len(sizes) // (steps * config.epochs)])
                with precision:
                    logits = model(images)
                logits = logits.float()
                soft = None if taught is None else taught[state.images :][: len(labels)]
                loss = batch_loss(logits, labels, soft, config)
                loss.backward(torch.full_like(loss, len(labels) / size))
                # Reading the loss here would wait for the device; it is read when the epoch ends.
                state.add(loss, logits, labels)
            lr = config.lr * lr_factor(config, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["share"]
            optimizer.step()
            optimizer.zero_grad()
            if averaged is not None:
                averaged.update()
            if after_step(size):
                return None  # interrupted
        after_epoch()
        if reason := stop_reason(state.rows, config):
            return reason


def _part_size(config) -> int:
    return config.batch_size // config.accumulate


def _steps(data, config) -> int:
    """How many times the optimizer steps in an epoch."""
    return math.ceil(data.train.num_batches(_part_size(config)) / config.accumulate)


def _train(run, data, config, teacher, track, progress, checkpoint_seconds) -> Run:
    """All around the loop: what it starts from, who watches it, what is saved and when."""
    with ExitStack() as stack:
        state = _start_or_continue(run, data, config, stack)
        size, log = len(data.train), run.path / "train.log"
        done, total = size * state.epoch + state.images, size * config.epochs
        bar = watch.Progress(run.name, total=total, done=done, log=log, show=progress)
        stack.callback(bar.close)
        if config.precision == "bf16" != state.precision:
            problem = f"{run.info['device']} does not compute in bf16: trained in float32"
            bar.note(problem)
            watch.warn(problem)
        mirrors = watch.open_mirrors(run, track)
        stack.callback(lambda: watch.show_mirrors(mirrors, state.summary(), final=True))
        interrupted = stack.enter_context(machine.signals(signal.SIGINT))
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
            watch.show_mirrors(mirrors, state.rows[-1])

        reason = _loop(state, data, config, teacher, after_step, after_epoch)
        # They write into the run's folder, which is about to get another name.
        watch.show_mirrors(mirrors, state.summary(), final=True)
        _finish(run, state, reason or "interrupted")
        bar.end(run.stop_reason)
    if interrupted and reason:
        # Too late to stop this run, which is stored; but the caller may have more to do.
        signal.raise_signal(signal.SIGINT)
    return run


def _start_or_continue(run, data, config, stack) -> checkpoint.TrainingState:
    """The state at the start of a run or in its last checkpoint, with its seed and threads."""
    run.path = open_part(run.name, run.key)
    run.name = run.path.name.removesuffix(f"-{run.key}.part")  # as it was first called
    device, last = data.train.images.device, run.path / "last.pt"
    # First, since the optimizer and the average copy the order in memory that it sets.
    machine.prefer_channels_last(run.model, device)
    averaged = checkpoint.Average(run.model, config.ema) if config.ema else None
    state = checkpoint.TrainingState(run.model, make_optimizer(run.model, config), averaged)
    state.precision = machine.usable_precision(config.precision, device)
    state.threads = machine.choose_threads(run.model, _part_size(config), device)
    stack.enter_context(machine.own_random_numbers(config.seed))
    if last.exists():
        checkpoint.load(last, run.key, state, device)
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(state.threads)
    run.rows = state.rows
    run.info |= {"threads": state.threads, "precision": state.precision}
    return state


def _score_epoch(run, state, data, config) -> None:
    """Add the row of the epoch, and keep its weights if they are the best so far."""
    state.count()
    # Reading the losses waits for the device, so that its time is counted.
    train_loss = float(state.losses.cpu().double().sum()) / state.images
    state.stop_clock()
    speed = round(state.images / state.epoch_seconds, 1)
    scored = state.model if state.averaged is None else state.averaged.module
    val_loss, val_accuracy = loss_and_accuracy(scored, data.val, precision=state.precision)
    _require_finite(run, state, data, config, val_loss)
    state.stop_clock()
    train_accuracy, lr = int(state.hits) / state.images, state.optimizer.param_groups[0]["lr"]
    row = {"epoch": state.epoch + 1, "train_loss": train_loss, "train_accuracy": train_accuracy}
    row |= {"val_loss": val_loss, "val_accuracy": val_accuracy, "lr": lr}
    row |= {"images_per_second": speed, "seconds": round(state.epoch_seconds, 4)}
    state.end_epoch(row, scored, config.monitor)


def _require_finite(run, state, data, config, val_loss=0.0) -> None:
    """Raise RunError if a loss of this epoch is not finite; the best weights are saved before."""
    state.count()
    losses, steps = [*state.losses.tolist(), val_loss], _steps(data, config)
    bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is None:
        return
    what = "loss" if bad < state.batch else "validation loss"
    step, kept = min(bad, state.batch - 1) // config.accumulate, "there is none yet"
    lr = config.lr * lr_factor(config, state.epoch * steps + step, steps)
    if state.best_epoch:
        save_weights(run.weights, state.best_weights)
        kept = f"{run.weights} (epoch {state.best_epoch})"
    moment = f"epoch {state.epoch + 1}, step {step + 1} of {steps}, at learning rate {lr:.3g}"
    problem = f"train: {run.name}: the {what} became {losses[bad]} in {moment}"
    raise RunError(f"{problem}. Last good checkpoint: {kept}. Try a lower lr.")


def _finish(run, state, reason) -> None:
    """Give the model its best weights; put a run that is complete into the store."""
    run.info |= {"epochs": state.epoch, "best_epoch": state.best_epoch, "stop_reason": reason}
    run.info["seconds"] = round(sum(row["seconds"] for row in run.rows) + state.epoch_seconds, 3)
    run.info["finished"] = datetime.date.today().isoformat()
    if reason != "interrupted":
        finish(run, state.best_weights)
        (run.path / "last.pt").unlink(missing_ok=True)
    if state.best_weights:
        run.model.load_state_dict(state.best_weights)


def _describe(model, data, config, teacher, name) -> Run:
    """The run with all that is known before it is trained, its key above all."""
    spec, weights = identify(model, config.seed)
    info = {"model": spec, "weights": weights, "parameters": num_parameters(model)}
    info["config"] = config.values()
    facts = "name", "source", "fingerprint", "loaded"
    info["data"] = {fact: getattr(data, fact) for fact in facts}
    info["data"]["images"] = {name: len(getattr(data, name)) for name in ("train", "val", "test")}
    # What it takes to use the network on another image, without the data.
    info["data"] |= {"classes": list(data.classes), "shape": list(data.image_shape)}
    info["data"] |= {"mean": [*map(float, data.train.mean)], "std": [*map(float, data.train.std)]}
    try:
        info["data"] = json.loads(json.dumps(info["data"]))  # as the card will have it
    except TypeError as error:
        problem = f"the name, source or loaded of the data cannot be written ({error})"
        raise ValueError(f"train: {problem}. Give text and plain numbers.") from None
    info["device"] = machine.device_name(data.train.images.device)
    info |= {"torch": torch.__version__, "python": platform.python_version()}
    if teacher is not None:
        info["teacher"] = teacher.key
    key = run_key(config, spec, weights, data.fingerprint, info.get("teacher", ""))
    return Run(name, key, info, rows=[], path=runs_dir(), model=model)
