"""Rolling windows against lm-eval's own, and what a stride promises."""

from __future__ import annotations

import pytest

from nexus_ray.evaluation.windows import Window, rolling_windows

PREFIX = -1
CASES = [(tokens, length) for tokens in (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 40) for length in (1, 2, 3, 8)]


@pytest.fixture(scope="module")
def lm_eval_utils():
    return pytest.importorskip("lm_eval.utils", reason="lm-eval is not installed: pip install 'nexus-ray[eval]'")


@pytest.mark.parametrize(("tokens", "length"), CASES)
def test_without_a_stride_they_are_the_disjoint_windows_of_lm_eval(tokens, length, lm_eval_utils):
    ids = list(range(tokens))
    theirs = lm_eval_utils.get_rolling_token_windows(ids, PREFIX, max_seq_len=length, context_len=1)
    ours = rolling_windows(ids, PREFIX, length)
    for (context, continuation), window in zip(map(lm_eval_utils.make_disjoint_window, theirs), ours, strict=True):
        assert window.targets == continuation
        assert window.inputs == (context + continuation)[:-1]  # what HFLM gives its model


@pytest.mark.parametrize(("tokens", "length"), CASES)
def test_with_a_stride_they_are_those_of_lm_eval_with_more_context(tokens, length, lm_eval_utils):
    ids = list(range(tokens))
    for stride in range(1, length + 1):
        theirs = lm_eval_utils.get_rolling_token_windows(ids, PREFIX, length, context_len=length - stride + 1)
        ours = rolling_windows(ids, PREFIX, length, stride)
        assert [(window.inputs, window.targets) for window in ours] == list(theirs)


@pytest.mark.parametrize(("tokens", "length"), CASES)
def test_every_token_is_scored_once_and_is_the_one_after_the_input_that_predicts_it(tokens, length):
    ids = list(range(tokens))
    for stride in range(1, length + 1):
        windows = rolling_windows(ids, PREFIX, length, stride)
        assert [token for window in windows for token in window.targets] == ids
        for window in windows:
            assert len(window.targets) <= len(window.inputs) <= length
            predictors = window.inputs[-len(window.targets) :]
            assert [token + 1 for token in predictors] == window.targets


@pytest.mark.parametrize(("tokens", "length"), CASES)
def test_after_the_first_window_every_target_sees_the_promised_context(tokens, length):
    for stride in range(1, length + 1):
        for window in rolling_windows(range(tokens), PREFIX, length, stride)[1:]:
            assert len(window.inputs) == length
            assert PREFIX not in window.inputs
            seen_by_the_first_target = len(window.inputs) - len(window.targets) + 1
            assert seen_by_the_first_target >= length - stride + 1


def test_a_text_that_fits_is_one_window():
    assert rolling_windows([5, 6, 7], PREFIX, 3) == [Window([PREFIX, 5, 6], [5, 6, 7])]


def test_the_last_window_is_as_long_as_the_others():
    assert rolling_windows(range(7), PREFIX, 3)[-1] == Window([3, 4, 5], [6])


@pytest.mark.parametrize(("length", "stride"), [(0, None), (4, 0), (4, 5), (-1, 1)])
def test_windows_that_cannot_be_are_refused(length, stride):
    with pytest.raises(ValueError, match="1 <= stride <= length"):
        rolling_windows([1, 2, 3], PREFIX, length, stride)
