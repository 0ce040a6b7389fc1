"""Serve the adapters of many tasks over HTTP, from one model: texts of different tasks share a forward pass.

    pip install -e '.[examples,serve]'
    python examples/serve_many.py --adapters runs/adapters                           # all-MiniLM-L6-v2 and port 8000
    curl -X POST localhost:8000/classify -H 'Content-Type: application/json' \\
        -d '{"task": "sentiment", "texts": ["The soup was cold."]}'

The folder contains one directory per task, as `save_pretrained` writes it (`runs/adapters/sentiment`), all with heads
for the same number of labels. An adapter is loaded when its task is first named, while others are served. Ctrl+C or
SIGTERM stops the server after it has answered all pending requests. It has no authentication and no rate limits: put it
behind a server that has both.
"""

import argparse
import asyncio
import logging
import queue
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from task_data import errors_as_text
from torch import nn
from training import default_model, load_tokenizer, quiet
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from peft_lntune import AdapterBank
from peft_lntune.errors import DataError, PeftLNTuneError

CHARACTERS = 20  # a token is rarely longer; a text with more characters per token is not tokenized at all
TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
Tokens = dict[str, list[int]]

log = logging.getLogger("uvicorn.error")


class Tasks:
    """A model, a bank of adapters for it, and the folder they come from; texts become tokens, tokens become scores.

    Args:
        model: a sequence classifier in evaluation mode.
        tokenizer: its tokenizer.
        folder: with a directory for each task.
        max_tokens: the longest text.
        capacity: how many adapters there is room for at first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        max_tokens: int,
        capacity: int = 1024,
    ) -> None:
        self.bank = AdapterBank(model, capacity=capacity)
        self._model, self._tokenizer = model, tokenizer
        self._folder, self._max_tokens = folder.resolve(), max_tokens
        self._loading, self._cutting = threading.Lock(), threading.Lock()
        self._ready: set[str] = set()

    def load(self, task: str) -> None:
        """Take a task's adapter into the bank, if it is not there.

        Raises:
            HTTPException: 400 the name is invalid or leads out of the folder, 404 there is no such adapter, 500 it is
                damaged or does not fit.
        """
        folder = self._folder / task
        if not TASK.fullmatch(task) or folder.resolve().parent != self._folder:
            raise HTTPException(400, f"{task[:100]!r} is no task: up to 100 letters, digits and . _ - inside, no path.")
        if task in self._ready:
            return
        with self._loading:
            if task in self._ready:  # by now
                return
            if not (folder / "adapter_config.json").is_file():
                raise HTTPException(404, f"there is no adapter for the task {task!r}.")
            try:
                self.bank.add(task, folder)
            except PeftLNTuneError as error:
                log.error("task %r: %s", task, error)
                raise HTTPException(
                    500, f"the adapter of {task!r} cannot be used; the server's log says why."
                ) from None
            other = misfit(self._model, self.bank.heads(task))
            if other:
                self.bank.remove(task)
                raise HTTPException(500, f"the head of {task!r} is not that of this server: {other}. See --num-labels.")
            self._ready.add(task)

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Cut texts into tokens.

        Raises:
            HTTPException: 413 one of them is too long.
        """
        for number, text in enumerate(texts):
            if len(text) > CHARACTERS * self._max_tokens:
                raise HTTPException(413, f"text {number} has {len(text):,} characters; {self._max_tokens} tokens fit.")
        with self._cutting:  # a fast tokenizer serves one thread at a time
            cut: Any = self._tokenizer(list(texts))
        for number, ids in enumerate(cut["input_ids"]):
            if len(ids) > self._max_tokens:
                raise HTTPException(413, f"text {number} has {len(ids):,} tokens; {self._max_tokens} fit.")
        return [{key: cut[key][number] for key in cut} for number in range(len(texts))]

    @torch.no_grad()
    def run(self, tasks: Sequence[str], rows: Sequence[Tokens]) -> list[list[float]]:
        """Probabilities of the labels, row by row; for one thread at a time."""
        batch = self._tokenizer.pad(list(rows), return_tensors="pt").to(self._model.device)
        with self.bank.route(tasks):
            scores: list[list[float]] = self._model(**batch).logits.float().softmax(-1).tolist()
        return scores


def misfit(model: nn.Module, heads: dict[str, dict[str, torch.Tensor]]) -> str:
    """In what heads differ from the model's own in shape; empty where they do not."""
    for head, tensors in heads.items():
        own = model.get_submodule(head).state_dict()
        for name, tensor in tensors.items():
            if own[name].shape != tensor.shape:
                return f"{head}.{name} is {tuple(tensor.shape)} there and {tuple(own[name].shape)} here"
    return ""


@dataclass(frozen=True)
class Row:
    """A text of a task, and where its answer goes."""

    task: str
    tokens: Tokens
    answer: "Future[list[float]]" = field(default_factory=Future)


class Batcher:
    """Gathers rows of any tasks into batches, which one thread runs: a model runs one routed forward at a time.

    Attributes:
        batches: how many have been run.
        rows: how many rows were in them.

    Args:
        run: tasks and tokens of a batch -> an answer a row.
        max_rows: of a batch.
        max_wait: seconds that the first row of a batch waits for others.
    """

    def __init__(
        self, run: Callable[[list[str], list[Tokens]], list[list[float]]], max_rows: int, max_wait: float
    ) -> None:
        self.batches = self.rows = 0
        self._run, self._max_rows, self._max_wait = run, max_rows, max_wait
        self._queue: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._work, name="batcher")
        self._thread.start()

    def submit(self, task: str, tokens: Tokens) -> "Future[list[float]]":
        """Ask for the answer of a row.

        Raises:
            HTTPException: 503 the server is stopping.
        """
        row = Row(task, tokens)
        with self._lock:
            if self._closed:
                raise HTTPException(503, "the server is stopping.")
            self._queue.put(row)
        return row.answer

    def close(self) -> None:
        """Answer what has been asked, and end the thread."""
        with self._lock:
            self._closed = True
            self._queue.put(None)  # the last thing in the queue
        self._thread.join()

    def _work(self) -> None:
        while (row := self._queue.get()) is not None:
            rows, end = [row], time.monotonic() + self._max_wait
            while len(rows) < self._max_rows:
                try:
                    more = self._queue.get(timeout=max(0.0, end - time.monotonic()))
                except queue.Empty:
                    break
                if more is None:
                    self._queue.put(None)
                    break
                rows.append(more)
            # Nobody waits any longer for those whose client has gone.
            self._answer([row for row in rows if row.answer.set_running_or_notify_cancel()])

    def _answer(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        try:
            found = self._run([row.task for row in rows], [row.tokens for row in rows])
        except Exception as error:  # the thread goes on; whoever asked is told
            for row in rows:
                row.answer.set_exception(error)
            return
        self.batches += 1
        self.rows += len(rows)
        for row, scores in zip(rows, found, strict=True):
            row.answer.set_result(scores)


class Question(BaseModel):
    """The body of a request: texts of one task."""

    task: str
    texts: list[str] = Field(min_length=1)


class Answer(BaseModel):
    """For each text the number of its label, and the probabilities of all labels."""

    labels: list[int]
    scores: list[list[float]]


class State(BaseModel):
    """What is loaded, and what has been run."""

    tasks: list[str]
    batches: int
    rows: int


def make_app(tasks: Tasks, max_rows: int = 32, max_wait: float = 0.005) -> FastAPI:
    """The server's two addresses, `POST /classify` and `GET /state`.

    Args:
        tasks: what is served.
        max_rows: of a batch, and texts in a request.
        max_wait: seconds that a text waits for others to share a batch with.
    """
    running: dict[str, Batcher] = {}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks.bank.attach()
        running["batcher"] = Batcher(tasks.run, max_rows, max_wait)
        yield
        await asyncio.to_thread(running["batcher"].close)
        tasks.bank.detach()

    app = FastAPI(title="serve_many", lifespan=lifespan)

    @app.post("/classify")
    async def classify(question: Question) -> Answer:
        if len(question.texts) > max_rows:
            raise HTTPException(413, f"{len(question.texts)} texts in one request; {max_rows} fit.")
        await asyncio.to_thread(tasks.load, question.task)
        rows = await asyncio.to_thread(tasks.encode, question.texts)
        answers = [asyncio.wrap_future(running["batcher"].submit(question.task, row)) for row in rows]
        scores = await asyncio.gather(*answers)
        return Answer(labels=[row.index(max(row)) for row in scores], scores=scores)

    @app.get("/state")
    async def state() -> State:
        batcher = running["batcher"]
        return State(tasks=tasks.bank.names, batches=batcher.batches, rows=batcher.rows)

    return app


def load_tasks(args: argparse.Namespace) -> Tasks:
    """The model and the folder of the command line."""
    if not args.adapters.is_dir():
        raise DataError(f"no folder {args.adapters}: --adapters has a directory for each task.")
    name = args.model or default_model()
    tokenizer = load_tokenizer(name)
    transformers.set_seed(0)  # of the head, where an adapter brings none and the checkpoint has none
    model = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=args.num_labels, ignore_mismatched_sizes=True, pad_token_id=tokenizer.pad_token_id
    )
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", args.max_tokens))
    if args.max_tokens > longest:
        raise DataError(f"--max-tokens {args.max_tokens}: this model takes {longest} at most.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Tasks(model.eval().to(device), tokenizer, args.adapters, args.max_tokens, args.capacity)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, required=True, help="a folder with a directory for each task")
    parser.add_argument("--model", help="a checkpoint's name or folder; without it, an installed all-MiniLM-L6-v2")
    parser.add_argument("--num-labels", type=int, default=2, help="labels of every task's head; default 2")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest text in tokens; default 256")
    parser.add_argument("--max-batch", type=int, default=32, help="rows of a batch and texts of a request; default 32")
    parser.add_argument("--max-wait", type=float, default=5.0, help="milliseconds a text waits for others; default 5")
    parser.add_argument("--capacity", type=int, default=1024, help="initial number of adapter slots; default 1024")
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    args = parser.parse_args(argv)
    for option in ("num_labels", "max_tokens", "max_batch", "capacity"):
        if getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')} should be at least 1")
    if args.max_wait < 0:
        parser.error("--max-wait should be at least 0")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until told to stop."""
    args = parse_args(argv)
    quiet()
    with errors_as_text():
        app = make_app(load_tasks(args), args.max_batch, args.max_wait / 1000)
    # Requests under way are answered before it ends, for ten seconds at most.
    uvicorn.run(app, host=args.host, port=args.port, ws="none", timeout_graceful_shutdown=10)


if __name__ == "__main__":
    main()
