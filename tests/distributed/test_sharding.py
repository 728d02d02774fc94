"""How ranks share an order of rows: pure functions, and the samplers."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from trainer.data.loaders import ShardedSampler, ShuffledSampler, fit_shard, make_train_sampler, sequential_sampler
from trainer.distributed.sharding import Shard, share_batches

BATCH = 16


def steps(world_size: int, micro: int, rows: int, skip: int = 0) -> list[list[int]]:
    """The rows of each step of an epoch, of all ranks together and sorted; dummies are left out."""
    accumulation, of_ranks = BATCH // world_size // micro, []
    for rank in range(world_size):
        shard = Shard(micro, rank, world_size)
        sampler = make_train_sampler(3, 1, shard=shard)
        sampler.skip = skip
        indices = list(sampler(range(rows)))
        left = rows - skip
        assert skip or len(sampler(range(rows))) == len(indices)  # what a dataloader reports is what it gives
        blocks = [indices[i : i + micro] for i in range(0, len(indices), micro)]
        assert len(blocks) == shard.rounds(left)
        of_ranks.append([block if shard.rows_of(left, number) else [] for number, block in enumerate(blocks)])
        assert [len(block) for block in of_ranks[-1]] == [shard.rows_of(left, number) for number in range(len(blocks))]
    assert len({len(blocks) for blocks in of_ranks}) == 1, "ranks differ in micro-batches"
    return [
        sorted(row for blocks in of_ranks for block in blocks[first : first + accumulation] for row in block)
        for first in range(0, len(of_ranks[0]), accumulation)
    ]


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 203, 208, 1000])
def test_a_step_of_all_ranks_has_the_rows_of_a_single_process_from_any_place(rows: int) -> None:
    alone = steps(1, 4, rows)
    assert sorted(row for step in alone for row in step) == list(range(rows))
    for world_size, micro in ((1, 16), (2, 8), (2, 2), (4, 4), (4, 1), (8, 2), (16, 1)):
        for done in (0, 1, 5):
            if done * BATCH < rows:
                assert steps(world_size, micro, rows, done * BATCH) == alone[done:], (world_size, micro, done)


def test_the_rows_of_all_ranks_in_a_step_are_known_without_the_data() -> None:
    shard = Shard(4, 0, 2)
    assert [shard.rows_of_all(20, first, 2) for first in (0, 2, 4)] == [16, 4, 0]
    assert Shard(4).rows_of_all(3, 0, 4) == 3
    assert Shard(4, 1, 2).length(0) == Shard(4, 1, 2).rounds(0) == 0


def test_rows_that_a_dataloader_drops_are_dropped_once_and_not_on_each_rank() -> None:
    data = TensorDataset(torch.arange(42))
    found: list[int] = []
    for rank in range(4):
        sampler = make_train_sampler(0, 0, shard=Shard(1, rank, 4))
        loader = DataLoader(data, batch_size=4, sampler=sampler(data), drop_last=True)
        fit_shard(loader, ShuffledSampler)
        batches = [batch[0].tolist() for batch in loader]
        assert len(batches) == len(loader) == 3
        shard, used = sampler.shard, loader.sampler
        assert isinstance(used, ShuffledSampler)
        found += [row for number, batch in enumerate(batches) if shard.rows_of(used.rows, number) for row in batch]
    assert len(found) == len(set(found)) == 40  # ten whole batches


def test_validation_data_are_shared_in_their_order() -> None:
    data = TensorDataset(torch.arange(10))
    loaders = [DataLoader(data, batch_size=3, sampler=sequential_sampler(Shard(3, rank, 2))(data)) for rank in (0, 1)]
    assert [[batch[0].tolist() for batch in loader] for loader in loaders] == [
        [[0, 1, 2], [6, 7, 8]],
        [[3, 4, 5], [9]],
    ]
    assert not issubclass(sequential_sampler(Shard(3)), ShardedSampler)  # a single process keeps torch's own


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_batches_that_all_ranks_read_are_taken_once_and_ranks_that_lack_one_repeat_another(
    count: int, world_size: int
) -> None:
    shares = [list(share_batches(range(count), rank, world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    real = [batch for turn in zip(*shares, strict=True) for batch, is_dummy in turn if not is_dummy]
    assert real == list(range(count))
