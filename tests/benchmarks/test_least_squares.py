"""Gains in closed form. The oracle is the written-out least-squares problem, in float64."""

import copy

import pytest
import torch

from benchmarks.harness.least_squares import closed_form, least_squares_gain, spread_gain
from peft_lntune.norms.find import find_norms
from peft_lntune.recover import divergence, logits_of
from tests.adapted import assert_unchanged, snapshot
from tests.recover.pairs import rounded, rows, teacher_of

TOKENS, WIDTH, OUT = 30, 5, 7


def values(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch():
    return {"input_ids": torch.cat([one["input_ids"] for one in rows(16)])}


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("biased", [False, True])
def test_it_solves_the_problem_as_written(biased, ridge):
    s, t = values(TOKENS, WIDTH, seed=0) + 0.5, values(TOKENS, WIDTH, seed=1)
    g, b = values(WIDTH, seed=2), values(WIDTH, seed=3) if biased else torch.zeros(WIDTH, dtype=torch.float64)
    w = values(OUT, WIDTH, seed=4)
    v = w + 0.3 * values(OUT, WIDTH, seed=5)
    # Rows: every output of every token, then how far the gain may go.
    system = torch.cat([v * one for one in s]) / TOKENS**0.5
    wanted = torch.cat([w @ (g * known + b) - v @ b for known in t]) / TOKENS**0.5
    slack = (ridge * system.square().sum(0).mean()).sqrt()
    system = torch.cat([system, slack * torch.eye(WIDTH, dtype=torch.float64)])
    wanted = torch.cat([wanted, slack * g])
    expected = torch.linalg.lstsq(system, wanted[:, None]).solution[:, 0]
    found = least_squares_gain(s, t, g, v.mT @ v, v.mT @ w, b if biased else None, ridge)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_without_linear_maps_the_norms_own_output_is_matched(ridge):
    s, t, g = values(TOKENS, WIDTH, seed=0), values(TOKENS, WIDTH, seed=1), values(WIDTH, seed=2)
    eye = torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(
        least_squares_gain(s, t, g, ridge=ridge), least_squares_gain(s, t, g, eye, eye, ridge=ridge)
    )


@pytest.mark.parametrize("way", ["own inputs", "teacher inputs", "spread"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "gpt2"])
def test_an_undamaged_model_keeps_its_gains(kind, way):
    teacher = teacher_of(kind)
    deltas = closed_form(copy.deepcopy(teacher), teacher, batch(), way)
    assert set(deltas) == set(find_norms(teacher))
    for delta in deltas.values():
        assert delta.abs().max() < 1e-3  # the sum of about a thousand roundings of float32, by the ridge's condition


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_what_is_behind_one_norm_is_repaired_there_and_nothing_later_moves(kind):
    teacher = teacher_of(kind)
    student = copy.deepcopy(teacher)
    attention = student.model.layers[0].self_attn
    with torch.no_grad():
        for module in (attention.q_proj, attention.k_proj, attention.v_proj):
            module.weight.mul_(0.5)
    deltas = closed_form(student, teacher, batch(), ridge=0.0)
    first = "model.layers.0.input_layernorm"
    gain = teacher.get_submodule(first).weight + (kind == "gemma")
    torch.testing.assert_close(deltas.pop(first), gain, rtol=1e-3, atol=1e-3)
    # As if each norm were solved on the damaged model, later ones would move too.
    assert max(float(delta.abs().max()) for delta in deltas.values()) < 1e-2


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "gpt2"])
def test_it_helps_a_rounded_model_and_does_not_change_it(kind):
    teacher = teacher_of(kind)
    student = rounded(teacher, bits=3)
    before = snapshot(student)
    deltas = closed_form(student, teacher, batch())
    assert_unchanged(student, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())
    unseen = rows(4, seed=9)
    with torch.no_grad():
        known = [logits_of(teacher, one) for one in unseen]
        worse = sum(float(divergence(logits_of(student, one), k)) for one, k in zip(unseen, known, strict=True))
        for name, delta in deltas.items():
            student.get_submodule(name).weight.add_(delta)
        better = sum(float(divergence(logits_of(student, one), k)) for one, k in zip(unseen, known, strict=True))
    assert better < worse


def test_the_spread_of_each_channel():
    s, t, g = values(TOKENS, WIDTH, seed=0), values(TOKENS, WIDTH, seed=1), values(WIDTH, seed=2)
    found = spread_gain(s, t, g) * s
    torch.testing.assert_close(found.var(0), (g * t).var(0))
    with pytest.raises(ValueError, match="no way 'other'"):
        closed_form(teacher_of(), teacher_of(), batch(), "other")


def test_padding_is_left_out():
    teacher = teacher_of()
    student = rounded(teacher)
    found = []
    for filler in (5, 9):
        one = {"input_ids": batch()["input_ids"].clone(), "attention_mask": torch.ones(32, 10)}
        one["input_ids"][16:, 6:], one["attention_mask"][16:, 6:] = filler, 0
        found.append(closed_form(student, teacher, one))
    for name, delta in found[0].items():
        torch.testing.assert_close(delta, found[1][name], rtol=1e-4, atol=1e-5)
