"""A saved adapter read into one that the model has: refused, before anything changes, where it would mean another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from peft_lntune import (
    BottleneckConfig,
    FisherLNConfig,
    LNTuningConfig,
    PeftLNTuneError,
    SupermaskConfig,
    UnifiedConfig,
)
from peft_lntune.errors import AdapterFileError, ConfigError, UnsupportedError
from tests import adapted
from tests.cases import spread

from .saved import State, build_base, logits

WAYS: dict[str, Callable[[PeftModel, Path], Any]] = {
    "load_adapter": lambda model, folder: model.load_adapter(folder, "default"),
    "trainable": lambda model, folder: model.load_adapter(folder, "default", is_trainable=True),
    "hotswap": lambda model, folder: hotswap_adapter(model, str(folder), "default", torch_device="cpu"),
}


def lora(**options: Any) -> UnifiedConfig:
    return UnifiedConfig(parts=[LoraConfig(r=4, **options), LNTuningConfig()])


def two(attention: float, ffn: float, *order: int) -> UnifiedConfig:
    """Two bottlenecks with scales of their own, in one of two orders."""
    parts: list[PeftConfig] = [
        BottleneckConfig(roles=["attention"], scale=attention, bottleneck_size=4),
        BottleneckConfig(roles=["ffn"], scale=ffn, bottleneck_size=4),
    ]
    return UnifiedConfig(parts=[parts[place] for place in order or (0, 1)])


def both(*order: int) -> UnifiedConfig:
    parts = [BottleneckConfig(scale=2.0), LNTuningConfig()]
    return UnifiedConfig(parts=[parts[place] for place in order])


def adapt(config: Any, seed: int, base: nn.Module | None = None) -> PeftModel:
    model = get_peft_model(base or build_base(), config)
    adapted.fill(model, "default", seed=seed)
    return model.eval()


OTHERWISE: dict[str, tuple[Any, Any, str]] = {
    "scale": (BottleneckConfig(), BottleneckConfig(scale=2.0), "has scale=1.0, and the saved one 2.0"),
    "learned scale": (BottleneckConfig(), BottleneckConfig(scale="learned"), "and the saved one 'learned'"),
    "activation": (BottleneckConfig(), BottleneckConfig(activation="gelu"), "has activation='relu', .* one 'gelu'"),
    "position": (
        BottleneckConfig(bottleneck_size=4),
        BottleneckConfig(position="parallel", bottleneck_size=4),
        "has position='sequential', and the saved one 'parallel'",
    ),
    "lora_alpha": (lora(lora_alpha=8), lora(lora_alpha=16), "has lora_alpha=8, and the saved one 16"),
    "use_rslora": (lora(), lora(use_rslora=True), "has use_rslora=False, and the saved one True"),
    "alpha_pattern": (lora(), lora(alpha_pattern={"query": 2}), "has alpha_pattern={}, and the saved one {'query': 2}"),
    "of the second part": (both(0, 1), UnifiedConfig(parts=[LNTuningConfig(), BottleneckConfig()]), "has scale=2.0"),
    "exchanged": (two(2.0, 4.0), two(4.0, 2.0), "has scale=2.0, and the saved one 4.0"),
    "exchanged, in another order": (two(2.0, 4.0), two(4.0, 2.0, 1, 0), "has scale=2.0, and the saved one 4.0"),
    "kind": (LNTuningConfig(), SupermaskConfig(), "consists of LNTuningConfig, and the saved one of SupermaskConfig"),
    "parts": (LNTuningConfig(), both(0, 1), "of LNTuningConfig, and the saved one of BottleneckConfig, LNTuningConfig"),
}


@pytest.mark.parametrize(("case", "way"), spread(OTHERWISE, WAYS))
def test_what_computes_otherwise_is_refused(case: str, way: str, tmp_path: Path) -> None:
    present, saved, message = OTHERWISE[case]
    adapt(saved, seed=1).save_pretrained(tmp_path)
    model = adapt(present, seed=2)
    before = State.of(model)
    with pytest.raises(ConfigError, match=message):
        WAYS[way](model, tmp_path)
    before.assert_same(model)


ALIKE: dict[str, tuple[Any, Any]] = {
    "norms": (LNTuningConfig(), LNTuningConfig()),
    "Fisher": (FisherLNConfig(), LNTuningConfig()),
    "one part": (LNTuningConfig(), UnifiedConfig(parts=[LNTuningConfig()])),
    "order of parts": (both(0, 1), both(1, 0)),
    "order of two of a kind": (two(2.0, 4.0), two(2.0, 4.0, 1, 0)),
    "dropout": (BottleneckConfig(scale=3.0), BottleneckConfig(scale=3, dropout=0.5)),
    "width said in two ways": (BottleneckConfig(reduction_factor=4), BottleneckConfig(bottleneck_size=4)),
    "LoRA": (lora(lora_alpha=8, lora_dropout=0.1), lora(lora_alpha=8)),
}


@pytest.mark.parametrize(("case", "way"), spread(ALIKE, WAYS))
@pytest.mark.filterwarnings("ignore:.*masks:UserWarning")  # of a Fisher adapter that has none yet
def test_what_computes_alike_is_read(case: str, way: str, tmp_path: Path) -> None:
    present, saved = ALIKE[case]
    other = adapt(saved, seed=1)
    other.save_pretrained(tmp_path)
    model = adapt(present, seed=2)
    assert not torch.equal(logits(model), logits(other))
    WAYS[way](model, tmp_path)
    assert torch.equal(logits(model.eval()), logits(other))


@pytest.mark.parametrize("way", WAYS)
def test_another_architecture_is_refused(way: str, tmp_path: Path) -> None:
    base = build_base()
    base.config.model_type = "roberta"
    adapt(LNTuningConfig(), 1, base).save_pretrained(tmp_path)
    model = adapt(LNTuningConfig(), 2)
    before = State.of(model)
    with pytest.raises(AdapterFileError, match="from a model of type 'roberta', and this one is of type 'bert'"):
        WAYS[way](model, tmp_path)
    before.assert_same(model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", [LNTuningConfig(), lora()], ids=["norms", "LoRA"])
def test_a_merged_adapter_is_not_written_over(config: PeftConfig, way: str, tmp_path: Path) -> None:
    adapt(config, seed=1).save_pretrained(tmp_path)
    model = adapt(config, seed=2)
    model.merge_adapter()
    before = State.of(model)
    with pytest.raises(UnsupportedError, match=r"'default' is merged at .* Call unmerge_adapter"):
        WAYS[way](model, tmp_path)
    before.assert_same(model)


def test_without_a_config_in_the_folder_the_tensors_alone_are_compared(tmp_path: Path) -> None:
    other = adapt(BottleneckConfig(), seed=1)
    other.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    model = adapt(BottleneckConfig(), seed=2)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), logits(other))
    with pytest.raises(PeftLNTuneError, match="does not fit this model"):
        adapt(LNTuningConfig(), seed=2).load_adapter(tmp_path, "default")
