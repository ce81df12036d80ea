"""What the embedded model uses instead of the defaults for real models.

0.7 M parameters and 250 steps on a CPU are another regime than the paper's: a larger learning rate,
a larger weight of the tutoring loss, fewer questions per step, fewer and shorter responses.
"""

SETTINGS = {
    "lam": 10.0,
    "jsd_k": 20,
    "steps": 250,
    "questions": 24,
    "group_size": 4,
    "max_new_tokens": 48,
    "lr": 1e-3,
    "train_vision": True,
    "micro_tokens": 4096,
}
