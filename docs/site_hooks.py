"""What the site (mkdocs.yml) has beside docs/: the front pages, the files that pages link to, and a
reference made of the docstrings. Pages stay as they are read in the repository, links included."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
FRONT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)")
FENCE = re.compile(r"^```.*?^```", re.S | re.M)
FENCE_OR_NOT = re.compile(rf"({FENCE.pattern})", FENCE.flags)


def repository_path(page: str) -> Path:
    """Of a page of the site."""
    of_front = {site: path for path, site in FRONT.items()}
    return ROOT / of_front.get(page, f"docs/{page}")


def site_path(path: Path) -> str | None:
    """Of a file of the repository; None for what the site does not show, a folder."""
    name = path.relative_to(ROOT).as_posix()
    if name in FRONT:
        return FRONT[name]
    if name.startswith("docs/") and path.suffix != ".py":
        return name.removeprefix("docs/")
    return f"source/{name}" if path.is_file() else None


def targets(path: Path) -> Iterator[tuple[str, Path]]:
    """The links of a page to files of the repository."""
    for link in LINK.findall(FENCE.sub("", path.read_text("utf-8"))):
        target = (path.parent / link).resolve()
        if "://" not in link and target.exists():
            yield link, target


def on_files(files: Any, config: Any) -> Any:
    for path, site in FRONT.items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "reference.md", content=reference()))
    pages = [ROOT / path for path in FRONT] + sorted((ROOT / "docs").glob("*.md"))
    linked = {target for page in pages for _, target in targets(page)}
    for target in sorted(linked):
        site = site_path(target)
        if site is not None and site.startswith("source/"):
            files.append(File.generated(config, site, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    path = repository_path(page.file.src_uri)
    if not path.exists():  # the reference
        return markdown
    for link, target in set(targets(path)):
        site = site_path(target)
        if site is None:
            markdown = re.sub(rf"\[([^]]*)\]\({re.escape(link)}\)", r"\1", markdown)
        else:
            markdown = re.sub(rf"(?<=\]\(){re.escape(link)}(?=[#)])", site, markdown)
    # Lists inside of lists are indented by two spaces in the repository, by four for the site.
    parts = re.split(FENCE_OR_NOT, markdown)
    return "".join(x if x.startswith("```") else re.sub(r"(?m)^( +)", r"\1\1", x) for x in parts)


def reference() -> str:
    """A page of all public names: mkdocstrings fills it in."""
    module = ast.parse((ROOT / "python/cute_kernels/__init__.py").read_text("utf-8"))
    names: list[str] = next(
        ast.literal_eval(x.value)
        for x in module.body
        if isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == "__all__"
    )
    parts = [f"::: cute_kernels.{name}" for name in names if not name.startswith("__")]
    intro = "What they have in common is in [Arguments](api.md)."
    return "\n\n".join(["# Reference", intro, *parts]) + "\n"
