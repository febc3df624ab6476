"""Notebooks without a person: execute one through papermill, read what it reports."""

import io
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from PIL import Image

from ..base.files import atomic_write, project_dir
from . import parameters
from .parameters import NotebookError, read


@dataclass(frozen=True, eq=False)
class Job:
    """A notebook that is to be executed."""

    notebook: Path
    parameters: Mapping[str, Any]  # those that its parameters cell shall not decide
    output: Path
    failed: Path  # where what ran is kept until all did
    label: str  # names it to the user
    key: str | None = None  # of a sweep's code and parameters: other outputs are out of date
    varied: Mapping[str, str] = field(default_factory=dict)  # what the sweep sets, as text

    def reported(self) -> dict[str, Any] | None:
        """What the output reports, None if there is none, or only that of another key."""
        try:
            output = read(self.output)
        except NotebookError:
            return None
        key = output.metadata.get("labutils", {}).get("sweep")
        return reported(output) if key == self.key else None


def outcome(seconds: float, bundle: Mapping[str, Any]) -> str:
    """A line with time, claims and headline; below it, the claims that fail or are not settled."""
    claims = bundle.get("rows", [])
    others = [claim for claim in claims if claim["verdict"] != "holds"]
    held = f"{len(claims) - len(others)} of {len(claims)} claims hold"
    lines = [f"{seconds:.0f} s, {held}. {bundle.get('headline', '')}"]
    lines += [f"  {row['verdict']}: {row['claim']} ({row['evidence']})" for row in others]
    return "\n".join(lines)


def find_notebooks(name: str) -> list[Path]:
    """Notebooks by name, number ('1.1') or 'all', in order. Raises NotebookError if none is."""
    known = {path.stem: path for path in sorted((project_dir() / "notebooks").glob("*.ipynb"))}
    found = [stem for stem in known if name in ("all", stem) or stem.startswith(f"{name}_")]
    if not found:
        raise NotebookError(f"run: no notebook {name!r}. Known: all, {', '.join(known)}.")
    return [known[stem] for stem in found]


def full_parameters(notebook: Path, *, report: bool = False) -> dict[str, Any]:
    """The full profile, which publishes a report alone. Raises NotebookError if there is none."""
    path = notebook.parent / "full" / f"{notebook.stem}.yaml"
    if not path.exists():
        raise NotebookError(f"run: {notebook.stem} has no full profile ({path} is missing).")
    values = parameters.from_yaml(path.read_text(), owner=str(path))
    if not isinstance(values, dict):
        raise NotebookError(f"run: {path} holds {values!r}. Give a line `NAME: VALUE` for each.")
    return values if report or "publish" not in values else {**values, "publish": False}


def prepare(notebook: Path, folder: Path, given: Mapping[str, Any]) -> Job:
    """A notebook with parameters, to be executed into a folder. ValueError if they do not fit."""
    known, name = parameters.of_notebook(notebook), notebook.name
    values = parameters.check(given, known, owner=f"run: {notebook.stem}")
    failed = project_dir() / "build" / "failed" / name
    return Job(notebook, values, folder.resolve() / name, failed, notebook.stem)


def require_writable(folder: Path, hint: str = "Give another folder with --out.") -> None:
    """Make a folder that is not there. Raises NotebookError for one that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise NotebookError(f"{folder} cannot be written ({error.strerror}). {hint}") from None


def execute(job: Job) -> None:
    """Execute a notebook into its output, which is replaced only when every cell ran.

    Raises NotebookError if a cell fails, and before it starts if the output's folder cannot be
    written. What ran until then is kept where the job says.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    kept = f"What ran is in {job.failed}; {job.output.name} is as it was."
    # Kernels warn on the terminal when what they send is not encrypted.
    config = Config(KernelManager={"transport_encryption": "auto"})
    spec = {"name": "python3"} | read(job.notebook).metadata.get("kernelspec", {})
    options = {"kernel_name": spec["name"], "language": "python", "config": config}
    options |= {"progress_bar": False, "start_timeout": 600}  # many kernels, a slow disk
    options["coalesce_streams"] = True  # what is printed is one output, however slow the machine
    require_writable(job.output.parent)  # better now than after hours
    require_writable(job.failed.parent, "Make it writable: what ran is kept there.")
    try:
        notebook = papermill.execute_notebook(job.notebook, job.failed, job.parameters, **options)
    except papermill.PapermillExecutionError as error:
        reason = f"cell {error.exec_count} failed: {error.ename}: {error.evalue}"
        raise NotebookError(f"{reason}\n{kept}") from None
    except DeadKernelError:
        reason = "its kernel died, as when memory runs out or compiled code crashes."
        raise NotebookError(f"{reason} Try a smaller batch_size.\n{kept}") from None
    clean(notebook)
    if job.key:
        notebook.metadata["labutils"] = {"sweep": job.key}
    with atomic_write(job.output) as file:
        file.write(nbformat.writes(notebook).encode() + b"\n")
    job.failed.unlink(missing_ok=True)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Drop what differs from run to run or names this machine, and what makes pages large."""
    for part in (notebook, *notebook.cells):
        for name in ("papermill", "widgets", "execution", "collapsed", "scrolled"):
            part.metadata.pop(name, None)
        if part.metadata.get("tags") == []:  # papermill gives every cell some
            del part.metadata["tags"]
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        for output in cell.get("outputs", []):
            _shrink(output.get("data", {}))


def _shrink(data: dict[str, Any]) -> None:
    """Store a large picture as JPEG, a third of its PNG: GitHub is slow to show large notebooks."""
    if len(data.get("image/png", "")) > 2**17:
        picture, jpeg = Image.open(io.BytesIO(b64decode(data.pop("image/png")))), io.BytesIO()
        white = Image.new("RGBA", picture.size, "white")  # what is transparent would become black
        white.alpha_composite(picture.convert("RGBA"))
        white.convert("RGB").save(jpeg, "jpeg", quality=90, subsampling=0)
        data["image/jpeg"] = b64encode(jpeg.getvalue()).decode()


def reported(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """What the claims of an executed notebook hold; empty if it showed none."""
    from .claims import MEDIA_TYPE  # brings torch, which who only executes a notebook can spare

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    bundles = [output.get("data", {}).get(MEDIA_TYPE) for output in outputs]
    # Claims are shown where they belong, and every time with all that came before.
    return next((bundle for bundle in reversed(bundles) if bundle), {})
