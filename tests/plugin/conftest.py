"""Adapters and models in folders, made once."""

from pathlib import Path

import pytest

from .saved import adapt, build_base, switch_off


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saved base model of `build_base`."""
    folder = tmp_path_factory.mktemp("base")
    build_base().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """A saved adapter with a head. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("good")
    adapt(build_base(base_folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def masked(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """A saved adapter that tunes half of the entries."""
    folder = tmp_path_factory.mktemp("masked")
    adapt(build_base(base_folder), masked=True, seed=5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def supermasks(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """A saved adapter that is bits alone, and a head."""
    folder = tmp_path_factory.mktemp("supermasks")
    switch_off(build_base(base_folder)).save_pretrained(folder)
    return folder
