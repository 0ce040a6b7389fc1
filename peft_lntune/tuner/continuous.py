"""Adapters of a PeftModel in transformers' continuous batching, by `adapter_names` of `generate_batch`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_lntune.continuous.adapters import RequestAdapter, next_serial
from peft_lntune.errors import RoutingError, UnsupportedError
from peft_lntune.layers import NormLayer
from peft_lntune.routing.packed import PackedRows
from peft_lntune.routing.stacks import BASE, Stack, rows_of_layers
from peft_lntune.routing.tokens import TokenFact, measure_causal
from peft_lntune.tuner.inject import route_of

if TYPE_CHECKING:
    from peft_lntune.tuner.model import LNTuneModel

__all__ = ["LayerAdapters", "call_continuous"]


class LayerAdapters:
    """Gives requests of one `generate_batch` the adapters of a PeftModel; see `continuous.adapters.Adapters`.

    Args:
        tuner: the tuner.
    """

    def __init__(self, tuner: "LNTuneModel") -> None:
        self.owner: object = tuner
        self._tuner = tuner
        self._route = route_of(tuner.model)
        self._taken: dict[str, RequestAdapter] = {}
        self._names: list[tuple[str, ...]] = []
        self._facts: list[Mapping[str, TokenFact] | None] = []

    def take(self, names: Iterable[str | None]) -> dict[str | None, RequestAdapter]:
        return {name: self._take(BASE if name is None else name) for name in names}

    def _take(self, name: str) -> RequestAdapter:
        self._tuner._check_route(name)
        if name not in self._taken:
            layers = self._layers()
            tensors = [tensor for layer in layers for tensor in layer.entries()]
            stacks = rows_of_layers([name], tensors, self._route.kept)
            self._names = [stack.names for stack in stacks]
            self._taken[name] = RequestAdapter(name, next_serial(), [stack.values[0] for stack in stacks])
        return self._taken[name]

    def as_it_is(self, requests: Sequence[RequestAdapter]) -> bool:
        return False  # the model as it is has its active adapter

    def facts(self) -> Mapping[str, TokenFact] | None:
        if not self._facts:
            watched: dict[str, nn.Module] = {layer.label: layer for layer in self._layers()}
            self._facts.append(measure_causal(self._tuner.model, watched))
        return self._facts[0]

    def gathered(self, rows: Sequence[Sequence[Tensor]]) -> list[Stack]:
        with torch.inference_mode(False), torch.no_grad():
            each = zip(self._names, zip(*rows, strict=True), strict=True)
            return [Stack(names, torch.stack(values)) for names, values in each]

    @contextmanager
    def routed(self, packed: PackedRows) -> Iterator[None]:
        self._tuner._check_route(list(self._taken))  # the model may have changed since
        with self._route.packing(packed, "`adapter_names`"):
            yield

    def check_start(self, manager: Any) -> None:
        return None

    def _layers(self) -> list[NormLayer]:
        """The layers of norms, after checking that the model has no others."""
        found = []
        for name, module in self._tuner.model.named_modules():
            if isinstance(module, NormLayer):
                found.append(module)
            elif isinstance(module, (*self._tuner.tuner_layer_cls, ModulesToSaveWrapper)):
                raise UnsupportedError(
                    f"{name} ({type(module).__name__}) is not a norm, and continuous batching routes norms by token, "
                    "nothing else. Delete the adapters that tune other modules, or call generate, with a name per row."
                )
        return found


def call_continuous(
    tuner: "LNTuneModel",
    method: str,
    own: Callable[..., Any],
    *args: Any,
    adapter_names: Sequence[str] | str | None = None,
    **kwargs: Any,
) -> Any:
    """Call one of transformers' methods for continuous batching.

    Args:
        tuner: the tuner of the model.
        method: name of the method.
        own: the method of the base model.
        *args: arguments of the call.
        adapter_names: the adapter of each prompt of `generate_batch`, or one for all; None: the active adapter.
        **kwargs: keyword arguments of the call.

    Returns:
        What the method returns.

    Raises:
        RoutingError: names are given to another method than `generate_batch`, or to none of their number.
        UnsupportedError: the model has adapters of other modules than norms.
    """
    if adapter_names is None:
        kept = getattr(tuner.model, "_cached_continuous_batching_manager", None)
        if getattr(getattr(kept, "adapters", None), "owner", None) is tuner:
            raise RoutingError(
                "the model keeps a manager of continuous batching (persistent_manager=True) of a call with "
                "`adapter_names`. Call model.destroy_cached_continuous_batching_manager() first."
            )
        if kept is not None and kept.batch_processor is not None and not kept.is_running():
            # transformers finds cached prefixes by their tokens alone, and another adapter may be active by now.
            kept.batch_processor.cache.evict_cached_blocks()
        return own(*args, **kwargs)
    if method != "generate_batch":
        raise RoutingError(
            f"{method} takes no `adapter_names`: each request names its adapter. Make an AdapterBank of this model, "
            "attach it, and call manager.add_request(ids, adapter=name); or call generate_batch."
        )
    from peft_lntune.continuous.manager import generate_batch  # its import takes long, and few need it

    return generate_batch(tuner.model, own, LayerAdapters(tuner), adapter_names, "`adapter_names`", *args, **kwargs)
