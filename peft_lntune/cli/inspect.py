"""`peft-lntune inspect`: what is in an adapter directory, without any model."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from peft_lntune.analysis import Table
from peft_lntune.architectures.components import find_components
from peft_lntune.config import LNTuneConfig, SupermaskConfig, parts_of
from peft_lntune.config.parts import build
from peft_lntune.config.stored import KINDS, StoredConfig
from peft_lntune.core.delta import unpack_bits
from peft_lntune.core.supermask import kept
from peft_lntune.errors import AdapterFileError
from peft_lntune.storage.adapter_file import CONFIG_FILE, WEIGHTS_FILE
from peft_lntune.storage.keys import CONTAINERS, LORA, is_ours
from peft_lntune.storage.packing import DELTAS, KEEP, PREFIX, ROOT, SCORES, is_packed
from peft_lntune.storage.saved_adapter import SavedAdapter

__all__ = ["AdapterReport", "command", "inspect_adapter"]


@dataclass(frozen=True)
class AdapterReport:
    """What `inspect_adapter` found. Printing it gives all of it.

    Attributes:
        directory: where the adapter is.
        config: its config; `config.kind`, `config.manifest`, ...
        entries: a table with columns `method`, `where`, `parameter`, `layers`, `modules`, `entries` and `bytes`: a row
            for what is tuned in one place of all layers. Rows of `method` "head" are modules saved whole. Where a
            supermask is saved as bits, its entries are counted in whole bytes.
        file_bytes: size of each file.
        masks: by part, how its mask was made, and of a supermask the share that it switches off; empty where all
            entries are tuned.
        problem: what is wrong with the weights, such as another digest than the config says; None: they are good.
    """

    directory: Path
    config: LNTuneConfig
    entries: Table
    file_bytes: dict[str, int]
    masks: dict[str, dict[str, Any]]
    problem: str | None

    @property
    def digest(self) -> str:
        """`"ok"`, `"wrong"`, or `"not recorded"` where the config was saved without one."""
        if self.problem:
            return "wrong"
        return "ok" if (self.config.manifest or {}).get("digest") else "not recorded"

    def __str__(self) -> str:
        config = self.config
        parts = [type(part).__name__ for part in parts_of(config)]
        facts = {
            "adapter": str(self.directory),
            "kind": config.kind + (f" of {', '.join(parts)}" if parts != [config.kind] else ""),
            "task": config.task_type or "not said",
            "base model": config.base_model_name_or_path or "not said",
            "saved by": f"peft_lntune {config.peft_lntune_version}, format {config.format_version}",
            "files": ", ".join(f"{name} ({size:,} bytes)" for name, size in self.file_bytes.items()),
            "digest": self.digest,
            "mask": "; ".join(f"{part}: {_said(source)}" for part, source in self.masks.items()) or "none: all entries",
        }
        lines = [f"{name:<12}{value}" for name, value in facts.items()]
        tuned = [row for row in self.entries.rows if row[0] != "head"]
        heads = sum(row[5] for row in self.entries.rows if row[0] == "head")
        total = f"{sum(row[5] for row in tuned):,} tuned entries" + (f", and {heads:,} of heads" if heads else "")
        return "\n".join([*lines, "", str(self.entries), "", f"{total}."])


def inspect_adapter(directory: str | Path) -> AdapterReport:
    """What is in the directory of a saved adapter: kind, parts, entries, where they are, bytes, mask, digest.

    No model is loaded, so places are told by names alone: of a norm the path is given, not the role.

    Args:
        directory: what `save_pretrained` wrote.

    Returns:
        The report. Where the weights do not belong to the config it says so in `problem`, and does not raise.

    Raises:
        AdapterFileError: there is no adapter of this package, or a file is missing, damaged or cut off.
        ConfigError: the config is damaged, or of a newer format.

    Example:
        >>> import tempfile
        >>> from peft import get_peft_model
        >>> from peft_lntune import LNTuningConfig
        >>> directory = tempfile.mkdtemp()
        >>> get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), LNTuningConfig()).save_pretrained(directory)
        >>> report = inspect_adapter(directory)
        >>> report.digest, report.entries.column("entries")
        ('ok', [4, 4])
    """
    folder, saved, problem = Path(directory), SavedAdapter(directory), None
    config = build(saved.own_fields, KINDS)
    weights = folder / WEIGHTS_FILE
    if saved.weights != weights:
        raise AdapterFileError(f"{folder} holds pickled weights, which are not read: they may run code.")
    tensors = dict(sorted(saved.tensors.items()))
    try:
        StoredConfig(**saved.own_fields)  # says which fields were changed
        saved.check(config.manifest)
    except AdapterFileError as error:
        problem = str(error)
    masks = {type(part).__name__: source for part in parts_of(config) if (source := _source(part, tensors))}
    sizes = {file.name: file.stat().st_size for file in (folder / CONFIG_FILE, weights)}
    return AdapterReport(folder, config, _entries(tensors, config.manifest or {}), sizes, masks, problem)


def _source(part: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """How the mask of a part was made."""
    if not isinstance(part, SupermaskConfig):
        return getattr(part, "mask_source", None)
    entries, stay = 0, 0
    for name in _supermasks(tensors):
        tensor = tensors[name]
        shape = torch.Size([8 * len(tensor)]) if name.endswith(KEEP) else tensor.shape
        entries += shape.numel()
        stay += int((unpack_bits(tensor, shape) if name.endswith(KEEP) else kept(tensor)).sum())
    return {"initial_sparsity": part.initial_sparsity, "sparsity": round(1 - stay / max(1, entries), 4)}


def _supermasks(tensors: Iterable[str]) -> list[str]:
    """The tensors of a file that hold a supermask, of each its scores, or its bits where there are no scores."""
    names = set(tensors)
    return [
        name
        for name in tensors
        if name.endswith(SCORES) or (name.endswith(KEEP) and name.removesuffix(KEEP) + SCORES not in names)
    ]


def _entries(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> Table:
    """Tensors of a file, those of one place in all layers as one row."""
    found: list[tuple[str, str, int, int]] = []  # method, name of a parameter, entries, bytes
    rest, supermasks = 0, set(_supermasks(tensors))
    for key, tensor in tensors.items():
        name, size = key.removeprefix(ROOT), tensor.nbytes
        if is_packed([key]):
            rest += size if key.endswith(".mask") else 0
        elif name.endswith(KEEP):
            found.append((*_method(name), 8 * size if key in supermasks else 0, size))
        else:
            found.append((*_method(name), 0 if name.endswith(".mask") else tensor.numel(), size))
    packed = next((tensor for key, tensor in tensors.items() if is_packed([key]) and not key.endswith(".mask")), None)
    if packed is not None:
        alone = {name for _, name, _, _ in found}
        for name, count in manifest.get("tuned", {}).items():
            parameter = name.replace(f".{PREFIX}", ".")
            if count is not None and parameter not in alone:
                found.append(("delta", parameter, count, count * packed.itemsize))
    places = find_components(name for _, name, _, _ in found)
    rows: dict[tuple[str, str, str], list[tuple[int | None, str, int, int]]] = defaultdict(list)
    for method, name, entries, size in found:
        place = places[name]
        parameter = place.parameter if method in ("delta", "head", "supermask") else "-"
        rows[method, place.component, parameter].append((place.layer, name.rpartition(".")[0], entries, size))
    lines: list[tuple[Any, ...]] = [
        (
            *cells,
            _ranges({layer for layer, *_ in parts if layer is not None}),
            len({module for _, module, _, _ in parts}),
            sum(entries for _, _, entries, _ in parts),
            sum(size for *_, size in parts),
        )
        for cells, parts in rows.items()
    ]
    if rest:
        lines.append(("bits of masks", "-", "-", None, None, 0, rest))
    return Table(("method", "where", "parameter", "layers", "modules", "entries", "bytes"), lines)


def _method(name: str) -> tuple[str, str]:
    """What a tensor of a file belongs to, and a parameter of the base model that says where that is."""
    if not is_ours(name):
        return "head", name
    parts = name.split(".")
    at = max(place for place, part in enumerate(parts) if part.startswith(CONTAINERS))
    host, container = ".".join(parts[:at]), parts[at]
    if container in DELTAS:
        return "delta", f"{host}.{container.removeprefix(PREFIX)}"
    if container.startswith(LORA):
        return "lora", f"{host}.weight"
    if name.endswith((SCORES, KEEP)):
        return "supermask", f"{host}.weight"
    host, _, child = host.rpartition(".")  # a layer beside a module, such as attention_bottleneck or kv_prefix
    return child.rpartition("_")[2], f"{host}.weight"


def _ranges(layers: Iterable[int]) -> str | None:
    """`0-2, 5` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs) or None


def _said(source: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in source.items())


@click.command("inspect", short_help="What is in an adapter directory, without loading a model.")
@click.argument("adapter", type=click.Path(path_type=Path))
def command(adapter: Path) -> None:
    """Say what is in the directory ADAPTER: kind and parts, entries, where they are, bytes, and how its mask was made.

    No model is loaded. Where the weights are not those that the config was saved with, the report ends with an error.

    \b
    Example:
      peft-lntune inspect ./my-adapter
    """
    report = inspect_adapter(adapter)
    click.echo(str(report))
    if report.problem:
        raise click.ClickException(report.problem)
