"""FastNet: its whitening layer, its first weights, and how both show in the key of a run."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import labutils as lab
from labutils.training.key import identify

WIDTHS = [4, 8, 8]


def make_model(image_shape=(3, 32, 32), seed=0):
    torch.manual_seed(seed)
    return lab.FastNet(image_shape, 10, widths=WIDTHS)


def smooth_images(count=200, channels=3, side=12):
    """Noise whose neighbouring pixels and channels belong together, as in photos."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, channels, side + 2, side + 2, generator=generator)
    images = F.avg_pool2d(images, 3, stride=1) * 3
    return images + 0.5 * images.mean(1, keepdim=True) + 0.3


def patches_of(images):
    """All 2x2 patches, one a row."""
    rows = [images[:, :, y : y + 2, x : x + 2] for y in range(11) for x in range(11)]
    return torch.cat([row.flatten(1) for row in rows])


@pytest.mark.parametrize("channels", [1, 3])
def test_whitened_patches_of_the_training_images_have_the_identity_as_covariance(channels):
    model, images = make_model((channels, 12, 12)), smooth_images(channels=channels)
    model.whiten(images)
    maps = model.stages["whiten"][0](images)
    half = 4 * channels
    assert maps.shape == (len(images), 2 * half, 11, 11)
    covariance = maps[:, :half].movedim(1, 0).flatten(1).cov()
    # What the small number in the denominator leaves of the variance.
    variance = torch.linalg.eigvalsh(patches_of(images).T.cov()).flip(0)
    torch.testing.assert_close(
        covariance, torch.diag(variance / (variance + 5e-4)), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(covariance, torch.eye(half), atol=0.02, rtol=0)


def test_filters_are_eigenvectors_then_their_negatives_with_a_sign_that_is_fixed():
    model, images = make_model(), smooth_images()
    model.whiten(images)
    filters = model.stages["whiten"][0].weight.flatten(1)
    assert torch.equal(filters[12:], -filters[:12])
    covariance = patches_of(images).T.cov()
    variance = torch.linalg.eigvalsh(covariance).flip(0)
    torch.testing.assert_close(filters[:12] @ covariance, variance[:, None] * filters[:12])
    largest = filters[:12].gather(1, filters[:12].abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    assert not model.stages["whiten"][0].bias.any()


def test_whitening_does_not_depend_on_the_order_of_the_images_or_what_was_there_before():
    model, other, images = make_model(seed=0), make_model(seed=1), smooth_images(600)
    model.whiten(images)
    other.whiten(images.flip(0))
    weights = [net.stages["whiten"][0].weight for net in (model, other)]
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-6)


def test_whitening_changes_the_first_layers_frozen_weight_alone():
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, random_state = smooth_images(), torch.get_rng_state()
    kept = images.clone()
    assert model.whiten(images) is None
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["stages.whiten.0.weight"]
    assert not model.stages["whiten"][0].weight.requires_grad
    assert torch.equal(images, kept)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("images", [torch.zeros(3, 3, 5, 5), torch.ones(1, 3, 2, 2)])
def test_images_without_variance_give_finite_filters(images):
    model = make_model()
    model.whiten(images)
    assert model(smooth_images(2, side=32)).isfinite().all()


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(4, 1, 8, 8),
        torch.zeros(3, 8, 8),
        torch.zeros(0, 3, 8, 8),
        torch.zeros(4, 3, 8, 1),
        torch.zeros(()),
    ],
)
def test_images_that_cannot_be_whitened_are_named(images):
    with pytest.raises(
        ValueError, match=r"whiten: images are torch\.\w+ \[.*float \[n, 3, H, W\], n above 0"
    ):
        make_model().whiten(images)


def test_a_batch_is_no_images_to_whiten():
    batch = torch.zeros(4, 3, 8, 8), torch.zeros(4)
    with pytest.raises(ValueError, match=r"whiten: images are tuple\. .*float \[n, 3, H, W\], n "):
        make_model().whiten(batch)


def test_images_with_values_that_are_not_finite_leave_the_layer_as_it_was():
    model, images = make_model(), smooth_images()
    before = model.stages["whiten"][0].weight.clone()
    images[7, 0, 3, 3] = float("inf")
    with pytest.raises(ValueError, match=r"images are .*finite float"):
        model.whiten(images)
    assert torch.equal(model.stages["whiten"][0].weight, before)


def test_a_fresh_network_is_known_by_its_seed_and_a_whitened_one_by_its_weights():
    model = make_model(seed=5)
    assert identify(model, 5) == (model.spec, "seed")
    model.whiten(smooth_images())
    spec, weights = identify(model, 5)
    assert (spec, weights) == (model.spec, identify(model, 5)[1])
    assert weights != "seed"
    again = make_model(seed=5)
    again.whiten(smooth_images())
    assert identify(again, 5)[1] == weights


def test_only_the_filters_tell_a_whitened_network_from_a_fresh_one():
    # Random numbers differ in the last bit between machines; published runs must still be found.
    digests = set()
    for seed in (5, 6):
        model = make_model(seed=seed)
        model.whiten(smooth_images())
        digests.add(identify(model, seed)[1])
    assert len(digests) == 1


def test_thawing_what_is_frozen_makes_another_run():
    model = make_model(seed=5)
    model.stages["whiten"][0].weight.requires_grad_(True)
    assert identify(model, 5)[1] != "seed"


def test_convolutions_start_as_the_identity_on_as_many_channels_as_they_take():
    model = lab.FastNet((3, 32, 32), 10, widths=[30, 8])
    for stage, inputs in (("stage1", 24), ("stage2", 30)):
        conv = model.stages[stage][0]
        maps = torch.randn(2, inputs, 7, 7)
        same = min(conv.in_channels, conv.out_channels)
        assert torch.equal(conv(maps)[:, :same], maps[:, :same])
        # The other filters are random, so that they differ.
        assert all(filter.any() for filter in conv.weight[same:])
        second = model.stages[stage][4]
        maps = torch.randn(2, second.in_channels, 7, 7)
        assert torch.equal(second(maps), maps)


def test_its_layers_stand_in_the_order_of_airbench():
    model = lab.FastNet((3, 32, 32), 10)
    stage = ["Conv2d", "MaxPool2d", "BatchNorm2d", "GELU", "Conv2d", "BatchNorm2d", "GELU"]
    for name in ("stage1", "stage2", "stage3"):
        assert [type(layer).__name__ for layer in model.stages[name]] == stage
    sizes, maps = [], torch.zeros(1, 3, 32, 32)
    for part in model.stages.values():
        maps = part(maps)
        sizes.append(tuple(maps.shape[1:]))
    assert sizes == [(24, 31, 31), (64, 15, 15), (256, 7, 7), (256, 3, 3)]
    maps = torch.randn(2, 256, 3, 3)
    assert torch.equal(model.pool(maps), F.max_pool2d(maps, 3).flatten(1))


def test_batch_norm_learns_an_offset_alone_and_forgets_40_percent_a_step():
    norms = [part for part in make_model().modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(norms) == 2 * len(WIDTHS)
    for norm in norms:
        assert [name for name, p in norm.named_parameters() if p.requires_grad] == ["bias"]
    maps = torch.randn(4, WIDTHS[0], 5, 5) + 10
    norms[0](maps)
    torch.testing.assert_close(norms[0].running_mean, 0.4 * maps.mean((0, 2, 3)))


def test_logits_are_scaled_down_by_nine():
    model = make_model()
    values = torch.randn(5, WIDTHS[-1])
    torch.testing.assert_close(model.head(values), values @ model.head.weight.T / 9)


def test_the_parameter_count_has_a_closed_form():
    model = lab.FastNet((3, 32, 32), 10)
    convs = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256)
    assert lab.num_parameters(model) == 24 + convs + 2 * (64 + 256 + 256) + 256 * 10
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert frozen == 24 * 3 * 4 + 2 * (64 + 256 + 256)


def test_images_that_are_too_small_for_its_stages_are_refused():
    with pytest.raises(ValueError, match=r"FastNet: image_shape = \(1, 8, 8\).*9x9 pixels"):
        lab.FastNet((1, 8, 8), 10)
    assert lab.FastNet((1, 9, 9), 10).eval()(torch.zeros(2, 1, 9, 9)).shape == (2, 10)
