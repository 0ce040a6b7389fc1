"""BatchNorm beside tuned norms: in training its running statistics move, and an adapter's file does not hold them."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lntune import LNTuningConfig
from tests.stacks.models import bert, tokens

# At injection the plan names BatchNorm as a norm that is not tuned, which is tested beside the others of its kind.
NOT_TUNED = "ignore:.*looks like a norm and is not tuned:UserWarning"
pytestmark = pytest.mark.filterwarnings(NOT_TUNED)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.inner(x).tanh())


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) + 3


def trained(config, keep=False):
    model = get_peft_model(Net(), config).train()
    if keep:
        next(m for m in model.modules() if isinstance(m, nn.BatchNorm1d)).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(X).square().sum().backward()
        optimizer.step()
    return model.eval()


def reloaded(model, folder):
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(Net(), folder).eval()(X)


def test_moving_statistics_are_told_once(tmp_path):
    with pytest.warns(UserWarning, match=r"1 modules such as inner\.1 \(BatchNorm1d\) keep running stat") as told:
        model = trained(LNTuningConfig())
    assert len([one for one in told if "running statistics" in str(one.message)]) == 1
    assert not torch.allclose(reloaded(model, tmp_path), model(X), atol=1e-3), "nothing to warn of"


def test_what_the_warning_advises_is_right(tmp_path):
    kept = trained(LNTuningConfig(), keep=True)
    assert torch.equal(reloaded(kept, tmp_path / "eval"), kept(X))
    saved = trained(LNTuningConfig(modules_to_save=["inner.1"]))
    assert torch.equal(reloaded(saved, tmp_path / "saved"), saved(X))


def test_models_without_statistics_and_evaluation_say_nothing():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*keep running statistics", category=UserWarning)
        get_peft_model(Net(), LNTuningConfig()).eval()(X)
        with torch.no_grad():
            get_peft_model(Net(), LNTuningConfig()).train()(X)
        get_peft_model(bert(), LNTuningConfig()).train()(input_ids=tokens())
