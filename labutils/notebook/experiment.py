"""What notebooks are written with: the set-up line, and all runs of an exercise in one object."""

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from pydantic import Field, InstanceOf
from torch import nn

from .. import __version__
from ..base.device import device_name, resolve_device, seed_everything
from ..base.files import atomic_write, file_name, images_dir
from ..base.settings import Seed, TrainConfig, check, plain_numbers
from ..data.tensors import ImageData
from ..training.key import as_its_spec
from ..training.loop import train
from ..training.runs import Run
from ..training.store import publish
from .claims import ByModel, Score, labelled, mean_std

_KINDS = {"exercise": str, "data": InstanceOf[ImageData]}
_SEEDS = Annotated[list[Seed], Field(min_length=1)]
_COLUMNS = {  # of a table of results, with the form of a number
    "precision (%)": ("precision", ".2f"),
    "loss (nats)": ("loss", ".3f"),
    "calibration error (%)": ("calibration_error", ".2f"),
    "epochs": ("epochs", ".1f"),
}


def start(profile: str) -> None:
    """Seed everything and print what runs where.

    profile: 'quick' or 'full', the notebook's own name for its set of parameters.
    """
    seed_everything(0)
    versions = f"labutils {__version__} · torch {torch.__version__}"
    machine = f"Python {platform.python_version()} · {device_name(resolve_device())}"
    print(f"profile {profile} · {versions} · {machine}")


class Experiment:
    """All runs of a notebook: trained or loaded, named by their labels, in one table.

    exercise: '1.1', say: first part of every run's name. data: what is trained on unless `fit` is
    given other data. seeds: one run for each, so that results carry their deviation.
    retrain: train even where a finished run is stored. publish: whether `publish` does anything.
    """

    def __init__(
        self, exercise: str, data: ImageData, *, seeds: Sequence[int], retrain=False, publish=False
    ) -> None:
        check("Experiment", _KINDS, {"exercise": exercise, "data": data})
        self.exercise, self.data, self.retrain, self.publishes = exercise, data, retrain, publish
        self.seeds = _checked(seeds)
        # By labels and seed, so that a cell can run twice: these, run, data.
        self._trained: dict[str, tuple[dict[str, Any], Run, ImageData]] = {}

    def fit(
        self,
        build: Callable[[], nn.Module],
        config: TrainConfig,
        *,
        seeds=None,
        data=None,
        teacher=None,
        **labels,
    ) -> Score:
        """Train a network once for each seed, or load the finished runs, and remember them.

        build: makes the network with fresh weights; it is called under the seed. seeds, data: other
            than the experiment's own. teacher: see train.
        labels: what tells this training from the others. They name the run and become columns of
            `frame` and `histories`, in place of what has the same name there; they are no part of
            what a stored run is found by.
        Raises ValueError for seeds that are none or not distinct, a label `seed`, and one network
        in place of what builds one for each; KeyboardInterrupt if a training was interrupted: an
        unfinished run is no result.
        """
        check("fit", {"config": InstanceOf[TrainConfig]}, {"config": config})
        if isinstance(build, nn.Module) or not callable(build) or "seed" in labels:
            remedy = "build as a function, `lambda: lab.MLP(...)` say, and seeds as seeds=[...]"
            raise ValueError(f"fit: every seed needs a network of its own. Give {remedy}.")
        data, runs = data or self.data, {}
        written = {n: f"{v:.12g}" if isinstance(v, float) else v for n, v in labels.items()}
        words = [v if isinstance(labels[n], str) else f"{n}{v}" for n, v in written.items()]
        for seed in self.seeds if seeds is None else _checked(seeds):
            name = file_name("_".join([self.exercise, *words, f"seed{seed}"]))
            seed_everything(seed)
            config = replace(config, seed=seed)
            options = {"teacher": teacher, "name": name, "retrain": self.retrain}
            network = build()
            if any(network is run.model for run in runs.values()):
                raise ValueError("fit: build gave one network twice. Let it make a new one.")
            run = train(network, data, config, **options)
            if run.stop_reason == "interrupted":
                go_on = "go on" if as_its_spec(run.model) else "start it anew"
                hint = "; retrain = False keeps the finished runs" * self.retrain
                problem = f"{name} was interrupted. Run the cell again to {go_on}{hint}."
                raise KeyboardInterrupt(problem)
            runs[seed] = run
            its_labels = {**labels, "seed": seed}
            self._trained[repr(sorted(its_labels.items()))] = its_labels, run, data
        return Score(runs, data)

    def _matching(self, labels: dict[str, Any]) -> list[tuple[dict[str, Any], Run, ImageData]]:
        return [each for each in self._trained.values() if labels.items() <= each[0].items()]

    def score(self, **labels: Any) -> Score:
        """The runs with these labels, one for each seed.

        Raises ValueError if there are none, or several of one seed.
        """
        found = self._matching(labels)
        runs = {its_labels["seed"]: run for its_labels, run, _ in found}
        if not found or len(runs) < len(found):
            count = f"{len(found)} runs of {len(runs)} seeds"
            raise ValueError(f"score: {labels} are labels of {count}. Give those of one `fit`.")
        return Score(runs, found[0][2])

    @property
    def frame(self) -> pd.DataFrame:
        """One row for each run: its labels and seed, and how its training went on train and val."""
        rows = []
        for labels, run, _ in self._trained.values():
            row = {**labels, "epochs": run.epochs, "seconds": run.seconds}
            row |= {"val_loss": run.best("val_loss"), "stopped": run.stop_reason, **labels}
            for split in ("train", "val"):
                row[f"{split} accuracy (%)"] = 100 * run.best(f"{split}_accuracy")
            rows.append(row)
        return pd.DataFrame(rows)

    def histories(self, **labels: Any) -> pd.DataFrame:
        """One row for each epoch of the runs with these labels: labels, seed, epoch, history."""
        found = [labelled(run.history.reset_index(), its) for its, run, _ in self._matching(labels)]
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame()

    def results(
        self, scores: Mapping[tuple[str, str], Score], *, tta=False, **references: ByModel
    ) -> pd.DataFrame:
        """The table of a comparison on the test split: means over seeds, accuracy with deviation.

        scores: (recipe, model) -> Score. tta: add a column for the accuracy with test-time flip.
        references: more columns, model -> accuracy in percent, published results for example.
        Raises ValueError for other scores.
        """
        kinds = {"scores": dict[tuple[str, str], InstanceOf[Score]]}
        check("results", kinds, {"scores": dict(scores)})
        rows, references = {}, {name: known for name, known in references.items() if known}
        for (recipe, model), score in scores.items():
            parameters = f"{score.first.info['parameters']:,}"
            row: dict[str, Any] = {"parameters": parameters, "n": len(score.runs)}
            row["accuracy (%)"] = str(score)
            if tta:
                row["with flip (%)"] = mean_std(score.values(tta=True))
            for name, known in references.items():
                row[f"{name} (%)"] = f"{known[model]:g}" if model in known else "–"
            for heading, (what, form) in _COLUMNS.items():
                row[heading] = f"{score.values(what).mean():{form}}".removesuffix(".0")
            rows[recipe, model] = row
        index = pd.MultiIndex.from_tuples(rows, names=["recipe", "model"])
        return pd.DataFrame(rows.values(), index=index)

    def publish(self, *, weights: Iterable[Run], figures: Mapping[str, Figure], half=False) -> None:
        """Copy all runs into models/ and figures into images/, if the experiment publishes.

        weights: the runs whose weights are published too; if `half`, as float16, and it is these
        that their cards score. figures: by name. Raises ValueError for a run of another experiment.
        """
        if not self.publishes:
            return
        command = f"python -m labutils run {self.exercise} --profile full -p retrain true"
        chosen = {run.key for run in weights}
        # A key may have several labels; trained again by the latest, it is stored as that alone.
        stored = {run.key: (run, data) for _, run, data in self._trained.values()}
        if unknown := chosen - stored.keys():
            problem = f"weights of {unknown}, which are no runs of this experiment"
            raise ValueError(f"publish: {problem}.")
        for key, (run, data) in stored.items():
            exact = f"OMP_NUM_THREADS={run.info['threads']} {command}"  # sums in the same parts
            publish(run, weights=key in chosen, command=exact, half=data if half else None)
        for name, figure in figures.items():
            with atomic_write(images_dir() / f"{name}.png") as file:
                # Without the software's version, so that the same figure is the same file.
                figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def _checked(seeds: Sequence[int]) -> list[int]:
    seeds = check("Experiment", {"seeds": _SEEDS}, {"seeds": plain_numbers(seeds)})["seeds"]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"Experiment: seeds = {seeds}. Give each once.")
    return seeds
