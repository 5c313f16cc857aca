"""A small llava-style VLM of our own: built from config, trained on a catalogue, shipped for the demo."""
