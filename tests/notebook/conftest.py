"""Runs that the tests of this room look at, trained once."""

import pytest

import labutils as lab


@pytest.fixture(scope="session")
def data() -> lab.ImageData:
    return lab.load_data("digits", device="cpu")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data) -> lab.Experiment:
    """A control and ours, three seeds each, one epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABUTILS_RUNS", str(tmp_path_factory.mktemp("runs")))
        found = lab.Experiment("9.9", data, seeds=[0, 1, 2])
        for recipe, lr in (("control", 1e-3), ("ours", 1e-2)):
            config = lab.TrainConfig(epochs=1, lr=lr)
            found.fit(lambda: lab.MLP(64, [8], 10), config, recipe=recipe, model="tiny")
        yield found
