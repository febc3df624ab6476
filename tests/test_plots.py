"""Figures show the numbers they were given, with names and units, and are shown once."""

import io
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text

from labutils import plots
from labutils.data.sources import CIFAR10_CLASSES


def history(model, seed, losses):
    table = pd.DataFrame({"epoch": range(1, len(losses) + 1), "train_loss": losses})
    table["val_loss"] = table.train_loss + 0.1
    table["train_accuracy"], table["val_accuracy"] = 1 - table.train_loss, 1 - table.val_loss
    return table.assign(model=model, seed=seed)


def results():
    """Long tables, small enough to compute by hand what is drawn."""
    histories = [history("m", 0, [0.5, 0.2]), history("m", 1, [0.4]), history("n", 0, [0.3, 0.1])]
    curves = [("m", 2, "test", 90), ("m", 2, "test", 94), ("m", 40, "test", 10)]
    curves += [("n", 2, "test", 80), ("m", 2, "train", 99), ("m", 2, "train", 97)]
    curves += [("m", 40, "train", 11)]
    dots = [("ours", "a", 89), ("ours", "a", 91), ("theirs", "a", 80), ("theirs", "b", 70)]
    prices = [("a", 50, 2, 89), ("a", 150, 2, 91), ("b", 1e6, 1, 95)]
    norms = {("before", "m"): [1e-9, 0, 1], ("before", "n"): [2, 3], ("after", "m"): [0.1, 1, 1e3]}
    layers = [
        (panel, model, f"block.{2 * i}", value)
        for (panel, model), values in norms.items()
        for i, value in enumerate(values)
    ]
    return {
        "histories": pd.concat(histories),
        "lines": pd.DataFrame(curves, columns=["model", "depth", "split", "accuracy (%)"]),
        "dots": pd.DataFrame(dots, columns=["recipe", "network", "accuracy (%)"]),
        "prices": pd.DataFrame(prices, columns=["model", "parameters", "seconds", "accuracy (%)"]),
        "layers": pd.DataFrame(layers, columns=["when", "model", "layer", "norm"]),
        "bins": pd.DataFrame(
            {"model": "m", "confidence": [0.2, 0.9], "accuracy": [0.5, 0.8], "images": [3, 50]}
        ),
    }


ARGUMENTS = {
    "learning_curves": ("histories", {"hue": "model", "chance": 0.1}),
    "lines": (
        "lines",
        {"x": "depth", "y": "accuracy (%)", "hue": "model", "style": "split", "log_x": True},
    ),
    "dots": (
        "dots",
        {"x": "accuracy (%)", "y": "network", "hue": "recipe", "marks": {"target": {"a": 85.0}}},
    ),
    "against": (
        "prices",
        {"prices": ["parameters", "seconds"], "y": "accuracy (%)", "hue": "model"},
    ),
    "layers": ("layers", {"panel": "when", "hue": "model", "y": "norm"}),
    "reliability_diagram": ("bins", {"hue": "model"}),
}


def draw(name, table=None, **changes):
    """The figure of this name, of its table above or of another."""
    source, arguments = ARGUMENTS[name]
    table = results()[source] if table is None else table
    return getattr(plots, name)(table, title="T", **{**arguments, **changes})


def make_figures():
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 5, 4), dtype=np.uint8)
    cells = pd.DataFrame(
        [[1.0, 2.0], [3.0, 4.0]],
        index=pd.Index([1, 2], name="d"),
        columns=pd.Index([3, 4], name="w"),
    )
    probs = np.full((7, 2), 0.5)
    return {
        "image_grid": plots.image_grid(images, ["a\nb"] * 7, title="T", columns=3),
        "mistakes": plots.mistakes(images, np.arange(7) % 2, probs, ["x", "y"]),
        "explained": plots.explained(images[0], np.eye(images.shape[2]), title="T"),
        "heatmap": plots.heatmap(cells, title="T", label="accuracy (%)"),
        "confusion": plots.confusion(np.array([[5, 2], [0, 7]]), ["x", "y"], title="T"),
        **{name: draw(name) for name in ARGUMENTS},
    }


@pytest.fixture(scope="module")
def figures():
    return make_figures()


def shown(figure):
    """All that is written in it."""
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible()]


def solid(axis):
    return {line.get_label(): line for line in axis.get_lines() if line.get_linestyle() == "-"}


def dotted(axis):
    return [line for line in axis.get_lines() if line.get_linestyle() == ":"]


def bands(axis):
    return [band.get_datalim(axis.transData).get_points() for band in axis.collections]


def test_every_figure_draws_within_ten_inches_and_is_not_left_open(figures):
    assert set(figures) == {name for name in vars(plots) if callable_of_plots(name)}
    for name, figure in figures.items():
        figure.draw_without_rendering()
        assert 6 <= figure.get_size_inches()[0] <= 10
        assert figure.dpi == 110
        assert figure.get_suptitle() == {"mistakes": "The mistakes it is surest of"}.get(name, "T")
    assert plt.get_fignums() == []


def callable_of_plots(name):
    return getattr(getattr(plots, name), "__module__", None) == plots.__name__ and name[0] != "_"


def test_ticks_of_a_logarithmic_axis_are_values_that_do_not_touch():
    table = results()["lines"].iloc[:4].assign(depth=[96, 241, 257, 1908])
    axis = draw("lines", table).axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["96", "241", "1908"]


def test_ticks_of_a_logarithmic_axis_of_fractions_are_round_numbers():
    table = results()["lines"].iloc[:4].assign(depth=[96.4293, 241.07, 257.14, 1908.2])
    figure = draw("lines", table)
    figure.draw_without_rendering()
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert {"100", "200", "500", "1 k"} <= set(labels)


def test_a_logarithmic_axis_without_a_positive_value_has_no_ticks():
    with pytest.warns(UserWarning, match="no positive values"):
        axis = draw("lines", results()["lines"].assign(depth=0)).axes[0]
    assert not axis.get_xticklabels()


@pytest.mark.parametrize("channels", [1, 3])
def test_an_explanation_shows_the_image_the_map_and_both(channels):
    image = np.random.default_rng(0).integers(0, 256, (channels, 5, 7), dtype=np.uint8)
    heat = np.arange(35).reshape(5, 7) / 34
    figure = plots.explained(image, heat, title="T", strength=0.3, pixel=(6, 1))
    left, middle, right, bar = figure.axes
    (first,), (second,) = left.get_images(), middle.get_images()
    below, above = right.get_images()
    for drawn in (first, below):
        assert np.array_equal(np.squeeze(drawn.get_array()), np.squeeze(image.transpose(1, 2, 0)))
    for drawn in (second, above):
        assert np.array_equal(drawn.get_array(), heat)
        assert drawn.get_clim() == (0, 1)
    assert above.get_alpha() == 0.3
    for axis in (left, middle, right):
        assert all(list(zip(*line.get_data())) == [(6, 1)] for line in axis.get_lines())
        assert len(axis.get_lines()) == 2  # white on black, seen on any image
        assert axis.get_xlim() == (-0.5, 6.5)
    assert bar.get_ylabel().startswith("evidence")


def test_a_long_title_is_broken_into_lines():
    title = "Without skips, depth 20 no longer trains, whatever the learning rate is, in four ways"
    figure = plots.heatmap(pd.DataFrame([[1.0]]), title=title, label="")
    figure.draw_without_rendering()
    (text,) = [text for text in figure.findobj(Text) if "Without" in text.get_text()]
    assert text.get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize("name", [*ARGUMENTS, "confusion"])
def test_axes_are_named(figures, name):
    axes = figures[name].axes[0]
    assert axes.get_xlabel()
    assert axes.get_ylabel() or name == "dots"


@pytest.mark.parametrize(
    ("name", "expected", "groups"),
    [
        (
            "learning_curves",
            f"val —   train ···   {plots.BAND}, n = 1 (hollow) to 2",
            ["model", "epoch"],
        ),
        (
            "lines",
            f"test —   train ···   {plots.BAND}, n = 1 (hollow) to 2",
            ["model", "depth", "split"],
        ),
        ("dots", "mean ± deviation, n = 1 (hollow) to 2", ["recipe", "network"]),
        ("against", "mean ± deviation, n = 1 (hollow) to 2", ["model"]),
    ],
)
def test_a_figure_says_of_how_many_measurements_it_is(figures, name, expected, groups):
    assert figures[name].axes[0].get_title(loc="left") == expected
    single = results()[ARGUMENTS[name][0]].drop_duplicates(groups)
    for spread in ("mean ± deviation, ", f"{plots.BAND}, "):
        expected = expected.replace(spread, "")
    expected = expected.replace(" (hollow) to 2", "")
    assert draw(name, single).axes[0].get_title(loc="left") == expected


def test_learning_curves_show_the_mean_over_seeds_also_where_one_stopped_early(figures):
    loss, accuracy = figures["learning_curves"].axes
    np.testing.assert_allclose(solid(loss)["m"].get_xydata(), [[1, 0.55], [2, 0.3]])
    np.testing.assert_allclose(bands(loss)[0], [[1, 0.3], [2, 0.6]])
    np.testing.assert_allclose(solid(accuracy)["m"].get_ydata(), [0.45, 0.7])
    assert "60" in shown(figures["learning_curves"])
    np.testing.assert_allclose(dotted(loss)[0].get_ydata(), [0.45, 0.2])
    assert len(bands(loss)) == 2  # none around the training loss


def test_the_confusion_matrix_prints_its_counts_and_leaves_zeros_blank(figures):
    axis = figures["confusion"].axes[0]
    cells = {text.get_position(): text.get_text() for text in axis.texts if text.get_text()}
    assert cells == {(0.5, 0.5): "5", (1.5, 0.5): "2", (1.5, 1.5): "7"}  # a true class a row
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")
    assert axis.yaxis_inverted()


def test_a_heatmap_prints_its_numbers_to_a_tenth(figures):
    axis = figures["heatmap"].axes[0]
    cells = {text.get_position(): text.get_text() for text in axis.texts}
    assert cells == {(0.5, 0.5): "1.0", (1.5, 0.5): "2.0", (0.5, 1.5): "3.0", (1.5, 1.5): "4.0"}
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("w", "d")


def test_reliability_leaves_out_bins_that_say_nothing(figures):
    [drawn] = figures["reliability_diagram"].axes[0].containers
    np.testing.assert_allclose(drawn.lines[0].get_xydata(), [[90, 80]])
    [[(_, low), (_, high)]] = drawn.lines[2][0].get_segments()
    for end in low / 100, high / 100:  # Wilson 1927: the shares that 40 of 50 would just not refute
        assert abs(end - 0.8) / (end * (1 - end) / 50) ** 0.5 == pytest.approx(1.96, rel=1e-3)


def test_a_known_name_has_its_colour_whatever_stands_beside_it():
    residual, first, second = (plots.PALETTE[i] for i in (plots.COLORS["residual"], 0, 2))
    table = results()["lines"].replace({"model": {"m": "residual", "n": "other"}})
    for order in (table, table[::-1]):
        found = solid(draw("lines", order, style=None).axes[0])
        assert found["residual"].get_color() == residual
        assert found["other"].get_color() == first
    more = table.assign(model=[f"other{i}" if i else "residual" for i in range(len(table))])
    found = solid(draw("lines", more, style=None).axes[0])
    assert found["other2"].get_color() == second  # not that of residual, which would be next


def test_chance_far_below_does_not_press_the_curves_together():
    far, near = (draw("learning_curves", chance=share).axes[1] for share in (0.1, 0.5))
    assert far.get_ylim() == near.get_ylim() == draw("learning_curves").axes[1].get_ylim()
    assert far.get_ylim()[0] > 0.1
    lines = [line for line in near.get_lines() if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in lines] == [[0.5, 0.5]]
    assert "chance" in [text.get_text() for text in near.texts]


def test_small_differences_are_small_on_the_scale_of_a_heatmap():
    [drawn] = plots.heatmap(pd.DataFrame([[88.0, 89.0]]), title="T", label="%").axes[0].collections
    assert drawn.get_clim() == (86.0, 91.0)
    [drawn] = plots.heatmap(pd.DataFrame([[10.0, 90.0]]), title="T", label="%").axes[0].collections
    assert drawn.get_clim() == (10.0, 90.0)


def test_dots_stand_at_the_means_with_deviations_and_categories_in_order(figures):
    axis = figures["dots"].axes[0]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["a", "b"]
    ours, theirs = axis.containers
    np.testing.assert_allclose(ours.lines[0].get_xdata(orig=False), [90.0, np.nan])
    np.testing.assert_allclose(theirs.lines[0].get_xdata(orig=False), [80.0, 70.0])
    bar = ours.lines[2][0].get_segments()[0]
    np.testing.assert_allclose(bar[:, 0], [90 - 2**0.5, 90 + 2**0.5])
    assert [line.get_label() for line in axis.get_lines()][:1] == ["target"]
    np.testing.assert_allclose(axis.get_lines()[0].get_xdata(), [85.0, np.nan])


def test_dots_of_rows_with_one_hue_each_stand_on_the_line_of_their_label():
    rows = [("ours", "a", 90.0), ("ours", "a", 92.0), ("theirs", "b", 70.0)]
    table = pd.DataFrame(rows, columns=["recipe", "network", "accuracy (%)"])
    ours, theirs = draw("dots", table).axes[0].containers
    heights = [points.lines[0].get_ydata(orig=False) for points in (ours, theirs)]
    assert [list(height) for height in heights] == [[0, 1], [0, 1]]


def test_marks_of_categories_that_the_table_lacks_are_left_out():
    marks = {"published": {"c": 1.0}, "target": {"b": 2.0, "c": 3.0}}
    axis = draw("dots", marks=marks).axes[0]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["a", "b"]
    np.testing.assert_allclose(axis.get_lines()[1].get_xdata(), [np.nan, 2.0])


def test_marks_of_categories_that_are_numbers_stand_at_them():
    table = pd.DataFrame({"recipe": ["ours"] * 2, "network": [3, 10], "accuracy (%)": [80.0, 90.0]})
    axis = draw("dots", table, marks={"published": {3: 5.0, 10: 6.0}}).axes[0]
    np.testing.assert_allclose(axis.get_lines()[0].get_xdata(), [5.0, 6.0])


@pytest.mark.parametrize("name", ["lines", "dots", "against"])
def test_measurements_that_are_not_there_are_not_counted(name):
    table = pd.concat([results()[ARGUMENTS[name][0]]] * 2, ignore_index=True)
    y = "accuracy (%)"
    table.loc[len(table) // 2 :, y] = np.nan
    title = draw(name, table).axes[0].get_title(loc="left")
    assert title.endswith("n = 1 (hollow) to 2")


def test_images_without_a_caption_are_an_error():
    images = np.zeros((3, 1, 2, 2), np.uint8)
    with pytest.raises(ValueError, match="shorter"):
        plots.image_grid(images, ["a", "b"], title="t")


def test_marks_that_nobody_has_are_not_in_the_legend():
    axis = draw("dots", marks={"published": {}, "target": {"a": 1.0}}).axes[0]
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["target", "ours", "theirs"]


def test_lines_go_through_the_means_with_a_tick_at_every_x(figures):
    axis = figures["lines"].axes[0]
    np.testing.assert_allclose(solid(axis)["m"].get_xydata(), [[2, 92.0], [40, 10.0]])
    np.testing.assert_allclose(solid(axis)["n"].get_xydata(), [[2, 80.0]])
    np.testing.assert_allclose(bands(axis)[0], [[2, 10.0], [40, 94.0]])
    (train,) = dotted(axis)
    np.testing.assert_allclose(train.get_ydata(), [98.0, 11.0])
    assert train.get_color() == solid(axis)["m"].get_color()
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["2", "40"]


def names_in(axis):
    return {text.get_text(): text for text in axis.texts if text.get_text() != "chance"}


@pytest.mark.parametrize("name", ["learning_curves", "lines", "layers", "against"])
def test_all_hues_are_named_in_the_last_panel_though_one_of_them_is_not_in_it(figures, name):
    axis = figures[name].axes[-1]
    names, known = names_in(axis), results()[ARGUMENTS[name][0]].model.unique()
    assert set(names) == set(known)
    for other, place in zip(known, (0, 2)):
        assert names[other].get_color() == plots.PALETTE[place]


def test_a_name_stands_at_the_end_of_its_line():
    figure = draw("lines", style=None)
    figure.draw_without_rendering()
    (axis,) = figure.axes
    for name, line in solid(axis).items():
        end = axis.transData.transform(line.get_xydata()[-1])
        box = names_in(axis)[name].get_window_extent()
        assert 0 < box.x0 - end[0] < 15
        assert box.y0 < end[1] < box.y1


@given(ends=st.lists(st.integers(0, 100), min_size=2, max_size=8))
@settings(max_examples=25)
def test_names_do_not_lie_over_each_other_and_stay_in_the_order_of_their_ends(ends):
    rows = [(f"m{i}", x, y) for i, y in enumerate(ends) for x, y in ((1, 50), (2, y))]
    table = pd.DataFrame(rows, columns=["model", "depth", "accuracy (%)"])
    figure = draw("lines", table, style=None)
    figure.draw_without_rendering()
    (axis,) = figure.axes
    boxes = {name: text.get_window_extent() for name, text in names_in(axis).items()}
    order = sorted(range(len(ends)), key=lambda i: boxes[f"m{i}"].y0)
    assert [ends[i] for i in order] == sorted(ends)
    for below, above in pairwise(order):
        assert boxes[f"m{below}"].y1 <= boxes[f"m{above}"].y0 + 1
    assert boxes[f"m{order[-1]}"].y1 < figure.bbox.height


def hollow(axis):
    lines = [line for line in axis.get_lines() if line.get_markerfacecolor() == "white"]
    return [tuple(point) for line in lines for point in line.get_xydata()]


def test_a_point_of_a_single_run_is_hollow_where_others_have_more(figures):
    assert sorted(hollow(figures["lines"].axes[0])) == [(2, 80), (40, 10), (40, 11)]
    assert [x for x, _ in hollow(figures["dots"].axes[0])] == [80, 70]
    assert [hollow(axis) for axis in figures["against"].axes] == [[(1e6, 95)], [(1, 95)]]
    alone = results()["lines"].drop_duplicates(["model", "depth", "split"])
    assert hollow(draw("lines", alone).axes[0]) == []


def test_errors_may_have_a_logarithmic_axis():
    assert draw("lines", log_y=True).axes[0].get_yscale() == "log"
    assert draw("dots", log_x=True).axes[0].get_xscale() == "log"
    table = results()["lines"].replace({"accuracy (%)": {10: 0}})  # nothing wrong at all
    axis = draw("lines", table, log_y=True).axes[0]
    np.testing.assert_allclose(solid(axis)["m"].get_ydata(), [92, np.nan])
    assert names_in(axis)["m"].get_color() == solid(axis)["m"].get_color()
    assert draw("lines").axes[0].get_yscale() == draw("dots").axes[0].get_xscale() == "linear"


@pytest.mark.parametrize("kind", ["lines", "dots"])
def test_a_caption_counts_what_is_drawn_and_names_only_hollow_points_that_are(kind):
    value = {"x": [1, 1, 2, 2, 2], "y": [4.0, 5.0, 4.0, 5.0, 6.0], "who": "a", "row": list("aabbb")}
    options = {"hue": "who", "title": "t"}
    options |= {"x": "x", "y": "y"} if kind == "lines" else {"x": "y", "y": "row"}
    draw_it = getattr(plots, kind)
    table = pd.DataFrame(value)
    assert draw_it(table, **options).axes[0].get_title("left").endswith("n = 2 to 3")
    table.loc[:1, "y"] = np.nan
    assert draw_it(table, **options).axes[0].get_title("left").endswith("n = 3")


def test_results_stand_at_each_mean_price_in_one_colour_a_model(figures):
    wide, narrow = figures["against"].axes
    first, second = (
        {line.get_label(): line for line in axis.get_lines() if line.get_marker() == "o"}
        for axis in (wide, narrow)
    )
    assert first["a"].get_xydata().tolist() == [[100.0, 90.0]]
    assert first["b"].get_xydata().tolist() == [[1e6, 95.0]]
    assert {name: dot.get_xdata()[0] for name, dot in second.items()} == {"a": 2.0, "b": 1.0}
    for name in "ab":
        assert first[name].get_color() == second[name].get_color()
    bar, _ = wide.containers[0].lines[2][0].get_segments()  # that of a single run has no length
    np.testing.assert_allclose(bar[:, 1], [90 - 2**0.5, 90 + 2**0.5])
    assert wide.get_ylim() == narrow.get_ylim()


def test_prices_are_short_and_there_are_enough_of_them(figures):
    figures["against"].draw_without_rendering()
    wide, narrow = (
        [tick.get_text() for tick in axis.get_xticklabels()] for axis in figures["against"].axes
    )
    assert {"100", "10 k", "1 M"} <= set(wide)
    assert {"1", "2"} <= set(narrow)


@pytest.mark.parametrize("low", [0.9, 2.1, 9.5])
@pytest.mark.parametrize(
    "times", [1.0, 1.26, 1.6, 2.0, 3.3, 8.0, 15.0, 33.0, 120.0, 900.0, 1e4, 1e7]
)
def test_a_logarithmic_axis_has_enough_ticks_to_read_it_and_not_too_many(low, times):
    table = pd.DataFrame({"model": ["a", "b"], "price": [low, low * times], "y": [1.0, 2.0]})
    axis = plots.against(table, prices=["price"], y="y", hue="model", title="").axes[0]
    low, high = axis.get_xlim()
    seen = [tick for tick in axis.get_xticks() if low <= tick <= high]
    assert 2 <= len(seen) <= 8


def test_long_class_names_below_a_confusion_matrix_do_not_overlap():
    figure = plots.confusion(np.eye(10, dtype=int), CIFAR10_CLASSES, title="")
    figure.draw_without_rendering()
    labels = figure.axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == CIFAR10_CLASSES
    assert {label.get_rotation() for label in labels} == {40.0}
    short = plots.confusion(np.eye(2, dtype=int), ["cat", "dog"], title="")
    assert {label.get_rotation() for label in short.axes[0].get_xticklabels()} == {0.0}


@pytest.mark.parametrize("count", [18, 30])
def test_a_confusion_matrix_is_no_taller_than_wide(count):
    figure = plots.confusion(np.eye(count, dtype=int), ["x"] * count, title="")
    assert figure.get_figheight() <= figure.get_figwidth() <= 10


def test_long_column_names_below_a_heatmap_do_not_overlap():
    table = pd.DataFrame([[1.0] * 6], columns=[f"a name of twenty-two {i}" for i in range(6)])
    figure = plots.heatmap(table, title="", label="")
    labels = figure.axes[0].get_xticklabels()
    assert {label.get_rotation() for label in labels} == {40}


def test_a_heatmap_leaves_out_what_is_not_finite():
    table = pd.DataFrame([[10.0, np.inf], [90.0, -np.inf]])
    [drawn] = plots.heatmap(table, title="", label="").axes[0].collections
    assert drawn.get_clim() == (10, 90)


def test_fifteen_names_have_fifteen_colours():
    table = pd.DataFrame({"x": 1.0, "y": 2.0, "hue": [f"network {i}" for i in range(15)]})
    figure = plots.lines(table, x="x", y="y", hue="hue", title="")
    colours = {line.get_color() for line in figure.axes[0].lines}
    assert len(colours) == 15


def test_a_confusion_matrix_of_many_classes_has_neither_numbers_nor_names():
    matrix = np.random.default_rng(0).integers(0, 9, (100, 100))
    names = [f"class {number}" for number in range(100)]
    axis = plots.confusion(matrix, names, title="").axes[0]
    assert not [*axis.texts, *axis.get_xticklabels(), *axis.get_yticklabels()]


def test_layers_share_a_scale_and_leave_a_gap_where_nothing_arrives(figures):
    first, second = figures["layers"].axes
    np.testing.assert_allclose(solid(first)["m"].get_xydata(), [[1, 1e-9], [2, np.nan], [3, 1.0]])
    np.testing.assert_allclose(solid(first)["n"].get_xydata(), [[1, 2.0], [2, 3.0]])
    low, high = first.get_ylim()
    assert (low, high) == second.get_ylim()
    assert low <= 1e-9
    assert high >= 1e3
    titles = [axis.get_title(loc="left") for axis in (first, second)]
    assert titles == ["before   n = 1", "after   n = 1"]
    assert "1e-9" in [label.get_text() for label in first.get_yticklabels()]


def test_layers_where_nothing_arrives_at_all_leave_the_scale_of_the_others():
    table = results()["layers"]
    table.loc[table["when"] == "before", "norm"] = 0.0
    first, second = draw("layers", table).axes
    assert (first.get_yscale(), second.get_yscale()) == ("log", "log")
    assert first.get_title(loc="left") == "before   " + f"{plots.BAND}, n = 0"


def case(kind):
    """Ten images, five of them taken for something else with growing confidence."""
    images = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 2), np.uint8)
    labels, preds = np.zeros(10, dtype=np.int64), np.arange(10) % 2 * (1 + np.arange(10) % 3 // 2)
    probs = np.full((10, 3), 0.0)
    probs[np.arange(10), preds] = 0.5 + np.arange(10) / 20
    return [kind(array) for array in (images, labels, probs)], preds


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_the_surest_mistakes_come_first(kind):
    arrays, preds = case(kind)
    figure = plots.mistakes(*arrays, ["cat", "dog", "$x$"], count=3)
    drawn = [axis for axis in figure.axes if axis.images]
    assert [int(axis.images[0].get_array().mean()) for axis in drawn] == [9, 7, 5]
    names = ["cat", "dog", "$x$"]
    expected = [f"{names[preds[i]]}?\nno, cat\n{50 + 5 * i} % sure" for i in (9, 7, 5)]
    assert [axis.get_title() for axis in drawn] == expected


def test_a_network_without_mistakes_gets_a_figure_that_says_so():
    images, _, probs = case(np.asarray)[0]
    figure = plots.mistakes(images, probs.argmax(axis=1), probs, ["cat", "dog", "bird"])
    assert "No mistake among 10 images." in shown(figure)
    assert not [axis for axis in figure.axes if axis.images]


NAMES = ["$x$", "$\\frac$", "a_b^c $ 5"]  # the second is a formula that matplotlib cannot read


def test_names_are_drawn_to_the_letter_though_they_look_like_formulas():
    table = results()
    figures = [
        plots.image_grid(np.zeros((3, 1, 2, 2), np.uint8), NAMES, title=NAMES[1]),
        plots.confusion(np.eye(3, dtype=int), NAMES, title=NAMES[1]),
        plots.heatmap(pd.DataFrame([[1.0] * 3], columns=NAMES, index=["$y$"]), title="", label="$"),
    ]
    for name, (source, arguments) in ARGUMENTS.items():
        labels = [arguments[key] for key in ("hue", "y", "panel") if key in arguments]
        renamed = table[source].copy()
        for column in labels:
            if not pd.api.types.is_numeric_dtype(renamed[column]):
                known = dict(zip(renamed[column].unique(), NAMES))
                renamed[column] = renamed[column].map(known)
        marks = {"marks": {NAMES[2]: {NAMES[0]: 1.0}}} if name == "dots" else {}
        figures.append(draw(name, renamed, **marks))
    for figure in figures:
        texts = shown(figure)  # a formula that cannot be read would raise here
        assert NAMES[0] in texts
        for text in figure.findobj(Text):
            if "$" in text.get_text():
                assert not text.get_parse_math()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_missing_an_empty_and_an_unnamed_column_are_named(name):
    table, hue = results()[ARGUMENTS[name][0]], ARGUMENTS[name][1]["hue"]
    unnamed = table.assign(**{hue: table[hue].where(table[hue] != table[hue].iloc[0])})
    for bad in (table.drop(columns=hue), unnamed, table.head(0)):
        column = hue if len(bad) else ".*"
        with pytest.raises(ValueError, match=rf"'{column}' is missing, .*rows without a name\. Th"):
            draw(name, bad)


@pytest.mark.parametrize(
    ("share", "value"), [("some", np.inf), ("some", np.nan), ("all", np.nan), ("all", 0.0)]
)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_numbers_that_cannot_be_drawn_do_not_end_a_notebook(name, share, value):
    table = results()[ARGUMENTS[name][0]]
    for column in table.columns.difference(["epoch", "depth", "seed", "layer"]):
        if pd.api.types.is_numeric_dtype(table[column]):
            table[column] = table[column].astype(float)
            table.iloc[slice(1 if share == "some" else None), table.columns.get_loc(column)] = value
    draw(name, table).draw_without_rendering()


def test_the_house_style_stays_inside_the_figures():
    before = dict(plt.rcParams)
    make_figures()
    assert dict(plt.rcParams) == before


def test_the_same_numbers_give_the_same_file():
    files = [io.BytesIO(), io.BytesIO()]
    for file in files:
        draw("lines").savefig(file, metadata={"Software": None})
    assert files[0].getvalue() == files[1].getvalue()


def test_maps_are_laid_over_their_images():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), np.uint8)
    maps = np.stack([np.eye(4, 5), np.ones((4, 5))])
    figure = plots.image_grid(images, ["a", "b"], title="T", columns=2, maps=maps)
    for axis, image, expected in zip(figure.axes, images, maps):
        below, above = axis.images
        np.testing.assert_array_equal(np.moveaxis(below.get_array(), 2, 0), image)
        np.testing.assert_array_equal(above.get_array(), expected)
        assert (above.get_alpha(), above.get_clim()) == (0.5, (0, 1))
    plt.close(figure)
