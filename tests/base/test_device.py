"""Precision, memory format and threads: what is used, and what happens without it."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

import labutils as lab
from labutils.base import device
from labutils.base.device import resolve_device
from labutils.models.registry import training_logits

CPU, SHAPE = torch.device("cpu"), (3, 16, 16)
NETWORKS = {
    "SimpleCNN": lambda: lab.SimpleCNN(SHAPE, 4, widths=[4, 8]),
    "CNN": lambda: lab.CNN(SHAPE, 4, widths=[4, 8]),
    "FullyConvCNN": lambda: lab.FullyConvCNN(SHAPE, 4, layers=[4, 8]),
    "ResNet-18": lambda: lab.ResNet(SHAPE, 4, width=8),
    "ResNet-8": lambda: lab.ResNet(SHAPE, 4, depth=8, width=4),
    "FastNet": lambda: lab.FastNet(SHAPE, 4, widths=[8, 8]),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    model = NETWORKS[request.param]()
    for part in model.modules():
        if isinstance(part, (torch.nn.Dropout, torch.nn.Dropout2d)):
            part.p = 0.0  # so that two passes in training mode can be compared
    return model


def images(count=5):
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("amx", "avx512", "usable"),
    [(False, False, "float32"), (True, False, "bf16"), (False, True, "bf16")],
)
def test_bf16_is_used_only_where_the_processor_computes_it(monkeypatch, amx, avx512, usable):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    found = [device.usable_precision(asked, CPU) for asked in ("float32", "auto", "bf16")]
    assert found == ["float32", usable, usable]


def test_bf16_is_not_used_where_onednn_is_told_to_do_without():
    code = """if True:
        import torch
        from labutils.base.device import usable_precision

        print(usable_precision("auto", torch.device("cpu")))
    """
    limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=limited, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["float32"]


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_that_would_emulate_bf16_is_not_asked_to(monkeypatch, supported):
    def is_supported(including_emulation=True):
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    found = device.usable_precision("auto", torch.device("cuda", 0))
    assert found == ("bf16" if supported else "float32")
    assert device.usable_precision("bf16", torch.device("mps")) == "float32"


def test_every_map_of_a_convolutional_network_is_channels_last(network):
    seen = {}

    def note(name):
        def hook(layer, inputs, output):
            if output.ndim == 4 and min(output.shape[1:]) > 1:
                seen[name] = output.is_contiguous(memory_format=torch.channels_last)

        return hook

    for name, layer in network.named_modules():
        layer.register_forward_hook(note(name))
    device.prefer_channels_last(network, CPU)
    network(images())
    assert len(seen) > 3
    assert all(seen.values()), seen


def test_the_memory_format_changes_no_number(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    expected = network.eval()(images())
    device.prefer_channels_last(network, CPU)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    torch.testing.assert_close(network(images()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lab.MLP(12, [4], 3),
        lambda: lab.ResNet(SHAPE, 4, width=7),
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1, stride=2, groups=4)),
    ],
)
def test_a_perceptron_and_a_network_with_narrow_projections_stay_as_they_are(make):
    model = make()
    pointers = [p.data_ptr() for p in model.parameters()]
    device.prefer_channels_last(model, CPU)
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_what_is_no_convolution_of_images_keeps_its_format():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(4, 4, 3))
    device.prefer_channels_last(model, CPU)
    flat, solid = (layer.weight for layer in model)
    assert flat.is_contiguous(memory_format=torch.channels_last)
    assert solid.is_contiguous()


@pytest.mark.parametrize("there", [True, False])
def test_bf16_is_near_float32_and_trains_weights_in_float32(network, monkeypatch, there):
    monkeypatch.setattr(device, "_computes_bf16", lambda device: there)
    expected = network(images())
    precision = device.usable_precision("auto", CPU)
    assert precision == ("bf16" if there else "float32")
    context = device.autocast(precision, CPU)
    for _ in range(2):
        with context:
            logits = network(images())
        assert logits.dtype == (torch.bfloat16 if there else torch.float32)
        torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)
    logits.square().sum().backward()
    grads = [p.grad for p in network.parameters() if p.requires_grad]
    assert {grad.dtype for grad in grads} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


def test_a_convolution_is_not_kept_to_one_thread():
    linear, conv = lab.MLP(36, [8], 3, batch_norm=True), nn.Conv2d(1, 2, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for model, count in ((linear, 1), (conv, 2), (lab.MLP(784, [600, 600], 10), 2)):
            assert device.choose_threads(model, 128, CPU) == count
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("available", "kind"), [(False, "cpu"), (True, "cuda")])
def test_auto_is_cuda_where_there_is_one(available, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert device.resolve_device("auto").type == kind
    assert device.resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "", "hpu", "privateuseone", None])
def test_an_absent_device_is_named_with_those_allowed(device):
    with pytest.raises(ValueError, match=f"device = '{device}'.*Allowed: 'auto', 'cpu', 'cuda'"):
        resolve_device(device)


def test_seeding_repeats_python_numpy_and_torch():
    def draw():
        return random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()

    device.seed_everything(7)
    first, second = draw(), draw()
    device.seed_everything(7)
    assert draw() == first != second
    device.seed_everything(8)
    assert all(ours != theirs for ours, theirs in zip(draw(), first))


def test_signals_are_collected_and_ignored_ones_stay_ignored():
    before = {
        number: signal.signal(number, handler)
        for number, handler in [
            (signal.SIGHUP, signal.SIG_IGN),
            (signal.SIGTERM, signal.SIG_DFL),
            (signal.SIGINT, signal.default_int_handler),
        ]
    }
    try:
        with device.signals(signal.SIGHUP, signal.SIGTERM, signal.SIGINT) as caught:
            for number in before:
                os.kill(os.getpid(), number)
                time.sleep(0.01)
        assert caught == [signal.SIGTERM, signal.SIGINT]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, "a"])
def test_a_seed_is_a_whole_number_of_32_bits(seed):
    with pytest.raises(ValueError, match=f"^seed_everything: seed = {seed!r}"):
        device.seed_everything(seed)


def test_gpus_that_torch_cannot_use_are_left_alone(monkeypatch):
    # As with a driver that is too old: it counts them, and every call to one fails.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(device.gpus()) == []
    with device.own_random_numbers(0):
        assert torch.rand(1).is_cpu
    assert training_logits(nn.Linear(2, 3), torch.rand(4, 2)).shape == (4, 3)


def test_random_numbers_of_ones_own_depend_on_the_seed_and_leave_the_callers():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with device.own_random_numbers(3):
        first = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), first)
