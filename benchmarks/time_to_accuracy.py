"""How long a full training takes: seconds until a goal is reached on the validation split.

    LABUTILS_DATA=... python benchmarks/time_to_accuracy.py mnist     a minute
    LABUTILS_DATA=... python benchmarks/time_to_accuracy.py cifar10   three quarters of an hour

mnist: an MLP 64-64 to 98 %, ten epochs of a one-cycle schedule with slight distortion, five seeds.
cifar10, one seed: to 79.18 %, the best published validation accuracy of a plain CNN, by the recipe
of that result, through our loop, and by a narrow FastNet that is trained for two epochs; to 94 % by
the FastNet of exercise 1.3, trained for 24 with smaller shifts and smoother labels than there.
Every training starts from nothing. Its seconds are those that `labutils.train` records, validation
after each epoch included; a goal counts as reached at the end of an epoch. Needs the real data.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

import labutils as lab
from labutils.base.device import device_name


def seconds_to(goal: float, run: lab.Run) -> float:
    """Training time until the validation accuracy is at least goal; infinite if it never is."""
    history = run.history
    return min(history.seconds.cumsum()[history.val_accuracy >= goal], default=math.inf)


def train(make: Callable[[], nn.Module], data: lab.ImageData, config: lab.TrainConfig) -> lab.Run:
    lab.seed_everything(config.seed)
    return lab.train(make(), data, config, progress=False, track=None, retrain=True)


def where(data: lab.ImageData) -> str:
    return f"{device_name(data.train.images.device)}, torch {torch.__version__}"


def mnist(device: str) -> None:
    data = lab.load_data("mnist", val_size=5_000, device=device)
    config = {
        "epochs": 10,
        "lr": 0.01,
        "weight_decay": 0.02,
        "schedule": "onecycle",
        "augment": lab.Augment(rotate=5, translate=0.5, zoom=0.05),
    }
    runs = [
        train(
            lambda: lab.MLP(data.num_features, [64, 64], data.num_classes, batch_norm=True),
            data,
            lab.TrainConfig(seed=seed, **config),
        )
        for seed in range(5)
    ]
    seconds = [seconds_to(0.98, run) for run in runs]
    accuracies = [100 * run.test(data).accuracy for run in runs]
    print(f"{where(data)}, n = {len(runs)}\n")
    print("| to 98 % on val, median (worst) | all ten epochs | test accuracy (%) |")
    print("|---|---|---|")
    print(
        f"| {statistics.median(seconds):.1f} s ({max(seconds):.1f} s) "
        f"| {statistics.median(run.seconds for run in runs):.1f} s "
        f"| {statistics.fmean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} |"
    )


def cifar10(device: str) -> None:
    data = lab.load_data("cifar10", val_size=0.1, device=device)
    task = data.image_shape, data.num_classes

    def fastnet(**options) -> nn.Module:
        network = lab.FastNet(*task, **options)
        network.whiten(next(data.train.batches(5_000))[0])
        return network

    light = lab.Augment(crop=2, flip="alternating")
    contestants = {
        "CNN 64-128-256, published recipe": (
            lambda: lab.CNN(*task),
            # As long as it takes, and a little longer: without a schedule, length changes nothing.
            lab.recipe("control", epochs=8, patience=None),
            0.7918,
        ),
        "FastNet 32-128-128, 2 epochs": (
            lambda: fastnet(widths=[32, 128, 128]),
            lab.recipe("ours", epochs=2, ema=0.98, augment=light),
            0.7918,
        ),
        "FastNet 64-256-256, 24 epochs": (
            fastnet,
            lab.recipe("ours", epochs=24, label_smoothing=0.2, augment=replace(light, cutout=8)),
            0.94,
        ),
    }
    print(f"{where(data)}, n = 1\n")
    print(
        "| training | goal on val | reached after | all epochs "
        "| val (%) | test (%) | with test-time flip (%) |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (make, config, goal) in contestants.items():
        run = train(make, data, config)
        reached = seconds_to(goal, run)
        test, flipped = (100 * run.test(data, tta=tta).accuracy for tta in (False, True))
        print(
            f"| {name} | {100 * goal:g} % "
            f"| {f'{reached:.0f} s' if math.isfinite(reached) else 'never'} | {run.seconds:.0f} s "
            f"| {100 * run.best('val_accuracy'):.2f} | {test:.2f} | {flipped:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=["mnist", "cifar10"])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="time-") as folder:
        os.environ["LABUTILS_RUNS"] = folder
        {"mnist": mnist, "cifar10": cifar10}[chosen.data](chosen.device)


if __name__ == "__main__":
    main()
