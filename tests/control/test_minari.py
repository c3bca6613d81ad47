"""Data sets of Minari: read from files that Minari itself wrote, and refused where they lead elsewhere."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from policygrad.control.minari import place_of, read_minari
from policygrad.errors import UserError

h5py = pytest.importorskip("h5py")


def episodes() -> list[dict[str, np.ndarray]]:
    """Two episodes as Minari lays them out: one observation more than actions."""
    generator = np.random.default_rng(0)
    return [
        {
            "observations": generator.normal(size=(n + 1, 3)).astype(np.float32),
            "actions": generator.integers(2, size=n),
            "rewards": generator.normal(size=n),
            "terminations": np.arange(n) == n - 1,
            "truncations": np.zeros(n, dtype=bool),
        }
        for n in (4, 2)
    ]


def written(path: Path, found: list[dict[str, Any]]) -> Path:
    with h5py.File(path, "w") as file:
        for i, episode in enumerate(found):
            for name, values in episode.items():
                file.create_dataset(f"episode_{i}/{name}", data=values)
            file.create_group(f"episode_{i}/infos")
    return path


def test_the_columns_are_those_of_all_episodes_without_their_last_observations(tmp_path: Path) -> None:
    first, second = episodes()
    found = read_minari(written(tmp_path / "main_data.hdf5", [first, second]))
    np.testing.assert_array_equal(
        found["observation"], np.concatenate([first["observations"][:4], second["observations"][:2]])
    )
    np.testing.assert_array_equal(found["action"], np.concatenate([first["actions"], second["actions"]]))
    np.testing.assert_array_equal(found["reward"], np.concatenate([first["rewards"], second["rewards"]]))
    assert found["episode"].tolist() == [0] * 4 + [1] * 2
    assert found["terminated"].tolist() == [False, False, False, True, False, True]


def test_episodes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    many = [episodes()[1] for _ in range(11)]
    for i, episode in enumerate(many):
        episode["rewards"] = np.full(2, float(i))
    assert read_minari(written(tmp_path / "x.hdf5", many))["reward"].tolist() == [
        float(i) for i in range(11) for _ in "ab"
    ]


def test_what_minari_collects_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    pytest.importorskip("jax", reason="Minari collects with it")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    collector = minari.DataCollector(gymnasium.make("CartPole-v1"), data_format="hdf5")
    actions: list[int] = []
    for seed in range(2):
        collector.reset(seed=seed)
        ended = False
        while not ended:
            actions.append(int(collector.action_space.sample()))
            _, _, terminated, truncated, _ = collector.step(actions[-1])
            ended = terminated or truncated
    collector.create_dataset("cartpole/random-v0")
    found = read_minari(place_of("minari:cartpole/random-v0"))
    assert found["action"].tolist() == actions
    assert found["observation"].shape == (len(actions), 4)
    assert found["terminated"].sum() == 2
    assert [x.dtype.kind for x in found.values()].count("O") == 0


def linked(path: Path) -> Path:
    """A file whose actions are in another file, by a link."""
    first, second = episodes()
    written(path.with_name("other.hdf5"), [first])
    actions = first.pop("actions")
    assert len(actions)
    written(path, [first, second])
    with h5py.File(path, "a") as file:
        file["episode_0/actions"] = h5py.ExternalLink("other.hdf5", "episode_0/actions")
    return path


def virtual(path: Path) -> Path:
    """A file whose actions are in another file, as a virtual data set."""
    first, second = episodes()
    written(path.with_name("other.hdf5"), [first])
    first.pop("actions")
    written(path, [first, second])
    with h5py.File(path, "a") as file:
        layout = h5py.VirtualLayout(shape=(4,), dtype=np.int64)
        layout[:] = h5py.VirtualSource(str(path.with_name("other.hdf5")), "episode_0/actions", shape=(4,))
        file.create_virtual_dataset("episode_0/actions", layout)
    return path


def external(path: Path) -> Path:
    """A file whose actions are the raw bytes of another file."""
    first, second = episodes()
    path.with_name("raw").write_bytes(first.pop("actions").tobytes())
    written(path, [first, second])
    with h5py.File(path, "a") as file:
        file.create_dataset("episode_0/actions", (4,), np.int64, external=[(str(path.with_name("raw")), 0, 32)])
    return path


def large(path: Path) -> Path:
    """A small file that unpacks to more than there is memory for."""
    written(path, episodes())
    with h5py.File(path, "a") as file:
        file.create_dataset("episode_0/infos/zeros", (2**40,), np.float64, chunks=(2**16,), compression="gzip")
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [(linked, "'actions' is a link"), (virtual, "in another file"), (external, "in another file"), (large, "2 GiB")],
)
def test_a_file_that_leads_out_of_itself_or_unpacks_to_too_much_is_refused(
    make: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said) as raised:
        read_minari(make(tmp_path / "main_data.hdf5"))
    assert len(str(raised.value)) <= 200


WRONG: list[tuple[Any, str]] = [
    (lambda x: x.pop("actions"), "no actions"),
    (lambda x: x.update(observations={"a": 1}), "no observations"),
    (lambda x: x.update(actions=x["actions"][:1]), "differ in length"),
    (lambda x: x.update(actions=np.array(["a", "b"], dtype="S1")), "no numbers"),
    (lambda x: x.update(observations=np.zeros((3, 2))), "differ in shape"),
]


@pytest.mark.parametrize(("change", "said"), WRONG)
def test_episodes_that_make_no_sense_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    first, second = episodes()
    change(second)
    second.pop("observations") if isinstance(second.get("observations"), dict) else None
    with pytest.raises(UserError, match=said) as raised:
        read_minari(written(tmp_path / "main_data.hdf5", [first, second]))
    assert len(str(raised.value)) <= 200


def test_structured_observations_are_refused_for_now(tmp_path: Path) -> None:
    first, _ = episodes()
    first.pop("observations")
    path = written(tmp_path / "main_data.hdf5", [first])
    with h5py.File(path, "a") as file:
        file.create_dataset("episode_0/observations/position", data=np.zeros((5, 2)))
    with pytest.raises(UserError, match="parts"):
        read_minari(path)


def test_a_file_that_is_missing_or_is_no_hdf5_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_minari(tmp_path)
    (tmp_path / "x.hdf5").write_text("nothing")
    with pytest.raises(UserError, match=r"x\.hdf5 cannot be read"):
        read_minari(tmp_path / "x.hdf5")
    with pytest.raises(UserError, match="has no episodes"):
        read_minari(written(tmp_path / "empty.hdf5", []))
