"""Which parts of a model a route over tasks goes through, and what of an adapter is trained there; and the way back."""

from collections.abc import Iterator, Mapping

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_lntune.bank.sources import Adapter, Sources, deltas_in, tensors_of
from peft_lntune.core.norms import base_modules, called_modules

__all__ = ["above", "tuned_in", "write_adapter"]


def tuned_in(peft_model: PeftModel, name: str, adapter: Adapter) -> dict[str, Tensor]:
    """Which entries of its deltas an adapter trains: bool, by the base parameter's name; in a head all of them."""
    deltas = deltas_in(called_modules(peft_model.get_base_model()), name)
    return {
        key: deltas[key].tuned().cpu() if key in deltas else torch.ones_like(value, dtype=torch.bool, device="cpu")
        for key, value in adapter.deltas.items()
    }


@torch.no_grad()
def write_adapter(sources: Sources, peft_model: PeftModel, name: str, adapter: Adapter) -> None:
    """Put values into an adapter of a model: the inverse of `Sources.read(name, (peft_model, name))`."""
    called = called_modules(peft_model.get_base_model())
    deltas = deltas_in(called, name)
    for key, delta in deltas.items():
        delta.fill(adapter.deltas[key].to(delta.weight.device))
    for head, tensors in adapter.heads.items():
        wrapper = called[head]
        assert isinstance(wrapper, ModulesToSaveWrapper)
        for key, place in tensors_of(base_modules(wrapper.modules_to_save[name])).items():
            its_place = sources.place(f"{head}.{key}")
            norm = adapter.deltas.get(its_place)
            value = tensors[key] if norm is None else norm + sources.parameter(its_place).to(norm)
            place.copy_(value)


def above(modules: Mapping[str, nn.Module], places: set[str]) -> Iterator[str]:
    """The names of these places and of all modules that hold one of them, but for the model itself.

    Example:
        >>> list(above({"": None, "body": None, "body.norm": None, "head": None}, {"body.norm"}))
        ['body', 'body.norm']
    """
    for name in modules:
        if name and any(f"{place}.".startswith(f"{name}.") for place in places):
            yield name
