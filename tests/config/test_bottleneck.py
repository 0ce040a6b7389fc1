"""What a `BottleneckConfig` accepts, what it says where it does not, and how wide its bottlenecks are."""

import copy
import dataclasses
import json
from typing import Any

import pytest

from peft_lntune.config import LNTuneConfig
from peft_lntune.config.bottleneck import BottleneckConfig
from peft_lntune.core.bottleneck import ACTIVATIONS
from peft_lntune.errors import ConfigError

# One row a field of its own: a value that is not what the class starts with, and values that are refused.
FIELDS: dict[str, tuple[Any, list[tuple[Any, str]]]] = {
    "position": (
        "parallel",
        [
            ("behind", "position='behind' is not allowed; choose one of 'sequential', 'parallel'"),
            (None, "position=None"),
        ],
    ),
    "roles": (
        ["cross_attention"],
        [
            (["final"], r"roles=\['final'\]: choose one or more of 'attention', 'cross_attention', 'ffn'"),
            ([], r"roles=\[\]: choose one or more"),
            (None, "roles=None: choose one or more"),
            (3, "roles takes a list of strings or None, but got 3 of type int"),
            ([3], r"roles takes a list of strings or None, but got \[3\]"),
        ],
    ),
    "reduction_factor": (
        8.0,
        [(value, "reduction_factor=.* should be a number above 0") for value in (0, -2, "16", True, float("nan"))],
    ),
    "bottleneck_size": (
        48,
        [
            (0, "bottleneck_size=0 should be at least 1"),
            (4.0, "bottleneck_size takes an int, but got 4.0 of type float"),
            (True, "bottleneck_size takes an int, but got True of type bool"),
        ],
    ),
    "activation": ("gelu", [("elu", "activation='elu' is not allowed; choose one of 'relu', 'gelu', .*'identity'")]),
    "scale": (
        "learned",
        [
            (value, "scale=.* should be a number other than 0, or 'learned'")
            for value in (0, "much", None, float("inf"))
        ],
    ),
    "dropout": (
        0.1,
        [(value, "dropout=.* should be a probability, at least 0 and below 1") for value in (1, -0.1, "0.1", True)],
    ),
}
REFUSED = [(name, value, message) for name, (_, refused) in FIELDS.items() for value, message in refused]


def test_every_field_of_its_own_is_in_the_table():
    names = [{field.name for field in dataclasses.fields(kind)} for kind in (BottleneckConfig, LNTuneConfig)]
    assert names[0] - names[1] == FIELDS.keys()


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_refused_values(name, value, message):
    with pytest.raises(ConfigError, match=message):
        BottleneckConfig(**{name: value})


@pytest.mark.parametrize("name", FIELDS)
def test_values_are_kept_in_plain_json_and_in_copies(name):
    value = FIELDS[name][0]
    config = BottleneckConfig(**{name: value})
    assert json.loads(json.dumps(config.to_dict(), default=sorted))[name] == value
    for again in (copy.deepcopy(config), dataclasses.replace(config)):
        assert again == config
    assert getattr(config, name) != getattr(BottleneckConfig(), name)


def test_the_saved_file_has_it_all(tmp_path):
    config = BottleneckConfig(
        position="parallel", roles=("ffn",), scale="learned", bottleneck_size=3, activation="tanh"
    )
    config.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["kind"] == "BottleneckConfig"
    assert {name: saved[name] for name in FIELDS} == {name: getattr(config, name) for name in FIELDS}


@pytest.mark.parametrize("target_modules", [["query"], "query", []])
def test_target_modules_say_what_to_use_instead(target_modules):
    with pytest.raises(ConfigError, match=r"works on a sub-layer, .* say where with roles, layers_to_transform"):
        BottleneckConfig(target_modules=target_modules)


def test_factor_and_size_together_are_refused():
    with pytest.raises(ConfigError, match=r"reduction_factor=16 and bottleneck_size=48 both say .* Give one"):
        BottleneckConfig(reduction_factor=16, bottleneck_size=48)


@pytest.mark.parametrize(
    ("fields", "width", "size"),
    [
        ({}, 768, 48),
        ({"position": "parallel"}, 768, 384),
        ({"reduction_factor": 3}, 16, 5),
        ({"reduction_factor": 2.5}, 16, 6),
        ({"reduction_factor": 0.5}, 16, 32),
        ({"reduction_factor": 16}, 8, 1),
        ({"bottleneck_size": 7}, 768, 7),
    ],
)
def test_size(fields, width, size):
    assert BottleneckConfig(**fields).size_of(width) == size
    assert type(BottleneckConfig(**fields).size_of(width)) is int


@pytest.mark.parametrize("roles", ["ffn", ("ffn",), {"ffn"}, ["ffn"]])
def test_roles_become_a_list(roles):
    assert BottleneckConfig(roles=roles).roles == ["ffn"]


def test_roles_are_not_shared_between_configs():
    BottleneckConfig().roles.append("cross_attention")
    assert BottleneckConfig().roles == ["attention", "ffn"]


def test_every_activation_may_be_named():
    for name in ACTIVATIONS:
        assert BottleneckConfig(activation=name).activation == name
