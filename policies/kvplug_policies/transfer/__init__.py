"""Transfer codecs, one module per codec."""
