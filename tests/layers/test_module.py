"""Modules that are no norms, named in `target_modules`: a full delta of their weight and bias."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_lntune import LNTuningConfig
from peft_lntune.errors import UnsupportedError
from tests.adapted import adapt, assert_unchanged, build, deltas, fill, inputs, output, snapshot
from tests.oracles import each_alone, written


class Plain(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, x):
        return self.inner(x)


# module, its input for a batch of n
MODULES = {
    "Linear": (lambda: nn.Linear(6, 4), lambda n: torch.randn(n, 3, 6)),
    "Linear-no-bias": (lambda: nn.Linear(6, 4, bias=False), lambda n: torch.randn(n, 6)),
    "Embedding": (lambda: nn.Embedding(9, 4), lambda n: torch.randint(9, (n, 5))),
    "Conv1d": (lambda: nn.Conv1d(6, 4, 3), lambda n: torch.randn(n, 6, 5)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3), lambda n: torch.randn(n, 3, 5, 5)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), lambda n: torch.randn(n, 6)),
    "Bilinear-like": (lambda: nn.PReLU(6), lambda n: torch.randn(n, 6)),
}


@pytest.mark.parametrize("case", MODULES)
class TestEveryClass:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_identity_then_the_sum_then_the_base_again(self, case, dtype):
        module, sample = MODULES[case]
        model, x = Plain(module()).to(dtype).eval(), sample(4)
        x = x.to(dtype) if x.is_floating_point() else x
        before, base = snapshot(model), model(x).detach()
        plain = Plain(module()).to(dtype).eval()
        plain.load_state_dict(before)
        peft_model = get_peft_model(model, LNTuningConfig(target_modules=["inner"])).eval()
        assert torch.equal(peft_model(x).detach(), base)
        fill(peft_model, "default")
        # Exactly, in bfloat16 too: the sum is rounded to the base dtype before the module runs, as if it were merged.
        expected = written(plain, {name: delta.dense() for name, delta in deltas(peft_model).items()})(x)
        assert torch.equal(peft_model(x), expected)
        peft_model.merge_adapter()
        assert torch.equal(peft_model(x), expected)
        peft_model.unmerge_adapter()
        assert_unchanged(peft_model.unload(), before)

    def test_mixed_batch(self, case):
        module, sample = MODULES[case]
        model, x = Plain(module()).eval(), sample(5)
        peft_model = get_peft_model(model, LNTuningConfig(target_modules=["inner"]), adapter_name="a").eval()
        peft_model.add_adapter("b", LNTuningConfig(target_modules=["inner"], tune="weight"))
        for seed, name in enumerate(("a", "b")):
            fill(peft_model, name, seed=seed)
        names = ["b", "a", "__base__", "b", "a"]
        with torch.no_grad():
            mixed = peft_model(x, adapter_names=names)
            for name in ("a", "b"):
                peft_model.set_adapter(name)
                rows = [i for i, other in enumerate(names) if other == name]
                # Matrix products of another batch size may sum in another order.
                torch.testing.assert_close(mixed[rows], peft_model(x)[rows], rtol=1e-5, atol=1e-6)
            with peft_model.disable_adapter():
                torch.testing.assert_close(mixed[2], peft_model(x)[2], rtol=1e-5, atol=1e-6)


def test_norms_and_other_modules_in_one_mixed_batch():
    model, batch = build("bert"), inputs("bert")
    peft_model = adapt(model, "norms")
    peft_model.add_adapter("others", LNTuningConfig(target_modules=["query", "word_embeddings", "LayerNorm"]))
    fill(peft_model, "others", seed=3)
    names = ["others", "norms", "__base__"]
    mixed = output(peft_model, batch, adapter_names=names)
    torch.testing.assert_close(mixed, each_alone(peft_model, batch, names), rtol=1e-5, atol=1e-5)


def test_a_delta_on_a_half_precision_linear_gathers_small_steps():
    """The forward rounds the sum, the delta does not: four steps of a quarter of the spacing make one."""
    model = Plain(nn.Linear(1, 1, bias=False)).bfloat16()
    with torch.no_grad():
        model.inner.weight.fill_(1.0)
    peft_model = get_peft_model(model, LNTuningConfig(target_modules=["inner"]))
    (delta,) = deltas(peft_model).values()
    seen = []
    for _ in range(4):
        delta.weight.data += 2.0**-9
        seen.append(peft_model(torch.ones(1, 1).bfloat16()).item())
    assert seen == [1.0, 1.0, 1.0078125, 1.0078125]  # ties go to even: 1 + 2^-8 rounds to 1


def test_a_module_without_a_floating_weight_is_refused():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(3, dtype=torch.int64))

        def forward(self, x):
            return x * self.weight

    for module, kind in ((Counts(), r"one of torch\.int64"), (nn.ReLU(), "none")):
        model = nn.ModuleDict({"norm": nn.LayerNorm(3), "odd": module})
        before = snapshot(model)
        with pytest.raises(UnsupportedError, match=rf"odd \(\w+\) is chosen to be tuned, but .* it has {kind}"):
            get_peft_model(model, LNTuningConfig(target_modules=["norm", "odd"]))
        assert_unchanged(model, before)
