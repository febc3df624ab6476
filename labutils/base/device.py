"""The machine: devices, seeds, precision, memory format, threads and signals."""

import os
import platform
import random
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .settings import Seed, check, first_line


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """'auto' is CUDA where it is there, else the CPU. ValueError for a device that is not there."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=torch.device(device)).device
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        problem = f"device = {str(device)!r} cannot be used here ({first_line(error)})"
        allowed = "'auto', 'cpu', 'cuda', 'cuda:N', 'mps'; 'auto' always works"
        raise ValueError(f"{problem}. Allowed: {allowed}.") from error


def device_name(device: torch.device) -> str:
    """The name of the processor, with its cores, or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = cpuinfo.exists() and re.search(r"(?m)^model name\s*: (.*\S)", cpuinfo.read_text())
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices) from 0 to 2**32 - 1, else ValueError.

    Call it before building a model.
    """
    check("seed_everything", {"seed": Seed}, {"seed": seed})
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def gpus() -> range:
    """The numbers of the GPUs that torch can use: none where the driver is too old for it."""
    return range(torch.cuda.device_count() if torch.cuda.is_available() else 0)


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """torch's random numbers of the seed, and afterwards the caller's, on the CPU and all GPUs."""
    with torch.random.fork_rng(devices=gpus()):
        torch.manual_seed(seed)
        yield


def usable_precision(asked: str, device: torch.device) -> str:
    """What 'auto', 'bf16' or 'float32' comes to: bf16 only where it is computed, not emulated."""
    return "bf16" if asked != "float32" and _computes_bf16(device) else "float32"


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    # oneDNN, which computes here, can be told to leave instructions aside (ONEDNN_MAX_CPU_ISA).
    return device.type == "cpu" and native and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """A context, usable again and again, in which a model computes with 'float32' or 'bf16'."""
    # Entered in every step: nothing at all is cheaper than an autocast that is switched off.
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def prefer_channels_last(model: nn.Module, device: torch.device) -> None:
    """Store the weights of a convolutional network pixel by pixel, not channel by channel.

    Convolutions are up to twice as fast that way (benchmarks/throughput.py), and numbers change in
    the last bits. Other models, and a few for which it is not safe, stay as they are.
    """
    convolutions = [part for part in model.modules() if isinstance(part, nn.Conv2d)]
    for layer in convolutions:
        # In the backward pass of these, oneDNN's AVX2 code writes past its memory:
        # https://github.com/uxlfoundation/oneDNN/issues/6035
        strided = layer.kernel_size == (1, 1) and max(layer.stride) > 1
        if strided and layer.in_channels // layer.groups < 8:
            return
    for layer in convolutions if device.type in ("cpu", "cuda") else ():  # others: nobody looked
        layer.to(memory_format=torch.channels_last)


def choose_threads(model: nn.Module, batch_size: int, device: torch.device) -> int:
    """How many CPU threads to train with: what torch has, but one for small perceptrons.

    Below 4 million multiplications a step a second one gains a fifth (benchmarks/threads.py), and
    waiting for it costs many times that where other programs compete for the cores.
    """
    # In other layers, such as convolutions, a parameter is multiplied many times for one image.
    holders = [part for part in model.modules() if part._parameters]
    flat = all(isinstance(part, nn.Linear | nn.BatchNorm1d) for part in holders)
    small = batch_size * sum(p.numel() for p in model.parameters()) < 2**22
    return 1 if device.type == "cpu" and flat and small else torch.get_num_threads()


@contextmanager
def signals(*numbers: int) -> Iterator[list[int]]:
    """A list that these signals go into instead of ending the process; a second one acts as always.

    One that is ignored stays so: a job in the background is not meant by Ctrl-C.
    """
    seen: list[int] = []
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number, frame):
        seen.append(number)
        signal.signal(number, before[number])

    main = threading.current_thread() is threading.main_thread()  # no other is sent any
    caught = [n for n in numbers if main and before[n] not in (signal.SIG_IGN, None)]
    for number in caught:
        signal.signal(number, note)
    try:
        yield seen
    finally:
        for number in caught:
            signal.signal(number, before[number])
