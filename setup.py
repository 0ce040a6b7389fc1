"""The long description: README.md with links that work on a package index. All else is in pyproject.toml."""

import re
import sys
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "docs"))
from links import relink  # noqa: E402


def long_description(readme: str, repository: str | None, version: str) -> str:
    """Make the relative links of the README absolute.

    Args:
        readme: its text.
        repository: address of the repository, such as `[project.urls]` of pyproject.toml gives it; None: relative links
            become plain text, and pictures are left out with their captions.
        version: the links lead to the files of the tag `v<version>`.

    Returns:
        The text.
    """

    def absolute(target: str) -> str | None:
        if "://" in target or repository is None:
            return target if "://" in target else None
        if target.startswith("#"):
            return f"{repository}/blob/v{version}/README.md{target}"
        kind = "raw" if target.endswith((".png", ".svg")) else "blob"
        return f"{repository}/{kind}/v{version}/{target}"

    if repository is None:
        readme = re.sub(r"^!\[.*\)\n\n(\*.*\*\n\n)?", "", readme, flags=re.MULTILINE)
    return relink(readme, absolute)


if __name__ == "__main__":
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"].get("urls", {})
    found: dict[str, str] = {}
    exec((ROOT / "peft_lntune" / "version.py").read_text("utf-8"), found)
    setup(
        long_description=long_description(
            (ROOT / "README.md").read_text("utf-8"), urls.get("Repository"), found["__version__"]
        ),
        long_description_content_type="text/markdown",
    )
