# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm chat`."""

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teleflm.terminal import EXIT_INTERRUPTED, Debug, Seed, exit_codes

if TYPE_CHECKING:
    from evaluation.conversation import Answer, Conversation

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub folder, or OWNER/NAME on the Hub.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")]
Adapter = Annotated[Path | None, typer.Option(metavar="FOLDER", help="An adapter (peft) for the model.")]
MaxNewTokens = Annotated[int, typer.Option(help="Of an answer.", min=1)]
Temperature = Annotated[
    float | None, typer.Option(help="0 takes the likeliest token; as generation_config.json says, unless given.", min=0)
]
TopP = Annotated[float | None, typer.Option("--top-p", help="Share of the likelihood to choose from.")]
Completion = Annotated[bool, typer.Option("--completion", help="Continue each text, without a chat template.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: auto (as they are), bfloat16, float16 or float32.")]
Json = Annotated[bool, typer.Option("--json", help="Print each answer as one line of JSON.")]

_COMMANDS = {"/reset": "forget", "/exit": "leave"}


def chat(
    model: Model,
    system: System = None,
    adapter: Adapter = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    completion: Completion = False,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Talk to a model in the terminal.

    /reset forgets the conversation, /exit leaves. Ctrl-C ends an answer; a second one, or one before it begins, leaves.
    Where the conversation exceeds the window, its oldest turns are forgotten, which is said. From a pipe, each line is
    a turn, and only answers are printed.
    """
    with exit_codes(debug=debug):
        from evaluation.conversation import Sampling, open_conversation

        try:
            conversation = open_conversation(
                model,
                adapter=adapter,
                system=system,
                completion=completion,
                sampling=Sampling(temperature, top_p, max_new_tokens),
                dtype=dtype,
                seed=seed,
            )
            with _quiet():
                _talk(conversation, as_json)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:  # whoever reads the answers has enough of them
            raise typer.Exit from None


def _talk(conversation: "Conversation", as_json: bool) -> None:
    from evaluation.conversation import TooLong

    is_terminal = sys.stdin.isatty()
    if is_terminal:
        kind, device = str(conversation.model.dtype).removeprefix("torch."), conversation.model.device.type
        _say(f"{kind} on {device}, window {conversation.window}. /reset forgets, /exit leaves.")
    for line in _lines(is_terminal):
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
            continue
        if line.startswith("/") and is_terminal and " " not in line:
            _say(f"{line} is no command; there are {', '.join(_COMMANDS)}.")
            continue
        try:
            with _stoppable(is_terminal) as is_stopped:
                answer = conversation.answer(line, (lambda piece: None) if as_json else _show, is_stopped)
        except TooLong as error:
            if not is_terminal:
                raise
            _say(str(error))
            continue
        _finish(line, answer, is_terminal, as_json)


def _lines(is_terminal: bool) -> Iterator[str]:
    """What the user says, line by line; blank lines are nothing."""
    while True:
        try:
            line = input("> ") if is_terminal and sys.stdout.isatty() else sys.stdin.readline()
            line.encode()  # in a C locale, bytes that are no text come as halves of surrogate pairs
        except EOFError:  # Ctrl-D
            print(file=sys.stderr)
            return
        except UnicodeError:
            raise ValueError("stdin: is not UTF-8; convert it.") from None
        if not line and not (is_terminal and sys.stdout.isatty()):
            return
        if line.strip():
            yield line.strip("\r\n") if not line.strip().startswith("/") else line.strip()


def _show(piece: str) -> None:
    if sys.stdout.isatty():  # what would command a terminal is not for it
        piece = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in piece)
    print(piece, end="", flush=True)


def _finish(line: str, answer: "Answer", is_terminal: bool, as_json: bool) -> None:
    if as_json:
        said = {"question": line, "answer": answer.text, "tokens": answer.tokens, "stop": answer.stop}
        said |= {"seconds": round(answer.seconds, 3), "forgotten_turns": answer.forgotten}
        is_unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
        print(json.dumps(said, ensure_ascii=not is_unicode), flush=True)
    else:
        print(flush=True)
    if answer.forgotten:
        turns = "turn no longer fits" if answer.forgotten == 1 else f"{answer.forgotten} turns no longer fit"
        _say(f"The oldest {turns} into the window, and the model has not seen them.")
    if is_terminal:
        ended = {"end": "", "length": ", cut off at its length", "interrupted": ", interrupted"}[answer.stop]
        _say(f"{answer.tokens} tokens, {answer.tokens_per_second:.1f} tokens/s{ended}")


def _say(note: str) -> None:
    from teleflm.terminal import make_console

    make_console(stderr=True).print(note, style="dim")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what transformers would say from between the answers."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _stoppable(is_terminal: bool) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C end an answer, and the second the program.

    Yields:
        A function that says whether the answer is to end.
    """
    stopped = threading.Event()
    if not is_terminal or threading.current_thread() is not threading.main_thread():
        yield stopped.is_set
        return

    def stop(number: int, frame: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped.is_set
    finally:
        signal.signal(signal.SIGINT, before)


__all__ = ["chat"]
