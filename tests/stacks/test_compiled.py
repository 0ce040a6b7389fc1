"""torch.compile before an adapter: a wrapper that renames all that is inside is refused, compiling in place works."""

import pytest
import torch
from peft import PeftModel, get_peft_model

import peft_lntune as lntune
from peft_lntune.errors import UnsupportedError
from tests.stacks.models import fill, llama, tokens


def answer(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


def adapted(base):
    return fill(get_peft_model(base, lntune.LNTuningConfig(task_type="CAUSAL_LM")))


def compiled(whole):
    model = llama()
    if whole:
        return torch.compile(model, backend="eager")
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


@pytest.mark.parametrize("whole", [True, False], ids=["the model", "a block"])
def test_a_wrapper_before_the_adapter_is_refused(whole, tmp_path):
    place = "the model" if whole else r"model\.layers\.1"
    with pytest.raises(UnsupportedError, match=f"applied to {place} before the adapter"):
        adapted(compiled(whole))
    adapted(llama()).save_pretrained(tmp_path)
    base = compiled(whole)
    before = dict(base.state_dict())
    with pytest.raises(UnsupportedError, match=f"applied to {place} before the adapter"):
        PeftModel.from_pretrained(base, tmp_path)
    assert list(base.state_dict()) == list(before)


@pytest.mark.end_to_end
def test_a_model_compiled_in_place_takes_an_adapter(tmp_path):
    torch._dynamo.reset()
    base = llama()
    base.compile(backend="eager")
    found, expected = adapted(base), adapted(llama())
    assert torch.equal(answer(found), answer(expected))
    found.save_pretrained(tmp_path)
    assert torch.equal(answer(PeftModel.from_pretrained(llama(), tmp_path)), answer(expected))


@pytest.mark.end_to_end
def test_a_compiled_adapter_model_follows_its_verbs():
    torch._dynamo.reset()
    model = adapted(llama())
    graph = torch.compile(model, backend="eager")
    before = answer(graph)
    model.add_adapter("other", lntune.LNTuningConfig(task_type="CAUSAL_LM"))
    model.set_adapter("other")
    assert torch.equal(answer(graph), answer(llama())), "a new adapter is the base model"
    model.set_adapter("default")
    assert torch.equal(answer(graph), before)
    with model.disable_adapter():
        assert torch.equal(answer(graph), answer(llama()))
    model.merge_adapter()
    torch.testing.assert_close(answer(graph), before, rtol=1e-5, atol=1e-6)
