"""Find the part of LayerNorm that matters for a task by Fisher information, and tune only that.

    python examples/fisher_layernorm.py                                     # the demo's data, offline
    python examples/fisher_layernorm.py --task sst2 --model bert-base-cased --density 0.05
    python examples/fisher_layernorm.py --data-dir my_data

One pass over some training batches scores every gain and bias. The best are trained, the rest do not change, and the
saved adapter contains the chosen values and one bit per entry.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from methods import HEAD_LR, find_head
from peft import get_peft_model
from task_data import add_task_options
from text_classification import task_or_demo
from torch.utils.data import DataLoader
from training import Run, load_base, make_trainer, predict, quiet, reload, save_tuned, warn_of_chance

from peft_lntune import FisherLNConfig, fit_fisher_masks


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_options(parser)
    parser.add_argument("--model", help="a checkpoint's name or folder; without it, an installed all-MiniLM-L6-v2")
    parser.add_argument("--density", type=float, default=0.1, help="fraction of the norm entries to tune")
    parser.add_argument("--fisher", choices=("empirical", "mc", "exact"), default="empirical")
    parser.add_argument("--num-samples", type=int, default=1024)
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the norms; default 1e-3")
    parser.add_argument("--head-learning-rate", type=float, default=HEAD_LR, help=f"default {HEAD_LR:g}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fisher_layernorm"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Fit, show, train, save, reload."""
    args = parse_args(argv)
    quiet()
    task, model_name = task_or_demo(args)
    base = load_base(task, model_name, args.seed)

    config = FisherLNConfig(
        task_type=task.peft_type,
        modules_to_save=find_head(base),
        density=args.density,
        fisher=args.fisher,
        num_samples=args.num_samples,
        seed=args.seed,
    )
    model = get_peft_model(base, config)
    rows = task.train.shuffle(seed=args.seed)
    fit = fit_fisher_masks(model, DataLoader(rows, batch_size=args.batch_size, collate_fn=task.collator))
    print(fit)

    # The masks have replaced parameters, so the optimizer, which the Trainer makes, comes after them.
    source = str(args.data_dir or "Hub")
    run = Run(
        "ln",
        model_name,
        source,
        steps=args.max_steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        head_lr=args.head_learning_rate,
    )
    trainer = make_trainer(run, model, task)
    trainer.train()
    warn_of_chance("Fisher LN", args.lr, task.chance, trainer)
    logits = predict(trainer, task)
    print(", ".join(f"{name} {value:.4f}" for name, value in task.evaluate(logits).items()))
    save_tuned(model, args.out, logits)
    reload(run, task, args.out)


if __name__ == "__main__":
    main()
