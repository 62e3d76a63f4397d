# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Does selecting help? The study whose protocol is docs/selection-study.md; what is measured goes to its results.

    python benchmarks/selection_study.py [--pool FILE.jsonl] [--folder DIR] [--only POOL] [--quick]

Each finished run is kept in DIR/runs.jsonl; the command, run again with the same DIR, goes on after the last of them.
--only does the runs of one pool, so that two processes share the work, and writes no page; the same command without it
then does. --quick tries the machinery in minutes: a smaller model, one seed, and nothing is written to docs.
"""

import json
import random
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import sentencepiece
import torch
from conversations import EDITS, POOL, Messages
from measure import ROOT, arguments, console, machine
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.utils import logging

from demo.corpus import collect
from modeling_teleflm import TeleFLMConfig, TeleFLMForCausalLM, TeleFLMTokenizer
from sft.data.dataset import prepare_dataset
from sft.selection import SelectionSettings, select_conversations
from sft.selection.rows import content_id
from sft.training.recipe import Recipe
from sft.training.train import train

DOCS = ROOT / "docs" / "selection-study.md"
ARMS = ("selected", "selected-ifd", "random", "longest", "all")
BUDGETS = ("equal steps", "equal epochs")
POOLS = ("as it is", "with faults")
HELD_OUT = 100
LEAST_DIFFERENCE = 0.005


@dataclass(frozen=True)
class Size:
    """What --quick makes smaller."""

    count: int = 1000
    hidden_size: int = 96
    pretraining_steps: int = 600
    steps: int = 120
    epochs: float = 1
    seeds: tuple[int, ...] = (0, 1, 2)


QUICK = Size(count=100, hidden_size=32, pretraining_steps=10, steps=4, epochs=0.02, seeds=(0,))


@dataclass(frozen=True)
class Study:
    """Where everything is, and how large it is."""

    folder: Path
    size: Size

    @property
    def base(self) -> Path:
        """The pretrained model."""
        return self.folder / "base"

    def pool(self, name: str) -> Path:
        """The conversations to choose from."""
        return self.folder / f"{name.replace(' ', '-')}.jsonl"

    def held_out(self, source: str) -> Path:
        """The conversations of a source to judge by."""
        return self.folder / "held-out" / f"{source}.jsonl"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pool", type=Path, default=POOL, help="rows with `messages` and `source`")
    parser.add_argument("--only", choices=POOLS, action="append", help="pools whose runs are done")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    study = Study(options.folder / "selection-study", QUICK if options.quick else Size())
    study.folder.mkdir(parents=True, exist_ok=True)
    sources = write_pools(study, options.pool)
    if not (study.base / "config.json").exists():
        pretrain(study)
    runs = list(run_all(study, sources, options.only or POOLS))
    if options.only:
        return
    text = describe(runs, sources, study.size, options.folder)
    console.print(text, markup=False)
    if not options.quick:
        head, mark, rest = DOCS.read_text(encoding="utf-8").partition("## Results\n")
        _, following, reading = rest.partition("\n## ")
        DOCS.write_text(f"{head}{mark}\n{text}{following}{reading}", encoding="utf-8")


# --- data -------------------------------------------------------------------------------------------------------------


def write_pools(study: Study, pool: Path) -> list[str]:
    """Split what is held out from the rest, and add the faults. Returns the sources."""
    import gzip

    opener: Callable = gzip.open if pool.suffix == ".gz" else open
    with opener(pool, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    by_source: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: content_id(row["messages"])):
        by_source.setdefault(row["source"], []).append(row)
    rest: list[dict] = []
    for source, own in by_source.items():
        count = min(HELD_OUT, len(own) // 5)
        _write(study.held_out(source), own[:count])
        rest += own[count:]
    _write(study.folder / "held-out.jsonl", [row for own in by_source.values() for row in own[:HELD_OUT]])
    _write(study.pool("as it is"), rest)
    draw = random.Random(0)
    faulty = [*rest, *add_faults(rest, draw)]
    draw.shuffle(faulty)
    _write(study.pool("with faults"), faulty)
    return sorted(by_source)


def add_faults(rows: list[dict], draw: random.Random) -> Iterator[dict]:
    """30 copies, 15 wrong answers and 5 loops for every 100 rows."""
    by_source: dict[str, list[dict]] = {}
    for row in rows:
        by_source.setdefault(row["source"], []).append(row)
    for row in draw.sample(rows, len(rows) * 30 // 100):
        yield {**row, "messages": EDITS[draw.choice(list(EDITS))](row["messages"], draw)}
    for row in draw.sample(rows, len(rows) * 15 // 100):
        yield {**row, "messages": _answer_with(row["messages"], draw.choice(by_source[row["source"]])["messages"])}
    for row in draw.sample(rows, len(rows) * 5 // 100):
        *before, last = row["messages"]
        loop = " ".join(last["content"].split()[-6:])
        yield {**row, "messages": [*before, {**last, "content": f"{last['content']} {' '.join([loop] * 20)}"}]}


def _answer_with(messages: Messages, others: Messages) -> Messages:
    answers = [message["content"] for message in others if message["role"] == "assistant"]
    return [
        {**message, "content": answers[index // 2 % len(answers)]} if message["role"] == "assistant" else message
        for index, message in enumerate(messages)
    ]


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # Left alone if it is the same: its time of change is part of a selection's configuration.
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


# --- the base ---------------------------------------------------------------------------------------------------------

QUIET = {"use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
BATCH, LENGTH, PIECES = 4, 512, 2000


def pretrain(study: Study) -> None:
    """The base model and its tokenizer; of the pool the tokenizer alone knows."""
    texts = collect().texts
    with study.pool("as it is").open(encoding="utf-8") as lines:
        chats = [message["content"] for line in lines for message in json.loads(line)["messages"]]
    folder = study.folder / "tokenizer"
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in [*texts, *chats] for line in text.splitlines() if line.strip()),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        character_coverage=1.0,
        user_defined_symbols=["<_system>", "<_user>", "<_bot>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tokenizer = TeleFLMTokenizer(str(folder / "tokenizer.model"))
    ids = torch.tensor([token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    width = study.size.hidden_size
    torch.manual_seed(0)
    model = TeleFLMForCausalLM(
        TeleFLMConfig(
            vocab_size=PIECES,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=2 * LENGTH,
            use_mup=True,
            input_mult=16.0,
            output_mult=1.5,
            mup_scale_factor=width / 512,
        )
    )
    settings = TrainingArguments(
        output_dir=str(study.folder / "pretraining"),
        max_steps=study.size.pretraining_steps,
        per_device_train_batch_size=BATCH,
        learning_rate=4e-3,
        warmup_steps=20,
        lr_scheduler_type="cosine",
        seed=0,
        **QUIET,
    )
    Trainer(model, settings, train_dataset=[{"input_ids": block, "labels": block} for block in blocks]).train()
    tokenizer.save_pretrained(study.base)
    model.save_pretrained(study.base)


# --- the runs ---------------------------------------------------------------------------------------------------------


def run_all(study: Study, sources: list[str], pools: Sequence[str]) -> Iterator[dict]:
    """Every run, of which those of an earlier command are not done again."""
    record = study.folder / "runs.jsonl"
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    known = {tuple(run[name] for name in ("pool", "arm", "budget", "seed")): run for run in done}
    for pool in pools:
        for seed in study.size.seeds:
            for arm in ARMS:
                for budget in BUDGETS:
                    if (pool, arm, budget, seed) not in known:
                        run = run_one(study, sources, pool, arm, budget, seed)
                        with record.open("a") as file:
                            file.write(json.dumps(run) + "\n")
                        known[pool, arm, budget, seed] = run
                        console.print(f"{pool}, {arm}, {budget}, seed {seed}: {run['mean']:.4f}", style="dim")
                    yield known[pool, arm, budget, seed]


def run_one(study: Study, sources: list[str], pool: str, arm: str, budget: str, seed: int) -> dict:
    """Select, fine-tune, judge."""
    data = select(study, pool, arm, seed)
    out = study.folder / f"fine-tuned-{pool.replace(' ', '-')}"
    shutil.rmtree(out, ignore_errors=True)
    length = {"max_steps": study.size.steps} if budget == "equal steps" else {"num_train_epochs": study.size.epochs}
    result = train(
        Recipe.from_dict(
            {
                **QUIET,
                **length,
                "model_name_or_path": str(study.base),
                "data_files": str(data),
                "output_dir": str(out),
                "max_length": LENGTH,
                "packing": True,
                "per_device_train_batch_size": BATCH,
                "activation_checkpointing": False,
                "learning_rate": 2e-3,
                "warmup_steps": 10,
                "lr_scheduler_type": "polynomial",
                "lr_scheduler_kwargs": {"lr_end": 1e-9, "power": 1.0},
                "seed": seed,
            }
        ),
        progress=False,
    )
    losses = {source: held_out_loss(out, study.held_out(source)) for source in sources}
    known = {"pool": pool, "arm": arm, "budget": budget, "seed": seed}
    with data.open(encoding="utf-8") as lines:
        rows = sum(1 for _ in lines)
    return {**known, "rows": rows, "steps": result.global_step, **losses, "mean": statistics.mean(losses.values())}


def select(study: Study, pool: str, arm: str, seed: int) -> Path:
    """The rows of an arm; a selection that is there already is used again."""
    method = {"selected": "teleflm", "selected-ifd": "teleflm", "all": "random"}.get(arm, arm)
    settings = SelectionSettings(
        count=10**9 if arm == "all" else study.size.count,
        allow_fewer=arm == "all",
        method=method,
        scorer=str(study.base) if arm == "selected-ifd" else None,
        decontaminate=(str(study.folder / "held-out.jsonl"),),
        seed=seed,
    )
    out = study.folder / "selections" / f"{pool.replace(' ', '-')}-{arm}-{seed}"
    return Path(select_conversations(study.pool(pool), out, settings).file)


@torch.inference_mode()
def held_out_loss(folder: Path, data: Path) -> float:
    """Mean loss per answer token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    dataset, _ = prepare_dataset(data, AutoTokenizer.from_pretrained(folder), max_length=LENGTH)
    total, count = 0.0, 0
    for row in dataset:
        labels = torch.tensor([row["labels"]])
        trained = int((labels[:, 1:] != -100).sum())
        total += model(torch.tensor([row["input_ids"]]), labels=labels).loss.item() * trained
        count += trained
    return total / count


# --- the page ---------------------------------------------------------------------------------------------------------


def describe(runs: list[dict], sources: list[str], size: Size, folder: Path) -> str:
    """All runs, and the arms beside `random`, in Markdown."""
    lines = [f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC. {machine(folder)} Losses in nats a token; lower is better.", ""]
    for pool in POOLS:
        for budget in BUDGETS:
            own = [run for run in runs if (run["pool"], run["budget"]) == (pool, budget)]
            lines += [f"### Pool {pool}, {budget}", "", "#### Against `random`", ""]
            lines += _table(("arm", "mean difference", "smallest - largest", "verdict"), _verdicts(own, size))
            lines += ["#### All runs", ""]
            numbers = [[run["arm"], run["seed"], run["rows"], run["steps"], *_losses(run, sources)] for run in own]
            lines += _table(("arm", "seed", "rows", "steps", "mean", *sources), numbers)
    return "\n".join(lines)


def _verdicts(runs: list[dict], size: Size) -> Iterator[list[object]]:
    means = {(run["arm"], run["seed"]): run["mean"] for run in runs}
    for arm in ARMS:
        if arm != "random":
            differences = [means[arm, seed] - means["random", seed] for seed in size.seeds]
            low, high = min(differences), max(differences)
            better, worse = high <= -LEAST_DIFFERENCE, low >= LEAST_DIFFERENCE
            verdict = "better" if better else "worse" if worse else "no difference"
            yield [arm, f"{statistics.mean(differences):+.4f}", f"{low:+.4f} - {high:+.4f}", verdict]


def _losses(run: dict, sources: list[str]) -> list[str]:
    return [f"{run[name]:.4f}" for name in ("mean", *sources)]


def _table(columns: tuple[str, ...], rows: object) -> list[str]:
    return [
        "| " + " | ".join(map(str, row)) + " |"
        for row in [columns, ["---"] * len(columns), *rows]  # type: ignore[misc]
    ] + [""]


if __name__ == "__main__":
    main()
