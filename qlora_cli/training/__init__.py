"""Fine-tuning: plan a run, train it with TRL's `SFTTrainer`, record it in a run directory."""
