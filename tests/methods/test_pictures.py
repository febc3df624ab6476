"""Pictures of maps: chosen by class and seed, and of an image file of one's own."""

import dataclasses
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

import labutils as lab
from labutils import __main__ as cli
from labutils.training import cards


def make():
    torch.manual_seed(0)
    return lab.CNN((3, 16, 16), 5, widths=[4, 6])


def some_images(count):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_pictures_of_every_class_with_a_mistake_among_them(tmp_path, monkeypatch):
    drawn, real = [], lab.plots.explained
    monkeypatch.setattr(
        lab.plots, "explained", lambda *a, **k: drawn.append((a, k)) or real(*a, **k)
    )
    model, images = make(), some_images(40)
    found = lab.class_activation_map(model, images)
    # Every prediction is right but one, of class 2, which the seed alone would not have chosen.
    labels = torch.arange(40) % 5
    found = dataclasses.replace(found, predicted=torch.where(torch.arange(40) == 17, 0, labels))
    pixels = (some_images(40) * 40 + 128).clamp(0, 255).byte()
    names = ["tench", "English springer", "a/b", "été", "5"]
    written = lab.save_cam_visualization(tmp_path, pixels, found, labels, names, per_class=2)
    assert len(written) == 10
    assert sorted(path.parent.name for path in written) == sorted(
        2 * ["tench", "English_springer", "a_b", "été", "5"]
    )
    assert tmp_path / "a_b" / "17.png" in written
    for path, ((image, heat), given) in zip(written, drawn, strict=True):
        i, meant = int(path.stem), names[labels[int(path.stem)]]
        assert path.parent.name == re.sub("[ /]", "_", meant)
        assert plt.imread(path).shape[0] > 200
        assert image.equal(pixels[i])
        assert heat.equal(found.maps[i])
        answer, evidence = names[found.predicted[i]], names[found.classes[i]]
        title = f"True class: {meant}. Predicted: {answer}, {100 * found.confidence[i]:.0f} % sure"
        another = f". Evidence for {evidence}" if evidence != answer else ""
        assert given["title"] == title + another
    assert {given["title"].count("Evidence for") for _, given in drawn} == {0, 1}
    again = lab.save_cam_visualization(tmp_path, pixels, found, labels, names, per_class=2)
    other = lab.save_cam_visualization(tmp_path, pixels, found, labels, names, per_class=2, seed=1)
    assert again == written != other


def test_pictures_are_of_tensors(tmp_path):
    found, pixels = lab.class_activation_map(make(), some_images(2)), np.zeros((2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"^save_cam_visualization: images = .*Tensor"):
        lab.save_cam_visualization(tmp_path, pixels, found, torch.zeros(2), list("abcde"))


def test_pictures_that_cannot_be_written_are_named(tmp_path):
    images = some_images(2)
    found = lab.class_activation_map(make(), images)
    labels, names = found.predicted.clamp(min=1), list("abcde")
    with pytest.raises(ValueError, match=r"images are torch.float32 \[2, 3, 16, 16\]"):
        lab.save_cam_visualization(tmp_path, images, found, labels, names)
    with pytest.raises(ValueError, match=r"uint8 \[1, .* 2 labels.* of uint8 \[2, C, 16, 16\]"):
        lab.save_cam_visualization(tmp_path, images[:1].byte(), found, labels, names)
    larger = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)  # of which a part would be shown
    with pytest.raises(ValueError, match=r"uint8 \[2, 3, 32, 32\]"):
        lab.save_cam_visualization(tmp_path, larger, found, labels, names)
    for few, of in ((names[:1], labels + 0), (names, labels + 5)):
        with pytest.raises(ValueError, match=rf"there are {len(few)} classes, labels and predict"):
            lab.save_cam_visualization(tmp_path, images.byte(), found, of, few)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        lab.save_cam_visualization(tmp_path / "file", images.byte(), found, labels, names)


@pytest.fixture
def run():
    """A network that answers by colour: what is red is class 0, what is green class 1."""
    labels = torch.arange(60) % 2
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (60, 3, 16, 16), dtype=torch.uint8, generator=noise)
    images[labels == 0, 0] += 150
    images[labels == 1, 1] += 150
    split = lab.Split(images, labels, (0.3, 0.3, 0.1), (0.3, 0.3, 0.1))
    data = lab.ImageData("colours", "this test", ("red", "green"), split, split, split)
    config = lab.TrainConfig(epochs=3, batch_size=10, lr=0.02)
    torch.manual_seed(0)
    model = lab.CNN((3, 16, 16), 2, widths=[4, 6])
    return lab.train(model, data, config, name="colours", track=None, progress=False)


@pytest.fixture
def photo(tmp_path):
    """Green on the left, red on the right, twice as wide as high: the centre is half and half."""
    pixels = np.full((60, 120, 3), 20, dtype=np.uint8)
    pixels[:, :60, 1] = pixels[:, 60:, 0] = 190
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("method", ["cam", "gradcam", "layercam"])
@pytest.mark.parametrize(("name", "half"), [("red", 1), ("green", 0)])
def test_the_evidence_for_a_class_lies_where_its_colour_is(
    run, photo, tmp_path, capsys, monkeypatch, method, name, half
):
    drawn = {}
    real = lab.plots.explained
    monkeypatch.setattr(
        lab.plots, "explained", lambda *a, **k: drawn.update(image=a[0], heat=a[1]) or real(*a, **k)
    )
    out = tmp_path / "pictures" / "out.png"
    command = ["cam", str(photo), "--model", run.name, "--class", name, "--out", str(out)]
    assert cli.main([*command, "--method", method]) == 0
    title, path = capsys.readouterr().out.splitlines()
    assert re.match(r"Predicted: (red|green), \d+ % sure", title)
    assert path == str(out)
    assert plt.imread(out).shape[0] > 200
    sides = drawn["heat"].chunk(2, dim=1)
    assert sides[half].mean() > 2 * sides[1 - half].mean()
    # The centre of the photo, sharper than the network sees it, under a map of the same size.
    assert drawn["image"].shape == (3, 320, 320)
    assert drawn["heat"].shape == (320, 320)
    assert (drawn["image"][1, :, :150] > 180).all()
    assert (drawn["image"][0, :, 170:] > 180).all()


def test_a_picture_goes_beside_the_image_of_nobody_else(run, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["cam", "photo.png", "--model", run.name]) == 0
    assert capsys.readouterr().out.endswith("\nphoto-cam.png\n")
    assert (tmp_path / "photo-cam.png").exists()


def test_a_picture_does_not_take_the_place_of_the_image(run, photo, capsys):
    before = photo.read_bytes()
    assert cli.main(["cam", str(photo), "--model", run.name, "--out", str(photo)]) == 1
    assert "is the image itself. Give another file" in capsys.readouterr().err
    assert photo.read_bytes() == before


def test_a_folder_is_given_a_picture(run, photo, tmp_path, capsys):
    assert cli.main(["cam", str(photo), "--model", run.name, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "photo-cam.png").exists()


def test_a_picture_has_the_format_that_its_name_says(run, photo, tmp_path, capsys):
    command = ["cam", str(photo), "--model", run.name, "--out"]
    assert cli.main([*command, str(tmp_path / "o.jpg")]) == 0
    assert Image.open(tmp_path / "o.jpg").format == "JPEG"
    assert cli.main([*command, str(tmp_path / "o.xyz")]) == 1
    assert "xyz" in capsys.readouterr().err
    assert not (tmp_path / "o.xyz").exists()


def test_a_grey_image_is_shown_to_a_network_for_colours(run, tmp_path, capsys):
    Image.fromarray(np.full((30, 20), 99, dtype=np.uint8)).save(tmp_path / "grey.png")
    arguments = ["--model", run.name, "--out", str(tmp_path / "o.png")]
    assert cli.main(["cam", str(tmp_path / "grey.png"), *arguments]) == 0


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["--class", "gren"], r"class = 'gren'\. .*'red' or 'green'.* Did you mean 'green'\?"),
        (["--method", "gradcm"], r"method = 'gradcm'\. .* Did you mean 'gradcam'\?"),
        (["--method", "gradcam", "--layer", "head"], r"layer = 'head' has no maps.*stages\."),
        (["--model", "colour"], r"load_run: name = 'colour'.*Did you mean 'colours'\?"),
        (["--out", "{photo}/x.png"], r"photo\.png"),
    ],
)
def test_what_cannot_be_shown_is_one_message_and_no_file(
    run, photo, tmp_path, capsys, more, wanted
):
    before = {path for path in tmp_path.rglob("*") if "runs" not in str(path)}
    arguments = ["cam", str(photo), "--model", run.name, "--out", str(tmp_path / "o.png"), *more]
    assert cli.main([a.format(photo=photo) for a in arguments]) == 1
    captured = capsys.readouterr()
    assert re.search(wanted, captured.err)
    assert captured.out == ""
    assert {path for path in tmp_path.rglob("*") if "runs" not in str(path)} == before


def test_a_corrupt_file_is_named(run, tmp_path, capsys):
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8\xff no picture")
    assert cli.main(["cam", str(tmp_path / "x.jpg"), "--model", run.name]) == 1
    assert re.search(r"x\.jpg cannot be decoded .*Read are PNG, JPEG", capsys.readouterr().err)


def test_a_card_that_does_not_tell_its_classes_says_what_to_do(run, photo, capsys):
    card = cards.read(run.path / "card.json")
    del card["info"]["data"]["classes"]
    cards.write(run.path / "card.json", card)
    assert cli.main(["cam", str(photo), "--model", run.name]) == 1
    assert "Train it with retrain=True" in capsys.readouterr().err
