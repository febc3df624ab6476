"""How long a full training takes: seconds until a goal is reached on the validation split.

    LABUTILS_DATA=... python benchmarks/time_to_accuracy.py mnist     a minute
    LABUTILS_DATA=... python benchmarks/time_to_accuracy.py cifar10   some three hours on two cores

mnist: an MLP 64-64 to 98 %, ten epochs of a one-cycle schedule with slight distortion, five seeds.
cifar10: to 79.18 %, the best published validation accuracy of a plain CNN, by the recipe of that
result, through our loop (one seed), and by a narrow FastNet; then the FastNet of exercise 1.3 by
its own recipe, against the recipe that holds the record on a GPU, airbench94_muon
(https://github.com/KellerJordan/cifar10-airbench), written out here as a bare loop over the same
tensors, on the same network; five seeds each, taking turns.
Every training starts from nothing. Its seconds to a goal are those that `labutils.train` records,
validation after each epoch included; a goal counts as reached at the end of an epoch. Seconds of
training are without validation. --store keeps what is finished in a folder, and goes on from
there. Needs the real data.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

import labutils as lab
from labutils.base.device import autocast, device_name, prefer_channels_last, usable_precision
from labutils.training.optim import orthogonalise

PART = 125  # images that are computed at once, which is what the cache of a processor takes


def seconds_to(goal: float, run: lab.Run) -> float:
    """Training time until the validation accuracy is at least goal; infinite if it never is."""
    history = run.history
    return min(history.seconds.cumsum()[history.val_accuracy >= goal], default=math.inf)


def train(make: Callable[[], nn.Module], data: lab.ImageData, config: lab.TrainConfig) -> lab.Run:
    lab.seed_everything(config.seed)
    return lab.train(make(), data, config, progress=False, track=None)


def say_where(data: lab.ImageData) -> None:
    where = device_name(data.train.images.device)
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")


def mean_std(values: list[float], digits: int = 2) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


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
    say_where(data)
    print("| to 98 % on val, median (worst), n = 5 | all ten epochs | test accuracy (%) |")
    print("|---|---|---|")
    print(
        f"| {statistics.median(seconds):.1f} s ({max(seconds):.1f} s) "
        f"| {statistics.median(run.seconds for run in runs):.1f} s "
        f"| {mean_std([100 * run.test(data).accuracy for run in runs])} |"
    )


def fastnet(data: lab.ImageData, **options) -> nn.Module:
    network = lab.FastNet(data.image_shape, data.num_classes, **options)
    network.whiten(next(data.train.batches(5_000))[0])
    return network


def with_validation_images(data: lab.ImageData) -> lab.ImageData:
    """The same data with all images in train, as the record has it; val are some of them."""
    images = torch.cat([data.train.images, data.val.images])
    labels = torch.cat([data.train.labels, data.val.labels])
    return replace(data, train=replace(data.train, images=images, labels=labels))


def record(data: lab.ImageData, seed: int, epochs: int = 8) -> tuple[nn.Module, float]:
    """The recipe of airbench94_muon; returns the network and the seconds of its training.

    Its rates are for summed losses and a head scaled by 1/256; these are the same for mean losses
    and FastNet's head, scaled by 1/9. A batch of 2,000 is computed in 16 parts, each with batch
    statistics of its own.
    """
    lab.seed_everything(seed)
    network, device = fastnet(data), data.train.images.device
    prefer_channels_last(network.to(device), device)
    context = autocast(usable_precision("auto", device), device)
    parts, steps = 2_000 // PART, len(data.train) // 2_000
    whitening = network.stages["whiten"][0].bias
    filters = [p for p in network.parameters() if p.ndim == 4 and p.requires_grad]
    offsets = [p for p in network.parameters() if p.ndim == 1 and p.requires_grad]
    head = [network.head.weight]
    groups = [
        {"params": params, "peak": lr, "weight_decay": 0.004 / lr, "steps": length * steps}
        for params, lr, length in (
            ([whitening], 106.0, 3),
            (offsets[1:], 106.0, epochs),
            (head, 1.656, epochs),
        )
    ]
    sgd = torch.optim.SGD(groups, lr=0.0, momentum=0.85, nesterov=True, fused=True)
    momenta = [torch.zeros_like(weight) for weight in filters]
    started, step, size = time.perf_counter(), 0, {"crop": 2, "flip": "alternating"}
    for epoch in range(epochs):
        network.train()
        batches = data.train.shuffled(PART, seed=seed, epoch=epoch, augment=lab.Augment(**size))
        for number, (images, labels) in enumerate(batches, start=1):
            with context:
                logits = network(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.2) / parts
            loss.backward()
            if number % parts:
                continue
            with torch.no_grad():
                for weight, momentum in zip(filters, momenta):
                    momentum.mul_(0.6).add_(weight.grad)
                    change = orthogonalise((weight.grad + 0.6 * momentum).flatten(1))
                    weight.mul_(len(weight) ** 0.5 / weight.norm())
                    rate = 0.24 * (1 - step / (epochs * steps))
                    weight.sub_(change.view_as(weight), alpha=rate)
            for group in sgd.param_groups:
                group["lr"] = group["peak"] * max(0, 1 - step / group["steps"])
            if step >= 3 * steps:
                whitening.grad = None
            sgd.step()
            network.zero_grad()
            step += 1
    return network, time.perf_counter() - started


def six_views(network: nn.Module, split: lab.Split, precision: str) -> torch.Tensor:
    """airbench's test-time augmentation: logits of an image as it is and shifted by a pixel up
    left or down right, each with its mirror image; the shifted ones have half of the weight."""
    padded = F.pad(split.images.float(), (1, 1, 1, 1), mode="reflect").to(split.images.dtype)
    total, (height, width) = 0, split.images.shape[2:]
    for corner, weight in ((1, 0.5), (0, 0.25), (2, 0.25)):
        images = padded[:, :, corner : corner + height, corner : corner + width]
        view = replace(split, images=images)
        total = total + weight * lab.predict(network, view, precision=precision, tta=True)
    return total


def score(network: nn.Module, data: lab.ImageData) -> dict[str, float]:
    """Test accuracies (%): of the images as they are, with their mirror images, of six views."""
    precision = usable_precision("auto", data.test.images.device)
    plain, flipped = (
        lab.predict(network, data.test, precision=precision, tta=tta) for tta in (False, True)
    )
    views = {"test": plain, "flip": flipped, "six": six_views(network, data.test, precision)}
    labels = data.test.labels
    return {k: 100 * float((v.argmax(1) == labels).float().mean()) for k, v in views.items()}


def petaflops(network: nn.Module, data: lab.ImageData, config: lab.TrainConfig) -> float:
    """Operations of a whole training, as torch counts them, without optimizer and validation."""
    sizes = config.image_sizes or data.image_shape[1:2]
    channels, images = data.image_shape[0], config.epochs * len(data.train) / len(sizes)
    return sum(images * lab.training_flops(network, (channels, s, s)) for s in sizes) / 1e15


def kept(path: Path, measure: Callable[[int], dict], seed: int) -> dict:
    """What was measured before, if it is there."""
    if not path.exists():
        path.write_text(json.dumps(measure(seed)))
    return json.loads(path.read_text())


def cifar10(device: str) -> None:
    held_out = lab.load_data("cifar10", val_size=0.1, device=device)
    everything = with_validation_images(held_out)
    store = Path(os.environ["LABUTILS_RUNS"])
    fast = lab.recipe("fast")

    def by_record(seed: int) -> dict:
        network, seconds = record(everything, seed)
        return {"seconds": seconds, **score(network, everything)}

    def by_us(data: lab.ImageData, seed: int) -> dict:
        run = train(lambda: fastnet(data), data, replace(fast, seed=seed))
        speed = run.history.images_per_second
        return {"seconds": sum(len(data.train) / speed), **score(run.require_model(), data)}

    contestants = {
        "record recipe": (everything, lab.TrainConfig(epochs=8), by_record),
        "ours": (everything, fast, lambda seed: by_us(everything, seed)),
        "ours, 5,000 held out": (held_out, fast, lambda seed: by_us(held_out, seed)),
    }
    rows = []
    for seed in range(5):
        for name, (_, _, measure) in contestants.items():
            path = store / f"{name.replace(' ', '-')}-{seed}.json"
            rows.append({"name": name, **kept(path, measure, seed)})
    say_where(held_out)
    print("FastNet 64-256-256, test accuracy (%)\n")
    print("| recipe | images | epochs | PFLOP | seconds | as they are | with flip | six views |")
    print("|---|---|---|---|---|---|---|---|")
    table = pd.DataFrame(rows).set_index("name")
    for name, (data, config, _) in contestants.items():
        found = table.loc[[name]]
        work = petaflops(fastnet(data), data, config)
        cells = [mean_std(found[column].tolist()) for column in ("test", "flip", "six")]
        seconds = mean_std(found.seconds.tolist(), 0)
        cells = [name, f"{len(data.train):,}", str(config.epochs), f"{work:.3f}", seconds, *cells]
        print(f"| {' | '.join(cells)} |", flush=True)
    to_published_accuracy(held_out, fast)


def to_published_accuracy(data: lab.ImageData, fast: lab.TrainConfig) -> None:
    """Seconds to 79.18 % on val, the best published for a plain CNN."""
    contestants = {
        "CNN 64-128-256, published recipe": (
            lambda: lab.CNN(data.image_shape, data.num_classes),
            # As long as it takes, and a little longer: without a schedule, length changes nothing.
            lab.recipe("control", epochs=8, patience=None),
            1,
        ),
        "FastNet 32-128-128": (
            lambda: fastnet(data, widths=[32, 128, 128]),
            replace(fast, epochs=2),
            5,
        ),
    }
    print("\n| training | to 79.18 % on val | all epochs | test (%) | n |")
    print("|---|---|---|---|---|")
    for name, (make, config, n) in contestants.items():
        runs = [train(make, data, replace(config, seed=seed)) for seed in range(n)]
        reached = [seconds_to(0.7918, run) for run in runs]
        total = mean_std([run.seconds for run in runs], 0)
        test = mean_std([100 * run.test(data).accuracy for run in runs])
        print(f"| {name} | {mean_std(reached, 0)} s | {total} s | {test} | {n} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=["mnist", "cifar10"])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--store", help="folder that keeps finished trainings")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="time-") as folder:
        os.environ["LABUTILS_RUNS"] = chosen.store or folder
        Path(os.environ["LABUTILS_RUNS"]).mkdir(parents=True, exist_ok=True)
        {"mnist": mnist, "cifar10": cifar10}[chosen.data](chosen.device)


if __name__ == "__main__":
    main()
