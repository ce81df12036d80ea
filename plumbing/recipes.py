"""--recipe: the settings of the paper, of its release and of related methods, in one place.

A recipe changes the defaults; options on the command line win over it. Each is with tutoring; with
--lam 0 it is the method by itself, so that table 4 of the paper is one word per column.
"""

RECIPES = {
    # arXiv 2606.07000: the defaults of ptdpo.PTDPOConfig and train.TrainConfig.
    "paper": {},
    # The paper's release (XszNeverSleep/PTD-PO): token mean, asymmetric and dual clip, no KL
    # penalty in groups with failures. Its tutoring mean is one micro-batch's, weighted by all its
    # response tokens; one mean over the step is the nearest that does not depend on micro-batches.
    # Its divergence, whose gradient is zero, is not repeated.
    "release": {
        "aggregate": "token",
        "tutor_mean": "step",
        "support": "student",
        "kl_on": "untutored",
        "clip_high": 0.3,
        "dual_clip": 3.0,
    },
    # arXiv 2503.14476: token mean, higher upper clip, no KL penalty. Its dynamic sampling is left
    # out: it drops the groups that all failed, which tutoring needs. So is its overlong penalty.
    "dapo": {"aggregate": "token", "clip_high": 0.28, "beta_kl": 0.0},
    # arXiv 2507.18071: one ratio per sequence, and the clip that belongs to it.
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    # arXiv 2503.20783: a fixed length in place of each response's own, no standard deviation, no
    # KL penalty.
    "dr-grpo": {"aggregate": "fixed", "scale_advantages": False, "beta_kl": 0.0},
}
