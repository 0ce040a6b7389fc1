"""PEFT's stock format from a saved adapter."""

import pytest
import torch
import transformers as hf
from peft import PeftConfig, PeftModel

from tests.cli.saved import combined, refused, run, save_adapter, save_model
from tests.cli.test_merge import outputs, with_adapter

# PEFT warns of every norm it adapts itself.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type.*LayerNorm:UserWarning")


def test_peft_alone_reads_it(tmp_path):
    model = save_model(tmp_path / "model")
    adapter = save_adapter(tmp_path / "a", model)
    result = run("export", adapter, tmp_path / "out")
    assert result.exit_code == 0
    assert result.stdout == f"The adapter in PEFT's format is in {tmp_path / 'out'}.\n"
    assert PeftConfig.from_pretrained(str(tmp_path / "out")).peft_type == "LN_TUNING"
    base = hf.AutoModelForSequenceClassification.from_pretrained(model)
    stock = PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(outputs(stock), outputs(with_adapter(model, adapter)), rtol=1e-5, atol=1e-5)


def test_parts_that_are_no_norms(tmp_path):
    adapter = save_adapter(tmp_path / "a", save_model(tmp_path / "model"), config=combined())
    assert refused(run("export", adapter, tmp_path / "out"), "LN_TUNING format cannot hold")
    assert not (tmp_path / "out").exists()


def test_a_stock_adapter_is_no_adapter_of_ours(tmp_path):
    adapter = save_adapter(tmp_path / "a", save_model(tmp_path / "model"))
    run("export", adapter, tmp_path / "out")
    assert refused(run("export", tmp_path / "out", tmp_path / "again"), "not one of peft_lntune")
