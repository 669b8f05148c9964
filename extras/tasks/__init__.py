"""Tasks of one's own: an example, and reasoning-gym's generators."""
