"""Every kind of adapter keeps its promises on every kind of model, or refuses; the table is `tests/contract.py`."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_lntune.errors import UnsupportedError
from tests.adapted import assert_unchanged, build, inputs, output, said, snapshot
from tests.cases import QUICK
from tests.contract import KINDS, fill, filled, is_quick, neighbour, start
from tests.tolerance import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:BottleneckConfig finds a place at")  # and none among experts


def full(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.full)


every = pytest.mark.parametrize(
    ("kind", "family"),
    [
        (pytest.param if is_quick(kind, family) else full)(kind, family)
        for kind in KINDS
        for family in (*QUICK, *KINDS[kind].others)
    ],
)


@every
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float32, True),
        full(torch.float64, False),
        full(torch.float16, False),
        full(torch.bfloat16, True),
    ],
    ids=str,
)
def test_start_and_off(kind: str, family: str, dtype: torch.dtype, autocast: bool) -> None:
    """A new adapter changes no bit, a filled one does; switched off or taken away it is the base again."""
    if (family, dtype) == ("mixtral", torch.float64):
        pytest.skip("transformers has no product of experts in float64")
    batch = inputs(family, dtype)

    def answer(model: nn.Module, run: Callable = output) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # one a call: it keeps the weights that it casts
            return run(model, batch).detach()

    base = build(family, dtype)
    before, modules, expected = snapshot(base), [name for name, _ in base.named_modules()], answer(base)
    model = start(kind, base)
    assert torch.equal(answer(model), expected) == KINDS[kind].starts_as_base
    assert torch.equal(answer(model, said), expected) == KINDS[kind].starts_as_base
    fill(model)
    tuned = answer(model)
    assert tuned.dtype == expected.dtype
    assert not torch.equal(tuned, expected)
    with model.disable_adapter():
        assert torch.equal(answer(model), expected)
    assert torch.equal(answer(model), tuned)
    plain = model.unload()
    assert torch.equal(answer(plain), expected)
    assert [name for name, _ in plain.named_modules()] == modules
    assert_unchanged(plain, before)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, full(torch.float16)], ids=str)
def test_gradients(kind: str, family: str, dtype: torch.dtype) -> None:
    """They reach all that is trained, which is in float32, and nothing of the base."""
    model, batch = filled(kind, family, dtype=dtype), inputs(family, dtype)
    said(model, batch).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lntune_" in name or ".lora_" in name), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or (parameter.dtype == torch.float32 and parameter.grad.isfinite().all()), name


@every
def test_switch_and_delete(kind: str, family: str) -> None:
    model, batch = filled(kind, family, "a", "b"), inputs(family)
    first = output(model, batch)
    model.set_adapter("b")
    assert not torch.equal(output(model, batch), first)
    with pytest.warns(UserWarning, match="Adapter b was active which is now deleted"):
        model.delete_adapter("b")
    assert torch.equal(output(model, batch), first)
    assert not any(".b." in name for name in model.state_dict())


@every
def test_merge(kind: str, family: str) -> None:
    """Merged it says what it said; what cannot be merged is refused, and nothing has changed."""
    model, batch = filled(kind, family), inputs(family)
    said_before, before, base = output(model, batch), snapshot(model), output(build(family), batch)
    if KINDS[kind].merges == "never":
        for verb in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(UnsupportedError, match=r"bottleneck|prefix"):
                verb()
            assert_unchanged(model, before)
        model.merge_adapter(unmergeable="keep")
    else:
        model.merge_adapter(safe_merge=True)

    def as_before(found: Tensor) -> None:
        if KINDS[kind].merges == "bit":
            assert torch.equal(found, said_before)
        else:
            assert_close(found, said_before)

    as_before(output(model, batch))
    if "lora" not in kind:  # LoRA is subtracted
        with model.disable_adapter():
            assert torch.equal(output(model, batch), base)
        model.unmerge_adapter()
        assert_unchanged(model, before)
    else:
        model.unmerge_adapter()
        as_before(output(model, batch))
    if KINDS[kind].merges != "never":
        plain = model.merge_and_unload(safe_merge=True)
        assert plain.state_dict().keys() == build(family).state_dict().keys()
        as_before(output(plain, batch))


@every
def test_save_and_load(kind: str, family: str, tmp_path: Path) -> None:
    """Every path of loading gives the adapter bit for bit."""
    model, batch = filled(kind, family), inputs(family)
    expected = output(model, batch)
    model.save_pretrained(tmp_path)
    for lean in (False, True):
        loaded = PeftModel.from_pretrained(build(family), tmp_path, low_cpu_mem_usage=lean)
        assert torch.equal(output(loaded.eval(), batch), expected)
        assert type(loaded.peft_config["default"]) is type(model.peft_config["default"])
    second = get_peft_model(build(family), neighbour(family))
    second.load_adapter(tmp_path, "other")
    second.set_adapter("other")
    assert torch.equal(output(second.eval(), batch), expected)
    native = build(family)
    native.load_adapter(str(tmp_path))
    assert torch.equal(output(native.eval(), batch), expected)


def saved(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
}


@every
@pytest.mark.parametrize("way", ["deepcopy", full("pickle"), full("torch.save")])
def test_copies(kind: str, family: str, way: str) -> None:
    """A copy says the same, also row by row, and goes its own way."""
    model, batch, names = filled(kind, family, "a", "b"), inputs(family), ["a", "b", "__base__"]
    expected, mixed = output(model, batch), output(model, batch, adapter_names=names)
    twin = WAYS[way](model)
    assert torch.equal(output(twin, batch), expected)
    assert torch.equal(output(twin, batch, adapter_names=names), mixed)
    fill(twin, "a", seed=9)
    changed = output(twin, batch)
    assert not torch.equal(changed, expected)
    with twin.base_model._enable_peft_forward_hooks(adapter_names=["b"] * 3):  # a route of the copy's own
        assert torch.equal(output(model, batch), expected)
    assert torch.equal(output(model, batch, adapter_names=names), mixed)
    twin.unload()
    assert torch.equal(output(model, batch), expected)


@every
def test_mixed_rows(kind: str, family: str) -> None:
    """Row i is what its adapter alone says, also beside an adapter of another kind."""
    if family == "clip":
        pytest.skip("its rows are of each image with each text; tests/layers/test_bottleneck.py looks at samples")
    model, batch = filled(kind, family, "a", "b"), inputs(family, batch=4)
    base = output(build(family), batch)
    model.add_adapter("plain", neighbour(family))
    fill(model, "plain", 7)
    names = ["a", "plain", "__base__", "b"]
    mixed = output(model, batch, adapter_names=names)
    assert_close(mixed[2], base[2], name="__base__")
    for row, name in ((0, "a"), (1, "plain"), (3, "b")):
        model.set_adapter(name)
        assert_close(mixed[row], output(model, batch)[row], name=name)
    assert_close(output(model, batch, adapter_names="b"), output(model, batch))  # b is the active one
    base_alone = output(model, batch, adapter_names=["__base__"] * 4)
    if "prefix" in kind:  # its columns are there and masked, so sums have more terms
        assert_close(base_alone, base)
    else:
        assert torch.equal(base_alone, base)


@every
@pytest.mark.parametrize("reentrant", [False, full(True)])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # transformers 5 renames it
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of a reentrant first block
def test_gradient_checkpointing(kind: str, family: str, reentrant: bool) -> None:
    """Gradients are those without it, also where masks are drawn."""
    dtype = torch.float32 if family == "mixtral" else torch.float64  # transformers has no experts in float64
    model, batch = filled(kind, family, dtype=dtype), inputs(family, dtype)
    if not model.get_base_model().supports_gradient_checkpointing:
        pytest.skip("transformers has none for it")
    model.train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(0)  # both drop and draw the same
        options = {} if family == "vit" else {"use_cache": False}
        said(model, batch, **options).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}

    plain = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for name, gradient in gradients().items():
        assert_close(gradient, plain[name], name=name)
