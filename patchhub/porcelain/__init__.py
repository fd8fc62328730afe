"""The verbs: one function each, the same names and options as the command line."""
