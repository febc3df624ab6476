"""The machine: devices, seeds, precision, memory format, compilation and threads.

Nothing here changes what a training computes by more than rounding.
"""

from __future__ import annotations

import os
import platform
import random
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from .settings import first_line


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """'auto' is the first CUDA device when there is one, else the CPU.

    Raises ValueError if the name means nothing to torch or the device is not there.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"device = {str(device)!r} cannot be used here ({first_line(error)}). "
            "Allowed: 'auto', 'cpu', 'cuda', 'cuda:N', 'mps'; 'auto' always works."
        ) from error


def device_name(device: torch.device) -> str:
    """What a reader of a result wants to know of a device: the processor's or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = cpuinfo.exists() and re.search(r"(?m)^model name\s*: (.*\S)", cpuinfo.read_text())
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices): call it before building a model."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def usable_precision(asked: str, device: torch.device) -> str:
    """'bf16' or 'float32': what 'auto', 'bf16' or 'float32' comes to on a device.

    bf16 means autocast to torch.bfloat16, with weights kept in float32. Where the hardware does not
    compute with it, it would be emulated, several times slower than float32.
    """
    return "bf16" if asked != "float32" and _computes_bf16(device) else "float32"


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        # oneDNN, which computes here, can be told to leave instructions aside (ONEDNN_MAX_CPU_ISA).
        return native and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return False


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """A context, usable again and again, in which a model computes with 'float32' or 'bf16'."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    # Cheaper than an autocast that is switched off, and entered in every step.
    return nullcontext()


def prefer_channels_last(model: nn.Module, device: torch.device) -> None:
    """Store the weights of a convolutional network pixel by pixel, not channel by channel.

    Convolutions then take and return images in that order, in which they are up to twice as fast
    (benchmarks/throughput.py). The model's state stays the same number for number. Other models
    stay as they are, and so do a few narrow ones for which that order is not safe.
    """
    convolutions = [part for part in model.modules() if isinstance(part, nn.Conv2d)]
    # In the backward pass of these, oneDNN's AVX2 code writes past its memory:
    # https://github.com/uxlfoundation/oneDNN/issues/6035
    unsafe = any(
        layer.kernel_size == (1, 1)
        and max(layer.stride) > 1
        and layer.in_channels // layer.groups < 8
        for layer in convolutions
    )
    # On other kinds of device nobody has looked.
    if convolutions and not unsafe and device.type in ("cpu", "cuda"):
        model.to(memory_format=torch.channels_last)


def compiled(model: nn.Module, on_failure: Callable[[str], None]) -> Callable[[Tensor], Tensor]:
    """The forward pass of a model by torch.compile; the model itself stays as it is.

    Where that fails, at once or when first called, on_failure gets the reason, and the model is
    called as it is from then on.
    """
    from torch._dynamo.exc import TorchDynamoException

    forward = model

    def call(images: Tensor) -> Tensor:
        nonlocal forward
        try:
            return forward(images)
        # The model has not run: its code is compiled before.
        except TorchDynamoException as error:
            forward = model
            on_failure(first_line(error))
            return model(images)

    try:
        # Each batch size is compiled on its own: code for any size is slower.
        forward = torch.compile(model, dynamic=False)
    except RuntimeError as error:
        on_failure(first_line(error))
    return call


def choose_threads(model: nn.Module, batch_size: int, device: torch.device) -> int:
    """How many CPU threads to train with: what torch has, but one for small perceptrons.

    Below 4 million multiplications a step a second gains a fifth at best (benchmarks/threads.py),
    and where other programs compete for the cores, waiting for it costs up to a hundredfold.
    """
    holders = [part for part in model.modules() if part._parameters]
    multiplications = batch_size * sum(p.numel() for p in model.parameters())
    # In other layers, such as convolutions, a parameter is multiplied many times for one image.
    flat = all(isinstance(part, nn.Linear | nn.BatchNorm1d) for part in holders)
    small = device.type == "cpu" and flat and multiplications < 2**22
    return 1 if small else torch.get_num_threads()
