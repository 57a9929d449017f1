from dist_peft.core.config.io import parse_config
from dist_peft.core.config.run import LoraConfig
from dist_peft.core.config.sweep_points import count_joined, split_sweep_configs


def test_points_are_ordinary_runs() -> None:
    points = [{"lr": 1e-3, "r": 3}, {"seed": 5, "alpha": 7, "target_modules": ["q_proj"]}]
    tree = {
        "base": {"path": "b"},
        "data": {"train": ["x.jsonl"]},
        "train": {"lr": 5e-4, "steps": 9},
        "save": {"dir": "runs/s"},
    }
    config = parse_config({**tree, "sweep": {"points": points}})
    found = split_sweep_configs(config)
    assert list(found) == ["point-000", "point-001"] and count_joined(config) == 2
    first, second = found.values()
    expected = parse_config(
        {
            **tree,
            "train": {"lr": 1e-3, "steps": 9},
            "adapter": {"r": 3},
            "save": {"dir": "runs/s/point-000", "asynchronous": False},
        }
    )
    assert first == expected and count_joined(first) == 1
    assert isinstance(second.adapter, LoraConfig) and second.train.lr == 5e-4
    assert (second.train.seed, second.adapter.alpha, second.adapter.r) == (5, 7, 16)
    assert second.adapter.target_modules == ["q_proj"]
