"""Set-up line, scores and claims of a notebook."""

import copy
import statistics

import pytest

import labutils as lab


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABUTILS_RUNS", str(tmp_path_factory.mktemp("runs")))
        data = lab.load_data("digits", device="cpu")
        found = []
        for seed in (0, 1, 2):
            lab.seed_everything(seed)
            config = lab.TrainConfig(epochs=1, seed=seed)
            found.append(lab.train(lab.MLP(64, [8], 10), data, config, name=f"m{seed}", track=None))
        yield data, found


def test_start_prints_what_runs_where(capsys):
    lab.start({"profile": "quick", "epochs": 3}, profile=str, epochs=int)
    line = capsys.readouterr().out
    assert line.startswith(f"profile quick · labutils {lab.__version__} · torch ")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("3", int, r"epochs = '3'"),
        (3.0, int, r"epochs = 3\.0"),
        (True, int, r"epochs = True"),
        ("(0, 1)", list[int], r"epochs = '\(0, 1\)'"),
        ([0, "1"], list[int], r"epochs\[1\] = '1'"),
        ("True", bool, r"epochs = 'True'"),
    ],
)
def test_start_names_a_parameter_of_the_wrong_type_and_what_to_do(value, kind, message):
    with pytest.raises(ValueError, match=rf"parameter: {message}.*\n.*parameters cell"):
        lab.start({"profile": "quick", "epochs": value}, profile=str, epochs=kind)


def test_numbers_are_shown_as_their_mean_and_the_deviation_of_a_sample():
    assert lab.mean_std([1.0, 2.0, 6.0]) == "3.00\u00a0±\u00a02.65"  # the root of (4 + 1 + 9) / 2
    assert lab.mean_std([1.234]) == "1.23"
    assert lab.mean_std([]) == "–"


def test_a_score_is_the_mean_and_deviation_over_seeds(runs):
    data, found = runs
    score = lab.Score(found, data)
    accuracies = [100 * lab.evaluate(run.model, data.test).accuracy for run in found]
    assert score.mean() == pytest.approx(statistics.fmean(accuracies))
    assert score.std() == pytest.approx(statistics.stdev(accuracies))
    assert score.text() == f"{score.mean():.2f}\u00a0±\u00a0{score.std():.2f}"
    single = lab.Score(found[:1], data)
    assert single.std() == 0.0
    assert single.text() == f"{single.mean():.2f}"
    losses = [lab.evaluate(run.model, data.test).loss for run in found]
    assert score.mean("loss") == pytest.approx(statistics.fmean(losses))
    assert score.mean("epochs") == 1


def test_the_results_table_has_a_row_a_model_with_its_numbers(runs):
    data, found = runs
    score = lab.Score(found, data)
    table = lab.results({("ours", "tiny"): score, ("published", "tiny"): score})
    assert list(table.index) == [("ours", "tiny"), ("published", "tiny")]
    shown = table.loc[("ours", "tiny")]
    assert shown["accuracy (%)"].split() == [f"{score.mean():.2f}", "±", f"{score.std():.2f}"]
    assert shown["parameters"] == "610"
    assert shown["seeds"] == 3


def test_test_time_flip_is_a_column_of_its_own(runs):
    data, found = runs
    score = lab.Score(found, data)
    flipped = [100 * lab.evaluate(run.model, data.test, tta=True).accuracy for run in found]
    expected = f"{statistics.fmean(flipped):.2f}\u00a0±\u00a0{statistics.stdev(flipped):.2f}"
    for tta in (True, False):
        table = lab.results({("ours", "tiny"): score}, tta=tta)
        assert ("test-time flip (%)" in table) == tta
    table = lab.results({("ours", "tiny"): score}, tta=True)
    assert table.loc[("ours", "tiny"), "test-time flip (%)"] == expected
    assert table.loc[("ours", "tiny"), "accuracy (%)"] != expected


def test_references_are_columns_of_the_table(runs):
    data, found = runs
    table = lab.results({("ours", "tiny"): lab.Score(found, data)}, published={"tiny": 69.9})
    assert table.loc[("ours", "tiny"), "published (%)"] == 69.9


def test_an_interrupted_run_is_no_result(runs):
    data, found = runs
    stopped = copy.copy(found[0])
    stopped.info = {**found[0].info, "stop_reason": "interrupted"}
    with pytest.raises(lab.RunError, match="m0 interrupted"):
        lab.Score([stopped, found[1]], data).mean()
