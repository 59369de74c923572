"""Branches of a CUDA graph: what depends on what keeps its order, and nothing else has to."""

from hypothesis import given, settings
from hypothesis import strategies as st

from iql_torchrl.training.branches import Schedule

ranges = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 20), st.integers(1, 6)).map(lambda r: (r[0], r[1], r[1] + r[2])),
    max_size=3,
)


def conflict(some, others):
    return any(s == t and a < d and c < b for s, a, b in some for t, c, d in others)


def scheduled(launches, most):
    """The launches that end before each one begins, by the order in branches and by what is waited for."""
    schedule, last, before, branches = Schedule(most), {}, [], []
    for number, (reads, writes) in enumerate(launches):
        branch, waits = schedule.add(reads, writes)
        found = set()
        for one in [*waits, *([last[branch]] if branch in last else [])]:
            found |= before[one] | {one}
        last[branch] = number
        before.append(found)
        branches.append(branch)
    return before, branches


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(ranges, ranges), max_size=40), st.sampled_from([1, 2, 4, 16]))
def test_a_launch_waits_for_all_that_it_conflicts_with_whatever_the_number_of_branches(launches, most):
    before, branches = scheduled(launches, most)
    assert not branches or max(branches) < most
    for later, (reads, writes) in enumerate(launches):
        for earlier, (other_reads, other_writes) in enumerate(launches[:later]):
            if conflict(writes, other_reads + other_writes) or conflict(reads, other_writes):
                assert earlier in before[later]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(ranges, ranges), max_size=12))
def test_with_branches_enough_a_launch_waits_for_nothing_else(launches):
    before, _ = scheduled(launches, len(launches) + 1)
    needed = []
    for later, (reads, writes) in enumerate(launches):
        found = set()
        for earlier, (other_reads, other_writes) in enumerate(launches[:later]):
            if conflict(writes, other_reads + other_writes) or conflict(reads, other_writes):
                found |= needed[earlier] | {earlier}
        needed.append(found)
    assert before == needed


def test_what_a_launch_allocates_is_written_by_it():
    schedule = Schedule()
    schedule.add([], [])
    schedule.wrote([(7, 0, 4)])
    schedule.add([], [])
    branch, waits = schedule.add([(7, 0, 4)], [])
    assert branch == 0 and waits == []  # behind the first, in its branch
