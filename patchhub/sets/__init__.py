"""What a revision holds and how one becomes another: elements, columns, commits, merging, shards. Store and NumPy, no torch."""
