"""The entries of a model: its own methods, and the forwards of parts that may be called on their own.

While a route is on, the outermost call shows the layout of the batch. It is checked here before the first layer runs,
and the place of samples in each layer is looked up, or measured (`peft_lntune.routing.samples`) if not known yet.
"""

import inspect
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.core.detour import Detour
from peft_lntune.core.packed_positions import begins_again
from peft_lntune.errors import RoutingError
from peft_lntune.routing.packed import PackedRows, sequences_of
from peft_lntune.routing.recomputed import in_backward
from peft_lntune.routing.route import Route
from peft_lntune.routing.samples import Fact, measure_samples, tensors_in
from peft_lntune.routing.tokens import TokenFact, measure_tokens, probes_of

__all__ = ["CONTINUOUS", "Entries", "refuse_continuous"]

CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""The methods of transformers that pack requests into one row, in a separate thread."""

_CACHES = ("past_key_values", "cache_params", "state")
_INPUTS = ("inputs", "input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values", "encoder_outputs")
_PLACEHOLDER = re.compile(r"(image|video|audio|vision|speech).*_token_(id|index)$")
_MOST = 256  # number of cached call layouts


class Entries:
    """The detours of a model's entries, and the facts measured for its calls.

    Args:
        root: the model.
        route: while it is on, calls are checked.
        watched: returns the layers that follow the route, by their label in `route.rows`.
        known: facts by call layout, where they outlive this object; None: a dict of this object.
        on_packed: called before a batch of packed rows runs, with its rows by token.
        refused: methods of the model that are refused while a route is on.
    """

    def __init__(
        self,
        root: nn.Module,
        route: Route,
        watched: Callable[[], Mapping[str, nn.Module]],
        known: dict[object, Any] | None = None,
        on_packed: Callable[[PackedRows], None] = lambda packed: None,
        refused: Sequence[str] = CONTINUOUS,
    ) -> None:
        self.root, self.route, self.watched = root, route, watched
        self._known = {} if known is None else known
        self._inside: set[int] = set()
        self._generating = False
        self._whole: Mapping[str, Fact] | None = None
        self.on_packed, self.refused = on_packed, refused
        self._placeholders = _placeholders(getattr(root, "config", None))
        self._fused = any(isinstance(module, nn.TransformerEncoderLayer) for module in root.modules())

    def detours(self, modules: Mapping[str, nn.Module], places: Iterable[str]) -> list[Detour]:
        """Make one detour per entry; the caller patches them.

        Args:
            modules: modules of the model by name, as it calls them.
            places: names of the modules that follow the route.

        Returns:
            Detours of the model, of the parts that contain some of these places, and of `generate`.
        """
        found = [
            Detour(modules[name], self.route, partial(self._run, modules[name]))
            for name in _entry_names(modules, places)
        ]
        if callable(getattr(self.root, "generate", None)):
            found.append(Detour(self.root, self.route, self._generate, "generate"))
        for method in self.refused:
            if callable(getattr(self.root, method, None)):
                found.append(Detour(self.root, self.route, refuse_continuous, method))
        return found

    def _run(self, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return own(*args, **kwargs)
        here = threading.get_ident()
        if here in self._inside or in_backward() or self.route.packed is not None:
            return own(*args, **kwargs)
        self._check(kwargs)
        self._inside.add(here)
        try:
            with _step_by_step() if self._fused else nullcontext(), ExitStack() as stack:
                # `generate` was given one sequence per row; the positions of its padding may look otherwise.
                if not self.route.one and not self._generating and _has_packed_rows(kwargs):
                    packed = self._packed(module, args, kwargs)
                    self.on_packed(packed)
                    stack.enter_context(self.route.packing(packed))
                    return own(*args, **kwargs)
                self.route.facts = facts = self._facts(module, args, kwargs)
                self.route.refusing = any(fact.refused for fact in facts.values())
                output = own(*args, **kwargs)
                self._note_cache(module, kwargs, output)
                return output
        finally:
            self._inside.discard(here)

    def _generate(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
        self._check(named)
        if not self.route.one and _has_packed_rows(named):
            raise RoutingError(
                "generate got packed rows, with several sequences each (position_ids that begin again, or "
                "cu_seq_lens). Give it one sequence per row, padded on the left."
            )
        if not self.route.one:
            _check_inputs(self.root, self.route, named)
        generating, self._generating = self._generating, True
        try:
            self._whole = self._whole_facts(named)
            with self.route.expanding(_expansions_of(self.root, named)):
                return own(*args, **kwargs)
        finally:
            self._generating, self._whole = generating, None

    def _whole_facts(self, named: Mapping[str, Any]) -> Mapping[str, Fact] | None:
        """Facts for a generation that runs the towers of images before the model, which alone do not show the rows.

        Returns:
            Facts of one call of the whole model with the same inputs; None where the model gets all inputs itself.

        Raises:
            RoutingError: a copy of the model could not be run.
        """
        if not self.route.mixed or not self._placeholders or named.get("mm_encoder_outputs") is not None:
            return None
        accepted = inspect.signature(type(self.root).forward).parameters
        if "mm_encoder_outputs" not in accepted:
            return None
        given = {name: value for name, value in named.items() if name in accepted and name not in _CACHES}
        if isinstance(ids := named.get("inputs"), Tensor):
            given.setdefault("input_ids", ids)
        if not self._attached(given):
            return None
        return self._facts(self.root, (), given | ({"use_cache": False} if "use_cache" in accepted else {}))

    def _check(self, named: Mapping[str, Any]) -> None:
        if named.get("adapter_names") is not None:
            raise RoutingError(
                f"a route is on, and the model got `adapter_names` beside {self.route.what}. Give the names once: "
                "leave the route, or leave `adapter_names` out."
            )

    def _packed(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> PackedRows:
        """The rows by token of a batch of packed rows."""
        sequences, route = sequences_of(kwargs), self.route
        count = 0 if sequences is None else int(sequences.max()) + 1
        if sequences is None:
            raise RoutingError(
                "the rows of this batch are packed, but neither position_ids nor cu_seq_lens_q shows where their "
                "sequences begin. Give one of them, or batches with one sequence per row, padded."
            )
        if count != route.count:
            raise RoutingError(
                f"the rows of this batch are packed: they hold {count} sequences one after the other (position_ids "
                f"that begin again, or cu_seq_lens_q), but {route.what} are {route.count}. Give one name per sequence, "
                "in their order, or one name as a string for all of them."
            )
        device = route.gathered[0].values.device if route.gathered else sequences.device
        facts = self._token_facts(module, args, kwargs, sequences)
        return PackedRows(
            [stack for stack in route.gathered if len(stack.values) == count],
            sequences.to(device),
            facts=facts,
            shared=[stack for stack in route.gathered if len(stack.values) != count],
        )

    def _token_facts(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], sequences: Tensor
    ) -> Mapping[str, TokenFact] | None:
        """Where each layer has the tokens of packed rows, measured once per way of calling the model."""
        watched = self.watched()
        named = {**{str(place): value for place, value in enumerate(args)}, **kwargs}
        given = tuple((name, tensor.dim(), tensor.is_floating_point()) for name, tensor in tensors_in(named))
        # A cache, for one, decides whether transformers keeps sequences apart.
        options = tuple((name, value) for name, value in named.items() if isinstance(value, (bool, int, str)))
        config = getattr(self.root, "config", None)
        defaults = getattr(config, "_attn_implementation", None), getattr(config, "use_cache", None)
        mixed = int(sequences.max()) > 0
        own = getattr(module.forward, "own", None)
        key = "packed", id(module), own, given, options, defaults, mixed, frozenset(watched)
        if key not in self._known:
            self._known[key] = measure_tokens(module, args, kwargs, probes_of(sequences), watched)
        facts: Mapping[str, TokenFact] | None = self._known[key]
        if facts is None and mixed:
            raise RoutingError(
                "the rows of this batch are packed, and a copy of the model could not be run to see whether it keeps "
                "the sequences of a row apart. Give batches with one sequence per row, padded."
            )
        return facts

    def _facts(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Fact]:
        """Where each layer has the samples, as far as known."""
        if self.route.one:
            return {}
        if self._whole is not None:
            return self._whole
        named = {**{str(place): value for place, value in enumerate(args)}, **kwargs}
        caches = {name for name in _CACHES if named.get(name) is not None}
        tensors = [*tensors_in({name: value for name, value in named.items() if name not in caches})]
        size = self.route.size([len(tensor) for _, tensor in tensors if tensor.dim()])
        self.route.alike = size is not None and not self.route.mixed
        if size is None or not self.route.mixed:
            return {}
        attached = self._attached(named)
        later = None if attached else next((named[name] for name in caches), None)
        before, found = self._known.get(("latest", id(module)), (None, {}))
        if later is not None and before is not None and before() is later and not _empty(later):
            facts: Mapping[str, Fact] = found  # a later step of a generation has the layout of the first
            return facts
        watched = self.watched()
        shapes = tuple((name, *_layout(tensor, size)) for name, tensor in tensors)
        owners = self._owners(named, tensors) if attached else ()
        key = id(module), getattr(module.forward, "own", None), shapes, owners, frozenset(watched)
        if key not in self._known:
            while len(self._known) >= _MOST:
                del self._known[next(iter(self._known))]
            self._known[key] = measure_samples(module, args, kwargs, size, watched, attached) or {}
        facts = self._known[key]
        if attached and not facts:
            raise RoutingError(
                "this batch has images, or the like, beside its texts, and a copy of the model could not be run to see "
                "which row each of them belongs to. Run one batch per adapter."
            )
        return facts

    def _note_cache(self, module: nn.Module, kwargs: Mapping[str, Any], output: Any) -> None:
        """Remember the facts of a call with the cache that it filled, for the later steps with this cache."""
        if not self.route.mixed:
            return
        for name in _CACHES:
            cache = kwargs.get(name)
            cache = getattr(output, name, None) if cache is None else cache
            # Tuples and lists, which cannot be told from those of another call, are measured.
            if cache is not None and hasattr(cache, "__weakref__"):
                self._known["latest", id(module)] = weakref.ref(cache), self.route.facts
                return

    def _attached(self, named: Mapping[str, Any]) -> bool:
        """Whether the batch has images or the like beside token ids, which belong to rows by their placeholders."""
        if not self._placeholders or not isinstance(_ids_of(named), Tensor):
            return False
        others = {name: value for name, value in named.items() if name not in _CACHES and name != "inputs_embeds"}
        return any(tensor.is_floating_point() and "mask" not in name for name, tensor in tensors_in(others))

    def _owners(self, named: Mapping[str, Any], tensors: list[tuple[str, Tensor]]) -> tuple[object, ...]:
        """What decides which of the images belong to which row: placeholders in each row, and sizes of images."""
        ids = _ids_of(named)
        assert ids is not None
        counts = tuple(tuple((ids == number).flatten(1).sum(1).tolist()) for number in self._placeholders)
        sizes = tuple(
            (name, tuple(tensor.flatten().tolist()))
            for name, tensor in tensors
            if not tensor.is_floating_point() and tensor.dim() == 2 and tensor.shape[1] <= 3 < ids.shape[1]
        )
        return counts, sizes


def _ids_of(named: Mapping[str, Any]) -> Tensor | None:
    ids = named.get("input_ids", named.get("0"))
    return ids if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point() else None


def _empty(cache: Any) -> bool:
    """Whether a cache holds nothing yet, or again after its reset."""
    length = getattr(cache, "get_seq_length", None)
    try:
        return callable(length) and int(length()) == 0
    except (ValueError, TypeError, IndexError):  # a cache of states alone has no length
        return False


def _entry_names(modules: Mapping[str, nn.Module], places: Iterable[str]) -> list[str]:
    """The names of the model itself and of the parts that contain some of these places, except the layers of a list.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList([nn.LayerNorm(2)])})})
        >>> _entry_names(dict(model.named_modules()), ["encoder.layers.0"])
        ['', 'encoder']
    """
    lists = tuple(f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList))
    above = {place[:end] for place in places for end in (m.start() for m in re.finditer(r"\.", place))}
    callable_ = [name for name in modules if name in above and not f"{name}.".startswith(lists)] if above else []
    return ["", *callable_]


def _check_inputs(model: Any, route: Route, named: Mapping[str, Any]) -> None:
    """Check that `generate` gets as many samples as the route has names.

    The check comes before samples are repeated for beams and return sequences, where lengths could match by chance.
    """
    first = getattr(model, "main_input_name", "input_ids")
    for name in ("inputs", first, *_INPUTS):
        found = named.get(name)
        length = next((len(tensor) for _, tensor in tensors_in(found) if tensor.dim()), None)
        if length is not None:
            if length != route.count:
                raise RoutingError(route.another_length(length, f"in {name} of generate"))
            return


def _has_packed_rows(named: Mapping[str, Any]) -> bool:
    """Whether the rows of a batch hold several samples each, told from the arguments for packed rows.

    Example:
        >>> _has_packed_rows({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])})
        True
    """
    if any(name.startswith(("cu_seq", "seq_idx")) and value is not None for name, value in named.items()):
        return True
    again = begins_again(named.get("position_ids"), named.get("attention_mask"))
    return again is not None and bool(again.any())


def refuse_continuous(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Replaces the methods in `CONTINUOUS` while a route is on.

    Args:
        own: the method.
        *args: arguments of the call.
        **kwargs: keyword arguments of the call.

    Raises:
        RoutingError: always.
    """
    raise RoutingError(
        f"continuous batching ({', '.join(CONTINUOUS)}) runs in a thread of its own, so it does not follow this route. "
        "Outside of the route, name the adapter of each request: generate_batch(inputs, adapter_names=[...]) of the "
        "PeftModel, or an AdapterBank."
    )


def _expansions_of(model: object, options: Mapping[str, Any]) -> set[int]:
    """The factors by which `model.generate(**options)` may repeat samples: beams or return sequences.

    Example:
        >>> sorted(_expansions_of(None, {"num_beams": 4, "num_return_sequences": 2}))
        [1, 2, 4]
    """
    configs = [options.get("generation_config"), getattr(model, "generation_config", None)]
    factors = {1}
    for name in ("num_beams", "num_return_sequences"):
        values = [options.get(name), *(getattr(config, name, None) for config in configs)]
        factors.add(next((value for value in values if value), 1))
    return factors


@contextmanager
def _step_by_step() -> Iterator[None]:
    """Inside this context, torch's fused transformer layer is off: it uses the weights of norms and calls no norm."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _layout(tensor: Tensor, size: int) -> tuple[object, ...]:
    """The properties of a tensor that may decide where a model has samples; lengths do not."""
    ones = tuple(length == 1 for length in tensor.shape[1:])
    rows = len(tensor) // size if tensor.dim() and len(tensor) % size == 0 else None
    return tensor.dim(), tensor.is_floating_point(), None if rows is None else min(rows, 2), ones


def _placeholders(config: Any) -> tuple[int, ...]:
    found = {value for name, value in vars(config).items() if _PLACEHOLDER.search(name)} if config is not None else ()
    return tuple(sorted(value for value in found if isinstance(value, int)))
