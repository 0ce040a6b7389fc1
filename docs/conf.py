"""How Sphinx builds the site: `make docs`. Warnings are errors, so a link to a page that is gone fails the build."""

import os
import re
import shutil
from importlib import import_module
from importlib.metadata import version as version_of
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Pages that stand elsewhere in the repository, where people who read it there look for them; copied at each build.
COPIED = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "benchmarks/README.md": "results/index.md",
    **{
        f"benchmarks/results/{file.name}": f"results/{file.name}"
        for file in (ROOT / "benchmarks/results").iterdir()
        if file.suffix in (".md", ".png")
    },
}
ROOMS = {
    "peft_lntune": "What most people need: the configs, the plan, scores, the bank, many tasks.",
    "peft_lntune.errors": "What is raised, and when.",
    "peft_lntune.selection": "Scores of parameters, and masks made of them.",
    "peft_lntune.interop": "PEFT's own formats, LoRA files, checkpoints of Trainer.",
    "peft_lntune.analysis": "Tables of what training moved, and plots of them.",
    "peft_lntune.tasks": "Many adapters trained in one batch.",
    "peft_lntune.norms": "What a norm is.",
    "peft_lntune.planning": "What a config would do.",
}

project = "peft_lntune"
version = release = version_of("peft-lntune")
copyright = "the peft_lntune authors, Apache-2.0"
default_role = "code"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
html_theme = "furo"
html_title = "peft_lntune"
html_static_path: list[str] = []
templates_path: list[str] = []

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
nb_execution_mode = "off"  # `make test-full` runs the notebooks; the site shows what they printed there
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def _rewrite(app: Sphinx, docname: str, source: list[str]) -> None:
    """Lead links between files of the repository to their pages; a file without a page becomes plain text."""
    here = _origin(docname)
    if docname == "index":
        readme = (ROOT / "README.md").read_text().partition("\n")[2]
        source[0], here = source[0].replace("README", readme, 1), "README.md"

    def page(match: re.Match[str]) -> str:
        image, text, link = match.groups()
        target, _, anchor = link.partition("#")
        path = (ROOT / here).parent.joinpath(target).resolve()
        if not target or "://" in target or not path.exists():
            return match[0]  # Sphinx says which link is broken
        found = _page(path.relative_to(ROOT).as_posix())
        if found is None:
            return text
        found = os.path.relpath(DOCS / found, (DOCS / docname).parent)
        return f"{image}[{text}]({found}{'#' if anchor else ''}{anchor})"

    fences = re.split(r"(```.*?```)", source[0], flags=re.DOTALL)
    source[0] = "".join(part if part.startswith("```") else LINK.sub(page, part) for part in fences)


def _origin(docname: str) -> str:
    """The file of the repository that a page is made of."""
    page = next((f"{docname}{end}" for end in (".md", ".ipynb") if (DOCS / f"{docname}{end}").exists()), docname)
    return next((source for source, copy in COPIED.items() if copy == page), f"docs/{page}")


def _page(file: str) -> str | None:
    """The page that a file of the repository has on the site."""
    if file in ("README.md", "docs"):
        return "index.md"
    if file in COPIED:
        return COPIED[file]
    return file.removeprefix("docs/") if file.startswith("docs/") else None


def _copy(app: Sphinx) -> None:
    for source, page in COPIED.items():
        target = DOCS / page
        target.parent.mkdir(exist_ok=True)
        if not target.exists() or target.read_bytes() != (ROOT / source).read_bytes():
            shutil.copy(ROOT / source, target)


def _write_api(app: Sphinx) -> None:
    folder = DOCS / "api"
    folder.mkdir(exist_ok=True)
    for room, about in ROOMS.items():
        exported = import_module(room).__all__
        again = "" if room == project else ", ".join(set(exported) & set(import_module(project).__all__))
        options = [":members:", ":imported-members:", ":show-inheritance:", f":exclude-members: {again}"]
        page = f"# {room}\n\n{about}\n\n```{{eval-rst}}\n.. automodule:: {room}\n"
        page += "".join(f"   {option}\n" for option in options) + "```\n"
        file = folder / f"{room.rpartition('.')[2]}.md"
        if not file.exists() or file.read_text() != page:
            file.write_text(page)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", _copy)
    app.connect("builder-inited", _write_api)
    app.connect("source-read", _rewrite)
