"""Find what reads the output of each norm, by running the model.

A norm's delta can be folded into linear maps only where nothing else reads the norm's output: a residual connection, an
attention kernel or a router would keep the old output. Names do not tell this (Gemma 2 calls a post-norm
`post_attention_layernorm`, and Llama a pre-norm), so every operation of one forward pass is watched.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Consumers", "find_consumers"]

_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
"""Operations whose output holds the values of their input, one for one."""


@dataclass
class Consumers:
    """What reads the output of one norm.

    Attributes:
        linears: names of the linear maps that apply to its last dimension, in the order in which they run.
        others: the operations that read it otherwise, each with the module in which it runs; no linear map stands for
            these.
    """

    linears: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def find_consumers(
    norms: Mapping[str, nn.Module], linears: Mapping[str, nn.Module], modules: Mapping[str, nn.Module], run: Callable
) -> dict[str, Consumers]:
    """Find the linear maps that read the output of each norm, and everything else that reads it.

    Args:
        norms: the norms by name.
        linears: the linear maps by name; each must apply to the last dimension of its input.
        modules: every module of the model by name, for the texts in `Consumers.others`.
        run: runs the model once, in evaluation mode, on any inputs, and returns what it is used for, such as its
            logits. What does not run is not seen, so the inputs should be of the kind that the model is used with.

    Returns:
        The consumers of each norm that ran. A linear map that is also called with something else, such as the output
        of another norm, is among the `others` of each of its norms.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 3), nn.ReLU())
        >>> names = dict(model.named_modules())
        >>> found = find_consumers({"0": model[0]}, {"1": model[1]}, names, lambda: model(torch.ones(1, 2)))
        >>> found["0"]
        Consumers(linears=['1'], others=[])
    """
    watch = _Watch({module: name for name, module in linears.items()}, {m: n for n, m in modules.items()})
    handles = []
    try:
        for module in modules.values():
            handles.append(module.register_forward_pre_hook(watch.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(watch.leave, always_call=True))
        for name, norm in norms.items():
            handles.append(norm.register_forward_hook(watch.follow(name)))
        with torch.no_grad(), watch:
            answer = run()
        watch.answered(answer)
    finally:
        for handle in handles:
            handle.remove()
    return watch.consumers()


class _Watch(TorchDispatchMode):
    """Sees every operation, and knows the module that runs it.

    Args:
        linears: names of the linear maps by module.
        names: names of all modules by module.
    """

    def __init__(self, linears: Mapping[nn.Module, str], names: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self._linears, self._names = linears, names
        self._running: list[nn.Module] = []
        # Storages by address; the tensors are kept, so that no address is used again during the run.
        self._outputs: dict[int, tuple[str, Tensor]] = {}
        self._ran: dict[str, list[str]] = {}
        self._read_by: dict[str, dict[str, None]] = {}
        self._fed: dict[str, set[str | None]] = {}

    def follow(self, norm: str) -> Callable[..., None]:
        """A forward hook that follows the output of a norm."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._ran.setdefault(norm, [])
            if isinstance(output, Tensor) and _rows_are_last(output):
                self._outputs[_storage(output)] = norm, output
            else:
                self._other(norm, "an output that is no plain tensor")

        return hook

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of every module."""
        if module in self._linears:
            name, x = self._linears[module], next(iter((*args, *kwargs.values())), None)
            found = self._of(x)
            aligned = found is not None and _is_aligned(x, found[1])
            self._fed.setdefault(name, set()).add(found[0] if found is not None and aligned else None)
            if found is not None and aligned:
                self._ran[found[0]].append(name)
        self._running.append(module)

    def leave(self, module: nn.Module, *_: Any) -> None:
        """A forward hook of every module."""
        while self._running and self._running.pop() is not module:
            pass

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = [found for leaf in tree_leaves((args, kwargs or {})) if (found := self._of(leaf)) is not None]
        if read and not self._in_consumer(read[0][0]):
            self._saw(func, args, read, result)
        return result

    def _saw(self, func: Any, args: Any, read: list[tuple[str, Tensor]], result: Any) -> None:
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if outputs and all(self._of(output) is not None for output in outputs) and not func._schema.is_mutable:
            return  # a view
        if func in _COPIES and _is_aligned(args[0], read[0][1]) and _rows_are_last(outputs[0]):
            self._outputs[_storage(outputs[0])] = read[0][0], outputs[0]
            return
        for norm, _ in read:
            self._other(norm, func._schema.name.rpartition("::")[2])

    def _other(self, norm: str, what: str) -> None:
        inside = next((self._names[module] for module in reversed(self._running) if self._names.get(module)), "")
        self._read_by.setdefault(norm, {})[f"{what} in {inside or 'the model itself'}"] = None

    def answered(self, answer: Any) -> None:
        """Take note of what the model returned, which is read by whoever called it."""
        for norm, _ in filter(None, map(self._of, tree_leaves(answer))):
            self._read_by.setdefault(norm, {})["whoever calls the model: it is the answer"] = None

    def _in_consumer(self, norm: str) -> bool:
        """Whether a linear map that reads this norm is running."""
        return any(self._linears.get(module) in self._ran[norm] for module in self._running)

    def _of(self, x: Any) -> tuple[str, Tensor] | None:
        return self._outputs.get(_storage(x)) if isinstance(x, Tensor) and self._outputs else None

    def consumers(self) -> dict[str, Consumers]:
        """What was seen."""
        found = {}
        for norm, linears in self._ran.items():
            mixed = [name for name in dict.fromkeys(linears) if self._fed[name] != {norm}]
            others = [*self._read_by.get(norm, {}), *(f"{name}, which has other inputs too" for name in mixed)]
            found[norm] = Consumers([name for name in dict.fromkeys(linears) if name not in mixed], others)
        return found


def _storage(x: Tensor) -> int:
    """The identity of a tensor's memory, which its views share; on the meta device too."""
    return x.untyped_storage()._cdata


def _rows_are_last(x: Tensor) -> bool:
    """Whether the last dimension is contiguous and all others step over whole rows of it."""
    return _is_aligned(x, x)


def _is_aligned(view: Any, whole: Tensor) -> bool:
    """Whether each row of a view, along its last dimension, is a row of the whole."""
    if view.dim() == 0 or view.shape[-1] != whole.shape[-1]:
        return False
    width = view.shape[-1]
    steps = [step for size, step in zip(view.shape[:-1], view.stride()[:-1], strict=True) if size > 1]
    offset = view.storage_offset() - whole.storage_offset()
    return (width == 1 or view.stride(-1) == 1) and all(step % width == 0 for step in [*steps, offset])
