"""Serves adapters of norms in vLLM, as LoRA that is made when an adapter is first asked for.

vLLM takes LoRA alone, and finds this module by its entry point `vllm.general_plugins` (pyproject.toml). It is loaded in
every process of vLLM, so it imports nothing but the standard library and vLLM: not `peft_lntune`, and no torch. The
conversion (`peft_lntune.interop.to_lora`) runs in a process of its own, which ends when it has been idle for a minute.

vLLM's two variables say where adapters are: `VLLM_LORA_RESOLVER_CACHE_DIR`, a folder with a directory per adapter, and
`VLLM_LORA_RESOLVER_HF_REPO_LIST`, repositories on the Hub, separated by commas. LoRA adapters there are left to vLLM's
own resolvers. Three more:

- `PEFT_LNTUNE_MAX_RANK`: the largest rank to make, that of `--max-lora-rank`; 16 if not given, as in vLLM.
- `PEFT_LNTUNE_TRUNCATE=1`: adapters that need a larger rank are truncated to it, which changes their answers.
- `PEFT_LNTUNE_CACHE`: folder of the converted adapters; `~/.cache/peft_lntune/vllm` if not given.
"""

import asyncio
import hashlib
import json
import logging
import multiprocessing
import os
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["NormResolver", "Settings", "convert", "register"]

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
IDLE_SECONDS = 60.0
"""How long the converting process waits for another adapter before it ends and gives its memory back."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")

log = logging.getLogger("vllm.peft_lntune")  # below vLLM's logger, so that its handlers show it


@dataclass(frozen=True)
class Settings:
    """Where adapters are, and how they are converted.

    Attributes:
        folder: has a directory per adapter; None: none.
        repositories: names on the Hub that may be asked for.
        max_rank: the largest rank to make.
        truncate: whether an adapter that needs a larger rank is truncated to it.
        cache: folder of converted adapters.
    """

    folder: Path | None
    repositories: tuple[str, ...]
    max_rank: int
    truncate: bool
    cache: Path

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read the variables that the module's text names.

        Raises:
            ValueError: a variable has a value that is not allowed.
        """
        folder, listed = os.getenv("VLLM_LORA_RESOLVER_CACHE_DIR"), os.getenv("VLLM_LORA_RESOLVER_HF_REPO_LIST", "")
        rank, truncate = os.getenv("PEFT_LNTUNE_MAX_RANK", "16"), os.getenv("PEFT_LNTUNE_TRUNCATE", "0")
        if not rank.isdecimal() or int(rank) < 1:
            raise ValueError(f"PEFT_LNTUNE_MAX_RANK={rank!r} should be the number given as --max-lora-rank.")
        if truncate not in ("0", "1"):
            raise ValueError(f"PEFT_LNTUNE_TRUNCATE={truncate!r} should be 0 or 1.")
        cache = os.getenv("PEFT_LNTUNE_CACHE") or os.path.join("~", ".cache", "peft_lntune", "vllm")
        return cls(
            folder=Path(folder) if folder else None,
            repositories=tuple(name.strip() for name in listed.split(",") if name.strip()),
            max_rank=int(rank),
            truncate=truncate == "1",
            cache=Path(cache).expanduser(),
        )


class NormResolver:
    """What vLLM asks for an adapter that it does not know by name. It has the interface of `LoRAResolver`.

    Args:
        settings: where adapters are, and how they are converted.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._refused: dict[str, str] = {}  # name -> digest of what was refused
        self._pool: ProcessPoolExecutor | None = None
        self._waiting = 0
        self._ending: asyncio.TimerHandle | None = None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Find an adapter of this package by name, and convert it if that has not been done.

        Args:
            base_model_name: folder or name of the model that vLLM serves.
            lora_name: the name in the request: a directory in the folder, or a repository on the Hub and a folder
                in it.

        Returns:
            A `LoRARequest`, or None if there is no such adapter of this package, or it was refused. The reason for a
            refusal is logged once, until the adapter changes.
        """
        folder = await asyncio.to_thread(self._find, lora_name)
        if folder is None:
            return None
        key = ""
        try:
            key = await asyncio.to_thread(_digest, folder, base_model_name, self.settings)
            made = self.settings.cache / key
            if not (made / WEIGHTS_FILE).is_file():
                if self._refused.get(lora_name) == key:
                    return None
                await self._convert(base_model_name, folder, made)
        except Exception as error:  # whatever it is, vLLM goes on without this adapter
            self._refused[lora_name] = key
            log.error("adapter %r in %s is not served: %s", lora_name, folder, error)
            return None
        self._refused.pop(lora_name, None)
        from vllm.lora.request import LoRARequest

        # vLLM replaces the number by one of its own.
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(made))

    def _find(self, name: str) -> Path | None:
        """The directory of an adapter of this package."""
        if not _NAME.fullmatch(name):
            return None
        if self.settings.folder is not None and _is_ours(self.settings.folder / name):
            return self.settings.folder / name
        for repository in self.settings.repositories:
            if name == repository or name.startswith(f"{repository}/"):
                inside = name[len(repository) + 1 :]
                from huggingface_hub import snapshot_download

                files = [str(Path(inside, file)) for file in (CONFIG_FILE, WEIGHTS_FILE)]
                folder = Path(snapshot_download(repository, allow_patterns=files), inside)
                return folder if _is_ours(folder) else None
        return None

    async def _convert(self, base: str, folder: Path, made: Path) -> None:
        """Convert an adapter in the other process."""
        if self._ending is not None:
            self._ending.cancel()
        if self._pool is None:
            self._pool = ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))
        self._waiting += 1
        try:
            loop, limits = asyncio.get_running_loop(), (self.settings.max_rank, self.settings.truncate)
            log.info("%s", await loop.run_in_executor(self._pool, convert, base, str(folder), str(made), *limits))
        except Exception:
            if getattr(self._pool, "_broken", False):
                self._end()
            raise
        finally:
            self._waiting -= 1
            if self._waiting == 0 and self._pool is not None:
                self._ending = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._end)

    def _end(self) -> None:
        if self._pool is not None and self._waiting == 0:
            self._pool.shutdown(wait=False)
            self._pool = None


def convert(base: str, folder: str, made: str, max_rank: int, truncate: bool) -> str:
    """Write an adapter of this package as LoRA. Loads the base model into memory, in its own dtype.

    Args:
        base: folder or name of the base model.
        folder: directory of the adapter.
        made: the directory to write; it appears whole or not at all.
        max_rank: the largest rank to make.
        truncate: whether an adapter that needs a larger rank is truncated to it.

    Returns:
        One line that says what was written.

    Raises:
        ValueError: the adapter needs a larger rank, cannot be written as LoRA, or does not fit the model.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import peft_lntune.interop  # registers the adapter type with PEFT

    try:
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval(), folder
        ).eval()
        Path(made).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=Path(made).parent) as parent:
            found = peft_lntune.interop.to_lora(model, Path(parent, "lora"), rank=max_rank if truncate else None)
            if found.rank > max_rank:
                raise ValueError(
                    f"it is exact at rank {found.rank}, and this server makes at most rank {max_rank}. Start it with "
                    f"--max-lora-rank {found.rank} and PEFT_LNTUNE_MAX_RANK={found.rank}, or with "
                    "PEFT_LNTUNE_TRUNCATE=1, which changes answers."
                )
            os.replace(Path(parent, "lora"), made)
    except Exception as error:
        # Errors of libraries may hold what cannot be sent to the other process.
        raise ValueError(f"{type(error).__name__}: {error}") from None
    exactly = (
        "exactly" if found.exact else f"truncated, with an error of {found.error / found.effect:.1e} of its effect"
    )
    return f"{folder} as LoRA of rank {found.rank}, {exactly}"


def register() -> None:
    """The entry point: make the resolver known to vLLM, if one of its variables says where adapters are."""
    settings = Settings.from_environment()
    if settings.folder is None and not settings.repositories:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    LoRAResolverRegistry.register_resolver("peft_lntune", NormResolver(settings))


def _is_ours(folder: Path) -> bool:
    """Whether a directory holds an adapter of this package."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == "LNTUNE"


def _digest(folder: Path, base: str, settings: Settings) -> str:
    """A name for what an adapter becomes: another one if its files, the base, the rank or this package change."""
    from importlib.metadata import version

    found = hashlib.sha256()
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        found.update((folder / file).read_bytes())
    of_base = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(Path(base).glob("*.safetensors"))
    ]
    said = [base, of_base, settings.max_rank, settings.truncate, version("peft_lntune")]
    found.update(json.dumps(said).encode())
    return found.hexdigest()[:32]
