"""What the tests of training share."""

import signal
from collections import OrderedDict

import pytest

from labutils.training import loop
from labutils.training.key import identify


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C as in the foreground, also where the tests run in the background and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def hooks_are_no_part_of_the_key(monkeypatch):
    """Tests watch and interrupt by hooks; a key cannot know that they compute nothing."""

    def without_hooks(model, seed):
        hooks, model._forward_hooks = model._forward_hooks, OrderedDict()
        try:
            return identify(model, seed)
        finally:
            model._forward_hooks = hooks

    monkeypatch.setattr(loop, "identify", without_hooks)
