"""Which kinds of attention are there: none but plain."""

has_flash_attn = False
has_xformers = False
