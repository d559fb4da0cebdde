"""The command line of ``prepare``."""

import sys

from tformer_lib.tokens.corpus import CorpusConfig, describe, prepare
from tformer_lib.tokens.files import CorpusError


def main() -> None:
    """The command line of ``prepare``: one line on stderr and exit status 1 where the corpus cannot be made."""
    import tyro

    config = tyro.cli(CorpusConfig, prog="python -m tformer_lib.tokens")
    try:
        print(describe(prepare(config)))
    except (CorpusError, OSError) as error:
        sys.exit(f"error: {error}")
