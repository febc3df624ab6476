"""What a network looks like from inside: its layers, the size of signals and of gradients.

A layer is a module without children. Whatever happens, the model is left as it was.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.random import fork_rng
from torch.utils.flop_counter import FlopCounterMode

from ..base.settings import first_line
from ..models.registry import in_mode


@contextmanager
def observed(model: nn.Module, after: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Call `after` with each layer's name, itself and its output, whenever it has run."""
    names = {layer: name for name, layer in model.named_modules() if not list(layer.children())}

    def hook(layer: nn.Module, _: tuple, output: Tensor) -> None:
        if layer in names:
            after(names[layer], layer, output)

    # A hook for all modules comes off in one go, even when an error ends the block.
    with register_module_forward_hook(hook):
        yield


def _training_step(model: nn.Module, images: Tensor, after: Callable) -> Tensor:
    """The logits of a training step, observed; modes, buffers and random state are left alone."""
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    mode, random_state = in_mode(model, training=True), fork_rng(range(torch.cuda.device_count()))
    with mode, random_state, observed(model, after):
        return functional_call(model, statistics, (images,))


def gradient_norms(model: nn.Module, batch: tuple[Tensor, Tensor]) -> pd.DataFrame:
    """Norm of the gradient of the mean cross-entropy in each layer that has parameters to train.

    batch: images, float [n, C, H, W], and labels, int64 [n], on the model's device. Columns: kind;
    parameters, the Euclidean norm over all of the layer's own; output, that of the gradient with
    respect to the layer's output. Rows in the order in which the layers run, as in a training step.
    Raises ValueError if all of the network is frozen.
    """
    owned = {}
    for name, layer in model.named_modules():
        owned[name] = [p for p in layer.parameters(recurse=False) if p.requires_grad]
    if not any(owned.values()):
        raise ValueError("gradient_norms: the model has no parameter that requires a gradient.")
    rows: dict[str, dict] = {}

    def after(name: str, layer: nn.Module, output: Tensor) -> None:
        if owned[name]:
            row = rows[name] = {"kind": type(layer).__name__, "parameters": 0.0, "output": 0.0}
            # A hook on the tensor still sees its gradient if the next layer works in place.
            output.register_hook(lambda grad: row.update(output=_norm([grad])))

    with torch.enable_grad():
        loss = F.cross_entropy(_training_step(model, batch[0], after), batch[1])
    flat = [p for name in rows for p in owned[name]]
    grads = dict(zip(flat, torch.autograd.grad(loss, flat, materialize_grads=True)))
    for name, row in rows.items():
        row["parameters"] = _norm([grads[p] for p in owned[name]])
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")


def _norm(grads: Sequence[Tensor]) -> float:
    """Their norm together; in float64, where the square of a tiny gradient is not yet 0."""
    return float(torch.cat([grad.detach().flatten().cpu() for grad in grads]).double().norm())


def activation_stats(model: nn.Module, batch: tuple[Tensor, Tensor]) -> pd.DataFrame:
    """Statistics of each layer's output; batch, order and running as for gradient_norms.

    Columns: kind; mean and rms (root mean square) over all values of the batch; spread, the rms of
    what is left of them without the batch's mean image: 0 if the layer cannot tell images apart;
    zeros, the share that is exactly 0. For a layer that is used twice, its last use.
    """
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

    with torch.no_grad():
        _training_step(model, batch[0], after)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")


def summary(model: nn.Module, input_size: Sequence[int]) -> pd.DataFrame:
    """One row a layer: its kind, output shape, parameters, and FLOPs of one forward pass.

    input_size: shape of one input, (C, H, W) or (F,); ValueError if the model cannot take it.
    A layer that is used twice has two rows, its parameters in the first. A multiplication and an
    addition are two FLOPs, as torch counts. The last row is the sum. The model is left as it was.
    """
    rows, seen, flops_before = [], set(), {}
    counter = FlopCounterMode(display=False)

    def before(layer: nn.Module, _: tuple) -> None:
        flops_before[layer] = counter.get_total_flops()

    def after(name: str, layer: nn.Module, output: Tensor) -> None:
        row = {"layer": name or type(layer).__name__, "kind": type(layer).__name__}
        row["output"] = "x".join(map(str, output.shape[1:]))
        row["parameters"] = sum(p.numel() for p in layer.parameters() if p not in seen)
        row["FLOPs"] = counter.get_total_flops() - flops_before[layer]
        rows.append(row)
        seen.update(layer.parameters())

    device = next((p.device for p in model.parameters()), "cpu")
    try:
        hook = register_module_forward_pre_hook(before)
        with hook, observed(model, after), in_mode(model, training=False), torch.no_grad(), counter:
            output = model(torch.zeros(1, *input_size, device=device))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        problem = f"input_size = {input_size!r} does not fit the model ({first_line(error)})"
        raise ValueError(f"summary: {problem}. Give data.image_shape.") from error
    seen.clear()
    after("total", model, output)  # the model is a row like its layers, of all parameters and FLOPs
    return pd.DataFrame(rows).set_index("layer")
