"""Ranks: processes that learn together, each from its own share of the rows. Every sum over them is here.

A process alone, which has joined no others, gets back what it hands in. Weights are computed over the mask of all
ranks, so gradients add up: the ranks are micro-batches of one batch. What a sum returns has the same bits on every
rank; whatever is decided by it is decided alike, and parameters that begin equal stay equal.

A message between processes costs milliseconds, whatever is in it, because a process that waits has to be woken. So
gradients go in one sum, with all that belongs to them, and other numbers are asked for by collectives: functions whose
questions can be put together, so that what is asked at one place goes in one message.
"""

import builtins
import functools
import hashlib
import io
import os
import pickle
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._pytree import tree_map

from policygrad.errors import UserError, one_line, shortened

TIME_LIMIT = 1800.0  # seconds that a rank waits for the others, unless it is told another number
JOINING = 300.0  # seconds that it waits for them at the start
ANSWERING = 10.0  # seconds that it waits for the store when it ends
BUCKET = 2**22  # numbers of one message; larger sums go in several
ROOM, LARGEST_ROOM = 2**10, 2**16  # bytes of an object that go in one message: at first, and at most


class Lost(UserError):
    """Another rank has ended, or does not answer."""


class Elsewhere(UserError):
    """Another rank has an error that ends all of them."""


Riding = tuple[Any, Callable[[list[Any]], None]]  # what goes with the next message, and who hears that of each rank


@runtime_checkable
class Group(Protocol):
    """Those who learn together. A tensor has the same shape and dtype on each."""

    rank: int
    size: int
    riding: "list[Riding]"

    def reduce(self, x: Tensor, how: str) -> Tensor:
        """The sum or the max of a tensor over the ranks, the same bits on each."""

    def objects(self, x: Any) -> list[Any]:
        """The object of each rank."""


_joined: Group | None = None  # that of this process
_simulating = 0  # simulations that are going on; their threads have groups of their own
_own = threading.local()


def _group() -> Group | None:
    return getattr(_own, "group", _joined) if _simulating else _joined


def size() -> int:
    """The number of ranks; 1 alone."""
    group = _group()
    return 1 if group is None else group.size


def rank() -> int:
    """Which of them this is, from 0."""
    group = _group()
    return 0 if group is None else group.rank


def sum(x: Tensor) -> Tensor:
    """x summed over the ranks."""
    group = _group()
    return x if group is None else _reduced(group, x, "sum")


def maximum(x: Tensor) -> Tensor:
    """The largest x of all ranks, number by number."""
    group = _group()
    return x if group is None else _reduced(group, x, "max")


def _reduced(group: Group, x: Tensor, how: str) -> Tensor:
    """As group.reduce, after a message for what was to ride on it."""
    if group.riding:
        objects(None)
    return group.reduce(x, how)


def sum_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors summed over the ranks, in as few messages as their types and BUCKET allow."""
    group = _group()
    if group is None:
        return list(tensors)
    buckets: list[list[int]] = []
    filling: dict[Any, tuple[list[int], int]] = {}  # the bucket of a type that is not full, and its numbers
    for i, x in enumerate(tensors):
        bucket, count = filling.get((x.dtype, x.device), ([], 0))
        if not bucket or count + x.numel() > BUCKET:
            bucket, count = [], 0
            buckets.append(bucket)
        bucket.append(i)
        filling[x.dtype, x.device] = bucket, count + x.numel()
    found: dict[int, Tensor] = {}
    for bucket in buckets:
        flat = _reduced(group, torch.cat([tensors[i].reshape(-1) for i in bucket]), "sum")
        pieces = flat.split([tensors[i].numel() for i in bucket])
        found |= {i: piece.view_as(tensors[i]) for i, piece in zip(bucket, pieces, strict=True)}
    return [found[i] for i in range(len(tensors))]


def objects(x: Any) -> list[Any]:
    """An object of each rank."""
    group = _group()
    if group is None:
        return [x]
    riding = group.riding[:]
    group.riding.clear()
    found = group.objects(([own for own, _ in riding], x))
    for i, (_, heard) in enumerate(riding):
        heard([each[0][i] for each in found])
    return [own for _, own in found]


def from_first(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, on all ranks. Its error is that of all."""
    with agreed() as told:
        told.own = make() if rank() == 0 else None
    return told.seen[0]


class Told:
    """What a rank tells the others beside an error, and what each of them has told."""

    def __init__(self) -> None:
        self.own: Any = None
        self.seen: list[Any] = []


@contextmanager
def agreed(then: Callable[[list[Any]], None] | None = None) -> Iterator[Told]:
    """A block in which an error of one rank is an error of all: none goes on to wait for it. No sums inside.

    What the block sets as `own` is told with it, in the same message, and `seen` is then that of each rank. then: is
    handed `seen` later, by the next message, on which this rides: a rank goes on until that, and has another's error
    there. Ranks with shards, which wait for one another in each pass of their model, do not put it off.
    """
    group, told = _group(), Told()
    if group is None:
        yield told
        told.seen = [told.own]
        if then is not None:
            then(told.seen)
        return
    own: Exception | None = None
    try:
        yield told
    except Exception as error:
        own = error
    said = None if own is None else one_line(own if isinstance(own, UserError) else f"{type(own).__name__}: {own}", 190)

    def heard(found: list[Any]) -> None:
        failed = [(i, x) for i, (x, _) in enumerate(found) if x is not None]
        if failed and own is not None and failed[0][0] == group.rank:
            raise own
        if failed:
            raise Elsewhere(f"rank {failed[0][0]}: {failed[0][1]}") from own
        told.seen = [x for _, x in found]
        if then is not None:
            then(told.seen)

    group.riding.append(((said, told.own if own is None else None), heard))
    if then is None or own is not None or _lockstep:
        try:
            objects(None)
        except Lost:
            if own is not None:
                raise own from None
            raise


def in_turn(make: Callable[[], Any]) -> Any:
    """make() on rank 0, which may download or write what others then find, and after that on the others."""
    if _group() is None:
        return make()
    made = None
    for first in (True, False):
        with agreed():
            if (rank() == 0) == first:
                made = make()
    return made


def share(count: int) -> slice:
    """Which of `count` things in a row are this rank's: as many as any other has, or one less."""
    each, more = divmod(count, size())
    start = rank() * each + min(rank(), more)
    return slice(start, start + each + (rank() < more))


def apart(numbers: Tensor) -> Tensor:
    """Numbers of what is this rank's alone, such as its groups: no other rank has them."""
    return numbers + (rank() << 32)


def device(name: str) -> str:
    """This rank's device: of several GPUs its own, where none is named."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" and size() > 1 else name


def portion(count: int) -> int:
    """This rank's part of a number: those of all ranks add up to it."""
    own = share(count)
    return own.stop - own.start


def seed(seed: int) -> int:
    """A rank's own seed, for what it samples; alone the seed itself."""
    return seed if size() == 1 else _hashed(f"{seed} {rank()}")


def seed_from(seed_: int, iteration: int) -> int:
    """A rank's own seed of a run that goes on after an iteration with another number of ranks.

    It is not that of the beginning, whose random numbers the run has learned from already.
    """
    return seed(_hashed(f"{seed_} after iteration {iteration}"))


def _hashed(text: str) -> int:
    """A number of 63 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


# Collectives: functions of what all ranks have

P = ParamSpec("P")
R = TypeVar("R")
Steps = Generator[Any, list[Any], R]


class Collective(Generic[P, R]):
    """A function of what all ranks have, written as a generator: `seen = yield own` asks each rank for its own.

    own: a tensor, or anything with tensors in it; seen: a list of that of each rank. Called as a function, it sends a
    message for each of its yields; alone, each is answered by a list of what was yielded. `together` joins the messages
    of several.
    """

    __slots__ = ("__dict__", "steps")  # steps is not in the __dict__, which functools.wraps hands on

    def __init__(self, steps: Callable[P, Steps[R]]) -> None:
        self.steps = steps
        functools.update_wrapper(self, steps)

    def __call__(self, *arguments: P.args, **options: P.kwargs) -> R:
        found: R = _answered(self.steps(*arguments, **options))
        return found

    def __reduce__(self) -> str:
        return str(self.__qualname__)  # type: ignore[attr-defined]


collective = Collective  # as a decorator


def begun(function: Callable[..., R], *arguments: Any) -> Steps[R]:
    """function(*arguments) for `together`, of a collective or a partial of one. Others ask nothing, or on their own."""
    options: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        arguments, options = (*function.args, *arguments), {**function.keywords, **options}
        function = function.func
    if isinstance(function, Collective):
        return function.steps(*arguments, **options)
    return _at_once(functools.partial(function, *arguments, **options))


def _at_once(function: Callable[[], R]) -> Steps[R]:
    """The steps of a function without questions."""
    return function()
    yield  # a generator


def together(*several: Steps[Any]) -> list[Any]:
    """What several collectives return that were begun at once. Their first questions are one message, and so on."""
    found: list[Any] = _answered(joined(*several))
    return found


def joined(*several: Steps[Any]) -> Steps[list[Any]]:
    """The same as one collective, for another one to `yield from`."""
    found: list[Any] = [None] * len(several)
    asked: dict[int, Any] = {}

    def go_on(i: int, seen: Any) -> None:
        try:
            asked[i] = several[i].send(seen)
        except StopIteration as end:
            asked.pop(i, None)
            found[i] = end.value

    for i in range(len(several)):
        go_on(i, None)
    while asked:
        seen = yield dict(asked)
        for i in [*asked]:
            go_on(i, [each[i] for each in seen])
    return found


def _answered(steps: Steps[Any]) -> Any:
    """What a collective returns, each of its questions a message."""
    seen: Any = None
    try:
        while True:
            seen = objects(steps.send(seen))
    except StopIteration as end:
        return end.value


def added(seen: Sequence[Any]) -> Any:
    """The sum of what each rank has, a number or a tensor, in their order: the same bits on each."""
    return functools.reduce(lambda x, y: x + y, seen)


def averaged(weights: Sequence[Tensor], seen: Sequence[Tensor]) -> Tensor:
    """The mean over all ranks of what is a mean on each, by their weights. Alone it is that mean, to the bit."""
    total = added(weights).clamp(min=1e-12)
    mean: Tensor = added([(w / total) * x for w, x in zip(weights, seen, strict=True)])
    return mean


def merged(weights: Sequence[Tensor], means: Sequence[Tensor], squares: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean and the sum of squared distances from it, of those of the ranks (Chan et al. 1979); alone, the same."""
    mean = averaged(weights, means)
    distances = [own + w * (x - mean) ** 2 for w, x, own in zip(weights, means, squares, strict=True)]
    return mean, added(distances)


@collective
def each(x: Any) -> Steps[list[Any]]:
    """x of each rank."""
    return (yield x)


@collective
def total(x: Any) -> Steps[Any]:
    """A number summed over the ranks, in the precision of Python."""
    return added((yield x))


@collective
def some(x: bool) -> Steps[bool]:
    """Whether it is so on some rank."""
    return any((yield x))


@collective
def gathered_all(*columns: Tensor) -> Steps[tuple[list[Tensor], slice]]:
    """The rows of several columns [B, ...] of all ranks, and where this rank's are; in one message."""
    seen = yield columns
    start = builtins.sum(len(one[0]) for one in seen[: rank()])
    whole = [torch.cat(x) if len(x) > 1 else x[0] for x in zip(*seen, strict=True)]
    return whole, slice(start, start + len(columns[0]))


def gathered(x: Tensor) -> tuple[Tensor, slice]:
    """The rows of x [B, ...] of all ranks, one rank after the other, and where this rank's are. B may differ."""
    (rows,), own = gathered_all(x)
    return rows, own


# Shards: tensors of which each rank holds a part (torch's DTensor). What is not one is left as it is.

_lockstep = False


def is_shard(x: Any) -> bool:
    """Whether a tensor is sharded over the ranks."""
    return hasattr(x, "to_local")


def local(x: Any) -> Any:
    """This rank's part of a tensor, in the same memory."""
    return x.to_local() if is_shard(x) else x


def assembled(tree: Any) -> Any:
    """A tree with its shards as whole tensors, on the CPU of rank 0; on other ranks they are None. All ranks take part.

    A tensor that stands in it twice is gathered once.
    """
    found: dict[Any, Any] = {}

    def gathered_once(x: Any) -> Any:
        if not is_shard(x):
            return x
        own = x.to_local()
        place = (own.data_ptr(), x.shape) if own.numel() else id(x)
        if place not in found:
            whole = x.detach().full_tensor()
            found[place] = whole.cpu() if rank() == 0 else None
        return found[place]

    return tree_map(gathered_once, tree)


def cut_as(x: Any, like: Any) -> Any:
    """This rank's part of a whole tensor, sharded as another one of its shape is. Nothing is sent."""
    if not is_shard(like) or not isinstance(x, Tensor) or is_shard(x) or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def in_lockstep(on: bool = True) -> None:
    """Say that a model is sharded: from now on the ranks make as many passes through it as each other."""
    global _lockstep
    _lockstep = on


def as_often(parts: Sequence[Any], idle: Callable[[Any], Any] = lambda x: x) -> list[Any]:
    """The parts of a computation, and where others have more of them and a model is sharded, idle ones after them.

    idle: makes one of the last part, or of None where there is none.
    """
    parts = list(parts)
    if not _lockstep:
        return parts
    count = int(maximum(torch.tensor(len(parts))))
    last = parts[-1] if parts else None
    return parts + [idle(last) for _ in range(count - len(parts))]


def summed_with_last(module: Any, parts: Sequence[Any]) -> Iterator[Any]:
    """The parts of a gradient step. Shards with `once_a_step` sum their gradients in the last backward pass of it."""
    once = [x for x in module.modules() if getattr(x, "once_a_step", False)] if hasattr(module, "modules") else []
    for i, part in enumerate(parts, 1):
        for one in once:
            one.set_requires_gradient_sync(i == len(parts), recurse=False)
        yield part


# Processes


class Processes:
    """The ranks of torch.distributed's process group."""

    def __init__(self, store: Any) -> None:
        self.rank, self.size, self.store = dist.get_rank(), dist.get_world_size(), store
        self.room, self.riding = ROOM, list[Riding]()

    def reduce(self, x: Tensor, how: str) -> Tensor:
        """As Group says."""
        kinds = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
        result = x.detach().clone(memory_format=torch.contiguous_format)
        with _answering():
            dist.all_reduce(result, kinds[how])
        return result

    def objects(self, x: Any) -> list[Any]:
        """As Group says. Objects are pickled, by processes of one job for one another.

        They have different lengths, which no rank knows of the others: one message has room for as much as came before,
        and the rest of longer ones is a second message.
        """
        packed = _packed(x)
        parts = self._bytes(len(packed).to_bytes(8, "little") + packed[: self.room], 8 + self.room)
        lengths = [int.from_bytes(part[:8], "little") for part in parts]
        parts = [part[8:] for part in parts]
        if (more := max(lengths) - self.room) > 0:
            rest = self._bytes(packed[self.room :], more)
            parts = [first + second for first, second in zip(parts, rest, strict=True)]
            self.room = min(LARGEST_ROOM, 1 << (max(lengths) - 1).bit_length())
        return [pickle.loads(part[:n]) for part, n in zip(parts, lengths, strict=True)]

    def _bytes(self, own: bytes, length: int) -> list[bytes]:
        """Those of each rank, with zeros after them up to the length."""
        sent = torch.frombuffer(bytearray(own.ljust(length, b"\0")), dtype=torch.uint8)
        found = [torch.empty_like(sent) for _ in range(self.size)]
        with _answering():
            dist.all_gather(found, sent)
        return [one.numpy().tobytes() for one in found]


class _Pickler(pickle.Pickler):
    """With tensors as their bytes: torch's own way takes a millisecond for each."""

    def reducer_override(self, x: Any) -> Any:
        if type(x) not in (Tensor, torch.nn.Parameter):
            return NotImplemented
        own = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return _unpacked, (own, x.dtype, tuple(x.shape), x.device.type)


def _packed(x: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(x)
    return file.getvalue()


def _unpacked(own: bytes, dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> Tensor:
    """A tensor of another rank, on this rank's device of the same kind."""
    x = torch.frombuffer(bytearray(own), dtype=dtype) if own else torch.empty(0, dtype=dtype)
    return x.reshape(shape).to(device(kind))


_limit = TIME_LIMIT


@contextmanager
def _answering() -> Iterator[None]:
    """Raise Lost where the others do not answer. torch says so by a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        late = "imed out" in str(error)
        closed = re.search("closed|reset|refused|broken pipe", str(error), re.IGNORECASE)
        why = f"no answer within {_limit:,.0f} s (rank_time_limit)" if late else one_line(error, 70)
        why = "its connection was closed" if closed and not late else why
        raise Lost(
            f"rank {rank()} lost another rank ({why}): it has ended, hangs or cannot be reached; torchrun "
            "--max-restarts goes on from the last checkpoint"
        ) from error


def asked_for() -> bool:
    """Whether this process was started as one of several, by torchrun or with its environment variables."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def join() -> None:
    """Learn together with the other processes that torchrun has started, or that have its environment variables.

    Uses the process group that there is, or makes one: gloo, and NCCL for tensors on CUDA. Does nothing in a process
    that was started alone. Raises UserError if the others cannot be reached.
    """
    global _joined
    if _joined is not None or (not asked_for() and not (dist.is_available() and dist.is_initialized())):
        return
    if not dist.is_available():
        raise UserError("this build of torch has no torch.distributed: install one that has, or use one process")
    store = None
    if not dist.is_initialized():
        _check_number()
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            limit = timedelta(seconds=JOINING)
            store, number, count = next(dist.rendezvous("env://", timeout=limit))
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            # After a restart torchrun's store still has the addresses of the processes before.
            store = dist.PrefixStore(f"policygrad {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=limit)
        except (RuntimeError, ValueError) as error:
            said = str(error)
            if "EADDRINUSE" in said or "address already in use" in said:
                raise UserError(
                    f"port {place} is taken: set MASTER_PORT, or torchrun --master-port, to another"
                ) from error
            late = re.search("timed out after|timeout", said, re.IGNORECASE)
            why = f"no answer within {JOINING:,.0f} s" if late else one_line(said, 80)
            raise UserError(
                f"the ranks cannot meet at {place} ({why}): check MASTER_ADDR and MASTER_PORT, and that all "
                f"{os.environ['WORLD_SIZE']} were started"
            ) from error
    _joined = Processes(store)
    limit_to(TIME_LIMIT)


def _check_number() -> None:
    """Raise UserError for a number of this process, or of all, that cannot be: the others would be waited for."""
    number, count = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
        raise UserError(
            f"RANK is {shortened(number, 20)} and WORLD_SIZE {shortened(count, 20)}: ranks are 0 to WORLD_SIZE - 1; "
            "start them by torchrun, which sets both"
        )


def limit_to(seconds: float) -> None:
    """Wait so long for the others, and then raise Lost."""
    global _limit
    if isinstance(_joined, Processes):
        _limit = seconds
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def leave() -> None:
    """Learn alone from now on."""
    global _joined
    in_lockstep(False)
    if isinstance(_joined, Processes) and _joined.store is not None:
        dist.destroy_process_group()
    _joined = None


def check_alike(what: str, own: dict[str, Any]) -> None:
    """Raise UserError, on all ranks, if something is not on each as it is on rank 0. what: whose names these are."""
    first, *others = objects(own)
    for i, other in enumerate(others, 1):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                here, there = (one_line(x.get(name), 40) for x in (first, other))
                raise UserError(f"{what} {name} is {here} on rank 0 and {there} on rank {i}: start all ranks alike")


def speaks(line: str, error: BaseException) -> tuple[bool, str]:
    """Whether this rank is the one to print what ended it, and the line: that of another rank whose error it was.

    Rank 0 does. Another rank tells it why it ends, and prints only what ends it together with rank 0, if that is gone,
    or does not answer: of a network that is cut the store says nothing, for ever.
    """
    group = _joined
    if not isinstance(group, Processes) or group.store is None:
        return True, line
    found: list[tuple[bool, str]] = []
    asking = threading.Thread(target=lambda: found.append(_said_by(group, line, error)), daemon=True)
    asking.start()
    asking.join(ANSWERING)
    return found[0] if found else (True, line)


def _said_by(group: Processes, line: str, error: BaseException) -> tuple[bool, str]:
    """As speaks says, with a store that answers."""
    caused = not isinstance(error, Lost | KeyboardInterrupt)
    try:
        if caused:
            group.store.set("why", f"rank {group.rank}: {line}")
        if group.rank == 0:
            group.store.set("said", "yes")
            return True, line if caused or not _came(group.store, "why") else group.store.get("why").decode()
        return not caused and not _came(group.store, "said"), line
    except RuntimeError:  # the store is gone: it was rank 0's, which has ended
        return isinstance(error, Lost), line


def _came(store: Any, key: str, seconds: float = 2.0) -> bool:
    """Whether a key comes within some seconds."""
    end = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


# Samplers


class Sampling:
    """A rank that samples its share, for a learner elsewhere who has all of them: there are no sums here."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.riding = rank, size, list[Riding]()

    def objects(self, x: Any) -> list[Any]:
        """Raise UserError."""
        raise UserError("a remote sampler is asked for a sum over all rows, which is its learner's: leave samplers out")

    def reduce(self, x: Tensor, how: str) -> Tensor:
        """Raise UserError."""
        return self.objects(x)[0]


def sample_as(rank: int, size: int) -> None:
    """Sample what one of so many ranks would. This process is that sampler, and learns nothing."""
    global _joined
    _joined = Sampling(rank, size) if size > 1 else None


# Threads


class Threads:
    """Ranks that are threads of one process, to see what several would compute."""

    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.board, self.barrier = rank, size, board, barrier
        self.riding = list[Riding]()

    def objects(self, x: Any) -> list[Any]:
        """As Group says."""
        try:
            self.board[self.rank] = x
            self.barrier.wait()
            found = list(self.board)
            self.barrier.wait()
        except threading.BrokenBarrierError as error:
            raise Lost("another simulated rank has failed") from error
        return found

    def reduce(self, x: Tensor, how: str) -> Tensor:
        """As Group says."""
        stacked = torch.stack(self.objects(x.detach()))
        return stacked.sum(0).to(x.dtype) if how == "sum" else stacked.amax(0)


def simulated(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each function returns as a rank of its own, all of them at once in threads. Raises the error of one."""
    global _simulating
    count, results = len(functions), [None] * len(functions)
    board, barrier, errors = [None] * count, threading.Barrier(count), list[tuple[bool, int, BaseException]]()

    def work(i: int) -> None:
        _own.group = Threads(i, count, board, barrier)
        try:
            results[i] = functions[i]()
        except BaseException as error:
            errors.append((isinstance(error, Lost | Elsewhere), i, error))
            barrier.abort()

    _simulating += 1
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        _simulating -= 1
    if errors:
        raise min(errors, key=lambda x: x[:2])[2]
    return results
