"""transformers' manager of continuous batching, with an adapter per request.

The engine packs the requests of a step into one row and runs it in a thread of its own. Before each step, that thread
gathers the parameters of the requests' adapters, and the norms of the model follow them token by token.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation import ContinuousBatchingManager
from transformers.utils.versions import require_version

from peft_lntune.continuous.adapters import BASE_SERIAL, Adapters, RequestAdapter, packed_requests
from peft_lntune.continuous.prefixes import salt_prefixes
from peft_lntune.core.detour import Detour, patched
from peft_lntune.errors import PeftLNTuneError, RoutingError, UnsupportedError

__all__ = ["ALWAYS", "AdapterManager", "checked_names", "generate_batch", "make_manager"]

_KEY = "adapter"  # the place of the adapter among a request's arguments, which follow it through forks and restarts


class _Always:
    active = True

    def on(self) -> bool:
        return True


ALWAYS = _Always()
"""The switch of detours that are always taken."""


class AdapterManager(ContinuousBatchingManager):
    """A manager of continuous batching whose requests name their adapters.

    It is made by `init_continuous_batching`, `continuous_batching_context_manager` or `generate_batch` of a model with
    an attached `AdapterBank`. All methods are those of transformers; `add_request` and `add_requests` take the adapter
    as well.

    - A request keeps its adapter until it ends, also if the adapter is removed meanwhile. Adapters that are added can
      be named at once.
    - A cached prefix is used again for the same adapter only.
    - While the engine runs, no other thread can run the model routed; `pause` lets it.
    - CUDA graphs and compiled steps are refused: they would repeat the parameters of the batch they were made of.
    """

    adapters: Adapters
    failure: PeftLNTuneError | None = None
    names_of_batch: Sequence[str | None] | None = None

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        adapter: str | None = None,
        **logit_processor_kwargs: Any,
    ) -> str | None:
        """Add a request.

        Args:
            input_ids: token ids of the prompt.
            request_id: id of the request; None: a new one.
            max_new_tokens: limit of new tokens; None: that of the generation config.
            streaming: whether tokens are delivered one by one.
            record_timestamps: whether the time of each token is recorded.
            eos_token_id: ids that end the request; None: those of the generation config.
            adapter: name of the adapter; None or `"__base__"`: the base model.
            **logit_processor_kwargs: arguments of the logits processors.

        Returns:
            The id of the request; None where transformers accepts no request any more.

        Raises:
            PeftLNTuneError: the adapter is unknown, or cannot be served by token.
        """
        taken = getattr(input_ids, "adapter", None) or self.adapters.take([adapter])[adapter]
        # So that transformers passes the argument on, and copies it wherever it copies a request.
        self.logit_processor.supported_keys[_KEY] = RequestAdapter
        added: str | None = super().add_request(
            input_ids,
            request_id=request_id,
            max_new_tokens=max_new_tokens,
            streaming=streaming,
            record_timestamps=record_timestamps,
            eos_token_id=eos_token_id,
            **{_KEY: taken},
            **logit_processor_kwargs,
        )
        return added

    def add_requests(
        self,
        inputs: list[list[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        adapters: Sequence[str] | str | None = None,
        **logit_processor_kwargs: Any,
    ) -> list[str]:
        """Add several requests.

        Args:
            inputs: token ids of the prompts.
            max_new_tokens: limit of new tokens; None: that of the generation config.
            streaming: whether tokens are delivered one by one.
            record_timestamps: whether the time of each token is recorded.
            adapters: name of the adapter of each request, or one for all; None: as in `add_request`.
            **logit_processor_kwargs: arguments of the logits processors.

        Returns:
            The ids of the requests, in the order of the prompts.

        Raises:
            RoutingError: there is another number of names than of prompts.
            PeftLNTuneError: an adapter is unknown, or cannot be served by token. No request is added.
        """
        names = checked_names(adapters, len(inputs), "`adapters`") if adapters is not None else self.names_of_batch
        taken = self.adapters.take(names or [None])
        prompts = [_Prompt(ids, taken[name]) for ids, name in zip(inputs, names or [None] * len(inputs), strict=True)]
        added: list[str] = super().add_requests(
            inputs=prompts,
            max_new_tokens=max_new_tokens,
            streaming=streaming,
            record_timestamps=record_timestamps,
            **logit_processor_kwargs,
        )
        return added

    def start(self) -> None:
        """Start the thread of the engine.

        Raises:
            RoutingError: another engine runs on this model.
        """
        self.adapters.check_start(self)
        super().start()

    @property
    def is_held_here(self) -> bool:
        """Whether the engine runs, and the caller's thread has not paused it."""
        return self.is_running() and not self.background_thread_status.is_pause_requested(local=True)

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        salt_prefixes(processor, _serial_of)
        return processor

    def _generation_step(self) -> None:
        ios: Any = self.batch_processor.inputs_and_outputs
        # With asynchronous batching there are two batches; this is the one that runs next.
        pairs = getattr(ios, "io_pairs", None)
        batch = (ios if pairs is None else pairs[ios.current_pair].host_io).requests_in_batch
        requests = [_adapter_of(each.state) for each in batch]
        if self.adapters.as_it_is(requests):
            super()._generation_step()
            return
        try:
            lengths = [each.query_length for each in batch]
            with self.adapters.routed(packed_requests(self.adapters, requests, lengths, self.model.device)):
                super()._generation_step()
        except PeftLNTuneError as error:
            self.failure = error  # transformers only logs it, and its requests fail
            raise


class _Prompt(list):
    """A prompt with its adapter; transformers sorts prompts."""

    def __init__(self, ids: list[int], adapter: RequestAdapter) -> None:
        super().__init__(ids)
        self.adapter = adapter


_NONE = RequestAdapter("__base__", BASE_SERIAL, ())


def _adapter_of(state: Any) -> RequestAdapter:
    found: RequestAdapter = state.logit_processor_kwargs.get(_KEY, _NONE)
    return found


def _serial_of(state: Any) -> int:
    return _adapter_of(state).serial


def checked_names(names: Sequence[str] | str, count: int, what: str) -> list[str]:
    """One name for each prompt.

    Args:
        names: the names, or one for all.
        count: number of prompts.
        what: the user's term for the names, for errors.

    Returns:
        The names.

    Raises:
        RoutingError: there is another number of names.
    """
    if isinstance(names, str):
        return [names] * count
    if len(names) != count:
        raise RoutingError(
            f"Length of {what} should be the same as the number of inputs, but got {len(names)} and {count} "
            "respectively. Give one name per prompt, or one name as a string for all prompts."
        )
    return list(names)


def make_manager(
    init: Callable[..., Any],
    adapters: Adapters,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    workload_hints: Any = None,
) -> AdapterManager:
    """Make a manager whose requests name their adapters.

    Args:
        init: the model's own `init_continuous_batching`.
        adapters: where the adapters come from.
        generation_config: as in transformers.
        continuous_batching_config: as in transformers, without CUDA graphs and compilation; it is not changed.
        workload_hints: as in transformers.

    Returns:
        The manager; the one that the model keeps (`persistent_manager=True`), if it is of these adapters.

    Raises:
        UnsupportedError: CUDA graphs, compilation or tensor parallelism are asked for.
        RoutingError: the model keeps a manager of others.
    """
    require_version("transformers>=5.23", "Continuous batching with an adapter per request needs it.")
    config = continuous_batching_config or getattr(generation_config, "continuous_batching_config", None)
    config = copy.copy(config) if config is not None else ContinuousBatchingConfig()
    graphs = config.use_cuda_graph if isinstance(config.use_cuda_graph, tuple) else (config.use_cuda_graph,)
    if any(graphs) or config.q_padding_interval_size or config.kv_padding_interval_size:
        raise UnsupportedError(
            "CUDA graphs repeat the parameters of the batch that they were captured from, so they cannot follow the "
            "adapters of requests. Leave use_cuda_graph and the padding intervals out of the ContinuousBatchingConfig."
        )
    config.use_cuda_graph = False
    # Before a manager is made, which changes the model's attention.
    compiled = config.default_compile_level or config.varlen_compile_config or config.decode_compile_config
    if compiled or getattr(generation_config, "compile_config", None) is not None:
        raise UnsupportedError(
            "a compiled step of continuous batching does not follow the adapters of requests. Leave out the compile "
            "configs and default_compile_level."
        )
    manager = init(
        generation_config=generation_config, continuous_batching_config=config, workload_hints=workload_hints
    )
    if isinstance(manager, AdapterManager):
        if manager.adapters.owner is not adapters.owner:
            raise RoutingError(
                "the model keeps a manager of continuous batching (persistent_manager=True) with other adapters. Call "
                "model.destroy_cached_continuous_batching_manager() first."
            )
        manager.adapters = adapters
        return manager
    if manager.batch_processor is not None or manager.is_running():
        raise RoutingError(
            "the model keeps a manager of continuous batching (persistent_manager=True) that knows no adapters. Call "
            "model.destroy_cached_continuous_batching_manager() first."
        )
    if manager.distributed_helper.tp_size > 1:
        raise UnsupportedError(
            "continuous batching with an adapter per request does not run with tensor parallelism. Use one device."
        )
    # transformers makes managers in one place only, which names its own class.
    manager.__class__ = AdapterManager
    manager.adapters = adapters
    return manager


def generate_batch(
    model: Any,
    own: Callable[..., Any],
    adapters: Adapters,
    names: Sequence[str] | str,
    what: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run `generate_batch` of a model with an adapter for each prompt.

    Args:
        model: the model of transformers.
        own: its `generate_batch`.
        adapters: where the adapters come from.
        names: the adapter of each prompt, or one for all.
        what: the user's term for the names, for errors.
        *args: arguments of `generate_batch`.
        **kwargs: keyword arguments of `generate_batch`.

    Returns:
        The result of `generate_batch`.

    Raises:
        PeftLNTuneError: the number of names is wrong, an adapter is unknown or cannot be served by token, or a step of
            the engine was refused.
    """
    inputs = args[0] if args else kwargs.get("inputs", ())
    listed = checked_names(names, len(inputs), what)
    taken = adapters.take(listed)  # transformers would only log an error from here on
    made: list[AdapterManager] = []

    def init(beneath: Any, *init_args: Any, **init_kwargs: Any) -> AdapterManager:
        while isinstance(beneath, Detour):
            beneath = beneath.own
        manager = make_manager(beneath, adapters, *init_args, **init_kwargs)
        manager.names_of_batch, manager.failure = listed, None
        made.append(manager)
        return manager

    with patched([Detour(model, ALWAYS, init, "init_continuous_batching")]):
        try:
            found = own(*args, **kwargs)
        finally:
            for manager in made:
                manager.names_of_batch = None
            del taken
    for manager in made:
        if manager.failure is not None:
            raise manager.failure
    return found
