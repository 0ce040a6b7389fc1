"""The server on parts of `transformers serve`: an adapter per model name, in one engine."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.continuous.engines import alone, small, speaking

pytest.importorskip("openai", reason="transformers[serving] is not installed")
testclient = pytest.importorskip("fastapi.testclient")
server = pytest.importorskip("serve_transformers")

PROMPT = "w5 w6 w7 w8 w9 w10"


@pytest.mark.end_to_end
def test_a_model_name_per_adapter(tmp_path):
    tuned: PeftModel = speaking("french", "german")
    adapters, model = tmp_path / "adapters", tmp_path / "model"
    tuned.save_pretrained(str(adapters))
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(50)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(model)
    speaking("x").unload().save_pretrained(model)

    engines = server.TenantEngines(str(model), small())
    tenants = server.Tenants(str(model), adapters, device="cpu", dtype="float32")
    ids = [int(word[1:]) for word in PROMPT.split()]
    wanted = {
        name: " ".join(f"w{token}" for token in alone(tuned, ids, key))
        for name, key in (("french", "french"), ("german", "german"), (str(model), "__base__"))
    }
    assert len(set(wanted.values())) == 3
    with testclient.TestClient(server.make_app(tenants, engines)) as client:

        def said(name):
            body = {"model": name, "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
            return client.post("/v1/completions", json=body)

        try:
            with ThreadPoolExecutor(3) as pool:
                answers = dict(zip(wanted, pool.map(said, wanted), strict=True))
            assert {name: answer.json()["choices"][0]["text"] for name, answer in answers.items()} == wanted
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [
                str(model),
                "french",
                "german",
            ]
            missing = said("spanish")
            assert (missing.status_code, "no adapter 'spanish'" in missing.text) == (404, True)
        finally:
            engines.shutdown()
