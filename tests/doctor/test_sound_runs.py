"""Sound runs: none is accused, whatever the dtype, the optimizer and the adapter."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Adafactor

from peft_lntune import FisherLNConfig, LNTuningConfig, UnifiedConfig
from peft_lntune.doctor import Report
from tests.doctor.runs import WIDTH, KeptMasters, Masters, Stochastic, adam, net, norms_of, train

NAMES = ["norm1", "norm2"]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [value for value in model.parameters() if value.requires_grad]


def full_fine_tuning() -> Report:
    model = net()
    return train(model, adam(model.parameters()))


def decay_without_norms() -> Report:
    model = net()
    others = [value for name, value in model.named_parameters() if "norm" not in name]
    return train(model, adam([{"params": norms_of(model)}, {"params": others, "weight_decay": 0.1}]))


def bfloat16_with_masters_in_the_state() -> Report:
    model = net(torch.bfloat16)
    return train(model, KeptMasters(model.parameters(), 1e-4))


def bfloat16_with_masters_in_the_groups() -> Report:
    model = net(torch.bfloat16)
    return train(model, Masters(model.parameters(), 1e-4))


def bfloat16_with_stochastic_rounding() -> Report:
    model = net(torch.bfloat16)
    return train(model, Stochastic(model.parameters(), lr=1e-4, weight_decay=0.0), 30)


def bfloat16_at_a_large_rate() -> Report:
    model = net(torch.bfloat16)
    return train(model, adam(model.parameters(), 2e-2))


def lora_with_norms() -> Report:
    model = get_peft_model(
        net(torch.bfloat16), LoraConfig(target_modules=["fc1", "fc2"], r=2, modules_to_save=NAMES)
    ).float()
    return train(model, adam(trained(model), 1e-4), cast=torch.bfloat16)


def ours_over_bfloat16() -> Report:
    model = get_peft_model(net(torch.bfloat16), LNTuningConfig(target_modules=NAMES))
    return train(model, adam(trained(model), 1e-4))


def ours_with_masks() -> Report:
    model = get_peft_model(net(), FisherLNConfig(target_modules=NAMES))
    half = torch.arange(WIDTH) < WIDTH // 2
    model.base_model.set_masks({f"{name}.{key}": half for name in NAMES for key in ("weight", "bias")})
    return train(model, adam(trained(model)))


def ours_with_lora() -> Report:
    parts = [LNTuningConfig(target_modules=NAMES), LoraConfig(target_modules=["fc1", "fc2"], r=2)]
    model = get_peft_model(net(), UnifiedConfig(parts=parts))
    return train(model, adam(trained(model)))


def two_adapters_one_trained() -> Report:
    model = get_peft_model(net(), LNTuningConfig(target_modules=NAMES))
    model.add_adapter("other", LNTuningConfig(target_modules=NAMES))
    return train(model, adam(trained(model)))


def frozen_on_purpose() -> Report:
    model = get_peft_model(net(torch.bfloat16), LoraConfig(target_modules=["fc1", "fc2"], r=2))
    return train(model, adam(trained(model)))


def sgd_with_momentum() -> Report:
    model = net()
    return train(model, torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9))


def gradient_accumulation() -> Report:
    model = net()
    return train(model, adam(model.parameters()), accumulate=4, clip=1.0)


def autocast() -> Report:
    model = net()
    return train(model, adam(model.parameters(), 1e-5), cast=torch.bfloat16)


def warmup_from_zero() -> Report:
    model = net()
    optimizer = adam(model.parameters())
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 1000)
    return train(model, optimizer, schedule=warmup)


def warmup_over_bfloat16() -> Report:
    """Nothing moves yet, but the rate that the schedule comes to is large enough."""
    model = net(torch.bfloat16)
    optimizer = adam(model.parameters(), 2e-2)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 1000)
    return train(model, optimizer, schedule=warmup)


def scaler_that_finds_its_scale() -> Report:
    model = net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-20)
    return train(model, adam(model.parameters()), scaler=scaler, scale=1e3)


def batch_norm() -> Report:
    model = net(norm=nn.BatchNorm1d)
    return train(model, adam(model.parameters()))


def zero_head_at_the_start() -> Report:
    """The first gradient of every norm is zero."""
    model = net()
    nn.init.zeros_(model.head.weight)
    return train(model, adam(model.parameters()))


def zero_centred_gains_with_decay() -> Report:
    class Gemma(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.rms_norm(x, x.shape[-1:]) * (1 + self.weight)

    model = net(norm=Gemma)
    return train(model, adam(model.parameters(), weight_decay=0.01))


def adafactor_without_scaling() -> Report:
    model = get_peft_model(net(), LNTuningConfig(target_modules=["norm1", "norm2"]))
    return train(model, Adafactor(trained(model), lr=1e-3, relative_step=False, scale_parameter=False))


def adafactor_on_gains() -> Report:
    """It scales its steps by the size of values, which is 1 here."""
    model = net(norm=nn.RMSNorm)
    return train(model, torch.optim.Adafactor(model.parameters(), lr=1e-3))


def a_net_without_norms() -> Report:
    model = net(norm=lambda width: nn.Identity())
    return train(model, adam(model.parameters()))


TUNED = {
    full_fine_tuning: 4,
    decay_without_norms: 4,
    bfloat16_with_masters_in_the_state: 4,
    bfloat16_with_masters_in_the_groups: 4,
    bfloat16_with_stochastic_rounding: 4,
    bfloat16_at_a_large_rate: 4,
    lora_with_norms: 4,
    ours_over_bfloat16: 4,
    ours_with_masks: 4,
    ours_with_lora: 4,
    two_adapters_one_trained: 4,
    frozen_on_purpose: 0,
    sgd_with_momentum: 4,
    gradient_accumulation: 4,
    autocast: 4,
    warmup_from_zero: 4,
    warmup_over_bfloat16: 4,
    scaler_that_finds_its_scale: 4,
    batch_norm: 4,
    zero_head_at_the_start: 4,
    zero_centred_gains_with_decay: 2,
    adafactor_without_scaling: 4,
    adafactor_on_gains: 2,
    a_net_without_norms: 0,
}
"""How many parameters of norms each run tunes."""


@pytest.mark.parametrize("run", TUNED, ids=lambda run: run.__name__)
def test_a_sound_run_is_not_accused(run: Callable[[], Report]) -> None:
    report = run()
    assert not report.findings, report.to_text(110)
    assert len(report.tuned) == TUNED[run]
    if report.tuned:
        assert "No fault was found." in str(report)
    elif report.records:
        assert "No norm is tuned" in str(report)


def test_what_a_sound_run_reports() -> None:
    report = full_fine_tuning()
    assert report.summary.columns == ("role", "dtype", "parameters", "entries", "can_move", "moved", "one_way")
    weights, biases = report.summary.rows
    assert weights[:6] == ("weight", "float32", 2, 2 * WIDTH, 1.0, 1.0)
    assert biases[:6] == ("bias", "float32", 2, 2 * WIDTH, 1.0, 1.0)
    assert 0.5 <= weights[6] <= 1
