"""The interface of a method of tuning: how its config is planned, injected, stored and summed."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from peft_lntune.core.shared import Place
from peft_lntune.errors import UnsupportedError
from peft_lntune.layers import ReplacementLayer
from peft_lntune.planning.facts import ModelFacts
from peft_lntune.planning.types import Plan, PlannedModule
from peft_lntune.routing.route import Route

__all__ = ["Counts", "Injection", "Method", "Spot", "Ties", "WeightedSum"]

Counts = Mapping[str, int | None] | None
"""For each tuned parameter, `<module>.lntune_<parameter>`, the number of tuned entries, None for all."""

Ties = Mapping[tuple[str, str], Sequence[tuple[str, str]]]
"""For a tuned parameter, given as `(module, "weight" or "bias")`, the others it is tied to, in the same form."""


class Spot(NamedTuple):
    """A module that PEFT's injection has reached.

    Attributes:
        target: the module, or the tuner layer around it.
        target_name: the name of the module within its parent.
        parent: the parent module.
        name: the full name of the module in the model.
    """

    target: nn.Module
    target_name: str
    parent: nn.Module
    name: str


class WeightedSum(NamedTuple):
    """A weighted combination of adapters.

    Attributes:
        adapters: names of the adapters.
        weights: one weight per name.
        combination: how deltas are combined, a key of `COMBINATIONS`.
        density: fraction of entries that the sparse combinations keep; None for `"linear"`.
        majority_sign_method: `"total"` or `"frequency"`, for the ties combinations.
    """

    adapters: Sequence[str]
    weights: Sequence[float]
    combination: str = "linear"
    density: float | None = None
    majority_sign_method: str = "total"

    @property
    def totals(self) -> dict[str, float]:
        """One weight per adapter: the sum of its weights if it is named more than once."""
        pairs = list(zip(self.adapters, self.weights, strict=True))
        return {name: sum(weight for other, weight in pairs if other == name) for name in self.adapters}


@dataclass(frozen=True)
class Injection:
    """What the injection of one part of an adapter needs. It lives as long as the injection, and no config holds it.

    Attributes:
        method: the method of the part.
        plan: the plan of the part.
        route: the route that all layers of the model share.
        modules: the base modules of the model, by name.
        stored: whether the values come from a file.
        source: the adapter of this model whose masks are copied, if the new adapter is made from its config.
        ties: for each tuned parameter, the tuned parameters it is tied to.
        places: for each module to replace, the further places where the model holds it.
        layers: the layers of the adapter so far, by name; all parts share them.
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
    """The name shown in plans."""
    replaces: ClassVar[bool] = False
    """Whether its layers replace modules, so that shared modules and tied parameters matter."""
    has_masks: ClassVar[bool] = False
    """Whether `set_masks` can choose among its entries."""
    no_sum: ClassVar[str] = "has a part without a weighted sum. Make several active instead: set_adapter({names!r})."
    """Why there is no weighted sum, for a method that does not override `sum_parts`; `{names!r}` are the adapters."""

    # Before anything changes.

    def resolve(self, facts: ModelFacts, config: Any) -> Any:
        """Fill in fields that depend on the model.

        Args:
            facts: facts of the model.
            config: a config of this method; it is not changed.

        Returns:
            The config itself, or a completed copy.
        """
        return config

    @abstractmethod
    def plan(self, facts: ModelFacts, config: Any, counts: Counts = None) -> Plan:
        """Plan what a config would do to a model.

        Args:
            facts: facts of the model.
            config: a resolved config of this method.
            counts: for each tuned parameter, `<module>.lntune_<parameter>`, the number of tuned entries, None for all.

        Returns:
            The plan. Every module in it names this method.

        Raises:
            NoMatchError: the config selects nothing.
            UnsupportedError: the method does not work on what the config selects.
        """

    def warn(self, config: Any, plan: Plan) -> None:
        """Warn about what a config asks for and its plan leaves out. The base class warns about nothing.

        Args:
            config: a resolved config of this method.
            plan: the plan of that config.
        """
        return

    def stored_entries(self, config: Any, part: PlannedModule) -> int:
        """Count the elements that a saved adapter holds for a planned module, at least.

        Args:
            config: a resolved config of this method.
            part: a module of its plan.

        Returns:
            The number of elements. A file with fewer elements is not from such an adapter.
        """
        return sum(tuned for tuned, _ in part.entries.values())

    # Injection.

    def inject(self, tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Let PEFT inject an adapter into a model. PEFT's loop calls `put` for each module.

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
        """Give one planned module the adapter, in a new layer if the module has none yet.

        Args:
            tuner: the tuner of the model: ours or PEFT's mixed one.
            injection: the injection under way.
            config: config of the part.
            adapter_name: the new adapter.
            spot: the module that PEFT's injection has reached.
        """

    def recorded(self, given: Any, injected: PeftConfig) -> Any:
        """Record in a part of a `UnifiedConfig` what loading the adapter needs to know about its injection.

        Args:
            given: the part as given in the config.
            injected: the part as it was injected.

        Returns:
            The part to keep in the config.
        """
        return given

    # Files.

    def to_file(self, tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Convert the tensors of an adapter to the form in which they are saved.

        Args:
            tensors: tensors by name, without the adapter's name.
            config: the part of the adapter that has this method.

        Returns:
            The same dict, or a new one.
        """
        return tensors

    def from_file(self, model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Convert the tensors of a file to the form that an adapter has in a model, and prepare the adapter for them.

        Args:
            model: the model with the adapter.
            adapter_name: the adapter.
            tensors: the state dict of the file.

        Returns:
            The same dict, or a new one.

        Raises:
            AdapterFileError: the tensors were not saved from such an adapter.
        """
        return tensors

    def mask_shapes(self, facts: ModelFacts, config: Any, plan: Plan, trained: bool) -> dict[str, Any]:
        """List the supermasks that an adapter would have in a model, before it is injected.

        Args:
            facts: facts of the model.
            config: a resolved config of this method.
            plan: the plan of that config.
            trained: whether the adapter will be trained.

        Returns:
            For each module, the shape of the mask and the score that a saved bit becomes (None if not trained).
        """
        return {}

    # Sums.

    def sum_parts(self, facts: ModelFacts, parts: Mapping[str, Sequence[Any]], wanted: WeightedSum) -> list[PeftConfig]:
        """Make the configs of this method's parts of a weighted sum of adapters; by default this is refused.

        Nothing is changed.

        Args:
            facts: facts of the model that holds the adapters.
            parts: the parts with this method, by adapter; at least one adapter has one.
            wanted: the sum.

        Returns:
            Configs to inject; empty if the adapters hold no tensors of this method.

        Raises:
            UnsupportedError: the parts have no such sum.
        """
        raise UnsupportedError(f"adapter {next(iter(parts))!r} {self.no_sum.format(names=list(wanted.totals))}")

    def sum_into(self, model: nn.Module, wanted: WeightedSum, into: str) -> bool:
        """Fill an adapter that was injected with the configs of `sum_parts`.

        Args:
            model: the model that holds the adapters.
            wanted: the sum.
            into: the adapter to fill.

        Returns:
            True if the adapter tunes fewer entries than its config selects, and so has a mask.
        """
        return False
