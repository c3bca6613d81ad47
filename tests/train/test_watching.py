"""What is watched is what is evaluated: the same episodes, in a video; answers and episodes as text where nothing is
to be seen."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import NormalizeObservation, TimeLimit
from PIL import Image, ImageSequence
from probes import Known
from tiny_files import write_model, write_prompts, write_rewards

import policygrad as pg
from policygrad.errors import UserError
from policygrad.train import watching
from policygrad.train.watching import captioned

SMALL: dict[str, Any] = {"num_envs": 2, "num_steps": 8, "minibatch_size": 8, "hidden": (4,), "steps": 16}
SMALL |= {"progress": False, "preset": "none"}
encoder = pytest.mark.skipif(find_spec("imageio_ffmpeg") is None, reason="imageio-ffmpeg is not installed")


class Drawn(Known):
    """A square whose color is the step, [24, 40]."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, how: str = "well") -> None:
        super().__init__(spaces.Discrete(2))
        self.render_mode, self.how, self.t = render_mode, how, 0

    def reset(self, **options: Any) -> Any:
        self.t = 0
        return super().reset(**options)

    def step(self, action: Any) -> Any:
        self.t += 1
        obs, _, _, _, info = super().step(action)
        return obs, float(action), self.t == 3, False, info

    def render(self) -> Any:
        match self.how:
            case "raises":
                raise RuntimeError("no context\nof OpenGL")
            case "floats":
                return np.zeros((24, 40, 3), np.float32)
            case "None":
                return None
        return np.full((24, 40, 3), 50 * self.t, np.uint8)


class Undrawn(Known):
    """Takes no render_mode."""

    def __init__(self) -> None:
        super().__init__(spaces.Discrete(2))


@pytest.fixture(scope="module")
def run() -> Any:
    return pg.train("ppo", Drawn, **SMALL)


def frames(path: Path) -> list[np.ndarray]:
    with Image.open(path) as film:
        return [np.array(x.convert("RGB")) for x in ImageSequence.Iterator(film)]


def test_a_video_shows_every_step_of_the_episodes_that_are_evaluated(run: Any, tmp_path: Path) -> None:
    found = pg.watch(run, tmp_path / "film.gif", episodes=2)
    assert found == run.evaluate(2, environment=Drawn())
    shades = [int(x[20, 20, 0]) for x in frames(tmp_path / "film.gif")]
    assert shades == [0, 50, 100, 150] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.gif"]


def test_a_caption_tells_the_step_the_return_and_the_action(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[list[str]] = []

    def kept(frame: np.ndarray, parts: list[str]) -> Image.Image:
        said.append(parts)
        return captioned(frame, parts)

    monkeypatch.setattr(watching, "captioned", kept)
    found = pg.watch(run, tmp_path / "film.gif")
    assert said[0] == ["episode 1", "step 0", "return 0.0"]
    assert said[-1][:3] == ["episode 1", "step 3", f"return {found.returns[0]:.1f}"]
    returns = [float(x[2].removeprefix("return ")) for x in said]
    assert [x[3] for x in said[1:]] == [f"action {reward:.0f}" for reward in np.diff(returns)]


def test_a_frame_is_above_its_caption_in_even_sides() -> None:
    image = captioned(np.full((35, 41, 3), 7, np.uint8), ["episode 1"])
    assert image.width % 2 == image.height % 2 == 0
    assert image.width >= 320
    below = np.array(image)[35 * 8 :]
    assert (np.array(image)[: 35 * 8, : 41 * 8] == 7).all()
    assert below.min() < 100  # ink
    assert below.max() == 255


@encoder
def test_an_mp4_has_the_frames_and_the_rate(run: Any, tmp_path: Path) -> None:
    import imageio_ffmpeg

    pg.watch(run, tmp_path / "film.mp4", episodes=2)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "film.mp4"))
    about = next(reader)
    width, height = about["size"]
    assert about["fps"] == 20
    shades = [np.frombuffer(x, np.uint8).reshape(height, width, 3)[40, 40, 0] for x in reader]
    np.testing.assert_allclose(shades, [0, 50, 100, 150] * 2, atol=6)


def test_the_runs_own_normalization_is_used(tmp_path: Path) -> None:
    """That of the run, and that of wrappers in the environment."""

    def wrapped(**options: Any) -> gymnasium.Env:
        return NormalizeObservation(Drawn(**options))

    run = pg.train("ppo", wrapped, normalize_observations=True, **SMALL)
    run.world.normalizer.statistics.mean[:] = 1e3
    seen: list[torch.Tensor] = []
    run.policy.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    found = pg.watch(run, tmp_path / "film.gif", episodes=3)
    filmed = torch.cat([x.flatten() for x in seen])
    seen.clear()
    assert found == run.evaluate(3, environment=wrapped())
    assert torch.equal(filmed, torch.cat([x.flatten() for x in seen]))
    assert (filmed < -9).all()  # clipped, or far from the mean


def test_the_policy_may_be_sampled_and_an_episode_cut(run: Any, tmp_path: Path) -> None:
    sampled = {tuple(pg.watch(run, tmp_path / "film.gif", greedy=False, seed=seed).returns) for seed in range(8)}
    assert len(sampled) > 1
    assert pg.watch(run, tmp_path / "film.gif", max_steps=2).lengths == [2]
    assert len(frames(tmp_path / "film.gif")) == 3


def test_an_environment_of_the_users_is_left_open(run: Any, tmp_path: Path) -> None:
    closed = []

    class Mine(Drawn):
        def close(self) -> None:
            closed.append(self)

    pg.watch(run, tmp_path / "film.gif", environment=TimeLimit(Mine(render_mode="rgb_array"), 2))
    assert closed == []
    assert len(frames(tmp_path / "film.gif")) == 3


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (Undrawn, "it takes no render_mode"),
        (lambda **_: Drawn(), "its render_mode is None"),
        (lambda **x: Drawn(**x, how="raises"), "cannot be drawn (RuntimeError: no context of OpenGL)"),
        (lambda **x: Drawn(**x, how="floats"), "render() returned float32 of shape (24, 40, 3)"),
        (lambda **x: Drawn(**x, how="None"), "render() returned None"),
        (Drawn(), "its render_mode is None"),
    ],
    ids=["no such argument", "argument ignored", "raises", "floats", "None", "an object"],
)
def test_what_cannot_be_drawn_is_one_line(run: Any, tmp_path: Path, environment: Any, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as error:
        pg.watch(run, tmp_path / "film.gif", environment=environment)
    assert len(str(error.value)) <= 200
    assert list(tmp_path.iterdir()) == []


def test_a_vector_environment_has_no_one_picture(run: Any, tmp_path: Path) -> None:
    environments = pg.make_environments(Drawn, 2)
    with pytest.raises(UserError, match="has no one picture"):
        pg.watch(run, tmp_path / "film.gif", environment=environments)


@pytest.mark.parametrize("out", ["film.avi", "film", "film.MP4"])
def test_a_video_is_mp4_or_gif(run: Any, tmp_path: Path, out: str) -> None:
    with pytest.raises(UserError, match=r"a video is an \.mp4 or a \.gif file"):
        pg.watch(run, tmp_path / out)


def test_a_video_needs_a_file(run: Any) -> None:
    with pytest.raises(UserError, match="a video needs a file"):
        pg.watch(run)


def test_without_an_encoder_an_mp4_is_one_line(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install policygrad\[video\], or write a \.gif"):
        pg.watch(run, tmp_path / "film.mp4")


def test_a_place_that_cannot_be_written_is_one_line(run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        pg.watch(run, tmp_path / "file" / "film.gif")


def test_a_policy_that_fails_leaves_no_video(tmp_path: Path) -> None:
    run = pg.train("ppo", Drawn, **SMALL)
    for p in run.policy.parameters():
        p.data.fill_(float("nan"))
    (tmp_path / "film.gif").write_text("an older one")
    with pytest.raises(UserError):
        pg.watch(run, tmp_path / "film.gif")
    assert (tmp_path / "film.gif").read_text() == "an older one"
    assert len(list(tmp_path.iterdir())) == 1


WITHOUT_A_SCREEN = """
import sys, policygrad as pg
run = pg.train("ppo", sys.argv[2], num_envs=1, num_steps=8, minibatch_size=8, steps=8, preset="none", progress=False)
pg.watch(run, sys.argv[1], max_steps=2)
"""


@pytest.mark.parametrize(("task", "package"), [("Reacher-v5", "mujoco"), ("CartPole-v1", "pygame")])
def test_an_environment_is_drawn_without_a_screen_and_without_a_word(task: str, package: str, tmp_path: Path) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    place = Path(pg.__file__).parent.parent
    screens = ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL", "SDL_VIDEODRIVER", "XDG_RUNTIME_DIR")
    environment = {x: y for x, y in os.environ.items() if x not in screens}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_SCREEN, str(tmp_path / "film.gif"), task],
        env=environment | {"PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
    )
    if "cannot be drawn" in done.stderr:
        pytest.skip("there is no EGL here")
    assert (done.returncode, done.stderr) == (0, "")
    shown = frames(tmp_path / "film.gif")
    assert len(shown) == 3
    assert shown[0].std() > 10


# Transcripts


def test_a_transcript_has_prompts_completions_and_the_parts_of_rewards(tmp_path: Path) -> None:
    rewards = write_rewards(tmp_path)
    size: dict[str, Any] = {"held_out": 6, "iterations": 1, "completions": 2, "prompts_per_rollout": 2, "max_tokens": 6}
    judges = [f"{rewards}:short", f"{rewards}:sevens"]
    model = str(write_model(tmp_path / "model"))
    run = pg.train("grpo", str(write_prompts(tmp_path)), model=model, reward=judges, progress=False, **size)
    before = run.world.last
    text = pg.watch(run, tmp_path / "said.txt")
    assert (tmp_path / "said.txt").read_text() == text + "\n"
    assert text.count("## prompt") == 4
    assert run.world.last is before
    alone = run.evaluate(1, seed=1000)  # of all six prompts: the first is answered alike
    assert alone.prompts == 6
    first = text.split("\n\n## ")[0]
    row = alone.rows[0]
    assert row["prompt"] in first
    assert re.search(r"completion 1: reward \d\.\d{3}, short \d\.\d{3}, sevens \d\.\d{3}, \d tokens", first)


def test_a_terminal_gets_no_control_characters() -> None:
    assert watching._printable("a\x1b[31mb\nc\td\u202e") == "a\\x1b[31mb\nc\td\\x202e"


def test_an_exact_world_is_watched_by_its_episodes() -> None:
    run = pg.train("ppo", "exact:chain", steps=64, progress=False)
    text = pg.watch(run, seed=3)
    episodes = text.split("\n\n")
    assert len(episodes) == 4
    for episode in episodes:
        title, *steps, end = episode.splitlines()
        count, total = re.search(r": (\d+) steps, return (-?\d+\.\d+)$", title).groups()  # type: ignore[union-attr]
        assert len(steps) == int(count)
        assert sum(float(x.split()[-1]) for x in steps) == pytest.approx(float(total), abs=1e-3)
        assert end.strip() in ("the episode ended", "cut at the time limit")
        assert steps[0].split()[2:4] == ["state", "0"]
    assert pg.watch(run, seed=3) == text
    assert pg.watch(run, seed=4) != text


def test_exact_tokens_are_watched_by_their_completions() -> None:
    run = pg.train("grpo", "exact:tokens", steps=64, progress=False)
    lines = pg.watch(run).splitlines()
    assert len(lines) == 4
    for line in lines:
        prompt, tokens, reward = re.fullmatch(r"prompt ([01]): ([012 ]+?) +reward (\d\.\d{3})", line).groups()  # type: ignore[union-attr]
        said = [int(x) for x in tokens.split()]
        assert float(reward) == (said[0] == int(prompt) + 1) + 0.5 * (said[-1] == 0)


@pytest.mark.parametrize("given", [{"episodes": 2}, {"max_steps": 3}, {"environment": Drawn}, {"greedy": True}])
def test_what_a_transcript_does_not_read_is_refused(given: dict[str, Any]) -> None:
    run = pg.train("ppo", "exact:chain", steps=64, progress=False)
    with pytest.raises(UserError, match=min(given)):
        pg.watch(run, **given)


def test_a_run_may_be_named(tmp_path: Path) -> None:
    pg.train("ppo", "exact:chain", steps=64, out=tmp_path / "run", progress=False)
    assert pg.watch(tmp_path / "run") == pg.watch(pg.load(tmp_path / "run"))
