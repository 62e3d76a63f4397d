# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""How well vectors tell what belongs together: of each text, the first half looks for the second.

    python benchmarks/embedders.py [--rows 2000] [--encoder FOLDER] [--texts FILE] [--folder DIR]

Recall at 1 and at 10 among the second halves of all texts of a pool, by cosine. Vectors of words are fitted to whole
texts, as a selection fits them to its own rows. `single characters` is what the words of the data were before pairs of
characters took their place. A folder of a sentence encoder is measured as such, and by its input embeddings. Texts of
a file, one a line, are a pool of their own.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
from measure import ROOT, arguments, console, report

Encode = Callable[[Iterable[str]], np.ndarray]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--encoder", help="folder of a sentence encoder")
    parser.add_argument("--texts", type=Path, help="file of texts, one a line")
    options = parser.parse_args()
    table = []
    for pool, texts in _pools(options.rows, options.texts):
        for name, fit in _embedders(options.encoder):
            started = time.perf_counter()
            encode = fit(texts)
            fitted = time.perf_counter()
            halves = [encode(half) for half in zip(*map(_halve, texts), strict=True)]
            took = time.perf_counter() - fitted
            first, tenth = _recall(*halves)
            rate = len(texts) / took
            table.append([pool, name, f"{first:.2f}", f"{tenth:.2f}", f"{fitted - started:.1f}", f"{rate:,.0f}"])
            console.print(*table[-1], style="dim")
    about = f"{options.rows:,} texts a pool, or as many as there are."
    columns = ("pool", "vectors", "recall at 1", "recall at 10", "seconds to fit", "texts a second")
    report("Embedders: half to half", options.folder, about, columns, table)


def _pools(rows: int, file: Path | None) -> Iterator[tuple[str, list[str]]]:
    import sys

    sys.path.insert(0, str(ROOT))
    from sft.selection.rows import whole_text
    from tests.sft.selection.pools import chinese_pool, english_pool, real_pool

    for name, make in (
        ("real, English", real_pool),
        ("documentation", english_pool),
        ("composed Chinese", chinese_pool),
    ):
        if pool := make(rows):
            yield name, [whole_text(messages) for messages in pool]
    if file:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        yield file.stem, random.Random(0).sample(lines, min(rows, len(lines)))


def _embedders(encoder: str | None) -> Iterator[tuple[str, Callable[[list[str]], Encode]]]:
    from sft.selection import embed

    yield "words of the data", lambda texts: embed.fit_corpus(texts, 0).embed
    yield "the same, single characters", _fit_single_characters
    if encoder:
        yield "input embeddings", lambda texts: embed.fit_model(texts, encoder, 0).embed
        yield "sentence encoder", lambda texts: embed.load_encoder(encoder)


def _fit_single_characters(texts: list[str]) -> Encode:
    from sft.selection import embed

    def encode(some: Iterable[str]) -> np.ndarray:
        with patch.object(embed, "pair_characters", lambda words: words):
            return model.embed(some)

    with patch.object(embed, "pair_characters", lambda words: words):
        model = embed.fit_corpus(texts, 0)
    return encode


def _halve(text: str) -> tuple[str, str]:
    """By words, or by characters where there are hardly any spaces."""
    words = text.split()
    if len(words) > len(text) / 20:
        return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])
    return text[: len(text) // 2], text[len(text) // 2 :]


def _recall(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    cosines = first @ second.T
    rank = (cosines > np.diag(cosines)[:, None]).sum(axis=1)
    return float((rank == 0).mean()), float((rank < 10).mean())


if __name__ == "__main__":
    main()
