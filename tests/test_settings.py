"""plumbing/settings.py: options, defaults and their help."""

import pytest

import train


def test_toy_values_are_for_the_embedded_model_only(tmp_path):
    config, method, _ = train.parse_args([])
    assert (config.lr, method.lam) == (
        train.TrainConfig.__dataclass_fields__["lr"].metadata["toy"],
        10.0,
    )
    config, method, _ = train.parse_args(["--model", "Qwen/Qwen2-VL-2B-Instruct"])
    assert (
        config.lr,
        config.questions,
        config.max_new_tokens,
        method.lam,
        method.jsd_k,
        method.tau,
    ) == (1e-6, 128, 4096, 0.05, 100, 1.0)
    config, method, _ = train.parse_args(["--lam", "0", "--lr", "0.25"])
    assert (config.lr, method.lam) == (0.25, 0.0)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 100 and all(
        train.flag(f) in text for f in train.TrainConfig.__dataclass_fields__
    )
