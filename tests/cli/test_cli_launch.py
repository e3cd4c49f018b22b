"""Several processes: zoo train --nproc and zoo launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("torchtitan")


def several(*words):
    command = [sys.executable, "-m", "zoo", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_leave_one_run_that_goes_on_in_another_layout(tiny, tmp_path):
    out = tmp_path / "run"
    first = several("train", tiny, "--nproc", 2, "--steps", 2, "--out", out, "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["step"] == 2  # one document, of the first process
    second = several("train", out, "parallel.tp=2", "--nproc=2", "--resume", "--steps", 4, "--json")
    assert second.returncode == 0, second.stderr
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert {"model", "evaluation.json", "checkpoint"} <= {p.name for p in out.iterdir()}


def test_what_cannot_be_spread_is_refused_before_processes_start(zoo, tiny):
    assert "tie_embeddings: false" in zoo("train", tiny, "parallel.pp=2", "--nproc", 2, code=2).err
    assert "does not give the 2 processes" in zoo("train", tiny, "parallel.tp=3", "--nproc", 2, code=2).err
    assert "no multiple of 4 data-parallel ranks" in zoo("train", tiny, "--nproc", 4, code=2).err


def test_launch_prints_a_job_that_goes_on_after_failures(zoo, tiny):
    script = zoo("launch", tiny, "train.batch_size=64", "--nodes", 4, "--gpus-per-node", 8).out
    assert "--nnodes=4 --nproc-per-node=8 --max-restarts=3" in script and "#SBATCH --requeue" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert "did you mean dp_shard" in zoo("launch", tiny, "parallel.dp_shards=2", code=2).err
