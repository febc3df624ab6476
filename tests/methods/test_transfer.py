"""Transfer: what is frozen stays bit for bit, a run's key tells what it starts from."""

import copy
import dataclasses
import errno
import os
import shutil
import signal

import pytest
import torch
from torch.nn import functional as F

import labutils as lab
from labutils.methods import transfer
from labutils.training.key import identify, recorded_key
from labutils.training.runs import RunError

CONFIG = lab.TrainConfig(epochs=2, batch_size=13, lr=0.05, ema=0.9)
SETTINGS = {"track": None, "progress": False}
NETWORKS = {
    "CNN": lambda n=3: lab.CNN((1, 6, 6), n, widths=[4, 5]),
    "FastNet": lambda n=3: lab.FastNet((1, 6, 6), n, widths=[4, 5]),
    "FullyConvCNN": lambda n=3: lab.FullyConvCNN((1, 6, 6), n, layers=[4, 5]),
}


@pytest.fixture
def data(write_npz):
    write_npz()
    return lab.load_data("tiny", val_size=12, device="cpu")


@pytest.fixture
def source(data):
    return pretrained(data)


def pretrained(data, kind="CNN", seed=0):
    torch.manual_seed(seed)
    return lab.train(NETWORKS[kind](), data, CONFIG, name=kind, **SETTINGS)


def swapped(source, classes=3, seed=0):
    torch.manual_seed(seed)
    return lab.swap_head(source, classes)


def same(one, other):
    """Names of the tensors that are equal to the last bit."""
    other = other.state_dict()
    return {name for name, value in one.state_dict().items() if value.equal(other[name])}


def test_features_are_kept_by_weights_and_pixels(data, monkeypatch, tmp_path):
    model, passes, compute = NETWORKS["CNN"]().eval(), [], transfer._features
    monkeypatch.setattr(transfer, "_features", lambda *given: passes.append(1) or compute(*given))

    def asked(split=data.test, **options):
        passes.clear()
        return lab.features(model, split, **options)

    first = asked()
    again = asked()
    assert not passes
    for found in (first, again):  # just computed or read: a network can be trained on both
        torch.nn.Linear(found["stage1"].shape[1], 2)(found["stage1"]).sum().backward()
    assert all(values.equal(again[name]) for name, values in first.items())
    asked(dataclasses.replace(data.test, labels=data.test.labels + 1))
    assert not passes
    brighter = dataclasses.replace(data.test, mean=(0.1,))
    for other in {"grid": 2}, {"stages": ["stage2"]}, {"split": data.val}, {"split": brighter}:
        asked(**other)
        assert passes
    with torch.no_grad():
        model.stages["stage2"][0].weight[0] += 1
    changed = asked()
    assert passes
    assert not changed["stage2"].equal(first["stage2"])
    folder = tmp_path / "runs" / ".features"
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    assert asked()["stage2"].equal(changed["stage2"])
    assert passes
    monkeypatch.setattr(transfer, "_KEPT", 1)
    asked(grid=3)
    assert len(list(folder.iterdir())) == 1  # what was asked for last


def test_features_of_a_split_with_code_of_its_own_are_not_kept(data):
    class Dark(lab.Split):
        def normalise(self, images):
            return 0 * super().normalise(images)

    model, split = NETWORKS["CNN"](), data.test
    bright = lab.features(model, split)["stage1"]
    dark = lab.features(model, Dark(split.images, split.labels, split.mean, split.std))["stage1"]
    assert not torch.equal(bright, dark)


def test_features_of_a_network_with_a_part_of_ones_own_are_not_kept(data):
    class Scaled(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, maps):
            return self.factor * maps

    found = []
    for factor in (1.0, 0.0):
        model = NETWORKS["CNN"]()
        model.stages["stage2"].append(Scaled(factor))
        found.append(lab.features(model, data.test)["stage2"])
    assert found[0].any()
    assert not found[1].any()


def test_features_that_another_process_is_writing_stay(data, monkeypatch, tmp_path):
    monkeypatch.setattr(transfer, "_KEPT", 1)
    folder = tmp_path / "runs" / ".features"
    folder.mkdir(parents=True)
    (folder / ".other.safetensors.0123.tmp").write_bytes(b"half of it")
    for grid in (1, 2):
        lab.features(NETWORKS["CNN"](), data.test, grid=grid)
    assert (folder / ".other.safetensors.0123.tmp").exists()
    assert len(list(folder.glob("*.safetensors"))) == 1


def test_features_that_cannot_be_kept_are_returned_all_the_same(data, monkeypatch):
    model = NETWORKS["CNN"]()
    kept = lab.features(model, data.test)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transfer, "write_sealed", full)
    found = lab.features(model, data.test, grid=2)
    assert list(found) == list(kept)


def test_features_that_were_damaged_are_made_again(data, tmp_path, monkeypatch):
    model = NETWORKS["CNN"]()
    kept = lab.features(model, data.test)
    [file] = (tmp_path / "runs" / ".features").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)
    torch.testing.assert_close(lab.features(model, data.test), kept)
    assert file.read_bytes() != content
    (tmp_path / "no folder").touch()
    monkeypatch.setenv("LABUTILS_RUNS", str(tmp_path / "no folder"))
    torch.testing.assert_close(lab.features(model, data.test), kept)


@pytest.mark.parametrize("kind", NETWORKS)
def test_features_are_pooled_outputs_of_the_stages(kind, data, monkeypatch):
    monkeypatch.setattr(transfer, "_AT_ONCE", 7)
    model = NETWORKS[kind]().train()
    found = lab.features(model, data.test, grid=2)
    assert list(found) == list(model.stages)
    assert all(module.training for module in model.modules())
    model.eval()
    maps = data.test.normalise(data.test.images)
    for name, stage in model.stages.items():
        maps = stage(maps)
        expected = F.adaptive_avg_pool2d(maps, 2).flatten(1)
        torch.testing.assert_close(found[name], expected)
    assert found[name].dtype == torch.float32
    assert list(lab.features(model, data.test, ["stage1"])) == ["stage1"]
    pooled = lab.features(model, data.test, ["pool"], grid=2)["pool"]
    torch.testing.assert_close(model.head(pooled), lab.predict(model, data.test))


def test_features_of_a_stage_without_maps_are_taken_as_they_are(data):
    model = lab.SimpleCNN((1, 6, 6), 3, widths=[4])
    assert lab.features(model, data.test, ["hidden"], grid=2)["hidden"].shape == (20, 256)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_new_head_is_the_only_change(kind, data):
    source = pretrained(data, kind)
    network = swapped(source, 7, seed=5)
    torch.manual_seed(5)
    fresh = NETWORKS[kind](7)
    assert same(network, source.model) == {n for n in network.state_dict() if "head" not in n}
    assert same(network.head, fresh.head) == set(fresh.head.state_dict())
    assert same(swapped(source.model, 7, seed=5), network) == set(network.state_dict())
    assert network.spec == fresh.spec


def test_the_stored_weights_are_taken_whatever_became_of_the_network(source):
    before = copy.deepcopy(source.model)
    torch.nn.init.ones_(source.model.stages["stage1"][0].weight)
    assert same(lab.start_from(source), before) == set(before.state_dict())


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_frozen_does_not_move_by_a_bit(kind, optimizer, data):
    network = lab.freeze(swapped(pretrained(data, kind)), up_to="stage1")
    before = copy.deepcopy(network)
    config = lab.TrainConfig(
        epochs=2, batch_size=13, optimizer=optimizer, weight_decay=0.1, ema=0.9
    )
    lab.train(network, data, config, **SETTINGS)
    kept = {n for n in before.state_dict() if n.startswith(("stages.whiten", "stages.stage1"))}
    assert kept <= same(network, before)
    moved = set(before.state_dict()) - same(network, before)
    assert any(name.startswith("stages.stage2") for name in moved)
    assert any("running_mean" in name for name in moved)


def test_dropout_of_a_frozen_stage_is_off_in_training(data):
    network = lab.freeze(NETWORKS["FullyConvCNN"](), up_to="stage1")
    modes = [stage.training for stage in network.train().stages.values()]
    assert (network.training, modes) == (True, [False, True])
    assert not any(part.training for part in network.stages["stage1"].modules())


def test_the_key_says_what_a_run_starts_from_and_what_is_frozen(source, data):
    network = swapped(source)
    key = f"from run {source.key}"
    assert identify(network, 0)[1] == f"{key}, head drawn anew"
    assert identify(network, 1)[1].startswith(f"{key}, head ")
    assert identify(network, 1)[1] != identify(network, 0)[1]
    assert identify(copy.deepcopy(network), 0) == identify(network, 0)
    lab.freeze(network, up_to="stage1")
    frozen = " ".join(f"stages.stage1.{n}" for n, _ in network.stages["stage1"].named_parameters())
    assert identify(network, 0)[1] == f"{key}, head drawn anew, {frozen} frozen"
    head = lab.train(network, data, CONFIG, **SETTINGS)
    assert identify(lab.start_from(head), 0)[1] == f"from run {head.key}"
    for run in (head, lab.train(lab.start_from(head), data, CONFIG, **SETTINGS)):
        assert recorded_key(run.info) == run.key


@pytest.mark.parametrize(
    "name", ["head.weight", "stages.stage1.0.weight", "stages.stage2.1.running_var"]
)
def test_a_network_whose_weights_were_changed_is_not_the_runs(name, source):
    network = swapped(source)
    network.state_dict()[name].view(-1)[0] += 1e-3
    assert "from run" not in identify(network, 0)[1]


def test_what_went_on_from_float16_weights_is_found_from_the_exact_ones(source, data, folders):
    first = lab.train(swapped(source), data, CONFIG, **SETTINGS)
    exact = copy.deepcopy(source.model)
    lab.publish(source, weights=True, half=data, command="")
    source.path.rename(folders / "elsewhere")
    published = lab.load_run(source.name)
    assert same(published.model, exact) != set(exact.state_dict())
    again = lab.train(swapped(published), data, CONFIG, **SETTINGS)
    assert again.stored
    assert again.key == first.key


def frozen_training(seed=0):
    """Steps of a chain that each process repeats: pretrain, then train with stage1 frozen."""
    data = lab.load_data("tiny", val_size=12, device="cpu")
    network = lab.freeze(swapped(pretrained(data, "FullyConvCNN"), seed=seed), up_to="stage1")
    return network, data


def test_equal_seeds_give_equal_bits_also_after_a_kill(data):
    def interrupt(module, given, output):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        calls, (network, data) = [], frozen_training()
        whole = lab.train(network, data, CONFIG, **SETTINGS)
        again = lab.train(frozen_training()[0], data, CONFIG, retrain=True, **SETTINGS)
        assert same(again.model, whole.model) == set(whole.model.state_dict())
        network, data = frozen_training()
        original = type(network).forward
        handle = network.head.register_forward_hook(interrupt)
        # The hook interrupts; what it leaves behind is the folder of the plain network.
        key_of = identify(frozen_training()[0], 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("labutils.training.loop.identify", lambda *_: key_of)
            cut = lab.train(network, data, CONFIG, retrain=True, **SETTINGS)
        handle.remove()
        assert cut.stop_reason == "interrupted"
        assert type(network).forward is original
        resumed = lab.train(frozen_training()[0], data, CONFIG, retrain=True, **SETTINGS)
        assert same(resumed.model, whole.model) == set(whole.model.state_dict())
        assert [row["train_loss"] for row in resumed.rows] == [r["train_loss"] for r in whole.rows]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_of_a_network_without_a_head_to_swap_is_refused(data):
    config = lab.TrainConfig(epochs=1, batch_size=16)
    run = lab.train(lab.MLP(data.num_features, [5], data.num_classes), data, config)
    with pytest.raises(ValueError, match=r"^swap_head: source is MLP"):
        lab.swap_head(run, data.num_classes)  # whose head would not be a new one
    assert lab.start_from(run)[1].weight.equal(run.network()[1].weight)  # which needs no head


def test_bad_requests_name_what_is_there(source, data):
    model = NETWORKS["CNN"]()
    with pytest.raises(ValueError, match=r"stages\[0\] = 'stage3'.* 'stage2' or 'pool'"):
        lab.features(model, data.test, ["stage3"])
    with pytest.raises(ValueError, match=r"^features: stages = 'stage1'\..* list"):
        lab.features(model, data.test, "stage1")
    for name, value in {"grid": 0, "split": data.test.images}.items():
        given = {"split": data.test, name: value}
        with pytest.raises(ValueError, match=rf"^features: {name} = "):
            lab.features(model, **given)
    small = lab.SimpleCNN((1, 32, 32), 3)
    with pytest.raises(ValueError, match=r"^features: images are .* which the model cannot take"):
        lab.features(small, data.test)
    with pytest.raises(ValueError, match=r"up_to = 'stage9'.* 'stage1' or 'stage2'"):
        lab.freeze(model, up_to="stage9")
    with pytest.raises(ValueError, match="up_to = 'head'"):  # which would leave nothing to train
        lab.freeze(model, up_to="head")
    assert all(parameter.requires_grad for parameter in model.parameters())
    for function, options in (
        (lab.freeze, {"up_to": "stage1"}),
        (lab.features, {"split": data.test}),
    ):
        with pytest.raises(ValueError, match=rf"^{function.__name__}: model = MLP"):
            function(lab.MLP(4, [5], 3), **options)
    with pytest.raises(ValueError, match=r"^start_from: run = CNN"):
        lab.start_from(model)
    with pytest.raises(ValueError, match="source is MLP"):
        lab.swap_head(lab.MLP(4, [5], 3), 4)
    with pytest.raises(ValueError, match="num_classes = 1"):
        lab.swap_head(source, 1)


def test_weights_that_do_not_fit_are_named():
    model = NETWORKS["CNN"]()
    model.stages["stage1"][0] = torch.nn.Conv2d(1, 9, 3, bias=False)
    named = r"stages.stage1.0.weight: .*\[9, 1, 3, 3\].*\[4, 1, 3, 3\]"
    with pytest.raises(ValueError, match=named):
        lab.swap_head(model, 5)


def test_a_run_without_weights_or_an_end_cannot_be_started_from(source):
    model, source.model = source.model, None
    with pytest.raises(RunError, match="only the card"):
        lab.swap_head(source, 3)
    source.model = model
    shutil.rmtree(source.path)
    with pytest.raises(RunError, match=r"FileNotFoundError: .* retrain=True"):
        lab.swap_head(source, 3)
    source.info["stop_reason"] = "interrupted"
    with pytest.raises(RunError, match="Train it to the end"):
        lab.start_from(source)


def test_a_label_budget_takes_the_same_share_of_every_class(data):
    train, before = data.train, None
    assert lab.label_budget(data, 1.0).train.images.equal(train.images)
    for share in (0.25, 0.5):
        budget = lab.label_budget(data, share)
        assert budget.train.labels.bincount().tolist() == [int(share * 16)] * 3
        assert (budget.val, budget.train.mean) == (data.val, train.mean)
        images, all_images = (
            {(image.numpy().tobytes(), int(label)) for image, label in zip(s.images, s.labels)}
            for s in (budget.train, train)
        )
        assert images <= all_images
        assert before is None or before <= images
        before = images


@pytest.mark.parametrize("share", [0.0, 0.05, 1.5])
def test_a_label_budget_that_leaves_a_class_empty_is_refused(share, data):
    with pytest.raises(ValueError, match=f"share = {share}.*of 16 images, at least one"):
        lab.label_budget(data, share)


def test_a_label_budget_of_something_else_is_refused(data):
    with pytest.raises(ValueError, match=r"^label_budget: share = 'half'"):
        lab.label_budget(data, "half")
    with pytest.raises(ValueError, match=r"^label_budget: data = "):
        lab.label_budget(data.train, 0.5)
    with pytest.raises(ValueError, match=r"^label_budget: seed = 'a'"):
        lab.label_budget(data, 0.5, seed="a")


def test_the_oldest_features_go_first(data, monkeypatch, tmp_path):
    model, folder, files = NETWORKS["CNN"](), tmp_path / "runs" / ".features", []
    for number in range(3):
        lab.features(model, dataclasses.replace(data.test, mean=(number / 10,)))
        [new] = {*folder.iterdir()} - {*files}
        os.utime(new, (number, number))
        files.append(new)
        monkeypatch.setattr(transfer, "_KEPT", 2 * new.stat().st_size)
    assert {*folder.iterdir()} == {*files[1:]}


def test_equal_weights_in_another_network_have_features_of_their_own(data):
    layers = [[{"channels": 4, "stride": stride}] for stride in (1, 2)]
    one, other = (lab.FullyConvCNN((1, 6, 6), 3, layers=each) for each in layers)
    other.load_state_dict(one.state_dict())
    first, second = (lab.features(model, data.test)["stage1"] for model in (one, other))
    assert not first.equal(second)


def test_a_label_budget_is_drawn_by_its_seed(data):
    first, again, other = (lab.label_budget(data, 0.5, seed=s).train.images for s in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


def test_a_label_budget_of_whole_percents_of_a_hundred_is_exact(data):
    labels = torch.arange(300) % 3
    train = dataclasses.replace(data.train, images=torch.zeros(300, 1, 6, 6).byte(), labels=labels)
    data = dataclasses.replace(data, train=train)
    for percent in range(1, 101):  # 0.29 * 100 is 28.999999999999996
        counts = lab.label_budget(data, percent / 100).train.labels.bincount()
        assert counts.tolist() == [percent] * 3
