"""How fast convolutional networks train: images a second, and what makes them so.

    python benchmarks/throughput.py                            the tables of benchmarks/README.md
    python benchmarks/throughput.py --models cnn --seconds 30  one model, steadier
    python benchmarks/throughput.py --compile                  torch.compile too: minutes a model

For each model of exercise 1.3: a bare loop in float32 and bf16, channel by channel (contiguous) and
pixel by pixel (channels last), as it is or compiled; labutils.train as it decides by itself; and
the usual recipe: a data set of PIL images, transforms, a DataLoader with two workers, .item() in
every step. All of them crop and flip noise in the shape of CIFAR-10, at batch 128 with SGD. The
contestants take turns, and ratios are formed within a turn, because the speed of a shared machine
drifts. The first table is about the batches alone: what each augmentation costs.
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import labutils as lab
from labutils.base.device import autocast, device_name, usable_precision

BATCH, SHAPE, CLASSES = 128, (3, 32, 32), 10
MODELS: dict[str, Callable[[], nn.Module]] = {
    "simplecnn": lambda: lab.SimpleCNN(SHAPE, CLASSES),
    "cnn": lambda: lab.CNN(SHAPE, CLASSES),
    "fullyconvcnn": lambda: lab.FullyConvCNN(SHAPE, CLASSES),
    "resnet20": lambda: lab.ResNet(SHAPE, CLASSES, depth=20),
    "resnet18": lambda: lab.ResNet(SHAPE, CLASSES),
    "fastnet": lambda: lab.FastNet(SHAPE, CLASSES),
}
CROP_AND_FLIP = lab.Augment(crop=4, flip="random")
PIPELINES = {
    "normalise": lab.Augment(),
    "flip": lab.Augment(flip="random"),
    "crop": lab.Augment(crop=4),
    "crop, flip": CROP_AND_FLIP,
    "crop, flip, cutout": lab.Augment(crop=4, flip="random", cutout=8),
    "rotate, translate, zoom": lab.Augment(rotate=10, translate=2, zoom=0.1),
}


def make_data(device: torch.device, count: int) -> lab.ImageData:
    """Noise in the shape of CIFAR-10, read through labutils."""
    folder = tempfile.mkdtemp(prefix="throughput-")
    atexit.register(shutil.rmtree, folder)
    os.environ |= {"LABUTILS_DATA": folder, "LABUTILS_RUNS": folder}
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (count + 100, 32, 32, 3), dtype=np.uint8),
        "y_train": np.arange(count + 100) % CLASSES,
        "x_test": rng.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8),
        "y_test": np.arange(100) % CLASSES,
    }
    np.savez(f"{folder}/noise.npz", **arrays)
    return lab.load_data("noise", val_size=100, device=device)


class Pictures(Dataset):
    """PIL images with labels, as torchvision's data sets give them."""

    def __init__(self, split: lab.Split) -> None:
        pixels = split.images.cpu().permute(0, 2, 3, 1).numpy()
        self.items = list(zip(map(Image.fromarray, pixels), split.labels.tolist()))
        steps = [transforms.RandomCrop(32, 4, padding_mode="reflect")]
        steps += [transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize(split.mean, split.std)])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        image, label = self.items[number]
        return self.transform(image), label


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=1e-3, momentum=0.9, nesterov=True, fused=True)


def at_least(lowest: int) -> Callable[[str], int]:
    """A type of arguments: whole numbers, none of them lower."""

    def whole_number(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text} is too low. Give {lowest} or more.")
        return int(text)

    return whole_number


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bare:
    """A bare loop over resident tensors; its model is made, and compiled, before time is taken."""

    def __init__(
        self, make: Callable, data: lab.ImageData, precision: str, last: bool, compiled: bool
    ) -> None:
        self.split, self.device = data.train, data.train.images.device
        order = torch.channels_last if last else torch.contiguous_format
        model = make().to(self.device, memory_format=order)
        self.optimizer = optimizer_of(model)
        self.model = torch.compile(model, dynamic=False) if compiled else model
        self.autocast = autocast(precision, self.device)
        self.batches = self._endless()

    def _endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = 0
        while True:
            options = {"seed": 0, "epoch": epoch, "augment": CROP_AND_FLIP}
            for batch in self.split.shuffled(BATCH, **options):
                if len(batch[1]) == BATCH:  # another size would be compiled anew
                    yield batch
            epoch += 1

    def __call__(self, seconds: float) -> float:
        started, images_seen = time.perf_counter(), 0
        while time.perf_counter() - started < seconds or not images_seen:
            images, labels = next(self.batches)
            with self.autocast:
                logits = self.model(images)
            F.cross_entropy(logits.float(), labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            images_seen += len(labels)
            if images_seen % (64 * BATCH) == 0:
                wait(self.device)  # a GPU runs behind the clock
        wait(self.device)
        return images_seen / (time.perf_counter() - started)


class Usual:
    """The usual recipe, in float32."""

    def __init__(self, make: Callable, data: lab.ImageData) -> None:
        self.device = data.train.images.device
        self.loader = DataLoader(Pictures(data.train), BATCH, shuffle=True, num_workers=2)
        self.model = make().to(self.device)
        self.optimizer = optimizer_of(self.model)

    def __call__(self, seconds: float) -> float:
        images_seen, total, took = 0, 0.0, 0.0
        while took < seconds:
            started = None
            for images, labels in self.loader:
                started = started or time.perf_counter()  # until then, its workers start
                self.optimizer.zero_grad()
                loss = F.cross_entropy(self.model(images.to(self.device)), labels.to(self.device))
                loss.backward()
                self.optimizer.step()
                total += loss.item()
                images_seen += len(labels)
                if took + time.perf_counter() - started > seconds:
                    break
            took += time.perf_counter() - started
        return images_seen / took


class Ours:
    """labutils.train, for about as many epochs as fit into the time."""

    def __init__(self, make: Callable, data: lab.ImageData) -> None:
        self.make, self.data, self.turn, self.speed = make, data, 0, 0.0

    def __call__(self, seconds: float) -> float:
        self.turn += 1
        config = lab.TrainConfig(
            epochs=max(1, round(seconds * self.speed / len(self.data.train))),
            batch_size=BATCH,
            optimizer="sgd",
            augment=CROP_AND_FLIP,
            precision="auto",
            seed=self.turn,
        )
        options = {"name": "throughput", "progress": False, "track": None}
        run = lab.train(self.make(), self.data, config, **options)
        self.speed = run.history.images_per_second.median()
        return self.speed


def take_turns(
    contestants: dict[str, Callable[[float], float]], seconds: float, turns: int
) -> dict[str, list[float]]:
    """Images a second of each contestant in each turn, after a short one that warms up."""
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in contestants.values():
        contestant(seconds / 10)
    for _ in range(turns):
        for name, contestant in contestants.items():
            speeds[name].append(contestant(seconds))
    return speeds


def print_table(speeds: dict[str, list[float]], first: str) -> None:
    """first: the contestant that the others are compared with."""
    print(f"| | images/s | × {first} |\n|---|---|---|")
    for name, values in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(values, speeds[first]))
        print(f"| {name} | {statistics.median(values):,.0f} | {ratio:.2f} |")
    print(flush=True)


def compare_models(data: lab.ImageData, options: argparse.Namespace) -> None:
    device = data.train.images.device
    precisions = dict.fromkeys(usable_precision(asked, device) for asked in ("float32", "auto"))
    for name in options.models:
        make = MODELS[name]
        contestants: dict[str, Callable[[float], float]] = {
            f"{precision}, {'channels last' if last else 'contiguous'}"
            f"{', compiled' if compiled else ''}": Bare(make, data, precision, last, compiled)
            for precision in precisions
            for last in (False, True)
            for compiled in (False, True)[: 1 + options.compile]
        }
        contestants["labutils.train"] = Ours(make, data)
        contestants["usual recipe"] = Usual(make, data)
        print(f"**{name}**, {lab.num_parameters(make()):,} parameters\n")
        print_table(take_turns(contestants, options.seconds, options.turns), "float32, contiguous")


def compare_pipelines(data: lab.ImageData, options: argparse.Namespace) -> None:
    device = data.train.images.device

    def pass_over(augment: lab.Augment) -> Callable[[float], float]:
        def run(seconds: float) -> float:
            started, epochs = time.perf_counter(), 0
            while not epochs or time.perf_counter() - started < seconds:
                batches = data.train.shuffled(BATCH, seed=0, epoch=epochs, augment=augment)
                for _ in batches:
                    pass
                wait(device)
                epochs += 1
            return epochs * len(data.train) / (time.perf_counter() - started)

        return run

    print("**Batches alone**\n")
    contestants = {name: pass_over(augment) for name, augment in PIPELINES.items()}
    print_table(take_turns(contestants, options.seconds / 5, options.turns), "normalise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--seconds", type=float, default=10, help="a turn; a fifth for batches alone"
    )
    parser.add_argument("--turns", type=at_least(1), default=3, help="turns of every contestant")
    parser.add_argument(
        "--images", type=at_least(BATCH), default=2_560, help="in the training split"
    )
    parser.add_argument("--compile", action="store_true", help="compiled contestants as well")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    options = parser.parse_args()
    device = lab.resolve_device(options.device)
    print(
        f"Noise of 32x32x3, batch {BATCH}, SGD; median of {options.turns} turns of "
        f"{options.seconds:g} s; {device_name(device)}, torch {torch.__version__}\n"
    )
    data = make_data(device, options.images)
    compare_pipelines(data, options)
    compare_models(data, options)


if __name__ == "__main__":
    main()
