"""PEFT's own LN_TUNING format, written and read."""

from pathlib import Path

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

from peft_lntune import LNTuningConfig, find_norms
from peft_lntune.errors import AdapterFileError, ConfigError, UnsupportedError
from peft_lntune.interop import from_stock, to_stock
from tests.adapted import adapt, build, inputs

# What PEFT says of each norm it copies.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")

FAMILIES = ["bert-classifier", "llama", "gemma", "t5", "cohere"]


def run(model: torch.nn.Module, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs(family))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_reads_what_is_written(family: str, tmp_path: Path) -> None:
    ours = adapt(build(family), task_type="SEQ_CLS" if "classifier" in family else None)
    to_stock(ours, tmp_path)
    stock = PeftModel.from_pretrained(build(family), str(tmp_path))
    assert isinstance(stock.peft_config["default"], peft.LNTuningConfig)
    torch.testing.assert_close(run(stock, family), run(ours, family), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_adapter_becomes_one_of_ours(family: str, tmp_path: Path) -> None:
    task_type = "SEQ_CLS" if "classifier" in family else None
    config = peft.LNTuningConfig(target_modules=list(find_norms(build(family))), task_type=task_type)
    stock = get_peft_model(build(family), config)
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    stock.save_pretrained(str(tmp_path))
    ours = from_stock(build(family), tmp_path)
    torch.testing.assert_close(run(ours, family), run(stock, family), rtol=0, atol=0)
    from_stock(ours, tmp_path, "again")
    ours.set_adapter("again")
    torch.testing.assert_close(run(ours, family), run(stock, family), rtol=0, atol=0)


def test_over_a_half_precision_base_the_stock_file_is_rounded(tmp_path: Path) -> None:
    ours = adapt(build("llama", torch.bfloat16), std=1e-4)
    to_stock(ours, tmp_path)
    back = from_stock(build("llama", torch.bfloat16), tmp_path)
    deltas = [p for name, p in back.named_parameters() if "lntune" in name]
    assert not any(delta.any() for delta in deltas), "1e-4 is far below the spacing of bfloat16 near 1"


def test_errors_change_nothing(tmp_path: Path) -> None:
    ours = adapt(build("bert-classifier"), task_type="SEQ_CLS")
    with pytest.raises(ConfigError, match=r"no adapter of this package is named 'other'; this model has \['default'\]"):
        to_stock(ours, tmp_path, "other")
    ours.merge_adapter()
    with pytest.raises(UnsupportedError, match="call unmerge_adapter"):
        to_stock(ours, tmp_path)
    ours.unmerge_adapter()
    assert not list(tmp_path.iterdir())

    to_stock(ours, tmp_path)
    other = build("llama")
    keys = list(other.state_dict())
    with pytest.raises(AdapterFileError, match="It was trained on another model"):
        from_stock(other, tmp_path)
    assert list(other.state_dict()) == keys

    ours.save_pretrained(str(tmp_path / "ours"))
    with pytest.raises(AdapterFileError, match="from_stock reads LN_TUNING"):
        from_stock(other, tmp_path / "ours")
    assert PeftConfig.from_pretrained(str(tmp_path / "ours")).kind == LNTuningConfig.__name__
