"""`SupermaskConfig`: what it takes, what it refuses, and that JSON holds all of it."""

import json

import pytest

from peft_lntune import SupermaskConfig, UnifiedConfig
from peft_lntune.architectures.table import LAYER_MATRICES
from peft_lntune.errors import ConfigError


def test_alone_it_is_complete():
    config = SupermaskConfig()
    assert tuple(config.components) == LAYER_MATRICES
    assert (config.initial_sparsity, config.initial_score, config.save_scores) == (0.0, 5.0, False)
    assert config.kind == "SupermaskConfig"


def test_json_gives_it_back(tmp_path):
    config = SupermaskConfig(
        components=("query", "ffn_gate"),
        initial_sparsity=0.25,
        initial_score=3,
        layers_to_exclude=range(2),
        layers_to_transform=[3, 4],
        exclude_modules=["layer.3.query"],
        save_scores=True,
        task_type="SEQ_CLS",
    )
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert SupermaskConfig(**stored) == config
    assert (stored["components"], stored["layers_to_exclude"], stored["initial_score"]) == (
        ["query", "ffn_gate"],
        [0, 1],
        3.0,
    )


def test_as_a_part_json_gives_it_back(tmp_path):
    config = UnifiedConfig(
        parts=[SupermaskConfig(target_modules=["fc1"], initial_sparsity=0.1), {"kind": "LNTuningConfig"}]
    )
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    again = UnifiedConfig(**stored)
    assert again.parts[0] == config.parts[0]
    assert again.parts[0].components is None


def test_components_as_users_write_them():
    assert SupermaskConfig(components="query").components == ["query"]
    assert SupermaskConfig(target_modules=["fc1"]).components is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"components": ["query"], "target_modules": ["fc1"]}, "one of components and target_modules, or neither"),
        ({"components": ["queries"]}, r"components=\['queries'\]: choose one or more of\n  query: the projection"),
        ({"components": ["norm"]}, r"(?s)components=\['norm'\]: choose one or more of\n(?!.*every norm)"),
        ({"components": []}, r"components=\[\]: choose one or more of"),
        ({"components": [3]}, "components takes a list of strings or None"),
        ({"initial_sparsity": 1.0}, "initial_sparsity=1.0 should be at least 0 and below 1"),
        ({"initial_sparsity": -0.1}, "initial_sparsity=-0.1 should be at least 0"),
        ({"initial_sparsity": float("nan")}, "initial_sparsity=nan should be at least 0"),
        ({"initial_sparsity": "0.5"}, "initial_sparsity takes a number, but got '0.5' of type str"),
        ({"initial_sparsity": True}, "initial_sparsity takes a number, but got True"),
        ({"initial_score": 0}, "initial_score=0.0 should be above 0 and at most 15"),
        ({"initial_score": -5.0}, "initial_score=-5.0 should be above 0"),
        ({"initial_score": 16}, "initial_score=16.0 should be above 0 and at most 15, where sigmoid still has a slope"),
        ({"initial_score": None}, "initial_score takes a number, but got None"),
        ({"save_scores": 1}, "save_scores takes a bool, but got 1"),
        ({"layers_to_exclude": "0"}, "layers_to_exclude takes an index"),
        ({"delta_dtype": "int8"}, "delta_dtype='int8' is not a floating dtype"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        SupermaskConfig(**fields)
