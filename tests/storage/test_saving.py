"""A save over an older adapter, killed at any step, leaves the old or the new one; and what a loader may take."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_lntune import AdapterBank, BottleneckConfig, LNTuningConfig
from peft_lntune.config.base import LNTuneConfig
from peft_lntune.errors import AdapterFileError
from peft_lntune.interop import from_stock, to_stock
from peft_lntune.storage.atomic import STAGING, new_file
from peft_lntune.storage.manifest import PREVIOUS
from tests import adapted
from tests.plugin.saved import adapt, build_base, logits

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Killed(BaseException):
    """Stands for the end of the process: nothing of the save runs after it."""


def steps_of(save: Callable[[Path], Any], folder: Path, monkeypatch: pytest.MonkeyPatch, stop: int | None) -> int:
    """Save, and end after so many files have taken their places; returns how many did."""
    done = 0
    replace = os.replace

    def counted(*args: Any) -> None:
        nonlocal done
        if done == stop:
            raise Killed
        replace(*args)
        done += 1

    with monkeypatch.context() as patch:
        patch.setattr("peft_lntune.storage.atomic.os.replace", counted)
        with suppress(Killed):
            save(folder)
    return done


def answer(folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(build_base(), folder))


OLD = {
    "of the same kind": lambda: adapt(build_base(), seed=1),
    "of another shape": lambda: adapt(build_base(), seed=1, masked=True),
    "of another kind": lambda: filled(BottleneckConfig(task_type="SEQ_CLS", scale=3.0)),
}


def filled(config: LNTuneConfig) -> PeftModel:
    model = get_peft_model(build_base(), config).eval()
    adapted.fill(model, "default", seed=3)
    return model


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=pytest.mark.end_to_end)])
@pytest.mark.parametrize("old", OLD)
def test_killed_at_every_step(old: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, new = tmp_path / "whole", tmp_path / "new"
    OLD[old]().save_pretrained(whole)
    adapt(build_base(), seed=9).save_pretrained(new)
    answers = [answer(whole), answer(new)]
    saved: Any = adapt(build_base(), seed=9)
    if native:
        saved = build_base()
        saved.load_adapter(str(new))
    number = steps_of(saved.save_pretrained, Path(shutil.copytree(whole, tmp_path / "all")), monkeypatch, None)
    assert number >= 3
    found = []
    for stop in range(number):
        folder = Path(shutil.copytree(whole, tmp_path / f"killed-{stop}"))
        assert steps_of(saved.save_pretrained, folder, monkeypatch, stop) == stop
        said = answer(folder)
        found.append(next(n for n, one in enumerate(answers) if torch.equal(said, one)))
        by_auto = PeftConfig.from_pretrained(str(folder))
        assert type(by_auto).__name__ == json.loads(((whole, new)[found[-1]] / CONFIG).read_text())["kind"]
        saved.save_pretrained(folder)  # and the next save is whole
        assert torch.equal(answer(folder), answers[1])
        assert PREVIOUS not in json.loads((folder / CONFIG).read_text())["manifest"]
    assert found == sorted(found)
    assert set(found) == {0, 1}


def test_pickled_weights_over_others_and_back(tmp_path: Path) -> None:
    """PEFT reads safetensors where both are there, so the one that is no longer true goes."""
    first, second = adapt(build_base(), seed=1), adapt(build_base(), seed=2)
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path, safe_serialization=False)
    assert torch.equal(answer(tmp_path), logits(second))
    first.save_pretrained(tmp_path)
    assert torch.equal(answer(tmp_path), logits(first))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_adapters_in_folders_of_their_own_keep_their_cards(tmp_path: Path) -> None:
    model = adapt(build_base(), "a", "b")
    model.save_pretrained(tmp_path)
    (tmp_path / "b" / "README.md").write_text("mine\n")
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    assert (tmp_path / "b" / "README.md").read_text().startswith("mine\n")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_files_have_the_modes_of_files_that_are_simply_written(tmp_path: Path) -> None:
    model, bank = adapt(build_base()), AdapterBank(build_base())
    before = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path / "adapter" / "new")
        to_stock(model, tmp_path / "stock")
        bank.save(tmp_path / "banks" / "bank")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.rglob("*") if file.is_file()}
    folders = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.rglob("*") if file.is_dir()}
    assert (modes, folders) == ({0o640}, {0o750})


KILLED = """
import os, signal, sys
from pathlib import Path
from peft_lntune.storage.atomic import new_file
with new_file(Path(sys.argv[1])) as made:
    made.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name == "nt", reason="there are no locks on folders")
def test_what_a_killed_process_left_is_cleared_by_the_next_save(tmp_path: Path) -> None:
    # Alone with its own file, so that this process starts in a moment and needs no torch.
    source = KILLED.replace("from peft_lntune.storage.atomic import", "from atomic import")
    place = str(Path(sys.modules["peft_lntune"].__file__ or "").parent / "storage")
    ended = subprocess.run([sys.executable, "-c", source, str(tmp_path / "x")], env={**os.environ, "PYTHONPATH": place})
    assert ended.returncode == -signal.SIGKILL
    left = list(tmp_path.glob(f"{STAGING}*"))
    assert len(left) == 1
    with new_file(tmp_path / "y") as made:
        assert not left[0].exists()
        with new_file(tmp_path / "z") as other:  # one that is being written is left alone
            other.write_text("z")
        made.write_text("y")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["y", "z"]


def test_a_field_is_changed_in_python(tmp_path: Path) -> None:
    filled(BottleneckConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    one = answer(tmp_path)
    stored = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(stored | {"scale": 2.0}))
    with pytest.raises(AdapterFileError, match=r"was changed since it was saved: scale is 2\.0, and was 1\.0.*on purp"):
        answer(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(stored))
    config: Any = PeftConfig.from_pretrained(str(tmp_path))
    config.scale = 2.0
    config.save_pretrained(str(tmp_path))
    assert not torch.equal(answer(tmp_path), one)


@pytest.mark.parametrize(
    "changes",
    [{"base_model_name_or_path": "elsewhere", "revision": "v2"}, {"inference_mode": False}, {"peft_version": "0.99"}],
    ids=str,
)
def test_provenance_may_be_edited(changes: dict[str, Any], tmp_path: Path) -> None:
    model = adapt(build_base())
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(stored | changes))
    assert torch.equal(answer(tmp_path), logits(model))


def test_a_file_of_the_first_format_is_read_and_says_that_less_is_covered(tmp_path: Path) -> None:
    model = adapt(build_base())
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(stored | {"manifest": {"digest": stored["manifest"]["digest"]}}))
    loaded = PeftModel.from_pretrained(build_base(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.peft_config["default"].is_sealed
    loaded.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(build_base(), tmp_path).peft_config["default"].is_sealed


@pytest.mark.parametrize("masked", [False, True])
def test_names_are_mapped(masked: bool, tmp_path: Path) -> None:
    """Packed values are in the order of their old names, which is not that of the new ones."""
    body, whole = build_base().bert, build_base()
    model = get_peft_model(body, LNTuningConfig())
    if masked:
        shapes = {label: delta.shape for label, delta in adapted.deltas(model).items()}
        masks = {n: torch.arange(s.numel()).view(s) % (k + 2) == 0 for k, (n, s) in enumerate(shapes.items())}
        model.base_model.set_masks(masks)
    adapted.fill(model, "default")
    model.save_pretrained(tmp_path)
    # The embeddings come last among the new names.
    mapping = {r"^encoder\.": "a_body.encoder.", r"^embeddings\.": "z_body.embeddings."}
    renamed = nn.Module()
    renamed.a_body, renamed.z_body = nn.Module(), nn.Module()
    renamed.a_body.encoder, renamed.z_body.embeddings = whole.bert.encoder, whole.bert.embeddings
    loaded = PeftModel.from_pretrained(renamed, tmp_path, key_mapping=mapping)
    expected = {name: delta.dense() for name, delta in adapted.deltas(model).items()}
    found = {name.replace("a_body.", "").replace("z_body.", ""): d for name, d in adapted.deltas(loaded).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(delta.dense(), expected[name]) for name, delta in found.items())


def claiming(folder: Path, **fields: Any) -> Path:
    """The config asks for more than the file holds, and says nothing of how it was saved."""
    stored = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(stored | fields | {"manifest": None}))
    return folder


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({"kind": "PrefixConfig"}, {"num_virtual_tokens": 10**12}),
        ({"kind": "BottleneckConfig"}, {"bottleneck_size": 10**12}),
        ({"kind": "BottleneckConfig"}, {"reduction_factor": 1e-12}),
        ({"kind": "UnifiedConfig", "preset": "lora+ln"}, {"r": 10**12}),
    ],
    ids=str,
)
def test_sizes_are_compared_with_the_file(config: Any, fields: Any, native: bool, tmp_path: Path) -> None:
    """Each would take terabytes, so a module of this size cannot have been made."""
    config = dict(config)
    kind = getattr(sys.modules["peft_lntune"], config.pop("kind"))
    filled(kind(task_type="SEQ_CLS", **config)).save_pretrained(tmp_path)
    if "r" in fields:
        parts = json.loads((tmp_path / CONFIG).read_text())["parts"]
        fields = {"parts": [part | fields if part["peft_type"] == "LORA" else part for part in parts]}
    base = build_base()
    names = list(base.state_dict())
    with pytest.raises(AdapterFileError, match=r"asks for [\d,]+ values in this model, and its weight file holds"):
        base.load_adapter(str(claiming(tmp_path, **fields))) if native else answer(claiming(tmp_path, **fields))
    assert list(base.state_dict()) == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.fill_(torch.nan), "holds NaN or infinite values"),
        (lambda t: t.long(), "should be of a floating dtype, but is torch.int64"),
        (lambda t: t.half(), "torch.float16, and .* is torch.float32|torch.float32, and .* is torch.float16"),
    ],
)
@pytest.mark.parametrize("peft_model", [False, True])
def test_damaged_stock_files_leave_no_trace(peft_model: bool, change: Any, message: str, tmp_path: Path) -> None:
    to_stock(adapt(build_base()), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    good = dict(tensors)
    key = min(key for key in tensors if "ln_tuning_layers" in key)
    tensors[key] = change(tensors[key].clone())
    save_file(tensors, tmp_path / WEIGHTS)
    model: Any = adapt(build_base(), "first") if peft_model else build_base()
    names, adapters = list(model.state_dict()), list(getattr(model, "peft_config", {}))
    with pytest.raises(AdapterFileError, match=message):
        from_stock(model, tmp_path)
    assert (list(model.state_dict()), list(getattr(model, "peft_config", {}))) == (names, adapters)
    save_file(good, tmp_path / WEIGHTS)
    loaded = from_stock(model, tmp_path)
    loaded.set_adapter("default")
    torch.testing.assert_close(logits(loaded), logits(adapt(build_base())))
