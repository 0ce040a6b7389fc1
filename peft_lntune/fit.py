"""Whether tensors fit the adapter they are meant for: the last check before a value is taken."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peft_lntune.errors import AdapterFileError, ConfigError
from peft_lntune.layers import PARAMETERS, LNTuneLayer
from peft_lntune.storage import is_ours

__all__ = ["check_fit", "check_masks"]


def check_fit(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise where the tensors of an adapter, keyed as in the model's state dict, are not the ones the model expects.

    Raises:
        AdapterFileError: keys are missing or unexpected, or shapes differ. The model is as it was.
    """
    expected = {
        f"{name}.lntune_{parameter}.{adapter_name}.{key}".replace("_fsdp_wrapped_module.", ""): value.shape
        for name, layer in model.named_modules()
        if isinstance(layer, LNTuneLayer)
        for parameter in PARAMETERS
        if adapter_name in layer.deltas(parameter)
        for key, value in layer.deltas(parameter)[adapter_name].state_dict().items()
    }
    found = {name: value.shape for name, value in tensors.items() if is_ours(name.replace(f".{adapter_name}.", "."))}
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    shapes = [name for name in expected.keys() & found.keys() if expected[name] != found[name]]
    if not (missing or unexpected or shapes):
        return
    problems = [f"{len(missing)} missing, such as {min(missing)}"] if missing else []
    problems += [f"{len(unexpected)} unexpected, such as {min(unexpected)}"] if unexpected else []
    problems += [
        f"{len(shapes)} of another shape: {name} is {tuple(found[name])} in the file, {tuple(expected[name])} here"
        for name in sorted(shapes)[:1]
    ]
    raise AdapterFileError(
        f"the saved adapter does not fit this model for adapter {adapter_name!r}: {'; '.join(problems)}. "
        "It was trained on another model, or the file or its config was changed."
    )


def check_masks(masks: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], adapter_name: str) -> None:
    """Raise where masks, by parameter name, are not bool tensors of these shapes, or choose nothing.

    Raises:
        ConfigError: a name or shape does not fit the adapter, or no entry is chosen.
    """
    unknown = sorted(masks.keys() - shapes.keys())
    if unknown:
        raise ConfigError(
            f"masks name {unknown[0]!r} (and {len(unknown) - 1} more), which adapter {adapter_name!r} does not tune. "
            f"It tunes: {', '.join(shapes)}."
        )
    for name, mask in masks.items():
        if mask.dtype != torch.bool or mask.shape != shapes[name]:
            raise ConfigError(
                f"the mask of {name} should be a bool tensor of shape {tuple(shapes[name])}, but is {mask.dtype} "
                f"of shape {tuple(mask.shape)}."
            )
    if not any(mask.any() for mask in masks.values()):
        raise ConfigError("the masks choose no entry at all, so there would be nothing to train.")
