"""The example of several processes in one, and the configs it is started with; tests/processes has the rest."""

from pathlib import Path

import datasets
import pytest
import several_processes
import torch
from accelerate.commands.config.config_args import load_config_from_file
from demo_data import write_data
from peft import PeftModel
from several_processes import KINDS, main
from transformers import AutoModelForSequenceClassification

CONFIGS = sorted(Path(several_processes.__file__).parent.glob("accelerate/*.yaml"))

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return write_data(tmp_path / "data", "sentiment", 32, 8)


@pytest.mark.filterwarnings("ignore:num_samples=:UserWarning")
@pytest.mark.parametrize(("kind", "bf16"), [*((kind, False) for kind in KINDS), ("fisher", True)])
def test_it_trains_and_saves(kind, bf16, tiny_bert, data_dir, tmp_path, capsys):
    flags = ["--kind", kind, "--steps", "2", "--batch-size", "4", "--accumulate", "2", *["--bf16"][: int(bf16)]]
    main(["--model", tiny_bert, "--data-dir", str(data_dir), "--out", str(tmp_path), *flags])
    assert "1 processes, loss " in capsys.readouterr().out
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    model = PeftModel.from_pretrained(base, tmp_path / kind)
    trained = [p for name, p in model.named_parameters() if ".lntune_" in name]
    assert {p.dtype for p in trained} <= {torch.float32}
    assert type(model.peft_config["default"]).__name__ == KINDS[kind][0].__name__


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_accelerate_reads_the_configs(file):
    config = load_config_from_file(str(file))
    assert config.num_processes == (1 if file.stem == "one_gpu" else 4)
    assert (
        config.distributed_type
        == {
            "one_gpu": "NO",
            "ddp": "MULTI_GPU",
            "fsdp1": "FSDP",
            "fsdp2": "FSDP",
            "zero2": "DEEPSPEED",
            "zero3": "DEEPSPEED",
        }[file.stem]
    )


def test_fsdp_leaves_deltas_as_they_are():
    for file in CONFIGS:
        config = load_config_from_file(str(file))
        if config.distributed_type == "FSDP":
            assert config.mixed_precision == "no"
            assert config.fsdp_config["fsdp_version"] == int(file.stem[-1])
