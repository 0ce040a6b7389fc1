"""What a method of tuning says of itself: how its config is planned, put into a model, stored and summed."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from peft_lntune.core.shared import Place
from peft_lntune.layers import ReplacementLayer
from peft_lntune.planning.facts import ModelFacts
from peft_lntune.planning.types import Plan, PlannedModule
from peft_lntune.routing.route import Route

__all__ = ["Counts", "Injection", "Method", "Spot", "Ties", "WeightedSum"]

Counts = Mapping[str, int | None] | None
"""For each tuned parameter, `<module>.lntune_<parameter>`, its number of tuned entries, None for all; see `plan`."""

Ties = Mapping[tuple[str, str], Sequence[tuple[str, str]]]
"""For a tuned parameter, by module and `"weight"` or `"bias"`, the others that it is tied to, in the same form."""


class Spot(NamedTuple):
    """A module of a model that PEFT has come to: itself or the layer around it, its name in its holder, and in all."""

    target: nn.Module
    target_name: str
    parent: nn.Module
    name: str


class WeightedSum(NamedTuple):
    """A weighted sum of adapters: their names, a weight for each, and how deltas are summed."""

    adapters: Sequence[str]
    weights: Sequence[float]
    combination: str = "linear"
    density: float | None = None
    majority_sign_method: str = "total"

    @property
    def totals(self) -> dict[str, float]:
        """One weight per adapter, where some are named more than once."""
        pairs = list(zip(self.adapters, self.weights, strict=True))
        return {name: sum(weight for other, weight in pairs if other == name) for name in self.adapters}


@dataclass(frozen=True)
class Injection:
    """What the injection of one part of an adapter needs. It lasts as long as the injection, and no config holds it.

    Attributes:
        method: of the part.
        plan: where the part goes.
        route: of all layers of the model.
        modules: the base modules of the model, by name.
        stored: whether the values come from a file.
        source: the adapter of this model whose masks the new one has, if it is made from the config of one.
        ties: which tuned parameters are one.
        places: of each module that will be replaced, where else than under its name the model holds it.
        layers: those that the adapter has so far, by name; all parts share them.
    """

    method: "Method"
    plan: Plan
    route: Route
    modules: Mapping[str, nn.Module]
    stored: bool
    source: str | None = None
    ties: Ties = field(default_factory=dict)
    places: Mapping[nn.Module, Sequence[Place]] = field(default_factory=dict)
    layers: dict[str, ReplacementLayer] = field(default_factory=dict)


class Method(ABC):
    """A method of tuning. It has no state: one object serves all configs of its kind; see `METHODS`."""

    name: ClassVar[str]
    """As plans show it."""
    replaces: ClassVar[bool] = False
    """Whether its layers take the places of modules, so that shared modules and tied parameters matter."""
    has_masks: ClassVar[bool] = False
    """Whether `set_masks` chooses among its entries."""

    # Before anything changes.

    def resolve(self, facts: ModelFacts, config: Any) -> Any:
        """Fill in what a config leaves to the model.

        Args:
            facts: of the model.
            config: of this method; it is not changed.

        Returns:
            The config itself, or a copy.
        """
        return config

    @abstractmethod
    def plan(self, facts: ModelFacts, config: Any, counts: Counts = None) -> Plan:
        """What a config would do to a model.

        Args:
            facts: of the model.
            config: a resolved config of this method.
            counts: for each tuned parameter, `<module>.lntune_<parameter>`, the number of tuned entries, None for all.

        Returns:
            The plan; every module in it has this method's name.

        Raises:
            NoMatchError: the config selects nothing.
            UnsupportedError: the method does not work on what the config selects.
        """

    def warn(self, config: Any, plan: Plan) -> None:
        """Warn of what a config asks for and its plan has no place for; by itself of nothing.

        Args:
            config: a resolved config of this method.
            plan: its plan.
        """
        return

    def stored_entries(self, config: Any, part: PlannedModule) -> int:
        """Count the elements that the tensors of a planned module have in a file, at the least.

        Args:
            config: a resolved config of this method.
            part: a module of its plan.

        Returns:
            Their number: a file that holds fewer is not of such an adapter.
        """
        return sum(tuned for tuned, _ in part.entries.values())

    # Putting it in.

    def inject(self, tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Let PEFT put an adapter into a model; it comes back to `put` with each module.

        Args:
            tuner: the tuner of the model.
            model: the model.
            adapter_name: the new adapter.
            *args: further arguments of PEFT's `inject_adapter`.
            **kwargs: further arguments of PEFT's `inject_adapter`.
        """
        BaseTuner.inject_adapter(tuner, model, adapter_name, *args, **kwargs)

    @abstractmethod
    def put(self, tuner: BaseTuner, injection: Injection, config: Any, adapter_name: str, spot: Spot) -> None:
        """Give one module what the plan says of it, in a new layer if there is none yet.

        Args:
            tuner: ours or PEFT's mixed one.
            injection: the one under way.
            config: the part that it is of.
            adapter_name: the new adapter.
            spot: the module.
        """

    def recorded(self, given: Any, injected: PeftConfig) -> Any:
        """Note in a part of a `UnifiedConfig` what a saved adapter needs to know of its injection.

        Args:
            given: the part as the config has it.
            injected: the part as it was injected.

        Returns:
            The part that the config is to have from now on.
        """
        return given

    # Files.

    def to_file(self, tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Bring the tensors of an adapter into the form in which they are saved.

        Args:
            tensors: by name, without the adapter's name.
            config: the part of the adapter that this method is of.

        Returns:
            The same, or a new dict.
        """
        return tensors

    def from_file(self, model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Bring the tensors of a file into the form that an adapter takes, and make the adapter ready for them.

        Args:
            model: with the adapter.
            adapter_name: which.
            tensors: the state dict of the file.

        Returns:
            The same, or a new dict.

        Raises:
            AdapterFileError: they were not saved from such an adapter.
        """
        return tensors

    def mask_shapes(self, facts: ModelFacts, config: Any, plan: Plan, trained: bool) -> dict[str, Any]:
        """Tell what supermasks an adapter would have in a model that does not have it yet.

        Args:
            facts: of the model.
            config: a resolved config of this method.
            plan: its plan.
            trained: whether the adapter will be trained.

        Returns:
            By module the shape of the mask, and the score that a saved bit becomes, None where none is trained.
        """
        return {}

    # Sums.

    @abstractmethod
    def sum_parts(self, facts: ModelFacts, parts: Mapping[str, Sequence[Any]], wanted: WeightedSum) -> list[PeftConfig]:
        """The parts that a weighted sum of adapters has of this method; nothing is changed.

        Args:
            facts: of the model that holds the adapters.
            parts: the parts of this method, by adapter; one adapter at least has one.
            wanted: the sum.

        Returns:
            Configs of the parts, to be injected; empty where the adapters hold nothing of this method.

        Raises:
            UnsupportedError: there is no such sum.
        """

    def sum_into(self, model: nn.Module, wanted: WeightedSum, into: str) -> bool:
        """Fill an adapter that was made from `sum_parts`.

        Args:
            model: holds the adapters.
            wanted: the sum.
            into: the adapter to fill.

        Returns:
            Whether it tunes fewer entries than its config selects, and so has a mask.
        """
        return False
