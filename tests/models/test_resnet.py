"""Residual networks and their plain twins against their definitions."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import labutils as lab

IMAGES = (3, 32, 32)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_resnet18_has_its_known_size():
    model = lab.ResNet(IMAGES, 10)
    assert lab.num_parameters(model) == 11_173_962
    # 18 layers count without the three projections.
    assert sum(isinstance(part, (nn.Conv2d, nn.Linear)) for part in model.modules()) == 18 + 3


def test_resnet18_computes_what_torchvisions_does_with_the_same_weights():
    torch.manual_seed(0)
    ours = lab.ResNet(IMAGES, 10, width=64).eval()
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    names = {"stages.stem.0": "conv1", "stages.stem.1": "bn1", "head": "fc"}
    names |= {f"stages.stage{number}": f"layer{number}" for number in range(1, 5)}
    state = {}
    for key, value in ours.state_dict().items():
        prefix = next(prefix for prefix in names if key.startswith(f"{prefix}."))
        state[names[prefix] + key.removeprefix(prefix)] = value
    theirs.load_state_dict(state)
    images = noise(2, *IMAGES)
    torch.testing.assert_close(ours(images), theirs.eval()(images))


def test_a_stem_of_stride_2_is_every_second_place_of_the_full_one():
    full, halved = (lab.ResNet(IMAGES, 10, width=4, stem_stride=s).eval() for s in (1, 2))
    halved.load_state_dict(full.state_dict())
    images = noise(2, *IMAGES)
    stems = [model.stages["stem"](images) for model in (full, halved)]
    torch.testing.assert_close(stems[1], stems[0][..., ::2, ::2])
    assert halved.features(images).shape[2:] == (2, 2)


@pytest.mark.parametrize("depth", [8, 20, 32, 56])
def test_the_plain_twin_has_the_same_weights_and_computes_something_else(depth):
    models = []
    for residual in (True, False):
        torch.manual_seed(0)
        models.append(lab.ResNet(IMAGES, 10, depth=depth, residual=residual).eval())
    residual, plain = models
    ours, theirs = residual.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not torch.allclose(residual(noise(1, *IMAGES)), plain(noise(1, *IMAGES)))


def test_a_block_with_nothing_in_its_branch_passes_its_input_on_and_a_plain_one_passes_none():
    for residual in (True, False):
        model = lab.ResNet(IMAGES, 10, depth=8, width=4, residual=residual)
        images = noise(2, 4, 7, 7).relu()
        for stage, expected in (
            ("stage1", images),
            ("stage2", F.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, 0, 4))),
        ):
            (block,) = model.stages[stage]
            nn.init.zeros_(block.bn2.weight)
            out = block(images)
            assert out.shape == expected.shape
            assert torch.equal(out, expected) if residual else not out.any()


def test_convolutions_of_a_resnet_start_with_hes_variance():
    model = lab.ResNet(IMAGES, 10)
    conv = model.stages["stage4"][1].conv2.weight
    assert conv.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    stem = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight  # 3 maps to 64
    assert stem.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
