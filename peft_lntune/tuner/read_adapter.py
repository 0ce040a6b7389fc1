"""Reads an adapter for a bank, from its folder or from a model that holds it, and checks it."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_lntune.config import LNTuneConfig, LNTuningConfig, StoredConfig, parts_of
from peft_lntune.core.delta import scatter, unpack_bits
from peft_lntune.core.module_tree import base_modules, called_modules
from peft_lntune.errors import ConfigError, UnsupportedError
from peft_lntune.layers.held import deltas_in
from peft_lntune.norms.find import Norm, find_norms
from peft_lntune.norms.names import own_parameter, role_of
from peft_lntune.planning.claims import check_architecture, check_same_architecture
from peft_lntune.planning.plan import check_selected, plan
from peft_lntune.storage.packing import PREFIX, ROOT
from peft_lntune.storage.saved_adapter import SavedAdapter
from peft_lntune.tuner.restoring import told_by_us
from peft_lntune.tuner.state_dict import check_shapes, unpack_by

__all__ = ["Adapter", "AdapterReader", "AdapterSource", "tensors_of"]

AdapterSource = str | os.PathLike | tuple[PeftModel, str]
"""A folder that `save_pretrained` wrote, or a model and the name of one of its adapters."""

# The fields that decide which parameters a config of norms selects.
_SELECTING = (
    "tune",
    "roles",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)


@dataclass(frozen=True)
class Adapter:
    """An adapter as a bank takes it, by names of the base model.

    Attributes:
        deltas: dense deltas by name of the parameter, including those of norms inside heads.
        heads: for each module in `modules_to_save`, its other tensors by their names in that module.
    """

    deltas: Mapping[str, Tensor]
    heads: Mapping[str, Mapping[str, Tensor]]


class AdapterReader:
    """Reads adapters for one model.

    Args:
        model: the base model, plain or with tuner layers in it.
        holder: what the adapters are read for, for errors.

    Attributes:
        modules: the base modules of the model, by name.
        norms: the norms of the model, by name.
    """

    def __init__(self, model: nn.Module, holder: str = "a bank") -> None:
        self._holder = holder
        self.modules = base_modules(model)
        self.norms: dict[str, Norm] = find_norms(model)
        self._model = model
        self._selections: dict[str, tuple[dict[str, torch.Size], int]] = {}

    def parameter(self, name: str) -> Any:
        """Look up the weight or bias of a norm.

        Args:
            name: `"<module>.weight"` or `"<module>.bias"`, whatever name the norm itself uses.

        Returns:
            The parameter; None if the norm does not have it.
        """
        module, _, parameter = name.rpartition(".")
        return own_parameter(self.modules[module], parameter)

    def offset(self, name: str) -> float:
        """Look up the constant that a norm adds to a parameter: 1 for the weight of a zero-centred norm, else 0.

        Args:
            name: `"<module>.weight"` or `"<module>.bias"`.

        Returns:
            The constant.
        """
        module, _, parameter = name.rpartition(".")
        return self.norms[module].offset if parameter == "weight" else 0.0

    def place(self, name: str) -> str:
        """Turn a norm's own name of a parameter into weight or bias: `"norm.weight"` for `"norm.gamma"`.

        Args:
            name: full name of a parameter in the base model.

        Returns:
            The name with `weight` or `bias`; a parameter of any other module keeps its name.
        """
        module, _, own = name.rpartition(".")
        return f"{module}.{role_of(self.modules[module], own)}" if module in self.norms else name

    def read(self, name: str, source: AdapterSource) -> Adapter:
        """Read and check an adapter.

        Args:
            name: name of the adapter, for errors.
            source: a folder that `save_pretrained` wrote, or a model and the name of one of its adapters.

        Returns:
            The deltas and heads, by names of the base model.

        Raises:
            UnsupportedError: the adapter tunes more than norms.
            AdapterFileError: the adapter is damaged, of another package, or does not fit this model.
            ConfigError: `source` is neither a folder nor a model and a name, or the model has no such adapter.
        """
        if isinstance(source, tuple):
            return self._from_model(name, *source)
        if not isinstance(source, (str, os.PathLike)):
            raise ConfigError(
                f"adapter {name!r} is read from a folder or from (peft_model, adapter_name), but got {source!r}."
            )
        with told_by_us(source, lambda: True):
            return self._from_directory(name, SavedAdapter(source))

    def _from_directory(self, name: str, saved: SavedAdapter) -> Adapter:
        config = StoredConfig(**saved.own_fields)
        self._check_kind(name, config)
        saved.check(config.manifest)
        check_architecture(config, self._model, saved.name)
        shapes, selected = self._selection(name, config)
        check_selected(config, selected)
        tensors = {key.removeprefix(ROOT): value for key, value in saved.tensors.items()}
        tensors = unpack_by(self.modules, config, tensors, str(saved.weights))
        counts = config.stored_counts or dict.fromkeys(map(_place, shapes))
        heads = self._heads_in(config, tensors)
        expected = dict(_expected(shapes, counts))
        for head, own in heads.items():
            # A head may be of another shape than the model's own, but not of other tensors.
            expected |= {f"{head}.{key}": own.get(key, t).shape for key, t in tensors_of(self.modules, head).items()}
        check_shapes(expected, {key: value.shape for key, value in tensors.items()}, name)
        deltas = {parameter: _dense(tensors, parameter, shape) for parameter, shape in shapes.items()}
        return self._adapter({key: value for key, value in deltas.items() if value is not None}, heads)

    def _from_model(self, name: str, model: PeftModel, adapter_name: str) -> Adapter:
        if not isinstance(model, PeftModel) or adapter_name not in model.peft_config:
            known = list(model.peft_config) if isinstance(model, PeftModel) else type(model).__name__
            raise ConfigError(f"adapter {adapter_name!r} not found; the given model has {known}.")
        config = model.peft_config[adapter_name]
        self._check_kind(name, config)
        check_same_architecture(model.get_base_model(), self._model, f"adapter {name!r}")
        called = called_modules(model.get_base_model())
        deltas = {key: delta.dense() for key, delta in deltas_in(called, adapter_name).items()}
        shapes, _ = self._selection(name, config)
        tuned = deltas.keys() if config.mask_source is not None else shapes.keys()
        expected = {key: shape for key, shape in shapes.items() if key in tuned}
        check_shapes(expected, {key: value.shape for key, value in deltas.items()}, name)
        heads = {
            place: tensors_of(base_modules(wrapper.modules_to_save[adapter_name]))
            for place, wrapper in called.items()
            if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save
        }
        return self._adapter(deltas, heads)

    def _check_kind(self, name: str, config: PeftConfig) -> None:
        if isinstance(config, LNTuningConfig):
            return
        parts = ", ".join(type(part).__name__ for part in parts_of(config))
        raise UnsupportedError(
            f"adapter {name!r} has {parts}, and {self._holder} holds only deltas of norms: LNTuningConfig and "
            "FisherLNConfig. Load it into a PeftModel, and use `adapter_names` there for mixed batches."
        )

    def _selection(self, name: str, config: LNTuningConfig) -> tuple[dict[str, torch.Size], int]:
        """The shapes of the parameters that a config selects in this model, and the number of their entries."""
        key = repr([sorted(v) if isinstance(v, set) else v for v in (getattr(config, f) for f in _SELECTING)])
        if key not in self._selections:
            planned = plan(self._model, config)
            others = [part for part in planned.parts.values() if part.name not in self.norms]
            if others:
                raise UnsupportedError(
                    f"adapter {name!r} tunes {len(others)} modules other than norms, such as {others[0].name} "
                    f"({others[0].module_class}), and {self._holder} holds only deltas of norms. Load it into a "
                    "PeftModel, and use `adapter_names` there for mixed batches."
                )
            names = [f"{part.name}.{parameter}" for part in planned.parts.values() for parameter in part.entries]
            self._selections[key] = {name: self.parameter(name).shape for name in names}, planned.selected
        return self._selections[key]

    def _heads_in(self, config: LNTuneConfig, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The modules that PEFT matches with `modules_to_save`, with their tensors in the file."""
        saved = tuple(config.modules_to_save or ())
        found: dict[str, dict[str, Tensor]] = {}
        for name in self.modules if saved else ():
            if name.endswith(saved) and not name.startswith(tuple(f"{head}." for head in found)):
                own = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
                found[name] = {key.removeprefix(f"{name}."): value for key, value in own.items()}
        return found

    def _adapter(self, deltas: Mapping[str, Tensor], heads: Mapping[str, Mapping[str, Tensor]]) -> Adapter:
        """Turn the norms inside heads into deltas."""
        every, rest = dict(deltas), {}
        for head, tensors in heads.items():
            own = tensors_of(self.modules, head)
            if {key: value.shape for key, value in tensors.items()} != {key: own[key].shape for key in own}:
                rest[head] = tensors
                continue
            inside = {
                f"{place}.{name}".removeprefix(f"{head}."): f"{place}.{parameter}"
                for place, norm in self.norms.items()
                if f"{place}.".startswith(f"{head}.")
                for parameter, name in norm.parameters.items()
            }
            for key in inside.keys() & tensors.keys():
                wide = torch.promote_types(own[key].dtype, torch.float32)
                every[inside[key]] = tensors[key].to(wide) - own[key].detach().to(tensors[key].device, wide)
            rest[head] = {key: value for key, value in tensors.items() if key not in inside}
        return Adapter(every, rest)


def tensors_of(modules: Mapping[str, nn.Module], name: str = "") -> dict[str, Tensor]:
    """Collect the parameters and saved buffers of a module and its submodules.

    Args:
        modules: the `base_modules` of a model, without what tuners added.
        name: name of the module; empty for the model itself.

    Returns:
        The detached tensors, by their names within the module.
    """
    found: dict[str, Tensor] = {}
    above = f"{name}." if name else ""
    for place, module in modules.items():
        if f"{place}.".startswith(above):
            within = f"{place}.".removeprefix(above) if place else ""
            buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
            own = {**module._parameters, **buffers}
            found |= {within + key: value.detach() for key, value in own.items() if value is not None}
    return found


def _place(parameter: str) -> str:
    module, _, name = parameter.rpartition(".")
    return f"{module}.{PREFIX}{name}"


def _expected(shapes: Mapping[str, torch.Size], counts: Mapping[str, int | None]) -> Iterator[tuple[str, torch.Size]]:
    """Names and shapes of the tensors in a file, from the selected parameters and their numbers of tuned entries."""
    for parameter, shape in shapes.items():
        place = _place(parameter)
        if place in counts:
            count = counts[place]
            yield f"{place}.weight", shape if count is None else torch.Size([count])
            if count is not None:
                yield f"{place}.mask", torch.Size([-(-shape.numel() // 8)])


def _dense(tensors: Mapping[str, Tensor], parameter: str, shape: torch.Size) -> Tensor | None:
    values, bits = tensors.get(f"{_place(parameter)}.weight"), tensors.get(f"{_place(parameter)}.mask")
    if values is None or bits is None:
        return values
    return scatter(values, unpack_bits(bits, shape).reshape(-1).nonzero().reshape(-1), shape)
