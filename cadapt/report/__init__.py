"""From a result to what a person reads: rich tables on stderr. Computes nothing."""
