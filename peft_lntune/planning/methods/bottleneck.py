"""Bottlenecks behind a sub-layer, or beside one.

A weighted sum of bottlenecks is one wider bottleneck, exactly:

    w_1 s_1 U_1 f(D_1 x) + w_2 s_2 U_2 f(D_2 x) = [w_1 s_1 U_1, w_2 s_2 U_2] f([D_1; D_2] x)
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from peft import PeftConfig
from torch import nn

from peft_lntune.architectures.sublayers import SublayerRole
from peft_lntune.config import BottleneckConfig
from peft_lntune.core.bottleneck import read_widths
from peft_lntune.errors import NoMatchError, UnsupportedError
from peft_lntune.layers import BottleneckLayer
from peft_lntune.layers.bottleneck import check_combine, combine_bottlenecks
from peft_lntune.planning.facts import ModelFacts
from peft_lntune.planning.gaps import find_gaps
from peft_lntune.planning.methods.inserted import InsertedMethod
from peft_lntune.planning.methods.method import Counts, Injection, Spot, WeightedSum
from peft_lntune.planning.targets import is_chosen
from peft_lntune.planning.types import Plan, PlannedModule

__all__ = ["Bottlenecks"]


class Bottlenecks(InsertedMethod):
    """A bottleneck on each chosen sub-layer."""

    name = "bottleneck"

    def plan(self, facts: ModelFacts, config: BottleneckConfig, counts: Counts = None) -> Plan:
        """Plan a bottleneck at the end of each sub-layer with a chosen role.

        Args:
            facts: facts of the model.
            config: says which roles and layers, and how wide a bottleneck is.
            counts: not used; bottlenecks have no masks.

        Returns:
            The plan. Sub-layers of a chosen role without a place are in `left_out`.

        Raises:
            NoMatchError: no sub-layer is chosen.
            UnsupportedError: the width of every chosen sub-layer is unknown.
        """
        modules, sublayers = facts.modules, facts.sublayers
        parts, narrow = {}, {}
        for sublayer in sublayers:
            name = sublayer.exit
            if sublayer.role not in config.roles or not is_chosen(config, name):
                continue
            out = modules[name]
            try:
                reads = read_widths(modules[sublayer.entry], out, name)
            except UnsupportedError as error:
                narrow[name] = error
                continue
            width = reads["sequential"]
            size = config.size_of(width)
            sizes = {"down": size * (reads[config.position] + 1), "up": width * (size + 1)}
            sizes |= {"scale": 1} if config.learns_scale else {}
            parts[name] = self.planned(config, name, out, sublayer, sizes)
        if narrow and not parts:
            raise next(iter(narrow.values()))
        if not parts:
            known = ", ".join(f"{s.exit} ({s.role})" for s in sublayers) or "none"
            raise NoMatchError(
                f"BottleneckConfig(roles={config.roles!r}) finds no place in this model. Sub-layers whose end is "
                f"known: {known}. Choose among their roles and layers, or use another part if there are none."
            )
        places = [(s.role, leaf) for s in sublayers for leaf in (s.entry, s.exit)]
        reason = "no leaf is known that answers for the whole sub-layer"
        gaps = {
            **dict.fromkeys(narrow, "the width of its leaves is not known"),
            **find_gaps(modules, config.roles, places, reason),
        }
        return Plan(parts, {name: why for name, why in gaps.items() if is_chosen(config, name)})

    def host(self, spot: Spot) -> nn.Module:
        """Return the parent of the sub-layer's last module: the bottleneck becomes its child."""
        return spot.parent

    def make_layer(self, injection: Injection, part: PlannedModule) -> BottleneckLayer:
        """Make the layer for a planned sub-layer, not yet attached.

        Args:
            injection: the injection under way.
            part: the planned module.

        Returns:
            A layer without adapters.
        """
        place: Any = part.place
        return BottleneckLayer.of(injection.route, place, injection.modules)

    def sum_parts(self, facts: ModelFacts, parts: Mapping[str, Sequence[Any]], wanted: WeightedSum) -> list[PeftConfig]:
        """Make a config for each role and width. If only one source tunes a sub-layer, the sum is as wide as it.

        Args:
            facts: facts of the model that holds the adapters.
            parts: the bottleneck parts of each adapter, by adapter name.
            wanted: the sum.

        Returns:
            One `BottleneckConfig` for each role and width.

        Raises:
            UnsupportedError: bottlenecks on one sub-layer differ in position or activation.
        """
        names = list(parts)
        alike: dict[tuple[str, int], list[BottleneckLayer]] = {}
        for layer in facts.model.modules():
            if isinstance(layer, BottleneckLayer) and any(layer.holds(name) for name in names):
                check_combine(layer, names)
                width = sum(layer.size_of(name) for name in names if layer.holds(name))
                alike.setdefault((layer.role, width), []).append(layer)
        found: list[PeftConfig] = []
        for (role, width), layers in alike.items():
            recipe = layers[0].recipe(next(name for name in names if layers[0].holds(name)))
            config = BottleneckConfig(
                position=recipe.position,
                activation=recipe.activation,
                roles=[cast(SublayerRole, role)],
                bottleneck_size=width,
                layers_to_transform=_layers_of(layers),
            )
            # Layers are chosen by number, and encoder and decoder count from the same number.
            others = sorted(self.plan(facts, config).parts.keys() - {layer.label for layer in layers})
            found.append(replace(config, exclude_modules=others or None))
        return found

    def sum_into(self, model: nn.Module, wanted: WeightedSum, into: str) -> bool:
        """Fill the bottlenecks of an adapter with the joined matrices of its sources.

        Args:
            model: the model that holds the adapters.
            wanted: the sum.
            into: the adapter to fill.

        Returns:
            False: bottlenecks have no masks.
        """
        names, weights = list(wanted.totals), list(wanted.totals.values())
        for layer in model.modules():
            if isinstance(layer, BottleneckLayer) and layer.holds(into):
                combine_bottlenecks(layer, names, weights, into)
        return False


def _layers_of(layers: Sequence[BottleneckLayer]) -> list[int] | None:
    numbers = [[int(part) for part in layer.label.split(".") if part.isdigit()][:1] for layer in layers]
    return sorted({number for found in numbers for number in found}) or None
