"""The local store: objects, refs and operations, the derived index, and the repository that joins them."""
