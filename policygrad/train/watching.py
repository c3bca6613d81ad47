"""Watching a trained policy: a video of its episodes, or a transcript where there is nothing to see."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from PIL import Image, ImageDraw, ImageFont

from policygrad.control.atari import judged
from policygrad.control.environments import close, label, make_environments
from policygrad.control.evaluation import Evaluation
from policygrad.control.players import agents_of
from policygrad.errors import UserError, ending, one_line, shortened
from policygrad.files import as_path, write_bytes
from policygrad.train.run import Run, arithmetic
from policygrad.train.samples import as_text

SMALLEST = 320  # pixels of a frame's width; smaller frames are enlarged by a whole factor
SUFFIXES = (".mp4", ".gif")
TEXTS = (".txt", ".md")  # of a transcript; another file is something else's, and would be lost
SAMPLES = 4  # prompts of a transcript, or episodes
ACTIONS = 3  # numbers of an action in the caption
COLUMNS = (0.0, 0.2, 0.36, 0.6)  # where its parts begin, in widths, so that nothing moves as numbers grow

Show = Callable[[Image.Image], None]


def watch(
    run: Run | Path | str,
    out: Path | str | None = None,
    *,
    episodes: int = 1,
    seed: int = 1000,
    greedy: bool | None = None,
    max_steps: int | None = None,
    environment: Any = None,
) -> Any:
    """A video of a run's episodes; on language models and exact worlds the text of a transcript.

    run: a run or its directory. out: the file; a video needs one, .mp4 or .gif. The other arguments are those of
    `Run.evaluate`, which plays the episodes, in one environment. Returns their evaluation, or the transcript. Raises
    UserError if the environment has no picture, or no encoder is installed.
    """
    run = run if isinstance(run, Run) else Run.load(run)
    if run.world.kind != "control":
        given = (("episodes", episodes != 1), ("max_steps", max_steps is not None), ("environment", environment))
        for name, is_given in given:
            if is_given:
                raise UserError(f"{name} is for control, and this run is on {run.world.name}: leave it out")
        return transcript(run, out=out, seed=seed, greedy=greedy)
    if out is None:
        raise UserError("a video needs a file: give out, such as video.mp4")
    return video(run, out, episodes, seed=seed, greedy=greedy, max_steps=max_steps, environment=environment)


# A video


def video(
    run: Run,
    out: Path | str,
    episodes: int = 1,
    *,
    seed: int = 1000,
    greedy: bool | None = None,
    max_steps: int | None = None,
    environment: Any = None,
) -> Evaluation:
    """Play episodes as `run.evaluate` does, and write what they look like to an .mp4 or .gif file."""
    out = as_path(out)
    if out.suffix not in SUFFIXES:
        raise UserError(f"out is {shortened(str(out))}: a video is an .mp4 or a .gif file")
    if out.suffix == ".mp4" and find_spec("imageio_ffmpeg") is None:
        raise UserError("an .mp4 needs an encoder: pip install policygrad[video], or write a .gif")
    played = run.world.task if environment is None else environment
    if played is None:
        raise UserError(f"the environment of this run, {run.world.name}, has no name to find it by: give environment")
    filmed = _filmed(run, played, own=environment is None)
    try:
        with _writer(out, filmed.fps) as show:
            filmed.show = show
            found: Any = run.evaluate(episodes, seed=seed, greedy=greedy, max_steps=max_steps, environment=filmed)
            return found
    finally:
        if filmed.around is not None:
            close(filmed.around)


class Filmed(gymnasium.Wrapper):
    """Shows a frame after each reset and step, with a caption: episode, step, return and action.

    around: the vector environment that holds the environment, if it was made to be filmed, as the run makes its own.
    """

    @property
    def is_prepared(self) -> bool:
        """Whether the run's wrappers and masks are around the environment already."""
        return self.around is not None

    def __init__(self, environment: gymnasium.Env, around: VectorEnv | None = None) -> None:
        super().__init__(environment)
        self.around, self.episode, self.steps, self.total = around, 0, 0, 0.0
        self.show: Show = lambda frame: None

    @property
    def fps(self) -> float:
        """Frames in a second."""
        rate = (self.env.metadata or {}).get("render_fps") or 30
        return float(min(max(rate, 1), 120))

    def reset(self, **options: Any) -> Any:
        """Begin an episode."""
        found = self.env.reset(**options)
        self.episode, self.steps, self.total = self.episode + 1, 0, 0.0
        self._film(None)
        return found

    def step(self, action: Any) -> Any:
        """One step."""
        found = self.env.step(action)
        self.steps, self.total = self.steps + 1, self.total + float(found[1])
        self._film(action)
        return found

    def _film(self, action: Any) -> None:
        parts = [f"episode {self.episode}", f"step {self.steps}", f"return {self.total:,.1f}"]
        parts += [] if action is None else [f"action {_action(action)}"]
        self.show(captioned(_frame(self.env), parts))


def _filmed(run: Run, environment: Any, own: bool) -> Filmed:
    """One copy of the environment, that draws what it does. Raises UserError if it cannot."""
    name = one_line(ending(label(environment), 60), 60)
    around = None
    if isinstance(environment, gymnasium.Env):
        single = environment
    elif isinstance(environment, VectorEnv):
        raise UserError(f"{name} is a vector environment, which has no one picture: give environment, a single one")
    else:
        _headless()
        how = run.world.how(None if own else environment)  # type: ignore[attr-defined]
        env_options = judged(environment, how.get("env_options"))
        how |= {"vectorization": "sync", "env_options": {"render_mode": "rgb_array", **env_options}}
        try:
            around = make_environments(environment, 1, **how)
        except UserError as error:
            if "render_mode" in str(error):
                raise _no_picture(name, "it takes no render_mode") from error
            raise
        if agents_of(around) > 1:
            close(around)
            raise UserError(f"{name} is a game of several agents, which cannot be filmed yet: evaluate it, by eval")
        single = around.envs[0]  # type: ignore[attr-defined]
    if single.render_mode != "rgb_array":
        raise _no_picture(name, f"its render_mode is {shortened(single.render_mode, 20)}")
    return Filmed(single, around)


def _frame(environment: gymnasium.Env) -> np.ndarray:
    """What the environment looks like: [height, width, 3] of bytes. Raises UserError if it has no picture."""
    name = one_line(label(environment), 40)
    try:
        frame = environment.render()
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"{name} cannot be drawn: {one_line(error, 120)}") from error
    except Exception as error:  # of the simulator, or of OpenGL
        hint = "; on a machine without a screen MUJOCO_GL=egl or osmesa may help" if "mujoco" in sys.modules else ""
        said = f"{name} cannot be drawn ({type(error).__name__}: {one_line(error, 60)})"
        raise UserError(said + (hint or ": mend its render()")) from error
    array = np.asarray(frame)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        found = "None" if frame is None else f"{array.dtype} of shape {array.shape}"
        raise _no_picture(name, f"render() returned {found}, not bytes [height, width, 3]")
    return array


def _no_picture(name: str, why: str) -> UserError:
    return UserError(f"{name} has no picture: {why}; it must be made with render_mode rgb_array")


def _headless() -> None:
    """Let MuJoCo and pygame draw without a screen, where there is none and nothing else is asked for."""
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # else SDL looks for screens, and says what it misses


def captioned(frame: np.ndarray, parts: list[str]) -> Image.Image:
    """A frame with a line of text below it, its sides even, as video wants them. Small frames are enlarged."""
    image = Image.fromarray(frame)
    factor = max(1, -(-SMALLEST // image.width))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = max(11, image.width // 34)
    width, height = image.width + image.width % 2, image.height + 2 * size
    canvas = Image.new("RGB", (width, height + height % 2), "white")
    canvas.paste(image, (0, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size)
    for column, part in zip(COLUMNS, parts, strict=False):
        draw.text((size // 2 + column * width, image.height + 0.4 * size), part, fill="#222222", font=font)
    return canvas


def _action(action: Any) -> str:
    numbers = np.asarray(action).reshape(-1)
    said = [f"{x:+.1f}" if numbers.dtype.kind == "f" else str(x) for x in numbers[:ACTIONS]]
    return " ".join(said) + (" ..." if len(numbers) > ACTIONS else "")


@contextmanager
def _writer(out: Path, fps: float) -> Iterator[Show]:
    """A function that adds a frame to a video. The file is there once the video is whole."""
    beside = out.with_name(f"{out.stem}.new{out.suffix}")
    write = _Gif(beside, fps) if out.suffix == ".gif" else _Mp4(beside, fps)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)  # a link would lead elsewhere
        yield write.add
        write.close()
        os.replace(beside, out)
    except OSError as error:
        said = error.strerror or one_line(error, 80)
        raise UserError(f"{ending(str(out), 80)} cannot be written ({said}): choose another place") from error
    finally:
        write.abort()
        with suppress(OSError):
            beside.unlink()


class _Mp4:
    """H.264 by imageio-ffmpeg's own encoder."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps, self.size = path, fps, (0, 0)
        self.encoder: Any = None

    def add(self, image: Image.Image) -> None:
        """Add a frame. All have the size of the first."""
        import imageio_ffmpeg

        if self.encoder is None:
            self.size = image.size
            self.encoder = imageio_ffmpeg.write_frames(
                str(self.path), image.size, fps=self.fps, codec="libx264", macro_block_size=2, quality=8
            )
            self.encoder.send(None)
        self.encoder.send(np.asarray(_of_size(image, self.size)).tobytes())

    def close(self) -> None:
        """End the video."""
        if self.encoder is not None:
            self.encoder.close()
            self.encoder = None

    abort = close


class _Gif:
    """Frames of 256 colors."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps, self.frames = path, fps, list[Image.Image]()

    def add(self, image: Image.Image) -> None:
        """Add a frame."""
        size = self.frames[0].size if self.frames else image.size
        self.frames.append(_of_size(image, size).quantize(256, dither=Image.Dither.NONE))

    def close(self) -> None:
        """Write the file, which repeats for ever."""
        first, *others = self.frames
        duration = max(20, round(1000 / self.fps))  # browsers slow down shorter ones
        first.save(self.path, save_all=True, append_images=others, duration=duration, loop=0)

    def abort(self) -> None:
        """Forget the frames."""
        self.frames = []


def _of_size(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size)


# A transcript


def transcript(
    run: Run,
    samples: int | None = None,
    completions: int | None = None,
    *,
    out: Path | str | None = None,
    seed: int = 1000,
    greedy: bool | None = None,
) -> str:
    """What a policy says to its first held-out prompts, with its rewards; on an exact world, its episodes.

    samples: prompts, or episodes. completions: of each prompt. out: a file to write it to, .txt or .md.
    """
    if samples is not None and samples < 1:
        raise UserError(f"samples is {samples}: ask for at least one")
    if out is not None and as_path(out).suffix not in TEXTS:
        raise UserError(f"out is {shortened(str(out))}: a transcript is a .txt or an .md file")
    said = _answers if run.world.kind == "language" else _episodes
    text = said(run, SAMPLES if samples is None else samples, 1 if completions is None else completions, seed, greedy)
    if out is not None:
        try:
            write_bytes(as_path(out), (text + "\n").encode(errors="backslashreplace"))
        except OSError as error:
            raise UserError(
                f"{ending(str(out), 80)} cannot be written ({error.strerror}): choose another place"
            ) from error
    return text


def _answers(run: Run, samples: int, completions: int, seed: int, greedy: bool | None) -> str:
    """Prompts, completions, and their reward with its parts."""
    world: Any = run.world
    held_out, task, last = world.prompts.held_out, world.prompts, world.last
    try:
        if held_out is not None:
            world.prompts = replace(task, held_out=held_out.take(torch.arange(min(samples, len(held_out)))))
        found: Any = run.evaluate(completions, seed=seed, greedy=greedy)
    finally:
        world.prompts, world.last = task, last
    blocks = []
    for i, row in enumerate(found.rows):
        parts = [f"{name} {row[name]:.3f}" for name in found.parts if row.get(name) is not None]
        reward = "no reward applies" if row["reward"] is None else f"reward {row['reward']:.3f}"
        about = ", ".join([reward, *(parts if len(found.parts) > 1 else []), f"{row['tokens']} tokens"])
        prompt, completion = as_text(row["prompt"]), as_text(row["completion"])
        cut = ", cut at max_tokens" if row["cut"] else ""
        title = f"prompt {i // found.completions + 1}, completion {i % found.completions + 1}: {about}{cut}"
        blocks.append("\n".join([f"## {title}", "", _printable(prompt), "", "->", "", _printable(completion)]))
    return "\n\n".join(blocks)


def _printable(text: str) -> str:
    """A text without control characters, which a terminal would obey."""
    return "".join(x if x.isprintable() or x in "\n\t" else f"\\x{ord(x):02x}" for x in text)


def _episodes(run: Run, samples: int, completions: int, seed: int, greedy: bool | None) -> str:
    """Episodes of an exact world, a line for each step; on `exact:tokens`, a line for each completion."""
    if greedy:
        raise UserError(f"{run.world.name} is watched as it is trained, with samples: leave greedy out")
    world: Any = run.world
    with arithmetic(world, run.options.threads):
        rollout = world.sampler(samples, seed, completions=1)(run.policy)
    lines = []
    if world.tokens is not None:
        for obs, action, mask, reward in zip(rollout.obs, rollout.action, rollout.mask, rollout.reward, strict=True):
            tokens = " ".join(str(x) for x in action[mask].tolist())
            lines.append(f"prompt {int(obs[0]) - world.tokens.vocabulary}: {tokens}   reward {reward.sum():.3f}")
        return "\n".join(lines)
    for i in range(len(rollout.mask)):
        mask, reward = rollout.mask[i], rollout.reward[i]
        lines += ["", f"episode {i + 1}: {int(mask.sum())} steps, return {reward[mask].sum():.3f}"]
        lines += [
            f"  step {t + 1:3d}   state {int(rollout.obs[i, t]):3d}   action {int(rollout.action[i, t])}"
            f"   reward {reward[t]:g}"
            for t in range(int(mask.sum()))
        ]
        lines.append("  the episode ended" if rollout.terminated[i].any() else "  cut at the time limit")
    return "\n".join(lines).strip("\n")
