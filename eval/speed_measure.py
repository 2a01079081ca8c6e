"""Time optimizer steps side by side, and measure what they hold and move."""

from __future__ import annotations

import contextlib
import math
import os
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

LR = 1e-6  # no figure depends on it
MIN_ROUNDS, MAX_ROUNDS = 5, 40
FREE_BYTES = 2_000_000_000  # of the machine's memory, below which no further optimizer is built
SECONDS_TO_CLEAR_UP = 1.0  # of a block that `watchdog` has interrupted, before it is interrupted again


@dataclass
class Result:
    """What a method's steps took. seconds: per timed step; ratio: median over the reference's in the same race.

    start_seconds: building and the first two steps. traffic_bytes: the least that the method must read and write in a
    step (`traffic`). reason: why there are no figures.
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
        return asdict(self)


@dataclass
class Runner:
    """A method past its first steps on a problem, ready to be timed."""

    method: TimedMethod
    problem: Problem
    optimizer: Optimizer
    result: Result
    turns: int = 0  # rounds of a race in which it takes part

    def seconds(self) -> float:
        """Return the seconds of one step, from an idle device until the device is idle again."""
        spent = timed(self.optimizer.step, self.problem.device)
        if self.method.overwrites_gradients:
            self.problem.restore_gradients()
        return spent


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that one call takes; on CUDA the time between events, without synchronisation."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def temporary_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes that a call had allocated at once above what was there before.

    On a CPU they come from the profiler's record of the allocator: it sees compiled code too, which a dispatch mode
    such as `lorapre_peft.memory.peak.AllocationTracker` makes torch.compile give up for good.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its start and stop messages would cut through the progress bar
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    live = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def traffic(method: TimedMethod, problem: Problem, state: int) -> int | None:
    """Return the bytes that a step must move at least: gradients per reading, weight and state in and out."""
    if method.gradient_reads is None:
        return None
    weights = sum(param.nbytes for param in problem.params)
    gradients = sum(param.grad.nbytes for param in problem.params)
    return method.gradient_reads * gradients + 2 * weights + 2 * state


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second, read and written, of a device copy that is larger than any cache."""
    size = 1 << (30 if device.type == "cuda" else 28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    spent = [timed(lambda: target.copy_(source), device) for _ in range(8)]
    return 2 * size / statistics.median(spent[2:])


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Interrupt a block that takes too long or leaves the machine short of memory, between two of torch's operations.

    Raises TimeoutError or MemoryError in the block. Nothing is watched outside the main thread.
    """
    deadline = time.perf_counter() + seconds
    raised: list[Exception] = []
    # What is raised in a weak reference's callback is lost: so it is raised again, but not while the block clears up.
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
    others = signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)  # a timer that runs already, such as a test's
    try:
        yield
    except Exception as error:
        if raised and error is not raised[0]:  # torch.compile wraps what is raised while it traces
            raise raised[0] from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, *others)


def prepare(method: TimedMethod, problem: Problem, patience: float) -> Runner:
    """Build a method's optimizer, take two steps, and measure memory in the third. Raises what they raise."""
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
            for _ in range(2):  # LoRA-Pre starts its factors in the first, and follows with them from the second on
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
    """What `race` times: `Runner`, and whatever else has a step, a result, and the turns it takes."""

    result: Result
    turns: int

    def seconds(self) -> float: ...


def race(runners: Sequence[Racer], seconds: float) -> None:
    """Time steps of all runners, interleaved, for about ``seconds``; the first runner is the reference of the ratios.

    Each has an equal share of the time: slow ones take part in fewer rounds, evenly spread, never less than
    `MIN_ROUNDS`. A runner whose step fails is out of the race, with the reason; the reference's error is raised.
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
        start = number % len(racing)
        for runner in racing[start:] + racing[:start]:
            if (number + 1) * runner.turns // rounds > number * runner.turns // rounds:
                times[id(runner)].append(attempt(runner))
    for runner in racing:
        record(runner.result, times[id(runner)], times[id(reference)])


def record(result: Result, seconds: list[float], reference: list[float]) -> None:
    """Fill in the statistics of timed steps; those of a reference that has figures already only serve the ratio."""
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

    All share parameters and gradients. They race together as far as their states fit in memory together; the reference
    takes part in every race. Raises what the reference raises.
    """
    first = prepare(reference, problem, math.inf)
    sitting = [first]
    results = [first.result]

    def close_sitting() -> None:
        if len(sitting) > 1 or first.result.median is None:
            race(sitting, seconds)
        del sitting[1:]
        free_memory()

    for method in tqdm(methods, desc=problem.case.name, leave=False):
        if sitting[-1].method.muon != method.muon:
            close_sitting()  # Muon's steps are slower by far and would leave the others few rounds
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

    No traceback is kept that would hold tensors.
    """
    if method.package_version is None:
        return None, f"package {method.package} is not installed: pip install {method.package}", False
    try:
        return prepare(method, problem, patience), "", False
    except Exception as error:
        return None, describe(error), isinstance(error, (torch.OutOfMemoryError, MemoryError))
