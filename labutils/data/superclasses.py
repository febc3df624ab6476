"""What kind of thing a class is: CIFAR-100's 20 superclasses, the shape of a generated image."""

from collections.abc import Sequence

from .stencils import SHAPES, TEXTURES

# Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html
CIFAR100 = {
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}
_KNOWN = {n.replace("_", " "): coarse for coarse, names in CIFAR100.items() for n in names.split()}
_KNOWN |= {f"{shape}, {texture}": shape for shape in SHAPES for texture in TEXTURES}


def superclasses(classes: Sequence[str]) -> list[str]:
    """The superclass of each class, of cifar100 or of shapes100, whose superclasses are the shapes.

    Raises ValueError for a class that has none.
    """
    found = {name: _KNOWN.get(name.replace("_", " ")) for name in classes}  # copies have either
    if unknown := [name for name, coarse in found.items() if coarse is None]:
        hint = "Give the classes of cifar100 or shapes100."
        raise ValueError(f"superclasses: {unknown[0]!r} has no superclass. {hint}")
    return [found[name] for name in classes]
