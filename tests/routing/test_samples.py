"""Where a layer has its samples: told by what changes, whatever the lengths are."""

import pytest
import torch
from torch import nn

from peft_lntune.routing.samples import measure_samples
from peft_lntune.routing.sharing_copy import sharing_copy


class Model(nn.Module):
    """An embedding or a float input, a first norm, something between, a second norm."""

    def __init__(self, between, embedded=False):
        super().__init__()
        self.embedding = nn.Embedding(9, 4) if embedded else nn.Identity()
        self.first, self.second, self.between = nn.LayerNorm(4), nn.LayerNorm(4), between

    def forward(self, x, scale=1.0):
        return self.second(self.between(self.first(self.embedding(x) * scale)))


def mixing(axis):
    """Positions along an axis take part in one another, as in attention."""
    return lambda x: x + x.cumsum(axis)


ARRANGED = {
    "rows": (mixing(1), False),
    "blocks": (lambda x: mixing(1)(x).reshape(-1, 4), True),
    "heads": (lambda x: mixing(1)(x).reshape(-1, 2, 2).repeat(1, 1, 2).reshape(-1, 4), True),
}
ASTRAY = {
    "time first": mixing(0),
    "time first, backwards": lambda x: x + x.flip(0).cumsum(0).flip(0),
    "transposed": lambda x: x.transpose(0, 1),
    "flat, time first": lambda x: x.transpose(0, 1).reshape(-1, 4),
    "sorted": lambda x: x.flip(0),
    "a mean over samples": lambda x: x + 1e-3 * x.mean(0, keepdim=True),
}


@pytest.mark.parametrize("embedded", [True, False], ids=["ids", "floats"])
@pytest.mark.parametrize("length", [1, 3, 5])
class TestFacts:
    def facts(self, between, embedded, length):
        torch.manual_seed(0)
        x = torch.ones(3, length, dtype=torch.long) if embedded else torch.zeros(3, length, 4)
        model = Model(between, embedded)
        return measure_samples(model, (x,), {}, 3, {"first": model.first, "second": model.second})

    @pytest.mark.parametrize("name", ARRANGED)
    def test_what_is_sorted_by_sample_is_found(self, name, embedded, length):
        """Also in a batch whose rows are all alike."""
        between, several = ARRANGED[name]
        if name == "heads" and length == 1:
            pytest.skip("one row a sample")
        facts = self.facts(between, embedded, length)
        assert not facts["first"].refused
        assert not facts["second"].refused
        assert not facts["first"].blocks
        assert facts["second"].blocks == (several and length > 1)

    @pytest.mark.parametrize("name", ASTRAY)
    def test_what_is_not_is_refused(self, name, embedded, length):
        if length == 1 and name in ("flat, time first",):
            pytest.skip("with one token there is one order")
        facts = self.facts(ASTRAY[name], embedded, length)
        assert not facts["first"].refused
        assert facts["second"].refused


def test_learned_queries_are_told_by_what_follows():
    """Their norm's input is the same for all samples, and each has a row of it."""

    class Queries(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.shared, self.queries = shared, nn.Parameter(torch.randn(3, 4))
            self.first, self.second = nn.LayerNorm(4), nn.LayerNorm(4)

        def forward(self, x):
            if self.shared:  # one set of three for all samples; three samples by chance
                return self.second(x + self.first(self.queries).sum(0))
            return self.second(x + self.first(self.queries.expand(len(x), 3, 4)))

    for shared in (False, True):
        model = Queries(shared)
        facts = measure_samples(model, (torch.randn(3, 3, 4),), {}, 3, dict(model.named_children()))
        assert {bool(fact.refused) for fact in facts.values()} == {shared}


@pytest.mark.parametrize("size", [2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("used", [slice(0, 2), slice(5, 8), slice(10, 12)], ids=str)
def test_a_table_that_all_samples_share_is_refused(used, size):
    """The norm of relative positions, as in DeBERTa; no norm follows, and a short text uses a part of the table."""

    class Relative(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.table = nn.Embedding(9, 4), nn.Embedding(12, 4)
            self.words, self.positions = nn.LayerNorm(4), nn.LayerNorm(4)

        def forward(self, input_ids):
            return {"logits": self.words(self.embedding(input_ids)) + self.positions(self.table.weight)[used].sum(0)}

    model = Relative()
    facts = measure_samples(model, (torch.ones(size, 5, dtype=torch.long),), {}, size, {"p": model.positions})
    assert "does not depend on the samples" in facts["p"].refused
    facts = measure_samples(model, (torch.ones(size, 5, dtype=torch.long),), {}, size, {"w": model.words})
    assert not facts["w"].refused


def test_images_of_other_rows_are_refused():
    """Two images of the first text and none of the second: as many images as texts, by chance."""

    class Pictured(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.tower, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4), nn.LayerNorm(4)

        def forward(self, input_ids, pixel_values):
            x, images = self.embedding(input_ids), self.tower(pixel_values)
            return self.norm(x.masked_scatter((input_ids == 8).unsqueeze(-1), images))

    model, pixels = Pictured(), torch.randn(2, 4)
    watched = {"tower": model.tower, "norm": model.norm}
    own, other = torch.tensor([[8, 1, 2], [8, 1, 2]]), torch.tensor([[8, 8, 2], [1, 1, 2]])
    assert not measure_samples(model, (), {"input_ids": own, "pixel_values": pixels}, 2, watched)["norm"].refused
    assert measure_samples(model, (), {"input_ids": other, "pixel_values": pixels}, 2, watched)["norm"].refused


def test_nothing_is_seen_from_outside():
    model, calls = Model(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)), embedded=True).train(), []
    model.first.register_forward_hook(lambda *_: calls.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, state = torch.randint(9, (3, 3)), torch.get_rng_state()
    kept = x.clone()
    facts = measure_samples(model, (x,), {}, 3, {"first": model.first, "second": model.second})
    assert not facts["second"].refused
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model.between[0].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_cache_is_left_as_it_is():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x, past_key_values):
            past_key_values.append(self.norm(x))
            return past_key_values[-1]

    model, cache = Cached(), [torch.zeros(2, 1, 4)]
    assert not measure_samples(model, (torch.randn(2, 1, 4), cache), {}, 2, {"norm": model.norm})["norm"].refused
    assert len(cache) == 1
    assert not cache[0].any()


def test_a_model_that_cannot_be_run_on_the_side_is_not_measured():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.lock = nn.LayerNorm(4), __import__("threading").Lock()

        def forward(self, x):
            return self.norm(x)

    model = Alone()
    assert measure_samples(model, (torch.randn(2, 4),), {}, 2, {"norm": model.norm}) is None


def test_a_twin_has_the_tensors_and_not_the_hooks():
    model, large = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), {"lock": __import__("threading").Lock()}
    model[0].register_forward_hook(lambda *_: large)
    nn.utils.parametrizations.weight_norm(model[0])
    twin, inside = sharing_copy(model.train())
    assert inside[id(model[0])] is twin[0]
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    assert {id(b) for b in twin.buffers()} == {id(b) for b in model.buffers()}
    assert not twin[0]._forward_hooks
    assert len(model[0]._forward_hooks) == 1
    assert model.training
    assert not twin.training
