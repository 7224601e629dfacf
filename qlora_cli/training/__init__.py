"""Fine-tuning: plan a run, train it with TRL's `SFTTrainer`, keep it in a run directory."""
