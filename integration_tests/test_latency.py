"""Times of requests and energy of GPUs, as the scheduler measures them. No engine is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvplug.errors import DeploymentError
from kvplug.hosts.vllm.scheduler import energy, latency
from kvplug.hosts.vllm.scheduler.energy import EnergyWatch, local_gpus
from kvplug.hosts.vllm.scheduler.latency import LatencyWatch
from kvplug.observe.catalogue import ENERGY_JOULES, TPOT_SECONDS, TTFT_SECONDS
from kvplug.observe.latency import GROWTH, LatencyWindows
from kvplug.observe.metric import Metric
from kvplug.parser import load_deployment


class Clock:
    """Seconds that pass when they are told to."""

    now = 5000.0

    def __call__(self) -> float:
        return self.now


def request(name: str, tokens: int = 100, **more: Any) -> Any:
    fields = {
        "request_id": name,
        "sampling_params": object(),
        "resumable": False,
        "arrival_time": 5000.0,
        "num_prompt_tokens": tokens,
        "num_output_tokens": 0,
    }
    return SimpleNamespace(**(fields | more))


def begins(*requests: Any) -> Any:
    new = [SimpleNamespace(req_id=one.request_id) for one in requests]
    return SimpleNamespace(scheduled_new_reqs=new)


def seconds(watch: LatencyWatch, metric: Metric, *labels: str) -> float:
    (found,) = [s.value for s in watch.samples() if s.metric is metric and s.labels == labels]
    assert isinstance(found, float)
    return found


def close(value: float) -> object:
    return pytest.approx(value, rel=GROWTH - 1)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> LatencyWatch:
    return LatencyWatch(LatencyWindows(2, 300.0, clock=clock), "", clock, clock)


def test_a_request_is_timed_from_its_arrival_to_its_first_token_and_its_last(
    watch: LatencyWatch, clock: Clock
) -> None:
    one = request("a", 600)
    clock.now += 1.0  # on its way from the server
    watch.on_new_request(one)
    watch.step(begins())
    watch.outputs()
    clock.now += 2.0  # in the queue
    watch.step(begins(one))
    watch.outputs()  # a part of the prompt
    clock.now += 1.0
    watch.step(begins())
    one.num_output_tokens = 1
    watch.outputs()
    clock.now += 0.8
    one.num_output_tokens = 5
    watch.finished(one)
    for prompt in ("all", "512-4095"):
        assert seconds(watch, TTFT_SECONDS, "50", "now", prompt) == close(4.0)
        assert seconds(watch, TPOT_SECONDS, "99", "now", prompt) == close(0.2)
    assert seconds(watch, TTFT_SECONDS, "50", "now", "0-511") == 0.0
    assert seconds(watch, TTFT_SECONDS, "50", "baseline", "all") == 0.0, "two make one"
    assert (watch._awaited, watch._scheduled, watch._first) == ({}, set(), {})


def test_an_answer_of_one_token_ends_in_its_first_step_and_has_no_time_per_token(
    watch: LatencyWatch, clock: Clock
) -> None:
    one = request("a")
    watch.on_new_request(one)
    watch.step(begins(one))
    clock.now += 0.5
    one.num_output_tokens = 1
    watch.finished(one)
    watch.outputs()
    assert seconds(watch, TTFT_SECONDS, "50", "now", "all") == close(0.5)
    assert seconds(watch, TPOT_SECONDS, "50", "now", "all") == 0.0


def test_what_has_no_first_token_to_wait_for_is_left_out(watch: LatencyWatch) -> None:
    left = [
        request("pooling", sampling_params=None),
        request("session", resumable=True),
        request("aborted"),
    ]
    for one in left:
        watch.on_new_request(one)
    watch.step(begins(*left))
    left[0].num_output_tokens = left[1].num_output_tokens = 1
    watch.outputs()
    for one in left:
        watch.finished(one)
    watch.finished(request("unknown", num_output_tokens=3))
    assert all(count == 0 for _, _, count in watch.windows.requests())
    assert (watch._awaited, watch._scheduled, watch._first) == ({}, set(), {})


def test_quantiles_are_computed_every_few_seconds_and_at_the_end_of_a_burst(
    watch: LatencyWatch, clock: Clock
) -> None:
    assert watch.samples() == (), "nothing was counted"
    one, two = request("a"), request("b")
    for each in (one, two):
        watch.on_new_request(each)
    watch.step(begins(one, two))
    one.num_output_tokens = 1
    watch.finished(one)
    first = watch.samples()
    two.num_output_tokens = 1
    watch.outputs()
    clock.now += latency.INTERVAL - 0.1
    assert watch.samples() is first
    clock.now += 0.2
    second = watch.samples()
    assert second is not first
    clock.now += latency.IDLE_INTERVAL + 0.1
    assert watch.samples() is second
    watch.finished(two)
    assert watch.samples() is second, "nothing new"
    serve(watch, number=1)
    assert watch.samples() is not second
    # The window moves on while others run.
    clock.now += latency.INTERVAL
    assert watch.samples() is not second


def test_what_fails_is_counted_no_more_and_ends_nothing(
    watch: LatencyWatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = request("a")
    watch.on_new_request(one)
    watch.step(begins(one))
    del one.num_output_tokens
    watch.outputs()
    watch.on_new_request(request("b"))
    watch.finished(one)
    assert (watch._awaited, watch._scheduled) == ({}, set())


def config(model: str = "m", index: int = 0) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(model=model),
        parallel_config=SimpleNamespace(data_parallel_index=index),
    )


def serve(watch: LatencyWatch, tokens: int = 100, number: int = 2) -> None:
    for i in range(number):
        one = request(str(i), tokens)
        watch.on_new_request(one)
        watch.step(begins(one))
        one.num_output_tokens = 1
        watch.outputs()
        one.num_output_tokens = 2
        watch.finished(one)
    watch.stop()


def test_a_baseline_is_kept_for_the_next_engine(tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    section = {"observe": {"baseline_file": str(file), "baseline_requests": 2}}
    first = LatencyWatch.of(load_deployment(section), config())
    serve(first)
    before = {s.labels: s.value for s in first.samples() if "baseline" in s.labels}
    later = LatencyWatch.of(load_deployment(section), config())
    assert {s.labels: s.value for s in later.samples() if "baseline" in s.labels} == before
    assert any(before.values())
    assert not list(tmp_path.glob(".*")), "written whole"
    # Each data-parallel engine has its own.
    serve(LatencyWatch.of(load_deployment(section), config(index=1)))
    assert (tmp_path / "baseline.json.1").exists()
    # A class that the file lacks is added to it.
    serve(later, tokens=5000)
    assert '"4096-32767"' in file.read_text(encoding="utf-8")


def test_another_models_baseline_ends_the_start(tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    section = {"observe": {"baseline_file": str(file), "baseline_requests": 1}}
    serve(LatencyWatch.of(load_deployment(section), config()))
    with pytest.raises(DeploymentError, match=r"observe\.baseline_file.*'m'.*'other'"):
        LatencyWatch.of(load_deployment(section), config("other"))


def test_a_baseline_that_cannot_be_written_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "missing" / "baseline.json"
    section = {"observe": {"baseline_file": str(file), "baseline_requests": 1}}
    watch = LatencyWatch.of(load_deployment(section), config())
    serve(watch)
    assert any(s.value for s in watch.samples() if "baseline" in s.labels)


# -- energy ---------------------------------------------------------------------------------------


class Nvml:
    """NVML whose devices have used their index in joules."""

    def __init__(self) -> None:
        self.more = 0

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802 - NVML's own name
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        return 1000 * handle + self.more


def parallel(**given: Any) -> Any:
    fields = {
        "local_world_size": 2,
        "data_parallel_backend": "mp",
        "data_parallel_size": 1,
        "data_parallel_rank_local": None,
        "assigned_physical_gpu_ids": None,
    }
    return SimpleNamespace(**(fields | given))


def test_energy_is_that_of_the_engines_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(device_id_to_physical_device_id=lambda one: one + 4)
    monkeypatch.setattr(energy, "current_platform", platform)
    assert local_gpus(parallel()) == [4, 5]
    second = {"data_parallel_size": 2, "data_parallel_rank_local": 1}
    assert local_gpus(parallel(**second)) == [6, 7]
    given = [7, 5, 3, 1]
    assert local_gpus(parallel(**second, assigned_physical_gpu_ids=given)) == [3, 1]
    ray = {"data_parallel_backend": "ray", "assigned_physical_gpu_ids": [3, 1]}
    assert local_gpus(parallel(**(second | ray))) == [3, 1]


def test_energy_is_a_metric_where_nvml_is() -> None:
    nvml = Nvml()
    config = SimpleNamespace(parallel_config=parallel(assigned_physical_gpu_ids=[0, 2]))
    watch = EnergyWatch(config, nvml)
    assert watch._meter is not None
    nvml.more = 500
    watch._meter.read()
    assert [(s.metric, s.value) for s in watch.samples()] == [(ENERGY_JOULES, 1.0)]
    watch.stop()


def test_there_is_no_series_of_energy_on_a_cpu() -> None:
    assert list(EnergyWatch(SimpleNamespace(parallel_config=parallel())).samples()) == []
