# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""See what would be uploaded, and what is wrong with it, before anything is.

python examples/publish.py FOLDER OWNER/NAME [--for-real]
"""

import sys

from conversion.hub.published_card import CardOptions
from conversion.hub.publishing import publish


def main(folder: str, name: str, *for_real: str) -> list[str]:
    """Names of the files; with --for-real they are sent, in one commit."""
    card = CardOptions(license="apache-2.0")
    publication = publish(folder, name, dry_run=not for_real, card=card)
    files = sorted([*publication.weights, *publication.small_files])
    print(*files, sep="\n")
    return files


if __name__ == "__main__":
    main(*sys.argv[1:])
