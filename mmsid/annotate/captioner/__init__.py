"""A small llava-style VLM: built from a configuration, trained on the pictures of a catalogue, packaged for the demo."""
