"""What one gang does: data, objective, engine, checkpoint, artifact, samplers."""
