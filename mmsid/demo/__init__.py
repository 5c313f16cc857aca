"""`mmsid demo`: draws a catalogue, runs the pipeline on it, appends new ads, and tells in a text and a page what happened."""
