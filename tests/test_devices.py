"""What a device can do: dtypes, names, and speed as a share of what is possible."""

import warnings

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
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H200 NVL", None),
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


class FakeDriver:
    """libcuda of CUDA 12.4."""

    def __init__(self, name):
        assert name == "libcuda.so.1"

    def cuDriverGetVersion(self, pointer):  # noqa: N802
        pointer._obj.value = 12040


@pytest.mark.parametrize("cuda, built_for", [("12.8", "CUDA 12.8"), (None, "CPUs only")])
def test_a_gpu_that_torch_cannot_use_is_reported(monkeypatch, tmp_path, capsys, cuda, built_for):
    """The CPU is used, and one line says why; no line if there is no GPU, or the CPU was asked."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device, driver = tmp_path / "nvidia3", tmp_path / "version"  # a container may lack nvidia0
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(devices, "NVIDIA_DEVICES", tmp_path)
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
    monkeypatch.setattr(devices.ctypes, "CDLL", FakeDriver)
    devices.choose_device("auto")
    found = capsys.readouterr().err
    assert "(driver 550.54.15, up to CUDA 12.4)" in found and found.count("\n") == 1


def test_a_device_that_is_not_available_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.choose_device("auto") == torch.device("cpu")
    assert devices.choose_device("cpu", local_rank=3) == torch.device("cpu")
    for name in ("cuda:1", "mps"):
        with pytest.raises(SettingError, match=f"device='{name}'.*--device=cpu"):
            devices.choose_device(name)


@pytest.fixture
def h100(monkeypatch):
    """torch for CUDA 13.0 on a machine whose only GPU is an H100, as far as devices.py asks."""
    fakes = dict(
        is_available=lambda: True, device_count=lambda: 1, set_device=lambda device: None,
        get_device_name=lambda device: "NVIDIA H100 80GB HBM3",
        get_device_capability=lambda device: (9, 0), get_arch_list=lambda: ["sm_80", "sm_90"],
    )  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    monkeypatch.setattr(torch, "__version__", "2.13.0")


@pytest.mark.parametrize("capability, fits", [((9, 0), True), ((8, 9), True), ((10, 0), False)])
def test_torch_warns_of_a_gpu_that_it_has_no_kernels_for(h100, monkeypatch, capability, fits):
    """By itself, when CUDA starts: this program has no check of its own."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda._check_capability()
        torch.cuda._check_cubins()
    text = "".join(str(warning.message) for warning in found)
    assert not text if fits else "H100" in text and "pytorch.org" in text


def test_the_start_line_names_software_device_and_attention(h100, monkeypatch):
    shapes, empty = [], torch.empty

    def choose(q, k, v, is_causal):
        assert is_causal and q.requires_grad and q.dtype == torch.bfloat16
        shapes.append([tuple(x.shape) for x in (q, k, v)])
        return answers.pop()

    monkeypatch.setattr(torch, "empty", lambda *shape, device, **more: empty(*shape, **more))
    monkeypatch.setattr(torch, "_fused_sdp_choice", choose)
    answers, start = [1, 3], "torch 2.13.0 | CUDA 13.0 | cuDNN 9.20.0 | NVIDIA H100 80GB HBM3"
    arguments = "NVIDIA H100 80GB HBM3", "bfloat16", 12, 768, 1024
    assert devices.describe_system(*arguments) == f"{start} | attention: cuDNN"
    assert devices.describe_system(*arguments) == f"{start} | attention: flash"
    assert devices.describe_system(*arguments) == start  # an error (of the empty list) is no answer
    assert shapes[0] == [(1, 12, 1024, 64)] * 3
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert devices.describe_system(*arguments) == start
    assert devices.describe_system("cpu", "float32", 12, 768, 1024) == "torch 2.13.0 | cpu"


def test_the_attention_kernel_is_the_one_that_torch_chooses():
    """torch's own function, on this CPU: flash, and the plain one if that is disabled."""
    arguments = torch.device("cpu"), torch.float32, 2, 32, 16
    assert devices.attention_backend(*arguments) == "flash"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert devices.attention_backend(*arguments) == "math"
