"""An experiment trains, names, remembers, tabulates and publishes the runs of a notebook."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import labutils as lab
from labutils.notebook import experiment

CONFIG = lab.TrainConfig(epochs=1)


def make_model():
    return lab.MLP(64, [8], 10)


def test_start_prints_what_runs_where(capsys):
    lab.start("quick")
    line = capsys.readouterr().out
    assert line.startswith(f"profile quick · labutils {lab.__version__} · torch ")
    assert line.count("\n") == 1
    first = torch.rand(3)
    lab.start("quick")
    assert torch.rand(3).equal(first)


def test_every_seed_is_trained_as_by_hand(trained, data):
    score = trained.score(recipe="ours", model="tiny")
    assert list(score.runs) == [0, 1, 2]
    for seed, run in score.runs.items():
        lab.seed_everything(seed)
        config = lab.TrainConfig(epochs=1, lr=1e-2, seed=seed)
        by_hand = lab.train(make_model(), data, config, track=None)
        assert by_hand.key == run.key
        assert by_hand.best("val_loss") == run.best("val_loss")


def test_labels_name_the_run_and_are_no_part_of_its_key(data):
    ex = lab.Experiment("9.9", data, seeds=[3])
    one = ex.fit(make_model, CONFIG, recipe="ours", distortion=0.5, depth=2)
    other = ex.fit(make_model, CONFIG, recipe="the same again")
    assert one.first.name == "9.9_ours_distortion0.5_depth2_seed3"
    assert one.first.key == other.first.key
    assert other.first.stored


def test_retrain_trains_what_is_stored(data):
    for retrain in (False, True):
        ex = lab.Experiment("9.9", data, seeds=[3], retrain=retrain)
        ex.fit(make_model, CONFIG, model="tiny")
        assert ex.fit(make_model, CONFIG, model="again").first.stored != retrain


def test_the_frame_has_a_row_for_each_run(trained):
    frame = trained.frame
    assert list(frame.recipe) == ["control"] * 3 + ["ours"] * 3
    assert list(frame.seed) == [0, 1, 2] * 2
    run = trained.score(recipe="ours", model="tiny").runs[1]
    row = frame.iloc[4]
    assert row.val_loss == run.best("val_loss")
    assert row["val accuracy (%)"] == 100 * run.best("val_accuracy")
    assert (row.epochs, row.stopped) == (1, "finished all 1 epochs")
    pivot = frame.pivot_table("val_loss", "model", "recipe")
    mean = frame[frame.recipe == "ours"].val_loss.mean()
    assert pivot.loc["tiny", "ours"] == pytest.approx(mean)


def test_a_cell_that_runs_twice_adds_nothing(data):
    ex = lab.Experiment("9.9", data, seeds=[0, 1])
    for _ in range(2):
        ex.fit(make_model, CONFIG, model="tiny")
    assert len(ex.frame) == len(ex.score(model="tiny").runs) == 2


def test_histories_are_long_tables_with_labels(trained):
    table = trained.histories(recipe="ours")
    assert len(table) == 3
    assert set(table.recipe) == {"ours"}
    assert {"seed", "epoch", "train_loss", "val_loss", "val_accuracy"} <= set(table.columns)
    assert len(trained.histories()) == 6
    assert trained.histories(recipe="none").empty


@pytest.mark.parametrize(("labels", "found"), [({"recipe": "none"}, 0), ({"model": "tiny"}, 6)])
def test_labels_of_no_comparison_or_of_several_are_refused(trained, labels, found):
    with pytest.raises(ValueError, match=f"{found} runs of"):
        trained.score(**labels)


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        (3, r"Experiment: seeds = 3\. Input should be a valid list"),
        ([], r"Experiment: seeds = \[\]"),
        ([-1], r"Experiment: seeds\[0\] = -1"),
        ([0, 0], r"Experiment: seeds = \[0, 0\]"),
        (["0"], r"Experiment: seeds\[0\] = '0'"),
        ([[0], [1, 2]], r"Experiment: seeds\[0\] = \[0\]"),
    ],
)
def test_seeds_are_checked_before_anything_trains(data, seeds, message):
    assert lab.Experiment("9.9", data, seeds=np.arange(2)).seeds == [0, 1]
    with pytest.raises(ValueError, match=message):
        lab.Experiment("9.9", data, seeds=seeds)


def test_an_interrupted_training_stops_the_notebook(data, monkeypatch):
    ex = lab.Experiment("9.9", data, seeds=[0])
    stopped = ex.fit(make_model, CONFIG, model="tiny").first
    stopped.info["stop_reason"] = "interrupted"
    monkeypatch.setattr(experiment, "train", lambda *_, **__: stopped)
    with pytest.raises(KeyboardInterrupt, match=r"9\.9_other_seed0 was interrupted.* to go on\."):
        ex.fit(make_model, CONFIG, model="other")
    stopped.model.register_forward_hook(print)  # no key can tell what it computes
    with pytest.raises(KeyboardInterrupt, match=r"Run the cell again to start it anew\."):
        ex.fit(make_model, CONFIG, model="other")
    assert len(ex.frame) == 1


def test_the_results_have_a_row_for_each_score(trained, data):
    score = trained.score(recipe="ours", model="tiny")
    scores = {("ours", "tiny"): score}
    table = trained.results(scores, tta=True, published={"tiny": 69.9}, target={})
    row = table.loc[("ours", "tiny")]
    mean, deviation = score.values().mean(), score.values().std()
    assert row["accuracy (%)"] == repr(score) == f"{mean:.2f}\u00a0±\u00a0{deviation:.2f}"
    assert row["with flip (%)"] == lab.mean_std(score.values(tta=True))
    assert (row["parameters"], row["n"]) == ("610", 3)
    assert row["published (%)"] == "69.9"
    assert row["loss (nats)"] == f"{score.values('loss').mean():.3f}"
    assert "target (%)" not in table
    assert "with flip (%)" not in trained.results(scores)
    assert table.index.names == ["recipe", "model"]


@pytest.mark.parametrize("retrain", [False, True])
def test_a_run_with_other_labels_as_well_is_published_once_with_weights(data, tmp_path, retrain):
    ex = lab.Experiment("9.9", data, seeds=[0], publish=True, retrain=retrain)
    score = ex.fit(make_model, CONFIG, model="tiny")
    again = ex.fit(make_model, CONFIG, part="grid")
    ex.publish(weights=[score.first], figures={})
    stored = {path.name for path in (tmp_path / "models").iterdir()}
    name = f"{again.first.name}-{again.first.key}"
    assert stored == {f"{name}.json", f"{name}.safetensors"}


def test_labels_that_differ_late_are_different_runs(data):
    ex = lab.Experiment("9.9", data, seeds=[0])
    for lr in (0.12345671, 0.12345674):
        ex.fit(make_model, lab.TrainConfig(epochs=1, lr=lr), lr=lr)
    assert len(ex.frame) == 2


def test_labels_that_give_the_same_file_name_are_different_runs(data):
    ex = lab.Experiment("9.9", data, seeds=[0])
    for model in ("a+b", "a b"):
        ex.fit(make_model, CONFIG, model=model, widths=(3, 4), dropout=None)
    assert list(ex.frame.model) == ["a+b", "a b"]
    assert len(ex.score(model="a+b").runs) == 1
    assert {*ex.histories().widths} == {(3, 4)}


def test_a_network_for_two_seeds_is_refused(data):
    network = make_model()
    with pytest.raises(ValueError, match=r"^fit: build gave one network twice"):
        lab.Experiment("9.9", data, seeds=[0, 1]).fit(lambda: network, CONFIG, model="tiny")


def test_a_label_stands_in_place_of_a_column_of_its_name(data):
    ex = lab.Experiment("9.9", data, seeds=[0])
    ex.fit(make_model, CONFIG, epochs=30, lr=0.5)
    assert list(ex.frame.epochs) == list(ex.histories().epochs) == [30]
    assert list(ex.histories().lr) == [0.5]


def test_what_cannot_be_fitted_or_published_is_named(data, tmp_path):
    ex = lab.Experiment("9.9", data, seeds=[0], publish=True)
    with pytest.raises(ValueError, match=r"^fit: every seed needs a network of its own\..*lambda"):
        ex.fit(make_model(), CONFIG, model="tiny")
    with pytest.raises(ValueError, match=r"^fit: every seed needs"):
        ex.fit(make_model, CONFIG, seed=3)
    with pytest.raises(ValueError, match=r"^fit: config = 'ours'"):
        ex.fit(make_model, "ours", model="tiny")
    other = lab.Experiment("9.8", data, seeds=[0]).fit(make_model, CONFIG, model="tiny")
    with pytest.raises(ValueError, match=r"^publish: weights of .* no runs of this experiment"):
        ex.publish(weights=[other.first], figures={})
    assert not (tmp_path / "models").exists()


def test_only_an_experiment_that_publishes_does(data, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(experiment, "images_dir", lambda: tmp_path / "images")
    figure, ax = plt.subplots()
    plt.close(figure)  # another test counts those that are open
    ax.plot([1, 2])
    for publish in (False, True):
        ex = lab.Experiment("9.9", data, seeds=[0, 1], publish=publish)
        score = ex.fit(make_model, CONFIG, model="tiny")
        ex.publish(weights=[score.first], figures={"9.9_line": figure}, half=True)
        cards = sorted(path.name for path in (tmp_path / "models").glob("*.json"))
        assert len(cards) == 2 * publish
    card = json.loads((tmp_path / "models" / cards[0]).read_text())
    exact = f"OMP_NUM_THREADS={card['info']['threads']} python -m labutils run 9.9 --profile full"
    assert card["command"] == f"{exact} -p retrain true"
    weights = list((tmp_path / "models").glob("*.safetensors"))
    assert [path.stem for path in weights] == [f"9.9_tiny_seed0-{score.first.key}"]
    assert {tensor.dtype for tensor in load_file(weights[0]).values()} == {torch.float16}
    first = (tmp_path / "images" / "9.9_line.png").read_bytes()
    ex.publish(weights=[], figures={"9.9_line": figure})
    assert (tmp_path / "images" / "9.9_line.png").read_bytes() == first
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["9.9_line.png"]


def test_a_figure_that_cannot_be_written_leaves_the_old_one(data, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "images_dir", lambda: tmp_path)
    (tmp_path / "old.png").write_bytes(b"old")

    class Broken:
        def savefig(self, file, **_):
            file.write(b"half")
            raise OSError("disk full")

    ex = lab.Experiment("9.9", data, seeds=[0], publish=True)
    with pytest.raises(OSError, match="disk full"):
        ex.publish(weights=[], figures={"old": Broken()})
    assert (tmp_path / "old.png").read_bytes() == b"old"
    assert [path.name for path in tmp_path.glob("*.png")] == ["old.png"]


def test_other_data_is_remembered_with_its_runs(data):
    other = dataclasses.replace(data, name="others")
    ex = lab.Experiment("9.9", data, seeds=[0])
    assert ex.fit(make_model, CONFIG, data=other, model="tiny").data.name == "others"
    assert ex.score(model="tiny").data.name == "others"


def test_what_an_experiment_cannot_use_is_named(data):
    with pytest.raises(ValueError, match=r"^Experiment: exercise = 1\.1"):
        lab.Experiment(1.1, data, seeds=[0])
    with pytest.raises(ValueError, match=r"^Experiment: data = 'digits'"):
        lab.Experiment("1.1", "digits", seeds=[0])
    ex = lab.Experiment("9.9", data, seeds=[0])
    with pytest.raises(ValueError, match="Give build as a function"):
        ex.fit(None, CONFIG)
    with pytest.raises(ValueError, match=r"^results: scores = 'a'\. Input should be a valid tuple"):
        ex.results({"a": None})


def test_every_column_of_the_results_is_what_its_heading_says(trained):
    score = trained.score(recipe="ours", model="tiny")
    found = [run.test(score.data) for run in score.runs.values()]
    row = trained.results({("ours", "tiny"): score}).loc[("ours", "tiny")]

    def mean(values):
        return sum(values) / 3

    assert row["precision (%)"] == f"{100 * mean(each.precision for each in found):.2f}"
    error = mean(each.calibration_error for each in found)
    assert row["calibration error (%)"] == f"{100 * error:.2f}"
    assert row["epochs"] == "1"


def test_the_frame_tells_seconds_and_both_accuracies(trained):
    run, row = trained.score(recipe="ours", model="tiny").runs[1], trained.frame.iloc[4]
    assert row.seconds == run.seconds
    assert row["train accuracy (%)"] == 100 * run.rows[0]["train_accuracy"]
