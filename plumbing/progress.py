"""What a user sees while he waits: a bar while responses are sampled, and how long steps take."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class ResponseBar:
    """A bar of the responses of one rollout or evaluation that have ended.

    Below the bar of the steps; it goes away at the end. In a terminal it shows after half a second;
    in a log file it writes a line per minute. active: whether this process shows it.
    """

    def __init__(self, total: int, active: bool):
        interval = 0.5 if sys.stderr.isatty() else 60
        self.tokens, self.ended_tokens, self.longest, self.began = 0, 0, 0, time.time()
        self.bar = tqdm(
            total=total,
            disable=not active,
            desc="responses",
            unit="response",
            leave=False,
            dynamic_ncols=True,
            mininterval=interval,
            delay=interval,
            miniters=0,  # look at the clock at each update, also where no response has ended
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def update(self, tokens: int, lengths: tuple[int, ...]) -> None:
        """tokens drawn since the last call, lengths of the responses that ended since."""
        self.tokens += tokens
        self.ended_tokens += sum(lengths)
        self.longest = max(self.longest, *lengths, 0)
        # memory that ran out makes the sampler begin some responses anew
        ended = min(self.bar.n + len(lengths), self.bar.total)
        pace = self.tokens / max(1e-9, time.time() - self.began)
        mean = self.ended_tokens / max(1, ended)
        lengths_so_far = f"{mean:.0f} tokens each, longest {self.longest}"
        self.bar.set_postfix_str(f"{lengths_so_far}, {pace:.0f} tokens/s", refresh=False)
        self.bar.update(ended - self.bar.n)


def duration(seconds: float) -> str:
    """In hours; in minutes below one hour, in seconds below one minute."""
    if seconds < 60:
        return f"{seconds:.1f} seconds"
    if seconds < 3600:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"


def pace_of_sampling(before: dict, config) -> str:
    """One line after the first evaluation: how long sampling takes, if rollouts go on like it.

    before: of plumbing.runs.evaluate_both. Sampling is one part of a step; updates are not in it.
    """
    per_response = before["seconds"] / max(1, before["questions"])
    per_step = per_response * config.questions * config.group_size
    return (
        f"before: {100 * before['plain']:.1f} % of the held-out questions right, plain prompt; "
        f"{before['questions']} responses of {before['length']:.0f} tokens on average took "
        f"{duration(before['seconds'])}. At this pace sampling for 100 steps takes about "
        f"{duration(100 * per_step)}"
    )


def pace_of_steps(metrics: dict, before: dict, config) -> str:
    """One line after the first step of this start: how long 100 steps take.

    metrics: of that step, which began a rollout. Evaluations are taken to last as long as the first
    one did.
    """
    step = metrics["step"]
    sampling = metrics["sample_seconds"] / min(config.updates, config.steps + 1 - step)
    per_step = sampling + metrics["update_seconds"] + before["seconds"] / config.eval_every
    return (
        f"step {step}: 100 steps take about {duration(100 * per_step)}, with evaluations and "
        f"without checkpoints (sampling {duration(sampling)}, update "
        f"{duration(metrics['update_seconds'])} per step)"
    )
