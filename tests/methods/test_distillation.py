"""Teachers: the views they answer for, their records, students that go on with the same bits."""

import os
import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import labutils as lab
from labutils.base import device
from labutils.data import tensors
from labutils.methods import distillation
from labutils.training import watch
from labutils.training.cards import save_weights
from labutils.training.runs import RunError

DISTORTED = lab.Augment(crop=1, flip="alternating", rotate=10, cutout=2)
CONFIG = lab.TrainConfig(
    epochs=3, batch_size=20, accumulate=2, lr=0.01, augment=DISTORTED, alpha=0.9, temperature=2.0
)


def network(widths=(4, 6)):
    torch.manual_seed(0)
    return lab.CNN((1, 6, 6), 3, widths=list(widths))


def train(data, config=CONFIG, model=None, **options):
    return lab.train(model or network(), data, config, track=None, progress=False, **options)


@pytest.fixture
def data(write_npz):
    write_npz()
    return lab.load_data("tiny", val_size=12, device="cpu")


@pytest.fixture
def taught_by(data):
    return train(data, lab.TrainConfig(epochs=2, batch_size=16), network([8, 8]))


@pytest.fixture
def teacher(taught_by):
    return lab.Teacher(taught_by)


def records():
    return sorted(distillation.runs_dir().glob(".teachers/*/*.f16"))


def test_it_answers_for_the_views_that_the_student_sees(data, teacher):
    for epoch in range(3):
        shown = data.train.shuffled(10, seed=0, epoch=epoch, augment=DISTORTED)
        images = torch.cat([images for images, _ in shown])
        with torch.no_grad():
            expected = teacher.run.model.eval()(images)
        for _ in range(2):  # answered, then read
            found = teacher.lessons(data, CONFIG, epoch, 10)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert len(records()) == 3


def test_it_sees_views_as_its_own_images_were_normalised(data, taught_by):
    """A student's data may be darker than the teacher's, or be a part of them."""
    config = replace(CONFIG, augment=replace(DISTORTED, cutout=0))  # which leaves the mean colour
    own = lab.Teacher(taught_by).lessons(data, config, 0, 10)
    numbers = {"mean": [0.1 + x for x in data.train.mean], "std": [x / 2 for x in data.train.std]}
    darker = replace(data, train=replace(data.train, **numbers))
    for path in records():
        path.unlink()
    found = lab.Teacher(taught_by).lessons(darker, config, 0, 10)
    torch.testing.assert_close(found, own, rtol=2e-3, atol=2e-3)


def test_its_views_are_the_students_to_the_bit_when_it_computes_in_bf16(
    data, taught_by, monkeypatch
):
    monkeypatch.setattr(distillation.machine, "usable_precision", lambda *_: "bf16")
    teacher, seen = lab.Teacher(taught_by), []
    teacher._model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    teacher.lessons(data, CONFIG, 0, 10)
    shown = data.train.shuffled(10, seed=0, epoch=0, augment=DISTORTED)
    assert torch.cat(seen).equal(torch.cat([images for images, _ in shown]))


def test_a_student_equals_a_loop_by_hand(data, teacher):
    config = lab.TrainConfig(epochs=1, batch_size=13, lr=0.01, alpha=0.7, temperature=3.0)
    run, bare = train(data, config, teacher=teacher), network()
    optimizer = torch.optim.AdamW(bare.parameters(), lr=0.01, weight_decay=0.0, fused=True)
    torch.manual_seed(0)
    bare.train()
    for images, labels in data.train.shuffled(13, seed=0, epoch=0):
        with torch.no_grad():
            soft = (teacher.run.model.eval()(images) / 3).softmax(1)
        logits = bare(images)
        divergence = (soft * (soft.log() - (logits / 3).log_softmax(1))).sum(1).mean()
        loss = 0.7 * 9 * divergence + 0.3 * F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(run.model.state_dict(), bare.state_dict(), rtol=1e-2, atol=1e-3)


# Five parts an epoch, three steps.
@pytest.mark.parametrize("step", [1, 4, 5, 8])
@pytest.mark.parametrize("recorded", [True, False])
def test_an_interrupted_student_goes_on_with_the_same_bits(data, teacher, step, recorded):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config = replace(CONFIG, image_sizes=(5, 6))
    expected = train(data, config, teacher=teacher, retrain=True)
    passes, model = [], network()

    def interrupt(module, inputs):
        passes.append(module.training)
        if module.training and sum(passes) == step:
            os.kill(os.getpid(), signal.SIGINT)

    handle = model.register_forward_pre_hook(interrupt)
    # A hook would give the network a key of its own; it is the run's again when it goes on.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("labutils.training.loop.identify", lambda *_: (network().spec, "seed"))
        run = train(data, config, model, teacher=teacher, retrain=True)
    handle.remove()
    assert run.stop_reason == "interrupted"
    if not recorded:
        for path in records():
            path.unlink()
    again = train(data, config, teacher=teacher, retrain=True)
    assert again.key == run.key == expected.key
    for name, value in expected.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_ctrl_c_while_it_answers_leaves_no_record(data, teacher):
    def interrupt(*_):
        raise KeyboardInterrupt

    teacher.run.model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        lab.Teacher(teacher.run).lessons(data, CONFIG, 0, 10)
    assert not [
        path
        for path in distillation.runs_dir().rglob("*")
        if ".f16" in path.name and path.suffix != ".lock"
    ]


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-2])


def of_another(path):
    path.write_bytes(bytes(32) + path.read_bytes()[32:])


def one_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [cut_short, of_another, one_bit])
def test_a_record_that_is_not_its_own_is_made_anew_and_this_is_said_once(
    data, teacher, spoil, capsys
):
    watch.warn.cache_clear()
    whole = teacher.lessons(data, CONFIG, 0, 10)
    [path] = records()
    for _ in range(2):
        spoil(path)
        assert torch.equal(teacher.lessons(data, CONFIG, 0, 10), whole)
    said = capsys.readouterr().out
    assert said.count("is damaged, or of another teacher or other data. It is asked again.") == 1


def test_other_data_views_and_seeds_have_records_of_their_own_and_weights_replace_them(
    data, teacher
):
    first = teacher.lessons(data, CONFIG, 0, 10)
    for changed in (replace(CONFIG, seed=1), replace(CONFIG, augment=lab.Augment())):
        assert not torch.equal(teacher.lessons(data, changed, 0, 10), first)
    part = replace(data.train, images=data.train.images[:30], labels=data.train.labels[:30])
    assert len(teacher.lessons(replace(data, train=part), CONFIG, 0, 10)) == 30
    assert len(records()) == 4
    with torch.no_grad():
        teacher.run.model.head.bias.add_(1)
    save_weights(teacher.run.weights, teacher.run.model.state_dict())
    later = lab.Teacher(teacher.run)
    torch.testing.assert_close(later.lessons(data, CONFIG, 0, 10), first + 1, rtol=0, atol=4e-3)


def test_a_teacher_has_the_weights_of_its_run_whatever_its_network_did_since(data, teacher):
    first = teacher.lessons(data, CONFIG, 0, 10)
    with torch.no_grad():
        teacher.run.model.head.bias.add_(1)  # trained on, say
    records()[0].unlink()
    assert torch.equal(teacher.lessons(data, CONFIG, 0, 10), first)
    assert lab.Teacher(teacher.run)._weights == teacher._weights


def test_what_is_said_of_a_folder_of_images_stays_in_the_folder_of_runs(data, teacher):
    named = replace(data, name="folder:../../elsewhere")
    teacher.lessons(named, CONFIG, 0, 10)
    assert len(records()) == 1


def test_what_a_network_of_ones_own_has_said_is_found_again(data, monkeypatch):
    config = lab.TrainConfig(epochs=1, batch_size=16)
    own = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3))
    run = train(data, config, own)
    first = lab.Teacher(run).lessons(data, CONFIG, 0, 10)
    monkeypatch.setattr(lab.Teacher, "_answer", lambda *_: pytest.fail("asked again"))
    assert torch.equal(lab.Teacher(run).lessons(data, CONFIG, 0, 10), first)


def test_the_teacher_enters_the_key_and_the_card(data, teacher):
    run = train(data, teacher=teacher)
    other = train(data, teacher=lab.Teacher(teacher.run, classes=[1, 2, 0]))
    plain = train(data, replace(CONFIG, alpha=0.0, temperature=1.0))
    assert len({run.key, other.key, plain.key}) == 3
    assert run.info["teacher"] == teacher.run.key
    assert other.info["teacher"] == f"{teacher.run.key} 1 2 0"
    assert "teacher" not in plain.info
    assert train(data, teacher=teacher).stored
    assert lab.load_run(run.path.name).key == run.key


def test_a_permuted_teacher_is_as_sure_of_other_classes(data, teacher):
    own = teacher.lessons(data, CONFIG, 0, 10)
    other = lab.Teacher(teacher.run, classes=[1, 2, 0]).lessons(data, CONFIG, 0, 10)
    assert torch.equal(other, own[:, [1, 2, 0]])
    assert len(records()) == 1


NO_PERMUTATION = [
    [[0, 1], [2]],
    3,
    [0, 1],
    [0, 1, 1],
    [0, 1, 3],
    [0, 1, -1],
    ["a", 1, 2],
    [1.0, 0, 2],
    [0, 1, 2, 2],
]


@pytest.mark.parametrize("classes", NO_PERMUTATION)
def test_classes_that_are_no_permutation_are_refused(taught_by, classes):
    with pytest.raises(ValueError, match=r"^Teacher: classes"):
        lab.Teacher(taught_by, classes=classes)


def test_a_card_alone_cannot_teach(teacher):
    del teacher.run.info["data"]["classes"]  # which cards without weights do not have
    with pytest.raises(RunError, match="only the card"):
        lab.Teacher(replace(teacher.run, model=None))


def test_an_interrupted_run_cannot_teach(taught_by):
    # It goes on under the same key, by which its students would be found.
    taught_by.info["stop_reason"] = "interrupted"
    with pytest.raises(RunError, match=r"^run is interrupted\. Train it to the end first\."):
        lab.Teacher(taught_by)


def test_a_teacher_of_other_classes_or_images_is_named(data, teacher):
    renamed = replace(data, classes=("a", "b", "c"))
    with pytest.raises(ValueError, match=r"^train: the teacher run knows classes .* 'b', 'c'\]"):
        train(renamed, teacher=teacher)
    with pytest.raises(
        ValueError, match=r"knows images of shape \[1, 6, 6\], the data have \[1, 8"
    ):
        teacher.require_fit(
            replace(data, train=replace(data.train, images=torch.zeros(9, 1, 8, 8)))
        )


def test_logits_that_float16_cannot_hold_are_refused(data, teacher):
    with torch.no_grad():
        teacher.run.model.head.bias.fill_(1e6)
    save_weights(teacher.run.weights, teacher.run.model.state_dict())
    with pytest.raises(ValueError, match="teacher run are not finite in float16"):
        lab.Teacher(teacher.run).lessons(data, CONFIG, 0, 10)
    assert not records()


def test_a_name_is_no_teacher():
    with pytest.raises(ValueError, match=r"^Teacher: run = '1\.3_cnn'\. .* Run"):
        lab.Teacher("1.3_cnn")


def test_it_answers_under_a_lock_so_that_a_second_student_waits_for_the_record(
    data, teacher, monkeypatch
):
    locked, lock = [], distillation.store_lock

    @contextmanager
    def noting(key):
        with lock(key):
            before = len(records())
            yield
            locked.append((before, len(records())))

    monkeypatch.setattr(distillation, "store_lock", noting)
    for _ in range(2):
        teacher.lessons(data, CONFIG, 0, 10)
    assert locked == [(0, 1), (1, 1)]


def test_other_batches_are_other_views_and_have_records_of_their_own(data, teacher, monkeypatch):
    monkeypatch.setattr(tensors, "_batches_at_once", lambda *_: 1)  # distorted batch by batch
    for size in (10, 16):
        shown = data.train.shuffled(size, seed=0, epoch=0, augment=DISTORTED)
        with torch.no_grad():
            expected = teacher.run.model.eval()(torch.cat([images for images, _ in shown]))
        found = teacher.lessons(data, CONFIG, 0, size)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert len(records()) == 2


def test_it_answers_in_the_precision_of_its_training(data, monkeypatch):
    monkeypatch.setattr(device, "_computes_bf16", lambda device: True)
    run = train(data, lab.TrainConfig(epochs=1, batch_size=16, precision="bf16"))
    teacher, dtypes = lab.Teacher(run), set()
    teacher._model.register_forward_hook(lambda *given: dtypes.add(given[-1].dtype))
    teacher.lessons(data, CONFIG, 0, 10)
    assert dtypes == {torch.bfloat16}
