"""The divergence of two answers. The oracle is torch's own, in float64."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from peft_lntune.errors import DataError
from peft_lntune.recover import divergence


def logits(seed, *shape):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(student, teacher):
    return kl_divergence(Categorical(logits=teacher), Categorical(logits=student))


def test_it_is_the_mean_over_positions():
    student, teacher = logits(0, 2, 3, 5), logits(1, 2, 3, 5)
    torch.testing.assert_close(divergence(student, teacher), oracle(student, teacher).mean())
    assert divergence(teacher, teacher) == 0


def test_positions_that_the_mask_leaves_out_do_not_count():
    student, teacher = logits(0, 2, 3, 5), logits(1, 2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = oracle(student, teacher)[mask.bool()].mean()
    student[mask == 0] = torch.nan
    student.requires_grad_()
    found = divergence(student, teacher, mask)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert student.grad[mask == 0].abs().sum() == 0
    assert student.grad[mask == 1].isfinite().all()


def test_half_precision_is_widened():
    student, teacher = logits(0, 64, 50).bfloat16(), logits(1, 64, 50).bfloat16()
    found = divergence(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), oracle(student.double(), teacher.double()).mean(), rtol=1e-5, atol=0)


def test_a_mask_of_zeros():
    with pytest.raises(DataError, match="no position counts"):
        divergence(logits(0, 2, 5), logits(1, 2, 5), torch.zeros(2))
