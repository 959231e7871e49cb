"""The Fisher of the user's own passes: hooks, records, where samples are, the audit, the sums."""
