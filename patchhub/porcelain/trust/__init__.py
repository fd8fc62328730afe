"""For those who must answer: signatures, approvals, audits, and evidence in the forms of others."""
