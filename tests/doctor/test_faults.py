"""Seeded faults: the doctor names each, and nothing else. Plain nets, PEFT's adapters, and ours."""

import warnings
from collections.abc import Callable

import pytest
import torch
from peft import LNTuningConfig as StockLN
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import Adafactor

from peft_lntune import LNTuningConfig
from peft_lntune.doctor import FAULTS, Report
from tests.doctor.runs import WIDTH, Net, adam, net, norms_of, train

NAMES = ["norm1", "norm2"]


def lora(**options: object) -> LoraConfig:
    return LoraConfig(target_modules=["fc1", "fc2"], r=2, modules_to_save=NAMES, **options)


def gains(dtype: torch.dtype) -> tuple[Net, list[nn.Parameter]]:
    """A net of which only the gains of the norms are trained, and these."""
    model = net(dtype).requires_grad_(False)
    found = [model.norm1.weight.requires_grad_(True), model.norm2.weight.requires_grad_(True)]
    return model, found


def bfloat16_at_1e_4() -> Report:
    model, weights = gains(torch.bfloat16)
    return train(model, adam(weights, 1e-4))


def float16_at_1e_4() -> Report:
    model, weights = gains(torch.float16)
    return train(model, adam(weights, 1e-4, eps=1e-6), scale=100.0)  # else the squares of gradients are 0 in float16


def bfloat16_copies_of_lora() -> Report:
    model = get_peft_model(net(torch.bfloat16), lora(), autocast_adapter_dtype=False)
    return train(model, adam(model.parameters(), 1e-4))


def bfloat16_sgd() -> Report:
    model, weights = gains(torch.bfloat16)
    return train(model, torch.optim.SGD(weights, lr=1e-3))


def ones_that_can_only_shrink() -> Report:
    model, weights = gains(torch.bfloat16)
    for weight in weights:
        nn.init.ones_(weight)
    return train(model, adam(weights, 3e-3), 4)


def frozen_after_the_optimizer() -> Report:
    model = net()
    optimizer = adam(model.parameters())
    model.norm1.requires_grad_(False), model.norm2.requires_grad_(False)
    return train(model, optimizer)


def frozen_by_kbit_preparation() -> Report:
    """`prepare_model_for_kbit_training` freezes all, norms too; somebody then unfreezes the rest."""
    model = prepare_model_for_kbit_training(net(), use_gradient_checkpointing=False)
    for module in (model.fc1, model.fc2, model.head):
        module.requires_grad_(True)
    return train(model, adam([value for value in model.parameters() if value.requires_grad]), expect=True)


def copies_frozen_by_kbit_preparation() -> Report:
    """Called after `get_peft_model`, it freezes the adapter as well."""
    model = prepare_model_for_kbit_training(get_peft_model(net(), lora()), use_gradient_checkpointing=False)
    model.base_model.model.head.requires_grad_(True)
    return train(model, adam(model.base_model.model.head.parameters()))


def copies_saved_but_not_trained() -> Report:
    """LoRA trains, and the norms in `modules_to_save` were frozen by a loop over names."""
    model = get_peft_model(net(), lora())
    for name, value in model.named_parameters():
        value.requires_grad_("lora_" in name)
    return train(model, adam([value for value in model.parameters() if value.requires_grad]))


def not_in_the_optimizer() -> Report:
    model = net()
    return train(model, adam([*model.fc1.parameters(), *model.fc2.parameters(), *model.head.parameters()]))


def optimizer_before_masks() -> Report:
    model = get_peft_model(net(), LNTuningConfig(target_modules=NAMES))
    optimizer = adam([value for value in model.parameters() if value.requires_grad])
    half = torch.arange(WIDTH) < WIDTH // 2
    model.base_model.set_masks({f"{name}.{key}": half for name in NAMES for key in ("weight", "bias")})
    return train(model, optimizer)


def optimizer_before_peft() -> Report:
    model = net()
    optimizer = adam(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT does not know the sizes of a LayerNorm
        return train(get_peft_model(model, StockLN(target_modules=NAMES)), optimizer)


def decay_of_gains() -> Report:
    model = net()
    return train(model, adam(model.parameters(), weight_decay=0.01))


def gradient_of_zero_from_a_kernel() -> Report:
    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(weight)
            return x * weight

        @staticmethod
        def backward(ctx, gradient):
            (weight,) = ctx.saved_tensors
            return gradient * weight, torch.zeros_like(weight)

    model = net(norm=nn.RMSNorm)
    for norm in (model.norm1, model.norm2):
        norm.forward = lambda x, norm=norm: Kernel.apply(nn.functional.rms_norm(x, (WIDTH,)), norm.weight)
    return train(model, adam(model.parameters()))


def no_gradient_from_a_kernel() -> Report:
    model = net(norm=nn.RMSNorm)
    for norm in (model.norm1, model.norm2):
        norm.forward = lambda x, norm=norm: nn.functional.rms_norm(x, (WIDTH,)) * norm.weight.detach()
    return train(model, adam(model.parameters()))


def gradient_that_is_nan() -> Report:
    model = net()
    return train(model, adam(model.parameters()), scale=float("nan"))


def values_that_are_nan() -> Report:
    def poison(model: nn.Module) -> None:
        model.norm1.bias.data[0] = float("nan")

    model = net()
    return train(model, adam(model.parameters()), 1, after=poison)


def learning_rate_of_zero() -> Report:
    model = net()
    return train(model, adam([{"params": norms_of(model), "lr": 0.0}, {"params": model.head.parameters()}]))


def adapter_that_is_not_active() -> Report:
    model = get_peft_model(net(), LNTuningConfig(target_modules=NAMES))
    optimizer = adam([value for value in model.parameters() if value.requires_grad])
    model.add_adapter("other", LNTuningConfig(target_modules=NAMES))
    model.set_adapter("other")
    model.requires_grad_(False)  # such as an evaluation that was meant for a moment
    model.base_model.model.head.requires_grad_(True)
    return train(model, optimizer)


def adapter_that_is_disabled() -> Report:
    model = get_peft_model(net(), lora())
    optimizer = adam([value for value in model.parameters() if value.requires_grad])
    model.base_model.disable_adapter_layers()
    return train(model, optimizer)


def clipped_to_nothing() -> Report:
    model = net()
    return train(model, torch.optim.SGD(norms_of(model), lr=0.1), clip=1e-9)


def loss_far_too_small() -> Report:
    model = net()
    return train(model, adam(norms_of(model)), scale=1e-14)


def overwritten_after_each_step() -> Report:
    model = net()
    first = {name: value.clone() for name, value in model.state_dict().items() if "norm" in name}
    return train(model, adam(model.parameters()), after=lambda model: model.load_state_dict(first, strict=False))


def every_step_skipped() -> Report:
    model = net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=0.999)
    return train(model, adam(model.parameters()), scaler=scaler, scale=1e9)


def drift_by_decay_alone() -> Report:
    model = net(norm=nn.RMSNorm)
    for norm in (model.norm1, model.norm2):
        norm.forward = lambda x, norm=norm: nn.functional.rms_norm(x, (WIDTH,)) * (0 * norm.weight + 1)
    return train(model, adam(model.parameters(), weight_decay=0.1))


def adafactor_scales_deltas_that_start_at_zero() -> Report:
    model = get_peft_model(net(), LNTuningConfig(target_modules=NAMES))
    return train(model, torch.optim.Adafactor([v for v in model.parameters() if v.requires_grad], lr=1e-3))


def adafactor_of_transformers_scales_biases_that_start_at_zero() -> Report:
    model = net()
    for norm in (model.norm1, model.norm2):
        nn.init.zeros_(norm.bias)
    return train(model, Adafactor(model.parameters(), lr=1e-3, relative_step=False, scale_parameter=True))


SEEDED: dict[Callable[[], Report], set[str]] = {
    bfloat16_at_1e_4: {"too_coarse"},
    float16_at_1e_4: {"too_coarse"},
    bfloat16_copies_of_lora: {"too_coarse"},
    bfloat16_sgd: {"too_coarse"},
    ones_that_can_only_shrink: {"one_way_rounding"},
    frozen_after_the_optimizer: {"frozen"},
    frozen_by_kbit_preparation: {"frozen"},
    copies_frozen_by_kbit_preparation: {"frozen"},
    copies_saved_but_not_trained: {"frozen"},
    not_in_the_optimizer: {"not_in_optimizer"},
    optimizer_before_masks: {"stale_parameter"},
    optimizer_before_peft: {"not_in_optimizer"},
    decay_of_gains: {"weight_decay"},
    gradient_of_zero_from_a_kernel: {"zero_gradient"},
    no_gradient_from_a_kernel: {"no_gradient"},
    gradient_that_is_nan: {"nonfinite_gradient"},
    values_that_are_nan: {"nonfinite_value"},
    learning_rate_of_zero: {"zero_learning_rate"},
    adapter_that_is_not_active: {"inactive_adapter", "frozen"},
    adapter_that_is_disabled: {"inactive_adapter"},
    clipped_to_nothing: {"clipped_away"},
    loss_far_too_small: {"vanishing_gradient"},
    overwritten_after_each_step: {"overwritten"},
    every_step_skipped: {"steps_skipped"},
    adafactor_scales_deltas_that_start_at_zero: {"scaled_to_nothing"},
    adafactor_of_transformers_scales_biases_that_start_at_zero: {"scaled_to_nothing"},
    drift_by_decay_alone: {"zero_gradient", "weight_decay", "decay_drift"},
}


@pytest.mark.parametrize("fault", SEEDED, ids=lambda fault: fault.__name__)
def test_a_seeded_fault_is_named(fault: Callable[[], Report]) -> None:
    report = fault()
    assert {finding.kind for finding in report.findings} == SEEDED[fault], report.to_text(110)
    for finding in report.findings:
        assert finding.parameters
        assert all("norm" in name for name in finding.parameters)
        assert finding.advice in str(finding)


def test_every_fault_of_a_run_is_seeded() -> None:
    of_checkpoints = {"did_not_move", "few_moved"}
    assert set().union(*SEEDED.values()) | of_checkpoints == FAULTS.keys()


@pytest.mark.parametrize("kind", FAULTS)
def test_advice_is_one_sentence(kind: str) -> None:
    assert FAULTS[kind].advice.endswith(".")
    assert not FAULTS[kind].title.endswith(".")
