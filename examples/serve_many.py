"""Serve the adapters of many tasks over HTTP, from one model: texts of different tasks share a forward pass.

    pip install -e '.[examples,serve]'
    python examples/serve_many.py --adapters runs/adapters                           # all-MiniLM-L6-v2 and port 8000
    curl -X POST localhost:8000/classify -d '{"task": "sentiment", "texts": ["The soup was cold."]}'

The folder contains one directory per task, as `save_pretrained` writes it (`runs/adapters/sentiment`), all with heads
for the same number of labels. Ray Serve gathers the batches, runs the replicas and watches them; FastAPI is the
interface. Ctrl+C or SIGTERM stops the server after it has answered all accepted requests. On several machines,
`serve run serve_many:build adapters=/shared/adapters` does the same on a Ray cluster (docs/server.md). There is no
authentication: put it behind a server that has it.
"""

import argparse
import asyncio
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import torch
import transformers
from adapter_store import AdapterStore, Heads, Loaded, RefusedError, Requests
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, ValidationError
from ray import serve
from ray.serve.metrics import Counter, Gauge, Histogram
from ray.serve.schema import LoggingConfig
from starlette.requests import ClientDisconnect
from task_data import errors_as_text
from torch import nn
from training import default_model, load_tokenizer, quiet
from transformers import AutoConfig, AutoModelForSequenceClassification

from peft_lntune import AdapterBank
from peft_lntune.errors import DataError

CHARACTERS = 20  # a token is rarely longer; a text with more characters per token is not tokenized at all
Tokens = dict[str, list[int]]

log = logging.getLogger("ray.serve")


class Settings(BaseModel):
    """What can be set, on the command line or as arguments of `serve run serve_many:build`."""

    adapters: Path = Field(description="a folder with a directory for each task; on all machines the same")
    model: str = Field("", description="a checkpoint's name or folder; without it, an installed all-MiniLM-L6-v2")
    num_labels: int = Field(2, ge=1, description="labels of every task's head")
    max_tokens: int = Field(256, ge=1, description="longest text in tokens")
    max_batch: int = Field(32, ge=1, description="texts of a batch, and of a request")
    max_wait: float = Field(5.0, ge=0, description="milliseconds a text waits for others to share a batch with")
    memory: int = Field(1000, ge=1, description="megabytes of adapters in a replica; rarely used ones are dropped")
    max_body: int = Field(1_000_000, ge=1, description="bytes of a request")
    max_texts: int = Field(1024, ge=1, description="texts that may wait in a replica; beyond, the answer is 503")
    max_texts_per_task: int = Field(256, ge=1, description="of one task; beyond, the answer is 429")
    max_requests: int = Field(512, ge=1, description="open requests of a replica; beyond, the answer is 503")
    max_seconds: float = Field(30.0, gt=0, description="for a request to arrive (else 408), and to be answered (503)")
    refresh: float = Field(2.0, gt=0, description="seconds between looks at the files of loaded adapters")
    replicas: int = Field(1, ge=1, description="copies of the model at most; their number follows the load")
    cpus: float = Field(1.0, ge=0, description="cores of a replica")
    gpus: float = Field(0.0, ge=0, description="GPUs of a replica; a fraction shares one")
    labelled_tasks: int = Field(100, ge=0, description="tasks with a label of their own in metrics; others: 'other'")
    log_dir: str = Field("", description="folder for logs in JSON lines; without it, Ray's own for this session")
    host: str = Field("127.0.0.1", description="address to listen on; by default this machine alone")
    port: int = Field(8000, ge=0, le=65535, description="port of the interface")
    metrics_port: int = Field(8080, ge=0, le=65535, description="port of /metrics, for Prometheus")


class Question(BaseModel):
    """The body of a request: texts of one task."""

    task: str
    texts: list[str] = Field(min_length=1)


class Answer(BaseModel):
    """For each text the number of its label and the probabilities of all labels; the version of the adapter."""

    labels: list[int]
    scores: list[list[float]]
    version: str


app = FastAPI(title="serve_many")
Body = {"requestBody": {"content": {"application/json": {"schema": Question.model_json_schema()}}, "required": True}}


@app.exception_handler(RefusedError)
async def refused(_: Request, error: RefusedError) -> JSONResponse:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse({"detail": error.reason}, error.status, headers)


async def read_body(request: Request, settings: Settings) -> bytes:
    """The body of a request, within the limits of size and time.

    Raises:
        RefusedError: 413 it is too large, 408 it came too slowly, 400 the client has gone.
    """
    too_large = RefusedError(413, f"the body has more than {settings.max_body:,} bytes.")
    if int(request.headers.get("content-length", 0)) > settings.max_body:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.max_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > settings.max_body:
                    raise too_large
    except TimeoutError:
        raise RefusedError(408, f"the body did not arrive within {settings.max_seconds} seconds.") from None
    except ClientDisconnect:
        raise RefusedError(400, "the client has gone.") from None
    return bytes(body)


class Classifier:
    """The texts of a task -> their labels; one replica of the deployment.

    Args:
        settings: the settings.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        quiet()
        name = settings.model or default_model()
        self._tokenizer = load_tokenizer(name)
        transformers.set_seed(0)  # of the head, where an adapter brings none and the checkpoint has none
        self._model = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=settings.num_labels,
            ignore_mismatched_sizes=True,
            pad_token_id=self._tokenizer.pad_token_id,
        ).eval()
        self._model.to("cuda" if settings.gpus else "cpu")
        memory = settings.memory * 1_000_000
        self._bank = AdapterBank(self._model)
        if memory // self._bank.row_bytes > self._bank.capacity:  # a bank that grows needs both copies
            self._bank = AdapterBank(self._model, memory // self._bank.row_bytes)
        self._bank.attach()
        self._store = AdapterStore(self._bank, settings.adapters, memory, functools.partial(misfit, self._model))
        self._requests = Requests(settings.max_texts, settings.max_texts_per_task)
        self._busy_since, self._labelled = 0.0, set[str]()
        self._forwards = ThreadPoolExecutor(1, "forward")  # a model runs one routed forward at a time
        self._readers = ThreadPoolExecutor(1, "reader")  # of adapters
        self._parsers = ThreadPoolExecutor(1, "parser")  # of bodies; a fast tokenizer serves one thread at a time
        self._set_up_metrics()
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._watcher.start()
        self.batch.set_max_batch_size(settings.max_batch)
        self.batch.set_batch_wait_timeout_s(settings.max_wait / 1000)
        self._forward(["__base__"], self._tokens([self._tokenizer.unk_token or "a"]))  # memory and kernels

    # The interface.

    @app.post("/classify", openapi_extra=Body)
    async def classify(self, request: Request) -> Answer:
        began, task, status = time.monotonic(), "", 500
        try:
            with self._requests.entered():
                body = await read_body(request, self._settings)
                question, rows = await self._in(self._parsers, self._parse, body)
                async with asyncio.timeout(self._settings.max_seconds):
                    adapter = await self._lease(question.task)
                    task = question.task  # it exists
                    try:
                        with self._requests.admitted(task, len(rows)):
                            scores = await asyncio.gather(*(self.batch((adapter, row)) for row in rows))
                    finally:
                        self._store.release(adapter)
            status = 200
            return Answer(labels=[row.index(max(row)) for row in scores], scores=scores, version=adapter.version)
        except RefusedError as error:
            status = error.status
            raise
        except TimeoutError:
            status = 503
            reason = f"no answer within {self._settings.max_seconds} seconds: too many texts wait."
            raise RefusedError(503, reason, retry_after=1) from None
        finally:
            self._measure(task, status, time.monotonic() - began)

    @app.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        try:
            self.check_health()
        except RuntimeError as error:
            raise RefusedError(503, str(error)) from None
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz(self) -> dict[str, str]:
        if self._requests.closed:
            raise RefusedError(503, "the server is stopping.")
        return await self.healthz()

    @app.get("/state")
    async def state(self) -> dict[str, Any]:
        waiting, store = self._requests.texts, self._store
        return {"waiting": waiting, "tasks": store.tasks, "bad": store.bad, "bytes": store.nbytes}

    # What Ray Serve calls.

    @serve.batch
    async def batch(self, rows: list[tuple[Loaded, Tokens]]) -> list[list[float]]:
        """Texts of any tasks -> their probabilities, in one forward pass."""
        adapters, tokens = zip(*rows, strict=True)
        with self._store.held(adapters):  # a request whose client goes now gives its lease back at once
            return await self._in(self._forwards, self._forward, [each.name for each in adapters], tokens)

    def check_health(self) -> None:
        """Ray Serve replaces a replica that raises here."""
        if self._busy_since and time.monotonic() - self._busy_since > 2 * self._settings.max_seconds:
            raise RuntimeError(f"a forward pass has been running for over {2 * self._settings.max_seconds} seconds.")
        if not self._watcher.is_alive():
            raise RuntimeError("the thread that looks for changed adapters has ended.")

    async def drain(self) -> None:
        """Refuse new requests, and return when those accepted have been answered."""
        self._requests.closed = True
        while self._requests.open:
            await asyncio.sleep(0.05)

    # In other threads.

    async def _in(self, pool: ThreadPoolExecutor, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, function, *args)

    def _parse(self, body: bytes) -> tuple[Question, list[Tokens]]:
        try:
            question = Question.model_validate_json(body)
        except ValidationError as error:  # its own text repeats the input, which may be anything
            wrong = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'body'}: {each['msg']}" for each in error.errors())
            raise RefusedError(422, wrong[:1000]) from None
        if len(question.texts) > self._settings.max_batch:
            raise RefusedError(413, f"{len(question.texts)} texts in one request; {self._settings.max_batch} fit.")
        return question, self._tokens(question.texts)

    def _tokens(self, texts: Sequence[str]) -> list[Tokens]:
        most = self._settings.max_tokens
        for number, text in enumerate(texts):
            if len(text) > CHARACTERS * most:
                raise RefusedError(413, f"text {number} has {len(text):,} characters; {most} tokens fit.")
        cut: Any = self._tokenizer(list(texts))
        for number, ids in enumerate(cut["input_ids"]):
            if len(ids) > most:
                raise RefusedError(413, f"text {number} has {len(ids):,} tokens; {most} fit.")
        return [{key: cut[key][number] for key in cut} for number in range(len(texts))]

    async def _lease(self, task: str) -> Loaded:
        while (adapter := self._store.lease(task)) is None:
            await self._in(self._readers, self._store.load, task)
        return adapter

    @torch.no_grad()
    def _forward(self, names: Sequence[str], rows: Sequence[Tokens]) -> list[list[float]]:
        self._busy_since = time.monotonic()
        try:
            batch = self._tokenizer.pad(list(rows), return_tensors="pt").to(self._model.device)
            with self._bank.route(list(names)):
                scores: list[list[float]] = self._model(**batch).logits.float().softmax(-1).tolist()
            return scores
        finally:
            self._busy_since = 0.0

    def _watch(self) -> None:
        while True:
            time.sleep(self._settings.refresh)
            try:
                self._store.refresh()
            except Exception:  # a disk that fails now may be back next time
                log.exception("the adapters cannot be compared with their files")
            for name, value in [("waiting", self._requests.texts), ("adapters", len(self._bank))]:
                self._gauges[name].set(value)
            self._gauges["bytes"].set(self._store.nbytes)

    # Metrics: Ray Serve adds its own, such as the sizes of batches, and the replica to each.

    def _set_up_metrics(self) -> None:
        self._gauges = {
            "waiting": Gauge("lntune_waiting_texts", "Texts that wait or are being answered."),
            "adapters": Gauge("lntune_adapters", "Adapters in memory."),
            "bytes": Gauge("lntune_adapter_bytes", "Bytes of the adapters in memory."),
        }
        self._answers = Counter("lntune_requests", "Requests by task and HTTP status.", ("task", "status"))
        buckets = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]
        self._latency = Histogram("lntune_request_seconds", "From headers to answer, by task.", buckets, ("task",))

    def _measure(self, task: str, status: int, seconds: float) -> None:
        if task and len(self._labelled) < self._settings.labelled_tasks:
            self._labelled.add(task)
        task = task if not task or task in self._labelled else "other"
        self._answers.inc(tags={"task": task, "status": str(status)})
        self._latency.observe(seconds, tags={"task": task})


def misfit(model: nn.Module, heads: Heads) -> str:
    """In what heads differ from the model's own in shape; empty where they do not."""
    for head, tensors in heads.items():
        own = model.get_submodule(head).state_dict()
        for name, tensor in tensors.items():
            if own[name].shape != tensor.shape:
                return f"{head}.{name} is {tuple(tensor.shape)} there and {tuple(own[name].shape)} here"
    return ""


def build(settings: Settings) -> Any:
    """The application for Ray Serve.

    Raises:
        DataError: no such folder or model, or the model takes shorter texts.
    """
    if not settings.adapters.is_dir():
        raise DataError(f"no folder {settings.adapters}: --adapters has a directory for each task.")
    name = settings.model or default_model()
    tokenizer, config = load_tokenizer(name), AutoConfig.from_pretrained(name)
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", settings.max_tokens))
    if settings.max_tokens > longest:
        raise DataError(f"--max-tokens {settings.max_tokens}: this model takes {longest} at most.")
    deployment = serve.deployment(serve.ingress(app)(Classifier)).options(
        name="Classifier",
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": settings.replicas,
            "target_ongoing_requests": settings.max_batch,
        },
        max_ongoing_requests=settings.max_requests,
        max_queued_requests=settings.max_requests,
        graceful_shutdown_timeout_s=settings.max_seconds + 5,
        logging_config=LoggingConfig(encoding="JSON", logs_dir=settings.log_dir or None),
    )
    return deployment.bind(settings.model_copy(update={"adapters": settings.adapters.resolve()}))


def parse_args(argv: Sequence[str] | None) -> Settings:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, field in Settings.model_fields.items():
        said = "" if field.is_required() or field.default == "" else f"; default {field.default}"
        parser.add_argument(
            "--" + name.replace("_", "-"),
            required=field.is_required(),
            default=field.default,
            help=f"{field.description}{said}",
        )
    args = parser.parse_args(argv)
    try:
        return Settings(**vars(args))
    except ValidationError as error:
        wrong = error.errors()[0]
        parser.error(f"--{str(wrong['loc'][0]).replace('_', '-')}: {wrong['msg']}")


def main(argv: Sequence[str] | None = None) -> None:
    """Serve on this machine until told to stop."""
    settings = parse_args(argv)
    quiet()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use to its makers
    with errors_as_text():
        application = build(settings)
    ray.init(include_dashboard=False, _metrics_export_port=settings.metrics_port)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray's own handlers, which end everything at once
        signal.signal(number, lambda *_: stop.set())
    serve.start(http_options={"host": settings.host, "port": settings.port})
    handle = serve.run(application)
    log.info("serving on http://%s:%d/classify", settings.host, settings.port)
    stop.wait()
    handle.broadcast("drain").results(timeout_s=2 * settings.max_seconds)
    serve.shutdown()  # after the replicas have sent what they answered
    ray.shutdown()


if __name__ == "__main__":
    main()
