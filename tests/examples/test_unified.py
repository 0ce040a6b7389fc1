"""The combined example from end to end, on a tiny model."""

import datasets
import pytest
from unified import METHOD_NAMES, main

# PEFT reads transformers' gradient checkpointing property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.end_to_end
def test_unified(tiny_bert, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    out = tmp_path / "unified"
    main(["--model", tiny_bert, "--max-steps", "2", "--batch-size", "4", "--out", str(out)])
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in METHOD_NAMES)
    assert "bit-equal" in printed
    rows = dict(line.split(maxsplit=1) for line in printed.split("for each:")[1].splitlines() if line.startswith("  "))
    assert list(rows) == ["combined", "only-ln", "only-mha-adapter", "only-prefix", "__base__"]
    assert len(set(rows.values())) == 5
    differences = [float(line.split(":")[1]) for line in printed.splitlines() if line.startswith("largest difference")]
    assert len(differences) == 2
    assert max(differences) < 1e-4


def test_no_such_data(tmp_path):
    with pytest.raises(SystemExit, match="no such file"):
        main(["--data-dir", str(tmp_path)])
