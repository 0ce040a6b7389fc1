"""Mixed batches as PEFT serves them: many adapters in the model, one name per row."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
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
