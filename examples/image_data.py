"""Images for the examples, in two parts with the columns `image` and `label`: a folder, the Hub, or drawings made here.

A folder contains train and validation, each with one folder per class. The drawings are discs, squares and stripes of
any colour and place, over noise: enough to see a model learn, and of no other use.
"""

import argparse
import io
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError
from task_data import PARTS, hub_parts, say

from peft_lntune.errors import DataError

SHAPES = ("disc", "square", "stripes")


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Where images come from."""
    parser.add_argument("--dataset", help="images on the Hub, with a column of classes; such as uoft-cs/cifar10")
    parser.add_argument("--data-dir", type=Path, help="a folder with train/CLASS/*.png and validation/CLASS/*.png")


def draw(shape: str, side: int, rng: np.random.Generator) -> Image.Image:
    """One RGB image of side x side pixels."""
    picture = Image.fromarray(rng.integers(0, 80, (side, side, 3), dtype=np.uint8))
    pen, colour = ImageDraw.Draw(picture), tuple(map(int, rng.integers(120, 256, 3)))
    size = int(rng.integers(side // 4, side // 2))
    left, top = map(int, rng.integers(0, side - size, 2))
    box = (left, top, left + size, top + size)
    if shape == "disc":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        for y in range(top, top + size, 4):
            pen.line((0, y, side, y), fill=colour, width=2)
    return picture


def draw_images(count: int, side: int, seed: int) -> datasets.Dataset:
    """`count` images, the shapes in turn; equal seeds give equal images."""
    rng = np.random.default_rng(seed)
    rows = {
        "image": [draw(SHAPES[i % len(SHAPES)], side, rng) for i in range(count)],
        "label": [i % len(SHAPES) for i in range(count)],
    }
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(SHAPES))})
    return datasets.Dataset.from_dict(rows, features=columns)


def _column(rows: datasets.Dataset, kind: type, source: str) -> str:
    names = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    if not names:
        raise DataError(f"{source} has no column of {kind.__name__}; it has {', '.join(rows.column_names)}")
    return names[0]


def read_images(
    data_dir: Path | None, dataset: str | None, *, side: int = 32, count: int = 240, seed: int = 0
) -> dict[str, datasets.Dataset]:
    """Both parts: from the folder, or else from the Hub, or else `count` drawings and a quarter as many to validate."""
    if data_dir is None and dataset is None:
        counts = (count, count // 4)
        return {part: draw_images(n, side, 2 * seed + i) for i, (part, n) in enumerate(zip(PARTS, counts, strict=True))}
    source = str(data_dir or dataset)
    if data_dir is not None:
        check_folders(data_dir)
    sources, parts = hub_parts(
        lambda: datasets.load_dataset("imagefolder", data_dir=source) if data_dir else datasets.load_dataset(source),
        source,
        "validation",
        "test",
    )
    for part, rows in parts.items():
        names = {
            _column(rows, kind, source): new
            for new, kind in (("image", datasets.Image), ("label", datasets.ClassLabel))
        }
        parts[part] = rows.select_columns(list(names)).rename_columns({k: v for k, v in names.items() if k != v})
        if data_dir is not None:
            check_images(parts[part])
    found = {part: Counter(rows["label"][:]) for part, rows in parts.items()}
    classes = parts["train"].features["label"].names
    if strange := set(found["validation"]) - set(found["train"]):
        raise DataError(f"{sources['validation']} has the class {classes[min(strange)]}, which no training image has")
    if len(found["train"]) < 2:
        raise DataError(f"{sources['train']}: every image is of one class, so there is nothing to learn")
    say(
        f"data: {' and '.join(f'{len(rows):,} {part} images' for part, rows in parts.items())}; "
        + f"{len(classes)} classes: "
        + ", ".join(f"{name} ({found['train'][number]:,})" for number, name in enumerate(classes))
    )
    return parts


def check_images(rows: datasets.Dataset) -> None:
    """Open every image once, so that a damaged one does not end the training."""
    for row in rows.cast_column("image", datasets.Image(decode=False))["image"]:
        try:
            with Image.open(row["path"] if row["bytes"] is None else io.BytesIO(row["bytes"])) as image:
                image.load()
                mode = image.mode
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{row['path']} is no image that can be read: {error}. Replace or remove it.") from error
        if mode.startswith(("I", "F")):  # convert("RGB") makes all above 255 white
            raise DataError(f"{row['path']} has more than 8 bits per channel (mode {mode}). Rescale it to 8 bits.")


def check_folders(data_dir: Path) -> None:
    """Refuse a folder whose train has no folders of classes: their names would be looked for elsewhere."""
    train = data_dir / "train"
    folders = (path.name for path in train.iterdir() if path.is_dir()) if train.is_dir() else ()
    classes = sorted(name for name in folders if not name.startswith("."))
    if len(classes) < 2:
        has = f"the only class {classes[0]}" if classes else "no folders of classes"
        raise DataError(f"{train} has {has}. Wanted are two or more: train/CLASS/*.png, and validation/CLASS/*.png.")
    if deep := [path for name in classes for path in (train / name).iterdir() if path.is_dir()]:
        raise DataError(f"{deep[0]} is a folder inside of a class. Wanted is train/CLASS/*.png.")
