"""Continuous batching with an adapter per request: each request says what its adapter says alone."""

import gc
import threading

import pytest
import torch
from peft import LoraConfig

from benchmarks.harness.counting import count_operations
from peft_lntune import AdapterBank, FisherLNConfig, LNTuningConfig, UnifiedConfig
from peft_lntune.errors import RoutingError, UnsupportedError
from tests.adapted import adapt, build, deltas, fill
from tests.continuous.engines import NEW, PROMPT, alone, banked, generation, results, small, speaking, tokens

NAMES = ["a", "b", "__base__", "b", "a"]
PROMPTS = [PROMPT, PROMPT, PROMPT, [3, 4], [3, 4]]


def expected(tuned, prompts=PROMPTS, names=NAMES, **options):
    found = [alone(tuned, prompt, name, **options) for prompt, name in zip(prompts, names, strict=True)]
    assert len({tuple(each) for each in found}) == len(found), "the adapters must say different things"
    return found


class TestGenerateBatch:
    @pytest.mark.end_to_end
    def test_in_a_route(self):
        tuned, plain, bank = banked()
        options = {"generation_config": generation(), "continuous_batching_config": small()}
        with bank.route(NAMES):
            assert tokens(plain.generate_batch(PROMPTS, **options)) == expected(tuned)
        with bank.route("b"):
            assert tokens(plain.generate_batch([PROMPT], **options)) == [alone(tuned, PROMPT, "b")]
        assert tokens(plain.generate_batch([PROMPT], **options)) == [alone(tuned, PROMPT, "__base__")]
        assert plain.config._attn_implementation == "sdpa"

    @pytest.mark.parametrize("bank_too", [pytest.param(False, marks=pytest.mark.end_to_end), True])
    def test_by_adapter_names(self, bank_too):
        tuned = speaking()
        wanted, options = expected(tuned), {"generation_config": generation(), "continuous_batching_config": small()}
        if bank_too:
            bank = AdapterBank(tuned)
            bank.attach()
        assert tokens(tuned.generate_batch(PROMPTS, adapter_names=NAMES, **options)) == wanted
        tuned.set_adapter("b")
        assert tokens(tuned.generate_batch([PROMPT], **options)) == [wanted[1]]  # the active adapter, as before

    @pytest.mark.end_to_end
    def test_masked_adapters(self):
        """The values of masked adapters are scattered into rows."""
        torch.manual_seed(0)
        tuned = speaking("a")
        tuned.add_adapter("b", FisherLNConfig(task_type="CAUSAL_LM", density=0.5))
        tuned.set_masks({name: torch.rand(16) < 0.5 for name in deltas(tuned, "b")}, "b")
        fill(tuned.eval(), "b", 1.0, seed=1)
        options = {"generation_config": generation(), "continuous_batching_config": small()}
        names = ["b", "a"]
        found = tokens(tuned.generate_batch([PROMPT, PROMPT], adapter_names=names, **options))
        assert found == expected(tuned, [PROMPT, PROMPT], names)

    @pytest.mark.end_to_end
    def test_return_sequences_keep_their_adapter(self):
        tuned, plain, bank = banked()
        config, prompts = generation(), [PROMPT, PROMPT, [3, 4]]
        config.num_return_sequences = 3  # not at once: a greedy config refuses it, and greedy tokens can be compared
        names = ["a", "b", "b"]
        with bank.route(names):
            found = plain.generate_batch(prompts, generation_config=config, continuous_batching_config=small())
        wanted = expected(tuned, prompts, names)
        assert tokens(found) == [each for each in wanted for _ in range(3)]

    @pytest.mark.end_to_end
    def test_prefill_in_pieces_and_a_full_cache(self):
        """Prompts longer than a step are prefilled in several; requests without room are put off and begun again."""
        tuned, plain, bank = banked()
        prompts = [[3 + (7 * i + j) % 40 for j in range(20)] for i in range(4)]
        names = ["a", "b", "a", "__base__"]
        with bank.route(names):
            found = plain.generate_batch(
                prompts,
                generation_config=generation(max_new_tokens=12),
                continuous_batching_config=small(max_batch_tokens=16, num_blocks=14),
            )
        assert tokens(found) == expected(tuned, prompts, names, max_new_tokens=12)

    @pytest.mark.end_to_end
    def test_a_persistent_manager(self):
        """What it keeps belongs to each adapter, and a manager of others is not used."""
        tuned, plain, bank = banked()
        options = {
            "generation_config": generation(),
            "continuous_batching_config": small(),
            "persistent_manager": True,
        }
        for names in (["a", "b"], ["b", "a"]):
            with bank.route(names):
                found = tokens(plain.generate_batch([PROMPT, PROMPT], **options))
            assert found == [alone(tuned, PROMPT, name) for name in names]
        bank.detach()
        assert not hasattr(plain, "_cached_continuous_batching_manager")
        plain.generate_batch([PROMPT], **options)
        bank.attach()
        with bank.route("a"), pytest.raises(RoutingError, match="destroy_cached_continuous_batching_manager"):
            plain.generate_batch([PROMPT], **options)

    @pytest.mark.end_to_end
    def test_the_active_adapter_changes_under_a_persistent_manager(self):
        tuned = speaking()
        wanted = [alone(tuned, PROMPT, name) for name in "ab"]
        for name, each in zip("ab", wanted, strict=True):
            tuned.set_adapter(name)
            found = tuned.generate_batch(
                [PROMPT],
                generation_config=generation(),
                continuous_batching_config=small(),
                persistent_manager=True,
            )
            assert tokens(found) == [each]

    def test_refusals_come_before_anything_runs(self):
        _, plain, bank = banked()
        options = {"generation_config": generation()}
        with bank.route(["a", "b"]), pytest.raises(RoutingError, match="but got 2 and 1 respectively"):
            plain.generate_batch([PROMPT], **options)
        with bank.route("a"):
            with pytest.raises(RoutingError, match="Give the names once"):
                plain.generate_batch([PROMPT], adapter_names=["a"], **options)
            with pytest.raises(RoutingError, match="outlives a route"):
                plain.init_continuous_batching(**options)
        with pytest.raises(RoutingError, match="non-existing adapter"):
            plain.generate_batch([PROMPT], adapter_names="c", **options)
        for wrong in ({"use_cuda_graph": True}, {"use_cuda_graph": (False, True)}, {"q_padding_interval_size": 8}):
            with pytest.raises(UnsupportedError, match="CUDA graphs repeat"):
                plain.init_continuous_batching(continuous_batching_config=small(**wrong), **options)
        with pytest.raises(UnsupportedError, match="a compiled step"):
            plain.init_continuous_batching(continuous_batching_config=small(default_compile_level=1), **options)

    @pytest.mark.end_to_end
    def test_other_modules_than_norms_are_refused(self):
        lora = UnifiedConfig(parts=[LNTuningConfig(), LoraConfig(target_modules=["q_proj"])], task_type="CAUSAL_LM")
        tuned = speaking()
        tuned.add_adapter("lora", lora)
        with pytest.raises(UnsupportedError, match=r"q_proj .* is not a norm"):
            tuned.eval().generate_batch([PROMPT], adapter_names=["a"], generation_config=generation())
        headed = adapt(build("llama"), "a", modules_to_save=["lm_head"])
        bank = AdapterBank(headed.get_base_model())
        bank.add("a", (headed, "a"))
        bank.attach()
        with bank.route("a"), pytest.raises(UnsupportedError, match=r"has a head of its own \(lm_head\)"):
            bank._base.generate_batch([PROMPT], generation_config=generation())


class TestManager:
    @pytest.mark.end_to_end
    def test_adapters_come_and_go_between_requests(self):
        """A replaced adapter finds no prefix of the old one: https://github.com/vllm-project/vllm/issues/42125."""
        tuned, plain, bank = banked("a", "b", "c")
        with plain.continuous_batching_context_manager(
            generation_config=generation(), continuous_batching_config=small()
        ) as manager:
            first = manager.add_request(PROMPT, adapter="a")
            assert results(manager, first) == [alone(tuned, PROMPT, "a")]
            bank.remove("a")
            with pytest.raises(RoutingError, match="non-existing adapter"):
                manager.add_request(PROMPT, adapter="a")
            bank.add("a", (tuned, "c"))
            ids = [manager.add_request(PROMPT, adapter=name) for name in ("a", "b")]
            ids += manager.add_requests([PROMPT, [3, 4]], adapters=["__base__", "c"])
            wanted = [(PROMPT, "c"), (PROMPT, "b"), (PROMPT, "__base__"), ([3, 4], "c")]
            assert results(manager, *ids) == [alone(tuned, *each) for each in wanted]

    @pytest.mark.end_to_end
    def test_a_request_keeps_an_adapter_that_is_removed(self):
        """Its row in the bank is another adapter's by then."""
        tuned, plain, bank = banked("a", "b")
        manager = plain.init_continuous_batching(generation_config=generation(), continuous_batching_config=small())
        request = manager.add_request(PROMPT, adapter="a")
        bank.remove("a")
        bank.add("other", (tuned, "b"))
        assert bank.index(["other"]).item() == 1  # the place of the removed one
        manager.start()
        assert results(manager, request) == [alone(tuned, PROMPT, "a")]
        manager.stop()
        manager.destroy()

    def test_a_cached_prefix_belongs_to_one_adapter(self):
        """https://github.com/vllm-project/vllm/issues/3264: the same prompt under two adapters."""
        tuned, plain, _bank = banked()
        seen = []
        with plain.continuous_batching_context_manager(
            generation_config=generation(), continuous_batching_config=small()
        ) as manager:
            for name in ("a", "b", "a", "__base__", "__base__", "b"):
                cache = getattr(manager.batch_processor, "cache", None)
                if cache is not None and not seen:
                    own = cache.search_prefix_match
                    cache.search_prefix_match = lambda *args, own=own: seen.append(own(*args)) or seen[-1]
                [found] = results(manager, manager.add_request(PROMPT, adapter=name))
                assert found == alone(tuned, PROMPT, name)
        # The first request began before the wrapper was there; blocks have 4 tokens, and the last token is computed.
        assert seen[-5:] == [0, 8, 0, 8, 8]

    @pytest.mark.end_to_end
    def test_names_alike_in_two_banks(self):
        """https://github.com/vllm-project/vllm/issues/30931: a name is no identity."""
        tuned, plain, bank = banked()
        with bank.route("a"):
            first = plain.generate_batch(
                [PROMPT], generation_config=generation(), continuous_batching_config=small(), persistent_manager=True
            )
        bank.detach()
        other = AdapterBank(plain)
        other.add("a", (tuned, "b"))
        other.attach()
        with other.route("a"):
            second = plain.generate_batch(
                [PROMPT], generation_config=generation(), continuous_batching_config=small(), persistent_manager=True
            )
        assert tokens(first) + tokens(second) == [alone(tuned, PROMPT, name) for name in "ab"]

    @pytest.mark.end_to_end
    def test_routes_wait_for_a_pause(self):
        tuned, plain, bank = banked()
        ids = torch.tensor([PROMPT])
        with bank.route("b"), torch.no_grad():
            wanted = plain(ids).logits
        with plain.continuous_batching_context_manager(
            generation_config=generation(), continuous_batching_config=small()
        ) as manager:
            request = manager.add_request(PROMPT, adapter="a")
            with pytest.raises(RoutingError, match=r"manager.pause\(\)"), bank.route("b"):
                pass
            with pytest.raises(RoutingError, match="Stop the manager first"):
                bank.detach()
            with pytest.raises(RoutingError, match="runs this model already"):
                plain.init_continuous_batching(continuous_batching_config=small()).start()
            with manager.pause(), bank.route("b"), torch.no_grad():
                assert torch.equal(plain(ids).logits, wanted)
            assert results(manager, request) == [alone(tuned, PROMPT, "a")]
        bank.detach()

    @pytest.mark.end_to_end
    def test_an_engine_that_cannot_follow_fails_its_requests(self):
        """A norm that lost its detour would run without adapter."""
        _, plain, bank = banked()
        manager = plain.init_continuous_batching(generation_config=generation(), continuous_batching_config=small())
        request = manager.add_request(PROMPT, adapter="a")
        plain.model.norm = torch.nn.RMSNorm(16)
        manager.start()
        output = manager.get_result(timeout=20)
        assert (output.request_id, output.generated_tokens) == (request, [])
        assert "was replaced after bank.attach()" in output.error
        manager.destroy()
        assert bank.names == ["a", "b"]

    @pytest.mark.end_to_end
    def test_nothing_is_left_of_a_removed_adapter(self):
        """Rows that a request holds are let go with it."""
        _, plain, bank = banked()
        with plain.continuous_batching_context_manager(
            generation_config=generation(), continuous_batching_config=small()
        ) as manager:
            results(manager, manager.add_request(PROMPT, adapter="a"))
            results(manager, manager.add_request(PROMPT, adapter="b"))
            bank.remove("a")
            gc.collect()
            assert [each.name for each in bank._requests._taken.values()] == ["b"]


@pytest.mark.end_to_end
def test_operations_do_not_depend_on_the_number_of_adapters():
    tuned, plain, bank = banked(*"abcdfghi")
    del tuned
    bank._requests.facts()  # measured once
    counts = set()
    for names in (["a"] * 8, list("abcdfghi"), ["a", "b"] * 4):
        manager = plain.init_continuous_batching(generation_config=generation(), continuous_batching_config=small())
        manager.warmup()
        for name in names:
            manager.add_request(PROMPT[:5], adapter=name)
        steps = []
        for _ in range(2):  # prefill, and one token each
            manager.batch_processor.prepare_next_batch()
            steps.append(count_operations(manager._generation_step))
            manager.batch_processor.update_batch()
        counts.add(tuple(steps))
        manager.destroy()
    assert len(counts) == 1
    assert bank.names == list("abcdfghi")


@pytest.mark.end_to_end
def test_forward_passes_of_other_threads_are_refused_while_a_step_runs():
    """They would run in the engine's rows."""
    _, plain, bank = banked()
    manager = plain.init_continuous_batching(generation_config=generation(), continuous_batching_config=small())
    manager.add_request(PROMPT, adapter="a")
    inside, done, found = threading.Event(), threading.Event(), []

    def wait(*_):
        if not found:
            inside.set()
            done.wait(20)

    plain.model.layers[0].register_forward_pre_hook(wait)
    manager.start()
    assert inside.wait(20)
    try:
        plain(torch.tensor([PROMPT]))
    except RoutingError as error:
        found.append(str(error))
    done.set()
    assert "belongs to that one" in found[0]
    assert len(results(manager, "req_0")[0]) == NEW
    manager.stop()
    manager.destroy()
    assert bank.names == ["a", "b"]
