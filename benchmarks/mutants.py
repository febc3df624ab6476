"""What do the notebooks notice? The library is broken on purpose, one line at a time.

    python benchmarks/mutants.py                     the table of benchmarks/README.md (an hour)
    python benchmarks/mutants.py --only "no skip"    the mutants whose names hold these words

Each mutant is a copy of the checkout with one expression replaced. The notebooks that should care
run there as `make test` runs them; a mark says that the output of a cell differs. What no notebook
notices, a unit test has to, and is named. Before all else the copy runs unbroken and must pass.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LEFT = {".git", ".venv", "build", "data", "runs"}  # what a copy does without
MLPS, CONVNETS = ("1.1", "1.2"), ("1.3",)


class Mutant(NamedTuple):
    name: str
    file: str  # below labutils/
    old: str  # what is in it exactly once
    new: str
    exercises: tuple[str, ...]


TENSORS, OPTIM, LOOP = "data/tensors.py", "training/optim.py", "training/loop.py"
ORDER = "torch.randperm(count, generator=generator(seed, epoch))"
CROPPED = 'if augment.crop or augment.flip != "none":'
DISTORTED = "if augment.rotate or augment.translate or augment.zoom or augment.area < 1:"
MUTANTS = [
    Mutant("no crop, no flip", TENSORS, CROPPED, "if False:", CONVNETS),
    Mutant("no distortion", TENSORS, DISTORTED, "if False:", MLPS),
    Mutant("no shuffling", TENSORS, ORDER, "torch.arange(count)", MLPS + CONVNETS),
    Mutant("half of the images", TENSORS, ORDER, f"({ORDER} // 2)", MLPS + CONVNETS),
    Mutant("no normalisation", TENSORS, "sub_(mean).div_(std)", "div_(255)", MLPS + CONVNETS),
    Mutant(
        "crop axes swapped",
        "data/augmentation.py",
        "rows, columns = mirrored",
        "columns, rows = mirrored",
        CONVNETS,
    ),
    Mutant(
        "constant instead of one-cycle",
        OPTIM,
        'if config.schedule != "onecycle":',
        "if True:",
        MLPS + CONVNETS,
    ),
    Mutant(
        "no weight decay",
        OPTIM,
        '"weight_decay": config.weight_decay, "fused"',
        '"weight_decay": 0.0, "fused"',
        MLPS + CONVNETS,
    ),
    Mutant("no momentum", OPTIM, '{"momentum": 0.9, "nesterov": True} if', "{} if", CONVNETS),
    Mutant(
        "no early stopping",
        OPTIM,
        "if config.patience and waited >= config.patience:",
        "if False:",
        MLPS,
    ),
    Mutant(
        "Muon without orthogonalisation",
        OPTIM,
        "orthogonalise(gradient.flatten(1))",
        "gradient.flatten(1)",
        (*CONVNETS, "2.3"),
    ),
    Mutant("gradients pile up", LOOP, "optimizer.zero_grad()", "pass", MLPS + CONVNETS),
    Mutant(
        "a third of the learning rate",
        LOOP,
        "lr = config.lr * lr_factor(config, step, steps)\n            for",
        "lr = 0.3 * config.lr * lr_factor(config, step, steps)\n            for",
        MLPS + CONVNETS,
    ),
    Mutant(
        "no averaged weights",
        "training/checkpoint.py",
        "weight = 1 - self._decay if self.n_averaged else 1.0",
        "weight = 1.0",
        CONVNETS,
    ),
    Mutant(
        "the last epoch's weights, not the best",
        "training/checkpoint.py",
        "if scores.index(best) == len(scores) - 1:",
        "if True:",
        MLPS + CONVNETS,
    ),
    Mutant(
        "no label smoothing",
        "training/target.py",
        "label_smoothing=config.label_smoothing",
        "label_smoothing=0.0",
        (*CONVNETS, "2.2"),
    ),
    Mutant("no teacher", "training/target.py", "if taught is None:", "if True:", ("2.2",)),
    Mutant(
        "T squared forgotten", "training/target.py", "alpha * t**2 * soft", "alpha * soft", ("2.2",)
    ),
    Mutant("no dropout", "models/mlp.py", "layers.append(nn.Dropout(dropout))", "pass", ("1.1",)),
    Mutant(
        "no skip in the perceptron",
        "models/mlp.py",
        "self.body(inputs) + self.bridge(inputs)",
        "self.body(inputs)",
        ("1.2",),
    ),
    Mutant("He's weights are torch's", "models/mlp.py", 'if init == "he":', "if False:", ("1.2",)),
    Mutant(
        "no skip in the ResNet",
        "models/resnet.py",
        "    if not residual:\n        return _PlainBlock",
        "    if not project:\n        return _PlainBlock",
        CONVNETS,
    ),
    Mutant(
        "frozen stages learn",
        "methods/transfer.py",
        "stage.requires_grad_(False)",
        "stage.requires_grad_(True)",
        ("2.1",),
    ),
    Mutant(
        "a source forgets what it learned",
        "methods/transfer.py",
        "network.load_state_dict(trained.state_dict() | head)",
        "network.load_state_dict(network.state_dict() | head)",
        ("2.1",),
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORDS")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    if not chosen:
        names = "; ".join(mutant.name for mutant in MUTANTS)
        parser.error(f"--only {options.only!r}: no mutant has these words in its name ({names})")
    exercises = sorted({exercise for mutant in chosen for exercise in mutant.exercises})
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        whole = copy(folder)
        for exercise in exercises:
            if noticed_by_notebook(whole, exercise):
                print(f"{exercise} fails unbroken. Mend that first.")
                return 1
        if test := noticed_by_units(whole):
            print(f"{test} fails unbroken. Mend that first.")
            return 1
        print("| broken on purpose | " + " | ".join(exercises) + " | unit test |")
        print("|---|" + "---|" * (len(exercises) + 1))
        for mutant in chosen:
            broken = copy(folder, mutant)
            found = {each: noticed_by_notebook(broken, each) or "–" for each in mutant.exercises}
            cells = [found.get(exercise, "") for exercise in exercises]
            noticed = set(found.values()) != {"–"}
            cells.append("" if noticed else noticed_by_units(broken) or "**missed**")
            print(f"| {mutant.name} | " + " | ".join(cells) + " |", flush=True)
    return 0


def copy(folder: str, mutant: Mutant | None = None) -> Path:
    """A fresh copy of the checkout, with a mutant's expression in the place of the right one."""
    path = Path(folder, "checkout")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(ROOT, path, ignore=lambda at, _: LEFT if Path(at) == ROOT else ())
    if mutant:
        file = path / "labutils" / mutant.file
        source = file.read_text()
        if (count := source.count(mutant.old)) != 1:
            raise SystemExit(f"{mutant.name}: {mutant.old!r} is {count} times in {mutant.file}")
        file.write_text(source.replace(mutant.old, mutant.new))
    return path


def noticed_by_notebook(path: Path, exercise: str) -> str:
    """A mark if a cell of the exercise's notebook fails under nbval, '' if none does."""
    notebook = next((path / "notebooks").glob(f"{exercise}_*.ipynb"))
    output = run_pytest(path, "--nbval", str(notebook.relative_to(path)))
    return "✔" if re.search(r"(?:FAILED|ERROR) \S+::Cell \d+", output) else ""


def noticed_by_units(path: Path) -> str:
    """The first test of the library that fails; '' if none does."""
    # Pages, these scripts, notebooks.
    others = ("test_benchmarks", "test_docs", "test_mutants", "test_nbval")
    output = run_pytest(path, "tests", *(f"--ignore=tests/{name}.py" for name in others))
    failed = re.search(r"(?:FAILED|ERROR) \S+?/(test_\w+\.py)::(\w+)", output)
    return f"{failed[1]} {failed[2]}" if failed else ""


def run_pytest(path: Path, *arguments: str) -> str:
    settings = {
        "PYTHONPATH": str(path),
        "LABUTILS_RUNS": str(path / "runs"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rfE", "--no-header", *arguments]
    done = subprocess.run(
        command, cwd=path, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
