"""The formula, and bits packed and unpacked, for shapes nobody thought of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_lntune.core.delta import delta_dtype, effective, pack_bits, scatter, unpack_bits
from tests.oracles import bytes_of_bits

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(torch.Size)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**31)
quick = settings(max_examples=40, deadline=None)  # a shared machine has slow moments


def random_mask(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


@quick
@given(SHAPES, SEEDS)
def test_bits_come_back_as_they_were(shape, seed):
    mask = random_mask(shape, seed)
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == bytes_of_bits(mask.flatten().tolist())
    assert torch.equal(unpack_bits(packed, shape), mask)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 255])
@pytest.mark.parametrize("value", [True, False])
def test_bits_at_the_edges_of_a_byte(length, value):
    mask = torch.full((length,), value)
    assert pack_bits(mask).numel() == -(-length // 8)
    assert torch.equal(unpack_bits(pack_bits(mask), mask.shape), mask)


@quick
@given(SHAPES, SEEDS, DTYPES)
def test_scatter_puts_each_value_in_its_place(shape, seed, dtype):
    mask = random_mask(shape, seed)
    index = mask.flatten().nonzero().flatten()
    values = torch.randn(len(index), generator=torch.Generator().manual_seed(seed)).to(dtype)
    dense = scatter(values, index, shape)
    assert dense.shape == shape
    assert dense.dtype == dtype
    assert torch.equal(dense[mask], values)
    assert not dense[~mask].any()


@quick
@given(SHAPES, SEEDS, DTYPES, st.booleans())
def test_effective_is_base_plus_delta_in_the_wider_dtype(shape, seed, dtype, masked):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).to(dtype)
    wide = delta_dtype(dtype)
    mask = random_mask(shape, seed) if masked else torch.ones(shape, dtype=torch.bool)
    values = torch.randn(int(mask.sum()), generator=generator).to(wide)
    index = mask.flatten().nonzero().flatten()
    before = base.clone()
    found = effective(base, values, index) if masked else effective(base, values.view(shape))
    assert found.dtype == wide
    assert found.shape == shape
    assert torch.equal(found, base.to(wide) + scatter(values, index, shape))
    assert torch.equal(base, before)


@quick
@given(SHAPES, SEEDS, DTYPES)
def test_gradients_of_a_masked_delta_are_those_of_the_dense_one(shape, seed, dtype):
    base, mask = torch.ones(shape, dtype=dtype), random_mask(shape, seed)
    index = mask.flatten().nonzero().flatten()
    dense = torch.zeros(shape, requires_grad=True)
    chosen = torch.zeros(len(index), requires_grad=True)
    ahead = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    effective(base, dense).backward(ahead.to(delta_dtype(dtype)))
    effective(base, chosen, index).backward(ahead.to(delta_dtype(dtype)))
    assert torch.equal(chosen.grad, dense.grad[mask])


@pytest.mark.parametrize(
    ("base", "override", "expected"),
    [
        (torch.float16, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype_of_a_delta(base, override, expected):
    assert delta_dtype(base, override) == expected
