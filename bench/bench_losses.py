"""Memory, time and error of divergences between two output heads: ours and other libraries'.

    python -m pip install -r bench/requirements.txt
    python bench/bench_losses.py            # 15 minutes on 2 cores, 14 GiB
    python bench/bench_losses.py --sweep    # extra peak memory against T as well; 20 GiB
    python bench/bench_losses.py --figure docs/losses_memory.png    # draw the measured sweep

T 512, H 1536, V 151,936 (the head of Qwen2-VL-2B); on a GPU: bfloat16, T 4096 and 8192. Each
contender runs in its own process.

A contender takes hidden states (T, H) of student and teacher and their heads. It gives the mean
divergence over tokens and its gradient in the student's states. Extra peak memory is what forward
and backward take beside states and heads: on a CPU the process's resident high-water mark, on a GPU
the allocator's. Errors are against float64 values of the same quantity, computed here separately in
probability space. Each finished run adds a line to bench/results/losses.jsonl.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "losses.jsonl"
sys.path.insert(0, str(ROOT))
GPU = torch.cuda.is_available()
HIDDEN, VOCAB, K = 1536, 151_936, 100
LOGITS_MB = 512 if GPU else 160
SWEEP = (128, 256, 512, 1024, 2048)


# ------------------------------------------------------------------------------------- contenders
# Each: student's states h, student's head, teacher's states g, teacher's head -> mean loss.
def plain_full(h, head, g, teacher):
    log_p = F.linear(h, head).float().log_softmax(-1)
    log_q = F.linear(g, teacher).detach().float().log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1).mean()


def trl_generalized(h, head, g, teacher):
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(
        F.linear(h, head).unsqueeze(0),
        F.linear(g, teacher).detach().unsqueeze(0),
        torch.zeros(1, len(h), dtype=torch.long, device=h.device),
        beta=0.5,
    )


def trl_chunked(h, head, g, teacher):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, len(h), dtype=torch.long, device=h.device)
    states, teacher_states = h.unsqueeze(0), g.unsqueeze(0)
    return _chunked_divergence_loss(states, teacher_states, head, teacher, mask, beta=0.5)[0]


def trl_sdpo(h, head, g, teacher):
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

    return compute_topk_self_distillation_loss(
        F.linear(h, head),
        F.linear(g, teacher).detach(),
        distillation_topk=K,
        distillation_alpha=0.5,
        distillation_add_tail=True,
    ).mean()


def liger_chunked(h, head, g, teacher):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # As many tokens per chunk as ours. It always forms the head's gradient. Not compiled, because
    # the compiler's own memory would count.
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False, chunk_size=ours_chunk()
    )
    return loss(h, head, g, teacher, torch.zeros(len(h), dtype=torch.long, device=h.device))


def liger_triton(h, head, g, teacher):
    from liger_kernel.transformers.jsd import LigerJSD

    return LigerJSD(beta=0.5)(
        F.linear(h, head).float().log_softmax(-1),
        F.linear(g, teacher).detach().float().log_softmax(-1),
    )


def released(h, head, g, teacher):
    """The release's formula, re-derived from a description of what it does.

    The support is the student's top K alone. A teacher probability outside the teacher's own top K
    is guessed: the teacher's tail, spread over 150,000 tokens. p is detached as a weight, the
    mixture is not.
    """
    top = F.linear(h, head).float().log_softmax(-1).topk(K)
    log_p, p = top.values, top.values.exp()
    with torch.no_grad():
        q_top = F.linear(g, teacher).float().log_softmax(-1).topk(K)
        q_values = q_top.values.exp()
        guess = (1 - q_values.sum(-1, keepdim=True)).clamp(min=0) / 150_000
        same = top.indices.unsqueeze(-1) == q_top.indices.unsqueeze(-2)  # (T, K, K)
        q = torch.where(same.any(-1), (same * q_values.unsqueeze(-2)).sum(-1), guess)
    log_m = ((p + q) / 2).log()
    terms = p.detach() * (log_p - log_m) + torch.special.xlogy(q, q) - q * log_m
    return 0.5 * terms.sum(-1).mean()


def ours_plain(h, head, g, teacher):
    from losses import topk_jsd

    return topk_jsd(F.linear(h, head), F.linear(g, teacher), K).mean()


def ours_chunked(h, head, g, teacher, logits_mb=LOGITS_MB):
    from losses import scores_from_hidden

    heads = []
    for weight in (head, teacher):
        heads.append(torch.nn.Linear(HIDDEN, VOCAB, bias=False, device="meta"))
        heads[-1].weight = torch.nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    ids = torch.arange(len(h), device=h.device)
    return scores_from_hidden(h, heads[0], ids, g, heads[1], k=K, logits_mb=logits_mb)[2].mean()


def ours_chunk() -> int:
    from losses import chunk_tokens

    return chunk_tokens(VOCAB, LOGITS_MB)


# name -> (the support of the divergence that its error is measured against, the function)
CONTENDERS = {
    "full JSD, plain torch": ("full", plain_full),
    "TRL generalized_jsd_loss": ("full", trl_generalized),
    "TRL chunked divergence": ("full", trl_chunked),
    "Liger chunked JSD": ("full", liger_chunked),
    "TRL SDPO top-K + tail": ("student", trl_sdpo),
    "released PTD-PO, re-derived": ("student", released),
    "ours, topk_jsd on logits": ("union", ours_plain),
    "ours, scores_from_hidden": ("union", ours_chunked),
}
if GPU:
    CONTENDERS["Liger JSD (Triton)"] = ("full", liger_triton)
else:
    for mb in (64, 512):
        contender = functools.partial(ours_chunked, logits_mb=mb)
        CONTENDERS[f"ours, scores_from_hidden, {mb} MiB"] = ("union", contender)
BASE, OURS = "full JSD, plain torch", "ours, scores_from_hidden"
SWEPT = {  # name -> colour in the figure
    BASE: "#1f77b4",
    "TRL generalized_jsd_loss": "#ff7f0e",
    "TRL SDPO top-K + tail": "#2ca02c",
    "Liger chunked JSD": "#7f7f7f",
    "TRL chunked divergence": "#9467bd",
    OURS: "#c03a2b",
}


# ---------------------------------------------------------------------------------------- one run
def inputs(tokens: int):
    """States and heads: student's states, its head, teacher's states, its head.

    Logits have a standard deviation of 6, so that a few tokens hold nearly all mass, as in a
    language model.
    """
    device, dtype = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    root = math.sqrt(HIDDEN)
    head = (torch.randn(VOCAB, HIDDEN, generator=generator) * 6 / root).to(device, dtype)
    noise = 0.3 * torch.randn(VOCAB, HIDDEN, generator=generator).to(device) * 6 / root
    teacher = (head.float() + noise).to(dtype)
    h = torch.randn(tokens, HIDDEN, generator=generator)
    g = (0.95 * h + 0.3 * torch.randn(tokens, HIDDEN, generator=generator)).to(device, dtype)
    return h.to(device, dtype).requires_grad_(), head, g, teacher


def high_water(reset: bool = False) -> float:
    """Peak memory in MiB since the last reset."""
    if GPU:
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / 2**20
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024


def run(name: str, tokens: int, train_head: bool, repeats: int, save: str | None) -> dict:
    """One contender in this process: extra peak memory and the best time of some repeats."""
    loss = CONTENDERS[name][1]
    h, head, g, teacher = inputs(tokens)
    head.requires_grad_(train_head)
    # warms up: imports, thread pools, autotuning
    loss(h[:4].detach().requires_grad_(), head.detach(), g[:4], teacher).backward()
    peaks, seconds = [], []
    for _ in range(repeats):
        h.grad = head.grad = None
        before = high_water(reset=True)
        start = time.perf_counter()
        value = loss(h, head, g, teacher)
        value.backward()
        value = value.item()  # waits for the GPU
        seconds.append(time.perf_counter() - start)
        peaks.append(high_water() - before)
    if save:
        torch.save({"value": value, "grad": h.grad.float().cpu()}, save)
    row = {
        "name": name,
        "tokens": tokens,
        "train_head": train_head,
        "mib": round(min(peaks), 1),
        "seconds": round(min(seconds), 3),
    }
    if name == OURS:
        from plumbing.memory import scores_bytes

        options = dict(k=K, logits_mb=LOGITS_MB, dtype=head.dtype, train_head=train_head)
        row["predicted_mib"] = round(scores_bytes(tokens, HIDDEN, VOCAB, **options) / 2**20, 1)
    return row


def references(tokens: int, save: str) -> None:
    """Saves value and gradient of three divergences: float64, probability space, boolean masks.

    The three supports are "full", "student" and "union". No code of losses.py is used.
    """
    h, head, g, teacher = (x.detach().double() for x in inputs(tokens))
    out = {}
    for support in ("full", "student", "union"):
        gradient = torch.zeros(tokens, HIDDEN, dtype=torch.float64)
        out[support] = {"value": 0.0, "grad": gradient}
    for start in range(0, tokens, 32):
        rows = slice(start, start + 32)
        p, q = (h[rows] @ head.T).softmax(-1), (g[rows] @ teacher.T).softmax(-1)
        p_top, q_top = top_mask(p), top_mask(q)
        masks = {"full": torch.ones_like(p_top), "student": p_top, "union": p_top | q_top}
        for support, mask in masks.items():
            x = p.detach().requires_grad_()
            value = bucket_jsd(x, q, mask)
            d_p = torch.autograd.grad(value, x)[0]
            d_logits = p * (d_p - (p * d_p).sum(-1, keepdim=True)) / tokens
            out[support]["value"] += value.item() / tokens
            out[support]["grad"][rows] = (d_logits @ head).cpu()
    torch.save(out, save)


def top_mask(probs):
    """True at each row's K largest."""
    return torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, probs.topk(K).indices, True)


def bucket_jsd(p, q, mask):
    """Sum over rows of the JSD of p and q, on the tokens of the mask and a tail of the others."""
    value = jsd(p.masked_fill(~mask, 0) + 1e-300, q.masked_fill(~mask, 0) + 1e-300)
    if mask.all():
        return value
    return value + jsd(p.masked_fill(mask, 0).sum(-1), q.masked_fill(mask, 0).sum(-1))


def jsd(p, q):
    m = (p + q) / 2
    return 0.5 * (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum()


# ----------------------------------------------------------------------------------------- report
def machine(*packages: str) -> str:
    """What the numbers were measured on: device, Python, torch, and the packages' versions."""
    device = torch.cuda.get_device_name() if GPU else f"{os.cpu_count()} cores {platform.machine()}"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    python = f"Python {platform.python_version()}"
    return ", ".join([device, python, f"torch {torch.__version__}", *versions])


def child(*arguments) -> str:
    """Standard output of this file in a new process."""
    # A fixed threshold: blocks of over 1 MiB go back to the system when they are freed, so that
    # resident memory is what tensors hold.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "TRL_EXPERIMENTAL_SILENCE": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout


def measure(
    tokens: int, train_head: bool, names: list[str], repeats: int, errors: dict | None
) -> list[dict]:
    """Runs the contenders, one process after the other; adds their rows to the results."""
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "out.pt"
            arguments = ["--run", name, "--tokens", tokens, "--repeats", repeats, "--save", saved]
            if train_head:
                arguments.append("--train-head")
            row = json.loads(child(*arguments).splitlines()[-1])
            if errors is not None:
                result, support = torch.load(saved), CONTENDERS[name][0]
                row.update(compare(result, errors[support], errors["full"]["grad"]))
        row["machine"] = machine("trl", "liger-kernel")
        message = f"  {name}: {row['mib']:.0f} MiB, {row['seconds']:.2f} s"
        print(message, file=sys.stderr, flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
    return rows


def compare(result: dict, own: dict, full_gradient: torch.Tensor) -> dict:
    """Errors against the divergence that the contender computes; cosine to the full JSD's."""
    gradient = result["grad"].double()
    cosine = F.cosine_similarity(gradient.flatten(), full_gradient.flatten(), dim=0)
    return {
        "value_error": abs(result["value"] - own["value"]),
        "grad_error": ((gradient - own["grad"]).norm() / own["grad"].norm()).item(),
        "cosine": cosine.item(),
    }


HEADER = (
    "| | extra peak, MiB | times ours | forward + backward, s | / plain full JSD | value error "
    "| gradient error | cosine to full JSD's gradient |\n"
    "|---|---|---|---|---|---|---|---|"
)


def table(rows: list[dict]) -> str:
    """Markdown: each contender beside ours."""
    by_name = {row["name"]: row for row in rows}
    ours, base = by_name[OURS], by_name[BASE]
    state = "trained" if ours["train_head"] else "frozen"
    lines = [
        f"T {ours['tokens']}, H {HIDDEN}, V {VOCAB:,}, K {K}, head {state}, "
        f"--logits-mb {LOGITS_MB} ({ours_chunk()} tokens per chunk; "
        f"scores_bytes predicts {ours['predicted_mib']:.0f} MiB). {ours['machine']}.",
        "",
        HEADER,
    ]
    formats = {"value_error": ".0e", "grad_error": ".0e", "cosine": ".3f"}
    for row in rows:
        cells = [
            row["name"],
            f"{row['mib']:.0f}",
            f"{row['mib'] / ours['mib']:.1f}",
            f"{row['seconds']:.2f}",
            f"{row['seconds'] / base['seconds']:.2f}",
            *(f"{row[key]:{form}}" if key in row else "" for key, form in formats.items()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(path: str) -> None:
    """Extra peak memory against T, from the newest lines of the results."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("the figure needs matplotlib: python -m pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = {name: {} for name in SWEPT}  # name -> T -> MiB
    for row in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines()):
        # scores_from_hidden was named head_scores when the first rows were measured
        name = row["name"].replace("head_scores", "scores_from_hidden")
        if name in SWEPT and row["tokens"] in SWEEP and not row["train_head"]:
            points[name][row["tokens"]] = row["mib"]
    fig, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for name, color in SWEPT.items():
        line = sorted(points[name].items())
        width, weight, order = (3, "bold", 3) if name == OURS else (1.5, "normal", 2)
        tokens, mib = zip(*line, strict=True)
        ax.plot(tokens, mib, marker="o", lw=width, color=color, zorder=order)
        ax.annotate(f" {name}", line[-1], va="center", fontsize=9, weight=weight)
    ax.set(xscale="log", yscale="log")
    ax.set_xlabel("response tokens T")
    ax.set_ylabel("extra peak memory, MiB")
    ax.set_title("Divergence of two heads, forward and backward: ours hardly grows with T")
    ax.set_xticks(SWEEP, [f"{tokens:,}" for tokens in SWEEP])
    ax.set_xlim(SWEEP[0] * 0.9, SWEEP[-1] * 4.5)
    mib_ticks = [200, 500, 1000, 2000, 5000, 10_000, 20_000]
    ax.set_yticks(mib_ticks, [f"{mib:,}" for mib in mib_ticks])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sweep = f"also T of {', '.join(map(str, SWEEP))} with the head frozen"
    only = "only contenders whose name holds this, beside ours and the plain one"
    repeats = "forward + backward passes; the best counts"
    figure_help = "draw the sweep and stop (needs matplotlib)"
    parser.add_argument("--sweep", action="store_true", help=sweep)
    parser.add_argument("--figure", metavar="PNG", help=figure_help)
    parser.add_argument("--only", help=only)
    parser.add_argument("--repeats", type=int, default=2, help=repeats)
    for option in ("--run", "--save", "--references"):  # for the processes that this one starts
        parser.add_argument(option, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--train-head", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        row = run(args.run, args.tokens, args.train_head, args.repeats, args.save)
        print(json.dumps(row))
    elif args.references:
        references(args.tokens, args.references)
    elif args.figure:
        figure(args.figure)
    else:
        compare_all(args.only, args.repeats, args.sweep)


def compare_all(only: str | None, repeats: int, sweep: bool) -> None:
    """Measures the contenders and prints the tables."""
    names = [name for name in CONTENDERS if not only or only in name or name in (BASE, OURS)]
    with_head = [n for n in names if n == BASE or "chunked" in n or "scores_from_hidden" in n]
    for tokens in (4096, 8192) if GPU else (512,):
        with tempfile.TemporaryDirectory() as folder:
            child("--references", Path(folder) / "exact.pt", "--tokens", tokens)
            errors = torch.load(Path(folder) / "exact.pt")
        print("\n" + table(measure(tokens, False, names, repeats, errors)), flush=True)
        print("\n" + table(measure(tokens, True, with_head, repeats, errors)), flush=True)
    if sweep:
        for tokens in SWEEP:
            measure(tokens, False, list(SWEPT), 1, None)


if __name__ == "__main__":
    main()
