# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A small Tele-FLM is born, grown, fine-tuned and published, and answers questions about Python.

python -m demo [--out out/demo] [--seed 0] [--quick]
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import datasets
import sentencepiece
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, logging, set_seed

from conversion import WriteOptions, convert_checkpoint
from conversion.checkpoint.manifest import read_manifest
from conversion.hub.saved_model import record_saved_model
from evaluation.logit_comparison import LogitComparison
from evaluation.logits import compare_logits
from growth import Mask, fold_masks, grow_checkpoint
from growth.verification.recorded import check_recordable, record_verification
from growth.verification.verify import verify_checkpoints
from modeling_teleflm import TeleFLMConfig, TeleFLMForCausalLM, TeleFLMTokenizer
from sft.training.recipe import Recipe
from sft.training.train import train as fine_tune
from teleflm.reports.verification import write_report
from tests.fixtures.hub import running_hub

from .corpus import Corpus, Messages, collect
from .hub import NAME, publish, read_lineage
from .published import SHARDS, save_as_published
from .report import Phase, Report, plot_losses
from .training import (
    BATCH_SIZE,
    BLOCK_LENGTH,
    QUIET,
    BarCallback,
    Block,
    Lineage,
    Log,
    pack,
    stack,
    train_grown_model,
    train_on_text,
)


@dataclass(frozen=True)
class Size:
    """How large the demo is: the model, and how long it trains."""

    pieces: int
    hidden_size: int
    pretraining_steps: int
    grown_steps: int
    masked_steps: int
    sft_steps: int

    def config(self) -> TeleFLMConfig:
        """A Tele-FLM in small, with a few vocabulary rows more than the tokenizer has pieces, as the 52B has.

        mup_scale_factor is hidden_size / 512, as in the 52B and the 102B. The other multipliers are larger than theirs
        (1 and 0.5), which learned more slowly here: held-out loss after 150 steps 5.6, against 4.3 with input_mult 10.
        """
        return TeleFLMConfig(
            vocab_size=self.pieces + 32,
            hidden_size=self.hidden_size,
            intermediate_size=self.hidden_size * 8 // 3,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=2 * BLOCK_LENGTH,
            rms_norm_eps=1e-5,
            use_mup=True,
            input_mult=16.0,
            output_mult=1.5,
            mup_scale_factor=self.hidden_size / 512,
        )


FULL = Size(pieces=2000, hidden_size=192, pretraining_steps=400, grown_steps=80, masked_steps=24, sft_steps=500)
QUICK = Size(pieces=600, hidden_size=48, pretraining_steps=60, grown_steps=24, masked_steps=8, sft_steps=40)


@dataclass(frozen=True)
class Run:
    """What every step needs to know."""

    report: Report
    size: Size
    out: Path
    seed: int


@dataclass(frozen=True)
class Text:
    """The text to train on and the text to judge by, as blocks of token ids."""

    training: list[Block]
    heldout: list[Block]
    training_file: Path
    heldout_file: Path


# Files and folders of the output. A run removes these, and nothing else, before it starts.
MARKER = ".teleflm-demo"
MADE = (
    *("conversations.jsonl", "heldout.jsonl", "texts.jsonl", "heldout-texts.jsonl", "tokenizer", "pretraining"),
    *("published", "converted", "grown-float64", "grown", "verification", "continued", "masked", "masked-trained"),
    *("folded", "sft", "hub", "loss.png", "summary.json"),
)

# What is said to the finished model: chats of one or more turns. The last name is held out.
CHATS = [
    ["What does os.path.join do?", "What are its parameters?"],
    ["What is the class pathlib.Path?"],
    ["What is the module json?"],
    ["What does re.compile do?"],
]


def main() -> None:
    """Live the life of a model, from its corpus to its first chat."""
    options = parse_arguments()
    size = QUICK if options.quick else FULL
    out = prepare_folder(options.out)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    getLogger("growth").setLevel("ERROR")  # it would warn that masks are left half way, which is what is shown
    set_seed(options.seed)

    console = Console()
    console.print(f"[bold]The life of a small Tele-FLM[/bold], written to {out}\n", highlight=False)
    run = Run(Report(console), size, out, options.seed)
    corpus = collect_corpus(run)
    tokenizer = train_tokenizer(run, corpus)
    text = write_text(run, corpus, tokenizer)
    model, pretraining, lineage = pretrain(run, text)
    source = publish_and_load(run, model, tokenizer, lineage)
    grown, growth = grow(run, source, text)
    continued, start = train_grown(run, source, grown, text)
    masks = grow_by_masks(run, source, text)
    sft = fine_tune_on_conversations(run)
    write_hub_folder(run)
    answers = chat(run)
    published = publish_to_a_hub(run)

    before, after = (count / 1e6 for count in growth["parameters"])
    phases = [
        Phase(f"pretraining, {before:.1f} M parameters", pretraining),
        Phase(f"growth, to {after:.1f} M parameters", continued),
        Phase("SFT, loss of the answers alone", sft),
    ]
    plot_losses(phases, out / "loss.png")
    summary = summarize(run.report, growth, start, masks, sft, answers, published)
    (out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    console.print(run.report.table())
    console.print(transcript(answers, corpus))
    console.print(from_the_hub(published), highlight=False, markup=False)
    talk = f"the model; to talk to it: teleflm chat {out / 'hub'}"
    proof = "what `teleflm verify` found of the growth, by bytes and by logits"
    shown = (
        ("loss.png", "the losses"),
        ("verification/index.html", proof),
        ("hub", talk),
        ("summary.json", "all numbers"),
    )
    for name, what in shown:
        console.print(f"{out / name}: {what}", highlight=False, soft_wrap=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m demo", description="The life of a small Tele-FLM.")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smaller model and less training: it learns little")
    return parser.parse_args()


def prepare_folder(out: Path) -> Path:
    """Make the output folder, or remove what an earlier run left in it; a folder that is not ours is refused."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / MARKER).is_file():
        sys.exit(f"{out}: not empty, and not written by this demo; choose another folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
    for path in (out / name for name in MADE):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return out


# --- the steps --------------------------------------------------------------------------------------------------------


def collect_corpus(run: Run) -> Corpus:
    """Read what Python says of itself."""
    with run.report.step("Corpus") as step:
        corpus = collect()
        write_conversations(corpus.conversations, run.out / "conversations.jsonl")
        write_conversations(corpus.heldout_conversations, run.out / "heldout.jsonl")
        characters = sum(map(len, corpus.texts))
        step.result(
            "text and chats from Python's own documentation",
            f"{characters / 1e6:.1f} M characters, {len(corpus.conversations):,} chats",
        )
    return corpus


def write_conversations(conversations: list[Messages], path: Path) -> None:
    """Write conversations as sft reads them."""
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))


def train_tokenizer(run: Run, corpus: Corpus) -> TeleFLMTokenizer:
    """Train a sentencepiece model like Tele-FLM's: BPE, bytes for what it has no piece for, one piece a chat marker."""
    with run.report.step("Tokenizer") as step:
        folder = run.out / "tokenizer"
        folder.mkdir()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in corpus.texts for line in text.splitlines() if line.strip()),
            model_prefix=str(folder / "tokenizer"),
            model_type="bpe",
            vocab_size=run.size.pieces,
            byte_fallback=True,
            character_coverage=1.0,
            user_defined_symbols=["<_system>", "<_user>", "<_bot>"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        tokenizer = TeleFLMTokenizer(str(folder / "tokenizer.model"))
        tokenizer.save_pretrained(folder)
        text = "".join(corpus.heldout_texts)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.decode(ids) != text:
            raise AssertionError("the tokenizer does not give back the held-out text")
        step.result("held-out text comes back unchanged", f"{len(text) / len(ids):.2f} characters a token")
    return tokenizer


def write_text(run: Run, corpus: Corpus, tokenizer: TeleFLMTokenizer) -> Text:
    """The texts as files, which `teleflm train` reads, and as blocks; of the held-out ones, the first few."""
    heldout, files = corpus.heldout_texts, (run.out / "texts.jsonl", run.out / "heldout-texts.jsonl")
    while len(pack(heldout[:-1], tokenizer)) >= 4 * BATCH_SIZE:
        heldout = heldout[:-1]
    for file, texts in zip(files, (corpus.texts, heldout), strict=True):
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Text(pack(corpus.texts, tokenizer), pack(heldout, tokenizer)[: 4 * BATCH_SIZE], *files)


def pretrain(run: Run, text: Text) -> tuple[TeleFLMForCausalLM, Log, Lineage]:
    """Train a new model on the text; returns it, the log, and what its record says of that."""
    with run.report.step("Pretraining") as step:
        model = TeleFLMForCausalLM(run.size.config())
        log, lineage = train_on_text(
            model,
            text.training,
            text.heldout,
            step,
            output_dir=run.out / "pretraining",
            steps=run.size.pretraining_steps,
            learning_rate=4e-3,
            warmup_steps=20,
            seed=run.seed,
        )
        first, *_, last = losses(log, "eval_loss")
        step.result(
            f"{model.num_parameters() / 1e6:.1f} M parameters learn: held-out loss falls", f"{first:.2f} → {last:.2f}"
        )
    return model, log, lineage


def publish_and_load(
    run: Run, model: TeleFLMForCausalLM, tokenizer: TeleFLMTokenizer, lineage: Lineage
) -> PreTrainedModel:
    """Save as Tele-FLM is published, load that as anybody would, and convert it to safetensors.

    Published weights are bfloat16. What was rounded away is gone: every comparison from here on is with what loads.
    """
    with run.report.step("Published layout") as step:
        save_as_published(model, run.out / "published")
        tokenizer.save_pretrained(run.out / "published")
        record_saved_model(run.out / "published", lineage, run.seed)
        source = AutoModelForCausalLM.from_pretrained(run.out / "published", dtype=torch.float32)
        weights = zip(model.parameters(), source.parameters(), strict=True)
        if not all(torch.equal(saved.bfloat16().float(), loaded) for saved, loaded in weights):
            raise AssertionError(f"{run.out / 'published'}: the weights that load are not those that were saved")
        convert_checkpoint(run.out / "published", run.out / "converted")
        step.result("AutoModelForCausalLM loads .bin shards and a 4.40 config", f"{SHARDS} shards, bfloat16")
    return source


def grow(run: Run, source: PreTrainedModel, text: Text) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Grow on every axis, Adam's moments too, and compare source and result.

    Growth multiplies norm weights by sqrt(d / D), an irrational number, so the proof is of weights stored in float64.
    Training goes on from the same growth stored in float32, which differs by the rounding of that factor; its
    bytes are certified to be those of a growth, and its record says so.
    """
    with run.report.step("Growth") as step:
        step.start(total=3)
        options = WriteOptions(progress=lambda nbytes, total: step.advance(nbytes / total))
        target = grown_sizes(source.config)
        grow_checkpoint(
            run.out / "converted", run.out / "grown-float64", overrides=target, dtype="float64", options=options
        )
        grow_checkpoint(
            run.out / "converted",
            run.out / "grown",
            overrides=target,
            dtype="float32",
            optimizer=run.out / "pretraining",
            options=options,
        )

        step.note("comparing")
        verdict = certify_growth(run, run.out / "converted", run.out / "grown", text.heldout_file)
        ids = stack(text.heldout[:4])
        exact = AutoModelForCausalLM.from_pretrained(run.out / "grown-float64")
        grown = AutoModelForCausalLM.from_pretrained(run.out / "grown")
        proof, stored = compare_logits(source, exact, ids), compare_logits(source, grown, ids)
        same_text = torch.equal(continue_greedily(source, ids), continue_greedily(grown, ids))
        check_growth(proof, same_text)
        ratio = grown.num_parameters() / source.num_parameters()
        step.result(
            f"{grown.num_parameters() / 1e6:.1f} M parameters (x {ratio:.2f}), the same logits in float64, the same "
            "text when it generates",
            f"relative difference {proof.relative:.0e}",
        )
    return grown, {
        "target": target,
        "parameters": [source.num_parameters(), grown.num_parameters()],
        "relative_difference_float64": proof.relative,
        "relative_difference_float32": stored.relative,
        "tokens_compared": proof.tokens,
        "same_generated_tokens": same_text,
        "verdict": verdict,
    }


def certify_growth(run: Run, source: Path, grown: Path, text: Path) -> str:
    """Have somebody else than the grower look at all bytes, and at logits; what is found goes into a report for people,
    and into the record of the result.
    """
    expected = check_recordable(grown)
    verification = verify_checkpoints(source, grown, text=text, max_tokens=256)
    write_report(verification, run.out / "verification", names=(source.name, grown.name))
    record_verification(source, grown, verification, expected)
    return verification.verdict


def grown_sizes(config: Any) -> dict[str, float]:
    """From 52B to 102B, every axis of Tele-FLM grew by a quarter; the vocabulary is padded to a multiple of 64."""
    axes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes: dict[str, float] = {axis: getattr(config, axis) * 5 // 4 for axis in axes}
    return {
        **sizes,
        "vocab_size": -(-config.vocab_size // 64) * 64,
        "mup_scale_factor": config.mup_scale_factor * 1.25,
    }


def check_growth(proof: LogitComparison, same_text: bool) -> None:
    """Stop the demo if growth changed what the model computes."""
    if proof.relative > 1e-12 or not same_text:
        raise AssertionError(f"growth changed the model: logits by {proof.relative:.2g}, same text: {same_text}")


def continue_greedily(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What a model makes of the beginnings of some texts, 48 tokens each."""
    return model.generate(ids[:, :32], max_new_tokens=48, do_sample=False, pad_token_id=model.config.eos_token_id)


def train_grown(run: Run, source: PreTrainedModel, grown: PreTrainedModel, text: Text) -> tuple[Log, dict[str, Any]]:
    """Train what was grown as `teleflm train` does, from the source's loss on.

    Adam's moments grew too, so there is no warm-up: the first step is as large as the source's next would have been.
    Its rate is that at which the source ended; by muP the matrices, which are wider now, take a part of it.
    """
    with run.report.step("Training what was grown") as step:
        source_loss = heldout_loss(source, text.heldout)
        trainer, log = train_grown_model(
            run.out / "grown",
            step,
            training=text.training_file,
            heldout=text.heldout_file,
            output_dir=run.out / "continued",
            steps=run.size.grown_steps,
            learning_rate=4e-4,
            base_width=run.size.hidden_size,
            seed=run.seed + 1,
        )
        first, *_, last = losses(log, "eval_loss")
        lineage = lineage_of(run.out / "continued")
        if lineage["moments"] != "grown":
            raise AssertionError(f"the training began with {lineage['moments']} moments of Adam")
        step.result(
            f"with grown moments it starts at the source's loss ({source_loss:.5f}), and learns",
            f"{first:.5f} → {last:.2f}",
        )
    groups = [
        {"parameters": len(group["params"]), "lr": group["initial_lr"]} for group in trainer.optimizer.param_groups
    ]
    return log, {
        "source_loss": source_loss,
        "grown_first_loss": first,
        "grown_last_loss": last,
        "moments": lineage["moments"],
        "mup_groups": groups,
    }


def grow_by_masks(run: Run, source: PreTrainedModel, text: Text) -> dict[str, Any]:
    """Grow the other way: what is new is random and silent, and its volume rises with the steps of a training.

    Half way up the masks are folded into the weights. What comes out is a plain model, and computes the same.
    """
    with run.report.step("Growth by masks") as step:
        sizes, steps = grown_sizes(source.config), run.size.masked_steps
        grow_checkpoint(
            run.out / "converted", run.out / "masked", overrides=sizes, dtype="float32", method=Mask(2 * steps)
        )
        trainer, log = train_grown_model(
            run.out / "masked",
            step,
            training=text.training_file,
            heldout=text.heldout_file,
            output_dir=run.out / "masked-trained",
            steps=steps,
            learning_rate=4e-4,
            base_width=run.size.hidden_size,
            seed=run.seed + 2,
        )
        fold_masks(run.out / "masked-trained", run.out / "folded")
        folded = AutoModelForCausalLM.from_pretrained(run.out / "folded")
        same = compare_logits(trainer.model, folded, stack(text.heldout[:4]))
        alpha = lineage_of(run.out / "folded")["alpha"]
        if same.relative > 1e-5:
            raise AssertionError(f"folding the masks changed the model: logits by {same.relative:.2g}")
        first, *_, last = losses(log, "eval_loss")
        step.result(
            f"starts at the source's loss too; half way, folded, a plain model computes the same (alpha {alpha:g})",
            f"{first:.5f} → {last:.2f}",
        )
    return {"first_loss": first, "last_loss": last, "alpha": alpha, "relative_difference_folded": same.relative}


def lineage_of(folder: Path) -> dict[str, Any]:
    """What the record of a folder says was done."""
    record = read_manifest(folder)
    if record is None:
        raise AssertionError(f"{folder}: has no record of how it was made")
    lineage: dict[str, Any] = record["lineage"]
    return lineage


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, heldout: list[Block]) -> float:
    """Mean loss of a model on held-out text, in nats a token."""
    model.eval()
    ids = stack(heldout)
    return torch.stack([model(input_ids=batch, labels=batch).loss for batch in ids.split(BATCH_SIZE)]).mean().item()


def fine_tune_on_conversations(run: Run) -> Log:
    """Fine-tune the whole model on the chats, as `teleflm sft train` does: on the answers alone, packed, guarded."""
    with run.report.step("Fine-tuning") as step:
        recipe = Recipe.from_dict(
            {
                **QUIET,
                "model_name_or_path": str(run.out / "continued"),
                "data_files": str(run.out / "conversations.jsonl"),
                "eval_data_files": str(run.out / "heldout.jsonl"),
                "output_dir": str(run.out / "sft"),
                "max_length": BLOCK_LENGTH,
                "packing": True,
                "eval_packing": False,
                "max_steps": run.size.sft_steps,
                "per_device_train_batch_size": BATCH_SIZE // 2,
                "activation_checkpointing": False,
                "learning_rate": 2e-3,
                "warmup_steps": 10,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
                "eval_strategy": "steps",
                "eval_steps": max(1, run.size.sft_steps // 5),
                "eval_on_start": True,
                "seed": run.seed,
            }
        )
        result = fine_tune(recipe, callbacks=[BarCallback(step)], progress=False)
        first, *_, last = losses(result.log_history, "eval_loss")
        step.result(
            f"it learns to answer: loss on held-out chats, {result.data.trained_tokens:,} tokens trained on",
            f"{first:.2f} → {last:.2f}",
        )
    return result.log_history


def write_hub_folder(run: Run) -> None:
    """Write what goes to the Hub: bfloat16 safetensors, code, tokenizer, chat template and model card."""
    with run.report.step("Hub folder") as step:
        step.start(total=1)
        options = WriteOptions(progress=lambda nbytes, total: step.advance(nbytes / total))
        convert_checkpoint(run.out / "sft", run.out / "hub", dtype="bfloat16", options=options)
        files = [path for path in (run.out / "hub").iterdir() if not path.name.startswith(".")]
        size = sum(path.stat().st_size for path in files)
        step.result(
            "safetensors, code, tokenizer, chat template, model card", f"{len(files)} files, {size / 1e6:.1f} MB"
        )


def chat(run: Run) -> list[dict[str, Any]]:
    """Talk to the model in a process that has only transformers and the Hub folder."""
    with run.report.step("Chat") as step:
        step.start(total=sum(map(len, CHATS)))
        answers = []
        for answer in run_chat(str((run.out / "hub").resolve()), CHATS, {**os.environ, "HF_HUB_OFFLINE": "1"}):
            step.note(answer["question"])
            step.advance()
            answers.append(answer)
        step.result("a fresh process without this package loads and answers", f"{len(answers)} answers")
    return answers


def publish_to_a_hub(run: Run) -> dict[str, Any]:
    """Publish to a Hub on this machine, and be the stranger who reads there: with a name, an empty cache, no token.

    It is the Hub that the tests have, in memory; it is gone when the step ends. Nothing leaves the machine.
    """
    with run.report.step("Hub on this machine") as step, running_hub() as hub:
        step.start(total=3)
        step.note("publishing")
        said = publish(run.out / "hub", hub.environment())
        step.advance()
        step.note(f"loading {NAME}")
        reader = hub.environment(token=None)
        (answer,) = run_chat(NAME, [[CHATS[0][0]]], reader)
        step.advance()
        step.note("reading its record")
        lineage = read_lineage(reader)
        size = sum(said["weights"].values())
        step.result(
            "published to a Hub on this machine (not huggingface.co); a fresh process loads it by name and answers",
            f"{size / 1e6:.1f} MB, {NAME}",
        )
    return {"name": NAME, "hub": hub.url, "weight_bytes": size, **answer, "lineage": lineage}


def run_chat(model: str, chats: list[list[str]], environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Run chat.py and yield its answers as they come.

    Args:
        model: folder, or name on the Hub.
        chats: what the user says in turn, of each chat.
        environment: of the process; what it keeps is in a folder that is gone afterwards.
    """
    script = Path(__file__).with_name("chat.py")
    command = [sys.executable, "-I", str(script), model]
    with tempfile.TemporaryDirectory() as elsewhere, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            cwd=elsewhere,
            env={**environment, "HF_HOME": elsewhere, "HF_MODULES_CACHE": f"{elsewhere}/modules"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with process, process.stdin as questions:
            json.dump(chats, questions)
            questions.close()
            yield from map(json.loads, process.stdout)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.read()}")


# --- what there is to show --------------------------------------------------------------------------------------------


def losses(log: Log, key: str) -> list[float]:
    """The values of one quantity in a trainer's log."""
    return [entry[key] for entry in log if key in entry]


def summarize(
    report: Report,
    growth: dict[str, Any],
    starts: dict[str, Any],
    masks: dict[str, Any],
    sft: Log,
    answers: list[dict[str, Any]],
    published: dict[str, Any],
) -> dict[str, Any]:
    """Everything that was shown, for a program to read."""
    return {
        "python": platform.python_version(),
        "seconds": round(report.seconds, 1),
        "steps": [vars(step) for step in report.steps],
        "growth": growth,
        "training": starts,
        "masks": masks,
        "sft": {"heldout_loss": losses(sft, "eval_loss"), "loss": losses(sft, "loss")},
        "chat": answers,
        "published": published,
    }


def transcript(answers: list[dict[str, Any]], corpus: Corpus) -> Table:
    """The chat, to read; what was asked of something that was kept from training is marked."""
    heldout = {messages[0]["content"] for messages in corpus.heldout_conversations}
    table = Table("You", "Tele-FLM", title="\nChat in a fresh process", title_justify="left", show_lines=True)
    for answer in answers:
        mark = " [dim](kept from training)" if answer["question"] in heldout else ""
        table.add_row(f"{answer['question']}{mark}", escape(answer["answer"]))
    table.caption = "A model this small learns in minutes how answers sound, not whether they are right."
    return table


def from_the_hub(published: dict[str, Any]) -> str:
    """What was done with the Hub, and what it told a stranger, to read."""
    name, steps = published["name"], [f"  {number}. {step}" for number, step in enumerate(published["lineage"], 1)]
    lines = [
        "\nBy name, from a Hub on this machine, the one of the tests: nothing was sent to huggingface.co",
        f"`teleflm publish` brought it to {published['hub']}, which is gone now, as {name}.",
        f'`from_pretrained("{name}", trust_remote_code=True)` loaded it in a fresh process without a token or a cache.',
        f'Asked "{published["question"]}" it said "{published["answer"]}"',
        f"`teleflm inspect {name}` read from there how it was made:",
    ]
    return "\n".join([*lines, *steps, ""])


if __name__ == "__main__":
    main()
