"""How fast are the generated data sets drawn? Images a second on one core.

    python benchmarks/synthetic.py

The training images of every set; median of several rounds, the sets taking turns. All is done on
one thread, and processor time is counted, so that other programs matter little.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from throughput import at_least

from labutils.base.device import device_name
from labutils.data.synthetic import SETS, generate


def draw_time(name: str) -> float:
    """Seconds of processor time for the training images."""
    started = time.process_time()
    generate(name, SETS[name].train)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=at_least(1), default=5, help="rounds")
    repeats = parser.parse_args().repeats
    print(f"{device_name(torch.device('cpu'))}, NumPy {np.__version__}, n = {repeats}\n")
    print("| data set | side | images | seconds | images/s |")
    print("|---|---|---|---|---|")
    times = {name: [] for name in SETS}
    for _ in range(repeats):
        for name, found in times.items():
            found.append(draw_time(name))
    for name, spec in SETS.items():
        seconds = statistics.median(times[name])
        print(
            f"| {name} | {spec.side} px | {spec.train:,} | {seconds:.2f} "
            f"| {spec.train / seconds:,.0f} |"
        )


if __name__ == "__main__":
    main()
