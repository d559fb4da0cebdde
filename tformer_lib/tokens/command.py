"""The command line of ``prepare``."""

from collections.abc import Sequence

from tformer_lib import command_line
from tformer_lib.tokens.corpus import CorpusConfig, prepare, summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a corpus and say what it holds; returns the exit status."""
    return command_line.run(lambda: make(arguments))


def make(arguments: Sequence[str] | None) -> None:
    """Make the corpus that the arguments ask for."""
    print(summary(prepare(command_line.parse(CorpusConfig, arguments, program="python -m tformer_lib.tokens"))))
