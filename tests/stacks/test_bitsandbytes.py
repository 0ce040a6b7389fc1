"""Base models that bitsandbytes has quantized to 4 and 8 bits, on a CPU: norms stay what they are and are tuned."""

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import peft_lntune as lntune
from peft_lntune.errors import UnsupportedError
from tests.stacks.models import llama, tokens

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes.*"),
    # PEFT calls transformers' gradient checkpointing by its old names
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

CONFIGS = {
    "norms": lntune.LNTuningConfig,
    "norms and LoRA": lambda **options: lntune.UnifiedConfig(preset="lora+ln", **options),
    "bottlenecks": lntune.BottleneckConfig,
}
QUANTIZED = {
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    8: {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama(hidden_size=64, intermediate_size=64).save_pretrained(folder)
    return folder


def quantized(folder, bits):
    config = BitsAndBytesConfig(**QUANTIZED[bits])
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")


def answer(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


def train(model, steps=4):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("prepared", [False, True], ids=["as loaded", "prepared for k-bit training"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("bits", QUANTIZED)
def test_trains_saves_and_loads(bits, kind, prepared, folder, tmp_path):
    def base():
        model = quantized(folder, bits)
        return prepare_model_for_kbit_training(model) if prepared else model

    expected = answer(base())
    model = get_peft_model(base(), CONFIGS[kind](task_type="CAUSAL_LM"))
    assert type(model.base_model.model.model.layers[0].mlp.up_proj).__name__ == f"Linear{bits}bit{'Lt' * (bits == 8)}"
    assert torch.equal(answer(model), expected), "a new adapter changes the model"
    losses = train(model)
    assert losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with model.disable_adapter():
        assert torch.equal(answer(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(PeftModel.from_pretrained(base(), tmp_path)), answer(model))


@pytest.mark.parametrize("bits", QUANTIZED)
def test_norms_merge_into_the_dtype_they_have(bits, folder):
    """In bfloat16 a merged norm is rounded; `prepare_model_for_kbit_training` widens norms, and then nothing is."""
    for prepare, exact in ((lambda model: model, False), (prepare_model_for_kbit_training, True)):
        model = get_peft_model(prepare(quantized(folder, bits)), lntune.LNTuningConfig(task_type="CAUSAL_LM"))
        train(model)
        before = answer(model)
        model.merge_adapter()
        assert torch.equal(answer(model), before) == exact
        # The spacing of bfloat16 is 2^-8 of a value, logits here are below 4, and a few roundings add up.
        torch.testing.assert_close(answer(model).float(), before.float(), rtol=0, atol=0.1)
        model.unmerge_adapter()
        assert torch.equal(answer(model), before)


@pytest.mark.parametrize("bits", QUANTIZED)
def test_deltas_of_quantized_weights_are_refused(bits, folder):
    with pytest.raises(UnsupportedError, match=r"q_proj \(Linear\dbit.* needs a floating `weight`"):
        get_peft_model(quantized(folder, bits), lntune.ModuleTuningConfig(target_modules=["q_proj"]))
