"""The precision that a machine answers fastest in."""

import pytest
import torch

from atp_utils.models import precisions

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [({F32: 1.0, BF16: 0.5}, BF16), ({F32: 1.0, BF16: 0.9}, F32), ({F32: 1.0, BF16: 100.0}, F32)],
)
def test_bfloat16_is_chosen_where_it_is_clearly_faster(seconds, expected):
    assert precisions.choose(seconds) == expected


def test_a_named_precision_is_taken_without_measuring(monkeypatch):
    monkeypatch.setattr(precisions, "fastest", None)
    assert precisions.precision("bfloat16") == precisions.precision(BF16) == BF16


def test_auto_is_measured_once_with_the_threads_left_as_they_were(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(precisions, "perf_counter", lambda: next(clock))  # every product takes one second
    precisions.fastest.cache_clear()
    threads = torch.get_num_threads()
    assert precisions.precision("auto") == precisions.precision("auto") == F32
    assert next(clock) == 2 * 2 * precisions.REPEATS and torch.get_num_threads() == threads
    precisions.fastest.cache_clear()


def test_where_bfloat16_is_hopeless_it_is_not_measured_again(monkeypatch):
    asked = []
    monkeypatch.setattr(precisions, "_seconds", lambda dtype: asked.append(dtype) or {F32: 0.01, BF16: 1.0}[dtype])
    precisions.fastest.cache_clear()
    assert precisions.precision("auto") == F32 and asked == [F32, BF16]
    precisions.fastest.cache_clear()


def test_a_gpu_takes_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    precisions.fastest.cache_clear()
    assert precisions.precision("auto") == BF16
    precisions.fastest.cache_clear()
