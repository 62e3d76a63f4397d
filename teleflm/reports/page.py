# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the reports for people share: a self-contained HTML page, its plots as PNG beside it, the numbers as JSON."""

import base64
import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.folder_formats import is_weights, known_files, loadable_files
from conversion.checkpoint.manifest import MANIFEST, package_version
from conversion.native import find as _runs  # noqa: F401  (makes the names of training runs known)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Says which template of this package a page is from; such a page may be replaced by another from it.
_GENERATOR = re.compile(rb'<meta name="generator" content="TeleFLM [^";]*; (\w+)">')
_CHARSET = '<meta charset="utf-8">'
_HEAD_BYTES = 1024


def check_page(file: Path, kind: str) -> None:
    """Refuse to write a page where it would replace what is no page like it, or where there is no folder for it.

    Args:
        file: that is to be written.
        kind: `run` or `preview`; the name of its template.

    Raises:
        CheckpointError: see above.
    """
    if file.is_dir():
        raise CheckpointError(f"{file}: is a folder; give the name of a file.")
    if not file.absolute().parent.is_dir():
        raise CheckpointError(f"{file}: there is no folder {file.parent}; make it, or name another file.")
    if os.path.lexists(file) and kind_of_page(file) != kind:
        raise CheckpointError(f"{file}: is there already, and no page of this command; give another name.")


def kind_of_page(file: Path) -> str | None:
    """The name of the template that a page is from; None of a file that is no page of this package."""
    if not file.is_file():  # a pipe would be waited for
        return None
    try:
        with file.open("rb") as content:
            found = _GENERATOR.search(content.read(_HEAD_BYTES))
    except OSError:
        return None
    return found[1].decode() if found else None


def check_report_folder(folder: Path, kind: str) -> None:
    """Refuse, before hours of work, a report that could not be written after them, or would replace something else.

    Args:
        folder: that is to hold it.
        kind: `selection` or `verification`; the name of its template.

    Raises:
        CheckpointError: the place is no folder; or that of a checkpoint, which the report would become part of; or
            holds pages, pictures or numbers that are not those of such a report.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; give --report a folder.")
    of_a_checkpoint = (MANIFEST, "config.json", *loadable_files())
    held = next((name for name in known_files(folder) if name in of_a_checkpoint or is_weights(name)), None)
    if held:
        raise CheckpointError(f"{folder}: holds a checkpoint ({held}); give --report a folder of its own.")
    if kind_of_page(folder / "index.html") == kind:
        return
    other = next((path.name for path in sorted(folder.iterdir()) if path.suffix in (".html", ".png", ".json")), None)
    if other:
        raise CheckpointError(
            f"{folder}: holds {other} and no earlier report of this command; give --report a folder of its own."
        )


def render_page(template: Path, /, **values: Any) -> str:
    """An HTML page from a Jinja file, which says what made it. Every value is escaped; `version` is this package's.

    Halves of surrogate pairs, which are no characters, and which UTF-8 cannot hold, are written as `\\ud800`.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    style = Markup(Path(__file__).with_name("style.css").read_text("utf-8"))
    generator = f'<meta name="generator" content="TeleFLM {{{{ version }}}}; {template.name.partition(".")[0]}">'
    source = template.read_text("utf-8").replace(_CHARSET, f"{_CHARSET}\n{generator}", 1)
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    return _without_surrogates(page.render(**values, zip=zip, style=style, version=package_version()))


def _without_surrogates(text: str) -> str:
    """The same text, halves of surrogate pairs as JSON would escape them."""
    return text.encode("utf-8", "backslashreplace").decode()


def write_report_files(
    folder: Path, template: Path, figures: Mapping[str, "Figure"], numbers: tuple[str, Any], /, **values: Any
) -> None:
    """Write `index.html`, each plot as `NAME.png`, and a JSON file; files of an earlier report are replaced.

    Args:
        folder: made if absent.
        template: of the page; `plots` holds the plots by name, as addresses of pictures that are inside.
        figures: the plots.
        numbers: name and content of the JSON file.
        **values: what else the template shows.
    """
    plots = {name: address_of(figure) for name, figure in figures.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        (folder / f"{name}.png").write_bytes(_png(figure))
    told = _without_surrogates(json.dumps(numbers[1], indent=1, ensure_ascii=False))
    (folder / numbers[0]).write_text(told, encoding="utf-8")
    (folder / "index.html").write_text(render_page(template, plots=plots, **values), encoding="utf-8")


def new_figure(height: float = 3.8) -> tuple["Figure", Any]:
    """A figure as wide as a page, with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    return figure, axes


def legend_above(axes: Any, markerscale: float = 1) -> None:
    """The legend over the plot, where it hides nothing; its markers so many times larger than in the plot."""
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), markerscale=markerscale)


def address_of(figure: "Figure") -> str:
    """A figure as SVG inside an address, sharp at any size; the same from the same numbers."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "teleflm"}):  # names inside are random otherwise
        figure.savefig(buffer, format="svg", dpi=160, metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})  # the same bytes from the same numbers
    return buffer.getvalue()


__all__ = [
    "address_of",
    "check_page",
    "check_report_folder",
    "kind_of_page",
    "legend_above",
    "new_figure",
    "render_page",
    "write_report_files",
]
