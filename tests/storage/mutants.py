"""Damages to the files of an adapter or a bank, drawn at random and the same for the same seed."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Mutation = Callable[[random.Random, Path], str]
"""Changes a folder, or for a bank a file; says what it did."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, 7, 10**9, 0.5, 2.0, -1.0, 1e308, "", "x", "both", "weight", "gelu", "float16"),
    *([], ["x"], [0], {}, {"a": 1}, [[]], float("nan"), "(a+)+$", ["classifier"], "SEQ_CLS", "CAUSAL_LM"),
)


def flip_bit(drawn: random.Random, file: Path) -> str:
    content = bytearray(file.read_bytes())
    place, bit = drawn.randrange(len(content)), drawn.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {place} of {len(content)} in {file.name}"


def flip_header_bit(drawn: random.Random, file: Path) -> str:
    """In the header of safetensors, which is where the names and shapes are."""
    content = bytearray(file.read_bytes())
    place, bit = drawn.randrange(8 + struct.unpack("<Q", content[:8])[0]), drawn.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {place} in the header of {file.name}"


def cut(drawn: random.Random, file: Path) -> str:
    content = file.read_bytes()
    length = drawn.randrange(len(content))
    file.write_bytes(content[:length])
    return f"{file.name} cut to {length} of {len(content)}"


def blot(drawn: random.Random, file: Path) -> str:
    content = bytearray(file.read_bytes())
    start = drawn.randrange(len(content))
    length = drawn.randrange(1, 40)
    content[start : start + length] = drawn.randbytes(drawn.choice((0, length, length + 3)))
    file.write_bytes(content)
    return f"{file.name} overwritten at {start} for {length}"


def replace(drawn: random.Random, file: Path) -> str:
    kinds: dict[str, bytes | None] = {
        "empty": b"",
        "an array": b"[]",
        "a string": b'"x"',
        "null": b"null",
        "deep": b"[" * 50_000,
        "deep object": b'{"a":' * 50_000,
        "UTF-16": b"\xff\xfe\x00\xd8",
        "zeros": bytes(64),
        "a header of 2 ** 60": struct.pack("<Q", 2**60) + b"{}",
        "a long number": b'{"a": ' + b"1" * 9999 + b"}",
        "a folder": None,
    }
    kind = drawn.choice(list(kinds))
    content = kinds[kind]
    file.unlink()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    return f"{file.name} is {kind}"


def change_tensors(drawn: random.Random, file: Path) -> str:
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    name = drawn.choice(sorted(tensors))
    own = tensors[name]
    how = drawn.choice(("exchange", "rename", "dtype", "drop", "double", "nan", "shape", "negate", "reverse", "all"))
    if how == "exchange":
        other = drawn.choice([n for n in sorted(tensors) if tensors[n].shape == own.shape])
        tensors[name], tensors[other] = tensors[other], own
        name += f" and {other}"
    elif how == "rename":
        place = drawn.randrange(len(name))
        new = name[:place] + drawn.choice("abz._0") + name[place + drawn.randrange(2) :]
        tensors[new] = tensors.pop(name)
        name += f" to {new}"
    elif how == "dtype":
        dtype = drawn.choice((torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8, torch.bool))
        tensors[name] = own.to(dtype)
        name += f" to {dtype}"
    elif how == "drop":
        del tensors[name]
    elif how == "double":
        tensors[f"{name}.{drawn.choice(('x', 'weight'))}"] = own.clone()
    elif how == "nan":
        tensors[name] = _spoilt(drawn, own)
    elif how == "shape":
        tensors[name] = own.reshape(-1)[: drawn.randrange(own.numel())].clone()
    elif how == "negate":
        tensors[name] = own.bitwise_not() if own.dtype == torch.uint8 else -own
    elif how == "reverse":
        tensors[name] = own.flatten().flip(0).view(own.shape)
    else:
        tensors = {key: (t * 2 if t.is_floating_point() else t) for key, t in tensors.items()}
    file.unlink()
    save_file({key: t.contiguous() for key, t in tensors.items()}, file, metadata)
    return f"{how} {name}"


def _spoilt(drawn: random.Random, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.bitwise_xor(1)
    flat = tensor.clone().reshape(-1)
    flat[drawn.randrange(len(flat))] = drawn.choice((float("nan"), float("inf"), -float("inf"), 1e30))
    return flat.view(tensor.shape)


def change_config(drawn: random.Random, file: Path) -> str:
    """A field at any depth is changed, removed, or added."""
    config = json.loads(file.read_text())
    place, path = config, []
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = drawn.choice(keys)
        path.append(key)
        inner = place[key]
        if not (isinstance(inner, (dict, list)) and inner and drawn.random() < 0.7):
            break
        place = inner
    how = drawn.choice(("change", "change", "remove", "rename"))
    if how == "remove":
        del place[key]
        said = f"remove {path}"
    elif how == "rename" and isinstance(place, dict):
        place[f"{key}x"] = place.pop(key)
        said = f"rename {path}"
    else:
        new = drawn.choice(VALUES)
        place[key] = new
        said = f"{path} = {new!r}"
    file.write_text(json.dumps(config))
    return said


def take_file_of(other: Path) -> Mutation:
    """One of the two files is that of another adapter."""

    def mutate(drawn: random.Random, folder: Path) -> str:
        name = drawn.choice((WEIGHTS, CONFIG))
        shutil.copy(other / name, folder / name)
        return f"{name} of {other.name}"

    return mutate


def of_weights(mutation: Mutation) -> Mutation:
    return lambda drawn, folder: mutation(drawn, folder / WEIGHTS)


def of_config(mutation: Mutation) -> Mutation:
    return lambda drawn, folder: mutation(drawn, folder / CONFIG)


FILE: tuple[Mutation, ...] = (flip_bit, flip_bit, flip_header_bit, cut, blot, replace, change_tensors, change_tensors)
"""Of a safetensors file, such as a bank."""

FOLDER: tuple[Mutation, ...] = (
    *map(of_weights, FILE),
    *map(of_config, (flip_bit, cut, blot, replace, change_config, change_config, change_config, change_config)),
)
"""Of a folder with an adapter."""
