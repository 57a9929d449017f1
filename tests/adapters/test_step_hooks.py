from typing import Any

from dist_peft.adapters.protocol import AdapterDefaults
from dist_peft.adapters.step_hooks import ImportanceRule, NoStepHooks


def test_methods_without_hooks_neither_look_nor_change() -> None:
    hooks = AdapterDefaults()
    assert isinstance(hooks, NoStepHooks) and hooks.get_importance_rule() is None
    hooks.plan_steps(3)
    access: Any = object()  # has no method that could be called
    hooks.finish_step(1, access)
    hooks.finish_load(access)
    assert ImportanceRule(0.5, 0.6, lambda: True).is_active()
