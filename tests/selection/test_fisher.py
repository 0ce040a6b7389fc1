"""Fisher scores: the loop of one backward a sample, in one backward a batch."""

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_lntune.errors import ConfigError, DataError, UnsupportedError
from peft_lntune.norms.per_sample import per_sample
from peft_lntune.selection import FisherState, fisher_scores
from peft_lntune.selection.losses import LOSS_HEADS, causal_lm_loss
from peft_lntune.selection.parameters import find_parameters
from tests.cases import FAMILIES, NORMS, build, build_norm, inputs, norm_inputs
from tests.selection.oracles import loop_scores
from tests.tolerance import ROUNDINGS

ENCODER = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}
# CLIP's loss compares the samples of a batch, ViT has a head of those below, OLMo's norms have no parameters.
LANGUAGE = [name for name in FAMILIES if name not in ("clip", "vit", "olmo")]
# Their norms compute in float32 whatever the dtype of the model.
EXACT = {"bert", "roberta", "xlm-roberta", "distilbert", "electra", "bart", "whisper", "opt", "gpt2", "modernbert"}


def labelled(family, size=4, side="right"):
    """A batch with padding, and labels of which some do not count."""
    batch = inputs(family, size)
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    labels = torch.randint(3, 40, ids.shape)
    labels[0, 2] = -100
    mask = batch.get("attention_mask")
    if mask is not None:
        for row in range(size):
            padded = slice(0, row % 3) if side == "left" else slice(mask.shape[1] - row % 3, None)
            mask[row, padded] = 0
            if labels.shape == mask.shape:
                labels[row, padded] = -100
    return {**batch, "labels": labels}


def assert_close(ours, oracle, tolerance):
    """Scores are equal to a relative tolerance, and those that are zero but for roundings to the roundings.

    A shift of all logits of positions changes no loss, so the gradient of the last bias before them is zero: terms as
    large as other gradients cancel, down to their roundings. A score is a square, and so is its rounding.
    """
    assert ours.keys() == oracle.keys()
    largest = max(score.double().norm() for score in oracle.values())
    for name, score in oracle.items():
        zero = largest * (ROUNDINGS * torch.finfo(score.dtype).eps) ** 2
        error = (ours[name].double() - score.double()).norm()
        assert error <= tolerance * score.double().norm() + zero, f"{name}: {error} of {score.double().norm()}"


def double(family, **options):
    model, batch = build(family).double(), labelled(family, **options)
    return model, {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


@pytest.mark.parametrize("family", LANGUAGE)
def test_every_family_equals_the_loop(family):
    """The loop asks the model itself for its loss, which it computes in float32."""
    model, batch = (build(family), labelled(family)) if family == "mixtral" else double(family)  # no double experts
    expected = loop_scores(model, [batch])
    assert any(score.any() for score in expected.values())
    assert_close(fisher_scores(model, [batch]), expected, 1e-4 if family == "mixtral" else 1e-5)


@pytest.mark.parametrize("family", sorted(EXACT))
def test_equal_to_the_loop_to_the_last_digits(family):
    model, batch = double(family)
    loss = "causal_lm" if family in ("gpt2", "opt") else "token"
    expected = loop_scores(model, [batch], loss=LOSS_HEADS[loss].loss)
    assert_close(fisher_scores(model, [batch], loss=loss), expected, 1e-10)
    assert_close(fisher_scores(model, [batch]), expected, 1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "bart"])
def test_padding_on_either_side(family, side):
    model, batch = double(family, size=5, side=side)
    assert_close(fisher_scores(model, [batch]), loop_scores(model, [batch]), 1e-5)


def encoder(head, **options):
    torch.manual_seed(0)
    return getattr(hf, f"BertFor{head}")(hf.BertConfig(**ENCODER, **options)).double().eval()


def words(size=5):
    torch.manual_seed(1)
    return {"input_ids": torch.randint(3, 40, (size, 7))}


HEAD_CASES = {
    "classification": (
        lambda: encoder("SequenceClassification", num_labels=3),
        lambda n: {"labels": torch.arange(n) % 3},
    ),
    "regression": (
        lambda: encoder("SequenceClassification", num_labels=1),
        lambda n: {"labels": torch.randn(n, dtype=torch.float64)},
    ),
    "multi_label": (
        lambda: encoder("SequenceClassification", num_labels=3, problem_type="multi_label_classification"),
        lambda n: {"labels": torch.randint(2, (n, 3)).double()},
    ),
    "token": (
        lambda: encoder("TokenClassification", num_labels=3),
        lambda n: {"labels": torch.randint(0, 3, (n, 7)).masked_fill(torch.rand(n, 7) < 0.3, -100)},
    ),
    "question_answering": (
        lambda: encoder("QuestionAnswering"),
        lambda n: {"start_positions": torch.arange(n) % 7, "end_positions": torch.arange(n) % 8},
    ),
}


@pytest.mark.parametrize("head", HEAD_CASES)
def test_every_head_has_the_loss_of_the_model(head):
    """The oracle asks the model itself for the loss of a batch of one sample."""
    model, batch = HEAD_CASES[head][0](), {**words(), **HEAD_CASES[head][1](5)}
    assert_close(fisher_scores(model, [batch]), loop_scores(model, [batch]), 1e-10)


def test_a_sum_over_tokens_and_a_loss_of_ones_own():
    model, batch = double("gpt2")

    def summed(outputs, batch):
        return causal_lm_loss(outputs.logits, batch["labels"], reduction="sum")

    expected = loop_scores(model, [batch], loss=summed)
    assert_close(fisher_scores(model, [batch], loss="causal_lm_sum"), expected, 1e-9)
    assert_close(fisher_scores(model, [batch], loss=summed), expected, 1e-9)


@pytest.mark.parametrize("case", NORMS)
def test_every_norm_equals_autograd(case):
    norm = build_norm(case, torch.float64)
    given = norm_inputs(case, torch.float64, batch=4)
    names = [name for name, _ in norm.named_parameters()]
    weight = torch.randn(given[0].shape, dtype=torch.float64)
    model = nn.ModuleDict({"norm": norm})
    expected = {name: [] for name in names}
    for row in range(4):
        norm.zero_grad()
        (norm(*(t[row : row + 1] for t in given)) * weight[row]).sum().backward()
        for name, parameter in norm.named_parameters():
            expected[name].append(parameter.grad.clone())
    norm.requires_grad_(False)
    with per_sample(model, [f"norm.{name}" for name in names]) as hooks:
        hooks.start(4, ())
        (norm(*given) * weight).sum().backward()
        found = hooks.gradients()
    for name in names:
        torch.testing.assert_close(found[f"norm.{name}"], torch.stack(expected[name]), rtol=1e-5, atol=1e-6)


class Shared(nn.Module):
    """One norm called three times, and a linear module whose weight is used outside its call."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.up = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        self.recompute = None

    def block(self, x):
        x = self.norm(x + torch.tanh(self.up(x)))
        return self.norm(x + self.attend(x, x, x, need_weights=False)[0])

    def forward(self, ids, labels=None):
        x = self.norm(self.embed(ids))
        x = self.block(x) if self.recompute is None else checkpoint(self.block, x, use_reentrant=self.recompute)
        logits = x @ self.embed.weight.T
        return (
            {"logits": logits}
            if labels is None
            else {"logits": logits, "loss": LOSS_HEADS["token"].loss({"logits": logits}, {"labels": labels})[0]}
        )


def shared():
    torch.manual_seed(0)
    ids = torch.randint(9, (5, 4))
    return Shared().double(), {"ids": ids, "labels": ids.flip(1)}


@pytest.mark.parametrize("recompute", [None, True, False], ids=["plain", "reentrant", "checkpoint"])
def test_shared_norms_and_gradient_checkpointing(recompute):
    model, batch = shared()
    expected = loop_scores(model, [batch])
    model.recompute = recompute
    assert_close(fisher_scores(model, [batch]), expected, 1e-10)


def test_any_parameter_of_the_model():
    """Linear weights by the outer product; embeddings, shared and functionally used parameters a sample at a time."""
    model, batch = shared()
    names = [name for name, _ in model.named_parameters()]
    assert {"up.weight", "attend.out_proj.weight", "embed.weight", "attend.in_proj_weight"} <= set(names)
    assert_close(fisher_scores(model, [batch], parameters=names), loop_scores(model, [batch], parameters=names), 1e-10)


def test_a_sum_over_tokens_is_known_from_a_later_batch():
    """The first batch has one token per row, over which mean and sum are equal."""

    class Summed(Shared):
        def forward(self, ids, labels=None):
            outputs = super().forward(ids)
            if labels is not None:
                outputs["loss"] = LOSS_HEADS["token_sum"].loss(outputs, {"labels": labels}).sum()
            return outputs

    torch.manual_seed(0)
    model, batch = Summed().double(), shared()[1]
    first = {**batch, "labels": batch["labels"].clone()}
    first["labels"][:, 1:] = -100
    assert_close(fisher_scores(model, [first, batch]), loop_scores(model, [first, batch]), 1e-10)


def test_a_loss_that_differs_in_the_fourth_digit_is_refused():
    """ProphetNet's loss is a mean over two streams of logits, of which it reports one."""
    torch.manual_seed(0)
    sides = {f"num_{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    widths = {"vocab_size": 64, "hidden_size": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = hf.ProphetNetConfig(**sides, **widths, ngram=2, decoder_start_token_id=0, pad_token_id=0)
    model, ids = hf.ProphetNetForConditionalGeneration(config), torch.randint(3, 64, (2, 6))
    with pytest.raises(UnsupportedError, match="equals none"):
        fisher_scores(model, [{"input_ids": ids, "labels": ids}])


def test_a_weight_used_outside_its_module_goes_the_slow_way():
    class Twice(Shared):
        def block(self, x):
            return super().block(x + nn.functional.linear(x, self.up.weight))

    torch.manual_seed(0)
    model, batch = Twice().double(), shared()[1]
    expected = loop_scores(model, [batch], parameters=["up.weight", "up.bias", "norm.weight"])
    found = fisher_scores(model, [batch], parameters=["up.weight", "up.bias", "norm.weight"])
    assert_close(found, expected, 1e-10)


def test_a_shared_norm_costs_one_backward():
    """All its calls are summed a sample; were one lost, the scores would still be right, but slow."""
    model, batch = shared()
    loss = LOSS_HEADS["token"].loss
    model.requires_grad_(False)
    with per_sample(model, ["norm.weight", "up.weight"]) as hooks:
        hooks.start(5, (), whole=True)
        loss(model(batch["ids"]), batch).sum().backward()
        found = hooks.gradients()
    model.requires_grad_(True)
    loss(model(batch["ids"]), batch).sum().backward()
    for name, gradients in found.items():
        torch.testing.assert_close(gradients.sum(0), model.get_parameter(name).grad)


def test_linear_weights_of_an_encoder_cost_one_backward():
    model, batch = encoder("SequenceClassification", num_labels=2), {**words(), "labels": torch.arange(5) % 2}
    names = [name for name, _ in model.named_parameters() if "embeddings" not in name or "Norm" in name]
    expected = loop_scores(model, [batch], parameters=names)
    with per_sample(model, names) as hooks:
        assert hooks.fallback == []
    assert_close(fisher_scores(model, [batch], parameters=names), expected, 1e-9)


@pytest.mark.parametrize(("kind", "each"), [("empirical", 1), ("exact", 3)])
def test_checks_cost_two_backward_passes_in_the_first_batch(kind, each, monkeypatch):
    """One compares the hooks with autograd on two samples, one weights the losses; every pass gives squares."""
    calls, backward = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: calls.append(a) or backward(*a, **k))
    model, batch = encoder("SequenceClassification", num_labels=3), {**words(), "labels": torch.arange(5) % 3}
    for batches in (1, 3):
        calls.clear()
        fisher_scores(model, [batch] * batches, kind=kind, loss="classification")
        assert len(calls) == 2 + each * batches


@pytest.mark.parametrize("family", ["bert", "llama", "gemma"])
def test_a_bfloat16_model_is_summed_in_float32(family):
    model, batch = build(family).bfloat16(), labelled(family)
    scores = fisher_scores(model, [batch, batch])
    assert all(score.dtype == torch.float32 for score in scores.values())
    wide = build(family)
    wide.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    assert_close(scores, loop_scores(wide, [batch]), 0.1)


def test_exact_is_the_expectation_over_classes():
    model, batch = encoder("SequenceClassification", num_labels=3), words()
    expected = {}
    chances = model(**batch).logits.softmax(-1).detach()
    for row in range(5):
        for label in range(3):
            one = {"input_ids": batch["input_ids"][row : row + 1], "labels": torch.tensor([label])}
            for name, score in loop_scores(model, [one]).items():
                expected[name] = expected.get(name, 0) + chances[row, label] * score / 5
    assert_close(fisher_scores(model, [batch], kind="exact", loss="classification"), expected, 1e-7)


@pytest.mark.parametrize("head", ["classification", "multi_label", "regression", "token", "question_answering"])
def test_mc_tends_to_the_expectation(head):
    """Many draws of few samples; for heads with an exact kind, that is the limit."""
    model, batch = HEAD_CASES[head][0](), {**words(2), **HEAD_CASES[head][1](2)}
    many = [{key: value.repeat_interleave(150, 0) for key, value in batch.items()}]
    one = fisher_scores(model, many, kind="mc", seed=0)
    other = fisher_scores(model, many, kind="mc", seed=1)
    assert any((one[name] != other[name]).any() for name in one)
    limit = fisher_scores(model, [batch], kind="exact") if LOSS_HEADS[head].expected else other
    total, wanted = (sum(score.sum() for score in found.values()) for found in (one, limit))
    assert 0.7 < total / wanted < 1.4


def test_mc_draws_belong_to_the_sample_not_to_the_batch():
    """Other batches, padding, and two processes give the scores of one."""
    model = encoder("TokenClassification", num_labels=3)
    batch = {**words(6), "attention_mask": torch.ones(6, 7, dtype=torch.long), **HEAD_CASES["token"][1](6)}
    whole = fisher_scores(model, [batch], kind="mc", seed=3)
    parts = [{key: value[begin : begin + 2] for key, value in batch.items()} for begin in (0, 2, 4)]
    assert_close(fisher_scores(model, parts, kind="mc", seed=3), whole, 1e-9)
    padded = {
        key: nn.functional.pad(value, (0, 2), value=-100 if key == "labels" else 0) for key, value in batch.items()
    }
    assert_close(fisher_scores(model, [padded], kind="mc", seed=3), whole, 1e-9)
    first, second = FisherState(), FisherState(first=2)
    fisher_scores(model, parts[:1], kind="mc", seed=3, state=first)
    fisher_scores(model, parts[1:], kind="mc", seed=3, state=second)
    assert_close((first + second).scores(), whole, 1e-9)
    assert (first + second).samples == 6


def test_an_interrupted_pass_goes_on_where_it_was():
    model, batch = encoder("SequenceClassification", num_labels=3), {**words(6), "labels": torch.arange(6) % 3}
    whole = fisher_scores(model, [batch])

    def torn():
        yield {key: value[:4] for key, value in batch.items()}
        raise KeyboardInterrupt

    state = FisherState()
    with pytest.raises(KeyboardInterrupt):
        fisher_scores(model, torn(), state=state)
    assert state.samples == 4
    assert not any(module._forward_hooks for module in model.modules())
    assert_close(fisher_scores(model, [batch], state=state), whole, 1e-12)  # batches of another size
    assert state.samples == 6
    part = fisher_scores(model, [batch, batch], num_samples=5)
    assert_close(part, fisher_scores(model, [{key: value[:5] for key, value in batch.items()}]), 1e-12)


def test_the_model_is_as_it_was():
    model, batch = encoder("SequenceClassification", num_labels=3), {**words(), "labels": torch.arange(5) % 3}
    model.train()
    model.bert.encoder.eval()
    parameters = dict(model.named_parameters())
    for number, parameter in enumerate(parameters.values()):
        parameter.requires_grad_(number % 2 == 0)
        parameter.grad = torch.full_like(parameter, number) if number % 3 == 0 else None
    modes = {name: module.training for name, module in model.named_modules()}
    before = {
        name: (p.clone(), p.requires_grad, None if p.grad is None else p.grad.clone()) for name, p in parameters.items()
    }
    random = torch.get_rng_state()
    with torch.no_grad():  # a caller's own context does not matter
        for parameters_of in (None, list(parameters)):
            fisher_scores(model, [batch], kind="mc", parameters=parameters_of)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random)
    for name, parameter in model.named_parameters():
        value, flag, gradient = before[name]
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == flag
        assert parameter.grad is None if gradient is None else torch.equal(parameter.grad, gradient)
    assert not any(module._forward_hooks for module in model.modules())


class Mixed(nn.Module):
    """Mixes samples before its norm, in one of the ways that models do."""

    def __init__(self, how):
        super().__init__()
        self.how, self.norm, self.head = how, nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x, labels=None):
        rows = {
            "transposed": lambda: self.norm(x.transpose(0, 1)).transpose(0, 1),
            "packed": lambda: self.norm(x.flatten(0, 1)[1:]).sum(0, keepdim=True).expand(x.shape[0], 1, 6),
            "averaged": lambda: self.norm(x) + self.norm(x).mean(0),
        }[self.how]()
        return {"logits": self.head(rows.mean(1))}


class Denoiser(nn.Module):
    """Finds noise, which it is not given."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)

    def forward(self, sample):
        return {"sample": self.out(self.norm(sample))}


def test_labels_that_the_model_does_not_take_are_for_the_loss_alone():
    class Given(Denoiser):
        def forward(self, sample, labels=None):
            return super().forward(sample)

    def loss(outputs, batch):
        return (outputs["sample"] - batch["labels"]).square().flatten(1).mean(1)

    batch = {"sample": torch.randn(3, 4, 2, 2).double(), "labels": torch.randn(3, 4, 2, 2).double()}
    model, given = Denoiser().double(), Given().double()
    given.load_state_dict(model.state_dict())
    expected = loop_scores(given, [batch], loss=loss)
    assert_close(fisher_scores(given, [batch], loss=loss), expected, 1e-10)
    assert_close(fisher_scores(model, [batch], loss=loss), expected, 1e-10)
    with pytest.raises(TypeError, match="unexpected keyword argument 'smaple'"):
        fisher_scores(Denoiser(), [{**batch, "smaple": batch["sample"]}], loss=loss)


@pytest.mark.parametrize("how", ["transposed", "packed", "averaged"])
def test_a_lost_batch_axis_names_the_module(how):
    batch = {"x": torch.randn(4, 4, 6), "labels": torch.tensor([0, 1, 0, 1])}
    model = Mixed(how)
    with pytest.raises(UnsupportedError, match="norm"):
        fisher_scores(model, [batch], loss="classification")
    assert all(p.requires_grad for p in model.parameters())


def flattened(x):
    """OPT's way: batch and tokens in one axis."""
    return x.flatten(0, 1)


def test_flattened_rows_are_told_apart():
    class Flat(Mixed):
        def forward(self, x, labels=None):
            return {"logits": self.head(self.norm(flattened(x)).view(x.shape).mean(1))}

    torch.manual_seed(0)
    model, batch = Flat("").double(), {"x": torch.randn(4, 3, 6).double(), "labels": torch.tensor([0, 1, 0, 1])}
    expected = loop_scores(model, [batch], loss=LOSS_HEADS["classification"].loss)
    assert_close(fisher_scores(model, [batch], loss="classification"), expected, 1e-10)


def refused():
    model, batch = encoder("SequenceClassification", num_labels=2), {**words(), "labels": torch.arange(5) % 2}
    broken = {**batch, "labels": torch.arange(5) % 2}
    generator = build("gpt2")
    yield "kind", ConfigError, "choose one of", model, [batch], {"kind": "true"}
    yield "loss name", ConfigError, "choose one of", model, [batch], {"loss": "hinge"}
    yield "loss shape", ConfigError, "one value per sample", model, [batch], {"loss": lambda o, b: o.logits.sum()}
    yield "mc with a function", ConfigError, "takes a name", model, [batch], {"loss": len, "kind": "mc"}
    yield "parameter", ConfigError, "no parameter 'bert.nose'", model, [batch], {"parameters": ["bert.nose"]}
    yield "no parameter", ConfigError, "names none", model, [batch], {"parameters": []}
    yield "empty", DataError, "empty", model, [], {}
    yield "no dict", DataError, "dict of tensors", model, [[1]], {}
    yield "no labels", DataError, "no labels", model, [words()], {}
    yield "labels later gone", DataError, "lacks labels", model, [batch, words()], {}
    yield (
        "no own loss",
        UnsupportedError,
        "reports no loss",
        Mixed("averaged"),
        [{"x": torch.ones(2, 3, 6), "labels": torch.ones(2)}],
        {},
    )
    yield "nan", DataError, "sample 0 is nan", model, [broken], {"loss": lambda o, b: o.logits[:, 0] * float("nan")}
    yield "exact of tokens", UnsupportedError, "mc", generator, [labelled("gpt2")], {"kind": "exact"}
    yield "no norm with parameters", ConfigError, "no norm", build("olmo"), [labelled("bert")], {}
    many = encoder("SequenceClassification", num_labels=40)
    yield "exact of many classes", UnsupportedError, "has 40", many, [batch], {"kind": "exact"}


REFUSED = list(refused())


@pytest.mark.parametrize("case", REFUSED, ids=[case[0] for case in REFUSED])
def test_bad_input_is_refused_and_changes_nothing(case):
    _, error, message, model, batches, options = case
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        fisher_scores(model, batches, **options)
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_loss_that_is_not_finite_names_its_sample():
    model, batch = encoder("SequenceClassification", num_labels=2), {**words(), "labels": torch.arange(5) % 2}
    values = torch.tensor([0.0, 0.0, float("inf"), 0.0, 0.0], dtype=torch.float64)

    def loss(outputs, batch):
        return outputs.logits[:, 0] + values[: len(outputs.logits)]

    with pytest.raises(DataError, match="sample 2 is inf"):
        fisher_scores(model, [batch], loss=loss)


def test_scores_are_named_as_in_the_base_model_under_adapters():
    from peft import get_peft_model

    from peft_lntune import LNTuningConfig

    model, batch = encoder("SequenceClassification", num_labels=2), {**words(), "labels": torch.arange(5) % 2}
    expected = fisher_scores(model, [batch])
    peft_model = get_peft_model(model, LNTuningConfig(task_type="SEQ_CLS"))
    assert_close(fisher_scores(peft_model, [batch]), expected, 1e-12)
    assert find_parameters(peft_model).keys() == expected.keys()


SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
RECURRENT = {
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**SMALL, state_size=4)),
    "rwkv": lambda: hf.RwkvForCausalLM(hf.RwkvConfig(**SMALL, attention_hidden_size=16, context_length=16)),
    "xlstm": lambda: hf.xLSTMForCausalLM(
        hf.xLSTMConfig(
            vocab_size=32, hidden_size=16, embedding_dim=16, num_blocks=2, num_heads=2, mlstm_round_up_to_multiple_of=8
        )
    ),
    "recurrent gemma": lambda: hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(
            **{**SMALL, "num_hidden_layers": 3}, num_attention_heads=2, lru_width=16, intermediate_size=32
        )
    ),
}


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_models_are_scored_without_their_caches(family):
    """Which they write in place; what the config says of caches is as before afterwards."""
    torch.manual_seed(0)
    model = RECURRENT[family]().double()
    ids = torch.randint(3, 32, (3, 7))
    batch = {"input_ids": ids, "labels": ids}
    found = fisher_scores(model, [batch])
    assert model.config.use_cache is True
    model.config.use_cache = False
    assert_close(found, loop_scores(model, [batch], parameters=found), 1e-6)  # some norms there compute in float32


def llama():
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_attention_heads=2, intermediate_size=32, pad_token_id=0))


ROWS = [torch.arange(3, 3 + length) for length in (5, 4, 6)]


def flattening(**options):
    return hf.DataCollatorWithFlattening(**options)([{"input_ids": row.tolist()} for row in ROWS])


def joined(**more):
    ids = torch.cat(ROWS).unsqueeze(0)
    return {"input_ids": ids, "labels": ids, **more}


PACKED = {
    "position_ids": flattening,
    "cu_seq_lens_q": lambda: {**flattening(return_flash_attn_kwargs=True), "position_ids": None},
    "seq_idx": lambda: {**flattening(return_seq_idx=True), "position_ids": None},
    "cu_seqlens": lambda: joined(cu_seqlens=torch.tensor([0, 5, 9, 15], dtype=torch.int32)),
    "attention_mask": lambda: joined(attention_mask=torch.cat([torch.full((1, n), n) for n in (1, 2, 3)], 1)),
}


@pytest.mark.parametrize("entry", PACKED)
def test_packed_rows_are_refused(entry):
    """A row of several samples has one gradient, whose square is none of theirs."""
    batch = {key: value for key, value in PACKED[entry]().items() if value is not None}
    state = FisherState()
    with pytest.raises(DataError, match=f"packed rows: {entry} shows"):
        fisher_scores(llama(), [batch], state=state)
    assert state.samples == 0


def test_rows_with_positions_of_their_own_are_not_packed():
    """Padding on either side, whose positions mean nothing; and one sample flattened."""
    model = llama()
    ids, mask = torch.randint(3, 32, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    labels = ids.masked_fill(mask == 0, -100)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    left = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
    right = {key: value.flip(1) for key, value in left.items()}
    right["position_ids"] = torch.tensor([[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]])
    alone = hf.DataCollatorWithFlattening()([{"input_ids": ROWS[0].tolist()}])
    for batch in (left, right, alone):
        assert_close(fisher_scores(model, [batch]), loop_scores(model, [batch]), 1e-4)


class PerHead(nn.Module):
    """A norm over `(samples * tokens * heads, width)`, as gated norms of linear attention are called."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.norm(x.reshape(-1, 4)).view(x.shape)).sum((1, 2))


def test_all_rows_of_a_batch_of_one_belong_to_its_sample():
    torch.manual_seed(0)
    model, x = PerHead(), torch.randn(3, 5, 8)
    batches = [{"x": row.unsqueeze(0)} for row in x]
    expected = loop_scores(model, batches, loss=lambda outputs, batch: outputs)
    assert_close(fisher_scores(model, batches, loss=lambda outputs, batch: outputs), expected, 1e-4)
    assert_close(fisher_scores(model, [{"x": x}], loss=lambda outputs, batch: outputs), expected, 1e-4)


def test_rows_per_head_must_be_sorted_by_sample_in_each_batch():
    class Sometimes(PerHead):
        def forward(self, x):
            rows = x.reshape(-1, 4)
            order = torch.arange(len(rows)).view(-1, 10).T.flatten() if (x > 9).any() else torch.arange(len(rows))
            return self.out(self.norm(rows[order])[order.argsort()].view(x.shape)).sum((1, 2))

    torch.manual_seed(0)
    model, x = Sometimes(), torch.randn(2, 3, 5, 8)
    x[1, 0, 0, 0] = 10
    state = FisherState()
    with pytest.raises(DataError, match="at norm the loss of one sample depends on the rows of another"):
        fisher_scores(model, [{"x": each} for each in x], loss=lambda outputs, batch: outputs, state=state)
    assert state.samples == 3


class Attached(nn.Module):
    """Images take the places of tokens 0, in their order, as in LLaVA."""

    def __init__(self):
        super().__init__()
        self.embed, self.vision, self.norm = nn.Embedding(9, 6), nn.LayerNorm(6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids, images=None, labels=None):
        x = self.embed(ids)
        if (ids == 0).sum() != (0 if images is None else len(images)):
            raise ValueError("images and their tokens do not match.")
        if images is not None:
            x = x.masked_scatter((ids == 0).unsqueeze(-1), self.vision(images))
        outputs = {"logits": self.head(torch.tanh(self.norm(x)))}
        if labels is not None:
            outputs["loss"] = LOSS_HEADS["token"].loss(outputs, {"labels": labels}).mean()
        return outputs


def attached(*counts):
    """A batch with so many images in each row, and the same rows as batches of one."""
    torch.manual_seed(1)
    ids = torch.randint(1, 9, (len(counts), 4))
    for row, count in zip(ids, counts, strict=True):
        row[:count] = 0
    images, labels = torch.randn(sum(counts), 6, dtype=torch.float64), torch.randint(3, ids.shape)
    labels[1:, 3] = -100  # the first row has the most labels
    ones = []
    for row, own in enumerate(images.split(counts)):
        one = {"ids": ids[row : row + 1], "labels": labels[row : row + 1]}
        ones.append({**one, "images": own} if len(own) else one)
    return {"ids": ids, "images": images, "labels": labels}, ones


def attaching():
    torch.manual_seed(0)
    return Attached().double()


def test_one_image_per_sample_and_any_number_in_batches_of_one():
    model, (batch, ones) = attaching(), attached(1, 1, 1, 1)
    expected = loop_scores(model, ones)
    assert expected["vision.weight"].any()
    assert_close(fisher_scores(model, [batch, batch]), expected, 1e-10)
    ones = attached(1, 1, 0, 2)[1]
    expected = {name: torch.zeros_like(score) for name, score in expected.items()}
    for one in ones:
        model.zero_grad()
        model(**one)["loss"].backward()
        for name, score in expected.items():
            gradient = model.get_parameter(name).grad
            score += 0 if gradient is None else gradient.square() / 4
    assert_close(fisher_scores(model, ones), expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_as_many_images_as_samples_but_unevenly_are_refused_in_any_batch(dtype):
    state = FisherState()
    batches = [
        {name: value.to(dtype) if value.is_floating_point() else value for name, value in attached(*counts)[0].items()}
        for counts in ((1, 1, 1, 1), (1, 1, 0, 2))
    ]
    with pytest.raises(DataError, match="at vision the loss of one sample depends on the rows of another"):
        fisher_scores(attaching().to(dtype), batches, state=state)
    assert state.samples == 4
    with pytest.raises(DataError, match="at vision"):
        fisher_scores(attaching().to(dtype), batches[1:])


@pytest.mark.parametrize("counts", [(2, 2), (1, 2, 1, 1), (0, 0, 3)], ids=str)
def test_images_that_cannot_be_divided_are_refused_by_name(counts):
    batch = attached(*counts)[0]
    if len(batch["images"]) == len(counts):
        match = r"some of the samples of a batch \(ids .* images and their tokens do not match"
    else:
        match = rf"images of shape \({sum(counts)}, 6\) cannot be divided into the {len(counts)} samples"
    for options in ({}, {"num_samples": 1}, {"loss": "token", "parameters": ["embed.weight"]}):
        with pytest.raises(DataError, match=match):
            fisher_scores(attaching(), [batch], **options)


def test_positions_in_planes_are_divided_along_their_second_axis():
    """Of three samples too, where the planes have the length of a batch axis."""

    class Placed(Shared):
        def forward(self, ids, position_ids, labels=None):
            return super().forward((ids + position_ids.sum(0)) % 9, labels)

    torch.manual_seed(0)
    model, batch = Placed().double(), {name: value[:3] for name, value in shared()[1].items()}
    batch["position_ids"] = torch.arange(4).expand(3, 3, 4) * torch.tensor([1, 3, 2]).view(1, 3, 1)
    ones = [
        {name: value[:, row : row + 1] if value.dim() == 3 else value[row : row + 1] for name, value in batch.items()}
        for row in range(3)
    ]
    sums = {}
    for one in ones:
        plane = {"ids": (one["ids"] + one["position_ids"].sum(0)) % 9, "labels": one["labels"]}
        plain = Shared().double()
        plain.load_state_dict(model.state_dict())
        for name, score in loop_scores(plain, [plane]).items():
            sums[name] = sums.get(name, 0) + score / 3
    assert_close(fisher_scores(model, [batch]), sums, 1e-10)
    assert_close(
        fisher_scores(
            model,
            [batch, batch],
            num_samples=5,
            state=FisherState(samples=3, squares={name: 3 * score for name, score in sums.items()}),
        ),
        fisher_scores(
            model, [batch, {name: value[:, :2] if value.dim() == 3 else value[:2] for name, value in batch.items()}]
        ),
        1e-10,
    )
