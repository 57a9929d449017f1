"""Liger's kernels against the operators of transformers' modules, interpreted or on a GPU."""

import sys
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_peft.core.errors import UserError
from dist_peft.engine import liger_kernels
from dist_peft.engine.liger_kernels import apply_liger_kernels, check_liger_kernels
from dist_peft.quant.kept_results import KEPT_KINDS, make_keeping_contexts
from dist_peft.train import head_loss
from dist_peft.train.head_loss import compute_frozen_head_losses, replace_logits_by_loss
from dist_peft.train.loss import IGNORE, sum_token_loss
from tests.support.device_rows import DEVICE, MARKS, prepare_kernels
from tests.support.tiny_models import CONFIGS

prepare_kernels()
pytest.importorskip("liger_kernel.ops.rms_norm", reason="liger-kernel is not installed")
if DEVICE == "cpu":
    import triton

    from tests.support.triton_interpreter import pass_floats_as_numbers

    pass_floats_as_numbers()
    # the interpreter has no functions of CUDA's library
    sys.modules["liger_kernel.ops.rms_norm"].rsqrt = lambda x: (  # type: ignore[attr-defined]
        triton.language.rsqrt(x)
    )
pytestmark = MARKS
IDS = torch.randint(3, 97, (1, 7), generator=torch.Generator().manual_seed(0))
LABELS = torch.where(torch.arange(7) % 3 == 1, IDS.roll(-1, 1), IGNORE)


@pytest.fixture(autouse=True)
def use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_PEFT_KERNELS", "triton")


def make_model(family: str, dtype: torch.dtype, **changes: Any) -> Any:
    config = CONFIGS[family]
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype).to(DEVICE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith("norm.weight"):
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.head_output_is_logits = True
    return model


def compute(model: Any, **more: Any) -> tuple[Tensor, Tensor]:
    """Loss of the targets, and its gradient in the embedded tokens."""
    embedded = model.get_input_embeddings()(IDS.to(DEVICE)).detach().requires_grad_()
    with replace_logits_by_loss(model, LABELS):
        loss = model(inputs_embeds=embedded, use_cache=False, **more).logits
    (loss / 3).backward()
    assert embedded.grad is not None
    return loss.detach(), embedded.grad


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        ("llama", {"norm": 3, "swiglu": 1, "rope": 1, "loss": 1}),
        ("qwen3", {"norm": 5, "swiglu": 1, "rope": 1, "loss": 1}),
        ("gemma", {"norm": 3, "rope": 1, "loss": 1}),  # its activation is GELU
    ],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_losses_and_gradients_are_those_of_transformers(
    family: str, counts: dict[str, int], dtype: torch.dtype, tolerance: float
) -> None:
    model = make_model(family, dtype, num_hidden_layers=1)
    loss, gradient = compute(model)
    logits = model(input_ids=IDS.to(DEVICE), use_cache=False).logits
    torch.testing.assert_close(loss, sum_token_loss(logits, LABELS.to(DEVICE)), rtol=1e-3, atol=0)
    assert apply_liger_kernels(model, list(model.model.layers)) == counts
    found_loss, found = compute(model)
    torch.testing.assert_close(found_loss, loss, rtol=tolerance, atol=0)
    error = (found - gradient).float().norm() / gradient.float().norm()
    assert float(error) < tolerance
    names = [name for name, _ in model.named_parameters()]
    assert names == [
        name for name, _ in make_model(family, dtype, num_hidden_layers=1).named_parameters()
    ]


def test_each_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", torch.float32, num_hidden_layers=1)
    apply_liger_kernels(model, list(model.model.layers))
    imported, names = liger_kernels._import_operators, set()

    def note_name(name: str) -> Any:
        names.add(name)
        return imported(name)

    monkeypatch.setattr(liger_kernels, "_import_operators", note_name)
    compute(model)
    assert names == {"rms_norm", "swiglu", "rope", "fused_linear_cross_entropy"}
    names.clear()
    monkeypatch.setenv("DIST_PEFT_KERNELS", "torch")
    compute(model)
    assert not names


class CountedOperators(TorchDispatchMode):
    """Operators that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        free = (
            "detach",
            "view",
            "transpose",
            "t",
            "slice",
            "select",
            "unsqueeze",
            "squeeze",
            "empty",
            "split",
        )
        free += ("expand", "promote_types", "_unsafe_view", "permute", "alias", "empty_like")
        self.launches += func.__name__.partition(".")[0] not in free
        return func(*args, **(kwargs or {}))


def test_launches_of_the_models_own_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of docs/kernels.md, of a processor with products of 16 bits."""
    monkeypatch.setattr(head_loss, "has_fast_product", lambda device, dtype: True)
    layer = make_model("llama", torch.bfloat16).model.layers[0]
    x = torch.randn(1, 5, 64, device=DEVICE, dtype=torch.bfloat16)
    q, angles = torch.randn(2, 1, 4, 5, 16).bfloat16(), torch.randn(1, 5, 16).bfloat16()
    rotate = type(layer.self_attn).forward.__globals__["apply_rotary_pos_emb"]
    gate, hidden, head = x.clone(), x[0].clone().requires_grad_(), nn.Linear(64, 99, False, DEVICE)
    head, targets = head.bfloat16().requires_grad_(False), torch.arange(5, device=DEVICE)
    calls = {
        "norm": lambda: layer.input_layernorm(x),
        "swiglu": lambda: layer.mlp.act_fn(gate) * x,
        "rope": lambda: rotate(q[0], q[1], angles, angles),
        "loss": lambda: compute_frozen_head_losses(hidden, targets, head),
    }
    found = {}
    for name, call in calls.items():
        with CountedOperators() as counted:
            call()
        found[name] = counted.launches
    assert found == {"norm": 8, "swiglu": 2, "rope": 10, "loss": 18}


def test_a_kept_product_is_not_rotated_twice() -> None:
    model = make_model("llama", torch.float32, num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    apply_liger_kernels(model, list(model.model.layers))
    q, k = (torch.randn(1, heads, 5, 16, device=DEVICE) for heads in (4, 2))
    cos, sin = (torch.randn(1, 5, 8, device=DEVICE).repeat(1, 1, 2) for _ in range(2))
    rotate = type(attention).forward.__globals__["apply_rotary_pos_emb"]
    before, liger_kernels._state.uses_rope = q.clone(), True
    try:
        context, _ = make_keeping_contexts(KEPT_KINDS["products"])
        with context:
            rotate(q, k, cos, sin)
        assert torch.equal(q, before)
        expected = rotate.__wrapped__(q, k, cos, sin)
        for one, other in zip(rotate(q, k, cos, sin), expected, strict=True):
            torch.testing.assert_close(one, other)
    finally:
        liger_kernels._state.uses_rope = False


def test_other_forms_are_left_and_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dist_peft")
    model = make_model("gemma", torch.float32)
    apply_liger_kernels(model, list(model.model.layers))
    assert "2 x GemmaMLP: its activation is not silu(gate) * up" in caplog.text
    model = make_model("phi", torch.float32)  # layer norms, half of each head rotated
    counts = apply_liger_kernels(model, list(model.model.layers))
    assert counts.keys() <= {"rope", "loss"}


def test_trainable_norms_keep_their_own_forward() -> None:
    model = make_model("llama", torch.float32, num_hidden_layers=1)
    apply_liger_kernels(model, list(model.model.layers))
    norm, x = model.model.norm, torch.randn(2, 64, device=DEVICE)
    fused = norm(x)
    norm.weight.requires_grad_()
    own = norm(x)
    torch.testing.assert_close(own.detach(), fused)
    assert (own.requires_grad and not torch.equal(own.detach(), fused)) or own.grad_fn is not None


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="has no kernel for Sequential: no part has a form"):
        apply_liger_kernels(nn.Sequential(nn.Linear(2, 2)), [])
    check_liger_kernels(torch.device(DEVICE))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dist_peft\[liger\]'"):
        check_liger_kernels(torch.device(DEVICE))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="needs a CUDA device"):
        check_liger_kernels(torch.device("cpu"))
