# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm chat`."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teleflm.terminal import EXIT_INTERRUPTED, Debug, Seed, exit_codes, json_text, steers_terminal

if TYPE_CHECKING:
    from evaluation.conversation import Answer, Conversation

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub folder, or OWNER/NAME on the Hub.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")]
Adapter = Annotated[Path | None, typer.Option(metavar="FOLDER", help="An adapter (peft) for the model.")]
MaxNewTokens = Annotated[int, typer.Option(help="Of an answer.")]
Temperature = Annotated[
    float | None, typer.Option(help="0 takes the likeliest token; as generation_config.json says, unless given.")
]
TopP = Annotated[float | None, typer.Option("--top-p", help="Share of the likelihood to choose from.")]
Completion = Annotated[bool, typer.Option("--completion", help="Continue each text, without a chat template.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: auto (as they are), bfloat16, float16 or float32.")]
Json = Annotated[bool, typer.Option("--json", help="Print each answer as one line of JSON.")]

_COMMANDS = {"/reset": "forget", "/exit": "leave"}
_LONGEST = 1 << 24  # characters of a line from a pipe


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
    Where the conversation and the room of an answer exceed the window, its oldest turns are forgotten, which is said.
    From a pipe, each line is a turn, and only answers are printed.
    """
    with exit_codes(debug=debug):
        _require_streams()
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


def _require_streams() -> None:
    for name in ("stdin", "stdout"):
        if getattr(sys, name) is None:  # whoever started this has closed it
            raise ValueError(f"{name}: is closed; a conversation needs both stdin and stdout.")


def _talk(conversation: "Conversation", as_json: bool) -> None:
    from evaluation.conversation import TooLong

    is_terminal = sys.stdin.isatty()
    if is_terminal:
        kind, device = str(conversation.model.dtype).removeprefix("torch."), conversation.model.device.type
        _say(f"{kind} on {device}, window {conversation.window}. /reset forgets, /exit leaves.")
    for note in conversation.notes:
        _say(note)
    for line in _lines(is_terminal):
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
            continue
        if line.startswith("/") and is_terminal and " " not in line:
            _say(f"{_shown(line)} is no command; there are {', '.join(_COMMANDS)}.")
            continue
        try:
            with _stoppable(is_terminal) as is_stopped:
                answer = conversation.answer(line, (lambda piece: None) if as_json else _show, is_stopped)
        except TooLong as error:
            if not is_terminal:
                raise
            _say(str(error))
            continue
        _finish(conversation, line, answer, is_terminal, as_json)


def _lines(is_terminal: bool) -> Iterator[str]:
    """What the user says, line by line; blank lines are nothing."""
    while True:
        try:
            line = input("> ") if is_terminal and sys.stdout.isatty() else sys.stdin.readline(_LONGEST + 1)
            line.encode()  # in a C locale, bytes that are no text come as halves of surrogate pairs
        except EOFError:  # Ctrl-D
            print(file=sys.stderr)
            return
        except UnicodeError:
            raise ValueError(_not_decoded(sys.stdin.encoding)) from None
        except BrokenPipeError:  # of the prompt
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), "stdin") from None
        if len(line) > _LONGEST:
            raise ValueError(f"stdin: has a line of more than {_LONGEST} characters; shorten it.")
        if not line and not (is_terminal and sys.stdout.isatty()):
            return
        if line.strip():
            yield line.strip("\r\n") if not line.strip().startswith("/") else line.strip()


def _not_decoded(encoding: str) -> str:
    """What is wrong with input that cannot be decoded: it, or the encoding that it is said to have."""
    if encoding.lower().replace("-", "").replace("_", "") == "utf8":
        return "stdin: is not UTF-8; convert it."
    return (
        f"stdin: is not {encoding}, which the locale or PYTHONIOENCODING says that it is; convert it, or if it is "
        "UTF-8, set PYTHONIOENCODING=utf-8."
    )


def _show(piece: str) -> None:
    print(_shown(piece) if sys.stdout.isatty() else piece, end="", flush=True)


def _shown(text: str) -> str:
    """A text as a terminal shows it: what it would obey is written out, all else is text."""
    return "".join(repr(c)[1:-1] if steers_terminal(c) and c not in "\n\t" else c for c in text)


def _finish(conversation: "Conversation", line: str, answer: "Answer", is_terminal: bool, as_json: bool) -> None:
    if as_json:
        said = {"question": line, "answer": answer.text, "tokens": answer.tokens, "stop": answer.stop}
        said |= {"seconds": round(answer.seconds, 3), "forgotten_turns": answer.forgotten}
        print(json_text(said), flush=True)
    else:
        print(flush=True)
    if answer.forgotten:
        turns = "turn is" if answer.forgotten == 1 else f"{answer.forgotten} turns are"
        _say(
            f"The oldest {turns} forgotten, and the model has not seen what was said there: with more, less than "
            f"{conversation.room} tokens of the window of {conversation.window} were left for the answer."
        )
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
