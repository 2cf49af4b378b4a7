"""The compiler's estimates: read from a process of its own, and honest about what it cannot say."""

import pytest

from pallas_kernels import cases, devices, static_cost

compiles = pytest.mark.skipif(static_cost.compiler() is None, reason='there is no TPU compiler here; see topology()')


@compiles
def test_a_case_has_a_cost_that_repeats():
  small = {'n': 512, 'k': 512, 'kind': 'int8'}
  cost, again = (static_cost.measure('v6e', 'pallas_kernels.cases:matmul', small) for _ in range(2))
  assert cost == again
  assert cost.bound_by == 'memory' and 0 < cost.bound_cycles < cost.cycles and 0 < cost.percent < 100
  assert cost.kernel_cycles <= cost.cycles and cost.bundles > 0 and not cost.failure


@compiles
@pytest.mark.parametrize(
  'device, case, message',
  [
    ('v6e', 'pallas_kernels.cases:matmul', 'group_size 3 does not divide K'),
    ('v9', 'pallas_kernels.cases:matmul', "device 'v9' is unknown"),
  ],
)
def test_what_cannot_be_built_says_why(device, case, message):
  with pytest.raises(RuntimeError, match=message):
    static_cost.measure(device, case, {'n': 128, 'k': 128, 'group_size': 3 if device == 'v6e' else None})


def test_the_bound_of_a_case_is_what_it_moves_or_computes():
  case = cases.decode(batch=2, context=256, query_heads=4, kv_heads=2, page_size=128)
  cached = 2 * 256 * 2 * 2 * 128 * 2
  rest = 2 * 2 * 4 * 128 * 2 + 2 * 2 * 4 + 2 * 4  # queries, results, tables, lengths
  assert (case.hbm_bytes, case.flops) == (cached + rest, 4 * 2 * 256 * 4 * 128)
  compute_s, memory_s = case.least_seconds(devices.by_name('v5e'))
  assert memory_s == case.hbm_bytes / 819e9 and compute_s == case.flops / 197e12


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr(static_cost, 'compiler', lambda: None)
  with pytest.raises(RuntimeError, match=r'there is no TPU compiler here; pip install .* libtpu=='):
    static_cost.topology(devices.by_name('v6e'))
