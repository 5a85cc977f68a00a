"""Devices and precisions by name; what no CPU can show is left to a machine with a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cadapt.errors import UsageError
from cadapt.train.hardware import describe_device, resolve_device, resolve_precision

from .runs import CONFIG, run


@pytest.mark.parametrize("name", ["xpu", "meta", "vulkan:0", "hpu"])
def test_a_device_that_torch_knows_and_nothing_here_runs_on_is_refused(name):
    with pytest.raises(UsageError, match="expected cpu, cuda or mps"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:-1", "cuda:x", ""])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(UsageError, match="unknown device"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["cuda:99", "mps:1", "cpu:1"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UsageError, match="this machine has no device"):
        resolve_device(name)


def test_a_run_says_what_it_cannot_have():
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        run(None, replace(CONFIG, device="gpu"))
    with pytest.raises(UsageError, match="fp16 needs a cuda device"):
        run(None, replace(CONFIG, precision="fp16"))


def test_the_cpu_computes_in_fp32_unless_asked():
    cpu = resolve_device("cpu")
    assert resolve_device("cpu:0").type == "cpu"
    assert describe_device(cpu) == "cpu"
    assert [resolve_precision(name, cpu) for name in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]
    with pytest.raises(UsageError, match="fp16 needs a cuda device"):
        resolve_precision("fp16", cpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_every_gpu_is_asked_for_its_own_precision():
    for index in range(torch.cuda.device_count()):
        device = resolve_device(f"cuda:{index}")
        assert torch.cuda.get_device_name(index) in describe_device(device)
        assert resolve_precision("auto", device) in ("bf16", "fp32")
