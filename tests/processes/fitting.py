"""What `fit_fisher_masks` does in one of two processes when they are not alike; run by `test_fitting`."""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf
from peft import get_peft_model

from peft_lntune import FisherLNConfig, fit_fisher_masks

SLOW = timedelta(seconds=60)


def batches(count: int, label: Any = 1) -> list[dict[str, torch.Tensor]]:
    ids = torch.arange(10).view(2, 5) % 9
    return [{"input_ids": ids, "labels": torch.tensor([0, label])} for _ in range(count)]


def broken() -> Any:
    yield batches(1)[0]
    raise OSError("the disk is gone")


# By name: the options of the config, and the batches, of a process by its rank.
SCENARIOS: dict[str, Any] = {
    "alike": lambda rank: ({"num_samples": 4}, batches(1)),
    "a sample for one alone": lambda rank: ({"num_samples": 1}, batches(1)),
    "batches for one alone": lambda rank: ({"num_samples": 4}, batches(1 - rank)),
    "no batches": lambda rank: ({"num_samples": 4}, []),
    "one raises": lambda rank: ({"num_samples": 8}, broken() if rank else batches(2)),
    "one has no labels": lambda rank: (
        {"num_samples": 4},
        [{"input_ids": torch.ones(2, 5, dtype=torch.long)}] if rank else batches(1),
    ),
    "densities differ": lambda rank: ({"num_samples": 4, "density": 0.25 + 0.25 * rank}, batches(1)),
    "one is not active": lambda rank: ({"num_samples": 4}, batches(1)),
}


def model(**options: Any) -> Any:
    torch.manual_seed(0)
    config = hf.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    base = hf.BertForSequenceClassification(config)
    return get_peft_model(base, FisherLNConfig(task_type="SEQ_CLS", **{"density": 0.25, **options}))


def fitted(scenario: str, rank: int) -> list[Any]:
    """What came of it: `["masks", ...]`, or the name of the error and what it says."""
    options, given = SCENARIOS[scenario](rank)
    peft_model = model(**options)
    if scenario == "one is not active" and rank:
        peft_model.add_adapter("other", FisherLNConfig(task_type="SEQ_CLS"))
        peft_model.set_adapter("other")
    try:
        fit = fit_fisher_masks(peft_model, given)
    except Exception as error:
        untouched = peft_model.peft_config["default"].mask_source is None
        return [type(error).__name__, str(error), untouched]
    return ["masks", fit.samples, {name: mask.tolist() for name, mask in fit.masks.items()}]


def main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meeting", SLOW, 2, rank)
    found = {scenario: fitted(scenario, rank) for scenario in SCENARIOS}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
