"""The item tokenizer: heads (the quantizer policy), losses, training, assignment, clustering baselines."""
