"""`peft-lntune plan`: what a config would tune, without loading weights."""

from typing import Any

import click

from peft_lntune.cli.group import command as make
from peft_lntune.cli.options import Layers, json_option
from peft_lntune.core.choices import ROLES

__all__ = ["command"]

_OF_NORMS = ("tune", "roles", "layers", "targets")


def _check(preset: str | None, adapter: str | None, **options: Any) -> None:
    if bool(preset) + bool(adapter) + any(options[name] for name in _OF_NORMS) > 1:
        raise click.UsageError("give --preset, or --adapter, or options of norms (--tune, --role, --layers, --target).")


@make("plan", "What a config would tune in a model, without loading its weights.", _check)
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
@json_option
def command(
    model: str,
    preset: str | None,
    adapter: str | None,
    tune: str | None,
    roles: tuple[str, ...],
    layers: list[int] | None,
    targets: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show what a config would tune in MODEL, and at what cost.

    MODEL is a folder with a config.json, or a name on the Hub. The model is built without its weights, so this takes
    seconds and little memory for models of any size. Without options, every gain and bias of every norm is tuned.

    \b
    Examples:
      peft-lntune plan bert-base-uncased
      peft-lntune plan ./my-llama --role ffn --layers 8-15
      peft-lntune plan ./my-llama --preset prefix+mha-adapter+ln
    """
    from peft_lntune.cli.plan import make_config, plan_model
    from peft_lntune.cli.printing import print_result

    config = make_config(
        preset, adapter, tune=tune, roles=list(roles), layers_to_transform=layers, target_modules=list(targets)
    )
    found, size = plan_model(model, config)
    said = f"{found.entries:,} trainable entries beside {size:,} parameters ({found.entries / size:.3%})."
    print_result(as_json, {**found.to_data(), "parameters": size}, found, said)
