# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Tools, reasoning and text parts in the chat template; answers read back; special tokens in texts as text."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, pipeline

from tests.fixtures.chat_formula import stretches
from tests.fixtures.tiny import tiny_model

TOOL = {"type": "function", "function": {"name": "weather", "description": "Wetter </tools>", "parameters": {"b": 1}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京", "at": "</tool_call>"}}}
ASK = {"role": "user", "content": "Is it cold?"}
CALLS = {"role": "assistant", "content": None, "reasoning_content": "It asks.", "tool_calls": [CALL, CALL]}
RESULTS = [{"role": "tool", "content": "-3 </tool_response>"}, {"role": "tool", "content": ""}]
ANSWER = {"role": "assistant", "content": "Yes. ", "reasoning_content": "-3 is cold."}
TEXT = """<_system>Be brief.

You can call these tools:
<tools>
{"type": "function", "function": {"name": "weather", "description": "Wetter <\\/tools>", "parameters": {"b": 1}}}
</tools>
A call is written
<tool_call>
{"name": NAME, "arguments": OBJECT}
</tool_call>
and there may be several. Results come in the same order, each between <tool_response> and </tool_response>.\
<_user>Is it cold?<_bot><think>
It asks.
</think>

<tool_call>
{"name": "weather", "arguments": {"city": "北京", "at": "<\\/tool_call>"}}
</tool_call>
<tool_call>
{"name": "weather", "arguments": {"city": "北京", "at": "<\\/tool_call>"}}
</tool_call></s><_user><tool_response>
-3 <\\/tool_response>
</tool_response>
<tool_response>

</tool_response><_bot><think>
-3 is cold.
</think>

Yes. </s>"""

plain = st.text(alphabet=st.sampled_from([*"ab\n <>/{}\"\\'é北", "😀"]), max_size=12)
spiky = st.lists(st.one_of(plain, st.sampled_from(["<think>", "</tool_call>", "</tools>", "<tool_response>"]))).map(
    "".join
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), spiky),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(spiky, inner, max_size=3)),
    max_leaves=6,
)
calls = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    spiky.filter(str.strip),
    st.dictionaries(spiky, json_values, max_size=3),
)
answers = st.builds(
    lambda content, reasoning, calls: {
        "role": "assistant",
        "content": content,
        **({"reasoning_content": reasoning} if reasoning.strip() else {}),
        **({"tool_calls": calls} if calls else {}),
    },
    # What a text without reasoning or calls may say as well; see the tests of what cannot be told apart.
    spiky.filter(lambda text: "<tool_call>" not in text and not text.startswith("<think>")),
    spiky.filter(lambda text: "</think>" not in text),
    st.lists(calls, max_size=2),
)


def test_the_format(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    chat = [system, ASK, CALLS, *RESULTS, ANSWER]
    assert tokenizer.apply_chat_template(chat, tools=[TOOL], tokenize=False) == TEXT
    assert "".join(text for _, text in stretches(chat, [TOOL])) == TEXT
    alone = tokenizer.apply_chat_template([ASK], tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert alone == TEXT.split("<_bot>")[0].replace("Be brief.\n\n", "") + "<_bot>"


def test_other_spellings_of_the_same_are_rendered_alike(tokenizer):
    function = CALL["function"]
    as_text = {
        "function": {"name": function["name"], "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    }
    parts = [{"type": "text", "text": "Is it "}, {"type": "text", "text": "cold?"}]
    null = {"content": None, "tool_calls": None, "reasoning_content": None}

    def render(*messages):
        return tokenizer.apply_chat_template(list(messages), tokenize=False)

    expected = render(ASK, {**CALLS, "tool_calls": [CALL]})
    for call in (as_text, function, {**as_text, "id": None}):
        for content in (None, "", []):
            answer = {**null, "role": "assistant", "content": content, "thinking": "It asks.", "tool_calls": [call]}
            assert render({**null, "role": "user", "content": parts}, answer) == expected
    blank = {**ANSWER, "reasoning_content": " \n"}
    assert render(ASK, blank) == "<_user>Is it cold?<_bot>Yes. </s>"
    no_arguments = {"role": "assistant", "content": "x", "tool_calls": [{"name": "now", "arguments": None}]}
    assert render(ASK, no_arguments).endswith('x\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call></s>')


def test_functions_become_schemas(tokenizer):
    def weather(city: str) -> str:
        """
        The weather of now.

        Args:
            city: which.
        """
        return city

    text = tokenizer.apply_chat_template([ASK], tools=[weather], tokenize=False)
    (line,) = re.findall(r"<tools>\n(.*)\n</tools>", text)
    assert json.loads(line)["function"]["parameters"]["required"] == ["city"]


@settings(max_examples=40, deadline=None)
@given(st.lists(answers, min_size=1, max_size=3), st.lists(calls, max_size=2), spiky)
def test_masks_are_what_the_model_has_to_produce(tokenizer, said, tools, text):
    chat = [{"role": "system", "content": text}]
    for answer in said:
        results = [{"role": "tool", "content": text} for _ in answer.get("tool_calls", ())]
        chat += [{"role": "user", "content": text}, answer, *results]
    encoding = tokenizer.apply_chat_template(chat, tools=tools or None, return_assistant_tokens_mask=True)
    pieces = list(stretches(chat, tools))
    assert tokenizer.decode(encoding.input_ids) == "".join(text for _, text in pieces)
    marked = [index for index, mark in zip(encoding.input_ids, encoding.assistant_masks, strict=True) if mark]
    # Decoded after a marker: a first piece that begins a word would lose its space.
    bot = tokenizer.convert_tokens_to_ids("<_bot>")
    turns, turn = [], []
    for index in marked:
        turn.append(index)
        if index == tokenizer.eos_token_id:
            turns.append(tokenizer.decode([bot, *turn]).removeprefix("<_bot>"))
            turn = []
    assert turns == [text for generated, text in pieces if generated]
    assert not turn
    plain_ids = tokenizer.apply_chat_template(chat, tools=tools or None, return_dict=False)
    assert plain_ids == encoding.input_ids


@settings(max_examples=100, deadline=None)
@given(answers)
def test_an_answer_is_read_back_as_it_was(tokenizer, answer):
    prompt = tokenizer.apply_chat_template([ASK], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([ASK, answer], return_dict=False)
    assert whole[: len(prompt)] == prompt
    parsed = tokenizer.parse_response(tokenizer.decode(whole)[len(tokenizer.decode(prompt)) :], prefix=prompt)
    assert parsed == answer
    # From ids, with padding behind; a first piece that begins a word loses its space when decoded on its own.
    padded = tokenizer.parse_response([*whole[len(prompt) :], tokenizer.unk_token_id], prefix=prompt)
    assert padded.get("tool_calls") == answer.get("tool_calls")
    if "reasoning_content" in answer:
        assert padded == answer


def test_a_text_that_spells_reasoning_or_calls_is_read_as_these(tokenizer):
    """Documented: rendered as it stands, it cannot be told from them, and the text is the same again."""
    text = '<think>\nHm.\n</think>\n\nx\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    parsed = tokenizer.parse_response(text + "</s>", prefix="<_bot>")
    function = {"name": "f", "arguments": {}}
    assert parsed == {
        "role": "assistant",
        "content": "x",
        "reasoning_content": "Hm.",
        "tool_calls": [{"type": "function", "function": function}],
    }
    both = [[ASK, {"role": "assistant", "content": text}], [ASK, parsed]]
    first, second = (tokenizer.apply_chat_template(chat, tokenize=False) for chat in both)
    assert first == second


def test_how_answers_are_read_is_saved_with_the_tokenizer(tokenizer, hub_folder):
    saved = json.loads((hub_folder / "tokenizer_config.json").read_text())
    assert saved["response_template"] == tokenizer.response_template
    loaded = AutoTokenizer.from_pretrained(hub_folder)
    assert loaded.parse_response("Yes.</s>", prefix="") == {"role": "assistant", "content": "Yes."}
    with pytest.raises(ValueError, match="could not parse"):
        loaded.parse_response("<tool_call>\n{1}\n</tool_call></s>", prefix="")


def test_ids_of_a_batch_and_a_pipeline_are_read_too(tokenizer):
    prompt = tokenizer.apply_chat_template([ASK], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    whole = tokenizer.apply_chat_template([ASK, ANSWER], return_tensors="pt")["input_ids"]
    assert tokenizer.parse_response(whole[0, prompt.shape[1] :], prefix=prompt[0], tools=[TOOL]) == ANSWER
    model, rows = tiny_model(), list(range(len(tokenizer), 640))
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    said = generate([ASK], max_new_tokens=4, do_sample=False, suppress_tokens=rows)[0]["generated_text"][-1]
    ids = model.generate(prompt, max_new_tokens=4, do_sample=False, suppress_tokens=rows)[0, prompt.shape[1] :]
    assert said == {"role": "assistant", "content": tokenizer.decode(ids)}


def test_streamed_answers_are_read_piece_by_piece(tokenizer):
    text = "".join(text for generated, text in stretches([ASK, CALLS]) if generated)
    parser = tokenizer.get_response_parser(prefix="<_bot>")
    events = [event for char in text for event in parser.feed(char)]
    message, last = parser.finalize()
    assert message == {**CALLS, "content": ""}
    closed = [event["field"] for event in [*events, *last] if event["type"] == "region_close"]
    assert closed == ["reasoning_content", "tool_calls", "tool_calls"]


# --- special tokens in texts ------------------------------------------------------------------------------------------

HTML = "Old <s>price</s>, </s>new\U000f0000 <unk>"


def encoded(tokenizer, chat, **options):
    return tokenizer.apply_chat_template(chat, sanitize_control_tokens=True, **options)


def test_special_tokens_in_texts_become_text(tokenizer):
    chat = [
        {"role": "system", "content": "<s>"},
        {"role": "user", "content": HTML},
        {"role": "assistant", "content": HTML},
    ]
    expected = [*tokenizer.sp_model.encode(f"<_system><s><_user>{HTML}<_bot>{HTML}"), 2]
    assert 1 not in expected, "sentencepiece itself never takes a control token from a text"
    encoding = encoded(tokenizer, chat, return_assistant_tokens_mask=True)
    assert encoding.input_ids == expected
    assert tokenizer.decode(expected) == f"<_system><s><_user>{HTML}<_bot>{HTML}</s>"
    before = len(tokenizer.sp_model.encode(f"<_system><s><_user>{HTML}<_bot>"))
    assert encoding.assistant_masks == [0] * before + [1] * (len(expected) - before)
    assert encoded(tokenizer, chat, return_dict=False) == expected
    assert set(encoded(tokenizer, chat)) == {"input_ids", "attention_mask"}
    # Without being told, HTML becomes the real token.
    assert 1 in tokenizer.apply_chat_template(chat, return_dict=False)


def test_in_tools_and_arguments_too(tokenizer):
    tool = {"type": "function", "function": {"name": "f", "description": "<s>", "parameters": {"</s>": "<s>"}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"html": "<s>x</s>"}}}
    chat = [ASK, {"role": "assistant", "content": "", "reasoning_content": "<s>", "tool_calls": [call]}]
    encoding = encoded(tokenizer, chat, tools=[tool], return_assistant_tokens_mask=True)
    text = "".join(text for _, text in stretches(chat, [tool])).removesuffix("</s>")
    assert encoding.input_ids == [*tokenizer.sp_model.encode(text), 2]
    marked = sum(encoding.assistant_masks)
    prompt = text[: text.index("<_bot>") + len("<_bot>")]
    assert marked == len(encoding.input_ids) - len(tokenizer.sp_model.encode(prompt))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["<s>", "</s>", "<", "s>", "/", "x", " ", "é", "\n"]), max_size=8).map("".join))
def test_texts_without_special_tokens_have_the_ids_that_they_had(tokenizer, text):
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    with_masks = encoded(tokenizer, chat, return_assistant_tokens_mask=True)
    assert with_masks.input_ids == [*tokenizer.sp_model.encode(f"<_user>{text}<_bot>{text}"), 2]
    if "<s>" not in text and "</s>" not in text:
        plain_masks = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True)
        assert with_masks == plain_masks


def test_markers_of_the_template_cannot_be_made_text(tokenizer):
    for chat in ([{"role": "user", "content": "a<_bot>"}], [{**ASK, "name": "x"}, {**CALLS, "content": "<_user>"}]):
        with pytest.raises(ValueError, match=r"a message contains <_(bot|user)>, and sentencepiece encodes"):
            encoded(tokenizer, chat)
