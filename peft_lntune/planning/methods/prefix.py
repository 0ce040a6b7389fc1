"""Keys and values that every query of an attention also sees."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.architectures.attention import find_attention
from peft_lntune.config import PrefixConfig
from peft_lntune.config.prefix import ATTENTION_ROLES
from peft_lntune.core.prefix import Prefix
from peft_lntune.errors import NoMatchError
from peft_lntune.layers import PrefixLayer
from peft_lntune.layers.held import prefixes_of
from peft_lntune.planning.facts import ModelFacts
from peft_lntune.planning.gaps import find_gaps
from peft_lntune.planning.methods.inserted import InsertedMethod
from peft_lntune.planning.methods.method import Counts, Injection
from peft_lntune.planning.targets import is_chosen
from peft_lntune.planning.types import Plan, PlannedModule

__all__ = ["Prefixes"]

_EMBEDDING = ".lntune_prefix.embedding"


class Prefixes(InsertedMethod):
    """A prefix at each chosen attention."""

    name = "prefix"
    no_sum = (
        "has a prefix, and attention over two prefixes is not a weighted sum of attention over each. Make both active "
        "instead: set_adapter({names!r})."
    )

    def plan(self, facts: ModelFacts, config: PrefixConfig, counts: Counts = None) -> Plan:
        """Plan a prefix at each chosen attention module.

        Args:
            facts: facts of the model.
            config: says which attention modules, and how many keys and values.
            counts: not used; prefixes have no masks.

        Returns:
            The plan. Attention modules without a place are in `left_out`.

        Raises:
            NoMatchError: no attention module is chosen.
            UnsupportedError: no attention of this model takes a prefix.
        """
        modules = facts.modules
        found, left_out = facts.attention
        if not found:
            find_attention(facts.model)  # raises, with the reason
        parts = {}
        for name, place in found.items():
            if (config.roles is None or place.role in config.roles) and is_chosen(config, name):
                sizes = config.num_virtual_tokens, place.heads * place.head_dim, config.reparametrize
                prefix = Prefix(*sizes, device=torch.device("meta"))
                counted = {"prefix": sum(parameter.numel() for parameter in prefix.parameters())}
                parts[name] = self.planned(config, name, modules[name], place, counted)
        if not parts:
            known = ", ".join(f"{name} ({place.role})" for name, place in found.items())
            raise NoMatchError(f"this PrefixConfig selects none of the attention modules of this model: {known}.")
        roles: Sequence[str] = ATTENTION_ROLES if config.roles is None else config.roles
        told: list[tuple[str, str]] = [(role, name) for name in left_out for role in ATTENTION_ROLES]
        places = [(place.role, name) for name, place in found.items()]
        reason = "it does not use transformers' attention interface"
        gaps = {**left_out, **find_gaps(modules, roles, places + told, reason)}
        return Plan(parts, {name: why for name, why in gaps.items() if is_chosen(config, name)})

    def stored_entries(self, config: PrefixConfig, part: PlannedModule) -> int:
        """Count the keys and values of a prefix. A file holds these, and not the network they are trained through.

        Args:
            config: the config.
            part: a module of its plan.

        Returns:
            The number of elements.
        """
        place: Any = part.place
        return 2 * config.num_virtual_tokens * place.heads * place.head_dim

    def make_layer(self, injection: Injection, part: PlannedModule) -> PrefixLayer:
        """Make the layer for a planned attention module, not yet attached.

        Args:
            injection: the injection under way.
            part: the planned module.

        Returns:
            A layer without adapters.
        """
        place: Any = part.place
        return PrefixLayer(injection.route, place)

    def to_file(self, tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Replace each network that a prefix is trained through by the values it gives.

        Args:
            tensors: tensors by name, without the adapter's name.
            config: the prefix part of the adapter.

        Returns:
            A new dict.
        """
        return folded(tensors)

    def from_file(self, model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Let each prefix of the adapter hold values, as the file does, in place of a network.

        Args:
            model: the model with the adapter.
            adapter_name: the adapter.
            tensors: the state dict of the file.

        Returns:
            The same tensors.
        """
        for prefix in prefixes_of(model, adapter_name):
            prefix.fold_()
        return tensors


def folded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the networks that prefixes are trained through by the values they give.

    Only the given tensors are used, because a model with sharded parameters does not have them whole. DeepSpeed's
    ZeRO 3 leaves flat, empty tensors in processes that write nothing; these stay as they are.

    Args:
        tensors: tensors by name, without the adapter's name.

    Returns:
        A new dict. Each prefix is one tensor `weight` of shape `(2, tokens, heads * head_dim)`.

    Example:
        >>> network = Prefix(2, 4, hidden=3)
        >>> state = {f"attn.lntune_prefix.{name}": value for name, value in network.state_dict().items()}
        >>> {name: tuple(value.shape) for name, value in folded(state).items()}
        {'attn.lntune_prefix.weight': (2, 2, 4)}
    """
    found = dict(tensors)
    for key in (key for key, tensor in tensors.items() if key.endswith(_EMBEDDING) and tensor.dim() == 2):
        name = key.removesuffix("embedding")
        own = {other.removeprefix(name): found.pop(other) for other in tensors if other.startswith(name)}
        columns, width = own["embedding"].shape
        network = Prefix(columns, width, hidden=len(own["down.bias"]), device=torch.device("meta"))
        found[f"{name}weight"] = torch.func.functional_call(network, own, ()).detach()
    return found
