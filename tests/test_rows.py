"""Another adapter's rows never come out: samples elsewhere than along the first axis, packed rows, threads, tasks.

One mechanism serves `adapter_names`, the bank and many tasks, so most of it is tried through each of the three.
"""

import asyncio
import threading
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from torch import nn

from benchmarks.harness.counting import count_operations
from peft_lntune import AdapterBank, LNTuningConfig, ManyTasks
from peft_lntune.errors import RoutingError, UnsupportedError
from tests.adapted import adapt, build, inputs, output
from tests.oracles import alone, each_alone

NAMES = ["a", "b", "a"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # fused kernels sum in another order than xhat * weight + bias
WAYS = ["adapter_names", "bank", "tasks"]


def adapted(model, std=0.3, **options):
    """A PeftModel with two adapters of random deltas."""
    peft_model = get_peft_model(model.eval(), LNTuningConfig(**options), adapter_name="a")
    peft_model.add_adapter("b", LNTuningConfig(**options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lntune_" in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return peft_model.eval()


@contextmanager
def routing(way, peft_model):
    """Gives `run(names, *args, **kwargs)` for a model, by one of the three ways."""
    base = peft_model.get_base_model()
    if way == "adapter_names":
        yield lambda names, *args, **kwargs: peft_model(*args, **kwargs, adapter_names=names)
        return
    if way == "bank":
        routed = AdapterBank(peft_model)
        routed.add_many({name: (peft_model, name) for name in "ab"})
        routed.attach()
    else:
        routed = ManyTasks(peft_model)

    def run(names, *args, **kwargs):
        with routed.route(names):
            return base(*args, **kwargs)

    try:
        yield run
    finally:
        routed.detach() if way == "bank" else routed.close()


def encoder(batch_first, norm_first=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("way", WAYS)
class TestSamples:
    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("length", [3, 5, 6])
    def test_time_first_is_refused_whatever_the_lengths(self, way, norm_first, length):
        peft_model = adapted(encoder(False, norm_first))
        x = torch.randn(length, 3, 16)
        with routing(way, peft_model) as run, torch.no_grad():
            with pytest.raises(
                RoutingError, match=r"cannot be matched with|should be the same as the number of inputs"
            ):
                run(NAMES, x)
            if length == 3:  # rows of one adapter are the same along every axis
                torch.testing.assert_close(run(["a"] * length, x), alone_on(peft_model, x, "a"), **CLOSE)

    @pytest.mark.parametrize("length", [3, 5])
    def test_batch_first_is_right_whatever_the_lengths(self, way, length):
        peft_model = adapted(encoder(True))
        x = torch.randn(3, length, 16)
        with routing(way, peft_model) as run, torch.no_grad():
            for values in (x, x.flip(1), torch.zeros_like(x)):
                expected = torch.stack([alone_on(peft_model, values, name)[i] for i, name in enumerate(NAMES)])
                torch.testing.assert_close(run(NAMES, values), expected, **CLOSE)

    @pytest.mark.parametrize("wrapped", [True, False])
    def test_the_fused_path_of_torch_is_not_taken(self, way, wrapped):
        """It reads the weights of norms, and calls none of them."""
        if way != "bank" and not wrapped:
            pytest.skip("a bank alone serves a plain model")
        peft_model, plain = adapted(encoder(True)), encoder(True).requires_grad_(False)
        x = torch.randn(3, 5, 16)
        expected = torch.stack([alone_on(peft_model, x, name)[i] for i, name in enumerate(NAMES)])
        with torch.no_grad():
            if wrapped:
                with routing(way, peft_model) as run:
                    torch.testing.assert_close(run(NAMES, x), expected, **CLOSE)
                return
            bank = AdapterBank(plain)
            bank.add_many({name: (peft_model, name) for name in "ab"})
            bank.attach()
            with bank.route(NAMES):
                torch.testing.assert_close(plain(x), expected, **CLOSE)
        assert torch.backends.mha.get_fastpath_enabled()

    def test_a_batch_of_another_layout_is_measured_anew(self, way):
        """One token hides that a model puts tokens before samples."""

        class Flat(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.LayerNorm(4)

            def forward(self, x):
                return self.norm(x.transpose(0, 1).reshape(-1, 4))

        peft_model = adapted(Flat())
        with routing(way, peft_model) as run, torch.no_grad():
            run(["a", "b"], torch.randn(2, 1, 4))
            with pytest.raises(RoutingError, match="norm cannot be matched with"):
                run(["a", "b"], torch.randn(2, 3, 4))

    def test_measuring_costs_nothing_after_the_first_batch(self, way):
        peft_model = adapted(encoder(True))
        with routing(way, peft_model) as run, torch.no_grad():
            run(NAMES, torch.randn(3, 3, 16))
            x = torch.randn(2, 7, 16)
            run(["a", "a"], x)
            counts = [count_operations(lambda names=names: run(names, x)) for names in (["a", "a"], ["b", "a"])]
        assert counts[0] == counts[1]

    def test_a_shared_table_is_right_where_all_rows_have_the_same_norm(self, way):
        """As the norm of DeBERTa's relative positions, where no adapter of the batch tunes it."""

        class Relative(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.positions, self.table = nn.LayerNorm(4), nn.LayerNorm(4), nn.Embedding(9, 4)

            def forward(self, x):
                return self.norm(x) + self.positions(self.table.weight)[: x.shape[1]]

        torch.manual_seed(0)
        peft_model, x = adapted(Relative()), torch.randn(3, 5, 4)
        with routing(way, peft_model) as run, torch.no_grad():
            with pytest.raises(RoutingError, match=r"one batch per adapter, or .* \(exclude_modules=\['positions'\]\)"):
                run(NAMES, x)
            torch.testing.assert_close(run(["a"] * 3, x), alone_on(peft_model, x, "a"), **CLOSE)
        without = adapted(Relative(), exclude_modules=["positions"])
        for model in (peft_model, without):
            for name, parameter in model.named_parameters():
                if "positions.lntune_" in name:
                    parameter.detach().fill_(0.5)  # the same in both adapters
            with routing(way, model) as run, torch.no_grad():
                expected = torch.stack([alone_on(model, x, name)[i] for i, name in enumerate(NAMES)])
                torch.testing.assert_close(run(NAMES, x), expected, **CLOSE)

    def test_packed_rows_are_refused(self, way):
        peft_model = adapt(build("llama"), "a", "b")
        ids, again = torch.tensor([[5, 6, 7, 8, 9]] * 2), torch.tensor([[0, 1, 2, 0, 1]] * 2)
        lengths = torch.tensor([0, 3, 5], dtype=torch.int32)
        with routing(way, peft_model) as run, torch.no_grad():
            for names, rows in ((["a", "b"], 2), (["a"], 1)):
                for named in ({"position_ids": again[:rows]}, {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}):
                    with pytest.raises(RoutingError, match="packed"):
                        run(names, input_ids=ids[:rows], **named)
            padded = torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]])  # left padding, as generate has it
            mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
            run(["a", "b"], input_ids=ids, position_ids=padded, attention_mask=mask)
            run("a", input_ids=ids, position_ids=again)

    def test_the_hooks_of_users_see_their_own_call_alone(self, way):
        peft_model, seen = adapt(build("bert"), "a", "b"), []
        peft_model.get_base_model().register_forward_hook(lambda *_: seen.append("model"))
        peft_model.get_base_model().bert.register_forward_pre_hook(lambda *_: seen.append("body"))
        with routing(way, peft_model) as run, torch.no_grad():
            run(NAMES, **inputs("bert"))
        assert seen == ["body", "model"]


def alone_on(peft_model, x, name):
    copied = deepcopy(peft_model)
    copied.set_adapter(name)
    torch.backends.mha.set_fastpath_enabled(False)  # it would call no norm
    try:
        return copied(x).detach()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_windows_and_flat_tokens_in_turn():
    """OPT flattens tokens for some norms; generation has one token in a step, with another length before."""
    peft_model = adapt(build("opt"), "a", "b", task_type="CAUSAL_LM")
    for length in (3, 1, 7):
        batch = {"input_ids": torch.randint(3, 30, (3, length))}
        mixed = output(peft_model, batch, adapter_names=NAMES)
        torch.testing.assert_close(mixed, each_alone(peft_model, batch, NAMES), **CLOSE)


class TestGenerate:
    @pytest.mark.parametrize("family", ["llama", "t5"])
    @pytest.mark.parametrize("where", ["argument", "config", "model"])
    def test_another_number_of_names_is_refused_under_beams(self, family, where):
        peft_model = adapt(build(family), "a", "b", task_type="SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM")
        ids = torch.randint(3, 30, (8, 4))
        options = {"input_ids": ids, "max_new_tokens": 2, "pad_token_id": 0}
        if where == "argument":
            options["num_beams"] = 4
        elif where == "config":
            options["generation_config"] = hf.GenerationConfig(
                num_beams=4, max_new_tokens=2, pad_token_id=0, decoder_start_token_id=0
            )
        else:
            peft_model.get_base_model().generation_config.num_beams = 4
        with pytest.raises(RoutingError, match="but got 2 and 8 respectively"):
            peft_model.generate(**options, adapter_names=["a", "b"])
        # A forward pass has no beams, whatever the defaults of generation are.
        if family == "llama":
            with pytest.raises(RoutingError, match="but got 2 and 8 respectively"):
                peft_model(input_ids=ids, adapter_names=["a", "b"])

    def test_continuous_batching_is_refused_where_it_would_not_follow(self):
        peft_model = adapt(build("llama"), "a", "b", task_type="CAUSAL_LM")
        for method in ("init_continuous_batching", "continuous_batching_context_manager"):
            with pytest.raises(RoutingError, match="each request names its adapter"):
                getattr(peft_model, method)([[5, 6]], adapter_names=["a"])
        with ManyTasks(peft_model) as tasks, tasks.route(["a"]), pytest.raises(RoutingError, match="does not follow"):
            peft_model.get_base_model().generate_batch(inputs=[[5, 6]])

    def test_names_inside_a_route_are_refused(self):
        peft_model, batch = adapt(build("llama"), "a", "b", task_type="CAUSAL_LM"), inputs("llama")
        with bank_of(peft_model) as bank, bank.route(NAMES):
            with pytest.raises(RoutingError, match=r"a route is on, and the model got `adapter_names`"):
                output(peft_model.get_base_model(), batch, adapter_names=NAMES)
            with pytest.raises(RoutingError, match=r"a route is on, and the model got `adapter_names`"):
                peft_model.get_base_model().generate(**batch, adapter_names=NAMES, max_new_tokens=2)
            with pytest.raises(RoutingError, match="Cannot pass `adapter_names` inside the route of an AdapterBank"):
                output(peft_model, batch, adapter_names=NAMES)


@contextmanager
def bank_of(peft_model):
    bank = AdapterBank(peft_model)
    bank.add_many({name: (peft_model, name) for name in "ab"})
    bank.attach()
    try:
        yield bank
    finally:
        bank.detach()


def in_thread(run):
    """What a function raises in a thread of its own, or gives."""
    found = []

    def work():
        try:
            found.append(run())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


class TestOwner:
    def test_another_thread_is_refused_while_a_route_is_on(self):
        peft_model, batch = adapt(build("bert"), "a", "b"), inputs("bert")
        base = peft_model.get_base_model()
        with bank_of(peft_model) as bank:
            expected = output(base, batch)
            with bank.route(NAMES):
                routed = output(base, batch)
                found = in_thread(lambda: output(base, batch))
                assert isinstance(found, RoutingError)
                assert "belongs to that one" in str(found)
                assert torch.equal(output(base, batch), routed)
            assert torch.equal(in_thread(lambda: output(base, batch)), expected)
        with peft_model._enable_peft_forward_hooks(adapter_names=NAMES):
            assert isinstance(in_thread(lambda: output(peft_model, batch)), RoutingError)

    def test_a_thread_may_enter_a_route_of_its_own(self):
        """As a generation that is streamed does."""
        peft_model = adapt(build("llama"), "a", "b", std=1.0, task_type="CAUSAL_LM")
        base, batch = peft_model.get_base_model(), inputs("llama")
        options = {**batch, "max_new_tokens": 3, "min_new_tokens": 3}
        with bank_of(peft_model) as bank:

            def generated():
                with bank.route(NAMES):
                    return base.generate(**options)

            assert torch.equal(in_thread(generated), generated())

    def test_a_forward_that_outlives_its_route_raises(self):
        """In a copy of the context, which may use the route while it is open: `asyncio.to_thread` makes one."""
        peft_model, batch = adapt(build("bert"), "a", "b"), inputs("bert")
        base = peft_model.get_base_model()
        inside, left = threading.Event(), threading.Event()

        def wait(*_):
            if threading.current_thread() is not threading.main_thread():
                inside.set()
                left.wait(10)

        async def outlive(bank):
            with bank.route(NAMES):
                first = await asyncio.to_thread(output, base, batch)
                assert torch.equal(first, output(base, batch))
                handle = base.bert.encoder.layer[1].register_forward_pre_hook(wait)
                later = asyncio.create_task(asyncio.to_thread(output, base, batch))
                while not inside.is_set():
                    await asyncio.sleep(0.01)
            left.set()
            try:
                await later
            finally:
                handle.remove()

        with bank_of(peft_model) as bank, pytest.raises(RoutingError, match="its rows are gone"):
            asyncio.run(outlive(bank))

    def test_another_task_of_the_same_thread_is_refused(self):
        peft_model, batch = adapt(build("bert"), "a", "b"), inputs("bert")
        base = peft_model.get_base_model()

        async def routed(bank, inside, go_on):
            with bank.route(NAMES):
                inside.set()
                await go_on.wait()
                return output(base, batch)

        async def plain(inside, go_on):
            await inside.wait()
            try:
                with pytest.raises(RoutingError, match="another thread or asyncio task"):
                    output(base, batch)
            finally:
                go_on.set()

        async def both(bank):
            inside, go_on = asyncio.Event(), asyncio.Event()
            return (await asyncio.gather(routed(bank, inside, go_on), plain(inside, go_on)))[0]

        with bank_of(peft_model) as bank:
            said = asyncio.run(both(bank))
            torch.testing.assert_close(said, each_alone(peft_model, batch, NAMES), **CLOSE)


class TestStale:
    """What an optimizer or an average of weights writes leaves no trace."""

    def change(self, tensor):
        version = tensor._version
        tensor.data.add_(0.5)
        assert tensor._version == version

    def test_adapters_in_a_mixed_batch(self):
        peft_model, batch = adapt(build("bert"), "a", "b"), inputs("bert")
        output(peft_model, batch, adapter_names=NAMES)
        for name in ("a", "b"):
            peft_model.set_adapter(name)
            for _ in range(2):
                parameter = next(p for n, p in peft_model.named_parameters() if f".{name}." in n and "lntune" in n)
                self.change(parameter)
                mixed = output(peft_model, batch, adapter_names=NAMES)
                torch.testing.assert_close(mixed, each_alone(peft_model, batch, NAMES), **CLOSE)

    def test_trained_and_fixed_again(self):
        """By a fused step, which counts no version, with nothing routed in between."""
        peft_model, batch = adapt(build("bert"), "a", "b"), inputs("bert")
        own = [p for n, p in peft_model.named_parameters() if "lntune" in n and ".a." in n]
        for parameter in own:
            parameter.requires_grad_(False)
        output(peft_model, batch, adapter_names=NAMES)
        for parameter in own:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(own, lr=0.3, fused=True)
        peft_model(**batch)[0].square().sum().backward()
        optimizer.step()
        for parameter in own:
            parameter.requires_grad_(False)
        mixed = output(peft_model, batch, adapter_names=NAMES)
        torch.testing.assert_close(mixed, each_alone(peft_model, batch, NAMES), **CLOSE)

    def test_the_base_behind_a_bank(self):
        peft_model, batch = adapt(build("bert-classifier"), "a", "b", task_type="SEQ_CLS"), inputs("bert")
        base = peft_model.get_base_model()
        with bank_of(peft_model) as bank:
            for name in ("bert.embeddings.LayerNorm.base_layer.weight", "classifier.original_module.weight"):
                with bank.route(["a", "__base__", "b"]):
                    output(base, batch)
                self.change(base.get_parameter(name))
                with bank.route(["a", "__base__", "b"]):
                    mixed = output(base, batch)
                expected = each_alone(peft_model, batch, ["a", "__base__", "b"])
                torch.testing.assert_close(mixed, expected, **CLOSE)


class TestChanged:
    def test_a_norm_or_its_forward_replaced_after_attach(self):
        peft_model, batch = adapt(build("bert"), "a", "b"), inputs("bert")
        model = build("bert")
        bank = AdapterBank(model)
        bank.add_many({name: (peft_model, name) for name in "ab"})
        bank.attach()
        embeddings = model.bert.embeddings
        old = embeddings.LayerNorm
        embeddings.LayerNorm = nn.LayerNorm(16)
        with pytest.raises(RoutingError, match="forward of LayerNorm was replaced after bank"), bank.route(NAMES):
            pass
        embeddings.LayerNorm = old
        detour, old.forward = old.forward, lambda x: x
        with pytest.raises(RoutingError, match="forward of LayerNorm was replaced after bank"), bank.route(NAMES):
            pass
        old.forward = detour
        with bank.route(NAMES):
            torch.testing.assert_close(output(model, batch), each_alone(peft_model, batch, NAMES), **CLOSE)

    def test_a_model_cast_after_add(self):
        options = {"task_type": "SEQ_CLS"}
        peft_model, model = adapt(build("bert-classifier"), "a", "b", **options), build("bert-classifier")
        batch = inputs("bert")
        bank = AdapterBank(model)
        bank.add_many({name: (peft_model, name) for name in "ab"})
        bank.attach()
        model.to(torch.float64)
        with bank.route(NAMES):
            mixed = output(model, batch)
        assert mixed.dtype == torch.float64
        torch.testing.assert_close(mixed.float(), each_alone(peft_model, batch, NAMES), **CLOSE)

    @pytest.mark.parametrize("names", [None, 3, object()], ids=["none", "number", "object"])
    def test_what_is_no_list_of_names(self, names):
        bank = AdapterBank(build("bert"))
        bank.attach()
        with pytest.raises(RoutingError, match="route takes a name for each row"), bank.route(names):
            pass

    def test_a_bank_is_not_copied(self):
        bank = AdapterBank(build("bert"))
        with pytest.raises(UnsupportedError, match=r"a bank cannot be copied or pickled.*AdapterBank\.open"):
            deepcopy(bank)

    def test_heads_of_removed_adapters_leave_nothing(self):
        peft_model, model = adapt(build("bert-classifier"), "a", "b", task_type="SEQ_CLS"), build("bert-classifier")
        bank, batch = AdapterBank(model), inputs("bert")
        bank.attach()
        before = set(model.classifier.__dict__)
        bank.add("a", (peft_model, "a"))
        assert "forward" in model.classifier.__dict__
        bank.remove("a")
        assert set(model.classifier.__dict__) == before
        with bank.route("__base__"):
            torch.testing.assert_close(output(model, batch), alone(peft_model, batch, "__base__"), **CLOSE)
        bank.add("b", (peft_model, "b"))
        with bank.route(["b", "__base__", "b"]):
            expected = each_alone(peft_model, batch, ["b", "__base__", "b"])
            torch.testing.assert_close(output(model, batch), expected, **CLOSE)

    def test_a_head_removed_while_its_route_is_on(self):
        peft_model, model = adapt(build("bert-classifier"), "a", "b", task_type="SEQ_CLS"), build("bert-classifier")
        bank, batch = AdapterBank(model), inputs("bert")
        bank.attach()
        bank.add_many({name: (peft_model, name) for name in "ab"})
        with bank.route(NAMES):
            bank.remove("a")
            bank.remove("b")
            torch.testing.assert_close(output(model, batch), each_alone(peft_model, batch, NAMES), **CLOSE)
