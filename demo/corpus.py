# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Real text that every machine with Python has: the documentation of the language and of its standard library.

The same Python gives the same corpus, whatever the machine.
"""

import importlib
import inspect
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data import topics
from types import ModuleType
from typing import Any

# Named one by one, because importing some of the others opens a window (turtle) or a browser (antigravity).
MODULES = """
    abc argparse array ast asyncio base64 bisect builtins bz2 calendar cmath cmd code codecs collections collections.abc
    colorsys concurrent.futures configparser contextlib contextvars copy csv ctypes dataclasses datetime decimal difflib
    dis doctest email.header email.message email.parser email.policy email.utils enum errno filecmp fileinput fnmatch
    fractions ftplib functools gc getopt getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser http
    http.client http.cookiejar http.cookies http.server imaplib importlib importlib.metadata importlib.resources
    importlib.util inspect io ipaddress itertools json keyword linecache locale logging logging.config logging.handlers
    lzma mailbox marshal math mimetypes mmap multiprocessing multiprocessing.pool netrc numbers operator optparse os
    os.path pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint profile pstats pyclbr pydoc queue
    quopri random re reprlib runpy sched secrets select selectors shelve shlex shutil signal smtplib socket socketserver
    sqlite3 ssl stat statistics string struct subprocess symtable sys sysconfig tarfile tempfile textwrap threading time
    timeit token tokenize trace traceback tracemalloc types typing unicodedata unittest unittest.mock urllib.error
    urllib.parse urllib.request urllib.robotparser uuid venv warnings wave weakref webbrowser wsgiref.headers
    wsgiref.util xml.dom.minidom xml.etree.ElementTree xml.sax xml.sax.handler xmlrpc.client xmlrpc.server zipapp
    zipfile zipimport zlib zoneinfo
"""

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Entry:
    """Something the standard library documents.

    Args:
        name: dotted, as a user would import it.
        kind: `module`, `class`, `function` or `method`.
        doc: its docstring.
        signature: its parameters in parentheses, where Python knows them.
        methods: the public methods of a class.
    """

    name: str
    kind: str
    doc: str
    signature: str | None = None
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """Texts to pretrain on, conversations to fine-tune on, and of each some on names that are kept from both.

    Names are held out, not sentences: of Python 3.11's 215 held-out answers, 17 stand word for word in another text.
    """

    texts: list[str]
    heldout_texts: list[str]
    conversations: list[Messages]
    heldout_conversations: list[Messages]


def collect() -> Corpus:
    """The whole corpus: about 1.5 million characters of text and 4,000 conversations."""
    entries = list(_entries())
    texts = {f"topic {name}": text for name, text in topics.topics.items()}
    texts |= {entry.name: _as_help(entry) for entry in entries}
    return Corpus(
        texts=[text for name, text in texts.items() if not is_heldout(name)],
        heldout_texts=[text for name, text in texts.items() if is_heldout(name)],
        conversations=[_as_conversation(entry) for entry in entries if not is_heldout(entry.name)],
        heldout_conversations=[_as_conversation(entry) for entry in entries if is_heldout(entry.name)],
    )


def is_heldout(name: str) -> bool:
    """Whether what is said of this name is kept from training: one name in twenty."""
    return zlib.crc32(name.encode()) % 20 == 0


# --- what the standard library documents ------------------------------------------------------------------------------


def _entries() -> Iterator[Entry]:
    """Everything with a docstring of its own; what repeats another's, as inherited methods do, is left out."""
    seen = set()
    for module_name in MODULES.split():
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # Python was built without it
            continue
        for name, kind, thing in _documented(module, module_name):
            doc = inspect.getdoc(thing)
            if doc and doc not in seen:
                seen.add(doc)
                yield Entry(name, kind, doc, _signature(thing), tuple(_methods(thing)))


def _documented(module: ModuleType, module_name: str) -> Iterator[tuple[str, str, Any]]:
    """The module, its public classes and functions, and their methods, as (dotted name, kind, object)."""
    yield module_name, "module", module
    prefix = "" if module_name == "builtins" else f"{module_name}."
    for name, member in inspect.getmembers(module, callable):
        if name.startswith("_") or not _belongs_to(module, name, member):
            continue
        yield f"{prefix}{name}", "class" if inspect.isclass(member) else "function", member
        for method_name, method in _methods(member).items():
            yield f"{prefix}{name}.{method_name}", "method", method


def _belongs_to(module: ModuleType, name: str, member: Any) -> bool:
    """Whether a module offers a member as its own, and did not merely import it."""
    public = getattr(module, "__all__", None)
    return name in public if public is not None else getattr(member, "__module__", None) == module.__name__


def _methods(thing: Any) -> dict[str, Any]:
    members = vars(thing) if inspect.isclass(thing) else {}
    return {name: member for name, member in sorted(members.items()) if not name.startswith("_") and callable(member)}


def _signature(thing: Any) -> str | None:
    try:
        signature = str(inspect.signature(thing))
    except (TypeError, ValueError):  # a module, or written in C
        return None
    return None if " at 0x" in signature else signature  # a default without a name of its own, but an address


# --- as text and as conversations -------------------------------------------------------------------------------------


def _as_help(entry: Entry) -> str:
    """An entry as `help()` prints it."""
    return f"{entry.kind} {entry.name}{entry.signature or ''}\n\n{entry.doc}\n"


def _as_conversation(entry: Entry) -> Messages:
    """What somebody may want to know of an entry: what it is, then its parameters, then its methods."""
    turns = [(_question(entry), _first_paragraph(entry.doc))]
    if entry.signature:
        turns.append(("What are its parameters?", f"{entry.name}{entry.signature}"))
    if entry.methods:
        turns.append(("Name some of its methods.", ", ".join(entry.methods[:12])))
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def _question(entry: Entry) -> str:
    if entry.kind in ("function", "method"):
        return f"What does {entry.name} do?"
    return f"What is the {entry.kind} {entry.name}?"


def _first_paragraph(doc: str, limit: int = 400) -> str:
    """The first paragraph that is no signature, on one line, cut after its last sentence within the limit."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", doc)]
    text = next((paragraph for paragraph in paragraphs if not re.match(r"[\w.]+\(", paragraph)), paragraphs[0])
    sentences = re.match(rf".{{1,{limit}}}[.!?](?=\s|$)", text)
    return text if len(text) <= limit else sentences.group() if sentences else text[:limit]
