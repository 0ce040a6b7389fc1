"""What a model answers to a few tokens, and how far apart two answers may be by rounding alone."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from peft_lntune.core.module_tree import base_model
from peft_lntune.errors import ConfigError
from peft_lntune.layers.offloaded import device_of

__all__ = ["answers", "distance", "few_tokens", "inputs_of", "masks_of", "rounding"]

_TOKENS = 32


def few_tokens(model: nn.Module) -> dict[str, Tensor]:
    """Random tokens for a language model, the same in each call.

    Args:
        model: a model of transformers.

    Returns:
        `input_ids` of one row, and `decoder_input_ids` for an encoder-decoder.

    Raises:
        ConfigError: the model's config states no vocabulary, so its inputs are not known.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    if not isinstance(size, int):
        raise ConfigError(
            f"{type(model).__name__} is no language model whose vocabulary its config states, so it is not known what "
            "to run it on. Pass batches=[...], dicts of its inputs."
        )
    longest = getattr(text, "max_position_embeddings", None) or _TOKENS
    length = min(_TOKENS, longest) if longest > 0 else _TOKENS  # XLNet states -1: there is no limit
    ids = torch.randint(size, (1, length), generator=torch.Generator().manual_seed(0))
    pad = getattr(text, "pad_token_id", None)
    ids = torch.where(ids == pad, (ids + 1) % size, ids) if isinstance(pad, int) else ids
    found = {"input_ids": ids}
    return {**found, "decoder_input_ids": ids[:, :8]} if getattr(config, "is_encoder_decoder", False) else found


def inputs_of(batch: Any, model: nn.Module, few: bool = False) -> dict[str, Any]:
    """The inputs of a model in a batch, on its device, without labels.

    Args:
        batch: a dict of inputs.
        model: the model.
        few: keep only the first two rows, and of long texts only the first tokens.

    Returns:
        A new dict.

    Raises:
        ConfigError: the batch is not a dict.
    """
    if not isinstance(batch, Mapping):
        raise ConfigError(f"batches should be dicts of the model's inputs, but one is a {type(batch).__name__}.")
    device = device_of(model)
    found = {key: value for key, value in batch.items() if key != "labels"}
    found = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in found.items()}
    if not few:
        return found
    found = {key: value[:2] if isinstance(value, Tensor) and value.dim() else value for key, value in found.items()}
    ids, mask = found.get("input_ids"), found.get("attention_mask")
    texts = [v for v in found.values() if isinstance(v, Tensor) and ids is not None and v.shape == ids.shape]
    cut = 2 * _TOKENS
    if mask is not None and not mask[..., :cut].all():  # padding on the left would leave no token
        return found
    return {key: value[:, :cut] if any(value is text for text in texts) else value for key, value in found.items()}


def masks_of(batch: Mapping[str, Any]) -> dict[torch.Size, Tensor]:
    """The attention masks of a batch by their shape, `(rows, tokens)`, which tells whose they are.

    Args:
        batch: inputs of a model.

    Returns:
        The mask of the texts, and of those of a decoder. Where both texts have one shape it does not tell them apart,
        and there is no mask: every position counts.

    Example:
        >>> ids, mask = torch.ones(1, 3), torch.tensor([[1, 1, 0]])
        >>> list(masks_of({"input_ids": ids, "attention_mask": mask}))
        [torch.Size([1, 3])]
        >>> masks_of({"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids})
        {}
    """
    shapes = [
        value.shape for name in ("input_ids", "decoder_input_ids") if isinstance(value := batch.get(name), Tensor)
    ]
    masks = [batch.get(name) for name in ("attention_mask", "decoder_attention_mask")]
    found = {mask.shape: mask for mask in masks if isinstance(mask, Tensor)}
    return {shape: mask for shape, mask in found.items() if shapes.count(shape) < 2}


@torch.no_grad()
def answers(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Run a model and take what it is used for: its logits, or all floating tensors that it returns.

    Args:
        model: the model.
        inputs: its inputs.

    Returns:
        The tensors, as the model returned them.

    Raises:
        ConfigError: the model does not run on these inputs.
    """
    try:
        output = model(**inputs)
    except Exception as error:
        name, what = type(base_model(model)).__name__, f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{name} does not run on {', '.join(inputs)} ({what}). Pass batches=[...], dicts of its inputs."
        ) from error
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return [logits]
    leaves = list(output.values()) if isinstance(output, Mapping) else tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def distance(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The root mean square difference of two answers, in float64.

    Args:
        found: tensors.
        expected: tensors of the same shapes. Infinite values that both have, as where a model masks logits, are equal.

    Returns:
        The distance, in the unit of the tensors; NaN or infinite where only one of them is finite, or one is NaN.
    """
    pairs = [(a.double(), b.double().to(a.device)) for a, b in zip(found, expected, strict=True)]
    gaps = [torch.where(a == b, 0.0, a - b).reshape(-1) for a, b in pairs]
    return float(torch.cat(gaps).square().mean().sqrt())


def rounding(
    model: nn.Module, norms: Iterable[nn.Module], inputs: Mapping[str, Any], still: Iterable[Tensor] | None = None
) -> float:
    """How far rounding alone moves the answers of a model: with the last bit of each norm's output changed at random.

    Args:
        model: the model.
        norms: its norms, as the model calls them.
        inputs: its inputs.
        still: its answers to them, if they are known.

    Returns:
        The distance from the answers without that, in their unit.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def stir(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output
        generator = generators.setdefault(output.device, torch.Generator(output.device).manual_seed(0))
        sign = torch.randint(0, 2, output.shape, generator=generator, device=output.device) * 2 - 1
        wide = torch.promote_types(output.dtype, torch.float32)  # an integer times a number would be float32
        return output * (1 + sign.to(wide) * torch.finfo(output.dtype).eps).to(output.dtype)

    still = answers(model, inputs) if still is None else still
    handles = [norm.register_forward_hook(stir) for norm in norms]
    try:
        return distance(answers(model, inputs), still)
    finally:
        for handle in handles:
            handle.remove()
