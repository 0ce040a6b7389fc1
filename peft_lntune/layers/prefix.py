"""The layer that puts prefixes to the left of an attention's keys and values.

Attention modules of transformers look up their function by the name in `self.config._attn_implementation`. So each
module with a prefix gets its own view of the config, which names our function while a prefix is active. That function
joins the prefixes, widens the mask, and calls the function that the real config names. See docs/design.md, "Prefixes".
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_lntune.architectures.attention import FUNCTIONS, IMPLEMENTATION, AttentionFacts, Interface
from peft_lntune.core.delta import delta_dtype
from peft_lntune.core.prefix import Prefix, join, widen_bias, widen_mask
from peft_lntune.errors import UnsupportedError
from peft_lntune.layers.inserted import InsertedLayer
from peft_lntune.layers.offloaded import device_of
from peft_lntune.routing.route import Route

__all__ = ["ConfigView", "PrefixLayer", "lntune_prefix"]


class ConfigView:
    """View of a config for one attention module, which names our attention function while a prefix is active.

    Everything else is read from and written to the real config at the time of access, so `set_attn_implementation`
    keeps working.

    Args:
        base: the real config.
        layer: the layer with the prefixes.
        interface: the attention functions that the module can use.
    """

    def __init__(self, base: Any, layer: "PrefixLayer", interface: Interface) -> None:
        self.__dict__.update(base=base, layer=layer, interface=interface)

    @property
    def _attn_implementation(self) -> str | None:
        # Only while active: some forwards have a branch for a certain name, such as GPT-2's for "eager".
        return IMPLEMENTATION if self.layer.at_work else self.base._attn_implementation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling apply to the view itself
            raise AttributeError(name)
        return getattr(self.__dict__["base"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.base, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return ConfigView, (self.base, self.layer, self.interface)


class _AsItWas:
    """An attention module with its real config, for functions that read it; all other attributes are the module's."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Columns(NamedTuple):
    """A prefix as `join` takes it, and the columns that each sample sees (None: all)."""

    key: Tensor
    value: Tensor
    keep: Tensor | None


class PrefixLayer(InsertedLayer):
    """The prefixes of one attention module, which it joins to the module's keys and values.

    Prefixes of several active adapters are concatenated. Where one batch uses several adapters, shorter prefixes are
    filled up with hidden columns. For rows of the base model all columns are hidden, so the output equals the base's
    up to the rounding of longer sums. Without an active adapter the module runs unchanged.

    Attention weights that the model returns cover its own tokens only, so they sum to less than 1.

    Source: Li and Liang 2021 (arXiv 2101.00190).

    Args:
        route: which row of a batch uses which adapter; one object shared by all layers of a model.
        facts: facts about the attention module from `find_attention`.
    """

    adapter_layer_names = ("lntune_prefix",)
    other_param_names = ()
    child = "kv_prefix"

    lntune_prefix: Any  # an `nn.ModuleDict` of adapter names and `Prefix`es; torch types its items loosely
    _host: Any

    def __init__(self, route: Route, facts: AttentionFacts) -> None:
        super().__init__(route, facts.name)
        self._sizes = facts.heads, facts.head_dim

    def attach(self, host: nn.Module) -> None:
        """Become a child of `host`, and replace the config of `host` by a `ConfigView`.

        Raises:
            UnsupportedError: `host` does not use transformers' attention interface. Nothing has changed.
        """
        interface = Interface.of(type(host))
        if interface is None:
            raise UnsupportedError(f"{self.label} ({type(host).__name__}) does not use transformers' {FUNCTIONS}.")
        super().attach(host)
        # Not by `__setattr__`, which would make the host a child of its child.
        self.__dict__["_host"] = host
        self._host.config = ConfigView(self._host.config, self, interface)

    def detach(self, host: nn.Module) -> None:
        super().detach(host)
        self._host.config = self._host.config.base
        del self.__dict__["_host"]

    def update_layer(self, adapter_name: str, config: Any, stored: bool = False) -> None:
        """Create the prefix of an adapter.

        Args:
            adapter_name: the new adapter.
            config: its `PrefixConfig`.
            stored: whether the values come from a file, which holds the plain tensor and no network.
        """
        heads, head_dim = self._sizes
        base = next((p for p in self._host.parameters(recurse=True) if p.is_floating_point()), torch.empty(0))
        self.lntune_prefix[adapter_name] = Prefix(
            config.num_virtual_tokens,
            heads * head_dim,
            hidden=None if stored else config.reparametrize,
            std=0.02 if config.init_weights else 1.0,
            dtype=delta_dtype(base.dtype, config.torch_delta_dtype),
        )
        self.base_dtype = base.dtype
        self.settle(adapter_name, config, device_of(self._host) or base.device)

    def stack(self, order: Sequence[str]) -> dict[str, Tensor]:
        """Stack the prefixes of all adapters for a routed forward pass, filled up to the longest.

        Args:
            order: n names of adapters; a name without a prefix here gets an empty one.

        Returns:
            `prefix`, `(n, 2, P, H * hd)`, and `keep`, `(n, P)` bool, True for columns that are not filling.
        """
        held = {name: prefix() for name, prefix in self.lntune_prefix.items()}
        first = next(iter(held.values()))
        longest = max(prefix.shape[1] for prefix in held.values())
        stack = first.new_zeros(len(order), 2, longest, first.shape[2])
        keep = torch.zeros(len(order), longest, dtype=torch.bool, device=first.device)
        for row, name in enumerate(order):
            if name in held:
                columns = held[name].shape[1]
                stack[row, :, :columns] = held[name]
                keep[row, :columns] = True
        return {"prefix": stack, "keep": keep}

    @property
    def at_work(self) -> bool:
        """Whether a forward pass would use a prefix now."""
        if self.disable_adapters:
            return False
        return len(self.lntune_prefix) > 0 if self._route.on() else len(self.running) > 0

    def columns(self, query: Tensor) -> Columns:
        """The prefixes for one call of the attention.

        Args:
            query: the queries, `(B, H, T, hd)`.

        Returns:
            Keys and values of the prefixes, and which columns each sample sees.

        Raises:
            RoutingError: the batch has another length than the list of adapter names.
        """
        keep = None
        if self._route.on():
            stacks = self.stacks()
            # Without the axis of heads, which is not that of the samples.
            rows = self._route.index((query.shape[0], *query.shape[2:]), self.label, stacks["keep"].device)
            both, keep = stacks["prefix"].index_select(0, rows), stacks["keep"].index_select(0, rows)
        else:
            own = [self.lntune_prefix[name]() for name in self.running]
            both = own[0] if len(own) == 1 else torch.cat(own, dim=1)
        key, value = both.unflatten(-1, self._sizes).unbind(-4)
        return Columns(key, value, keep)

    def check_keys(self, key: Tensor, value: Tensor) -> None:
        """Check that keys and values have the sizes found by `find_attention`.

        Args:
            key: `(B, key heads, S, hd)`.
            value: `(B, key heads, S, hd)`.

        Raises:
            UnsupportedError: the number of heads or their width differs.
        """
        heads, head_dim = self._sizes
        for tensor in (key, value):
            if (tensor.shape[1], tensor.shape[3]) != (heads, head_dim):
                raise UnsupportedError(
                    f"{self.label} was found to have {heads} key heads of width {head_dim}, but it attends over "
                    f"{tensor.shape[1]} of width {tensor.shape[3]}. Leave it out with exclude_modules."
                )


def lntune_prefix(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function of modules with a `PrefixLayer`: the original one, with the prefixes on the left.

    Args:
        module: the attention module.
        query: `(B, H, T, hd)`.
        key: `(B, key heads, S, hd)`.
        value: `(B, key heads, S, hd)`.
        attention_mask: the mask for the original function.
        **kwargs: further arguments of the original function.

    Returns:
        The output of the original function, and its attention weights `(B, H, T, S)` without the prefix columns, or
        None.

    Raises:
        UnsupportedError: the original function, or one of its arguments, does not allow a prefix.
    """
    view, layer = module.config, module.kv_prefix
    implementation = view.base._attn_implementation
    original = view.interface.original(implementation)
    if not layer.at_work:
        return original(module, query, key, value, attention_mask, **kwargs)
    flash = implementation is not None and "flash" in implementation
    _refuse(layer.label, implementation, attention_mask, kwargs, query.shape[0] if flash else None)
    layer.check_keys(key, value)
    prefix = layer.columns(query)
    count, queries, keys = prefix.key.shape[-3], query.shape[2], key.shape[2]
    key, value = join(key, value, prefix.key, prefix.value)
    eager = implementation is None or implementation == "eager"
    mask, causal = attention_mask, False
    if flash:
        # Flash attention is causal by a flag and aligned at the right, so all queries see a prefix on the left.
        if mask is None and prefix.keep is not None:
            mask = torch.ones(query.shape[0], keys, dtype=torch.bool, device=query.device)
    elif mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    elif not eager:
        flag = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if flag is None else flag
    if mask is not None or causal or prefix.keep is not None:
        made = query.dtype if eager else torch.bool
        mask = widen_mask(mask, count, queries, keys, causal=causal, keep=prefix.keep, dtype=made, device=query.device)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = widen_bias(kwargs["position_bias"], count, keys)
    if not eager and implementation != "sdpa":
        module = _AsItWas(module, view.base)  # flash attention asks the config for its own name
    output, weights = original(module, query, key, value, mask, **kwargs)
    if isinstance(weights, Tensor) and weights.shape[-1] == count + keys:
        weights = weights[..., count:]
    return output, weights


def _refuse(label: str, implementation: str | None, mask: Any, kwargs: dict[str, Any], flash_batch: int | None) -> None:
    """Refuse calls in which a prefix would be computed wrongly.

    Raises:
        UnsupportedError: such a call; the message names an alternative.
    """
    name = implementation or "eager"
    instead = 'Use model.set_attn_implementation("sdpa").'
    problem = None
    if kwargs.get("cache") is not None or "paged" in name:
        problem, instead = "continuous batching, with its paged cache", "Use model.generate."
    elif "flex" in name or not (mask is None or isinstance(mask, Tensor)):
        problem = f"{name}, whose block masks cannot be widened"
    elif any(kwargs.get(part) is not None for part in ("indices", "block_indices")):
        problem, instead = "attention to chosen keys only", "Leave this module out with exclude_modules."
    elif flash_batch is not None and kwargs.get("sliding_window") is not None:
        problem = f"a sliding window in {name}, which would count the prefix"
    elif flash_batch is not None and (kwargs.get("cu_seq_lens_q") is not None or _packed(kwargs, flash_batch)):
        problem = f"several sequences packed into one in {name}, of which only the first would see it"
    if problem is not None:
        raise UnsupportedError(f"{label}: a prefix does not work with {problem}. {instead}")


def _packed(kwargs: dict[str, Any], batch: int) -> bool:
    """Whether positions restart within a row, from which flash attention infers packed sequences."""
    positions = kwargs.get("position_ids")
    if batch != 1 or positions is None or positions.dim() != 2:
        return False
    return bool((positions.diff(dim=-1) != 1).any())
