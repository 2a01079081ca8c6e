"""Runs that were killed while they saved, and checkpoints that are broken or another optimizer's."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from killed_saves import FILES, killed_trainer
from trainers import assert_same_end, inner
from transformers.trainer_utils import get_last_checkpoint

from lorapre_peft import last_complete_checkpoint


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder for each file of FILES, of a run that was killed while it wrote that file."""
    folder = tmp_path_factory.mktemp("killed")
    script = Path(__file__).parents[1] / "helpers" / "killed_saves.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (script.parents[2], script.parents[1])))}
    subprocess.run([sys.executable, script, folder], check=True, env=environment)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = killed_trainer(tmp_path_factory.mktemp("uninterrupted"))
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore:.*is not complete")
@pytest.mark.parametrize("name", FILES)
def test_a_run_killed_while_it_saves_resumes_from_the_checkpoint_before(killed, uninterrupted, name):
    folder = killed / name
    assert Path(get_last_checkpoint(folder)).name == "checkpoint-4"  # what resume_from_checkpoint=True takes
    checkpoint = last_complete_checkpoint(folder)
    assert Path(checkpoint).name == ("checkpoint-4" if name == "rotation" else "checkpoint-2")
    resumed = killed_trainer(folder)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_same_end(resumed, uninterrupted)
    assert Path(last_complete_checkpoint(folder)).name == "checkpoint-6"


def test_a_checkpoint_that_is_written_anew_may_be_broken_with_its_last_file_in_place(uninterrupted, tmp_path):
    """A resumed run passes the step of an older checkpoint and writes into its folder."""
    saved = Path(uninterrupted.args.output_dir)
    names = {path.name for path in (saved / "checkpoint-4").iterdir()} - {"README.md"}
    assert names > {*FILES} - {"rotation"}
    for name in names:
        folder = tmp_path / name
        for step in (2, 4):
            shutil.copytree(saved / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        os.truncate(folder / "checkpoint-4" / name, 10)
        with pytest.warns(
            UserWarning, match=rf"checkpoint-4 is not complete \({re.escape(name)}\): it is passed over"
        ):
            assert Path(last_complete_checkpoint(folder)).name == "checkpoint-2"


@pytest.mark.parametrize("broken", ["shard", "index", "both"])
def test_shards_of_fsdp_are_checked_by_their_index(tmp_path, broken):
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        dcp.save({"x": torch.arange(100.0)}, checkpoint_id=folder / "optimizer_0", no_dist=True)
        (folder / "trainer_state.json").write_text("{}")
    assert Path(last_complete_checkpoint(tmp_path)).name == "checkpoint-2"
    (shard,) = (folder / "optimizer_0").glob("*.distcp")
    if broken != "index":
        os.truncate(shard, 10)
    if broken != "shard":
        os.truncate(folder / "optimizer_0" / ".metadata", 0)
    name = shard.name if broken == "shard" else ".metadata"
    with pytest.warns(UserWarning, match=rf"checkpoint-2 is not complete \({re.escape(name)}\)"):
        assert Path(last_complete_checkpoint(tmp_path)).name == "checkpoint-1"


def test_a_file_that_is_a_link_to_nowhere_is_broken(tmp_path):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-2" / "config.json").symlink_to(tmp_path / "nowhere")
    with pytest.warns(UserWarning, match=r"checkpoint-2 is not complete \(config.json\)"):
        assert Path(last_complete_checkpoint(tmp_path)).name == "checkpoint-1"


def test_checkpoints_are_ordered_by_number_and_others_are_no_checkpoints(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "old-checkpoint-11"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    assert Path(last_complete_checkpoint(tmp_path)).name == "checkpoint-10"


def foreign_state(folder):
    """What another optimizer would have left under the same name."""
    params = [torch.nn.Parameter(torch.ones(3, 2))]
    params[0].grad = torch.ones(3, 2)
    other = torch.optim.AdamW(params)
    other.step()
    torch.save(other.state_dict(), folder / "optimizer.pt")


def another_rank(folder):
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    for group in saved["param_groups"]:
        group["momentum_rank"] = 3
    torch.save(saved, folder / "optimizer.pt")


BROKEN = {
    "truncated": (lambda folder: os.truncate(folder / "optimizer.pt", 1000), RuntimeError, "PytorchStreamReader"),
    "empty": (lambda folder: os.truncate(folder / "optimizer.pt", 0), EOFError, ""),
    "of another optimizer": (foreign_state, ValueError, "another optimizer's, expected LoRAPreAdamW's"),
    "of another rank": (another_rank, ValueError, "saved with momentum_rank=3, .* has momentum_rank=2, .* Build"),
}


@pytest.mark.parametrize(("break_it", "error", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_optimizer_file_is_refused_before_a_step(uninterrupted, tmp_path, break_it, error, message):
    shutil.copytree(Path(uninterrupted.args.output_dir) / "checkpoint-4", tmp_path / "checkpoint-4")
    break_it(tmp_path / "checkpoint-4")
    trainer = killed_trainer(tmp_path)
    with pytest.raises(error, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step in (0, 4)
    assert not inner(trainer.optimizer).state


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_resuming_without_optimizer_state_is_said(uninterrupted, tmp_path, name):
    """Trainer starts the momenta and the schedule anew without a word if either file is missing."""
    shutil.copytree(Path(uninterrupted.args.output_dir) / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / name).unlink()
    with pytest.warns(UserWarning, match="resumes at step 4 without optimizer state: the momenta start anew"):
        killed_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
