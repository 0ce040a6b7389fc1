"""UnifiedConfig: parts, presets, JSON, and what it refuses."""

import dataclasses
import json
from pathlib import Path

import pytest
from peft import IA3Config, LoraConfig, PeftConfig

from peft_lntune import BottleneckConfig, FisherLNConfig, LNTuningConfig, PrefixConfig, UnifiedConfig
from peft_lntune.config import parts_of, record_mask
from peft_lntune.errors import ConfigError

EVERY = [
    LNTuningConfig(tune="bias", roles=["attention"]),
    BottleneckConfig(roles=["attention"], bottleneck_size=3, scale="learned"),
    PrefixConfig(num_virtual_tokens=4),
    LoraConfig(r=2, target_modules=["query", "value"]),
]


def test_a_preset_becomes_its_parts() -> None:
    config = UnifiedConfig(preset="prefix+mha-adapter+ln", task_type="SEQ_CLS")
    assert [type(part) for part in config.parts] == [PrefixConfig, BottleneckConfig, LNTuningConfig]
    assert config.parts[1].roles == ["attention"]
    assert config.preset is None


def test_mam_is_a_prefix_and_a_parallel_scaled_ffn_adapter() -> None:
    prefix, adapter = UnifiedConfig(preset="mam").parts
    assert isinstance(prefix, PrefixConfig)
    assert (adapter.position, adapter.roles, adapter.scale) == ("parallel", ["ffn"], 4.0)


def test_json_and_back(tmp_path: Path) -> None:
    config = UnifiedConfig(parts=EVERY, task_type="SEQ_CLS", modules_to_save=["classifier"])
    config.save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert [part["peft_type"] for part in stored["parts"]] == ["LNTUNE", "LNTUNE", "LNTUNE", "LORA"]
    again = UnifiedConfig(**{k: v for k, v in stored.items() if k in {f.name for f in dataclasses.fields(config)}})
    assert again.parts == config.parts
    assert again.modules_to_save == ["classifier"]


def test_replace_keeps_the_parts_apart() -> None:
    config = UnifiedConfig(parts=EVERY)
    other = dataclasses.replace(config)
    assert other == config
    other.parts[3].target_modules = {"key"}
    assert config.parts[3].target_modules == {"query", "value"}
    assert EVERY[3].target_modules == {"query", "value"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of parts and preset"),
        ({"parts": EVERY, "preset": "ln"}, "exactly one of parts and preset"),
        ({"parts": []}, "at least one config"),
        ({"parts": LNTuningConfig()}, "takes a list"),
        ({"preset": "ln+houlsby"}, "'houlsby' is unknown.*mha-adapter"),
        ({"preset": "ln+ln"}, "names 'ln' twice"),
        ({"preset": 3}, "3 is unknown"),
        ({"parts": [IA3Config()]}, "holds a IA3Config; a part is one of"),
        ({"parts": [UnifiedConfig(preset="ln")]}, "holds a UnifiedConfig"),
        ({"parts": [{"kind": "Nonsense"}]}, "of kind 'Nonsense'"),
        ({"parts": [LNTuningConfig(modules_to_save=["classifier"])]}, "give that to UnifiedConfig"),
        ({"parts": [LoraConfig(bias="all")]}, "bias='all'"),
        ({"parts": [LoraConfig(layer_replication=[(0, 1)])]}, "layer_replication"),
        ({"parts": [LoraConfig(init_lora_weights="pissa")]}, "changes the weights of the base"),
        ({"preset": "ln", "target_modules": ["LayerNorm"]}, "belongs to a part"),
        ({"preset": "ln", "layers_to_transform": [0]}, "belongs to a part"),
        ({"preset": "ln", "delta_dtype": "float32"}, "belongs to a part"),
    ],
)
def test_what_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UnifiedConfig(**options)


def test_the_parts_get_what_is_said_once() -> None:
    config = UnifiedConfig(parts=EVERY, task_type="SEQ_CLS", modules_to_save=["classifier"], init_weights=False)
    for part in config.effective_parts():
        assert part.task_type == "SEQ_CLS"
        assert part.modules_to_save == ["classifier"]
        assert not (part.init_lora_weights if isinstance(part, LoraConfig) else part.init_weights)
    assert all(part.modules_to_save is None for part in config.parts)


def test_the_part_with_deltas() -> None:
    fisher = FisherLNConfig(density=0.1)
    plain = LNTuningConfig(roles=["final"])
    assert plain.deltas is plain
    assert BottleneckConfig().deltas is None
    config = UnifiedConfig(parts=[plain, fisher, PrefixConfig()])
    assert config.deltas == fisher
    configs = {"a": config}
    record_mask(configs, "a", {"made": "by hand"})
    changed = configs["a"]
    assert changed.deltas.mask_source == {"made": "by hand"}
    assert config.deltas.mask_source is None
    assert len(parts_of(changed)) == 3


def test_peft_reads_it_back_as_what_it_was(tmp_path: Path) -> None:
    config = UnifiedConfig(parts=EVERY)
    config.save_pretrained(str(tmp_path))
    read = PeftConfig.from_pretrained(str(tmp_path))
    assert type(read) is UnifiedConfig
    assert read.parts == config.parts
