"""Tune the GroupNorms of a diffusers model to generate other images than those it was trained on.

    python examples/image_generation.py                                   # a tiny random U-Net, drawings made here
    python examples/image_generation.py --model google/ddpm-cifar10-32 --data-dir my_images    # train/CLASS/*.png
    python examples/image_generation.py --density 0.2                     # only the entries that Fisher scores choose

`get_peft_model` wraps the U-Net like any module. Its adapter is saved, loaded into a fresh pipeline and merged there,
so that the pipeline draws images without PEFT.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from image_data import add_image_options, read_images
from peft import PeftModel, get_peft_model
from PIL import Image
from task_data import errors_as_text
from torch import Tensor
from tqdm.auto import tqdm
from training import quiet

from peft_lntune import FisherLNConfig, LNTuningConfig, fit_fisher_masks
from peft_lntune.errors import DataError

Batch = dict[str, Tensor]


def load_pipeline(model: str | None, seed: int = 0) -> DDPMPipeline:
    """A checkpoint, or a tiny U-Net with random weights."""
    if model is not None:
        try:
            return DDPMPipeline.from_pretrained(model)
        except OSError as error:
            raise DataError(f"no model {model!r}: {error} Or give --model a folder on this machine.") from error
    transformers.set_seed(seed)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2"))


def to_pixels(images: Sequence[Image.Image], unet: UNet2DModel) -> Tensor:
    """Images as the U-Net takes them: (N, channels, side, side), from -1 to 1."""
    side, mode = unet.config.sample_size, "L" if unet.config.in_channels == 1 else "RGB"
    arrays = [np.atleast_3d(np.asarray(image.convert(mode).resize((side, side)))) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def noised(pixels: Tensor, scheduler: DDPMScheduler, generator: torch.Generator) -> Batch:
    """Images with noise of a random time step each, (B, ...); `labels` are the noise, which the U-Net has to find."""
    noise = torch.randn(pixels.shape, generator=generator)
    times = torch.randint(scheduler.config.num_train_timesteps, (len(pixels),), generator=generator)
    return {"sample": scheduler.add_noise(pixels, noise, times), "timestep": times, "labels": noise}


def batches(pixels: Tensor, scheduler: DDPMScheduler, size: int, seed: int) -> Iterator[Batch]:
    """Noised batches without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield noised(pixels[torch.randint(len(pixels), (size,), generator=generator)], scheduler, generator)


def denoising_loss(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    """Mean squared error of the noise that was found, (B,)."""
    return (outputs.sample - batch["labels"]).square().flatten(1).mean(1)


def losses(model: Any, batch: Batch) -> Tensor:
    """The loss of each image, on the device of the model."""
    batch = {name: value.to(model.device) for name, value in batch.items()}
    return denoising_loss(model(sample=batch["sample"], timestep=batch["timestep"]), batch)


def train(model: PeftModel, found: Iterator[Batch], steps: int, lr: float) -> None:
    """AdamW without weight decay, with linear decay of the learning rate."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.train()
    bar = tqdm(range(steps), desc="ln", unit="step")
    for _ in bar:
        loss = losses(model, next(found)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a DDPM pipeline's name or folder; without it, a tiny random U-Net")
    add_image_options(parser)
    parser.add_argument("--density", type=float, help="tune this share of the norms, chosen by Fisher information")
    parser.add_argument("--max-steps", type=int, default=200, help="default 200")
    parser.add_argument("--batch-size", type=int, default=16, help="default 16")
    parser.add_argument("--lr", type=float, default=1e-2, help="default 1e-2")
    parser.add_argument("--images", type=int, default=4, help="to draw at the end; default 4")
    parser.add_argument("--draw-steps", type=int, default=50, help="of the sampler; default 50")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--out", type=Path, default=Path("runs/image_generation"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Tune, measure, save, reload, merge, draw."""
    args = parse_args(argv)
    quiet()
    with errors_as_text():
        pipeline = load_pipeline(args.model, args.seed)
        parts = read_images(args.data_dir, args.dataset, seed=args.seed)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    scheduler = pipeline.scheduler
    pixels = {part: to_pixels(rows["image"], pipeline.unet) for part, rows in parts.items()}
    found = batches(pixels["train"], scheduler, args.batch_size, args.seed)
    some = pixels["validation"][: 8 * args.batch_size]
    held_out = noised(some, scheduler, torch.Generator().manual_seed(args.seed))

    if args.density is None:
        model = get_peft_model(pipeline.unet, LNTuningConfig())
    else:
        config = FisherLNConfig(density=args.density, num_samples=8 * args.batch_size)
        model = get_peft_model(pipeline.unet, config)
        print(fit_fisher_masks(model, [next(found) for _ in range(8)], loss=denoising_loss))
    model.print_trainable_parameters()
    train(model, found, args.max_steps, args.lr)
    with torch.no_grad():
        after = losses(model, held_out)
        with model.disable_adapter():
            before = losses(model, held_out)
    print(f"loss of the validation images: {before.mean():.4f} before, {after.mean():.4f} after")
    model.save_pretrained(str(args.out))

    fresh = load_pipeline(args.model, args.seed).to(model.device)
    again = PeftModel.from_pretrained(fresh.unet, str(args.out)).eval()
    with torch.no_grad():
        if not torch.equal(losses(again, held_out), after):
            raise RuntimeError(f"what {args.out} holds answers differently after reloading")
    print(f"reloaded {args.out}: the losses of all {len(after)} images are bit-equal to those after training")
    fresh.unet = again.merge_and_unload()  # a plain U-Net, which the pipeline can also save
    fresh.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(args.seed)
    drawn = fresh(batch_size=args.images, num_inference_steps=args.draw_steps, generator=generator)
    for i, image in enumerate(drawn.images):
        image.save(args.out / f"image_{i}.png")
    print(f"drew {len(drawn.images)} images: {args.out}/image_*.png")


if __name__ == "__main__":
    main()
