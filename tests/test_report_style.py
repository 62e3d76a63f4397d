# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The style of the pages: every text can be read on what is behind it, light and dark, by WCAG's formula."""

import re
from pathlib import Path

import pytest

import teleflm.reports
from teleflm.reports.page import render_page

FOLDER = Path(teleflm.reports.__file__).parent
STYLE = (FOLDER / "style.css").read_text()
TEXTS = [
    *((text, ground) for text in ("text", "dim", "good", "bad", "accent") for ground in ("card", "page")),
    *((f"{kind}-text", ground) for kind in ("trained", "scaled") for ground in (kind, f"{kind}-odd")),
]


def colours(block: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6});", block))


LIGHT, DARK = (colours(block) for block in STYLE.split("@media (prefers-color-scheme: dark)"))


def luminance(colour: str) -> float:
    """Of WCAG 2.2: relative luminance of an sRGB colour."""
    digits = colour[1:] if len(colour) == 7 else "".join(digit * 2 for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_formula():
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.005)  # the grey that is just too light


def test_both_modes_have_every_colour():
    assert LIGHT.keys() == DARK.keys()


@pytest.mark.parametrize(("text", "ground"), TEXTS)
@pytest.mark.parametrize("mode", [LIGHT, DARK], ids=["light", "dark"])
def test_texts_can_be_read(mode, text, ground):
    assert contrast(mode[text], mode[ground]) >= 4.5


@pytest.mark.parametrize("template", sorted(FOLDER.glob("*.jinja")), ids=lambda path: path.name)
def test_pages_have_no_colours_of_their_own(template):
    """Or one of the two modes would not know them."""
    style = template.read_text().partition("<style>")[2].partition("</style>")[0]
    assert style.startswith("\n{{ style }}\n")
    assert not re.search(r"#[0-9a-fA-F]{3,6}\b|(?<![\w-])(white|black|gr[ae]y)(?![\w-])", style)
    assert set(re.findall(r"var\(--([\w-]+)\)", style)) <= LIGHT.keys()


def test_the_style_is_in_the_page(tmp_path):
    (tmp_path / "x.html.jinja").write_text(
        '<!doctype html>\n<meta charset="utf-8">\n<style>\n{{ style }}\n</style>{{ t }}'
    )
    page = render_page(tmp_path / "x.html.jinja", t="<b>")
    assert STYLE in page
    assert page.endswith("&lt;b&gt;")
