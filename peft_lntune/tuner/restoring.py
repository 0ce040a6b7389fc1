"""Shared by all loaders: a refused adapter leaves the model unchanged, and the error says what to do."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.config import LNTuneConfig
from peft_lntune.errors import AdapterFileError, HeadFileError, PeftLNTuneError
from peft_lntune.storage.keys import of_adapter

__all__ = ["configs_of", "restored_on_error", "told_by_us"]

# Errors that do not come from the adapter.
_LEFT_ALONE = (MemoryError, torch.OutOfMemoryError)


@contextmanager
def restored_on_error(model: nn.Module, adapter_name: str | None = None, config: Any = None) -> Iterator[None]:
    """Restore the model if loading an adapter of this package fails inside this context.

    Args:
        model: the model to load into.
        adapter_name: an adapter of the model whose tensors may be overwritten.
        config: a config given by the caller, which loading writes into.

    Yields:
        Nothing.
    """
    before = set(configs_of(model))
    restore = _remember(model, adapter_name, config)
    try:
        yield
    except BaseException as error:  # an interrupted load leaves no half adapter either
        if isinstance(error, PeftLNTuneError) or before or set(configs_of(model)):
            restore()
        raise


@contextmanager
def told_by_us(source: Any, is_ours: Callable[[], bool]) -> Iterator[None]:
    """Turn errors of other packages while loading an adapter of ours into errors of ours, with the original as cause.

    Args:
        source: folder or repository of the adapter, for the message.
        is_ours: says whether the adapter or the model is of this package; called only after an error.

    Yields:
        Nothing.

    Raises:
        AdapterFileError: another package raised an error for an adapter of ours.
        HeadFileError: the shapes of a head differ.
    """
    try:
        yield
    except (PeftLNTuneError, *_LEFT_ALONE):
        raise
    except Exception as error:
        if not is_ours():
            raise
        raise _told(source, error) from error


def _told(source: Any, error: Exception) -> AdapterFileError:
    said = str(error).strip() or type(error).__name__
    if isinstance(error, KeyError) and "." in said:
        # PEFT looks up each tensor of a head by its name in the file.
        return AdapterFileError(
            f"{source} lacks {said}, a tensor of a module in modules_to_save. It was saved from another model, or the "
            "file was changed."
        )
    if isinstance(error, RuntimeError) and ("size mismatch" in said or "mismatched_sizes" in said):
        return HeadFileError(f"{source} does not fit this model. {said}")
    kind = "" if isinstance(error, (ValueError, RuntimeError, OSError)) else f"{type(error).__name__}: "
    return AdapterFileError(
        f"the adapter {source} could not be loaded: {kind}{said}. If it could be loaded before, its files or the model "
        "have changed; get a good copy of both files of the adapter."
    )


def configs_of(model: Any) -> dict[str, LNTuneConfig]:
    """List the adapters of this package in a model.

    Args:
        model: any object; one without `peft_config` has no adapters.

    Returns:
        The configs by adapter name.
    """
    configs = getattr(model, "peft_config", None)
    named = configs if isinstance(configs, dict) else {}
    return {name: config for name, config in named.items() if isinstance(config, LNTuneConfig)}


def _remember(model: nn.Module, adapter_name: str | None, config: Any) -> Callable[[], None]:
    """Return a function that restores the attributes of all modules, and so modules, adapters, modes, flags and values.

    Containers are restored in place, because PEFT shares them (`peft_config`) between its model, tuner and base model.
    """
    configs = [*configs_of(model).values(), *([] if config is None else [config])]
    attributes = [(owner, dict(vars(owner))) for owner in (*model.modules(), *configs) if hasattr(owner, "__dict__")]
    containers: dict[int, tuple[Any, Any]] = {}
    for _, saved in attributes:
        for value in saved.values():
            for container in _containers(value, 3):
                containers[id(container)] = container, container.copy()
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    values = [(tensor, tensor.detach().clone()) for tensor in _tensors(model, adapter_name)]

    @torch.no_grad()
    def restore() -> None:
        for owner, saved in attributes:
            vars(owner).clear()
            vars(owner).update(saved)
        for container, content in containers.values():
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for tensor, value in values:
            tensor.copy_(value)

    return restore


def _containers(value: Any, depth: int) -> Iterator[Any]:
    """A container and the containers in it, down to the depth at which layers are held."""
    if type(value) in (dict, OrderedDict, list, set):
        yield value
        for item in (value.values() if isinstance(value, dict) else value) if depth else ():
            yield from _containers(item, depth - 1)


def _tensors(model: nn.Module, adapter_name: str | None) -> list[Tensor]:
    if adapter_name is None:
        return []
    named = [*model.named_parameters(), *model.named_buffers()]
    return [tensor for name, tensor in named if of_adapter(name, adapter_name)]
