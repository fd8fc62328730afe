"""Today's behaviour as fixed numbers and documents, through surfaces that a move of modules leaves alone."""
