# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Models that score: each number against the model's own forward pass, one row at a time and without padding."""

import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from sft.selection import SelectionError, score, scorers
from sft.selection.score import (
    fit_perplexity,
    make_ifd_kernel,
    make_scorer_kernel,
    measure_ifd,
    measure_perplexity,
    score_ifd,
)
from sft.selection.scorers import CausalScorer, ClassifierScorer, length_batches, model_kind, model_window

from .conftest import chat, table
from .test_pipeline import run

SIZES = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CHATS = [
    chat("What is a cat?", "An animal."),
    chat("Hi", "Hello!", "And?", "Nothing else, I am afraid; that was all."),
    [{"role": "system", "content": "Be brief."}, *chat("Why?", "Because.")],
    chat("long " * 80, "cut"),  # no room for the answer
    chat("short", "and then a long answer that does not fit " * 9),
    chat("One", "two " * 9, "three", "four " * 30, "five", "beyond the window"),
]


def tiny(model_class, model_type: str, **settings):
    """A random model of a family of transformers, in float64."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **settings})
    return model_class.from_config(config).double().eval()


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


def save(model, tokenizer, folder: Path) -> str:
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# --- causal language models -------------------------------------------------------------------------------------------


def plain_losses(model, ids: list[int]) -> list[float]:
    """-log p of every token but the first: one sequence, no padding, all logits at once."""
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [-log_probs[place - 1, token].item() for place, token in enumerate(ids) if place]


def plain_ifd(model, tokenizer, messages, window: int) -> tuple[float, float, float]:
    """The IFD, the perplexity, and what the IFD was when its second mean was over whole answers."""
    ids, answer = [1], [-1]
    pieces = [tokenizer(m["content"] + "\n\n", add_special_tokens=False)["input_ids"] for m in messages]
    for number, (piece, message) in enumerate(zip(pieces, messages, strict=True)):
        ids += piece
        answer += [number if message["role"] == "assistant" else -1] * len(piece)
    ids, answer = ids[:window], answer[:window]
    together = [loss for loss, of in zip(plain_losses(model, ids), answer[1:], strict=True) if of >= 0]
    alone, longer = [], []
    for number, piece in enumerate(pieces):
        if messages[number]["role"] == "assistant":
            alone += plain_losses(model, [1, *piece])[: answer.count(number)] if answer.count(number) else []
            longer += plain_losses(model, [1, *piece][:window])
    if not together:
        return math.nan, math.nan, math.nan
    assert len(together) == len(alone)
    mean = np.mean(together)
    return mean / np.mean(alone), math.exp(mean), mean / np.mean(longer)


@pytest.mark.parametrize("window", [48, 4096])
def test_ifd_is_of_the_same_tokens_in_both_means(window, tokenizer):
    model = tiny(AutoModelForCausalLM, "llama", max_position_embeddings=window)
    scorer = CausalScorer(model, tokenizer)
    chats = CHATS if window == 48 else [*CHATS[:3], chat("x " * 300, "y z " * 300), chat("x " * 1500, "gone")]
    assert scorer.window == min(window, 1024)
    ifd, cut, has_answer = measure_ifd(scorer, chats)
    perplexity, also_cut, also_has = measure_perplexity(scorer, chats)
    assert cut.tolist() == also_cut.tolist()
    assert has_answer.tolist() == also_has.tolist() == np.isfinite(ifd).tolist()
    expected = np.array([plain_ifd(model, tokenizer, messages, scorer.window) for messages in chats])
    np.testing.assert_allclose(ifd, expected[:, 0], rtol=1e-10)
    np.testing.assert_allclose(perplexity, expected[:, 1], rtol=1e-10)
    assert cut.tolist() == ([False] * 3 + [True] * 3 if window == 48 else [False] * 3 + [True] * 2)
    unequal = np.abs(expected[:, 2] / expected[:, 0] - 1)
    assert unequal[:3].max() < 1e-12
    assert np.nanmin(unequal[4:] if window == 48 else unequal[3:]) > 1e-4, "these rows would not tell"


def test_padding_and_batches_change_nothing_but_rounding(tokenizer, monkeypatch):
    model = tiny(AutoModelForCausalLM, "llama")
    scorer = CausalScorer(model, tokenizer)
    alone = [measure_ifd(scorer, [messages])[0][0] for messages in CHATS]
    for tokens in (1, 100, 1 << 20):
        monkeypatch.setattr(scorers, "BATCH_TOKENS", tokens)
        np.testing.assert_allclose(measure_ifd(scorer, CHATS[::-1])[0][::-1], alone, rtol=1e-12)
    model.float()
    np.testing.assert_allclose(measure_ifd(scorer, CHATS)[0], alone, rtol=1e-5)


class MixedHead(LlamaForCausalLM):
    """One whose logits depend on more than the hidden states of their place, so that its head is nothing apart."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits + input_ids[:, :1, None] % 7 * torch.arange(600)
        return output


FAMILIES = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 1.5},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
}


@pytest.mark.parametrize("family", [*FAMILIES, "teleflm", "mixed"])
def test_losses_in_chunks_are_those_of_all_logits_at_once(family, tokenizer, model_dir, monkeypatch):
    """Whatever a family does to its logits: a factor, a soft cap, a projection."""
    if family == "teleflm":
        model = AutoModelForCausalLM.from_pretrained(model_dir).double().eval()
    elif family == "mixed":
        model = MixedHead(LlamaConfig(**SIZES)).double().eval()
    else:
        model = tiny(AutoModelForCausalLM, family, **FAMILIES[family])
    scorer = CausalScorer(model, tokenizer)
    assert (scorer._decoder is None) == (family == "mixed")
    draw = np.random.default_rng(0)
    sequences = []
    for length in (48, 1, 20, 33, 2):
        ids = draw.integers(3, 600, length).tolist()
        labels = [token if draw.random() < 0.6 else -100 for token in ids]
        sequences.append((ids, labels))
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: seen.append(logits.numel()))
    monkeypatch.setattr(scorers, "HEAD_BYTES", 4 * 600 * 7)
    found = scorer.losses(sequences)
    if family != "mixed":
        assert 600 * 5 < max(seen) <= 600 * 7, "no more than so many logits at once"
    for (ids, labels), (total, count) in zip(sequences, found, strict=True):
        kept = [loss for loss, label in zip(plain_losses(model, ids), labels[1:], strict=True) if label >= 0]
        assert count == len(kept)
        assert total == pytest.approx(sum(kept), rel=1e-10)
    assert found[:, 1].sum() > 30


def test_the_kernel_drops_outside_the_band(tokenizer, tmp_path):
    name = save(tiny(AutoModelForCausalLM, "llama"), tokenizer, tmp_path)
    chats = [*CHATS, *(chat(f"What is {n}?", f"It is {n * n} or {n}.") for n in range(40))]
    everything = make_ifd_kernel(name)(table(chats))
    values = everything["score"].to_numpy()
    assert everything["drop"].to_pylist() == [
        "answer_not_in_window" if np.isnan(value) else "ifd_high" if value >= 1 else None for value in values
    ]
    low, high = np.nanquantile(values, [0.2, 0.7])
    dropped = make_ifd_kernel(name, low, high)(table(chats))["drop"].to_pylist()
    expected = [
        "answer_not_in_window" if np.isnan(v) else "ifd_low" if v < low else "ifd_high" if v >= high else None
        for v in values
    ]
    assert dropped == expected
    assert {*dropped} == {"answer_not_in_window", "ifd_low", "ifd_high", None}


def test_ifd_kernel_survives_a_trip_to_another_process(model_dir):
    kernel = pickle.loads(pickle.dumps(make_ifd_kernel(str(model_dir))))
    assert kernel.func is score_ifd


@pytest.mark.parametrize(
    ("limits", "low", "high"),
    [
        ({"low_share": 0.0, "high_share": 0.0}, None, None),
        ({"low_share": 0.2, "high_share": 0.1}, 0.2, 0.9),
        ({"low_share": 0.0, "high_share": 0.25}, None, 0.75),
        ({"min": 0.3, "max": 0.6, "low_share": 0.2, "high_share": 0.0}, 0.3, 0.6),
        ({"max": 0.95, "low_share": 0.1, "high_share": 0.3}, 0.1, 0.7),
    ],
)
def test_perplexity_drops_outside_a_band(limits, low, high, tokenizer, tmp_path_factory):
    """Of bounds that are given as numbers and as shares of a sample, the narrower ones count."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny(AutoModelForCausalLM, "llama")
    chats = [chat(f"What is {n}?", f"It is {n * n} or {n}.") for n in range(60)]
    values = np.array([plain_ifd(model, tokenizer, messages, 48)[1] for messages in chats])
    bounds = {name: np.quantile(values, limits[name]) for name in ("min", "max") if name in limits}
    given = {"min": 0.0, "max": 1e9, **limits, **bounds}
    rows = table([*chats, CHATS[3]])
    found = fit_perplexity(rows, save(model, tokenizer, folder), **given)(rows)
    below = values < (0 if low is None else np.quantile(values, low) * (1 - 1e-6))
    above = values > (np.inf if high is None else np.quantile(values, high) * (1 + 1e-6))
    expected = ["perplexity_low" if b else "perplexity_high" if a else None for b, a in zip(below, above, strict=True)]
    assert found["drop"].to_pylist() == [*expected, "answer_not_in_window"]
    np.testing.assert_allclose(found["perplexity"].to_numpy()[:-1], values, rtol=1e-5)
    assert found["perplexity_cut"].to_pylist() == [False] * 60 + [True]


# --- classifiers ------------------------------------------------------------------------------------------------------


def plain_outputs(model, rows: list[list[int]]) -> np.ndarray:
    """The model's own outputs, a row at a time, without padding."""
    with torch.no_grad():
        return np.stack([model(input_ids=torch.tensor([row])).logits[0].numpy() for row in rows])


def keep_end(row: list[int], window: int, tokenizer) -> list[int]:
    """The end of a row, after the special token that it begins with, if it does."""
    first = [row[0]] if row[0] in tokenizer.all_special_ids else []
    return row if len(row) <= window else first + row[-(window - len(first)) :]


@pytest.mark.parametrize("pad", [0, None])
def test_a_reward_is_the_models_own_output_row_by_row(pad, tokenizer, tmp_path):
    model = tiny(
        AutoModelForSequenceClassification, "llama", num_labels=1, pad_token_id=pad, max_position_embeddings=512
    )
    name = save(model, tokenizer, tmp_path)
    assert model_kind(name) == "classifier"
    found = make_scorer_kernel(name)(table(CHATS))
    ids = [tokenizer.apply_chat_template(messages, return_dict=False) for messages in CHATS]
    assert len({len(row) for row in ids}) > 3, "batches have padding"
    expected = plain_outputs(model.float(), ids)[:, 0]
    np.testing.assert_allclose(found["score"].to_numpy(), expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(expected) > 0.1, "these rows would not tell"
    assert not any(found["score_cut"].to_pylist())
    assert found["drop"].null_count == len(CHATS)


def test_of_a_long_conversation_the_end_is_read(tokenizer):
    model = tiny(AutoModelForSequenceClassification, "llama", num_labels=1, pad_token_id=0)
    scorer = ClassifierScorer(model, tokenizer)
    found, cut, _ = scorer.scores(CHATS)
    rows = [tokenizer.apply_chat_template(messages, return_dict=False) for messages in CHATS]
    assert cut.tolist() == [len(row) > 48 for row in rows]
    assert 1 < cut.sum() < len(rows)
    kept = [keep_end(row, 48, tokenizer) for row in rows]
    np.testing.assert_allclose(found, plain_outputs(model, kept)[:, 0], rtol=1e-5)
    others = [*CHATS[3][:1], {"role": "assistant", "content": "not at all what it was"}]
    assert scorer.scores([others])[0] != pytest.approx(found[3]), "the answer is read"


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_reads_plain_text_if_it_is_asked_to(family, tokenizer, tmp_path):
    model = tiny(AutoModelForSequenceClassification, family, num_labels=1, pad_token_id=1, max_position_embeddings=50)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = None
    name = save(model, tokenizer, tmp_path)
    with pytest.raises(SelectionError, match=r"no chat template.*--scorer-format plain"):
        make_scorer_kernel(name)
    kernel = make_scorer_kernel(name, format="plain")
    found = kernel(table(CHATS))
    window = 48 if family == "roberta" else 50  # two of its places are for padding
    assert model_window(model) == window
    rows = [tokenizer("\n\n".join(m["content"] for m in messages))["input_ids"] for messages in CHATS]
    kept = [keep_end(row, window, tokenizer) for row in rows]
    np.testing.assert_allclose(found["score"].to_numpy(), plain_outputs(model, kept)[:, 0], rtol=1e-4, atol=1e-5)
    assert sum(found["score_cut"].to_pylist()) == sum(len(row) > window for row in rows) > 0


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_of_several_labels_one_is_named(problem, tokenizer, tmp_path):
    labels = {0: "bad", 1: "fair", 2: "good"}
    model = tiny(
        AutoModelForSequenceClassification, "llama", id2label=labels, pad_token_id=0, max_position_embeddings=512
    )
    model.config.problem_type = problem
    name = save(model, tokenizer, tmp_path)
    with pytest.raises(SelectionError, match=r"which label is the score\? it has bad, fair, good; give --scorer-label"):
        make_scorer_kernel(name)
    with pytest.raises(SelectionError, match=r"--scorer-label great: is no label of .*; it has bad, fair, good"):
        make_scorer_kernel(name, "great")
    kernel = make_scorer_kernel(name, "good")
    rows = [tokenizer.apply_chat_template(messages, return_dict=False) for messages in CHATS]
    logits = torch.tensor(plain_outputs(model.float(), rows))
    expected = (logits.sigmoid() if problem else logits.softmax(-1))[:, 2]
    np.testing.assert_allclose(kernel(table(CHATS))["score"].to_numpy(), expected, rtol=1e-4)


def test_a_row_without_a_number_is_dropped(tokenizer, tmp_path):
    """The template refuses one; of another, a token that no other has makes the output NaN."""
    model = tiny(AutoModelForSequenceClassification, "llama", num_labels=1, pad_token_id=0, max_position_embeddings=512)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system prompt') }}"
        "{% endif %}{{ message.content + '\n' }}{% endfor %}"
    )
    chats = [*CHATS[:3], chat("What?", "An exotic thing: 鼎")]
    ids = [set(tokenizer(m[-1]["content"], add_special_tokens=False)["input_ids"]) for m in chats]
    with torch.no_grad():
        model.get_input_embeddings().weight[next(iter(ids[3] - ids[0] - ids[1] - ids[2]))] = math.nan
    name = save(model, tokenizer, tmp_path)
    found = make_scorer_kernel(name)(table(chats))
    assert found["drop"].to_pylist() == [None, None, "template_refused", "model_not_finite"]


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(name: str, **told) -> str:
    with pytest.raises(SelectionError) as error:
        make_scorer_kernel(name, **told)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("scorer", ["/nowhere/at/all", "{empty}"])
def test_a_scorer_that_cannot_be_loaded(scorer, tmp_path):
    name = scorer.format(empty=tmp_path)
    assert refused(name).startswith(f"--scorer {name}")


def test_the_kind_is_told_from_the_configuration(tokenizer, tmp_path):
    name = save(tiny(AutoModelForCausalLM, "llama"), tokenizer, tmp_path)
    assert model_kind(name) == "causal"
    assert refused(name, label="good").startswith("--scorer-label good: is for reward models")
    assert refused(name, format="plain").startswith("--scorer-format plain: is for reward models")
    config = json.loads((tmp_path / "config.json").read_text())
    for found in (["LlamaModel"], ["LlamaForTokenClassification"], None):
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": found}))
        assert f"names {found[0] if found else 'no architecture'}, expected a causal language model" in refused(name)


def test_weights_that_are_missing_are_not_made_up(tokenizer, tmp_path):
    model = tiny(AutoModelForSequenceClassification, "llama", num_labels=1, pad_token_id=0)
    name = save(model, tokenizer, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {key: t for key, t in tensors.items() if key != "score.weight"},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    assert "has no weights for score.weight, so its scores would be random" in refused(name)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            "{{ bos_token }}\n{% if x",
            "its chat template fails at line 2: TemplateSyntaxError: unexpected end of template",
        ),
        ("{{ nope.a.b }}", "its chat template fails: UndefinedError: 'nope' is undefined; mend it, or,"),
        ("{{ messages[0].content + 1 }}", "its chat template fails: TypeError: can only concatenate str"),
        ("{{ 1 // 0 }}", "its chat template fails: ZeroDivisionError: "),
        ("{# nothing #}", "its chat template makes no token of a conversation"),
    ],
)
def test_a_broken_chat_template(template, problem, tokenizer, tmp_path):
    model = tiny(AutoModelForSequenceClassification, "llama", num_labels=1, pad_token_id=0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = template
    name = save(model, tokenizer, tmp_path)
    assert refused(name).startswith(f"--scorer {name}: {problem}")
    assert "give --scorer-format plain" in refused(name)
    assert make_scorer_kernel(name, format="plain"), "which does not read it"


def test_a_template_may_refuse_a_conversation(tokenizer, tmp_path):
    """Not all that it refuses is all there is: one may ask for a system prompt."""
    model = tiny(AutoModelForSequenceClassification, "llama", num_labels=1, pad_token_id=0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('a system prompt, please') }}{% endif %}text"
    )
    found = make_scorer_kernel(save(model, tokenizer, tmp_path))(table(CHATS[1:3]))
    assert found["drop"].to_pylist() == ["template_refused", None]


@pytest.mark.parametrize("vocabulary", [1, 599])
@pytest.mark.parametrize("model_class", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_the_tokenizer_of_another_model(model_class, vocabulary, tokenizer, tmp_path):
    model = tiny(model_class, "llama", vocab_size=vocabulary, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    name = save(model, tokenizer, tmp_path)
    expected = (
        f"{name}: its tokenizer has 600 ids, its weights {vocabulary} rows, none of them for id 599; give the model"
    )
    assert refused(name).startswith(f"--scorer {expected}")
    if model_class is AutoModelForCausalLM:
        with pytest.raises(SelectionError, match=f"^--perplexity {expected}"):
            score.check_perplexity_model(name)


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_nothing_in_the_folder_is_executed(tokenizer, tmp_path):
    folder, witness = tmp_path / "model", tmp_path / "witness"
    model = tiny(AutoModelForSequenceClassification, "llama", num_labels=1, pad_token_id=0)
    name = save(model, tokenizer, folder)
    (folder / "model.safetensors").unlink()
    torch.save({**model.state_dict(), "more": Touch(witness)}, folder / "pytorch_model.bin")
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert witness.exists(), "the trap works"
    witness.unlink()
    refused(name)
    (folder / "evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass C: ...")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.C"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto_map}))
    refused(name)
    assert not witness.exists()
    shutil.rmtree(folder)


def test_batches_hold_each_row_once_and_are_bounded():
    lengths = np.random.default_rng(0).integers(0, 50, 200).tolist()
    batches = list(length_batches(lengths, 100))
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    assert all(len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= 100 for batch in batches)
    assert [len(batch) for batch in length_batches(lengths, 0)] == [1] * 200
    assert list(length_batches([], 100)) == []


def test_models_are_loaded_once(model_dir):
    make_ifd_kernel(str(model_dir))
    assert score._causal(str(model_dir)) is score._causal(str(model_dir))


# --- in a selection ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_dir(model_dir, tmp_path_factory) -> str:
    """A reward model of 100 tokens."""
    settings = {"num_labels": 1, "pad_token_id": 0, "max_position_embeddings": 100}
    model = tiny(AutoModelForSequenceClassification, "llama", **settings)
    return save(model, AutoTokenizer.from_pretrained(model_dir), tmp_path_factory.mktemp("reward"))


@pytest.mark.parametrize("flag", ["--scorer", "--perplexity"])
@pytest.mark.parametrize(
    ("window", "damage", "reason"), [(4, 0.0, "answer_not_in_window"), (512, math.nan, "model_not_finite")]
)
def test_why_no_row_is_left_is_said(window, damage, reason, flag, tokenizer, lines, tmp_path):
    model = tiny(AutoModelForCausalLM, "llama", max_position_embeddings=window)
    with torch.no_grad():
        model.model.norm.weight[3] += damage
    name = save(model, tokenizer, tmp_path / "model")
    rows = [{"messages": chat(f"What is the square of {n}?", f"It is {n * n}, I think.")} for n in range(12)]
    status, output = run(lines(*rows), tmp_path / "out", "-n", 2, flag, name, "--workers", 1)
    assert status == 2
    assert f"Of 12 rows were dropped: 6 near_duplicate, 6 {reason}." in " ".join(output.split())


def test_a_selection_by_a_reward_model(reward_dir, model_dir, lines, tmp_path):
    answers = [f"It is {n * n}: " + " ".join(str(n * k) for k in range(5, n)) for n in range(60)]
    rows = [{"messages": chat(f"What is number {n}?", answer)} for n, answer in enumerate(answers)]
    data, names = lines(*rows), ["--scorer", reward_dir, "--perplexity", model_dir, "--set", "perplexity.low_share=0.1"]
    status, output = run(data, tmp_path / "out", "-n", 10, *names, "--set", "perplexity.high_share=0", "--workers", 2)
    assert status == 0, output
    summary = json.loads((tmp_path / "out/selection.json").read_text())
    stages = {stage["name"]: stage for stage in summary["stages"]}
    assert stages["perplexity"]["dropped"] == {"perplexity_low": 6}
    scores = pq.read_table(next((tmp_path / "out/stages").glob("*-scores")))
    cut = sum(scores["score_cut"].to_pylist())
    assert 0 < cut < len(scores) == 54
    assert f"scores: {cut} of 54 rows are longer than the model's window; the rest is not read" in output
    positions = scores["position"].to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    model = AutoModelForSequenceClassification.from_pretrained(reward_dir)
    ids = [tokenizer.apply_chat_template(rows[place]["messages"], return_dict=False) for place in positions]
    expected = plain_outputs(model, [keep_end(row, 100, tokenizer) for row in ids])[:, 0]
    np.testing.assert_allclose(scores["score"].to_numpy(), expected, rtol=1e-4, atol=1e-5)
    best = {positions[place] for place in np.argsort(-expected)[:10]}
    kept = [json.loads(line)["messages"] for line in (tmp_path / "out/selected.jsonl").read_text().splitlines()]
    assert len(best & {place for place, row in enumerate(rows) if row["messages"] in kept}) >= 7, "outliers come last"
    assert str(tmp_path) not in json.dumps(summary["pipeline"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scorer-label", "good"], "--scorer-label: scorer is off; give --scorer."),
        (["--scorer-format", "plain"], "--scorer-format: scorer is off; give --scorer."),
        (
            ["--scorer-format", "prose", "--scorer", "{reward}"],
            "is 'prose'; expected one of template, plain",
        ),
        (["--scorer-label", "good", "--scorer", "{reward}"], "--scorer-label good: is no label of"),
        (["--scorer", "{reward}", "--set", "scorer.ifd_max=0.9"], "are for causal language models"),
        (["--scorer", "{reward}", "--method", "ifd-top"], "is a classifier, and the IFD is of causal language models"),
        (["--perplexity", "{reward}"], "is a classifier, and perplexity is of causal language models"),
        (["--perplexity", "/nowhere"], "--perplexity /nowhere: no such folder"),
        (
            ["--perplexity", "{model}", "--method", "random"],
            "--perplexity is for --method teleflm or k-center, not",
        ),
        (["--set", "perplexity.max=5"], "--set perplexity.max: perplexity is off; give --perplexity."),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(options, message, reward_dir, model_dir, lines, tmp_path):
    given = [option.format(reward=reward_dir, model=model_dir) for option in options]
    status, output = run(lines({"messages": CHATS[0]}), tmp_path / "out", "-n", 1, *given)
    assert status == 2
    assert message in " ".join(output.split())
    assert not (tmp_path / "out").exists()
