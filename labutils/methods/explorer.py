"""For JupyterLab: one image, where a network looks in it, and the number at a pixel."""

import html
import io
from functools import lru_cache
from pathlib import Path

import ipywidgets as widgets
from torch import Tensor, nn

from .. import plots
from ..base.files import project_dir
from ..data.tensors import ImageData
from .cam import METHODS, Explanation, explain, layers_with_maps
from .pictures import own_image, verdict


class Explorer(widgets.VBox):
    """Controls, what there is to say, and a picture: image, map, one over the other.

    model: classifies the images of `data`, on the same device.
    controls, by name: image: its number in the test split; file: the path of an image of one's own,
        absolute or from the project's folder, shown instead while there is one; class, method,
        layer: as in explain; strength: of the map over the image; x, y: the pixel whose raw value
        is said.
    What goes wrong is said in `message`, and `picture` stays until something can be shown again.
    """

    def __init__(self, model: nn.Module, data: ImageData) -> None:
        _, height, width = data.image_shape
        layers, _ = layers_with_maps(model, data.test.normalise(data.test.images[:1]))
        classes = [("as predicted", None), *((name, k) for k, name in enumerate(data.classes))]
        once = {"continuous_update": False}  # not for every step on the way
        self.controls = {
            "image": widgets.IntSlider(0, max=len(data.test) - 1, **once),
            "file": widgets.Text(placeholder="path of an image of your own", **once),
            "class": widgets.Dropdown(options=classes),
            "method": widgets.Dropdown(options=["cam", *METHODS]),
            "layer": widgets.Dropdown(options=[("the last stage", None), *zip(layers, layers)]),
            "strength": widgets.FloatSlider(0.5, max=1.0, step=0.05, **once),
            "x": widgets.IntSlider(width // 2, max=width - 1, **once),
            "y": widgets.IntSlider(height // 2, max=height - 1, **once),
        }
        self.message, self.picture = widgets.HTML(), widgets.Image(format="png")
        self.picture.layout.max_width = "100%"
        rows = widgets.Box([*self.controls.values()], layout={"flex_flow": "row wrap"})
        super().__init__([rows, self.message, self.picture])
        self._model, self._split, self._classes = model, data.test, data.classes
        # Strength and pixel are changed often, and the map need not be computed again.
        self._explained = lru_cache(maxsize=1)(self._explain)
        for name, control in self.controls.items():
            control.description = name
            control.observe(self._show, "value")
        self._show()

    def _explain(self, number, file, class_idx, method, layer) -> tuple[Tensor, str, Explanation]:
        """The image, uint8 [C, H, W], what is known of it, and its map."""
        if file:
            path = project_dir() / Path(file).expanduser()
            pixels = own_image(path, self._split.images.shape[1:])
            pixels, about = pixels.to(self._split.images.device), path.name
        else:
            pixels = self._split.images[number, None]
            about = f"True class: {self._classes[self._split.labels[number]]}"
        found = explain(self._model, self._split.normalise(pixels), method, layer, class_idx)
        return pixels[0].cpu(), about, found

    def _show(self, _=None) -> None:
        values = [control.value for control in self.controls.values()]
        number, file, class_idx, method, layer, strength, x, y = values
        self.controls["image"].disabled = bool(file)
        self.controls["layer"].disabled = method == "cam"  # which has no choice
        layer = None if method == "cam" else layer
        try:
            explained = self._explain if file else self._explained  # a file may be another by now
            image, about, found = explained(number, file, class_idx, method, layer)
            title = f"{about}. {verdict(found, self._classes, 0)}"
            options = {"title": title, "strength": strength, "pixel": (x, y)}
            png = io.BytesIO()
            plots.explained(image, found.maps[0].cpu(), **options).savefig(png, format="png")
            sizes = zip((y, x), found.raw.shape[1:], image.shape[1:])
            # An image of one's own is square, also where the network's are not.
            row, column = (min(at * cells // pixels, cells - 1) for at, cells, pixels in sizes)
        except Exception as error:  # JupyterLab would put it into a log that nobody opens
            said = html.escape(f"{type(error).__name__}: {error}")
            self.message.value = f'<b style="color: var(--jp-error-color1, #b00)">{said}</b>'
            return
        self.picture.value = png.getvalue()
        value = f"{float(found.raw[0, row, column]):+.4g}"
        self.message.value = f"Raw value at x = {x}, y = {y}: <b>{value}</b>"
