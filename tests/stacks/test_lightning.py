"""A PeftModel in a LightningModule: precision, checkpoints, averages of weights, and the adapter's own file."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader

import peft_lntune as lntune
from tests.adapted import deltas
from tests.stacks.models import Sentences, bert

lightning = pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")
pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]  # Lightning warns of few workers and of itself

CONFIGS = {
    "norms": lntune.LNTuningConfig,
    "masked norms": lntune.FisherLNConfig,
    "norms and LoRA": lambda **options: lntune.UnifiedConfig(preset="lora+ln", **options),
}


def adapted(kind):
    model = get_peft_model(bert(), CONFIGS[kind](task_type="SEQ_CLS"))
    if kind == "masked norms":
        model.set_masks({"bert.encoder.layer.0.output.LayerNorm.weight": torch.arange(16) < 4})
    return model


class Classifier(lightning.LightningModule):
    def __init__(self, kind):
        super().__init__()
        self.save_hyperparameters()
        self.model = adapted(kind)

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def validation_step(self, batch, index):
        self.log("loss", self.model(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fit(module, folder, precision="32-true", callbacks=()):
    loader = DataLoader(Sentences(), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        default_root_dir=str(folder),
    )
    trainer.fit(module, loader, loader)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


def answer(model):
    with torch.no_grad():
        return model.eval()(**next(iter(DataLoader(Sentences(), batch_size=4)))).logits


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_checkpoints_and_adapters_answer_as_the_trained_model(kind, precision, tmp_path):
    module = fit(Classifier(kind), tmp_path, precision)
    dtype = module.model.base_model.model.classifier.weight.dtype
    assert {delta.weight.dtype for delta in deltas(module.model).values()} == {torch.float32}
    assert all(delta.weight.any() for delta in deltas(module.model).values())
    again = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert torch.equal(answer(again.model.to(dtype)), answer(module.model))
    module.model.save_pretrained(tmp_path / "adapter")
    saved = PeftModel.from_pretrained(bert().to(dtype), tmp_path / "adapter")
    head = module.model.base_model.model.classifier
    assert not isinstance(head, torch.nn.Linear)  # PEFT trains heads of classifiers
    assert torch.equal(answer(saved), answer(module.model))


@pytest.mark.parametrize("kind", CONFIGS)
def test_averaged_weights_are_the_ones_that_answer(kind, tmp_path):
    from lightning.pytorch.callbacks import WeightAveraging

    seen = []

    class Last(lightning.Callback):
        def on_validation_batch_end(self, trainer, module, *_):
            seen.append(answer(module.model))

    module = fit(Classifier(kind), tmp_path, callbacks=[WeightAveraging(avg_fn=get_ema_avg_fn(0.5)), Last()])
    # Lightning puts the averages into the model at the end of training, and for validation.
    assert torch.equal(answer(module.model), seen[-1])
    module.model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(answer(PeftModel.from_pretrained(bert(), tmp_path / "adapter")), answer(module.model))
