"""What is in an adapter directory: every kind, masked or not, whole or damaged."""

import json

import pytest
import torch
from peft import LNTuningConfig as StockLNTuningConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from peft_lntune import BottleneckConfig, LNTuningConfig, PrefixConfig, SupermaskConfig
from peft_lntune.cli.inspect import inspect_adapter
from peft_lntune.errors import AdapterFileError, ConfigError
from tests import adapted
from tests.cli.saved import combined, refused, run, save_adapter, save_model

CONFIGS = {
    "norms": lambda: LNTuningConfig(task_type="SEQ_CLS"),
    "half": lambda: LNTuningConfig(task_type="SEQ_CLS", delta_dtype="float16"),
    "modules": lambda: LNTuningConfig(task_type="SEQ_CLS", target_modules=["query"]),
    "bottleneck": lambda: BottleneckConfig(task_type="SEQ_CLS"),
    "prefix": lambda: PrefixConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    "long prefix": lambda: PrefixConfig(task_type="SEQ_CLS", num_virtual_tokens=3, reparametrize=4),
    "combined": combined,
}


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


@pytest.mark.parametrize("kind", CONFIGS)
def test_entries_and_bytes_are_those_of_the_file(kind, model, tmp_path):
    folder = save_adapter(tmp_path / "a", model, config=CONFIGS[kind]())
    report = inspect_adapter(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sum(report.entries.column("entries")) == sum(value.numel() for value in tensors.values())
    assert sum(report.entries.column("bytes")) == sum(value.nbytes for value in tensors.values())
    assert report.file_bytes == {file.name: file.stat().st_size for file in folder.glob("adapter_*")}
    assert (report.digest, report.problem, report.masks) == ("ok", None, {})
    shown = run("inspect", folder)
    assert shown.exit_code == 0
    assert shown.stdout == f"{report}\n"


def test_where_and_what(model, tmp_path):
    report = inspect_adapter(save_adapter(tmp_path / "a", model, config=combined()))
    rows = {row[:3]: row[3:] for row in report.entries.rows}
    path = "bert.encoder.layer"
    assert rows["delta", f"{path}.output.LayerNorm", "bias"] == ("0-1", 2, 32, 128)
    assert rows["delta", "embedding norm", "weight"] == (None, 1, 16, 64)
    assert rows["lora", "query", "-"] == ("0-1", 2, 2 * 2 * 8 * 16, 4 * 512)
    assert rows["prefix", f"{path}.attention.self", "-"][:2] == ("0-1", 2)
    assert rows["bottleneck", "attention output", "-"][:2] == ("0-1", 2)
    assert rows["head", "head", "weight"] == (None, 1, 48, 192)
    text = str(report)
    assert "UnifiedConfig of PrefixConfig, BottleneckConfig, LNTuningConfig, LoraConfig" in text
    assert f"base model  {model}" in text
    assert "SEQ_CLS" in text
    assert text.endswith("tuned entries, and 51 of heads.")


@pytest.mark.parametrize("layers", [[0], [0, 2, 3], [1, 2]])
def test_layers(layers, tmp_path):
    model = save_model(tmp_path / "model", num_hidden_layers=4)
    config = LNTuningConfig(task_type="SEQ_CLS", layers_to_transform=layers, tune="bias", roles=["ffn"])
    report = inspect_adapter(save_adapter(tmp_path / "a", model, config=config))
    said = {(0,): "0", (0, 2, 3): "0, 2-3", (1, 2): "1-2"}[tuple(layers)]
    row = next(row for row in report.entries.rows if row[0] == "delta")
    assert row[3:6] == (said, len(layers), 16 * len(layers))


def masks():
    chosen = torch.zeros(16, dtype=torch.bool)
    chosen[[1, 5, 9]] = True
    return {"bert.encoder.layer.1.output.LayerNorm.weight": chosen, "bert.embeddings.LayerNorm.bias": ~chosen}


def test_masked(model, tmp_path):
    folder = save_adapter(tmp_path / "a", model, masks=masks())
    report = inspect_adapter(folder)
    rows = {row[:3]: row[3:] for row in report.entries.rows}
    assert rows["delta", "bert.encoder.layer.output.LayerNorm", "weight"] == ("1", 1, 3, 12)
    assert rows["delta", "embedding norm", "bias"] == (None, 1, 13, 52)
    assert rows["bits of masks", "-", "-"] == (None, None, 0, 4)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sum(report.entries.column("bytes")) == sum(value.nbytes for value in tensors.values())
    assert report.masks == {"LNTuningConfig": {"made": "by hand"}}
    assert "mask        LNTuningConfig: made by hand" in str(report)


@pytest.mark.parametrize("save_scores", [False, True])
def test_supermask(save_scores, model, tmp_path):
    config = SupermaskConfig(task_type="SEQ_CLS", initial_sparsity=0.25, save_scores=save_scores)
    folder = save_adapter(tmp_path / "a", model, config=config)
    report = inspect_adapter(folder)
    rows = {row[:3]: row[3:] for row in report.entries.rows}
    assert rows["supermask", "query", "weight"][:3] == ("0-1", 2, 2 * 16 * 16)
    tensors = load_file(folder / "adapter_model.safetensors")
    bits = torch.cat([value for key, value in tensors.items() if key.endswith(".keep")]).tolist()
    off = 1 - sum(byte.bit_count() for byte in bits) / (8 * len(bits))
    assert sum(row[5] for row in report.entries.rows if row[0] == "supermask") == 8 * len(bits)
    assert sum(report.entries.column("bytes")) == sum(value.nbytes for value in tensors.values())
    assert report.masks == {"SupermaskConfig": {"initial_sparsity": 0.25, "sparsity": round(off, 4)}}
    assert 0.3 < off < 0.7
    assert f"mask        SupermaskConfig: initial_sparsity 0.25, sparsity {off:.4f}".rstrip("0") in str(report)


def test_no_model_is_loaded(model, tmp_path, monkeypatch):
    folder = save_adapter(tmp_path / "a", model)
    monkeypatch.setattr("transformers.PreTrainedModel.__init__", lambda *a, **k: pytest.fail("a model was made"))
    assert inspect_adapter(folder).digest == "ok"


# Damaged.


def test_another_digest(model, tmp_path):
    folder = save_adapter(tmp_path / "a", model)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lntune" in name)
    save_file({**tensors, name: tensors[name] + 1}, file, {"format": "pt"})
    report = inspect_adapter(folder)
    assert report.digest == "wrong"
    result = run("inspect", folder)
    assert "digest      wrong" in result.stdout
    assert refused(result, "the digests differ")


def test_no_digest(model, tmp_path):
    folder = save_adapter(tmp_path / "a", model)
    stored = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**stored, "manifest": None}))
    assert inspect_adapter(folder).digest == "not recorded"


def test_cut_off(model, tmp_path):
    folder = save_adapter(tmp_path / "a", model)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(AdapterFileError, match="is damaged or cut off"):
        inspect_adapter(folder)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), AdapterFileError, "but no adapter_model"),
        (lambda folder: (folder / "adapter_config.json").unlink(), AdapterFileError, "holds no adapter_config.json"),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{"),
            ConfigError,
            "adapter_config.json is damaged",
        ),
        (
            lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
            AdapterFileError,
            "holds pickled weights",
        ),
    ],
    ids=["no weights", "no config", "half a config", "pickled"],
)
def test_not_whole(change, error, said, model, tmp_path):
    folder = save_adapter(tmp_path / "a", model)
    change(folder)
    with pytest.raises(error, match=said):
        inspect_adapter(folder)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_an_adapter_of_another_package(tmp_path):
    get_peft_model(adapted.build("bert"), StockLNTuningConfig(target_modules=["LayerNorm"])).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="holds an adapter of PEFT type LN_TUNING, not one of peft_lntune"):
        inspect_adapter(tmp_path)
