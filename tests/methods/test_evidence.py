"""Measures of maps against constructed cases whose answer is known."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter
from scipy.stats import spearmanr
from torch import nn

import labutils as lab
from labutils.methods import evidence


def square(n=3, side=12, at=slice(2, 6)):
    masks = torch.zeros(n, side, side, dtype=torch.bool)
    masks[:, at, at] = True
    return masks


def test_a_map_that_is_the_mask_is_perfect_and_its_negative_finds_nothing():
    masks = square()
    perfect = evidence.localisation(masks.float(), masks)
    assert (perfect[["pointing", "energy", "recall"]] == 1).all(axis=None)
    assert (perfect.chance == 16 / 144).all()
    nothing = evidence.localisation((~masks).float(), masks)
    assert (nothing[["pointing", "energy", "recall"]] == 0).all(axis=None)


def test_half_of_the_energy_on_half_of_the_object():
    masks, maps = square(1), torch.zeros(1, 12, 12)
    maps[0, 2:6, 2:4] = 1.0  # eight pixels of the object's sixteen
    maps[0, 8:12, 8:10] = 1.0  # as many beside it
    row = evidence.localisation(maps, masks).iloc[0]
    assert row.energy == pytest.approx(0.5)
    assert row.recall == pytest.approx(0.5)


def test_noise_gets_the_share_of_the_object():
    masks = square(2_000)
    found = evidence.localisation(evidence.random_maps(2_000, (12, 12)), masks).mean()
    for measure, tolerance in (("pointing", 0.03), ("energy", 0.005), ("recall", 0.01)):
        assert found[measure] == pytest.approx(found.chance, abs=tolerance)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_flat_map_says_nothing_and_is_not_credited(value):
    sides = [square(1, at=slice(i, i + 4)) for i in range(9)]
    found = evidence.localisation(torch.full((9, 12, 12), value), torch.cat(sides))
    assert found.energy.to_numpy() == pytest.approx(found.chance.to_numpy())
    assert 0 < found.recall.mean() < 0.5


@pytest.mark.parametrize(
    ("maps", "masks", "wanted"),
    [
        (
            torch.zeros(2, 4, 4),
            torch.ones(2, 5, 5),
            r"\[2, 4, 4\] and \[2, 5, 5\]\. Give \[N, H, W\]",
        ),
        (torch.zeros(4, 4), torch.ones(4, 4), r"\[4, 4\] and"),
        (torch.ones(1, 4, 4), torch.ones(1, 4, 4).numpy(), r"masks = .*Tensor"),
        (-torch.ones(1, 4, 4), torch.ones(1, 4, 4), "a map is negative somewhere"),
        (torch.ones(1, 4, 4), torch.zeros(1, 4, 4), "a mask is empty"),
    ],
)
def test_maps_and_masks_that_do_not_fit_are_named(maps, masks, wanted):
    with pytest.raises(ValueError, match=f"^localisation: .*{wanted}"):
        evidence.localisation(maps, masks)


def test_flat_maps_find_an_object_in_one_place_by_chance():
    masks = torch.zeros(2_000, 12, 12, dtype=torch.bool)
    masks[:, :6, 6:] = True
    found = evidence.localisation(torch.zeros(2_000, 12, 12), masks).mean()
    assert found.pointing == pytest.approx(0.25, abs=0.03)
    assert found.recall == pytest.approx(0.25, abs=0.01)


def test_equal_pixels_are_in_random_order():
    flat = evidence.ranks(torch.zeros(1, 32, 32))[0]
    assert sorted(flat.flatten().tolist()) == list(range(1024))
    assert 0.3 < (flat[:16] < 512).float().mean() < 0.7
    half = evidence.ranks(torch.eye(32)[None])[0]
    assert sorted(half.diagonal().tolist()) == list(range(32))


def test_baselines_know_nothing_of_the_image():
    plain, smooth = (evidence.random_maps(50, (20, 30), blur=blur) for blur in (0, 4))
    assert plain.shape == smooth.shape == (50, 20, 30)
    for maps in (plain, smooth):
        assert torch.equal(maps.amin((1, 2)), torch.zeros(50))
        assert torch.equal(maps.amax((1, 2)), torch.ones(50))
        assert maps.mean((0,)).std() < 0.1
    assert torch.equal(evidence.random_maps(3, (1, 1)), torch.zeros(3, 1, 1))
    other = evidence.random_maps(50, (20, 30), seed=1)
    assert not torch.equal(other, plain)
    assert torch.equal(other, evidence.random_maps(50, (20, 30), seed=1))
    steps = [maps.diff(dim=2).abs().mean() for maps in (plain, smooth)]
    assert steps[1] < steps[0] / 3
    centre = evidence.centre_prior(2, (5, 7))
    assert centre[0, 2, 3] == 1
    assert centre[1, [0, 0, 4, 4], [0, 6, 0, 6]].tolist() == [0, 0, 0, 0]
    assert torch.equal(centre, centre.flip(1))
    assert torch.equal(centre, centre.flip(2))


def test_mosaics_are_made_of_four():
    with pytest.raises(ValueError, match=r"^mosaics: there are 5 images\. Give a multiple of four"):
        evidence.mosaics(torch.zeros(5, 3, 4, 4))


def test_a_mosaic_has_its_images_in_its_quadrants():
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(-1, 3, 2, 5)
    found = evidence.mosaics(images)
    assert found.shape == (2, 3, 4, 10)
    for n in range(2):
        for index in range(4):
            mask = evidence.quadrant(found[:, 0], index)[n]
            assert set(found[n, 0][mask].tolist()) == {float(4 * n + index)}
            assert mask.sum() == 10


class Counter(nn.Module):
    """Two logits: how much of the left half of an image is left, times 20, and 10."""

    def forward(self, images):
        left = images[:, 0, :, : images.shape[3] // 2].mean((1, 2))
        return torch.stack([20 * left, torch.full_like(left, 10.0)], dim=1)


def left_first(n=2, side=10):
    maps = torch.zeros(n, side, side)
    maps[:, :, : side // 2] = 1.0
    return maps + 0.5 * torch.rand(n, side, side)


@pytest.mark.parametrize("keep", [False, True])
def test_removal_follows_a_curve_that_is_known(keep):
    images, classes = torch.ones(2, 1, 10, 10), torch.zeros(2, dtype=torch.int64)
    arguments = {"classes": classes, "fill": evidence.fill_grey, "keep": keep}
    found = evidence.removal(Counter(), images, left_first(), **arguments)
    assert list(found.columns) == pytest.approx(np.linspace(0, 1, 11))
    left = np.clip(1 - 2 * np.linspace(0, 1, 11), 0, 1)
    left = 1 - left if keep else left
    expected = 1 / (1 + np.exp(10 - 20 * left))
    for row in found.to_numpy():
        assert row == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("class_idx", [-1, 2])
def test_removal_wants_classes_that_the_network_knows(class_idx):
    images, classes = torch.ones(2, 1, 10, 10), torch.tensor([0, class_idx])
    wanted = rf"^removal: classes = \[0, {class_idx}\] with 2 logits an image\. Give 0 to 1\."
    with pytest.raises(ValueError, match=wanted):
        evidence.removal(Counter(), images, left_first(), classes, fill=evidence.fill_grey)


@pytest.mark.parametrize(
    ("maps", "classes"), [((1, 10, 10), 2), ((2, 5, 5), 2), ((2, 10, 10), 1), ((2, 10, 10), 3)]
)
def test_removal_wants_a_map_and_a_class_for_each_image_at_its_size(maps, classes):
    classes = torch.zeros(classes, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^removal: .* \[2, 1, 10, 10\], .* \[N, H, W\] and"):
        evidence.removal(
            Counter(), torch.ones(2, 1, 10, 10), torch.rand(maps), classes, fill=evidence.fill_grey
        )


def test_wide_images_are_blurred_within_their_shorter_side():
    images = torch.rand(1, 3, 64, 16)
    gone = torch.ones(1, 1, 64, 16, dtype=torch.bool)
    assert evidence.fill_blurred(images, gone).std() < 0.5 * images.std()


@pytest.mark.parametrize("other", [(3, 8, 8), (2, 4, 4)])
def test_maps_of_other_sizes_are_not_correlated(other):
    with pytest.raises(ValueError, match=r"^rank_correlation: maps are \[3, 4, 4\] and \["):
        evidence.rank_correlation(torch.rand(3, 4, 4), torch.rand(other))


def test_random_numbers_of_gpus_are_put_back(monkeypatch):
    forked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda devices: forked.append([*devices]) or nullcontext()
    )
    model = nn.Linear(2, 2)
    evidence.randomisation(model, lambda network: torch.rand(1, 2, 2))
    evidence.fill_from_neighbours(torch.rand(1, 1, 4, 4), torch.ones(1, 1, 4, 4).bool())
    assert forked == [[0, 1], [0, 1]]


def test_a_good_map_is_deleted_faster_and_inserted_faster_than_a_bad_one():
    images, classes = torch.ones(2, 1, 10, 10), torch.zeros(2, dtype=torch.int64)
    areas = {}
    for name, maps in (("good", left_first()), ("bad", left_first().flip(2))):
        for keep in (False, True):
            options = {"fill": evidence.fill_grey, "keep": keep}
            curve = evidence.removal(Counter(), images, maps, classes, **options)
            areas[name, keep] = curve.mean(axis=1)
    assert (areas["good", False] < areas["bad", False] - 0.3).all()
    assert (areas["good", True] > areas["bad", True] + 0.3).all()


FILLS = [evidence.fill_grey, evidence.fill_blurred, evidence.fill_from_neighbours]


@pytest.mark.parametrize("fill", FILLS)
def test_fills_change_what_is_gone_alone(fill):
    images = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0)) + 3
    gone, kept = square(3, 16)[:, None], images.clone()
    filled = fill(images, gone)
    assert torch.equal(images, kept)
    everywhere = gone.expand_as(images)
    assert torch.equal(filled[~everywhere], images[~everywhere])
    assert (filled != images)[everywhere].all()
    for nothing in (torch.zeros_like(gone), torch.ones_like(gone)):
        assert fill(images, nothing).isfinite().all()
    assert torch.equal(fill(images, torch.zeros_like(gone)), images)


def test_neighbours_fill_a_hole_in_a_slope_with_the_slope():
    slope = torch.linspace(0, 1, 16).expand(1, 1, 16, 16).contiguous()
    filled = evidence.fill_from_neighbours(slope, square(1, 16)[:, None])
    assert filled.numpy() == pytest.approx(slope.numpy(), abs=0.06)
    assert torch.equal(filled, evidence.fill_from_neighbours(slope, square(1, 16)[:, None]))


def test_blurred_is_a_box_of_half_the_height_twice():
    images = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    filled = evidence.fill_blurred(images, torch.ones(2, 1, 12, 20, dtype=torch.bool))
    box = {"size": 7, "mode": "mirror", "axes": (2, 3)}
    expected = uniform_filter(uniform_filter(images.double().numpy(), **box), **box)
    np.testing.assert_allclose(filled, expected, atol=1e-6)


def test_rank_correlation_is_spearmans_and_nothing_for_a_flat_map():
    rng = np.random.default_rng(0)
    maps, others = torch.from_numpy(rng.integers(0, 5, (2, 3, 4, 6)).astype(np.float32))
    expected = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(maps, others)]
    np.testing.assert_allclose(evidence.rank_correlation(maps, others), expected, atol=1e-12)
    flat = torch.ones(3, 4, 6)
    np.testing.assert_array_equal(evidence.rank_correlation(maps, flat), 0)


def test_randomisation_compares_ranks_from_the_head_down_and_leaves_the_model_alone():
    torch.manual_seed(0)
    model = lab.CNN((3, 8, 8), 4, widths=[4, 6]).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(5, 3, 8, 8)

    def maps(network):
        return lab.explain(network, images, "layercam", layer="stages.stage1", class_idx=1).raw

    state = torch.get_rng_state()
    found = evidence.randomisation(model, maps)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(found.index) == [
        *("head", "stages.stage2.3", "stages.stage2.0", "stages.stage1.3", "stages.stage1.0")
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.manual_seed(0)
    model.head.reset_parameters()
    original = lab.CNN((3, 8, 8), 4, widths=[4, 6]).eval()
    original.load_state_dict(before)
    pairs = zip(maps(original).flatten(1), maps(model).flatten(1))
    expected = [spearmanr(a, b).statistic for a, b in pairs]
    assert found.loc["head"].to_numpy() == pytest.approx(np.nan_to_num(expected), abs=1e-5)


def test_maps_that_do_not_depend_on_the_weights_are_caught():
    model, images = lab.CNN((3, 8, 8), 4, widths=[4]), torch.rand(5, 3, 8, 8)
    found = evidence.randomisation(model, lambda network: images.mean(1))
    assert found.to_numpy() == pytest.approx(1)


@pytest.mark.parametrize("pixels", [0, 1, 3])
def test_a_mask_grows_as_by_scipys_dilation(pixels):
    from scipy.ndimage import binary_dilation

    masks = torch.rand(4, 11, 13, generator=torch.Generator().manual_seed(0)) > 0.97
    around = np.ones((1, 2 * pixels + 1, 2 * pixels + 1), dtype=bool)
    found = evidence.grow(masks, pixels)
    assert found.dtype == torch.bool
    np.testing.assert_array_equal(found.numpy(), binary_dilation(masks.numpy(), around))


def test_the_maximum_counts_for_pointing_and_as_many_pixels_as_the_object_has_for_recall():
    maps = torch.tensor([[[4.0, 3.0, 2.0, 1.0]], [[4.0, 3.0, 2.0, 1.0]]])
    masks = torch.tensor([[[True, False, True, False]], [[False, True, False, False]]])
    found = evidence.localisation(maps, masks)
    assert found.pointing.tolist() == [1, 0]
    assert found.recall.tolist() == [0.5, 0]


def test_removal_asks_for_all_images_in_evaluation_mode_and_keeps_the_mode():
    torch.manual_seed(0)
    model, images = lab.CNN((3, 8, 8), 4, widths=[4]).train(), torch.randn(70, 3, 8, 8)
    classes, maps = torch.arange(70) % 4, torch.rand(70, 8, 8)
    found = evidence.removal(model, images, maps, classes, fill=evidence.fill_grey, steps=1)
    assert model.training
    with torch.no_grad():
        expected = model.eval()(images).softmax(1)[torch.arange(70), classes]
    assert found[0.0].to_numpy() == pytest.approx(expected.numpy(), abs=1e-5)


def test_randomisation_breaks_one_layer_after_the_other_with_their_norms():
    model, seen = lab.CNN((3, 8, 8), 4, widths=[4, 6]), []
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.bias)  # as training leaves it: not 0

    def maps(network):
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return torch.rand(2, 3, 3)

    names = [f"{name}.weight" for name in evidence.randomisation(model, maps).index]
    for number, state in enumerate(seen):
        kept = [name for name in names if state[name].equal(model.state_dict()[name])]
        assert kept == names[number:]
    offsets = [name for name in state if name.startswith("stages.") and name.endswith(".bias")]
    assert offsets
    assert not any(state[name].any() for name in offsets)
    evidence.randomisation(model, maps, seed=1)
    assert not seen[-1]["head.weight"].equal(state["head.weight"])
