"""Prefixes behind fused attention: what each kernel costs, and whether it takes a prefix at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.costs import in_turns
from benchmarks.harness.rows import Cell, Row
from benchmarks.harness.timing import Call
from benchmarks.on_gpu.bench import Bench, SkippedError
from benchmarks.on_gpu.checks import TOLERANCE, logits, relative
from benchmarks.on_gpu.shapes import make_batch
from peft_lntune import PrefixConfig

MODEL, VIRTUAL = "llama-3.2-1b", 16
KERNELS = ("flash_attention_2", "sdpa", "sdpa, flash kernel alone", "eager")


def run_cell(cell: Cell, bench: Bench) -> Row:
    """Time a forward pass with and without prefixes, after comparing it with eager attention in float32."""
    kernel = cell["kernel"]
    name = kernel.partition(",")[0]
    if name == "flash_attention_2":
        _require_flash_attention(bench)
    rows, tokens = bench.size((4, 1024), (2, 6))
    inputs = make_batch(MODEL, rows, tokens, bench.device)
    del inputs["labels"], inputs["attention_mask"]  # without padding, as a mask alone would rule out some kernels
    torch.manual_seed(0)
    plain = bench.model(MODEL, "bfloat16", attention=name)
    config = PrefixConfig(num_virtual_tokens=VIRTUAL, init_weights=False)
    tuned: Any = get_peft_model(bench.model(MODEL, "bfloat16", attention=name), config).eval()
    with _only(kernel):
        try:
            found = logits(tuned, {key: value[:1] for key, value in inputs.items()})
        except RuntimeError as refusal:
            if "kernel" not in str(refusal).lower():
                raise
            raise SkippedError(
                f"torch's flash kernel does not take a prefix: {str(refusal).splitlines()[0]}"
            ) from refusal
        wide: Any = get_peft_model(bench.model(MODEL, "float32", attention="eager"), config).eval()
        wide.base_model.model.load_state_dict(tuned.base_model.model.state_dict())
        with sdpa_kernel(SDPBackend.MATH):
            error = relative(found, logits(wide, {key: value[:1] for key, value in inputs.items()}))
        del wide
        if not error <= TOLERANCE["bfloat16"]:
            raise AssertionError(f"{kernel}: differs from eager attention by {error:.1e}, which was not timed")
        base, with_prefix = (torch.no_grad()(lambda model=model: model(**inputs)) for model in (plain, tuned))
        calls: dict[str, Call] = {"base": base, "base again": base, "prefix": with_prefix}
        arms = in_turns(calls, bench.rounds, bench.device, box=0.5 * bench.box)
    return {"arms": arms, "rows": rows, "tokens": tokens, "virtual_tokens": VIRTUAL, "error": error}


def _require_flash_attention(bench: Bench) -> None:
    from transformers.utils import is_flash_attn_2_available

    if bench.device.type != "cuda":
        raise SkippedError("flash_attn runs on CUDA devices only")
    if not is_flash_attn_2_available():
        raise SkippedError("the package flash_attn is not installed")


@contextmanager
def _only(kernel: str) -> Iterator[None]:
    """Allow no other kernel of torch's attention than the one that was asked for."""
    if kernel.endswith("flash kernel alone"):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            yield
    else:
        yield
