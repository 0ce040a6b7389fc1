"""The contents of an adapter folder, without loading a model."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_lntune.analysis import Table
from peft_lntune.analysis.tables import fill
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

__all__ = ["AdapterReport", "inspect_adapter"]


@dataclass(frozen=True)
class AdapterReport:
    """The result of `inspect_adapter`. Printing it shows everything.

    Attributes:
        directory: folder of the adapter.
        config: config of the adapter, such as `config.kind` and `config.manifest`.
        entries: a table with columns `method`, `where`, `parameter`, `layers`, `modules`, `entries` and `bytes`. Each
            row is one place, pooled over layers. Rows with `method` "head" are modules saved whole. Entries of a
            supermask saved as bits are counted in whole bytes.
        file_bytes: size of each file in bytes, by name.
        masks: for each part, how its mask was made, and for a supermask the share it switches off; empty if all entries
            are tuned.
        problem: what is wrong with the weights, such as a digest that differs; None if nothing is wrong.
    """

    directory: Path
    config: LNTuneConfig
    entries: Table
    file_bytes: dict[str, int]
    masks: dict[str, dict[str, Any]]
    problem: str | None

    @property
    def digest(self) -> str:
        """`"ok"`, `"wrong"`, or `"not recorded"` if the config was saved without a digest."""
        if self.problem:
            return "wrong"
        return "ok" if (self.config.manifest or {}).get("digest") else "not recorded"

    def to_data(self) -> dict[str, Any]:
        """The report as plain data, for JSON.

        Returns:
            The facts and the table. `tuned` and `head` are numbers of entries.
        """
        config = self.config
        return {
            "adapter": str(self.directory),
            "kind": config.kind,
            "parts": [type(part).__name__ for part in parts_of(config)],
            "task": config.task_type,
            "base_model": config.base_model_name_or_path,
            "version": config.peft_lntune_version,
            "format": config.format_version,
            "files": self.file_bytes,
            "digest": self.digest,
            "masks": self.masks,
            "problem": self.problem,
            "table": self.entries,
            "tuned": sum(row[5] for row in self.entries.rows if row[0] != "head"),
            "head": sum(row[5] for row in self.entries.rows if row[0] == "head"),
        }

    def to_text(self, width: int | None = None) -> str:
        """The report as text.

        Args:
            width: longest line; None: no limit. A line may be longer if one word or path is.

        Returns:
            The facts, the table and the total.
        """
        data = self.to_data()
        parts = data["parts"]
        facts = {
            "adapter": data["adapter"],
            "kind": data["kind"] + (f" of {', '.join(parts)}" if parts != [data["kind"]] else ""),
            "task": data["task"] or "not said",
            "base model": data["base_model"] or "not said",
            "saved by": f"peft_lntune {data['version']}, format {data['format']}",
            "files": ", ".join(f"{name} ({size:,} bytes)" for name, size in self.file_bytes.items()),
            "digest": self.digest,
            "mask": "; ".join(f"{part}: {_said(source)}" for part, source in self.masks.items()) or "none: all entries",
        }
        lines = [fill(f"{name:<12}{value}", width, " " * 12) for name, value in facts.items()]
        total = f"{data['tuned']:,} tuned entries" + (f", and {data['head']:,} of heads" if data["head"] else "")
        return "\n".join([*lines, "", self.entries.to_text(width), "", f"{total}."])

    def __str__(self) -> str:
        return self.to_text()


def inspect_adapter(directory: str | Path) -> AdapterReport:
    """Report what is in the folder of a saved adapter: kind, parts, entries and their places, bytes, mask, digest.

    No model is loaded, so places come from names alone: norms are listed by path, not by role.

    Args:
        directory: the folder that `save_pretrained` wrote.

    Returns:
        The report. If the weights do not match the config, `problem` says so, and nothing is raised.

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
    """How the mask of a part was made, and for a supermask the share it switches off."""
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
    """Names of the tensors that hold a supermask: its scores, or its bits if scores were not saved."""
    names = set(tensors)
    return [
        name
        for name in tensors
        if name.endswith(SCORES) or (name.endswith(KEEP) and name.removesuffix(KEEP) + SCORES not in names)
    ]


def _entries(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> Table:
    """The table of the tensors of a file, with one row per place, pooled over layers."""
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
    """The method that a tensor of a file belongs to, and the parameter of the base model at its place."""
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
