# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""How far the logits of two models are apart."""

from dataclasses import dataclass, field

import numpy as np

# A histogram of |difference|: five bins a power of ten; the first also has everything smaller, the last larger.
BINS = np.logspace(-18, 3, 106)


@dataclass(frozen=True)
class LogitComparison:
    """How far the logits of two models are apart, over the vocabulary both have.

    Args:
        tokens: positions compared.
        max_difference: largest absolute difference.
        rms_difference: root mean square difference.
        max_logit: largest absolute logit of the first model, the scale of the two above.
        same_argmax: share of positions at which both prefer the same token.
        histogram: number of differences in each of `BINS`, and before them those that are exactly zero; empty if none
            was taken.
    """

    tokens: int
    max_difference: float
    rms_difference: float
    max_logit: float
    same_argmax: float
    histogram: tuple[int, ...] = field(default=(), repr=False)

    @property
    def relative(self) -> float:
        """Largest difference in units of the largest logit."""
        if not self.max_logit:
            return 0.0 if self.max_difference == 0 else float("inf")
        return self.max_difference / self.max_logit


class LogitComparer:
    """Takes the logits of two models block by block of the vocabulary, and keeps sums."""

    def __init__(self, tokens: int):
        self._tokens, self._count, self._square_sum = tokens, 0, 0.0
        self._max_difference = self._max_logit = 0.0
        self._best = np.full((2, tokens), -np.inf)
        self._choice = np.zeros((2, tokens), np.int64)
        self._zeros, self._bins = 0, np.zeros(len(BINS) - 1, np.int64)

    def add(self, start: int, first: np.ndarray, second: np.ndarray) -> None:
        """Compare the logits [tokens, n] of the vocabulary rows from `start` on; in any order, each once."""
        first, second = first.astype(np.float64), second.astype(np.float64)
        difference = np.abs(first - second)
        self._count += difference.size
        self._square_sum += float(np.square(difference).sum())
        # np.maximum, unlike max, lets a NaN through.
        self._max_difference = float(np.maximum(self._max_difference, difference.max()))
        self._max_logit = float(np.maximum(self._max_logit, np.abs(first).max()))
        for model, logits in enumerate((first, second)):
            choice = logits.argmax(1)
            best = logits[np.arange(self._tokens), choice]
            better = best > self._best[model]
            self._best[model][better], self._choice[model][better] = best[better], choice[better] + start
        self._zeros += int((difference == 0).sum())
        self._bins += np.histogram(np.clip(difference[difference > 0], BINS[0], BINS[-1]), BINS)[0]

    def result(self) -> LogitComparison:
        """The comparison of all blocks so far."""
        return LogitComparison(
            tokens=self._tokens,
            max_difference=self._max_difference,
            rms_difference=(self._square_sum / self._count) ** 0.5,
            max_logit=self._max_logit,
            same_argmax=float((self._choice[0] == self._choice[1]).mean()),
            histogram=(self._zeros, *map(int, self._bins)),
        )
