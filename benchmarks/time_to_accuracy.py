"""How long a full training takes: seconds until an MLP 64-64 has 98 % of MNIST's val split right.

    LABUTILS_DATA=... python benchmarks/time_to_accuracy.py

Ten epochs of a one-cycle schedule with batch normalisation and slight distortion, from nothing, on
the CPU; the training seconds that `labutils.train` records, validation included. Needs real MNIST.
"""

from __future__ import annotations

import os
import statistics
import tempfile

import torch

import labutils as lab
from labutils.config import device_name

SEEDS, GOAL = range(5), 0.98


def main() -> None:
    data = lab.load_data("mnist", val_size=5_000, device="cpu")
    os.environ["LABUTILS_RUNS"] = tempfile.mkdtemp(prefix="time-")
    config = {
        "epochs": 10,
        "lr": 0.01,
        "weight_decay": 0.02,
        "schedule": "onecycle",
        "augment": lab.Augment(rotate=5, translate=0.5, zoom=0.05),
    }
    seconds, totals, accuracies = [], [], []
    for seed in SEEDS:
        lab.seed_everything(seed)
        model = lab.MLP(data.num_features, [64, 64], data.num_classes, batch_norm=True)
        run = lab.train(
            model, data, lab.TrainConfig(seed=seed, **config), progress=False, track=None
        )
        passed = [row["epoch"] for row in run.rows if row["val_accuracy"] >= GOAL]
        end = passed[0] if passed else len(run.rows)
        seconds.append(sum(row["seconds"] for row in run.rows[:end]) if passed else float("inf"))
        totals.append(run.seconds)
        accuracies.append(100 * run.test(data).accuracy)
    print(f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, n = {len(seconds)}\n")
    print("| to 98 % on val, median (worst) | all ten epochs | test accuracy (%) |")
    print("|---|---|---|")
    print(
        f"| {statistics.median(seconds):.1f} s ({max(seconds):.1f} s) "
        f"| {statistics.median(totals):.1f} s "
        f"| {statistics.fmean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} |"
    )


if __name__ == "__main__":
    main()
