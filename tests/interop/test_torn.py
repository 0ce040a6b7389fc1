"""What a killed process leaves: adapters that are refused, checkpoints that are skipped."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from peft_lntune import BottleneckConfig, ModuleTuningConfig, PrefixConfig
from peft_lntune.errors import AdapterFileError, ConfigError
from peft_lntune.interop import last_whole_checkpoint
from peft_lntune.storage.adapter_file import WEIGHTS_FILE
from tests import adapted
from tests.interop.worker import BEFORE, CONFIGS, LAST, build, build_base, train
from tests.plugin.saved import State

CONFIG_FILE = "adapter_config.json"
KINDS: dict[str, Callable[[], Any]] = {
    **CONFIGS,
    "modules": lambda: ModuleTuningConfig(task_type="SEQ_CLS", components=["query", "norm"]),
    "bottleneck": lambda: BottleneckConfig(task_type="SEQ_CLS"),
    "prefix": lambda: PrefixConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
}


def make(kind: str) -> PeftModel:
    model = build(kind) if kind in CONFIGS else get_peft_model(build_base(), KINDS[kind]())
    adapted.fill(model, "default")
    return model


def cut(file: Path, keep: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])


def cut_in_header(file: Path) -> None:
    length = int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes(file.read_bytes()[: 8 + length // 2])


def cut_last_byte(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def leave_zeros(file: Path) -> None:
    """A file that got its length and its header before its values, as safetensors writes it."""
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:header] + bytes(len(content) - header))


def lose(file: Path) -> None:
    file.unlink()


# How far the process came: what it leaves of the weights. Its config was not written yet, or there was an older one.
TORN: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda file: cut(file, 0),
    "four bytes": lambda file: file.write_bytes(file.read_bytes()[:4]),
    "length": lambda file: file.write_bytes(file.read_bytes()[:8]),
    "part of the header": cut_in_header,
    "half": lambda file: cut(file, 0.5),
    "all but a byte": cut_last_byte,
    "no file": lose,
}


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("saved")
    make(request.param).save_pretrained(str(folder))
    return request.param, folder


@pytest.mark.end_to_end
def test_a_torn_adapter_is_refused_by_every_kind(saved: tuple[str, Path], tmp_path: Path) -> None:
    kind, good = saved
    model = make(kind)
    adapted.fill(model, "default", seed=5)
    before = State.of(model)
    (folder := tmp_path / "adapter").mkdir()
    for keeps_config in (True, False):
        for torn, damage in {**TORN, **({"zeros": leave_zeros} if keeps_config else {})}.items():
            shutil.copytree(good, folder, dirs_exist_ok=True)
            damage(folder / WEIGHTS_FILE)
            if not keeps_config:
                (folder / CONFIG_FILE).unlink()
            with pytest.raises(AdapterFileError, match=r"damaged or cut off|digests differ|but no adapter_"):
                model.load_adapter(str(folder), "default", is_trainable=True)
            before.assert_same(model)
            with pytest.raises(
                ValueError, match=r"damaged or cut off|digests differ|but no adapter_|Can't find"
            ) as error:
                PeftModel.from_pretrained(build_base(), str(folder))
            assert isinstance(error.value, AdapterFileError) is keeps_config, torn
    shutil.copytree(good, folder, dirs_exist_ok=True)
    for keep in (0, 0.5, 0.99):
        cut(folder / CONFIG_FILE, keep)
        with pytest.raises(AdapterFileError, match=r"adapter_config\.json.*is damaged"):
            model.load_adapter(str(folder), "default", is_trainable=True)
        before.assert_same(model)
    shutil.copytree(good, folder, dirs_exist_ok=True)
    model.load_adapter(str(folder), "default", is_trainable=True)
    model.save_pretrained(str(tmp_path / "again"))
    assert (tmp_path / "again" / WEIGHTS_FILE).read_bytes() == (good / WEIGHTS_FILE).read_bytes()


@pytest.fixture(scope="module", params=["ln", "tasks"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run; it is put back as it was by those who change it."""
    folder: Path = tmp_path_factory.mktemp("trained")
    train(request.param, folder)
    return folder


def lose_end(file: Path) -> None:
    cut(file, 0.99)


def test_a_torn_checkpoint_is_passed_over_for_the_one_before(trained: Path, tmp_path: Path) -> None:
    newest = trained / LAST
    before = trained / BEFORE
    assert last_whole_checkpoint(trained) == str(newest)
    files = [file for file in newest.rglob("*") if file.is_file() and file.suffix != ".md"]
    assert {file.name for file in files} >= {WEIGHTS_FILE, CONFIG_FILE, "trainer_state.json", "optimizer.pt"}
    for file in files:
        for damage in (lambda file: cut(file, 0), lambda file: cut(file, 0.5), lose_end, lose):
            if damage is lose and file.name in ("training_args.bin", "tasks.safetensors"):
                continue  # the one is not needed; the other is written before what is
            shutil.copy(file, tmp_path / "kept")
            damage(file)
            with pytest.warns(UserWarning, match=f"{LAST} is skipped: "):
                found = last_whole_checkpoint(str(trained))
            shutil.copy(tmp_path / "kept", file)
            assert found == str(before), file
    assert last_whole_checkpoint(trained) == str(newest)


def test_weights_of_another_save_are_passed_over(trained: Path, tmp_path: Path) -> None:
    """As where a run writes over the checkpoint of another one."""
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    for file in (folder / LAST).rglob(WEIGHTS_FILE):
        shutil.copy(folder / BEFORE / file.relative_to(folder / LAST), file)
    with pytest.warns(UserWarning, match="skipped: .*digests differ"):
        assert last_whole_checkpoint(folder) == str(folder / BEFORE)


def test_without_a_whole_one_training_begins_at_the_beginning(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path / "not yet there") is None
    (tmp_path / "checkpoint-last").mkdir()
    (tmp_path / "checkpoint-7").touch()
    assert last_whole_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-2").mkdir()
    with (
        pytest.warns(UserWarning, match="none of the 1 checkpoints in .* is complete, so training starts from the"),
        pytest.warns(UserWarning, match="checkpoint-2 is skipped: it has no .* save was not finished"),
    ):
        assert last_whole_checkpoint(tmp_path) is None


def test_what_it_makes_of_checkpoints(trained: Path, tmp_path: Path) -> None:
    """Numbers count, not letters or dates; what a killed process was about to write is no part of a checkpoint."""
    whole = trained / LAST
    for number in (9, 10, 8):
        shutil.copytree(whole, tmp_path / f"checkpoint-{number}")
    left = tmp_path / "checkpoint-10" / f".{CONFIG_FILE}-left"
    left.mkdir()
    (left / CONFIG_FILE).touch()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    shutil.copytree(whole, tmp_path / "checkpoint-11", ignore=shutil.ignore_patterns("optimizer.pt"))
    with pytest.warns(UserWarning, match=r"checkpoint-11 is skipped: it has no optimizer\*"):
        assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_other_adapters_and_whole_models_count_too(trained: Path, tmp_path: Path) -> None:
    """The examples compare with them: a folder is looked at in the same way."""
    ours = ("adapter_*", "a", "b", "c", "tasks.safetensors")
    for number in (1, 2, 3):
        shutil.copytree(trained / LAST, tmp_path / f"checkpoint-{number}", ignore=shutil.ignore_patterns(*ours))
    get_peft_model(build_base(), LoraConfig(task_type="SEQ_CLS")).save_pretrained(str(tmp_path / "checkpoint-1"))
    save_file({"weight": build_base().classifier.weight.detach()}, tmp_path / "checkpoint-2" / "model.safetensors")
    with pytest.warns(UserWarning, match=r"checkpoint-3 is skipped: it has no \*model\*"):
        assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    shutil.rmtree(tmp_path / "checkpoint-3")
    cut(tmp_path / "checkpoint-2" / "model.safetensors", 0.5)
    with pytest.warns(UserWarning, match=r"checkpoint-2 is skipped: model\.safetensors is cut off"):
        assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def deepspeed(folder: Path, whole: Path) -> Path:
    """A checkpoint as Trainer writes it under DeepSpeed: its states in a folder of the step."""
    own = ("optimizer*", "scheduler*", "rng_state*")
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns(*own))
    for rank in (0, 1):
        torch.save({}, folder / f"rng_state_{rank}.pth")
    step = folder / "global_step4"
    step.mkdir()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"state": torch.ones(3)}, step / name)
    (folder / "latest").write_text("global_step4")
    return folder


def sharded(folder: Path, whole: Path) -> Path:
    """One under FSDP with sharded states, each in a folder of torch's distributed format."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("optimizer*", "adapter_*", "a", "b", "c"))
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (folder / name).mkdir()
        for part in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
            (folder / name / part).write_bytes(b"values")
    return folder


@pytest.mark.parametrize(
    ("make", "damages"),
    [
        (
            deepspeed,
            [
                lambda folder: (folder / "latest").unlink(),
                lambda folder: (folder / "latest").write_text("global_step6"),
                lambda folder: cut(folder / "global_step4" / "mp_rank_00_model_states.pt", 0.5),
                lambda folder: (folder / "global_step4" / "mp_rank_00_model_states.pt").unlink(),
                lambda folder: (folder / "trainer_state.json").unlink(),
            ],
        ),
        (
            sharded,
            [
                lambda folder: (folder / "optimizer_0" / ".metadata").unlink(),
                lambda folder: shutil.rmtree(folder / "optimizer_0"),
                lambda folder: [file.unlink() for file in (folder / "pytorch_model_fsdp_0").glob("*.distcp")],
                lambda folder: (folder / "scheduler.pt").unlink(),
            ],
        ),
    ],
    ids=["DeepSpeed", "FSDP"],
)
def test_checkpoints_of_several_processes(make: Any, damages: list[Any], trained: Path, tmp_path: Path) -> None:
    """What can be told of them is checked; what cannot be told is said, and no run begins anew without a word."""
    for number, damage in enumerate([None, *damages]):
        root = tmp_path / str(number)
        root.mkdir()
        folder = make(root / "checkpoint-4", trained / LAST)
        if damage is None:
            with pytest.warns(UserWarning, match="checkpoint-4 is taken, but .* cannot be checked"):
                assert last_whole_checkpoint(root) == str(folder)
            continue
        damage(folder)
        with (
            pytest.warns(UserWarning, match="none of the 1 checkpoints .* training starts from the beginning"),
            pytest.warns(UserWarning, match="checkpoint-4 is skipped: "),
        ):
            assert last_whole_checkpoint(root) is None


def test_a_checkpoint_is_no_output_directory(trained: Path) -> None:
    with pytest.raises(ConfigError, match="is a checkpoint itself"):
        last_whole_checkpoint(trained / LAST)
