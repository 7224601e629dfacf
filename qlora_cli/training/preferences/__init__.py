"""Training by comparison: pairs of answers, their batches and their loss."""
