"""The bench: every arm on one data set under one recommender, one budget and one tuning rule, in parallel, resumable."""
