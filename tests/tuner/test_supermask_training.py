"""Training supermasks: the frozen weights stay, a seed or a checkpoint repeats it, and what it takes in memory."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from peft_lntune import LNTuningConfig, SupermaskConfig, UnifiedConfig
from peft_lntune.layers.held import supermasks_of
from peft_lntune.tuner.supermasks import keep_masks
from tests import adapted
from tests.tuner.test_training import Sentences

FAMILY = "bert-classifier"


def masked(family: str = FAMILY, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """A model with new supermasks, of low scores: many entries are drawn either way."""
    options = {"initial_score": 0.5, "initial_sparsity": 0.1, **options}
    return get_peft_model(adapted.build(family, dtype), SupermaskConfig(**options)).train()


def tuned(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step(model: nn.Module, optimizer: Any, batch: dict[str, Tensor]) -> float:
    optimizer.zero_grad()
    loss = adapted.said(model, batch).float().square().sum()  # in float16 the gradient of a mean would be zero
    loss.backward()
    optimizer.step()
    return loss.item()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tuned(model).values(), lr=0.1, weight_decay=0.0)


class TestLearning:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
    def test_scores_move_and_weights_do_not(self, family, dtype):
        model, batch = masked(family, dtype), adapted.inputs(family, dtype)
        before = adapted.snapshot(model)
        optimizer = adamw(model)
        for _ in range(3):
            step(model, optimizer, batch)
        after = model.state_dict()
        moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
        assert moved == {name for name in before if ".lntune_supermask." in name}
        assert {after[name].dtype for name in moved} == {torch.float32}
        assert all(torch.equal(value, after[name]) for name, value in before.items() if name not in moved)

    def test_the_gradient_is_that_of_the_formula(self):
        """Through a model: d loss / d score = d loss / d effective * base * p (1 - p), at the mask that was drawn."""
        model, batch = masked(dtype=torch.float64, components=["value"]), adapted.inputs(FAMILY, torch.float64)
        _without_dropout(model)
        torch.manual_seed(3)
        adapted.said(model, batch).square().sum().backward()
        torch.manual_seed(3)
        drawn = {
            name: torch.bernoulli(mask.weight.detach().sigmoid())
            for name, mask in supermasks_of(model, "default").items()
        }
        plain = _without_dropout(adapted.build(FAMILY, torch.float64).train())
        for name, keep in drawn.items():
            weight = plain.get_parameter(f"{name.removeprefix('base_model.model.')}.weight")
            weight.data.mul_(keep)
            weight.requires_grad_(True)
        adapted.said(plain, batch).square().sum().backward()
        base = adapted.build(FAMILY, torch.float64)
        for name, mask in supermasks_of(model, "default").items():
            place = f"{name.removeprefix('base_model.model.')}.weight"
            p = mask.weight.detach().sigmoid()
            expected = plain.get_parameter(place).grad * base.get_parameter(place) * p * (1 - p)
            torch.testing.assert_close(mask.weight.grad, expected)
            assert mask.weight.grad.abs().sum() > 0

    def test_a_task_is_learnt_by_switching_off_alone(self):
        """A fixed random map learns to copy one of its inputs."""
        torch.manual_seed(0)
        model = get_peft_model(
            nn.Sequential(nn.Linear(8, 1, bias=False)).train(), SupermaskConfig(target_modules=["0"])
        )
        layer = model.get_base_model()[0]
        layer.base_layer.weight.data.copy_(torch.tensor([[0.9, -0.5, 0.4, 0.3, -0.6, 0.7, 0.2, -0.8]]))
        x = torch.randn(256, 8)
        target = 0.9 * x[:, :1]
        optimizer = torch.optim.AdamW(tuned(model).values(), lr=0.3, weight_decay=0.0)
        for _ in range(200):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
        assert keep_masks(model)["0.weight"].tolist() == [[True] + [False] * 7]
        assert torch.equal(layer.base_layer.weight[0, :2], torch.tensor([0.9, -0.5]))
        torch.testing.assert_close(model.eval()(x), target)

    def test_as_a_part_beside_norms_both_are_trained(self):
        config = UnifiedConfig(parts=[SupermaskConfig(components=["query"]), LNTuningConfig()], task_type="SEQ_CLS")
        model = get_peft_model(adapted.build(FAMILY), config).train()
        before = adapted.snapshot(model)
        step(model, adamw(model), adapted.inputs(FAMILY))
        after = model.state_dict()
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert any(".lntune_supermask." in name for name in moved)
        assert any(".lntune_bias." in name for name in moved)
        assert all(".lntune_" in name or ".modules_to_save." in name for name in moved)

    # torchao compiles its step.
    @pytest.mark.parametrize("name", ["adafactor", pytest.param("adamw8bit", marks=pytest.mark.full)])
    def test_optimizers_of_less_memory(self, name):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
        model = get_peft_model(net.train(), SupermaskConfig(target_modules=["0"], initial_score=1.0))
        parameters = list(tuned(model).values())
        if name == "adafactor":
            optimizer = hf.Adafactor(parameters, lr=0.1, relative_step=False, scale_parameter=False)
        else:
            low = pytest.importorskip("torchao.optim")
            optimizer = low.AdamW8bit(parameters, lr=0.1, weight_decay=0.0)
        x, y = torch.randn(64, 64), torch.randint(4, (64,))
        losses = []
        for _ in range(25):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
        states = [v for v in optimizer.state[parameters[0]].values() if isinstance(v, Tensor)]
        if name == "adafactor":
            assert sum(v.numel() for v in states) < 3 * 64  # a row and a column, and no square
        else:
            assert any("8bit" in type(v).__name__.lower() for v in states)


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class TestRepeated:
    def test_a_seed_repeats_a_run_and_another_does_not(self):
        def run(seed):
            model, batch = masked(task_type="SEQ_CLS"), adapted.inputs(FAMILY)
            optimizer = adamw(model)
            torch.manual_seed(seed)
            return [step(model, optimizer, batch) for _ in range(3)], adapted.snapshot(model)

        (first, one), (second, two), (other, _) = run(0), run(0), run(1)
        assert first == second
        assert all(torch.equal(value, two[name]) for name, value in one.items())
        assert other != first

    def test_a_run_that_goes_on_is_the_one_that_never_stopped(self, tmp_path):
        """Scores from the file, the state of the optimizer and of the generator: bit for bit."""
        batch = adapted.inputs(FAMILY)
        model = masked(task_type="SEQ_CLS", save_scores=True)
        optimizer = adamw(model)
        torch.manual_seed(7)
        for number in range(6):
            if number == 3:
                model.save_pretrained(tmp_path)
                state, generator = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
            step(model, optimizer, batch)
        again = PeftModel.from_pretrained(adapted.build(FAMILY), tmp_path, is_trainable=True).train()
        assert tuned(again).keys() == tuned(model).keys()
        second = adamw(again)
        second.load_state_dict(state)
        torch.set_rng_state(generator)
        for _ in range(3):
            step(again, second, batch)
        assert all(torch.equal(p, tuned(again)[name]) for name, p in tuned(model).items())

    def test_the_state_dict_in_memory_goes_on_too(self):
        model = masked(save_scores=True)
        adapted.fill(model, "default")
        state = get_peft_model_state_dict(model)
        other = masked(save_scores=True)
        set_peft_model_state_dict(other, state)
        assert all(torch.equal(p, tuned(other)[name]) for name, p in tuned(model).items())


def trainer_of(directory: Path, steps: int, every: int, **options: Any) -> hf.Trainer:
    model = masked(task_type="SEQ_CLS", **options)
    arguments = hf.TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
        dataloader_pin_memory=False,
        save_strategy="steps",
        save_steps=every,
    )
    return hf.Trainer(model, arguments, train_dataset=Sentences())


class TestTrainer:
    @pytest.mark.end_to_end
    def test_resumed_training_equals_uninterrupted_bit_for_bit(self, tmp_path):
        whole = trainer_of(tmp_path / "whole", 5, 5, save_scores=True)
        whole.train()
        trainer_of(tmp_path / "parts", 2, 2, save_scores=True).train()
        resumed = trainer_of(tmp_path / "parts", 5, 5, save_scores=True)
        resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
        expected, found = tuned(whole.model), tuned(resumed.model)
        assert found.keys() == expected.keys()
        assert sum(".lntune_supermask." in name for name in found) == 12
        assert all(torch.equal(found[name], p) for name, p in expected.items())

    def test_from_bits_it_goes_on_with_a_warning(self, tmp_path):
        trainer_of(tmp_path, 1, 1).train()
        resumed = trainer_of(tmp_path, 2, 2)
        with pytest.warns(UserWarning, match="all their scores start anew"):
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        again = PeftModel.from_pretrained(adapted.build(FAMILY), tmp_path / "checkpoint-2").eval()
        batch = adapted.inputs(FAMILY)
        assert torch.equal(adapted.output(again, batch), adapted.output(resumed.model.eval(), batch))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of a reentrant first block
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # transformers 5 renames it
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_checkpointing_draws_the_same_masks_again(family, reentrant):
    runs = []
    for checkpointed in (False, True):
        model, batch = masked(family), adapted.inputs(family)
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        torch.manual_seed(5)
        loss = adapted.said(model, batch).square().sum()
        loss.backward()
        runs.append((loss.item(), {name: p.grad for name, p in tuned(model).items()}))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[1][1][name], gradient) for name, gradient in runs[0][1].items())
    assert all(gradient.abs().sum() > 0 for gradient in runs[0][1].values())


def test_autocast():
    model, batch = masked("llama"), adapted.inputs("llama")
    optimizer = adamw(model)
    with torch.autocast("cpu", torch.bfloat16):
        before = {name: p.detach().clone() for name, p in tuned(model).items()}
        for _ in range(2):
            step(model, optimizer, batch)
        assert all((p != before[name]).all() for name, p in tuned(model).items())
        model.eval()
        expected = adapted.output(model, batch)
        model.merge_adapter()
        assert torch.equal(adapted.output(model, batch), expected)


class Net(nn.Module):
    """Two linear maps, so that the second has an input that needs a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.two(self.one(x))}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["net", *(pytest.param(f, marks=pytest.mark.full) for f in ("bert", "gpt2"))])
def test_compiled_it_is_one_graph(family, training):
    if family == "net":
        model = get_peft_model(Net(), SupermaskConfig(target_modules=["one", "two"]))
        batch = {"x": torch.randn(3, 64)}
    else:
        model, batch = masked(family, components=["query", "ffn_up"]), adapted.inputs(family)
    _without_dropout(model).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for seed in (0, 5):  # a graph follows its scores
        adapted.fill(model, "default", seed=seed)
        torch.manual_seed(seed)
        expected = adapted.said(model, batch)
        torch.manual_seed(seed)
        y = adapted.said(compiled, batch)
        assert torch.equal(y, expected)
        gradients = []
        for found in (expected, y):
            model.zero_grad()
            found.float().square().sum().backward()
            gradients.append([p.grad for p in tuned(model).values()])
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    with torch.no_grad():
        torch.manual_seed(1)
        expected = adapted.said(model, batch)
        torch.manual_seed(1)
        assert torch.equal(adapted.said(compiled, batch), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_autograd_keeps(dtype):
    """Parameters and activations: the backward pass makes the masked weight again."""
    model = get_peft_model(Net().to(dtype).train(), SupermaskConfig(target_modules=["one", "two"]))
    x = torch.randn(3, 64, dtype=dtype)
    saved: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        y = adapted.said(model, {"x": x})
    for parameter in model.parameters():
        saved.pop(parameter.data_ptr(), None)
    matrices = [t for t in saved.values() if t.numel() == 64 * 64]
    assert matrices == []
    assert all(t.numel() <= 3 * 64 for t in saved.values() if t.numel() != 64 * 64)
    y.float().sum().backward()
    # For each entry a score and its gradient, in float32; nothing for the weights.
    assert {p.grad.dtype for p in tuned(model).values()} == {torch.float32}
    assert all(p.grad is None for name, p in model.named_parameters() if name not in tuned(model))
