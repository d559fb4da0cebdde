"""The source of a learner's answer with all that it needs, so that it can stand in a file of its own."""

import ast
import dis
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, ModuleType


class Unportable(ValueError):
    """The answer needs something that another file does not have; the message names it."""


@dataclass
class Source:
    """A function that can stand in another file.

    Attributes:
        function: its name.
        imports: the lines that it needs, such as ``"import torch"``.
        definitions: name -> text of what it needs of its own notebook, and its own at the end.
    """

    function: str
    imports: list[str] = field(default_factory=list)
    definitions: dict[str, str] = field(default_factory=dict)


def source_of(answer: Callable) -> Source:
    """The source of a function, of the helpers that it calls, and the imports of both.

    Raises:
        Unportable: there is no source, or it needs a value that cannot be written down.
    """
    if not inspect.isfunction(answer) or answer.__name__ == "<lambda>":
        raise Unportable("it is no function that a def defines")
    found = Source(answer.__name__)
    add(answer, found, home=answer.__module__)
    return found


def add(function: Callable, found: Source, home: str) -> None:
    """Add a function, after what it needs."""
    if function.__closure__:
        raise Unportable(
            f"{function.__name__} uses {', '.join(function.__code__.co_freevars)} of the function around it"
        )
    try:
        text = textwrap.dedent(inspect.getsource(function)).rstrip() + "\n"
    except (OSError, TypeError):
        raise Unportable(f"the source of {function.__name__} is not known") from None
    found.definitions[function.__name__] = ""  # so that one that calls itself is added once
    for name in sorted({*names_in(function.__code__), *names_in_signature(text)} & set(function.__globals__)):
        add_value(name, function.__globals__[name], found, home)
    found.definitions.pop(function.__name__)
    found.definitions[function.__name__] = text


def names_in(code: CodeType) -> Iterator[str]:
    """The global names that a function's body reads, those of functions inside it too."""
    yield from (step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from names_in(inner)


def names_in_signature(text: str) -> Iterator[str]:
    """The names in a function's annotations, defaults and decorators."""
    (function,) = ast.parse(text).body
    for part in (function.args, function.returns, *function.decorator_list):
        yield from (node.id for node in ast.walk(part) if isinstance(node, ast.Name)) if part is not None else ()


def add_value(name: str, value: object, found: Source, home: str) -> None:
    """Add what a global name stands for: an import, a helper, or a plain value."""
    if name in found.definitions:
        return
    if isinstance(value, ModuleType):
        same = value.__name__ == name
        line = f"import {value.__name__}" if same else f"import {value.__name__} as {name}"
    elif getattr(value, "__module__", None) == home and inspect.isfunction(value):
        return add(value, found, home)
    elif (place := home_of(name, value, home)) is not None:
        line = f"from {place[0]} import {place[1]}" + ("" if place[1] == name else f" as {name}")
    else:
        found.definitions[name] = f"{name} = {literal(name, value)}\n"
        return None
    if line not in found.imports:
        found.imports.append(line)
    return None


def home_of(name: str, value: object, home: str) -> tuple[str, str] | None:
    """The module and the name that a function or class can be imported by; None for what is defined in a notebook."""
    if not callable(value):
        return None
    own = getattr(value, "__module__", None), getattr(value, "__qualname__", name)
    likely = ("torch", "torch.nn.functional", "math", "itertools", "functools", "numpy")
    for module, called in (own, *((module, name) for module in likely if module in sys.modules)):
        if module in (None, home, "__main__"):
            continue
        try:
            if getattr(importlib.import_module(module), called, None) is value:
                return module, called
        except ImportError:
            continue
    return None


def literal(name: str, value: object) -> str:
    """A plain value as Python writes it.

    Raises:
        Unportable: it is no plain value.
    """
    text = repr(value)
    try:
        if ast.literal_eval(text) == value:
            return text
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        pass
    raise Unportable(f"it uses {name} of its notebook, a {type(value).__name__}, which another file does not have")
