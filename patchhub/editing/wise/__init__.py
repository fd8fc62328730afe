"""WISE: edits in a side memory beside the model, and a router (docs/wise.md)."""
