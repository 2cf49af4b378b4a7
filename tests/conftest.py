"""Eight virtual CPU devices for every test that computes, made before JAX starts; and the longest files first."""

import jax

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)

LONGEST = ('test_golden.py', 'test_notebooks.py', 'test_tokens.py', 'test_tpu_programs.py', 'test_worker.py')


def pytest_collection_modifyitems(items):
  """Begin with what takes longest: of two workers none then has a long file left when the other is done."""
  items.sort(key=lambda item: item.path.name not in LONGEST)
