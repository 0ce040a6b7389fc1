"""A model that is cast after wrapping, or without autocast of adapters: deltas stay as wide as they were made."""

import warnings

import pytest
import torch
import transformers as hf
from peft import PeftModel, cast_mixed_precision_params, get_peft_model
from torch import nn

from peft_lntune import LNTuningConfig, ModuleTuningConfig, SupermaskConfig
from tests.adapted import adapt, build, deltas, fill, inputs, layers, output, said

CASTS = {
    "to(bfloat16)": (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    "bfloat16()": (lambda model: model.bfloat16(), torch.bfloat16),
    "half()": (lambda model: model.half(), torch.float16),
    "to device and dtype": (lambda model: model.to("cpu", torch.bfloat16), torch.bfloat16),
    "type()": (lambda model: model.type(torch.bfloat16), torch.bfloat16),
    "down and up": (lambda model: model.bfloat16().float(), torch.float32),
    "up and down": (lambda model: model.double().float(), torch.float32),
    "float64": (lambda model: model.double(), torch.float64),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("kind", ["norms", "modules", "masks"])
def test_deltas_and_scores_stay_wide(cast, kind):
    configs = {
        "norms": LNTuningConfig(),
        "modules": ModuleTuningConfig(components=["query"]),
        "masks": SupermaskConfig(components=["query"]),
    }
    model = get_peft_model(build("bert"), configs[kind])
    fill(model, "default")
    tuned = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    change, dtype = CASTS[cast]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change(model)
    for name, parameter in model.named_parameters():
        if name in tuned:
            assert parameter.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.equal(parameter, tuned[name].to(parameter.dtype))
        else:
            assert parameter.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_below_the_bases_spacing_is_felt_after_a_cast(dtype):
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)), LNTuningConfig(tune="weight")).to(dtype)
    x = torch.randn(256, 64, dtype=dtype)
    before = output_of(model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.finfo(dtype).eps / 4)
    assert (output_of(model, x) != before).any()


def output_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_delta_in_half_precision_is_added_in_float32(dtype):
    """TRL casts what a quantized model trains with `parameter.data = parameter.data.to(torch.bfloat16)`."""
    peft_model, batch = adapt(build("bert", dtype)), inputs("bert", dtype)
    for delta in deltas(peft_model).values():
        delta.weight.data = (delta.weight.data * 1e-3).to(dtype)
    for layer in layers(peft_model):
        delta = layer.deltas("weight")["default"]
        assert torch.equal(delta(layer.base_parameter("weight")), layer.base_parameter("weight").float() + delta.weight)
    with peft_model.disable_adapter():
        base = output(peft_model, batch)
    assert not torch.equal(output(peft_model, batch), base)


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_what_the_config_says_of_the_dtype_of_deltas_wins(asked, tmp_path):
    expected = getattr(torch, asked)
    model = get_peft_model(
        build("llama", torch.bfloat16), LNTuningConfig(delta_dtype=asked), autocast_adapter_dtype=False
    )
    assert {delta.weight.dtype for delta in deltas(model).values()} == {expected}
    model.save_pretrained(tmp_path)
    for autocast in (True, False):
        loaded = PeftModel.from_pretrained(build("llama", torch.bfloat16), tmp_path, autocast_adapter_dtype=autocast)
        loaded.to(torch.bfloat16)
        assert {delta.weight.dtype for delta in deltas(loaded).values()} == {expected}


def test_evaluation_in_bf16_by_trainer_leaves_deltas_alone(tmp_path):
    model, batch = adapt(build("bert-classifier"), task_type="SEQ_CLS"), inputs("bert-classifier")
    before = {name: delta.weight.detach().clone() for name, delta in deltas(model).items()}
    rows = [{**{name: value[row] for name, value in batch.items()}, "labels": row} for row in range(3)]
    arguments = hf.TrainingArguments(tmp_path, bf16_full_eval=True, use_cpu=True, report_to=[])
    hf.Trainer(model, arguments, eval_dataset=rows).evaluate()
    assert all(torch.equal(delta.weight, before[name]) for name, delta in deltas(model).items())


def test_a_head_in_float16_is_trained_with_a_scaler_after_the_line_of_the_docs():
    model, batch = adapt(build("bert-classifier", torch.float16), task_type="SEQ_CLS"), inputs("bert-classifier")
    cast_mixed_precision_params(model, torch.float16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", torch.float16):
        loss = said(model, batch).float().square().sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # raises "Attempting to unscale FP16 gradients" without the line
    scaler.step(optimizer)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
