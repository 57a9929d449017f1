from dist_peft.core.config.io import parse_config
from dist_peft.train.run_summary import RunSummary


def test_summary_of_a_configuration() -> None:
    tree = {
        "base": {"path": "dir"},
        "data": {"train": ["a.jsonl"]},
        "adapter": {"kind": "lora", "use_dora": True, "target_modules": ["q_proj", "v_proj"]},
    }
    summary = RunSummary.from_config(
        parse_config(tree), engine="single", ranks=1, facts=[("a", "b")]
    )
    assert summary.model == "dir"
    assert summary.adapter == "lora (r 16, alpha 32, target_modules q_proj v_proj, use_dora)"
    assert summary.base_storage == "nf4, 4 bits in groups of 64, double quantization"
    assert summary.facts == (("a", "b"),)
    integers = tree | {"base": {"path": "dir", "quant": {"kind": "int", "bits": 3}}}
    summary = RunSummary.from_config(parse_config(integers), engine="single", ranks=1)
    assert summary.base_storage == "int, 3 bits in groups of 64"
    bare = tree | {"base": {"path": "dir", "quant": None}, "adapter": {"kind": "none"}}
    summary = RunSummary.from_config(parse_config(bare), engine="single", ranks=1)
    assert (summary.base_storage, summary.adapter) == ("bfloat16", "none")


def test_settings_that_are_lists_of_sections() -> None:
    config = parse_config(
        {
            "base": {"path": "b"},
            "adapter": {"kind": "fusion", "adapters": ["x/rte", {"path": "y", "name": "mrpc"}]},
            "data": {"train": ["d.jsonl"]},
        }
    )
    assert RunSummary.from_config(config, engine="single", ranks=1).adapter == (
        "fusion (adapters x/rte mrpc)"
    )
