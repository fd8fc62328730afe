"""`report` and the pictures of scores: a repository as one page."""
