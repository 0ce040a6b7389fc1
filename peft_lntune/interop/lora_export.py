"""Makes one LoRA adapter of an adapter of norms: folds, truncates, writes, loads it with PEFT, and compares."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_lntune.config import LNTuneConfig
from peft_lntune.core.low_rank import LowRank, fold_gain, joined, padded, scaled, truncated
from peft_lntune.core.module_tree import base_modules, called_modules
from peft_lntune.errors import ConfigError, UnsupportedError
from peft_lntune.interop.answers import answers, distance, few_tokens, inputs_of, masks_of, rounding
from peft_lntune.interop.folds import Fold, linear_maps, plan_folds, weight_of
from peft_lntune.interop.layer_types import untuned_of_tuned_types
from peft_lntune.interop.lora_report import RANKS, LoraExport, Spectrum, norm_table, rank_for, rank_table
from peft_lntune.layers import PARAMETERS
from peft_lntune.layers.held import deltas_in
from peft_lntune.norms import find_norms
from peft_lntune.planning.targets import is_saved, matches
from peft_lntune.routing.sharing_copy import sharing_copy
from peft_lntune.storage.adapter_file import WEIGHTS_FILE
from peft_lntune.storage.keys import is_ours
from peft_lntune.storage.packing import ROOT
from peft_lntune.storage.saving import new_adapters

__all__ = ["LoraExporter", "left_as_it_was"]

ROUNDINGS = 4
"""How many times the noise of rounding an exact export may be away from the adapter. The noise is measured with the
last bit of each norm's output changed, which is more than a norm's own rounding. Exports that are right were at most
once the noise away, in float32, bfloat16 and float16; one that misses a linear map is off by orders of magnitude."""


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back which parameters are trained, and the random state, at the end of this context.

    Copies that share tensors with the model share these flags too, and PEFT draws random values for a LoRA before it
    loads one.

    Args:
        model: the model.

    Yields:
        Nothing.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = {parameter.device for parameter, _ in flags if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


class LoraExporter:
    """The export of one adapter, by two copies of the model that share its tensors.

    Args:
        peft_model: the model; use `left_as_it_was` around everything.
        adapter_name: the adapter.
        config: its config.
        batch: a batch to check on; None: random tokens.
    """

    def __init__(self, peft_model: PeftModel, adapter_name: str, config: LNTuneConfig, batch: Any = None) -> None:
        self.name, self.config = adapter_name, config
        self.tuned = _copy(peft_model)
        self.tuned.set_adapter(adapter_name)
        self.base = _copy(peft_model).unload().eval()
        self.inputs = inputs_of(few_tokens(self.base) if batch is None else batch, self.base, few=True)
        self.called = called_modules(self.tuned.get_base_model())
        self.linears: dict[str, Any] = linear_maps(self.base)
        state = get_peft_model_state_dict(peft_model, adapter_name=adapter_name)
        self.heads = {key: value.detach().clone() for key, value in state.items() if not is_ours(key)}
        self.loras = self._own_lora()

    def export(
        self, directory: Path, rank: int | None, batches: Iterable[Any], unfoldable: str, every_layer: bool
    ) -> LoraExport:
        """Fold, truncate, write, check.

        Args:
            directory: the folder to write.
            rank: the rank; None: one at which the export is exact.
            batches: batches to calibrate a truncation on; may be empty.
            unfoldable: `"refuse"` or `"drop"`.
            every_layer: put zeros on linear maps whose counterpart in another layer has LoRA.

        Returns:
            What was written.
        """
        norms = [self.called[name] for name in find_norms(self.base)]
        wanted = answers(self.tuned, self.inputs)
        noise = rounding(self.tuned, norms, self.inputs, wanted)
        effect = distance(self._without_adapter(), wanted)
        if not math.isfinite(noise + effect):
            raise UnsupportedError(
                "the model answers with NaN or infinite values on the inputs of the check, so an export cannot be "
                "compared with the adapter. Nothing was written. Look for the weights or activations that are not "
                "finite (float16 holds nothing above 65504), or give other batches."
            )
        deltas = self._deltas()
        folds, dropped = plan_folds(self.base, deltas, self.inputs, self._saved_linears())
        if dropped and unfoldable == "refuse":
            raise UnsupportedError(
                f"adapter {self.name!r} changes {len(dropped)} modules in ways that LoRA cannot hold:"
                f"{_lines(dropped)}\n"
                'Leave them out with unfoldable="drop", which says what that costs; or merge the adapter; or train one '
                'that tunes other norms, as LNTuningConfig(roles=["attention", "ffn"]) does in most language models.'
            )
        if not folds and not self.loras:
            raise UnsupportedError(
                f"nothing of adapter {self.name!r} can be exported as LoRA: it changes nothing that can be folded."
                f"{_lines(dropped)}"
            )
        self._remove(dropped)
        expected = answers(self.tuned, self.inputs) if dropped else wanted
        dropped_effect = distance(expected, wanted)
        moments = self._fold_by_hooks(folds, expected, noise, batches)
        changes, places = self._changes(folds)
        size = self._size(changes, places, moments, rank)
        best: dict[str, LowRank] = {}
        spectra: list[Spectrum] = []
        for name, change in changes.items():
            best[name], spectrum = _spectrum(change, places[name], moments, size)
            spectra.append(spectrum)
        made = {name: padded(change if change.rank <= size else best[name], size) for name, change in changes.items()}
        added = self._zeros(made, size) if every_layer else {}
        made |= added
        exact = all(spectrum.rank <= size for spectrum in spectra)
        entries = dict.fromkeys(places.values(), 0) | {fold.norm: fold.entries for fold in folds}
        with new_adapters(directory) as folder:
            self._write(folder, made, folds, size)
            loaded = PeftModel.from_pretrained(self.base, str(folder)).eval()
            error = distance(answers(loaded, self.inputs), expected)
            _check(error, effect, noise, exact, size)
            smaller = {r: self._error_at(loaded, best, r, expected) for r in RANKS if r < size}
        measured = {r: found / effect if effect else None for r, found in (smaller | {size: error}).items()}
        ranks = rank_table(spectra, measured, sum(_sides(change) for change in added.values()))
        return LoraExport(
            directory=directory,
            rank=size,
            exact=exact,
            norms=norm_table(spectra, entries, size),
            ranks=ranks,
            effect=effect,
            error=error,
            rounding=noise,
            dropped=dropped,
            dropped_effect=dropped_effect,
            zeros=len(added),
        )

    # What the adapter holds.

    def _deltas(self) -> dict[str, dict[str, Tensor]]:
        """The changes of parameters that are not zero, by module and parameter."""
        found: dict[str, dict[str, Tensor]] = {}
        for place, delta in deltas_in(self.called, self.name).items():
            module, _, parameter = place.rpartition(".")
            dense = delta.dense()
            if dense.any():
                found.setdefault(module, {})[parameter] = dense
        return found

    def _own_lora(self) -> dict[str, LowRank]:
        """The changes of the adapter's LoRA part by linear map."""
        found = {}
        for name, layer in self.tuned.get_base_model().named_modules():
            if not isinstance(layer, LoraLayer) or self.name not in {*layer.lora_A, *layer.lora_embedding_A}:
                continue
            name = name.removesuffix(".base_layer")
            if name not in self.linears:
                kind = type(layer.get_base_layer()).__name__
                raise UnsupportedError(
                    f"adapter {self.name!r} has LoRA on {name} ({kind}), and to_lora writes LoRA on linear maps alone. "
                    "Save it with save_pretrained, or merge it."
                )
            a, b = layer.lora_A[self.name].weight.detach(), layer.lora_B[self.name].weight.detach()
            found[name] = LowRank(a.float().cpu(), b.float().cpu() * layer.scaling[self.name])
        return found

    def _saved_linears(self) -> list[str]:
        """The linear maps in heads that the adapter holds whole."""
        return [name for name in self.linears if is_saved(self.config, name)]

    # Runs of the copy with the adapter.

    def _without_adapter(self) -> list[Tensor]:
        """The answers without the adapter, but with its heads."""
        layers = [module for module in self.tuned.modules() if isinstance(module, BaseTunerLayer)]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            return answers(self.tuned, self.inputs)
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def _remove(self, places: Iterable[str]) -> None:
        """Remove the adapter's deltas from modules of the copy."""
        for place in places:
            layer: Any = self.called[place]
            for parameter in PARAMETERS:
                if self.name in layer.deltas(parameter):
                    layer.put(parameter, self.name, None)

    def _fold_by_hooks(
        self, folds: list[Fold], expected: list[Tensor], noise: float, batches: Iterable[Any]
    ) -> dict[str, Tensor]:
        """Check that scaled inputs of the linear maps stand for the changes of norms, and measure these inputs.

        Args:
            folds: the folds.
            expected: the answers of the adapter.
            noise: how far rounding moves them.
            batches: batches to measure on; may be empty.

        Returns:
            The second moments of the inputs of linear maps, by norm, or by linear map where it reads no changed norm.
        """
        self._remove(fold.norm for fold in folds)
        inputs = _Inputs()
        handles = []
        for fold in folds:
            for place, name in enumerate(fold.consumers):
                watched = fold.norm if place == 0 else None
                handles.append(
                    self._running(name).register_forward_pre_hook(inputs.scale(fold, watched), with_kwargs=True)
                )
        folded = {name for fold in folds for name in fold.consumers}
        for name in self.loras.keys() - folded:
            handles.append(self._running(name).register_forward_pre_hook(inputs.watch(name), with_kwargs=True))
        try:
            error = distance(answers(self.tuned, self.inputs), expected)
            if not error <= ROUNDINGS * noise:  # NaN too
                raise UnsupportedError(
                    f"the linear maps that read the norms do not stand for the norms of adapter {self.name!r}: folded "
                    f"into them, the logits differ by {error:.2g} from those of the adapter, and rounding explains "
                    f"{noise:.2g}. Something else in this model uses the norms or their weights. Nothing was written; "
                    "merge the adapter instead."
                )
            for batch in batches:
                inputs.masks = masks_of(batch) if isinstance(batch, Mapping) else {}
                inputs.measuring = True
                answers(self.tuned, inputs_of(batch, self.tuned))
        finally:
            for handle in handles:
                handle.remove()
        return inputs.moments()

    def _running(self, name: str) -> nn.Module:
        """The module that runs for a linear map of the base: in a head, the adapter's own copy."""
        module: Any = self.tuned.get_base_model()
        parts = name.split(".")
        for place, part in enumerate(parts):
            module = getattr(module, part)
            if isinstance(module, ModulesToSaveWrapper):
                return module.modules_to_save[self.name].get_submodule(".".join(parts[place + 1 :]))
        return self.called[name]

    # The LoRA.

    def _changes(self, folds: list[Fold]) -> tuple[dict[str, LowRank], dict[str, str]]:
        """The whole change of each linear map, and the norm that it reads, or itself."""
        changes, places = {}, {}
        saved = set(self._saved_linears())
        for fold in folds:
            for name in fold.consumers:
                if name in saved:
                    continue
                weight = weight_of(self.linears[name])
                gain, delta = fold.gain.to(weight.device), fold.delta.to(weight.device)
                change = LowRank(*(matrix.cpu() for matrix in fold_gain(weight, gain, delta)))
                if name in self.loras:
                    change = joined(change, scaled(self.loras[name], fold.gain.cpu(), fold.delta.cpu()))
                changes[name], places[name] = change, fold.norm
        for name, own in self.loras.items():
            if name not in changes:
                changes[name], places[name] = own, name
        order = [name for name in self.linears if name in changes]
        return {name: changes[name] for name in order}, {name: places[name] for name in order}

    def _zeros(self, made: Mapping[str, LowRank], size: int) -> dict[str, LowRank]:
        """LoRA of zeros on linear maps that are not tuned, but whose counterpart in another layer is."""
        saved = self._saved_linears()
        names = untuned_of_tuned_types([name for name in self.linears if name not in saved], made)
        sides = {name: _out_and_in(self.linears[name]) for name in names}
        empty = torch.zeros(0, 0, dtype=torch.float32)
        return {
            name: LowRank(empty.new_zeros(size, inputs), empty.new_zeros(out, size))
            for name, (out, inputs) in sides.items()
        }

    def _size(
        self, changes: Mapping[str, LowRank], places: Mapping[str, str], moments: Mapping[str, Tensor], rank: int | None
    ) -> int:
        """The rank to write."""
        needed = max((_needed(change) for change in changes.values()), default=1)
        size = rank_for(needed) if rank is None else rank
        if size is None:
            spectra = [_spectrum(change, places[name], moments, 0)[1] for name, change in changes.items()]
            raise ConfigError(
                f"adapter {self.name!r} needs rank {needed}, more than servers take ({RANKS[-1]}), so its export "
                f"cannot be exact. Choose a rank, as rank=64:\n{rank_table(spectra, {})}\n"
                "(changes: error of the changes of linear maps, relative to them"
                f"{'' if moments else '; give batches for a truncation that keeps what matters on them'}). Or train "
                "with FisherLNConfig(density=1.0, max_per_norm=64), which is exact at rank 64."
            )
        return size

    def _write(self, folder: Path, made: Mapping[str, LowRank], folds: list[Fold], size: int) -> None:
        tensors = dict(self.heads)
        for name, change in made.items():
            tensors[f"{ROOT}{name}.lora_A.weight"] = change.a
            tensors[f"{ROOT}{name}.lora_B.weight"] = change.b
        for fold in folds:
            for name in fold.consumers:
                key = f"{ROOT}{name}.weight"
                if key in tensors:
                    self._fold_into_head(tensors, key, fold)
        LoraConfig(
            task_type=self.config.task_type,
            base_model_name_or_path=self.config.base_model_name_or_path,
            inference_mode=True,
            r=size,
            lora_alpha=size,
            target_modules=_targets(self.base, made),
            fan_in_fan_out=bool(made) and all(isinstance(self.linears[name], Conv1D) for name in made),
            modules_to_save=self.config.modules_to_save,
        ).save_pretrained(str(folder))
        save_file(
            {key: value.cpu().contiguous() for key, value in tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"}
        )

    @staticmethod
    def _fold_into_head(tensors: dict[str, Tensor], key: str, fold: Fold) -> None:
        """Fold a norm into a linear map that is saved whole: no LoRA is needed, and a bias can be changed too."""
        weight, bias = tensors[key], f"{key.removesuffix('weight')}bias"
        wide = weight.double()
        if bias in tensors:
            tensors[bias] = (tensors[bias].double() + wide @ fold.shift.to(wide)).to(tensors[bias].dtype)
        tensors[key] = (wide * fold.factor.to(wide.device)).to(weight.dtype)

    @torch.no_grad()
    def _error_at(self, loaded: Any, best: Mapping[str, LowRank], rank: int, expected: list[Tensor]) -> float:
        """The error of the logits at a smaller rank, with its matrices put into the loaded export."""
        for name, change in best.items():
            layer = loaded.get_base_model().get_submodule(name)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            some = padded(LowRank(change.a[:rank], change.b[:, :rank]), len(a))
            a.copy_(some.a)
            b.copy_(some.b)
        return distance(answers(loaded, self.inputs), expected)


class _Inputs:
    """Pre-hooks of linear maps: they scale the input as a norm's change would, and measure it before.

    Attributes:
        measuring: whether moments are being summed.
        masks: the attention masks of the batch by their shape, which leave out padding.
    """

    def __init__(self) -> None:
        self.measuring = False
        self.masks: dict[torch.Size, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def scale(self, fold: Fold, place: str | None) -> Any:
        return partial(self._hook, fold, place)

    def watch(self, place: str) -> Any:
        return partial(self._hook, None, place)

    def moments(self) -> dict[str, Tensor]:
        """The means of `x x^T`, by place."""
        for place, total in self._sums.items():
            if not self._counts[place]:
                raise ConfigError(
                    "the attention_mask of every batch leaves out all of its tokens, so there is nothing to calibrate "
                    "on. Give batches with tokens that count."
                )
            if not bool(total.isfinite().all()):
                raise ConfigError(
                    f"the inputs of the linear maps at {place} hold NaN or infinite values on these batches, so "
                    "nothing can be calibrated on them. Give batches on which the model's activations are finite."
                )
        return {place: total / self._counts[place] for place, total in self._sums.items()}

    def _hook(self, fold: Fold | None, place: str | None, module: nn.Module, args: Any, kwargs: Any) -> Any:
        key = None if args else next(iter(kwargs))
        x = args[0] if key is None else kwargs[key]
        if self.measuring and place is not None:
            self._measure(place, x)
        if fold is None:
            return args, kwargs
        wide = torch.promote_types(x.dtype, torch.float32)
        factor, shift = fold.factor.to(wide).to(x.device), fold.shift.to(wide).to(x.device)
        changed = (x.to(wide) * factor + shift if fold.shift.any() else x.to(wide) * factor).to(x.dtype)
        return ((changed, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: changed})

    def _measure(self, place: str, x: Tensor) -> None:
        mask = self.masks.get(x.shape[:-1])
        rows = x if mask is None else x[mask.to(x.device).bool()]
        rows = rows.reshape(-1, x.shape[-1]).double()
        total = (rows.mT @ rows).cpu()
        self._sums[place] = self._sums[place] + total if place in self._sums else total
        self._counts[place] = self._counts.get(place, 0) + len(rows)


def _copy(model: nn.Module) -> Any:
    """A copy in evaluation mode that shares the tensors of the model."""
    return sharing_copy(model)[0]


def _needed(change: LowRank) -> int:
    """The rank at which a change is exact."""
    return min(change.rank, len(change.b), change.a.shape[1])


def _spectrum(change: LowRank, place: str, moments: Mapping[str, Tensor], rank: int) -> tuple[LowRank, Spectrum]:
    best, energy = truncated(change, rank, moments.get(place))
    return best, Spectrum(place, _needed(change), _sides(change), tuple(energy.tolist()))


def _out_and_in(linear: Any) -> tuple[int, int]:
    return (linear.nf, linear.nx) if isinstance(linear, Conv1D) else (linear.out_features, linear.in_features)


def _sides(change: LowRank) -> int:
    """Inputs plus outputs of the linear map."""
    return change.a.shape[1] + len(change.b)


def _check(error: float, effect: float, noise: float, exact: bool, rank: int) -> None:
    if exact and not error <= ROUNDINGS * noise:  # NaN too
        raise UnsupportedError(
            f"loaded by PEFT, the export gives logits that differ by {error:.2g} from those of the adapter, and "
            f"rounding explains {noise:.2g}. Nothing was written; merge the adapter instead."
        )
    if not exact and effect > 0 and not error < effect:
        raise UnsupportedError(
            f"truncated to rank {rank}, the export is as far from the adapter ({error:.2g}) as the base model is "
            f"({effect:.2g}). Nothing was written; choose a larger rank."
        )


def _targets(base: nn.Module, names: Iterable[str]) -> list[str]:
    """The shortest target modules that mean exactly these linear maps: their last names, or their whole names."""
    wanted = set(names)
    last = sorted({name.rpartition(".")[2] for name in wanted})
    return last if {name for name in base_modules(base) if matches(last, name)} == wanted else sorted(wanted)


def _lines(reasons: Mapping[str, str]) -> str:
    shown = [f"\n  {name}: {reason}" for name, reason in list(reasons.items())[:12]]
    return "".join([*shown, f"\n  and {len(reasons) - 12} more"] if len(reasons) > 12 else shown)
