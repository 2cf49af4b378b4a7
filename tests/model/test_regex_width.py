"""The width of a regular expression's matches is what Oniguruma finds, or nothing is said of it."""

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from pdjax.model.regex_width import Unbounded, match_width


@pytest.mark.parametrize(
  ('pattern', 'width'),
  [
    ('ab', (2, 2)),
    ('a|bcd|', (0, 3)),
    ('(?:ab?){2}', (2, 4)),
    (r'(?<name>\p{Lu}[^[:space:]\]]){1,3}?', (2, 6)),
    (r'\.\x{1F600}\u00e9\n', (4, 4)),
    ('a??', (0, 1)),
    ('[a[bc]&&[^d]]{0,2}', (0, 2)),
  ],
)
def test_width_of(pattern, width):
  Regex(pattern)
  assert match_width(pattern) == width


@pytest.mark.parametrize(
  'pattern',
  [
    'a*', 'a+', 'a{2,}', 'a{,2}', 'a{2}?', 'a{3,1}', 'a?+', 'a{1,2}{3}', '^a', 'a$', r'\ba', r'a\Z', 'a(?=b)',
    '(?<!a)b', r'(a)\1', '(?i:a)', '(?i)a', r'\Ra', r'\Xa', r'a\Kb', r'\Ga', '(?>a)', '[]a]', '[^]a]', r'\M-a', '(?#a)',
    '(', 'a)',
  ],
)  # fmt: skip
def test_nothing_is_said_of(pattern):
  with pytest.raises(Unbounded):
    match_width(pattern)


PARTS = st.sampled_from(
  [
    'a', 'b', '.', '[ab]', '[^a]', '(', '(?:', '(?<n>', ')', ')', '|', '?', '??', '{2}', '{1,2}', '{0,2}?', '{,2}', '*',
    '{2,1}', '{2}?', r'\w', r'\W', r'\.', r'\b', '[[:alpha:]]', '[a&&b]', r'\p{L}', ' ', '^', '$', r'\x61', r'\h', '{',
  ]
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.lists(PARTS, min_size=1, max_size=6).map(''.join), st.text('aab é😀.\n{', max_size=20))
def test_no_match_of_oniguruma_is_shorter_or_longer(pattern, text):
  try:
    least, most = match_width(pattern)
    regex = Regex(pattern)
  except (Unbounded, Exception):
    assume(False)
  unmatched = pre_tokenizers.Split(regex, 'removed').pre_tokenize_str(text)
  matched = [one for one in pre_tokenizers.Split(regex, 'isolated').pre_tokenize_str(text) if one not in unmatched]
  assert all(least <= len(one) <= most for one, _ in matched)
