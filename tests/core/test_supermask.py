"""One mask: where it starts, what it keeps, and the gradient of its scores."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from peft_lntune.core.delta import ParameterSlice, pack_bits
from peft_lntune.core.supermask import Supermask, initial_scores, kept, masked, smallest

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sorted_out(values: Tensor, count: int) -> Tensor:
    """The entries of smallest magnitude by a stable sort: slow, and obviously right."""
    order = values.double().abs().reshape(-1).argsort(stable=True)
    chosen = torch.zeros(values.numel(), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen.view(values.shape)


class TestStart:
    @pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
    @pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.25, 0.5, 0.999])
    def test_the_smallest_and_exactly_as_many(self, dtype, sparsity):
        base = torch.randn(60, 50).to(dtype)  # in half precision thousands of ties
        found = smallest(base, round(sparsity * 3000))
        assert int(found.sum()) == round(sparsity * 3000)
        assert torch.equal(found, sorted_out(base, round(sparsity * 3000)))

    def test_of_equal_ones_the_first(self):
        values = torch.tensor([[1.0, -1.0, 0.5], [1.0, -1.0, 2.0]])
        assert smallest(values, 3).tolist() == [[True, True, True], [False, False, False]]
        assert smallest(torch.zeros(4), 2).tolist() == [True, True, False, False]
        assert smallest(torch.zeros(4), 4).all()

    def test_what_is_not_contiguous(self):
        values = torch.randn(6, 8)[:, 2:5]
        assert torch.equal(smallest(values, 5), sorted_out(values, 5))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("score", [5.0, 5])
    def test_scores_are_float32_and_of_one_size(self, dtype, score):
        base = torch.randn(7, 9).to(dtype)
        scores = initial_scores(base, 0.3, score)
        assert scores.dtype == torch.float32
        assert torch.equal(scores == -5, sorted_out(base, round(0.3 * 63)))
        assert set(scores.unique().tolist()) == {-5.0, 5.0}
        assert initial_scores(base, 0.0, score).eq(5).all()


class TestGradient:
    """d loss / d score = d loss / d effective * base * p (1 - p), p = sigmoid(score): the mask counts as p."""

    @pytest.mark.parametrize("drawn", [True, False])
    def test_it_is_the_formula(self, drawn):
        base, scores, x = torch.randn(4, 6).double(), torch.randn(4, 6).double(), torch.randn(5, 6).double()
        scores.requires_grad_(True)
        p = scores.detach().sigmoid()
        keep = torch.bernoulli(p).bool() if drawn else p > 0.5
        effective = masked(base, scores, keep)
        assert torch.equal(effective, base * keep)
        (x @ effective.T).square().sum().backward()
        of_effective = (2 * x @ (base * keep).T).T @ x
        torch.testing.assert_close(scores.grad, of_effective * base * p * (1 - p))
        assert base.grad is None

    def test_it_is_that_of_the_probability_in_its_place(self):
        """As autograd has it of `base * sigmoid(scores)`, where the loss is linear in the effective parameter."""
        base, scores, factor = torch.randn(30), torch.randn(30, requires_grad=True), torch.randn(30)
        (masked(base, scores, torch.rand(30) < 0.5) * factor).sum().backward()
        other = scores.detach().clone().requires_grad_(True)
        (base * other.sigmoid() * factor).sum().backward()
        torch.testing.assert_close(scores.grad, other.grad)

    def test_entries_that_are_off_learn_too(self):
        scores = torch.tensor([-1.0, 1.0], requires_grad=True)
        masked(torch.tensor([2.0, 2.0]), scores, torch.tensor([False, True])).sum().backward()
        assert (scores.grad > 0).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_nothing_is_lost_over_a_half_precision_base(self, dtype):
        """In float16 the product of a gradient and a weight of 1e-4 is zero."""
        base, scores = torch.full((3,), 1e-4, dtype=dtype), torch.zeros(3, requires_grad=True)
        effective = masked(base, scores, torch.tensor([True, False, True]))
        assert effective.dtype == dtype
        effective.backward(torch.full((3,), 1e-4, dtype=dtype))
        assert scores.grad.dtype == torch.float32
        torch.testing.assert_close(scores.grad, base.float().square() * 0.25, rtol=1e-6, atol=0)

    def test_scores_narrower_than_the_base(self):
        scores = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
        masked(torch.ones(3), scores, torch.ones(3, dtype=torch.bool)).sum().backward()
        assert scores.grad.dtype == torch.bfloat16

    def test_of_two_masks_each_has_its_own(self):
        base, first, second = torch.randn(9), torch.randn(9, requires_grad=True), torch.randn(9, requires_grad=True)
        one, two = torch.rand(9) < 0.5, torch.rand(9) < 0.5
        effective = masked(masked(base, first, one), second, two)
        assert torch.equal(effective, base * (one & two))
        effective.sum().backward()
        slopes = [p * (1 - p) for p in (first.detach().sigmoid(), second.detach().sigmoid())]
        torch.testing.assert_close(first.grad, base * two * slopes[0])
        torch.testing.assert_close(second.grad, base * one * slopes[1])

    def test_what_is_not_finite_stays_out_where_it_is_off(self):
        base = torch.tensor([torch.nan, torch.inf, 1.0])
        assert masked(base, torch.zeros(3), torch.tensor([False, False, True])).tolist() == [0.0, 0.0, 1.0]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_autograd_keeps_nothing_but_what_is_there(self, dtype):
        base, scores = torch.randn(8, 8).to(dtype), torch.randn(8, 8, requires_grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            masked(base, scores, torch.bernoulli(scores.detach().sigmoid()).bool())
        assert {t.data_ptr() for t in saved} <= {base.data_ptr(), scores.data_ptr()}


class TestSupermask:
    def test_drawn_in_training_and_thresholded_outside_of_it(self):
        base = torch.ones(4000)
        mask = Supermask(base)
        with torch.no_grad():
            mask.weight.copy_(torch.tensor([-1.0, 0.5]).repeat_interleave(2000))
        rates = torch.stack([mask(base) for _ in range(50)]).mean(0).view(2, -1).mean(1)
        # 100,000 draws each: five standard deviations are below 0.008.
        torch.testing.assert_close(rates, torch.tensor([-1.0, 0.5]).sigmoid(), rtol=0, atol=0.008)
        assert not torch.equal(mask(base), mask(base))
        mask.eval()
        assert mask(base).view(2, -1).mean(1).tolist() == [0.0, 1.0]
        assert torch.equal(mask.merged_value(base), mask(base))
        mask.train()
        assert torch.equal(mask.merged_value(base), mask.eval()(base))

    def test_a_score_of_zero_is_off(self):
        assert kept(torch.tensor([-0.0, 0.0, 1e-30])).tolist() == [False, False, True]

    def test_a_seed_repeats_the_draws(self):
        mask = Supermask(torch.ones(100), score=0.1)
        torch.manual_seed(3)
        first = [mask(torch.ones(100)) for _ in range(2)]
        torch.manual_seed(3)
        assert all(torch.equal(mask(torch.ones(100)), draw) for draw in first)

    def test_nothing_is_rescaled(self):
        base = torch.randn(50)
        effective = Supermask(base, sparsity=0.5, score=1.0)(base)
        assert set(effective.tolist()) <= {0.0, *base.tolist()}

    @pytest.mark.parametrize(
        "block", [None, ParameterSlice(1, ((2, 4),)), ParameterSlice(0, ((0, 1), (3, 5)))], ids=str
    )
    def test_a_part_of_a_parameter(self, block):
        base = torch.randn(5, 6)
        mask = Supermask(base, sparsity=0.5, block=block).eval()
        part = torch.ones_like(base, dtype=torch.bool)
        if block is not None:
            part = block.put(torch.zeros_like(base), torch.ones(block.shape_in(base.shape))).bool()
        assert mask.weight.shape == mask.part_shape == (block.shape_in(base.shape) if block else base.shape)
        effective = mask(base)
        assert torch.equal(effective[~part], base[~part])
        off = (effective == 0) & part
        assert int(off.sum()) == mask.weight.numel() // 2
        assert base[off].abs().max() < base[part & ~off].abs().min()
        effective.sum().backward()
        assert (mask.weight.grad != 0).all()

    @pytest.mark.parametrize(
        "block", [None, ParameterSlice(1, ((2, 4),)), ParameterSlice(0, ((0, 1), (3, 5)))], ids=str
    )
    def test_bits_stand_for_the_scores(self, block):
        base = torch.randn(5, 6)
        scores = Supermask(base, sparsity=0.4, block=block).eval()
        bits = Supermask(base, sparsity=0.4, block=block, trained=False)
        assert list(bits.parameters()) == []
        assert list(bits.state_dict()) == ["keep"]
        assert list(scores.state_dict()) == ["weight"]
        assert torch.equal(bits.keep, pack_bits(scores.mask()))
        assert bits.keep.numel() == -(-scores.weight.numel() // 8)
        for mode in (True, False):
            assert torch.equal(bits.train(mode)(base), scores(base))
        assert torch.equal(bits.mask(), scores.mask())

    @pytest.mark.parametrize("trained", [True, False])
    def test_copies_are_equal_and_apart(self, trained):
        base = torch.randn(6, 5)
        mask = Supermask(base, sparsity=0.3, trained=trained).eval()
        expected = mask(base).detach().clone()
        for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
            assert torch.equal(other(base), expected)
            with torch.no_grad():
                (other.weight if trained else other.keep).zero_()
            assert torch.equal(mask(base), expected)
            assert not other(base).any()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_dtype_of_the_base_is_that_of_the_result(self, dtype):
        base = torch.randn(4, 4).to(dtype)
        for mask in (
            Supermask(base),
            Supermask(base, trained=False),
            Supermask(base, block=ParameterSlice(0, ((1, 2),))),
        ):
            assert mask(base).dtype == dtype
        assert Supermask(base).weight.dtype == torch.float32
        assert Supermask(base, dtype=torch.float64).weight.dtype == torch.float64

    @pytest.mark.parametrize("axis", [0, 1])
    def test_a_part_in_one_piece_is_not_copied_for_the_backward_pass(self, axis):
        base = torch.randn(6, 6)
        mask = Supermask(base, block=ParameterSlice(axis, ((2, 4),)))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            mask(base)
        assert {t.untyped_storage().data_ptr() for t in saved} == {base.data_ptr(), mask.weight.data_ptr()}

    def test_on_meta_there_is_nothing_to_rank(self):
        base = torch.empty(4, 4, device="meta")
        assert Supermask(base, sparsity=0.5).weight.is_meta
        assert Supermask(base, sparsity=0.5, trained=False).keep.shape == (2,)
