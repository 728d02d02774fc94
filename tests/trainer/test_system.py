"""Statistics of the machine: sampled beside the loop, from the start of a run to its end, and in nobody's way."""

from __future__ import annotations

import logging
import multiprocessing
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import anyio
import msgspec
import psutil
import pytest
import torch

from events.messages import RunEnded, RunStarted, SystemSampled
from events.origin import Origin
from trainer.errors import ArgumentsError
from trainer.run import system as system_module


def holding_net(kit: Any, hold: Any) -> Any:
    """A module whose first training step calls ``hold``."""

    class Holds(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            if global_step == 1:
                hold()
            return super().train_step(global_step, batch, device)

    return Holds()


def until_sampled(sink: Any, count: int) -> None:
    """Wait, in a step, until so many samples have arrived."""
    deadline = threading.Event()
    for _ in range(2_000):
        if len(sink.of(SystemSampled)) >= count:
            return
        deadline.wait(0.01)
    raise AssertionError("no sample has come")


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("value", [0, 0.05, -1, "10", float("nan")])
def test_an_interval_that_would_flood_the_run_is_refused(value: Any, kit: Any) -> None:
    """Less than a tenth of a second, or no number."""
    with pytest.raises(ArgumentsError, match=r"system_interval_s = .*: must be a number >= 0.1 or None"):
        kit.make_trainer(kit.Net(), system_interval_s=value)


def test_without_psutil_the_trainer_names_what_to_install(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is built, not when the run has begun; and nothing is missing where nothing is sampled."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    kit.make_trainer(kit.Net())
    with pytest.raises(ArgumentsError, match=r"system_interval_s.* needs .* psutil: pip install 'stagecast\[system\]'"):
        kit.make_trainer(kit.Net(), system_interval_s=1)


@pytest.mark.cold_start
def test_where_it_is_off_nothing_is_imported_and_no_thread_started(script: Any) -> None:
    """The default costs nothing."""
    program = script(
        "import sys, threading, torch\n"
        "from trainer import ModuleInterface, Trainer, TrainerArguments\n"
        "class Line(ModuleInterface):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w = torch.nn.Parameter(torch.ones(1))\n"
        "    def get_optimizers_schedulers(self, steps, epochs):\n"
        "        return [torch.optim.SGD(self.parameters(), lr=0.1)], []\n"
        "    def get_train_dataloader(self, sampler, batch_size):\n"
        "        return [torch.ones(1)]\n"
        "    get_val_dataloaders = get_train_dataloader\n"
        "    def val_step(self, global_step, batch, device):\n"
        "        return (self.w * batch).sum()\n"
        "    def train_step(self, global_step, batch, device):\n"
        "        assert 'stagecast-system' not in [thread.name for thread in threading.enumerate()]\n"
        "        return (self.w * batch).sum()\n"
        "Trainer(Line(), TrainerArguments(device='cpu', val_interval_epochs=0), sinks=[], journal=False,"
        " checkpoints=False).train()\n"
        "print('psutil' in sys.modules)\n"
    )
    assert program.end() == (0, "False\n", "")


# -------------------------------------------------------------------------------------- what cannot be read


def test_a_counter_that_cannot_be_read_is_left_out_and_told_once(
    kit: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A container without disk counters, a forbidden file: the rest of the sample is there, and the run goes on."""

    def forbidden(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied", "/proc/diskstats")

    monkeypatch.setattr(psutil, "disk_io_counters", forbidden)
    monkeypatch.setattr(psutil, "net_io_counters", lambda **_: {})
    sink = kit.Memory()
    with caplog.at_level(logging.DEBUG, "stagecast"):
        outcome = kit.train(holding_net(kit, lambda: until_sampled(sink, 2)), sinks=[sink], system_interval_s=0.1)
    samples = outcome.of(SystemSampled)
    assert len(samples) >= 3
    for sample in samples:
        assert sample.disk_read_bytes_per_s is None
        assert sample.disk_written_bytes_per_s is None
        assert sample.memory_total_bytes == psutil.virtual_memory().total
    told = [record.getMessage() for record in caplog.records if "diskstats" in record.getMessage()]
    assert len(told) == 1
    assert "the disks' counters" in told[0]


def test_a_machine_that_has_no_disk_counters_gives_none_for_them(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil says None there, which is no error."""
    monkeypatch.setattr(psutil, "disk_io_counters", lambda **_: None)
    samples = kit.train(kit.Net(), system_interval_s=0.1).of(SystemSampled)
    assert [sample.disk_read_bytes_per_s for sample in samples] == [None] * len(samples)
    assert samples[-1].process_memory_bytes


def test_a_counter_that_hangs_does_not_hold_the_end_of_the_run(
    kit: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the disk usage of a dead network file system does: the run ends within about a second, and says why."""
    hangs, released = threading.Event(), threading.Event()

    def usage(path: str) -> Any:
        hangs.set()
        released.wait()

    monkeypatch.setattr(psutil, "disk_usage", usage)
    module = holding_net(kit, lambda: hangs.wait(kit.WAIT_S))
    try:
        with caplog.at_level(logging.WARNING, "stagecast"):
            outcome = kit.train(module, system_interval_s=0.1, run_dir="run")
        assert outcome.result.status == "finished"
        assert outcome.of(SystemSampled) == []
        assert "stagecast-system" in kit.trainer_threads()  # it hangs still, and keeps nobody from going
        assert any("the disk usage of the run's folder takes too long" in one.getMessage() for one in caplog.records)
    finally:
        released.set()
    kit.join_threads()


def test_a_run_that_fails_before_it_trains_is_sampled_at_its_end(kit: Any) -> None:
    """And leaves no thread."""

    class Broken(kit.Net):
        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            raise ZeroDivisionError("no data")

    outcome = kit.train(Broken(), system_interval_s=0.1)
    assert isinstance(outcome.error, ZeroDivisionError)
    assert len(outcome.of(SystemSampled)) == 1
    kit.join_threads()


# ------------------------------------------------------------------------------------------------ the samples


def test_a_run_is_sampled_from_its_start_to_its_end(kit: Any, tmp_path: Any) -> None:
    """The values are those that psutil tells, the first event is still `RunStarted`, and the thread ends."""
    sink = kit.Memory()
    seen: dict[str, Any] = {}

    def hold() -> None:
        until_sampled(sink, 3)
        thread = next(one for one in threading.enumerate() if one.name == "stagecast-system")
        seen["daemon"] = thread.daemon

    outcome = kit.train(holding_net(kit, hold), sinks=[sink], system_interval_s=0.1, run_dir=tmp_path / "run")
    kit.join_threads()
    assert seen["daemon"]
    assert type(outcome.events[0]) is RunStarted
    samples = outcome.of(SystemSampled)
    assert len(samples) >= 4
    assert outcome.events.index(samples[-1]) > outcome.events.index(outcome.of(RunEnded)[0])  # the one at the end
    memory, own = psutil.virtual_memory(), psutil.Process().memory_info().rss
    sample = samples[2]
    assert 0 <= sample.cpu_percent <= 100
    assert 0 <= sample.process_cpu_percent <= 200 * psutil.cpu_count()  # counted in hundredths of a second
    assert sample.memory_total_bytes == memory.total
    assert 0 < sample.memory_used_bytes < memory.total
    assert 0.5 * own < sample.process_memory_bytes < 2 * own
    assert sample.disk_used_percent == pytest.approx(psutil.disk_usage(str(tmp_path)).percent, abs=5)
    assert sample.network_received_bytes_per_s >= 0
    assert sample.time > samples[0].time
    assert sample.gpus == [] or torch.cuda.is_available()
    assert {one.run_id for one in samples} == {outcome.result.run_id}


def test_nothing_is_sampled_before_the_run_has_started(kit: Any) -> None:
    """However long its data take to be found: `RunStarted` is the first event of an attempt."""

    class Slow(kit.Net):
        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            threading.Event().wait(0.3)  # three samples' time, in which none may come
            return super().get_train_dataloader(sampler, batch_size)

    outcome = kit.train(Slow(), system_interval_s=0.1)
    assert type(outcome.events[0]) is RunStarted
    assert outcome.of(SystemSampled)


def test_a_busy_process_is_told_from_an_idle_one(kit: Any) -> None:
    """While a step computes, its process uses a core, or what it gets of one; while it waits, next to nothing."""
    sink = kit.Memory()
    marks: list[int] = []
    shares: list[float] = []

    def hold() -> None:
        until_sampled(sink, 2)
        marks.append(len(sink.of(SystemSampled)))
        began, used = time.monotonic(), time.process_time()
        while len(sink.of(SystemSampled)) < marks[0] + 4:
            sum(range(20_000))
        shares.append(100 * (time.process_time() - used) / (time.monotonic() - began))  # less on a busy machine

    outcome = kit.train(holding_net(kit, hold), sinks=[sink], system_interval_s=0.2)
    # The first and the last of the busy ones are partly of another time.
    idle = [one.process_cpu_percent for one in outcome.of(SystemSampled)[1 : marks[0]]]
    busy = [one.process_cpu_percent for one in outcome.of(SystemSampled)[marks[0] + 1 : marks[0] + 4]]
    assert max(busy) > 0.6 * shares[0]
    assert min(idle) < 0.5 * max(busy)


def test_workers_of_a_dataloader_count_as_this_process(kit: Any) -> None:
    """Their memory and their processor time: children that are forked for the data."""
    sink = kit.Memory()
    ready, stop = multiprocessing.Event(), multiprocessing.Event()

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            if torch.utils.data.get_worker_info() is not None and index == 7:
                ready.set()
                while not stop.is_set():  # burns a core until it has been seen
                    sum(range(10_000))
            return torch.ones(4), torch.ones(1)

    def hold() -> None:
        ready.wait(kit.WAIT_S)
        children = psutil.Process().children()
        began, used = time.monotonic(), sum(sum(child.cpu_times()) for child in children)
        until_sampled(sink, len(sink.of(SystemSampled)) + 4)
        used = sum(sum(child.cpu_times()) for child in children) - used
        shares.append(100 * used / (time.monotonic() - began))
        pids.extend(child.pid for child in children)
        resident.append(sum(child.memory_info().rss for child in children) + psutil.Process().memory_info().rss)
        marks.append(len(sink.of(SystemSampled)))
        stop.set()

    class Loaded(kit.Net):
        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            context = multiprocessing.get_context("fork")
            return torch.utils.data.DataLoader(Rows(), 4, num_workers=2, multiprocessing_context=context)

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            if global_step == 1:
                hold()
            return super().train_step(global_step, batch, device)

    pids: list[int] = []
    resident: list[int] = []
    shares: list[float] = []
    marks: list[int] = []
    outcome = kit.train(Loaded(), sinks=[sink], system_interval_s=0.1, val_interval_epochs=0)
    assert outcome.result.status == "finished"
    assert len(pids) >= 2
    sample = outcome.of(SystemSampled)[marks[0] - 1]
    assert sample.process_memory_bytes == pytest.approx(resident[0], rel=0.2)
    assert sample.process_memory_bytes > 1.5 * psutil.Process().memory_info().rss
    assert max(one.process_cpu_percent for one in outcome.of(SystemSampled)[: marks[0]][-3:]) > 0.6 * shares[0]


def test_a_short_run_has_one_sample_without_rates(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate over a few milliseconds would be noise; what is a state is there."""
    monkeypatch.setattr(system_module, "_SHORTEST_S", kit.WAIT_S)
    samples = kit.train(kit.Net(), system_interval_s=60.0).of(SystemSampled)
    assert len(samples) == 1
    assert samples[0].process_memory_bytes > 0
    assert samples[0].cpu_percent is None
    assert samples[0].process_cpu_percent is None
    assert samples[0].network_sent_bytes_per_s is None
    assert samples[0].disk_used_percent is None  # a run without a folder


def test_an_infinite_interval_samples_the_start_and_the_end(kit: Any) -> None:
    """The rates of the last one are those of the whole run."""
    sink = kit.Memory()
    module = holding_net(kit, lambda: until_sampled(sink, 1))
    samples = kit.train(module, sinks=[sink], system_interval_s=float("inf")).of(SystemSampled)
    assert len(samples) == 2


@pytest.mark.anyio
async def test_a_run_in_a_service_is_sampled_and_leaves_no_thread(kit: Any) -> None:
    """Under asyncio and trio: the samples come as events of the run, also when it is stopped."""
    module = kit.Net()
    async with kit.make_trainer(module, epochs=10**6, system_interval_s=0.1).run() as run:
        with anyio.fail_after(kit.WAIT_S):
            count = 0
            async for event in run.events(since=0, types=[SystemSampled]):
                count += 1
                assert event.process_memory_bytes
                if count == 2:
                    break
        run.stop("seen")
    assert (await run.result()).status == "stopped"
    kit.join_threads()


@pytest.mark.anyio
async def test_a_cancelled_run_leaves_no_thread(kit: Any) -> None:
    """However it ends."""
    with anyio.CancelScope() as scope:
        async with kit.make_trainer(kit.Net(), epochs=10**6, system_interval_s=0.1).run() as run:
            async for _ in run.events(since=0, types=[SystemSampled]):
                scope.cancel()
    assert scope.cancelled_caught
    kit.join_threads()


def test_the_samples_of_a_test_stand_in_its_journal(kit: Any, tmp_path: Any) -> None:
    """`Trainer.test` is sampled like a training, and the journal keeps what was sampled."""

    class Tested(kit.Net):
        def get_test_dataloaders(self, sampler: Any, batch_size: int) -> Any:
            return self.batches(batch_size)

    trainer = kit.make_trainer(Tested(), system_interval_s=1.0, journal=True, run_dir=tmp_path / "run")
    trainer.test()
    assert [event for event in kit.read_journal(tmp_path / "run") if type(event) is SystemSampled]


# --------------------------------------------------------------------------------------------------- the GPUs


class Driver:
    """What the client of the driver does, for three GPUs of which the last tells only its memory: no GPU is here."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802 - the driver's names
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}000-aa"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        for handle in range(3):
            if uuid == self.nvmlDeviceGetUUID(handle):
                return handle
        raise self.NVMLError("Not Found")

    def nvmlDeviceGetName(self, handle: int) -> Any:  # noqa: N802
        return f"Card {handle}".encode() if handle == 1 else f"Card {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(used=100 + handle, total=1_000)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        if handle == 2:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(gpu=50 + handle)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        if handle == 2:
            raise self.NVMLError("Not Supported")
        return 70_500

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:  # noqa: N802
        if handle == 2:
            raise self.NVMLError("Not Supported")
        return 40


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A driver, and nothing that hides its GPUs."""
    driver = Driver()
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
    visible: str | None, shown: list[str], driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CUDA reads the variable: by index or identifier, in this order, up to the first that does not exist."""
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    samples = system_module._Gpus(driver).read()
    assert [sample.name for sample in samples] == shown
    assert [sample.index for sample in samples] == list(range(len(shown)))


def test_once_torch_has_set_up_the_gpus_it_says_which_is_which(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their identifiers: CUDA may count the fastest first, and the driver does not."""
    gpus = system_module._Gpus(driver)
    assert [sample.name for sample in gpus.read()] == ["Card 0", "Card 1", "Card 2"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"{2 - i}000-aa"))
    assert [sample.name for sample in gpus.read()] == ["Card 2", "Card 1"]


def test_what_a_gpu_does_not_tell_is_left_out_and_the_driver_is_let_go(kit: Any, driver: Driver) -> None:
    """Watts and bytes; None where the driver answers that it is not supported."""
    samples = kit.train(kit.Net(), system_interval_s=0.1).of(SystemSampled)
    kit.join_threads()
    assert driver.open == 0
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
def test_a_real_gpu_is_sampled(kit: Any) -> None:
    """Under the name that torch gives it."""
    samples = kit.train(kit.Net(), system_interval_s=0.1, device="cuda").of(SystemSampled)
    gpu = samples[-1].gpus[0]
    assert gpu.name == torch.cuda.get_device_name(0)
    assert 0 < gpu.memory_used_bytes <= gpu.memory_total_bytes


def test_a_machine_that_does_nothing_has_a_rate_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not an unknown one: the sum of its times is rounded each time that one of them grows."""
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
