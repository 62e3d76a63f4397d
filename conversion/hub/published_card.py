# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The card that is published: the facts as they are now, and the words of its owner, here or on the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from ..checkpoint.errors import CheckpointError
from .card import CardFacts, render_card
from .card_check import check_card
from .card_merge import has_owners_text, merge_cards
from .client import one_line
from .front_matter import parse_metadata, split_card
from .results import Result

Words: TypeAlias = Literal["here", "there"]
WORDS = get_args(Words)
_JOINED = ("tags", "model-index")


@dataclass(frozen=True)
class CardOptions:
    """What whoever publishes says of a model, beside its facts.

    Args:
        license: identifier of the Hub's; that of the card or of LICENSE unless given.
        languages: codes, such as `en` and `zh`.
        base_models: ids on the Hub.
        relation: to them, one of the Hub's: `finetune`, `adapter`, `merge`, `quantized`.
        datasets: ids on the Hub.
        results: of evaluations.
        words: whose words count where the folder's card and the repository's both have some: `here` or `there`.
    """

    license: str | None = None
    languages: Sequence[str] = ()
    base_models: Sequence[str] = ()
    relation: str | None = None
    datasets: Sequence[str] = ()
    results: Sequence[Result] = ()
    words: Words | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """What of it is metadata of the card."""
        said = {"license": self.license, "language": list(self.languages), "datasets": list(self.datasets)}
        return {name: value for name, value in said.items() if value}


def published_card(facts: CardFacts, here: str, there: str | None, options: CardOptions, where: str) -> str:
    """The card to publish.

    Args:
        facts: of the model, with its name on the Hub.
        here: the card in the folder.
        there: the card in the repository; None if it has none.
        options: what else is said.
        where: the folder, for messages.

    Raises:
        CheckpointError: both cards have words of their owner's, and other ones; or the Hub would not take the result.
    """
    if options.words not in (None, *WORDS):
        raise CheckpointError(f"--card is {options.words}, expected {' or '.join(WORDS)}.")
    facts = replace(facts, metadata={**facts.metadata, **options.metadata}, results=tuple(options.results))
    if options.base_models:
        facts = replace(facts, base_models=tuple(options.base_models), relation=options.relation)
    facts = replace(facts, base_models=tuple(name for name in facts.base_models if name != facts.repo_id))
    fresh, certain = render_card(facts), (*facts.certain, *options.metadata)
    kept = merge_cards(fresh, here, certain)
    if there is not None and options.words != "here":
        kept = _with_words_of(fresh, here, there, certain, options.words, where)
    problems = check_card(kept)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        hint = " Or give --license." if "license is missing" in problems[0] else ""
        raise CheckpointError(f"{where}/{problems[0]}{more}{hint}")
    return kept


def _with_words_of(fresh: str, here: str, there: str, certain: Sequence[str], words: Words | None, where: str) -> str:
    """The facts with the words and the metadata of the repository's card, and with those of the folder's if it alone
    has some."""
    kept, other = merge_cards(fresh, here, certain), merge_cards(fresh, there, certain)
    if words == "there" or kept == other:
        return other
    said, also = (parse_metadata(split_card(card)[0]) for card in (here, there))
    differing = [key for key in said if key in also and said[key] != also[key] and key not in (*certain, *_JOINED)]
    have_words = has_owners_text(here) and has_owners_text(there) and split_card(kept)[1] != split_card(other)[1]
    if have_words or differing:
        what = "words of its own" if have_words else f"another {differing[0]}"
        raise CheckpointError(
            f"{where}/README.md: has {what}, and the README.md of the repository other ones; --card here publishes the "
            "folder's, --card there keeps the repository's."
        )
    if has_owners_text(here):
        return f"---\n{(split_card(other)[0] or '').rstrip()}\n---\n{split_card(kept)[1]}"
    return other


def validate_card(card: str, repo_id: str) -> None:
    """Ask the Hub whether it takes a card.

    Raises:
        CheckpointError: it does not; the message is its own.
        HubFailed: it cannot be asked.
    """
    from huggingface_hub import ModelCard

    with one_line(repo_id):
        try:
            ModelCard(card, ignore_metadata_errors=False).validate(repo_type="model")
        except ValueError as error:
            said = " ".join(str(error).replace("- Error:", "").split())[:300]
            raise CheckpointError(f"{repo_id}: the Hub would not take README.md: {said}") from None


def card_text(content: bytes, where: str) -> str:
    """A card as text.

    Raises:
        CheckpointError: it is none.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: byte {error.start} is no UTF-8; save it as UTF-8.") from None


__all__ = ["WORDS", "CardOptions", "Words", "card_text", "published_card", "validate_card"]
