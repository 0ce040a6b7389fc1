"""The hashes of cached blocks."""

from transformers.generation.continuous_batching.cache_allocators.cache_allocator import compute_block_hash

from peft_lntune.continuous.prefixes import SaltedTokens


def hashes(tokens, block=4):
    """The chain of hashes of full blocks, as transformers computes it."""
    chain, parent = [], None
    for start in range(0, len(tokens) - block + 1, block):
        parent = compute_block_hash(parent, tokens[start : start + block])
        chain.append(parent)
    return chain


def test_each_adapter_has_hashes_of_its_own():
    tokens = list(range(12))
    chains = [hashes(SaltedTokens(tokens, serial)) for serial in (1, 2, 2**31, 2**31 + 1, 2**40)]
    assert len({each for chain in (hashes(tokens), *chains) for each in chain}) == 3 * 6
    assert hashes(SaltedTokens(tokens, 2)) == chains[1]
    assert hashes(SaltedTokens(tokens, 0)) == hashes(tokens)


def test_a_block_that_is_not_full_keeps_its_length():
    """Where it ended with a serial number, it would be taken for a full one."""
    tokens = SaltedTokens([5, 6, 7, 8, 9], 3)
    assert len(tokens[4:8]) == 1
    assert tokens.__add__([4, 3])[4:8] == [9, 4, 3]
    assert len(tokens.__add__([4, 3, 2])[4:8]) == 4 + 2
