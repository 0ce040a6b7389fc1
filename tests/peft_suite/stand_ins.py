"""Stand-ins for what PEFT's test modules import but the tests run here never use."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def install_stand_ins() -> None:
    """Make `diffusers` and `parameterized` importable in this process, where they are not installed."""
    if find_spec("diffusers") is None:
        _install("diffusers", StableDiffusionPipeline=type("StableDiffusionPipeline", (), {}))
    if find_spec("parameterized") is None:
        _install("parameterized", parameterized=_Parameterized)


class _Parameterized:
    """`@parameterized.expand(...)` that leaves the function as it is: `mixed_checks` calls the bodies itself."""

    @staticmethod
    def expand(*cases: Any, **options: Any) -> Any:
        return lambda function: function


def _install(name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # find_spec, which PEFT uses to look for diffusers, demands one
    module.__dict__.update(attributes)
    sys.modules[name] = module
