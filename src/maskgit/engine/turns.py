"""Whose turn it is: the rows of a batch, shared fairly between clients and between the requests of each.

Source: max–min fair sharing (Demers, Keshav, Shenker, SIGCOMM 1989), a row of a step being what is shared.
"""

from collections import Counter, deque
from collections.abc import Hashable, Sequence
from typing import NamedTuple

# Where a step's time grows with its rows: the rows of a step for each row of the smallest request.
ROWS_PER_ROW = 4


class Requester(NamedTuple):
    """For whom a job is done.

    Attributes:
        client: jobs of different clients get equal shares.
        request: jobs of different requests of a client get equal shares of its share.
        low: whether it gets only the rows that no other requester wants.
    """

    client: Hashable = ""
    request: Hashable = 0
    low: bool = False


ANYONE = Requester()


class Turns:
    """Remembers who had how many rows, for as long as they have jobs."""

    def __init__(self) -> None:
        # By client, and by requester.
        self._had: Counter[Hashable] = Counter()

    def choose(self, requesters: Sequence[Requester], limit: int, *, narrow: bool = False) -> list[int]:
        """Choose the jobs that make the next step.

        Args:
            requesters: of each job, in the order in which a request's jobs are to be done.
            limit: how many jobs at most.
            narrow: whether to choose fewer while requests of different sizes compete, so that a small one does not
                pay for all the rows of a large one.

        Returns:
            The jobs' numbers.
        """
        jobs: dict[Requester, deque[int]] = {}
        for number, requester in enumerate(requesters):
            jobs.setdefault(requester, deque()).append(number)
        if narrow and len(jobs) > 1:
            limit = min(limit, max(len(jobs), ROWS_PER_ROW * min(map(len, jobs.values()))))
        self._welcome(jobs)
        chosen: list[int] = []
        for low in (False, True):
            clients: dict[Hashable, list[Requester]] = {}
            for requester in jobs:
                if requester.low == low:
                    clients.setdefault(requester.client, []).append(requester)
            while clients and len(chosen) < limit:
                client = min(clients, key=self._had.__getitem__)
                requester = min(clients[client], key=self._had.__getitem__)
                chosen.append(jobs[requester].popleft())
                self._had[client] += 1
                self._had[requester] += 1
                if not jobs[requester]:
                    clients[client].remove(requester)
                if not clients[client]:
                    del clients[client]
        return chosen

    def _welcome(self, jobs: dict[Requester, deque[int]]) -> None:
        """Forget who has no jobs any more, and let who is new begin level with who had least."""
        clients = {requester.client for requester in jobs}
        had = {name: count for name, count in self._had.items() if name in clients or name in jobs}
        least = min((had[client] for client in clients & had.keys()), default=0)
        for client in clients:
            own = [requester for requester in jobs if requester.client == client]
            level = min((had[requester] for requester in own if requester in had), default=0)
            had.setdefault(client, least)
            for requester in own:
                had.setdefault(requester, level)
        self._had = Counter(had)
