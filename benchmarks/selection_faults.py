# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What becomes of planted faults, operator by operator, in a selection of a tenth. Nothing is trained.

    python benchmarks/selection_faults.py [--rows 100000] [--folder DIR]

Two pools: English composed of sentences of real conversations (conversations.py), Chinese composed of phrases about
twelve subjects (tests/sft/selection/pools.py). One row in a hundred is damaged in each way. The command is the one that
users have, with `--rejects`; each row carries the name of its fault in a field that selection does not read.
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from conversations import Messages, make_conversation, read_pool
from measure import TELEFLM, arguments, console, report, run_processes, workplace

from tests.sft.selection.pools import NOISE, chinese_pool

EACH = 0.01  # of the rows, of each fault
SELECTED = 0.1
ALL_MESSAGES = ("word salad", "base64", "keyboard mash", "mojibake")
UNDAMAGED = "undamaged"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    options = parser.parse_args()
    pools: dict[str, Callable[[int], list[Messages]]] = {"English": compose_english, "Chinese": chinese_pool}
    table = []
    with workplace(options.folder) as place:
        for name, compose in pools.items():
            rows, faults = plant(compose(options.rows))
            data, out = place / f"{name}.jsonl", place / name
            with data.open("w", encoding="utf-8") as file:
                for messages, fault in zip(rows, faults, strict=True):
                    file.write(json.dumps({"messages": messages, "fault": fault}, ensure_ascii=False) + "\n")
            count = str(round(SELECTED * len(rows)))
            run = run_processes([*TELEFLM, "sft", "select", str(data), str(out), "-n", count, "--rejects"])
            console.print(f"{name}: {run.seconds:.0f} s", style="dim")
            table += [[name, *row] for row in fates(faults, out, int(count))]
    about = (
        f"{options.rows:,} rows a pool, one in a hundred with each fault; a tenth is selected by the default pipeline."
    )
    columns = (
        "pool",
        "fault",
        "present",
        "dropped before the choice, by",
        "left",
        "selected",
        "of all",
        "of those left",
    )
    report("Selection: planted faults, operator by operator", options.folder, about, columns, table)


def compose_english(rows: int) -> list[Messages]:
    """Conversations that no two of are alike."""
    pool, draw = read_pool(), random.Random(0)
    return [make_conversation(pool, draw) for _ in range(rows)]


def plant(pool: Sequence[Messages]) -> tuple[list[Messages], list[str]]:
    """The pool with faults, and the fault of each row."""
    draw, rows, faults = random.Random(1), list(pool), [UNDAMAGED] * len(pool)
    each = round(EACH * len(pool))
    places = iter(draw.sample(range(len(pool)), each * (len(NOISE) + len(OTHERS))))
    for fault, damage in NOISE.items():
        for place in (next(places) for _ in range(each)):
            first = 0 if fault in ALL_MESSAGES else len(pool[place]) - 1
            damaged = [{**said, "content": damage(said["content"], pool, draw)} for said in pool[place][first:]]
            rows[place], faults[place] = [*pool[place][:first], *damaged], fault
    for fault, change in OTHERS.items():
        for place in (next(places) for _ in range(each)):
            rows[place], faults[place] = change(pool[place], pool, draw), fault
    return rows, faults


def _answer(messages: Messages, content: str) -> Messages:
    return [*messages[:-1], {**messages[-1], "content": content}]


def _is_chinese(messages: Messages) -> bool:
    return not messages[0]["content"].isascii() and any("\u4e00" <= c <= "\u9fff" for c in messages[0]["content"])


def _copy(messages: Messages, pool: Sequence[Messages], draw: random.Random) -> Messages:
    return draw.choice(pool)


def _near_copy(messages: Messages, pool: Sequence[Messages], draw: random.Random) -> Messages:
    """Another row, its answer cut by a twentieth."""
    other = draw.choice(pool)
    content = other[-1]["content"]
    return _answer(other, content[: len(content) - max(1, len(content) // 20)])


def _refusal(messages: Messages, pool: Sequence[Messages], draw: random.Random) -> Messages:
    said = "很抱歉，我无法回答这个问题。" if _is_chinese(messages) else "I'm sorry, but I can't assist with that."
    return _answer(messages, said)


def _filler(messages: Messages, pool: Sequence[Messages], draw: random.Random) -> Messages:
    return _answer(messages, "...")


def _cut_code(messages: Messages, pool: Sequence[Messages], draw: random.Random) -> Messages:
    return _answer(messages, f"{messages[-1]['content']}\n\n```python\nfor x in range(3):\n    print(")


def _broken_code(messages: Messages, pool: Sequence[Messages], draw: random.Random) -> Messages:
    return _answer(messages, f"{messages[-1]['content']}\n\n```python\nfor x in range(3)\n    print(x))\n```\n")


OTHERS: dict[str, Callable[[Messages, Sequence[Messages], random.Random], Messages]] = {
    "copy of another row": _copy,
    "near copy of another row": _near_copy,
    "refusal": _refusal,
    "no word": _filler,
    "code cut off": _cut_code,
    "code that does not parse": _broken_code,
}


def fates(faults: Sequence[str], out: Path, count: int) -> Iterator[list[str]]:
    """A row of the table for each fault, from what the command wrote."""
    present = Counter(faults)
    dropped = {fault: Counter[str]() for fault in present}
    for line in (out / "rejects.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        if row["teleflm_reason"] != "not_selected":
            dropped[row["fault"]][f"{row['teleflm_operator']} ({row['teleflm_reason']})"] += 1
    selected = Counter(json.loads(line)["fault"] for line in (out / "selected.jsonl").open(encoding="utf-8"))
    left = {fault: present[fault] - dropped[fault].total() for fault in present}
    rate = count / sum(left.values())
    for fault in (*NOISE, *OTHERS, UNDAMAGED):
        by = ", ".join(f"{operator} {number:,}" for operator, number in dropped[fault].most_common(3)) or "none"
        share = selected[fault] / left[fault] / rate if left[fault] else 0.0
        yield [
            fault,
            f"{present[fault]:,}",
            by,
            f"{left[fault]:,}",
            f"{selected[fault]:,}",
            f"{selected[fault] / present[fault] / SELECTED:.2f}",
            f"{share:.2f}" if left[fault] else "-",
        ]


if __name__ == "__main__":
    main()
