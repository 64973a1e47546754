"""How many threads a process takes, and how processes may share a training out."""

from types import SimpleNamespace

import pytest

from config import Config, ConfigError
from harness import run
from media import decode


@pytest.mark.parametrize(
    ("threads", "environment", "taken"),
    [
        (3, {}, [3]),
        (3, {"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}, [3]),
        (0, {"OMP_NUM_THREADS": "1"}, []),  # somebody has said so
        (0, {}, []),
        (0, {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, [6]),  # the launcher has said so
        (0, {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "4"}, []),
        (0, {"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "4"}, [1]),
        (0, {"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "8"}, [1]),
    ],
)
def test_threads_are_asked_for_or_a_share_of_the_cores(monkeypatch, threads, environment, taken):
    """On a machine of six cores."""
    monkeypatch.setattr(decode.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    for name in (*run.LAUNCHED, "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked: list[int] = []
    monkeypatch.setattr(run, "torch", SimpleNamespace(set_num_threads=asked.append))
    run.use_threads(Config(threads=threads))
    assert asked == taken


@pytest.mark.parametrize("make", [run.training_accelerator, run.patient_accelerator])
@pytest.mark.parametrize("has_gpu", [True, False])
def test_processes_that_accelerate_does_not_see_are_an_error(monkeypatch, make, has_gpu):
    """On Apple's GPUs, for one."""
    made: list[dict] = []
    monkeypatch.setattr(run, "Accelerator", lambda **options: made.append(options) or SimpleNamespace(num_processes=1))
    monkeypatch.setattr(run.torch.accelerator, "is_available", lambda: has_gpu)
    make(Config(threads=1))
    assert [options["cpu"] for options in made] == [not has_gpu]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started, but"):
        make(Config(threads=1))


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP1"),
        ({"ACCELERATE_USE_FSDP": "True"}, "FSDP1"),  # accelerate's default
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "a parallelism_config"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, None),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "fsdp_activation_checkpointing",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_MIXED_PRECISION": "no"}, None),
        ({}, None),
    ],
)
def test_a_training_is_shared_out_by_copies_or_fsdp2_alone(monkeypatch, environment, named):
    """As the launcher tells accelerate, which imports what it is told to use as soon as it is made."""
    for name in (
        "FSDP_VERSION",
        "FSDP_ACTIVATION_CHECKPOINTING",
        *(f"ACCELERATE_USE_{way}" for way in (*run.OTHER_WAYS, "FSDP")),
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    made: list[dict] = []
    monkeypatch.setattr(run, "Accelerator", lambda **options: made.append(options) or SimpleNamespace(num_processes=1))
    if named:
        with pytest.raises(ConfigError, match=f"told to use {named}, .* train with DDP, or with FSDP2"):
            run.training_accelerator(Config(threads=1))
        assert not made
    else:
        run.training_accelerator(Config(threads=1))
        assert made
