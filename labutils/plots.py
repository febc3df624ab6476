"""Every figure, made from arrays or long tables, which have one row a measurement.

Their column `hue` says what is compared; names in COLORS look the same in every figure, others have
the colours that are left, in order, but never that of the residual networks. Rows of several seeds
are drawn as mean and spread, and counted as n; a point of a single one is hollow where others have
more. NaN is left out.
"""

import textwrap
from collections.abc import Sequence
from itertools import cycle, pairwise

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from pandas import DataFrame, Series, factorize
from scipy.stats import binomtest

PALETTE, GREY = [*sns.color_palette("colorblind"), *sns.color_palette("dark")], "0.45"
COLORS = {"plain": 0, "residual": 1, "batchnorm": 2, "he": 4, "control": 7, "ours": 9}
OTHERS = (0, 2, 4, 5, 9, 19, 14, 6, 8, 7, 10, 12, 15, 16, 17, 18)  # no orange, and no red near it
BAND = "band: lowest to highest"
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}  # a legend right of the axes
FRAME = {"figure.dpi": 110, "figure.constrained_layout.use": True, "legend.frameon": False}
# Without parse_math a class may be called $x$.
INSIDE = {"axes.grid": True, "grid.color": "0.92", "text.parse_math": False, "patch.linewidth": 0}
STYLE = sns.axes_style("ticks") | sns.plotting_context(font_scale=0.85) | FRAME | INSIDE
_styled = plt.rc_context(STYLE)


def _figure(title: str, width: float, height: float, rows=1, columns=1, **options) -> tuple:
    width = min(max(width, 6.0), 10.0)
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **options)
    figure.suptitle(textwrap.fill(title, int(8 * width)), x=0.01, ha="left", size=13, weight="bold")
    sns.despine(figure)
    plt.close(figure)  # a notebook shows it once
    return figure, list(axes.flat)


def _checked(table: DataFrame, numbers: Sequence[str], hue: str, *names: str) -> tuple:
    """The columns that are needed, and a colour for each hue; a ValueError names a bad column."""
    types = dict.fromkeys(numbers, float) | dict.fromkeys((hue, *names), str)
    for column, kind in types.items():
        if column not in table or table.empty or (kind is str and table[column].isna().any()):
            problem = f"Column {column!r} is missing, has no rows, or rows without a name."
            raise ValueError(f"{problem} The table has: {list(table)}.")
    table = table.reset_index(drop=True)[list(types)].astype(types)
    hues = list(table[hue].unique())
    others = cycle(i for i in OTHERS if i not in [COLORS.get(name) for name in hues])
    colors = {name: PALETTE[COLORS[name] if name in COLORS else next(others)] for name in hues}
    return table.replace([np.inf, -np.inf], np.nan), colors


def _describe(axis, y: str, sizes: Series, note="", spread="mean ± deviation") -> None:
    """Name the y axis; say above the axes what is drawn, and of how many measurements."""
    sizes = sizes[sizes > 0] if sizes.any() else sizes
    least, most = sizes.min(), sizes.max()
    white = [line for line in axis.get_lines() if line.get_markerfacecolor() == "white"]
    hollow = any(len(line.get_xdata()) for line in white)
    n = f"{least}{' (hollow)' * hollow} to {most}" if least < most else most
    text = note if most == 1 else f"{note}{spread}, "
    axis.set_title(f"{text}n = {n}", loc="left", fontsize=9, color=GREY)
    axis.set_ylabel(y)


def _curves(axis, table: DataFrame, x: str, y: str, hue: str, colors: dict, style="-") -> None:
    """The mean of y over x for every hue; around a solid line the band from lowest to highest."""
    several = table.groupby([hue, x])[y].count().max() > 1
    for name, rows in table.groupby(hue, sort=False):
        band = rows.groupby(x)[y].agg(["mean", "min", "max", "count"])
        marker = "" if len(band) > 8 else "o" if style == "-" else "^"
        look = {"color": colors[name], "ms": 4, "marker": marker}
        axis.plot(band["mean"], style, label=name if style == "-" else "", **look)
        if marker and several:
            axis.plot(band["mean"][band["count"] == 1], ls="", mfc="white", **look)
        if style == "-":
            axis.fill_between(band.index, band["min"], band["max"], fc=colors[name], alpha=0.2)
    axis.set_xlabel(x)


def _named(axis, colors: dict) -> Figure:
    """The figure, with every name at the end of its solid line in this axis, none over another."""
    ends = {line.get_label(): line.get_xydata() for line in axis.get_lines()}
    axis.autoscale_view()
    places, height = [], 72 * axis.get_position().height * axis.get_figure().get_figheight()
    for name in colors:
        drawn = axis.transScale.transform(ends.get(name, np.empty((0, 2))))
        drawn = axis.transLimits.transform(drawn[np.isfinite(drawn).all(axis=1)])
        places.append([*reversed(drawn[-1] if len(drawn) else (1, 0)), name])  # or in the corner
    last = max(x for _, x, _ in places)
    # An end that is nearly the last is named beside it, where no other line runs.
    places = sorted([y, last if x > 0.8 * last else x, name] for y, x, name in places)
    for step, order in ((13 / height, places), (-13 / height, places[::-1])):
        # First upwards from the lowest, then downwards from the highest that is in the axes.
        order[0][0] = min(order[0][0], 1.0)
        for before, after in pairwise(order):
            if abs(before[1] - after[1]) < 0.2:
                least = before[0] + step
                after[0] = max(after[0], least) if step > 0 else min(after[0], least)
    for y, x, name in places:
        look = {"textcoords": "offset points", "va": "center", "color": colors[name]}
        axis.annotate(name, (x, y), (7, 0), xycoords="axes fraction", **look)
    return axis.get_figure()


def _log_ticks(axis) -> None:
    """Logarithmic scale, with ticks between powers of ten if these are too few; 20 k for 20000.

    Over more than eight decades all numbers are powers of ten.
    """
    if not np.isfinite(axis.get_minpos()):
        return  # nothing positive to draw
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    decades = np.ptp(np.log10(axis.get_view_interval()))
    steps = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 1.5 else (1, 3)
    powers = LogLocator(subs=steps if decades < 2.5 else (1,), numticks=9)
    axis.set_major_locator(powers if decades > 0.35 else MaxNLocator(6, steps=[1, 2, 5, 10]))

    def written(value: float, _) -> str:
        if decades > 8:
            return f"1e{np.log10(value):.0f}"
        return EngFormatter()(value) if value >= 1000 else f"{value:g}"

    axis.set_major_formatter(written)
    axis.set_minor_locator(NullLocator())


@_styled
def image_grid(
    images, captions: Sequence[str], *, title: str, columns: int = 10, maps=None
) -> Figure:
    """Images, uint8 [N, C, H, W] with C of 1 or 3, captions above; maps, [N, H, W], laid over."""
    rows, size = max(1, -(-len(images) // columns)), min(9.0 / columns, 1.8)
    longest = max(map(len, "\n".join(captions).split("\n")))
    lines = 1 + max((caption.count("\n") for caption in captions), default=0)
    figure, axes = _figure(title, 9.0, 0.45 + rows * (size + 0.17 * lines), rows, columns)
    plt.setp(axes, frame_on=False, xticks=[], yticks=[])
    heats = [None] * len(images) if maps is None else np.asarray(maps)
    shown = zip(np.asarray(images), captions, heats, strict=True)
    for axis, (image, caption, heat) in zip(axes, shown):
        axis.imshow(image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)
        if heat is not None:
            axis.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.5)
        axis.set_title(caption, fontsize=min(8.0, 130 * size / max(1, longest)))
    return figure


@_styled
def explained(image, heat, *, title: str, strength: float = 0.5, pixel=None) -> Figure:
    """An image, uint8 [C, H, W], its map [H, W] with a colour bar, and the map laid over it.

    pixel: (x, y), marked in all three.
    """
    image, heat = np.asarray(image).transpose(1, 2, 0), np.asarray(heat)
    figure, axes = _figure(title, 9.0, 3.6, columns=3)
    plt.setp(axes, frame_on=False, xticks=[], yticks=[])
    look = {"cmap": "inferno", "vmin": 0.0, "vmax": max(1.0, float(heat.max()))}
    for axis, name in zip(axes, ("image", "map", "one over the other")):
        axis.set_title(name, loc="left", fontsize=9, color=GREY)
        if name != "map":
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        for color, width in (("black", 4), ("white", 2)) if pixel else ():
            axis.plot(*pixel, "+", color=color, ms=13, mew=width)
    drawn = axes[1].imshow(heat, **look)
    axes[2].imshow(heat, alpha=strength, **look)
    figure.colorbar(drawn, ax=axes, label="evidence, relative to the highest", shrink=0.85)
    return figure


def mistakes(images, labels, probs, classes, *, count: int = 10, columns: int = 10) -> Figure:
    """The surest mistakes first. images: uint8 [N, C, H, W], probs: [N, num_classes], no GPU."""
    images, labels, probs = np.asarray(images), np.asarray(labels), np.asarray(probs)
    preds, confidence = probs.argmax(axis=1), probs.max(axis=1)
    wrong = [i for i in np.argsort(-confidence, kind="stable") if preds[i] != labels[i]][:count]
    captions = [
        f"{classes[preds[i]]}?\nno, {classes[labels[i]]}\n{100 * confidence[i]:.0f} % sure"
        for i in wrong
    ]
    title = "The mistakes it is surest of" if wrong else f"No mistake among {len(labels):,} images."
    return image_grid(images[wrong], captions, title=title, columns=columns)


@_styled
def learning_curves(histories: DataFrame, *, hue: str, title: str, chance=None) -> Figure:
    """Loss and accuracy of an Experiment's histories.

    chance: accuracy of guessing, a fraction; drawn where the curves come near it.
    """
    numbers = ["seed", "epoch", "train_loss", "val_loss", "train_accuracy", "val_accuracy"]
    table, colors = _checked(histories, numbers, hue)
    _, (left, right) = _figure(title, 9.9, 3.7, columns=2)
    for axis, score in ((left, "loss"), (right, "accuracy")):
        _curves(axis, table, "epoch", f"train_{score}", hue, colors, ":")
        _curves(axis, table, "epoch", f"val_{score}", hue, colors)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    seeds = table.groupby([hue, "epoch"])["seed"].nunique()
    _describe(left, "mean cross-entropy (nats)", seeds, "val —   train ···   ", BAND)
    _log_ticks(left.yaxis)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    right.set_ylabel("accuracy (%)")
    if chance:
        limits = right.get_ylim()  # far above it, the line would only press the curves together
        right.axhline(chance, color=GREY, lw=1, ls="--")
        place = {"xycoords": ("axes fraction", "data"), "annotation_clip": True}
        right.annotate("chance", (1, chance), ha="right", va="top", color=GREY, **place)
        right.set_ylim(limits)
    return _named(right, colors)


@_styled
def lines(
    table: DataFrame, *, x: str, y: str, hue: str, title: str, style=None, log_x=False, log_y=False
) -> Figure:
    """y over x; style: a column of two values, solid and dotted; log_x: ticks at x, if whole.

    log_y: for errors, say, that are all small; those of 0 leave a gap.
    """
    table, colors = _checked(table, [x, y], hue, *([style] if style else []))
    table[y] = table[y].where(table[y] > 0) if log_y else table[y]
    _, (axis,) = _figure(title, 7.2, 4.4)
    note = ""
    for kind, rows in table.groupby(style or [""] * len(table), sort=False):
        _curves(axis, rows, x, y, hue, colors, ":" if note else "-")
        note += f"{kind} {'···' if note else '—'}   " if style else ""
    if log_y:
        _log_ticks(axis.yaxis)
    _describe(axis, y, table.groupby([hue, style or hue, x])[y].count(), note, BAND)
    if log_x and (table[x] % 1).any():
        _log_ticks(axis.xaxis)
    elif log_x:
        values = sorted(table[x][table[x] > 0].unique())
        ticks = []
        for value in values:  # a label takes a tenth of the axis
            if not ticks or value / ticks[-1] > (values[-1] / values[0]) ** 0.1:
                ticks.append(value)
        axis.set(xscale="log", xticks=ticks, xticklabels=[f"{tick:.4g}" for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
    return _named(axis, colors)


@_styled
def dots(
    table: DataFrame, *, x: str, y: str, hue: str, title: str, marks=None, log_x=False
) -> Figure:
    """One row a category y, one colour a hue: mean of x ± standard deviation of the sample.

    marks: name -> category -> value, in black. log_x: as log_y of lines.
    """
    table, colors = _checked(table, [x], hue, y)
    table[x] = table[x].where(table[x] > 0) if log_x else table[x]
    rows = list(table[y].unique())
    figure, (axis,) = _figure(title, 8.0, 1.5 + 0.55 * len(rows))
    marks = {name: values for name, values in (marks or {}).items() if len(values)}
    for (name, values), shape in zip(marks.items(), cycle("D|")):
        marked = Series(values, dtype=float).rename(str).reindex(rows)
        axis.plot(marked, range(len(rows)), shape, ms=9, mfc="none", color="black", label=name)
    # Only rows that hold several hues need them one below the other.
    several = table.groupby([y, hue])[x].count().max() > 1
    apart = 0.56 / max(2, len(colors)) if table.groupby(y)[hue].nunique().max() > 1 else 0.0
    for i, (name, color) in enumerate(colors.items()):
        spread = table[table[hue] == name].groupby(y)[x].agg(["mean", "std", "count"]).reindex(rows)
        heights = np.arange(len(rows)) + apart * (i - (len(colors) - 1) / 2)
        look = {"marker": "o", "ls": "", "ms": 6, "color": color}
        axis.errorbar(spread["mean"], heights, xerr=spread["std"], label=name, **look)
        alone = several & (spread["count"] == 1)
        axis.plot(spread["mean"][alone], heights[alone], mfc="white", zorder=3, **look)
    if log_x:
        _log_ticks(axis.xaxis)
    axis.set(xlabel=x, yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5))
    _describe(axis, "", table.groupby([y, hue])[x].count())
    axis.legend(**BESIDE)
    return figure


@_styled
def against(table: DataFrame, *, prices: Sequence[str], y: str, hue: str, title: str) -> Figure:
    """A result, mean ± deviation, against each of several prices, which have logarithmic axes."""
    table, colors = _checked(table, [*prices, y], hue)
    groups = table.groupby(hue, sort=False)
    means, counts = groups.mean(), groups[y].count()
    figure, axes = _figure(title, 1.6 + 2.9 * len(prices), 3.5, columns=len(prices), sharey=True)
    for axis, price in zip(axes, prices):
        axis.errorbar(means[price], means[y], groups[y].std(), ls="", ecolor=[*colors.values()])
        for name, count in counts.items():
            hollow = {"mfc": "white"} if count == 1 < counts.max() else {}
            place = means.loc[name, [price, y]]
            axis.plot(*place, "o", color=colors[name], label=name, **hollow)
        axis.set_xlabel(price)
        _log_ticks(axis.xaxis)
        _named(axis, colors)
    _describe(axes[0], y, counts)
    return figure


@_styled
def layers(table: DataFrame, *, panel: str, hue: str, y: str, title: str) -> Figure:
    """y of each layer, from the input to the output, on a logarithmic scale; zeros leave a gap."""
    table, colors = _checked(table, [y], hue, panel, "layer")
    number = table.groupby([panel, hue])["layer"].transform(lambda names: factorize(names)[0] + 1)
    table["layer, from the input"] = number
    table[y] = table[y].where(table[y] > 0)
    panels = table.groupby(panel, sort=False)
    _, axes = _figure(title, 1.6 + 4.2 * len(panels), 3.9, columns=len(panels), sharey=True)
    for axis, (name, rows) in zip(axes, panels):
        _curves(axis, rows, "layer, from the input", y, hue, colors)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        sizes = rows.groupby([hue, "layer"])[y].count()
        _describe(axis, y if axis is axes[0] else "", sizes, f"{name}   ", BAND)
    for axis in axes:  # one scale, but a panel without anything to draw knows no ticks
        _log_ticks(axis.yaxis)
    return _named(axes[-1], colors)


@_styled
def heatmap(table: DataFrame, *, title: str, label: str) -> Figure:
    """A table of numbers as coloured, annotated cells; its index and columns carry their names.

    The colours span 5 units at least, so that differences by chance do not look like findings.
    """
    table = table.replace([np.inf, -np.inf], np.nan)
    low, high = table.min(axis=None), table.max(axis=None)
    more = max(0.0, 5 - (high - low)) / 2
    figure, (axis,) = _figure(title, 2.2 + 0.85 * table.shape[1], 1.3 + 0.5 * table.shape[0])
    cells = {"annot": True, "fmt": ".1f", "linewidths": 0.5, "cbar_kws": {"label": label}}
    cells |= {"vmin": low - more, "vmax": high + more}
    sns.heatmap(table, ax=axis, cmap="viridis", **cells)
    _slant(axis, table.columns)
    axis.invert_yaxis()
    return figure


def _slant(axis, names: Sequence) -> None:
    """Ticks without a line; the names below slanted where longer ones would run into each other."""
    axis.tick_params(length=0, rotation=0)
    if max((len(str(name)) for name in names), default=0) > 7:
        plt.setp(axis.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor")


@_styled
def confusion(matrix, classes: Sequence[str], *, title: str) -> Figure:
    """Images of the row's class taken for the column's; no text for more than 30 classes."""
    matrix = np.asarray(matrix)
    hits, readable = np.eye(len(matrix), dtype=bool), len(matrix) <= 30
    side = min(9.0, max(5.5, 0.48 * len(matrix) + 1.6)) if readable else 9.0
    figure, (axis,) = _figure(title, side + 0.8, side)
    counts = np.where(matrix > 0, matrix.astype(str), "") if readable else None
    cells = {"annot": counts, "fmt": "", "square": True, "linewidths": 0.5 * readable, "ax": axis}
    cells |= dict.fromkeys(["xticklabels", "yticklabels"], list(classes) if readable else False)
    bar = {"label": "images", "shrink": 0.75, "ticks": MaxNLocator(integer=True)}
    sns.heatmap(matrix, mask=hits, cmap="Reds", cbar_kws=bar, **cells)
    sns.heatmap(matrix, mask=~hits, cmap=["0.93"], cbar=False, annot_kws={"color": "0.4"}, **cells)
    axis.set(xlabel="predicted class", ylabel="true class")
    _slant(axis, classes)
    return figure


@_styled
def reliability_diagram(bins: DataFrame, *, hue: str, title: str) -> Figure:
    """Accuracy against confidence, with Wilson's 95 % interval; not if under 10 images.

    bins: of calibration_bins, with hue.
    """
    table, colors = _checked(bins, ["confidence", "accuracy", "images"], hue)
    figure, (axis,) = _figure(title, 7.4, 4.4)
    axis.plot([0, 100], [0, 100], color=GREY, lw=1, ls="--", label="perfectly calibrated")
    for name, rows in table[table["images"] >= 10].groupby(hue, sort=False):
        share, images = rows["accuracy"], rows["images"]
        tests = [binomtest(round(hit), int(of)) for hit, of in zip(share * images, images)]
        ends = np.array([test.proportion_ci(method="wilson") for test in tests]).T
        bars = np.abs(ends - share.to_numpy())
        look = {"fmt": "o-", "ms": 4, "elinewidth": 1, "color": colors[name], "label": name}
        axis.errorbar(100 * rows["confidence"], 100 * share, 100 * bars, **look)
    axis.set(xlabel="confidence (%)", ylabel="accuracy at that confidence (%)")
    axis.set_title("bars: 95 % intervals", loc="left", fontsize=9, color=GREY)
    axis.legend(**BESIDE)
    return figure
