"""What all unit tests share: one thread, folders of their own, small data sets."""

import hypothesis
import numpy as np
import pytest
import torch

import labutils as lab


def pytest_configure() -> None:
    torch.set_num_threads(1)
    # The same examples everywhere, and no failure because a machine was busy.
    hypothesis.settings.register_profile("labutils", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("labutils")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """No test reads or writes the project's own data, runs and models, or a W&B account."""
    monkeypatch.setenv("LABUTILS_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("LABUTILS_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("LABUTILS_MODELS", str(tmp_path / "models"))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "JPY_SESSION_NAME"):
        monkeypatch.setenv(name, "")  # so that what a test leaves there is taken away
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path


@pytest.fixture(scope="session")
def digits() -> lab.ImageData:
    return lab.load_data("digits", device="cpu")


@pytest.fixture
def write_npz(tmp_path):
    """Write a data set of random images as $LABUTILS_DATA/NAME.npz; arrays can be replaced."""

    def write(name: str = "tiny", *, train: int = 60, test: int = 20, **replaced):
        rng = np.random.default_rng(0)
        arrays = {
            "x_train": rng.integers(0, 256, (train, 6, 6), dtype=np.uint8),
            "y_train": np.arange(train) % 3,
            "x_test": rng.integers(0, 256, (test, 6, 6), dtype=np.uint8),
            "y_test": np.arange(test) % 3,
        } | replaced
        path = tmp_path / "data" / f"{name}.npz"
        path.parent.mkdir(exist_ok=True)
        np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
        return path

    return write
