"""Several processes train, choose and save what one process does: two and four of them."""

import json
import os

import pytest
import torch
from filelock import FileLock
from peft import PeftModel
from safetensors.torch import load_file

from tests.processes.worker import ACCELERATED, CASES, WAYS, ZERO, build_base, launch

pytestmark = pytest.mark.end_to_end
TOLERANCE = {"atol": 1e-6, "rtol": 0}


def run_once(factory, world):
    """What `world` processes wrote; they run once, also where pytest itself has several processes."""
    root = factory.getbasetemp().parent / f"processes-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    folder = root / str(world)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{world}.lock"):
        if not (root / f"{world}.done").exists():
            launch(world, folder)
            (root / f"{world}.done").touch()
    return folder


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    return run_once(tmp_path_factory, 1)


@pytest.fixture(scope="session", params=[2, 4])
def together(request, tmp_path_factory):
    return run_once(tmp_path_factory, request.param)


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same_files(found, expected):
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], **TOLERANCE, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_the_adapter_is_that_of_one_process(case, way, alone, together):
    assert_same_files(together / f"{case}-{way}", alone / f"{case}-one")


@pytest.mark.parametrize("case", CASES)
def test_training_moved_it(case, alone):
    """Or the comparison above would hold for adapters that nobody has trained."""
    model = PeftModel.from_pretrained(build_base(), alone / f"{case}-one").eval()
    (batch,) = ({"input_ids": torch.arange(1, 7).unsqueeze(0)},)
    with torch.no_grad():
        tuned = model(**batch).logits
        with model.disable_adapter():
            assert (model(**batch).logits - tuned).abs().max() > 1e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_it_is_whole_and_loads(case, way, alone, together):
    """The digest in the config is that of the tensors, so the file was written once and by one process."""
    one, several = (
        PeftModel.from_pretrained(build_base(), folder).eval()
        for folder in (alone / f"{case}-one", together / f"{case}-{way}")
    )
    ids = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(several(input_ids=ids).logits, one(input_ids=ids).logits, atol=1e-5, rtol=0)
    config = json.loads((together / f"{case}-{way}" / "adapter_config.json").read_text())
    assert config["manifest"]["digest"]


@pytest.mark.parametrize("way", WAYS)
def test_all_processes_choose_the_entries_that_one_chooses(way, alone, together):
    ours, theirs = (tensors(folder) for folder in (together / f"fisher-{way}", alone / "fisher-one"))
    name = "base_model.model.lntune_packed.mask"
    assert torch.equal(ours[name], theirs[name])


@pytest.mark.parametrize("way", WAYS)
def test_dtypes_over_a_base_in_half_precision(way, together):
    seen = json.loads((together / f"bf16-{way}" / "seen.json").read_text())
    # The head is trained in the dtype of the base, as PEFT leaves it.
    assert seen["trained"] == ["torch.bfloat16", "torch.float32"]
    assert seen["deltas"] == ["torch.float32"]
    assert seen["frozen as before"]
    found = tensors(together / f"bf16-{way}")
    assert {tensor.dtype for name, tensor in found.items() if "lntune" in name} == {torch.float32}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_frozen_moved(way, together):
    for case in CASES:
        seen = json.loads((together / f"{case}-{way}" / "seen.json").read_text())
        assert seen["trained"] == seen["deltas"] == ["torch.float32"], case
        assert seen["frozen as before"], case


@pytest.mark.parametrize("case", [*CASES, "bf16"])
def test_ddp_exchanges_what_is_trained_and_nothing_else(case, together):
    seen = json.loads((together / f"{case}-ddp" / "seen.json").read_text())
    assert seen["sent a step"] == seen["bytes trained"] > 0


@pytest.mark.parametrize("case", ACCELERATED)
def test_accelerate_with_a_short_last_batch(case, alone, together):
    ours, theirs = tensors(together / case), tensors(alone / case)
    assert ours.keys() == theirs.keys()
    # Gradients that are averaged in another order are rounded otherwise in bfloat16.
    tolerance = TOLERANCE if case == "accumulated" else {"atol": 2e-3, "rtol": 0}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], **tolerance)
        assert tensor.dtype == torch.float32


@pytest.fixture(scope="session")
def in_shares(tmp_path_factory):
    """What two processes of DeepSpeed have written. It compiles a little library on the first use."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    launch(2, folder, ZERO, ())
    return folder


@pytest.mark.parametrize("way", ZERO)
@pytest.mark.parametrize("case", CASES)
def test_deepspeed_on_cpus(case, way, alone, in_shares):
    found = in_shares / f"{case}-{way}"
    assert_same_files(found, alone / f"{case}-one")
    PeftModel.from_pretrained(build_base(), found)  # the digest is that of the file
    seen = json.loads((found / "seen.json").read_text())
    assert seen["deltas"] == ["torch.float32"]
    assert seen["frozen as before"]
