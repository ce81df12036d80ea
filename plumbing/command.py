"""From the command line to a finished run: what `python train.py` does around the loop."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from accelerate.utils import DistributedType, set_seed

from plumbing.check import check
from plumbing.images import quiet_loading
from plumbing.inputs import Inputs, read_inputs
from plumbing.memory import plan, plan_table, what_to_change
from plumbing.models import build
from plumbing.page import check_finished, write_page
from plumbing.runs import (
    Checkpoints,
    Run,
    RunFolder,
    describe,
    load_checkpoint,
    make_accelerator,
    print_summary,
    start_trackers,
)
from plumbing.settings import THIS_RUN, make_parser, read_settings
from plumbing.stopping import Stopped, interrupt_in_one_line
from plumbing.study import finished_rows, study


@interrupt_in_one_line()
def run_command(
    config_class: type, trainer_class: type, loop: Callable, toy, groups: dict[str, type], argv=None
) -> None:
    """Read the settings and the inputs, do what they ask for, and print a summary.

    config_class: train.TrainConfig; trainer_class: train.Trainer; loop: train.train; toy: the
    embedded world, a package with `world` and `settings`; groups: the config classes by their title
    in --help. Bad input ends the program before a model is loaded: one line, exit code 2.
    """
    parser = make_parser(groups, toy.settings.SETTINGS)
    config = read_settings(config_class, parser, toy.settings.SETTINGS, argv)
    page_only = config.report not in ("", THIS_RUN)
    if page_only:  # the finished run's training questions are not read again
        config = replace(config, data="", hints="", resume=config.report)
    accelerator = make_accelerator(config)
    try:
        inputs = read_inputs(config, toy.world, accelerator.num_processes)
        if page_only:
            check_finished(inputs.folder)
        checkpoints = Checkpoints(accelerator, inputs.folder, config.keep)
        studied = finished_rows(inputs, config) if config.study_hints else {}
        checkpoint, state = None, None
        if config.resume and not (page_only or config.study_hints):
            checkpoint, state = checkpoints.newest(inputs.stream, config)
    except ValueError as error:
        parser.error(str(error))
    if config.plan:
        parts = plan(config, config.plan, config.precision != "no")
        return accelerator.print(plan_table(parts, config.plan))
    reason = too_large(config, accelerator)
    if reason:
        parser.error(reason)
    quiet_loading()
    if page_only:
        return print(f"written: {write_page(inputs, config)}")
    set_seed(config.seed, device_specific=True)
    torch.set_flush_denormal(True)  # denormal floats make a CPU's matrix products slower by far
    try:
        student, reference = build(config, accelerator)
    except ValueError as error:
        parser.error(str(error))
    accelerator.print(f"{describe(student, config, accelerator)}\n{inputs.note}")
    judge = inputs.same_answer
    trainer = trainer_class(config, accelerator, inputs.processor, student, reference, judge)
    del student, reference
    if config.study_hints:
        return study(trainer, inputs, studied)
    if config.check:
        return check_machinery(trainer, inputs)
    run_loop(trainer, loop, inputs, checkpoints, checkpoint, state)
    if config.report:
        accelerator.free_memory(trainer)  # the page loads its own two models
        del trainer
        print(f"a page to look at: {write_page(inputs, config)}")


def too_large(config, accelerator) -> str | None:
    """What to change where the run would not fit on this GPU; None where it fits, or on a CPU."""
    trains = not config.study_hints and config.report in ("", THIS_RUN)
    if accelerator.device.type != "cuda" or not trains:
        return None
    free, _ = torch.cuda.mem_get_info(accelerator.device)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    gpus = accelerator.num_processes if sharded else 1
    return what_to_change(config, gpus, accelerator.mixed_precision == "bf16", free)


def check_machinery(trainer, inputs: Inputs) -> None:
    """--check: print a table and write nothing."""
    all_right, table = check(trainer, inputs.stream)
    trainer.accelerator.print(table)
    sys.exit(0 if all_right else 1)


def run_loop(trainer, loop: Callable, inputs: Inputs, checkpoints, checkpoint, state) -> None:
    """Train, save the model, print the summary. checkpoint, state: of a resumed run.

    From here on SIGTERM and Ctrl-C are noted, and the run stops where it can (Run.stop).
    """
    config, accelerator = trainer.config, trainer.accelerator
    accelerator.wait_for_everyone()  # every process has seen that the run's folder is new
    folder = RunFolder(inputs.folder, asdict(config), accelerator.is_main_process, state)
    if state:
        load_checkpoint(checkpoint, state, accelerator)
    start_trackers(accelerator, inputs.folder, config)
    run = Run(folder, checkpoints, state)
    with trainer.signals.noted(prints=accelerator.is_main_process):
        try:
            summary = loop(trainer, inputs.stream, inputs.held_out, run)
        except Stopped as stopped:
            run.stop(trainer, stopped)
        folder.save_model(trainer)
    if accelerator.is_main_process:
        print_summary(summary, folder, trainer)
    accelerator.wait_for_everyone()
    accelerator.end_training()
