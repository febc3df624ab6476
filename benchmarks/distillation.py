"""What a teacher costs: its answers, and a student's step with them.

    python benchmarks/distillation.py             the table of benchmarks/README.md
    python benchmarks/distillation.py --turns 9   more turns, steadier ratios

The networks of exercise 2.2, FastNet 64-256-256 and 28-112-112, on noise in the shape of CIFAR-10,
with crops and flips. An epoch of each: the teacher's own training, its answers for the views of one
epoch, the student's training without a teacher, and with answers that are recorded. The contestants
take turns, and ratios are formed within a turn, because the speed of a shared machine drifts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

from throughput import at_least, make_data

import labutils as lab
from labutils.base.device import device_name

AUGMENT = lab.Augment(crop=2, flip="alternating")
PLAIN = lab.recipe("fast", epochs=1, batch_size=128, accumulate=1, image_sizes=(), augment=AUGMENT)
TAUGHT = replace(PLAIN, alpha=0.9, temperature=2.0)


def fastnet(data: lab.ImageData, width: int) -> lab.FastNet:
    return lab.FastNet(data.image_shape, 10, widths=[width, 4 * width, 4 * width])


def train(data, width, config, **options) -> lab.Run:
    settings = {"name": "distillation", "retrain": True, "track": None, "progress": False}
    return lab.train(fastnet(data, width), data, config, **settings, **options)


def turn(data: lab.ImageData, teacher: lab.Teacher, seed: int) -> dict[str, float]:
    """Seconds for each contestant. The seed is new, so that the teacher has yet to answer."""
    plain, taught = replace(PLAIN, seed=seed), replace(TAUGHT, seed=seed)
    started = time.perf_counter()
    teacher.lessons(data, taught, 0, taught.batch_size)
    found = {"the teacher answers": time.perf_counter() - started}
    for name, width, config, options in (
        ("the teacher is trained", 64, plain, {}),
        ("the student is trained", 28, plain, {}),
        ("the student is taught", 28, taught, {"teacher": teacher}),
    ):
        found[name] = train(data, width, config, **options).history.seconds.iloc[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=at_least(1), default=5, help="turns of every contestant")
    parser.add_argument(
        "--images", type=at_least(PLAIN.batch_size), default=2_560, help="in the training split"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    options = parser.parse_args()
    device = lab.resolve_device(options.device)
    data = make_data(device, options.images)
    teacher = lab.Teacher(train(data, 64, PLAIN))
    turns = [turn(data, teacher, seed) for seed in range(options.turns + 1)][1:]  # one warms up
    print(
        f"An epoch of {options.images:,} images of 32x32x3, batch 128; median of {options.turns} "
        f"turns; {device_name(device)}\n\n| | seconds | ratio |\n|---|---|---|"
    )
    for name, other in (
        ("the teacher is trained", "the teacher is trained"),
        ("the teacher answers", "the teacher is trained"),
        ("the student is trained", "the student is trained"),
        ("the student is taught", "the student is trained"),
    ):
        ratio = statistics.median(each[name] / each[other] for each in turns)
        seconds = statistics.median(each[name] for each in turns)
        print(f"| {name} | {seconds:.2f} | × {ratio:.2f} of: {other} |", flush=True)


if __name__ == "__main__":
    main()
