"""A refused adapter leaves no trace, and the error says what to do: shared by everything that loads one."""

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

# These say nothing of the adapter.
_LEFT_ALONE = (MemoryError, torch.OutOfMemoryError)


@contextmanager
def restored_on_error(model: nn.Module, adapter_name: str | None = None, config: Any = None) -> Iterator[None]:
    """Put the model back as it was where an adapter of ours could not be loaded.

    Args:
        model: the model to load into.
        adapter_name: the adapter whose tensors may be written over, where it exists.
        config: one that the caller has given, which loading writes into.
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
    """Turn what others raise while they load an adapter of ours into an error of ours, with theirs as its cause.

    Args:
        source: where the adapter comes from, for the message.
        is_ours: whether it, or the model, is of this package; asked only where something was raised.
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
        # PEFT looks up each tensor of a head in modules_to_save by its name in the file.
        return AdapterFileError(
            f"{source} lacks {said}, a tensor of a module in modules_to_save. It was saved from another model, or the "
            "file was changed."
        )
    if isinstance(error, RuntimeError) and ("size mismatch" in said or "mismatched_sizes" in said):
        return HeadFileError(f"{source} does not fit this model. {said}")
    kind = "" if isinstance(error, (ValueError, RuntimeError, OSError)) else f"{type(error).__name__}: "
    return AdapterFileError(
        f"the adapter {source} could not be loaded: {kind}{said}. If it was loaded before, its files or the model have "
        "changed since; get a good copy of both files of the adapter."
    )


def configs_of(model: Any) -> dict[str, LNTuneConfig]:
    """The adapters of this package in a model."""
    configs = getattr(model, "peft_config", None)
    named = configs if isinstance(configs, dict) else {}
    return {name: config for name, config in named.items() if isinstance(config, LNTuneConfig)}


def _remember(model: nn.Module, adapter_name: str | None, config: Any) -> Callable[[], None]:
    """What puts the attributes of all modules back, and so the modules, adapters and modes; flags and values too.

    Containers are put back in place, because PEFT shares them (`peft_config`) between its model, tuner and base model.
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
    """A container and those in it, as deep as layers are put into them."""
    if type(value) in (dict, OrderedDict, list, set):
        yield value
        for item in (value.values() if isinstance(value, dict) else value) if depth else ():
            yield from _containers(item, depth - 1)


def _tensors(model: nn.Module, adapter_name: str | None) -> list[Tensor]:
    if adapter_name is None:
        return []
    named = [*model.named_parameters(), *model.named_buffers()]
    return [tensor for name, tensor in named if of_adapter(name, adapter_name)]
