"""Effective parameters are kept where nothing they came from can be trained. Whatever changes, no output is stale."""

import pickle
from copy import deepcopy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_lntune import BottleneckConfig, LNTuningConfig, ModuleTuningConfig, PrefixConfig, SupermaskConfig
from tests.adapted import adapt, build, deltas, fill, inputs, layers, output, said
from tests.cases import spread


def fresh(model, batch):
    """The output of a copy that has never kept anything: what the model must say now."""
    twin = deepcopy(model)
    for layer in layers(twin):
        layer._cache = None
        layer._route.drop()
    return said(twin, batch).detach()


def step(model, batch):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    said(model, batch).square().sum().backward()
    optimizer.step()


def replace(model, batch):
    for delta in deltas(model).values():
        delta.weight = nn.Parameter(torch.randn_like(delta.weight))


def data(model, batch):
    for delta in deltas(model).values():
        delta.weight.data = torch.randn_like(delta.weight)


def mask(model, batch):
    model.set_masks({name: torch.arange(delta.shape[0]) % 2 == 0 for name, delta in deltas(model).items()})


@torch.no_grad()
def base(model, batch):
    for layer in layers(model):
        layer.base_layer.weight.mul_(1.5)


def base_replaced(model, batch):
    for layer in layers(model):
        layer.base_layer.weight = nn.Parameter(torch.randn(16))


def fused(optimizer):
    """A step of one of torch's fused optimizers, which change no version of a tensor."""

    def step(model, batch):
        steps = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
        said(model, batch).square().sum().backward()
        steps.step()

    return step


def data_in_place(model, batch):
    """As averages of weights are put in: `torch_ema`, an evaluation with the average, and back."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(parameter.data + 0.5)


def weighted(model, batch):
    model.add_weighted_adapter(["default", "other"], [0.5, -1.0], "sum")
    model.set_adapter("sum")


CHANGES = {
    "optimizer step": step,
    "fused AdamW": fused(torch.optim.AdamW),
    "fused Adam": fused(torch.optim.Adam),
    "fused SGD": fused(torch.optim.SGD),
    "fused Adagrad": fused(torch.optim.Adagrad),
    "in place through data": data_in_place,
    "load_state_dict": lambda m, b: m.load_state_dict({k: v + 0.5 for k, v in m.state_dict().items()}),
    "load_state_dict by assignment": lambda m, b: m.load_state_dict(
        {k: v + 0.5 for k, v in m.state_dict().items()}, assign=True
    ),
    "in place": lambda m, b: fill(m, "default", seed=7),
    "deltas replaced": replace,
    "data exchanged": data,
    "base in place": base,
    "base replaced": base_replaced,
    "masks": mask,
    "set_adapter": lambda m, b: m.set_adapter("other"),
    "two active": lambda m, b: m.base_model.set_adapter(["default", "other"]),
    "merge": lambda m, b: m.merge_adapter(),
    "merge and unmerge": lambda m, b: (m.merge_adapter(), m.unmerge_adapter()),
    "delete": lambda m, b: (m.set_adapter("other"), m.delete_adapter("default")),
    "weighted": weighted,
    "to dtype": lambda m, b: m.double(),
    "to dtype and back": lambda m, b: m.bfloat16().float(),
    "train and eval": lambda m, b: (m.train(), fill(m, "default", seed=7), m.eval()),
    "in place through data, then train()": lambda m, b: (
        [d.weight.data.fill_(0.7) for d in deltas(m).values()],
        m.train(),
        m.eval(),
    ),
}


@pytest.mark.parametrize(("change", "mode"), spread(CHANGES, [torch.no_grad, torch.inference_mode]))
def test_no_output_is_stale_after(change, mode):
    peft_model, batch = adapt(build("bert"), "default", "other"), inputs("bert")
    with mode():
        before = said(peft_model, batch)
    CHANGES[change](peft_model, batch)
    with mode():
        after = said(peft_model, batch)
    expected = fresh(peft_model, batch)
    assert torch.equal(after, expected)
    if change not in ("merge", "merge and unmerge"):
        assert not torch.equal(after, before)


KINDS = {
    "norms": lambda: LNTuningConfig(),
    "modules": lambda: ModuleTuningConfig(components=["query", "ffn_up"]),
    "masks": lambda: SupermaskConfig(components=["query"]),
    "bottlenecks": lambda: BottleneckConfig(init_weights=False),
    "prefixes": lambda: PrefixConfig(num_virtual_tokens=3, init_weights=False),
}


def frozen(model):
    return model.requires_grad_(False)


def thawed(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default." in name)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_trained_by_a_fused_step_and_frozen_again(kind):
    """Neither the version nor the address of a parameter changes on the way."""
    torch.manual_seed(0)
    model, batch = get_peft_model(build("bert"), KINDS[kind]()).eval(), inputs("bert")
    frozen(model)
    before = output(model, batch)
    assert torch.equal(output(model, batch), before)
    addresses = [p.data_ptr() for p in model.parameters()]
    optimizer = torch.optim.AdamW(thawed(model).parameters(), lr=8.0 if kind == "masks" else 0.5, fused=True)
    said(model, batch).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    frozen(model)
    after = output(model, batch)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert not torch.equal(after, before)
    assert torch.equal(after, output(deepcopy(model), batch))
    assert torch.equal(output(model, batch), after)


def in_place(teacher, student):
    teacher.data.mul_(0.5).add_(student.detach().data, alpha=0.5)


def by_assignment(teacher, student):
    """Twice, so that the allocator may hand the first address out again."""
    teacher.data = teacher.data * 0.5 + student.data * 0.5
    teacher.data = teacher.data * 0.5 + student.data * 0.5


@pytest.mark.parametrize(("kind", "follow"), [*((kind, in_place) for kind in KINDS), ("norms", by_assignment)])
def test_a_frozen_teacher_follows_its_student(kind, follow):
    """As DINO's, MoCo's and the averages of diffusers do; `eval` is called once, before."""
    torch.manual_seed(0)
    student, batch = get_peft_model(build("bert"), KINDS[kind]()), inputs("bert")
    teacher = frozen(deepcopy(student)).eval()
    seen = [output(teacher, batch)]
    mixes = kind != "masks"
    for _ in range(2):
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * (20.0 if kind == "masks" else 1.0))
        for own, its in zip(teacher.parameters(), student.parameters(), strict=True):
            follow(own, its)
        seen.append(output(teacher, batch))
        twin = deepcopy(teacher)
        assert torch.equal(seen[-1], output(twin, batch))
        assert not torch.equal(seen[-1], seen[-2])
        if mixes:
            assert torch.equal(*(output(m, batch, adapter_names=["default"] * 3) for m in (teacher, twin)))


def test_a_base_that_is_written_through_data_is_seen():
    model, batch = frozen(adapt(build("bert"))), inputs("bert")
    before = output(model, batch)
    for layer in layers(model):
        layer.base_layer.weight.data.mul_(1.5)
    after = output(model, batch)
    assert torch.equal(after, fresh(model, batch))
    assert not torch.equal(after, before)


def test_what_is_watched_is_an_ordinary_parameter_to_others():
    model, batch = frozen(adapt(build("bert"))), inputs("bert")
    output(model, batch)
    weight = next(iter(deltas(model).values())).weight
    weight.tag = "kept"
    assert type(weight) is not nn.Parameter  # it is watched
    assert isinstance(weight, nn.Parameter)
    assert repr(weight).startswith("Parameter containing:\ntensor(")
    loaded = pickle.loads(pickle.dumps(weight))
    assert loaded.tag == "kept"
    for copy in (deepcopy(weight), loaded):
        assert type(copy) is nn.Parameter
        assert torch.equal(copy, weight)
        assert not copy.requires_grad
    assert {type(value) for value in model.state_dict().values()} == {torch.Tensor}
    thawed(model)
    said(model, batch)
    assert type(weight) is nn.Parameter, "torch.optim would not use its fast loops"


@pytest.mark.parametrize("kind", ["bottlenecks", "prefixes"])
def test_rows_beside_a_module_follow_a_fused_step(kind):
    torch.manual_seed(0)
    model, batch = get_peft_model(build("bert"), KINDS[kind]()).eval(), inputs("bert")
    names = ["default", "__base__", "default"]
    before = output(model, batch, adapter_names=names)
    fused(torch.optim.AdamW)(model, batch)
    after = output(model, batch, adapter_names=names)
    assert not torch.equal(after, before)
    alone = output(model, batch)
    torch.testing.assert_close(after[[0, 2]], alone[[0, 2]], rtol=1e-5, atol=1e-5)


def test_only_what_cannot_be_trained_is_kept():
    model, batch = adapt(build("bert")), inputs("bert")
    output(model, batch)
    assert all(layer._cache is None for layer in layers(model))
    output(frozen(model), batch)
    assert all(layer._cache is not None for layer in layers(model))
    said(model, batch)  # with gradients on too
    assert all(layer._cache is not None for layer in layers(model))
    for call in (lambda: model.set_adapter("default"), model.train, model.eval, model.cpu):
        output(frozen(model), batch)
        call()
        assert all(layer._cache is None for layer in layers(model))


def test_an_attribute_of_a_norm_that_changes_is_seen():
    for family in ("bert", "llama"):
        model, batch = frozen(adapt(build(family))), inputs(family)
        before = output(model, batch)
        for layer in layers(model):
            setattr(layer.base_layer, "eps" if family == "bert" else "variance_epsilon", 3.0)
        assert not torch.equal(output(model, batch), before)


def test_a_mask_written_through_data_is_seen_after_eval():
    model, batch = adapt(build("bert")), inputs("bert")
    mask(model, batch)
    before = output(model, batch)
    for delta in deltas(model).values():
        delta.mask.data.copy_(~delta.mask)
    model.eval()
    assert not torch.equal(output(model, batch), before)


@pytest.mark.parametrize("change", [c for c in CHANGES if "merge" not in c and c != "in place through data"])
def test_no_mixed_batch_is_stale_after(change):
    peft_model, batch = adapt(build("bert"), "default", "other"), inputs("bert")
    names = ["default", "__base__", "other"]
    before = output(peft_model, batch, adapter_names=names)
    CHANGES[change](peft_model, batch)
    names = ["other" if name not in peft_model.peft_config and name != "__base__" else name for name in names]
    after = output(peft_model, batch, adapter_names=names)
    twin = deepcopy(peft_model)
    assert torch.equal(after, output(twin, batch, adapter_names=names))
    if change not in ("set_adapter", "two active", "weighted"):
        assert not torch.equal(after, before)


@pytest.mark.parametrize("case", ["dense", "masked", "masked and loaded"])
def test_inference_mode_then_no_grad_then_training(case):
    """Nothing made under inference_mode may end up in a graph: torch refuses such tensors in backward."""
    peft_model, batch = adapt(build("bert")), inputs("bert")
    if "masked" in case:
        mask(peft_model, batch)
    if "loaded" in case:  # loading writes the mask, so positions derived from it are made again, here in what follows
        peft_model.load_state_dict(peft_model.state_dict())
    with torch.inference_mode():
        first = said(peft_model, batch).clone()
        mixed = said(peft_model, batch, adapter_names="default").clone()
    assert torch.equal(output(peft_model, batch), first)
    assert torch.equal(output(peft_model, batch, adapter_names="default"), mixed)
    said(peft_model, batch).square().sum().backward()
    assert all(delta.weight.grad is not None for delta in deltas(peft_model).values())
    said(peft_model, batch, adapter_names="default").square().sum()  # with gradients on, though deltas get none


def test_a_model_made_under_inference_mode_is_never_kept():
    """Tensors made there count no versions, so nothing can tell that they changed."""
    with torch.inference_mode():
        peft_model, batch = adapt(build("bert")), inputs("bert")
        before = said(peft_model, batch).clone()
        for delta in deltas(peft_model).values():
            delta.weight.mul_(2)
        assert not torch.equal(said(peft_model, batch), before)


def test_memory_that_is_used_again_is_not_mistaken_for_the_old():
    """A delta that is freed and one made later may lie at the same address and have the same version."""
    peft_model, batch = adapt(build("bert")), inputs("bert")
    seen = [output(peft_model, batch)]
    for number in range(6):
        for delta in deltas(peft_model).values():
            delta.weight = None  # frees the old one first, so that the allocator hands its memory out again
        for delta in deltas(peft_model).values():
            delta.weight = nn.Parameter(torch.full((16,), 0.1 * number))
        seen.append(output(peft_model, batch))
        assert torch.equal(seen[-1], fresh(peft_model, batch))
        mixed = output(peft_model, batch, adapter_names=["default"] * 3)
        torch.testing.assert_close(mixed, seen[-1], rtol=1e-5, atol=1e-5)


def test_with_gradients_nothing_is_kept():
    peft_model, batch = adapt(build("bert")), inputs("bert")
    output(peft_model, batch)
    y = said(peft_model, batch)
    assert y.requires_grad
    torch.autograd.grad(y.sum(), [delta.weight for delta in deltas(peft_model).values()])


@pytest.mark.parametrize("frozen", [False, True])
def test_an_input_by_name(frozen):
    config = LNTuningConfig(init_weights=False, inference_mode=frozen)
    model, x = get_peft_model(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), config).eval(), torch.randn(3, 4)
    layer = model.base_model.model[0]
    assert torch.equal(layer(input=x), layer(x))
    assert not torch.equal(layer(x), layer.base_layer(x))
