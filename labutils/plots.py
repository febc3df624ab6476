"""Every figure. Functions take long tables and arrays and return a Matplotlib figure.

A long table has one row a measurement. The column named by `hue` tells what is compared, models for
example: each gets a colour of PALETTE, in order of appearance. Repeated rows, of several seeds for
example, are drawn as their mean and spread, and counted as n.
Figures are closed before they are returned: a notebook shows the one that a cell ends with, once.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations, cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

PALETTE = sns.color_palette("colorblind")
GREY = "0.45"
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}  # a legend's place

Colors = dict[str, tuple[float, float, float]]


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
        "lines.linewidth": 1.6,
        "text.parse_math": False,  # a class may be called $x$
    }
    with plt.rc_context():
        sns.set_theme(context="notebook", style="ticks", palette=PALETTE, font_scale=0.85, rc=rc)
        yield


def _figure(
    title: str, width: float, height: float, *, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    width = min(max(width, 6.0), 10.0)
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    title = textwrap.fill(title, round(8.5 * width))
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    plt.close(figure)
    return figure, list(axes.flat)


def _checked(
    owner: str, table: pd.DataFrame, names: Sequence[str], numbers: Sequence[str]
) -> pd.DataFrame:
    """The columns that a figure needs: names as text, numbers as floats; infinite ones are NaN.

    Raises ValueError that names the column if it is missing, empty, or not what is needed.
    """
    columns = {}
    for column in [*names, *numbers]:
        if column not in table:
            known = ", ".join(map(str, table.columns))
            raise ValueError(f"{owner}: the table has no column {column!r}. It has: {known}.")
        if table.empty:
            raise ValueError(f"{owner}: column {column!r} is empty. Give at least one row.")
        if column in names and table[column].isna().any():
            raise ValueError(f"{owner}: column {column!r} has rows without a name.")
        try:
            columns[column] = table[column].astype(str if column in names else float).to_numpy()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{owner}: column {column!r} has to hold numbers ({error}).") from None
    return pd.DataFrame(columns).replace([np.inf, -np.inf], np.nan)


def _colors(names: pd.Series) -> Colors:
    return dict(zip(names.unique(), cycle(PALETTE)))


def _count(sizes: pd.Series) -> str:
    low, high = sizes.min(), sizes.max()
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def _note(axis: Axes, text: str) -> None:
    axis.set_title(text, fontsize=9, color=GREY)


def _curves(
    axis: Axes, table: pd.DataFrame, x: str, y: str, hue: str, colors: Colors, style: str = "-"
) -> dict[str, tuple[float, float]]:
    """The mean of y over x for every hue; around a solid line the band from lowest to highest.

    Returns where the lines end if that is at the same x.
    """
    ends = {}
    for name, rows in table.groupby(hue, sort=False):
        spread = rows.groupby(x)[y].agg(["mean", "min", "max"])
        marker = "o" if len(spread) <= 8 else ""
        axis.plot(spread["mean"], style, color=colors[name], marker=marker, ms=4, label=name)
        if style == "-":
            low, high = spread["min"], spread["max"]
            axis.fill_between(spread.index, low, high, color=colors[name], alpha=0.2, lw=0)
        drawn = spread["mean"].dropna()
        if len(drawn):
            ends[name] = drawn.index[-1], drawn.iloc[-1]
    return ends if len({x for x, _ in ends.values()}) == 1 else {}


def _name(axes: Sequence[Axes], points: Sequence[Mapping], colors: Colors) -> None:
    """Write the names beside their points if these are few and the text is free, else a legend.

    points: for each axis, name -> (x, y).
    """
    options = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
    texts = []
    for axis, named in zip(axes, points):
        for name, point in named.items():
            texts.append(axis.annotate(name, point, color=colors[name], **options))
    figure = axes[0].get_figure()
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts]
    spots = [text.axes.transData.transform(text.xy) for text in texts]
    covered = any(box.contains(*spot) for box in boxes for spot in spots)
    crossed = any(one.overlaps(other) for one, other in combinations(boxes, 2))
    if covered or crossed or len(colors) > 5 or len(texts) < len(axes) * len(colors):
        for text in texts:
            text.remove()
        handles = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
        axes[-1].legend(handles=handles, **BESIDE)


def _log_ticks(axis: Axis) -> None:
    """A logarithmic axis, with ticks between the powers of ten where these are too few to read."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    steps = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 1.5 else (1, 3)
    axis.set_major_locator(LogLocator(subs=steps if decades < 2.5 else (1,), numticks=9))
    axis.set_major_formatter(lambda value, _: _prefixed(value))
    axis.set_minor_locator(NullLocator())


def _prefixed(value: float) -> str:
    """20000 -> '20 k': thousands, millions and billions short."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= value < 1e12:
            return f"{value / size:g} {prefix}"
    return f"{value:g}"


@_style()
def image_grid(
    images: np.ndarray, captions: Sequence[str], *, title: str, columns: int = 10
) -> Figure:
    """Images with a caption above each.

    images: uint8 [N, C, H, W], C of 1 or 3.
    """
    rows = max(1, -(-len(images) // columns))
    lines = max((caption.count("\n") + 1 for caption in captions), default=1)
    size = 9.0 / columns
    height = 0.45 + rows * (size + 0.17 * lines)
    figure, axes = _figure(title, 9.0, height, rows=rows, columns=columns)
    for axis in axes:
        axis.axis("off")
    for axis, image, caption in zip(axes, np.asarray(images), captions):
        axis.imshow(image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)
        axis.set_title(caption, loc="center", fontsize=8)
    return figure


def mistakes(
    images: np.ndarray,
    labels: np.ndarray,
    probs: np.ndarray,
    classes: Sequence[str],
    *,
    title: str = "Wrong, and sure of it",
    count: int = 10,
    columns: int = 10,
) -> Figure:
    """The misclassified images of which the network was surest, the surest first.

    images: uint8 [N, C, H, W]; labels: int [N]; probs: float [N, num_classes]; arrays or tensors
    on the CPU.
    """
    images, labels, probs = np.asarray(images), np.asarray(labels), np.asarray(probs)
    preds, confidence = probs.argmax(axis=1), probs.max(axis=1)
    wrong = np.flatnonzero(preds != labels)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:count]
    captions = [
        f"{classes[preds[i]]}?\nno, {classes[labels[i]]}\n{100 * confidence[i]:.0f} % sure"
        for i in wrong
    ]
    figure = image_grid(images[wrong], captions, title=title, columns=columns)
    if not len(wrong):
        figure.text(0.5, 0.4, f"No mistake among {len(labels):,} images.", ha="center")
    return figure


@_style()
def learning_curves(
    histories: pd.DataFrame, *, hue: str, title: str, chance: float | None = None
) -> Figure:
    """Loss and accuracy by epoch: mean over seeds, band from lowest to highest, val solid.

    histories: columns hue, seed, epoch, train_loss, val_loss (nats), train_accuracy, val_accuracy
    (fractions). chance: accuracy of guessing, a fraction.
    """
    numbers = ["epoch", "train_loss", "val_loss", "train_accuracy", "val_accuracy"]
    table = _checked("learning_curves", histories, [hue, "seed"], numbers)
    colors = _colors(table[hue])
    figure, (left, right) = _figure(title, 9.9, 3.7, columns=2)
    for axis, what in ((left, "loss"), (right, "accuracy")):
        _curves(axis, table, "epoch", f"train_{what}", hue, colors, ":")
        ends = _curves(axis, table, "epoch", f"val_{what}", hue, colors)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _note(left, f"val —   train ···   {_count(table.groupby(hue)['seed'].nunique())}")
    left.set_ylabel("mean cross-entropy (nats)")
    _log_ticks(left.yaxis)
    right.set_ylabel("accuracy (%)")
    right.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    if chance:
        right.axhline(chance, color=GREY, lw=1, ls="--")
    _name([right], [ends], colors)
    return figure


@_style()
def lines(
    table: pd.DataFrame,
    *,
    x: str,
    y: str,
    hue: str,
    style: str | None = None,
    title: str,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """One number against another: mean, and band from lowest to highest around solid lines.

    style: a column of at most two values; the first is drawn solid, the second dotted.
    log_x: logarithmic x axis with a point and a tick at every x.
    """
    table = _checked("lines", table, [hue, style] if style else [hue], [x, y])
    colors = _colors(table[hue])
    figure, (axis,) = _figure(title, 7.2, 4.4)
    note = _count(table.groupby([hue, style or hue, x]).size())
    if style:
        kinds = list(table[style].unique())
        if len(kinds) > 2:
            raise ValueError(f"lines: column {style!r} holds {kinds}. Give two values at most.")
        note = "   ".join([f"{kind} {d}" for kind, d in zip(kinds, ("—", "···"))] + [note])
        _curves(axis, table[table[style] != kinds[0]], x, y, hue, colors, ":")
        table = table[table[style] == kinds[0]]
    ends = _curves(axis, table, x, y, hue, colors)
    axis.set(xlabel=x, ylabel=y)
    _note(axis, note)
    if log_x:
        axis.set_xscale("log")
        axis.set_xticks(ticks := sorted(table[x].unique()), [f"{tick:g}" for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
    if log_y:
        _log_ticks(axis.yaxis)
    _name([axis], [ends], colors)
    return figure


@_style()
def dots(
    table: pd.DataFrame,
    *,
    x: str,
    y: str,
    hue: str,
    title: str,
    marks: Mapping[str, Mapping[str, float]] | None = None,
    colors: Sequence[int] | None = None,
) -> Figure:
    """One row a category y, one colour a hue: mean of x ± standard deviation of the sample.

    marks: name -> category -> value, drawn as grey diamonds, then bars: published results and
    targets, say; categories that the table lacks are left out. colors: the hues' places in
    PALETTE; by default none that stands for a model in the other figures of a notebook.
    """
    table = _checked("dots", table, [y, hue], [x])
    rows, hues = list(table[y].unique()), list(table[hue].unique())
    figure, (axis,) = _figure(title, 8.0, 1.5 + 0.55 * len(rows))
    for (name, values), shape in zip((marks or {}).items(), cycle("D|")):
        known = {row: value for row, value in values.items() if row in rows}
        heights = [rows.index(row) for row in known]
        axis.plot(list(known.values()), heights, shape, ms=8, mfc="none", color=GREY, label=name)
    offsets = 0.28 * (np.arange(len(hues)) - (len(hues) - 1) / 2) / max(1, len(hues) - 1)
    places = cycle(colors or (7, 9, 4, 8, 6, 5))
    for name, offset, place in zip(hues, offsets, places):
        values = table[table[hue] == name].groupby(y)[x].agg(["mean", "std"]).reindex(rows)
        heights = np.arange(len(rows)) + offset
        style = {"fmt": "o", "ms": 6, "color": PALETTE[place], "label": name}
        axis.errorbar(values["mean"], heights, xerr=values["std"], **style)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(x)
    _note(axis, f"mean ± deviation, {_count(table.groupby([y, hue]).size())}")
    axis.legend(**BESIDE)
    return figure


@_style()
def against(table: pd.DataFrame, *, prices: Sequence[str], y: str, hue: str, title: str) -> Figure:
    """One result against several prices: a panel each, prices on logarithmic axes.

    prices: columns, each with its unit. Each hue is drawn at its mean price: mean ± standard
    deviation of y.
    """
    table = _checked("against", table, [hue], [*prices, y])
    colors = _colors(table[hue])
    groups = table.groupby(hue, sort=False)
    means, deviations = groups.mean(), groups[y].std()
    figure, axes = _figure(title, 1.6 + 2.9 * len(prices), 3.5, columns=len(prices))
    for axis, price in zip(axes, prices):
        for name, mean in means.iterrows():
            axis.errorbar(mean[price], mean[y], deviations[name], fmt="o", color=colors[name])
        axis.margins(x=0.12, y=0.12)
        _log_ticks(axis.xaxis)
        axis.set_xlabel(price)
    axes[0].set_ylabel(y)
    _note(axes[0], f"mean ± deviation, {_count(groups.size())}")
    _name(axes, [dict(zip(means.index, zip(means[price], means[y]))) for price in prices], colors)
    return figure


@_style()
def layers(table: pd.DataFrame, *, panel: str, hue: str, y: str, title: str) -> Figure:
    """A quantity layer by layer, from the input to the output, on a logarithmic scale.

    table: columns panel, hue, layer and y; layers are numbered in order of appearance. Zeros
    cannot be drawn and leave a gap.
    """
    table = _checked("layers", table, [panel, hue, "layer"], [y]).replace({y: {0.0: np.nan}})
    names = table.groupby([panel, hue])["layer"]
    table["layer"] = names.transform(lambda names: pd.factorize(names)[0] + 1)
    colors, panels = _colors(table[hue]), table.groupby(panel, sort=False)
    figure, axes = _figure(title, 1.6 + 4.2 * panels.ngroups, 3.9, columns=panels.ngroups)
    for axis, (name, rows) in zip(axes, panels):
        ends = _curves(axis, rows, "layer", y, hue, colors)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(name)
        axis.set_xlabel("layer, from the input")
        axis.sharey(axes[0])
    _log_ticks(axes[0].yaxis)
    axes[0].set_ylabel(y)
    _name(axes[-1:], [ends], colors)
    return figure


@_style()
def heatmap(table: pd.DataFrame, *, title: str, label: str, digits: int = 1) -> Figure:
    """A table of numbers as coloured, annotated cells; its index and columns carry their names."""
    width, height = 2.2 + 0.85 * table.shape[1], 1.3 + 0.5 * table.shape[0]
    figure, (axis,) = _figure(title, width, height)
    cells = {"annot": True, "fmt": f".{digits}f", "linewidths": 0.5}
    sns.heatmap(table, ax=axis, cmap="viridis", cbar_kws={"label": label}, **cells)
    axis.tick_params(length=0, rotation=0)
    axis.invert_yaxis()
    return figure


@_style()
def confusion(matrix: np.ndarray, classes: Sequence[str], *, title: str) -> Figure:
    """Mistakes as a heat map: images of the row's class taken for the column's; hits in grey.

    More than 30 classes are too many for numbers and names: they are drawn without.
    """
    matrix = np.asarray(matrix)
    readable = len(matrix) <= 30
    hits = np.eye(len(matrix), dtype=bool)
    side = max(5.5, 0.48 * len(matrix) + 1.6) if readable else 9.0
    figure, (axis,) = _figure(title, side + 0.8, side)
    shared = {
        "annot": np.where(matrix > 0, matrix.astype(str), "") if readable else None,
        "fmt": "",
        "linewidths": 0.5 if readable else 0.0,
        "ax": axis,
        "square": True,
        "xticklabels": classes if readable else False,
        "yticklabels": classes if readable else False,
    }
    bar = {"label": "images", "shrink": 0.75, "ticks": MaxNLocator(integer=True)}
    sns.heatmap(matrix, mask=hits, cmap="Reds", cbar_kws=bar, **shared)
    grey = {"cmap": ["0.93"], "cbar": False, "annot_kws": {"color": "0.4"}}
    sns.heatmap(matrix, mask=~hits, **grey, **shared)
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.tick_params(length=0, rotation=0)
    if max(map(len, classes), default=0) > 7:  # longer names would run into each other
        plt.setp(axis.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor")
    return figure


@_style()
def reliability_diagram(
    bins: pd.DataFrame, *, hue: str, title: str, min_images: int = 10
) -> Figure:
    """Accuracy against confidence; on the diagonal a network knows what it knows.

    bins: columns hue and those of metrics.calibration_bins. Bins of fewer than min_images say
    nothing and are left out; the area of a point grows with its images.
    """
    table = _checked("reliability_diagram", bins, [hue], ["confidence", "accuracy", "images"])
    colors = _colors(table[hue])
    figure, (axis,) = _figure(title, 6.4, 4.8)
    axis.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", label="perfectly calibrated")
    for name, rows in table[table["images"] >= min_images].groupby(hue, sort=False):
        points = (rows["confidence"], rows["accuracy"])
        axis.plot(*points, color=colors[name], label=name)
        axis.scatter(*points, s=6 * np.sqrt(rows["images"]), color=colors[name])
    axis.set(xlabel="confidence (%)", ylabel="accuracy at that confidence (%)")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axis.set(xlim=(0, 1.03), ylim=(0, 1.03))
    axis.legend(loc="upper left")
    return figure
