# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the preview shows is what is trained on, character by character, and it only shows."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

import teleflm.reports.page
from conversion.checkpoint.errors import CheckpointError
from sft.data.labels import Labelling, tokenize_rows
from sft.data.preview import PreviewedRow, preview, render_text, visible
from teleflm.reports.page import check_report_folder, write_report_files
from teleflm.reports.preview import render_html
from tests.fixtures.tiny import tiny_tokenizer
from tests.sft.test_data import ANSWER, ASK, chat, write
from tests.sft.test_validate import sft

HOSTILE = '</span><script>alert(1)</script> & "q" [red]\x1b[31m\u202e\r\x00 {{ 7 * 7 }} 你好 🎉'
ROWS = [
    chat(("system", "Be  brief.\n"), ASK, ANSWER, ("user", "And?"), ("assistant", HOSTILE), weights={2: 0, 4: 0.5}),
    {"id": "<b>", "messages": []},
    chat(("user", HOSTILE), ("assistant", "  Two spaces,\n\na blank line. ")),
    chat(ASK, ("assistant", "never shown")),
]
TEXTS = [
    f"<_system>Be  brief.\n<_user>Why?<_bot>Because.</s><_user>And?<_bot>{HOSTILE}</s>",
    f"<_user>{HOSTILE}<_bot>  Two spaces,\n\na blank line. </s>",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "<i>data.jsonl", ROWS)


class Page(HTMLParser):
    """The tags of a page, and of each token its classes, title and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.tokens, self._open = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self._open = "title" in values
        if self._open:
            self.tokens.append([values["class"].split(), values["title"], ""])

    def handle_endtag(self, tag):
        self._open = False

    def handle_data(self, data):
        if self._open:
            self.tokens[-1][2] += data


def test_pieces_are_the_tokens_and_spell_the_text(path, tokenizer):
    first, reject, third = preview(path, tokenizer, Labelling(max_length=None), count=2)
    assert reject.reason == "no_messages"
    trained = [row for _, row in tokenize_rows(path, tokenizer, Labelling(max_length=None)) if row != reject]
    for shown, row, text in zip((first, third), trained, TEXTS, strict=False):
        assert [index for piece in shown.pieces for index in piece.ids] == list(row.input_ids)
        assert [piece.weight for piece in shown.pieces for _ in piece.ids] == list(row.weights)
        assert "".join(piece.text for piece in shown.pieces) == visible(text)
    assert {len(piece.ids) for piece in first.pieces} >= {1, 3, 4}  # characters of three and four bytes are one piece
    assert "\ufffd" not in render_html([first], "")


def test_the_page_shows_the_same_and_escapes_everything(path, tokenizer):
    rows = preview(path, tokenizer, Labelling(max_length=None), count=2)
    html = render_html(rows, title="<i>data.jsonl")
    page = Page(html)
    pieces = [piece for row in rows if isinstance(row, PreviewedRow) for piece in row.pieces]
    assert [token[2] for token in page.tokens] == [piece.text for piece in pieces]
    for (classes, title, _), piece in zip(page.tokens, pieces, strict=True):
        assert ("trained" in classes) == (piece.weight == 1)
        assert ("scaled" in classes) == (piece.weight not in (0, 1))
        assert title == f"id {', '.join(map(str, piece.ids))}, weight {piece.weight:g}"
    assert not {"script", "b", "i", "img", "link"} & set(page.tags)
    assert not {"\x1b", "\u202e", "\x00", "\r"} & set(html)
    assert "49" not in "".join(token[2] for token in page.tokens)


@pytest.mark.parametrize("marks", [False, True])
def test_a_terminal_gets_colours_or_marks_and_no_commands(marks, path, tokenizer):
    rows = [row for row in preview(path, tokenizer, Labelling(max_length=None)) if isinstance(row, PreviewedRow)]
    text = render_text(rows[0], marks=marks)
    learned = f"[x 0.5] {visible(HOSTILE)}</s>"
    assert (f"⟦{learned}⟧" in text.plain) == marks
    console = Console(color_system=None if marks else "standard", force_terminal=True, width=10_000)
    with console.capture() as capture:
        console.print(text)
    assert learned.replace("[x 0.5] ", "") in capture.get()
    assert "\x1b[31m" not in capture.get()


def test_a_cut_row_says_so(path, tokenizer):
    (row,) = preview(path, tokenizer, Labelling(max_length=90), count=1)
    assert (row.tokens, row.truncated) == (90, True)
    assert str(row).endswith("trained of 90 tokens, cut at max_length")
    assert "… cut at max_length" in render_html([row], "")


def test_the_command(path, model_dir, tmp_path):
    html = tmp_path / "page.html"
    for _ in range(2):  # it replaces its own
        status, out, _ = sft("preview", path, "--model", model_dir, "-k", 1, "--html", html)
        assert status == 0
    assert "⟦[x 0.5] " in out
    assert len(Page(html.read_text()).tokens) > 20
    status, out, _ = sft("preview", path, "--model", model_dir, "-k", 1, "--last-turn-only", "--json")
    assert (status, {piece["weight"] for piece in json.loads(out)["rows"][0]["pieces"]}) == (0, {0, 0.5})


@pytest.mark.parametrize("place", ["data", "link", "other page"])
def test_a_page_replaces_nothing_but_such_a_page(place, tmp_path):
    data = write(tmp_path / "data.jsonl", [chat(ASK, ANSWER)])
    tiny_tokenizer(tmp_path / "model").save_pretrained(tmp_path / "model")
    (tmp_path / "link.html").symlink_to(data)
    (tmp_path / "page.html").write_text("<!doctype html><title>Mine</title>")
    html = {"data": data, "link": tmp_path / "link.html", "other page": tmp_path / "page.html"}[place]
    before = html.read_bytes()
    status, _, error = sft("preview", data, "--model", tmp_path / "model", "--html", html)
    assert status == 2
    assert "is there already, and no page of this command" in " ".join(error.split())
    assert html.read_bytes() == before


def test_reports_replace_reports_alone(tmp_path):
    """What `verify --report` and `select --report` ask before their work."""
    for kind in ("selection", "verification"):
        other = "verification" if kind == "selection" else "selection"
        folder = tmp_path / kind
        check_report_folder(folder, kind)
        folder.mkdir()
        (folder / "notes.txt").write_text("")
        check_report_folder(folder, kind)
        (folder / "funnel.png").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"holds funnel\.png and no earlier report"):
            check_report_folder(folder, kind)
        template = Path(teleflm.reports.page.__file__).with_name(f"{kind}.html.jinja")
        source = template.read_text()
        assert source.count('<meta charset="utf-8">') == 1, "where it is noted what made the page"
        bare = tmp_path / template.name
        bare.write_text(source[: source.index("<title>")])
        write_report_files(folder, bare, {}, ("numbers.json", {}))
        check_report_folder(folder, kind)
        with pytest.raises(CheckpointError, match="and no earlier report of this command"):
            check_report_folder(folder, other)
