"""diffusers: which of its norms are found, what is said of those without weights, and that adapters do their work."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.normalization import AdaGroupNorm, AdaLayerNorm, AdaLayerNormContinuous, FP32LayerNorm, RMSNorm
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_lntune import LNTuningConfig, ModuleTuningConfig, find_norms, plan
from peft_lntune.errors import NoMatchError
from tests.adapted import adapt, assert_unchanged, deltas, fill, output, said, snapshot

A, X, F, M, QK, Z = "attention", "cross_attention", "ffn", "mixer", "qk", "final"


@dataclass(frozen=True)
class Denoiser:
    """A tiny model of diffusers with random weights, and what it takes as inputs."""

    model: Callable[..., nn.Module]
    inputs: Callable[[], dict[str, Any]]


def unet(**options: Any) -> UNet2DConditionModel:
    own: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**{**own, **options})


def latents(batch: int = 3) -> dict[str, Any]:
    return {"timestep": torch.tensor([3, 50, 400])[:batch], "encoder_hidden_states": torch.randn(batch, 5, 8)}


DENOISERS = {
    "unet": Denoiser(unet, lambda: {"sample": torch.randn(3, 4, 8, 8), **latents()}),
    "sd3": Denoiser(
        lambda: SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        ),
        lambda: {"hidden_states": torch.randn(3, 4, 8, 8), "pooled_projections": torch.randn(3, 8), **latents()},
    ),
    "flux": Denoiser(
        lambda: FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
        ),
        lambda: {
            "hidden_states": torch.randn(3, 6, 4),
            "pooled_projections": torch.randn(3, 8),
            "img_ids": torch.zeros(6, 3),
            "txt_ids": torch.zeros(5, 3),
            **latents(),
        },
    ),
}


def dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=4,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    ).eval()


def dit_inputs() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(3, 4, 8, 8),
        "timestep": torch.tensor([3, 50, 400]),
        "class_labels": torch.tensor([0, 1, 2]),
    }


def build(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """The tiny model, frozen, with norms as a trained model has them."""
    torch.manual_seed(0)
    model = DENOISERS[kind].model(**options).eval()
    with torch.no_grad():
        for name in norms_by_class(model):
            for parameter in model.get_submodule(name).parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).requires_grad_(False)


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(1)
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in DENOISERS[kind].inputs().items()}


def norms_by_class(model: nn.Module) -> list[str]:
    """Oracle: leaves whose class is called a norm and which have a weight."""
    leaves = {name: module for name, module in model.named_modules() if not list(module.children())}
    return [name for name, leaf in leaves.items() if "Norm" in type(leaf).__name__ and hasattr(leaf.weight, "shape")]


@pytest.mark.parametrize("kind", DENOISERS)
def test_every_norm_with_a_weight_is_found(kind):
    model = build(kind)
    found = find_norms(model)
    assert list(found) == norms_by_class(model)
    assert len(found) > 3
    for name, norm in found.items():
        assert norm.axis == (1 if isinstance(model.get_submodule(name), nn.GroupNorm) else -1)


def test_roles_in_a_unet():
    roles: dict[str, set[tuple[str, ...]]] = {}
    for name, norm in find_norms(build("unet")).items():
        roles.setdefault(".".join(part for part in name.split(".")[-2:] if not part.isdigit()), set()).add(norm.roles)
    assert roles == {
        "norm1": {(M,), (A,)},  # of residual blocks, and of transformer blocks
        "norm2": {(M,), (X,)},
        "norm3": {(F,)},
        "norm": {()},
        "conv_norm_out": {(Z,)},
    }


def test_adaptive_norms_without_weights_are_listed_as_such():
    planned = plan(build("sd3"), LNTuningConfig())
    assert {part.roles for part in planned.parts.values()} == {QK}
    assert set(planned.left_out.values()) == {"it has no parameters"}
    assert {"transformer_blocks.0.norm1.norm", "norm_out.norm"} <= planned.left_out.keys()


@pytest.mark.parametrize(
    ("norm", "found"),
    [
        (RMSNorm(8, eps=1e-6, bias=True), {"": ((8,), (8,))}),
        (RMSNorm(8, eps=1e-6), {"": ((8,), None)}),
        (FP32LayerNorm(8), {"": ((8,), (8,))}),
        (AdaLayerNormContinuous(8, 4), {"norm": ((8,), (8,))}),
        (AdaLayerNorm(8, 3), {"norm": (None, None)}),
        (AdaGroupNorm(8, 8, 2), {}),  # it calls the function, so there is no module to be seen
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_single_norms(norm, found):
    listed = find_norms(norm, parameterless=True)
    assert {name: (n.weight_shape, n.bias_shape) for name, n in listed.items() if n.module_class != "SiLU"} == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", DENOISERS)
def test_a_new_adapter_changes_no_bit(kind, dtype):
    model, batch = build(kind, dtype), inputs(kind, dtype)
    base = output(model, batch)
    peft_model = adapt(model, std=0)
    assert torch.equal(output(peft_model, batch), base)
    fill(peft_model, "default")
    changed = output(peft_model, batch)
    assert changed.dtype == base.dtype
    assert not torch.equal(changed, base)
    with peft_model.disable_adapter():
        assert torch.equal(output(peft_model, batch), base)


def trained(model: nn.Module, batch: dict[str, Tensor], steps: int = 4, lr: float = 3e-2) -> list[float]:
    """The losses on the way to finding fixed noise."""
    target = torch.randn(output(model, batch).shape, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = (said(model, batch).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", DENOISERS)
def test_learns_reloads_and_merges(kind, dtype, tmp_path):
    model, batch = build(kind, dtype), inputs(kind, dtype)
    before = snapshot(model)
    peft_model = adapt(model, std=0)
    tuned = {name for name, p in peft_model.named_parameters() if p.requires_grad}
    assert tuned == {name for name, _ in peft_model.named_parameters() if ".lntune_" in name}
    losses = trained(peft_model, batch)
    assert losses[-1] < losses[0]
    still = {name for name, delta in deltas(peft_model).items() if not delta.weight.any()}
    # What the last block of SD 3 makes of the text is not looked at.
    assert still == ({"transformer_blocks.1.attn.norm_added_q.weight"} if kind == "sd3" else set())
    expected = output(peft_model, batch)

    peft_model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(kind, dtype), tmp_path).eval()
    assert torch.equal(output(again, batch), expected)
    merged = again.merge_and_unload()
    assert type(merged) is type(build(kind))
    # Merging rounds the sums to the dtype of the base.
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(output(merged, batch), expected, rtol=tolerance, atol=tolerance)
    peft_model.merge_adapter()
    peft_model.unmerge_adapter()
    assert_unchanged(peft_model.unload(), before)


def test_diffusers_own_verbs(tmp_path):
    """`add_adapter` takes the config. Its files are for LoRA alone: what it writes of ours it cannot read."""
    model, batch = build("unet"), inputs("unet")
    base = output(model, batch)
    model.add_adapter(LNTuningConfig(), adapter_name="ours")
    losses = trained(model, batch)
    assert losses[-1] < losses[0]
    tuned = output(model, batch)
    model.disable_adapters()
    assert torch.equal(output(model, batch), base)
    model.enable_adapters()
    assert torch.equal(output(model, batch), tuned)
    model.save_lora_adapter(tmp_path, adapter_name="ours")
    with pytest.raises(TypeError, match="`LoraConfig` class could not be instantiated"):
        build("unet").load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")


def test_dit_has_no_weights_in_its_norms_but_layers_that_give_scale_and_shift():
    model, batch = dit(), dit_inputs()
    with pytest.raises(NoMatchError, match=r"transformer_blocks\.0\.norm3: it has no parameters"):
        get_peft_model(model, LNTuningConfig())
    config = ModuleTuningConfig(target_modules=["norm1.linear", "proj_out_1"], tune="bias")
    peft_model = get_peft_model(model, config)
    assert set(deltas(peft_model)) == {
        "transformer_blocks.0.norm1.linear.bias",
        "transformer_blocks.1.norm1.linear.bias",
        "proj_out_1.bias",
    }
    losses = trained(peft_model.eval(), batch)
    assert losses[-1] < losses[0]


def test_a_norm_whose_class_is_asked_for_has_to_be_left_out():
    """Some U-Nets normalize the text, and ask that norm for its class, which is that of a tuner's layer then."""
    options = {
        "down_block_types": ("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "cross_attention_norm": "layer_norm",
    }
    model, batch = build("unet", **options), inputs("unet")
    norms = {name: norm.roles for name, norm in find_norms(model).items() if name.endswith("norm_cross")}
    assert set(norms.values()) == {(X,)}
    with pytest.raises(AssertionError):
        output(adapt(model), batch)
    peft_model = adapt(build("unet", **options), std=0, exclude_modules=["norm_cross"])
    losses = trained(peft_model, batch, steps=3)
    assert losses[-1] < losses[0]
