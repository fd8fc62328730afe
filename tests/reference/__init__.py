"""Plain implementations of the published editors, one fact at a time: the oracles of the tests and of the benchmark."""
