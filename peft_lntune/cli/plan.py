"""`peft-lntune plan`: what would be tuned, before any weight is loaded."""

import re
from typing import Any

import click

from peft_lntune.architectures.roles import ROLES
from peft_lntune.cli.models import empty_model
from peft_lntune.config import LNTuneConfig, LNTuningConfig, StoredConfig, UnifiedConfig
from peft_lntune.planning.plan import plan
from peft_lntune.planning.types import Plan

__all__ = ["command", "plan_model"]


def plan_model(model: str, config: LNTuneConfig) -> tuple[Plan, int]:
    """What a config would tune in the model of a folder, and how many parameters that model has. No weight is loaded.

    Args:
        model: folder with a `config.json`, or a name on the Hub.
        config: any config of this package; one that was loaded with an adapter counts what that adapter tunes.

    Returns:
        The plan, and the number of parameters of the whole model.
    """
    empty = empty_model(model)
    counts = (config.manifest or {}).get("tuned")
    return plan(empty, config, counts), sum(parameter.numel() for parameter in empty.parameters())


class Layers(click.ParamType):
    """Layer indices such as `0,2,4-6`."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        found: list[int] = []
        for piece in value.split(","):
            ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", piece)
            if ends is None:
                self.fail(f"{value!r} is no list of layers, such as 0,2,4-6.", param, ctx)
            found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
        return found


@click.command("plan", short_help="What a config would tune in a model, without loading its weights.")
@click.argument("model")
@click.option(
    "--preset", metavar="NAMES", help="Parts joined by +, such as prefix+mha-adapter+ln; instead of norms alone."
)
@click.option("--adapter", metavar="DIR", help="Plan what this saved adapter tunes.")
@click.option("--tune", type=click.Choice(["both", "weight", "bias"]), help="Gain, bias, or both.  [default: both]")
@click.option(
    "--role", "roles", multiple=True, type=click.Choice(list(ROLES)), help="Only norms of this role; repeatable."
)
@click.option("--layers", type=Layers(), help="Only these layers, such as 0,2,4-6.")
@click.option(
    "--target", "targets", multiple=True, metavar="NAME", help="These modules instead of all norms; repeatable."
)
def command(
    model: str,
    preset: str | None,
    adapter: str | None,
    tune: str | None,
    roles: tuple[str, ...],
    layers: list[int] | None,
    targets: tuple[str, ...],
) -> None:
    """Say what a config would tune in MODEL, and at what cost.

    MODEL is a folder with a config.json, or a name on the Hub. The model is built without its weights, so this takes
    seconds and little memory, however large it is. Without options: every norm, gain and bias.

    \b
    Examples:
      peft-lntune plan bert-base-uncased
      peft-lntune plan ./my-llama --role ffn --layers 8-15
      peft-lntune plan ./my-llama --preset prefix+mha-adapter+ln
    """
    narrowed: dict[str, Any] = {
        "tune": tune,
        "roles": list(roles),
        "layers_to_transform": layers,
        "target_modules": list(targets),
    }
    given = {name: value for name, value in narrowed.items() if value}
    if bool(preset) + bool(adapter) + bool(given) > 1:
        raise click.UsageError("give --preset, or --adapter, or options of norms (--tune, --role, --layers, --target).")
    if adapter:
        config = StoredConfig.from_pretrained(adapter)
    else:
        config = UnifiedConfig(preset=preset) if preset else LNTuningConfig(**given)
    found, size = plan_model(model, config)
    click.echo(str(found))
    click.echo(f"\n{found.entries:,} trainable entries beside {size:,} parameters ({found.entries / size:.3%}).")
