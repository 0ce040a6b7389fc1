"""A merged model in a folder: the same outputs without PEFT and without this package."""

import pytest
import torch
import transformers as hf
from peft import PeftModel

from peft_lntune import LNTuningConfig, UnifiedConfig
from tests import adapted
from tests.cli.saved import combined, refused, run, save_adapter, save_model
from tests.cli.test_inspect import masks


def outputs(model):
    return model.eval()(**adapted.inputs("bert-classifier")).logits


def with_adapter(model, adapter, labels=3):
    base = hf.AutoModelForSequenceClassification.from_pretrained(model, num_labels=labels)
    return PeftModel.from_pretrained(base, adapter)


KINDS = {
    "norms": lambda: {},
    "masked": lambda: {"masks": masks()},
    "with lora": lambda: {"config": UnifiedConfig(preset="ln+lora", task_type="SEQ_CLS")},
}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_outputs(kind, named, tmp_path):
    model = save_model(tmp_path / "model")
    adapter = save_adapter(tmp_path / "a", model, **KINDS[kind]())
    result = run("merge", adapter, tmp_path / "out", *(["--model", model] if named else []))
    assert result.exit_code == 0
    assert result.stdout == f"The merged model is in {tmp_path / 'out'}.\n"
    merged = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(outputs(merged), outputs(with_adapter(model, adapter)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs(merged), outputs(hf.AutoModelForSequenceClassification.from_pretrained(model)))
    tokenizer = (model / "tokenizer.json").read_text()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == tokenizer
    assert not list((tmp_path / "out").glob("adapter*"))


def test_the_head_of_the_adapter_sets_the_labels(tmp_path):
    model = save_model(tmp_path / "model", labels=None)
    adapter = save_adapter(tmp_path / "a", model, labels=5)
    assert run("merge", adapter, tmp_path / "out").exit_code == 0
    merged = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert merged.config.num_labels == 5
    torch.testing.assert_close(outputs(merged), outputs(with_adapter(model, adapter, 5)), rtol=1e-5, atol=1e-5)


def test_an_adapter_without_a_task(tmp_path):
    model = save_model(tmp_path / "model")
    adapter = save_adapter(tmp_path / "a", model, config=LNTuningConfig())
    assert run("merge", adapter, tmp_path / "out").exit_code == 0
    merged = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(outputs(merged), outputs(with_adapter(model, adapter)), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_merged(tmp_path):
    model = save_model(tmp_path / "model")
    adapter = save_adapter(tmp_path / "a", model, config=combined())
    assert refused(run("merge", adapter, tmp_path / "out"), "cannot be merged into a base parameter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "model"]


def test_another_model(tmp_path):
    adapter = save_adapter(tmp_path / "a", save_model(tmp_path / "model"))
    other = save_model(tmp_path / "other", hidden_size=24)
    assert refused(run("merge", adapter, tmp_path / "out", "--model", other), "")
    assert not (tmp_path / "out").exists()


def test_a_truncated_adapter(tmp_path):
    adapter = save_adapter(tmp_path / "a", save_model(tmp_path / "model"))
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert refused(run("merge", adapter, tmp_path / "out"), "is damaged or cut off")
    assert not (tmp_path / "out").exists()


def test_the_folder_is_taken(tmp_path):
    model = save_model(tmp_path / "model")
    adapter = save_adapter(tmp_path / "a", model)
    assert refused(run("merge", adapter, model), "exists and is not an empty folder")


def test_no_model_is_named(tmp_path):
    model = save_model(tmp_path / "model")
    adapter = save_adapter(tmp_path / "a", model)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"{model}"', "null"))
    assert refused(run("merge", adapter, tmp_path / "out"), "Name it: --model FOLDER")
