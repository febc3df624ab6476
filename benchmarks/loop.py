"""How much the training loop costs: images a second of labutils.train against two yardsticks.

    python benchmarks/loop.py             the tables of benchmarks/README.md
    python benchmarks/loop.py --repeats 9 more repeats, steadier ratios

(a) a bare hand-written loop over the same resident tensors; (b) the usual recipe: a torchvision
data set, ToTensor and Normalize, a DataLoader with two workers, .item() in every step. All train
with Adam at batch 128 on MNIST-shaped noise on the CPU: the MLP 64-64, and a residual MLP of 100
layers, of which (b) is left out because there the network takes nearly all of the time. The
contestants take turns, and ratios are formed within a turn, because the speed of a shared machine
drifts. Validation, set-up and what a run stores are not counted.
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from throughput import at_least
from torch import nn
from torch.nn import functional as F
from torchvision import datasets, transforms

import labutils as lab
from labutils.base.device import device_name

IMAGES, BATCH, MEAN, STD = 60_000, 128, 0.1307, 0.3081


def make_data() -> lab.ImageData:
    """Noise in the shape of MNIST, in torchvision's files; read through labutils as well."""
    folder = tempfile.mkdtemp(prefix="loop-")
    atexit.register(shutil.rmtree, folder)
    os.environ |= {"LABUTILS_DATA": folder, "LABUTILS_RUNS": folder}
    rng, raw = np.random.default_rng(0), Path(folder, "MNIST", "raw")
    raw.mkdir(parents=True)
    for split, count in (("train", IMAGES), ("t10k", 100)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        head = struct.pack(">IIII", 2051, count, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, count) + labels.tobytes()
        )
    return lab.load_data("mnist", val_size=100, device="cpu")


def make_mlp() -> nn.Module:
    return lab.MLP(784, [64, 64], 10)


def make_deep() -> nn.Module:
    return lab.ResidualMLP(784, [64] * 100, 10)


def with_labutils(data: lab.ImageData, model: nn.Module, turn: int) -> float:
    config = lab.TrainConfig(epochs=1, batch_size=BATCH, optimizer="adam", seed=turn)
    run = lab.train(model, data, config, name="loop", retrain=True, progress=False, track=None)
    return run.history.images_per_second.iloc[0]


def bare_loop(data: lab.ImageData, model: nn.Module, turn: int) -> float:
    split = data.train
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    started = time.perf_counter()
    for index in torch.randperm(len(split)).split(BATCH):
        images = (split.images[index].float() / 255 - MEAN) / STD
        loss = F.cross_entropy(model(images), split.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return len(split) / (time.perf_counter() - started)


def usual_recipe(data: lab.ImageData, model: nn.Module, turn: int) -> float:
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    pictures = datasets.MNIST(os.environ["LABUTILS_DATA"], transform=transform)
    loader = torch.utils.data.DataLoader(pictures, batch_size=BATCH, shuffle=True, num_workers=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    criterion, total = nn.CrossEntropyLoss(), 0.0
    started = time.perf_counter()
    for images, labels in loader:
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return len(pictures) / (time.perf_counter() - started)


CONTESTANTS = {
    "labutils.train": with_labutils,
    "bare loop": bare_loop,
    "usual recipe": usual_recipe,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=at_least(1), default=5, help="turns of every contestant")
    repeats = parser.parse_args().repeats
    data = make_data()
    print(
        f"{IMAGES:,} images of 28x28, batch {BATCH}, Adam; median of {repeats} epochs; "
        f"{device_name(torch.device('cpu'))}, torch {torch.__version__}\n"
    )
    print("| network | | images/s | speed of labutils.train over this |\n|---|---|---|---|")
    compare("MLP 64-64", make_mlp, list(CONTESTANTS), data, repeats)
    compare("residual, 100 layers", make_deep, ["labutils.train", "bare loop"], data, repeats)


def compare(
    network: str, make: Callable, names: list[str], data: lab.ImageData, repeats: int
) -> None:
    """Print a row for each contestant; the first turn warms up and does not count."""
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        for name, found in speeds.items():
            lab.seed_everything(turn)
            found.append(CONTESTANTS[name](data, make(), turn))
    ours, *_ = (values[1:] for values in speeds.values())
    for name, (_, *values) in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(ours, values))
        speed = statistics.median(values)
        print(f"| {network} | {name} | {speed:,.0f} | × {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
