"""Find the part of LayerNorm that matters for a task by Fisher information, and tune only that.

    python examples/fisher_layernorm.py                                     # the demo's data, offline
    python examples/fisher_layernorm.py --task sst2 --model bert-base-cased --density 0.05
    python examples/fisher_layernorm.py --data-dir my_data

One pass over some training batches scores every gain and bias; the best are trained, the rest stay as they were, and
the saved adapter holds the chosen values and one bit for each entry.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from demo_data import write_data
from methods import find_head
from peft import PeftModel, get_peft_model
from task_data import Collator, DataError, read_data
from text_classification import Run, default_model, evaluate_logits, load_base, make_trainer, predict, quiet
from torch.utils.data import DataLoader

from peft_lntune import FisherLNConfig, fit_fisher_masks


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", help="a GLUE task")
    parser.add_argument("--data-dir", type=Path, help="local train and validation files; without both, the demo's data")
    parser.add_argument("--model", help="a checkpoint's name or folder; without it, an installed all-MiniLM-L6-v2")
    parser.add_argument("--density", type=float, default=0.1, help="fraction of the norm entries to tune")
    parser.add_argument("--fisher", choices=("empirical", "mc", "exact"), default="empirical")
    parser.add_argument("--num-samples", type=int, default=1024)
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fisher_layernorm"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Fit, show, train, save, reload."""
    args = parse_args(argv)
    quiet()
    if args.task is None and args.data_dir is None:
        args.data_dir = write_data(args.out / "data", "sentiment", seed=args.seed)
    try:
        data = read_data(args.task, args.data_dir)
    except DataError as error:
        raise SystemExit(f"error: {error}") from error
    model_name = args.model or default_model()
    base, tokenizer = load_base(model_name, data.num_labels, args.seed)
    collator = Collator(tokenizer, data)

    config = FisherLNConfig(
        task_type="SEQ_CLS",
        modules_to_save=find_head(base),
        density=args.density,
        fisher=args.fisher,
        num_samples=args.num_samples,
        seed=args.seed,
    )
    model = get_peft_model(base, config)
    rows = data.train.shuffle(seed=args.seed)
    fit = fit_fisher_masks(model, DataLoader(rows, batch_size=args.batch_size, collate_fn=collator))
    print(fit)

    # The masks have replaced parameters, so the optimizer, which the Trainer makes, comes after them.
    run = Run("ln", model_name, str(args.data_dir), steps=args.max_steps, batch_size=args.batch_size, lr=args.lr)
    trainer = make_trainer(run, model, data, collator, None)
    trainer.train()
    logits = predict(trainer, data)
    print(", ".join(f"{name} {value:.4f}" for name, value in evaluate_logits(logits, data).items()))
    model.save_pretrained(str(args.out))

    fresh, _ = load_base(model_name, data.num_labels, args.seed + 1)  # another head, to be replaced
    reloaded = PeftModel.from_pretrained(fresh, str(args.out)).eval()
    same = np.array_equal(logits, predict(make_trainer(run, reloaded, data, collator, None), data))
    if not same:
        raise RuntimeError(f"the adapter in {args.out} answers differently after reloading")
    print(f"saved {args.out}, reloaded: all {len(logits)} validation logits are bit-equal")


if __name__ == "__main__":
    main()
