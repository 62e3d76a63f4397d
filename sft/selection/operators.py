# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The operators that a selection may be declared with: what each does, reads, needs and can be told.

[`OPERATORS`] is the registry. An operator is a kernel (see [`sft.selection.stages`]) and one entry there. What it can
be told arrives as keyword arguments of the kernel, by their names; what it reads, if that can be told, as `reading`.
Those that need more, such as a model to load first, have a `build` of their own, which makes the whole stage.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from . import common, decontaminate, dedup, diversity, domains, embed, heuristics, rds, score, scorers, target
from .choice import choose_enough
from .common import OWN_TEXT, WHOLE, Reading
from .options import Name, Names, Number, OneOf, Option, Shares
from .stages import Kernel, SelectionError, Stage, make_digest

MARKS, DROPS, SCORES, CHOOSES = DOES = ("marks", "drops", "scores", "chooses")
FIRST = ("source", "row", "id", "unread")  # columns of the first stage, which reads the files


@dataclass(frozen=True)
class Run:
    """What an operator may know of the selection it is part of.

    Args:
        seed: of everything random.
        columns: that the rows have, by the operators before.
        before: name of each of these -> all its options, and what it reads.
        files: the data.
        allow_fewer, unique_ids, sanitize_control_tokens: see [`sft.selection.settings.SelectionSettings`].
        notify: told a line of what the user should know.
    """

    seed: int
    columns: frozenset[str]
    before: Mapping[str, tuple[Mapping[str, Any], Reading | None]] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    allow_fewer: bool = False
    unique_ids: bool = False
    sanitize_control_tokens: bool = False
    notify: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Operator:
    """One kind of step. It has a `kernel`, or a `fit` that makes one of a sample, or a `build`.

    Args:
        does: one of [`DOES`]: `marks`, adds columns; `drops`, rows; `scores`, adds `score`; `chooses`, the last one.
        meaning: in one line.
        needs: columns that its input has.
        makes: columns that it adds.
        kernel: from a table to a table, given the options.
        fit: from a sample to such a kernel, given the options.
        build: the stage, from the options, the reading and the run.
        options: by name; see [`sft.selection.options`].
        reading: what of a conversation it reads unless told otherwise; None, if that cannot be told.
        texts: that it may be told to read.
        switch: name of the option without which it does nothing, and is no stage.
        stage: name of its stage, if other than its own; operators that make the same column share one.
        fixed: what else its outcome depends on.
        whole, in_process, sample: see [`sft.selection.stages.Stage`].
        seeded: it is given the seed.
        costly: it takes long; what can be refused is refused before.
    """

    does: str
    meaning: str
    needs: tuple[str, ...] = ("row",)
    makes: tuple[str, ...] = ()
    kernel: Callable[..., pa.Table] | None = None
    fit: Callable[..., Kernel] | None = None
    build: "Callable[[dict[str, Any], Reading | None, Run], Stage] | None" = None
    options: Mapping[str, Option] = field(default_factory=dict)
    reading: Reading | None = None
    texts: tuple[str, ...] = ()
    switch: str = ""
    stage: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False
    in_process: bool = False
    sample: int = 0
    seeded: bool = False
    costly: bool = False


def build_stage(name: str, values: Mapping[str, Any], reading: Reading | None, run: Run) -> Stage:
    """The stage of an operator.

    Args:
        name: of the operator.
        values: all its options.
        reading: what it reads, if that can be told.
        run: what it is part of.

    Raises:
        SelectionError: a model or an evaluation set cannot be used.
        DataError: a file cannot be read.
    """
    operator = OPERATORS[name]
    told = dict(values)
    if operator.build:
        return operator.build(told, reading, run)
    given = {**told, **({"reading": reading} if reading else {}), **({"seed": run.seed} if operator.seeded else {})}
    return Stage(
        operator.stage or name,
        {**_describe(name, told, reading), **operator.fixed},
        columns_of(operator, reading),
        partial(operator.kernel, **given) if operator.kernel and given else operator.kernel,
        whole=operator.whole,
        in_process=operator.in_process,
        fit=partial(operator.fit, **given) if operator.fit else None,
        sample=operator.sample,
    )


def columns_of(operator: Operator, reading: Reading | None) -> tuple[str, ...]:
    """What the input of an operator has to have, for what it reads."""
    return (*operator.needs, *(("common",) if reading and reading.own else ()))


def _describe(name: str, values: Mapping[str, Any], reading: Reading | None) -> dict[str, Any]:
    """What an operator was told, for the record of its stage."""
    read = {"text": reading.text, "own": reading.own} if reading else {}
    return {"operator": name, **read, **values}


# --- those with a stage of their own ----------------------------------------------------------------------------------


def _drop_broken(table: pa.Table, **limits: Any) -> pa.Table:
    return heuristics.drop_broken(table, heuristics.Limits(**limits))


def _decontamination(values: dict[str, Any], reading: Reading | None, run: Run) -> Stage:
    files, shared = values.pop("files"), values["common_share"]
    limits = {name: values[name] for name in ("ngram", "min_words")}
    evaluations = decontaminate.read_evaluations(files, **limits)
    index = decontaminate.make_index(evaluations)
    texts = index.items + index.too_short + index.shared
    if index.too_short:
        run.notify(f"decontamination: {index.too_short} of {texts} texts are too short to look for")
    if index.shared:
        run.notify(f"decontamination: {index.shared} of {texts} texts say what many do, and are not looked for")
    content = make_digest([sorted(map(str, hashes.tolist())) for hashes in index.hashes.values()])
    told = {"evaluations": content, **_describe("decontamination", values, reading), "sample": common.SAMPLE}
    fit = partial(
        decontaminate.fit_kernel, evaluations=evaluations, max_share=shared, reading=reading or WHOLE, notify=run.notify
    )
    return Stage(
        "decontamination", told, columns_of(OPERATORS["decontamination"], reading), fit=fit, sample=common.SAMPLE
    )


def _target_copies(values: dict[str, Any], reading: Reading | None, run: Run) -> Stage:
    targets = target.read_targets(values.pop("targets"), run.files, run.sanitize_control_tokens)
    items = target.target_items(targets, values["ngram"], values["min_words"])
    # Of the two items of each, the one that has all that is said.
    count, short = len(targets.table), int((items.words.counts < items.least)[::2].sum())
    run.notify(f"target-copies: drops what contains one of the {count:,} targets; --keep-target-copies keeps it")
    if short:
        run.notify(f"target-copies: {short:,} of {count:,} targets are too short to look for")
    told = {"targets": targets.digest, **_describe("target-copies", values, reading), "sample": common.SAMPLE}
    shared = values["common_share"]
    find = partial(decontaminate.fit_kernel, evaluations=items, max_share=shared, reading=reading or WHOLE)
    reads = columns_of(OPERATORS["target-copies"], reading)
    return Stage("target-copies", told, reads, fit=partial(target.fit_copies, find=find), sample=common.SAMPLE)


def _embeddings(values: dict[str, Any], reading: Reading | None, run: Run) -> Stage:
    told = {**_describe("embeddings", values, reading), "sample": embed.SAMPLE, "dimensions": embed.DIMENSIONS}
    fit = partial(embed.fit_kernel, **values, seed=run.seed, reading=reading or OWN_TEXT)
    by_hidden_states = (values["embedder"] or "").startswith(rds.PREFIX)
    is_encoder = not by_hidden_states and embed.is_encoder(values["embedder"])
    if by_hidden_states:
        told["max_tokens"] = rds.MAX_TOKENS
    if is_encoder:  # before anything else takes long
        embed.load_encoder(values["embedder"])
    reads, in_process = columns_of(OPERATORS["embeddings"], reading), by_hidden_states or is_encoder
    return Stage("embeddings", told, reads, fit=fit, sample=embed.SAMPLE, in_process=in_process)


def _perplexity(values: dict[str, Any], reading: Reading | None, run: Run) -> Stage:
    score.check_perplexity_model(values["model"])
    told = {**_describe("perplexity", values, None), "max_tokens": scorers.CAUSAL_TOKENS, "sample": score.SAMPLE}
    fit = partial(score.fit_perplexity, **values)
    return Stage("perplexity", told, ("row",), fit=fit, sample=score.SAMPLE, in_process=True)


def _ifd(values: dict[str, Any], reading: Reading | None, run: Run) -> Stage:
    if not score.is_causal(values["model"]):
        raise SelectionError(
            f"--scorer {values['model']}: is a classifier, and the IFD is of causal language models; --method teleflm "
            "or the operator scorer takes it."
        )
    return _scoring("ifd", score.make_ifd_kernel(**values), values)


def _scorer(values: dict[str, Any], reading: Reading | None, run: Run) -> Stage:
    return _scoring("scorer", score.make_scorer_kernel(**values), values)


def _scoring(name: str, kernel: Kernel, values: dict[str, Any]) -> Stage:
    told = {**_describe(name, values, None), "max_tokens": [scorers.CAUSAL_TOKENS, scorers.CLASSIFIER_TOKENS]}
    # One process: a model a worker would not fit, and torch has threads of its own.
    return Stage("scores", told, ("row",), kernel, in_process=True)


def _choice(
    name: str,
    reads: tuple[str, ...],
    choose: Callable[[pa.Table], pa.Table],
    values: Mapping[str, Any],
    run: Run,
    **fixed: Any,
) -> Stage:
    """The last stage, of which it is asked whether there are rows enough."""
    told = {**_describe(name, values, None), "seed": run.seed, "unique_ids": run.unique_ids, **fixed}
    asked = {"count": values["count"], "quota": values["quota"], "allow_fewer": run.allow_fewer}
    return Stage("selection", told, reads, partial(choose_enough, choose=choose, **asked), whole=True)


def _clusters(values: dict[str, Any], reading: Reading | None, run: Run) -> Stage:
    scored = "score" in run.columns
    values["within"] = values["within"] or ("quality" if scored else "random")
    choose = partial(diversity.select_from_clusters, **values, seed=run.seed)
    fixed = {"cluster_rows": diversity.CLUSTER_ROWS, "neighbours": diversity.NEIGHBOURS, "outliers": diversity.OUTLIERS}
    return _choice("clusters", _reads_of_clusters(run), choose, values, run, **fixed)


def _k_center(values: dict[str, Any], reading: Reading | None, run: Run) -> Stage:
    choose = partial(diversity.select_from_clusters, **values, seed=run.seed, within=diversity.K_CENTER)
    return _choice("k-center", _reads_of_clusters(run), choose, values, run, cluster_rows=diversity.CLUSTER_ROWS)


def _reads_of_clusters(run: Run) -> tuple[str, ...]:
    return ("id", "domain", *(("score",) if "score" in run.columns else ()), "embedding")


def _top(values: dict[str, Any], reading: Reading | None, run: Run) -> Stage:
    choose = partial(diversity.select_top, **values, seed=run.seed, by="score")
    return _choice("top", ("id", "domain", "score"), choose, values, run)


def _random(values: dict[str, Any], reading: Reading | None, run: Run) -> Stage:
    choose = partial(diversity.select_top, **values, seed=run.seed, by="random")
    return _choice("random", ("id", "domain"), choose, values, run)


def _nearest(values: dict[str, Any], reading: Reading | None, run: Run) -> Stage:
    targets = target.read_targets(values.pop("targets"), run.files, run.sanitize_control_tokens)
    embedded, read = run.before["embeddings"]
    read = read or OWN_TEXT
    fit = partial(embed.fit_kernel, **embedded, reading=read, seed=run.seed)
    mark = partial(common.fit_marks, **run.before["common-text"][0]) if read.own else None
    choose = partial(_choose_nearest, **values, allow_fewer=run.allow_fewer)
    told = {"targets": targets.digest, **_describe("nearest", values, None), "unique_ids": run.unique_ids}
    return Stage(
        "selection",
        told,
        ("id", "domain", "embedding"),
        whole=True,
        fit=partial(target.fit_choice, targets=targets, fit=fit, mark=mark, choose=choose),
        sample=embed.SAMPLE,
        sample_reads=(*columns_of(OPERATORS["embeddings"], read), "embedding"),
        sample_after="embeddings",
    )


def _choose_nearest(table: pa.Table, count: int, quota: Any, allow_fewer: bool, targets: Any) -> pa.Table:
    choose = partial(target.select_nearest, count=count, quota=quota, targets=targets)
    return choose_enough(table, choose, count, quota, allow_fewer)


# --- the registry -----------------------------------------------------------------------------------------------------

_ANY = ("whole", "turns", "question", "answer")
_CHOICE: Mapping[str, Option] = {
    "count": Number(30_000, 1, 10**9, "rows to select", setting="count"),
    "quota": Shares("share of each domain; null: those of the data, or whatever is best or drawn", setting="quota"),
}
_LIMITS = {
    "min_words": Number(heuristics.MIN_WORDS, 0, 10**9, "words of all answers"),
    "max_words": Number(heuristics.MAX_WORDS, 0, 10**9, "words of the whole row"),
    "max_repeated": Number(
        heuristics.MAX_REPEATED, 0, 1, "of the runs of eight words in the answers, which are repeats"
    ),
    "max_looping": Number(
        heuristics.MAX_LOOPING, 0, 1, "of the runs of ten characters in the answers, which are repeats"
    ),
    "max_garbled": Number(heuristics.MAX_GARBLED, 0, 1, "of the characters, which are no text"),
    "max_misread": Number(heuristics.MAX_MISREAD, 0, 1, "of the characters, which were in another encoding"),
}

_IFD_BAND = {
    "ifd_min": Number(score.IFD_MIN, 0, 1e9, "rows with a lower IFD are dropped: the question gives the answer away"),
    "ifd_max": Number(score.IFD_MAX, 0, 1e9, "rows from there on are dropped: the question does not help"),
}

OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "exact-duplicates": Operator(
            DROPS,
            "rows with the roles and texts of an earlier one",
            needs=("id",),
            kernel=dedup.drop_exact_duplicates,
            whole=True,
        ),
        "common-text": Operator(
            MARKS,
            "text that many rows share, which `own: true` leaves out",
            makes=("common",),
            fit=common.fit_marks,
            sample=common.SAMPLE,
            options={
                "max_share": Number(
                    common.MAX_SHARE, 0, 1, "of the rows; a run of words that more of them have does not count"
                )
            },
            fixed={"run": common.RUN, "min_rows": common.MIN_ROWS, "sample": common.SAMPLE},
        ),
        "sketches": Operator(
            MARKS,
            "what near-duplicates compares",
            needs=("row", "unread"),
            makes=("sketch", "pairs", "answer_sketch", "answer_pairs"),
            kernel=dedup.sketch,
            reading=OWN_TEXT,
            texts=_ANY,
            fixed={"slots": dedup.SLOTS, "answer_slots": dedup.ANSWER_SLOTS},
        ),
        "near-duplicates": Operator(
            DROPS,
            "rows most of whose word pairs a longer one has, which is kept",
            needs=("id", "sketch", "pairs", "answer_sketch", "answer_pairs"),
            makes=("duplicate_of",),
            kernel=dedup.drop_near_duplicates,
            whole=True,
            options={
                "overlap": Number(dedup.OVERLAP, 0, 1, "of two rows' word pairs, from which on they are near"),
                "answer_overlap": Number(dedup.ANSWER_OVERLAP, 0, 1, "the same, of their answers"),
                "min_pairs": Number(dedup.MIN_PAIRS, 1, 1000, "distinct word pairs; rows with fewer stay"),
            },
            fixed={"bands": dedup.BANDS},
        ),
        "decontamination": Operator(
            DROPS,
            "rows that contain an item of an evaluation set",
            build=_decontamination,
            reading=WHOLE,
            texts=_ANY,
            switch="files",
            options={
                "files": Names("evaluation sets", setting="decontaminate"),
                "ngram": Number(decontaminate.NGRAM, 1, 100, "words in a row that give an item away"),
                "min_words": Number(decontaminate.MIN_WORDS, 1, 100, "words; shorter items are not looked for"),
                "common_share": Number(
                    common.MAX_SHARE, 0, 1, "of the rows; what more of them have in common is not looked for"
                ),
            },
        ),
        "target-copies": Operator(
            DROPS,
            "rows that contain a target",
            build=_target_copies,
            reading=WHOLE,
            texts=_ANY,
            switch="targets",
            options={
                "targets": Name("examples of what should get better", setting="target", is_path=True),
                "ngram": Number(decontaminate.NGRAM, 1, 100, "words in a row that give a target away"),
                "min_words": Number(decontaminate.MIN_WORDS, 1, 100, "words; shorter targets are not looked for"),
                "common_share": Number(
                    common.MAX_SHARE, 0, 1, "of the rows; what more of them have in common is not looked for"
                ),
            },
        ),
        "domains": Operator(
            MARKS,
            "what a row is about, by rules or a column",
            makes=("domain",),
            kernel=domains.tag_domains,
            reading=OWN_TEXT,
            texts=_ANY,
            options={"column": Name("of the data, that names it; rules where it is absent", setting="domain_column")},
        ),
        "heuristics": Operator(
            DROPS,
            "rows that are broken, by rules that can be read",
            needs=("row", "domain"),
            kernel=_drop_broken,
            options=_LIMITS,
        ),
        "score-column": Operator(
            SCORES,
            "by a column of the data; rows without a number there are dropped",
            makes=("score",),
            kernel=score.score_column,
            switch="column",
            stage="scores",
            costly=True,
            options={"column": Name("with a number for each row, the higher the better", setting="score_column")},
        ),
        "perplexity": Operator(
            DROPS,
            "rows whose answers a causal language model finds hardly or very surprising",
            makes=("perplexity", score.PERPLEXITY_CUT),
            build=_perplexity,
            switch="model",
            costly=True,
            options={
                "model": Name("a causal language model", setting="perplexity", is_path=True),
                "min": Number(score.PERPLEXITY_MIN, 0, 1e9, "of those that stay"),
                "max": Number(score.PERPLEXITY_MAX, 0, 1e9, "of those that stay"),
                "low_share": Number(score.LOW_SHARE, 0, 1, "of a sample of the rows, whose perplexity is too low"),
                "high_share": Number(score.HIGH_SHARE, 0, 1, "of a sample of the rows, whose perplexity is too high"),
            },
        ),
        "scorer": Operator(
            SCORES,
            "by a model: a causal language model as ifd does, a reward model or other classifier by its output",
            makes=("score", score.SCORE_CUT),
            build=_scorer,
            switch="model",
            stage="scores",
            costly=True,
            options={
                "model": Name("of either kind, which its config.json tells", setting="scorer", is_path=True),
                "label": Name("of a classifier with several, whose probability is the score", setting="scorer_label"),
                "format": OneOf(
                    scorers.FORMATS,
                    "what a classifier reads: its chat template, or plain text; null: the template",
                    setting="scorer_format",
                ),
                **_IFD_BAND,
            },
        ),
        "ifd": Operator(
            SCORES,
            "by how much the question helps a causal language model to predict the answers",
            makes=("score", score.SCORE_CUT),
            build=_ifd,
            switch="model",
            stage="scores",
            costly=True,
            options={"model": Name("a causal language model", setting="scorer", is_path=True), **_IFD_BAND},
        ),
        "length": Operator(
            SCORES,
            "by the number of characters",
            makes=("score",),
            kernel=score.score_length,
            reading=score.ANSWERS,
            texts=_ANY,
            stage="scores",
        ),
        "embeddings": Operator(
            MARKS,
            "where rows lie in relation to each other",
            makes=("embedding",),
            build=_embeddings,
            reading=OWN_TEXT,
            texts=_ANY,
            costly=True,
            options={
                "embedder": Name(
                    "a sentence encoder, rds:NAME, or a model whose input embeddings are taken; null: the data's words",
                    setting="embedder",
                    is_path=True,
                )
            },
        ),
        "clusters": Operator(
            CHOOSES,
            "from each cluster in proportion to its size, outliers last",
            needs=("id", "domain", "embedding"),
            build=_clusters,
            stage="selection",
            costly=True,
            options={
                **_CHOICE,
                "within": OneOf(
                    diversity.WITHIN, "what rows of a cluster; null: quality if there is a score, else random", "within"
                ),
            },
        ),
        "k-center": Operator(
            CHOOSES,
            "from each cluster what lies farthest apart, and with it what is damaged",
            needs=("id", "domain", "embedding"),
            build=_k_center,
            stage="selection",
            costly=True,
            options=_CHOICE,
        ),
        "nearest": Operator(
            CHOOSES,
            "those nearest to targets, which take turns",
            needs=("id", "domain", "embedding"),
            makes=("target", "similarity"),
            build=_nearest,
            stage="selection",
            costly=True,
            options={
                **_CHOICE,
                "targets": Name("examples of what should get better", setting="target", is_path=True),
            },
        ),
        "top": Operator(
            CHOOSES,
            "those of highest score",
            needs=("id", "domain", "score"),
            build=_top,
            stage="selection",
            costly=True,
            options=_CHOICE,
        ),
        "random": Operator(
            CHOOSES,
            "any",
            needs=("id", "domain"),
            build=_random,
            stage="selection",
            costly=True,
            options=_CHOICE,
        ),
    }
)

# What `--set` sets, by OPERATOR.NAME: numbers that no other option of the command line sets.
THRESHOLDS: Mapping[str, Number] = MappingProxyType(
    {
        f"{name}.{key}": option
        for name, operator in OPERATORS.items()
        for key, option in operator.options.items()
        if isinstance(option, Number) and not option.setting
    }
)

__all__ = [
    "CHOOSES",
    "DOES",
    "DROPS",
    "FIRST",
    "MARKS",
    "OPERATORS",
    "SCORES",
    "THRESHOLDS",
    "Operator",
    "Run",
    "build_stage",
    "columns_of",
]
