"""accelerate's states: a loop that is broken off and loaded goes on bit for bit."""

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader

import peft_lntune as lntune
from tests.stacks.models import Sentences, bert

CONFIGS = {
    "norms": lntune.LNTuningConfig,
    "masked norms": lntune.FisherLNConfig,
    "norms and LoRA": lambda **options: lntune.UnifiedConfig(preset="lora+ln", **options),
    "modules": lambda **options: lntune.ModuleTuningConfig(target_modules=["query"], **options),
}


def prepared(kind):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = get_peft_model(bert(), CONFIGS[kind](task_type="SEQ_CLS"))
    if kind == "masked norms":
        model.set_masks({"bert.encoder.layer.0.output.LayerNorm.weight": torch.arange(16) < 4})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    return accelerator, *accelerator.prepare(model.train(), optimizer, DataLoader(Sentences(), batch_size=4), schedule)


def train(accelerator, model, optimizer, loader, schedule, batches):
    for batch in list(loader)[:batches]:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_loaded_state_goes_on_bit_for_bit(kind, tmp_path):
    first = prepared(kind)
    train(*first, batches=2)
    first[0].save_state(str(tmp_path))
    middle = [p.detach().clone() for p in first[1].parameters()]
    train(*first, batches=4)
    second = prepared(kind)
    second[0].load_state(str(tmp_path))
    assert all(torch.equal(p, saved) for p, saved in zip(second[1].parameters(), middle, strict=True))
    train(*second, batches=4)
    assert all(torch.equal(p, q) for p, q in zip(first[1].parameters(), second[1].parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(first[1].parameters(), middle, strict=True))
