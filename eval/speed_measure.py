"""This module times optimizer steps side by side, and measures what they hold and move."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import psutil
import torch
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from eval.peers import TimedMethod
from eval.speed_cases import Problem
from recipes.training import describe, free_memory, held_bytes

LR = 1e-6  # No figure depends on it.
MIN_ROUNDS, MAX_ROUNDS = 5, 40
FREE_BYTES = 2_000_000_000  # No further optimizer is built if the machine has less free memory.
SECONDS_TO_CLEAR_UP = 1.0  # `watchdog` interrupts a block again only after this time.


@dataclass
class Result:
    """Holds what a method's steps took.

    Attributes:
        name, package, version: name of the method, and of its package, with the version.
        muon: whether it is compared with Muon.
        note: what a reader of its figures must know.
        reason: why there are no figures. It is empty if there are.
        seconds: seconds of each timed step.
        median, quartiles: of these seconds.
        ratio: median over the reference's in the same race.
        start_seconds: seconds of building the optimizer and of its first two steps.
        state_bytes, temporary_bytes: bytes of the optimizer's state and of a step's temporaries.
        traffic_bytes: least bytes that the method must read and write in a step (`traffic`).
    """

    name: str
    package: str
    version: str | None
    muon: bool
    note: str = ""
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    median: float | None = None
    quartiles: tuple[float, float] | None = None
    ratio: float | None = None
    start_seconds: float | None = None
    state_bytes: int | None = None
    temporary_bytes: int | None = None
    traffic_bytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes as a dictionary."""
        return asdict(self)


@dataclass
class Runner:
    """Holds a method past its first steps on a problem, ready to be timed.

    Attributes:
        method, problem, optimizer: what steps.
        result: figures of the method.
        turns: rounds of a race in which it takes part.
    """

    method: TimedMethod
    problem: Problem
    optimizer: Optimizer
    result: Result
    turns: int = 0

    def seconds(self) -> float:
        """Return the seconds of one step, from an idle device until the device is idle again."""
        spent = timed(self.optimizer.step, self.problem.device)
        if self.method.overwrites_gradients:
            self.problem.restore_gradients()
        return spent


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that one call takes. On CUDA this is the time between two events."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    stream = torch.cuda.current_stream(device)  # By default events belong to the current device, maybe another.
    begin.record(stream)
    step()
    end.record(stream)
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def temporary_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes that a call had allocated at once, above what was there before.

    On a CPU they come from the profiler's record of the allocator, which sees compiled code too. Under a dispatch mode
    such as `lorapre_peft.memory.peak.AllocationTracker` torch.compile would give up for good.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # Its messages would break the progress bar.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    live = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def traffic(method: TimedMethod, problem: Problem, state: int) -> int | None:
    """Return the least bytes that a step must move: gradients at each reading, and weights and state in and out.

    The result is None for a method that claims no number of readings. state: bytes of the optimizer's state.
    """
    if method.gradient_reads is None:
        return None
    weights = sum(param.nbytes for param in problem.params)
    gradients = sum(param.grad.nbytes for param in problem.params)
    return method.gradient_reads * gradients + 2 * weights + 2 * state


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second, read and written, of a copy on the device that is larger than any cache."""
    size = 1 << (30 if device.type == "cuda" else 28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    spent = [timed(lambda: target.copy_(source), device) for _ in range(8)]
    return 2 * size / statistics.median(spent[2:])


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Interrupt a ``with`` block that takes too long or leaves the machine short of memory.

    It is interrupted between two of torch's operations, by a TimeoutError or MemoryError that is raised in the block.
    Nothing is watched outside the main thread. seconds: how long the block may take.
    """
    deadline = time.perf_counter() + seconds
    raised: list[Exception] = []
    # An error that is raised in the callback of a weak reference is lost. So it is raised again, but not while the
    # block clears up.
    again = 0.0

    def check(*_: Any) -> None:
        nonlocal again
        now = time.perf_counter()
        if now < again:
            return
        if now > deadline:
            raised.append(TimeoutError(f"building it and three steps took more than {seconds:g} s"))
        elif psutil.virtual_memory().available < FREE_BYTES:
            raised.append(MemoryError(f"less than {FREE_BYTES / 1e9:g} GB of memory would be left"))
        if raised:
            again = now + SECONDS_TO_CLEAR_UP
            raise raised[0]

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGALRM, check)
    others = signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)  # A timer may run already, such as a test's.
    try:
        yield
    except Exception as error:
        if raised and error is not raised[0]:  # torch.compile wraps errors while it traces.
            raise raised[0] from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, *others)


def prepare(method: TimedMethod, problem: Problem, patience: float) -> Runner:
    """Build a method's optimizer, take two steps, measure memory in the third, and return the runner.

    patience: seconds for all of this, times the method's own. Raises what the optimizer raises, and TimeoutError or
    MemoryError as `watchdog` does.
    """
    result = Result(method.name, method.package, method.package_version, method.muon, method.note)
    if method.overwrites_gradients:
        problem.keep_gradients()
    try:
        with problem.same_parameters(), watchdog(patience * method.patience):
            start = time.perf_counter()
            optimizer = method.build(problem.model, LR, problem.case.momentum_rank)
            if method.prime:
                method.prime(optimizer)
            runner = Runner(method, problem, optimizer, result)
            for _ in range(2):  # LoRA-Pre's factors start in the first step, and follow from the second on.
                runner.seconds()
            result.start_seconds = time.perf_counter() - start
            result.temporary_bytes = temporary_bytes(optimizer.step, problem.device)
    finally:
        if method.overwrites_gradients:
            problem.restore_gradients()
    result.state_bytes = held_bytes(optimizer)
    result.traffic_bytes = traffic(method, problem, result.state_bytes)
    return runner


class Racer(Protocol):
    """Describes what `race` times: `Runner`, and whatever else has a step, a result and the turns that it takes."""

    result: Result
    turns: int

    def seconds(self) -> float: ...


def race(runners: Sequence[Racer], seconds: float) -> None:
    """Time steps of all runners, interleaved, for about ``seconds``, and fill in their results.

    Each round has an order of its own, drawn at random but the same in every race, so that no method always finds the
    caches as the same other one has left them.
    The first runner is the reference of the ratios. Each runner has an equal share of the time. Slow ones take part in
    fewer rounds, evenly spread, but never in fewer than `MIN_ROUNDS`. A runner whose step fails is out of the race,
    with the reason. If the reference fails, its error is raised.
    """
    reference, racing = runners[0], list(runners)

    def attempt(runner: Racer) -> float:
        try:
            return runner.seconds()
        except Exception as error:
            if runner is reference:
                raise
            runner.result.reason = describe(error)
            racing.remove(runner)
            return math.inf

    for runner in runners:
        share = seconds / len(runners) / max(attempt(runner), 1e-6)
        runner.turns = min(MAX_ROUNDS, max(MIN_ROUNDS, int(share)))
    reference.turns = rounds = max(runner.turns for runner in racing)
    times: dict[int, list[float]] = {id(runner): [] for runner in runners}
    for number in tqdm(range(rounds), desc="rounds", leave=False, delay=1):
        for runner in random.Random(number).sample(racing, len(racing)):
            if (number + 1) * runner.turns // rounds > number * runner.turns // rounds:
                times[id(runner)].append(attempt(runner))
    for runner in racing:
        record(runner.result, times[id(runner)], times[id(reference)])


def record(result: Result, seconds: list[float], reference: list[float]) -> None:
    """Fill in the statistics of timed steps. A reference that has figures already keeps them.

    seconds, reference: seconds of the method's steps and of the reference's in the same race.
    """
    if result.median is not None:
        return
    result.seconds = seconds
    result.median = statistics.median(seconds)
    lower, _, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    result.quartiles = (lower, upper)
    result.ratio = result.median / statistics.median(reference)


def run(
    problem: Problem, reference: TimedMethod, methods: Sequence[TimedMethod], seconds: float, patience: float
) -> list[Result]:
    """Return every method's result on a problem, the reference's first.

    All methods share parameters and gradients. They race together as long as their states fit in memory together, and
    the reference takes part in every race. Raises what the reference raises.

    Args:
        problem: the problem.
        reference: method to which all others are in ratio.
        methods: other methods, those that are compared with Muon last.
        seconds: time of each race.
        patience: as in `prepare`.
    """
    first = prepare(reference, problem, math.inf)
    sitting = [first]
    results = [first.result]

    def close_sitting() -> None:
        if len(sitting) > 1 or first.result.median is None:
            race(sitting, seconds)
        del sitting[1:]
        free_memory()

    runner: Runner | None = None
    for method in tqdm(methods, desc=problem.case.name, leave=False):
        if sitting[-1].method.muon != method.muon:
            runner = None  # It would keep the last method's state in memory.
            close_sitting()  # Muon's slow steps would leave the others few rounds.
        runner, reason, memory = _try(method, problem, patience)
        if memory and len(sitting) > 1:
            close_sitting()
            runner, reason, _ = _try(method, problem, patience)
        if runner is None:
            failed = Result(method.name, method.package, method.package_version, method.muon, method.note, reason)
            results.append(failed)
            free_memory()
        else:
            sitting.append(runner)
            results.append(runner.result)
    close_sitting()
    return results


def _try(method: TimedMethod, problem: Problem, patience: float) -> tuple[Runner | None, str, bool]:
    """Return a runner, or None with the reason, and whether that was a lack of memory.

    No traceback is kept, as it would hold tensors.
    """
    if method.package_version is None:
        return None, f"package {method.package} is not installed: pip install {method.package}", False
    try:
        return prepare(method, problem, patience), "", False
    except Exception as error:
        return None, describe(error), isinstance(error, (torch.OutOfMemoryError, MemoryError))
