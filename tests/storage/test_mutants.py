"""Damaged files of every kind through every loader: none lets in another answer, ends unclear, or leaves a trace.

Equal or refused: a field that decides nothing, such as where the base model is, may change.
"""

import copy
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import peft_lntune as ln
from peft_lntune import AdapterBank, PeftLNTuneError
from peft_lntune.interop import from_stock, to_stock
from tests import adapted
from tests.plugin.saved import build_base, mask_half
from tests.storage import mutants

SEED = 13
FAMILY = "bert-classifier"

CONFIGS: dict[str, Callable[[], Any]] = {
    "ln": lambda: ln.LNTuningConfig(task_type="SEQ_CLS"),
    "masked": lambda: ln.FisherLNConfig(task_type="SEQ_CLS"),
    "module": lambda: ln.ModuleTuningConfig(task_type="SEQ_CLS", components=["query", "ffn_up"]),
    "supermask": lambda: ln.SupermaskConfig(task_type="SEQ_CLS", components=["query", "key"], save_scores=True),
    "bottleneck": lambda: ln.BottleneckConfig(task_type="SEQ_CLS", bottleneck_size=3, scale=2.0, init_weights=False),
    "prefix": lambda: ln.PrefixConfig(task_type="SEQ_CLS", num_virtual_tokens=3, reparametrize=4),
    "unified": lambda: ln.UnifiedConfig(task_type="SEQ_CLS", preset="mha-adapter+ln+lora", init_weights=False),
}
BANKED = ("ln", "masked")

pytestmark = [
    # What a damaged config may rightly say: unknown fields, PEFT's own words about keys, and a bf16 file.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


# What there is to load, and what it says.


@dataclass
class Good:
    """The folders with whole adapters, a bank of them, and the answer of each."""

    root: Path
    base: nn.Module
    answers: dict[str, Tensor]

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.base)


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    return model.eval()(**adapted.inputs(FAMILY)).logits


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    root = tmp_path_factory.mktemp("mutants")
    build_base().save_pretrained(root / "base")
    base = build_base(root / "base")
    found = Good(root, base, {})
    bank = AdapterBank(base, capacity=4)
    for seed, (kind, config) in enumerate(CONFIGS.items()):
        for name in (kind, f"{kind}-other"):
            model = get_peft_model(found.fresh(), config())
            if kind == "masked":
                mask_half(model, "default", seed)
            adapted.fill(model, "default", seed=seed + 100 * (name != kind))
            model.save_pretrained(str(root / name))
            found.answers[name] = answer(PeftModel.from_pretrained(found.fresh(), root / name))
            if kind in BANKED:
                bank.add(name, root / name)
    bank.save(root / "bank.safetensors")
    stock = get_peft_model(found.fresh(), ln.LNTuningConfig(task_type="SEQ_CLS"))
    adapted.fill(stock, "default", seed=7)
    to_stock(stock, root / "stock")
    found.answers["stock"] = answer(from_stock(found.fresh(), root / "stock"))
    unified = found.fresh()
    get_peft_model(unified, LoraConfig(**LORA)).save_pretrained(str(root / "lora"))
    found.answers["lora"] = load_lora(with_lora(found.fresh()), root / "lora")
    return found


LORA: dict[str, Any] = {"target_modules": ["query"], "r": 2, "init_lora_weights": False}


def with_lora(base: nn.Module) -> PeftModel:
    """A model with a LoRA part, to load PEFT's own files into."""
    return get_peft_model(base, ln.UnifiedConfig(parts=[ln.LNTuningConfig(), LoraConfig(**LORA)]))


def second(base: nn.Module) -> PeftModel:
    """A model that has an adapter of its own already."""
    model = get_peft_model(base, ln.LNTuningConfig(task_type="SEQ_CLS"), adapter_name="first")
    adapted.fill(model, "first", seed=50)
    return model


# Loaders. Each is the model to load into, and the call, which gives the answer.


def load_second(model: Any, folder: Path) -> Tensor:
    model.load_adapter(str(folder), "other")
    model.set_adapter("other")
    return answer(model)


def load_native(model: Any, folder: Path) -> Tensor:
    model.load_adapter(str(folder))
    return answer(model)


def load_lora(model: Any, folder: Path) -> Tensor:
    ln.load_lora(model, folder)
    return answer(model)


def load_auto(model: Any, folder: Path) -> Tensor:
    return answer(AutoPeftModelForSequenceClassification.from_pretrained(str(folder)))


def load_into_bank(bank: AdapterBank, folder: Path) -> Tensor:
    bank.add("mutant", folder)
    try:
        return routed(bank, "mutant")
    finally:
        bank.remove("mutant")


def open_bank(model: nn.Module, file: Path) -> dict[str, Tensor]:
    bank = AdapterBank.open(file, model, capacity=4)
    bank.load()
    return {name: routed(bank, name) for name in bank.names}


def routed(bank: AdapterBank, name: str) -> Tensor:
    bank.attach()
    try:
        with torch.no_grad(), bank.route(name):
            return bank._base(**adapted.inputs(FAMILY)).logits
    finally:
        bank.detach()


LOADERS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any, Path], Any]]] = {
    "from_pretrained": (lambda base: base, lambda model, path: answer(PeftModel.from_pretrained(model, path))),
    "load_adapter": (second, load_second),
    "native": (lambda base: base, load_native),
    "auto": (lambda base: base, load_auto),
    "bank": (lambda base: AdapterBank(base, capacity=4), load_into_bank),
    "open": (lambda base: base, open_bank),
    "stock": (lambda base: base, lambda model, path: answer(from_stock(model, path))),
    "lora": (with_lora, load_lora),
}


# What a refusal must leave as it was.


def trace(target: Any) -> dict[str, Any]:
    """All that loading could change, as identities and versions, which are cheap to compare."""
    if isinstance(target, AdapterBank):
        return {**trace(target._base), "bank": (target.names, sorted(target._heads.held))}
    tensors = {**dict(target.named_parameters()), **dict(target.named_buffers())}
    return {
        "modules": [(n, id(m), m.training, sorted(vars(m)), len(m._forward_hooks)) for n, m in target.named_modules()],
        "tensors": [(n, id(t), t._version, t.requires_grad) for n, t in tensors.items()],
        "configs": [(n, id(c), repr(c)) for n, c in (getattr(target, "peft_config", None) or {}).items()],
        "native": getattr(target, "_hf_peft_config_loaded", False),
        "names": list(target.state_dict()),
    }


@dataclass
class Verdicts:
    """Counts, and what went wrong with the mutant that it went wrong with."""

    counts: Counter[str]
    faults: list[str]

    def judge(self, loader: str, kind: str, said: str, fault: str | None, how: str) -> None:
        self.counts[f"{loader}: {how}"] += 1
        if fault:
            self.faults.append(f"{loader} {kind}: {said}: {fault}")


@contextmanager
def mutant(good: Path, drawn: random.Random, mutations: tuple[mutants.Mutation, ...]) -> Iterator[tuple[Path, str]]:
    place = good.parent / "mutant"
    (shutil.copytree if good.is_dir() else shutil.copy)(good, place)
    try:
        yield place, drawn.choice(mutations)(drawn, place)
    finally:
        shutil.rmtree(place) if place.is_dir() else place.unlink()


def run(good: Good, loader: str, kinds: tuple[str, ...], number: int, verdicts: Verdicts) -> None:
    build, load = LOADERS[loader]
    drawn = random.Random(f"{SEED} {loader}")
    target, before = None, None
    for count in range(number):
        kind = kinds[count % len(kinds)]
        if target is None:
            target = build(good.fresh())
            before = trace(target)
        whole = good.root / ("bank.safetensors" if loader == "open" else kind)
        mutations = mutants.FILE if loader == "open" else mutants.FOLDER
        if (other := good.root / f"{kind}-other").is_dir() and loader != "open":
            mutations = (*mutations, mutants.take_file_of(other))
        with mutant(whole, drawn, mutations) as (place, said):
            try:
                found = load(target, place)
            except PeftLNTuneError as error:
                fault = None if len(str(error)) > 20 else f"unclear: {error!r}"
                if trace(target) != before:
                    fault, target = "left a trace", None
                verdicts.judge(loader, kind, said, fault, "refused")
                continue
            except Exception as error:
                verdicts.judge(loader, kind, said, f"ended unclear: {error!r}"[:200], "unclear")
                target = None
                continue
        same = is_same(good, loader, kind, found)
        verdicts.judge(loader, kind, said, None if same else "another answer", "equal" if same else "another")
        target = None if loader not in ("auto", "bank", "open") else target
    model = build(good.fresh()) if target is None else target
    whole = good.root / ("bank.safetensors" if loader == "open" else kinds[0])
    assert is_same(good, loader, kinds[0], load(model, whole))  # a good file loads under that name


def is_same(good: Good, loader: str, kind: str, found: Any) -> bool:
    """Whether a model says bit for bit what it says with the whole adapter."""
    if loader == "lora":  # PEFT's own file: nothing in it says what its values were
        return bool(found.isfinite().all())
    if isinstance(found, dict):
        whole = {name for name in good.answers if name.removesuffix("-other") in BANKED}
        return found.keys() == whole and all(is_same(good, "bank", name, own) for name, own in found.items())
    if loader == "bank":  # by row a norm is computed another way: float32, and four digits of what is near 1
        return torch.allclose(good.answers[kind], found, rtol=1e-4, atol=1e-5)
    return torch.equal(good.answers[kind], found)


def run_all(good: Good, numbers: dict[str, int]) -> Verdicts:
    verdicts = Verdicts(Counter(), [])
    for loader, number in numbers.items():
        kinds = {"bank": BANKED, "open": ("bank",), "stock": ("stock",), "lora": ("lora",)}.get(loader, tuple(CONFIGS))
        run(good, loader, kinds, number, verdicts)
    print("", *sorted(f"{what}: {count}" for what, count in verdicts.counts.items()), sep="\n")
    return verdicts


def test_some_mutants(good: Good) -> None:
    numbers = {"from_pretrained": 49, "load_adapter": 14, "native": 28, "auto": 7}
    verdicts = run_all(good, {**numbers, "bank": 20, "open": 20, "stock": 6, "lora": 6})
    assert verdicts.faults == []
    assert verdicts.counts.total() == 150


@pytest.mark.full
def test_three_thousand_mutants(good: Good) -> None:
    numbers = {"from_pretrained": 980, "load_adapter": 420, "native": 560, "auto": 140}
    verdicts = run_all(good, {**numbers, "bank": 400, "open": 400, "stock": 200, "lora": 200})
    assert verdicts.faults == []
    assert verdicts.counts.total() >= 3000
