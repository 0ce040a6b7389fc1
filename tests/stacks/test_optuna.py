"""Trainer.hyperparameter_search with optuna: `model_init` builds a new PeftModel for each trial."""

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

import peft_lntune as lntune
from tests.adapted import deltas
from tests.stacks.models import Sentences, bert

optuna = pytest.importorskip("optuna", reason="optuna is not installed: pip install optuna")
pytestmark = pytest.mark.filterwarnings("ignore:::optuna.*")


@pytest.mark.parametrize("masked", [False, True], ids=["norms", "masked norms"])
def test_each_trial_trains_an_adapter_of_its_own(masked, tmp_path):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    made, starts = [], []

    def model_init(trial):
        model = get_peft_model(bert(), lntune.FisherLNConfig(task_type="SEQ_CLS", density=0.2, num_samples=16))
        data = [{name: value[None] for name, value in row.items()} for row in Sentences()]
        if masked:
            lntune.fit_fisher_masks(model, data)
        else:
            model = get_peft_model(bert(), lntune.LNTuningConfig(task_type="SEQ_CLS"))
        made.append(model)
        starts.append(all(not delta.weight.any() for delta in deltas(model).values()))
        return model

    args = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model_init=model_init, args=args, train_dataset=Sentences(), eval_dataset=Sentences())
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)},
        n_trials=2,
        backend="optuna",
        direction="minimize",
        sampler=optuna.samplers.RandomSampler(seed=0),
        catch=(),
    )
    assert best.objective > 0
    assert starts == [True] * 3  # Trainer makes one by itself before the trials
    assert [max(d.weight.abs().max().item() for d in deltas(m).values()) > 0 for m in made] == [False, True, True]
    assert isinstance(best.hyperparameters["learning_rate"], float)
    assert torch.is_tensor(next(iter(deltas(trainer.model).values())).weight)
