"""Logits of an export against the trained model's."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

from dist_peft.core.errors import UserError
from dist_peft.export import verify
from dist_peft.export.verify import Probe, compare_logits, generate_greedy, verify_directory
from tests.support.tiny_models import CONFIGS, save_model

IDS = torch.tensor([[1, 2, 3]])


def probe() -> Probe:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(1, 3, 5, generator=generator)
    return Probe(IDS, before + torch.randn(1, 3, 5, generator=generator), before)


def test_exact_logits() -> None:
    found = compare_logits(probe().trained, probe())
    assert (found.max_error, found.mean_error, found.relative, found.kl) == (0, 0, 0, 0)
    assert found.top1 == 1
    assert ("Same top token", "100.0%") in found.format_rows()


def test_lost_adapter_has_relative_error_one() -> None:
    found = compare_logits(probe().before, probe())
    assert found.relative == pytest.approx(1)
    assert "100.00% of the change by training" in str(found)


def test_numbers_by_hand() -> None:
    trained = torch.tensor([[[math.log(0.5), math.log(0.25), math.log(0.25)], [3.0, 0.0, 0.0]]])
    got = torch.tensor([[[math.log(0.25), math.log(0.5), math.log(0.25)], [3.0, 0.0, 0.0]]])
    before = trained - 2.0
    found = compare_logits(got, Probe(IDS[:, :2], trained, before))
    assert found.max_error == pytest.approx(math.log(2))
    assert found.mean_error == pytest.approx(2 * math.log(2) / 6)
    assert found.relative == pytest.approx(math.sqrt(2 / 6) * math.log(2) / 2)
    assert found.kl == pytest.approx(0.25 * math.log(2) / 2)  # mean of two positions
    assert found.top1 == 0.5


def test_training_that_changed_nothing_is_no_division_by_zero() -> None:
    same = probe().trained
    assert compare_logits(same, Probe(IDS, same, same)).relative == 0
    other = compare_logits(same + 1, Probe(IDS, same, same))
    assert not other.changed  # measured against the spread of the logits instead
    assert other.relative == pytest.approx(1 / same.std(correction=0).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_tokens_that_a_model_rules_out(dtype: torch.dtype | None) -> None:
    """By minus infinity, or by the lowest number of its type."""
    trained, before = probe().trained.clone(), probe().before.clone()
    trained[..., 0] = before[..., 0] = -math.inf if dtype is None else torch.finfo(dtype).min
    without = compare_logits(before[..., 1:], Probe(IDS, trained[..., 1:], before[..., 1:]))
    assert compare_logits(before, Probe(IDS, trained, before)).relative == without.relative == 1
    found = compare_logits(trained, Probe(IDS, trained, before))
    assert (found.relative, found.kl) == (0, 0) and found.changed
    wrong = compare_logits(trained.clamp_min(-100.0), Probe(IDS, trained, before))
    assert not wrong.relative < 1


def test_divergence_of_the_base_before_training() -> None:
    found = compare_logits(probe().before, probe())
    assert found.kl == found.kl_before > 0
    assert compare_logits(probe().trained, probe()).kl_before == found.kl


def test_few_positions_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same figures, and no float64 copy of all logits."""

    class Largest(TorchDispatchMode):
        num_bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
                self.num_bytes = max(self.num_bytes, out.nbytes)
            return out

    generator = torch.Generator().manual_seed(0)
    got, trained, before = torch.randn(3, 2, 17, 40, generator=generator).mul(3).unbind()
    trained[0, 3, 7] = got[0, 3, 7] = before[0, 3, 7] = -math.inf
    whole = compare_logits(got, Probe(IDS, trained, before))
    monkeypatch.setattr(verify, "COMPARED_ELEMENTS", 3 * 40)
    with Largest() as largest:
        found = compare_logits(got, Probe(IDS, trained, before))
    assert vars(found) == pytest.approx(vars(whole), rel=1e-12)
    assert largest.num_bytes == 8 * 3 * 40
    finite = trained.double()[trained.isfinite()]
    same = compare_logits(got, Probe(IDS, trained, trained))
    error = torch.where(got == trained, 0.0, got - trained).double().square().mean()
    assert same.relative == pytest.approx((error / finite.var(correction=0)).sqrt().item())


def test_other_vocabulary_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"shape \[1, 3, 4\], the trained model returned \[1, 3, 5\]"
    ):
        compare_logits(probe().trained[..., :4], probe())


def test_probe_file(tmp_path: Path) -> None:
    logits = torch.randn(1, 3, 10)[..., ::2]  # not contiguous
    Probe(IDS, logits, logits).save_probe(tmp_path / "probe.safetensors")  # shared memory
    found = Probe.load_probe(tmp_path / "probe.safetensors")
    assert torch.equal(found.input_ids, IDS) and found.input_ids.dtype == torch.long
    assert torch.equal(found.trained, logits) and torch.equal(found.before, logits)
    with pytest.raises(UserError, match="missing, so the result cannot be compared"):
        Probe.load_probe(tmp_path / "none.safetensors")


@pytest.mark.parametrize("content", [b"", b"garbage", b"whole"])
def test_damaged_probe_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    if content == b"whole":
        save_file({"other": IDS}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path} is damaged: .+; remove it"):
        Probe.load_probe(path)


def test_probe_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "probe.safetensors").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        probe().save_probe(tmp_path / "probe.safetensors")


def test_directory_is_loaded_by_transformers(tmp_path: Path) -> None:
    model = save_model(CONFIGS["llama"], tmp_path)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    shifted = Probe(IDS, logits + 1, logits)
    assert verify_directory(tmp_path, Probe(IDS, logits, logits + 1), torch.float32).max_error == 0
    assert verify_directory(tmp_path, shifted, torch.float32).max_error == pytest.approx(1)
    rounded = verify_directory(tmp_path, Probe(IDS, logits, logits + 1), torch.bfloat16)
    assert 0 < rounded.relative < 0.1


def test_generate_is_greedy(tmp_path: Path) -> None:
    model = save_model(CONFIGS["llama"], tmp_path)
    words = {f"w{i}": i for i in range(97)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w2").save_pretrained(tmp_path)
    ids = [5, 6]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    wanted = " ".join(f"w{i}" for i in ids[2:] if i != 2)
    assert generate_greedy(tmp_path, ["w5 w6", "w7"], max_new_tokens=6)[0] == wanted
