"""What counts memory as it is used: the tracker of allocations and the measurement of a peak."""

from pathlib import Path

import pytest
import torch

from lorapre_peft.memory.peak import AllocationTracker, measure


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tracker_counts_storages_once_until_they_are_freed(device):
    there = torch.zeros(1000, device=device)
    with AllocationTracker() as tracker:
        made = there * 2
        view = made[10:].view(-1, 10)
        made.add_(1)
        there.mul_(2)
        assert (tracker.live_bytes, tracker.peak_bytes) == (4000, 4000)
        del made
        assert tracker.live_bytes == 4000  # the view holds the storage
        del view
        assert (tracker.live_bytes, tracker.peak_bytes) == (0, 4000)
        first, second = (part + 1 for part in there.split(500))
        assert (tracker.live_bytes, tracker.peak_bytes) == (4000, 4000)
        tracker.leave_out(second)
        tracker.leave_out(there)  # not made here: no effect
        assert (tracker.live_bytes, tracker.peak_bytes) == (2000, 4000)
        del first
        assert tracker.live_bytes == 0


def test_tracker_sees_what_autograd_keeps():
    x = torch.ones(1000, requires_grad=True)
    with AllocationTracker() as tracker:
        y = x.exp().sum()
        assert tracker.live_bytes == 4000 + 4  # the result of exp, which nothing but the graph refers to
        y.backward()
        assert tracker.live_bytes == 4000 + 4  # x.grad instead


def test_measure_sees_an_allocation():
    with measure("cpu") as idle:
        pass
    with measure("cpu") as busy:
        block = torch.ones(75_000_000)  # 300 MB
        del block
    with measure("cpu") as after:
        pass
    assert busy.what.startswith("resident memory of the process")
    if "whole life" in busy.what:
        pytest.skip(busy.what)
    assert busy.peak_bytes - idle.peak_bytes == pytest.approx(300e6, rel=0.1)
    assert after.peak_bytes < busy.peak_bytes - 200e6


def test_measure_where_the_peak_cannot_start_anew(monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    with measure("cpu") as measured:
        pass
    assert measured.peak_bytes > 50e6
    assert "whole life" in measured.what
