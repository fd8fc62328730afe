"""Recording an edit batch: reading facts, finding positions, optimising values, solving."""
