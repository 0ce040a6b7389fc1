"""`PrefixConfig`: what it takes, what it refuses, and that JSON holds all of it."""

import json

import pytest

from peft_lntune.config.prefix import PrefixConfig
from peft_lntune.errors import ConfigError


def test_alone_it_is_complete():
    config = PrefixConfig()
    assert (config.num_virtual_tokens, config.reparametrize, config.roles) == (20, None, None)
    assert config.kind == "PrefixConfig"


def test_json_gives_it_back(tmp_path):
    config = PrefixConfig(num_virtual_tokens=3, reparametrize=8, roles=["attention"], layers_to_transform=[0, 1])
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert PrefixConfig(**stored) == config


def test_roles_as_users_write_them():
    assert PrefixConfig(roles="cross_attention").roles == ["cross_attention"]
    assert PrefixConfig(roles=("attention", "cross_attention")).roles == ["attention", "cross_attention"]


def test_names_of_attention_modules():
    assert PrefixConfig(target_modules=["encoder_attn"]).target_modules == {"encoder_attn"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0 should be at least 1: how many keys"),
        ({"num_virtual_tokens": 2.0}, "num_virtual_tokens takes an int, but got 2.0 of type float"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens takes an int, but got True"),
        ({"reparametrize": 0}, "reparametrize=0 should be at least 1: the hidden size"),
        ({"reparametrize": True}, "reparametrize takes an int, but got True"),
        ({"roles": []}, r"roles=\[\]: choose one or more of 'attention', 'cross_attention'"),
        ({"roles": ["ffn"]}, r"roles=\['ffn'\]: choose one or more of"),
        ({"roles": 3}, "roles takes a list of strings or None, but got 3"),
        ({"roles": ["attention"], "target_modules": ["attn"]}, "replaces that search. Give one of the two"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        PrefixConfig(**fields)
