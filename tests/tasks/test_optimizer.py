"""Each task has an optimizer of its own: who steps, who is stopped, what goes on from a saved state."""

import copy

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from peft_lntune import ManyTasks
from peft_lntune.errors import ConfigError
from peft_lntune.tasks.optimizer import clip_rows_
from tests.tasks.tasked import CLOSE, PLAN, labelled, tasked

FAMILY = "bert-classifier"


def run(tasks, optimizer, steps):
    for step in steps:
        names = PLAN[step % len(PLAN)]
        batch = labelled(FAMILY, len(names), step)
        with tasks.route(names):
            losses = tasks.losses(tasks.model(**batch), batch)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()


def made(tasks, **options):
    return tasks.optimizer(
        torch.optim.AdamW, lr=1e-2, max_grad_norm=1.0, schedule=lambda optimizer: StepLR(optimizer, 2), **options
    )


def equal(first, second):
    return all(torch.equal(first[name][key], second[name][key]) for name in first for key in first[name])


def test_a_task_without_rows_does_not_step():
    with ManyTasks(tasked(FAMILY)) as tasks:
        optimizer = made(tasks)
        before = tasks.state_dict()
        run(tasks, optimizer, [2])  # a and c
        after = tasks.state_dict()
        assert equal({"b": before["b"]}, {"b": after["b"]})
        assert not equal({"a": before["a"]}, {"a": after["a"]})
        assert optimizer.steps == {"a": 1, "b": 0, "c": 1}
        assert not optimizer.optimizers["b"].state
        run(tasks, optimizer, [2])  # moments of b are none, so it stays although it could move by them
        assert optimizer.steps == {"a": 2, "b": 0, "c": 2}
        assert optimizer.learning_rates == {"a": pytest.approx(1e-3), "b": 1e-2, "c": pytest.approx(1e-3)}


def test_a_stopped_task_stays_and_may_be_routed():
    with ManyTasks(tasked(FAMILY)) as tasks:
        optimizer = made(tasks)
        optimizer.stop("a")
        before = tasks.state_dict()
        run(tasks, optimizer, range(4))
        assert equal({"a": before["a"]}, {"a": tasks.state_dict()["a"]})
        assert optimizer.active == ["b", "c"]
        assert optimizer.steps == {"a": 0, "b": 3, "c": 3}
        with pytest.raises(ConfigError, match="no task 'x'; there are a, b, c"):
            optimizer.stop("x")


def test_gradients_of_several_batches_add_up():
    whole, parts = ManyTasks(tasked(FAMILY)), ManyTasks(tasked(FAMILY))
    one, two = (each.optimizer(torch.optim.SGD, lr=0.1) for each in (whole, parts))
    batch = labelled(FAMILY, 4, 0)
    with whole.route(["a", "a", "b", "b"]):
        losses = whole.losses(whole.model(**batch), batch)
    sum(losses.values()).backward()
    for rows, names in (([0, 2], ["a", "b"]), ([1, 3], ["a", "b"])):
        some = {key: value[rows] for key, value in batch.items()}
        with parts.route(names):
            losses = parts.losses(parts.model(**some), some)
        (sum(losses.values()) / 2).backward()
    one.step(), two.step()
    for name, state in whole.state_dict().items():
        for key, value in state.items():
            torch.testing.assert_close(parts.state_dict()[name][key], value, **CLOSE)


def test_who_had_rows_in_the_first_of_several_batches_steps():
    with ManyTasks(tasked(FAMILY)) as tasks:
        optimizer = made(tasks)
        for step in (1, 2):  # a and b, then a and c
            names = PLAN[step]
            batch = labelled(FAMILY, len(names), step)
            with tasks.route(names):
                sum(tasks.losses(tasks.model(**batch), batch).values()).backward()
        optimizer.step()
        assert optimizer.steps == {"a": 1, "b": 1, "c": 1}
        optimizer.zero_grad()
        optimizer.step()
        assert optimizer.steps == {"a": 1, "b": 1, "c": 1}


def test_going_on_is_bit_equal_to_not_having_stopped():
    straight = ManyTasks(tasked(FAMILY))
    optimizer = made(straight)
    run(straight, optimizer, range(3))
    optimizer.stop("c")
    run(straight, optimizer, range(3, 6))
    first = ManyTasks(tasked(FAMILY))
    optimizer = made(first)
    run(first, optimizer, range(3))
    optimizer.stop("c")
    kept = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    second = ManyTasks(tasked(FAMILY))
    again = made(second)
    second.load_state_dict(kept[0])
    again.load_state_dict(kept[1])
    run(second, again, range(3, 6))
    assert equal(straight.state_dict(), second.state_dict())
    assert again.active == ["a", "b"]


def test_a_dict_has_a_value_for_each_task():
    tasks = ManyTasks(tasked(FAMILY))
    with pytest.raises(ConfigError, match=r"lr lacks 'c'\. As a dict it has a value for each of a, b, c"):
        tasks.optimizer(torch.optim.SGD, lr={"a": 0.1, "b": 0.1})
    with pytest.raises(ConfigError, match="max_grad_norm has 'x'"):
        tasks.optimizer(torch.optim.SGD, lr=0.1, max_grad_norm={"a": 1, "b": 1, "c": 1, "x": 1})
    with pytest.raises(ConfigError, match="the state is of the tasks x, but these are a, b, c"):
        tasks.optimizer(torch.optim.SGD, lr=0.1).load_state_dict({"x": {}})


def test_heads_have_a_rate_of_their_own():
    def moved(**options):
        with ManyTasks(tasked(FAMILY)) as tasks:
            optimizer, before = tasks.optimizer(torch.optim.SGD, lr=0.1, **options), tasks.state_dict()
            run(tasks, optimizer, [0])
            assert set(optimizer.learning_rates.values()) == {0.1}
            after = tasks.state_dict()
            heads = {key for key in before["a"] if key.rpartition(".")[0] not in tasks.norms}
            return {key: after["a"][key] - before["a"][key] for key in before["a"]}, heads

    (plain, heads), (own, _) = moved(), moved(head_lr={"a": 0.2, "b": 0.0, "c": 0.0})
    assert 0 < len(heads) < len(plain)
    for key, step in plain.items():
        assert step.any()
        torch.testing.assert_close(own[key], (2 if key in heads else 1) * step, **CLOSE)
    with ManyTasks(tasked(FAMILY)) as tasks, pytest.raises(ConfigError, match="head_lr lacks 'b'"):
        tasks.optimizer(torch.optim.SGD, lr=0.1, head_lr={"a": 0.2, "c": 0.1})


def test_a_limit_for_some_tasks_only():
    with ManyTasks(tasked(FAMILY)) as tasks:
        optimizer = tasks.optimizer(torch.optim.SGD, lr=1.0, max_grad_norm={"a": 1e-6, "b": None, "c": 1e-6})
        before = tasks.state_dict()
        run(tasks, optimizer, [0])
        after = tasks.state_dict()
        moved = {n: sum((after[n][k] - before[n][k]).square().sum() for k in after[n]).sqrt().item() for n in after}
        assert moved["a"] < 2e-6
        assert moved["c"] < 2e-6
        assert moved["b"] == pytest.approx(optimizer.grad_norms()["b"], rel=1e-4)


def test_one_task_that_diverges_leaves_the_others_alone():
    grads = torch.tensor([[float("nan"), 1.0], [3.0, 4.0]])
    clip_rows_([grads], torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(grads[1], torch.tensor([0.6, 0.8]))
    with ManyTasks(tasked(FAMILY)) as tasks:
        optimizer = tasks.optimizer(torch.optim.SGD, lr={"a": 1e30, "b": 0.1, "c": 0.1}, max_grad_norm=1.0)
        run(tasks, optimizer, range(4))
        state = tasks.state_dict()
        assert not all(value.isfinite().all() for value in state["a"].values())
        assert all(value.isfinite().all() for name in ("b", "c") for value in state[name].values())


def test_clipping_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(3, 2, 5, generator=generator), torch.randn(3, 4, generator=generator)]
    rows = [[grad[row].clone() for grad in grads] for row in range(3)]
    norms = clip_rows_(grads, torch.tensor([0.5, float("inf"), 100.0]))
    for row, limit in enumerate((0.5, float("inf"), 100.0)):
        parameters = [torch.nn.Parameter(torch.zeros_like(each)) for each in rows[row]]
        for parameter, grad in zip(parameters, rows[row], strict=True):
            parameter.grad = grad
        torch.testing.assert_close(norms[row], torch.nn.utils.clip_grad_norm_(parameters, limit))
        for parameter, grad in zip(parameters, grads, strict=True):
            torch.testing.assert_close(grad[row], parameter.grad)
