"""From a path or URL to samples, within limits."""
