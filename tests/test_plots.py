"""Figures show the numbers they were given, with names and units, and are shown once."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from labutils import plots
from labutils.data.sources import CIFAR10_CLASSES


def history(values):
    epochs = pd.RangeIndex(1, len(values) + 1, name="epoch")
    frame = pd.DataFrame({"train_loss": values, "val_loss": np.array(values) + 0.1}, index=epochs)
    frame["train_accuracy"], frame["val_accuracy"] = 1 - frame.train_loss, 1 - frame.val_loss
    return frame


def make_figures():
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 5, 4), dtype=np.uint8)
    table = pd.DataFrame(
        [[1.0, 2.0], [3.0, 4.0]],
        index=pd.Index([1, 2], name="d"),
        columns=pd.Index([3, 4], name="w"),
    )
    bins = {"confidence": [0.2, 0.9], "accuracy": [0.5, 0.9], "images": [3, 50]}
    return {
        "image_grid": plots.image_grid(images, ["a\nb"] * 7, title="T", columns=3),
        "learning_curves": plots.learning_curves(
            {"m": [history([0.5, 0.2]), history([0.4])]}, title="T", chance=0.1
        ),
        "heatmap": plots.heatmap(table, title="T", label="accuracy (%)"),
        "confusion": plots.confusion(np.array([[5, 2], [0, 7]]), ["x", "y"], title="T"),
        "reliability": plots.reliability({"m": bins}, title="T"),
        "dots": plots.dots(
            {"ours": {"a": (90.0, 1.0)}, "theirs": {"a": (80.0, 2.0), "b": (70.0, 0.0)}},
            marks={"target": {"a": 85.0}},
            title="T",
            label="accuracy (%)",
        ),
        "lines": plots.lines(
            {"m": {2: [90.0, 94.0], 40: [10.0]}, "n": {2: [80.0]}},
            {"m": {2: [99.0, 97.0], 40: [11.0]}},
            title="T",
            x="depth",
            y="accuracy (%)",
            log_x=True,
        ),
        "against": plots.against(
            {"parameters": {"a": 100.0, "b": 1e6}, "seconds": {"a": 2.0, "b": 1.0}},
            {"a": (90.0, 1.0), "b": (95.0, 0.0)},
            title="T",
            y="accuracy (%)",
        ),
        "layers": plots.layers(
            {"before": {"m": [1e-9, 0.0, 1.0]}, "after": {"m": [0.1, 1.0, 1e3]}},
            title="T",
            y="norm",
        ),
    }


@pytest.fixture(scope="module")
def figures():
    return make_figures()


def test_every_figure_draws_within_ten_inches_and_is_not_left_open(figures):
    for figure in figures.values():
        figure.canvas.draw()
        assert 6 <= figure.get_size_inches()[0] <= 10
        assert figure.get_suptitle() == "T"
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    "name", ["learning_curves", "reliability", "dots", "confusion", "lines", "layers", "against"]
)
def test_axes_are_named(figures, name):
    axes = figures[name].axes[0]
    assert axes.get_xlabel()
    assert axes.get_ylabel() or name == "dots"


def test_learning_curves_show_the_mean_over_seeds_also_where_one_stopped_early(figures):
    loss = figures["learning_curves"].axes[0]
    val = next(line for line in loss.get_lines() if line.get_linestyle() == "-")
    np.testing.assert_allclose(val.get_xydata(), [[1, 0.55], [2, 0.3]])
    (band,) = (patch.get_datalim(loss.transData) for patch in loss.collections)
    np.testing.assert_allclose(band.get_points(), [[1, 0.3], [2, 0.6]])
    accuracy = figures["learning_curves"].axes[1]
    val = next(line for line in accuracy.get_lines() if line.get_linestyle() == "-")
    np.testing.assert_allclose(val.get_ydata(), [45.0, 70.0])


def test_the_confusion_matrix_prints_its_counts_and_leaves_zeros_blank(figures):
    shown = sorted(text.get_text() for text in figures["confusion"].axes[0].texts)
    assert [text for text in shown if text] == ["2", "5", "7"]


def test_reliability_leaves_out_bins_that_say_nothing(figures):
    line = figures["reliability"].axes[0].get_lines()[-1]
    np.testing.assert_allclose(line.get_xdata(), [0.9])


def test_dots_stand_at_the_means_with_models_in_order(figures):
    axis = figures["dots"].axes[0]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["a", "b"]
    means = [container.lines[0].get_xdata().tolist() for container in axis.containers]
    assert means == [[90.0], [80.0, 70.0]]


def test_dots_of_a_model_have_the_colour_that_its_curves_have():
    shown = plots.dots({"a": {"cat": (90.0, 1.0)}}, title="T", label="x", colors=[2])
    (container,) = shown.axes[0].containers
    assert container.lines[0].get_color() == plots.PALETTE[2]


def test_lines_go_through_the_means_with_a_tick_at_every_place(figures):
    axis = figures["lines"].axes[0]
    found = {(line.get_linestyle(), line.get_label()): line for line in axis.get_lines()}
    np.testing.assert_allclose(found["-", "m"].get_xydata(), [[2, 92.0], [40, 10.0]])
    np.testing.assert_allclose(found["-", "n"].get_xydata(), [[2, 80.0]])
    band = axis.collections[0].get_datalim(axis.transData)
    np.testing.assert_allclose(band.get_points(), [[2, 10.0], [40, 94.0]])
    dotted = next(line for line in axis.get_lines() if line.get_linestyle() == ":")
    np.testing.assert_allclose(dotted.get_ydata(), [98.0, 11.0])
    assert dotted.get_color() == found["-", "m"].get_color()
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["2", "40"]


def test_results_stand_at_each_price_in_one_colour_a_model(figures):
    found = [
        {bar.get_label(): (*bar.lines[0].get_xydata()[0], bar.lines[0].get_color()) for bar in bars}
        for bars in (axis.containers for axis in figures["against"].axes)
    ]
    assert {name: place[:2] for name, place in found[0].items()} == {
        "a": (100.0, 90.0),
        "b": (1e6, 95.0),
    }
    assert {name: place[0] for name, place in found[1].items()} == {"a": 2.0, "b": 1.0}
    for name in "ab":
        assert found[0][name][2] == found[1][name][2]
    first, second = figures["against"].axes
    assert first.get_ylim() == second.get_ylim()


def test_prices_are_short_and_there_are_enough_of_them(figures):
    figures["against"].canvas.draw()
    wide, narrow = (
        [tick.get_text() for tick in axis.get_xticklabels()] for axis in figures["against"].axes
    )
    assert {"100", "10 k", "1 M"} <= set(wide)
    assert {"1", "2"} <= set(narrow)


def test_long_class_names_below_a_confusion_matrix_do_not_overlap():
    figure = plots.confusion(np.eye(10, dtype=int), CIFAR10_CLASSES, title="")
    figure.canvas.draw()
    labels = figure.axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == CIFAR10_CLASSES
    assert {label.get_rotation() for label in labels} == {40.0}
    short = plots.confusion(np.eye(2, dtype=int), ["cat", "dog"], title="")
    assert {label.get_rotation() for label in short.axes[0].get_xticklabels()} == {0.0}


def test_a_confusion_matrix_of_many_classes_has_neither_numbers_nor_names():
    matrix = np.random.default_rng(0).integers(0, 9, (100, 100))
    names = [f"class {number}" for number in range(100)]
    axis = plots.confusion(matrix, names, title="").axes[0]
    assert not [*axis.texts, *axis.get_xticklabels(), *axis.get_yticklabels()]


@pytest.mark.parametrize("highest", [1.0, 2.0, 3.3, 8.0, 15.0, 33.0, 120.0, 900.0, 1e4, 1e7])
def test_a_logarithmic_axis_has_enough_ticks_to_read_it_and_not_too_many(highest):
    prices = {"price": {"a": 0.9, "b": 0.9 * highest}}
    figure = plots.against(prices, {"a": (1.0, 0.0), "b": (2.0, 0.0)}, title="", y="")
    (axis,) = figure.axes
    low, high = axis.get_xlim()
    seen = [tick for tick in axis.get_xticks() if low <= tick <= high]
    assert 2 <= len(seen) <= 8


def test_layers_share_a_scale_and_leave_a_gap_where_nothing_arrives(figures):
    first, second = figures["layers"].axes
    np.testing.assert_allclose(first.get_lines()[0].get_ydata(), [1e-9, np.nan, 1.0])
    low, high = first.get_ylim()
    assert (low, high) == second.get_ylim()
    assert low <= 1e-9
    assert high >= 1e3
    assert [axis.get_title(loc="left") for axis in (first, second)] == ["before", "after"]


def test_the_house_style_stays_inside_the_figures():
    before = dict(plt.rcParams)
    make_figures()
    assert dict(plt.rcParams) == before


def test_the_same_numbers_give_the_same_file(tmp_path):
    for name in ("a.png", "b.png"):
        plots.save(make_figures()["heatmap"], tmp_path / "new" / name)
    assert (tmp_path / "new" / "a.png").read_bytes() == (tmp_path / "new" / "b.png").read_bytes()
