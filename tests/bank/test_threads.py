"""One thread runs forward passes while others add and remove: every answer is that of its adapter, memory is flat."""

import gc
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from peft_lntune import AdapterBank
from peft_lntune.errors import ConfigError, RoutingError
from tests.adapted import adapt, build, inputs, output
from tests.bank.banked import CLOSE, routed
from tests.oracles import alone

KINDS = "ABCDEFGH"


@pytest.fixture
def _frequent_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads take turns inside what they do, not between
    yield
    sys.setswitchinterval(before)


def soak(rows: int, adapters: int, batch: int) -> tuple[int, int]:
    """Serve `rows` rows over `adapters` adapters, of which others come and go meanwhile, and check each.

    Every adapter is one of eight kinds, told by the end of its name, so that one answer a kind is the oracle of all.
    Two threads remove adapters and add others under new names, so that places are used again and again.

    Returns:
        Bytes of the process's memory after the first tenth, and at the end.
    """
    model, tuned = build("bert"), adapt(build("bert"), *KINDS)
    inputs_of = inputs("bert", batch=1)
    oracle = {kind: alone(tuned, inputs_of, kind)[0] for kind in KINDS}
    bank = AdapterBank(model, capacity=adapters // 4)  # it grows while rows are served
    bank.attach()
    names = [f"{number}{KINDS[number % len(KINDS)]}" for number in range(adapters)]
    bank.add_many({name: (tuned, name[-1]) for name in names[: adapters // 2]})
    ended, failed = threading.Event(), []

    def come_and_go(seed: int) -> None:
        chance, number = random.Random(seed), 0
        own = [name for place, name in enumerate(names) if place % 2 == seed]
        try:
            bank.add_many({name: (tuned, name[-1]) for name in own if name not in bank})
            while not ended.is_set():
                name, kind = own.pop(chance.randrange(len(own))), chance.choice(KINDS)
                bank.remove(name)
                number += 1
                own.append(f"{seed}-{number}{kind}")
                bank.add(own[-1], (tuned, kind))
        except BaseException as error:
            failed.append(error)
            raise

    served, sizes, chance = 0, [], random.Random(2)
    stacked = {name: value.expand(batch, *value.shape[1:]) for name, value in inputs_of.items()}
    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(come_and_go, seed) for seed in (0, 1)]
        try:
            while served < rows and not failed:
                there = bank.names
                chosen = [chance.choice(there) for _ in range(batch)]
                try:
                    with bank.route(chosen):
                        said = output(model, stacked)
                except RoutingError as error:  # one of them has gone since
                    assert "non-existing adapter" in str(error)  # noqa: PT017  # others are no part of the game
                    continue
                expected = torch.stack([oracle[name[-1]] for name in chosen])
                torch.testing.assert_close(said, expected, **CLOSE)
                served += batch
                if len(sizes) < 10 * served // rows:
                    gc.collect()
                    sizes.append(psutil.Process().memory_info().rss)
        finally:
            ended.set()
        for worker in workers:
            worker.result()
    assert len(bank) == adapters
    return sizes[0], sizes[-1]


@pytest.mark.end_to_end
@pytest.mark.usefixtures("_frequent_switches")
def test_a_short_soak():
    soak(rows=240, adapters=64, batch=16)


@pytest.mark.full
def test_soak():
    after_a_tenth, at_the_end = soak(rows=100_000, adapters=10_000, batch=64)
    # What a row needs is there from the start; the allocator and Python's own tables may take a little.
    assert at_the_end - after_a_tenth < 16e6


@pytest.mark.usefixtures("_frequent_switches")
def test_one_name_is_taken_once():
    tuned = adapt(build("bert"), "a")
    bank = AdapterBank(tuned, capacity=1)

    def add(_):
        try:
            bank.add("x", (tuned, "a"))
        except ConfigError:
            return 0
        return 1

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(add, range(20))) == 1
    bank.add("y", (tuned, "a"))
    assert bank.names == ["x", "y"]
    assert all(value.any() for value in bank.deltas("y").values())


@pytest.mark.usefixtures("_frequent_switches")
def test_a_second_thread_is_refused_and_the_first_answers():
    model, tuned = build("bert"), adapt(build("bert"), "a")
    bank, batch = AdapterBank(model), inputs("bert")
    bank.add("a", (tuned, "a"))
    bank.attach()
    expected = routed(bank, model, batch, ["a"] * 3)
    inside, go_on, refused = threading.Event(), threading.Event(), []

    def second():
        inside.wait()
        try:
            with bank.route(["a"] * 3):
                pass
        except RoutingError as error:
            refused.append(str(error))
        go_on.set()

    thread = threading.Thread(target=second)
    thread.start()
    with bank.route(["a"] * 3):
        inside.set()
        go_on.wait()
        assert torch.equal(output(model, batch), expected)
    thread.join()
    assert "one model runs one routed forward at a time" in refused[0]
