"""How the embedded demo model is made: corpus, tokenizer, rows, model, training, export."""
