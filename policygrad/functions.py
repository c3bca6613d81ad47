"""Load a user's function or class by name. Nothing else in the library imports users' code."""

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from policygrad.errors import UserError, ending, listed

LONGEST = 200  # characters of a message


def load_function(spec: str, *, what: str = "function") -> Callable[..., Any]:
    """The function or class that `module:function` or `path/file.py:function` names.

    A file is executed again at every call, since it may have changed. A module is imported as usual. The working
    directory and the file's own are searched last, also by what is imported. what: what error messages call it.

    Raises UserError if the module, file or function does not exist, or if the import raises or exits.
    """
    if spec.endswith(".py"):
        raise UserError(f"{what} {ending(spec, 40)!r} is a file: add the function's name, as in file.py:function")
    place, _, name = spec.rpartition(":")
    of_a_file = place.endswith(".py")
    if not name.isidentifier() or not (of_a_file or all(part.isidentifier() for part in place.split("."))):
        raise UserError(
            f"{what} {ending(spec, 40)!r} names no function: write module:function or path/file.py:function"
        )
    with _errors_in_one_line(place):
        module = _executed(Path(place), what) if of_a_file else load_module(place, what=what)
    function = getattr(module, name, None)
    if not callable(function):
        kind = "function or class" if what == "environment" else "function"
        known = [
            other
            for other, x in vars(module).items()
            if inspect.isfunction(x) or (inspect.isclass(x) and x.__module__ == module.__name__)
            if not other.startswith("_")
        ]
        raise UserError(f"{ending(place, 40)} has no {kind} {ending(name, 40)!r}: {_nearest(name, known)}")
    return function


def _executed(path: Path, what: str) -> ModuleType:
    """A file executed as a module, under a name that hides no other module."""
    if not path.is_file():
        known = [x.stem for x in path.parent.glob("*.py")] if path.parent.is_dir() else []
        found = [ending(f"{x}.py", 40) for x in difflib.get_close_matches(path.stem, known, n=2)]
        advice = f"did you mean {' or '.join(found)}?" if found else f"give the path of the {what}'s file"
        raise UserError(f"there is no file {ending(str(path), 40)}: {advice}")
    _search_last(os.getcwd(), str(path.resolve().parent))
    name = f"policygrad_file_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_module(place: str, *, what: str = "function") -> ModuleType:
    """A module by name; the working directory is searched last. Raises UserError as load_function does."""
    _search_last(os.getcwd())
    importlib.invalidate_caches()  # a file may be newer than the directory's listing
    with _errors_in_one_line(place):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if not f"{place}.".startswith(f"{error.name}."):
                raise  # the module exists, but imports one that does not
            parent = place.rpartition(".")[0]
            folders = getattr(sys.modules.get(parent), "__path__", [os.getcwd()])
            prefix = f"{parent}." if parent in sys.modules else ""
            known = [prefix + x.name for x in pkgutil.iter_modules(folders)]
            found = [ending(x, 40) for x in difflib.get_close_matches(place, known, n=2)]
            advice = f"did you mean {' or '.join(found)}?" if found else "check its name, or write path/file.py"
            raise UserError(f"there is no module {ending(place, 40)!r} for the {what}: {advice}") from error


def _search_last(*folders: str) -> None:
    """Add folders to the end of the search path, so that they hide no installed module.

    They stay there, because the imported code may import its neighbors later.
    """
    sys.path += [folder for folder in dict.fromkeys(folders) if folder not in sys.path]


@contextlib.contextmanager
def _errors_in_one_line(place: str) -> Iterator[None]:
    """Turn anything that an import raises into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        start, end = f"importing {ending(place, 40)} raised {type(error).__name__}: ", ": fix it (--debug shows where)"
        room = LONGEST - len(start) - len(end)
        said = " ".join(str(error).split()) or "no message"
        raise UserError(start + (said if len(said) <= room else said[: room - 3] + "...") + end) from error


def _nearest(name: str, known: list[str]) -> str:
    """The closest known names, as the end of an error message."""
    found = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    if found:
        return f"did you mean {' or '.join(ending(x, 40) for x in found)}?"
    if not known:
        return "it has none; check the name before the colon"
    return f"it has {listed(known)}"
