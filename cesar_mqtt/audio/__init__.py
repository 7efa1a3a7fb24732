"""From a path or URL to samples, within limits and never outside of them.

PyAV and the HTTP client stop here: no other package imports them. The samples are mono float32 at 16 kHz.
"""
