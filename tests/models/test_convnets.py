"""The convolutional networks: their common form, published sizes, twins, and refused arguments."""

import functools
import json
from types import FunctionType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

import labutils as lab
from labutils.training.key import identify

IMAGES = (3, 32, 32)
SMALL = {
    "simple": ("SimpleCNN", {"widths": [4, 6]}),
    "cnn": ("CNN", {"widths": [4, 6, 8]}),
    "fullyconv": ("FullyConvCNN", {"layers": [4, {"channels": 6, "pool": True}, 8]}),
    "resnet18": ("ResNet", {"width": 4}),
    "resnet20": ("ResNet", {"depth": 20, "width": 4}),
    "plain20": ("ResNet", {"depth": 20, "width": 4, "residual": False}),
    "fast": ("FastNet", {"widths": [4, 8, 8]}),
}
AVERAGING = [name for name in SMALL if name not in ("simple", "fast")]


def build(name, image_shape=IMAGES, num_classes=10, seed=0):
    model, options = SMALL[name]
    torch.manual_seed(seed)
    return getattr(lab, model)(image_shape, num_classes, **options)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SMALL)
def test_stages_in_order_then_pool_and_head_are_the_network(name):
    model, images = build(name).eval(), noise(2, *IMAGES)
    maps = images
    for stage in model.stages.values():
        maps = stage(maps)
    assert torch.equal(model.features(images), maps)
    assert torch.equal(model(images), model.head(model.pool(maps)))
    assert model.pool(maps).shape == (2, model.head.in_features)
    assert isinstance(model.head, nn.Linear)
    assert model.head.out_features == 10


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_belongs_to_one_stage_or_the_head(name):
    model = build(name)
    parts = [p for part in (*model.stages.values(), model.head) for p in part.parameters()]
    assert sorted(map(id, parts)) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("name", AVERAGING)
def test_averaging_networks_score_the_mean_of_their_last_maps(name):
    model, images = build(name).eval(), noise(2, *IMAGES)
    maps = model.features(images)
    assert maps.shape[1] == model.head.in_features
    torch.testing.assert_close(model(images), model.head(maps.mean(dim=(2, 3))))


@pytest.mark.parametrize("name", SMALL)
def test_a_spec_builds_the_same_network_again_and_the_seed_names_it(name):
    model = build(name, seed=3)
    spec = json.loads(json.dumps(model.spec))
    torch.manual_seed(3)
    twin = lab.build(spec)
    assert twin.spec == model.spec == spec
    assert str(twin) == str(model)
    state = twin.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert identify(model, 3) == (spec, "seed")


def test_a_spec_leaves_out_defaults_however_they_are_given():
    spec = {"model": "CNN", "image_shape": [3, 32, 32], "num_classes": 10}
    assert lab.CNN((3, 32, 32), 10).spec == spec
    assert lab.CNN([3, 32, 32], 10, widths=[64, 128, 256]).spec == spec
    assert lab.CNN(torch.zeros(1, 3, 32, 32).shape[1:], 10).spec == spec


def test_a_layer_that_changes_later_does_not_change_the_spec():
    layer = {"channels": 4}
    model = lab.FullyConvCNN(IMAGES, 2, layers=(layer,))
    layer["channels"] = 5
    assert model.spec["layers"] == [{"channels": 4}]


@pytest.mark.parametrize("name", SMALL)
def test_a_gradient_reaches_every_parameter_that_can_be_trained(name):
    model = build(name).train()
    F.cross_entropy(model(noise(8, *IMAGES)), torch.arange(8)).backward()
    for key, value in model.named_parameters():
        if value.requires_grad:
            assert value.grad.isfinite().all(), key
            assert value.grad.any(), key
        else:
            assert value.grad is None


@pytest.mark.parametrize("name", SMALL)
def test_a_network_learns_to_tell_colours_apart(name):
    model, labels = build(name, num_classes=3).train(), torch.arange(12) % 3
    colours = F.one_hot(labels, 3).float()[:, :, None, None]
    images = noise(12, *IMAGES) / 2 + 2 * colours
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.02)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", SMALL)
def test_memory_format_and_bf16_hardly_change_the_logits(name):
    model, images = build(name).eval(), noise(4, *IMAGES)
    logits = model(images)
    last = torch.channels_last
    torch.testing.assert_close(model(images.to(memory_format=last)), logits)
    model.to(memory_format=last)
    torch.testing.assert_close(model(images.to(memory_format=last)), logits)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images.to(memory_format=last))
    assert half.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits of each number.
    torch.testing.assert_close(half.float(), logits, rtol=0, atol=0.02 * logits.abs().max().item())


smallest = {"simple": 4, "cnn": 8, "fullyconv": 2, "fast": 9}


@settings(max_examples=40)
@given(
    st.sampled_from(list(SMALL)),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(2, 5),
)
def test_a_network_takes_the_images_it_was_built_for_or_is_not_built(
    name, channels, height, width, num_classes
):
    shape = (channels, height, width)
    if min(height, width) < smallest.get(name, 1):
        with pytest.raises(ValueError, match=r"image_shape = \(.*\)"):
            build(name, shape)
    else:
        model = build(name, shape, num_classes).eval()
        logits = model(noise(2, *shape))
        assert logits.shape == (2, num_classes)
        assert logits.isfinite().all()


@pytest.mark.parametrize("name", [*AVERAGING, "fast"])
def test_a_network_that_pools_whole_maps_takes_larger_images_too(name):
    assert build(name).eval()(noise(2, 3, 50, 41)).shape == (2, 10)


# Sizes as published, and what the layers add up to.


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
@pytest.mark.parametrize("residual", [True, False])
def test_the_cifar_family_has_the_sizes_of_the_paper(depth, millions, residual):
    """He et al. 2016, table 6."""
    model = lab.ResNet(IMAGES, 10, depth=depth, residual=residual)
    digits = len(str(millions).partition(".")[2])
    assert round(lab.num_parameters(model) / 1e6, digits) == millions
    assert sum(isinstance(part, (nn.Conv2d, nn.Linear)) for part in model.modules()) == depth


@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(2, 12))
def test_the_cifar_family_has_a_closed_formula(n, width, num_classes):
    model = lab.ResNet((1, 8, 8), num_classes, depth=6 * n + 2, width=width)
    w, blocks = width, 2 * n
    weights = 9 * w + 9 * w * w * (blocks + 2 + 4 * (blocks - 1) + 8 + 16 * (blocks - 1))
    norms = 2 * (w + blocks * (w + 2 * w + 4 * w))
    head = 4 * w * num_classes + num_classes
    assert lab.num_parameters(model) == weights + norms + head


def test_default_networks_cost_what_their_formulas_say():
    def conv(inputs, outputs, pixels):  # parameters with batch norm, FLOPs
        weights = 9 * inputs * outputs
        return weights + 2 * outputs, 2 * weights * pixels

    table = [(3, 64, 1024), (64, 64, 1024), (64, 128, 256), (128, 128, 256), (128, 256, 64)]
    layers = [conv(*row) for row in [*table, (256, 256, 64)]]
    parameters, flops = (sum(column) for column in zip(*layers))
    head = (256 * 10 + 10, 2 * 256 * 10)
    for model in (lab.CNN(IMAGES, 10), lab.FullyConvCNN(IMAGES, 10)):
        total = lab.summary(model, IMAGES).loc["total"]
        assert (total.parameters, total.FLOPs) == (parameters + head[0], flops + head[1])
    total = lab.summary(lab.SimpleCNN(IMAGES, 10), IMAGES).loc["total"]
    weights = [9 * 3 * 32, 9 * 32 * 64, 64 * 64 * 256, 256 * 10]
    assert total.parameters == sum(weights) + 32 + 64 + 256 + 10
    assert total.FLOPs == 2 * (weights[0] * 1024 + weights[1] * 256 + weights[2] + weights[3])


# The networks against other code that computes the same.


def norm(state, name, images):
    return F.batch_norm(images, None, None, state[f"{name}.weight"], state[f"{name}.bias"], True)


@pytest.mark.parametrize("residual", [True, False])
def test_the_cifar_family_computes_what_the_paper_says(residual):
    """He et al. 2016, section 4.2: 1 + 6n layers and a head, shortcuts of option A."""
    torch.manual_seed(0)
    model = lab.ResNet(IMAGES, 10, depth=20, width=4, residual=residual).train()
    for value in model.parameters():  # so that offsets and scales count
        nn.init.normal_(value, std=0.3)
    state, images = model.state_dict(), noise(4, *IMAGES)
    maps = F.conv2d(images, state["stages.stem.0.weight"], padding=1)
    maps = norm(state, "stages.stem.1", maps).relu()
    for stage in (1, 2, 3):
        for block in range(3):
            name = f"stages.stage{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            out = F.conv2d(maps, state[f"{name}.conv1.weight"], padding=1, stride=stride)
            out = norm(state, f"{name}.bn1", out).relu()
            out = norm(
                state, f"{name}.bn2", F.conv2d(out, state[f"{name}.conv2.weight"], padding=1)
            )
            if residual:
                out[:, : maps.shape[1]] += maps[:, :, ::stride, ::stride]
            maps = out.relu()
    logits = maps.mean((2, 3)) @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-4)


def test_simplecnn_computes_what_the_formula_says():
    model, maps = build("simple"), noise(2, *IMAGES)
    w1, b1, w2, b2, w3, b3, w4, b4 = model.parameters()
    logits = model(maps)
    for weight, bias in ((w1, b1), (w2, b2)):
        maps = F.max_pool2d(F.conv2d(maps, weight, bias, padding=1).relu(), 2)
    hidden = (maps.flatten(1) @ w3.T + b3).relu()
    torch.testing.assert_close(logits, hidden @ w4.T + b4)
    torch.testing.assert_close(model.features(noise(2, *IMAGES)), hidden)


def kinds(stage):
    return [type(layer).__name__.removesuffix("2d") for layer in stage]


def test_layers_stand_in_the_order_of_the_exercise():
    conv = ["Conv", "BatchNorm", "ReLU"]
    for stage in lab.CNN(IMAGES, 10).stages.values():
        assert kinds(stage) == [*conv, *conv, "MaxPool"]
    layers = [4, {"channels": 4, "pool": True}]
    without, with_pool = lab.FullyConvCNN(IMAGES, 10, layers=layers).stages.values()
    assert kinds(without) == [*conv, "Dropout"]
    assert kinds(with_pool) == [*conv, "Dropout", "MaxPool"]


@pytest.mark.parametrize("residual", [True, False])
def test_batch_norm_makes_an_offset_before_it_idle_so_no_convolution_has_one(residual):
    models = [lab.CNN(IMAGES, 10), lab.ResNet(IMAGES, 10, depth=20, residual=residual)]
    convs = [part for model in models for part in model.modules() if isinstance(part, nn.Conv2d)]
    assert all(conv.bias is None for conv in convs)


# Residual networks and their plain twins.


def test_without_skips_the_gradient_of_a_deep_network_is_off_by_orders_of_magnitude():
    """Why depth needs skips: the exercise's question, at initialisation."""

    def spread(residual):
        torch.manual_seed(0)
        model = lab.ResNet(IMAGES, 10, depth=110, width=4, residual=residual).train()
        F.cross_entropy(model(noise(16, *IMAGES)), torch.arange(16) % 10).backward()
        first, last = model.stages["stem"][0], model.stages["stage3"][-1].conv2
        return (first.weight.grad.norm() / last.weight.grad.norm()).item()

    assert spread(residual=False) > 100 * spread(residual=True)


# Dropout.


def test_dropout_takes_whole_maps_of_a_fully_convolutional_network_in_training_only():
    torch.manual_seed(0)
    model = lab.FullyConvCNN((1, 8, 8), 2, layers=[2000]).train()
    maps = model.features(noise(4, 1, 8, 8))
    empty = ~maps.flatten(2).any(2)
    assert empty.float().mean().item() == pytest.approx(0.1, abs=0.02)
    model.eval()
    assert torch.equal(model.features(noise(4, 1, 8, 8)), model.features(noise(4, 1, 8, 8)))


def test_dropout_takes_its_share_of_what_the_cnn_classifies_in_training_only():
    torch.manual_seed(0)
    model = lab.CNN(IMAGES, 10, widths=[2000]).train()
    pooled = model.pool(torch.ones(2, 2000, 4, 4))
    assert (pooled == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(model.eval().pool(torch.ones(2, 2000, 4, 4)), torch.ones(2, 2000))


# The layer list.

layer = st.integers(1, 4) | st.fixed_dictionaries(
    {"channels": st.integers(1, 4)},
    optional={
        "kernel": st.integers(1, 6),
        "stride": st.integers(1, 4),
        "padding": st.integers(0, 3),
        "pool": st.booleans(),
    },
)


@settings(max_examples=60)
@given(st.lists(layer, min_size=1, max_size=5), st.integers(1, 12), st.integers(1, 12))
def test_a_layer_list_is_refused_exactly_where_the_image_is_gone(layers, height, width):
    shape, reached = (1, height, width), 0
    maps = torch.zeros(1, *shape)
    try:
        for item in layers:
            part = {"kernel": 3, "stride": 1, "pool": False}
            part |= item if isinstance(item, dict) else {"channels": item}
            padding = part.get("padding", part["kernel"] // 2)
            weight = torch.zeros(1, 1, part["kernel"], part["kernel"])
            after = F.conv2d(maps, weight, stride=part["stride"], padding=padding)
            maps = F.max_pool2d(after, 2) if part["pool"] else after
            reached += 1
    except RuntimeError:  # torch refuses an empty output
        size = "x".join(map(str, maps.shape[2:]))
        with pytest.raises(ValueError, match=rf"layers\[{reached}\] = .* of {size} pixels"):
            lab.FullyConvCNN(shape, 2, layers=layers)
    else:
        model = lab.FullyConvCNN(shape, 2, layers=layers).eval()
        assert model.features(torch.zeros(1, *shape)).shape[2:] == maps.shape[2:]
        assert model(torch.zeros(1, *shape)).shape == (1, 2)


# What is refused.


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("SimpleCNN", {"widths": []}, r"widths = \[\].*at least 1"),
        ("SimpleCNN", {"widths": [1] * 20_000}, r"widths = \[1, 1.*at most 30"),
        ("SimpleCNN", {"widths": (8, 0)}, r"widths\[1\] = 0.*greater than 0"),
        ("SimpleCNN", {"widths": 8}, r"widths = 8.*list"),
        ("SimpleCNN", {"widths": [2**31]}, r"widths\[0\] = 2147483648.*less than 2147483648"),
        ("CNN", {"widths": ["64"]}, r"widths\[0\] = '64'.*integer"),
        ("FastNet", {"widths": [-1]}, r"widths\[0\] = -1.*greater than 0"),
        ("FullyConvCNN", {"layers": []}, r"layers = \[\].*at least 1"),
        ("FullyConvCNN", {"layers": "64"}, r"layers = '64'.*list"),
        ("FullyConvCNN", {"layers": [8, "64"]}, r"layers\[1\]: channels = '64'.*integer"),
        ("FullyConvCNN", {"layers": [True]}, r"layers\[0\]: channels = True.*integer"),
        ("FullyConvCNN", {"layers": [None]}, r"layers\[0\]: channels = None.*integer"),
        ("FullyConvCNN", {"layers": [{}]}, r"layers\[0\]: channels is missing\."),
        (
            "FullyConvCNN",
            {"layers": [{1: 2, "channels": 3}]},
            r"layers\[0\]: 1 = .*Known: channels",
        ),
        (
            "FullyConvCNN",
            {"layers": [8, {"channels": 8, "kernal": 5}]},
            r"layers\[1\]: kernal = 5\..* Did you mean 'kernel'\? Known: channels, kernel",
        ),
        (
            "FullyConvCNN",
            {"layers": [{"channels": 8, "kernel": 0}]},
            r"layers\[0\]: kernel = 0.*greater than 0",
        ),
        (
            "FullyConvCNN",
            {"layers": [{"channels": 8, "kernel": "3"}]},
            r"layers\[0\]: kernel = '3'.*integer",
        ),
        (
            "FullyConvCNN",
            {"layers": [{"channels": 8, "stride": 0, "padding": -1, "pool": 2}]},
            r".*\]: stride = 0[^]]*\]: padding = -1[^]]*\]: pool = 2.*boolean",
        ),
        (
            "FullyConvCNN",
            {"layers": [{"channels": 8, "pool": True}] * 6},
            r"layers\[5\] = \{'channels': 8, 'pool': True\} leaves nothing .* 1x1 pixels",
        ),
        ("ResNet", {"depth": 19}, r"depth = 19\. Give 18, or 6n \+ 2: 8, 14, 20"),
        ("ResNet", {"depth": 2}, r"depth = 2\."),
        ("ResNet", {"depth": -4}, r"depth = -4\."),
        ("ResNet", {"depth": 6 * 10**30 + 2}, r"depth = 60+2\. Give 18, or .* 9998"),
        ("ResNet", {"depth": True}, r"depth = True.*integer"),
        ("ResNet", {"residual": False}, r"residual = False with depth = 18.*20"),
        ("ResNet", {"residual": 0}, r"residual = 0.*boolean"),
        ("ResNet", {"width": 0}, r"width = 0.*greater than 0"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(model, options, message):
    with pytest.raises(ValueError, match=f"{model}: {message}"):
        getattr(lab, model)(IMAGES, 10, **options)


@pytest.mark.parametrize("model", ["SimpleCNN", "CNN", "FullyConvCNN", "ResNet", "FastNet"])
@pytest.mark.parametrize(
    ("image_shape", "num_classes", "message"),
    [
        ((32, 32), 10, r"image_shape = \[32, 32\].*at least 3"),
        (32, 10, r"image_shape = 32.*list"),
        ((3, 32, 0), 10, r"image_shape\[2\] = 0.*greater than 0"),
        ((3.0, 32, 32), 10, r"image_shape\[0\] = 3\.0.*integer"),
        (IMAGES, 1, r"num_classes = 1.*greater than or equal to 2"),
        (IMAGES, "10", r"num_classes = '10'.*integer"),
    ],
)
def test_what_no_network_takes_is_named(model, image_shape, num_classes, message):
    with pytest.raises(ValueError, match=f"{model}: {message}"):
        getattr(lab, model)(image_shape, num_classes)


# In the house.


def test_a_trained_network_is_found_again_and_an_unmatched_one_is_refused(write_npz):
    write_npz()
    data = lab.load_data("tiny", val_size=12, device="cpu")
    config = lab.TrainConfig(epochs=1, batch_size=24)

    def trained(image_shape):
        torch.manual_seed(config.seed)
        model = lab.ResNet(image_shape, data.num_classes, depth=8, width=2)
        return lab.train(model, data, config, progress=False, track=None)

    first, second = trained(data.image_shape), trained(data.image_shape)
    assert (first.stored, second.stored) == (False, True)
    state = second.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.model.state_dict().items())
    with pytest.raises(ValueError, match=r"cannot take images of shape .*image_shape"):
        trained((3, 6, 6))


def test_weights_of_a_network_with_layers_from_torchvision_are_named_by_the_weights_alone(
    monkeypatch,
):
    """Another version of torchvision, whose source reads differently, finds the same run."""
    model = build("resnet18")
    before = identify(model, seed=7)
    forward = BasicBlock.forward
    newer = FunctionType((lambda self, x: x).__code__, forward.__globals__)
    monkeypatch.setattr(BasicBlock, "forward", functools.update_wrapper(newer, forward))
    assert identify(model, seed=7) == before
    assert before[1] != "seed"
