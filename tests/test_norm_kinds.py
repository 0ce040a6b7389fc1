"""Norms of every kind are tuned right in every state, or named with the reason."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_lntune import (
    AdapterBank,
    FisherLNConfig,
    LNTuningConfig,
    ManyTasks,
    ModuleTuningConfig,
    fisher_scores,
    fit_fisher_masks,
    plan,
)
from peft_lntune.errors import NoMatchError
from peft_lntune.norms.find import find_missed, find_norms, looks_like_norm
from peft_lntune.norms.per_sample import per_sample
from tests.cases import spread
from tests.norm_kinds import KINDS, MISSED, NOT_MISSED, TritonNorm, build, sample
from tests.selection.oracles import loop_scores
from tests.tolerance import assert_close


def adapted(kind: str, dtype: torch.dtype = torch.float64, config=LNTuningConfig) -> PeftModel:
    """The model of a kind with two adapters of random values, `default` and `other`; the first is active."""
    model = get_peft_model(build(kind, dtype), config())
    model.add_adapter("other", config())
    randomize(model)
    return model.eval()


def randomize(model: PeftModel) -> None:
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lntune_" in name:
            nn.init.normal_(parameter)


def oracle(kind: str, model: PeftModel, adapter: str | None, x: Tensor) -> Tensor:
    """The model of a kind whose parameters were changed by hand, in float64."""
    plain, layer = build(kind, x.dtype).double(), model.base_model.model.norm
    for parameter in ("weight", "bias"):
        if adapter in layer.deltas(parameter):
            delta = layer.deltas(parameter)[adapter].weight.detach().double()
            getattr(plain.norm, layer.own_name(parameter)).data += delta
    return plain(x.double()).detach()


@pytest.mark.parametrize("kind", KINDS)
def test_found(kind):
    model = build(kind)
    (norm,) = find_norms(model).values()
    assert norm.by_sample == KINDS[kind].by_sample
    assert {getattr(model.norm, name, None) is None for name in norm.parameters.values()} <= {
        False,
        norm.bias_shape is None,
    }
    assert plan(model, LNTuningConfig()).entries == sum(p.numel() for p in model.parameters())
    assert find_missed(model) == {}


@pytest.mark.parametrize(("kind", "dtype"), spread(KINDS, [torch.float64, torch.float32, torch.bfloat16]))
def test_every_state(kind, dtype):
    x, plain = sample(kind, dtype=dtype), build(kind, dtype)
    # A product, its rounding and a sum of up to eight terms in half precision; of the wide dtypes, their roundings.
    roundings = 64
    with torch.no_grad():
        assert torch.equal(get_peft_model(build(kind, dtype), LNTuningConfig()).eval()(x), plain(x))
    model = adapted(kind, dtype)
    assert_close(model(x), oracle(kind, model, "default", x), roundings)
    with torch.no_grad():
        single = model(x)
        assert_close(single, oracle(kind, model, "default", x), roundings)
        with model.disable_adapter():
            assert torch.equal(model(x), plain(x))
        model.merge_adapter()
        assert_close(model(x), oracle(kind, model, "default", x), roundings)
        model.unmerge_adapter()
        assert torch.equal(model(x), single)
        names = ["default", "__base__", "other", "default"]
        # The second input of a sample comes from another one, so a row alone is not the row of the batch.
        rows = [oracle(kind, model, None if n == "__base__" else n, x)[i] for i, n in enumerate(names)]
        assert_close(model(x, adapter_names=names), torch.stack(rows), roundings)
        bank = AdapterBank(plain, dtype=torch.promote_types(dtype, torch.float32))
        bank.add("default", (model, "default"))
        bank.add("other", (model, "other"))
        bank.attach()
        with bank.route(names):
            assert_close(plain(x), torch.stack(rows), roundings)
        bank.detach()
        assert torch.equal(model.merge_and_unload()(x), build_merged(kind, dtype)(x))


def build_merged(kind: str, dtype: torch.dtype) -> nn.Module:
    model = adapted(kind, dtype)
    model.merge_adapter()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_files(kind, tmp_path):
    model, x = adapted(kind), sample(kind)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(kind), tmp_path).eval()
    assert torch.equal(loaded(x), model(x))
    bank = AdapterBank(build(kind))
    bank.add("saved", tmp_path)
    assert "saved" in bank


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    """A delta's gradient is that of the parameter it is added to, in a batch of one adapter and of several."""
    model, x = adapted(kind), sample(kind)
    layer = model.base_model.model.norm
    model(x).square().sum().backward()
    plain = build(kind)
    for parameter in ("weight", "bias"):
        if "default" in layer.deltas(parameter):
            getattr(plain.norm, layer.own_name(parameter)).data += layer.deltas(parameter)["default"].weight.detach()
    plain(x).square().sum().backward()
    for parameter in ("weight", "bias"):
        if "default" in layer.deltas(parameter):
            expected = getattr(plain.norm, layer.own_name(parameter)).grad
            assert_close(layer.deltas(parameter)["default"].weight.grad, expected)


class Scored(nn.Module):
    """A model whose samples do not meet, as Fisher scores need."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm, self.second = build(kind).norm, KINDS[kind].second

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        y = self.norm(x, x.sin()) if self.second else self.norm(x)
        y, more = y if isinstance(y, tuple) else (y, None)
        return {"y": y.cumsum(-1).tanh() + (0 if more is None else 2 * more)}


def loss_of(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return (outputs["y"].flatten(1).mean(1) - batch["labels"]).square()


@pytest.mark.parametrize("kind", KINDS)
def test_fisher(kind):
    batches = [{"x": sample(kind), "labels": torch.arange(4.0, dtype=torch.float64)}]
    expected = loop_scores(Scored(kind).eval(), batches, loss_of)
    found = fisher_scores(Scored(kind).eval(), batches, loss=loss_of)
    assert found.keys() == expected.keys() == {name for name, _ in Scored(kind).named_parameters()}
    for name, scores in found.items():
        assert_close(scores, expected[name], name=name)
    with per_sample(Scored(kind), expected) as hooks:
        assert bool(hooks.hooked) != KINDS[kind].by_sample


@pytest.mark.parametrize("kind", ["(1, C, 1, 1)", "gamma and beta", "norm and SiLU"])
def test_masks(kind, tmp_path):
    config = FisherLNConfig(density=0.5, num_samples=4)
    model = get_peft_model(Scored(kind).eval(), config)
    fit = fit_fisher_masks(model, [{"x": sample(kind), "labels": torch.arange(4.0).double()}], loss=loss_of)
    kinds = "gamma" if "gamma" in kind else "weight"
    assert kinds in str(fit)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 8
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Scored(kind).eval(), tmp_path)
    assert torch.equal(loaded(sample(kind))["y"], model.eval()(sample(kind))["y"])
    model.clear_masks()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 16


@pytest.mark.parametrize("kind", ["InstanceNorm2d", "scale and shift", "norm and SiLU", "residual"])
def test_many_tasks(kind):
    """Two tasks in one batch have the gradients that each has alone."""
    model, x = adapted(kind), sample(kind)
    layer, names = model.base_model.model.norm, ["default", "default", "other", "other"]
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        model.zero_grad()
        rows = [place for place, own in enumerate(names) if own == name]
        model(x)[rows].square().sum().backward()
        for parameter in ("weight", "bias"):
            delta = layer.deltas(parameter)[name].weight
            expected[name, parameter] = delta.detach() - delta.grad
    with ManyTasks(model) as tasks:
        optimizer = tasks.optimizer(lambda parameters: torch.optim.SGD(parameters, lr=1.0))
        with tasks.route(names):
            y = model(x)
        y.square().sum().backward()
        optimizer.step()
    for (name, parameter), value in expected.items():
        assert_close(layer.deltas(parameter)[name].weight, value)


def test_layers_show_what_they_compute_with_under_the_norms_own_names():
    model = adapted("gamma and beta")
    layer = model.base_model.model.norm
    assert torch.equal(layer.gamma, layer.weight)
    assert torch.equal(layer.beta, layer.get_base_layer().beta + layer.lntune_bias["default"].weight)


# What is missed.


@pytest.mark.parametrize("case", MISSED)
def test_missed_is_named_in_the_plan_and_by_one_warning(case):
    make, reason = MISSED[case]
    model, config = nn.ModuleDict({"norm": nn.LayerNorm(8), "odd": make(), "twin": make()}), LNTuningConfig()
    assert list(find_norms(model)) == ["norm"]
    planned = plan(model, config)
    assert list(planned.missed) == ["odd", "twin"]
    assert "odd" in str(planned)
    with pytest.warns(UserWarning, match=reason) as seen:
        peft_model = get_peft_model(model, config)
    assert len(seen) == 1
    assert "2 modules look like norms and are not tuned. odd, twin (" in str(seen[0].message)
    peft_model.add_adapter("again", LNTuningConfig())  # the same again is not said again
    peft_model.base_model.clear_masks()


@pytest.mark.parametrize("case", NOT_MISSED)
def test_no_false_alarm(case):
    model = nn.ModuleDict({"norm": nn.LayerNorm(8), "other": NOT_MISSED[case]()})
    assert find_missed(model) == {}
    get_peft_model(model, LNTuningConfig())


def test_what_the_config_leaves_out_is_not_missed():
    def model():
        return nn.ModuleDict(
            {"norm": nn.LayerNorm(8), "h": nn.ModuleList([nn.Sequential(TritonNorm()), nn.BatchNorm1d(8)])}
        )

    for options, reason in (
        ({"target_modules": ["norm"]}, "not among the target modules, or excluded"),
        ({"exclude_modules": ["h.0.0", "h.1"]}, "excluded"),
    ):
        planned = plan(model(), LNTuningConfig(**options))
        assert (planned.missed, planned.left_out) == ({}, {"h.0.0": reason, "h.1": reason})
        get_peft_model(model(), LNTuningConfig(**options))
    # A module that is named is tuned as any other.
    both = plan(model(), LNTuningConfig(target_modules=["norm", "h.1"]))
    assert list(both.parts) == ["norm", "h.1"]
    assert list(plan(model(), ModuleTuningConfig(components=["norm"])).missed) == ["h.0.0", "h.1"]


def test_an_error_that_nothing_is_found_names_what_looks_like_a_norm():
    with pytest.raises(NoMatchError, match=r"look like norms(.|\n)*0 \(BatchNorm1d\): BatchNorm normalizes by a stat"):
        plan(nn.Sequential(nn.BatchNorm1d(8)), LNTuningConfig())


def test_many_of_a_kind_are_counted():
    model = nn.Sequential(nn.LayerNorm(8), *(nn.BatchNorm1d(8) for _ in range(30)))
    with pytest.warns(UserWarning, match=r"30 modules look like norms.* 19, 20 and 10 more \(BatchNorm1d\)"):
        get_peft_model(model, LNTuningConfig())


def test_a_saved_adapter_is_loaded_without_a_warning(tmp_path):
    model = nn.Sequential(nn.LayerNorm(8), nn.BatchNorm1d(8))
    with pytest.warns(UserWarning, match="1 module looks like a norm and is not tuned"):
        get_peft_model(copy.deepcopy(model), LNTuningConfig()).save_pretrained(tmp_path)
    PeftModel.from_pretrained(model, tmp_path)


def test_scripted_parts_do_not_disturb():
    model = nn.ModuleDict(
        {"norm": nn.LayerNorm(8), "part": torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))}
    )
    peft_model = get_peft_model(model, LNTuningConfig())
    peft_model.merge_and_unload()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_kernel_is_tried_where_it_is():
    class KernelNorm(nn.LayerNorm):
        def forward(self, x):
            if x.device.type == "cpu":
                raise ValueError("no kernel for a CPU")
            return super().forward(x)

    model = nn.Sequential(KernelNorm(8))
    assert find_missed(model)["0"].reason == "raised ValueError on the CPU: no kernel for a CPU"
    assert list(find_norms(model.cuda())) == ["0"]
    peft_model = get_peft_model(model, LNTuningConfig()).eval()
    randomize(peft_model)
    x = torch.randn(2, 8, device="cuda")
    before = peft_model(x)
    assert_close(peft_model.merge_and_unload()(x), before)


def test_looks_like_norm_needs_parameters():
    assert not looks_like_norm(nn.LayerNorm(8, elementwise_affine=False))
    assert looks_like_norm(nn.LayerNorm(8))
