"""Training with transformers' Trainer: pretraining from scratch, and distillation from a dense teacher."""
