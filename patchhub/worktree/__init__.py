"""The base in memory at a revision: opened, loaded, measured, judged, and its side memories."""
