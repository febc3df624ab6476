"""Claims travel with the notebook that makes them."""

import pytest

import labutils as lab
from labutils.notebook.claims import MEDIA_TYPE


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABUTILS_RUNS", str(tmp_path_factory.mktemp("runs")))
        data = lab.load_data("digits", device="cpu")
        found = []
        for seed in (0, 1, 2):
            lab.seed_everything(seed)
            config = lab.TrainConfig(epochs=1, seed=seed)
            found.append(lab.train(lab.MLP(64, [8], 10), data, config, name=f"m{seed}", track=None))
        yield data, found


def test_claims_show_what_holds_and_what_fails():
    claims = lab.Claims("1.1", headline="fine")
    claims.add("1 < 2", True, "1 & 2")
    claims.add("<b> is bold", False, "3")
    bundle = claims._repr_mimebundle_()
    assert bundle["text/plain"].splitlines() == [
        "holds: 1 < 2 (1 & 2)",
        "FAILS: <b> is bold (3)",
        "fine",
    ]
    assert "&lt;b&gt; is bold" in bundle["text/html"]
    assert [row["holds"] for row in bundle[MEDIA_TYPE]["rows"]] == [True, False]


def test_a_recorded_score_becomes_a_headline_row(runs):
    data, found = runs
    claims = lab.Claims("1.1")
    claims.record(lab.Score(found, data), model="tiny", published=50, target=60)
    row = claims._repr_mimebundle_()[MEDIA_TYPE]["headline_rows"][0]
    assert row["mean"] == pytest.approx(lab.Score(found, data).mean(), abs=1e-3)
    assert (row["n"], row["dataset"], row["params"]) == (3, "digits", 610)
    assert (row["published"], row["target"], row["headline"]) == (50, 60, True)
    values = lab.Score(found, data).values("accuracy")
    assert row["values"] == [pytest.approx(value, abs=1e-3) for value in values]
    claims.record(lab.Score(found, data), model="tiny", headline=False)
    assert [row["headline"] for row in claims.headline_rows] == [True, False]
