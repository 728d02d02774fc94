"""What hooks, metrics, monitors and a module's own data are on several ranks, beside one process that does the same."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from support.scripts import ROOT

PROGRAM = """
import json
from support.together import RANK, WORLD_SIZE, everything
with open(f"found-{WORLD_SIZE}-{RANK}.json", "w") as file:
    json.dump(everything(), file)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """What one process finds, what each of two ranks finds, and what the ranks print on stderr."""
    from support.ranks import Ranks

    folder = tmp_path_factory.mktemp("together")
    started = Ranks(PROGRAM, folder)
    try:
        alone = folder / "alone"
        alone.mkdir()
        environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "PATH": ""}
        subprocess.run([sys.executable, "-c", PROGRAM], cwd=alone, env=environment, check=True, capture_output=True)
        ended = started.end(280)
    finally:
        started.close()
    assert ended.code == 0, ended.err
    paths = [alone / "found-1-0.json", *(folder / f"found-2-{rank}.json" for rank in (0, 1))]
    one, *two = (json.loads(path.read_text()) for path in paths)
    return one, two, ended.err


Found = tuple[dict[str, Any], list[dict[str, Any]], list[str]]
pytestmark = pytest.mark.timeout(300)  # seconds alone; minutes beside others on few cores


def test_hooks_for_which_the_loop_waits_run_on_every_rank_and_others_on_rank_0(found: Found) -> None:
    alone, ranks, _ = found
    every = ["step", "step", "step", "validation of 2", "epoch"]
    assert alone["hooks_and_metrics"]["here"] == every
    assert ranks[0]["hooks_and_metrics"]["here"] == every
    # Also in the step in which rank 1 is short of a batch: a hook may change the weights.
    assert ranks[1]["hooks_and_metrics"]["here"] == ["step", "step", "step", "epoch"]
    assert ranks[1]["hooks_and_metrics"]["everywhere"] == every  # with Delivery(ranks="all"); all outputs, too


def test_every_rank_judges_the_metrics_of_all(found: Found) -> None:
    """Metric objects too, also of a rank without a validation batch; a rank's own numbers become their mean."""
    alone, ranks, _ = found
    (expected,) = alone["hooks_and_metrics"]["judged"]
    expected["seen_here"] /= 2
    for rank in ranks:
        assert rank["hooks_and_metrics"]["judged"] == [pytest.approx(expected, abs=1e-12)]
        for name in ("train_accuracy", "accuracy", "train_epoch_loss", "train_loss"):
            mine, other = rank["hooks_and_metrics"]["metrics"][name], alone["hooks_and_metrics"]["metrics"][name]
            assert mine == pytest.approx(other, abs=1e-12), name
        assert rank["hooks_and_metrics"]["told"] == alone["hooks_and_metrics"]["told"] == [3, 1]
        assert rank["stops"] == alone["stops"] == 9


def test_parameters_that_are_unfrozen_later_are_averaged_from_then_on(found: Found) -> None:
    alone, ranks, _ = found
    for rank in ranks:
        assert rank["unfreezes"]["weights"] == pytest.approx(alone["unfreezes"]["weights"], abs=1e-12)


def test_ranks_validate_with_the_running_statistics_of_rank_0(found: Found) -> None:
    _, ranks, _ = found
    first, second = (rank["batch_norm"] for rank in ranks)
    assert first["val_loss"] == second["val_loss"] == pytest.approx(first["by_hand"], abs=1e-12)
    assert second["by_hand"] == pytest.approx(first["by_hand"], abs=1e-12)
    assert first["weights"] == second["weights"]


def test_a_parameter_without_a_gradient_is_an_error_that_names_the_option(found: Found) -> None:
    _, ranks, _ = found
    assert "set strategy=Ddp(find_unused_parameters=True)" in ranks[0]["unused"]
    assert [rank["unused_is_found"] for rank in ranks] == [[1.0], [1.0]]


def test_validate_and_test_return_the_same_on_every_rank_for_each_kind_of_dataloader(found: Found) -> None:
    alone, ranks, _ = found
    for rank in ranks:
        for name, value in alone["evaluations"]["validated"].items():
            assert rank["evaluations"]["validated"][name] == pytest.approx(value, abs=1e-12), name
        assert rank["evaluations"]["tested"] == alone["evaluations"]["tested"]  # in order, without duplicates


def test_averaged_weights_other_precisions_and_compiled_steps_work_on_ranks(found: Found) -> None:
    alone, ranks, _ = found
    for rank in ranks:
        assert rank["averaged"]["val_loss"] == pytest.approx(alone["averaged"]["val_loss"], abs=1e-12)
        assert rank["averaged"]["weights"] == pytest.approx(alone["averaged"]["weights"], abs=1e-12)
        for name, weights in alone["precisions"].items():
            assert rank["precisions"][name] == ranks[0]["precisions"][name], name  # the ranks stay equal
            # The first losses of float16 overflow at another scale.
            tolerance = 0.2 if name == "float16" else 1e-5
            assert rank["precisions"][name] == pytest.approx(weights, abs=tolerance), name


def test_a_run_in_a_service_and_a_group_of_the_hosts_own_are_joined(found: Found) -> None:
    alone, ranks, _ = found
    for rank in ranks:
        assert rank["hosted"]["steps"] == alone["hosted"]["steps"] == 3
        assert rank["hosted"]["weights"] == pytest.approx(alone["hosted"]["weights"], abs=1e-12)
        assert rank["own group"]["weights"] == pytest.approx(alone["hosted"]["weights"], abs=1e-12)
        assert rank["own group"]["is_left"]
        assert rank["tuned"] == alone["tuned"]  # in each rank for itself


def test_a_single_process_needs_nothing_of_it_and_may_be_a_group_of_one(found: Found) -> None:
    alone, _, _ = found
    for name in ("ddp", "step", "feed", "evaluation", "merged", "agent", "conversation"):
        assert f"trainer.distributed.{name}" not in alone["modules"]
    assert alone["of one"] == pytest.approx(alone["hosted"]["weights"], abs=1e-12)


def test_data_that_the_module_divides_itself_are_read_once_and_end_with_the_shortest_rank(found: Found) -> None:
    _, ranks, errors = found
    assert [rank["sampler"]["rows"] for rank in ranks] == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 0]]  # torch pads
    for kind in ("sized", "stream"):
        assert [rank[kind]["rows"] for rank in ranks] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]], kind
        assert [rank[kind]["steps"] for rank in ranks] == [3, 3]  # of two micro-batches on each rank, then of one
        assert ranks[0][kind]["weights"] == ranks[1][kind]["weights"]
    assert errors[0].count("the ranks' dataloaders have different lengths (5 to 6 batches)") == 1
    assert errors[0].count("gives several ranks the same data") == 1  # once, and on rank 0 only
    assert "gives several ranks the same data" not in errors[1]
    assert "does not use the given sampler" not in errors[0]
