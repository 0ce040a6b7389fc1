"""A run that is killed with SIGKILL, at any moment and again and again, ends bit-equal to one that was not."""

import random
import warnings
from collections import Counter
from pathlib import Path

import pytest

from peft_lntune import PeftLNTuneError
from peft_lntune.interop import last_whole_checkpoint
from peft_lntune.storage.adapter_file import WEIGHTS_FILE
from tests.interop.worker import CASES, LAST, TASKS, build, run

SEED = 6


def files_in(folder: Path) -> dict[str, bytes]:
    """What a run ends with, and what training would go on from."""
    last = [folder / LAST / name for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")]
    found = [*last, *(folder / LAST).rglob("*.safetensors"), *(folder / "final").rglob("adapter_*")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in found if file.is_file()}


def look_at_newest(case: str, folder: Path, whole: Path, scratch: Path) -> str:
    """Load the newest checkpoint as Trainer would, torn or not: it is refused, or is that of the uninterrupted run."""
    numbers = [int(place.name.rpartition("-")[2]) for place in folder.glob("checkpoint-*")]
    if not numbers:
        return "none yet"
    newest = f"checkpoint-{max(numbers)}"
    with warnings.catch_warnings(record=True) as passed_over:
        warnings.simplefilter("always")
        last_whole_checkpoint(folder)
    model = build(case)
    refused = False
    for name in TASKS if case == "tasks" else ["default"]:
        own = Path(newest, name if case == "tasks" else "")
        if not (folder / own).is_dir():
            refused = True
            continue
        try:
            model.load_adapter(str(folder / own), name, is_trainable=True)
        except PeftLNTuneError:
            refused = True
        else:
            model.save_pretrained(str(scratch / newest), selected_adapters=[name])
            loaded, expected = ((root / own / WEIGHTS_FILE).read_bytes() for root in (scratch, whole))
            assert loaded == expected, f"{own} is torn, and was loaded"
    assert passed_over or not refused
    return "torn, without its adapter" if refused else "torn, its adapter whole" if passed_over else "whole"


def kill_again_and_again(case: str, folder: Path, kills: int) -> Counter[str]:
    """Kill runs at random moments, and compare each that comes to its end; return what the kills have left."""
    whole, own = folder / "whole", folder / "killed-0"
    _, seconds = run(case, whole)
    drawn, moments, left = random.Random(f"{SEED} {case}"), [], Counter[str]()
    while True:
        done = len(moments) == kills
        moment = drawn.uniform(0, seconds)
        killed, _ = run(case, own, None if done else moment)
        if killed:
            moments.append(round(moment, 4))
            left[look_at_newest(case, own, whole, folder / "scratch")] += 1
            continue
        found, expected = files_in(own), files_in(whole)
        other = [name for name in expected if found.get(name) != expected[name]]
        assert not other, f"{case}: {other} in {own} differ after kills at {moments} of {seconds:.2f} s, seed {SEED}"
        if done:
            return left
        own = folder / f"killed-{len(moments)}"


@pytest.mark.end_to_end  # each step of a save is killed in tests/storage/test_saving.py
@pytest.mark.parametrize("case", ["ln", "tasks"])
def test_a_random_moment(case: str, tmp_path: Path) -> None:
    assert kill_again_and_again(case, tmp_path, 1).total() == 1


@pytest.mark.full
def test_fifty_random_moments(tmp_path: Path) -> None:
    each = 50 // len(CASES)
    left = {case: kill_again_and_again(case, tmp_path / case, each) for case in CASES}
    print(*(f"{case}: {dict(counts)}" for case, counts in left.items()), sep="\n")
    assert sum(counts.total() for counts in left.values()) == 50
