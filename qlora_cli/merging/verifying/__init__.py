"""Verify a merge: compare models, module by module and token by token."""
