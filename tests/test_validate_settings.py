"""Settings out of range, or that contradict each other: the error has the value and the remedy."""

import dataclasses

import pytest

from support import validate_settings
from support.errors import SettingError
from support.validate_settings import validate
from train_gpt2 import RAMP_START, Config

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
IMPOSSIBLE = [
    (dict(n_embd=100, n_head=12), "n_head=12", "n_embd=100", "multiple"),
    (dict(total_batch_size=5000), "total_batch_size=5000", "multiple of T=1024", "5120"),
    (dict(total_batch_size=4700), "total_batch_size=4700", "multiple of T=1024", "5120"),
    (dict(total_batch_size=4600), "total_batch_size=4600", "multiple of T=1024", "4096"),
    (dict(total_batch_size=100), "total_batch_size=100", "multiple of T=1024", "1024"),
    (
        dict(batch_ramp_tokens=10**9, total_batch_size=32768),
        "batch_ramp_tokens=1000000000", "32768", "set it to 0",
    ),
    (dict(val_tokens=1023), "val_tokens=1023", "T=1024"),
    (dict(dtype="fp16"), "dtype='fp16'", "auto, float32, bfloat16 or float16"),
    (dict(dtype="float64"), "dtype='float64'", "auto, float32, bfloat16 or float16"),
    (dict(device="gpu"), "device='gpu'", "auto, cpu, cuda, cuda:N or mps"),
    (dict(device="cuda:x"), "device='cuda:x'", "auto, cpu, cuda, cuda:N or mps"),
    (dict(device="cuda:1 "), "device='cuda:1 '", "auto, cpu, cuda, cuda:N or mps"),
    (dict(beta1=1.0), "beta1=1.0", "below 1"),
    (dict(beta2=1.5), "beta2=1.5", "below 1"),
    (dict(cooldown=1.5), "cooldown=1.5", "at most 1"),
    (dict(muon_momentum=1.0), "muon_momentum=1.0", "below 1"),
    (dict(optimizer="sgd"), "optimizer='sgd'", "adamw or muon"),
    (dict(schedule="constant"), "schedule='constant'", "cosine or linear"),
    (dict(min_lr=1e-3), "min_lr=0.001", "max_lr=0.0006"),
    (dict(max_lr=1e-5), "min_lr=6e-05", "max_lr=1e-05"),
    (dict(max_lr=float("nan")), "max_lr=nan", "above 0"),
    (dict(max_lr=float("inf")), "max_lr=inf"),
    (dict(eps=float("inf")), "eps=inf"),
    (dict(min_lr=float("nan")), "min_lr=nan", "0 or more"),
    (dict(grad_clip=float("inf")), "grad_clip=inf"),
    (dict(seed=2**64), f"seed={2**64}"),
    (dict(device="cuda:9999999"), "device='cuda:9999999'", "auto, cpu, cuda, cuda:N or mps"),
]  # fmt: skip
ABOVE_0 = (
    "n_layer", "n_head", "n_embd", "T", "total_batch_size", "max_steps", "val_tokens",
    "sample_tokens", "num_samples", "keep_checkpoints", "max_bad_steps", "max_lr", "eps",
    "muon_lr", "timeout_s",
)  # fmt: skip
NOT_BELOW_0 = (
    "seed", "B", "batch_ramp_tokens", "embedding_lr", "min_lr", "cooldown", "warmup_steps",
    "weight_decay", "beta1", "beta2", "grad_clip", "muon_momentum", "val_every", "hellaswag_every",
    "hellaswag_examples", "sample_every", "checkpoint_every",
)  # fmt: skip
IMPOSSIBLE += [({name: 0}, f"{name}=0", "above 0") for name in ABOVE_0]
IMPOSSIBLE += [({name: -1}, f"{name}=-1", "above 0") for name in ABOVE_0]
IMPOSSIBLE += [({name: -1}, f"{name}=-1", "0 or more") for name in NOT_BELOW_0]
IMPOSSIBLE += [
    ({name: "~/run"}, f"{name}='~/run'", "$HOME") for name in ("data", "init_from", "log_dir")
]
SIZES = (
    "n_layer", "n_head", "n_embd", "T", "B", "total_batch_size", "batch_ramp_tokens", "max_steps",
    "sample_tokens", "num_samples", "timeout_s",
)  # fmt: skip
IMPOSSIBLE += [
    ({name: "a" * 300}, f"{name}='{'a' * 50}'...", "name too long", "shorten")
    for name in ("data", "init_from", "hellaswag_data", "log_dir")
]
IMPOSSIBLE += [({name: 10**22}, f"{name}={10**22}", "must be below") for name in SIZES]


@pytest.mark.parametrize("case", IMPOSSIBLE, ids=lambda case: str(case[0]))
def test_impossible_setting_is_reported_with_its_value_and_the_remedy(case):
    settings, *words = case
    with pytest.raises(SettingError) as error:
        validate(vars(Config(**settings)), RAMP_START)
    assert str(error.value).startswith(words[0] + ":"), error.value
    assert all(word in str(error.value) for word in words), error.value


def test_every_number_has_a_range():
    numbers = {name for name, field in FIELDS.items() if field.type in (int, float)}
    assert numbers == {*ABOVE_0, *NOT_BELOW_0}
    assert validate_settings.POSITIVE.split() == [*ABOVE_0]
    assert validate_settings.NOT_NEGATIVE.split() == [*NOT_BELOW_0]


@pytest.mark.parametrize(
    "settings",
    [
        {name: 0 for name in NOT_BELOW_0},
        dict(val_every=0, val_tokens=1),
        dict(min_lr=6e-4),
        dict(total_batch_size=1024),
        dict(total_batch_size=33792, batch_ramp_tokens=1),
        dict(n_head=1),
        dict(n_head=768),
        dict(max_steps=5),
        dict(cooldown=1.0),
        dict(cooldown=0.2),
        *(dict(dtype=name) for name in ("auto", "float32", "bfloat16", "float16")),
        *(dict(device=name) for name in ("auto", "cpu", "mps", "cuda", "cuda:0", "cuda:11")),
    ],
    ids=str,
)
def test_possible_settings_at_the_edge_are_accepted(settings):
    validate(vars(Config(**settings)), RAMP_START)
