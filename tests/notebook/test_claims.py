"""Verdicts against scipy's tests, and claims that travel with the notebook that makes them."""

import dataclasses
import math
import statistics
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

import labutils as lab
from labutils.base import device
from labutils.notebook.claims import MEDIA_TYPE

IMAGES = SimpleNamespace(images=torch.zeros(1), labels=torch.zeros(1))


class Fixed(lab.Score):
    """A score of given numbers and given hits."""

    def __init__(self, numbers, hits=None):
        numbers = pd.Series(numbers, dtype=float)
        object.__setattr__(self, "numbers", numbers)
        right = None if hits is None else torch.tensor(hits)
        run = SimpleNamespace(test=lambda data: SimpleNamespace(right=right))
        super().__init__(dict.fromkeys(numbers.index, run), SimpleNamespace(test=IMAGES))

    def values(self, what="accuracy", *, tta=False):
        return self.numbers


def verdict(method, *args, **kwargs):
    claims = lab.Claims("9.9")
    getattr(claims, method)("a claim", *args, **kwargs)
    return claims.rows["a claim"]["verdict"]


accuracies = st.lists(st.floats(10, 100), min_size=3, max_size=6)


@given(accuracies, accuracies, st.sampled_from([0.0, 1.0, 3.0]))
def test_scores_of_several_seeds_are_compared_by_the_paired_t_test(one, other, by):
    n = min(len(one), len(other))
    one, other = pd.Series(one[:n]), pd.Series(other[:n])
    assume((one - other).std() > 1e-6)
    interval = stats.ttest_1samp(one - other, 0).confidence_interval(0.95)
    assume(min(abs(interval.low - by), abs(interval.high - by)) > 1e-6)
    expected = "holds" if interval.low > by else "fails" if interval.high < by else "not settled"
    assert verdict("above", one, other, by=by) == expected
    assert verdict("below", other, one, by=by) == expected


@pytest.mark.parametrize("method", ["above", "below"])
def test_the_evidence_has_the_two_sides_in_the_order_of_the_claim(method):
    claims = lab.Claims("9.9")
    getattr(claims, method)("a claim", pd.Series([1.0, 2.0, 3.0]), pd.Series([9.0, 8.0, 9.0]))
    assert claims.rows["a claim"]["evidence"].startswith(
        "2.00\u00a0±\u00a01.00 against 8.67\u00a0±\u00a00.58 points: by -6.67"
    )


@given(accuracies, accuracies)
def test_close_means_that_the_whole_interval_is_within(one, other):
    n = min(len(one), len(other))
    one, other = pd.Series(one[:n]), pd.Series(other[:n])
    assume((one - other).std() > 1e-6)
    low, high = stats.ttest_1samp(one - other, 0).confidence_interval(0.95)
    expected = "holds" if low > -5 and high < 5 else "not settled"
    expected = "fails" if low > 5 or high < -5 else expected
    assert verdict("close", one, other, within=5) == expected


def slow_mcnemar(one, other):
    """Two-sided exact p: how often fair coins fall at least as unevenly."""
    b = sum(x and not y for x, y in zip(one, other))
    c = sum(y and not x for x, y in zip(one, other))
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    return b - c, min(1.0, 2 * tail)


hits = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80)


@given(hits)
def test_one_seed_or_two_are_settled_by_mcnemars_exact_test(pairs):
    one, other = zip(*pairs)
    lead, p = slow_mcnemar(one, other)
    expected = "not settled" if p >= 0.05 else "holds" if lead > 0 else "fails"
    for seeds in ([0], [0, 1]):
        scores = [Fixed(pd.Series(50.0, index=seeds), side) for side in (one, other)]
        assert verdict("above", *scores) == expected


def test_the_evidence_is_that_of_the_seeds_that_both_have():
    claims = lab.Claims("9.9")
    one, other = [10.0, 20.0, 30.0, 99.0, 99.0], [9.0, 19.0, 32.0]
    claims.above("three", pd.Series(one), pd.Series(other))
    claims.above("one", Fixed({0: 60.0, 1: 99.0}, [True] * 60), Fixed({0: 55.0}, [True] * 60))
    low, high = stats.ttest_1samp([1, 1, -2], 0).confidence_interval(0.95)
    assert claims.rows["three"]["evidence"] == (
        "20.00\u00a0±\u00a010.00 against 20.00\u00a0±\u00a011.53 points: by 0.00 points, "
        f"95 % interval {low:.2f} to {high:.2f} points, n = 3"
    )
    assert claims.rows["one"]["evidence"].startswith("60.00 against 55.00 points: by 0.00 points")


def test_twenty_seeds_are_no_images():
    seeds = pd.Series(range(20), dtype=float).rename_axis("seed")
    claims = lab.Claims("9.9")
    claims.above("seeds", seeds + 1, seeds)
    assert claims.rows["seeds"]["evidence"].startswith("10.50\u00a0±\u00a05.92 against 9.50")
    assert claims.rows["seeds"]["evidence"].endswith("n = 20")


def test_the_deviation_of_images_is_not_shown_as_that_of_their_mean():
    claims, hits = lab.Claims("9.9"), pd.Series([0.0, 100.0, 100.0, 100.0] * 300)
    more = pd.concat([hits, pd.Series([0.0] * 900, index=range(1200, 2100))])  # of no pair
    claims.above("images", more, 0.5 * hits)
    low, high = stats.ttest_1samp(0.5 * hits, 0).confidence_interval(0.95)
    assert claims.rows["images"]["evidence"] == (
        "75.00 against 37.50 points: by 37.50 points, "
        f"95 % interval {low:.2f} to {high:.2f} points, over 1,200 images"
    )


def test_numbers_without_spread_have_an_interval_too_and_no_negative_zero():
    claims, three = lab.Claims("9.9"), pd.Series([5.0, 5.0, 5.0])
    claims.close("alike", three, three + 1e-9, within=1)
    assert claims.rows["alike"]["evidence"].endswith(
        "by 0.00 points, 95 % interval 0.00 to 0.00 points, n = 3"  # in the words of the others
    )


def test_the_evidence_of_one_seed_is_the_lead_with_its_interval():
    one, other = [True] * 60 + [False] * 40, [False] * 20 + [True] * 55 + [False] * 25
    claims = lab.Claims("9.9")  # 20 images are alone right, and 15: 5 of 100 ahead
    claims.above("ahead", Fixed({0: 60.0}, one), Fixed({0: 55.0}, other))
    half = 1.96 * math.sqrt(35 - 5**2 / 100)  # of the lead of two shares of the same images
    assert claims.rows["ahead"]["evidence"] == (
        f"60.00 against 55.00 points: by 5.00 points, 95 % interval {5 - half:.2f} to "
        f"{5 + half:.2f} points, for one seed, over 100 images"
    )


def test_one_seed_without_answers_or_of_a_difference_is_not_settled_and_says_why():
    claims = lab.Claims("9.9")
    claims.above("no answers", Fixed({0: 90.0}), Fixed({0: 10.0}))
    claims.above("a difference", pd.Series({0: 5.0}), pd.Series({0: 1.0}))
    claims.above("no seed in common", Fixed({0: 90.0}), Fixed({1: 10.0}))
    assert {row["verdict"] for row in claims.rows.values()} == {"not settled"}
    assert "no answers" in claims.rows["no answers"]["evidence"]
    assert "n\u00a0=\u00a01" in claims.rows["a difference"]["evidence"]


def test_mcnemars_test_is_of_a_seed_that_both_have_and_of_the_same_images(data):
    ex = lab.Experiment("9.9", data, seeds=[0, 1])
    options = {"epochs": 1, "lr": 1e-2}

    def build():
        return lab.MLP(64, [8], 10)

    both = ex.fit(build, lab.TrainConfig(**options), model="both")
    second = ex.fit(build, lab.TrainConfig(**options), model="second", seeds=[1])
    assert verdict("close", both, second, within=1) == "holds"  # the very same run
    order = torch.randperm(len(data.test.labels))
    test = dataclasses.replace(data.test, images=data.test.images[order])
    for other in (test, dataclasses.replace(test, images=test.images[:9], labels=test.labels[:9])):
        claims = lab.Claims("9.9")
        its_data = dataclasses.replace(data, test=other)
        its_score = ex.fit(build, lab.TrainConfig(**options), data=its_data, model="other")
        claims.above("other images", both, its_score)
        [row] = claims.rows.values()
        assert row["verdict"] == "not settled"
        assert row["evidence"].endswith("not of the same test images")


def test_a_few_images_that_tell_nobody_apart_do_not_show_that_nothing_does():
    assert verdict("close", Fixed({0: 1}, [True] * 10), Fixed({0: 1}, [True] * 10), within=5) == (
        "not settled"
    )
    many = [True] * 10_000
    assert verdict("close", Fixed({0: 1}, many), Fixed({0: 1}, many), within=1) == "holds"


def test_a_score_has_numbers_that_are_known_and_of_the_stored_weights(data):
    ex = lab.Experiment("9.9", data, seeds=[0])
    score = ex.fit(lambda: lab.MLP(64, [8], 10), lab.TrainConfig(epochs=1), model="tiny")
    for what in ("n", "per_class", "lr", "acuracy"):
        with pytest.raises(ValueError, match=f"^values: what = '{what}'"):
            score.values(what)
    with torch.no_grad():
        list(score.first.model.parameters())[-1].add_(torch.arange(10.0))
    hits = score.logits.argmax(dim=1) == data.test.labels
    assert 100 * hits.double().mean().item() == score.values()[0]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_logits_are_computed_as_the_run_was_trained(data, precision, monkeypatch):
    monkeypatch.setattr(device, "_computes_bf16", lambda device: True)  # emulated where it is not
    ex = lab.Experiment("9.9", data, seeds=[0])
    config = lab.TrainConfig(epochs=1, precision=precision)
    score = ex.fit(lambda: lab.MLP(64, [8], 10), config, precision=precision)
    model, images = score.first.model.eval(), data.test.normalise(data.test.images)
    with torch.inference_mode():
        exact = model(images)
    assert torch.equal(score.logits, exact) == (precision == "float32")
    torch.testing.assert_close(score.logits, exact, rtol=0.05, atol=0.05)


def test_seeds_are_paired_by_their_number_not_their_place():
    one, other = pd.Series({0: 1.0, 1: 50.0, 2: 9.0}), pd.Series({2: 8.0, 1: 49.0, 0: 0.1})
    assert verdict("above", one, other) == "holds"
    assert (Fixed(one) - Fixed(other)).to_dict() == pytest.approx({0: 0.9, 1: 1.0, 2: 1.0})


def test_claims_show_what_is_new_and_report_all():
    claims = lab.Claims("1.1", headline="fine")
    claims.add("1 < 2", True, "1 & 2")
    claims.add("<b> is bold", False, "3")
    first = claims._repr_mimebundle_()
    assert first["text/plain"].splitlines() == [
        "holds: 1 < 2 (1 & 2)",
        "fails: <b> is bold (3)",
    ]
    assert "&lt;b&gt; is bold" in first["text/html"]
    claims.add("who knows", None, "4")
    claims.add("1 < 2", True, "a cell that ran twice")
    second = claims._repr_mimebundle_()
    assert second["text/plain"].splitlines() == [
        "not settled: who knows (4)",
        "holds: 1 < 2 (a cell that ran twice)",
    ]
    reported = second[MEDIA_TYPE]
    assert [row["verdict"] for row in reported["rows"]] == ["holds", "fails", "not settled"]
    assert (reported["exercise"], reported["headline"]) == ("1.1", "fine")
    third = claims._repr_mimebundle_()
    assert (third["text/plain"], third.get("text/html")) == ("", None)  # not an empty table


def test_targets_are_claimed_and_every_score_becomes_a_row(trained):
    claims, score = lab.Claims("9.9"), trained.score(recipe="ours", model="tiny")
    claims.targets({"tiny": score}, published={"tiny": 1.0}, target={"tiny": 99.9})
    claims.targets({"aside": score}, headline=False)
    assert claims.rows["tiny reaches 99.9 %"]["verdict"] == "fails"
    reported = claims._repr_mimebundle_()[MEDIA_TYPE]["headline_rows"]
    row, aside = reported
    # Not rounded: a deviation of 0.23505 would become 0.235, and be shown as 0.23 in the table.
    assert (row["mean"], row["std"]) == (score.values().mean(), score.values().std())
    assert (row["n"], row["dataset"], row["params"]) == (3, "digits", 610)
    assert (row["published"], row["target"], row["headline"]) == (1.0, 99.9, True)
    assert row["values"] == [*score.values()]
    assert row["seconds"] == round(score.values("seconds").mean(), 1)
    assert row["device"] == score.first.info["device"]
    assert (aside["model"], aside["target"], aside["headline"]) == ("aside", None, False)


def test_what_no_run_is_becomes_a_row_like_a_score(trained, data):
    score = trained.score(recipe="ours", model="tiny")
    compared = {"published": 1.0, "target": 99.9}
    claims, others = lab.Claims("9.9"), lab.Claims("9.9")
    claims.targets({"svm": score}, **{name: {"svm": goal} for name, goal in compared.items()})
    cost = {"params": 610, "seconds": score.values("seconds").mean()}
    cost["device"] = score.first.info["device"]
    others.record("svm", score.values(), data, **compared, **cost)
    assert others._repr_mimebundle_() == claims._repr_mimebundle_()
    others.record("alone", pd.Series([56.4]), data, target=56.4, params=1, seconds=0.04)
    row = others.headline_rows["alone"]
    assert (row["seconds"], row["device"]) == (0.0, score.first.info["device"])  # trained here
    assert (row["mean"], row["std"], row["n"], row["published"]) == (56.4, 0.0, 1, None)
    reached = {"claim": "alone reaches 56.4 %", "evidence": f"{lab.mean_std([56.4])} %"}
    assert others.rows["alone reaches 56.4 %"] == reached | {"verdict": "holds"}


def test_numbers_are_shown_as_their_mean_and_the_deviation_of_a_sample():
    assert lab.mean_std([1.0, 2.0, 6.0]) == "3.00\u00a0±\u00a02.65"  # the root of (4 + 1 + 9) / 2
    assert lab.mean_std([1.234]) == "1.23\u00a0(n\u00a0=\u00a01)"
    assert lab.mean_std([]) == lab.mean_std([float("nan")]) == "–"


def test_a_score_measures_each_seed(trained, data):
    score = trained.score(recipe="ours", model="tiny")
    measured = [lab.evaluate(run.model, data.test) for run in score.runs.values()]
    assert list(score.values()) == pytest.approx([100 * found.accuracy for found in measured])
    assert list(score.values("loss")) == pytest.approx([found.loss for found in measured])
    flipped = [lab.evaluate(run.model, data.test, tta=True) for run in score.runs.values()]
    expected = [100 * found.accuracy for found in flipped]
    assert list(score.values(tta=True)) == pytest.approx(expected)
    best = [run.best("val_accuracy") for run in score.runs.values()]
    assert list(score.values("val_accuracy")) == pytest.approx([100 * value for value in best])
    assert list(score.values("epochs")) == [1, 1, 1]
    right = [run.test(data).right for run in score.runs.values()]
    assert right[0].equal(score.logits.argmax(dim=1) == data.test.labels)
    for hits, found in zip(right, measured, strict=True):
        assert hits.double().mean().item() == found.accuracy


def test_the_long_table_has_a_row_for_each_run_and_split(trained):
    scores = {(r, "tiny"): trained.score(recipe=r, model="tiny") for r in ("control", "ours")}
    table = lab.tabulate(scores, ["recipe", "model"])
    assert len(table) == 2 * 3 * 2
    means = table.groupby(["split", "recipe"])["accuracy (%)"].mean()
    ours = scores["ours", "tiny"]
    assert means["test", "ours"] == pytest.approx(statistics.fmean(ours.values()))
    assert means["train", "ours"] == pytest.approx(ours.values("train_accuracy").mean())
    assert list(lab.tabulate({3: ours}, ["width"]).width.unique()) == [3]
    assert list(lab.tabulate({("a", (3, 4)): ours}, ["a", "widths"]).widths.unique()) == [(3, 4)]


def test_what_is_no_score_is_named():
    claims = lab.Claims("9.9")
    with pytest.raises(ValueError, match=r"Score or a Series by seed: second = 2\.0"):
        claims.above("c", pd.Series([1.0]), 2.0)
    with pytest.raises(ValueError, match=r"^targets: scores = 3\. .* Score"):
        claims.targets({"a": 3})
    with pytest.raises(ValueError, match=r"^tabulate: key = \('a', 'b'\), names = \['recipe'\]"):
        lab.tabulate({("a", "b"): None}, ["recipe"])
    for name in ("split", "seed"):
        with pytest.raises(ValueError, match=rf"^tabulate: names = \['{name}'\], but {name} is a"):
            lab.tabulate({"a": None}, [name])
    with pytest.raises(ValueError, match=r"^tabulate: scores are empty"):
        lab.tabulate({}, ["recipe"])
    assert not claims.rows


@pytest.mark.parametrize(("only", "others", "n"), [(30, 10, 100), (60, 20, 1000), (9, 0, 9000)])
def test_one_seed_has_the_interval_of_the_mean_of_paired_differences(only, others, n):
    both = n - only - others
    one = [True] * only + [False] * others + [True] * both
    other = [False] * only + [True] * others + [True] * both
    apart = 100 * pd.Series([int(a) - int(b) for a, b in zip(one, other)])
    half = 1.96 * apart.std(ddof=0) / math.sqrt(n)
    scores = Fixed({0: 90.0}, one), Fixed({0: 80.0}, other)
    low, high = apart.mean() - half, apart.mean() + half
    assert verdict("above", *scores, by=low - 1e-6) == "holds"
    for by in (low + 1e-6, high - 1e-6):
        assert verdict("above", *scores, by=by) == "not settled"
    assert verdict("above", *scores, by=high + 1e-6) == "fails"


def test_a_target_that_is_met_exactly_is_reached(trained, monkeypatch):
    score = trained.score(recipe="ours", model="tiny")
    monkeypatch.setattr(lab.Score, "values", lambda *_: pd.Series([100 * 0.564]))
    claims = lab.Claims("9.9")
    claims.targets({"tiny": score}, target={"tiny": 56.4})  # 100 * 0.564 is 56.39999999999999
    assert claims.rows["tiny reaches 56.4 %"]["verdict"] == "holds"


def test_a_target_is_reached_by_the_mean_and_exactly_is_enough(trained):
    score = trained.score(recipe="ours", model="tiny")
    mean, best = score.values().mean(), score.values().max()
    assert mean < best
    for goal, expected in ((mean, "holds"), (best, "fails")):
        claims = lab.Claims("9.9")
        claims.targets({"tiny": score}, target={"tiny": goal})
        assert [row["verdict"] for row in claims.rows.values()] == [expected]


def test_a_number_of_the_history_is_that_of_the_best_epoch_and_seconds_are_seconds(trained, data):
    run = trained.score(recipe="ours", model="tiny").first
    worse = run.rows[0] | {"epoch": 2, "val_loss": 9.0}
    score = lab.Score({0: dataclasses.replace(run, rows=[*run.rows, worse])}, data)
    assert list(score.values("val_loss")) == [run.rows[0]["val_loss"]]
    assert list(score.values("seconds")) == [run.seconds]


def test_two_numbers_of_one_seed_are_refused():
    twice = pd.Series([1.0, 2.0, 3.0], index=[0, 0, 1])
    with pytest.raises(ValueError, match=r"^Claims: a seed has several numbers"):
        lab.Claims("9.9").above("a claim", twice, twice - 1)
