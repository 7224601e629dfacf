"""Training by comparison: of pairs of answers, or of answers with labels; their batches and their loss."""
