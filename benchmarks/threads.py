"""From which size of a training step on does a second thread pay? Times in microseconds.

    python benchmarks/threads.py

Multilayer perceptrons of several sizes, forward, backward and Adam; the best of several rounds, one
thread and all threads taking turns. The threshold in labutils/base/device.py comes from here.
"""

from __future__ import annotations

import sys
import time

import torch
from torch.nn import functional as F

import labutils as lab
from labutils.base.device import device_name

SIZES = [  # inputs, hidden widths, batch
    (64, [64, 64], 32),
    (784, [10, 10], 128),
    (784, [64, 64], 32),
    (784, [64, 64], 64),
    (784, [64, 64], 128),
    (784, [256, 256], 128),
]


def step_time(inputs: int, hidden: list[int], batch: int, threads: int) -> float:
    """Microseconds a step, mean of 30."""
    torch.set_num_threads(threads)
    model = lab.MLP(inputs, hidden, 10)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    images, labels = torch.randn(batch, inputs), torch.randint(0, 10, (batch,))
    started = time.perf_counter()
    for _ in range(30):
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - started) / 30 * 1e6


def main() -> None:
    threads = torch.get_num_threads()
    if threads == 1:
        sys.exit("torch has one thread here: unset OMP_NUM_THREADS, or take more cores.")
    print(f"{device_name(torch.device('cpu'))}, torch {torch.__version__}\n")
    print(f"| network | batch | multiplications | 1 thread | {threads} threads | ratio |")
    print("|---|---|---|---|---|---|")
    for inputs, hidden, batch in SIZES:
        work = batch * lab.num_parameters(lab.MLP(inputs, hidden, 10))
        times = {1: [], threads: []}
        for _ in range(10):
            for count, found in times.items():
                found.append(step_time(inputs, hidden, batch, count))
        one, many = min(times[1]), min(times[threads])
        print(
            f"| {inputs} → {hidden} | {batch} | {work / 1e6:.1f} M | {one:.0f} µs | {many:.0f} µs "
            f"| {one / many:.2f} |"
        )


if __name__ == "__main__":
    main()
