"""The demo from end to end, on a tiny model."""

import datasets
import numpy as np
import pytest
from demo import main
from task_data import read_data
from text_classification import text_task
from training import Run, reload

# PEFT reads transformers' gradient checkpointing property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_demo(tiny_bert, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    out = tmp_path / "demo"
    main(["--model", tiny_bert, "--max-steps", "5", "--out", str(out)])
    printed = capsys.readouterr().out
    for text in ("head ", "ln ", "full ", "bit-equal", "one batch of 8 rows", "row  7  topic", "its adapter alone"):
        assert text in printed
    for name in ("ln", "topic"):
        file = out / name / "adapter_model.safetensors"
        assert f"{file}  {file.stat().st_size:,} bytes" in printed

    np.save(out / "ln" / "validation_logits.npy", np.zeros((500, 2), np.float32))
    run = Run("ln", tiny_bert, "sentiment", batch_size=16)
    with pytest.raises(RuntimeError, match="answers differently after reloading"):
        reload(run, text_task(read_data(data_dir=out / "data" / "sentiment"), tiny_bert), out / "ln")
