"""The fields by which configs choose among the components of a model."""

from collections.abc import Iterable
from typing import Any

from peft_lntune.architectures.table import Component
from peft_lntune.config.base import check_layers, check_names
from peft_lntune.errors import ConfigError

__all__ = ["check_components"]


def check_components(config: Any, known: Iterable[Component]) -> None:
    """Check the fields `components` and `layers_to_exclude` of a config, and turn them into lists for JSON.

    Args:
        config: a config with these fields. A single component becomes a list of one, and members of `Component` become
            their values.
        known: the components that this kind of config may choose.

    Raises:
        ConfigError: a component is not among `known`, no component is chosen, or a layer index is not valid.
    """
    if isinstance(config.components, str):
        config.components = [config.components]
    check_names(config, "components", one_string=False)
    allowed = tuple(known)
    if config.components is not None:
        if not config.components or not set(allowed).issuperset(config.components):
            listed = "\n".join(f"  {component.value}: {component.meaning}" for component in allowed)
            raise ConfigError(f"components={config.components!r}: choose one or more of\n{listed}")
        config.components = list(map(str, config.components))
    if isinstance(config.layers_to_exclude, (range, set, tuple)):
        config.layers_to_exclude = list(config.layers_to_exclude)
    check_layers(config, "layers_to_exclude")
