"""Packed rows: parameters follow tokens, by `adapter_names`, in a bank and among many tasks."""

import pytest
import torch
import transformers as hf
from torch import nn

from benchmarks.harness.counting import count_operations
from peft_lntune import AdapterBank
from peft_lntune.core.packed_positions import begins_again
from peft_lntune.errors import RoutingError, UnsupportedError
from peft_lntune.norms.affine import with_rows
from peft_lntune.routing.packed import PackedRows, sequences_of, unpacked
from peft_lntune.routing.stacks import Stack
from peft_lntune.routing.tokens import TokenFact, measure_causal, measure_tokens, probes_of
from tests.adapted import adapt, build
from tests.norm_kinds import AddNorm
from tests.test_rows import WAYS, routing

SEQUENCES = [[5, 6, 7], [8, 9, 10, 11], [5, 6], [7, 3, 9]]
NAMES = ["a", "b", "b", "a"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # attention sums in another order behind a mask


def packed(*rows):
    """A batch of rows that hold these sequences; all rows have one length."""
    ids = [[token for place in row for token in SEQUENCES[place]] for row in rows]
    positions = [[place for number in row for place in range(len(SEQUENCES[number]))] for row in rows]
    return {"input_ids": torch.tensor(ids), "position_ids": torch.tensor(positions), "use_cache": False}


def one_by_one(run, names=NAMES):
    """The logits of each sequence in a batch of its own, joined."""
    alone = [run([name], input_ids=torch.tensor([ids])).logits[0] for ids, name in zip(SEQUENCES, names, strict=True)]
    return torch.cat(alone)


@pytest.mark.parametrize("way", WAYS)
class TestPackedRows:
    # Heads before tokens in q_norm, scaled weights, two norms around each sub-layer, norms of queries, LayerNorm.
    @pytest.mark.parametrize(
        "family",
        [
            "qwen3",
            *(pytest.param(name, marks=pytest.mark.end_to_end) for name in ("llama", "gemma2", "olmo2", "cohere")),
            pytest.param("gpt-neox", marks=pytest.mark.end_to_end),
        ],
    )
    def test_each_sequence_as_alone(self, way, family):
        with routing(way, adapt(build(family), "a", "b")) as run, torch.no_grad():
            wanted = one_by_one(run)
            assert not torch.allclose(wanted, one_by_one(run, ["b", "a", "a", "b"]), **CLOSE)
            torch.testing.assert_close(run(NAMES, **packed((0, 1, 2, 3))).logits[0], wanted, **CLOSE)
            two = run(["a", "a", "b", "b"], **packed((0, 3), (1, 2))).logits.flatten(0, 1)  # two rows
            torch.testing.assert_close(two, wanted[[0, 1, 2, 9, 10, 11, *range(3, 9)]], **CLOSE)

    def test_mixing_is_refused_by_name(self, way):
        """With a cache or a mask of its own, transformers lets the sequences of a row see each other."""
        batch = packed((0, 1, 2, 3))
        mask = torch.ones_like(batch["input_ids"])
        with routing(way, adapt(build("llama"), "a", "b")) as run, torch.no_grad():
            for changed in ({"use_cache": True}, {"attention_mask": mask}):
                with pytest.raises(RoutingError, match=r"layernorm: a change of one sequence reaches it"):
                    run(NAMES, **batch | changed)
            run(NAMES, **batch)

    def test_one_name_per_sequence(self, way):
        batch = packed((0, 1, 2, 3))
        with routing(way, adapt(build("llama"), "a", "b")) as run, torch.no_grad():
            with pytest.raises(RoutingError, match=r"hold 4 sequences .* are 1. Give one name per sequence"):
                run(["a"], **batch)
            lengths = torch.tensor([0, 3, 7, 12], dtype=torch.int32)
            with pytest.raises(RoutingError, match="name different sequences"):
                run(NAMES, **batch, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)

    def test_operations_do_not_depend_on_the_names(self, way):
        batch = packed((0, 1, 2, 3))
        with routing(way, adapt(build("llama"), "a", "b")) as run, torch.no_grad():
            run(NAMES, **batch)
            counts = {count_operations(lambda names=names: run(names, **batch)) for names in (["a"] * 4, NAMES)}
        assert len(counts) == 1


def test_a_head_by_row_is_refused_by_name():
    tuned = adapt(build("llama"), "a", "b", modules_to_save=["lm_head"])
    with torch.no_grad(), pytest.raises(RoutingError, match="lm_head cannot be routed in packed rows"):
        tuned(**packed((0, 1, 2, 3)), adapter_names=NAMES)


def test_generate_takes_no_packed_rows():
    tuned = adapt(build("llama"), "a", "b", task_type="CAUSAL_LM")
    bank = AdapterBank(tuned)
    bank.attach()
    batch = packed((0, 1))
    with bank.route(["__base__"]), pytest.raises(RoutingError, match="generate got packed rows"):
        tuned.get_base_model().generate(input_ids=batch["input_ids"], position_ids=batch["position_ids"])


class TestTokens:
    """Where the tokens are in a layer's input."""

    @pytest.mark.parametrize(
        ("shape", "place"),
        [((1, 4, 4, 3), 1), ((1, 4, 4, 3), 2), ((4, 3), 0)],
    )
    def test_lengths_may_be_equal_by_chance(self, shape, place):
        weights = torch.randn(2, 1, 3)
        index = torch.tensor([[0, 1, 1, 0]])
        rows = PackedRows([Stack(("norm.weight",), weights)], index, facts={"norm": TokenFact(place)})
        x = torch.randn(*shape)
        found = rows.rows("norm", x, "norm", -1).weight
        wanted = torch.ones_like(x)
        for token in range(4):
            wanted.select(place, token).copy_(weights[index[0, token], 0].expand(wanted.select(place, token).shape))
        assert torch.equal(found.expand_as(x), wanted)

    def test_without_facts_an_unclear_shape_is_refused(self):
        rows = PackedRows([Stack(("norm.weight",), torch.ones(2, 1, 3))], torch.tensor([[0, 1]]))
        rows.rows("norm", torch.ones(1, 2, 5, 3), "norm", -1)
        for shape in ((1, 2, 2, 3), (1, 5, 3)):
            with pytest.raises(RoutingError, match="is not certain"):
                rows.rows("norm", torch.ones(*shape), "norm", -1)
        with pytest.raises(RoutingError, match="normalizes over channels"):
            rows.rows("norm", torch.ones(1, 3, 2), "norm", 1)

    def test_another_order_of_tokens_is_refused(self):
        class Turned(nn.Module):
            def __init__(self, turn):
                super().__init__()
                self.embedding, self.norm, self.turn = nn.Embedding(3, 4), nn.LayerNorm(4), turn

            def forward(self, input_ids, use_cache):
                x = self.embedding(input_ids)
                return self.norm(x.flip(1) if self.turn else x)

        for turn in (False, True):
            model = Turned(turn)
            assert bool(measure_causal(model, {"norm": model.norm})["norm"].refused) is turn

    def test_a_layer_that_sees_other_tokens_is_refused(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        mixing = nn.Sequential(nn.Linear(4, 4), _Mean(), nn.LayerNorm(4))
        x, probes = torch.randn(1, 3, 4), probes_of(torch.tensor([[0, 0, 1]]))
        assert measure_tokens(model, (x,), {}, probes, {"norm": model[1]}) == {"norm": TokenFact(1)}
        assert "mixes the sequences" in measure_tokens(mixing, (x,), {}, probes, {"norm": mixing[2]})["norm"].refused


class _Mean(nn.Module):
    def forward(self, x):
        return x + x.mean(1, keepdim=True)


def test_a_norm_that_runs_once_per_sample_is_refused():
    """What follows the norm in it is not known, so it has one run per set of parameters."""
    norm, x = AddNorm(8), torch.randn(1, 3, 8)
    with_rows(norm, norm.forward, x, torch.ones(1, 1, 8), torch.zeros(1, 1, 8))
    with pytest.raises(UnsupportedError, match="does more than normalize"):
        with_rows(norm, norm.forward, x, torch.randn(1, 3, 8), torch.zeros(1, 3, 8))


def test_sequences():
    assert sequences_of({"position_ids": torch.tensor([[0, 1], [0, 0]])}).tolist() == [[0, 0], [1, 2]]
    lengths = torch.tensor([0, 2, 3], dtype=torch.int32)
    assert sequences_of({"cu_seq_lens_q": lengths}).tolist() == [[0, 0, 1]]
    assert sequences_of({"cu_seq_lens_q": lengths, "position_ids": torch.tensor([[0, 1, 0]])}).tolist() == [[0, 0, 1]]
    assert sequences_of({"position_ids": torch.zeros(3, 1, 2)}) is None
    planes = torch.tensor([[0, 1, 1, 2, 0, 1]]), torch.tensor([[0, 1, 1, 2, 0, 1]]), torch.tensor([[0, 1, 2, 3, 0, 1]])
    assert sequences_of({"position_ids": torch.stack(planes)}).tolist() == [[0, 0, 0, 0, 1, 1]]
    text = torch.tensor([[0, 0, 1, 2, 3, 4]])
    assert sequences_of({"position_ids": torch.stack([text, *planes])}).tolist() == [[0, 1, 1, 1, 1, 1]]


PADDED = torch.tensor([[0, 0, 1, 1]])


@pytest.mark.parametrize(
    ("positions", "mask", "wanted"),
    [
        ([[0, 0, 1, 2]], None, [1]),  # the first sequence has one token
        ([[0, 0]], None, [1]),
        ([[0, 0, 0, 1]], PADDED, []),  # padding on the left, as generate and the models number it
        ([[1, 1, 0, 1]], PADDED, []),
        ([[0, 1, 2, 3]], PADDED, []),
        ([[[0, 1, 0, 1]]] * 3, None, [2]),
        ([[[0, 1, 1, 2]]] * 2 + [[[0, 1, 2, 3]]], None, []),  # an image stays at one time
        ([[[0, 0, 1, 2]]] + [[[0, 1, 2, 3]]] * 3, None, [1]),  # four planes: the first is that of the text
        ([[4]], None, []),
    ],
)
def test_where_positions_begin_again(positions, mask, wanted):
    assert begins_again(torch.tensor(positions), mask)[0].nonzero().flatten().tolist() == wanted


@pytest.mark.parametrize("way", ["adapter_names", "bank"])
def test_a_first_sequence_of_one_token(way):
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "position_ids": torch.tensor([[0, 0, 1]]), "use_cache": False}
    with routing(way, adapt(build("llama"), "a", "b")) as run, torch.no_grad():
        wanted = [run([n], input_ids=torch.tensor([ids])).logits[0] for n, ids in (("a", [5]), ("b", [6, 7]))]
        torch.testing.assert_close(run(["a", "b"], **batch).logits[0], torch.cat(wanted), **CLOSE)
        with pytest.raises(RoutingError, match="hold 2 sequences"):
            run(["a"], **batch)


def test_unpacking_keeps_gradients_and_order():
    values = torch.arange(6.0)[None, :, None].requires_grad_()
    sequences = torch.tensor([[0, 0, 1, 2, 2, 2]])
    rows = unpacked({"x": values, "loss": torch.ones(())}, sequences, {})
    assert rows["x"][..., 0].tolist() == [[0, 1, 0], [2, 0, 0], [3, 4, 5]]
    assert rows.keys() == {"x"}
    rows["x"].sum().backward()
    assert values.grad.tolist() == torch.ones(1, 6, 1).tolist()


def test_the_collator_of_transformers_gives_such_rows():
    batch = hf.DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": ids} for ids in SEQUENCES])
    assert sequences_of(batch).flatten().bincount().tolist() == [len(ids) for ids in SEQUENCES]
