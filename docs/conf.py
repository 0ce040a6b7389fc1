"""How Sphinx builds the site: `make docs`. Warnings are errors, so a link to a page that is gone fails the build."""

import os
import pkgutil
import re
import shutil
import sys
from importlib import import_module
from importlib.metadata import version as version_of
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
from links import relink  # noqa: E402

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
    "peft_lntune.doctor": "Whether the norms of a training run learn, and if not, why.",
    "peft_lntune.recover": "Repair of quantized and pruned models by their norms.",
    "peft_lntune.tasks": "Many adapters trained in one batch.",
    "peft_lntune.norms": "What a norm is.",
    "peft_lntune.planning": "What a config would do.",
}

SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes|Example|Examples|Note):|.*::")

project = "peft_lntune"
version = release = version_of("peft-lntune")
copyright = "the peft_lntune authors, Apache-2.0"
default_role = "code"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]
html_theme = "furo"
html_title = "peft_lntune"
html_static_path = ["static"]
html_css_files = ["site.css"]
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


def _rewrite(app: Sphinx, docname: str, source: list[str]) -> None:
    """Lead links between files of the repository to their pages; a file without a page becomes plain text."""
    here = _origin(docname)
    if docname == "index":
        readme = (ROOT / "README.md").read_text().partition("\n")[2]
        source[0], here = source[0].replace("README", readme, 1), "README.md"

    def page(link: str) -> str | None:
        target, _, anchor = link.partition("#")
        path = (ROOT / here).parent.joinpath(target).resolve()
        if not target or "://" in target or not path.exists():
            return link  # Sphinx says which link is broken
        found = _page(path.relative_to(ROOT).as_posix())
        if found is None:
            return None
        return f"{os.path.relpath(DOCS / found, (DOCS / docname).parent)}{'#' if anchor else ''}{anchor}"

    source[0] = relink(source[0], page)


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
    for name in ROOMS:
        again = "" if name == project else ", ".join(set(_exported(name)) & set(_exported(project)))
        options = [":members:", ":imported-members:", ":show-inheritance:", f":exclude-members: {again}"]
        _write_page("api", name, f"{ROOMS[name]}\n\n{_automodule(name, options)}")
    for room in pkgutil.iter_modules(import_module(project).__path__, f"{project}."):
        if room.ispkg and room.name not in ROOMS:
            inside = pkgutil.iter_modules(import_module(room.name).__path__, f"{room.name}.")
            names = [module.name for module in inside if not module.name.endswith("__main__")]
            # The public ones among them have their place under their public names.
            parts = [f"## {name}\n\n{_automodule(name, [':members:', ':no-index:'])}" for name in names]
            about = f"{import_module(room.name).__doc__}\n\nNot public: names may change between versions.\n\n"
            _write_page("inside", room.name, about + "\n".join(parts))


def _show_formulas(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Show indented paragraphs of a docstring, formulas and code, as written; reST would take them for quotations."""
    shown: list[str] = []
    outside = ""  # the last line that is not indented
    for before, line in zip(["", *lines], lines, strict=False):
        indented = line.startswith("    ")
        if indented and not before.strip() and outside and not SECTION.fullmatch(outside):
            shown += ["::", ""] if not outside.startswith("::") else []
            outside = "::"
        elif line.strip() and not indented:
            outside = line
        shown.append(line)
    lines[:] = shown


def _exported(module: str) -> list[str]:
    return list(import_module(module).__all__)


def _automodule(name: str, options: list[str]) -> str:
    lines = "".join(f"   {option}\n" for option in options)
    return f"```{{eval-rst}}\n.. automodule:: {name}\n{lines}```\n"


def _write_page(folder: str, room: str, text: str) -> None:
    file = DOCS / folder / f"{room.rpartition('.')[2]}.md"
    file.parent.mkdir(exist_ok=True)
    page = f"# {room}\n\n{text}"
    if not file.exists() or file.read_text() != page:
        file.write_text(page)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", _copy)
    app.connect("builder-inited", _write_api)
    app.connect("source-read", _rewrite)
    app.connect("autodoc-process-docstring", _show_formulas, priority=400)  # before napoleon reads the sections
