"""What a run has to say at its end."""
