"""Processes, signals, and one ending for all programs."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    LoggerType,
    broadcast_object_list,
    set_seed,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from config import Config, ConfigError
from media.decode import cores

log = logging.getLogger("zoomgrpo")
T = TypeVar("T")
LONGEST = 2000  # characters of a message
# What Gloo and NCCL say in the processes that are left when one has ended.
GONE = re.compile("Connection (closed|reset) by peer|Broken pipe|remote process exited|Read timeout|Connection refused")


class TrainingError(Exception):
    """Training cannot go on: the message names the sample or file."""


class Stopped(Exception):
    """The run was told to stop by a signal, and has written a checkpoint."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


class StopSignal:
    """While entered, Ctrl-C and SIGTERM only take note; `check` then stops all processes together.

    A second Ctrl-C ends the run at once, without a checkpoint.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = 0
        self.previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        self.previous = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        log.warning("%s: stopping soon, with a checkpoint", signal.Signals(number).name)

    def check(self) -> None:
        """Raise Stopped if any process was told to stop; all processes must call this at the same point."""
        flag = torch.tensor([self.received], device=self.accelerator.device)
        number = int(self.accelerator.gather(flag).max())
        if number:
            raise Stopped(number)


# ---------------------------------------------------------------- processes


LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # what accelerate's launcher and torch's set
MOST_THREADS = 8  # that torch gets unasked: small operations gain nothing from more


def use_threads(config: Config) -> None:
    """Give torch `threads` CPU threads. 0 leaves its own choice, unless a launcher has made that one: then it gets this
    process' share of the cores.
    """
    threads = config.threads
    if not threads and any(name in os.environ for name in LAUNCHED) and os.environ.get("OMP_NUM_THREADS") == "1":
        threads = min(cores(), MOST_THREADS)
    if threads:
        torch.set_num_threads(threads)


# Ways to share a training out that a launcher's environment can ask accelerate for, other than DDP and FSDP2.
OTHER_WAYS = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM", "PARALLELISM_CONFIG": "a parallelism_config"}


def check_sharing() -> None:
    """Raise ConfigError if accelerate is told to share the training out in a way whose gradients, rollouts and
    checkpoints would not be right.
    """

    def told(name: str) -> bool:
        return os.environ.get(name, "").lower() in ("true", "1")

    ways = [way for name, way in OTHER_WAYS.items() if told(f"ACCELERATE_USE_{name}")]
    sharded = told("ACCELERATE_USE_FSDP")
    if sharded and os.environ.get("FSDP_VERSION", "1") != "2":
        ways.append("FSDP1")
    if sharded and told("FSDP_ACTIVATION_CHECKPOINTING"):
        ways.append("fsdp_activation_checkpointing")  # ours is the option gradient_checkpointing
    if ways:
        raise ConfigError(
            f"accelerate is told to use {' and '.join(ways)}, with which gradients, rollouts or checkpoints would be "
            "wrong: train with DDP, or with FSDP2 (--config_file recipes/accelerate_fsdp2.yaml)"
        )


def training_accelerator(config: Config) -> Accelerator:
    """This process among those of a training run, seeded. Raises ConfigError for a tracker unheard of, prompts that do
    not share out, or a way to share the training out that is not right.
    """
    check_sharing()
    if config.tracker not in ("none", *map(str, LoggerType)):
        known = ", ".join(map(str, LoggerType))
        raise ConfigError(f"there is no tracker {config.tracker!r}; there are none, {known}")
    accelerator = new_accelerator(
        config,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.out,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if config.prompts_per_step % (accelerator.num_processes * config.updates_per_rollout):
        raise ConfigError(
            f"prompts_per_step = {config.prompts_per_step} must be a multiple of {accelerator.num_processes} processes "
            f"x updates_per_rollout = {config.updates_per_rollout}"
        )
    set_seed(config.seed)
    return accelerator


def patient_accelerator(config: Config) -> Accelerator:
    """This process among those of a program whose processes wait for the slowest one as long as it takes, not ten
    minutes.
    """
    return new_accelerator(config, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=4))])


def new_accelerator(config: Config, **options: Any) -> Accelerator:
    """Accelerate's view of this process, and its threads. On a CPU accelerate must be told that it is one: it takes
    torchrun's processes for so many single ones otherwise. Raises ConfigError where it does so all the same.
    """
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=config.mixed_precision, **options)
    use_threads(config)  # accelerate has chosen too
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes < started:
        raise ConfigError(
            f"{started} processes were started, but accelerate cannot share work out on this machine: start one"
        )
    return accelerator


def share(tasks: Sequence[Any], accelerator: Accelerator) -> list[int]:
    """The numbers of the tasks that this process does: all those about every n-th `video`."""
    number = {video: k for k, video in enumerate(dict.fromkeys(task.video for task in tasks))}
    rank, n = accelerator.process_index, accelerator.num_processes
    return [i for i, task in enumerate(tasks) if number[task.video] % n == rank]


def main_does(accelerator: Accelerator | None, do: Callable[[], T]) -> T | None:
    """What `do` returns in the main process, None in the others, which wait. All raise TrainingError if it raises
    TrainingError or OSError: one that went on alone would wait for the others for ever. No accelerator: one process.
    """
    if accelerator is None:
        return do()
    result, problem = attempted(accelerator, do, TrainingError, OSError)
    from_main(accelerator, [], problem)
    return result


def main_reads(accelerator: Accelerator, read: Callable[[], T], *expected: type[Exception]) -> T:
    """What `read` returns in the main process, for all of them: a million rows are read once. Where it raises an
    `expected` error, all raise TrainingError; a process alone raises the error itself.
    """
    if accelerator.num_processes == 1:
        return read()
    result, problem = attempted(accelerator, read, ConfigError, OSError, *expected)
    [result] = from_main(accelerator, [result], problem)
    return result


def attempted(accelerator: Accelerator, do: Callable[[], T], *expected: type[Exception]) -> tuple[T | None, str | None]:
    """What `do` returns, or in words which of the expected errors it raises; in the other processes nothing is done."""
    try:
        return (do() if accelerator.is_main_process else None), None
    except expected as error:
        return None, in_words(error)


def from_main(accelerator: Accelerator, values: list, problem: str | None) -> list:
    """The main process' values, in all of them, which wait. All raise TrainingError for its problem, if it has one."""
    *values, problem = broadcast_object_list([*values, problem])
    accelerator.wait_for_everyone()  # as in `finish`
    if problem:
        raise TrainingError(problem)
    return values


def finish(accelerator: Accelerator, policy: nn.Module | None = None) -> None:
    """The end of a program of several processes, at which they wait for each other and let go of their group.

    Gloo's threads may then still be giving tensors back to Python, for which they need the interpreter's lock. Whoever
    has the group last waits for them: Python's side without the lock, DDP's reducer with it, which is for ever. So the
    reducer, without which DDP's `policy` cannot be used, goes first.
    """
    accelerator.wait_for_everyone()
    if isinstance(policy, DistributedDataParallel):
        policy.reducer = policy.logger = None  # which holds it too
    accelerator.end_training()


# ---------------------------------------------------------------- the end


def program(main: Callable[[], None], *expected: type[Exception]) -> None:
    """Call `main`; expected errors become one line and exit code 1, signals 128 + their number."""
    gc.freeze()  # what was imported; see `commands.begin`
    gc.enable()
    handler = logging.StreamHandler()
    handler.setFormatter(Readable("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    try:
        main()
    except (ConfigError, TrainingError, OSError, *expected) as error:
        sys.exit(f"error: {readable(in_words(error))}")
    except RuntimeError as error:
        if not GONE.search(str(error)):
            raise
        sys.exit("error: another process of this run has ended; its own message says why")
    except Stopped as stop:
        print(f"stopped by {signal.Signals(stop.number).name}, with a checkpoint; --resume continues", file=sys.stderr)
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        print("stopped at once; what was finished is kept", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


class Readable(logging.Formatter):
    """Messages as `readable` has them."""

    def format(self, record: logging.LogRecord) -> str:
        return readable(super().format(record))


def readable(message: str) -> str:
    """A message, which may quote a stranger's file, without what a terminal would obey, cut where nobody reads on."""
    signs = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in message[:LONGEST])
    return "".join(signs) + ("..." if len(message) > LONGEST else "")


def in_words(error: Exception) -> str:
    """The message of an error; one of the system names the file first, as all others do."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}"
    return str(error)
