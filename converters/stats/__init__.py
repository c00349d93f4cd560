"""The statistics archive of `dscq calibrate`: calibrate once, convert to anything later.

run.py          calibrate_checkpoint(): what a newcomer reads first
prepare.py      what is checked and decided before the work
archive.py      Archive: an archive opened, its statistics read as they are asked for
manifest.py     stats.json: what the archive is, of which model and corpus, and its members' hashes
members.py      the safetensors files: what they hold, how they are written and read
fingerprint.py  what tells one model from another, without reading all of it
progress.py     what a killed run leaves, so that the next one goes on
states.py       the hidden states between two blocks, in two files
"""
