"""Tune only the norms of a causal LM: perplexity before and after, and text from both, from one model.

    python examples/causal_lm.py --model DIR --data-dir DIR           # train and validation, a column `text`
        python examples/causal_lm.py --model DIR --text book.txt          # the last tenth is the validation part
    python examples/causal_lm.py --model DIR                          # the sentences of demo_data.py

With the adapter switched off (`disable_adapter()`) the model is the base model again, bit for bit; nothing is copied.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from demo_data import sentences
from peft import PeftModel, get_peft_model
from task_data import PARTS, add_data_options, errors_as_text, find_file
from torch import Tensor
from tqdm.auto import tqdm
from training import quiet
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_lntune import LNTuningConfig
from peft_lntune.cli.data import find_columns, read_table, read_texts
from peft_lntune.errors import DataError


def read_parts(data_dir: Path | None, text: Path | None, encoding: str = "utf-8-sig") -> tuple[list[str], list[str]]:
    """Training and validation texts, from the first source given."""
    if data_dir is not None:
        found = []
        for file in (find_file(data_dir, part) for part in PARTS):
            rows = read_table(file, encoding)
            find_columns(rows.column_names, [("text",)], str(file))
            found.append(read_texts(rows["text"], "text", str(file)))
        return found[0], found[1]
    if text is not None:
        whole = text.read_text(encoding=encoding)
        cut = len(whole) * 9 // 10
        return [whole[:cut]], [whole[cut:]]
    demo = [[row["sentence"] for row in sentences(part, 500, seed=0)] for part in PARTS]
    return demo[0], demo[1]


def to_blocks(tokenizer: transformers.PreTrainedTokenizerBase, texts: list[str], length: int) -> Tensor:
    """All texts as one stream of tokens, cut into rows: (blocks, length). The last, incomplete row is dropped."""
    stream = torch.cat([tokenizer(text + "\n", return_tensors="pt")["input_ids"][0] for text in texts])
    if len(stream) < length:
        raise DataError(f"{len(stream)} tokens of text are less than one block of {length}")
    return stream[: len(stream) // length * length].view(-1, length)


def perplexity(model: torch.nn.Module, blocks: Tensor) -> float:
    """exp of the mean negative log likelihood of a token, over rows of equal length."""
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=rows, labels=rows).loss * len(rows) for rows in blocks.split(16)]
    return math.exp(sum(losses).item() / len(blocks))


def train(model: PeftModel, blocks: Tensor, steps: int, lr: float, seed: int) -> None:
    """AdamW without weight decay on random rows, with linear decay."""
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tuned, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    bar = tqdm(range(steps), desc="ln", unit="step")
    for _ in bar:
        rows = blocks[torch.randint(len(blocks), (8,), generator=generator)]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def complete(model: PeftModel, tokenizer: transformers.PreTrainedTokenizerBase, prompt: str, seed: int) -> str:
    """The prompt and 40 sampled tokens; equal seeds draw equally."""
    transformers.set_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=True)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal LM: its folder with tokenizer, or its name on the Hub")
    add_data_options(parser, "a folder of files with a column `text`")
    parser.add_argument("--text", type=Path, help="a plain text file, instead of --data-dir")
    parser.add_argument("--prompt", default="The story was")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=3e-3, help="default 3e-3, see docs/hyperparameters.md")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/causal_lm"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Tune, measure and generate."""
    args = parse_args(argv)
    quiet()
    transformers.set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model)
    length = min(128, base.config.max_position_embeddings)
    with errors_as_text():
        texts = read_parts(args.data_dir, args.text, args.encoding)
        blocks, held_out = (to_blocks(tokenizer, part, length) for part in texts)
    model = get_peft_model(base, LNTuningConfig(task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    train(model, blocks, args.max_steps, args.lr, args.seed)
    after, text_after = perplexity(model, held_out), complete(model, tokenizer, args.prompt, args.seed)
    with model.disable_adapter():
        before, text_before = perplexity(model, held_out), complete(model, tokenizer, args.prompt, args.seed)
    model.save_pretrained(str(args.out))
    print(f"perplexity of the validation text: {before:.2f} before, {after:.2f} after")
    print(f"\nbase:  {text_before}\n\ntuned: {text_after}\n")
    print(f"saved {(args.out / 'adapter_model.safetensors').stat().st_size:,} bytes of deltas in {args.out}")


if __name__ == "__main__":
    main()
