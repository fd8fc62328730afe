"""The text form of the porcelain: reads options, the environment and the terminal; holds no logic."""
