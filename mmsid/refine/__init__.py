"""RL refinement of the item tokenizer: reward model, policy optimisation, acceptance gate."""
