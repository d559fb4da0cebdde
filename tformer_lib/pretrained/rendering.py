"""What renders chat templates, in a process of its own that may take only so much time and memory.

A template is a program by whoever made the checkpoint. jinja2's sandbox lets it change nothing and reach nothing
outside, but no sandbox within a process ends a loop that goes on for ever, or a text that doubles at every turn. So the
program that :mod:`tformer_lib.pretrained.templates` starts is this file, which imports nothing of the library: it reads
a line of JSON for each conversation and answers with one.
"""

import json
import sys
from datetime import datetime
from functools import lru_cache
from pathlib import Path

SECONDS = 5
"""Of a processor, for one conversation; the system ends the process then. A template takes some milliseconds."""

MEMORY = 2**30
"""Bytes of the process; asking for more fails."""

LONGEST = 2**24
"""Characters of the longest text that is given back."""


def main() -> None:
    """Answer each line of the input until it ends."""
    limit_memory()
    for line in sys.stdin:
        grant_seconds()
        print(json.dumps(answer(line)), flush=True)


def answer(line: str) -> dict[str, str]:
    """The rendered text of what a line asks for, or why there is none."""
    try:
        asked = json.loads(line)
        text = compiled(asked["template"]).render(**asked["known"])
    except MemoryError:
        return {"error": f"it takes more than {MEMORY:,} bytes"}
    except Exception as error:  # a program raises what it likes
        return {"error": str(error)}
    return {"text": text} if len(text) <= LONGEST else {"error": f"it writes more than {LONGEST:,} characters"}


@lru_cache(maxsize=8)
def compiled(template: str):
    """A template of jinja2's sandbox with what transformers gives them."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``, which marks for a training program what the model wrote, and writes nothing."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            """What stands between the marks."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(x: object, ensure_ascii: bool = False, indent: int | None = None, **options) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, **options)

    extensions = [loopcontrols, Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def limit_memory() -> None:
    """Let the process have :data:`MEMORY`, where the system can see to it."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # Windows has no limits, macOS not this one
        pass


def grant_seconds() -> None:
    """Let the process have :data:`SECONDS` from now on, where the system can see to it."""
    try:
        import resource
    except ImportError:
        return
    used, most = resource.getrusage(resource.RUSAGE_SELF), resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + SECONDS, most))


if __name__ == "__main__":
    folder = str(Path(__file__).parent)
    sys.path[:] = [place for place in sys.path if place != folder]  # "keys" and the like are no names for all to see
    main()
