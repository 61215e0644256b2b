"""The zoo: models, guides and recipes, found by name in the files that hold them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, TypeVar

from ppl_vae.guide import AmortizedGuide
from ppl_vae.model import GenerativeModel
from ppl_vae.names import nearest

T = TypeVar("T")


class NameCollision(ValueError):
    """Two members of the zoo have one name."""


def models() -> dict[str, type[GenerativeModel]]:
    """The models of ``ppl_vae.models``, by class name.

    Raises:
        NameCollision: two files hold a class of one name, upper and lower case alike.
    """
    return collect(classes("ppl_vae.models", GenerativeModel))


def guides() -> dict[str, type[AmortizedGuide]]:
    """The guide families of ``ppl_vae.guides``, by class name. Raises as :func:`models`."""
    return collect(classes("ppl_vae.guides", AmortizedGuide))


def classes(package: str, base: type) -> Iterator[tuple[str, Any]]:
    """Name and class of each concrete subclass of ``base`` that a module of a package defines."""
    for module in modules(package):
        for name, value in vars(module).items():
            defined_here = getattr(value, "__module__", None) == module.__name__
            concrete = inspect.isclass(value) and not inspect.isabstract(value)
            if concrete and defined_here and issubclass(value, base) and name[0] != "_":
                yield name, value


def modules(package: str) -> Iterator[ModuleType]:
    """The modules of a package, imported; those whose name starts with ``_`` are left out."""
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if not found.name.startswith("_"):
            yield importlib.import_module(f"{package}.{found.name}")


def collect(members: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Members by name, sorted.

    Raises:
        NameCollision: two names are alike but for upper and lower case.
    """
    by_name: dict[str, tuple[str, T]] = {}
    for name, member in members:
        if (other := by_name.get(name.lower())) is not None and other[1] is not member:
            raise NameCollision(
                f"{_whence(member)} and {_whence(other[1])} are both named {name!r}: rename one"
            )
        by_name[name.lower()] = name, member
    return dict(sorted(by_name.values(), key=lambda pair: pair[0]))


def find(what: str, name: str, members: Mapping[str, T]) -> T:
    """The member of that name, upper and lower case alike.

    Raises:
        ValueError: there is none; names the nearest one.
    """
    by_name = {known.lower(): member for known, member in members.items()}
    if name.lower() in by_name:
        return by_name[name.lower()]
    raise ValueError(f"unknown {what} {name!r}; {nearest(name, members)}")


def attribute(package: str, name: str, members: Callable[[], Mapping[str, Any]]) -> Any:
    """What ``from package import name`` gives beside the package's modules: a member.

    Raises:
        AttributeError: there is none of that name.
    """
    # Python asks for submodules and dunder names here too; those are not class names.
    if name[:1].isupper() and name in (found := members()):
        return found[name]
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


def first_line(member: Callable[..., Any]) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(member) or "").partition("\n")[0]


def _whence(member: Any) -> str:
    return f"{member.__module__}.{member.__qualname__}"


TABLE_BEGIN, TABLE_END = "<!-- zoo: made by `make readme` -->", "<!-- end of zoo -->"


def table() -> str:
    """The parts of the zoo and recipes with their first lines, as Markdown tables.

    >>> print(table())  # doctest: +ELLIPSIS
    | model | |
    | --- | --- |
    ...
    """
    # They import this module.
    grid, recipes = (importlib.import_module(f"ppl_vae.{name}") for name in ("grid", "recipes"))
    experiments = {name: first_line(recipe) for name, recipe in recipes.recipes().items()}
    return "\n\n".join(
        "\n".join(
            [f"| {kind.removesuffix('s')} | |", "| --- | --- |"]
            + [f"| `{name}` | {_linked(line)} |" for name, line in lines.items()]
        )
        for kind, lines in {**grid.axes(), "recipes": experiments}.items()
    )


def with_table(text: str) -> str:
    """A text with :func:`table` between its markers, in place of what stood there.

    Raises:
        ValueError: the text does not have the two markers, once each, in order.
    """
    before, begin, rest = text.partition(TABLE_BEGIN)
    _, end, after = rest.partition(TABLE_END)
    if not (begin and end) or TABLE_BEGIN in after or TABLE_END in before + after:
        raise ValueError(f"expected one {TABLE_BEGIN!r}, and after it one {TABLE_END!r}")
    return f"{before}{begin}\n\n{table()}\n\n{end}{after}"


def _linked(line: str) -> str:
    """A line of Markdown whose arXiv numbers are links."""
    return re.sub(
        r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", line.replace("|", r"\|")
    )
