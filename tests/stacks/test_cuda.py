"""What only a GPU can show: fused optimizers, backward passes in threads of autograd, kernels without a CPU version.

Without a GPU every test here is skipped. `python -m pytest tests/stacks/test_cuda.py` on a machine with one takes a
minute.
"""

import copy
import threading
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import peft_lntune as lt
from peft_lntune.errors import RoutingError
from tests import adapted, cases

try:
    import triton
    import triton.language as tl

    @triton.jit
    def _rms_kernel(x_ptr, w_ptr, y_ptr, n, BLOCK: tl.constexpr):  # noqa: N803  # Triton's own spelling of constants
        row = tl.program_id(0)
        cols = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * n + cols, mask=cols < n, other=0.0)
        w = tl.load(w_ptr + cols, mask=cols < n, other=0.0)
        rate = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n + 1e-6)
        tl.store(y_ptr + row * n + cols, x * rate * w, mask=cols < n)
except ImportError:  # its wheels come with torch's CUDA builds only
    triton = None

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FAMILIES = ["bert", "gpt2", "llama", "gemma", "t5", "qwen3"]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
"""Relative to the largest output: kernels of other shapes sum in another order; the halves also round every output."""


def on_gpu(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cuda() for name, value in batch.items()}


def logits_of(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    found = model(**batch, **options)
    return found.logits if hasattr(found, "logits") else found[0]


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert (found - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()


def adapted_family(family: str, dtype: torch.dtype = torch.float32, count: int = 1) -> PeftModel:
    model = adapted.build(family, dtype).cuda()
    peft_model = get_peft_model(model, lt.LNTuningConfig(init_weights=False), adapter_name="a0")
    for number in range(1, count):
        peft_model.add_adapter(f"a{number}", lt.LNTuningConfig(init_weights=False))
    return peft_model.cuda().eval()


@pytest.mark.parametrize(
    "optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad], ids=lambda o: o.__name__
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_evaluation_sees_every_step_of_a_fused_optimizer(family: str, optimizer: Any) -> None:
    model = adapted_family(family)
    batch = on_gpu(adapted.inputs(family))
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        steps = optimizer(trained, lr=5e-2, fused=True)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch has no such fused optimizer on a GPU: {error}")
    with torch.no_grad():
        before = logits_of(model, batch)
    for _ in range(3):
        logits_of(model, batch).square().mean().backward()
        steps.step()
        steps.zero_grad()
        with torch.no_grad():
            now = logits_of(model, batch)
        assert_close(now, logits_of(model, batch).detach(), torch.float32)
        assert not torch.equal(now, before)
        before = now


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_entry_moves_over_a_base_in_half_precision(family: str, dtype: torch.dtype) -> None:
    model = get_peft_model(adapted.build(family, dtype).cuda(), lt.LNTuningConfig())
    batch = on_gpu(adapted.inputs(family, dtype))
    base = logits_of(model, batch).detach()
    with model.disable_adapter():
        assert torch.equal(base, logits_of(model, batch))
    deltas = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(deltas.values(), lr=1e-4, fused=True)
    for _ in range(3):
        (logits_of(model, batch).float().square().mean() * 64).backward()
        optimizer.step()
        optimizer.zero_grad()
    still = {name: int((p == 0).sum()) for name, p in deltas.items()}
    assert sum(still.values()) <= 0.02 * sum(p.numel() for p in deltas.values()), still


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_is_its_rows_alone(family: str, dtype: torch.dtype) -> None:
    model = adapted_family(family, dtype, count=2)
    batch = on_gpu(adapted.inputs(family, dtype, batch=4))
    names = ["a1", "a0", "__base__", "a1"]
    with torch.no_grad():
        mixed = logits_of(model, batch, adapter_names=names)
        for row, name in enumerate(names):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            if name == "__base__":
                with model.disable_adapter():
                    wanted = logits_of(model, one)
            else:
                model.set_adapter(name)
                wanted = logits_of(model, one)
            assert_close(mixed[row : row + 1].float(), wanted.float(), dtype)


@pytest.mark.parametrize("reentrant", [True, False])
def test_many_tasks_learn_the_same_with_checkpointing(reentrant: bool) -> None:
    """On a GPU the backward pass runs in a thread of autograd's, and so does all that checkpointing computes again."""

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(
            adapted.build("llama").cuda(), lt.LNTuningConfig(task_type="CAUSAL_LM"), adapter_name="a"
        )
        model.add_adapter("b", lt.LNTuningConfig(task_type="CAUSAL_LM"))
        if checkpointing:
            new = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.2x on
            (new or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        batch = on_gpu(adapted.inputs("llama", batch=4))
        batch["labels"] = batch["input_ids"]
        with lt.ManyTasks(model) as tasks:
            optimizer = tasks.optimizer(torch.optim.SGD, lr=0.1)
            for _ in range(2):
                with tasks.route(["a", "b", "a", "b"]):
                    losses = tasks.losses(model(**batch), batch)
                sum(losses.values()).backward()
                optimizer.step()
                optimizer.zero_grad()
        return {n: p.detach().clone() for n, p in model.named_parameters() if "lntune" in n}

    wanted, found = gradients(False), gradients(True)
    assert any(value.abs().max() > 0 for value in wanted.values())
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= 1e-5 * max(1.0, value.abs().max().item()), name


def test_a_bank_serves_rows_on_the_gpu_beside_other_threads() -> None:
    donor = adapted_family("llama", count=2)
    base = adapted.build("llama").cuda().eval()
    bank = lt.AdapterBank(base)
    for name in ("a0", "a1"):
        bank.add(name, (donor, name))
    batch = on_gpu(adapted.inputs("llama", batch=3))
    wanted = {}
    with torch.no_grad():
        plain = logits_of(base, batch)
        for name in ("a0", "a1"):
            donor.set_adapter(name)
            wanted[name] = logits_of(donor, batch)
    bank.attach()
    wrong: list[str] = []
    stop = threading.Event()

    def forward_without_route() -> None:
        while not stop.is_set():
            try:
                with torch.no_grad():
                    found = logits_of(base, batch)
            except RoutingError:
                continue
            if (found - plain).abs().max() > TOLERANCE[torch.float32] * plain.abs().max():
                wrong.append("a forward without a route was not the base model's")

    beside = threading.Thread(target=forward_without_route)
    beside.start()
    try:
        for _ in range(40):
            with torch.no_grad(), bank.route(["a0", "a1", "__base__"]):
                found = logits_of(base, batch)
            assert_close(found[0], wanted["a0"][0], torch.float32)
            assert_close(found[1], wanted["a1"][1], torch.float32)
            assert_close(found[2], plain[2], torch.float32)
    finally:
        stop.set()
        beside.join()
    assert not wrong


def test_a_kernel_without_a_cpu_version_is_tried_on_its_own_device() -> None:
    if triton is None:
        pytest.skip("needs Triton")

    class KernelNorm(nn.Module):
        """An RMSNorm in Triton, forward alone."""

        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(size))

        def forward(self, x: Tensor) -> Tensor:
            flat = x.contiguous().reshape(-1, x.shape[-1])
            y = torch.empty_like(flat)
            _rms_kernel[(len(flat),)](flat, self.weight, y, x.shape[-1], BLOCK=triton.next_power_of_2(x.shape[-1]))
            return y.reshape(x.shape)

    model = nn.Sequential(nn.Linear(16, 16), KernelNorm(16), nn.Linear(16, 16)).cuda()
    assert list(lt.find_norms(model)) == ["1"]
    x = torch.randn(3, 5, 16, device="cuda")
    with torch.no_grad():
        plain = model(x)
        tuned = get_peft_model(copy.deepcopy(model), lt.LNTuningConfig(init_weights=False, tune="weight")).eval()
        merged = copy.deepcopy(tuned).merge_and_unload()
        assert_close(tuned(x), merged(x), torch.float32)
        assert not torch.equal(tuned(x), plain)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prefixes_behind_attention_kernels(attention: str) -> None:
    config = hf.LlamaConfig(
        vocab_size=cases.VOCAB, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    base = hf.LlamaForCausalLM(config).cuda().bfloat16().eval()
    model = get_peft_model(base, lt.PrefixConfig(num_virtual_tokens=4, init_weights=False)).eval()
    ids = torch.randint(3, cases.VOCAB, (2, 9), device="cuda")
    with torch.no_grad():
        found = model(input_ids=ids).logits
        wide = copy.deepcopy(model).float()
        wanted = wide(input_ids=ids).logits
        with model.disable_adapter():
            assert not torch.equal(model(input_ids=ids).logits, found)
    assert_close(found.float(), wanted, torch.bfloat16)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_compiled_model_follows_training(family: str) -> None:
    model = adapted_family(family)
    batch = on_gpu(adapted.inputs(family))
    compiled = torch.compile(model)
    delta = next(p for p in model.parameters() if p.requires_grad)
    for _ in range(2):
        with torch.no_grad():
            assert_close(logits_of(compiled, batch), logits_of(model, batch), torch.float32)
            delta.data.add_(0.5)
