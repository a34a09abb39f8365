"""What a device can do: dtypes, names, and speed as a share of what is possible."""

import pytest
import torch

from support import devices
from support.errors import SettingError


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX A6000", 154.8),
        # not in the table, although a name of the table is a part of theirs
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_peak_by_name(name, tflops):
    """The datasheet's dense bfloat16 peak of the GPUs in the table; None for others."""
    peak = devices.peak_flops(name, torch.bfloat16)
    assert peak == (None if tflops is None else pytest.approx(1e12 * tflops))
    assert devices.peak_flops(name, torch.float16) == peak
    assert devices.peak_flops(name, torch.float32) is None


@pytest.mark.parametrize(
    "flags, dtype",
    [
        ({"avx2", "avx512f"}, torch.float32),
        ({"avx512_bf16"}, torch.bfloat16),
        ({"amx_bf16"}, torch.bfloat16),
        (set(), torch.float32),
    ],
)
def test_bfloat16_is_chosen_on_a_cpu_that_multiplies_in_it(monkeypatch, flags, dtype):
    monkeypatch.setattr(devices, "cpu_flags", lambda: flags)
    assert devices.choose_dtype("auto", torch.device("cpu")) is dtype
    assert devices.choose_dtype("float16", torch.device("cpu")) is torch.float16


@pytest.mark.parametrize("capability, dtype", [((9, 0), "bfloat16"), ((7, 5), "float16")])
def test_dtype_by_the_generation_of_a_gpu(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.dtype_name(devices.choose_dtype("auto", torch.device("cuda"))) == dtype


def test_dtype_of_matrix_products_is_that_of_autocast():
    x = torch.zeros(2)
    assert devices.matmul_dtype(x) is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert devices.matmul_dtype(x) is torch.bfloat16
    assert devices.matmul_dtype(x.double()) is torch.float64


@pytest.mark.parametrize("cuda, built_for", [("12.8", "CUDA 12.8"), (None, "CPUs only")])
def test_a_gpu_that_torch_cannot_use_is_reported(monkeypatch, tmp_path, capsys, cuda, built_for):
    """The CPU is used, and one line says why; no line if there is no GPU, or the CPU was asked."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device, driver = tmp_path / "nvidia0", tmp_path / "version"
    monkeypatch.setattr(devices, "NVIDIA_DEVICE", device)
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.choose_device("auto").type == "cpu" and capsys.readouterr().err == ""
    device.touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert devices.choose_device("auto").type == "cpu" and capsys.readouterr().err == ""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert devices.choose_device("cpu").type == "cpu" and capsys.readouterr().err == ""
    assert devices.choose_device("auto").type == "cpu"
    found = capsys.readouterr().err
    assert all(part in found for part in (str(device), built_for, "driver unknown", "pytorch.org"))
    driver.write_text("NVRM version: NVIDIA UNIX Kernel Module  550.54.15  Tue Mar  5\nGCC: 12.2\n")
    devices.choose_device("auto")
    assert "driver 550.54.15" in (found := capsys.readouterr().err) and found.count("\n") == 1


def test_a_device_that_is_not_available_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.choose_device("auto") == torch.device("cpu")
    assert devices.choose_device("cpu", local_rank=3) == torch.device("cpu")
    for name in ("cuda:1", "mps"):
        with pytest.raises(SettingError, match=f"device='{name}'.*--device=cpu"):
            devices.choose_device(name)
