"""Data sets of Minari (minari.farama.org), read from their HDF5 files as data."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from policygrad.errors import UserError, ending, one_line, shortened
from policygrad.files import check_file, damaged

LARGEST = 2 * 2**30  # bytes, in the file and unpacked; it is read whole
COLUMNS = {
    "observations": "observation", "actions": "action", "rewards": "reward", "terminations": "terminated",
    "truncations": "truncated",
}  # fmt: skip


def place_of(name: str) -> Path:
    """Where demonstrations are: a path, or `minari:NAME` of a data set in Minari's own directory."""
    if not name.startswith("minari:"):
        return Path(name).expanduser()
    own = os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets"
    return Path(own) / name.removeprefix("minari:")


def read_minari(place: Path) -> dict[str, Any]:
    """The columns of a data set of Minari, from its HDF5 file or from the directory that has it.

    Observations and actions of a Dict are a list of dicts, and those of a Tuple a list of tuples. It is read as data:
    no code or environment that it names is used, and no link out of the file is followed. Raises UserError.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError("a data set of Minari needs h5py: pip install policygrad[minari]") from error
    path = place / "data" / "main_data.hdf5" if place.is_dir() else place
    check_file(path, path.parent, LARGEST)
    parts: dict[str, list[Any]] = {}
    try:
        with h5py.File(path, "r") as file:
            _check_inside(file, h5py)
            names = sorted((x for x in file if x.startswith("episode_")), key=lambda x: int(x.removeprefix("episode_")))
            for number, name in enumerate(names):
                for column, values in _episode(file[name], h5py).items():
                    parts.setdefault(column, []).append(values)
                parts.setdefault("episode", []).append(np.full(len(parts["action"][-1]), number))
    except UserError as error:
        raise damaged(path, str(error)) from error
    except Exception as error:  # of h5py and of the system
        raise damaged(path, one_line(error), "cannot be read") from error
    if not parts:
        raise damaged(path, "it has no episodes", "cannot be read")
    if len({len(x) for x in parts.values()}) > 1:
        raise damaged(path, "some of its episodes have columns that others lack")
    return {name: _joined(name, x, path) for name, x in parts.items()}


def _joined(name: str, values: list[Any], path: Path) -> Any:
    """One column of all episodes."""
    if all(isinstance(x, list) for x in values):
        return [row for x in values for row in x]
    if any(isinstance(x, list) for x in values):
        raise damaged(path, f"{name} has parts (a Dict or Tuple) in some of its episodes alone")
    try:
        return np.concatenate(values)
    except ValueError as error:
        raise damaged(path, f"its episodes differ in shape ({one_line(error, 60)})") from error


def _episode(group: Any, h5py: Any) -> dict[str, Any]:
    """The columns of one episode of T steps. Of its T + 1 observations the last one has no action."""
    found, where = {}, ending(group.name, 30)
    for its, name in COLUMNS.items():
        if its not in group:
            raise UserError(f"its {where} has no {its}: give what Minari keeps of each step")
        found[name] = _values(group[its], its, where, h5py)
    found["observation"] = found["observation"][: len(found["action"])]
    if len({len(x) for x in found.values()}) > 1:
        raise UserError(f"the columns of its {where} differ in length")
    return found


def _values(part: Any, its: str, where: str, h5py: Any) -> Any:
    """The values of one column: an array, or a list of dicts or tuples whose parts Minari keeps as groups.

    Those of a tuple are named _index_0, _index_1 and so on.
    """
    if isinstance(part, h5py.Dataset):
        if part.dtype.kind not in "biuf" or not part.shape:
            raise UserError(f"{its} of its {where} are no numbers: give observations and actions of numbers")
        return part[()]
    names = list(part)
    if not names:
        raise UserError(f"its {where} has no {its}: give what Minari keeps of each step")
    columns = {name: _values(part[name], its, where, h5py) for name in names}
    if len({len(x) for x in columns.values()}) > 1:
        raise UserError(f"the parts of {its} of its {where} differ in length")
    if {*names} == {*(ordered := [f"_index_{i}" for i in range(len(names))])}:
        return list(zip(*(columns[name] for name in ordered), strict=True))
    return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _check_inside(file: Any, h5py: Any) -> None:
    """Raise UserError for an HDF5 file that leads out of itself, nests without end, or unpacks to too much."""
    waiting, size = [file], 0
    while waiting:
        group = waiting.pop()
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise UserError(f"its {shortened(name, 30)} is a link: give a file that holds its own data")
            part = group[name]
            if isinstance(part, h5py.Group):
                if part.name.count("/") > 10:
                    raise UserError("its groups are nested too deeply")
                waiting.append(part)
            elif part.is_virtual or part.external:
                raise UserError(f"its {shortened(name, 30)} is in another file: give one that holds its own data")
            elif (size := size + part.nbytes) > LARGEST:
                raise UserError(f"it holds more than {LARGEST / 2**30:g} GiB: split it")
