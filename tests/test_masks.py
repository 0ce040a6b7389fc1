"""Masks: the chosen entries are parameters, and nobody sees the rest."""

import pytest
import torch

from peft_lntune import ConfigError
from tests.adapted import adapt, assert_unchanged, build, deltas, inputs, output, said, snapshot


def random_masks(model, adapter="default", density=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = deltas(model, adapter)
    return {name: torch.rand(delta.shape, generator=generator) < density for name, delta in found.items()}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("family", ["bert", "llama", "cohere"])
def test_only_chosen_entries_are_parameters(family):
    model, batch = build(family), inputs(family)
    base = output(model, batch)
    peft_model = adapt(model, std=0)
    masks = random_masks(peft_model)
    peft_model.set_masks(masks)
    chosen = sum(int(mask.sum()) for mask in masks.values())
    assert sum(p.numel() for p in trained(peft_model)) == chosen
    assert peft_model.get_nb_trainable_parameters()[0] == chosen
    assert peft_model.get_model_status().trainable_params == chosen
    assert all(delta.weight.shape == (masks[name].sum(),) for name, delta in deltas(peft_model).items())
    assert torch.equal(output(peft_model, batch), base)


def test_a_mask_keeps_the_values_it_chooses():
    peft_model, batch = adapt(build("bert")), inputs("bert")
    before = {name: delta.dense().clone() for name, delta in deltas(peft_model).items()}
    masks = random_masks(peft_model)
    peft_model.set_masks(masks)
    for name, delta in deltas(peft_model).items():
        assert torch.equal(delta.dense(), before[name] * masks[name])
        assert torch.equal(delta.tuned(), masks[name])
    expected = output(peft_model, batch)
    peft_model.merge_adapter()
    assert torch.equal(output(peft_model, batch), expected)


def test_a_second_mask_replaces_the_first():
    peft_model = adapt(build("bert"), std=0)
    for seed in (0, 1):
        masks = random_masks(peft_model, seed=seed)
        peft_model.set_masks(masks)
        assert all(torch.equal(delta.tuned(), masks[name]) for name, delta in deltas(peft_model).items())


def test_parameters_without_a_chosen_entry_are_no_longer_tuned():
    model, batch = build("bert"), inputs("bert")
    peft_model = adapt(model)
    first, second, *_ = deltas(peft_model)
    peft_model.set_masks({first: torch.arange(16) < 3, second: torch.zeros(16, dtype=torch.bool)})
    assert list(deltas(peft_model)) == [first]
    assert sum(p.numel() for p in trained(peft_model)) == 3
    assert output(peft_model, batch).isfinite().all()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_equals_dense_training_with_a_masked_gradient(optimizer):
    """Bit for bit: the same sums in the same order. AdamW decays the chosen entries and never sees the others."""
    batch = inputs("bert")
    masked, dense = (adapt(build("bert"), std=0) for _ in range(2))
    masks = random_masks(masked)
    masked.set_masks(masks)
    for model in (masked, dense):
        if optimizer == "sgd":
            steps = torch.optim.SGD(trained(model), lr=0.05, foreach=False)
        else:
            # Adam divides by the root of what it has seen, so an entry whose gradient is always zero stays zero.
            steps = torch.optim.AdamW(trained(model), lr=0.01, weight_decay=0.1, foreach=False)
        for _ in range(3):
            steps.zero_grad()
            said(model, batch).square().mean().backward()
            if model is dense:
                for name, delta in deltas(dense).items():
                    delta.weight.grad *= masks[name]
            steps.step()
    for name, delta in deltas(masked).items():
        assert delta.weight.abs().min() > 0
        assert torch.equal(delta.dense(), deltas(dense)[name].dense())
    assert torch.equal(output(masked, batch), output(dense, batch))


def test_only_the_named_adapter_is_masked():
    peft_model = adapt(build("bert"), "a", "b")
    before = {name: delta.dense().clone() for name, delta in deltas(peft_model, "a").items()}
    peft_model.set_masks(random_masks(peft_model, "b"), adapter_name="b")
    assert all(delta.mask is None for delta in deltas(peft_model, "a").values())
    assert all(torch.equal(delta.dense(), before[name]) for name, delta in deltas(peft_model, "a").items())
    assert not any(delta.weight.requires_grad for delta in deltas(peft_model, "b").values())  # it was not active


def test_masked_and_dense_adapters_in_one_batch():
    from tests.oracles import each_alone

    peft_model, batch = adapt(build("bert"), "dense", "masked"), inputs("bert")
    peft_model.set_masks(random_masks(peft_model, "masked"), adapter_name="masked")
    names = ["masked", "dense", "__base__"]
    mixed = output(peft_model, batch, adapter_names=names)
    torch.testing.assert_close(mixed, each_alone(peft_model, batch, names), rtol=1e-5, atol=1e-5)


ONES = torch.ones(16, dtype=torch.bool)
NORM = "bert.embeddings.LayerNorm.weight"
REFUSED = {
    "unknown name": ({"bert.nowhere.weight": ONES}, r"masks name 'bert\.nowhere\.weight' .*It tunes: bert\.embeddings"),
    "wrong dtype": ({NORM: ONES.float()}, r"bool tensor of shape \(16,\), but is torch\.float32 of shape \(16,\)"),
    "wrong shape": ({NORM: ONES[:5]}, r"bool tensor of shape \(16,\), but is torch\.bool of shape \(5,\)"),
    "nothing chosen": ({NORM: ~ONES}, "choose no entry at all"),
    "empty": ({}, "choose no entry at all"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_masks_that_do_not_fit_are_refused_before_anything_changes(case):
    masks, message = REFUSED[case]
    peft_model = adapt(build("bert"))
    before = snapshot(peft_model)
    with pytest.raises(ConfigError, match=message):
        peft_model.set_masks(masks)
    assert_unchanged(peft_model, before)


def test_masks_of_an_unknown_adapter_are_refused():
    peft_model = adapt(build("bert"))
    with pytest.raises(ConfigError, match="which adapter 'other' does not tune"):
        peft_model.set_masks({NORM: ONES}, adapter_name="other")
