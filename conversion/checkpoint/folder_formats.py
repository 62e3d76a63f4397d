# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Under which names a checkpoint lies in a folder, a `FolderFormat` for each kind of checkpoint.

What may lie in an output folder is not only what we write: weights of any format that would be loaded in place of
ours, or together with them, have to be seen before anything is written. The module of a format declares its names with
`register`; the engine asks for them all and knows none. The Hub's, which every folder of ours may meet, are here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .sources import WEIGHT_FILES

# Files beside the weights that decide how transformers, and what else reads its folders, loads them.
_HUB_SETTINGS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",  # an adapter is loaded on top of the weights
    # tokenizers, of every kind that transformers has
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "encoder.json",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "byte_maps.json",
    "entity_vocab.json",
    "word_shape.json",
    "word_pronunciation.json",
    "normalizer.json",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "vocab-src.json",
    "vocab-tgt.json",
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
    # chat templates
    "chat_template.jinja",
    "chat_template.json",
    # processors of other inputs
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
_TEMPLATES = "additional_chat_templates"
_CODE = "custom_generate"  # executed by transformers, if its user trusts the folder


@dataclass(frozen=True)
class FolderFormat:
    """The names of one kind of checkpoint.

    Args:
        name: of the format, for messages.
        loadable: files whose presence makes a folder load as one, in the order in which loaders look.
        weights: the path of every file, below the folder, that holds weights or says where they are: what
            `--overwrite` removes whoever wrote it.
        folders: glob patterns of the folders in which its files lie beside the folder itself, the deepest first.
        settings: the path of every other file that decides how the folder loads, and of every folder of such, which
            may be a link to a folder that lies elsewhere.
        states: the path of every file that is loaded with the weights when training goes on. One that no record lists
            is somebody's own: it is never removed, and named.
        steps: the path, below the folder, of folders whose files belong to the checkpoint that it is: a folder is
            never overwritten by what is made of them.
    """

    name: str
    loadable: tuple[str, ...]
    weights: re.Pattern[str]
    folders: tuple[str, ...] = ()
    settings: re.Pattern[str] | None = None
    states: re.Pattern[str] | None = None
    steps: re.Pattern[str] | None = None


HUB = FolderFormat(
    "Hub folder",
    loadable=WEIGHT_FILES,
    weights=re.compile(
        r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|adapter_model\.(safetensors|bin)"
    ),
    folders=(_TEMPLATES, _CODE),
    settings=re.compile(
        "|".join(map(re.escape, _HUB_SETTINGS)) + rf"|{_TEMPLATES}(/[^/]+\.jinja)?|{_CODE}(/generate\.py)?"
    ),
    states=re.compile(r"optimizer\.pt"),
    steps=re.compile(r"\."),
)

_known: dict[str, FolderFormat] = {HUB.name: HUB}


def register(format: FolderFormat) -> FolderFormat:
    """Make the names of a format known; whoever reads or writes it does so when it is imported."""
    _known[format.name] = format
    return format


def known_formats() -> tuple[FolderFormat, ...]:
    """Every format that is known."""
    return tuple(_known.values())


def loadable_files() -> tuple[str, ...]:
    """Files whose presence makes a folder load as something."""
    return tuple(name for format in known_formats() for name in format.loadable)


def is_weights(path: str) -> bool:
    """Whether a path below a folder is that of weights, of any format."""
    return any(format.weights.fullmatch(path) for format in known_formats())


def is_setting(path: str) -> bool:
    """Whether a path below a folder is that of a file which decides how the folder loads, beside its weights."""
    return any(format.settings.fullmatch(path) for format in known_formats() if format.settings)


def is_state(path: str) -> bool:
    """Whether a path below a folder is that of what training loads with the weights, as an optimizer's moments."""
    return any(format.states.fullmatch(path) for format in known_formats() if format.states)


def is_step(path: str) -> bool:
    """Whether a path below a folder is that of a part of the checkpoint that the folder is."""
    return any(format.steps.fullmatch(path) for format in known_formats() if format.steps)


def known_files(folder: Path) -> Iterator[str]:
    """The path of every file of a folder that lies where some format has files, whatever it is.

    A link to a folder is one too, as loaders follow it; a file in the place of such a folder is nothing to them.
    """
    folders = {pattern for format in known_formats() for pattern in format.folders}
    for place in (folder, *format_folders(folder)):
        for entry in sorted(place.iterdir()):
            path = entry.relative_to(folder)
            if entry.is_symlink() if entry.is_dir() else not any(map(path.match, folders)):
                yield path.as_posix()


def format_folders(folder: Path) -> Iterator[Path]:
    """The folders below one in which some format has files, the deepest first; none is a link."""
    for format in known_formats():
        for pattern in format.folders:
            yield from sorted(path for path in folder.glob(pattern) if path.is_dir() and not path.is_symlink())
