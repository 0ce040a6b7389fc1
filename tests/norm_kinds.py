"""Norms as libraries write them: other names, other shapes, gates, activations, tuples. And what only looks like one.

The formulas are those of timm's GroupNormAct and LayerNorm2d, x-transformers' ScaleNorm and RMSNorm, the annotated
transformer's LayerNorm, Conv-TasNet's global norm, Mamba's gated norms and the fused add-norms of inference kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from tests.cases import seed_cpu


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Named(nn.Module):
    """RMS norm or layer norm whose parameters go by other names, in the order given."""

    def __init__(self, weight: str, bias: str = "", width: int = 8, first: str = "weight") -> None:
        super().__init__()
        self.names = weight, bias
        values = {weight: torch.ones(width), bias: torch.zeros(width)}
        for name in (weight, bias) if first == "weight" else (bias, weight):
            if name:
                setattr(self, name, nn.Parameter(values[name]))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.names
        if not bias:
            return rms(x) * getattr(self, weight)
        return rms(x - x.mean(-1, keepdim=True)) * getattr(self, weight) + getattr(self, bias)


class Channels(nn.Module):
    """Normalizes over the channels, or over all of a sample, with parameters that are broadcast."""

    def __init__(self, shape: tuple[int, ...], over: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.over = over
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        over = self.over or tuple(range(1, x.dim()))
        variance, mean = torch.var_mean(x, over, keepdim=True, correction=0)
        return (x - mean) * torch.rsqrt(variance + 1e-5) * self.weight + self.bias


class ScaleNorm(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-5) * self.g


class GatedRMSNorm(nn.Module):
    """The gate has a default, and is needed all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return rms(x) * self.weight * nn.functional.silu(gate.to(x.dtype))  # type: ignore[union-attr]


class GatedLayerNorm(nn.LayerNorm):
    """The gate multiplies the bias too."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:  # type: ignore[override]
        y = super().forward(x)
        return y if gate is None else y * torch.sigmoid(gate)


class NormAct(nn.GroupNorm):
    def __init__(self, act: nn.Module) -> None:
        super().__init__(2, 8)
        self.drop, self.act = nn.Dropout(0.5), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class AddNorm(nn.LayerNorm):
    """A fused residual norm: with a residual it returns the sum too."""

    def forward(self, x: Tensor, residual: Tensor | None = None):  # type: ignore[override]
        if residual is None:
            return super().forward(x)
        return super().forward(x + residual), x + residual


class PairNorm(nn.LayerNorm):
    """It always returns a pair, the second of which may be None."""

    def forward(self, x: Tensor):  # type: ignore[override]
        return super().forward(x), None


@dataclass(frozen=True)
class Kind:
    """A norm, the shape of a sample of its input, whether it gets a second input, and what is known of it."""

    norm: Callable[[], nn.Module]
    sample: tuple[int, ...] = (5, 8)
    second: bool = False
    by_sample: bool = False


KINDS: dict[str, Kind] = {
    "LayerNorm of an image": Kind(lambda: nn.LayerNorm((2, 4, 4)), (2, 4, 4)),
    "RMSNorm of an image": Kind(lambda: nn.RMSNorm((2, 4, 4)), (3, 2, 4, 4)),
    "InstanceNorm1d": Kind(lambda: nn.InstanceNorm1d(4, affine=True), (4, 6)),
    "InstanceNorm2d": Kind(lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 5)),
    "InstanceNorm3d": Kind(lambda: nn.InstanceNorm3d(4, affine=True), (4, 3, 2, 2)),
    "(1, C, 1, 1)": Kind(lambda: Channels((1, 8, 1, 1)), (8, 3, 4)),
    "(C, 1, 1)": Kind(lambda: Channels((8, 1, 1)), (8, 3, 4)),
    "(1, C, 1), over all": Kind(lambda: Channels((1, 8, 1), over=()), (8, 6)),
    "one factor": Kind(lambda: ScaleNorm((1,))),
    "a scalar": Kind(lambda: ScaleNorm(())),
    "scale": Kind(lambda: Named("scale")),
    "gamma": Kind(lambda: Named("gamma")),
    "g": Kind(lambda: Named("g")),
    "gamma and beta": Kind(lambda: Named("gamma", "beta")),
    "beta before gamma": Kind(lambda: Named("gamma", "beta", first="bias")),
    "a_2 and b_2": Kind(lambda: Named("a_2", "b_2")),
    "scale and shift": Kind(lambda: Named("scale", "shift")),
    "weight and offset": Kind(lambda: Named("weight", "offset")),
    "names of its own": Kind(lambda: Named("widen", "move")),
    "a gate": Kind(GatedRMSNorm, second=True),
    "a gate over the bias": Kind(lambda: GatedLayerNorm(8), second=True, by_sample=True),
    "a gate over the bias, not given": Kind(lambda: GatedLayerNorm(8), by_sample=True),
    "norm and SiLU": Kind(lambda: NormAct(nn.SiLU()), (8, 3, 4), by_sample=True),
    "norm and ReLU": Kind(lambda: NormAct(nn.ReLU()), (8, 3, 4), by_sample=True),
    "residual": Kind(lambda: AddNorm(8), second=True, by_sample=True),
    "residual, not given": Kind(lambda: AddNorm(8), by_sample=True),
    "a pair": Kind(lambda: PairNorm(8), by_sample=True),
}


class Model(nn.Module):
    """A norm in a model; what comes out depends on every output of the norm."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm, self.second = KINDS[kind].norm(), KINDS[kind].second

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x, x.flip(0).roll(1, -1).sin() if self.second else None) if self.second else self.norm(x)
        y, more = y if isinstance(y, tuple) else (y, None)
        return y.cumsum(-1).tanh() + (0 if more is None else 2 * more)


def build(kind: str, dtype: torch.dtype = torch.float64) -> Model:
    """The model of a kind, with random parameters, in evaluation mode."""
    seed_cpu(0)
    model = Model(kind)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.to(dtype).eval()


def sample(kind: str, batch: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    seed_cpu(1)
    return torch.randn(batch, *KINDS[kind].sample, dtype=dtype)


# What looks like a norm and is not one that can be tuned.


class TritonNorm(nn.Module):
    """A kernel that takes no tensor of a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")


class Kernel(TritonNorm):
    """The same without the word: told by its parameters."""


class TransposedNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mT


class ExtraNorm(nn.LayerNorm):
    def __init__(self) -> None:
        super().__init__(8)
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.alpha * x)


class ProjectedNorm(nn.LayerNorm):
    def __init__(self) -> None:
        super().__init__(8)
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.up(x))


class MyBatchNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.std(0) + 1e-5) * self.weight + self.bias


MISSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a kernel": (TritonNorm, r"raised ValueError on the CPU: Pointer argument"),
    "a kernel without the word": (Kernel, r"raised ValueError on the CPU: Pointer argument"),
    "another shape": (lambda: TransposedNorm(8), "another shape than its input"),
    "a parameter more": (ExtraNorm, "its parameters are named weight, bias, alpha"),
    "a projection": (ProjectedNorm, "beside submodules with parameters"),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(8), "a statistic of the batch"),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(8), "a statistic of the batch"),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(8), "a statistic of the batch"),
    "BatchNorm of one's own": (lambda: MyBatchNorm(8), "a statistic of the batch"),
    "running statistics": (lambda: nn.InstanceNorm1d(8, affine=True, track_running_stats=True), "a running statistic"),
    "lazy": (nn.LazyBatchNorm1d, "not initialized yet"),
    "scripted": (lambda: torch.jit.script(nn.LayerNorm(8)), "a scripted module"),
    "tanh": (lambda: NormAct(nn.Tanh()), "not affine"),
    "too wide": (lambda: nn.LayerNorm(2**20 + 1), "more than the 1,048,576 of any norm"),
    "integers": (lambda: quantized(nn.LayerNorm(8)), "of dtype torch.int8"),
    "parametrized": (lambda: parametrized(nn.LayerNorm(8)), "it is parametrized"),
    "parametrized, without a bias": (lambda: parametrized(nn.RMSNorm(8)), "it is parametrized"),
    "pruned": (lambda: prune.identity(nn.LayerNorm(8), "weight"), "none is a weight|are named bias, weight_orig"),
}


def parametrized(norm: nn.Module) -> nn.Module:
    parametrize.register_parametrization(norm, "weight", nn.Identity())
    return norm


def quantized(norm: nn.Module) -> nn.Module:
    norm.weight = nn.Parameter(norm.weight.to(torch.int8), requires_grad=False)
    return norm


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 8))

    def forward(self, x: Tensor, temperature: float) -> Tensor:
        return nn.functional.linear(x, self.weight) / temperature


class NormedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(rms(x), rms(self.weight))[..., :4]


class PreNormBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.layer_scale = nn.LayerNorm(8), nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * self.up(self.norm(x))


NOT_MISSED: dict[str, Callable[[], nn.Module]] = {
    "PReLU": lambda: nn.PReLU(8),
    "LayerScale": LayerScale,
    "Identity in a norm's place": nn.Identity,
    "LayerNorm without parameters": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "BatchNorm without parameters": lambda: nn.BatchNorm1d(8, affine=False),
    "Linear": lambda: nn.Linear(8, 8),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    "Embedding": lambda: nn.Embedding(8, 8),
    "router": Router,
    "a linear layer with normalized weights": NormedLinear,
    "a block that is called after its norms": PreNormBlock,
}
