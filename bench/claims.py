"""The paper's claims in small: every arm on the embedded world, half of its puzzles in fog, as one JSON line a run.

    python bench/claims.py --jobs 2                    # all arms, 3 seeds: hours on 2 cores; stop it and run it again at any moment
    python bench/claims.py --jobs 2 --arms GRPO PTD-PO --seeds 1
    python bench/claims.py --table                     # what has been measured so far
    python bench/claims.py --figures docs              # draw it (pip install matplotlib)

In clear sight the hinted teacher is right in 99.8 % of the puzzles, in fog in 64 %: there the reward knows what the teacher does not. An arm is
options of train.py, or, for what nobody should train with, a patch of one function. Learning rate and lambda of the main arms are chosen
on the split "tune", by seed 100 after 120 steps; every other arm differs from PTD-PO in the one thing that its name says. Results: bench/results/claims.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
RESULTS = ROOT / "bench" / "results" / "claims.jsonl"
STEPS, EVERY = 240, 20
TUNE_STEPS, TUNE_SEED = 120, 100
KINDS = ("clear", "foggy")


# ----------------------------------------------------------------------------------------------------------------- patches
def no_policy_loss(train):
    advantages = train.group_advantages
    train.group_advantages = lambda rewards: 0 * advantages(rewards)


def all_responses(train):
    """Tutor the right responses of a tutored group as well."""
    route = train.route

    def everyone(correct, has_hint, tau, lam):
        group = ~route(correct, has_hint, tau, lam).kl[:, 0]
        return train.Route(
            group.unsqueeze(1).expand_as(correct), ~group.unsqueeze(1).expand_as(correct)
        )

    train.route = everyone


def self_distillation(train):
    """Every response of every question, no reward."""
    no_policy_loss(train)
    train.route = lambda correct, has_hint, tau, lam: train.Route(
        has_hint.unsqueeze(1).expand_as(correct), ~has_hint.unsqueeze(1).expand_as(correct)
    )


def change_hint(change):
    def patch(train):
        messages = train.teacher_messages
        train.teacher_messages = lambda sample, context: messages(
            replace(sample, hint=change(sample)), context
        )

    return patch


def another_hint(sample):
    """The hint of another puzzle of the same family."""
    from toy import world

    seed = int(sample.id.removeprefix("puzzle-"))
    return world.hint(world.make_puzzle("train", (seed + 7919) % 10**9, sample.family.split()[-1]))


def blind_teacher(train):
    """The teacher's chat without the image, as in the released code."""
    messages, encode = train.teacher_messages, train.encode_prompts

    def text_only(sample, context):
        return [
            {**turn, "content": [part for part in turn["content"] if part["type"] != "image"]}
            for turn in messages(sample, context)
        ]

    def encoded(processor, samples, chats):
        seen = [
            any(part["type"] == "image" for turn in chat for part in turn["content"])
            for chat in chats
        ]
        return encode(
            processor,
            [s if sees else replace(s, images=[]) for s, sees in zip(samples, seen)],
            chats,
        )

    train.teacher_messages, train.encode_prompts = text_only, encoded


def released_formula(train):
    """p detached in front of the logarithms and differentiated in the mixture: PAPER 2.5 in our words."""
    import torch

    import losses

    def released(log_p, log_q):
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return 0.5 * (log_p.exp().detach() * (log_p - log_m) + log_q.exp() * (log_q - log_m))

    losses.DIVERGENCES["jsd"] = released


# -------------------------------------------------------------------------------------------------------------------- arms
# name -> (options on top of the chosen ones, patch). The main arms choose their own learning rate (and PTD-PO its lambda).
MAIN = {
    "GRPO": (["--lam", "0"], None),
    "PTD-PO": ([], None),
    "tutoring alone": ([], no_policy_loss),
    "teacher told the answer": (["--teacher-context", "answer"], None),
    "self-distillation": (["--teacher-context", "solution"], self_distillation),
}
ABLATIONS = {
    "all responses": ([], all_responses),
    "released formula": (["--support", "student"], released_formula),
    "blind teacher": ([], blind_teacher),
    "shuffled hint": ([], change_hint(another_hint)),
    "hint without look": ([], change_hint(lambda s: replace(s.hint, look=[]))),
    "hint without ignore": ([], change_hint(lambda s: replace(s.hint, ignore=[]))),
    "hint without steps": ([], change_hint(lambda s: replace(s.hint, steps=[]))),
    "tau 0.2": (["--tau", "0.2"], None),
    "K 1": (["--jsd-k", "1"], None),
    "K 5": (["--jsd-k", "5"], None),
    "K full": (["--jsd-k", "1000"], None),
    "student's support": (["--support", "student"], None),
    "forward KL": (["--divergence", "forward_kl"], None),
    "reverse KL": (["--divergence", "reverse_kl"], None),
    "lambda 0.1": (["--lam", "0.1"], None),
    "lambda 0.5": (["--lam", "0.5"], None),
    "lambda 1": (["--lam", "1"], None),
    "KL penalty off": (["--beta-kl", "0"], None),
    "GRPO, KL penalty off": (["--lam", "0", "--beta-kl", "0"], None),
    "GRPO, three times the lr": (
        ["--lam", "0", "--lr", "3e-4"],
        None,
    ),  # as good as the chosen one on "tune"
    "no policy loss": ([], no_policy_loss),  # tutoring alone, with PTD-PO's settings
    "two updates": (["--updates", "2"], None),
    "two updates, GSPO": (
        [
            "--updates",
            "2",
            "--ratio",
            "sequence",
            "--aggregate",
            "sequence",
            "--clip-low",
            "3e-4",
            "--clip-high",
            "4e-4",
        ],
        None,
    ),
}
ARMS = {**MAIN, **ABLATIONS}
# the arms whose teachers read something else each: how often each teacher is right is measured as well
TEACHERS = (
    "PTD-PO",
    "hint without look",
    "hint without ignore",
    "hint without steps",
    "shuffled hint",
    "blind teacher",
    "teacher told the answer",
    "self-distillation",
)
RATES = ("1e-4", "3e-4", "1e-3")
GRIDS = {arm: [["--lr", lr] for lr in RATES] for arm in MAIN} | {
    "PTD-PO": [["--lr", lr, "--lam", lam] for lr in RATES for lam in ("1", "10")]
}


# ------------------------------------------------------------------------------------------------------------------ one run
def kind_of(sample) -> str:
    return "foggy" if sample.family.startswith("foggy") else "clear"


def shares(right: set, samples, label) -> dict:
    """Share of right samples by label(sample), in percent."""
    groups = {}
    for s in samples:
        groups.setdefault(label(s), []).append(s.id in right)
    return {name: round(100 * sum(hits) / len(hits), 1) for name, hits in sorted(groups.items())}


def measured(trainer, train, evaluate) -> dict:
    """The trained student: greedy accuracy, pass@8, and what it makes of being told another puzzle's answer."""
    from hints import teacher_messages
    from toy import world

    samples = world.puzzles("heldout", 800, fog=0.5)
    right = evaluate(trainer, samples)["right"]
    some = samples[:200]
    prompts = train.encode_prompts(
        trainer.processor, some, [train.student_messages(s) for s in some]
    )
    groups = trainer.sample(some, prompts, 8, temperature=1.0)
    passed = {
        s.id for s, g in zip(some, groups) if any(trainer.verify(r.text, s.answer) for r in g)
    }
    told = [
        replace(s, answer=t.answer)
        for s, t in zip(some, some[1:] + some[:1])
        if s.answer != t.answer
    ]
    prompts = train.encode_prompts(
        trainer.processor, told, [teacher_messages(s, "answer") for s in told]
    )
    truth, said = {s.id: s.answer for s in some}, trainer.sample(told, prompts, 1, temperature=0.0)
    follows = {s.id for s, g in zip(told, said) if trainer.verify(g[0].text, s.answer)}
    kept = {s.id for s, g in zip(told, said) if trainer.verify(g[0].text, truth[s.id])}
    return {
        "plain": shares(right, samples, kind_of),
        "families": shares(right, samples, lambda s: s.family),
        "pass@8": shares(passed, some, kind_of),
        "told another answer": {
            "says it": shares(follows, told, kind_of),
            "is right": shares(kept, told, kind_of),
        },
    }


def watch_gradients(train, out: list) -> None:
    """Every EVERY steps: norm of the tutoring gradient (times lambda) over the policy gradient's, and their cosine."""
    import torch

    update, calls = train.Trainer.update, []

    def gradient(trainer, work, method):
        whole, trainer.method = trainer.method, method
        trainer.accumulate(work)
        trainer.method = whole
        flat = torch.cat(
            [p.grad.flatten() for p in trainer.student.parameters() if p.grad is not None]
        ).clone()
        trainer.optimizer.zero_grad()
        return flat

    def watched(trainer, work):
        calls.append(None)
        if trainer.method.lam and len(calls) % EVERY == 1 and any(w.tutored for w in work):
            both, policy = (
                gradient(trainer, work, replace(trainer.method, beta_kl=0.0, **more))
                for more in ({}, {"lam": 0.0})
            )
            tutor, norm = both - policy, policy.norm().item()
            cosine = (
                torch.nn.functional.cosine_similarity(tutor, policy, dim=0).item()
                if norm and tutor.norm()
                else None
            )
            out.append(
                {"step": len(calls), "policy": norm, "tutor": tutor.norm().item(), "cosine": cosine}
            )
        return update(trainer, work)

    train.Trainer.update = watched


def one_run(job: dict) -> dict:
    """Train and measure one arm in this process: train.py itself, with the arm's patch."""
    from bench_losses import machine

    import train
    from toy import world

    options, patch = ARMS[job["arm"]]
    if job["split"] == "tune":
        world.FIRST_SEED["heldout"] = world.FIRST_SEED[
            "tune"
        ]  # the curve too is measured on the puzzles of this split
    if patch:
        patch(train)
    curve, gradients, final, evaluate, run = [], [], {}, train.evaluate, train.train

    def evaluated(trainer, samples, messages=train.student_messages):
        got = evaluate(trainer, samples, messages)
        if messages is train.student_messages:
            curve.append(shares(got["right"], samples, kind_of))
        return got

    def trained(trainer, *args):
        if (
            job["split"] == "teacher"
        ):  # the student is the teacher still: what it makes of what the teacher reads
            samples = world.puzzles("heldout", 800, fog=0.5)
            final["teacher"] = shares(
                evaluate(
                    trainer,
                    samples,
                    lambda s: train.teacher_messages(s, trainer.config.teacher_context),
                )["right"],
                samples,
                kind_of,
            )
            return run(trainer, *args)
        table = run(trainer, *args)
        final.update(measured(trainer, train, evaluate))
        return table

    train.evaluate, train.train = evaluated, trained
    watch_gradients(train, gradients)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        train.main(
            [
                "--fog",
                "0.5",
                "--steps",
                str(job["steps"]),
                "--eval-every",
                str(EVERY),
                "--eval-questions",
                "200",
                "--save-every",
                "100000",
                "--seed",
                str(job["seed"]),
                "--name",
                "run",
                *job["chosen"],
                *options,
            ]
        )
        rows = [json.loads(line) for line in open("runs/run/metrics.jsonl")][1:]
    every = {
        name: [round(r[name], 4) for r in rows]
        for name in ("entropy", "length", "all_failed", "accuracy", "tutored")
    }
    return {
        **job,
        "options": options,
        "cpu_seconds": round(time.process_time()),
        "final": final,
        "curve": dict(zip(range(0, job["steps"] + 1, EVERY), curve)),
        "gradients": gradients,
        **every,
        "skipped": rows[-1]["skipped_steps"],
        "machine": machine("transformers", "accelerate"),
    }


# ------------------------------------------------------------------------------------------------------------- all the runs
def mean_final(row: dict) -> float:
    return statistics.mean(row["final"]["plain"].values())


def load() -> list[dict]:
    return (
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    )


def main_arm(arm: str) -> str:
    """The arm whose learning rate and lambda this one takes."""
    return arm if arm in MAIN else "GRPO" if arm.startswith("GRPO") else "PTD-PO"


def chosen(rows: list[dict], arm: str) -> list[str] | None:
    """The options that were best on the split "tune"; None while the grid is not complete."""
    arm = main_arm(arm)
    tried = [r for r in rows if r["split"] == "tune" and r["arm"] == arm]
    return max(tried, key=mean_final)["chosen"] if len(tried) == len(GRIDS[arm]) else None


def run_all(jobs: list[dict], rows: list[dict], parallel: int) -> None:
    """Run what is not there yet; each finished run is one line of the results. A run that fails is named, the others go on."""
    key = lambda r: (r["arm"], r["seed"], r["split"], r["steps"], tuple(r["chosen"]))  # noqa: E731
    done = {key(r) for r in rows}
    jobs = [j for j in jobs if key(j) not in done]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(max(1, os.cpu_count() // parallel)),
        "OMP_WAIT_POLICY": "PASSIVE",
    }

    def start(job):
        got = subprocess.run(
            [sys.executable, __file__, "--run", json.dumps(job)],
            env=env,
            capture_output=True,
            text=True,
        )
        if got.returncode:
            raise RuntimeError(f"{job}: {got.stderr[-2000:]}")
        return json.loads(got.stdout.splitlines()[-1])

    failed = []
    with ThreadPoolExecutor(parallel) as pool:
        for future in as_completed([pool.submit(start, job) for job in jobs]):
            try:
                row = future.result()
            except RuntimeError as error:
                failed.append(str(error))
                print(f"FAILED {error}", file=sys.stderr, flush=True)
                continue
            rows.append(row)
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{row['split']:8s}{row['arm']:26s}seed {row['seed']}  {' '.join(row['chosen']):22s}{row['final'].get('plain') or row['final']['teacher']}  {row['cpu_seconds']} s",
                flush=True,
            )
    if failed:
        sys.exit(f"{len(failed)} runs failed: see above")


def spread(values: list[float], digits: int = 1) -> str:
    """A mean, with the lowest and the highest where there are several."""
    text = f"{statistics.mean(values):.{digits}f}"
    return (
        text
        if len(values) == 1
        else f"{text} ({min(values):.{digits}f} - {max(values):.{digits}f})"
    )


def table(rows: list[dict], steps: int) -> str:
    """Markdown: one line an arm; the main arms by family, with what they make of being told another puzzle's answer; the gradients."""
    held = [r for r in rows if r["split"] == "heldout" and r["steps"] == steps]
    if not held:
        return "nothing measured on the held-out puzzles yet"
    lines = [
        f"{held[0]['machine']}; {steps} steps; 800 held-out puzzles (200 in the evaluations on the way), plain prompt, greedy; mean (lowest - highest) over seeds."
    ]
    for kind, arms in (("arm", MAIN), ("PTD-PO, but", ABLATIONS)):
        lines += [
            "",
            f"| {kind} | seeds | clear, % | foggy, % | last five evaluations, clear / foggy | pass@8 clear / foggy, % | entropy, last 20 steps | length | all-failed groups, last 20, % | CPU minutes |",
            "|---" * 10 + "|",
        ]
        for arm in arms:
            runs = [r for r in held if r["arm"] == arm]
            if runs:
                how = " ".join(runs[0]["chosen" if arm in MAIN else "options"])
                last = {
                    name: [statistics.mean(r[name][-20:]) for r in runs]
                    for name in ("entropy", "length", "all_failed")
                }
                lines.append(
                    f"| {arm}{f' (`{how}`)' if how else ''} | {len(runs)} | "
                    + " | ".join(spread([r["final"]["plain"][k] for r in runs]) for k in KINDS)
                    + " | "
                    + " / ".join(
                        f"{statistics.mean(v[k] for r in runs for v in list(r['curve'].values())[-5:]):.0f}"
                        for k in KINDS
                    )
                    + f" | {' / '.join(f'''{statistics.mean(r['final']['pass@8'][k] for r in runs):.0f}''' for k in KINDS)} | {spread(last['entropy'], 2)} | "
                    + f"{spread(last['length'], 0)} | {100 * statistics.mean(last['all_failed']):.0f} | {statistics.mean(r['cpu_seconds'] for r in runs) / 60:.1f} |"
                )
    families = sorted(
        held[0]["final"]["families"], key=lambda name: (name.startswith("foggy"), name)
    )
    lines += [
        "",
        f"| arm | {' | '.join(families)} | told another answer: says it, clear / foggy | is right all the same |",
        "|---" * (len(families) + 3) + "|",
    ]
    for arm in MAIN:
        runs = [r["final"] for r in held if r["arm"] == arm]
        if runs:
            told = [
                " / ".join(
                    f"{statistics.mean(r['told another answer'][what][k] for r in runs):.0f}"
                    for k in KINDS
                )
                for what in ("says it", "is right")
            ]
            right = [f"{statistics.mean(r['families'][f] for r in runs):.0f}" for f in families]
            lines.append(f"| {' | '.join([arm, *right, *told])} |")
    lines += [
        "",
        "| what the teacher reads | teacher right, clear / foggy, % | student after training |",
        "|---|---|---|",
    ]
    for row in (r for r in rows if r["split"] == "teacher"):
        after = [r["final"]["plain"] for r in held if r["arm"] == row["arm"]]
        shown = [
            " / ".join(f"{statistics.mean(x[k] for x in what):.0f}" for k in KINDS) if what else ""
            for what in ([row["final"]["teacher"]], after)
        ]
        lines.append(f"| {row['arm']} | {' | '.join(shown)} |")
    found = [
        g for r in held if r["arm"] == "PTD-PO" for g in r["gradients"] if g["cosine"] is not None
    ]
    lines += [
        "",
        "| PTD-PO, step | tutoring gradient / policy gradient | cosine |",
        "|---|---|---|",
    ]
    for step in sorted({g["step"] for g in found}):
        now = [g for g in found if g["step"] == step]
        lines.append(
            f"| {step} | {spread([g['tutor'] / g['policy'] for g in now])} | {spread([g['cosine'] for g in now], 2)} |"
        )
    return "\n".join(lines)


COLOURS = {
    "PTD-PO": "#1f6fb4",
    "GRPO": "#c4552d",
    "tutoring alone": "#3a9a5b",
    "teacher told the answer": "#8a56b0",
    "self-distillation": "#b08a1e",
    "no policy loss": "#3a9a5b",
}


def draw(rows: list[dict], folder: Path, steps: int) -> None:
    """Accuracy and entropy over steps with the seeds' range, and accuracy against K and tau."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("--figures needs matplotlib: python -m pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {
        arm: [
            r for r in rows if r["split"] == "heldout" and r["arm"] == arm and r["steps"] == steps
        ]
        for arm in ARMS
    }

    def band(axes, x, values, arm):
        low, high = (list(map(f, zip(*values))) for f in (min, max))
        axes.plot(
            x,
            [statistics.mean(v) for v in zip(*values)],
            color=COLOURS[arm],
            label=f"{arm} ({len(values)})",
            linewidth=1.8,
            linestyle="-" if arm in MAIN else "--",
        )
        axes.fill_between(x, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)

    def save(figure, name):
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.3)
        figure.savefig(folder / name, dpi=150)
        plt.close(figure)

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for arm in (a for a in COLOURS if runs[a]):
        for kind, axes in zip(KINDS, panels):
            band(
                axes,
                [int(s) for s in runs[arm][0]["curve"]],
                [[v[kind] for v in r["curve"].values()] for r in runs[arm]],
                arm,
            )
        smooth = [
            [statistics.mean(r["entropy"][max(0, i - 9) : i + 1]) for i in range(steps)]
            for r in runs[arm]
        ]
        band(panels[2], range(1, steps + 1), smooth, arm)
    for axes, title, label in zip(
        panels,
        (
            "In clear sight: teacher 99.8 % right",
            "In fog: teacher 64 % right",
            "Entropy of the responses",
        ),
        ("held-out accuracy, %", "", "nats a token, mean of 10 steps"),
    ):
        axes.set(
            xlabel="optimizer step",
            ylabel=label,
            title=title,
            ylim=(0, None if axes is panels[2] else 100),
        )
    panels[0].legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, "claims.png")
    figure, panels = plt.subplots(
        1, 3, figsize=(11, 3.2), layout="constrained", sharey=True, width_ratios=(4, 2, 6)
    )
    sweeps = (
        ("K", {"1": "K 1", "5": "K 5", "20": "PTD-PO", "all": "K full"}),
        ("tau", {"0.2": "tau 0.2", "1.0": "PTD-PO"}),
        (
            "what the teacher reads",
            {
                "none:\nGRPO": "GRPO",
                "other's\nhint": "shuffled hint",
                "no\npicture": "blind teacher",
                "no\nlook": "hint without look",
                "no\nignore": "hint without ignore",
                "no\nsteps": "hint without steps",
                "the\nhint": "PTD-PO",
            },
        ),
    )
    for axes, (label, points) in zip(panels, sweeps):
        points = {name: runs[arm] for name, arm in points.items() if runs[arm]}
        for kind, colour in zip(KINDS, ("#1f6fb4", "#7a8794")):
            for x, found in enumerate(points.values()):
                axes.scatter(
                    [x] * len(found),
                    [r["final"]["plain"][kind] for r in found],
                    s=14,
                    color=colour,
                    alpha=0.6,
                    linewidths=0,
                )
            axes.plot(
                range(len(points)),
                [
                    statistics.mean(r["final"]["plain"][kind] for r in found)
                    for found in points.values()
                ],
                color=colour,
                label="clear" if kind == "clear" else "fog",
                marker="_",
                markersize=14,
                linewidth=0 if len(points) > 4 else 1,
            )
        axes.set_xticks(range(len(points)), list(points), fontsize=8)
        axes.set(xlabel=label, ylim=(0, 100), xlim=(-0.5, len(points) - 0.5))
    panels[0].set_ylabel(f"accuracy after {steps} steps, %")
    panels[0].legend(frameon=False, fontsize=8)
    save(figure, "ablations.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=list(ARMS),
        default=list(ARMS),
        metavar="ARM",
        help=f"of: {'; '.join(ARMS)}",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps a run [{STEPS}]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--table", action="store_true", help="print what has been measured and stop"
    )
    parser.add_argument(
        "--figures", type=Path, metavar="FOLDER", help="draw what has been measured and stop"
    )
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return print(json.dumps(one_run(json.loads(args.run))))
    rows = load()
    if args.table:
        return print(table(rows, args.steps))
    if args.figures:
        return draw(rows, args.figures, args.steps)
    RESULTS.parent.mkdir(exist_ok=True)
    needed = [arm for arm in MAIN if arm in map(main_arm, args.arms)]
    run_all(
        [
            {"arm": arm, "seed": TUNE_SEED, "split": "tune", "steps": TUNE_STEPS, "chosen": options}
            for arm in needed
            for options in GRIDS[arm]
        ],
        rows,
        args.jobs,
    )
    run_all(
        [
            {
                "arm": arm,
                "seed": seed,
                "split": "heldout",
                "steps": args.steps,
                "chosen": chosen(rows, arm),
            }
            for seed in range(args.seeds)
            for arm in args.arms
        ],
        rows,
        args.jobs,
    )
    run_all(
        [
            {"arm": arm, "seed": 0, "split": "teacher", "steps": 1, "chosen": chosen(rows, arm)}
            for arm in TEACHERS
            if arm in args.arms
        ],
        rows,
        args.jobs,
    )
    print(table(rows, args.steps))


if __name__ == "__main__":
    main()
