"""Components of a model by the names that the field uses, and the fields by which configs choose among them."""

from collections.abc import Mapping
from typing import Any

from peft_lntune.config.base import check_layers, check_names
from peft_lntune.errors import ConfigError

__all__ = ["COMPONENTS", "MATRICES", "check_components"]

COMPONENTS = {
    "query": "the projection to queries",
    "key": "the projection to keys",
    "value": "the projection to values",
    "attention_output": "the projection behind attention",
    "ffn_up": "the FFN's first projection",
    "ffn_gate": "the FFN's gate, where it has one",
    "ffn_down": "the FFN's last projection",
    "norm": "every norm",
    "embedding": "word, position and type embeddings",
    "pooler": "the dense layer over the first token",
}
"""The components by the names that the field uses. Attention over an encoder's output counts as attention."""

MATRICES = {name: what for name, what in COMPONENTS.items() if name != "norm"}
"""The components whose weights are matrices."""


def check_components(config: Any, known: Mapping[str, str]) -> None:
    """Bring the fields `components` and `layers_to_exclude` of a config into the form that JSON has.

    Raises:
        ConfigError: a component is not among those `known`, or none is chosen; or an index is no index.
    """
    if isinstance(config.components, str):
        config.components = [config.components]
    check_names(config, "components", one_string=False)
    unknown = [name for name in config.components or () if name not in known]
    if unknown or config.components == []:
        listed = "\n".join(f"  {name}: {what}" for name, what in known.items())
        raise ConfigError(f"components={config.components!r}: choose one or more of\n{listed}")
    if config.components is not None:
        config.components = list(config.components)
    if isinstance(config.layers_to_exclude, (range, set, tuple)):
        config.layers_to_exclude = list(config.layers_to_exclude)
    check_layers(config, "layers_to_exclude")
