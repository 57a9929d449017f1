"""Files that a checkpoint keeps for its adapter."""

import json

from dist_peft.app.checkpoint_adapter import format_adapter_files


def test_files_of_a_checkpoint() -> None:
    files = format_adapter_files({"kind": "lora", "turn_end": [2]}, None)
    assert {name: json.loads(text) for name, text in files.items()} == {
        "adapter.json": {"kind": "lora", "turn_end": [2]}
    }
    assert format_adapter_files({}, "{{ x }}")["chat_template.jinja"] == "{{ x }}"
