"""Training: every entry moves over a half precision base, and what others build around a model works."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import LNTuningConfig as StockConfig
from peft import PeftModel, get_peft_model
from torch.utils.data import Dataset

from peft_lntune import find_norms
from tests import cases
from tests.adapted import HALVES, adapt, build, deltas, fill, inputs, output, said
from tests.selection.test_masks import random_masks

FAMILIES = ["bert", "roberta-classifier", "gpt2", "llama", "gemma2", "gemma3", "qwen3", "t5", "bart", "vit", "mamba"]
FAMILIES += ["cohere", "whisper", "modernbert"]


def train(model, batch, steps=3, lr=1e-4, weight_decay=0.01):
    """A few AdamW steps with torch's defaults, on a loss in which every output counts."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)
    torch.manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        y = said(model, batch).float()
        (y * torch.randn_like(y)).sum().backward()
        optimizer.step()
    return model.eval()


class TestHalfPrecision:
    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_tuned_entry_has_moved_after_three_steps_at_1e_4(self, family, dtype):
        peft_model = train(adapt(build(family, dtype), std=0), inputs(family, dtype))
        still = {name: int((delta.weight == 0).sum()) for name, delta in deltas(peft_model).items()}
        assert {name: count for name, count in still.items() if count} == {}

    def test_a_masked_adapter_moves_too(self):
        peft_model, batch = adapt(build("bert", torch.bfloat16), std=0), inputs("bert")
        peft_model.set_masks(random_masks(peft_model))
        train(peft_model, batch)
        assert all((delta.weight != 0).all() for delta in deltas(peft_model).values())

    def test_the_output_follows_although_the_base_could_not_hold_the_step(self):
        model, batch = build("llama", torch.bfloat16), inputs("llama")
        base = output(model, batch)
        peft_model = train(adapt(model, std=0), batch)
        assert max(delta.weight.abs().max() for delta in deltas(peft_model).values()) < 2.0**-10
        assert not torch.equal(output(peft_model, batch), base)

    @pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's, of every norm but nn.LayerNorm
    def test_stock_ln_tuning_does_not_move(self):
        """PEFT's own, shown as it is: it trains copies of norms in bfloat16, where steps of 1e-4 round to none."""
        model = cases.build("llama").bfloat16()  # weights of one, as they are made
        targets = ["input_layernorm", "post_attention_layernorm", "model.norm"]
        stock = get_peft_model(model, StockConfig(target_modules=targets, task_type="CAUSAL_LM"))
        tuned = [p for p in stock.parameters() if p.requires_grad]
        assert len(tuned) == 5
        before = [p.detach().clone() for p in tuned]
        train(stock, inputs("llama"))
        assert all(torch.equal(p, old) for p, old in zip(tuned, before, strict=True))

    def test_autocast_over_a_float32_base(self):
        peft_model, batch = adapt(build("llama"), std=0), inputs("llama")
        with torch.autocast("cpu", torch.bfloat16):
            train(peft_model, batch)
        assert all((delta.weight != 0).all() for delta in deltas(peft_model).values())


class TestQuantizedBase:
    def test_int8_learns_reloads_and_merges(self, tmp_path):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        def quantized():
            model = build("bert-classifier", torch.bfloat16)
            quantize_(model, Int8WeightOnlyConfig(version=2))
            return model

        batch = inputs("bert-classifier")
        peft_model = train(adapt(quantized(), std=0), batch, lr=1e-2)
        assert all((delta.weight != 0).all() for delta in deltas(peft_model).values())
        expected = output(peft_model, batch)
        assert not torch.equal(expected, output(quantized(), batch))
        peft_model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(quantized(), tmp_path).eval()
        assert torch.equal(output(again, batch), expected)
        merged = again.merge_and_unload()
        # Norms are not quantized, so merging rounds as over a bfloat16 base.
        torch.testing.assert_close(output(merged, batch), expected, rtol=0.1, atol=0.1)
        assert type(merged.bert.encoder.layer[0].attention.self.query.weight.data) is not torch.Tensor


class TestSameAsTheOthers:
    """In float32 a delta, PEFT's copy and the norm itself are one and the same thing to train.

    Without weight decay, that is: it draws a delta to the pretrained weight, and the other two to zero.
    """

    @pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's, of every norm but nn.LayerNorm
    @pytest.mark.parametrize("family", ["bert", "llama"])
    def test_plain_lines_and_stock_tuning_go_the_same_way(self, family):
        batch, outputs = inputs(family), {}
        for way in ("ours", "stock", "plain"):
            model = build(family)
            names = list(find_norms(model))
            if way == "ours":
                model = adapt(model, std=0)
            elif way == "stock":
                model = get_peft_model(model, StockConfig(target_modules=names))
            else:
                model.requires_grad_(False)
                for name in names:
                    model.get_submodule(name).requires_grad_(True)
            outputs[way] = output(train(model, batch, lr=1e-2, weight_decay=0.0), batch)
        # AdamW divides by the size of the gradient, so a rounding of 1e-7 may grow a little.
        torch.testing.assert_close(outputs["ours"], outputs["plain"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outputs["ours"], outputs["stock"], rtol=1e-5, atol=1e-5)
        assert (outputs["ours"] - output(build(family), batch)).abs().max() > 1e-3, "nothing was trained"


class TestCheckpointing:
    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of a reentrant first block
    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # transformers 5 renames it
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("family", ["bert", "llama", "t5"])
    def test_gradients_are_those_without(self, family, reentrant):
        gradients = []
        for checkpointed in (False, True):
            peft_model, batch = adapt(build(family)), inputs(family)
            if checkpointed:
                peft_model.enable_input_require_grads()
                # By the name that Trainer and every guide use still.
                peft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            peft_model.train()
            _without_dropout(peft_model)
            said(peft_model, batch).square().sum().backward()
            gradients.append({name: delta.weight.grad for name, delta in deltas(peft_model).items()})
        # Bit for bit but in T5, where each decoder layer adds to the gradient of the encoder, in another order.
        tolerance = 1e-5 if family == "t5" else 0
        for name, expected in gradients[0].items():
            torch.testing.assert_close(
                gradients[1][name], expected, rtol=tolerance, atol=tolerance * expected.abs().max()
            )


def _without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


class TestCompile:
    @pytest.mark.end_to_end
    @pytest.mark.parametrize("case", ["bert", "llama", "masked"])
    def test_one_adapter_is_one_graph(self, case):
        family, dtype = ("llama", torch.bfloat16) if case == "llama" else ("bert", torch.float32)
        peft_model, batch = adapt(build(family, dtype)), inputs(family, dtype)
        if case == "masked":
            peft_model.set_masks(random_masks(peft_model))
        torch._dynamo.reset()
        compiled = torch.compile(peft_model, backend="eager", fullgraph=True)
        with torch.set_grad_enabled(case != "masked"):
            for seed in (0, 5):  # a graph follows its deltas
                fill(peft_model, "default", seed=seed)
                y = said(compiled, batch)
                assert torch.equal(y, output(peft_model, batch))
        if y.requires_grad:
            y.float().sum().backward()
            assert all(delta.weight.grad is not None for delta in deltas(peft_model).values())


class Sentences(Dataset):
    """Twelve sentences of random tokens and their labels."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.ids, self.labels = torch.randint(3, cases.VOCAB, (12, 6)), torch.randint(3, (12,))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(6, dtype=torch.int64), "labels": self.labels[i]}


def trainer_of(directory: Path, steps: int, **options) -> hf.Trainer:
    peft_model = adapt(build("bert-classifier"), std=0, task_type="SEQ_CLS")
    arguments = hf.TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
        dataloader_pin_memory=False,
        save_strategy="steps",
        **options,
    )
    return hf.Trainer(peft_model, arguments, train_dataset=Sentences())


class TestTrainer:
    def test_three_steps_and_what_they_save(self, tmp_path):
        trainer = trainer_of(tmp_path, 3, save_steps=3)
        trainer.train()
        assert all((delta.weight != 0).any() for delta in deltas(trainer.model).values())
        saved = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= saved
        assert "model.safetensors" not in saved
        batch = inputs("bert-classifier")
        again = PeftModel.from_pretrained(build("bert-classifier"), tmp_path / "checkpoint-3").eval()
        assert torch.equal(output(again, batch), output(trainer.model.eval(), batch))

    @pytest.mark.end_to_end
    def test_resumed_training_equals_uninterrupted_bit_for_bit(self, tmp_path):
        whole = trainer_of(tmp_path / "whole", 5, save_steps=5)
        whole.train()
        trainer_of(tmp_path / "parts", 2, save_steps=2).train()
        resumed = trainer_of(tmp_path / "parts", 5, save_steps=5)
        resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
        expected = {name: p for name, p in whole.model.named_parameters() if p.requires_grad}
        found = {name: p for name, p in resumed.model.named_parameters() if p.requires_grad}
        assert found.keys() == expected.keys()
        assert len(found) == 12  # weight and bias of five norms and a head
        assert all(torch.equal(found[name], p) for name, p in expected.items())
