"""Repair a pruned or quantized causal LM by its norms: perplexity before and after, and a merged model.

    python examples/recover.py --model DIR --text book.txt                  # prunes half of the weights, then repairs
    python examples/recover.py --model DIR --damaged DIR --text book.txt    # a quantized copy that you have

The loss is the divergence from the answers of the undamaged model, so texts need no labels. `peft-lntune recover` does
the same from the command line.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from task_data import errors_as_text
from torch import nn
from torch.nn.utils import prune
from training import quiet
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_lntune.analysis import Table
from peft_lntune.cli.recover import read_rows
from peft_lntune.errors import DataError
from peft_lntune.recover import check_pair, logits_of, quality, recover

BATCH = 4


def linear_maps(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps of a language model but its head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def pruned(model: nn.Module, sparsity: float) -> nn.Module:
    """A copy whose smallest weights are zero, by torch's own pruning."""
    damaged = copy.deepcopy(model)
    for module in linear_maps(damaged).values():
        prune.l1_unstructured(module, "weight", sparsity)
        prune.remove(module, "weight")
    return damaged


def zeros(model: nn.Module) -> float:
    """The share of the weights of linear maps that are zero."""
    weights = [module.weight for module in linear_maps(model).values()]
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the undamaged causal LM: folder with tokenizer, or Hub name")
    parser.add_argument("--damaged", help="the damaged copy: folder or Hub name (default: the model, pruned here)")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of zeros, if it is pruned here")
    parser.add_argument("--text", type=Path, required=True, help="texts like what the model will read: .txt or a table")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/recover"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Damage, repair, measure and merge."""
    args = parse_args(argv)
    quiet()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    teacher = AutoModelForCausalLM.from_pretrained(args.model).eval()
    student = (
        AutoModelForCausalLM.from_pretrained(args.damaged).eval() if args.damaged else pruned(teacher, args.sparsity)
    )
    with errors_as_text():
        check_pair(student, teacher)
        rows = read_rows(args.text, tokenizer, args.length)
        if len(rows) < 5 * BATCH:
            raise DataError(
                f"{args.text} gives {len(rows)} rows of {args.length} tokens; at least {5 * BATCH} are needed."
            )
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))]
        batches = [{"input_ids": one} for one in rows.split(BATCH)]
        held_out, batches = batches[:4], batches[4:]

        def answers(batch):
            return logits_of(teacher, batch)

        before, sparsity = quality(student, answers, held_out), zeros(student)
        repaired = recover(student, teacher, batches, steps=args.max_steps, learning_rate=args.lr, progress=True)
    repaired.model.save_pretrained(str(args.out))
    after = quality(repaired.model, answers, held_out)
    found = {"teacher": quality(teacher, answers, held_out), "damaged": before, "repaired": after}
    print(Table(("model", "perplexity", "divergence"), [(name, *one) for name, one in found.items()]).to_text())
    merged = repaired.model.merge_and_unload()
    print(f"\n{repaired.entries:,} entries of norms tuned; the adapter is in {args.out}")
    print(f"zeros in the linear maps: {sparsity:.1%} before, {zeros(merged):.1%} in the merged model")


if __name__ == "__main__":
    main()
