"""Scores against scikit-learn, closed forms and slow loops."""

import dataclasses
import json
import math
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

import labutils as lab
from labutils.base import device
from labutils.evaluation.metrics import loss_and_accuracy, metrics_from_logits


def random_case(seed, n=200, num_classes=10, scale=3.0, absent=()):
    """Logits and labels that agree more often than by chance; some classes never are labels."""
    rng = torch.Generator().manual_seed(seed)
    allowed = torch.tensor([c for c in range(num_classes) if c not in absent])
    labels = allowed[torch.randint(len(allowed), (n,), generator=rng)]
    logits = torch.randn(n, num_classes, generator=rng) * scale
    logits[torch.arange(n), labels] += scale
    return logits, labels


def confidences(logits, labels):
    probs = np.exp(logits.double().numpy())
    probs /= probs.sum(axis=1, keepdims=True)
    return probs.max(axis=1), probs.argmax(axis=1) == labels.numpy()


def slow_bins(logits, labels, bins=15):
    """(images, mean confidence, accuracy) of each non-empty bin, image by image."""
    sums = {}
    for confidence, hit in zip(*confidences(logits, labels)):
        place = min(int(confidence * bins), bins - 1)
        n, total, hits = sums.get(place, (0, 0.0, 0))
        sums[place] = n + 1, total + confidence, hits + hit
    return [(n, total / n, hits / n) for _, (n, total, hits) in sorted(sums.items())]


CASES = {
    "many classes": {"n": 300, "num_classes": 10},
    "two classes": {"num_classes": 2},
    "absent classes": {"num_classes": 8, "absent": (0, 5, 7)},
    "one label": {"num_classes": 4, "absent": (0, 1, 3)},
    "few images": {"n": 3, "num_classes": 6},
    "unsure": {"scale": 0.01},
    "very sure": {"scale": 30.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_every_field_agrees_with_scikit_learn(case, seed):
    logits, labels = random_case(seed, **CASES[case])
    n, num_classes = logits.shape
    classes, preds, truth = list(range(num_classes)), logits.argmax(1).numpy(), labels.numpy()
    found = metrics_from_logits(logits, labels, top_k=2)
    log_probs = logits.double().log_softmax(1).numpy()
    confusion = sk.confusion_matrix(truth, preds, labels=classes)
    averaged = sk.precision_recall_fscore_support(
        truth, preds, labels=classes, average="weighted", zero_division=0
    )
    top_2 = np.mean([y in np.argsort(row)[-2:] for row, y in zip(logits.numpy(), truth)])
    gaps = [n_bin / n * abs(sure - right) for n_bin, sure, right in slow_bins(logits, labels)]
    assert found.n == n
    assert found.loss == pytest.approx(-log_probs[range(n), truth].mean(), rel=1e-5)
    assert found.accuracy == sk.accuracy_score(truth, preds)
    assert found.top_k_accuracy == pytest.approx(top_2)
    assert (found.precision, found.recall, found.f1) == pytest.approx(averaged[:3], abs=1e-6)
    assert found.calibration_error == pytest.approx(sum(gaps), abs=1e-5)
    assert found.confusion == confusion.tolist()
    assert found.right.tolist() == (preds == truth).tolist()
    support = np.maximum(confusion.sum(axis=1), 1)
    assert found.per_class == pytest.approx(confusion.diagonal() / support)


@pytest.mark.parametrize("top_k", [1, 3, 5, 9])
def test_loss_and_top_k_agree_with_scikit_learn_where_all_classes_occur(top_k):
    logits, labels = random_case(1, n=400, num_classes=10)
    found = metrics_from_logits(logits, labels, top_k=top_k)
    probs = logits.double().softmax(1).numpy()
    assert found.loss == pytest.approx(sk.log_loss(labels, probs), rel=1e-5)
    assert found.top_k == top_k
    assert metrics_from_logits(logits, labels).top_k == 5
    assert found.top_k_accuracy == pytest.approx(sk.top_k_accuracy_score(labels, probs, k=top_k))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 400), st.integers(1, 400))
def test_the_interval_is_wilsons(hits, misses):
    n, z = hits + misses, 1.959963984540054
    labels = torch.zeros(n, dtype=torch.int64)
    logits = torch.zeros(n, 2)
    logits[:hits, 0], logits[hits:, 1] = 1.0, 1.0
    p = hits / n
    middle, denominator = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = max(0, (middle - half) / denominator), min(1, (middle + half) / denominator)
    assert metrics_from_logits(logits, labels).accuracy_interval == pytest.approx(
        expected, abs=1e-9
    )


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(2, 6), st.integers(1, 6))
def test_ties_are_broken_alike_everywhere(data, num_classes, top_k):
    row = st.lists(st.integers(0, 2), min_size=num_classes, max_size=num_classes)
    # Logits so close that softmax makes some of them equal.
    logits = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=8))) * 7.5e-9 + 0.1
    labels = torch.tensor([data.draw(st.integers(0, num_classes - 1)) for _ in logits])
    found = metrics_from_logits(logits, labels, top_k=top_k)
    assert found.accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert found.top_k_accuracy >= found.accuracy - 1e-6
    if top_k == 1:
        assert found.top_k_accuracy == pytest.approx(found.accuracy)


def test_full_confidence_is_in_the_last_bin_for_calibration_too():
    logits, labels = torch.tensor([[100.0, 0.0], [3.0, 0.0]]), torch.tensor([1, 0])
    sure = 1 / (1 + math.exp(-3))
    expected = abs((1 + sure) / 2 - 0.5)
    assert metrics_from_logits(logits, labels).calibration_error == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize("case", CASES)
def test_calibration_bins_agree_with_a_slow_loop(case):
    logits, labels = random_case(5, **CASES[case])
    bins = lab.calibration_bins(logits, labels)
    images, confidence, accuracy = zip(*slow_bins(logits, labels))
    assert list(bins.columns) == ["confidence", "accuracy", "images"]
    assert list(bins.images) == list(images)
    assert list(bins.confidence) == pytest.approx(confidence, abs=1e-5)
    assert list(bins.accuracy) == pytest.approx(accuracy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_calibration_bins_take_logits_of_any_precision(dtype):
    logits, labels = torch.tensor([[5.0, 0.0], [8.0, 0.0], [100.0, 0.0]]), torch.tensor([0, 1, 0])
    found = lab.calibration_bins(logits.to(dtype), labels)
    pd.testing.assert_frame_equal(found, lab.calibration_bins(logits, labels))


@pytest.mark.parametrize("case", [*CASES, "as many as CIFAR-10 has, all sure"])
@pytest.mark.parametrize("seed", range(3))
def test_the_calibration_error_is_that_of_torchmetrics_which_the_cards_hold(case, seed):
    logits, labels = random_case(seed, **CASES.get(case, {"n": 10_000, "scale": 6.0}))
    # torchmetrics counts confidences of exactly 1 in a bin of their own.
    probs = logits.softmax(dim=1).clamp(max=1 - 2**-24)
    expected = multiclass_calibration_error(probs, labels, logits.shape[1], n_bins=15).item()
    found = metrics_from_logits(logits, labels).calibration_error
    assert found == pytest.approx(expected, abs=1e-6, rel=0)


def test_logits_that_are_no_numbers_do_not_pass_for_calibrated():
    logits = torch.full((4, 3), math.nan)
    bins = lab.calibration_bins(logits, torch.tensor([0, 1, 2, 0]))
    assert list(bins.images) == [4]
    assert bins.confidence.isna().all()


def test_a_perfect_classifier():
    labels = torch.arange(40) % 4
    found = metrics_from_logits(100.0 * nn.functional.one_hot(labels), labels)
    ones = (found.accuracy, found.top_k_accuracy, found.precision, found.recall, found.f1)
    assert ones == (1.0,) * 5
    assert found.per_class == [1.0] * 4
    assert (found.loss, found.calibration_error) == pytest.approx((0, 0), abs=1e-6)
    assert 0.9 < found.accuracy_interval[0] < found.accuracy_interval[1] == 1
    assert found.confusion == (10 * np.eye(4, dtype=int)).tolist()


def test_a_constant_classifier():
    labels = torch.arange(40) % 4
    shares = torch.tensor([0.1, 0.2, 0.4, 0.3])
    found = metrics_from_logits(shares.log().expand(40, 4), labels, top_k=2)
    assert (found.accuracy, found.top_k_accuracy, found.recall) == (0.25, 0.5, 0.25)
    assert found.precision == pytest.approx(0.25**2)
    assert found.f1 == pytest.approx(0.25 * 0.4)
    assert found.per_class == [0, 0, 1, 0]
    assert found.calibration_error == pytest.approx(0.15, abs=1e-5)
    assert found.loss == pytest.approx(-shares.log().mean().item())


@pytest.mark.parametrize("case", CASES)
def test_metrics_survive_json(case):
    found = metrics_from_logits(*random_case(2, **CASES[case]))
    again = lab.Metrics(**json.loads(json.dumps(found.values(), allow_nan=False)))
    assert again == found
    older = dataclasses.replace(again, hits="")  # the card of an earlier version
    assert older.right is None
    assert "hits" not in older.values()


@pytest.fixture
def model(digits):
    torch.manual_seed(0)
    return lab.MLP(digits.num_features, [16], digits.num_classes, dropout=0.5, batch_norm=True)


def test_what_cannot_be_evaluated_is_named(model, digits):
    with pytest.raises(ValueError, match=r"^evaluate: split = .*instance of Split"):
        lab.evaluate(model, digits)
    with pytest.raises(ValueError, match=r"^evaluate: model = 3\. .*instance of Module"):
        lab.evaluate(3, digits.test)
    with pytest.raises(ValueError, match=r"^evaluate: batch_size = 0\."):
        lab.evaluate(model, digits.test, batch_size=0)


def test_batch_size_does_not_matter(model, digits):
    whole = lab.evaluate(model, digits.test)
    for batch_size in (1, 7, len(digits.test)):
        found = lab.evaluate(model, digits.test, batch_size=batch_size)
        assert found.confusion == whole.confusion
        assert found.loss == pytest.approx(whole.loss, rel=1e-5)
        assert found.calibration_error == pytest.approx(whole.calibration_error, abs=1e-4)


def test_evaluation_uses_and_then_keeps_the_modes_and_leaves_no_gradient(model, digits):
    for training in (True, False):
        model.train(training)
        # As a frozen batch norm in a network that trains.
        model[2].train(not training)
        before = [part.training for part in model.modules()]
        state = {name: value.clone() for name, value in model.state_dict().items()}
        lab.evaluate(model, digits.test)
        assert [part.training for part in model.modules()] == before
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not lab.predict(model, digits.test).requires_grad
    # Dropout was off, or two passes would differ.
    assert torch.equal(lab.predict(model, digits.test), lab.predict(model, digits.test))


def test_the_modes_are_kept_when_the_model_fails(digits):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5).eval(), nn.Linear(3, 10))
    with pytest.raises(RuntimeError):
        lab.evaluate(model, digits.test)
    assert [part.training for part in model] == [True, False, True]


def test_loss_and_accuracy_are_those_of_evaluate(model, digits):
    found = lab.evaluate(model, digits.val)
    expected = (found.loss, found.accuracy)
    assert loss_and_accuracy(model, digits.val) == pytest.approx(expected, rel=1e-6)


def test_predictions_are_the_models_logits(model, digits):
    split = digits.test
    logits = lab.predict(model, split, batch_size=50)
    with torch.no_grad():
        assert torch.allclose(logits, model.eval()(split.normalise(split.images)), atol=1e-5)
    assert logits.dtype == torch.float32


def test_a_gradient_can_start_from_predictions(model, digits):
    temperature = torch.ones(1, requires_grad=True)
    loss = F.cross_entropy(lab.predict(model, digits.val) / temperature, digits.val.labels)
    loss.backward()  # as temperature scaling does, Guo et al. 2017
    assert temperature.grad.isfinite().all()


def test_a_model_without_parameters_is_scored_too(digits):
    class Brightest(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :10]

    assert lab.evaluate(Brightest(), digits.test).n == len(digits.test)


def test_an_empty_split_is_refused(model, digits):
    empty = lab.Split(digits.test.images[:0], digits.test.labels[:0], (0.5,), (0.5,))
    with pytest.raises(ValueError, match=r"split is empty.*at least one image"):
        lab.evaluate(model, empty)


@pytest.mark.parametrize(
    ("reshape", "shape"),
    [
        (lambda logits: logits[:, :, None], r"\[64, 10, 1\]"),
        (lambda logits: logits[:, 0], r"\[64\]"),
        (lambda logits: logits.reshape(-1, 5), r"\[128, 5\]"),
        (lambda logits: logits.mean(0, keepdim=True), r"\[1, 10\]"),
    ],
)
def test_outputs_that_are_no_logits_are_refused_with_their_shape(digits, reshape, shape):
    class Reshaped(lab.MLP):
        def forward(self, images):
            return reshape(super().forward(images))

    with pytest.raises(ValueError, match=rf"shape {shape}.*\[N, num_classes\]"):
        lab.predict(Reshaped(digits.num_features, [], 10), digits.test, batch_size=64)


@pytest.mark.parametrize("tta", [False, True])
def test_outputs_that_are_no_tensor_are_refused_with_their_kind(digits, tta):
    class Two(lab.MLP):
        def forward(self, images):
            return super().forward(images), images

    with pytest.raises(ValueError, match=r"returned tuple, not \[N, num_classes\]"):
        lab.predict(Two(digits.num_features, [], 10), digits.test, tta=tta)


def zeros(*shape):
    labels = torch.zeros(shape[0], dtype=torch.int64)
    return lab.Split(torch.zeros(shape, dtype=torch.uint8), labels, (0.5,) * 3, (0.5,) * 3)


def test_large_images_are_scored_in_small_batches(model):
    sizes, split = [], zeros(5, 3, 800, 800)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    network.register_forward_hook(lambda _, images, __: sizes.append(len(images[0])))
    lab.predict(network, split)
    assert sizes == [2, 2, 1]


def test_what_a_network_keeps_from_being_scored_serves_training(digits):
    class Lazy(lab.MLP):
        scale = None

        def forward(self, images):
            if self.scale is None:
                self.scale = torch.full((1, 10), 2.0)
            return super().forward(images) * self.scale

    network = Lazy(digits.num_features, [], 10)
    lab.evaluate(network, digits.val)
    images, labels = next(digits.train.batches(8))
    F.cross_entropy(network(images), labels).backward()


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_without_a_logit_is_refused(model, digits, label):
    labels = digits.test.labels.clone()
    labels[3] = label
    with pytest.raises(ValueError, match=f"label {label} with 10 logits"):
        lab.evaluate(model, dataclasses.replace(digits.test, labels=labels))


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (torch.zeros(4), "labels torch.float32 [4]"),
        (torch.zeros(3, dtype=torch.int64), "labels torch.int64 [3]"),
        (torch.zeros(4, 1, dtype=torch.int64), "labels torch.int64 [4, 1]"),
    ],
)
def test_labels_of_another_form_are_refused_with_it(labels, found):
    with pytest.raises(ValueError, match=re.escape(f"logits [4, 2] and {found}. Give ")):
        metrics_from_logits(torch.zeros(4, 2), labels)
    with pytest.raises(ValueError, match=r"logits \[4\] and "):
        metrics_from_logits(torch.zeros(4), torch.zeros(4, dtype=torch.int64))


def test_too_few_outputs_are_refused(digits):
    with pytest.raises(ValueError, match=r"label 9 with 4 logits.*one output for each class"):
        lab.evaluate(lab.MLP(digits.num_features, [], 4), digits.test)


def test_scoring_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics_from_logits(*random_case(0, **CASES["one label"]))


def test_test_time_flip_is_the_mean_of_two_passes(digits):
    torch.manual_seed(0)
    model, split = lab.SimpleCNN(digits.image_shape, 10), digits.test
    mirrored = lab.Split(split.images.flip(-1), split.labels, split.mean, split.std)
    plain, mirror = lab.predict(model, split), lab.predict(model, mirrored)
    both = lab.predict(model, split, tta=True)
    torch.testing.assert_close(both, (plain + mirror) / 2)
    assert not torch.equal(plain, both)
    torch.testing.assert_close(lab.predict(model, mirrored, tta=True), both)
    assert lab.evaluate(model, split, tta=True) == metrics_from_logits(both, split.labels)


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_bf16_is_used_where_it_is_computed(digits, monkeypatch, precision):
    torch.manual_seed(0)
    model, dtypes = lab.SimpleCNN(digits.image_shape, 10), []
    model.register_forward_hook(lambda *args: dtypes.append(args[-1].dtype))
    plain = lab.predict(model, digits.test)
    for there in (True, False):
        monkeypatch.setattr(device, "_computes_bf16", lambda device, there=there: there)
        logits = lab.predict(model, digits.test, precision=precision)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, plain, rtol=0.05, atol=0.05)
        assert torch.equal(logits, plain) != there
    monkeypatch.setattr(device, "_computes_bf16", lambda device: True)
    assert torch.equal(lab.predict(model, digits.test), plain)  # only where it is asked for
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32, torch.float32]


def test_an_unknown_precision_is_refused(model, digits):
    with pytest.raises(ValueError, match=r"evaluate: precision = 'fp16'\..*'float32' or 'bf16'"):
        lab.evaluate(model, digits.test, precision="fp16")


def test_logits_that_are_not_finite_have_no_score():
    logits = torch.zeros(3, 2)
    logits[1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^evaluate: the logits of image 1 are not finite\."):
        metrics_from_logits(logits, torch.zeros(3, dtype=torch.int64))


def test_a_loss_during_training_is_of_the_precision_asked_for(digits, monkeypatch):
    monkeypatch.setattr(device, "_computes_bf16", lambda device: True)
    torch.manual_seed(0)
    model = lab.SimpleCNN(digits.image_shape, 10)
    found = loss_and_accuracy(model, digits.val, precision="bf16")
    expected, plain = (lab.evaluate(model, digits.val, precision=p) for p in ("bf16", "float32"))
    assert found == pytest.approx((expected.loss, expected.accuracy), rel=1e-6)
    assert found[0] != pytest.approx(plain.loss, rel=1e-6)
