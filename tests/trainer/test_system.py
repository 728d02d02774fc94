"""Statistics of the machine, sampled beside the loop from the start of a run to its end."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import msgspec
import psutil
import pytest
import torch
from support.scripts import Start
from support.threads import WAIT_S, join_threads, trainer_threads, wait_until
from support.training import Net, Outcome, make_trainer, read_journal, train

from events.messages import RunEnded, RunStarted, SystemSampled
from events.origin import Origin
from sinks import Memory
from trainer.errors import ArgumentsError
from trainer.run import system as system_module


def sampled(hold: Callable[[Memory], object], kind: type[Net] = Net, **options: Any) -> Outcome:
    """Train, and call ``hold`` in the first step with a sink that receives the samples."""
    sink = Memory()
    module = kind(act=lambda step: hold(sink) if step == 1 else None)
    return train(module, sinks=[sink], **{"system_interval_s": 0.1} | options)


def until(count: int, sink: Memory) -> None:
    wait_until(lambda: len(sink.of(SystemSampled)) >= count)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("value", [0, 0.05, -1, "10", float("nan")])
def test_an_interval_that_would_flood_the_run_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentsError, match=r"system_interval_s = .*: must be a number >= 0.1 or None"):
        make_trainer(Net(), system_interval_s=value)


def test_without_psutil_the_trainers_constructor_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only if something is sampled."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    make_trainer(Net())
    with pytest.raises(ArgumentsError, match=r"system_interval_s.* needs .* psutil: pip install 'stagecast\[system\]'"):
        make_trainer(Net(), system_interval_s=1)


def test_without_an_interval_nothing_is_imported_and_no_thread_is_started(script: Start) -> None:
    program = script(
        "import sys, threading\n"
        "from support.training import Net, train\n"
        "assert 'psutil' not in sys.modules\n"
        "names = []\n"
        "train(Net(act=lambda step: names.extend(one.name for one in threading.enumerate())))\n"
        "print('stagecast-events' in names, 'stagecast-system' in names, 'psutil' in sys.modules)\n"
    )
    assert program.end() == (0, "True False False\n", "")


# -------------------------------------------------------------------------------------- unreadable counters


def test_an_unreadable_counter_is_omitted_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A container without disk counters, a forbidden file: the samples have the other values."""

    def forbidden(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied", "/proc/diskstats")

    monkeypatch.setattr(psutil, "disk_io_counters", forbidden)
    monkeypatch.setattr(psutil, "net_io_counters", lambda **_: {})
    with caplog.at_level(logging.DEBUG, "stagecast"):
        samples = sampled(functools.partial(until, 2)).of(SystemSampled)
    assert len(samples) >= 3
    for sample in samples:
        assert sample.disk_read_bytes_per_s is sample.disk_written_bytes_per_s is None
        assert sample.memory_total_bytes == psutil.virtual_memory().total
    (text,) = [text for text in caplog.messages if "diskstats" in text]
    assert "the disks' counters" in text


def test_a_machine_without_disk_counters_has_no_rates_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil returns None there, which is not an error."""
    monkeypatch.setattr(psutil, "disk_io_counters", lambda **_: None)
    samples = train(Net(), system_interval_s=0.1).of(SystemSampled)
    assert [sample.disk_read_bytes_per_s for sample in samples] == [None] * len(samples)
    assert samples[-1].process_memory_bytes


def test_a_counter_that_hangs_does_not_hold_the_end_of_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the disk usage of a dead network file system does: the run ends after about a second, with a warning."""
    hangs, released = threading.Event(), threading.Event()
    monkeypatch.setattr(psutil, "disk_usage", lambda path: (hangs.set(), released.wait()))
    try:
        with caplog.at_level(logging.WARNING, "stagecast"):
            outcome = sampled(lambda _: hangs.wait(WAIT_S), run_dir="run")
        assert outcome.result.status == "finished"
        assert outcome.of(SystemSampled) == []
        assert "stagecast-system" in trainer_threads()
        assert "the disk usage of the run's folder takes too long" in caplog.text
    finally:
        released.set()
    join_threads()


def test_a_run_that_fails_before_it_trains_is_sampled_at_its_end() -> None:
    outcome = train(Net(train_data=lambda net, size: 1 / 0), system_interval_s=0.1)
    assert isinstance(outcome.error, ZeroDivisionError)
    assert len(outcome.of(SystemSampled)) == 1
    join_threads()


# ------------------------------------------------------------------------------------------------ the samples


def test_a_run_is_sampled_from_its_start_to_its_end(tmp_path: Path) -> None:
    """By a daemon thread, with the values of psutil; the first event is still `RunStarted`."""

    def hold(sink: Memory) -> None:
        until(3, sink)
        daemons.extend(one.daemon for one in threading.enumerate() if one.name == "stagecast-system")

    daemons: list[bool] = []
    outcome = sampled(hold, run_dir=tmp_path / "run")
    join_threads()
    assert daemons == [True]
    assert type(outcome.events[0]) is RunStarted
    samples = outcome.of(SystemSampled)
    assert len(samples) >= 4
    assert outcome.events.index(samples[-1]) > outcome.events.index(outcome.of(RunEnded)[0])
    own, sample = psutil.Process().memory_info().rss, samples[2]
    assert sample.memory_total_bytes == psutil.virtual_memory().total
    assert 0 <= sample.cpu_percent <= 100
    assert 0 <= sample.process_cpu_percent <= 200 * psutil.cpu_count()  # counted in hundredths of a second
    assert 0 < sample.memory_used_bytes < sample.memory_total_bytes
    assert 0.5 * own < sample.process_memory_bytes < 2 * own
    assert sample.disk_used_percent == pytest.approx(psutil.disk_usage(str(tmp_path)).percent, abs=5)
    assert sample.network_received_bytes_per_s >= 0
    assert sample.time > samples[0].time
    assert sample.gpus == [] or torch.cuda.is_available()
    assert {one.run_id for one in samples} == {outcome.result.run_id}


def test_nothing_is_sampled_before_the_run_has_started() -> None:
    """`RunStarted` is the first event of an attempt, however long the data take to load."""

    def slow(net: Net, size: int) -> Any:
        threading.Event().wait(0.3)  # the time of three samples
        return net.batches(size)

    outcome = train(Net(train_data=slow), system_interval_s=0.1)
    assert type(outcome.events[0]) is RunStarted
    assert outcome.of(SystemSampled)


def test_a_busy_process_uses_more_of_the_processor_than_an_idle_one() -> None:
    marks: list[int] = []
    shares: list[float] = []

    def hold(sink: Memory) -> None:
        until(2, sink)
        marks.append(len(sink.of(SystemSampled)))
        began, used = time.monotonic(), time.process_time()
        while len(sink.of(SystemSampled)) < marks[0] + 4:
            sum(range(20_000))
        shares.append(100 * (time.process_time() - used) / (time.monotonic() - began))  # less on a busy machine

    percents = [one.process_cpu_percent or 0 for one in sampled(hold, system_interval_s=0.2).of(SystemSampled)]
    # The first and the last of the busy ones cover other time too.
    idle, busy = percents[1 : marks[0]], percents[marks[0] + 1 : marks[0] + 4]
    assert max(busy) > 0.6 * shares[0]
    assert min(idle) < 0.5 * max(busy)


def test_workers_of_a_dataloader_count_as_this_process() -> None:
    """Their memory and their processor time."""
    ready, stop = multiprocessing.Event(), multiprocessing.Event()

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            if torch.utils.data.get_worker_info() is not None and index == 7:
                ready.set()
                while not stop.is_set():  # uses a core until it has been sampled
                    sum(range(10_000))
            return torch.ones(4), torch.ones(1)

    class Loaded(Net):
        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            return torch.utils.data.DataLoader(Rows(), 4, num_workers=2, multiprocessing_context="fork")

    seen: dict[str, Any] = {}

    def hold(sink: Memory) -> None:
        ready.wait(WAIT_S)
        children = psutil.Process().children()
        began, used = time.monotonic(), sum(sum(child.cpu_times()) for child in children)
        until(len(sink.of(SystemSampled)) + 4, sink)
        used = sum(sum(child.cpu_times()) for child in children) - used
        seen.update(share=100 * used / (time.monotonic() - began), workers=len(children))
        seen["resident"] = sum(one.memory_info().rss for one in [*children, psutil.Process()])
        seen["samples"] = sink.of(SystemSampled)
        stop.set()

    assert sampled(hold, Loaded, val_interval_epochs=0).result.status == "finished"
    assert seen["workers"] >= 2
    samples = seen["samples"]
    assert samples[-1].process_memory_bytes == pytest.approx(seen["resident"], rel=0.2)
    assert samples[-1].process_memory_bytes > 1.5 * psutil.Process().memory_info().rss
    assert max(one.process_cpu_percent for one in samples[-3:]) > 0.6 * seen["share"]


def test_a_short_run_has_one_sample_without_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate over a few milliseconds would be noise."""
    monkeypatch.setattr(system_module, "_SHORTEST_S", WAIT_S)
    (sample,) = train(Net(), system_interval_s=60.0).of(SystemSampled)
    assert sample.process_memory_bytes > 0
    assert sample.cpu_percent is sample.process_cpu_percent is sample.network_sent_bytes_per_s is None
    assert sample.disk_used_percent is None  # a run without a folder


def test_an_infinite_interval_samples_the_start_and_the_end() -> None:
    assert len(sampled(functools.partial(until, 1), system_interval_s=float("inf")).of(SystemSampled)) == 2


@pytest.mark.anyio
async def test_a_run_in_a_service_is_sampled_and_leaves_no_thread_when_it_is_stopped_or_cancelled() -> None:
    async with make_trainer(Net(), epochs=10**6, system_interval_s=0.1).run() as run:
        with anyio.fail_after(WAIT_S):
            count = 0
            async for event in run.events(since=0, types=[SystemSampled]):
                count += 1
                assert isinstance(event, SystemSampled)
                assert event.process_memory_bytes
                if count == 2:
                    break
        run.stop("seen")
    assert (await run.result()).status == "stopped"
    join_threads()
    with anyio.CancelScope() as scope:
        async with make_trainer(Net(), epochs=10**6, system_interval_s=0.1).run() as run:
            async for _ in run.events(since=0, types=[SystemSampled]):
                scope.cancel()
    assert scope.cancelled_caught
    join_threads()


def test_a_test_is_sampled_into_its_journal(tmp_path: Path) -> None:
    net = Net(test_data=Net.batches)
    make_trainer(net, system_interval_s=1.0, journal=True, run_dir=tmp_path / "run").test()
    assert [event for event in read_journal(tmp_path / "run") if type(event) is SystemSampled]


def test_an_idle_machine_has_a_rate_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an unknown one: the sum of its times is rounded whenever one of them grows."""
    idle_s = iter([29328.48, 29329.37, 29330.11, 29331.93])
    times = psutil.cpu_times()
    zeros = dict.fromkeys(times._fields, 0.0)
    monkeypatch.setattr(
        psutil, "cpu_times", lambda: type(times)(**zeros | {"user": 34606.94, "nice": 2061.15, "idle": next(idle_s)})
    )
    clock = iter(range(1_000))
    monkeypatch.setattr(system_module.time, "monotonic", lambda: float(next(clock)))
    machine = system_module._Machine(psutil, None)
    assert [machine.read(Origin("run")).cpu_percent for _ in range(4)] == [None, 0.0, 0.0, 0.0]


# --------------------------------------------------------------------------------------------------- the GPUs


class NVMLError(Exception):
    pass


def supported(value: Any) -> Callable[..., Any]:
    """A query that the last GPU does not support."""

    def query(handle: int, *_: int) -> Any:
        if handle == 2:
            raise NVMLError("Not Supported")
        return value(handle)

    return query


def by_uuid(uuid: str) -> int:
    if uuid not in (uuids := [f"GPU-{handle}000-aa" for handle in range(3)]):
        raise NVMLError("Not Found")
    return uuids.index(uuid)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The client of a driver with three GPUs, of which the last reports its memory alone; nothing hides them."""
    calls: list[int] = []
    driver = SimpleNamespace(
        NVML_TEMPERATURE_GPU=0,
        NVMLError=NVMLError,
        opened=calls,
        nvmlInit=lambda: calls.append(1),
        nvmlShutdown=lambda: calls.append(-1),
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}000-aa",
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetName=lambda handle: f"Card {handle}".encode() if handle == 1 else f"Card {handle}",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=100 + handle, total=1_000),
        nvmlDeviceGetUtilizationRates=supported(lambda handle: SimpleNamespace(gpu=50 + handle)),
        nvmlDeviceGetPowerUsage=supported(lambda handle: 70_500),
        nvmlDeviceGetTemperature=supported(lambda handle: 40),
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)  # type: ignore[arg-type]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    return driver


@pytest.mark.parametrize(
    ("visible", "shown"),
    [
        (None, ["Card 0", "Card 1", "Card 2"]),
        ("", []),
        ("-1", []),
        ("2,0", ["Card 2", "Card 0"]),
        ("1,7,0", ["Card 1"]),
        ("GPU-1000-aa", ["Card 1"]),
        (" GPU-2, GPU-0000 ", ["Card 2", "Card 0"]),
        ("GPU-", []),
        ("MIG-1000", []),
        ("nonsense", []),
    ],
)
def test_only_the_gpus_that_the_run_can_see_are_sampled(
    visible: str | None, shown: list[str], driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CUDA reads the variable: by index or identifier, in this order, up to the first that does not exist."""
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    samples = system_module._Gpus(driver).read()
    assert [(sample.index, sample.name) for sample in samples] == list(enumerate(shown))


def test_gpus_have_torchs_order_once_it_has_initialized_them(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA may count the fastest first, and the driver does not."""
    gpus = system_module._Gpus(driver)
    assert [sample.name for sample in gpus.read()] == ["Card 0", "Card 1", "Card 2"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"{2 - i}000-aa"))
    assert [sample.name for sample in gpus.read()] == ["Card 2", "Card 1"]


def test_an_unsupported_value_of_a_gpu_is_none_and_the_driver_is_closed(driver: Any) -> None:
    samples = train(Net(), system_interval_s=0.1).of(SystemSampled)
    join_threads()
    assert driver.opened
    assert sum(driver.opened) == 0
    first, _, last = (msgspec.structs.asdict(gpu) for gpu in samples[-1].gpus)
    assert first == {
        "index": 0,
        "name": "Card 0",
        "utilization_percent": 50.0,
        "memory_used_bytes": 100,
        "memory_total_bytes": 1_000,
        "power_w": 70.5,
        "temperature_c": 40.0,
    }
    assert (last["utilization_percent"], last["power_w"], last["temperature_c"]) == (None, None, None)
    assert last["memory_used_bytes"] == 102


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu_is_sampled_under_torchs_name() -> None:
    samples = train(Net(), system_interval_s=0.1, device="cuda").of(SystemSampled)
    gpu = samples[-1].gpus[0]
    assert gpu.name == torch.cuda.get_device_name(0)
    assert 0 < gpu.memory_used_bytes <= gpu.memory_total_bytes
