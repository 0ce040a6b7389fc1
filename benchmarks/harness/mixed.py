"""Mixed batches as PEFT serves them: many adapters in the model, one name per row."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor


def mixed_call(model: Any, adapters: int, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    """Return a forward pass in which the rows use this many distinct adapters in turn.

    Args:
        model: a PeftModel; adapters that it lacks are added to it, with the config of the one it has.
        adapters: how many.
        inputs: of the model.
    """
    names = [f"tenant{number}" for number in range(adapters)]
    config: peft.PeftConfig = model.peft_config["default"]
    for name in names:
        if name not in model.peft_config:
            model.add_adapter(name, copy.deepcopy(config))
    model.eval()
    rows = [names[i % len(names)] for i in range(len(inputs["input_ids"]))]
    return torch.no_grad()(lambda: model(**inputs, adapter_names=rows))


def add_copies(model: Any, names: Iterable[str]) -> None:
    """Add copies of the adapter `default` to a PeftModel, for measurements of very many adapters.

    Each call of PEFT's `add_adapter` walks through all adapters there are, so that hundreds of calls take minutes. This
    copies what the layers have under one name to others; forward passes are those of added adapters.

    Args:
        model: a PeftModel of LoRA, or of this package's norms, with an adapter `default`.
        names: of the copies; those that exist stay as they are.
    """
    new = [name for name in names if name not in model.peft_config]
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            held = getattr(layer, attribute, None)
            if isinstance(held, dict | torch.nn.ModuleDict | torch.nn.ParameterDict) and "default" in held:
                for name in new:
                    held[name] = copy.deepcopy(held["default"])
    for name in new:
        model.peft_config[name] = copy.deepcopy(model.peft_config["default"])
