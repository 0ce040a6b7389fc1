"""Key/value prefixes inside attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from peft_lntune.config.base import LNTuneConfig, check_roles, check_type, part_kind
from peft_lntune.errors import ConfigError

__all__ = ["ATTENTION_ROLES", "PrefixConfig"]

AttentionRole = Literal["attention", "cross_attention"]
ATTENTION_ROLES: tuple[AttentionRole, ...] = get_args(AttentionRole)
"""The kinds of attention that can have a prefix: over the tokens themselves, and over an encoder's output."""


@part_kind
@dataclass(kw_only=True)
class PrefixConfig(LNTuneConfig):
    """Train keys and values that every query of an attention also sees. `PrefixConfig()` puts them at each attention.

    Unlike PEFT's `PrefixTuningConfig` this one touches no cache: positions are not shifted, lengths stay, gradient
    checkpointing works, and it mixes with other adapters in a batch. It works on models whose attention uses
    transformers' attention interface, as most do. A prefix is never the identity, and it cannot be merged.

    Source: Li and Liang 2021 (arXiv 2101.00190).

    Args:
        num_virtual_tokens: P, the number of keys and values at each attention.
        reparametrize: hidden size of a tanh network that gives the prefix during training, such as 512. Training is
            then more stable at high learning rates. Saving replaces the network by its values. None: no network.
        roles: only `"attention"` or only `"cross_attention"`; None: both.
        target_modules: names (or endings of names) of the attention modules, or one regular expression, instead of all
            attention modules.

    Further arguments: see `LNTuneConfig`.

    Raises:
        ConfigError: a field has a value that is not allowed.

    Example:
        >>> PrefixConfig(num_virtual_tokens=10, roles=["cross_attention"]).roles
        ['cross_attention']
    """

    num_virtual_tokens: int = 20
    reparametrize: int | None = None
    roles: Sequence[AttentionRole] | None = None

    def _check(self) -> None:
        super()._check()
        self._check_size("num_virtual_tokens", "how many keys and values each attention gets")
        if self.reparametrize is not None:
            self._check_size("reparametrize", "the hidden size of the network, or None for none")
        if self.roles is not None:
            check_roles(self, ATTENTION_ROLES, "attention")

    def _check_size(self, name: str, meaning: str) -> None:
        check_type(self, name, int)
        if getattr(self, name) < 1:
            raise ConfigError(f"{name}={getattr(self, name)} should be at least 1: {meaning}.")
