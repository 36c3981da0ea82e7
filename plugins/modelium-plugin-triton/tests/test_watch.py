"""Whether Triton waits for a process that is dead, as told by its processes over time."""

import pytest
from modelium_plugin_triton.measure import Family, Stub
from modelium_plugin_triton.watch import UNNOTICED_S, LoadWatch

STEP_S = 1.0


def family(stubs: str, zombies: str = "") -> Family:
    """`m1 n2`: a stub of model m with pid 1, one of n with pid 2."""
    made = [Stub((int(word[1:]), 0), word[0], completing=False) for word in stubs.split()]
    return Family(stubs=tuple(made), zombies=tuple(map(int, zombies.split())))


LONG = int(UNNOTICED_S / STEP_S) + 2


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    ("before", "looks", "in_vain"),
    [
        pytest.param(family(""), [family("m1")] * LONG, False, id="it lives"),
        pytest.param(family(""), [family("m1")] + [family("", "1")] * LONG, True, id="it died"),
        pytest.param(family(""), [family("m1")] + [family("", "1")] * 3 + [family("m2")] * LONG, False, id="noticed"),
        pytest.param(family(""), [family("", "1")] * LONG, True, id="died before it was seen"),
        pytest.param(family(""), [family("")] * LONG, False, id="it has no process yet"),
        pytest.param(family("", "1"), [family("", "1")] * LONG, False, id="died before the load"),
        pytest.param(family("n1"), [family("", "1")] * LONG, False, id="another's that was there before"),
        pytest.param(family(""), [family("n1")] + [family("", "1")] * LONG, False, id="another's that was seen"),
        pytest.param(family("m1"), [family("m1 m2")] + [family("m1", "2")] * LONG, True, id="while the old one serves"),
    ],
)
def test_a_load_in_vain(before: Family, looks: list[Family], in_vain: bool, alone: bool) -> None:
    watch = LoadWatch("m", before)
    found = [watch.is_in_vain(look, number * STEP_S, alone=alone) for number, look in enumerate(looks)]
    assert found[-1] is in_vain
    assert not any(found[: int(UNNOTICED_S / STEP_S)])


def test_an_unseen_death_is_anothers_while_this_load_has_a_process_and_is_not_alone() -> None:
    watch = LoadWatch("m", family(""))
    looks = [family("m1", "2")] * LONG
    assert not any(watch.is_in_vain(look, number * STEP_S, alone=False) for number, look in enumerate(looks))


@pytest.mark.parametrize("behind", [False, True])
def test_a_load_behind_one_that_is_in_vain_is_so_too(behind: bool) -> None:
    dead = family("", "1")
    watch = LoadWatch("m", dead, behind=behind)
    found = [watch.is_in_vain(dead, number * STEP_S, alone=False) for number in range(LONG)]
    assert found[-1] is behind
