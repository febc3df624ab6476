"""A network from inside; it is left as it was. A layer is a module without children."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from ..models.registry import in_mode, takes_images, training_logits


@contextmanager
def observed(model: nn.Module, after: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Call `after` with each layer's name, itself and its output, whenever it has run."""
    names = {layer: name for name, layer in model.named_modules() if not list(layer.children())}

    def hook(layer: nn.Module, _: tuple, output: Tensor) -> None:
        if layer in names:
            # A recurrent layer returns its last state as well.
            after(names[layer], layer, output[0] if isinstance(output, tuple) else output)

    # A hook for all modules comes off in one go, even when an error ends the block.
    with register_module_forward_hook(hook):
        yield


def _trained(model: nn.Module, owner: str) -> list[nn.Parameter]:
    if trained := [p for p in model.parameters() if p.requires_grad]:
        return trained
    raise ValueError(f"{owner}: the model has no parameter that requires a gradient.")


def gradient_norms(model: nn.Module, batch: tuple[Tensor, Tensor]) -> pd.DataFrame:
    """Norm of the gradient of the mean cross-entropy in each layer that has parameters to train.

    batch: images, float [n, C, H, W], and labels, int64 [n], on the model's device. Columns: kind;
    parameters, the Euclidean norm over all of the layer's own. Rows in the model's order; layers
    out of use have none. It runs as in a training step. ValueError if all of it is frozen.
    """
    trained = _trained(model, "gradient_norms")
    with torch.enable_grad():
        loss = F.cross_entropy(training_logits(model, batch[0]), batch[1])
    grads, rows = dict(zip(trained, torch.autograd.grad(loss, trained, allow_unused=True))), {}
    for name, layer in model.named_modules():
        own = [grads.get(p) for p in layer.parameters(recurse=False)]
        if own := [grad.flatten().cpu() for grad in own if grad is not None]:
            norm = torch.cat(own).double().norm()  # in float32, the square of a tiny one would be 0
            rows[name] = {"kind": type(layer).__name__, "parameters": float(norm)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")


def activation_stats(model: nn.Module, batch: tuple[Tensor, Tensor]) -> pd.DataFrame:
    """Statistics of each layer's last output [n, ...]; batch as for gradient_norms, run as there.

    Columns: kind; rms, the root mean square over all values of the batch; spread, that of what is
    left of them without the batch's mean image: 0 if the layer cannot tell images apart.
    """
    rows: dict[str, dict] = {}

    def after(name: str, layer: nn.Module, output: Tensor) -> None:
        values = output.cpu().double()  # in float32, the square of a small one would be 0
        rms = values.square().mean().sqrt()
        spread = values.var(dim=0, correction=0).mean().sqrt()
        rows[name] = {"kind": type(layer).__name__, "rms": float(rms), "spread": float(spread)}

    with torch.no_grad(), observed(model, after):
        training_logits(model, batch[0])
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")


def summary(model: nn.Module, input_size: Sequence[int]) -> pd.DataFrame:
    """One row a layer: its kind, output shape, parameters, and FLOPs of one forward pass.

    input_size: shape of one input, (C, H, W) or (F,); ValueError if the model cannot take it.
    A layer that is used twice has two rows, its parameters in the first. A multiplication and an
    addition are two FLOPs, as torch counts. The last row is the whole model, also what no layer
    owns.
    """
    rows, seen, flops_before = [], set(), {}
    counter = FlopCounterMode(display=False)

    def before(layer: nn.Module, _: tuple) -> None:
        flops_before[layer] = counter.get_total_flops()

    def after(name: str, layer: nn.Module, output: Tensor) -> None:
        kind, size = type(layer).__name__, "x".join(map(str, output.shape[1:]))
        row = {"layer": name or kind, "kind": kind, "output": size}
        row["parameters"] = sum(p.numel() for p in layer.parameters() if p not in seen)
        row["FLOPs"] = counter.get_total_flops() - flops_before[layer]
        rows.append(row)
        seen.update(layer.parameters())

    like = next(model.parameters(), torch.empty(0))
    problem = f"summary: input_size = {input_size!r} does not fit the model"
    with takes_images(problem, "Give data.image_shape."):
        hook = register_module_forward_pre_hook(before)
        with hook, observed(model, after), in_mode(model, training=False), torch.no_grad(), counter:
            output = model(like.new_zeros(1, *input_size))
    seen.clear()
    after("total", model, output)  # the model is a row like its layers, of all parameters and FLOPs
    return pd.DataFrame(rows).set_index("layer")


def training_flops(
    model: nn.Module, input_size: Sequence[int], image_sizes: Sequence[int] = ()
) -> int:
    """FLOPs of a forward and a backward pass for one input, as torch counts; input_size as above.

    image_sizes: those of a TrainConfig, which share the steps equally: the mean over them.
    The optimizer and what is no convolution or matrix product are not counted. ValueError if all
    of the model is frozen, or if it cannot take such images.
    """
    trained = _trained(model, "training_flops")
    problem = f"training_flops: {input_size = }, {image_sizes = } does not fit the model"
    counter = FlopCounterMode(display=False)
    with takes_images(problem, "Give data.image_shape."), torch.enable_grad(), counter:
        sizes = [(input_size[0], side, side) for side in image_sizes] or [input_size]
        for size in sizes:
            # Of two, since batch norm has nothing to compare one with.
            logits = training_logits(model, trained[0].new_zeros(2, *size))
            torch.autograd.grad(logits.sum(), trained, allow_unused=True)
    return counter.get_total_flops() // (2 * len(sizes))
