"""What is known of a model while one operation goes on with it."""

from functools import cached_property

from torch import nn

from peft_lntune.architectures.attention import AttentionFacts, survey_attention
from peft_lntune.architectures.sublayers import Sublayer, find_sublayers
from peft_lntune.core.module_tree import base_modules, called_modules
from peft_lntune.core.shared import tied_parameters
from peft_lntune.norms.find import Missed, Norm, survey

__all__ = ["ModelFacts"]


class ModelFacts:
    """The modules, norms, sub-layers and attention of a model: each looked for when first asked for, and once.

    Whoever starts an operation makes one and hands it down. Nobody keeps it: the next operation may change the model.

    Args:
        model: the model, plain or with adapters. It is not changed.

    Example:
        >>> facts = ModelFacts(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
        >>> list(facts.modules), list(facts.norms)
        (['', '0', '1'], ['1'])
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The `base_modules` of the model, by name."""
        return base_modules(self.model)

    @cached_property
    def called(self) -> dict[str, nn.Module]:
        """The `called_modules` of the model, by name."""
        return called_modules(self.model)

    @cached_property
    def _survey(self) -> tuple[dict[str, Norm], dict[str, Missed]]:
        return survey(self.modules, parameterless=True)

    @property
    def all_norms(self) -> dict[str, Norm]:
        """The norms by name, those without parameters too."""
        return self._survey[0]

    @cached_property
    def norms(self) -> dict[str, Norm]:
        """The norms that have parameters, by name."""
        return {name: norm for name, norm in self.all_norms.items() if norm.weight_shape is not None}

    @property
    def missed(self) -> dict[str, Missed]:
        """The modules that look like norms and cannot be tuned as such, by name."""
        return self._survey[1]

    @cached_property
    def sublayers(self) -> list[Sublayer]:
        """The sub-layers whose first and last modules are known."""
        return find_sublayers(self.modules)

    @cached_property
    def attention(self) -> tuple[dict[str, AttentionFacts], dict[str, str]]:
        """The attention modules that take a prefix, by name; and those that take none, with the reason."""
        return survey_attention(self.modules)

    @cached_property
    def tied(self) -> dict[tuple[str, str], list[tuple[str, str]]]:
        """The parameters that several modules share; see `tied_parameters`."""
        return tied_parameters(self.modules)
