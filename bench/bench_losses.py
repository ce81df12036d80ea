"""Memory, time and error of divergences between two output heads: ours against the peers', each in a process of its own.

    python -m pip install -r bench/requirements.txt
    python bench/bench_losses.py                         # T 512, H 1536, V 151,936 (Qwen2-VL-2B's head); 15 minutes on 2 cores, 14 GiB
    python bench/bench_losses.py --sweep                 # extra peak memory against T as well
    python bench/bench_losses.py --figure docs/losses_memory.png       # draw the sweep that has been measured

From hidden states (T, H) of student and teacher, with a head each, to the scalar mean over tokens and its gradient in the student's
states. On a GPU: bfloat16, T 4096 and 8192. Extra peak memory is what forward and backward take on top of states and heads: on a CPU the
process's resident high-water mark, on a GPU the allocator's. Errors are against float64 of the same quantity, computed here apart in
probability space. Every finished run adds a line to bench/results/losses.jsonl.
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


# ------------------------------------------------------------------------------------------------------------- contenders
# name -> (what its error is measured against, function of (states, head, teacher's states, teacher's head) -> mean loss)
def plain_full(h, head, g, teacher):
    log_p, log_q = (
        F.linear(h, head).float().log_softmax(-1),
        F.linear(g, teacher).detach().float().log_softmax(-1),
    )
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

    ones = torch.ones(1, len(h), dtype=torch.long, device=h.device)
    return _chunked_divergence_loss(h.unsqueeze(0), g.unsqueeze(0), head, teacher, ones, beta=0.5)[
        0
    ]


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

    # as many tokens a chunk as ours; it always forms the head's gradient. Not compiled: a compiler's own memory would be counted
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
    """The released PTD-PO formula, re-derived from a description of what it does: the student's top-K alone; a teacher probability outside
    the teacher's own top-K guessed as its tail spread over 150,000 tokens; p detached as a weight, the mixture not."""
    top = F.linear(h, head).float().log_softmax(-1).topk(K)
    with torch.no_grad():
        q_top = F.linear(g, teacher).float().log_softmax(-1).topk(K)
        guess = (1 - q_top.values.exp().sum(-1, keepdim=True)).clamp(min=0) / 150_000
        same = top.indices.unsqueeze(-1) == q_top.indices.unsqueeze(-2)  # (T, K, K)
        q = torch.where(same.any(-1), (same * q_top.values.exp().unsqueeze(-2)).sum(-1), guess)
    log_m = ((top.values.exp() + q) / 2).log()
    return (
        0.5
        * (top.values.exp().detach() * (top.values - log_m) + torch.special.xlogy(q, q) - q * log_m)
        .sum(-1)
        .mean()
    )


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
for mb in () if GPU else (64, 512):
    CONTENDERS[f"ours, scores_from_hidden, {mb} MiB"] = (
        "union",
        functools.partial(ours_chunked, logits_mb=mb),
    )
if GPU:
    CONTENDERS["Liger JSD (Triton)"] = ("full", liger_triton)
BASE, OURS = "full JSD, plain torch", "ours, scores_from_hidden"
SWEPT = [
    BASE,
    "TRL generalized_jsd_loss",
    "TRL SDPO top-K + tail",
    "Liger chunked JSD",
    "TRL chunked divergence",
    OURS,
]


# ---------------------------------------------------------------------------------------------------------------- one run
def inputs(tokens: int):
    """Student's and teacher's states and heads. Logits have a standard deviation of 6: a few tokens hold most of the mass, as in a language model."""
    device, dtype = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
    make = torch.Generator().manual_seed(0)
    head = (torch.randn(VOCAB, HIDDEN, generator=make) * 6 / math.sqrt(HIDDEN)).to(device, dtype)
    teacher = (
        head.float()
        + 0.3 * torch.randn(VOCAB, HIDDEN, generator=make).to(device) * 6 / math.sqrt(HIDDEN)
    ).to(dtype)
    h = torch.randn(tokens, HIDDEN, generator=make)
    g = (0.95 * h + 0.3 * torch.randn(tokens, HIDDEN, generator=make)).to(device, dtype)
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
    return (
        next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
        / 1024
    )


def run(name: str, tokens: int, train_head: bool, repeats: int, save: str | None) -> dict:
    """One contender in this process: extra peak memory and the best time of some repeats."""
    loss = CONTENDERS[name][1]
    h, head, g, teacher = inputs(tokens)
    head.requires_grad_(train_head)
    loss(
        h[:4].detach().requires_grad_(), head.detach(), g[:4], teacher
    ).backward()  # imports, thread pools, autotuning
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

        row["predicted_mib"] = round(
            scores_bytes(
                tokens,
                HIDDEN,
                VOCAB,
                k=K,
                logits_mb=LOGITS_MB,
                dtype=head.dtype,
                train_head=train_head,
            )
            / 2**20,
            1,
        )
    return row


def references(tokens: int, save: str) -> None:
    """Float64 value and gradient of three divergences, in probability space, with boolean masks; no code of ours."""
    h, head, g, teacher = (x.detach().double() for x in inputs(tokens))
    out = {
        kind: {"value": 0.0, "grad": torch.zeros(tokens, HIDDEN, dtype=torch.float64)}
        for kind in ("full", "student", "union")
    }

    def jsd(p, q):
        m = (p + q) / 2
        return 0.5 * (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum()

    for a in range(0, tokens, 32):
        p, q = (h[a : a + 32] @ head.T).softmax(-1), (g[a : a + 32] @ teacher.T).softmax(-1)
        p_top, q_top = (
            torch.zeros_like(x, dtype=torch.bool).scatter_(-1, x.topk(K).indices, True)
            for x in (p, q)
        )
        for kind, mask in (
            ("full", torch.ones_like(p_top)),
            ("student", p_top),
            ("union", p_top | q_top),
        ):
            x = p.detach().requires_grad_()
            value = jsd(x.masked_fill(~mask, 0) + 1e-300, q.masked_fill(~mask, 0) + 1e-300)
            if kind != "full":
                value = value + jsd(x.masked_fill(mask, 0).sum(-1), q.masked_fill(mask, 0).sum(-1))
            d_p = torch.autograd.grad(value, x)[0]
            d_logits = p * (d_p - (p * d_p).sum(-1, keepdim=True)) / tokens
            out[kind]["value"] += value.item() / tokens
            out[kind]["grad"][a : a + 32] = (d_logits @ head).cpu()
    torch.save(out, save)


# ------------------------------------------------------------------------------------------------------------------ report
def machine(*packages: str) -> str:
    """What the numbers were measured on: device, Python, torch, and the packages' versions."""
    device = torch.cuda.get_device_name() if GPU else f"{os.cpu_count()} cores {platform.machine()}"
    return ", ".join(
        [
            device,
            f"Python {platform.python_version()}",
            f"torch {torch.__version__}",
            *(f"{name} {importlib.metadata.version(name)}" for name in packages),
        ]
    )


def child(*arguments) -> str:
    # a fixed threshold: blocks of over 1 MiB go back to the system when freed, so that resident memory is what tensors hold
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "TRL_EXPERIMENTAL_SILENCE": "1"}
    return subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    ).stdout


def measure(
    tokens: int, train_head: bool, names: list[str], repeats: int, errors: dict | None
) -> list[dict]:
    """One process a contender, one after the other."""
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "out.pt"
            row = json.loads(
                child(
                    "--run",
                    name,
                    "--tokens",
                    tokens,
                    "--repeats",
                    repeats,
                    "--save",
                    saved,
                    *["--train-head"] * train_head,
                ).splitlines()[-1]
            )
            if errors is not None:
                got, own, full = torch.load(saved), errors[CONTENDERS[name][0]], errors["full"]
                grad = got["grad"].double()
                row["value_error"] = abs(got["value"] - own["value"])
                row["grad_error"] = ((grad - own["grad"]).norm() / own["grad"].norm()).item()
                row["cosine"] = F.cosine_similarity(
                    grad.flatten(), full["grad"].flatten(), dim=0
                ).item()
        row["machine"] = machine("trl", "liger-kernel")
        print(
            f"  {name}: {row['mib']:.0f} MiB, {row['seconds']:.2f} s", file=sys.stderr, flush=True
        )
        RESULTS.parent.mkdir(exist_ok=True)
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: each contender beside ours."""
    ours, base = (next(r for r in rows if r["name"] == name) for name in (OURS, BASE))
    lines = [
        f"T {ours['tokens']}, H {HIDDEN}, V {VOCAB:,}, K {K}, head {'trained' if ours['train_head'] else 'frozen'}, "
        f"--logits-mb {LOGITS_MB} ({ours_chunk()} tokens a chunk; scores_bytes predicts {ours['predicted_mib']:.0f} MiB). "
        f"{ours['machine']}.",
        "",
        "| | extra peak, MiB | times ours | forward + backward, s | / plain full JSD | value error | gradient error | cosine to full JSD's gradient |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        errors = "".join(
            f" {r[key]:{form}} |" if key in r else " |"
            for key, form in (("value_error", ".0e"), ("grad_error", ".0e"), ("cosine", ".3f"))
        )
        lines.append(
            f"| {r['name']} | {r['mib']:.0f} | {r['mib'] / ours['mib']:.1f} | {r['seconds']:.2f} | {r['seconds'] / base['seconds']:.2f} |{errors}"
        )
    return "\n".join(lines)


def figure(path: str) -> None:
    """Extra peak memory against T, from the newest lines of the results."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("the figure needs matplotlib: python -m pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {
        (r["name"], r["tokens"]): r for r in map(json.loads, open(RESULTS)) if not r["train_head"]
    }
    fig, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    colors = dict(zip(SWEPT, ("#1f77b4", "#ff7f0e", "#2ca02c", "#7f7f7f", "#9467bd", "#c03a2b")))
    for name in SWEPT:
        points = sorted((t, r["mib"]) for (n, t), r in rows.items() if n == name and t in SWEEP)
        ours = name == OURS
        ax.plot(
            *zip(*points),
            marker="o",
            lw=3 if ours else 1.5,
            color=colors[name],
            zorder=3 if ours else 2,
        )
        ax.annotate(
            f" {name}", points[-1], va="center", fontsize=9, weight="bold" if ours else "normal"
        )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="response tokens T",
        ylabel="extra peak memory, MiB",
        title="Divergence of two heads, forward and backward: ours hardly grows with T",
    )
    ax.set_xticks(SWEEP, [f"{t:,}" for t in SWEEP])
    ax.set_xlim(SWEEP[0] * 0.9, SWEEP[-1] * 4.5)
    ax.set_yticks(
        [200, 500, 1000, 2000, 5000, 10_000, 20_000],
        ["200", "500", "1,000", "2,000", "5,000", "10,000", "20,000"],
    )
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sweep",
        action="store_true",
        help=f"also T of {', '.join(map(str, SWEEP))} with the head frozen",
    )
    parser.add_argument(
        "--figure", metavar="PNG", help="draw the sweep and stop (needs matplotlib)"
    )
    parser.add_argument(
        "--only", help="only contenders whose name holds this, beside ours and the plain one"
    )
    parser.add_argument(
        "--repeats", type=int, default=2, help="forward + backward passes; the best counts"
    )
    for hidden in ("--run", "--save", "--references"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--train-head", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return print(
            json.dumps(run(args.run, args.tokens, args.train_head, args.repeats, args.save))
        )
    if args.references:
        return references(args.tokens, args.references)
    if args.figure:
        return figure(args.figure)
    names = [n for n in CONTENDERS if not args.only or args.only in n or n in (BASE, OURS)]
    for tokens in (4096, 8192) if GPU else (512,):
        with tempfile.TemporaryDirectory() as folder:
            child("--references", Path(folder) / "exact.pt", "--tokens", tokens)
            errors = torch.load(Path(folder) / "exact.pt")
        print("\n" + table(measure(tokens, False, names, args.repeats, errors)), flush=True)
        trained = [n for n in names if n == BASE or "chunked" in n or "scores_from_hidden" in n]
        print("\n" + table(measure(tokens, True, trained, args.repeats, errors)), flush=True)
    for tokens in SWEEP if args.sweep else ():
        measure(tokens, False, SWEPT, 1, None)


if __name__ == "__main__":
    main()
