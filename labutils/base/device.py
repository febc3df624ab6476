"""The machine: devices, seeds, precision, memory format and threads.

Nothing here changes what a training computes by more than rounding.
"""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
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
    known = device.type in ("cpu", "cuda")  # elsewhere nobody has looked
    if known and convolutions and not any(map(_overruns, convolutions)):
        model.to(memory_format=torch.channels_last)


def _overruns(layer: nn.Conv2d) -> bool:
    """Whether oneDNN's AVX2 code, given channels last, writes past its memory in a backward pass.

    https://github.com/uxlfoundation/oneDNN/issues/6035
    """
    return (
        layer.kernel_size == (1, 1)
        and max(layer.stride) > 1
        and layer.in_channels // layer.groups < 8
    )


class Forward:
    """A model's forward pass in training: takes images, returns logits in float32.

    precision: 'float32' or 'bf16', see usable_precision. compiled: whether torch.compile is used.
    The model itself, its state and the names in it stay as they are, but for the order in memory.
    """

    def __init__(self, model: nn.Module, asked: str, device: torch.device) -> None:
        prefer_channels_last(model, device)
        self.precision, self.compiled = usable_precision(asked, device), False
        self._autocast = autocast(self.precision, device)
        self._model = self._call = model

    def __call__(self, images: Tensor) -> Tensor:
        with self._autocast:
            logits = self._call(images)
        return logits.float()

    def compile(self, on_failure: Callable[[str], None]) -> None:
        """Use torch.compile from now on. Where it fails, the model is called as it is.

        on_failure: gets the reason, at once or when the model is first called.
        """
        from torch._dynamo.exc import TorchDynamoException

        def call(images: Tensor) -> Tensor:
            try:
                return compiled(images)
            # The model has not run: its code is compiled before.
            except TorchDynamoException as error:
                fall_back(error)
                return self._model(images)

        def fall_back(error: Exception) -> None:
            self._call, self.compiled = self._model, False
            on_failure(first_line(error))

        try:
            # Each batch size is compiled on its own: code for any size is slower.
            compiled = torch.compile(self._model, dynamic=False)
        except RuntimeError as error:
            fall_back(error)
        else:
            self._call, self.compiled = call, True


@contextmanager
def threads(model: nn.Module, batch_size: int, device: torch.device) -> Iterator[None]:
    """One CPU thread for perceptrons so small that a second one gains next to nothing.

    Below 4 million multiplications a step it gains a fifth at best (benchmarks/threads.py), and
    where other programs compete for the cores, waiting for it costs up to a hundred times as much.
    """
    before = torch.get_num_threads()
    holders = [part for part in model.modules() if part._parameters]
    multiplications = batch_size * sum(p.numel() for p in model.parameters())
    # In other layers, convolutions say, a parameter takes part in many multiplications an image.
    flat = all(isinstance(part, nn.Linear | nn.BatchNorm1d) for part in holders)
    if device.type == "cpu" and flat and multiplications < 2**22:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
