# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the Hub would refuse or not understand of a card, as far as it can be told without asking it."""

import re
from collections.abc import Mapping
from typing import Any

from ..checkpoint.errors import CheckpointError, printable
from .card_merge import broken_marks
from .front_matter import parse_metadata, split_card

RELATIONS = ("adapter", "finetune", "merge", "quantized")
# Identifiers of https://huggingface.co/docs/hub/repositories-licenses.
_IDENTIFIERS = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
    mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 open-mdw openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql
    unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(_IDENTIFIERS.split())
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
# What begins like the places where people keep models. A URL has a letter, a colon or a slash before it.
_LOCAL_PATHS = re.compile(
    r"(?<![\w/:.~-])/(?:home|root|Users|tmp|mnt|data|scratch|workspace|work|var|opt|media|gpfs|lustre|nfs)/[\w.-]+"
    r"|(?<![\w/])~/[\w.-]+|\b[A-Za-z]:\\[\w.-]+|(?<![\w\\])\\\\[\w.-]+\\[\w.-]+|\bfile://\S+"
)
_MAX_NAMED = 3


def check_card(text: str) -> list[str]:
    """What is wrong with a card, a line each; nothing if the Hub should take it.

    The Hub has the last word (`huggingface_hub.ModelCard.validate` asks it), and its list of licences grows.

    Args:
        text: of the README.md.
    """
    block, _ = split_card(text.removeprefix("\ufeff"))
    problems = [
        f"README.md: {name} is marked by teleflm:begin or teleflm:end alone, or out of order; its text is never "
        "renewed. Take the marks out, or put them right."
        for name in broken_marks(text)
    ]
    problems += _local_paths(text)
    if block is None:
        return [*problems, "README.md: has no metadata between two lines of ---; the Hub shows no licence without it."]
    try:
        metadata = parse_metadata(block)
    except CheckpointError as error:
        return [*problems, str(error)]
    for check in (_license, _language, _bases, _datasets, _texts, _model_index):
        problems += [f"README.md: {problem}" for problem in check(metadata)]
    return problems


def _local_paths(text: str) -> list[str]:
    found = list(dict.fromkeys(match[0] for match in _LOCAL_PATHS.finditer(text)))
    named = ", ".join(printable(path)[:100] for path in found[:_MAX_NAMED])
    more = f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
    return [f"README.md: names a folder of a machine ({named}{more}); readers have no such folder."] if found else []


def _license(metadata: Mapping[str, Any]) -> list[str]:
    said = metadata.get("license")
    if said is None or said == []:
        return ["license is missing: nobody may use a model whose terms are unknown; name it, or add a LICENSE."]
    names = said if isinstance(said, list) else [said]
    problems = [
        f"license is {_show(name)}, no identifier of the Hub's; write other, with license_name and license_link."
        for name in names
        if not (isinstance(name, str) and name in LICENSES)
    ]
    if "other" in names and not isinstance(metadata.get("license_name"), str):
        problems.append("license is other, and license_name is missing; name it, and add its text as LICENSE.")
    return problems


def _language(metadata: Mapping[str, Any]) -> list[str]:
    return [
        f"language is {_show(code)}, expected codes of ISO 639 (en, zh; in quotes where YAML reads it as no), code or "
        "multilingual."
        for code in _listed(metadata.get("language"))
        if not (isinstance(code, str) and _LANGUAGE.fullmatch(code))
    ]


def _bases(metadata: Mapping[str, Any]) -> list[str]:
    relation = metadata.get("base_model_relation")
    problems = [
        f"base_model is {_show(name)}, expected the id of a model on the Hub, or a list of some."
        for name in _listed(metadata.get("base_model"))
        if not _is_id(name)
    ]
    if relation is not None and relation not in RELATIONS:
        problems.append(f"base_model_relation is {_show(relation)}, expected one of {', '.join(RELATIONS)}.")
    if relation is not None and metadata.get("base_model") is None:
        problems.append(f"base_model_relation is {_show(relation)}, and base_model is missing.")
    return problems


def _datasets(metadata: Mapping[str, Any]) -> list[str]:
    return [
        f"datasets has {_show(name)}, expected ids of datasets on the Hub."
        for name in _listed(metadata.get("datasets"))
        if not _is_id(name)
    ]


def _texts(metadata: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} is {_show(metadata[key])}, expected a text."
        for key in ("library_name", "pipeline_tag", "license_name", "license_link")
        if metadata.get(key) is not None and not isinstance(metadata[key], str)
    ] + [f"tags has {_show(tag)}, expected texts." for tag in _listed(metadata.get("tags")) if not isinstance(tag, str)]


def _model_index(metadata: Mapping[str, Any]) -> list[str]:
    index = metadata.get("model-index")
    if index is None:
        return []
    from huggingface_hub.repocard_data import model_index_to_eval_results

    try:
        model_index_to_eval_results(index)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        return [f"model-index is not of the Hub's form ({said}); take it out, or give --results."]
    return []


def _is_id(name: Any) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _show(value: Any) -> str:
    return printable(repr(value))[:80]


__all__ = ["LICENSES", "RELATIONS", "check_card"]
