"""What a network looks like from inside: its layers, the size of signals and of gradients.

Hooks live in a context manager: whatever happens, the model is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from ..base.settings import first_line
from ..models.registry import evaluating, in_mode

if TYPE_CHECKING:
    import pandas as pd

Batch = tuple[Tensor, Tensor]


@contextmanager
def observed(model: nn.Module, after: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Call back after every layer while the block runs; no hook outlives it.

    A layer is a module without children. after: gets its name, itself and its output; for a layer
    that is used twice it is called twice.
    """
    names = {layer: name for name, layer in model.named_modules() if not list(layer.children())}

    def hook(layer: nn.Module, _: tuple, output: Tensor) -> None:
        if layer in names:
            after(names[layer], layer, output)

    # A hook for all modules comes off in one go, even when an error ends the block.
    with register_module_forward_hook(hook):
        yield


@contextmanager
def _rehearsal(model: nn.Module) -> Iterator[None]:
    """The model as a training step runs it, and afterwards as if it had not run.

    Modes, buffers (the statistics of batch norm) and the random state come back.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices), in_mode(model, training=True):
        try:
            yield
        finally:
            for name, buffer in model.named_buffers():
                buffer.data.copy_(buffers[name])


def gradient_norms(model: nn.Module, batch: Batch) -> pd.DataFrame:
    """Euclidean norm of the loss's gradient in each layer that has parameters to train.

    batch: images, float [n, C, H, W], and labels, int64 [n], on the model's device. The loss is
    their mean cross-entropy.
    Columns: kind; parameters, the norm over all of the layer's own; output, that of the gradient
    with respect to what the layer gives on. Rows in the order in which the layers run.
    The network runs as in a training step. It is left without hooks, with the gradients, the mode,
    the statistics of batch norm and the random state that it had.
    Raises ValueError if nothing can be trained.
    """
    import pandas as pd

    owned = {
        name: parameters
        for name, layer in model.named_modules()
        if (parameters := [p for p in layer.parameters(recurse=False) if p.requires_grad])
    }
    if not owned:
        raise ValueError("gradient_norms: the model has no parameter that requires a gradient.")
    kinds: dict[str, str] = {}
    outputs: dict[str, float] = {}

    def after(name: str, layer: nn.Module, output: Tensor) -> None:
        if name in owned:
            kinds[name] = type(layer).__name__
            # A hook on the tensor still sees its gradient if the next layer works in place.
            output.register_hook(lambda grad: outputs.update({name: _norm([grad])}))

    images, labels = batch
    with _rehearsal(model), torch.enable_grad():
        with observed(model, after):
            loss = F.cross_entropy(model(images), labels)
        flat = [p for name in kinds for p in owned[name]]
        grads = dict(zip(flat, torch.autograd.grad(loss, flat, materialize_grads=True)))
    rows = {
        name: {
            "kind": kind,
            "parameters": _norm([grads[p] for p in owned[name]]),
            "output": outputs.get(name, 0.0),
        }
        for name, kind in kinds.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")


def _norm(grads: Sequence[Tensor]) -> float:
    """Their norm together; in float64, where the square of what hardly arrives is not yet 0."""
    flat = torch.cat([grad.detach().flatten().cpu() for grad in grads])
    return float(flat.double().norm())


def activation_stats(model: nn.Module, batch: Batch) -> pd.DataFrame:
    """Statistics of what each layer gives on: one row a layer, in the order in which they run.

    batch: as for gradient_norms; the labels are not used.
    Columns: kind; mean and rms (root mean square) over all values of the batch; spread, the rms of
    what is left of them without the batch's mean image: 0 if the layer cannot tell images apart;
    zeros, the share that is exactly 0. For a layer that is used twice, its last use.
    The network runs as in a training step and is left as it was.
    """
    import pandas as pd

    rows: dict[str, dict] = {}

    def after(name: str, layer: nn.Module, output: Tensor) -> None:
        values = output.float()
        rows[name] = {
            "kind": type(layer).__name__,
            "mean": float(values.mean()),
            "rms": float(values.square().mean().sqrt()),
            "spread": float(values.var(dim=0, correction=0).mean().sqrt()),
            "zeros": float((values == 0).float().mean()),
        }

    with _rehearsal(model), torch.no_grad(), observed(model, after):
        model(batch[0])
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")


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
    spent: dict[nn.Module, int] = {}

    def before(layer: nn.Module, _: tuple) -> None:
        spent[layer] = counter.get_total_flops()

    def after(name: str, layer: nn.Module, output: Tensor) -> None:
        own = [p for p in layer.parameters() if id(p) not in seen]
        seen.update(id(p) for p in own)
        rows.append(
            {
                "layer": name or type(layer).__name__,
                "kind": type(layer).__name__,
                "output": _sizes(output),
                "parameters": sum(p.numel() for p in own),
                "FLOPs": counter.get_total_flops() - spent[layer],
            }
        )

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with (
            register_module_forward_pre_hook(before),
            observed(model, after),
            evaluating(model),
            torch.no_grad(),
            counter,
        ):
            output = model(torch.zeros(1, *input_size, device=device))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"summary: input_size = {input_size!r} does not fit the model "
            f"({first_line(error)}). Give the shape of one input, data.image_shape."
        ) from error
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
