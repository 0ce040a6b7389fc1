"""TRL's trainers for preferences, rewards and reinforcement, each as its documentation starts it.

The reference is the base model or a copy of the adapter, only the trained adapter moves, and its file loads in PEFT.
"""

import datasets
import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

import peft_lntune as lntune
from tests.stacks.models import fill, llama

pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
# PEFT reads transformers' gradient checkpointing property under its old name, and TRL sets it so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl.*"),
]

WORDS = ["<pad>", "<unk>", "<eos>", "=>", "good", "bad", "the", "was", "soup", "film", "plot", "cold", "warm"]
PROMPTS = [f"the {thing} was {word} =>" for thing in ("soup", "film", "plot") for word in ("cold", "warm")]
CONFIGS = {
    "norms": lntune.LNTuningConfig,
    "norms and LoRA": lambda **options: lntune.UnifiedConfig(preset="lora+ln", **options),
    "modules": lambda **options: lntune.ModuleTuningConfig(target_modules=["q_proj"], **options),
    "bottlenecks": lntune.BottleneckConfig,
    "prefixes": lambda **options: lntune.PrefixConfig(num_virtual_tokens=2, **options),
}
# One kind in every run, and all kinds in the long one.
kinds = pytest.mark.parametrize(
    "kind", [kind if kind == "norms" else pytest.param(kind, marks=pytest.mark.full) for kind in CONFIGS]
)


def base(cls=LlamaForCausalLM, **options):
    return llama(cls, vocab_size=len(WORDS), eos_token_id=2, bos_token_id=None, **options)


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def dataset(*rows):
    return datasets.Dataset.from_list(list(rows))


def preferences():
    return dataset(*({"prompt": prompt, "chosen": " good", "rejected": " bad"} for prompt in PROMPTS))


def options(folder, **more):
    return {
        "output_dir": str(folder / "runs"),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,  # autocast would stay on in the trainer's model, and not be on in the loaded one
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        **more,
    }


def answer(model):
    ids = torch.tensor([[6, 8, 7, 11, 3]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def trained_and_saved(trainer, fresh, folder):
    """Train; the base is as it was, the adapter is not, and its file answers bit for bit. Returns the model."""
    trainer.train()
    trainer.save_model(str(folder / "out"))
    model = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(answer(model), answer(fresh())), "the base model was trained"
    assert not torch.allclose(answer(model), answer(fresh()), atol=1e-5), "nothing was trained"
    assert torch.equal(answer(PeftModel.from_pretrained(fresh(), folder / "out")), answer(model))
    return model


@kinds
def test_dpo_takes_the_base_model_for_its_reference(kind, tmp_path):
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(**options(tmp_path, beta=0.5))
    config = CONFIGS[kind](task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        base(), args=args, train_dataset=preferences(), processing_class=tokenizer(), peft_config=config
    )
    model = trained_and_saved(trainer, base, tmp_path)
    assert list(model.peft_config) == ["default"]
    # Before the first step policy and reference are equal, but for a random prefix.
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses(trainer)[-1] < losses(trainer)[0]


@kinds
def test_dpo_takes_a_copy_of_an_adapter_that_is_there(kind, tmp_path):
    from trl import DPOConfig, DPOTrainer

    peft_model = fill(get_peft_model(base(), CONFIGS[kind](task_type="CAUSAL_LM")))
    before = answer(peft_model)
    args = DPOConfig(**options(tmp_path, beta=0.5))
    trainer = DPOTrainer(peft_model, args=args, train_dataset=preferences(), processing_class=tokenizer())
    model = trained_and_saved(trainer, base, tmp_path)
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-4)
    assert not torch.equal(answer(model), before)
    model.base_model.set_adapter("ref")
    assert torch.equal(answer(model), before), "the reference has moved"


def test_dpo_copies_masks_with_the_adapter(tmp_path):
    from trl import DPOConfig, DPOTrainer

    peft_model = get_peft_model(base(), lntune.FisherLNConfig(task_type="CAUSAL_LM"))
    peft_model.set_masks({"model.norm.weight": torch.arange(16) < 4})
    before = answer(fill(peft_model))
    args = DPOConfig(**options(tmp_path, beta=0.5))
    trainer = DPOTrainer(peft_model, args=args, train_dataset=preferences(), processing_class=tokenizer())
    model = trained_and_saved(trainer, base, tmp_path)
    assert sum(p.numel() for name, p in model.named_parameters() if ".ref." in name) == 4
    model.base_model.set_adapter("ref")
    assert torch.equal(answer(model), before)


@pytest.mark.full
def test_dpo_with_references_computed_before_training(tmp_path):
    from trl import DPOConfig, DPOTrainer

    found = []
    for early in (False, True):
        args = DPOConfig(**options(tmp_path, beta=0.5, precompute_ref_log_probs=early))
        config = lntune.LNTuningConfig(task_type="CAUSAL_LM")
        trainer = DPOTrainer(
            base(), args=args, train_dataset=preferences(), processing_class=tokenizer(), peft_config=config
        )
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], abs=2e-4)  # the log rounds to four digits


@pytest.mark.full
@kinds
def test_kto(kind, tmp_path):
    kto = pytest.importorskip("trl.experimental.kto", reason="this TRL has no KTO trainer at this place")
    rows = [
        {"prompt": p, "completion": " good" if i % 2 else " bad", "label": i % 2 == 1} for i, p in enumerate(PROMPTS)
    ]
    config = CONFIGS[kind](task_type="CAUSAL_LM")
    args = kto.KTOConfig(**options(tmp_path, beta=0.5))
    trainer = kto.KTOTrainer(
        base(), args=args, train_dataset=dataset(*rows), processing_class=tokenizer(), peft_config=config
    )
    trained_and_saved(trainer, base, tmp_path)


@pytest.mark.full
@kinds
def test_reward(kind, tmp_path):
    from trl import RewardConfig, RewardTrainer

    def scored():
        return base(LlamaForSequenceClassification, num_labels=1)

    config = CONFIGS[kind](task_type="SEQ_CLS")
    args = RewardConfig(**options(tmp_path))
    trainer = RewardTrainer(
        scored(), args=args, train_dataset=preferences(), processing_class=tokenizer(), peft_config=config
    )
    model = trained_and_saved(trainer, scored, tmp_path)
    head = model.base_model.model.score
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight), "the head stood still"


@pytest.mark.full
@kinds
def test_grpo(kind, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions, **_):
        return [float(text.count("good")) + len(text) / 100 for text in completions]

    config = CONFIGS[kind](task_type="CAUSAL_LM")
    args = GRPOConfig(**options(tmp_path, beta=0.1, num_generations=2, max_completion_length=4))
    trainer = GRPOTrainer(
        base(),
        reward_funcs=reward,
        args=args,
        train_dataset=dataset(*({"prompt": prompt} for prompt in PROMPTS)),
        processing_class=tokenizer(),
        peft_config=config,
    )
    trained_and_saved(trainer, base, tmp_path)
