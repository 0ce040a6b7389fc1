"""The words that a config's types allow are those that it accepts, for type checkers and for argument parsers."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from transformers import HfArgumentParser

from peft_lntune.architectures.sublayers import SUBLAYER_ROLES
from peft_lntune.architectures.table import MATRICES, Component, ComponentName, MatrixName
from peft_lntune.config import KINDS
from peft_lntune.config.base import DtypeName
from peft_lntune.config.bottleneck import REDUCTION_FACTORS
from peft_lntune.config.module_tuning import PRESETS, ModulePreset
from peft_lntune.core.bottleneck import ACTIVATIONS, Activation, Position
from peft_lntune.core.choices import ROLES, Role
from peft_lntune.errors import ConfigError

ROOT = Path(__file__).parents[2]


def words_of(hint: object) -> tuple[str, ...]:
    """The words of a `Literal`, or of one in a union."""
    kinds = [hint, *(get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else ())]
    return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())


# Every field of every config that takes one word out of a few, with those words.
HINTS = {(config, name): hint for config in KINDS.values() for name, hint in get_type_hints(config).items()}
UNUSED = (KINDS["UnifiedConfig"], "delta_dtype")  # belongs to its parts
FIELDS = {field: words for field, hint in HINTS.items() if (words := words_of(hint)) and field != UNUSED}
NEEDED = {"ModuleTuningConfig": {"components": ["query"]}, "UnifiedConfig": {"preset": "ln"}}


@pytest.mark.parametrize(
    ("words", "known"),
    [
        (Activation, ACTIVATIONS),
        (ComponentName, Component),
        (MatrixName, MATRICES),
        (ModulePreset, PRESETS),
        (Position, REDUCTION_FACTORS),
        (Role, ROLES),
    ],
)
def test_words_are_the_keys_of_their_tables(words, known):
    assert set(get_args(words)) == set(known)


def test_words_of_dtypes_are_floating():
    assert all(getattr(torch, name).is_floating_point for name in get_args(DtypeName))


def test_sublayers_have_roles():
    assert set(SUBLAYER_ROLES) < set(ROLES)


def test_every_choice_is_typed():
    alone = {"tune", "fisher", "scope", "position", "activation", "scale", "preset", "delta_dtype", "save_dtype"}
    assert {name for _, name in FIELDS} == alone


@pytest.mark.parametrize(("config", "name"), FIELDS)
def test_words_are_accepted_and_no_others(config, name):
    needed = {} if name == "preset" else NEEDED.get(config.__name__, {})
    for word in FIELDS[config, name]:
        config(**{**needed, name: word})
    with pytest.raises(ConfigError, match=f"{name}='no such word'"):
        config(**{**needed, name: "no such word"})


def test_argument_parsers_offer_the_words():
    """A script takes over the fields it wants. A whole config, as PEFT's LoraConfig, has fields of several types."""
    chosen = {name: HINTS[config, name] for config, name in FIELDS if name in ("tune", "scope", "position")}
    arguments = dataclasses.make_dataclass("Arguments", [(name, hint, None) for name, hint in chosen.items()])
    (given,) = HfArgumentParser(arguments).parse_args_into_dataclasses(["--tune", "bias", "--position", "parallel"])
    assert (given.tune, given.scope, given.position) == ("bias", None, "parallel")
    with pytest.raises(SystemExit):
        HfArgumentParser(arguments).parse_args_into_dataclasses(["--tune", "biass"])


# A line that says WRONG must be an error for a type checker, every other line must be right.
SNIPPET = """
from peft_lntune import (
    BottleneckConfig, FisherLNConfig, LNTuningConfig, ModuleTuningConfig, PrefixConfig, SupermaskConfig
)
from peft_lntune.architectures.table import Component

LNTuningConfig(tune="bias", roles=["attention", "ffn"], delta_dtype="bfloat16")
LNTuningConfig(roles=("final",))
LNTuningConfig(tune="biass")  # WRONG
LNTuningConfig(roles=["atention"])  # WRONG
LNTuningConfig(delta_dtype="bf16")  # WRONG
LNTuningConfig(save_dtype="fp16")  # WRONG
LNTuningConfig(layers_to_transform=[1.5])  # WRONG
FisherLNConfig(fisher="mc", scope="layer", density=0.1)
FisherLNConfig(fisher="mcmc")  # WRONG
FisherLNConfig(scope="layers")  # WRONG
BottleneckConfig(position="parallel", activation="gelu", scale="learned")
BottleneckConfig(scale=4.0)
BottleneckConfig(position="behind")  # WRONG
BottleneckConfig(activation="elu")  # WRONG
BottleneckConfig(scale="learnt")  # WRONG
BottleneckConfig(roles=["final"])  # WRONG
PrefixConfig(roles=["attention"])
PrefixConfig(roles=["ffn"])  # WRONG
ModuleTuningConfig(components=["query", Component.KEY])
ModuleTuningConfig(preset="bitfit")
ModuleTuningConfig(components=["querry"])  # WRONG
ModuleTuningConfig(preset="bit-fit")  # WRONG
SupermaskConfig(components=["query"])
SupermaskConfig(components=["norm"])  # WRONG
"""


@pytest.mark.end_to_end
def test_type_checkers_see_a_typo(tmp_path):
    (tmp_path / "snippet.py").write_text(SNIPPET)
    others = "[mypy-torch.*,transformers.*,peft.*,accelerate.*,safetensors.*]\nfollow_imports = skip\n"  # minutes else
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nignore_missing_imports = true\nfollow_imports = silent\n{others}")
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir=cache", "snippet.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    found = {int(line) for line in re.findall(r"^snippet\.py:(\d+): error", ran.stdout, flags=re.MULTILINE)}
    wrong = {number for number, line in enumerate(SNIPPET.splitlines(), start=1) if line.endswith("# WRONG")}
    assert found == wrong, ran.stdout + ran.stderr
