"""What agreement on commands costs: a tick on the loop's thread, and the store's server with thousands of ranks.

    python tests/benchmarks/agreement.py [--ranks 2 64 1024 4096] [--seconds 60] [--rounds 5]

*Tick*: nanoseconds of `Agent.reach` for a tick that is granted, against the loop without the call; bound: 1,000 ns.

*Simulation*: the real agents, without their threads, on a clock that only the simulation moves, with a store that is a
dictionary and counts requests. All ranks train in lock-step (``--step`` seconds each), and validate 1.0 s after every
9 s, where each rank has its own pace. In 1 % of the ranks the agent comes ten times as late. Printed: requests to the
store per second, what they would take of its server (68,000 per second were measured), the part of the time for which a
rank waits for a grant, and the time from a stop on rank 0 until the last rank has taken it.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import statistics
import time
from collections import Counter
from random import Random
from typing import Any

from report import header

from events.protocol import Stop
from trainer.distributed import agent as agent_module
from trainer.distributed import store_link
from trainer.distributed.agent import Agent
from trainer.distributed.agreement import Grant, LogAuthor, look_ahead_s, poll_s
from trainer.distributed.failure import Identity

_SERVER_PER_S = 68_000
_ROUND_TRIP_S = 0.0003
_BATCH_S = 0.01
_TRAIN_S, _VALIDATE_S = 9.0, 1.0
_SLOW = 10


class Clock:
    """Stands for the module ``time``."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def monotonic_ns(self) -> int:
        return int(self.now * 1e9)


class CountingStore:
    """A `torch.distributed.Store` in this process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()

    def clone(self) -> CountingStore:
        return self

    def set_timeout(self, timeout: object) -> None:
        pass

    def check(self, keys: list[str]) -> bool:
        self.requests["check"] += 1
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        self.requests["get"] += 1
        return self.values[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.requests["multi_get"] += 1
        return [self.values[key] for key in keys]

    def set(self, key: str, value: bytes) -> None:
        self.requests["set"] += 1
        self.values[key] = value

    def add(self, key: str, number: int) -> int:
        self.requests["add"] += 1
        self.values[key] = str(int(self.values.get(key, b"0")) + number).encode()
        return int(self.values[key])

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        self.requests["compare_set"] += 1
        return self.values.setdefault(key, value.encode())

    def delete_key(self, key: str) -> bool:
        self.requests["delete_key"] += 1
        return self.values.pop(key, None) is not None


class Simulation:
    """A run of many ranks.

    Args:
        stop_at: When a stop is sent to rank 0.
    """

    def __init__(self, world: int, step_s: float, stop_at: float, seed: int) -> None:
        self.clock, self.store, self.random = Clock(), CountingStore(), Random(seed)
        agent_module.time = store_link.time = self.clock  # type: ignore[assignment]
        self.step_s, self.stop_at = step_s, stop_at
        self.agents = [self._make_agent(rank, world) for rank in range(world)]
        self.author = LogAuthor(look_ahead_s(world))
        self.slow = set(self.random.sample(range(1, world), world // 100))
        self.events: list[tuple[float, int, str, int]] = []
        self.order = itertools.count()
        self.waits_of = [0] * world  # polls in the present wait...
        self.since = [0.0] * world  # ...and its begin
        self.left = world  # ranks that have not passed the present step
        self.steps_left = 0
        self.waited_s = 0.0  # of all ranks, for grants
        self.stopped: list[float] = []

    def _make_agent(self, rank: int, world: int) -> Agent:
        store_link.Identity.here = classmethod(lambda cls: Identity(f"host-{rank // 8}", rank, ""))  # type: ignore
        limits = {"peer_timeout_s": 60.0, "collective_timeout_s": 600.0}
        return Agent(self.store, rank, world, now=lambda: ("train_step", 0), **limits)

    def at(self, when: float, what: str, rank: int) -> None:
        heapq.heappush(self.events, (when, next(self.order), what, rank))

    def run(self) -> None:
        for rank in range(len(self.agents)):
            self.at(self.random.random() * poll_s(len(self.agents)), "poll", rank)
        self.begin_training()
        self.at(self.stop_at, "stop", 0)
        while len(self.stopped) < len(self.agents):
            self.clock.now, _, what, rank = heapq.heappop(self.events)
            getattr(self, what)(rank)

    # ------------------------------------------------------------------------------------------------ loops

    def begin_training(self) -> None:
        self.steps_left = int(_TRAIN_S / self.step_s)
        self.begin_step()

    def begin_step(self) -> None:
        self.left = len(self.agents)
        self.at(self.clock.now + self.step_s, "end_step", 0)

    def end_step(self, rank: int) -> None:
        """The collective of a step has ended, on all ranks."""
        for agent in self.agents:
            if not agent.reach("train"):
                self.passed(agent.rank)
            else:
                self.look(agent.rank)

    def validate(self, rank: int) -> None:
        agent = self.agents[rank]
        if agent.reach("val"):
            self.look(rank)
        else:
            self.passed(rank)

    def passed(self, rank: int) -> None:
        agent = self.agents[rank]
        if agent._reader.kind == "val":
            if agent.tick < _VALIDATE_S / _BATCH_S:
                self.at(self.clock.now + _BATCH_S * self.random.uniform(0.8, 1.2), "validate", rank)
                return
            self.left -= 1
            if not self.left:
                self.begin_training()
            return
        self.left -= 1
        if self.left:
            return
        self.steps_left -= 1
        if self.steps_left:
            self.begin_step()
        else:
            self.left = len(self.agents)
            for number in range(len(self.agents)):
                self.at(self.clock.now + _BATCH_S, "validate", number)

    def look(self, rank: int) -> None:
        """What `Agent.next_decision` does between two waits."""
        agent = self.agents[rank]
        agent._reader.tick = agent.tick
        entry = agent._reader.take()
        agent._free = agent._reader.free_until
        if agent._loop_waits and (entry is not None or agent._reader.may_pass):
            self.waited_s += self.clock.now - self.since[rank]
        if entry is not None:
            self.stopped.append(self.clock.now)
            agent._loop_waits = False
        elif agent._reader.may_pass:
            agent._loop_waits = False
            self.passed(rank)
        elif not agent._loop_waits:
            agent._loop_waits, self.waits_of[rank], self.since[rank] = True, 0, self.clock.now
            self.at(self.clock.now, "poll_early", rank)

    # ----------------------------------------------------------------------------------------------- agents

    def stop(self, rank: int) -> None:
        self.agents[0].send(Stop(id="stop"))
        self.exchange(0)

    def poll(self, rank: int) -> None:
        spent_s = self.exchange(rank)
        self.at(self.clock.now + poll_s(len(self.agents)) * self.late(rank) + spent_s, "poll", rank)

    def poll_early(self, rank: int) -> None:
        """As `Agent._run` does while its loop waits."""
        if not self.agents[rank]._loop_waits:
            return
        spent_s = self.exchange(rank)
        if self.agents[rank]._loop_waits:
            self.waits_of[rank] += 1
            period_s = poll_s(len(self.agents))
            wait_s = min(max(agent_module._FIRST_POLL_S, period_s / 10) * 2 ** self.waits_of[rank], period_s)
            if wait_s < period_s:
                self.at(self.clock.now + wait_s * self.late(rank) + spent_s, "poll_early", rank)

    def late(self, rank: int) -> float:
        return self.random.uniform(0.5, 1.5) * _SLOW if rank in self.slow else self.random.uniform(1.0, 1.05)

    def exchange(self, rank: int) -> float:
        """Let an agent do its work; return the seconds for which it waits for the network."""
        agent, before = self.agents[rank], sum(self.store.requests.values())
        agent._exchange(self.author if rank == 0 else None)
        assert agent.failure is None, agent.failure
        if agent._loop_waits:
            self.look(rank)
        return (sum(self.store.requests.values()) - before) * _ROUND_TRIP_S


def simulate(world: int, step_s: float, seconds: float, rounds: int) -> str:
    """Return a line of the table."""
    rates, delays, waited = [], [], []
    kinds: Counter[str] = Counter()
    for seed in range(rounds):
        one = Simulation(world, step_s, seconds + Random(seed).uniform(0, _TRAIN_S + _VALIDATE_S), seed)
        one.run()
        rates.append(sum(one.store.requests.values()) / one.clock.now)
        kinds += one.store.requests
        delays.append(max(one.stopped) - one.stop_at)
        waited.append(100 * one.waited_s / one.clock.now / world)
    rate = statistics.mean(rates)
    most = ", ".join(f"{name} {100 * count / kinds.total():.0f} %" for name, count in kinds.most_common(4))
    return (
        f"{world:>6} {step_s:>7g} {poll_s(world):>7.2f} {rate:>11,.0f} {100 * rate / _SERVER_PER_S:>8.1f} %"
        f" {statistics.mean(waited):>6.2f} % {statistics.median(delays):>13.2f} {max(delays):>6.2f}  {most}"
    )


class _OneRank(CountingStore):
    pass


def tick_ns(rounds: int) -> tuple[float, float]:
    """Return the nanoseconds of a granted tick, and those of the loop without it: the best of several rounds."""
    agent = Agent(_OneRank(), 1, 2, now=lambda: ("", 0), peer_timeout_s=10, collective_timeout_s=600)
    agent._reader._granted = Grant(5, 0, 0)  # all of earlier segments is granted
    agent.reach("train")
    agent._free = agent._reader.free_until
    count, kinds = 200_000, ["train"] * 200_000
    best = [float("inf")] * 2
    for _ in range(rounds):
        began = time.perf_counter_ns()
        for kind in kinds:
            if agent.reach(kind):
                raise AssertionError
        middle = time.perf_counter_ns()
        for kind in kinds:
            if kind is agent:
                raise AssertionError
        best[0] = min(best[0], (middle - began) / count)
        best[1] = min(best[1], (time.perf_counter_ns() - middle) / count)
    return best[0], best[1]


def main(arguments: Any = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 64, 1024, 4096])
    parser.add_argument("--steps", type=float, nargs="+", default=[0.02, 0.5])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    print(header())
    with_tick, without = tick_ns(options.rounds)
    print(f"tick: {with_tick - without:.0f} ns on the loop's thread (bound: 1,000)\n")
    print(" ranks  step s  poll s  requests/s     server    waits  stop s: median    max  requests")
    for world in options.ranks:
        for step_s in options.steps:
            print(simulate(world, step_s, options.seconds, options.rounds), flush=True)


if __name__ == "__main__":
    main()
