"""Serve an adapter per model name over OpenAI's interface, with the parts that `transformers serve` is made of.

    pip install -e . 'transformers[serving]'
    python examples/serve_transformers.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapters runs/adapters
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "french", "prompt": "Once upon a time", "max_tokens": 20}'

The folder has a directory per adapter, as `save_pretrained` writes it (`runs/adapters/french`). Requests of all
adapters, and of the base model under its own name, share the steps of one engine of continuous batching. An adapter
that is put into the folder later is loaded when it is first asked for. Sampling options are those of the first request,
as in `transformers serve`; the number of tokens is each request's own.
"""

import argparse
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from transformers import ContinuousBatchingConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import CBGenerateManager, GenerationState

from peft_lntune import AdapterBank
from peft_lntune.errors import PeftLNTuneError


class Tenants(ModelManager):
    """Gives the name of each adapter the one base model.

    Args:
        model: folder or Hub id of the base model.
        folder: the folder of the adapters.
        **options: options of `ModelManager`.
    """

    def __init__(self, model: str, folder: Path, **options: Any) -> None:
        super().__init__(continuous_batching=True, model_timeout=-1, **options)
        self.base, self.folder, self._lock = model, folder, threading.Lock()
        loaded, self._processor = super().load_model_and_processor(self.process_model_name(model))
        self.bank = AdapterBank(loaded)
        self.bank.attach()

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        name = tenant_of(model_id_and_revision)
        if not hasattr(self, "bank"):  # the base model is being loaded
            return super().load_model_and_processor(model_id_and_revision, *args, **kwargs)
        with self._lock:
            if name != self.base and name not in self.bank:
                self._add(name)
        return self.bank.model, self._processor

    def _add(self, name: str) -> None:
        if name not in {path.name for path in self.folder.iterdir() if path.is_dir()}:
            raise HTTPException(404, f"no adapter {name!r}; there are {', '.join(sorted(self.bank.names))}.")
        try:
            self.bank.add(name, self.folder / name)
        except PeftLNTuneError as error:
            raise HTTPException(409, f"adapter {name!r} cannot be served: {error}") from error

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        names = [self.base, *sorted(path.name for path in self.folder.iterdir() if path.is_dir())]
        return [{"id": name, "object": "model", "owned_by": "", "created": 0} for name in names]


class TenantEngine(CBGenerateManager):
    """The one engine, under the name of a tenant.

    Args:
        state: the state that holds the engine.
        adapter: name of the tenant's adapter.
    """

    def __init__(self, state: "TenantEngines", adapter: str) -> None:
        super().__init__()
        self._state, self._adapter = state, adapter

    def init_cb(self, model: Any, gen_config: Any) -> None:
        self._cb = _Named(self._state.started(model, gen_config), self._adapter)

    def stop(self) -> None:
        self._state.shutdown()


class _Named:
    """A manager of continuous batching whose requests have one adapter."""

    def __init__(self, manager: Any, adapter: str) -> None:
        self._manager = manager
        self.add_request = partial(manager.add_request, adapter=adapter)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


class TenantEngines(GenerationState):
    """Gives each model name the one engine, with the name's adapter.

    Args:
        base: name of the base model.
        config: sizes of the engine; None: chosen by transformers from the free memory.
    """

    def __init__(self, base: str, config: ContinuousBatchingConfig | None = None) -> None:
        super().__init__(continuous_batching=True, cb_config=config)
        self._base, self._lock = base, threading.Lock()
        self._manager: Any = None

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        name = tenant_of(model_id)
        return TenantEngine(self, "__base__" if name == self._base else name)

    def started(self, model: Any, gen_config: Any) -> Any:
        """The engine, which the first request starts."""
        with self._lock:
            if self._manager is None:
                self._manager = model.init_continuous_batching(
                    generation_config=gen_config, continuous_batching_config=self._cb_config
                )
                self._manager.start()
            return self._manager

    def is_cb_alive(self) -> bool:
        return self._manager is None or self._manager.background_thread_status.fatal_error is None

    def shutdown(self) -> None:
        with self._lock:
            if self._manager is not None:
                self._manager.stop(block=True, timeout=2)
                self._manager = None


def tenant_of(model_id_and_revision: str) -> str:
    """The name that a request gave as its model.

    Example:
        >>> tenant_of("french@main")
        'french'
    """
    return model_id_and_revision.rpartition("@")[0]


def make_app(tenants: Tenants, engines: TenantEngines) -> FastAPI:
    """The application of `transformers serve`."""
    systemone = SystemOneHandler(
        model_manager=tenants, generation_state=engines, chat_template_kwargs={}, decision_config=None
    )
    return build_server(
        tenants,
        ChatCompletionHandler(tenants, engines),
        completion_handler=CompletionHandler(tenants, engines),
        response_handler=ResponseHandler(tenants, engines),
        transcription_handler=TranscriptionHandler(tenants, engines),
        systemone_handler=systemone,
        generation_state=engines,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder or Hub id of the base model")
    parser.add_argument("--adapters", required=True, type=Path, help="folder with a directory per adapter")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--num-blocks", type=int, help="blocks of the cache (default: most of the free memory)")
    parser.add_argument("--max-batch-tokens", type=int, help="tokens per step (default: chosen by transformers)")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args(arguments)
    config = ContinuousBatchingConfig(num_blocks=options.num_blocks, max_batch_tokens=options.max_batch_tokens)
    engines = TenantEngines(options.model, config)
    try:
        app = make_app(Tenants(options.model, options.adapters, device=options.device), engines)
        uvicorn.run(app, host=options.host, port=options.port)
    finally:
        engines.shutdown()


if __name__ == "__main__":
    main()
