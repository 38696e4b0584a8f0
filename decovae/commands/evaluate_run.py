"""What ``decovae evaluate`` does once its options are known: measure, write, and print the table."""

from __future__ import annotations

import time

from decovae.commands.evaluate import EvaluateConfig
from decovae.commands.evaluate_generation import evaluate_generation
from decovae.commands.evaluate_load import writing
from decovae.commands.evaluate_reconstruction import evaluate_reconstruction
from decovae.commands.evaluate_table import print_evaluation
from decovae.evaluation.outputs import write_evaluation
from decovae.evaluation.runs import open_run
from decovae.generation.flow_file import FlowRun
from decovae.runtime import Runtime


def run(config: EvaluateConfig, runtime: Runtime) -> None:
    """Measure a run on all processes, and write and print what was found on the main one.

    Raises:
        InputError: a run, samples, weights or volumes that cannot be used, or a folder that cannot be written.
        RunError: a reconstruction is not finite, or memory runs out.
    """
    start = time.perf_counter()
    found = runtime.on_main(lambda: open_run(config.run, command="decovae evaluate"))
    if isinstance(found.files, FlowRun):
        done = evaluate_generation(config, found, found.files, runtime)
    else:
        done = evaluate_reconstruction(config, found, found.files, runtime)
    done.evaluation["seconds"]["wall"] = round(time.perf_counter() - start, 3)
    runtime.on_main(writing(done.out)(lambda: write_evaluation(*done)))
    if runtime.main:
        print_evaluation(done.evaluation, done.out)
