"""PEFT's hotswap_adapter: values of a saved adapter in the tensors of another, without compiling again."""

import pytest
import torch
import torch._dynamo.testing
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

import peft_lntune as lntune
from peft_lntune.errors import AdapterFileError, ConfigError, UnsupportedError
from tests.stacks.models import bert, fill, llama, tokens

CONFIGS = {
    "norms": lntune.LNTuningConfig,
    "norms and LoRA": lambda **options: lntune.UnifiedConfig(preset="lora+ln", **options),
    "modules": lambda **options: lntune.ModuleTuningConfig(target_modules=["q_proj", "norm"], **options),
    "bottlenecks": lntune.BottleneckConfig,
    "prefixes": lambda **options: lntune.PrefixConfig(num_virtual_tokens=3, **options),
}


def answer(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


def saved(folder, config, std=0.1, mask=None):
    """Save an adapter with values of this size; returns what the model says with it."""
    model = get_peft_model(llama(), config)
    if mask is not None:
        model.set_masks({"model.norm.weight": mask})
    fill(model, std).save_pretrained(folder)
    return answer(model)


def swap(model, folder, name="default"):
    hotswap_adapter(model, str(folder), name, torch_device="cpu")


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_swapped_adapter_answers_in_the_same_tensors(kind, tmp_path):
    one = saved(tmp_path / "one", CONFIGS[kind](task_type="CAUSAL_LM"))
    two = saved(tmp_path / "two", CONFIGS[kind](task_type="CAUSAL_LM"), std=0.3)
    assert not torch.equal(one, two)
    model = PeftModel.from_pretrained(llama(), tmp_path / "one")
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert torch.equal(answer(model), one)
    swap(model, tmp_path / "two")
    assert torch.equal(answer(model), two)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == tensors


@pytest.mark.end_to_end
def test_a_compiled_model_is_not_compiled_again(tmp_path):
    one = saved(tmp_path / "one", lntune.LNTuningConfig(task_type="CAUSAL_LM"))
    two = saved(tmp_path / "two", lntune.LNTuningConfig(task_type="CAUSAL_LM"), std=0.3)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = PeftModel.from_pretrained(llama(), tmp_path / "one")
    graph = torch.compile(model, backend=counter)
    assert torch.equal(answer(graph), one)
    made = counter.frame_count
    swap(graph, tmp_path / "two")
    assert torch.equal(answer(graph), two)
    model.load_adapter(tmp_path / "one", "default")  # which writes into the adapter that is there as well
    assert torch.equal(answer(graph), one)
    assert counter.frame_count == made > 0


def test_another_adapter_than_the_active_one(tmp_path):
    config = lntune.LNTuningConfig(task_type="CAUSAL_LM")
    one, two = saved(tmp_path / "one", config), saved(tmp_path / "two", config, std=0.3)
    model = PeftModel.from_pretrained(llama(), tmp_path / "one")
    model.load_adapter(tmp_path / "one", "other")
    swap(model, tmp_path / "two", "other")
    assert torch.equal(answer(model), one)
    model.set_adapter("other")
    assert torch.equal(answer(model), two)


def test_heads_are_swapped_too(tmp_path):
    for std in (0.1, 0.3):
        model = fill(get_peft_model(bert(), lntune.LNTuningConfig(task_type="SEQ_CLS")), std)
        model.save_pretrained(tmp_path / str(std))
    expected = answer(model)
    found = PeftModel.from_pretrained(bert(), tmp_path / "0.1")
    swap(found, tmp_path / "0.3")
    assert torch.equal(answer(found), expected)


def test_masks_of_one_size_are_swapped_with_their_values(tmp_path):
    entries = torch.arange(16)
    config = lntune.LNTuningConfig(task_type="CAUSAL_LM")
    saved(tmp_path / "one", config, mask=entries < 4)
    two = saved(tmp_path / "two", lntune.LNTuningConfig(task_type="CAUSAL_LM"), mask=entries >= 12)
    saved(tmp_path / "larger", lntune.LNTuningConfig(task_type="CAUSAL_LM"), mask=entries < 5)
    model = PeftModel.from_pretrained(llama(), tmp_path / "one")
    swap(model, tmp_path / "two")
    assert torch.equal(answer(model), two)
    with pytest.raises(AdapterFileError, match="keeps the places and the number of tuned entries"):
        swap(model, tmp_path / "larger")
    assert torch.equal(answer(model), two)


@pytest.mark.parametrize(
    ("present", "other", "said"),
    [
        (lntune.BottleneckConfig(), lntune.BottleneckConfig(scale=2.0), "has scale=1.0, and the saved one 2.0"),
        (
            lntune.BottleneckConfig(),
            lntune.BottleneckConfig(activation="gelu"),
            "has activation='relu', and the saved one 'gelu'",
        ),
        (
            lntune.UnifiedConfig(parts=[LoraConfig(lora_alpha=8), lntune.LNTuningConfig()]),
            lntune.UnifiedConfig(parts=[LoraConfig(lora_alpha=16), lntune.LNTuningConfig()]),
            "has lora_alpha=8, and the saved one 16",
        ),
        (lntune.LNTuningConfig(), lntune.BottleneckConfig(), "consists of LNTuningConfig, and the saved one of Bott"),
    ],
    ids=["scale", "activation", "alpha", "kind"],
)
def test_an_adapter_that_computes_otherwise_is_refused(present, other, said, tmp_path):
    for name, config in (("one", present), ("two", other)):
        config.task_type = "CAUSAL_LM"
        saved(tmp_path / name, config)
    model = PeftModel.from_pretrained(llama(), tmp_path / "one")
    before = answer(model)
    with pytest.raises(ConfigError, match=said):
        swap(model, tmp_path / "two")
    assert torch.equal(answer(model), before)


def test_merged_and_unknown_adapters_and_other_types_are_refused(tmp_path):
    saved(tmp_path / "one", lntune.LNTuningConfig(task_type="CAUSAL_LM"))
    get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    model = PeftModel.from_pretrained(llama(), tmp_path / "one")
    with pytest.raises(ConfigError, match="adapter 'other' not found"):
        swap(model, tmp_path / "one", "other")
    with pytest.raises(ValueError, match="Incompatible PEFT types"):
        swap(model, tmp_path / "lora")
    model.merge_adapter()
    with pytest.raises(UnsupportedError, match=r"is merged at .* Call unmerge_adapter"):
        swap(model, tmp_path / "one")
    native = llama()
    native.load_adapter(tmp_path / "one")
    with pytest.raises(ValueError, match="only supported for LoRA"):
        native.load_adapter(tmp_path / "one", adapter_name="default", hotswap=True)


def test_lora_is_swapped_by_peft_as_before(tmp_path):
    for name in ("one", "two"):
        torch.manual_seed(0)
        model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM"))
        fill(model, 0.1 if name == "one" else 0.3).save_pretrained(tmp_path / name)
    expected = answer(model)
    found = PeftModel.from_pretrained(llama(), tmp_path / "one")
    swap(found, tmp_path / "two")
    assert torch.equal(answer(found), expected)
