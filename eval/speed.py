"""This module times optimizer steps on real shapes: LoRA-Pre on each of its backends, and its peers.

    python -m eval.speed --preset adapters-7b weights-7b

Gradients are synthetic, of low rank plus noise, and nothing is downloaded. The methods of a case share parameters and
gradients. They step in turn, after warm-up steps that start states and compile. Times are shown in ratio to fused
AdamW's. One JSON file for each case goes to the output folder, and then one of all cases with tables and plots. Times
on a CPU mean something only if nothing else runs there. ``--preset layers`` times no optimizer, but the forward and
backward pass of a layer under LoRA, by PEFT and by RunLoRA.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from eval.peers import PEERS, REFERENCE, TimedMethod, lorapre_methods
from eval.speed_cases import PRESETS, QUICK, Case, build
from eval.speed_layers import LAYERS, QUICK_LAYERS, LayerCase, layers_markdown, measure_layer
from eval.speed_measure import copy_bandwidth, run
from eval.speed_report import markdown, plot_cases, plot_sweeps, sweep_markdown, sweeps
from recipes.training import commit, environment, free_memory, processor, write_atomically

LAYER_PRESET = "layers"


def compared(device: torch.device) -> list[TimedMethod]:
    """Return what is timed beside the reference: LoRA-Pre on each backend that runs on this device, and its peers."""
    return [*lorapre_methods(device), *PEERS]


def measure_case(
    case: Case, device: torch.device, seconds: float, patience: float, names: Sequence[str] = ("",)
) -> dict[str, Any]:
    """Return a case's description and every method's result, ready for JSON.

    Args:
        case: the case. A sweep measures only LoRA-Pre AdamW and the reference.
        device: device that steps.
        seconds: time for the timed steps.
        patience: seconds for building an optimizer and its first steps (`eval.speed_measure.prepare`).
        names: beginnings of the names of the methods that are measured.
    """
    methods = [method for method in compared(device) if method.name.startswith(tuple(names))]
    if case.sweep:
        methods = [method for method in methods if method.package == "lorapre-peft" and not method.muon]
    applicable = sorted((m for m in methods if case.kind in m.kinds), key=lambda method: method.muon)
    problem = build(case, device)
    results = run(problem, REFERENCE, applicable, seconds, patience)
    return asdict(case) | {
        "commit": commit(),
        "kind": case.kind,
        "extent": problem.extent,
        "matrices": len(problem.params),
        "parameters": sum(param.numel() for param in problem.params),
        "not_applicable": [method.name for method in methods if method not in applicable],
        "results": [result.as_dict() for result in results],
    }


def surroundings(device: torch.device) -> dict[str, Any]:
    """Return `environment`, the processor's name, the methods' packages, and the bandwidth of a copy on the device."""
    return environment() | {
        "processor": processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "packages": {method.package: method.package_version for method in (REFERENCE, *compared(device))},
        "copy_bytes_per_second": copy_bandwidth(device),
    }


def report(summary: dict[str, Any], folder: Path) -> str:
    """Return all tables as Markdown, and write them and the plots into the folder."""
    around, cases, layers = summary["environment"], summary["cases"], summary["layers"]
    machine = f"{around['processor']}, threads: {around['threads']}"
    if around["device"] != "cpu":
        machine = f"{around['device']}, {machine}"
    models = [case for case in cases if not case["sweep"]]
    # A folder that was resumed may have several commits.
    commits = dict.fromkeys(str(case["commit"])[:12] for case in [*cases, *layers])
    parts = [
        f"{machine}; a copy on the device: {around['copy_bytes_per_second'] / 1e9:.1f} GB/s; commit "
        f"{', '.join(commits)}\n",
        *(markdown(case, around["copy_bytes_per_second"]) for case in models),
        *(sweep_markdown(group) for group in sweeps(cases)),
        *([layers_markdown(layers)] if layers else []),
    ]
    if models:
        plot_cases(models, folder / "speed.png", machine)
    if len(models) < len(cases):
        plot_sweeps(cases, folder / "sweeps.png", machine)
    text = "\n".join(parts)
    (folder / "speed.md").write_text(text, encoding="utf-8")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. argv: its arguments. None stands for the process's own."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--preset",
        nargs="+",
        choices=[*PRESETS, LAYER_PRESET],
        default=[*PRESETS, LAYER_PRESET],
        help="which shapes (default: all)",
    )
    which.add_argument(
        "--quick", action="store_true", help="instead: one layer of SmolLM2, to see that everything runs"
    )
    parser.add_argument(
        "--methods", nargs="+", default=[""], metavar="NAME", help="those whose names begin so (default: all)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=6, help="of timing per case, Muon apart (default 6)")
    parser.add_argument(
        "--patience",
        type=float,
        default=10,
        help="seconds for building an optimizer and its first three steps, after which it is reported as too slow "
        "(default 10)",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/speed"), help="folder (default runs/speed)")
    parser.add_argument("--resume", action="store_true", help="keep the cases that the folder has from an earlier run")
    args = parser.parse_args(argv)

    device = torch.device(args.device)
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device {args.device}: expected cpu or cuda, whose steps can be timed")
    known = [method.name for method in (REFERENCE, *compared(device))]
    for beginning in args.methods:
        if not any(name.startswith(beginning) for name in known):
            parser.error(f"--methods {beginning!r}: expected the beginning of one of {'; '.join(known)}")
    presets = PRESETS | {LAYER_PRESET: LAYERS}
    cases: list[Case | LayerCase] = [*QUICK, *QUICK_LAYERS]
    if not args.quick:
        cases = [case for preset in args.preset for case in presets[preset]]
    files = {case: args.output / f"{case.name.replace(' ', '_').replace('/', '_')}.json" for case in cases}
    args.output.mkdir(parents=True, exist_ok=True)
    around = surroundings(device)
    # The cases of one folder must be measured alike, as they are shown in one table.
    where = {name: around[name] for name in ("processor", "device", "threads")}
    where |= {"torch": around["versions"]["torch"]}
    where |= {name: getattr(args, name) for name in ("seconds", "patience", "methods")}
    summary = {"environment": around, "options": vars(args) | {"output": str(args.output)}, "cases": [], "layers": []}
    finished = {case for case, file in files.items() if args.resume and file.exists()}
    for case in finished:
        found = json.loads(files[case].read_text())["where"]
        if found != where:
            parser.error(
                f"{files[case]} is from {found}, this is {where}: give another --output, or leave out --resume"
            )
    for case in tqdm(cases, desc="cases"):
        if case not in finished:
            if isinstance(case, LayerCase):
                measured = measure_layer(case, device, args.seconds) | {"commit": commit()}
            else:
                measured = measure_case(case, device, args.seconds, args.patience, args.methods)
            measured |= {"where": where}
            write_atomically(files[case], json.dumps(measured, indent=2))
            free_memory()
        found = json.loads(files[case].read_text())
        summary["layers" if isinstance(case, LayerCase) else "cases"].append(found)
    (args.output / "results.json").write_text(json.dumps(summary, indent=2))
    print(report(summary, args.output))


if __name__ == "__main__":
    main()
