"""Probes: the linear SVM against scikit-learn's own, choices made on val."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

import labutils as lab
from labutils.methods.probes import _KINDS, LinearSVM


def blobs(n, classes=4, seed=0, dims=6):
    centres = np.random.default_rng(7).normal(size=(classes, dims))
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return (centres[labels] + rng.normal(size=(n, dims))).astype(np.float32), labels


@pytest.mark.parametrize("C", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_svm_finds_the_minimum_of_sklearns(C, classes):
    x, y = blobs(300, classes)
    ours = LinearSVM(C, tol=1e-6, max_iter=2000).fit(x, y)
    theirs = LinearSVC(C=C, tol=1e-8, max_iter=10_000).fit(x, y)
    # For two classes, scikit-learn keeps the second's plane alone.
    assert ours.coef_[-len(theirs.coef_) :] == pytest.approx(theirs.coef_, abs=1e-4)
    assert ours.intercept_[-len(theirs.coef_) :] == pytest.approx(theirs.intercept_, abs=1e-4)
    assert (ours.predict(x) == theirs.predict(x)).all()


@pytest.mark.parametrize("C", [1e-4, 1e-3, 1e-2])
def test_the_svm_predicts_as_sklearns_with_the_steps_it_takes(C):
    x, y = blobs(2_000, 10, dims=30)
    theirs = LinearSVC(C=C, tol=1e-8, max_iter=10_000).fit(x, y).predict(x)
    assert (LinearSVM(C).fit(x, y).predict(x) == theirs).mean() > 0.998


def test_labels_need_not_be_numbers_from_0_on():
    x, y = blobs(100)
    names = np.array(["a", "b", "x", "z"])[y]
    assert (LinearSVM().fit(x, names).predict(x) == names).mean() > 0.6


def test_one_class_is_none_to_tell_apart():
    with pytest.raises(ValueError, match="labels are all"):
        LinearSVM().fit(np.ones((3, 2)), np.zeros(3))


@pytest.mark.parametrize("kind", ["svm", "knn", "bayes", "logistic"])
def test_a_probe_takes_what_is_best_on_val_and_standardises_by_train(kind):
    train, val = blobs(400), blobs(100, seed=1)
    pipeline = lab.probe(kind, train, val)
    assert pipeline.score(*val) > 0.6
    scaled = lab.probe(kind, (1000 * train[0] + 5, train[1]), (1000 * val[0] + 5, val[1]))
    assert (scaled.predict(1000 * val[0] + 5) == pipeline.predict(val[0])).mean() > 0.98
    assert pipeline[0].mean_ == pytest.approx(train[0].mean(axis=0), abs=1e-5)


def test_the_choice_is_made_on_val(monkeypatch):
    monkeypatch.setitem(_KINDS, "knn", (*_KINDS["knn"][:2], (3, 1)))
    train = np.array([[0.0], [1.0], [1.1], [5.0]]), np.array([0, 1, 0, 1])
    near, far = (np.array([[1.02]]), np.array([1])), (np.array([[0.5]]), np.array([0]))
    assert lab.probe("knn", train, near)[-1].n_neighbors == 1
    assert lab.probe("knn", train, far)[-1].n_neighbors == 3


def test_the_neighbours_vote_as_scikit_learns_do():
    train, val = blobs(400), blobs(300, seed=1)
    chosen = lab.probe("knn", train, val)
    scores = {}
    for k in _KINDS["knn"][2]:
        theirs = make_pipeline(StandardScaler(), KNeighborsClassifier(k)).fit(*train)
        scores[k] = theirs.score(*val)
    assert scores[chosen[-1].n_neighbors] == max(scores.values()) == chosen.score(*val)


def test_odd_requests_are_refused():
    train = blobs(20)
    with pytest.raises(ValueError, match="kind = 'forest'"):
        lab.probe("forest", train, train)
    with pytest.raises(ValueError, match=r"^probe: knn trains on 20 images\. Give at least 50"):
        lab.probe("knn", train, train)
    narrow = train[0][:, :-1], train[1]
    with pytest.raises(ValueError, match=r"^probe: val has features .*, train .*the same D"):
        lab.probe("svm", train, narrow)
    with pytest.raises(ValueError, match=r"^probe: train has features \[20\]"):
        lab.probe("svm", (train[0][:, 0], train[1]), train)
    for kind in ("svm", "logistic"):
        with pytest.raises(ValueError, match=f"^probe: {kind} has labels of one class, 0"):
            lab.probe(kind, (train[0], 0 * train[1]), train)


@pytest.mark.parametrize("kind", ["svm", "knn", "bayes", "logistic"])
def test_features_without_their_labels_are_refused(kind):
    x, y = np.random.default_rng(0).random((60, 4), np.float32), np.arange(60) % 2
    with pytest.raises(ValueError, match=r"^probe: train has 60 rows of features, 30 labels\."):
        lab.probe(kind, (x, y[:30]), (x, y))
    with pytest.raises(ValueError, match=r"^probe: val has 60 rows of features, 1 labels\."):
        lab.probe(kind, (x, y), (x, y[:1]))
    with pytest.raises(ValueError, match=r"^probe: val has 0 rows"):
        lab.probe(kind, (x, y), (x[:0], y[:0]))
    with pytest.raises(ValueError, match=r"^probe: train .* all finite"):
        lab.probe(kind, (np.full_like(x, np.nan), y), (x, y))


@pytest.mark.parametrize("kind", ["svm", "bayes", "logistic"])
def test_of_all_choices_the_best_on_val_is_taken(kind):
    def draw(n, seed):  # half as many features as images: the loosest choice learns them by heart
        rng, labels = np.random.default_rng(seed), np.arange(n) % 2
        return (0.2 * labels[:, None] + rng.normal(size=(n, 100))).astype(np.float32), labels

    train, val = draw(200, 0), draw(300, 1)
    classifier, setting, choices = _KINDS[kind]
    scores = {}  # on val, on train
    for choice in choices:
        theirs = clone(classifier).set_params(**{setting: choice})
        theirs = make_pipeline(StandardScaler(), theirs).fit(*train)
        scores[choice] = theirs.score(*val), theirs.score(*train)
    best, by_heart = (max(scores, key=lambda choice: scores[choice][i]) for i in (0, 1))
    assert scores[best][0] > scores[by_heart][0]
    assert lab.probe(kind, train, val).score(*val) == scores[best][0]
