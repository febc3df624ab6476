"""Our fast recipe against the record's: seconds, operations and accuracy on CIFAR-10.

    LABUTILS_DATA=... python benchmarks/record.py                     about five hours, five rounds
    LABUTILS_DATA=... python benchmarks/record.py --rounds 1 --store FILE

Two contestants show how soon 79.18 % on val is reached, the best accuracy of a plain CNN in earlier
student solutions: the recipe of that result, through our loop (one seed), and a narrow FastNet.
Three train the wide FastNet on all 50,000 images, as the record for it does: the record's settings
in a bare loop, nearly the same through labutils.train, which tells what our loop costs, and
recipe("fast"). Contestants take turns, a seed each round; the narrow network, which takes seconds,
has five seeds in the first. Every training starts from nothing. --store keeps the results in a file
of JSON lines, from which a second start goes on.

The record is airbench94_muon of https://github.com/KellerJordan/cifar10-airbench. The bare loop
differs in two things: batch norm over parts of 125 images; and the first bias, whose rate falls to
0 in three epochs there as here, keeps its gradient for the other five, some 2 % of all operations
that the record spares. Through labutils.train that bias learns throughout, and Muon's step has a
fixed length.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from throughput import at_least, wait
from time_to_accuracy import seconds_to, where
from torch import Tensor, nn
from torch.nn import functional as F

import labutils as lab
from labutils.base.device import autocast, prefer_channels_last, usable_precision
from labutils.notebook.claims import ONE
from labutils.training.optim import orthogonalise

GOAL = 0.7918  # of val
WIDE, NARROW = (64, 256, 256), (32, 128, 128)


def fastnet(data: lab.ImageData, widths: tuple[int, ...], seed: int) -> nn.Module:
    lab.seed_everything(seed)
    network = lab.FastNet(data.image_shape, data.num_classes, widths=widths)
    network.whiten(next(data.train.batches(5_000))[0])
    return network


def six_views(model: nn.Module, split: lab.Split) -> float:
    """Accuracy (%) with logits averaged as in the record: both mirror images, half of the weight
    for the image as it is, a quarter each for it shifted by a pixel to either corner."""
    hits = 0
    for images, labels in split.batches(1_000):
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        views = [images, images, padded[:, :, :-2, :-2], padded[:, :, 2:, 2:]]
        with torch.inference_mode(), precision_of(images.device):
            logits = sum(model(view).float() + model(view.flip(3)).float() for view in views)
        hits += int((logits.argmax(1) == labels).sum())
    return 100 * hits / len(split)


def precision_of(device: torch.device):
    return autocast(usable_precision("auto", device), device)


def record(data: lab.ImageData, model: nn.Module, seed: int, epochs: int = 8) -> float:
    """Train by the record's recipe in a bare loop; the seconds. Its rates are for summed losses."""
    device = data.train.images.device
    prefer_channels_last(model.to(device), device)
    precision, augment = precision_of(device), lab.Augment(crop=2, flip="alternating")
    hidden = [p for p in model.parameters() if p.requires_grad and p.ndim > 1][:-1]
    whiten_bias, *biases = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    # A logit is divided by 9 in our network, by the 256 channels of the last map in the record's.
    head, head_lr, decay = model.head.weight, 0.67 * (9 / WIDE[-1]) ** 2, 2e-6 * 2000
    groups = [([whiten_bias], 0.053), (biases, 0.053), ([head], head_lr)]
    groups = [{"params": p, "lr": lr, "weight_decay": decay / lr} for p, lr in groups]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.85, nesterov=True, fused=True)
    momenta, first_lr = [torch.zeros_like(p) for p in hidden], [g["lr"] for g in sgd.param_groups]
    steps, step, started = epochs * math.ceil(len(data.train) / 2000), 0, time.perf_counter()
    model.train()
    for epoch in range(epochs):
        parts = data.train.shuffled(125, seed=seed, epoch=epoch, augment=augment)
        while batch := [*islice(parts, 16)]:
            for images, labels in batch:
                with precision:
                    logits = model(images)
                F.cross_entropy(
                    logits.float(), labels, label_smoothing=0.2, reduction="sum"
                ).backward()
            left = 1 - step / steps
            sgd.param_groups[0]["lr"] = first_lr[0] * max(0.0, 1 - step / (steps * 3 / epochs))
            for group, lr in zip(sgd.param_groups[1:], first_lr[1:]):
                group["lr"] = lr * left
            muon_step(hidden, momenta, 0.24 * left)
            sgd.step()
            model.zero_grad()
            step += 1
    wait(device)
    return time.perf_counter() - started


@torch.no_grad()
def muon_step(weights: list[Tensor], momenta: list[Tensor], lr: float) -> None:
    for weight, momentum in zip(weights, momenta):
        momentum.mul_(0.6).add_(weight.grad)
        gradient = weight.grad.add(momentum, alpha=0.6)
        weight.mul_(len(weight) ** 0.5 / weight.norm())
        weight.add_(orthogonalise(gradient.flatten(1)).view_as(weight), alpha=-lr)


def cost(model: nn.Module, data: lab.ImageData, epochs: int, sizes: tuple[int, ...] = ()) -> float:
    """Operations of all forward and backward passes, in PFLOP."""
    return lab.training_flops(model, data.image_shape, sizes) * len(data.train) * epochs / 1e15


def measured(model: nn.Module, data: lab.ImageData, **found: float) -> dict[str, Any]:
    for name, tta in (("test (%)", False), ("test (%), flip", True)):
        found[name] = 100 * lab.evaluate(model, data.test, precision="auto", tta=tta).accuracy
    return found | {"six views": six_views(model.eval(), data.test)}


def through_labutils(data, model, config, goal=None) -> dict[str, Any]:
    run = lab.train(model, data, config, progress=False, track=None, retrain=True)
    alone = (len(data.train) / run.history.images_per_second).sum()
    found = {"seconds": run.seconds, "without validation": alone}
    found["PFLOP"] = cost(model, data, run.epochs, config.image_sizes)
    if goal is not None:
        found[f"to {100 * goal:g} % on val"] = seconds_to(goal, run)
    return measured(run.model, data, **found)


def race(device: str, rounds: int, store: Path) -> None:
    part = lab.load_data("cifar10", val_size=0.1, device=device)
    joined = [
        torch.cat([getattr(split, name) for split in (part.train, part.val)])
        for name in ("images", "labels")
    ]
    # With val among its images, the best epoch is the last one or nearly so: nothing is chosen.
    whole = replace(part, train=replace(part.train, images=joined[0], labels=joined[1]))
    fast = lab.recipe("fast")

    def bare(seed: int) -> dict[str, Any]:
        model = fastnet(whole, WIDE, seed)
        took = record(whole, model, seed)
        found = {"seconds": took, "without validation": took, "PFLOP": cost(model, whole, 8)}
        return measured(model, whole, **found)

    def published(seed: int) -> dict[str, Any]:
        lab.seed_everything(seed)
        model = lab.CNN(part.image_shape, part.num_classes)
        # As long as it takes, and a little longer: without a schedule, length changes nothing.
        config = lab.recipe("control", epochs=8, patience=None, seed=seed)
        return through_labutils(part, model, config, GOAL)

    def narrow(seed: int) -> dict[str, Any]:
        small = {"batch_size": 500, "accumulate": 4, "image_sizes": (16, 24, 32)}
        config = replace(fast, epochs=1, seed=seed, **small)
        return through_labutils(part, fastnet(part, NARROW, seed), config, GOAL)

    def wide(seed: int, **changes: Any) -> dict[str, Any]:
        return through_labutils(
            whole, fastnet(whole, WIDE, seed), replace(fast, seed=seed, **changes)
        )

    contestants = {
        "CNN, published recipe, 8 epochs": published,
        "narrow FastNet, fast from 16 px at batch 500, 1 epoch": narrow,
        "FastNet, the record's settings, 8 epochs, bare loop": bare,
        "FastNet, nearly the same by labutils.train": partial(wide, epochs=8, image_sizes=()),
        "FastNet, recipe fast, 10 epochs": wide,
    }
    store.parent.mkdir(parents=True, exist_ok=True)
    store.touch()
    rows = [json.loads(line) for line in store.read_text().splitlines()]
    done, here = {(row["training"], row["seed"], row["on"]) for row in rows}, where(part)
    for turn in range(rounds):
        for name, run in contestants.items():
            # The slow one has its one seed, and the quick one all of its five, in the first round.
            for seed in {published: range(1), narrow: range(5)}.get(run, [turn]):
                if (name, seed, here) in done:
                    continue
                rows.append({"training": name, "seed": seed, "on": here} | run(seed))
                with store.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    for machine, table in pd.DataFrame(rows).groupby("on"):
        print(f"{machine}\n")
        print_table(table.drop(columns=["on", "seed"]))


def print_table(table: pd.DataFrame) -> None:
    table = table.assign(TFLOP=1000 * table.pop("PFLOP"))
    trainings = table.groupby("training", sort=False)
    means = trainings.agg(shown)
    means.insert(0, "n", trainings.size())
    table = means.reset_index().astype(str)
    for row in [table.columns, ["---"] * table.shape[1], *table.values]:
        print(f"| {' | '.join(row)} |")


def shown(values: pd.Series) -> str:
    never = (values == math.inf).sum()
    return f"never in {never}" if never else lab.mean_std(values).removesuffix(ONE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--store", type=Path, help="file to keep results in")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="record-") as folder:
        os.environ["LABUTILS_RUNS"] = folder
        race(chosen.device, chosen.rounds, chosen.store or Path(folder, "results.jsonl"))


if __name__ == "__main__":
    main()
