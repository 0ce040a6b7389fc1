"""What each of several processes does: train every kind of adapter in every way of wrapping a model, and save it once.

The first process writes, for each case, the directory of the adapter and what it saw of dtypes; the tests compare these
with what one process has written. Accelerate puts FSDP to work on accelerators alone, so here it is torch's own.
"""

import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.utils.data import DataLoader

from peft_lntune import (
    FisherLNConfig,
    LNTuningConfig,
    ModuleTuningConfig,
    PrefixConfig,
    SupermaskConfig,
    UnifiedConfig,
    fit_fisher_masks,
)

WAYS = ("ddp", "fsdp1", "fsdp2")
ZERO = ("zero2", "zero3")  # of DeepSpeed, where it is installed
STEPS, BATCH, ROWS = 3, 8, 28  # rows of the runs with accelerate: their last batch is a short one

CASES: dict[str, Callable[[], Any]] = {
    "ln": lambda: LNTuningConfig(task_type="SEQ_CLS"),
    "fisher": lambda: FisherLNConfig(task_type="SEQ_CLS", density=0.3, num_samples=32),
    "some layers": lambda: LNTuningConfig(task_type="SEQ_CLS", layers_to_transform=[1], roles=["ffn"]),
    "modules": lambda: ModuleTuningConfig(task_type="SEQ_CLS", components=["query", "norm"]),
    "supermask": lambda: SupermaskConfig(task_type="SEQ_CLS", initial_sparsity=0.2, save_scores=True),
    "unified": lambda: UnifiedConfig(task_type="SEQ_CLS", preset="prefix+mha-adapter+ln+lora"),
    "network": lambda: PrefixConfig(task_type="SEQ_CLS", num_virtual_tokens=3, reparametrize=4),
}
ACCELERATED: dict[str, dict[str, Any]] = {
    "accumulated": {"gradient_accumulation_steps": 2},
    "mixed precision": {"mixed_precision": "bf16"},
}


def build_base(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same tiny model in every process."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.BertConfig(**sizes, vocab_size=50, num_labels=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    return hf.BertForSequenceClassification(config).to(dtype)


def draw_batches(count: int, rows: int) -> list[dict[str, Tensor]]:
    """The same batches in every process."""
    drawn = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(1, 50, (rows, 6), generator=drawn),
            "labels": torch.randint(3, (rows,), generator=drawn),
        }
        for _ in range(count)
    ]


def share(batch: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """The rows of a batch that are this process's."""
    return {name: rows.chunk(world)[rank] for name, rows in batch.items()}


SENT: list[int] = []
"""Bytes of each bucket of gradients that DDP has exchanged in this process."""


def count_bytes(sent: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's own exchange, counted."""
    sent.append(bucket.buffer().nbytes)
    return allreduce_hook(dist.group.WORLD, bucket)


def wrap(way: str, model: PeftModel) -> nn.Module:
    """A model as a trainer of several processes would have it."""
    if way == "one":
        return model
    if way == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped.register_comm_hook(SENT, count_bytes)
        return wrapped
    if way == "fsdp1":
        policy = fsdp_auto_wrap_policy(model)
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    base: Any = model.get_base_model()
    # The head apart: what is trained in one unit has one dtype, and a head has that of the base.
    for unit in (*base.bert.encoder.layer, base.classifier, model):
        fully_shard(unit, mesh=mesh)
    return model


def prepare(way: str, model: PeftModel) -> tuple[nn.Module, Callable[[Tensor], Any]]:
    """A model as a trainer of several processes would have it, and what makes a step from a loss."""
    if way in ZERO:
        import deepspeed  # not among the requirements

        deepspeed.init_distributed("gloo")
        tuned = [p for p in model.parameters() if p.requires_grad]
        sharding = {
            "stage": int(way[-1]),
            "stage3_param_persistence_threshold": 0,  # or what is small is not sharded
            "stage3_gather_16bit_weights_on_model_save": True,
        }
        options = {"train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(), "zero_optimization": sharding}
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(tuned, lr=1e-2), config=options)

        def step_in_shares(loss: Tensor) -> None:
            engine.backward(loss)
            engine.step()

        return engine, step_in_shares
    wrapped = wrap(way, model)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)

    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return wrapped, step


def whole_state(way: str, wrapped: nn.Module) -> dict[str, Any]:
    """The state dict with whole tensors, in every process."""
    if way == "fsdp1":
        whole = FullStateDictConfig(rank0_only=False)
        with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT, whole):
            return wrapped.state_dict()
    if way == "fsdp2":
        return get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    if way == "zero3":
        found: dict[str, Any] = wrapped._zero3_consolidated_16bit_state_dict()  # as accelerate asks for it
        return found
    return getattr(wrapped, "module", wrapped).state_dict()


def train(way: str, case: str, folder: Path, rank: int, world: int, dtype: torch.dtype = torch.float32) -> None:
    """Train one adapter and save it, the first process alone writing."""
    torch.manual_seed(2)
    model = get_peft_model(build_base(dtype), CASES[case]())
    batches = [share(batch, rank, world) for batch in draw_batches(STEPS, BATCH)]
    if case == "fisher":
        fit_fisher_masks(model, batches)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    SENT.clear()
    wrapped, make_step = prepare(way, model)
    wrapped.train()
    for step, batch in enumerate(batches):
        torch.manual_seed(step)  # supermasks are drawn: here, for the comparison, in all processes alike
        make_step(wrapped(**batch).loss)
    trained = [p for p in model.parameters() if p.requires_grad]
    state = whole_state(way, wrapped)
    model.save_pretrained(folder, state_dict=state, is_main_process=rank == 0)
    if rank != 0:
        return  # DeepSpeed gives whole tensors to the first process alone
    dtypes = {name: str(value.dtype) for name, value in state.items() if value.is_floating_point()}
    seen = {
        "trained": sorted({str(p.dtype) for p in wrapped.parameters() if p.requires_grad}),
        "deltas": sorted({dtype for name, dtype in dtypes.items() if ".lntune_" in name}),
        "sent a step": sum(SENT) / STEPS,
        "bytes trained": sum(p.numel() * p.element_size() for p in trained),
        "frozen as before": all(torch.equal(state[name], value) for name, value in before.items()),
    }
    (folder / "seen.json").write_text(json.dumps(seen))


def train_accelerated(case: str, folder: Path) -> None:
    """The usual loop of accelerate, with a last batch of fewer rows."""
    shared = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(cpu=True, dataloader_config=shared, **ACCELERATED[case])
    torch.manual_seed(2)
    model = get_peft_model(build_base(), CASES["ln"]())
    (every,) = draw_batches(1, ROWS)
    rows = [{name: values[row] for name, values in every.items()} for row in range(ROWS)]
    if accelerator.num_processes == 1:
        rows += rows[: -ROWS % BATCH]  # as accelerate fills up a short batch where several processes share it
    loader: Any = DataLoader(rows, batch_size=BATCH)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        folder, is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(model)
    )


def run(rank: int, world: int, port: int, folder: str, ways: Sequence[str], accelerated: Sequence[str]) -> None:
    """Everything, in one process of `world`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    if world > 1:
        os.environ.update({name: str(value) for name, value in address.items()})
    root = Path(folder)
    for case in accelerated:
        AcceleratorState._reset_state()  # it is one for a whole process, and the two runs differ in it
        train_accelerated(case, root / case)
    for way in ways:
        for case in CASES:
            train(way, case, root / f"{case}-{way}", rank, world)
        if way not in ZERO:  # there a head becomes float32, and needs autocast
            train(way, "ln", root / f"bf16-{way}", rank, world, torch.bfloat16)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def launch(world: int, folder: Path, ways: Sequence[str] = WAYS, accelerated: Sequence[str] = (*ACCELERATED,)) -> None:
    """Run `world` processes to their end; one alone has one way."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ways = ways if world > 1 else ("one",)
    torch.multiprocessing.spawn(run, args=(world, port, str(folder), ways, accelerated), nprocs=world)


if __name__ == "__main__":
    start = time.perf_counter()
    launch(int(sys.argv[1]), Path(sys.argv[2]))
    print(f"{time.perf_counter() - start:.1f} s")
