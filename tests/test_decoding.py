"""plumbing/decoding.py: draws."""

import numpy as np
import torch

from plumbing.decoding import draw, uniforms


def test_draw_follows_the_distribution():
    """Evenly spread uniforms hit each token as often as its probability says; top-k and top-p leave exactly the tokens they should."""
    p = torch.tensor([0.0, 0.4, 0.02, 0.3, 0.18, 0.1])
    n = 10_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n

    def shares(temperature=1.0, **how):
        token, logp = draw(p.log().expand(n, -1), u, temperature, **how)
        warm = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
        torch.testing.assert_close(
            logp, warm.log()[token], rtol=1e-5, atol=1e-6
        )  # of the whole distribution, truncated or not
        return np.bincount(token.numpy(), minlength=6) / n

    np.testing.assert_allclose(shares(), p, atol=2 / n)
    warm = np.sqrt(p.numpy()) / np.sqrt(p.numpy()).sum()
    np.testing.assert_allclose(shares(temperature=2.0), warm, atol=2 / n)
    np.testing.assert_allclose(shares(top_k=2), np.array([0, 4, 0, 3, 0, 0]) / 7, atol=2 / n)
    np.testing.assert_allclose(
        shares(top_p=0.75), np.array([0, 0.4, 0, 0.3, 0.18, 0]) / 0.88, atol=2 / n
    )  # 0.7 is not yet enough
    np.testing.assert_allclose(shares(top_p=0.35), [0, 1, 0, 0, 0, 0], atol=0)
    np.testing.assert_allclose(
        shares(top_p=0.75, top_k=2), np.array([0, 4, 0, 3, 0, 0]) / 7, atol=2 / n
    )
    ends = draw(p.log().expand(2, -1), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))[
        0
    ].tolist()
    assert ends == [1, 5], "0 must not draw a token of probability 0"
    assert draw(p.log()[None], None)[0].item() == 1
    assert (
        uniforms(["a", "b", "a"], 3).tolist()[0] == uniforms(["a"], 3).tolist()[0]
        and len(set(uniforms(["a", "b"], 2).flatten().tolist())) == 4
    )
