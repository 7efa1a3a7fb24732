"""From a path or URL to samples, within limits and never outside them. PyAV and httpcore stop here."""
