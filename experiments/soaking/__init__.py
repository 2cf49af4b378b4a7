"""The parts of `experiments.soak`: clusters, requests and readers, what they must get, and waves of all that."""
