"""Every model class of transformers, built small on the meta device, and which of its modules are norms by name."""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["build_small", "model_classes", "reference_norms"]

_DEPTH = re.compile(r"(^|_)(n|num|nums)?_?(\w+_)?(layers?|blocks?|depth)$|^(n_layer|num_hidden_groups)$")
_NOT_DEPTH = re.compile(r"offset|period|interval|index|idx|start|stop|skip|which|select|stage|mlp_only|out_|feature")
_PERIOD = re.compile(r"period|interval|_freq|every|_step$")
_NO_NORM = re.compile(r"batch_?norm|embedding$|^nonorm$", re.IGNORECASE)
_EXPERTS = re.compile(r"^(n|num)_?(\w+_)?experts$")


def model_classes(families: list[str] | None = None) -> dict[str, type[nn.Module]]:
    """Find the model classes of transformers: all that have a config class, but for the abstract ones.

    Args:
        families: names of folders of `transformers.models`; None for all, which takes about a minute of imports.

    Returns:
        The classes by `"<family>.<class>"`, in order of the names.
    """
    from transformers import PreTrainedModel, models

    found: dict[str, type[nn.Module]] = {}
    for path in sorted(Path(next(iter(models.__path__))).glob("*/modeling_*.py")):
        family = path.parent.name
        if families is not None and family not in families:
            continue
        try:
            module = importlib.import_module(f"transformers.models.{family}.{path.stem}")
        except ImportError:  # it needs a package that is not installed
            continue
        for name, value in sorted(vars(module).items()):
            own = inspect.isclass(value) and value.__module__ == module.__name__ and issubclass(value, PreTrainedModel)
            if own and not name.endswith("PreTrainedModel") and value.config_class is not None:
                found[f"{family}.{name}"] = value
    return found


def build_small(model_class: Any) -> nn.Module:
    """Build a model of a class on the meta device, from its default config with few layers of every kind.

    Args:
        model_class: a class that `model_classes` gives.

    Returns:
        The model. Its widths are the defaults, which cost nothing on the meta device.

    Raises:
        Exception: whatever the class raises of the smallest config; larger ones were tried too.
    """
    from transformers.initialization import no_init_weights

    first: Exception | None = None
    for layers, complete in ((2, False), (2, True), (4, False), (None, False), (None, True)):
        try:
            config = model_class.config_class()
            if layers is not None:
                _shrink(config, layers)
            if complete:
                _complete(config)
            with torch.device("meta"), no_init_weights():
                model: nn.Module = model_class(config)
            return model
        except Exception as error:  # strange models raise strange errors
            first = first or error
    assert first is not None
    raise first


def _shrink(config: Any, layers: int) -> None:
    """Set the numbers of layers in a config and the configs within it, and shorten lists with an entry a layer."""
    from transformers import PreTrainedConfig

    values = dict(vars(config))
    depth = max([layers, *(6 for key, value in values.items() if _PERIOD.search(key) and isinstance(value, int))])
    full = {value for key, value in values.items() if _is_depth(key, value)}
    for key, value in values.items():
        if isinstance(value, PreTrainedConfig):
            _shrink(value, layers)
        elif _is_depth(key, value):
            setattr(config, key, min(value, depth))
        elif isinstance(value, list) and len(value) in full and len(value) > depth:
            setattr(config, key, _one_of_each(value, depth))
        elif key == "depths" and isinstance(value, list):
            setattr(config, key, [min(number, 2) for number in value])
        elif _EXPERTS.search(key) and isinstance(value, int) and not isinstance(value, bool):
            setattr(config, key, min(value, 8))


def _complete(config: Any) -> None:
    """Fill in what some default configs leave to the user, here and in the configs within."""
    from transformers import PreTrainedConfig

    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            _complete(value)
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    fields = {"vocab_size": 128, "prediction_length": 4, "num_key_value_heads": heads, "n_routed_experts": 4}
    if isinstance(heads, int) and isinstance(width, int):
        fields["head_dim"] = width // heads
    for key, value in fields.items():
        if getattr(config, key, 0) is None:
            setattr(config, key, value)


def _is_depth(key: str, value: object) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and _DEPTH.search(key) is not None and _NOT_DEPTH.search(key) is None


def _one_of_each(values: list[Any], length: int) -> list[Any]:
    """The first entries of a list, with an entry of every kind among them."""
    kinds = list(dict.fromkeys(values)) if all(isinstance(value, str) for value in values) else []
    return (kinds + values)[:length] if len(kinds) <= length else values[:length]


def reference_norms(model: nn.Module) -> dict[str, str]:
    """Say which modules are norms, by the names of their classes and by their parameters alone.

    A class whose name has "norm" in it and that has floating parameters of its own and no module with parameters
    below it. Not batch norms, embeddings with a norm inside, and MobileBERT's `NoNorm`, which only scales and shifts.
    Nothing of this package is used.

    Args:
        model: a model of transformers.

    Returns:
        The name of the class by name of the module, each module once.

    Example:
        >>> reference_norms(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.BatchNorm1d(2)))
        {'1': 'LayerNorm'}
    """
    return dict(_norms(model))


def _norms(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "norm" not in kind.lower() or _NO_NORM.search(kind):
            continue
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        if own and not any(True for child in module.children() for _ in child.parameters()):
            yield name, kind
