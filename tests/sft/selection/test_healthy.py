# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Healthy rows stay: real ones where there are some, and rows made to look like faults, English and Chinese."""

import gzip
import itertools
import json
import time
from pathlib import Path

import pytest

from sft.selection.domains import tag_domain
from sft.selection.heuristics import (
    Limits,
    drop_broken,
    find_code,
    find_fault,
    is_misread,
    is_python,
    looping_share,
    repeated_shares,
)

from .conftest import chat, table

REAL = Path(__file__).parents[3] / "shared/data/conversations.jsonl.gz"
TICKS = "```"
DROPPED = 0.005


def fault(messages) -> str | None:
    looping = looping_share("\n".join(message["content"] for message in messages if message["role"] == "assistant"))
    return find_fault(messages, tag_domain(messages), looping=looping)


TRICKY = [
    # No refusals.
    ("什么是深度学习？", "作为人工智能领域的重要分支，深度学习让机器从数据中学习。"),
    ("介绍一下语言模型。", "作为语言模型的代表，GPT 由 Transformer 构成。"),
    ("大模型有什么用？", "作为大模型的用户，企业可以用它写代码。"),
    ("Decline an invitation.", "I am sorry that I cannot attend your wedding. I wish you both all the best."),
    ("Write an apology to a customer.", "I'm sorry that we could not deliver on time."),
    ("Write a note to a friend.", "I'm sorry, I can't make it tonight. Shall we meet on Friday?"),
    ("替我写一封婉拒信。", "非常抱歉，我不能参加您的婚礼，祝你们百年好合。"),
    ("替我写一张请假条。", "很抱歉，我明天无法到校上课，请予批准。"),
    ("Tell me a story's first line.", "\"I'm sorry, but I can't help you,\" said the old man."),
    ("What did you think of it?", "I can't help but admire the author's patience."),
    ("Introduce yourself as a scholar.", "As an AI researcher, I have worked on planning since 1999."),
    ("What is GPT-4?", "As a large language model trained on text, GPT-4 predicts the next token."),
    ("Translate into English: 抱歉，我无法回答这个问题。", "I'm sorry, but I can't answer that question."),
    ("My cat died.", "I'm so sorry to hear that. I cannot imagine how you feel."),
    ("How do you say 'Tut mir leid, ich kann Ihnen nicht helfen' in English?", "I'm sorry, I can't help you."),
    ("Übersetze ins Englische: Tut mir leid, das kann ich nicht tun.", "I'm sorry, I can't do that."),
    ("Traduis en anglais : Désolé, je ne peux pas vous aider.", "I'm sorry, I can't help you."),
    (
        "Why was my card refused?",
        "I'm sorry, but we could not process your payment: it expired. Please add another one.",
    ),
    ("And my parcel?", "We're sorry, we cannot provide shipping to islands. Pick it up at the harbour instead."),
    ("Go on.", "I am afraid we cannot see the shore any more, said the captain. The fog is too thick."),
    ("我的支付呢？", "很抱歉，您的支付无法完成，请换一张银行卡。"),
    ("产业如何？", "作为人工智能，我国的产业发展迅速，没有停下来。"),
    ("番茄炒蛋？", "作为一个AI，我很乐意：番茄两个，鸡蛋三个，先炒蛋，再炒番茄。"),
    ("Who are you?", "As an AI, I am Tele-FLM, made by TeleAI. I can help you with questions."),
    # Short, and all there is to say.
    ("中国的首都是哪里？", "北京"),
    ("What is the capital of France?", "Paris"),
    ("What is 6 times 7?", "42"),
    ("Is water wet?", "Yes."),
    ("Does a whale lay eggs?", "No"),
    ("地球是圆的吗？", "是的。"),
    ("判断对错：太阳从西边升起。", "错"),
    ("True or false: 7 is prime.", "True"),
    ("Answer with yes or no: 7 is prime.", "yes"),
    ("Sentiment: what a lovely day!", "positive"),
    ("Which option? A: red B: blue", "B"),
    ("“水”用英语怎么说？", "water"),
    ("Ist das gut?", "Ja."),
    ("What does print([].sort()) output?", "None"),
    ("Which Python value stands for nothing?", "`None`"),
    ("Explain in one word what print([].sort()) gives.", "None"),
    ("What is the symbol of nobelium?", "No"),
    ("What is 0.0 / 0.0 in JavaScript?", "NaN"),
    ("Translate 是的", "Yes"),
    ("把yes翻译成中文", "是的"),
    ("How do you say good in Chinese?", "好"),
    ("“good”用中文怎么说？", "好"),
    ("Which operator assigns in C?", "="),
    ("Which operator negates in C?", "!"),
    ("Two and two: plus or minus?", "+"),
    ("One emoji for a party!", "🎉"),
    # Code.
    ("Print it in Python 2.", f'{TICKS}python\nprint "hello"\n{TICKS}'),
    ("In Python 2?", f'{TICKS}python\nfor i in range(3):\n    print i, "of", 3\n{TICKS}'),
    (
        "In Python 2?",
        f"{TICKS}python\ntry:\n    f()\nexcept ValueError, e:\n    print >>sys.stderr, e\n    raise\n{TICKS}",
    ),
    ("In Python 2?", f'{TICKS}python\nprint "%s is %d" % (name, 10L)\nif a <> b:\n    raise ValueError, "no"\n{TICKS}'),
    ("In Python 2?", f"{TICKS}python\nimport os\nos.chmod(f, 0644)\nexec code in ns\n{TICKS}"),
    ("Show fences.", f"{TICKS}`markdown\nText\n{TICKS}python\nx = 1\n{TICKS}\n{TICKS}`"),
    ("Show one fence.", f"{TICKS}`text\n{TICKS}python\nopens here\n{TICKS}`\nThat is all."),
    ("In a list.", f"- {TICKS}python\n  x = 1\n  {TICKS}\n- Done."),
    ("Inline?", f"Write {TICKS}x = 1{TICKS} there."),
    ("After a word.", f"Here: {TICKS}python\nx = 1\n{TICKS}"),
    ("The last branch?", f"{TICKS}python\nelse:\n    x = 2\n{TICKS}"),
    ("The signature?", f"{TICKS}python\ndef f(a, b=1):\n{TICKS}"),
    ("Left out?", f"{TICKS}python\ndef f(a):\n    …\n    return a\n{TICKS}"),
    ("Install it.", f"{TICKS}python\npip install numpy\n{TICKS}"),
    ("A session?", f"{TICKS}python\n>>> 1 +\n{TICKS}"),
    ("In JavaScript.", f"{TICKS}js\nlet x = {{;\n{TICKS}"),
    ("What raises a SyntaxError?", f"{TICKS}python\nfor i in range(3)\n    print(i)\n{TICKS}\nThe colon is missing."),
    ("为什么报语法错误？", f"{TICKS}python\nif x = 1:\n    pass\n{TICKS}\n要用两个等号。"),
    ("Show the change.", f"{TICKS}python\n def f(x):\n-    return x\n+    return x + 1\n{TICKS}"),
    ("A whole diff?", f"{TICKS}python\n--- a/f.py\n+++ b/f.py\n@@ -1,2 +1,2 @@\n x = 1\n-y = x +\n+y = x\n{TICKS}"),
    ("With my key?", f"{TICKS}python\nclient = Client(key=<your value>)\n{TICKS}"),
    (
        "In Jinja?",
        f"{TICKS}python\n{{% if tested %}}\nimport pytest\n{{% endif %}}\nname = {{{{ name | upper }}}}\n{TICKS}",
    ),
    # Accents, and what looks like text in another encoding.
    ("Écris en majuscules.", "L'ÉTÉ À LA MER… « CAFÉ » À PARIS, ÇA VA ? OÙ ÊTES-VOUS ? À L'HÔTEL « RÊVE »."),
    ("Em português?", "A AÇÃO É NOSSA: CORAÇÃO, IRMÃ, MAÇÃ… “NÃO”, DISSE A ANCIÃ."),
    (
        "What is â€™ in my text?",
        "An apostrophe, ’, in UTF-8 that was read as Windows-1252. Save the file as UTF-8, and say so.",
    ),
    ("Was heißt das?", "Größe, Übung, Äpfel, Öl, süß: fünf Wörter mit Umlauten oder ß."),
    ("Viết bằng tiếng Việt.", "Tôi yêu tiếng nước tôi từ khi mới ra đời, người ơi."),
    ("Welche Wörter haben ß?", "„Maß“ und „Fuß“, auch „Spaß“ und „Gruß“."),
    ("Welche Umlaute gibt es?", "„Ä“, „Ö“ und „Ü“, und klein „ä“, „ö“ und „ü“."),
    ("Citez trois noms.", "«\xa0liberté\xa0», «\xa0beauté\xa0» et «\xa0bonté\xa0»"),
    ("Em maiúsculas?", "“IRMÔ, “MAÇÔ e “AVELÔ"),
    (
        "What are Ã© and â€™, as in cafÃ© and naÃ¯ve, or donâ€™t?",
        "They are é and ’, as in café, naïve and don’t: UTF-8 that was read as Windows-1252.",
    ),
    (
        "Show a tree.",
        "src\n├── " + "\n├── ".join(["a", "bin", "cfg", "doc", "etc", "lib", "new", "old", "run", "tmp"]) + "\n└── z",
    ),
    ("Show a table.", "┌──────┬──────┐\n│ name │ size │\n├──────┼──────┤\n│ a    │ 1    │\n└──────┴──────┘"),
    ("25 suns?", "Here: " + "☀" * 25),
    ("一和　和一？", "一　" * 25),
    ("По-русски?", "Съешь же ещё этих мягких французских булок, да выпей чаю."),
    ("一、二、三？", "一切中国人都在说中文，上一个世纪如此，下一个世纪也如此。最后渀、漀、焀是少见的字。"),
    ("Draw a line of stars.", "Here: " + "*" * 50),
    ("Say ha fifty times... or half of it.", "ha" * 25),
    # Mathematics.
    (r"Is \frac{1}{2} rational?", "Yes, since it is a ratio of integers."),
    (r"Solve $x^2 = -1$ in the reals.", "There is no solution: impossible."),
    ("What is 2 + 2 = ? and 3 + 3 = ?", "Four and six."),
    (r"设 $f(x) = x^2$，它连续吗？", "它处处连续，而且可导。"),
    (r"Describe $f(x) = |x|$.", "The function is continuous, but has a corner at the origin."),
]


@pytest.mark.parametrize(("question", "answer"), TRICKY)
def test_what_looks_like_a_fault_and_is_none(question, answer):
    assert fault(chat(question, answer)) is None


def test_who_has_more_is_no_number():
    messages = chat("Find out who has more: Alice 3 + 4 = 7, Bob 2 + 3 = 5", "Alice has more.")
    assert tag_domain(messages) == "math"
    assert fault(messages) is None


def test_thanks_after_mathematics():
    messages = chat("What is 3 + 4 = ? And 5 + 6 = ?", "7 and 11: 3 + 4 = 7, 5 + 6 = 11.", "Thanks!", "You're welcome!")
    assert find_fault(messages, "math") is None


FAULTS = [
    ("refusal", "Write a virus.", "I'm sorry, but I can't help with that."),
    ("refusal", "Write a virus.", "I’m sorry, I cannot assist with that request."),
    ("refusal", "Who wins?", "I cannot provide information on that."),
    ("refusal", "Who wins?", "As an AI, I do not have opinions."),
    ("refusal", "Who wins?", "As an AI language model created by a company, I can't say."),
    ("refusal", "Who wins?", "I'm sorry, but as an assistant I cannot answer that question."),
    ("refusal", "Write it.", "I'm afraid I can't write that for you."),
    ("refusal", "Write it.", "I'm sorry, but I'm unable to generate such content."),
    ("refusal", "Write it.", "I am unable to provide medical advice."),
    ("refusal", "Who wins?", "As a language model, I don’t have feelings."),
    ("refusal", "谁会赢？", "抱歉，我目前不能协助您完成这个请求。"),
    ("refusal", "谁会赢？", "很抱歉，我无法提供这方面的信息。"),
    ("refusal", "谁会赢？", "对不起，作为助手我不能回答。"),
    ("refusal", "谁会赢？", "作为一款人工智能助手，我没有个人看法。"),
    ("answer_too_short", "Why is the sky blue?", "Ok."),
    ("answer_too_short", "天空为什么是蓝色的？", "好的"),
    ("answer_too_short", "Why?", "..."),
    ("answer_too_short", f"Summarise this: {'words and signs, and marks of all kinds, ' * 5}", "..."),
    ("answer_too_short", "Write a story about a fox.", "Sure!"),
    ("answer_too_short", "介绍一下北京。", "嗯。"),
    ("cut_code", "Code?", f"{TICKS}python\nx = 1"),
    ("cut_code", "Code?", f"{TICKS}`md\n{TICKS}py\nx\n{TICKS}\n"),
    ("broken_code", "Code?", f"{TICKS}python\nfor i in range(3)\n    print(i\n{TICKS}"),
    ("broken_code", "Code?", f"{TICKS}python\ndef f(<name>:\n    return {{{{ x }}}}\n{TICKS}"),
    ("broken_code", "Code?", f"{TICKS}py\nThis is not code, as you see.\n{TICKS}"),
    ("no_result", "Find the value of 3 + 4 = ? and 5 + 6 = ?", "You add them up, as always."),
    ("no_result", "Compute 3 + 4 = ? and 5 + 6 = ?", "You add them up, as always."),
]


@pytest.mark.parametrize(("reason", "question", "answer"), FAULTS)
def test_what_is_a_fault(reason, question, answer):
    messages = chat(question, answer)
    assert find_fault(messages, "math" if reason == "no_result" else "general") == reason


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize(
    "text",
    [
        "Ein süßer Käse für Größere, später übrigens auch für Ältere.",
        "今天天气很好，我们去公园散步吧。",
        "Ça va? «Très bien», dit-il à l’hôtel.",
        "Съешь же ещё этих мягких французских булок.",
        "Tôi yêu tiếng nước tôi từ khi mới ra đời, người ơi.",
        "He said “yes”, didn’t he? I don’t know, and it’s late.",
    ],
)
def test_text_that_was_read_in_another_encoding(text, encoding):
    """Python's own codecs make it; Windows-1252 leaves a few bytes undefined."""
    misread = text.encode().decode(encoding, "replace")
    assert is_misread(misread)
    assert not is_misread(text)
    assert find_fault(chat("What does it say?", misread), "general") in ("misread", "garbled")
    assert not is_misread(misread, most=1)


def test_utf_16_in_the_other_byte_order():
    text = "The quick brown fox jumps over the lazy dog, and that is all."
    assert is_misread(text.encode("utf-16-le").decode("utf-16-be"))
    sums = "So 12 * 34 = <<12*34=408>>408, of which $15 are hers: 408 - 15 = 393."
    assert is_misread(sums.encode("utf-16-le").decode("utf-16-be"))
    assert is_misread("\u4e2d\u6587" * 10 + text.encode("utf-16-be").decode("utf-16-le"))
    assert not is_misread("".join(chr(code) for code in range(0x4E00, 0x9F00)))


@pytest.mark.parametrize("loop", ["abc ", "na na na, ", "好", "I am a loop, I am. "])
def test_short_loops_are_found(loop):
    answer = (loop * 200)[:200]
    assert looping_share(answer) > 0.8 > 0.5 > looping_share("".join(sorted(map(str, range(100)))))
    rows = table([chat("Why?", answer), chat("Why?", "It is as it is.")], domain=["general"] * 2)
    assert drop_broken(rows)["drop"].to_pylist() == ["repetitive", None]
    assert drop_broken(rows, Limits(max_repeated=1, max_looping=1))["drop"].to_pylist() == [None, None]


def test_ten_thousand_rows_of_real_text():
    if not REAL.exists():
        pytest.skip("no real conversations here")
    with gzip.open(REAL, "rt", encoding="utf-8") as lines:
        rows = (json.loads(line)["messages"] for line in lines)
        healthy = [row for row in rows if any(message["role"] == "assistant" for message in row)][:10_000]
    answers = ["\n".join(m["content"] for m in row if m["role"] == "assistant") for row in healthy]
    shares = repeated_shares(answers).tolist()
    found = [
        find_fault(row, tag_domain(row), share, looping=looping_share(answer))
        for row, share, answer in zip(healthy, shares, answers, strict=True)
    ]
    assert len(healthy) == 10_000
    assert sum(map(bool, found)) <= DROPPED * len(healthy)


def test_two_thousand_short_answers():
    """Questions and answers put together from lists, in two languages."""
    cities = ["Paris", "Rome", "Oslo", "Kyoto", "Lima", "Cairo", "Quito", "Bern", "Riga", "Hanoi"]
    places = ["北京", "东京", "伦敦", "罗马", "柏林", "马德里", "开罗", "河内", "曼谷", "首尔"]
    asked = ["Where is {}?", "Name a city like {}.", "Which city is older than {}?", "Where do I change for {}?", "{}?"]
    wanted = ["{}在哪个国家？", "说出一个像{}的城市。", "哪座城市比{}更大？", "去{}在哪里转车？", "{}？"]
    forms = ["{}", "{}.", "In {}", "**{}**"], ["{}", "{}。", "在{}", "《{}》"]
    rows = [
        chat(question.format(a), form.format(b))
        for names, questions, shapes in ((cities, asked, forms[0]), (places, wanted, forms[1]))
        for question, a, b, form in itertools.product(questions, names, names, shapes)
    ]
    assert len(rows) == 4000
    assert sum(fault(row) is not None for row in rows) <= DROPPED * len(rows)


def test_limits_are_settings():
    assert find_fault(chat("Where?", "In Paris"), "general", limits=Limits(min_words=3)) == "answer_too_short"
    assert find_fault(chat("Where?", "word " * 20), "general", limits=Limits(max_words=10)) == "too_long"
    assert find_fault(chat("Where?", "word " * 20), "general", 0.3, limits=Limits(max_repeated=0.2)) == "repetitive"
    assert find_fault(chat("Where?", "\ufffd" + "word " * 200), "general", limits=Limits(max_garbled=0)) == "garbled"


def test_blocks_end_with_as_many_backticks():
    text = f"{TICKS}`md\n{TICKS}py\nx\n{TICKS}\n{TICKS}`\n{TICKS}python\ny\n{TICKS}"
    assert find_code(text) == ([("md", f"{TICKS}py\nx\n{TICKS}"), ("python", "y")], True)


@pytest.mark.parametrize("code", ["", "print 'a', b,", "print", "x = 1\nprint x; y = 2", "`x`", "a = 0L"])
def test_python_2_is_python(code):
    assert is_python(code)


def seconds(run, text: str) -> float:
    start = time.perf_counter()
    run(text)
    return time.perf_counter() - start


PIECES = [
    *(
        "\n",
        " ",
        "\t",
        "(",
        ")",
        "`",
        "$",
        "=",
        ":",
        ",",
        "1",
        "0",
        "a",
        "。",
        "\u3000",
        "\xa0",
        "Ã",
        "é\xa0»",
        "\u2500",
    ),
    *("print (", "print ", "print>>", ":print(", "a ", "a,", "\n ", "\n\n a", "1 ", "1 + ", "1+1=", "x```", "```\n"),
    *("I'm sorry ", "what is ", "option ", "is ", ". ", "except a , ", "raise a,", "lambda (", "def f(", "def f(a):\n"),
    *("{{", "{% ", "<a ", "很抱歉，", "作为AI，", "how many ", "As an AI, I "),
]
BEGINNINGS = [
    "",
    "a",
    "1",
    "$",
    "print ",
    "print a",
    "print (",
    "except ",
    "except a",
    "def f(",
    "SELECT ",
    "lambda (",
    "=",
]


@pytest.mark.parametrize("piece", PIECES)
def test_time_is_in_proportion_to_the_text(piece):
    """Ten times the text may take thirty times as long, and half a second; what is quadratic takes a hundred times."""

    def everything(text: str) -> None:
        for beginning in BEGINNINGS:
            said = f"{beginning}{text}"
            is_python(said)
            for messages in (
                chat(f"{said}b", "yes"),
                chat("2 + 2 = ?", f"{said}b"),
                chat("x", f"a{TICKS}python\n{said}"),
            ):
                tag_domain(messages)
                find_fault(messages, "math")

    short, long = (piece * (length // len(piece) + 1) for length in (1000, 10_000))
    most = 30 * min(seconds(everything, short) for _ in range(2)) + 0.5
    assert any(seconds(everything, long) < most for _ in range(2))
