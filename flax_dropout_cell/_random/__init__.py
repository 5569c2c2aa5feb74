"""Which bits come from which key: keys, random words, keep-masks."""
