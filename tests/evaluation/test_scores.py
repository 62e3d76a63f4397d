# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Log-likelihoods, streamed and loaded, against stock transformers and a formula written out."""

import json
import math
import shutil
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GraniteConfig, GraniteForCausalLM

from conversion.architecture import Architecture
from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.sources import open_checkpoint
from evaluation.loaded_scores import load_model, score_loaded
from evaluation.logits import checkpoint_logits
from evaluation.measure import evaluate, no_progress
from evaluation.passages import Passage
from evaluation.streamed_scores import group_tokens, memory_need, score_streamed
from tests.fixtures.tiny import tiny_config, tiny_model, tiny_sentencepiece, tiny_tokenizer

from .conftest import SENTENCE

ROOT = Path(__file__).parents[2]
RANDOM = np.random.default_rng(0)
PASSAGES = [
    Passage(RANDOM.integers(0, 640, length + 1), scored)
    for length, scored in ((40, 40), (7, 3), (1, 1), (64, 10), (64, 64), (23, 1))
]


def granite(folder: Path) -> GraniteForCausalLM:
    """Transformers' own Granite, which has both multipliers: code that is not ours, on the same weights."""
    ours = tiny_config()
    config = GraniteConfig(
        **{
            name: getattr(ours, name)
            for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        },
        num_key_value_heads=ours.num_key_value_heads,
        rms_norm_eps=ours.rms_norm_eps,
        max_position_embeddings=256,
        embedding_multiplier=2.5,
        logits_scaling=8.0,
        residual_multiplier=1.0,
        attention_multiplier=8**-0.5,
    )
    model = GraniteForCausalLM(config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def likelihoods(logits: torch.Tensor, passage: Passage) -> np.ndarray:
    """The formula, one token after another: logit - log(sum(exp(logits)))."""
    first = len(passage.inputs) - passage.scored
    return np.array(
        [
            float(logits[first + k][target] - torch.logsumexp(logits[first + k], 0))
            for k, target in enumerate(passage.targets.tolist())
        ]
    )


@torch.no_grad()
def stock(model, passage: Passage) -> np.ndarray:
    return likelihoods(model(torch.from_numpy(passage.inputs)[None]).logits[0].double(), passage)


def streamed(folder: Path, tmp_path: Path, passages=PASSAGES, **options) -> list[np.ndarray]:
    work = tmp_path / "work"
    scores = score_streamed(open_checkpoint(folder), passages, work=work, workers=2, progress=no_progress, **options)
    assert not work.exists()
    return scores


def test_streamed_float32_is_stock_transformers(folder, tmp_path):
    model = granite(folder)
    for found, passage in zip(streamed(folder, tmp_path), PASSAGES, strict=True):
        expected = stock(model, passage)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert found.sum() == pytest.approx(expected.sum(), rel=1e-6)


def test_streamed_float64_is_the_exact_forward(folder, tmp_path):
    """`checkpoint_logits` is transformers' Llama with norms that do not stop at float32; angles still do."""
    for found, passage in zip(streamed(folder, tmp_path, dtype="float64"), PASSAGES, strict=True):
        logits = torch.from_numpy(checkpoint_logits(open_checkpoint(folder), passage.inputs, "float64"))
        np.testing.assert_allclose(found, likelihoods(logits, passage), rtol=2e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True},
        {"use_mup": False},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 2, "head_dim": 16},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_streamed_of_every_kind(fields, tmp_path):
    model = tiny_model(tiny_config(**fields))
    model.save_pretrained(tmp_path / "model")
    for found, passage in zip(streamed(tmp_path / "model", tmp_path), PASSAGES, strict=True):
        np.testing.assert_allclose(found, stock(model, passage), rtol=2e-6)


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_loaded_is_stock_transformers(batch_tokens, folder):
    """Whatever is computed together, and padded."""
    model, told = granite(folder), []
    scores = score_loaded(
        load_model(str(folder)), PASSAGES, batch_tokens=batch_tokens, advance=lambda *done: told.append(done)
    )
    for found, passage in zip(scores, PASSAGES, strict=True):
        np.testing.assert_allclose(found, stock(model, passage), rtol=1e-6)
    total = sum(len(passage.inputs) for passage in PASSAGES)
    assert (sum(done for done, _ in told), {all_ for _, all_ in told}) == (total, {total})


def test_passages_in_groups_are_the_same(folder, tmp_path):
    """Memory for one passage at a time: other groups, the same numbers."""
    architecture = Architecture.from_config(tiny_config().to_dict())
    least = memory_need(architecture, 64, 64, "float32", 0)
    assert group_tokens(architecture, 64, "float32", least) == 64
    notes: list[str] = []
    alone = streamed(folder, tmp_path, memory=least, notify=notes.append)
    assert "in 4 groups" in notes[0]
    for one, other in zip(alone, streamed(folder, tmp_path), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    with pytest.raises(CheckpointError, match=r"--memory is .*, and one passage of 64 tokens takes .* in float32"):
        streamed(folder, tmp_path, memory=least - 1)


WIDE = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("intermediate_size", "length", "count", "dtype"),
    [
        pytest.param(1024, 64, 30, "float32", id="feed-forward"),
        pytest.param(1024, 64, 30, "float64", id="float64"),
        pytest.param(1024, 64, 30, "bfloat16", id="bfloat16"),
        pytest.param(64, 64, 30, "float32", id="attention"),
        pytest.param(64, 1000, 1, "float32", id="scores"),
    ],
)
def test_the_memory_that_is_stated_is_not_exceeded(intermediate_size, length, count, dtype, tmp_path):
    """Whatever takes most of it. Python's own count of what numpy takes, beyond what the blocks of large weights do."""
    config = tiny_config(**WIDE, intermediate_size=intermediate_size)
    tiny_model(config).save_pretrained(tmp_path / "model")
    passages = [Passage(RANDOM.integers(0, 640, length + 1), 1) for _ in range(count)]
    architecture = Architecture.from_config(config.to_dict())
    memory = 600 * 10**6
    stated = memory_need(architecture, count * length, length, dtype, memory)
    blocks = memory_need(architecture, 0, 0, dtype, memory)  # of weights so small, no block is whole
    tracemalloc.start()
    try:
        streamed(tmp_path / "model", tmp_path, passages, dtype=dtype, memory=memory)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.6 * (stated - blocks) < peak < 1.05 * (stated - blocks) or (count == 1 and peak < stated)
    assert stated <= memory


def test_weights_that_are_no_numbers(folder, tmp_path):
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="no finite log-likelihood"), np.errstate(all="ignore"):
        streamed(broken, tmp_path)
    with pytest.raises(CheckpointError, match="no finite log-likelihood"):
        score_loaded(load_model(str(broken)), PASSAGES)


# The metric.


def by_hand(model, tokenizer, documents: list[str], window: int, stride: int) -> tuple[float, int]:
    """Bits of some documents by the loop of transformers' documentation, and the number of tokens."""
    nats, count = 0.0, 0
    for document in documents:
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer.sp_model.encode(document)])
        previous_end = 1
        for begin in range(0, len(ids), stride):
            end = min(begin + window, len(ids))
            with torch.no_grad():
                log_softmax = model(ids[None, begin:end]).logits[0].double().log_softmax(-1)
            for place in range(previous_end, end):
                nats -= float(log_softmax[place - begin - 1, ids[place]])
                count += 1
            previous_end = end
            if end == len(ids):
                break
    return nats / math.log(2), count


@pytest.mark.parametrize("loaded", [False, True], ids=["streamed", "loaded"])
@pytest.mark.parametrize(("window", "stride"), [(None, None), (64, 63), (50, 17)])
def test_bits_per_byte(loaded, window, stride, folder, text, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "One document. \\u5929"}\n\n{"text": "x", "more": 1}\n')
    result = evaluate(folder, texts=[text, rows], loaded=loaded, window=window, stride=stride)
    assert (result.window, result.stride) == (window or 256, stride or 128)
    model, tokenizer = granite(folder), tiny_tokenizer(tmp_path / "tokenizer")
    for found, documents in zip(result.texts, ([SENTENCE * 24], ["One document. 天", "x"]), strict=True):
        bits, tokens = by_hand(model, tokenizer, documents, result.window, result.stride)
        nbytes = sum(len(document.encode("utf-8")) for document in documents)
        assert (found.tokens, found.nbytes, found.documents) == (tokens, nbytes, len(documents))
        assert found.bits_per_byte == pytest.approx(bits / nbytes, rel=1e-6)
        assert found.perplexity == pytest.approx(2 ** (bits / tokens), rel=1e-5)


def test_the_beginning_is_given_and_not_predicted(folder, tmp_path):
    """One `<s>`, not two, and no bits for it: of a text of one token, the loss of that token after `<s>`."""
    (tmp_path / "a.txt").write_text("the")
    (result,) = evaluate(folder, texts=[tmp_path / "a.txt"]).texts
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    ids = tokenizer.sp_model.encode("the")
    with torch.no_grad():
        logits = granite(folder)(torch.tensor([[1, *ids]])).logits[0].double().log_softmax(-1)
    assert result.tokens == len(ids)
    expected = -sum(float(logits[place, token]) for place, token in enumerate(ids))
    assert result.nats == pytest.approx(expected, rel=1e-6)


def test_tokens_that_stand_for_anything_are_said(tmp_path):
    """Without byte fallback, what the tokenizer does not know costs no bits that mean anything."""
    import sentencepiece

    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    lines = ["the value of a subscription is the item"] * 30
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(model / "tokenizer"), vocab_size=23, minloglevel=2
    )
    (tmp_path / "a.txt").write_text("the 天 item 地")
    result = evaluate(model, texts=[tmp_path / "a.txt"])
    assert result.texts[0].unknown == 2
    assert result.notes == ("a: 2 tokens are unknown to the tokenizer; what they stand for is in no bit.",)


def test_streaming_imports_no_torch(folder, text):
    script = f"""if True:
        import sys
        from teleflm.app import main
        sys.argv = ["teleflm", "eval", {str(folder)!r}, "--text", {str(text)!r}, "--json"]
        try:
            main()
        except SystemExit as end:
            assert end.code == 0, end.code
        assert not [name for name in ("torch", "transformers") if name in sys.modules]
    """
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float16', expected one of"),
        ({"texts": []}, "nothing to measure"),
        ({"window": 4, "stride": 4}, "window is 4 and stride 4"),
    ],
)
def test_options_that_cannot_be(change, message, folder, text):
    with pytest.raises(CheckpointError, match=message):
        evaluate(folder, **{"texts": [text], **change})


def test_models_that_cannot_be_measured(folder, text, tmp_path):
    def changed(name: str, **fields) -> Path:
        copy = Path(shutil.copytree(folder, tmp_path / name))
        config = {**open_checkpoint(copy).config, **fields}
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    with pytest.raises(
        CheckpointError, match=r"model_type is 'mistral', expected 'TeleFLM' or 'llama'; --loaded takes"
    ):
        evaluate(changed("mistral", model_type="mistral"), texts=[text])
    with pytest.raises(CheckpointError, match="rope_type is dynamic"):
        evaluate(changed("rope", rope_parameters={"rope_type": "dynamic", "factor": 2.0}), texts=[text])
    (tmp_path / "mistral/tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither tokenizer.model nor tokenizer.json"):
        evaluate(tmp_path / "mistral", texts=[text], loaded=True)
    small = tmp_path / "small"
    tiny_model(tiny_config(vocab_size=320)).save_pretrained(small)
    (small / "tokenizer.model").write_bytes(tiny_sentencepiece())
    with pytest.raises(CheckpointError, match="vocab_size is 320, and the texts have token"):
        evaluate(small, texts=[text])
    (small / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is of an adapter"):
        evaluate(small, texts=[text])
    with pytest.raises(CheckpointError, match="nowhere"):
        evaluate(tmp_path / "nowhere", texts=[text])
    with ThreadPoolExecutor(1) as pool:  # and none of it depends on the thread
        assert pool.submit(evaluate, folder, texts=[text]).result().texts
