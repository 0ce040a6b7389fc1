"""Banks for the tests: adapters with random deltas on a tiny model, and the same in a bank."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_lntune import AdapterBank
from tests import adapted

NAMES = ["b", "__base__", "a"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # fused kernels sum in another order than xhat * weight + bias


def banked(family: str, *names: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[PeftModel, Any]:
    """A PeftModel with adapters of random deltas, and an attached bank of its base model that holds the same."""
    model = adapted.adapt(adapted.build(family, dtype), *(names or ("a", "b")), **options)
    bank = AdapterBank(model)
    bank.add_many({name: (model, name) for name in names or ("a", "b")})
    bank.attach()
    return model, bank


def routed(bank: AdapterBank, model: nn.Module, batch: dict[str, Tensor], names: Any) -> Tensor:
    """What the model says with an adapter for each row."""
    with bank.route(names):
        return adapted.output(model, batch)
