"""Who vouches for what: signed statements about commits, tags and approvals."""
