"""Install each tool in an environment of its own and train a tiny model with LoRA-Pre inside it: `make tools`.

    python tests/external/run.py [TOOL …]

Environments are called ``.venv-TOOL`` and are kept; the runs lie in ``runs/tools``. Everything runs on a CPU and
offline but for the installation, which takes 1 to 7 GB a tool. Exits with 1 if a tool's run fails, or if it did not
step with LoRA-Pre.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEPS = 6
TORCH = "torch==2.13.0"
# What torch, transformers, axolotl and others read: no network, no usage statistics, no GPU, one thread.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "DISABLE_VERSION_CHECK": "1",  # of LLaMA-Factory, for transformers releases after its own
}


@dataclass(frozen=True)
class Tool:
    """How a tool is installed, and the modules that are run with it, as `python -m` takes them.

    install: the arguments of `pip install`, call by call; LoRA-Pre itself comes last.
    runs: command lines of modules that must each step ``STEPS`` times.
    prepare: scripts beside this one that are run before, in the folder of the runs.
    patch: a patch file of `docs/upstream`, applied to the installed packages.
    """

    install: Sequence[Sequence[str]]
    runs: Sequence[str]
    prepare: Sequence[str] = ()
    patch: str | None = None


LIGHTNING = (
    f"examples.lightning_module fit --trainer.max_steps {STEPS} --trainer.accelerator cpu --trainer.logger false "
    "--trainer.enable_checkpointing false --trainer.enable_progress_bar false"
)
# LLaMA-Factory imports torchaudio and torchvision, whose last common release for this torch is the one that pip finds
# here.
LLAMAFACTORY = [
    ["torch==2.9.1", "torchvision==0.24.1"],
    ["torch==2.9.1", "torchvision==0.24.1", "torchaudio==2.9.*", "llamafactory==0.9.5", "transformers==5.6.0"],
]

TOOLS = {
    "axolotl": Tool([[TORCH], [TORCH, "axolotl==0.19.0"]], [f"axolotl.cli.train {HERE / 'axolotl.yaml'}"]),
    "lightning": Tool(
        [[TORCH], ["lightning==2.6.6", "jsonargparse[signatures]"]],
        [LIGHTNING, f"{LIGHTNING} --optimizer lorapre_peft.LoRAPreAdamW --optimizer.momentum_rank 2"],
    ),
    # litgpt 0.5.13 asks for huggingface-hub<1.4, and transformers since 5.4 for 1.5 or later: litgpt comes without its
    # dependencies.
    "litgpt": Tool(
        [
            [TORCH],
            ["lightning==2.6.6", "jsonargparse[signatures]<=4.41", "psutil", "requests"],
            ["--no-deps", "litgpt==0.5.13"],
        ],
        [f"litgpt finetune_lora --config {HERE / 'litgpt.yaml'}"],
        prepare=["litgpt_checkpoint.py"],
    ),
    "llamafactory": Tool(
        LLAMAFACTORY,
        [
            f"llamafactory.cli train {HERE / 'llamafactory_v0.yaml'}",
            f"lorapre_peft.integrations.llamafactory sft {HERE / 'llamafactory_v1.yaml'}",
        ],
        patch="llamafactory_v0.patch",
    ),
}


def install(name: str, tool: Tool) -> Path:
    """Return the environment's Python, after installing what is missing."""
    folder = ROOT / f".venv-{name}"
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        # Files that are gone from the clone would be installed from build/lib, and a patch would be applied twice.
        shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for packages in (*tool.install, [str(ROOT)]):
            subprocess.run(
                [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages], check=True
            )
        if tool.patch:
            packages = subprocess.check_output(
                [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
            )
            patch = ROOT / "docs" / "upstream" / tool.patch
            subprocess.run(["patch", "-p2", "-d", packages.strip(), "-i", patch], check=True)  # -p2: without a/src
        (folder / "installed").touch()
    return python


def run(name: str, tool: Tool) -> list[str]:
    """Return what each run of a tool came to, as a line that starts with "ok" or "FAILED"."""
    python = install(name, tool)
    folder = ROOT / "runs" / "tools" / name
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    for script, arguments in (("tiny.py", ["tiny"]), *((script, []) for script in tool.prepare)):
        subprocess.run([python, HERE / script, *arguments], cwd=folder, env=environment, check=True)
    lines = []
    for i, command in enumerate(tool.runs):
        log = folder / f"run{i}.log"
        with log.open("w") as file:
            arguments = [python, HERE / "watched.py", *command.split()]
            code = subprocess.run(
                arguments, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT
            ).returncode
        found = re.findall(r"LoRA-Pre: (\d+) steps, (\d+) matrices compressed", log.read_text(errors="replace"))
        steps, compressed = map(int, found[-1]) if found else (0, 0)
        verdict = "ok" if code == 0 and steps == STEPS and compressed else "FAILED"
        lines.append(f"{verdict}: {name}, exit code {code}, {steps} steps, {compressed} matrices compressed, {log}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"some of {', '.join(TOOLS)}; all if none is named")
    names = parser.parse_args().tools or list(TOOLS)
    unknown = [name for name in names if name not in TOOLS]
    if unknown:
        parser.error(f"unknown tool {', '.join(unknown)}: expected some of {', '.join(TOOLS)}")
    lines = []
    for name in names:
        lines += run(name, TOOLS[name])
        print("\n".join(lines[-len(TOOLS[name].runs) :]), flush=True)
    return int(any(not line.startswith("ok") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
