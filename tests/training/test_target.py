"""The loss of distillation against its formula by hand and its limits; who may teach whom."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import labutils as lab
from labutils.training.target import batch_loss


def config(alpha, temperature=1.0, **changes):
    return lab.TrainConfig(alpha=alpha, temperature=temperature, **changes)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(6, 4, requires_grad=True), torch.arange(6) % 4, 3 * torch.randn(6, 4)


def gradient(logits, labels, taught, settings):
    return torch.autograd.grad(batch_loss(logits, labels, taught, settings), logits)[0]


def test_a_case_computed_by_hand():
    # At T = 2 the teacher says 3/4 and 1/4, the student 1/2 each; the label is the second class.
    taught, logits = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    expected = 0.9 * 4 * divergence + 0.1 * math.log(2)
    found = batch_loss(logits, torch.tensor([1]), taught, config(0.9, 2.0))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_without_a_teacher_it_is_cross_entropy_bit_for_bit(batch):
    logits, labels, taught = batch
    for smoothing in (0.0, 0.2):
        plain = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        settings = config(0.0, 3.0, label_smoothing=smoothing)
        assert torch.equal(batch_loss(logits, labels, None, settings), plain)
        expected = torch.autograd.grad(plain, logits)[0]
        assert torch.equal(gradient(logits, labels, taught, settings), expected)


def test_a_student_that_says_the_same_as_its_teacher_is_left_alone(batch):
    logits, labels, _ = batch
    for temperature in (0.5, 1.0, 4.0):
        # Adding a constant to the logits of an image changes no probability.
        taught = logits.detach() + 5
        found = gradient(logits, labels, taught, config(1.0, temperature))
        torch.testing.assert_close(found, torch.zeros(6, 4), rtol=0, atol=1e-6)


def test_at_a_high_temperature_centred_logits_are_matched(batch):
    # Equation 4 of Hinton et al. 2015: for large T the gradient is (z - v) / N, both centred.
    logits, labels, taught = (
        part.double() if part.dtype.is_floating_point else part for part in batch
    )
    found = gradient(logits, labels, taught, config(1.0, 1e6))
    student, teacher = (z - z.mean(dim=1, keepdim=True) for z in (logits, taught))
    torch.testing.assert_close(found, (student - teacher) / 4 / 6, rtol=1e-3, atol=1e-5)


def test_a_teacher_that_is_not_asked_or_missing_is_named(digits):
    model = lab.MLP(digits.num_features, [4], 10)
    teaches = dict.fromkeys(("key", "require_fit", "lessons"), print)
    with pytest.raises(ValueError, match=r"^train: alpha = 0.5 has no teacher\. Give alpha above"):
        lab.train(model, digits, config(0.5))
    with pytest.raises(ValueError, match=r"^train: alpha = 0.0 is given a teacher\. Give alpha"):
        lab.train(model, digits, config(0.0), teacher=SimpleNamespace(**teaches))
    with pytest.raises(ValueError, match=r"^train: teacher = 'Ann'\. Input should be an instance"):
        lab.train(model, digits, config(0.5), teacher="Ann")
