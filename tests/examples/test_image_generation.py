"""A U-Net of diffusers through its GroupNorms, whole and by Fisher masks, out of a pipeline and back into one."""

import re

import pytest
import torch
from image_data import draw_images
from image_generation import load_pipeline, main, to_pixels
from peft import PeftConfig
from PIL import Image

from peft_lntune import FisherLNConfig


@pytest.mark.parametrize("density", [None, "0.25"])
def test_learns_saves_and_draws(density, tmp_path, capsys):
    out, flags = tmp_path / "out", [] if density is None else ["--density", density]
    if density is not None:
        load_pipeline(None).save_pretrained(tmp_path / "ddpm")
        flags += ["--model", str(tmp_path / "ddpm")]
    main([*flags, "--max-steps", "10", "--batch-size", "8", "--images", "2", "--draw-steps", "2", "--out", str(out)])
    printed = capsys.readouterr().out
    before, after = map(float, re.search(r"images: ([\d.]+) before, ([\d.]+) after", printed).groups())
    assert after < before
    assert "are bit-equal" in printed
    with Image.open(out / "image_1.png") as image:
        assert image.size == (16, 16)
    if density is not None:
        assert "(25.0 %) of the entries" in printed
        assert isinstance(PeftConfig.from_pretrained(out), FisherLNConfig)


def test_pixels():
    unet = load_pipeline(None).unet
    pixels = to_pixels(draw_images(3, 40, seed=0)["image"][:], unet)
    assert pixels.shape == (3, 3, 16, 16)
    assert -1 <= pixels.min() < pixels.max() <= 1
    unet.register_to_config(in_channels=1)
    assert to_pixels([Image.new("RGB", (4, 4), (255, 255, 255))], unet).equal(torch.ones(1, 1, 16, 16))


def test_errors(tmp_path):
    with pytest.raises(SystemExit, match="error: no model 'no-such-model': "):
        main(["--model", "no-such-model"])
