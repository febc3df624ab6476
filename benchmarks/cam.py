"""What a map costs: milliseconds an image of plain CAM and of each method, beside other packages.

    python benchmarks/cam.py                               the table of benchmarks/README.md
    python benchmarks/cam.py --images 1000 --turns 1       as many images as the target speaks of
    python benchmarks/cam.py --methods gradcam scorecam    plain CAM and these

Maps at the size of the images, for noise of 128x128x3, of a CNN as wide as that of exercise 2.3:
one network for all contestants, stored pixel by pixel as `train` leaves it. grad-cam is called as
it comes, on batches of 64 and on one image after another, torch-cam on batches of 16, which is our
own choice for this size, and so is captum, where it is installed (`pip install -e '.[bench]'`).
Score-CAM asks the network once for each of the last maps, and so is given two images only. The
contestants take turns, and ratios are formed within a turn; on a CPU all is done on one thread, and
processor time is counted, so that other programs matter little.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from throughput import at_least
from torch import Tensor, nn
from torch.nn import functional as F

import labutils as lab
from labutils.base.device import device_name, prefer_channels_last
from labutils.methods.cam import METHODS

SIDE, WIDTHS, CLASS = 128, [16, 32, 64], 3
TORCHCAM = {"gradcam": "GradCAM", "gradcam++": "GradCAMpp", "layercam": "LayerCAM"}
TORCHCAM |= {"scorecam": "ScoreCAM"}
PLAIN = "plain CAM", "labutils"
Contestant = Callable[[nn.Module, Tensor], Tensor]  # images [N, C, H, W] -> maps [N, H, W]


def resized(maps: Tensor) -> Tensor:
    """Maps [N, h, w] at the size of the images."""
    return F.interpolate(maps[:, None], (SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]


def ours(method: str) -> Contestant:
    return lambda model, images: lab.explain(model, images, method, class_idx=CLASS).maps


def grad_cam(method: str, at_once: int) -> Contestant:
    package = importlib.import_module("pytorch_grad_cam")
    of_class = package.utils.model_targets.ClassifierOutputTarget(CLASS)

    def run(model: nn.Module, images: Tensor) -> Tensor:
        with getattr(package, METHODS[method])(model, [model.stages["stage3"]]) as cam:
            maps = [cam(batch, [of_class] * len(batch)) for batch in images.split(at_once)]
        return torch.cat([torch.as_tensor(each) for each in maps])

    return run


def torch_cam(name: str, **options) -> Contestant:
    package = importlib.import_module("torchcam.methods")

    def run(model: nn.Module, images: Tensor) -> Tensor:
        maps = []
        given = {key: getattr(model, value) for key, value in options.items()}
        with getattr(package, name)(model, model.stages["stage3"], **given) as cam:
            for batch in images.split(16):
                with torch.set_grad_enabled(name not in ("CAM", "ScoreCAM")):
                    maps.append(resized(cam(CLASS, model(batch))[0].detach()))
        return torch.cat(maps)

    return run


def captum(model: nn.Module, images: Tensor) -> Tensor:
    attribution = importlib.import_module("captum.attr").LayerGradCam
    cam, maps = attribution(model, model.stages["stage3"]), []
    for batch in images.split(16):
        maps.append(resized(cam.attribute(batch, CLASS, relu_attributions=True).detach()[:, 0]))
    return torch.cat(maps)


def contestants(methods: list[str]) -> Iterator[tuple[tuple[str, str], Contestant]]:
    """(method, by whom) and how it is called; plain CAM comes first."""
    yield PLAIN, lambda model, images: lab.class_activation_map(model, images, CLASS).maps
    yield ("plain CAM", "torch-cam"), torch_cam("CAM", fc_layer="head")
    for method in methods:
        yield (method, "labutils"), ours(method)
        yield (method, "grad-cam, 64 at once"), grad_cam(method, 64)
        yield (method, "grad-cam, one by one"), grad_cam(method, 1)
        if method in TORCHCAM:
            yield (method, "torch-cam"), torch_cam(TORCHCAM[method])
        if method == "gradcam" and importlib.util.find_spec("captum"):
            yield (method, "captum"), captum


def milliseconds(contestant: Contestant, model: nn.Module, images: Tensor) -> float:
    gpu = images.device.type == "cuda"
    clock = time.perf_counter if gpu else time.process_time
    started = clock()
    with contextlib.redirect_stderr(io.StringIO()):  # Score-CAM draws a bar an image
        maps = contestant(model, images)
    if gpu:
        torch.cuda.synchronize()
    assert maps.shape == (len(images), SIDE, SIDE)
    return 1000 * (clock() - started) / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--images", type=at_least(2), default=64, help="of each contestant in each turn"
    )
    parser.add_argument("--turns", type=at_least(1), default=3, help="turns of every contestant")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    options = parser.parse_args()
    device = lab.resolve_device(options.device)
    torch.set_num_threads(1)
    lab.seed_everything(0)
    model = lab.CNN((3, SIDE, SIDE), 10, widths=WIDTHS).to(device).eval()
    prefer_channels_last(model, device)
    images = torch.randn(options.images, 3, SIDE, SIDE, device=device)
    turns, known = [], list(contestants(options.methods))
    for turn in range(options.turns + 1):  # one warms up
        found = {}
        for (method, by), contestant in known:
            count = 2 if turn == 0 or method == "scorecam" else len(images)
            found[method, by] = milliseconds(contestant, model, images[:count])
        turns.append(found)
    widths = "-".join(map(str, WIDTHS))
    clock = "seconds" if device.type == "cuda" else "processor time, one thread"
    print(
        f"CNN {widths}, {options.images:,} images of {SIDE}x{SIDE}x3; {clock}; median of "
        f"{options.turns} turns; {device_name(device)}, torch {torch.__version__}\n\n"
        "| method | by | ms an image | × plain CAM |\n|---|---|---|---|"
    )
    for method, by in found:
        median = statistics.median(each[method, by] for each in turns[1:])
        ratio = statistics.median(each[method, by] / each[PLAIN] for each in turns[1:])
        print(f"| {method} | {by} | {median:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
