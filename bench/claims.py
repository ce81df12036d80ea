# ruff: noqa: E402
"""The paper's claims in small: all arms on the embedded world.

    python bench/claims.py --jobs 2                # all arms, 3 or 5 seeds: hours on 2 cores
    python bench/claims.py --jobs 2 --arms GRPO PTD-PO --seeds 1
    python bench/claims.py --table                 # what has been measured so far
    python bench/claims.py --page docs/claims.md   # write it into that page
    python bench/claims.py --figures docs          # draw it (pip install matplotlib)

"named" are the puzzles whose hint names the lines. "narrowed" are those of the family "next": the
hint names two rows, and only the reward says which of them counts. bench/arms.py says what each arm
is. The learning rate of the main arms, and the lambda of PTD-PO and of the HDPO-like arm, are
chosen on the split "tune", by seed 100. Each finished run is one line of bench/results/arms.jsonl,
and is not repeated: stop the script and start it again at any moment.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from arms import ARMS, GRIDS, MAIN, TEACHERS, Patches, main_arm
from claims_figures import draw
from claims_report import held_out_rows, mean_of_last, table
from common import RESULTS, append_row, load_rows, share_of_cores
from statements import statements_table

ROWS = RESULTS / "arms.jsonl"
STEPS, EVERY = 120, 15
TUNE_SEED = 100
PUZZLES = 800  # held-out ones; a quarter of them serves the evaluations on the way
MAIN_SEEDS, SEEDS = 5, 3


# ----------------------------------------------------------------------------- what a run measures
def kind_of(question) -> str:
    return "narrowed" if question.family == "next" else "named"


def family_of(question) -> str:
    return question.family


def shares(right, questions: list, label) -> dict[str, float]:
    """Percent of the questions whose id is in `right`, by label(question)."""
    groups = {}
    for question in questions:
        groups.setdefault(label(question), []).append(question.id in right)
    return {name: round(100 * sum(hits) / len(hits), 1) for name, hits in sorted(groups.items())}


def measured(trainer, evaluate, puzzles: int) -> dict:
    """The trained student: greedy accuracy, pass@8, and what another puzzle's answer does to it."""
    from rollout import verify
    from toy import world

    questions = world.puzzles("heldout", puzzles)
    right = evaluate(trainer, questions)["right"]
    quarter = questions[: puzzles // 4]
    passed = set()
    for group in trainer.respond(trainer.read(quarter), 8, temperature=1.0):
        question = group[0].question
        if any(verify(response.text, question, trainer.same_answer) for response in group):
            passed.add(question.id)
    return {
        "plain": shares(right, questions, kind_of),
        "families": shares(right, questions, family_of),
        "pass@8": shares(passed, quarter, kind_of),
        "told another answer": told_another_answer(trainer, quarter),
    }


def told_another_answer(trainer, questions: list) -> dict:
    """Told the next puzzle's answer, how often does the student say that, and how often its own?"""
    from hints import teacher_messages
    from rollout import verify

    told = []
    for question, following in zip(questions, questions[1:] + questions[:1], strict=True):
        if question.answer != following.answer:
            told.append(replace(question, answer=following.answer))
    truths = {question.id: question for question in questions}
    prompts = trainer.read(told, lambda question: teacher_messages(question, "answer"))
    says_it, is_right = set(), set()
    for [response] in trainer.respond(prompts, 1, temperature=0.0):
        question = response.question
        if verify(response.text, question, trainer.same_answer):
            says_it.add(question.id)
        if verify(response.text, truths[question.id], trainer.same_answer):
            is_right.add(question.id)
    return {"says it": shares(says_it, told, kind_of), "is right": shares(is_right, told, kind_of)}


def measured_teacher(trainer, evaluate, teacher_messages, puzzles: int) -> dict[str, float]:
    """Accuracy with what the teacher reads. Before the first step the student is the teacher."""
    from toy import world

    def messages(question):
        return teacher_messages(question, trainer.config.teacher_context)

    questions = world.puzzles("heldout", puzzles)
    return shares(evaluate(trainer, questions, messages)["right"], questions, kind_of)


def gradient(trainer, score, responses: list, **changes):
    """The student's gradient, flat, with changed settings."""
    import torch

    config = trainer.config
    trainer.config = replace(config, **changes)
    score(trainer, responses)
    trainer.config = config
    parameters = [p for p in trainer.student.parameters() if p.requires_grad]
    flat = torch.cat([(p.grad if p.grad is not None else 0 * p).flatten() for p in parameters])
    trainer.optimizer.zero_grad()
    return flat.detach()


def compare_gradients(trainer, score, responses: list) -> dict:
    """Norms of the policy's gradient, of the tutoring's (times lambda) and of the KL penalty's
    (times beta), and the cosine of the first two."""
    import torch

    both = gradient(trainer, score, responses, beta_kl=0.0)
    policy = gradient(trainer, score, responses, beta_kl=0.0, lam=0.0)
    penalty = gradient(trainer, score, responses, lam=0.0) - policy
    tutor = both - policy
    cosine = None  # where one of them is 0
    if policy.norm() and tutor.norm():
        cosine = torch.nn.functional.cosine_similarity(tutor, policy, dim=0).item()
    norms = {"policy": policy, "tutor": tutor, "kl": penalty}
    return {**{name: part.norm().item() for name, part in norms.items()}, "cosine": cosine}


# ------------------------------------------------------------------------------------------ one run
def watch_gradients(patches: Patches, train, compared: list[dict]) -> None:
    """Compare the gradients each EVERY steps, before the step's own is computed."""
    score, numbers = train.Trainer.score, itertools.count(1)

    def watched(trainer, responses):
        step = next(numbers)
        tutored = trainer.config.lam > 0 and any(response.tutored for response in responses)
        if tutored and step % EVERY == 1:
            compared.append({"step": step, **compare_gradients(trainer, score, responses)})
        return score(trainer, responses)

    patches.replace(train.Trainer, "score", watched)


def watch_accuracy(patches: Patches, train, curve: list[dict]) -> None:
    """Keep each evaluation on plain prompts, of all puzzles and by kind."""
    evaluate = train.Trainer.evaluate

    def watched(trainer, questions, messages=train.student_messages):
        numbers = evaluate(trainer, questions, messages)
        if messages is train.student_messages:
            right = numbers["right"]
            overall = round(100 * len(right) / len(questions), 1)
            curve.append({"all": overall, **shares(right, questions, kind_of)})
        return numbers

    patches.replace(train.Trainer, "evaluate", watched)


def measure_at_the_end(patches: Patches, train, job: dict, final: dict) -> None:
    """Measure the student after the last step, or on the split "teacher" the teacher before it."""
    loop, evaluate, puzzles = train.train, train.Trainer.evaluate, job.get("puzzles", PUZZLES)

    def watched(trainer, *inputs):
        if job["split"] == "teacher":
            messages = train.teacher_messages  # the arm's
            final["teacher"] = measured_teacher(trainer, evaluate, messages, puzzles)
            return loop(trainer, *inputs)
        summary = loop(trainer, *inputs)
        final.update(measured(trainer, evaluate, puzzles))
        return summary

    patches.replace(train, "train", watched)


def command_line(job: dict) -> list[str]:
    """train.py's options for a job."""
    options = {
        "--steps": job["steps"],
        "--eval-every": EVERY,
        "--eval-questions": job.get("puzzles", PUZZLES) // 4,
        "--save-every": 100_000,
        "--seed": job["seed"],
        "--name": "run",
    }
    words = [str(word) for option in options.items() for word in option]
    return [*words, *job["chosen"], *ARMS[job["arm"]].options]


def one_run(job: dict) -> dict:
    """Train and measure one arm in this process: train.py itself, with the arm's patch.

    job: arm, seed, split, steps, chosen (options of train.py) and perhaps puzzles. Raises
    RuntimeError where a patch has never been called.
    """
    from bench_losses import machine

    import train
    from toy.splits import FIRST_SEED

    arm, curve, compared, final = ARMS[job["arm"]], [], [], {}
    with Patches() as patches, tempfile.TemporaryDirectory() as folder:
        if job["split"] == "tune":  # the evaluations on the way, too, are on this split's puzzles
            tune = {"heldout": FIRST_SEED["tune"]}
            patches.enter_context(mock.patch.dict(FIRST_SEED, tune))
        if arm.patch:
            arm.patch(patches, train)
        measure_at_the_end(patches, train, job, final)
        watch_accuracy(patches, train, curve)
        if job["arm"] in MAIN:  # three more backward passes each EVERY steps
            watch_gradients(patches, train, compared)
        with contextlib.chdir(folder):
            train.main(command_line(job))
            [before, *logged] = load_rows(Path("runs/run/metrics.jsonl"))
            config = json.loads(Path("runs/run/config.json").read_text("utf-8"))
    patches.check(job["arm"])
    final["hinted"] = [100 * row["eval_hinted"] for row in (before, logged[-1])]
    names = ("entropy", "length", "all_failed", "informative", "all_correct", "accuracy", "tutored")
    clipped = [row["grad_norm"] > config["grad_clip"] for row in logged]
    evaluated_after = range(0, config["steps"] + 1, EVERY)  # an arm can have more than the job
    return {
        **job,
        "options": arm.options,
        "cpu_seconds": round(time.process_time()),
        "final": final,
        # an evaluation after a last step that is no multiple of EVERY is left out
        "curve": dict(zip(evaluated_after, curve, strict=False)),
        "gradients": compared,
        **{name: [round(row[name], 4) for row in logged] for name in names},
        "skipped": logged[-1]["skipped_steps"],
        "clipped": round(sum(clipped) / len(clipped), 3),
        "machine": machine("transformers", "accelerate"),
    }


# ------------------------------------------------------------------------------------- all the runs
def chosen(rows: list[dict], arm: str, steps: int) -> list[str] | None:
    """The options that were best on the split "tune"; None while the grid is not complete."""
    arm = main_arm(arm)
    tuned = [row for row in rows if row["split"] == "tune" and row["steps"] == steps]
    tried = [row for row in tuned if row["arm"] == arm]
    if len(tried) < len(GRIDS[arm]):
        return None
    return max(tried, key=lambda row: mean_of_last(row)["all"])["chosen"]


def job_key(job: dict) -> tuple:
    names = ("arm", "seed", "split", "steps")
    return tuple(job[name] for name in names), tuple(job["chosen"])


def run_in_child(job: dict, environment: dict[str, str]) -> dict:
    """one_run in a process of its own. Raises RuntimeError with the end of its error output."""
    command = [sys.executable, __file__, "--run", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_row(row: dict) -> None:
    accuracy = row["final"].get("teacher") or mean_of_last(row)
    name = f"{row['split']:8s}{row['arm']:26s}seed {row['seed']}"
    options = " ".join(row["chosen"])
    print(f"{name}  {options:22s}{accuracy}  {row['cpu_seconds']} s", flush=True)


def run_all(jobs: list[dict], rows: list[dict], parallel: int) -> None:
    """Run the jobs that have no row yet, and add their rows to the file and to `rows`.

    A run that fails is named, and the others go on; then the program ends.
    """
    done = {job_key(row) for row in rows}
    missing = [job for job in jobs if job_key(job) not in done]
    environment, failures = share_of_cores(parallel), 0
    with ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(run_in_child, job, environment) for job in missing]
        for future in as_completed(futures):
            try:
                row = future.result()
            except RuntimeError as error:
                failures += 1
                print(f"FAILED {error}", file=sys.stderr, flush=True)
                continue
            rows.append(row)
            append_row(ROWS, row)
            print_row(row)
    if failures:
        sys.exit(f"{failures} runs failed: see above")


def measure_all(
    arms: list[str], seeds: int | None, steps: int, parallel: int, rows: list[dict]
) -> None:
    """The grids of the main arms, then the teachers, then all arms, one seed after the other.

    seeds: of each arm; None: MAIN_SEEDS of the main arms and SEEDS of the others.
    """
    needed = {main_arm(arm) for arm in arms}
    tune = {"seed": TUNE_SEED, "split": "tune", "steps": steps}
    grids = []
    for arm in MAIN:
        if arm in needed:
            job = {**tune, "arm": arm}
            grids += [{**job, "chosen": options} for options in GRIDS[arm]]
    run_all(grids, rows, parallel)
    best = {arm: chosen(rows, arm, steps) for arm in arms}
    job = {"seed": 0, "split": "teacher", "steps": 1}
    teachers = [{"arm": arm, **job, "chosen": best[arm]} for arm in TEACHERS if arm in arms]
    run_all(teachers, rows, parallel)
    wanted = {arm: seeds or (MAIN_SEEDS if arm in MAIN else SEEDS) for arm in arms}
    held_out = []
    for seed in range(max(wanted.values())):
        job = {"seed": seed, "split": "heldout", "steps": steps}
        held_out += [{"arm": arm, **job, "chosen": best[arm]} for arm in arms if seed < wanted[arm]]
    run_all(held_out, rows, parallel)


def tables_of(rows: list[dict], steps: int) -> dict[str, str]:
    """Markdown by the name of the place in docs/claims.md."""
    statements = statements_table(held_out_rows(rows, steps))
    return {"statements": statements, "tables": table(rows, steps)}


def write_page(page: Path, tables: dict[str, str]) -> None:
    """Put each table between its two marks in the page. ValueError where they are missing."""
    text = page.read_text("utf-8")
    for name, content in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page}: it must hold {begin} and {end} once")
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        text = f"{before}{begin}\n\n{content}\n\n{end}{after}"
    page.write_text(text, "utf-8")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(ARMS)
    seeds = f"{MAIN_SEEDS} of the main arms, {SEEDS} of the others"
    parser.add_argument("--seeds", type=int, help=f"seeds 0 to N - 1 [{seeds}]")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=names,
        default=names,
        metavar="ARM",
        help=f"of: {'; '.join(names)}",
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"optimizer steps per run [{STEPS}]"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--table", action="store_true", help="print what has been measured and stop"
    )
    parser.add_argument(
        "--page", type=Path, help="write what has been measured into a page and stop"
    )
    parser.add_argument(
        "--figures", type=Path, metavar="FOLDER", help="draw what has been measured and stop"
    )
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.run:
        return print(json.dumps(one_run(json.loads(args.run))))
    rows = load_rows(ROWS)
    if args.figures:
        return draw(rows, args.figures, args.steps)
    if args.page:
        return write_page(args.page, tables_of(rows, args.steps))
    if not args.table:
        measure_all(args.arms, args.seeds, args.steps, args.jobs, rows)
    print("\n\n".join(tables_of(rows, args.steps).values()))


if __name__ == "__main__":
    main()
