# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Loading a tokenizer, what data must know of it, and that a rust tokenizer does as well as the family's own."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft.data.cache import Cache
from sft.data.dataset import Loader
from sft.data.labels import Labelling, tokenize_rows
from sft.data.prepare import prepare
from sft.tokenizer import (
    TokenizerError,
    check_stop_token,
    control_tokens,
    family_control_tokens,
    load_tokenizer,
    tokenizer_digest,
)
from sft.training.train import train
from tests.fixtures.tiny import tiny_tokenizer
from tests.sft.test_data import ANSWER, ASK, chat, write

FAMILY = ["</s>", "<_bot>", "<_system>", "<_user>", "<s>"]


@pytest.fixture
def rust_tokenizer(tmp_path):
    """A token a byte, with the family's template and markers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["<_system>", "<_user>", "<_bot>"])
    tokenizer.chat_template = tiny_tokenizer(tmp_path).chat_template
    return tokenizer


def test_a_rust_tokenizer_gives_the_same_stretches(rust_tokenizer, tmp_path):
    rows = [chat(("system", "Kürze"), ASK, ANSWER, ("user", "And?"), ("assistant", "你好"), weights={2: 0.5})]
    path = write(tmp_path / "data.jsonl", rows)
    for last_turn_only, first in ((False, 0.5), (True, 0)):
        labelling = Labelling(max_length=None, last_turn_only=last_turn_only)
        ((_, row),) = tokenize_rows(path, rust_tokenizer, labelling)
        learned = len(b"Because.") + 1, len("你好".encode()) + 1
        assert [weight for weight in row.weights if weight] == [first] * learned[0] * (first > 0) + [1] * learned[1]
        assert rust_tokenizer.decode(row.input_ids[-learned[1] :]) == "你好</s>"


def test_control_tokens(rust_tokenizer, model_dir):
    tokenizer, stop_ids = load_tokenizer(model_dir)
    assert control_tokens(tokenizer) == control_tokens(rust_tokenizer) == family_control_tokens() == FAMILY
    assert stop_ids == {tokenizer.eos_token_id}


@pytest.mark.parametrize("kind", ["family", "rust"])
def test_a_digest_is_of_the_rules_and_not_of_the_place(kind, rust_tokenizer, tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "family") if kind == "family" else rust_tokenizer
    digests = [tokenizer_digest(tokenizer)]
    tokenizer("a long text", truncation=True, max_length=4)
    digests.append(tokenizer_digest(tokenizer))
    for name in ("one", "two"):
        tokenizer.save_pretrained(tmp_path / name)
        digests.append(tokenizer_digest(type(tokenizer).from_pretrained(tmp_path / name)))
    assert len(set(digests)) == 1
    tokenizer.add_tokens(["<more>"])
    assert tokenizer_digest(tokenizer) != digests[0]


def test_errors_name_the_model(model_dir, rust_tokenizer, tmp_path):
    with pytest.raises(TokenizerError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"no\.jinja"):
        load_tokenizer(model_dir, tmp_path / "no.jinja")

    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "empty.jinja").write_text("")
    with pytest.raises(TokenizerError, match="model has no chat template; give one as a Jinja file"):
        load_tokenizer(tmp_path / "model", tmp_path / "empty.jinja")

    config = tmp_path / "model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": None}))
    (tmp_path / "model/generation_config.json").unlink()
    assert load_tokenizer(tmp_path / "model")[1] == {2}  # the tokenizer's own
    (tmp_path / "model/tokenizer.model").unlink()
    rust_tokenizer.eos_token = None
    rust_tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(TokenizerError, match=r"model has no eos_token_id in generation_config.json or config.json"):
        load_tokenizer(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", "junk", r"could not parse ModelProto from .*tokenizer\.model"),
        ("tokenizer_config.json", "[1]", r"tokenizer_config\.json is a JSON list, expected an object"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not valid JSON"),
        ("generation_config.json", "[1]", r"generation_config\.json is a JSON list"),
        ("config.json", "[1]", r"config\.json is a JSON list"),
        ("special_tokens_map.json", "1", r"special_tokens_map\.json is a JSON int"),
        ("config.json", '{"model_type": "TeleFLMMasked"}', "grows by masks .* `teleflm fold` it first, or .*train`"),
    ],
)
def test_a_bad_file_of_the_model_is_named(name, content, message, model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / name).write_text(content)
    with pytest.raises(TokenizerError, match=message) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", ["{% if", "{{ nothing() }}", "{{ 1 // 0 }}", "{{ messages.a.b }}"])
def test_a_template_that_cannot_be_rendered_is_named(template, model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    tokenizer, stop_ids = load_tokenizer(folder)
    with pytest.raises(TokenizerError, match=r"the chat template of .*model cannot be rendered: ") as error:
        check_stop_token(tokenizer, stop_ids)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        ("{{ strftime_now('%H:%M:%S') }}", "strftime_now"),
        (
            "{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}{{ date }}",
            "strftime_now",
        ),
        ("{{ [1, 2] | random }}", "random"),
        ("{{ [1, 2]|random }}", "random"),
        ("{{ [[1, 2]] | map('random') | list }}", "random"),
        ("{{ lipsum(n=1) }}", "lipsum"),
        (
            "{# strftime_now #}{{ 'lipsum() strftime_now()' }}{% set random = 1 %}{{ random + 1 }}{{ tools.lipsum }}",
            None,
        ),
    ],
)
def test_a_template_that_renders_another_text_each_time_is_refused(start, name, tmp_path):
    """What is kept of one rendering would be trained on at any later time."""
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.chat_template = start + tokenizer.chat_template
    path = write(tmp_path / "data.jsonl", [chat(ASK, ANSWER)])
    loader = Loader(Cache(tmp_path / "cache"), tokenizer)
    ways = [
        lambda: [*tokenize_rows(path, tokenizer, Labelling(64))],
        lambda: prepare(path, tmp_path / "out", tokenizer, Labelling(64)),
        lambda: loader.open([str(path)], Labelling(64)),
    ]
    for way in ways:
        if name is None:
            way()
            continue
        with pytest.raises(
            TokenizerError, match=rf"^the chat template uses {name}, so that .* fixed text in its place"
        ):
            way()
    assert name is None or not (tmp_path / "cache").exists()


def test_a_template_that_fails_on_a_row_rejects_it(model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("{{ 1 // (messages | length - 2) }}" + template)
    path = write(tmp_path / "data.jsonl", [chat(ASK, ANSWER)])
    ((_, reject),) = tokenize_rows(path, load_tokenizer(folder)[0], Labelling(max_length=None))
    assert "the chat template fails on it: ZeroDivisionError" in reject.problems[0].detail


TURNS = (
    "{%% for m in messages %%}<_user>"
    "{%% if m.role == 'user' %%}{{ m.content }}{%% else %%}%s{%% endif %%}"
    "{%% endfor %%}"
)
TEMPLATES = {
    "end token outside": TURNS % "{% generation %}{{ m.content }}{% endgeneration %}</s>",
    "no end token": TURNS % "{% generation %}{{ m.content }}{% endgeneration %}",
    "not the stop token": TURNS % "{% generation %}{{ m.content }}<_bot>{% endgeneration %}",
    "end token only before another turn": TURNS
    % "{% generation %}{{ m.content }}{% if not loop.last %}</s>{% endif %}{% endgeneration %}",
    "end token only after the last turn": TURNS
    % "{% generation %}{{ m.content }}{% if loop.last %}</s>{% endif %}{% endgeneration %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_does_not_train_the_stop_token_is_refused(template, make_recipe, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(template)
    with pytest.raises(
        TokenizerError, match=r"last trained token of an assistant's turn (that .* )?is .* not a stop token \('</s>'\)"
    ):
        train(make_recipe(chat_template_path=str(path)))


def test_a_template_without_marks_is_refused(make_recipe, model_dir, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    with pytest.raises(TokenizerError, match="marks no token of an assistant's turn as trained"):
        train(make_recipe(chat_template_path=str(path)))
    tokenizer, stop_ids = load_tokenizer(model_dir, path)
    check_stop_token(tokenizer, stop_ids, assistant_only_loss=False)


def test_space_after_the_stop_token_is_fine(model_dir):
    tokenizer, stop_ids = load_tokenizer(model_dir)
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "eos_token ~ '\n'")
    check_stop_token(tokenizer, stop_ids)
