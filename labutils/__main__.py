"""The command line: python -m labutils run | sweep | data | cam."""

import sys
from pathlib import Path

import click

from .base.files import data_dir, project_dir

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}
FULL = "full: real data, and the parameters of notebooks/full/."
SHARED = [  # by the commands that execute notebooks
    click.Argument(["notebook"]),
    click.Option(["--profile"], type=click.Choice(["quick", "full"]), default="quick", help=FULL),
    click.Option(["--out"], type=click.Path(path_type=Path), help="Folder for what comes out."),
    click.Option(["--scheduler"], metavar="ADDRESS", help="Of a Dask cluster that runs."),
]


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 1 after an error or a claim that fails, 2 if the
    command is not understood, 128 + the signal's number after Ctrl-C or a kill, else 0."""
    try:
        status = commands.main(arguments, "python -m labutils", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except click.Abort:  # so click calls Ctrl-C
        status = 130
    except (RuntimeError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        status = 1
    if status > 128:
        print("Stopped. What has finished is kept.", file=sys.stderr)
    return status


@click.group(context_settings=HELP)
def commands() -> None:
    """Run notebooks, look after data, explain an image."""


@commands.command(params=[*SHARED])
@click.option("-p", "given", nargs=2, multiple=True, metavar="NAME VALUE", help="A parameter.")
@click.option(
    "--jobs", type=click.IntRange(1), help="Notebooks at a time; default: one a GPU, or a core."
)
def run(notebook, profile, given, out, jobs, scheduler) -> int:
    """Execute NOTEBOOK: its number (1.1), its name, or all.

    \b
    python -m labutils run all                           quick profile of all, into build/
    python -m labutils run 1.1 -p epochs 3 -p grid_widths "[3, 10]"          values are YAML
    python -m labutils run 1.1 --profile full            real data, into reports/; reuses runs
    python -m labutils run 1.1 --profile full -p retrain true     ... and trained from nothing

    A claim that fails in the quick profile, with no parameter changed, makes the command fail.
    """
    from .notebook import batch, engine, parameters

    names = [name for name, _ in given]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise ValueError(f"run: -p {twice} comes twice. `sweep` takes several values.")
    values = {name: parameters.from_yaml(text, owner=f"-p {name} {text!r}") for name, text in given}
    full = profile == "full"
    # Only the full profile as it stands makes a report; anything else is an experiment.
    report = full and out is None and set(values) <= {"retrain"}
    folder = out or project_dir() / ("reports" if report else "build")
    todo, failures = [], []
    # The later an exercise, the longer it takes; a long one that starts last is waited for alone.
    for path in reversed(batch.find_notebooks(notebook)):
        try:
            settings = batch.full_parameters(path, report=report) if full else {}
            todo.append(batch.prepare(path, folder, {**settings, **values}))
        except (RuntimeError, ValueError) as error:
            print(error, file=sys.stderr)
            failures.append(path)

    def ended(job: batch.Job, error: str | None, seconds: float) -> None:
        bundle = {} if error else job.reported() or {}
        text = error or batch.outcome(seconds, bundle)
        print(f"{job.label}: {text}", file=sys.stderr if error else sys.stdout, flush=True)
        fails = any(claim["verdict"] == "fails" for claim in bundle.get("rows", []))
        if error or (fails and not full and not given):
            failures.append(job)

    status = engine.execute_all(todo, ended, at_once=jobs, scheduler=scheduler)
    return status or int(bool(failures))


@commands.command(params=[*SHARED])
@click.option(
    "-p", "axes", nargs=2, multiple=True, required=True, metavar="NAME VALUES", help="An axis."
)
@click.option("--jobs", type=click.IntRange(1), default=1, help="Notebooks at a time.")
def sweep(notebook, profile, axes, out, jobs, scheduler) -> int:
    """Execute NOTEBOOK once for each combination of values, and print a table of the scores.

    \b
    python -m labutils sweep 1.1 -p epochs 10,30 -p seed 0,1,2 --jobs 3      six, three at a time
    python -m labutils sweep 1.1 -p grid_widths "[3, 10],[64]"               two lists
    python -m labutils sweep 1.1 --profile full -p epochs 20,40              the rest as in full

    What comes out is in build/sweeps/. The same command again does only what is missing: failed,
    stopped, or of another notebook or version of labutils. Other data under the same name, or code
    of labutils that you change, are not noticed: then remove the folder.
    """
    from .notebook import batch
    from .notebook import sweep as sweeps

    path, *others = batch.find_notebooks(notebook)
    if others:
        raise ValueError(f"sweep: {notebook!r} is several notebooks. Give one, say {path.stem}.")
    grid = sweeps.grid(path, axes, full=profile == "full", out=out)
    return sweeps.run(grid, at_once=jobs, scheduler=scheduler)


@commands.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
def data(names) -> None:
    """Find, fetch and check data sets; without a name, list what is here.

    \b
    python -m labutils data mnist cifar10
    python -m labutils data folder:~/my-images           a folder of your own
    """
    from .data.load import load_data
    from .data.sources import EMBEDDED, KNOWN

    if not names:
        print(f"embedded: {', '.join(EMBEDDED)}")
        for name, known in KNOWN.items():
            files = [path for path in (f"{name}.npz", known.folder) if (data_dir() / path).exists()]
            print(f"{name}: {files[0] if files else 'not here yet'}")
        print(f"Looked for in {data_dir()}. `python -m labutils data NAME` fetches and checks one.")
    for name in names:
        print(load_data(name, device="cpu"), flush=True)


@commands.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "--model", default="1.3_cnn_seed0", help="A finished run: NAME of models/NAME-KEY.safetensors."
)
@click.option("--method", default="cam", help="Or gradcam, layercam, ...")
@click.option("--layer", help="Where to look, for other methods than cam; default: the last stage.")
@click.option("--class", "class_name", help="Whose evidence to show; default: the predicted one's.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: IMAGE-cam.png, here.")
def cam(image, model, method, layer, class_name, out) -> None:
    """Show where a published network finds its evidence in IMAGE, a file of your own.

    \b
    python -m labutils cam horse.jpg                                  the plain map of a CNN
    python -m labutils cam horse.jpg --class deer                     what speaks for another class
    python -m labutils cam church.jpg --model 2.3_imagenette_resnet18-60-epochs_seed0
    python -m labutils cam horse.jpg --model 1.3_fastnet_seed0 --method gradcam
    """
    from .methods.pictures import explain_file
    from .training.runs import load_run

    name = f"{image.stem}-cam.png"
    out = out / name if out and out.is_dir() else out or Path(name)
    options = {"method": method, "layer": layer, "class_name": class_name}
    run = load_run(model)
    title = explain_file(run, image, out, **options)
    print(f"{title}; all that it knows are {', '.join(run.info['data']['classes'])}\n{out}")


if __name__ == "__main__":
    sys.exit(main())
