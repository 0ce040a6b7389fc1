"""Joining prefixes, widening masks, and the network that is folded away."""

import pytest
import torch

from peft_lntune.core.prefix import Prefix, join, widen_bias, widen_mask

B, H, T, S, HD, P = 2, 3, 4, 5, 6, 2


def columns(*shape):
    return torch.randn(*shape, P, H, HD)


class TestJoin:
    def test_one_prefix_for_all_samples_stands_on_the_left(self):
        key, value = torch.randn(B, H, S, HD), torch.randn(B, H, S, HD)
        prefix_key, prefix_value = columns(), columns()
        joined = join(key, value, prefix_key, prefix_value)
        for wide, own, prefix in zip(joined, (key, value), (prefix_key, prefix_value), strict=True):
            assert wide.shape == (B, H, P + S, HD)
            assert torch.equal(wide[:, :, P:], own)
            for b in range(B):
                for h in range(H):
                    assert torch.equal(wide[b, h, :P], prefix[:, h])

    def test_a_prefix_for_each_sample(self):
        key, value, prefix = torch.randn(B, H, S, HD), torch.randn(B, H, S, HD), columns(B)
        wide, _ = join(key, value, prefix, prefix)
        for b in range(B):
            assert torch.equal(wide[b : b + 1], join(key[b : b + 1], value[b : b + 1], prefix[b], prefix[b])[0])

    def test_one_row_on_either_side_serves_the_whole_batch(self):
        key, prefix = torch.randn(B, H, S, HD), columns(1)
        assert torch.equal(join(key, key, prefix, prefix)[0], join(key, key, prefix[0], prefix[0])[0])
        assert join(key[:1], key[:1], columns(B), columns(B))[0].shape == (B, H, P + S, HD)

    def test_the_dtypes_of_keys_and_values_are_kept(self):
        key, value = torch.randn(B, H, S, HD).bfloat16(), torch.randn(B, H, S, HD).double()
        wide_key, wide_value = join(key, value, columns(), columns())
        assert (wide_key.dtype, wide_value.dtype) == (torch.bfloat16, torch.float64)


class TestMask:
    def test_none_stays_none_where_all_is_seen(self):
        assert widen_mask(None, P, T, S) is None
        assert widen_mask(None, P, 1, S, causal=True) is None  # a single query sees all keys

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
    def test_none_and_causal_is_made_explicit(self, dtype):
        mask = widen_mask(None, P, T, S, causal=True, dtype=dtype)
        assert mask.shape == (1, 1, T, P + S)
        assert mask.dtype == dtype
        for query in range(T):
            for key in range(P + S):
                seen = key < P or key - P <= query
                expected = seen if dtype == torch.bool else (0.0 if seen else -torch.inf)
                assert mask[0, 0, query, key].item() == expected

    def test_which_tokens_are_there(self):
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        wide = widen_mask(mask, P, T, S)
        assert wide.dtype == torch.int64
        assert wide.tolist() == [[1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]

    @pytest.mark.parametrize("batch", [1, B])
    @pytest.mark.parametrize("heads", [1, H])
    @pytest.mark.parametrize("rows", [1, T])
    def test_a_bool_mask(self, batch, heads, rows):
        mask = torch.rand(batch, heads, rows, S) > 0.5
        wide = widen_mask(mask, P, T, S)
        assert wide.dtype == torch.bool
        assert wide[..., :P].all()
        assert torch.equal(wide[..., P:], mask)

    def test_a_floating_mask(self):
        mask = torch.randn(B, 1, T, S, dtype=torch.float16)
        wide = widen_mask(mask, P, T, S)
        assert wide.dtype == torch.float16
        assert not wide[..., :P].any()
        assert torch.equal(wide[..., P:], mask)

    @pytest.mark.parametrize("mask", [torch.randn(B, 1, T, S + 3), torch.ones(B, S + 3)], ids=["4d", "2d"])
    def test_a_mask_for_a_longer_cache_is_cut_to_the_keys_first(self, mask):
        assert torch.equal(widen_mask(mask, P, T, S), widen_mask(mask[..., :S], P, T, S))

    def test_hidden_columns(self):
        keep = torch.tensor([[True, False], [False, False]])
        made = widen_mask(None, P, T, S, keep=keep)
        assert torch.equal(made[..., :P], keep[:, None, None, :].expand(B, 1, T, P))
        assert made[..., P:].all()
        floating = widen_mask(torch.zeros(1, H, T, S), P, T, S, keep=keep)
        assert floating.shape == (B, H, T, P + S)
        assert floating[0, 0, 0, :P].tolist() == [0.0, -torch.inf]
        tokens = widen_mask(torch.ones(B, S, dtype=torch.long), P, T, S, keep=keep)
        assert tokens[:, :P].tolist() == [[1, 0], [0, 0]]

    def test_one_row_of_keep_serves_the_whole_batch(self):
        wide = widen_mask(torch.ones(B, 1, T, S, dtype=torch.bool), P, T, S, keep=torch.tensor([[True, False]]))
        assert wide[:, 0, 0, :P].tolist() == [[True, False]] * B

    def test_hidden_and_causal(self):
        wide = widen_mask(None, P, T, S, causal=True, keep=torch.tensor([[True, False]]))
        assert wide[0, 0, 0].tolist() == [True, False, True, False, False, False, False]

    def test_a_position_bias_gets_zeros(self):
        bias = torch.randn(1, H, T, S + 1)
        wide = widen_bias(bias, P, S)
        assert wide.shape == (1, H, T, P + S)
        assert not wide[..., :P].any()
        assert torch.equal(wide[..., P:], bias[..., :S])


class TestPrefix:
    def test_plain(self):
        prefix = Prefix(P, H * HD, dtype=torch.float64)
        assert [name for name, _ in prefix.named_parameters()] == ["weight"]
        assert torch.equal(prefix(), prefix.weight)
        assert prefix.weight.shape == (2, P, H * HD)
        assert prefix.weight.dtype == torch.float64

    def test_the_network_is_the_formula(self):
        prefix = Prefix(P, H * HD, hidden=7)
        shapes = {name: tuple(parameter.shape) for name, parameter in prefix.named_parameters()}
        assert shapes == {
            "embedding": (P, H * HD),
            "down.weight": (7, H * HD),
            "down.bias": (7,),
            "up.weight": (2 * H * HD, 7),
            "up.bias": (2 * H * HD,),
        }
        for parameter in prefix.parameters():
            torch.nn.init.normal_(parameter)
        folded = prefix()
        for column in range(P):
            hidden = torch.tanh(prefix.down.weight @ prefix.embedding[column] + prefix.down.bias)
            both = prefix.up.weight @ hidden + prefix.up.bias
            torch.testing.assert_close(folded[0, column], both[: H * HD])
            torch.testing.assert_close(folded[1, column], both[H * HD :])

    def test_folding_keeps_the_values_bit_for_bit(self):
        prefix = Prefix(P, H * HD, hidden=7)
        before = prefix()
        prefix.fold_()
        assert list(prefix.state_dict()) == ["weight"]
        assert torch.equal(prefix.weight, before)
        assert prefix.weight.requires_grad
        kept = prefix.weight
        prefix.fold_()
        assert prefix.weight is kept

    def test_a_frozen_one_stays_frozen(self):
        prefix = Prefix(P, H * HD, hidden=7).requires_grad_(False)
        prefix.fold_()
        assert not prefix.weight.requires_grad

    def test_gradients_reach_the_whole_network(self):
        prefix = Prefix(P, H * HD, hidden=7)
        prefix().square().sum().backward()
        assert all(parameter.grad.any() for parameter in prefix.parameters())

    @pytest.mark.parametrize("hidden", [None, 64])
    def test_it_starts_small(self, hidden):
        values = Prefix(50, 64, hidden)()
        assert 0.002 < values.std() < 0.03

    def test_on_meta(self):
        assert Prefix(P, H * HD, hidden=7, device=torch.device("meta"))().is_meta
