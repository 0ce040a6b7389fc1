"""Train one adapter in several processes; configs for GPUs are in examples/accelerate.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/several_processes.py --bf16
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/several_processes.py --steps 20  # without a GPU

Masks are fitted before the model is wrapped, each process scoring its share; one process writes the adapter.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from task_data import add_task_options
from text_classification import task_or_demo
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from training import load_base, quiet

from peft_lntune import FisherLNConfig, LNTuningConfig, SupermaskConfig, UnifiedConfig, fit_fisher_masks

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ln": (LNTuningConfig, {}),
    "fisher": (FisherLNConfig, {"density": 0.2, "num_samples": 256}),
    "unified": (UnifiedConfig, {"preset": "prefix+mha-adapter+ln"}),
    "supermask": (SupermaskConfig, {"initial_sparsity": 0.2}),
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint's name or folder; without it, an installed all-MiniLM-L6-v2")
    add_task_options(parser)
    parser.add_argument("--kind", choices=KINDS, default="ln", help="default ln")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps; default 200")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per step and process; default 16")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step; default 1")
    parser.add_argument("--lr", type=float, default=1e-3, help="default 1e-3")
    parser.add_argument("--bf16", action="store_true", help="the base in bfloat16; head and deltas are float32")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/several_processes"), help="default runs/several_processes"
    )
    return parser.parse_args(argv)


def tune(base: nn.Module, kind: str, batches: DataLoader) -> Any:
    """An adapter around the base, in every process the same; the head in float32."""
    config, options = KINDS[kind]
    model = get_peft_model(base, config(task_type="SEQ_CLS", **options))
    for name, parameter in model.named_parameters():
        # In half precision it would not learn either; and FSDP wants one dtype among what is trained in a unit.
        if ".modules_to_save." in name:
            parameter.data = parameter.data.float()
    if kind == "fisher":
        fit_fisher_masks(model, batches)
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and save once."""
    args = parse_args(argv)
    quiet()
    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate)
    set_seed(args.seed)
    with accelerator.main_process_first():
        task, checkpoint = task_or_demo(args)
    base = load_base(task, checkpoint, args.seed)
    loader = DataLoader(task.train, args.batch_size, shuffle=True, collate_fn=task.collator)
    loader = accelerator.prepare(loader)
    precision = partial(torch.autocast, accelerator.device.type, torch.bfloat16, enabled=args.bf16)
    with precision():
        model = tune(base.bfloat16() if args.bf16 else base, args.kind, loader)
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)  # what is trained gets units of its own
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], args.lr, weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)

    model.train()
    losses: list[float] = []
    with tqdm(total=args.steps, unit="step", disable=not accelerator.is_main_process) as bar:
        while len(losses) < args.steps:
            for batch in loader:
                with accelerator.accumulate(model), precision():
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    losses.append(accelerator.reduce(loss.detach(), "mean").item())
                    bar.update(1)
                    bar.set_postfix(loss=f"{losses[-1]:.3f}")
                if len(losses) == args.steps:
                    break

    state = accelerator.get_state_dict(model)  # whole tensors, in the main process where they are sharded
    accelerator.unwrap_model(model).save_pretrained(
        args.out / args.kind, state_dict=state, is_main_process=accelerator.is_main_process
    )
    accelerator.wait_for_everyone()
    accelerator.print(
        f"{accelerator.num_processes} processes, loss {losses[0]:.3f} to {losses[-1]:.3f}: {args.out / args.kind}"
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
