"""How many requests does examples/serve_many.py answer, from one client and from many? Run it when nothing else runs.

python -m benchmarks.costs.http_server
"""

import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification

from benchmarks.harness.claims import claim
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import run_script, stamp
from benchmarks.harness.tables import NOT_RUN, markdown, quartiles
from peft_lntune import LNTuningConfig

ROOT = Path(__file__).resolve().parents[2]
WORDS = (5, 20)  # of a text
TENANTS, CLIENTS, ROUNDS, SECONDS = 8, 25, 5, 5.0
SPREAD = 0.05  # standard deviation of the random deltas
WANTED = 3.0  # times the throughput of one request at a time, set before it was measured
VOCABULARY = ["the", "soup", "was", "cold", "but", "we", "liked", "this", "film", "more", "than", "others", "had"]


def cells() -> list[Cell]:
    """Return what is measured: both proxies of Ray Serve, short and long texts."""
    return [{"proxy": proxy, "words": words} for proxy in ("python", "haproxy") for words in WORDS]


def run_cell(cell: Cell, checkpoint: str) -> Row:
    """Measure one cell: one client and many take turns, so that a ratio belongs to one round."""
    rates: dict[str, list[float]] = {"one": [], "many": []}
    delays: dict[str, list[float]] = {"one": [], "many": []}
    with tempfile.TemporaryDirectory() as folder, serving(cell["proxy"], checkpoint, Path(folder)) as port:
        ask_for(port, 4, cell["words"])  # all adapters are loaded, and every thread has started
        for _ in range(ROUNDS):
            for name, clients in (("one", 1), ("many", CLIENTS)):
                found = ask_for(port, clients, cell["words"])
                rates[name].append(len(found) / SECONDS)
                delays[name] += found
    row: Row = {"clients": CLIENTS, "tenants": TENANTS, "rounds": ROUNDS, "seconds": SECONDS}
    row["ratios"] = [many / one for one, many in zip(rates["one"], rates["many"], strict=True)]
    for name in rates:
        row[f"{name}_per_second"] = statistics.median(rates[name])
        row[f"{name}_p50"], row[f"{name}_p99"] = (statistics.quantiles(delays[name], n=100)[at] for at in (49, 98))
    return {**row, **stamp(torch.device("cpu"))}


@contextmanager
def serving(proxy: str, checkpoint: str, folder: Path) -> Iterator[int]:
    """A server with adapters, ready for requests; gives its port."""
    base = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2)
    for number in range(TENANTS):
        tuned = get_peft_model(base, LNTuningConfig(init_weights=False))
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if ".lntune_" in name:
                    parameter.copy_(SPREAD * torch.randn(parameter.shape, generator=generator))
        tuned.save_pretrained(folder / f"task-{number}")
        base = tuned.unload()
    port, metrics_port = free_ports(2)
    command = [sys.executable, "examples/serve_many.py", "--adapters", str(folder), "--model", checkpoint]
    command += ["--port", str(port), "--metrics-port", str(metrics_port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_SERVE_ENABLE_HA_PROXY": str(int(proxy == "haproxy"))}
    with (folder / "console.txt").open("w") as console:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=console, stderr=console)
    try:
        while not is_ready(port):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended: {(folder / 'console.txt').read_text()[-2000:]}")
            time.sleep(0.5)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in listening]
    for each in listening:
        each.close()
    return ports


def is_ready(port: int) -> bool:
    """Whether the server answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    return False


def ask_for(port: int, clients: int, words: int) -> list[float]:
    """Each client asks one question after the other, of random tasks; gives the seconds of each answer."""
    found: list[float] = []
    wrong: list[BaseException] = []
    end = time.monotonic() + SECONDS

    def ask(seed: int) -> None:
        chosen, connection = random.Random(seed), http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            while (began := time.monotonic()) < end:
                task, text = f"task-{chosen.randrange(TENANTS)}", " ".join(chosen.choices(VOCABULARY, k=words))
                connection.request("POST", "/classify", json.dumps({"task": task, "texts": [text]}))
                response = connection.getresponse()
                answer = response.read()
                if response.status != 200:
                    raise RuntimeError(f"{response.status}: {answer.decode()}")
                found.append(time.monotonic() - began)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]
    return found


def report(rows: Rows) -> str:
    """The table, and whether the wanted ratio was reached."""
    parts = [
        "# Requests to examples/serve_many.py",
        f"all-MiniLM-L6-v2 on CPU, {TENANTS} adapters, one text per request, clients and server on the same cores. One "
        f"client and {CLIENTS} take turns of {SECONDS:.0f} seconds; a ratio belongs to one round.",
    ]
    lines, claims = [], []
    for cell in cells():
        row = rows.get(cell)
        if row is None:
            lines.append([cell["proxy"], cell["words"], *[None] * 4])
            continue
        times = [f"{1000 * row[f'{name}_p50']:.0f} / {1000 * row[f'{name}_p99']:.0f}" for name in ("one", "many")]
        rates = f"{row['one_per_second']:.0f} / {row['many_per_second']:.0f}"
        lines.append([cell["proxy"], cell["words"], rates, quartiles(row["ratios"], 2), *times])
        middle = statistics.median(row["ratios"])
        wanted = f"{cell['proxy']}, {cell['words']} words: at least {WANTED:.0f} times the requests of one client"
        claims.append(claim(wanted, f"{middle:.2f}", middle >= WANTED))
    header = ["proxy", "words", f"requests per second, 1 / {CLIENTS} clients", "ratio: median (quartiles)"]
    header += ["p50 / p99 of 1 client, ms", f"p50 / p99 of {CLIENTS}, ms"]
    return "\n\n".join([*parts, markdown(header, lines), "\n".join(claims) or NOT_RUN]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    description = "Requests per second of the example server."
    return run_script("http_server", description, cells(), run_cell, report, arguments, checkpoint=True)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
