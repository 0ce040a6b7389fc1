"""What each arm trains."""

import pytest
from torch import nn
from transformers import AutoModelForSequenceClassification

from benchmarks.harness.arms import ARMS, arm, find_arm, own_parameters
from benchmarks.harness.training import counts, rate_factor, saved_bytes

NORMS = 5  # one after the embeddings and two a layer
WIDTH = 16
EXPECTED = {
    "head": 0,
    "plain": NORMS * WIDTH * 2,
    "stock-ln": NORMS * WIDTH * 2,
    "ln": NORMS * WIDTH * 2,
    "ln-weight": NORMS * WIDTH,
    "ln-bias": NORMS * WIDTH,
    "lora": 2 * 2 * 2 * 8 * WIDTH,
    "ln-layer": 2 * WIDTH * 2,
    "query": 2 * (WIDTH * WIDTH + WIDTH),
    "ffn_up": 2 * (WIDTH * 2 * WIDTH + 2 * WIDTH),
    "embedding": (256 + 32 + 2) * WIDTH,
}
COORDINATES = {"layer": 1}  # of the arms that take some
LEFT_OUT = {"ffn_gate"}  # components that BERT has not


def tuned(name: str, base: nn.Module) -> nn.Module:
    chosen = find_arm(name)
    return chosen.tune(base, **{taken: COORDINATES[taken] for taken in chosen.takes})


@pytest.mark.parametrize("name", EXPECTED)
def test_own_entries(name: str, tiny_bert: str) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    model = tuned(name, base)
    found = counts(model)
    assert found["num_method_params"] == EXPECTED[name]
    assert found["num_trainable_params"] - found["num_method_params"] == WIDTH * WIDTH + WIDTH + 2 * WIDTH + 2
    assert saved_bytes(model) > saved_bytes(model, with_head=False) >= 4 * EXPECTED[name]


@pytest.mark.parametrize("name", sorted(ARMS.keys() - LEFT_OUT))
def test_every_arm_trains_the_head(name: str, tiny_bert: str) -> None:
    model = tuned(name, AutoModelForSequenceClassification.from_pretrained(tiny_bert))
    own = own_parameters(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad} - own.keys()
    assert {part for name in trained for part in name.split(".")} >= {"classifier", "pooler"}


def test_unknown_and_repeated_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no arm 'nl'; the arms are .*'ln'"):
        find_arm("nl")
    with pytest.raises(ValueError, match="an arm ln already"):
        arm("ln")(lambda model: model)


def test_the_rate_warms_up_and_decays() -> None:
    factors = [rate_factor(step, 100) for step in range(100)]
    assert factors.index(max(factors)) == 5
    assert factors[0] == pytest.approx(1 / 6)
    assert factors[-1] == pytest.approx(1 / 94)
