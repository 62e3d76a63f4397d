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
        divergence: of the second model's distribution from the first's over that vocabulary, KL(first || second), in
            nats a token.
        losses: of both models on the tokens that follow, in nats a token; None if they were not given.
        histogram: number of differences in each of `BINS`, and before them those that are exactly zero; empty if none
            was taken.
    """

    tokens: int
    max_difference: float
    rms_difference: float
    max_logit: float
    same_argmax: float
    divergence: float = float("nan")
    losses: tuple[float, float] | None = None
    histogram: tuple[int, ...] = field(default=(), repr=False)

    @property
    def relative(self) -> float:
        """Largest difference in units of the largest logit."""
        if not self.max_logit:
            return 0.0 if self.max_difference == 0 else float("inf")
        return self.max_difference / self.max_logit


class LogitComparer:
    """Takes the logits of two models block by block of the vocabulary, and keeps sums.

    Args:
        tokens: positions that are compared.
        targets: token ids [tokens - 1] that follow the positions but the last, for the losses.
    """

    def __init__(self, tokens: int, targets: np.ndarray | None = None):
        self._targets = targets
        self._target_logits = np.zeros((2, max(tokens - 1, 0)))
        self._largest = np.full((2, tokens), -np.inf)
        self._sums = np.zeros((2, tokens))  # of exp(logit - largest)
        self._weighted = np.zeros(tokens)  # of exp(first - largest) x (first - second)
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
        self._add_probabilities(start, first, second)
        self._zeros += int((difference == 0).sum())
        self._bins += np.histogram(np.clip(difference[difference > 0], BINS[0], BINS[-1]), BINS)[0]

    def _add_probabilities(self, start: int, first: np.ndarray, second: np.ndarray) -> None:
        for model, logits in enumerate((first, second)):
            largest = np.maximum(self._largest[model], logits.max(1))
            shrink = np.exp(self._largest[model] - largest)
            exponentials = np.exp(logits - largest[:, None])
            self._sums[model] = self._sums[model] * shrink + exponentials.sum(1)
            self._largest[model] = largest
            if model == 0:
                self._weighted = self._weighted * shrink + (exponentials * (first - second)).sum(1)
            if self._targets is not None:
                here = np.flatnonzero((self._targets >= start) & (self._targets < start + logits.shape[1]))
                self._target_logits[model][here] = logits[here, self._targets[here] - start]

    def _divergence(self) -> tuple[float, tuple[float, float] | None]:
        normalizers = self._largest + np.log(self._sums)
        divergence = float((self._weighted / self._sums[0] - normalizers[0] + normalizers[1]).mean())
        if self._targets is None or not len(self._targets):
            return divergence, None
        first, second = (normalizers[:, :-1] - self._target_logits).mean(1)
        return divergence, (float(first), float(second))

    def result(self) -> LogitComparison:
        """The comparison of all blocks so far."""
        divergence, losses = self._divergence()
        return LogitComparison(
            tokens=self._tokens,
            max_difference=self._max_difference,
            rms_difference=(self._square_sum / self._count) ** 0.5,
            max_logit=self._max_logit,
            same_argmax=float((self._choice[0] == self._choice[1]).mean()),
            divergence=divergence,
            losses=losses,
            histogram=(self._zeros, *map(int, self._bins)),
        )
