"""Two checkpoints of a run: of plain models, of PEFT's adapters and of ours, from Python and by the command."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LNTuningConfig as StockLN
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig

from peft_lntune import LNTuningConfig
from peft_lntune.analysis import open_tensors
from peft_lntune.cli.doctor import examine_checkpoints, learning_rate_of
from peft_lntune.doctor import Report, compare_norms
from peft_lntune.errors import AdapterFileError, ConfigError
from tests.cli.saved import refused, run
from tests.doctor.runs import WIDTH, adam, net, train

NAMES = ["norm1", "norm2"]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def after(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 12, **options: object) -> tuple:
    before = state(model)
    train(model, optimizer, steps, **options)
    return before, state(model)


def kinds(report: Report) -> set[str]:
    return {finding.kind for finding in report.findings}


def test_full_fine_tuning_is_sound() -> None:
    model = net()
    report = compare_norms(*after(model, adam(model.parameters())), learning_rate=1e-3)
    assert kinds(report) == set()
    assert {(row[4], row[5]) for row in report.summary.rows} == {(1.0, 1.0)}
    assert report.table.column("parameter") == [f"{name}.{key}" for name in NAMES for key in ("weight", "bias")]


def test_bfloat16_at_1e_4() -> None:
    model = net(torch.bfloat16)
    before, later = after(model, adam(model.parameters(), 1e-4), 30)
    known = compare_norms(before, later, learning_rate=1e-4)
    assert kinds(known) == {"too_coarse"}
    assert {one.moved for one in known.records if one.role == "weight"} == {0}
    # Without the rate, what speaks against frozen gains is that some biases moved.
    unknown = compare_norms(before, later)
    assert kinds(unknown) <= {"did_not_move", "few_moved"}
    assert {"norm1.weight", "norm2.weight"} <= {name for found in unknown.findings for name in found.parameters}
    assert any("learning rate" in note for note in unknown.notes)


@pytest.mark.parametrize("stored", [1.0, 0.0])
def test_gains_of_exactly_one_after_training(stored: float) -> None:
    """As in the models of three public reports: all gains are 1 (Gemma stores 0), and everything else has moved."""
    before = {"norm.weight": torch.full((8,), stored), "fc.weight": torch.zeros(8, 8)}
    later = {"norm.weight": torch.full((8,), stored), "fc.weight": torch.ones(8, 8)}
    assert kinds(compare_norms(before, later)) == {"did_not_move"}


def test_norms_frozen_on_purpose_are_a_note() -> None:
    model = net(torch.bfloat16)
    others = [value for name, value in model.named_parameters() if "norm" not in name]
    report = compare_norms(*after(model, adam(others, 1e-2)))
    assert kinds(report) == set()
    assert "4 of 4 norm parameters did not move" in " ".join(report.notes)


def test_the_same_checkpoint_twice() -> None:
    same = state(net(torch.bfloat16))
    report = compare_norms(same, same, learning_rate=1e-4)
    assert kinds(report) == set()
    assert "No tensor differs" in " ".join(report.notes)


def test_decay_alone() -> None:
    model = net()
    before = state(model)
    later = {name: 0.9 * value if "norm" in name else value + 1 for name, value in before.items()}
    report = compare_norms(before, later)
    assert kinds(report) == {"decay_drift"}
    assert "0.9" in report.findings[0].evidence


def test_values_that_are_nan() -> None:
    before = state(net())
    later = {name: value + 0.1 for name, value in before.items()}
    later["norm1.bias"][3] = float("nan")
    report = compare_norms(before, later)
    assert kinds(report) == {"nonfinite_value"}
    assert report.findings[0].parameters == ["norm1.bias"]


def test_few_entries_moved() -> None:
    before = state(net(torch.bfloat16))
    later = {name: value.clone() for name, value in before.items()}
    for name in NAMES:
        later[f"{name}.weight"][: WIDTH // 4] += 2**-7
        later[f"{name}.bias"] += 0.1
    assert kinds(compare_norms(before, later)) == {"few_moved"}
    for name in NAMES:  # as a mask: a quarter of the entries, moved far
        later[f"{name}.weight"][: WIDTH // 4] += 0.5
    assert kinds(compare_norms(before, later)) == set()


def test_a_prefix_and_statistics_are_no_matter() -> None:
    before = state(net(norm=nn.BatchNorm1d))
    later = {f"model.{name}": value + 1 for name, value in before.items()}
    report = compare_norms(before, later)
    assert [one.name for one in report.records] == [f"{name}.{key}" for name in NAMES for key in ("weight", "bias")]


def test_other_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="no norm is in both: 10 tensors before, 1 after"):
        compare_norms(state(net()), {"fc.weight": torch.ones(2, 2)})
    longer = state(net()) | {"norm1.weight": torch.ones(4)}
    with pytest.raises(ConfigError, match=r"norm1.weight is \(32,\) before and \(4,\) after"):
        compare_norms(state(net()), longer)


def test_norms_of_one_checkpoint_alone_are_named() -> None:
    more = {"a.norm.weight": torch.ones(4), "b.norm.bias": torch.ones(4)}
    before, later = state(net()), {name: value + 1 for name, value in state(net()).items()}
    found = compare_norms(
        before | {"a.norm.weight": more["a.norm.weight"]}, later | {"b.norm.bias": more["b.norm.bias"]}
    )
    assert (
        "1 only in the earlier one, such as a.norm.weight; 1 only in the later one, such as b.norm.bias"
        in found.notes[-2]
    )
    # A file of an adapter lacks the norms that it does not tune.
    tuned = {"norm1.weight": later["norm1.weight"]}
    assert "not compared" not in " ".join(compare_norms(before, tuned, adapter=True).notes)


# Folders.


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    save_file(state(net()), tmp_path / "base/model.safetensors")
    return tmp_path / "base"


def lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=["fc1"], r=2, modules_to_save=NAMES))


def lora_alone(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=["fc1"], r=2))


def stock(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT does not know the sizes of a LayerNorm
        return get_peft_model(model, StockLN(target_modules=NAMES))


def ours(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LNTuningConfig(target_modules=NAMES))


def ours_masked(model: nn.Module) -> nn.Module:
    made = ours(model)
    half = torch.arange(WIDTH) < WIDTH // 2
    made.base_model.set_masks({f"{name}.{key}": half for name in NAMES for key in ("weight", "bias")})
    return made


ADAPTERS = {lora: WIDTH, stock: WIDTH, ours: WIDTH, ours_masked: WIDTH // 2}


def saved(make: Callable[[nn.Module], nn.Module], folder: Path, steps: int) -> Path:
    model = make(net())
    train(model, adam([value for value in model.parameters() if value.requires_grad]), steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a net of our own has no name on the Hub
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", ADAPTERS, ids=lambda make: make.__name__)
def test_an_adapter(make: Callable[[nn.Module], nn.Module], base: Path, tmp_path: Path) -> None:
    report = examine_checkpoints(str(base), str(saved(make, tmp_path / "later", 4)), learning_rate=1e-3)
    assert kinds(report) == set(), report
    assert {(one.entries, one.moved, one.can_move) for one in report.records} == {(ADAPTERS[make],) * 3}
    assert len(report.records) == 4


@pytest.mark.parametrize("make", ADAPTERS, ids=lambda make: make.__name__)
def test_two_checkpoints_of_an_adapter(make: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    first, second = saved(make, tmp_path / "a", 1), saved(make, tmp_path / "b", 4)
    report = examine_checkpoints(str(first), str(second))
    assert kinds(report) == set(), report
    assert {(one.entries, one.moved) for one in report.records} == {(ADAPTERS[make],) * 2}


def test_an_adapter_without_norms(base: Path, tmp_path: Path) -> None:
    report = examine_checkpoints(str(base), str(saved(lora_alone, tmp_path / "later", 2)))
    assert kinds(report) == set()
    assert "No norm is tuned" in str(report) or "No norm was found." in str(report)


def test_copies_that_did_not_move(base: Path, tmp_path: Path) -> None:
    folder = saved(lora, tmp_path / "later", 0)
    report = examine_checkpoints(str(base), str(folder))
    assert "4 of 4 norm parameters did not move" in " ".join(report.notes)


def test_an_adapter_of_other_counts_is_refused(base: Path, tmp_path: Path) -> None:
    folder = saved(ours_masked, tmp_path / "later", 1)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["manifest"]["tuned"] = dict.fromkeys(config["manifest"]["tuned"], 3)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFileError, match="holds 64 masked values, and its config counts 12"):
        examine_checkpoints(str(base), str(folder))


def test_the_rate_that_trainer_logged(tmp_path: Path) -> None:
    assert learning_rate_of(str(tmp_path)) is None
    history = [{"learning_rate": 1e-5}, {"learning_rate": 3e-4}, {"eval_loss": 1.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert learning_rate_of(str(tmp_path)) == 3e-4
    (tmp_path / "trainer_state.json").write_text("{")
    with pytest.raises(AdapterFileError, match="is damaged"):
        learning_rate_of(str(tmp_path))


def test_the_command(base: Path, tmp_path: Path) -> None:
    model = net(torch.bfloat16)
    before, later = after(model, adam(model.parameters(), 1e-4), 30)
    save_file(before, tmp_path / "before.safetensors")
    save_file(later, tmp_path / "later.safetensors")
    shown = run("doctor", tmp_path / "before.safetensors", tmp_path / "later.safetensors", "--learning-rate", 1e-4)
    assert shown.exit_code == 0
    assert "too_coarse: the dtype is too coarse for the learning rate (4 parameters" in shown.stdout
    table = tmp_path / "t.csv"
    printed = run("doctor", tmp_path / "before.safetensors", tmp_path / "later.safetensors", "--json", "--csv", table)
    data = json.loads(printed.stdout)
    assert {row["parameter"] for row in data["table"]} == {f"{n}.{key}" for n in NAMES for key in ("weight", "bias")}
    assert data["findings"][0]["advice"]
    assert table.read_text().splitlines()[0] == "parameter,dtype,entries,can_move,moved,one_way"
    assert refused(run("doctor", base, tmp_path / "nothing"), "does not exist")


def test_two_architectures_with_norms_of_one_name(base: Path, tmp_path: Path) -> None:
    """Norms of Llama are called as some of Gemma's are."""
    shutil.copytree(base, tmp_path / "later")
    (base / "config.json").write_text('{"model_type": "gemma3"}')
    (tmp_path / "later/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"is of type 'gemma3', and .* of type 'llama': they are not from one run"):
        examine_checkpoints(str(base), str(tmp_path / "later"))
    model = net()
    model.config = LlamaConfig()
    get_peft_model(model, LNTuningConfig()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="of type 'llama'"):
        examine_checkpoints(str(base), str(tmp_path / "adapter"))
    files = (str(folder / "model.safetensors") for folder in (base, tmp_path / "later"))
    assert not examine_checkpoints(*files).findings
    (base / "config.json").write_text("{")
    with pytest.raises(AdapterFileError, match=r"config\.json is damaged"):
        examine_checkpoints(str(base), str(tmp_path / "later"))


def test_tensors_are_read_one_at_a_time(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    tensors = open_tensors(base)
    view = type(tensors)
    get = view.__getitem__
    monkeypatch.setattr(view, "__getitem__", lambda self, name: read.append(name) or get(self, name))
    report = compare_norms(tensors, {name: get(tensors, name) + 1 for name in tensors})
    assert len(report.records) == 4
    # The norms, and of the other tensors only the first, since it differs.
    assert {name for name in read if "norm" not in name} == {"fc1.bias"}
