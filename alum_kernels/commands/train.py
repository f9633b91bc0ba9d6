"""Fine-tune a model, or go on with its pre-training, with or without an adversary.

Every option can also be a key of the file of --config (YAML or JSON, with underscores); flags win. The constants of the
method are those of alum_kernels.AdversarialConfig. A run that was stopped or killed goes on with --resume --output
FOLDER, and its losses are those of one that was not (on a CPU bit for bit).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.commands.errors import CommandError
from alum_kernels.commands.failures import check_one_process, in_one_line
from alum_kernels.commands.invocation import again
from alum_kernels.commands.parser import nearest
from alum_kernels.corpora import read_settings
from alum_kernels.training import atomic, run_folder, values
from alum_kernels.training.checkpoint import Checkpoints
from alum_kernels.training.data import read_data
from alum_kernels.training.errors import TrainingError
from alum_kernels.training.loop import Training
from alum_kernels.training.methods import CONSTANTS, check_resumable, method_config
from alum_kernels.training.settings import Settings, converted, names, options
from alum_kernels.training.stopping import StopRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command: every setting, every constant of the methods, and what is done with the folder."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML or JSON")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    parser.add_argument("--overwrite", action="store_true", help="remove the run in the output folder first")
    group = parser.add_argument_group("settings")
    for option in options():
        default = "" if option.default in (None, (), "") else f" ({_text(option.default)})"
        _add(group, option.name, option.metadata["help"].replace("%", "%%") + default)
    constants = parser.add_argument_group("constants of the method")
    for constant, name in CONSTANTS.items():
        _add(constants, constant, f"AdversarialConfig.{name}")


def _add(group: Any, name: str, about: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    switched = {"nargs": "?", "const": "true"} if name == "gradient_checkpointing" else {}
    group.add_argument(flag, default=argparse.SUPPRESS, metavar="VALUE", help=about, **switched)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def run(arguments: argparse.Namespace) -> int:
    """Train; the exit code is 0, 1 where the training failed on its way, or 130 or 143 after a signal."""
    check_one_process(
        "a checkpoint of this command holds the generators of one; several train with "
        "alum_kernels.integrations.transformers.AdversarialTrainer, or in a loop as docs/distributed.md and "
        "examples/distributed_loop.py have it"
    )
    with in_one_line("a smaller --batch-size with a larger --accumulation, or --gradient-checkpointing"):
        return _train(arguments)


def _train(arguments: argparse.Namespace) -> int:
    given = given_settings(arguments)
    if "output" not in given:
        raise TrainingError("output: expected a folder, got none; it has no default")
    folder = Path(converted("output", values.path, given))
    resume = arguments.resume and not arguments.overwrite and run_folder.begun(folder)
    if arguments.resume and not resume:
        print(f"{folder}: nothing to go on with, a new run begins", file=sys.stderr)
    settings = run_folder.resumed_settings(folder, given) if resume else Settings.of(given)
    config = method_config(settings.method, settings.constants, settings.seed)
    check_resumable(config, settings.accumulation)
    with run_folder.alone(folder):
        run_folder.prepare(folder, resume=arguments.resume, overwrite=arguments.overwrite)
        if resume and (folder / run_folder.RESULTS).is_file():
            print(f"{folder}: the run is finished, its figures are in {folder / run_folder.RESULTS}")
            return 0
        return _run(settings, config, folder, resume=resume)


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What flags and the settings file say, flags first.

    Raises:
        TrainingError: an unknown key in the file.
        CorpusError: the file cannot be read.
    """
    flags = {name: value for name, value in vars(arguments).items() if name in names()}
    if arguments.config is None:
        return flags
    given: dict[str, Any] = {}
    for key, value in read_settings(arguments.config).items():
        name = str(key).replace("-", "_")
        if name not in names():
            raise TrainingError(
                f"{arguments.config}: expected keys that are settings, got {key!r}; "
                f"the nearest is {nearest(name, names())!r}"
            )
        given[name] = value
    return {**given, **flags}


def _run(settings: Settings, config: AdversarialConfig | None, folder: Path, *, resume: bool) -> int:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    data = read_data(settings)
    record = run_folder.record_of(config, data.fingerprints)
    checkpoint = None
    if resume:
        if note := run_folder.check_record(folder, settings, record):
            _say(note)
        checkpoint = Checkpoints(folder, settings.keep, _say).newest()
        _say(f"{folder}: going on from {'the beginning' if checkpoint is None else checkpoint.folder.name}")
    training = Training(settings, config, data, checkpoint, _say)
    run_folder.write_begin(folder, settings, record)
    print(training.summary, flush=True)
    with StopRequest() as stop:
        command = again(["train", "--output", str(folder), "--resume"])
        try:
            outcome = training.run(stop)
        except KeyboardInterrupt as error:
            raise CommandError(
                f"interrupted within a step, which is not saved; go on with: {command}", stop.exit_code
            ) from error
        if not outcome.finished:
            _say(f"{stop.received.name}: step {outcome.step} of {training.total} is saved; go on with: {command}")
            return stop.exit_code
        _finish(training, folder, outcome.dev)
    return 0


def _finish(training: Training, folder: Path, dev: dict[str, float] | None) -> None:
    model = training.write_model()
    results = {"steps": training.total, "dev": dev, "settings": training.settings.to_dict()}
    atomic.write_text(folder / run_folder.RESULTS, json.dumps(results, indent=1) + "\n")
    for name, value in (dev or {}).items():
        print(f"dev {name:12}{value:.4f}")
    print(f"model: {model}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
