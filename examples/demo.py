"""all-MiniLM-L6-v2 learns the demo data through its norms: compared, saved, reloaded, served.

    python examples/demo.py

Three methods learn sentiment in the same loop: the head on a frozen body, the head with the norms, and everything. Then
the adapter of the norms is loaded into a fresh model, a second adapter for the topic of a sentence is added, and one
batch uses both, each row its own.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from demo_data import LABEL_NAMES, write_data
from peft import PeftModel
from task_data import read_data
from text_classification import text_task
from training import Result, Run, Task, default_model, format_table, quiet, reload, train_method
from transformers import PreTrainedTokenizerBase


def compare(run: Run, task: Task, out: Path) -> list[Result]:
    """Train each method in the same loop; no checkpoints, a run takes a minute or two."""
    methods = ("head", "ln", "full")
    return [train_method(replace(run, method=name), task, out / name, checkpoints=False) for name in methods]


def serve(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], labels: Sequence[int]
) -> None:
    """Ask both adapters about every sentence in one batch, and each alone for comparison; wrong answers are marked."""
    truth = [LABEL_NAMES["sentiment"][label] for label in labels]
    names = [name for _ in sentences for name in ("sentiment", "topic")]
    rows = [sentence for sentence in sentences for _ in ("sentiment", "topic")]
    batch = tokenizer(rows, padding=True, return_tensors="pt").to(model.device)
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names).logits
        alone = {name: model(**batch, adapter_names=[name] * len(rows)).logits for name in set(names)}
    print(f"\none batch of {len(rows)} rows, two adapters:")
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        answer = LABEL_NAMES[name][int(mixed[i].argmax())]
        wrong = "  <- wrong" if name == "sentiment" and answer != truth[i // 2] else ""
        print(f"  row {i:>2}  {name:<9}  {answer:<8}  {row}{wrong}")
    gap = max((mixed[i] - alone[name][i]).abs().max().item() for i, name in enumerate(names))
    print(f"largest difference of a logit to the same row with its adapter alone: {gap:.1e}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the four steps and say what was saved where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=default_model(), help="a checkpoint's name or folder")
    parser.add_argument("--max-steps", type=int, default=400, help="training steps of each method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    args = parser.parse_args(argv)
    quiet()
    sentiment, topic = (
        text_task(read_data(data_dir=write_data(args.out / "data", name)), args.model) for name in LABEL_NAMES
    )
    run = Run("ln", args.model, "sentiment", steps=args.max_steps, batch_size=16, seed=args.seed)
    print(
        f"{len(sentiment.train)} training sentences, {len(sentiment.validation)} of other words and other templates\n"
    )
    results = compare(run, sentiment, args.out)
    print("\na second adapter, for the topic of a sentence:")
    easier = replace(run, data="topic", steps=max(1, args.max_steps // 10))
    train_method(easier, topic, args.out / "topic", checkpoints=False)
    print(f"\n{format_table(results)}\n")
    model = reload(run, sentiment, args.out / "ln", adapter_name="sentiment")
    model.load_adapter(str(args.out / "topic"), adapter_name="topic")
    examples = sentiment.validation[:4]
    serve(model.eval(), sentiment.tokenizer, examples["sentence"], examples["label"])
    norms = {result.method: result.trainable - result.head for result in results}["ln"]
    print(f"\nsaved, with {norms:,} entries of norms and the head in each adapter:")
    for name in ("ln", "topic"):
        file = args.out / name / "adapter_model.safetensors"
        print(f"  {file}  {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
