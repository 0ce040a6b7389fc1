"""What many tasks do to a model and its adapters, how they are routed, and what they refuse."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from benchmarks.harness.counting import count_operations
from peft_lntune import AdapterBank, FisherLNConfig, LNTuningConfig, ManyTasks, ModuleTuningConfig, UnifiedConfig
from peft_lntune.errors import ConfigError, DataError, RoutingError, UnsupportedError
from tests.adapted import adapt, assert_unchanged, output, snapshot
from tests.bank.banked import CLOSE as BY_ROW
from tests.oracles import alone, each_alone
from tests.tasks.tasked import CLOSE, build, labelled, tasked, trained

FAMILY = "bert-classifier"
NAMES = ["c", "a", "c", "b"]


def step(tasks, model, names, batch, backward_inside=False, rate=0.1):
    """One step of SGD; the losses."""
    optimizer = tasks.optimizer(torch.optim.SGD, lr=rate)
    with tasks.route(names):
        losses = tasks.losses(model(**batch), batch)
        if backward_inside:
            sum(losses.values()).backward()
    if not backward_inside:
        sum(losses.values()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return losses


class TestRoute:
    @pytest.mark.parametrize("family", ["bert-classifier", "roberta-classifier", "llama", "gemma3", "t5", "opt", "vit"])
    def test_row_i_is_what_the_adapter_of_its_task_says(self, family):
        model = tasked(family).eval()
        batch = {key: value for key, value in labelled_or_plain(family).items() if key != "labels"}
        expected, all_rows = each_alone(model, batch, NAMES), alone(model, batch, "b")
        with ManyTasks(model) as tasks:
            for names in (NAMES, tasks.index(NAMES)):
                with tasks.route(names):
                    torch.testing.assert_close(output(model, batch), expected, **BY_ROW)
            with tasks.route("b"):
                torch.testing.assert_close(output(model, batch), all_rows, **BY_ROW)

    def test_outside_and_afterwards_the_model_is_what_it_was(self):
        model = tasked(FAMILY).eval()
        batch = labelled(FAMILY, 4, 0)
        model.set_adapter("b")
        before, said = snapshot(model), output(model, batch)
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        tasks = ManyTasks(model, ["a", "c"])
        with pytest.raises(ZeroDivisionError), tasks.route("a"):
            raise ZeroDivisionError
        assert torch.equal(output(model, batch), said)
        tasks.close()
        tasks.close()
        assert_unchanged(model, before)
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
        assert not any("forward" in module.__dict__ for module in model.modules())
        with pytest.raises(RoutingError, match="these tasks were closed"), tasks.route("a"):
            pass

    def test_generation_repeats_rows_for_beams(self):
        model = tasked("llama").eval()
        batch = {key: value for key, value in labelled("llama", 2, 0).items() if key != "labels"}
        options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
        expected = model.generate(**batch, adapter_names=["c", "a"], **options)
        with ManyTasks(model) as tasks, tasks.route(["c", "a"]), torch.no_grad():
            assert torch.equal(model.get_base_model().generate(**batch, **options), expected)

    def test_a_copy_of_the_model_is_not_routed(self):
        model = tasked(FAMILY).eval()
        batch = labelled(FAMILY, 4, 0)
        with ManyTasks(model) as tasks, tasks.route(NAMES):
            copied = deepcopy(model.get_base_model().bert.encoder.layer[0].output.LayerNorm.base_layer)
            assert copied(torch.ones(1, 16)).shape == (1, 16)
            output(model, batch)

    def test_a_norm_costs_one_operation_more_than_the_base_whatever_the_tasks(self):
        model, plain = tasked(FAMILY, *map(str, range(8))), build(FAMILY).train()
        batch = labelled(FAMILY, 8, 0)
        del batch["labels"]
        base = count_operations(torch.no_grad()(lambda: plain(**batch)))
        with ManyTasks(model) as tasks:
            counts = []
            for distinct in (1, 2, 8):
                names = [str(row % distinct) for row in range(8)]

                def run(names=names):
                    with torch.no_grad(), tasks.route(names):
                        model(**batch)

                run()  # what is kept of the base
                counts.append(count_operations(run))
        assert len(set(counts)) == 1
        assert counts[0] <= base + 5 + 5 + 20  # five norms; a gather and a sum a stack; the head


class TestCheckpointing:
    @pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
    @pytest.mark.parametrize("family", ["bert-classifier", "llama"])
    def test_it_changes_nothing(self, family, reentrant, inside):
        model, other = tasked(family), tasked(family)
        batch = labelled(family, 4, 0)
        with ManyTasks(model) as tasks:
            expected = step(tasks, model, NAMES, batch)
        checkpoint(other, reentrant)
        other.enable_input_require_grads()
        with ManyTasks(other) as tasks:
            start = tasks.state_dict()
            for _ in range(2):
                tasks.load_state_dict(start)
                losses = step(tasks, other, NAMES, batch, inside)
        for name, loss in expected.items():
            torch.testing.assert_close(losses[name], loss, **CLOSE)
        found = trained(other)
        for key, value in trained(model).items():
            torch.testing.assert_close(found[key], value, **CLOSE)
        assert any(not torch.equal(value, found[key]) for key, value in trained(tasked(family)).items())

    def test_whose_rows_are_computed_again_must_be_known(self):
        model = tasked(FAMILY)
        checkpoint(model, False)
        batch = labelled(FAMILY, 4, 0)
        with ManyTasks(model) as tasks:
            total = 0
            for names in (NAMES, ["a"] * 4):
                with tasks.route(names):
                    total = total + sum(tasks.losses(model(**batch), batch).values())
            with pytest.raises(RoutingError, match="there were several forward passes before it"):
                total.backward()
            with tasks.route(NAMES):
                losses = tasks.losses(model(**batch), batch)
            model(**batch)  # not routed
            with pytest.raises(RoutingError, match="Call backward after each of them"):
                losses["c"].backward()
            step(tasks, model, NAMES, batch)

    def test_several_forward_passes_before_one_backward_without_it(self):
        model, other = tasked(FAMILY), tasked(FAMILY)
        batch = labelled(FAMILY, 4, 0)
        with ManyTasks(model) as tasks:
            for names in (NAMES, ["a"] * 4):
                with tasks.route(names):
                    sum(tasks.losses(model(**batch), batch).values()).backward()
            expected = gradients(tasks)
        with ManyTasks(other) as tasks:
            total = 0
            for names in (NAMES, ["a"] * 4):
                with tasks.route(names):
                    total = total + sum(tasks.losses(other(**batch), batch).values())
            total.backward()
            for found, wanted in zip(gradients(tasks), expected, strict=True):
                torch.testing.assert_close(found, wanted, **CLOSE)


class TestDtypes:
    def test_a_base_in_bfloat16_has_deltas_in_float32_and_small_steps_count(self):
        model = tasked("bert", dtype=torch.bfloat16)
        batch = labelled("bert", 4, 0)
        before = trained(model)
        with ManyTasks(model) as tasks:
            assert {values.dtype for _, values in tasks._norms.stacks} == {torch.float32}
            step(tasks, model, NAMES, batch, rate=1e-4)
        moved = [not torch.equal(value, before[key]) for key, value in trained(model).items()]
        assert all(moved)

    def test_under_autocast_losses_are_those_of_each_alone(self):
        model = tasked(FAMILY)
        batch = labelled(FAMILY, 4, 0)
        with torch.autocast("cpu", torch.bfloat16):
            model.set_adapter("c")
            expected = model(**{key: value[[0, 2]] for key, value in batch.items()}).loss
            with ManyTasks(model) as tasks:
                losses = step(tasks, model, NAMES, batch)
        torch.testing.assert_close(losses["c"], expected, rtol=0.02, atol=0.02)

    def test_dropout_is_at_work(self):
        model = tasked(FAMILY)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        batch = labelled(FAMILY, 4, 0)
        with ManyTasks(model) as tasks, tasks.route(NAMES):
            first, second = (model(**batch).logits for _ in range(2))
        assert not torch.equal(first, second)


class TestLosses:
    def test_a_loss_of_ones_own_is_called_with_the_rows_of_each_task(self):
        model = tasked(FAMILY)
        batch = labelled(FAMILY, 4, 0)
        seen = []

        def loss(outputs, rows):
            seen.append((tuple(outputs.logits.shape), rows["labels"].tolist(), outputs.get("loss")))
            return nn.functional.cross_entropy(outputs.logits, rows["labels"])

        with ManyTasks(model) as tasks, tasks.route(NAMES):
            outputs = model(**batch)
            found, own = tasks.losses(outputs, batch, loss), tasks.losses(outputs, batch)
        assert list(found) == list(own) == ["c", "a", "b"]
        for name in found:
            torch.testing.assert_close(found[name], own[name], **CLOSE)
        labels = batch["labels"]
        assert seen[0] == ((2, 3), labels[[0, 2]].tolist(), None)

    def test_a_task_in_which_nothing_counts_has_loss_zero_and_leaves_the_others_alone(self):
        model = tasked("tokens")
        batch = labelled("tokens", 4, 0)
        batch["labels"][1] = -100
        with ManyTasks(model) as tasks, tasks.route(NAMES):
            losses = tasks.losses(model(**batch), batch)
            sum(losses.values()).backward()
            assert losses["a"].item() == 0
            assert all(grad.isfinite().all() for grad in gradients(tasks))

    def test_one_name_for_all_rows(self):
        model = tasked("tokens")
        batch = labelled("tokens", 4, 0)
        with ManyTasks(model) as tasks, tasks.route("b"):
            outputs = model(**batch)
            (loss,) = tasks.losses(outputs, batch).values()
            torch.testing.assert_close(loss, outputs.loss, **CLOSE)
            found = tasks.losses(outputs, batch, lambda outputs, rows: outputs.logits.sum())
            torch.testing.assert_close(found["b"], outputs.logits.sum(), **CLOSE)

    def test_what_it_refuses(self):
        model = tasked(FAMILY)
        batch = labelled(FAMILY, 4, 0)
        with ManyTasks(model) as tasks:
            with pytest.raises(RoutingError, match=r"Call the model inside tasks\.route"):
                tasks.losses(None, batch)
            with tasks.route(NAMES):
                outputs = model(**batch)
            two = {key: value[:2] for key, value in batch.items()}
            with pytest.raises(DataError, match="the batch has 2 rows, but the latest route had 4"):
                tasks.losses(outputs, two, lambda outputs, rows: outputs.logits.sum())
            tasks.losses(outputs, batch)
            with pytest.raises(DataError, match="the batch has 2 rows, but the latest route had 4"):
                tasks.losses(outputs, two)
            with pytest.raises(DataError, match="no labels: a batch has input_ids"):
                tasks.losses(outputs, {"input_ids": batch["input_ids"]})
            with pytest.raises(UnsupportedError, match="should be a scalar tensor"):
                tasks.losses(outputs, batch, lambda outputs, rows: outputs.logits)


class TestFiles:
    def test_each_task_is_an_ordinary_adapter(self, tmp_path):
        model = tasked(FAMILY, "default", "b")
        batch = labelled(FAMILY, 4, 0)
        names = ["b", "default", "b", "b"]
        with ManyTasks(model) as tasks:
            step(tasks, model, names, batch)
            tasks.save(tmp_path)
            model.eval()
            with tasks.route(names):
                expected = output(model, batch)
        assert sorted(place.name for place in tmp_path.iterdir() if place.is_dir()) == ["b", "default"]
        loaded = PeftModel.from_pretrained(build(FAMILY), tmp_path / "default").eval()
        loaded.load_adapter(tmp_path / "b", "b")
        torch.testing.assert_close(output(loaded, batch, adapter_names=names), expected, **BY_ROW)
        bank = AdapterBank(build(FAMILY).eval())
        bank.add_many({name: tmp_path / name for name in ("b", "default")})
        bank.attach()
        with bank.route(names):
            said = output(bank._base, batch)
        torch.testing.assert_close(said, expected, **BY_ROW)

    def test_masks_stay_masks(self, tmp_path):
        from tests.selection.test_masks import random_masks

        model = tasked(FAMILY, "a", "b")
        masks = random_masks(model, "a")
        model.base_model.set_masks(masks, "a")
        with ManyTasks(model) as tasks:
            optimizer = tasks.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
            batch = labelled(FAMILY, 4, 0)
            with tasks.route(["a", "b", "a", "a"]):
                sum(tasks.losses(model(**batch), batch).values()).backward()
            optimizer.step()
            state = tasks.state_dict()["a"]
        for name, mask in masks.items():
            assert (state[name][~mask] == 0).all()
            assert (state[name][mask] != 0).all()


class TestRefused:
    def test_adapters(self):
        model = tasked(FAMILY)
        with pytest.raises(ConfigError, match="many tasks are adapters of a PeftModel, but got BertFor"):
            ManyTasks(build(FAMILY))
        with pytest.raises(ConfigError, match=r"adapters \['x'\] not found; this model has \['a', 'b', 'c'\]"):
            ManyTasks(model, ["a", "x"])
        with pytest.raises(ConfigError, match=r"adapters \[\] not found"):
            ManyTasks(model, [])
        with pytest.raises(ConfigError, match="'a' is named twice"):
            ManyTasks(model, ["a", "b", "a"])

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                ModuleTuningConfig(components=["query"]),
                "has ModuleTuningConfig, and training many tasks holds only deltas",
            ),
            (LNTuningConfig(target_modules=["query"]), "modules other than norms"),
            (
                UnifiedConfig(parts=[LNTuningConfig(), LoraConfig(target_modules=["query"])]),
                "has LNTuningConfig, Lora",
            ),
        ],
    )
    def test_other_kinds(self, config, message):
        model = tasked(FAMILY, "a")
        model.add_adapter("other", config)
        with pytest.raises(UnsupportedError, match=message):
            ManyTasks(model)
        assert not any("forward" in module.__dict__ for module in model.modules())

    def test_merged_and_routed_elsewhere(self):
        model = tasked(FAMILY)
        bank = AdapterBank(model)
        bank.attach()
        with pytest.raises(UnsupportedError, match="another bank is attached"):
            ManyTasks(model)
        bank.detach()
        tasks = ManyTasks(model)
        with pytest.raises(UnsupportedError, match=r"or close\(\), if it is a ManyTasks"):
            bank.attach()
        model.merge_adapter()
        with pytest.raises(RoutingError, match="there are merged adapters"), tasks.route("a"):
            pass
        model.unmerge_adapter()
        tasks.close()
        bank.attach()

    def test_names(self):
        model = tasked(FAMILY)
        batch = labelled(FAMILY, 4, 0)
        with ManyTasks(model) as tasks:
            with pytest.raises(RoutingError, match="no task 'x'; there are a, b, c"), tasks.route(["a", "x"]):
                pass
            with pytest.raises(RoutingError, match="no task 3"), tasks.route(torch.tensor([3])):
                pass
            with pytest.raises(RoutingError, match=r"an index is int64 of shape \(B,\)"), tasks.route(torch.ones(2)):
                pass
            with pytest.raises(RoutingError, match="no names"), tasks.route([]):
                pass
            message = "the names given to `route` should be the same as the number"
            with pytest.raises(RoutingError, match=message), tasks.route(["a", "b"]):
                model(**batch)
            message = "one model runs one routed forward at a time"
            with tasks.route("a"), pytest.raises(RoutingError, match=message), tasks.route("b"):
                pass
            with tasks.route("a"), pytest.raises(RoutingError, match="already running"):
                tasks.close()

    def test_a_head_with_buffers(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.head = nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

            def forward(self, x):
                return self.head(self.norm(x))

        model = get_peft_model(Model(), LNTuningConfig(modules_to_save=["head"]))
        with pytest.raises(UnsupportedError, match=r"head\.1 \(BatchNorm1d\) is in a head and has the buffer running"):
            ManyTasks(model)

    def test_a_head_inside_another(self):
        model = tasked("roberta-classifier", "a", modules_to_save=["out_proj"])
        model.add_adapter("b", LNTuningConfig(modules_to_save=["classifier"]))
        with pytest.raises(UnsupportedError, match=r"are heads of adapters, one inside the other"):
            ManyTasks(model)

    def test_state_of_other_tasks(self):
        tasks = ManyTasks(tasked(FAMILY))
        with pytest.raises(ConfigError, match="the state does not fit task 'a'"):
            tasks.load_state_dict(ManyTasks(tasked(FAMILY, "x")).state_dict())

    def test_masks_that_were_not_fitted_are_spoken_of(self):
        model = tasked(FAMILY, "a")
        model.add_adapter("b", FisherLNConfig(density=0.1))
        with pytest.warns(UserWarning, match="adapter 'b' has a FisherLNConfig, but no mask was fitted"):
            ManyTasks(model)


def checkpoint(model, reentrant):
    base = model.get_base_model()
    name = "activation_checkpointing_enable"  # since transformers 5.23
    enable = getattr(base, name) if hasattr(base, name) else base.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def labelled_or_plain(family):
    from tests.adapted import inputs

    return inputs(family, batch=4) if family in ("opt", "vit", "gemma3", "t5") else labelled(family, 4, 0)


def gradients(tasks):
    return [values.grad.clone() for each in tasks._all() for _, values in each.stacks]


def test_repr_says_what_it_holds():
    tasks = ManyTasks(adapt(build(FAMILY), "a", "b"))
    assert len(tasks) == 2
    assert repr(tasks) == "ManyTasks(2 tasks on BertForSequenceClassification, 160 entries each at most)"
