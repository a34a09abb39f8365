"""What a device can do: which one to use, in which dtype, and how fast it could be."""

import contextlib
import ctypes
import functools
import os
import re
import sys
from pathlib import Path

import torch

from support.errors import SettingError, UserError
from support.launch import print0

# Dense bfloat16 or float16 peaks of the datasheets, in TFLOP/s; the first name that matches counts.
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "GH200": 989.5, "H200": 989.5, "H100 PCIe": 756, "H100 NVL": 835,
    "H100": 989.5, "H800": 989.5, "H20": 148, "A100": 312, "A800": 312, "L40S": 362, "L40": 181,
    "L4": 121, "A40": 149.7, "A30": 165, "A10G": 70, "A10": 125, "RTX A6000": 154.8,
    "RTX 6000 Ada": 364.2,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 4080": 97.5, "RTX 3090": 71, "V100": 125, "T4": 65,
}  # fmt: skip
INSTALL_TORCH = "https://pytorch.org/get-started/locally"
NVIDIA_DEVICES, NVIDIA_DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")


def validate_device_and_dtype(device: str, dtype: str) -> None:
    """Raises SettingError if the setting `device` or `dtype` has no valid form."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise SettingError(f"dtype={dtype!r}: must be auto, float32, bfloat16 or float16")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", device):
        raise SettingError(f"device={device!r}: must be auto, cpu, cuda, cuda:N or mps")


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that the setting `device` means for a process of this local rank.

    Raises SettingError or UserError if it is not available.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
        hidden = "CUDA_VISIBLE_DEVICES" in os.environ  # perhaps by the user
        gpu = min(NVIDIA_DEVICES.glob("nvidia[0-9]*"), default=None)
        if name == "cpu" and gpu and not hidden:
            print0(describe_unused_gpu(gpu), file=sys.stderr)
    device = torch.device(name)
    if device.type == "mps" and not mps:
        raise SettingError("device='mps': not available on this machine; --device=cpu always is")
    if device.type == "cuda":
        if not cuda:
            raise SettingError(
                f"device={name!r}: torch {torch.__version__} finds no CUDA device on this machine; "
                "--device=cpu is always available"
            )
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(
                f"device='cuda:{index}': this machine has {torch.cuda.device_count()} CUDA "
                "devices; start fewer processes, or choose another device"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)  # PyTorch warns here if it has no kernels for the device
    return device


def use_in_thread(device: torch.device) -> None:
    """Makes a GPU the current one of this thread, which else is GPU 0 in each thread.

    Pinned memory belongs to a context of the current GPU: on one that another process uses, a new
    context would take half a gigabyte.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def describe_unused_gpu(gpu: Path) -> str:
    """Why this torch may not find an NVIDIA GPU of this machine, and what to do."""
    driver = re.search(r"\d+\.\d+(\.\d+)?", read_text(NVIDIA_DRIVER))
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    return (
        f"{gpu} is there, but torch {torch.__version__}, built for {built_for}, cannot "
        f"use it (driver {driver[0] if driver else 'unknown'}{driver_cuda()}); using the CPU. "
        f"Install a torch for a CUDA version that the driver has: {INSTALL_TORCH}"
    )


def driver_cuda() -> str:
    """The newest CUDA of the NVIDIA driver, as ", up to CUDA 12.4"; "" if it does not say."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return ""
    return f", up to CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products that the setting `dtype` means on this device.

    auto: bfloat16 where the device multiplies in it, float16 on older CUDA devices, else float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if modern else torch.float16
    if device.type == "cpu":
        # Without hardware for it, bfloat16 is many times slower than float32 (pytorch#118499).
        fast = cpu_flags() & {"avx512_bf16", "amx_bf16"}
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16


@functools.cache
def cpu_flags() -> set[str]:
    """The words of /proc/cpuinfo, which include the processor's features; empty if not on Linux."""
    return set(read_text(Path("/proc/cpuinfo")).split())


def read_text(path: Path) -> str:
    """The content of a file; "" if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of matrix products with x: that of autocast if it is enabled, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# Where the residual stream is in bfloat16 if the matrix products are, as in llm.c: half the bytes
# to move between two products. On CPUs the gain is not measured.
BFLOAT16_STREAM = {"cuda"}


def residual_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a residual stream that begins with x: bfloat16 in autocast on a GPU, or x's own.

    float16 is no choice: its largest number is 65,504.
    """
    use_bfloat16 = x.device.type in BFLOAT16_STREAM and matmul_dtype(x) == torch.bfloat16
    return torch.bfloat16 if use_bfloat16 else x.dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as the setting `dtype` has it: bfloat16, float16, float32."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """The name of a GPU's model; of other devices their type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cudnn_version() -> str | None:
    """The version of cuDNN that torch uses; None if it has none."""
    version = torch.backends.cudnn.version()  # 9.20.0 as 92000
    return version and f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def attention_backend(device: torch.device, dtype, n_head: int, n_embd: int, T: int) -> str | None:
    """The kernel that a training step uses for attention; None if torch does not say.

    dtype: of queries, keys and values; T: tokens in a row
    """
    try:
        x = torch.empty(1, T, 3 * n_embd, device=device, dtype=dtype, requires_grad=True)
        q, k, v = (y.view(1, T, n_head, -1).transpose(1, 2) for y in x.split(n_embd, dim=2))
        choice = torch._fused_sdp_choice(q, k, v, is_causal=True)
        return {0: "math", 1: "flash", 2: "efficient", 3: "cuDNN"}[int(choice)]
    except Exception:  # a private function; a run does not need its answer
        return None


def describe_system(name: str, dtype_name: str, n_head: int, n_embd: int, T: int) -> str:
    """The versions and the device of a run, e.g. "torch 2.13.0 | CUDA 13.0 | ... | NVIDIA H100".

    name: of the device, as `device_name` has it; others as in `attention_backend`, which is of the
        current CUDA device
    """
    parts = [f"torch {torch.__version__}"]
    if torch.cuda.is_available() and name not in ("cpu", "mps"):
        cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        cudnn, dtype = torch.version.cuda and cudnn_version(), getattr(torch, dtype_name)
        backend = attention_backend(torch.device("cuda"), dtype, n_head, n_embd, T)
        parts += [cuda, cudnn and f"cuDNN {cudnn}", name, backend and f"attention: {backend}"]
    else:
        parts.append(name)
    return " | ".join(filter(None, parts))


def peak_memory_mib(device: torch.device) -> int | None:
    """The most memory that this process used so far, on a GPU that of tensors; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)  # in bytes there, elsewhere in KiB


@contextlib.contextmanager
def without_cudnn_attention():
    """A context for calls of attention whose shapes vary: CUDA uses another backend than cuDNN.

    cuDNN builds a plan for each new shape, which takes 42 to 400 ms; in decoding each token has a
    new one. (`sdpa_kernel` would take longer, and enable backends that the caller has disabled.)
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def keep_freed_memory() -> None:
    """Makes glibc keep the memory of freed tensors for new ones.

    By default glibc returns large blocks to the kernel, which maps and clears them page by page for
    the next tensor. That is a third of the time of a training step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, in bytes
            mallopt(parameter, 2**31 - 1)


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """The peak rate of a GPU of this name in FLOP/s; None if it is not in PEAK_TFLOPS."""
    if dtype == torch.float32:
        return None
    for known, tflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{known}\b(?! (Ti|SUPER|D|NVL|Laptop)\b)", name):
            return 1e12 * tflops
    return None
