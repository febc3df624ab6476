"""Superclasses: all classes have one, five each; unknown ones are refused."""

from collections import Counter

import pytest

import labutils as lab
from labutils.data.superclasses import CIFAR100


def test_cifar100_has_20_superclasses_of_five_classes_each():
    names = [name for group in CIFAR100.values() for name in group.split()]
    assert len(set(names)) == 100
    coarse = lab.superclasses(sorted(names))
    assert set(Counter(coarse).values()) == {5}
    # The fine and coarse labels of the first classes, as the data set's own files pair them.
    assert [[*sorted(CIFAR100)].index(name) for name in coarse[:8]] == [4, 1, 14, 8, 0, 6, 7, 7]


def test_a_generated_class_belongs_to_its_shape():
    classes = lab.generate("shapes100", 100).classes
    shapes = lab.generate("shapes10", 10).classes
    assert lab.superclasses(classes) == [shape for shape in shapes for _ in range(10)]


def test_a_class_without_a_superclass_is_refused():
    with pytest.raises(ValueError, match="'truck' has no superclass"):
        lab.superclasses(["apple", "truck"])
    with pytest.raises(ValueError, match="'fire_truck' has no superclass"):  # as it was given
        lab.superclasses(["fire_truck"])
