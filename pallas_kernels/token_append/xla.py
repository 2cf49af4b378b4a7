"""Tokens appended in plain XLA, which is the definition: what CPU uses."""

from pallas_kernels.token_append import reference

append_tokens = reference.append_tokens
