"""Heads in `modules_to_save` follow their rows, those of several layers too."""

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from torch import nn

from benchmarks.harness.counting import count_operations
from peft_lntune import AdapterBank, LNTuningConfig
from peft_lntune.errors import RoutingError, UnsupportedError
from peft_lntune.routing.heads import layers_of
from tests import adapted
from tests.adapted import adapt, build, fill, inputs
from tests.bank.banked import CLOSE, NAMES, routed
from tests.oracles import alone, each_alone

SIZES = {**adapted._SIZES, "num_labels": 3}
MADE = {
    "distilbert": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=2, vocab_size=40, num_labels=3)
    ),
    "tokens": lambda: hf.BertForTokenClassification(hf.BertConfig(**SIZES)),
}


def made(kind):
    if kind not in MADE:
        return build(kind)
    torch.manual_seed(0)
    return MADE[kind]().eval().requires_grad_(False)


def with_heads(kind, heads, *names):
    model = adapt(made(kind), *names, modules_to_save=heads)
    bank = AdapterBank(model)
    bank.add_many({name: (model, name) for name in names})
    bank.attach()
    return model, bank


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("bert-classifier", ["classifier"]),
        ("bert-classifier", ["pooler", "classifier"]),
        ("llama-classifier", ["score"]),
        ("roberta-classifier", ["classifier"]),
        ("roberta-classifier", ["out_proj"]),
        ("electra-classifier", ["classifier"]),
        ("distilbert", ["pre_classifier", "classifier"]),
        ("tokens", ["classifier"]),
    ],
    ids=str,
)
def test_a_head_follows_its_row(kind, heads):
    model, bank = with_heads(kind, heads, "a", "b")
    batch = inputs("bert")
    expected = each_alone(model, batch, NAMES)
    torch.testing.assert_close(routed(bank, model, batch, NAMES), expected, **CLOSE)
    for name in ("a", "__base__"):
        torch.testing.assert_close(routed(bank, model, batch, name), alone(model, batch, name), **CLOSE)
    bank.detach()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_head_with_a_norm_in_it():
    """The norm has a delta like all others, and a row whose adapter has no head of its own tunes it there too."""
    model, batch = adapt(build("bert"), "plain"), inputs("bert")
    model.add_adapter("headed", LNTuningConfig(modules_to_save=["transform"]))
    fill(model, "headed", seed=5)
    bank = AdapterBank(model)
    bank.add_many({name: (model, name) for name in ("plain", "headed")})
    bank.attach()
    names = ["headed", "plain", "__base__"]
    torch.testing.assert_close(routed(bank, model, batch, names), each_alone(model, batch, names), **CLOSE)
    assert list(bank.heads("headed")["cls.predictions.transform"]) == ["dense.weight", "dense.bias"]
    assert "cls.predictions.transform.LayerNorm.weight" in bank.deltas("headed")


def test_an_adapter_without_a_head_uses_that_of_the_base():
    model, batch = adapt(build("bert-classifier"), "headless"), inputs("bert-classifier")
    model.add_adapter("headed", LNTuningConfig(modules_to_save=["classifier"]))
    fill(model, "headed", seed=4)
    bank = AdapterBank(model)
    bank.attach()
    bank.add("headless", (model, "headless"))
    bank.add("headed", (model, "headed"))
    names = ["headed", "headless", "__base__"]
    torch.testing.assert_close(routed(bank, model, batch, names), each_alone(model, batch, names), **CLOSE)
    # Its place is used by one without a head.
    bank.remove("headed")
    bank.add("other", (model, "headless"))
    names[0] = "other"
    expected = each_alone(model, batch, ["headless", "headless", "__base__"])
    torch.testing.assert_close(routed(bank, model, batch, names), expected, **CLOSE)
    assert bank.heads("other") == {}


def test_a_head_of_the_base_that_changes_is_followed():
    model, bank = with_heads("bert-classifier", ["classifier"], "a", "b")
    batch = inputs("bert-classifier")
    routed(bank, model, batch, NAMES)
    with torch.no_grad():
        model.get_base_model().classifier.original_module.weight.add_(1)
    torch.testing.assert_close(routed(bank, model, batch, NAMES), each_alone(model, batch, NAMES), **CLOSE)


def test_hooks_on_a_head_and_in_it_run_once():
    model, bank = with_heads("roberta-classifier", ["classifier"], "a", "b")
    seen, head = [], model.get_base_model().classifier.original_module
    for module in (head, head.dense):
        module.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    routed(bank, model, inputs("bert"), NAMES)
    assert seen == ["Linear", "RobertaClassificationHead"]


def test_a_head_costs_a_few_operations_a_layer_however_many_adapters():
    model, bank = with_heads("roberta-classifier", ["classifier"], "a", "b")
    plain, batch = build("roberta-classifier"), inputs("bert")
    bodies = AdapterBank(plain)
    bodies.attach()
    body = count_operations(lambda: routed(bodies, plain, batch, ["__base__"] * 3))
    counts = {count_operations(lambda names=names: routed(bank, model, batch, names)) for names in (NAMES, ["a"] * 3)}
    # The stack of base rows is made once, in the first of them.
    assert min(counts) <= body + 2 * 12


class TestOtherShapes:
    @pytest.fixture
    def served(self):
        five = hf.BertForSequenceClassification(hf.BertConfig(**{**SIZES, "num_labels": 5})).eval()
        five.bert.load_state_dict(build("bert-classifier").bert.state_dict())
        model = adapt(build("bert-classifier"), "three", modules_to_save=["classifier"])
        other = adapt(five, "five", modules_to_save=["classifier"])
        bank = AdapterBank(model)
        bank.add("three", (model, "three"))
        bank.add("five", (other, "five"))
        bank.attach()
        return bank, model, other

    def test_it_says_how_to_go_on_and_that_works(self, served):
        bank, model, other = served
        batch, names = inputs("bert-classifier"), ["five", "three", "five"]
        message = (
            r"adapter 'five' has a classifier of another shape than this model: weight is \(5, 16\) there and "
            r"\(3, 16\) here.* call the body of the model alone, such as model\.base_model.* bank\.heads\('five'\)"
        )
        with pytest.raises(RoutingError, match=message):
            routed(bank, model, batch, names)
        with torch.no_grad(), bank.route(names):
            features = model.get_base_model().base_model(**batch).pooler_output
        head = bank.heads("five")["classifier"]
        logits = nn.functional.linear(features, head["weight"], head["bias"])
        torch.testing.assert_close(logits[[0, 2]], alone(other, batch, "five")[[0, 2]], **CLOSE)

    def test_the_others_are_served(self, served):
        bank, model, _ = served
        batch, names = inputs("bert-classifier"), ["three", "__base__", "three"]
        torch.testing.assert_close(routed(bank, model, batch, names), each_alone(model, batch, names), **CLOSE)
        bank.remove("five")
        bank.add("again", (model, "three"))  # in its place
        names[0] = "again"
        expected = each_alone(model, batch, ["three", "__base__", "three"])
        torch.testing.assert_close(routed(bank, model, batch, names), expected, **CLOSE)


class Odd(nn.Module):
    """A head with a parameter of its own beside a norm."""

    def __init__(self):
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.ones(4)), nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(x) * self.scale


def model_with(head):
    return nn.ModuleDict({"norm": nn.LayerNorm(4), "head": head})


def test_what_cannot_be_taken_apart_is_refused():
    model = get_peft_model(model_with(Odd()), LNTuningConfig(modules_to_save=["head"]))
    bank = AdapterBank(model)
    with pytest.raises(UnsupportedError, match=r"head \(Odd\) is a head with parameters of its own beside a norm"):
        bank.add("x", (model, "default"))
    assert bank.names == []


def test_layers_of_a_head():
    modules = dict(build("roberta-classifier").named_modules())
    assert layers_of(modules, {}, "classifier") == ["classifier.dense", "classifier.out_proj"]
