"""On a GPU: the numbers of a CPU within rounding, and nothing in a step that waits for it.

All of it is skipped where torch finds none.
"""

import signal
import warnings
from dataclasses import replace

import pandas as pd
import pytest
import torch

import labutils as lab

if not torch.cuda.is_available():  # tried with "cpu" in the place of "cuda", not on a GPU yet
    pytest.skip("no CUDA device", allow_module_level=True)

DEVICE = "cuda"
SMALL = {"epochs": 2, "augment": lab.Augment(crop=1, flip="alternating", cutout=2)}
OURS = lab.recipe("ours", **SMALL, batch_size=40)
FAST = lab.recipe("fast", **SMALL, batch_size=40, accumulate=2, image_sizes=(6, 8))
DISTORTED = lab.recipe("control", epochs=2, augment=lab.Augment(rotate=10.0, translate=1.0))
CONFIGS = {"ours": OURS, "fast": replace(FAST, ema=0.9), "distorted": DISTORTED}


def digits_on(device):
    return lab.load_data("digits", subset=0.3, device=device)


def cnn():
    lab.seed_everything(0)
    return lab.CNN((1, 8, 8), 10, widths=[8, 16])


@pytest.fixture
def there():
    return digits_on(DEVICE)


@pytest.fixture
def run(there):
    return lab.train(cnn(), there, replace(OURS, precision="float32"))


@pytest.mark.parametrize("precision", ["float32", "auto"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_training_has_the_losses_of_a_cpu(there, config, precision):
    losses = []
    for data in (there, digits_on("cpu")):
        run = lab.train(cnn(), data, replace(config, precision=precision), retrain=True)
        assert run.stop_reason.startswith("finished all")
        losses.append(run.history[["train_loss", "val_loss"]])
    assert run.info["data"]["fingerprint"] == there.fingerprint
    # Random numbers are drawn on the CPU, so that both see the same images.
    pd.testing.assert_frame_equal(*losses, rtol=0.02 if precision == "float32" else 0.1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_gpu_is_waited_for_in_an_epoch_as_often_whatever_its_steps(there, config):
    waits = []
    for size in (20, 40):
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            fitting = {"batch_size": size * config.accumulate}
            lab.train(cnn(), there, replace(config, **fitting), retrain=True)
        torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(warning.message) for warning in seen))
    assert waits[0] == waits[1] > 0


def test_an_interrupted_run_goes_on_where_it_was(there, monkeypatch):
    shuffled = lab.Split.shuffled

    def interrupted(self, *sizes, epoch, **options):
        for number, batch in enumerate(shuffled(self, *sizes, epoch=epoch, **options)):
            if (epoch, number) == (1, 3):  # of the second
                signal.raise_signal(signal.SIGINT)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(lab.Split, "shuffled", interrupted)
        assert lab.train(cnn(), there, OURS).stop_reason == "interrupted"
    columns = ["train_loss", "val_loss"]
    run = lab.train(cnn(), there, OURS)
    assert "continues" in (run.path / "train.log").read_text()
    parts = run.history[columns]
    whole = lab.train(cnn(), there, OURS, retrain=True).history[columns]
    pd.testing.assert_frame_equal(parts, whole, rtol=0.02)  # cuDNN may choose other sums


def test_scores_maps_and_features_are_those_of_a_cpu(there, run, monkeypatch):
    here, twin = digits_on("cpu"), run.network().cpu()
    model = run.network().to(DEVICE)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on, it has 10 bits
    torch.testing.assert_close(
        lab.predict(model, there.test).cpu(), lab.predict(twin, here.test), rtol=1e-3, atol=1e-3
    )
    images = there.test.normalise(there.test.images[:20])
    for method in ("cam", "gradcam", "layercam"):
        found = lab.explain(model, images, method=method)
        expected = lab.explain(twin, images.cpu(), method=method)
        torch.testing.assert_close(found.raw.cpu(), expected.raw, rtol=1e-2, atol=1e-3)
    for stage, values in lab.features(model, there.val).items():
        expected = lab.features(twin, here.val)[stage]
        torch.testing.assert_close(values, expected, rtol=1e-2, atol=1e-3)
    batch = next(there.train.batches(32))
    norms = lab.gradient_norms(model, batch).parameters
    expected = lab.gradient_norms(twin, tuple(part.cpu() for part in batch)).parameters
    pd.testing.assert_series_equal(norms, expected, rtol=1e-2)


def test_a_teacher_teaches(there, run):
    config = replace(OURS, alpha=0.5, temperature=2.0, precision="float32")
    losses = []
    for data in (there, digits_on("cpu")):
        student = lab.train(cnn(), data, config, teacher=lab.Teacher(run), retrain=True)
        losses.append(student.history[["train_loss", "val_loss"]])
    pd.testing.assert_frame_equal(*losses, rtol=0.02)
