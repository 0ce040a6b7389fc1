"""Adapters are taken from the directories that PEFT writes, and what is wrong with one is said before it is taken."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_lntune import AdapterBank, FisherLNConfig, LNTuningConfig
from peft_lntune.errors import AdapterFileError, ConfigError, UnsupportedError
from peft_lntune.storage.manifest import seal_file
from tests.adapted import adapt, build, deltas, fill, inputs
from tests.bank.banked import CLOSE, routed
from tests.oracles import each_alone
from tests.selection.test_masks import random_masks

FAMILY = "bert-classifier"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with a plain, a masked, a narrow and a headed adapter, and the folder they are saved in."""
    folder = tmp_path_factory.mktemp("adapters")
    model = adapt(build(FAMILY), "plain")
    model.add_adapter("masked", FisherLNConfig(density=0.3))
    model.base_model.set_masks(random_masks(model, "masked"), "masked")
    model.add_adapter("narrow", LNTuningConfig(roles=["ffn"], layers_to_transform=[1], save_dtype="bfloat16"))
    model.add_adapter("headed", LNTuningConfig(modules_to_save=["classifier"]))
    for seed, name in enumerate(("plain", "masked", "narrow", "headed")):
        fill(model, name, seed=seed)
    with torch.no_grad():
        for delta in deltas(model, "narrow").values():
            delta.weight.copy_(delta.weight.bfloat16().float())  # as the file has them
    model.save_pretrained(str(folder))
    return model.eval(), folder


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of a saved adapter, to be damaged."""
    return lambda name: shutil.copytree(saved[1] / name, tmp_path / name)


@pytest.mark.parametrize("from_peft", [True, False], ids=["into a PeftModel", "into the plain model"])
def test_what_was_saved_is_served(saved, from_peft):
    model, folder = saved
    names = ["plain", "masked", "narrow", "headed", "__base__"]
    served, batch = model if from_peft else build(FAMILY), inputs(FAMILY, batch=5)
    bank = AdapterBank(served)
    bank.add("plain", str(folder / "plain"))
    bank.add_many({name: folder / name for name in names[1:-1]})
    bank.attach()
    torch.testing.assert_close(routed(bank, served, batch, names), each_alone(model, batch, names), **CLOSE)
    bank.detach()


def test_rows_are_the_deltas_themselves(saved):
    model, folder = saved
    bank = AdapterBank(build(FAMILY))
    for name in ("plain", "masked", "narrow", "headed"):
        bank.add(name, folder / name)
        live = AdapterBank(model)
        live.add(name, (model, name))
        expected = live.deltas(name)
        assert all(torch.equal(value, expected[key]) for key, value in bank.deltas(name).items())
        assert bank.heads(name).keys() == live.heads(name).keys()
    masked = torch.cat([value.reshape(-1) for value in bank.deltas("masked").values()])
    assert 0 < masked.count_nonzero() < len(masked)


def refused(folder, message, error=AdapterFileError, family=FAMILY):
    bank = AdapterBank(build(family))
    with pytest.raises(error, match=message):
        bank.add("x", folder)
    assert bank.names == []


def test_no_directory(tmp_path):
    refused(tmp_path / "nowhere", r"holds no adapter_config\.json\. Give the folder that save_pretrained wrote")


def test_no_weights(copied):
    folder = copied("plain")
    (folder / WEIGHTS).unlink()
    refused(folder, r"holds a config, but no adapter_model\.safetensors")


def test_a_config_that_is_cut_off(copied):
    folder = copied("plain")
    (folder / CONFIG).write_text((folder / CONFIG).read_text()[:50])
    refused(folder, r"adapter_config\.json is damaged", ConfigError)


def test_weights_that_are_cut_off(copied):
    folder = copied("plain")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])
    refused(folder, r"is damaged or cut off")


def test_weights_of_another_save(copied):
    folder, other = copied("plain"), copied("headed")
    shutil.copy(other / WEIGHTS, folder / WEIGHTS)
    refused(folder, "the digests differ")


@pytest.mark.parametrize("name", ["plain", "masked", "headed"])
def test_another_model(saved, name):
    refused(saved[1] / name, "does not fit this model|trained on another model", family="gpt2")


def change(folder, change_tensors):
    """Write other tensors, with a config that claims no digest."""
    tensors = change_tensors(load_file(folder / WEIGHTS))
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    for digest in ("digest", "full_digest", "fields"):
        config["manifest"].pop(digest)
    (folder / CONFIG).write_text(json.dumps(config))


def test_values_that_are_not_finite(copied):
    folder = copied("plain")
    change(folder, lambda tensors: {key: value * float("inf") for key, value in tensors.items()})
    refused(folder, "hold NaN or infinite values")


def test_a_tensor_that_is_missing(copied):
    folder = copied("plain")
    change(folder, lambda tensors: dict(list(tensors.items())[1:]))
    refused(folder, "1 missing, such as")


def test_a_tensor_too_many(copied):
    folder = copied("plain")
    change(folder, lambda tensors: {**tensors, "base_model.model.classifier.weight": torch.ones(3, 16)})
    refused(folder, "1 unexpected, such as classifier.weight")


def test_a_head_that_is_not_whole(copied):
    folder = copied("headed")
    change(folder, lambda tensors: {key: value for key, value in tensors.items() if "classifier.bias" not in key})
    refused(folder, "1 missing, such as classifier.bias")


def test_a_mask_chosen_among_other_entries(copied):
    folder = copied("masked")
    config = json.loads((folder / CONFIG).read_text())
    config["manifest"]["selected"] += 1
    (folder / CONFIG).write_text(json.dumps(config))
    seal_file(folder / CONFIG, folder / WEIGHTS)
    refused(folder, "It was trained on another model")


def test_a_lora_adapter(tmp_path):
    get_peft_model(build(FAMILY), LoraConfig(target_modules=["query"])).save_pretrained(str(tmp_path))
    refused(tmp_path, "holds an adapter of PEFT type LORA, not one of peft_lntune")


def test_a_combined_adapter(tmp_path):
    from peft_lntune import UnifiedConfig

    config = UnifiedConfig(parts=[LoraConfig(r=2, target_modules=["query"]), LNTuningConfig()])
    get_peft_model(build(FAMILY), config).save_pretrained(str(tmp_path))
    refused(tmp_path, "has LoraConfig, LNTuningConfig, and a bank holds only deltas of norms", UnsupportedError)
