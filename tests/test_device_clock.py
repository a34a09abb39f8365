"""The time of steps on a GPU whose work is queued, and when the host waits for it.

The GPU is simulated (`gpu` of conftest.py): results are right at once, but its time is a number.
"""

import re

import pytest
import torch

import train_gpt2
from support.device_clock import HostCopy, Instant
from support.distributed import initialize
from support.stop_signals import StopSignals


def test_a_copy_waits_for_its_own_work_and_not_for_later_work(gpu):
    gpu.launch(100)
    copy = HostCopy(torch.tensor([1.0, 2.0]), asynchronous=True)
    gpu.launch(1000)
    assert gpu.host_ms == 0
    assert copy.tolist() == [1, 2] and gpu.host_ms == 100


def test_the_time_between_two_instants_is_that_of_the_device(gpu):
    start = Instant(asynchronous=True)
    gpu.launch(250)
    end = Instant(asynchronous=True)
    gpu.host_ms = 900  # the host reads it much later
    assert end.seconds_since(start) == 0.25


def test_without_a_gpu_the_time_is_that_of_the_host(monkeypatch):
    monkeypatch.setattr("time.perf_counter", iter([10.0, 12.5]).__next__)
    monkeypatch.setattr(torch.cuda, "Event", None)
    start, copy = Instant(asynchronous=False), HostCopy(torch.ones(1), asynchronous=False)
    assert copy.tolist() == [1] and copy.end.seconds_since(start) == 2.5


def test_the_time_of_each_step_is_right_also_beside_an_evaluation(small, gpu, monkeypatch, capsys):
    """Steps of 100 ms that the host takes 1 ms to launch, evaluations of a second.

    The GPU has no work for that millisecond before the first step and after each evaluation only.
    """
    train_step, validate = train_gpt2.train_step, train_gpt2.validate

    def timed_step(*arguments):
        gpu.host_ms += 1
        gpu.launch(100)
        return train_step(*arguments)

    def timed_evaluation(*arguments):
        validate(*arguments)
        gpu.launch(1000)
        gpu.host_ms = gpu.done_ms  # the loss is needed

    monkeypatch.setattr(train_gpt2, "train_step", timed_step)
    monkeypatch.setattr(train_gpt2, "validate", timed_evaluation)
    train_gpt2.train(small(max_steps=9, val_every=3))
    times_ms = [float(dt) for dt in re.findall(r"dt: +([\d.]+)ms", capsys.readouterr().out)]
    assert times_ms == pytest.approx([101, 100, 100] * 3)
    assert gpu.idle_ms == 3
    assert gpu.done_ms == 9 * 100 + 4 * 1000 + 3


def test_the_check_for_signals_leaves_the_last_batch_in_the_queue(gpu):
    """Batches of 50 ms: the check before a batch waits for the end of the last but one."""
    signals, waited = StopSignals(initialize("cpu", "float32")), []
    for _ in range(5):
        signals.check()
        waited.append(gpu.host_ms)
        gpu.launch(50)
    assert waited == [0, 0, 50, 100, 150] and gpu.idle_ms == 0


def test_the_loss_scale_is_read_only_if_a_step_is_not_finite(small, gpu, monkeypatch):
    """To read it waits for all of the queue."""
    reads = []

    class Scaler(torch.amp.GradScaler):
        def __init__(self, device_type, enabled):
            super().__init__("cpu", enabled=True)

        def get_scale(self):
            reads.append(1)
            return super().get_scale()

    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    gpu.event_ms = 1
    train_gpt2.train(small())
    assert len(reads) == 1  # for the checkpoint
