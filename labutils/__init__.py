"""Train, compare, transfer, distil and explain small neural networks, reproducibly.

`import labutils as lab` gives what notebooks use, looked up on first use: the import is quick.
"""

import importlib

__version__ = "1.0.0"

_EXPORTS = {
    "base.settings": ["Augment", "TrainConfig", "recipe"],
    "base.device": ["resolve_device", "seed_everything"],
    "data.synthetic": ["generate"],
    "data.sources": ["DataError", "superclasses"],
    "data.tensors": ["ImageData", "Split"],
    "data.load": ["load_data"],
    "models.registry": ["build", "num_parameters"],
    "models.mlp": ["MLP", "ResidualMLP"],
    "models.convnets": ["CNN", "FullyConvCNN", "SimpleCNN"],
    "models.resnet": ["ResNet"],
    "models.fastnet": ["FastNet"],
    "evaluation.metrics": ["Metrics", "calibration_bins", "evaluate", "predict"],
    "evaluation.diagnostics": ["activation_stats", "gradient_norms", "summary", "training_flops"],
    "training.runs": ["Run", "RunError", "load_run"],
    "training.store": ["publish"],
    "training.loop": ["train"],
    "methods.distillation": ["Teacher"],
    "methods.cam": ["class_activation_map", "explain"],
    "methods.probes": ["probe"],
    "methods.transfer": ["features", "freeze", "label_budget", "start_from", "swap_head"],
    "methods.pictures": ["save_cam_visualization"],
    "methods.explorer": ["Explorer"],
    "notebook.claims": ["Claims", "Score", "mean_std", "tabulate"],
    "notebook.experiment": ["Experiment", "start"],
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", "plots", *_HOME]


def __getattr__(name: str):
    if name == "plots":
        return importlib.import_module(".plots", __name__)
    if name not in _HOME:
        raise AttributeError(f"labutils has no {name!r}. It exports: {', '.join(__all__)}.")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
