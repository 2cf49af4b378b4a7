"""Drawing tokens: the cuts against NumPy, the shares of 20,000 draws, and what a draw may depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdjax.model.sampling import Sampling, count, keep_likely, likeliest, past, penalise, sample, tell
from pdjax.types import SamplingParams

DRAWS = 20_000
LOGITS = np.log(np.array([0.30, 0.02, 0.22, 0.05, 0.15, 0.10, 0.12, 0.04], np.float32))
CHI_SQUARED_999 = {1: 10.828, 2: 13.816, 3: 16.266, 4: 18.467, 5: 20.515, 6: 22.458, 7: 24.322}  # by freedom

raw_sample = sample
sample = jax.jit(sample, static_argnames='history')
keep_likely = jax.jit(keep_likely)


def kept(logits: np.ndarray, top_k: int, top_p: float, min_p: float = 0.0) -> np.ndarray:
  """The tokens of `[V]` that may be drawn.

  `top_k` of them, of those the fewest whose shares reach `top_p`, of those the ones `min_p` times as likely as the
  best.
  """
  order = np.argsort(-logits)[: top_k or None]
  shares = np.exp(logits[order].astype(np.float64) - logits.max())
  reached = np.cumsum(shares / shares.sum())
  order = order[: np.searchsorted(reached, top_p) + 1]
  return np.sort(order[shares[: len(order)] >= min_p])


def draw(params: list[SamplingParams], logits: np.ndarray, generated=0) -> np.ndarray:
  sampling = Sampling.stack(params, [100] * len(params), [()] * len(params), len(params))
  generated = np.broadcast_to(np.asarray(generated, np.int32), len(params))
  return np.asarray(sample(np.broadcast_to(logits, (len(params), logits.shape[-1])), sampling, generated).tokens)


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


@pytest.mark.parametrize('vocab_size', [1, 127, 128, 129, 1000])
def test_cuts_and_the_likeliest_do_not_depend_on_the_size_of_the_vocabulary(vocab_size):
  rng = np.random.default_rng(vocab_size)
  logits = 4 * rng.standard_normal((4, vocab_size)).astype(np.float32)
  cut = np.asarray(keep_likely(logits, np.array([0, 7, 0, 90], np.int32), np.array([0.8, 1, 1e-45, 0.6], np.float32)))
  for row, (top_k, top_p) in enumerate([(0, 0.8), (7, 1.0), (1, 1.0), (90, 0.6)]):
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(cut[row])), kept(logits[row], top_k, top_p))
  np.testing.assert_array_equal(jax.jit(likeliest)(logits), (logits.argmax(axis=1), logits.max(axis=1)))


def test_equals_of_the_last_that_is_kept_are_kept_and_the_first_of_equals_is_the_likeliest():
  logits = np.array([[1, 0.0, 3, -0.0, 3, 0.0, -2], [-np.inf, 5, -np.inf, 5, -np.inf, 4, 4]], np.float32)
  cut = keep_likely(logits, np.array([4, 3], np.int32), np.ones(2, np.float32))
  assert np.isfinite(cut).tolist() == [[True] * 6 + [False], [False, True, False, True, False, True, True]]
  nucleus = keep_likely(logits, np.zeros(2, np.int32), np.full(2, 0.5, np.float32))
  assert np.isfinite(nucleus).tolist() == [
    [False, False, True, False, True, False, False],
    [False, True] * 2 + [False] * 3,
  ]
  tokens, highest = likeliest(jnp.asarray(logits))
  assert tokens.tolist() == [2, 1] and highest.tolist() == [3, 5]


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
    {'temperature': 1.0, 'min_p': 0.3},
    {'temperature': 2.0, 'min_p': 0.5},
    {'temperature': 1.2, 'top_k': 5, 'min_p': 0.35},
    {'temperature': 0.9, 'top_k': 7, 'top_p': 0.95, 'min_p': 0.2},
  ],
  ids=str,
)
@pytest.mark.parametrize('over', ['seeds', 'positions'])
def test_tokens_are_drawn_by_their_shares(options, over):
  seeds, positions = (np.arange(DRAWS), 0) if over == 'seeds' else (np.full(DRAWS, 7), np.arange(DRAWS))
  tokens = draw([SamplingParams(seed=int(seed), **options) for seed in seeds], LOGITS, positions)
  counts = np.bincount(tokens, minlength=len(LOGITS))
  scaled = LOGITS / options['temperature']
  may = kept(scaled, options.get('top_k', 0), options.get('top_p', 1.0), options.get('min_p', 0.0))
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


# ---------------------------------------------------------------------------- penalties


def penalised(logits: np.ndarray, prompt, tokens, params: SamplingParams) -> np.ndarray:
  """Logits `[V]` after the penalties, written plainly."""
  logits = logits.copy()
  for token in {*prompt, *tokens}:
    logits[token] *= params.repetition_penalty if logits[token] < 0 else 1 / params.repetition_penalty
  for token in set(tokens):
    logits[token] -= params.presence_penalty + params.frequency_penalty * tokens.count(token)
  return logits


PENALTIES = ({}, {'repetition_penalty': 1.7}, {'presence_penalty': 0.9}, {'frequency_penalty': -0.8},
             {'repetition_penalty': 0.6, 'presence_penalty': -0.4, 'frequency_penalty': 0.5})  # fmt: skip


def test_penalties_are_those_of_a_plain_loop():
  rng = np.random.default_rng(0)
  params = [SamplingParams(**options) for options in PENALTIES]
  pasts = [(rng.integers(0, 30, 12).tolist(), rng.integers(20, 50, 15).tolist()) for _ in params]
  logits = 3 * rng.standard_normal((len(params), 50)).astype(np.float32)
  history = np.stack([past(*one, 50) for one in pasts])
  sampling = Sampling.stack(params, [9] * len(params), [()] * len(params), len(params))
  actual = np.asarray(penalise(logits, history, sampling))
  expected = [penalised(row, *one, each) for row, one, each in zip(logits, pasts, params, strict=True)]
  np.testing.assert_allclose(actual, expected, rtol=1e-6)
  np.testing.assert_array_equal(actual[0], logits[0])  # who asks for nothing is not touched


def test_tokens_counted_one_by_one_are_the_past():
  rng = np.random.default_rng(1)
  prompts, outputs = rng.integers(0, 20, (3, 7)), rng.integers(0, 20, (3, 30))
  history = np.stack([past(prompt, (), 20) for prompt in prompts])
  before = history.copy()
  for tokens in outputs.T:
    history = count(jnp.asarray(history), np.array([0, 3, 2]), tokens)  # the second counts nowhere: row 3 is not there
  expected = [past(prompts[0], outputs[0], 20), before[1], past(prompts[2], outputs[2], 20)]
  np.testing.assert_array_equal(history, expected)


def test_a_count_that_is_full_stays_so():
  history = jnp.asarray(past([0], [0] * 40_000, 2)[None])
  for _ in range(3):
    history = count(history, np.array([0]), np.array([0]))
  assert history.tolist() == [[65535, 0]]


def test_penalties_come_before_temperature_and_cuts():
  """With token 0 pushed below the cut, only the others are drawn, by their shares among themselves."""
  options = {'temperature': 1.0, 'top_k': 3, 'presence_penalty': 1.0}
  params = [SamplingParams(seed=seed, **options) for seed in range(DRAWS)]
  history = np.broadcast_to(past((), [0], 8), (DRAWS, 8))
  sampling = Sampling.stack(params, [9] * DRAWS, [()] * DRAWS, DRAWS)
  logits = np.broadcast_to(LOGITS, (DRAWS, 8))
  tokens = np.asarray(jax.jit(lambda *args: sample(*args, history=lambda: history))(
    logits, sampling, np.zeros(DRAWS, np.int32)
  ).tokens)  # fmt: skip
  wanted = penalised(LOGITS, (), [0], params[0])
  may = kept(wanted, 3, 1.0)
  counts = np.bincount(tokens, minlength=8)
  assert may.tolist() == [2, 4, 6] and counts[may].sum() == DRAWS
  shares = np.exp(wanted[may].astype(np.float64))
  expected = shares / shares.sum() * DRAWS
  assert ((counts[may] - expected) ** 2 / expected).sum() < CHI_SQUARED_999[2]


# ---------------------------------------------------------------------------- log probabilities


def test_log_probabilities_are_those_of_the_raw_logits():
  logits = 4 * np.random.default_rng(5).standard_normal((6, 50)).astype(np.float32)
  tokens = np.arange(6, dtype=np.int32) * 7
  told = tell(logits, tokens)
  expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
  order = np.argsort(-logits, axis=1, kind='stable')[:, :20]
  np.testing.assert_allclose(told.logprobs, expected[np.arange(6), tokens], atol=1e-5)
  np.testing.assert_array_equal(told.top_tokens, order)
  np.testing.assert_allclose(told.top_logprobs, np.take_along_axis(expected, order, axis=1), atol=1e-5)


NAN, NEGATIVE_NAN = np.float32(np.nan), np.array([0xFFC00001], np.uint32).view(np.float32)[0]


@pytest.mark.parametrize(
  'row, top',
  [  # the order is that of np.argsort(-row, kind='stable'), and its first np.argmax's, unless another is named
    ([-0.0, 0.0, -1, -2], [0, 1, 2, 3]),
    ([0.0, -0.0, -1, -2], [0, 1, 2, 3]),
    ([-1, 0.0, -0.0, 0.0, -0.0], [1, 2, 3, 4, 0]),
    ([3, -0.0, 3, 0.0, 5, 0.0, -0.0], [4, 0, 2, 1, 3, 5, 6]),  # below the best as well
    ([-0.0] * 100 + [0.0] * 100, range(20)),
    ([-np.inf, 2, -np.inf, 2], [1, 3, 0, 2]),
    ([np.inf, 1, np.inf, 2], [0, 2, 3, 1]),
    ([1, NAN, 2, NAN], [1, 3, 2, 0]),  # np.argmax and jnp.argmax: a NaN is the highest, the first of them first
    ([1, NEGATIVE_NAN, 2, NAN], [1, 3, 2, 0]),  # whatever its bits
  ],
)
def test_of_equals_the_smaller_id_is_told_first_and_the_first_told_is_the_greedy_token(row, top):
  logits = np.array([row], np.float32)
  (greedy,) = draw([SamplingParams()], logits)
  told = jax.jit(tell)(logits, np.array([greedy], np.int32))
  assert np.asarray(told.top_tokens)[0].tolist() == list(top)
  assert greedy == top[0] == logits[0].argmax()
  with np.errstate(invalid='ignore'):
    logprobs = logits - np.asarray(jax.nn.logsumexp(logits, axis=-1))
  np.testing.assert_array_equal(told.top_logprobs, logprobs[:, list(top)], strict=True)
  np.testing.assert_array_equal(told.logprobs, told.top_logprobs[:, 0])


@pytest.mark.parametrize(
  'row, token',
  [([1, 2, np.inf, 3, np.inf], 2), ([1, NAN, 9, NAN, 0], 1), ([1, 2, NEGATIVE_NAN, 9, 0], 2)],  # by np.argmax
)
@pytest.mark.parametrize('options', [{}, {'top_k': 1}, {'top_k': 3}, {'top_p': 0.9}, {'min_p': 0.3}])
def test_an_infinite_logit_is_drawn_however_others_are_cut_and_whoever_is_in_the_batch(row, token, options):
  params = [SamplingParams(temperature=1.0, **options), SamplingParams(temperature=1.0, min_p=0.5, top_k=2, seed=1)]
  for batch in ([params[0]], params):
    assert draw(batch, np.array(row, np.float32))[0] == token


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'logprobs': 3},
    {'temperature': 1.0},
    {'temperature': 0.7, 'top_k': 2, 'logprobs': 0},
    {'temperature': 1.0, 'top_p': 0.5},
    {'temperature': 1.0, 'min_p': 0.4},
    {'temperature': 1.5, 'top_k': 3, 'top_p': 0.9, 'min_p': 0.1},
    {'repetition_penalty': 1.5},
    {'temperature': 1.0, 'repetition_penalty': 0.5, 'presence_penalty': 1.0, 'frequency_penalty': -1.0},
  ],
  ids=str,
)
@pytest.mark.parametrize('vocab_size', [5, 300])
def test_a_row_is_finite_if_it_has_no_nan_and_a_finite_highest_whoever_is_in_the_batch(options, vocab_size):
  rng = np.random.default_rng(8)
  logits = rng.standard_normal((40, vocab_size)).astype(np.float32)
  for row, value in enumerate([NAN, NEGATIVE_NAN, np.inf, -np.inf] * 9):
    logits[row, rng.choice(vocab_size, 1 + row % 4, replace=False)] = value
  logits[36], logits[37] = -np.inf, NAN
  others = [SamplingParams(), SamplingParams(temperature=1.0, top_k=2), SamplingParams(**options)]
  params = [SamplingParams(**options, seed=i) if i % 3 else others[i % 2] for i in range(40)]
  sampling = Sampling.stack(params, [9] * 40, [()] * 40, 40)
  history = np.stack([past(range(3), [0, 1, 1], vocab_size)] * 40)
  chosen = jax.jit(lambda: raw_sample(jnp.asarray(logits), sampling, np.full(40, 2), lambda: jnp.asarray(history)))()
  expected = ~np.isnan(logits).any(axis=1) & np.isfinite(logits.max(axis=1))
  np.testing.assert_array_equal(chosen.finite, expected)
  assert 0 < expected.sum() < 40


def test_asking_for_log_probabilities_changes_no_token():
  logits = np.random.default_rng(6).standard_normal((20, 50)).astype(np.float32)
  params = [SamplingParams(seed=i, temperature=float(i % 2)) for i in range(20)]
  telling = [dataclasses.replace(one, logprobs=i % 4) for i, one in enumerate(params)]
  np.testing.assert_array_equal(draw(params, logits), draw(telling, logits))


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
    others = [
      SamplingParams(seed=int(rng.integers(1000)), temperature=float(i % 3), min_p=0.1 * (i % 2)) for i in range(rows)
    ]
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
    Sampling.stack([SamplingParams(seed=seed)], [1], [()], 1).keys[0].tolist() for seed in (2**40 + 7, 7)
  )  # fmt: skip
  assert high == [2**8, 7] and low == [0, 7]


# ---------------------------------------------------------------------------- ends


def test_a_row_ends_with_a_stop_token_or_its_last_token():
  sampling = Sampling.stack([SamplingParams()] * 3, [3, 3, 3], [(5, 6, 9), (), (9,)], 5)
  tokens, generated = np.array([6, 9, 9, 0, 0]), np.array([1, 1, 1, 0, 0])
  assert sampling.ended(tokens, generated).tolist() == [True, False, True, True, True]  # padding has no token left
  assert sampling.ended(np.array([7, 7, 7, 7, 7]), np.array([2, 3, 2, 0, 0])).tolist()[:3] == [False, True, False]
