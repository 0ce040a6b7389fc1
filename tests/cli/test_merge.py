"""A merged model in a folder: the same outputs without PEFT and without this package."""

import json
import shutil

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_lntune import LNTuningConfig, UnifiedConfig
from tests import adapted
from tests.cases import build
from tests.cli.saved import combined, refused, run, save_adapter, save_model, task, write_rows
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
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not list((tmp_path / "out").glob("adapter*"))


def test_the_head_of_the_adapter_sets_the_labels(tmp_path):
    model = save_model(tmp_path / "model", labels=None)
    adapter = save_adapter(tmp_path / "a", model, labels=5)
    assert run("merge", adapter, tmp_path / "out").exit_code == 0
    merged = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert merged.config.num_labels == 5
    torch.testing.assert_close(outputs(merged), outputs(with_adapter(model, adapter, 5)), rtol=1e-5, atol=1e-5)


def test_more_labels_than_a_head_is_wide(tmp_path):
    """The narrowest matrix of RoBERTa's head is then not that of the labels."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    hf.RobertaForMaskedLM(hf.RobertaConfig(**sizes)).save_pretrained(tmp_path / "model")
    model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=10).eval()
    tuned = get_peft_model(model, LNTuningConfig(task_type="SEQ_CLS", init_weights=False)).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", tmp_path / "out").exit_code == 0
    merged = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(merged(input_ids=ids).logits, tuned(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


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


# The tokenizer or processor.


def test_the_tokenizer_by_its_own_save(tmp_path):
    model = save_model(tmp_path / "model")
    tokenizer = hf.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(model)
    (model / "vocab_of_something_else.txt").write_text("no tokenizer reads this")
    assert run("merge", save_adapter(tmp_path / "a", model), tmp_path / "out").exit_code == 0
    found = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found("the very good film")["input_ids"] == tokenizer("the very good film")["input_ids"]
    assert (found.chat_template, found.pad_token) == (tokenizer.chat_template, "[PAD]")
    assert not (tmp_path / "out" / "vocab_of_something_else.txt").exists()


def test_the_tokenizer_that_was_saved_with_the_adapter(tmp_path):
    model = save_model(tmp_path / "model")
    adapter = save_adapter(tmp_path / "a", model)
    tokenizer = hf.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(adapter)  # as trainers do
    assert run("merge", adapter, tmp_path / "out").exit_code == 0
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_a_model_without_tokenizer(tmp_path):
    """transformers would make one with an empty vocabulary."""
    model = save_model(tmp_path / "model")
    for file in model.glob("*token*"):
        file.unlink()
    assert run("merge", save_adapter(tmp_path / "a", model), tmp_path / "out").exit_code == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}


def test_a_damaged_tokenizer(tmp_path):
    model = save_model(tmp_path / "model")
    (model / "tokenizer.json").write_text("{")
    result = run("merge", save_adapter(tmp_path / "a", model), tmp_path / "out")
    assert refused(result, f"the tokenizer or processor of {model} does not load")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("always:.*has no weights for pooler:UserWarning")
def test_an_image_processor(tmp_path):
    model = tmp_path / "vit"
    build("vit").save_pretrained(model)
    hf.ViTImageProcessorPil(size={"height": 9, "width": 9}).save_pretrained(model)
    peft_model = get_peft_model(hf.AutoModel.from_pretrained(model), LNTuningConfig())
    peft_model.save_pretrained(tmp_path / "a")
    result = run("merge", tmp_path / "a", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    # The pooler of ViTModel is not in a checkpoint with a classifier. Features do not need it, but it is said.
    assert result.stderr.startswith(f"Warning: {model} has no weights for pooler.dense.bias, pooler.dense.weight")
    assert len(result.stderr.splitlines()) == 1
    assert dict(hf.AutoImageProcessor.from_pretrained(tmp_path / "out").size) == {"height": 9, "width": 9}


def test_from_the_hub(tmp_path, monkeypatch):
    """A model by its name, from the cache of the Hub: the tokenizer comes too, and at the revision of the adapter."""
    model, commit = save_model(tmp_path / "model"), "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "cache" / "models--someone--bert"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "v1").write_text(commit)
    shutil.copytree(model, cached / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    adapter = save_adapter(tmp_path / "a", model)
    config = adapter / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "base_model_name_or_path": "someone/bert", "revision": "v1"}))
    result = run("merge", adapter, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    text = "the very good film"
    found, wanted = (hf.AutoTokenizer.from_pretrained(place)(text)["input_ids"] for place in (tmp_path / "out", model))
    assert found == wanted
    assert refused(run("merge", adapter, tmp_path / "other", "--model", "someone/other"), "no model someone/other")


# The wrong model, told from the configs before weights are read.


@pytest.mark.parametrize(
    ("kind", "sizes", "said"),
    [
        ("norms", {"hidden_size": 24}, "(16,) in the file, (24,) here"),
        ("masked", {"num_hidden_layers": 1}, "does not fit"),
        ("combined", {"num_hidden_layers": 4}, "missing"),
    ],
)
def test_a_model_of_another_size(kind, sizes, said, tmp_path):
    options = {"config": combined()} if kind == "combined" else KINDS[kind]()
    adapter = save_adapter(tmp_path / "a", save_model(tmp_path / "model"), **options)
    other = save_model(tmp_path / "other", **sizes)
    (other / "model.safetensors").unlink()
    result = run("merge", adapter, tmp_path / "out", "--model", other)
    assert refused(result, f"{adapter} does not fit the model in {other}: ")
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_another_architecture(tmp_path):
    adapter = save_adapter(tmp_path / "a", save_model(tmp_path / "model"))
    build("llama").save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").unlink()
    llama = tmp_path / "llama"
    result = run("merge", adapter, tmp_path / "out", "--model", llama)
    assert refused(result, f"{adapter} does not fit the model in {llama}: it was saved from a model of type 'bert'")
    assert "and this one is of type 'llama'. Give the model that the adapter was trained on" in result.stderr


def test_a_model_that_lacks_weights(tmp_path):
    """transformers fills them with random values, and says so in a report that nobody reads."""
    model = save_model(tmp_path / "model")
    adapter = save_adapter(tmp_path / "a", model)
    tensors = load_file(model / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.LayerNorm.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    wanted = f"{model} has no weights for bert.encoder.layer.1.output.LayerNorm.weight, so they would be random"
    assert refused(run("merge", adapter, tmp_path / "out"), wanted)
    data = write_rows(tmp_path / "d.jsonl", task())
    masks = tmp_path / "m.safetensors"
    assert refused(run("fisher", "--model", model, "--data", data, "--out", masks), wanted)
    assert refused(run("fisher", "--model", model, "--score", "magnitude", "--out", masks), wanted)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "no model nowhere: no such folder"),
        ("a", "the folder a holds an adapter"),
        ("a/adapter_config.json", "a/adapter_config.json is a file"),
    ],
)
def test_what_is_no_model(name, said, tmp_path, monkeypatch):
    save_adapter(tmp_path / "a", save_model(tmp_path / "model"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for command in (("merge", "a", "new/out", "--model"), ("plan",), ("fisher", "--score", "magnitude", "--model")):
        assert refused(run(*command, name), said)
    assert refused(run("plan", "empty"), "the folder empty has no config.json")
    assert sorted(tmp_path.rglob("*")) == before
