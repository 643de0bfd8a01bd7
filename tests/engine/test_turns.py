"""Who makes the next step: shares against max–min fair sharing, by counting rows."""

from collections import Counter

from maskgit.engine.turns import Requester, Turns


def shares(turns, requesters, limit, steps, **options):
    """Return the rows that each requester got in some steps, its jobs never ending."""
    got = Counter()
    for _ in range(steps):
        chosen = turns.choose(requesters, limit, **options)
        assert len(set(chosen)) == len(chosen) <= limit
        got.update(requesters[number] for number in chosen)
    return got


def test_clients_get_equal_shares_and_what_one_leaves_goes_to_the_others():
    small, large, other = Requester("a", 1), Requester("b", 2), Requester("c", 3)
    got = shares(Turns(), [large] * 16 + [small] + [other] * 16, 9, 10)
    assert got == {small: 10, large: 40, other: 40}


def test_a_client_gets_no_more_by_asking_often():
    many, one = [Requester("a", number) for number in range(30)], Requester("b", 99)
    got = shares(Turns(), many + [one] * 8, 16, 60)
    assert got[one] == 8 * 60
    assert {got[requester] for requester in many} == {16}


def test_more_clients_than_rows_take_turns():
    clients = [Requester(number) for number in range(7)]
    assert set(shares(Turns(), clients, 2, 7).values()) == {2}


def test_a_newcomer_is_neither_ahead_nor_behind():
    turns, old, new = Turns(), Requester("a"), Requester("b")
    shares(turns, [old] * 4, 4, 100)
    assert shares(turns, [old] * 4 + [new] * 4, 4, 10) == {old: 20, new: 20}
    # Who was away has saved nothing up.
    shares(turns, [new] * 4, 4, 100)
    assert shares(turns, [old] * 4 + [new] * 4, 4, 10) == {old: 20, new: 20}


def test_low_priority_gets_what_is_left():
    low, high = Requester("a", 1, low=True), Requester("b", 2)
    assert shares(Turns(), [low] * 8 + [high] * 3, 4, 10) == {low: 10, high: 30}
    assert shares(Turns(), [low] * 8 + [high] * 4, 4, 10) == {high: 40}


def test_jobs_of_a_request_go_in_their_order():
    assert Turns().choose([Requester()] * 5, 3) == [0, 1, 2]


def test_where_rows_cost_time_a_small_request_does_not_pay_for_a_large_one():
    small, large = Requester("a", 1), Requester("b", 2)
    assert shares(Turns(), [large] * 16 + [small], 16, 1, narrow=True) == {small: 1, large: 3}
    # Alone, or among as many small ones as there are rows, nothing is left empty.
    assert shares(Turns(), [large] * 16, 16, 1, narrow=True) == {large: 16}
    assert len(shares(Turns(), [Requester(n) for n in range(20)], 16, 1, narrow=True)) == 16
