"""Whoever has an adapter of ours and not this package finds in its card what to import."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers.utils.hub as hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_lntune import LNTuningConfig
from peft_lntune.storage.model_card import IMPORT_LINE, name_import
from tests.plugin.saved import HEADS, adapt, build_base


def said(folder: Path) -> int:
    """How often the card says what to import, on a line of its own."""
    return (folder / "README.md").read_text().splitlines().count("import peft_lntune")


def native() -> nn.Module:
    model = build_base()
    model.add_adapter(LNTuningConfig(modules_to_save=HEADS))
    return model


class TestFile:
    def test_the_line(self) -> None:
        assert IMPORT_LINE == "import peft_lntune"

    def test_a_new_card(self, tmp_path: Path) -> None:
        name_import(tmp_path)
        name_import(tmp_path)
        assert said(tmp_path) == 1
        assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"

    def test_a_card_keeps_what_it_says(self, tmp_path: Path) -> None:
        text = "---\nlicense: mit\n---\n\n# Größe\n\nWe import peft_lntune here.\n"
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        name_import(tmp_path)
        after = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert after.startswith(text)
        assert said(tmp_path) == 1
        assert "pip install git+<repository>" in after


def test_saved_adapters(tmp_path: Path) -> None:
    model = adapt(build_base(), "default", "b")
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert said(tmp_path) == said(tmp_path / "b") == 1
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"


def test_the_top_card_of_named_adapters(tmp_path: Path) -> None:
    adapt(build_base(), "b").save_pretrained(tmp_path)
    assert said(tmp_path) == 1


def test_saved_by_transformers_alone(tmp_path: Path) -> None:
    native().save_pretrained(tmp_path)
    assert said(tmp_path) == 1


def test_written_anew_by_trainer(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(adapt(build_base()), arguments)
    trainer.save_model()
    trainer.create_model_card()
    assert said(tmp_path) == 1
    assert "model-index" in (tmp_path / "README.md").read_text()


def test_other_adapters_are_left_alone(tmp_path: Path) -> None:
    get_peft_model(build_base(), LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    assert said(tmp_path) == 0


class HubStub:
    """Records what is uploaded."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, operations: list[Any], **kwargs: Any) -> None:
        for operation in operations:
            self.files[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()


@pytest.mark.parametrize("build", [lambda: adapt(build_base()), native], ids=["peft", "native"])
def test_pushed_to_the_hub(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_card(*args: Any, **kwargs: Any) -> None:
        raise EntryNotFoundError("no card yet")

    stub = HubStub()
    monkeypatch.setattr(hub, "hf_api", lambda: stub)
    monkeypatch.setattr(hub.ModelCard, "load", no_card)
    build().push_to_hub("somebody/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= stub.files.keys()
    assert stub.files["README.md"].decode().splitlines().count("import peft_lntune") == 1
