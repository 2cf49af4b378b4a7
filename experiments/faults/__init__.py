"""Faults on demand, for a soak and for tests: of transfers, of their ends, of steps and of whole workers."""
