"""A detour: a method put into one module in place of its own, which does something else while a route is on.

It is an entry in the instance's `__dict__`, so no parameter is renamed, no module is replaced, and hooks run around it
as around the module's own forward. `forward_of` returns the forward beneath the detour.
"""

import copy
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any, Protocol

from torch import nn

__all__ = ["Detour", "Switch", "computes", "forward_of", "patched", "put_on_copy"]


class Switch(Protocol):
    """Decides whether a detour is taken."""

    @property
    def active(self) -> bool:
        """Whether it is on for any thread."""

    def on(self) -> bool:
        """Whether it is on for the caller; raises where neither answer would be right."""


class _Off:
    active = False

    def on(self) -> bool:
        return False


class Detour:
    """Takes the place of a module's method, usually `forward`.

    Args:
        module: the module; `patch` changes it, creating the detour does not.
        switch: while it is on, `run` is called in place of the method; usually a route.
        run: called as `run(own, *args, **kwargs)`, with `own` the method that was there before.
        method: the method's name.

    Example:
        >>> class On:
        ...     active, on = True, lambda self: True
        >>> norm = nn.LayerNorm(2, bias=False)
        >>> detour = Detour(norm, On(), lambda own, x: own(x) + 1)
        >>> detour.patch()
        >>> norm(torch.zeros(2)).detach()
        tensor([1., 1.])
        >>> detour.restore()
    """

    def __init__(self, module: nn.Module, switch: Switch, run: Callable[..., Any], method: str = "forward") -> None:
        self.own: Callable[..., Any] = getattr(module, method)
        self.__wrapped__ = self.own  # so that its signature is that of the method
        self._module, self._method = module, method
        self._before = module.__dict__.get(method)
        self._switch, self._run = switch, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self.own, *args, **kwargs) if self._switch.on() else self.own(*args, **kwargs)

    @property
    def active(self) -> bool:
        """Whether the detour is taken in some thread."""
        return self._switch.active

    def __repr__(self) -> str:
        return f"{self._method} of {type(self._module).__name__}"

    def lost(self, modules: Container[nn.Module]) -> bool:
        """Whether calls of the model no longer reach this detour.

        Args:
            modules: the model's modules now.

        Returns:
            True where the module is gone, or another method replaced the detour.
        """
        if self._module not in modules:
            return True
        forward = getattr(self._module, self._method)
        # Other detours, and the wrappers of accelerate, name the forward they call in `__wrapped__`.
        while forward is not self:
            beneath = getattr(forward, "__wrapped__", None)
            if beneath is None:
                return True
            forward = beneath
        return False

    def patch(self) -> None:
        """Put the detour into the module."""
        self._module.__dict__[self._method] = self

    def restore(self) -> None:
        """Put the module's own method back; where another method wraps this detour by now, only switch it off."""
        if self._module.__dict__.get(self._method) is not self:
            self._switch = _Off()  # it stays beneath the other method
        elif self._before is None:
            del self._module.__dict__[self._method]
        else:
            self._module.__dict__[self._method] = self._before

    # A copy of the module has no detour, but the method beneath it, bound to the copy.

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self.own, memo)

    def __reduce__(self) -> Any:
        return _itself, (self.own,)


def _itself(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


@contextmanager
def patched(detours: Iterable[Detour]) -> Iterator[None]:
    """Inside this context the detours are in their modules.

    Args:
        detours: no two of the same method of one module.
    """
    with ExitStack() as stack:
        for detour in detours:
            detour.patch()
            stack.callback(detour.restore)
        yield


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module beneath any detours.

    Args:
        module: any module.

    Returns:
        The method of its class, or the function that replaced it in the instance.

    Example:
        >>> norm = nn.LayerNorm(2)
        >>> forward_of(norm) == norm.forward
        True
    """
    forward: Any = module.forward
    while isinstance(forward, Detour):
        forward = forward.own
    return forward


def computes(module: nn.Module) -> Any:
    """A key that tells which forward runs on a module.

    Args:
        module: any module.

    Returns:
        The function, where the forward is a method of the module or of a copy of it; otherwise the forward itself.

    Example:
        >>> computes(nn.LayerNorm(2)) is nn.LayerNorm.forward
        True
    """
    forward = _innermost(module)
    # A method of a copy counts as one of the module, as calls do.
    return forward.__func__ if isinstance(forward, MethodType) and _is_own(forward, module) else forward


def put_on_copy(module: nn.Module, other: nn.Module) -> bool:
    """Give a copy of a module the forward of the module.

    Args:
        module: the module.
        other: its copy, with the forward of its class.

    Returns:
        False where the forward is tied to the module and cannot be given to the copy.
    """
    forward = _innermost(module)
    if isinstance(forward, MethodType) and _is_own(forward, module):
        if forward.__func__ is not type(module).forward:
            other.__dict__["forward"] = MethodType(forward.__func__, other)
        return True
    if isinstance(forward, partial) and any(part is module for part in (*forward.args, *forward.keywords.values())):
        args = [other if part is module else part for part in forward.args]
        keywords = {name: other if part is module else part for name, part in forward.keywords.items()}
        other.__dict__["forward"] = partial(forward.func, *args, **keywords)
        return True
    return False


def _innermost(module: nn.Module) -> Callable[..., Any]:
    """The forward beneath detours and beneath accelerate's wrapper, which loads offloaded parameters."""
    forward = forward_of(module)
    if isinstance(forward, partial) and "_old_forward" in module.__dict__:
        forward = module.__dict__["_old_forward"]
        while isinstance(forward, Detour):
            forward = forward.own
    return forward


def _is_own(method: MethodType, module: nn.Module) -> bool:
    return method.__self__ is module or method.__func__ is type(module).forward
