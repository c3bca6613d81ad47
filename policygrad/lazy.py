"""Names imported at first use. A package lists them in its stub, `__init__.pyi`; type checkers read the same list."""

import ast
import importlib
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, by the stub beside its `__init__.py`.

    In the stub `from module import name` is a name of another module, `from package import name` is a submodule, and
    `name = Class.method` is another name for what is there. A name that is only annotated is left to the package.
    """
    places: dict[str, tuple[str, str] | None] = {}
    for line in ast.parse(Path(file).with_suffix(".pyi").read_text()).body:
        match line:
            case ast.ImportFrom(module=str(module)) if module == package:
                places |= {x.name: (f"{package}.{x.name}", "") for x in line.names}
            case ast.ImportFrom(module=str(module)) if module.startswith("policygrad"):
                places |= {x.asname: (module, x.name) for x in line.names if x.asname}
            case ast.Assign(targets=[ast.Name(id=name)]):
                places[name] = (package, ast.unparse(line.value))
            case ast.AnnAssign(target=ast.Name(id=name)) if not name.startswith("__"):
                places[name] = None

    def get(name: str) -> Any:
        place = places.get(name)
        if place is None:
            raise AttributeError(f"{package} has no attribute {name!r}", name=name, obj=sys.modules[package])
        module = importlib.import_module(place[0])
        return attrgetter(place[1])(module) if place[1] else module

    return get, lambda: sorted({*vars(sys.modules[package]), *places}), sorted(places)
