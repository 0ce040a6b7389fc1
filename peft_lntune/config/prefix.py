"""Key/value prefixes inside attention."""

from dataclasses import dataclass

from peft_lntune.config.base import LNTuneConfig, check_names, check_type, part_kind
from peft_lntune.errors import ConfigError

__all__ = ["ATTENTION_ROLES", "PrefixConfig"]

ATTENTION_ROLES = ("attention", "cross_attention")
"""The kinds of attention that a prefix can be at: over the tokens themselves, and over an encoder's output."""


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
        reparametrize: hidden size of a tanh network that the prefix comes from while it is trained, such as 512. It
            trains more stably at high learning rates; it is folded away when the adapter is saved. None: no network.
        roles: only at `"attention"` or only at `"cross_attention"`; None: at both.
        target_modules: instead of every attention, the attention modules of these names, in the forms of
            `LNTuneConfig`.

    Further arguments: see `LNTuneConfig`.

    Raises:
        ConfigError: a field has a value that is not allowed.

    Example:
        >>> PrefixConfig(num_virtual_tokens=10, roles=["cross_attention"]).roles
        ['cross_attention']
    """

    num_virtual_tokens: int = 20
    reparametrize: int | None = None
    roles: list[str] | None = None

    def _check(self) -> None:
        super()._check()
        self._check_size("num_virtual_tokens", "how many keys and values each attention gets")
        if self.reparametrize is not None:
            self._check_size("reparametrize", "the hidden size of the network, or None for none")
        if self.roles is None:
            return
        if isinstance(self.roles, str):
            self.roles = [self.roles]
        check_names(self, "roles", one_string=False)
        self.roles = list(self.roles)
        if not self.roles or not set(self.roles) <= set(ATTENTION_ROLES):
            raise ConfigError(f"roles={self.roles!r}: choose one or more of {', '.join(map(repr, ATTENTION_ROLES))}.")
        if self.target_modules is not None:
            raise ConfigError(
                f"roles={self.roles!r} narrows the search for attention, but target_modules={self.target_modules!r} "
                "replaces that search. Give one of the two."
            )

    def _check_size(self, name: str, meaning: str) -> None:
        check_type(self, name, int)
        if getattr(self, name) < 1:
            raise ConfigError(f"{name}={getattr(self, name)} should be at least 1: {meaning}.")
