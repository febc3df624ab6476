"""Every figure. Functions take tables and arrays and return a Matplotlib figure in one house style.

Figures are closed before they are returned: a notebook shows the one that a cell ends with, once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

if TYPE_CHECKING:
    from matplotlib.axis import Axis

PALETTE = sns.color_palette("colorblind")
GREY = "0.45"


@contextmanager
def _style():
    rc = {
        "figure.dpi": 110,
        "axes.titlesize": 12,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "0.92",
        "figure.constrained_layout.use": True,
        "legend.frameon": False,
    }
    with plt.rc_context():
        sns.set_theme(context="notebook", style="ticks", palette=PALETTE, font_scale=0.85, rc=rc)
        yield


def _figure(rows: int, columns: int, width: float, height: float, title: str) -> tuple:
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    plt.close(figure)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, without a date, so that the same figure is the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def image_grid(
    images: np.ndarray, captions: Sequence[str], *, title: str, columns: int = 10
) -> Figure:
    """Images with a caption above each.

    images: uint8 [N, C, H, W], C of 1 or 3.
    """
    rows = max(1, -(-len(images) // columns))
    lines = max((caption.count("\n") + 1 for caption in captions), default=1)
    with _style():
        size = 9.0 / columns
        height = 0.45 + rows * (size + 0.17 * lines)
        figure, axes = _figure(rows, columns, 9.0, height, title)
        for axis in axes.flat:
            axis.axis("off")
        for axis, image, caption in zip(axes.flat, images, captions):
            axis.imshow(image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)
            axis.set_title(caption, loc="center", fontsize=8)
    return figure


def learning_curves(
    curves: Mapping[str, Sequence[pd.DataFrame]], *, title: str, chance: float | None = None
) -> Figure:
    """Loss and accuracy by epoch: mean over seeds, band from lowest to highest, val solid.

    curves: label -> histories of its runs, one a seed, each indexed by epoch.
    chance: accuracy of guessing, a fraction.
    """
    with _style():
        figure, axes = _figure(1, 2, 9.9, 3.7, title)
        for axis, what, scale in zip(axes.flat, ("loss", "accuracy"), (1, 100)):
            for (label, histories), color in zip(curves.items(), PALETTE):
                for split, dashes in (("val", "-"), ("train", ":")):
                    columns = [scale * history[f"{split}_{what}"] for history in histories]
                    seeds = pd.concat(columns, axis=1)  # NaN where a run stopped early
                    axis.plot(seeds.mean(axis=1), dashes, color=color, lw=1.6, label=label)
                    if split == "val":
                        low, high = seeds.min(axis=1), seeds.max(axis=1)
                        axis.fill_between(seeds.index, low, high, color=color, alpha=0.2, lw=0)
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        left, right = axes.flat
        left.set_ylabel("mean cross-entropy (nats)")
        left.set_yscale("log")
        _log_ticks(left.yaxis)
        right.set_ylabel("accuracy (%)")
        if chance:
            right.axhline(100 * chance, color=GREY, lw=1, ls="--")
        handles = [line for line in right.get_lines() if line.get_linestyle() == "-"]
        right.legend(
            handles,
            list(curves),
            title="val —   train ···",
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
        )
    return figure


def heatmap(table: pd.DataFrame, *, title: str, label: str, digits: int = 1) -> Figure:
    """A table of numbers as coloured, annotated cells; its index and columns carry their names."""
    with _style():
        width, height = 2.2 + 0.85 * table.shape[1], 1.3 + 0.5 * table.shape[0]
        figure, axes = _figure(1, 1, max(6.0, width), height, title)
        axis = axes[0, 0]
        sns.heatmap(
            table,
            ax=axis,
            annot=True,
            fmt=f".{digits}f",
            cmap="viridis",
            linewidths=0.5,
            cbar_kws={"label": label},
        )
        axis.tick_params(length=0, rotation=0)
        axis.invert_yaxis()
    return figure


def confusion(matrix: np.ndarray, classes: Sequence[str], *, title: str) -> Figure:
    """Mistakes as a heat map: images of the row's class taken for the column's; hits in grey.

    More than 30 classes are too many for numbers and names: they are drawn without.
    """
    matrix = np.asarray(matrix)
    few = len(matrix) <= 30
    hits = np.eye(len(matrix), dtype=bool)
    with _style():
        side = max(5.5, 0.48 * len(matrix) + 1.6) if few else 9.0
        figure, axes = _figure(1, 1, side + 0.8, side, title)
        axis = axes[0, 0]
        shared = {
            "annot": np.where(matrix > 0, matrix.astype(str), "") if few else None,
            "fmt": "",
            "linewidths": 0.5 if few else 0.0,
            "ax": axis,
            "square": True,
            "xticklabels": classes if few else False,
            "yticklabels": classes if few else False,
        }
        bar = {"label": "images", "shrink": 0.75, "ticks": MaxNLocator(integer=True)}
        sns.heatmap(matrix, mask=hits, cmap="Reds", cbar_kws=bar, **shared)
        grey = {"cmap": ["0.93"], "cbar": False, "annot_kws": {"color": "0.4"}}
        sns.heatmap(matrix, mask=~hits, **grey, **shared)
        axis.set_xlabel("predicted class")
        axis.set_ylabel("true class")
        axis.tick_params(length=0, rotation=0)
        if max(map(len, classes), default=0) > 7:  # longer names would run into each other
            axis.set_xticks(
                axis.get_xticks(),
                axis.get_xticklabels(),
                rotation=40,
                ha="right",
                rotation_mode="anchor",
            )
    return figure


def reliability(
    curves: Mapping[str, Mapping[str, Sequence[float]]], *, title: str, min_images: int = 10
) -> Figure:
    """Accuracy against confidence; on the diagonal a network knows what it knows.

    curves: label -> bins as metrics.reliability gives them. Bins of fewer than min_images say
    nothing and are left out; the area of a point grows with its images.
    """
    with _style():
        figure, axes = _figure(1, 1, 6.4, 4.8, title)
        axis = axes[0, 0]
        axis.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", label="perfectly calibrated")
        for (label, bins), color in zip(curves.items(), PALETTE):
            images = np.asarray(bins["images"])
            kept = images >= min_images
            confidence = np.asarray(bins["confidence"])[kept]
            accuracy = np.asarray(bins["accuracy"])[kept]
            axis.plot(confidence, accuracy, "-", color=color, lw=1.3, label=label)
            axis.scatter(confidence, accuracy, s=6 * np.sqrt(images[kept]), color=color)
        axis.set_xlabel("confidence (%)")
        axis.set_ylabel("accuracy at that confidence (%)")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(PercentFormatter(1.0, symbol=""))
        axis.set(xlim=(0, 1.03), ylim=(0, 1.03))
        axis.legend(loc="upper left")
    return figure


def dots(
    table: Mapping[str, Mapping[str, tuple[float, float]]],
    *,
    title: str,
    label: str,
    marks: Mapping[str, Mapping[str, float]] | None = None,
    colors: Sequence[int] = (7, 9),
) -> Figure:
    """Groups of results side by side: one row a model, one colour a series, mean ± deviation.

    table: series -> model -> (mean, deviation). marks: name -> model -> value, drawn as open
    diamonds and vertical bars: published results and targets, say. colors: the series' places in
    the palette; by default none that stands for a model in the other figures of a notebook.
    """
    models = list(dict.fromkeys(model for series in table.values() for model in series))
    with _style():
        figure, axes = _figure(1, 1, 8.0, 1.5 + 0.55 * len(models), title)
        axis = axes[0, 0]
        for (name, values), shape in zip((marks or {}).items(), ("D", "|")):
            rows = [models.index(model) for model in values]
            style: dict[str, Any] = {"facecolors": "none"} if shape == "D" else {}
            axis.scatter(
                list(values.values()), rows, marker=shape, s=70, color=GREY, label=name, **style
            )
        for offset, (series, values), place in zip((-0.14, 0.14), table.items(), colors):
            rows = [models.index(model) + offset for model in values]
            means, deviations = zip(*values.values())
            axis.errorbar(
                means, rows, xerr=deviations, fmt="o", ms=6, color=PALETTE[place], label=series
            )
        axis.set_yticks(range(len(models)), models)
        axis.set_ylim(len(models) - 0.5, -0.5)
        axis.set_xlabel(label)
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def lines(
    solid: Mapping[str, Mapping[float, Sequence[float]]],
    dotted: Mapping[str, Mapping[float, Sequence[float]]] | None = None,
    *,
    title: str,
    x: str,
    y: str,
    legend: str | None = None,
    log_x: bool = False,
) -> Figure:
    """One number against another: mean over seeds, band from lowest to highest around solid lines.

    solid, dotted: label -> x -> values of the seeds; a label has one colour in both.
    log_x: logarithmic x axis with a point and a tick at every x.
    """
    with _style():
        figure, axes = _figure(1, 1, 7.2, 4.4, title)
        axis = axes[0, 0]
        for series, dashes in ((dotted or {}, ":"), (solid, "-")):
            for (label, values), color in zip(series.items(), PALETTE):
                places = list(values)
                means = [np.mean(values[place]) for place in places]
                marker = "o" if log_x and dashes == "-" else None
                axis.plot(places, means, dashes, color=color, lw=1.6, marker=marker, ms=4)
                if dashes == "-":
                    axis.lines[-1].set_label(label)
                    low = [np.min(values[place]) for place in places]
                    high = [np.max(values[place]) for place in places]
                    axis.fill_between(places, low, high, color=color, alpha=0.2, lw=0)
        if log_x:
            axis.set_xscale("log")
            ticks = sorted({place for values in solid.values() for place in values})
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.legend(title=legend, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def against(
    panels: Mapping[str, Mapping[str, float]],
    values: Mapping[str, tuple[float, float]],
    *,
    title: str,
    y: str,
) -> Figure:
    """One result against several prices: a panel each, prices on logarithmic axes.

    panels: name of a price, with its unit -> model -> price. values: model -> (mean, deviation).
    A model has one colour in all panels.
    """
    with _style():
        figure, axes = _figure(1, len(panels), 1.6 + 2.9 * len(panels), 3.5, title)
        for axis, (price, prices) in zip(axes.flat, panels.items()):
            for (model, (mean, deviation)), color in zip(values.items(), PALETTE):
                axis.errorbar(
                    prices[model], mean, yerr=deviation or None, fmt="o", color=color, label=model
                )
            axis.set_xscale("log")
            axis.margins(x=0.12, y=0.12)
            _log_ticks(axis.xaxis)
            axis.set_xlabel(price)
        axes[0, 0].set_ylabel(y)
        axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _log_ticks(axis: Axis) -> None:
    """Ticks between the powers of ten too, where there are too few of these to read values off."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    steps = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 1.5 else (1, 3)
    axis.set_major_locator(LogLocator(subs=steps if decades < 2.5 else (1,), numticks=9))
    axis.set_major_formatter(lambda value, _: _prefixed(value))
    axis.set_minor_locator(NullLocator())


def _prefixed(value: float) -> str:
    """20000 -> '20 k': thousands, millions and billions short."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {prefix}"
    return f"{value:g}"


def layers(panels: Mapping[str, Mapping[str, Sequence[float]]], *, title: str, y: str) -> Figure:
    """A quantity layer by layer, from the input to the output, on a logarithmic scale.

    panels: title of a panel -> label -> one number a layer. Zeros cannot be drawn and leave a gap.
    """
    with _style():
        figure, axes = _figure(1, len(panels), 1.6 + 4.2 * len(panels), 3.9, title)
        for axis, (panel, curves) in zip(axes.flat, panels.items()):
            for (label, values), color in zip(curves.items(), PALETTE):
                heights = np.array(values, dtype=float)
                heights[heights == 0] = np.nan
                axis.plot(np.arange(1, len(heights) + 1), heights, color=color, lw=1.6, label=label)
            axis.set_yscale("log")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_title(panel)
            axis.set_xlabel("layer, from the input")
        lowest, highest = zip(*(axis.get_ylim() for axis in axes.flat))
        for axis in axes.flat:
            axis.set_ylim(min(lowest), max(highest))
            if max(highest) > 30 * min(lowest):
                axis.yaxis.set_minor_locator(NullLocator())
        axes[0, 0].set_ylabel(y)
        axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
