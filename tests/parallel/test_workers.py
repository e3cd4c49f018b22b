"""The processes that the other tests of this folder run on."""

import time

import pytest
import torch
import torch.distributed as dist
from workers import WorkersFailed


def _sum_of_ranks(offset: int) -> tuple[int, float]:
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def _one_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("this rank has a reason")


def _one_sleeps() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def test_every_rank_runs_and_answers(workers):
    pool = workers(2)
    assert pool.run(_sum_of_ranks, 10) == [(0, 21.0), (1, 21.0)]


def test_an_error_comes_back_with_its_traceback_and_the_next_run_works(workers):
    pool = workers(2)
    with pytest.raises(WorkersFailed, match=r"(?s)rank 1:.*_one_raises.*this rank has a reason"):
        pool.run(_one_raises)
    assert pool.run(_sum_of_ranks, 0) == [(0, 1.0), (1, 1.0)]


def test_a_rank_that_hangs_is_named(workers):
    pool = workers(2)
    with pytest.raises(WorkersFailed, match=r"ranks \[0\] did not answer within 1 s"):
        pool.run(_one_sleeps, timeout_s=1)
    assert pool.run(_sum_of_ranks, 0)[1] == (1, 1.0)
