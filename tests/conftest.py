"""Eight virtual CPU devices for every test that computes; they must be made before JAX starts."""

import jax

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
