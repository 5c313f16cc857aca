"""Item tokenizer: SID heads (quantizer policies), losses, training, encoding of catalogues, baseline SID methods."""
