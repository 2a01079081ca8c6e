"""The benchmark of optimizer steps: what it counts, what it says when a method fails, and that every peer runs."""

import contextlib
import json
import signal
import statistics
import time
import weakref
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from transformers import LlamaConfig

from eval import speed, speed_measure
from eval.methods.method import trained
from eval.peers import PEERS, REFERENCE, TimedMethod, lorapre_methods
from eval.speed_cases import GRADIENT_SCALE, PRESETS, Case, build, gradient
from eval.speed_measure import prepare, run, temporary_bytes, timed, traffic, watchdog
from eval.speed_report import markdown
from lorapre_peft.memory.models import SHAPES
from recipes.training import state_tensors

CPU = torch.device("cpu")
MATRICES = Case("two matrices", 2, shapes=((32, 48, 2),))


@pytest.fixture
def tiny(tmp_path) -> str:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=64
    )
    config.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def uncompiled(monkeypatch):
    """Without torch.compile, whose graphs take minutes to make, and Triton's interpreter, which is as slow.

    test_backends.py has both, and one test here the former.
    """
    methods = [method for method in lorapre_methods(CPU) if not method.name.endswith(("compiled", "triton"))]
    monkeypatch.setattr(speed, "lorapre_methods", lambda device: methods)
    return methods


@pytest.fixture
def brief(monkeypatch):
    """Races of few rounds."""
    monkeypatch.setattr(speed_measure, "MAX_ROUNDS", 5)


class Sleeper(torch.optim.SGD):
    """A step of a known time and temporary, with a state of a known size."""

    def __init__(self, params, seconds: float, entries: int = 0):
        super().__init__(params, lr=0.0)
        self.seconds, self.held = seconds, {"somewhere": [torch.zeros(entries)]}

    def step(self):
        torch.zeros(250_000) + 1  # two at once: 2 MB
        deadline = time.perf_counter() + self.seconds
        while time.perf_counter() < deadline:
            pass
        return self.seconds


def sleeper(name: str, seconds: float, **options) -> TimedMethod:
    return TimedMethod(name, "torch", lambda model, lr, rank: Sleeper(trained(model), seconds, 1000), **options)


# ---- shapes ---------------------------------------------------------------------------------------------------------


def test_adapters_of_a_model(tiny):
    problem = build(Case("tiny", 2, tiny, lora_r=8, layers=2), CPU)
    assert len(problem.params) == 2 * 7 * 2  # layers, linear layers, A and B
    square, up, down = 8 * (32 + 32), 8 * (32 + 64), 8 * (64 + 32)
    assert sum(param.numel() for param in problem.params) == 2 * (4 * square + 2 * up + down)
    assert problem.extent == "2 of 3 layers, float32"
    assert all(param.grad.shape == param.shape and not param.is_meta for param in problem.params)
    assert all(param.is_meta for param in problem.model.parameters() if not param.requires_grad)


def test_weights_of_a_model(tiny):
    problem = build(Case("tiny", 2, tiny, layers=1), CPU)
    assert sorted(tuple(param.shape) for param in problem.params) == [(32, 32)] * 4 + [(32, 64)] + [(64, 32)] * 2


def test_gradients_are_low_rank_plus_noise():
    found = gradient(torch.Size((200, 300)), torch.Generator().manual_seed(0))
    assert found.square().mean().sqrt() == pytest.approx(GRADIENT_SCALE, rel=0.2)
    values = torch.linalg.svdvals(found)
    assert values[3] > 5 * values[4] > 0


def test_presets_name_known_models_and_distinct_cases():
    cases = [case for preset in PRESETS.values() for case in preset]
    assert len({case.name for case in cases}) == len(cases)
    assert {case.model for case in cases if case.model} <= SHAPES.keys()
    assert {case.lora_r for case in PRESETS["adapters-7b"]} == {8, 16, 64, 256}


# ---- figures --------------------------------------------------------------------------------------------------------


def test_ratio_rounds_state_and_temporaries(monkeypatch):
    """With a clock that shows each step's planned time: half the time for each, slow steps in every third round."""
    monkeypatch.setattr(speed_measure, "timed", lambda step, device: step())
    problem = build(MATRICES, CPU)
    first, slow = run(problem, sleeper("reference", 0.001), [sleeper("slow", 0.003)], 0.06, 60)
    assert (len(first.seconds), len(slow.seconds)) == (30, 10)
    assert (first.ratio, slow.ratio) == (1, pytest.approx(3))
    assert (slow.median, *slow.quartiles) == (0.003, 0.003, 0.003)
    assert slow.state_bytes == 4000
    assert slow.temporary_bytes == pytest.approx(2_000_000, rel=0.01)


def test_the_clock_covers_the_whole_call():
    assert 0.02 <= timed(lambda: time.sleep(0.02), CPU) < 5


@pytest.mark.slow
def test_temporaries_of_compiled_code_and_that_it_stays_compiled():
    """A chain of five pointwise operations: two temporaries at once as written, one fused."""

    @torch.compile
    def chain(x):
        return (x * 2).exp().sin().cos() * 2

    x = torch.zeros(500, 500)
    chain(x)
    for _ in range(2):
        assert temporary_bytes(lambda: chain(x), CPU) == pytest.approx(1_000_000, rel=0.01)


def test_state_of_adamw_is_two_moments_and_a_step():
    problem = build(MATRICES, CPU)
    runner = prepare(REFERENCE, problem, 60)
    assert runner.result.state_bytes == 2 * (2 * 32 * 48 * 4 + 4)
    assert {t.shape for t in state_tensors(runner.optimizer)} == {torch.Size((32, 48)), torch.Size(())}


def test_traffic_of_adamw_and_lorapre():
    """By hand, float32 p×q: AdamW reads g, w, m, v and writes w, m, v; LoRA-Pre reads g twice, w once, writes w."""
    problem = build(MATRICES, CPU)
    entries = 2 * 32 * 48
    assert traffic(REFERENCE, problem, 8 * entries) == 28 * entries
    (lorapre,) = [m for m in lorapre_methods(CPU) if m.name == "LoRA-Pre AdamW, eager"]
    factors = 2 * 4 * 2 * 2 * (32 + 48)
    assert traffic(lorapre, problem, factors) == 16 * entries + 2 * factors


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_missing_package_is_named(brief):
    missing = replace(PEERS[0], name="Absent", package="no-such-optimizer")
    _, result = run(build(MATRICES, CPU), REFERENCE, [missing], 0, 60)
    assert result.reason == "package no-such-optimizer is not installed: pip install no-such-optimizer"
    case = dict(name="c", extent="e", kind="weights", matrices=2, parameters=2, momentum_rank=2, not_applicable=[])
    assert f"| Absent | {result.reason} |" in markdown(case | {"results": [result.as_dict()]}, 1e9)


def test_a_failing_method_is_named_and_the_others_are_timed(brief):
    def broken(model, lr, rank):
        raise RuntimeError("first line\nsecond line")

    class Late(torch.optim.SGD):
        steps = 0

        def step(self):
            self.steps += 1
            if self.steps == 6:
                raise ValueError("sixth step")

    late = TimedMethod("late", "torch", lambda model, lr, rank: Late(trained(model), lr=lr))
    methods = [TimedMethod("broken", "torch", broken), late, PEERS[0]]  # three steps to prepare, one before the rounds
    _, failed, stopped, fine = run(build(MATRICES, CPU), REFERENCE, methods, 1, 60)
    assert failed.reason == "RuntimeError: first line"
    assert stopped.reason == "ValueError: sixth step"
    assert stopped.ratio is None
    assert fine.ratio > 0


def test_a_method_that_takes_too_long_is_named(brief):
    _, result = run(build(MATRICES, CPU), REFERENCE, [sleeper("slow", 30)], 0, 0.3)
    assert result.reason == "TimeoutError: building it and three steps took more than 0.3 s"


def test_lack_of_memory_closes_the_sitting_and_tries_again(brief):
    attempts = []

    def build_hungry(model, lr, rank):
        attempts.append(None)
        if len(attempts) == 1:
            raise MemoryError("no room beside the others")
        return Sleeper(trained(model), 0.001)

    methods = [PEERS[0], TimedMethod("hungry", "torch", build_hungry)]
    results = run(build(MATRICES, CPU), REFERENCE, methods, 0, 60)
    assert [result.reason for result in results] == ["", "", ""]
    assert all(result.ratio > 0 for result in results)


def test_the_last_method_is_freed_before_muons_race(brief):
    built = []

    def build_last(model, lr, rank):
        optimizer = Sleeper(trained(model), 0.001)
        built.append(weakref.ref(optimizer))
        return optimizer

    def build_muon(model, lr, rank):
        assert built[0]() is None
        return Sleeper(trained(model), 0.001)

    methods = [TimedMethod("last", "torch", build_last), TimedMethod("muon", "torch", build_muon, muon=True)]
    problem = build(MATRICES, CPU)
    assert [result.reason for result in run(problem, REFERENCE, methods, 0, 60)] == ["", "", ""]


def test_the_watchdog_stops_before_memory_runs_out(monkeypatch):
    monkeypatch.setattr(speed_measure, "FREE_BYTES", 1 << 60)
    with pytest.raises(MemoryError, match="of memory would be left"), watchdog(60):
        timed(lambda: time.sleep(5), CPU)


def test_the_watchdog_names_what_others_wrap():
    def trace():
        try:
            time.sleep(5)
        except TimeoutError:
            raise RuntimeError("while tracing") from None

    with pytest.raises(TimeoutError, match=r"took more than 0\.1 s"), watchdog(0.1):
        trace()


def test_the_watchdog_gives_back_the_timer_of_others():
    before = signal.setitimer(signal.ITIMER_REAL, 100, 7)
    try:
        with watchdog(60):
            pass
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 90 < left <= 100
        assert interval == 7
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_the_watchdog_lets_a_block_clear_up():
    cleared = []

    def step():
        try:
            time.sleep(5)
        finally:
            time.sleep(0.3)  # several of its ticks
            cleared.append(True)

    with pytest.raises(TimeoutError), watchdog(0.1):
        step()
    assert cleared


def test_the_watchdog_interrupts_again_what_swallows_it():
    def step():
        with contextlib.suppress(TimeoutError):
            time.sleep(60)
        time.sleep(60)

    with pytest.raises(TimeoutError), watchdog(0.1):
        step()


def test_names_of_no_method_and_devices_that_cannot_be_timed_are_refused(capsys, uncompiled):
    wrong = {
        ("--methods", "LoRA-Pre Adam,"): "--methods 'LoRA-Pre Adam,': expected the beginning of one of AdamW, fused; ",
        ("--device", "mps"): "--device mps: expected cpu or cuda",
        ("--quick", "--preset", "smollm2"): "not allowed with argument",
    }
    for argv, message in wrong.items():
        with pytest.raises(SystemExit):
            speed.main(["--device", "cpu", *argv])
        assert message in capsys.readouterr().err


# ---- everything together --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_r", [8, None])
def test_every_peer_steps_on_a_model_and_leaves_it_as_it_was(tiny, uncompiled, lora_r):
    problem = build(Case("tiny", 2, tiny, lora_r=lora_r, layers=1), CPU)
    count = len(problem.params)
    gradients = [param.grad.clone() for param in problem.params]
    for method in [REFERENCE, *uncompiled, *PEERS]:
        if problem.case.kind not in method.kinds or method.package_version is None:
            continue
        before = [param.detach().clone() for param in problem.params]
        runner = prepare(method, problem, 60)
        assert runner.seconds() > 0
        changed = [not torch.equal(old, new) for old, new in zip(before, problem.params)]
        assert sum(changed) == (count // 2 if method.name == "LoRA-FA" else count), method.name
        assert len(problem.params) == count
        assert all(torch.equal(old, param.grad) for old, param in zip(gradients, problem.params)), method.name
        assert runner.result.state_bytes > 0


def test_command_line_writes_json_tables_and_plots(tmp_path, monkeypatch, capsys, tiny, uncompiled, brief):
    cases = [Case("tiny adapters", 2, tiny, lora_r=8, layers=1)]
    cases += [Case(f"rank {k}", k, shapes=((16, 16, 2),), sweep="rank", value=k) for k in (1, 2)]
    monkeypatch.setattr(speed, "QUICK", cases)
    monkeypatch.setattr(speed, "copy_bandwidth", lambda device: 1e9)
    arguments = ["--quick", "--device", "cpu", "--seconds", "0", "--output", str(tmp_path / "out")]
    speed.main(arguments)
    table = capsys.readouterr().out
    assert "### tiny adapters: 1 of 3 layers, float32, 14 matrices" in table
    assert "### By rank" in table
    assert "Not for adapters: GaLore." in table
    assert "| small, r=8, 64 tokens: RunLoRA (" in table
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    assert summary["environment"]["packages"]["torch"] == version("torch")
    assert summary["environment"]["processor"]
    assert summary["environment"]["threads"] == torch.get_num_threads()
    for case in summary["cases"]:
        assert case["results"][0]["name"] == REFERENCE.name
        for result in case["results"]:
            assert bool(result["reason"]) != bool(result["ratio"])
            if result["ratio"]:
                assert len(result["seconds"]) >= 5
                assert result["median"] == statistics.median(result["seconds"])
    for name in ("speed.png", "sweeps.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(speed, "measure_case", lambda *_: pytest.fail("measured again"))
    speed.main([*arguments, "--resume"])
    assert capsys.readouterr().out == table
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(torch, "get_num_threads", lambda: 99)
        with pytest.raises(SystemExit):
            speed.main([*arguments, "--resume"])
    said = capsys.readouterr().err
    assert "'threads': 99" in said
    assert "give another --output" in said
    with pytest.raises(SystemExit):
        speed.main([*arguments, "--seconds", "9", "--resume"])  # the table would mix cases of two lengths
    assert "'seconds': 9.0" in capsys.readouterr().err
