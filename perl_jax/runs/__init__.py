"""MODEL_DIR, checkpoints, and the base that a run stands on."""
