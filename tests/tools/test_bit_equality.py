"""`tests/helpers/bit_equality.py` finds no difference where there is none, and says where there is one."""

import copy
import dataclasses

import pytest
from bit_equality import CASES, differences, record

NAME = "muon, bfloat16 stochastic"


@pytest.fixture(scope="module")
def recording():
    return record([NAME])


def test_a_run_repeated_is_equal_in_every_bit(recording):
    assert recording["cases"]
    assert differences(recording, record([NAME])) == []


def test_another_seed_of_the_rounding_changes_weights_and_is_named(recording, monkeypatch):
    monkeypatch.setitem(CASES, NAME, dataclasses.replace(CASES[NAME], options={"seed": 2}))
    found = differences(recording, record([NAME]))
    assert len(found) == len(recording["cases"])
    assert all(line.startswith(NAME) and "parameter 0" in line for line in found)


def test_a_case_that_one_recording_lacks_is_named(recording):
    fewer = copy.deepcopy(recording)
    name, _ = fewer["cases"].popitem()
    assert differences(recording, fewer) == [f"{name}: only in the recording before"]
    assert differences(fewer, recording) == [f"{name}: only in the recording after"]


def test_recordings_of_two_machines_are_refused(recording):
    other = recording | {"machine": recording["machine"] | {"instructions": "DEFAULT"}}
    with pytest.raises(ValueError, match="record both commits on one machine"):
        differences(recording, other)
