"""Classical classifiers of given features, as scikit-learn pipelines."""

from typing import Literal

import numpy as np
import torch
from scipy.stats import mode
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from ..base.settings import check

Labelled = tuple[np.ndarray, np.ndarray]  # features float32 [N, D], labels int64 [N]


class LinearSVM(LinearSVC):
    """Linear support vector machines with squared hinge loss, one class against the rest.

    For C up to 0.01 it predicts as LinearSVC, and finds its minimum (intercept in the penalty too)
    for all classes at once and in matrix products: a hundred classes in the time of one. Squared
    hinge loss is the squared distance to targets that may lie beyond the margin (Ho and Kashyap
    1965, https://doi.org/10.1109/PGEC.1965.264207), so that a step is a ridge regression, whose
    matrix stays; momentum, taken back where it leads uphill (O'Donoghue and Candes 2015,
    https://arxiv.org/abs/1204.3982), makes the steps few.
    """

    def __init__(self, C: float = 1e-3, *, tol: float = 1e-3, max_iter: int = 500) -> None:
        self.C, self.tol, self.max_iter = C, tol, max_iter

    def fit(self, features: np.ndarray, labels: np.ndarray) -> "LinearSVM":
        """features: float [N, D]. labels: [N], of two classes or more, else ValueError."""
        self.classes_, places = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"LinearSVM: labels are all {self.classes_}. Give two classes.")
        x = torch.from_numpy(np.asarray(features, np.float32))
        x = torch.cat([x, torch.ones(len(x), 1)], dim=1)  # [N, D + 1]
        signs = -torch.ones(len(x), len(self.classes_))
        signs.scatter_(1, torch.from_numpy(places)[:, None], 1.0)
        matrix = 2 * self.C * (x.T @ x).double() + torch.eye(x.shape[1], dtype=torch.double)
        factor = torch.linalg.cholesky(matrix)
        weights = ahead = torch.zeros(x.shape[1], len(self.classes_), dtype=torch.double)
        momentum = 1.0
        for _ in range(self.max_iter):
            targets = signs * (signs * (x @ ahead.float())).clamp_(min=1)
            moved = torch.cholesky_solve(2 * self.C * (x.T @ targets).double(), factor)
            before, momentum = momentum, (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            change, error = moved - weights, moved - ahead
            if (error * (matrix @ change)).sum() < 0:
                before = momentum = 1.0
            weights, ahead = moved, moved + (before - 1) / momentum * change
            if error.norm() <= self.tol * moved.norm():
                break
        # In float32, as features are, so that those of a test split are not copied to float64.
        self.coef_, self.intercept_ = weights[:-1].T.float().numpy(), weights[-1].numpy()
        return self


# Kind: classifier, its setting that is chosen on val, and the choices.
_KINDS = {
    "svm": (LinearSVM(), "C", (1e-4, 1e-3, 1e-2)),
    "knn": (KNeighborsClassifier(), "n_neighbors", (1, 5, 20, 50)),
    "bayes": (GaussianNB(), "var_smoothing", (1e-9, 1e-3, 1e-1)),
    "logistic": (LogisticRegression(max_iter=300), "C", (1e-3, 1e-2, 1e-1)),
}


def probe(kind: str, train: Labelled, val: Labelled) -> Pipeline:
    """Fit a classifier of standardised features; of its setting, the choice that is best on val.

    kind: svm and logistic choose C, the weight of the errors against the penalty; knn the number of
        neighbours; bayes (Gaussian, naive) the share of the largest variance added to all.
    Returns the pipeline, fitted on train alone; probe(...)[-1] is the classifier.
    Raises ValueError for an unknown kind, features and labels that do not fit or are not finite,
    and for knn with fewer than 50 images.
    """
    check("probe", {"kind": Literal[*_KINDS]}, {"kind": kind})
    for what, (features, labels) in {"train": train, "val": val}.items():
        if len(features) != len(labels) or not len(labels) or not np.isfinite(features).all():
            problem = f"{what} has {len(features)} rows of features, {len(labels)} labels"
            raise ValueError(f"probe: {problem}. Give one of each an image, all finite.")
        if np.ndim(features) != 2 or features.shape[1] != train[0].shape[1]:
            problem = f"{what} has features {list(features.shape)}, train {list(train[0].shape)}"
            raise ValueError(f"probe: {problem}. Give [N, D], the same D.")
    if kind in ("svm", "logistic") and len(np.unique(train[1])) < 2:
        raise ValueError(f"probe: {kind} has labels of one class, {train[1][0]}. Give two or more.")
    classifier, setting, choices = _KINDS[kind]
    if kind == "knn" and len(train[1]) < max(choices):
        needed = f"Give at least {max(choices)}, the most neighbours that are tried"
        raise ValueError(f"probe: knn trains on {len(train[1])} images. {needed}.")
    scaler = StandardScaler().fit(train[0])
    features, checked = scaler.transform(train[0]), scaler.transform(val[0])
    if kind == "knn":  # the search takes nearly all of the time, and one serves all choices
        knn = clone(classifier).fit(features, train[1])
        votes = train[1][knn.kneighbors(checked, max(choices), return_distance=False)]
        right = {k: (mode(votes[:, :k], axis=1).mode == val[1]).sum() for k in choices}
        return make_pipeline(scaler, knn.set_params(n_neighbors=max(right, key=right.get)))
    fits = [clone(classifier).set_params(**{setting: c}).fit(features, train[1]) for c in choices]
    return make_pipeline(scaler, max(fits, key=lambda fit: fit.score(checked, val[1])))
