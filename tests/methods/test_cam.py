"""Class activation maps against their closed form; the package grad-cam behind one door."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import labutils as lab
from labutils.methods import cam
from labutils.methods.cam import METHODS


class Odd(nn.Module):
    """A network that returns something else than logits."""

    def __init__(self, change):
        super().__init__()
        self.network, self.change = make(), change

    def forward(self, images):
        return self.change(self.network(images))


AVERAGING = {
    "CNN": lambda: lab.CNN((3, 16, 16), 5, widths=[4, 6]),
    "FullyConvCNN": lambda: lab.FullyConvCNN(
        (3, 16, 16), 5, layers=[4, {"channels": 6, "pool": True}]
    ),
    "ResNet": lambda: lab.ResNet((3, 16, 16), 5, depth=8, width=4),
}


def make(kind="CNN"):
    """A network as if trained: with statistics and offsets that are not those it begins with."""
    torch.manual_seed(0)
    model = AVERAGING[kind]()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.5)
            nn.init.normal_(part.bias, std=0.5)
        elif isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
    nn.init.normal_(model.head.weight)
    return model


def some_images(count=70, channels=3, side=16):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", AVERAGING)
@pytest.mark.parametrize("class_idx", [None, 3, torch.arange(70) % 5])
def test_the_mean_of_the_raw_map_and_the_bias_are_the_logit(kind, class_idx):
    model, images = make(kind), some_images()
    found = lab.class_activation_map(model, images, class_idx)
    logits = model.eval()(images)
    classes = logits.argmax(1) if class_idx is None else torch.as_tensor(class_idx).expand(70)
    assert torch.equal(found.classes, classes)
    expected = logits.gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(found.raw.mean((1, 2)) + model.head.bias[classes], expected)
    assert torch.equal(found.predicted, logits.argmax(1))
    torch.testing.assert_close(found.confidence, logits.softmax(1).amax(1))


@pytest.mark.parametrize("kind", AVERAGING)
def test_the_raw_map_is_that_of_torch_cam(kind):
    from torchcam.methods import CAM

    model, images = make(kind).eval(), some_images(9)
    with CAM(model, [*model.stages.values()][-1], fc_layer=model.head) as cam:
        logits = model(images)
        (theirs,) = cam(2, logits, normalized=False)
    torch.testing.assert_close(lab.class_activation_map(model, images, 2).raw, theirs)


def test_explain_by_cam_is_the_plain_map():
    model, images = make(), some_images(5)
    one = lab.explain(model, images, "cam", class_idx=2)
    other = lab.class_activation_map(model, images, 2)
    assert torch.equal(one.raw, other.raw)
    assert torch.equal(one.predicted, other.predicted)


def test_raw_maps_are_signed():
    model, images = make(), some_images()
    everything = torch.cat([lab.class_activation_map(model, images, k).raw for k in range(5)])
    assert everything.min() < -1
    assert everything.max() > 1


def test_maps_are_the_positive_part_at_the_size_of_the_image():
    images = some_images(5)
    found = lab.class_activation_map(make(), images)
    assert found.raw.shape == (5, 4, 4)
    assert found.maps.shape == (5, 16, 16)
    large = F.interpolate(found.raw[:, None].relu(), (16, 16), mode="bilinear")[:, 0]
    for mine, theirs in zip(found.maps, large):
        torch.testing.assert_close(mine * theirs.max(), theirs)
        assert mine.max() == pytest.approx(1) or not theirs.any()


def test_where_nothing_speaks_for_a_class_its_map_is_zero():
    model = make()
    with torch.no_grad():
        model.head.weight[2] = -model.head.weight[2].abs()  # its inputs are not negative
    found = lab.class_activation_map(model, some_images(3), 2)
    assert torch.equal(found.maps, torch.zeros(3, 16, 16))


@pytest.mark.parametrize("kind", AVERAGING)
@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
@pytest.mark.parametrize("class_idx", [None, 3])
def test_gradients_give_the_plain_map_over_its_number_of_pixels(kind, method, class_idx):
    model, images = make(kind), some_images()
    plain = lab.class_activation_map(model, images, class_idx)
    other = lab.explain(model, images, method, class_idx=class_idx)
    pixels = plain.raw[0].numel()
    torch.testing.assert_close(other.raw * pixels, plain.raw, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.maps, plain.maps, rtol=1e-3, atol=1e-3)
    assert torch.equal(other.classes, plain.classes)
    torch.testing.assert_close(other.confidence, plain.confidence)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "eigencam"])
def test_every_method_gives_what_the_package_gives(method, capfd):
    import pytorch_grad_cam

    model, images = make().eval(), some_images(3)
    found = lab.explain(model, images, method, class_idx=1)
    assert capfd.readouterr() == ("", "")
    cam = getattr(pytorch_grad_cam, METHODS[method])(model, [model.stages["stage2"]])
    target = pytorch_grad_cam.utils.model_targets.ClassifierOutputTarget(1)
    theirs = torch.as_tensor(cam(images.clone(), [target] * 3))
    # They subtract each map's minimum, and resize what is scaled already.
    raw = found.raw.clamp(min=0)
    raw = raw - raw.amin((1, 2), keepdim=True)
    ours = F.interpolate(raw[:, None], (16, 16), mode="bilinear")[:, 0]
    ours = ours - ours.amin((1, 2), keepdim=True)
    ours = ours / ours.amax((1, 2), keepdim=True).clamp(min=1e-7)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


IN_PLACE = [
    ("CNN", "stages.stage2.1"),
    ("CNN", "stages.stage1.4"),
    ("ResNet", "stages.stage2.0.bn2"),
]


@pytest.mark.parametrize(("kind", "layer"), IN_PLACE)
@pytest.mark.parametrize("method", ["gradcam", "hirescam", "layercam"])
def test_a_layer_that_the_next_one_writes_over_has_the_map_of_its_own_output(kind, layer, method):
    model, images = make(kind).eval(), some_images(4)
    kept = []

    def keep(part, inputs, output):  # a copy goes on
        output.retain_grad()
        kept.append(output)
        return output.clone()

    found = lab.explain(model, images, method, layer, class_idx=1)
    with model.get_submodule(layer).register_forward_hook(keep):
        model(images)[:, 1].sum().backward()
    maps, gradients = kept[0].detach(), kept[0].grad
    weights = {
        "gradcam": gradients.mean((2, 3), keepdim=True),
        "hirescam": gradients,
        "layercam": gradients.relu(),
    }
    expected = (weights[method] * maps).sum(1)
    torch.testing.assert_close(found.raw, expected, rtol=1e-3, atol=1e-5)


def test_of_equal_probabilities_the_class_that_is_explained_is_the_predicted_one():
    model = make()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.0, 1e-8, 0.0, 0.0, 0.0]))
    found = lab.class_activation_map(model, some_images(2))
    assert found.classes.tolist() == found.predicted.tolist() == [1, 1]


def test_an_average_over_both_axes_is_an_average():
    model = make()
    expected = lab.class_activation_map(model, some_images(2))
    model.pool[0] = nn.AdaptiveAvgPool2d((1, 1))
    assert torch.equal(lab.class_activation_map(model, some_images(2)).raw, expected.raw)


def test_eigencam_is_the_first_component_and_high_where_the_maps_are():
    model, images = make(), some_images(40)
    found = lab.explain(model, images, "eigencam").raw
    with torch.no_grad():
        values = model.eval().features(images).flatten(2).transpose(1, 2)  # [n, pixels, channels]
    component = torch.linalg.svd(values - values.mean(1, keepdim=True)).Vh[:, :1].transpose(1, 2)
    expected = (values - values.mean(1, keepdim=True)) @ component
    torch.testing.assert_close(found.flatten(1).abs(), expected[..., 0].abs(), rtol=1e-3, atol=1e-3)
    assert ((found.flatten(1) * values.sum(2)).sum(1) > 0).all()


def test_scorecam_takes_one_image_at_a_time():
    model, sizes = make(), []
    model.register_forward_hook(lambda _, images, __: sizes.append(len(images[0])))
    lab.explain(model, some_images(3), "scorecam")
    assert sizes.count(1) == 4  # and one to find the layers; the others are of masked images
    assert 3 not in sizes


@pytest.mark.parametrize("method", ["gradcam", "layercam"])
def test_maps_are_the_same_where_no_gradients_are_recorded(method):
    expected = lab.explain(make(), some_images(2), method).raw
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert lab.explain(make(), some_images(2), method).raw.equal(expected)


@pytest.mark.parametrize("layer", ["stages.stage1", "stages.stage1.3", "stages.stage2.0"])
def test_other_layers_have_maps_of_their_own_size(layer):
    found = lab.explain(make(), some_images(2), layer=layer)
    side = {"stages.stage1": 8, "stages.stage1.3": 16, "stages.stage2.0": 8}[layer]
    assert found.raw.shape == (2, side, side)
    assert found.maps.shape == (2, 16, 16)


@pytest.mark.parametrize("kind", AVERAGING)
def test_nothing_below_the_layer_is_given_a_gradient(kind):
    model, needs = make(kind), []
    model.stages["stage1"].register_forward_hook(
        lambda _, __, maps: needs.append(maps.requires_grad)
    )
    lab.explain(model, some_images(2), layer="stages.stage2")
    assert not any(needs)
    lab.explain(model, some_images(2), layer="stages.stage1.0")
    assert any(needs)


def break_inside(monkeypatch):
    import pytorch_grad_cam

    def fail(*_, **__):
        raise IndexError("inside")

    monkeypatch.setattr(pytorch_grad_cam.GradCAM, "get_cam_weights", fail)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("method", ["plain", "gradcam"])
def test_the_model_is_left_as_it_was(method, breaks, frozen, monkeypatch):
    model, images = make().train(), some_images(2)
    model.stages["stage1"].eval()
    model(images).sum().backward()
    model.head.weight.requires_grad_(False)
    if frozen:
        model.requires_grad_(False)
    before = copy.deepcopy(model)
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    explain = lab.explain if method == "gradcam" else lab.class_activation_map
    if breaks:
        images[1] = float("nan")
        if method == "gradcam":
            break_inside(monkeypatch)
        with pytest.raises((ValueError, IndexError), match=r"not finite for image 1|inside"):
            explain(model, images)
    else:
        explain(model, images)
        assert not images.requires_grad
    for part, other in zip(model.modules(), before.modules()):
        assert part.training == other.training
        assert not part._forward_hooks
        assert not part._backward_hooks
    for p, other, gradient in zip(model.parameters(), before.parameters(), gradients):
        assert torch.equal(p, other)
        assert p.requires_grad == other.requires_grad
        assert gradient is None or torch.equal(p.grad, gradient)
    assert all(a.equal(b) for a, b in zip(model.buffers(), before.buffers()))


def test_one_grey_image_of_another_size():
    torch.manual_seed(0)
    model, image = lab.CNN((1, 16, 16), 5, widths=[4, 6]), some_images(1, 1, 24)
    for found in (lab.class_activation_map(model, image), lab.explain(model, image)):
        assert found.maps.shape == (1, 24, 24)


BAD = {
    "images of a class too many": (
        {"class_idx": torch.tensor([0, 1], dtype=torch.int32)},
        r"class_idx = \[0, 1\]\. Give whole numbers from 0 to 4, one for all or one for each",
    ),
    "class by name": ({"class_idx": "cat"}, r"class_idx = 'cat'\. Give whole numbers from 0 to 4"),
    "class too high": ({"class_idx": 5}, r"class_idx = 5\. Give whole numbers from 0 to 4, one"),
    "class below 0": ({"class_idx": -1}, r"class_idx = -1\. "),
    "a part of a class": ({"class_idx": 1.5}, r"class_idx = 1\.5\. "),
    "two classes for three": (
        {"class_idx": torch.tensor([0, 1])},
        r"class_idx = \[0, 1\]\. .*of 3",
    ),
    "one image": (
        {"images": some_images(1)[0]},
        r"images are torch.float32 \[3, 16, 16\].*\[None\]",
    ),
    "bytes": ({"images": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}, r"images are torch.uint8"),
    "no tensor": ({"images": "cat.png"}, r"images are cat.png\. Give normalised images"),
    "no image": ({"images": some_images(0)}, r"images: there are none"),
    "numbers of NumPy": (
        {"images": some_images(1).double()},
        r"images are torch.float64 on cpu\. Give torch.float32 on cpu, as the model is",
    ),
    "images too small": (
        {"images": some_images(1, side=2), "model": lab.CNN((3, 16, 16), 5, widths=[4, 6, 8])},
        r"images are \[1, 3, 2, 2\], which the model cannot take \(.*\)\. Give them at the size",
    ),
    "grey": ({"images": some_images(3, 1)}, r"images have 1 channels, the model takes 3.*expand"),
    "colour": (
        {"images": some_images(3), "model": lab.CNN((1, 16, 16), 5, widths=[4, 6])},
        r"images have 3 channels, the model takes 1\. Give the images that it was made for",
    ),
}


@pytest.mark.parametrize(("arguments", "wanted"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("explain", [lab.class_activation_map, lab.explain])
def test_bad_arguments_are_named(explain, arguments, wanted):
    with pytest.raises(ValueError, match=wanted):
        explain(**{"model": make(), "images": some_images(3)} | arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lab.FastNet((3, 16, 16), 5, widths=[4, 8]),
        lambda: lab.SimpleCNN((3, 16, 16), 5, widths=[4, 6]),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 5)),
    ],
)
def test_a_network_without_averages_has_no_plain_map_and_is_told_what_works(make):
    with pytest.raises(ValueError, match=r"does not average .* Choose another method: gradcam"):
        lab.class_activation_map(make(), some_images(1))


def test_the_plain_map_is_of_a_head_that_is_one_linear_layer():
    model = make()
    model.head = nn.Sequential(nn.Dropout(), model.head)
    with pytest.raises(ValueError, match=r"does not average .* before a linear head"):
        lab.class_activation_map(model, some_images(1))


def test_a_network_of_ones_own_may_name_its_layers_in_any_order():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.first = nn.Conv2d(4, 6, 3), nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(6, 5)

        def forward(self, images):
            return self.head(self.late(self.first(images)).mean((2, 3)))

    found = lab.explain(Own(), some_images(2), layer="late")
    assert found.raw.shape[0] == 2
    with pytest.raises(ValueError, match=r"\[2, 1, 16, 16\], which the model cannot take"):
        lab.explain(Own(), some_images(2, channels=1), layer="late")


def test_a_layer_that_is_used_twice_is_not_offered():
    """A block's ReLU stands between its convolutions and behind their sum."""
    model = make("ResNet")
    offered, _ = cam.layers_with_maps(model, some_images(1))
    assert "stages.stage3.0" in offered
    assert not [name for name in offered if name.endswith("relu")]
    with pytest.raises(
        ValueError, match=r"'stages.stage3.0.relu' has no maps .*, or is used twice"
    ):
        lab.explain(model, some_images(1), layer="stages.stage3.0.relu")


def test_a_model_in_half_precision_has_the_plain_map_alone():
    model, images = make().bfloat16(), some_images(2).bfloat16()
    assert lab.class_activation_map(model, images).raw.isfinite().all()
    with pytest.raises(ValueError, match=r"torch.bfloat16, which grad-cam cannot take.*float\(\)"):
        lab.explain(model, images)


def test_a_network_that_fits_one_size_of_image_says_so():
    model = lab.SimpleCNN((3, 16, 16), 5, widths=[4, 6])
    with pytest.raises(ValueError, match=r"\[1, 3, 24, 24\], which the model cannot take"):
        lab.explain(model, some_images(1, side=24))


@pytest.mark.parametrize("layer", ["stages.stage9", "head", "pool.0", ""])
def test_a_layer_without_maps_is_named_with_those_that_have_some(layer):
    wanted = rf"layer = {layer!r} has no maps .* with maps: stages.stage1, stages.stage1.0, .*"
    with pytest.raises(ValueError, match=wanted):
        lab.explain(make(), some_images(1), layer=layer)


def test_a_layer_is_one_name_and_none_of_the_plain_map():
    with pytest.raises(ValueError, match=r"explain: layer = \['stages.stage1'\]\."):
        lab.explain(make(), some_images(1), layer=["stages.stage1"])
    with pytest.raises(ValueError, match=r"layer = 'stages.stage1', where 'cam' takes the last"):
        lab.explain(make(), some_images(1), "cam", layer="stages.stage1")


def test_without_stages_a_layer_has_to_be_given():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(4, 5))
    with pytest.raises(ValueError, match=r"layer is not given\. Layers with maps: 0, 1\."):
        lab.explain(model, some_images(1))
    assert lab.explain(model, some_images(1), layer="1").maps.shape == (1, 16, 16)


@pytest.mark.parametrize("method", ["grad-cam", "", None])
def test_an_unknown_method_is_named_with_the_known_ones(method):
    with pytest.raises(ValueError, match=rf"method = {method!r}\..* 'gradcam', 'gradcam\+\+'"):
        lab.explain(make(), some_images(1), method)


@pytest.mark.parametrize("class_idx", [None, torch.arange(7) % 5])
@pytest.mark.parametrize("explain", [lab.class_activation_map, lab.explain])
def test_in_several_batches_every_image_has_its_own_map(explain, class_idx, monkeypatch):
    model, images = make(), some_images(7)
    whole = explain(model, images, class_idx=class_idx)
    monkeypatch.setattr(cam, "_PIXELS", 3 * 16 * 16)  # batches of 3, 3 and 1
    parts = explain(model, images, class_idx=class_idx)
    for name in ("raw", "classes", "predicted", "confidence"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_grad_cam_is_what_explains_unless_another_is_named():
    model, images = make(), some_images(3)
    assert lab.explain(model, images).maps.equal(lab.explain(model, images, "gradcam").maps)
    assert not lab.explain(model, images).maps.equal(lab.explain(model, images, "layercam").maps)


@pytest.mark.parametrize(
    ("change", "found"), [(lambda x: (x, x), "tuple"), (lambda x: x[:, 0], r"torch.Size\(\[1\]\)")]
)
def test_a_network_that_returns_no_logits_is_told_what_it_returns(change, found):
    with pytest.raises(
        ValueError, match=rf"^explain: the model returned {found}, not logits \[N, "
    ):
        lab.explain(Odd(change), torch.zeros(2, 3, 16, 16), "gradcam")


@pytest.mark.parametrize("method", ["gradcam", "eigencam", "scorecam"])
def test_nothing_of_an_explanation_stays_in_memory(method, monkeypatch):
    """The copy of the model and its graph go at once, not when Python looks for cycles."""
    copies, copied = [], copy.deepcopy

    def noted(model):
        made = copied(model)
        copies.append(weakref.ref(made))
        return made

    monkeypatch.setattr(cam, "copy", SimpleNamespace(deepcopy=noted))
    gc.disable()
    try:
        for _ in range(2):  # the first backward pass of a process may keep something of its own
            lab.explain(make(), some_images(3), method)
        assert copies[1]() is None
    finally:
        gc.enable()
