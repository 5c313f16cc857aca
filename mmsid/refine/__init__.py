"""Quality-aware refinement of the quantizer: evidence, reward model, policy arithmetic, loop, acceptance gate."""
