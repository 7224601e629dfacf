"""Merge adapters into their base: plan, check, write tensor by tensor, verify and export."""
