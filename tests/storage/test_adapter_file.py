"""What a manifest records, what is refused, and what a saved adapter weighs."""

import json
import os
from pathlib import Path

import pytest
import torch
from click import BadParameter
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertModel

from peft_lntune import LNTuningConfig
from peft_lntune.cli.options import OutFile
from peft_lntune.errors import AdapterFileError, ConfigError
from peft_lntune.storage.adapter_file import WEIGHTS_FILE
from peft_lntune.storage.atomic import is_special, new_file
from peft_lntune.storage.keys import is_ours, of_adapter, without_adapter_name
from peft_lntune.storage.manifest import check_tensors, manifest_of
from peft_lntune.storage.packing import pack
from peft_lntune.storage.saved_adapter import SavedAdapter
from tests import adapted


def tensors(masked: bool = False) -> dict[str, Tensor]:
    found = {"a.norm.lntune_weight.weight": torch.arange(3.0), "a.norm.lntune_bias.weight": torch.ones(3)}
    if masked:
        found["a.norm.lntune_weight.mask"] = torch.tensor([7], dtype=torch.uint8)
    return {**found, "head.weight": torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("norm.lntune_weight.weight", True),
        ("base_model.model.norm.lntune_bias.mask", True),
        ("lntune_weight.weight", True),
        ("lntune_weight", False),
        ("lntune_head.norm.weight", False),
        ("norm.lora_A.weight", True),
        ("norm.weight", False),
    ],
)
def test_is_ours(key: str, ours: bool) -> None:
    assert is_ours(key) is ours


class TestManifest:
    def test_of_a_dense_adapter(self) -> None:
        manifest = manifest_of(tensors())
        assert manifest.keys() == {"digest"}
        assert len(manifest["digest"]) == 64

    def test_of_a_masked_one(self) -> None:
        assert manifest_of(tensors(masked=True))["tuned"] == {"a.norm.lntune_weight": 3, "a.norm.lntune_bias": None}

    def test_of_a_dense_one_without_some_parameters(self) -> None:
        manifest = manifest_of(tensors(), partial=True)
        assert manifest["tuned"] == {"a.norm.lntune_weight": None, "a.norm.lntune_bias": None}

    def test_of_what_is_in_the_file(self) -> None:
        packed = pack(tensors(masked=True))
        assert manifest_of(packed)["digest"] == manifest_of(tensors(masked=True))["digest"]
        check_tensors(manifest_of(tensors(masked=True)), packed, "here")

    @pytest.mark.parametrize("prefix", ["", "base_model.model."])
    def test_the_same_however_it_was_saved(self, prefix: str) -> None:
        """PEFT's prefix, the order of tensors, and strides are not the adapter."""
        other = {f"{prefix}{name}": value for name, value in reversed(tensors(masked=True).items())}
        name = f"{prefix}a.norm.lntune_weight.weight"
        other[name] = torch.stack([other[name], other[name]], 1)[:, 0]
        assert manifest_of(other) == manifest_of(tensors(masked=True))

    @pytest.mark.parametrize(
        "change",
        [
            lambda t: t["a.norm.lntune_bias.weight"].add_(2**-20),
            lambda t: t.update({"a.norm.lntune_bias.weight": torch.ones(3, dtype=torch.float64)}),
            lambda t: t.update({"a.norm.lntune_bias.weight": torch.ones(3, 1)}),
            lambda t: t.update({"b.norm.lntune_bias.weight": t.pop("a.norm.lntune_bias.weight")}),
            lambda t: t.pop("a.norm.lntune_bias.weight"),
        ],
        ids=["value", "dtype", "shape", "name", "missing"],
    )
    def test_another_for_any_change(self, change: object) -> None:
        other = tensors()
        change(other)
        assert manifest_of(other) != manifest_of(tensors())
        with pytest.raises(AdapterFileError, match=r"here is not the file .* digests differ.*Get both from one save"):
            check_tensors(manifest_of(tensors()), other, "here")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_every_dtype(self, dtype: torch.dtype) -> None:
        found = {name: value.to(dtype) for name, value in tensors().items()}
        check_tensors(manifest_of(found), found, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.clear(), "here holds no tensor named .*, but 0 others, such as 'none'"),
        (
            lambda t: [t.pop(k) for k in [*t] if is_ours(k)],
            "but 1 others, such as 'head.weight'.* not saved by peft_lntune",
        ),
        (
            lambda t: t.update({"a.norm.lntune_bias.weight": torch.ones(3, dtype=torch.int32)}),
            "a.norm.lntune_bias.weight should be of a floating dtype, but is torch.int32",
        ),
        (
            lambda t: t.update({"a.norm.lntune_weight.mask": torch.ones(3, dtype=torch.bool)}),
            "a.norm.lntune_weight.mask should be of uint8, but is torch.bool",
        ),
        (
            lambda t: t["head.weight"].fill_(torch.nan),
            "1 tensors hold NaN or infinite values, the first is head.weight",
        ),
    ],
)
def test_refused_tensors(change: object, message: str) -> None:
    found = tensors(masked=True)
    change(found)
    with pytest.raises(AdapterFileError, match=message):
        check_tensors(None, found, "here")


class TestDirectory:
    def test_a_good_one(self, tmp_path: Path) -> None:
        save_file(tensors(), tmp_path / WEIGHTS_FILE)
        SavedAdapter(tmp_path).check(manifest_of(tensors()))
        SavedAdapter(tmp_path.parent, {"subfolder": tmp_path.name}).check(manifest_of(tensors()))
        SavedAdapter(str(tmp_path), {}).check(None)

    def test_no_weights(self, tmp_path: Path) -> None:
        with pytest.raises(AdapterFileError, match=f"holds a config, but no {WEIGHTS_FILE}. Get the whole adapter"):
            SavedAdapter(tmp_path).check(None)

    def test_pickled_weights(self, tmp_path: Path) -> None:
        torch.save(tensors(), tmp_path / "adapter_model.bin")
        SavedAdapter(tmp_path).check(manifest_of(tensors()))
        (tmp_path / "adapter_model.bin").write_bytes(b"")
        with pytest.raises(AdapterFileError, match=r"adapter_model.bin is damaged or cut off .*Get a good copy"):
            SavedAdapter(tmp_path).check(None)

    @pytest.mark.parametrize("peft_type", ["LNTUNE", "LORA"])
    def test_what_belongs_to_one_process_is_passed_over(self, peft_type: str, tmp_path: Path) -> None:
        fields = {"peft_type": peft_type, "runtime_config": {"ephemeral_gpu_offload": False}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
        saved = SavedAdapter(tmp_path)
        assert saved.is_ours == (peft_type == "LNTUNE")
        # PEFT says so itself of its own adapters.
        assert saved.fields == ({"peft_type": "LNTUNE"} if saved.is_ours else fields)

    def test_what_is_not_here_is_left_to_peft(self) -> None:
        saved = SavedAdapter("somebody/something", {})
        assert saved.fields is None
        assert saved.weights is None


def test_a_file_takes_the_place_of_an_old_one_when_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "table.csv"
    for content in ("old", "new"):
        with new_file(path) as written:
            written.write_text(content)
            assert written.suffix == ".csv"
            assert (path.read_text() if path.exists() else None) == {"old": None, "new": "old"}[content]
        assert path.read_text() == content

    def fail() -> None:
        with new_file(path) as written:
            written.write_text("ne")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_device_or_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    """As `--csv /dev/stdout` would be."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is a device or a pipe"), new_file(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()
    assert [is_special(Path(path)) for path in ("/dev/stdout", "/dev/shm/table.csv", str(tmp_path))] == [
        True,
        False,
        False,
    ]
    with pytest.raises(BadParameter, match="is a device or a pipe"):
        OutFile().convert(str(tmp_path / "pipe"), None, None)


def minilm() -> BertModel:
    """The shape of all-MiniLM-L6-v2, but for the vocabulary, which no adapter of ours holds."""
    return BertModel(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=40)
    )


def test_size_on_disk(tmp_path: Path) -> None:
    model = get_peft_model(minilm(), LNTuningConfig())
    assert model.get_nb_trainable_parameters()[0] == 9984
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / WEIGHTS_FILE)
    assert sum(value.numel() for value in saved.values()) == 9984
    assert os.path.getsize(tmp_path / WEIGHTS_FILE) <= 45_000


def test_a_masked_adapter_stores_only_what_is_tuned(tmp_path: Path) -> None:
    model = adapted.adapt(adapted.build("bert-classifier"))
    masks = {label: torch.arange(delta.shape.numel()) < 3 for label, delta in adapted.deltas(model).items()}
    model.base_model.set_masks(masks)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / WEIGHTS_FILE)
    number = len(masks)
    assert {name.rpartition(".lntune_")[2]: tuple(value.shape) for name, value in saved.items()} == {
        "packed.weight": (3 * number,),
        "packed.mask": (2 * number,),  # 16 bits each
    }
    manifest = json.loads((tmp_path / "adapter_config.json").read_text())["manifest"]
    assert manifest["tuned"] == {
        name.replace(".weight", ".lntune_weight").replace(".bias", ".lntune_bias"): 3 for name in masks
    }
    assert manifest["digest"] == manifest_of(saved)["digest"]


@pytest.mark.parametrize(
    ("key", "name", "stripped"),
    [
        ("a.norm.lntune_weight.x.weight", "x", "a.norm.lntune_weight.weight"),
        ("a.norm.lntune_weight.weight.weight", "weight", "a.norm.lntune_weight.weight"),
        ("a.norm.lntune_weight.weight.mask", "weight", "a.norm.lntune_weight.mask"),
        ("a.norm.lntune_bias.norm.weight", "norm", "a.norm.lntune_bias.weight"),
        ("lntune_bias.x.weight", "x", "lntune_bias.weight"),
        ("a.norm.lntune_weight.weight", "weight", "a.norm.lntune_weight.weight"),
        ("classifier.bias", "bias", "classifier.bias"),
        ("a.x.weight", "x", "a.x.weight"),
    ],
)
def test_without_adapter_name(key: str, name: str, stripped: str) -> None:
    assert without_adapter_name(key, name) == stripped


@pytest.mark.parametrize(
    ("key", "name", "belongs"),
    [
        ("a.norm.lntune_weight.x.weight", "x", True),
        ("a.norm.lntune_weight.weight.weight", "weight", True),
        ("a.norm.lntune_weight.x.weight", "weight", False),
        ("head.modules_to_save.x.dense.bias", "x", True),
        ("head.modules_to_save.x.dense.bias", "dense", False),
        ("a.x.weight", "x", False),
    ],
)
def test_of_adapter(key: str, name: str, belongs: bool) -> None:
    assert of_adapter(key, name) is belongs
