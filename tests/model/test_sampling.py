"""Drawing tokens: the cuts against NumPy, the shares of 20,000 draws, and what a draw may depend on."""

import jax
import numpy as np
import pytest

from pdjax.model.sampling import Sampling, keep_likely, sample, stop_tokens
from pdjax.types import SamplingParams

DRAWS = 20_000
LOGITS = np.log(np.array([0.30, 0.02, 0.22, 0.05, 0.15, 0.10, 0.12, 0.04], np.float32))
CHI_SQUARED_999 = {1: 10.828, 2: 13.816, 3: 16.266, 4: 18.467, 5: 20.515, 6: 22.458, 7: 24.322}  # by freedom

sample = jax.jit(sample)
keep_likely = jax.jit(keep_likely)


def kept(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
  """Which tokens of `[V]` may be drawn: `top_k` of them, then the fewest whose shares of those reach `top_p`."""
  order = np.argsort(-logits)[: top_k or None]
  shares = np.exp(logits[order].astype(np.float64) - logits.max())
  reached = np.cumsum(shares / shares.sum())
  return np.sort(order[: np.searchsorted(reached, top_p) + 1])


def draw(params: list[SamplingParams], logits: np.ndarray, generated=0) -> np.ndarray:
  sampling = Sampling.stack(params, [100] * len(params), (), len(params))
  generated = np.broadcast_to(np.asarray(generated, np.int32), len(params))
  return np.asarray(sample(np.broadcast_to(logits, (len(params), logits.shape[-1])), sampling, generated))


# ---------------------------------------------------------------------------- cuts


@pytest.mark.parametrize('top_k', [0, 1, 3, 40, 50, 99])
@pytest.mark.parametrize('top_p', [1e-6, 0.3, 0.9, 0.999])
def test_cuts_keep_what_numpy_keeps(top_k, top_p):
  logits = 2 * np.random.default_rng(0).standard_normal((6, 50)).astype(np.float32)
  cut = np.asarray(keep_likely(logits, np.full(6, top_k, np.int32), np.full(6, top_p, np.float32)))
  for row in range(6):
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(cut[row])), kept(logits[row], top_k, top_p))
    stays = np.isfinite(cut[row])
    np.testing.assert_array_equal(cut[row][stays], logits[row][stays])
    assert np.isneginf(cut[row][~stays]).all()


def test_no_cut_keeps_all():
  logits = np.random.default_rng(1).standard_normal((3, 50)).astype(np.float32)
  cut = keep_likely(logits, np.zeros(3, np.int32), np.ones(3, np.float32))
  np.testing.assert_array_equal(cut, logits)


def test_each_row_is_cut_by_its_own_rule():
  rows = np.stack([LOGITS] * 4)
  cut = keep_likely(rows, np.array([0, 1, 3, 0], np.int32), np.array([1, 1, 1, 0.5], np.float32))
  assert np.isfinite(cut).sum(axis=1).tolist() == [8, 1, 3, 2]


# ---------------------------------------------------------------------------- shares


@pytest.mark.parametrize(
  'options',
  [
    {'temperature': 1.0},
    {'temperature': 0.7},
    {'temperature': 2.0},
    {'temperature': 1.0, 'top_k': 3},
    {'temperature': 1.0, 'top_p': 0.75},
    {'temperature': 1.5, 'top_k': 6, 'top_p': 0.8},
  ],
  ids=str,
)
@pytest.mark.parametrize('over', ['seeds', 'positions'])
def test_tokens_are_drawn_by_their_shares(options, over):
  seeds, positions = (np.arange(DRAWS), 0) if over == 'seeds' else (np.full(DRAWS, 7), np.arange(DRAWS))
  tokens = draw([SamplingParams(seed=int(seed), **options) for seed in seeds], LOGITS, positions)
  counts = np.bincount(tokens, minlength=len(LOGITS))
  scaled = LOGITS / options['temperature']
  may = kept(scaled, options.get('top_k', 0), options.get('top_p', 1.0))
  assert counts.sum() == counts[may].sum() == DRAWS  # none that was cut off
  shares = np.exp(scaled[may].astype(np.float64))
  expected = shares / shares.sum() * DRAWS
  statistic = ((counts[may] - expected) ** 2 / expected).sum()
  assert statistic < CHI_SQUARED_999[len(may) - 1], (counts, expected)


def test_the_test_of_shares_would_notice_another_temperature():
  tokens = draw([SamplingParams(seed=seed, temperature=0.9) for seed in range(DRAWS)], LOGITS)
  expected = np.exp(LOGITS.astype(np.float64)) * DRAWS
  statistic = ((np.bincount(tokens, minlength=8) - expected) ** 2 / expected).sum()
  assert statistic > CHI_SQUARED_999[7]


# ---------------------------------------------------------------------------- what a draw depends on


def test_greedy_rows_take_the_likeliest_beside_sampled_rows():
  logits = np.random.default_rng(2).standard_normal((64, 50)).astype(np.float32)
  params = [SamplingParams(temperature=0.0 if i % 2 else 5.0, seed=i) for i in range(64)]
  tokens = draw(params, logits)
  assert (tokens[1::2] == logits.argmax(axis=1)[1::2]).all()
  assert (tokens[::2] != logits.argmax(axis=1)[::2]).sum() > 16


def test_a_batch_of_greedy_rows_takes_the_likeliest_whatever_their_cuts_and_seeds():
  logits = np.random.default_rng(3).standard_normal((8, 50)).astype(np.float32)
  params = [SamplingParams(seed=i, top_k=i, top_p=0.5) for i in range(8)]
  np.testing.assert_array_equal(draw(params, logits), logits.argmax(axis=1))


def test_a_draw_is_the_same_in_any_row_of_any_batch():
  rng = np.random.default_rng(4)
  logits = rng.standard_normal(50).astype(np.float32)
  mine = SamplingParams(seed=12345, temperature=1.3, top_k=20, top_p=0.95)
  alone = [int(draw([mine], logits, position)[0]) for position in range(12)]
  assert len(set(alone)) > 3
  for rows, row in ((4, 3), (9, 0), (9, 5)):
    others = [SamplingParams(seed=int(rng.integers(1000)), temperature=float(i % 3)) for i in range(rows)]
    others[row] = mine
    batch = rng.standard_normal((rows, 50)).astype(np.float32)
    batch[row] = logits
    for position in range(12):
      positions = rng.integers(0, 99, rows)
      positions[row] = position
      assert draw(others, batch, positions)[row] == alone[position]


def test_seeds_and_positions_give_draws_of_their_own():
  logits = np.zeros(50, np.float32)
  table = np.stack([
    draw([SamplingParams(seed=seed, temperature=1.0)] * 40, logits, np.arange(40))
    for seed in (0, 1, 2, 2**32, 2**32 + 1, 5 * 2**32, 2**63 - 1)
  ])  # fmt: skip
  same = (table[:, None] == table[None]).mean(axis=-1)
  assert (same[~np.eye(len(table), dtype=bool)] < 0.2).all()  # by chance, 0.02
  assert all(len(set(row)) > 20 for row in table)


def test_a_seed_beyond_32_bits_is_not_its_low_half():
  high, low = (
    Sampling.stack([SamplingParams(seed=seed)], [1], (), 1).keys[0].tolist() for seed in (2**40 + 7, 7)
  )  # fmt: skip
  assert high == [2**8, 7] and low == [0, 7]


# ---------------------------------------------------------------------------- ends


def test_a_row_ends_with_a_stop_token_or_its_last_token():
  params = [SamplingParams(stop_token_ids=(5, 6)), SamplingParams(ignore_eos=True), SamplingParams()]
  sampling = Sampling.stack(params, [3, 3, 3], (9,), 5)
  tokens, generated = np.array([6, 9, 9, 0, 0]), np.array([1, 1, 1, 0, 0])
  assert sampling.ended(tokens, generated).tolist() == [True, False, True, True, True]  # padding has no token left
  assert sampling.ended(np.array([7, 7, 7, 7, 7]), np.array([2, 3, 2, 0, 0])).tolist()[:3] == [False, True, False]


def test_stop_tokens_are_the_requests_and_the_models_each_once():
  assert stop_tokens(SamplingParams(stop_token_ids=(7, 3, 7)), (3, 9)) == [3, 7, 9]
  assert stop_tokens(SamplingParams(stop_token_ids=(7, 3), ignore_eos=True), (3, 9)) == [3, 7]
