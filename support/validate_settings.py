"""Checks of the trainer's settings: each error names the setting, its value and the remedy."""

import errno
import math
import os

from support import devices, trackers
from support.distributed import Runtime
from support.errors import SettingError

POSITIVE = (
    "n_layer n_head n_embd T total_batch_size max_steps val_tokens sample_tokens num_samples "
    "keep_checkpoints max_bad_steps max_lr eps muon_lr timeout_s"
)
NOT_NEGATIVE = (
    "seed B batch_ramp_tokens embedding_lr min_lr cooldown warmup_steps weight_decay beta1 beta2 "
    "grad_clip muon_momentum val_every hellaswag_every hellaswag_examples sample_every "
    "checkpoint_every"
)
LIMITS = dict(
    seed=2**64, beta1=1, beta2=1, muon_momentum=1,
    # No machine has the memory or the time for more.
    n_layer=10**4, n_head=10**5, n_embd=10**6, T=10**8, B=10**8, total_batch_size=10**10,
    batch_ramp_tokens=10**13, max_steps=10**9, sample_tokens=10**9, num_samples=10**6,
    timeout_s=10**7,
)  # fmt: skip
PER_RANK = {"data", "init_from", "hellaswag_data", "log_dir", "device"}  # may differ
CHOICES = dict(optimizer=("adamw", "muon"), schedule=("cosine", "linear"))


def validate(settings: dict, ramp_start: int) -> None:
    """Raises SettingError for the first setting that is out of range or contradicts another.

    ramp_start: tokens per step at the start of a batch ramp
    """
    check_ranges(settings)
    check_paths(settings)
    check_combinations(settings, ramp_start)
    trackers.validate(settings["tracker"])
    devices.validate_device_and_dtype(settings["device"], settings["dtype"])


def check_same(settings: dict, runtime: Runtime) -> None:
    """Raises SettingError, on all ranks, if one of them has another setting than rank 0.

    Each node may have paths of its own, if what they contain is the same.
    """
    shared = {name: value for name, value in settings.items() if name not in PER_RANK}
    runtime.check_same(shared, "start all processes with the same settings")


def check_ranges(settings: dict) -> None:
    """Raises SettingError if a setting by itself is out of range."""
    for name in POSITIVE.split():
        if not 0 < settings[name] < math.inf:
            raise SettingError(f"{name}={settings[name]}: must be above 0 and finite")
    for name in NOT_NEGATIVE.split():
        if not 0 <= settings[name] < math.inf:
            raise SettingError(f"{name}={settings[name]}: must be 0 or more and finite")
    for name, limit in LIMITS.items():
        if settings[name] >= limit:
            raise SettingError(f"{name}={settings[name]}: must be below {limit}")
    for name, choices in CHOICES.items():
        if settings[name] not in choices:
            raise SettingError(f"{name}={settings[name]!r}: must be {' or '.join(choices)}")


def check_paths(settings: dict) -> None:
    """Raises SettingError if a setting is not usable as a path."""
    for name in ("data", "init_from", "hellaswag_data", "log_dir"):
        if settings[name].startswith("~"):
            raise SettingError(
                f"{name}={settings[name]!r}: the shell leaves ~ as it is after =; write $HOME"
            )
        try:
            os.lstat(settings[name])
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                short = settings[name][:50]
                raise SettingError(f"{name}={short!r}...: {error.strerror}; shorten it") from None


def check_combinations(settings: dict, ramp_start: int) -> None:
    """Raises SettingError if two settings contradict each other."""
    s = settings
    T, batch = s["T"], s["total_batch_size"]
    if s["min_lr"] > s["max_lr"]:
        raise SettingError(f"min_lr={s['min_lr']}: above max_lr={s['max_lr']}; give both")
    if s["cooldown"] > 1:
        raise SettingError(f"cooldown={s['cooldown']}: must be at most 1, all steps after warm-up")
    if s["n_embd"] % s["n_head"]:
        raise SettingError(f"n_head={s['n_head']}: n_embd={s['n_embd']} is not a multiple of it")
    if batch % T:
        near = max(1, round(batch / T)) * T
        raise SettingError(f"total_batch_size={batch}: not a multiple of T={T}; {near} is one")
    if s["batch_ramp_tokens"] and batch <= ramp_start:
        raise SettingError(
            f"batch_ramp_tokens={s['batch_ramp_tokens']}: a ramp starts at {ramp_start} tokens, "
            f"and total_batch_size={batch} is not above that; set it to 0"
        )
    if s["val_every"] and s["val_tokens"] < T:
        raise SettingError(f"val_tokens={s['val_tokens']}: less than one window of T={T}")
