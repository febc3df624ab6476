"""What a network looks like from inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .config import reason
from .models import evaluating

if TYPE_CHECKING:
    import pandas as pd


def summary(model: nn.Module, input_size: Sequence[int]) -> pd.DataFrame:
    """One row a layer: its kind, output shape, parameters, and FLOPs of one forward pass.

    input_size: shape of one input without the batch dimension, (C, H, W) or (F,).
    A layer is a module without children; one that is used twice has two rows, its parameters in the
    first. FLOPs count a multiplication and an addition as two, as torch's counter does. The last
    row is the sum.
    The model is left as it was: no hooks, no gradients, the same mode.
    Raises ValueError if the model cannot take such an input.
    """
    import pandas as pd

    rows: list[dict] = []
    seen: set[int] = set()
    counter = FlopCounterMode(display=False)
    before = {}

    def start(layer: nn.Module, inputs: tuple) -> None:
        before[layer] = counter.get_total_flops()

    def end(name: str, layer: nn.Module, output: Tensor) -> None:
        own = [p for p in layer.parameters() if id(p) not in seen]
        seen.update(id(p) for p in own)
        rows.append(
            {
                "layer": name or type(layer).__name__,
                "kind": type(layer).__name__,
                "output": _sizes(output),
                "parameters": sum(p.numel() for p in own),
                "FLOPs": counter.get_total_flops() - before[layer],
            }
        )

    handles = []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        for name, layer in model.named_modules():
            if not list(layer.children()):
                handles.append(layer.register_forward_pre_hook(start))
                handles.append(
                    layer.register_forward_hook(
                        lambda layer, _, output, name=name: end(name, layer, output)
                    )
                )
        with evaluating(model), torch.no_grad(), counter:
            output = model(torch.zeros(1, *input_size, device=device))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"summary: input_size = {input_size!r} does not fit the model "
            f"({reason(error)}). Give the shape of one input, data.image_shape."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    total = {
        "layer": "total",
        "kind": type(model).__name__,
        "output": _sizes(output),
        "parameters": sum(p.numel() for p in model.parameters()),
        "FLOPs": counter.get_total_flops(),
    }
    return pd.DataFrame([*rows, total]).set_index("layer")


def _sizes(output: Tensor) -> str:
    return "x".join(str(size) for size in output.shape[1:])
