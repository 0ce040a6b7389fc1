"""Training runs for the norm doctor: a small net with two norms, and a loop that looks at every step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.doctor import NormWatch, Report

WIDTH = 32


class Net(nn.Module):
    """Two layers with a LayerNorm after each."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.fc1, self.norm1 = nn.Linear(8, WIDTH), norm(WIDTH)
        self.fc2, self.norm2 = nn.Linear(WIDTH, WIDTH), norm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.fc1(x)).relu()
        return self.head(self.norm2(self.fc2(x) + x))


def net(dtype: torch.dtype = torch.float32, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> Net:
    """A net with norms as a trained model has them: gains near 1, not all equal."""
    torch.manual_seed(0)
    made = Net(norm)
    with torch.no_grad():
        for module in (made.norm1, made.norm2):
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn(WIDTH))
    return made.to(dtype)


def norms_of(model: nn.Module) -> list[nn.Parameter]:
    return [value for name, value in model.named_parameters() if "norm" in name]


def train(
    model: nn.Module,
    optimizer: Any,
    steps: int = 12,
    *,
    scale: float = 1.0,
    clip: float | None = None,
    cast: torch.dtype | None = None,
    scaler: Any = None,
    schedule: Any = None,
    accumulate: int = 1,
    after: Callable[[nn.Module], None] | None = None,
    expect: str | bool | None = None,
) -> Report:
    """Train on noise, and look at every step.

    Args:
        model: the net, perhaps in a `PeftModel`.
        optimizer: its optimizer.
        steps: number of steps.
        scale: factor of the loss.
        clip: norm to which gradients are clipped.
        cast: dtype of autocast.
        scaler: a `GradScaler`.
        schedule: a schedule of the learning rate, stepped after each step.
        accumulate: number of backward passes per step.
        after: called with the model after each step, outside the looks.
        expect: for `NormWatch`.
    """
    model.train()
    watch = NormWatch(model, optimizer, expect=expect, max_grad_norm=clip)
    data = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype if cast is None else torch.float32
    for _ in range(steps):
        for _ in range(accumulate):
            x, labels = torch.randn(16, 8, generator=data).to(dtype), torch.randint(3, (16,), generator=data)
            with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
                logits = model(x)
            loss = scale * nn.functional.cross_entropy(logits.float(), labels) / accumulate
            if loss.requires_grad:
                (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        watch.before_step()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        watch.after_step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
        model.zero_grad()
        if after is not None:
            after(model)
    return watch.report()


def adam(parameters: Any, lr: float = 1e-3, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=lr, **{"weight_decay": 0.0, **options})


class Stochastic(torch.optim.AdamW):
    """AdamW that rounds its result up or down by chance, so that small steps add up in the mean."""

    def step(self, closure: Any = None) -> None:
        values = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        halves = [value.detach().clone() for value in values]
        grads = [value.grad for value in values]
        for value in values:
            value.grad, value.data = None, value.data.double()
            self.state.setdefault(value, {})
        for value, grad in zip(values, grads, strict=True):
            value.grad = grad.double()
        super().step(closure)
        for value, half, grad in zip(values, halves, grads, strict=True):
            value.grad = None
            exact = value.data
            near = exact.to(half.dtype).double()
            error = exact - near
            other = torch.nextafter(near.to(half.dtype).float(), near.float() + error.float()).double()
            gap = torch.finfo(half.dtype).eps * 2 ** torch.floor(torch.log2(near.abs().clamp(min=1e-30)))
            other = (near + gap * error.sign()).to(half.dtype).double()
            chance = (error.abs() / (other - near).abs().clamp(min=1e-30)).clamp(max=1)
            value.data = torch.where(torch.rand_like(exact) < chance, other, near).to(half.dtype)
            value.grad = grad


class Masters:
    """An optimizer of float32 copies, which the model's parameters follow; the model's are not in its groups."""

    def __init__(self, parameters: Any, lr: float) -> None:
        self.half = list(parameters)
        self.wide = [nn.Parameter(value.detach().float()) for value in self.half]
        self.inner = adam(self.wide, lr)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def step(self) -> None:
        for wide, half in zip(self.wide, self.half, strict=True):
            wide.grad = None if half.grad is None else half.grad.float()
        self.inner.step()
        with torch.no_grad():
            for wide, half in zip(self.wide, self.half, strict=True):
                half.copy_(wide)

    def zero_grad(self) -> None:
        for half in self.half:
            half.grad = None


class KeptMasters(torch.optim.Optimizer):
    """Adam that keeps float32 copies in its state, as fused optimizers for half precision do."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(list(parameters), {"lr": lr, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is None:
                    continue
                state = self.state[value]
                if not state:
                    state["master"], state["mean"] = value.float(), torch.zeros_like(value, dtype=torch.float32)
                state["mean"].lerp_(value.grad.float(), 0.1)
                state["master"] -= group["lr"] * state["mean"].sign()
                value.copy_(state["master"])
