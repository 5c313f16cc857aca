"""Bench: comparison of SID methods on one data set under one recommender, budget and tuning rule, in parallel and resumable."""
