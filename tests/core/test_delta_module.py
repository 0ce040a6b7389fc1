"""One delta: what is a parameter of it, and what its values are."""

import copy
import pickle

import pytest
import torch

from peft_lntune.core.delta_module import Delta
from peft_lntune.errors import UnsupportedError

SHAPES = [(5,), (16,), (3, 4), (2, 3, 4)]


def half(shape):
    return torch.arange(torch.Size(shape).numel()).view(shape) % 2 == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestDelta:
    def test_a_new_one_is_zero(self, shape):
        base = torch.randn(shape).bfloat16()
        for delta in (Delta(shape, torch.float32), Delta.masked(half(shape), torch.float32)):
            assert torch.equal(delta(base), base.float())
            assert not delta.dense().any()
            assert delta.dense().shape == shape

    def test_only_tuned_entries_are_parameters(self, shape):
        dense, masked = Delta(shape, torch.float32), Delta.masked(half(shape), torch.float32)
        assert dense.weight.shape == shape
        assert masked.weight.shape == (half(shape).sum(),)
        assert [name for name, _ in masked.named_parameters()] == ["weight"]
        assert list(dense.state_dict()) == ["weight"]
        assert list(masked.state_dict()) == ["weight", "mask"]
        assert dense.tuned().all()
        assert torch.equal(masked.tuned(), half(shape))

    def test_fill_and_dense_are_inverse_on_tuned_entries(self, shape):
        values = torch.randn(shape)
        for delta, mask in (
            (Delta(shape, torch.float32), torch.ones(shape)),
            (Delta.masked(half(shape), torch.float32), half(shape)),
        ):
            weight = delta.weight
            delta.fill(values)
            assert delta.weight is weight
            assert torch.equal(delta.dense(), values * mask)
            assert torch.equal(delta(torch.ones(shape)), 1 + values * mask)

    def test_a_mask_that_is_loaded_replaces_positions_kept_from_the_old(self, shape):
        source = Delta.masked(half(shape), torch.float32)
        target = Delta.masked(half(shape).reshape(-1).roll(1).view(shape), torch.float32)
        source.fill(torch.randn(shape))
        _ = target.index
        target.load_state_dict(source.state_dict())
        assert torch.equal(target.dense(), source.dense())

    def test_copies_are_equal_and_apart(self, shape):
        delta = Delta.masked(half(shape), torch.float32)
        delta.fill(torch.randn(shape))
        before = delta.dense().clone()
        for twin in (copy.deepcopy(delta), pickle.loads(pickle.dumps(delta))):
            assert torch.equal(twin.dense(), before)
            twin.fill(torch.zeros(shape))
            assert torch.equal(delta.dense(), before)

    def test_the_representation_says_how_many_are_tuned(self, shape):
        tuned = int(half(shape).sum())
        assert repr(Delta.masked(half(shape), torch.float32)) == f"Delta({shape}, tuned={tuned}, dtype=torch.float32)"

    def test_a_mask_of_all_entries_is_none(self, shape):
        delta = Delta.masked(torch.ones(shape, dtype=torch.bool), torch.float64)
        assert delta.mask is None
        assert delta.weight.shape == shape
        assert delta.weight.dtype == torch.float64

    def test_one_that_waits_for_its_file_says_so(self, shape):
        delta = Delta(shape, torch.float32, count=1)
        for use in (delta.dense, lambda: delta(torch.ones(shape)), lambda: delta.fill(torch.ones(shape))):
            with pytest.raises(UnsupportedError, match=r"never loaded.*from config.unmasked\(\)"):
                use()


def test_a_mask_on_meta_has_its_final_shape():
    delta = Delta((20,), torch.float32, torch.device("meta"), count=7)
    assert delta.weight.shape == (7,)
    assert delta.mask.shape == (3,)
    assert delta.weight.is_meta
    assert delta.mask.is_meta
