"""What a trained network is worth for other classes: its features, a new head, frozen stages."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import safetensors.torch as st
import torch
from pydantic import InstanceOf
from torch import Tensor, nn
from torch.nn import functional as F

from ..base.files import digest, read_sealed, runs_dir, write_sealed
from ..base.settings import PositiveInt, Seed, check
from ..data.tensors import ImageData, Split
from ..models import registry
from ..models.convnets import ConvNet
from ..training.key import as_its_spec, remember_origin, weights_digest
from ..training.runs import Run, open_stored

_KINDS = {"model": InstanceOf[ConvNet]}
_FEATURES = {"split": InstanceOf[Split], "grid": PositiveInt} | _KINDS
_BUDGET = {"data": InstanceOf[ImageData], "share": float, "seed": Seed}
_KEPT = 4e9  # bytes of features, beside the runs
_AT_ONCE = 256  # images


def features(
    model: ConvNet, split: Split, stages: Sequence[str] | None = None, *, grid: int = 1
) -> dict[str, Tensor]:
    """What stages make of the images of a split, from one pass through the network.

    stages: their names, by default all; 'pool': what the head sees, [N, F] as it is. grid: maps are
        averaged over grid x grid parts of the image. Returns stage -> float32 [N, channels *
        grid**2], on the CPU; the model's mode is kept. They are kept in the folder of runs, found
        by weights and pixels, and the oldest go when all take more than 4 GB. Raises ValueError for
        an unknown stage, a grid below 1, an empty split or images that the model cannot take.
    """
    check("features", _FEATURES, {"model": model, "split": split, "grid": grid})
    wanted = [*model.stages] if stages is None else stages
    wanted = wanted if isinstance(wanted, str) else [*wanted]
    check("features", {"stages": list[Literal[*model.stages, "pool"]]}, {"stages": wanted})
    if not len(split):
        raise ValueError("features: the split is empty. Give one with at least one image.")
    if type(split) is not Split or not as_its_spec(model):  # nothing tells what your own code does
        return _features(model, split, wanted, grid)
    seen = {"images": split.images, "statistics": torch.tensor([split.mean, split.std])}
    kind = next(model.parameters()).device.type  # a GPU rounds otherwise
    content = [weights_digest(model.state_dict() | seen), str(model), wanted, grid, kind]
    path = runs_dir() / ".features" / f"{digest(content)}.safetensors"
    try:
        kept = st.load(read_sealed(path))
        return {name: kept[name] for name in wanted}
    except (OSError, ValueError):  # not there, or damaged
        found = _features(model, split, wanted, grid)
    with contextlib.suppress(OSError):  # a full disk, say: what was asked for is here
        write_sealed(path, st.save(found))
        _forget_the_oldest(path)
    return found


def _forget_the_oldest(latest: Path) -> None:
    taken, whole = 0, latest.parent.glob("*.safetensors")  # not what is being written just now
    for file in sorted(whole, key=lambda f: f.stat().st_mtime, reverse=True):
        taken += file.stat().st_size  # FileNotFoundError if another process does the same
        if taken > _KEPT and file != latest:
            file.unlink()


def _features(model, split, wanted: list[str], grid: int) -> dict[str, Tensor]:
    device, found = next(model.parameters()).device, {name: [] for name in wanted}
    with registry.evaluating(model, split.images, owner="features: "):
        for images, _ in split.batches(_AT_ONCE):
            maps = images.to(device)
            for name, part in [*model.stages.items(), ("pool", model.pool)]:
                maps = part(maps)
                if name in found:
                    pooled = F.adaptive_avg_pool2d(maps, grid) if maps.ndim == 4 else maps
                    # A copy: the next stage may write over what it is given.
                    found[name].append(pooled.flatten(1).float().cpu().clone())
    return {name: torch.cat(batches) for name, batches in found.items()}


def swap_head(source: Run | ConvNet, num_classes: int) -> ConvNet:
    """The network of a run, or this one, with a new head: all else is a copy, nothing frozen.

    The head is the one of a network built under the current seed. What trains on from a run is
    found again by that run's key, as long as its weights are not changed before.
    Raises RunError for a run that is unfinished, not stored with its weights, or of a network of
    your own; ValueError for a network that no spec builds or whose tensors are not of its spec.
    """
    trained = _trained(source) if isinstance(source, Run) else source
    if not (isinstance(trained, ConvNet) and hasattr(trained, "spec")):
        problem = f"swap_head: source is {type(trained).__name__}"
        raise ValueError(f"{problem}. Give a ConvNet of labutils, or a run of one.")
    network = registry.build(trained.spec | {"num_classes": num_classes})
    head = {name: t for name, t in network.state_dict().items() if name.startswith("head.")}
    try:
        network.load_state_dict(trained.state_dict() | head)
    except RuntimeError as error:
        problem = f"swap_head: the weights do not fit {trained.spec}: {error}"
        raise ValueError(f"{problem} Give a network as its spec builds it.") from error
    if isinstance(source, Run):
        remember_origin(network, source.key, new_head=True)
    return network


def start_from(run: Run) -> nn.Module:
    """The network of a run with all its weights, nothing frozen: to train on from it.

    The run that does so is found again by the key of this one. Raises RunError as swap_head does.
    """
    check("start_from", {"run": InstanceOf[Run]}, {"run": run})
    network = _trained(run)
    remember_origin(network, run.key)
    return network


def label_budget(data: ImageData, share: float, *, seed: int = 0) -> ImageData:
    """The same data with a share of the training images, in (0, 1], the same of every class.

    A larger share holds all images of a smaller one; pixels are normalised as before. Raises
    ValueError for a share that leaves a class without an image.
    """
    check("label_budget", _BUDGET, {"data": data, "share": share, "seed": seed})
    labels = data.train.labels.cpu()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    counts = [(share * int(n) + 1e-9) // 1 for n in labels.bincount(minlength=data.num_classes)]
    if not 0 < share <= 1 or min(counts) < 1:
        needed = f"of {min(labels.bincount(minlength=data.num_classes))} images, at least one"
        problem = f"label_budget: share = {share}. Give a share up to 1 that leaves every class"
        raise ValueError(f"{problem}, {needed}.")
    kept = [order[labels[order] == c][: int(n)] for c, n in enumerate(counts)]
    index = torch.cat(kept).sort().values.to(data.train.images.device)
    images, labels = data.train.images[index], data.train.labels[index]
    return replace(data, train=replace(data.train, images=images, labels=labels))


def freeze(model: ConvNet, *, up_to: str) -> ConvNet:
    """Keep all stages up to and with this one as they are, bit for bit; returns the model.

    Their parameters require no gradient, and ConvNet.train leaves them in evaluation mode, so that
    running statistics stay and nothing is dropped. Raises ValueError for what is no stage, such as
    'head': it is left to train.
    """
    check("freeze", _KINDS, {"model": model})
    check("freeze", {"up_to": Literal[*model.stages]}, {"up_to": up_to})
    for name, stage in model.stages.items():
        stage.requires_grad_(False)
        if name == up_to:
            return model.train(model.training)


def _trained(run: Run) -> nn.Module:
    """A new network with the weights that are stored."""
    run.require_finished()
    run.require_model()
    return open_stored(run.path).require_model()
