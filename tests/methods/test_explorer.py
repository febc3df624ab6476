"""The explorer: its controls change the picture, its errors are read; once in a real browser."""

import html
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

import labutils as lab


@pytest.fixture
def data():
    images = torch.randint(0, 256, (6, 3, 16, 24), generator=torch.Generator().manual_seed(0))
    split = lab.Split(images.byte(), torch.arange(6) % 3, 3 * (0.5,), 3 * (0.3,))
    return lab.ImageData("noise", "this test", ("cat", "dog", "a <b> c"), split, split, split)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return lab.CNN((3, 16, 24), 3, widths=[4, 6])


@pytest.fixture
def drawn(monkeypatch):
    """What the picture was last made of."""
    found, real = {}, lab.plots.explained

    def note(image, heat, **options):
        found.update(options, image=image, heat=heat)
        return real(image, heat, **options)

    monkeypatch.setattr(lab.plots, "explained", note)
    return found


def change(explorer, **values):
    """Set controls as a person would; whether the picture is another one afterwards."""
    before = explorer.picture.value
    for name, value in values.items():
        explorer.controls[name.rstrip("_")].value = value
    return explorer.picture.value != before


def test_the_picture_follows_every_control(model, data, drawn):
    explorer = lab.Explorer(model, data)
    pixels = data.test.normalise(data.test.images)
    assert bytes(explorer.picture.value).startswith(b"\x89PNG")
    assert drawn["title"].startswith("True class: cat. Predicted: ")
    assert change(explorer, image=4, class_=2)
    plain = lab.class_activation_map(model, pixels[4:5], 2)
    assert torch.equal(drawn["image"], data.test.images[4])
    torch.testing.assert_close(drawn["heat"], plain.maps[0])
    assert drawn["title"].startswith("True class: dog. ")
    assert change(explorer, method="layercam", layer="stages.stage1.3")
    other = lab.explain(model, pixels[4:5], "layercam", "stages.stage1.3", 2)
    torch.testing.assert_close(drawn["heat"], other.maps[0])
    assert change(explorer, strength=0.9)
    assert drawn["strength"] == 0.9
    assert change(explorer, x=23, y=0)
    assert drawn["pixel"] == (23, 0)


@pytest.mark.parametrize(("x", "y", "column", "row"), [(0, 0, 0, 0), (23, 3, 5, 0), (13, 15, 3, 3)])
def test_the_raw_value_is_that_of_the_cell_under_the_pixel(model, data, x, y, column, row):
    explorer = lab.Explorer(model, data)
    change(explorer, x=x, y=y)
    raw = lab.class_activation_map(model, data.test.normalise(data.test.images[:1])).raw
    assert raw.shape == (1, 4, 6)
    shown = float(re.search(r"<b>(.*)</b>", explorer.message.value)[1])
    assert shown == pytest.approx(float(raw[0, row, column]), rel=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_ones_own_is_shown_until_its_path_is_taken_away(drawn, tmp_path, channels):
    images = torch.full((4, channels, 16, 16), 100, dtype=torch.uint8)
    split = lab.Split(images, torch.arange(4) % 2, channels * (0.5,), channels * (0.3,))
    data = lab.ImageData("flat", "this test", ("cat", "dog"), split, split, split)
    explorer = lab.Explorer(lab.CNN((channels, 16, 16), 2, widths=[4]), data)
    Image.fromarray(np.full((40, 80, 3), (30, 60, 90), np.uint8)).save(tmp_path / "own.png")
    assert change(explorer, file=str(tmp_path / "own.png"))
    assert drawn["title"].startswith("own.png. Predicted: ")
    assert change(explorer, file="images/2.3_maps.png")  # from the project's folder
    assert drawn["title"].startswith("2.3_maps.png. Predicted: ")
    assert change(explorer, file=str(tmp_path / "own.png"))
    assert drawn["image"].shape == (channels, 16, 16)
    color = [60] if channels == 1 else [30, 60, 90]
    assert torch.equal(drawn["image"][:, 5, 5], torch.tensor(color, dtype=torch.uint8))
    assert explorer.controls["image"].disabled
    Image.new("RGB", (80, 40), (200, 200, 200)).save(tmp_path / "own.png")  # another picture
    assert change(explorer, strength=0.7)
    assert (drawn["image"] == 200).all()
    assert change(explorer, file="")
    assert drawn["title"].startswith("True class: cat")
    assert not explorer.controls["image"].disabled


def test_what_goes_wrong_is_said_and_the_picture_stays(model, data, tmp_path):
    explorer = lab.Explorer(model, data)
    (tmp_path / "<i>.png").write_text("no image")
    assert not change(explorer, file=str(tmp_path / "<i>.png"))
    said = html.unescape(re.sub(r"<.*?>", "", explorer.message.value))
    assert "DataError" in said
    assert "<i>.png cannot be decoded" in said
    assert "<i>" not in explorer.message.value
    change(explorer, file="")
    assert "Raw value" in explorer.message.value


def test_a_pixel_beside_an_image_of_ones_own_has_the_value_at_its_edge(model, data, tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "own.png")
    explorer = lab.Explorer(model, data)
    values = []
    for x in (15, 23):  # of the square image the last column, of the data's
        change(explorer, file=str(tmp_path / "own.png"), x=x)
        values.append(
            re.search(r"x = (\d+), y = \d+: <b>(.*)</b>", explorer.message.value).groups()
        )
    assert [x for x, _ in values] == ["15", "23"]
    assert values[0][1] == values[1][1]


def test_a_network_without_a_plain_map_is_told_what_works(data):
    explorer = lab.Explorer(lab.FastNet((3, 16, 24), 3, widths=[4, 8]), data)
    assert "Choose another method: gradcam" in explorer.message.value
    assert change(explorer, method="gradcam")
    assert "Raw value" in explorer.message.value


SESSION = "window.jupyterapp?.shell.currentWidget?.sessionContext"
BROWSERS = "chromium", "chromium-browser", "google-chrome"
CELL = """
import torch, labutils as lab
torch.manual_seed(0)
images = torch.randint(0, 256, (6, 3, 16, 24)).byte()
split = lab.Split(images, torch.arange(6) % 3, 3 * (0.5,), 3 * (0.3,))
data = lab.ImageData("noise", "a test", ("cat", "dog", "owl"), split, split, split)
lab.Explorer(lab.CNN((3, 16, 24), 3, widths=[4, 6]), data)
"""


@pytest.fixture
def browser():
    """A headless Chromium; without one the test is skipped, and says what is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser on the PATH: none of {', '.join(BROWSERS)}")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def address(tmp_path):
    """Of a notebook with an explorer in it, in a JupyterLab of its own."""
    kernel = {"name": "python3", "display_name": "Python 3"}
    cells = [nbformat.v4.new_code_cell(CELL)]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, tmp_path / "explorer.ipynb")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=test"]
    options += ["--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={tmp_path}"]
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options])
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(f"{url}/api?token=test"):
            break
        time.sleep(0.5)
    yield f"{url}/lab/tree/explorer.ipynb?token=test"
    server.terminate()
    server.wait(20)


def test_in_jupyterlab_a_control_changes_the_picture_and_an_error_is_read(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address)
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for(timeout=60_000)
    # A cell that is run before the kernel answers is forgotten, and its promise never settles.
    page.wait_for_function(f"{SESSION}?.session?.kernel?.status == 'idle'", timeout=60_000)
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    picture = page.locator("img.widget-image")
    picture.wait_for(timeout=120_000)
    before = picture.get_attribute("src")
    page.get_by_label("method", exact=True).select_option(label="eigencam")
    changed = "before => document.querySelector('img.widget-image').src != before"
    page.wait_for_function(changed, arg=before)
    page.get_by_label("file", exact=True).fill("/nowhere.png")
    page.get_by_label("file", exact=True).press("Enter")
    page.get_by_text("/nowhere.png is no file").wait_for()
