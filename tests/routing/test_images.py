"""Images, which belong to the rows that have their placeholders: none, one or several to a row."""

import pytest
import torch
import transformers as hf

from peft_lntune.errors import RoutingError
from tests.adapted import adapt
from tests.test_rows import routing

IMAGE = [63] * 4
OPTIONS = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def llava():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16),
        text_config=hf.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, pad_token_id=0),
        image_token_id=63,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model


def batch(counts):
    """Rows of texts with so many images each, padded on the left."""
    rows = [[5 + n, *([9, *IMAGE] * count), 10 + n] for n, count in enumerate(counts)]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    pixels = torch.randn(sum(counts), 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": (ids != 0).long()} | ({"pixel_values": pixels} if sum(counts) else {})


def row_of(given, counts, number):
    first = sum(counts[:number])
    row = {name: value[number : number + 1] for name, value in given.items() if name != "pixel_values"}
    return row | ({"pixel_values": given["pixel_values"][first : first + counts[number]]} if counts[number] else {})


def first_logits(model, way, given, **routed):
    with torch.no_grad():
        if way == "forward":
            return model(**given, **routed).logits[:, -1]
        return model.generate(**given, **routed, **OPTIONS, **LOGITS).logits[0]


def each_alone(tuned, way, counts, names):
    found = []
    for number, name in enumerate(names):
        tuned.set_adapter(name)
        found.append(first_logits(tuned, way, row_of(batch(counts), counts, number))[0])
    return torch.stack(found)


@pytest.mark.parametrize("way", ["forward", "generate"])
class TestImages:
    @pytest.mark.parametrize("names", [["a", "b"], ["b", "a", "b"]], ids=len)
    def test_one_for_each_row(self, way, names):
        tuned, counts = adapt(llava(), "a", "b"), [1] * len(names)
        wanted = each_alone(tuned, way, counts, names)
        assert not torch.allclose(wanted, each_alone(tuned, way, counts, ["a"] * len(names)), **CLOSE)
        torch.testing.assert_close(first_logits(tuned, way, batch(counts), adapter_names=names), wanted, **CLOSE)

    @pytest.mark.parametrize("before", [None, "text"])
    @pytest.mark.parametrize("counts", [[0, 2], [1, 2, 0, 1]], ids=str)
    def test_as_many_as_rows_by_chance_are_refused(self, way, counts, before):
        """Whatever ran before, with other images; the second example has the first and the last image in place."""
        tuned, names = adapt(llava(), "a", "b"), ["a", "b", "a", "b"][: len(counts)]
        if before:
            first_logits(tuned, "generate", batch([0] * len(names)), adapter_names=names)
        with pytest.raises(RoutingError, match="not one image, or the like, for each row"):
            first_logits(tuned, way, batch(counts), adapter_names=names)

    def test_any_number_where_no_layer_of_images_is_tuned(self, way):
        counts, names = [0, 2, 1], ["a", "b", "a"]
        tuned = adapt(llava(), "a", "b", target_modules=r".*language_model.*norm")
        wanted = each_alone(tuned, way, counts, names)
        torch.testing.assert_close(first_logits(tuned, way, batch(counts), adapter_names=names), wanted, **CLOSE)

    def test_a_model_that_cannot_be_run_on_the_side_is_refused(self, way):
        tuned = adapt(llava(), "a", "b")
        tuned.get_base_model().lock = __import__("threading").Lock()
        with pytest.raises(RoutingError, match="to see which row each of them belongs to"):
            first_logits(tuned, way, batch([1, 1]), adapter_names=["a", "b"])


def test_a_bank_generates_with_one_image_for_each_row():
    tuned, names = adapt(llava(), "a", "b"), ["b", "a"]
    wanted = each_alone(tuned, "forward", [1, 1], names)
    with routing("bank", tuned) as run, torch.no_grad():
        torch.testing.assert_close(run(names, **batch([1, 1])).logits[:, -1], wanted, **CLOSE)


def test_a_cache_that_is_used_again_is_another_generation():
    """Its facts are those of the images that filled it."""
    tuned, cache, names = adapt(llava(), "a", "b"), hf.DynamicCache(), ["a", "b"]
    with torch.no_grad():
        tuned(**batch([1, 1]), past_key_values=cache, adapter_names=names)
        cache.crop(0)
        with pytest.raises(RoutingError, match="for each row"):
            tuned(**batch([0, 2]), past_key_values=cache, adapter_names=names)
