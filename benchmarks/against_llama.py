# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Our model beside transformers' own Llama: the same shape, the same tensors, the same settings, one process.

    python benchmarks/against_llama.py [--shapes 1b 52b 1t] [--seconds 420] [--device cuda] [--json FILE]

All multipliers are 1, so that both compute the same function; their logits have to be equal bit by bit before anything
is timed. The rows `with multipliers` are ours with those of the published model, which Llama cannot have: what they
cost. Within a round the order is random; the ratio is of throughputs, ours over Llama's, and the interval that of its
median (order statistics, 95 %). What memory or the installed packages do not allow is left out, and the row says so.

On a CPU the shape 1b has 2 layers instead of 24, and sequences are shorter. 52b and 1t are one layer of the true width,
with a vocabulary of --vocabulary: the head of a whole model is shared by 64 or 140 layers.
"""

import argparse
import importlib.util
import json
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from measure import GIB, ROOT, arguments, console, report
from results import Goal
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.utils import logging

sys.path.insert(0, str(ROOT))
from modeling_teleflm import TeleFLMConfig, TeleFLMForCausalLM

GOALS = (
    Goal(
        "computes at least as fast as a stock Llama of the same weights",
        "x Llama's throughput",
        1.0,
        at_least=True,
        rows=r"^((?!with multipliers).)*$",
    ),
    Goal(
        "multipliers cost no time",
        "x Llama's throughput",
        1.0,
        at_least=True,
        rows=r"with multipliers",
    ),
)
COLUMNS = ("shape", "what", "tokens a second", "Llama's", "rounds", "x Llama's throughput", "note")
LOGITS_FACTOR = {"use_mup": True, "output_mult": 0.5, "mup_scale_factor": 16.0}
_LEAST_SECONDS = 0.05  # of a timed stretch; shorter ones are repeated
_LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, and what it is given: (batch, tokens) of a forward pass, and steps of decoding."""

    name: str
    config: dict[str, int]
    dtype: torch.dtype
    batch: tuple[int, int]
    steps: int
    optimizer: type[torch.optim.Optimizer]
    compiles: bool = False


@dataclass(frozen=True)
class Job:
    """What is timed: `prepare` makes a state from a model, untimed, and `run` uses it. `copies` are of the weights."""

    name: str
    prepare: Callable[[nn.Module], Any]
    run: Callable[[nn.Module, Any], object]
    tokens: int
    copies: float = 1.0
    config: dict[str, Any] | None = None
    variant: str = ""


@dataclass(frozen=True)
class Outcome:
    """A row: the ratios of its rounds, or why there are none."""

    shape: str
    what: str
    tokens: int = 0
    ours: tuple[float, ...] = ()
    llama: tuple[float, ...] = ()
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        """Our throughput over Llama's, round by round."""
        return [theirs / ours for ours, theirs in zip(self.ours, self.llama, strict=True)]


def shapes(vocabulary: int, on_gpu: bool) -> dict[str, Shape]:
    """The shapes by name; smaller where a CPU computes them."""
    small = {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "num_key_value_heads": 16}
    small |= {"num_hidden_layers": 24 if on_gpu else 2, "vocab_size": 32000 if on_gpu else vocabulary}
    wide = torch.bfloat16
    return {
        "1b": Shape(
            f"1B-like, {small['num_hidden_layers']} layers of 2,048",
            small,
            wide if on_gpu else torch.float32,
            (4, 1024) if on_gpu else (1, 64),
            32 if on_gpu else 4,
            torch.optim.AdamW,
            compiles=True,
        ),
        "52b": Shape(
            "a layer of the 52B",
            _preset("tele-flm-52b", vocabulary),
            wide,
            (4, 1024) if on_gpu else (1, 32),
            32 if on_gpu else 4,
            torch.optim.SGD,
        ),
        "1t": Shape(
            "a layer of the 1T",
            _preset("tele-flm-1t", vocabulary),
            wide,
            (1, 1024) if on_gpu else (1, 8),
            32 if on_gpu else 2,
            torch.optim.SGD,
        ),
    }


def _preset(name: str, vocabulary: int) -> dict[str, int]:
    preset = TeleFLMConfig.from_preset(name)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {name: getattr(preset, name) for name in names} | {"num_hidden_layers": 1, "vocab_size": vocabulary}


def make_llama(shape: Shape, device: str, attention: str) -> LlamaForCausalLM:
    """A Llama with random weights, made where and as it is used."""
    config = LlamaConfig(**shape.config, attn_implementation=attention, rms_norm_eps=1e-5, max_position_embeddings=4096)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(shape.dtype)
    rotary = type(model.model.rotary_emb)(config=config).to(device)
    model = model.to_empty(device=device)
    model.model.rotary_emb = rotary  # its frequencies are computed, not loaded, and stay in float32
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.fill_(1) if "norm" in name else parameter.uniform_(-0.02, 0.02)
    return model


def make_ours(llama: LlamaForCausalLM, **multipliers: Any) -> TeleFLMForCausalLM:
    """A Tele-FLM of the very tensors of a Llama."""
    fields = {name: value for name, value in llama.config.to_dict().items() if name not in ("model_type", "dtype")}
    attention = llama.config._attn_implementation
    with torch.device("meta"):
        model = TeleFLMForCausalLM(TeleFLMConfig(**fields, **multipliers, attn_implementation=attention))
    for name, module in llama.named_modules():
        own = model.get_submodule(name)
        own._parameters.update(module._parameters)
        own._buffers.update(module._buffers)
    return model


def jobs(shape: Shape, device: str) -> list[Job]:
    """The rows of a shape."""
    rows, length = shape.batch
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, shape.config["vocab_size"], (rows, length), generator=generator).to(device)
    prompt, token = ids[:1, :8], ids[:1, :1]

    def nothing(model: nn.Module) -> None:
        return None

    @torch.inference_mode()
    def forward(model: nn.Module, state: Any) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    @torch.inference_mode()
    def prefill(model: nn.Module, state: Any) -> torch.Tensor:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits

    def backward(model: nn.Module, state: Any) -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return shape.optimizer(model.parameters(), lr=0.0)

    def step(model: nn.Module, state: torch.optim.Optimizer) -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        state.step()
        state.zero_grad(set_to_none=True)

    def dynamic(model: Any) -> DynamicCache:
        return _filled(model, DynamicCache(config=model.config))

    def static(model: Any) -> StaticCache:
        return _filled(model, StaticCache(config=model.config, max_cache_len=prompt.shape[1] + shape.steps))

    @torch.inference_mode()
    def _filled(model: nn.Module, cache: Any) -> Any:
        model(input_ids=prompt, past_key_values=cache, use_cache=True)
        return cache

    @torch.inference_mode()
    def decode(model: nn.Module, cache: Any) -> None:
        for _ in range(shape.steps):
            model(input_ids=token, past_key_values=cache, use_cache=True)

    # AdamW has two moments a weight; states are made anew for every model, and the weights do not move.
    kept = 4.0 if shape.optimizer is torch.optim.AdamW else 2.0
    step_name = f"training step, {shape.optimizer.__name__}"
    made = [
        Job("forward", nothing, forward, ids.numel()),
        Job("forward, with multipliers", nothing, forward, ids.numel(), config=LOGITS_FACTOR),
        Job("prefill", nothing, prefill, ids.numel()),
        Job("decode, dynamic cache", dynamic, decode, shape.steps),
        Job("decode, static cache", static, decode, shape.steps),
        Job("decode, dynamic cache, with multipliers", dynamic, decode, shape.steps, config=LOGITS_FACTOR),
        Job("forward and backward", nothing, backward, ids.numel(), 2.0),
        Job("forward and backward, with multipliers", nothing, backward, ids.numel(), 2.0, LOGITS_FACTOR),
        Job(step_name, optimizer, step, ids.numel(), kept),
        Job(f"{step_name}, use_kernels", optimizer, step, ids.numel(), kept, variant="kernels"),
    ]
    if shape.compiles:
        made.append(Job("torch.compile, forward", nothing, forward, ids.numel(), variant="compile"))
    return made


def why_not(job: Job, weights: int, device: str) -> str:
    """Why a row cannot be measured here, if it cannot."""
    if job.variant == "kernels":
        if importlib.util.find_spec("kernels") is None:
            return "not measured: the package kernels, which use_kernels needs, is not installed"
        if device == "cpu":
            return "not measured: kernels are for a GPU"
    needed = weights * (job.copies - 1) + GIB  # the weights themselves are there
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if needed > free:
        return f"not measured: {needed / GIB:.1f} GiB more are needed, {free / GIB:.1f} are free"
    return ""


def synchronise(device: str) -> None:
    """Wait for what was queued on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(job: Job, model: nn.Module, device: str, repeats: int) -> float:
    """Seconds of a run, the mean of some repeats; making their states is not counted."""
    total = 0.0
    for _ in range(repeats):
        state = job.prepare(model)
        synchronise(device)
        started = time.perf_counter()
        job.run(model, state)
        synchronise(device)
        total += time.perf_counter() - started
    return total / repeats


def duel(job: Job, models: dict[str, nn.Module], device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of both, round by round, until a time is used up; the order within a round is random."""
    started = time.perf_counter()
    for model in models.values():  # a first run that makes what is made once, and a second that says how long it takes
        timed(job, model, device, 1)
    took = max(timed(job, model, device, 1) for model in models.values())
    repeats = max(1, math.ceil(_LEAST_SECONDS / took))
    times: dict[str, list[float]] = {name: [] for name in models}
    while len(times["ours"]) < _LEAST_ROUNDS or time.perf_counter() - started < seconds:
        for name in random.sample(list(models), len(models)):
            times[name].append(timed(job, models[name], device, repeats))
    return times


def check_equal(ours: nn.Module, llama: nn.Module, vocabulary: int, device: str) -> None:
    """Both give the same logits, bit by bit.

    Raises:
        AssertionError: they do not.
    """
    ids = torch.randint(3, vocabulary, (1, 8), generator=torch.Generator().manual_seed(2)).to(device)
    with torch.inference_mode():
        assert torch.equal(ours(input_ids=ids).logits, llama(input_ids=ids).logits), "the models differ"


@contextmanager
def variant_of(job: Job, models: dict[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Both models compiled, or with kernels of the Hub, as a row says."""
    if job.variant == "compile":
        yield {name: torch.compile(model) for name, model in models.items()}  # type: ignore[misc]
        torch.compiler.reset()
    elif job.variant == "kernels":
        for model in models.values():
            model.set_use_kernels(True)  # type: ignore[operator]
        yield models
        for model in models.values():
            model.set_use_kernels(False)  # type: ignore[operator]
    else:
        yield models


def measured(shape: Shape, device: str, attention: str, seconds: float, only: str) -> list[Outcome]:
    """All rows of a shape, each with a share of the time."""
    chosen = [job for job in jobs(shape, device) if only in job.name]
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    weights = weight_bytes(shape)
    if weights + 2 * GIB > free:
        why = f"not measured: {weights / GIB:.1f} GiB of weights, {free / GIB:.1f} are free"
        return [Outcome(shape.name, job.name, note=why) for job in chosen]
    llama = make_llama(shape, device, attention)
    check_equal(make_ours(llama).eval(), llama.eval(), shape.config["vocab_size"], device)
    outcomes = []
    for job in chosen:
        why = why_not(job, weights, device)
        if why:
            outcomes.append(Outcome(shape.name, job.name, note=why))
            continue
        trains = job.copies > 1
        models: dict[str, nn.Module] = {"ours": make_ours(llama, **(job.config or {})).train(trains)}
        models["llama"] = llama.train(trains)
        try:
            with variant_of(job, models) as both:
                times = duel(job, both, device, seconds / len(chosen))
        except Exception as error:  # a compiler or a kernel that is missing says so in its own way
            if not job.variant:
                raise
            outcomes.append(Outcome(shape.name, job.name, note=f"not measured: {_first_line(error)}"))
            continue
        outcomes.append(Outcome(shape.name, job.name, job.tokens, tuple(times["ours"]), tuple(times["llama"])))
        console.print(", ".join(row_of(outcomes[-1])), style="dim")
    return outcomes


def weight_bytes(shape: Shape) -> int:
    """Bytes of the weights of a shape."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape.config))
    return sum(parameter.numel() for parameter in model.parameters()) * shape.dtype.itemsize


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:100]}".replace("|", "/")


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the median: order statistics, by the binomial distribution; all values if there are few."""
    count, below, tail = len(values), 0, 0.0
    while True:
        tail += math.comb(count, below) / 2**count
        if tail > 0.025:
            break
        below += 1
    ordered = sorted(values)
    rank = max(below - 1, 0)
    return ordered[rank], ordered[count - 1 - rank]


def row_of(outcome: Outcome) -> list[str]:
    """The cells of an outcome: the columns are `COLUMNS`."""
    if not outcome.ours:
        return [outcome.shape, outcome.what, "", "", "", "", outcome.note]
    least, most = median_interval(outcome.ratios)
    return [
        outcome.shape,
        outcome.what,
        f"{outcome.tokens / statistics.median(outcome.ours):,.1f}",
        f"{outcome.tokens / statistics.median(outcome.llama):,.1f}",
        str(len(outcome.ours)),
        f"{statistics.median(outcome.ratios):.3f} [{least:.3f}, {most:.3f}]",
        outcome.note,
    ]


def device_name(device: str) -> str:
    """The name of the GPU or of the CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=["1b", "52b", "1t"], default=["1b", "52b", "1t"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attention", default="sdpa", help="implementation, of both")
    parser.add_argument("--vocabulary", type=int, default=8192, help="of the shapes of one layer, and of all on a CPU")
    parser.add_argument("--seconds", type=float, default=420, help="of all rows together, about")
    parser.add_argument("--rows", default="", help="only rows whose names have this")
    parser.add_argument("--json", type=Path, help="file to which each row is added as a line of JSON, with its rounds")
    options: argparse.Namespace = parser.parse_args()
    logging.set_verbosity_error()
    known = shapes(options.vocabulary, options.device == "cuda")
    outcomes = []
    for name in options.shapes:
        share = options.seconds / len(options.shapes)
        outcomes += measured(known[name], options.device, options.attention, share, options.rows)
    versions = {"device": device_name(options.device), "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "threads": str(torch.get_num_threads())}
    if options.json:
        with options.json.open("a") as file:
            file.writelines(json.dumps(versions | asdict(outcome)) + "\n" for outcome in outcomes)
    settings = [f"{known[name].name}: {str(known[name].dtype)[6:]}, {known[name].batch}" for name in options.shapes]
    about = (
        f"{versions['device']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{versions['threads']} threads, {options.attention}, vocabulary {options.vocabulary:,}. Dtype, and batch x "
        f"tokens: {'; '.join(settings)}. Median of the rounds [95 % interval of it]. Logits were equal bit by bit."
    )
    title = f"Beside a stock Llama, {'GPU' if options.device == 'cuda' else 'CPU'}"
    report(title, options.folder, about, COLUMNS, [row_of(outcome) for outcome in outcomes], GOALS)


if __name__ == "__main__":
    main()
