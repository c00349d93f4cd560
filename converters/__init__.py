"""Files in, files out: checkpoints, tokenizers, targets, runtimes, the proof and the command line."""
