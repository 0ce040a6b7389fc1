"""Norms over a quantized base: torchao's int8 weights and bitsandbytes' 4 bits, against the same base in bfloat16."""

import importlib.util
import tempfile
from typing import Any

import torch
from torch import nn

from benchmarks.harness.arms import find_arm, own_parameters
from benchmarks.harness.costs import in_turns
from benchmarks.harness.rows import Cell, Row
from benchmarks.harness.timing import Call
from benchmarks.on_gpu.bench import Bench, SkippedError, parameter_bytes
from benchmarks.on_gpu.checks import logits
from benchmarks.on_gpu.shapes import make_batch
from benchmarks.on_gpu.training import step_call
from peft_lntune import find_norms

MODEL, LAYERS = "llama-3.2-1b", 8  # bitsandbytes reads the model from a file, which is written here
BASES = ("torchao int8", "bitsandbytes nf4")
STEPS = 5


def run_cell(cell: Cell, bench: Bench) -> Row:
    """Check norms over a quantized base, count entries that move, and time steps beside a bfloat16 base."""
    make = {"torchao int8": int8, "bitsandbytes nf4": nf4}[cell["base"]]
    rows, tokens = bench.size((4, 512), (2, 6))
    batch = make_batch(MODEL, rows, tokens, bench.device)
    plain, quantized = bench.model(MODEL, "bfloat16", layers=LAYERS), make(bench)
    _same_norms(plain, quantized)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    sizes = {"bfloat16": parameter_bytes(plain), cell["base"]: parameter_bytes(quantized)}
    before = logits(quantized, inputs)
    if float((before - logits(plain, inputs)).norm()) == 0:
        raise AssertionError(f"{cell['base']}: the logits are those of the base in bfloat16; nothing was quantized")
    tuned = find_arm("ln").tune(quantized).eval()
    if not torch.equal(logits(tuned, inputs), before):
        raise AssertionError(f"{cell['base']}: a new adapter changes the logits of the quantized model")
    step = step_call(tuned, batch)
    start = {name: parameter.detach().clone() for name, parameter in own_parameters(tuned).items()}
    for _ in range(STEPS):
        step()
    deltas = own_parameters(tuned)
    entries = sum(delta.numel() for delta in deltas.values())
    moved = sum(int(((delta != start[name]) & delta.isfinite()).sum()) for name, delta in deltas.items()) / entries
    reference = step_call(find_arm("ln").tune(plain), batch)
    calls: dict[str, Call] = {"ln, bfloat16": reference, "ln, bfloat16, again": reference, f"ln, {cell['base']}": step}
    peer = find_arm("lora").tune(make(bench)).to(bench.device)
    calls[f"lora, {cell['base']}"] = step_call(peer, batch)
    arms = in_turns(calls, bench.rounds, bench.device, box=0.4 * bench.box)
    return {
        "arms": arms,
        "moved": moved,
        "steps": STEPS,
        "num_method_params": entries,
        "base_bytes": sizes,
        "rows": rows,
        "tokens": tokens,
        "layers": int(plain.config.num_hidden_layers),
    }


def int8(bench: Bench) -> Any:
    """Quantize all linear modules by torchao to int8, weights only."""
    if importlib.util.find_spec("torchao") is None:
        raise SkippedError("the package torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = bench.model(MODEL, "bfloat16", layers=LAYERS)
    quantize_(model, Int8WeightOnlyConfig(version=2))
    return model


def nf4(bench: Bench) -> Any:
    """Load the model by transformers with its linear modules in bitsandbytes' 4 bits."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SkippedError("the package bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        bench.model(MODEL, "bfloat16", layers=LAYERS).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": bench.device}
        ).eval()


def _same_norms(plain: nn.Module, quantized: nn.Module) -> None:
    """Refuse a base whose norms are other ones, or not found."""
    wanted, found = find_norms(plain), find_norms(quantized)
    if list(wanted) != list(found):
        raise AssertionError(f"norms of the quantized base: {list(found)}; of the plain one: {list(wanted)}")
    for name in wanted:
        if not torch.equal(plain.get_parameter(f"{name}.weight"), quantized.get_parameter(f"{name}.weight")):
            raise AssertionError(f"{name}: the quantizer changed this norm")
