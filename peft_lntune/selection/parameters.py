"""Which parameters are scored, and random numbers per parameter: from name and seed, not from any order."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from peft_lntune.core.module_tree import base_model, base_modules, below
from peft_lntune.errors import ConfigError
from peft_lntune.norms.find import find_norms

__all__ = ["find_parameters", "generator"]


def find_parameters(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Look up parameters of the base model by name.

    Args:
        model: any model; for a model with adapters, the parameters of its base model.
        names: names of the parameters; None: weight and bias of every norm.

    Returns:
        The parameters by name. A shared parameter appears under its first name.

    Raises:
        ConfigError: a name is unknown, or the model has no norm.

    Example:
        >>> list(find_parameters(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))))
        ['1.weight', '1.bias']
    """
    model = base_model(model)
    modules = base_modules(model)
    if names is None:
        norms = find_norms(model)
        own = [(norm, name) for norm, facts in norms.items() for name in facts.parameters.values()]
        names = [below(norm, name) for norm, name in own if modules[norm]._parameters.get(name) is not None]
        if not names:
            raise ConfigError("this model has no norm to score. Name other parameters in parameters=.")
    found: dict[str, Tensor] = {}
    for name in names:
        module, _, parameter = name.rpartition(".")
        value = modules[module]._parameters.get(parameter) if module in modules else None
        if value is None:
            known = [below(m, p) for m, holder in modules.items() for p in holder._parameters]
            raise ConfigError(
                f"this model has no parameter {name!r}; among its {len(known)} are {', '.join(known[:3])}."
            )
        if not any(value is other for other in found.values()):  # a shared parameter is scored under its first name
            found[name] = value
    if not found:
        raise ConfigError("parameters= names none. Leave it out for all norms.")
    return found


def generator(seed: int, key: object) -> torch.Generator:
    """A random generator for one sample or parameter, which does not depend on batch, order or process.

    Args:
        seed: seed of all generators.
        key: number of the sample, or name of the parameter.

    Returns:
        A generator on the CPU, the same for the same seed and key.
    """
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
