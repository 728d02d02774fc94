"""The agents of several ranks over one real store: the same commands at the same ticks, and the name of who failed."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from events.protocol import AnyCommand, Checkpoint, Pause, Resume, Stop
from trainer.distributed.agent import SILENT_LOOKS, Agent
from trainer.errors import PeerFailed

Taken = list[tuple[int, list[str]]]


class Rank(threading.Thread):
    """A rank whose loop only ticks, in lock-step with the others.

    Args:
        before_tick: What it does before each; may raise.
    """

    def __init__(self, agent: Agent, step: threading.Barrier, ticks: int, before_tick: Callable[[int], None]) -> None:
        super().__init__(daemon=True)
        self.agent = agent
        self.taken: Taken = []
        self.error: BaseException | None = None
        self._step, self._ticks, self._before_tick = step, ticks, before_tick

    def run(self) -> None:
        try:
            for tick in range(1, self._ticks + 1):
                self._before_tick(tick)
                self._step.wait(30)
                if self.agent.reach("train") and self._take(tick):
                    break
        except threading.BrokenBarrierError:
            self.error = self.agent.explain(RuntimeError("gloo: Connection closed by peer"))
        except Exception as error:
            self.error = self.agent.explain(error)
            self._step.abort()
        self.agent.close()

    def _take(self, tick: int) -> bool:
        paused = stopped = False
        while (entry := self.agent.next_decision(paused=paused)) is not None:
            self.taken.append((tick, [command.id for command in entry.commands]))
            for command in entry.commands:
                paused = isinstance(command, Pause) or (paused and not isinstance(command, Resume))
                stopped |= isinstance(command, Stop)
            if entry.failure is not None:
                raise RuntimeError(entry.failure.text)
        return stopped


@pytest.fixture
def make_agents() -> Iterator[Callable[..., list[Agent]]]:
    """Makes and starts the agents of a run, each with a connection of its own to one server."""
    agents: list[Agent] = []
    servers = []

    def make(world: int, **settings: Any) -> list[Agent]:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        servers.append(server)
        for rank in range(world):
            client = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
            store = dist.PrefixStore("run/1", client)
            settings = {"peer_timeout_s": 30.0, "collective_timeout_s": 60.0} | settings
            agents.append(Agent(store, rank, world, now=lambda: ("train_step", 7), **settings))
            agents[-1].start()
        return agents

    yield make
    for agent in agents:
        agent.close()


def run_all(agents: list[Agent], ticks: int, before_tick: Callable[[Agent, int], None]) -> list[Rank]:
    step = threading.Barrier(len(agents))

    def of(agent: Agent) -> Callable[[int], None]:
        return lambda tick: before_tick(agent, tick)

    ranks = [Rank(agent, step, ticks, of(agent)) for agent in agents]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert not rank.is_alive()
    return ranks


def test_a_thousand_commands_of_four_ranks_are_taken_at_the_same_ticks(make_agents: Any) -> None:
    """Whoever sends them, and whoever is late: pauses, too, which are ended while all wait."""
    chances = random.Random(1)
    sent: list[str] = []

    def before_tick(agent: Agent, tick: int) -> None:
        for _ in range(chances.choice([0] * 19 + [1]) if len(sent) < 1_000 else 0):
            name = f"{agent.rank}-{tick}-{len(sent)}"
            sent.append(name)
            commands: list[AnyCommand] = [Checkpoint(id=name)]
            if chances.random() < 0.02:
                commands = [Pause(id=name), Resume(id=f"{name}-resume")]
            for command in commands:
                agent.send(command)
        if agent.rank == 3 and tick % 50 == 0:
            threading.Event().wait(0.02)
        if len(sent) >= 1_000 and agent.rank == 2 and tick % 100 == 0:
            agent.send(Stop(id="stop"))

    ranks = run_all(make_agents(4), 100_000, before_tick)
    assert [rank.error for rank in ranks] == [None] * 4
    assert all(rank.taken == ranks[0].taken for rank in ranks)
    taken = [name for _, names in ranks[0].taken for name in names]
    assert len(set(taken)) == len(taken) >= 1_000
    assert len(ranks[0].taken) > 30
    assert "stop" in ranks[0].taken[-1][1]


def test_the_rank_that_fails_is_named_to_all_others(make_agents: Any) -> None:
    def before_tick(agent: Agent, tick: int) -> None:
        if agent.rank == 1 and tick == 5:
            raise ValueError("bad batch")

    ranks = run_all(make_agents(3), 100, before_tick)
    text = f"rank 1 on {socket.gethostname()} in train_step after global_step 7: ValueError: bad batch"
    peers_error = f"PeerFailed('{text}')"
    assert [repr(rank.error) for rank in ranks] == [peers_error, "ValueError('bad batch')", peers_error]


def test_a_failure_that_all_take_at_one_tick(make_agents: Any) -> None:
    agents = make_agents(2)

    def before_tick(agent: Agent, tick: int) -> None:
        if agent.rank == 1 and tick == 5:
            agent.fail(ArithmeticError("the loss is NaN"))

    ranks = run_all(agents, 100_000, before_tick)
    assert [str(rank.error) for rank in ranks] == ["ArithmeticError: the loss is NaN"] * 2
    assert ranks[0].taken == ranks[1].taken


def test_the_rank_that_hangs_is_named(make_agents: Any) -> None:
    """Its beats go on, so only the ticks show it: the others are ahead, and wait for it."""
    agents = make_agents(3, collective_timeout_s=1.0)
    for agent in agents:
        for _ in range(3 if agent.rank == 1 else 4):
            if agent.reach("train"):
                agent.next_decision()
    for agent in agents:
        with pytest.raises(PeerFailed, match=r"rank 1 on .*: no progress for 1 s") as raised:
            agent.next_decision(paused=True)
        assert raised.value.rank == 1


def test_the_first_of_several_failures_counts_on_all_ranks(make_agents: Any) -> None:
    agents = make_agents(3)
    threads = [threading.Thread(target=agent.explain, args=[ValueError(f"{agent.rank}")]) for agent in agents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    named = [agent.failure for agent in agents]
    assert named[0] is not None
    assert named == [named[0]] * 3


class Silent:
    """A store that no longer answers."""

    def __init__(self, store: Any) -> None:
        self.store, self.asked, self.answers = store, threading.Event(), threading.Event()

    def clone(self) -> Silent:
        return self

    def check(self, keys: list[str]) -> bool:
        self.asked.set()
        assert self.answers.wait(30)
        return bool(self.store.check(keys))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def test_a_store_that_does_not_answer_ends_the_run() -> None:
    """A packet filter drops what a host sends: no error arrives, and the agent's thread waits."""
    store = Silent(dist.HashStore())
    agent = Agent(store, 1, 2, now=lambda: ("backward", 7), peer_timeout_s=30.0, collective_timeout_s=60.0)
    agent.start()
    assert store.asked.wait(30)
    for _ in range(SILENT_LOOKS):
        agent.watch_store()
        assert agent.failure is None
    agent.watch_store()
    with pytest.raises(
        PeerFailed, match=r"rank 1 on .* in backward after global_step 7: the store at .* does not answer"
    ):
        agent.raise_if_failed()
    store.answers.set()
    agent.close()
