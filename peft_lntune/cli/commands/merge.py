"""`peft-lntune merge`: merges an adapter into its model."""

from pathlib import Path

import click

from peft_lntune.cli.group import command as make
from peft_lntune.cli.options import adapter_to_folder, check_out

__all__ = ["command"]


@make("merge", "Merge an adapter into its model.", check_out)
@adapter_to_folder
def command(adapter: str, out: Path, model: str | None) -> None:
    """Merge ADAPTER into its model and save it in the new folder OUT, with the tokenizer.

    The result is a plain model that loads without PEFT and without this package. Adapters with bottlenecks or prefixes
    cannot be merged, and are refused.

    If the model is quantized (AWQ, GPTQ, FP8, bitsandbytes, ...) and the adapter holds norms alone, no model is loaded:
    the deltas are added to the norms in the safetensors files, and every other byte is copied.

    \b
    Example:
      peft-lntune merge ./my-adapter ./my-model --model ./bert-base
    """
    from peft_lntune.cli.merge import merge_adapter, merge_quantized

    changed = merge_quantized(adapter, out, model)
    if changed is None:
        click.echo(f"The merged model is in {merge_adapter(adapter, out, model)}.")
    else:
        click.echo(f"The merged model is in {out}.\n{changed}")
